"""Feedback: what people say of answers, read strictly and only ever appended."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import RowMapping, insert, or_, select

from llmo.errors import InputError, TooLargeError, nearest
from llmo.store.db import Database
from llmo.store.schema import feedback as table
from llmo.types import Feedback

# What each kind says: how many answers it is about, and the words its rating may be.
KINDS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "rating": (1, ("good", "bad")),
    "comparison": (2, ("first", "second", "tie")),
    "correction": (1, ("good", "bad")),
}
MAX_MESSAGES = 500
MAX_TEXT = 65_536  # characters of an answer or a correction
MAX_COMMENT = 4_000
MAX_NAME = 200
MAX_BYTES = 512 << 10  # of all of it as JSON
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = ("endpoint", "kind", "messages", "answers", "rating", "correction", "comment")
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
_ANSWER_KEYS = ("endpoint", "model", "content")


class FeedbackLog:
    """Numbers grow in the order of writing; nothing is changed or taken back: a later word counts more."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def append(self, entry: Mapping[str, Any], *, owner: str) -> Feedback:
        """Keep one entry of `parse`, whose answers have been given their `digest`s."""
        first, *others = entry["answers"]
        values = {
            "at": time.time(),
            "endpoint": first["endpoint"],
            "against": others[0]["endpoint"] if others else None,
            "model": first["digest"],
            "model_ref": first["model"],
            "owner": owner,
            **{key: entry[key] for key in ("kind", "messages", "answers", "rating", "correction", "comment")},
        }
        with self._db.write() as connection:
            id = connection.execute(insert(table).values(**values).returning(table.c.id)).scalar_one()
        return Feedback(id=id, **values)

    def after(self, id: int = 0, *, endpoint: str | None = None, limit: int = 100) -> list[Feedback]:
        """Entries newer than number `id`, oldest first; of an endpoint, whichever side of a comparison it was."""
        query = select(table).where(table.c.id > id).order_by(table.c.id).limit(limit)
        if endpoint is not None:
            query = query.where(or_(table.c.endpoint == endpoint, table.c.against == endpoint))
        with self._db.read() as connection:
            return [_decode(row) for row in connection.execute(query).mappings()]


def parse(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with every field there, or InputError that says which is wrong; TooLargeError over a bound.

    `{"endpoint", "kind", "messages", "answers": [{"content", "model"?, "endpoint"?}], "rating"?, "correction"?,
    "comment"?}`; an answer without an endpoint is the entry's.
    """
    _known(entry, _KEYS, "")
    _sound(entry)
    endpoint = _text(entry.get("endpoint"), "endpoint", MAX_NAME)
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError("'kind' is rating, comparison or correction", where="kind")
    count, words = KINDS[kind]
    rating, correction = entry.get("rating"), entry.get("correction")
    if (rating is not None or kind != "correction") and rating not in words:
        raise InputError(f"the rating of a {kind} is one of: {', '.join(words)}", where="rating")
    if correction is not None and kind == "rating":
        raise InputError("a rating has no correction", where="correction", hint="send it as kind 'correction'")
    if correction is not None or kind == "correction":
        correction = _text(correction, "correction", MAX_TEXT)
    return {
        "kind": kind,
        "messages": _messages(entry.get("messages")),
        "answers": _answers(entry.get("answers"), endpoint, count, kind),
        "rating": rating,
        "correction": correction,
        "comment": _text(_told(entry, "comment", ""), "comment", MAX_COMMENT, empty=True),
    }


def _sound(entry: Mapping[str, Any]) -> None:
    """Refuse what is no JSON, holds half a surrogate pair, or is larger than anything anyone writes."""
    try:
        size = len(json.dumps(dict(entry), ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError:
        raise InputError(
            "a text holds half of a surrogate pair, which no valid text does",
            hint="decode the text as UTF-8 with errors='replace' before sending it",
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"this is not JSON: {error}") from None
    if size > MAX_BYTES:
        raise TooLargeError(f"feedback of {size} bytes; the limit is {MAX_BYTES}", hint="send a shorter conversation")


def _messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise InputError("'messages' is the list of messages that were answered", where="messages")
    if len(given) > MAX_MESSAGES:
        raise TooLargeError(f"{len(given)} messages; the limit is {MAX_MESSAGES}", where="messages")
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InputError("a message is an object", where=where, hint='like {"role": "user", "content": "..."}')
        _known(message, _MESSAGE_KEYS, where)
        if message.get("role") not in _ROLES:
            raise InputError(f"a message's role is one of: {', '.join(_ROLES)}", where=f"{where}.role")
        _content(message, where)
    if given[-1]["role"] not in ("user", "tool"):
        raise InputError(
            "the last message is the one that was answered, so its role is user or tool",
            where=f"messages[{len(given) - 1}].role",
            hint="send what was answered in 'answers'",
        )
    return [dict(message) for message in given]


def _content(message: Mapping[str, Any], where: str) -> None:
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InputError("'tool_calls' is a list of objects", where=f"{where}.tool_calls")
    if not isinstance(message.get("content"), str) and not (calls and message.get("content") is None):
        raise InputError("a message's content is a text", where=f"{where}.content")
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            _text(message[key], f"{where}.{key}", MAX_NAME)


def _answers(given: Any, endpoint: str, count: int, kind: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or len(given) != count:
        few = "one answer" if count == 1 else "two answers"
        raise InputError(f"a {kind} is about {few}", where="answers", hint='like [{"content": "..."}]')
    found = []
    for index, answer in enumerate(given):
        where = f"answers[{index}]"
        if not isinstance(answer, dict):
            raise InputError("an answer is an object", where=where, hint='like {"content": "...", "model": "name@1"}')
        _known(answer, _ANSWER_KEYS, where)
        found.append(
            {
                "endpoint": _text(_told(answer, "endpoint", endpoint), f"{where}.endpoint", MAX_NAME),
                "model": _text(_told(answer, "model", ""), f"{where}.model", MAX_NAME, empty=True),
                "content": _text(answer.get("content"), f"{where}.content", MAX_TEXT, empty=True),
            }
        )
    if found[0]["endpoint"] != endpoint:
        raise InputError("the first answer is the endpoint's own", where="answers[0].endpoint")
    return found


def _known(given: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in keys:
            name = str(key)[:80]
            raise InputError(
                f"unknown key '{name}'{nearest(name, list(keys))}", where=where, hint=f"known: {', '.join(keys)}"
            )


def _told(given: Mapping[str, Any], key: str, default: str) -> Any:
    """The value of a key that may be left out or null."""
    found = given.get(key)
    return default if found is None else found


def _text(given: Any, where: str, limit: int, *, empty: bool = False) -> str:
    if not isinstance(given, str) or not (given.strip() or empty):
        raise InputError(f"'{where}' is a text{'' if empty else ' that is not empty'}", where=where)
    if len(given) > limit:
        raise TooLargeError(f"{len(given)} characters; the limit is {limit}", where=where)
    return given


def _decode(row: RowMapping) -> Feedback:
    return Feedback(**row)
