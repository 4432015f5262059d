"""What a model runs with beside its own weights: the contract, and its two files where peft has no format of its own.

Such a model's folder holds the weights as plain transformers opens them and `adapter/` beside them; the card names
the kind (`applied`), and whoever opens the folder here attaches it. In plain transformers the weights say something
else without it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmo.engines.folder import require
from llmo.errors import ModelError

NAME = "llmo_applied"  # of the module within the model
SETTINGS, TENSORS = "llmo_adapter.json", "llmo_adapter.safetensors"


class Applied(nn.Module, ABC):
    """One kind. Its parameters are those of the model it is attached to, until it is detached."""

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self._handles: list[RemovableHandle] = []

    def attach(self, model: Any) -> None:
        """From now on the transformers model runs with it, wherever it is called. Raises ModelError or SpecError for
        an architecture that has no place for it."""
        self._handles = self._hook(model)
        model.add_module(NAME, self)

    def detach(self, model: Any) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(model, NAME)

    @contextmanager
    def without(self) -> Iterator[None]:
        """The model as it is by itself."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @abstractmethod
    def _hook(self, model: Any) -> list[RemovableHandle]: ...

    @abstractmethod
    def save(self, folder: Path, model: Any) -> None:
        """Write settings and tensors into `folder`, which is made; `model` is what it is attached to."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, model: Any) -> Self:
        """What `save` wrote, for that model. Raises ModelError for files that are missing, broken or do not fit."""


def write(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Our own two files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / SETTINGS).write_text(json.dumps({"format": 1, **settings}, indent=1), encoding="utf-8")


def read(folder: Path, settings: str = SETTINGS, tensors: str = TENSORS) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of an adapter's folder. Raises ModelError."""
    try:
        found = json.loads(require(folder, settings).read_text(encoding="utf-8"))
        weights = load_file(require(folder, tensors))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise unfit(f"the adapter cannot be read: {error}", folder) from error
    if not isinstance(found, dict):
        raise unfit(f"{settings} is not a JSON object", folder)
    return found, weights


def unfit(what: str, folder: Path) -> ModelError:
    return ModelError(
        what, hint="make the model folder again: what lies in adapter/ is a part of it", where=str(folder)
    )
