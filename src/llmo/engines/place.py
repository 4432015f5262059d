"""Where torch computes: a granted device in torch's words. Apart from `torch.py`, which brings transformers along."""

from __future__ import annotations

import torch

from llmo.errors import EnvironmentProblem
from llmo.types import Device


def torch_device(device: Device) -> torch.device:
    """Raises EnvironmentProblem for a device that this build of torch cannot use."""
    if device.kind == "cpu":
        return torch.device("cpu")
    if device.kind == "cuda" and torch.cuda.is_available():
        return torch.device(device.name if ":" in device.name else "cuda")
    raise EnvironmentProblem(
        f"this torch cannot use the device '{device.name}' ({device.kind})",
        hint="install a torch build for it, or run on the CPU; see `llmo doctor`",
    )
