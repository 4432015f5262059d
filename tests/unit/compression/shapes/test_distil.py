"""A student comes nearer to its teacher for every task, keeps its zeros, and a stopped recovery leaves nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmo.compression.shapes import columns, distil, fake, heads, layers, sparsity, vocabulary
from llmo.compression.shapes.anatomy import anatomy
from llmo.compression.shapes.distil import Recovery
from llmo.compression.shapes.imitation import Nearness, logits_apart
from llmo.context import NullContext, Stopped
from llmo.data.dataset import Dataset
from llmo.engines.heads import logits_of
from llmo.engines.torch import open_model
from llmo.errors import ModelError, SpecError
from llmo.files import sha256_file
from llmo.tasks.base import Encoding, sequences
from llmo.tasks.card import load_task, load_tokenizer, read_card, write_card
from support.listening import Listening
from support.tiny import tiny_dataset
from support.trained import verified

Made = Callable[..., tuple[Path, Path]]
CTX = NullContext(1)
SHORT = Recovery(samples=384, learning_rate=2e-3, parts=64, hidden=1.0)
TASKS = [
    ("text-classification", False), ("text-classification", True), ("token-classification", False),
    ("regression", False), ("extractive-qa", False), ("sentence-embedding", False),
]  # fmt: skip


def apart(folder: Path, teacher: Path, data: Dataset) -> float:
    """The mean distance of the two folders' logits on dev."""
    task, found = load_task(teacher), []
    tokenizers, models = [load_tokenizer(f) for f in (folder, teacher)], [open_model(f) for f in (folder, teacher)]
    rows = list(data.split("dev"))
    for texts in zip(*(sequences(task.encode_rows(t, rows)) for t in tokenizers), strict=True):
        with torch.inference_mode():
            ids = [torch.tensor([one]) for one in texts]
            said = [logits_of(m(one), torch.ones_like(one)).float() for m, one in zip(models, ids, strict=True)]
            found.append(float(logits_apart(task, *said, torch.ones_like(ids[0]), 1.0)))
    return sum(found) / len(found)


@pytest.mark.parametrize(("task", "multi_label"), TASKS)
def test_a_student_learns_what_its_teacher_says(task: str, multi_label: bool, taught: Made, tmp_path: Path) -> None:
    teacher, folder = taught(task, multi_label)
    data = Dataset.open(folder)
    distil.student(teacher, data, tmp_path / "student", CTX, keep=1, inner=32)
    found = distil.recover(tmp_path / "student", teacher, data, tmp_path / "out", CTX, SHORT)
    assert apart(tmp_path / "out", teacher, data) < 0.7 * apart(tmp_path / "student", teacher, data)
    assert all(check["passed"] for check in verified(tmp_path / "out", tmp_path / "verify").values())
    one_text = task in ("text-classification", "token-classification", "regression")
    assert found["rows"][1] == (found["rows"][0] if one_text else 0)
    assert read_card(tmp_path / "out")["shape"]["steps"][1]["samples"] == 384
    before, after = (open_model(f).config.to_dict() for f in (tmp_path / "student", tmp_path / "out"))
    assert {k: v for k, v in after.items() if "dropout" in k} == {k: v for k, v in before.items() if "dropout" in k}


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "extractive-qa"])
def test_a_teacher_who_tells_once_says_the_same(task: str, taught: Made, tmp_path: Path) -> None:
    """What is known beforehand is what it would say when asked."""
    teacher, folder = taught(task)
    data = Dataset.open(folder)
    distil.student(teacher, data, tmp_path / "student", CTX, keep=1)
    for number, hidden in enumerate((0.0, 1e-12)):  # with which it is asked each time
        how = replace(SHORT, samples=64, hidden=hidden, parts=16)
        distil.recover(tmp_path / "student", teacher, data, tmp_path / f"out-{number}", CTX, how)
    told, asked = (open_model(tmp_path / f"out-{number}").state_dict() for number in range(2))
    start = open_model(tmp_path / "student").state_dict()
    off = sum(float((tensor - asked[name]).abs().sum()) for name, tensor in told.items())
    assert off < 0.05 * sum(float((tensor - start[name]).abs().sum()) for name, tensor in told.items())


def test_the_student_may_have_part_of_the_vocabulary(taught: Made, tmp_path: Path) -> None:
    teacher, folder = taught()
    data = Dataset.open(folder)
    vocabulary.trim(teacher, data, tmp_path / "trimmed", CTX)
    layers.drop(tmp_path / "trimmed", data, tmp_path / "student", CTX, keep=1)
    distil.recover(tmp_path / "student", teacher, data, tmp_path / "out", CTX, SHORT)
    assert apart(tmp_path / "out", teacher, data) < 0.7 * apart(tmp_path / "student", teacher, data)
    with pytest.raises(ModelError, match="which the teacher does not know"):
        distil.recover(teacher, tmp_path / "trimmed", data, tmp_path / "other", CTX, SHORT)
    shutil.copytree(teacher, tmp_path / "longer")
    card = read_card(teacher)
    write_card(tmp_path / "longer", {**card, "task": {**card["task"], "max_length": 64}})
    with pytest.raises(ModelError, match="different tasks"):
        distil.recover(tmp_path / "student", tmp_path / "longer", data, tmp_path / "other", CTX, SHORT)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"temperature": 0.0}, {"hidden": -1.0}, {"parts": -1}])
def test_a_recovery_that_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"{next(iter(wrong))} of a recovery is"):
        Recovery(**wrong)


def test_what_was_taken_out_stays_out(taught: Made, tmp_path: Path) -> None:
    teacher, folder = taught()
    data = Dataset.open(folder)
    heads.prune(teacher, data, tmp_path / "heads", CTX, keep=0.5)
    sparsity.sparsify(tmp_path / "heads", data, tmp_path / "student", CTX)
    distil.recover(tmp_path / "student", teacher, data, tmp_path / "out", CTX, SHORT)
    assert heads.zero_heads(tmp_path / "out") == heads.zero_heads(tmp_path / "heads") != [[], [], []]
    learnt = 0.0
    for thin, after in zip(*(anatomy(open_model(tmp_path / f)) for f in ("student", "out")), strict=True):
        for a, b in zip(thin.linear, after.linear, strict=True):
            assert torch.equal(a.weight == 0, b.weight == 0)
            learnt = max(learnt, float((a.weight - b.weight).detach().abs().max()))
    assert learnt > 1e-3


def test_a_stopped_recovery_leaves_nothing_and_goes_on_to_the_same_weights(taught: Made, tmp_path: Path) -> None:
    teacher, folder = taught()
    data = Dataset.open(folder)
    columns.narrow(teacher, data, tmp_path / "student", CTX, keep=16)
    distil.recover(tmp_path / "student", teacher, data, tmp_path / "whole", Listening(tmp_path / "c1"), SHORT)
    ctx = Listening(tmp_path / "c2", stop_at=7)
    with pytest.raises(Stopped):
        distil.recover(tmp_path / "student", teacher, data, tmp_path / "out", ctx, SHORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c1", "c2", "student", "whole"]
    ctx = Listening(tmp_path / "c2")
    distil.recover(tmp_path / "student", teacher, data, tmp_path / "out", ctx, SHORT)
    assert any("resumed from the checkpoint of step 7 of 24" in note for note in ctx.notes)
    assert sha256_file(tmp_path / "out" / "model.safetensors") == sha256_file(tmp_path / "whole" / "model.safetensors")
    assert not list((tmp_path / "c2").rglob("*.safetensors"))


def test_recovered_for_few_bits_less_is_lost_in_them(
    taught: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two bits and a half, where there is much to lose."""
    monkeypatch.setattr(fake, "STEPS", 2)
    teacher, folder = taught()
    data = Dataset.open(folder)
    columns.narrow(teacher, data, tmp_path / "student", CTX, keep=48)
    rows = load_task(teacher).encode_rows(load_tokenizer(teacher), list(data.split("dev")))
    exact, lost = open_model(teacher), {}
    for int8 in (False, True):
        how = replace(SHORT, parts=0, int8=int8)
        distil.recover(tmp_path / "student", teacher, data, tmp_path / f"out-{int8}", CTX, how)
        model = open_model(tmp_path / f"out-{int8}")
        with torch.inference_mode(), fake.quantised([m for part in anatomy(model) for m in part.linear]):
            given = [torch.tensor([row.input_ids]) for row in rows]
            lost[int8] = sum(float((model(ids).logits - exact(ids).logits).abs().mean()) for ids in given)
    assert lost[True] < 0.7 * lost[False]


def test_without_dev_the_last_weights_are_kept(taught: Made, tmp_path: Path) -> None:
    teacher, folder = taught()
    shutil.copytree(folder, tmp_path / "data")
    none = tiny_dataset(tmp_path / "none", sizes={"train": 1, "dev": 0, "test": 1})
    shutil.copy(none / "dev.arrow", tmp_path / "data" / "dev.arrow")
    data = Dataset.open(tmp_path / "data")
    distil.student(teacher, data, tmp_path / "student", CTX, keep=2)
    found = distil.recover(tmp_path / "student", teacher, data, tmp_path / "out", CTX, replace(SHORT, samples=64))
    assert (found["metrics"], found["best_step"], found["steps"]) == ({}, found["steps"], 4)


def test_of_two_equal_figures_the_nearer_student_is_better() -> None:
    encoding = Encoding([2, 3], 2, [], [])
    wanted = {(2, 3): np.array([1.0, 2.0], np.float32)}
    values = {}
    for higher in (True, False):
        for off in (0.0, 0.5):
            near = Nearness(lambda some, off=off: [wanted[2, 3] + np.float32(off) for _ in some], wanted)
            near([encoding])
            values[higher, off] = near.of(0.9, higher)
    assert 0.9 < values[True, 0.5] < values[True, 0.0] < 0.9 + 2e-6
    assert 0.9 - 2e-6 < values[False, 0.0] < values[False, 0.5] < 0.9


def test_a_fake_product_is_that_of_rounded_numbers_and_learns_past_them() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 5), torch.randn(3, 4, 8, requires_grad=True)
    plain = layer(x).detach()

    def rounded(of: torch.Tensor) -> torch.Tensor:
        scale = of.detach().abs().amax(-1, keepdim=True) / 127
        return of + ((of / scale).round() * scale - of).detach()  # the gradient passes over it

    slope = torch.randn(3, 4, 5)
    expected = nn.functional.linear(rounded(x), rounded(layer.weight), layer.bias)
    wanted = torch.autograd.grad(expected, (x, layer.weight, layer.bias), slope)
    with fake.quantised([layer]):
        said = layer(x)
        found = torch.autograd.grad(said, (x, layer.weight, layer.bias), slope)
    assert torch.allclose(said, expected, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert 0.0 < float((said.detach() - plain).abs().max()) < 0.1
    assert torch.equal(layer(x).detach(), plain)
