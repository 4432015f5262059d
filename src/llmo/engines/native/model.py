"""Weights of a model folder as the kernels read them, and the crew of threads that computes steps with them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from llmo.engines.native import library
from llmo.engines.paged.config import Config
from llmo.engines.paged.weights import Weights
from llmo.errors import EnvironmentProblem, ModelError

LANES, GROUP = 16, 64  # of kernels.h
SLICE = 4096  # rows that are rounded at a time
PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True, slots=True)
class Rows:
    """What a step computes: `table` says where in `tables` the blocks of each row's stream begin, `wanted` which rows
    are read out. The first `prompt` rows are tokens of prompts. `adapters` are addresses of adapters, 0 for none."""

    ids: Sequence[int]
    positions: Sequence[int]
    table: Sequence[int]
    tables: Sequence[int]
    wanted: Sequence[int]
    prompt: int
    adapters: Sequence[int] | None = None


class Cache:
    """Keys and values of `blocks` blocks in all layers."""

    def __init__(self, config: Config, blocks: int, precision: str) -> None:
        shape = (config.layers, blocks, config.kv_heads, config.head_dim, LANES)
        kind = np.float32 if precision == "fp32" else np.uint16
        self.keys, self.values = np.zeros(shape, kind), np.zeros(shape, kind)
        self.blocks = blocks

    @staticmethod
    def block_bytes(config: Config, precision: str) -> int:
        return config.layers * config.kv_heads * config.head_dim * LANES * 2 * (4 if precision == "fp32" else 2)


class Decoder:
    """Load from a folder; `step` runs rows through all layers."""

    def __init__(self, folder: Path, config: Config, precision: str, cores: int, context: int) -> None:
        _check(config, folder)
        self._kernels = library.kernels()
        self._config, self._precision = config, precision
        self._kept: list[Tensor] = []
        with Weights(folder) as weights:
            self._model = self._load(weights, context)
        self._crew = self._kernels.llmo_open(ctypes.byref(self._model), cores, context)
        if not self._crew:
            raise EnvironmentProblem(
                f"the native engine cannot start {cores} threads with their memory",
                hint="give the replica fewer cores (deploy.cores), or raise the limit on threads (see `ulimit -u`)",
            )
        self.close = weakref.finalize(self, self._kernels.llmo_close, self._crew)  # also where loading goes no further

    def step(self, rows: Rows, cache: Cache) -> NDArray[np.float32]:
        """`[wanted, vocabulary]` at fp32. All rows write their keys and values before any of them reads. Raises
        RuntimeError where memory does not suffice."""
        ids, positions, table, tables, wanted = (
            np.array(values, np.int32) for values in (rows.ids, rows.positions, rows.table, rows.tables, rows.wanted)
        )
        adapters = None if rows.adapters is None else np.array(rows.adapters, np.uint64)
        logits = np.empty((len(wanted), self._model.head.n), np.float32)
        step = library.Step(
            len(ids), rows.prompt, len(wanted), ids.ctypes.data, positions.ctypes.data, table.ctypes.data,
            tables.ctypes.data, wanted.ctypes.data, None if adapters is None else adapters.ctypes.data,
            cache.keys.ctypes.data, cache.values.ctypes.data, cache.blocks, logits.ctypes.data,
        )  # fmt: skip
        if self._kernels.llmo_step(self._crew, ctypes.byref(step)):
            raise RuntimeError("not enough memory for the step")
        return logits[:, : self._config.vocabulary]

    def _load(self, weights: Weights, context: int) -> library.Model:
        c = self._config
        table = weights.take("model.embed_tokens.weight", c.vocabulary, c.hidden)
        embedding = self._keep(table if self._precision == "fp32" else table.bfloat16())
        if not c.tied:  # the largest matrices come first, and not side by side at fp32
            table = weights.take("lm_head.weight", c.vocabulary, c.hidden)
        head = self._linear(table, None, fine=True)
        del table
        layers = (library.Layer * c.layers)(*(self._layer(weights, i) for i in range(c.layers)))
        norm = self._vector(weights.take("model.norm.weight", c.hidden))
        weights.check_all_read(*(("lm_head.weight",) if c.tied else ()))
        angles = torch.outer(torch.arange(context, dtype=torch.float64), torch.tensor(c.frequencies).double())
        turns = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).float()
        return library.Model(
            c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.inner, self._precision == "int8", c.eps, layers,
            norm, embedding, self._keep(turns), head,
        )  # fmt: skip

    def _layer(self, weights: Weights, index: int) -> library.Layer:
        c, prefix = self._config, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def fused(
            names: str, sizes: Sequence[int], into: int, where: str, biased: bool, fine: bool = False
        ) -> library.Linear:
            matrices, biases = [], []
            for name, size in zip(names.split(), sizes, strict=True):
                parts = [weights.take(f"{where}{name}_proj.weight", size, into)]
                if biased:
                    parts.append(weights.take(f"{where}{name}_proj.bias", size))
                matrices.append(c.paired(parts[0]) if name in "qk" else parts[0])
                biases += [c.paired(part) if name in "qk" else part for part in parts[1:]]
            return self._linear(torch.cat(matrices), torch.cat(biases) if biases else None, fine)

        last = index + 1 == c.layers

        def norm(name: str) -> Any:
            return self._vector(c.paired(weights.take(f"{attention}{name}.weight", c.head_dim))) if c.qk_norm else None

        return library.Layer(
            self._vector(weights.take(f"{prefix}input_layernorm.weight", c.hidden)),
            self._vector(weights.take(f"{prefix}post_attention_layernorm.weight", c.hidden)),
            norm("q_norm"),
            norm("k_norm"),
            fused("q k v", (wide, narrow, narrow), c.hidden, attention, c.qkv_bias, fine=True),
            fused("o", (c.hidden,), wide, attention, c.out_bias),
            fused("gate up", (c.inner, c.inner), c.hidden, mlp, c.mlp_bias, fine=last),
            fused("down", (c.hidden,), c.inner, mlp, c.mlp_bias, fine=last),
        )

    def _linear(self, weight: Tensor, bias: Tensor | None, fine: bool = False) -> library.Linear:
        """Sixteen outputs side by side; see decoder.cpp."""
        if weight.shape[1] % GROUP or weight.shape[0] % LANES:  # it copies, also where nothing is added
            weight = functional.pad(weight, (0, -weight.shape[1] % GROUP, 0, -weight.shape[0] % LANES))
        n, k = weight.shape
        blocks, scale = n // LANES, None
        if self._precision == "int8":
            packed = torch.empty(blocks, k // 4, LANES, 4, dtype=torch.uint8)
            scales = torch.empty(blocks, k // GROUP, LANES)
            for start in range(0, n, SLICE):
                _round(weight[start : start + SLICE], packed[start // LANES :], scales[start // LANES :])
            scale = self._keep(scales)
        else:
            packed = weight.view(blocks, LANES, k).transpose(1, 2)
        kept = None if bias is None else self._keep(functional.pad(bias, (0, -len(bias) % LANES)))
        return library.Linear(self._keep(packed), scale, kept, n, k, fine)

    def _vector(self, weight: Tensor) -> int:
        return self._keep(functional.pad(weight, (0, -len(weight) % GROUP)))

    def _keep(self, tensor: Tensor) -> int:
        """The address of its numbers, which stay as long as the decoder."""
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


def _round(weight: Tensor, packed: Tensor, scales: Tensor) -> None:
    """Some rows of a matrix, to where they belong."""
    blocks = len(weight) // LANES
    grouped = weight.view(len(weight), -1, GROUP)
    scale = grouped.abs().amax(2).clamp_min(1e-12) / 127
    rounded = (grouped / scale[..., None]).round_().add_(128).to(torch.uint8)
    packed[:blocks] = rounded.view(blocks, LANES, -1, 4).permute(0, 2, 1, 3)
    scales[:blocks] = scale.view(blocks, LANES, -1).transpose(1, 2)


def _check(config: Config, folder: Path) -> None:
    for name, size in (
        ("hidden_size", config.hidden),
        ("head_dim", config.head_dim),
        ("intermediate_size", config.inner),
    ):
        if size % LANES:
            raise ModelError(
                f"the native engine cannot run a {name} of {size}, which is no multiple of {LANES}",
                hint="use the torch engine",
                where=str(folder / "config.json"),
            )
