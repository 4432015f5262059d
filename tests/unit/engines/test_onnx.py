"""The ONNX engine feeds a graph what the graph asks for, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmo.engines import onnx as module
from llmo.engines.base import Request
from llmo.engines.onnx import OnnxEngine, session_options
from llmo.errors import ModelError
from llmo.types import Device

CPU = Device("cpu", "cpu", memory=0, free=0, cores=1)


def echo(folder: Path, names: list[str], kind: int = TensorProto.INT64, pad: int | None = 7) -> Path:
    """A model folder whose "logits" are its inputs, `[batch, length, inputs]`."""
    folder.mkdir(exist_ok=True)
    nodes = [helper.make_node("Cast", [name], [f"{name}_f"], to=TensorProto.FLOAT) for name in names]
    nodes += [helper.make_node("Unsqueeze", [f"{name}_f", "axis"], [f"{name}_u"]) for name in names]
    nodes.append(helper.make_node("Concat", [f"{name}_u" for name in names], ["logits"], axis=-1))
    graph = helper.make_graph(
        nodes,
        "echo",
        [helper.make_tensor_value_info(name, kind, ["batch", "length"]) for name in names],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", len(names)])],
        [numpy_helper.from_array(np.array([-1]), "axis")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    (folder / "config.json").write_text(json.dumps({} if pad is None else {"pad_token_id": pad}))
    return folder


def run(folder: Path, *texts: list[int]) -> list[np.ndarray]:
    engine = OnnxEngine()
    engine.load(folder, CPU)
    found = {chunk.id: chunk.data for chunk in engine.run([Request(i, ids) for i, ids in enumerate(texts)])}
    engine.close()
    return [found[i] for i in range(len(texts))]


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
def test_every_input_an_encoder_may_ask_for(kind: int, tmp_path: Path) -> None:
    names = ["input_ids", "attention_mask", "token_type_ids", "position_ids"]
    first, second = run(echo(tmp_path / "m", names, kind), [4, 5, 6], [8])
    assert first.tolist() == [[4, 1, 0, 0], [5, 1, 0, 1], [6, 1, 0, 2]]
    assert second.tolist() == [[8, 1, 0, 0]]


def test_a_graph_that_wants_only_ids_gets_only_ids(tmp_path: Path) -> None:
    assert run(echo(tmp_path / "m", ["input_ids"]), [4, 5])[0].tolist() == [[4], [5]]


@pytest.mark.parametrize(("pad", "filled"), [(7, 7), (None, 0), (-1, 0)])
def test_the_batch_is_filled_with_the_pad_token(
    pad: int | None, filled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    real = module.pad
    monkeypatch.setattr(module, "pad", lambda requests, pad_id: seen.append(ids := real(requests, pad_id)) or ids)
    run(echo(tmp_path / "m", ["input_ids"], pad=pad), [4, 5, 6], [8])
    assert seen[0][0].tolist() == [[4, 5, 6], [8, filled, filled]]


@pytest.mark.parametrize(("names", "said"), [(["pixels", "input_ids"], "pixels"), (["attention_mask"], "no input_ids")])
def test_a_graph_that_is_no_text_encoder_is_refused(names: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        run(echo(tmp_path / "m", names), [1])


def test_a_graph_without_hidden_states_says_who_can_embed(tmp_path: Path) -> None:
    engine = OnnxEngine()
    engine.load(echo(tmp_path / "m", ["input_ids"]), CPU)
    with pytest.raises(ModelError, match="no output 'hidden'") as caught:
        list(engine.embed([Request(0, [1])]))
    assert "torch engine" in caught.value.hint
    engine.close()


def test_a_large_batch_gives_its_memory_back(tmp_path: Path) -> None:
    """An embedding of 32 MB a thousand tokens: the arena would keep the largest batch for ever."""
    folder = tmp_path / "m"
    folder.mkdir()
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["wide"]),
            helper.make_node("Tanh", ["wide"], ["tanh"]),
            helper.make_node("ReduceMean", ["tanh", "axes"], ["logits"], keepdims=0),
        ],
        "wide",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8192])],
        [
            numpy_helper.from_array(np.ones((4, 8192), np.float32), "table"),
            numpy_helper.from_array(np.array([1]), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text("{}")
    engine = OnnxEngine()
    engine.load(folder, CPU)
    list(engine.run([Request(0, [1, 2])]))
    before = psutil.Process().memory_info().rss
    list(engine.run([Request(i, [1] * 640) for i in range(8)]))  # 160 MB, twice
    assert psutil.Process().memory_info().rss - before < 100 << 20
    engine.close()


def test_threads_are_those_granted_and_do_not_spin() -> None:
    options = session_options(3)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_one_core_starts_no_thread_of_its_own(tmp_path: Path) -> None:
    folder = echo(tmp_path / "m", ["input_ids"])
    engine = OnnxEngine()
    engine.load(folder, CPU)
    before = psutil.Process().num_threads()
    again = OnnxEngine()
    again.load(folder, CPU)
    list(again.run([Request(0, [1])]))
    assert psutil.Process().num_threads() == before
    engine.close()
    again.close()


def quantised_apart(folder: Path) -> Path:
    """One product whose int8 operands are said beside it, as calibrated graphs are written."""
    folder.mkdir()
    made = {
        "table": np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32),
        "step": np.float32(0.02),
        "middle": np.uint8(128),
        "weight": np.random.default_rng(1).integers(-127, 127, (16, 16)).astype(np.int8),
        "weight_step": np.full(16, 0.01, np.float32),
        "weight_middle": np.zeros(16, np.int8),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["wide"]),
        helper.make_node("QuantizeLinear", ["wide", "step", "middle"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "step", "middle"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_step", "weight_middle"], ["matrix"], axis=1),
        helper.make_node("MatMul", ["rounded", "matrix"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "apart",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in made.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text("{}")
    return folder


def test_products_that_are_joined_when_the_graph_is_opened_are_told_as_they_run(tmp_path: Path) -> None:
    engine = OnnxEngine()
    engine.load(quantised_apart(tmp_path / "m"), CPU)
    found = engine.facts()
    assert found.kernels == {"MatMulIntegerToFloat": 1}
    assert (found.precision, found.rest, found.threads) == ("int8", "fp32", 1)
    engine.close()
