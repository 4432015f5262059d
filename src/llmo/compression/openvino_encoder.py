"""An encoder's ONNX graph as an OpenVINO graph at fp32, bf16 or calibrated int8, checked against the ONNX graph.

int8 is NNCF's post-training quantisation (Kozlov et al., 2020, arXiv:2002.08679) as it is meant for transformers:
weights with a scale for each output, activations with scales from calibration texts, SmoothQuant (Xiao et al., 2023,
arXiv:2211.10438) before it and a correction of the biases after it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import openvino as ov
from numpy.typing import NDArray
from openvino import Type, opset13

from llmo.engines.cpu import require_instructions
from llmo.engines.onnx import HIDDEN, LOGITS, ORT_ERRORS, session_options
from llmo.engines.openvino.encoder import HINTS, INPUTS, REST_KEY
from llmo.engines.openvino.runner import GRAPH, PRECISION_KEY, last_line
from llmo.errors import DataError, ModelError, needing

Precision = Literal["fp32", "bf16", "int8"]
Rest = Literal["fp32", "bf16"]

TOLERANCE = 1e-4  # largest error of a logit of the graph before anything is rounded
LENGTHS = (2, 7, 33)  # of the texts on which the two graphs are compared
LEAST_TEXTS = 8  # that differ; fewer say nothing of what activations are like


@dataclass(frozen=True, slots=True)
class Converted:
    """`difference`: the largest error of a logit that the precision of the stored weights (and, at int8, of the
    activations) makes; `bits` a weight, scales included."""

    difference: float
    bits: float


def write(
    graph: Path,
    out: Path,
    precision: Precision,
    calibration: Sequence[Sequence[int]] = (),
    *,
    exact: Collection[str] = (),
    rest: Rest = "fp32",
) -> Converted:
    """Write the ONNX graph of an encoder, as `compression.export` made it, as `openvino_model.xml` and `.bin` into the
    folder `out`, which the engine `openvino` then opens. With fused attention one text is answered a sixth faster.

    `calibration` are token ids of training texts, with special tokens; only int8 reads them. At int8 the products whose
    nodes `exact` names are left out, and all that is no int8 product is computed at `rest`. Raises ModelError for a
    graph that OpenVINO cannot express or computes otherwise, DataError for texts that are too few or all alike, and
    EnvironmentProblem without NNCF or on a processor that does not compute at this precision.
    """
    if precision == "int8":
        _check_texts(calibration)
    for each in {precision, rest if precision == "int8" else precision}:
        require_instructions("openvino", each)
    made = _read(graph)
    expected = [_onnx_logits(session, length) for session in [_session(graph)] for length in LENGTHS]
    error = _difference(made, expected)
    if not error <= TOLERANCE:
        raise ModelError(
            f"OpenVINO's logits differ from ONNX Runtime's by {error:.1e} (at most {TOLERANCE:g})",
            hint="deploy the model on the onnx or the torch engine",
            where=str(graph),
        )
    weights = _count(made)
    if precision == "bf16":
        _round(made)
    elif precision == "int8":
        made = _quantised(made, calibration, exact)
    made.set_rt_info(precision, PRECISION_KEY)
    made.set_rt_info(rest if precision == "int8" else precision, REST_KEY)
    ov.save_model(made, out / GRAPH, compress_to_fp16=False)
    stored = (out / GRAPH).with_suffix(".bin").stat().st_size
    return Converted(_difference(made, expected), 8 * stored / weights)


def _check_texts(calibration: Sequence[Sequence[int]]) -> None:
    unlike = {tuple(ids) for ids in calibration}
    if () in unlike or len(unlike) < LEAST_TEXTS:
        what = "one of them is empty" if () in unlike else f"only {len(unlike)} of them differ"
        raise DataError(
            f"{len(calibration)} texts cannot calibrate int8: {what} (at least {LEAST_TEXTS} must)",
            hint="give texts of the training split, as long and as mixed as those the model will read",
        )


def _read(graph: Path) -> Any:
    try:
        made = ov.Core().read_model(graph)
    except RuntimeError as error:
        raise ModelError(
            f"OpenVINO cannot express the graph: {last_line(error)}",
            hint="deploy the model on the onnx or the torch engine",
            where=str(graph),
        ) from error
    names = {name for port in (*made.inputs, *made.outputs) for name in port.get_names()}
    if not {*INPUTS, LOGITS, HIDDEN} <= names or len(made.inputs) != len(INPUTS):
        raise ModelError(
            f"the graph is not that of a text encoder: it has {', '.join(sorted(names))}", where=str(graph)
        )
    return made.clone()  # a second reading leaves readers of values behind that are not in the graph, and NNCF stumbles


def _session(graph: Path) -> Any:
    try:
        return onnxruntime.InferenceSession(str(graph), session_options(1), providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise ModelError(f"ONNX Runtime cannot open the graph: {str(error)[:200]}", where=str(graph)) from error


def _example(length: int) -> dict[str, NDArray[np.int64]]:
    """Two texts, one of them padded; ids that every vocabulary has."""
    ids = np.arange(2 * length, dtype=np.int64).reshape(2, length) % 50 + 5
    mask = np.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    return dict(zip(INPUTS, (ids, mask), strict=True))


def _onnx_logits(session: Any, length: int) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = session.run([LOGITS], _example(length))[0]
    return logits


def _difference(made: Any, expected: Sequence[NDArray[np.float32]]) -> float:
    """The largest difference of logits on tokens that are not padding, at each of `LENGTHS`, all else at fp32."""
    exact = {"INFERENCE_PRECISION_HINT": HINTS["fp32"], "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = ov.Core().compile_model(made, "CPU", exact).create_infer_request()
    worst = 0.0
    for length, wanted in zip(LENGTHS, expected, strict=True):
        feed = _example(length)
        request.infer(feed)
        got = request.get_tensor(LOGITS).data
        if got.shape != wanted.shape:
            raise ModelError(f"OpenVINO's logits have the shape {got.shape}, not {wanted.shape}")
        mask = feed["attention_mask"]
        kept = mask.astype(bool) if wanted.ndim == 3 else np.ones(len(mask), dtype=bool)
        worst = max(worst, float(np.abs(got - wanted)[kept].max()))
    return worst


def _matrices(made: Any) -> list[Any]:
    """The constants that hold the model's matrices and tables; biases and norms have one side."""
    return [
        node
        for node in made.get_ops()
        if node.get_type_name() == "Constant"
        and node.get_element_type() == Type.f32
        and sum(side > 1 for side in node.shape) > 1
    ]


def _count(made: Any) -> int:
    kinds = (Type.f32, Type.f16, Type.bf16)
    constants = [node for node in made.get_ops() if node.get_type_name() == "Constant"]
    return sum(int(np.prod(list(node.shape))) for node in constants if node.get_element_type() in kinds)


def _round(made: Any) -> None:
    """Store the matrices at bf16, to the nearest: OpenVINO itself would cut the rest off."""
    for node in _matrices(made):
        rounded = opset13.constant(_nearest(node.data), Type.bf16)
        wide = opset13.convert(rounded, Type.f32)
        wide.set_friendly_name(node.get_friendly_name())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(wide.output(0))
    made.validate_nodes_and_infer_types()


def _nearest(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The bf16 numbers next to these, ties to even."""
    bits = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32).astype(np.uint64)
    up = bits + 0x7FFF + ((bits >> 16) & 1)
    return (up & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _quantised(made: Any, calibration: Sequence[Sequence[int]], exact: Collection[str]) -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # else it tells its makers of every use
    with needing("calibrated int8", "calibrate"):
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
    ids = [np.array([text], dtype=np.int64) for text in calibration]
    feeds = [dict(zip(INPUTS, (row, np.ones_like(row)), strict=True)) for row in ids]
    try:
        with _quiet():
            return nncf.quantize(
                made,
                nncf.Dataset(feeds),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(feeds),
                ignored_scope=nncf.IgnoredScope(names=sorted(exact)) if exact else None,
                # 7 bits are for processors whose sums overflow; those are refused.
                advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE),
            )
    except (RuntimeError, nncf.ValidationError, nncf.InternalError) as error:
        raise ModelError(
            f"NNCF cannot quantise the graph: {last_line(error)}",
            hint="deploy the model on the onnx or the torch engine",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF draws bars and tells of itself; what matters is checked after it."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)
