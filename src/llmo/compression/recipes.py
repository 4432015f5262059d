"""Smaller shapes of an encoder, from the mildest to the strongest, each a model folder that any variant is built of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmo.compression.shapes import distil, vocabulary
from llmo.compression.shapes.distil import Recovery
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.folder import read_config

RECOVERY = Recovery(int8=True)  # all variants but those at fp32 gain from it
VOCABULARY = "vocabulary"  # the recipe that leaves the layers whole


@dataclass(frozen=True, slots=True)
class Recipe:
    """`layers` of the model's and a feed-forward width of `inner`, distilled from the model; None leaves it whole. The
    vocabulary is trimmed to the training texts in any case, for that costs nothing. `saved` are the weights of the
    layers that it has less than the model."""

    name: str
    layers: int | None = None
    inner: int | None = None
    saved: int = 0


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes shapes of one model, each once, in the folder `work`."""

    model: Path
    data: Dataset
    work: Path
    ctx: Context

    def make(self, recipe: Recipe) -> Path:
        """The shape's folder. Raises ModelError for a model that cannot be shaped so, DataError, JobFailed, Stopped."""
        trimmed = self.work / VOCABULARY
        if not trimmed.exists():  # fewer tokens make what follows cheaper, and let the student learn their pieces
            vocabulary.trim(self.model, self.data, trimmed, self.ctx)
        if recipe.layers is None:
            return trimmed
        student, shape = self.work / f"{recipe.name}-student", self.work / recipe.name
        distil.student(trimmed, self.data, student, self.ctx, keep=recipe.layers, inner=recipe.inner)
        distil.recover(student, self.model, self.data, shape, self.ctx, RECOVERY)
        return shape


def recipes(model: Path) -> list[Recipe]:
    """What can be tried of a model folder, the mildest first."""
    config: Mapping[str, Any] = read_config(model)
    layers = int(config.get("num_hidden_layers") or config.get("n_layers") or 0)
    inner = int(config.get("intermediate_size") or config.get("hidden_dim") or 0)
    hidden = int(config.get("hidden_size") or config.get("dim") or 0)
    found = [Recipe(VOCABULARY)]
    for kept, narrow in ((2 / 3, False), (1 / 2, False), (1 / 2, True), (1 / 3, True)):
        count = round(layers * kept)
        if not 0 < count < layers:
            continue
        width = inner // 2 if narrow and inner >= 128 else None
        name = f"layers-{count}" + (f"-inner-{width}" if width else "")
        if all(recipe.name != name for recipe in found):
            left = count * (4 * hidden**2 + 2 * hidden * (width or inner))
            found.append(Recipe(name, count, width, layers * (4 * hidden**2 + 2 * hidden * inner) - left))
    return found
