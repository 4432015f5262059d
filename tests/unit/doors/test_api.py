"""The HTTP API under bad input: every refusal is JSON with a code, and nothing of the server's disk can be named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from llmo.doors.api import create_app
from llmo.settings import Settings
from llmo.system import System


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with System(Settings(home=tmp_path_factory.mktemp("store"))) as system:
        _, secret = system.make_key("test", "admin")
        with TestClient(
            create_app(system), headers={"Authorization": f"Bearer {secret}"}, raise_server_exceptions=False
        ) as client:
            yield client


def refused(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert error["what"]
    return error


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("", 422, "required"),
        ("{", 422, "json"),
        ("[]", 422, "dictionary"),
        ('{"project": {}, "more": 1}', 422, "extra"),
        ('{"project": {"name": "\\ud800"}}', 422, "surrogate"),
        ('{"project": {"name": NaN}}', 422, "finite"),
        ('{"project": {"nmae": "x"}}', 422, "did you mean 'name'"),
        ('{"project": ' * 50_000, 400, "parsing"),
        ("[" * 50_000 + "]" * 50_000, 400, "parsing"),
    ],
)
def test_bodies_that_are_no_project(http: TestClient, body: str, status: int, words: str) -> None:
    error = refused(http.post("/v1/projects/run", content=body, headers=JSON), status)
    assert words in f"{error['what']} {error.get('hint')}".lower()


def test_a_body_over_the_limit(http: TestClient) -> None:
    assert refused(http.post("/v1/projects/run", content=b"a" * (2 << 20), headers=JSON), 413)["code"] == "too_large"


def test_routes_that_are_none(http: TestClient) -> None:
    assert refused(http.get("/v1/nope"), 404)["code"] == "not_found"
    assert refused(http.patch("/v1/jobs"), 405)["code"] == "not_found"


@pytest.mark.parametrize(
    "source", ["/etc/passwd", "etc/passwd", "..", ".", "~", "~root", "pyproject.toml", "~/x@1", "file:///etc/passwd"]
)
def test_no_path_of_the_server_can_be_named(http: TestClient, source: str) -> None:
    spec = {"source": source, "task": "text-classification"}
    error = refused(http.post("/v1/jobs", json={"op": "import", "spec": spec, "name": "x"}), 422)
    assert "paths of the server" in error["what"]
    assert refused(http.post("/v1/jobs", json={"op": "base-model", "spec": {"source": source}}), 422) == error
    project = {"name": "x", "task": "text-classification", "data": {"source": source}, "model": "package:numpy"}
    assert refused(http.post("/v1/projects/run", json={"project": project}), 422) == error


@pytest.mark.parametrize(
    "source", ["upload:x/../../etc", "upload:" + "a" * 64 + "/../../x", "upload:", "package:", "package:no-such-thing"]
)
def test_sources_that_are_not_there(http: TestClient, source: str) -> None:
    spec = {"source": source, "task": "text-classification", "uploads": "/etc"}
    refused(http.post("/v1/jobs", json={"op": "import", "spec": spec, "name": "x"}), 422)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"op": "pipeline"}, "cannot be submitted"),
        ({"op": "train", "spec": {}}, "'task' is missing"),
        ({"op": "serve", "spec": {"endpoint": "x"}}, "needs the input 'model'"),
        ({"op": "evaluate", "inputs": {"model": "x"}}, "needs the input 'data'"),
        ({"op": "verify", "inputs": {"model": "x", "more": "y"}}, "no input 'more'"),
        ({"op": "compress", "spec": {"max_drop": -1}, "inputs": {}}, "max_drop"),
    ],
)
def test_jobs_that_are_not_taken(http: TestClient, body: dict[str, Any], words: str) -> None:
    assert words in refused(http.post("/v1/jobs", json=body), 422)["what"]
    assert http.get("/v1/jobs?all=true").json() == []


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/jobs/abc", 422),
        ("/v1/jobs/-1", 404),
        ("/v1/jobs/" + "9" * 30, 422),
        ("/v1/jobs?limit=0", 422),
        ("/v1/jobs?limit=1001", 422),
        ("/v1/jobs/1/log?offset=-1", 422),
        ("/v1/events?after=abc", 422),
        ("/v1/events?after=" + "9" * 30, 422),
        ("/v1/artifacts/nope", 404),
        ("/v1/artifacts/%ED%A0%80", 404),
        ("/v1/artifacts/nope/rows?offset=-1", 422),
        ("/v1/artifacts?kind=cake", 422),
        ("/v1/uploads/zzz", 422),
    ],
)
def test_numbers_and_names_that_are_none(http: TestClient, path: str, status: int) -> None:
    refused(http.get(path), status)


def test_an_upload_is_what_its_name_says(http: TestClient, tmp_path: Path) -> None:
    error = refused(http.put("/v1/uploads/" + "a" * 64, content=b"x" * 600), 422)
    assert "tar" in error["what"]
    assert not http.get("/v1/uploads/" + "a" * 64).json()["present"]


def test_keys(http: TestClient) -> None:
    for body in ({"owner": ""}, {"owner": "\ud800", "role": "admin"}, {"owner": "x", "role": "king"}):
        refused(http.post("/v1/keys", content=json.dumps(body), headers=JSON), 422)
    refused(http.delete("/v1/keys/nope"), 404)
    for header in ("Bearer nope", "Basic eDp5", "Bearer", "llmo_x"):
        assert refused(http.get("/v1/jobs", headers={"Authorization": header}), 401)["code"] == "unauthorized"
