"""What a row says is right, in words: for whoever looks at samples and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def told(row: Mapping[str, Any]) -> str:
    """Of a row of any task that answers in one pass, as it is stored, or of a sample on a data set's card."""
    if "answers" in row:
        return str(row["answers"][0]) if row["answers"] else "no answer"
    if row.get("spans") or "entities" in row:
        return ", ".join(f"{label} '{text}'" for label, text in _entities(row))
    for name in ("value", "score"):
        if row.get(name) is not None:
            return f"{row[name]:g}"
    if "pair" in row:
        return "alike"
    if "spans" in row:
        return "none"
    return ", ".join(row["labels"]) if "labels" in row else str(row["label"])


def _entities(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "entities" in row:
        return [(one["label"], one["text"]) for one in row["entities"]]
    return [(span["label"], row["text"][span["start"] : span["end"]]) for span in row["spans"]]
