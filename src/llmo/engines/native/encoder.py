"""The native engine of encoders: kernels of our own for the CPU at int8, over texts of any lengths without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llmo import __version__
from llmo.engines.base import Chunk, Facts, Request, closed, require_cpu
from llmo.engines.batch import at_length_one, lengths_of
from llmo.engines.cpu import instructions
from llmo.engines.folder import read_config, require
from llmo.engines.native.encoder_model import FILE, Encoder
from llmo.errors import ModelError
from llmo.types import Device


class NativeEncoderEngine:
    """Runs what `compression.native` made of models of the BERT family. Needs no torch, so replicas start fast."""

    name: ClassVar[str] = "native"
    abilities: ClassVar[frozenset[str]] = frozenset({"classify", "embed"})
    pads: ClassVar[bool] = False

    def __init__(self) -> None:
        self._model: Encoder | None = None

    def load(self, model: Path, device: Device) -> None:
        self.close()
        require_cpu(self.name, device)
        read_config(model)
        self._model = Encoder(require(model, FILE), device.cores)

    def run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        if not requests:
            return
        model = self._opened()
        if not model.labels:
            yield from self.embed(requests)
            return
        logits, begin = self._encode(model, requests)
        for i, request in enumerate(requests):
            own = logits[i] if model.first else logits[begin[i] : begin[i + 1]]
            yield Chunk(request.id, own.copy())

    def embed(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        if not requests:
            return
        means, _ = self._encode(self._opened(), requests, means=True)
        for request, mean in zip(requests, means, strict=True):
            yield Chunk(request.id, at_length_one(mean))

    def facts(self) -> Facts:
        model = self._opened()
        found = instructions("int8")
        kernel = found if found == "avx512_vnni" else "lanes"
        return Facts("int8", "fp32", {kernel: model.products}, found, model.threads, model.threads, __version__)

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None

    def _opened(self) -> Encoder:
        if self._model is None:
            raise closed()
        return self._model

    @staticmethod
    def _encode(
        model: Encoder, requests: Sequence[Request], **how: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        longest = max(lengths_of(requests))
        try:
            return model.encode([request.input_ids for request in requests], **how)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"the model cannot run this batch of {len(requests)} x {longest} tokens: {error}",
                hint="the tokenizer may not belong to this model, or the text is longer than its positions",
            ) from error
