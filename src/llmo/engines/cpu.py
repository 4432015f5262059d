"""What the processor can do: which of its instructions compute products of a precision, and the refusal where none."""

from __future__ import annotations

from pathlib import Path

from llmo.errors import EnvironmentProblem
from llmo.hardware import processor

# By precision, the best first. What is not here computes all the same, but slower than fp32.
NATIVE = {
    "fp32": ("avx512f", "avx2", "asimddp"),
    "bf16": ("amx_bf16", "avx512_bf16", "bf16"),
    "int8": ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"),
}


def instructions(precision: str, root: Path = Path("/")) -> str:
    """The best instructions for products of this precision; empty where the processor names none."""
    there = processor(root).features
    return next((name for name in NATIVE[precision] if name in there), "")


def require_instructions(engine: str, precision: str, root: Path = Path("/")) -> None:
    """Raises EnvironmentProblem where the processor computes such products only in a roundabout, slower way."""
    if precision != "fp32" and not instructions(precision, root):
        raise EnvironmentProblem(
            f"the {engine} engine was asked for {precision}, and this processor names no instructions for it "
            f"({', '.join(NATIVE[precision])})",
            hint="run it at fp32, or compress the model on this machine, where its variants are measured",
        )
