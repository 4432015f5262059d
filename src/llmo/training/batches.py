"""Training rows as token ids in flat arrays, and the order they are seen in: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.errors import DataError
from llmo.tasks.base import Encoding, Row, Task

BUCKET = 50  # batches that are sorted by length together: long enough to pad little, short enough to stay random
CHUNK = 1000  # texts tokenised between two reports
MULTIPLE = 8
BUSY = 8192  # tokens that keep a GPU busy with a small model
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """A split, tokenised: sequence `i` is `ids[starts[i]:starts[i + 1]]`, and each row is `group` of them in turn.

    `empty` rows hold nothing that could be learnt, and are left out.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    targets: list[NDArray[Any]]
    truncated: int
    max_length: int
    empty: int = 0
    group: int = 1

    def __len__(self) -> int:
        return len(self.targets) // self.group

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of each row's longest sequence, in tokens."""
        return np.asarray(np.diff(self.starts).reshape(-1, self.group).max(1))

    def per_epoch(self, batch_size: int) -> int:
        """How many batches an epoch has."""
        return -(-len(self) // batch_size)

    def order(self, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch, as the function `order` makes them."""
        return order(self.lengths, batch_size, seed, epoch)

    def sequence(self, i: int) -> NDArray[np.int32]:
        """The token ids of sequence `i`."""
        return self.ids[self.starts[i] : self.starts[i + 1]]

    def sequences(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the rows' sequences."""
        return (rows[:, None] * self.group + np.arange(self.group)).ravel()


def encode(task: Task, tokenizer: Tokenizer, rows: Sequence[Row], progress: Callable[[int], None]) -> Encoded:
    """Tokenise a split once; `progress` hears how many rows are done. Raises DataError when nothing can be learnt."""
    parts: list[Encoding] = []
    targets: list[NDArray[Any]] = []
    empty = 0
    for first in range(0, len(rows), CHUNK):
        chunk = list(rows[first : first + CHUNK])
        lessons = task.lessons(tokenizer, chunk)
        empty += len(chunk) - len({id(row) for row, _ in lessons})
        for row, encoding in lessons:
            target = task.target(row, encoding)
            if task.generates and not (target != IGNORED).any():
                empty += 1
                continue
            # Offsets and words are several times as large as the ids.
            own = [replace(part, offsets=[], word_ids=[]) for part in encoding.apart()]
            parts += own
            targets += [target] * len(own)
        progress(first + len(chunk))
    if empty and not parts and not task.generates:
        raise DataError(f"no training row can be learnt: all {empty} {task.unlearnt}", hint="set a larger max_length")
    return joined(parts, targets, task.max_length, empty, task.group)


def joined(
    parts: Sequence[Encoding], targets: list[NDArray[Any]], max_length: int, empty: int = 0, group: int = 1
) -> Encoded:
    """Sequences in flat arrays. Raises DataError when there is none."""
    if not parts:
        raise DataError(
            "no training row holds anything to learn: no conversation has an answer of the assistant",
            hint="look at a few rows: llmo data show NAME",
        )
    ids = np.concatenate([np.asarray(part.input_ids, np.int32) for part in parts])
    starts = np.concatenate([[0], np.cumsum([len(part.input_ids) for part in parts], dtype=np.int64)])
    return Encoded(ids, starts, targets, sum(p.truncated for p in parts), max_length, empty, group)


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


def width(longest: int, limit: int, rows: int | None = None) -> int:
    """The columns of a batch whose longest sequence has `longest` tokens; with its number of `rows`, one of `few`."""
    columns = -(-longest // MULTIPLE) * MULTIPLE if rows is None else few(longest, rows)
    return max(longest, min(columns, limit))


def few(count: int, rows: int = 1) -> int:
    """The next of few sizes from `count` up, of which there are `rows`: what is recorded for each size costs time once,
    filling up costs it in every step where a GPU is busy. Two sizes lie between a power of two and the next, or eight
    from BUSY tokens on."""
    octave = 1 << max(0, (count - 1).bit_length() - 1)
    step = max(MULTIPLE, octave // (2 if count * rows < BUSY else 8))
    return -(-count // step) * step


def parts(
    lengths: NDArray[np.int64], batch: NDArray[np.int64], count: int, tokens: int | None
) -> list[NDArray[np.int64]]:
    """A batch's rows in parts of like length that are computed one after another: `count` of them at least, and each of
    `tokens` tokens at most when padded (or of one row). Their gradients add up to those of the whole batch."""
    ordered = batch[np.argsort(-lengths[batch], kind="stable")]
    found = [part for part in np.array_split(ordered, count) if len(part)]
    if tokens is None:
        return found
    return [
        part[first : first + rows]
        for part in found
        for rows in [max(1, tokens // max(1, int(lengths[part[0]])))]
        for first in range(0, len(part), rows)
    ]


def padded(
    sequences: Sequence[Sequence[int] | NDArray[np.int32]], pad_id: int, limit: int, *, few_widths: bool = False
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[rows, longest]`, the longest rounded up as `width` does within `limit`."""
    columns = width(max(len(s) for s in sequences), limit, len(sequences) if few_widths else None)
    ids = np.full((len(sequences), columns), pad_id, np.int64)
    mask = np.zeros((len(sequences), columns), np.int64)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def collate(
    data: Encoded, batch: NDArray[np.int64], pad_id: int, *, few_widths: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The inputs and targets (padded with -100 where they are per token) of a batch of sequences."""
    inputs = padded([data.sequence(i) for i in batch], pad_id, data.max_length, few_widths=few_widths)
    return inputs, stacked([data.targets[i] for i in batch], inputs["input_ids"].shape[1])


def stacked(targets: Sequence[NDArray[Any]], width: int) -> torch.Tensor:
    """Targets as one tensor; those per token (a row of indices) are padded with -100 to `width`."""
    if targets[0].ndim == 0 or targets[0].dtype != np.int64:
        return torch.from_numpy(np.stack(targets))
    full = np.full((len(targets), width), IGNORED, np.int64)
    for i, target in enumerate(targets):
        full[i, : len(target)] = target
    return torch.from_numpy(full)
