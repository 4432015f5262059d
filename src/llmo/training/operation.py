"""The operation `train`: a data set and a base model become a trained model folder with its card and evidence."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from llmo import plugins
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.errors import DataError, SpecError
from llmo.specfile import validate
from llmo.specs import TrainJobSpec
from llmo.tasks.base import Row, Task
from llmo.tasks.card import load_tokenizer, write_card, write_golden
from llmo.training import batches, checkpoint, folder, lineage, optimiser, precision, scoring
from llmo.training.batches import Encoded
from llmo.training.failures import memory_errors
from llmo.training.loop import Loop
from llmo.training.model import Built, build

Metrics = dict[str, dict[str, float]]


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `TrainSpec.plain()` with `task`; `inputs` are the folders `data` and `model`.

    Returns the main figures: test before and after, dev, speed. Raises DataError, ModelError and SpecError for what
    cannot be trained, JobFailed when the loss is lost, Stopped (after a checkpoint) when asked to stop, StorageError
    and MemoryError when there is no room.
    """
    with memory_errors():
        return _run(spec, inputs, out, ctx)


def _run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    started = time.monotonic()
    request = validate(dict(spec), TrainJobSpec)
    torch.set_num_threads(max(1, ctx.device.cores))
    chosen = precision.choose(request.precision, ctx.device)
    data = Dataset.open(inputs["data"])
    task = _task(request, data)
    tokenizer = load_tokenizer(inputs["model"])
    checkpoint.seed_everything(request.seed)
    built = build(inputs["model"], task, request, on_cpu=chosen.device.type == "cpu")
    built.model.to(chosen.device)
    encoded = _encoded(task, tokenizer, data, ctx)
    _say(ctx, built, encoded, chosen)

    splits = {name: data.split(name) for name in ("dev", "test")}
    figures = _Figures(task, tokenizer, built, ctx)
    on_dev = (lambda: figures.plain(splits["dev"], "dev", chosen)) if len(splits["dev"]) else None
    if on_dev is None and request.early_stopping is not None:
        raise SpecError("early_stopping needs a dev split, and it is empty", hint="set data.split.dev above 0")
    loop = Loop(built, task, request, encoded, on_dev, ctx, chosen)
    if loop.resume():
        ctx.note(f"resumed from the checkpoint of step {loop.state.step} of {loop.total}")
    else:
        loop.state.extra["before"] = figures.full(splits["test"], "test before training", chosen)
    loop.run()

    exact = precision.exact(chosen)
    metrics = {
        "dev": figures.full(splits["dev"], "dev", exact),
        "test": {"before": loop.state.extra["before"], "after": figures.full(splits["test"], "test", exact)},
    }
    shown = splits["dev"] if len(splits["dev"]) else data.split("train")
    write_golden(out, folder.evidence(task, tokenizer, shown, figures.predictor(exact)))
    folder.write(out, built, inputs["model"])
    write_card(out, _card(request, task, built, metrics, data, inputs["model"], loop))
    checkpoint.clear(ctx.checkpoint())
    return {
        "metric": task.metric,
        **metrics,
        "steps": loop.state.step,
        "history": loop.state.history,
        "seconds": time.monotonic() - started,
        "samples_per_second": loop.samples_per_second,
        "truncated_share": encoded.truncated / len(encoded),
        "parameters": built.parameters,
        "trained_parameters": built.trained,
        "precision": chosen.name,
    }


class _Figures:
    """Measures splits with the model that is being trained."""

    def __init__(self, task: Task, tokenizer: Tokenizer, built: Built, ctx: Context) -> None:
        self._task, self._tokenizer, self._built, self._ctx = task, tokenizer, built, ctx

    def predictor(self, how: precision.Precision) -> scoring.Predict:
        pad_id = int(self._built.network.config.pad_token_id)
        return scoring.model_predictor(self._built.model, self._task, pad_id, how)

    def full(self, rows: Sequence[Row], phase: str, how: precision.Precision) -> Metrics:
        """Metrics with intervals; none for a split without rows."""
        return self._task.intervals(self._score(rows, phase, how).tally) if len(rows) else {}

    def plain(self, rows: Sequence[Row], phase: str, how: precision.Precision) -> dict[str, float]:
        totals = self._score(rows, phase, how).tally.totals()
        return {name: float(value) for name, value in self._task.scores(totals).items()}

    def _score(self, rows: Sequence[Row], phase: str, how: precision.Precision) -> scoring.Scored:
        return scoring.score(self._task, self._tokenizer, rows, self.predictor(how), self._ctx, phase)


def _task(request: TrainJobSpec, data: Dataset) -> Task:
    name = request.task.name
    if data.info.get("task") != name:
        raise DataError(
            f"the data set was imported for {data.info.get('task')}, not for {name}",
            hint=f"import it again with `task: {name}`",
        )
    cls = plugins.load("llmo.tasks", name)
    multi_label = request.task.multi_label
    options = {"multi_label": bool(data.info.get("multi_label")) if multi_label is None else multi_label}
    found = cls.from_rows(data.split("train"), max_length=request.task.max_length, options=options)
    assert isinstance(found, Task)  # noqa: S101 (the registry holds tasks)
    return found


def _encoded(task: Task, tokenizer: Tokenizer, data: Dataset, ctx: Context) -> Encoded:
    rows = data.split("train")
    return batches.encode(task, tokenizer, rows, lambda done: ctx.report(done, len(rows), phase="tokenise"))


def _say(ctx: Context, built: Built, data: Encoded, chosen: precision.Precision) -> None:
    part = f"{built.trained / 1e6:.2f}M of {built.parameters / 1e6:.2f}M parameters"
    ctx.note(f"training {part} in {chosen.name}: {chosen.why}")
    if data.truncated:
        share = data.truncated / len(data)
        ctx.note(f"{share:.1%} of the training texts are longer than {data.max_length} tokens and are cut")


def _card(
    request: TrainJobSpec, task: Task, built: Built, metrics: dict[str, Any], data: Dataset, base: Path, loop: Loop
) -> dict[str, Any]:
    return {
        "task": task.to_card(),
        "engine": "torch",
        "precision": "fp32",
        "base": lineage.base_of(base),
        "method": request.method,
        "metric": task.metric,
        "metrics": metrics,
        "parameters": built.parameters,
        "trained_parameters": built.trained,
        "adapted_modules": list(built.adapted),
        "train": lineage.training_of(request.plain()) | {"learning_rate": optimiser.peak(request)},
        "steps": loop.state.step,
        "history": loop.state.history,
        "data": lineage.data_of(data),
        "seed": request.seed,
        "versions": lineage.versions(),
        "code": lineage.code_digest(),
    }
