"""Endpoints: public names, each with one pointer to the service job behind it."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from llmo.errors import NotFoundError, nearest
from llmo.store.db import Database
from llmo.store.schema import adapters, jobs
from llmo.store.schema import endpoints as table
from llmo.types import Endpoint

_List = list[Endpoint]
_SHOWN = select(table, jobs.c.spec.label("deploy"), jobs.c.waiting).outerjoin(jobs, jobs.c.id == table.c.job)
_CHANGEABLE = {c.name for c in table.columns} - {"name", "created_at"}


class Endpoints:
    """The gateway reads this table; the scheduler writes it, and whoever asks an endpoint that is asleep says so."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def set(
        self,
        name: str,
        *,
        job: int | None,
        model: str,
        model_ref: str = "",
        state: str = "starting",
        task: str = "",
        engine: str = "",
        precision: str = "",
        address: str | None = None,
    ) -> Endpoint:
        """Create the endpoint, or replace all of it but the time it was made."""
        values = {
            "job": job,
            "model": model,
            "model_ref": model_ref,
            "state": state,
            "task": task,
            "engine": engine,
            "precision": precision,
            "address": address,
        }
        try:
            return self._put(name, values)
        except IntegrityError:
            # Another process made it between our update and our insert (PostgreSQL): now the update finds it.
            return self._put(name, values)

    def _put(self, name: str, values: dict[str, Any]) -> Endpoint:
        with self._db.write() as connection:
            if connection.execute(update(table).where(table.c.name == name).values(**values)).rowcount == 0:
                connection.execute(insert(table).values(name=name, created_at=time.time(), **values))
            return _one(connection, name)

    def get(self, name: str) -> Endpoint:
        """Raises NotFoundError."""
        with self._db.read() as connection:
            return _one(connection, name)

    def list(self) -> _List:
        """All endpoints by name."""
        with self._db.read() as connection:
            return [_decode(row) for row in connection.execute(_SHOWN.order_by(table.c.name)).mappings()]

    def point(self, name: str, job: int | None, **changes: Any) -> Endpoint:
        """Move the endpoint to another job, and set its other fields with it, in one transaction.

        Raises NotFoundError.
        """
        unknown = set(changes) - _CHANGEABLE
        if unknown:
            raise TypeError(f"not fields of an endpoint that can change: {', '.join(sorted(unknown))}")
        with self._db.write() as connection:
            connection.execute(update(table).where(table.c.name == name).values(job=job, **changes))
            return _one(connection, name)

    def want(self, name: str) -> None:
        """An endpoint that is asleep is to wake, because somebody asks it."""
        here = (table.c.name == name, table.c.state == "asleep")
        with self._db.write() as connection:
            connection.execute(update(table).where(*here).values(state="waking"))

    def remove(self, name: str) -> None:
        """With its adapters. Raises NotFoundError."""
        with self._db.write() as connection:
            _one(connection, name)
            connection.execute(delete(adapters).where(adapters.c.endpoint == name))
            connection.execute(delete(table).where(table.c.name == name))


def _one(connection: Connection, name: str) -> Endpoint:
    row = connection.execute(_SHOWN.where(table.c.name == name)).mappings().one_or_none()
    if row is None:
        known = list(connection.execute(select(table.c.name).order_by(table.c.name)).scalars())
        hint = f"known: {', '.join(known[:10])}" if known else "deploy a model first: `llmo deploy MODEL`"
        raise NotFoundError(f"no endpoint '{name}'{nearest(name, known)}", hint=hint)
    return _decode(row)


def _decode(row: RowMapping) -> Endpoint:
    return Endpoint(**{**row, "deploy": row["deploy"] or {}, "waiting": row["waiting"] or ""})
