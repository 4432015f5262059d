"""A trained encoder made a tenth of its size: fewer tokens, a student, narrower layers, int8; what each step gives.

Every row of the table is what would be served: the fp32 ONNX graph of the original, then int8 graphs (linear layers
and embeddings at 8 bits) of each shape, on the onnx engine. Sizes are those of the graph files, accuracy is that of
the engine on dev and on the test split, which no step looks at; its difference from the original at fp32 has a 95%
paired bootstrap interval. Speeds are medians of rounds in which all take turns over the test texts, 32 at a time by
length. Run: python benchmarks/shrink.py model:newsdesk [--data data:newsdesk] [--keep 3] [--inner 512] [--threads 2]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from llmo.compression.export import export
from llmo.compression.quantise import quantise, safe_bits
from llmo.compression.shapes import columns, distil, vocabulary
from llmo.compression.shapes.distil import Recovery
from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.engines.base import Request
from llmo.engines.onnx import GRAPH, OnnxEngine
from llmo.errors import LLMOError
from llmo.tasks.base import Encoding, Logits, gathered, sequences
from llmo.tasks.card import load_task, load_tokenizer
from llmo.training.against import differences
from llmo.training.scoring import of_like_length
from llmo.types import Kind

BATCH, ROUNDS = 32, 5
SPLITS = ("dev", "test")


class Telling(NullContext):
    """Prints what the steps note, and the figures on dev as they come."""

    def note(self, message: str) -> None:
        print(f"    {message}", flush=True)

    def report(self, step: int, total: int | None = None, **metrics: float | str) -> None:
        shown = {k: v for k, v in metrics.items() if k.startswith("dev_")}
        if shown:
            print(f"    step {step} of {total}: " + ", ".join(f"{k} {v:.3f}" for k, v in shown.items()), flush=True)


@dataclass(slots=True)
class Served:
    """One row: an engine with its graph open, and what it showed."""

    name: str
    bytes: int
    engine: OnnxEngine
    encodings: dict[str, list[Encoding]]
    logits: dict[str, list[Logits]]
    seconds: list[float]


def found(named: str, kind: Kind) -> Path:
    """The folder of `model:NAME` or `data:NAME` of the store, or a folder."""
    if not named.startswith(("model:", "data:")):
        return Path(named)
    from llmo.system import System

    with System() as system:
        return system.store.catalog.path(system.artifact(named.partition(":")[2], kind).digest)


def served(name: str, folder: Path, data: Dataset, work: Path, threads: int, *, int8: bool) -> Served:
    """Export the folder, quantise it if asked, and answer both splits."""
    target = work / name.replace(" ", "-")
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    export(folder, target / GRAPH)
    if int8:
        onnx.save(quantise(onnx.load(target / GRAPH), bits=safe_bits()), target / GRAPH)
    engine = OnnxEngine()
    engine.load(target, NullContext(threads).device)
    task, tokenizer = load_task(folder), load_tokenizer(folder)
    encodings = {split: task.encode_rows(tokenizer, list(data.split(split))) for split in SPLITS}
    logits = {split: answers(engine, rows) for split, rows in encodings.items()}
    return Served(name, (target / GRAPH).stat().st_size, engine, encodings, logits, [])


def answers(engine: OnnxEngine, encodings: list[Encoding]) -> list[Logits]:
    texts = sequences(encodings)
    said: dict[Any, Logits] = {}
    for batch in batches(texts):
        said |= {chunk.id: chunk.data for chunk in engine.run([Request(i, texts[i]) for i in batch])}
    return gathered([said[i] for i in range(len(texts))], encodings)


def batches(texts: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, texts))
    return [
        part[i : i + BATCH]
        for part in of_like_length([len(t) for t in texts], longest * len(texts))
        for i in range(0, len(part), BATCH)
    ]


def race(rows: list[Served]) -> None:
    """Seconds over the test texts, in turns, forwards and backwards."""
    for number in range(ROUNDS):
        for row in rows if number % 2 == 0 else reversed(rows):
            texts = sequences(row.encodings["test"])
            parts = [[Request(i, texts[i]) for i in batch] for batch in batches(texts)]
            began = time.perf_counter()
            for part in parts:
                list(row.engine.run(part))
            row.seconds.append(time.perf_counter() - began)


def table(rows: list[Served], model: Path, data: Dataset, metric: str) -> None:
    task = load_task(model)
    splits = {split: list(data.split(split)) for split in SPLITS}
    first = rows[0]
    counts = {r.name: task.counted(r.logits["test"], splits["test"], r.encodings["test"]) for r in rows}
    print(f"\n{'':36}{'MB':>7}{'of fp32':>9}{'dev':>7}{'test':>7}  {'test against fp32':24}{'speed':>6}{'agree':>8}")
    for row in rows:
        value = {s: task.measure(row.logits[s], splits[s], row.encodings[s])[metric] for s in SPLITS}
        apart = differences((task, counts[row.name]), (task, counts[first.name]))[metric]
        speed = statistics.median(a / b for a, b in zip(first.seconds, row.seconds, strict=True))
        pairs = zip(row.logits["test"], first.logits["test"], first.encodings["test"], strict=True)
        agree = np.mean([task.agree(a, b, e) for a, b, e in pairs])
        difference = f"{apart['value']:+.3f} ({apart['low']:+.3f} to {apart['high']:+.3f})"
        print(
            f"{row.name:36}{row.bytes / 1e6:7.1f}{row.bytes / first.bytes:9.1%}{value['dev']:7.3f}{value['test']:7.3f}"
            f"  {difference:24}{speed:5.2f}x{agree:8.1%}"
        )


def shapes(model: Path, data: Dataset, work: Path, given: argparse.Namespace) -> list[tuple[str, Path]]:
    """Each shape's name and folder, one made from the one before."""
    ctx = Telling(given.threads, work / "checkpoint")
    how = Recovery(samples=given.samples)
    last = replace(how, samples=given.samples // 2, int8=True)
    steps: list[tuple[str, Callable[[Path, Path], Any]]] = [
        ("tokens of train", lambda a, b: vocabulary.trim(a, data, b, ctx)),
        (f"{given.keep} layers", lambda a, b: distil.student(a, data, b, ctx, keep=given.keep)),
        ("distilled", lambda a, b: distil.recover(a, model, data, b, ctx, how)),
        (f"{given.inner} columns", lambda a, b: columns.narrow(a, data, b, ctx, keep=given.inner)),
        (
            "recovered",
            lambda a, b: distil.recover(a, model, data, b, ctx, last),
        ),
    ]
    made = [("original", model)]
    for name, step in steps:
        began, out = time.perf_counter(), work / f"shape-{len(made)}"
        step(made[-1][1], out)
        print(f"  {name}: {time.perf_counter() - began:.0f} s", flush=True)
        made.append((name, out))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or model:NAME of the store")
    parser.add_argument(
        "--data", help="the data set that it learnt of: a folder, or data:NAME; default: by the model's name"
    )
    parser.add_argument("--keep", type=int, default=3, help="layers of the student")
    parser.add_argument("--inner", type=int, default=512, help="feed-forward columns of each of them")
    parser.add_argument(
        "--samples", type=int, default=8000, help="rows of the first recovery; the second takes half of them"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a new folder that keeps the last shape")
    given = parser.parse_args()
    model = found(given.model, Kind.MODEL)
    data = Dataset.open(found(given.data or given.model.replace("model:", "data:"), Kind.DATASET))
    metric = load_task(model).metric
    with tempfile.TemporaryDirectory() as name:
        work, began = Path(name), time.perf_counter()
        made = shapes(model, data, work, given)
        took = time.perf_counter() - began
        rows = [served("original at fp32", model, data, work, given.threads, int8=False)]
        rows += [served(f"{step} at int8", folder, data, work, given.threads, int8=True) for step, folder in made]
        race(rows)
        table(rows, model, data, metric)
        print(f"\nall steps: {took / 60:.1f} minutes on {given.threads} threads")
        if given.out is not None:
            shutil.copytree(made[-1][1], given.out)


if __name__ == "__main__":
    try:
        main()
    except LLMOError as error:
        raise SystemExit(f"{error}\n{error.hint}") from error
