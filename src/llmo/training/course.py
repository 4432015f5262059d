"""What a training run is made of besides its weights: the rows as tokens, what is made small, and what is measured."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.errors import SpecError
from llmo.specs import TrainSpec
from llmo.tasks.base import Row, Task
from llmo.tasks.generation import Generation
from llmo.training import batches, folder, golden, preference, scoring
from llmo.training.batches import Encoded
from llmo.training.causal import Speaker
from llmo.training.figures import Figures, Splits, TaskFigures
from llmo.training.model import Built
from llmo.training.objectives import Labels, Likelihood, Objective, Preference
from llmo.training.precision import Precision

SHAPES = {"messages": "answers", "text": "text", "preference": "preference"}
FITTING = {"messages": ("answers", "text"), "text": ("text",), "preference": ("preference", "answers")}


@dataclass(frozen=True, slots=True)
class Course:
    """`measured` is the precision of the final figures; `evidence` takes the golden answers, in fp32."""

    encoded: Encoded
    objective: Objective
    figures: Figures
    measured: Precision
    built: Built
    task: Task
    tokenizer: Tokenizer

    def evidence(self, rows: Sequence[Row], exact: Precision) -> list[dict[str, Any]]:
        if isinstance(self.task, Generation):
            return golden.evidence(self.task, self.tokenizer, rows, self.built, exact)
        predict = scoring.model_predictor(self.built.model, self.task, self.built.pad_id, exact)
        return folder.evidence(self.task, self.tokenizer, rows, predict)


def resolve(spec: TrainSpec, task: type[Task], shape: str | None) -> str:
    """The objective that `auto` stands for. Raises SpecError for one that the task or the data do not fit."""
    if not task.generates:
        if spec.objective != "auto":
            raise SpecError(
                f"the objective '{spec.objective}' is of task generation, not of {task.name}",
                hint="leave train.objective out",
            )
        if not task.has_classes and (spec.class_weights != "none" or spec.label_smoothing > 0):
            raise SpecError(
                f"class_weights and label_smoothing are of tasks with classes, and {task.name} has none",
                hint="leave train.class_weights and train.label_smoothing out",
            )
        return "auto"
    if spec.class_weights != "none":
        raise SpecError("class_weights are of tasks with labels", hint="leave train.class_weights out")
    known = shape if shape in SHAPES else "messages"
    if spec.objective == "auto":
        return SHAPES[known]
    if spec.objective not in FITTING[known]:
        raise SpecError(
            f"the objective '{spec.objective}' does not fit the data set, whose rows are of shape '{known}'",
            hint=f"set train.objective to auto, or to {' or '.join(FITTING[known])}",
        )
    return spec.objective


def plan(
    task: Task,
    tokenizer: Tokenizer,
    data: Dataset,
    built: Built,
    spec: TrainSpec,
    chosen: Precision,
    exact: Precision,
    ctx: Context,
) -> Course:
    """Tokenise, and put together what fits the objective (`spec.objective` as `resolve` gave it)."""
    splits = {name: data.split(name) for name in ("dev", "test")}
    speaker = Speaker(built.network) if isinstance(task, Generation) else None
    if isinstance(task, Generation) and speaker is not None and spec.objective == "preference":
        return _preferences(task, tokenizer, data, splits, built, speaker, spec, chosen, ctx)
    rows = data.split("train")
    encoded = batches.encode(task, tokenizer, rows, lambda done: ctx.report(done, len(rows), phase="tokenise"))
    goal: Objective
    if speaker is None:
        predictor = functools.partial(scoring.model_predictor, built.model, task, built.pad_id)
        goal = Labels(built.model, task, encoded, spec, built.pad_id, chosen.device)
    else:
        predictor = functools.partial(scoring.speaker_predictor, built.model, speaker, task, built.pad_id)
        goal = Likelihood(speaker, task, encoded, spec, built.pad_id)
    figures = TaskFigures(task, tokenizer, splits, predictor, ctx)
    return Course(encoded, goal, figures, exact if speaker is None else chosen, built, task, tokenizer)


def _preferences(
    task: Generation,
    tokenizer: Tokenizer,
    data: Dataset,
    splits: Splits,
    built: Built,
    speaker: Speaker,
    spec: TrainSpec,
    chosen: Precision,
    ctx: Context,
) -> Course:
    rows = data.split("train")
    encoded = preference.encode(task, tokenizer, rows, lambda done: ctx.report(done, len(rows), phase="tokenise"))
    held = {name: preference.encode(task, tokenizer, split) for name, split in splits.items() if len(split)}
    start = preference.references(built, speaker, {"train": encoded, **held}, chosen, ctx)
    goal = Preference(speaker, encoded, start["train"], spec, built.pad_id)
    figures = preference.PairFigures(built, speaker, held, start, spec.beta, ctx)
    return Course(encoded, goal, figures, chosen, built, task, tokenizer)
