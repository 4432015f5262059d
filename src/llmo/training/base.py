"""The operation `base-model`: brings a Hugging Face folder into the store, without pickle and without foreign code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo import sources
from llmo.context import Context
from llmo.errors import DataError, ModelError
from llmo.files import publish_json, storage_errors
from llmo.training import weights
from llmo.training.architecture import check_config, position_limit

SOURCE = "source.json"
KEPT = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `{"source", "source_digest"?, "uploads"?}`; only the files that are needed are copied.

    Raises ModelError for a folder that is unsafe (pickle, code of its own), incomplete or unknown.
    """
    source = str(spec["source"])
    ctx.report(0, 3, phase="find")
    folder = _find(source, spec.get("uploads"))
    _unchanged(folder, spec.get("source_digest"))
    config = check_config(folder)
    found = weights.find(folder)
    with storage_errors(out):
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
        ctx.report(1, 3, phase="copy the weights")
        parameters = weights.copy(found, out / weights.FILE)
    ctx.report(2, 3, phase="tokeniser")
    from llmo.training import tokenizer  # brings torch and transformers, which `inspect` does without

    made = tokenizer.bring(folder, out, config)
    result = {
        "source": source,
        "model_type": config["model_type"],
        "parameters": parameters,
        "weights_bytes": (out / weights.FILE).stat().st_size,
        "max_positions": position_limit(config),
        "vocabulary": made.vocabulary,
        "tokenizer": made.origin,
    }
    publish_json(out / SOURCE, {"source": source, "digest": sources.fingerprint(out / weights.FILE)})
    ctx.note(f"{config['model_type']}, {parameters / 1e6:.1f}M parameters; tokeniser {made.origin}")
    ctx.report(3, 3, phase="done")
    return result


def inspect(folder: Path) -> dict[str, Any]:
    """What is known of a base model without loading it; raises ModelError for what `run` would refuse.

    `{"model_type", "parameters", "max_positions"}`. No torch for the common architectures.
    """
    config = check_config(folder)
    parameters = weights.count(weights.find(folder))
    return {"model_type": config["model_type"], "parameters": parameters, "max_positions": position_limit(config)}


def origin(folder: Path) -> dict[str, Any]:
    """Where a base model came from: what `run` wrote beside it, or nothing for a folder of another kind."""
    try:
        found = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _find(source: str, uploads: str | None) -> Path:
    scheme, _, name = source.partition(":")
    if scheme == "hf":
        from llmo.training import hub  # its client takes a second to import, and few models come from there

        folder = hub.fetch(name)
    else:
        folder = sources.resolve(source, Path(uploads) if uploads else None)
    if folder.is_file():
        raise ModelError(
            f"a base model is a folder, and '{folder.name}' is a file",
            hint="give the folder that holds config.json and model.safetensors",
            where=source,
        )
    return folder


def _unchanged(folder: Path, promised: str | None) -> None:
    if promised is not None and sources.fingerprint(folder) != promised:
        raise DataError(
            "the model folder has changed since this was submitted",
            where=folder.name,
            hint="run it again: what is imported must be what was planned",
        )
