"""What a training run will need, from arithmetic alone: memory, disk and steps, before anything is computed.

The constants were fitted to the peaks of real runs on two cores (MiniLM, 16 x 128 tokens, bf16: full 1329 MiB,
LoRA 1275, last-n 935, head 896; SmolLM2, 8 x 128 tokens, bf16, LoRA: 3486); expect a fifth of error. A causal model
keeps no cache of keys and values in training, and its logits are made a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmo.methods import METHODS
from llmo.specs import TaskSpec, TrainSpec
from llmo.training import trained

CHUNK_BYTES = 64 << 20  # of logits, as `causal` makes them; it brings torch, which this page does without

PROCESS = 680 << 20  # Python with torch, transformers and pyarrow loaded
WIDE_VALUES = 24  # numbers kept per token, layer and unit of width for the backward pass
GATED_VALUES = 5  # the same per unit of the inner width, where the feed-forward layer has a gate
LOGITS_BYTES = 4 * CHUNK_BYTES  # logits of a chunk, their fp32 copy and its gradients; never those of a batch
SQUARE_VALUES = 5  # numbers kept per layer, head and pair of tokens by the plain attention
BYTES_PER_ROW = 400  # of a tokenised row beyond its ids
EVALUATED_TOKENS = 4096
LONG_TEXT, LONG_CHAT = 1.5, 2.5  # how much longer than the mean the longest batch is


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
    writes = task.name == "generation"
    shape = _Shape.of(model_config, writes)
    total = shape.parameters
    learning = trained.numbers(train, shape, writes)
    spread = LONG_CHAT if writes else LONG_TEXT
    length = min(task.max_length, max(8, round(mean_length * spread)))
    parts = -(-train.batch_size // train.gradient_accumulation_steps) * (2 if train.objective == "preference" else 1)
    deep = trained.deep(train, shape.layers)
    wide = WIDE_VALUES * shape.width + (GATED_VALUES * shape.inner if writes else 0)
    per_layer = parts * length * (wide + SQUARE_VALUES * shape.heads * length)
    activations = 2 * per_layer * max(1, deep) + (LOGITS_BYTES if writes else 0)
    evaluation = 4 * EVALUATED_TOKENS * (shape.inner * shape.matrices + 6 * shape.width + shape.heads * length)
    state = round(4 * (1 + trained.kept(train)) * learning)  # with the gradients
    narrower = round((4 - trained.BASE_BYTES[train.base_weights]) * shape.layers * shape.layer)
    weights = 4 * total + 2 * total - narrower + state
    tokens = rows * (4 * round(min(mean_length, task.max_length)) + BYTES_PER_ROW)
    checkpoints = 2 * state  # the old one goes when the new is whole
    return Forecast(
        memory_bytes=PROCESS + weights + max(activations, evaluation) + tokens,
        disk_bytes=checkpoints
        + 4 * total
        + (4 * learning if METHODS[train.method].trains in ("low-rank", "scales", "beside") else 0),
        steps=trained.steps(train, rows),
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    positions: int
    narrow: int  # width of keys and values
    matrices: int  # between the width and the inner width: two, or three with a gate

    @classmethod
    def of(cls, config: Mapping[str, Any], writes: bool) -> _Shape:
        """The names differ between families; where one is missing, BERT's usual proportion stands in, and Llama's for
        a model that `writes`."""

        def first(*names: str, default: int) -> int:
            return next((int(config[n]) for n in names if isinstance(config.get(n), int)), default)

        width = first("hidden_size", "dim", "d_model", "n_embd", default=768)
        heads = first("num_attention_heads", "n_heads", "n_head", default=max(1, width // 64))
        narrow = width * first("num_key_value_heads", default=heads) // heads
        return cls(
            width,
            first("intermediate_size", "hidden_dim", "ffn_dim", "d_ff", default=4 * width),
            first("num_hidden_layers", "n_layers", "n_layer", default=12),
            heads,
            first("vocab_size", default=30_000),
            0 if writes else first("max_position_embeddings", "n_positions", default=512),
            narrow,
            3 if writes else 2,
        )

    @property
    def layer(self) -> int:
        attention = 2 * self.width * (self.width + self.narrow)
        return attention + self.matrices * self.width * self.inner + 9 * self.width + self.inner

    @property
    def adapted(self) -> int:
        """Sum over a layer's matrices of what they are wide on both sides: numbers of an adapter of rank 1."""
        return 4 * self.width + 2 * (self.width + self.narrow) + self.matrices * (self.width + self.inner)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.width * (self.vocabulary + self.positions + 4) + self.width**2
