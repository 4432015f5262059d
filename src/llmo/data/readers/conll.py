"""Reads CoNLL files: a token and its tag a line, blank lines between sentences, -DOCSTART- between documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmo.data.encoding import lines, open_text, too_long
from llmo.data.readers.base import MAX_CELL, RawRow, ReadLog
from llmo.data.tags import problem
from llmo.errors import DataError
from llmo.specs import DataSpec


@dataclass(slots=True)
class _Sentence:
    tokens: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    line: int = 0
    size: int = 0


def read(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """Rows of `tokens` and `tags`; the first column is the token, the last the tag. Raises DataError with the line."""
    where = log.name(path)
    sentence = _Sentence()
    document, columns, bare = 0, 0, 0
    with open_text(path, spec.encoding, log) as file:
        for number, line in lines(file, where):
            cells = _cells(line)
            if not cells or cells[0] == "-DOCSTART-":
                if sentence.tokens:
                    yield _row(sentence, where, document)
                    sentence = _Sentence()
                document += bool(cells)
                continue
            if not sentence.tokens and _is_comment(line, len(cells), columns):
                continue
            columns = columns or len(cells)
            bare += _add(sentence, cells, columns, f"{where}:{number}", number)
        if sentence.tokens:
            yield _row(sentence, where, document)
    if bare:
        log.notes.append(f"{where}: {bare} entities begin with I- and not B-: read as IOB1")


def _cells(line: str) -> list[str]:
    """Cells are divided by tabs where there are any, so that a token may hold a space."""
    text = line.strip(" \r\n")
    if "\t" in text:
        return text.split("\t") if text.strip() else []
    return text.split()


def _is_comment(line: str, cells: int, columns: int) -> bool:
    """CoNLL-U writes `# key = value` before a sentence; `#` may also be a token of a tweet."""
    if not line.startswith("#"):
        return False
    return cells != columns if columns else line.startswith("# ") and "\t" not in line


def _add(sentence: _Sentence, cells: list[str], columns: int, where: str, number: int) -> bool:
    """Take one token; True when its tag begins an entity with I-."""
    if len(cells) < 2 or len(cells) != columns:
        raise DataError(
            f"expected {max(columns, 2)} columns (token ... tag), found {len(cells)}",
            where=where,
            hint="one token and its tag a line, divided by a tab; a blank line between sentences",
        )
    token, tag = cells[0], cells[-1].strip()
    wrong = problem(tag)
    if wrong:
        raise DataError(wrong, where=where, hint="tags are O, B-TYPE and I-TYPE")
    sentence.line = sentence.line or number
    sentence.size += len(token) + 1
    if sentence.size > MAX_CELL:
        raise too_long(f"{where}")
    before = sentence.tags[-1] if sentence.tags else "O"
    sentence.tokens.append(token)
    sentence.tags.append(tag)
    return tag.startswith("I-") and before[2:] != tag[2:]


def _row(sentence: _Sentence, where: str, document: int) -> RawRow:
    values = {"tokens": sentence.tokens, "tags": sentence.tags}
    return RawRow({**values, "document": f"{where} {document}"} if document else values, f"{where}:{sentence.line}")
