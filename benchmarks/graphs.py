"""What each rewrite of an encoder's graph gains and costs: quality and speed on ONNX Runtime, in turns.

Quality is of dev and test against the fp32 graph; calibration texts are of train. Speed is a ratio to the fused fp32
graph, the median of rounds in which the graphs take turns: one short text at a time, and sixteen of the data's own.
Run: python benchmarks/graphs.py MODEL DATA [--texts 64] [--rounds 5] [--target 0.005]
MODEL is the folder of a trained classifier, DATA that of its data set (`llmo show` tells where both are).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from llmo.compression.export import export
from llmo.compression.graphs import calibration, default, sensitivity, smooth, static
from llmo.compression.graphs.attention import spell
from llmo.compression.graphs.lean import lean
from llmo.compression.quantise import quantise, safe_bits
from llmo.data.dataset import Dataset
from llmo.engines.onnx import LOGITS, session_options
from llmo.tasks.base import sequences
from llmo.tasks.card import load_task, load_tokenizer

SHORT, SINGLES, BATCH, TIMED = 25, 20, 16, 4
Texts = Sequence[Sequence[int]]


def main() -> None:
    given = arguments()
    task, tokenizer, data = load_task(given.model), load_tokenizer(given.model), Dataset.open(given.data)
    texts = {split: sequences(task.encode_rows(tokenizer, data.split(split))) for split in ("train", "dev", "test")}
    chosen = calibration.choose(texts["train"], given.texts)
    held_out = texts["dev"] + texts["test"]
    with tempfile.TemporaryDirectory() as scratch:
        graphs = made(given.model, chosen, given.target, Path(scratch))
        reference = answers(graphs["fp32"], held_out)
        sessions = {name: session(path) for name, path in graphs.items()}
        short, long = speeds(sessions, held_out, given.rounds)
        print(f"{len(held_out)} texts of mean {np.mean([len(ids) for ids in held_out]):.0f} tokens, one thread")
        print(f"{'':30} {'MB':>5} {'agree':>8} {'max dp':>7} {'KL':>9} {'1 short':>8} {'16 own':>7}")
        for name, path in graphs.items():
            agreement, change, divergence = quality(reference, answers(path, held_out))
            print(
                f"{name:30} {path.stat().st_size / 1e6:5.1f} {100 * agreement:7.2f}% {change:7.3f} {divergence:9.1e} "
                f"{short[name]:7.2f}x {long[name]:6.2f}x",
                flush=True,
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--texts", type=int, default=64, help="calibration texts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--target", type=float, default=0.005, help="relative change of the logits that mixed precision keeps to"
    )
    return parser.parse_args()


def made(folder: Path, texts: Texts, target: float, out: Path) -> dict[str, Path]:
    """Every graph as a file, the reference first."""
    bits = safe_bits()
    export(folder, out / "fp32.onnx")
    export(folder, out / "plain.onnx", fused=False)
    found = {"fp32": out / "fp32.onnx", "fp32, plain attention": out / "plain.onnx"}

    def add(name: str, build: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
        started = time.perf_counter()
        found[name] = out / f"{len(found)}.onnx"
        onnx.save(build(onnx.load(out / "fp32.onnx")), found[name])
        print(f"{name}: made in {time.perf_counter() - started:.1f} s", flush=True)

    def smoothed(graph: onnx.ModelProto) -> onnx.ModelProto:
        lean(graph)
        smooth.rescale(graph, texts)
        return graph

    def calibrated(graph: onnx.ModelProto) -> onnx.ModelProto:
        return quantise(static.quantise(graph, static.ranges(graph, texts), bits=bits), bits=bits)

    def mixed(graph: onnx.ModelProto, spared: str) -> onnx.ModelProto:
        ranges = static.ranges(graph, texts)

        def quantiser(one: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
            left = static.quantise(one, ranges, bits=bits, keep=keep)
            return quantise(left, bits=bits, keep=keep if spared == "fp32" else ())

        kept = sensitivity.keep(graph, texts[:: max(1, len(texts) // 32)], target, quantiser)
        names = ", ".join(layer.name for layer in kept.layers)
        print(f"spared: {names or 'none'}; logits change by {kept.distance_all:.4f}, then {kept.distance:.4f}")
        return quantiser(graph, kept.outputs)

    default.quantise(out / "plain.onnx", out / "default.onnx")
    found["ONNX Runtime's default int8"] = out / "default.onnx"
    add("fp32, lean, spelt", lambda graph: spell(lean(graph)))
    add("a scale a token", lambda graph: quantise(graph, bits=bits))
    add("a scale a token, lean", lambda graph: quantise(lean(graph), bits=bits))
    add("a scale a token, lean, spelt", lambda graph: spell(quantise(lean(graph), bits=bits)))
    add("a scale a token, smoothed", lambda graph: spell(quantise(smoothed(graph), bits=bits)))
    add("static, lean", lambda graph: calibrated(lean(graph)))
    add("static, lean, spelt", lambda graph: spell(calibrated(lean(graph))))
    add("static, smoothed", lambda graph: spell(calibrated(smoothed(graph))))
    add("static, mixed with a token's", lambda graph: spell(mixed(lean(graph), "int8")))
    add("static, mixed with fp32", lambda graph: spell(mixed(lean(graph), "fp32")))
    add("static, smoothed, mixed", lambda graph: spell(mixed(smoothed(graph), "int8")))
    return found


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])


def padded(texts: Texts) -> dict[str, NDArray[np.int64]]:
    ids = np.zeros((len(texts), max(len(text) for text in texts)), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def answers(path: Path, texts: Texts) -> NDArray[np.float32]:
    """`[texts, labels]`, computed in batches of like length."""
    running = session(path)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        found |= zip(batch, running.run([LOGITS], padded([texts[i] for i in batch]))[0], strict=True)
    return np.stack([found[i] for i in range(len(texts))])


def quality(before: NDArray[np.float32], after: NDArray[np.float32]) -> tuple[float, float, float]:
    """Share of equal labels, largest change of a probability, mean divergence in nats."""
    p, q = (np.exp(x - x.max(axis=1, keepdims=True)) for x in (before, after))
    change = np.abs(p / p.sum(axis=1, keepdims=True) - q / q.sum(axis=1, keepdims=True)).max()
    agreement = np.mean(before.argmax(axis=1) == after.argmax(axis=1))
    return float(agreement), float(change), sensitivity.divergence(list(before), list(after))


def speeds(
    sessions: dict[str, onnxruntime.InferenceSession], texts: Texts, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """How many times as fast as the first, on single texts of `SHORT` tokens and on batches of the data's lengths."""
    order = sorted(texts, key=len)
    singles = [padded([order[int(i)][:SHORT]]) for i in np.linspace(0, len(order) - 1, SINGLES)]
    starts = np.linspace(0, len(order) - BATCH, TIMED).astype(int)
    batches = [padded(order[start : start + BATCH]) for start in starts]
    return timed(sessions, singles, rounds), timed(sessions, batches, rounds)


def timed(
    sessions: dict[str, onnxruntime.InferenceSession], feeds: Sequence[dict[str, NDArray[np.int64]]], rounds: int
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(rounds + 1):  # the first only warms up
        for name in sessions if number % 2 == 0 else reversed(sessions):
            started = time.perf_counter()
            for feed in feeds:
                sessions[name].run([LOGITS], feed)
            seconds[name].append(time.perf_counter() - started)
    reference = next(iter(sessions))
    return {
        name: median(a / b for a, b in zip(seconds[reference][1:], own[1:], strict=True))
        for name, own in seconds.items()
    }


if __name__ == "__main__":
    main()
