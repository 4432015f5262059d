"""Events: in order, once each, with the tail that makes it so."""

from __future__ import annotations

import pytest

from llmo.errors import NotFoundError
from llmo.types import Event

LINES = [(1.0, "progress", {"step": 1, "loss": 0.5}), (2.0, "note", {"text": "häuser 🏠"})]


def test_events_come_back_as_they_were_appended(new_job, store) -> None:
    job = new_job()
    added = store.events.append(job.id, 1, LINES, 100)
    assert added == store.events.after(0)
    assert [(e.at, e.kind, e.data) for e in added] == LINES
    assert all(isinstance(e, Event) and isinstance(e.at, float) for e in added)
    assert store.events.offset(job.id, 1) == 100


def test_each_attempt_has_its_own_offset(new_job, store) -> None:
    job = new_job()
    store.events.append(job.id, 1, LINES, 100)
    assert store.events.offset(job.id, 2) == 0
    store.events.append(job.id, 2, LINES, 40)
    assert (store.events.offset(job.id, 1), store.events.offset(job.id, 2)) == (100, 40)


def test_lines_read_twice_are_added_once(new_job, store) -> None:
    job = new_job()
    store.events.append(job.id, 1, LINES, 100)
    store.events.append(job.id, 1, LINES, 200)
    assert store.events.append(job.id, 1, LINES, 100) == []
    assert len(store.events.after()) == 4
    assert store.events.offset(job.id, 1) == 200


def test_lines_from_elsewhere_keep_the_offset(new_job, store) -> None:
    job = new_job()
    store.events.append(job.id, 1, LINES, 100)
    [added] = store.events.append(job.id, 1, [(3.0, "state", {"state": "done"})], store.events.offset(job.id, 1))
    assert added.kind == "state"
    assert store.events.offset(job.id, 1) == 100


def test_an_append_that_fails_moves_nothing(new_job, store) -> None:
    job = new_job()
    with pytest.raises(Exception, match="not JSON serializable"):
        store.events.append(job.id, 1, [*LINES, (3.0, "note", {"x": object()})], 100)
    assert store.events.after() == []
    assert store.events.offset(job.id, 1) == 0


def test_reading_goes_on_where_it_was(new_job, store) -> None:
    job, other = new_job(), new_job()
    first = store.events.append(job.id, 1, LINES, 1)
    store.events.append(other.id, 1, LINES, 1)
    second = store.events.append(job.id, 1, LINES, 2)
    assert store.events.after(job=job.id) == first + second
    assert store.events.after(first[-1].id, job=job.id) == second
    assert store.events.after(first[0].id, job=job.id, limit=1) == first[1:]
    assert len(store.events.after(limit=None)) == 6


def test_a_root_brings_the_events_of_all_below_it(new_job, store) -> None:
    root = new_job()
    child = new_job(parent=root.id, child_key="a")
    grandchild = new_job(parent=child.id, child_key="a", service=True)
    other = new_job()
    for job in (root, child, grandchild, other):
        store.events.append(job.id, 1, LINES[:1], 1)
    assert [e.job for e in store.events.after(root=root.id)] == [root.id, child.id, grandchild.id]
    assert [e.job for e in store.events.after(root=child.id)] == [child.id, grandchild.id]


def test_an_unknown_job_has_no_events(store) -> None:
    with pytest.raises(NotFoundError):
        store.events.append(5, 1, LINES, 1)
    assert store.events.offset(5, 1) == 0
    assert store.events.after(job=5) == []


def test_a_diverged_loss_is_still_an_event(new_job, store) -> None:
    [event] = store.events.append(new_job().id, 1, [(1.0, "progress", {"loss": float("nan")})], 1)
    assert event.data == {"loss": "nan"}
