"""Variants of an encoder with an answer layer, built and measured against the model in torch at fp32."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llmo import plugins
from llmo.compression.choice import Limits, Table
from llmo.compression.contest import CLIENTS, Measured, contest, speedup
from llmo.compression.probe import Candidate
from llmo.compression.variants import FP32_BITS, VARIANTS, WEIGHTS, Source
from llmo.context import Context, Stopped
from llmo.data.dataset import Dataset
from llmo.errors import LLMOError
from llmo.tasks.base import Encoding, Logits, Row, Task, gathered, sequences
from llmo.tasks.card import load_tokenizer
from llmo.tasks.metrics import sigmoid, softmax
from llmo.training.against import differences

REFERENCE = "torch-fp32"
MOST_ROWS = 1000  # of dev; more would take minutes on the reference
CALIBRATION_ROWS, CALIBRATION_SEED = 300, 17
LOWER_IS_BETTER = frozenset({"rmse", "mae"})  # of the figures a task has beside its metric


@dataclass(frozen=True, slots=True)
class Exam:
    """What every candidate is asked, and by what it is judged."""

    task: Task
    rows: Sequence[Row]
    encodings: Sequence[Encoding]
    metric: str

    def drop(self, reference: Sequence[Logits], other: Sequence[Logits]) -> dict[str, float]:
        """How much worse the other is, `{"value", "low", "high"}` with the 95% paired interval."""
        counts = [self.task.counted(logits, self.rows, self.encodings) for logits in (reference, other)]
        found = differences((self.task, counts[0]), (self.task, counts[1]))[self.metric]
        higher = self.task.higher_is_better if self.metric == self.task.metric else self.metric not in LOWER_IS_BETTER
        if higher:
            return found
        return {"value": -found["value"], "low": -found["high"], "high": -found["low"]}


def compete(
    model: Path,
    task: Task,
    data: Dataset,
    rows: Sequence[Row],
    variants: Sequence[str],
    limits: Limits,
    work: Path,
    ctx: Context,
) -> tuple[Table, dict[str, Any]]:
    """Build each variant as a folder `work/VARIANT` and measure it on `rows` of dev; those that are calibrated see
    texts of train.

    Returns one row a candidate, the reference first, with empty verdicts but for those that cannot run or were not
    begun; and by name its metrics with intervals.
    """
    tokenizer, metric = load_tokenizer(model), limits.metric
    encodings = task.encode_rows(tokenizer, rows)
    exam = Exam(task, rows, encodings, metric)
    problems: dict[str, str] = {}
    source = Source(model, work, lambda: _calibration(task, tokenizer, data))
    bits = _build(source, variants, problems, limits.ends, ctx)
    candidates = [Candidate(REFERENCE, "torch", model)]
    candidates += [Candidate(name, VARIANTS[name].engine, work / name) for name in bits]
    reference: list[Logits] = []
    drops: dict[str, dict[str, float]] = {}

    def worth(candidate: Candidate, logits: Sequence[Logits]) -> str | None:
        answers = gathered(logits, encodings)
        if not reference:
            reference.extend(answers)
        drop = drops[candidate.name] = exam.drop(reference, answers)
        return "drops too much" if drop["value"] > limits.max_drop + 1e-9 else None

    measured = contest(candidates, sequences(encodings), work, ctx, worth=worth, problems=problems)
    table: Table = []
    metrics: dict[str, Any] = {}
    for candidate in candidates:
        found = measured.get(candidate.name)
        if found is None:
            continue
        found.logits = gathered(found.logits, encodings)
        metrics[candidate.name] = task.intervals(task.tally(found.logits, rows, encodings))
        value = metrics[candidate.name][metric]["value"]
        table.append(
            _row(candidate, found, measured[REFERENCE], bits.get(candidate.name, FP32_BITS))
            | {"metric": metric, "value": value}
            | {"drop" if key == "value" else f"drop_{key}": x for key, x in drops[candidate.name].items()}
            | _changes(exam, reference, found.logits)
        )
    table += [{"name": name, "verdict": why} for name, why in problems.items()]
    return table, metrics


def settle(model: Path, work: Path, chosen: str, ctx: Context) -> dict[str, Any]:
    """Nothing: an encoder's batches follow from the texts."""
    return {}


def files(model: Path, work: Path, chosen: str) -> list[Path]:
    """What the chosen variant brings into the model folder beside what serves any engine."""
    return [work / chosen / name for name in VARIANTS[chosen].files]


def _build(
    source: Source, variants: Sequence[str], problems: dict[str, str], ends: float, ctx: Context
) -> dict[str, float]:
    """Make a folder `work/VARIANT` for each; returns the bits of a weight. Why others cannot be had goes to
    `problems`."""
    bits: dict[str, float] = {}
    for number, name in enumerate(variants):
        if ctx.should_stop():
            raise Stopped
        if time.monotonic() > ends:
            problems[name] = "not tried: the time was up"
            continue
        ctx.report(number, len(variants), stage=f"build {name}")
        folder = source.work / name
        folder.mkdir()
        shutil.copy(source.model / "config.json", folder)
        shutil.copy(source.model / "llmo.json", folder)
        try:
            plugins.load("llmo.engines", VARIANTS[name].engine)
            bits[name] = VARIANTS[name].build(source, folder)
        except LLMOError as error:
            problems[name] = f"cannot run: {error.what}"
            ctx.note(f"{name} cannot be built: {error.what}")
    if source.attention:
        ctx.note(f"exported to ONNX with {source.attention} attention")
    return bits


def _calibration(task: Task, tokenizer: Tokenizer, data: Dataset) -> list[list[int]]:
    rows = data.split("train")
    some = np.random.default_rng(CALIBRATION_SEED).permutation(len(rows))[:CALIBRATION_ROWS]
    return sequences(task.encode_rows(tokenizer, [rows[int(number)] for number in some]))


def _row(candidate: Candidate, found: Measured, reference: Measured, bits: float) -> dict[str, Any]:
    """What a candidate is and how fast; speeds are there where they were taken."""
    variant = VARIANTS.get(candidate.name)
    names = (WEIGHTS,) if variant is None else variant.files
    row: dict[str, Any] = {
        "name": candidate.name,
        "engine": candidate.engine,
        "precision": "fp32" if variant is None else variant.precision,
        "bits": round(bits, 2),
        "size_bytes": sum((candidate.folder / name).stat().st_size for name in names),
        "ready_seconds": round(found.ready_seconds, 2),
        "rss_bytes": found.rss_bytes,
        "verdict": "",
    }
    if not found.levels:
        return row
    one, most = CLIENTS[0], CLIENTS[-1]
    return row | {
        "texts_per_second": round(found.levels[most].texts_per_second, 1),
        "latency_ms": round(found.levels[one].median_ms, 2),
        "speedup": round(speedup(reference, found, most), 3),
        "speedup_alone": round(speedup(reference, found, one), 3),
        "clients": {
            str(clients): {
                "texts_per_second": round(level.texts_per_second, 1),
                "median_ms": round(level.median_ms, 2),
                "p99_ms": round(level.p99_ms, 2),
                "speedup": round(speedup(reference, found, clients), 3),
            }
            for clients, level in found.levels.items()
        },
    }


def _changes(exam: Exam, reference: Sequence[Logits], other: Sequence[Logits]) -> dict[str, Any]:
    """The share of texts that are answered alike, and by how much a probability changed at most, if there are any."""
    pairs = list(zip(reference, other, exam.encodings, strict=True))
    agreed = sum(exam.task.agree(a, b, encoding) for a, b, encoding in pairs)
    found: dict[str, Any] = {"agreement": agreed / len(pairs)}
    if exam.task.has_classes:
        several = exam.task.problem_type == "multi_label_classification"
        said = sigmoid if several else softmax
        found["probability_change"] = round(max(float(np.abs(said(a) - said(b)).max()) for a, b, _ in pairs), 4)
    return found
