"""A linear head over the mean of the last hidden states at length 1: how text encoders are trained to compare texts.

transformers' heads read the first token, of which sentence encoders make little; so few-shot and zero-shot models
answer with this one in place of the model's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmo.engines.applied.base import Applied, read, unfit, write
from llmo.engines.applied.places import hidden_width


class MeanHead(Applied):
    """`weight` `[labels, width]` and `bias` `[labels]`, zero at first; they are set, not trained step by step."""

    kind: ClassVar[str] = "mean-head"

    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(labels, width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(labels), requires_grad=False)
        self._mask: Tensor | None = None
        self._hidden: Tensor | None = None

    def _hook(self, model: Any) -> list[RemovableHandle]:
        return [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.base_model.register_forward_hook(self._between),
            model.register_forward_hook(self._after),
        ]

    def _before(self, model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self._mask = given.get("attention_mask")

    def _between(self, trunk: Any, args: tuple[Any, ...], said: Any) -> None:
        self._hidden = said.last_hidden_state

    def _after(self, model: Any, args: tuple[Any, ...], said: Any) -> Any:
        hidden, mask = self._hidden, self._mask
        self._hidden = self._mask = None
        if self.enabled and hidden is not None:
            said.logits = nn.functional.linear(mean(hidden, mask), self.weight, self.bias)
        return said

    def save(self, folder: Path, model: Any) -> None:
        write(folder, {"kind": self.kind, "pooling": "mean", "normalised": True}, self.state_dict())

    @classmethod
    def open(cls, folder: Path, model: Any) -> Self:
        _, tensors = read(folder)
        try:
            made = cls(len(tensors["bias"]), hidden_width(model))
            made.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise unfit(f"the head does not fit the model: {error}", folder) from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise unfit("the head is not finite", folder)
        return made


def mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over each text's own tokens at length 1, in fp32: `[rows, tokens, width]` to `[rows, width]`."""
    hidden = hidden.float()
    if mask is None:
        return nn.functional.normalize(hidden.mean(1), dim=-1)
    kept = mask[:, :, None].to(hidden.dtype)
    return nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1.0), dim=-1)
