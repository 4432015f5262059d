"""Errors cross borders unchanged, records survive JSON, files are whole or absent, sources resolve."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

import pytest

from llmo import errors, files, sources
from llmo.errors import (
    DataError,
    EnvironmentProblem,
    GateRefused,
    InputError,
    LLMOError,
    SpecError,
    StorageError,
    from_json,
    needing,
)
from llmo.plugins import load, operation
from llmo.settings import Settings, parse_bytes
from llmo.types import Endpoint, Job, JobState, Kind, Needs, Placement, Reason, canonical, to_json
from llmo.types import from_json as record


def tree(cls: type[LLMOError]) -> list[type[LLMOError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in tree(sub))]


@pytest.mark.parametrize("cls", tree(LLMOError))
def test_an_error_survives_a_border(cls: type[LLMOError]) -> None:
    error = cls("it broke", hint="mend it", where="f:3", retry_after=2)
    again = from_json(json.loads(json.dumps(error.to_json())))
    assert type(again) is cls
    assert (again.what, again.hint, again.where, again.extra) == ("it broke", "mend it", "f:3", {"retry_after": 2})


def test_codes_are_distinct() -> None:
    codes = [cls.code for cls in tree(LLMOError)]
    assert len(codes) == len(set(codes))
    assert {
        InputError.exit_code,
        GateRefused.exit_code,
        errors.JobFailed.exit_code,
        errors.UnreachableError.exit_code,
    } == {2, 3, 4, 5}


def test_records_survive_json() -> None:
    job = Job(
        id=1, op="train", spec={"a": 1}, inputs={"data": "sha256:0"}, needs=Needs(2, None, 5), state=JobState.DONE,
        reason=Reason.CACHED, placement=Placement(2, 5, ("cuda:0",)), error={"code": "x"}, result={"f": 0.5},
    )  # fmt: skip
    assert record(Job, json.loads(json.dumps(to_json(job)))) == job
    endpoint = Endpoint("n", "up", "sha256:1", "m@1", None)
    assert record(Endpoint, to_json(endpoint) | {"unknown": 1}) == endpoint


def test_canonical_is_one_spelling() -> None:
    assert canonical({"b": 1, "a": [Kind.MODEL, 0.5, "é"]}) == canonical({"a": ["model", 0.5, "é"], "b": 1})


def test_publish_replaces_whole_files(tmp_path: Path) -> None:
    files.publish(tmp_path / "a", "one")
    files.publish(tmp_path / "a", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"two"


def test_publish_says_when_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no folder .*missing"):
        files.publish(tmp_path / "missing" / "a", "one")


def test_publish_says_when_it_may_not_write(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="full"), files.storage_errors(tmp_path):
        Path("/dev/full").write_bytes(b"x" * 10)
    with pytest.raises(StorageError, match="permission"), files.storage_errors(tmp_path):
        raise PermissionError(13, os.strerror(13))


def test_the_digest_of_a_folder_is_of_names_and_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "b.txt").write_text("b")
        (folder / "a.txt").write_text("a")
    assert sources.fingerprint(one) == sources.fingerprint(two)
    (two / "a.txt").rename(two / "c.txt")
    assert sources.fingerprint(one) != sources.fingerprint(two)


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "tickets.csv").write_text("text,label\n")
    assert sources.resolve(str(tmp_path / "tickets.csv")) == tmp_path / "tickets.csv"
    with pytest.raises(DataError) as caught:
        sources.resolve(str(tmp_path / "ticket.csv"))
    assert "tickets.csv" in caught.value.hint
    with pytest.raises(InputError, match="not installed"):
        sources.resolve("package:no-such-package-here")
    with pytest.raises(InputError, match="nothing at"):
        sources.resolve("package:pydantic/no/such/folder")
    assert sources.resolve("package:pydantic").name == "pydantic"
    uploads = tmp_path / "uploads"
    (uploads / "ab12").mkdir(parents=True)
    (uploads / "ab12" / "x.csv").write_text("")
    assert sources.resolve("upload:ab12/x.csv", uploads).name == "x.csv"
    for bad in ("upload:ab12/../../etc", "upload:..", "upload:ab12/..", "upload:nothere"):
        with pytest.raises(DataError):
            sources.resolve(bad, uploads)


def test_a_package_that_is_missing_is_named_with_what_installs_it() -> None:
    said = pytest.raises(EnvironmentProblem, match=r"^int8 needs a package that is not installed: no_such$")
    with said as caught, needing("int8", "calibrate"):
        import_module("no_such.package")
    assert caught.value.hint == "pip install 'llmo-os[calibrate]'"


@pytest.mark.parametrize(("text", "count"), [("512MiB", 512 << 20), ("1G", 1 << 30), ("7", 7), ("1.5 KiB", 1536)])
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text, "x") == count


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMO_MEMORY", "lots")
    with pytest.raises(SpecError, match="lots"):
        Settings.from_environment()
    monkeypatch.setenv("LLMO_MEMORY", "1GiB")
    monkeypatch.setenv("LLMO_CORES", "many")
    with pytest.raises(SpecError, match="many"):
        Settings.from_environment()
    monkeypatch.delenv("LLMO_CORES")
    monkeypatch.setenv("LLMO_SERVE_MEMORY", "0")
    with pytest.raises(SpecError, match="no memory at all"):
        Settings.from_environment()


def test_plugins_name_the_nearest() -> None:
    assert operation("train").produces is Kind.MODEL
    with pytest.raises(SpecError, match="did you mean 'text-classification'"):
        load("llmo.tasks", "text-clasification")
