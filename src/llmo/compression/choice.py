"""Which variant is taken: the best for its target within the quality budget, with a verdict for each and the reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from llmo.errors import GateRefused

Table = list[dict[str, Any]]
Target = Literal["throughput", "latency", "size", "memory"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What must be kept and what is sought: a choice loses at most `max_drop` of `metric` and takes at most
    `max_bytes`. Nothing further is tried after `ends` (monotonic clock)."""

    metric: str
    max_drop: float
    target: Target = "throughput"
    max_bytes: float | None = None
    ends: float = math.inf


# By which figure of a row each target is reached, whether more is better, and what a variant that gains nothing is.
_TARGETS: dict[str, tuple[str, bool, str]] = {
    "throughput": ("speedup", True, "no faster than the original"),
    "latency": ("speedup_alone", True, "no faster than the original"),
    "size": ("size_bytes", False, "no smaller than the original"),
    "memory": ("rss_bytes", False, "no smaller than the original"),
}
_BEST = {"throughput": "fastest", "latency": "fastest", "size": "smallest", "memory": "smallest in memory"}


def choose(table: Table, limits: Limits) -> str | None:
    """The variant that is best for the target within the limits, and better than the reference, the first row.

    Writes each row's `verdict` but where one stands already, for a variant that cannot run; returns the chosen name,
    or None.
    """
    reference, *variants = table
    reference["verdict"] = "reference"
    key, more, useless = _TARGETS[limits.target]
    within = f"within the limit, but {'slower' if more else 'larger'} than the chosen"
    for row in variants:
        if row["verdict"]:
            continue
        if row["drop"] > limits.max_drop + 1e-9:
            row["verdict"] = "drops too much"
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
    )


def _doubt(row: dict[str, Any], max_drop: float) -> str:
    """What the number of texts leaves open."""
    if "drop_high" not in row or row["drop_high"] <= max_drop:
        return ""
    return f"; of so few texts the loss is known to {row['drop_high']:.4f} at most (95% interval)"


def _figures(row: dict[str, Any]) -> str:
    if "speedup" in row:
        return f" (drop {row['drop']:.4f}, {row['speedup']:.2f} times the speed)"
    return f" (drop {row['drop']:.4f})" if "drop" in row else ""


def refusal(why: str, table: Table) -> GateRefused:
    dropped = any(row["verdict"] == "drops too much" for row in table)
    large = any(row["verdict"] == "too large" for row in table)
    return GateRefused(
        why,
        hint=("allow a larger loss (compress.max_drop), or " if dropped else "")
        + ("allow more room (compress.max_mb), or " if large else "")
        + "leave out the section `compress` to deploy the original",
        variants=table,
    )
