"""Reads what a worker appended to its `events.jsonl` since the last look, line by line, whatever is in it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = tuple[float, str, Mapping[str, Any]]  # seconds since 1970, kind, data

LIMIT = 4 << 20

# What each kind must carry for the scheduler to act on it.
_SHAPES: dict[str, dict[str, type]] = {
    "progress": {"step": int},
    "metric": {},
    "note": {"text": str},
    "ready": {"address": str},
    "spawn": {"key": str, "op": str, "spec": dict, "inputs": dict, "name": str},
    "stop": {"key": str},
}


def read(path: Path, offset: int) -> tuple[list[Line], int]:
    """The complete lines after byte `offset`, and the offset after them; a torn last line is left for next time.

    A line that is not an event becomes an `error` event that quotes it.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(LIMIT)
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    if end == 0:
        if len(data) < LIMIT:
            return [], offset
        return [_bad(data, f"a line longer than {LIMIT} bytes")], offset + len(data)
    return [_parse(line) for line in data[:end].split(b"\n")[:-1] if line.strip()], offset + end


def _parse(line: bytes) -> Line:
    try:
        body = json.loads(line, parse_constant=str)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text, for JSON it is
    except (ValueError, RecursionError):
        return _bad(line, "not JSON")
    if not isinstance(body, dict) or not isinstance(body.get("data"), dict):
        return _bad(line, "not an event")
    at, kind, data = body.get("at"), str(body.get("kind")), body["data"]
    shape = _SHAPES.get(kind)
    if shape is None or not isinstance(at, int | float) or isinstance(at, bool):
        return _bad(line, "an event of no known kind")
    whole = all(isinstance(data.get(key), wanted) for key, wanted in shape.items())
    if not whole or (kind == "spawn" and not _counts(data.get("needs", {}))):
        return _bad(line, f"a '{kind}' event that lacks something")
    return float(at), kind, data


def _counts(needs: Any) -> bool:
    """Whether a child's needs, where they are said, are whole numbers, of which `cores_max` may be none."""
    return isinstance(needs, dict) and all(
        type(count) is int or (count is None and name == "cores_max") for name, count in needs.items()
    )


def _bad(line: bytes, why: str) -> Line:
    text = line[:200].decode("utf-8", "replace")
    return time.time(), "error", {"text": f"the job wrote {why}: {text}"}
