"""The command line of this environment's `llmo`, as a benchmark gives it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def command(*arguments: str) -> Any:
    """What `llmo ARGUMENTS --json` says last, as JSON. Raises CalledProcessError where it fails."""
    line = [sys.executable, "-m", "llmo.doors.cli", *arguments, "--json"]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
