"""The cache of keys and values in blocks, and attention over it: answers in one padded call, prompts one by one.

A block holds its tokens side by side, keys and values together, so that gathering a stream is one copy of whole
blocks and writing a token one row. A head's group of queries stands as the rows of one product, which spares
repeating the keys. The rows are filled up to four, for fewer take another path through the library; and more
than 192 tokens are filled up to 512, for the library adds up longer sums in parts that depend on their length. With
both, a row's bits depend on nothing but its own tokens, in whatever call it stands (measured, at fp32 and bf16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmo.engines.paged.blocks import BLOCK, SCRATCH
from llmo.engines.paged.config import Config
from llmo.engines.paged.stream import Piece

ROWS = 4
SHORT, LONG = 192 // BLOCK, 512 // BLOCK


@dataclass(frozen=True, slots=True)
class Call:
    """One call of attention: rows `start` to `start + streams * count` of the step, `count` for each stream.

    `table` is `[streams * blocks]`; `mask` `[streams, 1, 1 or count * group, tokens]` is added to the scores.
    """

    start: int
    streams: int
    count: int
    table: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything of a step but the tokens: where each row is written, its rotation, and the calls of attention."""

    slots: Tensor  # [rows]
    cleared: Tensor | None  # what follows the rows in the blocks that they begin
    positions: Tensor  # [rows]
    prompt: int  # rows that are prompt tokens; they stand first
    calls: Sequence[Call]


class Cache:
    """Keys and values of all layers: `[layers, blocks, 16, 2, kv_heads, head_dim]`."""

    def __init__(self, config: Config, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.layers, blocks, BLOCK, 2, config.kv_heads, config.head_dim)
        self._config = config
        self._device = device
        self.dtype = dtype
        self._group = config.heads // config.kv_heads
        self._shape = (BLOCK, 2, config.kv_heads, config.head_dim)
        pool = torch.zeros(shape, dtype=dtype, device=device)
        self._tokens = list(pool.flatten(3).flatten(1, 2).unbind())  # each [slots, features], to write
        self._blocks = list(pool.flatten(2).unbind())  # each [blocks, features], to gather

    @staticmethod
    def block_bytes(config: Config, dtype: torch.dtype) -> int:
        return config.layers * BLOCK * 2 * config.kv_heads * config.head_dim * dtype.itemsize

    def like(self, blocks: int) -> Cache:
        """Another one of its kind."""
        return Cache(self._config, blocks, self.dtype, self._device)

    def batch(self, pieces: Sequence[Piece], pad: int) -> Batch:
        """The plan of a step over `pieces` (prompts first, single answer tokens last) and `pad` rows of filling."""
        positions = [p.start + i for p in pieces for i in range(p.count)]
        slots = [
            p.stream.blocks[position // BLOCK] * BLOCK + position % BLOCK
            for p in pieces
            for position in range(p.start, p.start + p.count)
        ]
        cleared = [slot for p in pieces for slot in self._behind(p)]
        calls, start = [], 0
        long = [p for p in pieces if p.of_prompt or p.count > 1]
        for piece in long:
            calls.append(self._chunk(piece, start))
            start += piece.count
        if len(long) < len(pieces):
            calls.append(self._singles(pieces[len(long) :], start))
        return Batch(
            slots=self._tensor(slots + [SCRATCH] * pad),
            cleared=self._tensor(cleared) if cleared else None,
            positions=self._tensor(positions + [0] * pad),
            prompt=sum(p.count for p in pieces if p.of_prompt),
            calls=calls,
        )

    def attend(self, layer: int, queries: Tensor, pairs: Tensor, batch: Batch) -> Tensor:
        """Write `pairs` (`[rows, 2 * kv_heads * head_dim]`), then let `queries` (`[rows, heads * head_dim]`) read."""
        if batch.cleared is not None:
            self._tokens[layer].index_fill_(0, batch.cleared, 0)
        self._tokens[layer].index_copy_(0, batch.slots, pairs)
        parts = [self._call(layer, queries, call) for call in batch.calls]
        filled = sum(call.streams * call.count for call in batch.calls)
        if filled < queries.shape[0]:
            parts.append(queries.new_zeros(queries.shape[0] - filled, queries.shape[1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _call(self, layer: int, queries: Tensor, call: Call) -> Tensor:
        rows, group = call.streams * call.count, self._group
        _, _, kv_heads, dim = self._shape
        stored = self._blocks[layer].index_select(0, call.table).view(call.streams, -1, 2, kv_heads, dim)
        q = queries[call.start : call.start + rows].view(call.streams, call.count, kv_heads, group, dim)
        q = q.permute(0, 2, 1, 3, 4).reshape(call.streams, kv_heads, call.count * group, dim)
        q = functional.pad(q, (0, 0, 0, -q.shape[2] % ROWS))
        out = functional.scaled_dot_product_attention(
            q, stored[:, :, 0].transpose(1, 2), stored[:, :, 1].transpose(1, 2), attn_mask=call.mask
        )
        out = out[:, :, : call.count * group].view(call.streams, kv_heads, call.count, group, dim)
        return out.transpose(1, 2).reshape(rows, kv_heads * group * dim)

    def _behind(self, piece: Piece) -> range:
        """The slots behind a piece in the block that it begins: a mask hides numbers that somebody left there, but no
        NaN."""
        end = piece.start + piece.count
        if end % BLOCK == 0 or end // BLOCK * BLOCK < piece.start:
            return range(0)
        first = piece.stream.blocks[end // BLOCK] * BLOCK
        return range(first + end % BLOCK, first + BLOCK)

    def _chunk(self, piece: Piece, start: int) -> Call:
        """Each row of a piece sees the tokens up to its own."""
        end = piece.start + piece.count
        table = self._table(piece, self._width(end))
        seen = torch.arange(piece.start, end, device=self._device).repeat_interleave(self._group)
        seen = functional.pad(seen, (0, -len(seen) % ROWS))
        hidden = torch.arange(len(table) * BLOCK, device=self._device)[None] > seen[:, None]
        return Call(start, 1, piece.count, self._tensor(table), self._mask(hidden[None, None]))

    def _singles(self, pieces: Sequence[Piece], start: int) -> Call:
        """Single tokens of answers, all over as many blocks as the longest needs."""
        width = self._width(max(p.start for p in pieces) + 1)
        table = [block for p in pieces for block in self._table(p, width)]
        seen = self._tensor([p.start for p in pieces])
        hidden = torch.arange(width * BLOCK, device=self._device)[None] > seen[:, None]
        return Call(start, len(pieces), 1, self._tensor(table), self._mask(hidden[:, None, None]))

    def _width(self, tokens: int) -> int:
        """The blocks of a call that looks at so many tokens."""
        blocks = -(-tokens // BLOCK)
        return blocks if blocks <= SHORT else -(-blocks // LONG) * LONG

    def _table(self, piece: Piece, width: int) -> list[int]:
        """The blocks up to the piece's end, filled up to `width`: what its stream holds beyond has not been written."""
        blocks = piece.stream.blocks[: -(-(piece.start + piece.count) // BLOCK)]
        return blocks + [SCRATCH] * (width - len(blocks))

    def _mask(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self._device).masked_fill_(hidden, float("-inf"))

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
