"""Learns and measures above frozen layers, from what they said of each text once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmo.context import Context
from llmo.specs import TrainSpec
from llmo.tasks.base import Encoding, Logits, Task, sequences
from llmo.training import scoring, states
from llmo.training.batches import Encoded, padded
from llmo.training.model import Built
from llmo.training.objectives import Inputs, Labels
from llmo.training.precision import Precision
from llmo.training.scoring import Predict
from llmo.training.states import States
from llmo.training.trunk import Trunk

WORTH = 0.3  # of the layers: with fewer frozen, reading what they said costs about what running them does


class Above:
    """As `Labels`, over what the frozen layers said of each row, kept in `states`."""

    records = True

    def __init__(self, inner: Labels, data: Encoded, states: States) -> None:
        self.metric, self.higher_is_better, self.part_tokens = inner.metric, inner.higher_is_better, inner.part_tokens
        self._inner, self._data, self._states = inner, data, states

    @property
    def trunk(self) -> Trunk:
        return self._states.trunk

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        inputs, targets = self._inner.batch(rows, epoch)
        texts = [self._data.sequence(i) for i in self._data.sequences(rows)]
        mask = inputs["attention_mask"]
        # As wide as the mask, and so as the targets where every token has one.
        return {"states": self._states.batch(texts, mask.shape[1]), "attention_mask": mask}, targets

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        return self._inner.mass(targets, rows)

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        logits = self._states.trunk.above(inputs["states"], inputs["attention_mask"])
        return self._inner.loss_of(logits, targets)


def predictor(
    model: nn.Module, task: Task, pad_id: int, open_kept: Callable[[Precision], States | None], how: Precision
) -> Predict:
    """As `scoring.model_predictor`, from what frozen layers said where that is kept in this precision."""
    other, kept = scoring.model_predictor(model, task, pad_id, how), open_kept(how)
    if kept is None:
        return other

    def run(texts: Sequence[Sequence[int]]) -> list[Logits]:
        mask = padded(texts, pad_id, task.max_length)["attention_mask"].to(how.device)
        with scoring.measuring(model, how):
            logits = kept.trunk.above(kept.batch([_ids(text) for text in texts]).to(how.device), mask)
        found = logits.float().cpu().numpy()
        return [found[i] if found.ndim == 2 else found[i, : len(text)] for i, text in enumerate(texts)]

    inner = scoring.by_sequence(task, run)

    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        return inner(encodings) if all(kept.has(_ids(text)) for text in sequences(encodings)) else other(encodings)

    return predict


def lift(
    built: Built,
    task: Task,
    dev: scoring.Tokens,
    encoded: Encoded,
    labels: Labels,
    spec: TrainSpec,
    precisions: tuple[Precision, Precision],
    ctx: Context,
) -> tuple[Above, Callable[[Precision], Predict]] | None:
    """The objective and what predicts, for a model enough of whose lower layers do not learn; None for others.

    What they say of the training rows and of dev is computed where it is not kept already, in the first of the
    `precisions`; in that of the final figures, if it is another, only of dev and when that is measured.
    """
    chosen, exact = precisions
    trunk = Trunk.of(built) if spec.keep_states and built.applied is None else None
    if trunk is None or trunk.frozen < WORTH * trunk.depth:
        return None
    held = states.distinct(_ids(text) for text in sequences(dev.chunk(0, len(dev.rows))[1]))
    texts = states.distinct([*(encoded.sequence(i) for i in range(len(encoded.targets))), *held])
    size, room = states.size(trunk, texts, chosen), states.room(ctx.cache())
    size += 0 if exact.name == chosen.name else states.size(trunk, held, exact)
    if size > room:
        ctx.note(
            f"{trunk.frozen} of {trunk.depth} layers do not learn, but what they say of all texts would take "
            f"{size / 1e9:.1f} GB, and a tenth of the disk's free space is {room / 1e9:.1f}: they run at every step"
        )
        return None

    def opened(some: list[NDArray[np.int32]], how: Precision) -> tuple[States, bool]:
        def compute(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            with scoring.measuring(built.model, how):
                return trunk.below(inputs)

        return states.open_states(ctx.cache(), trunk, some, compute, task.max_length, how, ctx)

    kept, there = opened(texts, chosen)

    @functools.cache
    def open_kept(how: Precision) -> States | None:
        if how.name == chosen.name:
            return kept
        return opened(held, how)[0] if held else None

    ctx.note(
        f"{trunk.frozen} of {trunk.depth} layers do not learn: what they say of each text "
        + (f"is there from before ({size / 1e6:.0f} MB)" if there else f"is kept ({size / 1e6:.0f} MB)")
    )
    return Above(labels, encoded, kept), functools.partial(predictor, built.model, task, built.pad_id, open_kept)


def _ids(text: Sequence[int] | NDArray[Any]) -> NDArray[np.int32]:
    return np.asarray(text, np.int32)
