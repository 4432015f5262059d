"""Tiny model folders with a head and a card, as training leaves them, in several architectures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from llmo.engines.torch import quiet
from llmo.tasks.card import write_card
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
