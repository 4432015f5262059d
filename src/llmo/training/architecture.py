"""What a model's config.json says of it, and whether LLMO may and can open it; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo.errors import ModelError, nearest

# Surely known: for these the check costs no import of transformers, which brings torch.
COMMON = {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "camembert", "deberta-v2", "mpnet", "modernbert"}

_WRITERS = ("ForCausalLM", "LMHeadModel")


def check_config(folder: Path) -> dict[str, Any]:
    """The folder's config. Raises ModelError when it is missing, wants code of its own, or is of no known kind."""
    config = _read(folder / "config.json", folder)
    settings = _read(folder / "tokenizer_config.json", folder) if (folder / "tokenizer_config.json").is_file() else {}
    for name, content in (("config.json", config), ("tokenizer_config.json", settings)):
        if content.get("auto_map") or content.get("trust_remote_code"):
            raise ModelError(
                f"{name} asks to run Python code that comes with the model (auto_map / trust_remote_code)",
                hint="LLMO never runs code from a model folder: take a model of an architecture transformers has",
                where=str(folder),
            )
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError(
            "config.json names no model_type, so the architecture is unknown",
            hint="give the folder that holds the transformer itself (not one of its pooling or adapter folders)",
            where=str(folder),
        )
    if kind not in COMMON:
        _known(kind, folder)
    return config


def _known(kind: str, folder: Path) -> None:
    from transformers import CONFIG_MAPPING  # brings torch: seconds

    from llmo.engines import lstm  # noqa: F401 (registers itself there)

    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"unknown architecture '{kind}'{nearest(kind, list(CONFIG_MAPPING))}",
            hint="the installed transformers does not know it: upgrade it, or take another model",
            where=str(folder),
        )


def writes_text(config: Mapping[str, Any]) -> bool:
    """Whether the architecture has a language model's head, or does not say."""
    named = config.get("architectures") or []
    return not named or any(str(name).endswith(_WRITERS) for name in named)


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        hint = "give a Hugging Face model folder: config.json, model.safetensors and the tokeniser's files"
        if (folder / "adapter_config.json").is_file():
            hint = "this folder holds an adapter: merge it into its base model and save that"
        raise ModelError(f"no {path.name} in {folder}", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} is not a JSON object", where=str(path))
    return content
