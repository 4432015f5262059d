"""Base models that are made for a data set and not fetched: what `scratch:NAME,KEY=VALUE` asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmo.errors import InputError, SpecError, nearest

if TYPE_CHECKING:
    from llmo.jobspecs import ScratchSpec

SCHEME = "scratch"
ARCHITECTURES = ("transformer-tiny", "lstm", "causal-tiny", "sasrec")
KEYS = ("vocabulary", "width", "layers", "seed")
FITTING = {"generation": "causal-tiny", "next-item": "sasrec"}  # the other tasks take any encoder


def is_scratch(source: str) -> bool:
    """Whether a base model is to be made."""
    return source.partition(":")[0] == SCHEME


def name_of(source: str) -> str:
    """What it is called in the store."""
    return f"{SCHEME}-{source.partition(':')[2].partition(',')[0]}"


def parse(source: str, task: str, seed: int | None = None) -> ScratchSpec:
    """What a source asks for; `seed` holds where it names none.

    Raises SpecError for an unknown architecture, key or value, and for an architecture that does not fit the task.
    """
    from llmo.jobspecs import ScratchSpec
    from llmo.specfile import validate  # whoever only asks what a source is needs neither

    name, *settings = source.partition(":")[2].split(",")
    if name not in ARCHITECTURES:
        raise SpecError(
            f"there is no model '{name}' to be made from scratch{nearest(name, list(ARCHITECTURES))}",
            hint=f"write {SCHEME}:NAME with one of: {', '.join(ARCHITECTURES)}",
            where=source,
        )
    values: dict[str, Any] = {"architecture": name} | ({} if seed is None else {"seed": seed})
    for setting in settings:
        key, separator, value = setting.partition("=")
        if key not in KEYS or not separator:
            raise SpecError(
                f"'{setting}' is no setting of a model from scratch{nearest(key, list(KEYS))}",
                hint=f"write KEY=VALUE after a comma; the keys are: {', '.join(KEYS)}",
                where=source,
            )
        values[key] = _number(value, key, source)
    _check_task(name, task, source)
    return validate(values, ScratchSpec)


def needs_data(source: str) -> InputError:
    """What is raised where one is asked for without a data set."""
    return InputError(
        "a model from scratch is made of the data set that it is trained on, so there is none without training",
        hint="train it: llmo train --data NAME --model scratch:NAME",
        where=source,
    )


def _number(value: str, key: str, source: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise SpecError(f"{key} is a whole number, not '{value}'", hint=f"write {key}=512", where=source) from None


def _check_task(name: str, task: str, source: str) -> None:
    fits = FITTING.get(task)
    if fits == name or (fits is None and name not in FITTING.values()):
        return
    encoders = [known for known in ARCHITECTURES if known not in FITTING.values()]
    raise SpecError(
        f"'{name}' is no model for {task}",
        hint=f"write {' or '.join(f'{SCHEME}:{one}' for one in ([fits] if fits else encoders))}",
        where=source,
    )
