"""Sentences per second of every encoder engine and precision: one at a time, 32 as they come, and 32 by length.

Sentences of 25 tokens on average are cut from held-out articles; token ids go in, so nothing but the engine is timed
(the pipeline tokenises too: 24,000 texts a second). Each way runs in a process of its own, and they take turns of a
second at least, forwards and backwards; a figure is the median of all turns. Beside it stand the labels equal to plain
transformers at fp32, and the share, by length, of what the machine's processor can multiply at that precision.
Run `make demo` first, then: python benchmarks/engine_encoder.py [--rounds 5] [--only onnx] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TEXTS, SINGLES, TIMED, BATCH = 512, 64, 256, 32
CALIBRATION = 300
SECONDS = 1.0  # of a turn, at least
PLANS = ("one at a time", "32 as they come", "32 by length")
REFERENCE = "transformers pipeline fp32"


@dataclass(frozen=True)
class Model:
    """What ways are made of: the trained folder, its graph with fused and with plain attention, training texts."""

    folder: Path
    fused: Path
    plain: Path
    calibration: list[list[int]]


Build = Callable[[Model, Path], None]


@dataclass(frozen=True)
class Way:
    """`engine` is an engine's name, or one of `OTHERS`; `build` fills the folder that it opens, which has the model's
    config already."""

    engine: str
    precision: str
    build: Build


def trained(model: Model, out: Path) -> None:
    shutil.copytree(model.folder, out, dirs_exist_ok=True)


def torch_bf16(model: Model, out: Path) -> None:
    from llmo.compression.torch_encoder import write

    write(model.folder, out)


def onnx_fp32(model: Model, out: Path) -> None:
    shutil.copy(model.fused, out / "model.onnx")


def onnx_int8(model: Model, out: Path) -> None:
    import onnx

    from llmo.compression.quantise import quantise, safe_bits

    onnx.save(quantise(onnx.load(model.fused), bits=safe_bits()), out / "model.onnx")


def onnx_default(model: Model, out: Path) -> None:
    """ONNX Runtime's own dynamic quantisation, with nothing said."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(model.plain, out / "model.onnx")


def openvino(precision: Any) -> Build:
    def build(model: Model, out: Path) -> None:
        from llmo.compression.openvino_encoder import write

        write(model.fused, out, precision, model.calibration)

    return build


def native(model: Model, out: Path) -> None:
    from llmo.compression.native import write

    write(model.folder, out)


WAYS: dict[str, Way] = {
    REFERENCE: Way("pipeline", "fp32", trained),
    "torch fp32": Way("torch", "fp32", trained),
    "torch bf16": Way("torch", "bf16", torch_bf16),
    "onnx fp32": Way("onnx", "fp32", onnx_fp32),
    "onnx int8": Way("onnx", "int8", onnx_int8),
    "onnx int8, ONNX Runtime's default": Way("onnx", "int8", onnx_default),
    "openvino fp32": Way("openvino", "fp32", openvino("fp32")),
    "openvino bf16": Way("openvino", "bf16", openvino("bf16")),
    "openvino int8": Way("openvino", "int8", openvino("int8")),
    "native int8": Way("native", "int8", native),
}
if importlib.util.find_spec("torchao"):  # it says much on importing, and slows every import of transformers
    WAYS["torchao int8 (no engine)"] = Way("torchao", "int8", trained)

Run = Callable[[Sequence[int]], dict[int, list[float]]]  # numbers of texts to what the model says of each


def of_engine(name: str, folder: Path, work: dict[str, Any], cores: int) -> tuple[Run, Any]:
    from llmo import plugins
    from llmo.engines.base import Request
    from llmo.types import Device, to_json

    engine = plugins.load("llmo.engines", name)()
    engine.load(folder, Device("cpu", "cpu", memory=0, free=0, cores=cores))
    requests = [Request(number, ids) for number, ids in enumerate(work["ids"])]

    def run(numbers: Sequence[int]) -> dict[int, list[float]]:
        return {chunk.id: chunk.data.tolist() for chunk in engine.run([requests[number] for number in numbers])}

    return run, to_json(engine.facts()) if hasattr(engine, "facts") else {}


def of_pipeline(folder: Path, work: dict[str, Any], cores: int) -> tuple[Run, Any]:
    """The usual choice, as its own tutorials write it."""
    import torch
    import transformers

    torch.set_num_threads(cores)
    classify = transformers.pipeline("text-classification", model=str(folder), tokenizer=str(folder), top_k=None)
    labels = list(classify.model.config.id2label.values())

    def run(numbers: Sequence[int]) -> dict[int, list[float]]:
        said = classify([work["texts"][number] for number in numbers], batch_size=len(numbers), truncation=True)
        scores = [{one["label"]: one["score"] for one in each} for each in said]
        return {n: [each[label] for label in labels] for n, each in zip(numbers, scores, strict=True)}

    return run, {"library": f"transformers {transformers.__version__}"}


def of_torchao(folder: Path, work: dict[str, Any], cores: int) -> tuple[Run, Any]:
    """torchao's int8 without a compiler: activations with a scale a token, products of int8."""
    import torch
    import torchao
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    from llmo.engines.base import Request
    from llmo.engines.batch import pad
    from llmo.engines.torch import open_model

    torch.set_num_threads(cores)
    model = open_model(folder)
    quantize_(
        model.base_model,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, _: isinstance(module, torch.nn.Linear),
    )

    def run(numbers: Sequence[int]) -> dict[int, list[float]]:
        arrays = pad([Request(number, work["ids"][number]) for number in numbers], 0)
        with torch.inference_mode():
            ids, mask = (torch.from_numpy(array) for array in arrays)
            logits = model(input_ids=ids, attention_mask=mask).logits.tolist()
        return dict(zip(numbers, logits, strict=True))

    return run, {"library": f"torchao {torchao.__version__}"}


OTHERS = {"pipeline": of_pipeline, "torchao": of_torchao}


def child(engine: str, folder: Path, file: Path, cores: int) -> None:
    """Load, answer every text once, then time what is asked for: lines on standard input, JSON on standard output."""
    speaks = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    work = json.loads(file.read_text(encoding="utf-8"))
    started = time.perf_counter()
    run, facts = OTHERS[engine](folder, work, cores) if engine in OTHERS else of_engine(engine, folder, work, cores)
    loaded = time.perf_counter() - started
    said: dict[int, list[float]] = {}
    for plan in work["plans"].values():
        for numbers in plan:
            said |= run(numbers)

    def tell(answer: Any) -> None:
        os.write(speaks, json.dumps(answer).encode() + b"\n")

    tell(
        {
            "facts": facts,
            "seconds": loaded,
            "labels": {n: max(range(len(v)), key=v.__getitem__) for n, v in said.items()},
        }
    )
    for line in sys.stdin:
        plan = work["plans"][line.strip()]
        started, times = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started) < SECONDS:
            for numbers in plan:
                run(numbers)
            times += 1
        tell({"rate": times * sum(map(len, plan)) / seconds, "mib": resident()})


def resident() -> int:
    """Mebibytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@dataclass
class Turn:
    """One way's process, and what it showed."""

    process: subprocess.Popen[str]
    first: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=lambda: {plan: [] for plan in PLANS})
    mib: int = 0

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"a measured process ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def take(self, plan: str) -> None:
        assert self.process.stdin is not None
        print(plan, file=self.process.stdin, flush=True)
        answer = self.read()
        self.rates[plan].append(answer["rate"])
        self.mib = answer["mib"]


@contextmanager
def started(way: Way, folder: Path, work: Path, cores: int) -> Iterator[Turn]:
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", way.engine, str(folder), str(work), "--cores", str(cores)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "PASSIVE"},
    )
    try:
        turn = Turn(process)
        turn.first = turn.read()
        yield turn
    finally:
        process.kill()
        process.communicate()


def sentences(rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[str]:
    """Pieces of the articles: log-normal lengths, 19 words on average, none below 4."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = rng.choice(rows)["text"].split()
        length = max(4, int(rng.lognormvariate(2.82, 0.55)))
        start = rng.randrange(max(1, len(words) - length))
        found.append(" ".join(words[start : start + length]))
    return found


def plans(ids: Sequence[Sequence[int]]) -> dict[str, list[list[int]]]:
    timed = list(range(TIMED))
    by_length = sorted(timed, key=lambda number: len(ids[number]))
    rest = list(range(TIMED, len(ids)))
    return {
        "one at a time": [[number] for number in timed[:SINGLES]],
        "32 as they come": [timed[i : i + BATCH] for i in range(0, TIMED, BATCH)],
        "32 by length": [by_length[i : i + BATCH] for i in range(0, TIMED, BATCH)],
        "all the others": [rest[i : i + BATCH] for i in range(0, len(rest), BATCH)],
    }


def operations(config: dict[str, Any], lengths: Sequence[int]) -> float:
    """Twice the multiply-adds of a text on average: its own tokens, no padding, without the head."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    each = [layers * (n * (4 * hidden * hidden + 2 * hidden * inner) + 2 * n * n * hidden) for n in lengths]
    return 2 * statistics.mean(each)


def peak(cores: int) -> dict[str, float]:
    """Operations a second by precision; empty where nothing measures them."""
    try:
        from llmo.engines.native import peak as measured
    except ImportError:
        return {}
    found: dict[str, float] = measured.measure(cores)
    return found


def prepare(reference: str) -> tuple[Path, list[str], list[list[int]], list[list[int]]]:
    """The trained folder; held-out sentences and their ids; ids of training sentences."""
    from llmo.system import System
    from llmo.tasks.card import load_tokenizer

    with System() as system:
        folder = system.path(reference)
        data = system.artifact(reference).inputs["data"]
        held, train = (system.rows(data, split, limit=10_000) for split in ("test", "train"))
    tokenizer = load_tokenizer(folder)
    texts = sentences(held, TEXTS, seed=1)
    ids, calibration = (
        [each.ids for each in tokenizer.encode_batch(some)] for some in (texts, sentences(train, CALIBRATION, seed=2))
    )
    return folder, texts, ids, calibration


def build(folder: Path, calibration: list[list[int]], ways: dict[str, Way], work: Path) -> dict[str, Path]:
    from llmo.compression.export import export

    model = Model(folder, work / "fused.onnx", work / "plain.onnx", calibration)
    export(folder, model.fused)
    export(folder, model.plain, fused=False)
    made = {}
    for number, (name, way) in enumerate(ways.items()):
        made[name] = work / str(number)
        made[name].mkdir()
        shutil.copy(folder / "config.json", made[name])
        way.build(model, made[name])
    return made


def table(ways: dict[str, Way], turns: dict[str, Turn], work_of_one: float, peaks: dict[str, float]) -> Iterator[str]:
    plain = turns[REFERENCE].first["labels"]
    yield f"| | {' | '.join(PLANS)} | labels equal | share of the peak | MiB | loaded in |"
    yield "|---|" + "---|" * (len(PLANS) + 4)
    for name, turn in turns.items():
        rates = {plan: statistics.median(found) for plan, found in turn.rates.items()}
        labels = turn.first["labels"]
        equal = sum(labels[number] == plain[number] for number in plain) / len(plain)
        share = f"{rates[PLANS[-1]] * work_of_one / peaks[ways[name].precision]:.0%}" if peaks else "-"
        shown = " | ".join(f"{rates[plan]:.0f}" for plan in PLANS)
        yield f"| {name} | {shown} | {equal:.1%} | {share} | {turn.mib} | {turn.first['seconds']:.1f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="model:newsdesk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="a part of the names of the ways beside the pipeline")
    parser.add_argument("--json", type=Path, help="write all figures there too")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", nargs=3)
    given = parser.parse_args()
    if given.child:
        engine, folder, file = given.child
        child(engine, Path(folder), Path(file), given.cores)
        return
    from llmo.errors import NotFoundError

    try:
        folder, texts, ids, calibration = prepare(given.model)
    except NotFoundError as error:
        parser.error(f"{error}; run `make demo` first")
    ways = {name: way for name, way in WAYS.items() if given.only in name or name == REFERENCE}
    print(f"{len(ids)} sentences, {statistics.mean(map(len, ids)):.1f} tokens on average, {max(map(len, ids))} at most")
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        work = Path(scratch)
        folders = build(folder, calibration, ways, work)
        file = work / "work.json"
        file.write_text(json.dumps({"texts": texts, "ids": ids, "plans": plans(ids)}), encoding="utf-8")
        peaks = peak(given.cores)
        turns = {
            name: stack.enter_context(started(way, folders[name], file, given.cores)) for name, way in ways.items()
        }
        for number in range(given.rounds):
            for plan in PLANS:
                for name in list(turns) if number % 2 == 0 else list(reversed(turns)):
                    turns[name].take(plan)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        work_of_one = operations(config, [len(ids[number]) for number in range(TIMED)])
        print("\n".join(table(ways, turns, work_of_one, peaks)), flush=True)
        for name, turn in turns.items():
            print(f"{name}: {turn.first['facts']}")
        print(f"operations a text {work_of_one:.3g}; peak a second {peaks or 'not measured'}")
        if given.json:
            body = {name: {"rates": turn.rates, "mib": turn.mib, **turn.first} for name, turn in turns.items()}
            given.json.write_text(json.dumps({"peaks": peaks, "ways": body}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
