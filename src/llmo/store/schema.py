"""The tables, as SQLAlchemy Core metadata: the one description that queries and migrations are held against."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only for a column that is exactly INTEGER.
_Id = BigInteger().with_variant(Integer(), "sqlite")
_Json = JSON(none_as_null=True)

jobs = Table(
    "jobs",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("op", String(100), nullable=False),
    Column("name", Text, nullable=False),
    Column("spec", _Json, nullable=False),
    Column("inputs", _Json, nullable=False),
    Column("needs", _Json, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(32)),
    Column("error", _Json),
    Column("waiting", Text, nullable=False),
    Column("parent", _Id, ForeignKey("jobs.id")),
    Column("root", _Id, ForeignKey("jobs.id")),
    Column("child_key", Text),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("cache_key", String(100)),
    Column("service", Boolean, nullable=False),
    Column("stop_requested", Boolean, nullable=False),
    Column("owner", Text, nullable=False),
    Column("placement", _Json),
    Column("lease", Text),
    Column("pid", Integer),
    Column("pid_started", Double),
    Column("address", Text),
    Column("output", String(100)),
    Column("result", _Json),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("ended_at", Double),
    UniqueConstraint("parent", "child_key"),
    Index(None, "state"),
    Index(None, "root"),
    Index(None, "cache_key"),
    # The number of a job names its folder, so it is never given out twice.
    sqlite_autoincrement=True,
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("kind", String(16), nullable=False),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String(100), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("card", _Json, nullable=False),
    Column("inputs", _Json, nullable=False),
    Column("job", _Id, ForeignKey("jobs.id")),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("kind", "name", "version"),
    UniqueConstraint("kind", "name", "digest"),
    Index(None, "digest"),
    Index(None, "name"),
)

events = Table(
    "events",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("job", _Id, ForeignKey("jobs.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("at", Double, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("data", _Json, nullable=False),
    Index(None, "job", "id"),
    # Readers remember the last number they saw: one that came back would hide an event.
    sqlite_autoincrement=True,
)

tails = Table(
    "tails",
    metadata,
    Column("job", _Id, ForeignKey("jobs.id"), primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("offset", BigInteger, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", Text, nullable=False),
    Column("role", String(16), nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
    UniqueConstraint("secret_sha256"),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("name", String(100), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("model", String(100), nullable=False),
    Column("model_ref", Text, nullable=False),
    Column("job", _Id, ForeignKey("jobs.id")),
    Column("task", Text, nullable=False),
    Column("engine", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("address", Text),
    Column("created_at", Double, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("endpoint", String(100), primary_key=True),
    Column("name", String(100), primary_key=True),
    Column("model", String(100), nullable=False),
    Column("model_ref", Text, nullable=False),
    Column("base", String(100), nullable=False),
    Column("created_at", Double, nullable=False),
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("endpoint", String(100), nullable=False),
    Column("against", String(100)),
    Column("model", String(100), nullable=False),
    Column("model_ref", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("messages", _Json, nullable=False),
    Column("answers", _Json, nullable=False),
    Column("rating", String(16)),
    Column("correction", Text),
    Column("comment", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Index(None, "endpoint", "id"),
    Index(None, "against", "id"),
    # As with events: whoever exports goes on after the last number it saw.
    sqlite_autoincrement=True,
)
