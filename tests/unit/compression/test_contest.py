"""The contest: fresh processes that take turns, never outlive their asker, and report their own failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest

from llmo.compression.contest import BATCH, contest, plan, speedup
from llmo.compression.export import export
from llmo.compression.measure import obey, peak_memory
from llmo.compression.probe import Candidate
from llmo.context import NullContext, Stopped
from llmo.engines.base import Chunk, Request
from llmo.engines.onnx import OnnxEngine
from llmo.errors import JobFailed, LLMOError, ModelError
from llmo.types import Device
from support.headed import headed_model

TEXTS = [[2, *range(10, 10 + n % 23), 3] for n in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = headed_model(tmp_path_factory.mktemp("contest") / "model")
    export(made, made / "model.onnx")
    return made


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "llmo.compression.measure" in " ".join(p.cmdline())]


def test_a_plan_covers_every_text_once_in_batches_of_like_length() -> None:
    made = plan(TEXTS)
    assert sorted(n for batch in made["batches"] for n in batch) == list(range(len(TEXTS)))
    lengths = [len(TEXTS[n]) for batch in made["batches"] for n in batch]
    assert lengths == sorted(lengths)
    assert all(len(batch) <= BATCH for batch in made["batches"])
    assert sorted(made["timed"]) == list(range(len(TEXTS)))
    assert made["timed"] != sorted(made["timed"], key=lambda number: len(TEXTS[number]))  # they come as they come


def test_a_plan_of_many_texts_times_a_spread_of_them() -> None:
    texts = [[2] * (1 + n % 64) for n in range(1000)]
    made = plan(texts)
    assert len(made["timed"]) == 192
    lengths = [len(texts[number]) for number in made["timed"]]
    assert (min(lengths), max(lengths)) == (1, 64)


def test_candidates_are_measured_side_by_side(folder: Path, tmp_path: Path) -> None:
    reports: list[int] = []
    ctx = NullContext(1, on_report=lambda step, total, metrics: reports.append(step))
    candidates = [Candidate("one", "onnx", folder), Candidate("two", "onnx", folder)]
    found = contest(candidates, TEXTS, tmp_path, ctx)
    one, two = found["one"], found["two"]
    for clients, level in one.levels.items():
        assert speedup(one, one, clients) == 1.0
        assert speedup(one, two, clients) > 0
        assert len(level.seconds) == len(two.levels[clients].seconds) >= 3
        assert level.p99_ms >= level.median_ms > 0
    assert list(one.levels) == list(two.levels) == [1, 16, 64]
    assert min(one.ready_seconds, two.ready_seconds) > 0
    assert all(np.array_equal(a, b) for a, b in zip(one.logits, two.logits, strict=True))
    assert len(one.logits) == len(TEXTS)
    engine = OnnxEngine()
    engine.load(folder, ctx.device)
    own = obey(engine, ctx.device, plan(TEXTS), ["answers", str(tmp_path / "own.npz")])
    engine.close()
    assert own["rss_bytes"] > 0
    with np.load(tmp_path / "own.npz", allow_pickle=False) as kept:
        assert all(np.array_equal(kept[str(n)], one.logits[n]) for n in range(len(TEXTS)))
    assert reports == [0, 1, 2, 3, 4]
    assert children() == []


def test_every_client_waits_for_its_answer(folder: Path) -> None:
    """Of 40 texts, 16 clients never have more than 16 on the way, and all are answered."""

    class Counting(OnnxEngine):
        sizes: ClassVar[list[int]] = []

        def run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
            self.sizes.append(len(requests))
            return super().run(requests)

    engine, device = Counting(), Device("cpu", "cpu", 0, 0, 1)
    engine.load(folder, device)
    answer = obey(engine, device, plan(TEXTS), ["load", "16", "40"])
    assert len(answer["latencies"]) == sum(engine.sizes) == 40
    assert max(answer["latencies"]) <= answer["seconds"]
    assert 1 < max(engine.sizes) <= 16
    obey(engine, device, plan(TEXTS), ["load", "1", "5"])
    assert engine.sizes[-5:] == [1] * 5
    engine.close()


def test_what_loses_too_much_is_not_timed(folder: Path, tmp_path: Path) -> None:
    candidates = [Candidate("one", "onnx", folder), Candidate("two", "onnx", folder)]
    asked: list[str] = []

    def worth(candidate: Candidate, logits: Sequence[np.ndarray]) -> str | None:
        asked.append(candidate.name)
        assert len(logits) == len(TEXTS)
        return "no" if candidate.name == "two" else None

    found = contest(candidates, TEXTS, tmp_path, NullContext(1), worth=worth)
    assert asked == ["one", "two"]
    assert found["one"].levels
    assert not found["two"].levels


def test_memory_is_the_process_s_own(folder: Path, tmp_path: Path) -> None:
    """A fresh process must not inherit the peak of the big one that started it, as ru_maxrss does."""
    ballast = np.ones(100_000_000)  # 800 MB
    found = contest([Candidate("one", "onnx", folder)], TEXTS, tmp_path, NullContext(1))
    assert peak_memory() > ballast.nbytes > 2 * found["one"].rss_bytes


def test_a_model_that_cannot_be_run_says_so_itself(folder: Path, tmp_path: Path) -> None:
    candidates = [Candidate("good", "onnx", folder), Candidate("bad", "onnx", tmp_path / "nothing")]
    with pytest.raises(ModelError, match=r"no config\.json"):
        contest(candidates, TEXTS, tmp_path, NullContext(1))
    problems: dict[str, str] = {}
    found = contest(candidates, TEXTS, tmp_path, NullContext(1), problems=problems)
    assert list(found) == ["good"]
    assert problems["bad"].startswith("cannot run: the model folder has no config.json")
    assert children() == []


def test_a_process_that_dies_is_a_failed_job(folder: Path, tmp_path: Path) -> None:
    def kill(step: int, total: int | None, metrics: object) -> None:
        for child in children():
            child.kill()

    with pytest.raises(JobFailed, match="measuring one ended with code -9"):
        contest([Candidate("one", "onnx", folder)], TEXTS, tmp_path, NullContext(1, on_report=kill))
    assert children() == []


def test_being_asked_to_stop_ends_every_process(folder: Path, tmp_path: Path) -> None:
    class Impatient(NullContext):
        def should_stop(self) -> bool:
            return True

    with pytest.raises(Stopped):
        contest([Candidate("one", "torch", folder)], TEXTS, tmp_path, Impatient(1))
    assert children() == []


def test_it_does_not_outlive_the_process_that_started_it(folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work.json"
    work.write_text(json.dumps(plan(TEXTS)))
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'llmo.compression.measure', 'onnx', sys.argv[1], sys.argv[2],"
        " '1'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(folder), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the measuring process is an orphan"
        os.sched_yield()


def test_an_unknown_command_is_an_error(folder: Path) -> None:
    engine = OnnxEngine()
    engine.load(folder, Device("cpu", "cpu", 0, 0, 1))
    with pytest.raises(LLMOError, match="'dance', which is no command"):
        obey(engine, Device("cpu", "cpu", 0, 0, 1), plan(TEXTS), ["dance"])
    engine.close()
