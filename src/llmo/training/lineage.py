"""What a model's card says of how it came about: versions, code, data and base."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llmo
from llmo.data.dataset import Dataset
from llmo.files import digest_of, manifest_of, sha256_file
from llmo.training.base import origin


def versions() -> dict[str, str]:
    """The software that the weights depend on."""
    found = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"llmo": llmo.__version__, **found, "python": platform.python_version()}


def code_digest() -> str:
    """`sha256:<hex>` of the source of the installed llmo."""
    files = manifest_of(Path(llmo.__file__).parent)
    return digest_of({name: entry for name, entry in files.items() if name.endswith(".py")})


def base_of(folder: Path) -> dict[str, Any]:
    """The source of a base model and the digest of its weights."""
    return {"source": folder.name, **origin(folder), "digest": sha256_file(folder / "model.safetensors")}


def data_of(data: Dataset) -> dict[str, Any]:
    """Where the rows came from, and how many there are."""
    kept = ("source", "source_digest", "rows", "labels", "multi_label")
    return {name: data.info[name] for name in kept if name in data.info}


def training_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The specification as it was carried out; the tasks have their own places in the card."""
    return {name: value for name, value in spec.items() if name not in ("task", "also")}
