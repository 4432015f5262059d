"""The measured peak is a peak: no kind is slower than fp32, and nothing that is computed beats it."""

from __future__ import annotations

import numpy as np

from llmo.engines.native import peak


def test_every_kind_is_measured_and_none_is_slower_than_fp32() -> None:
    found = peak.measure(1)
    assert list(found) == ["fp32", "bf16", "int8"]
    assert found["fp32"] > 1e8
    assert min(found.values()) >= 0.5 * found["fp32"]


def test_the_work_is_not_left_out() -> None:
    """A compiler that saw through the loop would make it faster than any core is: 64 lanes, two at a time, at 8 GHz."""
    assert max(peak.measure(1).values()) < 2 * 64 * 4 * 8e9
    assert all(np.isfinite(rate) for rate in peak.measure(1).values())
