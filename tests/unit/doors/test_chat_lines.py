"""What is said in a chat: a line, a line that goes on, and a block of lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmo.doors.cli.lines import spoken


def reader(*given: str) -> Callable[[str], str | None]:
    waiting = iter(given)
    return lambda _: next(waiting, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["hello", "", "  ", "/help"], ["hello", "/help"]),
        (["one\\", "two\\", "three", "four"], ["one\ntwo\nthree", "four"]),
        (["cut off\\"], ["cut off"]),
        (['"""', "a", "", "b", '"""', "c"], ["a\n\nb", "c"]),
        (['"""a', 'b"""'], ["a\nb"]),
        (['"""one line"""'], ["one line"]),
        (['"""', "never", "closed"], ["\nnever\nclosed"]),
        ([], []),
    ],
)
def test_lines_become_what_was_said(given: list[str], said: list[str]) -> None:
    assert list(spoken(reader(*given))) == said


def test_the_prompt_tells_a_line_that_goes_on() -> None:
    prompts: list[str] = []
    given = iter(["a\\", "b"])

    def read(prompt: str) -> str | None:
        prompts.append(prompt)
        return next(given, None)

    assert list(spoken(read)) == ["a\nb"]
    assert prompts == ["> ", ". ", "> "]
