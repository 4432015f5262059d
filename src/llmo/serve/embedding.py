"""Embeddings in a replica: inputs that the model sees whole or not at all, and vectors as they cross the socket."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from llmo.errors import InputError, LLMOError, ModelError
from llmo.tasks.base import Encoding, Logits, Task
from llmo.types import Asked

Input = Asked | Sequence[int]  # what a task takes, or for embeddings also token ids as they are


def check_ids(ids: Sequence[int], where: str, known: int) -> None:
    """Raises InputError for a token that is not one of the `known` ones."""
    if max(ids) >= known:
        raise InputError(
            f"the model has {known} tokens, and {max(ids)} is none of them",
            where=where,
            hint="use the model's own tokeniser, or send text",
        )


def encode(task: Task, tokenizer: Tokenizer, inputs: Sequence[str | Sequence[int]]) -> list[Encoding]:
    """Texts as the model's encoder reads them, among ids that stay as they are."""
    texts = iter(task.tokens(tokenizer, [one for one in inputs if isinstance(one, str)]))
    return [next(texts) if isinstance(one, str) else Encoding(list(one), len(one), [], []) for one in inputs]


def whole(encoding: Encoding | LLMOError, most: int) -> Encoding | LLMOError:
    """The encoding, or the error for one of which the model sees only a part: that would be another text's vector."""
    if isinstance(encoding, LLMOError) or encoding.length <= most:
        return encoding
    return InputError(
        f"the input has {encoding.length} tokens, and this model reads at most {most}",
        hint="divide it",
        code="context_length_exceeded",
    )


def answer(vector: Logits, encoding: Encoding) -> bytes:
    """The JSON answer for one input: float32 numbers, little-endian, in base64, and its tokens.

    Raises ModelError for numbers that are not finite.
    """
    if not np.isfinite(vector).all():
        raise ModelError("the embedding is not finite", hint="its weights are damaged: run `llmo verify` on the model")
    data = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return json.dumps({"embedding": data, "tokens": encoding.length}, separators=(",", ":")).encode()
