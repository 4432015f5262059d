"""Feedback: strict at the door, only ever appended, paged by number, and there in a store of an older version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text

import llmo.store
from llmo.errors import InputError, TooLargeError
from llmo.store import Store, migrate
from llmo.store.db import url_of
from llmo.store.feedback import MAX_BYTES, MAX_COMMENT, MAX_MESSAGES, MAX_TEXT, FeedbackLog, parse

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe?"}]


def entry(**changes: Any) -> dict[str, Any]:
    made = {"endpoint": "news", "kind": "rating", "messages": ASKED, "answers": [{"content": "12"}], "rating": "good"}
    return {key: value for key, value in {**made, **changes}.items() if value is not ...}


def parsed(**changes: Any) -> dict[str, Any]:
    found = parse(entry(**changes))
    for answer in found["answers"]:
        answer["digest"] = "sha256:0"
    return found


def comparison(**changes: Any) -> dict[str, Any]:
    both = [{"content": "a", "model": "m@1"}, {"content": "b", "endpoint": "other", "model": "m@2"}]
    return parsed(kind="comparison", answers=both, rating="second", **changes)


def test_what_was_said_is_kept_as_it_was_said(store: Store) -> None:
    good = store.feedback.append(parsed(comment="quick"), owner="ann")
    both = store.feedback.append(comparison(correction="c"), owner="bob")
    assert store.feedback.after() == [good, both]
    assert (good.id, good.owner, good.messages, good.rating, good.comment) == (1, "ann", ASKED, "good", "quick")
    assert (both.endpoint, both.against, both.model_ref, both.model) == ("news", "other", "m@1", "sha256:0")
    assert both.answers[1] == {"endpoint": "other", "model": "m@2", "content": "b", "digest": "sha256:0"}
    assert both.correction == "c"


def test_it_is_paged_by_number_and_scoped_by_endpoint(store: Store) -> None:
    for index in range(5):
        name = "news" if index % 2 else "chat"
        store.feedback.append(parsed(endpoint=name, comment=str(index)), owner="")
    beside = store.feedback.append(comparison(), owner="")
    pages = [store.feedback.after(0, limit=4)]
    pages.append(store.feedback.after(pages[0][-1].id, limit=4))
    assert [f.comment for page in pages for f in page] == ["0", "1", "2", "3", "4", ""]
    assert [f.comment for f in store.feedback.after(endpoint="chat")] == ["0", "2", "4"]
    assert store.feedback.after(endpoint="other") == [beside]
    assert store.feedback.after(endpoint="news", limit=1)[0].comment == "1"
    assert store.feedback.after(beside.id) == []


def test_nothing_takes_it_back() -> None:
    assert [name for name in vars(FeedbackLog) if not name.startswith("_")] == ["append", "after"]


def test_a_message_may_hold_calls_instead_of_content() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    assert parsed(messages=messages)["messages"] == messages


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"more": 1}, "", "unknown key 'more'"),
        ({"ratign": "good"}, "", "did you mean 'rating'"),
        ({"endpoint": ...}, "endpoint", "text"),
        ({"endpoint": ""}, "endpoint", "not empty"),
        ({"endpoint": 3}, "endpoint", "text"),
        ({"kind": "praise"}, "kind", "rating, comparison or correction"),
        ({"kind": ["rating"]}, "kind", "rating, comparison or correction"),
        ({"rating": ...}, "rating", "good, bad"),
        ({"rating": "first"}, "rating", "good, bad"),
        ({"rating": {"good": 1}}, "rating", "good, bad"),
        ({"correction": "x"}, "correction", "no correction"),
        ({"kind": "correction"}, "correction", "not empty"),
        ({"kind": "correction", "correction": " "}, "correction", "not empty"),
        ({"kind": "comparison", "rating": "first"}, "answers", "two answers"),
        ({"comment": 0}, "comment", "text"),
        ({"messages": ...}, "messages", "list of messages"),
        ({"messages": []}, "messages", "list of messages"),
        ({"messages": ["hi"]}, "messages[0]", "object"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "user", "content": "x", "more": 1}]}, "messages[0]", "unknown key"),
        ({"messages": [{"role": "user", "content": None, "tool_calls": []}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": ["f"]}]}, "messages[0].tool_calls", "objects"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "messages[0].name", "text"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, "messages[2].role", "answered"),
        ({"answers": []}, "answers", "one answer"),
        ({"answers": ["12"]}, "answers[0]", "object"),
        ({"answers": [{"content": 12}]}, "answers[0].content", "text"),
        ({"answers": [{"content": "x", "digest": "sha256:1"}]}, "answers[0]", "unknown key"),
        ({"answers": [{"content": "x", "endpoint": "other"}]}, "answers[0].endpoint", "own"),
        ({"answers": [{"content": "\ud800"}]}, "", "surrogate"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"a": float("nan")}]}]}, "", "not JSON"),
    ],
)
def test_what_is_no_feedback_is_refused_with_its_place(changes: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(entry(**changes))
    assert words in caught.value.what
    assert caught.value.where == where


@pytest.mark.parametrize(
    "changes",
    [
        {"comment": "x" * (MAX_COMMENT + 1)},
        {"answers": [{"content": "x" * (MAX_TEXT + 1)}]},
        {"kind": "correction", "correction": "x" * (MAX_TEXT + 1)},
        {"messages": [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)},
        {"messages": [{"role": "user", "content": "ü" * MAX_BYTES}]},
        {"answers": [{"content": "x", "model": "m" * 201}]},
    ],
)
def test_every_field_is_bounded(changes: dict[str, Any]) -> None:
    with pytest.raises(TooLargeError):
        parse(entry(**changes))


def test_an_old_store_gets_the_table_and_keeps_what_it_had(home: Path, url: str | None) -> None:
    home.mkdir()
    engine = create_engine(url_of(home, url))
    config = Config()
    config.set_main_option("script_location", str(Path(llmo.store.__file__).parent / "migrations"))
    with engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            text("INSERT INTO keys (id, owner, role, secret_sha256, created_at) VALUES ('k', 'ann', 'admin', 's', 1.0)")
        )
    engine.dispose()
    with Store.open(home, url) as store:
        assert [key.owner for key in store.keys.list()] == ["ann"]
        assert store.feedback.append(parsed(), owner="ann").id == 1
        with store._db.read() as connection:
            assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == migrate.HEAD


def test_what_is_kept_is_plain_json(store: Store) -> None:
    store.feedback.append(parsed(), owner="")
    with store._db.read() as connection:
        row = connection.execute(text("SELECT messages, answers FROM feedback")).one()
    messages, answers = (json.loads(v) if isinstance(v, str) else v for v in row)
    assert messages == ASKED
    assert answers[0]["content"] == "12"
