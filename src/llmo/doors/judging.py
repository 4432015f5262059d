"""Two endpoints that generate, compared on held-out questions by a third that judges."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from llmo.api import Api
from llmo.doors import flow
from llmo.doors.gateway import Door, gateway
from llmo.doors.sampling import checked
from llmo.doors.talk import Answer, ask
from llmo.errors import (
    BusyError,
    DataError,
    ForbiddenError,
    InputError,
    LLMOError,
    NotFoundError,
    UnauthorizedError,
)
from llmo.tasks import pairwise
from llmo.types import Kind

AT_ONCE = 8  # questions under way
MOST_ROWS, PAGE = 10_000, 500
BUSY_SECONDS, BUSY_TRIES = 1.0, 60  # a full endpoint is asked again
SETTINGS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 256}  # of the answers, unless told

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation up to where somebody answers, and the answer that the data holds."""

    messages: list[Message]
    reference: str


@dataclass(frozen=True, slots=True)
class Judged:
    """Both answers, and what the judge said with the first one shown as A and as B; or why this one was left out."""

    question: Question
    answers: tuple[str, str] = ("", "")
    verdicts: tuple[str, str] = ("tie", "tie")
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """`by` judges `first` against `second`; `settings` are those of their answers, over `SETTINGS`."""

    first: str
    second: str
    by: str
    settings: Mapping[str, Any]
    criterion: str = ""
    reference: bool = True


def contest(
    api: Api,
    match: Match,
    *,
    data: str | None = None,
    split: str = "test",
    rows: int = 32,
    watch: Callable[[Iterable[Judged], int], Iterable[Judged]] = lambda judged, total: judged,
) -> list[Judged]:
    """The match on questions of `data` (default: what the first model was trained on), over a door of its own;
    endpoints that rest are started. `watch` sees the verdicts pass and is told how many will."""
    checked(match.settings)
    _check(api, match)
    asked = _questions(api, data or _data_of(api, match.first), split, rows)
    with gateway(api) as door:
        for name in (match.first, match.second, match.by):
            door.awake(name)
        with closing(judge(door, match, asked)) as judged:
            return list(watch(judged, len(asked)))


def judge(door: Door, match: Match, asked: Sequence[Question]) -> Generator[Judged, None, None]:
    """One for each question, in their order. Left early, what is under way is cancelled.

    A question that an endpoint refuses (it may be longer than a context) is left out and says so; other errors are
    raised.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(AT_ONCE, "judge")
    try:
        yield from pool.map(lambda question: _judged(_asker(door, stop), match, question), asked)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def result(match: Match, judged: Sequence[Judged]) -> dict[str, Any]:
    """The match and its figures. Raises InputError when no question could be judged."""
    counted = [one.verdicts for one in judged if not one.problem]
    if not counted:
        raise InputError(f"no question could be judged: {judged[0].problem}", hint="see: llmo endpoints")
    named = {"first": match.first, "second": match.second, "by": match.by}
    return {**named, "questions": len(judged), "left_out": len(judged) - len(counted), **pairwise.measure(counted)}


def line(one: Judged) -> str:
    """One pair as a line of JSON."""
    told: dict[str, Any] = {"messages": one.question.messages, "reference": one.question.reference}
    if one.problem:
        told["problem"] = one.problem
    else:
        told |= {"answers": one.answers, "verdicts": one.verdicts, "points": pairwise.points(one.verdicts)}
    return json.dumps(told, ensure_ascii=False) + "\n"


def _check(api: Api, match: Match) -> None:
    """Raises InputError unless three endpoints that generate are named, and two of them differ."""
    if match.first == match.second:
        raise InputError(f"'{match.first}' cannot be compared with itself", hint="name two endpoints or adapters")
    known = {endpoint.name: endpoint for endpoint in api.endpoints()}
    for name in (match.first, match.second, match.by):
        found = known.get(flow.asked(api, name)[0])
        if found is not None and found.task != "generation":
            raise InputError(f"'{name}' writes no text, it is for {found.task}", hint="see: llmo endpoints")


def _data_of(api: Api, name: str) -> str:
    """The digest of the data set that the model behind an endpoint, or its adapter, was trained on."""
    served, adapter = flow.asked(api, name)
    found = next((endpoint.model for endpoint in api.endpoints() if endpoint.name == served), None)
    if adapter is not None:
        found = next((known.model for known in api.adapters(served) if known.name == adapter), None)
    if found is None:
        raise InputError(f"nothing is deployed as '{name}'", hint="see: llmo endpoints, llmo adapters")
    return flow.data_of(api, api.artifact(found, Kind.MODEL))


def _questions(api: Api, data: str, split: str, count: int) -> list[Question]:
    """At most `count`, evenly spread over the split's first `MOST_ROWS`. Raises DataError when there is none."""
    rows: list[dict[str, Any]] = []
    while len(rows) < MOST_ROWS and (page := api.rows(data, split, offset=len(rows), limit=PAGE)):
        rows += page
    found = [question for row in rows if (question := _question(row)) is not None]
    if not found:
        raise DataError(
            f"the split '{split}' has no conversation that ends with an answer", hint="another --split, or --data"
        )
    step = max(1.0, len(found) / count)
    return [found[int(i * step)] for i in range(min(count, len(found)))]


_Ask = Callable[[str, Sequence[Message], Mapping[str, Any]], str]


def _judged(said: _Ask, match: Match, question: Question) -> Judged:
    try:
        first, second = (
            said(name, question.messages, {**SETTINGS, **match.settings}) for name in (match.first, match.second)
        )
        if first == second:
            return Judged(question, (first, second))
        as_a, as_b = (_verdict(said, match, question, a, b) for a, b in ((first, second), (second, first)))
    except (NotFoundError, ForbiddenError, UnauthorizedError):
        raise
    except InputError as error:
        return Judged(question, problem=str(error))
    return Judged(question, (first, second), (as_a, as_b))


def _verdict(said: _Ask, match: Match, question: Question, a: str, b: str) -> str:
    reference = question.reference if match.reference else ""
    messages = pairwise.request(question.messages, a, b, reference=reference, criterion=match.criterion)
    told = said(match.by, messages, {"temperature": 0, "max_tokens": 8, "regex": pairwise.VERDICT})
    if told not in pairwise.POINTS:
        raise LLMOError(f"the judge '{match.by}' said {told!r}, which is no verdict", hint="take another endpoint")
    return told


def _asker(door: Door, stop: threading.Event) -> _Ask:
    def said(name: str, messages: Sequence[Message], settings: Mapping[str, Any]) -> str:
        tries = 0
        while True:
            answer = Answer()
            try:
                with closing(ask(door.url, door.key, name, messages, settings, answer)) as pieces:
                    for _ in pieces:
                        if stop.is_set():
                            break
                return answer.text
            except BusyError:
                tries += 1
                if tries == BUSY_TRIES or stop.wait(BUSY_SECONDS):
                    raise

    return said


def _question(row: Mapping[str, Any]) -> Question | None:
    """A row's last answer and what stands before it; None for a plain text, and where tools would be called."""
    messages: list[Message] = json.loads(row["messages"]) if row.get("messages") else []
    if row.get("chosen"):
        messages = [*messages, *json.loads(row["chosen"])]
    answers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    if row.get("tools") or not answers or not answers[-1]:
        return None
    return Question(messages[: answers[-1]], str(messages[answers[-1]].get("content") or ""))
