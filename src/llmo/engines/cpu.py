"""What the processor can do: which of its instructions compute products of a precision, and the refusal where none."""

from __future__ import annotations

from pathlib import Path

from llmo.errors import EnvironmentProblem

CPUINFO = Path("/proc/cpuinfo")
# By precision, the best first. What is not here computes all the same, but slower than fp32.
NATIVE = {
    "fp32": ("avx512f", "avx2", "asimd"),
    "bf16": ("amx_bf16", "avx512_bf16", "bf16"),
    "int8": ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"),
}


def features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The names that the kernel gives the processor's instructions; empty where it does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(told.partition(":")[2].split())


def instructions(precision: str, cpuinfo: Path = CPUINFO) -> str:
    """The best instructions for products of this precision; empty where the processor names none."""
    there = features(cpuinfo)
    return next((name for name in NATIVE[precision] if name in there), "")


def require_instructions(engine: str, precision: str, cpuinfo: Path = CPUINFO) -> None:
    """Raises EnvironmentProblem where the processor computes such products only in a roundabout, slower way."""
    if not instructions(precision, cpuinfo):
        raise EnvironmentProblem(
            f"the {engine} engine was asked for {precision}, and this processor names no instructions for it "
            f"({', '.join(NATIVE[precision])})",
            hint="run it at fp32, or compress the model on this machine, where its variants are measured",
        )
