"""Compressed model folders made by hand, without torch: a real ONNX graph over bags of tokens, for every task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llmo.engines.base import Request
from llmo.engines.onnx import OnnxEngine
from llmo.tasks.base import Encoding, Logits, Task, gathered, sequences
from llmo.tasks.card import load_tokenizer, write_card, write_golden
from llmo.types import Asked, Device
from support.tiny import HIDDEN, tiny_tokenizer

CPU = Device("cpu", "cpu", memory=0, free=0, cores=1)
BY_TOKEN = ("token-classification", "extractive-qa")


def bag_model(folder: Path, task: Task, golden: Sequence[Asked], *, seed: int = 0) -> Path:
    """A folder as `compress` leaves it for the onnx engine at fp32, with random weights that tell texts apart."""
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "pad_token_id": 0}))
    onnx.save(bag_graph(task, tokenizer.get_vocab_size(), seed), folder / "model.onnx")
    encodings = task.encode(load_tokenizer(folder), golden)
    said = logits(folder, encodings)
    write_golden(
        folder,
        [
            {"text": text, "input_ids": encoding.input_ids, "logits": own.tolist()}
            for text, encoding, own in zip(golden, encodings, said, strict=True)
        ],
    )
    write_card(folder, {"task": task.to_card(), "engine": "onnx", "precision": "fp32"})
    return folder


def logits(folder: Path, encodings: Sequence[Encoding]) -> list[Logits]:
    """What the folder's graph says of each, one sequence at a time."""
    engine = OnnxEngine()
    engine.load(folder, CPU)
    found = [chunk.data for ids in sequences(encodings) for chunk in engine.run([Request(0, ids)])]
    engine.close()
    return gathered(found, encodings)


def bag_graph(task: Task, vocabulary: int, seed: int) -> onnx.ModelProto:
    """Each token's row of a table beside the text's mean: `[batch, labels]`, `[batch, tokens, labels]`, or the mean
    itself at length 1."""
    rng = np.random.default_rng(seed)
    by_token, bare = task.name in BY_TOKEN, task.name == "sentence-embedding"
    weights = {
        "table": rng.normal(0, 1.5, (vocabulary, HIDDEN)).astype(np.float32),
        "head": rng.normal(0, 1.0, (HIDDEN, max(1, len(task.labels)))).astype(np.float32),
        "last": np.array([-1], np.int64),
        "middle": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
        helper.make_node("Cast", ["attention_mask"], ["there"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["there", "last"], ["column"]),
        helper.make_node("Mul", ["hidden", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["summed"], keepdims=1),
        helper.make_node("ReduceSum", ["column", "middle"], ["count"], keepdims=1),
        helper.make_node("Div", ["summed", "count"], ["mean"]),
        helper.make_node("Add", ["hidden", "mean"], ["beside"]),
        helper.make_node("Squeeze", ["mean", "middle"], ["flat"]),
        helper.make_node("LpNormalization", ["flat"], ["logits" if bare else "unit"], axis=-1, p=2),
    ]
    if not bare:
        nodes.append(helper.make_node("MatMul", ["beside" if by_token else "flat", "head"], ["logits"]))
    ints = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "l"]) for n in ("input_ids", "attention_mask")]
    shape = ["b", "l", "n"] if by_token else ["b", "n"]
    outs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["b", "l", HIDDEN]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "bag", ints, outs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
