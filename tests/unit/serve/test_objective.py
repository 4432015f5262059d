"""An objective: what is measured is kept, what keeps to it is chosen, and where nothing does the nearest is named."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from llmo import hardware
from llmo.context import NullContext, Stopped
from llmo.engines.base import Chunk, Request
from llmo.engines.batcher import Batcher
from llmo.errors import EnvironmentProblem, GateRefused, LLMOError
from llmo.serve import encoder, objective
from llmo.serve.objective import load, settle
from llmo.serve.pipeline import Pipeline
from llmo.specs import DeploySpec
from llmo.tasks.card import load_task, load_tokenizer, read_card, write_card
from support.serving import CPU, served_model

TEXTS = ["goal", "the team won the cup", "profit of the bank"]


class Crowded:
    """Counts how many texts it is given; with `most` as the largest batch it answers late."""

    name: ClassVar[str] = "crowded"
    abilities: ClassVar[frozenset[str]] = frozenset({"classify"})
    pads: ClassVar[bool] = False

    def __init__(self) -> None:
        self.batches: list[int] = []

    def load(self, model: Path, device: object) -> None: ...

    def run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        self.batches.append(len(requests))
        for request in requests:
            yield Chunk(request.id, np.array([1.0, 0, 0], dtype=np.float32))

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "SECONDS", 0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_model(tmp_path_factory.mktemp("model") / "m")


def spec(p99_ms: float) -> dict[str, object]:
    return DeploySpec.model_validate({"endpoint": "e", "slo": {"p99_ms": p99_ms}}).plain()


class Maker:
    """Makes pipelines and remembers with how many threads."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.threads: list[int] = []
        self.engines: list[Crowded] = []

    def __call__(self, threads: int) -> Pipeline:
        engine = Crowded()
        self.threads.append(threads)
        self.engines.append(engine)
        task, tokenizer = load_task(self.model), load_tokenizer(self.model)
        batcher = Batcher(4096, slack_tokens=None)
        return Pipeline(task, tokenizer, engine, lambda: engine.load(self.model, CPU), batcher=batcher)


def test_clients_wait_for_their_answers(model: Path) -> None:
    make = Maker(model)
    pipeline = make(1)
    pipeline.start()
    latencies, seconds = load(pipeline, TEXTS, 3, 0.0, NullContext(1))
    pipeline.close()
    assert objective.LEAST <= len(latencies) <= objective.LEAST + 3
    assert sum(make.engines[0].batches) == len(latencies)
    assert max(make.engines[0].batches) <= 3
    assert 0 < max(latencies) <= seconds


def test_what_was_measured_is_measured_once(model: Path, tmp_path: Path) -> None:
    make, ctx = Maker(model), NullContext(4, tmp_path)
    found = settle(make, TEXTS, model, 4, spec(60_000), ctx)
    assert make.threads == [4, 2, 1]
    assert found.p99_ms <= 60_000
    assert found.texts_per_second > 0
    assert found.threads in make.threads
    assert found.max_batch_tokens in objective.BATCH_TOKENS
    assert settle(make, TEXTS, model, 4, spec(60_000), ctx) == found
    assert make.threads == [4, 2, 1]
    settle(make, TEXTS, model, 4, spec(50_000), ctx)  # another objective
    assert make.threads == [4, 2, 1] * 2


def test_on_another_processor_it_is_measured_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, ctx = Maker(model), NullContext(1, tmp_path)
    settle(make, TEXTS, model, 1, spec(60_000), ctx)
    settle(make, TEXTS, model, 1, spec(60_000), ctx)
    assert make.threads == [1]
    monkeypatch.setattr(hardware, "processor", lambda: hardware.Processor("another", ()))
    settle(make, TEXTS, model, 1, spec(60_000), ctx)
    assert make.threads == [1, 1]


def test_where_nothing_keeps_to_it_the_nearest_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(GateRefused, match=r"within 1e-06 ms: the nearest takes .* ms \(.* threads, .* 1 client\)") as e:
        settle(Maker(model), TEXTS, model, 2, spec(1e-6), NullContext(2, tmp_path))
    assert e.value.exit_code == 3
    assert "deploy.slo.p99_ms" in (e.value.hint or "")
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_being_asked_to_stop_it_stops(model: Path, tmp_path: Path) -> None:
    class Impatient(NullContext):
        def should_stop(self) -> bool:
            return True

    before = threading.active_count()
    with pytest.raises(Stopped):
        settle(Maker(model), TEXTS, model, 1, spec(60_000), Impatient(1, tmp_path))
    assert threading.active_count() == before


def test_an_engine_that_ends_in_the_middle_is_said(model: Path, tmp_path: Path) -> None:
    class Ending(Crowded):
        def run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
            raise RuntimeError("no more")

    engine = Ending()
    task, tokenizer = load_task(model), load_tokenizer(model)

    def make(threads: int) -> Pipeline:
        return Pipeline(task, tokenizer, engine, lambda: engine.load(model, CPU))

    before = threading.active_count()
    with pytest.raises(LLMOError, match="no more"):
        settle(make, TEXTS, model, 1, spec(60_000), NullContext(1, tmp_path))
    assert threading.active_count() == before


def test_a_graph_for_other_arithmetic_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = {**read_card(model), "engine": "onnx", "precision": "int8"}
    measured = {"hardware": {"features": ["avx2", "avx512f", "avx512_vnni"]}}
    monkeypatch.setattr(hardware, "processor", lambda: hardware.Processor("older", ("avx2",)))
    with pytest.raises(EnvironmentProblem, match="would overflow on this one"):
        encoder.make(model, {**card, **measured}, spec(1.0), CPU)
    for fits in ({"hardware": {"features": ["avx2"]}}, {}, {"engine": "torch", "precision": "fp32", **measured}):
        encoder.make(model, {**card, **fits}, spec(1.0), CPU)


def test_a_replica_keeps_to_its_objective(model: Path, tmp_path: Path) -> None:
    write_card(model, read_card(model))
    notes: list[str] = []

    class Noting(NullContext):
        def note(self, message: str) -> None:
            notes.append(message)

    asked, device = encoder.settled(model, read_card(model), spec(60_000), CPU, Noting(1, tmp_path))
    assert device.cores == 1
    assert asked["max_batch_tokens"] in objective.BATCH_TOKENS
    assert notes[0].startswith("99 of 100 texts within 60000 ms: ")
