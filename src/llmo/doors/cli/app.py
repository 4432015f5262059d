"""The entry of the `llmo` command: loads it so that Ctrl-C at any moment, its loading too, ends in a word."""

from __future__ import annotations

import io
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with the error's own code."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is spelled out, never a crash
                stream.reconfigure(errors="backslashreplace")
        from llmo.doors.cli.commands import run  # within: half a second in which people press Ctrl-C

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        sys.stderr.write("interrupted\n")
    sys.exit(code)
