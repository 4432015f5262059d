"""Which blocks of the cache belong to whom: counted references, prefixes found by their hash, oldest reused first."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 16  # tokens a block, where the kernels leave the choice
SCRATCH = 0  # takes what padding rows write, and stands behind the end of every shorter table


def salt(tenant: str, adapter: str | None) -> bytes:
    """Where a chain of keys begins: prefixes of another tenant or adapter can never have the same key."""
    return hashlib.blake2b(repr((tenant, adapter)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block: its tokens, and through `parent` everything before them."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class Blocks:
    """`total` blocks of `size` tokens, one of them scratch. A block that nobody holds keeps its contents until it is
    needed."""

    def __init__(self, total: int, size: int = BLOCK) -> None:
        self.size = size
        self.usable = total - 1
        self._holders = [0] * total
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(1, total))  # oldest first
        self._found: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A block to write to; what it held before can no longer be found. There must be a free one."""
        block, _ = self._free.popitem(last=False)
        key = self._key.pop(block, None)
        if key is not None:
            del self._found[key]
        self._holders[block] = 1
        return block

    def share(self, key: bytes) -> int | None:
        """The block that holds what `key` names, held once more; None where there is none."""
        block = self._found.get(key)
        if block is not None:
            self._free.pop(block, None)
            self._holders[block] += 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Let others find a block that is full now. The first block of a key stays the one that is found."""
        if key not in self._found and block not in self._key:
            self._found[key] = block
            self._key[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a stream's blocks. Ends go back first: a prefix is of use to more streams than what follows it."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
