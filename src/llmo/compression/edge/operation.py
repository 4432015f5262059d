"""The operation `export`: a model as a folder that runs without LLMO, tested where it was written, then put there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime

from llmo.compression.edge import bundle
from llmo.compression.edge.graphs import Source, Written, write
from llmo.context import Context, Stopped
from llmo.engines.base import Request
from llmo.engines.onnx import GRAPH, LOGITS, OnnxEngine, session_options
from llmo.errors import GateRefused, ModelError
from llmo.files import MANIFEST, digest_of_value, storage_errors, sync_folder, tree, vacant
from llmo.tasks.base import Logits, Task, gathered, sequences
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden
from llmo.types import Device

INPUTS = {"input_ids", "attention_mask"}
CHECK_SECONDS = 300


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Write the folder `spec["out"]`. Returns the manifest, with `out`, and `bytes` of the whole folder.

    Raises GateRefused when the folder is larger than `max_mb`, or does not answer the golden texts as the model was
    trained to; then nothing is written.
    """
    model, target = inputs["model"], Path(spec["out"])
    source = Source(model, inputs.get("reference"), read_card(model))
    with storage_errors(target), TemporaryDirectory(dir=out) as apart:
        folder = Path(apart) / target.name
        folder.mkdir()
        written = write(source, spec["target"], spec["precision"], folder, ctx)
        ctx.note(f"{spec['target']} at {written.precision}: made of {written.made_of}")
        if ctx.should_stop():
            raise Stopped
        ctx.report(2, 3, stage="test")
        task = load_task(written.beside)
        if spec["target"] == "edge":
            golden = _golden(task, folder, written, ctx.device)
            bundle.write_edge(folder, written.beside, task, written.precision, spec["model"], golden)
        else:
            if spec["target"] == "onnx" and spec["precision"] == "int8":
                _golden(task, folder, written, ctx.device)
            bundle.copy_plain(folder, written.beside)
        manifest = bundle.write_manifest(folder, _about(spec, task, written))
        size = sum(path.stat().st_size for path in tree(folder))
        _refuse_too_large(size, spec)
        if spec["target"] == "edge":
            _try_out(folder)
        if ctx.should_stop():
            raise Stopped
        _put_in_place(folder, target, spec)
    return {**manifest, "out": str(target), "bytes": size}


def _about(spec: Mapping[str, Any], task: Task, written: Written) -> dict[str, Any]:
    return {
        "target": spec["target"],
        "model": spec["model"],
        "digest": spec["digest"],
        "task": task.name,
        "precision": written.precision,
        "made_of": written.made_of,
    }


def _golden(task: Task, folder: Path, written: Written, device: Device) -> list[dict[str, Any]]:
    """What the written graph answers to the golden texts. Raises GateRefused when it is not what was trained."""
    _check_graph(folder / GRAPH)
    golden = read_golden(written.beside)
    encodings = task.encode(load_tokenizer(written.beside), [one["text"] for one in golden])
    said = gathered(_logits(written.beside, folder, sequences(encodings), device), encodings)
    agreed = sum(
        task.agree(a, np.asarray(b["logits"], np.float32), encoding)
        for a, b, encoding in zip(said, golden, encodings, strict=True)
    )
    if not golden or agreed < (1.0 if written.precision == "fp32" else bundle.LOSSY_SHARE) * len(golden):
        raise GateRefused(
            f"the graph at {written.precision} repeats {agreed} of the model's {len(golden)} golden answers",
            hint="export it at fp32, or run `llmo verify` on the model",
        )
    found = []
    for one, logits, encoding in zip(golden, said, encodings, strict=True):
        found.append({"asked": one["text"], "answer": task.answer(logits, encoding, one["text"])})
    return found


def _check_graph(graph: Path) -> None:
    """Raises ModelError for one that the runner does not feed."""
    session = onnxruntime.InferenceSession(str(graph), session_options(1), providers=["CPUExecutionProvider"])
    kinds_of = {port.name: port.type for port in session.get_inputs()}
    if kinds_of != dict.fromkeys(INPUTS, "tensor(int64)") or LOGITS not in {p.name for p in session.get_outputs()}:
        raise ModelError(
            f"the graph takes {', '.join(sorted(kinds_of))}, and a bundle's runner gives {', '.join(sorted(INPUTS))}",
            hint="compress the model again with this version, or export it with --target onnx",
        )


def _logits(model: Path, folder: Path, texts: Sequence[Sequence[int]], device: Device) -> list[Logits]:
    """One text at a time: what company does to an answer is not what is told here."""
    engine = OnnxEngine()
    with TemporaryDirectory() as apart:  # the engine opens a folder with a config
        (Path(apart) / GRAPH).symlink_to(folder / GRAPH)
        (Path(apart) / "config.json").symlink_to(model / "config.json")
        engine.load(Path(apart), device)
        found = [chunk.data for ids in texts for chunk in engine.run([Request(0, ids)])]
        engine.close()
    return found


def _refuse_too_large(size: int, spec: Mapping[str, Any]) -> None:
    most = spec["max_mb"]
    if most is None or size <= most * 1e6:
        return
    raise GateRefused(
        f"the folder takes {size / 1e6:.1f} MB, and at most {most:g} were allowed; nothing was written",
        hint=f"make the model smaller first: llmo compress {spec['original']} --target size --max-mb {most:g}",
        bytes=size,
    )


def _try_out(folder: Path) -> None:
    """The folder's own test, as whoever gets it runs it: without anything of this process."""
    command = [sys.executable, "-I", str(folder / bundle.RUNNER), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    if done.returncode != 0:
        raise GateRefused(
            f"the bundle fails its own test: {done.stderr.strip()[-300:]}",
            hint="this is a bug: please report it with this message",
        )


def _put_in_place(folder: Path, target: Path, spec: Mapping[str, Any]) -> None:
    """Copied beside its place, synced and renamed: it is there whole, or not at all. What an attempt that was killed
    meanwhile left is gone with the next of the same order."""
    there = target / MANIFEST
    if there.is_file() and there.read_bytes() == (folder / MANIFEST).read_bytes():
        return  # an attempt before this one got as far as here
    vacant(target)
    aside = target.with_name(f".{target.name[:100]}.{digest_of_value(spec)[-12:]}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for path in tree(folder):
            copy = aside / path.relative_to(folder)
            shutil.copyfile(path, copy)
            with copy.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(aside)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(target.parent)
