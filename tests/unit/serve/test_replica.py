"""The operation `serve` beside its socket: the self-test's bounds, the private folder, and what it imports."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmo.compression.export import export
from llmo.engines.torch import TorchEngine
from llmo.errors import EnvironmentProblem, GateRefused
from llmo.serve.encoder import self_test
from llmo.serve.pipeline import Pipeline
from llmo.serve.protocol import predict_once
from llmo.serve.replica import new_socket_path
from llmo.serve.router import Router
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden, write_card
from llmo.types import Endpoint
from support.serving import CPU, ProcessReplica, ThreadReplica, eventually, served_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def pipeline(model: Path) -> Iterator[Pipeline]:
    engine = TorchEngine()
    made = Pipeline(load_task(model), load_tokenizer(model), engine, lambda: engine.load(model, CPU), queue=3)
    made.start()
    yield made
    made.close()


def test_a_lower_precision_may_differ_on_a_borderline_text_and_no_more(model: Path, pipeline: Pipeline) -> None:
    task, golden = load_task(model), read_golden(model)
    assert "8 of 8" in self_test(pipeline, task, golden, exact=True)
    golden[0]["logits"] = [-x for x in golden[0]["logits"]]
    assert "7 of 8" in self_test(pipeline, task, golden, exact=False)
    with pytest.raises(GateRefused, match="7 of its 8"):
        self_test(pipeline, task, golden, exact=True)
    golden[1]["logits"] = [-x for x in golden[1]["logits"]]
    with pytest.raises(GateRefused, match="6 of its 8"):
        self_test(pipeline, task, golden, exact=False)


def test_a_model_without_evidence_is_refused(model: Path, pipeline: Pipeline) -> None:
    with pytest.raises(GateRefused):
        self_test(pipeline, load_task(model), [], exact=True)


def test_the_folder_of_sockets_is_private_and_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path)[:60] if len(str(tmp_path)) < 60 else "/tmp")
    path = new_socket_path()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    dead = path.parent / "999999999-00000000.sock"
    dead.touch()
    mine = path.parent / f"{os.getpid()}-00000000.sock"
    mine.touch()
    assert new_socket_path() != path
    assert not dead.exists()
    assert mine.exists()
    mine.unlink()


def test_a_folder_others_can_enter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        (Path(short) / f"llmo-{os.getuid()}").mkdir(mode=0o755)
        (Path(short) / f"llmo-{os.getuid()}").chmod(0o755)
        with pytest.raises(EnvironmentProblem, match="private"):
            new_socket_path()


def test_what_is_asked_beside_the_gateway_is_seen_by_its_router(model: Path) -> None:
    async def used(address: str) -> float:
        row = Endpoint("topics", "up", "sha256:0", "m@1", 3, address=address)
        async with Router(lambda: [row]).running() as router:
            return router.use("topics", address).at

    with ThreadReplica(model) as replica:
        before = time.monotonic()
        eventually(lambda: time.monotonic() > before + 0.01, "the clock of files went on")
        assert asyncio.run(used(replica.address)) < before
        predict_once(replica.address, ["goal"])
        assert before < asyncio.run(used(replica.address)) <= time.monotonic()
    assert asyncio.run(used(replica.address)) == 0


def test_serving_onnx_imports_no_torch_and_answers_as_torch_does(model: Path, tmp_path: Path) -> None:
    onnx = tmp_path / "onnx"
    onnx.mkdir()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (onnx / file.name).write_bytes(file.read_bytes())
    export(model, onnx / "model.onnx")
    write_card(onnx, {**read_card(model), "engine": "onnx"})
    texts = ["profit bank", "goal team coach " * 9, "chip"]
    with ThreadReplica(model) as reference:
        expected = predict_once(reference.address, texts, logits=True)
    replica = ProcessReplica(onnx)
    found = predict_once(replica.address, texts, logits=True)
    modules = replica.modules()
    for one, other in zip(found, expected, strict=True):
        assert one["input_ids"] == other["input_ids"]
        assert one["logits"] == pytest.approx(other["logits"], abs=1e-4)
    assert modules & {"torch", "transformers", "pyarrow", "fastapi", "sqlalchemy"} == set()
