"""A torch encoder at the precision that its card names: fp32 as it was saved, or bf16, weights and activations alike.

int8 is refused. What torch has for it on a CPU is torchao (0.18, with torch 2.13): MiniLM on two cores answers one text
at 0.4 of fp32's speed and 0.3 of bf16's, and 32 at fp32's and 0.4 of bf16's. Compiled for a minute, with a C++ compiler
at hand, one text is still slower than at fp32. `benchmarks/engine_encoder.py` measures it where it is installed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmo.engines.cpu import instructions, require_instructions
from llmo.errors import EnvironmentProblem, ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIRST_NATIVE = (8, 0)  # the generation of GPUs that computes bf16 in its tensor cores


def check(precision: str, device: torch.device, folder: Path) -> None:
    """Raises ModelError for a precision that the torch engine does not run, and EnvironmentProblem for one that the
    device does not compute natively."""
    if precision not in DTYPES:
        why = " (torchao's is slower than bf16 on a CPU, and no faster than fp32)" if precision == "int8" else ""
        raise ModelError(
            f"the torch engine runs fp32 and bf16, not {precision}{why}",
            hint="for int8 take the onnx or the openvino engine: `llmo compress` measures them",
            where=str(folder),
        )
    if precision != "bf16":
        return
    if device.type == "cpu":
        require_instructions("torch", precision)
    elif torch.cuda.get_device_capability(device) < _FIRST_NATIVE:
        raise EnvironmentProblem("this GPU does not compute bf16 natively", hint="run the model at fp32")


def lower(model: Any, precision: str) -> Any:
    """The model with all its weights, its head's too, at this precision; activations follow them."""
    return model.to(DTYPES[precision])


def kernels(model: Any) -> Counter[str]:
    """How many linear layers there are by the precision of their weights, in torch's words."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return Counter(f"linear {str(layer.weight.dtype).removeprefix('torch.')}" for layer in layers)


def precision_of(model: Any) -> str:
    """What most weights are; activations are the same."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return _NAMES[sizes.most_common(1)[0][0]]


def instructions_of(precision: str, device: torch.device) -> str:
    return instructions(precision) if device.type == "cpu" else torch.cuda.get_device_name(device)
