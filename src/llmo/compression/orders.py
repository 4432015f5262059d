"""What every measuring process does: load, say so, then obey one line of standard input after another.

It ends when standard input does, so it never outlives the process that asked.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

import psutil

from llmo.errors import LLMOError

Loaded = TypeVar("Loaded")
Answer = dict[str, Any]


def follow(load: Callable[[], Loaded], obey: Callable[[Loaded, list[str]], Answer]) -> int:
    """Answers each line with one line of JSON; returns the exit code: 0 at the end of input, 1 after an LLMOError."""
    started = time.perf_counter()
    replies = _own_stdout()
    try:
        loaded = load()
        _say(replies, {"load_seconds": time.perf_counter() - started})
        for line in sys.stdin:
            _say(replies, obey(loaded, line.split()))
    except LLMOError as error:
        _say(replies, {"error": error.to_json()})
        return 1
    return 0


def unknown(words: list[str]) -> LLMOError:
    return LLMOError(f"a measuring process was told '{' '.join(words)}', which is no command")


def peak_memory() -> int:
    """Bytes this process has held at most. Not `ru_maxrss`: that one starts at what the parent held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)


def _own_stdout() -> TextIO:
    """The real standard output for replies alone; whatever libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _say(replies: TextIO, answer: Answer) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()
