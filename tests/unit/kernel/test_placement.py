"""Properties of placement: nothing is given twice, and what fits in less fits in more."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.errors import NeedsError
from llmo.kernel.placement import Running, Wait, place, refuse
from llmo.types import Device, Needs, Placement

GIB = 1 << 30

needs = st.builds(
    Needs,
    cores=st.integers(0, 10),
    cores_max=st.none() | st.integers(0, 10),
    memory=st.integers(0, 10),
    gpus=st.integers(0, 3),
)
gpus = st.lists(st.booleans(), max_size=4)


def machine(cores: int, memory: int, usable: list[bool]) -> list[Device]:
    cards = [Device(f"cuda:{n}", "cuda", GIB, GIB, 0, usable=ok, reason="") for n, ok in enumerate(usable)]
    return [Device("cpu", "cpu", memory, memory, cores), *cards]


machines = st.builds(machine, st.integers(1, 10), st.integers(1, 10), gpus)


def fill(devices: list[Device], asked: list[tuple[Needs, bool]]) -> list[Running]:
    """The ledger after placing one after another."""
    running: list[Running] = []
    for number, (wanted, service) in enumerate(asked):
        granted = place(devices, running, wanted, service)
        if isinstance(granted, Placement):
            running.append((wanted, granted, f"job {number}"))
    return running


@given(machines, st.lists(st.tuples(needs, st.booleans()), max_size=12))
def test_nothing_is_given_twice(devices: list[Device], asked: list[tuple[Needs, bool]]) -> None:
    running = fill(devices, asked)
    assert sum(p.cores for _, p, _ in running) <= devices[0].cores
    assert sum(p.memory for _, p, _ in running) <= devices[0].memory
    cards = [name for _, p, _ in running for name in p.gpus]
    assert len(cards) == len(set(cards))
    assert set(cards) <= {d.name for d in devices if d.usable}


@given(machines, st.lists(st.tuples(needs, st.booleans()), max_size=8), needs, st.booleans())
def test_a_grant_is_what_was_asked_for(
    devices: list[Device], asked: list[tuple[Needs, bool]], wanted: Needs, service: bool
) -> None:
    running = fill(devices, asked)
    granted = place(devices, running, wanted, service)
    assert granted == place(devices, running, wanted, service)
    if isinstance(granted, Wait):
        assert granted.reason
        return
    assert len(granted.gpus) == wanted.gpus
    if wanted.cores == 0 and wanted.gpus == 0:
        assert granted.cores == 0
        return
    assert granted.memory == wanted.memory
    assert granted.cores >= wanted.cores
    if wanted.cores_max is not None:
        assert granted.cores <= max(wanted.cores, wanted.cores_max)
    elif service:
        assert granted.cores <= max(wanted.cores, (devices[0].cores + 1) // 2)


@given(machines, st.lists(st.tuples(needs, st.booleans()), min_size=1, max_size=8), needs, st.booleans(), st.data())
def test_what_fits_fits_when_another_has_left(
    devices: list[Device], asked: list[tuple[Needs, bool]], wanted: Needs, service: bool, data: st.DataObject
) -> None:
    running = fill(devices, asked)
    if running and isinstance(place(devices, running, wanted, service), Placement):
        left = list(running)
        left.pop(data.draw(st.integers(0, len(running) - 1)))
        assert isinstance(place(devices, left, wanted, service), Placement)


@given(machines, needs, st.booleans())
def test_refused_is_what_does_not_fit_on_the_empty_machine(devices: list[Device], wanted: Needs, service: bool) -> None:
    fits = isinstance(place(devices, [], wanted, service), Placement)
    with nullcontext() if fits else pytest.raises(NeedsError, match="this machine"):
        refuse(devices, wanted)


TWO = machine(2, 4 * GIB, [])


@pytest.mark.parametrize(
    ("wanted", "granted", "sentence"),
    [
        (
            Needs(cores=2),
            Placement(1, GIB),
            "needs 2 cores, 1 is free; endpoint newsdesk (job 7) holds 1",
        ),
        (
            Needs(memory=2 * GIB),
            Placement(1, 3 * GIB),
            "needs 2.0 GiB of memory, 1.0 GiB is free; endpoint newsdesk (job 7) holds 3.0 GiB",
        ),
        (
            Needs(cores=2, memory=2 * GIB),
            Placement(2, 4 * GIB - (512 << 20)),
            "needs 2 cores, 0 are free; endpoint newsdesk (job 7) holds 2, and "
            "needs 2.0 GiB of memory, 512 MiB is free; endpoint newsdesk (job 7) holds 3.5 GiB",
        ),
    ],
)
def test_a_wait_names_who_holds_what(wanted: Needs, granted: Placement, sentence: str) -> None:
    answer = place(TWO, [(Needs(), granted, "endpoint newsdesk (job 7)")], wanted, False)
    assert answer == Wait(sentence)


def test_many_holders_are_summed_up() -> None:
    running = [(Needs(), Placement(1, 0), f"job {n}") for n in range(5)]
    answer = place(machine(5, GIB, []), running, Needs(memory=0), False)
    assert answer == Wait(
        "needs 1 core, 0 are free; job 0 holds 1, job 1 holds 1, job 2 holds 1, and 2 more hold the rest"
    )


def test_training_can_start_beside_an_endpoint() -> None:
    endpoint = place(TWO, [], Needs(memory=GIB), True)
    assert endpoint == Placement(1, GIB)
    assert place(TWO, [(Needs(), Placement(1, GIB), "endpoint")], Needs(memory=GIB), False) == Placement(1, GIB)


def test_a_refusal_says_what_is_needed_and_what_is_there() -> None:
    with pytest.raises(NeedsError, match="needs 3 cores; this machine has 2"):
        refuse(TWO, Needs(cores=3))
    with pytest.raises(NeedsError, match=r"needs 5.0 GiB of memory; LLMO may use 4.0 GiB"):
        refuse(TWO, Needs(memory=5 * GIB))
    card = replace(machine(1, GIB, [False])[1], reason="no NVIDIA driver")
    with pytest.raises(NeedsError, match=r"needs 1 GPU; this machine has 0 \(cuda:0: no NVIDIA driver\)"):
        refuse([*TWO, card], Needs(gpus=1))


def test_a_machine_that_shrank_has_nothing_free() -> None:
    running = [(Needs(), Placement(4, 8 * GIB), "job 1")]
    assert isinstance(place(TWO, running, Needs(), False), Wait)
    assert place(TWO, running, Needs(cores=0, memory=GIB), False) == Placement(0, 0)
