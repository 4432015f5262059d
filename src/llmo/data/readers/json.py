"""Reads JSON (a list of objects, or one object of splits or columns) and JSON Lines (one object a line)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmo.data.encoding import lines, open_text
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.splitnames import split_name
from llmo.errors import DataError
from llmo.specs import DataSpec

_MAX_FILE = 256 << 20
_MAX_DEPTH = 32
_SURROGATE = re.compile("[\ud800-\udfff]")
_LISTS = ("data", "rows", "examples", "items", "records")


def read_lines(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """One object a line. Raises DataError with the line for anything else."""
    where = log.name(path)
    with open_text(path, spec.encoding, log) as file:
        for number, line in lines(file, where):
            if line.strip():
                place = f"{where}:{number}"
                yield RawRow(_object(_parse(line, place, place), place, log), place)


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
            values = _object(row, f"{mark}{number}", log)
            yield RawRow({**values, "split": split} if split else values, f"{mark}{number}")


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
            hint='write each row as {"text": "...", "label": "..."}',
        )
    mended, count = _without_surrogates(value, place, _MAX_DEPTH)
    log.changed["encoding"] += bool(count)
    return dict(mended)


def _without_surrogates(value: Any, place: str, depth: int) -> tuple[Any, int]:
    """Half of a surrogate pair is no character: it becomes U+FFFD, which keeps every offset."""
    if isinstance(value, str):
        return (value, 0) if value.isascii() else _SURROGATE.subn("\ufffd", value)
    if not isinstance(value, (dict, list)):
        return value, 0
    if depth == 0:
        raise _too_deep(place)
    if isinstance(value, list):
        items = [_without_surrogates(item, place, depth - 1) for item in value]
        return [item[0] for item in items], sum(item[1] for item in items)
    keys = [_without_surrogates(key, place, depth - 1) for key in value]
    items = [_without_surrogates(item, place, depth - 1) for item in value.values()]
    mended = {key[0]: item[0] for key, item in zip(keys, items, strict=True)}
    return mended, sum(part[1] for part in keys + items)


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
    return DataError("JSON nested too deeply", where=where, hint="a row is a flat object of columns")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
