"""Which tokens end an answer: what the card says, else what the Hugging Face files beside the weights say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def end_ids(folder: Path) -> frozenset[int]:
    """Empty when nothing names one."""
    options = _read(folder / "llmo.json").get("task", {}).get("options", {})
    for found in (
        options.get("end_ids"),
        _read(folder / "generation_config.json").get("eos_token_id"),
        _read(folder / "config.json").get("eos_token_id"),
    ):
        ids = found if isinstance(found, list) else [found]
        if named := frozenset(i for i in ids if isinstance(i, int)):
            return named
    return frozenset()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
