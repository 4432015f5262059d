"""The native engine gives transformers' numbers for every family and on any processor, and says what it cannot do."""

from __future__ import annotations

import ctypes
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmo.engines.generation import GenerationOptions, Prompt, Sampling
from llmo.engines.native import build, library
from llmo.engines.native.engine import NativeEngine
from llmo.errors import EnvironmentProblem, InputError, ModelError
from llmo.types import Device
from support.families import FAMILIES, family_folder, logprobs
from support.tiny_chat import tiny_chat_model

CPU = Device("cpu", "cpu", memory=0, free=0, cores=2)


def loaded(folder: Path, precision: str = "fp32", device: Device = CPU, **options: Any) -> NativeEngine:
    engine = NativeEngine()
    settings = GenerationOptions(cache_bytes=4 << 20, chunk=32, streams=4, precision=precision, **options)
    engine.load(folder, device, settings)
    return engine


def tokens(count: int) -> list[int]:
    found: list[int] = np.random.default_rng(0).integers(3, 259, count).tolist()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[name]
    folder = family_folder(tmp_path / "model", kind, **{"head_dim": 16, **changes})
    ids = tokens(150)
    with closing(loaded(folder)) as engine:
        np.testing.assert_allclose(engine.score([ids])[0], logprobs(folder, ids), atol=2e-3)


def test_without_instructions_of_its_own_the_numbers_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What any processor of the family can do, in lanes that the compiler makes."""
    folder = family_folder(tmp_path / "model", hidden_size=64, intermediate_size=128, num_attention_heads=4)
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
    folder = family_folder(tmp_path / "model", head_dim=24)
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
