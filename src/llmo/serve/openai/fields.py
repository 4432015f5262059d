"""Reads the fields of a request one by one: strict in type and range, and every refusal names the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmo.errors import InputError
from llmo.serve.body import read_json
from llmo.serve.openai.errors import invalid


class Fields:
    """One JSON object. `null` counts as absent, as OpenAI's clients send it; keys nobody asks for are ignored.

    `prefix` is put before names in errors.
    """

    def __init__(self, body: Mapping[str, Any], prefix: str = "") -> None:
        self.body = body
        self._prefix = prefix

    def param(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def get(self, name: str) -> Any:
        return self.body.get(name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(f"'{name}' is an integer, not {kind(value)}", self.param(name), code="invalid_type")
        if not low <= value <= high:
            code = "integer_below_min_value" if value < low else "integer_above_max_value"
            raise invalid(f"'{name}' is from {low} to {high}", self.param(name), code=code)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"'{name}' is a number, not {kind(value)}", self.param(name), code="invalid_type")
        if not low <= value <= high:
            code = "decimal_below_min_value" if value < low else "decimal_above_max_value"
            raise invalid(f"'{name}' is from {low:g} to {high:g}", self.param(name), code=code)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise invalid(f"'{name}' is true or false, not {kind(value)}", self.param(name), code="invalid_type")
        return value

    def text(self, name: str, longest: int) -> str | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise invalid(f"'{name}' is a string, not {kind(value)}", self.param(name), code="invalid_type")
        if len(value) > longest:
            raise invalid(
                f"'{name}' is at most {longest} characters long", self.param(name), code="string_above_max_length"
            )
        return value

    def object(self, name: str) -> Fields | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid(f"'{name}' is an object, not {kind(value)}", self.param(name), code="invalid_type")
        return Fields(value, f"{self.param(name)}.")

    def items(self, name: str, most: int) -> list[Any] | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise invalid(f"'{name}' is a list, not {kind(value)}", self.param(name), code="invalid_type")
        if len(value) > most:
            raise invalid(f"'{name}' holds at most {most}", self.param(name), code="array_above_max_length")
        return value

    def refuse(self, names: Mapping[str, Sequence[Any]]) -> None:
        """Refuse fields that would change the answer and that we cannot heed, unless they hold what changes nothing."""
        for name, harmless in names.items():
            value = self.body.get(name)
            if value is not None and value not in harmless:
                raise invalid(
                    f"'{name}' is not supported here",
                    self.param(name),
                    code="unsupported_parameter",
                    hint="leave it out",
                )


def read(data: bytes, example: str) -> Fields:
    """The body of a request. Raises InputError for one that is no JSON object or no valid Unicode."""
    body = read_json(data, example)
    if not isinstance(body, dict):
        raise InputError("the body is not a JSON object", hint=example)
    if b"\\u" in data:  # only an escape can bring half of a surrogate pair through UTF-8
        _refuse_surrogates(body)
    return Fields(body)


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def _refuse_surrogates(body: Mapping[str, Any]) -> None:
    waiting: list[Any] = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(
                    f"a text holds half of a surrogate pair at character {error.start}",
                    hint="it was cut in the middle of an emoji or similar: send the whole character",
                ) from None
