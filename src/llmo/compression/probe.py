"""One variant of a model in a process of its own, which takes orders and dies with whoever gave them."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmo.context import Context, Stopped
from llmo.errors import JobFailed, from_json

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the model: the engine, the folder that it opens, what the measuring module is told more, the
    threads that compute (None: one for each of the job's cores), and the texts as its tokeniser reads them (None: as
    all others do)."""

    name: str
    engine: str
    folder: Path
    options: tuple[str, ...] = ()
    threads: int | None = None
    texts: Sequence[list[int]] | None = None


class Probe:
    """A running measuring module: told on its standard input, heard on its standard output, one line each."""

    def __init__(self, module: str, candidate: Candidate, work: Path, folder: Path, ctx: Context) -> None:
        self._name, self._ctx = candidate.name, ctx
        self._log = folder / f"{candidate.name}.log"
        cores = str(candidate.threads or ctx.device.cores)
        command = [sys.executable, "-m", module, candidate.engine, candidate.folder, work, cores, *candidate.options]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": cores, "OMP_WAIT_POLICY": "PASSIVE"},
            )

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        """End it whatever it is doing; it has nothing to save."""
        self._process.kill()
        self._process.communicate()

    def ask(self, command: str) -> dict[str, Any]:
        stdin = self._process.stdin
        if stdin is None:
            raise self._died()
        try:
            stdin.write(command.encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer. Raises the error that the process reported, or Stopped when the job is to stop."""
        stdout = self._process.stdout
        if stdout is None:
            raise self._died()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not selector.select(POLL_SECONDS):
                if self._ctx.should_stop():
                    raise Stopped
        line = stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise from_json(answer["error"])
        return answer

    def _died(self) -> JobFailed:
        code = self._process.wait()
        log = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return JobFailed(
            f"measuring {self._name} ended with code {code}{': ' + log[-1][:200] if log else ''}",
            hint="the machine may be short of memory; see: llmo doctor" if code == -9 else "see: llmo logs JOB",
        )
