"""What the machine's cores can compute at most, measured: what engines and endpoints are compared with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import c_double, c_float
from functools import lru_cache

from llmo.engines.native.build import opened

KINDS = ("fp32", "bf16", "int8")
_SECONDS = 0.2


@lru_cache(maxsize=8)
def measure(threads: int) -> dict[str, float]:
    """Operations a second of that many cores together, two for each product that is added, by precision; a kind that
    the processor has no instructions for is as fast as fp32. Raises EnvironmentProblem where nothing compiles."""
    kernels = opened("peak.cpp", "llmo_peak_size", ())
    found = {}
    with ThreadPoolExecutor(threads) as pool:
        for kind in KINDS:
            run = kernels[f"llmo_peak_{kind}"]
            run.restype, run.argtypes = c_double, [c_double, c_float, c_float]
            found[kind] = sum(pool.map(lambda _: run(_SECONDS, 1.0, 3.0), range(threads)))  # noqa: B023 (used at once)
    return {kind: rate or found["fp32"] for kind, rate in found.items()}
