"""Events: appended lines of jobs, together with how far each job's own file has been read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, insert, select, update

from llmo.errors import NotFoundError
from llmo.store.db import Database
from llmo.store.jobs import descendants
from llmo.store.schema import events as table
from llmo.store.schema import jobs, tails
from llmo.types import Event


class Events:
    """Numbers grow in the order of writing, so a reader goes on after the last one it saw."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def append(
        self, job: int, attempt: int, events: Sequence[tuple[float, str, Mapping[str, Any]]], offset: int
    ) -> list[Event]:
        """Add `(at, kind, data)` lines and remember that the job's file was read up to byte `offset`.

        One transaction, so no line is lost or doubled by a crash. An `offset` behind the remembered one means
        that these lines are in already: nothing is added. The remembered offset itself adds lines that
        come from elsewhere than the file.
        """
        with self._db.write() as connection:
            if connection.execute(select(jobs.c.id).where(jobs.c.id == job)).first() is None:
                raise NotFoundError(f"no job {job}", hint="see `llmo ps`")
            known = _offset(connection, job, attempt)
            if known is not None and offset < known:
                return []
            _remember(connection, job, attempt, known, offset)
            if not events:
                return []
            rows = [
                {"job": job, "attempt": attempt, "at": at, "kind": kind, "data": dict(data)}
                for at, kind, data in events
            ]
            added = insert(table).returning(table, sort_by_parameter_order=True)
            return [_decode(row) for row in connection.execute(added, rows).mappings()]

    def offset(self, job: int, attempt: int) -> int:
        """The byte up to which the attempt's file has been read."""
        with self._db.read() as connection:
            return _offset(connection, job, attempt) or 0

    def after(
        self, id: int = 0, *, job: int | None = None, root: int | None = None, limit: int | None = 1000
    ) -> list[Event]:
        """Events newer than number `id`, oldest first: of one job, or of `root` and all jobs below it."""
        query = select(table).where(table.c.id > id).order_by(table.c.id).limit(limit)
        if job is not None:
            query = query.where(table.c.job == job)
        if root is not None:
            query = query.where(table.c.job.in_(select(descendants(root).c.id)))
        with self._db.read() as connection:
            return [_decode(row) for row in connection.execute(query).mappings()]

    def last(self, job: int, kind: str) -> Event | None:
        """The newest event of that kind of a job."""
        query = select(table).where(table.c.job == job, table.c.kind == kind).order_by(table.c.id.desc()).limit(1)
        with self._db.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else _decode(row)


def _offset(connection: Connection, job: int, attempt: int) -> int | None:
    query = select(tails.c.offset).where(tails.c.job == job, tails.c.attempt == attempt)
    return connection.execute(query).scalar_one_or_none()


def _remember(connection: Connection, job: int, attempt: int, known: int | None, offset: int) -> None:
    if known is None:
        connection.execute(insert(tails).values(job=job, attempt=attempt, offset=offset))
    elif known != offset:
        here = (tails.c.job == job, tails.c.attempt == attempt)
        connection.execute(update(tails).where(*here).values(offset=offset))


def _decode(row: RowMapping) -> Event:
    # SQLite hands back a whole float as an integer in RETURNING.
    return Event(**{**row, "at": float(row["at"])})
