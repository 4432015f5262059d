"""What a model may run with beside its own weights, by the name that the card gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmo.engines.applied.base import NAME, Applied
from llmo.engines.applied.bottleneck import Bottleneck
from llmo.engines.applied.mean_head import MeanHead
from llmo.engines.applied.virtual import Prefix, Prompt
from llmo.errors import ModelError

__all__ = ["KINDS", "NAME", "Applied", "Bottleneck", "MeanHead", "Prefix", "Prompt", "attach", "attached"]

KINDS: dict[str, type[Applied]] = {kind.kind: kind for kind in (Bottleneck, MeanHead, Prefix, Prompt)}


def attach(kind: str, folder: Path, model: Any) -> None:
    """Let the transformers model run with what lies in the adapter's folder. Raises ModelError."""
    if kind not in KINDS:
        raise ModelError(
            f"the model runs with '{kind}' beside its weights, which this version does not know",
            hint="upgrade LLMO, or train the model again with this version",
            where=str(folder),
        )
    KINDS[kind].open(folder, model).attach(model)


def attached(model: Any) -> Applied | None:
    """What the model runs with, if anything."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, Applied) else None
