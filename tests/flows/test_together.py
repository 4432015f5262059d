"""A file with a further task, to two models of one trunk behind one endpoint; and what is wrong in such a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmo import specfile
from llmo.doors import flow
from llmo.doors.cli import commands
from llmo.doors.cli.project import portable
from llmo.doors.client import Client
from llmo.serve.protocol import predict_once
from llmo.specs import ProjectSpec
from llmo.types import Artifact, JobState, Kind
from support.project import project
from support.serving import Place, ThreadReplica, deploy
from support.tiny import rated_rows, span_rows

ALSO = """\
also:
  - {name: hours, task: regression, data: {source: hours.csv, label: value}}
  - name: things
    task: {name: token-classification, max_length: 48}
    data: {source: things.jsonl}
"""


@dataclass
class Done(Place):
    """With what the project's run came to."""

    file: Path
    steps: dict[str, Any]

    def model(self, name: str) -> Artifact:
        return self.system.artifact(f"{name}@1", Kind.MODEL)

    def path(self, model: Artifact) -> Path:
        return self.system.store.catalog.path(model.digest)

    def weights(self, model: Artifact) -> dict[str, np.ndarray]:
        return load_file(self.path(model) / "model.safetensors")


def write(folder: Path) -> Path:
    file = project(folder, rows=120, extra=ALSO)
    file.write_text(file.read_text().replace("epochs: 10", "epochs: 4, temperature: 2"))
    with (folder / "hours.csv").open("w", newline="", encoding="utf-8") as rows:
        writer = csv.writer(rows)
        writer.writerow(["text", "value"])
        writer.writerows([row["text"], row["value"]] for row in rated_rows(60))
    lines = "".join(json.dumps(row) + "\n" for row in span_rows(80))
    (folder / "things.jsonl").write_text(lines, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """The project with its last task, run over HTTP: its files are sent to the server."""
    folder = tmp_path_factory.mktemp("together")
    file = write(folder / "project")
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "hours" not in line))
    asked = portable(specfile.read(file, ProjectSpec).spec, file)
    with Place.opened(folder) as place, Client(place.url, place.key) as api:
        steps = flow.result(flow.wait(api, api.run(asked)))["steps"]
        yield Done(place.system, place.folder, place.stack, place.base, place.url, place.key, file, steps)


def test_two_models_of_one_trunk_are_made_and_verified(done: Done) -> None:
    assert {"data", "data:things", "train", "part:things", "verify:things", "verify"} < {*done.steps}
    assert done.steps["verify:things"]["result"]["passed"]
    first, other = done.model("tickets"), done.model("things")
    assert other.inputs == {"model": first.digest, "data": done.steps["data:things"]["output"]}
    assert other.card["metrics"]["test"] == done.steps["train"]["result"]["also"]["things"]["test"]
    assert (first.card["task"]["task"], other.card["task"]["task"]) == ("text-classification", "token-classification")
    whole, trunk = done.weights(first), {k: v for k, v in done.weights(other).items() if k.startswith("bert.")}
    assert len(trunk) == 37
    assert all(np.array_equal(value, whole[name]) for name, value in trunk.items())
    with Client(done.url, done.key) as api:
        assert flow.data_of(api, other) == other.inputs["data"], "which `llmo evaluate things` takes"


def test_the_other_is_a_head_over_the_first_ones_endpoint(done: Done) -> None:
    first, asked = done.model("tickets"), "alice was in london today"
    with ThreadReplica(done.path(first), deploy()) as replica, Client(done.url, done.key) as api:
        up: dict[str, Any] = {"state": "up", "task": "text-classification", "address": replica.address}
        done.system.store.endpoints.set("desk", job=None, model=first.digest, model_ref=first.ref, **up)
        api.add_adapter("desk", "things", "things")
        (answer,) = api.predict("desk:things", [asked], logits=True)
        with ThreadReplica(done.path(done.model("things"))) as alone:
            (expected,) = predict_once(alone.address, [asked], logits=True)
    assert "entities" in answer
    assert np.abs(np.array(answer["logits"]) - np.array(expected["logits"])).max() < 1e-5


def test_the_commands_tell_of_every_task(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMO_URL", done.url)
    monkeypatch.setenv("LLMO_KEY", done.key)
    assert commands.run(["check", str(done.file)]) == 0
    assert "things: token-classification" in capsys.readouterr().out
    assert commands.run(["run", str(done.file)]) == 0
    said = capsys.readouterr().out
    assert all(f"model {name}@1" in said for name in ("tickets", "things"))
    assert "precision" in said
    assert said.count("the tokeniser is the one of training") == 2
    jobs = done.system.store.jobs.list(op="train", states=[JobState.DONE], limit=10)
    assert len({job.output for job in jobs}) == 1, "it was found done"
    assert commands.run(["check", str(done.file), "--resolved"]) == 0
    assert "also.0.task.max_length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "task: regression",
            "task: sentence-embedding",
            "llmo.yaml:7: 'also.0.task': sentence-embedding is not learnt",
        ),
        (
            "task: regression",
            "task: regresion",
            "llmo.yaml:7: 'also.0.task.name': unknown task; did you mean 'regression'",
        ),
        ("name: things", "name: hours", "llmo.yaml:6: 'also': the name hours is given twice"),
        ("{name: hours", "{name: tickets", "llmo.yaml:6: 'also': the name tickets is given twice"),
        ("epochs: 4", "method: head, epochs: 4", "llmo.yaml:6: 'also': method head does not teach"),
        ("epochs: 4", "devices: 2, epochs: 4", "llmo.yaml:6: 'also': tasks are learnt together on one device"),
        ("also:", "tune: {trials: 2}\nalso:", "llmo.yaml:7: 'also': a search is for the settings of one task"),
        ("model: base", "model: scratch:transformer-tiny", "llmo.yaml:6: 'also': a base from scratch is made for"),
        ("source: hours.csv", "source: none.csv", "no file or folder at"),
        ("data: {source: hours.csv, label: value}", "model: base", "llmo.yaml:7: unknown key 'model'"),
    ],
)
def test_what_is_wrong_is_said_at_its_line(
    old: str, new: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMO_HOME", str(tmp_path / "home"))
    file = write(tmp_path / "project")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert commands.run(["check", str(file)]) == 2
    assert says in capsys.readouterr().err
