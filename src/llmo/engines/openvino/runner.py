"""The graph of a model folder, compiled over a paged cache of keys and values: rows of many streams in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import Type, opset13
from openvino._offline_transformations import paged_attention_transformation

from llmo.errors import ModelError

GRAPH = "openvino_model.xml"
PRECISION_KEY = "llmo_precision"  # in the graph's own notes: what its weights are
BLOCK = 32  # tokens; what OpenVINO's CPU kernels are written for
FED = (
    "input_ids", "position_ids", "past_lens", "subsequence_begins", "block_indices", "block_indices_begins",
    "max_context_len", "sampled_tokens_indices",
)  # fmt: skip
# What it computes in, and what it keeps keys and values in. OpenVINO itself would take bf16 for fp32 graphs and u8 for
# the cache, where a block's values depend on how it was filled. The products of int8 and int4 graphs are with int8, the
# activations rounded in groups of 32 (64 would be a tenth faster, and cost SmolLM2 1.7% of perplexity); what lies
# between is bf16.
COMPUTE = {"fp32": ("f32", "f32"), "bf16": ("bf16", "bf16"), "int8": ("bf16", "bf16"), "int4": ("bf16", "bf16")}


@dataclass(frozen=True, slots=True)
class Row:
    """`tokens` of one stream with `past` tokens before them in the cache `blocks`, which have room for these too.
    Logits are wanted of the last `wanted` of them."""

    tokens: Sequence[int]
    past: int
    blocks: Sequence[int]
    wanted: int


class Graph:
    """`block_bytes` are those of `BLOCK` tokens in all layers."""

    def __init__(self, folder: Path, precision: str | None, cores: int) -> None:
        """Raises ModelError for a folder without a graph, or with one that cannot run at `precision`."""
        path = folder / GRAPH
        if not path.is_file() or not path.with_suffix(".bin").is_file():
            raise ModelError(
                f"the model folder has no {GRAPH} with its weights (.bin)",
                hint="make them with `llmo compress`, or deploy the model on the torch engine",
                where=str(folder),
            )
        options = {
            "INFERENCE_NUM_THREADS": cores,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,
            "ENABLE_CPU_PINNING": False,  # the replicas of a machine would all be pinned to its first cores
        }
        try:
            graph = ov.Core().read_model(path)
            compute, kept = COMPUTE[settled(graph, precision, path)]
            _page(graph)
            options |= {"INFERENCE_PRECISION_HINT": compute, "KV_CACHE_PRECISION": kept}
            self._compiled = ov.Core().compile_model(graph, "CPU", options)
        except RuntimeError as error:
            raise ModelError(
                f"OpenVINO cannot open the graph: {last_line(error)}",
                hint="make it again with `llmo compress`, or deploy the model on the torch engine",
                where=str(path),
            ) from error
        self._cores = cores
        self.vocabulary = int(self._compiled.outputs[0].partial_shape[-1].get_length())
        self._kept = [
            (port.any_name, port.element_type, [side.get_length() for side in list(port.partial_shape)[1:]])
            for port in self._compiled.inputs
            if "_cache." in port.any_name
        ]
        self.block_bytes = sum(prod(shape) * kind.bitwidth // 8 for _, kind, shape in self._kept)

    def cache(self, blocks: int) -> Cache:
        """A cache of that many blocks, numbered from 0. Who holds which is not its business."""
        tensors = {name: ov.Tensor(kind, ov.Shape([blocks, *shape])) for name, kind, shape in self._kept}
        return Cache(self._compiled.create_infer_request(), tensors, self._cores, self.vocabulary)


class Cache:
    """Runs rows over its blocks."""

    def __init__(self, request: Any, tensors: dict[str, Any], least: int, vocabulary: int) -> None:
        self._request = request
        self._least = least
        self._vocabulary = vocabulary
        for name, tensor in tensors.items():
            request.set_tensor(name, tensor)

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """`[sum of wanted, vocabulary]`, row after row. The array is the runtime's own: the next call overwrites it.

        All rows write their keys and values before any of them reads. RuntimeError is OpenVINO's for what it cannot
        compute.
        """
        feed = _feed(rows, max(0, self._least - len(rows)))
        for name, array in zip(FED, feed, strict=True):
            self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        self._request.infer()
        logits: NDArray[np.float32] = self._request.get_output_tensor(0).data
        return logits.reshape(-1, self._vocabulary)


def _feed(rows: Sequence[Row], empty: int) -> tuple[NDArray[Any], ...]:
    """The arrays that `FED` names.

    With fewer streams than threads OpenVINO would split one stream's attention between threads, and add its parts up
    in another order; `empty` rows without tokens keep it from that, and cost nothing.
    """
    counts = [len(row.tokens) for row in rows]
    ends = np.cumsum(counts)
    begins = np.concatenate([[0], ends, [ends[-1]] * empty])
    tables = [len(row.blocks) for row in rows] + [1] * empty
    return (
        np.fromiter((token for row in rows for token in row.tokens), np.int64, ends[-1]),
        np.concatenate([np.arange(row.past, row.past + n) for row, n in zip(rows, counts, strict=True)]),
        np.array([row.past for row in rows] + [0] * empty, np.int32),
        begins.astype(np.int32),
        np.array([block for row in rows for block in row.blocks] + [0] * empty, np.int32),
        np.cumsum([0, *tables]).astype(np.int32),
        np.array(max(row.past + n for row, n in zip(rows, counts, strict=True)), np.int32),
        np.concatenate([np.arange(end - row.wanted, end) for row, end in zip(rows, ends, strict=True)]),
    )


def settled(graph: Any, asked: str | None, path: Path) -> str:
    """What the graph's weights are, as it says itself; fp32 weights can also be computed with at bf16."""
    made = str(graph.get_rt_info(PRECISION_KEY).value) if graph.has_rt_info(PRECISION_KEY) else ""
    if made not in COMPUTE:
        raise ModelError("the graph does not say its precision", hint="make it with `llmo compress`", where=str(path))
    if asked is None or asked == made or (asked, made) == ("bf16", "fp32"):
        return asked or made
    raise ModelError(
        f"the graph's weights are {made}, so it cannot run at {asked}",
        hint=f"leave the precision out, or compress the model to {asked}",
        where=str(path),
    )


def _page(graph: Any) -> None:
    """Turn the state into a paged cache, in place, and the logits into those of `sampled_tokens_indices` alone."""
    paged_attention_transformation(graph)
    product = graph.output("logits").get_node().input_value(0).get_node()
    wanted = opset13.parameter([-1], Type.i64, name="sampled_tokens_indices")
    wanted.output(0).set_names({"sampled_tokens_indices"})
    picked = opset13.gather(product.input_value(0), wanted, opset13.constant(0, dtype=Type.i64))
    product.input(0).replace_source_output(picked.output(0))
    graph.add_parameters([wanted])
    graph.validate_nodes_and_infer_types()


def last_line(error: BaseException) -> str:
    """OpenVINO's messages begin with where in its sources they arose."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
