"""Chooses the device and the number format of training, and says why."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llmo.engines.place import torch_device
from llmo.errors import EnvironmentProblem
from llmo.types import Device


@dataclass(frozen=True, slots=True)
class Precision:
    """`name` is fp32 or bf16; weights and optimiser state are fp32 in both, bf16 computes in autocast."""

    name: str
    device: torch.device
    why: str

    def autocast(self) -> AbstractContextManager[Any]:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def choose(asked: str, device: Device) -> Precision:
    """`asked` is auto, fp32 or bf16. Raises EnvironmentProblem when the device cannot do what was asked."""
    place = torch_device(device)
    native, why = _bf16(place)
    if asked == "bf16" and not native:
        raise EnvironmentProblem(f"precision bf16 was asked for, and {why}", hint="set train.precision to auto or fp32")
    if asked == "fp32":
        return Precision("fp32", place, "fp32 was asked for")
    return Precision("bf16" if native else "fp32", place, why)


def exact(chosen: Precision) -> Precision:
    """fp32 on the same device: what the saved model is measured in."""
    return Precision("fp32", chosen.device, "the saved model is fp32")


def _bf16(place: torch.device) -> tuple[bool, str]:
    if place.type == "cuda":
        native = torch.cuda.get_device_capability(place) >= (8, 0)
        return native, "the GPU computes bf16 natively" if native else "the GPU does not compute bf16 natively"
    able = torch.cpu.get_capabilities()
    for feature in ("amx_bf16", "avx512_bf16", "bf16"):
        if able.get(feature):
            return True, f"the CPU computes bf16 natively ({feature})"
    return False, "the CPU does not compute bf16 natively"
