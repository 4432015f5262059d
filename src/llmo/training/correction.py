"""What finished runs of a store say of the forecast: a factor, and how far off it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OWN_RUNS, OWN_SPREAD = 3.0, 0.08  # the forecast's own table counts as so many runs, whose logarithms spread so far
ALIKE, OTHER = 1.0, 0.25  # weight of a run of the same model and method, and of any other
LEAST_ERROR = 0.05
SAME = 0.05  # two models whose sizes differ by less are one: a head is counted here and not there


@dataclass(frozen=True, slots=True)
class Correction:
    """`factor` is to be multiplied with; `error` is the share that 19 of 20 runs are within; `runs` it was made of."""

    factor: float
    error: float
    runs: int


def correct(history: Sequence[Mapping[str, Any]], method: str, parameters: int) -> Correction:
    """`history` are finished runs: `{"forecast_bytes", "peak_bytes", "method", "parameters"}`; what they say of the
    factor's logarithm is averaged with the forecast's own table, which says 0."""
    logs = [math.log(run["peak_bytes"] / run["forecast_bytes"]) for run in history]
    alike = [run["method"] == method and abs(run["parameters"] - parameters) <= SAME * parameters for run in history]
    weights = [ALIKE if same else OTHER for same in alike]
    total = OWN_RUNS + sum(weights)
    mean = sum(weight * log for weight, log in zip(weights, logs, strict=True)) / total
    squares = OWN_RUNS * (OWN_SPREAD**2 + mean**2)
    squares += sum(weight * (log - mean) ** 2 for weight, log in zip(weights, logs, strict=True))
    return Correction(math.exp(mean), max(LEAST_ERROR, 2 * math.sqrt(squares / total)), len(history))
