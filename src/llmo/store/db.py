"""The database: one engine, read and write transactions, and the only place that knows SQLite from PostgreSQL."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from llmo.errors import EnvironmentProblem, InputError, LLMOError, SpecError, StorageError
from llmo.types import to_json

BUSY_SECONDS = 30


class Database:
    """A pool of connections to `url`; safe to use from many threads."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.sqlite = url.get_backend_name() == "sqlite"
        self.where = str(url.database) if self.sqlite else url.render_as_string(hide_password=True)
        try:
            self.engine: Engine = create_engine(
                url, json_serializer=dump_json, pool_size=8, max_overflow=32, pool_timeout=BUSY_SECONDS
            )
        except (ImportError, NoSuchModuleError) as error:
            raise EnvironmentProblem(
                f"the database {self.where} needs a driver that is not installed: {error}",
                hint="install it (for PostgreSQL: pip install 'psycopg[binary]'), or unset LLMO_DATABASE",
            ) from error
        self._writers = threading.Lock() if self.sqlite else nullcontext()
        if self.sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one snapshot and writes nothing."""
        with self.translated(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is durable once the block is left; an exception undoes all of it.

        Raises IntegrityError for a broken constraint; every other refusal becomes a StorageError.
        """
        # SQLite's own waiting polls and is unfair, so threads of one process queue here instead.
        with self._writers, self.translated(), self.engine.connect() as connection:
            connection.execution_options(llmo_write=True)
            with connection.begin():
                yield connection

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what the database and its driver refuse into errors that say what to do."""
        try:
            yield
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise _explain(error, self.where) from error
        except PoolTimeout as error:
            raise _busy(self.where) from error
        except UnicodeEncodeError as error:
            raise InputError(
                "a text holds half of a surrogate pair, which no valid text does",
                hint="decode the text as UTF-8 with errors='replace' before sending it",
            ) from error
        except OverflowError as error:
            raise InputError("a number is too large: whole numbers have at most 63 bits") from error

    def close(self) -> None:
        self.engine.dispose()


def url_of(home: Path, url: str | None) -> URL:
    """The database's URL: the one given, else the SQLite file in `home`."""
    if url is None:
        return URL.create("sqlite", database=str(home / "llmo.db"))
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise SpecError(
            "this is not a database URL", where="LLMO_DATABASE", hint="write it like postgresql+psycopg://user@host/db"
        ) from error
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise SpecError(
            "the database must be a file: several processes share it",
            where="LLMO_DATABASE",
            hint="write it like sqlite:////absolute/path/llmo.db, or unset it",
        )
    return parsed


def dump_json(value: Any) -> str:
    """Valid JSON of any record; a number that JSON has no word for (nan, inf) is kept as text."""
    plain = to_json(value)
    try:
        return json.dumps(plain, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(plain), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own BEGIN comes too late (before the first write) to be IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    # In WAL mode NORMAL loses acknowledged rows in a power cut.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later could not wait for another writer: it would fail at once.
    write = connection.get_execution_options().get("llmo_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _busy(where: str) -> StorageError:
    return StorageError(
        f"the database {where} was busy for {BUSY_SECONDS} seconds",
        hint="another process holds it: wait for it, or see `llmo ps` and `llmo doctor`",
    )


def _explain(error: DBAPIError, where: str) -> LLMOError:
    if isinstance(error, DataError):
        return InputError(f"a value is larger than the database takes: {error.orig}")
    name = str(getattr(error.orig, "sqlite_errorname", ""))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return _busy(where)
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return StorageError(
            f"the disk that holds {where} is full or refuses writing ({error.orig})",
            hint="free some space, or set LLMO_HOME to a folder on another disk; nothing was lost, run it again",
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
        return StorageError(
            f"no permission to write {where} ({error.orig})",
            hint="make the folder and the files in it writable, or set LLMO_HOME to one that is",
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StorageError(
            f"{where} is damaged or is not a database ({error.orig})",
            hint="put back a copy of the file, or move it away to start with an empty store",
        )
    return StorageError(f"the database {where} refused: {error.orig}", hint="see `llmo doctor`")
