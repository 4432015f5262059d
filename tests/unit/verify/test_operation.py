"""verify lets through what was trained, and refuses what was harmed on the way, naming what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from llmo import plugins
from llmo.context import NullContext
from llmo.engines.base import Request
from llmo.errors import GateRefused, InputError, ModelError
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden, write_card
from llmo.types import Device
from llmo.verify.operation import run

Copy = Callable[[Path], Path]
CPU = Device("cpu", "cpu", 0, 0, 1)


def verify(out: Path, model: Path, reference: Path | None = None, **spec: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    inputs = {"model": model} | ({"reference": reference} if reference else {})
    return run(spec, inputs, out, NullContext(1))


def refused(out: Path, model: Path, reference: Path | None = None, **spec: Any) -> tuple[set[str], GateRefused]:
    """The names of the checks that failed."""
    with pytest.raises(GateRefused) as caught:
        verify(out, model, reference, **spec)
    report = json.loads((out / "report.json").read_text())
    assert report["passed"] is False
    assert report["checks"] == caught.value.extra["checks"]
    assert caught.value.exit_code == 3
    assert caught.value.hint
    failed = {check["name"] for check in report["checks"] if not check["passed"]}
    assert any(check["text"] in caught.value.what for check in report["checks"] if check["name"] in failed)
    return failed, caught.value


def names(report: Mapping[str, Any]) -> list[str]:
    return [check["name"] for check in report["checks"]]


def change_weight(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def swap_words(folder: Path, a: str, b: str) -> None:
    path = folder / "tokenizer.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = body["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")


def test_a_trained_model_passes(full: Path, tmp_path: Path) -> None:
    report = verify(tmp_path / "out", full)
    assert report["passed"]
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert names(report) == [
        "tokenizer", "token ids", "token ids, transformers", "saved model", "engine logits", "engine answers", "batch",
    ]  # fmt: skip
    assert all(check.keys() == {"name", "passed", "value", "limit", "text"} for check in report["checks"])
    saved = next(check for check in report["checks"] if check["name"] == "saved model")
    assert saved["limit"] == 1e-4
    assert 0 <= saved["value"] < 1e-5


def test_a_compressed_model_passes_with_its_reference(compressed: Path, full: Path, tmp_path: Path) -> None:
    report = verify(tmp_path / "out", compressed, full)
    assert {"reference", "saved model", "engine logits", "engine answers", "batch"} <= set(names(report))
    logits = next(check for check in report["checks"] if check["name"] == "engine logits")
    assert 0 < logits["value"] < logits["limit"]


def test_a_compressed_model_passes_alone(compressed: Path, tmp_path: Path) -> None:
    report = verify(tmp_path / "out", compressed)
    assert "engine answers" in names(report)
    assert "saved model" not in names(report)


def test_a_tagger_passes_as_trained_and_as_compressed(tagger: Path, compressed_tagger: Path, tmp_path: Path) -> None:
    assert verify(tmp_path / "one", tagger)["passed"]
    checks = {check["name"]: check for check in verify(tmp_path / "two", compressed_tagger, tagger)["checks"]}
    assert 0 < checks["engine logits"]["value"] < checks["engine logits"]["limit"]
    assert checks["engine answers"]["value"] >= 13


def test_a_lora_model_passes_with_all_its_modules(lora: Path, tmp_path: Path) -> None:
    checks = {check["name"]: check for check in verify(tmp_path / "out", lora)["checks"]}
    assert checks["adapter modules"]["value"] == checks["adapter modules"]["limit"] == 2 * 6
    assert checks["adapter effect"]["value"] > 1e-3


def test_verifying_leaves_the_model_as_it_was(lora: Path, tmp_path: Path) -> None:
    before = (lora / "model.safetensors").read_bytes()
    verify(tmp_path / "out", lora)
    assert (lora / "model.safetensors").read_bytes() == before


def test_swapped_words_are_refused_by_the_recorded_hash(full: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(full)
    swap_words(model, "the", "match")
    failed, error = refused(tmp_path / "out", model)
    assert failed == {"tokenizer"}
    assert "tokeniser" in error.what


def test_swapped_words_are_refused_when_the_card_was_changed_too(full: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(full)
    card = read_card(model)
    swap_words(model, "the", "match")
    write_card(model, card)
    failed, error = refused(tmp_path / "out", model)
    assert failed == {"token ids", "token ids, transformers"}
    assert "token ids of the saved tokeniser" in error.what


def test_a_tokeniser_that_only_transformers_reads_otherwise_is_refused(full: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(full)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": "left"}))
    failed, _ = refused(tmp_path / "out", model)
    assert failed == {"token ids, transformers"}


def test_a_missing_tokeniser_is_refused(full: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(full)
    (model / "tokenizer.json").unlink()
    assert refused(tmp_path / "out", model)[0] == {"tokenizer"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("classifier.bias", lambda w: w + np.float32(0.001)),
        ("bert.encoder.layer.1.output.dense.weight", lambda w: w * np.float32(1.01)),
        ("bert.encoder.layer.0.attention.self.query.weight", lambda w: w.T.copy()),
        ("classifier.weight", lambda w: w[::-1].copy()),
    ],
)
def test_a_changed_weight_is_refused(
    name: str, change: Callable[[np.ndarray], np.ndarray], full: Path, copy: Copy, tmp_path: Path
) -> None:
    model = copy(full)
    change_weight(model, name, change)
    failed, error = refused(tmp_path / "out", model)
    assert {"saved model", "engine logits"} <= failed
    assert "training graph and saved model" in error.what


def test_a_weight_that_is_no_number_is_refused(full: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(full)
    change_weight(model, "classifier.bias", lambda w: w * np.float32("nan"))
    assert "saved model" in refused(tmp_path / "out", model)[0]


def test_the_wrong_reference_is_refused(compressed: Path, lora: Path, tmp_path: Path) -> None:
    failed, _ = refused(tmp_path / "out", compressed, lora)
    assert "reference" in failed


def test_a_graph_of_other_weights_is_refused(compressed: Path, full: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(compressed)
    graph = onnx.load(model / "model.onnx")
    scale = next(t for t in graph.graph.initializer if t.name.endswith("classifier.weight") or "classifier" in t.name)
    scale.CopyFrom(numpy_helper.from_array(-3 * numpy_helper.to_array(scale), scale.name))
    onnx.save(graph, model / "model.onnx")
    failed, error = refused(tmp_path / "out", model, full)
    assert "engine logits" in failed
    assert "saved model" not in failed
    assert "compress the model again" in error.hint


def test_a_dropped_adapter_module_is_refused(lora: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(lora)
    path = model / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in sorted(tensors) if ".lora_B." in name)
    save_file({name: value for name, value in tensors.items() if name != gone}, path, {"format": "pt"})
    failed, error = refused(tmp_path / "out", model)
    assert failed == {"adapter modules"}
    assert "11 of 12" in error.what


def test_an_adapter_module_of_zeros_is_refused(lora: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(lora)
    path = model / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if ".lora_B." in name:
            tensors[name] = np.zeros_like(tensors[name])
    save_file(tensors, path, {"format": "pt"})
    failed, error = refused(tmp_path / "out", model)
    assert failed == {"adapter modules", "adapter effect"}
    assert "0 of 12" in error.what


def test_a_module_that_was_not_merged_is_refused(lora: Path, copy: Copy, tmp_path: Path) -> None:
    """The saved weights of one layer are the base's, as a merge that skipped it would leave them."""
    model = copy(lora)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    base = load_file(lora.with_name("base") / "model.safetensors")[name.removeprefix("bert.")]
    change_weight(model, name, lambda _: base)
    failed, _ = refused(tmp_path / "out", model)
    assert "saved model" in failed


def test_an_adapter_that_is_gone_is_an_error(lora: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(lora)
    (model / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="adapter cannot be read"):
        verify(tmp_path / "out", model)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '[{"text": "a"}]', "[1", '[{"text":"a","input_ids":["x"],"logits":[]}]']
)
def test_evidence_that_proves_nothing_is_an_error(content: str, full: Path, copy: Copy, tmp_path: Path) -> None:
    model = copy(full)
    (model / "golden.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        verify(tmp_path / "out", model)
    assert caught.value.hint


def heard(folder: Path) -> list[dict[str, Any]]:
    """What an endpoint that runs this very folder answers to its golden texts."""
    task, tokenizer = load_task(folder), load_tokenizer(folder)
    encodings = task.encode(tokenizer, [item["text"] for item in read_golden(folder)])
    engine = plugins.load("llmo.engines", read_card(folder)["engine"])()
    engine.load(folder, CPU)
    found = {chunk.id: chunk.data for chunk in engine.run([Request(i, e.input_ids) for i, e in enumerate(encodings)])}
    engine.close()
    return [{"input_ids": e.input_ids, "logits": found[i].tolist()} for i, e in enumerate(encodings)]


def test_an_endpoint_that_runs_the_model_passes(compressed: Path, tmp_path: Path) -> None:
    report = verify(tmp_path / "out", compressed, heard=heard(compressed))
    assert names(report)[-3:] == ["endpoint token ids", "endpoint logits", "endpoint answers"]


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (lambda answer: answer["input_ids"].append(0), "endpoint token ids"),
        (lambda answer: answer["logits"].reverse(), "endpoint logits"),
        (lambda answer: answer["logits"].clear(), "endpoint logits"),
    ],
)
def test_an_endpoint_that_runs_something_else_is_refused(
    harm: Callable[[dict[str, Any]], None], name: str, compressed: Path, tmp_path: Path
) -> None:
    answers = heard(compressed)
    for answer in answers:
        harm(answer)
    failed, error = refused(tmp_path / "out", compressed, heard=answers)
    assert failed >= {name}
    assert error.hint


def test_an_endpoint_of_fp32_must_be_exact(full: Path, compressed: Path, tmp_path: Path) -> None:
    """The endpoint runs the int8 variant while the model that is verified is at fp32."""
    failed, _ = refused(tmp_path / "out", full, heard=heard(compressed))
    assert "endpoint logits" in failed


def test_answers_to_other_texts_prove_nothing(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 answers to"):
        verify(tmp_path / "out", compressed, heard=heard(compressed)[:1])
