"""A trial trains as `train` does, looks at dev alone, keeps no weights, and ends itself below a bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmo.context import NullContext, Stopped
from llmo.errors import DataError, JobFailed, SpecError
from llmo.specs import TrainSpec
from llmo.training import trial
from llmo.training.loop import Loop
from llmo.types import Device
from support.tiny import tiny_dataset

FAST: dict[str, Any] = {"epochs": 6, "learning_rate": 5e-3}
Try = Callable[..., dict[str, Any]]
TASK = {"name": "text-classification", "multi_label": None, "max_length": 48}


class Stopping(NullContext):
    """Asks to stop at a step of the training, once; counts phases."""

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__(1, folder)
        self.at, self.step, self.phases = at, 0, set[str]()

    def report(self, step: int, total: int | None = None, **metrics: float | str) -> None:
        self.step = step if "learning_rate" in metrics else self.step
        self.phases.add(str(metrics.get("phase", "")))

    def should_stop(self) -> bool:
        return self.step == self.at


@pytest.fixture
def attempt(base: Path, texts: Path, tmp_path: Path) -> Try:
    def run(ctx: NullContext | None = None, **keys: Any) -> dict[str, Any]:
        about = {key: keys.pop(key) for key in ("fold", "rungs", "latency") if key in keys}
        inputs = {"data": keys.pop("data", texts), "model": keys.pop("model", base)}
        spec = {**TrainSpec(**{**FAST, **keys}).plain(), "task": TASK, **about}
        (tmp_path / "trial").mkdir(exist_ok=True)
        return trial.run(spec, inputs, tmp_path / "trial", ctx or NullContext(1, tmp_path / "checkpoint"))

    return run


def test_a_trial_comes_to_what_the_training_comes_to(attempt: Try, train: Any, texts: Path, tmp_path: Path) -> None:
    rungs = [{"share": 1 / 9}, {"share": 1 / 3, "bar": 0.0}]
    ctx = Stopping(tmp_path / "checkpoint", at=-1)
    found, whole = attempt(ctx, rungs=rungs), train(texts, **FAST)
    assert found["metrics"] == whole["dev"], "rungs measure, and change nothing"
    assert found["value"] == whole["dev"]["accuracy"]["value"]
    assert (found["metric"], found["higher_is_better"], found["pruned"]) == ("accuracy", True, None)
    assert [(rung["step"], rung["bar"]) for rung in found["rungs"]] == [(4, None), (12, 0.0)]
    assert found["steps"] == found["total"] == whole["steps"] == 36
    assert found["memory_bytes"] > 100 << 20
    assert list((tmp_path / "trial").iterdir()) == [], "no weights are kept"
    assert list((tmp_path / "checkpoint").iterdir()) == []
    assert not {phase for phase in ctx.phases if "test" in phase}, "the held-out rows are not looked at"


def test_what_was_evaluated_at_a_rung_is_not_measured_again(attempt: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, on_dev = [], Loop._on_dev
    monkeypatch.setattr(Loop, "_on_dev", lambda loop: measured.append(loop.state.step) or on_dev(loop))
    found = attempt(rungs=[{"share": 1 / 9}, {"share": 1 / 3}], evaluate_every=12)
    assert [rung["step"] for rung in found["rungs"]] == [4, 12]
    assert measured == [4, 12, 24]


def test_below_its_bar_a_trial_ends(attempt: Try) -> None:
    found = attempt(rungs=[{"share": 0.25, "bar": 1.01}, {"share": 0.5}])
    assert found["steps"] == found["pruned"]["step"] == 9
    assert found["pruned"]["value"] == found["value"] < 1.01
    assert len(found["rungs"]) == 1


def test_a_trial_that_is_broken_off_goes_on_with_what_it_reached(attempt: Try, tmp_path: Path) -> None:
    rungs = [{"share": 0.25}, {"share": 0.75}]
    whole = attempt(rungs=rungs)
    with pytest.raises(Stopped):
        attempt(Stopping(tmp_path / "again", at=20), rungs=rungs)
    resumed = attempt(NullContext(1, tmp_path / "again"), rungs=rungs)
    timed = ("seconds", "samples_per_second", "memory_bytes")
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}


def test_folds_are_other_rows(attempt: Try) -> None:
    values = [attempt(fold={"index": index, "of": 3, "seed": 1}) for index in range(3)]
    assert {found["total"] for found in values} == {36}  # 85 or 86 rows of 128, in batches of 16
    assert len({found["metrics"]["accuracy"]["low"] for found in values}) > 1


def test_latency_is_measured_where_it_is_asked_for(attempt: Try) -> None:
    assert attempt(epochs=1)["latency_ms"] is None
    assert 0.01 < attempt(epochs=1, latency=True)["latency_ms"] < 1000


def test_a_loss_that_is_lost_fails_and_leaves_no_checkpoint(attempt: Try, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="NaN or infinite"):
        attempt(learning_rate=1e30, optimizer="sgd", checkpoint_seconds=1e-6, max_grad_norm=1e30)
    assert list((tmp_path / "checkpoint").iterdir()) == []


def test_what_cannot_be_measured_is_refused(attempt: Try, chats: Path, talker: Path, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "undivided", sizes={"train": 32, "dev": 0, "test": 8})
    with pytest.raises(DataError, match="the dev split is empty"):
        attempt(data=data)
    assert attempt(data=data, fold={"index": 0, "of": 2, "seed": 1}, epochs=1)["steps"] == 1
    spec = {**TrainSpec(method="lora", epochs=1).plain(), "task": {**TASK, "name": "generation"}, "latency": True}
    ctx = NullContext(1, tmp_path / "chat")
    ctx.device = Device("cpu", "cpu", 0, 0, 1)
    with pytest.raises(SpecError, match="latency is measured of tasks that answer at once"):
        trial.run(spec, {"data": chats, "model": talker}, tmp_path, ctx)
