"""Runs a model over a split and counts what it got right, in chunks, so that a split of any size fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn

from llmo.context import Context, Stopped
from llmo.engines.heads import logits_of
from llmo.tasks.base import Encoding, Logits, Row, Task, gathered, kept, sequences
from llmo.tasks.metrics import Tally
from llmo.training.batches import IGNORED, padded, stacked
from llmo.training.causal import Speaker
from llmo.training.findings import Findings
from llmo.training.precision import Precision

CHUNK = 2048  # rows encoded, sorted by length and measured at once
BATCH_TOKENS = 4096  # padded tokens run at once

Predict = Callable[[Sequence[Encoding]], list[Logits]]


@dataclass(frozen=True, slots=True)
class Scored:
    """The counts of a split, and how many of its texts were cut."""

    tally: Tally
    rows: int
    truncated: int


class Tokens:
    """The rows of a split with their tokens, which are kept where all are one chunk: dev is measured many times."""

    def __init__(self, task: Task, tokenizer: Tokenizer, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._task, self._tokenizer = task, tokenizer
        self._kept: list[Encoding] | None = None

    def chunk(self, first: int, size: int) -> tuple[list[Row], list[Encoding]]:
        """So many rows from `first` on."""
        found = list(self.rows[first : first + size])
        if self._kept is not None:
            return found, self._kept
        encodings = self._task.encode_rows(self._tokenizer, found)
        if len(found) == len(self.rows) <= CHUNK:
            self._kept = encodings
        return found, encodings


def score(
    task: Task,
    tokens: Tokens,
    predict: Predict,
    ctx: Context,
    phase: str,
    findings: Findings | None = None,
) -> Scored:
    """`predict` is given batches of texts of like length; `findings` hears of every row. Raises Stopped when the job is
    asked to stop."""
    rows = tokens.rows
    tallies: list[Tally] = []
    truncated = done = 0
    size = len(rows) if task.whole else CHUNK
    for first in range(0, len(rows), size):
        chunk, encodings = tokens.chunk(first, size)
        logits: dict[int, Logits] = {}
        for batch in by_length(encodings):
            if ctx.should_stop():
                raise Stopped
            logits.update(zip(batch, predict([encodings[i] for i in batch]), strict=True))
            ctx.report(done + len(logits), len(rows), phase=phase)
        said = [logits[i] for i in range(len(chunk))]
        tallies.append(task.tally(said, chunk, encodings))
        if findings is not None:
            findings.add(task, said, chunk, encodings)
        truncated += sum(e.truncated for e in encodings)
        done += len(chunk)
    return Scored(Tally.merged(tallies), len(rows), truncated)


def by_length(encodings: Sequence[Encoding], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Numbers of encodings in batches of like length, each of about `tokens` tokens when padded."""
    return of_like_length([len(encoding.input_ids) for encoding in encodings], tokens)


def of_like_length(lengths: Sequence[int] | NDArray[np.int64], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """As `by_length`, of lengths alone."""
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = int(lengths[i])
        batches[-1].append(i)
    return batches


def model_predictor(model: nn.Module, task: Task, pad_id: int, precision: Precision) -> Predict:
    """The model that is being trained, in eval mode and the given precision; its mode is put back after each batch."""

    def run(texts: Sequence[Sequence[int]]) -> list[Logits]:
        inputs = padded(texts, pad_id, task.max_length)
        with measuring(model, precision):
            there = {k: v.to(precision.device) for k, v in inputs.items()}
            logits = logits_of(model(**there), there["attention_mask"])
        found = logits.float().cpu().numpy()
        return [found[i] if found.ndim == 2 else found[i, : len(ids)] for i, ids in enumerate(texts)]

    return by_sequence(task, run)


def by_sequence(task: Task, run: Callable[[Sequence[Sequence[int]]], list[Logits]]) -> Predict:
    """What predicts encodings, from what runs a batch of sequences; those of several become batches of their own."""

    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        texts = sequences(encodings)
        if len(texts) == len(encodings):
            return kept(task, run(texts), encodings)
        found: dict[int, Logits] = {}
        for batch in of_like_length([len(ids) for ids in texts]):
            found.update(zip(batch, run([texts[i] for i in batch]), strict=True))
        return kept(task, gathered([found[i] for i in range(len(texts))], encodings), encodings)

    return predict


def speaker_predictor(model: nn.Module, speaker: Speaker, task: Task, pad_id: int, precision: Precision) -> Predict:
    """As `model_predictor`, for a causal model: per learnt token its log-probability and whether it is likeliest."""

    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        inputs = padded([e.input_ids for e in encodings], pad_id, task.max_length)
        wanted = [task.target({}, e) for e in encodings]
        targets = stacked(wanted, inputs["input_ids"].shape[1])
        with measuring(model, precision):
            on_device = {k: v.to(precision.device) for k, v in inputs.items()}
            found = speaker.judge(on_device, targets.to(precision.device)).cpu().numpy()
        counts = np.cumsum([int((t[1:] != IGNORED).sum()) for t in wanted])
        return np.split(found, counts[:-1])

    return predict


@contextmanager
def measuring(model: nn.Module, precision: Precision) -> Iterator[None]:
    """The model in eval mode and the given precision; every module's mode is put back. Not torch's inference
    mode: layers that are put together within it could not learn afterwards (`sharded`)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad(), precision.autocast():
        yield
    for module, mode in modes:
        module.training = mode
