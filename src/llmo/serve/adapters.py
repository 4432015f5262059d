"""Which adapters answer behind which endpoint: those in the store that fit the model it serves now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from llmo.errors import LLMOError, ModelError
from llmo.store import Store
from llmo.tasks.card import ADAPTER
from llmo.types import Adapter, Artifact, Endpoint

_log = logging.getLogger("llmo.serve")


@dataclass(frozen=True, slots=True)
class Ready:
    """An adapter, and the folder a replica loads it from."""

    adapter: Adapter
    folder: str


class AdapterTable:
    """What the store says, kept in memory where it cannot change; `load` is called by the router, beside requests."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bases: dict[str, frozenset[str]] = {}
        self._folders: dict[str, str] = {}
        self._gone: set[str] = set()  # models that were warned of

    def load(self, endpoints: Sequence[Endpoint]) -> dict[str, dict[str, Ready]]:
        """By endpoint and name. One that was trained on another model than is served now is left out."""
        served = {endpoint.name: endpoint.model for endpoint in endpoints}
        found: dict[str, dict[str, Ready]] = {}
        for adapter in self._store.adapters.list():
            if adapter.base in self._bases_of(served.get(adapter.endpoint, "")):
                folder = self._folder(adapter)
                if folder is not None:
                    found.setdefault(adapter.endpoint, {})[adapter.name] = Ready(adapter, folder)
        return found

    def _bases_of(self, model: str) -> frozenset[str]:
        if model not in self._bases:
            self._bases[model] = bases(self._store, model)
        return self._bases[model]

    def _folder(self, adapter: Adapter) -> str | None:
        if adapter.model not in self._folders:
            try:
                self._folders[adapter.model] = folder_of(self._store, adapter.model, adapter.model_ref)
            except LLMOError as error:  # its bytes are gone: it cannot answer, and the others can
                if adapter.model not in self._gone:
                    self._gone.add(adapter.model)
                    _log.warning("the adapter %s of %s cannot be read: %s", adapter.name, adapter.endpoint, error)
                return None
        return self._folders[adapter.model]


def bases(store: Store, model: str) -> frozenset[str]:
    """The models whose weights a served one has: itself, what it was compressed from, and an untouched base's own."""
    found = {model}
    artifact = store.catalog.find(model)
    while artifact is not None and ("reference" in artifact.card or artifact.card.get("method") == "none"):
        made_from = artifact.inputs.get("model", "")
        found.add(made_from)
        artifact = store.catalog.find(made_from)
    return frozenset(found)


def trained(store: Store, artifact: Artifact) -> Artifact:
    """The model as it was trained: what a compressed one was made from, else itself."""
    if "reference" not in artifact.card:
        return artifact
    return store.catalog.find(artifact.inputs.get("model", "")) or artifact


def folder_of(store: Store, model: str, ref: str) -> str:
    """The folder with a stored model's adapter. Raises ModelError for one without, StorageError when it is gone."""
    folder = store.catalog.path(model) / ADAPTER
    if not folder.is_dir():
        raise ModelError(f"{ref} has no adapter beside its weights", hint="train it with `method: lora`")
    return str(folder)


def check_base(store: Store, artifact: Artifact, served: str, endpoint: str) -> str:
    """The digest of the model that the adapter was trained on. Raises ModelError when the endpoint serves another."""
    base = artifact.inputs.get("model", "")
    if base and base in bases(store, served):
        return base
    found = [store.catalog.find(digest) for digest in (base, served)]
    theirs, ours = (a.ref if a is not None else "a model that is not stored here" for a in found)
    raise ModelError(
        f"{artifact.ref} was trained on {theirs}, and the endpoint '{endpoint}' serves {ours}",
        hint=f"train it on what is served: llmo train --model {ours} --method lora, or deploy {theirs}",
    )
