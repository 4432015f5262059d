"""The command line under bad input: a clear message, the right exit code, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from llmo.doors.cli.commands import run as run_command
from llmo.doors.server import running_server
from support.project import llmo, project
from support.serving import eventually

SPEC = """\
name: tickets
task: {name: text-classification, max_length: 32}
data: {source: tickets.csv, text: body, label: queue, split: {test: 0.2, dev: 0.2}}
model: base
"""
ROWS = "".join(f"word number {i} of it,{'ab'[i % 2]}\n" for i in range(30))
SPLIT = "text,label,split\n" + "".join(f"word {i} here,{'ab'[i % 2]},train\n" for i in range(20))


@dataclass(frozen=True)
class Told:
    code: int
    out: str
    err: str


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Told:
        code = run_command([str(a) for a in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        assert "does not know how to explain" not in said.out + said.err, said
        return Told(code, said.out, said.err)

    return run


COMMANDS = [
    (("chekc",), 2, "did you mean 'check'"),
    (("check",), 2, "see: llmo check --help"),
    (("check", "nope.yaml"), 2, "no such file"),
    (("check", "--resolvd", "x"), 2, "--resolved"),
    (("run", "."), 2, "is a folder"),
    (("data", "show", "nope"), 2, "no data set 'nope'"),
    (("data", "show", "nope", "--limit", "-1"), 2, "greater than or equal to 0"),
    (("data", "import", "x.csv"), 2, "--name"),
    (("data", "import", "", "--name", "x"), 2, "no source is named"),
    (("data", "import", "nope.csv", "--name", "x"), 2, "no file or folder"),
    (("data", "import", "package:", "--name", "x"), 2, "package:name/folder"),
    (("data", "import", "package:no-such-package", "--name", "x"), 2, "not installed"),
    (("data", "import", "package:numpy/nope", "--name", "x"), 2, "holds nothing"),
    (("data", "import", "/dev/zero", "--name", "x"), 2, "neither a file nor a folder"),
    (("data", "import", "/proc/self/mem", "--name", "x"), 2, "cannot be read"),
    (("data", "import", "x" * 5000, "--name", "x"), 2, "not a path"),
    (("data", "import", "pyproject.toml", "--name", "../x"), 2, "cannot be a name"),
    (("data", "import", "pyproject.toml", "--name", "x", "--task", "txt"), 2, "unknown task"),
    (("data", "import", "pyproject.toml", "--name", "x", "--set", "a"), 2, "key=value"),
    (("data", "import", "pyproject.toml", "--name", "x", "--set", "clen.x=1"), 2, "did you mean 'clean'"),
    (("data", "import", "pyproject.toml", "--name", "x", "--set", "clean=1", "--set", "clean.x=1"), 2, "value already"),
    (("data", "import", "pyproject.toml", "--name", "x", "--set", "clean=[1"), 2, "cannot read the value"),
    (("data", "import", "pyproject.toml", "--name", "x", "--set", "split.test=.nan"), 2, "finite"),
    (("train", "--data", "nope", "--model", "m", "--name", "x"), 2, "no data set"),
    (("compress", "nope"), 2, "no model 'nope'"),
    (("verify", "nope@3"), 2, "no model"),
    (("deploy", "nope"), 2, "no model"),
    (("deploy", "package:numpy", "--set", "qeue=1"), 2, "did you mean 'queue'"),  # before anything is fetched
    (("compress", "package:numpy", "--set", "varints=[fp32]"), 2, "did you mean 'variants'"),
    (("evaluate", ""), 2, "no model ''"),
    (("predict", "nope", "text"), 2, "no endpoint 'nope'"),
    (("predict", "nope", "text", "--file", "x"), 2, "twice"),
    (("predict", "nope", "--file", "no-such-file"), 2, "cannot read"),
    (("predict", "nope", "--batch", "0", "x"), 2, "--batch"),
    (("predict", "nope", "text", "--context", "a", "--pair", "b"), 2, "a context or a pair, not both"),
    (("logs", "999"), 2, "no job 999"),
    (("logs", "abc"), 2, "integer"),
    (("kill", "999"), 2, "no job 999"),
    (("kill", "9" * 30), 2, "too large"),
    (("ps", "--limit", "9" * 30), 2, "too large"),
    (("ps", "--limit", "0"), 2, "--limit"),
    (("endpoints", "--remove", "nope"), 2, "no endpoint"),
    (("key", "make", "me", "--role", "king"), 2, "no role"),
    (("key", "revoke", "nope"), 2, "llmo key list"),
    (("down",), 2, "no server"),
    (("up", "--host", "0.0.0.0"), 2, "other machines"),
    (("up", "--port", "99999"), 2, "--port"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "words"), COMMANDS, ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else ""
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_what_a_user_may_mistype(
    tell: Callable[..., Told], arguments: tuple[str, ...], code: int, words: str, as_json: bool
) -> None:
    told = tell(*arguments, *(["--json"] if as_json else []))
    assert told.code == code
    if as_json:
        error = json.loads(told.out)["error"]
        assert error["code"]
        assert not told.err
        assert words in " ".join(str(part) for part in error.values()).lower()
    else:
        assert words in told.err.lower()
        assert told.out == ""


@pytest.mark.parametrize("home", ["file", "file/below", "/proc/llmo", "/sys/llmo", "x" * 300])
@pytest.mark.parametrize("command", [["ps"], ["up", "--detach", "--port", "0"], ["key", "list"]], ids=" ".join)
def test_a_home_that_cannot_be_one(
    tell: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str, command: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMO_HOME", str(tmp_path / home))
    told = tell(*command)
    assert told.code == 1
    assert "LLMO_HOME" in told.err
    assert tell("doctor").code == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LLMO_CORES", "x"),
        ("LLMO_CORES", "0"),
        ("LLMO_MEMORY", "9.9.9G"),
        ("LLMO_MEMORY", "lots"),
        ("LLMO_DATABASE", "x"),
    ],
)
def test_environment_variables_that_make_no_sense(
    tell: Callable[..., Told], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    told = tell("ps")
    assert told.code == 2
    assert name in told.err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tickets.csv", "nope.csv", "no file or folder at '{folder}/nope.csv'"),
        ("model: base", "model: bass", "did you mean 'base'"),
        ("model: base", "model: tickets@7", "no model"),
        ("max_length: 32", "max_length: 5", "llmo.yaml:2"),
        ("test: 0.2,", "test: 0.2, tset: 1,", "did you mean 'test'"),
        ("text-classification", "text-clasification", "did you mean 'text-classification'"),
        ("text: body", 'text: "\\ud800"', "surrogate"),
        ("name: tickets", "name: a b", "letters, digits"),
    ],
)
def test_a_specification_with_a_mistake(
    tell: Callable[..., Told], tmp_path: Path, old: str, new: str, words: str
) -> None:
    (tmp_path / "tickets.csv").write_text("body,queue\n" + ROWS)
    (tmp_path / "base").mkdir()
    (tmp_path / "llmo.yaml").write_text(SPEC.replace(old, new))
    for command in ("check", "run"):
        told = tell(command, tmp_path / "llmo.yaml")
        assert told.code == 2
        assert words.format(folder=tmp_path) in told.err


def test_a_path_is_one_beside_its_file_and_not_in_the_current_folder(
    tell: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "llmo.yaml").write_text(SPEC)
    (tmp_path / "tickets.csv").write_text("body,queue\n" + ROWS)
    monkeypatch.chdir(tmp_path)
    told = tell("check", "sub/llmo.yaml")
    assert told.code == 2
    assert f"'{tmp_path}/sub/tickets.csv'" in told.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,label\n" + ROWS + '"open,a\nb,b\n', "x ü.csv:32: broken quoting"),
        (
            "text,label,split\n" + "".join(f"word {i} here,{'ab'[i % 2]},train\n" for i in range(20)) + "new,z,test\n",
            "'z' is in test but not in train",
        ),
        ("text,label\n" + ROWS.replace(",b", ",a"), "one class only"),
    ],
)
def test_a_source_with_a_mistake(tell: Callable[..., Told], tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "x ü.csv"
    file.write_text(content)
    told = tell("data", "import", file, "--name", "x")
    assert told.code == 2
    assert words in told.err
    assert tell("data", "list", "--json").out.strip() == "[]"


def test_text_with_brackets_is_shown_as_it_is(tell: Callable[..., Told], tmp_path: Path) -> None:
    file = tmp_path / "markup.csv"
    file.write_text("text,label\n" + "".join(f"[bold]word {i}[/foo],{['[red]', '[/x]'][i % 2]}\n" for i in range(20)))
    told = tell("data", "import", file, "--name", "x")
    assert told.code == 0, told.err
    assert "[red] 10" in told.out
    shown = tell("data", "show", "x").out
    assert "[bold]word" in shown
    assert "[/x]" in shown
    assert "no rows" in tell("data", "show", "x", "--dropped").out
    again = tell("data", "import", file, "--name", "other", "--json")
    assert json.loads(again.out)["ref"] == "other@1", "called by the name that was asked for"
    assert tell("deploy", "x").code == 2, "a data set is no model"


@pytest.fixture
def stranger() -> Iterator[str]:
    """A web server that is not LLMO's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_is_none(
    tell: Callable[..., Told], stranger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMO_HOME", str(tmp_path / "unused"))
    for url, words in [
        (stranger, "no LLMO server"),
        (stranger + "/deeper/", "no LLMO server"),
        ("http://127.0.0.1:1", "cannot be reached"),
        ("localhost:8420", "not the address"),
        ("http://[::1", "not the address"),
        ("ht tp://x", "not the address"),
        ("http://127.0.0.1:port", "not the address"),
    ]:
        monkeypatch.setenv("LLMO_URL", url)
        for command in (["ps"], ["key", "list"], ["predict", "x", "text"]):
            told = tell(*command)
            assert told.code == 5, url
            assert words in told.err
        assert json.loads(tell("ps", "--json").out)["error"]["code"] == "unreachable"
    monkeypatch.setenv("LLMO_URL", stranger)
    monkeypatch.setenv("LLMO_KEY", "schlüssel")
    assert tell("ps").code == 2
    assert not (tmp_path / "unused").exists()


def test_lines_that_are_no_text(tell: Callable[..., Told], tmp_path: Path) -> None:
    for content, words in [
        (b"fine\nb\xe4d\n", "lines:2: this line is not UTF-8 text (byte 2)"),
        (b"\xed\xa0\x80\n", "lines:1: this line is not UTF-8"),
        (b"\n  \n", "no text to predict"),
        (b"", "no text to predict"),
    ]:
        (tmp_path / "lines").write_bytes(content)
        told = tell("predict", "x", "--file", tmp_path / "lines", "--batch", "1")
        assert told.code == 2
        assert words in told.err or "no endpoint" in told.err


def test_a_port_that_is_taken(tell: Callable[..., Told], stranger: str) -> None:
    port = stranger.rpartition(":")[2]
    for detach in ([], ["--detach"]):
        told = tell("up", "--port", port, *detach)
        assert told.code == 1
        assert f"the port {port} is taken" in told.err
    assert tell("down").code == 2


def test_output_that_nobody_reads_to_the_end(tmp_path: Path) -> None:
    file = project(tmp_path / "p")
    process = subprocess.Popen(
        [sys.executable, "-m", "llmo.doors.cli", "check", "--resolved", str(file)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0
    assert err == b""


def test_an_encoding_that_lacks_a_letter(tmp_path: Path) -> None:
    (tmp_path / "naïve 中.csv").write_text("text,label\n" + ROWS.replace("word", "wörd"))
    said = llmo("data", "import", tmp_path / "naïve 中.csv", "--name", "x", PYTHONIOENCODING="ascii")
    assert said.code == 0
    assert "\\u2713" in said.out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        file = tmp_path / "x.csv"
        file.write_text("text,label\n" + ROWS)
        home = str(disk / "home")
        _fill(disk / "fill")
        first = llmo("data", "import", file, "--name", "x", LLMO_HOME=home)
        assert first.code == 1
        assert "full" in first.err
        (disk / "fill").unlink()
        assert llmo("data", "import", file, "--name", "x", LLMO_HOME=home).code == 0
        _fill(disk / "fill")
        second = llmo("data", "import", file, "--name", "x", "--fresh", "--json", LLMO_HOME=home)
        assert second.code == 1
        assert second.json["error"]["code"] == "storage"
        (disk / "fill").unlink()
        assert llmo("data", "list", "--json", LLMO_HOME=home).json[0]["name"] == "x", "nothing was lost"
        large = tmp_path / "large.csv"
        large.write_text("text,label\n" + "".join(f"{i} {'x' * 400} {i * i},{i % 2}\n" for i in range(12_000)))
        exact = ("--set", "clean.drop_duplicates=none")
        third = llmo("data", "import", large, "--name", "large", *exact, LLMO_HOME=home)
        assert third.code == 1, "the job itself filled the disk"
        assert "full" in third.err
        assert llmo("data", "import", file, "--name", "x", "--fresh", LLMO_HOME=home).code == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill(path: Path) -> None:
    try:
        with path.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
    except OSError:
        return


def test_a_server_whose_store_is_taken_away_stops(tmp_path: Path) -> None:
    home = tmp_path / "home"
    started = llmo("up", "--detach", "--port", "0", "--json")
    assert started.code == 0, started.err
    again = llmo("up", "--detach", "--port", "0")
    assert again.code == 2
    assert "already" in again.err
    pid = started.json["pid"]
    try:
        home.rename(tmp_path / "elsewhere")
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "the server to stop")
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    log = (tmp_path / "elsewhere" / "server.log").read_text()
    assert "was taken away" in log
    assert "Traceback" not in log
    (tmp_path / "elsewhere").rename(home)
    assert running_server(home) is None
    assert llmo("ps").code == 0


INTERRUPTS_AT = """
import linecache, os, signal, sys
from llmo.doors.cli.app import main

def trace(frame, event, argument):
    name = frame.f_code.co_filename
    if "llmo" not in name:
        return None
    if event == "line" and WORD in linecache.getline(name, frame.f_lineno):
        sys.settrace(None)
        os.kill(os.getpid(), signal.SIGINT)
    return trace

WORD, sys.argv = sys.argv[1], ["llmo", "ps"]
sys.settrace(trace)
main()
"""


@pytest.mark.parametrize("word", ["import typer", "from llmo.errors import", "run(sys.argv", "Store.open("])
def test_ctrl_c_at_any_moment_ends_in_a_word(word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTS_AT, word], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
