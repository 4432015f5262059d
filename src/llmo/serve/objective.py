"""How an encoder's replica answers most within a stated time: with which threads and batches, by measuring."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from llmo import hardware
from llmo.context import Context, Stopped
from llmo.errors import GateRefused, LLMOError
from llmo.files import digest_of, digest_of_value, manifest_of, publish_json
from llmo.serve.pipeline import Call, Pipeline
from llmo.types import Asked

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
BATCH_TOKENS = (1024, 512, 256, 128)
SECONDS = 0.6  # of one load
LOOK_SECONDS = 0.2
LEAST = 30  # texts that are answered under each load, however long it takes
FOLDER = "objectives"

Make = Callable[[int], Pipeline]  # of so many threads, not started yet


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run, and what it showed: the most texts a second within the time, at how many clients, and the 99th
    percentile of their latencies there."""

    threads: int
    max_batch_tokens: int
    clients: int
    texts_per_second: float
    p99_ms: float


def settle(
    make: Make, texts: Sequence[Asked], model: Path, cores: int, spec: Mapping[str, Any], ctx: Context
) -> Setting:
    """The setting that answers most texts a second with 99 of 100 within the deployment's `slo`, kept for this model,
    processor and deployment, so that it is measured once.

    Raises GateRefused, naming the nearest one, where none does; and Stopped.
    """
    kept = ctx.cache() / FOLDER / f"{_key(model, cores, spec)}.json"
    if kept.is_file():
        try:
            return Setting(**json.loads(kept.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            ctx.note("what was measured before cannot be read: it is measured again")
    p99_ms = spec["slo"]["p99_ms"]
    tried = list(_tried(make, texts, cores, p99_ms, spec["max_batch_tokens"], ctx))
    within = [setting for setting in tried if setting.p99_ms <= p99_ms]
    if not within:
        nearest = min(tried, key=lambda setting: setting.p99_ms)
        raise GateRefused(
            f"no setting answers 99 of 100 texts within {p99_ms:g} ms: the nearest takes {nearest.p99_ms:.1f} ms "
            f"({nearest.threads} threads, {nearest.max_batch_tokens} tokens a batch, {nearest.clients} client)",
            hint="allow more time (deploy.slo.p99_ms), give it more cores (deploy.cores), or look for a quicker "
            "variant: llmo compress MODEL --target latency",
        )
    best = max(within, key=lambda setting: setting.texts_per_second)
    kept.parent.mkdir(exist_ok=True)
    publish_json(kept, asdict(best))
    return best


def _key(model: Path, cores: int, spec: Mapping[str, Any]) -> str:
    asked = {name: spec[name] for name in ("slo", "max_batch_tokens")}
    return digest_of_value([digest_of(manifest_of(model)), hardware.described(cores), asked]).removeprefix("sha256:")


def _tried(
    make: Make, texts: Sequence[Asked], cores: int, p99_ms: float, most_tokens: int, ctx: Context
) -> Iterator[Setting]:
    """With all threads every size of batches, then fewer threads with the best one."""
    sizes = [tokens for tokens in BATCH_TOKENS if tokens <= most_tokens] or [most_tokens]
    fewer = [threads for threads in (cores // 2, 1) if 0 < threads < cores]
    steps, step = len(sizes) + len(dict.fromkeys(fewer)), count(1)
    found: list[Setting] = []
    with _started(make(cores)) as pipeline:
        for tokens in sizes:
            ctx.report(next(step), steps, stage=f"{cores} threads, {tokens} tokens a batch")
            found.append(_best(pipeline, texts, Setting(cores, tokens, 0, 0.0, 0.0), p99_ms, ctx))
            yield found[-1]
    best = max(found, key=lambda setting: (setting.p99_ms <= p99_ms, setting.texts_per_second))
    for threads in dict.fromkeys(fewer):
        ctx.report(next(step), steps, stage=f"{threads} threads, {best.max_batch_tokens} tokens a batch")
        with _started(make(threads)) as pipeline:
            yield _best(pipeline, texts, replace(best, threads=threads), p99_ms, ctx)


def _best(pipeline: Pipeline, texts: Sequence[Asked], setting: Setting, p99_ms: float, ctx: Context) -> Setting:
    """The setting with the load that it bears; with one client's where it bears none."""
    pipeline.max_batch_tokens = setting.max_batch_tokens
    load(pipeline, texts, 1, SECONDS / 4, ctx)  # it is warm from here on
    best = replace(setting, clients=0, texts_per_second=0.0)
    for clients in CLIENTS:
        latencies, seconds = load(pipeline, texts, clients, SECONDS, ctx)
        p99 = 1e3 * float(np.percentile(latencies, 99))
        if best.clients and p99 > p99_ms:
            break
        rate = len(latencies) / seconds
        if rate > best.texts_per_second:
            best = replace(best, clients=clients, texts_per_second=round(rate, 1), p99_ms=round(p99, 3))
        if p99 > p99_ms:
            break
    return best


def load(
    pipeline: Pipeline, texts: Sequence[Asked], clients: int, seconds: float, ctx: Context
) -> tuple[list[float], float]:
    """Seconds from asking to answer of each text, and of all, of clients who each wait before they ask again.

    Raises what a text is answered with if that is an error, what broke the pipeline, and Stopped.
    """
    latencies: list[float] = []
    problems: list[LLMOError] = []
    over, lock = threading.Event(), threading.Lock()
    numbers, left = count(), clients
    ends = time.perf_counter() + seconds

    def ask() -> None:
        nonlocal left
        asked = time.perf_counter()

        def done(outcome: bytes | LLMOError) -> None:
            nonlocal left
            now = time.perf_counter()
            with lock:
                latencies.append(now - asked)
                if isinstance(outcome, LLMOError):
                    problems.append(outcome)
                again = not problems and (now < ends or len(latencies) < LEAST)
                left -= not again
                if left == 0:
                    over.set()
            if again:
                ask()

        try:
            pipeline.submit(Call([texts[next(numbers) % len(texts)]], float("inf"), done, test=True))
        except LLMOError as error:  # it was closed meanwhile
            done(error)

    began = time.perf_counter()
    for _ in range(clients):
        ask()
    while True:
        if ctx.should_stop():
            raise Stopped
        if over.wait(LOOK_SECONDS):
            break
        if pipeline.broken is not None:
            raise pipeline.broken
    if problems:
        raise problems[0]
    return latencies, time.perf_counter() - began


@contextmanager
def _started(pipeline: Pipeline) -> Iterator[Pipeline]:
    pipeline.start()
    try:
        yield pipeline
    finally:
        pipeline.close()
