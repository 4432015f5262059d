"""The operation `adapter`: a LoRA that peft saved elsewhere becomes a stored version, if it fits the base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmo import sources
from llmo.context import Context
from llmo.engines import peft
from llmo.engines.paged.config import load_config
from llmo.engines.paged.lora import read_lora
from llmo.errors import ModelError
from llmo.files import storage_errors
from llmo.tasks.card import ADAPTER
from llmo.training.architecture import check_config, writes_text
from llmo.training.base import unchanged

FILES = (peft.SETTINGS, peft.TENSORS)


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `{"source", "source_digest"?, "uploads"?}`, a folder as peft saves it; `inputs` is the base `model`.

    Returns what becomes the version's card. Raises ModelError for a base that is an encoder, and for an adapter that is
    no LoRA, whose modules do not all apply to the base, or that changes nothing. Whether it was trained on these very
    weights cannot be seen in it.
    """
    source = str(spec["source"])
    folder = sources.resolve(source, Path(spec["uploads"]) if spec.get("uploads") else None)
    if not folder.is_dir():
        raise ModelError(
            "an adapter is a folder, as peft saves it", where=source, hint=f"it holds {' and '.join(FILES)}"
        )
    unchanged(folder, spec.get("source_digest"))
    config = check_config(inputs["model"])
    if not writes_text(config):
        raise ModelError(
            f"a LoRA from elsewhere cannot answer over a {config['architectures'][0]}, for it has neither a head with "
            "labels nor evidence of what it answers",
            hint="train it here on the same trunk: llmo train --method lora",
            where=source,
        )
    read_lora(folder, load_config(inputs["model"]), torch.float32, torch.device("cpu"))
    settings = peft.settings(folder)
    with storage_errors(out):
        (out / ADAPTER).mkdir()
        for name in FILES:
            shutil.copyfile(folder / name, out / ADAPTER / name)
    named = settings.get("base_model_name_or_path")
    ctx.note(f"LoRA of rank {settings['r']}, trained elsewhere on {named or 'a base it does not name'}")
    return {
        "origin": "imported",
        "method": "lora",
        "source": source,
        "trained_on": named,
        "rank": settings["r"],
        "alpha": settings["lora_alpha"],
        "target_modules": settings.get("target_modules"),
    }
