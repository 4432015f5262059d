"""Variants of a generating model: engines and precisions, each with its own files, against our engine at fp32."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo import plugins
from llmo.compression import widths
from llmo.compression.choice import Table
from llmo.compression.outcome import Made, Order, Outcome
from llmo.compression.probe import Candidate, Probe
from llmo.context import Context, Stopped
from llmo.errors import LLMOError, needing
from llmo.tasks.base import Encoding, Row
from llmo.tasks.card import load_tokenizer
from llmo.tasks.generation import Generation

MEASURE = "llmo.compression.measure_generation"
REFERENCE = "torch-fp32"
MOST_ROWS = 128
PROMPTS = 8  # timed ones: what runs together in the second pass of a round
ALONE = 3  # of them that are timed one at a time: the shortest, the middle and the longest
SHORTEST, LONGEST = 16, 32  # tokens written for each
ROUNDS = 3
PLAN, WEIGHTS = "work.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Variant:
    """`build(model, target)` writes the engine's own files into the folder `target`; None: it opens the original's."""

    engine: str
    precision: str
    build: Callable[[Path, Path], None] | None = None


@dataclass(slots=True)
class Measured:
    """What one candidate showed; seconds by round."""

    load_seconds: float
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    one: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    rss_bytes: int = 0


def compete(order: Order, ctx: Context) -> Outcome:
    """Build each variant as a folder of its own and measure it on the rows of dev: their perplexity, and the speed of
    answers as long as theirs, one at a time and all together. None is calibrated or shaped."""
    model, task, rows, work = order.model, order.task, order.rows, order.work
    tokenizer = load_tokenizer(model)
    encodings = task.encode_rows(tokenizer, rows)
    plan = _plan(task, tokenizer, rows, encodings)
    file = work / PLAN
    file.write_text(json.dumps(plan), encoding="utf-8")
    folders, problems = _build(model, work, order.variants, order.limits.ends, ctx)
    candidates = [Candidate(REFERENCE, "torch", model, ("fp32",))]
    candidates += [Candidate(n, VARIANTS[n].engine, folders[n], (VARIANTS[n].precision,)) for n in folders]
    measured = _contest(candidates, file, work, problems, ctx)
    tokens = sum(plan["lengths"][i] for i in plan["alone"]), sum(plan["lengths"])
    table: Table = []
    metrics: dict[str, Any] = {}
    for candidate in candidates:
        if candidate.name not in measured:
            continue
        found = measured[candidate.name]
        tally = task.tally_scores(found.scores, rows, encodings)
        metrics[candidate.name] = task.intervals(tally)
        value = metrics[candidate.name][task.metric]["value"]
        table.append(
            _row(candidate, model, found, measured[REFERENCE], tokens) | {"metric": task.metric, "value": value}
        )
        table[-1]["drop"] = task.drop(table[0]["value"], value)
    table += [{"name": name, "verdict": why} for name, why in problems.items()]
    return Outcome(
        table, metrics, lambda name: Made(model, _files(model, work, name), _settled(model, work, name, ctx))
    )


def _settled(model: Path, work: Path, chosen: str, ctx: Context) -> dict[str, Any]:
    """What the card says beside the choice: `width`, the chosen variant's throughput by streams and threads."""
    plan = json.loads((work / PLAN).read_text(encoding="utf-8"))
    variant = VARIANTS[chosen]
    folder = model if variant.build is None else work / chosen
    try:
        return {"width": widths.measure(MEASURE, variant.engine, variant.precision, folder, plan, work, ctx)}
    except LLMOError as error:  # there may be no memory for so many; the choice stands
        ctx.note(f"streams and threads could not be measured: {error.what}")
        return {}


def _files(model: Path, work: Path, chosen: str) -> list[Path]:
    """What the chosen variant brings into the model folder beside what serves any engine."""
    if VARIANTS[chosen].build is None:
        return [model / WEIGHTS]
    return sorted(path for path in (work / chosen).iterdir() if path.suffix != ".log")


def _plan(task: Generation, tokenizer: Tokenizer, rows: Sequence[Row], encodings: Sequence[Encoding]) -> dict[str, Any]:
    """What a measuring process is given: all rows to score, and prompts of even lengths to answer."""
    order = sorted(range(len(rows)), key=lambda i: len(encodings[i].input_ids))
    picked = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(PROMPTS, len(order)))]
    prompts = [task.prompt_of(tokenizer, rows[i]) for i in picked]
    lengths = [
        min(LONGEST, max(SHORTEST, len(encodings[i].input_ids) - len(prompt)))
        for i, prompt in zip(picked, prompts, strict=True)
    ]
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    return {
        "sequences": [encoding.input_ids for encoding in encodings],
        "prompts": prompts,
        "lengths": lengths,
        "streams": len(prompts),
        "alone": sorted({round(i) for i in np.linspace(0, len(prompts) - 1, min(ALONE, len(prompts)))}),
        "context": max(longest, *(len(encoding.input_ids) for encoding in encodings)) + 1,
    }


def _build(
    model: Path, work: Path, variants: Sequence[str], ends: float, ctx: Context
) -> tuple[dict[str, Path], dict[str, str]]:
    """Folders by name, and why the others cannot be had."""
    folders: dict[str, Path] = {}
    problems: dict[str, str] = {}
    for number, name in enumerate(variants):
        if ctx.should_stop():
            raise Stopped
        if time.monotonic() > ends:
            problems[name] = "not tried: the time was up"
            continue
        ctx.report(number, len(variants), stage=f"build {name}")
        variant = VARIANTS[name]
        try:
            plugins.load("llmo.generators", variant.engine)
            folders[name] = model if variant.build is None else work / name
            if variant.build is not None:
                folders[name].mkdir()
                _copy_small(model, folders[name])
                variant.build(model, folders[name])
        except LLMOError as error:
            folders.pop(name, None)
            problems[name] = f"cannot run: {error.what}"
            ctx.note(f"{name} cannot be built: {error.what}")
    return folders, problems


def _copy_small(model: Path, target: Path) -> None:
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and ".index." not in path.name:
            shutil.copyfile(path, target / path.name)


def _contest(
    candidates: Sequence[Candidate], file: Path, work: Path, problems: dict[str, str], ctx: Context
) -> dict[str, Measured]:
    """Each in a process of its own, in turns, so that noise cancels. One that fails is noted in `problems`, but for
    the reference, whose error is raised."""
    results: dict[str, Measured] = {}
    probes: dict[str, Probe] = {}
    with ExitStack() as stack:
        for candidate in candidates:
            ctx.report(len(probes), len(candidates) + ROUNDS, stage=f"quality of {candidate.name}")
            probe = stack.enter_context(Probe(MEASURE, candidate, file, work, ctx))
            try:
                found = Measured(load_seconds=probe.read()["load_seconds"])
                found.scores = _scores(probe, work / f"{candidate.name}.npz")
            except LLMOError as error:
                if candidate.name == REFERENCE:
                    raise
                problems[candidate.name] = f"cannot run: {error.what}"
                continue
            results[candidate.name], probes[candidate.name] = found, probe
        for number in range(ROUNDS):
            ctx.report(len(candidates) + number, len(candidates) + ROUNDS, stage="speed")
            for name in probes if number % 2 == 0 else reversed(probes):
                answer = probes[name].ask(f"round {number}")
                results[name].one.append(answer["one"])
                results[name].many.append(answer["many"])
                results[name].firsts += answer["firsts"]
                results[name].rss_bytes = answer["rss_bytes"]
    return results


def _scores(probe: Probe, file: Path) -> list[NDArray[np.float32]]:
    probe.ask(f"score {file}")
    with np.load(file, allow_pickle=False) as kept:
        found = [kept[str(number)] for number in range(len(kept.files))]
    file.unlink()
    return found


def _row(
    candidate: Candidate, model: Path, found: Measured, reference: Measured, tokens: tuple[int, int]
) -> dict[str, Any]:
    """`tokens` are those of either pass. `speedup` is the geometric mean of both passes' ratios: an endpoint meets
    single questions and crowds."""
    one = median(a / b for a, b in zip(reference.one, found.one, strict=True))
    many = median(a / b for a, b in zip(reference.many, found.many, strict=True))
    variant = VARIANTS.get(candidate.name)
    size = _weights_bytes(candidate, model, variant)
    return {
        "name": candidate.name,
        "engine": candidate.engine,
        "precision": candidate.options[0],
        "bits": round(8 * size / _numbers(model), 2),
        "size_bytes": size,
        "tokens_per_second": round(tokens[0] / median(found.one), 1),
        "tokens_per_second_together": round(tokens[1] / median(found.many), 1),
        "first_token_ms": round(1e3 * median(found.firsts), 1),
        "speedup": round(math.sqrt(one * many), 3),
        "speedup_alone": round(one, 3),
        "speedup_together": round(many, 3),
        "rss_bytes": found.rss_bytes,
        "load_seconds": round(found.load_seconds, 2),
        "verdict": "",
    }


def _weights_bytes(candidate: Candidate, model: Path, variant: Variant | None) -> int:
    """Bytes of weights as this candidate keeps them; our own engine makes its lower precisions while it loads."""
    if variant is None or variant.build is None:
        width = {"fp32": 4, "bf16": 2, "int8": 1}[candidate.options[0]]
        return width * _numbers(model)
    return sum(p.stat().st_size for p in candidate.folder.iterdir() if p.suffix in (".bin", ".gguf"))


def _numbers(model: Path) -> int:
    """How many numbers the weights hold, read off the header."""
    with (model / WEIGHTS).open("rb") as file:
        head: Mapping[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")


def _openvino(precision: Literal["bf16", "int8", "int4"]) -> Callable[[Path, Path], None]:
    def build(model: Path, target: Path) -> None:
        with needing(f"openvino at {precision}", "openvino"):
            from llmo.compression.openvino_graph import write
        write(model, target, precision)

    return build


def _gguf(model: Path, target: Path) -> None:
    with needing("a GGUF file", "generate"):
        from llmo.compression.gguf_file import write
    write(model, target, "q8_0")


VARIANTS: dict[str, Variant] = {
    "native-int8": Variant("native", "int8"),
    "torch-bf16": Variant("torch", "bf16"),
    "torch-int8": Variant("torch", "int8"),
    "openvino-bf16": Variant("openvino", "bf16", _openvino("bf16")),
    "openvino-int8": Variant("openvino", "int8", _openvino("int8")),
    "openvino-int4": Variant("openvino", "int4", _openvino("int4")),
    "llamacpp-q8": Variant("llamacpp", "int8", _gguf),
}
