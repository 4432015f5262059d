"""The torch engine opens what plain transformers opens, at fp32, and refuses what is not whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from llmo.engines.torch import TorchEngine, open_model, quiet
from llmo.errors import ModelError
from llmo.types import Device
from support.headed import headed_model


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
