"""Variants of an encoder with an answer layer: one ONNX graph, at fp32 and at int8, against the model in torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from llmo.compression.choice import Table
from llmo.compression.contest import Measured, contest
from llmo.compression.export import export
from llmo.compression.probe import Candidate
from llmo.compression.quantise import measured_bits, parameter_count, quantise, safe_bits
from llmo.context import Context, Stopped
from llmo.engines.onnx import GRAPH
from llmo.tasks.base import Encoding, Row, Task, gathered, sequences
from llmo.tasks.card import load_tokenizer

REFERENCE = "torch-fp32"
FP32, INT8 = "onnx-fp32", "onnx-int8"
VARIANTS = (FP32, INT8)
MOST_ROWS = 1000  # of dev; more would take minutes on the reference


def compete(
    model: Path, task: Task, rows: Sequence[Row], variants: Sequence[str], work: Path, ctx: Context
) -> tuple[Table, dict[str, Any]]:
    """Build each variant as a folder `work/VARIANT` and measure it on `rows`.

    Returns one row a candidate, the reference first, with empty verdicts; and by name its metrics with intervals.
    """
    encodings = task.encode_rows(load_tokenizer(model), rows)
    bits = _build(model, work, variants, ctx)
    candidates = [Candidate(REFERENCE, "torch", model)]
    candidates += [Candidate(name, "onnx", work / name) for name in variants]
    measured = contest(candidates, sequences(encodings), work, ctx)
    for found in measured:
        found.logits = gathered(found.logits, encodings)
    metrics = {
        candidate.name: task.intervals(task.tally(found.logits, rows, encodings))
        for candidate, found in zip(candidates, measured, strict=True)
    }
    return _table(task, rows, encodings, candidates, measured, bits), metrics


def settle(model: Path, work: Path, chosen: str, ctx: Context) -> dict[str, Any]:
    """Nothing: an encoder's batches follow from the texts."""
    return {}


def files(model: Path, work: Path, chosen: str) -> list[Path]:
    """What the chosen variant brings into the model folder beside what serves any engine."""
    return [work / chosen / GRAPH]


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
                "drop": task.drop(table[0]["value"] if table else value, value),
                "agreement": sum(task.agree(a, b, encoding) for a, b, encoding in pairs) / len(rows),
                "rss_bytes": found.rss_bytes,
                "load_seconds": round(found.load_seconds, 2),
                "verdict": "",
            }
        )
    return table


def _weights_size(candidate: Candidate) -> int:
    return (candidate.folder / (GRAPH if candidate.engine == "onnx" else "model.safetensors")).stat().st_size
