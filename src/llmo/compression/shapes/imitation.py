"""What a student makes small: how far it is from its teacher's logits and hidden states, and from the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from llmo.compression.shapes import anatomy
from llmo.compression.shapes.importance import through
from llmo.context import Context, Stopped
from llmo.engines.heads import logits_of
from llmo.tasks.base import Encoding, Logits, Task
from llmo.training.batches import Encoded
from llmo.training.model import Built, layers
from llmo.training.objectives import Inputs, Labels
from llmo.training.scoring import Predict, by_length

TIE = 1e-6


class Imitation:
    """As `Labels`, with a teacher; of the rows the first `own` have labels, the others were made of them.

    `ids` are the teacher's ids by the student's; `told` is what it says of every sequence, where its states are not
    compared. The loss is `labels` times the task's own, and the distance of the logits (`logits_apart`), and `hidden`
    times the mean cosine distance of the states after each of the student's layers from those after the teacher's
    layer at the same height (Sanh et al. 2019, arXiv:1910.01108; Sun et al. 2019, arXiv:1908.09355). Attention itself
    is not compared: heads that were taken out may not be missed. The metric is the task's, and where that is the same,
    how near the logits are (`Nearness`).
    """

    records = False

    def __init__(
        self,
        built: Built,
        teacher: Any,
        ids: NDArray[np.int64],
        task: Task,
        data: Encoded,
        own: int,
        inner: Labels,
        told: Sequence[Logits] | None = None,
        *,
        temperature: float,
        hidden: float,
        labels: float,
    ) -> None:
        self.metric = f"{inner.metric}/near"  # no figure that is shown
        self.higher_is_better, self.part_tokens = inner.higher_is_better, inner.part_tokens
        self._built, self._teacher, self._task, self._inner = built, teacher, task, inner
        self._data, self._own, self._told = data, own, told
        self._temperature, self._hidden, self._labels = temperature, hidden, labels
        self._ids = torch.from_numpy(ids).to(next(teacher.parameters()).device)
        self._mine, there = layers(built.network), layers(teacher)
        if not hidden or not len(there):
            self._mine, self._theirs = nn.ModuleList(), []
        else:
            self._theirs = [there[i] for i in anatomy.spread(len(self._mine), len(there))]

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        return self._inner.batch(rows, epoch)

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        return float(len(rows))

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        mask = inputs["attention_mask"]
        wanted, shown = self._lesson(inputs, rows)
        with through(self._mine) as mine:
            said = logits_of(self._built.model(**inputs), mask).float()
        total = logits_apart(self._task, said, wanted, mask, self._temperature)
        if shown:
            total = total + self._hidden * _states_apart([states for _, states in mine], shown, mask)
        group = self._data.group
        own = torch.from_numpy(np.repeat(rows < self._own, group)).to(said.device)
        if self._labels and bool(own.any()):
            share = self._labels * float(own.float().mean())
            total = total + share * self._inner.loss_of(said[own], targets[own] if group == 1 else targets)
        return total

    def _lesson(self, inputs: Inputs, rows: NDArray[np.int64]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The teacher's logits, and its states where they are compared: as it was `told` before, or by asking."""
        mask = inputs["attention_mask"]
        if self._told is not None:
            known = [self._told[i] for i in self._data.sequences(rows)]
            if known[0].ndim > 1:
                known = [np.pad(one, [(0, mask.shape[1] - len(one)), (0, 0)]) for one in known]
            return torch.from_numpy(np.stack(known)).to(mask.device), []
        with torch.no_grad(), through(self._theirs) as passed:
            given = {**inputs, "input_ids": self._ids[inputs["input_ids"]]}
            return logits_of(self._teacher(**given), mask).float(), [states for _, states in passed]


class Nearness:
    """Predicts as `predict` does, and hears how far each answer is from the teacher's to the same text: which of two
    students is better is told by this where their figures are the same."""

    def __init__(self, predict: Predict, wanted: Mapping[tuple[int, ...], Logits]) -> None:
        self._predict, self._wanted = predict, wanted
        self._apart: list[float] = []

    def __call__(self, encodings: Sequence[Encoding]) -> list[Logits]:
        found = self._predict(encodings)
        for logits, encoding in zip(found, encodings, strict=True):
            self._apart.append(float(np.square(logits - self._wanted[tuple(encoding.input_ids)]).mean()))
        return found

    def of(self, value: float, higher_is_better: bool) -> float:
        """The figure, moved by a millionth at most."""
        near = TIE / (1.0 + sum(self._apart) / max(1, len(self._apart)))
        return value + near if higher_is_better else value - near


def taught(predict: Predict, ids: NDArray[np.int64], encodings: Sequence[Encoding], ctx: Context) -> list[Logits]:
    """What a teacher, who `predict`s, says of a student's encodings; `ids` are its ids by the student's. Raises Stopped
    when the job is asked to stop."""
    theirs = [replace(e, input_ids=ids[e.input_ids].tolist()) for e in encodings]
    found: dict[int, Logits] = {}
    for batch in by_length(theirs):
        if ctx.should_stop():
            raise Stopped
        found.update(zip(batch, predict([theirs[i] for i in batch]), strict=True))
        ctx.report(len(found), len(theirs), phase="teacher")
    return [found[i] for i in range(len(theirs))]


def logits_apart(
    task: Task, said: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The mean distance `[]` of a student's logits from its teacher's, fp32, `[rows, labels]` or `[rows, tokens,
    labels]` with the texts' `mask`.

    Of classes: the divergence of the distributions at a temperature, times its square (Hinton et al. 2015,
    arXiv:1503.02531), for each text or token, of several labels for each of them; of where an answer begins and ends
    the same over the text's tokens. Of numbers and vectors: the squared difference.
    """
    there = mask.bool()
    if task.auto_class == "AutoModelForQuestionAnswering":
        low = torch.finfo(said.dtype).min
        said, wanted = (x.masked_fill(~there[..., None], low).transpose(1, 2) for x in (said, wanted))
    elif said.ndim == 3:
        said, wanted = said[there], wanted[there]
    elif not task.labels or task.problem_type == "regression":
        return (said - wanted).square().sum(-1).mean()
    said, wanted = said / temperature, wanted / temperature
    if task.problem_type == "multi_label_classification":
        aim = wanted.sigmoid()
        apart = functional.binary_cross_entropy_with_logits(said, aim) - functional.binary_cross_entropy_with_logits(
            wanted, aim
        )
        return apart * temperature**2
    apart = functional.kl_div(said.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    return apart.sum(-1).mean() * temperature**2


def _states_apart(said: list[torch.Tensor], wanted: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    there = mask.bool()
    each = [
        1.0 - functional.cosine_similarity(a[there].float(), b[there].float(), dim=-1).mean()
        for a, b in zip(said, wanted, strict=True)
    ]
    return torch.stack(each).mean()
