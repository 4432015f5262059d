"""What `llmo export` may be asked for: which models go to which target, and where; before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo.errors import ModelError
from llmo.files import vacant
from llmo.jobspecs import ExportSpec
from llmo.specfile import validate
from llmo.specs import BASE_TASKS
from llmo.types import Artifact

EDGE_TASKS = ("text-classification", "token-classification", "extractive-qa", "regression", "sentence-embedding")


def order(model: Artifact, out: Path, asked: Mapping[str, Any], original: str | None) -> dict[str, Any]:
    """The specification of the operation `export`. `asked` are `target`, `precision` and `max_mb`; `original` is the
    ref of the model that this one was compressed from, if it was and is there.

    Raises SpecError for a value that is none, ModelError for a model that the target does not take, and InputError for
    a place where no new folder can be.
    """
    place = Path(out).expanduser().absolute()
    named = {"model": model.ref, "digest": model.digest, "original": original or model.ref}
    spec = validate({**asked, "out": str(place), **named}, ExportSpec)
    _check(model, spec.target)
    vacant(place)
    return spec.plain()


def _check(model: Artifact, target: str) -> None:
    task = model.card.get("task", {}).get("task")
    if "engine" not in model.card or task in BASE_TASKS:
        raise ModelError(
            f"{model.ref} answers nothing: it is a base for other tasks",
            hint=f"train one on it: llmo train --model {model.ref}, and export that",
        )
    if task == "generation":
        raise ModelError(
            f"{model.ref} writes text, and an export is for models that answer in one pass",
            hint=f"serve it: llmo deploy {model.ref}",
        )
    if target == "edge" and task not in EDGE_TASKS:
        raise ModelError(
            f"the runner of an edge bundle does not know the task {task}",
            hint=f"it knows {', '.join(EDGE_TASKS)}; --target onnx writes the graph alone",
        )
