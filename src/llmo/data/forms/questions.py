"""Questions with a context each, and the spans of it that answer them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from llmo.data import checks, stored
from llmo.data.chat import groups
from llmo.data.clean import clean, clean_spans
from llmo.data.deduplicate import digest, text_key
from llmo.data.forms.base import text_of
from llmo.data.named import Columns, named, needed, row_columns, two_texts, unless
from llmo.data.prepared import Prepared
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.row import Drop, Dropped, Row, Span
from llmo.data.stored import Column
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec

_QUESTION = "question query text sentence 问题 查询"
_CONTEXT = "context passage paragraph document article content body 上下文 段落 文章 正文"
_ANSWER = "answers answer answer_text label gold 答案 回答"
_START = "answer_start answer_starts start"
_ANSWERS_HINT = 'write "answer": "..." and, if you like, "answer_start": 17, or as SQuAD has them'


class Questions:
    """A question without any answer is one that its context does not answer. Rows of one context stay on one side."""

    documents: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = True

    def __init__(self, spec: DataSpec, task: TaskSpec) -> None:
        self._spec = spec
        self._ambiguous = 0
        self.multi_label = False

    def choose(self, names: Sequence[str], head: Sequence[RawRow], where: str) -> Columns:
        rest = row_columns(names, self._spec, where)
        text, pair, answer = two_texts(names, self._spec, _QUESTION, _CONTEXT, where)
        answer = answer or needed(names, "label", _ANSWER, where, text, pair)
        start = named(names, _START, text, pair, answer)
        return Columns(text=text, pair=pair, answer=answer, start=start, **unless(rest, text, pair, answer, start))

    def read(self, item: RawRow, columns: Columns, log: ReadLog) -> Row:
        """Raises DataError for an answer that is not in the context, or not where it is said to be."""
        question, context = text_of(item, columns.text), text_of(item, columns.pair, "pair")
        found = _answers(item.values.get(columns.answer), item.values.get(columns.start), item.place)
        row = Row(question, None, item.place, pair=context, answers=[answer for answer, _ in found])
        if found:
            start = self._found(context, *found[0], item.place)
            row.spans = [Span(start, start + len(found[0][0]), "answer")]
        return row

    def settle(self, rows: Sequence[Row]) -> None:
        """Every row's answer is its own."""

    def clean(self, row: Row, changed: Counter[str]) -> None:
        row.text = clean(row.text, self._spec.clean, changed)
        row.pair, row.spans = clean_spans(row.pair or "", row.spans, self._spec.clean, changed)
        if not row.answers:
            return
        if not row.spans:
            row.flaw = Drop.EMPTY, "nothing of the answer is left after cleaning"
            return
        (span,) = row.spans
        others = [clean(answer, self._spec.clean, changed) for answer in row.answers[1:]]
        row.answers = list(dict.fromkeys([row.pair[span.start : span.end], *filter(None, others)]))

    def lacks(self, row: Row) -> tuple[Drop, str] | None:
        if row.flaw is not None:
            return row.flaw
        for name, text in (("question", row.text), ("context", row.pair or "")):
            if not text.strip():
                return Drop.EMPTY, f"no {name} after cleaning"
        return None

    def gather(self, rows: Sequence[Row]) -> list[str]:
        for row in rows:
            row.group = digest(text_key(row.pair or ""))
        if not self._ambiguous:
            return []
        return [f"{self._ambiguous} answers are in their context several times: the first is learnt (no answer_start)"]

    def check(self, prepared: Prepared, where: str) -> None:
        checks.mostly_there(prepared, where)
        if not any(row.answers for row in prepared.rows):
            raise DataError(
                "no row has an answer",
                where=where,
                hint=f"the answers are read from '{prepared.columns['answer']}'; name another: data.label: NAME",
            )

    def held_out(self, rows: Sequence[Row]) -> tuple[list[Row], list[Dropped]]:
        return groups.apart(rows, [row.group or "" for row in rows], "the same context as")

    def card(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"shape": "questions", "unanswerable": sum(not row.answers for row in rows)}

    def stored(self) -> Sequence[Column]:
        return stored.QUESTION

    def _found(self, context: str, answer: str, start: int | None, place: str) -> int:
        if start is None:
            first = context.find(answer)
            if first < 0:
                raise DataError(
                    f"the answer '{answer:.60}' is not in the context",
                    where=place,
                    hint="an answer is a part of its context, letter by letter; leave it empty where there is none",
                )
            self._ambiguous += context.find(answer, first + 1) >= 0
            return first
        if context[start : start + len(answer)] != answer or start < 0:
            there = context[max(0, start) : max(0, start) + len(answer)]
            raise DataError(
                f"the answer at {start} should read '{answer:.60}', but the context there is '{there:.60}'",
                where=place,
                hint="answer_start counts characters (code points); leave it out to have the answer looked for",
            )
        return start


def _answers(value: Any, starts: Any, place: str) -> list[tuple[str, int | None]]:
    """Answers with where each begins (None where it is not said), without the white space around them."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):  # as `datasets` keeps SQuAD
        value, starts = value["text"], value.get("answer_start")
    many = value if isinstance(value, list) else [value]
    begins = starts if isinstance(starts, list) else [starts] * len(many)
    if len(begins) != len(many):
        raise DataError(f"{len(many)} answers and {len(begins)} starts", where=place, hint=_ANSWERS_HINT)
    pairs = [
        (one.get("text"), one.get("answer_start")) if isinstance(one, Mapping) else (one, start)
        for one, start in zip(many, begins, strict=True)
    ]
    return [_answer(text, start, place) for text, start in pairs if text is not None and text != ""]


def _answer(text: Any, start: Any, place: str) -> tuple[str, int | None]:
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"an answer is a text, this is {text!r:.60}", where=place, hint=_ANSWERS_HINT)
    begin = _start(start, place)
    return text.strip(), None if begin is None else begin + len(text) - len(text.lstrip())


def _start(value: Any, place: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        return int(value) if not isinstance(value, float) or value.is_integer() else int("")
    except (TypeError, ValueError):
        raise DataError(
            f"answer_start is a whole number, this is {value!r:.40}", where=place, hint=_ANSWERS_HINT
        ) from None
