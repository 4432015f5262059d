"""What the training graph of a causal model says to some prompts before it is saved: greedy tokens and log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from llmo.tasks.base import Row
from llmo.tasks.generation import Generation, conversation
from llmo.training.model import Built
from llmo.training.precision import Precision
from llmo.training.scoring import measuring

PROMPTS = 8
WRITTEN = 16  # tokens at most


def evidence(
    task: Generation, tokenizer: Tokenizer, rows: Sequence[Row], built: Built, precision: Precision
) -> list[dict[str, Any]]:
    """Up to 8 prompts, one at a time: `[{"text", "messages", "rendered", "input_ids", "greedy", "logprobs"}]`.

    `greedy` ends before an end token; `logprobs` are natural, of every token but the first given those before it.
    """
    found = []
    for number in np.linspace(0, len(rows) - 1, min(PROMPTS, len(rows))):
        row = rows[int(number)]
        rendered, ids = task.question(tokenizer, row)
        messages, _ = conversation(row)
        with measuring(built.model, precision):
            greedy = _write_on(built.network, ids, set(task.end_ids), precision.device)
            log_probs = _log_probs(built.network, [*ids, *greedy], precision.device)
        asked = None if messages is None else messages[:-1]
        found.append(
            {
                "text": row["text"],
                "messages": asked,
                "rendered": rendered,
                "input_ids": ids,
                "greedy": greedy,
                "logprobs": log_probs,
            }
        )
    return found


def _write_on(network: Any, ids: list[int], ends: set[int], device: torch.device) -> list[int]:
    """The likeliest tokens after `ids`, as `[...]` without the end token."""
    written: list[int] = []
    given, cache = torch.tensor([ids], device=device), None
    while len(written) < WRITTEN:
        said = network(input_ids=given, past_key_values=cache, use_cache=True)
        token = int(said.logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        given, cache = torch.tensor([[token]], device=device), said.past_key_values
    return written


def _log_probs(network: Any, ids: list[int], device: torch.device) -> list[float]:
    given = torch.tensor([ids], device=device)
    logits = network(input_ids=given, use_cache=False).logits[0, :-1].double()
    picked = logits.log_softmax(-1).gather(1, given[0, 1:, None])[:, 0]
    return [float(x) for x in picked]
