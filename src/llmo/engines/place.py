"""Where torch computes: a granted device in torch's words. Apart from `torch.py`, which brings transformers along."""

from __future__ import annotations

import os

import torch

from llmo.errors import EnvironmentProblem
from llmo.types import Device


def torch_device(device: Device) -> torch.device:
    """Raises EnvironmentProblem for a device that this build of torch cannot use."""
    if device.kind == "cpu":
        return torch.device("cpu")
    if device.kind == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", index(device.name, os.environ.get("CUDA_VISIBLE_DEVICES")))
    raise EnvironmentProblem(
        f"this torch cannot use the device '{device.name}' ({device.kind})",
        hint="install a torch build for it, or run on the CPU; see `llmo doctor`",
    )


def index(name: str, visible: str | None) -> int:
    """Where torch counts the GPU `cuda:N`: N counts all of them, torch those that CUDA_VISIBLE_DEVICES lists."""
    number = name.partition(":")[2]
    listed = (visible or "").split(",")
    return listed.index(number) if number in listed else int(number or 0)
