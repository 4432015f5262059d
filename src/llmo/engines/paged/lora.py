"""Reads one LoRA adapter as peft saves it, checks that all of it applies, and fuses it as the base is fused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmo.engines import peft
from llmo.engines.paged.config import Config
from llmo.engines.peft import unfit

GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.lora_(A|B)\.weight")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Lora:
    """Per group of fused modules, for all layers at once: `down` `[layers, in, parts, rank]`, `up` `[layers, parts,
    rank, out]`, the scale within `up`. Each part reaches its own outputs; where modules differ in size they are one
    part, whose rank is the sum of theirs."""

    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]

    def rank(self, group: str) -> int:
        return self.down[group].shape[3] if group in self.down else 0


def group_sizes(config: Config) -> dict[str, tuple[int, int, int]]:
    """Features in, parts, and features out of each part, of each group."""
    sizes = _sizes(config)
    found = {}
    for group, names in GROUPS.items():
        outs = [sizes[name][1] for name in names]
        parts = len(outs) if len(set(outs)) == 1 else 1
        found[group] = (sizes[names[0]][0], parts, sum(outs) // parts)
    return found


def read_lora(folder: Path, config: Config, dtype: torch.dtype, device: torch.device) -> Lora:
    """Raises ModelError for an adapter of another kind or shape, one not all of whose modules apply, or one that
    changes nothing."""
    settings = peft.settings(folder)
    tensors = _tensors(folder)
    rank, scale = peft.scale(settings, folder)
    layers = range(config.layers)
    modules = _modules(tensors, settings, config, folder)
    down, up = {}, {}
    for group, (wide, parts, out) in group_sizes(config).items():
        present = [name for name in GROUPS[group] if name in modules]
        if present:
            names = GROUPS[group] if parts > 1 else present
            fused = [_fused(tensors, layer, group, names, rank, config, folder) for layer in layers]
            below = torch.stack([pair[0] for pair in fused]).to(device, dtype)
            down[group] = below.view(config.layers, parts, -1, wide).permute(0, 3, 1, 2).contiguous()
            above = torch.stack([pair[1] for pair in fused]) * scale
            up[group] = above.to(device, dtype).view(config.layers, parts, -1, out)
            if not (down[group].isfinite().all() and up[group].isfinite().all()):
                raise unfit(f"with its scale the adapter's {group} is not finite at {dtype}", folder)
    if not any((down[group].any() and up[group].any()) for group in down):
        raise unfit("the adapter changes nothing: its matrices are zero", folder, "train it before it is deployed")
    return Lora(down, up)


def _fused(
    tensors: Mapping[tuple[int, str, str], Tensor],
    layer: int,
    group: str,
    names: Sequence[str],
    rank: int,
    config: Config,
    folder: Path,
) -> tuple[Tensor, Tensor]:
    """One layer's `down` `[ranks, in]` and `up` `[ranks, out]` of a group: modules one below the other, each reaching
    only its own outputs. A module that the adapter leaves alone is zero."""
    sizes = _sizes(config)
    parts = group_sizes(config)[group][1]
    downs, ups = [], []
    for name in names:
        wide, out = sizes[name]
        a = tensors.get((layer, name, "A"), torch.zeros(rank, wide))
        b = tensors.get((layer, name, "B"), torch.zeros(out, rank))
        peft.check(f"layer {layer}'s {name}", a, b, rank, wide, out, folder)
        if name in ("q_proj", "k_proj"):
            b = config.paired(b)
        downs.append(a)
        if parts > 1:
            ups.append(b.T)
            continue
        outs = [sizes[other][1] for other in GROUPS[group]]
        place = GROUPS[group].index(name)
        ups.append(torch.nn.functional.pad(b.T, (sum(outs[:place]), sum(outs[place + 1 :]))))
    return torch.cat(downs), torch.cat(ups)


def _modules(
    tensors: Mapping[tuple[int, str, str], Tensor], settings: Mapping[str, Any], config: Config, folder: Path
) -> set[str]:
    """The modules it changes, which must be the same in every layer, and all that its settings name."""
    found = {name for _, name, _ in tensors}
    named = settings.get("target_modules")
    wanted = found | ({str(name).rsplit(".", 1)[-1] for name in named} if isinstance(named, list) else set())
    needed = {(layer, name, side) for layer in range(config.layers) for name in wanted for side in "AB"}
    missing, extra = sorted(needed - tensors.keys()), sorted(tensors.keys() - needed)
    if missing or extra or not wanted:
        layer, name, side = (missing or extra or [(0, "?", "?")])[0]
        what = f"{len(missing)} of its {len(needed)} matrices are missing" if missing else "it has layers of its own"
        raise unfit(f"not all of the adapter applies: {what}, such as layer {layer}'s {name} lora_{side}", folder)
    return wanted


def _tensors(folder: Path) -> dict[tuple[int, str, str], Tensor]:
    """`(layer, module, "A" or "B")` to the fp32 matrix."""
    found = {}
    for name, tensor in peft.tensors(folder).items():
        match = _NAME.fullmatch(name)
        place = match and (match[2] == "self_attn") == (match[3] in _ATTENTION)
        if match is None or not place or tensor.dim() != 2:
            raise unfit(f"not all of the adapter applies: this base has no place for {name}", folder / peft.TENSORS)
        found[int(match[1]), match[3], match[4]] = tensor.float()
    return found


def _sizes(config: Config) -> dict[str, tuple[int, int]]:
    """Features in and out of each module."""
    wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "q_proj": (config.hidden, wide),
        "k_proj": (config.hidden, narrow),
        "v_proj": (config.hidden, narrow),
        "o_proj": (wide, config.hidden),
        "gate_proj": (config.hidden, config.inner),
        "up_proj": (config.hidden, config.inner),
        "down_proj": (config.inner, config.hidden),
    }
