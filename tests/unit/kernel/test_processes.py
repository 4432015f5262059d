"""What processes hold, as `/proc` tells it."""

from __future__ import annotations

import subprocess
import sys

from llmo.kernel import processes

HOLD = 48 << 20
CHILD = f"held = bytearray(b'x' * {HOLD}); print(flush=True); input()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_memory_is_that_of_a_process_and_of_what_it_started() -> None:
    held = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert held.stdout is not None
    held.stdout.readline()
    alone, family = processes.memory(held.pid, children=False), processes.memory(held.pid)
    assert alone is not None
    assert family is not None
    assert 1 << 20 < alone < HOLD < family < 3 * HOLD
    held.communicate(b"\n", timeout=20)
    assert processes.memory(held.pid) is None
