"""Our own engine: continuous batching over a paged cache, in plain torch; every other engine is compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmo.engines.folder import card_precision
from llmo.engines.generation import GenerationOptions, Prompt, Sampling
from llmo.engines.paged.adapters import LEAST_ROWS, Adapters
from llmo.engines.paged.attention import Cache
from llmo.engines.paged.batching import Batching, check_options
from llmo.engines.paged.blocks import BLOCK, Blocks
from llmo.engines.paged.config import load_config
from llmo.engines.paged.linear import DTYPES
from llmo.engines.paged.model import Decoder
from llmo.engines.paged.stream import Piece, Stream
from llmo.engines.place import torch_device
from llmo.engines.sampling import Sampler, log_softmax
from llmo.errors import InputError
from llmo.types import Device


class PagedEngine(Batching):
    """Runs Llama, Mistral, Qwen 2 and Qwen 3 folders at fp32, bf16 or int8, on the CPU or one GPU."""

    name: ClassVar[str] = "torch"
    abilities: ClassVar[frozenset[str]] = frozenset({"generate", "score", "grammar", "adapters"})
    deterministic: ClassVar[bool] = True
    _model: Decoder
    _cache: Cache
    _adapters: Adapters

    def load(self, model: Path, device: Device, options: GenerationOptions) -> None:
        self.close()
        config = load_config(model)
        precision = options.precision or card_precision(model) or "fp32"
        if precision not in DTYPES:
            raise InputError(f"unknown precision '{precision}'", hint=f"known: {', '.join(DTYPES)}")
        check_options(options)
        self._device = torch_device(device)
        torch.set_num_threads(device.cores)
        count = options.cache_bytes // Cache.block_bytes(config, DTYPES[precision])
        if count < 2:
            raise InputError(
                f"the cache of {options.cache_bytes} bytes holds no {2 * BLOCK} tokens",
                hint="raise cache_bytes",
                where="cache_bytes",
            )
        self.context = min(config.positions, options.context or config.positions, (count - 1) * BLOCK)
        self.vocabulary = config.vocabulary
        self._chunk = options.chunk
        self._model = Decoder(model, config, precision, self._device, self.context)
        self._cache = Cache(config, count, self._model.dtype, self._device)
        self._adapters = Adapters(config, options.streams, options.adapter_bytes, self._model.dtype, self._device)
        self._start(model, options, Blocks(count), share_answers=precision != "int8")

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA as peft saves it; prompts may name it from now on. Raises ConflictError for a name in use and
        ModelError for an adapter that does not fit this base or changes nothing."""
        self._check_open()
        self._adapters.add(name, folder)

    def remove_adapter(self, name: str) -> None:
        """Take no more prompts for it; streams that run with it end as they would have. Raises NotFoundError."""
        self._check_open()
        self._adapters.remove(name)

    def close(self) -> None:
        if self._running:
            self._stop()
            del self._model, self._cache, self._adapters
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _compute(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        """Run the step; only the rows that a token follows from are read out."""
        model = self._model
        ids = [token for piece in pieces for token in piece.tokens]
        ends = np.cumsum([p.count for p in pieces]) - 1
        rows = [int(end) for end, piece in zip(ends, pieces, strict=True) if piece.last]
        with torch.inference_mode():
            hidden = self._hidden(ids, pieces, self._cache)
            if not rows:
                return np.empty((0, self.vocabulary), np.float32)
            return model.logits(hidden[self._tensor(rows)]).cpu().numpy()

    def _score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """By chunks, over a cache of its own."""
        blocks = range(1, -(-len(ids) // BLOCK) + 1)
        cache = self._cache.like(len(blocks) + 1)
        stream = Stream(Prompt(0, ids), Sampler(Sampling(), ()), list(ids), len(ids), b"", blocks=list(blocks))
        found = [np.empty(0, np.float32)]
        for start in range(0, len(ids) - 1, self._chunk):
            piece = Piece(stream, start, min(self._chunk, len(ids) - start))
            with torch.inference_mode():
                hidden = self._hidden(ids[start : start + piece.count], [piece], cache)
                logits = self._model.logits(hidden, prompt=len(hidden)).cpu().numpy()
            following = ids[start + 1 : start + 1 + piece.count]
            found.append(log_softmax(logits)[range(len(following)), following])
        return np.concatenate(found)

    def _hidden(self, ids: Sequence[int], pieces: Sequence[Piece], cache: Cache) -> torch.Tensor:
        self._adapters.drop(stream.adapter for stream in self._streams.values())
        mixed = self._adapters.mix(pieces)
        pad = max(0, (self._model.least_rows if mixed is None else LEAST_ROWS) - len(ids))
        return self._model.hidden(self._tensor([*ids, *[0] * pad]), cache, cache.batch(pieces, pad), mixed)

    def _adapter(self, name: str | None) -> str | None:
        key = None if name is None else self._adapters.key(name)
        if name is not None and key is None:
            loaded = ", ".join(self._adapters.names()) or "none"
            raise InputError(f"unknown adapter '{name}'", hint=f"loaded: {loaded}", where="adapter")
        return key

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
