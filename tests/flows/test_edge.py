"""The page about models without LLMO, command by command, and the export's own refusals, on a stored model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmo as sdk
from llmo.errors import GateRefused, InputError, ModelError, SpecError
from llmo.settings import Settings
from llmo.system import System
from llmo.tasks.card import read_card
from llmo.tasks.text_classification import TextClassification
from llmo.types import Kind
from support.bags import bag_model
from support.project import llmo
from support.tiny import text_rows

PAGE = Path(__file__).parents[2] / "docs" / "edge.md"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """A store with the model `tickets`, compressed to ONNX, and the folder to work in."""
    task = TextClassification(("billing", "sport", "tech"), 32)
    model = bag_model(tmp_path / "model", task, [row["text"] for row in text_rows(8)])
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    with System(Settings(home=tmp_path / "home")) as found:
        found.save(model, "tickets", read_card(model))
        yield found


def test_the_commands_of_the_page(system: System) -> None:
    block = re.findall(r"```\n(llmo .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", block],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tickets@1 for edge in tickets-edge: fp32" in done.stdout
    assert "golden texts answered as they were" in done.stderr
    answer = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"label"')))
    assert answer["label"] in ("billing", "sport", "tech")
    assert {path.name for path in Path.cwd().iterdir()} == {"tickets-edge", "tickets-onnx"}
    again = llmo("export", "tickets", "--out", "tickets-edge")
    assert (again.code, "is there already" in again.err) == (2, True)


def test_too_large_is_exit_code_3_and_writes_nothing(system: System) -> None:
    said = llmo("export", "tickets", "--max-mb", "0.01", "--json")
    assert said.code == 3
    assert "llmo compress tickets@1 --target size --max-mb 0.01" in said.json["error"]["hint"]
    assert list(Path.cwd().iterdir()) == []
    remote = llmo("export", "tickets", LLMO_URL="http://127.0.0.1:9")
    assert (remote.code, "without LLMO_URL" in remote.err) == (2, True)


def test_in_python(system: System, tmp_path: Path) -> None:
    model = sdk.Model.get("tickets", api=system)
    folder = sdk.export(model, "here", target="onnx")
    assert folder == Path.cwd() / "here"
    assert json.loads((folder / "manifest.json").read_text())["model"] == "tickets@1"
    with pytest.raises(GateRefused):
        sdk.export(model, "there", max_mb=0.01)
    with pytest.raises(InputError, match="there is no folder"):
        sdk.export(model, "no/such/place")
    with pytest.raises(SpecError, match="target"):
        sdk.export(model, "there", target="edgy")
    with pytest.raises(SpecError, match="precision"):
        sdk.export(model, "there", precision="int4")
    jobs = len(system.jobs(all=True))
    for task, words in (("generation", "writes text"), ("next-item", "does not know"), ("masked-lm", "base for other")):
        card = {"engine": "torch", "precision": "fp32", "task": {"task": task, "labels": [], "max_length": 8}}
        (tmp_path / task).mkdir()
        (tmp_path / task / "config.json").write_text("{}")
        system.save(tmp_path / task, task, card)
        with pytest.raises(ModelError, match=words):
            system.export(task, tmp_path / "out")
    assert len(system.jobs(all=True)) == jobs, "what is wrong is said before a job is made"
    with pytest.raises(SpecError, match="cannot be submitted"):
        system.submit("export", {"out": "/tmp/x"}, {"model": "tickets"})
    assert system.artifact("tickets", Kind.MODEL).ref == "tickets@1"
