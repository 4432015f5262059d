"""Operations, tasks, engines and readers are found through entry points; the built-ins come in the same way."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from llmo.errors import EnvironmentProblem, SpecError, nearest
from llmo.types import Kind, Needs


@dataclass(frozen=True, slots=True)
class Operation:
    """How the control plane knows an operation without importing its code.

    `target` is `module:function`, a `run(spec, inputs, out, ctx) -> result` loaded inside the worker.
    `produces` names the kind of artifact that `out/` becomes; a `service` stays up; `cached` operations
    are skipped when the same spec and inputs are already done. `revision` is raised when the operation's
    result for the same spec and inputs changes, so that older results are not taken for new ones. Endpoints that
    nobody uses give way to a service, and to what `makes_room`: it must be short, for it keeps them from waking. What
    is `measured` is true of the processor it ran on: on another one it is done again.
    """

    name: str
    target: str
    produces: Kind | None = None
    service: bool = False
    cached: bool = True
    needs: Needs = field(default_factory=Needs)
    revision: int = 1
    makes_room: bool = False
    measured: bool = False


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=group)}


def names(group: str) -> list[str]:
    """The names registered in an entry point group such as `llmo.tasks`, sorted."""
    return sorted(_entries(group))


def takes_adapters(group: str) -> list[str]:
    """The engines of a group whose abilities hold "adapters", sorted. They are named in a group of their own, for to
    ask an engine itself imports it."""
    return names(f"{group}.adapters")


def load(group: str, name: str) -> Any:
    """The object registered as `name` in `group`.

    Raises SpecError for an unknown name and EnvironmentProblem when its packages are not installed.
    """
    entry = _entries(group).get(name)
    what = group.removeprefix("llmo.").removesuffix("s")
    if entry is None:
        raise SpecError(
            f"unknown {what} '{name}'{nearest(name, names(group))}", hint=f"known: {', '.join(names(group))}"
        )
    try:
        return entry.load()
    except ImportError as error:
        raise EnvironmentProblem(
            f"the {what} '{name}' needs a package that is not installed: {error.name or error}",
            hint="install the full set with: pip install 'llmo-os[all]' (see `llmo doctor`)",
        ) from error


def operation(name: str) -> Operation:
    """The registered operation of that name."""
    found = load("llmo.operations", name)
    if not isinstance(found, Operation):
        raise EnvironmentProblem(f"the operation '{name}' is registered with something that is not an Operation")
    return found


def load_target(target: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
