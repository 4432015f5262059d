"""Reads an adapter folder as peft saves it, and refuses what two matrices and a factor a module cannot say."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmo.engines.folder import require
from llmo.errors import ModelError

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What changes the arithmetic beyond two matrices and a factor, with the value that leaves it out.
_PLAIN = {
    "use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "fan_in_fan_out": False,
    "rank_pattern": {}, "alpha_pattern": {}, "trainable_token_indices": None, "target_parameters": None,
}  # fmt: skip


def settings(folder: Path, allowed: Collection[str] = ()) -> dict[str, Any]:
    """Its settings; `allowed` names those that the caller applies by itself. Raises ModelError for another kind."""
    path = require(folder, SETTINGS)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise unfit(f"{SETTINGS} is not valid JSON: {error}", path) from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise unfit("the adapter is not a LoRA", path, "it cannot be mixed with others: deploy the model by itself")
    for name, plain in _PLAIN.items():
        if name not in allowed and found.get(name) not in (plain, None, [], {}, False):
            raise unfit(
                f"an adapter with {name}={found[name]!r} cannot be mixed with others", path, "merge it into its base"
            )
    return found


def scale(found: Mapping[str, Any], folder: Path) -> tuple[int, float]:
    """The rank of every module, and the factor of its product. Raises ModelError."""
    try:
        rank, alpha = int(found["r"]), float(found["lora_alpha"])
        return rank, alpha / (rank**0.5 if found.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise unfit(f"{SETTINGS} lacks its rank or alpha: {error}", folder) from error


def tensors(folder: Path) -> dict[str, Tensor]:
    """Its tensors by name, as they are. Raises ModelError for a file that is missing or broken."""
    path = require(folder, TENSORS)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise unfit(f"{path.name} is no whole safetensors file: {error}", path) from error


def check(what: str, down: Tensor, up: Tensor, rank: int, wide: int, out: int, folder: Path) -> None:
    """Raises ModelError for matrices of a module, `[rank, wide]` and `[out, rank]`, of another shape or not finite."""
    if down.shape != (rank, wide) or up.shape != (out, rank):
        raise unfit(f"{what} is {list(up.shape)} x {list(down.shape)}, it should be {out} x {rank} x {wide}", folder)
    if not torch.isfinite(down.sum() + up.sum()):  # a sum keeps every NaN and infinity
        raise unfit(f"{what} is not finite", folder)


def unfit(what: str, path: Path, hint: str = "train it on this very base, or merge it into its own") -> ModelError:
    return ModelError(what, hint=hint, where=str(path))
