"""Drops the layers that change least what goes through them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from llmo.compression.shapes import anatomy, folder
from llmo.compression.shapes.importance import Calibration, influence
from llmo.compression.shapes.source import opened
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.training.model import layers


def drop(model: Path, data: Dataset, out: Path, ctx: Context, *, keep: int) -> dict[str, Any]:
    """Write the model with the `keep` layers of largest influence (Men et al. 2024, arXiv:2403.03853), in their order.

    What is left is to be trained again (`distil.recover`). Returns `{"step": "layers", "kept": [numbers],
    "influence": [of each layer], "parameters", "metrics"}`. Raises ModelError, DataError, InputError, Stopped.
    """
    with folder.made(out) as aside:
        source = opened(model, data, ctx)
        anatomy.count(keep, len(layers(source.model)), "layers")
        found = influence(source, Calibration(source, ctx))
        kept = sorted(int(i) for i in np.argsort(-found, kind="stable")[:keep])
        keep_layers(source.model, kept)
        step = {"step": "layers", "kept": kept, "influence": [round(float(x), 5) for x in found]}
        return folder.write(source, source.model, step, aside, ctx)


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Leave of an opened model these layers, in this order."""
    owner, name = anatomy.stack(model)
    there = getattr(owner, name)
    setattr(owner, name, nn.ModuleList(there[i] for i in kept))
    model.config.num_hidden_layers = len(kept)
