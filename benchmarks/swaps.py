"""Load without a pause while an endpoint is swapped between variants of its model: no request fails, memory is flat.

16 clients ask the whole time, and no answer is remembered; every 20 s the endpoint gets the other variant. Tells
requests, failures, swaps, and the memory (proportional set size) of the server, and of each variant's replicas, in
each third of the time.
Run `make demo` first, then: python benchmarks/swaps.py [--minutes 10] [--every 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import psutil
from command import command

from llmo.doors.load import Load, Target
from llmo.kernel import processes
from llmo.system import System

ENDPOINT, CLIENTS = "swapped", 16
VARIANTS = ("native-int8", "onnx-int8-static")


class Memory(threading.Thread):
    """Looks at the processes once a second. `serving` is the number of the model that was deployed last."""

    def __init__(self, server: int) -> None:
        super().__init__(daemon=True)
        self.serving = 0
        self.over = threading.Event()
        self._server = psutil.Process(server)
        self._own: list[float] = []  # the server's MB
        self._replicas: dict[int, list[float]] = {}  # by model, while there is one replica

    def run(self) -> None:
        while not self.over.wait(1.0):
            replicas, serving = [child.pid for child in self._server.children()], self.serving
            held = sum(processes.memory(pid, children=True) or 0 for pid in replicas)
            self._own.append((processes.memory(self._server.pid, children=False) or 0) / 1e6)
            if len(replicas) == 1:
                self._replicas.setdefault(serving % len(VARIANTS), []).append(held / 1e6)

    def said(self) -> str:
        sides = {"server": self._own, **{VARIANTS[number]: seen for number, seen in self._replicas.items()}}
        return "; ".join(f"{name} {thirds(seen)}" for name, seen in sides.items())


def thirds(seen: Sequence[float]) -> str:
    """The medians of the first, the second and the last third."""
    cuts = [number * len(seen) // 3 for number in range(4)]
    return ", ".join(f"{statistics.median(seen[a:b]):.0f}" for a, b in pairwise(cuts) if b > a)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=20.0)
    given = parser.parse_args()
    with System() as system:
        rows = system.rows(system.artifact("model:newsdesk").inputs["data"], "test", limit=400)
    bodies = [json.dumps({"text": " ".join(row["text"].split()[: 5 + i % 60])}) for i, row in enumerate(rows)]
    models = []
    for variant in VARIANTS:
        command(
            "compress", "newsdesk", "--name", f"news-{variant}", "--max-drop", "0.05", "--set", f"variants=[{variant}]"
        )
        models.append(f"news-{variant}")
    server = command("up", "--detach", "--port", "0")
    swaps = 0
    try:
        key = server["key"] or command("key", "make", "swaps", "--role", "admin")["key"]
        for model in reversed(models):  # each has been started once before the clock runs
            command("deploy", model, "--endpoint", ENDPOINT, "--set", "repeats_mib=0")
        memory = Memory(server["pid"])
        memory.start()
        url = f"{server['url']}/v1/endpoints/{ENDPOINT}/predict"
        with Load() as load, ThreadPoolExecutor(1) as beside:
            running = beside.submit(load.window, Target(url, key, bodies), CLIENTS, 60 * given.minutes)
            began = time.time()
            while not wait([running], timeout=began + (swaps + 1) * given.every - time.time()).done:
                swaps += 1
                command("deploy", models[swaps % len(models)], "--endpoint", ENDPOINT, "--set", "repeats_mib=0")
                memory.serving = swaps
            window = running.result()
        memory.over.set()
        memory.join()
    finally:
        command("down")
    found = window.figures()
    print(
        f"{len(window.latencies)} requests in {given.minutes:g} minutes with {swaps} swaps: {found['failed']} failed, "
        f"p99 {found['p99_ms']:.1f} ms; MB by thirds of the time: {memory.said()}"
    )
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
