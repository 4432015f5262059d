"""Files that matter: written aside, synced and renamed; folders named by the SHA-256 of what is in them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmo.errors import InputError, StorageError
from llmo.types import canonical

MANIFEST = "manifest.json"


def publish(path: Path, data: bytes | str) -> None:
    """Write a file so that a crash leaves either the old content or the new, never a part.

    Raises StorageError when the disk is full, or the folder is not there or cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        if not path.parent.is_dir():
            raise StorageError(f"there is no folder {path.parent}", hint="make it first, or name another one")
        try:
            with open(aside, "wb") as file:
                file.write(data.encode("utf-8") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(path.parent)


def publish_json(path: Path, value: Any) -> None:
    publish(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def make_home(home: Path) -> None:
    """The store's folder, private to its user. Raises StorageError when it cannot be one."""
    with storage_errors(home):
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(f"{home} is not a folder", hint="set LLMO_HOME to a folder") from error
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
                what = f"the folder {str(home)[:200]} cannot be made: {error.strerror}"
                raise StorageError(what, hint="set LLMO_HOME to another folder") from error
            raise
        except ValueError as error:
            raise StorageError(f"LLMO_HOME is not a path: {error}", hint="set LLMO_HOME to a folder") from error


def vacant(path: Path) -> None:
    """Raises InputError where a new folder cannot be put: something is there already, or no folder holds it."""
    try:
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise InputError(f"{path} is there already", hint="name a folder that is not, or move that one away")
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent}", hint="make it first, or name another one")
    except (OSError, ValueError) as error:
        raise InputError(f"'{str(path)[:200]}' is no folder that can be made: {error}") from None


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals about `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the disk that holds {path} is full",
                hint="free some space, or set LLMO_HOME to a folder on another disk; nothing was lost, run it again",
            ) from error
        if error.errno == errno.EFBIG:
            raise StorageError(
                f"{path} is larger than files may be here", hint="raise the limit on file sizes (see `ulimit -f`)"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"no permission to write {path}", hint="make the folder writable, or set LLMO_HOME to one that is"
            ) from error
        raise


def sha256_file(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def tree(folder: Path) -> list[Path]:
    """The regular files below a folder, sorted by relative POSIX path; links and `.tmp` files are left out."""
    found = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and not p.name.endswith(".tmp")]
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative path: {"size": bytes, "sha256": "sha256:..."}}` of everything in a folder but its own manifest."""
    return {
        p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256_file(p)}
        for p in tree(folder)
        if p.relative_to(folder).as_posix() != MANIFEST
    }


def digest_of(files: dict[str, dict[str, Any]]) -> str:
    """The digest of a manifest's `files`: the name of the whole folder by its content."""
    return "sha256:" + hashlib.sha256(canonical({k: v["sha256"] for k, v in files.items()}).encode()).hexdigest()


def digest_of_value(value: Any) -> str:
    """`sha256:<hex>` of a JSON value in its one spelling."""
    return "sha256:" + hashlib.sha256(canonical(value).encode()).hexdigest()
