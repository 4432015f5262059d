"""SQuAD's JSON: articles with paragraphs, each a context with its questions, as one row a question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmo.errors import DataError

_ARTICLE = {"id", "title", "paragraphs"}
_HINT = 'write {"paragraphs": [{"context": "...", "qas": [{"question": "...", "answers": [...]}]}]}'


def is_article(row: Mapping[str, Any]) -> bool:
    """Rows of other kinds may have a column of this name: an article's hold `qas`, or there is little else in it."""
    paragraphs = row.get("paragraphs")
    asked = isinstance(paragraphs, list) and any(isinstance(one, Mapping) and "qas" in one for one in paragraphs)
    return asked or ("paragraphs" in row and row.keys() <= _ARTICLE)


def questions(article: Mapping[str, Any], place: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The questions of an article, each with its context and its place. Raises DataError for another structure."""
    for number, paragraph in enumerate(_list(article.get("paragraphs"), "paragraphs", place), 1):
        where = f"{place} paragraph {number}"
        if not isinstance(paragraph, Mapping) or not isinstance(paragraph.get("context"), str):
            raise DataError("a paragraph is an object with its `context`", where=where, hint=_HINT)
        for count, asked in enumerate(_list(paragraph.get("qas"), "qas", where), 1):
            if not isinstance(asked, Mapping):
                raise DataError("a question is an object", where=f"{where} question {count}", hint=_HINT)
            yield {**asked, "context": paragraph["context"]}, f"{where} question {count}"


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"`{name}` must be a list", where=where, hint=_HINT)
    return value
