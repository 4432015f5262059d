"""What a search may vary: for each key of another specification a list of values, or a range."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import AliasChoices, Field, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from llmo.errors import nearest
from llmo.specbase import Spec

T = TypeVar("T")
MOST_VALUES = 100
TRIALS = 20  # where neither their number nor a time is given
EARLIER = "earlier-"  # a search's inputs of that name are reports of earlier ones
COSTS = {"seconds": "seconds", "memory": "memory_bytes", "latency": "latency_ms"}  # objective -> figure of a trial


class Choice(Spec, Generic[T]):
    """`values`, or all from `low` to `high`: in steps, or evenly by their logarithm, or evenly."""

    low: T | None = None
    high: T | None = None
    log: bool = False
    step: T | None = None
    values: Annotated[list[T] | None, Field(min_length=1, max_length=MOST_VALUES)] = None

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return {"values": list(value)}
        if not isinstance(value, Mapping):
            raise ValueError("a list of values, or {low: ..., high: ...}, is expected")  # noqa: TRY004 (pydantic's)
        return value

    @model_validator(mode="after")
    def _sound(self) -> Choice[T]:
        if self.values is not None:
            if self.model_fields_set != {"values"}:
                raise ValueError("write either a list of values or a range, not both")
            if len({repr(value) for value in self.values}) < len(self.values):
                raise ValueError("a value is listed twice")
            return self
        ends = (self.low, self.high)
        if None in ends:
            raise ValueError("a range needs both `low` and `high`")
        low, high = (cast("float", end) for end in ends)
        if any(isinstance(end, bool | str) for end in ends):
            raise ValueError("these values have no order, so there is no range of them: write a list")
        if low >= high:
            raise ValueError(f"the range is empty: low ({low:g}) is not below high ({high:g})")
        if self.log and (low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range begins above 0 and has no step")
        if self.step is not None and not 0 < cast("float", self.step) <= high - low:
            raise ValueError("the step is wider than the range, or not above 0")
        return self


def space_of(model: type[Spec], leave: Collection[str] = (), also: Mapping[str, Any] | None = None) -> type[Spec]:
    """A specification with a `Choice` for each key of `model` that takes one plain value, those of its sections as
    `section.key`; without those to `leave`, with those of `also` (name -> type)."""
    found = {key: hint for key, hint in {**_leaves(model, ""), **(also or {})}.items() if key not in leave}
    fields: dict[str, Any] = {}
    for number, (key, hint) in enumerate(found.items()):
        fields[f"key_{number}"] = (
            Choice[hint] | None,  # type: ignore[valid-type]
            Field(None, validation_alias=AliasChoices(key), serialization_alias=key),
        )
    return create_model(f"{model.__name__}Space", __base__=Spec, **fields)


def keys_of(space: type[Spec]) -> list[str]:
    """The keys that may be varied."""
    return sorted(str(field.serialization_alias) for field in space.model_fields.values())


def parsed(space: type[Spec], value: Any) -> dict[str, Any]:
    """A space as it is written, checked: key -> `{"values"}` or `{"low", "high", "log"?, "step"?}`.

    Raises pydantic's ValidationError, whose places are keys of the space.
    """
    if not isinstance(value, Mapping) or not value:
        raise ValueError("a mapping of keys to lists of values or ranges is expected")
    known = keys_of(space)
    wrong = [
        InitErrorDetails(
            type=PydanticCustomError("unknown_key", "unknown key{hint}", {"hint": nearest(str(key), known)}),
            loc=(str(key),),
            input=given,
        )
        for key, given in value.items()
        if key not in known
    ]
    if wrong:
        raise ValidationError.from_exception_data("space", wrong)
    return space.model_validate(dict(value)).model_dump(mode="json", by_alias=True, exclude_unset=True)


def _leaves(model: type[Spec], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(model, include_extras=True).items():
        if name not in model.model_fields or model.model_fields[name].description is None:
            continue
        if isinstance(hint, type) and issubclass(hint, Spec):
            found |= _leaves(hint, f"{prefix}{name}.")
        elif _plain(hint):
            found[f"{prefix}{name}"] = hint
    return found


def _plain(hint: Any) -> bool:
    """Whether a type's values are numbers, words, yes and no, or nothing."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _plain(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return all(_plain(inner) for inner in get_args(hint))
    return origin is Literal or hint in (int, float, str, bool, types.NoneType)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key as the specification of a training has them: `lora.rank` inside `lora`, and `max_length`
    inside `task`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = ("task.max_length" if key == "max_length" else key).split(".")
        section = found
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return found


def merged(spec: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`spec` with what `changes` says, section by section."""
    found = dict(spec)
    for key, value in changes.items():
        section = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if section else value
    return found
