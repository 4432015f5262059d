"""`llmo chat` with a model that really answers: for scripts and for people, stopped, refused, and without a server."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmo.doors.cli.chat import HELP, harmless
from llmo.doors.sampling import SETTINGS
from llmo.settings import Settings
from llmo.system import System
from llmo.types import Kind, Needs
from support.chatting import VERSION, Place, chat_place
from support.project import Said, llmo
from support.serving import PATIENCE, deploy, eventually, served_chat_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with chat_place(tmp_path_factory.mktemp("place")) as found:
        yield found


def chat(place: Place, *arguments: str | Path, stdin: str = "", key: str | None = None) -> Said:
    return llmo("chat", "assistant", *arguments, stdin=stdin, **place.env(key))


SHORT = ("--set", "max_tokens=8", "--set", "temperature=0")


def test_one_question_is_one_answer_and_its_usage(place: Place) -> None:
    said = chat(place, "--once", "Hello there", "--json", *SHORT, key=place.asking)
    assert said.code == 0
    [line] = said.out.splitlines()
    found = json.loads(line)
    assert (found["endpoint"], found["model"], found["question"]) == ("assistant", VERSION, "Hello there")
    assert (found["finish_reason"], found["usage"]["completion_tokens"]) == ("length", 8)
    plain = chat(place, "--once", "-", *SHORT, stdin="Hello there")
    assert (plain.code, plain.out, plain.err) == (0, found["answer"] + "\n", "")


def test_a_system_message_and_a_seed_are_heeded(place: Place) -> None:
    seeded = ("--json", "--set", "max_tokens=8", "--set", "seed=5", "--once", "Hello")
    one, same, other = (chat(place, *seeded, *more).json for more in ((), (), ("--system", "Be brief.")))
    assert one["answer"] == same["answer"]
    assert other["usage"]["prompt_tokens"] > one["usage"]["prompt_tokens"]


def test_a_pipe_is_a_conversation(place: Place, tmp_path: Path) -> None:
    before = len(place.system.feedback())
    file = tmp_path / "talk.jsonl"
    script = [
        "Hello", "/rate good very [b] good", "/system Be brief.", '"""', "two", "lines", '"""', "/rate bad",
        "/set seed=3", "/set", f"/save {file}", "/help", "/reset", "again\\", "and on", "/quit", "never said",
    ]  # fmt: skip
    said = chat(place, "--json", *SHORT, stdin="\n".join(script))
    assert said.code == 0, said.err
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [found["question"] for found in answers] == ["Hello", "two\nlines", "again\nand on"]
    good, bad = place.system.feedback()[before:]
    assert (good.rating, good.comment, good.owner, good.model_ref) == ("good", "very [b] good", "ann", VERSION)
    assert good.messages == [{"role": "user", "content": "Hello"}]
    assert [m["role"] for m in bad.messages] == ["system", "user", "assistant", "user"]
    assert bad.answers[0]["content"] == answers[1]["answer"]
    saved = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert saved == [*bad.messages, {"role": "assistant", "content": answers[1]["answer"]}]
    assert "max_tokens=8, temperature=0, seed=3" in said.err
    assert HELP in said.err


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        (["--once", " "], "", 2, "no question"),
        (["--once", "x", "--set", "temprature=1"], "", 2, "did you mean 'temperature'"),
        (["--once", "x", "--set", "temperature=.nan"], "", 2, "cannot be nan"),
        (["--once", "x", "--set", "temperature=9"], "", 2, "temperature"),
        (["--once", "x", "--set", "max_tokens=[1]"], "", 2, "max_tokens"),
        (["--once", "-"], "long " * 40_000, 2, "context"),
        ([], "/nope", 2, "no command /nope"),
        ([], "/rate good", 2, "no answer to rate"),
        ([], "/rate great", 2, "good or bad"),
        ([], "/save x.jsonl", 2, "nothing to save"),
        ([], "/save", 2, "say where"),
        ([], "/set seed", 2, "NAME=VALUE"),
    ],
)
def test_what_cannot_be_is_said_and_ends_a_script(
    place: Place, arguments: list[str], stdin: str, code: int, words: str
) -> None:
    said = chat(place, *arguments, stdin=stdin)
    assert (said.code, said.out) == (code, "")
    assert words in said.err


def test_a_file_that_is_there_is_not_overwritten(place: Place, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for name, words in ((tmp_path / "mine.txt", "there already"), (tmp_path / "no" / "x", "no folder")):
        said = chat(place, *SHORT, stdin=f"Hello\n/save {name}\n")
        assert said.code == 2
        assert words in said.err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_doors_that_are_shut(place: Place) -> None:
    assert chat(place, "--once", "x", "--json", key="llmo_nope").json["error"]["code"] == "unauthorized"
    unknown = llmo("chat", "nope", "--once", "x", "--json", **place.env())
    assert (unknown.code, unknown.json["error"]["code"]) == (2, "not_found")
    other = llmo("chat", "news", "--once", "x", **place.env())
    assert other.code == 2
    assert "llmo predict news" in other.err
    gone = llmo("chat", "assistant", "--once", "x", LLMO_URL="http://127.0.0.1:9", LLMO_KEY="")
    assert gone.code == 5


# Makes standard input the terminal whose Ctrl-C this process hears.
_WITH_TERMINAL = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Terminal:
    """`llmo chat` as a person has it before them."""

    def __init__(self, place: Place, *arguments: str) -> None:
        self._mine, theirs = pty.openpty()
        command = [sys.executable, "-c", _WITH_TERMINAL, "-m", "llmo.doors.cli", "chat", "assistant", *arguments]
        env = {**os.environ, **place.env(), "TERM": "dumb", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def until(self, words: str) -> None:
        """Read until these words have been shown."""
        while words not in self.seen:
            self._read()

    def _read(self) -> None:
        ready, _, _ = select.select([self._mine], [], [], PATIENCE)
        assert ready, f"nothing more came: {self.seen[-2000:]}"
        self.seen += os.read(self._mine, 4096).decode("utf-8", "replace")

    def prompted(self, words: str) -> None:
        """Read until these words and then a prompt have been shown: what is typed before it may be lost."""
        self.until(words)
        self.seen = self.seen.partition(words)[2]
        self.until("\n> ")

    def answering(self, asked: str) -> None:
        """Read until something that is not blank follows the echo of a question."""
        self.until(asked)
        while not self.seen.partition(asked)[2].strip():
            self._read()

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self._mine, text.encode())

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._mine)


def test_ctrl_c_stops_the_answer_where_it_is_written_and_the_chat_goes_on(tmp_path: Path) -> None:
    endless = ("--set", "max_tokens=60000", "--set", "temperature=0")
    with chat_place(tmp_path, endless=True) as place, Terminal(place, *endless) as terminal:
        terminal.prompted("Ctrl-D leaves")
        terminal.type("Hello there\n")
        terminal.answering("Hello there")  # one stopped before anything was shown is no answer to rate
        terminal.type("\x03")
        terminal.prompted("(stopped)")
        eventually(lambda: place.streams() == 0, "the model has stopped")
        terminal.type("/rate bad too long\n")
        terminal.prompted("kept as feedback")
        terminal.type("/nope\n")
        terminal.prompted("no command /nope")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
        [kept] = place.system.feedback()
    assert (kept.rating, kept.comment) == ("bad", "too long")


def test_without_a_server_the_endpoint_is_started_here_and_gone_afterwards(tmp_path: Path) -> None:
    home = tmp_path / "home"
    folder = served_chat_model(tmp_path / "model")
    card: dict[str, Any] = json.loads((folder / "llmo.json").read_text())
    with System(Settings(home=home)) as system:
        model = system.save(folder, "assistant", card, Kind.MODEL)
        spec = deploy(cache_mib=64) | {"endpoint": "assistant"}
        job = system.store.jobs.insert(
            op="serve", spec=spec, inputs={"model": model.digest}, needs=Needs(), service=True, name="assistant"
        )
        system.store.endpoints.set("assistant", job=job.id, model=model.digest, state="down", task="generation")
    found = llmo("chat", "assistant", "--once", "Hello there", "--json", *SHORT, LLMO_HOME=str(home)).json
    assert (found["model"], found["usage"]["completion_tokens"]) == (model.ref, 8)
    with System(Settings(home=home)) as system:
        assert [endpoint.state for endpoint in system.endpoints()] == ["down"]
        assert all(key.revoked_at is not None for key in system.api_keys())


def test_the_help_names_settings_that_there_are() -> None:
    named = HELP[HELP.index("a setting (") :].split(")")[0].removeprefix("a setting (").replace(" ...", "")
    assert set(named.split(", ")) <= set(SETTINGS)


def test_what_a_model_writes_does_not_steer_the_terminal() -> None:
    assert harmless("\x1b[2J\x1b]52;c;eA==\x07a\tb\nü\r\x9b31m\x7f😀") == "[2J]52;c;eA==a\tb\nü31m😀"
