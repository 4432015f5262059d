"""Values that came out of JSON, made safe to go into it again: bounded depth, whole characters, finite numbers."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


class TooDeep(ValueError):
    """Nested deeper than `MAX_DEPTH`."""


def mended(value: Any, depth: int = MAX_DEPTH) -> tuple[Any, int]:
    """The value, and how many halves of surrogate pairs in it became U+FFFD, which keeps every offset.

    Half of a pair is no character. Raises TooDeep.
    """
    if isinstance(value, str):
        return (value, 0) if value.isascii() else _SURROGATE.subn("\ufffd", value)
    if not isinstance(value, (dict, list)):
        return value, 0
    if depth == 0:
        raise TooDeep
    if isinstance(value, list):
        items = [mended(item, depth - 1) for item in value]
        return [item[0] for item in items], sum(item[1] for item in items)
    keys = [mended(key, depth - 1) for key in value]
    items = [mended(item, depth - 1) for item in value.values()]
    found = {key[0]: item[0] for key, item in zip(keys, items, strict=True)}
    return found, sum(part[1] for part in keys + items)


def parsed(text: str) -> Any:
    """The value that JSON within a string stands for, mended. Raises ValueError for anything else."""
    try:
        return mended(json.loads(text))[0]
    except RecursionError:
        raise TooDeep from None


def dumped(value: Any) -> str:
    """The value as one line of JSON. Raises ValueError for what JSON cannot say: NaN, dates, bytes, endless nesting."""
    try:
        return json.dumps(mended(value)[0], ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
