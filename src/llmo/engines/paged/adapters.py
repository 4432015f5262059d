"""LoRA adapters over one base: each checked when it is loaded, and any number of them mixed in one batch.

Adapters that run hold a slot each. A token of an answer gathers the rows of its own adapter and sums them up, which is
what a bag of embeddings does: no row of the batch sees another, and the cost is that of one adapter a row. The tokens
of prompts are many and of few adapters: at half precision the adapters of all prompts lie side by side as one, each row
seeing only its own part. Parts of others are multiplied by zero, which is exact. So an answer is the same alone and in
a mixed batch. (All this is a CPU's; on a GPU a kernel does it for any row: `gpu/kernels.py`.)

There are as many slots as adapters that were asked for, rounded up to a power of two, and no more than streams. They
count in the memory set aside.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmo.engines.named import Named
from llmo.engines.paged.config import Config
from llmo.engines.paged.lora import GROUPS, Lora, group_sizes, read_lora
from llmo.engines.paged.stream import Piece

LEAST_ROWS = 2  # of a product whose rows are to be the same in any number of rows: see linear.py
_STEP = 2  # of ranks: half-precision products sum up in pairs


@dataclass(frozen=True, slots=True)
class Bags:
    """For one group, the rows of answers: what each gathers from the slots of each layer, and where each bag begins."""

    down: Sequence[Tensor]  # of each layer, [slots * in, parts * rank]
    down_rows: Tensor
    down_starts: Tensor
    up: Sequence[Tensor]  # of each layer, [slots * parts * rank, out / parts]
    up_rows: Tensor
    up_starts: Tensor

    def add(self, layer: int, x: Tensor, out: Tensor) -> None:
        inner = _bag(self.down[layer], self.down_rows, self.down_starts, x)
        out.add_(_bag(self.up[layer], self.up_rows, self.up_starts, inner).view(out.shape))


@dataclass(frozen=True, slots=True)
class Side:
    """For one group, the rows of prompts: their adapters side by side, and which of them each row sees."""

    down: Tensor  # [layers, adapters * parts * rank, in]
    up: Tensor  # [layers, parts, adapters * rank, out / parts]
    sees: Tensor  # [rows, adapters, 1, 1]

    def add(self, layer: int, x: Tensor, out: Tensor) -> None:
        up = self.up[layer]
        rows, adapters, parts = len(x), self.sees.shape[1], len(up)
        inner = torch.nn.functional.linear(x, self.down[layer]).view(rows, adapters, parts, -1).mul_(self.sees)
        made = torch.bmm(inner.permute(2, 0, 1, 3).reshape(parts, rows, -1), up)
        out.view(rows, parts, -1).add_(made.transpose(0, 1))


@dataclass(frozen=True, slots=True)
class Mixed:
    """The adapters of one step: those of prompts in the rows up to `sides_end`, those of answers from `start` to
    `stop`."""

    sides: Mapping[str, Side]
    sides_end: int
    bags: Mapping[str, Bags]
    start: int
    stop: int

    def add(self, layer: int, group: str, x: Tensor, out: Tensor) -> None:
        """Add to `out` (`[rows, out]`, in place) what each row's adapter makes of `x` (`[rows, in]`)."""
        if group in self.sides:
            self.sides[group].add(layer, x[: self.sides_end], out[: self.sides_end])
        bags = self.bags.get(group)
        if bags is not None and self.stop - self.start == len(x):
            bags.add(layer, x, out)
        elif bags is not None:
            bags.add(layer, x[self.start : self.stop], out[self.start : self.stop])


def _bag(matrix: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """The sums of `matrix[rows]` times `weights`, one for every start."""
    summed: Tensor = torch._embedding_bag_forward_only(matrix, rows, starts, False, 0, False, weights.view(-1), True)[0]
    return summed


@dataclass(frozen=True, slots=True)
class _Room:
    """How much the slots hold: their number, and the rank of each group."""

    slots: int
    ranks: Mapping[str, int]


_NONE = _Room(0, dict.fromkeys(GROUPS, 0))


class Adapters(Named[Lora]):
    """At most `most` take part in one step; all of them, slots too, take at most `memory` bytes. What is not of `Named`
    is the engine's own."""

    def __init__(self, config: Config, most: int, memory: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(memory)
        self._config = config
        self._sizes = group_sizes(config)
        self._most = most
        self._dtype, self._device = dtype, device
        self.version = 0
        self._slot: dict[str, int] = {}
        self._room = _NONE
        self._asked: frozenset[str] = frozenset()  # keys that the room was made for
        self._down: dict[str, Tensor] = {}  # [layers, slots, in, parts * rank]
        self._below: dict[str, Tensor] = {}  # the same as prompts need it, [layers, slots, parts * rank, in]
        self._up: dict[str, Tensor] = {}  # [layers, slots, parts, rank, out / parts]
        self._layers: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def slots(self, pieces: Sequence[Piece]) -> list[int] | None:
        """For each piece, which of the matrices are its own; None where no piece has an adapter."""
        wanted = {piece.stream.adapter for piece in pieces if piece.stream.adapter is not None}
        if not wanted:
            return None
        with self._lock:
            self._place({key: self._loaded[key] for key in wanted})
        slots = {None: self._room.slots} | self._slot  # the one beyond them is empty
        return [slots[piece.stream.adapter] for piece in pieces]

    def matrices(self, group: str, layer: int) -> tuple[Tensor, Tensor] | None:
        """Of all slots: `[slots, ranks, in]` and `[slots, parts, rank, out / parts]`, of which the last is empty. They
        stay where they are as long as `version` is the same."""
        return (self._below[group][layer], self._up[group][layer]) if group in self._below else None

    def mix(self, pieces: Sequence[Piece]) -> Mixed | None:
        """What a step of these pieces, prompts first, needs; None where no piece has an adapter."""
        slots = self.slots(pieces)
        if slots is None:
            return None
        empty = self._room.slots
        rows = [
            (slot, p.of_prompt and self._dtype != torch.float32)
            for p, slot in zip(pieces, slots, strict=True)
            for _ in range(p.count)
        ]
        prompts = [slot for slot, of_prompt in rows if of_prompt]
        answers = [slot for slot, of_prompt in rows if not of_prompt]
        start = len(prompts)
        while answers and answers[-1] == empty:
            answers.pop()
        if any(slot != empty for slot in prompts):
            prompts += [empty] * (LEAST_ROWS - len(prompts))
        else:
            prompts = []
        sides = self._sides(prompts) if prompts else {}
        bags = self._bags(answers) if answers else {}
        return Mixed(sides, len(prompts), bags, start, start + len(answers))

    def _sides(self, rows: Sequence[int]) -> dict[str, Side]:
        """For prompts whose rows have these slots."""
        used = self._tensor(sorted(set(rows) - {self._room.slots}))
        sees = (self._tensor(rows)[:, None] == used).to(self._dtype)[:, :, None, None]
        found = {}
        for group, down in self._below.items():
            beside = down.index_select(1, used).flatten(1, 2)
            above = self._up[group].index_select(1, used).transpose(1, 2).flatten(2, 3)
            found[group] = Side(beside, above, sees)
        return found

    def _bags(self, rows: Sequence[int]) -> dict[str, Bags]:
        """For answers whose rows have these slots."""
        own = self._tensor(rows)[:, None]
        found = {}
        for group, (wide, parts, _) in self._sizes.items():
            rank = self._room.ranks[group]
            if rank:
                down, up = ((own * of + self._count(of)).flatten() for of in (wide, parts * rank))
                starts = self._count(len(rows) * parts + 1)
                layers = self._layers[group]
                found[group] = Bags(layers[0], down, starts[: len(rows) + 1] * wide, layers[1], up, starts * rank)
        return found

    def _count(self, end: int) -> Tensor:
        return torch.arange(end, dtype=torch.int32, device=self._device)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _read(self, folder: Path) -> Lora:
        return read_lora(folder, self._config, self._dtype, self._device)

    def _size(self, adapters: Sequence[Lora]) -> int:
        """The slots, and the adapters themselves."""
        room = self._room_of(adapters)
        numbers = sum(room.ranks[g] * parts * (2 * wide + out) for g, (wide, parts, out) in self._sizes.items())
        slots = numbers * self._config.layers * (room.slots + 1) * self._dtype.itemsize
        return slots + sum(m.nbytes for lora in adapters for m in (*lora.down.values(), *lora.up.values()))

    def _place(self, wanted: Mapping[str, Lora]) -> None:
        """Give each wanted adapter a slot, and fill those that are new."""
        if not wanted.keys() <= self._asked:
            asked = (self._asked & self._loaded.keys()) | wanted.keys()
            room = self._room_of([self._loaded[key] for key in asked])
            if room != self._room:
                self._make_room(room)
            self._asked = asked
        kept = {key: slot for key, slot in self._slot.items() if key in wanted}
        held = {slot: key for key, slot in self._slot.items()}
        free = sorted(set(range(self._room.slots)) - set(kept.values()), key=lambda slot: (slot in held, slot))
        for key, slot in zip(sorted(wanted.keys() - kept.keys()), free, strict=False):
            self._slot.pop(held.get(slot, ""), None)
            self._slot[key] = slot
            for group in self._down:
                self._fill(group, slot, wanted[key])

    def _fill(self, group: str, slot: int, lora: Lora) -> None:
        down, up = self._down[group][:, slot], self._up[group][:, slot]
        rank = lora.rank(group)
        if rank < self._room.ranks[group]:
            down.zero_()
            up.zero_()
        if rank:
            down.view(*down.shape[:2], up.shape[1], -1)[..., :rank] = lora.down[group]
            up[:, :, :rank] = lora.up[group]
        self._below[group][:, slot] = down.transpose(1, 2)

    def _room_of(self, loras: Collection[Lora]) -> _Room:
        """What all of these need. A GPU's recorded steps know the slot of no adapter by its number: all are there."""
        some = self._most if self._device.type == "cuda" else 1 << max(0, len(loras) - 1).bit_length()
        slots = min(self._most, some)
        return _Room(slots, {group: _even(max((lora.rank(group) for lora in loras), default=0)) for group in GROUPS})

    def _make_room(self, room: _Room) -> None:
        """New matrices; slots are filled again when they are needed. Where memory does not suffice nothing is left, and
        the next step asks for what it needs itself."""
        self.version += 1
        self._room, self._asked = _NONE, frozenset()
        for kept in (self._slot, self._down, self._below, self._up, self._layers):
            kept.clear()
        for group, (wide, parts, out) in self._sizes.items():
            rank = room.ranks[group]
            if rank:
                shape = (self._config.layers, room.slots + 1)
                empty = partial(torch.zeros, dtype=self._dtype, device=self._device)
                self._down[group] = empty((*shape, wide, parts * rank))
                self._below[group] = empty((*shape, parts * rank, wide))
                self._up[group] = empty((*shape, parts, rank, out))
                self._layers[group] = (
                    list(self._down[group].flatten(1, 2).unbind()),
                    list(self._up[group].flatten(1, 3).unbind()),
                )
        self._room = room


def _even(rank: int) -> int:
    return -(-rank // _STEP) * _STEP
