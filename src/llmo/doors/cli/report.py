"""`llmo report`, and how a report looks in a terminal: metrics, classes, calibration, the worst errors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Annotated, Any

import typer

from llmo.doors import flow
from llmo.doors.cli.outfile import place
from llmo.doors.cli.show import Json, console, emit, figure, seconds, shorten, size, table
from llmo.doors.cli.trials import show_search
from llmo.doors.cli.variants import show_variants
from llmo.errors import InputError
from llmo.files import publish

CLASSES, WORST = 20, 3  # shown at most; the page has all


def register(app: typer.Typer) -> None:
    app.command()(report)


def report(
    ref: Annotated[str, typer.Argument(help="A trained model, or a stored report of `llmo evaluate` or `tune`.")],
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write it as one page here.")] = None,
    as_json: Json = False,
) -> None:
    """Show what was measured of a model: by class, how sure it was, and its worst errors.

    Example: llmo report newsdesk --html report.html
    """
    file = place(html) if html is not None else None
    with closing(flow.connect()) as api:
        found = api.report(ref)
        if file is not None:
            publish(file, api.report_page(ref))
    emit(found, as_json, lambda: _show_any(found, ref, "" if file is not None else ref))


def _show_any(found: Mapping[str, Any], ref: str, kept: str) -> None:
    """Searches, plans of `train --explain` and verifications are reports in the store too."""
    if found.get("kind") == "search":
        show_search(found)
    elif found.get("kind") == "compression":
        show_variants(found)
    elif "choices" in found:
        show_choices(found)
    elif "per_class" in found:
        show(found, ref, kept)
    else:
        raise InputError(f"{ref} is no report of a model or a search", hint=f"read it with: llmo report {ref} --json")


def show(found: Mapping[str, Any], ref: str, kept: str) -> None:
    """What `api.report` gives of the model `ref`; `kept` is what it can be asked for by, empty where nobody need."""
    before = found.get("before") or {}
    rows = [
        (name.replace("_", " "), *([figure(before[name]) if name in before else "-"] if before else []), figure(value))
        for name, value in found["metrics"].items()
        if "/" not in name
    ]
    heads = ["before training>", "after training>"] if before else ["value (95% interval)>"]
    table(f"{ref} on {found['rows']} held-out rows ({found['split']})", ["", *heads], rows)
    _classes(found)
    _worst(found)
    for line in (calibrated(found.get("calibration")), run_of(found.get("speed", {}), found.get("memory", {}))):
        if line:
            console.print(line, markup=False, soft_wrap=True)
    if kept:
        console.print(f"[dim]all of it: llmo report {kept} --html report.html[/]", soft_wrap=True)


def show_choices(found: Mapping[str, Any]) -> None:
    """What the operation `explain` found."""
    rows = [
        (
            one["what"],
            one["choice"],
            f"{one['gain']:.2f}x {one['against']}{'' if one['measured'] else ' (counted)'}" if one["gain"] else "",
            one["why"],
        )
        for one in found["choices"]
    ]
    table("how it would be trained", ["", "choice", "speed, to", "why"], rows)
    console.print(f"\n{found['steps']} steps, about {seconds(found['seconds'])}", soft_wrap=True)


def calibrated(calibration: Mapping[str, Any] | None) -> str:
    if not calibration:
        return ""
    return f"calibration: expected error {calibration['ece']:.3f}, Brier score {calibration['brier']:.3f}"


def run_of(speed: Mapping[str, float], memory: Mapping[str, int]) -> str:
    """Speed and memory as one line."""
    told = [f"{speed['samples_per_second']:.1f} rows/s"] if "samples_per_second" in speed else []
    if "peak_bytes" in memory:
        thought = f" (forecast {size(memory['forecast_bytes'])})" if "forecast_bytes" in memory else ""
        told.append(f"peak memory {size(memory['peak_bytes'])}{thought}")
    return "; ".join(told)


def _classes(found: Mapping[str, Any]) -> None:
    classes = found["per_class"]
    if not classes:
        return
    rows = [
        (c["name"], c["gold"], c["answered"], _share(c["precision"]), _share(c["recall"]), figure(c["f1"]))
        for c in sorted(classes, key=lambda c: c["f1"]["value"])[:CLASSES]
    ]
    left = f" (the {CLASSES} hardest of {len(classes)})" if len(classes) > CLASSES else ""
    table(f"\nby class{left}", ["class", "gold>", "answered>", "precision>", "recall>", "F1>"], rows)


def _worst(found: Mapping[str, Any]) -> None:
    rows = [
        (
            row["id"],
            f"{row['loss']:.2f}",
            shorten(row["gold"], 30),
            shorten(row["answer"], 30),
            shorten(row["text"], 60),
        )
        for row in found["worst"][:WORST]
    ]
    if rows:
        table("\nworst errors: the rows of the highest loss", ["row", "loss>", "gold", "answer", "text"], rows)
        console.print()


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
