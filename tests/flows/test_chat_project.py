"""A whole project of conversations by the command line: checked, tuned, compressed, verified, served and talked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmo.store import Store
from llmo.types import Kind
from support.project import chat_project, llmo


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """The file, the store, and what the run said."""
    folder = tmp_path_factory.mktemp("chat")
    file, home = chat_project(folder), folder / "home"
    said = llmo("run", file, "--json", LLMO_HOME=str(home))
    assert said.code == 0, said.err + said.out
    return file, home, said.json


@pytest.fixture
def home(done: tuple[Path, Path, dict], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMO_HOME", str(done[1]))
    return done[1]


def test_answers_are_learnt_and_what_is_served_is_what_was_measured(done: tuple[Path, Path, dict]) -> None:
    steps = done[2]["steps"]
    test = steps["train"]["result"]["test"]
    assert test["after"]["perplexity"]["high"] < test["before"]["perplexity"]["low"]
    table = {row["name"]: row for row in steps["compress"]["result"]["variants"]}
    chosen = table[steps["compress"]["result"]["chosen"]]
    assert chosen["speedup"] > 1.0
    assert chosen["drop"] <= 0.9
    width = steps["compress"]["result"]["width"]
    assert {row["streams"] for row in width} == {1, 4, 8, 16, 32}
    assert all(row["tokens_per_second"] > 0 for row in width)
    served = steps["evaluate"]["result"]["metrics"]["perplexity"]["value"]
    assert served / test["after"]["perplexity"]["value"] - 1 < 0.9
    assert all(check["passed"] for check in steps["verify"]["result"]["checks"])
    assert [a["answer"]["text"] for a in done[2]["answers"]]
    assert done[2]["answers"][0]["true"] in done[2]["answers"][0]["text"] + "red blue green black white pink grey gold"


def test_the_second_run_finds_every_step(done: tuple[Path, Path, dict], home: Path) -> None:
    again = llmo("run", done[0], "--json").json["steps"]
    assert all(step["cached"] for key, step in again.items() if key != "deploy")


def test_check_renders_conversations_by_the_model_s_own_template(done: tuple[Path, Path, dict], home: Path) -> None:
    said = llmo("check", done[0], "--json").json
    assert said["shape"] == "messages"
    assert all("<|im_start|>assistant" in sample["text"] for sample in said["samples"])
    assert said["tokens"]["longest"] >= said["tokens"]["mean"] > 20
    assert "learnt" in llmo("check", done[0]).out


@pytest.mark.parametrize("model", ["talk", "talk-compressed"])
def test_the_endpoint_runs_the_model(model: str, home: Path) -> None:
    """Over HTTP: rendered, tokenised and written as by the training graph. `talk` is at fp32, so it must be equal."""
    assert llmo("deploy", model, "--endpoint", model, "--set", "cores=1").code == 0
    checked = llmo("verify", model, "--endpoint", model, "--json")
    assert checked.code == 0, checked.out
    assert {"endpoint token ids", "endpoint answers"} <= {check["name"] for check in checked.json["checks"]}
    assert llmo("predict", model, "say red", "--json").json["prompt"] == "say red"
    once = llmo("chat", model, "--once", "say blue", "--json", "--set", "max_tokens=5")
    assert once.code == 0, once.err
    assert once.json["usage"]["completion_tokens"] <= 5


def test_the_saved_folder_is_plain_transformers(home: Path) -> None:
    store = Store.open(home)
    folder = store.catalog.path(store.catalog.get("talk", Kind.MODEL).digest)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (golden, *_) = json.loads((folder / "golden.json").read_text())
    text = tokenizer.apply_chat_template(golden["messages"], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    assert ids["input_ids"][0].tolist() == golden["input_ids"]
    written = model.generate(**ids, max_new_tokens=max(1, len(golden["greedy"])), do_sample=False)
    assert written[0, len(golden["input_ids"]) :].tolist()[: len(golden["greedy"])] == golden["greedy"]


def test_written_answers_are_compared_with_their_references(home: Path) -> None:
    found = llmo("evaluate", "talk", "--answers", "5", "--json").json["metrics"]
    assert 0 <= found["exact_match"]["low"] <= found["rouge_l"]["high"] <= 1
    assert found["chrf"]["value"] > 0
    assert "exact_match" not in llmo("evaluate", "talk", "--json").json["metrics"]


def test_a_variant_of_another_kind_of_model_is_refused(home: Path) -> None:
    said = llmo("compress", "talk", "--set", "variants=[onnx-int8]", "--json")
    assert said.code == 2
    assert "torch-int8" in said.json["error"]["hint"]
