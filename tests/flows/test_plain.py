"""A base model that nobody trained, served as it is: from a folder to an endpoint, with evidence and lineage."""

from __future__ import annotations

from pathlib import Path

import httpx
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmo as llmo_sdk
from llmo.settings import Settings
from llmo.store import Store
from llmo.system import System
from llmo.types import Artifact, Kind
from support.project import Said, llmo
from support.serving import greedy
from support.tiny import tiny_model
from support.tiny_chat import tiny_adapter, tiny_chat_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    """A folder with the base `talker` and the store `home`, and what its deployment said."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_chat_model(folder / "talker", seed=4)
    said = llmo("deploy", folder / "talker", "--endpoint", "base", "--set", "cores=1", LLMO_HOME=str(folder / "home"))
    assert said.code == 0, said.err + said.out
    return folder, said


@pytest.fixture
def home(place: tuple[Path, Said], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMO_HOME", str(place[0] / "home"))
    return place[0] / "home"


def stored(home: Path, ref: str) -> Artifact:
    store = Store.open(home)
    try:
        return store.catalog.get(ref, Kind.MODEL)
    finally:
        store.close()


def test_it_answers_as_the_folder_does_and_its_card_says_what_it_is(place: tuple[Path, Said], home: Path) -> None:
    assert "serves talker-plain@1" in place[1].out
    made, base = stored(home, "talker-plain@1"), stored(home, "talker@1")
    assert made.inputs == {"model": base.digest}
    assert made.card["origin"] == "an untouched base model"
    assert (made.card["method"], made.card["trained_parameters"]) == ("none", 0)
    assert made.card["base"]["source"] == str(place[0] / "talker")
    evidence = llmo("predict", "base", "Hello there", "--json").json
    assert evidence["text"]
    checked = llmo("verify", "talker-plain", "--endpoint", "base", "--json")
    assert checked.code == 0, checked.out
    assert {"saved model", "engine", "endpoint answers"} <= {check["name"] for check in checked.json["checks"]}
    with System(Settings(home=home)) as system:
        assert llmo_sdk.Model.plain(place[0] / "talker", api=system).ref == "talker-plain@1"
        answers = system.golden("talker-plain")
        assert any(golden["greedy"] for golden in answers)
        for golden in answers:
            expected = greedy(place[0] / "talker", golden["input_ids"], len(golden["greedy"]) or 1)
            assert golden["greedy"] == expected[: len(golden["greedy"])]


def test_it_is_made_once_and_named_in_every_way(home: Path) -> None:
    for name in ("talker@1", "talker-plain"):
        again = llmo("deploy", name, "--endpoint", "base", "--set", "cores=1")
        assert again.code == 0, again.err
        assert "serves talker-plain@1" in again.out
    assert [row["name"] for row in llmo("models", "--json").json] == ["talker-plain", "talker"]


def test_adapters_of_the_base_are_adapters_of_what_serves_it(home: Path, tmp_path: Path) -> None:
    with System(Settings(home=home)) as system:
        base = system.artifact("talker", Kind.MODEL).digest
        tiny_adapter(tmp_path / "formal" / "adapter")
        made = system.store.catalog.publish(
            Kind.MODEL, "formal", tmp_path / "formal", {}, job=None, inputs={"model": base}
        )
        assert system.add_adapter("base", "formal", made.ref).base == base
        assert [known.answers for known in system.adapters("base")] == [True]
        system.remove_adapter("base", "formal")


def test_an_adapter_that_peft_saved_elsewhere_is_imported_and_answers(place: tuple[Path, Said], home: Path) -> None:
    folder = place[0] / "poet"
    network = AutoModelForCausalLM.from_pretrained(place[0] / "talker", dtype=torch.float32)
    tuned = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(folder)
    tuned.merge_and_unload().save_pretrained(place[0] / "merged")
    added = llmo("adapters", "base", "--add", f"poet={folder}", "--json")
    assert added.code == 0, added.err
    [known] = added.json
    assert (known["name"], known["model_ref"], known["answers"]) == ("poet", "poet@1", True)
    made = stored(home, "poet")
    assert (made.card["origin"], made.card["trained_on"]) == ("imported", str(place[0] / "talker"))
    assert made.inputs == {"model": stored(home, "talker-plain").digest}
    with System(Settings(home=home)) as system, llmo_sdk.gateway("base", api=system) as door:
        ask = {"messages": [{"role": "user", "content": "Hello there"}], "temperature": 0, "max_tokens": 12}
        found = httpx.post(
            f"{door.url}/v1/chat/completions",
            json={**ask, "model": "base:poet", "return_token_ids": True},
            headers={"authorization": f"Bearer {door.key}"},
            timeout=60,
            trust_env=False,
        ).json()
    choice = found["choices"][0]
    assert found["system_fingerprint"] == "poet@1"
    assert choice["token_ids"]
    assert choice["token_ids"] == greedy(place[0] / "merged", found["prompt_token_ids"], 12)[: len(choice["token_ids"])]
    again = llmo("adapters", "base", "--add", f"poet={folder}")
    assert again.code == 2
    assert "already" in again.err
    (folder / "adapter_model.safetensors").unlink()
    broken = llmo("adapters", "base", "--add", f"other={folder}")
    assert broken.code == 2
    assert "adapter_model.safetensors" in broken.err


def test_what_cannot_be_served_as_it_is_says_so(home: Path, tmp_path: Path) -> None:
    tiny_model(tmp_path / "encoder")
    refused = llmo("deploy", tmp_path / "encoder", "--endpoint", "x")
    assert refused.code == 2
    assert "writes no text" in refused.err
    assert "train it" in refused.err
    unknown = llmo("deploy", "talkr", "--endpoint", "x")
    assert unknown.code == 2
    assert "talker" in unknown.err
    assert llmo("deploy", "x" * 5000, "--endpoint", "x").code == 2
    blind = llmo("compress", "talker")
    assert blind.code == 2
    assert "--data" in blind.err
