"""The operation `tune` with real trials of a tiny model, run in this process in place of the kernel's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llmo.context import NullContext, Stopped
from llmo.errors import DataError, LLMOError
from llmo.jobspecs import TuneJobSpec
from llmo.specs import TaskSpec, TrainSpec
from llmo.training import trial
from llmo.tuning import operation
from llmo.types import JobState, Needs, Reason, Result
from support.tiny import tiny_dataset, tiny_model

SPACE = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "batch_size": [8, 16]}


class Machine(NullContext):
    """Trains a child when it is asked for, one at a time, and remembers what became of it, as a kernel would."""

    def __init__(self, folder: Path, inputs: Mapping[str, Path], *, patience: int = 1000) -> None:
        super().__init__(1, folder)
        self.inputs, self.patience = inputs, patience
        self.results: dict[str, Result] = {}
        self.specs: dict[str, Mapping[str, Any]] = {}
        self.trained: list[str] = []
        self.stopped: list[str] = []
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def should_stop(self) -> bool:
        return len(self.trained) >= self.patience

    def spawn(
        self,
        key: str,
        op: str,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str],
        name: str = "",
        needs: Needs | None = None,
    ) -> None:
        assert (op, inputs) == ("trial", {"data": "input:data", "model": "input:model"})
        assert self.specs.setdefault(key, spec) == spec, "the same trial is asked for as another"
        if key in self.results:
            return
        self.trained.append(key)
        number = len(self.trained)
        try:
            found = trial.run(spec, self.inputs, Path(), NullContext(1))
            self.results[key] = Result(JobState.DONE, number, False, None, None, found, None, Reason.FINISHED)
        except LLMOError as error:
            self.results[key] = Result(JobState.FAILED, number, False, None, None, {}, error.to_json(), Reason.ERROR)

    def stop(self, key: str) -> None:
        self.stopped.append(key)

    def result(self, key: str) -> Result | None:
        return self.results.get(key)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("search")
    sizes = {"train": 48, "dev": 24, "test": 8}
    return {"data": tiny_dataset(folder / "data", sizes=sizes), "model": tiny_model(folder / "model")}


def spec(train: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    made = TrainSpec(**({"method": "head", "epochs": 2.0, "precision": "fp32"} | (train or {})))
    task = TaskSpec(name="text-classification", max_length=16)
    return TuneJobSpec(task=task, train=made, **({"space": SPACE, "trials": 5} | keys)).plain()


def run(machine: Machine, asked: dict[str, Any], out: Path, **more: Path) -> dict[str, Any]:
    out.mkdir()
    return operation.run(asked, {**machine.inputs, **more}, out, machine)


def test_a_search_that_begins_again_trains_nothing_twice(inputs: dict[str, Path], tmp_path: Path) -> None:
    broken = Machine(tmp_path / "checkpoint", inputs, patience=3)
    with pytest.raises(Stopped):
        run(broken, spec(), tmp_path / "first")
    assert broken.trained == ["trial-0", "trial-1", "trial-2"]
    broken.patience = 1000
    again = run(broken, spec(), tmp_path / "again")
    assert broken.trained == [f"trial-{number}" for number in range(5)]
    assert sum("trial 0" in note for note in broken.notes) == 1, "its user is told once"
    whole = run(Machine(tmp_path / "other", inputs), spec(), tmp_path / "whole")
    timed = ("seconds", "memory_bytes")
    for one, other in zip(again["trials"], whole["trials"], strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert again["settings"] == whole["settings"] == again["best"]["settings"]
    assert json.loads((tmp_path / "again" / "report.json").read_text())["counts"] == again["counts"]


def test_when_the_time_is_over_only_what_was_begun_is_heard(inputs: dict[str, Path], tmp_path: Path) -> None:
    machine = Machine(tmp_path / "checkpoint", inputs)
    clock = machine.checkpoint() / "clock.json"
    clock.write_text(json.dumps({"seconds": 60.5, "begun": 2, "told": 1}))
    found = run(machine, spec(budget=60.0, trials=None), tmp_path / "out")
    assert machine.trained == ["trial-0", "trial-1"]
    assert found["seconds"] > 60.5
    assert json.loads(clock.read_text())["told"] == 2


def test_the_shortest_time_still_tries_something(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = run(Machine(tmp_path / "checkpoint", inputs), spec(budget=1e-9, trials=None), tmp_path / "out")
    assert [trial["state"] for trial in found["trials"]] == ["done"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"seconds": "soon"}', '{"seconds": 1}'])
def test_a_damaged_clock_costs_its_time_only(inputs: dict[str, Path], tmp_path: Path, damage: str) -> None:
    machine = Machine(tmp_path / "checkpoint", inputs)
    (machine.checkpoint() / "clock.json").write_text(damage)
    assert len(run(machine, spec(trials=1, budget=60.0), tmp_path / "out")["trials"]) == 1


def test_the_best_of_an_earlier_search_is_tried_first(inputs: dict[str, Path], tmp_path: Path) -> None:
    earlier = run(Machine(tmp_path / "a", inputs), spec(pruner="none"), tmp_path / "earlier")
    ranked = sorted(earlier["trials"], key=lambda one: -one["value"])
    found = run(Machine(tmp_path / "b", inputs), spec(seed=9), tmp_path / "new", **{"earlier-1": tmp_path / "earlier"})
    taken = [one["settings"] for one in found["trials"] if one["origin"] == "earlier search"]
    assert taken[0] in [one["settings"] for one in ranked[:3]]
    assert 2 <= len(taken) <= 3, "the usual settings may be among the best"
    assert found["trials"][0]["origin"] == "usual"
    narrow = spec(space={"batch_size": [8, 32]}, trials=2)
    partly = run(Machine(tmp_path / "c", inputs), narrow, tmp_path / "narrow", **{"earlier-1": tmp_path / "earlier"})
    assert {one["settings"]["batch_size"] for one in partly["trials"]} == {8, 32}, "what fits the new space"


def test_folds_are_trained_one_by_one_and_averaged(inputs: dict[str, Path], tmp_path: Path) -> None:
    machine = Machine(tmp_path / "checkpoint", inputs)
    found = run(machine, spec(folds=3, trials=2, pruner="none"), tmp_path / "out")
    assert machine.trained == [f"trial-{n}-fold-{k}" for n in range(2) for k in range(3)]
    values = [machine.results[f"trial-0-fold-{k}"].result["value"] for k in range(3)]
    assert found["trials"][0]["value"] == pytest.approx(sum(values) / 3)


def test_a_trial_whose_loss_is_lost_is_shown_and_the_search_goes_on(inputs: dict[str, Path], tmp_path: Path) -> None:
    lost = spec({"max_grad_norm": 1e30, "optimizer": "sgd"}, space={"learning_rate": [1e-3, 1e30]}, trials=2)
    found = run(Machine(tmp_path / "checkpoint", inputs), lost, tmp_path / "out")
    assert found["counts"] == {"done": 1, "pruned": 0, "failed": 1, "stopped": 0}
    reasons = {one["settings"]["learning_rate"]: one["reason"] for one in found["trials"]}
    assert "NaN or infinite" in reasons[1e30]


def test_what_cannot_be_measured_is_refused_before_any_trial(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "data", sizes={"train": 8, "dev": 0, "test": 4})
    machine = Machine(tmp_path / "checkpoint", {**inputs, "data": data})
    with pytest.raises(DataError, match="the dev split is empty"):
        run(machine, spec(), tmp_path / "a")
    with pytest.raises(DataError, match="20 folds need at least 20 different rows"):
        run(machine, spec(folds=20), tmp_path / "b")
    assert machine.trained == []
