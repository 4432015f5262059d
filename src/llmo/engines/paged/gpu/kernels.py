"""The GPU's arithmetic in Triton. No row of a kernel sees another, and what it adds up in which order depends on sizes
of the model alone: that makes an answer the same alone and in a batch, which no product of cuBLAS promises.

Rows are contiguous. Counts of rows are never specialised for, so a kernel is compiled once a model.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)  # tokens a block of the cache
LONGEST = tl.constexpr(256)  # features of a tile


@triton.jit
def normalise(x, parts, norm, out, apart, eps, K: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr) -> None:
    """Add PARTS of fp32 rows, each `apart` from the one before, to `x` `[rows, K]`; give their root-mean-square norm in
    the type of `out`. A program a row."""
    row = tl.program_id(0).to(tl.int64) * K
    at = tl.arange(0, WIDE)
    a = tl.load(x + row + at, mask=at < K, other=0.0)
    for part in tl.static_range(PARTS):
        a += tl.load(parts + part * apart + row + at, mask=at < K, other=0.0)
    if PARTS > 0:
        tl.store(x + row + at, a, mask=at < K)
    factor = tl.rsqrt(tl.sum(a * a, 0) / K + eps)
    weight = tl.load(norm + at, mask=at < K, other=0.0)
    tl.store(out + row + at, (a * factor * weight).to(out.dtype.element_ty), mask=at < K)


@triton.jit(do_not_specialize=["rows"])
def product(
    x, w, scale, bias, out, rows, apart,
    N: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """`x @ w.T` for `x` `[rows, K]` and `w` `[N, K]`, both in DTYPE, summed up at fp32.

    PARTS: the features are cut into so many, whose sums stand `apart`. GATED: `w` is `[2 * N, K]`, and silu of the
    first half times the second is given. SCALED: int8 has a scale for each output.
    """
    tiles = tl.cdiv(rows, BM)
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    c = tl.program_id(0) // tiles * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    within = c % N  # outputs past the end are computed and not stored
    own = w + within[:, None].to(tl.int64) * K
    features = x + m[:, None].to(tl.int64) * K
    inner = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    above = tl.zeros((BM, BN), tl.float32)
    each: tl.constexpr = (K + PARTS * LONGEST - 1) // (PARTS * LONGEST) * (LONGEST // BK)  # the same for any BK
    for step in range(each):
        at = (part * each + step) * BK + inner
        a = tl.load(features + at[None, :], mask=(m[:, None] < rows) & (at[None, :] < K), other=0.0)
        b = tl.load(own + at[None, :], mask=at[None, :] < K, other=0).to(DTYPE)
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
        if GATED:
            b = tl.load(own + N * K + at[None, :], mask=at[None, :] < K, other=0).to(DTYPE)
            above = tl.dot(a, tl.trans(b), above, input_precision="ieee")
    if SCALED:
        sums *= tl.load(scale + within)[None, :].to(tl.float32)
        if GATED:
            above *= tl.load(scale + N + within)[None, :].to(tl.float32)
    if BIASED:
        first = (part == 0).to(tl.float32)  # to one part only
        sums += tl.load(bias + within)[None, :] * first
        if GATED:
            above += tl.load(bias + N + within)[None, :] * first
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * above
    place = out + part * apart + m[:, None].to(tl.int64) * N + c[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (c[None, :] < N))


@triton.jit(do_not_specialize=["rows"])
def gate(both, out, rows, N: tl.constexpr, BN: tl.constexpr) -> None:
    """silu of the first half of fp32 rows `[rows, 2 * N]` times the second, as `product` does it when GATED."""
    row = tl.program_id(0)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.load(both + row * 2 * N + c, mask=c < N, other=0.0)
    above = tl.load(both + row * 2 * N + N + c, mask=c < N, other=0.0)
    sums = sums / (1.0 + tl.exp(-sums)) * above
    tl.store(out + row * N + c, sums.to(out.dtype.element_ty), mask=c < N)


@triton.jit(do_not_specialize=["eps"])
def rotate(
    qkv, turns, weights, positions, slots, queries, pool, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
) -> None:  # fmt: skip
    """Turn queries and keys of fp32 `qkv` by their positions; queries go to `queries`, keys and values to their slot
    of the cache. A program a row and head; a head's features are complex numbers, real and imaginary part in turns."""
    row, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, HALF)
    there = i < DIM // 2
    base = qkv + row * (HEADS + 2 * KV) * DIM + head * DIM + 2 * i
    a = tl.load(base, mask=there, other=0.0)
    b = tl.load(base + 1, mask=there, other=0.0)
    if head < HEADS + KV:
        if NORM:
            factor = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / DIM + eps)
            own = weights + head * DIM + 2 * i
            a = a * factor * tl.load(own, mask=there, other=0.0)
            b = b * factor * tl.load(own + 1, mask=there, other=0.0)
        turn = turns + tl.load(positions + row) * DIM + 2 * i
        cos = tl.load(turn, mask=there, other=0.0)
        sin = tl.load(turn + 1, mask=there, other=0.0)
        a, b = a * cos - b * sin, a * sin + b * cos
    if head < HEADS:
        place = queries + (row * HEADS + head).to(tl.int64) * DIM
    else:
        place = pool + tl.load(slots + row).to(tl.int64) * (2 * KV * DIM) + (head - HEADS) * DIM
    tl.store(place + 2 * i, a.to(queries.dtype.element_ty), mask=there)
    tl.store(place + 2 * i + 1, b.to(queries.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["width"])
def attend(
    queries, pool, tables, tiles, out, peaks, totals, count, width, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of neighbouring rows of one stream looks at the stream's tokens up to each row's own.

    `tiles` is `[4, count]`: first row, rows, position of the first, row of `tables` (`[streams, width]` blocks). With
    SPLITS the tokens are looked at in that many parts, which `combine` puts together: `out` is
    `[rows, HEADS, SPLITS, DIM]` then. `scale` is that of scores, times log2(e).
    """
    tile, kv, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.load(tiles + count + tile)
    if rows == 0:
        return
    first = tl.load(tiles + tile)
    start = tl.load(tiles + 2 * count + tile)
    table = tables + tl.load(tiles + 3 * count + tile) * width
    group: tl.constexpr = HEADS // KV
    m = tl.arange(0, BM)
    row, head = m // group, kv * group + m % group
    d = tl.arange(0, WIDE)
    own = (row < rows)[:, None] & (d < DIM)[None, :]
    place = (first + row).to(tl.int64) * HEADS + head
    q = tl.load(queries + place[:, None] * DIM + d[None, :], mask=own, other=0.0)
    end = start + rows
    each = tl.cdiv(tl.cdiv(end, SPLITS), BN) * BN
    begin = part * each
    stop = tl.minimum(begin + each, end)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, WIDE), tl.float32)
    for n in range(begin, stop, BN):
        at = n + tl.arange(0, BN)
        block = tl.load(table + at // BLOCK, mask=at < stop, other=0)
        slot = (block * BLOCK + at % BLOCK).to(tl.int64) * (2 * KV * DIM) + kv * DIM
        seen = (at < stop)[:, None] & (d < DIM)[None, :]
        k = tl.load(pool + slot[:, None] + d[None, :], mask=seen, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where((at[None, :] <= (start + row)[:, None]) & (at < stop)[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        shrink = tl.exp2(peak - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(pool + slot[:, None] + KV * DIM + d[None, :], mask=seen, other=0.0)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        peak = higher
    if SPLITS == 1:
        done = sums / total[:, None]
        tl.store(out + place[:, None] * DIM + d[None, :], done.to(out.dtype.element_ty), mask=own)
    else:
        place = place * SPLITS + part
        tl.store(out + place[:, None] * DIM + d[None, :], sums, mask=own)
        tl.store(peaks + place, peak, mask=row < rows)
        tl.store(totals + place, total, mask=row < rows)


@triton.jit
def combine(parts, peaks, totals, out, DIM: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr) -> None:
    """One head of one row from what `attend` found in SPLITS parts of its tokens; a program each."""
    at = tl.program_id(0).to(tl.int64) * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, WIDE)
    peak = tl.load(peaks + at)
    weight = tl.exp2(peak - tl.max(peak, 0))
    found = tl.load(parts + at[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    total = tl.sum(weight * tl.load(totals + at), 0)
    done = tl.sum(found * weight[:, None], 0) / total
    tl.store(out + tl.program_id(0).to(tl.int64) * DIM + d, done.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=["ranks", "empty"])
def shrink(x, below, adapters, out, ranks, empty, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr) -> None:
    """Rows times their own adapter's `below` (`[adapters, ranks, K]`), to fp32 `[rows, ranks]`. Rows of the adapter
    `empty` are left out."""
    row = tl.program_id(0)
    adapter = tl.load(adapters + row)
    if adapter == empty:
        return
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    sums = tl.zeros((BR,), tl.float32)
    for start in range(0, K, BK):
        at = start + tl.arange(0, BK)
        a = tl.load(x + row * K + at, mask=at < K, other=0.0).to(tl.float32)
        place = (adapter.to(tl.int64) * ranks + r)[:, None] * K + at[None, :]
        b = tl.load(below + place, mask=(r < ranks)[:, None] & (at < K)[None, :], other=0.0)
        sums += tl.sum(a[None, :] * b.to(tl.float32), 1)
    tl.store(out + row * ranks + r, sums, mask=r < ranks)


@triton.jit(do_not_specialize=["rank", "empty"])
def expand(inner, above, adapters, out, rank, empty, PARTS: tl.constexpr, N: tl.constexpr, BN: tl.constexpr) -> None:
    """Add what `shrink` gave, times the adapter's `above` (`[adapters, PARTS, rank, N]`), to fp32 rows of PARTS * N."""
    row = tl.program_id(0)
    adapter = tl.load(adapters + row)
    if adapter == empty:
        return
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    there = c < PARTS * N
    part = c // N
    own = (adapter.to(tl.int64) * PARTS + part) * rank
    sums = tl.zeros((BN,), tl.float32)
    for r in range(rank):
        a = tl.load(inner + (row * PARTS + part) * rank + r, mask=there, other=0.0)
        sums += a * tl.load(above + (own + r) * N + c % N, mask=there, other=0.0).to(tl.float32)
    place = out + row * (PARTS * N) + c
    tl.store(place, tl.load(place, mask=there, other=0.0) + sums, mask=there)


@triton.jit
def choose(logits, settings, tokens, V: tl.constexpr, BN: tl.constexpr) -> None:
    """A token for each fp32 row of logits `[rows, V]`, as `Sampler.choose` draws it; a program a row.

    `settings` are fp64 `[rows, 5]`: temperature (0: the likeliest), top_k, top_p, min_p, and the number drawn. A row
    whose logits are not finite gives -1. Bounds of weights are found by halving the range of their bits.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    n = tl.arange(0, BN)
    high = tl.full((BN,), float("-inf"), tl.float32)
    where = tl.zeros((BN,), tl.int32)
    wrong = tl.zeros((BN,), tl.int32)
    for start in range(0, V, BN):
        a = tl.load(logits + start + n, mask=start + n < V, other=float("-inf"))
        wrong += (a != a).to(tl.int32)
        where = tl.where(a > high, start + n, where)
        high = tl.maximum(high, a)
    best = tl.max(high, 0)
    token = tl.min(tl.where(high == best, where, V), 0)
    if (tl.sum(wrong, 0) > 0) | (best == float("inf")) | (best == float("-inf")):
        tl.store(tokens + row, -1)
        return
    warmth = tl.load(settings + row * 5).to(tl.float32)
    if warmth > 0:
        top_k = tl.load(settings + row * 5 + 1)
        top_p = tl.load(settings + row * 5 + 2)
        least = tl.load(settings + row * 5 + 3).to(tl.float32)
        if top_k > 0:
            least = _bound(logits, best, warmth, least, top_k, True, n, V, BN)
        if top_p < 1:
            whole = _mass(logits, best, warmth, least, False, n, V, BN)
            least = _bound(logits, best, warmth, least, top_p * whole, False, n, V, BN)
        point = tl.load(settings + row * 5 + 4) * _mass(logits, best, warmth, least, False, n, V, BN)
        passed = tl.zeros((), tl.float64)
        found = tl.full((), -1, tl.int32)
        start = tl.zeros((), tl.int32)
        while (found < 0) & (start < V):
            weights = _weights(logits, best, warmth, least, start, n, V).to(tl.float64)
            more = tl.sum(weights, 0)
            if passed + more > point:
                found = start + tl.sum((passed + tl.cumsum(weights, 0) <= point).to(tl.int32), 0)
            passed += more
            start += BN
        token = tl.where((found >= 0) & (found < V), found, token)  # the sum may round to less than the point
    tl.store(tokens + row, token)


@triton.jit
def _weights(logits, best, warmth, least, start, n, V: tl.constexpr) -> tl.tensor:
    """Those of a stretch of a row, of which the likeliest has 1; 0 for what weighs less than `least`."""
    a = tl.load(logits + start + n, mask=start + n < V, other=float("-inf"))
    weights = tl.exp((a - best) / warmth)
    return tl.where(weights >= least, weights, 0.0)


@triton.jit
def _mass(logits, best, warmth, least, COUNTED: tl.constexpr, n, V: tl.constexpr, BN: tl.constexpr) -> tl.tensor:
    """The sum of a row's weights of at least `least`, or how many they are."""
    sums = tl.zeros((BN,), tl.float64)
    for start in range(0, V, BN):
        weights = _weights(logits, best, warmth, least, start, n, V)
        sums += ((weights > 0) if COUNTED else weights).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def _bound(
    logits, best, warmth, least, enough, COUNTED: tl.constexpr, n, V: tl.constexpr, BN: tl.constexpr
) -> tl.tensor:
    """The largest bound, but no smaller than `least`, at which the weights are `enough`."""
    low = least.to(tl.int32, bitcast=True)
    high = tl.full((), 0x3F800001, tl.int32)  # the bits of 1, and one more
    while high - low > 1:
        middle = (low + high) // 2
        mass = _mass(logits, best, warmth, middle.to(tl.float32, bitcast=True), COUNTED, n, V, BN)
        low = tl.where(mass >= enough, middle, low)
        high = tl.where(mass >= enough, high, middle)
    return low.to(tl.float32, bitcast=True)
