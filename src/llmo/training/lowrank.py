"""LoRA at the speed of the frozen model: layers that read the same input become one product, their updates included.

An adapter of rank 8 is 2% of a layer's arithmetic, but as three small products a layer, forward and back, it took half
as long as the layer itself. Here the B's stand beside the frozen weights, `[W | B]`, and the scaled `Ax` beside the
inputs, so one product adds everything up, in fp32. Frozen weights are kept in the format that is computed in (autocast
casts them anew at every step); A and B stay fp32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from llmo.training.model import Built
from llmo.training.precision import Precision

PROBE = 2  # tokens that show which layers read the same input


@dataclass(frozen=True, slots=True)
class Member:
    """A LoRA layer of peft's, called `name`: base `[out, in]`, A `[rank, in]`, B `[out, rank]`."""

    name: str
    layer: Any
    base: nn.Linear
    down: nn.Parameter
    up: nn.Parameter
    scale: float


class Joined:
    """A model whose LoRA layers run in groups, until `undo`. `built.model` is changed in place.

    The fp32 weights stay with this object: they are pages of the base's file, which the system can drop meanwhile.
    """

    def __init__(self, groups: Sequence[_Group]) -> None:
        self._groups = list(groups)

    def __len__(self) -> int:
        """How many products there are now."""
        return len(self._groups)

    def undo(self) -> None:
        """Back to peft's own layers and the weights they had."""
        for group in self._groups:
            group.undo()
        self._groups.clear()


def join(built: Built, precision: Precision) -> Joined:
    """The plain LoRA layers; others stay as they are."""
    # With activation checkpointing a whole training was measured only when groups still kept what is computed again.
    here = not getattr(built.network, "is_activation_checkpointing", False)
    members = list(_members(built)) if built.adapted and here else []
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    return Joined([_Group(group, dtype) for group in _siblings(built, members)] if members else [])


def _members(built: Built) -> Iterator[Member]:
    """The layers that are nothing but `Wx + scale * BAx`."""
    from peft.tuners.lora.layer import Linear  # seconds, and only this method needs it

    for name in built.adapted:
        layer: Any = built.network.get_submodule(name)
        if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or layer.merged:
            continue
        active = layer.active_adapters
        if len(active) != 1 or layer.lora_variant or layer.fan_in_fan_out or not layer.lora_A:
            continue
        down: Any = layer.lora_A[active[0]]
        up: Any = layer.lora_B[active[0]]
        if type(layer.lora_dropout[active[0]]) is not nn.Identity or getattr(up, "bias", None) is not None:
            continue
        yield Member(name, layer, layer.base_layer, down.weight, up.weight, layer.scaling[active[0]])


@torch.no_grad()
def _siblings(built: Built, members: Sequence[Member]) -> list[list[Member]]:
    """Layers of one module that were given the very same tensor, the others alone."""
    seen: dict[str, torch.Tensor] = {}  # holding the tensors, so that no two have one identity

    def look(name: str, _: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.setdefault(name, given[0])

    hooks = [m.layer.register_forward_pre_hook(partial(look, m.name)) for m in members]
    was = built.network.training
    built.network.eval()
    try:
        built.network(input_ids=torch.arange(PROBE, device=built.network.device)[None])
    except (TypeError, ValueError):
        seen.clear()  # it reads more than token ids
    finally:
        built.network.train(was)
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[str, int | str], list[Member]] = defaultdict(list)
    for member in members:
        read = seen.get(member.name)
        groups[member.name.rpartition(".")[0], member.name if read is None else id(read)].append(member)
    return list(groups.values())


class _Group:
    """Layers that read the same input: the first that is called with one answers for all."""

    def __init__(self, members: Sequence[Member], dtype: torch.dtype) -> None:
        self._members = members
        device = members[0].base.weight.device
        # On a GPU they would be memory of their own.
        self._originals = [m.base.weight.data.cpu() for m in members]
        self.inputs = members[0].base.in_features
        self.outs = [m.base.out_features for m in members]
        self.ranks = [len(m.down) for m in members]
        self.dtype = dtype
        self.weight = torch.zeros(sum(self.outs), self.inputs + sum(self.ranks), dtype=dtype, device=device)
        self.down = torch.empty(sum(self.ranks), self.inputs, dtype=dtype, device=device)
        scales = [torch.full((rank,), m.scale) for m, rank in zip(members, self.ranks, strict=True)]
        self.scale = torch.cat(scales).to(device)
        self.bias = self._biases()
        self._input: torch.Tensor | None = None
        self._said: dict[int, torch.Tensor] = {}
        self._downs = list(torch.split(self.down, self.ranks))
        self._ups = []
        for i, (rows, columns) in enumerate(self.places()):
            member = members[i]
            self.weight[rows, : self.inputs] = member.base.weight.detach()
            self._ups.append(self.weight[rows, self.inputs :][:, columns])
            member.base.weight.data = self.weight[rows, : self.inputs]
            member.layer.forward = _Taker(self, i)

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Each member's outputs and its ranks, among all."""
        for size, out, rank, end in zip(
            self.outs, accumulate(self.outs), self.ranks, accumulate(self.ranks), strict=True
        ):
            yield slice(out - size, out), slice(end - rank, end)

    def parameters(self) -> list[torch.Tensor]:
        """All A's, then all B's."""
        return [*(m.down for m in self._members), *(m.up for m in self._members)]

    def take(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """What a member says of `[..., in]`."""
        if x is not self._input or member not in self._said:
            self._refresh()
            said = _Product.apply(x, self, *self.parameters())  # type: ignore[no-untyped-call]
            # Not before: torch ends a checkpointed layer's second pass from within, and `x` would keep all of it alive.
            self._input, self._said = x, dict(enumerate(said))
        mine = self._said.pop(member)
        if not self._said:
            self._input = None
        return mine

    def undo(self) -> None:
        for member, original in zip(self._members, self._originals, strict=True):
            del member.layer.forward
            member.base.weight.data = original.to(self.weight.device)

    @torch.no_grad()
    def _refresh(self) -> None:
        """A and B change at every step."""
        torch._foreach_copy_([*self._downs, *self._ups], self.parameters())

    def _biases(self) -> torch.Tensor | None:
        if all(m.base.bias is None for m in self._members):
            return None
        parts: list[torch.Tensor] = []
        for member, size in zip(self._members, self.outs, strict=True):
            parts.append(torch.zeros(size) if member.base.bias is None else member.base.bias.detach())
        device = self.weight.device
        return torch.cat([part.to(device) for part in parts]).to(self.dtype)


class _Taker:
    """Stands in for a layer's `forward`."""

    def __init__(self, group: _Group, member: int) -> None:
        self._group, self._member = group, member

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.take(self._member, x)


class _Product(torch.autograd.Function):
    """`[W | B] [x, scale * Ax]`, one output a member."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: _Group, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = x.reshape(-1, group.inputs)
        wide = x.new_empty(len(given), group.weight.shape[1], dtype=group.dtype)
        wide[:, : group.inputs] = given
        wide[:, group.inputs :] = (wide[:, : group.inputs] @ group.down.t()) * group.scale
        ctx.group, ctx.shape, ctx.dtype = group, x.shape, x.dtype
        ctx.save_for_backward(wide)
        weight = group.weight.t()
        said = wide @ weight if group.bias is None else torch.addmm(group.bias, wide, weight)
        return torch.split(said.view(*x.shape[:-1], -1), group.outs, -1)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        group: _Group = ctx.group
        (wide,) = ctx.saved_tensors
        slope = wide.new_empty(len(wide), sum(group.outs))
        for (rows, _), one in zip(group.places(), outer, strict=True):
            slope[:, rows] = one.reshape(len(wide), -1)
        x, update = wide[:, : group.inputs], wide[:, group.inputs :]
        first = group.inputs if not ctx.needs_input_grad[0] else 0
        inner = slope @ group.weight[:, first:]
        before = (inner[:, group.inputs - first :] * group.scale).to(group.dtype)
        to_x = torch.addmm(inner[:, : group.inputs], before, group.down) if ctx.needs_input_grad[0] else None
        downs = torch.split((before.t() @ x).float(), group.ranks)
        both = (update.t() @ slope).float()
        ups = [both[columns, rows].t() for rows, columns in group.places()]
        return (None if to_x is None else to_x.to(ctx.dtype).view(ctx.shape), None, *downs, *ups)
