"""Writes a report as one page of HTML that needs nothing else: no network, no script, its pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; }
th, td { text-align: left; padding: 0.2em 0.9em 0.2em 0; vertical-align: top; border-bottom: 1px solid #eee; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
pre { white-space: pre-wrap; margin: 0; font: inherit; }
"""
PICTURES = {"confusion.png": "Confusion matrix", "reliability.png": "Reliability"}


def render(title: str, report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The whole page; every text of the data is escaped."""
    parts = [
        f"<p>{escape(report['task'])} on {report['rows']} rows of {escape(report['split'])}</p>",
        _metrics(report),
        _per_class(report["per_class"]),
        *(picture(named, pictures[name]) for name, named in PICTURES.items() if name in pictures),
        _numbered(report["details"].get("labels", [])) if "confusion.png" in pictures else "",
        _calibration(report["calibration"]),
        _worst(report["worst"]),
        _run(report),
    ]
    return document(title, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A page with a headline and parts that are HTML already."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"


def picture(title: str, data: bytes) -> str:
    """A PNG within the page, under its title."""
    source = base64.b64encode(data).decode()
    return f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{source}">'


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Every text is escaped; numbers stand to the right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _metrics(report: Mapping[str, Any]) -> str:
    before: Mapping[str, Any] = report.get("before") or {}
    rows = [
        [name.replace("_", " "), *([_interval(before.get(name))] if before else []), _interval(value)]
        for name, value in report["metrics"].items()
        if "/" not in name
    ]
    heads = ["metric", "before training", "after training"] if before else ["metric", "value (95% interval)"]
    return "<h2>Metrics</h2>" + table(heads, rows)


def _per_class(classes: Sequence[Mapping[str, Any]]) -> str:
    if not classes:
        return ""
    rows = [
        [c["name"], c["gold"], c["answered"], _number(c["precision"]), _number(c["recall"]), _interval(c["f1"])]
        for c in classes
    ]
    return "<h2>By class</h2>" + table(["class", "gold", "answered", "precision", "recall", "F1"], rows)


def _numbered(labels: Sequence[str]) -> str:
    return f"<p>In order: {escape(', '.join(f'{number} {label}' for number, label in enumerate(labels, 1)))}</p>"


def _calibration(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    rows = [
        [f"{b['low']:.1f} to {b['high']:.1f}", b["count"], _number(b["confidence"]), _number(b["accuracy"])]
        for b in found["bins"]
    ]
    said = f"<p>Expected calibration error {found['ece']:.3f}, Brier score {found['brier']:.3f}.</p>"
    return "<h2>Calibration</h2>" + said + table(["confidence", "decisions", "mean confidence", "right"], rows)


def _worst(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    answers = any(row["answer"] for row in rows)
    answered = [[row["answer"], _number(row["score"])] if answers else [] for row in rows]
    shown = [
        [row["id"], _number(row["loss"]), row["gold"], *said, row["text"]]
        for row, said in zip(rows, answered, strict=True)
    ]
    heads = ["row", "loss", "gold", *(["answer", "score"] if answers else []), "text"]
    return "<h2>Worst errors: the rows of the highest loss</h2>" + table(heads, shown)


def _run(report: Mapping[str, Any]) -> str:
    figures = {**report.get("speed", {}), **report.get("memory", {})}
    rows = [[name.replace("_", " "), _number(value)] for name, value in figures.items()]
    return "<h2>Run</h2>" + table(["", ""], rows) if rows else ""


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f'<td class="n">{value}</td>'
    return f"<td><pre>{escape(str(value))}</pre></td>"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _interval(metric: Mapping[str, float] | None) -> str:
    return "-" if metric is None else f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"
