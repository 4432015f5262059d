"""Fixtures of the store's tests: a store in a folder of its own, on SQLite or on the PostgreSQL server named by
LLMO_TEST_POSTGRES (the URL of a database whose tables may be dropped)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from llmo.store import Store
from llmo.types import Job, Needs

ACTOR = Path(__file__).with_name("actor.py")


@pytest.fixture
def url() -> str | None:
    found = os.environ.get("LLMO_TEST_POSTGRES")
    if found:
        engine = create_engine(found, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        engine.dispose()
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path, url: str | None) -> Iterator[Store]:
    with Store.open(home, url) as opened:
        yield opened


@pytest.fixture
def new_job(store: Store) -> Callable[..., Job]:
    def make(**given: Any) -> Job:
        return store.jobs.insert(**{"op": "train", "spec": {}, "inputs": {}, "needs": Needs()} | given)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with files of given text."""

    def make(where: str = "out", **files: str) -> Path:
        for name, content in files.items():
            path = tmp_path / where / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path / where

    return make


class Actors:
    """Real processes that import first, and then act all at the same moment."""

    def __init__(self, url: str | None) -> None:
        self.url = url

    @contextmanager
    def ready(self, *calls: tuple[Any, ...]) -> Iterator[list[subprocess.Popen[str]]]:
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "error", str(ACTOR), json.dumps({"url": self.url, "call": call})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for call in calls
        ]
        try:
            for process in started:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            yield started
        finally:
            for process in started:
                process.kill()
                process.communicate()

    def together(self, *calls: tuple[Any, ...]) -> list[Any]:
        """What each call returned, in order."""
        with self.ready(*calls) as started:
            for process in started:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            answers = [process.communicate(timeout=60)[0] for process in started]
        return [json.loads(answer) for answer in answers]


@pytest.fixture
def actors(url: str | None) -> Actors:
    return Actors(url)
