"""Which adapters answer behind which endpoint: those in the store that fit the model it serves now."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llmo.errors import LLMOError, ModelError, NotFoundError, nearest
from llmo.kernel.service import task_of
from llmo.store import Store
from llmo.tasks.card import ADAPTER
from llmo.types import Adapter, Artifact, Endpoint

_NOT_ENCODERS = ("", "generation")
_METHODS = ("head", "lora", "rslora")  # of training an encoder, that leave its trunk beneath
_OF_ITS_BASE = ("none", "head")  # methods that leave the weights of the base as they are
_log = logging.getLogger("llmo.serve")


@dataclass(frozen=True, slots=True)
class Ready:
    """An adapter, and the folder a replica loads it from."""

    adapter: Adapter
    folder: str


class AdapterTable:
    """What the store says, kept in memory where it cannot change; any thread may call `load`."""

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
                self._folders[adapter.model] = folder_of(self._store, self._store.catalog.get(adapter.model))
            except LLMOError as error:  # its bytes are gone: it cannot answer, and the others can
                if adapter.model not in self._gone:
                    self._gone.add(adapter.model)
                    _log.warning("the adapter %s of %s cannot be read: %s", adapter.name, adapter.endpoint, error)
                return None
        return self._folders[adapter.model]


def bases(store: Store, model: str) -> frozenset[str]:
    """The models whose weights a served one has: itself, what it was compressed from, the base of an untouched
    one, and whose trunk it has."""
    found = {model}
    artifact = store.catalog.find(model)
    while artifact is not None and ("reference" in artifact.card or artifact.card.get("method") in _OF_ITS_BASE):
        made_from = artifact.inputs.get("model")
        if made_from is None:
            break
        found.add(made_from)
        artifact = store.catalog.find(made_from)
    return frozenset(found)


def trained(store: Store, artifact: Artifact) -> Artifact:
    """The model as it was trained: what a compressed one was made from, else itself."""
    if "reference" not in artifact.card:
        return artifact
    return store.catalog.find(artifact.inputs.get("model", "")) or artifact


def trunk(store: Store, model: str) -> str:
    """Whose trunk a model has: its base's, as long as only heads were trained; else its own."""
    artifact = store.catalog.find(model)
    while artifact is not None and artifact.card.get("method") == "head" and "model" in artifact.inputs:
        model = artifact.inputs["model"]
        artifact = store.catalog.find(model)
    return model


def folder_of(store: Store, artifact: Artifact) -> str:
    """What a replica loads: of a model that generates its adapter, of an encoder all of it, for its head is among its
    weights. Raises ModelError for one without, StorageError when it is gone."""
    path = store.catalog.path(artifact.digest)
    method = artifact.card.get("method")
    if task_of(artifact.card) not in _NOT_ENCODERS:
        if method not in _METHODS:
            raise ModelError(
                f"{artifact.ref} was trained with method {method}, so it has a trunk of its own",
                hint="train it with `method: head` or `method: lora`, or deploy it by itself",
            )
        return str(path)
    if not (path / ADAPTER).is_dir():
        raise ModelError(f"{artifact.ref} has no adapter beside its weights", hint="train it with `method: lora`")
    return str(path / ADAPTER)


def check_base(store: Store, artifact: Artifact, served: str, endpoint: str) -> str:
    """The digest of the model whose trunk it was trained on. Raises ModelError when the endpoint serves another."""
    base = artifact.inputs.get("model", "")
    beneath = trunk(store, base)
    if base and beneath in bases(store, served):
        return beneath
    found = [store.catalog.find(digest) for digest in (base, served)]
    theirs, ours = (a.ref if a is not None else "a model that is not stored here" for a in found)
    method = "lora" if task_of(artifact.card) in _NOT_ENCODERS else "head"
    raise ModelError(
        f"{artifact.ref} was trained on {theirs}, and the endpoint '{endpoint}' serves {ours}",
        hint=f"train it on what is served: llmo train --model {ours} --method {method}, or deploy {theirs}",
    )


def missing(endpoint: str, name: str, known: Collection[str]) -> NotFoundError:
    return NotFoundError(
        f"the endpoint '{endpoint}' has no adapter '{name}'{nearest(name, sorted(known))}",
        hint=f"it has: {', '.join(sorted(known)) or 'none'}",
    )
