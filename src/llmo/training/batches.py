"""Training rows as token ids in flat arrays, and the order they are seen in: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.tasks.base import Row, Task

BUCKET = 50  # batches that are sorted by length together: long enough to pad little, short enough to stay random
CHUNK = 1000  # texts tokenised between two reports
MULTIPLE = 8
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """A split, tokenised: row `i` is `ids[starts[i]:starts[i + 1]]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    targets: list[NDArray[Any]]
    truncated: int
    max_length: int

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)


def encode(task: Task, tokenizer: Tokenizer, rows: Sequence[Row], progress: Callable[[int], None]) -> Encoded:
    """Tokenise a split once; `progress` hears how many rows are done."""
    parts: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    targets: list[NDArray[Any]] = []
    truncated = 0
    for first in range(0, len(rows), CHUNK):
        chunk = list(rows[first : first + CHUNK])
        for row, encoding in zip(chunk, task.encode(tokenizer, [r["text"] for r in chunk]), strict=True):
            parts.append(np.asarray(encoding.input_ids, np.int32))
            lengths.append(len(encoding.input_ids))
            targets.append(task.target(row, encoding))
            truncated += encoding.truncated
        progress(len(targets))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Encoded(np.concatenate(parts), starts, targets, truncated, task.max_length)


def order(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The batches of an epoch as arrays of row numbers: shuffled, then of like length within each bucket."""
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    batches = []
    for first in range(0, len(shuffled), BUCKET * batch_size):
        bucket = shuffled[first : first + BUCKET * batch_size]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def padded(sequences: Sequence[Sequence[int] | NDArray[np.int32]], pad_id: int, limit: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[rows, longest]`, the longest rounded up to a multiple of 8 within `limit`."""
    longest = max(len(s) for s in sequences)
    width = max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, limit))
    ids = np.full((len(sequences), width), pad_id, np.int64)
    mask = np.zeros((len(sequences), width), np.int64)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def collate(data: Encoded, batch: NDArray[np.int64], pad_id: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch's inputs and its targets (padded with -100 where they are per token)."""
    inputs = padded([data.ids[data.starts[i] : data.starts[i + 1]] for i in batch], pad_id, data.max_length)
    return inputs, stacked([data.targets[i] for i in batch], inputs["input_ids"].shape[1])


def stacked(targets: Sequence[NDArray[Any]], width: int) -> torch.Tensor:
    """Targets as one tensor; those per token (a row of indices) are padded with -100 to `width`."""
    if targets[0].ndim == 0 or targets[0].dtype != np.int64:
        return torch.from_numpy(np.stack(targets))
    full = np.full((len(targets), width), IGNORED, np.int64)
    for i, target in enumerate(targets):
        full[i, : len(target)] = target
    return torch.from_numpy(full)
