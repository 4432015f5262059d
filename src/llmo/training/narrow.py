"""Frozen linear weights in 8 or 4 bits under an adapter, made wide a layer at a time as they are used.

8 bits: a scale for each output. 4 bits: NF4, the normal distribution's quantiles with a scale for every 64 weights
(Dettmers et al. 2023, QLoRA, arXiv:2305.14314). Gradients pass through to what is trained; nothing of full width is
kept for the way back. The saved model has the weights that were computed with, so that it says what was trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
# The quantiles of table 1 in the paper's appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class NarrowLinear(nn.Linear):
    """An `nn.Linear` whose weight is held as int8, or as two NF4 codes a byte. It is never trained."""

    def __init__(self, wide: nn.Linear, bits: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = wide.in_features, wide.out_features, bits
        codes, scale = (_int8 if bits == 8 else _nf4)(wide.weight.detach().float())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = wide.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def wide_weight(self) -> Tensor:
        """`[out, in]` in fp32."""
        scale: Tensor = self.get_buffer("scale")
        if self.bits == 8:
            return self.weight * scale
        table = torch.tensor(NF4, device=scale.device)
        codes = torch.stack([self.weight >> 4, self.weight & 15], -1).view(-1, BLOCK)
        wide = table[codes.int()] * scale
        return wide.view(-1)[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return said if self.bias is None else said + self.bias.to(said.dtype)

    def plain(self) -> nn.Linear:
        """The layer with the wide weights that this one computed with."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device=self.weight.device)
        with torch.no_grad():
            made.weight.copy_(self.wide_weight())
            if self.bias is not None:
                made.bias.copy_(self.bias)
        return made


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NarrowLinear) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.layer, ctx.dtype, ctx.given = layer, dtype, x.dtype
        return x.to(dtype) @ layer.wide_weight().to(dtype).T

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient,) = outer
        return (gradient.to(ctx.dtype) @ ctx.layer.wide_weight().to(ctx.dtype)).to(ctx.given), None


def narrow(model: nn.Module, base_weights: str, head: list[nn.Module]) -> None:
    """Hold the linear weights of the trunk in fewer bits. The head, and a projection that shares its weights with the
    embeddings, stay wide."""
    kept = {id(module) for top in head for module in top.modules()}
    kept |= {id(m) for m in model.modules() if isinstance(m, nn.Embedding)}
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parent, name, child in _children(model):
        if type(child) is nn.Linear and id(child) not in kept and id(child.weight) not in shared:
            setattr(parent, name, NarrowLinear(child, 8 if base_weights == "int8" else 4))


def widen(model: nn.Module) -> None:
    """Put wide layers back in place of the narrow ones."""
    for parent, name, child in _children(model):
        if isinstance(child, NarrowLinear):
            setattr(parent, name, child.plain())


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127.0
    return torch.round(weight / scale).to(torch.int8), scale


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    flat = nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=1e-12)
    table = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(flat / scale, (table[1:] + table[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return (codes[:, 0] << 4) | codes[:, 1], scale
