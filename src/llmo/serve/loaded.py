"""The adapters that a replica's engine holds, by folder: loaded when first asked for, given back when long idle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol, cast

from llmo import plugins
from llmo.engines.base import TakesAdapters
from llmo.errors import LLMOError, ModelError

_ABILITY = "adapters"
_IDLE_SECONDS = 600.0
_LOOK_SECONDS = 10.0


class Able(Protocol):
    """An engine of either kind."""

    @property
    def name(self) -> str: ...

    @property
    def abilities(self) -> frozenset[str]: ...


class LoadedAdapters:
    """What is not loaded yet is loaded by whoever needs it, so a replica that was started again needs no telling.

    `kind` is the entry point group of the engine, where others of its kind are found; `check` says of a folder what the
    engine does not know, and raises ModelError.
    """

    def __init__(
        self,
        engine: Able,
        kind: str = "llmo.generators",
        *,
        check: Callable[[Path], None] = lambda _: None,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        self._engine = engine
        self._kind = kind
        self._check = check
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}
        self._looked = 0.0

    def __len__(self) -> int:
        return len(self._used)

    def need(self, folder: str) -> None:
        """Have it loaded. Raises ModelError for an engine that takes none, and for an adapter that does not fit."""
        if _ABILITY not in self._engine.abilities:
            raise ModelError(
                f"the {self._engine.name} engine takes no adapters",
                hint="deploy the model as it was trained, or a variant for an engine that takes them: "
                f"{', '.join(plugins.takes_adapters(self._kind)) or 'none is installed'}",
            )
        with self._lock:
            if folder not in self._used:
                try:
                    self._check(Path(folder))
                    cast(TakesAdapters, self._engine).add_adapter(folder, Path(folder))
                except LLMOError:
                    raise
                except Exception as error:  # an engine is a plugin, and its library raises what it likes
                    raise ModelError(f"the adapter cannot be loaded: {error}", where=folder) from error
            self._used[folder] = time.monotonic()

    def give_back(self, busy: Collection[str]) -> None:
        """Drop what nobody asked for in a long while; `busy` are those of open calls."""
        now = time.monotonic()
        if now - self._looked < min(_LOOK_SECONDS, self._idle_seconds):
            return
        if not self._lock.acquire(blocking=False):
            return  # one is being loaded: there is no hurry
        self._looked = now
        try:
            self._used |= dict.fromkeys(self._used.keys() & set(busy), now)
            for folder in [folder for folder, used in self._used.items() if now - used > self._idle_seconds]:
                del self._used[folder]
                cast(TakesAdapters, self._engine).remove_adapter(folder)
        finally:
            self._lock.release()
