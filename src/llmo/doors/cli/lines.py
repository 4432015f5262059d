"""Reads what is said in a chat: a line, several lines, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from llmo.errors import InputError

PROMPT, MORE = "> ", ". "
BLOCK = '"""'


def spoken(read: Callable[[str], str | None]) -> Iterator[str]:
    """What is said, one thing at a time, until `read` (which is given a prompt) returns None.

    A line that ends in a backslash goes on in the next; what begins with three quotes goes on until three more.
    """
    while (line := read(PROMPT)) is not None:
        text = _block(line, read) if line.lstrip().startswith(BLOCK) else _continued(line, read)
        if text.strip():
            yield text


def _continued(line: str, read: Callable[[str], str | None]) -> str:
    found = []
    while line.endswith("\\"):
        found.append(line[:-1])
        more = read(MORE)
        if more is None:
            return "\n".join(found)
        line = more
    return "\n".join([*found, line])


def _block(line: str, read: Callable[[str], str | None]) -> str:
    text = line.lstrip().removeprefix(BLOCK)
    while not text.rstrip().endswith(BLOCK):
        more = read(MORE)
        if more is None:
            return text
        text += "\n" + more
    return text.rstrip().removesuffix(BLOCK).strip("\n")


def from_terminal(prompt: str) -> str | None:
    """A line typed by a person, with their terminal's editing; None at Ctrl-D. Nothing of it is kept on disk."""
    import readline  # noqa: F401  (gives `input` its editing; only somebody who types needs it)

    while True:
        try:
            return input(prompt)
        except EOFError:
            sys.stdout.write("\n")
            return None
        except UnicodeDecodeError:
            sys.stderr.write("that was not UTF-8 text; it was left out\n")
        except KeyboardInterrupt:
            sys.stdout.write("\n(Ctrl-D leaves)\n")


def from_pipe() -> Callable[[str], str | None]:
    """Lines of standard input. Raises InputError for one that is no UTF-8 text."""
    numbered = enumerate(sys.stdin.buffer, 1)

    def read(_: str) -> str | None:
        number, line = next(numbered, (0, b""))
        return None if number == 0 else _decoded(line, number).rstrip("\r\n")

    return read


def whole_pipe() -> str:
    """All of standard input as one text."""
    return _decoded(sys.stdin.buffer.read(), 1)


def _decoded(data: bytes, number: int) -> str:
    try:
        return data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"this is not UTF-8 text (byte {error.start + 1})",
            where=f"standard input:{number}",
            hint="convert it first, e.g. with: iconv -f latin1 -t utf-8",
        ) from None
