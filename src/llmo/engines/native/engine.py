"""The native engine: the same scheduler, cache and sampling as the others, over kernels of our own for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmo.engines.base import require_cpu
from llmo.engines.generation import GenerationOptions
from llmo.engines.native.adapters import Adapters
from llmo.engines.native.model import PRECISIONS, Cache, Decoder, Rows
from llmo.engines.paged.adapting import Adapting
from llmo.engines.paged.batching import pick_precision
from llmo.engines.paged.blocks import BLOCK, Blocks
from llmo.engines.paged.config import load_config
from llmo.engines.paged.stream import Piece
from llmo.engines.sampling import log_softmax
from llmo.types import Device


class NativeEngine(Adapting):
    """Runs Llama, Mistral, Qwen 2 and Qwen 3 folders at int8 or fp32 on a CPU."""

    name: ClassVar[str] = "native"
    abilities: ClassVar[frozenset[str]] = frozenset({"generate", "score", "grammar", "adapters"})
    deterministic: ClassVar[bool] = True
    _model: Decoder
    _cache: Cache
    _adapters: Adapters

    def load(self, model: Path, device: Device, options: GenerationOptions) -> None:
        self.close()
        require_cpu(self.name, device)
        config = load_config(model)
        precision = pick_precision(model, options, PRECISIONS, "int8")
        count = self._room(options, config.positions, Cache.block_bytes(config, precision))
        torch.set_num_threads(device.cores)
        self.vocabulary = config.vocabulary
        self._config, self._precision, self._chunk = config, precision, options.chunk
        self._model = Decoder(model, config, precision, device.cores, self.context)
        self._cache = Cache(config, count, precision)
        torch.set_num_threads(1)  # from now on it only reads adapters, beside threads that leave no core free
        self._adapters = Adapters(config, precision, options.adapter_bytes)
        self._start(model, options, Blocks(count), share_answers=precision == "fp32")

    def close(self) -> None:
        if self._running:
            self._stop()
            self._model.close()
            del self._model, self._cache, self._adapters

    def _compute(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        ids: list[int] = []
        positions: list[int] = []
        table: list[int] = []
        tables: list[int] = []
        wanted: list[int] = []
        begins: dict[int, int] = {}
        for piece in pieces:
            stream = piece.stream
            if stream.prompt.id not in begins:
                begins[stream.prompt.id] = len(tables)
                tables += stream.blocks
            ids += piece.tokens
            positions += range(piece.start, piece.start + piece.count)
            table += [begins[stream.prompt.id]] * piece.count
            if piece.last:
                wanted.append(len(ids) - 1)
        prompt = sum(piece.count for piece in pieces if piece.of_prompt)
        rows = Rows(ids, positions, table, tables, wanted, prompt, self._adapters.addresses(pieces))
        return self._model.step(rows, self._cache)

    def _score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """By chunks, over a cache of its own."""
        blocks = range(-(-len(ids) // BLOCK))
        cache = Cache(self._config, len(blocks), self._precision)
        found = [np.empty(0, np.float32)]
        for start in range(0, len(ids) - 1, self._chunk):
            end = min(start + self._chunk, len(ids) - 1)
            count = range(end - start)
            rows = Rows(ids[start:end], range(start, end), [0] * len(count), blocks, count, len(count))
            found.append(log_softmax(self._model.step(rows, cache))[count, ids[start + 1 : end + 1]])
        return np.concatenate(found)
