"""Fetches a model of the Hugging Face hub into its local cache: `hf:NAME` or `hf:NAME@REVISION`."""

from __future__ import annotations

from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmo.errors import ModelError, UnreachableError

# Weights as safetensors only, and no Python: what is not asked for cannot be run.
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
UNWANTED = ["onnx/*", "openvino/*", "*/*"]


def fetch(name: str) -> Path:
    """The snapshot's folder. Raises ModelError for a name the hub does not know, UnreachableError without network."""
    repository, _, revision = name.partition("@")
    where = f"hf:{name}"
    try:
        found = snapshot_download(
            repository, revision=revision or None, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except HFValidationError as error:
        raise ModelError(f"'{repository}' is not a name of the hub", hint="write hf:OWNER/NAME", where=where) from error
    except GatedRepoError as error:
        raise ModelError(
            "the model is gated", hint="accept its terms on the hub, then set HF_TOKEN", where=where
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError("the hub has no such model or revision", hint="check the name", where=where) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, ConnectionError) as error:
        raise UnreachableError(
            "the hub cannot be reached, and the model is not in the local cache",
            hint="give a local folder or package:NAME, or copy the model into the hub's cache (HF_HOME)",
            where=where,
        ) from error
    return Path(found)
