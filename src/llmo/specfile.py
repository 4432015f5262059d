"""Reads a specification file strictly: every error names its file, line and key, and the nearest known key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from llmo.errors import SpecError, nearest

S = TypeVar("S", bound=BaseModel)
Lines = dict[tuple[str, ...], int]

MOST_TOLD = 9  # of further mistakes
LARGEST = 10_000  # values in one file; aliases of aliases grow a short file without end
# What is wrong, in words for people, by pydantic's name of it.
SAID = {
    "string_type": "a text is expected; put it in quotes",
    "model_type": "a mapping of keys to values is expected",
    "model_attributes_type": "a mapping of keys to values is expected",
    "string_pattern_mismatch": "use letters, digits, '.', '_' and '-', at most 100 of them, a letter or digit first",
}


@dataclass(frozen=True, slots=True)
class Resolved(Generic[S]):
    """A parsed specification and the line of every key that the user wrote (dotted path -> line)."""

    spec: S
    file: str
    lines: dict[str, int]

    def origin(self, key: str) -> str:
        """`FILE:LINE` for a key the user wrote (or that lies inside one), else `default`."""
        return f"{self.file}:{self.lines[key]}" if key in self.lines else "default"


def read(path: Path, model: type[S]) -> Resolved[S]:
    """Parse a YAML file into `model`. Raises SpecError with `FILE:LINE` for the first thing that is wrong; its
    hint names the others."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"no such file: {path}", hint="give the path of a specification, e.g. llmo.yaml") from None
    except IsADirectoryError:
        raise SpecError(f"{path} is a folder", hint=f"name the file in it: {path / 'llmo.yaml'}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path} is not a UTF-8 text file", hint="a specification is YAML") from None
    except PermissionError:
        raise SpecError(f"no permission to read {path}") from None
    return parse(text, str(path), model)


def parse(text: str, file: str, model: type[S]) -> Resolved[S]:
    """As `read`, from text; `file` is the name errors give."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else 1
        told = (getattr(error, "context", None), getattr(error, "problem", None))
        what = ", ".join(part for part in told if part) or str(error)
        raise SpecError(f"not valid YAML: {what}", where=f"{file}:{line}") from None
    except RecursionError:
        raise SpecError("nested too deeply", where=file) from None
    if node is None:
        raise SpecError("the file is empty", where=file, hint="it needs at least: " + ", ".join(_required(model)))
    lines: Lines = {}
    value = _plain(node, (), lines, file, itertools.count(1))
    if not isinstance(value, dict):
        raise SpecError("a specification is a mapping of keys to values", where=f"{file}:1")
    return Resolved(_validated(value, lines, file, model), file, {".".join(k): v for k, v in lines.items()})


def validate(value: Any, model: type[S], where: str = "") -> S:
    """A value that did not come from a file (a flag, an API body) as `model`; errors name the key."""
    if not isinstance(value, dict):
        raise SpecError(f"expected a mapping of keys to values, not {type(value).__name__}", where=where)
    return _validated(value, {}, where, model)


def _plain(node: yaml.Node, path: tuple[str, ...], lines: Lines, file: str, counted: Iterator[int]) -> Any:
    here = f"{file}:{node.start_mark.line + 1}"
    if len(path) > 20:
        raise SpecError("nested too deeply", where=here)
    if next(counted) > LARGEST:
        raise SpecError(f"more than {LARGEST} values in one specification", where=here, hint="use fewer aliases")
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise SpecError("a key is a word, not a list or a mapping", where=f"{file}:{line}")
            key = str(key_node.value)
            if key in found:
                raise SpecError(f"the key '{key}' is written twice", where=f"{file}:{line}", hint="keep one of them")
            lines[(*path, key)] = line
            found[key] = _plain(value_node, (*path, key), lines, file, counted)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, str(i)), lines, file, counted) for i, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError):
        raise SpecError(f"cannot read the value {node.value!r}", where=here) from None


def _validated(value: dict[str, Any], lines: Lines, file: str, model: type[S]) -> S:
    for unfit, what, hint in _unfit(value, ()):
        at = f"{file}:{_line(unfit, lines)}" if lines and file else file
        raise SpecError(f"'{'.'.join(unfit)}': {what}", where=at, hint=hint)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", _line(e["loc"], lines)))
    wrong = {e["loc"][:-1] for e in found}
    found = [e for e in found if e["type"] != "too_short" or e["loc"] not in wrong]  # wrong items are not counted
    problems: dict[tuple[int | str, ...], SpecError] = {}
    for problem in found:  # a key that may be of several kinds has an error for each
        key = problem["loc"] if problem["type"] == "missing" else _key(problem["loc"], lines)
        problems.setdefault(key, _problem(problem, lines, file, model))
    first, *others = problems.values()
    first.hint = "\n  ".join(filter(None, [first.hint, *(f"also {other}" for other in others[:MOST_TOLD])]))
    raise first


def _problem(error: Any, lines: Lines, file: str, model: type[S]) -> SpecError:
    """One of pydantic's errors, in our words."""
    path = tuple(str(part) for part in error["loc"])
    where = (f"{file}:{_line(path, lines)}" if lines else file) if file else ""
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _known(model, path[:-1])
        what = f"unknown key '{path[-1]}'{nearest(path[-1], known)}"
        return SpecError(what, where=where, hint=f"known here: {', '.join(known)}" if known else "")
    if error["type"] == "missing":
        return SpecError(f"the key '{key}' is missing", where=where, hint=f"add '{path[-1]}: ...'")
    told = error["msg"].removeprefix("Value error, ")
    message = SAID.get(error["type"]) or told[:1].lower() + told[1:]
    shown = "" if isinstance(error["input"], dict | list | BaseModel) else f" (it is {error['input']!r:.80})"
    return SpecError(f"'{key}': {message}{shown}", where=where)


def _unfit(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """What neither a file of JSON nor a database can keep: its path, what it is, and what to do."""
    if len(path) > 20:
        yield path, "nested too deeply", ""
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _unfit(str(key), (*path, str(key).encode("utf-8", "backslashreplace").decode()))
            yield from _unfit(inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unfit(inner, (*path, str(index)))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{value} is not a number that can be used", "write a finite number"
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        yield path, "half of a character (a lone surrogate)", "write the text again, as UTF-8"


def _line(path: tuple[int | str, ...], lines: Lines) -> int:
    return lines.get(_key(path, lines), 1)


def _key(path: tuple[int | str, ...], lines: Lines) -> tuple[str, ...]:
    """The innermost key on the way there that the user wrote; the whole way where nothing is written in a file."""
    keys = tuple(str(part) for part in path)
    while lines and keys and keys not in lines:
        keys = keys[:-1]
    return keys


def _section(model: type[BaseModel], path: tuple[str, ...]) -> type[BaseModel] | None:
    for key in path:
        field = model.model_fields.get(key)
        inner = [field.annotation, *get_args(field.annotation)] if field else []
        models = [t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)]
        if not models:
            return None
        model = models[0]
    return model


def _known(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The keys a user writes there; those without a description are for LLMO's own use."""
    section = _section(model, path)
    return sorted(key for key, field in section.model_fields.items() if field.description) if section else []


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required()]
