"""A replica's adapters: what an engine cannot take is refused by name, and what nobody asks for is given back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmo.engines.generation import GenerationOptions, Prompt
from llmo.engines.llamacpp.engine import LlamaCppEngine
from llmo.engines.onnx import OnnxEngine
from llmo.engines.paged.engine import PagedEngine
from llmo.errors import InputError, ModelError
from llmo.serve.loaded import LoadedAdapters
from llmo.types import Device
from support.tiny_chat import tiny_adapter, tiny_chat_model


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[PagedEngine]:
    made = PagedEngine()
    device = Device("cpu", "cpu", memory=0, free=0, cores=1)
    made.load(tiny_chat_model(tmp_path / "base"), device, GenerationOptions(cache_bytes=1 << 20, streams=2))
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
    adapters.give_back({one})
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
