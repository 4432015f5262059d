"""Opens the model whose shape is changed, and refuses before any computing what has no smaller shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.folder import card_applied
from llmo.engines.torch import open_model
from llmo.errors import DataError, ModelError
from llmo.tasks.base import Task
from llmo.tasks.card import load_task, load_tokenizer, read_card
from llmo.tasks.next_item import NextItem
from llmo.training import precision
from llmo.training.precision import Precision


@dataclass(frozen=True, slots=True)
class Source:
    """A trained encoder, opened at fp32 in eval mode on the device of `exact`, and the rows that it learnt of."""

    folder: Path
    card: Mapping[str, Any]
    task: Task
    tokenizer: Tokenizer
    model: Any
    data: Dataset
    exact: Precision

    @property
    def pad_id(self) -> int:
        """What fills a batch; it is masked out."""
        found = self.model.config.pad_token_id
        return found if isinstance(found, int) and found >= 0 else 0


def check(folder: Path, data: Dataset) -> Task:
    """The task of a folder that has smaller shapes. Raises ModelError for one that has none, DataError for rows that it
    cannot have learnt of."""
    card, task = read_card(folder), load_task(folder)
    if "reference" in card:
        raise ModelError(
            "this model is compressed already", hint="give the model that it was made from", where=str(folder)
        )
    if task.generates or task.hides or isinstance(task, NextItem):
        raise ModelError(
            f"a model for {task.name} has no smaller shape here",
            hint="shapes are of encoders that answer in one pass: classification, tagging, questions, numbers, vectors",
            where=str(folder),
        )
    if card_applied(folder) is not None:
        raise ModelError(
            f"the model runs with a {card_applied(folder)} beside its weights, which another shape would lose",
            hint="train with a method that changes the weights, such as full or lora",
            where=str(folder),
        )
    if data.info.get("task") != task.name:
        raise DataError(
            f"the data set was imported for {data.info.get('task')}, and the model is for {task.name}",
            hint="give the data set that the model was trained on",
        )
    if not len(data.split("train")):
        raise DataError("the data set has no training rows", hint="give the data set that the model was trained on")
    return task


def opened(folder: Path, data: Dataset, ctx: Context) -> Source:
    """Raises as `check` does, and ModelError for weights that do not fit their config."""
    task = check(folder, data)
    torch.set_num_threads(max(1, ctx.device.cores))
    exact = precision.choose("fp32", ctx.device)
    model = open_model(folder).to(exact.device)
    return Source(folder, read_card(folder), task, load_tokenizer(folder), model, data, exact)
