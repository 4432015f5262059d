"""The evidence a model folder carries: what the training graph said of some texts before the model was saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmo.errors import ModelError
from llmo.tasks.base import Logits
from llmo.tasks.card import GOLDEN, read_golden
from llmo.types import Asked


@dataclass(frozen=True, slots=True)
class Golden:
    """One entry a text in each list."""

    texts: list[Asked]
    input_ids: list[list[int]]
    logits: list[Logits]


def read(folder: Path) -> Golden:
    """Raises ModelError when there is no evidence, or when it cannot be read."""
    where, hint = str(folder / GOLDEN), "train the model again"
    try:
        items = read_golden(folder)
        golden = Golden(
            [item["text"] for item in items],
            [[int(token) for token in item["input_ids"]] for item in items],
            [np.asarray(item["logits"], dtype=np.float32) for item in items],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the golden evidence cannot be read: {error!r}", where=where, hint=hint) from error
    if not golden.texts:
        raise ModelError("the golden evidence is empty, so nothing can be verified", where=where, hint=hint)
    return golden
