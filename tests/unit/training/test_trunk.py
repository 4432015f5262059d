"""A frozen trunk's output, kept, gives the answers of the whole model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmo.context import NullContext, Stopped
from llmo.specs import LoraSpec, TrainSpec
from llmo.tasks.base import Task
from llmo.tasks.text_classification import TextClassification
from llmo.tasks.token_classification import TokenClassification
from llmo.training import precision, states
from llmo.training.batches import padded
from llmo.training.model import Built, build
from llmo.training.precision import Precision
from llmo.training.trunk import Trunk
from support.tiny import tiny_model

TASK = TextClassification(["a", "b", "c"], max_length=32)
TAGS = TokenClassification(["O", "B-x", "I-x"], max_length=32)
TEXTS = [np.array(ids, np.int32) for ids in ([2, 7, 9, 11, 3], [2, 40, 3], [2, 41, 42, 3], [2, 40, 3])]
FP32 = Precision("fp32", torch.device("cpu"), "")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def prepared(base: Path, task: Task, **keys: object) -> tuple[Built, Trunk]:
    torch.manual_seed(1)
    built = build(base, task, TrainSpec(**keys))
    trunk = Trunk.of(built)
    assert trunk is not None
    built.model.eval()
    return built, trunk


def computing(trunk: Trunk, calls: list[int] | None = None) -> states.Compute:
    def compute(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if calls is not None:
            calls.append(len(inputs["input_ids"]))
        with torch.inference_mode():
            return trunk.below(inputs)

    return compute


@pytest.mark.parametrize(
    ("task", "keys", "frozen", "first"),
    [
        (TASK, {"method": "head"}, 3, True),
        (TAGS, {"method": "head"}, 3, False),
        (TASK, {"method": "last-n", "last_n": 1}, 2, False),
        (TAGS, {"method": "last-n", "last_n": 2}, 1, False),
        (TASK, {"method": "lora", "lora": LoraSpec(target_modules=["encoder.layer.2.output.dense"])}, 2, False),
    ],
)
def test_the_divided_model_says_the_same(
    tmp_path: Path, task: Task, keys: dict[str, object], frozen: int, first: bool
) -> None:
    built, trunk = prepared(tiny_model(tmp_path / "base", layers=3), task, **keys)
    assert (trunk.frozen, trunk.depth, trunk.first_only) == (frozen, 3, first)
    made, there = states.open_states(tmp_path, trunk, states.distinct(TEXTS), computing(trunk), 32, FP32, NullContext())
    assert not there
    inputs = padded(TEXTS, 0, 32)
    with torch.no_grad():
        whole = built.model(**inputs).logits
        kept = trunk.above(made.batch(TEXTS), inputs["attention_mask"])
    real = inputs["attention_mask"].bool()[:, : kept.shape[1]]
    assert torch.allclose(
        *((whole[:, : kept.shape[1]][real], kept[real]) if whole.ndim == 3 else (whole, kept)), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "electra", "mpnet", "modernbert", "deberta-v2"])
def test_other_families_are_divided_where_they_let_themselves(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **SMALL, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        dim=32, hidden_dim=48, n_layers=3, n_heads=4, embedding_size=32,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    built = build(tmp_path, TASK, TrainSpec(method="last-n", last_n=1))
    trunk = Trunk.of(built)
    assert trunk is not None
    assert trunk.frozen == 2


def test_what_learns_everywhere_is_not_divided(base: Path) -> None:
    assert Trunk.of(build(base, TASK, TrainSpec())) is None
    assert Trunk.of(build(base, TASK, TrainSpec(method="lora"))) is None


def test_gradients_are_those_of_the_whole_model(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", layers=3)
    built, trunk = prepared(base, TASK, method="last-n", last_n=1)
    made, _ = states.open_states(tmp_path, trunk, states.distinct(TEXTS), computing(trunk), 32, FP32, NullContext())
    inputs = padded(TEXTS, 0, 32)
    found = []
    for run in (lambda: built.model(**inputs).logits, lambda: trunk.above(made.batch(TEXTS), inputs["attention_mask"])):
        built.model.zero_grad()
        run().pow(2).sum().backward()
        found.append({name: p.grad.clone() for name, p in built.trainable() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def test_an_entry_is_made_once_and_only_for_its_own_trunk_and_texts(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", layers=3)
    cache = tmp_path / "cache"
    cache.mkdir()
    _, trunk = prepared(base, TASK, method="head")
    calls: list[int] = []

    def there(trunk: Trunk, texts: list[np.ndarray], how: Precision = FP32) -> bool:
        return states.open_states(
            cache, trunk, states.distinct(texts), computing(trunk, calls), 32, how, NullContext()
        )[1]

    assert not there(trunk, TEXTS)
    assert there(trunk, TEXTS[::-1])
    assert sum(calls) == 3  # one of the four texts is there twice
    assert not there(trunk, TEXTS[:2])
    assert not there(trunk, TEXTS, precision.Precision("bf16", FP32.device, ""))
    _, other = prepared(tiny_model(tmp_path / "other", seed=5, layers=3), TASK, method="head")
    assert not there(other, TEXTS)
    _, lower = prepared(base, TASK, method="last-n", last_n=1)
    assert not there(lower, TEXTS)


def test_the_longest_unused_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    _, trunk = prepared(tiny_model(tmp_path / "base"), TASK, method="head")
    each = states.size(trunk, [TEXTS[0]], FP32)
    monkeypatch.setattr(states, "room", lambda _: 2 * each)
    for age, text in enumerate(TEXTS[:3]):
        made, _ = states.open_states(cache, trunk, [text], computing(trunk), 32, FP32, NullContext())
        for entry in cache.iterdir():
            os.utime(entry, (age, age)) if entry.is_dir() and entry.stat().st_mtime > 10 else None
    assert sum(path.is_dir() for path in cache.iterdir()) == 2
    again, there = states.open_states(cache, trunk, [TEXTS[0]], computing(trunk), 32, FP32, NullContext())
    assert not there
    assert made.batch([TEXTS[2]]).shape == again.batch([TEXTS[0]]).shape == (1, 1, 32)


def test_what_another_job_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trunk = prepared(tiny_model(tmp_path / "base"), TASK, method="head")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(states, "room", lambda _: 1)
    compute = computing(trunk)
    opened: list[bool] = []

    def meanwhile(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        opened.append(states.open_states(cache, trunk, [TEXTS[1]], compute, 32, FP32, NullContext())[1])
        return compute(inputs)

    made, _ = states.open_states(cache, trunk, [TEXTS[0]], meanwhile, 32, FP32, NullContext())
    assert opened == [False]
    assert made.batch([TEXTS[0]]).shape == (1, 1, 32)
    assert [path.name for path in cache.glob("*.tmp")] == []


def test_a_stop_leaves_nothing_half_done(tmp_path: Path) -> None:
    _, trunk = prepared(tiny_model(tmp_path / "base"), TASK, method="head")
    cache = tmp_path / "cache"
    cache.mkdir()
    ctx = NullContext()
    ctx.should_stop = lambda: True  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        states.open_states(cache, trunk, states.distinct(TEXTS), computing(trunk), 32, FP32, ctx)
    assert not [path for path in cache.iterdir() if path.is_dir()]
