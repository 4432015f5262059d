"""Keys, roles, and the rule that no route is without a declaration."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from llmo.errors import EnvironmentProblem, ForbiddenError, LLMOError, UnauthorizedError
from llmo.guard.access import PERMISSIONS, ROLES, Access, Audit, Guarded, check_declared, declarations, declare, require
from llmo.types import Key

SECRETS = {f"llmo_{role}": Key(f"k-{role}", "me", role, 0.0) for role in ROLES}
SECRETS["llmo_old"] = Key("k-old", "me", "admin", 0.0, revoked_at=1.0)
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def bearer(secret: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + secret.encode())]


async def test_a_known_key_is_found_by_either_header() -> None:
    access = Access(SECRETS.get)
    assert (await access.key(bearer("llmo_member"))).role == "member"
    assert (await access.key([(b"authorization", b"bearer llmo_admin")])).role == "admin"
    assert (await access.key([(b"x-api-key", b"llmo_predict")])).role == "predict"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer("llmo_wrong"),
        bearer(""),
        bearer("llmo_old"),
        bearer("x" * 10_000),
        [(b"authorization", b"Basic bGxtb19hZG1pbg==")],
        [(b"authorization", b"llmo_admin")],
        [(b"authorization", b"Bearer \xff\xfe")],
    ],
)
async def test_anything_else_is_not_a_key(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(UnauthorizedError) as caught:
        await Access(SECRETS.get).key(headers)
    assert caught.value.hint


async def test_roles_hold_one_another() -> None:
    access = Access(SECRETS.get)
    for permission in PERMISSIONS - {"public"}:
        allowed = []
        for role in ROLES:
            with contextlib.suppress(ForbiddenError):
                await access.check(bearer(f"llmo_{role}"), permission)
                allowed.append(role)
        assert allowed in (["admin"], ["member", "admin"], ["predict", "member", "admin"])
    assert ROLES["predict"] < ROLES["member"] < ROLES["admin"]


async def test_a_key_is_looked_up_once_until_forgotten() -> None:
    asked: list[str] = []
    keys = dict(SECRETS)

    def find(secret: str) -> Key | None:
        asked.append(secret)
        return keys.get(secret)

    access = Access(find, ttl=1000.0)
    for _ in range(3):
        await access.key(bearer("llmo_admin"))
    assert asked == ["llmo_admin"]
    del keys["llmo_admin"]
    access.forget()
    with pytest.raises(UnauthorizedError):
        await access.key(bearer("llmo_admin"))


async def test_what_is_remembered_is_bounded() -> None:
    access = Access(SECRETS.get, ttl=1000.0)
    for n in range(10_050):
        access._known[n.to_bytes(4, "big")] = (0.0, None)
    with pytest.raises(UnauthorizedError):
        await access.key(bearer("llmo_wrong"))
    assert len(access._known) == 10_000


def application() -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.access = Access(SECRETS.get)

    @app.exception_handler(LLMOError)
    async def answer(request: Request, error: LLMOError) -> JSONResponse:
        return JSONResponse({"error": error.to_json()}, error.status)

    return app


async def get(app: Any, path: str, secret: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        return await client.get(path, headers=headers)


async def test_a_dependency_guards_a_route_and_hands_it_the_key() -> None:
    app = application()

    @app.get("/keys")
    async def keys(key: Annotated[Key, Depends(require("keys.read"))]) -> str:
        return key.id

    assert (await get(app, "/keys")).status_code == 401
    assert (await get(app, "/keys", "llmo_member")).status_code == 403
    assert (await get(app, "/keys", "llmo_admin")).json() == "k-admin"


async def test_mounts_and_plain_routes_are_guarded_by_declaring_them() -> None:
    app = application()

    async def page(request: Request) -> PlainTextResponse:
        return PlainTextResponse("page")

    app.mount("/files", Starlette(routes=[Route("/a", page)]))
    app.router.routes.append(Route("/open", page))
    with pytest.raises(EnvironmentProblem, match=r"/files/a.*/open"):
        check_declared(app)
    declare(app.routes, "/files", "data.read")
    declare(app.routes, "/open", "public")
    check_declared(app)
    assert (await get(app, "/files/a")).status_code == 401
    assert (await get(app, "/files/a", "llmo_predict")).json()["error"]["code"] == "forbidden"
    assert (await get(app, "/files/a", "llmo_member")).text == "page"
    assert (await get(app, "/open")).text == "page"


def test_an_undeclared_route_is_named_wherever_it_hides() -> None:
    app = FastAPI()

    @app.get("/plain")
    def plain() -> None: ...

    router = APIRouter(prefix="/inner")

    @router.get("/deep")
    def deep() -> None: ...

    @router.get("/fine", dependencies=[Depends(require("jobs.read"))])
    def fine() -> None: ...

    app.include_router(router)
    app.mount("/mounted", FastAPI(docs_url=None, redoc_url=None))
    app.router.routes.append(Mount("/anything", app=PlainTextResponse("x")))
    with pytest.raises(EnvironmentProblem) as caught:
        check_declared(app)
    for path in ("/plain", "/inner/deep", "/docs", "/openapi.json", "/mounted/openapi.json", "/anything"):
        assert path in caught.value.what
    assert "fine" not in caught.value.what


def user(key: Annotated[Key, Depends(require("jobs.read"))]) -> Key:
    return key


def test_nested_dependencies_and_routers_count() -> None:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/nested", dependencies=[Depends(user)])
    def nested() -> None: ...

    guarded = APIRouter(dependencies=[Depends(require("data.read"))])

    @guarded.get("/by-router")
    def by_router() -> None: ...

    app.include_router(guarded)
    outer = APIRouter()

    @outer.get("/by-include")
    def by_include() -> None: ...

    app.include_router(outer, prefix="/outer", dependencies=[Depends(require("models.read"))])
    check_declared(app)
    assert "GET /outer/by-include" in [path for path, _ in declarations(app)]
    assert {r.permission for _, r in declarations(app) if r} == {"jobs.read", "data.read", "models.read"}


def test_a_router_does_not_guard_what_is_not_its_own_kind_of_route() -> None:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    router = APIRouter(dependencies=[Depends(require("data.read"))])
    router.routes.append(Route("/raw", lambda request: PlainTextResponse("out")))
    app.include_router(router, dependencies=[Depends(require("data.read"))])
    with pytest.raises(EnvironmentProblem, match="/raw"):
        check_declared(app)


def test_unknown_permissions_and_paths_are_refused() -> None:
    with pytest.raises(EnvironmentProblem, match=r"job\.reed"):
        require("job.reed")
    with pytest.raises(EnvironmentProblem, match="/nowhere"):
        declare([], "/nowhere", "public")


async def test_denials_are_logged_without_the_key_and_not_without_end(caplog: pytest.LogCaptureFixture) -> None:
    audit = Audit(per_second=0.001)
    scope = {"type": "http", "method": "GET", "path": "/x", "client": ("127.0.0.1", 5)}
    with caplog.at_level(logging.WARNING, "llmo.audit"):
        for _ in range(100):
            audit.denied(scope, UnauthorizedError("no"))
    assert len(caplog.records) == 1
    line = json.loads(caplog.records[0].getMessage())
    assert (line["event"], line["path"], line["client"], line["code"]) == ("denied", "/x", "127.0.0.1", "unauthorized")


async def test_a_guarded_app_logs_what_it_denies(caplog: pytest.LogCaptureFixture) -> None:
    app = Starlette(routes=[Mount("/", app=Guarded(PlainTextResponse("in"), require("keys.read")))])
    app.state.access = Access(SECRETS.get)
    with caplog.at_level(logging.WARNING, "llmo.audit"):
        assert (await get(app, "/", "llmo_wrong")).status_code == 401
    assert "llmo_wrong" not in caplog.text
    assert "denied" in caplog.text
