"""A space as a user writes it: what is taken, and what is refused with its file, its line and what to write."""

from __future__ import annotations

from typing import Any

import pytest

from llmo.errors import SpecError
from llmo.jobspecs import TuneJobSpec
from llmo.searchspec import keys_of
from llmo.specbase import Spec
from llmo.specfile import parse, validate
from llmo.specs import ProjectSpec, TuneSpec, space

PROJECT = "name: x\ntask: text-classification\ndata: {source: a}\nmodel: b\ntune:\n"


def read(*lines: str) -> ProjectSpec:
    return parse(PROJECT + "".join(f"  {line}\n" for line in lines), "llmo.yaml", ProjectSpec).spec


def test_lists_and_ranges_are_taken_and_survive_the_way_to_a_job() -> None:
    found = read(
        "budget: 1.5m",
        "space:",
        "  learning_rate: {low: 1e-5, high: 1e-3, log: true}",
        "  batch_size: [8, 16, 32]",
        "  max_length: {low: 32, high: 128, step: 32}",
        "  lora.rank: [2, 4]",
        "  dropout: [null, 0.1]",
    )
    assert found.tune is not None
    assert found.tune.budget == 90.0
    assert found.tune.space == {
        "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
        "batch_size": {"values": [8, 16, 32]},
        "max_length": {"low": 32, "high": 128, "step": 32},
        "lora.rank": {"values": [2, 4]},
        "dropout": {"values": [None, 0.1]},
    }
    assert validate(found.plain(), ProjectSpec) == found


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        (["space: {learning_rte: [1]}"], 6, "unknown key; did you mean 'learning_rate'"),
        (["space:", "  batch_size: [8]", "  lora: {rank: [4]}"], 8, "did you mean 'lora.rank'"),
        (["space: {seed: [1, 2]}"], 6, "unknown key"),
        (["space:", "  learning_rate: {low: 1e-3, high: 1e-4}"], 7, "the range is empty: low (0.001)"),
        (["space: {learning_rate: {low: 1e-3}}"], 6, "needs both `low` and `high`"),
        (["space: {warmup: {low: 0, high: 0.2, log: true}}"], 6, "begins above 0"),
        (["space: {warmup: {low: 0.0, high: 0.2, step: 0.5}}"], 6, "the step is wider"),
        (["space:", "  batch_size: [8, abc]"], 7, "valid integer (it is 'abc')"),
        (["space:", "  batch_size:", "    low: 4", "    high: many"], 9, "valid integer (it is 'many')"),
        (["space: {batch_size: [8, 0]}"], 6, "greater than or equal to 1"),
        (["space: {batch_size: []}"], 6, "at least 1 item"),
        (["space: {batch_size: [8, 8]}"], 6, "a value is listed twice"),
        (["space: {batch_size: 8}"], 6, "a list of values, or {low: ..., high: ...}"),
        (["space: {method: {low: full, high: lora}}"], 6, "have no order"),
        (["space: {method: [full, best]}"], 6, "it is 'best'"),
        (["space: {batch_size: {low: 2, high: 4, width: 3}}"], 6, "unknown key 'width'"),
        (["space: {batch_size: {values: [2], low: 1}}"], 6, "either a list of values or a range"),
        (["space: {}"], 6, "a mapping of keys"),
        (["space: [batch_size]"], 6, "a mapping of keys"),
        (["budget: 0"], 6, "greater than 0"),
        (["budget: 0m"], 6, "greater than 0"),
        (["budget: soon"], 6, "written like 90s, 10m or 2h"),
        (["trials: 0"], 6, "greater than or equal to 1"),
        (["trials: many"], 6, "valid integer"),
        (["folds: 1"], 6, "greater than or equal to 2"),
        (["sampler: best"], 6, "'tpe', 'random', 'grid' or 'nsga2'"),
        (["pruner: hyperbad"], 6, "'hyperband'"),
        (["objectives: [speed]"], 6, "'quality'"),
        (["objectives: [seconds]"], 5, "the objectives name quality"),
        (["objectives: [quality, quality]"], 5, "each at most once"),
        (["objectives: [quality, memory]", "pruner: asha"], 5, "there are several objectives"),
        (["trails: 3"], 6, "unknown key 'trails'; did you mean 'trials'?"),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_said_with_its_line(lines: list[str], line: int, words: str) -> None:
    with pytest.raises(SpecError) as raised:
        read(*lines)
    assert raised.value.where == f"llmo.yaml:{line}"
    assert words in raised.value.what


@pytest.mark.parametrize(
    ("task", "tune", "words"),
    [
        ("next-item", {"folds": 3}, "leave out `folds`"),
        ("generation", {"objectives": ["quality", "latency"]}, "at once"),
    ],
)
def test_what_cannot_be_measured_of_a_task_is_refused(task: str, tune: dict[str, Any], words: str) -> None:
    project = {"name": "x", "task": task, "data": {"source": "x.csv"}, "model": "base", "tune": tune}
    job = {"task": {"name": task}, **tune}
    kinds: list[tuple[dict[str, Any], type[Spec]]] = [(project, ProjectSpec), (job, TuneJobSpec)]
    for spec, kind in kinds:
        with pytest.raises(SpecError, match=words):
            validate(spec, kind)
        validate({**spec, "task": {"name": "text-classification"}}, kind)


def test_every_plain_key_of_train_can_be_varied_but_what_decides_nothing() -> None:
    keys = set(keys_of(space()))
    assert {"learning_rate", "batch_size", "method", "lora.rank", "max_length", "optimizer", "dropout"} <= keys
    assert not keys & {"seed", "checkpoint_seconds", "objective", "lora.target_modules", "lora"}


@pytest.mark.parametrize(
    ("given", "most", "prunes"),
    [({}, 20, "asha"), ({"budget": 60}, 1000, "asha"), ({"objectives": ["quality", "memory"]}, 20, "none")],
)
def test_defaults_go_together(given: dict[str, Any], most: int, prunes: str) -> None:
    found = TuneSpec(**given)
    assert (found.most, found.prunes) == (most, prunes)
