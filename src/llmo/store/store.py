"""The store: one home folder with its database and bytes, opened once a process."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import Column, Connection, func, select

from llmo.files import make_home
from llmo.store.adapters import Adapters
from llmo.store.blobs import Blobs
from llmo.store.catalog import Catalog
from llmo.store.db import Database, url_of
from llmo.store.endpoints import Endpoints
from llmo.store.events import Events
from llmo.store.feedback import FeedbackLog
from llmo.store.jobs import Jobs
from llmo.store.keys import Keys
from llmo.store.migrate import migrate
from llmo.store.schema import artifacts, jobs, metadata


class Store:
    """Everything that lasts. Open it with `Store.open`; many threads and processes may."""

    def __init__(self, home: Path, database: Database) -> None:
        self.home = home
        self._db = database
        self.blobs = Blobs(home)
        self.jobs = Jobs(database, self.blobs.has)
        self.catalog = Catalog(database, self.blobs)
        self.events = Events(database)
        self.keys = Keys(database)
        self.endpoints = Endpoints(database)
        self.adapters = Adapters(database)
        self.feedback = FeedbackLog(database)

    @classmethod
    def open(cls, home: Path, url: str | None = None) -> Store:
        """Open the store in `home`, making or upgrading it when needed.

        `url` is an SQLAlchemy URL instead of the SQLite file in `home`. Raises StorageError when the folder
        cannot be written or the database is newer than this code.
        """
        home = home.absolute()
        make_home(home)
        database = Database(url_of(home, url))
        try:
            migrate(database, home)
            store = cls(home, database)
            store.blobs.prepare()
        except BaseException:
            database.close()
            raise
        return store

    def usage(self) -> dict[str, Any]:
        """How much is stored: bytes of the database and blobs, rows by table, jobs by state, artifacts by kind."""
        with self._db.read() as connection:
            rows = {
                table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
                for table in metadata.sorted_tables
            }
            by_state = _count_by(connection, jobs.c.state)
            by_kind = _count_by(connection, artifacts.c.kind)
        files = [p for p in self.home.glob("llmo.db*") if p.is_file()]
        return {
            "database": self._db.where,
            "database_bytes": sum(p.stat().st_size for p in files),
            **self.blobs.usage(),
            "rows": rows,
            "jobs": by_state,
            "artifacts": by_kind,
        }

    def close(self) -> None:
        """Give back the connections; what was written is already durable."""
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _count_by(connection: Connection, column: Column[str]) -> dict[str, int]:
    query = select(column, func.count()).group_by(column)
    return {str(value): int(count) for value, count in connection.execute(query)}
