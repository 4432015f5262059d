"""Where LLMO keeps things and which server it talks to: every environment variable it reads, in one place."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from llmo.errors import SpecError

VARIABLES = {
    "LLMO_HOME": "the folder of the store (default: .llmo in the current folder)",
    "LLMO_URL": "the server to talk to (default: none, work in this process)",
    "LLMO_KEY": "the API key sent to that server",
    "LLMO_DATABASE": "an SQLAlchemy URL instead of the SQLite file in LLMO_HOME",
    "LLMO_CORES": "how many CPU cores LLMO may use (default: all this process may use)",
    "LLMO_MEMORY": "how much memory LLMO may use, e.g. 16GiB (default: 90% of the machine's)",
    "LLMO_SERVE_MEMORY": "how much of that endpoints may take together, e.g. 8GiB (default: all of it)",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """One reading of the environment."""

    home: Path
    url: str | None = None
    key: str | None = None
    database: str | None = None
    cores: int | None = None
    memory: int | None = None
    serve_memory: int | None = None

    @classmethod
    def from_environment(cls) -> Settings:
        env = os.environ
        return cls(
            home=Path(env.get("LLMO_HOME") or ".llmo").expanduser().absolute(),
            url=env.get("LLMO_URL") or None,
            key=env.get("LLMO_KEY") or None,
            database=env.get("LLMO_DATABASE") or None,
            cores=_cores(env["LLMO_CORES"]) if env.get("LLMO_CORES") else None,
            memory=_bytes("LLMO_MEMORY"),
            serve_memory=_bytes("LLMO_SERVE_MEMORY"),
        )


def parse_bytes(text: str, where: str) -> int:
    """`512MiB`, `16GiB`, `2G` or a plain number of bytes -> bytes."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?B?)\s*", text, re.IGNORECASE)
    if match is None or match[1].count(".") > 1 or match[1] == ".":
        raise SpecError(f"'{text}' is not an amount of memory", where=where, hint="write it like 512MiB or 16GiB")
    scale = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2].upper()]
    return int(float(match[1]) * (1 << scale))


def _bytes(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    found = parse_bytes(text, name)
    if found < 1:
        raise SpecError(f"'{text}' is no memory at all", where=name, hint="write it like 512MiB, or leave it unset")
    return found


def _cores(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise SpecError(f"'{text}' is not a number of cores", where="LLMO_CORES", hint="write a whole number, e.g. 4")
    return int(text)
