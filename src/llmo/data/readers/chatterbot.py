"""Reads the ChatterBot corpus: YAML files of conversations, each a list of turns.

The YAML is read as events and never as objects: every scalar is a string (so that an answer `Yes` stays one), and
aliases and tags, with which a small file could grow large or reach for Python, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from llmo.data.encoding import open_text, too_long
from llmo.data.readers.base import MAX_CELL, RawRow, ReadLog
from llmo.errors import DataError
from llmo.specs import DataSpec

_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_MAX_FILE = 64 << 20
_STRING = (None, "!", "tag:yaml.org,2002:str")
_HINT = "write `conversations:`, and under it one list a conversation: a question, its answer, and so on"


def read(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """Rows of `turns`, each at the line its conversation begins on. Raises DataError for any other YAML."""
    where = log.name(path)
    if path.stat().st_size > _MAX_FILE:
        raise DataError(
            f"a YAML document of more than {_MAX_FILE >> 20} MiB is not read",
            where=where,
            hint="divide it into several files, or write JSON Lines",
        )
    with open_text(path, spec.encoding, log) as file:
        text = file.read()
    found = False
    try:
        for line, turns in _conversations(_events(text, where), where):
            found = True
            yield RawRow({"turns": turns}, f"{where}:{line}")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise DataError(
            f"broken YAML: {problem}", where=f"{where}:{mark.line + 1}" if mark else where, hint="mend this line"
        ) from None
    if not found:
        raise DataError("this YAML holds no conversations", where=where, hint=_HINT)


def _events(text: str, where: str) -> Iterator[yaml.Event]:
    for event in yaml.parse(text, Loader=_LOADER):
        line = _line(event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise DataError(
                "YAML anchors and aliases are not read", where=f"{where}:{line}", hint="write the text out in full"
            )
        tag = getattr(event, "tag", None)
        if tag not in _STRING:
            raise DataError(f"the YAML tag {tag} is not read", where=f"{where}:{line}", hint="write plain text")
        yield event


def _conversations(events: Iterator[yaml.Event], where: str) -> Iterator[tuple[int, list[str]]]:
    """The items of the list at the key `conversations`, with their lines; other keys are passed over."""
    opening = next((e for e in events if not isinstance(e, (yaml.StreamStartEvent, yaml.DocumentStartEvent))), None)
    if not isinstance(opening, yaml.MappingStartEvent):
        raise DataError("this YAML is no mapping with the key 'conversations'", where=where, hint=_HINT)
    for key in events:
        if not isinstance(key, yaml.ScalarEvent):
            return
        value = next(events)
        if key.value.strip().casefold() != "conversations":
            _skip(value, events)
            continue
        if not isinstance(value, yaml.SequenceStartEvent):
            raise DataError("conversations are not a list", where=f"{where}:{_line(value)}", hint=_HINT)
        for item in events:
            if isinstance(item, yaml.SequenceEndEvent):
                break
            line = _line(item)
            yield line, _turns(item, events, f"{where}:{line}")


def _turns(item: yaml.Event, events: Iterator[yaml.Event], place: str) -> list[str]:
    """The turns of one conversation; one that is a lone string has a single turn."""
    turns: list[str] = []
    size = 0
    lone = isinstance(item, yaml.ScalarEvent)
    for event in iter([item]) if lone else events:
        if isinstance(event, yaml.SequenceEndEvent):
            break
        if not isinstance(event, yaml.ScalarEvent) or not (lone or isinstance(item, yaml.SequenceStartEvent)):
            raise DataError("a turn of a conversation is not a text", where=place, hint=_HINT)
        turns.append(event.value)
        size += len(event.value)
        if size > MAX_CELL:
            raise too_long(place)
    return turns


def _skip(event: yaml.Event, events: Iterator[yaml.Event]) -> None:
    depth = 0
    starts, ends = (yaml.SequenceStartEvent, yaml.MappingStartEvent), (yaml.SequenceEndEvent, yaml.MappingEndEvent)
    while True:
        depth += isinstance(event, starts) - isinstance(event, ends)
        if depth == 0:
            return
        event = next(events)


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0
