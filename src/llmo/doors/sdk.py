"""The Python SDK: the same verbs for notebooks and scripts, in this process or on the server that LLMO_URL names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmo.api import Api
from llmo.doors import flow
from llmo.errors import SpecError
from llmo.types import Adapter, Artifact, Asked, Kind

if TYPE_CHECKING:
    from llmo.doors.gateway import Door

_connections: list[Api] = []


def connection() -> Api:
    """The one connection of this process, made at the first use; `LLMO_URL` and `LLMO_HOME` decide which."""
    if not _connections:
        _connections.append(flow.connect())
    return _connections[0]


@contextmanager
def gateway(*endpoints: str, api: Api | None = None) -> Iterator[Door]:
    """Endpoints over HTTP for as long as the block lasts: the running server's, or one of this process's own, which
    starts the `endpoints` that are named.

    `door.url` and `door.key` are what any client needs, OpenAI's with `base_url=f"{door.url}/v1"`.
    """
    from llmo.doors.gateway import gateway as opened  # the HTTP stack is only needed here

    with opened(api or connection()) as door:
        for name in endpoints:
            door.awake(name)
        yield door


@dataclass(frozen=True, slots=True)
class Stored:
    """A version in the store: `ref` is name@version, `card` what is known of it."""

    artifact: Artifact
    api: Api = field(repr=False, compare=False)

    @property
    def ref(self) -> str:
        return self.artifact.ref

    @property
    def card(self) -> Mapping[str, Any]:
        return self.artifact.card


class Dataset(Stored):
    """A cleaned, split, immutable data set."""

    __slots__ = ()

    @classmethod
    def load(
        cls, source: str | Path, *, name: str, task: str = "text-classification", api: Api | None = None, **spec: Any
    ) -> Dataset:
        """Import a file, folder or `package:NAME/FOLDER`; further keywords are those of the `data:` section.

        Raises DataError for what cannot be read or learnt from.
        """
        api = api or connection()
        told = {"source": flow.absolute(str(source), Path()), "task": task, **spec}
        return cls(flow.output(api, flow.wait(api, api.submit("import", told, name=name))), api)

    @classmethod
    def get(cls, ref: str, *, api: Api | None = None) -> Dataset:
        """A stored data set by NAME, NAME@VERSION or digest."""
        api = api or connection()
        return cls(api.artifact(ref, Kind.DATASET), api)

    def rows(self, split: str = "train", *, offset: int = 0, limit: int = 20) -> list[dict[str, Any]]:
        """Rows of train, dev, test or `dropped` (what cleaning left out, with reasons)."""
        return self.api.rows(self.artifact.digest, split, offset=offset, limit=limit)


class Model(Stored):
    """A trained or compressed, immutable model."""

    __slots__ = ()

    @classmethod
    def get(cls, ref: str, *, api: Api | None = None) -> Model:
        """A stored model by NAME, NAME@VERSION or digest."""
        api = api or connection()
        return cls(api.artifact(ref, Kind.MODEL), api)

    @classmethod
    def plain(cls, source: str | Path, *, api: Api | None = None) -> Model:
        """A base model that writes, as it is: package:NAME, hf:NAME, a folder, a GGUF file, or a stored one.

        Raises ModelError for one that writes nothing.
        """
        api = api or connection()
        return cls(flow.servable(api, str(source)), api)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Held-out metrics after training, each with its 95% interval: `{"accuracy": {"value", "low", "high"}}`."""
        after: Mapping[str, Any] = self.card.get("metrics", {}).get("test", {}).get("after", {})
        return after

    def report(self) -> Mapping[str, Any]:
        """What was measured when it was trained: metrics, classes, calibration, the worst errors. Raises NotFoundError
        where no rows were held out, and for a model that was not trained."""
        return self.api.report(self.artifact.digest)

    def evaluate(self, data: Dataset | None = None, *, split: str = "test") -> Mapping[str, Any]:
        """Metrics on a split of `data` (default: the data it was trained on)."""
        digest = data.artifact.digest if data else flow.data_of(self.api, self.artifact)
        job = self.api.submit("evaluate", {"split": split}, {"model": self.artifact.digest, "data": digest})
        metrics: Mapping[str, Any] = flow.result(flow.wait(self.api, job))["metrics"]
        return metrics


@dataclass(frozen=True, slots=True)
class Deployed:
    """A public name that answers."""

    name: str
    api: Api = field(repr=False, compare=False)

    def predict(self, texts: Asked | Sequence[Asked]) -> Any:
        """One answer for one text (or an object of texts, as the task asks them), a list for many."""
        if isinstance(texts, str | Mapping):
            return self.api.predict(self.name, [texts])[0]
        return self.api.predict(self.name, texts)

    def adapters(self) -> list[Adapter]:
        """What it answers beside its own model, each asked for as `ENDPOINT:NAME`."""
        return self.api.adapters(self.name)

    def add_adapter(self, name: str, model: Model | str | Path) -> Adapter:
        """Answer with a model that was trained with LoRA on what is served, or with the LoRA in a folder as peft saved
        it elsewhere; over an encoder, with a model of method head or lora on the same trunk. At once and without a
        restart. Raises ModelError or GateRefused for one that does not fit or does nothing, ConflictError for a name
        in use."""
        if not isinstance(model, Model):
            return self.api.add_adapter(self.name, name, flow.adapter(self.api, self.name, name, str(model)))
        return self.api.add_adapter(self.name, name, model.artifact.digest)

    def remove_adapter(self, name: str) -> None:
        """Raises NotFoundError. Answers that have begun are finished."""
        self.api.remove_adapter(self.name, name)

    def against(
        self,
        other: str,
        *,
        by: str,
        data: Dataset | None = None,
        split: str = "test",
        rows: int = 32,
        criterion: str = "",
        reference: bool = True,
        **settings: Any,
    ) -> Mapping[str, Any]:
        """Whether this endpoint answers better than `other` (ENDPOINT or ENDPOINT:ADAPTER), by the verdict of a third
        on held-out questions of `data` (default: what its model was trained on).

        `wins`, `losses`, `ties`, and with 95% intervals `win_rate` (a tie is half a win) and `consistency`, the share
        of pairs judged alike in both orders. `settings` are those of the answers, such as `temperature`.
        """
        from llmo.doors import judging  # the HTTP stack is only needed here

        match = judging.Match(self.name, other, by, settings, criterion, reference)
        digest = data.artifact.digest if data else None
        return judging.result(match, judging.contest(self.api, match, data=digest, split=split, rows=rows))


def train(data: Dataset, *, model: str | Path | Model, name: str | None = None, **spec: Any) -> Model:
    """Train `model` (package:NAME, a folder, hf:NAME, scratch:NAME or a stored one) on `data`.

    Keywords are those of the `train:` section, and `max_length`. Raises JobFailed when the training fails.
    """
    if not isinstance(model, str | Path | Model):
        raise SpecError(f"a model is named by text, not by {model!r:.80}", hint="write it like package:NAME or NAME@1")
    base = model.artifact.digest if isinstance(model, Model) else str(model)
    api = data.api
    task = {"name": data.card["task"]} | ({"max_length": spec.pop("max_length")} if "max_length" in spec else {})
    flow.check("train", {"task": task, **spec})
    made = flow.ensure_model(api, base, data=data.artifact, seed=spec.get("seed"))
    inputs = {"data": data.artifact.digest, "model": made}
    job = api.submit("train", {"task": task, **spec}, inputs, name=name or data.artifact.name)
    return Model(flow.output(api, flow.wait(api, job)), api)


def compress(model: Model, *, data: Dataset | None = None, name: str | None = None, **spec: Any) -> Model:
    """The fastest variant within `max_drop` of the model's quality. Raises GateRefused when there is none."""
    api = model.api
    inputs = {
        "model": model.artifact.digest,
        "data": data.artifact.digest if data else flow.data_of(api, model.artifact),
    }
    job = api.submit("compress", spec, inputs, name=name or f"{model.artifact.name}-compressed")
    return Model(flow.output(api, flow.wait(api, job)), api)


def export(
    model: Model,
    out: str | Path,
    *,
    target: str = "edge",
    precision: str | None = None,
    max_mb: float | None = None,
) -> Path:
    """Write the model into a new folder that runs without LLMO; returns its path. `target` is edge, onnx or openvino.

    Raises GateRefused, and writes nothing, when the folder is larger than `max_mb` millions of bytes or does not answer
    as the model does; InputError for a model that cannot be exported, or a folder that is there already.
    """
    api = model.api
    job = flow.export(api, model.artifact.digest, Path(out), target=target, precision=precision, max_mb=max_mb)
    return Path(flow.result(flow.wait(api, job))["out"])


def deploy(model: Model, endpoint: str, **spec: Any) -> Deployed:
    """Verify a model and put it behind an endpoint. Raises GateRefused when it is not what was trained."""
    api = model.api
    flow.wait(api, api.submit("serve", {"endpoint": endpoint, **spec}, {"model": model.artifact.digest}))
    return Deployed(endpoint, api)
