"""The pipeline with a real task and tokeniser; the engine is a real one, or one that can be held still."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from llmo.engines.base import Chunk, Request
from llmo.engines.torch import TorchEngine
from llmo.errors import (
    BusyError,
    DeadlineError,
    InputError,
    LLMOError,
    ModelError,
    TooLargeError,
    UnreachableError,
)
from llmo.serve.pipeline import Call, Pipeline
from llmo.tasks.card import load_task, load_tokenizer
from support.headed import further_model, topics
from support.serving import CPU, direct, eventually, served_model

FOREVER = float("inf")


class HeldEngine:
    """Runs when told to; says that a text is a topic by its first word piece; `poison` ids make it fail."""

    name: ClassVar[str] = "held"
    abilities: ClassVar[frozenset[str]] = frozenset({"classify"})

    def __init__(self) -> None:
        self.go = threading.Event()
        self.batches: list[int] = []
        self.poison = -1
        self.value = 1.0

    def load(self, model: Path, device: object) -> None: ...

    def run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        self.batches.append(len(requests))
        assert self.go.wait(60)
        for request in requests:
            if self.poison in request.input_ids:
                raise RuntimeError("poison")
            yield Chunk(request.id, np.array([self.value, 0, 0], dtype=np.float32))

    def close(self) -> None:
        self.go.set()


class Heard:
    """What `done` was told, once."""

    def __init__(self) -> None:
        self.outcome: Any = None
        self._event = threading.Event()

    def __call__(self, outcome: bytes | LLMOError) -> None:
        assert self.outcome is None, "a call is answered once"
        self.outcome = outcome
        self._event.set()

    def get(self) -> Any:
        assert self._event.wait(60)
        return self.outcome


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_model(tmp_path_factory.mktemp("model") / "m")


def pipeline_of(model: Path, engine: Any, queue: int = 64, **more: Any) -> Pipeline:
    task, tokenizer = load_task(model), load_tokenizer(model)
    pipeline = Pipeline(task, tokenizer, engine, lambda: engine.load(model, CPU), queue=queue, **more)
    pipeline.start()
    return pipeline


@pytest.fixture
def held(model: Path) -> Iterator[tuple[Pipeline, HeldEngine]]:
    engine = HeldEngine()
    pipeline = pipeline_of(model, engine, queue=4)
    yield pipeline, engine
    engine.go.set()
    pipeline.close()


def ask(pipeline: Pipeline, texts: list[str], deadline: float = FOREVER, **more: Any) -> tuple[Call, Heard]:
    heard = Heard()
    call = Call(texts, deadline, heard, **more)
    pipeline.submit(call)
    return call, heard


def occupy(pipeline: Pipeline, engine: HeldEngine) -> Heard:
    """One text that is inside the engine, so that what follows waits."""
    _, heard = ask(pipeline, ["goal"])
    eventually(lambda: engine.batches, "the engine runs")
    return heard


def test_batched_answers_equal_those_of_texts_run_alone(model: Path) -> None:
    pipeline = pipeline_of(model, TorchEngine())
    texts = ["profit " * n + "goal" for n in (1, 3, 3, 9, 20, 21, 40, 80)]
    try:
        calls = [ask(pipeline, texts, logits=True)[1], *(ask(pipeline, [t], logits=True)[1] for t in texts)]
        answers = [a for heard in calls for a in json.loads(heard.get())]
    finally:
        pipeline.close()
    expected = direct(model, [a["input_ids"] for a in answers[:8]])
    for answer, logits in zip(answers, expected * 2, strict=True):
        np.testing.assert_allclose(answer["logits"], logits, atol=1e-5)
    assert [a.get("truncated", False) for a in answers[:8]] == [False] * 7 + [True]
    assert answers[7]["tokens"] == 83
    assert len(answers[7]["input_ids"]) == 64


def test_what_is_still_to_be_loaded_holds_up_nobody_else(model: Path, tmp_path: Path) -> None:
    further = further_model(tmp_path / "further", model, topics(2))
    may_load = threading.Event()

    def slowly(_: Path) -> None:
        assert may_load.wait(60)

    pipeline = pipeline_of(model, TorchEngine(), check_adapter=slowly)
    try:
        calls = [ask(pipeline, ["goal"] * 20, adapter=str(further)) for _ in range(2)]
        gone, _ = ask(pipeline, ["goal"], adapter=str(further))
        nowhere = ask(pipeline, ["goal"], adapter=str(tmp_path / "nowhere"))[1]
        assert len(json.loads(ask(pipeline, ["goal"] * 3)[1].get())) == 3
        assert [heard.outcome for _, heard in calls] == [None, None]
        pipeline.cancel(gone)
        may_load.set()
        for _, heard in calls:
            assert {answer["label"] for answer in json.loads(heard.get())} <= {"topic0", "topic1"}
        assert isinstance(nowhere.get(), ModelError)
        assert pipeline.stats()["queue"] == 0
    finally:
        may_load.set()
        pipeline.close()


def test_calls_take_turns_for_memory_that_holds_one_of_their_models(model: Path, tmp_path: Path) -> None:
    names = [str(further_model(tmp_path / name, model, topics(3), seed=i)) for i, name in enumerate("xyz")]
    engine = TorchEngine()
    engine.load(model, CPU)
    sizes = []
    for name in names:
        engine.add_adapter(name, Path(name))
        sizes.append(engine._loaded()._size([engine._loaded().get(name)]))
    engine.close()
    memory = max(sizes) * 3 // 2
    task, tokenizer = load_task(model), load_tokenizer(model)
    pipeline = Pipeline(task, tokenizer, engine, lambda: engine.load(model, CPU, adapter_bytes=memory), queue=1000)
    pipeline.start()
    texts = ["goal profit", "coach", "team " * 9]
    try:
        alone = {name: ask(pipeline, texts, adapter=name, logits=True)[1].get() for name in names}
        calls = [(name, ask(pipeline, texts, adapter=name, logits=True)) for name in names * 20]
        for _, (call, _) in calls[7::10]:
            pipeline.cancel(call)
        plain = ask(pipeline, texts)[1]
        assert len(json.loads(plain.get())) == 3
        for name, (call, heard) in calls:
            if heard.outcome is not None or not call.over:
                for found, expected in zip(json.loads(heard.get()), json.loads(alone[name]), strict=True):
                    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-5)
        assert sum(heard.outcome is not None for _, (_, heard) in calls) >= 54
        late = ask(pipeline, texts, deadline=time.time() + 60, adapter=names[0])[1]
        assert len(json.loads(late.get())) == 3
        assert pipeline.stats()["in_flight"] == 0
    finally:
        pipeline.close()


def test_a_full_queue_says_when_to_come_back(held: tuple[Pipeline, HeldEngine]) -> None:
    pipeline, engine = held
    occupy(pipeline, engine)
    ask(pipeline, ["goal", "coach", "team"])
    with pytest.raises(BusyError) as caught:
        ask(pipeline, ["cup", "win"])
    assert caught.value.extra["retry_after"] > 0
    ask(pipeline, ["cup"])
    assert pipeline.stats()["queue"] == 4


def test_the_replicas_own_test_is_taken_when_the_queue_is_full(held: tuple[Pipeline, HeldEngine]) -> None:
    pipeline, engine = held
    occupy(pipeline, engine)
    ask(pipeline, ["goal", "coach", "team", "cup"])
    heard = Heard()
    pipeline.submit(Call(["win"], FOREVER, heard, test=True))
    engine.go.set()
    assert isinstance(heard.get(), bytes)


def test_more_texts_than_the_queue_holds_will_never_fit(held: tuple[Pipeline, HeldEngine]) -> None:
    with pytest.raises(TooLargeError, match="queue holds 4"):
        ask(held[0], ["goal"] * 5)


def test_cancelling_frees_the_places_at_once_and_nothing_is_run_for_it(held: tuple[Pipeline, HeldEngine]) -> None:
    pipeline, engine = held
    first = occupy(pipeline, engine)
    call, cancelled = ask(pipeline, ["goal", "coach", "team", "cup"])
    with pytest.raises(BusyError):
        ask(pipeline, ["win"])
    pipeline.cancel(call)
    pipeline.cancel(call)
    assert pipeline.stats()["queue"] == 0
    _, after = ask(pipeline, ["win"])
    engine.go.set()
    assert first.get()
    assert after.get()
    assert cancelled.outcome is None
    assert engine.batches == [1, 1]


def test_a_call_past_its_deadline_is_answered_without_running(held: tuple[Pipeline, HeldEngine]) -> None:
    pipeline, engine = held
    first = occupy(pipeline, engine)
    _, late = ask(pipeline, ["goal", "coach"], deadline=time.time() - 1)
    engine.go.set()
    assert isinstance(late.get(), DeadlineError)
    assert first.get()
    assert engine.batches == [1]
    assert pipeline.stats()["queue"] == 0


def test_a_running_call_past_its_deadline_is_answered_too(held: tuple[Pipeline, HeldEngine]) -> None:
    pipeline, engine = held
    _, heard = ask(pipeline, ["goal"], deadline=1000.0 + time.time())
    eventually(lambda: engine.batches, "the engine runs")
    pipeline.expire(2000.0 + time.time())
    assert isinstance(heard.get(), DeadlineError)
    engine.go.set()
    assert ask(pipeline, ["goal"])[1].get()


@pytest.mark.parametrize(
    ("text", "error"),
    [("", InputError), ("  \n", InputError), ("a\ud83d", InputError), ("x" * (1 << 20) + "x", TooLargeError)],
)
def test_a_text_no_model_can_read_fails_its_own_call_only(
    held: tuple[Pipeline, HeldEngine], text: str, error: type[LLMOError]
) -> None:
    pipeline, engine = held
    engine.go.set()
    with pytest.raises(error) as caught:
        ask(pipeline, ["goal", text])
    assert caught.value.where == "texts[1]"
    assert ask(pipeline, ["goal"])[1].get()
    assert pipeline.stats()["queue"] == 0


def test_a_text_that_breaks_the_engine_does_not_fail_its_batch(held: tuple[Pipeline, HeldEngine], model: Path) -> None:
    pipeline, engine = held
    engine.poison = load_tokenizer(model).token_to_id("bank")
    first = occupy(pipeline, engine)
    others = [ask(pipeline, [text])[1] for text in ("goal", "bank", "coach")]
    eventually(lambda: pipeline.stats()["queue"] == 3, "three wait")
    engine.go.set()
    outcomes = [heard.get() for heard in (first, *others)]
    assert [isinstance(o, bytes) for o in outcomes] == [True, True, False, True]
    assert isinstance(outcomes[2], ModelError)
    assert pipeline.broken is None


def test_an_engine_that_fails_on_everything_is_given_up(held: tuple[Pipeline, HeldEngine], model: Path) -> None:
    pipeline, engine = held
    engine.poison = load_tokenizer(model).token_to_id("[CLS]")
    engine.go.set()
    for _ in range(8):
        assert isinstance(ask(pipeline, ["goal"])[1].get(), ModelError)
    eventually(lambda: pipeline.broken, "it is given up")


def test_an_answer_that_is_not_a_number_is_an_error(held: tuple[Pipeline, HeldEngine]) -> None:
    pipeline, engine = held
    engine.value = float("nan")
    engine.go.set()
    assert isinstance(ask(pipeline, ["goal"], logits=True)[1].get(), ModelError)


def test_draining_answers_what_was_accepted_and_refuses_the_rest(held: tuple[Pipeline, HeldEngine]) -> None:
    pipeline, engine = held
    accepted = [occupy(pipeline, engine), ask(pipeline, ["goal", "coach"])[1]]
    assert not pipeline.drain(0.0)
    with pytest.raises(UnreachableError):
        ask(pipeline, ["cup"])
    engine.go.set()
    assert pipeline.drain(60.0)
    assert all(heard.get() for heard in accepted)


def test_closing_leaves_no_caller_waiting(model: Path) -> None:
    engine = HeldEngine()
    pipeline = pipeline_of(model, engine)
    heard = occupy(pipeline, engine)
    waiting = ask(pipeline, ["coach"])[1]
    threading.Timer(0.05, engine.go.set).start()
    pipeline.close()
    assert isinstance(waiting.get(), UnreachableError)
    assert isinstance(heard.get(), UnreachableError)


def test_a_model_that_does_not_load_says_so_and_leaves_no_thread(tmp_path: Path, model: Path) -> None:
    engine = TorchEngine()
    before = threading.active_count()
    pipeline = Pipeline(load_task(model), load_tokenizer(model), engine, lambda: engine.load(tmp_path, CPU))
    with pytest.raises(ModelError):
        pipeline.start()
    assert threading.active_count() == before


def test_what_a_tenant_asked_before_is_not_computed_again(model: Path) -> None:
    engine = HeldEngine()
    engine.go.set()
    pipeline = pipeline_of(model, engine, repeats=1 << 20)
    try:
        first = ask(pipeline, ["goal", "team"], tenant="one")[1].get()
        assert ask(pipeline, ["team", "goal"], tenant="one")[1].get() == first
        assert sum(engine.batches) == 2
        engine.value = 2.0  # what is computed from now on differs
        some = json.loads(ask(pipeline, ["goal", "coach"], tenant="one")[1].get())
        assert [some[0]] == json.loads(first)[:1]
        assert some[1]["score"] > some[0]["score"]
        assert sum(engine.batches) == 3
        others: list[dict[str, Any]] = [
            {"tenant": "two"}, {"tenant": "one", "logits": True}, {"tenant": "one", "test": True},
        ]  # fmt: skip
        for n, other in enumerate(others):
            assert json.loads(ask(pipeline, ["goal"], **other)[1].get())[0]["score"] > some[0]["score"]
            assert sum(engine.batches) == 4 + n
        stats = pipeline.stats()
        assert stats["repeated"] == 3
        assert 0 < stats["repeats_bytes"] < 1 << 20
        assert (stats["queue"], stats["in_flight"]) == (0, 0)
    finally:
        pipeline.close()


def test_a_call_that_is_partly_known_holds_a_place_only_for_the_rest(model: Path) -> None:
    engine = HeldEngine()
    engine.go.set()
    pipeline = pipeline_of(model, engine, queue=2, repeats=1 << 20)
    try:
        ask(pipeline, ["goal", "team"])[1].get()
        engine.go.clear()
        occupied = occupy_with(pipeline, engine, "coach")
        waiting = ask(pipeline, ["win", "goal"])[1]
        assert pipeline.stats()["queue"] == 1
        cancelled, _ = ask(pipeline, ["goal", "cup"])
        assert pipeline.stats()["queue"] == 2
        assert len(json.loads(ask(pipeline, ["goal", "team"])[1].get())) == 2  # the full queue is not in its way
        pipeline.cancel(cancelled)
        assert pipeline.stats()["queue"] == 1
        engine.go.set()
        assert len(json.loads(waiting.get())) == 2
        occupied.get()
        assert pipeline.stats()["queue"] == 0
    finally:
        engine.go.set()
        pipeline.close()


def occupy_with(pipeline: Pipeline, engine: HeldEngine, text: str) -> Heard:
    before = len(engine.batches)
    _, heard = ask(pipeline, [text])
    eventually(lambda: len(engine.batches) > before, "the engine runs")
    return heard


def test_nothing_is_kept_where_there_is_no_room(model: Path) -> None:
    engine = HeldEngine()
    engine.go.set()
    pipeline = pipeline_of(model, engine)
    try:
        for _ in range(2):
            ask(pipeline, ["goal"])[1].get()
        assert sum(engine.batches) == 2
        assert pipeline.stats()["repeats_bytes"] == 0
    finally:
        pipeline.close()
