"""What is told of a measured model beyond its metrics, as a folder: report.json, its pictures, and one page of HTML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo.files import publish, publish_json
from llmo.tasks.base import Task
from llmo.training import page, pictures
from llmo.training.figures import Measured

FOLDER = "report"  # beside a trained model
FILE, PAGE = "report.json", "report.html"
FORMAT = 2


def made(task: Task, metric: str, split: str, measured: Measured, **more: Any) -> dict[str, Any]:
    """The report as JSON values; `more` is what only the caller knows (speed, memory, what was before)."""
    return {
        "format": FORMAT,
        "task": task.name,
        "metric": metric,
        "split": split,
        "rows": measured.rows,
        "truncated_share": measured.truncated / max(1, measured.rows),
        "metrics": measured.metrics,
        "per_class": _per_class(measured),
        "details": measured.details,
        "calibration": measured.findings.get("calibration"),
        "worst": measured.findings.get("worst", []),
        **more,
    }


def write(folder: Path, title: str, report: Mapping[str, Any]) -> None:
    """Write the folder's three kinds of files. Raises StorageError when the disk does not take them."""
    folder.mkdir(exist_ok=True)
    drawn = pictures.draw(report)
    for name, data in drawn.items():
        publish(folder / name, data)
    publish(folder / PAGE, page.render(title, report, drawn))
    publish_json(folder / FILE, {**report, "title": title, "pictures": sorted(drawn)})


def _per_class(measured: Measured) -> list[dict[str, Any]]:
    """`[{"name", "f1", "precision", "recall", "gold", "answered"}]` of a task with classes; `f1` with its interval."""
    return [
        {
            "name": name,
            "f1": measured.metrics[f"f1/{name}"],
            "precision": counts["right"] / counts["answered"] if counts["answered"] else None,
            "recall": counts["right"] / counts["gold"] if counts["gold"] else None,
            "gold": counts["gold"],
            "answered": counts["answered"],
        }
        for name, counts in _counts(measured.details).items()
        if f"f1/{name}" in measured.metrics
    ]


def _counts(details: Mapping[str, Any]) -> Mapping[str, Mapping[str, int]]:
    """Of each class how often it was right, answered and gold, from what tasks say in their `details`."""
    if "confusion" not in details:
        found: Mapping[str, Mapping[str, int]] = details.get("per_label") or details.get("per_type") or {}
        return found
    matrix = details["confusion"]
    columns = [sum(column) for column in zip(*matrix, strict=True)]
    return {
        label: {"right": matrix[i][i], "answered": columns[i], "gold": sum(matrix[i])}
        for i, label in enumerate(details["labels"])
    }
