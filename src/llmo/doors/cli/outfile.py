"""Where a file goes whose name the user chose; a name that cannot be is said in words."""

from __future__ import annotations

from pathlib import Path

from llmo.errors import InputError


def place(name: str) -> Path:
    """The path that was meant. Raises InputError for a name that is none, or whose folder is not there."""
    try:
        path = Path(name).expanduser().absolute()
        if path.is_dir() or not path.parent.is_dir():
            what = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise InputError(what, hint="name a file in a folder that is there")
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"'{name[:200]}' is no file that can be written: {error}") from None
    return path
