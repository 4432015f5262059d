"""Causal models trained for real on tiny conversations: they learn the answers, keep their bytes, and open anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmo.context import NullContext, Stopped
from llmo.errors import DataError, SpecError
from llmo.files import sha256_file
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden
from llmo.tasks.generation import Generation
from llmo.training import evaluate, preference
from support.places import ON_GPU
from support.tiny import chat_rows, tiny_chat_dataset, write_chat_split
from support.tiny_chat import tiny_chat_model


class Train(Protocol):
    def __call__(self, data: Path, out: str = "out", **keys: Any) -> dict[str, Any]: ...


LORA: dict[str, Any] = {"method": "lora", "epochs": 8, "learning_rate": 2e-2}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"epochs": 8, "learning_rate": 5e-3},
    "lora": LORA,
    "last-n": {"method": "last-n", "last_n": 2, "epochs": 8, "learning_rate": 1e-2},
}


class Listening(NullContext):
    """Remembers what it was told, and asks to stop at a step."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        super().__init__(1, folder)
        self.notes: list[str] = []
        self.steps: list[int] = []
        self._stop_at = stop_at

    def report(self, step: int, total: int | None = None, **metrics: float | str) -> None:
        if "learning_rate" in metrics:
            self.steps.append(step)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def should_stop(self) -> bool:
        return self._stop_at is not None and bool(self.steps) and self.steps[-1] >= self._stop_at


@pytest.fixture
def teach(train: Train, talker: Path) -> Train:
    def run(data: Path, out: str = "out", **keys: Any) -> dict[str, Any]:
        return train(data, out, **{"task": "generation", "max_length": 160, "model": talker, **keys})

    return run


def greedy(folder: Path, ids: list[int], most: int = 16) -> list[int]:
    """What plain transformers writes."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    given = torch.tensor([ids])
    with torch.no_grad():
        said = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=most, do_sample=False)
    found = said[0, len(ids) :].tolist()
    ends = set(load_task(folder).end_ids)  # type: ignore[attr-defined]
    return found[:-1] if found and found[-1] in ends else found


@pytest.mark.parametrize("method", sorted(METHODS))
def test_it_learns_and_opens_in_plain_transformers(teach: Train, chats: Path, tmp_path: Path, method: str) -> None:
    result = teach(chats, **METHODS[method])
    before, after = (result["test"][when] for when in ("before", "after"))
    assert after["loss"]["high"] < before["loss"]["low"] / 3
    assert after["token_accuracy"]["value"] > 0.7
    assert result["metric"] == "perplexity"
    golden = read_golden(tmp_path / "out")
    assert len(golden) == 8
    for row in golden:
        assert greedy(tmp_path / "out", row["input_ids"]) == row["greedy"]


def test_the_answers_are_learnt(teach: Train, chats: Path, talker: Path, tmp_path: Path) -> None:
    teach(chats, epochs=16, learning_rate=5e-3)
    tokenizer = load_tokenizer(tmp_path / "out")
    said = [tokenizer.decode(row["greedy"]) for row in read_golden(tmp_path / "out")]
    assert sum(text in {"It is sport.", "It is tech.", "It is business."} for text in said) >= 6
    assert not any("It is" in tokenizer.decode(greedy_of_base(talker, row)) for row in read_golden(tmp_path / "out"))


def greedy_of_base(talker: Path, row: dict[str, Any]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(talker).eval()
    given = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        return list(model.generate(given, max_new_tokens=8, do_sample=False)[0, given.shape[1] :].tolist())


def test_the_golden_evidence_is_what_the_brief_reader_finds(teach: Train, chats: Path, tmp_path: Path) -> None:
    teach(chats, **LORA)
    out = tmp_path / "out"
    task, plain = load_task(out), AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(task, Generation)
    for row in read_golden(out):
        assert set(row) == {"text", "messages", "rendered", "input_ids", "greedy", "logprobs"}
        expected = plain.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        assert row["rendered"] == expected
        assert row["input_ids"] == plain(expected, add_special_tokens=False)["input_ids"]
        ids = row["input_ids"] + row["greedy"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        found = logits.gather(1, torch.tensor(ids)[1:, None])[:, 0]
        assert torch.allclose(found, torch.tensor(row["logprobs"]), atol=1e-4)


def test_the_folder_keeps_template_ends_and_ties(teach: Train, chats: Path, talker: Path, tmp_path: Path) -> None:
    teach(chats, **LORA)
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_bytes() == (talker / "chat_template.jinja").read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == json.loads(
        (talker / "generation_config.json").read_text()
    )
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert "lm_head.weight" not in opened.keys()  # noqa: SIM118 (no mapping)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert not {"id2label", "problem_type"} & set(config)
    assert sorted(p.name for p in (out / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    card = read_card(out)
    assert len(card["adapted_modules"]) == 14
    assert not any("lm_head" in name for name in card["adapted_modules"])
    body = card["task"]
    assert (body["task"], body["labels"], body["max_length"]) == ("generation", [], 160)
    assert set(body["options"]) == {"template", "special", "end_ids"}
    assert card["template_sha256"] == sha256_file(out / "chat_template.jinja")
    assert card["train"]["objective"] == "answers"


def test_a_base_without_a_template_says_so_and_saves_one(
    teach: Train, chats: Path, talker: Path, tmp_path: Path
) -> None:
    base = tmp_path / "plain"
    shutil.copytree(talker, base)
    (base / "chat_template.jinja").unlink()
    ctx = Listening(tmp_path / "c")
    teach(chats, model=base, ctx=ctx, epochs=1)
    assert any("has no chat template" in note for note in ctx.notes)
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert plain.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "User: x\n"


def test_plain_text(teach: Train, tmp_path: Path) -> None:
    data = tiny_chat_dataset(tmp_path / "d", "text")
    result = teach(data, epochs=4, learning_rate=5e-3)
    assert result["test"]["after"]["loss"]["value"] < result["test"]["before"]["loss"]["value"] / 2
    assert read_golden(tmp_path / "out")[0]["messages"] is None
    assert read_card(tmp_path / "out")["train"]["objective"] == "text"


def test_stopping_saves_and_going_on_gives_the_same_bytes(teach: Train, chats: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {**LORA, "epochs": 3}
    teach(chats, "whole", **keys)
    with pytest.raises(Stopped):
        teach(chats, "stopped", ctx=Listening(tmp_path / "c", stop_at=4), **keys)
    ctx = Listening(tmp_path / "c")
    teach(chats, "resumed", ctx=ctx, **keys)
    assert ctx.steps[0] == 5
    for name in ("model.safetensors", "golden.json"):
        assert sha256_file(tmp_path / "whole" / name) == sha256_file(tmp_path / "resumed" / name)
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("method", ["full", "lora"])
def test_accumulation_equals_the_big_batch(teach: Train, chats: Path, tmp_path: Path, method: str) -> None:
    from safetensors.numpy import load_file

    keys: dict[str, Any] = {"method": method, "epochs": 1, "precision": "fp32", "label_smoothing": 0.1}
    teach(chats, "whole", **keys)
    teach(chats, "parts", gradient_accumulation_steps=3, **keys)
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert max(abs(a[n] - b[n]).max() for n in a) < 1e-4


def test_a_method_without_meaning_is_refused(teach: Train, chats: Path) -> None:
    with pytest.raises(SpecError, match="has no head of its own"):
        teach(chats, method="head")


@pytest.mark.parametrize(
    ("shape", "objective"), [("messages", "preference"), ("text", "answers"), ("preference", "text")]
)
def test_an_objective_that_does_not_fit_the_rows_is_refused(
    teach: Train, tmp_path: Path, shape: str, objective: str
) -> None:
    data = tiny_chat_dataset(tmp_path / "d", shape)
    with pytest.raises(SpecError, match=f"'{objective}' does not fit the data set"):
        teach(data, objective=objective)


def test_objectives_are_of_generation_only(train: Train, texts: Path) -> None:
    with pytest.raises(SpecError, match="is of task generation"):
        train(texts, objective="text")


def test_rows_without_an_answer_are_left_out_and_told(teach: Train, tmp_path: Path) -> None:
    data = tiny_chat_dataset(tmp_path / "d")
    lone = {"id": "x", "text": "?", "messages": json.dumps([{"role": "user", "content": "?"}]), "tools": None}
    write_chat_split(data / "train.arrow", [*chat_rows(8), lone])
    ctx = Listening(tmp_path / "c")
    teach(data, ctx=ctx, epochs=1)
    assert "1 training rows hold nothing to learn, and are left out" in ctx.notes
    write_chat_split(data / "train.arrow", [lone])
    with pytest.raises(DataError, match="no training row holds anything to learn"):
        teach(data, "none")


def test_truncation_is_told(teach: Train, chats: Path, tmp_path: Path) -> None:
    ctx = Listening(tmp_path / "c")
    assert teach(chats, ctx=ctx, epochs=1, max_length=64)["truncated_share"] > 0.3
    assert any("are longer than 64 tokens and are cut" in note for note in ctx.notes)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_preferences_are_learnt(teach: Train, pairs: Path, tmp_path: Path, method: str) -> None:
    result = teach(pairs, method=method, epochs=6, learning_rate=2e-3 if method == "lora" else 5e-4)
    before, after = (result["test"][when] for when in ("before", "after"))
    assert result["metric"] == "preference_accuracy"
    assert before["reward_accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert before["loss"]["value"] == pytest.approx(0.6931, abs=1e-3)
    assert after["preference_accuracy"]["low"] > before["preference_accuracy"]["high"]
    assert after["reward_accuracy"]["low"] > 0.9
    assert after["reward_margin"]["low"] > 0.5
    assert read_card(tmp_path / "out")["metric"] == "preference_accuracy"


def test_the_start_is_measured_once(teach: Train, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"method": "lora", "epochs": 2}
    teach(pairs, "whole", **keys)
    with pytest.raises(Stopped):
        teach(pairs, "stopped", ctx=Listening(tmp_path / "c", stop_at=3), **keys)
    assert (tmp_path / "c" / preference.REFERENCE).is_file()
    phases: list[str] = []
    plain = preference.log_likelihoods
    monkeypatch.setattr(preference, "log_likelihoods", lambda *a: phases.append(a[-1]) or plain(*a))  # type: ignore[func-returns-value]
    teach(pairs, "resumed", ctx=Listening(tmp_path / "c"), **keys)
    assert not any("start" in phase for phase in phases)
    digests = [sha256_file(tmp_path / out / "model.safetensors") for out in ("whole", "resumed")]
    assert digests[0] == digests[1]
    assert list((tmp_path / "c").iterdir()) == []


def test_pairs_without_a_difference_are_refused(teach: Train, tmp_path: Path) -> None:
    data = tiny_chat_dataset(tmp_path / "d", "preference")
    rows = [row | {"rejected": row["chosen"]} for row in chat_rows(8, shape="preference")]
    write_chat_split(data / "train.arrow", rows)
    with pytest.raises(DataError, match="no pair holds two different answers"):
        teach(data)


def test_a_trained_model_is_a_base_too(teach: Train, chats: Path, pairs: Path, tmp_path: Path) -> None:
    first = teach(chats, "first", **LORA)
    second = teach(chats, "second", model=tmp_path / "first", epochs=0.1, learning_rate=1e-6)
    assert second["test"]["before"]["loss"]["value"] == pytest.approx(first["test"]["after"]["loss"]["value"], rel=0.02)
    teach(pairs, "third", model=tmp_path / "first", epochs=0.5)


def test_untied_models_keep_both(teach: Train, chats: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base = tiny_chat_model(tmp_path / "m", tie_word_embeddings=False)
    tensors = load_file(base / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    teach(chats, model=base, epochs=2, learning_rate=5e-3)
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert (new["lm_head.weight"] != new["model.embed_tokens.weight"]).any()


def test_evaluate_measures_the_same_through_the_engine_that_serves(teach: Train, chats: Path, tmp_path: Path) -> None:
    result = teach(chats, precision="fp32", **LORA)
    (tmp_path / "report").mkdir()
    inputs = {"data": chats, "model": tmp_path / "out"}
    report = evaluate.run({"split": "test"}, inputs, tmp_path / "report", NullContext(1))
    assert report["metric"] == "perplexity"
    for name in ("loss", "perplexity"):
        for bound in ("value", "low", "high"):
            trained = result["test"]["after"][name][bound]
            # On a GPU rows that are equal but for rounding are drawn otherwise.
            close = 1e-2 if ON_GPU and bound != "value" else 1e-3
            assert report["metrics"][name][bound] == pytest.approx(trained, rel=close)
    details = json.loads((tmp_path / "report" / "report.json").read_text())["details"]
    assert details["tokens"] > 200
