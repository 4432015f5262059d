"""One GGUF model in memory and its cache of keys and values: decode tokens of several streams, copy and drop streams.

Everything here is a thin skin over llama.cpp's calls; what to compute when is the engine's to decide.
"""

from __future__ import annotations

import ctypes as c
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmo.engines.llamacpp.library import (
    CONTEXT_DEFAULTS,
    MODEL_DEFAULTS,
    Batch,
    ContextParams,
    ModelParams,
    complaint,
    library,
)
from llmo.errors import EnvironmentProblem, ModelError

BATCH = 512  # tokens of one call: as many as llama.cpp computes at once
OFF, AUTOMATIC = 0, -1  # llama_flash_attn_type
F32, F16 = 0, 1  # ggml_type of keys and values
MOST_STREAMS = 256  # LLAMA_MAX_SEQ


class Weights:
    """The weights of a GGUF file, mapped or repacked by the library. `close` frees them, after every `Cache` of them.

    Raises ModelError with the library's own words for a file it cannot load or cannot generate with.
    """

    def __init__(self, path: Path) -> None:
        self._library = library()
        self.handle: int | None = self._library.llama_model_load_from_file(
            os.fsencode(path), ModelParams(**{**MODEL_DEFAULTS, "n_gpu_layers": 0})
        )
        if not self.handle:
            raise ModelError(
                f"llama.cpp cannot load this file: {complaint() or 'it does not say why'}",
                where=str(path),
                hint="write it again with `llmo compress`, or serve the model with the torch engine",
            )
        call = self._library
        decoder = call.llama_model_has_decoder(self.handle) and not call.llama_model_has_encoder(self.handle)
        state = call.llama_model_is_recurrent(self.handle) or call.llama_model_is_hybrid(self.handle)
        if not decoder or state or call.llama_model_is_diffusion(self.handle):
            self.close()
            raise ModelError(
                "this is not a decoder whose keys and values can be cut anywhere, so the llamacpp engine cannot run it",
                where=str(path),
                hint="serve it with the torch engine",
            )
        self._vocab = call.llama_model_get_vocab(self.handle)
        self.vocabulary: int = call.llama_vocab_n_tokens(self._vocab)
        self.context: int = call.llama_model_n_ctx_train(self.handle)

    def close(self) -> None:
        if self.handle:
            self._library.llama_model_free(self.handle)
            self.handle = None


class Cache:
    """Keys and values of up to `streams` streams, `cells` tokens together, and the buffers of one call.

    Raises EnvironmentProblem when the memory for it cannot be had.
    """

    def __init__(self, weights: Weights, *, cells: int, streams: int, outputs: int, threads: int, exact: bool) -> None:
        self._library = library()
        self._vocabulary = weights.vocabulary
        kind = F32 if exact else F16
        settings: dict[str, Any] = {
            **CONTEXT_DEFAULTS,
            "n_ctx": cells,
            "n_batch": BATCH,
            "n_ubatch": BATCH,
            "n_seq_max": streams,
            "n_outputs_max": outputs,
            "n_outputs_max_per_seq": outputs,
            "n_threads": threads,
            "n_threads_batch": threads,
            "type_k": kind,
            "type_v": kind,
            "kv_unified": True,  # streams share cells, so a common prefix is kept once
            "flash_attn_type": OFF if exact else AUTOMATIC,  # it adds up at fp16: 0.03 in a logit instead of 0.0001
        }
        self.handle: int | None = self._library.llama_init_from_model(weights.handle, ContextParams(**settings))
        if not self.handle:
            raise EnvironmentProblem(
                f"llama.cpp cannot set up a cache of {cells} tokens: {complaint() or 'it does not say why'}",
                hint="give it less memory for the cache, or a shorter context",
            )
        self.cells: int = self._library.llama_n_ctx(self.handle)
        self._memory = self._library.llama_get_memory(self.handle)
        self.tokens, self.positions, self.owners = (np.zeros(BATCH, np.int32) for _ in range(3))
        self.wanted = np.zeros(BATCH, np.int8)
        self._counts = np.ones(BATCH, np.int32)
        self._pointers = self.owners.ctypes.data + 4 * np.arange(BATCH, dtype=np.uintp)
        self._batch = Batch(
            token=_pointer(self.tokens, c.c_int32),
            pos=_pointer(self.positions, c.c_int32),
            n_seq_id=_pointer(self._counts, c.c_int32),
            seq_id=_pointer(self._pointers, c.POINTER(c.c_int32)),
            logits=_pointer(self.wanted, c.c_int8),
        )

    def decode(self, count: int) -> bool:
        """Compute the first `count` entries of `tokens`, `positions`, `owners` and `wanted`; False when it failed."""
        self._batch.n_tokens = count
        return bool(self._library.llama_decode(self.handle, self._batch) == 0)

    def logits(self, entry: int) -> NDArray[np.float32]:
        """`[vocabulary]` of an entry that was `wanted`: a view, good until the next `decode`."""
        found = self._library.llama_get_logits_ith(self.handle, entry)
        return np.ctypeslib.as_array(found, shape=(self._vocabulary,))

    def cut(self, stream: int, length: int = 0) -> None:
        """Forget what a stream holds from position `length` on."""
        self._library.llama_memory_seq_rm(self._memory, stream, length, -1)

    def share(self, source: int, target: int, length: int) -> None:
        """Give `target` the first `length` tokens of `source`; both then hold the same cells."""
        self._library.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def close(self) -> None:
        if self.handle:
            self._library.llama_free(self.handle)
            self.handle = None


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return c.cast(array.ctypes.data, c.POINTER(kind))
