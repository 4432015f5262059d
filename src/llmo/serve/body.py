"""Reads the body of a predict request by hand: strict, bounded, and fast, because every request passes here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from llmo.errors import InputError, TooLargeError, nearest
from llmo.types import TEXT_NAMES, Asked

MAX_TEXTS = 512
DEEPEST = 100  # levels of a JSON value
_KEYS = (*TEXT_NAMES, "texts", "history", "logits", "deadline_seconds")
_LONGEST_DEADLINE = 3600.0
_HISTORY = 'send {"history": ["50", "172"]}'
_EXAMPLE = 'send {"text": "..."} or {"texts": ["...", "..."]}, or {"question": "...", "context": "..."}'


@dataclass(frozen=True, slots=True)
class PredictBody:
    """What was asked: texts, or objects of texts by name. Whether a model can read them is the replica's to say."""

    texts: list[Asked]
    logits: bool = False
    deadline_seconds: float | None = None


def parse(data: bytes, max_texts: int = MAX_TEXTS) -> PredictBody:
    """The request, or InputError (422) that says what is wrong with it; TooLargeError (413) for too many texts."""
    body = read_json(data, _EXAMPLE)
    if not isinstance(body, dict):
        raise InputError("the body is not a JSON object", hint=_EXAMPLE)
    for key in body:
        if key not in _KEYS:
            known = list(_KEYS)
            raise InputError(f"unknown key '{key[:80]}'{nearest(key[:80], known)}", hint=f"known: {', '.join(known)}")
    texts = _texts(body)
    if len(texts) > max_texts:
        raise TooLargeError(
            f"{len(texts)} texts in one request; the limit is {max_texts}", hint="send them in several requests"
        )
    logits = body.get("logits", False)
    if not isinstance(logits, bool):
        raise InputError("'logits' is true or false", where="logits")
    return PredictBody(texts, logits, _deadline(body.get("deadline_seconds")))


def _texts(body: dict[str, Any]) -> list[Asked]:
    if "history" in body:
        beside = next((name for name in (*TEXT_NAMES, "texts") if name in body), None)
        if beside is not None:
            raise InputError(f"both '{beside}' and 'history' are there", hint="send one of them")
        return [_history(body["history"])]
    named = {name: body[name] for name in TEXT_NAMES if name in body}
    if bool(named) == ("texts" in body):
        first = next(iter(named), "text")
        problem = f"both '{first}' and 'texts' are there" if named else "neither 'text' nor 'texts' is there"
        raise InputError(problem, hint=_EXAMPLE)
    if named:
        return [_one(body["text"], "text") if set(named) == {"text"} else _named(named, "")]
    texts = body["texts"]
    if not isinstance(texts, list) or not texts:
        raise InputError("'texts' is a list of at least one text", where="texts", hint=_EXAMPLE)
    return [
        _named(text, f"texts[{index}].") if isinstance(text, dict) else _one(text, f"texts[{index}]")
        for index, text in enumerate(texts)
    ]


def _named(texts: dict[str, Any], where: str) -> dict[str, str]:
    """An input of several texts; `where` is what stands before their names."""
    for name in texts:
        if name not in TEXT_NAMES:
            raise InputError(
                f"unknown key '{name[:80]}'{nearest(name[:80], list(TEXT_NAMES))}",
                where=where.rstrip("."),
                hint=f"known: {', '.join(TEXT_NAMES)}",
            )
    if not texts:
        raise InputError("an input is a text, not an object without any", where=where.rstrip("."), hint=_EXAMPLE)
    return {name: _one(text, f"{where}{name}") for name, text in texts.items()}


def _one(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"a text is a string, not {_kind(text)}", where=where, hint=_EXAMPLE)
    return text


def _history(value: Any) -> str:
    """A list of items as the text that means it: spaces between, and white space within one as `_`."""
    if not isinstance(value, list) or not value:
        raise InputError("'history' is a list of at least one item", where="history", hint=_HISTORY)
    for index, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip():
            raise InputError("an item is a string or a whole number", where=f"history[{index}]", hint=_HISTORY)
    return " ".join("_".join(str(item).split()) for item in value)


def _deadline(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LONGEST_DEADLINE:
        raise InputError(
            f"'deadline_seconds' is a number above 0 and at most {_LONGEST_DEADLINE:g}", where="deadline_seconds"
        )
    return float(value)


def read_json(data: bytes, example: str) -> Any:
    """Strict JSON: what Python's parser lets pass (NaN, a key written twice) or trips over is an InputError.

    `example` is the hint for whoever sent no JSON at all.
    """
    if not data.strip():
        raise InputError("the body is empty", hint=example)
    try:
        found = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8 (byte {error.start})", hint="encode it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"the body is not valid JSON: {error.msg}",
            where=f"line {error.lineno}, column {error.colno}",
            hint=example,
        ) from None
    except RecursionError:
        raise InputError("the body is nested too deeply", hint=example) from None
    except ValueError:  # an integer of more than 4300 digits
        raise InputError("the body holds a number with too many digits", hint=example) from None
    if data.count(b"[") + data.count(b"{") > DEEPEST and deep(found):
        raise InputError("the body is nested too deeply", hint=example)
    return found


def deep(value: Any) -> bool:
    """Whether a JSON value has more than `DEEPEST` levels: what walks it later may do so by recursion."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for many in inner for one in many]
        if not level:
            return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InputError("a key is written twice in the body", hint="keep one of them")
    return found


def _constant(name: str) -> Any:
    raise InputError(f"the body holds {name}, which is not JSON", hint="leave it out")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise InputError(f"the number {text[:40]} is too large")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
