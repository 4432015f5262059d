"""Which graph is exported, at which precision, and that it is said: copied, made of the weights, brought to int8."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from onnx import numpy_helper

from llmo.compression.edge.operation import run
from llmo.context import NullContext
from llmo.engines.base import Request
from llmo.engines.torch import TorchEngine
from llmo.errors import GateRefused, ModelError, SpecError
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden, write_card, write_golden
from llmo.tasks.text_classification import TextClassification
from support.bags import CPU, bag_model
from support.headed import headed_model
from support.tiny import text_rows

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # else it computes at bf16 where the processor can
TEXTS = [row["text"] for row in text_rows(12, seed=1)]


def export(model: Path, out: Path, reference: Path | None = None, **asked: Any) -> dict[str, Any]:
    named = {"model": "tiny@1", "digest": "sha256:0", "original": "tiny@1"}
    spec = {"target": "edge", "precision": None, "max_mb": None, "out": str(out), **named, **asked}
    with TemporaryDirectory() as own:
        return run(spec, {"model": model} | ({"reference": reference} if reference else {}), Path(own), NullContext(1))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[np.ndarray]]:
    """A model compressed for an engine of LLMO's own; the model it was made from; and what that says of `TEXTS`."""
    folder = tmp_path_factory.mktemp("graphs")
    original = headed_model(folder / "original")
    engine = TorchEngine()
    engine.load(original, CPU)
    encodings = load_task(original).encode(load_tokenizer(original), TEXTS)
    said = {chunk.id: chunk.data for chunk in engine.run([Request(i, e.input_ids) for i, e in enumerate(encodings)])}
    engine.close()
    golden = [{"text": t, "input_ids": e.input_ids} for t, e in zip(TEXTS, encodings, strict=True)]
    write_golden(original, [{**one, "logits": said[i].tolist()} for i, one in enumerate(golden)])
    small = shutil.copytree(original, folder / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    (small / "native.bin").write_bytes(b"\0" * 64)
    write_card(small, {**read_card(original), "engine": "native", "precision": "int8", "reference": {}})
    return small, original, [said[i] for i in range(len(TEXTS))]


def test_a_smaller_shape_is_not_taken_for_the_model_it_was_made_from(
    compressed: tuple[Path, Path, list[np.ndarray]], tmp_path: Path
) -> None:
    small = shutil.copytree(compressed[0], tmp_path / "small")
    write_card(small, {**read_card(small), "reference": {"digest": "x"}, "shape": {"of": {"digest": "x"}, "steps": []}})
    with pytest.raises(ModelError, match="smaller shape of another one"):
        export(small, tmp_path / "out", compressed[1])
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_engine_is_made_of_its_weights_and_says_so(
    compressed: tuple[Path, Path, list[np.ndarray]], tmp_path: Path
) -> None:
    small, original, said = compressed
    told = export(small, tmp_path / "out", original)
    assert told["precision"] == "fp32"
    assert told["made_of"] == "the weights at fp32 of the model that was compressed to native int8, as it was before"
    assert json.loads((tmp_path / "out" / "bundle.json").read_text())["precision"] == "fp32"
    command = [sys.executable, "-I", str(tmp_path / "out" / "run.py"), *TEXTS]
    answers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    labels = load_task(original).labels
    for line, logits in zip(answers, said, strict=True):
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert list(json.loads(line)["scores"].values()) == pytest.approx(scores, abs=1e-5)
        assert json.loads(line)["label"] == labels[int(logits.argmax())]


def test_openvino_reads_what_is_written_for_it(compressed: tuple[Path, Path, list[np.ndarray]], tmp_path: Path) -> None:
    small, original, said = compressed
    told = export(small, tmp_path / "out", original, target="openvino")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "tokenizer.json", "config.json", "manifest.json"} <= names
    assert not names & {"model.onnx", "golden.json", "llmo.json", "native.bin", "model.safetensors"}
    assert (told["precision"], told["target"]) == ("fp32", "openvino")
    model = openvino.Core().compile_model(tmp_path / "out" / "openvino_model.xml", "CPU", EXACT)
    for ids, logits in zip(
        (e.input_ids for e in load_task(original).encode(load_tokenizer(original), TEXTS)), said, strict=True
    ):
        feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        assert np.abs(model(feed)["logits"][0] - logits).max() < 1e-4


def test_int8_only_when_asked_and_never_beyond_seven_bits(tmp_path: Path) -> None:
    model = bag_model(tmp_path / "model", TextClassification(("business", "sport", "tech"), 16), TEXTS)
    assert export(model, tmp_path / "plain", target="onnx")["precision"] == "fp32"
    told = export(model, tmp_path / "out", precision="int8")
    assert told["precision"] == "int8"
    assert "no data set has measured what that costs" in told["made_of"]
    stored = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer]
    int8 = [array for array in stored if array.dtype == np.int8]
    assert int8
    assert max(np.abs(array.astype(int)).max() for array in int8) == 63
    assert (model / "model.onnx").read_bytes() == (tmp_path / "plain" / "model.onnx").read_bytes()


def test_an_int8_graph_that_answers_otherwise_is_refused_for_every_target(tmp_path: Path) -> None:
    model = bag_model(tmp_path / "model", TextClassification(("business", "sport", "tech"), 16), TEXTS)
    golden = [{**one, "logits": [-x for x in one["logits"]]} for one in read_golden(model)]
    write_golden(model, golden)
    for target in ("edge", "onnx"):
        with pytest.raises(GateRefused, match=r"the graph at int8 repeats \d+ of the model's 12 golden answers"):
            export(model, tmp_path / "out", target=target, precision="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_was_made_for_openvino_is_copied(tmp_path: Path) -> None:
    model = bag_model(tmp_path / "model", TextClassification(("business", "sport", "tech"), 16), TEXTS)
    (model / "openvino_model.xml").write_text("<net/>")
    (model / "openvino_model.bin").write_bytes(b"weights")
    write_card(model, {**read_card(model), "engine": "openvino", "precision": "int8"})
    told = export(model, tmp_path / "out", target="openvino")
    assert (told["precision"], told["made_of"]) == ("int8", "the very graph that the endpoint runs")
    assert (tmp_path / "out" / "openvino_model.bin").read_bytes() == b"weights"


def test_int8_for_openvino_is_not_made_without_texts(
    compressed: tuple[Path, Path, list[np.ndarray]], tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="calibrated on texts"):
        export(compressed[0], tmp_path / "out", compressed[1], target="openvino", precision="int8")
    assert list(tmp_path.iterdir()) == []
