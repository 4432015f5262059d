"""Runs training jobs as forked processes that a test may kill: one JSON line in, `pid N`, a line a step, `end STATUS`.

Forking saves the seconds that importing torch takes in each; the parent computes nothing, so a child is as good as new.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from llmo.context import NullContext
from llmo.training import operation


class Loud(NullContext):
    """Prints every step, so that the test can kill at one."""

    def report(self, step: int, total: int | None = None, **metrics: float | str) -> None:
        if "learning_rate" in metrics:
            print(step, flush=True)


def job(asked: dict[str, Any]) -> None:
    paths = {name: Path(asked[name]) for name in ("data", "model", "out", "checkpoint")}
    paths["out"].mkdir(exist_ok=True)
    inputs = {"data": paths["data"], "model": paths["model"]}
    operation.run(asked["spec"], inputs, paths["out"], Loud(1, paths["checkpoint"]))


if __name__ == "__main__":
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                job(json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(f"pid {pid}", flush=True)
        print(f"end {os.waitpid(pid, 0)[1]}", flush=True)
