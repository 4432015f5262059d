"""The catalog: immutable, numbered versions of data sets, models and reports, and what each was made from."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, func, insert, select
from sqlalchemy.exc import IntegrityError

from llmo.errors import InputError, NotFoundError, nearest
from llmo.store.blobs import Blobs
from llmo.store.db import Database
from llmo.store.schema import artifacts as table
from llmo.store.schema import jobs
from llmo.types import Artifact, Kind, to_json

_NAME = re.compile(r"\w[\w.-]{0,99}")
_DIGEST = re.compile(r"(sha256:)?([0-9a-f]{12,64})")
_SHORTEST = 12
_TRIES = 5
_WORDS = {Kind.DATASET: "data set", Kind.MODEL: "model", Kind.REPORT: "report"}
_List = list[Artifact]


class Catalog:
    """Rows name content; the bytes are in `Blobs`."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._db = database
        self._blobs = blobs

    def publish(
        self,
        kind: Kind,
        name: str,
        folder: Path,
        card: Mapping[str, Any],
        *,
        job: int | None,
        inputs: Mapping[str, str],
    ) -> Artifact:
        """Move a folder's files into the store as the next version of `name`.

        The same content under the same name is the version it already is. The folder itself and its manifest
        stay, so that publishing can be repeated until the caller has written down that it is done.
        """
        if not folder.is_dir():
            raise NotFoundError(f"there is no folder {folder} to publish")
        name = _valid(name)
        digest, size = self._blobs.publish(folder)
        return self._register(
            Artifact(
                kind=Kind(kind),
                name=name,
                version=0,
                digest=digest,
                size=size,
                card=card,
                job=job,
                created_at=time.time(),
                inputs=inputs,
            )
        )

    def also(self, digest: str, name: str, *, job: int | None = None) -> Artifact:
        """The same content as the next version of another name; the versions it has stay. Raises NotFoundError."""
        known = self.find(digest)
        if known is None:
            raise NotFoundError(f"nothing is stored under {digest}")
        return self._register(dataclasses.replace(known, name=_valid(name), job=job, created_at=time.time()))

    def get(self, ref: str, kind: Kind | None = None) -> Artifact:
        """What `name`, `name@3`, `model:name@3`, `sha256:...` or at least 12 hex digits of it refer to.

        A name alone is its newest version. Raises NotFoundError with the nearest names or the versions there
        are, and InputError when several kinds or contents fit.
        """
        prefix, _, rest = ref.partition(":")
        if prefix in list(Kind):
            kind, ref = Kind(prefix), rest
        name, _, version = ref.partition("@")
        with self._db.read() as connection:
            found = _rows(connection, _of_kind(kind).where(table.c.name == name))
            if found:
                return _only(_pick_version(found, name, version), ref)
            if digest := _DIGEST.fullmatch(ref.lower()):
                pattern = f"sha256:{digest[2]}%"
                found = _rows(connection, _of_kind(kind).where(table.c.digest.like(pattern)))
                if found:
                    return _only({a.digest: a for a in reversed(found)}.values(), ref)
            raise _unknown(connection, ref, kind)

    def find(self, digest: str) -> Artifact | None:
        """The first version with that content, whatever its name."""
        with self._db.read() as connection:
            return next(iter(_rows(connection, select(table).where(table.c.digest == digest).limit(1))), None)

    def list(self, kind: Kind | None = None, name: str | None = None) -> _List:
        """Every version, newest first."""
        query = _of_kind(kind)
        if name is not None:
            query = query.where(table.c.name == name)
        with self._db.read() as connection:
            return _rows(connection, query)[::-1]

    def path(self, digest: str) -> Path:
        """The read-only folder with the content. Raises StorageError when bytes are missing."""
        return self._blobs.path(digest)

    def check(self, digest: str) -> None:
        """Read and hash every byte again. Raises StorageError that names the damaged file."""
        self._blobs.check(digest)

    def lineage(self, digest: str) -> _List:
        """All it was made from, parents first, itself last. Raises NotFoundError."""
        found: dict[str, tuple[int, Artifact]] = {}
        wanted = {digest}
        with self._db.read() as connection:
            while wanted:
                query = select(table).where(table.c.digest.in_(wanted)).order_by(table.c.id)
                for row in connection.execute(query).mappings():
                    found.setdefault(row["digest"], (row["id"], _decode(row)))
                made_from = {d for seen in wanted & found.keys() for d in found[seen][1].inputs.values()}
                wanted = made_from - found.keys()
        if digest not in found:
            raise NotFoundError(f"nothing is stored under {digest}")
        _, itself = found.pop(digest)
        # Inputs are stored before what is made from them, so the order of rows is the order of descent.
        return [artifact for _, artifact in sorted(found.values(), key=lambda pair: pair[0])] + [itself]

    def _register(self, artifact: Artifact) -> Artifact:
        for attempt in range(_TRIES):
            try:
                with self._db.write() as connection:
                    return _insert(connection, artifact)
            except IntegrityError:
                # Where transactions run side by side (PostgreSQL), another one took the same version number.
                if attempt == _TRIES - 1:
                    raise
        raise AssertionError("unreachable")


def _insert(connection: Connection, artifact: Artifact) -> Artifact:
    same_name = (table.c.kind == artifact.kind.value, table.c.name == artifact.name)
    existing = _rows(connection, select(table).where(*same_name, table.c.digest == artifact.digest))
    if existing:
        return existing[0]
    if artifact.job is not None:
        query = select(jobs.c.id).where(jobs.c.id == artifact.job)
        if connection.execute(query).first() is None:
            raise NotFoundError(f"no job {artifact.job}", hint="see `llmo ps`")
    newest = connection.execute(select(func.max(table.c.version)).where(*same_name)).scalar_one()
    new = dataclasses.replace(artifact, version=(newest or 0) + 1)
    values = {f.name: to_json(getattr(new, f.name)) for f in dataclasses.fields(new)}
    connection.execute(insert(table).values(**values))
    return new


def _valid(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"'{name}' cannot be a name", hint="use letters, digits, '.', '_' and '-', at most 100 of them"
        )
    return name


def _of_kind(kind: Kind | None) -> Select[Any]:
    query = select(table).order_by(table.c.id)
    return query if kind is None else query.where(table.c.kind == Kind(kind).value)


def _rows(connection: Connection, query: Select[Any]) -> _List:
    return [_decode(row) for row in connection.execute(query).mappings()]


def _pick_version(found: _List, name: str, version: str) -> _List:
    """Of each kind the version asked for, or the newest."""
    if not version:
        return list({a.kind: a for a in found}.values())
    picked = [a for a in found if str(a.version) == version]
    if not picked:
        known = ", ".join(str(n) for n in sorted({a.version for a in found})[-10:])
        raise NotFoundError(f"no version '{version}' of '{name}'", hint=f"it has {known}; '{name}' alone is the newest")
    return picked


def _only(fitting: Collection[Artifact], ref: str) -> Artifact:
    if len(fitting) > 1:
        choices = ", ".join(f"{a.kind.value}:{a.ref} ({a.digest[:19]})" for a in list(fitting)[:10])
        raise InputError(f"'{ref}' fits more than one thing", hint=f"write one of: {choices}")
    return next(iter(fitting))


def _unknown(connection: Connection, ref: str, kind: Kind | None) -> NotFoundError:
    names = select(table.c.name).distinct().order_by(table.c.name)
    if kind is not None:
        names = names.where(table.c.kind == kind.value)
    known = list(connection.execute(names).scalars())
    what = "data set, model or report" if kind is None else _WORDS[kind]
    hint = f"known: {', '.join(known[:10])}" if known else "nothing is stored yet"
    if ref.startswith("sha256:"):
        hint = f"give the whole digest, or at least {_SHORTEST} digits of it"
    return NotFoundError(f"no {what} '{ref}'{nearest(ref.partition('@')[0], known)}", hint=hint)


def _decode(row: RowMapping) -> Artifact:
    values = {name: value for name, value in row.items() if name != "id"}
    return Artifact(**values | {"kind": Kind(values["kind"])})
