"""One training on several processes: each takes its share of every batch, and their gradients are added up.

A batch's loss is a sum over its rows, divided by their mass, so that shares of any size add up to the gradients of one
process but for the order in which numbers are added. The job's own process is the first: it evaluates, reports and
keeps checkpoints, and says what is to be done (`Command`). The others follow (`follow`): same seed, same rows, same
weights, so that all that travels are gradients (data parallelism, as in Li et al. 2020, arXiv:2006.15704). Where a
model does not fit one device its layers are shared out too (`sharded`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from llmo.context import Context
from llmo.errors import AttemptLost, NeedsError
from llmo.jobspecs import TrainJobSpec
from llmo.training.failures import StepTooLarge
from llmo.types import Device, to_json

BUCKET = 16 << 20  # numbers of gradients that are added up at once
PATIENCE = timedelta(days=7)  # an evaluation of the first process may take long; the death of one is noticed at once
DYING_SECONDS, LEAVING_SECONDS = 2.0, 10.0  # from hanging up to being gone, and from the end
POLL_SECONDS = 0.01
NO_MEMORY = 5  # what a process that found none ends with
Rows = NDArray[np.int64]


class Command(IntEnum):
    """What all processes do next."""

    END = 0
    JOIN = 1  # begin with the first one's weights
    STEP = 2
    RUN = 3  # a layer, outside of a step
    PACK = 4  # put what a checkpoint holds together
    KEEP = 5  # these weights, the best until now
    FINISH = 6  # the steps are over
    UNDO = 7  # give the first process whole layers


class HungUp(RuntimeError):
    """Another process of the training is not there any more."""


@contextmanager
def _talking() -> Iterator[None]:
    """A process that died hangs up, and gloo and NCCL say so in many ways."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise HungUp(str(error)) from error


def hung_up(error: RuntimeError) -> bool:
    """Whether it says that another process is not there any more: layers that are shared out talk by themselves."""
    return isinstance(error, HungUp | distributed.DistError) or "/gloo/" in str(error)


class Group:
    """The processes of one training; this one is number `rank` of `size`, on `cores` of its own. They meet in the file
    `meeting`."""

    @_talking()
    def __init__(self, rank: int, size: int, meeting: Path, device: torch.device, cores: int) -> None:
        self.rank, self.size, self.cores = rank, size, cores
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if rank:
            _door(meeting, rank).touch()
        distributed.init_process_group(
            backend, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=PATIENCE
        )

    @_talking()
    def same(self, parameters: Sequence[torch.Tensor]) -> None:
        """Give all the first one's weights."""
        for p in parameters:
            distributed.broadcast(p.detach(), 0)

    @_talking()
    def agree(self, resumed: bool) -> bool:
        """Whether the first process says the same."""
        said = torch.tensor(int(resumed))
        distributed.broadcast(said, 0)
        return bool(said) == resumed

    def share(self, lengths: Rows, batch: Rows) -> Rows:
        """This process's rows of a batch: the longest are dealt out first, back and forth, so that all have about as
        many tokens."""
        ordered = batch[np.argsort(-lengths[batch], kind="stable")]
        turn = np.arange(len(ordered)) % (2 * self.size)
        mine: Rows = ordered[np.minimum(turn, 2 * self.size - 1 - turn) == self.rank]
        return mine

    @_talking()
    def begin(self, seed: int, step: int, apart: bool = True) -> None:
        """Of a step: the first process says so. The others draw random numbers of their own for it; where processes
        are not `apart`, all draw the same ones."""
        if self.rank == 0:
            self.tell(Command.STEP)
        if self.rank or not apart:
            own = [self.rank] if apart else []
            torch.manual_seed(int(np.random.SeedSequence([seed, step, *own]).generate_state(1)[0]))

    @_talking()
    def tell(self, command: Command) -> None:
        """Have the others do something, which this process does too."""
        distributed.broadcast(torch.tensor(int(command)), 0)

    @_talking()
    def hear(self) -> Command:
        """What the first process says; waits until it does."""
        said = torch.tensor(0)
        distributed.broadcast(said, 0)
        return Command(int(said))

    @_talking()
    def send(self, value: Any) -> None:
        """To the others, who `receive` it; tensors are on the CPU."""
        distributed.broadcast_object_list([value], 0)

    @_talking()
    def receive(self) -> Any:
        found: list[Any] = [None]
        distributed.broadcast_object_list(found, 0)
        return found[0]

    @_talking()
    def most(self, count: int) -> int:
        """The largest count of any process."""
        said = torch.tensor(count)
        distributed.all_reduce(said, distributed.ReduceOp.MAX)
        return int(said)

    @_talking()
    def add_up(self, parameters: Sequence[torch.Tensor], mass: float, loss: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Make the gradients, sums over `mass` here, means over the whole batch everywhere; so with the loss `[]`. The
        whole batch's mass comes with it."""
        learnt = [float(p.grad is not None) for p in parameters]
        tail = torch.tensor([mass, float(loss), *learnt], dtype=torch.float64)
        distributed.all_reduce(tail)
        whole = float(tail[0]) or 1.0
        wanted = [p for p, count in zip(parameters, tail[2:].tolist(), strict=True) if count]
        for p in wanted:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in wanted if p.grad is not None]):
            flat = torch.cat([slope.flatten() for slope in bucket])
            distributed.all_reduce(flat)
            parts = torch.split(flat.div_(whole), [slope.numel() for slope in bucket])
            torch._foreach_copy_(list(bucket), [part.view_as(slope) for part, slope in zip(parts, bucket, strict=True)])
        return (tail[1] / whole).to(loss), whole

    @_talking()
    def end(self) -> None:
        """Of the training; the first process says so."""
        if self.rank == 0:
            self.tell(Command.END)
        distributed.destroy_process_group()


@contextmanager
def group(
    request: TrainJobSpec, inputs: Mapping[str, Path], ctx: Context, device: torch.device
) -> Iterator[Group | None]:
    """The other processes of `request.devices`, started; None where there are none. They end with the block. Raises
    AttemptLost when one dies, StepTooLarge when one finds no memory, and NeedsError before that for too many."""
    size = request.devices
    if size == 1:
        yield None
        return
    places = _places(ctx.device, size)
    with tempfile.TemporaryDirectory(prefix="llmo-") as folder:
        meeting = Path(folder) / "meeting"
        others: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, size):
                seat = {"rank": rank, "size": size, "meeting": str(meeting)}
                others.append(_start(request, inputs, ctx, places[rank], seat))
            _await(others, meeting)
            found = Group(0, size, meeting, device, places[0].cores)
            yield found
            found.end()
        except RuntimeError as error:
            lost = _lost(others, size) if hung_up(error) else None
            if lost is None:
                raise
            raise lost from error
        finally:
            _finish(others)
            torch.set_num_threads(max(1, ctx.device.cores))
            if distributed.is_initialized():
                distributed.destroy_process_group()


def _places(device: Device, size: int) -> list[Device]:
    """What each process computes on: its part of the cores, or a GPU each."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if device.kind == "cuda":
        if len(visible) < size:
            raise NeedsError(
                f"train.devices is {size}, and the job was given {len(visible)} GPU{'s' * (len(visible) != 1)}",
                hint=f"llmo train --gpus {size}",
            )
        names = [f"cuda:{name}" for name in visible]
        return [Device(name, "cuda", device.memory, device.free, device.cores) for name in names[:size]]
    if device.cores < size:
        raise NeedsError(
            f"train.devices is {size}, and the job was given {device.cores} core{'s' * (device.cores != 1)}",
            hint=f"llmo train --cores {size}, or set train.devices lower",
        )
    return [Device(device.name, "cpu", device.memory, device.free, device.cores // size)] * size


def _start(
    request: TrainJobSpec, inputs: Mapping[str, Path], ctx: Context, place: Device, seat: dict[str, Any]
) -> subprocess.Popen[bytes]:
    asked = seat | {
        "spec": request.plain(),
        "inputs": {name: str(path) for name, path in inputs.items()},
        "device": to_json(place),
        "checkpoint": str(ctx.checkpoint()),
        "cache": str(ctx.cache()),
        "leader": os.getpid(),
    }
    command = [sys.executable, "-P", "-m", "llmo.training.follow"]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert started.stdin is not None  # noqa: S101 (as asked for)
    with suppress(BrokenPipeError), started.stdin:  # of one that is gone already, which is noticed where it is awaited
        started.stdin.write(json.dumps(asked).encode())
    return started


def _door(meeting: Path, rank: int) -> Path:
    """The file that says that a process is about to meet the others."""
    return meeting.with_name(f"here-{rank}")


def _await(others: Sequence[subprocess.Popen[bytes]], meeting: Path) -> None:
    """Until all others are about to meet: nothing hangs up when one dies before. Raises HungUp when one did."""
    while not all(_door(meeting, rank).exists() for rank in range(1, len(others) + 1)):
        if any(process.poll() is not None for process in others):
            raise HungUp("a process of the training ended before its first step")
        time.sleep(POLL_SECONDS)


def _lost(others: Sequence[subprocess.Popen[bytes]], size: int) -> Exception | None:
    """Which process died, if one did. Those that it left alone end soon after, with an error of their own."""
    until = time.monotonic() + DYING_SECONDS
    while any(process.poll() is None for process in others) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    codes = [(process.poll(), number) for number, process in enumerate(others, 2)]
    ended = [(code, number) for code, number in codes if code is not None]
    if not ended:
        return None
    code, number = min(ended, key=lambda one: (one[0] != NO_MEMORY, one[0] >= 0))
    if code == NO_MEMORY:
        return StepTooLarge(f"process {number} of {size} found no memory")
    how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
    return AttemptLost(
        f"process {number} of {size} of this training ended {how}",
        hint="see `llmo logs`; running it again goes on from the last checkpoint",
    )


def _finish(others: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in others:
        try:
            process.wait(LEAVING_SECONDS if sys.exc_info()[0] is None else 0.1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _buckets(slopes: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    part: list[torch.Tensor] = []
    for slope in slopes:
        if part and sum(one.numel() for one in part) + slope.numel() > BUCKET:
            yield part
            part = []
        part.append(slope)
    if part:
        yield part
