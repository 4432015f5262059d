"""The same verbs over HTTP: a typed client of a running server. It raises the errors that the CLI shows."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from llmo import sources
from llmo.doors.talk import refusal
from llmo.errors import SpecError, UnauthorizedError, UnreachableError
from llmo.types import Adapter, Artifact, Asked, Device, Endpoint, Event, Feedback, Job, Key, Kind, Needs, to_json
from llmo.types import from_json as record

PAGE = 1000  # rows, or jobs, that the server sends at most at once
FEEDBACK_PAGE = 100
TIMEOUT = httpx.Timeout(60.0, connect=5.0)


class Client:
    """`Client("http://127.0.0.1:8420", "llmo_...")`. Local files named in a project are sent to the server first."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.key = key
        if key and not (key.isascii() and key.isprintable()):
            raise UnauthorizedError("the API key holds characters that no key has", hint="set LLMO_KEY again")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            raise self._no_address(str(error)) from None

    def check(self, project: Mapping[str, Any]) -> Job:
        return record(Job, self._post("/v1/projects/check", {"project": self._sent(project)}))

    def plan(self, project: Mapping[str, Any]) -> list[dict[str, Any]]:
        return list(self._post("/v1/projects/plan", {"project": self._sent(project)}))

    def run(self, project: Mapping[str, Any], *, fresh: bool = False) -> Job:
        return record(Job, self._post("/v1/projects/run", {"project": self._sent(project), "fresh": fresh}))

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
        sent = dict(spec)
        if "source" in sent:
            sent["source"] = self._uploaded(str(sent["source"]))
        body = {"op": op, "spec": to_json(sent), "inputs": dict(inputs or {}), "name": name, "fresh": fresh}
        return record(Job, self._post("/v1/jobs", body | ({"needs": to_json(needs)} if needs else {})))

    def job(self, id: int) -> Job:
        return record(Job, self._get(f"/v1/jobs/{id}"))

    def jobs(self, *, all: bool = False, parent: int | None = None, limit: int = 50) -> list[Job]:
        query = {"all": all, "limit": min(limit, PAGE)} | ({"parent": parent} if parent is not None else {})
        return [record(Job, job) for job in self._get("/v1/jobs", query)]

    def events(self, after: int = 0, *, root: int | None = None) -> list[Event]:
        query = {"after": after} | ({"root": root} if root is not None else {})
        return [record(Event, event) for event in self._get("/v1/events", query)]

    def log(self, id: int, offset: int = 0) -> tuple[str, int]:
        found = self._get(f"/v1/jobs/{id}/log", {"offset": offset})
        return found["text"], found["offset"]

    def kill(self, id: int) -> Job:
        return record(Job, self._post(f"/v1/jobs/{id}/kill", {}))

    def artifacts(self, kind: Kind | None = None, name: str | None = None) -> list[Artifact]:
        query = {key: value for key, value in (("kind", kind), ("name", name)) if value}
        return [record(Artifact, artifact) for artifact in self._get("/v1/artifacts", query)]

    def artifact(self, ref: str, kind: Kind | None = None) -> Artifact:
        return record(Artifact, self._get(f"/v1/artifacts/{_part(ref)}", {"kind": kind} if kind else {}))

    def lineage(self, ref: str) -> list[Artifact]:
        return [record(Artifact, artifact) for artifact in self._get(f"/v1/artifacts/{_part(ref)}/lineage")]

    def rows(self, ref: str, split: str = "train", *, offset: int = 0, limit: int = 20) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            wanted = min(limit - len(found), PAGE)
            query = {"split": split, "offset": offset + len(found), "limit": wanted}
            page = list(self._get(f"/v1/artifacts/{_part(ref)}/rows", query))
            found += page
            if len(page) < wanted or len(found) >= limit:
                return found

    def golden(self, ref: str) -> list[dict[str, Any]]:
        return [dict(item) for item in self._get(f"/v1/artifacts/{_part(ref)}/golden")]

    def report(self, ref: str) -> dict[str, Any]:
        return dict(self._get(f"/v1/artifacts/{_part(ref)}/report"))

    def report_page(self, ref: str) -> str:
        return str(self._get(f"/v1/artifacts/{_part(ref)}/report/page")["html"])

    def devices(self) -> list[Device]:
        return [record(Device, device) for device in self._get("/v1/devices")]

    def endpoints(self) -> list[Endpoint]:
        return [record(Endpoint, endpoint) for endpoint in self._get("/v1/endpoints")]

    def remove_endpoint(self, name: str) -> None:
        self._request("DELETE", f"/v1/endpoints/{_part(name)}")

    def adapters(self, endpoint: str) -> list[Adapter]:
        return [record(Adapter, adapter) for adapter in self._get(f"/v1/endpoints/{_part(endpoint)}/adapters")]

    def add_adapter(self, endpoint: str, name: str, model: str) -> Adapter:
        body = {"name": name, "model": model}
        return record(Adapter, self._post(f"/v1/endpoints/{_part(endpoint)}/adapters", body))

    def remove_adapter(self, endpoint: str, name: str) -> None:
        self._request("DELETE", f"/v1/endpoints/{_part(endpoint)}/adapters/{_part(name)}")

    def predict(self, endpoint: str, texts: Sequence[Asked], *, logits: bool = False) -> list[dict[str, Any]]:
        body = {"texts": list(texts)} | ({"logits": True} if logits else {})
        return list(self._post(f"/v1/endpoints/{_part(endpoint)}/predict", body)["answers"])

    def give_feedback(self, feedback: Mapping[str, Any]) -> Feedback:
        return record(Feedback, self._post("/v1/feedback", feedback))

    def feedback(self, endpoint: str | None = None, *, after: int = 0, limit: int = 100) -> list[Feedback]:
        found: list[Feedback] = []
        while True:
            wanted = min(limit - len(found), FEEDBACK_PAGE)
            query = {"after": found[-1].id if found else after, "limit": wanted}
            page = self._get("/v1/feedback", query | ({"endpoint": endpoint} if endpoint is not None else {}))
            found += [record(Feedback, entry) for entry in page]
            if len(page) < wanted or len(found) >= limit:
                return found

    def complete(self, messages: Sequence[Mapping[str, Any]] | None = None, **body: Any) -> dict[str, Any]:
        """One whole answer in OpenAI's protocol, to `messages` or else to the `prompt` in `body`."""
        if messages is None:
            return dict(self._post("/v1/completions", body))
        return dict(self._post("/v1/chat/completions", {"messages": list(messages), **body}))

    def make_key(self, owner: str, role: str) -> tuple[Key, str]:
        found = self._post("/v1/keys", {"owner": owner, "role": role})
        return record(Key, found), found["key"]

    def api_keys(self) -> list[Key]:
        return [record(Key, key) for key in self._get("/v1/keys")]

    def revoke_key(self, id: str) -> None:
        self._request("DELETE", f"/v1/keys/{_part(id)}")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _sent(self, project: Mapping[str, Any]) -> dict[str, Any]:
        also = [{**one, "data": self._of_server(one["data"])} for one in project.get("also", ())]
        there = {"data": self._of_server(project["data"]), "model": self._uploaded(project["model"])}
        return dict(to_json({**project, **there, **({"also": also} if also else {})}))

    def _of_server(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return {**data, "source": self._uploaded(data["source"])}

    def _uploaded(self, source: str) -> str:
        """A source the server understands: local files are packed, sent once, and named by their content."""
        if not sources.is_local_path(source) or (sources.is_stored(source) and not Path(source).exists()):
            return source
        path = sources.resolve(source)
        digest = sources.fingerprint(path).removeprefix("sha256:")
        found = f"upload:{digest}/{path.name}"
        if self._get(f"/v1/uploads/{digest}")["present"]:
            return found
        with tempfile.TemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                archive.add(path, arcname=path.name, filter=_plain)
            packed.seek(0)
            self._request("PUT", f"/v1/uploads/{digest}", content=iter(lambda: packed.read(1 << 20), b""))
        return found

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> Any:
        return self._request("GET", path, params=dict(query or {}))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        # ASCII: half a surrogate pair is refused by the server in words, not by our encoder.
        try:
            content = json.dumps(to_json(body), allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            raise SpecError(f"this cannot be sent as JSON: {error}", hint="write finite numbers") from None
        return self._request("POST", path, content=content, headers={"Content-Type": "application/json"})

    def _no_address(self, why: str) -> UnreachableError:
        return UnreachableError(
            f"'{self.url}' is not the address of a server: {why}", hint="write LLMO_URL like http://127.0.0.1:8420"
        )

    def _request(self, method: str, path: str, **options: Any) -> Any:
        try:
            reply = self._http.request(method, path, **options)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, ValueError) as error:
            raise self._no_address(str(error)) from None
        except httpx.TransportError as error:
            raise UnreachableError(
                f"the server at {self.url} cannot be reached ({type(error).__name__})",
                hint="start it with: llmo up; or unset LLMO_URL to work in this process",
            ) from None
        if reply.status_code == 204:
            return None
        try:
            body = reply.json()
        except ValueError:
            raise self._stranger(reply) from None
        if reply.is_success:
            return body
        told = body.get("error") if isinstance(body, dict) else None
        raise refusal(reply.status_code, told) if isinstance(told, dict) else self._stranger(reply)

    def _stranger(self, reply: httpx.Response) -> UnreachableError:
        return UnreachableError(
            f"what answers at {self.url} is no LLMO server: it said {reply.status_code} {reply.reason_phrase}",
            hint="set LLMO_URL to the address that llmo up prints",
        )


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Files and folders only, as a source's fingerprint counts them."""
    return info if info.isreg() or info.isdir() else None


def _part(name: str) -> str:
    """A name as one part of a path, whatever is in it."""
    return quote(name, safe="@:", errors="replace") or "%20"
