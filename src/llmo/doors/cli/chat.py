"""`llmo chat`: talks to an endpoint that generates, in a terminal or a script."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from llmo.api import Api
from llmo.doors import flow
from llmo.doors.cli import lines
from llmo.doors.cli.given import assignments
from llmo.doors.cli.outfile import place
from llmo.doors.cli.show import Json, console, emit
from llmo.doors.sampling import checked
from llmo.errors import InputError, LLMOError
from llmo.files import publish

HELP = """\
/help                    this
/reset                   forget the conversation (the system message and settings stay)
/system TEXT             the system message; - takes it away
/set NAME=VALUE          a setting (temperature, top_p, max_tokens, seed, stop ...); NAME= takes it back
/rate good|bad COMMENT   say what you think of the last answer; it is kept as feedback
/save FILE               write the conversation as a line of JSON that `llmo data import` reads
/quit                    leave, as Ctrl-D does
A line that ends in \\ goes on in the next; \"\"\" begins and ends several lines. Ctrl-C stops an answer."""
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the answers, as temperature=0.2.")
]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def register(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    endpoint: Annotated[str, typer.Argument(help="The endpoint, or one of its adapters as ENDPOINT:NAME.")],
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    once: Annotated[str | None, typer.Option(help="One question, then end; '-' reads it from standard input.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Talk to an endpoint that generates. Type /help there; lines from a pipe are said one after the other.

    Example: llmo chat assistant --once "What is a cat?" --set temperature=0.2
    """
    from llmo.doors.gateway import gateway  # the HTTP stack is only needed here

    given = checked(assignments(settings))
    with closing(flow.connect()) as api:
        served, _ = flow.asked(api, endpoint)
        _check(api, served)
        with gateway(api) as door:
            door.awake(endpoint)
            talk = Chat(api, (door.url, door.key), endpoint, served, system, given, as_json)
            if once is not None:
                talk.say(lines.whole_pipe() if once == "-" else once)
            elif sys.stdin.isatty():
                talk.interactive()
            else:
                talk.follow(lines.from_pipe())


def _check(api: Api, endpoint: str) -> None:
    """Raises InputError for an endpoint that writes no text; what is none is left to whoever looks for it."""
    found = next((known for known in api.endpoints() if known.name == endpoint), None)
    if found is not None and found.task != "generation":
        raise InputError(
            f"'{endpoint}' writes no text, it is for {found.task}", hint=f"llmo predict {endpoint} 'a text'"
        )


def harmless(text: str) -> str:
    """What a model wrote without what would steer a terminal: its colours, its title, its clipboard."""
    return _CONTROL.sub("", text)


class Chat:
    """One conversation: what was said, the settings, and the last answer, which can be rated. `endpoint` is the name
    that is asked, `served` the endpoint that it means."""

    def __init__(
        self,
        api: Api,
        door: tuple[str, str],
        endpoint: str,
        served: str,
        system: str | None,
        settings: dict[str, Any],
        as_json: bool,
    ) -> None:
        self._api = api
        self._door = door
        self._endpoint = endpoint
        self._served = served
        self._system = system
        self._settings = settings
        self._as_json = as_json
        self._said: list[dict[str, Any]] = []
        self._last: dict[str, Any] | None = None  # feedback on the last answer, but for the rating
        self._saved: set[Path] = set()

    def interactive(self) -> None:
        """Until Ctrl-D; what goes wrong is said, and the conversation goes on."""
        self._note(f"{self._endpoint}: /help shows what there is, Ctrl-D leaves")
        for text in lines.spoken(lines.from_terminal):
            if text.strip() == "/quit":
                return
            try:
                self._do(text)
            except KeyboardInterrupt:
                self._note("(stopped)")
            except LLMOError as error:
                sys.stderr.write(f"{error}\n" + (f"  {error.hint}\n" if error.hint else ""))

    def follow(self, read: Callable[[str], str | None]) -> None:
        """What a pipe says, one after the other; the first thing that goes wrong ends it."""
        for text in lines.spoken(read):
            if text.strip() == "/quit":
                return
            self._do(text)

    def _do(self, text: str) -> None:
        name, _, rest = text.strip().partition(" ")
        if not re.fullmatch(r"/[a-z]+", name):
            self.say(text)
            return
        command = {
            "/help": lambda _: self._note(HELP),
            "/reset": self._reset,
            "/system": self._set_system,
            "/set": self._set,
            "/rate": self._rate,
            "/save": self._save,
        }.get(name)
        if command is None:
            raise InputError(f"there is no command {name}", hint="/help shows those there are")
        command(rest.strip())

    def say(self, question: str) -> None:
        """Ask, and show the answer as it comes. One that is stopped is kept as far as it got."""
        from llmo.doors.talk import Answer, ask  # with the HTTP stack

        if not question.strip():
            raise InputError("there is no question", hint="give one with --once, or through a pipe")
        asked = [*self._messages(), {"role": "user", "content": question}]
        answer, began, stopped = Answer(), time.monotonic(), True
        try:
            with closing(ask(*self._door, self._endpoint, asked, self._settings, answer)) as pieces:
                for piece in pieces:
                    self._show(piece)
            stopped = False
        finally:
            if answer.text:
                self._said += [asked[-1], {"role": "assistant", "content": answer.text}]
                told = {"content": answer.text, **({"model": answer.model} if answer.model else {})}
                self._last = {"endpoint": self._served, "messages": asked, "answers": [told]}
            if not self._as_json and (answer.text or not stopped):
                sys.stdout.write("\n")
        self._tell(question, answer, time.monotonic() - began)

    def _messages(self) -> list[dict[str, Any]]:
        return [*([{"role": "system", "content": self._system}] if self._system else []), *self._said]

    def _show(self, piece: str) -> None:
        if not self._as_json:
            sys.stdout.write(harmless(piece) if console.is_terminal else piece)
            sys.stdout.flush()

    def _tell(self, question: str, answer: Any, seconds: float) -> None:
        said = {"endpoint": self._endpoint, "model": answer.model, "question": question, "answer": answer.text}
        emit(
            {**said, "finish_reason": answer.finish, "usage": answer.usage, "seconds": round(seconds, 3)},
            self._as_json,
            lambda: self._figures(answer, seconds) if console.is_terminal else None,
        )
        sys.stdout.flush()

    def _figures(self, answer: Any, seconds: float) -> None:
        tokens = answer.usage.get("completion_tokens")
        cut = ", cut at the limit" if answer.finish == "length" else ""
        self._note(f"{tokens} tokens in {seconds:.1f} s{cut}" if tokens is not None else f"{seconds:.1f} s{cut}")

    def _note(self, text: str) -> None:
        """Our own words: beside the answers in a terminal, apart from them in a script."""
        if self._as_json or not console.is_terminal:
            sys.stderr.write(f"{text}\n")
        else:
            console.print(text, style="dim", markup=False, soft_wrap=True)

    # -- commands

    def _reset(self, _: str) -> None:
        self._said, self._last = [], None
        self._note("the conversation begins anew")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = None if text == "-" else text
        self._note(f"system: {self._system}" if self._system else "there is no system message")

    def _set(self, text: str) -> None:
        name, equals, value = (part.strip() for part in text.partition("="))
        if text and not equals:
            raise InputError(f"'{text}' is not NAME=VALUE", hint="like /set temperature=0.2")
        if text and not value:
            self._settings = {key: kept for key, kept in self._settings.items() if key != name}
        elif text:
            self._settings = {**self._settings, **checked(assignments([f"{name}={value}"]))}
        shown = ", ".join(f"{key}={kept}" for key, kept in self._settings.items())
        self._note(shown or "every setting is the endpoint's own")

    def _rate(self, text: str) -> None:
        rating, _, comment = text.partition(" ")
        if rating not in ("good", "bad"):
            raise InputError("an answer is rated good or bad", hint="like /rate bad it made the name up")
        if self._last is None:
            raise InputError("there is no answer to rate yet")
        self._api.give_feedback({**self._last, "kind": "rating", "rating": rating, "comment": comment.strip()})
        self._note(f"kept as feedback: {rating}")

    def _save(self, text: str) -> None:
        if not text or not self._said:
            raise InputError("there is nothing to save yet" if text else "say where to", hint="like /save talk.jsonl")
        path = place(text)
        if path.exists() and path not in self._saved:
            raise InputError(f"{path} is there already", hint="save under another name")
        publish(path, json.dumps({"messages": self._messages()}, ensure_ascii=False) + "\n")
        self._saved.add(path)
        self._note(f"saved {len(self._said) // 2} questions and answers in {path}")
