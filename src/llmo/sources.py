"""Where raw data and base models come from: a package, an upload, a hub name, or a local path."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from llmo.errors import DataError, InputError, nearest
from llmo.files import digest_of, manifest_of, sha256_file

_STORED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*@\d+|sha256:[0-9a-f]{12,64}")


def resolve(source: str, uploads: Path | None = None) -> Path:
    """The local file or folder a source names.

    `package:NAME/SUB` finds files of an installed distribution without importing it; without SUB it is the
    folder that holds the package's `model.safetensors`, else its top folder. Raises InputError when there is
    nothing there.
    """
    if not source.strip():
        raise DataError("no source is named", hint="give a file, a folder, or package:NAME/FOLDER")
    scheme, separator, rest = source.partition(":")
    if separator and scheme == "package":
        return _package(rest)
    if separator and scheme == "upload":
        return _upload(rest, uploads)
    try:
        path = Path(source).expanduser()
        found, usable = path.exists(), path.is_file() or path.is_dir()
    except PermissionError:
        raise DataError(f"no permission to look at '{source}'", hint="make its folders readable") from None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, `~` of nobody
        raise DataError(f"'{source[:80]}' is not a path: {error}", hint="give a file or a folder") from None
    if not found:
        raise DataError(f"no file or folder at '{source}'", hint=_similar(path))
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise DataError(f"no permission to look into '{source}'", hint=f"chmod u+rx {path.name}")
    if not usable:
        raise DataError(f"'{source}' is neither a file nor a folder", hint="write what it gives into a file first")
    return path


def fingerprint(path: Path) -> str:
    """The digest of a file's or folder's content, which names a data set's raw source in keys and lineage.

    Raises DataError for a file that may not be read.
    """
    try:
        return sha256_file(path) if path.is_file() else digest_of(manifest_of(path))
    except PermissionError as error:
        name = Path(str(error.filename)).name
        raise DataError("no permission to read this file", where=name, hint=f"chmod u+r {name}") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=Path(str(error.filename or path)).name) from None


def is_stored(source: str) -> bool:
    """True for the name of something in the store: NAME@VERSION or a digest."""
    return _STORED.fullmatch(source) is not None


def is_local_path(source: str) -> bool:
    """True for a source that only means something on the machine that wrote it."""
    return source.partition(":")[0] not in ("package", "upload", "hf", "scratch")


def _package(rest: str) -> Path:
    name, _, sub = rest.partition("/")
    try:
        listed = files(name)
    except ValueError:
        raise InputError("no package is named", hint="write package:NAME/FOLDER", where=f"package:{rest}") from None
    except PackageNotFoundError:
        raise InputError(
            f"the package '{name}' is not installed", hint=f"pip install --no-deps {name}", where=f"package:{rest}"
        ) from None
    paths = [Path(str(f.locate())) for f in listed or [] if not str(f).endswith(".pyc")]
    if sub:
        for path in paths:
            for candidate in (path, *path.parents):
                if candidate.as_posix().endswith("/" + sub.rstrip("/")):
                    return candidate
        raise InputError(f"the package '{name}' holds nothing at '{sub}'", where=f"package:{rest}")
    weights = sorted((p for p in paths if p.suffix in (".safetensors", ".gguf")), key=lambda p: len(p.parts))
    if weights:
        return weights[0].parent
    tops = [p for p in paths if p.name == "__init__.py"]
    if not tops:
        raise InputError(
            f"the package '{name}' has no folder of its own",
            hint=f"name it: package:{name}/FOLDER",
            where=f"package:{rest}",
        )
    return min(tops, key=lambda p: len(p.parts)).parent


def _upload(rest: str, uploads: Path | None) -> Path:
    digest, _, name = rest.removeprefix("sha256:").partition("/")
    path = (uploads or Path()) / digest / name
    if uploads is None or not digest.isalnum() or "/" in name or name == ".." or not path.exists():
        raise DataError(f"no upload {rest} on this server", hint="send it again: the client does so by itself")
    return path


def _similar(path: Path) -> str:
    try:
        siblings = [p.name for p in path.parent.iterdir()]
    except OSError:
        siblings = []
    close = nearest(path.name, siblings).removeprefix("; ")
    return close or "give a path, or package:NAME/FOLDER for data in an installed package"
