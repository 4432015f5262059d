"""What a training run is made of besides its weights: the rows as tokens, what is made small, and what is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.applied import MeanHead
from llmo.errors import SpecError
from llmo.methods import LABELS_ONLY
from llmo.specs import TrainSpec
from llmo.tasks.base import Row, Task
from llmo.tasks.generation import Generation
from llmo.tasks.masked_lm import MaskedLm
from llmo.tasks.next_item import NextItem
from llmo.training import above, batches, folder, golden, places, preference, scoring, shots, tokens
from llmo.training.batches import Encoded
from llmo.training.causal import Speaker
from llmo.training.figures import Figures, Splits, TaskFigures
from llmo.training.model import Built
from llmo.training.objectives import Labels, Likelihood, Objective, Preference, VarlenLikelihood
from llmo.training.precision import Precision

SHAPES = {"messages": "answers", "text": "text", "preference": "preference"}
FITTING = {"messages": ("answers", "text"), "text": ("text",), "preference": ("preference", "answers")}


@dataclass(frozen=True, slots=True)
class Course:
    """`measured` is the precision of the final figures; `evidence` takes the golden answers, in fp32. `fit`, if any,
    makes the head that answers of where the trunk puts texts now; before anything is measured it has to be called."""

    encoded: Encoded
    objective: Objective
    figures: Figures
    measured: Precision
    built: Built
    task: Task
    tokenizer: Tokenizer
    fit: Callable[[], None] | None = None

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
    held = {name: scoring.Tokens(task, tokenizer, split) for name, split in splits.items()}
    alone = spec.parallelism == "data"  # else all processes have to run the layers as often
    speaker = Speaker(built.network, shares=alone) if isinstance(task, Generation) else None
    if isinstance(task, Generation) and speaker is not None and spec.objective == "preference":
        return _preferences(task, tokenizer, data, splits, built, speaker, spec, chosen, ctx)
    if spec.method in LABELS_ONLY:
        return _comparison(task, tokenizer, data, held, built, spec, chosen, exact, ctx)
    rows = data.split("train")
    encoded = tokens.encode(task, tokenizer, rows, lambda done: ctx.report(done, len(rows), phase="tokenise"), ctx)
    goal: Objective
    predictor: Callable[[Precision], scoring.Predict]
    if isinstance(task, MaskedLm | NextItem):
        goal, predictor = _places(task, encoded, built, spec, ctx)
    elif speaker is None:
        labels = Labels(built.model, task, encoded, spec, built.pad_id, chosen.device)
        plain = functools.partial(scoring.model_predictor, built.model, task, built.pad_id)
        lifted = above.lift(built, task, held["dev"], encoded, labels, spec, (chosen, exact), ctx)
        goal, predictor = lifted or (labels, plain)
    else:
        predictor = functools.partial(scoring.speaker_predictor, built.model, speaker, task, built.pad_id)
        flows = alone and chosen.device.type == "cuda" and chosen.name == "bf16" and speaker.flow()
        goal = (VarlenLikelihood if flows else Likelihood)(speaker, task, encoded, spec, built.pad_id)
        ctx.note(_rows(speaker, encoded, spec))
    figures = TaskFigures(task, held, predictor, ctx)
    return Course(encoded, goal, figures, exact if speaker is None else chosen, built, task, tokenizer)


def _places(
    task: MaskedLm | NextItem, encoded: Encoded, built: Built, spec: TrainSpec, ctx: Context
) -> tuple[Objective, Callable[[Precision], scoring.Predict]]:
    found = places.Places(built.network)
    if not found.apart:
        ctx.note("this architecture's head does not run by itself: all logits are made, which takes longer")
    if isinstance(task, MaskedLm):
        predictor = functools.partial(places.hidden_predictor, built.model, found, task, built.pad_id)
        return places.Masked(found, task, encoded, spec.seed, built.pad_id), predictor
    predictor = functools.partial(places.last_predictor, built.model, found, task, built.pad_id)
    return places.AtPlaces(found, task, encoded, built.pad_id), predictor


def _comparison(
    task: Task,
    tokenizer: Tokenizer,
    data: Dataset,
    held: Mapping[str, scoring.Tokens],
    built: Built,
    spec: TrainSpec,
    chosen: Precision,
    exact: Precision,
    ctx: Context,
) -> Course:
    """Texts compared with each other, or with a sentence about each label."""
    head = built.applied
    assert isinstance(head, MeanHead)  # noqa: S101 (as `adapters` made it)
    rows = data.split("train")
    shots.check(task, rows, spec)
    if spec.method == "zero-shot":
        texts = shots.sentences(task, tokenizer, spec)
        labels = np.arange(len(texts))
        encoded = batches.joined(texts, [np.asarray(i) for i in labels], task.max_length)
    else:
        texts = task.encode_rows(tokenizer, list(rows))
        labels = np.array([int(task.target(row, text)) for row, text in zip(rows, texts, strict=True)], np.int64)
        encoded = shots.pairs(texts, labels, spec.pairs, spec.seed, task.max_length)

    def fit() -> None:
        points = shots.points_of(built, texts, exact, task.max_length)
        if spec.method == "zero-shot":
            shots.name_labels(head, points)
        else:
            shots.fit(head, points, torch.from_numpy(labels), task, spec)

    predictor = functools.partial(scoring.model_predictor, built.model, task, built.pad_id)
    figures = TaskFigures(task, held, predictor, ctx)
    return Course(encoded, shots.Contrast(built, task, encoded), figures, exact, built, task, tokenizer, fit)


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
    ctx.note(_rows(speaker, encoded, spec))
    goal = Preference(speaker, encoded, start["train"], spec, built.pad_id)
    figures = preference.PairFigures(built, speaker, held, start, spec.beta, ctx)
    return Course(encoded, goal, figures, chosen, built, task, tokenizer)


def _rows(speaker: Speaker, data: Encoded, spec: TrainSpec) -> str:
    """How rows lie in a batch, and what the other way would pad."""
    sizes = np.diff(data.starts)
    batch_sizes = [sizes[data.sequences(rows)] for rows in batches.order(data.lengths, spec.batch_size, spec.seed, 0)]
    padded = sum(len(one) * batches.width(int(one.max()), data.max_length) for one in batch_sizes)
    share = 1.0 - int(sizes.sum()) / padded
    if speaker.packs or speaker.varlen:
        return (
            f"rows go end to end, each attending to itself: padding them by length would add {share / (1 - share):.0%}"
        )
    return f"rows are padded in batches of like length, which is {share:.0%} of the tokens: {speaker.why}"
