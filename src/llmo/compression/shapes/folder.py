"""Writes a shape as a whole model folder, with a card and golden evidence that are true of it, or nothing at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llmo.compression.shapes.source import Source
from llmo.context import Context
from llmo.data.dataset import Rows
from llmo.engines.torch import quiet
from llmo.errors import InputError
from llmo.files import digest_of, manifest_of, publish
from llmo.tasks.card import write_card, write_golden
from llmo.training import folder, lineage, scoring
from llmo.training.failures import disk_errors
from llmo.training.figures import Metrics, TaskFigures

MOST_ROWS = 1000  # of dev that a shape is measured on
SAMPLE_SEED = 13
METHOD = "shape"  # in the card: how the weights came about, which is no way to train
# Of the original's card, what is not true of another shape.
_GONE = ("adapted_modules", "trained_parameters", "tokenizer_sha256", "format", "together")


@contextmanager
def made(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end, and of which nothing stays when anything is raised. Raises InputError
    when there is something at `out` already, StorageError when the disk does not take it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"there is something at {out} already", hint="name a folder that is new or empty")
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with disk_errors(out):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            aside.replace(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def write(
    source: Source, model: Any, step: Mapping[str, Any], out: Path, ctx: Context, files: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write `model`, which was made from `source`, to the empty folder `out`; `files` are those of the tokeniser that
    are others now. `step` says what was done, and is kept in the card behind the steps before it.

    Returns the step with `parameters` and the `metrics` on dev (at most 1000 rows of it) of what was written.
    """
    model.eval()
    with quiet():
        model.save_pretrained(out)
    for name in folder.TOKENIZER_FILES:
        if files is not None and name in files:
            publish(out / name, files[name])
        elif (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, out / name)
    predict = scoring.model_predictor(model, source.task, source.pad_id, source.exact)
    shown = next(rows for rows in map(source.data.split, ("dev", "train", "test")) if len(rows))
    write_golden(out, folder.evidence(source.task, source.tokenizer, shown, predict))
    metrics = _measured(source, predict, ctx)
    parameters = sum(p.numel() for p in model.parameters())
    write_card(out, _card(source, dict(step), metrics, parameters))
    return {**step, "parameters": parameters, "metrics": metrics}


def sample(rows: Rows, most: int) -> Rows:
    """So many rows at most, always the same ones."""
    if len(rows) <= most:
        return rows
    chosen = np.random.default_rng(SAMPLE_SEED).choice(len(rows), most, replace=False)
    return rows.pick([int(number) for number in np.sort(chosen)])


def _measured(source: Source, predict: scoring.Predict, ctx: Context) -> Metrics:
    held = {"dev": scoring.Tokens(source.task, source.tokenizer, sample(source.data.split("dev"), MOST_ROWS))}
    return TaskFigures(source.task, held, lambda _: predict, ctx).full("dev", "dev", source.exact)


def _card(source: Source, step: dict[str, Any], metrics: Metrics, parameters: int) -> dict[str, Any]:
    card = source.card
    before = card.get("shape") or {
        "of": {
            "digest": digest_of(manifest_of(source.folder)),
            "method": card.get("method"),
            "parameters": card.get("parameters"),
            "metrics": card.get("metrics", {}),
        },
        "steps": [],
    }
    return {
        **{name: value for name, value in card.items() if name not in _GONE},
        "method": METHOD,
        "metrics": {"dev": metrics},
        "measured_in": source.exact.name,
        "parameters": parameters,
        "shape": {**before, "steps": [*before["steps"], step]},
        "versions": lineage.versions(),
        "code": lineage.code_digest(),
    }
