"""Variants of an encoder with an answer layer, built and measured against the model in torch at fp32."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llmo import plugins
from llmo.compression.choice import ROUNDING, Limits, Table, choose, loss
from llmo.compression.contest import CLIENTS, Measured, contest, speedup
from llmo.compression.graphs import calibration
from llmo.compression.outcome import Made, Order, Outcome
from llmo.compression.probe import Candidate
from llmo.compression.recipes import VOCABULARY, Maker, Recipe, recipes
from llmo.compression.variants import FP32_BITS, VARIANTS, WEIGHTS, Source
from llmo.context import Context, Stopped
from llmo.data.dataset import Dataset
from llmo.errors import LLMOError
from llmo.tasks.base import Encoding, Logits, Row, Task, gathered, sequences
from llmo.tasks.card import CARD, load_task, load_tokenizer
from llmo.tasks.metrics import sigmoid, softmax
from llmo.training.against import differences

REFERENCE = "torch-fp32"
LATE = "not tried: the time was up"
MOST_ROWS = 1000  # of dev; more would take minutes on the reference
CALIBRATION_ROWS, CALIBRATION_TEXTS, CALIBRATION_SEED = 2000, 64, 17
LOWER_IS_BETTER = frozenset({"rmse", "mae"})  # of the figures a task has beside its metric


@dataclass(frozen=True, slots=True)
class Exam:
    """What every candidate is asked, and by what it is judged."""

    task: Task
    rows: Sequence[Row]
    encodings: Sequence[Encoding]
    metric: str

    def drop(
        self, reference: Sequence[Logits], other: Sequence[Logits], encodings: Sequence[Encoding]
    ) -> dict[str, float]:
        """How much worse the other is, which read the rows as `encodings`: `{"value", "low", "high"}` with the 95%
        paired interval."""
        ours = self.task.counted(reference, self.rows, self.encodings)
        theirs = self.task.counted(other, self.rows, encodings)
        found = differences((self.task, ours), (self.task, theirs))[self.metric]
        higher = self.task.higher_is_better if self.metric == self.task.metric else self.metric not in LOWER_IS_BETTER
        if higher:
            return found
        return {"value": -found["value"], "low": -found["high"], "high": -found["low"]}

    def changes(
        self, reference: Sequence[Logits], other: Sequence[Logits], encodings: Sequence[Encoding]
    ) -> dict[str, Any]:
        """The share of texts that are answered alike, and by how much a probability changed at most, if there are any.
        Of texts that both read in the same number of pieces."""
        alike = [
            (a, b, encoding)
            for a, b, encoding in zip(reference, other, encodings, strict=True)
            if np.shape(a) == np.shape(b)
        ]
        if not alike:
            return {"agreement": 0.0}
        found: dict[str, Any] = {"agreement": sum(self.task.agree(a, b, e) for a, b, e in alike) / len(alike)}
        if self.task.has_classes:
            said = sigmoid if self.task.problem_type == "multi_label_classification" else softmax
            found["probability_change"] = round(max(float(np.abs(said(a) - said(b)).max()) for a, b, _ in alike), 4)
        return found


@dataclass(frozen=True, slots=True)
class Entry:
    """What can be measured: a variant of a shape, in a folder of its own. `shape` is the model folder it was made from,
    and `encodings` are the exam's rows as that one's tokeniser reads them."""

    name: str
    engine: str
    precision: str
    folder: Path
    files: tuple[str, ...]
    bits: float
    shape: Path
    encodings: Sequence[Encoding]

    @property
    def size(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)


def compete(order: Order, ctx: Context) -> Outcome:
    """Build each variant as a folder of its own and measure it on the rows of dev, and then the best of them of smaller
    shapes where that is asked for or needed. Those that are calibrated or trained see texts of train."""
    search = _Search(order, ctx)
    search.try_variants()
    if wants_shapes(search.table, order.limits):
        search.try_shapes()
    return Outcome(search.table, search.metrics, search.made)


def wants_shapes(table: Table, limits: Limits) -> bool:
    """Whether smaller shapes are to be tried: always or never, or where the smallest is sought, or nothing that keeps
    the quality is small enough."""
    if limits.shapes != "auto":
        return limits.shapes == "all"
    return limits.target == "size" or (limits.max_bytes is not None and choose(deepcopy(table), limits) is None)


class _Search:
    """One use: the table grows as candidates are built and measured."""

    def __init__(self, order: Order, ctx: Context) -> None:
        self._order, self._limits, self._ctx = order, order.limits, ctx
        model, task = order.model, order.task
        encodings = task.encode_rows(load_tokenizer(model), order.rows)
        self._exam = Exam(task, order.rows, encodings, order.limits.metric)
        self._shapes = order.work / "shapes"
        self._maker = Maker(model, order.data, self._shapes, ctx)
        self._reference = Entry(REFERENCE, "torch", "fp32", model, (WEIGHTS,), FP32_BITS, model, encodings)
        self._answers: list[Logits] = []  # of the reference
        self._entries = {REFERENCE: self._reference}
        self._problems: dict[str, str] = {}
        self._rows: Table = []
        self.metrics: dict[str, Any] = {}

    @property
    def table(self) -> Table:
        return [*self._rows, *({"name": name, "verdict": why} for name, why in self._problems.items())]

    def try_variants(self) -> None:
        order = self._order
        self._measure([self._reference, *self._build(order.model, order.work, order.variants)])

    def try_shapes(self) -> None:
        """From the mildest shape on, until the quality is lost, the room suffices, or the time is up."""
        best = self._best()
        self._shapes.mkdir()
        for recipe in recipes(self._order.model):
            if time.monotonic() > self._limits.ends:
                self._problems[recipe.name] = LATE
                continue
            if self._too_large(recipe, best):
                self._problems[recipe.name] = "not tried: it would be too large"
                continue
            self._ctx.report(0, stage=f"make the shape {recipe.name}")
            try:
                shape = self._maker.make(recipe)
            except LLMOError as error:
                self._problems[recipe.name] = f"cannot be made: {error.what}"
                self._ctx.note(f"the shape {recipe.name} cannot be made: {error.what}")
                continue
            folder = self._order.work / f"of-{recipe.name}"
            folder.mkdir()
            made = self._build(shape, folder, [best], f"{recipe.name}+")
            self._measure([self._reference, *made])
            found = [row for row in self._rows if row["name"] == f"{recipe.name}+{best}"]
            if self._limits.shapes == "auto" and found and self._enough(found[0]):
                break

    def made(self, name: str) -> Made:
        entry = self._entries[name]
        return Made(entry.shape, [entry.folder / file for file in entry.files])

    def _too_large(self, recipe: Recipe, variant: str) -> bool:
        """Whether it would not fit, as the model with its trimmed vocabulary was measured."""
        whole = next((row for row in self._rows if row["name"] == f"{VOCABULARY}+{variant}"), None)
        if whole is None or self._limits.max_bytes is None:
            return False
        return bool(whole["size_bytes"] - recipe.saved * whole["bits"] / 8 > self._limits.max_bytes)

    def _enough(self, row: Mapping[str, Any]) -> bool:
        """Whether stronger shapes need not be tried: they would lose more still, or this one fits already."""
        if loss(row) > self._limits.max_drop + ROUNDING:
            return True
        fits = self._limits.max_bytes is None or row["size_bytes"] <= self._limits.max_bytes
        return fits and self._limits.target != "size"

    def _best(self) -> str:
        """The variant that would be chosen if size did not matter; the first one where none would be."""
        return choose(deepcopy(self._rows), replace(self._limits, max_bytes=None)) or self._order.variants[0]

    def _build(self, shape: Path, work: Path, variants: Sequence[str], prefix: str = "") -> list[Entry]:
        """Make a folder `work/VARIANT` for each. Why others cannot be had is noted among the problems."""
        task, tokenizer = load_task(shape), load_tokenizer(shape)
        encodings = task.encode_rows(tokenizer, self._exam.rows)
        source = Source(shape, work, lambda: _calibration(task, tokenizer, self._order.data))
        entries = []
        for number, name in enumerate(variants):
            if self._ctx.should_stop():
                raise Stopped
            if time.monotonic() > self._limits.ends and not prefix:  # what a shape was trained for is built
                self._problems[name] = LATE
                continue
            self._ctx.report(number, len(variants), stage=f"build {prefix}{name}")
            variant, folder = VARIANTS[name], work / name
            folder.mkdir()
            for file in ("config.json", CARD):
                shutil.copy(shape / file, folder)
            try:
                plugins.load("llmo.engines", variant.engine)
                bits = variant.build(source, folder)
            except LLMOError as error:
                self._problems[prefix + name] = f"cannot run: {error.what}"
                self._ctx.note(f"{prefix}{name} cannot be built: {error.what}")
                continue
            entries.append(
                Entry(prefix + name, variant.engine, variant.precision, folder, variant.files, bits, shape, encodings)
            )
        if source.attention:
            self._ctx.note(f"exported to ONNX with {source.attention} attention")
        return entries

    def _measure(self, entries: Sequence[Entry]) -> None:
        """Take their answers and their speed, the reference first among them; a row for each that runs."""
        self._entries |= {entry.name: entry for entry in entries}
        drops: dict[str, dict[str, float]] = {}

        def worth(candidate: Candidate, logits: Sequence[Logits]) -> str | None:
            entry = self._entries[candidate.name]
            answers = gathered(logits, entry.encodings)
            if not self._answers:
                self._answers = answers
            drop = drops[entry.name] = self._exam.drop(self._answers, answers, entry.encodings)
            return "drops too much" if drop["value"] > self._limits.max_drop + ROUNDING else None

        candidates = [
            Candidate(entry.name, entry.engine, entry.folder, texts=sequences(entry.encodings)) for entry in entries
        ]
        texts = sequences(self._exam.encodings)
        measured = contest(candidates, texts, self._order.work, self._ctx, worth=worth, problems=self._problems)
        for entry in entries:
            found = measured.get(entry.name)
            if found is None or entry.name in self.metrics:
                continue
            answers = gathered(found.logits, entry.encodings)
            tally = self._exam.task.tally(answers, self._exam.rows, entry.encodings)
            self.metrics[entry.name] = self._exam.task.intervals(tally)
            value = self.metrics[entry.name][self._limits.metric]["value"]
            self._rows.append(
                _row(entry, found, measured[REFERENCE])
                | {"metric": self._limits.metric, "value": value}
                | {"drop" if key == "value" else f"drop_{key}": x for key, x in drops[entry.name].items()}
                | self._exam.changes(self._answers, answers, entry.encodings)
            )


def _calibration(task: Task, tokenizer: Tokenizer, data: Dataset) -> list[list[int]]:
    """Raises DataError where the training texts are too few or all alike."""
    rows = data.split("train")
    some = np.random.default_rng(CALIBRATION_SEED).permutation(len(rows))[:CALIBRATION_ROWS]
    texts = sequences(task.encode_rows(tokenizer, [rows[int(number)] for number in some]))
    return calibration.choose(texts, CALIBRATION_TEXTS, CALIBRATION_SEED)


def _row(entry: Entry, found: Measured, reference: Measured) -> dict[str, Any]:
    """What a candidate is and how fast; speeds are there where they were taken."""
    row: dict[str, Any] = {
        "name": entry.name,
        "engine": entry.engine,
        "precision": entry.precision,
        "bits": round(entry.bits, 2),
        "size_bytes": entry.size,
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
