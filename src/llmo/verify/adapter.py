"""LoRA: whether every adapter module is there and changes its layer, and what the model says without them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmo.engines.heads import logits_of
from llmo.errors import ModelError
from llmo.tasks.base import Logits
from llmo.tasks.card import ADAPTER
from llmo.verify.checks import Check

PREFIX = "base_model.model."
FORGET = "the merged weights cannot be traced to their adapter: train the model again"


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """What each adapted layer's weight gained by the merge, by the layer's name: `scale * B @ A`.

    Modules that lack one of their two matrices are left out. Raises ModelError when the adapter cannot be read.
    """
    path = folder / ADAPTER
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "adapter_model.safetensors")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"the adapter cannot be read: {error}", where=str(path), hint=FORGET) from error
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    found = {}
    for key, a in tensors.items():
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in key and b is not None and b.shape[1] == a.shape[0]:
            found[key.removeprefix(PREFIX).partition(".lora_A.")[0]] = scale * (b @ a)
    return found


def applied(model: Any, expected: Sequence[str], found: Mapping[str, torch.Tensor]) -> Check:
    """Every module that was trained has an update of the right shape that is not zero."""
    layers = dict(model.named_modules())
    good = [
        name
        for name in expected
        if name in found
        and name in layers
        and found[name].shape == layers[name].weight.shape
        and bool(found[name].abs().max() > 0)
    ]
    lacking = sorted(set(expected) - set(good))
    text = f"adapter modules applied: {len(good)} of {len(expected)}"
    text += f", not {lacking[0]}" if lacking else ""
    return Check("adapter modules", len(good) == len(expected) > 0, len(good), len(expected), text, FORGET)


def effect(value: float) -> Check:
    """`value` is the largest difference of logits with and without the adapter."""
    text = f"effect of the adapter on the logits: {value:.1e} (above 0)"
    return Check("adapter effect", value > 0, value, 0.0, text, "the adapter learnt nothing: train longer")


def logits(model: Any, texts: Sequence[Sequence[int]]) -> list[Logits]:
    """What the model says of each text, alone."""
    with torch.inference_mode():
        given = [torch.tensor([list(ids)]) for ids in texts]
        return [logits_of(model(input_ids=ids), torch.ones_like(ids))[0].numpy() for ids in given]


@contextmanager
def without(model: Any, found: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model as it was before the merge; its merged weights are put back bit for bit afterwards."""
    layers = dict(model.named_modules())
    known = {name: update for name, update in found.items() if name in layers}
    kept = {name: layers[name].weight.detach().clone() for name in known}
    with torch.no_grad():
        for name, update in known.items():
            if update.shape == kept[name].shape:
                layers[name].weight -= update
        try:
            yield
        finally:
            for name, weight in kept.items():
                layers[name].weight.copy_(weight)
