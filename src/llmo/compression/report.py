"""What came of a search among variants: its table, the Pareto front, and one HTML page with a picture of it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from llmo.compression.choice import Table
from llmo.files import publish, publish_json
from llmo.training import page, pictures
from llmo.training.report import FILE, FOLDER, PAGE

PICTURE = "front.png"
LABELS = (5, -12, 17, -24)  # points above a mark, so that neighbours do not hide each other
HEADS = ("variant", "bits", "MB", "memory, MiB", "speed", "one text or answer", "value", "drop", "agreement", "verdict")


def front(table: Table) -> list[str]:
    """The variants that no other one beats in speed, loss and size at once; those that were not timed are on none."""
    timed = [row for row in table if "speedup" in row]

    def beaten(row: Mapping[str, Any]) -> bool:
        mine = _costs(row)
        return any(
            all(a <= b for a, b in zip(_costs(other), mine, strict=True)) and _costs(other) != mine for other in timed
        )

    return [row["name"] for row in timed if not beaten(row)]


def write(out: Path, title: str, found: Mapping[str, Any]) -> None:
    """`report/` in a model folder: `report.json`, `report.html`, and the picture where matplotlib is installed. Raises
    StorageError when the disk does not take them."""
    folder = out / FOLDER
    folder.mkdir()
    drawn = {PICTURE: _picture(found)} if pictures.possible() else {}
    for name, data in drawn.items():
        publish(folder / name, data)
    rows = [_cells(row, row["name"] in found["front"]) for row in found["variants"]]
    parts = [
        f"<p>{escape(found['why'])}</p>",
        f"<p>Measured on {found['texts']} rows of dev, with {found['hardware']['cores']} cores of "
        f"{escape(found['hardware']['processor'] or 'this machine')}.</p>",
        *(page.picture("Speed and loss", data) for data in drawn.values()),
        "<h2>Variants</h2>" + page.table(HEADS, rows),
        "<p>* no other one is better in speed, loss and size at once</p>",
    ]
    publish(folder / PAGE, page.document(title, parts))
    publish_json(folder / FILE, {"kind": "compression", "title": title, "pictures": sorted(drawn), **found})


def _costs(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return -row["speedup"], row["drop"], row["size_bytes"]


def _cells(row: Mapping[str, Any], on_front: bool) -> list[str]:
    def said(name: str, shape: str, per: float = 1.0) -> str:
        return format(row[name] / per, shape) if row.get(name) is not None else "-"

    return [
        row["name"] + (" *" if on_front else ""),
        said("bits", ".1f"),
        said("size_bytes", ".1f", 1e6),
        said("rss_bytes", ".0f", 1 << 20),
        said("speedup", ".2f"),
        said("speedup_alone", ".2f"),
        said("value", ".4f"),
        said("drop", "+.4f"),
        said("agreement", ".4f"),
        row["verdict"],
    ]


def _picture(found: Mapping[str, Any]) -> bytes:
    figure, axes = pictures.canvas(8.0, 4.5)
    timed = sorted((row for row in found["variants"] if "speedup" in row), key=lambda row: float(row["speedup"]))
    for number, row in enumerate(timed):
        colour = "#2563eb" if row["name"] in found["front"] else "#9ca3af"
        if row["verdict"] == "chosen":
            colour = "#dc2626"
        place = row["speedup"], row["drop"]
        if "drop_high" in row:
            axes.vlines(place[0], row["drop_low"], row["drop_high"], color=colour, linewidth=1)
        axes.scatter(*place, s=20 + row["size_bytes"] / 1e6, color=colour, zorder=2)
        beside = (6, LABELS[number % len(LABELS)])
        axes.annotate(row["name"], place, textcoords="offset points", xytext=beside, fontsize=8)
    axes.axhline(found["max_drop"], color="grey", linestyle="--", linewidth=1)
    axes.margins(x=0.12, y=0.15)
    axes.set(xlabel="times the original's speed", ylabel=f"loss of {found['metric']} on dev, with its 95% interval")
    return pictures.png(figure)
