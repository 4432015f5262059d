"""Models beside the one an engine has loaded, by name: which may be asked for, and which are still in use."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from llmo.engines.base import no_room
from llmo.errors import ConflictError, InputError, NotFoundError

T = TypeVar("T")


class Named(ABC, Generic[T]):
    """All of them take at most `memory` bytes. A removed one stays as long as a stream uses it; a name that comes back
    is another one. `_loaded` holds them by key. All may be called from any thread."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._count_of_keys = 0
        self._key: dict[str, str] = {}
        self._loaded: dict[str, T] = {}
        self._streams: Counter[str] = Counter()

    def get(self, name: str) -> T:
        """Raises InputError for a name that is not known."""
        with self._lock:
            return self._loaded[self._known(name)]

    def take(self, name: str) -> str:
        """What tells this one from every other that had or will have its name; it is kept for one stream more, until
        `give_back`. Raises InputError for a name that is not known."""
        with self._lock:
            key = self._known(name)
            self._streams[key] += 1
            return key

    def give_back(self, key: str) -> None:
        """A stream with it has ended."""
        with self._lock:
            self._streams[key] -= 1
            self._free(key)

    def add(self, name: str, folder: Path) -> None:
        """Raises ConflictError for a name in use, NoRoomError where the memory does not hold it too, and ModelError for
        one that does not fit what is loaded or does nothing."""
        self._check_name(name)
        adapter = self._read(folder)
        with self._lock:
            self._check_name(name)
            for all_of_them in ([adapter], [*self._loaded.values(), adapter]):
                needed = self._size(all_of_them)
                if needed > self._memory:
                    raise no_room(len(all_of_them), needed, self._memory)
            self._count_of_keys += 1
            key = f"{name}#{self._count_of_keys}"
            self._loaded[key] = adapter
            self._key[name] = key

    def remove(self, name: str) -> None:
        """Forget the name; streams that run with it keep it. Raises NotFoundError."""
        with self._lock:
            key = self._key.pop(name, None)
            if key is None:
                raise NotFoundError(f"no adapter named '{name}'", hint=self._names())
            self._free(key)

    def _known(self, name: str) -> str:
        if name not in self._key:
            raise InputError(f"unknown adapter '{name}'", hint=self._names(), where="adapter")
        return self._key[name]

    def _names(self) -> str:
        return f"loaded: {', '.join(sorted(self._key)) or 'none'}"

    def _check_name(self, name: str) -> None:
        if name in self._key:
            raise ConflictError(f"an adapter named '{name}' is loaded", hint="remove it first, or take another name")

    def _free(self, key: str) -> None:
        """What has no name and no stream goes at once, so that its room is there for the next."""
        if not self._streams[key] and key not in self._key.values():
            del self._streams[key], self._loaded[key]

    @abstractmethod
    def _read(self, folder: Path) -> T:
        """Raises ModelError for one that does not fit what is loaded, or changes nothing."""

    @abstractmethod
    def _size(self, adapters: Sequence[T]) -> int:
        """Bytes that all of these take together."""
