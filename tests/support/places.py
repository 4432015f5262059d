"""Where the tests compute: the CPU, or the GPU where LLMO_TEST_DEVICE=cuda says so."""

from __future__ import annotations

import os

from llmo.types import Device

KIND = os.environ.get("LLMO_TEST_DEVICE", "cpu")
ON_GPU = KIND == "cuda"


def place(cores: int = 1) -> Device:
    """The device under test with so many cores. Of a GPU it is the first one, and says no size."""
    return Device("cuda:0" if ON_GPU else "cpu", KIND, memory=0, free=0, cores=cores)
