"""What a training run will need, from arithmetic alone: memory, disk and steps, before anything is computed.

The constants were fitted to the peaks of real runs on two cores (MiniLM, 16 x 128 tokens, bf16: full 1329 MiB,
LoRA 1275, last-n 935, head 896); expect a fifth of error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmo.specs import TaskSpec, TrainSpec

PROCESS = 680 << 20  # Python with torch, transformers and pyarrow loaded
WIDE_VALUES = 24  # numbers kept per token, layer and unit of width for the backward pass
SQUARE_VALUES = 5  # numbers kept per layer, head and pair of tokens by the plain attention
BYTES_PER_ROW = 400  # of a tokenised row beyond its ids
EVALUATED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Forecast:
    """`memory_bytes` is the peak of the process; `disk_bytes` the checkpoints and the model folder."""

    memory_bytes: int
    disk_bytes: int
    steps: int


def forecast(
    train: TrainSpec, task: TaskSpec, model_config: Mapping[str, Any], rows: int, mean_length: float
) -> Forecast:
    """`model_config` is the base's config.json; `rows` the training rows, of `mean_length` tokens each."""
    shape = _Shape.of(model_config)
    total = shape.parameters
    trained = {
        "full": total,
        "last-n": shape.layer * min(train.last_n, shape.layers) + shape.width**2,
        "head": shape.width**2,
        "lora": train.lora.rank * shape.layers * (8 * shape.width + 2 * (shape.width + shape.inner)),
    }[train.method]
    length = min(task.max_length, max(8, round(mean_length * 1.5)))
    parts = -(-train.batch_size // train.gradient_accumulation_steps)
    deep = {"full": shape.layers, "lora": shape.layers, "last-n": min(train.last_n, shape.layers), "head": 0}[
        train.method
    ]
    per_layer = parts * length * (WIDE_VALUES * shape.width + SQUARE_VALUES * shape.heads * length)
    activations = 2 * per_layer * max(1, deep)
    evaluation = 4 * EVALUATED_TOKENS * (shape.inner + 6 * shape.width + shape.heads * length)
    optimiser = 12 if train.optimizer == "adamw" else 8
    weights = 4 * total + 2 * total + (optimiser + (4 if train.early_stopping else 0)) * trained
    tokens = rows * (4 * round(min(mean_length, task.max_length)) + BYTES_PER_ROW)
    steps = max(1, round(-(-rows // train.batch_size) * train.epochs))
    checkpoints = (
        2 * (optimiser + (4 if train.early_stopping else 0)) * trained
    )  # the old one goes when the new is whole
    return Forecast(
        memory_bytes=PROCESS + weights + max(activations, evaluation) + tokens,
        disk_bytes=checkpoints + 4 * total + (4 * trained if train.method == "lora" else 0),
        steps=steps,
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    positions: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Shape:
        """The names differ between families; where one is missing, BERT's usual proportion stands in."""

        def first(*names: str, default: int) -> int:
            return next((int(config[n]) for n in names if isinstance(config.get(n), int)), default)

        width = first("hidden_size", "dim", "d_model", "n_embd", default=768)
        return cls(
            width,
            first("intermediate_size", "hidden_dim", "ffn_dim", "d_ff", default=4 * width),
            first("num_hidden_layers", "n_layers", "n_layer", default=12),
            first("num_attention_heads", "n_heads", "n_head", default=max(1, width // 64)),
            first("vocab_size", default=30_000),
            first("max_position_embeddings", "n_positions", default=512),
        )

    @property
    def layer(self) -> int:
        return 4 * self.width * self.width + 2 * self.width * self.inner + 9 * self.width + self.inner

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.width * (self.vocabulary + self.positions + 4) + self.width**2
