"""The most memory that this process has held so far, as the operating system counts it."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESIDENT, _HIGHEST = "VmRSS:", "VmHWM:"


def peak(device: torch.device) -> int:
    """Bytes: of the GPU what torch has held there at most, else the process's high-water mark of resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # `ru_maxrss` is of the process's ancestors too, from before they became it.
    return _read(_HIGHEST) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def resident() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    return _read(_RESIDENT)


def _read(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)
