"""The operation `evaluate`: measures any trained or compressed model folder, through its own engine, on a split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from llmo import plugins
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.base import Engine, Request
from llmo.engines.generation import GenerationEngine, GenerationOptions
from llmo.errors import DataError
from llmo.files import publish_json
from llmo.specfile import validate
from llmo.specs import EvaluateSpec
from llmo.tasks.base import Encoding, Logits, Task
from llmo.tasks.card import load_task, load_tokenizer, read_card
from llmo.training import scoring
from llmo.training.batches import IGNORED

REPORT = "report.json"


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `{"split": "train" | "dev" | "test"}`; `inputs` are the folders `data` and `model`.

    Writes `report.json`: every metric with its 95% interval, and the confusion matrix or the counts per type.
    """
    split = validate(dict(spec), EvaluateSpec).split
    folder = inputs["model"]
    card, task, tokenizer = read_card(folder), load_task(folder), load_tokenizer(folder)
    rows = Dataset.open(inputs["data"]).split(split)
    if not len(rows):
        raise DataError(f"the split '{split}' has no rows", hint="set data.split, or evaluate on another split")
    with (_generating if task.generates else _answering)(card, folder, task, ctx) as predict:
        started = time.monotonic()
        scored = scoring.score(task, tokenizer, rows, predict, ctx, split)
        seconds = time.monotonic() - started
    metrics = task.intervals(scored.tally)
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
def _answering(card: Mapping[str, Any], folder: Path, task: Task, ctx: Context) -> Iterator[scoring.Predict]:
    engine: Engine = plugins.load("llmo.engines", card["engine"])()
    engine.load(folder, ctx.device)

    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        requests = [Request(i, encoding.input_ids) for i, encoding in enumerate(encodings)]
        found = {chunk.id: chunk.data for chunk in engine.run(requests)}
        return [found[i] for i in range(len(encodings))]

    with closing(engine):
        yield predict


@contextmanager
def _generating(card: Mapping[str, Any], folder: Path, task: Task, ctx: Context) -> Iterator[scoring.Predict]:
    """Log-probabilities of the learnt tokens, by the engine that would write them."""
    engine: GenerationEngine = plugins.load("llmo.generators", card["engine"])()
    options = GenerationOptions(context=task.max_length + 1, precision=card["precision"])
    engine.load(folder, ctx.device, options)

    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        found = engine.score([encoding.input_ids for encoding in encodings])
        return [
            scores[task.target({}, encoding)[1:] != IGNORED] for scores, encoding in zip(found, encodings, strict=True)
        ]

    with closing(engine):
        yield predict
