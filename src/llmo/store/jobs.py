"""The job table: every change of a job's state is a compare-and-swap on its attempt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlalchemy import CTE, Connection, RowMapping, Select, and_, insert, select, update
from sqlalchemy.exc import IntegrityError

from llmo.errors import ConflictError, NotFoundError
from llmo.store.db import Database
from llmo.store.schema import jobs as table
from llmo.types import Job, JobState, Needs, Placement, Reason, from_json, to_json

_ENDED = [s.value for s in JobState if s.ended]
_FIXED = {"id", "attempt", "parent", "root", "child_key", "created_at"}
_CHANGEABLE = {c.name for c in table.columns} - _FIXED
_List = list[Job]  # inside the class, `list` is the method


class Jobs:
    """`has_artifact(digest)` says whether an output's bytes are still on disk."""

    def __init__(self, database: Database, has_artifact: Callable[[str], bool]) -> None:
        self._db = database
        self._has_artifact = has_artifact

    def insert(
        self,
        *,
        op: str,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str],
        needs: Needs,
        name: str = "",
        parent: int | None = None,
        root: int | None = None,
        child_key: str | None = None,
        cache_key: str | None = None,
        service: bool = False,
        max_attempts: int = 3,
        owner: str = "",
        state: JobState = JobState.QUEUED,
        reason: Reason | None = None,
        output: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> Job:
        """Add a job; a second one with the same parent and child key is the first one, unchanged.

        `root` defaults to the parent's root, else to the job itself. A child of a job that was asked to stop is
        born stopped (services excepted), so that a stop reaches children that were on their way.
        """
        now = time.time()
        values: dict[str, Any] = {
            "op": op,
            "name": name,
            "spec": spec,
            "inputs": inputs,
            "needs": needs,
            "parent": parent,
            "root": root,
            "child_key": child_key,
            "cache_key": cache_key,
            "service": service,
            "max_attempts": max_attempts,
            "owner": owner,
            "state": state,
            "reason": reason,
            "output": output,
            "result": result,
            "attempt": 1,
            "waiting": "",
            "stop_requested": False,
            "created_at": now,
            "ended_at": now if state.ended else None,
        }
        try:
            with self._db.write() as connection:
                return self._insert(connection, values)
        except IntegrityError:
            # Only where transactions run side by side (PostgreSQL): another process put the same child in first.
            with self._db.read() as connection:
                existing = _child(connection, parent, child_key)
            if existing is None:
                raise
            return existing

    def _insert(self, connection: Connection, values: dict[str, Any]) -> Job:
        existing = _child(connection, values["parent"], values["child_key"])
        if existing is not None:
            return existing
        if values["parent"] is not None:
            parent = _one(connection, values["parent"])
            values["root"] = values["root"] or parent.root
            if parent.stop_requested and not values["service"] and not values["state"].ended:
                values |= _stopped(values["created_at"])
        new = connection.execute(insert(table).values(**_encode(values)).returning(table.c.id)).scalar_one()
        if values["root"] is None:
            connection.execute(update(table).where(table.c.id == new).values(root=new))
        return _one(connection, new)

    def get(self, id: int) -> Job:
        """Raises NotFoundError."""
        with self._db.read() as connection:
            return _one(connection, id)

    def list(
        self,
        *,
        states: Iterable[JobState] | None = None,
        parent: int | None = None,
        root: int | None = None,
        op: str | None = None,
        service: bool | None = None,
        limit: int | None = 100,
        newest_first: bool = True,
    ) -> _List:
        """Jobs that match every filter given; `limit=None` for all of them."""
        query = select(table).order_by(table.c.id.desc() if newest_first else table.c.id)
        if states is not None:
            query = query.where(table.c.state.in_([JobState(s).value for s in states]))
        wanted = {"parent": parent, "root": root, "op": op, "service": service}
        for column, value in wanted.items():
            if value is not None:
                query = query.where(table.c[column] == value)
        return self._all(query.limit(limit))

    def find_done(self, cache_key: str) -> Job | None:
        """The newest done job with that key whose output (if it has one) is still on disk."""
        query = select(table).where(table.c.cache_key == cache_key, table.c.state == JobState.DONE.value)
        found = self._all(query.order_by(table.c.id.desc()))
        return next((job for job in found if job.output is None or self._has_artifact(job.output)), None)

    def find_active(self, cache_key: str) -> Job | None:
        """The oldest job with that key that has not ended and was not asked to stop."""
        query = select(table).where(
            table.c.cache_key == cache_key, table.c.state.not_in(_ENDED), table.c.stop_requested.is_(False)
        )
        return next(iter(self._all(query.order_by(table.c.id).limit(1))), None)

    def find_broken_off(self, cache_key: str) -> _List:
        """Jobs with that key that ended without a result, newest first: one may have left a checkpoint."""
        ended = table.c.state.in_([JobState.FAILED.value, JobState.STOPPED.value])
        query = select(table).where(table.c.cache_key == cache_key, ended)
        return self._all(query.order_by(table.c.id.desc()).limit(20))

    def claim(self, id: int, attempt: int, lease: str, placement: Placement) -> bool:
        """Queued -> starting under `lease`, for exactly one of all who try; False for the others."""
        guard = and_(table.c.state == JobState.QUEUED.value, table.c.stop_requested.is_(False))
        changes = {
            "state": JobState.STARTING,
            "lease": lease,
            "placement": placement,
            "waiting": "",
            "started_at": time.time(),
        }
        return self._swap(id, attempt, changes, guard)

    def update(self, id: int, attempt: int, **changes: Any) -> bool:
        """Set fields of Job; False when the attempt moved on, or when the state of an ended job would change.

        An ending without `ended_at` gets the present time.
        """
        unknown = set(changes) - _CHANGEABLE
        if unknown:
            raise TypeError(f"not fields of a job that can change: {', '.join(sorted(unknown))}")
        if "state" not in changes:
            return self._swap(id, attempt, changes)
        if JobState(changes["state"]).ended:
            changes = {"ended_at": time.time(), "waiting": "", **changes}
        return self._swap(id, attempt, changes, table.c.state.not_in(_ENDED))

    def retry(self, id: int, attempt: int, why: Reason) -> Job:
        """The next attempt, queued. A running job that was asked to stop is stopped instead.

        Raises ConflictError when the attempt moved on or the job is done.
        """
        with self._db.write() as connection:
            job = _one(connection, id)
            if job.stop_requested and not job.state.ended:
                changes = _stopped(time.time())
            else:
                changes = _NEXT_ATTEMPT | {"attempt": attempt + 1, "reason": why}
            here = and_(table.c.id == id, table.c.attempt == attempt, table.c.state == job.state.value)
            moved = job.state is JobState.DONE or (
                connection.execute(update(table).where(here).values(**_encode(changes))).rowcount == 0
            )
            if moved:
                raise ConflictError(
                    f"job {id} cannot be tried again: it is {job.state.value} in attempt {job.attempt}",
                    hint="see `llmo ps`, or submit it as a new job",
                )
            return _one(connection, id)

    def request_stop(self, id: int) -> None:
        """Ask a job and all below it to stop; queued ones stop at once.

        Services below it, and what those started, stay: they outlive the job that deployed them.
        """
        with self._db.write() as connection:
            _one(connection, id)
            below = select(descendants(id, services=False).c.id)
            here = and_(table.c.id.in_(below), table.c.state.not_in(_ENDED))
            connection.execute(update(table).where(here).values(stop_requested=True))
            queued = and_(here, table.c.state == JobState.QUEUED.value)
            connection.execute(update(table).where(queued).values(**_encode(_stopped(time.time()))))

    def waiting(self, id: int, why: str) -> None:
        """Say why a queued job waits; writes only when that changed."""
        here = and_(table.c.id == id, table.c.state == JobState.QUEUED.value, table.c.waiting != why)
        with self._db.write() as connection:
            connection.execute(update(table).where(here).values(waiting=why))

    def lease(self, id: int) -> str | None:
        """Who claimed the job, as told to `claim`; None while it waits."""
        with self._db.read() as connection:
            return connection.execute(select(table.c.lease).where(table.c.id == id)).scalar_one_or_none()

    def _swap(self, id: int, attempt: int, changes: Mapping[str, Any], guard: Any = None) -> bool:
        here = [table.c.id == id, table.c.attempt == attempt]
        if guard is not None:
            here.append(guard)
        with self._db.write() as connection:
            return connection.execute(update(table).where(*here).values(**_encode(changes))).rowcount == 1

    def _all(self, query: Select[Any]) -> _List:
        with self._db.read() as connection:
            return [_decode(row) for row in connection.execute(query).mappings()]


_NEXT_ATTEMPT: dict[str, Any] = {
    "state": JobState.QUEUED,
    "error": None,
    "waiting": "",
    "stop_requested": False,
    "placement": None,
    "lease": None,
    "pid": None,
    "pid_started": None,
    "address": None,
    "output": None,
    "result": None,
    "started_at": None,
    "ended_at": None,
}


def descendants(id: int, *, services: bool = True) -> CTE:
    """A table of one column `id`: the job and all below it, without services and what they started if so asked."""
    below = select(table.c.id).where(table.c.id == id).cte("below", recursive=True)
    children = select(table.c.id).join(below, table.c.parent == below.c.id)
    if not services:
        children = children.where(table.c.service.is_(False))
    return below.union(children)


def _stopped(now: float) -> dict[str, Any]:
    return {
        "state": JobState.STOPPED,
        "reason": Reason.USER,
        "stop_requested": True,
        "waiting": "",
        "ended_at": now,
    }


def _one(connection: Connection, id: int) -> Job:
    row = connection.execute(select(table).where(table.c.id == id)).mappings().one_or_none()
    if row is None:
        raise NotFoundError(f"no job {id}", hint="see `llmo ps`")
    return _decode(row)


def _child(connection: Connection, parent: int | None, key: str | None) -> Job | None:
    if parent is None or key is None:
        return None
    query = select(table).where(table.c.parent == parent, table.c.child_key == key)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else _decode(row)


def _encode(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: to_json(value) for name, value in values.items()}


def _decode(row: RowMapping) -> Job:
    values = dict(row)
    values.pop("lease")
    placement, reason = values.pop("placement"), values.pop("reason")
    return Job(
        **values
        | {
            "needs": from_json(Needs, values["needs"]),
            "state": JobState(values["state"]),
            "reason": None if reason is None else Reason(reason),
            "placement": None if placement is None else from_json(Placement, placement),
        }
    )
