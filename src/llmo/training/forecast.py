"""What a training run will need, from arithmetic alone: memory, disk and steps, before anything is computed.

The bytes kept for the backward pass were counted tensor by tensor; the few constants that no arithmetic gives (the
libraries, what the allocator loses) were fitted to the runs of benchmarks/forecast.py, which docs/forecast.md lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmo.methods import METHODS
from llmo.specs import TaskSpec, TrainSpec
from llmo.training import trained
from llmo.training.trained import USED, leaves_unused_rows

# Of `causal` and `scoring`, which bring torch.
CHUNK_BYTES = 64 << 20  # of fp32 logits at once
EVALUATED_TOKENS = 4096  # run at once to measure
EVALUATED_ROWS = 2048  # encoded at once to measure

PROCESS = 540 << 20  # Python with torch, transformers and pyarrow loaded, and what they make at their first use
LOST = 1.3  # activations come and go in many sizes, and the allocator does not give all of it back
ADAPTED = 1.15  # the same of adapters, whose products and sums come and go beside those of the layer
# Packed batches are of another size at every step, and the allocator keeps some of each: after so many steps this much
# more is held. (Measured on 672 conversations, 84 steps.)
GROWN, SETTLED = 0.9, 50
PASSING = 1.0  # layers' worth of gradients of activations on the way back, while all activations are there
RECOMPUTED = 1.6  # the same where a layer's activations are made again meanwhile
LOGITS = 4  # of a chunk: the logits, their softmax, its gradient, and the copy in the precision of the product
ROW_BYTES = 200  # of a tokenised row beyond its ids
TOKEN_BYTES = 12  # of a token in it: its id, and where every token has a target that too
ENCODING_BYTES = 200  # of a token of a text whose answer is to be read off it
LISTED_BYTES = 40  # of a token until all rows are encoded
MULTIPLE = 8  # batches are padded to
HEAPS = 16.0, 0.55  # different tokens of a text of n: 16 n^0.55 (Heaps' law; fitted to BBC news)


@dataclass(frozen=True, slots=True)
class Rows:
    """The training rows: how many, and their lengths in tokens, not yet cut."""

    count: int
    mean: float
    longest: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """`memory_bytes` is the peak of the process, `phase` where it is; `disk_bytes` the checkpoints and the model
    folder; `parameters` are the model's."""

    memory_bytes: int
    disk_bytes: int
    steps: int
    phase: str
    parameters: int


def forecast(
    train: TrainSpec, task: TaskSpec, model_config: Mapping[str, Any], rows: Rows, *, bf16: bool = True
) -> Forecast:
    """`model_config` is the base's config.json; `bf16` whether the training computes in it."""
    writes = task.name == "generation"
    shape = _Shape.of(model_config, writes)
    mean = min(rows.mean, task.max_length)
    compared = task.name == "sentence-embedding" or train.method == "few-shot"
    group = 2 if compared or train.objective == "preference" else 1
    whole = writes or compared  # rows that are told apart from each other are computed together
    unused = 0 if writes else _unused(train, shape, rows.count * mean)
    longest = _padded(rows.longest, task.max_length)
    run = _Run(train, shape, writes, whole, group, bf16, longest, rows.count, unused)
    phases = run.phases(rows, mean)
    phase = max(phases, key=lambda name: phases[name])
    kept = run.state_bytes + 4 * run.learning
    adapter = 4 * run.learning if METHODS[train.method].trains in ("low-rank", "scales", "beside") else 0
    return Forecast(
        memory_bytes=PROCESS + phases[phase],
        disk_bytes=2 * kept + 4 * shape.parameters + adapter,
        steps=trained.steps(train, rows.count),
        phase=phase,
        parameters=shape.parameters,
    )


def _unused(train: TrainSpec, shape: _Shape, tokens: float) -> int:
    """Numbers of the embedding that need no gradient, as no text uses them (see `vocabulary`)."""
    used = round(HEAPS[0] * tokens ** HEAPS[1])
    learns = train.method in ("full", "few-shot") and leaves_unused_rows(train)
    return (shape.vocabulary - used) * shape.width if learns and used <= USED * shape.vocabulary else 0


def micro_batch(train: TrainSpec) -> int:
    """Rows that are computed at once."""
    return -(-train.batch_size // train.gradient_accumulation_steps)


def _padded(longest: int, limit: int) -> int:
    """The width of the widest batch: texts of like length are together, so the longest have theirs to themselves."""
    return min(-(-max(longest, MULTIPLE) // MULTIPLE) * MULTIPLE, limit)


@dataclass(frozen=True, slots=True)
class _Run:
    train: TrainSpec
    shape: _Shape
    writes: bool
    whole: bool  # whether a micro-batch is computed in one
    group: int  # sequences of a row
    bf16: bool
    length: int  # tokens of the widest batch's rows
    rows: int  # that there are
    unused: int  # numbers of the embedding that do not learn

    @property
    def learning(self) -> int:
        """Numbers that change."""
        return trained.numbers(self.train, self.shape, self.writes) - self.unused

    @property
    def deep(self) -> int:
        """Layers that gradients go through."""
        return trained.deep(self.train, self.shape.layers)

    @property
    def state_bytes(self) -> int:
        """What is kept of each number that changes, beside itself and its gradient."""
        return round(4 * trained.kept(self.train) * self.learning)

    def phases(self, rows: Rows, mean: float) -> dict[str, int]:
        """Bytes beyond the libraries' at each point where the peak may be."""
        train, shape = self.train, self.shape
        narrower = round((4 - trained.BASE_BYTES[train.base_weights]) * shape.layers * shape.layer)
        weights = 4 * shape.parameters - narrower
        data = rows.count * (ROW_BYTES + round(TOKEN_BYTES * mean))
        kept = weights + data + self.state_bytes
        encoded = round(min(rows.count, EVALUATED_ROWS) * mean) * ENCODING_BYTES
        gradients = 4 * self.learning
        # Those of the parts before, and one matrix's that is to be added.
        several = self._tokens < min(train.batch_size, self.rows) * self.length * self.group
        summed = gradients + 4 * shape.width * shape.vocabulary - 4 * self.unused if several else 0
        return {
            "loading": 8 * shape.parameters,
            "tokenising": weights + data + round(rows.count * mean) * LISTED_BYTES,
            "forward": kept + self._copies + summed + self._activations + self._logits,
            "backward": kept + self._copies + gradients + (2 * self._layer if self.deep else 0) + self._logits,
            "measuring": kept + encoded + self._measuring + self._logits,
        }

    @property
    def _copies(self) -> int:
        """The matrices in bf16, which wait for the backward pass."""
        return 2 * self.shape.layer * self.deep if self.bf16 else 0

    @property
    def _tokens(self) -> int:
        parts = self.train.gradient_accumulation_steps
        rows = min(micro_batch(self.train), -(-self.rows // parts))
        tokens = rows * self.length * self.group
        return tokens if self.whole else min(tokens, max(self.length, self._most // self.length * self.length))

    @property
    def _most(self) -> int:
        return self.train.part_tokens or trained.PART_TOKENS["cpu"]

    @property
    def _layer(self) -> int:
        """What one layer keeps of all tokens for the backward pass."""
        shape = self.shape
        if self._joined:
            wide, inner, square = 20, 7, 0
        elif self.writes:
            wide, inner, square = (32, 8, 8) if self.bf16 else (40, 12, 4)
        else:
            wide, inner, square = (28, 4, 6) if self.bf16 else (40, 8, 12)
        return self._tokens * (wide * shape.width + inner * shape.inner + square * shape.heads * self.length)

    @property
    def _joined(self) -> bool:
        """Whether rows are packed and adapters joined: attention goes by blocks, and nothing is padded."""
        return (
            self.writes
            and self.bf16
            and self.train.method in ("lora", "rslora")
            and self.train.base_weights == "fp32"
            and not self.train.lora.dropout
            and not self.train.activation_checkpointing
        )

    @property
    def _activations(self) -> int:
        """What is kept when the forward pass ends, and what the backward pass begins with."""
        if self.deep == 0:
            return self._layer
        lost = LOST * (ADAPTED if METHODS[self.train.method].trains in ("low-rank", "scales", "beside") else 1.0)
        if self._joined:
            lost *= 1.0 + GROWN * min(1.0, trained.steps(self.train, self.rows) / SETTLED)
        if self.train.activation_checkpointing:  # each layer's input, and all of the one that is computed again
            kept = 4 * self._tokens * self.shape.width * self.deep + self._layer
            return round(lost * kept + RECOMPUTED * self._layer)
        return round(lost * self._layer * self.deep + PASSING * self._layer)

    @property
    def _logits(self) -> int:
        if not self.writes:
            return 0
        whole = 4 * self.shape.width * self.shape.vocabulary
        chunks = 1 if self._joined else LOGITS
        return chunks * CHUNK_BYTES + (2 * whole if self.train.method == "full" else whole // 2 if self.bf16 else 0)

    @property
    def _measuring(self) -> int:
        """The one layer that is being run, in the precision of the final figures."""
        shape, number = self.shape, 2 if self.writes and self.bf16 else 4
        tokens = max(EVALUATED_TOKENS, self.length)
        wide = 12 * shape.width + number * (shape.matrices * shape.inner + 4 * shape.width)
        return tokens * (wide + 3 * number * shape.heads * self.length)


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
