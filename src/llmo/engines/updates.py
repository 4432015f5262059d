"""LoRA updates of an encoder's trunk: each checked when it is read, and those of a batch added row by row.

Every row of a batch has the matrices of its own update, one product a module for all rows. A row without an update
is beyond the last that has one, so it is what it is without any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmo.engines import peft
from llmo.engines.peft import unfit
from llmo.errors import ModelError

_SIDES = {".lora_A.weight": "down", ".lora_B.weight": "up"}
_PREFIX = "base_model.model."

Pair = tuple[Tensor, Tensor]  # `[rank, in]` and `[rank, out]`, the factor within the second
Update = Mapping[str, Pair]  # by module, as the whole model calls it


def read(folder: Path, modules: Mapping[str, nn.Linear], head: frozenset[str], device: torch.device) -> Update:
    """The update in an adapter's folder; `modules` are those of the trunk, and `head` the tensors beside it.

    Raises ModelError for one of another kind or shape, one not all of whose modules apply, or one that changes nothing.
    """
    settings = peft.settings(folder, allowed=("modules_to_save",))
    rank, scale = peft.scale(settings, folder)
    found: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}}
    for name, tensor in peft.tensors(folder).items():
        inner = name.removeprefix(_PREFIX)
        side = next((side for side in _SIDES if inner.endswith(side)), None)
        module = inner.removesuffix(side) if side else inner
        if side and module in modules:
            found[_SIDES[side]][module] = tensor.float()
        elif inner not in head:
            raise _misplaced(name, folder)
    named = settings.get("target_modules")
    wanted = found["down"].keys() | found["up"].keys() | (set(named) if isinstance(named, list) else set())
    made = {name: _pair(name, found, modules, rank, scale, folder, device) for name in _full(wanted, modules, folder)}
    if not any(down.any() and up.any() for down, up in made.values()):
        raise unfit("the adapter changes nothing: its matrices are zero", folder, "train it before it is served")
    return made


def _full(wanted: set[str], modules: Mapping[str, nn.Linear], folder: Path) -> list[str]:
    """The modules that are meant; a setting may name one by its end, as peft does."""
    full = []
    for name in sorted(wanted):
        meant = [name] if name in modules else [known for known in modules if known.endswith(f".{name}")]
        if not meant:
            raise _misplaced(name, folder)
        full += meant
    return sorted(set(full))


def _pair(
    name: str,
    found: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, nn.Linear],
    rank: int,
    scale: float,
    folder: Path,
    device: torch.device,
) -> Pair:
    down, up = found["down"].get(name), found["up"].get(name)
    wide, out = modules[name].in_features, modules[name].out_features
    if down is None or up is None:
        raise unfit(f"not all of the adapter applies: a matrix of {name} is missing", folder)
    peft.check(name, down, up, rank, wide, out, folder)
    return down.contiguous().to(device), (up.T * scale).contiguous().to(device)


def _misplaced(name: str, folder: Path) -> ModelError:
    return unfit(
        f"not all of the adapter applies: this trunk has no place for {name} where the texts of a batch are apart",
        folder,
        "train it on this very trunk, or with `method: head`, or deploy it by itself",
    )


class Updates:
    """Adds the updates of a batch to what the trunk's modules make. Used by the engine's thread alone."""

    def __init__(self, modules: Mapping[str, nn.Linear]) -> None:
        self._modules = modules
        self._hooked: set[str] = set()
        self._rows: dict[str, list[Pair]] = {}  # by module, of the first rows of the batch

    def apply(self, rows: Sequence[Update]) -> None:
        """From now on the first rows of a batch have these updates, one each; none with an empty list."""
        each = list({id(update): update for update in rows}.values())
        self._rows = {}
        for name in {name for update in each for name in update}:
            if name not in self._hooked:
                self._hooked.add(name)
                self._modules[name].register_forward_hook(partial(self._add, name))
            alike = _alike([update.get(name) for update in each])
            of = {id(update): pair for update, pair in zip(each, alike, strict=True)}
            self._rows[name] = [of[id(update)] for update in rows]

    def _add(self, name: str, module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        pairs = self._rows.get(name)
        if pairs is not None:
            # Gathered here and not ahead for all modules: what was just written is still in the processor's caches.
            down, up = (torch.stack(side) for side in zip(*pairs, strict=True))
            inner = torch.bmm(given[0][: len(pairs)], down.transpose(1, 2))
            out[: len(pairs)].baddbmm_(inner, up)


def _alike(pairs: Sequence[Pair | None]) -> list[Pair]:
    """All of the largest rank, filled up with zeros; an update without the module is all zeros."""
    known = [pair for pair in pairs if pair is not None]
    rank = max(len(down) for down, _ in known)
    nothing = (known[0][0][:0], known[0][1][:0])
    filled = []
    for pair in pairs:
        down, up = pair or nothing
        more = (0, 0, 0, rank - len(down))
        filled.append((nn.functional.pad(down, more), nn.functional.pad(up, more)) if len(down) < rank else (down, up))
    return filled
