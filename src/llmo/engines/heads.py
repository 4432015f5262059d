"""What stands on an encoder's trunk, apart from it: transformers' own head, fed with hidden states that are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

_PROBE = (2, 4)  # texts and tokens that a new head is tried on


def logits_of(said: Any, mask: Tensor) -> Tensor:
    """What a model of transformers said, as its task takes it: its logits; start beside end `[rows, tokens, 2]` of one
    that answers questions; of a bare trunk the mean of its hidden states over the text (`mask`), at length 1."""
    if "logits" in said:
        logits: Tensor = said.logits
        return logits
    if "start_logits" in said:
        return torch.stack([said.start_logits, said.end_logits], -1)
    there = mask[..., None].float()
    mean = (said.last_hidden_state.float() * there).sum(1) / there.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def take_off(model: Any) -> None:
    """Leave of a transformers model what stands on its trunk, in place: it reads hidden states as `inputs_embeds`.

    Raises ValueError for an architecture where that cannot be.
    """
    if model.base_model is model:
        raise ValueError("it is a trunk and nothing else")
    pooler = getattr(model.base_model, "pooler", None)
    if isinstance(pooler, nn.Linear):
        raise ValueError(f"{model.config.model_type} pools within its trunk")  # noqa: TRY004 (of no argument)
    setattr(model, model.base_model_prefix, _Given(pooler))


class Head:
    """`[rows, tokens, hidden]` and their mask to logits, `[rows, labels]` or `[rows, tokens, labels]`.

    A pooler belongs to the head: it is trained with it. `names` are the head's tensors as the whole model calls them.
    """

    def __init__(self, config: Any, make: Callable[[Any], Any], weights: Mapping[str, Tensor]) -> None:
        """`make` builds the model from its config; `weights` may hold more than the head's, which are copied.

        Raises KeyError for a tensor that is missing, RuntimeError for one of another shape, and ValueError for an
        architecture whose head cannot be taken off.
        """
        with torch.device("meta"):  # of the whole model only the head gets its weights
            self._model = make(config)
        take_off(self._model)
        self.names = frozenset(self._model.state_dict())
        self._model.load_state_dict({name: weights[name].clone() for name in self.names}, assign=True)
        self._model.eval()

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return logits_of(self._model(inputs_embeds=hidden, attention_mask=mask), mask)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._model.state_dict().values())

    def says(self) -> bool:
        """Whether its logits depend on the text at all. Raises ValueError for logits that are not finite."""
        weight = next(self._model.parameters())
        seeded = torch.Generator().manual_seed(0)
        width = self._model.config.hidden_size
        with torch.inference_mode():
            hidden = torch.randn(*_PROBE, width, generator=seeded).to(weight)
            logits = self(hidden, torch.ones(_PROBE, dtype=torch.int64, device=weight.device))
        if not logits.isfinite().all():
            raise ValueError("its logits are not finite")
        return bool((logits[0] != logits[1]).any())


class _Given(nn.Module):
    """Where a head expects its trunk: passes on hidden states that were computed before."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPooling:
        pooled = None if self.pooler is None else self.pooler(inputs_embeds)
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)
