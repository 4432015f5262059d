"""A saved model as one ONNX file: attention as a single node where the model allows it, checked against torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from llmo.compression import graph
from llmo.engines.heads import logits_of
from llmo.engines.onnx import HIDDEN, LOGITS, ORT_ERRORS, session_options
from llmo.engines.torch import open_model, quiet
from llmo.errors import ModelError

FUSED, PLAIN = "fused", "eager"  # transformers' names of attentions
TOLERANCE = 1e-4
LENGTHS = (2, 7, 33)  # of the texts on which the graph is compared with torch
LARGEST = 2000 << 20  # bytes; protobuf ends at 2 GiB


class _Outputs(torch.nn.Module):
    """Only what an engine reads, logits and last hidden states, so that the graph computes nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden: list[torch.Tensor] = []
        hook = self.model.base_model.register_forward_hook(lambda _, __, said: hidden.append(said[0]))
        try:
            logits = logits_of(self.model(input_ids=input_ids, attention_mask=attention_mask), attention_mask)
        finally:
            hook.remove()
        return logits, hidden[-1][:, -input_ids.shape[1] :]  # virtual tokens stand before the text


def export(folder: Path, target: Path, *, fused: bool = True) -> str:
    """Write the model of a saved folder to the file `target`, with dynamic batch and length.

    Returns which attention it has. "fused": each layer's attention is one ONNX Runtime node; "plain": as
    transformers spells it, in ONNX's own operators alone, for models whose attention or mask is not the usual one, and
    for other runtimes (`fused` is False). Raises ModelError when neither gives torch's logits, or the weights are more
    than one file can hold.
    """
    model = open_model(folder)
    _refuse_too_large(model, folder)
    expected = [_torch_logits(model, length) for length in LENGTHS]
    reasons = []
    for attention in (FUSED, PLAIN) if fused else (PLAIN,):
        try:
            with quiet():  # it warns of models that keep the attention they have; the graph shows it
                model.set_attn_implementation(attention)
            exported = _exported(model)
            onnx.save(exported, target)
            difference = _difference(target, expected)
        except _EXPORT_ERRORS as error:
            reasons.append(f"{attention}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")
            continue
        if difference <= TOLERANCE:
            return "fused" if graph.has_attention(exported) else "plain"
        reasons.append(f"{attention}: logits differ by {difference:.1e}")
    raise ModelError(
        f"the model cannot be turned into an ONNX graph ({'; '.join(reasons)})",
        hint="deploy it on the torch engine: leave out the section `compress`",
        where=str(folder),
    )


# What the exporter and ONNX Runtime raise for models they cannot express; each is reported with the next attempt.
_EXPORT_ERRORS: tuple[type[Exception], ...] = (
    *(ModelError, torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError, KeyError),
    *ORT_ERRORS,
)


def _refuse_too_large(model: Any, folder: Path) -> None:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > LARGEST:
        raise ModelError(
            f"the weights take {size / 2**30:.1f} GiB, and one ONNX file holds at most 2 GiB",
            hint="deploy it on the torch engine: leave out the section `compress`",
            where=str(folder),
        )


def _exported(model: Any) -> onnx.ModelProto:
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Outputs(model).eval(),
            _example(16),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=[LOGITS, HIDDEN],
            dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
        )
    if program is None:
        raise ModelError("torch exported nothing")
    exported: onnx.ModelProto = program.model_proto
    return graph.tidy(exported)


def _example(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts, one of them padded; ids that every vocabulary has."""
    ids = torch.arange(2 * length).reshape(2, length) % 50 + 5
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    return ids, mask


def _torch_logits(model: Any, length: int) -> NDArray[np.float32]:
    ids, mask = _example(length)
    with torch.inference_mode():
        logits: NDArray[np.float32] = logits_of(model(input_ids=ids, attention_mask=mask), mask).numpy()
    return logits


def _difference(exported: Path, expected: Sequence[NDArray[np.float32]]) -> float:
    """The largest difference of logits on tokens that are not padding, at each of `LENGTHS`."""
    options = session_options(torch.get_num_threads())
    session = onnxruntime.InferenceSession(str(exported), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for length, wanted in zip(LENGTHS, expected, strict=True):
        ids, mask = (tensor.numpy() for tensor in _example(length))
        got = session.run([LOGITS], {"input_ids": ids, "attention_mask": mask})[0]
        if got.shape != wanted.shape:
            raise ModelError(f"logits have the shape {got.shape}, not {wanted.shape}")
        kept = mask.astype(bool) if wanted.ndim == 3 else np.ones(len(ids), dtype=bool)
        worst = max(worst, float(np.abs(got - wanted)[kept].max()))
    return worst


def _fused_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface (`[batch, heads, length, size]`) as ONNX Runtime's MultiHeadAttention."""
    batch, heads, length, size = query.shape
    merged = [part.transpose(1, 2).reshape(batch, length, heads * size) for part in (query, key, value)]
    scale = float(size**-0.5 if scaling is None else scaling)
    output = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (*merged, None, attention_mask),
        {"num_heads": heads, "scale": scale},
        dtype=query.dtype,
        shape=(batch, length, heads * size),
        version=1,
    )
    return output.reshape(batch, length, heads, size), None


def _padding_mask(
    *, attention_mask: torch.Tensor | None = None, mask_function: Callable[..., Any], **_: Any
) -> torch.Tensor:
    """The mask that MultiHeadAttention takes: `[batch, length]`, 1 for tokens that are there."""
    if mask_function is not bidirectional_mask_function or attention_mask is None:
        raise ValueError("this model masks more than padding")
    return attention_mask.to(torch.int32)


AttentionInterface.register(FUSED, _fused_attention)
AttentionMaskInterface.register(FUSED, _padding_mask)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, logs and warns about itself; what matters is checked after it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
