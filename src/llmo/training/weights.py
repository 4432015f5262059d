"""Finds a folder's weights, refuses pickle, and copies safetensors into one file after checking that they are whole."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llmo.errors import ModelError

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FOREIGN = (".h5", ".msgpack", ".gguf", ".onnx")


def find(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or its shards. Raises ModelError when there are none."""
    if (folder / FILE).is_file():
        return [folder / FILE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    there = sorted(p.name for p in folder.iterdir() if p.is_file())
    pickles = [name for name in there if name.endswith(PICKLES)]
    if pickles:
        raise ModelError(
            f"the weights are a pickle ({pickles[0]}), which can run code when it is opened",
            hint='convert it once where you trust it: python -c "from transformers import AutoModel as A; '
            "A.from_pretrained('FOLDER').save_pretrained('SAFE')\", then give the new folder",
            where=str(folder),
        )
    foreign = [name for name in there if name.endswith(FOREIGN)]
    raise ModelError(
        f"the folder holds no {FILE}" + (f" (only {foreign[0]})" if foreign else ""),
        hint="give the folder that holds the weights as safetensors (or one GGUF file)",
        where=str(folder),
    )


def copy(found: list[Path], target: Path) -> int:
    """Copy into one file and return the number of parameters. Raises ModelError when a file is broken or cut short."""
    parameters = count(found)
    if len(found) == 1:
        shutil.copyfile(found[0], target)
    else:
        from safetensors.torch import load_file, save_file  # NumPy has no bfloat16; nothing else here needs torch

        save_file({k: v for path in found for k, v in load_file(path).items()}, target, {"format": "pt"})
    return parameters


def count(found: list[Path]) -> int:
    """The number of parameters, read off the headers. Raises ModelError when a file is broken or cut short."""
    return sum(_count(path) for path in found)


def _count(path: Path) -> int:
    try:
        with safe_open(path, framework="numpy") as opened:
            return sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ModelError(
            f"{path.name} is broken or cut short: {error}", hint="download or copy it again", where=str(path)
        ) from error


def _shards(folder: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{INDEX} cannot be read: {error!r}", where=str(folder)) from error
    missing = [n for n in names if "/" in n or not n.endswith(".safetensors") or not (folder / n).is_file()]
    if missing or not names:
        raise ModelError(
            f"{INDEX} names {missing[0]!r}, which is not there" if missing else f"{INDEX} names no file",
            hint="copy all the shards",
            where=str(folder),
        )
    return [folder / name for name in names]
