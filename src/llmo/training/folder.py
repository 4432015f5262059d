"""Writes the trained model's folder: what plain transformers opens, and LLMO's evidence beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmo.engines.torch import quiet
from llmo.files import storage_errors
from llmo.tasks.base import Row, Task
from llmo.tasks.card import TOKENIZER, load_tokenizer, write_golden
from llmo.training.model import Built, merged
from llmo.training.scoring import Predict

ADAPTER = "adapter"
GOLDEN_TEXTS = 16
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def write(out: Path, built: Built, base: Path) -> None:
    """Weights, config and tokeniser; LoRA merged, with the adapter beside it. `built` is spent afterwards."""
    with storage_errors(out), quiet():
        if built.adapted:
            built.model.save_pretrained(out / ADAPTER)  # type: ignore[operator]
            (out / ADAPTER / "README.md").unlink(missing_ok=True)
        model: Any = merged(built)
        model.save_pretrained(out)
        for name in TOKENIZER_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, out / name)


def golden(out: Path, task: Task, base: Path, rows: Sequence[Row], predict: Predict) -> int:
    """Write what the training graph says of up to 16 texts, one at a time; returns how many."""
    picked = [rows[int(i)]["text"] for i in np.linspace(0, len(rows) - 1, min(GOLDEN_TEXTS, len(rows)))]
    encodings = task.encode(load_tokenizer(base), picked)
    found = []
    for text, encoding in zip(picked, encodings, strict=True):
        (logits,) = predict([encoding])
        found.append({"text": text, "input_ids": encoding.input_ids, "logits": logits.tolist()})
    write_golden(out, found)
    return len(found)
