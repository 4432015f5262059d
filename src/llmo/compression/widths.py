"""How wide a chosen engine is to run: its throughput by the number of answers at once, with all cores and with half."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from llmo.compression.probe import Candidate, Probe
from llmo.context import Context

STREAMS = (1, 4, 8, 16, 32)
ROUNDS = 3


def measure(
    module: str, engine: str, precision: str, folder: Path, plan: Mapping[str, Any], work: Path, ctx: Context
) -> list[dict[str, Any]]:
    """Rows `{"threads", "streams", "tokens_per_second"}`, prompts included; `module` and `plan` are those that the
    variants were measured with. Raises the engine's own error, JobFailed when its process dies, and Stopped."""
    file = work / "width.json"
    file.write_text(json.dumps({**plan, "streams": max(STREAMS)}), encoding="utf-8")
    threads = sorted({ctx.device.cores, max(1, ctx.device.cores // 2)}, reverse=True)
    rates: dict[tuple[int, int], list[float]] = {}
    with ExitStack() as stack:
        probes = {}
        for cores in threads:
            candidate = Candidate(f"{engine} on {cores} threads", engine, folder, (precision,), cores)
            probes[cores] = stack.enter_context(Probe(module, candidate, file, work, ctx))
            probes[cores].read()
        for number in range(ROUNDS):
            ctx.report(number, ROUNDS, stage="streams and threads")
            for cores in threads if number % 2 == 0 else reversed(threads):
                for streams in STREAMS:
                    answer = probes[cores].ask(f"width {streams} {number}")
                    rates.setdefault((cores, streams), []).append(answer["tokens"] / answer["seconds"])
    return [
        {"threads": cores, "streams": streams, "tokens_per_second": round(median(found), 1)}
        for (cores, streams), found in sorted(rates.items())
    ]
