"""A GGUF file as a base model: its weights as floating point, its tokeniser and template; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from llmo.context import NullContext
from llmo.errors import ModelError
from llmo.tasks.generation import Generation
from llmo.training import base
from support.tiny_chat import END, HEADS, HIDDEN, INNER, KV_HEADS, PAD, POSITIONS, SPECIAL, TEMPLATE, tiny_chat_model
from support.tiny_chat import tiny_chat_tokenizer as tiny_tokenizer

VOCABULARY = tiny_tokenizer().get_vocab_size() + 1
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def write_gguf(path: Path, tensors: dict[str, np.ndarray], architecture: str = "llama", quantised: bool = True) -> Path:
    """As llama.cpp's converter writes a Llama: rows of query and key permuted, matrices in Q8_0.

    Byte-level BPE in this format has at least one merge, so the vocabulary is given one more token.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    vocabulary = tiny_tokenizer().get_vocab() | {"ĠĠ": VOCABULARY - 1}
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(vocabulary) - len(SPECIAL))
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(PAD)
    writer.add_chat_template(TEMPLATE)
    for name, value in tensors.items():
        written = name
        for ours, theirs in NAMES.items():
            written = written.replace(ours, theirs)
        kept = _laid_out(name, value)
        if quantised and kept.ndim == 2:
            data = quants.quantize(kept, GGMLQuantizationType.Q8_0)
            writer.add_tensor(written, data, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(written, kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _laid_out(name: str, value: np.ndarray) -> np.ndarray:
    if name.endswith("embed_tokens.weight"):
        return np.concatenate([value, value[:1]])
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return value
    return np.ascontiguousarray(value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def file(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", load_file(plain / "model.safetensors"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def bring(source: Path, out: Path) -> dict[str, object]:
    return base.run({"source": str(source)}, {}, out, NullContext())


@pytest.mark.parametrize("as_folder", [True, False])
def test_the_weights_come_back_as_floating_point(file: Path, plain: Path, out: Path, as_folder: bool) -> None:
    result = bring(file.parent if as_folder else file, out)
    assert (result["format"], result["quantisation"], result["model_type"]) == ("gguf", "Q8_0", "llama")
    assert json.loads((out / "source.json").read_text())["quantisation"] == "Q8_0"
    old, new = load_file(plain / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(old) == set(new)
    for name, value in old.items():
        assert new[name].dtype == np.float32
        assert np.abs(new[name][: len(value)] - value).max() <= np.abs(value).max() / 127
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(model.config, "quantization_config")
    assert str(file.parent) not in (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()
    assert sorted(p.name for p in out.iterdir()) == [
        *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "source.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]


def test_the_template_and_the_ends_are_kept(file: Path, out: Path) -> None:
    bring(file, out)
    found = Generation.of_base(out)
    assert found["template"] == TEMPLATE
    assert found["end_ids"] == [END]


def test_it_is_known_before_it_is_brought(file: Path, plain: Path) -> None:
    parameters = sum(v.size for v in load_file(plain / "model.safetensors").values()) + HIDDEN
    for source in (file, file.parent):
        assert base.inspect(source) == {"model_type": "llama", "parameters": parameters, "max_positions": POSITIONS}
    assert base.config_of(file)["vocab_size"] == VOCABULARY


def test_floating_point_is_not_called_quantised(plain: Path, tmp_path: Path, out: Path) -> None:
    file = write_gguf(tmp_path / "f32.gguf", load_file(plain / "model.safetensors"), quantised=False)
    assert bring(file, out)["quantisation"] is None


@pytest.mark.parametrize("keep", [0, 10, 300, 5000, -1])
def test_a_cut_file_is_refused(file: Path, tmp_path: Path, out: Path, keep: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="broken, cut short, or no GGUF file"):
        bring(tmp_path / "cut.gguf", out)
    assert list(out.iterdir()) == []


def test_another_file_with_that_name_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 100)
    with pytest.raises(ModelError, match="broken, cut short, or no GGUF file"):
        bring(tmp_path / "x.gguf", out)


def test_an_unknown_architecture_is_refused_with_those_known(plain: Path, tmp_path: Path, out: Path) -> None:
    file = write_gguf(tmp_path / "new.gguf", load_file(plain / "model.safetensors"), "novelformer")
    with pytest.raises(ModelError, match="cannot read the architecture 'novelformer'") as raised:
        bring(file, out)
    assert "llama" in raised.value.hint


def test_two_files_must_be_told_apart(file: Path, tmp_path: Path, out: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: a\.gguf, b\.gguf"):
        bring(tmp_path, out)
