"""A pairwise judge: what a model is told so that it says which of two answers is better, and what verdicts amount to.

Models that judge favour a place (Zheng et al. 2023, "Judging LLM-as-a-Judge"), so each pair is shown in both orders,
and one whose verdict turns with the order is worth half to either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmo.tasks.metrics import Floats, Tally, Totals, ratio, with_intervals

POINTS = {"A": 1.0, "B": 0.0, "tie": 0.5}  # to the answer shown as A
VERDICT = "|".join(POINTS)  # the regular expression that the judge's answer is held to
_ROLE = (
    "You compare two answers to the same conversation. Judge what they say: whether it is right, whether it helps, "
    "whether it does what was asked. Do not judge their length or their order."
)


def request(
    messages: Sequence[Mapping[str, Any]], a: str, b: str, *, reference: str = "", criterion: str = ""
) -> list[dict[str, str]]:
    """The judge's own messages about the answers `a` and `b` to a conversation."""
    parts = ["Conversation:", *(f"{message['role']}: {message.get('content') or ''}" for message in messages)]
    if reference:
        parts += ["", "A good answer, for comparison:", reference]
    parts += ["", "Answer A:", a, "", "Answer B:", b, ""]
    if criterion:
        parts.append(f"What counts most: {criterion}")
    parts.append("Which answer is better? Reply with A, B or tie.")
    return [{"role": "system", "content": _ROLE}, {"role": "user", "content": "\n".join(parts)}]


def points(verdicts: tuple[str, str]) -> float:
    """What the first answer earns, 0 to 1, of its verdict shown as A and of the one shown as B."""
    as_a, as_b = verdicts
    return (POINTS[as_a] + 1 - POINTS[as_b]) / 2


def consistent(verdicts: tuple[str, str]) -> bool:
    """Whether the order made no difference."""
    as_a, as_b = verdicts
    return POINTS[as_a] == 1 - POINTS[as_b]


def measure(verdicts: Sequence[tuple[str, str]], seed: int = 0) -> dict[str, Any]:
    """`wins`, `losses` and `ties` of the first answers, and with 95% bootstrap intervals over pairs `win_rate`, in
    which a tie is half a win, and `consistency`, the share of pairs whose verdict did not turn with the order."""
    earned = [points(pair) for pair in verdicts]
    columns = np.array(
        [(round(4 * value), consistent(pair)) for value, pair in zip(earned, verdicts, strict=True)], np.int64
    )
    wins, losses = sum(value > 0.5 for value in earned), sum(value < 0.5 for value in earned)
    counts = {"wins": wins, "losses": losses, "ties": len(earned) - wins - losses}
    return counts | with_intervals(Tally.of_sums(columns), _scores, seed)


def _scores(totals: Totals) -> dict[str, Floats]:
    return {
        "win_rate": ratio(totals.sums[..., 0] / 4, totals.rows),
        "consistency": ratio(totals.sums[..., 1], totals.rows),
    }
