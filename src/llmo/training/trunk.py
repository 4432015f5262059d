"""Divides an encoder at its first layer that learns: what lies beneath is a fixed function of the text.

Nothing of an architecture's own code is written again. The upper part is the whole model whose embeddings hand over
what the frozen layers said before, and whose list of layers begins at the first that learns; that this gives the same
answers is proved on the model itself before it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from llmo.engines.heads import logits_of
from llmo.training.model import Built

CLOSE = 1e-4
PROBE = 6  # tokens of the texts that prove the division


class _Given(nn.Module):
    """In place of the embeddings: what the frozen layers said."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.states


class Trunk:
    """`frozen` of the model's `depth` layers do not learn. `first_only` says whether what stands on the trunk reads the
    first token alone, so that nothing else need be kept."""

    def __init__(self, built: Built, embeddings: str, place: tuple[nn.Module, str], frozen: int) -> None:
        network = built.network
        self.pad_id = built.pad_id
        self._network, self._base, self._embeddings, self._place = network, network.base_model, embeddings, place
        layers = list(getattr(*place))
        self.frozen, self.depth = frozen, len(layers)
        self._lower, self._upper = nn.ModuleList(layers[:frozen]), nn.ModuleList(layers[frozen:])
        self.first_only = False

    @classmethod
    def of(cls, built: Built) -> Trunk | None:
        """The division of a model whose embeddings and lowest layers do not learn; None where there is none, and where
        it cannot be proved for this architecture."""
        base = built.network.base_model
        embeddings = next((name for name, _ in base.named_children() if name.startswith("embedding")), None)
        place = max(_lists(base), key=lambda found: len(getattr(*found)), default=None)
        if embeddings is None or place is None or _learns(getattr(base, embeddings)):
            return None
        layers = list(getattr(*place))
        frozen = next((i for i, layer in enumerate(layers) if _learns(layer)), len(layers))
        if not frozen:
            return None
        trunk = cls(built, embeddings, place, frozen)
        return trunk if trunk._proves() else None

    @property
    def width(self) -> int:
        return int(self._network.config.hidden_size)

    def below(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the frozen layers say, `[rows, tokens, width]`; to be run in eval mode, without gradients."""
        found: list[Any] = []
        handle = self._lower[-1].register_forward_hook(lambda _, __, said: found.append(said))
        try:
            with self._divided(self._lower):
                self._network(**inputs)
        finally:
            handle.remove()
        said = found[0]
        states: torch.Tensor = said[0] if isinstance(said, tuple) else said
        return states[:, :1] if self.first_only else states

    def above(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The logits, from what `below` gave and the attention mask `[rows, tokens]`."""
        mask = mask[:, : states.shape[1]]
        given = {"attention_mask": mask} if len(self._upper) else {}  # which nothing else looks at
        with self._divided(self._upper, states):
            return logits_of(self._network(input_ids=torch.zeros_like(mask), **given), mask)

    @cached_property
    def digest(self) -> str:
        """Names the frozen part: its weights, and how far it goes."""
        found = hashlib.sha256(f"{self._network.config.to_json_string()}{self.frozen}{self.first_only}".encode())
        for part in (getattr(self._base, self._embeddings), self._lower):
            for name, tensor in part.state_dict().items():
                found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    @contextmanager
    def _divided(self, layers: nn.ModuleList, states: torch.Tensor | None = None) -> Iterator[None]:
        whole, embeddings = getattr(*self._place), getattr(self._base, self._embeddings)
        setattr(*self._place, layers)
        if states is not None:
            setattr(self._base, self._embeddings, _Given(states))
        try:
            yield
        finally:
            setattr(*self._place, whole)
            setattr(self._base, self._embeddings, embeddings)

    @torch.no_grad()
    def _proves(self) -> bool:
        modes = [(module, module.training) for module in self._network.modules()]
        self._network.eval()
        device = next(self._network.parameters()).device
        ids = torch.arange(2 * PROBE, device=device).reshape(2, PROBE) % int(self._network.config.vocab_size)
        mask = torch.ones_like(ids)
        mask[1, PROBE // 2 :] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        try:
            expected = logits_of(self._network(**inputs), mask)
            states = self.below(inputs)
            proved = _same(self.above(states, mask), expected, mask)
            self.first_only = proved and not len(self._upper) and self._reads_first(states, mask, expected)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False  # an architecture that does not let itself be divided
        finally:
            for module, mode in modes:
                module.training = mode
        return proved

    def _reads_first(self, states: torch.Tensor, mask: torch.Tensor, expected: torch.Tensor) -> bool:
        return expected.ndim == 2 and _same(self.above(states[:, :1], mask), expected, mask)


def _lists(base: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the lists of layers are: the module that has one, and its name there."""
    return [
        (module, name)
        for module in base.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList)
    ]


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _same(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether two logits are, where there is text."""
    if a.shape != b.shape:
        return False
    real = (a[mask.bool()], b[mask.bool()]) if a.ndim == 3 else (a, b)
    return torch.allclose(*real, rtol=CLOSE, atol=CLOSE)
