"""The command line: parse, call the API of this process or of a server, show the answer."""

from __future__ import annotations

from llmo.doors.cli.app import main

__all__ = ["main"]
