"""What is learnt at chosen places of a text: the tokens that are hidden there, or the items that come next.

Only the states of those places go through the model's head, which projects to a whole vocabulary: at 15% of a text that
is most of a small model's work saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmo.tasks.base import IGNORED, Encoding, Logits, Task
from llmo.tasks.masked_lm import MaskedLm
from llmo.training import batches
from llmo.training.batches import Encoded
from llmo.training.objectives import Inputs
from llmo.training.precision import Precision
from llmo.training.scoring import Predict, measuring

CHUNK_BYTES = 64 << 20  # of fp32 logits at once
PROBES = 4
CLOSE = 1e-3


class Places:
    """A model (`Built.network`) as its trunk and its head. Where they are not the whole of it, all of its logits are
    made, and `apart` is False."""

    def __init__(self, network: Any) -> None:
        self._network = network
        heads = [
            module
            for name, module in network.named_children()
            if name != network.base_model_prefix and any(True for _ in module.parameters())
        ]
        self._head: nn.Module = heads[0] if len(heads) == 1 else nn.Identity()
        self.apart = len(heads) == 1 and self._proves()

    def losses(self, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        """The summed cross-entropy over targets that are not -100, a chunk of logits at a time."""
        states, wanted = self._states(inputs, targets)
        total = states.new_zeros((), dtype=torch.float32)
        rows = self._rows(states)
        for first in range(0, max(1, len(wanted)), rows):  # a batch without targets has a gradient too: zeros
            part = slice(first, first + rows)
            if len(wanted) <= rows:
                total = total + self._loss(states, wanted)
            else:  # made again on the way back, so that one chunk's logits are kept and not all
                total = total + checkpoint(self._loss, states[part], wanted[part], use_reentrant=False)
        return total

    @torch.no_grad()
    def judge(self, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        """Of each target its natural log-probability and whether it is the likeliest, `[targets, 2]`."""
        states, wanted = self._states(inputs, targets)
        found = [states.new_zeros((0, 2), dtype=torch.float32)]
        rows = self._rows(states)
        for first in range(0, len(wanted), rows):
            part = slice(first, first + rows)
            logits = self._logits(states[part])
            picked = logits.gather(1, wanted[part, None])[:, 0] - logits.logsumexp(1)
            found.append(torch.stack([picked, (logits.argmax(1) == wanted[part]).float()], 1))
        return torch.cat(found)

    def last(self, inputs: Inputs) -> torch.Tensor:
        """The logits at each text's last token, `[texts, labels]`, of a model that answers there."""
        if not self.apart:
            logits: torch.Tensor = self._network(**inputs).logits
            return logits.float()
        states = self._network.base_model(**inputs).last_hidden_state
        ends = inputs["attention_mask"].sum(1) - 1
        return self._logits(states[torch.arange(len(ends), device=ends.device), ends])

    def _states(self, inputs: Inputs, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        there = targets != IGNORED
        said = self._network.base_model(**inputs).last_hidden_state if self.apart else self._network(**inputs).logits
        return said[there], targets[there]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(states) if self.apart else states
        return logits.float()

    def _loss(self, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self._logits(states), wanted, reduction="sum")

    def _rows(self, states: torch.Tensor) -> int:
        width = max(p.shape[0] for p in self._head.parameters()) if self.apart else states.shape[-1]
        return max(16, CHUNK_BYTES // (4 * width))

    @torch.no_grad()
    def _proves(self) -> bool:
        """Whether the head on the trunk's states gives the model's logits: of each token, or of the last one."""
        was = self._network.training
        self._network.eval()
        ids = torch.arange(2, 2 + PROBES, device=next(self._network.parameters()).device)[None]
        whole = self._network(input_ids=ids).logits.float()
        try:
            parts = self._head(self._network.base_model(input_ids=ids).last_hidden_state).float()
        except (TypeError, RuntimeError):  # a head that takes something else
            return False
        finally:
            self._network.train(was)
        parts = parts if whole.ndim == 3 else parts[:, -1]
        return parts.shape == whole.shape and torch.allclose(parts, whole, rtol=CLOSE, atol=CLOSE)


class AtPlaces:
    """Cross-entropy at each row's targets that are not -100 (as an `Objective`). Full softmax over all items is what
    makes sequential recommendation as good as larger models (Klenitskiy & Vasilev 2023)."""

    part_tokens: int | None = None
    records = False

    def __init__(self, places: Places, task: Task, data: Encoded, pad_id: int) -> None:
        self.metric, self.higher_is_better = task.metric, task.higher_is_better
        self._places, self._data, self._pad_id = places, data, pad_id

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        return batches.collate(self._data, rows, self._pad_id)

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        return float((targets != IGNORED).sum())

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        return self._places.losses(inputs, targets) / max(1.0, self.mass(targets, rows))


class Masked(AtPlaces):
    """Other tokens are hidden in each epoch: which ones is a function of (seed, epoch, row)."""

    def __init__(self, places: Places, task: MaskedLm, data: Encoded, seed: int, pad_id: int) -> None:
        super().__init__(places, task, data, pad_id)
        self._task, self._seed = task, seed

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        inputs, targets = super().batch(rows, epoch)
        ids = inputs["input_ids"]
        for i, row in enumerate(rows):
            rng = np.random.default_rng([self._seed, epoch, int(row)])
            shown, answers = self._task.hide(targets[i].numpy(), ids[i].numpy(), rng)
            ids[i], targets[i] = torch.from_numpy(shown), torch.from_numpy(answers)
        return inputs, targets


def hidden_predictor(model: nn.Module, places: Places, task: Task, pad_id: int, precision: Precision) -> Predict:
    """As `scoring.model_predictor`, of hidden tokens only: `[hidden, 2]` a text."""

    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        inputs = batches.padded([e.input_ids for e in encodings], pad_id, task.max_length)
        wanted = [task.target({}, e) for e in encodings]
        targets = batches.stacked(wanted, inputs["input_ids"].shape[1])
        with measuring(model, precision):
            on_device = {k: v.to(precision.device) for k, v in inputs.items()}
            found = places.judge(on_device, targets.to(precision.device)).cpu().numpy()
        return np.split(found, np.cumsum([int((t != IGNORED).sum()) for t in wanted])[:-1])

    return predict


def last_predictor(model: nn.Module, places: Places, task: Task, pad_id: int, precision: Precision) -> Predict:
    """As `scoring.model_predictor`, of a model that answers at the last token: `[labels]` a text, and no logits of the
    tokens before it."""

    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        inputs = batches.padded([e.input_ids for e in encodings], pad_id, task.max_length)
        on_device = {k: v.to(precision.device) for k, v in inputs.items()}
        with measuring(model, precision):
            return list(places.last(on_device).cpu().numpy())

    return predict
