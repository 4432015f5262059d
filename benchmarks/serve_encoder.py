"""Requests a second over HTTP: an LLMO endpoint against FastAPI and a transformers pipeline, LitServe and infinity.

All serve the demo's classifier on this machine, one text a request; texts are cut from held-out articles (log-normal
lengths, mean 50 tokens), and all cut at the model's `max_length`. Windows of load alternate among the servers, and
those whose turn it is not are stopped (SIGSTOP). Beside the speed: the labels of all over HTTP against fp32, memory
(proportional set size), cold start, and what each takes when nobody asks. Load comes from `wrk` where it is installed,
else from `llmo.doors.load`.

Run `make demo` first, then: python benchmarks/serve_encoder.py [--others-python PATH] [--rounds 5] [--seconds 15]
LitServe and infinity live in an environment of their own (pip install torch==2.13.0, then litserve "transformers<5"
"infinity-emb[torch,server]"); PATH is its Python.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import wrk
from command import command

from llmo.doors import benching
from llmo.doors.load import Load, Target
from llmo.doors.plain import plain
from llmo.errors import NotFoundError
from llmo.kernel import processes
from llmo.system import System
from llmo.tasks.card import load_task, load_tokenizer

ENDPOINT = "newsdesk"  # the demo's own, which is given all cores for this
CORES = len(os.sched_getaffinity(0))
USUAL = "fastapi"
LEVELS: dict[int, tuple[str, ...] | None] = {1: None, 16: None, 64: ("llmo", USUAL)}  # clients, and who is asked
REST = 2.0  # seconds between two windows, in which what is under way ends
OTHERS = {"litserve": "litserve", "infinity": "infinity-emb"}  # sides, and the packages that they are
VERSION = "import sys; from importlib.metadata import version; print(*(f'{n} {version(n)}' for n in sys.argv[1:]))"
SERVERS = Path(__file__).with_name("others")
FIGURES = ("requests_per_second", "p50_ms", "p95_ms", "p99_ms")


@dataclass
class Side:
    """One server: how it is asked for a text, where its answer has the label, and what its processes hold."""

    url: str
    body: Callable[[str], Any]
    label: Callable[[Any], str]
    pids: dict[str, int]
    cold_seconds: float
    key: str = ""
    about: str = ""
    windows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def processes(self) -> list[psutil.Process]:
        return [one for pid in self.pids.values() for one in (psutil.Process(pid), *self._children(pid))]

    def memory(self) -> dict[str, int | None]:
        return {name: processes.memory(pid, children=name != "server") for name, pid in self.pids.items()}

    def _children(self, pid: int) -> list[psutil.Process]:
        """A server's replicas are its children, and stand for themselves."""
        return [] if pid == self.pids.get("server") else psutil.Process(pid).children(recursive=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers_once(url: str, body: Any, key: str = "", process: Any = None) -> bool:
    """Asks until there is an answer; False when the process has ended, or after a minute."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    until = time.perf_counter() + 60
    while time.perf_counter() < until and (process is None or process.poll() is None):
        with contextlib.suppress(httpx.TransportError):
            if httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False).is_success:
                return True
        time.sleep(0.02)
    return False


@contextmanager
def llmo(model: str) -> Iterator[Side]:
    """Cold start: from `llmo up` to the first answer, the endpoint's own start included."""
    try:
        server = command("up", "--detach", "--port", "0")
        key = server["key"] or command("key", "make", "benchmark", "--role", "admin")["key"]
        settings = ("--set", f"cores={CORES}", "--set", "repeats_mib=0")  # texts come again: none is to be remembered
        command("deploy", model, "--endpoint", ENDPOINT, *settings)
        command("down")
        began = time.perf_counter()
        server = command("up", "--detach", "--port", "0")
        url = f"{server['url']}/v1/endpoints/{ENDPOINT}/predict"
        assert answers_once(url, {"text": "Ready?"}, key)
        cold = time.perf_counter() - began
        with System() as system:
            endpoint = next(e for e in system.endpoints() if e.name == ENDPOINT)
            replica, _ = benching.replica_of(system, endpoint, system)
            pid = system.job(endpoint.job or 0).pid
        assert pid is not None
        yield Side(
            url, lambda text: {"text": text}, lambda found: str(found["answers"][0]["label"]),
            {"replica": pid, "server": server["pid"]}, cold, key,
            f"{endpoint.model_ref}, {endpoint.engine} {endpoint.precision}, replica alone {replica or 0:.1f} s",
        )  # fmt: skip
    finally:
        command("down")


@contextmanager
def fastapi(folder: Path, max_length: int) -> Iterator[Side]:
    from importlib import metadata

    with plain("text-classification", folder, max_length, CORES) as usual:
        about = f"fastapi {metadata.version('fastapi')}, transformers {metadata.version('transformers')}"
        yield Side(
            usual.url, lambda text: {"text": text}, lambda found: str(found[0]["label"]), {"all": usual.pid},
            usual.cold_seconds, about=about,
        )  # fmt: skip


@contextmanager
def other(name: str, python: Path, folder: Path, max_length: int, about: str) -> Iterator[Side]:
    port = free_port()
    asked: dict[str, tuple[str, Callable[[str], Any], Callable[[Any], str]]] = {
        "litserve": ("predict", lambda text: {"text": text}, lambda found: str(found["label"])),
        "infinity": (
            "classify",
            lambda text: {"model": "model", "input": [text]},
            lambda found: str(found["data"][0][0]["label"]),
        ),
    }
    path, body, label = asked[name]
    url, began = f"http://127.0.0.1:{port}/{path}", time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process: Any = psutil.Popen(
            [python, SERVERS / f"{name}_server.py", folder, str(max_length), str(port)],
            stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}, start_new_session=True,
        )  # fmt: skip
        try:
            if not answers_once(url, body("Ready?"), process=process):
                log.seek(0)
                raise SystemExit(f"{name} does not start:\n{log.read().decode('utf-8', 'replace')[-2000:]}")
            yield Side(url, body, label, {"all": process.pid}, time.perf_counter() - began, about=about)
        finally:
            family = [process, *process.children(recursive=True)] if process.is_running() else []
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.terminate()
            for one in psutil.wait_procs(family, 10)[1]:
                one.kill()


def installed(python: Path | None) -> dict[str, str]:
    """The other sides that are there, with their versions; says which are not."""
    found = {}
    for name, package in OTHERS.items():
        line = [python or sys.executable, "-c", VERSION, package, "transformers"]
        said = subprocess.run(line, check=False, capture_output=True, text=True)
        if said.returncode == 0:
            found[name] = said.stdout.strip()
        else:
            where = f"'{package}' is not installed for {python}" if python else "give --others-python PATH"
            print(f"{name} is left out: {where}", file=sys.stderr)
    return found


def mixed(rows: Sequence[dict[str, Any]], folder: Path, mean: float = 50.0, count: int = 400) -> list[str]:
    """Beginnings of held-out articles of 6 to 128 tokens, special tokens included: log-normal, of this mean."""
    tokenizer, rng = load_tokenizer(folder), random.Random(7)
    normals = [rng.gauss(0.0, 0.7) for _ in range(count)]

    def lengths(centre: float) -> list[int]:
        return [min(128, max(6, round(math.exp(centre + x)))) for x in normals]

    low, high = 1.0, 6.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if statistics.fmean(lengths(middle)) < mean else (low, middle)
    texts = []
    for length in lengths(low):
        text = rng.choice(rows)["text"]
        offsets = tokenizer.encode(text).offsets[1:-1]
        texts.append(text[: offsets[: length - 2][-1][1]])
    return texts


def answers(side: Side, texts: Sequence[str]) -> list[str]:
    headers = {"Authorization": f"Bearer {side.key}"} if side.key else {}
    with httpx.Client(headers=headers, timeout=60, trust_env=False) as client:
        return [side.label(client.post(side.url, json=side.body(text)).raise_for_status().json()) for text in texts]


def spent(side: Side) -> float:
    """Seconds of CPU that its processes have had."""
    return sum(sum(one.cpu_times()[:2]) for one in side.processes())


def busy() -> float:
    """Seconds of CPU that everybody on this machine has had."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def idle(sides: dict[str, Side], seconds: float = 3.0) -> dict[str, float]:
    """The share of one core that each takes when nobody asks."""
    before = {name: spent(side) for name, side in sides.items()}
    time.sleep(seconds)
    return {name: round((spent(side) - before[name]) / seconds, 4) for name, side in sides.items()}


def by_python(load: Load, url: str, key: str, clients: int, seconds: float, bodies: Sequence[str]) -> dict[str, Any]:
    found = load.window(Target(url, key, bodies), clients, seconds).figures()
    return {**{name: found[name] for name in FIGURES}, "failed": found["failed"], "cpu_us": found["load_us"]}


def by_wrk(url: str, key: str, clients: int, seconds: float, bodies: Sequence[str]) -> dict[str, Any]:
    found = wrk.window(url, key, clients, seconds, bodies)
    rate = (found["requests"] - found["refused"]) / found["seconds"]
    times = {name: found[name] for name in FIGURES[1:]}
    failed = found["refused"] + found["failed"]
    return {FIGURES[0]: rate, **times, "failed": failed, "cpu_us": found["cpu_us"]}


@contextmanager
def alone(sides: dict[str, Side], name: str) -> Iterator[Side]:
    """One side while all others are stopped: some take up to a sixth of a core when nobody asks them."""
    others = [one for other, side in sides.items() if other != name for one in side.processes()]
    for one in others:
        one.suspend()
    try:
        yield sides[name]
    finally:
        for one in others:
            one.resume()


def load_all(sides: dict[str, Side], texts: Sequence[str], rounds: int, seconds: float, measure: Any) -> None:
    bodies = {name: [json.dumps(side.body(text)) for text in texts] for name, side in sides.items()}
    for clients, asked in LEVELS.items():
        names = [name for name in sides if asked is None or name in asked]
        for number in range(rounds):
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                time.sleep(REST)
                with alone(sides, name) as side:
                    began, machine, own = time.perf_counter(), busy(), spent(side)
                    found = measure(side.url, side.key, clients, seconds, bodies[name])
                    took, rest = time.perf_counter() - began, busy() - machine - (spent(side) - own)
                rest -= found["cpu_us"] * found["requests_per_second"] * seconds / 1e6
                found["strangers"] = max(0.0, rest / took)
                side.windows.setdefault(clients, []).append(found)
            told = ", ".join(f"{n} {sides[n].windows[clients][-1]['requests_per_second']:.0f}" for n in names)
            print(f"{clients} clients, round {number + 1} of {rounds}, requests/s: {told}", file=sys.stderr, flush=True)


def summary(sides: dict[str, Side]) -> dict[str, Any]:
    """Medians of the rounds, and the ratios to the usual choice round by round."""
    found: dict[str, Any] = {}
    for name, side in sides.items():
        levels = []
        for clients, windows in side.windows.items():
            level: dict[str, Any] = {"clients": clients}
            level |= {key: statistics.median(one[key] for one in windows) for key in FIGURES}
            level["failed"] = sum(one["failed"] for one in windows)
            level["strangers_cores"] = max(one["strangers"] for one in windows)
            level["load_us"] = statistics.median(one["cpu_us"] for one in windows)
            pairs = list(zip(windows, sides[USUAL].windows[clients], strict=True))
            for key, of in (("times", FIGURES[0]), ("p99_ratio", "p99_ms")):
                ratios = [ours[of] / theirs[of] for ours, theirs in pairs]
                level[key] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
            levels.append(level)
        found[name] = {"about": side.about, "levels": levels, "cold_start_seconds": side.cold_seconds}
    return found


def show(found: dict[str, Any]) -> None:
    print(f"{found['texts']['count']} texts of {found['texts']['mean_tokens']:.1f} tokens at the mean; {found['load']}")
    print(
        f"{'clients':>7}  {'':9} {'requests/s':>10}  {'times':>20}  {'p50 ms':>7} {'p95 ms':>7} {'p99 ms':>7}  failed"
    )
    for clients in LEVELS:
        for name, side in found["sides"].items():
            for level in (one for one in side["levels"] if one["clients"] == clients):
                times = "{median:.2f} ({low:.2f} to {high:.2f})".format(**level["times"])
                latency = " ".join(f"{level[key]:7.1f}" for key in FIGURES[1:])
                told = f"{level['p99_ratio']['median']:14.2f}  {level['failed']}"
                print(f"{clients:7}  {name:9} {level[FIGURES[0]]:10.1f}  {times:>20}  {latency}  {told}")
    strangers = max(level["strangers_cores"] for side in found["sides"].values() for level in side["levels"])
    print(
        f"processes of strangers took at most {strangers:.2f} cores in a window; torch's spinning threads suffer most"
    )
    for name, side in found["sides"].items():
        held = " + ".join(f"{who} {(count or 0) / 2**20:.0f}" for who, count in side["memory_bytes"].items())
        start, rest = f"cold start {side['cold_start_seconds']:.1f} s", f"idle {side['idle_cores']:.1%} of a core"
        print(f"{name}: {held} MiB, {start}, {rest}; {side['about']}")
        print(f"  accuracy {side['accuracy']:.4f}, labels as fp32 {side['agreement']:.2%}")


def run(given: argparse.Namespace, folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    max_length = load_task(folder).max_length
    texts = mixed(rows, folder)
    sides: dict[str, Side] = {}
    with ExitStack() as stack:
        for name, about in installed(given.others_python).items():
            python = given.others_python or Path(sys.executable)
            sides[name] = stack.enter_context(other(name, python, folder, max_length, about))
        usual = stack.enter_context(fastapi(folder, max_length))
        sides = {"llmo": stack.enter_context(llmo(given.model)), USUAL: usual, **sides}
        said = {name: answers(side, [row["text"] for row in rows]) for name, side in sides.items()}
        if wrk.WRK is None:
            print("wrk is not on PATH; llmo.doors.load takes more of the cores", file=sys.stderr)
            measure: Any = partial(by_python, stack.enter_context(Load()))
        else:
            measure = by_wrk
        load_all(sides, texts, given.rounds, given.seconds, measure)
        found = summary(sides)
        time.sleep(REST)
        for name, share in idle(sides).items():
            right = [label == row["label"] for label, row in zip(said[name], rows, strict=True)]
            same = [ours == theirs for ours, theirs in zip(said[name], said[USUAL], strict=True)]
            found[name] |= {"accuracy": statistics.fmean(right), "agreement": statistics.fmean(same)}
            found[name] |= {"memory_bytes": sides[name].memory(), "idle_cores": share}
    lengths = [min(max_length, len(one.ids)) for one in load_tokenizer(folder).encode_batch(texts)]
    told: dict[str, Any] = {"count": len(texts), "mean_tokens": statistics.fmean(lengths), "held_out": len(rows)}
    load = "wrk" if wrk.WRK is not None else "llmo.doors.load"
    return {"texts": told, "load": load, "rounds": given.rounds, "seconds": given.seconds, "sides": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="newsdesk-compressed")
    parser.add_argument("--reference", default="model:newsdesk")
    parser.add_argument("--others-python", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of the table")
    given = parser.parse_args()
    with System() as system:
        try:
            folder = system.path(given.reference)
        except NotFoundError as error:
            parser.error(f"{error}; run `make demo` first")
        rows = system.rows(system.artifact(given.reference).inputs["data"], "test", limit=100_000)
    found = run(given, folder, rows)
    if given.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
