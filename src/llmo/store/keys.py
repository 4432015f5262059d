"""API keys: made once, shown once, kept only as a hash."""

from __future__ import annotations

import hashlib
import secrets
import time

from sqlalchemy import RowMapping, func, insert, select, update

from llmo.errors import InputError, NotFoundError
from llmo.store.db import Database
from llmo.store.schema import keys as table
from llmo.types import Key

ROLES = ("admin", "member", "predict")
PREFIX = "llmo_"
_List = list[Key]


class Keys:
    """A secret is 256 random bits, which nobody guesses, so a fast hash keeps it as well as a slow one."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(self, owner: str, role: str) -> tuple[Key, str]:
        """A new key and its secret, which cannot be shown again. Raises InputError for an unknown role."""
        if role not in ROLES:
            raise InputError(f"there is no role '{role}'", hint=f"known: {', '.join(ROLES)}")
        secret = PREFIX + secrets.token_urlsafe(32)
        key = Key(id="key_" + secrets.token_hex(6), owner=owner, role=role, created_at=time.time())
        values = {"id": key.id, "owner": owner, "role": role, "created_at": key.created_at}
        with self._db.write() as connection:
            connection.execute(insert(table).values(**values, secret_sha256=_hash(secret)))
        return key, secret

    def find(self, secret: str) -> Key | None:
        """The key of that secret, unless it was revoked."""
        if not secret.startswith(PREFIX):
            return None
        query = select(table).where(table.c.secret_sha256 == _hash(secret), table.c.revoked_at.is_(None))
        with self._db.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else _decode(row)

    def list(self) -> _List:
        """All keys, oldest first, revoked ones too."""
        with self._db.read() as connection:
            return [_decode(row) for row in connection.execute(select(table).order_by(table.c.created_at)).mappings()]

    def revoke(self, id: str) -> None:
        """The key opens nothing from now on. Raises NotFoundError."""
        with self._db.write() as connection:
            revoked = func.coalesce(table.c.revoked_at, time.time())
            done = connection.execute(update(table).where(table.c.id == id).values(revoked_at=revoked))
            if done.rowcount == 0:
                raise NotFoundError(f"no key '{id}'", hint="see `llmo key list`")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _decode(row: RowMapping) -> Key:
    return Key(**{name: value for name, value in row.items() if name != "secret_sha256"})
