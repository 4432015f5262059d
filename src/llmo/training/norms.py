"""RMSNorm (Zhang and Sennrich 2019) with a gradient of its own, a third of the time of autograd's chain on a CPU, and
by torch's kernel on a GPU."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional

PROBE = 4  # rows that prove a module to be this norm
CLOSE = 1e-5


class Norm:
    """What stands in for the `forward` of a module, whose weight may become another."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        self._module, self._eps = module, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self._module.weight
        if x.is_cuda:
            return functional.rms_norm(x.float(), weight.shape, weight, self._eps)
        found: torch.Tensor = _RMSNorm.apply(x, weight, self._eps)  # type: ignore[no-untyped-call]
        return found


@torch.no_grad()
def replace_norms(model: nn.Module) -> int:
    """In every module that is proved to be this norm (some add 1 to the weight, say); how many there were."""
    count = 0
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
            continue
        if len(inspect.signature(module.forward).parameters) != 1:
            continue  # it may be given a gate too, without which it is this norm
        norm = Norm(module, eps)
        probe = torch.linspace(-2.0, 3.0, PROBE * len(weight)).view(PROBE, -1)
        if torch.allclose(module(probe), norm(probe), rtol=CLOSE, atol=CLOSE):
            module.forward = norm
            count += 1
    return count


class _RMSNorm(torch.autograd.Function):
    """`[..., width]`, computed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.dtype = x.dtype
        x = x.float()
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        said: torch.Tensor = unit * weight
        return said

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (slope,) = outer
        unit, inverse, weight = ctx.saved_tensors
        to_weight = (slope * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        slope = slope * weight
        along = torch.linalg.vecdot(slope, unit)[..., None].div_(unit.shape[-1])
        return torch.addcmul(slope, unit, along, value=-1).mul_(inverse).to(ctx.dtype), to_weight, None
