"""What a job says through its context, as the scheduler reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmo.context import Context
from llmo.errors import SpecError
from llmo.kernel import filecontext, jobdir, tail
from llmo.kernel.filecontext import FileContext
from llmo.types import Device, JobState, Result, to_json
from support.kernel import until

DEVICE = Device("cpu", "cpu", 1, 1, 2)


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[FileContext]:
    (tmp_path / "children").mkdir()
    made = FileContext(tmp_path, 1, DEVICE)
    yield made
    if not made._closed.is_set():
        made.close()


def lines(folder: Path, kind: str) -> list[dict[str, object]]:
    return [dict(data) for _, k, data in tail.read(folder / "events.jsonl", 0)[0] if k == kind]


def test_it_is_a_context(ctx: FileContext) -> None:
    plain: Context = ctx
    assert plain.device.cores == 2


def test_progress_is_thinned_but_the_last_line_is_there(ctx: FileContext, tmp_path: Path) -> None:
    for step in range(10_000):
        ctx.report(step, 10_000, loss=1.0)
    ctx.close()
    found = lines(tmp_path, "progress")
    assert len(found) < 1000
    assert found[-1]["step"] == 9_999


def test_a_line_that_says_something_else_is_never_thinned(ctx: FileContext, tmp_path: Path) -> None:
    for step in range(100):
        ctx.report(step, 100, loss=1.0)
    ctx.report(100, 100, f1=0.5)
    ctx.report(100, 100, loss=1.0)
    ctx.report(101, 100, loss=2.0)
    ctx.close()
    found = lines(tmp_path, "progress")
    assert [line["f1"] for line in found if "f1" in line] == [0.5]
    assert found[-1]["loss"] == 2.0


def test_the_last_line_does_not_wait_for_the_next(ctx: FileContext, tmp_path: Path) -> None:
    ctx.report(1, loss=1.0)
    ctx.report(2, loss=1.0)
    until(lambda: lines(tmp_path, "progress")[-1]["step"] == 2, lambda: None)


def test_order_is_kept_between_kinds(ctx: FileContext, tmp_path: Path) -> None:
    ctx.report(1, loss=1.0)
    ctx.report(2, loss=1.0)
    ctx.note("between")
    ctx.report(3, loss=1.0)
    ctx.close()
    kinds = [kind for _, kind, _ in tail.read(tmp_path / "events.jsonl", 0)[0]]
    assert kinds == ["progress", "progress", "note", "progress"]


def test_numbers_that_json_lacks(ctx: FileContext, tmp_path: Path) -> None:
    ctx.report(1, loss=float("inf"), score=np.float32(0.5), count=3, name="x")  # type: ignore[arg-type]
    ctx.close()
    assert lines(tmp_path, "progress") == [
        {"step": 1, "total": None, "loss": "inf", "score": 0.5, "count": 3, "name": "x"}
    ]


def test_stop_is_a_file_or_a_signal(ctx: FileContext, tmp_path: Path) -> None:
    assert not ctx.should_stop()
    assert not ctx.stopped
    (tmp_path / "stop").touch()
    assert ctx.should_stop()
    assert ctx.stopped


def test_children(ctx: FileContext, tmp_path: Path) -> None:
    rung: list[int] = []
    ctx._ring = lambda: rung.append(1)
    for key in ("a", "../../etc", "é" * 150):
        ctx.spawn(key, "op", {"x": 1}, {"model": "sha256:1"}, "name")
        assert ctx.result(key) is None
        result = Result(JobState.DONE, 3, False, "sha256:2", "name@1", {"x": 1})
        path = jobdir.child_file(tmp_path, key)
        assert path.parent == tmp_path / "children"
        path.write_text(json.dumps(to_json(result)))
        assert ctx.result(key) == result
    assert len(rung) == 3
    for key in ("", "x" * 201):
        with pytest.raises(SpecError):
            ctx.spawn(key, "op", {}, {})


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filecontext, "HEARTBEAT_SECONDS", 0.01)
    ctx = FileContext(tmp_path, 1, DEVICE)
    first = (tmp_path / "heartbeat").stat().st_mtime_ns
    until(lambda: (tmp_path / "heartbeat").stat().st_mtime_ns > first, lambda: None, "a beat")
    ctx.close()
