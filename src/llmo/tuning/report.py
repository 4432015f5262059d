"""What came of a search: figures as JSON, pictures as PNG, and one HTML page that holds all of it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmo.files import publish, publish_json
from llmo.jobspecs import TuneJobSpec
from llmo.searchspec import nested
from llmo.tuning import plots, space
from llmo.tuning.importance import importance
from llmo.tuning.search import Search, record
from llmo.tuning.space import Dimension

FILE, PAGE = "report.json", "report.html"
TITLES = {
    "history.png": "What was reached when",
    "importance.png": "Which keys mattered",
    "front.png": "Quality against cost",
}


def gather(request: TuneJobSpec, dimensions: Sequence[Dimension], search: Search, seconds: float) -> dict[str, Any]:
    """The report as plain values. Raises the first trial's own error when none came to an end."""
    best = search.best()
    trials = [record(trial) for trial in search.trials]
    states = [trial["state"] for trial in trials]
    return {
        "kind": "search",
        "task": request.task.name,
        "metric": search.said("metric"),
        "higher_is_better": search.higher_is_better,
        "objectives": list(request.objectives),
        "sampler": request.sampler,
        "pruner": request.prunes,
        "folds": request.folds,
        "budget": request.budget,
        "space": [{"key": one.key, "choice": one.text(), "why": one.why} for one in dimensions],
        "best": record(best),
        "settings": nested(best.settings),
        "front": [trial.number for trial in search.front()] if len(request.objectives) > 1 else [],
        "counts": {state: states.count(state) for state in ("done", "pruned", "failed", "stopped")},
        "steps": sum(int(trial["steps"] or 0) for trial in trials),
        "seconds": seconds,
        "importance": importance(trials, dimensions, higher_is_better=search.higher_is_better),
        "trials": trials,
    }


def write(out: Path, found: Mapping[str, Any]) -> None:
    """`report.json`, the pictures, and `report.html`. Raises StorageError."""
    pictures = plots.drawn(found)
    for name, picture in pictures.items():
        publish(out / name, picture)
    publish(out / PAGE, page(found, pictures))
    publish_json(out / FILE, dict(found))


def page(found: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """One page that needs nothing beside it."""
    best, counts = found["best"], found["counts"]
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lead = f"{found['metric']} {best['value']:.4f} on dev: {space.words(best['settings'])}"
    keys = list(best["settings"])
    rows = [[*_cells(trial, found), *(_value(trial["settings"].get(key)) for key in keys)] for trial in _sorted(found)]
    shown = "".join(
        f'<h2>{TITLES[name]}</h2><img alt="{TITLES[name]}" src="data:image/png;base64,'
        f'{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    )
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Search</title><style>',
            "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em}",
            "table{border-collapse:collapse}td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}",
            "th{color:#6b7280;font-weight:normal}img{max-width:100%}</style></head><body>",
            f"<h1>Search: {html.escape(found['task'])}</h1><p><b>{html.escape(lead)}</b></p>",
            f"<p>{html.escape(summary)}; {found['steps']} steps, {found['seconds']:.0f} s; "
            f"sampler {found['sampler']}, pruner {found['pruner']}</p>",
            shown,
            "<h2>Trials</h2>" + _table(["trial", "state", found["metric"], "steps", "seconds", *keys], rows),
            "<h2>Space</h2>" + _table(["key", "values", "why"], [list(one.values()) for one in found["space"]]),
            "</body></html>\n",
        ]
    )


def _sorted(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those that came to an end first, the best on top."""
    sign = -1.0 if found["higher_is_better"] else 1.0
    return sorted(found["trials"], key=lambda t: (t["state"] != "done", sign * (t["value"] or 0.0), t["number"]))


def _cells(trial: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    mark = " (on the front)" if trial["number"] in found["front"] else ""
    state = trial["state"] + (f": {trial['reason']}" if trial["reason"] else "") + mark
    return [str(trial["number"]), state, _value(trial["value"]), _value(trial["steps"]), _value(trial["seconds"])]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"
