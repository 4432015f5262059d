"""What a config.json says of a model this engine can run, and a refusal by name for everything it cannot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmo import plugins
from llmo.engines.folder import read_config, refuse_applied
from llmo.errors import ModelError

ENGINES = ("torch", "native")  # whose models these are
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Config:
    """The shape of a decoder of the Llama family; sizes are numbers of features or tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    positions: int  # a sliding window counts as the end: inside it the answers are the same
    eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    frequencies: tuple[float, ...]  # radians a position, one for each pair of a head's features

    def paired(self, rows: Tensor) -> Tensor:
        """Feature i of a head and feature i + half turn together: put them side by side, so that they are one complex
        number. Rows of queries and keys are reordered alike, which no score can tell."""
        pairs = rows.view(-1, 2, self.head_dim // 2, rows.numel() // rows.shape[0])
        return pairs.transpose(1, 2).reshape(rows.shape)


def load_config(folder: Path) -> Config:
    """Read and check `config.json`. Raises ModelError for what this engine cannot run, and says which may."""
    refuse_applied(folder)
    body = read_config(folder)
    where = str(folder / "config.json")
    kind = body.get("model_type")
    names = [str(name) for name in body.get("architectures") or []]
    if kind not in ARCHITECTURES or not all(name.endswith("ForCausalLM") for name in names):
        raise _cannot(f"the architecture {' '.join(names) or kind!r}", where)
    if body.get("quantization_config"):
        raise _cannot("weights that are already quantised (quantization_config)", where)
    if body.get("hidden_act", "silu") != "silu":
        raise _cannot(f"the activation '{body['hidden_act']}'", where)
    try:
        return _config(body, str(kind), where)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"config.json lacks a number or has a wrong one: {error}", hint="make the model folder again", where=where
        ) from error


def _config(body: dict[str, Any], kind: str, where: str) -> Config:
    hidden, heads = int(body["hidden_size"]), int(body["num_attention_heads"])
    head_dim = int(body.get("head_dim") or (128 if kind == "qwen3" else hidden // heads))
    positions = int(body["max_position_embeddings"])
    window = body.get("sliding_window", 4096 if kind == "mistral" else None)
    if window and (kind == "mistral" or body.get("use_sliding_window")):
        positions = min(positions, int(window))
    bias = bool(body.get("attention_bias", False))
    config = Config(
        hidden=hidden,
        layers=int(body["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(body.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        inner=int(body["intermediate_size"]),
        vocabulary=int(body["vocab_size"]),
        positions=positions,
        eps=float(body.get("rms_norm_eps", 1e-6)),
        tied=bool(body.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=bool(body.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        frequencies=_frequencies(body, head_dim, where),
    )
    sizes = (config.hidden, config.layers, config.heads, config.kv_heads, config.head_dim, config.inner)
    if min(*sizes, config.vocabulary, config.positions) < 1:
        raise ValueError("a size is below 1")
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ValueError("heads, key-value heads and head_dim do not fit together")
    return config


def _frequencies(body: dict[str, Any], head_dim: int, where: str) -> tuple[float, ...]:
    """Rotary frequencies as transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`) writes them."""
    rope = {"rope_theta": body.get("rope_theta", 10000.0)}
    rope |= body.get("rope_scaling") or {}
    rope |= body.get("rope_parameters") or {}
    name = rope.get("rope_type", rope.get("type", "default"))
    if float(rope.get("partial_rotary_factor", body.get("partial_rotary_factor", 1.0))) != 1.0:
        raise _cannot("rotary positions over a part of the head (partial_rotary_factor)", where)
    theta = float(rope["rope_theta"])
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    match name:
        case "default":
            return tuple(plain)
        case "linear":
            return tuple(value / float(rope["factor"]) for value in plain)
        case "llama3":
            return tuple(_llama3(value, rope) for value in plain)
    raise _cannot(f"the rotary scaling '{name}'", where)


def _llama3(frequency: float, rope: dict[str, Any]) -> float:
    """Long waves are stretched by `factor`, short ones kept, those between blended: Llama 3.1's rule."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(rope["original_max_position_embeddings"])
    turns = trained * frequency / (2 * math.pi)
    blend = min(1.0, max(0.0, (turns - low) / (high - low)))
    return (1 - blend) * frequency / factor + blend * frequency


def _cannot(what: str, where: str) -> ModelError:
    others = [name for name in plugins.names("llmo.generators") if name not in ENGINES]
    return ModelError(
        f"the engines {' and '.join(ENGINES)} cannot run {what}",
        hint=f"they run {', '.join(ARCHITECTURES)} models with SiLU; engines that may run others: {', '.join(others)}",
        where=where,
    )
