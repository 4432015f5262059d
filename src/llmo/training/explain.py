"""The operation `explain`: what training chose on its own, why, and what each choice gains on this machine.

What can be switched is measured in real steps of this model on these rows, in turns; the rest is counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmo.context import Context, Stopped
from llmo.data.dataset import Dataset
from llmo.errors import DataError
from llmo.files import publish_json
from llmo.jobspecs import TrainJobSpec
from llmo.specfile import validate
from llmo.training import batches
from llmo.training.above import Above
from llmo.training.failures import memory_errors
from llmo.training.loop import Loop
from llmo.training.model import set_training
from llmo.training.objectives import Likelihood, Preference, VarlenLikelihood
from llmo.training.operation import Prepared, prepare

PAIRS = 5  # steps of each side of a comparison, after one that is not counted
REPORT = "report.json"


@dataclass(frozen=True, slots=True)
class Choice:
    """`gain`: how many times as fast as `against`, None where there is nothing to compare; `measured` or counted."""

    what: str
    choice: str
    why: str
    against: str = ""
    gain: float | None = None
    measured: bool = False


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` and `inputs` are those of the operation `train`; nothing is kept of the steps that are tried.

    Returns `choices`, `steps`, and `seconds` that they will take. Raises what `train` raises before its first step.
    """
    request = validate(dict(spec), TrainJobSpec)
    with memory_errors():
        ready = prepare(request, Dataset.open(inputs["data"]), inputs["model"], ctx)
        if not ready.course.built.trained:
            raise DataError(f"method {request.method} takes no steps", hint="leave --explain out: it is done at once")
        loop = ready.loop(ctx)
        set_training(ready.course.built.model)
        choices = [*_counted(ready, loop, ctx), *_measured(ready, loop, ctx)]
    found = {
        "choices": [asdict(choice) for choice in choices],
        "steps": loop.total,
        "seconds": loop.total * loop.batch_size / loop.samples_per_second,
    }
    publish_json(out / REPORT, {"format": 1, **found})
    return found


def _counted(ready: Prepared, loop: Loop, ctx: Context) -> Iterator[Choice]:
    data, request = ready.course.encoded, ready.request
    lengths, size = data.lengths, request.batch_size
    cores = ctx.device.cores
    yield Choice("threads", str(cores), f"the cores that were granted on {ctx.device.name}")
    here = _padded(lengths, batches.order(lengths, size, request.seed, 0))
    rows = np.random.default_rng(request.seed).permutation(len(lengths))
    there = _padded(lengths, [rows[i : i + size] for i in range(0, len(rows), size)])
    longest, median = int(lengths.max()), int(np.median(lengths))
    yield Choice(
        "batches",
        f"{size} rows of like length",
        f"half of the rows are at most {median} tokens long, the longest {longest}",
        "rows as they come",
        there / here,
    )
    if loop.narrowed is not None:
        used, whole = len(loop.narrowed.weight), len(loop.narrowed.places)
        why = "the gradient of the others is zero, so that they only decay"
        yield Choice("embedding", f"{used} of {whole} rows learn", why)
    if isinstance(ready.course.objective, Above):
        trunk = ready.course.objective.trunk
        yield Choice(
            "frozen layers",
            f"{trunk.frozen} of {trunk.depth} run once",
            f"method {request.method} does not train them, so that what they say of a text stays the same",
        )
    checkpointing = "on" if request.activation_checkpointing else "off"
    yield Choice(
        "activation checkpointing", checkpointing, "as asked" if checkpointing == "on" else "it costs time only"
    )


def _measured(ready: Prepared, loop: Loop, ctx: Context) -> Iterator[Choice]:
    """Recorded steps are compared first: what else is tried takes steps that are not."""
    objective, network = ready.course.objective, ready.course.built.network
    if loop.recorder is not None:
        gain = _gain(loop, lambda: _set(loop, "recorder", None), ctx)
        if loop.recorder.refused is None:
            why = "the GPU would wait for each of its kernels to be asked for"
            yield Choice("steps", "recorded", why, "launched kernel by kernel", gain, measured=True)
        else:
            yield Choice("steps", "launched kernel by kernel", f"recording was refused: {loop.recorder.refused}")
        loop.recorder = None
    if ready.chosen.name == "bf16" and not len(ready.joined) and not isinstance(objective, Above):
        gain = _gain(loop, lambda: _set(loop, "precision", ready.exact), ctx)
        yield Choice("precision", "bf16", ready.chosen.why, "fp32", gain, measured=True)
    else:
        yield Choice("precision", ready.chosen.name, ready.chosen.why)
    tokens = objective.part_tokens
    if tokens is not None and int(ready.course.encoded.lengths.max()) * loop.batch_size > tokens:
        gain = _gain(loop, lambda: _set(objective, "part_tokens", None), ctx)
        why = "a batch of long rows keeps to the caches and to less memory"
        yield Choice("parts", f"at most {tokens} tokens at once", why, "whole batches", gain, measured=True)
    own = network.config._attn_implementation
    if isinstance(objective, Likelihood | Preference) and objective.speaker.packs:
        speaker = objective.speaker  # whose attention takes packed rows, and does padded ones as torch does
        gain = _gain(loop, lambda: _set(speaker, "packs", False), ctx)
        yield Choice("rows", "end to end", "each attends to itself", "padded by length", gain, measured=True)
    elif isinstance(objective, VarlenLikelihood):
        yield Choice("rows", "end to end", "each attends to itself, by torch's fused kernel")
    elif own == "sdpa":
        yield Choice("attention", own, "the fused kernel of torch")
    else:
        gain = _gain(loop, lambda: _attention(network, own, "sdpa"), ctx)
        yield Choice("attention", own, "plain products, with dropout by bytes", "sdpa", gain, measured=True)


def _gain(loop: Loop, other: Callable[[], AbstractContextManager[None]], ctx: Context) -> float:
    """How much longer steps take the other way: the median of pairs on the same batches."""
    ratios = []
    for pair in range(PAIRS + 1):
        if ctx.should_stop():
            raise Stopped
        batch = loop.batch()
        mine = _seconds(loop, batch)
        with other():
            theirs = _seconds(loop, batch)
        if pair:
            ratios.append(theirs / mine)
        loop.step()
    return statistics.median(ratios)


def _seconds(loop: Loop, batch: Any) -> float:
    began = time.perf_counter()
    loop.backward(batch).item()  # a GPU has done it then
    took = time.perf_counter() - began
    loop.forget_gradients()
    return took


@contextmanager
def _set(target: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


@contextmanager
def _attention(network: Any, own: str, other: str) -> Iterator[None]:
    network.set_attn_implementation(other)
    try:
        yield
    finally:
        network.set_attn_implementation(own)


def _padded(lengths: Any, order: list[Any]) -> int:
    return sum(len(rows) * int(lengths[rows].max()) for rows in order)
