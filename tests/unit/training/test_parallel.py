"""Several processes share every batch, or the layers too: the losses of one process, whoever dies, what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from llmo.context import NullContext, Stopped
from llmo.errors import AttemptLost, NeedsError, SpecError
from llmo.files import sha256_file
from llmo.jobspecs import TrainJobSpec, TuneJobSpec
from llmo.specs import TrainSpec
from llmo.training import parallel
from llmo.training.failures import StepTooLarge
from llmo.training.parallel import Group
from support.listening import Listening
from support.places import ON_GPU
from support.tiny import tiny_dataset

pytestmark = pytest.mark.skipif(ON_GPU, reason="there is one GPU")
EXACT: dict[str, Any] = {"precision": "fp32", "dropout": 0.0, "epochs": 2, "learning_rate": 5e-3, "evaluate_every": 1}
SAVES: dict[str, Any] = {"precision": "fp32", "epochs": 3, "learning_rate": 5e-3, "checkpoint_seconds": 1e-6}


PARALLELISMS = ("data", "fsdp", "tensor")


class Train(Protocol):
    def __call__(self, data: Path, out: str = "out", **keys: Any) -> dict[str, Any]: ...


class Kills(NullContext):
    """Kills the second process of the training after a step."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(2, folder)
        self._step = step

    def report(self, step: int, total: int | None = None, **metrics: float | str) -> None:
        if step == self._step and "learning_rate" in metrics:
            (other,) = psutil.Process().children()
            os.kill(other.pid, signal.SIGKILL)


def test_a_batch_is_dealt_out_whole_and_evenly() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 90)
    for size, count in ((2, 16), (3, 16), (4, 3), (2, 1)):
        batch = np.random.default_rng(1).permutation(90)[:count]
        shares = []
        for rank in range(size):
            group = Group.__new__(Group)
            group.rank, group.size = rank, size
            shares.append(group.share(lengths, batch))
        assert sorted(np.concatenate(shares)) == sorted(batch)
        if count >= 4 * size:
            tokens = [int(lengths[share].sum()) for share in shares]
            assert max(tokens) < 1.3 * min(tokens)


@pytest.mark.parametrize("kind", ["texts", "spans", "chats", "pairs"])
@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_losses_and_the_saved_model_are_those_of_one_process(
    train: Train, request: pytest.FixtureRequest, tmp_path: Path, kind: str, parallelism: str
) -> None:
    keys = dict(EXACT)
    if kind == "spans":
        keys["task"] = "token-classification"
    if kind in ("chats", "pairs"):
        keys |= {"task": "generation", "model": request.getfixturevalue("talker"), "max_length": 64, "batch_size": 8}
    if kind == "chats" and parallelism != "tensor":
        keys["method"] = "lora"
    found = []
    for size in (1, 2):
        how = {"devices": size, "parallelism": "data" if size == 1 else parallelism}
        ctx = NullContext(2, tmp_path / f"c{size}")
        found.append(train(request.getfixturevalue(kind), f"{size}", ctx=ctx, **how, **keys))
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


@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_a_process_that_dies_is_named_and_the_next_attempt_goes_on_to_the_same_weights(
    train: Train, texts: Path, tmp_path: Path, parallelism: str
) -> None:
    keys = SAVES | {"devices": 2, "parallelism": parallelism}
    train(texts, "whole", ctx=NullContext(2, tmp_path / "a"), **keys)
    with pytest.raises(AttemptLost, match=r"process 2 of 2 of this training ended by signal 9 \(Killed\)"):
        train(texts, "broken", ctx=Kills(tmp_path / "b", 4), **keys)
    assert not psutil.Process().children()
    steps: list[int] = []
    ctx = NullContext(2, tmp_path / "b", lambda step, _, said: steps.append(step) if "learning_rate" in said else None)
    train(texts, "rest", ctx=ctx, **keys)
    assert steps[0] >= 4
    weights = [sha256_file(tmp_path / name / "model.safetensors") for name in ("whole", "rest")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_a_stop_ends_all_processes_and_is_gone_on_from(
    train: Train, texts: Path, tmp_path: Path, parallelism: str
) -> None:
    keys = SAVES | {"devices": 2, "parallelism": parallelism, "early_stopping": 2}
    train(texts, "whole", ctx=NullContext(2, tmp_path / "a"), **keys)
    stops = Listening(tmp_path / "b", stop_at=5)
    stops.device = NullContext(2).device
    with pytest.raises(Stopped):
        train(texts, "broken", ctx=stops, **keys)
    assert not psutil.Process().children()
    threads: set[int] = set()

    def told(step: int, total: int | None, said: dict[str, Any]) -> None:
        if "learning_rate" in said:
            threads.add(torch.get_num_threads())

    train(texts, "rest", ctx=NullContext(4, tmp_path / "b", told), **keys)
    assert threads == {1}, "those of the first attempt, whatever was granted now"
    weights = [sha256_file(tmp_path / name / "model.safetensors") for name in ("whole", "rest")]
    assert weights[0] == weights[1]


def test_a_process_that_dies_before_it_meets_the_others_is_not_waited_for(tmp_path: Path) -> None:
    request = TrainJobSpec(task={"name": "text-classification"}, devices=2)  # type: ignore[arg-type]
    inputs, ctx = dict.fromkeys(("data", "model"), tmp_path / "nowhere"), NullContext(2, tmp_path / "c")
    with (
        pytest.raises(AttemptLost, match="process 2 of 2 of this training ended with exit code 1"),
        parallel.group(request, inputs, ctx, torch.device("cpu")),
    ):
        pytest.fail("it has nothing to train on")
    assert not psutil.Process().children()


def test_an_error_of_the_first_process_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_start", lambda *_: subprocess.Popen(["sh", "-c", "exit 1"]))
    monkeypatch.setattr(parallel, "_await", lambda *_: None)
    monkeypatch.setattr(parallel, "Group", lambda *_: None)
    request = TrainJobSpec(task={"name": "text-classification"}, devices=2)  # type: ignore[arg-type]
    ctx = NullContext(2, tmp_path / "c")
    with (
        pytest.raises(RuntimeError, match="shapes do not fit"),
        parallel.group(request, {}, ctx, torch.device("cpu")),
    ):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("codes", "kind", "said"),
    [
        ("15", StepTooLarge, "process 3 of 3 found no memory"),
        ("1-", AttemptLost, "process 3 of 3 of this training ended by signal 9"),
        ("11", AttemptLost, "process 2 of 3 of this training ended with exit code 1"),
    ],
)
def test_the_one_that_the_others_died_of_is_named(codes: str, kind: type[Exception], said: str) -> None:
    others = [subprocess.Popen(["sh", "-c", "kill -9 $$" if code == "-" else f"exit {code}"]) for code in codes]
    found = parallel._lost(others, 3)
    assert isinstance(found, kind)
    assert said in str(found)


def test_what_cannot_be_shared_is_refused(train: Train, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match=r"train\.devices is 3, and the job was given 2 cores"):
        train(texts, devices=3, ctx=NullContext(2, tmp_path / "c"))
    with pytest.raises(ValueError, match="side by side"):
        TuneJobSpec(task={"name": "text-classification"}, train=TrainSpec(devices=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", [{}, {"method": "last-n", "last_n": 1}])
def test_rows_that_are_told_apart_from_each_other_stay_together(
    train: Train, tmp_path: Path, keys: dict[str, Any]
) -> None:
    pairs = tiny_dataset(tmp_path / "embeds", "sentence-embedding")
    with pytest.raises(SpecError, match="no process can have a part"):
        train(pairs, devices=2, task="sentence-embedding", ctx=NullContext(2, tmp_path / "c"), **keys)


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
