"""What is varied: the written space as it is written, the default one by task, method, rows and size."""

from __future__ import annotations

from typing import Any

import pytest

from llmo.jobspecs import TrainJobSpec
from llmo.searchspec import merged, nested
from llmo.specs import TaskSpec, TrainSpec, TuneSpec
from llmo.tuning import space
from llmo.tuning.sampler import Sampler
from llmo.tuning.space import Dimension, Facts


def default(
    task: str = "text-classification", rows: int = 500, parameters: int = 10**6, **train: Any
) -> dict[str, str]:
    found = space.resolve(TuneSpec(), Facts(task, TrainSpec(**train), rows, parameters, layers=6))
    return {one.key: one.text() for one in found}


def test_the_default_space_goes_by_method_rows_and_size() -> None:
    assert default() == {
        "learning_rate": "2e-05 to 0.0005, by logarithm",
        "epochs": "3.0, 6.0, 10.0",
        "batch_size": "8, 16, 32",
        "warmup": "0 to 0.2",
        "weight_decay": "0.001 to 0.1, by logarithm",
        "dropout": "0.0, 0.1, 0.2",
    }
    assert default(rows=50_000)["epochs"] == "1.0, 2.0, 3.0"
    assert "dropout" not in default(rows=50_000)
    assert default(parameters=3 * 10**9)["learning_rate"] == "4e-06 to 0.0001, by logarithm"
    assert default(method="lora")["lora.rank"] == "4, 8, 16, 32"
    assert default(method="last-n")["last_n"] == "1, 2, 4"
    assert "weight_decay" not in default(method="head")
    assert default("generation", method="lora")["batch_size"] == "4, 8, 16"


def test_what_the_file_says_itself_is_not_varied() -> None:
    assert "learning_rate" not in default(learning_rate=3e-4)
    assert "epochs" not in default(epochs=1.0)


def test_a_written_space_is_all_that_is_varied() -> None:
    tune = TuneSpec(space={"batch_size": [2, 4], "warmup": {"low": 0.0, "high": 0.3, "step": 0.1}})
    found = space.resolve(tune, Facts("text-classification", TrainSpec(epochs=1.0), 10, 10))
    assert [(one.key, one.every()) for one in found] == [("batch_size", (2, 4)), ("warmup", (0.0, 0.1, 0.2, 0.3))]


def test_the_usual_settings_are_those_without_a_search() -> None:
    train, task = TrainSpec(method="lora"), TaskSpec(name="text-classification")
    tune = TuneSpec(space={"learning_rate": {"low": 1e-4, "high": 1e-2}, "batch_size": [4], "max_length": [64, 128]})
    dimensions = space.resolve(tune, Facts("text-classification", train, 10, 10))
    assert space.usual(dimensions, train, task) == {"learning_rate": 5e-4, "max_length": 128}


def test_settings_become_the_specification_of_a_training() -> None:
    changes = nested({"lora.rank": 4, "max_length": 64, "dropout": None, "learning_rate": 1e-3})
    spec = {**TrainSpec().plain(), "task": TaskSpec(name="text-classification").plain()}
    found = TrainJobSpec(**merged(spec, changes))
    assert (found.lora.rank, found.lora.alpha, found.task.max_length) == (4, 16, 64)
    assert (found.learning_rate, found.dropout, found.task.name) == (1e-3, None, "text-classification")
    assert spec["lora"]["rank"] == 8, "what was merged into is as it was"


@pytest.mark.parametrize(
    ("choice", "value", "held"),
    [
        ({"values": [1, True, None]}, True, True),
        ({"values": [1, 2]}, True, False),
        ({"values": [0.1]}, 0.2, False),
        ({"low": 1, "high": 9}, 5, True),
        ({"low": 1, "high": 9}, 5.5, False),
        ({"low": 1, "high": 9, "step": 4}, 5, True),
        ({"low": 1, "high": 9, "step": 4}, 6, False),
        ({"low": 0.1, "high": 0.2}, 0.25, False),
        ({"low": 0.1, "high": 0.2}, None, False),
        ({"low": 0.1, "high": 0.2}, "0.15", False),
    ],
)
def test_a_value_is_in_a_dimension_or_not(choice: dict[str, Any], value: Any, held: bool) -> None:
    assert Dimension.of("x", choice, "").holds(value) is held


def test_a_grid_takes_the_ends_and_the_middle_of_a_range() -> None:
    assert Dimension.of("x", {"low": 1e-4, "high": 1e-2, "log": True}, "").grid() == (1e-4, 1e-3, 1e-2)
    assert Dimension.of("x", {"low": 1, "high": 4}, "").grid() == (1, 2, 4)
    assert Dimension.of("x", {"low": 0.0, "high": 1.0, "step": 0.25}, "").grid() == (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("choice", "value", "shown"),
    [
        ({"low": 1e-6, "high": 1e-2, "log": True}, 3.14159e-4, 3.14e-4),
        ({"low": 0.0, "high": 0.2}, 0.123456, 0.123),
        ({"low": 0.0, "high": 0.2}, 0.0, 0.0),
        ({"low": 0.99, "high": 0.9999}, 0.99873456, 0.99873),
        ({"low": 0.99, "high": 0.99994}, 0.99994, 0.99994),
        ({"low": 1.2345e-5, "high": 1e-3, "log": True}, 1.2345e-5, 1.2345e-5),
        ({"low": 0.0, "high": 0.5, "step": 0.0625}, 0.3125, 0.3125),
        ({"low": 0.0, "high": 0.3, "step": 0.1}, 0.1 + 0.1 + 0.1, 0.3),
        ({"low": 1, "high": 5000}, 4321, 4321),
    ],
)
def test_fewer_digits_of_a_value_are_still_in_its_range(choice: dict[str, Any], value: float, shown: float) -> None:
    dimension = Dimension.of("x", choice, "")
    assert dimension.readable(value) == shown
    assert dimension.holds(shown)
    assert all(dimension.holds(one) for one in dimension.grid())


def test_the_learning_rate_goes_by_optimiser_and_by_what_the_rows_are() -> None:
    assert default(optimizer="sgd")["learning_rate"] == "0.002 to 0.05, by logarithm"
    task = TaskSpec(name="generation")
    rates = {}
    for shape in ("messages", "preference"):
        known = space.facts(task, TrainSpec(method="lora"), 500, {}, 10**6, shape)
        rates[shape] = next(one.text() for one in space.resolve(TuneSpec(), known) if one.key == "learning_rate")
    assert rates == {"messages": "0.0001 to 0.0025, by logarithm", "preference": "1e-05 to 0.00025, by logarithm"}


def test_how_far_two_values_are_from_each_other() -> None:
    ordered, stepped = Dimension("batch_size", (8, 16, 32)), Dimension("epochs", None, 1, 5, step=2, whole=True)
    assert [ordered.apart(8, other) for other in (8, 16, 32)] == [0.0, 0.5, 1.0]
    assert stepped.apart(1, 3) == 0.5
    assert Dimension("lora.target_modules", (["query"], ["key"])).apart(["query"], ["key"]) == 1.0
    assert ordered.apart(16, None) == 1.0, "nothing is known of the best yet"


def test_of_what_is_left_over_the_most_like_the_best_is_next() -> None:
    dimensions = [Dimension("learning_rate", (1e-4, 1e-3, 1e-2, 1e-1)), Dimension("batch_size", (8, 16, 32, 64))]
    drawn = Sampler(dimensions, "random", seed=1, trials=16)
    asked: list[dict[str, Any]] = []
    origins = []
    best: tuple[float, dict[str, Any]] = (0.0, {})
    while (found := drawn.ask(len(asked))) is not None:
        settings, origin = found
        if origin == "left over":
            left = [point for point in space.grid(dimensions) if point not in asked]
            apart = [sum(one.apart(point[one.key], best[1][one.key]) for one in dimensions) for point in left]
            assert apart[left.index(settings)] == min(apart)
        score = settings["learning_rate"] * settings["batch_size"]
        drawn.tell(len(asked), [score])
        best = max(best, (score, settings), key=lambda one: one[0])
        asked.append(settings)
        origins.append(origin)
    assert len(asked) == 16
    assert "left over" in origins
