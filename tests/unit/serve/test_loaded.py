"""A replica's adapters: what an engine cannot take is refused by name, and what nobody asks for is given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import pytest

from llmo.engines.generation import GenerationOptions, Prompt
from llmo.engines.llamacpp.engine import LlamaCppEngine
from llmo.engines.native.engine import NativeEngine
from llmo.engines.onnx import OnnxEngine
from llmo.engines.paged.engine import PagedEngine
from llmo.errors import BusyError, GateRefused, InputError, ModelError
from llmo.serve import encoder
from llmo.serve.loaded import LoadedAdapters
from llmo.tasks.card import read_card, read_golden, write_golden
from support.headed import further_model, topics
from support.serving import CPU, deploy, served_model, with_evidence
from support.tiny_chat import tiny_adapter, tiny_chat_model


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[PagedEngine]:
    made = PagedEngine()
    made.load(tiny_chat_model(tmp_path / "base"), CPU, GenerationOptions(cache_bytes=1 << 20, streams=2))
    yield made
    made.close()


def test_an_engine_that_takes_none_names_those_that_do() -> None:
    with pytest.raises(ModelError, match="llamacpp engine takes no adapters") as caught:
        LoadedAdapters(LlamaCppEngine()).need("somewhere")
    assert "torch" in caught.value.hint
    with pytest.raises(ModelError, match="onnx engine takes no adapters") as caught:
        LoadedAdapters(OnnxEngine(), "llmo.engines").need("somewhere")
    assert caught.value.hint.endswith(": torch")


def test_what_is_idle_is_given_back_and_loaded_again_when_asked_for(engine: PagedEngine, tmp_path: Path) -> None:
    one, other = (str(tiny_adapter(tmp_path / str(i), i)) for i in range(2))
    adapters = LoadedAdapters(engine, idle_seconds=0.0)
    for folder in (one, one, other):
        adapters.need(folder)
    adapters.busy = lambda: nullcontext({one})
    adapters.look()
    assert len(adapters) == 1
    engine.add(Prompt(0, [3, 4], adapter=one))
    with pytest.raises(InputError, match="unknown adapter"):
        engine.add(Prompt(1, [3, 4], adapter=other))
    adapters.need(other)
    engine.add(Prompt(1, [3, 4], adapter=other))


def test_what_cannot_be_loaded_is_not_kept(engine: PagedEngine, tmp_path: Path) -> None:
    adapters = LoadedAdapters(engine)
    for _ in range(2):
        with pytest.raises(ModelError, match="adapter_config"):
            adapters.need(str(tmp_path / "nothing"))
    assert len(adapters) == 0


def test_what_was_not_asked_for_the_longest_makes_room(tmp_path: Path) -> None:
    base = tiny_chat_model(tmp_path / "base")
    one, two, three = (str(tiny_adapter(tmp_path / str(i), i)) for i in range(3))
    with closing(NativeEngine()) as engine:
        engine.load(base, CPU, GenerationOptions(cache_bytes=1 << 20, adapter_bytes=25_000))  # one takes 10,688
        adapters = LoadedAdapters(engine)
        for folder in (one, two, one, three):
            adapters.need(folder)
        assert [adapters.at_hand(folder) for folder in (one, two, three)] == [True, False, True]
        adapters.busy = lambda: nullcontext({one, three})
        with pytest.raises(BusyError, match="all of those are being asked") as caught:
            adapters.need(two)
        assert caught.value.extra["retry_after"] > 0
        assert "adapters_mib" in caught.value.hint
        adapters.busy = lambda: nullcontext({three})
        adapters.need(two)
        assert [adapters.at_hand(folder) for folder in (one, two, three)] == [False, True, True]


def test_what_is_larger_than_all_the_room_is_refused_and_takes_none(tmp_path: Path) -> None:
    base = tiny_chat_model(tmp_path / "base")
    small, large = str(tiny_adapter(tmp_path / "small")), str(tiny_adapter(tmp_path / "large", rank=32))
    with closing(NativeEngine()) as engine:
        engine.load(base, CPU, GenerationOptions(cache_bytes=1 << 20, adapter_bytes=15_000))
        adapters = LoadedAdapters(engine)
        adapters.need(small)
        for _ in range(2):
            with pytest.raises(ModelError, match=r"the adapter alone needs .* set aside"):
                adapters.need(large)
        assert adapters.at_hand(small)


def test_where_streams_still_hold_all_of_it_the_next_is_told_to_come_back(tmp_path: Path) -> None:
    base = tiny_chat_model(tmp_path / "base")
    one, two = (str(tiny_adapter(tmp_path / str(i), i)) for i in range(2))
    with closing(NativeEngine()) as engine:
        engine.load(base, CPU, GenerationOptions(cache_bytes=1 << 20, adapter_bytes=15_000))
        adapters = LoadedAdapters(engine)
        adapters.need(one)
        engine.add(Prompt(0, [3, 4], adapter=one))
        with pytest.raises(BusyError):  # its call is over, and the engine has not heard of it yet
            adapters.need(two)
        engine.cancel(0)
        adapters.need(two)


def test_what_an_open_call_asks_for_is_not_dropped(engine: PagedEngine, tmp_path: Path) -> None:
    one = str(tiny_adapter(tmp_path / "one"))
    adapters = LoadedAdapters(engine)
    adapters.need(one)
    adapters.busy = lambda: nullcontext({one})
    adapters.drop(one)
    assert adapters.at_hand(one)
    adapters.busy = lambda: nullcontext(())
    adapters.drop(one)
    assert not adapters.at_hand(one)


def test_a_model_that_does_not_repeat_its_answers_is_not_kept(tmp_path: Path) -> None:
    base = served_model(tmp_path / "base")
    good, bad = (with_evidence(further_model(tmp_path / name, base, topics(3))) for name in ("good", "bad"))
    write_golden(bad, [g | {"logits": [-x for x in g["logits"]]} for g in read_golden(bad)])
    pipeline = encoder.make(base, read_card(base), deploy(), CPU)
    pipeline.start()
    try:
        pipeline.load_adapter(str(good))
        with pytest.raises(GateRefused, match="golden answers"):
            pipeline.load_adapter(str(bad))
        assert len(pipeline._adapters) == 1
    finally:
        pipeline.close()
