"""A report from the training to every door, and a forecast that learns from the store's finished trainings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from llmo import specfile
from llmo.doors import flow
from llmo.doors.api import create_app
from llmo.doors.cli.project import portable
from llmo.errors import NotFoundError
from llmo.settings import Settings
from llmo.specs import ProjectSpec
from llmo.system import System
from llmo.types import Kind
from support.project import llmo, project


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A project whose model was trained in its own store: the YAML and the store."""
    folder = tmp_path_factory.mktemp("project")
    file, home = project(folder), folder / "home"
    with System(Settings(home=home)) as system:
        told = {"source": str(folder / "tickets.csv"), "text": "body", "label": "queue", "task": "text-classification"}
        flow.wait(system, system.submit("import", told, name="tickets"))
    model = ("--model", str(folder / "base"), "--epochs", "1", "--max-length", "32")
    said = llmo("train", "--data", "tickets", "--name", "tickets", *model, "--json", LLMO_HOME=str(home))
    assert said.code == 0, said.err
    assert said.json["report"]["metrics"] == said.json["test"]["after"]
    assert said.json["report"]["worst"][0]["text"]
    return file, home


@pytest.fixture
def system(trained: tuple[Path, Path]) -> Iterator[System]:
    with System(Settings(home=trained[1])) as found:
        yield found


def test_the_command_shows_it_and_writes_the_page(trained: tuple[Path, Path], tmp_path: Path) -> None:
    home = str(trained[1])
    page = tmp_path / "page.html"
    said = llmo("report", "tickets", "--html", page, LLMO_HOME=home)
    assert said.code == 0, said.err
    for words in ("before training", "by class", "worst errors", "calibration: expected error", "peak memory"):
        assert words in said.out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert llmo("report", "nothing", LLMO_HOME=home).code == 2
    said = llmo("report", "base", LLMO_HOME=home)
    assert (said.code, "llmo evaluate base@1" in said.err) == (2, True)


def test_how_it_would_be_trained_is_said_and_nothing_is_trained(trained: tuple[Path, Path]) -> None:
    home, base = str(trained[1]), str(trained[0].parent / "base")
    asked = ("train", "--data", "tickets", "--model", base, "--epochs", "2", "--max-length", "32", "--explain")
    with System(Settings(home=trained[1])) as system:
        before = [artifact.ref for artifact in system.artifacts(Kind.MODEL)]
    said = llmo(*asked, LLMO_HOME=home)
    assert said.code == 0, said.err
    for words in ("how it would be trained", "threads", "attention", "steps, about"):
        assert words in said.out
    with System(Settings(home=trained[1])) as system:
        assert [artifact.ref for artifact in system.artifacts(Kind.MODEL)] == before
        assert [job.op for job in system.jobs(all=True)].count("train") == 1
    kept = llmo("report", "tickets-plan", LLMO_HOME=home)
    assert (kept.code, "how it would be trained" in kept.out) == (0, True), kept.err


def test_evaluating_against_itself(trained: tuple[Path, Path]) -> None:
    said = llmo("evaluate", "tickets", "--against", "tickets@1", LLMO_HOME=str(trained[1]))
    assert said.code == 0, said.err
    assert "can be chance" in said.out
    assert "is no chance" not in said.out


def test_only_those_who_may_read_the_data_get_it_over_http(system: System) -> None:
    _, member = system.make_key("test", "member")
    _, guest = system.make_key("test", "predict")
    with TestClient(create_app(system)) as http:
        for path in ("/v1/artifacts/tickets/report", "/v1/artifacts/tickets/report/page"):
            assert http.get(path).status_code == 401
            assert http.get(path, headers={"Authorization": f"Bearer {guest}"}).status_code == 403
            assert http.get(path, headers={"Authorization": f"Bearer {member}"}).status_code == 200
        found = http.get("/v1/artifacts/tickets/report", headers={"Authorization": f"Bearer {member}"}).json()
        assert found == system.report("tickets")
    with pytest.raises(NotFoundError, match="has no report"):
        system.report("base")


def checked(system: System, file: Path) -> dict:
    asked = portable(specfile.read(file, ProjectSpec).spec, file)
    with closing(system):
        return flow.result(flow.wait(system, system.check(asked)))["forecast"]


def test_the_forecast_is_corrected_by_what_was_trained_here(trained: tuple[Path, Path], tmp_path: Path) -> None:
    file, home = trained
    fresh = checked(System(Settings(home=tmp_path / "empty")), file)
    assert (fresh["runs"], fresh["fits"]) == (0, True)
    known = checked(System(Settings(home=home)), file)
    assert known["runs"] == 1
    with System(Settings(home=home)) as system:
        memory = (next(job for job in system.jobs(all=True) if job.op == "train").result or {})["memory"]
    # The tiny model is all libraries: what the forecast got wrong there moves the next one towards the truth.
    off = [abs(one["memory_bytes"] - memory["peak_bytes"]) for one in (fresh, known)]
    assert off[1] < off[0]


def test_what_the_machine_has_is_known_to_the_check(trained: tuple[Path, Path]) -> None:
    file, home = trained
    found = checked(System(Settings(home=home, memory=512 << 20)), file)
    assert found["fits"] is None  # all of it is libraries, and just as much as is there
    assert found["low_bytes"] <= 512 << 20 < found["high_bytes"]
