"""The native engine gives transformers' numbers for every family and on any processor, and says what it cannot do."""

from __future__ import annotations

import ctypes
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmo.engines.generation import GenerationOptions, Prompt, Sampling
from llmo.engines.native import build, library
from llmo.engines.native.engine import NativeEngine
from llmo.errors import EnvironmentProblem, InputError, ModelError
from llmo.types import Device
from support.tiny_chat import tiny_chat_model, tiny_chat_tokenizer

CPU = Device("cpu", "cpu", memory=0, free=0, cores=2)
SIZES = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, one head a group": ("llama", {"num_key_value_heads": 3}),
    "llama, many heads a group": ("llama", {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 16}),
    "llama, tied, every bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 48}),
    "llama 3 positions": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


def model_folder(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A folder as `save_pretrained` writes it, with weights that make logits differ."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    tiny_chat_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def loaded(folder: Path, precision: str = "fp32", device: Device = CPU, **options: Any) -> NativeEngine:
    engine = NativeEngine()
    settings = GenerationOptions(cache_bytes=4 << 20, chunk=32, streams=4, precision=precision, **options)
    engine.load(folder, device, settings)
    return engine


def logprobs(folder: Path, ids: list[int]) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found: np.ndarray = logits[range(len(ids) - 1), ids[1:]].numpy()
    return found


def tokens(count: int) -> list[int]:
    found: list[int] = np.random.default_rng(0).integers(3, 259, count).tolist()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[name]
    folder = model_folder(tmp_path / "model", kind, **changes)
    ids = tokens(150)
    with closing(loaded(folder)) as engine:
        np.testing.assert_allclose(engine.score([ids])[0], logprobs(folder, ids), atol=2e-3)


def test_without_instructions_of_its_own_the_numbers_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What any processor of the family can do, in lanes that the compiler makes."""
    folder = model_folder(tmp_path / "model", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    answers = []
    flags = [flag for flag in build.FLAGS if not flag.startswith("-march")]
    for chosen in (build.FLAGS, (*flags, "-O1")):
        monkeypatch.setattr(build, "FLAGS", chosen)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        library.kernels.cache_clear()
        with closing(loaded(folder, "int8")) as engine:
            answers.append(engine.score([tokens(90)])[0])
    library.kernels.cache_clear()
    assert len(list((tmp_path / "cache" / "llmo" / "native").iterdir())) == 2
    assert 0 < np.abs(answers[0] - answers[1]).mean() < 1e-2  # sums of a head's lanes differ in their order


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="C\\+\\+ compiler") as found:
        build.library()
    assert "ziglang" in str(found.value.hint)


def test_a_compiler_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-march=no-such-processor", *build.FLAGS[2:]))
    with pytest.raises(EnvironmentProblem, match="cannot compile"):
        build.library()
    assert list((tmp_path / "llmo" / "native").iterdir()) == []


def test_what_it_cannot_run_is_refused_by_name(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", head_dim=24)
    with pytest.raises(ModelError, match="head_dim of 24"):
        loaded(folder)
    fine = tiny_chat_model(tmp_path / "fine")
    with pytest.raises(InputError, match="bf16"):
        loaded(fine, "bf16")
    with pytest.raises(EnvironmentProblem, match="runs on the CPU"):
        loaded(fine, device=Device("cuda:0", "cuda", memory=0, free=0, cores=2))


@pytest.mark.parametrize("cores", [1, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(cores: int, tmp_path: Path) -> None:
    """More threads than cores too; and a step that reads nothing out ends before its memory is gone."""
    folder = tiny_chat_model(tmp_path / "model")
    ids = tokens(400)
    sampling = Sampling(max_tokens=20, temperature=0.0, ignore_end=True, logprobs=2)
    found = []
    for count in (2, cores):
        device = Device("cpu", "cpu", memory=0, free=0, cores=count)
        with closing(loaded(folder, "int8", device)) as engine:
            for i in range(4):
                engine.add(Prompt(i, ids[: 100 * (i + 1)], sampling))
            deltas = []
            while step := engine.step():
                deltas += [delta for delta in step if delta.tokens]
            found.append([delta.logprobs for delta in sorted(deltas, key=lambda delta: delta.id)])
    assert found[0] == found[1]


def test_both_sides_mean_the_same_memory() -> None:
    sizes = [library.kernels().llmo_size(i) for i in range(5)]
    kinds = (library.Linear, library.Layer, library.Model, library.Adapter, library.Step)
    assert sizes == [ctypes.sizeof(kind) for kind in kinds]
