"""How many numbers a method trains and keeps for its optimiser, and how deep it goes; arithmetic alone, no torch."""

from __future__ import annotations

from typing import Protocol

from llmo.methods import OPTIMISERS
from llmo.specs import TrainSpec

# Padded tokens computed at once by a task that answers in one pass; measured: enough for products at full speed, little
# enough for the caches.
PART_TOKENS = {"cpu": 2048, "cuda": 16_384}
USED = 0.75  # of a vocabulary: when texts use more of it, all of it learns
BASE_BYTES = {"fp32": 4.0, "int8": 1.0, "int4": 0.6}  # of a frozen linear weight


class Shape(Protocol):
    """Widths in numbers. `narrow`: of keys and values; `layer`: numbers of a layer; `adapted`: of an update of rank 1
    of all of its matrices."""

    @property
    def width(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def narrow(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def adapted(self) -> int: ...
    @property
    def parameters(self) -> int: ...


def numbers(train: TrainSpec, shape: Shape, writes: bool) -> int:
    """What learns, the head of a model with labels included."""
    rank = train.lora.rank * shape.layers * shape.adapted
    head = 0 if writes else shape.width**2
    beside = {
        "lora": rank,
        "rslora": rank,
        "dora": rank,
        "adalora": rank * 3 // 2,
        "ia3": shape.layers * (2 * shape.narrow + shape.inner),
        "prefix": train.virtual_tokens * 2 * shape.layers * shape.narrow,
        "prompt": train.virtual_tokens * shape.width,
        "bottleneck": shape.layers * 2 * shape.width * train.bottleneck_width,
        "last-n": shape.layer * min(train.last_n, shape.layers),
        "zero-shot": -head,
    }
    return shape.parameters if train.method in ("full", "few-shot") else beside.get(train.method, 0) + head


def kept(train: TrainSpec) -> float:
    """Numbers kept for each that learns, beside itself and its gradient."""
    own = OPTIMISERS[train.optimizer].numbers + (2 if train.method == "adalora" else 0)
    return own + bool(train.early_stopping) + bool(train.ema)


def deep(train: TrainSpec, layers: int) -> int:
    """Layers that gradients go through."""
    return {"last-n": min(train.last_n, layers), "head": 0, "zero-shot": 0}.get(train.method, layers)


def steps(train: TrainSpec, rows: int) -> int:
    """Of a run over so many training rows."""
    if train.method == "zero-shot":
        return 0
    seen = rows * 2 * train.pairs if train.method == "few-shot" else rows
    return max(1, round(-(-seen // train.batch_size) * train.epochs))


def leaves_unused_rows(spec: TrainSpec) -> bool:
    """Whether a weight whose gradient has always been zero does nothing but shrink by the decoupled decay."""
    return spec.optimizer in ("adamw", "lion") and spec.ema is None
