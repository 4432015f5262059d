"""Adapters by name: which of them prompts may ask for, and which streams still run with."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from llmo.engines.paged.batching import Batching
from llmo.engines.paged.stream import Stream
from llmo.errors import ConflictError, InputError, NotFoundError

T = TypeVar("T")


class Named(ABC, Generic[T]):
    """A removed adapter stays as long as a stream uses it; a name that comes back is another one. `_loaded` holds them
    by key. All may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count_of_keys = 0
        self._key: dict[str, str] = {}
        self._loaded: dict[str, T] = {}
        self._streams: Counter[str] = Counter()

    def names(self) -> list[str]:
        return sorted(self._key)

    def take(self, name: str) -> str | None:
        """What tells this adapter from every other that had or will have its name; it is kept for one stream more,
        until `give_back`. None where the name is not known."""
        with self._lock:
            key = self._key.get(name)
            if key is not None:
                self._streams[key] += 1
            return key

    def give_back(self, key: str) -> None:
        """A stream with it has ended."""
        with self._lock:
            self._streams[key] -= 1
            self._free(key)

    def add(self, name: str, folder: Path) -> None:
        """Raises ConflictError for a name in use, ModelError for an adapter that does not fit (the base, or the memory
        there is) or does nothing."""
        self._check_name(name)
        adapter = self._read(folder)
        with self._lock:
            self._check_name(name)
            self._check([*self._loaded.values(), adapter])
            self._count_of_keys += 1
            key = f"{name}#{self._count_of_keys}"
            self._loaded[key] = adapter
            self._key[name] = key

    def remove(self, name: str) -> None:
        """Forget the name; streams that run with it keep it. Raises NotFoundError."""
        with self._lock:
            key = self._key.pop(name, None)
            if key is None:
                raise NotFoundError(f"no adapter named '{name}'", hint=f"loaded: {', '.join(self.names()) or 'none'}")
            self._free(key)

    def _check_name(self, name: str) -> None:
        if name in self._key:
            raise ConflictError(f"an adapter named '{name}' is loaded", hint="remove it first, or take another name")

    def _free(self, key: str) -> None:
        """What has no name and no stream goes at once, so that its room is there for the next."""
        if not self._streams[key] and key not in self._key.values():
            del self._streams[key], self._loaded[key]

    @abstractmethod
    def _read(self, folder: Path) -> T:
        """Raises ModelError for an adapter that does not fit the base, or changes nothing."""

    @abstractmethod
    def _check(self, adapters: Sequence[T]) -> None:
        """Raises ModelError where there is no room for all of these."""


class Adapting(Batching):
    """An engine with adapters; `load` makes `_adapters`."""

    _adapters: Named[Any]

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA as peft saves it; prompts may name it from now on. Raises ConflictError for a name in use and
        ModelError for an adapter that does not fit this base or changes nothing."""
        self._check_open()
        self._adapters.add(name, folder)

    def remove_adapter(self, name: str) -> None:
        """Take no more prompts for it; streams that run with it end as they would have. Raises NotFoundError."""
        self._check_open()
        self._adapters.remove(name)

    def _adapter(self, name: str | None) -> str | None:
        key = None if name is None else self._adapters.take(name)
        if name is not None and key is None:
            loaded = ", ".join(self._adapters.names()) or "none"
            raise InputError(f"unknown adapter '{name}'", hint=f"loaded: {loaded}", where="adapter")
        return key

    def _forget(self, stream: Stream) -> None:
        super()._forget(stream)
        if stream.adapter is not None:
            self._adapters.give_back(stream.adapter)
