"""The operation `base-model`: brings a Hugging Face folder or a GGUF file into the store, without foreign code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmo import sources
from llmo.context import Context
from llmo.engines.folder import position_limit
from llmo.errors import DataError, ModelError
from llmo.files import publish_json, storage_errors
from llmo.training import gguf_source, weights
from llmo.training.architecture import check_config

SOURCE = "source.json"
FEWEST = 0.9  # of a model's entries that its tokeniser has; with fewer it may be another's
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

    A GGUF file, or a folder that holds one and no safetensors, is dequantised to fp32; `source.json` says what it was.
    Raises ModelError for a source that is unsafe (pickle, code of its own), incomplete, broken or unknown.
    """
    source = str(spec["source"])
    ctx.report(0, 3, phase="find")
    folder = _find(source, spec.get("uploads"))
    unchanged(folder, spec.get("source_digest"))
    file = gguf_source.find(folder)
    if file is None:
        return _bring(source, folder, None, out, ctx)
    with storage_errors(out), TemporaryDirectory(dir=out, prefix=".base-") as aside:
        ctx.report(1, 3, phase="dequantise the weights")
        header = gguf_source.convert(file, Path(aside))
        return _bring(source, Path(aside), header, out, ctx)


def _bring(source: str, folder: Path, header: gguf_source.Header | None, out: Path, ctx: Context) -> dict[str, Any]:
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
    entries = config.get("vocab_size")
    if isinstance(entries, int) and made.vocabulary < FEWEST * entries:
        ctx.note(f"the tokeniser has {made.vocabulary} entries and the model {entries}: see that it is the model's own")
    result = {
        "source": source,
        "model_type": config["model_type"],
        "parameters": parameters,
        "weights_bytes": (out / weights.FILE).stat().st_size,
        "max_positions": position_limit(config),
        "vocabulary": made.vocabulary,
        "tokenizer": made.origin,
    }
    kept: dict[str, Any] = {"source": source, "digest": sources.fingerprint(out / weights.FILE)}
    if header is not None:
        was = {"format": "gguf", "quantisation": header.quantisation}
        kept, result = kept | was, result | was
        ctx.note(f"read from GGUF, whose weights were {header.quantisation or 'not quantised'}; kept as fp32")
    publish_json(out / SOURCE, kept)
    ctx.note(f"{config['model_type']}, {parameters / 1e6:.1f}M parameters; tokeniser {made.origin}")
    ctx.report(3, 3, phase="done")
    return result


def inspect(folder: Path) -> dict[str, Any]:
    """What is known of a base model without loading it; raises ModelError for what `run` would refuse.

    `{"model_type", "parameters", "max_positions"}`. No torch for the common architectures.
    """
    file = gguf_source.find(folder)
    if file is not None:
        header = gguf_source.read(file)
        return {
            "model_type": header.architecture,
            "parameters": header.parameters,
            "max_positions": header.positions,
        }
    config = check_config(folder)
    parameters = weights.count(weights.find(folder))
    return {"model_type": config["model_type"], "parameters": parameters, "max_positions": position_limit(config)}


def config_of(folder: Path) -> dict[str, Any]:
    """The config of a base model that was not brought in yet; of a GGUF file the one it will have (needs torch)."""
    file = gguf_source.find(folder)
    return check_config(folder) if file is None else gguf_source.config(file)


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
    if folder.is_file() and gguf_source.find(folder) is None:
        raise ModelError(
            f"a base model is a folder or a .gguf file, and '{folder.name}' is a file of another kind",
            hint="give the folder that holds config.json and model.safetensors",
            where=source,
        )
    return folder


def unchanged(folder: Path, promised: str | None) -> None:
    """Raises DataError when a source is not what it was when its import was asked for."""
    if promised is not None and sources.fingerprint(folder) != promised:
        raise DataError(
            "the model folder has changed since this was submitted",
            where=folder.name,
            hint="run it again: what is imported must be what was planned",
        )
