"""Reads and writes what lies beside a model's weights: its card, its golden evidence, its task and its tokeniser.

NumPy and `tokenizers` only, so that a replica and the control plane can open a model folder without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmo import plugins
from llmo.errors import ModelError
from llmo.files import publish_json, sha256_file
from llmo.tasks.base import Task

CARD = "llmo.json"
GOLDEN = "golden.json"
TOKENIZER = "tokenizer.json"
ADAPTER = "adapter"  # folder of the LoRA that a model was trained with, as peft saves it
FORMAT = 1


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a model folder. Raises ModelError when there is none, or one that cannot be read."""
    card = _read_json(folder / CARD, hint="train one, or save one with llmo.classic.save")
    if not isinstance(card, dict) or not isinstance(card.get("task"), dict):
        raise ModelError("the card says nothing of a task", where=str(folder / CARD), hint="train the model again")
    if card.get("format") != FORMAT:
        raise ModelError(
            f"the card has format {card.get('format')!r}, this version reads {FORMAT}",
            where=str(folder / CARD),
            hint="upgrade LLMO, or train the model again with this version",
        )
    return card


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write the card; `format` and the tokeniser's hash are filled in. Values must be finite JSON."""
    full = {"format": FORMAT, **card, "tokenizer_sha256": sha256_file(folder / TOKENIZER)}
    publish_json(folder / CARD, full)


def load_task(folder: Path) -> Task:
    """The task a model was trained for, as its card says."""
    body = read_card(folder)["task"]
    try:
        task = plugins.load("llmo.tasks", body["task"]).from_card(body)
    except (KeyError, TypeError) as error:
        raise ModelError(f"the card's task cannot be built: {error}", where=str(folder / CARD)) from error
    if not isinstance(task, Task):
        raise ModelError(f"'{body['task']}' is registered with something that is not a Task", where=str(folder / CARD))
    return task


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokeniser of a model folder, without padding or truncation.

    Raises ModelError when it is missing, broken, or not the one the model was trained with.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise ModelError(f"no {TOKENIZER} in {folder}", hint="import the base model again: it is made there")
    if (folder / CARD).is_file():
        expected = read_card(folder).get("tokenizer_sha256")
        if expected is not None and expected != sha256_file(path):
            raise ModelError(
                f"{TOKENIZER} is not the tokeniser this model was trained with",
                where=str(path),
                hint="put the original file back, or train the model again",
            )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises the bare class for every kind of broken file
        raise ModelError(f"{TOKENIZER} cannot be read: {error}", where=str(path)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_golden(folder: Path) -> list[dict[str, Any]]:
    """`[{"text", "input_ids", "logits"}]`: what the training graph said of some texts before it was saved."""
    golden = _read_json(folder / GOLDEN, hint="only models trained by LLMO carry it: train the model again")
    if not isinstance(golden, list):
        raise ModelError("the golden evidence is not a list", where=str(folder / GOLDEN), hint="train the model again")
    return golden


def reshaped(card: Mapping[str, Any]) -> bool:
    """Whether a compressed model has other weights than the model it was made from: it is a smaller shape of it."""
    before = card.get("shape", {}).get("of", {}).get("digest")
    return before is not None and before == card.get("reference", {}).get("digest")


def write_golden(folder: Path, golden: Sequence[Mapping[str, Any]]) -> None:
    publish_json(folder / GOLDEN, list(golden))


def _read_json(path: Path, hint: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no {path.name} in {path.parent}", hint=hint) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}", where=str(path), hint=hint) from error
