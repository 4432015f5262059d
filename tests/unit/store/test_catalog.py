"""The catalog: versions, the ways to name them, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmo.errors import InputError, NotFoundError, StorageError
from llmo.types import Artifact, Kind


@pytest.fixture
def make(store, folder) -> Callable[..., Artifact]:
    def publish(name: str, content: str, kind: Kind = Kind.MODEL, **given: Any) -> Artifact:
        out = folder(f"{name}-{content}-{kind}".replace("/", "_"), f=content)
        return store.catalog.publish(kind, name, out, **{"card": {}, "job": None, "inputs": {}} | given)

    return publish


def test_a_version_keeps_what_it_was_given(store, make, new_job) -> None:
    job = new_job()
    made = make("news", "1", card={"task": "x", "f1": 0.9}, job=job.id, inputs={"data": "sha256:0"})
    assert (made.ref, made.kind, made.size, made.job) == ("news@1", Kind.MODEL, 1, job.id)
    assert store.catalog.get("news") == made
    assert store.catalog.find(made.digest) == made
    assert (store.catalog.path(made.digest) / "f").read_text() == "1"


def test_versions_count_up_within_kind_and_name(make) -> None:
    refs = [make("a", "1").ref, make("a", "2").ref, make("b", "1").ref, make("a", "3", Kind.DATASET).ref]
    assert refs == ["a@1", "a@2", "b@1", "a@1"]


def test_the_same_content_is_the_same_version(store, make) -> None:
    first = make("a", "1", card={"n": 1})
    make("a", "2")
    assert make("a", "1", card={"n": 2}) == first
    assert [a.ref for a in store.catalog.list()] == ["a@2", "a@1"]


def test_every_way_to_name_a_version(store, make) -> None:
    old, new = make("a", "1"), make("a", "2")
    for ref in ("a", "a@2", "model:a", "model:a@2", new.digest, new.digest[7:], new.digest[7:19], new.digest[:19]):
        assert store.catalog.get(ref) == new
        assert store.catalog.get(ref, Kind.MODEL) == new
    assert store.catalog.get("a@1") == old
    assert store.catalog.get(new.digest.upper().replace("SHA", "sha")) == new


def test_a_name_that_looks_like_a_digest_is_a_name(store, make) -> None:
    made = make("abcdefabcdef", "1")
    assert store.catalog.get("abcdefabcdef") == made


def test_an_unknown_name_brings_the_nearest(store, make) -> None:
    make("newsdesk", "1")
    make("tickets", "1", Kind.DATASET)
    with pytest.raises(NotFoundError, match="no model 'newsdsk'; did you mean 'newsdesk'") as caught:
        store.catalog.get("newsdsk", Kind.MODEL)
    assert caught.value.hint == "known: newsdesk"
    with pytest.raises(NotFoundError, match="no data set, model or report 'x'") as caught:
        store.catalog.get("x")
    assert caught.value.hint == "known: newsdesk, tickets"


def test_an_unknown_version_brings_those_there_are(store, make) -> None:
    make("a", "1")
    make("a", "2")
    for ref in ("a@3", "a@x", "a@01", "a@1@2"):
        with pytest.raises(NotFoundError) as caught:
            store.catalog.get(ref)
        assert "1, 2" in caught.value.hint


@pytest.mark.parametrize(
    "ref", ["", "@", "@1", "sha256:", "sha256:abc", "abc", "%", "sha256:%%%%%%%%%%%%%", "a'--", "x:y"]
)
def test_what_names_nothing(store, make, ref) -> None:
    make("a", "1")
    with pytest.raises(NotFoundError) as caught:
        store.catalog.get(ref)
    assert caught.value.hint


def test_another_kind_is_not_found(store, make) -> None:
    made = make("a", "1", Kind.DATASET)
    for ref in ("a", made.digest, "model:a"):
        with pytest.raises(NotFoundError):
            store.catalog.get(ref, Kind.MODEL)


def test_a_name_of_two_kinds_must_say_which(store, make) -> None:
    data, model = make("a", "1", Kind.DATASET), make("a", "2")
    with pytest.raises(InputError, match="more than one") as caught:
        store.catalog.get("a")
    assert "dataset:a@1" in caught.value.hint
    assert "model:a@1" in caught.value.hint
    assert store.catalog.get("a", Kind.DATASET) == store.catalog.get("dataset:a") == data
    assert store.catalog.get("a", Kind.MODEL) == store.catalog.get("model:a@1") == model


def test_one_content_under_two_names_is_one_by_its_digest(store, make) -> None:
    first, second = make("a", "1"), make("b", "1")
    assert first.digest == second.digest
    assert store.catalog.get(first.digest) == store.catalog.find(first.digest) == first


def test_also_gives_content_another_name(store, make, new_job) -> None:
    job = new_job()
    first = make("a", "1", card={"n": 1}, inputs={"d": "sha256:0"})
    make("b", "2")
    second = store.catalog.also(first.digest, "b", job=job.id)
    assert (second.ref, second.digest, second.card, second.inputs, second.job) == (
        "b@2",
        first.digest,
        {"n": 1},
        {"d": "sha256:0"},
        job.id,
    )
    assert store.catalog.also(first.digest, "b") == second
    with pytest.raises(NotFoundError):
        store.catalog.also("sha256:" + "0" * 64, "b")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", "a@1", "model:a", "-a", ".a", "a" * 101, "a\n"])
def test_names_that_would_not_be_found_again_are_refused(store, make, name) -> None:
    with pytest.raises(InputError, match="cannot be a name"):
        make(name, "1")
    assert store.blobs.usage()["blobs"] == 0


def test_a_name_may_be_of_any_script(store, make) -> None:
    made = make("新闻-v2.1", "1")
    assert store.catalog.get("新闻-v2.1@1") == made


def test_an_unknown_job_or_folder_is_refused(store, make, tmp_path) -> None:
    with pytest.raises(NotFoundError, match="no job 9"):
        make("a", "1", job=9)
    with pytest.raises(NotFoundError, match="no folder"):
        store.catalog.publish(Kind.MODEL, "a", tmp_path / "nothing", {}, job=None, inputs={})
    assert store.catalog.list() == []


def test_list_filters(store, make) -> None:
    a, b, c = make("a", "1"), make("b", "2"), make("a", "3", Kind.DATASET)
    assert store.catalog.list() == [c, b, a]
    assert store.catalog.list(Kind.MODEL) == [b, a]
    assert store.catalog.list(name="a") == [c, a]
    assert store.catalog.list(Kind.MODEL, "a") == [a]


def test_lineage_goes_back_to_the_first_data(store, make) -> None:
    data = make("data", "1", Kind.DATASET, inputs={"raw": "sha256:not-in-the-store"})
    base = make("base", "2")
    trained = make("trained", "3", inputs={"data": data.digest, "model": base.digest})
    make("other", "4", inputs={"data": data.digest})
    small = make("small", "5", inputs={"model": trained.digest, "data": data.digest})
    assert store.catalog.lineage(small.digest) == [data, base, trained, small]
    assert store.catalog.lineage(data.digest) == [data]
    with pytest.raises(NotFoundError):
        store.catalog.lineage("sha256:" + "0" * 64)


def test_lineage_of_what_came_out_as_it_went_in(store, make) -> None:
    first = make("a", "1")
    again = make("b", "1", inputs={"model": first.digest})
    assert again.digest == first.digest
    assert store.catalog.lineage(first.digest) == [first]


def test_lineage_of_a_thousand_generations(store, folder) -> None:
    before: dict[str, str] = {}
    for number in range(1100):
        values = Artifact(Kind.MODEL, f"m{number}", 0, f"sha256:{number:064x}", 0, {}, None, 0.0, before)
        store.catalog._register(values)
        before = {"model": values.digest}
    assert [a.name for a in store.catalog.lineage(before["model"])] == [f"m{n}" for n in range(1100)]


def test_missing_and_damaged_bytes_are_told(store, make) -> None:
    made = make("a", "12345")
    file = store.catalog.path(made.digest) / "f"
    file.chmod(0o644)
    file.write_text("54321")
    with pytest.raises(StorageError, match="/f is damaged"):
        store.catalog.check(made.digest)
    file.unlink()
    with pytest.raises(StorageError, match="missing"):
        store.catalog.path(made.digest)
    assert make("a", "12345") == made
    store.catalog.check(made.digest)
