"""The decoder of the Llama family on a GPU: the kernels of one step in their order, over buffers that never move.

Nothing here waits for the GPU or asks for memory, so that a step can be recorded once and played again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from llmo.engines.paged.adapters import Adapters
from llmo.engines.paged.config import Config
from llmo.engines.paged.gpu import kernels
from llmo.engines.paged.gpu.products import MOST_PARTS, Matrix
from llmo.engines.paged.linear import DTYPES
from llmo.engines.paged.model import Layer, read_model

TILE = 16  # rows of a prompt that look at its tokens together
SPLITS = 8  # parts in which an answer's token looks at those before it
_TOKENS = 64  # looked at in one go


@dataclass(frozen=True, slots=True)
class Rows:
    """What a step computes: `[rows]` each, and `tiles` as `kernels.attend` takes them, with the tables they name.
    `adapters` are slots, where any row has one."""

    count: int
    prompt: bool
    ids: Tensor
    slots: Tensor
    positions: Tensor
    tiles: Tensor
    tables: Tensor
    adapters: Tensor | None = None


class Buffers:
    """Of one step over at most `rows` rows."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, rows: int, *, prompt: bool) -> None:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.x = empty(rows, config.hidden, dtype=torch.float32)
        self.normed = empty(rows, config.hidden)
        self.added = empty(1 if prompt else MOST_PARTS, rows, config.hidden, dtype=torch.float32)
        self.qkv = empty(rows, wide + 2 * narrow, dtype=torch.float32)
        self.queries, self.attended = empty(rows, wide), empty(rows, wide)
        self.inner = empty(rows, config.inner)
        splits = 0 if prompt else rows * SPLITS
        self.parts = empty(splits, wide, dtype=torch.float32)
        self.peaks, self.totals = (empty(splits, config.heads, dtype=torch.float32) for _ in range(2))


class GpuDecoder:
    """Load from a folder; `layers` runs rows through all layers, `logits` reads the vocabulary off chosen rows."""

    def __init__(self, folder: Path, config: Config, precision: str, device: torch.device, context: int) -> None:
        self.config, self.device = config, device
        self.dtype = DTYPES[precision]
        int8 = precision == "int8"

        def matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
            return Matrix.of(weight.to(device), None if bias is None else bias.to(device), self.dtype, int8=int8)

        read = read_model(folder, config, matrix, device)
        self._layers, self._norm = read.layers, read.norm
        # An int8 model reads out at bf16, as on the CPU.
        self._head = Matrix.of(read.head.to(device), None, self.dtype, int8=False)
        self._embedding = self._head.weight if config.tied else read.embedding.to(device, self.dtype)
        self._head_norms = [self._norms_of_heads(layer) for layer in self._layers]
        angles = torch.outer(torch.arange(context, dtype=torch.float64), torch.tensor(config.frequencies).double())
        self._turns = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).float().contiguous().to(device)
        self._wide = triton.next_power_of_2(max(16, config.head_dim))

    def layers(self, rows: Rows, buffers: Buffers, pool: Tensor, adapters: Adapters | None = None) -> None:
        """Run the rows through all layers; their keys and values go to `pool` (`[layers, blocks, 16, 2, kv_heads,
        head_dim]`), what the last norm gives to `buffers.normed`."""
        config, count, prompt = self.config, rows.count, rows.prompt
        mixed = adapters if rows.adapters is not None else None
        added = 0  # parts of a product that are not in `x` yet
        buffers.x[:count] = self._embedding.index_select(0, rows.ids)
        for index, layer in enumerate(self._layers):
            self._normalise(layer.before_attention, buffers, count, added)
            layer.qkv(buffers.normed, buffers.qkv, count, prompt=prompt)
            if mixed is not None:
                self._adapt(mixed, "qkv", index, buffers.normed, buffers.qkv, rows)
            self._rotate(index, buffers, rows, pool[index])
            self._attend(buffers, rows, pool[index])
            added = self._add(layer.out, buffers.attended, buffers, rows)
            if mixed is not None:
                self._adapt(mixed, "out", index, buffers.attended, buffers.x, rows)
            self._normalise(layer.before_mlp, buffers, count, added)
            if mixed is None:
                layer.gate_up(buffers.normed, buffers.inner, count, prompt=prompt, gated=True)
            else:
                both = torch.empty(count, 2 * config.inner, dtype=torch.float32, device=self.device)
                layer.gate_up(buffers.normed, both, count, prompt=prompt)
                self._adapt(mixed, "gate_up", index, buffers.normed, both, rows)
                kernels.gate[count, triton.cdiv(config.inner, 512)](both, buffers.inner, count, N=config.inner, BN=512)
            added = self._add(layer.down, buffers.inner, buffers, rows)
            if mixed is not None:
                self._adapt(mixed, "down", index, buffers.inner, buffers.x, rows)
        self._normalise(self._norm, buffers, count, added)

    def logits(self, normed: Tensor, out: Tensor) -> None:
        """Rows `[rows, hidden]` as `layers` gives them to `[rows, vocabulary]` at fp32."""
        self._head(normed, out, len(normed), prompt=False)

    def _add(self, matrix: Matrix, x: Tensor, buffers: Buffers, rows: Rows) -> int:
        """A product that is to be added to `buffers.x`: in parts, which the next norm adds."""
        parts = matrix.parts(prompt=rows.prompt)
        matrix(x, buffers.added, rows.count, prompt=rows.prompt, parts=parts)
        return parts

    def _normalise(self, norm: Tensor, buffers: Buffers, rows: int, added: int) -> None:
        hidden = self.config.hidden
        kernels.normalise[rows,](
            buffers.x,
            buffers.added,
            norm,
            buffers.normed,
            buffers.added.stride(0),
            self.config.eps,
            K=hidden,
            PARTS=added,
            WIDE=triton.next_power_of_2(hidden),
        )

    def _rotate(self, index: int, buffers: Buffers, rows: Rows, pool: Tensor) -> None:
        config, norms = self.config, self._head_norms[index]
        kernels.rotate[rows.count, config.heads + 2 * config.kv_heads](
            buffers.qkv,
            self._turns,
            self._turns if norms is None else norms,
            rows.positions,
            rows.slots,
            buffers.queries,
            pool,
            config.eps,
            HEADS=config.heads,
            KV=config.kv_heads,
            DIM=config.head_dim,
            HALF=triton.next_power_of_2(config.head_dim // 2),
            NORM=norms is not None,
            num_warps=1,
        )

    def _attend(self, buffers: Buffers, rows: Rows, pool: Tensor) -> None:
        config = self.config
        group, count = config.heads // config.kv_heads, rows.tiles.shape[1]
        tall = triton.next_power_of_2(max(16, group * (TILE if rows.prompt else 1)))
        splits = 1 if rows.prompt else SPLITS
        kernels.attend[count, config.kv_heads, splits](
            buffers.queries,
            pool,
            rows.tables,
            rows.tiles,
            buffers.attended if splits == 1 else buffers.parts,
            buffers.peaks,
            buffers.totals,
            count,
            rows.tables.shape[1],
            math.log2(math.e) / math.sqrt(config.head_dim),
            HEADS=config.heads,
            KV=config.kv_heads,
            DIM=config.head_dim,
            WIDE=self._wide,
            BM=tall,
            BN=_TOKENS if self.dtype != torch.float32 else _TOKENS // 2,
            SPLITS=splits,
            num_warps=4,
        )
        if splits > 1:
            kernels.combine[rows.count * config.heads,](
                buffers.parts,
                buffers.peaks,
                buffers.totals,
                buffers.attended,
                DIM=config.head_dim,
                WIDE=self._wide,
                SPLITS=SPLITS,
                num_warps=1,
            )

    def _adapt(self, adapters: Adapters, group: str, index: int, x: Tensor, out: Tensor, rows: Rows) -> None:
        """Add what each row's own adapter makes of `x`."""
        matrices = adapters.matrices(group, index)
        if matrices is None:
            return
        below, above = matrices  # [slots, ranks, ins], [slots, parts, rank, outs]
        (slots, ranks, ins), (_, parts, rank, outs) = below.shape, above.shape
        inner = torch.empty(rows.count, ranks, dtype=torch.float32, device=self.device)
        kernels.shrink[rows.count, triton.cdiv(ranks, 16)](
            x, below, rows.adapters, inner, ranks, slots - 1, K=ins, BR=16, BK=256
        )
        kernels.expand[rows.count, triton.cdiv(parts * outs, 256)](
            inner, above, rows.adapters, out, rank, slots - 1, PARTS=parts, N=outs, BN=256
        )

    def _norms_of_heads(self, layer: Layer[Matrix]) -> Tensor | None:
        """Qwen 3's weights for each head of queries and keys, one after the other."""
        if layer.query_norm is None or layer.key_norm is None:
            return None
        config = self.config
        both = (layer.query_norm.repeat(config.heads), layer.key_norm.repeat(config.kv_heads))
        return torch.cat(both).float().to(self.device)


def tiles(pieces: Sequence[tuple[int, int, int]], prompt: bool) -> list[tuple[int, int, int, int]]:
    """The tiles of pieces (first position, rows, row of the tables), which stand one after the other."""
    found, first, tall = [], 0, TILE if prompt else 1
    for start, count, owner in pieces:
        found += [(first + i, min(tall, count - i), start + i, owner) for i in range(0, count, tall)]
        first += count
    return found


def choose(logits: Tensor, settings: Tensor, tokens: Tensor) -> None:
    """A token for each row of `[rows, vocabulary]`; see `kernels.choose`."""
    kernels.choose[len(logits),](logits, settings, tokens, V=logits.shape[1], BN=4096, num_warps=16)
