"""Every family the torch engine runs gives transformers' numbers, and what it cannot run is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from llmo.engines.generation import GenerationOptions, Prompt, Sampling
from llmo.engines.paged.engine import PagedEngine
from llmo.errors import EnvironmentProblem, InputError, ModelError
from llmo.types import Device
from support.families import FAMILIES, family_folder, logprobs
from support.places import place
from support.tiny_chat import tiny_chat_model

PLACE = place()


def loaded(folder: Path, **options: Any) -> PagedEngine:
    engine = PagedEngine()
    engine.load(folder, PLACE, GenerationOptions(**{"cache_bytes": 4 << 20, "chunk": 32, "streams": 4, **options}))
    return engine


@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[name]
    folder = family_folder(tmp_path / "model", kind, **changes)
    ids = np.random.default_rng(0).integers(3, 259, 150).tolist()
    expected = logprobs(folder, ids)
    for precision, close in (("fp32", 2e-4), ("bf16", 0.3), ("int8", 0.5)):
        engine = loaded(folder, precision=precision)
        assert np.abs(engine.score([ids])[0] - expected).mean() < close, precision
        engine.close()


@pytest.mark.parametrize("name", ["llama 3 positions", "qwen2", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_answers_do_not_depend_on_company_in_any_family(name: str, precision: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[name]
    engine = loaded(family_folder(tmp_path / "model", kind, **changes), precision=precision)
    rng = np.random.default_rng(0)
    asked = [rng.integers(3, 259, n).tolist() for n in (1, 9, 30, 70)]
    sampling = Sampling(max_tokens=20, temperature=0.0, ignore_end=True)
    alone = [answers(engine, [ids], sampling, f"alone {i}")[0] for i, ids in enumerate(asked)]
    assert answers(engine, asked, sampling, "together") == alone
    engine.close()


def answers(engine: PagedEngine, asked: list[list[int]], sampling: Sampling, tenant: str) -> list[list[int]]:
    for i, ids in enumerate(asked):
        engine.add(Prompt(i, ids, sampling, tenant=tenant))
    found: dict[int, list[int]] = {i: [] for i in range(len(asked))}
    while deltas := engine.step():
        for delta in deltas:
            found[delta.id] += delta.tokens
    return list(found.values())


def test_shards_are_one_model(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "llama")
    ids = list(range(3, 60))
    whole = loaded(folder)
    expected = whole.score([ids])[0]
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part{i}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(part, f"part{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert np.array_equal(loaded(folder).score([ids])[0], expected)
    outside = json.dumps({"weight_map": {"a": "../part0.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(outside)
    with pytest.raises(ModelError, match="outside"):
        loaded(folder)


def test_a_sliding_window_ends_the_context(tmp_path: Path) -> None:
    """Inside the window nothing differs, so that is as far as an answer goes."""
    assert loaded(family_folder(tmp_path / "model", "mistral", sliding_window=100)).context == 100


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_engines_that_may(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = tiny_chat_model(tmp_path / "model")
    edit(folder, change)
    with pytest.raises(ModelError, match=says) as caught:
        loaded(folder)
    assert "llamacpp" in caught.value.hint


def test_a_config_with_a_wrong_number_is_refused(tmp_path: Path) -> None:
    for change in ({"num_attention_heads": 0}, {"num_key_value_heads": 3}, {"hidden_size": None}, {"vocab_size": "x"}):
        folder = tiny_chat_model(tmp_path / str(next(iter(change))))
        edit(folder, change)
        with pytest.raises(ModelError) as caught:
            loaded(folder)
        assert caught.value.hint


@pytest.mark.parametrize("harm", ["gone", "misshapen", "not finite", "extra", "integers"])
def test_weights_that_do_not_fit_are_refused_and_named(harm: str, tmp_path: Path) -> None:
    folder = tiny_chat_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    match harm:
        case "gone":
            del tensors[name]
        case "misshapen":
            tensors[name] = tensors[name][:3].clone()
        case "not finite":
            tensors[name][5, 7] = float("nan")
        case "extra":
            name = "model.layers.1.self_attn.q_proj.lora_A.weight"
            tensors[name] = torch.ones(3, 3)
        case "integers":
            tensors[name] = torch.ones(tensors[name].shape, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj") as caught:
        loaded(folder)
    assert caught.value.hint


def test_the_card_says_precision_and_end_tokens(tmp_path: Path) -> None:
    folder = tiny_chat_model(tmp_path / "model")
    ids = list(range(3, 60))
    plain = loaded(folder)
    by_option = loaded(folder, precision="int8").score([ids])[0]
    sampling = Sampling(max_tokens=20, temperature=0.0)
    answer = answers(plain, [ids], sampling, "")[0]
    card = {"format": 1, "precision": "int8", "task": {"task": "generation", "options": {"end_ids": [answer[4]]}}}
    (folder / "llmo.json").write_text(json.dumps(card))
    assert np.array_equal(loaded(folder).score([ids])[0], by_option)
    assert answers(loaded(folder, precision="fp32"), [ids], sampling, "")[0] == answer[: answer.index(answer[4])]


def test_a_device_it_cannot_use_is_said(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    folder = tiny_chat_model(tmp_path / "model")
    with pytest.raises(EnvironmentProblem, match="cuda:0"):
        PagedEngine().load(folder, Device("cuda:0", "cuda", memory=0, free=0, cores=1), GenerationOptions())


def test_a_grammar_needs_a_tokeniser(tmp_path: Path) -> None:
    from llmo.engines.generation import Grammar

    folder = tiny_chat_model(tmp_path / "model")
    asked = Prompt(0, [3], Sampling(grammar=Grammar("regex", "a+")))
    broken = loaded(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokeniser"):
        broken.add(asked)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        broken.add(asked)
    assert broken.step() == []


def test_a_vocabulary_wider_than_the_tokeniser_is_never_chosen_by_a_grammar(tmp_path: Path) -> None:
    from llmo.engines.generation import Grammar

    folder = family_folder(tmp_path / "model", "llama", vocab_size=320)
    engine = loaded(folder)
    assert engine.vocabulary == 320
    found = answers(engine, [[3, 4]], Sampling(max_tokens=30, seed=1, grammar=Grammar("regex", "[a-z]{20}")), "")[0]
    written = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(found)
    assert len(written) == 20
    assert written.isalpha()
    with pytest.raises(InputError):
        engine.add(Prompt(1, [320]))


def edit(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
