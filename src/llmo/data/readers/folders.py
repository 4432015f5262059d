"""Reads plain-text files in folders: the folder is the label, each file a text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from llmo.data.encoding import read_text
from llmo.data.readers.base import RawRow, ReadLog
from llmo.errors import DataError
from llmo.specs import DataSpec

TEXT_ENDINGS = ("", ".txt", ".text", ".md", ".html", ".htm")


def read(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """Rows of `text` and `label`, by folder and name; links and files with other endings are left out, and told."""
    skipped = 0
    found = False
    for folder in label_folders(path):
        for file in files_below(folder):
            if file.is_symlink() or not is_text(file):
                skipped += 1
                continue
            found = True
            yield RawRow({"text": read_text(file, spec.encoding, log), "label": folder.name}, log.name(file))
    if skipped:
        log.notes.append(f"{log.name(path)}: {skipped} files were left out: links, or no ending of a text file")
    if not found:
        raise DataError(
            "no text files in folders here",
            where=log.name(path),
            hint="one folder a label, with .txt files in it: LABEL/NAME.txt",
        )


def label_folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith((".", "__")))


def is_text(path: Path) -> bool:
    suffix = path.suffix.casefold()
    return suffix in TEXT_ENDINGS or suffix[1:].isdigit()


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and those below it, but hidden ones. Raises DataError for a folder that may not be read."""

    def refused(error: OSError) -> None:
        name = Path(str(error.filename)).name
        raise DataError("no permission to read this folder", where=name, hint=f"chmod u+rx {name}") from None

    found = []
    for top, folders, names in os.walk(folder, onerror=refused):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(top) / name for name in names if not name.startswith(".")]
    return sorted(found)
