"""What training makes small: a task's loss over its labels, the likelihood of answers, or a preference between two."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from llmo.engines.heads import logits_of
from llmo.specs import TrainSpec
from llmo.tasks.base import Task
from llmo.training import batches, varlen
from llmo.training.batches import IGNORED, Encoded
from llmo.training.causal import Speaker
from llmo.training.trained import PART_TOKENS

Inputs = dict[str, torch.Tensor]


class Objective(Protocol):
    """`metric` is the one that decides which weights are best, and `higher_is_better` which way; at most `part_tokens`
    padded tokens are computed at once, None: a whole micro-batch. `records` says that `loss` reads nothing back from a
    GPU and takes `rows` for nothing, so that a recording of it does for all inputs of one shape."""

    metric: str
    higher_is_better: bool
    part_tokens: int | None
    records: bool

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        """Inputs and targets of training rows in an epoch, on the CPU: a pure function of both."""

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        """What `loss` divides by: parts weighted by their mass add up to the whole batch exactly."""

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """The scalar mean over what `mass` counts; inputs and targets are on the device. Run under autocast."""


class Labels:
    """The loss of a task that answers in one pass, over all its logits."""

    records = True

    def __init__(
        self, model: nn.Module, task: Task, data: Encoded, spec: TrainSpec, pad_id: int, device: torch.device
    ) -> None:
        self.metric, self.higher_is_better = task.metric, task.higher_is_better
        self._model, self._task, self._data, self._pad_id = model, task, data, pad_id
        self._smoothing = spec.label_smoothing
        # Where rows are told apart from each other (no head) a batch is one.
        self.part_tokens = spec.part_tokens or PART_TOKENS[device.type] if task.has_head else None
        self._weights = _class_weights(task, data) if spec.class_weights == "balanced" else None
        self._weights_there = None if self._weights is None else self._weights.to(device)
        self._few_widths = device.type == "cuda"  # where a step is recorded for each

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        return batches.collate(self._data, self._data.sequences(rows), self._pad_id, few_widths=self._few_widths)

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        return self._task.mass(targets, self._weights)

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        return self.loss_of(logits_of(self._model(**inputs), inputs["attention_mask"]), targets)

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._task.loss(logits, targets, self._weights_there, self._smoothing)


class Likelihood:
    """Cross-entropy over the learnt tokens of a causal model."""

    part_tokens: int | None = None
    records = False

    def __init__(self, speaker: Speaker, task: Task, data: Encoded, spec: TrainSpec, pad_id: int) -> None:
        self.metric, self.higher_is_better = task.metric, task.higher_is_better
        self.speaker, self._data, self._pad_id = speaker, data, pad_id
        self._smoothing = spec.label_smoothing

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        return batches.collate(self._data, rows, self._pad_id)

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        return float((targets[:, 1:] != IGNORED).sum())

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        return -self.speaker.log_probs(inputs, targets, self._smoothing).mean()


class VarlenLikelihood(Likelihood):
    """The same on a GPU, of rows that lie end to end."""

    records = True

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        ids, targets = [self._data.sequence(i) for i in rows], [self._data.targets[i] for i in rows]
        return varlen.rows(ids, targets, self._pad_id)

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        return float((targets != IGNORED).sum())

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        meant = (targets != IGNORED).float()
        states = varlen.states(self.speaker.trunk, inputs)
        found = self.speaker.log_probs_of(states, targets.clamp(min=0), self._smoothing)
        return -(found * meant).sum() / meant.sum().clamp(min=1.0)


class Preference:
    """Direct preference optimisation (Rafailov et al. 2023); `label_smoothing` is the share of wrong preferences.

    `reference` holds the summed log-probability of every sequence of `data` under the model at the start.
    """

    metric = "preference_accuracy"
    higher_is_better = True
    part_tokens: int | None = None
    records = False

    def __init__(
        self, speaker: Speaker, data: Encoded, reference: NDArray[np.float64], spec: TrainSpec, pad_id: int
    ) -> None:
        self.speaker, self._data, self._pad_id = speaker, data, pad_id
        self._beta, self._smoothing = spec.beta, spec.label_smoothing
        self._reference = torch.from_numpy(reference.astype(np.float32))

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        return batches.collate(self._data, self._data.sequences(rows), self._pad_id)

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        return float(len(targets) // self._data.group)

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        summed = likelihoods(self.speaker.log_probs(inputs, targets), targets)
        start = self._reference[torch.from_numpy(self._data.sequences(rows))].to(summed.device)
        chosen, rejected = (summed - start).reshape(-1, 2).unbind(1)
        margin = self._beta * (chosen - rejected)
        right, wrong = -functional.logsigmoid(margin), -functional.logsigmoid(-margin)
        return ((1.0 - self._smoothing) * right + self._smoothing * wrong).mean()


def likelihoods(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum over each sequence's learnt tokens `[sequences]`, from what `Speaker.log_probs` gives."""
    learnt = targets[:, 1:] != IGNORED
    # Each at its own place, then summed up: a GPU's index_add adds in an order of its own every time.
    return log_probs.new_zeros(learnt.shape).masked_scatter(learnt, log_probs).sum(1)


def _class_weights(task: Task, data: Encoded) -> torch.Tensor:
    counts = np.maximum(task.class_counts(data.targets), 1)
    return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)
