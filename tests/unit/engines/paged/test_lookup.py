"""Prompt lookup: what is guessed, when a guess is worth its row, and that answers are the same bits without."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from llmo import plugins
from llmo.engines.generation import Delta, GenerationOptions, Grammar, Prompt, Sampling
from llmo.engines.paged.batching import Batching
from llmo.engines.paged.lookup import MOST, Costs, Lookup, worth
from support.places import ON_GPU, place
from support.tiny_chat import tiny_chat_model

DRIVERS = ("torch-fp32", "torch-bf16", "torch-int8", "native-fp32", "native-int8", "openvino-fp32", "openvino-int8")
if ON_GPU:
    DRIVERS = tuple(name for name in DRIVERS if name.startswith("torch"))  # the other has no GPU
LOOP = [7, 8, 9, 10, 11] * 8
GREEDY = Sampling(max_tokens=90, temperature=0.0, ignore_end=True, logprobs=3)
SAMPLINGS = (
    GREEDY,
    replace(GREEDY, temperature=0.4, seed=5),
    replace(GREEDY, temperature=0.5, seed=6, top_p=0.9, top_k=40, min_p=0.01),
    replace(GREEDY, repetition_penalty=1.02),
    replace(GREEDY, temperature=0.3, seed=7, frequency_penalty=0.05, presence_penalty=0.1),
    replace(GREEDY, max_tokens=41),
    replace(GREEDY, temperature=0.2, seed=-1),
    replace(GREEDY, logprobs=0),
    replace(GREEDY, logprobs=None),
    replace(GREEDY, logprobs=None, temperature=0.4, seed=5, top_p=0.9),
)


class Free(Costs):
    """A machine on which rows cost nothing: all that can be guessed is computed, right or wrong."""

    row = 0.0  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def repeating_model(folder: Path) -> Path:
    """Mostly its answers go round in tens of tokens, and now and then they leave the round for another."""
    tiny_chat_model(folder, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= np.float32(0.035)
    embeddings = weights["model.embed_tokens.weight"]
    following = [token // 10 * 10 + (token + 1) % 10 if token < 250 else token for token in range(len(embeddings))]
    weights["lm_head.weight"] = np.empty_like(embeddings)
    weights["lm_head.weight"][following] = embeddings
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in DRIVERS:
        engine, precision = name.split("-")
        made[name] = repeating_model(tmp_path_factory.mktemp("models") / name)
        if engine == "openvino":
            from llmo.compression.openvino_graph import write

            write(made[name], made[name], "int8" if precision == "int8" else "fp32")
    return made


def loaded(name: str, folder: Path, *, lookup: bool = True, **options: Any) -> Batching:
    kind, precision = name.split("-")
    engine: Batching = plugins.load("llmo.generators", kind)()
    settings = {"streams": 8, "cache_bytes": 4 << 20, "chunk": 64, "precision": precision, "lookup": lookup, **options}
    engine.load(folder, place(2), GenerationOptions(**settings))
    if lookup:
        engine._costs = Free()
    return engine


@pytest.fixture(params=DRIVERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(name: str, folders: dict[str, Path]) -> Iterator[tuple[Batching, Batching]]:
    """The same engine with and without."""
    made = loaded(name, folders[name]), loaded(name, folders[name], lookup=False)
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def plain(folders: dict[str, Path]) -> Iterator[tuple[Batching, Batching]]:
    name = "torch-fp32"
    made = loaded(name, folders[name]), loaded(name, folders[name], lookup=False)
    yield made
    for engine in made:
        engine.close()


def prompts(count: int = 8) -> list[list[int]]:
    """Some that repeat themselves, of other lengths, and one that does not."""
    rng = np.random.default_rng(3)
    return [rng.integers(3, 259, 50).tolist(), *([*LOOP[i:], 3 + i, 7, 8, 9] for i in range(count - 1))]


def ask(engine: Batching, asked: Mapping[int, Prompt]) -> dict[int, list[Delta]]:
    for prompt in asked.values():
        engine.add(prompt)
    found: dict[int, list[Delta]] = {id: [] for id in asked}
    while deltas := engine.step():
        for delta in deltas:
            if delta.tokens or delta.finish is not None:
                found[delta.id].append(delta)
    assert engine.failed() == []
    return found


def bits(deltas: Sequence[Delta]) -> tuple[list[int], list[Any], str | None, int]:
    """All that must be the same, however it was cut into deltas."""
    return (
        [token for delta in deltas for token in delta.tokens],
        [logprob for delta in deltas for logprob in delta.logprobs],
        deltas[-1].finish,
        deltas[-1].cached,
    )


def both(engine: Batching) -> tuple[int, int]:
    stats = engine.stats()
    return stats["drafted"], stats["accepted"]


def test_answers_are_the_same_bits_alone_and_together(pair: tuple[Batching, Batching]) -> None:
    on, off = pair
    asked = {i: Prompt(i, ids, s) for i, (ids, s) in enumerate(zip(prompts(len(SAMPLINGS)), SAMPLINGS, strict=True))}
    alone = {i: bits(ask(off, {i: replace(prompt, tenant=f"{i}")})[i]) for i, prompt in asked.items()}
    guessed = {i: ask(on, {i: replace(prompt, tenant=f"{i}")})[i] for i, prompt in asked.items()}
    assert {i: bits(deltas) for i, deltas in guessed.items()} == alone
    together = ask(on, {i: replace(prompt, tenant=f"together {i}") for i, prompt in asked.items()})
    assert {i: bits(deltas) for i, deltas in together.items()} == alone
    drafted, accepted = both(on)
    assert 0 < accepted < drafted
    assert both(off) == (0, 0)
    assert max(len(delta.tokens) for deltas in guessed.values() for delta in deltas) > 4
    assert sum(len(deltas) for deltas in guessed.values()) < sum(len(found[0]) for found in alone.values())


def test_streams_that_give_way_answer_the_same(pair: tuple[Batching, Batching], name: str) -> None:
    on, off = pair
    asked = {i: Prompt(i, ids, replace(GREEDY, logprobs=None), tenant=str(i)) for i, ids in enumerate(prompts(4))}
    expected = {i: bits(deltas) for i, deltas in ask(off, asked).items()}
    stats = on.stats()
    blocks = 1 + stats["cache_tokens"] // on._blocks.size
    tight = loaded(name, on._folder, cache_bytes=(4 << 20) // blocks * (1 + 260 // on._blocks.size))
    assert {i: bits(deltas) for i, deltas in ask(tight, asked).items()} == expected
    assert tight.stats()["preempted"] > 0
    assert both(tight)[1] > 0
    assert tight.stats()["free_tokens"] == tight.stats()["cache_tokens"]
    tight.close()


def test_what_others_find_in_the_cache_holds_no_wrong_guess(pair: tuple[Batching, Batching]) -> None:
    on, off = pair
    first = Prompt(0, prompts()[2], GREEDY)
    answer, *_ = bits(ask(on, {0: first})[0])
    follow = Prompt(1, [*first.input_ids, *answer, 30, 31], GREEDY)
    found = bits(ask(on, {1: follow})[1])
    assert both(on)[1] > 0
    assert found[:3] == bits(ask(off, {1: follow})[1])[:3]
    shares_answers = on._scheduler._share_answers
    assert (found[3] > len(first.input_ids) + 2 * on._blocks.size) == shares_answers


def test_cancelled_streams_leave_nothing_and_disturb_nobody(pair: tuple[Batching, Batching]) -> None:
    on, off = pair
    free = on.stats()["free_tokens"]
    expected = bits(ask(off, {0: Prompt(0, prompts()[1], GREEDY)})[0])
    for i, ids in enumerate(prompts(6)):
        on.add(Prompt(10 + i, ids, GREEDY))
    on.add(Prompt(0, prompts()[1], GREEDY))
    found = []
    for i in range(6):
        found += on.step()
        on.cancel(10 + i)
    while deltas := on.step():
        found += deltas
    assert bits([delta for delta in found if delta.id == 0])[:3] == expected[:3]
    assert both(on)[1] > 0
    assert on.stats()["free_tokens"] == free


@pytest.mark.parametrize("most", range(1, 40, 3))
def test_no_answer_is_longer_than_it_may_be(plain: tuple[Batching, Batching], most: int) -> None:
    on, off = plain
    asked = {0: Prompt(0, LOOP, replace(GREEDY, max_tokens=most))}
    assert bits(ask(on, asked)[0]) == bits(ask(off, asked)[0])


def test_an_answer_ends_with_the_context(folders: dict[str, Path]) -> None:
    found = []
    for lookup in (True, False):
        engine = loaded("torch-fp32", folders["torch-fp32"], lookup=lookup, context=100)
        found.append(bits(ask(engine, {0: Prompt(0, LOOP, GREEDY)})[0]))
        assert (both(engine)[1] > 0) == lookup
        engine.close()
    assert found[0] == found[1]
    assert len(found[0][0]) == 60


@pytest.mark.parametrize("how", ["stop ids", "end token"])
def test_a_token_that_ends_the_answer_ends_it_among_guesses(how: str, plain: tuple[Batching, Batching]) -> None:
    """Every token of the answer in turn, so that some of them were guessed."""
    on, off = plain
    whole, *_ = bits(ask(off, {0: Prompt(0, LOOP, GREEDY)})[0])
    cut_short = 0
    for last in sorted(set(whole)):
        if how == "stop ids":
            sampling = replace(GREEDY, stop_ids=frozenset({last}))
        else:
            sampling = replace(GREEDY, ignore_end=False)
            on._ends = frozenset({last})
        deltas = ask(on, {0: Prompt(0, LOOP, sampling)})[0]
        tokens, logprobs, finish, _ = bits(deltas)
        assert (tokens, len(logprobs), finish) == (whole[: whole.index(last)], len(tokens), "stop")
        cut_short += len(deltas[-1].tokens) > 0
    assert cut_short > 0


def test_a_grammar_is_followed_without_guesses(plain: tuple[Batching, Batching]) -> None:
    on, off = plain
    sampling = replace(GREEDY, grammar=Grammar("regex", "(ab){30}!"))
    asked = {0: Prompt(0, LOOP, sampling), 1: Prompt(1, LOOP, GREEDY)}
    found = ask(on, asked)
    assert {i: bits(deltas) for i, deltas in found.items()} == {i: bits(d) for i, d in ask(off, asked).items()}
    assert max(len(delta.tokens) for delta in found[0]) == 1
    assert max(len(delta.tokens) for delta in found[1]) > 1


def test_the_engine_measures_by_itself(folders: dict[str, Path]) -> None:
    """Whatever it finds out about the costs, the answer is the same; where rows cost all, nothing is computed."""
    dear = Costs()
    for rows in range(1, 200):
        dear.saw(rows, rows * 1.0)
    found = []
    for costs in (Costs(), dear, None):
        engine = loaded("torch-fp32", folders["torch-fp32"])
        engine._costs = costs
        found.append(bits(ask(engine, {0: Prompt(0, LOOP, GREEDY)})[0]))
        if costs is not None:
            assert costs.of(1) > 0
        engine.close()
    assert found[0] == found[1] == found[2]


def test_guesses_are_what_followed_the_same_tokens_last() -> None:
    ids = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 1, 2]
    lookup = Lookup(ids)
    assert (lookup.chance, lookup.guesses(3)) == (0, [])
    ids.append(3)
    lookup.grew()
    assert lookup.guesses(4) == [6, 7, 8, 1]
    ids.append(6)
    lookup.grew()
    assert lookup.guesses(2) == [7, 8]
    ids.append(9)
    lookup.grew()
    assert lookup.chance == 0


def test_guesses_go_round_where_the_text_repeats_itself() -> None:
    assert Lookup([5, 1, 2, 1, 2, 1, 2]).guesses(5) == [1, 2, 1, 2, 1]
    assert Lookup([4, 4, 4, 4]).guesses(3) == [4, 4, 4]
    assert Lookup([4]).guesses(3) == Lookup([]).guesses(3) == []


def test_the_chance_follows_what_was_right_even_if_it_was_not_computed() -> None:
    rng = random.Random(1)
    source = [rng.randrange(1000) for _ in range(60)]
    ids = [*source, *source[:3]]
    lookup = Lookup(ids)
    chances = [lookup.chance]
    for token in source[3:40]:
        ids.append(token)
        lookup.grew()
        chances.append(lookup.chance)
    assert chances == sorted(chances)
    assert chances[-1] > 0.95
    for token in [token for i in range(12) for token in (*source[:3], 1000 + i)]:  # and each time another end
        ids.append(token)
        lookup.grew()
        chances.append(lookup.chance)
    assert 0 < chances[-2] < 0.1


def straight(base: float, row: float, steps: int = 200, seed: int = 2) -> Costs:
    """Costs of steps of one to nine rows that take `base + row * rows`, give or take a tenth."""
    rng, costs = random.Random(seed), Costs()
    for _ in range(steps):
        rows = rng.choice((1, 1, 1, 5, 9))
        costs.saw(rows, (base + row * rows) * rng.uniform(0.9, 1.1))
    return costs


def test_costs_are_measured() -> None:
    costs = straight(10, 1)
    assert costs.row == pytest.approx(1, rel=0.25)
    assert costs.of(1) == pytest.approx(11, rel=0.1)
    assert costs.of(9) == pytest.approx(19, rel=0.1)
    costs.saw(1, 500.0)  # something else ran
    assert costs.of(1) < 15


def test_a_slow_start_is_forgotten_at_once() -> None:
    costs = Costs()
    costs.saw(1, 100.0)
    costs.saw(1, 10.0)
    assert costs.of(1) == 10


def test_guesses_are_computed_where_they_pay() -> None:
    cheap, dear = straight(10, 0.2), straight(0.5, 10)
    assert worth([0.0, 0.0], 2, cheap) == [0, 0]
    assert worth([0.99], 1, cheap)[0] > 8
    assert 0 < worth([0.5], 1, cheap)[0] < 8
    assert worth([0.02], 1, cheap) == [0]
    assert worth([0.9], 1, dear) == [0]
    assert worth([0.99], 1, Costs()) == [0], "before anything was measured"
    few, many = worth([0.3, 0.95], 2, cheap)
    assert few < many <= MOST


def test_a_full_step_leaves_less_room_for_guesses() -> None:
    """Eight streams share what a step costs beside its rows, so that a row more is worth less."""
    costs = straight(10, 1.4)
    assert worth([0.6], 1, costs)[0] > 0
    assert worth([0.5] * 8, 8, costs) == [0] * 8
    assert worth([0.97] + [0.1] * 7, 8, costs) == [0] * 8, "one does not hold up seven"
    assert min(worth([0.97] * 8, 8, costs)) > 0
