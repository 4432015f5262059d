"""Runs the steps of an engine on a GPU: each is filled up to a number of rows for which it was recorded, and played.

A step of a small model is hundreds of kernels of a few microseconds, which no host hands out as fast as they run; a
recorded step (a CUDA graph) is handed out at once. Filling costs little: rows that nobody wants are not read out.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmo.engines.paged.adapters import Adapters
from llmo.engines.paged.blocks import BLOCK, SCRATCH
from llmo.engines.paged.gpu.decoder import TILE, Buffers, GpuDecoder, Rows, choose, tiles
from llmo.engines.paged.stream import Piece, Stream
from llmo.engines.sampling import LEAST_TEMPERATURE

_SETTINGS = 5  # of a row that `kernels.choose` reads
_FIELDS = 4  # for each row: its token, slot, position and adapter; and for each tile


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows that are read out: their logits, and the tokens that `kernels.choose` takes by the `settings`."""

    logits: Tensor
    tokens: Tensor
    host: Tensor
    settings: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """A step of so many rows as it lies in memory: `host` is copied to `there`, and the graph played."""

    rows: Rows
    host: Tensor
    there: Tensor
    graph: torch.cuda.CUDAGraph
    reading: Reading | None  # of a step of answers, which is part of the graph


class Runner:
    """`compute` runs pieces over the cache, `score` a sequence over a cache of its own. For one thread at a time."""

    def __init__(self, model: GpuDecoder, blocks: int, streams: int, chunk: int, context: int, guesses: int) -> None:
        config, device = model.config, model.device
        self._model = model
        self._device = device
        self._streams = streams
        self._shape = (config.layers, blocks, BLOCK, 2, config.kv_heads, config.head_dim)
        self._most = {True: _bucket(max(chunk, TILE)), False: _bucket(streams + guesses)}
        self._pool = torch.zeros(self._shape, dtype=model.dtype, device=device)
        self._buffers = {
            prompt: Buffers(config, model.dtype, device, most, prompt=prompt) for prompt, most in self._most.items()
        }
        most = self._most[False]
        self._reading = Reading(
            torch.empty(most, config.vocabulary, dtype=torch.float32, device=device),
            torch.empty(most, dtype=torch.int32, device=device),
            torch.zeros(most, _SETTINGS, dtype=torch.float64, pin_memory=True),
            torch.zeros(most, _SETTINGS, dtype=torch.float64, device=device),
        )
        width = -(-context // BLOCK)
        self._pinned = torch.zeros(streams, width, dtype=torch.int32, pin_memory=True)
        self._tables = torch.zeros(streams, width, dtype=torch.int32, device=device)
        self._owners: dict[Stream, tuple[int, int]] = {}  # the row of its table, and how many blocks stand there
        self._steps: dict[tuple[bool, int, bool], Step] = {}
        self._adapted = 0  # the adapters' version for which steps were recorded
        self._memory = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for prompt, most in self._most.items():
            size = TILE if prompt else 1
            while size <= most:
                self._step(prompt, size, None)
                size *= 2

    def compute(self, pieces: Sequence[Piece], adapters: Adapters) -> list[NDArray[np.float32] | int]:
        """For each piece that is `last`, in order: its token where its stream is `plain`, else the logits."""
        slots = adapters.slots(pieces)
        if slots is not None and adapters.version != self._adapted:
            self._steps = {key: step for key, step in self._steps.items() if not key[2]}
            self._adapted = adapters.version
        self._place(pieces)
        found: list[NDArray[np.float32] | int] = []
        for prompt in (True, False):
            own = [(piece, i) for i, piece in enumerate(pieces) if piece.of_prompt == prompt]
            for part in _parts(own, self._most[prompt]):
                found += self._play(prompt, part, slots, adapters)
        return found

    def score(self, ids: Sequence[int], chunk: int) -> NDArray[np.float32]:
        """Log-probabilities of `ids[1:]`."""
        count = -(-len(ids) // BLOCK)
        pool = torch.zeros((self._shape[0], count + 1, *self._shape[2:]), dtype=self._model.dtype, device=self._device)
        table = torch.arange(1, count + 1, dtype=torch.int32, device=self._device)[None]
        wanted = torch.tensor(ids[1:], device=self._device)
        found = []
        for start in range(0, len(ids) - 1, min(chunk, self._most[True])):
            part = ids[start : start + min(chunk, self._most[True])]
            positions = range(start, start + len(part))
            rows = Rows(
                count=len(part),
                prompt=True,
                ids=self._ints(part),
                slots=self._ints([BLOCK + position for position in positions]),
                positions=self._ints(positions),
                tiles=self._ints(np.array(tiles([(start, len(part), 0)], prompt=True)).T.copy()),
                tables=table,
            )
            self._model.layers(rows, self._buffers[True], pool)
            following = wanted[start : start + len(part)]
            for first in range(0, len(following), self._most[False]):
                targets = following[first : first + self._most[False]]
                logits = self._reading.logits[: len(targets)]
                self._model.logits(self._buffers[True].normed[first : first + len(targets)], logits)
                found.append(logits.log_softmax(1).gather(1, targets[:, None])[:, 0])
        scores: NDArray[np.float32] = torch.cat(found).cpu().numpy() if found else np.empty(0, np.float32)
        return scores

    def _play(
        self, prompt: bool, part: Sequence[tuple[Piece, int, int, int]], slots: Sequence[int] | None, adapters: Adapters
    ) -> list[NDArray[np.float32] | int]:
        """One step over parts of pieces: (piece, its number, first token of it, tokens)."""
        count = sum(taken for *_, taken in part)
        step = self._step(prompt, _bucket(max(count, TILE if prompt else 1)), adapters if slots is not None else None)
        buffers = self._buffers[prompt]
        self._fill(step, part, slots)
        step.there.copy_(step.host, non_blocking=True)
        wanted, end = [], 0
        for piece, _, first, taken in part:
            end += taken
            if piece.last and first + taken == piece.count:
                wanted.append((end - 1, piece))
        if step.reading is not None:
            _set(step.reading, wanted)
            step.graph.replay()
            return _read(step.reading, wanted)
        step.graph.replay()
        found: list[NDArray[np.float32] | int] = []
        for at in range(0, len(wanted), self._most[False]):
            few = wanted[at : at + self._most[False]]
            reading = self._part(len(few))
            self._model.logits(buffers.normed.index_select(0, self._ints([row for row, _ in few])), reading.logits)
            own = [(i, piece) for i, (_, piece) in enumerate(few)]
            _set(reading, own)
            choose(reading.logits, reading.settings, reading.tokens)
            found += _read(reading, own)
        if not wanted:  # what is read waits for the step; else nothing may be written while it is still fetched
            torch.cuda.current_stream().synchronize()
        return found

    def _fill(self, step: Step, part: Sequence[tuple[Piece, int, int, int]], slots: Sequence[int] | None) -> None:
        """Write what the step needs where the GPU fetches it. Rows of filling write to the scratch block."""
        rows, host = step.rows, step.host.numpy()
        by_row = host[: _FIELDS * rows.count].reshape(_FIELDS, rows.count)
        by_tile = host[_FIELDS * rows.count :].reshape(_FIELDS, -1)
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        pieces = []
        for piece, _, first, taken in part:
            start, blocks = piece.start + first, piece.stream.blocks
            ids += piece.tokens[first : first + taken]
            positions += range(start, start + taken)
            places += [blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(start, start + taken)]
            pieces.append((start, taken, self._owners[piece.stream][0]))
        count = len(ids)
        host[:] = SCRATCH * BLOCK
        by_row[:3, :count] = ids, places, positions
        if slots is not None:
            by_row[3, :count] = [slots[number] for _, number, _, taken in part for _ in range(taken)]
            by_row[3, count:] = self._streams  # the slot of no adapter
        found = tiles(pieces, rows.prompt)
        by_tile[:, : len(found)] = list(zip(*found, strict=True))

    def _place(self, pieces: Sequence[Piece]) -> None:
        """Write down the blocks of these streams, of which a stream that was there before has only gained some."""
        owners = self._owners
        here = {piece.stream: None for piece in pieces}
        self._owners = kept = {stream: owners[stream] for stream in here if stream in owners}
        free = iter(sorted(set(range(self._streams)) - {row for row, _ in kept.values()}))
        table, changed = self._pinned.numpy(), False
        for stream in here:
            row, known = kept[stream] if stream in kept else (next(free), 0)
            there = len(stream.blocks)
            if there > known:
                table[row, known:there] = stream.blocks[known:]
                changed = True
            kept[stream] = row, there
        if changed:
            self._tables.copy_(self._pinned, non_blocking=True)

    def _step(self, prompt: bool, count: int, adapters: Adapters | None) -> Step:
        key = (prompt, count, adapters is not None)
        if key not in self._steps:
            self._steps[key] = self._record(prompt, count, adapters)
        return self._steps[key]

    def _record(self, prompt: bool, count: int, adapters: Adapters | None) -> Step:
        """Run the step once, which compiles its kernels, and once for the record."""
        places = -(-count // TILE) + min(self._streams, count) if prompt else count
        size = _FIELDS * (count + places)
        host = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        there = torch.zeros(size, dtype=torch.int32, device=self._device)
        by_row = there[: _FIELDS * count].view(_FIELDS, count)
        if adapters is not None:
            by_row[3] = self._streams
        rows = Rows(
            count=count,
            prompt=prompt,
            ids=by_row[0],
            slots=by_row[1],
            positions=by_row[2],
            tiles=there[_FIELDS * count :].view(_FIELDS, places),
            tables=self._tables,
            adapters=None if adapters is None else by_row[3],
        )
        buffers, reading = self._buffers[prompt], None if prompt else self._part(count)

        def run() -> None:
            self._model.layers(rows, buffers, self._pool, adapters)
            if reading is not None:
                self._model.logits(buffers.normed[:count], reading.logits)
                choose(reading.logits, reading.settings, reading.tokens)

        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            run()
            gc.disable()  # what it frees on the GPU would break the record
            try:
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")  # others may load adapters
                try:
                    run()
                finally:
                    graph.capture_end()
            finally:
                if collecting:
                    gc.enable()
        torch.cuda.current_stream().wait_stream(self._aside)
        return Step(rows, host, there, graph, reading)

    def _part(self, count: int) -> Reading:
        whole = self._reading
        return Reading(whole.logits[:count], whole.tokens[:count], whole.host[:count], whole.settings[:count])

    def _ints(self, values: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


def _parts(pieces: Sequence[tuple[Piece, int]], most: int) -> Iterator[list[tuple[Piece, int, int, int]]]:
    """Numbered pieces, cut so that no part has more than `most` rows."""
    part: list[tuple[Piece, int, int, int]] = []
    left = most
    for piece, number in pieces:
        first = 0
        while first < piece.count:
            taken = min(left, piece.count - first)
            part.append((piece, number, first, taken))
            first, left = first + taken, left - taken
            if not left:
                yield part
                part, left = [], most
    if part:
        yield part


def _set(reading: Reading, wanted: Sequence[tuple[int, Piece]]) -> None:
    """Tell the GPU how the rows' streams want their tokens chosen; of a guess, the number is drawn ahead."""
    rows = []
    for _, piece in wanted:
        stream = piece.stream
        asked = stream.prompt.sampling
        if asked.temperature == 0 or not stream.plain:
            rows.append((0.0, 0.0, 1.0, 0.0, 0.0))
        else:
            ahead = piece.start + piece.count - len(stream.ids)
            warmth = max(asked.temperature, LEAST_TEMPERATURE)
            rows.append((warmth, asked.top_k, asked.top_p, asked.min_p, stream.sampler.uniform(ahead)))
    if rows:
        reading.host.numpy()[[row for row, _ in wanted]] = rows
        reading.settings.copy_(reading.host, non_blocking=True)


def _read(reading: Reading, wanted: Sequence[tuple[int, Piece]]) -> list[NDArray[np.float32] | int]:
    """Bring over what the rows' streams ask for: of most of them only one number."""
    tokens: list[int] = reading.tokens.tolist()
    full = [row for row, piece in wanted if not piece.stream.plain or tokens[row] < 0]
    rows: dict[int, NDArray[np.float32]] = {}
    if full:
        rows = dict(zip(full, reading.logits[full].cpu().numpy(), strict=True))
    return [rows[row] if row in rows else tokens[row] for row, _ in wanted]


def _bucket(count: int) -> int:
    return 1 << (count - 1).bit_length()
