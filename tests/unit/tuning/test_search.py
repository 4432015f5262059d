"""A search is a function of its specification and of what its trials came to, and of nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from llmo.errors import JobFailed
from llmo.specs import TrainSpec
from llmo.tuning.search import Trial
from llmo.types import JobState, Reason, Result
from support.searching import STEPS, done, drive, failed, learnt, made, quality, story


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"sampler": "random"},
        {"sampler": "grid"},
        {"sampler": "nsga2"},
        {"pruner": "hyperband"},
        {"folds": 3},
        {"objectives": ["quality", "seconds"]},
    ],
    ids=str,
)
def test_the_order_in_which_trials_end_changes_nothing(keys: dict[str, Any]) -> None:
    first, *others = (story(drive(made(trials=14, width=3, **keys), seed=seed)) for seed in range(3))
    assert all(other == first for other in others)


def test_the_usual_settings_come_first_and_nothing_is_tried_twice() -> None:
    search = drive(
        made(trials=30, sampler="random", space={"batch_size": [4, 8, 16], "last_n": [1, 2]}), lambda t, p: done(0.5)
    )
    assert (search.trials[0].settings, search.trials[0].origin) == ({"batch_size": 16, "last_n": 2}, "usual")
    tried = [tuple(trial.settings.values()) for trial in search.trials]
    assert len(tried) == len(set(tried)) == 6, "all that there is, and no more"


def test_neighbours_in_a_list_of_growing_numbers_are_known_as_such() -> None:
    rates = [10.0 ** (exponent / 4) for exponent in range(-28, 0)]
    mixed = [rates[(5 * place) % 28] for place in range(28)]

    def best(values: list[float], seed: int) -> float:
        found = drive(made(trials=12, pruner="none", seed=seed, space={"learning_rate": values, "batch_size": [8]}))
        return quality(found.best())

    ordered, others = (sum(best(values, seed) for seed in range(16)) / 16 for values in (rates, mixed))
    assert ordered > others + 0.002


def test_a_grid_is_gone_through_to_its_end() -> None:
    search = drive(made(trials=100, sampler="grid", pruner="none"))
    assert {t.settings["learning_rate"] for t in search.trials} == {1e-6, 1e-4, 1e-2}
    assert len(search.trials) == len(search.done) == 12


def test_tpe_finds_what_random_draws_miss() -> None:
    best = {
        kind: [quality(drive(made(trials=24, sampler=kind, seed=s)).best()) for s in range(5)]
        for kind in ("tpe", "random")
    }
    assert sum(best["tpe"]) > sum(best["random"])
    assert min(best["tpe"]) > 0.88


def test_pruning_saves_steps_and_keeps_the_best() -> None:
    long = TrainSpec(epochs=9.0)  # of which both rungs are past half an epoch
    whole, pruned = (drive(made(trials=24, pruner=kind, train=long)) for kind in ("none", "asha"))
    spent = [sum(t.figure("steps") or 0 for t in search.trials) for search in (whole, pruned)]
    assert spent[0] == 24 * STEPS
    assert spent[1] < 0.6 * spent[0]
    assert quality(pruned.best()) > quality(whole.best()) - 0.005


def test_the_first_fold_decides_whether_the_others_are_trained() -> None:
    asked: list[tuple[int, int]] = []

    def outcome(trial: Trial, part: int) -> Result:
        asked.append((trial.number, part))
        return learnt(trial, part)

    search = drive(made(trials=12, folds=3), outcome)
    for trial in search.trials:
        parts = [part for number, part in asked if number == trial.number]
        assert parts[0] == 0
        assert sorted(parts) == ([0, 1, 2] if trial.state == "done" else [0])
    best = search.best()
    assert best.value == pytest.approx(quality(best) - 0.001)
    assert best.spread == pytest.approx(0.000816, abs=1e-5)
    assert best.figure("steps") == 3 * STEPS
    assert {trial.state for trial in search.trials} == {"done", "pruned"}


def test_a_trial_without_memory_is_pruned_and_one_that_fails_is_shown() -> None:
    def outcome(trial: Trial, part: int) -> Result:
        if trial.settings["batch_size"] == 32:
            return failed("the job ran out of memory", Reason.OUT_OF_MEMORY)
        if trial.settings["batch_size"] == 16:
            return failed("needs 90 GiB of memory", code="needs")
        return failed("the loss became NaN") if trial.settings["learning_rate"] > 3e-3 else learnt(trial, part)

    search = drive(made(trials=20, sampler="random"), outcome)
    states = {trial.number: (trial.state, trial.reason) for trial in search.trials}
    assert ("pruned", "out of memory") in states.values()
    assert ("pruned", "needs 90 GiB of memory") in states.values()
    assert ("failed", "the loss became NaN") in states.values()
    assert len(search.trials) == 20, "the search went on"
    assert search.best().settings["batch_size"] < 16


def test_a_fold_that_goes_wrong_dooms_its_trial_whichever_comes_first() -> None:
    stopped = Result(JobState.STOPPED, 1, False, None, None, {}, None, Reason.USER)
    came = {0: done(0.9), 1: stopped, 2: failed("no room", Reason.OUT_OF_MEMORY)}
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        trial = Trial(0, {}, "drawn", [], 3)
        for part in order:
            assert trial.state == "running"
            trial.hear(part, came[part])
        assert (trial.state, trial.reason, trial.value, trial.doomed) == ("pruned", "out of memory", None, True)


def test_when_all_fail_alike_the_search_ends_with_the_first_reason() -> None:
    search = drive(made(trials=20, width=1), lambda t, p: failed("the labels are missing"))
    assert len(search.trials) <= 4
    with pytest.raises(JobFailed, match=r"no trial came to an end, \d of \d failed: the labels are missing") as raised:
        search.best()
    assert raised.value.hint == "lower it"


def test_trials_that_fail_for_different_reasons_are_all_tried() -> None:
    search = drive(made(trials=9), lambda t, p: failed(f"reason {t.number}"))
    assert len(search.trials) == 9


def test_what_is_stopped_counts_as_nothing() -> None:
    stopped = Result(JobState.STOPPED, 1, False, None, None, {}, None, Reason.USER)
    search = drive(made(trials=4), lambda t, p: stopped)
    assert {trial.state for trial in search.trials} == {"stopped"}
    with pytest.raises(JobFailed, match="no trial ended within the budget"):
        search.best()


def test_the_front_holds_what_nothing_beats() -> None:
    def outcome(trial: Trial, part: int) -> Result:
        batch = trial.settings["batch_size"]
        return done({4: 0.9, 8: 0.8, 16: 0.85, 32: 0.7}[batch], seconds={4: 40.0, 8: 10.0, 16: 20.0, 32: 30.0}[batch])

    search = drive(made(trials=9, space={"batch_size": [4, 8, 16, 32]}, objectives=["quality", "seconds"]), outcome)
    assert [trial.settings["batch_size"] for trial in search.front()] == [4, 16, 8]
    assert search.best().settings["batch_size"] == 4
