"""What every engine must do, whichever runtime is behind it: the suite beside the contract in engines/base.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmo import plugins
from llmo.engines.base import Embedder, Engine, Request
from llmo.errors import EnvironmentProblem, LLMOError, ModelError
from llmo.types import Device
from support.headed import LABELS, headed_model
from support.places import ON_GPU, place

PLACE = place()
TASKS = ("text-classification", "token-classification")
MAX_LENGTH = 64
TEXTS = [[2, 3], [2, 40, 3], [2, *range(10, 40), 3], [2, *([17] * (MAX_LENGTH - 2)), 3], [2, 9, 8, 7, 3]]
AUTO = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
}


def as_saved(folder: Path) -> None:
    """The torch engine opens the folder as it is."""


def as_onnx(folder: Path) -> None:
    from llmo.compression.export import export

    assert export(folder, folder / "model.onnx") == "fused"


# A new engine adds itself here: its name in the entry points, and what makes a saved model folder one it opens.
ENGINES: dict[str, Callable[[Path], None]] = {"torch": as_saved, "onnx": as_onnx}
if ON_GPU:
    del ENGINES["onnx"]  # it has no GPU
WEIGHTS = {"torch": "model.safetensors", "onnx": "model.onnx"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model folder a task that every engine can open."""
    made = {}
    for task in TASKS:
        made[task] = headed_model(tmp_path_factory.mktemp("models") / task, task)
        for prepare in ENGINES.values():
            prepare(made[task])
    return made


@pytest.fixture(params=sorted(ENGINES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=TASKS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def engine(name: str, folder: Path) -> Iterator[Engine]:
    loaded = make(name)
    loaded.load(folder, PLACE)
    yield loaded
    loaded.close()


def make(name: str) -> Engine:
    made: Engine = plugins.load("llmo.engines", name)()
    return made


def logits(engine: Engine, texts: list[list[int]]) -> dict[int, np.ndarray]:
    found = list(engine.run([Request(i, ids) for i, ids in enumerate(texts)]))
    assert all(chunk.finished for chunk in found)
    assert len(found) == len(texts)
    return {chunk.id: chunk.data for chunk in found}


def reference(folder: Path, ids: list[int]) -> np.ndarray:
    """Plain transformers on the saved folder, one text at a time."""
    model = AUTO[folder.name].from_pretrained(folder).eval()
    with torch.inference_mode():
        out: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return out


def test_logits_are_those_of_plain_transformers(engine: Engine, folder: Path) -> None:
    found = logits(engine, TEXTS)
    for i, ids in enumerate(TEXTS):
        expected = reference(folder, ids)
        assert found[i].dtype == np.float32
        assert found[i].shape == expected.shape
        assert np.abs(found[i] - expected).max() < 1e-4


def test_embeddings_are_the_means_of_plain_transformers(engine: Embedder, folder: Path) -> None:
    assert "embed" in engine.abilities
    found = {chunk.id: chunk.data for chunk in engine.embed([Request(i, ids) for i, ids in enumerate(TEXTS)])}
    trunk = transformers.AutoModel.from_pretrained(folder).eval()
    for i, ids in enumerate(TEXTS):
        with torch.inference_mode():
            mean = trunk(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert found[i].dtype == np.float32
        assert np.abs(found[i] - (mean / mean.norm()).numpy()).max() < 1e-5
    assert list(engine.embed([])) == []


def test_shapes_are_per_text_without_padding(engine: Engine, folder: Path) -> None:
    labels = len(LABELS[folder.name])
    for i, data in logits(engine, TEXTS).items():
        expected = (labels,) if folder.name == "text-classification" else (len(TEXTS[i]), labels)
        assert data.shape == expected


def test_a_text_alone_is_the_text_in_a_padded_batch(engine: Engine) -> None:
    together = logits(engine, TEXTS)
    for i, ids in enumerate(TEXTS):
        alone = logits(engine, [ids])[0]
        assert np.abs(alone - together[i]).max() < 1e-4


def test_texts_that_differ_get_logits_that_differ(engine: Engine) -> None:
    found = logits(engine, TEXTS)
    assert np.abs(found[0].reshape(-1)[:3] - found[1].reshape(-1)[:3]).max() > 1e-3


def test_ids_are_echoed_whatever_the_order(engine: Engine) -> None:
    forward = logits(engine, TEXTS)
    backward = {c.id: c.data for c in engine.run([Request(i, TEXTS[i]) for i in reversed(range(len(TEXTS)))])}
    assert backward.keys() == forward.keys()
    for i, data in forward.items():
        assert np.abs(backward[i] - data).max() < 1e-4


def test_equal_batches_give_equal_bytes(engine: Engine) -> None:
    first, second = logits(engine, TEXTS), logits(engine, TEXTS)
    assert all(np.array_equal(first[i], second[i]) for i in first)


def test_an_answer_does_not_hold_its_batch(engine: Engine) -> None:
    for data in logits(engine, TEXTS).values():
        assert data.base is None


def test_an_empty_list_is_an_empty_batch(engine: Engine) -> None:
    assert list(engine.run([])) == []


def test_a_request_without_tokens_is_refused_and_the_engine_goes_on(engine: Engine) -> None:
    with pytest.raises(LLMOError, match="request 7"):
        list(engine.run([Request(7, [])]))
    assert len(logits(engine, TEXTS)) == len(TEXTS)


def test_a_token_the_model_does_not_know_is_refused_and_the_engine_goes_on(engine: Engine) -> None:
    before = logits(engine, TEXTS)
    with pytest.raises(ModelError, match="tokens"):
        list(engine.run([Request(0, [2, 10**6, 3])]))
    after = logits(engine, TEXTS)
    assert all(np.array_equal(before[i], after[i]) for i in before)


def test_more_tokens_than_positions_are_refused(engine: Engine) -> None:
    with pytest.raises(ModelError, match="1 x 300 tokens"):
        list(engine.run([Request(0, [2] * 300)]))


def test_it_closes_twice_and_then_says_so(name: str, folder: Path) -> None:
    engine = make(name)
    engine.load(folder, PLACE)
    engine.close()
    engine.close()
    with pytest.raises(ModelError, match="closed"):
        list(engine.run([Request(0, TEXTS[0])]))


def test_it_loads_again_after_it_was_closed(name: str, folder: Path) -> None:
    engine = make(name)
    engine.load(folder, PLACE)
    first = logits(engine, TEXTS)
    engine.close()
    engine.load(folder, PLACE)
    second = logits(engine, TEXTS)
    engine.close()
    assert all(np.array_equal(first[i], second[i]) for i in first)


@pytest.mark.parametrize(
    "harm", ["no weights", "cut weights", "empty weights", "no config", "broken config", "nothing"]
)
def test_a_broken_folder_is_refused(name: str, folder: Path, harm: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / WEIGHTS[name]
    match harm:
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "empty weights":
            weights.write_bytes(b"")
        case "no config":
            (broken / "config.json").unlink()
        case "broken config":
            (broken / "config.json").write_text("[1, 2")
        case "nothing":
            shutil.rmtree(broken)
    with pytest.raises(ModelError) as caught:
        make(name).load(broken, PLACE)
    assert caught.value.hint


def test_a_device_it_cannot_use_is_said(name: str, folder: Path) -> None:
    if torch.cuda.is_available() and name == "torch":
        pytest.skip("this machine has the device")
    with pytest.raises(EnvironmentProblem, match="cuda:0"):
        make(name).load(folder, Device("cuda:0", "cuda", memory=0, free=0, cores=1))


def test_it_says_what_it_can(name: str) -> None:
    engine = make(name)
    assert engine.name == name
    assert "classify" in engine.abilities


@pytest.mark.parametrize("light", ["onnx"] if "onnx" in ENGINES else [])
def test_a_light_engine_never_imports_torch(light: str, folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmo import plugins; from llmo.types import Device\n"
        "from llmo.engines.base import Request\n"
        f"engine = plugins.load('llmo.engines', {light!r})()\n"
        "engine.load(Path(sys.argv[1]), Device('cpu', 'cpu', 0, 0, 1))\n"
        "list(engine.run([Request(0, [2, 3])])); engine.close()\n"
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
