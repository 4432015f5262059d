"""Which variant is taken: the best for its target within the quality budget, with a verdict for each and the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmo.errors import GateRefused

Table = list[dict[str, Any]]
Target = Literal["throughput", "latency", "size", "memory"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What must be kept and what is sought: a choice loses at most `max_drop` of `metric` (`loss`) and takes at most
    `max_bytes`. `shapes` says whether smaller shapes of the model are tried; nothing further is after `ends` (monotonic
    clock)."""

    metric: str
    max_drop: float
    target: Target = "throughput"
    max_bytes: float | None = None
    shapes: Literal["auto", "none", "all"] = "auto"
    ends: float = math.inf


# By which figure of a row each target is reached, whether more is better, and what a variant that gains nothing is.
_TARGETS: dict[str, tuple[str, bool, str]] = {
    "throughput": ("speedup", True, "no faster than the original"),
    "latency": ("speedup_alone", True, "no faster than the original"),
    "size": ("size_bytes", False, "no smaller than the original"),
    "memory": ("rss_bytes", False, "no smaller than the original"),
}
UNSURE = "may drop too much: too few dev texts to tell"
INTERVAL = 3.92  # standard errors that a 95% interval is wide
ROUNDING = 1e-9
_BEST = {"throughput": "fastest", "latency": "fastest", "size": "smallest", "memory": "smallest in memory"}


def choose(table: Table, limits: Limits) -> str | None:
    """The variant that is best for the target within the limits, and better than the reference, the first row.

    Writes each row's `verdict` but where one stands already, for a variant that cannot run; returns the chosen name,
    or None.
    """
    reference, *variants = table
    reference["verdict"] = "reference"
    key, more, useless = _TARGETS[limits.target]
    most = limits.max_drop + ROUNDING
    within = f"{'slower' if more else 'larger'} than the chosen"
    for row in variants:
        if row["verdict"]:
            continue
        if row["drop"] > most:
            row["verdict"] = "drops too much"
        elif loss(row) > most:
            row["verdict"] = UNSURE
        elif limits.max_bytes is not None and row["size_bytes"] > limits.max_bytes:
            row["verdict"] = "too large"
        elif row[key] <= reference[key] if more else row[key] >= reference[key]:
            row["verdict"] = useless
        else:
            row["verdict"] = within
    allowed = [row for row in variants if row["verdict"] == within]
    if not allowed:
        return None
    best = max(allowed, key=lambda row: float(row[key]) if more else -float(row[key]))
    best["verdict"] = "chosen"
    return str(best["name"])


def loss(row: Mapping[str, Any]) -> float:
    """What a variant is taken to lose: what it lost on dev, where a gain is chance, and the standard error of that (as
    in the one-standard-error rule of Breiman et al. 1984), so that texts it was not chosen on lose no more."""
    error = (row["drop_high"] - row["drop_low"]) / INTERVAL if "drop_high" in row else 0.0
    return float(max(row["drop"], 0.0) + error)


def why(table: Table, chosen: str | None, limits: Limits) -> str:
    metric, max_drop, target = limits.metric, limits.max_drop, limits.target
    room = "" if limits.max_bytes is None else f", {limits.max_bytes / 1e6:g} MB"
    if chosen is None:
        better = _TARGETS[target][2].removeprefix("no ")
        tried = "; ".join(f"{row['name']}: {row['verdict']}{_figures(row)}" for row in table[1:])
        return f"no variant is {better} and within {max_drop:g} of its {metric} on dev{room}: {tried}"
    row = next(row for row in table if row["name"] == chosen)
    lost = f"loses {row['drop']:.4f}" if row["drop"] > 0 else "loses nothing"
    alone = f" ({row['speedup_alone']:.1f} times for one text alone)" if "speedup_alone" in row else ""
    return (
        f"{chosen} is the {_BEST[target]} within the limit: {row['speedup']:.1f} times the original's speed{alone}, "
        f"{100 * row['size_bytes'] / table[0]['size_bytes']:.0f}% of its size, "
        f"and it {lost} of {metric} on dev (limit {max_drop:g}{room}){_doubt(row, max_drop)}"
        f"{_beyond(table, row, limits)}"
    )


def _doubt(row: dict[str, Any], max_drop: float) -> str:
    """What the number of texts leaves open."""
    if "drop_high" not in row or row["drop_high"] <= max_drop:
        return ""
    return f"; of so few texts the loss is known to {row['drop_high']:.4f} at most (95% interval)"


def _beyond(table: Table, chosen: Mapping[str, Any], limits: Limits) -> str:
    """The best one that only too few texts stood against, and what it may lose."""
    key, more, _ = _TARGETS[limits.target]
    sign = 1 if more else -1
    fits = [row for row in table if limits.max_bytes is None or row.get("size_bytes", 0) <= limits.max_bytes]
    unsure = [row for row in fits if row["verdict"] == UNSURE and sign * row[key] > sign * chosen[key]]
    if not unsure:
        return ""
    best = max(unsure, key=lambda row: float(sign * row[key]))
    return (
        f"; {best['name']} ({best['speedup']:.1f} times the speed) may lose {loss(best):.4f}: more dev texts would "
        "settle that, or a larger max_drop"
    )


def _figures(row: dict[str, Any]) -> str:
    if "speedup" in row:
        return f" (drop {row['drop']:.4f}, {row['speedup']:.2f} times the speed)"
    return f" (drop {row['drop']:.4f})" if "drop" in row else ""


def refusal(why: str, table: Table) -> GateRefused:
    dropped = any(row["verdict"] in ("drops too much", UNSURE) for row in table)
    unsure = any(row["verdict"] == UNSURE for row in table)
    large = any(row["verdict"] == "too large" for row in table)
    return GateRefused(
        why,
        hint=("allow a larger loss (compress.max_drop), or " if dropped else "")
        + ("measure on more dev rows (`llmo data import` with a larger `split.dev`), or " if unsure else "")
        + ("allow more room (compress.max_mb), or " if large else "")
        + "leave out the section `compress` to deploy the original",
        variants=table,
    )
