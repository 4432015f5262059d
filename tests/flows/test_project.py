"""A whole project by the command line: run, found again, asked, broken, and the same over HTTP and in Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import llmo as sdk
from llmo.doors.server import running_server
from llmo.errors import DataError, InputError, UnauthorizedError
from llmo.settings import Settings
from llmo.store import Store
from llmo.system import System
from llmo.types import Kind
from support.project import llmo, project
from support.serving import eventually

WHOLE = "compress: {max_drop: 0.9, variants: [native-int8, onnx-int8]}\ndeploy: {endpoint: tickets, cores: 1}\n"


def processes_of(home: Path) -> list[int]:
    """Living processes that carry the mark of a job of this store."""
    mark = f"LLMO_JOB_DIR={home}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                if alive and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """A project that was run once, up to a verified model; its store; and what the run said."""
    folder = tmp_path_factory.mktemp("project")
    file, home = project(folder), folder / "home"
    said = llmo("run", file, "--json", LLMO_HOME=str(home))
    assert said.code == 0, said.err + said.out
    return file, home, said.json


@pytest.fixture
def home(done: tuple[Path, Path, dict], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMO_HOME", str(done[1]))
    return done[1]


def test_a_run_learns_and_reports(done: tuple[Path, Path, dict]) -> None:
    steps = done[2]["steps"]
    test = steps["train"]["result"]["test"]
    assert test["after"]["accuracy"]["value"] > max(0.8, test["before"]["accuracy"]["value"])
    assert steps["verify"]["result"]["passed"]
    assert steps["data"]["result"]["rows"]["read"] == 240


def test_the_second_run_finds_every_step(done: tuple[Path, Path, dict], home: Path) -> None:
    again = llmo("run", done[0], "--json").json["steps"]
    assert all(step["cached"] for step in again.values())
    assert {k: v["output"] for k, v in again.items()} == {k: v["output"] for k, v in done[2]["steps"].items()}
    fresh = llmo("run", done[0], "--json", "--fresh").json["steps"]
    assert not any(step["cached"] for step in fresh.values())
    assert fresh["data"]["output"] == again["data"]["output"]


def test_check_tells_and_computes_nothing(done: tuple[Path, Path, dict], home: Path) -> None:
    said = llmo("check", done[0], "--json")
    assert said.code == 0
    assert all(step["state"] == "done" for step in said.json["plan"])
    assert said.json["tokens"]["max_length"] == 32
    assert len(said.json["samples"]) == 3
    shown = llmo("check", done[0])
    assert "tickets@1" in shown.out


def test_resolved_says_where_each_value_is_from(done: tuple[Path, Path, dict], home: Path) -> None:
    entries = {e["key"]: e for e in llmo("check", "--resolved", done[0], "--json").json}
    assert entries["train.epochs"]["origin"].endswith("llmo.yaml:5")
    assert entries["train.seed"]["origin"] == "default"
    assert entries["data.clean.fix_encoding"]["value"] is True


def test_single_steps_and_listings(home: Path) -> None:
    for command in (
        ["data", "list"],
        ["models"],
        ["endpoints"],
        ["devices"],
        ["ps", "--all"],
        ["top", "--once"],
        ["key", "list"],
    ):
        assert llmo(*command).code == 0, command
        assert llmo(*command, "--json").code == 0, command
    assert llmo("data", "show", "tickets", "--split", "test", "--json").json["rows"]
    assert "lineage" in llmo("models", "tickets").out
    assert llmo("evaluate", "tickets", "--json").json["metrics"]["accuracy"]["value"] > 0.8
    assert llmo("verify", "tickets", "--json").json["passed"]
    assert llmo("logs", "1").code == 0


def test_compress_refuses_with_exit_code_3(home: Path) -> None:
    asked = ("--set", "variants=[onnx-int8]", "--max-mb", "0.001", "--name", "never", "--json")
    said = llmo("compress", "tickets", *asked)
    assert said.code == 3
    assert "too large" in said.json["error"]["what"]
    assert "never" not in {model["name"] for model in llmo("models", "--json").json}


def test_the_whole_way_to_an_endpoint_and_nothing_left(done: tuple[Path, Path, dict], home: Path) -> None:
    file = done[0].with_name("whole.yaml")
    file.write_text(done[0].read_text() + WHOLE)
    said = llmo("run", file, "--json")
    assert said.code in (0, 3), said.err + said.out
    assert eventually(lambda: not processes_of(home), "all workers to end")
    if said.code == 3:  # on so small a model ONNX may be no faster; the gate says so and nothing is served
        assert "faster" in said.json["error"]["what"] + said.json["error"].get("hint", "")
        assert llmo("deploy", "tickets", "--endpoint", "tickets").code == 0
    else:
        assert len(said.json["answers"]) >= 2
    answers = llmo("predict", "tickets", "--json", stdin="refund my invoice\nthe match was drawn\n")
    assert answers.code == 0
    assert len(answers.out.splitlines()) == 2
    assert eventually(lambda: not processes_of(home), "the replica to end")


def equal_to_plain_transformers(client: sdk.Client, store: Store) -> None:
    """Logits over HTTP against `from_pretrained` on the stored folder, in single precision."""
    with store:
        folder = store.catalog.path(store.catalog.get("tickets", Kind.MODEL).digest)
        data = store.catalog.get("tickets", Kind.DATASET).digest
    texts = [str(row["text"]) for row in client.rows(data, "test", limit=20)]
    answers = client.predict("tickets", texts, logits=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, answer in zip(texts, answers, strict=True):
        with torch.inference_mode():
            plain = model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).logits[0]
        assert np.abs(plain.numpy() - np.array(answer["logits"])).max() < 1e-4


@pytest.fixture
def server(home: Path) -> Iterator[tuple[str, str]]:
    """A server of the store; its address and an admin key."""
    started = llmo("up", "--detach", "--port", "0", "--json")
    assert started.code == 0, started.err
    key = started.json["key"] or llmo("key", "make", "test", "--role", "admin", "--json").json["key"]
    try:
        yield started.json["url"], key
    finally:
        assert llmo("down").code == 0
        assert running_server(home) is None
        assert eventually(lambda: not processes_of(home), "all workers to end")


def test_the_same_over_http_and_in_python(
    done: tuple[Path, Path, dict], server: tuple[str, str], tmp_path: Path
) -> None:
    url, key = server
    remote = {"LLMO_URL": url, "LLMO_KEY": key, "LLMO_HOME": str(tmp_path / "elsewhere")}
    ran = llmo("run", done[0], "--json", **remote)
    assert ran.code == 0, ran.err + ran.out
    there, here = (said["steps"]["train"]["result"]["test"]["after"] for said in (ran.json, done[2]))
    assert there == here, "the upload has the same content, and training is exact"
    assert llmo("deploy", "tickets", "--endpoint", "tickets", "--set", "cores=1", **remote).code == 0
    with sdk.Client(url, key) as client:
        assert [e.state for e in client.endpoints() if e.name == "tickets"] == ["up"]
        answers = client.predict("tickets", ["refund my invoice", "the match was drawn"])
        assert all("label" in answer for answer in answers)
        equal_to_plain_transformers(client, Store.open(done[1]))
        data = sdk.Dataset.get("tickets", api=client)
        assert sdk.Model.get("tickets", api=client).metrics["accuracy"]["value"] > 0.8
        assert data.rows("test", limit=2)
        with pytest.raises(InputError, match="path"):
            client._request("POST", "/v1/jobs", json={"op": "base-model", "spec": {"source": "/etc/passwd"}})
    for where in ({}, remote):
        checked = llmo("verify", "tickets", "--endpoint", "tickets", "--json", **where)
        assert checked.code == 0, checked.out
        assert {"endpoint token ids", "endpoint logits"} <= {check["name"] for check in checked.json["checks"]}
    with sdk.Client(url, key) as client:
        assert key not in str(client.jobs(all=True, limit=500)), "a key is in a job that others may read"
    with sdk.Client(url, "llmo_wrong") as stranger, pytest.raises(UnauthorizedError):
        stranger.endpoints()
    assert llmo("ps", LLMO_URL=url, LLMO_KEY="llmo_wrong", LLMO_HOME=str(tmp_path)).code == 2


def test_unreachable_is_exit_code_5(tmp_path: Path) -> None:
    assert llmo("ps", LLMO_URL="http://127.0.0.1:9", LLMO_KEY="x").code == 5


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "empty"),
        ("body,queue\n", "row"),
        ("body,queue\na,x\nb,x\nc,x\nd,x\ne,x\n", "one"),
        ("text,label\na,x\n", "body"),
        ("PK\x03\x04\x00\x00\x00", "zip"),
        ("body,queue\na\x00b,x\n", "binary"),
    ],
)
def test_bad_data_is_exit_code_2(tmp_path: Path, body: str, words: str) -> None:
    file = project(tmp_path / "p")
    (tmp_path / "p" / "tickets.csv").write_text(body)
    said = llmo("run", file)
    assert said.code == 2, said.err
    assert words in said.err.lower()


def test_a_spec_that_needs_too_much_is_refused_with_the_number(home: Path) -> None:
    said = llmo("train", "--data", "tickets", "--model", "tickets", "--name", "big", "--memory", "900GiB")
    assert said.code == 2
    assert "900" in said.err


def test_ctrl_c_stops_and_leaves_nothing(tmp_path: Path) -> None:
    file = project(tmp_path / "p", rows=400)
    file.write_text(file.read_text().replace("epochs: 10", "epochs: 500"))
    home = tmp_path / "home"
    process = subprocess.Popen(
        [sys.executable, "-m", "llmo.doors.cli", "run", str(file)],
        env={**os.environ, "LLMO_HOME": str(home)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def training() -> bool:
        return any((p / "checkpoint").exists() for p in (home / "jobs").glob("*")) if home.exists() else False

    try:
        eventually(training, "training to begin")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert eventually(lambda: not processes_of(home), "all workers to end")
    with System(Settings(home=home)) as system:
        assert all(job.state.ended for job in system.jobs(all=True))


def test_the_python_way_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path / "p")
    with System(Settings(home=tmp_path / "home")) as system:
        data = sdk.Dataset.load(tmp_path / "p" / "tickets.csv", name="t", text="body", label="queue", api=system)
        model = sdk.train(data, model=str(tmp_path / "p" / "base"), epochs=10.0, max_length=32, learning_rate=5e-3)
        assert model.ref == "t@1"
        assert set(model.metrics) >= {"accuracy", "macro_f1"}
        endpoint = sdk.deploy(model, "t", cores=1)
        assert endpoint.predict("refund my invoice")["label"] in data.card["labels"]
        with pytest.raises(DataError):
            sdk.Dataset.load(tmp_path / "missing.csv", name="t", api=system)
