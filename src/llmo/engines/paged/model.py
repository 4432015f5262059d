"""The decoder of the Llama family in plain torch, for a CPU, over weights fused where one product does for several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from llmo.engines.paged.adapters import Mixed
from llmo.engines.paged.attention import Batch, Cache
from llmo.engines.paged.config import Config
from llmo.engines.paged.linear import DTYPES, Int8, Linear, Packed
from llmo.engines.paged.weights import Weights

L = TypeVar("L")  # what a matrix and its bias become


@dataclass(frozen=True, slots=True)
class Layer(Generic[L]):
    """One decoder layer. `qkv` gives rotated features in neighbouring pairs, `gate_up` both halves of the MLP."""

    before_attention: Tensor
    qkv: L
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: L
    before_mlp: Tensor
    gate_up: L
    down: L


@dataclass(frozen=True, slots=True)
class Model(Generic[L]):
    """All that a folder's weights are: the embedding and the head are fp32 on the CPU, and one where they are tied."""

    embedding: Tensor
    layers: Sequence[Layer[L]]
    norm: Tensor
    head: Tensor


def read_model(
    folder: Path, config: Config, matrix: Callable[[Tensor, Tensor | None], L], device: torch.device
) -> Model[L]:
    """Read a folder; `matrix` makes each fp32 weight and its bias what a product takes. Raises ModelError."""
    with Weights(folder) as weights:
        embedding = weights.take("model.embed_tokens.weight", config.vocabulary, config.hidden)
        head = embedding if config.tied else weights.take("lm_head.weight", config.vocabulary, config.hidden)
        layers = [_layer(weights, config, f"model.layers.{i}.", matrix, device) for i in range(config.layers)]
        norm = weights.take("model.norm.weight", config.hidden).to(device)
        weights.check_all_read(*(("lm_head.weight",) if config.tied else ()))
    return Model(embedding, layers, norm, head)


class Decoder:
    """Load from a folder; `hidden` runs tokens through the layers, `logits` reads the vocabulary off chosen rows."""

    def __init__(self, folder: Path, config: Config, precision: str, device: torch.device, context: int) -> None:
        self._config = config
        self._precision = precision
        self._device = device
        self.dtype = DTYPES[precision]
        self.least_rows = 1 if precision == "int8" else 2  # see linear.py
        model = read_model(folder, config, self._linear, device)
        self._layers, self._norm = model.layers, model.norm
        # An int8 model reads out at bf16: half of the perplexity that int8 costs would come from here.
        self._head = self._linear(model.head, None, "bf16" if precision == "int8" else precision)
        lookup = torch.float32 if precision == "fp32" else torch.bfloat16
        self._embedding = model.embedding.to(device, lookup)
        angles = torch.outer(torch.arange(context, dtype=torch.float64), torch.tensor(config.frequencies).double())
        self._eps = torch.full((1, 1), config.eps, device=device)
        self._turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64).unsqueeze(1).to(device)

    def hidden(self, ids: Tensor, cache: Cache, batch: Batch, mixed: Mixed | None = None) -> Tensor:
        """`[rows]` token ids to `[rows, hidden]` after the last norm; keys and values go to `cache`."""
        config, prompt = self._config, batch.prompt
        turns = self._turns[batch.positions]
        rotated, wide = config.heads + config.kv_heads, config.heads * config.head_dim
        x = functional.embedding(ids, self._embedding).float()
        for index, layer in enumerate(self._layers):

            def product(group: str, linear: Linear, x: Tensor, index: int = index) -> Tensor:
                out = linear(x, prompt)
                if mixed is not None:
                    mixed.add(index, group, x, out)
                return out

            qkv = product("qkv", layer.qkv, self._rms(x, layer.before_attention)).float()
            heads = qkv[:, : rotated * config.head_dim].view(-1, rotated, config.head_dim)
            if layer.query_norm is not None:
                self._normalise(heads, layer)
            torch.view_as_complex(heads.view(-1, rotated, config.head_dim // 2, 2)).mul_(turns)
            qkv = qkv.to(cache.dtype)
            x += product("out", layer.out, cache.attend(index, qkv[:, :wide], qkv[:, wide:], batch).to(self.dtype))
            both = product("gate_up", layer.gate_up, self._rms(x, layer.before_mlp))
            gate, up = both[:, : config.inner], both[:, config.inner :]
            x += product("down", layer.down, functional.silu(gate).mul_(up))
        return self._rms(x, self._norm)

    def logits(self, hidden: Tensor, prompt: int = 0) -> Tensor:
        """`[rows, hidden]` to `[rows, vocabulary]` at fp32."""
        if len(hidden) == 1:
            return self._head(hidden.expand(2, -1).contiguous(), prompt)[:1].float()  # see linear.py
        return self._head(hidden, prompt).float()

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        """The root-mean-square norm of fp32 rows, in the dtype of the products. torch's own takes ten small steps."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        scale = torch.addcmul(self._eps, length, length, value=1 / self._config.hidden).rsqrt_()
        return (x * scale).mul_(weight).to(self.dtype)

    def _normalise(self, heads: Tensor, layer: Layer[Linear]) -> None:
        """Qwen 3: queries and keys are normalised a head at a time."""
        config = self._config
        for part, weight in ((heads[:, : config.heads], layer.query_norm), (heads[:, config.heads :], layer.key_norm)):
            part.copy_(functional.rms_norm(part, (config.head_dim,), weight, config.eps))

    def _linear(self, weight: Tensor, bias: Tensor | None, precision: str | None = None) -> Linear:
        bias = None if bias is None else bias.to(self._device, self.dtype)
        if (precision or self._precision) == "int8":
            return Int8(weight.to(self._device), bias)
        return Packed(weight.to(self._device, self.dtype), bias)


def _layer(
    weights: Weights, c: Config, prefix: str, matrix: Callable[[Tensor, Tensor | None], L], device: torch.device
) -> Layer[L]:
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    sizes = {"q": c.heads * c.head_dim, "k": c.kv_heads * c.head_dim, "v": c.kv_heads * c.head_dim}
    parts, biases = [], []
    for name, size in sizes.items():
        part = weights.take(f"{attention}{name}_proj.weight", size, c.hidden)
        parts.append(part if name == "v" else c.paired(part))
        if c.qkv_bias:
            part = weights.take(f"{attention}{name}_proj.bias", size)
            biases.append(part if name == "v" else c.paired(part))

    def bias(name: str, size: int, there: bool) -> Tensor | None:
        return weights.take(f"{name}.bias", size) if there else None

    def norm(name: str) -> Tensor | None:
        if not c.qk_norm:
            return None
        return c.paired(weights.take(f"{attention}{name}.weight", c.head_dim)).to(device)

    gate_up = torch.cat([weights.take(f"{mlp}{name}_proj.weight", c.inner, c.hidden) for name in ("gate", "up")])
    gate_up_bias = [bias(f"{mlp}{name}_proj", c.inner, c.mlp_bias) for name in ("gate", "up")]
    return Layer(
        before_attention=weights.take(f"{prefix}input_layernorm.weight", c.hidden).to(device),
        qkv=matrix(torch.cat(parts), torch.cat(biases) if biases else None),
        query_norm=norm("q_norm"),
        key_norm=norm("k_norm"),
        out=matrix(
            weights.take(f"{attention}o_proj.weight", c.hidden, sizes["q"]),
            bias(f"{attention}o_proj", c.hidden, c.out_bias),
        ),
        before_mlp=weights.take(f"{prefix}post_attention_layernorm.weight", c.hidden).to(device),
        gate_up=matrix(gate_up, torch.cat([b for b in gate_up_bias if b is not None]) if c.mlp_bias else None),
        down=matrix(
            weights.take(f"{mlp}down_proj.weight", c.hidden, c.inner), bias(f"{mlp}down_proj", c.hidden, c.mlp_bias)
        ),
    )
