"""How much the parts of a model matter, measured on calibration texts: rows of train, never of dev or test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from llmo.compression.shapes.folder import sample
from llmo.compression.shapes.source import Source
from llmo.context import Context, Stopped
from llmo.specs import TrainSpec
from llmo.training import batches
from llmo.training.batches import Encoded
from llmo.training.model import layers
from llmo.training.objectives import Inputs, Labels

TEXTS = 128
BATCH = 16

Floats = NDArray[np.float64]
Batch = tuple[Inputs, torch.Tensor, NDArray[np.int64]]


class Calibration:
    """Up to `texts` rows of train with what is learnt of them, in batches of like length."""

    def __init__(self, source: Source, ctx: Context, texts: int = TEXTS) -> None:
        rows = sample(source.data.split("train"), texts)
        self._encoded = batches.encode(source.task, source.tokenizer, rows, lambda _: None)
        self._source, self._ctx = source, ctx
        self.objective = Labels(
            source.model, source.task, self._encoded, TrainSpec(), source.pad_id, source.exact.device
        )

    @property
    def encoded(self) -> Encoded:
        return self._encoded

    def batches(self, phase: str) -> Iterator[Batch]:
        """Inputs and targets on the model's device, and the rows' numbers. Raises Stopped when asked to stop."""
        order = np.argsort(-self._encoded.lengths, kind="stable")
        device, done = self._source.exact.device, 0
        for rows in np.array_split(order, -(-len(order) // BATCH)):
            if self._ctx.should_stop():
                raise Stopped
            inputs, targets = self.objective.batch(rows, 0)
            yield {k: v.to(device) for k, v in inputs.items()}, targets.to(device), rows
            done += len(rows)
            self._ctx.report(done, len(order), phase=phase)


def taylor(source: Source, calibration: Calibration, into: Sequence[nn.Linear], width: int) -> list[Floats]:
    """How much the loss would change, to first order, without each `width` channels of what goes into each linear
    layer: `|sum over channels and tokens of x * dloss/dx|`, the mean over texts; `[in / width]` for each.

    Of attention's output these are the heads (Michel et al. 2019, arXiv:1905.10650), of the feed-forward width its
    columns (Molchanov et al. 2017, arXiv:1611.06440).
    """
    found = [np.zeros(linear.in_features // width) for linear in into]
    for inputs, targets, rows in calibration.batches("importance"):
        with _inputs(into) as seen, torch.enable_grad():
            loss = calibration.objective.loss(inputs, targets, rows)
            slopes = torch.autograd.grad(loss, seen)
        for total, x, slope in zip(found, seen, slopes, strict=True):
            each = (x.detach() * slope).flatten(1, -2).sum(1)  # [texts, channels]
            each = each.view(len(each), -1, width).sum(-1).abs() * len(rows)  # the loss is a mean over rows
            np.add(total, each.sum(0).double().cpu().numpy(), out=total)
    return [total / len(calibration.encoded.targets) for total in found]


def influence(source: Source, calibration: Calibration) -> Floats:
    """How much each layer changes what goes through it, `[layers]`: 1 less the mean cosine, over tokens, between its
    input and its output (block influence: Men et al. 2024, arXiv:2403.03853)."""
    stack = layers(source.model)
    changed = np.zeros(len(stack))
    tokens = 0
    for inputs, _, _ in calibration.batches("importance"):
        there = inputs["attention_mask"].bool()
        tokens += int(there.sum())
        with through(stack) as passed, torch.inference_mode():
            source.model(**inputs)
        for i, (before, after) in enumerate(passed):
            alike = functional.cosine_similarity(before[there].double(), after[there].double(), dim=-1)
            changed[i] += float((1.0 - alike).sum())
    return changed / tokens


@contextmanager
def _inputs(into: Sequence[nn.Linear]) -> Iterator[list[torch.Tensor]]:
    """What goes into each of the layers in one pass; they are given in the order in which they run."""
    seen: list[torch.Tensor] = []
    handles = [linear.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for linear in into]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def through(stack: Iterable[nn.Module]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What goes into each layer in one pass, and what comes out of it: `[texts, tokens, width]`."""
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: nn.Module, given: tuple[Any, ...], said: Any) -> None:
        passed.append((given[0], said[0] if isinstance(said, tuple) else said))

    handles = [layer.register_forward_hook(keep) for layer in stack]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()
