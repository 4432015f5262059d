"""What an engine reads of a model folder before it opens the weights: its config, and whether the parts are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo.errors import ModelError

# Families whose positions start after the padding id, so that the table is longer than the text may be.
_OFFSET_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "mpnet",
    "data2vec-text",
    "mvp",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`. Raises ModelError when it is missing or is not a JSON object."""
    return _object(require(folder, "config.json"))


def end_ids(folder: Path) -> frozenset[int]:
    """The ids that end an answer: those of the card, else of generation_config.json, else of config.json; empty where
    nothing names one. Raises ModelError for a file that is not a JSON object."""
    options = _beside(folder, "llmo.json").get("task", {}).get("options", {})
    found = options.get("end_ids")
    for name in ("generation_config.json", "config.json"):
        if found in (None, []):
            found = _beside(folder, name).get("eos_token_id")
    return frozenset(i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int))


def card_precision(folder: Path) -> str | None:
    """The precision that a model folder's card names; None where there is no card."""
    card = _beside(folder, "llmo.json")
    return str(card.get("precision") or "fp32") if card else None


def card_applied(folder: Path) -> str | None:
    """What a model folder's card says the model runs with beside its weights (`engines.applied`), if anything."""
    return _beside(folder, "llmo.json").get("applied")


def refuse_applied(folder: Path) -> None:
    """For engines that run the weights alone: raises ModelError for a model that runs with more beside them."""
    kind = card_applied(folder)
    if kind is not None:
        raise ModelError(
            f"the model runs with a {kind} beside its weights, and the engines that write run the weights alone",
            hint="open it in plain peft, or train with a method that changes the weights, such as lora, dora or ia3",
            where=str(folder),
        )


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


def position_limit(config: Mapping[str, Any]) -> int | None:
    """The longest text in tokens, special ones included; None where the architecture sets no limit."""
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(positions, int) or positions <= 0:
        return None
    if config.get("model_type") in _OFFSET_POSITIONS:
        return positions - int(config.get("pad_token_id") or 0) - 1
    return positions


def pad_token_id(config: dict[str, Any]) -> int:
    """The id that fills a batch; masked out, so any valid id serves where the config names none."""
    value = config.get("pad_token_id")
    return value if isinstance(value, int) and value >= 0 else 0


def _beside(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object that the folder may hold; empty when it does not."""
    path = folder / name
    return _object(path) if path.is_file() else {}


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object", hint="make the model folder again", where=str(path))
    return value
