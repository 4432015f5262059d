"""The OpenVINO engine: prompts and answers of many streams over one compiled graph, the same alone and in any batch.

OpenVINO has two kernels for attention: one for pieces of a prompt, one for single tokens. Which of them a token meets
must follow from its place in the stream alone, or the last bits of an answer would depend on how its prompt was cut
or what ran beside it. So a piece of a prompt is never one token long, and tokens of an answer are always single.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from llmo.engines.base import require_cpu
from llmo.engines.folder import card_precision, read_config
from llmo.engines.generation import GenerationOptions
from llmo.engines.openvino.runner import BLOCK, Cache, Graph, Row
from llmo.engines.paged.batching import Batching
from llmo.engines.paged.blocks import Blocks
from llmo.engines.paged.stream import Piece
from llmo.engines.sampling import log_softmax
from llmo.types import Device


class OpenVinoEngine(Batching):
    """Runs folders with a graph that `llmo compress` wrote, at its precision; fp32 graphs at bf16 too."""

    name: ClassVar[str] = "openvino"
    abilities: ClassVar[frozenset[str]] = frozenset({"generate", "score", "grammar"})
    deterministic: ClassVar[bool] = True
    _graph: Graph
    _cache: Cache

    def load(self, model: Path, device: Device, options: GenerationOptions) -> None:
        self.close()
        require_cpu(self.name, device)
        positions = int(read_config(model).get("max_position_embeddings", 2048))
        graph = Graph(model, options.precision or card_precision(model), device.cores)
        count = self._room(options, positions, graph.block_bytes, BLOCK)
        self.vocabulary = graph.vocabulary
        self._chunk = max(2, options.chunk)
        self._graph, self._cache = graph, graph.cache(count)
        self._start(model, options, Blocks(count, BLOCK), share_answers=False)

    def close(self) -> None:
        if self._running:
            self._stop()
            del self._graph, self._cache

    def _compute(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        return self._cache.forward([row for piece in pieces for row in _rows(piece)])

    def _score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        blocks = range(-(-len(ids) // BLOCK))
        cache = self._graph.cache(len(blocks))
        edges = [*range(0, len(ids) - 1, self._chunk), len(ids) - 1]
        found = [np.empty(0, np.float32)]
        for start, end in pairwise(edges):
            logits = cache.forward([_prompt_row(ids, start, end, blocks, wanted=end - start)])
            found.append(log_softmax(logits)[range(end - start), ids[start + 1 : end + 1]])
        return np.concatenate(found)


def _rows(piece: Piece) -> list[Row]:
    """A piece of a prompt as one row, tokens of an answer as a row each: all write before any of them reads."""
    stream, end = piece.stream, piece.start + piece.count
    if piece.of_prompt:
        return [_prompt_row(stream.ids, piece.start, end, stream.blocks, wanted=int(piece.last))]
    return [
        Row((token,), at, stream.blocks[: at // BLOCK + 1], wanted=int(piece.last and at + 1 == end))
        for at, token in enumerate(piece.tokens, piece.start)
    ]


def _prompt_row(ids: Sequence[int], start: int, end: int, blocks: Sequence[int], wanted: int) -> Row:
    """A single token takes the one before it along, which writes what is in the cache already."""
    start = max(0, min(start, end - 2))
    return Row(ids[start:end], start, blocks[: -(-end // BLOCK)], wanted)
