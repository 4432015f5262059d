"""Embeddings over HTTP, asked by the official client: what a trained encoder thinks of texts, whole or refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers

from llmo.compression.export import export
from llmo.doors.server import serve_in_thread
from llmo.serve.openai import embeddings
from llmo.settings import Settings
from llmo.system import System
from llmo.tasks.card import load_tokenizer, read_card, write_card
from support.serving import ThreadReplica, served_model
from support.tiny import HIDDEN, text_rows

TEXTS = [row["text"] for row in text_rows(12, seed=3, longest=40)]
LONGEST = 64  # the model's `max_length`


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_model(tmp_path_factory.mktemp("model") / "m", seed=1)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with System(Settings(home=tmp_path_factory.mktemp("home"))) as system:
        yield system


@pytest.fixture(scope="module", params=["torch", "onnx"])
def ask(request: pytest.FixtureRequest, model: Path, system: System) -> Iterator[openai.OpenAI]:
    if request.param == "onnx":
        export(model, model / "model.onnx")
    write_card(model, {**read_card(model), "engine": request.param})
    with ThreadReplica(model) as replica:
        up: dict[str, Any] = {"job": None, "model": "sha256:1", "model_ref": "m@1", "state": "up"}
        system.store.endpoints.set("topics", task="text-classification", address=replica.address, **up)
        key = system.make_key("ann", "predict")[1]
        with serve_in_thread(system) as url:
            yield openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def plain(model: Path, texts: list[str]) -> np.ndarray:
    """Mean pooling and length 1, by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    trunk = transformers.AutoModel.from_pretrained(model).eval()
    fed = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = trunk(input_ids=fed["input_ids"], attention_mask=fed["attention_mask"]).last_hidden_state
    mask = fed["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    found: np.ndarray = torch.nn.functional.normalize(mean).numpy()
    return found


def embed(ask: openai.OpenAI, given: Any, **more: Any) -> np.ndarray:
    return np.array([one.embedding for one in ask.embeddings.create(model="topics", input=given, **more).data])


def test_embeddings_are_those_of_plain_transformers_in_every_form(ask: openai.OpenAI, model: Path) -> None:
    expected = plain(model, TEXTS)
    ids = [load_tokenizer(model).encode(text).ids for text in TEXTS]
    for given in (TEXTS, ids):
        for form in ({}, {"encoding_format": "float"}, {"dimensions": HIDDEN}):
            assert np.abs(embed(ask, given, **form) - expected).max() < 1e-5
    for single in (TEXTS[0], ids[0]):
        assert np.abs(embed(ask, single) - expected[:1]).max() < 1e-5
    answer = ask.embeddings.create(model="topics", input=TEXTS)
    assert (answer.object, answer.model, [one.index for one in answer.data]) == ("list", "topics", list(range(12)))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))


def test_the_model_may_be_the_version_that_is_served(ask: openai.OpenAI) -> None:
    answer = ask.embeddings.create(model="m@1", input=TEXTS[0])
    assert answer.model == "m@1"
    assert np.array_equal([answer.data[0].embedding], embed(ask, TEXTS[0]))
    with pytest.raises(openai.NotFoundError, match="m@2"):
        ask.embeddings.create(model="m@2", input=TEXTS[0])


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}])  # the client's own is base64
def test_no_other_request_waits_while_numbers_are_written(
    ask: openai.OpenAI, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, beside = embeddings.Wanted.answer, []

    def written(wanted: embeddings.Wanted, answers: bytes) -> bytes:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        beside.append(len(answers))
        return write(wanted, answers)

    monkeypatch.setattr(embeddings.Wanted, "answer", written)
    many = [[5, 6, 7]] * 1024
    assert embed(ask, many, **form).shape == (1024, HIDDEN)
    assert len(beside) == 1


def test_a_batch_of_answers_and_embeddings_gives_each_its_own(ask: openai.OpenAI) -> None:
    url, headers = f"{ask.base_url}endpoints/topics/predict", {"x-api-key": ask.api_key}

    def predict(text: str) -> Any:
        return httpx.post(url, json={"text": text}, headers=headers, timeout=60, trust_env=False).json()["answers"][0]

    alone, answers = embed(ask, TEXTS), [predict(text) for text in TEXTS]
    with ThreadPoolExecutor(8) as threads:
        vectors = [threads.submit(embed, ask, text) for text in TEXTS]
        labels = list(threads.map(predict, TEXTS))
        assert np.abs(np.concatenate([one.result() for one in vectors]) - alone).max() < 1e-5
    assert [one["label"] for one in labels] == [one["label"] for one in answers]


@pytest.mark.parametrize(
    ("given", "says", "param", "code"),
    [
        (
            {"input": "goal " * LONGEST},
            "66 tokens, and this model reads at most 64",
            "input[0]",
            "context_length_exceeded",
        ),
        ({"input": ["goal", "goal " * LONGEST]}, "66 tokens", "input[1]", "context_length_exceeded"),
        ({"input": [5] * (LONGEST + 1)}, "65 tokens", "input[0]", "context_length_exceeded"),
        ({"input": [[5], [10**6]]}, "1000000 is none", "input[1]", None),
        ({"input": ["goal", ""]}, "empty", "input[1]", None),
        ({"input": [["goal"]]}, "a string, or a list", "input", "invalid_type"),
        ({"input": [-1]}, "a string, or a list", "input", "invalid_type"),
        ({"input": []}, "a string, or a list", "input", "missing_required_parameter"),
        ({"input": ["a"] * 2049}, "at most 2048", "input", "array_above_max_length"),
        ({"input": "goal", "dimensions": 8}, "have 32 numbers", "dimensions", "unsupported_value"),
        ({"input": "goal", "dimensions": 0}, "from 1", "dimensions", "integer_below_min_value"),
        ({"input": "goal", "encoding_format": "int8"}, "float or base64", "encoding_format", "invalid_value"),
    ],
)
def test_what_cannot_be_embedded_is_said(
    ask: openai.OpenAI, given: dict[str, Any], says: str, param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        ask.embeddings.create(model="topics", **given)
    assert refused.value.param == param
    assert refused.value.code == code
    assert embed(ask, "goal").shape == (1, HIDDEN)


def test_keys_and_models_are_as_elsewhere(ask: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask.with_options(api_key="llmo_" + "x" * 43).embeddings.create(model="topics", input="goal")
    with pytest.raises(openai.NotFoundError, match="topix"):
        ask.embeddings.create(model="topix", input="goal")
    assert ask.models.list().data == []
