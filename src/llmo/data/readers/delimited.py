"""Reads CSV and TSV: one row a record, the first row names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from llmo.data.encoding import lines, open_text, too_long
from llmo.data.readers.base import MAX_CELL, RawRow, ReadLog
from llmo.errors import DataError
from llmo.specs import DataSpec

_SNIFF = 1 << 18
_DELIMITERS = ",;\t|"


def read(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """Rows as `{column: cell}`. Raises DataError with the line for broken quotes and for ragged rows."""
    where = log.name(path)
    with open_text(path, spec.encoding, log) as file:
        sample = file.read(_SNIFF)
        file.seek(0)
        delimiter = _delimiter(sample)
        quoting = _quoting(sample, delimiter)
        if quoting == csv.QUOTE_NONE:
            log.notes.append(f"{where}: quotes are read as characters, because they do not enclose whole cells")
        records = _records(file, where, delimiter, quoting)
        first = next(records, None)
        if first is None:
            raise DataError("the file has only blank lines", where=where, hint="give a file with at least a few rows")
        header = _header(first[1], where)
        for line, cells in records:
            if len(cells) != len(header):
                raise _ragged(cells, header, f"{where}:{line}", delimiter)
            yield RawRow(dict(zip(header, cells, strict=True)), f"{where}:{line}")


def _records(file: TextIO, where: str, delimiter: str, quoting: int) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line it begins on; blank lines are passed over."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    at, begin, held = 0, 1, 0

    def feed() -> Iterator[str]:
        nonlocal at, held
        for number, line in lines(file, where):
            at = number
            held += len(line)
            if held > MAX_CELL:
                raise _swallowed(f"{where}:{begin}", number)
            yield line

    reader = csv.reader(feed(), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    while True:
        begin, held = at + 1, 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _broken(str(error), f"{where}:{begin}", at) from None
        if cells and not (len(cells) == 1 and not cells[0].strip()):
            yield begin, cells


def _broken(message: str, where: str, last: int) -> DataError:
    if "unexpected end of data" in message:
        return DataError(
            f"broken quoting: a quote opened in this row is never closed (read on to line {last})",
            where=where,
            hint='close the quote; a quote inside a quoted cell is written twice: ""',
        )
    return DataError(
        f"broken quoting: {message}", where=where, hint='a quote inside a quoted cell is written twice: ""'
    )


def _swallowed(where: str, last: int) -> DataError:
    error = too_long(where)
    if not where.endswith(f":{last}"):
        error.hint = (
            'a quote opened in this row is probably never closed; a quote in a quoted cell is written twice: ""'
        )
    return error


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(
            f"two columns are called '{twice[0]}'", where=f"{where}:1", hint="the first row must name each column once"
        )
    return [name or f"column {i + 1}" for i, name in enumerate(names)]


def _ragged(cells: list[str], header: list[str], where: str, delimiter: str) -> DataError:
    more = len(cells) > len(header)
    return DataError(
        f"this row has {len(cells)} cells, the first row has {len(header)}",
        where=where,
        hint=f"put quotes around a cell that holds {delimiter!r}" if more else "a cell or a line end is missing",
    )


def _delimiter(sample: str) -> str:
    """The sign that divides the first line, outside of quotes; a comma when there is none."""
    first = next((line for line in sample.splitlines() if line.strip()), "")
    bare = "".join(part for i, part in enumerate(first.split('"')) if i % 2 == 0)
    best = max(_DELIMITERS, key=bare.count)
    return best if best in bare else ","


def _quoting(sample: str, delimiter: str) -> int:
    """TSV files often hold quotes that quote nothing: then each is a character like any other."""
    if delimiter != "\t" or '"' not in sample:
        return csv.QUOTE_MINIMAL
    rows = [line.split("\t") for line in sample.split("\n")[:-1] if line.strip()]
    if not rows or len({len(cells) for cells in rows}) != 1:
        return csv.QUOTE_MINIMAL
    quoted = [cell for cells in rows for cell in cells if cell.startswith('"')]
    return csv.QUOTE_MINIMAL if all(_encloses(cell) for cell in quoted) else csv.QUOTE_NONE


def _encloses(cell: str) -> bool:
    return len(cell) > 1 and cell.endswith('"') and '"' not in cell[1:-1].replace('""', "")
