"""Export: the graph says what torch says, in every architecture, and the exporter stays quiet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from llmo.compression import export as module
from llmo.compression.export import export
from llmo.engines.base import Chunk, Engine, Request
from llmo.engines.onnx import OnnxEngine
from llmo.engines.torch import TorchEngine, quiet
from llmo.errors import ModelError
from llmo.types import Device
from support.headed import headed_model

CPU = Device("cpu", "cpu", memory=0, free=0, cores=1)
TEXTS = [[2, 3], [2, 40, 41, 3], [2, *range(5, 60), 3], [2, *([17] * 62), 3]]


def logits(engine: Engine, folder: Path) -> list[np.ndarray]:
    return outputs(engine, folder, engine.run)


def outputs(engine: Engine, folder: Path, run: Callable[[Sequence[Request]], Iterator[Chunk]]) -> list[np.ndarray]:
    engine.load(folder, CPU)
    found = {chunk.id: chunk.data for chunk in run([Request(i, ids) for i, ids in enumerate(TEXTS)])}
    engine.close()
    return [found[i] for i in range(len(TEXTS))]


@pytest.mark.parametrize(
    ("architecture", "task", "attention"),
    [
        ("bert", "text-classification", "fused"),
        ("bert", "token-classification", "fused"),
        ("distilbert", "text-classification", "fused"),
        ("roberta", "text-classification", "fused"),
        ("mpnet", "token-classification", "plain"),
    ],
)
def test_the_graph_gives_the_logits_of_the_model(architecture: str, task: str, attention: str, tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model", task, architecture)
    assert export(folder, folder / "model.onnx") == attention
    for expected, found in zip(logits(TorchEngine(), folder), logits(OnnxEngine(), folder), strict=True):
        assert np.abs(expected - found).max() < 1e-4
        assert np.abs(expected).max() > 0.01
    torch_, onnx_ = TorchEngine(), OnnxEngine()
    vectors = zip(outputs(torch_, folder, torch_.embed), outputs(onnx_, folder, onnx_.embed), strict=True)
    assert max(np.abs(expected - found).max() for expected, found in vectors) < 1e-5


def test_plain_attention_may_be_asked_for_and_takes_onnx_alone(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model")
    assert export(folder, folder / "model.onnx", fused=False) == "plain"
    graph = onnx.load(folder / "model.onnx")
    assert {node.domain for node in graph.graph.node} == {""}
    for expected, found in zip(logits(TorchEngine(), folder), logits(OnnxEngine(), folder), strict=True):
        assert np.abs(expected - found).max() < 1e-4


def test_fused_attention_is_one_node_a_layer_with_nothing_around_it(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model")
    export(folder, folder / "model.onnx")
    kinds = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert kinds.count("MultiHeadAttention") == 2
    assert kinds.count("Gelu") == 2
    assert not {"Reshape", "Transpose", "Softmax", "Erf"} & set(kinds)


def test_dimensions_have_names_and_the_file_stands_alone(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model", "token-classification")
    export(folder, folder / "model.onnx")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert shapes == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.initializer)
    assert not any("/" in node.doc_string or node.metadata_props for node in graph.node)


def test_it_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = headed_model(tmp_path / "model")
    capfd.readouterr()
    export(folder, folder / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_model_that_masks_more_than_padding_is_not_fused_wrongly(tmp_path: Path) -> None:
    """The fused node knows padding only: a causal model must come out plain, or not at all."""
    folder = headed_model(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.is_decoder = True
    with quiet():
        model.save_pretrained(folder)
    assert export(folder, folder / "model.onnx") == "plain"
    for expected, found in zip(logits(TorchEngine(), folder), logits(OnnxEngine(), folder), strict=True):
        assert np.abs(expected - found).max() < 1e-4


def test_a_graph_that_disagrees_with_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = headed_model(tmp_path / "model")
    real = module._torch_logits
    monkeypatch.setattr(module, "_torch_logits", lambda model, length: real(model, length) + np.float32(0.01))
    with pytest.raises(ModelError, match=r"fused: logits differ by 1\.0e-02; eager: logits differ by") as caught:
        export(folder, folder / "model.onnx")
    assert "torch engine" in caught.value.hint


def test_weights_beyond_one_file_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = headed_model(tmp_path / "model")
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(ModelError, match="at most 2 GiB"):
        export(folder, folder / "model.onnx")
    assert not (folder / "model.onnx").exists()


def test_a_base_model_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with quiet():
        model.bert.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"lack 2 tensors, such as classifier\.bias"):
        export(folder, folder / "model.onnx")


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoModel": "evil.Model"},', 1))
    with pytest.raises(ModelError, match="code of its own"):
        export(folder, folder / "model.onnx")


def test_gradients_and_modes_are_left_as_they_were(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model")
    export(folder, folder / "model.onnx")
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
