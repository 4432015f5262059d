"""Sequences of any lengths in one row, without padding: each token attends to its own sequence, and to a beginning that
all of them share.

Everything but attention works on single tokens, so sequences laid end to end cost what their tokens cost. Attention
gathers those of like length into blocks, where a few masked places are all that is wasted. Its weights are made again
on the way back, some queries at a time (Dao et al. 2022), so that memory grows with the tokens and not their square.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "llmo-packed"
LIKE, NEAR = 0.75, 16  # of a block's longest sequence, and tokens below that: what is shorter begins another block
QUERIES = 128  # of each sequence at once
PLACES = 1 << 18  # scores of one head at once
OTHERWISE = ("softcap", "s_aux")  # what some architectures want done to the scores
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # of a config
FOREIGN = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)  # another architecture


@dataclass(frozen=True, slots=True)
class Block:
    """Sequences of like length. `tokens` `[sequences, longest]` says where in the row each one's tokens stand, `real`
    which places are meant (the others repeat a last token); the first `context` tokens of the row come before each."""

    tokens: torch.Tensor
    real: torch.Tensor
    context: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A row: `common` tokens that all sequences begin with, then the rest of each. `positions` `[tokens]` start anew
    with every sequence; `back` `[tokens]` is each token's place among those of all blocks."""

    common: int
    longest: int
    positions: torch.Tensor
    blocks: tuple[Block, ...]
    back: torch.Tensor


def layout(lengths: Sequence[int], common: int, device: torch.device) -> Layout:
    """Of sequences of `lengths` tokens, all of which begin with the same `common` ones."""
    own = [length - common for length in lengths]
    starts = list(accumulate(own, initial=common))
    blocks = [_block([0], [common], 0)] if common else []
    blocks += [_block([starts[i] for i in part], [own[i] for i in part], common) for part in _alike(own, common)]
    places = torch.cat([block.real.flatten() for block in blocks]).nonzero()[:, 0]
    tokens = torch.cat([block.tokens[block.real] for block in blocks])
    back = torch.empty_like(places).scatter_(0, tokens, places)
    positions = torch.cat([torch.arange(common), *(torch.arange(common, length) for length in lengths)])
    there = tuple(Block(b.tokens.to(device), b.real.to(device), b.context) for b in blocks)
    return Layout(common, max(lengths), positions.to(device), there, back.to(device))


def _alike(sizes: Sequence[int], common: int) -> Iterator[list[int]]:
    """Numbers of the sequences that are not empty, longest first, in parts of like length and bounded work."""
    part: list[int] = []
    for i in sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i]):
        longest = sizes[part[0]] if part else sizes[i]
        scores = (len(part) + 1) * min(longest, QUERIES) * (common + longest)
        if part and (sizes[i] < LIKE * longest - NEAR or scores > PLACES):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _block(starts: Sequence[int], sizes: Sequence[int], context: int) -> Block:
    first, size = torch.tensor(starts)[:, None], torch.tensor(sizes)[:, None]
    place = torch.arange(max(sizes))[None]
    return Block(first + place.minimum(size - 1), place < size, context)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Layout | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """Of one `packed` row, `[1, heads, tokens, width]` in and `[1, tokens, heads, width]` out, whatever the mask; of
    anything else as torch does it. Raises NotImplementedError for what an architecture wants that is not done here."""
    if packed is None:
        given = {"dropout": dropout, "scaling": scaling, **asked}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)[0], None
    refuse(asked, dropout, packed.longest)
    rows = [x.transpose(1, 2).squeeze(0) for x in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    said: torch.Tensor = _Attention.apply(*rows, packed, scale)  # type: ignore[no-untyped-call]
    return said[None], None


def refuse(asked: Mapping[str, Any], dropout: float, longest: int) -> None:
    """Raises NotImplementedError for what an architecture wants of packed rows of at most `longest` tokens each."""
    wanted = [name for name in OTHERWISE if asked.get(name) is not None]
    wanted += ["dropout"] if dropout else []
    wanted += ["sliding_window"] if (asked.get("sliding_window") or longest) < longest else []
    if wanted:
        raise NotImplementedError(f"packed attention with {', '.join(wanted)}")


class _Attention(torch.autograd.Function):
    """`[tokens, heads, width]` in and out; keys and values may have fewer heads."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Layout, scale: float
    ) -> torch.Tensor:
        ctx.packed, ctx.scale, ctx.dtypes = packed, scale, (query.dtype, key.dtype, value.dtype)
        # Under autocast, rotated queries and keys are fp32 and values bf16; the products would round them anyway.
        query, keys = (query * scale).to(value.dtype), torch.stack([key.to(value.dtype), value], 1)
        ctx.save_for_backward(query, keys)
        found = []
        for block in packed.blocks:
            q, (k, v) = _queries(block, query, value.shape[1]), _keys(block, keys)
            said = [_weights(q[:, :, part], k, block, part) @ v[:, : _seen(block, part)] for part in _parts(q)]
            found.append(_tokens(block, [torch.unflatten(one, 1, (q.shape[1], -1)) for one in said]))
        return torch.cat(found).index_select(0, packed.back)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        query, keys = ctx.saved_tensors
        packed: Layout = ctx.packed
        slope = outer[0].to(query.dtype)
        to_query, to_keys = [], []
        common = torch.zeros_like(keys[: packed.common])
        for block in packed.blocks:
            q, both = _queries(block, query, keys.shape[2]), _keys(block, keys)
            d, total = _queries(block, slope, keys.shape[2], real=True), torch.zeros_like(both)
            asked = []
            for part in _parts(q):
                (k, v), (dk, dv) = both[:, :, : _seen(block, part)], total[:, :, : _seen(block, part)]
                mine, asking = d[:, :, part].flatten(1, 2), q[:, :, part].flatten(1, 2)
                weights = _weights(q[:, :, part], k, block, part)
                dv.baddbmm_(weights.mT, mine)
                moved = torch.ops.aten._softmax_backward_data(mine @ v.mT, weights, -1, weights.dtype)
                asked.append(torch.unflatten(moved @ k, 1, (q.shape[1], -1)))
                dk.baddbmm_(moved.mT, asking)
            to_query.append(_tokens(block, asked))
            wide = torch.unflatten(total, 1, (len(block.tokens), -1))
            to_keys.append(wide[:, :, :, block.context :].permute(1, 3, 0, 2, 4).flatten(0, 1))
            if block.context:
                common += wide[:, :, :, : block.context].sum(1).permute(2, 0, 1, 3)
        dq = torch.cat(to_query).index_select(0, packed.back) * ctx.scale
        dkv = torch.cat(to_keys).index_select(0, packed.back)
        dkv[: packed.common] += common
        slopes = (dq, *dkv.unbind(1))
        return (*(one.to(dtype) for one, dtype in zip(slopes, ctx.dtypes, strict=True)), None, None)


def _places(block: Block, x: torch.Tensor) -> torch.Tensor:
    return torch.unflatten(x.index_select(0, block.tokens.flatten()), 0, block.tokens.shape)


def _queries(block: Block, x: torch.Tensor, keys: int, *, real: bool = False) -> torch.Tensor:
    """`[tokens, heads, width]` as `[sequences * keys, heads a key, longest, width]`; zeros where no token is meant, if
    only `real` ones are wanted."""
    wide = _places(block, x)
    if real:
        wide = wide * block.real[:, :, None, None]
    return torch.unflatten(wide, 2, (keys, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _keys(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Keys and values `[tokens, 2, keys, width]` as `[2, sequences * keys, context + longest, width]`."""
    own = _places(block, x).permute(2, 0, 3, 1, 4)
    before = x[: block.context].permute(1, 2, 0, 3)[:, None].expand(-1, own.shape[1], -1, -1, -1)
    return torch.cat([before, own], 3).flatten(1, 2)


def _tokens(block: Block, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The places of a block, `[sequences * longest, heads, width]`, from what `_queries` gives, in parts."""
    whole = torch.cat(list(parts), 2) if len(parts) > 1 else parts[0]
    return torch.unflatten(whole, 0, (len(block.tokens), -1)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)


def _parts(q: torch.Tensor) -> Iterator[slice]:
    return (slice(first, min(first + QUERIES, q.shape[2])) for first in range(0, q.shape[2], QUERIES))


def _seen(block: Block, part: slice) -> int:
    """How many keys the last query of a part sees."""
    return block.context + int(part.stop)


def _weights(q: torch.Tensor, k: torch.Tensor, block: Block, part: slice) -> torch.Tensor:
    """The softmax of a part's scores `[sequences * keys, heads a key * queries, seen]`."""
    scores = q.flatten(1, 2) @ k[:, : _seen(block, part)].mT
    scores[..., block.context + int(part.start) :] += _later(*q.shape[1:3], q.dtype, q.device)
    return torch.softmax(scores, -1)


@lru_cache(maxsize=256)
def _later(heads: int, queries: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[heads * queries, queries]`, added to scores: a query sees no key that comes after its own."""
    return torch.full((queries, queries), -torch.inf, dtype=dtype, device=device).triu(1).repeat(heads, 1)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
