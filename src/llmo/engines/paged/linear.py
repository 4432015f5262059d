"""Matrix products on a CPU, at fp32, bf16 and int8, whose rows do not depend on the rows beside them.

That is what makes an answer the same alone and in a batch, and it was measured, not assumed: MKL's fp32 product
changes with the number of rows, oneDNN's packed one does not from two rows on, and the int8 kernel never does.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}  # of the activations


class Linear(Protocol):
    """`x @ weight.T + bias`, `[rows, in] -> [rows, out]` in the dtype of `x`. The first `prompt` rows are prompt
    tokens, the others tokens of answers: a kernel may be chosen by that and by nothing else."""

    def __call__(self, x: Tensor, prompt: int) -> Tensor: ...


class Packed:
    """At fp32 and bf16: weights packed once into oneDNN's blocks."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        self._bias = bias

    def __call__(self, x: Tensor, prompt: int) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


class Int8:
    """Weights rounded to int8 with one scale an output channel; activations stay bf16 and sums fp32.

    Few rows are bound by memory, so answers read the int8 weights as they are; prompts are bound by arithmetic, so
    theirs are widened to bf16, which holds every int8 exactly. Beyond four answers at once bf16 is the faster choice.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale = (weight.abs().amax(dim=1).clamp_min(1e-12) / 127).bfloat16()  # rounded first: it costs no precision
        self._weight = (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
        self._scale, self._bias = scale, bias

    def __call__(self, x: Tensor, prompt: int) -> Tensor:
        if prompt == 0:
            out = torch._weight_int8pack_mm(x, self._weight, self._scale)
        elif prompt == x.shape[0]:
            out = self._wide(x)
        else:
            out = torch.cat([self._wide(x[:prompt]), torch._weight_int8pack_mm(x[prompt:], self._weight, self._scale)])
        return out if self._bias is None else out.add_(self._bias)

    def _wide(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight.bfloat16()).mul_(self._scale)
