"""The files of a job directory: their names, and the two checks that both sides of it share."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from llmo.files import MANIFEST

SPEC = "spec.json"
EVENTS = "events.jsonl"
RESULT = "result.json"
ERROR = "error.json"
CARD = "card.json"
LOG = "output.log"
HEARTBEAT = "heartbeat"
STOP = "stop"
LOCK = "lock"
OUT = "out"
CHILDREN = "children"
CHECKPOINT = "checkpoint"
CACHE = "cache"


def job_dir(home: Path, id: int) -> Path:
    return home.absolute() / "jobs" / str(id)


def child_file(folder: Path, key: str) -> Path:
    """Where a child's result is put; a key that cannot be a file name goes by its hash."""
    safe = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", key) is not None
    name = key if safe else "~" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    return folder / CHILDREN / f"{name}.json"


def read_json(path: Path) -> Any:
    """The JSON value of a file, or None where there is none or it is not whole."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def finished(folder: Path, attempt: int) -> bool:
    """Whether this attempt's worker came to its very end: the manifest is the last thing it writes."""
    manifest = read_json(folder / OUT / MANIFEST)
    return isinstance(manifest, dict) and manifest.get("attempt") == attempt and isinstance(manifest.get("files"), dict)


def intact(folder: Path) -> bool:
    """Whether every file that the manifest of `out/` lists is there in its full length."""
    manifest = read_json(folder / OUT / MANIFEST)
    try:
        return all((folder / OUT / name).stat().st_size == e["size"] for name, e in manifest["files"].items())
    except (OSError, TypeError, KeyError, AttributeError):
        return False
