"""ONNX Runtime on the CPU: opens a folder's `model.onnx` without torch or transformers, so replicas start fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from llmo.engines import onnx_nodes
from llmo.engines.base import Chunk, Facts, Request, closed, require_cpu
from llmo.engines.batch import chunks, means, pad
from llmo.engines.cpu import instructions
from llmo.engines.folder import pad_token_id, read_config, require
from llmo.errors import ModelError
from llmo.types import Device

GRAPH = "model.onnx"
LOGITS, HIDDEN = "logits", "hidden"  # outputs of a graph; the second costs nothing while nobody asks for it
ERRORS_ONLY = 3
LARGE_BATCH = (
    4096  # padded tokens; what a larger batch needed is given back at once, a smaller one's is kept for the next
)

_STATE = vars(onnxruntime.capi.onnxruntime_pybind11_state)
# ONNX Runtime's exceptions share no base class of their own.
ORT_ERRORS = tuple(e for e in _STATE.values() if isinstance(e, type) and issubclass(e, Exception))


class OnnxEngine:
    """fp32 or int8: the graph says which; the engine only feeds it what it asks for."""

    name: ClassVar[str] = "onnx"
    abilities: ClassVar[frozenset[str]] = frozenset({"classify", "embed"})

    def __init__(self) -> None:
        self._session: Any = None
        self._path = Path()
        self._facts: Facts | None = None
        self._inputs: dict[str, Any] = {}
        self._outputs: set[str] = set()
        self._pad_id = 0

    def load(self, model: Path, device: Device) -> None:
        require_cpu(self.name, device)
        self._pad_id = pad_token_id(read_config(model))
        path = self._path = require(model, GRAPH)
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), session_options(device.cores), providers=["CPUExecutionProvider"]
            )
        except ORT_ERRORS as error:
            raise ModelError(
                f"ONNX Runtime cannot open the graph: {_first_line(error)}",
                hint="make it again with `llmo compress`",
                where=str(path),
            ) from error
        self._inputs = {i.name: np.int32 if i.type == "tensor(int32)" else np.int64 for i in self._session.get_inputs()}
        self._outputs = {output.name for output in self._session.get_outputs()}
        unknown = set(self._inputs) - {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
        if unknown or "input_ids" not in self._inputs:
            self.close()
            raise ModelError(
                f"the graph's inputs are not those of a text encoder: {', '.join(sorted(unknown)) or 'no input_ids'}",
                where=str(path),
            )

    def run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        if requests:
            yield from chunks(requests, self._output(LOGITS, requests))

    def embed(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        if requests:
            yield from means(requests, self._output(HIDDEN, requests))

    def _output(self, name: str, requests: Sequence[Request]) -> NDArray[np.float32]:
        """One output of the graph for the padded batch."""
        if self._session is None:
            raise closed()
        if name not in self._outputs:
            raise ModelError(
                f"the graph has no output '{name}'",
                hint="make it again with `llmo compress`, or deploy the model on the torch engine",
            )
        ids, mask = pad(requests, self._pad_id)
        arrays = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self._inputs:
            arrays["token_type_ids"] = np.zeros_like(ids)
        if "position_ids" in self._inputs:
            arrays["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        feed = {name: np.ascontiguousarray(arrays[name], dtype=kind) for name, kind in self._inputs.items()}
        try:
            options = _giving_back() if ids.size > LARGE_BATCH else None
            found: NDArray[np.float32] = self._session.run([name], feed, options)[0]
        except ORT_ERRORS as error:
            raise ModelError(
                f"the model cannot run this batch of {ids.shape[0]} x {ids.shape[1]} tokens: {_first_line(error)}",
                hint="the tokenizer may not belong to this model, or the text is longer than its positions",
            ) from error
        return found

    def facts(self) -> Facts:
        if self._session is None:
            raise closed()
        if self._facts is None:
            self._facts = self._found_out()
        return self._facts

    def _found_out(self) -> Facts:
        found = _products(self._path)
        options = self._session.get_session_options()
        precision = onnx_nodes.precision(found)
        return Facts(
            precision=precision,
            rest="fp32",
            kernels=dict(found),
            instructions=instructions(precision),
            threads=options.intra_op_num_threads,
            streams=options.inter_op_num_threads,
            library=f"onnxruntime {onnxruntime.__version__}",
        )

    def close(self) -> None:
        self._session = self._facts = None


def session_options(cores: int) -> Any:
    """One stream of `cores` threads that sleep when idle: spinning ones collapse when cores are contended."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_mem_pattern = False  # it keeps one plan for every shape seen, and every batch has its own
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _products(path: Path) -> Counter[str]:
    """The products that run. Those that are quantised apart are joined while the graph is opened: then what came of it
    is written out and read."""
    if not onnx_nodes.nodes(path, (onnx_nodes.APART,)):
        return onnx_nodes.nodes(path)
    with TemporaryDirectory() as folder:
        options = session_options(1)
        options.optimized_model_filepath = str(Path(folder) / GRAPH)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx_nodes.nodes(Path(folder) / GRAPH)


def _giving_back() -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
