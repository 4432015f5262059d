"""The job table: what a job is, and that its state only moves as it may."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmo.errors import ConflictError, InputError, NotFoundError
from llmo.types import JobState, Kind, Needs, Placement, Reason

GRANT = Placement(2, 1 << 30, ("cuda:0",))


def test_a_new_job_waits_in_its_first_attempt(new_job, store) -> None:
    job = new_job(name="n", spec={"a": 1}, inputs={"data": "sha256:1"}, needs=Needs(cores=3, cores_max=4), owner="me")
    assert (job.state, job.attempt, job.root, job.reason) == (JobState.QUEUED, 1, job.id, None)
    assert job.needs == Needs(cores=3, cores_max=4)
    assert store.jobs.get(job.id) == job


def test_a_job_can_be_born_done(new_job, store) -> None:
    job = new_job(state=JobState.DONE, reason=Reason.CACHED, result={"f1": 0.5}, cache_key="k")
    assert (job.state, job.reason, job.result) == (JobState.DONE, Reason.CACHED, {"f1": 0.5})
    assert job.ended_at == job.created_at
    assert store.jobs.find_done("k") == job


def test_children_share_the_root_and_are_made_once(new_job, store) -> None:
    parent = new_job()
    child = new_job(parent=parent.id, child_key="data", op="import")
    grandchild = new_job(parent=child.id, child_key="x")
    assert (child.root, grandchild.root) == (parent.id, parent.id)
    assert new_job(parent=parent.id, child_key="data", op="other") == child
    assert [j.id for j in store.jobs.list(root=parent.id)] == [grandchild.id, child.id, parent.id]
    assert [j.id for j in store.jobs.list(parent=parent.id)] == [child.id]


def test_jobs_without_a_key_are_never_taken_for_each_other(new_job) -> None:
    parent = new_job()
    assert len({parent.id, new_job().id, new_job(parent=parent.id).id, new_job(parent=parent.id).id}) == 4


@pytest.mark.parametrize("id", [0, -1, 12345])
def test_a_job_that_is_not_there(store, id) -> None:
    with pytest.raises(NotFoundError):
        store.jobs.get(id)
    with pytest.raises(NotFoundError):
        store.jobs.request_stop(id)


def test_a_parent_that_is_not_there(new_job, store) -> None:
    with pytest.raises(NotFoundError):
        new_job(parent=77, child_key="a")
    assert store.jobs.list() == []


def test_numbers_beyond_the_database_are_an_input_error(store) -> None:
    with pytest.raises(InputError):
        store.jobs.get(10**30)


def test_half_a_surrogate_pair_is_an_input_error_and_stores_nothing(new_job, store) -> None:
    with pytest.raises(InputError, match="surrogate"):
        new_job(name="\ud800")
    assert store.jobs.list() == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_any_json_comes_back_as_it_went_in(store, spec) -> None:
    if store._db.sqlite or "\\u0000" not in repr(spec):
        job = store.jobs.insert(op="x", spec=spec, inputs={}, needs=Needs())
        kept = store.jobs.get(job.id).spec
        assert kept == _as_json(spec)


def _as_json(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _as_json(v) for k, v in value.items()}
    return [_as_json(v) for v in value] if isinstance(value, list) else value


def test_a_number_that_json_has_no_word_for_is_kept_as_text(new_job) -> None:
    assert new_job(spec={"loss": [math.nan, math.inf, 1.0]}).spec == {"loss": ["nan", "inf", 1.0]}


def test_filters_add_up(new_job, store) -> None:
    a, b, c = new_job(op="a"), new_job(op="b", service=True), new_job(op="a", state=JobState.DONE)

    def ids(**filters):
        return [j.id for j in store.jobs.list(**filters)]

    assert ids() == [c.id, b.id, a.id]
    assert ids(newest_first=False, limit=2) == [a.id, b.id]
    assert ids(op="a", states=[JobState.QUEUED]) == [a.id]
    assert ids(service=True) == [b.id]
    assert ids(states=[]) == []
    assert ids(states={JobState.DONE, JobState.QUEUED}, service=False, limit=None) == [c.id, a.id]


def test_only_the_first_claim_wins(new_job, store) -> None:
    job = new_job()
    assert store.jobs.claim(job.id, 1, "a", GRANT)
    assert not store.jobs.claim(job.id, 1, "b", GRANT)
    claimed = store.jobs.get(job.id)
    assert (claimed.state, claimed.placement, store.jobs.lease(job.id)) == (JobState.STARTING, GRANT, "a")
    assert claimed.started_at is not None


def test_a_claim_of_another_attempt_or_of_a_stopping_job_fails(new_job, store) -> None:
    job = new_job()
    assert not store.jobs.claim(job.id, 2, "a", GRANT)
    store.jobs.update(job.id, 1, stop_requested=True)
    assert not store.jobs.claim(job.id, 1, "a", GRANT)
    assert store.jobs.get(job.id).state is JobState.QUEUED


def test_update_sets_fields_of_its_own_attempt_only(new_job, store) -> None:
    job = new_job()
    assert store.jobs.update(job.id, 1, state=JobState.RUNNING, pid=7, pid_started=1.5, address="unix:/x")
    assert not store.jobs.update(job.id, 2, pid=8)
    got = store.jobs.get(job.id)
    assert (got.state, got.pid, got.pid_started, got.address) == (JobState.RUNNING, 7, 1.5, "unix:/x")


def test_an_ending_is_dated_and_final(new_job, store) -> None:
    job = new_job()
    store.jobs.waiting(job.id, "for a core")
    assert store.jobs.update(job.id, 1, state=JobState.FAILED, reason=Reason.ERROR, error={"code": "x", "what": "y"})
    ended = store.jobs.get(job.id)
    assert ended.ended_at is not None
    assert ended.waiting == ""
    assert ended.error == {"code": "x", "what": "y"}
    for state in JobState:
        assert not store.jobs.update(job.id, 1, state=state)
    assert store.jobs.update(job.id, 1, result={"late": 1})
    assert store.jobs.get(job.id).state is JobState.FAILED


@pytest.mark.parametrize("field", ["id", "attempt", "parent", "root", "child_key", "colour"])
def test_update_refuses_what_is_not_a_changeable_field(new_job, store, field) -> None:
    with pytest.raises(TypeError, match=field):
        store.jobs.update(new_job().id, 1, **{field: 1})


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.FAILED, JobState.STOPPED])
def test_a_retry_starts_clean_in_the_next_attempt(new_job, store, state) -> None:
    job = new_job(spec={"a": 1})
    store.jobs.claim(job.id, 1, "L", GRANT)
    store.jobs.update(job.id, 1, state=state, pid=5, error={"code": "e"}, result={"r": 1}, output="sha256:0")
    again = store.jobs.retry(job.id, 1, Reason.LOST)
    assert again == job.evolve(attempt=2, reason=Reason.LOST)
    assert store.jobs.lease(job.id) is None
    assert not store.jobs.update(job.id, 1, state=JobState.DONE)
    assert store.jobs.claim(job.id, 2, "M", GRANT)


def test_retry_is_guarded(new_job, store) -> None:
    job = new_job()
    store.jobs.retry(job.id, 1, Reason.LOST)
    with pytest.raises(ConflictError):
        store.jobs.retry(job.id, 1, Reason.LOST)
    store.jobs.update(job.id, 2, state=JobState.DONE)
    with pytest.raises(ConflictError, match="done"):
        store.jobs.retry(job.id, 2, Reason.LOST)
    assert store.jobs.get(job.id).attempt == 2


def test_a_lost_job_that_was_asked_to_stop_is_stopped_not_retried(new_job, store) -> None:
    job = new_job()
    store.jobs.claim(job.id, 1, "L", GRANT)
    store.jobs.request_stop(job.id)
    stopped = store.jobs.retry(job.id, 1, Reason.LOST)
    assert (stopped.state, stopped.reason, stopped.attempt) == (JobState.STOPPED, Reason.USER, 1)
    again = store.jobs.retry(job.id, 1, Reason.USER)
    assert (again.state, again.attempt, again.stop_requested) == (JobState.QUEUED, 2, False)


def test_a_stop_reaches_all_below_but_services(new_job, store) -> None:
    root = new_job()
    running = new_job(parent=root.id, child_key="running")
    store.jobs.claim(running.id, 1, "L", GRANT)
    queued = new_job(parent=running.id, child_key="queued")
    done = new_job(parent=root.id, child_key="done", state=JobState.DONE)
    below_done = new_job(parent=done.id, child_key="below")
    service = new_job(parent=root.id, child_key="service", service=True)
    below_service = new_job(parent=service.id, child_key="below")
    other = new_job()
    store.jobs.request_stop(root.id)
    got = {j.id: (j.state, j.stop_requested) for j in store.jobs.list()}
    for job in (root, queued, below_done):
        assert got[job.id] == (JobState.STOPPED, True)
        assert store.jobs.get(job.id).reason is Reason.USER
        assert store.jobs.get(job.id).ended_at is not None
    assert got[running.id] == (JobState.STARTING, True)
    assert got[done.id] == (JobState.DONE, False)
    for job in (service, below_service, other):
        assert got[job.id] == (JobState.QUEUED, False)


def test_a_service_can_be_stopped_itself(new_job, store) -> None:
    service = new_job(service=True)
    store.jobs.request_stop(service.id)
    assert store.jobs.get(service.id).state is JobState.STOPPED


def test_a_child_on_its_way_is_born_stopped(new_job, store) -> None:
    parent = new_job()
    store.jobs.claim(parent.id, 1, "L", GRANT)
    store.jobs.request_stop(parent.id)
    child = new_job(parent=parent.id, child_key="late")
    assert (child.state, child.reason, child.stop_requested) == (JobState.STOPPED, Reason.USER, True)
    assert new_job(parent=parent.id, child_key="service", service=True).state is JobState.QUEUED


def test_waiting_says_why_while_queued(new_job, store) -> None:
    job = new_job()
    store.jobs.waiting(job.id, "needs 4 cores, 2 are free")
    assert store.jobs.get(job.id).waiting == "needs 4 cores, 2 are free"
    store.jobs.claim(job.id, 1, "L", GRANT)
    store.jobs.waiting(job.id, "too late")
    assert store.jobs.get(job.id).waiting == ""


def test_find_done_takes_the_newest_whose_output_is_there(new_job, store, folder) -> None:
    kept = store.catalog.publish(Kind.MODEL, "a", folder("a", f="1"), {}, job=None, inputs={})
    lost = store.catalog.publish(Kind.MODEL, "b", folder("b", f="2"), {}, job=None, inputs={})
    first = new_job(cache_key="k", state=JobState.DONE, output=kept.digest)
    second = new_job(cache_key="k", state=JobState.DONE, output=lost.digest)
    new_job(cache_key="k", state=JobState.FAILED)
    new_job(cache_key="other", state=JobState.DONE)
    assert store.jobs.find_done("k") == second
    (store.catalog.path(lost.digest) / "f").unlink()
    assert store.jobs.find_done("k") == first
    assert store.jobs.find_done("nothing") is None


def test_find_active_takes_what_is_still_on_its_way(new_job, store) -> None:
    new_job(cache_key="k", state=JobState.DONE)
    assert store.jobs.find_active("k") is None
    active = new_job(cache_key="k")
    new_job(cache_key="k")
    assert store.jobs.find_active("k") == active
    store.jobs.update(active.id, 1, stop_requested=True)
    assert store.jobs.find_active("k") != active


def test_processes_that_insert_the_same_children_make_each_once(new_job, store, home, actors) -> None:
    parent = new_job()
    keys = [f"k{n}" for n in range(20)]
    orders = [keys, keys[::-1], keys, keys[::-1]]
    answers = actors.together(*[("insert", str(home), parent.id, order) for order in orders])
    made = {job.child_key: job.id for job in store.jobs.list(parent=parent.id, limit=None)}
    assert sorted(made) == sorted(keys)
    for order, answer in zip(orders, answers, strict=True):
        assert answer == [made[key] for key in order]


def test_of_processes_that_claim_the_same_jobs_exactly_one_wins_each(new_job, store, home, actors) -> None:
    jobs = [new_job().id for _ in range(20)]
    leases = ["a", "b", "c", "d"]
    answers = actors.together(*[("claim", str(home), jobs, lease) for lease in leases])
    for place, job in enumerate(jobs):
        winners = [lease for lease, answer in zip(leases, answers, strict=True) if answer[place]]
        assert winners == [store.jobs.lease(job)]


def test_many_threads_write_through_one_store(new_job, store) -> None:
    jobs = [new_job().id for _ in range(10)]
    wins: list[int] = []

    def work(name: str) -> None:
        wins.extend(job for job in jobs if store.jobs.claim(job, 1, name, GRANT))

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == jobs
