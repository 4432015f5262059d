"""The generation pipeline over an engine whose steps the test counts: admission, turns, ends of every kind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from llmo.engines.generation import Delta, GenerationOptions, Prompt, Sampling, TokenLogprob
from llmo.engines.paged.engine import PagedEngine
from llmo.errors import BusyError, DeadlineError, GateRefused, InputError, JobFailed, LLMOError, UnreachableError
from llmo.serve.ask import Ask, Input
from llmo.serve.calls import Call, Heard, Part, Usage
from llmo.serve.generation import GenerationPipeline
from llmo.serve.generator import make, self_test
from llmo.tasks.card import read_card
from llmo.types import Device
from support.serving import deploy, eventually, served_chat_model
from support.tiny_chat import tiny_chat_tokenizer

TOKENIZER = tiny_chat_tokenizer()
CONTEXT = 64


class Stepped:
    """An engine that writes `says` to every prompt, `at_once` tokens a step, and steps only as often as it is let."""

    name: ClassVar[str] = "stepped"
    abilities: ClassVar[frozenset[str]] = frozenset({"generate"})
    deterministic: ClassVar[bool] = True

    def __init__(self, says: str = "abcdefgh") -> None:
        self.says = TOKENIZER.encode(says).ids
        self.context, self.vocabulary = CONTEXT, TOKENIZER.get_vocab_size()
        self.added: list[Prompt] = []
        self.running: dict[int, int] = {}
        self.free = 10_000
        self.at_once = 1
        self.prefill = 0  # steps that a prompt takes before the first token
        self.steps = 0
        self.cancelled_at: dict[int, int] = {}
        self.allowed = threading.Semaphore(0)
        self.breaks: Callable[[Prompt], None] = lambda prompt: None
        self.failing: list[tuple[int, Exception]] = []
        self.broken = 0
        self.closed = False

    def load(self, model: Path, device: Device, options: GenerationOptions) -> None: ...

    def add(self, prompt: Prompt) -> None:
        self.breaks(prompt)
        self.added.append(prompt)
        self.running[prompt.id] = -self.prefill

    def cancel(self, id: int) -> None:
        self.running.pop(id)
        self.cancelled_at[id] = self.steps

    def step(self) -> list[Delta]:
        self.allowed.acquire()
        self.steps += 1
        if self.broken:
            self.broken -= 1
            raise RuntimeError("out of luck")
        deltas = []
        for id, at in list(self.running.items()):
            prompt = next(p for p in self.added if p.id == id)
            if at < 0:
                deltas.append(Delta(id, []))
                self.running[id] = at + 1
                continue
            end = min(len(self.says), prompt.sampling.max_tokens)
            written = self.says[at : min(at + self.at_once, end)]
            logprobs = [TokenLogprob(token, -1.0) for token in written] if prompt.sampling.logprobs is not None else []
            self.running[id] = at + len(written)
            last = self.running[id] >= end
            deltas.append(Delta(id, written, logprobs, finish="length" if last else None, cached=at and 0))
            if last:
                del self.running[id]
        return deltas

    def failed(self) -> list[tuple[int, Exception]]:
        failing, self.failing = self.failing, []
        for id, _ in failing:
            self.running.pop(id, None)
        return failing

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return []

    def stats(self) -> Mapping[str, Any]:
        return {
            "running": len(self.running),
            "waiting": 0,
            "cache_tokens": 0,
            "cache_hits": 0,
            "free_tokens": self.free,
        }

    def close(self) -> None:
        self.closed = True

    def let(self, steps: int) -> None:
        self.allowed.release(steps)


class Speaks:
    """A task whose template is the contents, one behind the other."""

    def prompt(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        text = "".join(str(m["content"]) for m in messages)
        if text == "bad":
            raise InputError("the template refuses this")
        if text == "defect":
            raise ZeroDivisionError
        ids: list[int] = tokenizer.encode(text).ids
        return ids


class Asked:
    """One call, and what it heard."""

    def __init__(self, pipeline: GenerationPipeline, text: str = "hi", tenant: str = "", **more: Any) -> None:
        deadline, strict = more.pop("deadline", float("inf")), more.pop("strict", False)
        self.pipeline = pipeline
        self.heard: list[Heard] = []
        self.over = threading.Event()
        inputs = more.pop("inputs", [Input(messages=[{"role": "user", "content": text}])])
        self.call = Call(Ask(inputs, **more), self._hear, deadline, strict, tenant)
        pipeline.submit(self.call)

    def _hear(self, what: Heard) -> None:
        self.heard.append(what)
        if isinstance(what, Usage | LLMOError):
            self.over.set()

    def parts(self) -> list[Part]:
        return [part for what in self.heard if isinstance(what, list) for part in what]

    def text(self) -> str:
        return "".join(part.text for part in self.parts())

    def end(self) -> Usage:
        assert self.over.wait(60)
        last = self.heard[-1]
        if isinstance(last, LLMOError):
            raise last
        assert isinstance(last, Usage)
        return last


@pytest.fixture
def engine() -> Stepped:
    return Stepped()


def made(engine: Stepped, **options: Any) -> GenerationPipeline:
    pipeline = GenerationPipeline(Speaks(), TOKENIZER, engine, lambda: None, **options)
    pipeline.start()
    return pipeline


@pytest.fixture
def pipeline(engine: Stepped) -> Iterator[GenerationPipeline]:
    pipeline = made(engine, streams=2, queue=8)
    yield pipeline
    engine.let(1000)
    pipeline.close()
    assert engine.closed


def test_an_answer_streams_and_ends_with_its_usage(engine: Stepped, pipeline: GenerationPipeline) -> None:
    asked = Asked(pipeline, stream=True, max_tokens=4)
    engine.let(1)
    eventually(lambda: asked.text() == "a", "the first piece")
    engine.let(3)
    usage = asked.end()
    assert [part.text for part in asked.parts()] == ["a", "b", "c", "d"]
    assert asked.parts()[-1].finish == "length"
    assert (usage.prompt, usage.completion, usage.cached) == (2, 4, 0)


def test_one_that_wants_it_whole_hears_one_part_a_choice(engine: Stepped, pipeline: GenerationPipeline) -> None:
    engine.let(100)
    asked = Asked(pipeline, n=2, token_ids=True, sampling=Sampling(seed=7), inputs=[Input(text="x"), Input(ids=[5, 6])])
    usage = asked.end()
    parts = sorted(asked.parts(), key=lambda part: part.choice)
    assert [(part.choice, part.text) for part in parts] == [(n, "abcdefgh") for n in range(4)]
    assert usage.prompt_ids == [TOKENIZER.encode("x").ids, [5, 6]]
    assert usage.prompt == 3
    assert usage.completion == 32
    assert [p.sampling.seed for p in engine.added] == [7, 8, 7, 8], "choices differ, and each can be asked for again"


def test_the_answer_never_outgrows_the_context(engine: Stepped, pipeline: GenerationPipeline) -> None:
    engine.let(100)
    Asked(pipeline, "x" * (CONTEXT - 3)).end()
    assert engine.added[0].sampling.max_tokens == 3


def test_a_stop_string_ends_the_answer_and_the_engine_is_told(engine: Stepped, pipeline: GenerationPipeline) -> None:
    asked = Asked(pipeline, stream=True, stop=("cd",))
    engine.let(5)
    usage = asked.end()
    assert asked.text() == "ab"
    assert asked.parts()[-1].finish == "stop"
    assert usage.completion == 4
    engine.let(1)  # the step that had begun already
    eventually(lambda: engine.cancelled_at, "the engine forgets it")
    assert not engine.running


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 8])
def test_answers_are_the_same_however_many_tokens_a_step_writes(
    engine: Stepped, pipeline: GenerationPipeline, at_once: int
) -> None:
    engine.at_once = at_once
    engine.let(100)
    plain, cut = (
        Asked(pipeline, stream=True, stop=stop, token_ids=True, max_tokens=7, sampling=Sampling(logprobs=0))
        for stop in ((), ("de",))
    )
    usage = plain.end(), cut.end()
    assert (plain.text(), plain.parts()[-1].finish, usage[0].completion) == ("abcdefg", "length", 7)
    assert (cut.text(), cut.parts()[-1].finish, usage[1].completion) == ("abc", "stop", 5)
    assert [one["token"] for part in cut.parts() for one in part.logprobs or []] == ["a", "b", "c"]
    assert cut.parts()[-1].token_ids == engine.says[:5]


def test_cancelling_frees_the_slot_before_the_next_step(engine: Stepped, pipeline: GenerationPipeline) -> None:
    asked = Asked(pipeline, stream=True)
    engine.let(2)
    eventually(lambda: len(asked.parts()) == 2, "it is being written")
    steps = engine.steps
    pipeline.cancel(asked.call)
    engine.let(1)  # the step that had begun already
    eventually(lambda: engine.cancelled_at, "the engine forgets it")
    assert next(iter(engine.cancelled_at.values())) - steps <= 1
    eventually(lambda: pipeline.stats()["streams"] == 0, "the slot is free")
    assert len(asked.parts()) == 2
    assert pipeline.stats()["cancelled"] == 1


def test_cancelling_one_that_waits_makes_room_at_once(engine: Stepped, pipeline: GenerationPipeline) -> None:
    running = [Asked(pipeline) for _ in range(2)]
    eventually(lambda: len(engine.added) == 2, "two run")
    waiting = [Asked(pipeline, tenant=str(n)) for n in range(8)]
    with pytest.raises(BusyError) as caught:
        Asked(pipeline)
    assert caught.value.extra["retry_after"] > 0
    pipeline.cancel(waiting[3].call)
    assert pipeline.stats()["queue"] == 7
    again = Asked(pipeline, tenant="again")
    engine.let(1000)
    for asked in [*running, *waiting[:3], *waiting[4:], again]:
        asked.end()
    assert not waiting[3].heard
    assert pipeline.stats()["queue"] == pipeline.stats()["queue_tokens"] == 0


def test_tenants_take_turns_and_the_last_places_are_for_newcomers(
    engine: Stepped, pipeline: GenerationPipeline
) -> None:
    blockers = [Asked(pipeline, tenant="greedy", max_tokens=1) for _ in range(2)]
    eventually(lambda: len(engine.added) == 2, "two run")
    greedy = [Asked(pipeline, tenant="greedy", max_tokens=1) for _ in range(7)]
    with pytest.raises(BusyError):
        Asked(pipeline, tenant="greedy")
    small = Asked(pipeline, tenant="small", max_tokens=1)
    eventually(lambda: not pipeline._queue.unmade, "all prompts are made")
    engine.let(100)
    for asked in [*blockers, *greedy, small]:
        asked.end()
    assert [p.tenant for p in engine.added].index("small") in (2, 3)


def test_the_queue_is_counted_in_tokens_too(engine: Stepped) -> None:
    engine.context = 4000
    pipeline = made(engine, streams=1, queue=2)
    Asked(pipeline, "x")
    eventually(lambda: len(engine.added) == 1, "one runs")
    Asked(pipeline, "x" * 2040)
    eventually(lambda: pipeline.stats()["queue_tokens"] == 2040, "one waits")
    Asked(pipeline, "x" * 2040, tenant="other")  # the bound is a whole context where the places hold less
    with pytest.raises(BusyError):
        Asked(pipeline, "x" * 2040, tenant="third")
    engine.let(1000)
    pipeline.close()


def test_prompts_go_to_the_engine_only_as_its_memory_allows(engine: Stepped, pipeline: GenerationPipeline) -> None:
    engine.free = 10
    first, second = Asked(pipeline, "x" * 8, max_tokens=1), Asked(pipeline, "y" * 8, max_tokens=1)
    eventually(lambda: len(engine.added) == 1 and not pipeline._queue.unmade, "one runs")
    assert pipeline.stats()["queue"] == 1, "the other keeps its place in the line"
    engine.let(2)
    first.end()
    second.end()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bad", "refuses"),
        ("defect", "cannot be made"),
        ("", "empty"),
        ("x" * CONTEXT, "maximum context length is 64 tokens, and the prompt alone has 64"),
    ],
)
def test_a_bad_prompt_fails_itself_only(engine: Stepped, pipeline: GenerationPipeline, text: str, says: str) -> None:
    engine.let(100)
    good = Asked(pipeline)
    with pytest.raises(InputError, match=says):
        Asked(pipeline, text).end()
    assert good.end().completion == 8
    assert pipeline.stats()["queue"] == 0


def test_what_is_too_long_however_it_is_cut_is_refused_at_once(pipeline: GenerationPipeline) -> None:
    with pytest.raises(InputError, match="at least") as caught:
        Asked(pipeline, "x" * 5_000_000)
    assert caught.value.extra["code"] == "context_length_exceeded"
    with pytest.raises(InputError, match="queue holds 8"):
        Asked(pipeline, n=9)


def test_what_an_engine_refuses_or_drops_fails_itself_only(
    engine: Stepped, pipeline: GenerationPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(prompt: Prompt) -> None:
        if len(prompt.input_ids) == 5:
            raise InputError("no such grammar")

    engine.breaks = breaks
    good, refused, dropped = Asked(pipeline), Asked(pipeline, "xxxxx"), Asked(pipeline, "yyyyyy")
    with pytest.raises(InputError, match="grammar"):
        refused.end()
    eventually(lambda: len(engine.added) == 2, "two run")
    engine.failing = [(next(p.id for p in engine.added if len(p.input_ids) == 6), RuntimeError("this one"))]
    engine.let(100)
    with pytest.raises(LLMOError, match="this one") as caught:
        dropped.end()
    assert "log" in caught.value.hint
    assert "RuntimeError: this one" in caplog.text
    assert good.end().completion == 8


def test_a_step_that_fails_ends_what_ran_and_nothing_that_waits(engine: Stepped, pipeline: GenerationPipeline) -> None:
    ran = [Asked(pipeline), Asked(pipeline)]
    eventually(lambda: len(engine.added) == 2, "two run")
    waits = Asked(pipeline)
    engine.broken = 1
    engine.let(1)
    for asked in ran:
        with pytest.raises(LLMOError, match="out of luck"):
            asked.end()
    engine.let(100)
    assert waits.end().completion == 8
    assert pipeline.broken is None


def test_an_engine_that_fails_at_every_step_is_broken(engine: Stepped, pipeline: GenerationPipeline) -> None:
    engine.broken = 8
    engine.let(8)
    for _ in range(8):
        with pytest.raises(LLMOError, match="out of luck"):
            Asked(pipeline).end()
    assert isinstance(pipeline.broken, JobFailed)


def test_an_engine_whose_thread_ends_makes_the_replica_of_no_use(
    engine: Stepped, pipeline: GenerationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(id: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "cancel", fails)
    asked, other = Asked(pipeline, stream=True), Asked(pipeline)
    engine.let(2)
    eventually(asked.parts, "it is being written")
    pipeline.cancel(asked.call)
    engine.let(1)
    eventually(lambda: pipeline.broken, "somebody is told")
    assert engine.closed
    pipeline.close()
    with pytest.raises(UnreachableError):
        other.end()


def test_a_deadline_is_for_the_beginning_unless_it_is_strict(engine: Stepped, pipeline: GenerationPipeline) -> None:
    begun, strict = Asked(pipeline, stream=True, deadline=5.0), Asked(pipeline, stream=True, deadline=5.0, strict=True)
    eventually(lambda: len(engine.added) == 2, "two run")
    waits = Asked(pipeline, deadline=5.0)
    engine.let(1)
    eventually(lambda: begun.parts() and strict.parts(), "two have begun")
    pipeline.expire(4.9)
    assert not waits.over.is_set()
    pipeline.expire(5.0)
    for late in (strict, waits):
        with pytest.raises(DeadlineError):
            late.end()
    engine.let(100)
    assert begun.end().completion == 8


def test_a_prompt_that_is_still_computed_has_not_begun(engine: Stepped, pipeline: GenerationPipeline) -> None:
    engine.prefill = 2
    late, patient = Asked(pipeline, stream=True, deadline=5.0), Asked(pipeline, stream=True)
    eventually(lambda: len(engine.added) == 2, "two run")
    engine.let(2)
    eventually(lambda: engine.steps == 2, "two steps")
    assert pipeline.stats()["prompts"] == 0
    pipeline.expire(5.0)
    with pytest.raises(DeadlineError):
        late.end()
    engine.let(100)
    patient.end()
    assert [part.text for part in patient.parts()] == list("abcdefgh")


def test_draining_answers_what_was_accepted_and_closing_ends_the_rest(engine: Stepped) -> None:
    pipeline = made(engine, streams=1)
    asked, late = Asked(pipeline), Asked(pipeline)
    assert not pipeline.drain(0.01)
    with pytest.raises(UnreachableError):
        Asked(pipeline)
    engine.let(8)
    asked.end()
    engine.let(1)
    pipeline.close()
    with pytest.raises(UnreachableError):
        late.end()
    assert engine.closed


def test_an_engine_that_does_not_load_says_so(engine: Stepped) -> None:
    def fails() -> None:
        raise InputError("no weights")

    with pytest.raises(InputError, match="no weights"):
        GenerationPipeline(Speaks(), TOKENIZER, engine, fails).start()


def test_tools_are_refused_where_the_template_would_not_show_them(engine: Stepped) -> None:
    pipeline = made(engine, takes_tools=False)
    engine.let(100)
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InputError, match="takes no tools"):
        Asked(pipeline, inputs=[Input(messages=messages, tools=[{"type": "function"}])]).end()
    pipeline.close()


def golden(greedy: str) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": "hi"}]
    one = {"text": "hi", "messages": messages, "input_ids": TOKENIZER.encode("hi").ids}
    return [{**one, "greedy": TOKENIZER.encode(greedy).ids}]


def test_the_self_test_compares_prompts_and_greedy_tokens(engine: Stepped, pipeline: GenerationPipeline) -> None:
    engine.let(1000)
    same, later, early = golden("abcdefgh"), golden("abcdefgx"), golden("abcxefgh")
    assert "1 of 1" in self_test(pipeline, same, exact=True)
    with pytest.raises(GateRefused, match="0 of its 1"):
        self_test(pipeline, later, exact=True)
    assert "1 of 2" in self_test(pipeline, [*later, *early], exact=False)
    with pytest.raises(GateRefused, match="1 of its 3"):
        self_test(pipeline, [*later, *early, *early], exact=False)
    with pytest.raises(GateRefused, match="other tokens"):
        self_test(pipeline, [{**same[0], "input_ids": [9]}], exact=False)
    with pytest.raises(GateRefused):
        self_test(pipeline, [], exact=True)


def test_a_replica_is_as_wide_as_was_measured_unless_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = served_chat_model(tmp_path / "chat")
    measured = [{"threads": 2, "streams": n, "tokens_per_second": speed} for n, speed in ((1, 90.0), (4, 200.0))]
    card = {**read_card(folder), "engine": "torch", "width": measured}
    two = Device("cpu", "cpu", memory=0, free=0, cores=2)
    loaded: list[int] = []
    load = PagedEngine.load

    def noted(engine: PagedEngine, model: Path, device: Device, options: GenerationOptions) -> None:
        loaded.append(device.cores)
        load(engine, model, device, options)

    monkeypatch.setattr(PagedEngine, "load", noted)

    def limit(device: Device = two, **spec: Any) -> int:
        return int(make(folder, card, deploy(cache_mib=1, **spec), device).stats()["streams_limit"])

    def threads(**spec: Any) -> int:
        pipeline = make(folder, card, deploy(cache_mib=1, **spec), two)
        pipeline.start()
        pipeline.close()
        return loaded[-1]

    assert limit() == 4
    assert limit(streams=3) == 3
    assert limit(engine="native") == 16
    assert limit(Device("cuda:0", "cuda", memory=0, free=0, cores=2)) == 16
    assert limit(Device("cpu", "cpu", memory=0, free=0, cores=1)) == 16
    assert threads() == 2
    measured += [{"threads": 1, "streams": 1, "tokens_per_second": 100.0}, {**measured[1], "threads": 1}]
    assert threads() == 1
    assert threads(cores=2) == 2
