"""Generation on one GPU at bf16: LLMO's engine against transformers' generate, in one process, in turns.

Both run a model folder (Llama, Mistral, Qwen 2 or 3) or, with --shape, random weights of a model of that size, which
are as fast as trained ones. Tokens a second are those of writing alone; the share of the limit is what reading all
weights once a step would take at the memory's bandwidth, measured by a copy.
Run: python benchmarks/generation_gpu.py [FOLDER] [--shape 135m|1.5b] [--rounds 5] [--precision bf16]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llmo.engines.generation import GenerationOptions, Prompt, Sampling
from llmo.engines.paged.engine import PagedEngine
from llmo.types import Device

STREAMS, WRITTEN, PROMPTS, BESIDE = (1, 8, 64), 64, (128, 1024), 32
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "135m": (
        "llama",
        {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "intermediate_size": 1536, "vocab_size": 49_152, "max_position_embeddings": 8192},
    ),
    "1.5b": (
        "qwen2",
        {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
         "intermediate_size": 8960, "vocab_size": 151_936, "max_position_embeddings": 8192},
    ),
}  # fmt: skip
Side = Callable[
    [list[list[int]], int], tuple[float, float]
]  # prompts and tokens to write: seconds to the first, and all


def random_model(folder: Path, shape: str) -> Path:
    kind, sizes = SHAPES[shape]
    config = transformers.AutoConfig.for_model(kind, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def llmo(folder: Path, precision: str, **sampling: float) -> Side:
    engine = PagedEngine()
    options = GenerationOptions(
        streams=max(STREAMS), cache_bytes=4 << 30, context=2048, chunk=1024, precision=precision, lookup=False
    )
    engine.load(folder, Device("cuda:0", "cuda", memory=0, free=0, cores=4), options)
    asked = 0

    def run(prompts: list[list[int]], count: int) -> tuple[float, float]:
        nonlocal asked
        asked += 1
        began, first = time.perf_counter(), 0.0
        wanted = Sampling(max_tokens=count, ignore_end=True, **{"temperature": 0.0, **sampling})
        for i, ids in enumerate(prompts):
            engine.add(Prompt(i, ids, wanted, tenant=str(asked)))
        begun: set[int] = set()
        while deltas := engine.step():
            begun |= {delta.id for delta in deltas if delta.tokens}
            if not first and len(begun) == len(prompts):
                first = time.perf_counter() - began
        assert not engine.failed()
        return first, time.perf_counter() - began

    return run


def plain(folder: Path) -> Side:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.cuda().eval()

    def timed(ids: torch.Tensor, count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def run(prompts: list[list[int]], count: int) -> tuple[float, float]:
        ids = torch.tensor(prompts, device="cuda")
        first = timed(ids, 1)
        return first, timed(ids, count) if count > 1 else first

    return run


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    return 2 * 10 * len(source) / (time.perf_counter() - began)


def measure(sides: dict[str, Side], rounds: int, vocabulary: int) -> dict[str, dict[str, float]]:
    """For each workload and side, the median over the rounds: tokens a second of writing, or seconds to the first."""
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, float]] = {}
    work = [(f"{n} streams", n, BESIDE, WRITTEN) for n in STREAMS] + [(f"prompt of {n}", 1, n, 1) for n in PROMPTS]
    for name, streams, length, count in work:
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(rounds + 1):
            prompts = rng.integers(3, vocabulary, (streams, length)).tolist()
            for side, run in sides.items():
                first, whole = run(prompts, count)
                if turn:  # the first warms up
                    times[side].append(streams * (count - 1) / (whole - first) if count > 1 else first)
        found[name] = {side: statistics.median(values) for side, values in times.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or random_model(Path(temporary), options.shape)
        body = json.loads((folder / "config.json").read_text())
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        speed = bandwidth()
        sides = {
            "llmo": llmo(folder, options.precision),
            "llmo drawn": llmo(folder, options.precision, temperature=1.0),
        }
        sides["transformers"] = plain(folder)
        found = measure(sides, options.rounds, body["vocab_size"])
    print(f"{torch.cuda.get_device_name()}, {options.folder or options.shape}, {options.precision}")
    print(
        f"memory {speed / 1e12:.2f} TB/s, weights {weights / 1e9:.2f} GB: at most {speed / weights:.0f} steps a second"
    )
    for name, values in found.items():
        writes = "streams" in name
        unit, factor = ("tokens/s", 1.0) if writes else ("ms", 1e3)
        line = [f"{side} {value * factor:.1f}" for side, value in values.items()]
        ratios = [
            f"{values['llmo'] / value if writes else value / values['llmo']:.1f} times {side}"
            for side, value in values.items()
            if not side.startswith("llmo")
        ]
        steps = values["llmo"] / int(name.split()[0]) if writes else 0.0
        share = [f"{steps * weights / speed:.2f} of the bandwidth"] if writes else []
        print(f"{name} ({unit}): " + "; ".join([*line, *ratios, *share]))


if __name__ == "__main__":
    main()
