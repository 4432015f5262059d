"""An engine whose streams run with adapters: each stream holds its own from the prompt to the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmo.engines.named import Named
from llmo.engines.paged.batching import Batching
from llmo.engines.paged.stream import Stream


class Adapting(Batching):
    """An engine with adapters; `load` makes `_adapters`."""

    _adapters: Named[Any]

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA as peft saves it; prompts may name it from now on. Raises ConflictError for a name in use,
        NoRoomError where the memory does not hold it too, and ModelError for an adapter that does not fit this base or
        changes nothing."""
        self._check_open()
        self._adapters.add(name, folder)

    def remove_adapter(self, name: str) -> None:
        """Take no more prompts for it; streams that run with it end as they would have. Raises NotFoundError."""
        self._check_open()
        self._adapters.remove(name)

    def _adapter(self, name: str | None) -> str | None:
        return None if name is None else self._adapters.take(name)

    def _forget(self, stream: Stream) -> None:
        super()._forget(stream)
        if stream.adapter is not None:
            self._adapters.give_back(stream.adapter)
