"""`llmo bench` over a real endpoint in a process of its own: both sides, its bad input, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmo.context import NullContext
from llmo.data.operation import run as import_data
from llmo.doors import benching
from llmo.doors.cli.commands import run
from llmo.doors.load import Target, Window
from llmo.engines.work import nominal_work
from llmo.kernel.submit import submit
from llmo.settings import Settings
from llmo.specs import DataSpec, SplitSpec, TaskSpec
from llmo.system import System
from llmo.tasks.card import read_card
from llmo.types import Kind
from support.crashes import Server
from support.project import Said
from support.serving import deploy, eventually, served_model
from support.tiny import text_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with a server, the endpoint `topics`, its data set with a test split, and one without."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows(60)))
    with System(Settings(home=folder / "store")) as system:
        digests = {}
        for name, held_out in (("topics", 0.2), ("whole", 0.0)):
            split = SplitSpec(test=held_out, dev=held_out)
            spec = DataSpec(source=str(folder / "topics.jsonl"), split=split).plain()
            (folder / name).mkdir()
            info = import_data(
                {**spec, "task": TaskSpec(name="text-classification").plain()}, {}, folder / name, NullContext(1)
            )
            digests[name] = system.save(folder / name, name, info, Kind.DATASET).digest
        made = served_model(folder / "model")
        catalog, inputs = system.store.catalog, {"data": digests["topics"]}
        model = catalog.publish(Kind.MODEL, "topics", made, read_card(made), job=None, inputs=inputs)
        submit(system.store, system.devices(), "serve", deploy(), {"model": model.digest}, name="topics")
        writer = {"task": {"task": "generation", "labels": [], "max_length": 32}}
        (folder / "writer").mkdir()
        (folder / "writer" / "config.json").write_text("{}")
        digest = system.save(folder / "writer", "writer", writer).digest
        told: dict[str, Any] = {"job": None, "model": digest, "model_ref": "writer@1", "state": "down"}
        system.store.endpoints.set("writer", address=None, task="generation", **told)
    running = Server(folder / "store")
    with System(Settings(home=folder / "store")) as system:
        eventually(lambda: "topics" in {endpoint.name for endpoint in system.endpoints()}, "the server serves it")
    yield folder / "store"
    assert running.stop() == 0


@dataclass
class Bench:
    """`llmo bench` in this process."""

    home: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path) -> Said:
        code = run(["bench", *map(str, arguments)])
        said = self.capsys.readouterr()
        return Said(code, said.out, said.err)


@pytest.fixture
def bench(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    monkeypatch.setenv("LLMO_HOME", str(home))
    return Bench(home, capsys)


def test_both_sides_are_measured_in_turns(bench: Bench) -> None:
    said = bench("topics", "--clients", "3", "--seconds", "1", "--json")
    assert said.code == 0, said.err
    found = said.json
    assert found["texts"]["source"] == "topics@1 test"
    assert found["texts"]["count"] == 12
    assert (found["engine"], found["precision"], found["cores"]) == ("torch", "fp32", 1)
    for side in found["sides"].values():
        assert [level["clients"] for level in side["levels"]] == [3]
        assert 0 < side["cold_start_seconds"] < 60
        for level in side["levels"]:
            assert level["requests_per_second"] > 5
            assert 0 < level["p50_ms"] <= level["p95_ms"] <= level["p99_ms"]
            assert level["failed"] == 0
            assert 0 < level["load_us"] < 2000
    assert {name: set(side["memory_bytes"]) for name, side in found["sides"].items()} == {
        "endpoint": {"replica", "server"}, "pipeline": {"pipeline"},
    }  # fmt: skip
    assert all(held > 20 << 20 for side in found["sides"].values() for held in side["memory_bytes"].values())
    ours, theirs = (found["sides"][name]["levels"][0]["requests_per_second"] for name in ("endpoint", "pipeline"))
    assert found["times"] == [{"clients": 3, "times": pytest.approx(ours / theirs, abs=0.02)}]
    assert "pipeline" not in found["left_out"]


def test_texts_of_a_file_without_the_pipeline(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("the first\nthe second one\n")
    said = bench("topics", "--clients", "2", "--seconds", "1", "--texts", file, "--no-pipeline")
    assert said.code == 0, said.err
    assert "2 texts of 10 tokens at the mean" in said.out
    assert "pipeline" not in said.out
    assert "cold start" in said.out
    assert "us of CPU a request" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("topic",), "did you mean 'topics'?"),
        (("topics:urgent",), "no further model 'urgent'"),
        (("writer",), "writes text"),
        (("topics", "--clients", "1,none"), "numbers of clients"),
        (("topics", "--clients", "0"), "from 1 to 1024"),
        (("topics", "--texts", "whole"), "holds out no rows"),
        (("topics", "--texts", "nothing.txt"), "there is no file 'nothing.txt', and"),
    ],
)
def test_bad_input(bench: Bench, arguments: tuple[str, ...], words: str) -> None:
    said = bench(*arguments)
    assert said.code == 2, said.err
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 2, "what, and what to do next"


def test_what_the_model_refuses_is_said_before_any_load(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"question": "why?", "context": "so"}\n')
    said = bench("topics", "--texts", file)
    assert said.code == 2
    assert "takes text, not question and context" in said.err


@pytest.mark.parametrize("more", [(), ("--no-pipeline",)], ids=["the pipeline loads", "under load"])
def test_ctrl_c_leaves_nothing(home: Path, more: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "llmo.doors.cli", "bench", "topics", "--seconds", "300", "--clients", "1", *more]
    process = subprocess.Popen(
        command, env={**os.environ, "LLMO_HOME": str(home)}, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    family = eventually(lambda: psutil.Process(process.pid).children(recursive=True), "it starts a process")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "interrupted\n"
    assert not psutil.wait_procs(family, timeout=5)[1]
    with System(Settings(home=home)) as system:
        assert all(key.revoked_at for key in system.api_keys() if key.owner == "this command")


def test_the_share_of_the_peak_is_that_of_the_best_level() -> None:
    side = benching.Side(Target("", "", []))
    side.windows = {1: [Window(2.0, [1] * 10)], 16: [Window(1.0, [1] * 30), Window(1.0, [1] * 50)]}
    work = nominal_work({"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 32})
    found = benching.share(side, work, [10, 20], peak=1e6)
    one = 2 * (2 * (4 * 64 + 2 * 8 * 32) * 15 + 2 * 2 * 8 * (100 + 400) / 2)  # operations of a text at the mean
    assert found == {"operations_per_second": 1e6, "operations_per_text": one, "share": round(40 * one / 1e6, 3)}
