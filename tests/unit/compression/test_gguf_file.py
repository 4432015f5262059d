"""A GGUF file says what the Hugging Face folder says: llama.cpp scores texts as transformers does, family by family."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmo.compression.gguf_file import NAME, write
from llmo.engines.generation import GenerationOptions
from llmo.engines.llamacpp import LlamaCppEngine
from llmo.errors import InputError, ModelError
from llmo.types import Device
from support.tiny_chat import SPECIAL, TEMPLATE, tiny_chat_model, tiny_chat_tokenizer

CPU = Device("cpu", "cpu", 1 << 30, 1 << 30, 1)
OPTIONS = GenerationOptions(streams=2, cache_bytes=16 << 20)
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES = {
    "llama, tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama, biases": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True)),
    "llama 3.1 rotary": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "llama, linear rotary": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=LINEAR)),
    "llama, wide heads": (LlamaForCausalLM, LlamaConfig(**SHAPE, head_dim=32)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16)),
}


def saved(folder: Path, family: str) -> Path:
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:  # biases of zero and norms of one would not show a wrong name
                weight.copy_(torch.rand_like(weight) + (0.5 if "norm" in name else -0.5))
    model.save_pretrained(folder)
    tiny_chat_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def expected(folder: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()


def scored(folder: Path, ids: list[int]) -> np.ndarray:
    engine = LlamaCppEngine()
    engine.load(folder, CPU, OPTIONS)
    try:
        return engine.score([ids])[0]
    finally:
        engine.close()


def text(length: int = 200) -> list[int]:
    return np.random.default_rng(0).integers(3, 259, length).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_scores_as_transformers(tmp_path, family):
    folder = saved(tmp_path, family)
    write(folder, folder, "fp32")
    assert np.abs(scored(folder, text()) - expected(folder, text())).max() < 1e-3


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.06), ("fp16", 0.04), ("int8", 0.1)])
def test_a_lower_precision_stays_near(tmp_path, precision, tolerance):
    folder = saved(tmp_path, "llama, tied")
    path = write(folder, folder, precision)
    error = np.abs(scored(folder, text()) - expected(folder, text())).mean()
    assert 0 < error < tolerance, error
    assert path.stat().st_size < write(folder, folder, "fp32").stat().st_size


def test_weights_in_several_files(tmp_path):
    folder = saved(tmp_path / "one", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    tiny_chat_tokenizer().save(str(tmp_path / "many" / "tokenizer.json"))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    write(tmp_path / "many", tmp_path / "many", "fp32")
    assert np.abs(scored(tmp_path / "many", text()) - expected(tmp_path / "many", text())).max() < 1e-3


def test_the_vocabulary_is_the_tokenisers(tmp_path):
    folder = tiny_chat_model(tmp_path)
    fields = GGUFReader(write(folder, folder, "int8")).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocabulary = tiny_chat_tokenizer().get_vocab()
    assert {token: i for i, token in enumerate(tokens)} == vocabulary
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == SPECIAL.index("<|im_end|>")
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["llama.context_length"].contents() == 512


def test_rows_without_a_token_are_named_and_unused(tmp_path):
    folder = saved(tmp_path, "llama, tied")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    dropped = next(token for token, i in tokenizer["model"]["vocab"].items() if i == 258)
    del tokenizer["model"]["vocab"][dropped]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    fields = GGUFReader(write(folder, folder, "fp32")).fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD258]"
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == TokenType.UNUSED


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}, "smollm"),
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "a|\\p{N}{1,3}|b"}}]},
            "llama-bpe",
        ),
        ({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "a|\\p{N}| b"}}]}, "qwen2"),
        ({"type": "Whitespace"}, "default"),
        (None, "default"),
    ],
)
def test_the_splitting_rule_is_named_as_llama_cpp_names_it(tmp_path, pre_tokenizer, name):
    folder = tiny_chat_model(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = pre_tokenizer
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert GGUFReader(write(folder, folder, "int8")).fields["tokenizer.ggml.pre"].contents() == name
    assert scored(folder, text()).shape == (199,)


def test_past_a_sliding_window_the_context_ends(tmp_path):
    folder = tiny_chat_model(tmp_path, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=128)
    assert GGUFReader(write(folder, folder, "fp32")).fields["llama.context_length"].contents() == 128


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "architecture 'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ({"tie_word_embeddings": False}, "output.weight"),
        ({"num_hidden_layers": 3}, "9 weights are missing"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, config, why):
    folder = tiny_chat_model(tmp_path, **config)
    if "num_hidden_layers" in config:
        body = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**body, **config}))
    with pytest.raises(ModelError, match=why):
        write(folder, folder, "int8")
    assert not list(folder.glob("*.gguf")) + list(folder.glob(".*.tmp"))


def test_a_tokeniser_that_is_not_bpe_is_refused(tmp_path):
    folder = tiny_chat_model(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="WordLevel"):
        write(folder, folder, "int8")
    assert not (folder / NAME).exists()


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(InputError, match="no GGUF precision 'int2'"):
        write(tiny_chat_model(tmp_path), tmp_path, "int2")
