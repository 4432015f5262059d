"""The operation `train`: a data set and a base model become a trained model folder with its card and evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmo import plugins
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.errors import DataError, SpecError
from llmo.specfile import validate
from llmo.specs import TrainJobSpec
from llmo.tasks.base import Task
from llmo.tasks.card import load_tokenizer, write_card, write_golden
from llmo.tasks.generation import Generation
from llmo.training import checkpoint, folder, lineage, optimiser, precision
from llmo.training.course import Course, plan, resolve
from llmo.training.failures import memory_errors
from llmo.training.loop import Loop
from llmo.training.model import Built, build


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `TrainSpec.plain()` with `task`; `inputs` are the folders `data` and `model`.

    Returns the main figures: test before and after, dev, speed. Raises DataError, ModelError and SpecError for what
    cannot be trained, JobFailed when the loss is lost, Stopped (after a checkpoint) when asked to stop, StorageError
    and MemoryError when there is no room.
    """
    with memory_errors():
        return _run(spec, inputs, out, ctx)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything before the first step. `chosen` is the precision of training, `exact` that of the evidence."""

    request: TrainJobSpec
    data: Dataset
    course: Course
    chosen: precision.Precision
    exact: precision.Precision

    @property
    def has_dev(self) -> bool:
        return len(self.data.split("dev")) > 0

    def on_dev(self) -> dict[str, float]:
        """The metrics on dev as they are now."""
        return self.course.figures.plain("dev", "dev", self.chosen)

    def loop(self, ctx: Context, after_step: Callable[[], None] | None = None) -> Loop:
        """The run itself, not begun. Raises SpecError where it would look at a dev split that is empty."""
        if self.request.early_stopping is not None and not self.has_dev:
            raise SpecError("early_stopping needs a dev split, and it is empty", hint="set data.split.dev above 0")
        course = self.course
        on_dev = self.on_dev if self.has_dev else None
        about = (course.objective, self.request, course.encoded, on_dev, ctx, self.chosen, after_step)
        return Loop(course.built, course.task, *about)


def prepare(request: TrainJobSpec, data: Dataset, base: Path, ctx: Context) -> Prepared:
    """Build the model and encode the rows, with threads and random numbers set."""
    torch.set_num_threads(max(1, ctx.device.cores))
    chosen = precision.choose(request.precision, ctx.device)
    task, request = _task(request, data, base)
    tokenizer = load_tokenizer(base)
    checkpoint.seed_everything(request.seed)
    built = build(base, task, request, on_cpu=chosen.device.type == "cpu")
    built.model.to(chosen.device)
    exact = precision.exact(chosen)
    course = plan(task, tokenizer, data, built, request, chosen, exact, ctx)
    _say(ctx, built, course, chosen)
    return Prepared(request, data, course, chosen, exact)


def _run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    started = time.monotonic()
    ready = prepare(validate(dict(spec), TrainJobSpec), Dataset.open(inputs["data"]), inputs["model"], ctx)
    request, data, course, chosen, exact = ready.request, ready.data, ready.course, ready.chosen, ready.exact
    built, task = course.built, course.task
    loop = ready.loop(ctx)
    if loop.resume():
        ctx.note(f"resumed from the checkpoint of step {loop.state.step} of {loop.total}")
    else:
        loop.state.extra["before"] = course.figures.full("test", "test before training", chosen)
    loop.run()

    metrics = {
        "dev": course.figures.full("dev", "dev", course.measured),
        "test": {
            "before": loop.state.extra["before"],
            "after": course.figures.full("test", "test", course.measured),
        },
    }
    write_golden(out, course.evidence(data.split("dev" if ready.has_dev else "train"), exact))
    folder.write(out, built, inputs["model"], task)
    write_card(out, _card(request, course, metrics, data, inputs["model"], loop))
    checkpoint.clear(ctx.checkpoint())
    return {
        "metric": course.objective.metric,
        **metrics,
        "steps": loop.state.step,
        "history": loop.state.history,
        "seconds": time.monotonic() - started,
        "samples_per_second": loop.samples_per_second,
        "tokens_per_second": loop.tokens_per_second,
        "truncated_share": course.encoded.truncated / len(course.encoded.targets),
        "parameters": built.parameters,
        "trained_parameters": built.trained,
        "precision": chosen.name,
    }


def _task(request: TrainJobSpec, data: Dataset, base: Path) -> tuple[Task, TrainJobSpec]:
    """The task that the rows and the base make, and the request with its objective made out."""
    name = request.task.name
    if data.info.get("task") != name:
        raise DataError(
            f"the data set was imported for {data.info.get('task')}, not for {name}",
            hint=f"import it again with `task: {name}`",
        )
    cls: type[Task] = plugins.load("llmo.tasks", name)
    objective = resolve(request, cls, data.info.get("shape"))
    multi_label = request.task.multi_label
    options = {"multi_label": bool(data.info.get("multi_label")) if multi_label is None else multi_label}
    options |= cls.of_base(base) | ({"learns": objective} if objective in ("answers", "text") else {})
    task = cls.from_rows(data.split("train"), max_length=request.task.max_length, options=options)
    return task, request.model_copy(update={"objective": objective})


def _say(ctx: Context, built: Built, course: Course, chosen: precision.Precision) -> None:
    part = f"{built.trained / 1e6:.2f}M of {built.parameters / 1e6:.2f}M parameters"
    ctx.note(f"training {part} in {chosen.name}: {chosen.why}")
    data = course.encoded
    if data.truncated:
        share = data.truncated / len(data.targets)
        ctx.note(f"{share:.1%} of the training texts are longer than {data.max_length} tokens and are cut")
    if data.empty:
        ctx.note(f"{data.empty} training rows hold nothing to learn, and are left out")
    if isinstance(course.task, Generation) and course.task.template.is_default:
        ctx.note("the base model has no chat template: turns are written as `User:` and `Assistant:`")


def _card(
    request: TrainJobSpec, course: Course, metrics: dict[str, Any], data: Dataset, base: Path, loop: Loop
) -> dict[str, Any]:
    task, built = course.task, course.built
    return {
        "task": task.to_card(),
        "engine": "torch",
        "precision": "fp32",
        "base": lineage.base_of(base),
        "method": request.method,
        "metric": course.objective.metric,
        "metrics": metrics,
        "measured_in": course.measured.name,
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
        **({"template_sha256": task.template.sha256} if isinstance(task, Generation) else {}),
    }
