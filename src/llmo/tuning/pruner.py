"""Which trials end early: at a rung, a share of its steps, a trial goes on only if it is among the best third so far.

Asynchronous successive halving in its stopping form (Li et al. 2020, arXiv:1810.05934) and Hyperband (Li et al. 2018,
arXiv:1603.06560). The bars of a trial are set when it begins, from what others reached before: a trial then ends
itself, nothing has to be told to it while it runs, and the same search sets the same bars again after any crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ETA = 3  # one of so many goes on
SHARES = (1 / 9, 1 / 3)  # of the steps
LEAST = 0.5  # epochs before the first rung: what has not seen half of the rows tells its learning rate and little else
# How many trials of Hyperband pass all rungs, only the second, or none, so that each kind costs about the same.
BRACKETS = (9, 5, 3)


def shares(kind: str, number: int, epochs: float) -> list[float]:
    """The rungs of a trial of so many epochs, as shares of its steps."""
    if kind == "none":
        return []
    rungs = SHARES[bracket(number) :] if kind == "hyperband" else SHARES
    return [share for share in rungs if share * epochs >= LEAST]


def bracket(number: int) -> int:
    """Hyperband: how many rungs a trial skips; kinds take turns in proportion."""
    given = [0] * len(BRACKETS)
    total = sum(BRACKETS)
    for turn in range(number % total + 1):
        chosen = max(range(len(BRACKETS)), key=lambda b: BRACKETS[b] * (turn + 1) / total - given[b])
        given[chosen] += 1
    return chosen


def bar(reached: Sequence[float]) -> float | None:
    """What a trial has to reach at a rung that others reached with these scores (greater is better), itself to be among
    the best of every `ETA`; None while too few were there to say."""
    if len(reached) < ETA:
        return None
    return sorted(reached, reverse=True)[(len(reached) + 1) // ETA - 1]


def bars(
    kind: str, number: int, epochs: float, standings: Mapping[float, Sequence[float]]
) -> list[tuple[float, float | None]]:
    """The rungs of a trial that begins now, each with its bar."""
    return [(share, bar(standings.get(share, ()))) for share in shares(kind, number, epochs)]
