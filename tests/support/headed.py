"""Tiny model folders with a head and a card, as training leaves them, in several architectures; and further ones that
were trained on the trunk of such a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from llmo.engines.torch import quiet
from llmo.specs import LoraSpec, TrainSpec
from llmo.tasks.base import Task
from llmo.tasks.card import write_card
from llmo.tasks.text_classification import TextClassification
from llmo.training import folder as trained
from llmo.training.model import build
from support.tiny import HEADS, HIDDEN, INNER, LAYERS, POSITIONS, tiny_model

LABELS = {
    "text-classification": ["business", "sport", "tech"],
    "token-classification": ["O", "B-person", "I-person", "B-place", "I-place"],
}
HEADS_OF = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
}
SIZES: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": POSITIONS + 2},
    "mpnet": {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2},
}


def headed_model(
    folder: Path, task: str = "text-classification", architecture: str = "bert", *, seed: int = 0, max_length: int = 64
) -> Path:
    """A folder that opens in plain transformers, with random weights large enough that texts get unlike logits."""
    base = tiny_model(folder.with_name(folder.name + "-base"), seed)
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": AutoConfig.from_pretrained(base).vocab_size,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
            "max_position_embeddings": POSITIONS,
            **SIZES[architecture],
        },
    )
    config.num_labels = len(LABELS[task])
    torch.manual_seed(seed)
    model = HEADS_OF[task].from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.5 if "classifier" in name or "out_proj" in name else 0.15)
    with quiet():
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(base / name, folder / name)
    shutil.rmtree(base)
    card = {"task": task, "labels": LABELS[task], "max_length": max_length, "options": {}}
    write_card(folder, {"task": card, "engine": "torch", "precision": "fp32"})
    return folder


def further_model(folder: Path, base: Path, task: Task, method: str = "head", *, seed: int = 1, **lora: Any) -> Path:
    """A model trained on the trunk of `base`, by method `head`, `lora` or `full`: new weights where it trains."""
    torch.manual_seed(seed)
    built = build(base, task, TrainSpec(method=method, lora=LoraSpec(**lora)))
    with torch.no_grad():
        for name, weight in built.trainable():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.1 if "lora_" in name else 0.5)
    folder.mkdir(parents=True)
    trained.write(folder, built, base, task)
    write_card(folder, {"task": task.to_card(), "engine": "torch", "precision": "fp32", "method": method})
    return folder


def topics(labels: int, max_length: int = 64) -> TextClassification:
    return TextClassification([f"topic{i}" for i in range(labels)], max_length)
