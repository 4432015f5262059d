"""What every engine that takes further models on its trunk must do: the suite of `Shared` in engines/base.py."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmo import plugins
from llmo.engines.base import Request, Shared
from llmo.errors import ConflictError, InputError, ModelError, NotFoundError
from llmo.tasks.base import Task
from llmo.tasks.token_classification import TokenClassification
from llmo.types import Device
from support.headed import LABELS, SIZES, further_model, headed_model, topics

CPU = Device("cpu", "cpu", memory=0, free=0, cores=1)
TEXTS = [[2, 3], [2, 40, 3], [2, *range(10, 40), 3], [2, 9, 8, 7, 3], [2, *([17] * 20), 3]]
CLOSE = 1e-5  # of logits of the same weights at fp32, alone and in any batch
NAMES = TokenClassification(["O", "B-x", "I-x"], 64)
FURTHER: dict[str, tuple[Task, str, dict[str, Any]]] = {
    "head": (topics(2), "head", {}),
    "wider": (topics(7), "head", {}),
    "tags": (NAMES, "head", {}),
    "lora": (topics(3), "lora", {"rank": 4}),
    "higher": (topics(2), "lora", {"rank": 8}),
    "lora-tags": (NAMES, "lora", {"rank": 4}),
}


@pytest.fixture(scope="module", params=[(a, t) for a in sorted(SIZES) for t in LABELS], ids="-".join)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, task = request.param
    return headed_model(tmp_path_factory.mktemp("base") / "m", task, architecture)


@pytest.fixture(scope="module")
def further(base: Path) -> dict[str, Path]:
    """Models of both methods and both tasks, other ranks and other numbers of labels."""
    made = {}
    for seed, (name, (task, method, lora)) in enumerate(FURTHER.items()):
        made[name] = further_model(base.parent / name, base, task, method, seed=seed, **lora)
    return made


@pytest.fixture(params=plugins.takes_adapters("llmo.engines"))
def engine(request: pytest.FixtureRequest, base: Path) -> Iterator[Shared]:
    made: Shared = plugins.load("llmo.engines", request.param)()
    made.load(base, CPU)
    yield made
    made.close()


def run(engine: Shared, asked: list[tuple[list[int], str | None]]) -> list[np.ndarray]:
    found = {chunk.id: chunk.data for chunk in engine.run([Request(i, *one) for i, one in enumerate(asked)])}
    assert len(found) == len(asked)
    return [found[i] for i in range(len(asked))]


def by_itself(name: str, folder: Path, ids: list[int]) -> np.ndarray:
    """What an engine says that was loaded with the model alone."""
    alone: Shared = plugins.load("llmo.engines", name)()
    alone.load(folder, CPU)
    (chunk,) = alone.run([Request(0, ids)])
    alone.close()
    return chunk.data


def test_a_mixed_batch_is_what_each_says_alone_and_by_itself(
    engine: Shared, base: Path, further: dict[str, Path]
) -> None:
    for name, folder in further.items():
        engine.add_adapter(name, folder)
    folders = {None: base, **further}
    asked = [(ids, name) for ids in TEXTS for name in folders]
    mixed = run(engine, asked)
    for (ids, name), said in zip(asked, mixed, strict=True):
        (alone,) = run(engine, [(ids, name)])
        itself = by_itself(engine.name, folders[name], ids)
        assert said.shape == alone.shape == itself.shape
        assert np.abs(said - alone).max() < CLOSE
        assert np.abs(said - itself).max() < CLOSE


def test_embeddings_are_those_of_the_own_trunk(engine: Any, base: Path, further: dict[str, Path]) -> None:
    names = [None, "head", "lora", "higher"]
    for name in names[1:]:
        engine.add_adapter(name, further[name])
    requests = [Request(i, TEXTS[2], name) for i, name in enumerate(names)]
    found = {chunk.id: chunk.data for chunk in engine.embed(requests)}
    assert np.abs(found[0] - found[1]).max() < CLOSE
    assert np.abs(found[0] - found[2]).max() > 1e-3 < np.abs(found[2] - found[3]).max()
    itself: Any = plugins.load("llmo.engines", engine.name)()
    itself.load(further["lora"], CPU)
    assert np.abs(next(iter(itself.embed([Request(0, TEXTS[2])]))).data - found[2]).max() < CLOSE


def test_they_come_and_go_while_it_runs(engine: Shared, further: dict[str, Path]) -> None:
    engine.add_adapter("stays", further["lora"])
    asked: list[tuple[list[int], str | None]] = [(ids, name) for ids in TEXTS for name in (None, "stays")]
    expected = run(engine, asked)
    stop = threading.Event()
    failed: list[BaseException] = []

    def change() -> None:
        try:
            while not stop.is_set():
                for name, folder in further.items():
                    engine.add_adapter(name, folder)
                    engine.remove_adapter(name)
        except BaseException as error:
            failed.append(error)

    changing = threading.Thread(target=change)
    changing.start()
    for _ in range(20):
        for said, wanted in zip(run(engine, asked), expected, strict=True):
            assert np.array_equal(said, wanted)
    stop.set()
    changing.join()
    assert failed == []
    with pytest.raises(InputError, match="unknown adapter 'head'"):
        run(engine, [(TEXTS[0], "head")])
    with pytest.raises(NotFoundError, match="'head'"):
        engine.remove_adapter("head")
    with pytest.raises(ConflictError, match="'stays'"):
        engine.add_adapter("stays", further["lora"])


def spoil(folder: Path, harm: str) -> None:
    weights, adapter = folder / "model.safetensors", folder / "adapter" / "adapter_model.safetensors"
    settings = folder / "adapter" / "adapter_config.json"
    tensors, sides = load_file(weights), load_file(adapter)
    ups = [name for name in sides if ".lora_B." in name]
    match harm:
        case "another trunk":
            name = next(name for name in tensors if "LayerNorm.weight" in name or "layer_norm.weight" in name)
            tensors[name] += 1e-6
        case "merged elsewhere":
            name = ups[0].removeprefix("base_model.model.").replace(".lora_B.weight", ".weight")
            tensors[name] += 1e-3
        case "no effect":
            sides |= {name: torch.zeros_like(sides[name]) for name in ups}
        case "a matrix less":
            del sides[ups[0]]
        case "a module elsewhere":
            sides["base_model.model.other.lora_A.weight"] = sides.pop(ups[0])
        case "another shape":
            sides[ups[0]] = sides[ups[0]][:, :-1].contiguous()
        case "not finite":
            sides[ups[0]][0, 0] = float("nan")
        case "a deaf head":
            name = next(n for n in tensors if n.endswith(("classifier.weight", "out_proj.weight")) and "attn" not in n)
            tensors[name].zero_()
        case "no head":
            del tensors[next(name for name in tensors if name.startswith("classifier"))]
        case "no weights":
            weights.unlink()
            return
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-1000])
            return
        case "settings of another kind":
            settings.write_text(json.dumps({**json.loads(settings.read_text()), "use_dora": True}))
        case "no adapter":
            shutil.rmtree(folder / "adapter")
            return
    save_file(tensors, weights, {"format": "pt"})
    save_file(sides, adapter)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("another trunk", "its trunk is another one"),
        ("merged elsewhere", "its trunk is another one"),
        ("no effect", "changes nothing"),
        ("a matrix less", "a matrix of .* is missing"),
        ("a module elsewhere", "no place for"),
        ("another shape", "it should be"),
        ("not finite", "not finite"),
        ("a deaf head", "says the same of every text"),
        ("no head", "no tensor 'classifier"),
        ("no weights", "no model.safetensors"),
        ("cut weights", "no whole safetensors"),
        ("settings of another kind", "use_dora"),
        ("no adapter", "its trunk is another one"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_others_answer_on(
    engine: Shared, further: dict[str, Path], tmp_path: Path, harm: str, says: str
) -> None:
    engine.add_adapter("good", further["lora"])
    before = run(engine, [(TEXTS[2], "good")])
    spoilt = tmp_path / "spoilt"
    shutil.copytree(further["lora"], spoilt)
    spoil(spoilt, harm)
    with pytest.raises(ModelError, match=says) as caught:
        engine.add_adapter("bad", spoilt)
    assert caught.value.hint
    assert np.array_equal(run(engine, [(TEXTS[2], "good")])[0], before[0])


def test_what_would_not_fit_into_the_memory_set_aside_is_refused(
    engine: Shared, base: Path, further: dict[str, Path]
) -> None:
    alone = run(engine, [(TEXTS[2], None)])
    engine.close()
    engine.load(base, CPU, adapter_bytes=128 << 10)
    names: list[str] = []
    with pytest.raises(ModelError, match=r"need 1 MiB, and 0 MiB are set aside") as refused:
        while True:
            engine.add_adapter(f"a{len(names)}", further["lora"])
            names.append(f"a{len(names)}")
    assert "adapters_mib=1" in refused.value.hint
    assert names
    with pytest.raises(InputError, match="unknown adapter"):
        run(engine, [(TEXTS[2], f"a{len(names)}")])
    engine.remove_adapter(names[0])
    engine.add_adapter("another", further["head"])
    assert np.array_equal(run(engine, [(TEXTS[2], None)])[0], alone[0])


@pytest.mark.parametrize("kind", ["llmo.engines", "llmo.generators"])
def test_who_takes_adapters_is_known_without_importing_it(kind: str) -> None:
    taking = [name for name in plugins.names(kind) if "adapters" in plugins.load(kind, name).abilities]
    assert plugins.takes_adapters(kind) == taking != []


def test_a_trunk_that_was_trained_is_another_one(engine: Shared, base: Path, tmp_path: Path) -> None:
    whole = further_model(tmp_path / "whole", base, topics(2), "full")
    with pytest.raises(ModelError, match="its trunk is another one"):
        engine.add_adapter("whole", whole)
