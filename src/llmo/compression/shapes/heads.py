"""Takes attention heads out of a model, and tells which ones are out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmo.compression.shapes import anatomy, folder
from llmo.compression.shapes.anatomy import Layer
from llmo.compression.shapes.importance import Calibration, taylor
from llmo.compression.shapes.source import opened
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.torch import open_model


def prune(model: Path, data: Dataset, out: Path, ctx: Context, *, keep: float) -> dict[str, Any]:
    """Write the model with a share `keep` of its heads: those without which the loss would change most, to first order
    (Michel et al. 2019, arXiv:1905.10650), compared over all layers; every layer keeps one at least.

    transformers' encoders have one number of heads, as wide together as the model. So the weights of a head that is
    out are zero, and the folder is as large as before: an engine that cuts what is zero (`zero_heads`) is what gains.
    Training again (`distil.recover`) leaves them zero. Returns `{"step": "heads", "out": [numbers of each layer],
    "kept": number, "of": number, "parameters", "metrics"}`. Raises ModelError, DataError, InputError, Stopped.
    """
    with folder.made(out) as aside:
        source = opened(model, data, ctx)
        parts, heads = anatomy.anatomy(source.model), int(source.model.config.num_attention_heads)
        total = len(parts) * heads
        left = max(len(parts), anatomy.count(round(keep * total), total, "attention heads"))
        width = parts[0].merge.in_features // heads
        found = np.stack(taylor(source, Calibration(source, ctx), [layer.merge for layer in parts], width))
        away = _away(found, total - left)
        for layer, numbers in zip(parts, away, strict=True):
            _clear(layer, numbers, width)
        step = {"step": "heads", "out": away, "kept": left, "of": total}
        return folder.write(source, source.model, step, aside, ctx)


def zero_heads(folder: Path) -> list[list[int]]:
    """The heads of each layer of a model folder, bottom to top, that are out (`anatomy.Layer.silent`).

    Raises ModelError for an architecture whose layers are not known, or weights that cannot be read.
    """
    model = open_model(folder)
    size = model.config.hidden_size // model.config.num_attention_heads
    return [layer.silent(size).nonzero().flatten().tolist() for layer in anatomy.anatomy(model)]


def _away(matters: NDArray[np.float64], count: int) -> list[list[int]]:
    """The `count` heads that matter least, by layer, but never a layer's best."""
    away: list[list[int]] = [[] for _ in matters]
    best = matters.argmax(1)
    for flat in np.argsort(matters, axis=None, kind="stable"):
        layer, head = divmod(int(flat), matters.shape[1])
        if sum(map(len, away)) < count and head != best[layer]:
            away[layer].append(head)
    return [sorted(numbers) for numbers in away]


@torch.no_grad()
def _clear(layer: Layer, heads: list[int], width: int) -> None:
    for head in heads:
        own = slice(head * width, (head + 1) * width)
        layer.merge.weight[:, own] = 0.0
        for linear in layer.attention:
            linear.weight[own] = 0.0
            if linear.bias is not None:
                linear.bias[own] = 0.0
