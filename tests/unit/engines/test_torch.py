"""The torch engine opens what plain transformers opens, at fp32, and refuses what is not whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from llmo.compression import torch_encoder
from llmo.engines import cpu
from llmo.engines.base import Request
from llmo.engines.torch import TorchEngine, open_model, quiet
from llmo.errors import EnvironmentProblem, ModelError
from llmo.hardware import Processor
from llmo.types import Device
from support.headed import headed_model

CPU = Device("cpu", "cpu", memory=0, free=0, cores=1)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is the process's own: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_uses_the_cores_it_was_granted(tmp_path: Path, threads: None) -> None:
    folder = headed_model(tmp_path / "model")
    for cores in (2, 1):
        engine = TorchEngine()
        engine.load(folder, Device("cpu", "cpu", memory=0, free=0, cores=cores))
        assert torch.get_num_threads() == cores
        engine.close()


def test_weights_saved_at_half_precision_are_computed_at_fp32(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    model = open_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.mark.parametrize("change", ["a tensor is gone", "a tensor has another shape"])
def test_weights_that_do_not_fit_are_refused_and_never_invented(change: str, tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    if change == "a tensor is gone":
        del tensors["classifier.weight"]
    else:
        tensors["classifier.weight"] = tensors["classifier.weight"][:2].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="classifier") as caught:
        open_model(folder)
    assert caught.value.hint


def test_an_architecture_nobody_knows_is_refused(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="nonesuch"):
        open_model(folder)


def test_opening_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = headed_model(tmp_path / "model")
    capfd.readouterr()
    open_model(folder)
    assert capfd.readouterr() == ("", "")


def test_quiet_puts_the_settings_back() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), quiet():
        assert not logging.is_progress_bar_enabled()
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def says(folder: Path, precision: str) -> Path:
    card = json.loads((folder / "llmo.json").read_text())
    (folder / "llmo.json").write_text(json.dumps(card | {"precision": precision}))
    return folder


@pytest.mark.skipif(not cpu.instructions("bf16"), reason="this processor does not compute bf16")
def test_bf16_is_weights_and_activations_and_half_the_file(tmp_path: Path, threads: None) -> None:
    base, folder = headed_model(tmp_path / "model"), tmp_path / "bf16"
    folder.mkdir()
    assert torch_encoder.write(base, folder) == 16
    sizes = [(each / "model.safetensors").stat().st_size for each in (base, folder)]
    assert sizes[1] < 0.6 * sizes[0]
    engine = TorchEngine()
    engine.load(folder, CPU)
    seen: set[torch.dtype] = set()
    for module in engine._model.modules():
        module.register_forward_hook(lambda *told: seen.add(told[2].dtype) if torch.is_tensor(told[2]) else None)
    (chunk,) = engine.run([Request(0, [2, 9, 3])])
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in engine._model.parameters()} == {torch.bfloat16}
    assert chunk.data.dtype.name == "float32"
    with pytest.raises(ModelError, match="lower precision"):
        engine.add_adapter("other", base)
    engine.close()


def test_bf16_on_a_processor_without_it_is_refused(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = says(headed_model(tmp_path / "model"), "bf16")
    monkeypatch.setattr(cpu, "processor", lambda _: Processor("an old one", ("avx2", "avx512f")))
    with pytest.raises(EnvironmentProblem, match="asked for bf16"):
        TorchEngine().load(folder, CPU)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_other_precisions_are_refused_before_the_weights_are_read(
    precision: str, tmp_path: Path, threads: None
) -> None:
    folder = says(headed_model(tmp_path / "model"), precision)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"not {precision}") as caught:
        TorchEngine().load(folder, CPU)
    assert "onnx" in caught.value.hint


def test_what_stands_beside_the_weights_has_no_bf16_folder(tmp_path: Path) -> None:
    base, out = headed_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    card = json.loads((base / "llmo.json").read_text())
    (base / "llmo.json").write_text(json.dumps(card | {"applied": "prefix"}))
    with pytest.raises(ModelError, match="prefix"):
        torch_encoder.write(base, out)
