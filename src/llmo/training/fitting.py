"""Whether a training fits the machine, and what the nearest one is that does: refused before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmo.errors import NeedsError
from llmo.jobspecs import TrainJobSpec
from llmo.specs import TaskSpec, TrainSpec
from llmo.training import relief
from llmo.training.correction import Correction, correct
from llmo.training.forecast import Rows, forecast

_NOTHING = "take a smaller model or a lower task.max_length, or a machine with more memory"


def require(request: TrainJobSpec, config: Mapping[str, Any], rows: Rows, *, bf16: bool, memory: int) -> int:
    """The forecast in bytes. Raises NeedsError when even the low end of it is above `memory` (bytes; 0: not known)."""
    found = fit(request, request.task, config, rows, correct([], "", 0), bf16=bf16, memory=memory)
    refuse(found, memory)
    return int(found["memory_bytes"])


def fit(
    train: TrainSpec,
    task: TaskSpec,
    config: Mapping[str, Any],
    rows: Rows,
    correction: Correction,
    *,
    bf16: bool,
    memory: int,
) -> dict[str, Any]:
    """The forecast as JSON values: `memory_bytes` with its ends `low_bytes` and `high_bytes`, `error` and the `runs` it
    was corrected by, `phase`, `disk_bytes`, `steps`; where `memory` is known whether it `fits` (true, false, or None
    for between the ends), and if it may not, `instead`: the nearest plan that does, as a line of YAML, or None.

    `bf16` is whether the device computes it.
    """

    def needed(plan: TrainSpec) -> int:
        found = forecast(plan, task, config, rows, bf16=bf16 and plan.precision != "fp32")
        return round(found.memory_bytes * correction.factor) * plan.devices

    found = forecast(train, task, config, rows, bf16=bf16 and train.precision != "fp32")
    need = round(found.memory_bytes * correction.factor) * train.devices  # each process has a model of its own
    low, high = round(need * (1 - correction.error)), round(need * (1 + correction.error))
    shown: dict[str, Any] = {
        "memory_bytes": need,
        "low_bytes": low,
        "high_bytes": high,
        "error": correction.error,
        "runs": correction.runs,
        "phase": found.phase,
        "disk_bytes": found.disk_bytes,
        "steps": found.steps,
    }
    if not memory:
        return shown
    if high <= memory:
        return shown | {"fits": True}
    changes = relief.nearest(train, lambda plan: needed(plan) * (1 + correction.error) <= memory, bf16=bf16)
    instead = None if changes is None else relief.line(changes)
    return shown | {"fits": None if low <= memory else False, "instead": instead}


def refuse(found: Mapping[str, Any], memory: int) -> None:
    """Raises NeedsError for what surely does not fit."""
    if found.get("fits", True) is not False:
        return
    need, have = (f"{amount / (1 << 30):.1f} GiB" for amount in (found["memory_bytes"], memory))
    raise NeedsError(
        f"this training needs about {need} of memory (within {found['error']:.0%}), and LLMO may use {have} here",
        hint=f"the nearest that fits: {found['instead']}" if found["instead"] else f"nothing near it fits: {_NOTHING}",
    )
