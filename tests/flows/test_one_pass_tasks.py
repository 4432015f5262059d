"""Question answering, regression and sentence embedding on their way from training to the HTTP answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers

from llmo.compression import encoders
from llmo.compression.choice import Limits
from llmo.compression.export import export
from llmo.compression.outcome import Order
from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.data.operation import run as import_data
from llmo.doors.client import Client
from llmo.doors.gateway import Door
from llmo.doors.server import serve_in_thread
from llmo.engines.base import Request
from llmo.engines.onnx import OnnxEngine
from llmo.engines.torch import TorchEngine
from llmo.errors import GateRefused, InputError, ModelError
from llmo.jobspecs import EvaluateSpec
from llmo.settings import Settings
from llmo.specs import CleanSpec, DataSpec, TaskSpec, TrainSpec
from llmo.system import System
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden, write_card, write_golden
from llmo.training import evaluate, operation
from llmo.verify import operation as verify
from support.headed import further_model, topics
from support.serving import CPU, ThreadReplica
from support.tiny import HIDDEN, MADE, question_rows, tiny_dataset, tiny_model, write_split

SIZES = {"train": 192, "dev": 16, "test": 48}
FAST = {"epochs": 6, "learning_rate": 5e-3, "batch_size": 16}
# What a model that learnt nothing gets at most, and the length that texts are cut (or divided) to.
TASKS = {"extractive-qa": (0.3, 32), "regression": (0.1, 64), "sentence-embedding": (0.3, 64)}
CONTEXT = "the people said in time " * 20 + "a goal was new today " + "and to the year " * 20


@dataclass
class Trained:
    task: str
    model: Path
    data: Path
    result: dict[str, Any]
    notes: list[str]


class Listening(NullContext):
    def __init__(self, folder: Path, notes: list[str]) -> None:
        super().__init__(1, folder)
        self._notes = notes

    def note(self, message: str) -> None:
        self._notes.append(message)


def imported(place: Path, name: str) -> Path:
    """The rows as a user has them, through the real import."""
    rows = []
    for number, (split, count) in enumerate(SIZES.items()):
        for row in MADE[name](count, number):
            if name == "extractive-qa":
                row |= {"question": row.pop("text"), "context": row.pop("pair")}
            rows.append({**row, "id": f"{split}{row['id']}", "split": split})
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "data").mkdir()
    spec = DataSpec(source=str(path), clean=CleanSpec(drop_duplicates="none")).plain()
    task = TaskSpec(name=name).plain()
    info = import_data({**spec, "task": task}, {}, place / "data", NullContext(1))
    assert info["rows"] == {"read": sum(SIZES.values()), **SIZES, "dropped": 0}
    return place / "data"


@pytest.fixture(scope="module", params=sorted(TASKS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name, place = request.param, tmp_path_factory.mktemp("one-pass")
    data = imported(place, name)
    (place / "model").mkdir()
    spec = {**TrainSpec(**FAST).plain(), "task": {"name": name, "max_length": TASKS[name][1]}}
    notes: list[str] = []
    inputs = {"data": data, "model": tiny_model(place / "base")}
    result = operation.run(spec, inputs, place / "model", Listening(place / "checkpoints", notes))
    return Trained(name, place / "model", data, result, notes)


@pytest.fixture(scope="module")
def door(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    up: dict[str, Any] = {"job": None, "model": "sha256:1", "model_ref": "m@1", "state": "up"}
    with System(Settings(home=tmp_path_factory.mktemp("home"))) as system, ThreadReplica(trained.model) as replica:
        system.store.endpoints.set("it", task=trained.task, address=replica.address, **up)
        key = system.make_key("ann", "predict")[1]
        with serve_in_thread(system) as url:
            yield Door(url, key, lasting=True)


def test_training_beats_what_learnt_nothing_and_evaluation_says_the_same(trained: Trained, tmp_path: Path) -> None:
    metric = trained.result["metric"]
    test = trained.result["test"]
    assert test["after"][metric]["value"] > TASKS[trained.task][0] > test["before"][metric]["value"]
    inputs = {"data": trained.data, "model": trained.model}
    again = evaluate.run(EvaluateSpec().plain(), inputs, tmp_path, NullContext(1))["metrics"]
    assert again.keys() == test["after"].keys()
    for name, figure in test["after"].items():
        assert again[name]["value"] == pytest.approx(figure["value"], abs=1e-4)


def test_the_folder_is_one_of_plain_transformers(trained: Trained) -> None:
    """Its auto class opens it, and says what the evidence says."""
    task = load_task(trained.model)
    model = getattr(transformers, task.auto_class).from_pretrained(trained.model).eval()
    for item in read_golden(trained.model):
        (encoding,) = task.encode(load_tokenizer(trained.model), [item["text"]])
        found = []
        for part in encoding.apart():
            with torch.inference_mode():
                said = model(input_ids=torch.tensor([part.input_ids]))
            if trained.task == "extractive-qa":
                found.append(torch.stack([said.start_logits[0], said.end_logits[0]], -1))
            elif trained.task == "regression":
                found.append(said.logits[0])
            else:
                found.append(torch.nn.functional.normalize(said.last_hidden_state[0].mean(0), dim=0)[None])
        assert np.abs(torch.cat(found).numpy() - np.array(item["logits"])).max() < 1e-4


def test_one_graph_says_the_same_at_fp32_and_nearly_so_at_int8(trained: Trained, tmp_path: Path) -> None:
    if trained.task == "regression":
        pytest.skip("its graph is a classifier's")
    task, data = load_task(trained.model), Dataset.open(trained.data)
    names, limits = ("onnx-fp32", "onnx-int8", "native-int8"), Limits(task.metric, 1.0)
    order = Order(trained.model, task, data, list(data.split("test")), names, limits, tmp_path)
    found = encoders.compete(order, NullContext(1))
    reference, exact, *small = found.table
    test = trained.result["test"]["after"][task.metric]
    assert found.metrics[encoders.REFERENCE][task.metric]["value"] == pytest.approx(test["value"], abs=1e-4)
    assert (exact["agreement"], exact["drop"]) == (1.0, pytest.approx(0.0, abs=1e-4))
    assert [one["name"] for one in small] == ["onnx-int8", "native-int8"]
    for one in small:
        assert one["agreement"] > 0.8
        assert one["bits"] < reference["bits"]


def test_verify_compares_it_up_to_the_endpoint_and_sees_another_model(
    trained: Trained, door: Door, tmp_path: Path
) -> None:
    heard = door.heard("it", read_golden(trained.model))
    report = verify.run({"heard": heard}, {"model": trained.model}, tmp_path, NullContext(1))
    names = [check["name"] for check in report["checks"]]
    assert {"token ids, transformers", "saved model", "engine answers", "endpoint answers"} <= set(names)
    other = [{**one, "logits": (-np.array(one["logits"])).tolist()} for one in heard]
    with pytest.raises(GateRefused, match="training graph and endpoint"):
        verify.run({"heard": other}, {"model": trained.model}, tmp_path, NullContext(1))


def asked(door: Door, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(door.endpoint("it"), json=body, headers={"Authorization": f"Bearer {door.key}"}, timeout=60)


def test_the_endpoint_answers_as_the_task_says(trained: Trained, door: Door) -> None:
    rows = list(Dataset.open(trained.data).split("test"))[:8]
    task = load_task(trained.model)
    with Client(door.url, door.key) as client:
        answers = client.predict("it", [task.asked(row) for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        if trained.task == "extractive-qa":
            assert answer["answer"] is None or row["pair"][answer["start"] : answer["end"]] == answer["answer"]
            assert 0 <= answer["score"] <= 1
        elif trained.task == "regression":
            assert answer["value"] == pytest.approx(row["value"], abs=15)
        else:
            assert -1 <= answer["similarity"] <= 1


def test_what_the_task_does_not_take_is_refused(trained: Trained, door: Door) -> None:
    wrong: dict[str, list[dict[str, Any]]] = {
        "extractive-qa": [{"text": "goal"}, {"question": "goal"}, {"question": "goal", "context": "a", "pair": "b"}],
        "regression": [{"question": "goal", "context": "a"}, {"text": "goal", "pair": "a"}],
        "sentence-embedding": [{"question": "goal", "context": "a"}, {"pair": "goal"}],
    }
    for body in wrong[trained.task]:
        answer = asked(door, body)
        assert answer.status_code == 422
        assert f"a model for {trained.task} takes" in answer.json()["error"]["what"]
        assert answer.json()["error"]["hint"].startswith("send {")


def test_a_long_context_is_read_in_windows(trained: Trained, door: Door) -> None:
    if trained.task != "extractive-qa":
        pytest.skip("only contexts are divided")
    body = {"question": "match goal team", "context": CONTEXT, "logits": True}
    (answer,) = asked(door, body).json()["answers"]
    task = load_task(trained.model)
    (encoding,) = task.encode(load_tokenizer(trained.model), [{"question": body["question"], "context": CONTEXT}])
    assert len(encoding.ends) > 8
    assert (answer["tokens"], answer["input_ids"]) == (len(encoding.input_ids), encoding.input_ids)
    assert "truncated" not in answer
    again = task.answer(np.array(answer["logits"], np.float32), encoding, {"question": "", "context": CONTEXT})
    assert {name: answer.get(name) for name in again} == again
    for field, text in (("question", " "), ("context", "")):
        refused = asked(door, body | {field: text}).json()["error"]
        assert (refused["what"], refused["where"]) == ("the text is empty", f"texts[0].{field}")
    refused = asked(door, body | {"question": "goal " * 40}).json()["error"]
    assert "a question has 40 tokens, and this model reads questions of at most 16" in refused["what"]
    (cut,) = asked(door, body | {"context": CONTEXT * 10}).json()["answers"]
    assert cut["truncated"] is True


def test_vectors_are_those_of_v1_embeddings(trained: Trained, door: Door) -> None:
    if trained.task != "sentence-embedding":
        pytest.skip("only vectors")
    texts = ["match goal", "bank profit trade"]
    body = {"model": "it", "input": texts}
    headers = {"Authorization": f"Bearer {door.key}"}
    public = httpx.post(f"{door.url}/v1/embeddings", json=body, headers=headers, timeout=60).json()["data"]
    vectors = np.array([one["embedding"] for one in public])
    own = np.array([one["embedding"] for one in asked(door, {"texts": texts}).json()["answers"]])
    assert own.shape == (2, HIDDEN)
    assert np.abs(own - vectors).max() < 1e-6
    (pair,) = asked(door, {"text": texts[0], "pair": texts[1]}).json()["answers"]
    assert pair["similarity"] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)


def test_graphs_of_vectors_serve_too(trained: Trained, tmp_path: Path) -> None:
    """What compress leaves: a folder for ONNX Runtime, whose golden answers are repeated before it answers."""
    if trained.task != "sentence-embedding":
        pytest.skip("the others are served so as all classifiers are")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((trained.model / name).read_bytes())
    export(trained.model, tmp_path / "model.onnx")
    write_card(tmp_path, {**read_card(trained.model), "engine": "onnx"})
    write_golden(tmp_path, read_golden(trained.model))
    with ThreadReplica(tmp_path):
        engine = OnnxEngine()
        engine.load(tmp_path, CPU)
        requests = [Request(i, item["input_ids"]) for i, item in enumerate(read_golden(tmp_path))]
        vectors, said = ([chunk.data for chunk in run(requests)] for run in (engine.embed, engine.run))
        assert np.abs(np.stack(vectors) - np.stack(said)).max() < 1e-6
        engine.close()


@pytest.mark.parametrize("name", ["regression", "sentence-embedding", "extractive-qa"])
def test_what_the_task_cannot_be_trained_with_is_refused(name: str, tmp_path: Path) -> None:
    data, base = (
        tiny_dataset(tmp_path / "data", name, sizes={"train": 8, "dev": 4, "test": 4}),
        tiny_model(tmp_path / "b"),
    )

    def train(length: int = 64, **keys: Any) -> None:
        spec = {**TrainSpec(epochs=1, **keys).plain(), "task": {"name": name, "max_length": length}}
        operation.run(spec, {"data": data, "model": base}, tmp_path / "out", NullContext(1, tmp_path / "c"))

    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=f"are of tasks with classes, and {name} has none"):
        train(class_weights="balanced")
    with pytest.raises(InputError, match="label_smoothing"):
        train(label_smoothing=0.1)
    if name == "sentence-embedding":
        with pytest.raises(InputError, match="a model for sentence-embedding has no head of its own"):
            train(method="head")
    if name == "extractive-qa":
        with pytest.raises(InputError, match="a question and a part of its context do not fit"):
            train(length=16)


def test_an_adapter_of_a_bare_trunk_is_in_every_layer_that_vectors_come_through(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "data", "sentence-embedding", sizes={"train": 32, "dev": 4, "test": 4})
    spec = {**TrainSpec(method="lora", epochs=1).plain(), "task": {"name": "sentence-embedding", "max_length": 64}}
    for name in ("model", "report"):
        (tmp_path / name).mkdir()
    inputs = {"data": data, "model": tiny_model(tmp_path / "base")}
    result = operation.run(spec, inputs, tmp_path / "model", NullContext(1, tmp_path / "c"))
    report = verify.run({}, {"model": tmp_path / "model"}, tmp_path / "report", NullContext(1))
    assert result["trained_parameters"] < result["parameters"] / 2
    (modules,) = [check for check in report["checks"] if check["name"] == "adapter modules"]
    assert modules["value"] == modules["limit"] == 12  # six a layer: the pooler, which nothing comes through, has none


def test_answers_that_no_window_holds_are_left_out_and_said(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "data", "extractive-qa", sizes={"train": 8, "dev": 4, "test": 4})
    base = tiny_model(tmp_path / "base")
    long = {"id": "l", "text": "goal", "pair": "good time " * 40, "answers": ["good time " * 30], "answer_start": 0}
    notes: list[str] = []

    def train(rows: list[dict[str, Any]], out: str) -> None:
        write_split(data / "train.arrow", rows, "extractive-qa")
        (tmp_path / out).mkdir()
        spec = {**TrainSpec(epochs=1).plain(), "task": {"name": "extractive-qa", "max_length": 32}}
        operation.run(spec, {"data": data, "model": base}, tmp_path / out, Listening(tmp_path / "c" / out, notes))

    train([*question_rows(8), long], "some")
    assert any(note.startswith("1 training rows have an answer that is longer than windows") for note in notes)
    with pytest.raises(InputError, match="no training row can be learnt: all 1 have an answer that is longer"):
        train([long], "none")


def test_an_embedding_endpoint_takes_no_heads(trained: Trained, tmp_path: Path) -> None:
    if trained.task != "sentence-embedding":
        pytest.skip("the others have heads of their own")
    engine = TorchEngine()
    engine.load(trained.model, CPU)
    further = further_model(tmp_path / "further", trained.model, topics(3))
    with pytest.raises(ModelError, match="it is a trunk and nothing else"):
        engine.add_adapter("x", further)
    engine.close()
