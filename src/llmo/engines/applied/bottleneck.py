"""Bottleneck adapters: a narrow pair of layers after the feed-forward part of every layer, added to what it says.

Houlsby et al. 2019 (arXiv:1902.00751), at the one place a layer that Pfeiffer et al. 2021 (arXiv:2005.00247) found
enough. The second half starts at zero, so that training starts from the model as it is.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmo.engines.applied.base import Applied, read, unfit, write
from llmo.engines.applied.places import feed_forward_outputs, hidden_width

STD = 0.02


class Bottleneck(Applied):
    """`width` is that of the model, `narrow` that between the two halves, `layers` their number."""

    kind: ClassVar[str] = "bottleneck"

    def __init__(self, layers: int, width: int, narrow: int) -> None:
        super().__init__()
        self.narrow = narrow
        pairs = [(nn.Linear(width, narrow), nn.Linear(narrow, width)) for _ in range(layers)]
        for down, up in pairs:
            nn.init.normal_(down.weight, std=STD)
            for zero in (down.bias, up.weight, up.bias):
                nn.init.zeros_(zero)
        self.down, self.up = (nn.ModuleList(side) for side in zip(*pairs, strict=True))

    @classmethod
    def new(cls, model: Any, narrow: int) -> Self:
        """For a transformers model, not attached yet; new weights are drawn from torch's generator."""
        return cls(len(feed_forward_outputs(model)), hidden_width(model), narrow)

    def _hook(self, model: Any) -> list[RemovableHandle]:
        places = feed_forward_outputs(model).values()
        return [place.register_forward_hook(partial(self._add, number)) for number, place in enumerate(places)]

    def _add(self, number: int, module: Any, given: tuple[Tensor, ...], said: Tensor) -> Tensor:
        if not self.enabled:
            return said
        more: Tensor = self.up[number](nn.functional.gelu(self.down[number](said)))
        return said + more

    def save(self, folder: Path, model: Any) -> None:
        write(folder, {"kind": self.kind, "width": self.narrow, "activation": "gelu"}, self.state_dict())

    @classmethod
    def open(cls, folder: Path, model: Any) -> Self:
        settings, tensors = read(folder)
        try:
            made = cls.new(model, int(settings["width"]))
            made.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise unfit(f"the adapter does not fit the model: {error}", folder) from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise unfit("the adapter is not finite", folder)
        return made
