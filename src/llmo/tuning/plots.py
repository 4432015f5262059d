"""The pictures of a search as PNG bytes: what was reached when, which keys mattered, and the Pareto front."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmo.searchspec import COSTS

WIDTH, HEIGHT, DPI = 7.0, 3.6, 110
BLUE, GREY, RED = "#2563eb", "#9ca3af", "#dc2626"
COST_LABELS = {"seconds": "seconds of training", "memory": "peak memory, MiB", "latency": "milliseconds a text"}


def drawn(found: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> picture, of a report as `report.gather` makes it; those that would show nothing are left out."""
    made = {"history.png": _history(found)}
    if found["importance"]:
        made["importance.png"] = _importance(found)
    if len(found["objectives"]) > 1:
        made["front.png"] = _front(found)
    return made


def _history(found: Mapping[str, Any]) -> bytes:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    better = max if found["higher_is_better"] else min
    done = [(trial["number"], trial["value"]) for trial in found["trials"] if trial["state"] == "done"]
    pruned = [(t["number"], t["value"]) for t in found["trials"] if t["state"] == "pruned" and t["value"] is not None]
    if pruned:
        axes.scatter(*zip(*pruned, strict=True), color=GREY, marker="x", label="ended early")
    axes.scatter(*zip(*done, strict=True), color=BLUE, label="to the end")
    best, line = done[0][1], []
    for number, value in done:
        best = better(best, value)
        line.append((number, best))
    line.append((len(found["trials"]) - 1, best))
    axes.step(*zip(*line, strict=True), where="post", color=RED, label="best so far")
    axes.set(xlabel="trial", ylabel=f"{found['metric']} on dev")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return _png(figure)


def _importance(found: Mapping[str, Any]) -> bytes:
    shares = list(found["importance"].items())[::-1]
    figure = Figure(figsize=(WIDTH, max(1.6, 0.45 * len(shares) + 0.9)), layout="constrained")
    axes = figure.subplots()
    axes.barh([key for key, _ in shares], [share for _, share in shares], color=BLUE)
    axes.set(xlabel="share of what decides between good and best", xlim=(0, 1))
    return _png(figure)


def _front(found: Mapping[str, Any]) -> bytes:
    costs = [name for name in found["objectives"] if name != "quality"]
    figure = Figure(figsize=(WIDTH, HEIGHT * len(costs)), layout="constrained")
    done = [trial for trial in found["trials"] if trial["state"] == "done"]
    for axes, name in zip(figure.subplots(len(costs), squeeze=False)[:, 0], costs, strict=True):
        for on_front, colour, words in ((False, GREY, "beaten"), (True, RED, "on the front")):
            some = [t for t in done if (t["number"] in found["front"]) is on_front]
            axes.scatter([_cost(t, name) for t in some], [t["value"] for t in some], color=colour, label=words)
            for trial in some if on_front else []:
                at = (_cost(trial, name), trial["value"])
                axes.annotate(str(trial["number"]), at, textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel=COST_LABELS[name], ylabel=f"{found['metric']} on dev")
        axes.legend(frameon=False)
    return _png(figure)


def _cost(trial: Mapping[str, Any], name: str) -> float:
    value = trial[COSTS[name]] or 0.0
    return float(value) / (1 << 20) if name == "memory" else float(value)


def _png(figure: Figure) -> bytes:
    into = io.BytesIO()
    figure.savefig(into, format="png", dpi=DPI)
    return into.getvalue()
