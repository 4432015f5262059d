"""The OpenVINO engine of encoders: how it cuts a batch, what it shares out, and what it refuses to run otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from llmo.compression.export import export
from llmo.compression.openvino_encoder import write
from llmo.engines import cpu
from llmo.engines.base import Request
from llmo.engines.openvino import encoder
from llmo.engines.openvino.encoder import OpenVinoEncoder
from llmo.engines.openvino.groups import cut, rounded
from llmo.engines.openvino.runner import GRAPH, PRECISION_KEY
from llmo.errors import EnvironmentProblem, ModelError
from llmo.hardware import Processor
from llmo.types import Device
from support.headed import headed_model

TEXTS = [[2, *range(5, 5 + length), 3] for length in (1, 30, 4, 4, 61, 12, 0, 30, 5, 9, 22, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = headed_model(tmp_path_factory.mktemp("model") / "bert")
    export(made, made / "model.onnx")
    write(made / "model.onnx", made, "fp32")
    return made


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """To be changed at will."""
    return shutil.copytree(folder, tmp_path / "copy")


def loaded(folder: Path, cores: int = 1) -> OpenVinoEncoder:
    made = OpenVinoEncoder()
    made.load(folder, Device("cpu", "cpu", memory=0, free=0, cores=cores))
    return made


def said(engine: OpenVinoEncoder, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    found = {chunk.id: chunk.data for chunk in engine.run([Request(i, ids) for i, ids in enumerate(texts)])}
    return [found[i] for i in range(len(texts))]


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_cut_into_parts_of_like_length(streams: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 200, 37).tolist()
    parts = cut(lengths, streams, None)
    assert sorted(number for part in parts for number in part) == list(range(len(lengths)))
    assert {len(part) for part in parts} <= {1, 2, 4, 8, 16}
    assert len(parts) >= streams
    padded = sum(len(part) * rounded(max(lengths[number] for number in part), None) for part in parts)
    assert padded < 1.3 * sum(lengths) < 37 * max(lengths)
    spans = sorted((min(lengths[n] for n in part), max(lengths[n] for n in part)) for part in parts)
    assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(spans))


def test_lengths_are_few_and_within_what_the_model_reads() -> None:
    found = {rounded(length, 512) for length in range(1, 513)}
    assert len(found) <= 24
    assert all(length <= rounded(length, 512) < 1.5 * length + 8 for length in range(1, 513))
    assert rounded(125, 126) == 126
    assert rounded(130, 126) == 130  # too long all the same: it is refused, not cut


def test_one_text_is_one_part_and_alike_texts_share_one() -> None:
    assert cut([9], 2, None) == [[0]]
    assert cut([9, 9, 9, 9], 1, None) == [[0, 1, 2, 3]]


def test_two_streams_say_what_one_says(folder: Path) -> None:
    one, two = loaded(folder), loaded(folder, cores=2)
    assert (two.facts().threads, two.facts().streams) == (2, 2)
    for a, b in zip(said(one, TEXTS), said(two, TEXTS), strict=True):
        assert np.abs(a - b).max() < 1e-5
    one.close()
    two.close()


def test_it_runs_what_the_graph_says_whatever_the_card_says(copy: Path) -> None:
    card = json.loads((copy / "llmo.json").read_text())
    (copy / "llmo.json").write_text(json.dumps(card | {"precision": "int8"}))
    assert loaded(copy).facts().precision == "fp32"


def test_a_runtime_that_computes_otherwise_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.instructions("bf16"):
        pytest.skip("this processor computes at fp32 only")
    monkeypatch.setitem(encoder.HINTS, "fp32", "bf16")
    with pytest.raises(EnvironmentProblem, match=r"is to run at fp32 .* OpenVINO runs it at bf16") as caught:
        loaded(folder)
    assert caught.value.hint


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_processor_without_the_instructions_is_refused(
    precision: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = ov.Core().read_model(copy / GRAPH)
    graph.set_rt_info(precision, PRECISION_KEY)
    save(graph, copy)
    monkeypatch.setattr(cpu, "processor", lambda _: Processor("an old one", ("avx2",)))
    with pytest.raises(EnvironmentProblem, match=f"asked for {precision}"):
        loaded(copy)


def test_a_graph_that_says_no_precision_is_refused(copy: Path) -> None:
    graph = ov.Core().read_model(copy / GRAPH)
    graph.set_rt_info("", PRECISION_KEY)
    save(graph, copy)
    with pytest.raises(ModelError, match="precision"):
        loaded(copy)


def test_a_graph_that_is_no_text_encoder_is_refused(copy: Path) -> None:
    graph = ov.Core().read_model(copy / GRAPH)
    graph.inputs[1].set_names({"pixels"})
    save(graph, copy)
    with pytest.raises(ModelError, match="pixels"):
        loaded(copy)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_are_refused(kind: str, copy: Path) -> None:
    card = json.loads((copy / "llmo.json").read_text())
    (copy / "llmo.json").write_text(json.dumps(card | {"applied": kind}))
    with pytest.raises(ModelError, match=kind) as caught:
        loaded(copy)
    assert "onnx" in caught.value.hint


def save(graph: ov.Model, folder: Path) -> None:
    """In place: the weights that were read may still be mapped."""
    ov.save_model(graph, folder / "new.xml", compress_to_fp16=False)
    (folder / "new.xml").replace(folder / GRAPH)
    (folder / "new.bin").replace(folder / "openvino_model.bin")
