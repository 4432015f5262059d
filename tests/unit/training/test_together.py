"""Several tasks on one trunk: their turns, one trunk for all, what each becomes, resuming, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.errors import ModelError, SpecError
from llmo.jobspecs import TrainJobSpec
from llmo.specs import TrainSpec
from llmo.tasks.base import Task
from llmo.tasks.card import load_task, read_card
from llmo.training import operation, part, together
from llmo.training.batches import Encoded
from llmo.training.model import build
from llmo.training.operation import prepare
from llmo.training.together import Mixed, Together, shares
from support.headed import headed_model, topics
from support.tiny import tiny_dataset
from support.trained import golden_logits, run_twice, verified

ALSO = {"things": "token-classification", "hours": "regression"}


class Run(Protocol):
    def __call__(self, out: str, ctx: NullContext | None = None, **keys: Any) -> dict[str, Any]: ...


def spec_of(**keys: Any) -> dict[str, Any]:
    also = keys.pop("also", ALSO)
    tasks = [{"name": name, "task": {"name": task, "max_length": 48}} for name, task in also.items()]
    made = TrainJobSpec(task={"name": "text-classification", "max_length": 48}, also=tasks, **keys)
    return made.plain()


@pytest.fixture(scope="module")
def inputs(base: Path, texts: Path, spans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = {"train": 24, "dev": 16, "test": 16}
    hours = tiny_dataset(tmp_path_factory.mktemp("data") / "hours", "regression", sizes=sizes)
    return {"data": texts, "model": base, "data:things": spans, "data:hours": hours}


@pytest.fixture
def run(inputs: dict[str, Path], tmp_path: Path) -> Run:
    def train(out: str, ctx: NullContext | None = None, **keys: Any) -> dict[str, Any]:
        (tmp_path / out).mkdir()
        found = ctx or NullContext(1, tmp_path / f"{out}-checkpoint")
        return operation.run(spec_of(**keys), inputs, tmp_path / out, found)

    return train


def parted(folder: Path, name: str) -> Path:
    out = folder.with_name(f"{folder.name}-{name}")
    out.mkdir()
    part.run({"name": name}, {"model": folder}, out, NullContext(1))
    return out


def mixed(*rows: int, temperature: float = 1.0) -> Mixed:
    """Sources of so many rows, whose token ids name their source."""
    made = []
    for number, count in enumerate(rows):
        ids, starts = np.full(3 * count, number, np.int32), np.arange(count + 1, dtype=np.int64) * 3
        made.append(Encoded(ids, starts, [np.asarray(0)] * count, 0, 16))
    return Mixed.of(made, temperature)


def test_the_hotter_the_more_alike_are_the_shares() -> None:
    assert shares([90, 9, 1], 1.0).tolist() == [90, 9, 1]
    assert shares([7, 7, 7], 1.0).tolist() == [7, 7, 7]
    assert shares([81, 9], 2.0).tolist() == [68, 22]  # as 9 to 3
    assert shares([90, 9, 1], 1e9).tolist() in ([34, 33, 33], [33, 34, 33], [33, 33, 34])
    assert shares([1000, 1, 1], 1.0).tolist() == [1000, 1, 1]
    assert shares([1000, 1, 1], 3.0).sum() == 1002
    assert shares([3, 1, 1, 1], 1.0).min() == 1


def test_an_epoch_is_every_row_once_in_batches_of_one_source() -> None:
    rows = mixed(50, 20, 9)
    order = rows.order(8, 3, 0)
    assert len(order) == rows.per_epoch(8) == 7 + 3 + 2
    assert sorted(np.concatenate(order).tolist()) == list(range(79))
    for batch in order:
        source, own = rows.own(batch)
        assert {int(rows.sequence(int(row))[0]) for row in batch} == {source}
        assert own.min() >= 0
        assert own.max() < len(rows.sources[source])
    turns = [rows.own(batch)[0] for batch in order]
    assert turns != sorted(turns)


def test_the_order_is_of_seed_and_epoch_alone() -> None:
    rows = mixed(50, 20, temperature=2)

    def order(made: Mixed, seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in made.order(8, seed, epoch)]

    assert order(rows, 3, 4) == order(mixed(50, 20, temperature=2), 3, 4)
    assert order(rows, 3, 4) not in (order(rows, 3, 5), order(rows, 4, 4))


def test_each_source_goes_on_where_it_was_in_the_epoch_before() -> None:
    """Of 4 sources' batches a hot mixture takes other numbers than they have; no row is seen twice before all were."""
    rows = mixed(64, 16, temperature=3)
    counts = shares([8, 2], 3).tolist()
    assert counts[1] > 2
    seen = [batch for epoch in range(8) for batch in rows.order(8, 3, epoch)]
    for source in (0, 1):
        own = np.concatenate([rows.own(batch)[1] for batch in seen if rows.own(batch)[0] == source])
        assert len(own) == 8 * counts[source] * 8
        times = Counter(own.tolist())
        assert len(times) == len(rows.sources[source])
        assert max(times.values()) - min(times.values()) <= 1


def test_the_trunk_is_one_and_every_task_teaches_it(inputs: dict[str, Path]) -> None:
    request = TrainJobSpec(**spec_of(precision="fp32", dropout=0.0))
    others = together.data_sets(inputs)
    ready = prepare(request, Dataset.open(inputs["data"]), inputs["model"], NullContext(1), others)
    first = ready.course.built
    trunk = first.network.base_model
    assert [one.course.built.model.get_submodule("trunk") is trunk for one in ready.others] == [True, True]
    named = dict(first.trainable())
    assert len({id(p) for p in named.values()}) == len(named)
    mine = {
        source: {n for n in named if n.startswith(f"others.{source - 1}.")} if source else {"classifier.weight"}
        for source in range(3)
    }
    assert isinstance(ready.objective, Together)
    assert isinstance(ready.rows, Mixed)
    loop = ready.loop(NullContext(1))
    embedding = "bert.embeddings.word_embeddings.weight"
    assert loop.narrowed is not None, "the data use a part of the vocabulary"
    assert bool((loop.narrowed.places[torch.from_numpy(ready.rows.ids).long()] >= 0).all())
    named = dict(first.trainable())
    batches = {ready.rows.own(batch)[0]: batch for batch in ready.rows.order(16, 1, 0)}
    for source, batch in sorted(batches.items()):
        loop.backward(batch)
        assert named[embedding].grad is not None
        assert float(named[embedding].grad.abs().sum()) > 0
        for other, names in mine.items():
            assert all((named[name].grad is not None) == (other == source) for name in names), (source, other)
        loop.forget_gradients()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_task_becomes_a_model_with_the_same_trunk(run: Run, tmp_path: Path, method: str) -> None:
    result = run("out", method=method, epochs=20, learning_rate=5e-3, temperature=2)
    assert set(result["also"]) == set(ALSO)
    assert result["test"]["after"]["accuracy"]["value"] > result["test"]["before"]["accuracy"]["value"] + 0.1
    after, before = (result["also"]["hours"]["test"][when]["rmse"]["value"] for when in ("after", "before"))
    assert after < before
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in whole if "others" in name]
    for name, task in ALSO.items():
        folder = parted(tmp_path / "out", name)
        found = load_file(folder / "model.safetensors")
        shared = {key for key in found if key.startswith("bert.") and "pooler" not in key}
        assert shared == {key for key in whole if key.startswith("bert.") and "pooler" not in key}
        assert all(np.array_equal(found[key], whole[key]) for key in shared)
        card = read_card(folder)
        assert (card["method"], card["together"]["by"], card["metric"]) == ("head", method, load_task(folder).metric)
        assert card["metrics"]["test"] == result["also"][name]["test"]
        opened = getattr(transformers, load_task(folder).auto_class).from_pretrained(folder)
        assert golden_logits(folder, opened) < 1e-4
        assert all(check["passed"] for check in verified(folder, tmp_path / f"{name}-verify").values())
        assert json.loads((folder / "report" / "report.json").read_text())["task"] == task
    assert all(check["passed"] for check in verified(tmp_path / "out", tmp_path / "verify").values())


@pytest.mark.parametrize("method", ["last-n", "dora", "adalora", "ia3"])
def test_every_method_that_teaches_the_trunk_does(base: Path, tmp_path: Path, method: str) -> None:
    data = {"data": "regression", "data:asked": "extractive-qa"}
    inputs = {"model": base} | {name: tiny_dataset(tmp_path / task, task) for name, task in data.items()}
    (tmp_path / "out").mkdir()
    spec = spec_of(method=method, last_n=1, epochs=1, learning_rate=1e-2, also={"asked": "extractive-qa"})
    spec["task"]["name"] = "regression"
    operation.run(spec, inputs, tmp_path / "out", NullContext(1, tmp_path / "checkpoint"))
    folder = parted(tmp_path / "out", "asked")
    assert all(check["passed"] for check in verified(folder, tmp_path / "verify").values())
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after.get(f"bert.{name}", before[name]))}
    assert any("encoder.layer.1" in name for name in changed)
    assert method != "last-n" or not any("layer.0" in name or "embeddings" in name for name in changed)


def test_what_decides_is_the_mean_of_all(run: Run) -> None:
    result = run("out", epochs=3, early_stopping=3)
    values = [result["dev"]["accuracy"], result["also"]["things"]["dev"]["f1"], result["also"]["hours"]["dev"]["r2"]]
    best = max(entry["dev_mean"] for entry in result["history"])
    assert best == pytest.approx(np.mean([one["value"] for one in values]), abs=2e-2)  # bf16 while it trains


@pytest.mark.parametrize("stop_at", [1, 9])
def test_a_resumed_run_equals_the_unbroken_one(run: Run, tmp_path: Path, stop_at: int) -> None:
    """Also where only one task had its turn."""
    keys: dict[str, Any] = {"epochs": 1, "temperature": 3, "ema": 0.9, "early_stopping": 5, "evaluate_every": 4}
    run_twice(lambda out, ctx: run(out, ctx, **keys), tmp_path, stop_at)
    heads = [tmp_path / out / "also" / "things" / "head.safetensors" for out in ("whole", "resumed")]
    assert heads[0].read_bytes() == heads[1].read_bytes()


def test_tasks_and_data_sets_belong_together(run: Run) -> None:
    with pytest.raises(SpecError, match="the task 'hours' has the input 'data:hours'"):
        run("one", also={"things": "token-classification"})
    with pytest.raises(SpecError, match="the task 'else' has no input 'data:else'"):
        run("more", also={**ALSO, "else": "regression"})


def test_part_names_what_there_is(run: Run, inputs: dict[str, Path], tmp_path: Path) -> None:
    run("out", epochs=0.1)
    (tmp_path / "p").mkdir()
    with pytest.raises(ModelError, match="not trained together with a task 'thing'") as raised:
        part.run({"name": "thing"}, {"model": tmp_path / "out"}, tmp_path / "p", NullContext(1))
    assert raised.value.hint == "it was with: hours, things"
    with pytest.raises(ModelError, match="not trained together"):
        part.run({"name": "things"}, {"model": inputs["model"]}, tmp_path / "p", NullContext(1))


@pytest.mark.parametrize("architecture", ["distilbert", "roberta", "mpnet"])
def test_other_architectures_share_their_trunk_too(tmp_path: Path, architecture: str) -> None:
    base = headed_model(tmp_path / "base", architecture=architecture)
    torch.manual_seed(0)
    tasks: list[Task] = [topics(3), load_task(headed_model(tmp_path / "t", "token-classification"))]
    built = build(base, topics(2), TrainSpec())
    for task in tasks:
        found = together.on_trunk(built, base, task, TrainSpec(), on_cpu=True)
        assert found.model.get_submodule("trunk") is built.network.base_model
    assert len(built.others) == 2


def test_a_head_that_does_not_stand_apart_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(base, topics(2), TrainSpec())
    with torch.no_grad():
        built.network.base_model.embeddings.LayerNorm.weight.mul_(1.5)  # no more the trunk of the base
    with pytest.raises(ModelError, match="do not stand apart from its trunk"):
        together.on_trunk(built, base, topics(3), TrainSpec(), on_cpu=True)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"method": "head"}, "method head does not teach"),
        ({"method": "prefix"}, "method prefix does not teach"),
        ({"method": "few-shot"}, "method few-shot does not teach"),
        ({"method": "lora", "base_weights": "int8"}, "leave out train.base_weights"),
        ({"devices": 2}, "leave out train.devices"),
        ({"also": {"a": "sentence-embedding"}}, "sentence-embedding is not learnt together"),
    ],
)
def test_what_cannot_be_learnt_together_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spec_of(**keys)
