"""Where raw data and base models come from: what is named, and what cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmo.doors.flow import absolute, located
from llmo.errors import InputError
from llmo.sources import fingerprint, is_stored, resolve


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "no source"),
        (" ", "no source"),
        ("nope.csv", "no file or folder"),
        ("a\0b", "no file or folder"),
        ("x" * 5000, "not a path"),
        ("~no-such-user-here/x", "not a path"),
        ("/dev/zero", "neither a file nor a folder"),
        ("package:", "no package"),
        ("package:/x", "no package"),
        ("package:no-such-package", "not installed"),
        ("package:numpy/no/such", "holds nothing"),
        ("upload:x/y", "no upload"),
    ],
)
def test_what_cannot_be_named(source: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve(source)


def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither"):
        resolve(str(tmp_path / "pipe"))


def test_what_cannot_be_read_is_told() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        fingerprint(Path("/proc/self/mem"))


def test_names_of_the_store() -> None:
    assert is_stored("news@3")
    assert is_stored("sha256:" + "a" * 64)
    assert not any(is_stored(name) for name in ("news", "./news@3", "~/x@1", "package:x@1", ""))


def test_paths_are_relative_to_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "sub dir" / "ünï.csv").write_text("x")
    monkeypatch.chdir(tmp_path)
    base = Path("sub dir")
    assert located("ünï.csv", base) == str(tmp_path / "sub dir" / "ünï.csv")
    assert located("../sub dir/ünï.csv", base) == str(tmp_path / "sub dir" / "ünï.csv")
    assert located("missing.csv", base) == str(tmp_path / "sub dir" / "missing.csv")
    assert absolute("missing.csv", base) == "missing.csv"
    for kept in ("package:a/b", "hf:a/b", "upload:x/y", "news@3", ""):
        assert located(kept, base) == kept
