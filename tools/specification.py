"""Writes docs/specification.md from the specification's own models, so that the page cannot lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from llmo.specs import AlsoSpec, CompressSpec, DataSpec, DeploySpec, ProjectSpec, TaskSpec, TrainSpec, TuneSpec

PAGE = Path(__file__).parents[1] / "docs" / "specification.md"
SECTIONS = {
    "": ProjectSpec,
    "task": TaskSpec,
    "data": DataSpec,
    "train": TrainSpec,
    "tune": TuneSpec,
    "also": AlsoSpec,
    "compress": CompressSpec,
    "deploy": DeploySpec,
}
HEAD = """# Specification

Every key of `llmo.yaml`. `llmo check --resolved FILE` prints them with their values and where each came from; an
unknown key is an error with its file, its line and the nearest known key.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for name, model in SECTIONS.items():
        parts.append(
            f"## {name or 'the file'}\n\n{(model.__doc__ or '').strip()}\n\n| key | default | meaning |\n|---|---|---|"
        )
        parts.append("\n".join(_rows(model, "")) + "\n")
    return "\n".join(parts)


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        inner = field.default_factory if isinstance(field.default_factory, type) else None
        if inner is not None and issubclass(inner, BaseModel) and model is not ProjectSpec:
            rows += _rows(inner, f"{prefix}{name}.")
        else:
            rows.append(f"| `{prefix}{name}` | {_default(field.default, inner)} | {field.description} |")
    return rows


def _default(value: Any, inner: type | None) -> str:
    if inner is not None:
        return "none" if inner is list else "see below"
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    return f"`{list(value) if isinstance(value, tuple) else value}`".replace("'", "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
