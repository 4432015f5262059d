"""The operation `evaluate`: measures any trained or compressed model folder, through its own engine, on a split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llmo import plugins
from llmo.context import Context, Stopped
from llmo.data.dataset import Dataset
from llmo.engines.base import Engine, Request
from llmo.engines.generation import GenerationEngine, GenerationOptions, Prompt, Sampling
from llmo.errors import DataError, SpecError
from llmo.files import publish_json
from llmo.specfile import validate
from llmo.specs import EvaluateSpec
from llmo.tasks.base import Encoding, Logits, Row
from llmo.tasks.card import load_task, load_tokenizer, read_card
from llmo.tasks.generation import Generation, conversation
from llmo.tasks.written import measure
from llmo.training import scoring
from llmo.training.batches import IGNORED

REPORT = "report.json"
WRITTEN_TOKENS = 128  # of an answer that is compared with its reference
Metrics = dict[str, dict[str, float]]


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `EvaluateSpec.plain()`; `inputs` are the folders `data` and `model`.

    Writes `report.json`: every metric with its 95% interval, and the confusion matrix or the counts per type.
    """
    asked = validate(dict(spec), EvaluateSpec)
    split = asked.split
    folder = inputs["model"]
    card, task, tokenizer = read_card(folder), load_task(folder), load_tokenizer(folder)
    rows = Dataset.open(inputs["data"]).split(split)
    if not len(rows):
        raise DataError(f"the split '{split}' has no rows", hint="set data.split, or evaluate on another split")
    if isinstance(task, Generation):
        with _writer(card, folder, task, ctx) as engine:
            started = time.monotonic()
            scored = scoring.score(task, tokenizer, rows, _judge(engine, task), ctx, split)
            seconds = time.monotonic() - started
            written = _written(engine, task, tokenizer, rows, asked.answers, ctx)
    else:
        if asked.answers:
            raise SpecError(f"a model for {task.name} writes no answers", hint="leave `answers` out")
        with _labeller(card, folder, ctx) as predict:
            started = time.monotonic()
            scored = scoring.score(task, tokenizer, rows, predict, ctx, split)
            seconds = time.monotonic() - started
            written = {}
    metrics = task.intervals(scored.tally) | written
    shown = {
        "metric": task.metric,
        "metrics": metrics,
        "split": split,
        "rows": scored.rows,
        "truncated_share": scored.truncated / scored.rows,
        "engine": card["engine"],
        "precision": card.get("precision", "fp32"),
        "samples_per_second": scored.rows / seconds,
        "seconds": seconds,
    }
    publish_json(out / REPORT, {"format": 1, **shown, "details": task.details(scored.tally)})
    return shown


@contextmanager
def _labeller(card: Mapping[str, Any], folder: Path, ctx: Context) -> Iterator[scoring.Predict]:
    engine: Engine = plugins.load("llmo.engines", card["engine"])()
    engine.load(folder, ctx.device)

    def run(texts: Sequence[Sequence[int]]) -> list[Logits]:
        found = {chunk.id: chunk.data for chunk in engine.run([Request(i, ids) for i, ids in enumerate(texts)])}
        return [found[i] for i in range(len(texts))]

    with closing(engine):
        yield scoring.by_sequence(run)


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
    return measure([tokenizer.decode(found) for found in ids.values()], references)
