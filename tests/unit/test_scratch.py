"""What `scratch:NAME,KEY=VALUE` asks for, and what is said of one that asks for something else."""

from __future__ import annotations

import pytest

from llmo import scratch
from llmo.errors import InputError, SpecError
from llmo.pipeline import base_name, plan
from llmo.specs import ProjectSpec

PROJECT = {
    "name": "news",
    "task": "text-classification",
    "data": {"source": "x.csv"},
    "model": "scratch:lstm,width=64",
    "train": {"seed": 5},
}


def test_settings_are_read_and_the_seed_of_training_holds_where_none_is_named() -> None:
    asked = scratch.parse("scratch:transformer-tiny,width=64,vocabulary=400", "text-classification", 5)
    assert (asked.architecture, asked.width, asked.vocabulary, asked.layers) == ("transformer-tiny", 64, 400, None)
    assert asked.seed == 5
    assert scratch.parse("scratch:lstm,seed=7", "text-classification", 5).seed == 7
    assert scratch.parse("scratch:lstm", "text-classification").seed == 13


@pytest.mark.parametrize(
    ("source", "task", "says"),
    [
        ("scratch:", "text-classification", "no model ''"),
        ("scratch:lsmt", "text-classification", "did you mean 'lstm'"),
        ("scratch:lstm,widht=3", "text-classification", "did you mean 'width'"),
        ("scratch:lstm,width", "text-classification", "is no setting"),
        ("scratch:lstm,width=a", "text-classification", "whole number"),
        ("scratch:lstm,width=20", "text-classification", "multiple of 8"),
        ("scratch:lstm,vocabulary=3", "text-classification", "300"),
        ("scratch:lstm", "generation", "'lstm' is no model for generation"),
        ("scratch:lstm", "next-item", "'lstm' is no model for next-item"),
        ("scratch:causal-tiny", "masked-lm", "is no model for masked-lm"),
        ("scratch:sasrec", "text-classification", "is no model for text-classification"),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is(source: str, task: str, says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        scratch.parse(source, task)
    assert caught.value.hint or "width" in str(caught.value) or "vocabulary" in str(caught.value)


def test_without_a_data_set_there_is_none() -> None:
    assert isinstance(scratch.needs_data("scratch:lstm"), InputError)


def test_the_plan_makes_it_after_the_data_and_before_training() -> None:
    project = ProjectSpec.model_validate(PROJECT).plain()
    asked = scratch.parse(project["model"], "text-classification", 5).plain()
    steps = plan(project, {"data": {"source": "x.csv", "digest": "d"}, "model": {"scratch": asked}})
    assert [step.op for step in steps[:3]] == ["import", "scratch-model", "train"]
    assert steps[1].inputs == {"data": "step:data"}
    assert steps[1].resolved({}) is None
    assert steps[2].inputs == {"data": "step:data", "model": "step:base"}
    assert steps[1].name == base_name(project["model"]) == "scratch-lstm"
