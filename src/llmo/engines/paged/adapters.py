"""LoRA adapters over one base: each checked when it is loaded, and any number of them mixed in one batch.

The adapters of a step lie side by side as one wide adapter, each row of the batch seeing only its own part: two
products a layer, however many adapters there are. Parts of other adapters are multiplied by zero, which is exact, so
an answer is the same alone and in a mixed batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmo.engines.paged.config import Config
from llmo.engines.paged.lora import GROUPS, Lora, group_sizes, read_lora
from llmo.errors import ConflictError, NotFoundError


@dataclass(frozen=True, slots=True)
class Mixed:
    """The adapters of one step: wide matrices of all layers, and which columns each row may see."""

    down: Mapping[str, Tensor]  # [layers, width, in]
    up: Mapping[str, Tensor]  # [layers, width, out]
    sees: Mapping[str, Tensor]  # [rows, width]

    def add(self, layer: int, group: str, x: Tensor, out: Tensor) -> None:
        """Add to `out` (`[rows, out]`, in place) what each row's adapter makes of `x` (`[rows, in]`)."""
        seen = torch.nn.functional.linear(x, self.down[group][layer]).mul_(self.sees[group])
        out.add_(torch.mm(seen, self.up[group][layer]))


class Adapters:
    """Adapters by name. A removed one stays as long as a stream uses it; a name that comes back is another one."""

    def __init__(self, config: Config, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._slots = 1 << (slots - 1).bit_length()
        self._step = 16 if dtype == torch.float32 else 2  # of ranks: MKL's products are steady only at such widths
        self._dtype, self._device = dtype, device
        self._loaded = 0
        self._key: dict[str, str] = {}
        self._lora: dict[str, Lora] = {}
        self._slot: dict[str, int] = {}
        self._ranks = dict.fromkeys(GROUPS, 0)
        self._down: dict[str, Tensor] = {}
        self._up: dict[str, Tensor] = {}

    def names(self) -> list[str]:
        return sorted(self._key)

    def key(self, name: str) -> str | None:
        """What tells this adapter from every other that had or will have its name."""
        return self._key.get(name)

    def add(self, name: str, folder: Path) -> None:
        """Raises ConflictError for a name in use, ModelError for an adapter that does not fit or does nothing."""
        if name in self._key:
            raise ConflictError(f"an adapter named '{name}' is loaded", hint="remove it first, or take another name")
        lora = read_lora(folder, self._config, self._dtype, self._device)
        self._loaded += 1
        key = f"{name}#{self._loaded}"
        self._key[name], self._lora[key] = key, lora
        ranks = {g: max(rank, -(-lora.rank(g) // self._step) * self._step) for g, rank in self._ranks.items()}
        if ranks != self._ranks:
            self._ranks = ranks
            self._make_room()

    def remove(self, name: str, used: frozenset[str]) -> None:
        """Forget the name. `used` are the keys of running streams, which keep theirs; those of no one are dropped."""
        if self._key.pop(name, None) is None:
            raise NotFoundError(f"no adapter named '{name}'", hint=f"loaded: {', '.join(self.names()) or 'none'}")
        keep = used | set(self._key.values())
        self._lora = {key: lora for key, lora in self._lora.items() if key in keep}
        self._slot = {key: slot for key, slot in self._slot.items() if key in keep}

    def mix(self, keys: Sequence[str | None], counts: Sequence[int], pad: int) -> Mixed | None:
        """What a step needs whose pieces of `counts` rows belong to `keys`, and then `pad` rows of filling; None where
        no piece has an adapter."""
        wanted = {key for key in keys if key is not None}
        if not wanted:
            return None
        parts = 1 << (self._place(wanted) - 1).bit_length()
        slots = [-1 if key is None else self._slot[key] for key in keys] + [-1]
        own = torch.tensor(slots).repeat_interleave(torch.tensor([*counts, pad])).to(self._device)
        used = [group for group in GROUPS if self._ranks[group]]
        columns = {group: torch.arange(parts * self._ranks[group], device=self._device) for group in used}
        return Mixed(
            down={group: self._down[group][:, : len(columns[group])] for group in used},
            up={group: self._up[group][:, : len(columns[group])] for group in used},
            sees={g: (columns[g][None] // self._ranks[g] == own[:, None]).to(self._dtype) for g in used},
        )

    def _place(self, wanted: set[str]) -> int:
        """Give each wanted adapter a slot, the lowest that no other needs now; the number of slots to look at."""
        high = max((self._slot[key] for key in wanted if key in self._slot), default=0) + 1
        if high >= 4 * len(wanted):
            self._slot.clear()  # few are left of many: move them down, where a step costs less
        free = iter(sorted(set(range(self._slots)) - {self._slot[key] for key in wanted if key in self._slot}))
        for key in sorted(wanted - self._slot.keys()):
            slot = next(free)
            self._slot = {other: place for other, place in self._slot.items() if place != slot} | {key: slot}
            for group, rank in self._ranks.items():
                if rank:
                    self._fill(group, slice(slot * rank, (slot + 1) * rank), self._lora[key])
        return max(self._slot[key] for key in wanted) + 1

    def _fill(self, group: str, place: slice, lora: Lora) -> None:
        for matrix, parts in ((self._down[group], lora.down), (self._up[group], lora.up)):
            matrix[:, place] = 0
            if group in parts:
                matrix[:, place][:, : lora.rank(group)] = parts[group]

    def _make_room(self) -> None:
        """New wide matrices, for a rank grew; slots are filled again when they are needed."""
        self._slot.clear()
        for group, (wide, out) in group_sizes(self._config).items():
            shape = (self._config.layers, self._slots * self._ranks[group])
            self._down[group] = torch.zeros((*shape, wide), dtype=self._dtype, device=self._device)
            self._up[group] = torch.zeros((*shape, out), dtype=self._dtype, device=self._device)
