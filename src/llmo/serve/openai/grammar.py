"""What an answer must look like: JSON schemas and regular expressions, checked before an engine sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmo.engines.generation import Grammar
from llmo.serve.openai.errors import invalid
from llmo.serve.openai.fields import Fields

_LONGEST_SCHEMA = 64 << 10  # characters
_LONGEST_REGEX = 4096
_DEEPEST = 64
_ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


def wanted(fields: Fields) -> Grammar | None:
    """The grammar of `response_format` (or of `regex`, our extension; vLLM's `guided_regex` is the same)."""
    name = "regex" if fields.get("regex") is not None else "guided_regex"
    pattern = fields.text(name, _LONGEST_REGEX)
    response = fields.object("response_format")
    if pattern is not None:
        if response is not None and response.get("type") != "text":
            raise invalid(f"'{name}' and 'response_format' exclude each other", name)
        return _regex(pattern, fields.param(name))
    return None if response is None else of_format(response, response.object("json_schema"))


def of_format(wanted: Fields, schema: Fields | None) -> Grammar | None:
    """The grammar of a `response_format`; `schema` is the object that holds its JSON schema as `schema`."""
    match wanted.get("type"):
        case "text":
            return None
        case "json_object":
            return _ANY_OBJECT
        case "json_schema":
            if schema is None:
                raise invalid("'json_schema' is missing", wanted.param("json_schema"))
            return of_schema(schema.get("schema"), schema.param("schema"))
        case _:
            raise invalid("'type' is text, json_object or json_schema", wanted.param("type"), code="invalid_value")


def of_schema(schema: Any, param: str) -> Grammar:
    """The grammar of a JSON schema. Raises InputError for one that is too large, too deep, that refers to other
    documents, or to itself: answers of any depth have no end that a limit of tokens would let them reach."""
    if not isinstance(schema, dict):
        raise invalid("a JSON schema is an object", param, code="invalid_type")
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if len(text) > _LONGEST_SCHEMA:
        raise invalid(f"a JSON schema is at most {_LONGEST_SCHEMA} characters long", param, code="invalid_json_schema")
    _References(schema, param).follow(schema, 0)
    return Grammar("json_schema", text)


class _References:
    """Follows every `$ref` of a schema once."""

    def __init__(self, root: Mapping[str, Any], param: str) -> None:
        self._root = root
        self._param = param
        self._done: dict[str, bool] = {}  # False while the reference is being followed

    def follow(self, node: Any, depth: int) -> None:
        if depth > _DEEPEST:
            raise self._wrong(f"the schema is nested more than {_DEEPEST} levels deep")
        if isinstance(node, list):
            for inner in node:
                self.follow(inner, depth + 1)
        if not isinstance(node, dict):
            return
        reference = node.get("$ref")
        if isinstance(reference, str):
            self._go_to(reference, depth)
        for inner in node.values():
            self.follow(inner, depth + 1)

    def _go_to(self, reference: str, depth: int) -> None:
        done = self._done.get(reference)
        if done is False:
            raise self._wrong(f"the schema refers to itself ({reference[:80]}): write out the levels that are needed")
        if done is None:
            self._done[reference] = False
            self.follow(self._at(reference), depth + 1)
            self._done[reference] = True

    def _at(self, reference: str) -> Any:
        if not reference.startswith("#"):
            raise self._wrong(f"the schema refers to another document ({reference[:80]})")
        node: Any = self._root
        for step in reference[1:].split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and key.isdecimal() and len(key) < 6 and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                raise self._wrong(f"the schema refers to what is not there ({reference[:80]})")
        return node

    def _wrong(self, what: str) -> Exception:
        return invalid(what, self._param, code="invalid_json_schema")


def _regex(pattern: str, param: str) -> Grammar:
    if not pattern:
        raise invalid("the regular expression is empty", param)
    if repeats_a_repetition(pattern):
        raise invalid(
            "a repetition of nothing but a repetition, as in (a+)+, is ambiguous without end",
            param,
            hint="write (a+)+ as a+",
        )
    return Grammar("regex", pattern)


def repeats_a_repetition(pattern: str) -> bool:
    """Whether an unlimited repetition is all that another one repeats: `(a+)+`, `((a*))*`, `(x|a+){2,}`.

    An engine that derives its states does not mind them; whoever checks the answer with a backtracking one, as most
    languages have, would wait for ever.
    """
    groups = [_Group()]
    at = 0
    while at < len(pattern):
        letter = pattern[at]
        group = groups[-1]
        if letter == "(":
            groups.append(_Group())
            at = _after_marks(pattern, at)
            continue
        if letter == ")" and len(groups) > 1:
            group.end_branch()
            groups.pop()
            groups[-1].atom(loops=group.loops)
        elif letter == "|":
            group.end_branch()
        elif letter in "*+" or (letter == "{" and pattern[at : pattern.find("}", at) + 1].endswith(",}")):
            if group.last_loops:
                return True
            group.last_loops = True
            at = pattern.find("}", at) if letter == "{" else at
        elif letter == "[":
            at = _end_of_class(pattern, at)
            group.atom()
        elif letter != "?":
            at += letter == "\\"
            group.atom()
        at += 1
    return False


class _Group:
    """What is known of the group being read: of its last branch how many atoms, of all whether one only loops."""

    def __init__(self) -> None:
        self.atoms = 0
        self.last_loops = False
        self.loops = False

    def atom(self, loops: bool = False) -> None:
        self.atoms += 1
        self.last_loops = loops

    def end_branch(self) -> None:
        self.loops = self.loops or (self.atoms == 1 and self.last_loops)
        self.atoms, self.last_loops = 0, False


def _after_marks(pattern: str, at: int) -> int:
    """Behind `(`, `(?:`, `(?P<name>`, `(?=` and their like."""
    if pattern[at + 1 : at + 2] != "?":
        return at + 1
    end = next((n for n in range(at + 2, len(pattern)) if pattern[n] in ":=!>"), len(pattern))
    return end + 1


def _end_of_class(pattern: str, at: int) -> int:
    """The `]` that ends a class; one that stands first is a member."""
    at += 1 + (pattern[at + 1 : at + 2] == "^")
    at += pattern[at : at + 1] == "]"
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at
