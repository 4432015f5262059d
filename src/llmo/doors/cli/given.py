"""What the commands of single steps take alike: any key of the step, and what its job is given of the machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from llmo.doors.cli.show import shorten
from llmo.errors import InputError, SpecError
from llmo.settings import parse_bytes
from llmo.types import Asked, Needs

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key of this step (`llmo check --resolved` lists them)."),
]
Data = Annotated[str | None, typer.Option(help="A stored data set; default: the one the model was trained on.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do it again even if it is done already.")]
Cores = Annotated[int | None, typer.Option(help="CPU cores this job needs.", min=1)]
Memory = Annotated[str | None, typer.Option(help="Memory this job needs, e.g. 4GiB.")]
Gpus = Annotated[int | None, typer.Option(help="GPUs this job needs; without it it runs on the CPU.", min=1)]


def assignments(given: list[str] | None) -> dict[str, Any]:
    """`["a.b=1"]` -> `{"a": {"b": 1}}`; values are read as YAML."""
    found: dict[str, Any] = {}
    for item in given or []:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise SpecError(f"'{item}' is not KEY=VALUE", where="--set")
        section = found
        *path, last = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise SpecError(f"'{part}' of '{key}' has a value already", where="--set", hint="set one of them")
        try:
            section[last] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise SpecError(f"cannot read the value of '{key}'", where="--set", hint="it is read as YAML") from None
    return found


def needs_of(op: str, cores: int | None, memory: str | None, gpus: int | None = None) -> Needs | None:
    """What a job is told to need, or None when the operation's own needs are right."""
    if cores is None and memory is None and gpus is None:
        return None
    from llmo.plugins import operation

    usual = operation(op).needs
    amount = parse_bytes(memory, "--memory") if memory else usual.memory
    return Needs(cores=cores or usual.cores, cores_max=cores or usual.cores_max, memory=amount, gpus=gpus or usual.gpus)


def lines_of(file: Path) -> Iterator[str]:
    """The texts of a file. Raises InputError for one that cannot be read."""
    try:
        with file.open("rb") as handle:
            yield from texts_in(handle, str(file))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None


def texts_in(lines: Iterable[bytes], source: str) -> Iterator[str]:
    """One text a line; empty lines are left out."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"this line is not UTF-8 text (byte {error.start + 1})",
                where=f"{source}:{number}",
                hint="convert it first, e.g. with: iconv -f latin1 -t utf-8",
            ) from None
        if text.strip():
            yield text


def one_asked(line: str) -> Asked:
    """A line of a .jsonl file: a text, or an object of texts by name. Raises InputError."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, str):
        return found
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise InputError(
            f"not an object of texts: {shorten(line, 60)}",
            hint='write one a line: {"question": "...", "context": "..."}',
        )
    return found
