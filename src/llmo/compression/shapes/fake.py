"""Linear layers that compute as they will at int8 while they learn, so that less is lost when they are quantised.

Weights have one scale an output, activations one a token, as in `compression.quantise`; rounding is passed over on the
way back (straight-through gradients: Bengio et al. 2013, arXiv:1308.3432; quantisation-aware training: Jacob et al.
2018, arXiv:1712.05877).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmo.compression.quantise import TINY

STEPS = 127


@contextmanager
def quantised(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """The layers compute so within; their weights stay what they are, at full width."""
    for layer in layers:
        layer.forward = _Forward(layer)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Forward:
    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        said: torch.Tensor = _Product.apply(x, self._layer.weight)  # type: ignore[no-untyped-call]
        bias = self._layer.bias
        return said if bias is None else said + bias.to(said.dtype)


class _Product(torch.autograd.Function):
    """`x @ weight.T` of whole steps, which bf16 holds exactly, scaled afterwards; `x` `[..., in]`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        steps, scale = rounded(x, dtype)
        weight_steps, weight_scale = rounded(weight, dtype)
        ctx.save_for_backward(steps, scale, weight_steps, weight_scale)
        ctx.dtype, ctx.given = dtype, x.dtype
        said = (steps @ weight_steps.T).float() * scale * weight_scale.T
        return said.to(dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        steps, scale, weight_steps, weight_scale = ctx.saved_tensors
        slope = outer[0].float()
        to_x = ((slope * weight_scale.T).to(ctx.dtype) @ weight_steps).to(ctx.given)
        flat = (slope * scale).to(ctx.dtype).flatten(0, -2)
        return to_x, (flat.T @ steps.flatten(0, -2)).float()


def rounded(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole steps from -127 to 127 for each last axis, and the size of a step `[..., 1]`."""
    x = x.detach().float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=TINY) / STEPS
    return (x / scale).round_().to(dtype), scale
