"""Calibration texts: some of the training split that stand for all of it, and what a graph computes on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from llmo.engines.onnx import LOGITS, session_options
from llmo.errors import DataError
from llmo.tasks.base import Logits

Ids = Sequence[int]
LEAST = 16  # unlike texts
COMPARED = 16  # of them, spread evenly over the lengths, to see whether they are alike
ALIKE = 0.9  # mean share of tokens that two texts have in common


def choose(texts: Sequence[Ids], count: int, seed: int = 0) -> list[list[int]]:
    """`count` of the training split's texts (token ids): no two equal, and of every length alike often.

    All distinct texts stand in a row by length, the row is cut into `count` parts, and each gives one. With fewer
    distinct texts than `count`, all are taken. The same texts in any order and the same seed give the same choice.
    Raises DataError when fewer than `LEAST` are distinct, or nearly all of their tokens are the same.
    """
    distinct = sorted({tuple(ids) for ids in texts if len(ids)}, key=lambda ids: (len(ids), ids))
    if len(distinct) < LEAST:
        raise DataError(
            f"{len(distinct)} different texts are too few to calibrate on (of {len(texts)} given)",
            hint=f"give at least {LEAST} different texts of the training split, or leave out static quantisation",
        )
    edges = np.linspace(0, len(distinct), min(count, len(distinct)) + 1).astype(int).tolist()
    rng = np.random.default_rng(seed)
    chosen = [list(distinct[rng.integers(a, b)]) for a, b in pairwise(edges)]
    refuse_alike(chosen)
    return chosen


def refuse_alike(texts: Sequence[Ids]) -> None:
    """Raises DataError when the texts have nearly all of their tokens in common: ranges of one text fit no other."""
    spread = [set(texts[i]) for i in np.linspace(0, len(texts) - 1, min(COMPARED, len(texts))).astype(int)]
    shared = [len(a & b) / len(a | b) for a, b in combinations(spread, 2)]
    if np.mean(shared) > ALIKE:
        raise DataError(
            f"the calibration texts are all alike: two of them share {100 * np.mean(shared):.0f}% of their tokens",
            hint="give texts as different as those that the model will be asked, or leave out static quantisation",
        )


def logits(model: onnx.ModelProto, texts: Sequence[Ids], *, cores: int = 1) -> list[Logits]:
    """What the graph answers to each text by itself."""
    session = _session(model, cores)
    return [session.run([LOGITS], _feed(ids))[0][0] for ids in texts]


def activations(
    model: onnx.ModelProto, names: Sequence[str], texts: Sequence[Ids], *, cores: int = 1
) -> Iterator[Mapping[str, NDArray[np.float32]]]:
    """The named values, `[tokens, width]`, of each text by itself, so that none is padding."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    there = {value.name for value in shown.graph.output}
    for name in names:
        if name not in there:
            shown.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = _session(shown, cores)
    del shown
    for ids in texts:
        found = session.run(list(names), _feed(ids))
        yield {name: array.reshape(-1, array.shape[-1]) for name, array in zip(names, found, strict=True)}


def _session(model: onnx.ModelProto, cores: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(cores), providers=["CPUExecutionProvider"]
    )


def _feed(ids: Ids) -> dict[str, NDArray[np.int64]]:
    array = np.array([ids], np.int64)
    return {"input_ids": array, "attention_mask": np.ones_like(array)}
