"""Plans that need less memory: the nearest that fits, and what a run goes on with when it ran out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from llmo.context import Context
from llmo.files import publish_json
from llmo.specs import TrainSpec
from llmo.training.forecast import micro_batch
from llmo.training.trained import PART_TOKENS
from llmo.types import Reason

FILE = "relief.json"  # beside the checkpoints, so that later attempts go on with it
PART = 4  # a micro-batch that was too large is divided by this: there is one try only
Changes = dict[str, Any]
Train = TypeVar("Train", bound=TrainSpec)


def nearest(train: TrainSpec, fits: Callable[[TrainSpec], bool], *, bf16: bool) -> Changes | None:
    """The changes of `train` that let it fit and cost least: parts of a batch, then bf16 (if the device computes it),
    then activation checkpointing, then LoRA. The batch that a step learns from stays."""
    return next((changes for changes in _changes(train, bf16) if fits(train.model_copy(update=changes))), None)


def line(changes: Mapping[str, Any]) -> str:
    """As a line of YAML for llmo.yaml."""
    return f"train: {{{', '.join(f'{key}: {json.dumps(value)}' for key, value in changes.items())}}}".replace('"', "")


def resume(train: Train, ctx: Context) -> Train:
    """What an attempt goes on with: `train`, made smaller when an earlier attempt ran out of memory.

    Raises MemoryError when the smaller plan was killed for memory too.
    """
    path = ctx.checkpoint() / FILE
    if ctx.after == Reason.OUT_OF_MEMORY.value:
        return shrink(train, ctx)
    if not path.is_file():
        return train
    return train.model_copy(update=json.loads(path.read_text(encoding="utf-8")))


def shrink(train: Train, ctx: Context) -> Train:
    """The same steps in smaller parts, remembered and said. Once: raises MemoryError the second time, and when a part
    is one row already."""
    path = ctx.checkpoint() / FILE
    now = micro_batch(train)
    if path.is_file() or now == 1:
        what = "in smaller parts too" if path.is_file() else "with one row at a time"
        raise MemoryError(f"it ran out {what}: lower task.max_length, or try {_last_resorts(train)}")
    parts = -(-train.batch_size // max(1, now // PART))
    tokens = train.part_tokens or PART_TOKENS[ctx.device.kind]
    changes = {"gradient_accumulation_steps": parts, "part_tokens": max(1, tokens // PART)}
    publish_json(path, changes)
    ctx.note(
        f"ran out of memory with {now} rows at a time; trying once more in smaller parts of the same batch, as with "
        f"`{line(changes)}`"
    )
    return train.model_copy(update=changes)


def forget(ctx: Context) -> None:
    """The run is finished."""
    (ctx.checkpoint() / FILE).unlink(missing_ok=True)


def _changes(train: TrainSpec, bf16: bool) -> Iterator[Changes]:
    methods: list[Changes] = [{}, *([{"method": "lora"}] if train.method == "full" else [])]
    recomputed: list[Changes] = [{}, *([{"activation_checkpointing": True}] if _may_recompute(train) else [])]
    precisions: list[Changes] = [{}, *([{"precision": "bf16"}] if bf16 and train.precision == "fp32" else [])]
    for first in itertools.product(methods, recomputed, precisions, _parts(train)):
        changes = {key: value for part in first for key, value in part.items()}
        if changes:
            yield changes


def _parts(train: TrainSpec) -> list[Changes]:
    """Ever smaller parts of the same batch, down to one row."""
    found: list[Changes] = [{}]
    rows = micro_batch(train)
    while rows > 1:
        rows = -(-rows // 2)
        found.append({"gradient_accumulation_steps": -(-train.batch_size // rows)})
    return found


def _may_recompute(train: TrainSpec) -> bool:
    return not train.activation_checkpointing and train.method != "prefix"


def _last_resorts(train: TrainSpec) -> str:
    left = ["train.activation_checkpointing: true"] if _may_recompute(train) else []
    return " or ".join([*left, *([] if train.method == "lora" else ["train.method: lora"]), "a smaller model"])
