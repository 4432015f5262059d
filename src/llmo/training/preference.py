"""Preferences: pairs of answers as tokens, what the model at the start thinks of them, and the figures of pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from llmo.context import Context, Stopped
from llmo.errors import DataError
from llmo.files import digest_of_value
from llmo.tasks.base import Row
from llmo.tasks.generation import MOST_EXPONENT, Generation, Passage
from llmo.tasks.metrics import MICRO, Floats, Tally, Totals, ratio, with_intervals
from llmo.training import batches, scoring
from llmo.training.batches import IGNORED, Encoded
from llmo.training.causal import Speaker
from llmo.training.failures import disk_errors
from llmo.training.figures import Measured, Metrics
from llmo.training.model import Built
from llmo.training.objectives import likelihoods
from llmo.training.precision import Precision

REFERENCE = "reference.safetensors"
PAIR = 2
Sums = NDArray[np.float64]


def encode(
    task: Generation, tokenizer: Tokenizer, rows: Sequence[Row], progress: Callable[[int], None] | None = None
) -> Encoded:
    """Each row as two sequences, chosen and rejected. Pairs of which one holds no answer, or that became equal by
    truncation, are left out and counted. Raises DataError when none is left."""
    parts: list[Passage] = []
    targets: list[NDArray[np.int64]] = []
    empty = 0
    for number, row in enumerate(rows):
        pair = [task.passage(tokenizer, row, answer) for answer in ("chosen", "rejected")]
        wanted = [task.target(row, passage) for passage in pair]
        if pair[0].input_ids == pair[1].input_ids or any((w == IGNORED).all() for w in wanted):
            empty += 1
            continue
        parts += pair
        targets += wanted
        if progress is not None and number % 100 == 99:
            progress(number + 1)
    if not parts:
        raise DataError(
            "no pair holds two different answers",
            hint="check `chosen` and `rejected` in a few rows, and task.max_length",
        )
    return batches.joined(parts, targets, task.max_length, empty, PAIR)


def log_likelihoods(built: Built, speaker: Speaker, data: Encoded, how: Precision, ctx: Context, phase: str) -> Sums:
    """The summed log-probability of the learnt tokens of every sequence. Raises Stopped when asked to stop."""
    found = np.zeros(len(data.targets), np.float64)
    sizes = np.diff(data.starts)
    done = 0
    for batch in scoring.of_like_length(sizes):
        if ctx.should_stop():
            raise Stopped
        inputs, targets = batches.collate(data, np.array(batch), built.pad_id)
        with scoring.measuring(built.model, how):
            there = {k: v.to(how.device) for k, v in inputs.items()}
            wanted = targets.to(how.device)
            found[batch] = likelihoods(speaker.judge(there, wanted)[:, 0].contiguous(), wanted).double().cpu().numpy()
        done += len(batch)
        ctx.report(done, len(found), phase=phase)
    return found


def references(
    built: Built, speaker: Speaker, splits: Mapping[str, Encoded], how: Precision, ctx: Context
) -> dict[str, Sums]:
    """What the model that training starts from (with LoRA: the base, as a new adapter changes nothing) says of every
    split; taken once, and kept beside the checkpoints so that a resumed run has the same numbers."""
    path = ctx.checkpoint() / REFERENCE
    key = digest_of_value({name: digest_of_value(data.ids.tolist()) for name, data in splits.items()})
    kept = _kept(path, key)
    if kept is None:
        kept = {
            name: log_likelihoods(built, speaker, data, how, ctx, f"{name}: what the start prefers")
            for name, data in splits.items()
        }
        aside = path.with_suffix(".tmp")
        with disk_errors(path):
            save_file(kept, aside, {"key": key})
            aside.replace(path)
    return kept


def _kept(path: Path, key: str) -> dict[str, Sums] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as opened:
            if (opened.metadata() or {}).get("key") != key:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError:
        return None


class PairFigures:
    """How often the chosen answer is likelier, and how far training moved the two apart."""

    def __init__(
        self,
        built: Built,
        speaker: Speaker,
        splits: Mapping[str, Encoded],
        start: Mapping[str, Sums],
        beta: float,
        ctx: Context,
    ) -> None:
        self._built, self._speaker, self._splits, self._start = built, speaker, splits, start
        self._beta, self._ctx = beta, ctx

    def full(self, split: str, phase: str, how: Precision) -> Metrics:
        return with_intervals(self._tally(split, phase, how), scores, 0) if split in self._splits else {}

    def measured(self, split: str, phase: str, how: Precision) -> Measured:
        found = self.full(split, phase, how)
        return Measured(found, len(self._splits[split]) if found else 0)

    def plain(self, split: str, phase: str, how: Precision) -> dict[str, float]:
        return {name: float(value) for name, value in scores(self._tally(split, phase, how).totals()).items()}

    def _tally(self, split: str, phase: str, how: Precision) -> Tally:
        data = self._splits[split]
        now = log_likelihoods(self._built, self._speaker, data, how, self._ctx, phase)
        return tally(data, now, self._start[split], self._beta)


def tally(data: Encoded, now: Sums, start: Sums, beta: float) -> Tally:
    """Of each pair, in halves or millionths: is the chosen answer likelier, did it gain more, by what margin, the
    loss, and the chosen answer's log-probability and tokens."""
    chosen, rejected = now.reshape(-1, PAIR).T
    gained = (now - start).reshape(-1, PAIR)
    margin = beta * (gained[:, 0] - gained[:, 1])
    tokens = np.array([int((target != IGNORED).sum()) for target in data.targets[::PAIR]])
    real = np.stack([margin, np.logaddexp(0.0, -margin), -chosen], 1)
    columns = [
        1 + np.sign(chosen - rejected),
        1 + np.sign(margin),
        *np.round(real * MICRO).T,
        tokens,
    ]
    return Tally.of_sums(np.stack(columns, 1).astype(np.int64))


def scores(totals: Totals) -> dict[str, Floats]:
    """`preference_accuracy`: the share of pairs whose chosen answer the model itself thinks likelier;
    `reward_accuracy` and `reward_margin`: against the start, as DPO counts; a tie is half. `perplexity` is the chosen
    answers'."""
    preferred, gained, margin, loss, lost, tokens = np.moveaxis(totals.sums, -1, 0)
    each = np.maximum(totals.rows, 1.0)
    per_token = ratio(lost / MICRO, tokens)
    return {
        "preference_accuracy": preferred / 2 / each,
        "reward_accuracy": gained / 2 / each,
        "reward_margin": margin / MICRO / each,
        "loss": loss / MICRO / each,
        "perplexity": np.exp(np.minimum(per_token, MOST_EXPONENT)),
    }
