"""A model whose layers are shared out among the processes of a training, so that it need not fit one device.

`fsdp`: each process holds a slice of every weight of a layer, of its gradient and of the optimiser's state, and learns
from its own rows; the slices are put together where the layer runs (Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et
al. 2023, arXiv:2304.11277), by torch's `fully_shard`. `tensor`: each computes its part of the heads and of the feed-
forward, of all rows (Shoeybi et al. 2019, arXiv:1909.08053), by `torch.distributed.tensor`. What is in no layer
(embeddings, final norm, head) is whole everywhere.

Outside of steps a layer that the first process runs is run by all, so that whatever measures the model knows nothing of
this; and in the end the first process has whole layers again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from llmo.errors import SpecError
from llmo.training.checkpoint import weight_of
from llmo.training.model import Built, layers
from llmo.training.parallel import Command, Group
from llmo.training.precision import Precision
from llmo.training.scoring import measuring

# Of a layer of BERT's family; those of others are in their configs.
ENCODER = {
    **dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), "colwise"),
    **{"attention.output.dense": "rowwise", "intermediate.dense": "colwise", "output.dense": "rowwise"},
}
STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
Named = dict[str, nn.Parameter]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer stands, and the same layer without weights."""

    among: nn.ModuleList
    number: int
    empty: nn.Module
    buffers: Mapping[str, torch.Tensor]


def check(built: Built, kind: str, size: int) -> None:
    """Raises SpecError for a model whose layers cannot be shared out so."""
    config = built.network.config
    if not layers(built.network):
        raise SpecError(f"'{config.model_type}' has no layers to share out", hint="leave train.parallelism out")
    if kind != "tensor":
        return
    _plan(built)
    for name in DIVIDED:
        count = getattr(config.get_text_config(), name, None)
        if isinstance(count, int) and count % size:
            raise SpecError(
                f"parallelism: tensor gives each process as many of the model's {count} {name}, and train.devices is "
                f"{size}",
                hint=f"set train.devices to a divisor of {count}, or train.parallelism to fsdp",
            )


class Sharded:
    """Of a model that stands on the CPU, `built`, in this process of the `group`. It is changed in place, and put on
    the device of `precision`."""

    def __init__(self, built: Built, kind: str, group: Group, precision: Precision) -> None:
        self._built, self._group, self._device = built, group, precision.device
        self._mesh: DeviceMesh = init_device_mesh(precision.device.type, (group.size,))
        self._stepping = False
        self._places: list[Place] = []
        self.rows_are_shared_out = kind == "fsdp"
        plan = _plan(built) if kind == "tensor" else {}
        among = layers(built.network)
        for number, layer in enumerate(among):
            same = {id(built.network.config): built.network.config}
            empty = copy.deepcopy(layer, same).to("meta")
            buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
            self._places.append(Place(among, number, empty, buffers))
            if kind == "tensor":
                layer.to(self._device)
                parallelize_module(layer, self._mesh, {name: STYLES[style]() for name, style in plan.items()})
            else:
                fully_shard(layer, mesh=self._mesh)
                assert isinstance(layer, FSDPModule)  # noqa: S101 (as it makes it one)
                layer.set_gradient_divide_factor(1.0)  # gradients are sums, as elsewhere here
                layer.set_force_sum_reduction_for_comms(True)
            layer.register_forward_pre_hook(partial(self._tell, number), prepend=True, with_kwargs=True)
        built.model.to(self._device)
        self.weights: Named = {}  # that learn, with the shapes of whole ones
        self._here: Named = {}

    def take(self) -> Named:
        """What this process has of the weights that learn now, in the same memory."""
        self.weights = dict(self._built.trainable())
        self._here = {
            name: nn.Parameter(_local(p.detach())) if isinstance(p, DTensor) else p for name, p in self.weights.items()
        }
        return self._here

    def is_slice(self, name: str) -> bool:
        """Whether this process has a part of it only."""
        p = self.weights[name]
        return isinstance(p, DTensor) and p.placements[0].is_shard()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within, all processes run the layers by themselves."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def take_gradients(self, mass: float) -> None:
        """Of the slices, sums until now: means over `mass`."""
        for name, p in self.weights.items():
            if isinstance(p, DTensor) and p.grad is not None:
                slope: Any = p.grad
                self._here[name].grad = slope.redistribute(placements=p.placements).to_local() / mass
                p.grad = None

    def clip(self, most: float) -> torch.Tensor:
        """As `clip_grad_norm_`, over all slices of all processes: the norm `[]` before."""
        slopes: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for name, p in self._here.items():
            if p.grad is not None:
                slopes[self.is_slice(name)].append(p.grad)
        squares = nn.utils.get_total_norm(slopes[True]).to(self._device) ** 2
        distributed.all_reduce(squares)
        norm = (squares + nn.utils.get_total_norm(slopes[False]).to(self._device) ** 2).sqrt()
        nn.utils.clip_grads_with_norm_(list(self._here.values()), most, norm)
        return norm

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors put together, on the CPU of the first process. All have to ask, for the same ones."""
        found = {}
        for key, tensor in tensors.items():
            name = weight_of(key)
            p = self.weights[name]
            put = tensor.detach()
            if isinstance(p, DTensor) and tensor.shape == self._here[name].shape:
                about: dict[str, Any] = {"shape": p.shape, "stride": p.stride(), "run_check": False}
                there = DTensor.from_local(put.to(self._device), p.device_mesh, p.placements, **about)
                put = there.full_tensor()
            if self._group.rank == 0:
                found[key] = put.cpu()
        return found

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's slices of what `whole` gave."""
        return {key: self._part(weight_of(key), tensor) for key, tensor in tensors.items()}

    def _part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        p = self.weights[name]
        if tensor.shape != p.shape or not self.is_slice(name):
            return tensor
        pieces = tensor.chunk(self._group.size, _dimension(p))
        there = self._group.rank < len(pieces)
        return pieces[self._group.rank] if there else tensor.new_empty(self._here[name].shape)

    def undo(self) -> None:
        """Give the first process whole layers again, on the CPU."""
        if self._group.rank == 0:
            self._group.tell(Command.UNDO)
        for place in self._places:
            weights = dict(place.among[place.number].named_parameters())
            whole = place.empty.to_empty(device="cpu") if self._group.rank == 0 else None
            target = {} if whole is None else dict(whole.named_parameters())
            for name, p in weights.items():
                value = p.detach()
                value = value.full_tensor() if isinstance(value, DTensor) else value
                if whole is not None:
                    target[name].data.copy_(value)
            if whole is not None:
                for name, buffer in whole.named_buffers():
                    buffer.copy_(place.buffers[name])
                place.among[place.number] = whole
        if self._group.rank == 0:
            self._built.model.to("cpu")

    def _tell(self, number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have the other processes run a layer that this one is about to run outside of a step."""
        if self._group.rank or self._stepping:
            return
        kind = self._device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        self._group.tell(Command.RUN)
        self._group.send((number, "bf16" if cast else "fp32", _moved((args, kwargs), torch.device("cpu"))))

    def answer(self) -> None:
        """Run a layer because the first process does."""
        number, precision, given = self._group.receive()
        args, kwargs = _moved(given, self._device)
        place = self._places[number]
        layer = place.among[place.number]
        with measuring(layer, Precision(precision, self._device, "as the first process")):
            layer(*args, **kwargs)


def _moved(value: Any, device: torch.device) -> Any:
    """What a layer is given, with its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(one, device) for one in value)
    return {key: _moved(one, device) for key, one in value.items()} if isinstance(value, dict) else value


def _local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.to_local()
    return found


def _dimension(p: Any) -> int:
    """That it is sliced along."""
    return int(p.placements[0].dim)


def _plan(built: Built) -> dict[str, str]:
    """How the linear layers of one of the model's layers are shared out, by name within it."""
    config = built.network.config.get_text_config()
    theirs = getattr(config, "base_model_tp_plan", None) or {}
    plan = {name.split(".*.", 1)[1]: style for name, style in theirs.items() if ".*." in name}
    layer = layers(built.network)[0]
    linear = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    plan = plan or {name: style for name, style in ENCODER.items() if name in linear}
    strange = sorted(set(plan.values()) - set(STYLES))
    if strange or set(plan) != set(linear):
        raise SpecError(
            f"how '{config.model_type}' is shared out within its layers is not known",
            hint="set train.parallelism to fsdp",
        )
    return plan
