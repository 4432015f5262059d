"""What the commands of single steps take alike: any key of the step, and what its job is given of the machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import yaml

from llmo.errors import SpecError
from llmo.settings import parse_bytes
from llmo.types import Needs

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
