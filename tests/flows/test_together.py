"""A file with two further tasks, to three models of one trunk behind one endpoint; and what is wrong in such a file."""

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

    def weights(self, name: str) -> dict[str, np.ndarray]:
        return load_file(self.system.store.catalog.path(self.model(name).digest) / "model.safetensors")


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
    """The project, run over HTTP: its files are sent to the server."""
    folder = tmp_path_factory.mktemp("together")
    file = write(folder / "project")
    asked = portable(specfile.read(file, ProjectSpec).spec, file)
    with Place.opened(folder) as place, Client(place.url, place.key) as api:
        steps = flow.result(flow.wait(api, api.run(asked)))["steps"]
        yield Done(place.system, place.folder, place.stack, place.base, place.url, place.key, file, steps)


def test_three_models_of_one_trunk_are_made_and_verified(done: Done) -> None:
    names = ("hours", "things")
    assert {"data", "train", "verify", *(f"{step}:{n}" for n in names for step in ("data", "part", "verify"))} < {
        *done.steps
    }
    whole = done.weights("tickets")
    for name in names:
        assert done.steps[f"verify:{name}"]["result"]["passed"]
        assert done.model(name).inputs["model"] == done.model("tickets").digest
        assert done.steps["train"]["result"]["also"][name]["test"] == done.model(name).card["metrics"]["test"]
        shared = {key: value for key, value in done.weights(name).items() if key in whole and "classifier" not in key}
        trunk = {key: value for key, value in shared.items() if "pooler" not in key}
        assert len(trunk) == 37
        assert all(np.array_equal(value, whole[key]) for key, value in trunk.items())
    assert done.model("hours").card["task"]["task"] == "regression"
    with Client(done.url, done.key) as api:
        assert flow.data_of(api, done.model("things")) == done.steps["data:things"]["output"]
        found = flow.wait(api, api.submit("evaluate", {}, {"model": "things", "data": "things"}, name="again"))
    for metric, figure in done.model("things").card["metrics"]["test"]["after"].items():
        assert flow.result(found)["metrics"][metric]["value"] == pytest.approx(figure["value"], abs=1e-4)


def test_the_others_are_heads_over_the_first_ones_endpoint(done: Done) -> None:
    first = done.model("tickets")
    folder = done.system.store.catalog.path(first.digest)
    with ThreadReplica(folder, deploy()) as replica, Client(done.url, done.key) as api:
        up: dict[str, Any] = {"state": "up", "task": "text-classification", "address": replica.address}
        done.system.store.endpoints.set("desk", job=None, model=first.digest, model_ref=first.ref, **up)
        for name, asked in (("hours", "goal goal coach the of"), ("things", "alice was in london today")):
            api.add_adapter("desk", name, name)
            (answer,) = api.predict(f"desk:{name}", [asked], logits=True)
            assert set(answer) >= {"hours": {"value"}, "things": {"entities"}}[name]
            with ThreadReplica(done.system.store.catalog.path(done.model(name).digest)) as alone:
                from llmo.serve.protocol import predict_once

                (expected,) = predict_once(alone.address, [asked], logits=True)
            assert np.abs(np.array(answer["logits"]) - np.array(expected["logits"])).max() < 1e-5


def test_the_commands_tell_of_every_task(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMO_URL", done.url)
    monkeypatch.setenv("LLMO_KEY", done.key)
    assert commands.run(["check", str(done.file)]) == 0
    said = capsys.readouterr().out
    assert all(
        f"{name}: {task}" in said for name, task in (("hours", "regression"), ("things", "token-classification"))
    )
    assert commands.run(["run", str(done.file)]) == 0
    said = capsys.readouterr().out
    assert all(f"model {name}@1" in said for name in ("tickets", "hours", "things"))
    assert "rmse" in said
    assert said.count("the tokeniser is the one of training") == 3
    jobs = done.system.store.jobs.list(op="train", states=[JobState.DONE], limit=10)
    assert len({job.output for job in jobs}) == 1, "it was found done"
    assert commands.run(["check", str(done.file), "--resolved"]) == 0
    assert "also.1.task.max_length" in capsys.readouterr().out


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
