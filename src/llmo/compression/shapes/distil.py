"""A smaller student of a trained model, and the short training that brings any shape back to what its teacher says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn

from llmo.compression.shapes import anatomy, columns, fake, folder, more
from llmo.compression.shapes import layers as stack
from llmo.compression.shapes.imitation import Imitation, Nearness, taught
from llmo.compression.shapes.source import Source, check, opened
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.errors import ModelError, SpecError
from llmo.files import digest_of_value, sha256_file
from llmo.specs import TrainSpec
from llmo.tasks.base import Encoding
from llmo.training import batches, checkpoint, precision, scoring
from llmo.training.batches import Encoded
from llmo.training.loop import Loop
from llmo.training.model import DROPOUTS, Built, build, layers
from llmo.training.objectives import Labels

EVALUATIONS = 6


def student(
    teacher: Path, data: Dataset, out: Path, ctx: Context, *, keep: int, inner: int | None = None
) -> dict[str, Any]:
    """Write a student made of `keep` of the teacher's layers, evenly spread with the last one among them (Sanh et al.
    2019, DistilBERT, arXiv:1910.01108), with a feed-forward width of `inner` where that is given (`columns.narrow`).

    It knows little until it is trained (`recover`). Returns `{"step": "student", "kept": [numbers], "inner",
    "parameters", "metrics"}`. Raises ModelError, DataError, InputError, Stopped.
    """
    with folder.made(out) as aside:
        source = opened(teacher, data, ctx)
        there = len(layers(source.model))
        kept = list(anatomy.spread(anatomy.count(keep, there, "layers"), there))
        if inner is not None:
            anatomy.count(inner, anatomy.anatomy(source.model)[0].up.out_features, "feed-forward columns")
            columns.keep_columns(source, ctx, inner)
        stack.keep_layers(source.model, kept)
        return folder.write(source, source.model, {"step": "student", "kept": kept, "inner": inner}, aside, ctx)


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a shape is trained again, on `samples` rows in all: its time does not depend on how many there are.

    Beside the training rows there are `parts` of their texts where the task allows it (`more`); by default so many that
    nothing is seen twice. The loss is told in `Imitation`; with `hidden` above 0 the teacher runs beside the student in
    every step, which takes twice the time. `int8` computes the layers as they will be when they are quantised (`fake`).
    Dev is measured six times; after `patience` of them without gain it ends, and has the best weights.
    """

    samples: int = 12_000
    learning_rate: float = 4e-4
    batch_size: int = 16
    temperature: float = 2.0
    hidden: float = 0.0
    labels: float = 0.5
    parts: int | None = None
    int8: bool = False
    patience: int = 3
    seed: int = 13

    def __post_init__(self) -> None:
        """Raises SpecError for a number that makes no sense."""
        above = ("samples", "learning_rate", "batch_size", "temperature", "patience")
        wrong = [name for name in above if getattr(self, name) <= 0]
        wrong += [name for name in ("hidden", "labels") if getattr(self, name) < 0]
        wrong += ["parts"] if self.parts is not None and self.parts < 0 else []
        if wrong:
            raise SpecError(f"{wrong[0]} of a recovery is {getattr(self, wrong[0])}", hint="give a positive number")


def recover(
    student: Path, teacher: Path, data: Dataset, out: Path, ctx: Context, how: Recovery | None = None
) -> dict[str, Any]:
    """Write the student, trained on what the teacher says of the training texts and of parts of them; dev says when it
    is best, and test is not looked at. Linear weights of its layers that are zero stay zero.

    The student's vocabulary may be a part of the teacher's. A run that was stopped goes on from its last checkpoint in
    `ctx.checkpoint()`. Returns `{"step": "recovery", ..., "rows", "steps", "seconds", "parameters", "metrics"}`.
    Raises ModelError for two that do not belong together, DataError, InputError, JobFailed when the loss is lost, and
    Stopped.
    """
    how = how or Recovery()
    check(student, data)
    with folder.made(out) as aside:
        guide, mine = opened(teacher, data, ctx), opened(student, data, ctx)
        ids = translation(mine, guide)
        own = _Own(
            ctx, digest_of_value([sha256_file(f / "model.safetensors") for f in (student, teacher)] + [asdict(how)])
        )
        run = _Run(mine, guide, ids, how, own)
        loop = run.train()
        step = {
            "step": "recovery",
            **asdict(how),
            "rows": [run.labelled, len(run.encoded) - run.labelled],
            "steps": loop.state.step,
            "best_step": loop.state.best_step or loop.state.step,
            "samples_per_second": round(loop.samples_per_second, 1),
        }
        found = folder.write(mine, run.plain(), step, aside, ctx)
    checkpoint.clear(own.checkpoint())
    return found


def translation(student: Source, teacher: Source) -> NDArray[np.int64]:
    """The teacher's id of each id of the student. Raises ModelError for two that do not belong together."""
    if student.task.to_card() != teacher.task.to_card():
        raise ModelError(
            "the student and the teacher were trained for different tasks", hint="give the model it was made from"
        )
    widths = [x.model.config.hidden_size for x in (student, teacher)]
    if widths[0] != widths[1]:
        raise ModelError(
            f"the student's hidden states have {widths[0]} numbers, the teacher's {widths[1]}",
            hint="give the model that the student was made from",
        )
    return _translated(student.tokenizer, teacher.tokenizer, student.model.get_input_embeddings().num_embeddings)


def _translated(student: Tokenizer, teacher: Tokenizer, size: int) -> NDArray[np.int64]:
    theirs = teacher.get_vocab(with_added_tokens=True)
    found = np.zeros(size, np.int64)
    for token, i in student.get_vocab(with_added_tokens=True).items():
        if token not in theirs:
            raise ModelError(
                f"the student has the token {token!r}, which the teacher does not know",
                hint="give the model that the student was made from",
            )
        if i < size:
            found[i] = theirs[token]
    return found


class _Run:
    """One recovery: the student as it is trained, its rows, and the loop over them."""

    def __init__(self, student: Source, teacher: Source, ids: NDArray[np.int64], how: Recovery, ctx: Context) -> None:
        self._source, self._how, self._ctx = student, how, ctx
        self._chosen = precision.choose("auto", ctx.device)
        checkpoint.seed_everything(how.seed)
        dev = student.data.split("dev")
        self.labelled, self.encoded = self._rows()
        self._spec = TrainSpec(
            epochs=how.samples / len(self.encoded),
            evaluate_every=max(1, round(how.samples / how.batch_size / EVALUATIONS)),
            batch_size=how.batch_size,
            learning_rate=how.learning_rate,
            early_stopping=how.patience if len(dev) else None,
            dropout=0.0,
            seed=how.seed,
        )
        on_cpu = self._chosen.device.type == "cpu"
        self._built = build(student.folder, student.task, self._spec, on_cpu=on_cpu)
        self._built.model.to(self._chosen.device)
        inner = Labels(
            self._built.model, student.task, self.encoded, self._spec, self._built.pad_id, self._chosen.device
        )
        says = scoring.model_predictor(teacher.model, student.task, teacher.pad_id, self._chosen)
        self._held = scoring.Tokens(student.task, student.tokenizer, folder.sample(dev, folder.MOST_ROWS))
        shown = self._held.chunk(0, len(dev))[1] if len(dev) else []
        keys = [tuple(encoding.input_ids) for encoding in shown]
        self._wanted = dict(zip(keys, taught(says, ids, shown, ctx), strict=True))
        told = None if how.hidden else taught(says, ids, _each(self.encoded), ctx)
        about = (ids, student.task, self.encoded, self.labelled, inner, told)
        self._objective = Imitation(
            self._built,
            teacher.model,
            *about,
            temperature=how.temperature,
            hidden=how.hidden,
            labels=how.labels,
        )

    def _rows(self) -> tuple[int, Encoded]:
        """How many training rows there are, and these with the parts of them that were made."""
        task, tokenizer, rows = self._source.task, self._source.tokenizer, list(self._source.data.split("train"))
        labelled = batches.encode(
            task, tokenizer, rows, lambda done: self._ctx.report(done, len(rows), phase="tokenise")
        )
        count = self._how.samples - len(labelled) if self._how.parts is None else self._how.parts
        made = more.parts(task, tokenizer, rows, count, self._how.seed) if count > 0 and more.possible(task) else []
        return len(labelled), more.joined(labelled, made)

    def _on_dev(self) -> dict[str, float]:
        task = self._source.task
        predict = scoring.model_predictor(self._built.model, task, self._built.pad_id, self._chosen)
        near = Nearness(predict, self._wanted)
        found = task.figures(scoring.score(task, self._held, near, self._ctx, "dev").tally)
        return {**found, self._objective.metric: near.of(found[task.metric], task.higher_is_better)}

    def train(self) -> Loop:
        """The loop, at its end."""
        quantised = [m for m in layers(self._built.network).modules() if isinstance(m, nn.Linear)]
        with fake.quantised(quantised if self._how.int8 else []):
            evaluate = self._on_dev if len(self._held.rows) else None
            about = (self._spec, self.encoded, evaluate, self._ctx, self._chosen)
            loop = Loop(self._built, self._source.task, self._objective, *about)
            if loop.resume():
                self._ctx.note(f"resumed from the checkpoint of step {loop.state.step} of {loop.total}")
            handles = keep_zeros(self._built)
            loop.run()
            for handle in handles:
                handle.remove()
        return loop

    def plain(self) -> Any:
        """The trained model, as it is saved: with the dropout that it had."""
        network = self._built.network.to(self._source.exact.device)
        before = self._source.model.config
        for name in DROPOUTS:
            if hasattr(before, name):
                setattr(network.config, name, getattr(before, name))
        return network


def _each(data: Encoded) -> list[Encoding]:
    """Its sequences one by one."""
    found = [data.sequence(i).tolist() for i in range(len(data.starts) - 1)]
    return [Encoding(ids, len(ids), [], []) for ids in found]


def keep_zeros(built: Built) -> list[Any]:
    """Have the layers' matrices learn only where they are not zero now: their gradient is zero elsewhere, and so is
    what an optimiser that scales each weight's gradient, or decays it, makes of it. Returns the hooks."""
    found = []
    for linear in layers(built.network).modules():
        if isinstance(linear, nn.Linear) and bool((linear.weight == 0).any()):
            there = (linear.weight != 0).detach()
            found.append(linear.weight.register_hook(_times(there)))  # type: ignore[no-untyped-call]
    return found


def _times(there: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda slope: slope * there


class _Own:
    """A context whose checkpoints are one recovery's: a job may run several."""

    def __init__(self, ctx: Context, digest: str) -> None:
        self._ctx = ctx
        self._name = f"recovery-{digest.removeprefix('sha256:')[:16]}"

    def checkpoint(self) -> Path:
        found = self._ctx.checkpoint() / self._name
        found.mkdir(parents=True, exist_ok=True)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)
