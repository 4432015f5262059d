"""The `llmo` command: its groups, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import typer
from typer.exceptions import TyperException

from llmo import __version__
from llmo.doors.cli import machine, project, server, steps
from llmo.doors.cli.show import Json, console, emit
from llmo.errors import LLMOError

app = typer.Typer(
    name="llmo",
    help="From a team's own text to a served, verified, compressed model, on its own hardware.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with: llmo check llmo.yaml, then: llmo run llmo.yaml",
)
for module in (project, steps, server, machine):
    module.register(app)


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version.

    Example: llmo version
    """
    emit({"version": __version__}, as_json, lambda: console.print(__version__))


def main() -> None:
    """Run the command line and exit with the error's own code."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        code = app(arguments, standalone_mode=False)
    except LLMOError as error:
        return _tell(error, as_json)
    except typer.Exit as error:
        return error.exit_code
    except TyperException as error:
        return _usage(error, as_json)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the border: whatever it is, the user sees a sentence and we keep the evidence
        return _bug(error)
    return code if isinstance(code, int) else 0


def _tell(error: LLMOError, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps({"error": error.to_json()}, ensure_ascii=False) + "\n")
    else:
        sys.stderr.write(f"{error}\n")
        if error.hint:
            sys.stderr.write(f"  {error.hint}\n")
    return error.exit_code


def _usage(error: TyperException, as_json: bool) -> int:
    if not sys.argv[1:]:
        sys.stdout.write(f"{error.format_message()}\n")
        return 2
    if as_json:
        body = {"code": "usage", "what": error.format_message()}
        sys.stdout.write(json.dumps({"error": body}) + "\n")
    else:
        sys.stderr.write(f"{error.format_message()}\n  see: llmo --help\n")
    return 2


def _bug(error: Exception) -> int:
    handle, name = tempfile.mkstemp(prefix="llmo-error-", suffix=".txt")
    with os.fdopen(handle, "w") as file:
        file.write("".join(traceback.format_exception(error)))
    sys.stderr.write(
        f"something in LLMO went wrong that it does not know how to explain: {type(error).__name__}: {error}\n"
        f"  this is a bug; please report it with {Path(name)}\n"
    )
    return 1
