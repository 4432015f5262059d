"""The native engine gives transformers' numbers for every family and on any processor, and says what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmo.engines.generation import Delta, GenerationOptions, Prompt, Sampling
from llmo.engines.native import build, library
from llmo.engines.native.engine import NativeEngine
from llmo.errors import EnvironmentProblem, InputError, ModelError
from llmo.types import Device
from support.families import FAMILIES, family_folder, logprobs
from support.tiny_chat import tiny_adapter, tiny_chat_model

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
    assert len(list((tmp_path / "cache" / "llmo" / "native").glob("*.so"))) == 2
    assert 0 < np.abs(answers[0] - answers[1]).mean() < 1e-2  # sums of a head's lanes differ in their order


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="C\\+\\+ compiler") as found:
        build.library("decoder.cpp")
    assert "ziglang" in str(found.value.hint)


def test_a_compiler_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-march=no-such-processor", *build.FLAGS[2:]))
    with pytest.raises(EnvironmentProblem, match=r"cannot be compiled: .*no-such-processor"):
        build.library("decoder.cpp")
    assert [path.name for path in (tmp_path / "llmo" / "native").iterdir()] == ["lock"]
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(EnvironmentProblem, match="CXX names no-such-compiler"):
        build.library("decoder.cpp")


def test_the_next_compiler_is_tried_and_what_a_killed_one_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "KNOWN", ("false", *build.KNOWN))
    left = tmp_path / "llmo" / "native" / "tmpkilled"
    left.mkdir(parents=True)
    assert build.library("decoder.cpp").is_file()
    assert not left.exists()


def test_what_is_no_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library("decoder.cpp").write_bytes(b"no library")
    library.kernels.cache_clear()
    assert library.kernels().llmo_size(0) > 0
    library.kernels.cache_clear()


def test_a_folder_that_keeps_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblem, match="cannot keep what it compiles in") as found:
        build.library("decoder.cpp")
    assert "XDG_CACHE_HOME" in str(found.value.hint)


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


def test_what_others_left_in_the_cache_is_never_read(tmp_path: Path) -> None:
    folder = tiny_chat_model(tmp_path / "model")
    sampling = Sampling(max_tokens=40, temperature=0.0, ignore_end=True, logprobs=2)
    found = []
    for left in (0.0, np.nan):
        with closing(loaded(folder)) as engine:
            engine._cache.keys.fill(left)
            engine._cache.values.fill(left)
            engine.add(Prompt(0, tokens(37), sampling))
            deltas = []
            while step := engine.step():
                deltas += step
            assert engine.failed() == []
            found.append([delta.logprobs for delta in deltas])
    assert found[0] == found[1]


def test_numbers_that_overflow_end_their_stream_alone(tmp_path: Path) -> None:
    folder = tiny_chat_model(tmp_path / "model")
    tiny_adapter(tmp_path / "wild", scale=1e36)
    sampling = Sampling(max_tokens=10, temperature=0.0, ignore_end=True, logprobs=2)
    with closing(loaded(folder, "int8")) as engine:
        engine.add(Prompt(0, tokens(20), sampling))
        alone = [delta.logprobs for delta in iter_deltas(engine)]
        engine.add_adapter("wild", tmp_path / "wild")
        engine.add(Prompt(1, tokens(20), sampling, tenant="t"))
        engine.add(Prompt(2, tokens(20), sampling, tenant="t", adapter="wild"))
        beside = [delta.logprobs for delta in iter_deltas(engine) if delta.id == 1]
        [(failed, error)] = engine.failed()
    assert failed == 2
    assert "not finite" in str(error)
    assert beside == alone


def iter_deltas(engine: NativeEngine) -> Iterator[Delta]:
    while step := engine.step():
        yield from step


def test_adapters_take_what_is_set_aside_and_give_it_back_at_once(tmp_path: Path) -> None:
    folder = tiny_chat_model(tmp_path / "model")
    for i in range(3):
        tiny_adapter(tmp_path / str(i), i)
    with closing(loaded(folder, adapter_bytes=60_000)) as engine:  # one takes 42,000
        engine.add_adapter("a", tmp_path / "0")
        with pytest.raises(ModelError, match="set aside"):
            engine.add_adapter("b", tmp_path / "1")
        engine.remove_adapter("a")
        engine.add_adapter("b", tmp_path / "1")  # no step in between
        engine.add(Prompt(0, tokens(5), Sampling(max_tokens=5, temperature=0.0, ignore_end=True), adapter="b"))
        engine.remove_adapter("b")
        with pytest.raises(ModelError, match="set aside"):
            engine.add_adapter("c", tmp_path / "2")  # a stream still runs with the last one
        engine.cancel(0)
        engine.add_adapter("c", tmp_path / "2")
