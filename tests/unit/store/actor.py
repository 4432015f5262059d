"""A process of its own that does one thing to a store, told by its argument, when a line comes on its input."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  (before the process loses the right to read it)
import sqlalchemy

from llmo.errors import LLMOError
from llmo.files import digest_of, manifest_of
from llmo.store import Store
from llmo.types import Kind, Needs, Placement


def open_home(url: str | None, home: str) -> Any:
    with Store.open(Path(home), url) as store:
        return store.jobs.list()


def insert(url: str | None, home: str, parent: int, keys: list[str]) -> Any:
    with Store.open(Path(home), url) as store:
        made = [
            store.jobs.insert(op="x", spec={}, inputs={}, needs=Needs(), parent=parent, child_key=key) for key in keys
        ]
        return [job.id for job in made]


def claim(url: str | None, home: str, jobs: list[int], lease: str) -> Any:
    with Store.open(Path(home), url) as store:
        return [store.jobs.claim(job, 1, lease, Placement(1, 1)) for job in jobs]


def publish(url: str | None, home: str, folders: list[str]) -> Any:
    with Store.open(Path(home), url) as store:
        made = [store.catalog.publish(Kind.MODEL, "m", Path(f), {}, job=None, inputs={}) for f in folders]
        return [artifact.ref for artifact in made]


def publish_many(url: str | None, home: str, work: str) -> Any:
    """Publishes until it is killed; says the digest of each that was acknowledged."""
    with Store.open(Path(home), url) as store:
        number = 0
        while True:
            number += 1
            folder = Path(work) / f"{os.getpid()}-{number}"
            folder.mkdir()
            for part in range(5):
                (folder / f"f{part}").write_text(f"{os.getpid()} {number} {part}")
            (folder / "same").write_text("in every one of them")
            print(store.catalog.publish(Kind.MODEL, "m", folder, {}, job=None, inputs={}).digest, flush=True)


def crash_everywhere(url: str | None, home: str, work: str) -> Any:
    """Publish one folder after another, each time killed (-9) at the next of all steps on files.

    After each kill the store is opened again, looked through, and the same folder is published to its end.
    Returns at how many steps it was killed.
    """
    step = 0
    while True:
        step += 1
        folder = _new_folder(Path(work) / str(step), step)
        expected = digest_of(manifest_of(folder))
        killed = _killed_at(step, lambda: publish(url, home, [str(folder)]))  # noqa: B023  (ends within the turn)
        with Store.open(Path(home), url) as store:
            assert list(store.blobs.staging.iterdir()) == []
            for tree in store.blobs.artifacts.iterdir():
                store.catalog.check(f"sha256:{tree.name}")
            for artifact in store.catalog.list():
                store.catalog.check(artifact.digest)
            artifact = store.catalog.publish(Kind.MODEL, "m", folder, {}, job=None, inputs={})
            assert (artifact.version, artifact.digest) == (step, expected)
            store.catalog.check(artifact.digest)
        if not killed:
            return step - 1


def _new_folder(folder: Path, number: int) -> Path:
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / "own").write_text(f"of {number}")
    (folder / "own").write_text(f"also of {number}")
    (folder / "same").write_text("in all of them")
    (folder / "twice").write_text("in all of them")
    os.link(folder / "own", folder.with_name(f"{number}-linked"))
    return folder


def _killed_at(step: int, work: Callable[[], Any]) -> bool:
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: Any) -> None:
            nonlocal left
            if event in STEPS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert status == 0
    return False


def small_files(url: str | None, home: str, folder: str, limit: int) -> Any:
    """Publish where no file may grow beyond `limit` bytes."""
    with Store.open(Path(home), url) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return _told(lambda: store.catalog.publish(Kind.MODEL, "m", Path(folder), {}, job=None, inputs={}).ref)


def small_database(url: str | None, home: str, limit: int) -> Any:
    """Insert jobs until the database may not grow any more; returns those acknowledged, and the error."""
    with Store.open(Path(home), url) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        acknowledged: list[int] = []

        def fill() -> None:
            while True:
                spec = {"text": "x" * 5000}
                acknowledged.append(store.jobs.insert(op="x", spec=spec, inputs={}, needs=Needs()).id)

        return [acknowledged, _told(fill)]


def unprivileged(url: str | None, home: str, folder: str | None) -> Any:
    """Open, and publish if told, as a user who owns nothing."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    def work() -> None:
        with Store.open(Path(home), url) as store:
            if folder is not None:
                store.catalog.publish(Kind.MODEL, "m", Path(folder), {}, job=None, inputs={})

    return _told(work)


def full_disk(url: str | None, room: str, size: str) -> Any:
    """In a mount of its own with `size` of space: publish what does not fit, then what does; None without the right."""
    if not _mount_small(room, size):
        return None
    home, folder = Path(room) / "home", Path(room).parent / "out"
    with Store.open(home, url) as store:
        told = _told(lambda: store.catalog.publish(Kind.MODEL, "m", folder, {}, job=None, inputs={}).ref)
        left = [str(p) for p in store.blobs.staging.iterdir()] + [str(p) for p in store.blobs.artifacts.iterdir()]
        (folder / "large").unlink()
        (folder / "manifest.json").unlink()
        return [told, left, store.catalog.publish(Kind.MODEL, "m", folder, {}, job=None, inputs={}).ref]


def _mount_small(room: str, size: str) -> bool:
    """A private tmpfs that goes with this process; False where that is not allowed."""
    libc = ctypes.CDLL(None)
    new_mounts, recursive_private = 0x00020000, 0x4000 | 0x40000
    return (
        libc.unshare(new_mounts) == 0
        and libc.mount(b"none", b"/", None, recursive_private, None) == 0
        and libc.mount(b"tmpfs", room.encode(), b"tmpfs", 0, f"size={size}".encode()) == 0
    )


def _told(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except LLMOError as error:
        return error.to_json()


sqlalchemy.create_engine("sqlite://").dispose()

# Every way in which Python changes a folder; content is written between an open and the next of them.
STEPS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.chmod", "os.rmdir", "sqlite3.connect"}

ACTIONS = (
    crash_everywhere,
    open_home,
    insert,
    claim,
    publish,
    publish_many,
    small_files,
    small_database,
    unprivileged,
    full_disk,
)


def main() -> None:
    told = json.loads(sys.argv[1])
    name, *arguments = told["call"]
    action = {a.__name__: a for a in ACTIONS}[name]
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(action(told["url"], *arguments)), flush=True)


main()
