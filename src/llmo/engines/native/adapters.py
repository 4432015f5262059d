"""LoRA adapters as the kernels read them: each row of a step names its own, so any number of them mix."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmo.engines.native import library
from llmo.engines.paged.config import Config
from llmo.engines.paged.lora import GROUPS, read_lora
from llmo.engines.paged.named import Named
from llmo.engines.paged.stream import Piece


@dataclass(frozen=True, slots=True)
class Adapter:
    """`native` points into `tensors`."""

    native: library.Adapter
    tensors: Sequence[Tensor]


class Adapters(Named[Adapter]):
    def __init__(self, config: Config, precision: str) -> None:
        super().__init__()
        self._config = config
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16

    def addresses(self, pieces: Sequence[Piece]) -> list[int] | None:
        """Where the adapter of each row is, 0 for none; None where no piece has one."""
        if all(piece.stream.adapter is None for piece in pieces):
            return None
        keys = (piece.stream.adapter for piece in pieces for _ in range(piece.count))
        return [0 if key is None else ctypes.addressof(self._loaded[key].native) for key in keys]

    def _read(self, folder: Path) -> Adapter:
        lora = read_lora(folder, self._config, self._dtype, torch.device("cpu"))
        native, tensors = library.Adapter(), []
        for i, group in enumerate(GROUPS):
            if lora.rank(group):
                down, up = lora.down[group].permute(0, 2, 3, 1).contiguous(), lora.up[group].contiguous()
                native.group[i] = library.Lora(down.data_ptr(), up.data_ptr(), down.shape[1], down.shape[2])
                tensors += [down, up]
        return Adapter(native, tensors)
