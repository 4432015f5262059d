"""Several tasks learnt on one trunk: the head that each has of its own, and how they take turns.

Every batch is of one task. Of a task with n times the batches n^(1/T) times as many are drawn (temperature T: Raffel et
al. 2020, arXiv:1910.10683; Arivazhagan et al. 2019, arXiv:1907.05019), which every epoch meets to within one batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from llmo.data.dataset import Dataset
from llmo.engines.heads import logits_of, take_off
from llmo.errors import ModelError, SpecError
from llmo.files import publish_json
from llmo.jobspecs import ALSO, TrainJobSpec
from llmo.specs import TrainSpec
from llmo.tasks.base import Task
from llmo.tasks.card import CARD, FORMAT, write_golden
from llmo.training import dropout, norms
from llmo.training.batches import Encoded
from llmo.training.course import Course
from llmo.training.failures import disk_errors
from llmo.training.model import Built, open_base
from llmo.training.objectives import Inputs, Objective

FOLDER = "also"  # beside a trained model: what each other task has of its own, in a folder of its name
HEAD = "head.safetensors"
MEAN = "mean"  # of the tasks' metrics on dev: what decides which weights are best
CLOSE = 1e-3
TURNS = 1  # tells the random numbers of the turns from those of rows


@dataclass(frozen=True, slots=True)
class Learner:
    """One of the tasks that are learnt; the first has no name here."""

    name: str
    data: Dataset
    course: Course


class OnTrunk(nn.Module):
    """What one task has on a trunk that is another model's too; called as the whole model would be."""

    def __init__(self, trunk: nn.Module, head: Any) -> None:
        super().__init__()
        self.trunk, self.head, self.config = trunk, head, head.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=states)


def on_trunk(built: Built, base: Path, task: Task, spec: TrainSpec, *, on_cpu: bool) -> Built:
    """The model for another task on the trunk of `built`, which was made of the same `base`. Only its head is its own:
    it counts as `trained`, and is one of `built.others` from now on.

    Raises ModelError for an architecture where a head is not all that its models differ in, proved on a few tokens, and
    what `build` raises.
    """
    model = open_base(base, task, spec, on_cpu)
    if on_cpu:
        dropout.replace_dropout(model)
    norms.replace_norms(model)
    numbers = sum(p.numel() for p in model.parameters())
    whole = _says(model, built.pad_id)
    try:
        take_off(model)
        found = OnTrunk(built.network.base_model, model)
        parts = _says(found, built.pad_id)
    except (ValueError, AttributeError, TypeError) as error:
        raise _inseparable(model, base) from error
    if parts.shape != whole.shape or not torch.allclose(parts, whole, rtol=CLOSE, atol=CLOSE):
        raise _inseparable(model, base)
    built.others.append(model)
    return Built(found, sum(p.numel() for p in model.parameters()), numbers)


def _says(model: nn.Module, pad_id: int) -> torch.Tensor:
    """Of two texts, one of them shorter; the model's modes are put back."""
    ids, mask = torch.tensor([[4, 3, 2, 1], [1, 2, pad_id, pad_id]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        said = logits_of(model(input_ids=ids, attention_mask=mask), mask).float()
    for module, mode in modes:
        module.training = mode
    return said * mask[..., None] if said.ndim == 3 else said


def _inseparable(model: Any, base: Path) -> ModelError:
    return ModelError(
        f"the heads of '{model.config.model_type}' do not stand apart from its trunk, so that tasks cannot share one",
        hint="take an encoder such as BERT, RoBERTa or DistilBERT, or train each task by itself",
        where=str(base),
    )


def data_sets(inputs: Mapping[str, Path]) -> dict[str, Dataset]:
    """The rows of the other tasks by their names."""
    return {name.removeprefix(ALSO): Dataset.open(path) for name, path in inputs.items() if name.startswith(ALSO)}


def check(request: TrainJobSpec, given: Collection[str]) -> None:
    """Raises SpecError where the tasks of `also` and the data sets that are `given` for them are not the same."""
    named = [also.name for also in request.also]
    wrong = next((name for name in [*named, *given] if name not in named or name not in given), None)
    if wrong is not None:
        what = f"no input '{ALSO}{wrong}'" if wrong in named else f"the input '{ALSO}{wrong}', and is not in `also`"
        raise SpecError(
            f"the task '{wrong}' has {what}", hint=f"each task of `also` has an input {ALSO}NAME of `train`"
        )


def shares(batches: Sequence[int], temperature: float) -> NDArray[np.int64]:
    """How many batches of each source an epoch has, which is as long as all sources are together: one of each at least,
    and all of each at temperature 1."""
    whole = np.array(batches, np.float64) ** (1.0 / temperature)
    wanted = whole / whole.sum() * sum(batches)
    counts: NDArray[np.int64] = np.maximum(1, np.floor(wanted)).astype(np.int64)
    while counts.sum() < sum(batches):
        counts[np.argmax(wanted - counts)] += 1
    while counts.sum() > sum(batches):
        counts[np.argmax(np.where(counts > 1, counts - wanted, -np.inf))] -= 1
    return counts


@dataclass(frozen=True, slots=True)
class Mixed(Encoded):
    """The rows of several sources, numbered through."""

    sources: tuple[Encoded, ...] = field(kw_only=True)
    temperature: float = field(kw_only=True)

    @classmethod
    def of(cls, sources: Sequence[Encoded], temperature: float) -> Mixed:
        sizes = np.concatenate([np.diff(one.starts) for one in sources])
        return cls(
            np.concatenate([one.ids for one in sources]),
            np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
            [target for one in sources for target in one.targets],
            sum(one.truncated for one in sources),
            max(one.max_length for one in sources),
            sum(one.empty for one in sources),
            sources=tuple(sources),
            temperature=temperature,
        )

    def own(self, rows: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
        """The source of rows that are all of one, and their numbers there."""
        ends = np.cumsum([len(one) for one in self.sources])
        source = int(np.searchsorted(ends, rows[0], side="right"))
        return source, rows - (ends[source] - len(self.sources[source]))

    def per_epoch(self, batch_size: int) -> int:
        return sum(one.per_epoch(batch_size) for one in self.sources)

    def order(self, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
        """As of one source, but each goes through its own epochs at its own pace, from one epoch of all to the next."""
        counts = shares([one.per_epoch(batch_size) for one in self.sources], self.temperature)
        rng = np.random.default_rng([seed, epoch, TURNS])
        turns = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        places = [self._from(number, batch_size, seed, epoch * int(count)) for number, count in enumerate(counts)]
        return [next(places[number]) for number in turns]

    def _from(self, number: int, batch_size: int, seed: int, place: int) -> Iterator[NDArray[np.int64]]:
        """The batches of a source from its batch number `place` on, counted through all of its epochs."""
        source, first = self.sources[number], sum(len(one) for one in self.sources[:number])
        epoch, done = divmod(place, source.per_epoch(batch_size))
        while True:
            yield from (first + rows for rows in source.order(batch_size, seed, epoch)[done:])
            epoch, done = epoch + 1, 0


class Together:
    """The objectives of several tasks as one, of batches that are of one task each; they are equally well done when the
    `mean` of their metrics is best. All of them are better when higher."""

    metric = MEAN
    higher_is_better = True
    records = False

    def __init__(self, goals: Sequence[Objective], rows: Mixed) -> None:
        self._goals, self._rows = goals, rows
        self.part_tokens = goals[0].part_tokens

    def batch(self, rows: NDArray[np.int64], epoch: int) -> tuple[Inputs, torch.Tensor]:
        goal, own = self._own(rows)
        return goal.batch(own, epoch)

    def mass(self, targets: torch.Tensor, rows: NDArray[np.int64]) -> float:
        goal, own = self._own(rows)
        return goal.mass(targets, own)

    def loss(self, inputs: Inputs, targets: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        goal, own = self._own(rows)
        return goal.loss(inputs, targets, own)

    def _own(self, rows: NDArray[np.int64]) -> tuple[Objective, NDArray[np.int64]]:
        source, own = self._rows.own(rows)
        return self._goals[source], own


def joined(courses: Sequence[Course], temperature: float) -> tuple[Objective, Encoded]:
    """What is learnt, and from which rows; of one task its own."""
    if len(courses) == 1:
        return courses[0].objective, courses[0].encoded
    rows = Mixed.of([one.encoded for one in courses], temperature)
    return Together([one.objective for one in courses], rows), rows


def figures(learners: Sequence[Learner], found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of every task, of the other ones as `NAME.METRIC`, and the `mean` of those that decide."""
    said: dict[str, float] = {}
    for one, metrics in zip(learners, found, strict=True):
        said |= {f"{one.name}.{name}" if one.name else name: value for name, value in metrics.items()}
    deciding = [metrics[one.course.objective.metric] for one, metrics in zip(learners, found, strict=True)]
    return said | {MEAN: float(np.mean(deciding))}


def keep(folder: Path, built: Built, golden: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> None:
    """Write what another task has of its own, which the operation `part` makes a model of; `built` as `on_trunk` gave
    it. Raises StorageError when the disk does not take it."""
    head: Any = built.model.get_submodule("head")
    with disk_errors(folder):
        folder.mkdir(parents=True)
        head.config.save_pretrained(folder)
        save_file({name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / HEAD)
    write_golden(folder, golden)
    publish_json(folder / CARD, {"format": FORMAT, **card})
