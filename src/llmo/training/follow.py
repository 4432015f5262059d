"""A process of a training on several: `python -m llmo.training.follow`, told what to do on its standard input."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.errors import JobFailed, LLMOError
from llmo.jobspecs import TrainJobSpec
from llmo.specfile import validate
from llmo.training.failures import memory_errors
from llmo.training.loop import Loop
from llmo.training.model import set_training
from llmo.training.operation import prepare
from llmo.training.parallel import NO_MEMORY, Command, Group, hung_up
from llmo.types import Device, from_json

_SET_PARENT_DEATH_SIGNAL = 1  # of prctl


class Follower(NullContext):
    """Computes on `device`, and shares the first process's folders."""

    def __init__(self, device: Device, checkpoint: Path, cache: Path) -> None:
        super().__init__(device.cores, checkpoint)
        self.device, self._cache = device, cache

    def cache(self) -> Path:
        return self._cache


def main() -> int:
    asked = json.loads(sys.stdin.buffer.read())
    _end_with(asked["leader"])
    try:
        with memory_errors():
            _follow(asked)
    except MemoryError as error:
        sys.stderr.write(f"process {asked['rank'] + 1}: {error}\n")
        return NO_MEMORY
    except (LLMOError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not hung_up(error):
            raise
        sys.stderr.write(f"process {asked['rank'] + 1}: {error}\n")
        return 1
    return 0


def _follow(asked: dict[str, Any]) -> None:
    ctx = Follower(from_json(Device, asked["device"]), Path(asked["checkpoint"]), Path(asked["cache"]))
    inputs = {name: Path(path) for name, path in asked["inputs"].items()}
    request = validate(asked["spec"], TrainJobSpec)
    ready = prepare(request, Dataset.open(inputs["data"]), inputs["model"], ctx)
    group = Group(asked["rank"], asked["size"], Path(asked["meeting"]), ready.chosen.device, ctx.device.cores)
    sharded = ready.shared_out(group)
    loop = ready.loop(ctx, sharded)
    resumed = loop.resume()
    if not group.agree(resumed):
        raise JobFailed("the first process goes on from another checkpoint", hint="run it again")
    set_training(ready.course.built.model)
    while (command := group.hear()) != Command.END:
        _do(command, group, loop, resumed)
    group.end()


def _do(command: Command, group: Group, loop: Loop, resumed: bool) -> None:
    """The first process does the same."""
    match command:
        case Command.JOIN:
            loop.join(group, resumed)
        case Command.STEP:
            loop.step()
        case Command.PACK:
            loop.tensors()
        case Command.KEEP:
            loop.keep()
        case Command.FINISH:
            loop.finish()
        case Command.RUN:
            assert loop.sharded is not None  # noqa: S101 (who says so has shared layers out)
            loop.sharded.answer()
        case Command.UNDO:
            assert loop.sharded is not None  # noqa: S101 (as above)
            loop.sharded.undo()


def _end_with(leader: int) -> None:
    """Stops are the first process's to hear; when it dies, this one does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != leader:
        raise SystemExit(1)  # it died before it could be asked for that


if __name__ == "__main__":
    raise SystemExit(main())
