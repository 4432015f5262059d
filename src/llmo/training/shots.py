"""Classifiers from few examples or none: texts are compared where the encoder puts them, by the mean of its states.

Few-shot is SetFit (Tunstall et al. 2022, arXiv:2209.11055): pairs of texts teach the trunk which belong together, then
a logistic head is fitted to where it puts them. Zero-shot compares a text with a sentence about each label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn

from llmo.engines.applied import MeanHead
from llmo.engines.applied.mean_head import mean
from llmo.errors import DataError, SpecError
from llmo.specs import TrainSpec
from llmo.tasks.base import Encoding, Row, Task
from llmo.training import batches, scoring
from llmo.training.batches import Encoded
from llmo.training.model import Built
from llmo.training.objectives import Inputs
from llmo.training.precision import Precision

PAIR = 2
LEAST = 2  # examples of a label: one to compare the other with
SCALE = 20.0  # of cosines to logits, as sentence-transformers trains with
FIT_STEPS = 200


def check(task: Task, rows: Sequence[Row], spec: TrainSpec) -> None:
    """Raises SpecError for several labels a text, and DataError for a label with too few examples."""
    if task.options().get("multi_label"):
        raise SpecError(
            f"method {spec.method} gives each text one label, and these rows have several",
            hint="set train.method to lora or full",
        )
    if spec.method == "few-shot":
        names, counts = np.unique([str(row["label"]) for row in rows], return_counts=True)
        if counts.min() < LEAST:
            raise DataError(
                f"the label '{names[counts.argmin()]}' has {counts.min()} training row, and method few-shot compares "
                f"at least {LEAST} of each",
                hint="give more rows of it (eight do well), or set train.method to zero-shot",
            )


def pairs(encodings: Sequence[Encoding], labels: NDArray[np.int64], each: int, seed: int, limit: int) -> Encoded:
    """Each text with `each` others of its label and as many of other labels, drawn with the seed, as rows of two
    sequences whose target is 1 or 0."""
    rng = np.random.default_rng([seed, PAIR])
    everything = np.arange(len(labels))
    parts: list[Encoding] = []
    targets: list[NDArray[np.float32]] = []
    for first, label in enumerate(labels):
        like = everything[(labels == label) & (everything != first)]
        unlike = everything[labels != label]
        for others, target in ((like, 1.0), (unlike, 0.0)):
            for second in rng.choice(others, min(each, len(others)), replace=False):
                parts += [encodings[first], encodings[second]]
                targets += [np.asarray(target, np.float32)] * PAIR
    return batches.joined(parts, targets, limit, group=PAIR)


class Contrast:
    """The squared distance between the cosine of a pair and its target."""

    part_tokens: int | None = None
    records = False

    def __init__(self, built: Built, task: Task, data: Encoded) -> None:
        self.metric, self.higher_is_better = task.metric, task.higher_is_better
        self._trunk, self._data, self._pad_id = built.network.base_model, data, built.pad_id

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        return batches.collate(self._data, self._data.sequences(rows), self._pad_id)

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        return float(len(targets) // PAIR)

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        points = mean(self._trunk(**inputs).last_hidden_state, inputs["attention_mask"])
        one, other = points.view(-1, PAIR, points.shape[1]).unbind(1)
        return ((one * other).sum(1) - targets[::PAIR]).square().mean()


def points_of(built: Built, encodings: Sequence[Encoding], how: Precision, limit: int) -> torch.Tensor:
    """Where the trunk puts each text, `[texts, width]` at length 1, on the CPU."""
    found: dict[int, torch.Tensor] = {}
    for batch in scoring.by_length(encodings):
        inputs = batches.padded([encodings[i].input_ids for i in batch], built.pad_id, limit)
        there = {name: tensor.to(how.device) for name, tensor in inputs.items()}
        with scoring.measuring(built.model, how):
            said = mean(built.network.base_model(**there).last_hidden_state, there["attention_mask"]).cpu()
        found.update(zip(batch, said, strict=True))
    return torch.stack([found[i] for i in range(len(encodings))])


def fit(head: MeanHead, points: torch.Tensor, targets: torch.Tensor, task: Task, spec: TrainSpec) -> None:
    """Multinomial logistic regression with an L2 penalty of half the squared weights, as scikit-learn's default; the
    task's own loss, so that class weights and smoothing hold."""
    points = points.clone().double()
    weights = None
    if spec.class_weights == "balanced":
        counts = torch.bincount(targets, minlength=len(task.labels)).clamp(min=1)
        weights = (counts.sum() / (len(counts) * counts)).float()
    weight = torch.zeros(len(task.labels), points.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(task.labels), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        logits = nn.functional.linear(points, weight, bias)
        loss = len(points) * task.loss(logits, targets, weights, spec.label_smoothing) + weight.square().sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    _set(head, weight.detach(), bias.detach())


def name_labels(head: MeanHead, points: torch.Tensor) -> None:
    """The head that gives a text the label whose sentence lies nearest."""
    _set(head, SCALE * points, torch.zeros(len(points)))


def sentences(task: Task, tokenizer: Tokenizer, spec: TrainSpec) -> list[Encoding]:
    """Of each label, with its underscores and hyphens read as spaces."""
    return task.encode(tokenizer, [spec.template.format(_spoken(label)) for label in task.labels])


def _spoken(label: str) -> str:
    return label.replace("_", " ").replace("-", " ").strip()


@torch.no_grad()
def _set(head: MeanHead, weight: torch.Tensor, bias: torch.Tensor) -> None:
    head.weight.copy_(weight)
    head.bias.copy_(bias)
