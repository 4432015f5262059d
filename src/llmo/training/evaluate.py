"""The operation `evaluate`: measures any trained or compressed model folder, through its own engine, on a split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llmo import plugins
from llmo.context import Context, Stopped
from llmo.data.dataset import Dataset, Rows
from llmo.engines.base import Engine, Request
from llmo.engines.generation import GenerationEngine, GenerationOptions, Prompt, Sampling
from llmo.engines.place import torch_device
from llmo.errors import DataError, SpecError
from llmo.jobspecs import EvaluateSpec
from llmo.specfile import validate
from llmo.tasks.base import Encoding, Logits, Row, Task
from llmo.tasks.card import load_task, load_tokenizer, read_card
from llmo.tasks.generation import Generation, conversation
from llmo.tasks.metrics import Counts
from llmo.tasks.written import measure as measure_written
from llmo.training import against, peak, pictures, report, scoring
from llmo.training.batches import IGNORED
from llmo.training.figures import Measured, Metrics, measure

WRITTEN_TOKENS = 128  # of an answer that is compared with its reference


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `EvaluateSpec.plain()`; `inputs` are the folders `data` and `model`, and `against` for a second model
    that is measured on the same rows and compared.

    Writes the report: `report.json`, pictures and `report.html`. Returns it without the rows and their details.
    """
    asked = validate(dict(spec), EvaluateSpec)
    rows = Dataset.open(inputs["data"]).split(asked.split)
    if not len(rows):
        raise DataError(f"the split '{asked.split}' has no rows", hint="set data.split, or evaluate on another split")
    if not pictures.possible():
        ctx.note(pictures.MISSING)
    subject = _Subject.of(inputs["model"])
    other = _Subject.of(inputs["against"]) if "against" in inputs else None
    if other is not None:
        against.check(subject.task, other.task)
    if asked.answers and not isinstance(subject.task, Generation):
        raise SpecError(f"a model for {subject.task.name} writes no answers", hint="leave `answers` out")
    ours: list[Counts] = []
    measured, written = subject.measured(rows, asked, ctx, None if other is None else ours)
    memory = {"peak_bytes": peak.peak(torch_device(ctx.device))}  # before the other model adds its own
    compared: dict[str, Any] = {}
    if other is not None:
        theirs: list[Counts] = []
        second, _ = other.measured(rows, asked.model_copy(update={"answers": 0}), ctx, theirs)
        difference = against.differences((subject.task, ours), (other.task, theirs))
        compared = {"against": {"metrics": second.metrics, "difference": difference}}
    full = report.made(
        subject.task,
        subject.task.metric,
        asked.split,
        replace(measured, metrics=measured.metrics | written),
        speed={"samples_per_second": measured.rows / measured.seconds, "seconds": measured.seconds},
        memory=memory,
        engine=subject.card["engine"],
        precision=subject.card.get("precision", "fp32"),
        **compared,
    )
    report.write(out, f"{subject.task.name}, {asked.split}", full)
    shown = {name: value for name, value in full.items() if name not in ("format", "details", "worst")}
    return {**shown, **full["speed"]}


@dataclass(frozen=True, slots=True)
class _Subject:
    folder: Path
    card: Mapping[str, Any]
    task: Task
    tokenizer: Tokenizer

    @classmethod
    def of(cls, folder: Path) -> _Subject:
        return cls(folder, read_card(folder), load_task(folder), load_tokenizer(folder))

    def measured(
        self, rows: Rows, asked: EvaluateSpec, ctx: Context, each: list[Counts] | None
    ) -> tuple[Measured, Metrics]:
        """The split through the model's own engine, and what its written answers are worth; `each` gets every row's
        counts."""
        tokens = scoring.Tokens(self.task, self.tokenizer, rows)
        if isinstance(self.task, Generation):
            with _writer(self.card, self.folder, self.task, ctx) as engine:
                judge = _judge(engine, self.task)
                found = measure(self.task, tokens, judge, ctx, asked.split, each)
                return found, _written(engine, self.task, self.tokenizer, rows, asked.answers, ctx)
        with _labeller(self.card, self.folder, self.task, ctx) as predict:
            return measure(self.task, tokens, predict, ctx, asked.split, each), {}


@contextmanager
def _labeller(card: Mapping[str, Any], folder: Path, task: Task, ctx: Context) -> Iterator[scoring.Predict]:
    engine: Engine = plugins.load("llmo.engines", card["engine"])()
    engine.load(folder, ctx.device)

    def run(texts: Sequence[Sequence[int]]) -> list[Logits]:
        found = {chunk.id: chunk.data for chunk in engine.run([Request(i, ids) for i, ids in enumerate(texts)])}
        return [found[i] for i in range(len(texts))]

    with closing(engine):
        yield scoring.by_sequence(task, run)


@contextmanager
def _writer(card: Mapping[str, Any], folder: Path, task: Generation, ctx: Context) -> Iterator[GenerationEngine]:
    engine: GenerationEngine = plugins.load("llmo.generators", card["engine"])()
    options = GenerationOptions(context=task.max_length + WRITTEN_TOKENS, precision=card["precision"])
    engine.load(folder, ctx.device, options)
    with closing(engine):
        yield engine


def _judge(engine: GenerationEngine, task: Generation) -> scoring.Predict:
    """Log-probabilities of the learnt tokens, by the engine that would write them."""

    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        found = engine.score([encoding.input_ids for encoding in encodings])
        return [
            scores[task.target({}, encoding)[1:] != IGNORED] for scores, encoding in zip(found, encodings, strict=True)
        ]

    return predict


def _written(
    engine: GenerationEngine, task: Generation, tokenizer: Tokenizer, rows: Sequence[Row], count: int, ctx: Context
) -> Metrics:
    """Greedy answers to evenly spread rows that have a reference, compared with it; nothing for a count of 0."""
    spoken = [row for row in rows if row.get("messages")] if count else []
    picked = [spoken[int(i)] for i in np.linspace(0, len(spoken) - 1, min(count, len(spoken)))]
    if not picked:
        return {}
    ids: dict[int, list[int]] = {number: [] for number in range(len(picked))}
    for number, row in enumerate(picked):
        prompt = task.prompt_of(tokenizer, row)[-task.max_length :]
        engine.add(Prompt(number, prompt, Sampling(max_tokens=WRITTEN_TOKENS, temperature=0.0)))
    left = len(picked)
    while left:
        if ctx.should_stop():
            raise Stopped
        for delta in engine.step():
            ids[delta.id] += delta.tokens
            left -= delta.finish is not None
        for _, error in engine.failed():
            raise error
        ctx.report(len(picked) - left, len(picked), phase="answers")
    references = [str((conversation(row)[0] or [{}])[-1].get("content") or "") for row in picked]
    return measure_written([tokenizer.decode(found) for found in ids.values()], references)
