"""The most memory that this process has held so far, as the operating system counts it."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_STATUS, _HIGHEST = Path("/proc/self/status"), "VmHWM:"


def peak(device: torch.device) -> int:
    """Bytes: of a GPU what torch has held there at most, else the process's high-water mark of resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Where the system has no such file, as containers may hide it; `ru_maxrss` counts what started this process too.
    return _high_water() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _high_water() -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(_HIGHEST)), 0)
