"""Reads the entities of a row (tokens with tags, or text with spans) into text and spans of characters."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from llmo.data import tags
from llmo.data.named import Columns
from llmo.data.row import Span
from llmo.errors import DataError

_LABEL_KEYS = ("label", "type", "entity_type", "entity", "tag", "entity_group", "labels")
_END_KEYS = ("end", "end_offset", "stop")
_START_KEYS = ("start", "start_offset", "begin")
_HINT = 'write {"start": 0, "end": 5, "label": "TYPE"}: characters of the text, end excluded'


def read(values: Mapping[str, Any], columns: Columns, place: str) -> tuple[str, list[Span] | None]:
    """The text and its spans; None instead of spans when the row has no annotation at all."""
    if columns.tokens:
        return _from_tags(values.get(columns.tokens), values.get(columns.tags), place)
    text = values.get(columns.text)
    if text is not None and not isinstance(text, str):
        raise DataError(f"the text is a {type(text).__name__}, not a string", where=place)
    annotated = values.get(columns.spans)
    if text is None or annotated is None:
        return text or "", None
    if not isinstance(annotated, list):
        raise DataError(f"entities must be a list, not a {type(annotated).__name__}", where=place, hint=_HINT)
    return text, [_span(item, text, place) for item in annotated]


def without_overlap(spans: list[Span]) -> tuple[list[Span], int]:
    """The longest of spans that overlap, in order of the text, and how many were left out: a token has one tag."""
    ordered = sorted(spans, key=lambda s: s.start)
    if all(a.end <= b.start for a, b in pairwise(ordered)):
        return ordered, 0
    kept: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start - s.end, s.start, s.label)):
        if all(span.end <= other.start or span.start >= other.end for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda s: s.start), len(spans) - len(kept)


def _from_tags(tokens: Any, word_tags: Any, place: str) -> tuple[str, list[Span] | None]:
    if tokens is None or word_tags is None:
        return "", None
    if not isinstance(tokens, list) or not isinstance(word_tags, list) or not all(isinstance(t, str) for t in tokens):
        raise DataError("tokens and tags must be lists of strings", where=place, hint='"tokens": [...], "tags": [...]')
    if len(tokens) != len(word_tags):
        raise DataError(f"{len(tokens)} tokens and {len(word_tags)} tags", where=place, hint="one tag a token")
    for number, tag in enumerate(word_tags, 1):
        wrong = tags.problem(tag) if isinstance(tag, str) else f"{tag!r} is a number, not the name of a tag"
        if wrong:
            raise DataError(f"{wrong} (token {number})", where=place, hint="tags are O, B-TYPE and I-TYPE")
    text, places = tags.join(tokens)
    return text, tags.spans(word_tags, places)


def _span(item: Any, text: str, place: str) -> Span:
    surface = None
    if isinstance(item, Mapping):
        start, end, label = (_first(item, keys) for keys in (_START_KEYS, _END_KEYS, _LABEL_KEYS))
        label = label[0] if isinstance(label, list) and len(label) == 1 else label
        surface = item.get("text", item.get("word"))
    elif isinstance(item, list) and len(item) == 3:
        start, end, label = item
    else:
        raise DataError("an entity is neither an object nor [start, end, label]", where=place, hint=_HINT)
    if not _is_int(start) or not _is_int(end) or not isinstance(label, str) or not label.strip():
        raise DataError("an entity lacks its start, end or label", where=place, hint=_HINT)
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"the entity {start} to {end} is not inside the text of {len(text)} characters", where=place, hint=_HINT
        )
    if isinstance(surface, str) and surface.strip() != text[start:end].strip():
        raise DataError(
            f"the entity {start} to {end} should read '{surface:.60}', but the text there is '{text[start:end]:.60}'",
            where=place,
            hint="offsets count characters (code points), not bytes or UTF-16 units",
        )
    return Span(start, end, label.strip())


def _first(item: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((item[key] for key in keys if key in item), None)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
