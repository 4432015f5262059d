"""Narrows the feed-forward part of every layer to the columns that matter most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmo.compression.shapes import anatomy, folder
from llmo.compression.shapes.anatomy import Layer
from llmo.compression.shapes.importance import Calibration, Floats, taylor
from llmo.compression.shapes.source import Source, opened
from llmo.context import Context
from llmo.data.dataset import Dataset


def narrow(model: Path, data: Dataset, out: Path, ctx: Context, *, keep: int) -> dict[str, Any]:
    """Write the model with a feed-forward width of `keep`: in every layer the columns without which the loss would
    change most, to first order (Molchanov et al. 2017, arXiv:1611.06440). They are others in each layer, their number
    is the config's. Multiples of 64 suit the engines.

    What is left is to be trained again (`distil.recover`). Returns `{"step": "columns", "kept": number, "of": number,
    "share": of the importance that stays, "parameters", "metrics"}`. Raises ModelError, DataError, InputError, Stopped.
    """
    with folder.made(out) as aside:
        source = opened(model, data, ctx)
        of = anatomy.anatomy(source.model)[0].up.out_features
        anatomy.count(keep, of, "feed-forward columns")
        share = keep_columns(source, ctx, keep)
        step = {"step": "columns", "kept": keep, "of": of, "share": round(share, 4)}
        return folder.write(source, source.model, step, aside, ctx)


def keep_columns(source: Source, ctx: Context, keep: int) -> float:
    """Narrow the opened model to so many columns; the share of the importance that stays."""
    parts = anatomy.anatomy(source.model)
    found = taylor(source, Calibration(source, ctx), [layer.down for layer in parts], 1)
    left = 0.0
    for layer, matters in zip(parts, found, strict=True):
        kept = np.sort(np.argsort(-matters, kind="stable")[:keep])
        left += float(matters[kept].sum())
        _cut(layer, kept)
    setattr(source.model.config, anatomy.names_of(source.model.config.model_type).inner, keep)
    return left / max(1e-30, _total(found))


def _total(found: Sequence[Floats]) -> float:
    return float(sum(matters.sum() for matters in found))


@torch.no_grad()
def _cut(layer: Layer, kept: Any) -> None:
    rows = torch.from_numpy(kept).to(layer.up.weight.device)
    layer.up.weight = nn.Parameter(layer.up.weight[rows].clone())
    if layer.up.bias is not None:
        layer.up.bias = nn.Parameter(layer.up.bias[rows].clone())
    layer.down.weight = nn.Parameter(layer.down.weight[:, rows].clone())
    layer.up.out_features = layer.down.in_features = len(rows)
