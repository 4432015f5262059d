"""OpenVINO on the CPU for encoders: a stream of one thread for each core, and short batches cut up by length.

A batch of one part has all cores to itself, in a second copy of the graph with one stream of all threads; several parts
go to the streams, each on a core of its own, for a stream of several threads waits for the slowest at every layer. The
two are never busy at once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from llmo.engines.base import Chunk, Facts, Request, closed, require_cpu
from llmo.engines.batch import chunks, means, pad
from llmo.engines.cpu import instructions, require_instructions
from llmo.engines.folder import card_applied, pad_token_id, position_limit, read_config, require
from llmo.engines.openvino.groups import cut, rounded
from llmo.engines.openvino.runner import GRAPH, last_line, settled
from llmo.errors import EnvironmentProblem, ModelError
from llmo.types import Device

LOGITS, HIDDEN = "logits", "hidden"
INPUTS = ("input_ids", "attention_mask")
REST_KEY = "llmo_rest"  # in the graph's own notes: what an int8 graph computes in between its products
HINTS = {"fp32": "f32", "bf16": "bf16"}
KEPT_SHAPES = 512  # kernels that a stream keeps prepared; OpenVINO's own 5000 are never given back
AHEAD = 2  # parts that are given to each stream: one runs, one waits
_RUNS_IN = {"f32": "fp32", "bf16": "bf16", "u8": "int8", "i8": "int8"}
_VIRTUAL = ("prefix", "prompt")  # tokens of their own before the text, which the config's positions do not count

Cut = Callable[[Sequence[Request], NDArray[np.float32]], Iterator[Chunk]]


class OpenVinoEncoder:
    """Runs graphs that `compression.openvino_encoder` wrote, at the precision that they say themselves."""

    name: ClassVar[str] = "openvino"
    abilities: ClassVar[frozenset[str]] = frozenset({"classify", "embed"})
    pads: ClassVar[bool] = False  # only within the parts that it cuts a batch into

    def __init__(self) -> None:
        self._alone: Any = None
        self._together: Any = None
        self._requests: dict[bool, list[Any]] = {}
        self._pad_id = 0
        self._vocabulary: int | None = None
        self._positions: int | None = None
        self._cores = 1
        self._rest = ""

    def load(self, model: Path, device: Device) -> None:
        self.close()
        require_cpu(self.name, device)
        config = read_config(model)
        _refuse_virtual(model)
        path = require(model, GRAPH)
        require(model, Path(GRAPH).with_suffix(".bin").name)
        self._cores, self._pad_id, self._positions = device.cores, pad_token_id(config), position_limit(config)
        self._vocabulary = config.get("vocab_size")
        try:
            graph = ov.Core().read_model(path)
            precision = settled(graph, None, path)
            self._check(graph, path)
            self._rest = str(graph.get_rt_info(REST_KEY).value) if precision == "int8" else precision
            for each in {precision, self._rest}:
                require_instructions(self.name, each)
            self._alone = self._compiled(graph, streams=1)
            self._together = self._alone if self._cores == 1 else self._compiled(graph, streams=self._cores)
            self._requests = {
                True: [self._alone.create_infer_request()],
                False: [self._together.create_infer_request() for _ in range(AHEAD * self._cores)],
            }
            self._infer(LOGITS, [Request(0, [self._pad_id, self._pad_id])])  # kernels are chosen when it first runs
        except RuntimeError as error:
            self.close()
            raise ModelError(
                f"OpenVINO cannot open the graph: {last_line(error)}",
                hint="make it again with `llmo compress`, or deploy the model on the torch engine",
                where=str(path),
            ) from error
        self._refuse_other(precision)

    def run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        return self._through(LOGITS, chunks, requests)

    def embed(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        return self._through(HIDDEN, means, requests)

    def facts(self) -> Facts:
        if self._alone is None:
            raise closed()
        kernels: Counter[str] = Counter()
        precisions: Counter[str] = Counter()
        for node in self._alone.get_runtime_model().get_ops():
            notes = node.get_rt_info()
            if _note(notes, "layerType") == "FullyConnected":
                kernels[_note(notes, "primitiveType")] += 1
                kind = _note(notes, "runtimePrecision")
                precisions[_RUNS_IN.get(kind, kind)] += 1
        precision = precisions.most_common(1)[0][0] if precisions else self._rest
        return Facts(
            precision,
            _RUNS_IN[self._alone.get_property("INFERENCE_PRECISION_HINT").get_type_name()],
            dict(kernels),
            instructions(precision),
            int(self._together.get_property("INFERENCE_NUM_THREADS")),
            int(self._together.get_property("NUM_STREAMS")),
            f"openvino {ov.__version__.partition('-')[0]}",
        )

    def close(self) -> None:
        self._requests = {}
        self._alone = self._together = None

    def _compiled(self, graph: Any, streams: int) -> Any:
        options = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": self._cores,
            "INFERENCE_PRECISION_HINT": HINTS[self._rest],  # it would take bf16 for fp32 by itself
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "CPU_RUNTIME_CACHE_CAPACITY": KEPT_SHAPES,
            "ENABLE_CPU_PINNING": False,  # the replicas of a machine would all be pinned to its first cores
        }
        return ov.Core().compile_model(graph, "CPU", options)

    def _check(self, graph: Any, path: Path) -> None:
        """Raises ModelError for a graph that is no text encoder as `llmo compress` writes it."""
        names = {name for port in graph.inputs for name in port.get_names()}
        if names != set(INPUTS) or not any(LOGITS in port.get_names() for port in graph.outputs):
            raise ModelError(
                f"the graph is not that of a text encoder: its inputs are {', '.join(sorted(names)) or 'none'}",
                hint="make it again with `llmo compress`",
                where=str(path),
            )

    def _refuse_other(self, precision: str) -> None:
        """Raises EnvironmentProblem where the runtime chose something else than it was told."""
        found = self.facts()
        places = self._alone.get_property("EXECUTION_DEVICES")
        if (found.precision, found.rest, places) != (precision, self._rest, ["CPU"]):
            self.close()
            raise EnvironmentProblem(
                f"the graph is to run at {precision} with {self._rest} between, and OpenVINO runs it at "
                f"{found.precision} with {found.rest} between on {', '.join(places)}",
                hint="compress the model again on this machine, or deploy it on the torch engine",
            )

    def _through(self, name: str, say: Cut, requests: Sequence[Request]) -> Iterator[Chunk]:
        if self._alone is None:
            raise closed()
        if not requests:
            return
        self._check_ids(requests)
        try:
            found = self._infer(name, requests)
        except RuntimeError as error:
            raise ModelError(
                f"the model cannot run this batch of {_size(requests)} tokens: {last_line(error)}",
                hint="the tokenizer may not belong to this model, or the text is longer than its positions",
            ) from error
        for part, output in found:
            yield from say(part, output)

    def _check_ids(self, requests: Sequence[Request]) -> None:
        """OpenVINO reads zeros for a row that a table does not have, and says nothing."""
        ids, _ = pad(requests, self._pad_id)
        wrong = ""
        if ids.min() < 0 or (self._vocabulary is not None and ids.max() >= self._vocabulary):
            wrong = f"a token outside the model's {self._vocabulary}"
        elif self._positions is not None and ids.shape[1] > self._positions:
            wrong = f"the model reads at most {self._positions}"
        if wrong:
            raise ModelError(
                f"the model cannot run this batch of {_size(requests)} tokens: {wrong}",
                hint="the tokenizer may not belong to this model, or the text is longer than its positions",
            )

    def _infer(self, name: str, requests: Sequence[Request]) -> list[tuple[list[Request], NDArray[np.float32]]]:
        """One output of the graph for each part of the batch. A request is used again when its oldest part is done."""
        lengths = [len(request.input_ids) for request in requests]
        parts = cut(lengths, self._cores, self._positions)
        free = deque(self._requests[len(parts) == 1])
        busy: deque[tuple[Any, list[Request]]] = deque()
        found = []

        def collect() -> None:
            infer, part = busy.popleft()
            infer.wait()
            found.append((part, np.array(infer.get_tensor(name).data)))
            free.append(infer)

        try:
            for numbers in parts:
                if not free:
                    collect()
                part = [requests[number] for number in numbers]
                infer = free.popleft()
                infer.start_async(self._feed(part), share_inputs=True)
                busy.append((infer, part))
            while busy:
                collect()
        finally:
            for infer, _ in busy:
                infer.cancel()
        return found

    def _feed(self, part: Sequence[Request]) -> dict[str, NDArray[np.int64]]:
        ids, mask = pad(part, self._pad_id)
        more = rounded(ids.shape[1], self._positions) - ids.shape[1]
        if more:
            ids = np.pad(ids, ((0, 0), (0, more)), constant_values=self._pad_id)
            mask = np.pad(mask, ((0, 0), (0, more)))
        return dict(zip(INPUTS, (ids, mask), strict=True))


def _refuse_virtual(model: Path) -> None:
    kind = card_applied(model)
    if kind in _VIRTUAL:
        raise ModelError(
            f"the model runs with a {kind} before every text, and OpenVINO does not say when a text is then too long",
            hint="deploy it on the torch or the onnx engine",
            where=str(model),
        )


def _size(requests: Sequence[Request]) -> str:
    return f"{len(requests)} x {max(len(request.input_ids) for request in requests)}"


def _note(notes: Any, key: str) -> str:
    """A note of a node that runs; OpenVINO wraps some of them."""
    if key not in notes:
        return ""
    found = notes[key]
    return str(getattr(found, "value", found))
