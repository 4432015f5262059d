"""Adapters by endpoint and name: what each endpoint answers with beside its own model, whatever replica runs."""

from __future__ import annotations

import time

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from llmo.errors import ConflictError, NotFoundError, nearest
from llmo.store.db import Database
from llmo.store.schema import adapters as table
from llmo.types import Adapter

_List = list[Adapter]


class Adapters:
    """The gateway reads this table; the verbs of `System` write it."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def add(self, endpoint: str, name: str, *, model: str, model_ref: str, base: str) -> Adapter:
        """Raises ConflictError for a name that the endpoint has already."""
        made = Adapter(endpoint, name, model, model_ref, base, time.time())
        try:
            with self._db.write() as connection:
                connection.execute(
                    insert(table).values(
                        endpoint=endpoint,
                        name=name,
                        model=model,
                        model_ref=model_ref,
                        base=base,
                        created_at=made.created_at,
                    )
                )
        except IntegrityError:
            raise taken(endpoint, name) from None
        return made

    def remove(self, endpoint: str, name: str) -> None:
        """Raises NotFoundError."""
        with self._db.write() as connection:
            gone = delete(table).where(table.c.endpoint == endpoint, table.c.name == name)
            if connection.execute(gone).rowcount:
                return
        known = [adapter.name for adapter in self.list(endpoint)]
        raise NotFoundError(
            f"the endpoint '{endpoint}' has no adapter '{name}'{nearest(name, known)}",
            hint=f"see: llmo adapters {endpoint}",
        )

    def list(self, endpoint: str | None = None) -> _List:
        """Those of one endpoint, or all, by name."""
        query = select(table).order_by(table.c.endpoint, table.c.name)
        if endpoint is not None:
            query = query.where(table.c.endpoint == endpoint)
        with self._db.read() as connection:
            return [Adapter(**row) for row in connection.execute(query).mappings()]


def taken(endpoint: str, name: str) -> ConflictError:
    return ConflictError(
        f"the endpoint '{endpoint}' has an adapter '{name}' already",
        hint=f"take another name, or first: llmo adapters {endpoint} --remove {name}",
    )
