"""Small operations that behave well or badly in one known way, for tests of the kernel."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo.context import Context, Stopped
from llmo.errors import DataError, SpecError
from llmo.files import publish_json
from llmo.plugins import Operation
from llmo.types import Kind, Needs

MIB = 1 << 20


def record(path: str, line: str) -> None:
    """One line, appended in one write, so that lines of several processes never mix."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def write(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Write `text`, after the text of its inputs."""
    text = "".join((path / "text.txt").read_text() for _, path in sorted(inputs.items())) + spec["text"]
    (out / "text.txt").write_text(text)
    publish_json(out / "llmo.json", {"task": {"task": "none"}, "engine": "test", "precision": "fp32"})
    if spec.get("log"):
        record(spec["log"], text)
    ctx.report(1, 1, length=len(text))
    print("wrote", text)
    return {"length": len(text), "cores": ctx.device.cores, "threads": os.environ["OMP_NUM_THREADS"]}


def count(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Add up 1 to `steps`, with a checkpoint after each step; the log says `overlap` when two do so at once."""
    guard = os.open(spec["log"] + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        record(spec["log"], "overlap")
    record(spec["log"], "begin")
    saved = ctx.checkpoint() / "state.json"
    state = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "total": 0}
    while state["step"] < spec["steps"]:
        if ctx.should_stop():
            raise Stopped
        step = state["step"] + 1
        state = {"step": step, "total": state["total"] + step}
        publish_json(saved, state)
        ctx.report(step, spec["steps"])
        pause(spec.get("pause", 0.0))
    (out / "total.txt").write_text(str(state["total"]))
    record(spec["log"], "end")
    return {"total": state["total"]}


def wait(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Wait to be stopped, or for the file `until`."""
    ctx.note("waiting")
    while not ctx.should_stop():
        if spec.get("until") and Path(spec["until"]).exists():
            return {}
        pause(0.005)
    raise Stopped


def stubborn(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Begin to write, and never look whether it should stop."""
    (out / "half").write_text("half")
    ctx.note("begun")
    while True:
        pause(10)


def breed(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Start processes in its group and in a session of their own, note their numbers, and end or wait."""
    command = [sys.executable, "-c", "import signal\nwhile True: signal.pause()"]
    children = [subprocess.Popen(command), subprocess.Popen(command, start_new_session=True)]
    ctx.note(" ".join(str(child.pid) for child in children))
    if spec.get("stay"):
        return wait(spec, inputs, out, ctx)
    if spec.get("vanish"):
        os._exit(0)
    return {}


def fail(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Fail in the way that `how` says; with a `log`, only as often as `times`."""
    if spec.get("log"):
        record(spec["log"], "run")
        if len(Path(spec["log"]).read_text().splitlines()) > spec["times"]:
            return {"after": spec["times"]}
    match spec["how"]:
        case "refuse":
            raise DataError("the file is empty", hint="give another", where="data.csv")
        case "crash":
            raise RuntimeError("a bolt is loose\nand more")
        case "memory":
            raise MemoryError(*spec.get("why", []))
        case "exit":
            sys.exit(9)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "full":
            raise OSError(28, "No space left on device")
        case "import":
            import no_such_package  # noqa: F401
        case "nan":
            return {"score": float("nan")}
        case "early":
            os._exit(0)
    return {}


def babble(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Write what no event is between events."""
    ctx.note("before")
    with open(out.parent / "events.jsonl", "ab") as file:
        file.write(
            b'not json\n{"at": 1, "kind": "spawn", "data": {}}\n\xff\xfe\n[1]\n{"at":1,"kind":"odd","data":{}}\n'
        )
        file.write(b'{"at": 1, "kind": "note", "data": {"text": "\\ud800"}}\n')
    ctx.note("after \ud800")
    for step in range(1000):
        ctx.report(step + 1, 1000, loss=float("nan") if step == 999 else 1.0)
    return {}


def parent(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Spawn `children` one after another (or all `at_once`) and gather what they say."""
    if spec.get("log"):
        record(spec["log"], "parent")
    results = {}
    children = spec["children"]
    for key, child in children.items() if spec.get("at_once") else []:
        ctx.spawn(key, child["op"], child["spec"], child.get("inputs", {}), child.get("name", ""))
    for key, child in children.items():
        ctx.spawn(key, child["op"], child["spec"], child.get("inputs", {}), child.get("name", ""))
        while (result := ctx.result(key)) is None:
            if ctx.should_stop():
                raise Stopped
            pause(0.005)
        results[key] = {
            "state": result.state,
            "cached": result.cached,
            "output": result.output,
            "ref": result.ref,
            "result": dict(result.result),
            "error": dict(result.error or {}),
        }
        if spec.get("die_after") == key and ctx.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if result.error and spec.get("strict"):
            raise SpecError("a child failed")
    return results


def choose(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Spawn `keep` and `drop` over its own input, stop `drop`, and gather both."""
    needs = Needs(cores=1, cores_max=1, memory=MIB)
    ctx.spawn("drop", "wait", {}, {"model": "input:model"}, needs=needs)
    ctx.spawn("keep", "write", {"text": "kept"}, {"model": "input:model"}, "kept", needs=needs)
    while ctx.result("keep") is None:
        pause(0.005)
    for key in ("drop", "drop", "keep", "nobody"):
        ctx.stop(key)
    while (dropped := ctx.result("drop")) is None:
        pause(0.005)
    return {"dropped": dropped.state, "why": dropped.reason}


def serve(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """A service that says where it is and stays until it is stopped or the file `die` appears."""
    if spec.get("log"):
        record(spec["log"], f"serve {ctx.attempt}")
    if spec.get("refuse") or Path(spec.get("fail_if", "")).is_file():
        raise DataError("this model cannot be served")
    ctx.ready(f"unix:/test/{os.getpid()}")
    while not ctx.should_stop():
        if spec.get("die") and Path(spec["die"]).exists():
            Path(spec["die"]).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        pause(0.005)
    return {}


def _op(name: str, **options: Any) -> Operation:
    return Operation(name, f"support.ops:{name}", **({"needs": Needs(memory=MIB)} | options))


OPERATIONS = {
    op.name: op
    for op in (
        _op("write", produces=Kind.MODEL),
        _op("count", produces=Kind.REPORT, needs=Needs(cores=1, cores_max=1, memory=MIB)),
        _op("wait"),
        _op("stubborn"),
        _op("breed"),
        _op("fail"),
        _op("babble"),
        _op("parent", cached=False, needs=Needs(cores=0, cores_max=0, memory=MIB)),
        _op("choose", cached=False, needs=Needs(cores=0, cores_max=0, memory=MIB)),
        _op("serve", service=True),
        Operation("short", "support.ops:write", produces=Kind.MODEL, needs=Needs(memory=MIB), makes_room=True),
        Operation("missing", "support.no_such_module:run", needs=Needs(memory=MIB)),
    )
}


def lookup(name: str) -> Operation:
    """Stands where `plugins.operation` stands in a real system."""
    if name not in OPERATIONS:
        raise SpecError(f"unknown operation '{name}'")
    return OPERATIONS[name]
