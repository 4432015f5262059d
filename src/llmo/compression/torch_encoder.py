"""A trained encoder as a folder that the torch engine runs at bf16: half the bytes, and a card that says so."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmo.engines.folder import card_applied, require
from llmo.engines.lowered import DTYPES
from llmo.errors import ModelError
from llmo.tasks.card import CARD, read_card, write_card

WEIGHTS = "model.safetensors"


def write(folder: Path, out: Path) -> float:
    """Write the model of a trained folder into the folder `out`, weights rounded to bf16. Returns bits a weight.

    Raises ModelError for a folder without a card, with broken weights, or with more than weights.
    """
    card = read_card(folder)
    beside = card_applied(folder)
    if beside is not None:
        raise ModelError(
            f"the model runs with a {beside} beside its weights, which stays at fp32",
            hint="leave this variant out, or train with a method that changes the weights",
            where=str(folder),
        )
    path = require(folder, WEIGHTS)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the weights are no whole safetensors file: {error}", hint="make the folder again", where=str(path)
        ) from error
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt", ".jinja") and file.name != CARD:
            shutil.copyfile(file, out / file.name)
    lower = {n: t.to(DTYPES["bf16"]).contiguous() if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(lower, out / WEIGHTS, {"format": "pt"})
    write_card(out, {**card, "engine": "torch", "precision": "bf16"})
    weights = sum(tensor.numel() for tensor in lower.values())
    return 8 * sum(tensor.nbytes for tensor in lower.values()) / weights
