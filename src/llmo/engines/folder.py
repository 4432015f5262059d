"""What an engine reads of a model folder before it opens the weights: its config, and whether the parts are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmo.errors import ModelError


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`. Raises ModelError when it is missing or is not a JSON object."""
    path = require(folder, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelError("config.json is not a JSON object", hint="make the model folder again", where=str(path))
    return config


def require(folder: Path, name: str) -> Path:
    """The path of a file the folder must hold. Raises ModelError when it is not there."""
    path = folder / name
    if not path.is_file():
        raise ModelError(
            f"the model folder has no {name}",
            hint="give a folder that `llmo train` or `llmo compress` wrote, or a Hugging Face folder with weights",
            where=str(folder),
        )
    return path


def pad_token_id(config: dict[str, Any]) -> int:
    """The id that fills a batch; masked out, so any valid id serves where the config names none."""
    value = config.get("pad_token_id")
    return value if isinstance(value, int) and value >= 0 else 0
