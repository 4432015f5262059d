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
from llmo.doors.cli import bench, chat, data, export, feedback, judge, machine, project, report, server, steps, tune
from llmo.doors.cli.app import INTERRUPTED
from llmo.doors.cli.show import Json, console, emit
from llmo.errors import InputError, LLMOError


class UsageError(InputError):
    """A command line that is none of ours."""

    code = "usage"


app = typer.Typer(
    name="llmo",
    help="From a team's own text to a served, verified, compressed model, on its own hardware.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with: llmo check llmo.yaml, then: llmo run llmo.yaml",
)
for module in (project, data, steps, export, tune, report, chat, judge, bench, feedback, server, machine):
    module.register(app)


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version.

    Example: llmo version
    """
    emit({"version": __version__}, as_json, lambda: console.print(__version__))


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code, having said what is wrong."""
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
        code = INTERRUPTED
    except (BrokenPipeError, SystemExit):  # typer makes the one of the other: whoever read our output has enough
        _close_output()
        return 0
    except Exception as error:  # the border: whatever it is, the user sees a sentence and we keep the evidence
        return _bug(error, as_json)
    return code if isinstance(code, int) else 0


def _close_output() -> None:
    """What is still in the buffer goes nowhere, so that the interpreter does not complain at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno() if sys.__stdout__ else 1)
    os.close(nowhere)


def _tell(error: LLMOError, as_json: bool) -> int:
    said = f"{error}\n" + (f"  {error.hint}\n" if error.hint else "")
    try:
        if as_json:
            sys.stdout.write(json.dumps({"error": error.to_json()}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            sys.stderr.write(said)
    except BrokenPipeError:  # nobody reads our output any more; a log may
        _close_output()
        sys.stderr.write(said)
    return error.exit_code


def _usage(error: TyperException, as_json: bool) -> int:
    context = getattr(error, "ctx", None)
    command = "llmo" + (context.command_path.removeprefix(context.find_root().command_path) if context else "")
    message = error.format_message()
    if message.startswith("Usage:"):  # a group named without a command: this is its help
        sys.stdout.write(f"{message}\n")
        return UsageError.exit_code
    return _tell(UsageError(message, hint=f"see: {command} --help"), as_json)


def _bug(error: Exception, as_json: bool) -> int:
    handle, name = tempfile.mkstemp(prefix="llmo-error-", suffix=".txt")
    with os.fdopen(handle, "w") as file:
        file.write("".join(traceback.format_exception(error)))
    what = f"something in LLMO went wrong that it does not know how to explain: {type(error).__name__}: {error}"
    return _tell(LLMOError(what, hint=f"this is a bug; please report it with {Path(name)}"), as_json)
