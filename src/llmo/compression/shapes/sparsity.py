"""Sets the smallest linear weights to zero: anywhere, or two of every four.

On a CPU nothing gains from it, in time or in size: engines multiply by zeros as by anything else. A GPU from Ampere on
multiplies two of four at up to twice the speed (torch's semi-structured tensors). `gains` tells which device does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from llmo.compression.shapes import anatomy, folder
from llmo.compression.shapes.source import opened
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.place import torch_device
from llmo.errors import SpecError
from llmo.types import Device

Pattern = Literal["2:4", "magnitude"]
AMPERE = (8, 0)


def gains(device: Device, pattern: Pattern = "2:4") -> str | None:
    """Why a model with this pattern is faster on the device; None where it is not, and need not be tried.

    Raises EnvironmentProblem for a GPU that is not there.
    """
    if device.kind != "cuda" or pattern != "2:4":
        return None
    capability = torch.cuda.get_device_capability(torch_device(device))
    if capability < AMPERE:
        return None
    return (
        f"the GPU (compute capability {capability[0]}.{capability[1]}) multiplies matrices of which two of four are 0"
    )


def sparsify(
    model: Path, data: Dataset, out: Path, ctx: Context, *, pattern: Pattern = "2:4", share: float = 0.5
) -> dict[str, Any]:
    """Write the model with zeros in the linear weights of its layers: with `2:4` all but the two largest of every four
    inputs of an output (Mishra et al. 2021, arXiv:2104.08378), with `magnitude` the smallest `share` of each matrix
    (Han et al. 2015, arXiv:1506.02626).

    Training again (`distil.recover`) leaves them zero. Returns `{"step": "sparsity", "pattern", "zero": share of the
    layers' linear weights, "parameters", "metrics"}`. Raises SpecError, ModelError, DataError, InputError.
    """
    if not 0.0 < share < 1.0:
        raise SpecError(f"share is {share}: that is not a part of the weights", hint="give a share between 0 and 1")
    with folder.made(out) as aside:
        source = opened(model, data, ctx)
        zeros = total = 0
        for layer in anatomy.anatomy(source.model):
            for linear in layer.linear:
                mask = two_of_four(linear.weight) if pattern == "2:4" else largest(linear.weight, share)
                with torch.no_grad():
                    linear.weight *= mask
                zeros, total = zeros + int((~mask).sum()), total + mask.numel()
        step = {"step": "sparsity", "pattern": pattern, "zero": round(zeros / total, 4)}
        return folder.write(source, source.model, step, aside, ctx)


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """Which weights `[out, in]` stay. Raises SpecError where the inputs are no multiple of four."""
    if weight.shape[1] % 4:
        raise SpecError(
            f"a linear layer has {weight.shape[1]} inputs, which do not come in fours", hint="use the pattern magnitude"
        )
    fours = weight.detach().abs().view(-1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.topk(2, dim=1).indices, True)
    return kept.view(weight.shape)


def largest(weight: torch.Tensor, share: float) -> torch.Tensor:
    """Which weights `[out, in]` stay when the smallest `share` of them goes."""
    order = weight.detach().abs().flatten().argsort(stable=True)
    kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[order[: round(share * weight.numel())]] = False
    return kept.view(weight.shape)
