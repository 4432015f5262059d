"""Draws what a report shows: the confusion matrix and the reliability diagram, as PNG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

NAMED = 40  # classes that a matrix names
COUNTED = 20  # classes up to which it says its numbers
LONGEST = 24  # characters of a name
MISSING = "the report has no pictures, for matplotlib is not installed: pip install 'llmo-os[report]'"


def possible() -> bool:
    """Whether there is something to draw with."""
    return find_spec("matplotlib") is not None


def draw(report: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures of a report by file name; without matplotlib none, as `possible` says before."""
    if not possible():
        return {}
    found = {}
    if "confusion" in report["details"]:
        found["confusion.png"] = _confusion(report["details"]["labels"], report["details"]["confusion"])
    if report["calibration"]:
        found["reliability.png"] = _reliability(report["calibration"])
    return found


def _confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> bytes:
    """Rows are what is right, shaded by share of the row; columns what was answered."""
    matrix = np.array(counts, float)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(14.0, 3.0 + 0.45 * len(labels))
    figure, axes = canvas(side, side)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= NAMED:
        names = [_drawable(label, number) for number, label in enumerate(labels, 1)]
        axes.set_xticks(range(len(labels)), names, rotation=90)
        axes.set_yticks(range(len(labels)), names)
    if len(labels) <= COUNTED:
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("answered")
    axes.set_ylabel("right")
    return png(figure)


def _reliability(calibration: Mapping[str, Any]) -> bytes:
    """Of each bin of confidence how often it was right; on the diagonal, probabilities mean what they say."""
    bins = calibration["bins"]
    figure, axes = canvas(4.5, 4.0)
    middles = [(b["low"] + b["high"]) / 2 for b in bins]
    axes.bar(middles, [b["accuracy"] for b in bins], width=0.09, color="#4c78a8", label="right")
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o", color="#f58518", markersize=4)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share that was right")
    axes.set_title(f"ECE {calibration['ece']:.3f}, Brier {calibration['brier']:.3f}", fontsize=10)
    return png(figure)


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, of so many inches."""
    from matplotlib.figure import Figure  # a second to import; without pyplot nothing is global

    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    return figure, figure.add_subplot()


def _drawable(label: str, number: int) -> str:
    """The label, shortened; its number where the font lacks a character of it (the page lists the names in order)."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    if any(font.get_char_index(ord(character)) == 0 for character in label):
        return str(number)
    escaped = label.replace("$", r"\$")
    return escaped if len(escaped) <= LONGEST else escaped[: LONGEST - 1] + "…"


def png(figure: Any) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a layout that cannot be perfect is drawn all the same
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
