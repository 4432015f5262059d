"""Trainings in a process whose address space is limited to what it has and some MiB more; prints what it was told."""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

from llmo.context import NullContext
from llmo.training import operation


class Told(NullContext):
    def note(self, message: str) -> None:
        print("NOTE " + message, flush=True)


def run(asked: dict[str, Any], out: Path, spec: dict[str, Any]) -> dict[str, Any]:
    out.mkdir()
    inputs = {name: Path(asked[name]) for name in ("data", "model")}
    return operation.run(spec, inputs, out, Told(1, out.with_name(f"{out.name}-checkpoint")))


def limit(more_mib: int) -> None:
    gc.collect()
    there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + (more_mib << 20), resource.RLIM_INFINITY))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    folder = Path(asked["folder"])
    run(asked, folder / "warm", asked["spec"] | {"epochs": 1.0, "batch_size": 4, "gradient_accumulation_steps": 1})
    for more in asked["more_mib"]:
        limit(more)
        try:
            print("PARTS", run(asked, folder / f"squeezed-{more}", asked["spec"])["gradient_accumulation_steps"])
        except MemoryError as error:
            print("NONE", error)
