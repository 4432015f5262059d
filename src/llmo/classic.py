"""The classic style: BERT and its tokeniser in a PyTorch loop of your own, kept in the store with one call.

The objects are plain transformers ones; what is added is where they come from (`package:NAME`, a folder, `hf:NAME`,
checked as every base model is) and a task, which says how rows become batches and logits become answers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import transformers
from tokenizers import Tokenizer
from torch.optim import AdamW

from llmo import sources
from llmo.context import NullContext
from llmo.engines.torch import quiet
from llmo.errors import ModelError
from llmo.specs import TrainSpec
from llmo.tasks.base import Row, Task
from llmo.tasks.card import TOKENIZER, write_card, write_golden
from llmo.tasks.text_classification import TextClassification
from llmo.tasks.token_classification import TokenClassification
from llmo.training import base, hub, lineage, scoring
from llmo.training.batches import padded, stacked
from llmo.training.failures import disk_errors
from llmo.training.folder import evidence
from llmo.training.model import build
from llmo.training.precision import Precision
from llmo.types import Artifact

__all__ = [
    "AdamW",
    "BERTForTextClassification",
    "BERTForTokenClassification",
    "BERTTokenizer",
    "Keeper",
    "batch",
    "evaluate",
    "save",
]


class Keeper(Protocol):
    """What keeps a finished folder under a name: `llmo.System`."""

    def save(self, folder: Path, name: str, card: Mapping[str, Any]) -> Artifact: ...


class BERTTokenizer:
    """Makes `transformers.BertTokenizer` objects."""

    @classmethod
    def from_pretrained(cls, source: str | Path) -> transformers.BertTokenizer:
        """`source`: a folder, `package:NAME` or `hf:NAME`. Raises ModelError for what is unsafe or incomplete."""
        folder = _folder(source)
        with quiet():
            made: transformers.BertTokenizer = transformers.BertTokenizer.from_pretrained(folder, local_files_only=True)
        return made


class _BERT:
    task: ClassVar[type[Task]]

    @classmethod
    def _open(cls, source: str | Path, task: Task) -> Any:
        folder = _folder(source)
        if not isinstance(task, cls.task):
            raise ModelError(
                f"{cls.__name__} learns {cls.task.name}, not {task.name}", hint=f"give a {cls.task.__name__}"
            )
        return build(folder, task, TrainSpec(), on_cpu=False).model


class BERTForTextClassification(_BERT):
    """Makes `transformers.BertForSequenceClassification` objects with the task's labels."""

    task = TextClassification

    @classmethod
    def from_pretrained(
        cls, source: str | Path, task: TextClassification
    ) -> transformers.BertForSequenceClassification:
        """A new head for the task's labels (the old one when they are the same), weights in fp32."""
        model: transformers.BertForSequenceClassification = cls._open(source, task)
        return model


class BERTForTokenClassification(_BERT):
    """Makes `transformers.BertForTokenClassification` objects with the task's labels."""

    task = TokenClassification

    @classmethod
    def from_pretrained(cls, source: str | Path, task: TokenClassification) -> transformers.BertForTokenClassification:
        """A new head for the task's labels (the old one when they are the same), weights in fp32."""
        model: transformers.BertForTokenClassification = cls._open(source, task)
        return model


def batch(tokenizer: Any, task: Task, rows: Sequence[Row], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Rows as `model(**batch)` takes them: `input_ids`, `attention_mask`, `labels` (-100 where nothing is learnt)."""
    encodings = task.encode(_backend(tokenizer), [row["text"] for row in rows])
    inputs = padded([e.input_ids for e in encodings], pad_id, task.max_length)
    targets = [task.target(row, encoding) for row, encoding in zip(rows, encodings, strict=True)]
    return {**inputs, "labels": stacked(targets, inputs["input_ids"].shape[1])}


def evaluate(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Every metric of the task over rows as `{"value", "low", "high"}`, with 95% bootstrap intervals."""
    tokens = scoring.Tokens(task, _backend(tokenizer), rows)
    scored = scoring.score(task, tokens, _predictor(model, task), NullContext(), "evaluate")
    return task.intervals(scored.tally)


def save(model: Any, tokenizer: Any, task: Task, name: str, into: Keeper, rows: Sequence[Row]) -> Artifact:
    """Keep the model as `name` in the store, as `train` would have: with its card, metrics and golden evidence.

    `rows` are held-out ones: the card's metrics and the evidence that `llmo verify` compares with come from them.
    """
    metrics = evaluate(model, tokenizer, task, rows)
    parameters = list(model.parameters())
    card = {
        "task": task.to_card(),
        "engine": "torch",
        "precision": "fp32",
        "method": "classic",
        "metric": task.metric,
        "metrics": {"dev": {}, "test": {"before": {}, "after": metrics}},
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "versions": lineage.versions(),
        "code": lineage.code_digest(),
    }
    with tempfile.TemporaryDirectory(prefix="llmo-classic-") as aside:
        folder = Path(aside) / "model"
        folder.mkdir()
        with disk_errors(folder), quiet():
            _write(model, tokenizer, task, folder)
        write_golden(folder, evidence(task, _backend(tokenizer), rows, _predictor(model, task)))
        write_card(folder, card)
        return into.save(folder, name, card)


def _write(model: Any, tokenizer: Any, task: Task, folder: Path) -> None:
    model.config.id2label = dict(enumerate(task.labels))
    model.config.label2id = {label: i for i, label in enumerate(task.labels)}
    model.config.problem_type = task.problem_type
    kept = {name: p.dtype for name, p in model.named_parameters() if p.dtype != torch.float32}
    if kept:
        raise ModelError(
            f"the model is not fp32: {next(iter(kept))} is {next(iter(kept.values()))}",
            hint="call model.float() before saving",
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _backend(tokenizer).save(str(folder / TOKENIZER))


def _predictor(model: Any, task: Task) -> scoring.Predict:
    place = next(model.parameters()).device
    pad_id = model.config.pad_token_id or 0
    return scoring.model_predictor(model, task, pad_id, Precision("fp32", place, "as it is saved"))


def _backend(tokenizer: Any) -> Tokenizer:
    """The Rust tokeniser inside; transformers sets its padding and truncation anew in each call, as a task does."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend


def _folder(source: str | Path) -> Path:
    scheme, _, rest = str(source).partition(":")
    folder = hub.fetch(rest) if scheme == "hf" else sources.resolve(str(source))
    found = base.inspect(folder)
    if found["model_type"] != "bert":
        raise ModelError(
            f"this is a {found['model_type']} model, not a BERT",
            hint="train it with llmo.train, which takes any encoder",
            where=str(source),
        )
    return folder
