"""LoRA adapters as the kernels read them: each row of a step names its own, so any number of them mix."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmo.engines.named import Named
from llmo.engines.native import library
from llmo.engines.native.model import LANES
from llmo.engines.paged.config import Config
from llmo.engines.paged.lora import GROUPS, read_lora
from llmo.engines.paged.stream import Piece


@dataclass(frozen=True, slots=True)
class Adapter:
    """`native` points into `tensors`."""

    native: library.Adapter
    tensors: Sequence[Tensor]


class Adapters(Named[Adapter]):
    def __init__(self, config: Config, precision: str, memory: int) -> None:
        super().__init__(memory)
        self._config = config
        self._rounded = precision == "int8"

    def addresses(self, pieces: Sequence[Piece]) -> list[int] | None:
        """Where the adapter of each row is, 0 for none; None where no piece has one."""
        if all(piece.stream.adapter is None for piece in pieces):
            return None
        keys = (piece.stream.adapter for piece in pieces for _ in range(piece.count))
        return [0 if key is None else ctypes.addressof(self._loaded[key].native) for key in keys]

    def _read(self, folder: Path) -> Adapter:
        lora = read_lora(folder, self._config, torch.float32, torch.device("cpu"))
        native, tensors = library.Adapter(), []
        for i, group in enumerate(GROUPS):
            if lora.rank(group):
                down, up = lora.down[group].permute(0, 2, 3, 1).contiguous(), lora.up[group].contiguous()
                reach, scale = _reach(up), torch.ones(down.shape[:3])
                if self._rounded:
                    (down, first), (up, second) = _rounded(down), _rounded(up)
                    scale = (first * second).contiguous()
                group_tensors = [down, up, scale, reach]
                addresses = (tensor.data_ptr() for tensor in group_tensors)
                native.group[i] = library.Lora(*addresses, down.shape[1], down.shape[2])
                tensors += group_tensors
        return Adapter(native, tensors)

    def _size(self, adapters: Sequence[Adapter]) -> int:
        return sum(tensor.nbytes for adapter in adapters for tensor in adapter.tensors)


def _reach(up: Tensor) -> Tensor:
    """`[ranks, 2]`: modules of different sizes lie in one group, and each reaches its own outputs, by sixteen."""
    lanes = (up != 0).any(dim=0).view(up.shape[1] * up.shape[2], -1, LANES).any(dim=2).int()
    first = lanes.argmax(dim=1)
    end = lanes.shape[1] - lanes.flip(1).argmax(dim=1)
    return (torch.stack([first, end], 1) * LANES).int().contiguous()


def _rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., features]` as int8 with a scale for each row: a step reads half as much, and the base is no finer."""
    scale = matrix.abs().amax(-1).clamp_min(1e-12) / 127
    return (matrix / scale[..., None]).round().to(torch.int8), scale
