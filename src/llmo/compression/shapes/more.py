"""More texts to imitate a teacher on: parts of the training texts, alone and joined, cut where tokens end.

A small data set has few texts, and each of them many parts. Nobody labels them; the teacher does (data augmentation
for distillation: Jiao et al. 2020, TinyBERT, arXiv:1909.10351). Long texts give what training never read of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.tasks.base import IGNORED, Row, Task
from llmo.training.batches import Encoded

SHORTEST = 4  # tokens of a part
JOINED = 0.4  # of the parts are two of different texts
KEPT = 0.5  # of a text that is no longer than the model reads, at least


def possible(task: Task) -> bool:
    """Whether a row of the task is one text, any part of which is a text too."""
    return task.asks == ("text",) and not task.may_ask and task.group == 1


def parts(
    task: Task, tokenizer: Tokenizer, rows: Sequence[Row], count: int, seed: int
) -> list[tuple[list[int], NDArray[Any]]]:
    """Token ids, special ones included, of `count` parts of the rows' texts, each with a target of the shape that the
    row's own has; what it says means nothing, but that no token of it is learnt."""
    tokenizer.no_truncation()
    texts = [task.given(task.asked(row))[0] for row in rows]
    bodies = [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    before, after = _frame(tokenizer)
    room = task.max_length - len(before) - len(after)
    target = task.target(rows[0], task.encode_rows(tokenizer, [rows[0]])[0])
    per_token = target.ndim == 1 and target.dtype == np.int64
    rng = np.random.default_rng([seed, len(rows)])
    long_enough = [i for i, body in enumerate(bodies) if len(body) >= SHORTEST]
    found = []
    for _ in range(count if long_enough else 0):
        first, second = (bodies[int(i)] for i in rng.choice(long_enough, 2))
        if rng.random() < JOINED:
            share = rng.uniform(0.2, 0.8)
            ids = [
                *_part(first, max(1, round(share * room)), rng),
                *_part(second, max(1, round((1 - share) * room)), rng),
            ]
        else:
            ids = _part(first, room, rng)
        whole = [*before, *ids[:room], *after]
        found.append((whole, np.full(len(whole), IGNORED, np.int64) if per_token else target))
    return found


def joined(data: Encoded, more: Sequence[tuple[list[int], NDArray[Any]]]) -> Encoded:
    """The training rows, and those parts behind them."""
    if not more:
        return data
    ids = np.concatenate([data.ids, *(np.asarray(ids, np.int32) for ids, _ in more)])
    starts = np.concatenate([data.starts, data.starts[-1] + np.cumsum([len(ids) for ids, _ in more])])
    targets = [*data.targets, *(target for _, target in more)]
    return Encoded(ids, starts, targets, data.truncated, data.max_length, data.empty, data.group)


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens before a text and after it."""
    found = tokenizer.encode("a")
    text = [i for i, special in enumerate(found.special_tokens_mask) if not special]
    if not text:  # no token for this letter either
        return found.ids, []
    return found.ids[: text[0]], found.ids[text[-1] + 1 :]


def _part(body: Sequence[int], room: int, rng: np.random.Generator) -> list[int]:
    """A part that fits: as long as there is room, or, of what fits whole, half of it or more."""
    size = room if len(body) > room else int(rng.integers(max(1, round(KEPT * len(body))), len(body) + 1))
    first = int(rng.integers(0, len(body) - size + 1))
    return list(body[first : first + size])
