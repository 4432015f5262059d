"""The process of one attempt: `python -m llmo.kernel.worker JOB_DIR` runs the operation and writes what came of it."""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import json
import logging
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo.context import Stopped
from llmo.errors import AttemptLost, EnvironmentProblem, JobFailed, LLMOError, StorageError
from llmo.files import MANIFEST, manifest_of, publish, publish_json
from llmo.kernel import jobdir, processes
from llmo.kernel.executor import DONE, FAILED, LOST, OUT_OF_MEMORY, STOPPED
from llmo.kernel.filecontext import FileContext
from llmo.kernel.local import DOORBELL, LIFELINE
from llmo.plugins import load_target
from llmo.types import Device, from_json, to_json


def main(folder: Path) -> int:
    """Run the job of a prepared directory; returns the exit code."""
    faulthandler.enable()
    lifeline = _inherited(LIFELINE)
    if lifeline is not None:
        threading.Thread(target=_die_with_scheduler, args=(folder, lifeline), name="lifeline", daemon=True).start()
    lock = os.open(folder / jobdir.LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    # Whatever else went wrong, two attempts of one job never run side by side.
    fcntl.flock(lock, fcntl.LOCK_EX)
    if lifeline is not None and select.select([lifeline], [], [], 0)[0]:
        return STOPPED  # whoever started this attempt is gone, and another may have been here since
    job = json.loads((folder / jobdir.SPEC).read_bytes())
    bell = _inherited(DOORBELL)
    ctx = FileContext(
        folder, job["attempt"], from_json(Device, job["device"]), lambda: _ring(bell), job.get("after", "")
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ctx.ask_to_stop())
    try:
        return _attempt(folder, job, ctx)
    finally:
        ctx.close()


def _attempt(folder: Path, job: Mapping[str, Any], ctx: FileContext) -> int:
    try:
        result = _run(folder, job, ctx)
        if ctx.stopped:
            return STOPPED  # what it returned may be half of the work
        _finish(folder, job["attempt"], result)
    except Stopped:
        return STOPPED
    except LLMOError as error:
        return _fail(folder, error, LOST if isinstance(error, AttemptLost) else FAILED)
    except SystemExit as error:
        return _fail(folder, JobFailed(f"the operation ended its process with {error.code!r}", hint=_see(job)), FAILED)
    # The border of foreign code: whatever it raises becomes one line for the user and a traceback in the log.
    except Exception as error:
        traceback.print_exc()
        if _out_of_memory(error):
            return _fail(folder, JobFailed("the job ran out of memory", hint=_less_memory(error)), OUT_OF_MEMORY)
        return _fail(folder, _explained(error, job), FAILED)
    return DONE


def _run(folder: Path, job: Mapping[str, Any], ctx: FileContext) -> Any:
    target = load_target(job["target"])
    inputs = {name: Path(path) for name, path in job["inputs"].items()}
    return target(job["spec"], inputs, folder / jobdir.OUT, ctx)


def _finish(folder: Path, attempt: int, result: Any) -> None:
    """The result first and the manifest last: when the manifest is there, everything is."""
    publish_json(folder / jobdir.RESULT, to_json(result if result is not None else {}))
    out = folder / jobdir.OUT
    publish_json(out / MANIFEST, {"attempt": attempt, "files": manifest_of(out)})


def _fail(folder: Path, error: LLMOError, code: int) -> int:
    shutil.rmtree(folder / jobdir.OUT, ignore_errors=True)  # half of a model may have filled the disk
    sys.stderr.write(f"{error.code}: {error}\n")
    try:
        publish(folder / jobdir.ERROR, json.dumps(error.to_json(), default=str))
    except (StorageError, OSError) as trouble:
        sys.stderr.write(f"{trouble}\n")  # the exit code still says what happened
    return code


def _explained(error: Exception, job: Mapping[str, Any]) -> LLMOError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or os.strerror(errno.ENOSPC) in str(error):  # safetensors and Arrow have errors of their own
        return StorageError(
            "the disk is full", hint="free some space and run it again: it goes on from its last checkpoint"
        )
    if isinstance(error, ImportError):
        return EnvironmentProblem(
            f"the operation '{job['op']}' needs a package that is not installed: {error.name or error}",
            hint="install the full set with: pip install 'llmo-os[all]' (see `llmo doctor`)",
        )
    lines = str(error).strip().splitlines()
    cause = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    return JobFailed(f"the operation '{job['op']}' failed: {cause}", hint=_see(job))


_ALLOCATORS = ("can't allocate memory", "std::bad_alloc", "Failed to allocate memory")
_LESS_MEMORY = "use a smaller batch_size or max_length, or a smaller model; or free memory on the machine"


def _less_memory(error: BaseException) -> str:
    """What an operation of ours says in its MemoryError; what NumPy or an allocator says there helps nobody."""
    said = str(error) if isinstance(error, MemoryError) else ""
    return _LESS_MEMORY if not said or any(words in said for words in (*_ALLOCATORS, "Unable to allocate")) else said


def _see(job: Mapping[str, Any]) -> str:
    return f"see `llmo logs {job['job']}`"


def _out_of_memory(error: BaseException) -> bool:
    """MemoryError, or what torch and ONNX Runtime raise in its place; neither is imported to ask."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in text for words in _ALLOCATORS)
    )


def _inherited(variable: str) -> int | None:
    """A pipe's end named in the environment; what this process starts does not get it."""
    text = os.environ.pop(variable, None)
    if text is None:
        return None
    os.set_inheritable(int(text), False)
    return int(text)


def _die_with_scheduler(folder: Path, lifeline: int) -> None:
    os.read(lifeline, 1)  # nobody writes: it returns when the other end is closed
    processes.kill(processes.members(folder))  # what moved to a session of its own
    os.killpg(0, signal.SIGKILL)


def _ring(bell: int | None) -> None:
    if bell is not None:
        try:
            os.write(bell, b"e")
        except OSError:
            return  # full: it rings already


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end: a thread that the operation forgot would keep the job up for ever.
    os._exit(code)
