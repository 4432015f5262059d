"""Takes attention heads out of a model, and tells which ones are out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from llmo.compression.shapes import anatomy, folder
from llmo.compression.shapes.anatomy import Layer
from llmo.compression.shapes.importance import Calibration, taylor
from llmo.compression.shapes.source import opened
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.folder import read_config, require
from llmo.errors import ModelError


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
    """The heads of each layer of a model folder, bottom to top, that say nothing, whatever the text.

    Head `h` is `range(h * size, (h + 1) * size)` of the rows of the query, key and value weights `[hidden, hidden]`
    and their biases, and of the columns of the output projection, where `size` is `hidden_size /
    num_attention_heads`. It is named here when its columns of the output projection are zero throughout, or its
    values are (rows and biases): then an engine that leaves out these rows and columns computes the same. A layer may
    have no head left, and then attention adds the projection's bias alone.

    Raises ModelError for an architecture whose layers are not known, or weights that cannot be read.
    """
    config = read_config(folder)
    names = anatomy.names_of(str(config.get("model_type")))
    heads = int(config.get("num_attention_heads") or config["n_heads"])
    found = []
    with safe_open(require(folder, "model.safetensors"), framework="numpy") as file:
        there = set(file.keys())
        for prefix in _prefixes(there, names.merge, folder):
            merge = file.get_tensor(f"{prefix}{names.merge}.weight")
            value = file.get_tensor(f"{prefix}{names.attention[2]}.weight")
            bias = f"{prefix}{names.attention[2]}.bias"
            given = np.column_stack([value, file.get_tensor(bias)]) if bias in there else value
            silent = _zero(merge.T, heads) | _zero(given, heads)
            found.append([int(head) for head in np.flatnonzero(silent)])
    return found


def _zero(rows: NDArray[Any], heads: int) -> NDArray[np.bool_]:
    """Of rows that belong to heads one after the other, the heads that are zero."""
    return np.asarray(np.abs(rows.reshape(heads, -1)).max(1) == 0)


def _prefixes(names: set[str], merge: str, folder: Path) -> list[str]:
    """What the tensors of each layer begin with, such as `bert.encoder.layer.3.`, bottom to top."""
    end = f"{merge}.weight"
    found = {name.removesuffix(end) for name in names if name.endswith(f".{end}")}
    numbered = {int(prefix.rstrip(".").rsplit(".", 1)[1]): prefix for prefix in found}
    if not numbered:
        raise ModelError("the weights hold no attention layer", hint="make the folder again", where=str(folder))
    return [numbered[i] for i in sorted(numbered)]


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
