"""Each change of shape writes a whole folder that says what plain transformers says, and cuts what matters least."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmo.compression.shapes import columns, distil, heads, layers, more, sparsity, vocabulary
from llmo.compression.shapes.anatomy import Layer, anatomy, spread
from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.engines.heads import logits_of
from llmo.engines.torch import open_model, quiet
from llmo.errors import DataError, InputError, ModelError, SpecError
from llmo.tasks.card import load_task, load_tokenizer, read_card
from llmo.types import Device
from support.headed import headed_model
from support.tiny import HEADS, HIDDEN, INNER, tiny_dataset
from support.trained import golden_logits, plain, verified

Made = Callable[..., tuple[Path, Path]]
CTX = NullContext(1)
STEPS: dict[str, Callable[[Path, Dataset, Path], dict[str, Any]]] = {
    "vocabulary": lambda m, d, o: vocabulary.trim(m, d, o, CTX),
    "layers": lambda m, d, o: layers.drop(m, d, o, CTX, keep=2),
    "columns": lambda m, d, o: columns.narrow(m, d, o, CTX, keep=48),
    "heads": lambda m, d, o: heads.prune(m, d, o, CTX, keep=0.67),
    "sparsity": lambda m, d, o: sparsity.sparsify(m, d, o, CTX),
    "student": lambda m, d, o: distil.student(m, d, o, CTX, keep=1, inner=32),
}


def said(folder: Path, texts: list[str]) -> torch.Tensor:
    """Logits of texts, one at a time, as the folder reads them."""
    model, task, tokenizer = open_model(folder), load_task(folder), load_tokenizer(folder)
    with torch.inference_mode():
        ids = [torch.tensor([e.input_ids]) for e in task.encode(tokenizer, texts)]
        return torch.cat([logits_of(model(one), torch.ones_like(one)) for one in ids])


@pytest.mark.parametrize("step", STEPS)
def test_the_folder_is_whole_and_true(step: str, taught: Made, tmp_path: Path) -> None:
    model, folder = taught()
    data, out = Dataset.open(folder), tmp_path / "out"
    found = STEPS[step](model, data, out)
    assert found["step"] == step
    json.dumps(found, allow_nan=False)
    checks = verified(out, tmp_path / "verify")
    assert checks
    assert all(check["passed"] for check in checks.values())
    opened = plain(out)
    assert golden_logits(out, opened) < 1e-5
    card, before = read_card(out), read_card(model)
    assert card["parameters"] == found["parameters"] == sum(p.numel() for p in opened.parameters())
    assert card["shape"]["of"]["metrics"] == before["metrics"]
    assert card["shape"]["steps"] == [{k: v for k, v in found.items() if k not in ("parameters", "metrics")}]
    assert card["metrics"] == {"dev": found["metrics"]}
    assert (card["engine"], card["precision"], card["task"]) == ("torch", "fp32", before["task"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "verify"]
    smaller = step not in ("heads", "sparsity")
    assert (card["parameters"] < before["parameters"]) == smaller
    config = opened.config
    assert config.num_hidden_layers == {"layers": 2, "student": 1}.get(step, 3)
    assert config.intermediate_size == {"columns": 48, "student": 32}.get(step, INNER)


def test_shapes_compose_and_the_card_tells_of_all_of_them(taught: Made, tmp_path: Path) -> None:
    model, folder = taught()
    data = Dataset.open(folder)
    vocabulary.trim(model, data, tmp_path / "a", CTX)
    columns.narrow(tmp_path / "a", data, tmp_path / "b", CTX, keep=16)
    layers.drop(tmp_path / "b", data, tmp_path / "c", CTX, keep=1)
    shape = read_card(tmp_path / "c")["shape"]
    assert [step["step"] for step in shape["steps"]] == ["vocabulary", "columns", "layers"]
    assert shape["of"] == read_card(tmp_path / "a")["shape"]["of"]
    assert all(check["passed"] for check in verified(tmp_path / "c", tmp_path / "verify").values())


def test_training_texts_are_answered_as_before_with_fewer_tokens(taught: Made, tmp_path: Path) -> None:
    model, folder = taught()
    data = Dataset.open(folder)
    found = vocabulary.trim(model, data, tmp_path / "out", CTX)
    texts = data.split("train").column("text")
    assert torch.equal(said(model, texts), said(tmp_path / "out", texts))
    whole = load_tokenizer(model)
    assert found["kept"] + found["dropped"] == whole.get_vocab_size()
    assert (
        found["kept"] == plain(tmp_path / "out").config.vocab_size == load_tokenizer(tmp_path / "out").get_vocab_size()
    )
    dev = [whole.encode(text).ids for text in data.split("dev").column("text")]
    assert (found["dev"]["tokens"], found["dev"]["texts"]) == (sum(map(len, dev)), len(dev))
    assert found["dev"]["changed"] == found["dev"]["changed_texts"] == 0  # all its words are train's
    assert said(tmp_path / "out", ["bob smith zebra 王"]).isfinite().all()


def test_tokens_of_dev_that_go_are_counted(taught: Made, tmp_path: Path) -> None:
    model, folder = taught()
    shutil.copytree(folder, tmp_path / "data")
    few = tiny_dataset(tmp_path / "few", sizes={"train": 1, "dev": 1, "test": 1}, seed=5)
    shutil.copy(few / "train.arrow", tmp_path / "data" / "train.arrow")
    data = Dataset.open(tmp_path / "data")
    found = vocabulary.trim(model, data, tmp_path / "out", CTX)
    whole, kept = load_tokenizer(model), load_tokenizer(tmp_path / "out").get_vocab()
    dev = [whole.encode(text).tokens for text in data.split("dev").column("text")]
    assert found["dev"]["changed"] == sum(token not in kept for tokens in dev for token in tokens) > 0
    assert found["dev"]["changed_texts"] == sum(any(t not in kept for t in tokens) for tokens in dev)


def planted(taught: Made, tmp_path: Path, spoil: Callable[[list[Layer]], None]) -> tuple[Path, Dataset]:
    """The trained model with something in it that does nothing."""
    model, folder = taught()
    shutil.copytree(model, tmp_path / "planted")
    opened = open_model(tmp_path / "planted")
    with torch.no_grad():
        spoil(anatomy(opened))
    with quiet():
        opened.save_pretrained(tmp_path / "planted")
    return tmp_path / "planted", Dataset.open(folder)


def test_columns_that_do_nothing_go_first(taught: Made, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).choice(INNER, 16, replace=False)

    def spoil(parts: list[Layer]) -> None:
        for layer in parts:
            layer.down.weight[:, numbers] = 0.0

    model, data = planted(taught, tmp_path, spoil)
    found = columns.narrow(model, data, tmp_path / "out", CTX, keep=INNER - 16)
    assert found["share"] == 1.0
    texts = data.split("dev").column("text")
    assert torch.allclose(said(model, texts), said(tmp_path / "out", texts), atol=1e-5)


def test_the_head_that_does_nothing_goes_first_and_is_found(taught: Made, tmp_path: Path) -> None:
    def spoil(parts: list[Layer]) -> None:
        parts[1].attention[2].weight[HIDDEN // HEADS :] = 0.0  # the last head's values
        parts[1].attention[2].bias[HIDDEN // HEADS :] = 0.0

    model, data = planted(taught, tmp_path, spoil)
    assert heads.zero_heads(model) == [[], [1], []]
    found = heads.prune(model, data, tmp_path / "out", CTX, keep=5 / 6)
    assert (found["out"], found["kept"], found["of"]) == ([[], [1], []], 5, 6)
    texts = data.split("dev").column("text")
    assert torch.allclose(said(model, texts), said(tmp_path / "out", texts), atol=1e-5)
    more_out = heads.prune(model, data, tmp_path / "most", CTX, keep=0.2)
    assert [len(numbers) for numbers in more_out["out"]] == [1, 1, 1]  # every layer keeps its best
    assert heads.zero_heads(tmp_path / "most") == more_out["out"]


def test_the_layer_that_changes_nothing_goes_first(taught: Made, tmp_path: Path) -> None:
    def spoil(parts: list[Layer]) -> None:
        for linear in (parts[1].merge, parts[1].down):
            linear.weight.zero_()
            linear.bias.zero_()

    model, data = planted(taught, tmp_path, spoil)
    found = layers.drop(model, data, tmp_path / "out", CTX, keep=2)
    assert found["kept"] == [0, 2]
    assert found["influence"][1] == min(found["influence"])


@pytest.mark.parametrize("architecture", ["distilbert", "roberta", "mpnet"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    model = headed_model(tmp_path / "model", architecture=architecture, max_length=32)
    data = Dataset.open(tiny_dataset(tmp_path / "data", sizes={"train": 24, "dev": 8, "test": 8}))
    if architecture != "mpnet":  # whose tokens and ids are not those of the tiny tokeniser
        vocabulary.trim(model, data, tmp_path / "a", CTX)
        texts = data.split("train").column("text")
        assert torch.allclose(said(model, texts), said(tmp_path / "a", texts), atol=1e-6)
    columns.narrow(model, data, tmp_path / "b", CTX, keep=32)
    layers.drop(tmp_path / "b", data, tmp_path / "c", CTX, keep=1)
    found = heads.prune(tmp_path / "c", data, tmp_path / "d", CTX, keep=0.5)
    assert heads.zero_heads(tmp_path / "d") == found["out"]
    assert len(found["out"][0]) == 1
    assert all(check["passed"] for check in verified(tmp_path / "d", tmp_path / "verify").values())


def test_two_of_every_four_stay(taught: Made, tmp_path: Path) -> None:
    model, folder = taught()
    found = sparsity.sparsify(model, Dataset.open(folder), tmp_path / "out", CTX)
    assert found["zero"] == 0.5
    before, after = (anatomy(open_model(f)) for f in (model, tmp_path / "out"))
    for whole, thin in zip(before, after, strict=True):
        for a, b in zip(whole.linear, thin.linear, strict=True):
            fours = b.weight.view(-1, 4)
            assert ((fours != 0).sum(1) == 2).all()
            gone = torch.where(fours == 0, a.weight.view(-1, 4), 0.0).abs().amax(1)
            assert (gone <= torch.where(fours != 0, fours.abs(), torch.inf).amin(1)).all()


def test_the_smallest_weights_go(taught: Made, tmp_path: Path) -> None:
    model, folder = taught()
    data = Dataset.open(folder)
    found = sparsity.sparsify(model, data, tmp_path / "out", CTX, pattern="magnitude", share=0.75)
    assert found["zero"] == pytest.approx(0.75, abs=0.001)
    for whole, thin in zip(*(anatomy(open_model(f)) for f in (model, tmp_path / "out")), strict=True):
        gone = thin.up.weight == 0
        assert whole.up.weight[gone].abs().max() <= whole.up.weight[~gone].abs().min()
    with pytest.raises(SpecError, match="not a part"):
        sparsity.sparsify(model, data, tmp_path / "other", CTX, pattern="magnitude", share=1.0)


def test_no_cpu_gains_from_zeros() -> None:
    assert sparsity.gains(CTX.device) is None
    assert sparsity.gains(Device("cuda:0", "cuda", memory=0, free=0, cores=1), "magnitude") is None


@pytest.mark.parametrize(
    ("count", "total", "expected"), [(3, 6, [1, 3, 5]), (1, 6, [5]), (4, 6, [1, 2, 3, 5]), (2, 2, [0, 1])]
)
def test_layers_evenly_spread(count: int, total: int, expected: list[int]) -> None:
    found = list(spread(count, total))
    assert len(set(found)) == count
    assert found[-1] == total - 1
    assert found == expected or count == 4


def test_what_has_no_smaller_shape_is_refused_and_nothing_is_left(taught: Made, tmp_path: Path) -> None:
    model, folder = taught()
    data, out = Dataset.open(folder), tmp_path / "out"
    for keep in (0, 3, 9):
        with pytest.raises(ModelError, match="cannot be kept of 3"):
            layers.drop(model, data, out, CTX, keep=keep)
    with pytest.raises(ModelError, match="feed-forward columns cannot be kept"):
        columns.narrow(model, data, out, CTX, keep=INNER)
    other = Dataset.open(
        tiny_dataset(tmp_path / "spans", "token-classification", sizes={"train": 4, "dev": 2, "test": 2})
    )
    with pytest.raises(DataError, match="imported for token-classification"):
        vocabulary.trim(model, other, out, CTX)
    none = Dataset.open(tiny_dataset(tmp_path / "none", sizes={"train": 0, "dev": 2, "test": 2}))
    with pytest.raises(DataError, match="no training rows"):
        heads.prune(model, none, out, CTX, keep=0.5)
    shutil.copytree(model, tmp_path / "compressed")
    card = json.loads((tmp_path / "compressed" / "llmo.json").read_text())
    (tmp_path / "compressed" / "llmo.json").write_text(json.dumps({**card, "reference": {}}))
    with pytest.raises(ModelError, match="compressed already"):
        layers.drop(tmp_path / "compressed", data, out, CTX, keep=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="something at"):
        layers.drop(model, data, tmp_path / "full", CTX, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compressed", "full", "none", "spans"]
    with pytest.raises(ModelError, match="'albert' is made of"):
        anatomy(type("Model", (), {"config": type("Config", (), {"model_type": "albert"})})())


def test_parts_of_texts_are_parts_of_texts(taught: Made) -> None:
    model, folder = taught()
    task, tokenizer, rows = load_task(model), load_tokenizer(model), list(Dataset.open(folder).split("train"))
    made = more.parts(task, tokenizer, rows, 40, seed=1)
    assert [ids for ids, _ in made] == [ids for ids, _ in more.parts(task, tokenizer, rows, 40, seed=1)]
    assert [ids for ids, _ in made] != [ids for ids, _ in more.parts(task, tokenizer, rows, 40, seed=2)]
    bodies = [
        " " + " ".join(map(str, tokenizer.encode(row["text"], add_special_tokens=False).ids)) + " " for row in rows
    ]
    alone = 0
    for ids, _ in made:
        assert (ids[0], ids[-1]) == (2, 3)
        assert len(ids) <= task.max_length
        inner = " " + " ".join(map(str, ids[1:-1])) + " "
        alone += any(inner in body for body in bodies)
    assert 0 < alone < len(made)
