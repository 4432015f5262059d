"""Feedback over HTTP and the command line: who may give it and who may read it, in pages, and out again as JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmo.doors.client import Client
from llmo.doors.server import serve_in_thread
from llmo.errors import ForbiddenError, InputError, NotFoundError, TooLargeError, UnauthorizedError
from llmo.settings import Settings
from llmo.system import System
from support.project import llmo

ASKED = [{"role": "user", "content": "Size?"}]
GOOD = {"endpoint": "chat", "kind": "rating", "messages": ASKED, "answers": [{"content": "12"}], "rating": "good"}


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with System(Settings(home=tmp_path)) as made:
        for name, version in (("chat", 3), ("other", 1)):
            made.store.endpoints.set(
                name, job=None, model=f"sha256:{version}", model_ref=f"{name}@{version}", task="generation"
            )
        yield made


@pytest.fixture
def url(system: System) -> Iterator[str]:
    with serve_in_thread(system) as found:
        yield found


def client(system: System, url: str, role: str) -> Client:
    return Client(url, system.make_key(f"the {role}", role)[1])


def test_any_key_gives_it_and_a_members_reads_it(system: System, url: str) -> None:
    with client(system, url, "predict") as asks, client(system, url, "member") as reads, Client(url) as nobody:
        given = asks.give_feedback({**GOOD, "comment": "ü"})
        assert (given.owner, given.model, given.model_ref) == ("the predict", "sha256:3", "chat@3")
        assert reads.feedback("chat") == [given]
        assert reads.feedback("other") == []
        with pytest.raises(ForbiddenError, match=r"data\.read"):
            asks.feedback()
        with pytest.raises(UnauthorizedError):
            nobody.give_feedback(GOOD)
        with pytest.raises(UnauthorizedError):
            nobody.feedback()


def test_a_version_that_is_none_of_ours_has_no_digest(system: System) -> None:
    beside = [{"content": "a", "model": "chat"}, {"content": "b", "endpoint": "other", "model": "other@77"}]
    found = system.give_feedback({**GOOD, "kind": "comparison", "answers": beside, "rating": "second"})
    assert [(answer["model"], answer["digest"]) for answer in found.answers] == [
        ("chat@3", "sha256:3"),
        ("other@77", ""),
    ]
    assert (found.endpoint, found.against, found.owner) == ("chat", "other", "")


def test_the_client_reads_every_page(system: System, url: str) -> None:
    for number in range(230):
        system.give_feedback({**GOOD, "comment": str(number)})
    with client(system, url, "member") as reads:
        assert [f.comment for f in reads.feedback(limit=1000)] == [str(number) for number in range(230)]
        assert [f.comment for f in reads.feedback("chat", after=228)] == ["228", "229"]
        assert len(reads.feedback(limit=150)) == 150


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"endpoint": "nope"}, NotFoundError),
        ({"answers": [{"content": "\ud800"}]}, InputError),
        ({"answers": [{"content": 3}]}, InputError),
        ({"rating": "great"}, InputError),
        ({"rating": 1}, InputError),
        ({"more": 1}, InputError),
        ({"comment": "x" * 5000}, TooLargeError),
        ({"messages": [{"role": "user", "content": "x" * (2 << 20)}]}, TooLargeError),
        ({"messages": "hi"}, InputError),
    ],
)
def test_bad_feedback_is_refused_and_nothing_is_kept(
    system: System, url: str, changes: dict[str, Any], kind: type[InputError]
) -> None:
    with client(system, url, "admin") as http:
        with pytest.raises(kind) as caught:
            http.give_feedback({**GOOD, **changes})
        assert caught.value.what
        assert http.feedback() == []


def test_pages_have_bounds(system: System, url: str) -> None:
    with client(system, url, "admin") as http:
        for query in ({"limit": 0}, {"limit": 101}, {"after": "x"}, {"after": 10**30}):
            with pytest.raises(InputError):
                http._get("/v1/feedback", query)


def test_the_command_line_lists_and_exports_it(system: System, url: str, tmp_path: Path) -> None:
    secret = system.make_key("ann", "member")[1]
    env = {"LLMO_URL": url, "LLMO_KEY": secret}
    said = llmo("feedback", "export", "chat", "--jsonl", "-", **env)
    assert said.code == 2
    assert "no feedback on 'chat'" in said.err
    system.give_feedback({**GOOD, "comment": "just right [/b]"})
    system.give_feedback({**GOOD, "rating": "bad", "answers": [{"content": "zwölf"}]})
    shown = llmo("feedback", "list", **env)
    assert "just right [/b]" in shown.out
    assert [entry["rating"] for entry in llmo("feedback", "list", "chat", "--json", **env).json] == ["good", "bad"]
    assert llmo("feedback", "list", "other", "--json", **env).json == []
    file = tmp_path / "pairs.jsonl"
    assert llmo("feedback", "export", "chat", "--jsonl", file, "--json", **env).json["rows"] == 1
    row = {
        "messages": ASKED,
        "chosen": [{"role": "assistant", "content": "12"}],
        "rejected": [{"role": "assistant", "content": "zwölf"}],
    }
    assert json.loads(file.read_text(encoding="utf-8")) == row
    out = llmo("feedback", "export", "chat", "--what", "conversations", "--jsonl", "-", **env).out
    assert json.loads(out) == {"messages": [*ASKED, *row["chosen"]]}
    assert llmo("feedback", "export", "chat", "--jsonl", tmp_path / "no" / "x", **env).code == 2
    assert llmo("feedback", "export", "chat", "--jsonl", tmp_path, **env).code == 2


@pytest.mark.parametrize(("what", "shape"), [("pairs", "preference"), ("conversations", "messages")])
def test_what_is_exported_is_data_to_train_on(tmp_path: Path, what: str, shape: str) -> None:
    words = ["amber", "birch", "copper", "dune", "ember", "fjord", "grove", "heath", "iris", "jade", "kelp", "lava"]
    with System(Settings.from_environment()) as system:
        system.store.endpoints.set("chat", job=None, model="sha256:3", model_ref="chat@3", task="generation")
        for word in words:
            asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {word}?"}]
            for rating, text in (("good", f"A kind of {word}."), ("bad", "No idea.")):
                system.give_feedback({**GOOD, "messages": asked, "answers": [{"content": text}], "rating": rating})
    file = tmp_path / "feedback.jsonl"
    assert llmo("feedback", "export", "chat", "--what", what, "--jsonl", file).code == 0
    made = llmo("data", "import", file, "--name", "chat-feedback", "--task", "generation", "--json").json
    assert (made["shape"], made["rows"]["read"], made["rows"]["dropped"]) == (shape, len(words), 0)
    row = llmo("data", "show", "chat-feedback", "--limit", "1", "--json").json["rows"][0]
    assert [m["role"] for m in json.loads(row["messages"])][:2] == ["system", "user"]
    assert (json.loads(row["rejected"])[0]["content"] == "No idea.") if what == "pairs" else "kind of" in row["text"]
