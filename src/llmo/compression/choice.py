"""Which variant is taken: the fastest within the quality budget, with a verdict for each and the reason in words."""

from __future__ import annotations

from typing import Any

from llmo.errors import GateRefused

Table = list[dict[str, Any]]


def choose(table: Table, max_drop: float) -> str | None:
    """The fastest variant that is faster than the reference (the first row) and drops at most `max_drop`.

    Writes each row's `verdict` but where one stands already, for a variant that cannot run; returns the chosen name,
    or None.
    """
    reference, *variants = table
    reference["verdict"] = "reference"
    for row in variants:
        if row["verdict"]:
            continue
        if row["drop"] > max_drop + 1e-9:
            row["verdict"] = "drops too much"
        elif row["speedup"] <= 1.0:
            row["verdict"] = "no faster than the original"
        else:
            row["verdict"] = "within the limit, but slower than the chosen"
    allowed = [row for row in variants if row["verdict"].startswith("within")]
    if not allowed:
        return None
    best = max(allowed, key=lambda row: float(row["speedup"]))
    best["verdict"] = "chosen"
    return str(best["name"])


def why(table: Table, chosen: str | None, metric: str, max_drop: float) -> str:
    if chosen is None:
        tried = "; ".join(f"{row['name']}: {row['verdict']}{_figures(row)}" for row in table[1:])
        return f"no variant is faster than the original and within {max_drop:g} of its {metric} on dev: {tried}"
    row = next(row for row in table if row["name"] == chosen)
    lost = f"loses {row['drop']:.4f}" if row["drop"] > 0 else "loses nothing"
    return (
        f"{chosen} is the fastest within the limit: {row['speedup']:.1f} times the original's speed, "
        f"{100 * row['size_bytes'] / table[0]['size_bytes']:.0f}% of its size, "
        f"and it {lost} of {metric} on dev (limit {max_drop:g})"
    )


def _figures(row: dict[str, Any]) -> str:
    return f" (drop {row['drop']:.4f}, {row['speedup']:.2f} times the speed)" if "drop" in row else ""


def refusal(why: str, table: Table) -> GateRefused:
    dropped = any(row["verdict"] == "drops too much" for row in table)
    return GateRefused(
        why,
        hint=("allow a larger loss (compress.max_drop), or " if dropped else "")
        + "leave out the section `compress` to deploy the original",
        variants=table,
    )
