"""Finds how a source is laid out: which files it has, each one's format, and the splits that names tell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmo.data.encoding import detect, opened
from llmo.data.readers.folders import files_below, label_folders
from llmo.data.splitnames import split_name, split_of_file
from llmo.data.tags import problem
from llmo.errors import DataError
from llmo.specs import DataSpec

_ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".inter": "inter",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".conll": "conll",
    ".conll03": "conll",
    ".conllu": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".yml": "chatterbot",
    ".yaml": "chatterbot",
    ".txt": "",
}
_DOCUMENTS = (".txt", ".text", ".md")
_JSON = re.compile(rb"\s*(?:\[\s*[\[{]|\{\s*\")")
_HEAD = 1 << 16


@dataclass(frozen=True, slots=True)
class Part:
    """A file, or a folder of labels, with the reader it needs and the split its name tells."""

    path: Path
    format: str
    split: str | None = None


def parts(source: Path, spec: DataSpec, *, documents: bool = False) -> list[Part]:
    """What there is to read. Raises DataError when the layout is not understood, or names contradict each other.

    With `documents`, text files are texts to learn from, and folders stand for no labels.
    """
    try:
        if source.is_file():
            return [Part(source, _format(source, source.name, spec, documents))]
        files = _data_files(p for p in sorted(source.iterdir()) if p.is_file())
        folders = label_folders(source)
    except PermissionError:
        raise DataError("no permission to read this folder", where=source.name, hint="chmod u+rx it") from None
    if documents:
        return _of_documents(source, files, folders, spec)
    if spec.format == "folders" or (folders and all(_ENDINGS[p.suffix.casefold()] == "chatterbot" for p in files)):
        return _of_folders(source, folders, spec)
    if not files:
        raise DataError(
            "the folder holds no data file and no folder of text files",
            where=source.name,
            hint="give CSV, TSV, JSON, JSONL, Parquet or CoNLL files, or one folder a label with .txt files in it",
        )
    return _of_files(files, spec)


def _data_files(paths: Iterable[Path]) -> list[Path]:
    """Those that end as data files do; YAML, which often only describes the others, when there is nothing else."""
    files = [path for path in paths if path.suffix.casefold() in _ENDINGS]
    return [path for path in files if _ENDINGS[path.suffix.casefold()] != "chatterbot"] or files


def _of_folders(source: Path, folders: list[Path], spec: DataSpec) -> list[Part]:
    return _by_split(folders, spec, documents=False) or [Part(source, "folders")]


def _of_documents(source: Path, files: list[Path], folders: list[Path], spec: DataSpec) -> list[Part]:
    """Folders and files of splits, else the data files at any depth, else every text file as a document."""
    found = [] if files else _by_split(folders, spec, documents=True)
    if found:
        return found
    files = files or _data_files(files_below(source))
    by_split = any(split_of_file(file.stem) == "train" for file in files)
    told = spec.format not in ("auto", "folders", "text")
    if by_split or (files and told) or any(_ENDINGS[file.suffix.casefold()] for file in files):
        return _of_files(files, spec, documents=True)
    return [Part(source, "text")]


def _by_split(folders: list[Path], spec: DataSpec, *, documents: bool) -> list[Part]:
    """What is in folders that are named after splits; nothing when they are not."""
    names = [split_name(folder.name) for folder in folders]
    if "train" not in names or None in names:
        return []
    found = []
    for folder, split in zip(folders, names, strict=True):
        found += [Part(part.path, part.format, split) for part in parts(folder, spec, documents=documents)]
    return found


def _of_files(files: list[Path], spec: DataSpec, *, documents: bool = False) -> list[Part]:
    splits = {file: split_of_file(file.stem) for file in files}
    if any(split == "train" for split in splits.values()):
        files = [file for file in files if splits[file]]  # a README.txt or labels.json beside them is no data
    else:
        splits = dict.fromkeys(files)
    found = [Part(file, _format(file, file.name, spec, documents), splits[file]) for file in files]
    formats = sorted({part.format for part in found})
    if len(formats) > 1:
        raise DataError(
            f"the folder mixes formats: {', '.join(formats)}",
            where=files[0].parent.name,
            hint="give one file, or keep files of one format in the folder",
        )
    return found


def _format(path: Path, where: str, spec: DataSpec, documents: bool) -> str:
    if spec.format not in ("auto", "folders"):
        return spec.format
    if spec.format == "folders":
        raise DataError("`format: folders` needs a folder", where=where, hint="leave out `format`")
    with opened(path, where) as file:
        head = file.read(_HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    named = _ENDINGS.get(path.suffix.casefold(), "")
    if named == "json" and _is_json_lines(head):
        return "jsonl"
    return named or _by_content(path, head, where, spec, documents)


def _is_json_lines(head: bytes) -> bool:
    first, _, rest = head.lstrip().partition(b"\n")
    if not first.startswith(b"{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _by_content(path: Path, head: bytes, where: str, spec: DataSpec, documents: bool) -> str:
    if not head:
        raise DataError("the file is empty", where=where, hint="give a file with at least a few rows")
    if _is_json_lines(head):
        return "jsonl"
    prose = documents and path.suffix.casefold() in _DOCUMENTS
    if _JSON.match(head) if prose else head.lstrip()[:1] in (b"[", b"{"):
        return "json"
    encoding = detect(path, spec.encoding, where)  # also refuses what is not text
    if prose:
        return "text"
    if _looks_like_conll(head.decode(encoding.codec, "replace")):
        return "conll"
    first = head.split(b"\n", 1)[0]
    if b"\t" in first:
        return "tsv"
    if b"," in first or b";" in first:
        return "csv"
    raise DataError(
        f"cannot tell the format of a file called '{path.name}'", where=where, hint="say it: format: csv (or tsv, ...)"
    )


def _looks_like_conll(text: str) -> bool:
    """Most lines are a word and a tag."""
    lines = [line.split() for line in text.split("\n")[:200] if line.strip() and not line.startswith("# ")]
    tagged = [cells for cells in lines if len(cells) >= 2 and not problem(cells[-1])]
    return len(lines) > 1 and len(tagged) >= 0.9 * len(lines)
