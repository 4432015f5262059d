"""Brings a database to the schema of this code; costs one small query when it already is there."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy import Connection, inspect
from sqlalchemy.exc import OperationalError

from llmo.errors import StorageError
from llmo.store.db import Database
from llmo.store.lock import file_lock

# Every revision this code can read, oldest first. Kept here because asking Alembic costs its import.
REVISIONS = ("0001", "0002", "0003")
HEAD = REVISIONS[-1]


def migrate(database: Database, home: Path) -> None:
    """Create or upgrade the tables. Processes that open the same home together wait for the first.

    Raises StorageError when the database was written by a newer LLMO.
    """
    if _at_head(database):
        return
    with file_lock(home / "migrate.lock"):
        if not _at_head(database):
            _upgrade(database)


def _at_head(database: Database) -> bool:
    with database.read() as connection:
        found = _revision(connection)
    if found is not None and found not in REVISIONS:
        raise StorageError(
            f"{database.where} was written by a newer LLMO (its schema is '{found}', this one reads '{HEAD}')",
            hint="upgrade llmo-os, or set LLMO_HOME to another folder",
        )
    return found == HEAD


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    row = connection.exec_driver_sql("SELECT version_num FROM alembic_version").first()
    return None if row is None else str(row[0])


def _upgrade(database: Database) -> None:
    from alembic import command  # 0.1 s, and only for a new or an old home
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with database.translated(), database.engine.connect() as connection:
        if database.sqlite:
            _outside_transaction(connection, "PRAGMA journal_mode = WAL")
            # Altering a table in SQLite means dropping it, which would delete what refers to it.
            _outside_transaction(connection, "PRAGMA foreign_keys = OFF")
        connection.execution_options(llmo_write=True)
        with connection.begin():
            config.attributes["connection"] = connection
            command.upgrade(config, HEAD)
        connection.invalidate()


def _outside_transaction(connection: Connection, statement: str) -> None:
    driver = connection.connection.dbapi_connection
    if driver is not None:
        try:
            driver.cursor().execute(statement)
        except sqlite3.Error as error:  # past SQLAlchemy, which would have wrapped it
            raise OperationalError(statement, None, error) from error
