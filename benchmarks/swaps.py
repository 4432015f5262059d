"""Load without a pause while an endpoint is swapped between variants of its model: no request fails, memory is flat.

16 clients ask the whole time; every 20 s the endpoint gets the other variant. Tells requests, failures, swaps, and the
memory (proportional set size) of the server and of the replicas in the first and in the last third of the time.
Run `make demo` first, then: python benchmarks/swaps.py [--minutes 10] [--every 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import psutil
from command import command

from llmo.doors.load import Load, Target
from llmo.kernel import processes
from llmo.system import System

ENDPOINT, CLIENTS = "swapped", 16
VARIANTS = ("native-int8", "onnx-int8-static")


class Memory(threading.Thread):
    """Looks at the processes once a second: `(seconds, bytes of the server, bytes of all replicas, replicas)`."""

    def __init__(self, server: int) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, int, int, int]] = []
        self.over = threading.Event()
        self._server = psutil.Process(server)

    def run(self) -> None:
        began = time.monotonic()
        while not self.over.wait(1.0):
            replicas = [child.pid for child in self._server.children()]
            held = sum(processes.memory(pid, children=True) or 0 for pid in replicas)
            own = processes.memory(self._server.pid, children=False) or 0
            self.seen.append((time.monotonic() - began, own, held, len(replicas)))

    def third(self, number: int) -> tuple[float, float]:
        """The medians of a third of the time, in MB: the server's, and the replicas' while there is one of them."""
        some = self.seen[number * len(self.seen) // 3 : (number + 1) * len(self.seen) // 3]
        alone = [held for _, _, held, count in some if count == 1] or [0]
        return statistics.median(own for _, own, _, _ in some) / 1e6, statistics.median(alone) / 1e6


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
        command("deploy", models[0], "--endpoint", ENDPOINT)
        memory = Memory(server["pid"])
        memory.start()
        url = f"{server['url']}/v1/endpoints/{ENDPOINT}/predict"
        with Load() as load, ThreadPoolExecutor(1) as beside:
            running = beside.submit(load.window, Target(url, key, bodies), CLIENTS, 60 * given.minutes)
            while not running.done():
                wait([running], timeout=given.every)
                if not running.done():
                    swaps += 1
                    command("deploy", models[swaps % len(models)], "--endpoint", ENDPOINT)
            window = running.result()
        memory.over.set()
        memory.join()
    finally:
        command("down")
    first, last, found = memory.third(0), memory.third(2), window.figures()
    print(
        f"{len(window.latencies)} requests in {given.minutes:g} minutes with {swaps} swaps: {found['failed']} failed, "
        f"p99 {found['p99_ms']:.1f} ms; server {first[0]:.0f} MB in the first third and {last[0]:.0f} in the last, "
        f"replica {first[1]:.0f} and {last[1]:.0f}"
    )
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
