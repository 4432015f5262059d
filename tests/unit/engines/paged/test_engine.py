"""What the torch engine promises beyond the conformance suite: preemption, threads, and one bad stream among good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmo.engines.generation import Delta, GenerationOptions, Grammar, Prompt, Sampling
from llmo.engines.paged.blocks import BLOCK
from llmo.engines.paged.engine import PagedEngine
from llmo.engines.paged.stream import Piece
from llmo.errors import InputError, ModelError
from support.places import place
from support.tiny_chat import tiny_chat_model

GREEDY = Sampling(max_tokens=40, temperature=0.0, ignore_end=True)
PRECISIONS = ("fp32", "bf16", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The number of threads is the process's own: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loaded(folder: Path, cores: int = 1, kind: type[PagedEngine] = PagedEngine, **options: Any) -> PagedEngine:
    engine = kind()
    settings = GenerationOptions(**{"cache_bytes": 4 << 20, "chunk": 64, "streams": 8, **options})
    engine.load(folder, place(cores), settings)
    return engine


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, 259, length).tolist() for length in lengths]


def answers(engine: PagedEngine, asked: Sequence[Sequence[int]], sampling: Sampling = GREEDY) -> list[list[int]]:
    for i, ids in enumerate(asked):
        engine.add(Prompt(i, ids, sampling, tenant=str(len(asked))))
    found: dict[int, list[int]] = {i: [] for i in range(len(asked))}
    while deltas := engine.step():
        for delta in deltas:
            found[delta.id] += delta.tokens
    return list(found.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_tokens=40, seed=3, ignore_end=True)], ids=["greedy", "seed"])
def test_a_stream_that_gave_way_answers_the_same(folder: Path, precision: str, sampling: Sampling) -> None:
    asked = prompts(60, 61, 62, 63)
    roomy = loaded(folder, precision=precision)
    size = (8 if precision == "fp32" else 4) << 10  # bytes of a block
    narrow = loaded(folder, precision=precision, cache_bytes=20 * size)
    expected = [answers(roomy, [ids], sampling)[0] for ids in asked]
    assert answers(narrow, asked, sampling) == expected
    assert narrow.stats()["preempted"] > 0
    assert narrow.stats()["free_tokens"] == narrow.stats()["cache_tokens"] == 19 * 16


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cores", [1, 2, 3, 5])
def test_company_changes_nothing_at_any_number_of_threads(folder: Path, precision: str, cores: int) -> None:
    engine = loaded(folder, cores, precision=precision)
    assert torch.get_num_threads() == cores
    asked = prompts(1, 2, 3, 17, 33, 64, 65, 130)
    alone = [answers(engine, [ids])[0] for ids in asked]
    assert answers(engine, asked) == alone


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_are_the_same_bits_in_any_company(folder: Path, precision: str) -> None:
    """Equal tokens could be luck; equal log-probabilities of every token, bit for bit, are not."""
    engine = loaded(folder, 2, precision=precision)
    asked = prompts(5, 20, 100, 63, 170, 400)
    sampling = Sampling(max_tokens=20, temperature=0.0, ignore_end=True, logprobs=20)

    def bits(batch: list[list[int]]) -> list[list[Any]]:
        for i, ids in enumerate(batch):
            engine.add(Prompt(i, ids, sampling, tenant=str(len(batch))))
        found: dict[int, list[Any]] = {i: [] for i in range(len(batch))}
        while deltas := engine.step():
            for delta in deltas:
                found[delta.id] += delta.logprobs
        return list(found.values())

    assert bits(asked) == [bits([ids])[0] for ids in asked]


class Faulty(PagedEngine):
    """Its arithmetic breaks for prompts of 13 tokens, in a way that is the stream's own or the step's."""

    whole_step = False

    def _compute(self, pieces: Sequence[Piece]) -> Any:
        rows = super()._compute(pieces)
        bad = [piece.stream.asked == 13 for piece in pieces if piece.last]
        if self.whole_step and any(bad):
            raise RuntimeError("out of memory")
        broken = np.full(self.vocabulary, np.nan, np.float32)
        return [broken if b else row for row, b in zip(rows, bad, strict=True)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_others_left_in_the_cache_is_never_read(folder: Path, precision: str) -> None:
    repeated = [9, 8, 7, 6, 5] * 9  # lookup guesses, and takes blocks ahead
    found = []
    for left in (0.0, np.nan):
        engine = loaded(folder, precision=precision)
        with torch.inference_mode():
            for slots in engine._cache._tokens:
                slots[BLOCK:].fill_(left)  # all but the scratch block
        found.append(answers(engine, [*prompts(5, 16, 37, 130), repeated]))
        assert engine.failed() == []
        engine.close()
    assert found[0] == found[1]
    assert all(len(tokens) == GREEDY.max_tokens for tokens in found[1])


def test_one_bad_stream_does_not_end_the_others(folder: Path) -> None:
    engine = loaded(folder, kind=Faulty)
    free = engine.stats()["free_tokens"]
    good = prompts(5, 30)
    expected = [answers(engine, [ids])[0] for ids in good]
    found = answers(engine, [good[0], prompts(13)[0], good[1]])
    assert found == [expected[0], [], expected[1]]
    (id, error), *rest = engine.failed()
    assert (id, rest, engine.failed()) == (1, [], [])
    assert isinstance(error, ModelError)
    assert engine.stats()["free_tokens"] == free


def test_a_step_that_cannot_be_computed_fails_its_streams_and_the_engine_goes_on(folder: Path) -> None:
    engine = loaded(folder, kind=Faulty, streams=2)
    engine.whole_step = True  # type: ignore[attr-defined]
    found = answers(engine, [*prompts(13, 5), *prompts(6, 7)])
    assert [len(tokens) for tokens in found] == [0, 0, 40, 40]
    assert sorted(id for id, _ in engine.failed()) == [0, 1]
    assert engine.stats()["free_tokens"] == engine.stats()["cache_tokens"]


def test_a_grammar_that_fails_on_the_way_fails_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar of which the lexer runs out of fuel only in the middle of an answer."""
    engine = loaded(folder)
    expected = answers(engine, prompts(9))
    engine.add(Prompt(0, prompts(9)[0], GREEDY))
    engine.add(Prompt(1, prompts(9)[0], Sampling(temperature=0.0, grammar=Grammar("regex", "[a-z]{20}"))))
    engine.step()
    constraint = engine._streams[1].constraint
    assert constraint is not None
    with pytest.raises(InputError):
        constraint.accept(0)  # it never allowed that: the matcher is in its error state from here on
    found: list[Delta] = []
    while deltas := engine.step():
        found += [delta for delta in deltas if delta.id == 0]
    assert [token for delta in found for token in delta.tokens] == expected[0][1:]
    ((id, error),) = engine.failed()
    assert id == 1
    assert isinstance(error, InputError)


def test_two_hundred_streams_cancelled_on_the_way_leave_nothing(folder: Path) -> None:
    engine = loaded(folder)
    free = engine.stats()["free_tokens"]
    asked = prompts(*(5 + i % 60 for i in range(200)))
    for i, ids in enumerate(asked):
        engine.add(Prompt(i, ids, GREEDY))
        engine.step()
        engine.cancel(i - 3)
    for i in range(200):
        engine.cancel(i)
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["free_tokens"]) == (0, 0, free)
    assert engine.step() == []


def test_the_cache_is_as_large_as_was_granted(folder: Path) -> None:
    for precision, bytes_a_token in (("fp32", 512), ("bf16", 256), ("int8", 256)):
        stats = loaded(folder, precision=precision, cache_bytes=1 << 20).stats()
        assert stats["cache_tokens"] == (1 << 20) // bytes_a_token - 16


def test_a_small_cache_shortens_the_context_and_says_so(folder: Path) -> None:
    engine = loaded(folder, cache_bytes=8 << 13)
    assert engine.context == 7 * 16
    with pytest.raises(InputError, match="112"):
        engine.add(Prompt(0, [3] * 112))
    assert len(answers(engine, [[3] * 100], Sampling(max_tokens=100, temperature=0.0, ignore_end=True))[0]) == 12
