"""A Jinja environment for templates of strangers: no Python, a second of work, a megabyte of text.

The same extensions, filters and globals as transformers' own, so that the same bytes come out. A thread cannot be
stopped from outside, so every loop pass, call, filter, operation and printed value asks a meter whether it may go on;
what could be huge in a single step (`'a' * 10**9`) is weighed before it is done.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 1.0  # of this thread's processor time, so that a busy machine refuses nothing
LONGEST = 1 << 20  # characters of the answer, and of any value on the way to it
WORK = 256 << 20  # characters and list entries made in all
LARGEST_POWER = 1 << 12  # bits of a number
NARROW = 64  # an indent, or a separator, of JSON
# No chat template uses these; each makes much of little in one step.
REFUSED_FILTERS = {"pprint", "random", "urlize", "wordwrap", "xmlattr"}
REFUSED_METHODS = {"expandtabs", "maketrans", "translate"}
_WIDE = re.compile(r"\d{6,}|\*")


class TooMuch(Exception):
    """The template does more than a template may; the message says what."""


class _Meter:
    def __init__(self) -> None:
        self.work = 0
        self._until = time.thread_time() + SECONDS

    def charge(self, size: int) -> None:
        self.work += size
        if size > LONGEST:
            raise TooMuch(f"it makes a value of more than {LONGEST} characters")
        if self.work > WORK:
            raise TooMuch("it makes hundreds of megabytes of text on the way: does it loop?")
        if time.thread_time() > self._until:
            raise TooMuch(f"it runs for more than {SECONDS:g} second: does it loop?")


_METER: ContextVar[_Meter | None] = ContextVar("meter", default=None)


@contextmanager
def metered() -> Iterator[None]:
    """Everything a template does inside is counted together. Raises TooMuch at the limit."""
    token = _METER.set(_Meter())
    try:
        yield
    finally:
        _METER.reset(token)


def environment() -> ImmutableSandboxedEnvironment:
    """A fresh one; what is compiled and rendered in it must be `metered`."""
    made = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_weighed,
        optimized=False,
        cache_size=0,
    )
    made.filters["tojson"] = _tojson
    made.filters = {
        name: _bounded(name, function) for name, function in made.filters.items() if name not in REFUSED_FILTERS
    }
    made.globals = {
        "range": made.globals["range"],
        "cycler": made.globals["cycler"],
        "joiner": made.globals["joiner"],
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Space,
    }
    return made


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)  # noqa: S101 (as was asked for)
            node.body.insert(0, _tick(node))
        _replace_concatenations(tree)
        return tree

    def tick(self, size: int) -> None:
        """Called at the head of every loop pass and macro; `size` is the plain text that its body prints."""
        _charge(1 + size)

    def concatenate(self, *values: Any) -> str:
        """What `~` does."""
        texts = [str(value) for value in values]
        _charge(sum(map(len, texts)))
        return "".join(texts)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as in Jinja)
        _weigh_arguments(args, kwargs)
        args = _weigh_method(__obj, args, kwargs)
        return _weighed(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _weigh_operation(operator, left, right)
        return _weighed(super().call_binop(context, operator, left, right))


class _Generation(Extension):
    """`{% generation %}`, which marks an answer in a template; it prints its body."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict`, without what else a class can do."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Space(Namespace):
    """`namespace`, whose names may not reach for Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        self, *rest = args
        named = dict(*rest, **kwargs)
        for name in named:
            _check_name(name)
        Namespace.__init__(self, named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may hold no {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as transformers gives it


def _tick(block: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
    printed = sum(len(found.data) for node in block.body for found in [*_own(node), *node.find_all(nodes.TemplateData)])
    call = nodes.Call(nodes.EnvironmentAttribute("tick"), [nodes.Const(printed)], [], None, None)
    return nodes.ExprStmt(call).set_lineno(block.lineno)


def _own(node: nodes.Node) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else []


def _replace_concatenations(node: nodes.Node) -> None:
    """`a ~ b` becomes a call that is weighed."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _replaced(value))
        elif isinstance(value, list):
            setattr(node, name, [_replaced(x) if isinstance(x, nodes.Node) else x for x in value])


def _replaced(node: nodes.Node) -> nodes.Node:
    _replace_concatenations(node)
    if not isinstance(node, nodes.Concat):
        return node
    made = nodes.Call(nodes.EnvironmentAttribute("concatenate"), node.nodes, [], None, None)
    return made.set_lineno(node.lineno)


def _charge(size: int) -> None:
    meter = _METER.get()
    if meter is not None:
        meter.charge(size)


def _size(value: Any, most: int = LONGEST) -> int:
    """Characters and entries of a value and of what it holds, counted until there are more than `most`."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 1
    total = 1
    for one in value:
        total += _size(one, most - total) + (_size(value[one], most - total) if isinstance(value, dict) else 0)
        if total > most:
            break
    return total


def _weighed(value: Any) -> Any:
    _charge(_size(value))
    return value


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are weighed; what it wants of Jinja (`pass_context` ...) is kept."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _weigh_arguments(args, kwargs)
        value, *rest = args[first:] or (None,)
        if name == "join" and not isinstance(value, str):
            value = list(value)
        _weigh_filter(name, value, (*rest, *kwargs.values()))
        return _weighed(function(*args[:first], value, *rest, **kwargs))

    return filtered


def _weigh_filter(name: str, value: Any, rest: tuple[Any, ...]) -> None:
    if name == "replace" and len(rest) >= 2:
        _weigh_replacement(str(value), str(rest[0]), str(rest[1]))
    elif name == "join":
        _charge(_size(value) + len(value) * max((_size(x) for x in rest), default=0))
    elif name == "indent":
        _charge((str(value).count("\n") + 1) * max((x if isinstance(x, int) else _size(x) for x in rest), default=4))
    elif name == "tojson" and any(_size(x) > NARROW or (isinstance(x, int) and x > NARROW) for x in rest):
        raise TooMuch("it writes JSON with a very large indent")
    elif name == "format":
        _weigh_format(str(value), "%", rest)
    elif name == "sum" and not all(isinstance(x, str | int | float | None) for x in rest):
        raise TooMuch("it adds up lists")


def _weigh_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A width or a count that is huge would be obeyed in one step."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > LONGEST:
            raise TooMuch(f"it asks for a width or count of {value}")


def _weigh_method(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a string's method; a generator among them is written out, so that it can be weighed."""
    function = getattr(function, "__wrapped__", function)  # Jinja wraps `format`
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, str):
        return args
    if name in REFUSED_METHODS:
        raise TooMuch(f"it calls {name} of a text")
    if name == "replace" and len(args) >= 2:
        _weigh_replacement(owner, str(args[0]), str(args[1]))
    elif name == "join" and args:
        parts = args[0] if isinstance(args[0], str) else list(args[0])
        _charge(len(owner) * len(parts) + _size(parts))
        return (parts, *args[1:])
    elif name in ("format", "format_map"):
        _weigh_format(owner, "{", (*args, *kwargs.values()))
    return args


def _weigh_replacement(text: str, old: str, new: str) -> None:
    _charge(text.count(old) * len(new))


def _weigh_format(pattern: str, mark: str, values: tuple[Any, ...]) -> None:
    if _WIDE.search(pattern):
        raise TooMuch("it formats to a very large width")
    _charge(len(pattern) + pattern.count(mark) * max((_size(x) for x in values), default=0))


def _weigh_operation(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple) and isinstance(other, int):
                _charge(_size(one) * max(0, other))
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
        if bits > LARGEST_POWER:
            raise TooMuch("it computes a number of thousands of digits")
    if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _charge(len(left) + len(right))
    if operator == "%" and isinstance(left, str):
        _weigh_format(left, "%", right if isinstance(right, tuple) else (right,))
