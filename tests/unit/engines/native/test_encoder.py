"""The native engine of encoders says what transformers says but for rounding, whatever stands beside a text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from llmo.compression import native
from llmo.engines.base import Request
from llmo.engines.native import build, encoder_library
from llmo.engines.native.encoder import NativeEncoderEngine
from llmo.engines.native.encoder_model import FILE
from llmo.engines.torch import TorchEngine, open_model
from llmo.errors import EnvironmentProblem, LLMOError, ModelError
from llmo.types import Device
from support.headed import headed_model

LENGTHS = (1, 2, 15, 16, 17, 40, 60, 5, 33, 64, 8, 3)


def cpu(cores: int) -> Device:
    return Device("cpu", "cpu", memory=0, free=0, cores=cores)


def texts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[2, *rng.integers(5, 60, length)][:length] for length in lengths]


@contextmanager
def opened(folder: Path, cores: int = 1) -> Iterator[NativeEncoderEngine]:
    engine = NativeEncoderEngine()
    engine.load(folder, cpu(cores))
    yield engine
    engine.close()


def said(
    engine: NativeEncoderEngine | TorchEngine, ids: Sequence[Sequence[int]], embed: bool = False
) -> list[NDArray[np.float32]]:
    run = engine.embed if embed else engine.run
    found = {chunk.id: chunk.data for chunk in run([Request(i, text) for i, text in enumerate(ids)])}
    return [found[i] for i in range(len(ids))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = headed_model(tmp_path_factory.mktemp("model") / "bert")
    native.write(made, made)
    return made


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_what_it_says_is_what_torch_says_but_for_rounding(architecture: str, task: str, tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model", task, architecture)
    native.write(folder, folder)
    reference = TorchEngine()
    reference.load(folder, cpu(1))
    ids = texts()
    with opened(folder) as engine:
        for embed, allowed in ((False, 0.05), (True, 0.02)):
            expected, found = said(reference, ids, embed), said(engine, ids, embed)
            scale = np.std(np.concatenate([e.reshape(-1) for e in expected]))
            for e, f in zip(expected, found, strict=True):
                assert e.shape == f.shape
                assert f.dtype == np.float32
            errors = np.concatenate([np.abs(e - f).reshape(-1) for e, f in zip(expected, found, strict=True)])
            assert np.sqrt(np.mean(errors**2)) < allowed * scale


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_a_text_gets_the_same_bytes_alone_and_in_any_company(task: str, tmp_path: Path) -> None:
    """Alone two threads share it, together each takes groups of its own; one thread does all by itself."""
    folder = headed_model(tmp_path / "model", task)
    native.write(folder, folder)
    ids = texts() * 5
    with opened(folder) as one, opened(folder, 2) as two:
        for embed in (False, True):
            together = said(one, ids, embed)
            shared = said(two, ids, embed)
            for i, text in enumerate(ids):
                assert np.array_equal(together[i], shared[i])
                if i < len(LENGTHS):
                    assert np.array_equal(said(two, [text], embed)[0], together[i])


def test_a_long_text_goes_through_in_pieces(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model", "token-classification", max_length=128)
    native.write(folder, folder)
    (long,) = texts([128])
    with opened(folder) as one, opened(folder, 2) as two:
        alone = said(one, [long])[0]
        assert alone.shape == (128, 5)
        assert np.array_equal(said(two, [[2, 3], long])[1], alone)


def test_heads_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model")
    full = native.write(folder, folder)
    whole = (folder / FILE).stat().st_size
    model = open_model(folder)
    attention = model.bert.encoder.layer[1].attention
    with torch.no_grad():
        attention.output.dense.weight[:, :16] = 0.0
    model.save_pretrained(folder)
    assert native.write(folder, folder) < full
    assert (folder / FILE).stat().st_size < whole - 4 * 16 * 32 + 200
    reference = TorchEngine()
    reference.load(folder, cpu(1))
    with opened(folder) as engine:
        expected, found = np.array(said(reference, texts())), np.array(said(engine, texts()))
    assert np.abs(expected - found).mean() < 0.05 * expected.std()


def test_without_instructions_of_its_own_the_answers_are_nearly_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(folder) as engine:
        expected = np.array(said(engine, texts()))
    monkeypatch.setattr(build, "FLAGS", (*(flag for flag in build.FLAGS if not flag.startswith("-march")), "-O1"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoder_library.kernels.cache_clear()
    with opened(folder) as engine:
        found = np.array(said(engine, texts()))
    encoder_library.kernels.cache_clear()
    assert len(list((tmp_path / "cache" / "llmo" / "native").glob("*.so"))) == 1
    assert np.abs(found - expected).max() < 0.05 * expected.std()


def test_no_torch_is_needed(folder: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom llmo.engines.native.encoder import NativeEncoderEngine\n"
        "from llmo.engines.base import Request\nfrom llmo.types import Device\n"
        "e = NativeEncoderEngine(); e.load(Path(sys.argv[1]), Device('cpu', 'cpu', memory=0, free=0, cores=1))\n"
        "assert len(list(e.run([Request(0, [2, 3])]))) == 1\n"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ([], "holds no token"),
        ([2] * 129, "longer than the model's 128 positions"),
        ([2, 60_000], "outside the vocabulary"),
        ([2, -1], "outside the vocabulary"),
    ],
)
def test_what_it_cannot_run_is_an_error_and_the_next_batch_runs(folder: Path, text: list[int], says: str) -> None:
    with opened(folder) as engine:
        with pytest.raises(LLMOError, match=says):
            said(engine, [[2, 3], text])
        assert len(said(engine, [[2, 3]])) == 1


def test_files_that_are_not_whole_or_not_ours_are_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / FILE).read_bytes()
    tensors = load_file(folder / FILE)
    cases = {
        "cut": lambda path: path.write_bytes(whole[: len(whole) // 2]),
        "empty": lambda path: path.write_bytes(b""),
        "other": lambda path: save_file(tensors, path),
        "lacking": lambda path: save_file(
            {name: tensor for name, tensor in tensors.items() if name != "layer.1.down"},
            path,
            {"llmo": json.dumps(sizes(folder))},
        ),
    }
    for name, write in cases.items():
        other = tmp_path / name
        other.mkdir()
        shutil.copy(folder / "config.json", other)
        write(other / FILE)
        with pytest.raises(ModelError) as caught:
            NativeEncoderEngine().load(other, cpu(1))
        assert caught.value.hint
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"no native\.safetensors"):
        NativeEncoderEngine().load(tmp_path, cpu(1))
    with pytest.raises(EnvironmentProblem, match="runs on the CPU"):
        NativeEncoderEngine().load(folder, Device("cuda:0", "gpu", memory=0, free=0, cores=1))


def sizes(folder: Path) -> dict[str, object]:
    from safetensors import safe_open

    with safe_open(folder / FILE, "numpy") as file:
        found: dict[str, object] = json.loads(file.metadata()["llmo"])
    return found


@pytest.mark.parametrize("architecture", ["mpnet"])
def test_what_the_engine_does_not_compute_is_not_written(architecture: str, tmp_path: Path) -> None:
    folder = headed_model(tmp_path / "model", architecture=architecture)
    with pytest.raises(ModelError, match="family 'mpnet'"):
        native.write(folder, folder)
    assert not (folder / FILE).exists()
