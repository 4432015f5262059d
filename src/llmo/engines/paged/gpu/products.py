"""A weight on the GPU and how its product is cut into programs: by its own shape and the kind of rows, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmo.engines.paged.gpu import kernels

_MANY = 4096  # outputs: there are programs enough, so each takes more of them
_LEAST_PART, MOST_PARTS = 768, 4
TYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows, outputs and features of a tile, its warps, and how many loads are under way at once."""

    rows: int
    outs: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """`[outs, ins]` at fp32, bf16, or int8 with a scale an output. `gated` ones hold gate and up of an MLP."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, int8: bool) -> Matrix:
        bias = None if bias is None else bias.float()
        if not int8:
            return Matrix(weight.to(dtype).contiguous(), None, bias, dtype)
        scale = (weight.abs().amax(dim=1).clamp_min(1e-12) / 127).bfloat16()  # as on the CPU: the same model
        rounded = (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
        return Matrix(rounded.contiguous(), scale, bias, dtype)

    def parts(self, *, prompt: bool) -> int:
        """Into how many parts its features may be cut: long sums of few programs leave memory waiting."""
        return 1 if prompt else max(1, min(MOST_PARTS, self.weight.shape[1] // _LEAST_PART))

    def __call__(self, x: Tensor, out: Tensor, rows: int, *, prompt: bool, gated: bool = False, parts: int = 1) -> None:
        """Write the product of the first `rows` rows of `x` to `out`, or its `parts` to `out[0]`, `out[1]` and so on;
        see `kernels.product`."""
        outs, ins = self.weight.shape
        outs = outs // 2 if gated else outs
        cut = self._cut(rows, outs, prompt=prompt, gated=gated)
        nothing = self.weight
        kernels.product[triton.cdiv(rows, cut.rows) * triton.cdiv(outs, cut.outs), parts](
            x,
            self.weight,
            nothing if self.scale is None else self.scale,
            nothing if self.bias is None else self.bias,
            out,
            rows,
            out.stride(0) if out.dim() == 3 else 0,
            N=outs,
            K=ins,
            DTYPE=TYPES[self.dtype],
            PARTS=parts,
            GATED=gated,
            SCALED=self.scale is not None,
            BIASED=self.bias is not None,
            BM=cut.rows,
            BN=cut.outs,
            BK=cut.inner,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )

    def _cut(self, rows: int, outs: int, *, prompt: bool, gated: bool) -> Cut:
        """Measured on an H100. For rows of one kind all cuts add up in the same order, so that a row has the same bits
        in each: a test holds them to that. At int8 tiles of 64 rows take another instruction than smaller ones."""
        if self.dtype == torch.float32:
            return Cut(64, 32 if gated else 64, 32, 4, 2) if prompt else Cut(16, 32, 32, 4, 3)
        if self.scale is not None:
            few = 16 if rows <= 16 else 32
            return Cut(64, 64, 64, 4, 4) if prompt else Cut(few, 32 if outs > _MANY else 16, 128, 4, 4)
        if rows <= 16:
            return Cut(16, 64, 64 if gated else 128, 2, 5) if outs > _MANY else Cut(16, 16, 128, 2, 5)
        if rows <= 32:
            return Cut(32, 32, 64, 2, 5) if outs > _MANY else Cut(32, 16, 128, 4, 4)
        if rows <= 256:
            return Cut(64, 64, 64, 4, 4) if outs > _MANY else Cut(64, 16 if gated else 32, 128, 4, 4)
        if outs > _MANY:
            return Cut(128, 64 if gated else 128, 64, 8, 3)
        return Cut(64, 64 if gated else 128, 64, 4, 4)
