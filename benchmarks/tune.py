"""What a search saves: the best of a full grid, and what the default search (TPE with ASHA) reaches over five seeds.

The grid is trained once, MiniLM's head on BBC news or on tweets whose names are to be found, and every training notes
what it had reached at the rungs. A search draws from the same points with the same training seed, so each of its trials
is one of the grid's, bit for bit (rungs only measure; tests/unit/training/test_trial.py holds that): its result, up to
where it is ended, is looked up, and its steps are counted as if they were made; it ends when it has spent its share of
the grid's steps.
Run: python benchmarks/tune.py [--data news|tweets] [--rows 400] [--share 0.4] [--seeds 5] [--grid FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from frozen import COUNTS, NEWS, TWEETS, prepare

from llmo.context import NullContext
from llmo.jobspecs import RungSpec, TrialSpec, TuneJobSpec
from llmo.searchspec import merged, nested
from llmo.specs import TaskSpec, TrainSpec
from llmo.tuning import pruner, space
from llmo.tuning.search import Search, Trial
from llmo.types import JobState, Result, canonical

SPACE: dict[str, Any] = {
    "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    "batch_size": [8, 16, 32],
    "epochs": [2.0, 4.0],
}
DATA = {"news": (NEWS, "text-classification", 32), "tweets": (TWEETS, "token-classification", 64)}
SEEDS = 5
Grid = dict[str, dict[str, Any]]


def request(seed: int, trials: int, data: str) -> TuneJobSpec:
    """One trial at a time, as on a machine with one free core."""
    _, name, length = DATA[data]
    task, train = TaskSpec(name=name, max_length=length), TrainSpec(method="head")
    return TuneJobSpec(task=task, train=train, space=SPACE, trials=trials, seed=seed)


def train_grid(inputs: dict[str, Path], data: str, keep: Path | None) -> Grid:
    """Every point, trained to its end; those that are kept already are not trained again."""
    from llmo.training import trial

    asked = request(0, 1, data)
    dimensions = space.resolve(asked, space.Facts(asked.task.name, asked.train, 0, 0))
    plain = {**asked.train.plain(), "task": asked.task.plain()}
    rungs = {"rungs": [RungSpec(share=share).plain() for share in pruner.SHARES]}
    ctx = NullContext(1, inputs["data"].parent / "checkpoint")
    found: Grid = json.loads(keep.read_text()) if keep and keep.exists() else {}
    for settings in (point for point in space.grid(dimensions) if canonical(point) not in found):
        spec = TrialSpec(**merged(plain, nested(settings)) | rungs).plain()
        # One context, so that what the frozen layers say of each text is computed once for all points.
        found[canonical(settings)] = trial.run(spec, inputs, inputs["data"].parent, ctx)
        sys.stderr.write(f"{len(found)} {settings} {found[canonical(settings)]['value']:.4f}\n")
        if keep:
            keep.write_text(json.dumps(found))
    return found


def looked_up(whole: dict[str, Any], trial: Trial) -> Result:
    """The training as it would have gone with this trial's bars."""
    reached, result = [], dict(whole)
    for rung in trial.rungs:
        there = next(one for one in whole["rungs"] if abs(one["share"] - rung.share) < 1e-9)
        reached.append({**there, "bar": rung.bar})
        if rung.bar is not None and there["value"] < rung.bar:
            result |= {"pruned": reached[-1], "value": there["value"], "steps": there["step"]}
            break
    return Result(JobState.DONE, 0, False, None, None, {**result, "rungs": reached})


def search(grid: Grid, seed: int, data: str) -> Search:
    asked = request(seed, len(grid), data)
    dimensions = space.resolve(asked, space.Facts(asked.task.name, asked.train, 0, 0))
    made = Search(asked, dimensions, [(space.usual(dimensions, asked.train, asked.task), "usual")])
    while made.told < len(made.trials) or not made.closed:
        made.advance()
        for trial in made.running:
            trial.hear(0, looked_up(grid[canonical(trial.settings)], trial))
    return made


def within(found: Search, most: float) -> tuple[float, float, int]:
    """What the trials that fit into so many steps came to, the steps that it took, and the trials."""
    spent, best, reached, count = 0.0, 0.0, 0.0, 0
    for trial in found.trials:
        steps = float(trial.figure("steps") or 0)
        if spent + steps > most:
            break
        spent, count = spent + steps, count + 1
        if trial in found.done and (trial.value or 0.0) > best:
            best, reached = trial.value or 0.0, spent
    return best, reached, count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=list(DATA), default="news")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--share", type=float, default=0.4, help="of the grid's steps that a search may spend")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--grid", type=Path, help="keep the grid's results here, and take them from here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        source, task, _ = DATA[given.data]
        inputs = prepare(Path(name), given.rows, given.rows / COUNTS[source], source, task)
        grid = train_grid(inputs, given.data, given.grid)
    best, steps = max(one["value"] for one in grid.values()), sum(one["steps"] for one in grid.values())
    print(f"grid: {len(grid)} trainings, {steps} steps, best on dev {best:.4f}, {time.monotonic() - began:.0f} s")
    held = 0
    for seed in range(1, given.seeds + 1):
        value, spent, trials = within(search(grid, seed, given.data), given.share * steps)
        held += value >= 0.99 * best
        share = spent / steps
        print(f"seed {seed}: {trials} trials, best {value:.4f} ({value / best:.1%}) after {share:.0%} of the steps")
    print(f"within 1% of the grid's best with {given.share:.0%} of its steps: {held} of {given.seeds} seeds")
    return 0 if held == given.seeds else 1


if __name__ == "__main__":
    sys.exit(main())
