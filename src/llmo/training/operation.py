"""The operation `train`: a data set and a base model become a trained model folder with its card and evidence."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmo import plugins
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.errors import DataError, SpecError
from llmo.jobspecs import TrainJobSpec
from llmo.methods import OPTIMISERS
from llmo.specfile import validate
from llmo.tasks.base import Row, Task
from llmo.tasks.card import load_tokenizer, write_card, write_golden
from llmo.tasks.generation import Generation
from llmo.training import (
    checkpoint,
    folder,
    lineage,
    lowrank,
    optimiser,
    parallel,
    peak,
    pictures,
    precision,
    relief,
    report,
    scratch,
    sharded,
    together,
)
from llmo.training.above import Above
from llmo.training.architecture import check_config
from llmo.training.batches import Encoded
from llmo.training.course import Course, plan, resolve
from llmo.training.failures import StepTooLarge, memory_errors
from llmo.training.figures import Measured
from llmo.training.fitting import require
from llmo.training.forecast import Rows
from llmo.training.loop import Loop
from llmo.training.model import Built, build
from llmo.training.objectives import Labels, Objective
from llmo.training.parallel import Group
from llmo.training.sharded import Sharded
from llmo.training.together import Learner


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `TrainSpec.plain()` with `task`; `inputs` are the folders `data` and `model`.

    Writes the model folder and `report/`. Returns the main figures: test before and after, dev, speed, memory. Raises
    DataError, ModelError, SpecError and NeedsError for what cannot be trained here, JobFailed when the loss is lost,
    Stopped (after a checkpoint) when asked to stop, StorageError and MemoryError when there is no room; a step that
    finds no memory is tried once more in smaller parts of its batch.
    """
    request = validate(dict(spec), TrainJobSpec)
    return relieved(request, ctx, lambda smaller: _run(smaller, inputs, out, ctx))


def relieved(request: TrainJobSpec, ctx: Context, work: Callable[[TrainJobSpec], dict[str, Any]]) -> dict[str, Any]:
    """What `work` makes of the request; when a step finds no memory, of one whose batch comes in smaller parts."""
    request = relief.resume(request, ctx)
    while True:
        try:
            with memory_errors():
                return work(request)
        except StepTooLarge:
            request = relief.shrink(request, ctx)
        gc.collect()  # what was built hangs together in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything before the first step. `chosen` is the precision of training, `exact` that of the evidence; `need` is
    the forecast of the peak in bytes, None on a GPU."""

    request: TrainJobSpec
    data: Dataset
    course: Course
    chosen: precision.Precision
    exact: precision.Precision
    need: int | None
    joined: lowrank.Joined
    objective: Objective
    rows: Encoded
    others: Sequence[Learner] = ()

    @property
    def learners(self) -> list[Learner]:
        """The task, and those that are learnt together with it."""
        return [Learner("", self.data, self.course), *self.others]

    @property
    def has_dev(self) -> bool:
        return all(len(one.data.split("dev")) > 0 for one in self.learners)

    def shared_out(self, group: Group | None) -> Sharded | None:
        """Share the model's layers out among the processes, where that is asked for."""
        if group is None or self.request.parallelism == "data":
            return None
        return Sharded(self.course.built, self.request.parallelism, group, self.chosen)

    def loop(self, ctx: Context, sharded: Sharded | None = None, after_step: Callable[[], None] | None = None) -> Loop:
        """The run itself, not begun. Raises SpecError where it would look at a dev split that is empty."""
        if self.request.early_stopping is not None and not self.has_dev:
            raise SpecError("early_stopping needs a dev split, and it is empty", hint="set data.split.dev above 0")
        course = self.course
        on_dev = self._on_dev if self.has_dev else None
        about = (self.objective, self.request, self.rows, on_dev, ctx, self.chosen, after_step, sharded)
        return Loop(course.built, course.task, *about)

    def fit(self) -> None:
        """Make the model ready to be measured, where its head is made of where the trunk puts texts."""
        if self.course.fit is not None:
            self.course.fit()

    def trained(self) -> None:
        """The steps are over: make the model ready for its final figures."""
        if self.course.measured.name != self.chosen.name:
            self.joined.undo()
        self.fit()

    def _on_dev(self) -> dict[str, float]:
        self.fit()
        found = [one.course.figures.plain("dev", "dev", self.chosen) for one in self.learners]
        return together.figures(self.learners, found) if self.others else found[0]


def prepare(
    request: TrainJobSpec, data: Dataset, base: Path, ctx: Context, others: Mapping[str, Dataset] | None = None
) -> Prepared:
    """Build the model and encode the rows, with threads and random numbers set; `others` are the rows of `request.also`
    by name. Raises NeedsError when the machine surely has not the memory."""
    torch.set_num_threads(max(1, ctx.device.cores))
    chosen = precision.choose(request.precision, ctx.device)
    if chosen.device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans its attention for each new shape: a fifth of a second
    others = others or {}
    together.check(request, others)
    task, request = _task(request, data, base)
    whole = request.parallelism == "data"
    if request.also or not whole:  # they are kept for one task's rows, and by who has all layers
        request = request.model_copy(update={"keep_states": False})
    tokenizer = load_tokenizer(base)
    checkpoint.seed_everything(request.seed)
    on_cpu = chosen.device.type == "cpu"
    built = build(base, task, request, on_cpu=on_cpu)
    exact = precision.exact(chosen)
    learners = []
    for also in request.also:
        rows = others[also.name]
        other, _ = _task(request.model_copy(update={"task": also.task}), rows, base)
        head = together.on_trunk(built, base, other, request, on_cpu=on_cpu)
        learners.append(Learner(also.name, rows, plan(other, tokenizer, rows, head, request, chosen, exact, ctx)))
    if whole:
        built.model.to(chosen.device)
    else:
        sharded.check(built, request.parallelism, request.devices)
    built.others.to(chosen.device)
    course = plan(task, tokenizer, data, built, request, chosen, exact, ctx)
    if request.devices > 1 and isinstance(course.objective, Labels | Above) and course.objective.part_tokens is None:
        raise SpecError(
            f"task {task.name} tells the rows of a batch apart from each other, so that no process can have a part",
            hint="leave train.devices out",
        )
    objective, encoded = together.joined([course, *(one.course for one in learners)], request.temperature)
    _say(ctx, built, [course, *(one.course for one in learners)], chosen)
    need = _room(request, encoded, base, chosen, ctx)
    joined = lowrank.join(built, chosen) if whole else lowrank.Joined([])
    return Prepared(request, data, course, chosen, exact, need, joined, objective, encoded, learners)


def _run(request: TrainJobSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    started = time.monotonic()
    ready = prepare(request, Dataset.open(inputs["data"]), inputs["model"], ctx, together.data_sets(inputs))
    done, outcomes = _trained(ready, inputs, ctx)
    request, course, chosen, base = ready.request, ready.course, ready.chosen, inputs["model"]
    first, *others = outcomes
    write_golden(out, first.golden)
    folder.write(out, course.built, base, course.task)
    write_card(out, _card(ready, first, base, done))
    for other in others:
        aside = out / together.FOLDER / other.name
        together.keep(aside, other.course.built, other.golden, _card(ready, other, base, done))
    speed = {"samples_per_second": done.samples_per_second, "tokens_per_second": done.tokens_per_second}
    memory = {"peak_bytes": peak.peak(chosen.device)}
    if ready.need and request.devices == 1:  # what the other processes held is not known here
        memory["forecast_bytes"] = ready.need
    for one in outcomes:
        _report(out / together.FOLDER / one.name if one.name else out, one, speed, memory, base)
    checkpoint.clear(ctx.checkpoint())
    relief.forget(ctx)
    return {
        **first.to_json(),
        **({"also": {other.name: other.to_json() for other in others}} if others else {}),
        "steps": done.steps,
        "history": done.history,
        "seconds": time.monotonic() - started,
        **speed,
        "parameters": course.built.parameters,
        "trained_parameters": course.built.trained,
        "gradient_accumulation_steps": request.gradient_accumulation_steps,
        "precision": chosen.name,
        "memory": memory,
    }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one task came to: `held` by split, its `metrics` as the card has them, and its `golden` answers."""

    name: str
    data: Dataset
    course: Course
    held: Mapping[str, Measured]
    metrics: dict[str, Any]
    golden: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.course.objective.metric,
            **self.metrics,
            "calibration": self.held["test"].findings.get("calibration"),
            "truncated_share": self.course.encoded.truncated / len(self.course.encoded.targets),
        }


def _outcomes(ready: Prepared, done: Done) -> list[Outcome]:
    """Of each task: the figures of what is held out, then, of the weights as they are saved, the evidence."""
    held = [
        {split: one.course.figures.measured(split, split, one.course.measured) for split in ("dev", "test")}
        for one in ready.learners
    ]
    ready.joined.undo()
    found = []
    for number, (one, splits) in enumerate(zip(ready.learners, held, strict=True)):
        after = splits["test"].metrics
        before = after if done.before is None else done.before[number]
        metrics = {"dev": splits["dev"].metrics, "test": {"before": before, "after": after}}
        shown = next(rows for rows in (one.data.split(name) for name in ("dev", "train", "test")) if len(rows))
        golden = one.course.evidence(shown, ready.exact)
        found.append(Outcome(one.name, one.data, one.course, splits, metrics, golden))
    return found


@dataclass(frozen=True, slots=True)
class Done:
    """What the steps were; without any, nothing was before them. Speeds are of this attempt."""

    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    before: list[dict[str, Any]] | None = None  # of each task
    samples_per_second: float = 0.0
    tokens_per_second: float = 0.0


def _trained(ready: Prepared, inputs: Mapping[str, Path], ctx: Context) -> tuple[Done, list[Outcome]]:
    """Learn, if there is anything that does, and measure; the model is whole then."""
    done = Done()
    if ready.course.built.trained:
        with parallel.group(ready.request, inputs, ctx, ready.chosen.device) as group:
            sharded = ready.shared_out(group)
            with memory_errors(StepTooLarge):
                done = _learn(ready, group, sharded, ctx)
            if sharded is not None:
                ready.trained()
                outcomes = _outcomes(ready, done)
                sharded.undo()
                return done, outcomes
    ready.trained()
    return done, _outcomes(ready, done)


def _learn(ready: Prepared, group: Group | None, sharded: Sharded | None, ctx: Context) -> Done:
    """Run the loop, from its checkpoint if there is one."""
    loop = ready.loop(ctx, sharded)
    resumed = loop.resume()
    if group is not None:
        group.agree(resumed)
    if resumed:
        ctx.note(f"resumed from the checkpoint of step {loop.state.step} of {loop.total}")
    else:
        ready.fit()
        loop.state.extra["before"] = [
            one.course.figures.full("test", "test before training", ready.chosen) for one in ready.learners
        ]
    loop.join(group, resumed)
    loop.run()
    state = loop.state
    return Done(state.step, state.history, state.extra["before"], loop.samples_per_second, loop.tokens_per_second)


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
    options: dict[str, Any] = {
        "multi_label": bool(data.info.get("multi_label")) if multi_label is None else multi_label
    }
    repeats = data.info.get("repeats") if request.task.repeats is None else request.task.repeats
    options |= {"repeats": repeats} | cls.of_base(base)
    options |= {"learns": objective} if objective in ("answers", "text") else {}
    rows: Sequence[Row] = data.split("train")
    if request.method == "zero-shot":  # which learns of no row, so that any may name the labels
        rows = [row for name in ("train", "dev", "test") for row in data.split(name)]
    task = cls.from_rows(rows, max_length=request.task.max_length, options=options)
    found: dict[str, Any] = {"objective": objective}
    if request.learning_rate is None and request.method == "full" and scratch.is_new(base):
        found["learning_rate"] = scratch.LEARNING_RATE * OPTIMISERS[request.optimizer].factor
    return task, request.model_copy(update=found)


def _say(ctx: Context, built: Built, courses: Sequence[Course], chosen: precision.Precision) -> None:
    heads = sum(p.numel() for p in built.others.parameters())
    part = f"{(built.trained + heads) / 1e6:.2f}M of {(built.parameters + heads) / 1e6:.2f}M parameters"
    ctx.note(f"training {part} in {chosen.name}: {chosen.why}")
    for course in courses:
        data = course.encoded
        if data.truncated:
            share = data.truncated / len(data.targets)
            ctx.note(f"{share:.1%} of the training texts are longer than {data.max_length} tokens and are cut")
        if data.empty:
            ctx.note(f"{data.empty} training rows {course.task.unlearnt}, and are left out")
        if isinstance(course.task, Generation) and course.task.template.is_default:
            ctx.note("the base model has no chat template: turns are written as `User:` and `Assistant:`")
    if not pictures.possible():
        ctx.note(pictures.MISSING)


def _room(request: TrainJobSpec, data: Encoded, base: Path, chosen: precision.Precision, ctx: Context) -> int | None:
    """The forecast of the peak in bytes; None on a GPU. Raises NeedsError when the machine surely has not so much."""
    if chosen.device.type != "cpu":
        return None
    lengths = data.lengths
    rows = Rows(len(lengths), float(lengths.mean()), int(lengths.max()))
    able = precision.choose("auto", ctx.device).name == "bf16"
    return require(request, check_config(base), rows, bf16=able, memory=ctx.device.free)


def _report(out: Path, found: Outcome, speed: Mapping[str, float], memory: Mapping[str, int], base: Path) -> None:
    """Beside the model, of the test rows, or of dev where there are none; nothing where nothing is held out."""
    held, course = found.held, found.course
    split = next((name for name in ("test", "dev") if held[name].rows), None)
    if split is None:
        return
    before = found.metrics["test"]["before"] if split == "test" else {}
    metric = course.objective.metric
    made = report.made(course.task, metric, split, held[split], before=before, speed=speed, memory=memory)
    report.write(out / report.FOLDER, f"{lineage.base_of(base)['source']}, trained", made)


def _card(ready: Prepared, found: Outcome, base: Path, done: Done) -> dict[str, Any]:
    request, course = ready.request, found.course
    task, built = course.task, course.built
    others = [one.course.task.name for one in ready.learners if one.name != found.name]
    return {
        "task": task.to_card(),
        "engine": "torch",
        "precision": "fp32",
        "base": lineage.base_of(base),
        "method": request.method,
        "metric": course.objective.metric,
        "metrics": found.metrics,
        "measured_in": course.measured.name,
        "parameters": built.parameters,
        "trained_parameters": built.trained,
        "adapted_modules": list(built.adapted),
        **({"applied": built.applied.kind} if built.applied is not None else {}),
        "train": lineage.training_of(request.plain()) | {"learning_rate": optimiser.peak(request)},
        **({"together": {"with": others, "temperature": request.temperature}} if others else {}),
        "steps": done.steps,
        "history": done.history,
        "data": lineage.data_of(found.data),
        "seed": request.seed,
        "versions": lineage.versions(),
        "code": lineage.code_digest(),
        **({"template_sha256": task.template.sha256} if isinstance(task, Generation) else {}),
    }
