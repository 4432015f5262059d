"""What every engine must do, whichever runtime is behind it: the suite beside the contract in engines/base.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch
import transformers

from llmo import plugins
from llmo.compression import native, openvino_encoder, torch_encoder
from llmo.compression.export import export
from llmo.compression.quantise import quantise, safe_bits
from llmo.engines.base import Embedder, Engine, Request
from llmo.engines.cpu import instructions
from llmo.engines.native.encoder_model import FILE
from llmo.errors import EnvironmentProblem, LLMOError, ModelError
from llmo.types import Device
from support.headed import LABELS, headed_model
from support.places import ON_GPU, place
from support.tiny import LAYERS

PLACE = place()
TASKS = ("text-classification", "token-classification")
MAX_LENGTH = 64
TEXTS = [[2, 3], [2, 40, 3], [2, *range(10, 40), 3], [2, *([17] * (MAX_LENGTH - 2)), 3], [2, 9, 8, 7, 3]]
AUTO = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
}


Prepare = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Variant:
    """A new engine adds itself here: its name in the entry points, the precision, which file has the weights, what
    makes a folder it opens of a trained one, and how far a logit may be from plain transformers, and alone from in a
    batch."""

    engine: str
    precision: str
    weights: str
    prepare: Prepare
    off: float = 1e-4
    alone: float = 1e-4

    def takes(self, task: str) -> bool:
        """Lower precisions do the same for every task, and are slow to make: they are tried on one."""
        return self.precision == "fp32" or task == TASKS[0]


def as_saved(base: Path, folder: Path) -> None:
    """The torch engine opens the folder as it is."""
    shutil.copytree(base, folder, dirs_exist_ok=True)


def at_bf16(base: Path, folder: Path) -> None:
    torch_encoder.write(base, folder)


def exported(base: Path) -> Path:
    """Its graph, which is made once."""
    graph = base / "model.onnx"
    if not graph.exists():
        assert export(base, graph) == "fused"
    return graph


def as_onnx(base: Path, folder: Path) -> None:
    shutil.copy(base / "config.json", folder)
    shutil.copy(exported(base), folder / "model.onnx")


def as_int8(base: Path, folder: Path) -> None:
    shutil.copy(base / "config.json", folder)
    graph = onnx.load(exported(base))
    onnx.save(quantise(graph, bits=safe_bits()), folder / "model.onnx")


def as_openvino(precision: openvino_encoder.Precision) -> Prepare:
    def prepare(base: Path, folder: Path) -> None:
        shutil.copy(base / "config.json", folder)
        random = np.random.default_rng(0)
        texts = [[2, *random.integers(5, 60, size).tolist(), 3] for size in range(2, 34, 2)]
        openvino_encoder.write(exported(base), folder, precision, texts)

    return prepare


def as_native(base: Path, folder: Path) -> None:
    shutil.copy(base / "config.json", folder)
    native.write(base, folder)


SAVED, GRAPH, BIN = "model.safetensors", "model.onnx", "openvino_model.bin"
VARIANTS = {
    "torch": Variant("torch", "fp32", SAVED, as_saved),
    "torch-bf16": Variant("torch", "bf16", SAVED, at_bf16, off=0.15, alone=0.1),
    "native": Variant("native", "int8", FILE, as_native, off=0.3, alone=1e-9),
    "onnx": Variant("onnx", "fp32", GRAPH, as_onnx),
    "onnx-int8": Variant("onnx", "int8", GRAPH, as_int8, off=0.3, alone=0.1),
    "openvino": Variant("openvino", "fp32", BIN, as_openvino("fp32")),
    "openvino-bf16": Variant("openvino", "bf16", BIN, as_openvino("bf16"), off=0.15, alone=0.1),
    "openvino-int8": Variant("openvino", "int8", BIN, as_openvino("int8"), off=1.0, alone=0.3),
}
if ON_GPU:
    VARIANTS = {name: variant for name, variant in VARIANTS.items() if variant.engine == "torch"}
elif not instructions("bf16"):
    VARIANTS = {name: variant for name, variant in VARIANTS.items() if variant.precision != "bf16"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained model a task."""
    return {task: headed_model(tmp_path_factory.mktemp("models") / task, task) for task in TASKS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> dict[tuple[str, str], Path]:
    """What each variant makes of each of them."""
    made = {}
    for name, variant in VARIANTS.items():
        for task, base in bases.items():
            if not variant.takes(task):
                continue
            made[name, task] = tmp_path_factory.mktemp(name) / task
            made[name, task].mkdir()
            variant.prepare(base, made[name, task])
    return made


CASES = [(name, task) for name in sorted(VARIANTS) for task in TASKS if VARIANTS[name].takes(task)]


@pytest.fixture(params=CASES, ids="-".join)
def made(request: pytest.FixtureRequest) -> tuple[str, str]:
    variant, task = request.param
    return variant, task


@pytest.fixture
def kind(made: tuple[str, str]) -> Variant:
    return VARIANTS[made[0]]


@pytest.fixture
def name(kind: Variant) -> str:
    return kind.engine


@pytest.fixture
def task(made: tuple[str, str]) -> str:
    return made[1]


@pytest.fixture
def base(task: str, bases: dict[str, Path]) -> Path:
    return bases[task]


@pytest.fixture
def folder(made: tuple[str, str], folders: dict[tuple[str, str], Path]) -> Path:
    return folders[made]


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


def test_logits_are_those_of_plain_transformers(engine: Engine, kind: Variant, base: Path) -> None:
    found = logits(engine, TEXTS)
    for i, ids in enumerate(TEXTS):
        expected = reference(base, ids)
        assert found[i].dtype == np.float32
        assert found[i].shape == expected.shape
        assert np.abs(found[i] - expected).max() < kind.off


def test_embeddings_are_the_means_of_plain_transformers(engine: Embedder, kind: Variant, base: Path) -> None:
    assert "embed" in engine.abilities
    found = {chunk.id: chunk.data for chunk in engine.embed([Request(i, ids) for i, ids in enumerate(TEXTS)])}
    trunk = transformers.AutoModel.from_pretrained(base).eval()
    for i, ids in enumerate(TEXTS):
        with torch.inference_mode():
            mean = trunk(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert found[i].dtype == np.float32
        assert np.abs(found[i] - (mean / mean.norm()).numpy()).max() < kind.off / 10
    assert list(engine.embed([])) == []


def test_shapes_are_per_text_without_padding(engine: Engine, task: str) -> None:
    labels = len(LABELS[task])
    for i, data in logits(engine, TEXTS).items():
        expected = (labels,) if task == "text-classification" else (len(TEXTS[i]), labels)
        assert data.shape == expected


def test_a_text_alone_is_the_text_in_a_padded_batch(engine: Engine, kind: Variant) -> None:
    together = logits(engine, TEXTS)
    for i, ids in enumerate(TEXTS):
        alone = logits(engine, [ids])[0]
        assert np.abs(alone - together[i]).max() < kind.alone


def test_texts_that_differ_get_logits_that_differ(engine: Engine) -> None:
    found = logits(engine, TEXTS)
    assert np.abs(found[0].reshape(-1)[:3] - found[1].reshape(-1)[:3]).max() > 1e-3


def test_ids_are_echoed_whatever_the_order(engine: Engine, kind: Variant) -> None:
    forward = logits(engine, TEXTS)
    backward = {c.id: c.data for c in engine.run([Request(i, TEXTS[i]) for i in reversed(range(len(TEXTS)))])}
    assert backward.keys() == forward.keys()
    for i, data in forward.items():
        assert np.abs(backward[i] - data).max() < kind.alone


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
def test_a_broken_folder_is_refused(name: str, kind: Variant, folder: Path, harm: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / kind.weights
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


def test_it_says_what_it_runs(engine: Engine, kind: Variant) -> None:
    found = engine.facts()
    assert found.precision == kind.precision
    assert found.rest in ("fp32", kind.precision)
    assert sum(found.kernels.values()) > LAYERS
    assert (found.threads, found.streams) == (PLACE.cores, 1)
    assert found.instructions
    assert any(character.isdigit() for character in found.library)
    engine.close()
    with pytest.raises(ModelError, match="closed"):
        engine.facts()


def test_on_one_core_no_two_threads_compute_beside_the_caller(engine: Engine) -> None:
    texts = [[2, *([17] * (MAX_LENGTH - 2)), 3]] * 32
    process = psutil.Process()
    before = {thread.id: thread.user_time for thread in process.threads()}
    spent: dict[int, float] = {}
    while sum(spent.values()) < 0.2:
        logits(engine, texts)
        spent = {thread.id: thread.user_time - before.get(thread.id, 0.0) for thread in process.threads()}
    del spent[threading.get_native_id()]
    assert sum(sorted(spent.values())[:-1]) < 0.05


@pytest.mark.parametrize("light", sorted({v.engine for v in VARIANTS.values()} - {"torch"}))
def test_a_light_engine_never_imports_torch(light: str, folders: dict[tuple[str, str], Path]) -> None:
    folder = folders[light, TASKS[0]]
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
