"""Our own engine: continuous batching over a paged cache. On a CPU in plain torch, with which every other engine is
compared; on a GPU with kernels of its own (`gpu/`), which give every row the same bits in any company too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmo.engines.generation import GenerationOptions, Prompt, Sampling
from llmo.engines.paged.adapters import LEAST_ROWS, Adapters
from llmo.engines.paged.adapting import Adapting
from llmo.engines.paged.attention import Cache
from llmo.engines.paged.batching import pick_precision
from llmo.engines.paged.blocks import BLOCK, Blocks
from llmo.engines.paged.config import Config, load_config
from llmo.engines.paged.linear import DTYPES
from llmo.engines.paged.lookup import TOGETHER
from llmo.engines.paged.model import Decoder
from llmo.engines.paged.stream import Piece, Stream
from llmo.engines.place import torch_device
from llmo.engines.sampling import Sampler, log_softmax
from llmo.errors import EnvironmentProblem
from llmo.types import Device

if TYPE_CHECKING:
    from llmo.engines.paged.gpu.runner import Runner


class PagedEngine(Adapting):
    """Runs Llama, Mistral, Qwen 2 and Qwen 3 folders at fp32, bf16 or int8, on the CPU or one GPU."""

    name: ClassVar[str] = "torch"
    abilities: ClassVar[frozenset[str]] = frozenset({"generate", "score", "grammar", "adapters"})
    deterministic: ClassVar[bool] = True
    _model: Decoder
    _cache: Cache
    _gpu: Runner
    _adapters: Adapters

    def load(self, model: Path, device: Device, options: GenerationOptions) -> None:
        self.close()
        config = load_config(model)
        precision = pick_precision(model, options, DTYPES, "fp32")
        self._device = torch_device(device)
        torch.set_num_threads(device.cores)
        count = self._room(options, config.positions, Cache.block_bytes(config, DTYPES[precision]))
        self.vocabulary = config.vocabulary
        self._chunk = options.chunk
        on_cpu = self._device.type == "cpu"
        with self._there():
            if on_cpu:
                self._model = Decoder(model, config, precision, self._device, self.context)
                self._cache = Cache(config, count, DTYPES[precision], self._device)
            else:
                self._gpu = self._runner(model, config, precision, count, options)
            self._adapters = Adapters(config, options.streams, options.adapter_bytes, DTYPES[precision], self._device)
        self._start(model, options, Blocks(count), share_answers=on_cpu and precision != "int8")

    def close(self) -> None:
        if self._running:
            self._stop()
            del self._adapters
            if self._device.type == "cuda":
                del self._gpu
                torch.cuda.empty_cache()
            else:
                del self._model, self._cache

    def _runner(self, model: Path, config: Config, precision: str, blocks: int, options: GenerationOptions) -> Runner:
        """The model on the GPU, ready to run. Raises EnvironmentProblem for a GPU that cannot."""
        try:
            from llmo.engines.paged.gpu.decoder import GpuDecoder
            from llmo.engines.paged.gpu.runner import Runner
        except ImportError as error:
            raise EnvironmentProblem(
                f"the torch engine compiles its kernels for a GPU with Triton, and it is missing: {error}",
                hint="install the CUDA build of torch, which brings it along; or run on the CPU",
            ) from error
        if precision != "fp32" and torch.cuda.get_device_capability(self._device) < (8, 0):
            raise EnvironmentProblem(
                f"this GPU does not compute {DTYPES[precision]}".replace("torch.", ""),
                hint="deploy the model at fp32, or on a GPU of compute capability 8.0 or newer",
            )
        try:
            decoder = GpuDecoder(model, config, precision, self._device, self.context)
            guesses = TOGETHER if options.lookup else 0
            return Runner(decoder, blocks, options.streams, options.chunk, self.context, guesses)
        except torch.OutOfMemoryError as error:
            raise EnvironmentProblem(
                f"the GPU has no room for the model and a cache of {options.cache_bytes >> 20} MiB",
                hint="free some of its memory, or lower cache_mib",
            ) from error

    @contextmanager
    def _there(self) -> Iterator[None]:
        """Threads have a GPU each that is their current one: make it ours."""
        with torch.inference_mode():
            if self._device.type == "cpu":
                yield
            else:
                with torch.cuda.device(self._device):
                    yield

    def _compute(self, pieces: Sequence[Piece]) -> Iterable[NDArray[np.float32] | int]:
        """Run the step; only the rows that a token follows from are read out."""
        with self._there():
            return self._on_cpu(pieces) if self._device.type == "cpu" else self._gpu.compute(pieces, self._adapters)

    def _on_cpu(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        ids = [token for piece in pieces for token in piece.tokens]
        ends = np.cumsum([p.count for p in pieces]) - 1
        rows = [int(end) for end, piece in zip(ends, pieces, strict=True) if piece.last]
        hidden = self._hidden(ids, pieces, self._cache)
        if not rows:
            return np.empty((0, self.vocabulary), np.float32)
        return self._model.logits(hidden[self._tensor(rows)]).numpy()

    def _score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """By chunks, over a cache of its own."""
        with self._there():
            return self._score_on_cpu(ids) if self._device.type == "cpu" else self._gpu.score(ids, self._chunk)

    def _score_on_cpu(self, ids: Sequence[int]) -> NDArray[np.float32]:
        blocks = range(1, -(-len(ids) // BLOCK) + 1)
        cache = self._cache.like(len(blocks) + 1)
        stream = Stream(Prompt(0, ids), Sampler(Sampling(), ()), list(ids), len(ids), b"", blocks=list(blocks))
        found = [np.empty(0, np.float32)]
        for start in range(0, len(ids) - 1, self._chunk):
            piece = Piece(stream, start, min(self._chunk, len(ids) - start))
            hidden = self._hidden(ids[start : start + piece.count], [piece], cache)
            logits = self._model.logits(hidden, prompt=len(hidden)).numpy()
            following = ids[start + 1 : start + 1 + piece.count]
            found.append(log_softmax(logits)[range(len(following)), following])
        return np.concatenate(found)

    def _hidden(self, ids: Sequence[int], pieces: Sequence[Piece], cache: Cache) -> torch.Tensor:
        mixed = self._adapters.mix(pieces)
        pad = max(0, (self._model.least_rows if mixed is None else LEAST_ROWS) - len(ids))
        return self._model.hidden(self._tensor([*ids, *[0] * pad]), cache, cache.batch(pieces, pad), mixed)

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
