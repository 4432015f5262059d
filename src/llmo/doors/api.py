"""The HTTP API: one route a verb, each declaring what it needs; parses, calls System, returns its records as JSON."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llmo import __version__, sources
from llmo.doors.web import include_pages
from llmo.errors import InputError, LLMOError, NotFoundError, SpecError, TooLargeError
from llmo.guard.access import check_declared, declare, require
from llmo.guard.limits import Quotas
from llmo.serve.gateway import error_response, include_gateway
from llmo.system import System
from llmo.types import Key, Kind, Needs, to_json

UPLOAD_LIMIT = 16 << 30
FEEDBACK_PAGE = 100


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProjectBody(Body):
    """`project` is a specification as JSON, as `llmo check --resolved` explains it."""

    project: dict[str, Any]
    fresh: bool = False


class NeedsBody(Body):
    cores: Annotated[int, Field(ge=0)] = 1
    cores_max: int | None = None
    memory: Annotated[int, Field(ge=0)] = 512 << 20
    gpus: Annotated[int, Field(ge=0)] = 0


class JobBody(Body):
    """`inputs` maps names to refs of stored data sets and models."""

    op: str
    spec: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)
    name: str = ""
    needs: NeedsBody | None = None
    fresh: bool = False


class FeedbackBody(Body):
    """What is said of an answer, or of two beside each other; `messages` are the conversation up to the question.

    A rating is good or bad, a comparison first, second or tie. An answer is `{"content", "model", "endpoint"}`.
    """

    endpoint: str
    kind: str
    messages: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    rating: str | None = None
    correction: str | None = None
    comment: str = ""


class AdapterBody(Body):
    """`model` is a version that was trained with LoRA on what the endpoint serves, or on the trunk of an encoder;
    `name` what it is asked for by."""

    name: str
    model: str


class KeyBody(Body):
    owner: Annotated[str, Field(min_length=1, max_length=200)]
    role: str = "predict"


def create_app(system: System) -> FastAPI:
    """The application over one System. Raises EnvironmentProblem when a route declares no requirement."""
    about = {"version": __version__, "description": "An operating system for language models."}
    app = FastAPIOffline(title="LLMO", redoc_url=None, static_url="/docs/static", **about)
    app.state.system = system
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _error)
    _projects(app, system)
    _jobs(app, system)
    _artifacts(app, system)
    _uploads(app, system)
    _machine(app, system)
    _adapters(app, system)
    _keys(app, system)
    gateway = include_gateway(app, system.store)
    system.usage = gateway.router.use
    _feedback(app, system, gateway.quotas)
    include_pages(app)
    for path in ("/docs", "/docs/oauth2-redirect", "/docs/static", "/openapi.json"):
        declare(app.routes, path, "public")
    _ask_for_a_key(app)
    check_declared(app)
    return app


def _ask_for_a_key(app: FastAPI) -> None:
    """Let the pages of /docs have a field for the API key, which every request then carries."""
    described = app.openapi()
    described.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    described["security"] = [{"key": []}]


async def _error(request: Request, error: Exception) -> Response:
    return error_response(LLMOError("the server made a mistake", hint="see its log"))


async def _no_route(request: Request, error: Exception) -> Response:
    """What the framework itself refuses (a path, a method, a body it cannot parse), as one of our errors."""
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (404, "")
    if status in (404, 405):
        what = f"{request.method} {request.url.path} is no route of this server"
        answer = error_response(NotFoundError(what, hint="see /docs for the routes"))
    else:
        answer = error_response(InputError(str(detail), hint="see /docs for what this route takes"))
    answer.status_code = status
    return answer


async def _invalid(request: Request, error: Exception) -> Response:
    """FastAPI's own words for a body or parameter that does not fit, as one of our errors."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": str(error)}
    where = ".".join(str(part) for part in first["loc"])
    return error_response(InputError(str(first["msg"]), where=where, hint="see /docs for what this route takes"))


def _portable(project: dict[str, Any]) -> dict[str, Any]:
    """Refuse paths of this server: what a caller names must mean the same for everyone."""
    also = project.get("also")
    for one in (project, *(also if isinstance(also, list) else ())):
        data = one.get("data") if isinstance(one, dict) else None
        _refuse_path(data.get("source") if isinstance(data, dict) else None)
    _refuse_path(project.get("model"))
    return project


def _refuse_path(source: Any) -> None:
    if not isinstance(source, str) or not sources.is_local_path(source):
        return
    if not sources.is_stored(source) or Path(source).exists():
        raise SpecError(
            f"'{source}' is a path, and paths of the server cannot be named over HTTP",
            hint="send the file first (PUT /v1/uploads/DIGEST; the Python client and the CLI do so by themselves)",
        )


def _projects(app: FastAPI, system: System) -> None:
    needs = [Depends(require("jobs.submit"))]

    @app.post("/v1/projects/check", dependencies=needs, status_code=202)
    def check(body: ProjectBody) -> Any:
        """Submit the preflight of a project."""
        return to_json(system.check(_portable(body.project)))

    @app.post("/v1/projects/plan", dependencies=needs)
    def plan(body: ProjectBody) -> Any:
        """The steps of a project, and which of them are done."""
        return system.plan(_portable(body.project))

    @app.post("/v1/projects/run", dependencies=needs, status_code=202)
    def run(body: ProjectBody) -> Any:
        """Submit the whole way; an identical project that is running is joined."""
        return to_json(system.run(_portable(body.project), fresh=body.fresh))


def _jobs(app: FastAPI, system: System) -> None:
    reads = [Depends(require("jobs.read"))]

    @app.post("/v1/jobs", dependencies=[Depends(require("jobs.submit"))], status_code=202)
    def submit(body: JobBody) -> Any:
        """Submit one step: import, base-model, scratch-model, plain, adapter, train, explain, tune, evaluate,
        compress, verify or serve."""
        _refuse_path(body.spec.get("source"))
        needs = Needs(**body.needs.model_dump()) if body.needs else None
        job = system.submit(body.op, body.spec, body.inputs, name=body.name, needs=needs, fresh=body.fresh)
        return to_json(job)

    @app.get("/v1/jobs", dependencies=reads)
    def jobs(all: bool = False, parent: int | None = None, limit: Annotated[int, Field(ge=1, le=1000)] = 50) -> Any:
        """Jobs, newest first."""
        return to_json(system.jobs(all=all, parent=parent, limit=limit))

    @app.get("/v1/jobs/{id}", dependencies=reads)
    def job(id: int) -> Any:
        """One job."""
        return to_json(system.job(id))

    @app.get("/v1/jobs/{id}/log", dependencies=reads)
    def log(id: int, offset: Annotated[int, Field(ge=0)] = 0) -> Any:
        """What a job printed, from an offset in bytes."""
        text, end = system.log(id, offset)
        return {"text": text, "offset": end}

    @app.post("/v1/jobs/{id}/kill", dependencies=[Depends(require("jobs.stop"))])
    def kill(id: int) -> Any:
        """Stop a job and its children."""
        return to_json(system.kill(id))

    @app.get("/v1/events", dependencies=reads)
    def events(after: int = 0, root: int | None = None) -> Any:
        """Events with a greater id, of one tree of jobs or of all."""
        return to_json(system.events(after, root=root))


def _artifacts(app: FastAPI, system: System) -> None:
    reads = [Depends(require("models.read"))]

    @app.get("/v1/artifacts", dependencies=reads)
    def artifacts(kind: Kind | None = None, name: str | None = None) -> Any:
        """Stored data sets, models and reports."""
        return to_json(system.artifacts(kind, name))

    @app.get("/v1/artifacts/{ref}", dependencies=reads)
    def artifact(ref: str, kind: Kind | None = None) -> Any:
        """One artifact by NAME, NAME@VERSION or digest."""
        return to_json(system.artifact(ref, kind))

    @app.get("/v1/artifacts/{ref}/lineage", dependencies=reads)
    def lineage(ref: str) -> Any:
        """What an artifact was made from, parents first."""
        return to_json(system.lineage(ref))

    @app.get("/v1/artifacts/{ref}/golden", dependencies=[Depends(require("data.read"))])
    def golden(ref: str) -> Any:
        """What a model is verified with: texts, and what its training graph said of them."""
        return system.golden(ref)

    @app.get("/v1/artifacts/{ref}/report", dependencies=[Depends(require("data.read"))])
    def report(ref: str) -> Any:
        """What was measured of a model when it was trained, or by `evaluate`; the worst errors are rows of the data."""
        return system.report(ref)

    @app.get("/v1/artifacts/{ref}/report/page", dependencies=[Depends(require("data.read"))])
    def report_page(ref: str) -> Any:
        """The same as one page of HTML, in JSON: `{"html"}`; texts of the data never become a page of this server."""
        return {"html": system.report_page(ref)}

    @app.get("/v1/artifacts/{ref}/rows", dependencies=[Depends(require("data.read"))])
    def rows(
        ref: str,
        split: str = "train",
        offset: Annotated[int, Field(ge=0)] = 0,
        limit: Annotated[int, Field(ge=0, le=1000)] = 20,
    ) -> Any:
        """Rows of a data set; the split `dropped` holds what cleaning left out."""
        return to_json(system.rows(ref, split, offset=offset, limit=limit))


def _uploads(app: FastAPI, system: System) -> None:
    writes = [Depends(require("data.write"))]

    @app.get("/v1/uploads/{digest}", dependencies=writes)
    def present(digest: str) -> Any:
        """Whether files of this content are here already."""
        return {"present": (_place(system, digest)).is_dir()}

    @app.put("/v1/uploads/{digest}", dependencies=writes)
    async def upload(digest: str, request: Request) -> Any:
        """A tar of one file or folder whose content has this SHA-256; afterwards the source `upload:DIGEST/NAME`."""
        place = _place(system, digest)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent) as packed:
            received = 0
            async for chunk in request.stream():
                received += len(chunk)
                if received > UPLOAD_LIMIT:
                    raise TooLargeError(f"an upload is at most {UPLOAD_LIMIT >> 30} GiB")
                packed.write(chunk)
            packed.seek(0)
            name = await run_in_threadpool(_unpack, packed, place, digest)
        return {"source": f"upload:{digest}/{name}"}


def _place(system: System, digest: str) -> Path:
    if len(digest) != 64 or not all(letter in "0123456789abcdef" for letter in digest):
        raise InputError(f"'{digest[:80]}' is not a SHA-256 in hexadecimal")
    return system.settings.home / "uploads" / digest


def _unpack(packed: Any, place: Path, digest: str) -> str:
    """Unpack beside, check the content against its name, then move into place."""
    aside = Path(tempfile.mkdtemp(dir=place.parent, suffix=".tmp"))
    try:
        try:
            with tarfile.open(fileobj=packed, mode="r:") as archive:
                archive.extractall(aside, filter="data")
        except tarfile.TarError as error:
            raise InputError(f"the upload is not a tar archive that can be unpacked: {error}") from None
        inside = list(aside.iterdir())
        if len(inside) != 1:
            raise InputError("an upload holds exactly one file or folder")
        found = sources.fingerprint(inside[0]).removeprefix("sha256:")
        if found != digest:
            raise InputError(f"the upload's content is {found[:12]}…, not {digest[:12]}…", hint="send it again")
        if not place.exists():
            aside.rename(place)
        return inside[0].name
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _machine(app: FastAPI, system: System) -> None:
    @app.get("/v1/devices", dependencies=[Depends(require("devices.read"))])
    def devices() -> Any:
        """What computes here."""
        return to_json(system.devices())

    @app.get("/v1/endpoints", dependencies=[Depends(require("endpoints.read"))])
    def endpoints() -> Any:
        """Public names and what is behind them."""
        return to_json(system.endpoints())

    @app.delete("/v1/endpoints/{name}", dependencies=[Depends(require("endpoints.write"))], status_code=204)
    def remove_endpoint(name: str) -> None:
        """Take an endpoint down and forget it."""
        system.remove_endpoint(name)


def _adapters(app: FastAPI, system: System) -> None:
    writes = [Depends(require("endpoints.write"))]

    @app.get("/v1/endpoints/{name}/adapters", dependencies=[Depends(require("endpoints.read"))])
    def adapters(name: str) -> Any:
        """What an endpoint answers beside its own model; each is asked for as the model ENDPOINT:NAME."""
        return to_json(system.adapters(name))

    @app.post("/v1/endpoints/{name}/adapters", dependencies=writes, status_code=201)
    def add_adapter(name: str, body: AdapterBody) -> Any:
        """Let a running endpoint answer with one more adapter."""
        return to_json(system.add_adapter(name, body.name, body.model))

    @app.delete("/v1/endpoints/{name}/adapters/{adapter}", dependencies=writes, status_code=204)
    def remove_adapter(name: str, adapter: str) -> None:
        """Take an adapter away; answers that have begun are finished."""
        system.remove_adapter(name, adapter)


def _feedback(app: FastAPI, system: System, quotas: Quotas) -> None:
    @app.post("/v1/feedback", status_code=201)
    def give_feedback(body: FeedbackBody, key: Annotated[Key, Depends(require("predict"))]) -> Any:
        """Keep what somebody says of an answer: a rating, a comparison of two, or a better answer."""
        quotas.take(key.id, 1)
        return to_json(system.give_feedback(body.model_dump(), owner=key.owner))

    @app.get("/v1/feedback", dependencies=[Depends(require("data.read"))])
    def feedback(
        endpoint: str | None = None,
        after: int = 0,
        limit: Annotated[int, Field(ge=1, le=FEEDBACK_PAGE)] = FEEDBACK_PAGE,
    ) -> Any:
        """Feedback with a greater id, oldest first, of one endpoint or of all."""
        return to_json(system.feedback(endpoint, after=after, limit=limit))


def _keys(app: FastAPI, system: System) -> None:
    @app.get("/v1/keys", dependencies=[Depends(require("keys.read"))])
    def keys() -> Any:
        """API keys, without their secrets."""
        return to_json(system.api_keys())

    @app.post("/v1/keys", dependencies=[Depends(require("keys.write"))], status_code=201)
    def make_key(body: KeyBody) -> Any:
        """Make a key; its secret is in this answer only."""
        key, secret = system.make_key(body.owner, body.role)
        return {**to_json(key), "key": secret}

    @app.delete("/v1/keys/{id}", dependencies=[Depends(require("keys.write"))], status_code=204)
    def revoke_key(id: str) -> None:
        """Revoke a key."""
        system.revoke_key(id)
        app.state.access.forget()
