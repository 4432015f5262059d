"""Requests of one batch as padded arrays, and padded logits or hidden states as one chunk a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llmo.engines.base import Chunk, Request
from llmo.errors import InputError

Ids = NDArray[np.int64]
_TINY = 1e-12  # keeps the length of an all-zero mean above zero


def pad(requests: Sequence[Request], pad_id: int) -> tuple[Ids, Ids]:
    """`input_ids` and `attention_mask`, both `[requests, longest]`, padded on the right.

    Raises InputError for a request without tokens.
    """
    lengths = lengths_of(requests)
    ids = np.full((len(requests), max(lengths)), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        ids[row, :length] = request.input_ids
        mask[row, :length] = 1
    return ids, mask


def lengths_of(requests: Sequence[Request]) -> list[int]:
    """Tokens of each. Raises InputError for a request without any."""
    lengths = [len(request.input_ids) for request in requests]
    if min(lengths) == 0:
        empty = requests[lengths.index(0)]
        raise InputError(f"request {empty.id} holds no token", hint="encode the text with its special tokens")
    return lengths


def chunks(requests: Sequence[Request], logits: NDArray[np.float32]) -> Iterator[Chunk]:
    """One chunk a request from `[requests, labels]` or `[requests, longest, labels]`, without the padding.

    Each holds its own copy, so that keeping one answer does not keep the batch.
    """
    for row, request in enumerate(requests):
        own = logits[row] if logits.ndim == 2 else logits[row, : len(request.input_ids)]
        yield Chunk(request.id, np.array(own, dtype=np.float32))


def means(requests: Sequence[Request], hidden: NDArray[np.float32]) -> Iterator[Chunk]:
    """One chunk a request from hidden states `[requests, longest, width]`: their mean over the request's own tokens,
    at length 1."""
    for row, request in enumerate(requests):
        yield Chunk(request.id, at_length_one(hidden[row, : len(request.input_ids)].mean(axis=0, dtype=np.float32)))


def at_length_one(mean: NDArray[np.float32]) -> NDArray[np.float32]:
    return mean / np.float32(max(float(np.linalg.norm(mean)), _TINY))
