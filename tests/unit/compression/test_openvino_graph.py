"""The OpenVINO graph against plain transformers: every family, every precision, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from llmo.compression.openvino_graph import GRAPH, PRECISION_KEY, quantise, quantise_coarsely, write
from llmo.engines.torch import quiet
from llmo.errors import ModelError
from support.tiny_chat import tiny_chat_model

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "vocab_size": 90,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_chat_model(tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


def saved(folder: Path, kind: str, **settings: Any) -> Path:
    """A small model of a family, as transformers saves it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | settings))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    with quiet():
        model.save_pretrained(folder)
    return folder


def logits(out: Path, ids: np.ndarray, seen: np.ndarray, positions: np.ndarray, cut: int) -> np.ndarray:
    """Two calls, so that the second looks at the state of the first."""
    request = ov.Core().compile_model(out / GRAPH, "CPU", EXACT).create_infer_request()
    parts = []
    for start, end in ((0, cut), (cut, ids.shape[1])):
        feed = {
            "input_ids": ids[:, start:end],
            "attention_mask": seen[:, :end],
            "position_ids": positions[:, start:end],
            "beam_idx": np.arange(len(ids), dtype=np.int32),
        }
        parts.append(request.infer(feed)[0].copy())
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 16}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_logits_are_those_of_transformers_for_every_family_with_padding_and_state(
    kind: str, settings: dict[str, Any], tmp_path: Path, out: Path
) -> None:
    folder = saved(tmp_path / "model", kind, **settings)
    assert write(folder, out, "fp32").difference < 1e-4
    ids = np.random.default_rng(1).integers(0, SMALL["vocab_size"], (2, 70))
    seen = np.ones_like(ids)
    seen[1, :9] = 0
    positions = np.maximum(np.cumsum(seen, axis=1) - 1, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(seen),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    found = logits(out, ids, seen, positions, cut=40)
    assert np.abs(found - expected)[seen.astype(bool)].max() < 1e-4 * expected.std()


@pytest.mark.parametrize(("precision", "most", "bits"), [("bf16", 0.1, 16), ("int8", 0.5, 8), ("int4", 3.0, 5)])
def test_lower_precisions_cost_little_and_take_the_space_they_say(
    precision: Any, most: float, bits: int, folder: Path, out: Path
) -> None:
    made = write(folder, out, precision)
    assert 1e-4 < made.difference < most
    assert bits - 0.1 < made.bits < bits + 1
    assert ov.Core().read_model(out / GRAPH).get_rt_info(PRECISION_KEY).value == precision


def test_int4_costs_several_times_what_int8_does(folder: Path, out: Path) -> None:
    """So a gate that lets int8 through may well refuse it."""
    costs = [write(folder, out, precision).difference for precision in ("int8", "int4")]
    assert costs[1] > 3 * costs[0]


@pytest.mark.parametrize(("group", "shape"), [(None, (5, 40)), (10, (5, 4, 10)), (7, (5, 40)), (40, (5, 40))])
def test_int8_levels_are_symmetric_with_a_scale_a_row_or_group(group: int | None, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * np.float32(
        [[1], [1e-3], [0], [50], [2]]
    )
    levels, scales = quantise(weight, group)
    assert levels.dtype == np.int8
    assert levels.shape == shape
    assert scales.shape == (*shape[:-1], 1)
    largest = np.abs(levels).max(axis=-1)
    assert (largest[2] == 0).all()
    assert (np.delete(largest, 2, axis=0) == 127).all()
    assert (np.abs(levels * scales - weight.reshape(shape)) <= scales * 0.5001).all()


@pytest.mark.parametrize(("columns", "shape"), [(96, (5, 3, 32)), (32, (5, 32)), (40, (5, 40))])
def test_int4_levels_reach_from_the_smallest_weight_to_the_largest(columns: int, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).normal(1.0, 1.0, (5, columns)).astype(np.float32)
    weight[2], weight[3] = 0, 7
    levels, zeros, scales = quantise_coarsely(weight, 32)
    assert levels.shape == shape
    assert (levels.max(), levels.dtype, zeros.dtype) == (15, np.uint8, np.uint8)
    assert zeros.shape == scales.shape == (*shape[:-1], 1)
    found = ((levels.astype(np.float32) - zeros) * scales).reshape(weight.shape)
    assert np.abs(found - weight).max() <= 1.001 * scales.max()
    assert np.abs(found[2:4] - weight[2:4]).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding window"),
    ],
)
def test_a_model_it_would_build_wrongly_is_refused_with_its_reason(
    change: dict[str, Any], reason: str, folder: Path, out: Path
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=reason):
        write(folder, out, "fp32")
    assert not (out / GRAPH).exists()


def test_weights_that_do_not_fit_are_refused(folder: Path, out: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        write(folder, out, "fp32")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot open"):
        write(folder, out, "fp32")


def test_a_tensor_without_a_place_is_refused(folder: Path, out: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}, path)
    with pytest.raises(ModelError, match=r"unknown tensors.*q_proj\.bias"):
        write(folder, out, "fp32")
