"""Trains only those rows of the token embedding that the training texts use; the others follow in closed form.

A small text uses a tenth of a vocabulary, and the rest is half of MiniLM's weights: their gradient is zero at every
step, so that AdamW does nothing to them but decay, which is one factor for all of them. Gradients, optimiser state and
the pass over them shrink to what is used, and the result is the same.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from llmo.specs import TrainSpec
from llmo.training import optimiser, trained
from llmo.training.model import Built


class UsedEmbedding(nn.Module):
    """Stands in for an `nn.Embedding` of `[vocabulary, width]`: `weight` `[used, width]` are the rows that learn.

    `shrink` is what decay has left of the other rows; it is the caller's to set before they are looked at.
    """

    places: torch.Tensor
    rest: torch.Tensor

    def __init__(self, whole: nn.Embedding, used: NDArray[np.int64]) -> None:
        super().__init__()
        self.whole = [whole]  # in a list: no module of this one, so that its weights are not counted twice
        self.padding_idx = whole.padding_idx
        self.shrink = 1.0
        rows = torch.from_numpy(used).to(whole.weight.device)
        places = torch.full((whole.num_embeddings,), -1, dtype=torch.int64, device=whole.weight.device)
        places[rows] = torch.arange(len(used), device=places.device)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("rest", whole.weight.detach(), persistent=False)
        self.weight = nn.Parameter(whole.weight.detach()[rows].clone())
        place = -1 if self.padding_idx is None else int(places[self.padding_idx])
        self._padding = place if place >= 0 else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = self.places[ids]
        if self.training:
            # As nn.Embedding, whose padding row gets no gradient.
            return functional.embedding(places, self.weight, self._padding)
        used = functional.embedding(places.clamp(min=0), self.weight)
        if bool((places >= 0).all()):
            return used
        return torch.where((places >= 0)[..., None], used, functional.embedding(ids, self.rest) * self.shrink)

    @torch.no_grad()
    def restore(self) -> nn.Embedding:
        """The whole embedding, with what was learnt."""
        (whole,) = self.whole
        whole.weight.mul_(self.shrink)
        whole.weight[self.places >= 0] = self.weight
        return whole


def narrow(built: Built, ids: NDArray[np.int32], spec: TrainSpec) -> UsedEmbedding | None:
    """Put `UsedEmbedding` in place of the token embedding where that is exact and worth it, else return None.

    `ids` are all tokens of the training rows.
    """
    network = built.network
    whole = network.get_input_embeddings()
    if type(whole) is not nn.Embedding or not whole.weight.requires_grad or whole.max_norm is not None or whole.sparse:
        return None
    tied = sum(p is whole.weight for _, p in network.named_parameters(remove_duplicate=False)) > 1
    if tied or not trained.leaves_unused_rows(spec):
        return None
    used = np.union1d(ids, [built.pad_id]).astype(np.int64)
    if len(used) > trained.USED * whole.num_embeddings:
        return None
    narrowed = UsedEmbedding(whole, used)
    narrowed.train(whole.training)
    network.set_input_embeddings(narrowed)
    return narrowed


def restore(built: Built, narrowed: UsedEmbedding) -> None:
    """Undo `narrow`: the model has its whole embedding again."""
    built.network.set_input_embeddings(narrowed.restore())


def shrunk(spec: TrainSpec, steps: int, total: int) -> float:
    """What decoupled weight decay leaves of a weight without gradient after `steps` of `total`."""
    return float(np.prod([1.0 - optimiser.rate(spec, step, total) * spec.weight_decay for step in range(steps)]))
