"""Trims a model's vocabulary to what the training texts use: often half of a small encoder is rows nobody looks up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from llmo.compression.shapes import folder, tokens
from llmo.compression.shapes.source import Source, opened
from llmo.compression.shapes.tokens import Trimmed
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.engines.folder import position_limit, read_config
from llmo.errors import ModelError
from llmo.tasks.base import Row, Task, sequences
from llmo.tasks.card import TOKENIZER

SETTINGS, ADDED = "tokenizer_config.json", "added_tokens.json"


def trim(model: Path, data: Dataset, out: Path, ctx: Context) -> dict[str, Any]:
    """Write the model with the tokens that its training texts have as it reads them (cut to `max_length`), and with all
    special tokens, bytes, and single characters of the scripts that the texts are written in.

    The training texts have the same tokens as before, and so the same answers bit for bit; a text with a token that
    is gone is spelled in smaller ones. Returns `{"step": "vocabulary", "kept", "dropped" (tokens), "dev": {"tokens",
    "changed" (those that are gone), "texts", "changed_texts"}, "parameters", "metrics"}`. Raises ModelError for a
    vocabulary that cannot be trimmed, DataError, InputError.
    """
    with folder.made(out) as aside:
        source = opened(model, data, ctx)
        rows = list(data.split("train"))
        before = _read(source.task, source.tokenizer, rows)
        used = set(chain.from_iterable(before)) | set(_config_ids(source.model.config).values())
        if position_limit(read_config(model)) != source.model.config.max_position_embeddings:
            used |= set(range(source.pad_id + 1))  # positions are counted from the padding's id, which must stay
        trimmed = tokens.trimmed(source.tokenizer, used, list(_texts(source.task, rows)))
        _prove(trimmed, before, _read(source.task, trimmed.tokenizer, rows))
        size = source.model.get_input_embeddings().num_embeddings
        dev = _changed(source, trimmed)
        _gather(source.model, trimmed)
        step = {"step": "vocabulary", "kept": len(trimmed.kept), "dropped": size - len(trimmed.kept), "dev": dev}
        ctx.note(
            f"{step['kept']} of {size} tokens are kept; of dev's {dev['tokens']} tokens {dev['changed']} are spelled "
            "in smaller ones"
        )
        smaller = replace(source, tokenizer=trimmed.tokenizer)
        return folder.write(smaller, source.model, step, aside, ctx, _files(model, trimmed))


def _texts(task: Task, rows: Sequence[Row]) -> Iterator[str]:
    return chain.from_iterable(task.given(task.asked(row)) for row in rows)


def _read(task: Task, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[list[int]]:
    """All that the model reads of the rows, to learn of them and to answer them."""
    learnt = [encoding for _, encoding in task.lessons(tokenizer, rows)]
    return sequences([*learnt, *task.encode_rows(tokenizer, rows)])


def _prove(trimmed: Trimmed, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> None:
    """Raises ModelError unless all is read as before."""
    wrong = sum([trimmed.kept[i] for i in now] != list(was) for was, now in zip(before, after, strict=False))
    if wrong or len(before) != len(after):
        raise ModelError(
            f"with fewer tokens {wrong} of {len(before)} training texts are divided otherwise",
            hint="leave the vocabulary of this model whole",
        )


def _changed(source: Source, trimmed: Trimmed) -> dict[str, int]:
    """How many of dev's tokens are gone, and in how many texts."""
    rows, kept = list(source.data.split("dev")), set(trimmed.kept)
    found = sequences(source.task.encode_rows(source.tokenizer, rows))
    gone = [sum(i not in kept for i in ids) for ids in found]
    return {
        "tokens": sum(map(len, found)),
        "changed": sum(gone),
        "texts": len(found),
        "changed_texts": sum(map(bool, gone)),
    }


@torch.no_grad()
def _gather(model: Any, trimmed: Trimmed) -> None:
    """Leave of the embedding the rows that are kept, and of the config their new ids."""
    old = model.get_input_embeddings()
    rows = torch.tensor(trimmed.kept, device=old.weight.device)
    if int(rows.max()) >= old.num_embeddings:
        raise ModelError("the tokeniser has tokens that the model has no embedding of", hint="train the model again")
    named = _config_ids(model.config)
    new = trimmed.new
    padding = None if old.padding_idx is None else new[old.padding_idx]
    embedding = nn.Embedding(len(rows), old.embedding_dim, padding, device=old.weight.device)
    embedding.weight.copy_(old.weight[rows])
    model.set_input_embeddings(embedding.eval())
    model.config.vocab_size = len(rows)
    for name, i in named.items():
        setattr(model.config, name, new[i])


def _config_ids(config: Any) -> dict[str, int]:
    """The ids of tokens that a config names, below its vocabulary's size (some name one that is not there)."""
    found = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    return {name: i for name, i in found.items() if isinstance(i, int) and 0 <= i < config.vocab_size}


def _files(model: Path, trimmed: Trimmed) -> dict[str, str]:
    """The tokeniser's files that say something else now."""
    found = {TOKENIZER: trimmed.text}
    if (model / SETTINGS).is_file():
        found[SETTINGS] = _json(tokens.settings(_object(model / SETTINGS), trimmed.new))
    if (model / ADDED).is_file():
        ids = _object(model / ADDED)
        found[ADDED] = _json({token: trimmed.new[i] for token, i in ids.items() if i in trimmed.new})
    return found


def _object(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
