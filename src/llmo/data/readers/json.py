"""Reads JSON (a list of objects, or one object of splits or columns) and JSON Lines (one object a line)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmo.data.encoding import lines, open_text
from llmo.data.jsonvalue import TooDeep, mended
from llmo.data.readers import squad
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.splitnames import split_name
from llmo.errors import DataError
from llmo.specs import DataSpec

_MAX_FILE = 256 << 20
_LISTS = ("data", "rows", "examples", "items", "records")


def read_lines(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """One object a line. Raises DataError with the line for anything else."""
    where = log.name(path)
    with open_text(path, spec.encoding, log) as file:
        for number, line in lines(file, where):
            if line.strip():
                place = f"{where}:{number}"
                yield from _rows(_object(_parse(line, place, place), place, log), place)


def read(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """A whole JSON document; places are `file#row`, counted from 1."""
    where = log.name(path)
    if path.stat().st_size > _MAX_FILE:
        raise DataError(
            f"a JSON document of more than {_MAX_FILE >> 20} MiB is not read at once",
            where=where,
            hint="turn it into JSON Lines: jq -c '.[]' FILE > FILE.jsonl",
        )
    with open_text(path, spec.encoding, log) as file:
        document = _parse(file.read(), where)
    for split, rows in _parts(document, where):
        mark = f"{where}#{split} " if split else f"{where}#"
        for number, row in enumerate(rows, 1):
            for raw in _rows(_object(row, f"{mark}{number}", log), f"{mark}{number}"):
                yield RawRow({**raw.values, "split": split}, raw.place) if split else raw


def _rows(values: Mapping[str, Any], place: str) -> Iterator[RawRow]:
    """An object is a row, but one of SQuAD's articles is a row for each of its questions."""
    if not squad.is_article(values):
        yield RawRow(values, place)
        return
    for question, at in squad.questions(values, place):
        yield RawRow(question, at)


def _parse(text: str, where: str, line: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = line or f"{where}:{error.lineno}"
        message = error.msg[:1].lower() + error.msg[1:]
        raise DataError(
            f"broken JSON: {message} at column {error.colno}", where=at, hint="mend this line or remove it"
        ) from None
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError:  # a number of more than 4300 digits
        raise DataError("broken JSON: a number is too long", where=where, hint="write it as a string") from None


def _object(value: Any, place: str, log: ReadLog) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"a row must be an object of columns, this is {_kind(value)}",
            where=place,
            hint='write each row as {"text": "...", "label": "..."}, or {"messages": [...]}',
        )
    try:
        found, count = mended(value)
    except TooDeep:
        raise _too_deep(place) from None
    log.changed["encoding"] += bool(count)
    return dict(found)


def _parts(document: Any, where: str) -> list[tuple[str | None, list[Any]]]:
    if isinstance(document, list):
        return [(None, document)]
    if not isinstance(document, dict):
        raise DataError(f"expected a list of rows, this is {_kind(document)}", where=where, hint="write [{...}, ...]")
    lists = {key: value for key, value in document.items() if isinstance(value, list)}
    if lists and all(split_name(key) for key in lists):
        return [(split_name(key), value) for key, value in lists.items()]
    for key in _LISTS:
        if isinstance(document.get(key), list):
            return [(None, document[key])]
    lengths = {len(value) for value in lists.values()}
    if lists and len(lists) == len(document) and len(lengths) == 1:
        return [(None, [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)])]
    raise DataError(
        "this object holds neither rows, nor splits, nor columns of one length",
        where=where,
        hint="write a list of rows: [{...}, ...]",
    )


def _too_deep(where: str) -> DataError:
    return DataError(
        "JSON nested too deeply", where=where, hint="a row is an object of columns, with little in them nested"
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
