"""An encoder's int8 weights as the kernels read them, and the crew of threads that computes batches with them."""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from llmo.engines.native import encoder_library as library
from llmo.errors import EnvironmentProblem, ModelError

FILE = "native.safetensors"
FORMAT = 1
LANES, FULL = 16, 64  # of kernels.h; what the inputs of a product are filled up to

Array = NDArray[Any]


class Encoder:
    """Load from a file; `encode` runs texts through all layers.

    The file holds int8 matrices `NAME` of `[outputs, inputs]` with `NAME.scale` and `NAME.bias` of `[outputs]`: `qkv`,
    `out`, `up`, `down` of each layer and perhaps `head.dense`; the tables `words` and `places`, int8 with a scale a
    row; norms and the last layer of the head at fp32. Its metadata says the sizes.
    """

    def __init__(self, path: Path, threads: int) -> None:
        """Raises ModelError for a file that is not what `compression.native` writes, EnvironmentProblem where the
        kernels cannot be compiled or started."""
        self._kernels = library.kernels()
        self.threads = threads
        self._kept: list[Array] = []
        try:
            with safe_open(path, "numpy") as file:
                sizes = json.loads((file.metadata() or {}).get("llmo", "{}"))
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if sizes.get("format") != FORMAT:
                raise ModelError("the file is of another version", hint="compress the model again", where=str(path))
            self._model = self._load(sizes)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ModelError(
                f"the native engine cannot read the weights: {error}", hint="compress the model again", where=str(path)
            ) from error
        del self._tensors
        self._crew = self._kernels.llmo_encoder_open(ctypes.byref(self._model), threads)
        if not self._crew:
            raise EnvironmentProblem(
                f"the native engine cannot start {threads} threads with their memory",
                hint="give the replica fewer cores (deploy.cores), or raise the limit on threads (see `ulimit -u`)",
            )
        self.close = weakref.finalize(self, self._kernels.llmo_encoder_close, self._crew)

    def encode(
        self, texts: Sequence[Sequence[int]], *, means: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Logits, `[texts, labels]` or where each token is answered `[tokens, labels]` of all texts one after another;
        with `means` the mean of the last hidden states, `[texts, hidden]`. And where each text begins, `[texts + 1]`.

        Every text has a token at least. Raises RuntimeError where memory does not suffice, ValueError for ids that the
        vocabulary lacks and for texts longer than the model's positions.
        """
        lengths = np.fromiter(map(len, texts), np.int32, len(texts))
        begin = np.zeros(len(texts) + 1, np.int32)
        np.cumsum(lengths, out=begin[1:])
        ids = np.fromiter((i for text in texts for i in text), np.int32, int(begin[-1]))
        self._check(lengths, ids)
        head = self._model.head
        rows = len(texts) if means or head.first else len(ids)
        found = np.empty((rows, self._model.hidden if means else head.labels), np.float32)
        to = [None, found.ctypes.data] if means else [found.ctypes.data, None]
        batch = library.Batch(len(texts), ids.ctypes.data, begin.ctypes.data, *to)
        if self._kernels.llmo_encode(self._crew, ctypes.byref(batch)):
            raise RuntimeError("not enough memory for the batch")
        return found, begin

    @property
    def products(self) -> int:
        """How many of its layers' products have int8 weights."""
        return 4 * int(self._model.layers)

    @property
    def labels(self) -> int:
        """How many logits an answer has; 0 where there is no head."""
        return int(self._model.head.labels)

    @property
    def first(self) -> bool:
        """Whether a text has one answer, and not one a token."""
        return bool(self._model.head.first)

    def _check(self, lengths: NDArray[np.int32], ids: NDArray[np.int32]) -> None:
        if lengths.max() > self._positions:
            raise ValueError(f"a text of {lengths.max()} tokens is longer than the model's {self._positions} positions")
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise ValueError(f"an id is outside the vocabulary of {self._vocabulary}: the tokeniser is another model's")

    def _load(self, sizes: Mapping[str, Any]) -> library.Model:
        words, places = self._tensors["words"], self._tensors["places"]
        self._vocabulary, self._positions = len(words), len(places)
        hidden, head = sizes["hidden"], sizes["head"]
        for name in ("hidden", "dim"):
            if sizes[name] % LANES:
                raise ValueError(f"{name} is {sizes[name]}, which is no multiple of {LANES}")
        layers = (library.Layer * sizes["layers"])(*(self._layer(f"layer.{i}.", sizes) for i in range(sizes["layers"])))
        labels = len(self._tensors["head.weight"]) if head else 0
        return library.Model(
            sizes["layers"], hidden, sizes["dim"], library.ACTIVATIONS.index(sizes["activation"]), sizes["eps"],
            self._keep(words), self._keep(self._tensors["words.scale"]),
            self._keep(places * self._tensors["places.scale"][:, None]), self._norm("embedded"), layers,
            library.Head(
                self._matrix("head.dense") if "head.dense" in self._tensors else library.Matrix(),
                self._keep(self._tensors["head.weight"]) if head else None,
                self._keep(self._tensors["head.bias"]) if head else None,
                labels,
                library.ACTIVATIONS.index(head["activation"]) if head else 0,
                bool(head and head["first"]),
            ),
        )  # fmt: skip

    def _layer(self, name: str, sizes: Mapping[str, Any]) -> library.Layer:
        matrices = [self._matrix(name + part) for part in ("qkv", "out", "up", "down")]
        heads = len(self._tensors[name + "qkv"]) // 3 // sizes["dim"]
        return library.Layer(*matrices, self._norm(name + "attended"), self._norm(name + "fed"), heads)

    def _matrix(self, name: str) -> library.Matrix:
        """Sixteen outputs side by side; see encoder.cpp."""
        weight = self._tensors[name]
        rows, columns = -len(weight) % LANES, -weight.shape[1] % FULL
        if rows or columns:
            weight = np.pad(weight, ((0, rows), (0, columns)))
        n, k = weight.shape
        packed = weight.reshape(n // LANES, LANES, k // 4, 4).transpose(0, 2, 1, 3)
        start = -128 * weight.sum(axis=1, dtype=np.int32)
        scale, bias = (np.pad(self._tensors[f"{name}.{part}"], (0, rows)) for part in ("scale", "bias"))
        return library.Matrix(self._keep(packed), self._keep(scale), self._keep(start), self._keep(bias), n, k)

    def _norm(self, name: str) -> library.Norm:
        return library.Norm(*(self._keep(self._tensors[f"{name}.{part}"]) for part in ("weight", "bias")))

    def _keep(self, array: Array) -> int:
        """The address of its numbers, which stay as long as the encoder; floats at 32 bits."""
        kept = np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else array.dtype)
        self._kept.append(kept)
        return kept.ctypes.data
