"""Two models on the same rows: by how much their metrics differ, and whether that can be chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmo.errors import SpecError
from llmo.tasks.base import Task
from llmo.tasks.metrics import Counts, Floats, Tally, Totals

Side = tuple[Task, Sequence[Counts]]  # a model's task, and its counts of every row


def check(first: Task, second: Task) -> None:
    """Raises SpecError for models that cannot be compared."""
    if first.name != second.name or first.metric != second.metric:
        raise SpecError(
            f"a model for {first.name} ({first.metric}) and one for {second.name} ({second.metric}) cannot be compared",
            hint="name a model of the same task with --against",
        )


def differences(first: Side, second: Side, seed: int = 0) -> dict[str, dict[str, float]]:
    """`{metric: {"value", "low", "high"}}`, first minus second, with the 95% paired bootstrap interval over rows (Efron
    and Tibshirani 1993; both models see the same drawn rows): chance alone is unlikely where it leaves out 0."""
    width = len(first[1][0])
    pairs = Tally.of_sums(np.concatenate([np.stack(first[1]), np.stack(second[1])], axis=1))
    values = _difference(pairs, pairs.times.astype(np.float64), first[0], second[0], width)
    resampled = [_difference(pairs, times, first[0], second[0], width) for times in pairs.draws(seed)]
    found = {}
    for name, value in values.items():
        low, high = np.percentile(np.concatenate([part[name] for part in resampled]), [2.5, 97.5])
        found[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return found


def _difference(pairs: Tally, times: Floats, first: Task, second: Task, width: int) -> dict[str, Floats]:
    """Of the distinct rows, each of them taken `times` `[..., distinct]`."""
    totals = pairs.summed(times)
    ours, theirs = (
        task.scores(Totals(totals.sums[..., side], totals.rows))
        | task.ranked(Tally(pairs.counts[:, side], pairs.times), times)
        for task, side in ((first, slice(width)), (second, slice(width, None)))
    )
    return {name: value - theirs[name] for name, value in ours.items() if name in theirs}
