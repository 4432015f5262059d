"""The operation `evaluate`: measures any trained or compressed model folder, through its own engine, on a split."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmo import plugins
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.base import Engine, Request
from llmo.errors import DataError
from llmo.files import publish_json
from llmo.specfile import validate
from llmo.specs import EvaluateSpec
from llmo.tasks.base import Encoding, Logits
from llmo.tasks.card import load_task, load_tokenizer, read_card
from llmo.training import scoring

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
    engine: Engine = plugins.load("llmo.engines", card["engine"])()
    engine.load(folder, ctx.device)
    started = time.monotonic()
    try:
        scored = scoring.score(task, tokenizer, rows, _predictor(engine), ctx, split)
    finally:
        engine.close()
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


def _predictor(engine: Engine) -> scoring.Predict:
    def predict(encodings: Sequence[Encoding]) -> list[Logits]:
        requests = [Request(i, encoding.input_ids) for i, encoding in enumerate(encodings)]
        found = {chunk.id: chunk.data for chunk in engine.run(requests)}
        return [found[i] for i in range(len(encodings))]

    return predict
