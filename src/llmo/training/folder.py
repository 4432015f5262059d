"""Writes the trained model's folder for plain transformers, and takes the evidence that lies beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import GenerationConfig

from llmo.engines.torch import quiet
from llmo.files import publish_json
from llmo.tasks.base import Row, Task
from llmo.tasks.card import ADAPTER, TOKENIZER
from llmo.tasks.generation import Generation
from llmo.tasks.template import FILE as TEMPLATE
from llmo.training.failures import disk_errors
from llmo.training.model import Built, merged
from llmo.training.scoring import Predict

GOLDEN_TEXTS = 16
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
GENERATION = "generation_config.json"


def write(out: Path, built: Built, base: Path, task: Task) -> None:
    """Weights, config and tokeniser; what peft adapted is merged, with the adapter beside it, and what is applied
    beside the weights lies in the same place. `built` is spent afterwards.

    A model that writes keeps its chat template, and its generation settings with every token that ends an answer.
    """
    with disk_errors(out), quiet():
        if built.adapted:
            built.model.save_pretrained(out / ADAPTER)  # type: ignore[operator]
            (out / ADAPTER / "README.md").unlink(missing_ok=True)
        if built.applied is not None:
            built.applied.save(out / ADAPTER, built.network)
        model: Any = merged(built)
        if task.generates:
            # Its own would be checked, and refused for what transformers thinks odd; the base's file is kept as it is.
            model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        model.save_pretrained(out)
        if isinstance(task, Generation):
            _write_settings(out, base, task)
        for name in TOKENIZER_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, out / name)


def _write_settings(out: Path, base: Path, task: Generation) -> None:
    path = base / GENERATION
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends = list(task.end_ids)
    kept.pop("_from_model_config", None)  # else transformers would make it anew from the model's config
    publish_json(out / GENERATION, {**kept, "eos_token_id": ends[0] if len(ends) == 1 else ends})
    (out / TEMPLATE).write_text(task.template.source, encoding="utf-8")


def evidence(task: Task, tokenizer: Tokenizer, rows: Sequence[Row], predict: Predict) -> list[dict[str, Any]]:
    """What the training graph says of up to 16 inputs, one at a time: `[{"text", "input_ids", "logits"}]`, where `text`
    is all that was asked."""
    picked = [task.asked(rows[int(i)]) for i in np.linspace(0, len(rows) - 1, min(GOLDEN_TEXTS, len(rows)))]
    found = []
    for text, encoding in zip(picked, task.encode(tokenizer, picked), strict=True):
        (logits,) = predict([encoding])
        found.append({"text": text, "input_ids": encoding.input_ids, "logits": logits.tolist()})
    return found
