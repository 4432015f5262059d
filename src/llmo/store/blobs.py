"""Bytes: files stored once under the SHA-256 of their content, and read-only folders linked from them."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo.errors import StorageError
from llmo.files import MANIFEST, digest_of, manifest_of, publish, sha256_file, storage_errors, sync_folder, tree
from llmo.store.lock import file_lock
from llmo.types import canonical

Files = Mapping[str, Mapping[str, Any]]

# From so many files on, one sync of the whole file system is cheaper than one for each file.
_MANY = 32
_READ_ONLY = 0o444
# A link is refused: other device, file system without links, too many links, not allowed here.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES}


class Blobs:
    """`home/blobs/ab/<hex>` holds files, `home/artifacts/<hex>/` folders, `home/staging/` what is being made.

    A folder appears under its final name complete, durable and at once, or not at all.
    """

    def __init__(self, home: Path) -> None:
        self.blobs = home / "blobs"
        self.artifacts = home / "artifacts"
        self.staging = home / "staging"
        self._publishers = home / "publish.lock"
        self._replacers = home / "replace.lock"

    def prepare(self) -> None:
        """Make the folders, and clear away what publishers that were killed have left."""
        for folder in (self.blobs, self.artifacts, self.staging):
            with storage_errors(folder):
                folder.mkdir(exist_ok=True)
        if any(self.staging.iterdir()):
            self._sweep()

    def publish(self, folder: Path) -> tuple[str, int]:
        """Move the files of `folder` into the store; returns their digest and size in bytes.

        May be repeated after a crash at any point with the same result: the folder's own manifest stays, and
        files it lists that are gone are found among the blobs. Raises StorageError when the disk is full, when
        there is no permission, or when the files are not what the manifest says.
        """
        with storage_errors(self.blobs), file_lock(self._publishers, shared=True):
            files = self._take_stock(folder)
            digest = digest_of({k: dict(v) for k, v in files.items()})
            self._store(folder, files)
            if not self._intact(digest, files):
                self._link_tree(digest, files)
        return digest, sum(int(entry["size"]) for entry in files.values())

    def path(self, digest: str) -> Path:
        """The read-only folder. Raises StorageError when it, or a file in it, is missing."""
        missing = self._missing(digest)
        if missing is not None:
            raise StorageError(f"the stored bytes of {digest} are missing: {missing}", hint=_MAKE_AGAIN)
        return self._tree(digest)

    def has(self, digest: str) -> bool:
        """Whether the folder is there with every file in its full length."""
        return self._missing(digest) is None

    def check(self, digest: str) -> None:
        """Read every byte again. Raises StorageError that names the file that is not what was stored."""
        folder = self.path(digest)
        files = _listed(folder)
        if digest_of(files) != digest:
            raise StorageError(f"{folder / MANIFEST} is damaged", hint=_mend(folder))
        for name, entry in files.items():
            if sha256_file(folder / name) != entry["sha256"]:
                raise StorageError(
                    f"{folder / name} is damaged: its content is not what was stored", hint=_mend(folder)
                )
        strange = [p for p in tree(folder) if p.relative_to(folder).as_posix() not in {*files, MANIFEST}]
        if strange:
            raise StorageError(f"{strange[0]} is not part of what was stored", hint="move it out of the store's folder")

    def usage(self) -> dict[str, int]:
        """Files and bytes of the blobs, and the number of folders."""
        sizes = [p.stat().st_size for p in self.blobs.glob("*/*")]
        return {
            "blobs": len(sizes),
            "blob_bytes": sum(sizes),
            "folders": sum(1 for _ in self.artifacts.iterdir()),
        }

    def _take_stock(self, folder: Path) -> dict[str, dict[str, Any]]:
        """What the folder holds, or held before a publish that was cut off; written down in it before any move."""
        present = manifest_of(folder)
        if not (folder / MANIFEST).exists():
            _write_manifest(folder, present)
            return present
        listed = _listed(folder)
        for name in sorted({*listed, *present}):
            entry = listed.get(name)
            if entry is None:
                raise StorageError(f"{folder / name} was written after the folder's manifest", hint=_RUN_AGAIN)
            if name in present and present[name]["sha256"] != entry["sha256"]:
                raise StorageError(f"{folder / name} changed after the folder's manifest was written", hint=_RUN_AGAIN)
            if name not in present and not self._holds(entry):
                raise StorageError(f"{folder / name} is in the manifest but not in the folder", hint=_RUN_AGAIN)
        return listed

    def _store(self, folder: Path, files: Files) -> None:
        """Content is made durable before it gets its name: a blob that can be seen can be believed."""
        present = [(folder / name, entry) for name, entry in files.items() if (folder / name).exists()]
        for source, _ in present:
            source.chmod(_READ_ONLY)
        _sync([source for source, _ in present])
        shards = set()
        for source, entry in present:
            blob = self._blob(entry["sha256"])
            if not blob.parent.is_dir():
                blob.parent.mkdir(exist_ok=True)
                shards.add(self.blobs)
            shards.add(blob.parent)
            if self._holds(entry):
                source.unlink()
            else:
                self._move(source, blob)
        _sync_folders(shards)

    def _move(self, source: Path, blob: Path) -> None:
        # A second link to the file elsewhere could still write into the blob: then the bytes are copied.
        if source.stat().st_nlink == 1:
            try:
                source.replace(blob)
                return
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
        with tempfile.TemporaryDirectory(dir=self.staging) as aside:
            copy = Path(aside) / "blob"
            _copy(source, copy)
            _sync([copy])
            copy.replace(blob)
        source.unlink()

    def _link_tree(self, digest: str, files: Files) -> None:
        aside = Path(tempfile.mkdtemp(dir=self.staging))
        try:
            folders, copies = {aside}, []
            for name, entry in files.items():
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                folders.update(p for p in target.parents if p.is_relative_to(aside))
                if not _link(self._blob(entry["sha256"]), target):
                    copies.append(target)
            _write_manifest(aside, files)
            (aside / MANIFEST).chmod(_READ_ONLY)
            aside.chmod(0o755)
            _sync(copies)
            _sync_folders(folders)
            self._put_in_place(aside, digest, files)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        sync_folder(self.artifacts)

    def _put_in_place(self, aside: Path, digest: str, files: Files) -> None:
        final = self._tree(digest)
        with file_lock(self._replacers):
            if final.exists():
                # Another publisher was first, or the folder was damaged: it is replaced only if damaged.
                if self._intact(digest, files):
                    return
                grave = Path(tempfile.mkdtemp(dir=self.staging))
                final.rename(grave / "damaged")
                shutil.rmtree(grave, ignore_errors=True)
            aside.rename(final)

    def _intact(self, digest: str, files: Files) -> bool:
        folder = self._tree(digest)
        if self._missing(digest) is not None or _listed(folder) != files:
            return False
        return all(
            (folder / name).samefile(self._blob(entry["sha256"])) or sha256_file(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )

    def _missing(self, digest: str) -> Path | None:
        folder = self._tree(digest)
        try:
            for name, entry in _listed(folder).items():
                if (folder / name).stat().st_size != entry["size"]:
                    return folder / name
        except FileNotFoundError as error:
            return Path(str(error.filename))
        except StorageError:
            return folder / MANIFEST
        return None

    def _holds(self, entry: Mapping[str, Any]) -> bool:
        blob = self._blob(entry["sha256"])
        return blob.exists() and sha256_file(blob) == entry["sha256"]

    def _blob(self, sha256: str) -> Path:
        name = sha256.removeprefix("sha256:")
        return self.blobs / name[:2] / name

    def _tree(self, digest: str) -> Path:
        return self.artifacts / digest.removeprefix("sha256:")

    def _sweep(self) -> None:
        with file_lock(self._publishers, wait=False) as alone:
            if not alone:
                return  # somebody publishes: what lies there may be theirs
            for left in self.staging.iterdir():
                shutil.rmtree(left)


_RUN_AGAIN = "run the job again"
_MAKE_AGAIN = "run its job again: the same spec makes the same bytes, and they are stored in their place"


def _mend(folder: Path) -> str:
    return f"delete the folder {folder} and run its job again: the same spec makes the same bytes"


def _write_manifest(folder: Path, files: Files) -> None:
    # ASCII only: a file's name may hold bytes that are not UTF-8.
    publish(folder / MANIFEST, canonical({"files": files}) + "\n")


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_bytes())["files"]
        return {_inside(name): {"size": int(e["size"]), "sha256": _hex(e["sha256"])} for name, e in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} is not a manifest", hint=_RUN_AGAIN) from error


def _inside(name: str) -> str:
    """A manifest that was tampered with must not lead outside its folder."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(name)
    return name


def _hex(sha256: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", sha256):
        raise ValueError(sha256)
    return sha256


def _link(source: Path, target: Path) -> bool:
    """Hard-link, or copy where links are refused; True when linked."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        _copy(source, target)
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(_READ_ONLY)


def _sync(files: list[Path]) -> None:
    """Make the content of files durable."""
    if len(files) > _MANY and _sync_file_system(files[0]):
        return
    for path in files:
        sync_folder(path)  # works on any open file


def _sync_folders(folders: set[Path]) -> None:
    """Make names in folders durable."""
    if len(folders) > _MANY and _sync_file_system(next(iter(folders))):
        return
    for folder in folders:
        sync_folder(folder)


def _sync_file_system(path: Path) -> bool:
    """Linux's syncfs, which Python does not offer; False where there is none."""
    try:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except (OSError, AttributeError):
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        if syncfs(handle) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(handle)
    return True
