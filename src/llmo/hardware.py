"""What processor this is: its model and those of its instructions that an engine or a trainer chooses by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FEATURES = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True, slots=True)
class Processor:
    """`features` in the order of `FEATURES`; both are empty where the system does not tell."""

    model: str
    features: tuple[str, ...]


@lru_cache(maxsize=8)
def processor(root: Path = Path("/")) -> Processor:
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Processor("", ())
    model, flags = "", set[str]()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = model or value.strip()
        elif key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return Processor(model, tuple(feature for feature in FEATURES if feature in flags))


def described(cores: int) -> dict[str, Any]:
    """What measurements depend on, as a card or a cache keeps it."""
    found = processor()
    return {"processor": found.model, "features": list(found.features), "cores": cores}


def missing(measured: Mapping[str, Any]) -> list[str]:
    """Those of the instructions a description names that this processor lacks."""
    return [feature for feature in measured.get("features", ()) if feature not in processor().features]
