"""Adapters by name: which of them prompts may ask for, and which streams still run with."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from llmo.engines.paged.batching import Batching
from llmo.errors import ConflictError, InputError, NotFoundError

T = TypeVar("T")


class Named(ABC, Generic[T]):
    """A removed adapter stays as long as a stream uses it; a name that comes back is another one. `_loaded` holds them
    by key. All but `drop` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count_of_keys = 0
        self._key: dict[str, str] = {}
        self._loaded: dict[str, T] = {}

    def names(self) -> list[str]:
        return sorted(self._key)

    def key(self, name: str) -> str | None:
        """What tells this adapter from every other that had or will have its name."""
        return self._key.get(name)

    def add(self, name: str, folder: Path) -> None:
        """Raises ConflictError for a name in use, ModelError for an adapter that does not fit (the base, or the memory
        there is) or does nothing."""
        adapter = self._read(folder)
        with self._lock:
            if name in self._key:
                raise ConflictError(
                    f"an adapter named '{name}' is loaded", hint="remove it first, or take another name"
                )
            self._check([*self._loaded.values(), adapter])
            self._count_of_keys += 1
            key = f"{name}#{self._count_of_keys}"
            self._loaded[key] = adapter
            self._key[name] = key

    def remove(self, name: str) -> None:
        """Forget the name; streams that run with it keep it. Raises NotFoundError."""
        with self._lock:
            if self._key.pop(name, None) is None:
                raise NotFoundError(f"no adapter named '{name}'", hint=f"loaded: {', '.join(self.names()) or 'none'}")

    def drop(self, used: Iterable[str | None]) -> None:
        """Free what has no name any more, except for the keys `used` by streams."""
        if len(self._loaded) > len(self._key):
            with self._lock:
                for key in self._loaded.keys() - self._key.values() - set(used):
                    del self._loaded[key]

    @abstractmethod
    def _read(self, folder: Path) -> T:
        """Raises ModelError for an adapter that does not fit the base, or changes nothing."""

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
        key = None if name is None else self._adapters.key(name)
        if name is not None and key is None:
            loaded = ", ".join(self._adapters.names()) or "none"
            raise InputError(f"unknown adapter '{name}'", hint=f"loaded: {loaded}", where="adapter")
        return key
