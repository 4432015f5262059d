"""A saved language model as an OpenVINO graph with a key-value state, at fp32, bf16, int8 or int4, against torch.

The graph is spelt in the way that OpenVINO's own passes know (root mean square norms, rotary embeddings, attention
over a growing state), so that they turn it into fused kernels and into paged attention; GenAI opens the folder too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
import safetensors
import torch
import transformers
from numpy.typing import NDArray
from openvino import Type, opset6, opset13
from openvino.op.util import Variable, VariableInfo

from llmo.engines.folder import read_config
from llmo.engines.torch import quiet
from llmo.errors import ModelError

Precision = Literal["fp32", "bf16", "int8", "int4"]

GRAPH = "openvino_model.xml"
PRECISION_KEY = "llmo_precision"  # in the graph's own notes: what its weights are
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the text
TOLERANCE = 1e-3  # largest error of a logit against torch with the same rounded weights, in deviations of the logits
LENGTHS = (1, 9, 40)  # of the texts on which the graph is compared with torch
MASKED = -65504.0
GROUP = 64  # inputs that share a scale at int8: one for all of them cost SmolLM2 2% of perplexity, and no time
LOOKED_UP = ("model.embed_tokens.weight", "lm_head.weight")  # int8, a scale a row: OpenVINO looks up nothing finer


@dataclass(frozen=True, slots=True)
class Converted:
    """`difference`: what the precision of the weights costs, as the largest error of a logit against torch at fp32, in
    standard deviations of the logits; `bits` a weight, scales included."""

    difference: float
    bits: float


def write(folder: Path, out: Path, precision: Precision) -> Converted:
    """Write the model of a Hugging Face folder as `openvino_model.xml` and `.bin` into the folder `out`.

    Raises ModelError for an architecture this cannot express, or if the graph's logits are not the model's.
    """
    _check_family(folder)
    model = _open(folder)
    graph = _Builder(model, precision).build()
    found = _graph_logits(graph, model.config.vocab_size)
    difference = _distance(found, _torch_logits(model))
    _round(model, precision)
    error = _distance(found, _torch_logits(model))
    if not error <= TOLERANCE:
        raise ModelError(
            f"the {precision} graph's logits differ from the model's by {error:.2g} deviations (at most {TOLERANCE:g})",
            hint="deploy it on the torch engine",
            where=str(folder),
        )
    graph.set_rt_info(precision, PRECISION_KEY)
    ov.save_model(graph, out / GRAPH, compress_to_fp16=False)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Converted(difference, 8 * (out / GRAPH).with_suffix(".bin").stat().st_size / weights)


def _open(folder: Path) -> Any:
    auto_class: Any = transformers.AutoModelForCausalLM
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"transformers cannot open the model: {(str(error).splitlines() or [type(error).__name__])[0][:200]}",
            hint="make the folder again, or check it with `llmo verify`",
            where=str(folder),
        ) from error
    for name, what in (("missing_keys", "lack"), ("unexpected_keys", "hold unknown")):
        if names := sorted(info[name]):
            raise ModelError(
                f"the weights {what} tensors, such as {names[0]} ({len(names)} in all)",
                hint="make the folder again, or check it with `llmo verify`",
                where=str(folder),
            )
    return model.eval()


def _check_family(folder: Path) -> None:
    """Raises ModelError, naming what is unusual, for a model the builder would build wrongly."""
    config = read_config(folder)
    kind = config.get("model_type")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    turns = rope.get("rope_type", rope.get("type", "default"))
    sliding = config.get("sliding_window", kind == "mistral" or None)
    unusual = [
        f"of the family '{kind}'" if kind not in FAMILIES else "",
        f"activated by '{config['hidden_act']}'" if config.get("hidden_act", "silu") != "silu" else "",
        "with a sliding window" if sliding and (kind == "mistral" or config.get("use_sliding_window")) else "",
        f"with '{turns}' rotary embeddings" if turns not in ROPES else "",
        "that is quantised already" if config.get("quantization_config") else "",
    ]
    for what in filter(None, unusual):
        raise ModelError(
            f"the OpenVINO graph cannot be built for a model {what}",
            hint=f"it is for {', '.join(FAMILIES)} with full attention; deploy this one on the torch engine",
            where=str(folder),
        )


def _constant(value: Any, kind: Type = Type.i64) -> Any:
    return opset13.constant(value, dtype=kind)


class _Builder:
    """One use: `build` takes the tensors of the model's state as it comes to them."""

    def __init__(self, model: Any, precision: Precision) -> None:
        config = model.config
        self._config = config
        self._precision = precision
        self._left: dict[str, torch.Tensor] = dict(model.state_dict())
        self._tied = config.tie_word_embeddings
        self._rotary = model.model.rotary_emb
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._sinks: list[Any] = []

    def build(self) -> Any:
        """Inputs `input_ids`, `attention_mask`, `position_ids` (int64 `[batch, length]`) and `beam_idx` (int32
        `[batch]`); output `logits` (`[batch, length, vocabulary]`)."""
        names = ("input_ids", "attention_mask", "position_ids")
        ids, seen, positions = inputs = [opset13.parameter([-1, -1], Type.i64, name=name) for name in names]
        self._beam = opset13.parameter([-1], Type.i32, name="beam_idx")
        for parameter, name in zip((*inputs, self._beam), (*names, "beam_idx"), strict=True):
            parameter.output(0).set_names({name})
        self._batch = opset13.gather(opset13.shape_of(ids, Type.i64), _constant([0]), _constant(0))
        self._mask = _mask(ids, seen)
        self._cos, self._sin = self._rotation(positions)
        embeddings = self._compressed(self._take("model.embed_tokens.weight"), None)
        hidden = opset13.gather(embeddings, opset13.convert(ids, Type.i32), _constant(0, Type.i32))
        for number in range(self._config.num_hidden_layers):
            layer = f"model.layers.{number}."
            normal = self._norm(hidden, f"{layer}input_layernorm")
            hidden = opset13.add(hidden, self._attention(normal, f"{layer}self_attn.", number))
            normal = self._norm(hidden, f"{layer}post_attention_layernorm")
            hidden = opset13.add(hidden, self._feed_forward(normal, f"{layer}mlp."))
        hidden = self._norm(hidden, "model.norm")
        head = embeddings if self._tied else self._compressed(self._take("lm_head.weight"), None)
        logits = opset13.matmul(hidden, head, transpose_a=False, transpose_b=True)
        logits.output(0).set_names({"logits"})
        return ov.Model([opset13.result(logits, name="logits")], self._sinks, [*inputs, self._beam], "llmo")

    def _rotation(self, positions: Any) -> tuple[Any, Any]:
        """Cosine and sine of each position's angles, `[batch, 1, length, size]`."""
        frequencies = self._rotary.inv_freq.float().numpy().reshape(1, 1, -1)
        angles = opset13.multiply(
            opset13.unsqueeze(opset13.convert(positions, Type.f32), _constant(2)), opset13.constant(frequencies)
        )
        both = opset13.concat([angles, angles], -1)
        parts = [opset13.cos(both), opset13.sin(both)]
        scale = np.float32(getattr(self._rotary, "attention_scaling", 1.0))
        if scale != 1.0:
            parts = [opset13.multiply(part, opset13.constant(scale)) for part in parts]
        cos, sin = (opset13.unsqueeze(part, _constant(1)) for part in parts)
        return cos, sin

    def _attention(self, hidden: Any, name: str, number: int) -> Any:
        widths = [heads * self._size for heads in (self._heads, self._kv_heads, self._kv_heads)]
        joined = self._linear(hidden, [f"{name}{part}_proj" for part in "qkv"])
        parts = opset13.variadic_split(joined, _constant(-1), _constant(widths))
        query = self._rotated(self._split(parts.output(0), self._heads, f"{name}q_norm"))
        key = self._rotated(self._split(parts.output(1), self._kv_heads, f"{name}k_norm"))
        value = self._split(parts.output(2), self._kv_heads)
        key = self._repeated(self._remembered(key, number, "key"))
        value = self._repeated(self._remembered(value, number, "value"))
        mixed = opset13.scaled_dot_product_attention(query, key, value, self._mask)
        mixed = opset13.transpose(mixed, _constant([0, 2, 1, 3]))
        mixed = opset13.reshape(mixed, _constant([0, 0, widths[0]]), special_zero=True)
        return self._linear(mixed, [f"{name}o_proj"])

    def _feed_forward(self, hidden: Any, name: str) -> Any:
        width = self._config.intermediate_size
        joined = self._linear(hidden, [f"{name}gate_proj", f"{name}up_proj"])
        parts = opset13.variadic_split(joined, _constant(-1), _constant([width, width]))
        inner = opset13.multiply(opset13.swish(parts.output(0)), parts.output(1))
        return self._linear(inner, [f"{name}down_proj"])

    def _split(self, states: Any, heads: int, norm: str = "") -> Any:
        """`[batch, length, heads * size]` to `[batch, heads, length, size]`; Qwen 3 has a norm for each head."""
        states = opset13.reshape(states, _constant([0, 0, heads, self._size]), special_zero=True)
        if norm and f"{norm}.weight" in self._left:
            states = self._norm(states, norm)
        return opset13.transpose(states, _constant([0, 2, 1, 3]))

    def _rotated(self, states: Any) -> Any:
        half = self._size // 2
        first = opset13.slice(states, _constant([0]), _constant([half]), _constant([1]), _constant([3]))
        second = opset13.slice(states, _constant([half]), _constant([2**63 - 1]), _constant([1]), _constant([3]))
        turned = opset13.concat([opset13.multiply(second, opset13.constant(np.float32(-1))), first], -1)
        return opset13.add(opset13.multiply(states, self._cos), opset13.multiply(turned, self._sin))

    def _remembered(self, states: Any, number: int, what: str) -> Any:
        """These states after those of earlier calls, `[batch, heads, past + length, size]`."""
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, self._kv_heads, -1, self._size])
        info.data_type = Type.f32
        info.variable_id = f"past_key_values.{number}.{what}present.{number}.{what}"
        variable = Variable(info)
        empty = opset13.concat([self._batch, _constant([self._kv_heads, 0, self._size])], 0)
        past = opset6.read_value(opset13.broadcast(opset13.constant(np.float32(0)), empty), variable)
        grown = opset13.concat([opset13.gather(past, self._beam, _constant(0)), states], 2)
        self._sinks.append(opset6.assign(grown, variable))
        return grown

    def _repeated(self, states: Any) -> Any:
        """Each key or value head once for every query head that reads it."""
        times = self._heads // self._kv_heads
        if times == 1:
            return states
        length = opset13.gather(opset13.shape_of(states, Type.i64), _constant([2]), _constant(0))
        shape = opset13.concat([self._batch, _constant([self._kv_heads, times]), length, _constant([self._size])], 0)
        wide = opset13.broadcast(opset13.unsqueeze(states, _constant(2)), shape, "BIDIRECTIONAL")
        return opset13.reshape(wide, _constant([0, self._heads, -1, self._size]), special_zero=True)

    def _norm(self, states: Any, name: str) -> Any:
        square = opset13.power(states, opset13.constant(np.float32(2)))
        mean = opset13.reduce_mean(square, _constant([-1]), keep_dims=True)
        root = opset13.sqrt(opset13.add(mean, opset13.constant(np.float32(self._config.rms_norm_eps))))
        scaled = opset13.multiply(states, opset13.divide(opset13.constant(np.float32(1)), root))
        return opset13.multiply(scaled, opset13.constant(self._take(f"{name}.weight")))

    def _linear(self, states: Any, names: Sequence[str]) -> Any:
        """Several layers that read the same states are one, which is less work to start."""
        weight = self._compressed(np.concatenate([self._take(f"{name}.weight") for name in names]), GROUP)
        out = opset13.matmul(states, weight, transpose_a=False, transpose_b=True)
        if f"{names[0]}.bias" in self._left:
            bias = np.concatenate([self._take(f"{name}.bias") for name in names])
            out = opset13.add(out, opset13.constant(bias.reshape(1, 1, -1)))
        return out

    def _compressed(self, weight: NDArray[np.float32], group: int | None) -> Any:
        """The matrix as the graph stores it; see `quantise`, and `quantise_coarsely` for int4, which needs a group."""
        match self._precision:
            case "fp32":
                return opset13.constant(weight)
            case "bf16":
                rounded = torch.from_numpy(weight).bfloat16().float().numpy()  # OpenVINO itself cuts the rest off
                return opset13.convert(_constant(rounded, Type.bf16), Type.f32)
            case "int4" if group is not None:
                sides = quantise_coarsely(weight, group)
                small, zeros = (opset13.convert(_constant(side, Type.u4), Type.f32) for side in sides[:2])
                levels, scales = opset13.subtract(small, zeros), sides[2]
            case "int8" | "int4":
                whole, scales = quantise(weight, group)
                levels = opset13.convert(opset13.constant(whole), Type.f32)
        wide = opset13.multiply(levels, opset13.constant(scales))
        if scales.ndim == 2:
            return wide
        return opset13.reshape(wide, _constant(list(weight.shape)), special_zero=False)

    def _take(self, name: str) -> NDArray[np.float32]:
        tensor: NDArray[np.float32] = self._left.pop(name).float().numpy()
        return tensor


def quantise(weight: NDArray[np.float32], group: int | None) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`[rows, columns]` as int8 levels in -127..127 and scales, 1 for zeros: `[rows, columns / group, group]` and
    `[rows, columns / group, 1]`, or `[rows, columns]` and `[rows, 1]` without a group or where it does not fit."""
    weight = _grouped(weight, group)
    largest = np.abs(weight).max(axis=-1, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def quantise_coarsely(
    weight: NDArray[np.float32], group: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """`[rows, columns]` as int4: levels in 0..15, zeros among them and scales, shaped as those of `quantise`;
    `(levels - zeros) * scales` is the weight.

    Zeros are whole numbers: with others OpenVINO takes a kernel whose answers depend on what runs beside them.
    """
    weight = _grouped(weight, group)
    low = np.minimum(weight.min(axis=-1, keepdims=True), 0)
    high = np.maximum(weight.max(axis=-1, keepdims=True), 0)
    scales = np.where(high > low, (high - low) / 15, 1).astype(np.float32)
    zeros = np.rint(-low / scales)
    levels = np.clip(np.rint(weight / scales) + zeros, 0, 15)
    return levels.astype(np.uint8), zeros.astype(np.uint8), scales


def _grouped(weight: NDArray[np.float32], group: int | None) -> NDArray[np.float32]:
    rows, columns = weight.shape
    if group is None or columns <= group or columns % group:
        return weight
    return weight.reshape(rows, -1, group)


def _mask(ids: Any, seen: Any) -> Any:
    """0 where a token may look, very negative where it may not: after itself, or at padding (`seen` is 0)."""
    zero, one = _constant(0), _constant(1)
    length = opset13.gather(opset13.shape_of(ids, Type.i64), one, zero)
    total = opset13.gather(opset13.shape_of(seen, Type.i64), one, zero)
    keys = opset13.unsqueeze(opset13.range(zero, total, one, Type.i64), zero)
    queries = opset13.unsqueeze(opset13.range(opset13.subtract(total, length), total, one, Type.i64), one)
    there = opset13.unsqueeze(opset13.convert(seen, Type.boolean), _constant([1, 2]))
    allowed = opset13.logical_and(opset13.less_equal(keys, queries), there)
    return opset13.select(allowed, opset13.constant(np.float32(0)), opset13.constant(np.float32(MASKED)))


def _round(model: Any, precision: Precision) -> None:
    """Give the torch model, in place, the very weights that the graph computes with."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or precision == "fp32":
            continue
        if precision == "bf16":
            parameter.data.copy_(parameter.data.bfloat16())
            continue
        if precision == "int4" and name not in LOOKED_UP:
            small, zeros, scales = quantise_coarsely(parameter.data.numpy(), GROUP)
            rounded = (small.astype(np.float32) - zeros) * scales
        else:
            levels, scales = quantise(parameter.data.numpy(), None if name in LOOKED_UP else GROUP)
            rounded = levels * scales
        parameter.data.copy_(torch.from_numpy(rounded).view_as(parameter))


def _texts(vocabulary: int) -> list[NDArray[np.int64]]:
    return [(np.arange(length) * 37 + 11) % vocabulary for length in LENGTHS]


def _torch_logits(model: Any) -> list[NDArray[np.float32]]:
    with torch.inference_mode():
        inputs = [torch.from_numpy(ids[None]) for ids in _texts(model.config.vocab_size)]
        return [model(input_ids=ids).logits[0].numpy() for ids in inputs]


def _graph_logits(graph: Any, vocabulary: int) -> list[NDArray[np.float32]]:
    """Each text in two calls, so that the state counts; nothing but the weights is rounded."""
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    request = ov.Core().compile_model(graph, "CPU", {**exact, "INFERENCE_NUM_THREADS": 1}).create_infer_request()
    found = []
    for ids in _texts(vocabulary):
        request.reset_state()
        cut = len(ids) // 2
        parts = [_logits(request, ids, start, end) for start, end in ((0, cut), (cut, len(ids))) if end > start]
        found.append(np.concatenate(parts))
    return found


def _distance(found: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]) -> float:
    return max(float(np.abs(a - b).max() / b.std()) for a, b in zip(found, expected, strict=True))


def _logits(request: Any, ids: NDArray[np.int64], start: int, end: int) -> NDArray[np.float32]:
    feed: Mapping[str, Any] = {
        "input_ids": ids[None, start:end],
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(start, end)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    logits: NDArray[np.float32] = request.infer(feed)[0][0].copy()
    return logits
