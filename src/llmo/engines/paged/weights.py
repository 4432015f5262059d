"""Reads a folder's safetensors (one file or shards) by name, and refuses what is missing, misshapen or not finite."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmo.engines.folder import require
from llmo.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Weights:
    """The tensors of a model folder, read from disk one at a time. Use as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._unread: set[str] = set()

    def __enter__(self) -> Weights:
        index = self._folder / INDEX
        names = self._shards(index) if index.is_file() else [SINGLE]
        for name in names:
            path = require(self._folder, name)
            try:
                file = self._stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError, ValueError) as error:
                self._stack.close()
                raise _broken(f"{name} is no whole safetensors file: {error}", path) from error
            self._files |= dict.fromkeys(file.keys(), file)
        self._unread = set(self._files)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name` at fp32, which must have this shape and finite values."""
        if name not in self._files:
            raise _broken(f"the weights lack the tensor {name}", self._folder)
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise _broken(f"the tensor {name} cannot be read: {error}", self._folder) from error
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise _broken(
                f"the tensor {name} is {tensor.dtype} {list(tensor.shape)}, the config says {list(shape)}", self._folder
            )
        tensor = tensor.float()
        if not torch.isfinite(tensor.sum()):  # a sum keeps every NaN and infinity
            raise _broken(f"the tensor {name} holds values that are not finite", self._folder)
        self._unread.discard(name)
        return tensor

    def check_all_read(self, *ignored: str) -> None:
        """Refuse tensors that nobody took: a bias or an adapter left out would change every answer unseen."""
        left = sorted(name for name in self._unread if name not in ignored and not name.endswith("inv_freq"))
        if left:
            raise _broken(f"the config has no place for {len(left)} tensors, such as {left[0]}", self._folder)

    def _shards(self, index: Path) -> list[str]:
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise _broken(f"{INDEX} cannot be read: {error!r}", index) from error
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise _broken(f"{INDEX} names files outside the folder", index)
        return names


def _broken(what: str, path: Path) -> ModelError:
    return ModelError(what, hint="make the model folder again, or check it with `llmo verify`", where=str(path))
