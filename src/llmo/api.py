"""The verbs: what a user can do, as one contract that `System` (in this process) and `Client` (over HTTP) both keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llmo.types import Adapter, Artifact, Asked, Device, Endpoint, Event, Feedback, Job, Key, Kind, Needs


class Api(Protocol):
    """Every method raises an LLMOError when it refuses; ids and refs go in, records come out."""

    def check(self, project: Mapping[str, Any]) -> Job:
        """Submit the preflight of a project; its result is what `llmo check` shows."""

    def plan(self, project: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The steps: `{"key", "op", "title", "state": "done" | "to do", "ref"}`."""

    def run(self, project: Mapping[str, Any], *, fresh: bool = False) -> Job:
        """Submit the whole way; an identical project that is running is joined."""

    def submit(
        self,
        op: str,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
        *,
        name: str = "",
        needs: Needs | None = None,
        fresh: bool = False,
    ) -> Job:
        """Submit one step. `inputs` maps names to refs (`name`, `name@3`, a digest)."""

    def job(self, id: int) -> Job: ...

    def jobs(self, *, all: bool = False, parent: int | None = None, limit: int = 50) -> list[Job]:
        """Newest first; without `all`, children of other jobs are left out unless they still run."""

    def events(self, after: int = 0, *, root: int | None = None) -> list[Event]:
        """Events with a greater id, of one tree of jobs or of all."""

    def log(self, id: int, offset: int = 0) -> tuple[str, int]:
        """What a job printed from `offset` bytes on, and the next offset."""

    def kill(self, id: int) -> Job: ...

    def artifacts(self, kind: Kind | None = None, name: str | None = None) -> list[Artifact]: ...

    def artifact(self, ref: str, kind: Kind | None = None) -> Artifact: ...

    def lineage(self, ref: str) -> list[Artifact]:
        """Parents first, itself last."""

    def rows(self, ref: str, split: str = "train", *, offset: int = 0, limit: int = 20) -> list[dict[str, Any]]:
        """Rows of a data set; the split `dropped` holds what cleaning left out, with reasons."""

    def golden(self, ref: str) -> list[dict[str, Any]]:
        """What a model is verified with: each `text` that its training graph was asked before it was saved, and what
        it said."""

    def report(self, ref: str) -> dict[str, Any]:
        """What was measured of a model when it was trained, or by `evaluate`; it holds rows of the data."""

    def report_page(self, ref: str) -> str:
        """The same as one page of HTML."""

    def devices(self) -> list[Device]: ...

    def endpoints(self) -> list[Endpoint]: ...

    def remove_endpoint(self, name: str) -> None: ...

    def adapters(self, endpoint: str) -> list[Adapter]:
        """What an endpoint answers beside its own model, as `ENDPOINT:NAME`."""

    def add_adapter(self, endpoint: str, name: str, model: str) -> Adapter:
        """Let a running endpoint answer with `model` too, a version that was trained with LoRA on what the endpoint
        serves; over an encoder, one that was trained with method head or lora on the same trunk. Raises ModelError or
        GateRefused for one that does not fit or does nothing, ConflictError for a name in use."""

    def remove_adapter(self, endpoint: str, name: str) -> None:
        """Answers that have begun end as they would have."""

    def predict(self, endpoint: str, texts: Sequence[Asked], *, logits: bool = False) -> list[dict[str, Any]]:
        """Answers in the order of the texts, of an endpoint, of ENDPOINT:ADAPTER, or of the version of either. A task
        of two texts is asked with objects of texts by name."""

    def give_feedback(self, feedback: Mapping[str, Any]) -> Feedback:
        """Keep what somebody says of an answer; `llmo.store.feedback.parse` says what the mapping holds."""

    def feedback(self, endpoint: str | None = None, *, after: int = 0, limit: int = 100) -> list[Feedback]:
        """Feedback with a greater id, oldest first; of one endpoint, whichever side of a comparison it was."""

    def make_key(self, owner: str, role: str) -> tuple[Key, str]:
        """A new API key and its secret, which is kept nowhere."""

    def api_keys(self) -> list[Key]: ...

    def revoke_key(self, id: str) -> None: ...

    def close(self) -> None: ...
