"""The operation `compress`: build the variants, measure them against the original, and keep the fastest allowed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np

from llmo import hardware
from llmo.compression import encoders, generators, report
from llmo.compression.choice import Limits, choose, refusal, why
from llmo.compression.outcome import Order, Outcome
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.folder import refuse_applied
from llmo.errors import DataError, ModelError, SpecError, nearest
from llmo.files import digest_of, manifest_of, storage_errors
from llmo.specs import BASE_TASKS
from llmo.tasks.base import Row, Task
from llmo.tasks.card import CARD, load_task, read_card, write_card

SAMPLE_SEED = 13


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Write the compressed model folder, with a report of the search. Returns `{"metric", "target", "max_drop",
    "variants", "front", "chosen", "why", "texts", "hardware"}`, and `width` of a model that generates.

    Raises GateRefused, with the table in `extra`, when no variant is better than the original for the target, within
    `max_drop` of its metric on dev, and within `max_mb`.
    """
    model = inputs["model"]
    card = read_card(model)
    task = _task(model, card)
    kind: Any = generators if task.generates else encoders
    data = Dataset.open(inputs["data"])
    rows = _sample(data.split("dev"), kind.MOST_ROWS)
    variants = _variants(spec["variants"], kind, task.name)
    limits = Limits(
        _metric(spec["metric"], card, task),
        spec["max_drop"],
        spec["target"],
        None if spec["max_mb"] is None else spec["max_mb"] * 1e6,
        spec["shapes"],
        time.monotonic() + 60 * spec["minutes"],
    )
    with storage_errors(out), TemporaryDirectory(dir=out, prefix=".work-") as scratch:
        work = Path(scratch)
        found: Outcome = kind.compete(Order(model, task, data, rows, variants, limits, work), ctx)
        table = found.table
        chosen = choose(table, limits)
        reason = why(table, chosen, limits)
        ctx.note(reason)
        if chosen is None:
            raise refusal(reason, table)
        made = found.made(chosen)
        _assemble(made.model, made.files, out)
        own = read_card(made.model)
    row = next(row for row in table if row["name"] == chosen)
    result = {
        "metric": limits.metric,
        "target": limits.target,
        "max_drop": limits.max_drop,
        "variants": table,
        "front": report.front(table),
        "chosen": chosen,
        "why": reason,
        "texts": len(rows),
        "hardware": hardware.described(ctx.device.cores),
        **made.more,
    }
    with storage_errors(out):
        report.write(out, f"Compressed to {chosen}", result)
    write_card(out, _card(own, card, model, result, row, found.metrics[chosen]))
    return result


def _task(model: Path, card: Mapping[str, Any]) -> Task:
    """The model's task. Raises ModelError for a model that cannot be compressed."""
    if "reference" in card:
        raise ModelError(
            "this model is compressed already", hint="compress the model it was made from", where=str(model)
        )
    task = load_task(model)
    if task.name in BASE_TASKS:
        raise ModelError(
            f"a model of {task.name} answers nothing: it is a base for other tasks",
            hint="train one on it, and compress that",
            where=str(model),
        )
    if task.generates:
        refuse_applied(model)
    return task


def _metric(asked: str | None, card: Mapping[str, Any], task: Task) -> str:
    """The figure that is to be kept. Raises SpecError for one the task does not have."""
    known = [name for name in card.get("metrics", {}).get("dev", {}) if "/" not in name]
    if asked is None or asked == task.metric or asked in known:
        return asked or task.metric
    raise SpecError(
        f"a model for {task.name} has no '{asked}'{nearest(asked, known)}",
        hint=f"compress.metric may be: {', '.join(known or [task.metric])}",
    )


def _sample(rows: Sequence[Row], most: int) -> list[Row]:
    if not len(rows):
        raise DataError(
            "the data set has no dev rows to measure the loss of quality on",
            hint="import it with a dev split, e.g. `data: {split: {dev: 0.1}}`",
        )
    if len(rows) <= most:
        return list(rows)
    numbers = np.random.default_rng(SAMPLE_SEED).choice(len(rows), most, replace=False)
    return [rows[int(number)] for number in np.sort(numbers)]


def _variants(asked: Sequence[str] | None, kind: ModuleType, task: str) -> list[str]:
    wrong = [name for name in asked or () if name not in kind.VARIANTS]
    if wrong:
        raise SpecError(
            f"'{wrong[0]}' is no variant of a model for {task}",
            hint=f"compress.variants may name: {', '.join(kind.VARIANTS)}",
        )
    return list(asked or kind.VARIANTS)


def _assemble(model: Path, engine_files: Sequence[Path], out: Path) -> None:
    """What serves beside the engine's own files: config, tokeniser and golden evidence, but not the old card."""
    for path in sorted(model.iterdir()):
        if path.suffix in (".json", ".txt", ".jinja") and path.name != CARD and ".index." not in path.name:
            shutil.copyfile(path, out / path.name)
    for path in engine_files:
        shutil.copyfile(path, out / path.name)


def _card(
    own: Mapping[str, Any],
    card: Mapping[str, Any],
    model: Path,
    result: Mapping[str, Any],
    row: Mapping[str, Any],
    dev: Mapping[str, Any],
) -> dict[str, Any]:
    """The card of the shape (`own`), or the original's where it is the same, with what is different now; `metrics` are
    this variant's own."""
    return {
        **own,
        "engine": row["engine"],
        "precision": row["precision"],
        "bits": row["bits"],
        "metrics": {"dev": dict(dev)},
        **result,
        "reference": {"digest": digest_of(manifest_of(model)), "metrics": card.get("metrics", {})},
    }
