"""Runs a model over a split and counts what it got right, in chunks, so that a split of any size fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import nn

from llmo.context import Context, Stopped
from llmo.tasks.base import Encoding, Logits, Row, Task
from llmo.tasks.metrics import Tally
from llmo.training.batches import padded
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


def score(task: Task, tokenizer: Tokenizer, rows: Sequence[Row], predict: Predict, ctx: Context, phase: str) -> Scored:
    """`predict` is given batches of texts of like length. Raises Stopped when the job is asked to stop."""
    tallies: list[Tally] = []
    truncated = done = 0
    for first in range(0, len(rows), CHUNK):
        chunk = list(rows[first : first + CHUNK])
        encodings = task.encode(tokenizer, [row["text"] for row in chunk])
        logits: dict[int, Logits] = {}
        for batch in by_length(encodings):
            if ctx.should_stop():
                raise Stopped
            logits.update(zip(batch, predict([encodings[i] for i in batch]), strict=True))
            ctx.report(done + len(logits), len(rows), phase=phase)
        tallies.append(task.tally([logits[i] for i in range(len(chunk))], chunk, encodings))
        truncated += sum(e.truncated for e in encodings)
        done += len(chunk)
    return Scored(Tally.merged(tallies), len(rows), truncated)


def by_length(encodings: Sequence[Encoding], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Numbers of encodings in batches of like length, each of about `tokens` tokens when padded."""
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(encodings)), key=lambda i: -len(encodings[i].input_ids)):
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = len(encodings[i].input_ids)
        batches[-1].append(i)
    return batches


def model_predictor(model: nn.Module, task: Task, pad_id: int, precision: Precision) -> Predict:
    """The model that is being trained, in eval mode and the given precision; its mode is put back after each batch."""

    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        inputs = padded([e.input_ids for e in encodings], pad_id, task.max_length)
        with torch.inference_mode(), precision.autocast():
            logits = model(**{k: v.to(precision.device) for k, v in inputs.items()}).logits
        for module, mode in modes:
            module.training = mode
        found = logits.float().cpu().numpy()
        return [found[i] if found.ndim == 2 else found[i, : len(e.input_ids)] for i, e in enumerate(encodings)]

    return predict
