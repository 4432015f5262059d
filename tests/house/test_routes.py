"""Every route declares what it needs, and a server with one that does not does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmo.doors import api
from llmo.errors import EnvironmentProblem
from llmo.guard.access import check_declared, declarations
from llmo.settings import Settings
from llmo.system import System

ROOT = Path(__file__).parents[2]
PAGE = {"/", "/pages/{name}"}
PUBLIC = {"/docs", "/docs/oauth2-redirect", "/docs/static", "/openapi.json", "/healthz", "/readyz", *PAGE}


def test_routes_are_declared_and_only_these_are_public(tmp_path: Path) -> None:
    with System(Settings(home=tmp_path)) as system:
        app = api.create_app(system)
        found = declarations(app)
        assert all(requirement is not None for _, requirement in found)
        public = {path.split()[-1] for path, need in found if need is not None and need.permission == "public"}
        assert public == PUBLIC

        @app.get("/v1/forgotten")
        def forgotten() -> None: ...

        with pytest.raises(EnvironmentProblem, match="/v1/forgotten"):
            check_declared(app)


def test_every_route_is_documented(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "doors.md").read_text(encoding="utf-8")
    with System(Settings(home=tmp_path)) as system:
        for path, _ in declarations(api.create_app(system)):
            if "/docs/" in path:
                continue
            route = path.split()[-1]
            words = [word for word in route.split("/") if word and not word.startswith("{") and word != "v1"]
            assert all(word in page for word in words), f"docs/doors.md does not name {route}"
