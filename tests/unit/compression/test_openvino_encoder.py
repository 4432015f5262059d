"""Encoders as OpenVINO graphs: what is stored, what int8 leaves out, and what cannot be written."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from llmo.compression import openvino_encoder
from llmo.compression.export import export
from llmo.compression.openvino_encoder import LEAST_TEXTS, write
from llmo.engines.onnx import GRAPH
from llmo.engines.openvino.encoder import OpenVinoEncoder
from llmo.errors import DataError, EnvironmentProblem, ModelError
from llmo.types import Device
from support.headed import headed_model

TEXTS = [[2, *np.random.default_rng(seed).integers(5, 60, 3 + seed).tolist(), 3] for seed in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = headed_model(tmp_path_factory.mktemp("model") / "bert")
    assert export(made, made / GRAPH) == "fused"
    return made


@pytest.fixture
def out(model: Path, tmp_path: Path) -> Path:
    shutil.copy(model / "config.json", tmp_path)
    return tmp_path


def kernels(folder: Path) -> dict[str, int]:
    engine = OpenVinoEncoder()
    engine.load(folder, Device("cpu", "cpu", memory=0, free=0, cores=1))
    found = dict(engine.facts().kernels)
    engine.close()
    return found


def test_bf16_is_half_the_bytes_and_nearly_the_logits(model: Path, out: Path) -> None:
    exact = write(model / GRAPH, out, "fp32")
    assert (exact.bits, exact.difference < 1e-4) == (pytest.approx(32, rel=0.05), True)
    lower = write(model / GRAPH, out, "bf16")
    assert lower.bits < 22  # a tiny model is norms and biases to a large part
    assert 1e-4 < lower.difference < 0.1


def test_int8_leaves_out_what_is_to_stay_exact(model: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    found = write(model / GRAPH, out, "int8", TEXTS)
    assert capfd.readouterr() == ("", "")
    everything = kernels(out)
    assert found.bits < 14
    assert all(name.lower().endswith("i8") for name in everything)
    graph = onnx.load(model / GRAPH).graph
    weights = {tensor.name for tensor in graph.initializer}
    first = next(node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights)
    write(model / GRAPH, out, "int8", TEXTS, exact=[first])
    some = kernels(out)
    assert sum(some.values()) == sum(everything.values())
    assert sum(count for name, count in some.items() if name.endswith("f32")) == 1


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "only 0 of them differ"),
        ([[2, 9, 3]] * 300, "only 1 of them differ"),
        (TEXTS[: LEAST_TEXTS - 1], "differ"),
        ([*TEXTS, []], "empty"),
    ],
)
def test_texts_that_say_nothing_are_refused_first(texts: Sequence[Sequence[int]], said: str, out: Path) -> None:
    with pytest.raises(DataError, match=said) as caught:
        write(out / "no graph.onnx", out, "int8", texts)
    assert "training" in caught.value.hint


def test_a_graph_that_is_read_again_has_no_reader_beside_it(model: Path) -> None:
    for _ in range(3):
        made = openvino_encoder._read(model / GRAPH)
        nodes = {node.get_friendly_name() for node in made.get_ops()}
        ports = [port for node in made.get_ops() for out in node.outputs() for port in out.get_target_inputs()]
        assert {port.get_node().get_friendly_name() for port in ports} <= nodes


def test_an_operator_that_openvino_lacks_is_named(model: Path, out: Path) -> None:
    graph = onnx.load(model / GRAPH)
    graph.graph.node[-1].op_type, graph.graph.node[-1].domain = "Nonesuch", "com.microsoft"
    onnx.save(graph, out / GRAPH)
    with pytest.raises(ModelError, match=r"cannot express.*Nonesuch") as caught:
        write(out / GRAPH, out, "fp32")
    assert "onnx" in caught.value.hint


def test_a_graph_that_says_something_else_is_refused(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_encoder, "_onnx_logits", lambda _, length: np.ones((2, 3), np.float32))
    with pytest.raises(ModelError, match="logits differ"):
        write(model / GRAPH, out, "fp32")


def test_without_nncf_int8_says_what_to_install(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(EnvironmentProblem, match="nncf") as caught:
        write(model / GRAPH, out, "int8", TEXTS)
    assert "calibrate" in caught.value.hint


def test_the_nearest_bf16_numbers_are_torchs() -> None:
    import torch

    weights = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    weights[:3] = 0.0, 1.00390625, 1.01171875  # zero, and ties that go down and up
    expected = torch.from_numpy(weights).bfloat16().float().numpy()
    assert np.array_equal(openvino_encoder._nearest(weights), expected)
