"""Reads plain text to learn to write from: a file's paragraphs, or the files of a folder, each a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmo.data.encoding import lines, open_text, read_text, too_long
from llmo.data.readers.base import MAX_CELL, RawRow, ReadLog
from llmo.data.readers.folders import files_below, is_text
from llmo.errors import DataError
from llmo.specs import DataSpec

_SAMPLE = 1 << 18


def read(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """Rows of `text`. A folder's links and files with other endings are left out, and told."""
    return _documents(path, spec, log) if path.is_dir() else _paragraphs(path, spec, log)


def _documents(folder: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    skipped = 0
    found = False
    for file in files_below(folder):
        if file.is_symlink() or not is_text(file):
            skipped += 1
            continue
        found = True
        yield RawRow({"text": read_text(file, spec.encoding, log)}, log.name(file))
    if skipped:
        log.notes.append(f"{log.name(folder)}: {skipped} files were left out: links, or no ending of a text file")
    if not found:
        raise DataError("no text files here", where=log.name(folder), hint="give .txt files, each a document")


def _paragraphs(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """Blank lines divide; a file without any has a text on every line."""
    where = log.name(path)
    with open_text(path, spec.encoding, log) as file:
        sample = file.read(_SAMPLE)
        file.seek(0)
        by_line = not any(not line.strip() for line in sample.strip().split("\n"))
        paragraph: list[str] = []
        begin, size = 0, 0
        for number, line in lines(file, where):
            if line.strip():
                begin = begin if paragraph else number
                paragraph.append(line)
                size += len(line)
                if size > MAX_CELL:
                    raise too_long(f"{where}:{begin}")
                if not by_line:
                    continue
            if paragraph:
                yield RawRow({"text": "".join(paragraph).rstrip("\n")}, f"{where}:{begin}")
            paragraph, size = [], 0
        if paragraph:
            yield RawRow({"text": "".join(paragraph).rstrip("\n")}, f"{where}:{begin}")
