"""A training run on disk, whole or not at all: tensors in safetensors, everything else in JSON, never pickle."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmo.files import sync_folder
from llmo.training.failures import disk_errors

TENSORS, STATE = "tensors.safetensors", "state.json"
PREFIX = "step-"
BEST = "best."


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write `folder/step-N`: aside, synced, renamed; then remove the older ones. Raises StorageError."""
    target, aside = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}.tmp"
    with disk_errors(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside / TENSORS)
        size = (aside / TENSORS).stat().st_size
        (aside / STATE).write_text(json.dumps({**state, "step": step, "bytes": size}), encoding="utf-8")
        for name in (TENSORS, STATE):
            _sync(aside / name)
        sync_folder(aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.replace(target)
        sync_folder(folder)
    for old in folder.glob(f"{PREFIX}*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path, fingerprint: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The latest whole checkpoint of the same run (`fingerprint`), or None."""
    there = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    for path in sorted(there, key=lambda p: -int(p.name.removeprefix(PREFIX))):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            continue
        whole = (path / TENSORS).is_file() and (path / TENSORS).stat().st_size == state.get("bytes")
        if whole and state.get("fingerprint") == fingerprint:
            return load_file(path / TENSORS), state
    return None


def clear(folder: Path) -> None:
    """Remove all checkpoints, and what else was kept for them: the run is finished."""
    for path in (*folder.glob(f"{PREFIX}*"), *folder.glob(f".{PREFIX}*.tmp")):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("*.safetensors"):
        path.unlink()


def pack(named: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Trained weights, and the optimiser's state of each."""
    tensors: dict[str, torch.Tensor] = {f"weight.{name}": p for name, p in named.items()}
    for name, p in named.items():
        for key, value in optimiser.state.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimiser.{key}.{name}"] = value
    return tensors


def unpack(
    tensors: Mapping[str, torch.Tensor], named: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """The inverse of `pack`, in place."""
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(tensors[f"weight.{name}"])
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, field, name = key.split(".", 2)
            optimiser.state[named[name]][field] = value.to(named[name].device, copy=True)


def weight_of(key: str) -> str:
    """The weight that a tensor of a checkpoint is, or is kept for."""
    return key.split(".", 2)[2] if key.startswith("optimiser.") else key.split(".", 1)[1]


def random_state() -> dict[str, Any]:
    """Every generator's state as JSON values."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [s.numpy().tobytes().hex() for s in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_bytes(s) for s in state["cuda"]])


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
