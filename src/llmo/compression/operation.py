"""The operation `compress`: build the variants, measure them against the original, and keep the fastest allowed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from llmo.compression.contest import Measured, contest
from llmo.compression.export import export
from llmo.compression.probe import Candidate
from llmo.compression.quantise import measured_bits, parameter_count, quantise, safe_bits
from llmo.context import Context, Stopped
from llmo.data.dataset import Dataset
from llmo.engines.onnx import GRAPH
from llmo.errors import DataError, GateRefused, ModelError
from llmo.files import digest_of, manifest_of, storage_errors
from llmo.tasks.base import Encoding, Row, Task
from llmo.tasks.card import CARD, load_task, load_tokenizer, read_card, write_card

REFERENCE = "torch-fp32"
FP32, INT8 = "onnx-fp32", "onnx-int8"
MOST_TEXTS = 1000  # of dev; more would take minutes on the reference
SAMPLE_SEED = 13
Table = list[dict[str, Any]]


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Write the compressed model folder. Returns `{"metric", "variants", "chosen", "why", "texts"}`.

    Raises GateRefused, with the table in `extra`, when no variant is both faster than the original and within
    `max_drop` of its metric on dev.
    """
    model = inputs["model"]
    card = read_card(model)
    if card.get("engine", "torch") != "torch":
        raise ModelError(
            "this model is compressed already", hint="compress the model it was made from", where=str(model)
        )
    task = load_task(model)
    rows = _sample(Dataset.open(inputs["data"]).split("dev"))
    encodings = task.encode(load_tokenizer(model), [str(row["text"]) for row in rows])
    with storage_errors(out), TemporaryDirectory(dir=out, prefix=".work-") as scratch:
        work = Path(scratch)
        bits = _build(model, work, spec["variants"], ctx)
        candidates = [Candidate(REFERENCE, "torch", model)]
        candidates += [Candidate(name, "onnx", work / name) for name in spec["variants"]]
        measured = contest(candidates, encodings, work, ctx)
        table = _table(task, rows, encodings, candidates, measured, bits)
        chosen = choose(table, spec["max_drop"])
        why = _why(table, chosen, task.metric, spec["max_drop"])
        ctx.note(why)
        if chosen is None:
            raise _refusal(why, table)
        _assemble(model, work / chosen / GRAPH, out)
    number = [candidate.name for candidate in candidates].index(chosen)
    result = {"metric": task.metric, "variants": table, "chosen": chosen, "why": why, "texts": len(rows)}
    dev = task.intervals(task.tally(measured[number].logits, rows, encodings))
    write_card(out, _card(card, model, result, table[number], dev))
    return result


def _sample(rows: Sequence[Row]) -> list[Row]:
    if not len(rows):
        raise DataError(
            "the data set has no dev rows to measure the loss of quality on",
            hint="import it with a dev split, e.g. `data: {split: {dev: 0.1}}`",
        )
    if len(rows) <= MOST_TEXTS:
        return list(rows)
    numbers = np.random.default_rng(SAMPLE_SEED).choice(len(rows), MOST_TEXTS, replace=False)
    return [rows[int(number)] for number in np.sort(numbers)]


def _build(model: Path, work: Path, variants: Sequence[str], ctx: Context) -> dict[str, float]:
    """Make a folder `work/VARIANT` for each; returns the measured bits a weight."""
    for name in {*variants, FP32}:
        (work / name).mkdir()
        shutil.copy(model / "config.json", work / name)
    ctx.report(0, stage="export")
    attention = export(model, work / FP32 / GRAPH)
    ctx.note(f"exported to ONNX with {attention} attention")
    graph = onnx.load(work / FP32 / GRAPH)
    parameters = parameter_count(graph)
    bits = {FP32: measured_bits(graph, parameters), REFERENCE: 32.0}
    if ctx.should_stop():
        raise Stopped
    if INT8 in variants:
        ctx.report(0, stage="quantise")
        onnx.save(quantise(graph, bits=safe_bits()), work / INT8 / GRAPH)
        bits[INT8] = measured_bits(graph, parameters)
    return bits


def _table(
    task: Task,
    rows: Sequence[Row],
    encodings: Sequence[Encoding],
    candidates: Sequence[Candidate],
    measured: Sequence[Measured],
    bits: Mapping[str, float],
) -> Table:
    """One row a candidate, the reference first; `verdict` is still empty."""
    table: Table = []
    for candidate, found in zip(candidates, measured, strict=True):
        value = task.measure(found.logits, rows, encodings)[task.metric]
        pairs = zip(measured[0].logits, found.logits, encodings, strict=True)
        table.append(
            {
                "name": candidate.name,
                "engine": candidate.engine,
                "precision": candidate.name.partition("-")[2],
                "bits": round(bits[candidate.name], 2),
                "size_bytes": _weights_size(candidate),
                "texts_per_second": round(found.texts_per_second, 1),
                "latency_ms": round(found.latency_ms, 2),
                "p95_ms": round(found.p95_ms, 2),
                "speedup": round(found.speedup, 3),
                "metric": task.metric,
                "value": value,
                "drop": (table[0]["value"] if table else value) - value,
                "agreement": sum(task.agree(a, b, encoding) for a, b, encoding in pairs) / len(rows),
                "rss_bytes": found.rss_bytes,
                "load_seconds": round(found.load_seconds, 2),
                "verdict": "",
            }
        )
    return table


def _weights_size(candidate: Candidate) -> int:
    return (candidate.folder / (GRAPH if candidate.engine == "onnx" else "model.safetensors")).stat().st_size


def choose(table: Table, max_drop: float) -> str | None:
    """The fastest variant that is faster than the reference (the first row) and drops at most `max_drop`.

    Writes each row's `verdict`; returns the chosen name, or None.
    """
    reference, *variants = table
    reference["verdict"] = "reference"
    for row in variants:
        if row["drop"] > max_drop + 1e-9:
            row["verdict"] = "drops too much"
        elif row["speedup"] <= 1.0:
            row["verdict"] = "no faster than the original"
        else:
            row["verdict"] = "within the limit, but slower than the chosen"
    allowed = [row for row in variants if row["verdict"].startswith("within")]
    if not allowed:
        return None
    best = max(allowed, key=lambda row: float(row["speedup"]))
    best["verdict"] = "chosen"
    return str(best["name"])


def _why(table: Table, chosen: str | None, metric: str, max_drop: float) -> str:
    if chosen is None:
        tried = "; ".join(
            f"{row['name']}: {row['verdict']} (drop {row['drop']:.4f}, {row['speedup']:.2f} times the speed)"
            for row in table[1:]
        )
        return f"no variant is faster than the original and within {max_drop:g} of its {metric} on dev: {tried}"
    row = next(row for row in table if row["name"] == chosen)
    lost = f"loses {row['drop']:.4f}" if row["drop"] > 0 else "loses nothing"
    return (
        f"{chosen} is the fastest within the limit: {row['speedup']:.1f} times the original's speed, "
        f"{100 * row['size_bytes'] / table[0]['size_bytes']:.0f}% of its size, "
        f"and it {lost} of {metric} on dev (limit {max_drop:g})"
    )


def _refusal(why: str, table: Table) -> GateRefused:
    dropped = any(row["verdict"] == "drops too much" for row in table)
    return GateRefused(
        why,
        hint=("allow a larger loss (compress.max_drop), or " if dropped else "")
        + "leave out the section `compress` to deploy the original",
        variants=table,
    )


def _assemble(model: Path, graph: Path, out: Path) -> None:
    """What serves beside the graph: config, tokeniser and golden evidence, but neither old weights nor old card."""
    for path in sorted(model.iterdir()):
        if path.suffix in (".json", ".txt", ".jinja") and path.name != CARD and ".index." not in path.name:
            shutil.copyfile(path, out / path.name)
    graph.replace(out / GRAPH)


def _card(
    card: Mapping[str, Any], model: Path, result: Mapping[str, Any], row: Mapping[str, Any], dev: Mapping[str, Any]
) -> dict[str, Any]:
    """The original's card with what is different now; `metrics` are this variant's own."""
    return {
        **card,
        "engine": row["engine"],
        "precision": row["precision"],
        "bits": row["bits"],
        "metrics": {"dev": dict(dev)},
        **result,
        "reference": {"digest": digest_of(manifest_of(model)), "metrics": card.get("metrics", {})},
    }
