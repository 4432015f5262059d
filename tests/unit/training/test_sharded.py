"""Layers that are shared out among processes: the losses of one process, its checkpoints and model, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
from safetensors.torch import load_file

from llmo.context import NullContext, Stopped
from llmo.errors import SpecError
from llmo.files import sha256_file
from llmo.specs import TrainSpec
from support.listening import Listening
from support.places import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="there is one GPU")
EXACT: dict[str, Any] = {"precision": "fp32", "dropout": 0.0, "epochs": 2, "learning_rate": 5e-3, "evaluate_every": 1}
KINDS = ("fsdp", "tensor")


class Train(Protocol):
    def __call__(self, data: Path, out: str = "out", **keys: Any) -> dict[str, Any]: ...


@pytest.mark.parametrize("kind", ["texts", "spans", "chats", "pairs"])
@pytest.mark.parametrize("parallelism", KINDS)
def test_losses_and_the_saved_model_are_those_of_one_process(
    train: Train, request: pytest.FixtureRequest, tmp_path: Path, kind: str, parallelism: str
) -> None:
    keys = dict(EXACT)
    if kind == "spans":
        keys["task"] = "token-classification"
    if kind in ("chats", "pairs"):
        keys |= {"task": "generation", "model": request.getfixturevalue("talker"), "max_length": 64, "batch_size": 8}
    if kind == "chats" and parallelism == "fsdp":
        keys["method"] = "lora"
    found = []
    for size in (1, 2):
        how = {"devices": size, "parallelism": "data" if size == 1 else parallelism}
        ctx = NullContext(2, tmp_path / f"c{size}")
        found.append(train(request.getfixturevalue(kind), f"{size}", **how, ctx=ctx, **keys))
    losses = [[entry["loss"] for entry in one["history"]] for one in found]
    assert len(losses[0]) >= 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=1e-3), "it learnt nothing"
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert two[name].shape == weight.shape
        # Adam makes a step of the same size of the smallest gradient, so that rounding can be seen there.
        assert float((two[name] - weight).abs().mean()) < 1e-3, name


@pytest.mark.parametrize("parallelism", KINDS)
def test_a_stop_is_gone_on_from_to_the_same_weights(
    train: Train, texts: Path, tmp_path: Path, parallelism: str
) -> None:
    keys: dict[str, Any] = {
        **{"precision": "fp32", "epochs": 3, "learning_rate": 5e-3, "checkpoint_seconds": 1e-6},
        **{"devices": 2, "parallelism": parallelism, "early_stopping": 2},
    }
    train(texts, "whole", ctx=NullContext(2, tmp_path / "a"), **keys)
    stops = Listening(tmp_path / "b", stop_at=5)
    stops.device = NullContext(2).device
    with pytest.raises(Stopped):
        train(texts, "broken", ctx=stops, **keys)
    assert not psutil.Process().children()
    steps: list[int] = []
    ctx = NullContext(2, tmp_path / "b", lambda step, _, said: steps.append(step) if "learning_rate" in said else None)
    train(texts, "rest", ctx=ctx, **keys)
    assert steps[0] > 4
    weights = [sha256_file(tmp_path / name / "model.safetensors") for name in ("whole", "rest")]
    assert weights[0] == weights[1]


def test_what_was_begun_on_two_goes_on_on_one(train: Train, texts: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {**EXACT, "checkpoint_seconds": 1e-6}
    whole = train(texts, "whole", ctx=NullContext(2, tmp_path / "a"), **keys)
    stops = Listening(tmp_path / "b", stop_at=5)
    stops.device = NullContext(2).device
    with pytest.raises(Stopped):
        train(texts, "broken", devices=2, parallelism="fsdp", ctx=stops, **keys)
    rest = train(texts, "rest", ctx=NullContext(2, tmp_path / "b"), **keys)
    losses = [[entry["loss"] for entry in one["history"]] for one in (whole, rest)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"devices": 1, "parallelism": "fsdp"}, "set train.devices too"),
        ({"devices": 2, "parallelism": "fsdp", "method": "ia3"}, "is of method full, last-n, lora, rslora"),
        ({"devices": 2, "parallelism": "tensor", "method": "lora"}, "is of method full, last-n, and the method is"),
        ({"devices": 2, "parallelism": "fsdp", "ema": 0.9}, "does not go with ema"),
        ({"devices": 2, "parallelism": "tensor", "optimizer": "adafactor"}, "looks at whole matrices"),
    ],
)
def test_what_does_not_go_together_is_refused_as_it_is_read(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainSpec(**keys)


def test_heads_that_cannot_be_shared_out_evenly_are_refused(train: Train, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"num_attention_heads, and train\.devices is 3"):
        train(texts, devices=3, parallelism="tensor", ctx=NullContext(3, tmp_path / "c"))
