"""The adapters that a replica's engine holds, by folder: loaded when first asked for, given back when long idle."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, cast

from llmo import plugins
from llmo.engines.base import TakesAdapters
from llmo.errors import BusyError, LLMOError, ModelError, NoRoomError

_ABILITY = "adapters"
_IDLE_SECONDS = 600.0
_LOOK_SECONDS = 10.0
_TRY_AGAIN = 1.0
_log = logging.getLogger("llmo.serve")


class Able(Protocol):
    """An engine of either kind."""

    @property
    def name(self) -> str: ...

    @property
    def abilities(self) -> frozenset[str]: ...


class LoadedAdapters:
    """What is not loaded yet is loaded by whoever needs it, so a replica that was started again needs no telling.

    `kind` is the entry point group of the engine, where others of its kind are found; `check` says of a folder what the
    engine does not know, and raises ModelError. `busy` holds up new calls while it is entered, and gives the folders
    that are in use, which stay. All may be called from any thread.
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
        self.busy: Callable[[], AbstractContextManager[Collection[str]]] = lambda: nullcontext(())
        self._loading = threading.Lock()  # to be held by whoever changes what is held
        self._held: set[str] = set()
        self._asked: dict[str, float] = {}
        self._looked = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def at_hand(self, folder: str) -> bool:
        """Whether it is loaded; if so it stays for the open call that asks."""
        self._asked[folder] = time.monotonic()
        return folder in self._held

    def need(self, folder: str) -> None:
        """Have it loaded; where the memory is full, those that were not asked for the longest make room.

        Raises ModelError for an engine that takes none, and for an adapter that does not fit; BusyError where all that
        could make room are in use.
        """
        if _ABILITY not in self._engine.abilities:
            raise ModelError(
                f"the {self._engine.name} engine takes no adapters",
                hint="deploy the model as it was trained, or a variant for an engine that takes them: "
                f"{', '.join(plugins.takes_adapters(self._kind)) or 'none is installed'}",
            )
        if self.at_hand(folder):
            return
        with self._loading:
            if folder not in self._held:
                try:
                    self._check(Path(folder))
                    self._load(folder)
                except LLMOError:
                    raise
                except Exception as error:  # an engine is a plugin, and its library raises what it likes
                    _log.exception("an adapter could not be loaded")
                    raise ModelError(
                        f"the adapter cannot be loaded: {error}", hint="see the replica's log", where=folder
                    ) from error
                self._held.add(folder)
            self._asked[folder] = time.monotonic()

    def may_make_room(self) -> bool:
        """Whether something could be given back now, or nothing is left that could."""
        with self.busy() as busy:
            return not self._held <= set(busy) or not self._held

    def drop(self, folder: str) -> None:
        """Give one back now, if it is loaded and no open call asks for it."""
        with self._loading, self.busy() as busy:
            if folder in self._held and folder not in busy:
                self._give_back(folder)

    def look(self) -> None:
        """Now and then, give back what nobody asked for in a long while."""
        now = time.monotonic()
        if now - self._looked < min(_LOOK_SECONDS, self._idle_seconds):
            return
        if not self._loading.acquire(blocking=False):
            return  # one is being loaded: there is no hurry
        self._looked = now
        try:
            with self.busy() as busy:
                self._asked |= dict.fromkeys(self._held & set(busy), now)
                for folder in [folder for folder in self._held if now - self._asked[folder] > self._idle_seconds]:
                    self._give_back(folder)
        finally:
            self._loading.release()

    def _load(self, folder: str) -> None:
        while True:
            try:
                cast(TakesAdapters, self._engine).add_adapter(folder, Path(folder))
                return
            except NoRoomError as error:
                self._make_room(error)

    def _make_room(self, error: NoRoomError) -> None:
        with self.busy() as busy:
            idle = self._held - set(busy)
            if idle:
                self._give_back(min(idle, key=self._asked.__getitem__))
                return
        raise BusyError(
            f"{error.what}, and all of those are being asked",
            hint=f"ask again in {_TRY_AGAIN:g} s; {error.hint}",
            retry_after=_TRY_AGAIN,
        ) from error

    def _give_back(self, folder: str) -> None:
        self._held.discard(folder)
        del self._asked[folder]
        cast(TakesAdapters, self._engine).remove_adapter(folder)
