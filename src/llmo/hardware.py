"""What processor this is: its model and those of its instructions that an engine or a trainer chooses by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FEATURES = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
GENERATION = ("cpu family", "model", "CPU part")  # lines of /proc/cpuinfo


@dataclass(frozen=True, slots=True)
class Processor:
    """`model` with the numbers that tell its generation, since a virtual one may be named `AMD EPYC` and no more;
    `features` in the order of `FEATURES`. Both are empty where the system does not tell."""

    model: str
    features: tuple[str, ...]


@lru_cache(maxsize=8)
def processor(root: Path = Path("/")) -> Processor:
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Processor("", ())
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    numbers = [f"{key.removeprefix('cpu ')} {told[key]}" for key in GENERATION if key in told]
    model = ", ".join([*filter(None, [told.get("model name")]), *numbers])
    flags = (told.get("flags", "") + " " + told.get("Features", "")).split()
    return Processor(model, tuple(feature for feature in FEATURES if feature in flags))


def sums_bytes(features: Iterable[str]) -> bool:
    """Whether sums of products of bytes have 32 bits there; those of x86 without VNNI have 16, and overflow."""
    there = set(features)
    return "avx2" not in there or bool({"avx512_vnni", "avx_vnni", "amx_int8"} & there)


def described(cores: int) -> dict[str, Any]:
    """What measurements depend on, as a card or a cache keeps it."""
    found = processor()
    return {"processor": found.model, "features": list(found.features), "cores": cores}
