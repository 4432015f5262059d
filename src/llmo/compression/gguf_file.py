"""Writes a Hugging Face folder's causal language model as one GGUF file, the format of llama.cpp.

Tensor for tensor, so that a model larger than half of the memory can be written. What llama.cpp would compute
otherwise than transformers is refused, not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape, quantize
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from llmo.compression.gguf_vocabulary import add_vocabulary
from llmo.engines.folder import read_config, require
from llmo.errors import InputError, ModelError
from llmo.files import storage_errors

NAME = "model.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TYPES = {
    "fp32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "fp16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
TYPES["q8_0"] = TYPES["int8"]  # its name among GGUF's own
LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight of the folder: which file holds it, under which name, and its shape as PyTorch has it."""

    file: Path
    source: str
    target: str
    shape: tuple[int, ...]


def write(folder: Path, out: Path, precision: str) -> Path:
    """Write the model of a Hugging Face folder (config, tokenizer.json, safetensors) as `model.gguf` into the folder
    `out`, its matrices at fp32, bf16, fp16 or int8 (q8_0). The path of the file.

    Vectors (norms, biases) stay fp32. A matrix whose rows are not whole blocks of 32 is kept at fp16 under int8.
    Raises ModelError for an architecture, a rotary embedding or a tokeniser that GGUF or llama.cpp does not carry,
    InputError for an unknown precision, StorageError when the file cannot be written.
    """
    if precision not in TYPES:
        raise InputError(f"no GGUF precision '{precision}'", hint=f"one of {', '.join(TYPES)}")
    path = out / NAME
    config = read_config(folder)
    architecture = _architecture(config, folder)
    tensors = _tensors(folder, config, architecture)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(aside, architecture)
    try:
        with storage_errors(path), closing(writer):
            _add_metadata(writer, config, folder, precision)
            rows = next(t.shape[0] for t in tensors if t.target == "token_embd.weight")
            writer.add_vocab_size(rows)
            add_vocabulary(writer, folder, rows)
            _write_tensors(writer, tensors, config, architecture, precision)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _architecture(config: dict[str, Any], folder: Path) -> str:
    kind = str(config.get("model_type"))
    causal = [name for name in config.get("architectures") or [] if str(name).endswith("ForCausalLM")]
    if kind not in ARCHITECTURES or not causal:
        raise _refused(
            folder, f"architecture {kind!r} ({', '.join(map(str, config.get('architectures') or [])) or 'no head'})"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise _refused(folder, f"activation {config['hidden_act']!r}")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused(folder, "rotary embeddings over a part of the head")
    return ARCHITECTURES[kind]


def _tensors(folder: Path, config: dict[str, Any], architecture: str) -> list[Tensor]:
    layers = int(config["num_hidden_layers"])
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), layers)
    tied = bool(config.get("tie_word_embeddings", False))
    found = []
    for file in _files(folder):
        try:
            with safe_open(file, "pt") as weights:
                for source in weights.keys():  # noqa: SIM118 - not a dictionary
                    if (tied and source == "lm_head.weight") or source.endswith("rotary_emb.inv_freq"):
                        continue
                    target = names.get_name(source, try_suffixes=(".weight", ".bias"))
                    if target is None:
                        raise _refused(folder, f"the weight {source!r}")
                    found.append(Tensor(file, source, target, tuple(weights.get_slice(source).get_shape())))
        except SafetensorError as error:
            raise ModelError(f"the weights cannot be read: {error}", where=str(file)) from error
    expected = {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    expected |= {f"blk.{i}.{part}.weight" for i in range(layers) for part in LAYER}
    missing = sorted(expected - {t.target for t in found})
    if missing:
        raise ModelError(f"{len(missing)} weights are missing, the first is {missing[0]}", where=str(folder))
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [require(folder, "model.safetensors")]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError("the index of the weights cannot be read", where=str(index)) from error
    return [require(folder, Path(shard).name) for shard in shards]


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], folder: Path, precision: str) -> None:
    heads = int(config["num_attention_heads"])
    width = _head_width(config)
    writer.add_name(str(config.get("_name_or_path") or folder.name))
    writer.add_file_type(TYPES[precision][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(_context(config))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10_000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):
        raise _refused(folder, f"rotary scaling {kind!r}")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 keeps all of it under `rope_parameters`; before, the base stood beside `rope_scaling`."""
    older = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    return {**older, **(config.get("rope_parameters") or {})}


def _context(config: dict[str, Any]) -> int:
    """llama.cpp attends to everything for these families: past a sliding window the answers would differ."""
    positions = int(config["max_position_embeddings"])
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return min(positions, int(window)) if window else positions


def _head_width(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _write_tensors(
    writer: gguf.GGUFWriter, tensors: list[Tensor], config: dict[str, Any], architecture: str, precision: str
) -> None:
    extra = _rope_factors(config)
    for tensor in tensors:
        kind = _kind(tensor.shape, precision)
        plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind)
        shape = tensor.shape if plain else quant_shape_to_byte_shape(tensor.shape, kind)
        dtype = np.dtype(plain or np.uint8)
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.target, shape, dtype, size, raw_dtype=kind)
    if extra is not None:
        writer.add_tensor_info("rope_freqs.weight", extra.shape, extra.dtype, extra.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, values in _values(tensors):
        if architecture == "llama":
            values = _permuted(tensor.target, values, config)  # noqa: PLW2901
        writer.write_tensor_data(quantize(values, _kind(tensor.shape, precision)))
    if extra is not None:
        writer.write_tensor_data(extra)
    writer.flush()


def _kind(shape: tuple[int, ...], precision: str) -> gguf.GGMLQuantizationType:
    kind = TYPES[precision][0]
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _values(tensors: list[Tensor]) -> Iterator[tuple[Tensor, NDArray[np.float32]]]:
    for tensor in tensors:
        with safe_open(tensor.file, "pt") as weights:
            yield tensor, weights.get_tensor(tensor.source).float().numpy()


def _permuted(target: str, values: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """llama.cpp turns neighbouring rows of a head against each other, transformers the two halves of it."""
    part = target.split(".")[2] if target.startswith("blk.") else ""
    if part not in ("attn_q", "attn_k"):
        return values
    heads = config["num_attention_heads"]
    if part == "attn_k":
        heads = config.get("num_key_value_heads") or heads
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _rope_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """What Llama 3.1 divides each rotary frequency by, `[head width / 2]`; llama.cpp reads it as a tensor."""
    rope = _rope(config)
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return None
    width = _head_width(config)
    base = float(rope.get("rope_theta") or 10_000.0)
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(rope["original_max_position_embeddings"])
    turns = trained / (2 * np.pi * base ** (np.arange(0, width, 2, dtype=np.float64) / width))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _refused(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"llama.cpp cannot be given this model: {what}", where=str(folder), hint="serve it with the torch engine"
    )
