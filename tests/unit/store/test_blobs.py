"""Publishing bytes: complete or not at all, whatever fails, and whoever else publishes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmo.errors import StorageError
from llmo.files import digest_of, manifest_of, publish_json
from llmo.store import Store, blobs
from llmo.store.lock import file_lock
from llmo.types import Kind


def published(store: Store, folder: Path) -> str:
    return store.catalog.publish(Kind.MODEL, "m", folder, {}, job=None, inputs={}).digest


def test_the_digest_is_that_of_the_files(store, folder) -> None:
    out = folder(a="1", sub__b="2")
    expected = digest_of(manifest_of(out))
    digest, size = store.blobs.publish(out)
    assert (digest, size) == (expected, 2)
    tree = store.blobs.path(digest)
    assert {p.relative_to(tree).as_posix(): p.read_text() for p in tree.rglob("*") if p.name in "ab"} == {
        "a": "1",
        "sub/b": "2",
    }
    assert digest_of(manifest_of(tree)) == digest
    store.blobs.check(digest)


def test_files_are_moved_made_read_only_and_kept_once(store, folder) -> None:
    out = folder(a="same", b="same", c="other")
    inode = (out / "c").stat().st_ino
    digest, _ = store.blobs.publish(out)
    assert [p.name for p in out.iterdir()] == ["manifest.json"]
    tree = store.blobs.path(digest)
    assert (tree / "c").stat().st_ino == inode
    assert (tree / "a").samefile(tree / "b")
    assert all(p.stat().st_mode & 0o222 == 0 for p in tree.rglob("*") if p.is_file())
    assert store.blobs.usage()["blobs"] == 2


def test_publishing_again_changes_nothing(store, folder) -> None:
    out = folder(a="1", b="2")
    digest, size = store.blobs.publish(out)
    before = {p: p.stat().st_ino for p in store.home.rglob("*")}
    assert store.blobs.publish(out) == (digest, size)
    assert store.blobs.publish(folder("again", a="1", b="2")) == (digest, size)
    assert {p: p.stat().st_ino for p in store.home.rglob("*")} == before


def test_a_file_that_is_linked_elsewhere_is_copied(store, folder, tmp_path) -> None:
    out = folder(a="content")
    os.link(out / "a", tmp_path / "elsewhere")
    digest, _ = store.blobs.publish(out)
    (tmp_path / "elsewhere").chmod(0o644)
    (tmp_path / "elsewhere").write_text("changed")
    store.blobs.check(digest)


@pytest.mark.parametrize("refused", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_and_renames_are_refused_files_are_copied(store, folder, monkeypatch, refused) -> None:
    out = folder(a="1", sub__b="2")

    def refuse(*_: object) -> None:
        raise OSError(refused, os.strerror(refused))

    real = Path.replace
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "replace", lambda self, to: refuse() if self.name in "ab" else real(self, to))
    digest, _ = store.blobs.publish(out)
    tree = store.blobs.path(digest)
    store.blobs.check(digest)
    assert (tree / "a").stat().st_nlink == 1
    assert (tree / "a").stat().st_mode & 0o222 == 0
    assert not (out / "a").exists()
    assert list(store.blobs.staging.iterdir()) == []


@pytest.mark.parametrize("count", [3, 50])
def test_what_gets_a_name_was_made_durable_before(store, tmp_path, monkeypatch, count) -> None:
    """The order of the real calls: content, then its name, then the name's folder, then the next name."""
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "file").write_text("below")
    for number in range(count):
        (out / str(number)).write_text(f"file {number}")
    log: list[tuple[str, int]] = []

    def logged(what: str, real: Callable[..., Any], inode: Callable[..., int]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            log.append((what, inode(*given)))
            return real(*given)

        return call

    monkeypatch.setattr(os, "fsync", logged("sync", os.fsync, lambda handle: os.fstat(handle).st_ino))
    monkeypatch.setattr(blobs, "_sync_file_system", logged("sync all", blobs._sync_file_system, lambda _: 0))
    monkeypatch.setattr(Path, "replace", logged("name", Path.replace, lambda path, _: path.stat().st_ino))
    monkeypatch.setattr(Path, "rename", logged("name", Path.rename, lambda path, _: path.stat().st_ino))
    tree = store.blobs.path(store.blobs.publish(out)[0])

    def synced(inode: int, since: int, until: int) -> bool:
        return ("sync", inode) in log[since:until] or ("sync all", 0) in log[since:until]

    names = {inode: place for place, (what, inode) in enumerate(log) if what == "name"}
    final = names[tree.stat().st_ino]
    for number in range(count):
        file = (tree / str(number)).stat()
        assert synced(file.st_ino, 0, names[file.st_ino])
    for shard in store.blobs.blobs.iterdir():
        last = max(names[blob.stat().st_ino] for blob in shard.iterdir())
        assert synced(shard.stat().st_ino, last, final)
    assert synced(store.blobs.blobs.stat().st_ino, 0, final)
    assert synced(tree.stat().st_ino, 0, final)
    assert synced((tree / "sub").stat().st_ino, 0, final)
    assert synced(store.blobs.artifacts.stat().st_ino, final, len(log))


def test_a_folder_from_another_file_system(store) -> None:
    other = Path("/dev/shm") / f"llmo-test-{os.getpid()}"
    if not other.parent.is_dir() or other.parent.stat().st_dev == store.home.stat().st_dev:
        pytest.skip("only one file system here")
    try:
        other.mkdir()
        (other / "a").write_text("far away")
        digest, _ = store.blobs.publish(other)
        store.blobs.check(digest)
        assert [p.name for p in other.iterdir()] == ["manifest.json"]
    finally:
        shutil.rmtree(other)


def test_an_empty_folder_is_a_folder_too(store, folder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    digest, size = store.blobs.publish(tmp_path / "empty")
    assert size == 0
    store.blobs.check(digest)


def test_two_thousand_small_files(store, tmp_path) -> None:
    out = tmp_path / "many"
    out.mkdir()
    for number in range(2000):
        (out / str(number)).write_text(f"file {number}")
    digest, _ = store.blobs.publish(out)
    assert len(list(store.blobs.path(digest).iterdir())) == 2001
    assert store.blobs.usage()["blobs"] == 2000


_names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda n: n not in (".", "..", "manifest.json") and not n.endswith(".tmp")
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_names, st.binary(max_size=40), max_size=6))
def test_any_names_and_bytes_come_back(store, tmp_path, files) -> None:
    out = tmp_path / "any"
    shutil.rmtree(out, ignore_errors=True)
    (out / "sub").mkdir(parents=True)
    for name, content in files.items():
        (out / "sub" / name).write_bytes(content)
    written = {p.name: p.read_bytes() for p in (out / "sub").iterdir()}
    digest, size = store.blobs.publish(out)
    tree = store.blobs.path(digest)
    found = {p.name: p.read_bytes() for p in (tree / "sub").iterdir()} if written else {}
    assert found == written
    assert size == sum(map(len, written.values()))
    store.blobs.check(digest)


def test_names_that_are_not_utf8(store, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Path(os.fsdecode(os.fsencode(out) + b"/\xe4\xff")).write_text("latin")
    digest, _ = store.blobs.publish(out)
    store.blobs.check(digest)


def test_the_worker_s_manifest_is_held_to(store, folder) -> None:
    out = folder(a="1")
    publish_json(out / "manifest.json", {"files": manifest_of(out)})
    (out / "a").write_text("2")
    with pytest.raises(StorageError, match="changed after"):
        store.blobs.publish(out)
    (out / "a").write_text("1")
    (out / "b").write_text("new")
    with pytest.raises(StorageError, match="written after"):
        store.blobs.publish(out)
    (out / "b").unlink()
    (out / "a").unlink()
    with pytest.raises(StorageError, match="not in the folder"):
        store.blobs.publish(out)
    assert store.blobs.usage() == {"blobs": 0, "blob_bytes": 0, "folders": 0}


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        '{"files": 3}',
        '{"files": {"a": {"size": 1}}}',
        '{"files": {"a": {"size": 1, "sha256": "../../etc"}}}',
        '{"files": {"../../a": {"size": 1, "sha256": "sha256:' + "0" * 64 + '"}}}',
        '{"files": {"/a": {"size": 1, "sha256": "sha256:' + "0" * 64 + '"}}}',
    ],
)
def test_what_is_no_manifest_is_refused(store, folder, manifest) -> None:
    out = folder(a="1")
    (out / "manifest.json").write_text(manifest)
    with pytest.raises(StorageError, match="is not a manifest"):
        store.blobs.publish(out)
    assert (out / "a").read_text() == "1"


def test_check_names_what_is_damaged(store, folder) -> None:
    digest = published(store, folder(a="12345", b="other"))
    tree = store.blobs.path(digest)

    def spoil(name: str, content: str) -> None:
        (tree / name).chmod(0o644)
        (tree / name).write_text(content)

    spoil("a", "54321")
    with pytest.raises(StorageError, match="/a is damaged") as caught:
        store.blobs.check(digest)
    assert "run its job again" in caught.value.hint
    assert store.blobs.has(digest)
    spoil("a", "short"[:3])
    assert not store.blobs.has(digest)
    with pytest.raises(StorageError, match="/a"):
        store.blobs.path(digest)
    (tree / "a").unlink()
    with pytest.raises(StorageError, match="missing"):
        store.blobs.check(digest)


def test_check_sees_a_changed_manifest_and_a_foreign_file(store, folder) -> None:
    digest = published(store, folder(a="1"))
    tree = store.blobs.path(digest)
    (tree / "new").write_text("x")
    with pytest.raises(StorageError, match="new is not part"):
        store.blobs.check(digest)
    (tree / "new").unlink()
    (tree / "manifest.json").chmod(0o644)
    (tree / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
        store.blobs.check(digest)


def test_what_was_never_stored_is_missing(store) -> None:
    assert not store.blobs.has("sha256:" + "0" * 64)
    with pytest.raises(StorageError, match="missing"):
        store.blobs.path("sha256:" + "0" * 64)


@pytest.mark.parametrize("damage", ["blob", "file", "folder", "manifest"])
def test_publishing_again_mends_what_was_damaged(store, folder, damage) -> None:
    digest = published(store, folder("first", a="12345", b="other"))
    tree = store.blobs.path(digest)
    if damage == "folder":
        shutil.rmtree(tree)
    elif damage == "file":
        (tree / "a").unlink()
    elif damage == "manifest":
        (tree / "manifest.json").unlink()
    else:
        (tree / "a").chmod(0o644)
        (tree / "a").write_text("54321")
    assert published(store, folder("second", a="12345", b="other")) == digest
    store.blobs.check(digest)
    assert list(store.blobs.staging.iterdir()) == []


def test_no_room_leaves_the_work_whole_and_no_rubbish(home, folder, actors) -> None:
    Store.open(home, actors.url).close()
    out = folder(a="x" * 100, b="y" * 100)
    [told] = actors.together(("small_files", str(home), str(out), 50))
    assert told["code"] == "storage"
    assert told["hint"]
    assert sorted(p.name for p in out.iterdir()) == ["a", "b"]
    with Store.open(home, actors.url) as store:
        assert store.blobs.usage() == {"blobs": 0, "blob_bytes": 0, "folders": 0}
        assert not any(store.blobs.staging.iterdir())
        assert store.catalog.list() == []
        store.catalog.check(published(store, out))


def test_no_room_for_a_copy_can_be_tried_again(home, folder, tmp_path, actors) -> None:
    Store.open(home, actors.url).close()
    out = folder(a="small", b="x" * 5000)
    os.link(out / "b", tmp_path / "forces a copy")
    [told] = actors.together(("small_files", str(home), str(out), 1000))
    assert told["code"] == "storage"
    with Store.open(home, actors.url) as store:
        assert not any(store.blobs.staging.iterdir())
        assert not any(store.blobs.artifacts.iterdir())
        digest = published(store, out)
        assert (store.catalog.path(digest) / "a").read_text() == "small"
        store.catalog.check(digest)


def test_a_disk_that_is_really_full(tmp_path, folder, actors) -> None:
    room = tmp_path / "room"
    room.mkdir()
    folder(large="x" * 6_000_000, small="1")
    [answer] = actors.together(("full_disk", str(room), "4m"))
    if answer is None:
        pytest.skip("this user may not mount")
    told, left, ref = answer
    assert told["code"] == "storage"
    assert "full" in told["what"]
    assert left == []
    assert ref == "m@1"
    assert list(room.iterdir()) == []


def test_no_permission_to_store(store, folder, monkeypatch) -> None:
    out = folder(a="1")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(StorageError, match="no permission"):
        published(store, out)
    monkeypatch.undo()
    assert (out / "a").read_text() == "1"
    assert not any(store.blobs.staging.iterdir())


def test_a_publish_that_fails_at_its_last_step_leaves_no_rubbish(store, folder, monkeypatch) -> None:
    out = folder(a="1", sub__b="2")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="full"):
        published(store, out)
    monkeypatch.undo()
    assert not any(store.blobs.staging.iterdir())
    assert not any(store.blobs.artifacts.iterdir())
    assert store.catalog.list() == []
    store.catalog.check(published(store, out))


def test_processes_that_publish_the_same_make_it_once(home, folder, actors, url) -> None:
    Store.open(home, url).close()
    calls = []
    for process in range(4):
        folders = [folder(f"{process}-{n}", a="same", b=f"of {n}", **{"c__d": f"x{n}"}) for n in range(8)]
        calls.append(("publish", str(home), [str(f) for f in (folders if process % 2 else folders[::-1])]))
    answers = actors.together(*calls)
    with Store.open(home, url) as store:
        assert len(store.catalog.list()) == 8
        assert sorted(a.version for a in store.catalog.list()) == list(range(1, 9))
        for artifact in store.catalog.list():
            store.catalog.check(artifact.digest)
        assert store.blobs.usage() == {"blobs": 17, "blob_bytes": 4 + 8 * 4 + 8 * 2, "folders": 8}
        assert not any(store.blobs.staging.iterdir())
    assert answers[0] == answers[2]
    assert answers[1] == answers[0][::-1]


@pytest.mark.chaos
def test_killed_at_every_step_of_a_publish(home, tmp_path, actors, url) -> None:
    Store.open(home, url).close()
    [steps] = actors.together(("crash_everywhere", str(home), str(tmp_path / "work")))
    assert steps > 30


@pytest.mark.chaos
def test_killed_at_random_moments(home, tmp_path, actors, url) -> None:
    Store.open(home, url).close()
    (tmp_path / "work").mkdir()
    moments = random.Random(7)
    for _ in range(6):
        with actors.ready(("publish_many", str(home), str(tmp_path / "work"))) as [process]:
            process.stdin.write("go\n")
            process.stdin.flush()
            acknowledged = [process.stdout.readline().strip() for _ in range(3)]
            time.sleep(moments.random() / 50)  # the moment itself, not a wait for something
            process.send_signal(signal.SIGKILL)
            acknowledged += process.stdout.read().split()
        with Store.open(home, url) as store:
            known = {a.digest for a in store.catalog.list()}
            assert {d for d in acknowledged if len(d) == 71} <= known
            assert not any(store.blobs.staging.iterdir())
            for tree in store.blobs.artifacts.iterdir():
                store.catalog.check(f"sha256:{tree.name}")
            assert all(store.blobs.has(digest) for digest in known)
            for left in (tmp_path / "work").iterdir():
                published(store, left)


def test_what_another_publisher_stages_is_left_alone(home, url) -> None:
    with Store.open(home, url) as store:
        (store.blobs.staging / "theirs").mkdir()
        with file_lock(home / "publish.lock", shared=True):
            Store.open(home, url).close()
            assert (store.blobs.staging / "theirs").is_dir()
        Store.open(home, url).close()
        assert not any(store.blobs.staging.iterdir())
