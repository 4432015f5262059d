"""Extractive question answering: the answer to a question is a span of the context that is sent with it.

A context longer than `max_length` is read in windows that overlap by a third, each behind the question. A window's best
span is weighed against its first token, which stands for "no answer here" (Devlin et al. 2019, as for SQuAD 2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.errors import DataError, InputError, ModelError, SpecError
from llmo.tasks import spelled
from llmo.tasks.base import Encoding, Logits, Row, Task, refuse_surrogates, seen
from llmo.tasks.metrics import MICRO, Floats, Tally, Totals, ratio
from llmo.tasks.verdict import Decisions, Verdict
from llmo.types import Asked

if TYPE_CHECKING:
    import torch

SHORTEST = 32  # tokens of a window: the question may fill half of it, and the overlap a third
MOST_WINDOWS = 64  # of one context; what lies beyond is cut away
MOST_TOKENS = 30  # of an answer
START, END = 0, 1  # columns of the logits
NO_ANSWER = "(none)"
NOWHERE = (0, 0)  # the tokens of an answer that is not in a window


@dataclass(frozen=True, slots=True)
class Found:
    """A window's best span: tokens `first` to `last` of the encoding, none in a window without context. `margin` is how
    far its logits are above those of no answer; `score` the probability of the span, `nothing` that of no answer."""

    first: int | None
    last: int | None
    margin: float
    score: float
    nothing: float


class ExtractiveQA(Task):
    """Rows carry the question as `text`, the context as `pair`, the right `answers` (texts; none when the context does
    not tell), and `answer_start`, the character of the context where the first of them begins.

    `unanswerable` models may say that there is no answer; they were trained on rows without any.
    """

    name: ClassVar[str] = "extractive-qa"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    asks: ClassVar[tuple[str, ...]] = ("question", "context")
    has_classes: ClassVar[bool] = False
    unlearnt: ClassVar[str] = "have an answer that is longer than windows of `task.max_length` overlap"

    def __init__(
        self, labels: Sequence[str] = ("start", "end"), max_length: int = 384, *, unanswerable: bool = False
    ) -> None:
        super().__init__(labels, max_length)
        self.unanswerable = unanswerable

    @property
    def metric(self) -> str:
        return "f1"

    @classmethod
    def from_rows(cls, rows: Sequence[Row], *, max_length: int, options: Mapping[str, Any]) -> Self:
        if max_length < SHORTEST:
            raise SpecError(
                f"max_length is {max_length}: a question and a part of its context do not fit",
                hint=f"set task.max_length to {SHORTEST} or more; 384 is usual",
            )
        answered = sum(bool(row["answers"]) for row in rows)
        if not answered:
            raise DataError("no training row has an answer", hint="check `data.label`, the column of the answers")
        return cls(max_length=max_length, unanswerable=answered < len(rows))

    def options(self) -> dict[str, Any]:
        return {"unanswerable": self.unanswerable}

    def asked(self, row: Row) -> Asked:
        return {"question": row["text"], "context": row["pair"]}

    def encode(self, tokenizer: Tokenizer, asked: Sequence[Asked]) -> list[Encoding]:
        """One sequence a window: the question, then a part of the context, whose tokens alone have offsets (into the
        context as sent) and word ids. Raises InputError for a question of more than half of `max_length` tokens."""
        pairs = [(question, context) for question, context in map(self.given, asked)]
        refuse_surrogates([text for pair in pairs for text in pair])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        for question in tokenizer.encode_batch([question for question, _ in pairs], add_special_tokens=False):
            self._check_question(len(question.ids))
        tokenizer.enable_truncation(self.max_length, stride=self._overlap, strategy="only_second")
        return [self._windows([found, *found.overflowing]) for found in tokenizer.encode_batch(pairs)]

    def plain_ids(self, tokenizer: Any, asked: Sequence[Asked]) -> list[list[int]]:
        how = {"truncation": "only_second", "max_length": self.max_length, "stride": self._overlap}
        found = []
        for question, context in map(self.given, asked):
            windows = tokenizer(question, context, return_overflowing_tokens=True, **how)["input_ids"]
            found.append([token for window in windows[:MOST_WINDOWS] for token in window])
        return found

    def lessons(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[tuple[Row, Encoding]]:
        """The windows that hold the answer, and those that hold nothing of it: there is no answer there. A row none of
        whose windows holds its answer whole is left out."""
        found = []
        for row, encoding in zip(rows, self.encode_rows(tokenizer, rows), strict=True):
            windows = [(window, self._place(row, window)) for window in encoding.apart()]
            if not row["answers"] or any(place not in (None, NOWHERE) for _, place in windows):
                found += [(row, window) for window, place in windows if place is not None]
        return found

    def target(self, row: Row, encoding: Encoding) -> NDArray[Any]:
        """Of a window the tokens where the answer starts and ends (0, 0: no answer here), and the first and the last
        of the context `[4]`."""
        inside = _context(encoding.word_ids)
        start, end = self._place(row, encoding) or NOWHERE
        return np.array([start, end, *((inside[0], inside[-1]) if len(inside) else (0, 0))], np.int32)

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None, smoothing: float = 0.0
    ) -> torch.Tensor:
        """Mean cross-entropy of start and end, over the tokens that an answer may name."""
        import torch
        from torch.nn import functional  # a replica uses this file without torch

        start, end, first, last = targets.long().unbind(1)
        places = torch.arange(logits.shape[1], device=logits.device)[None]
        allowed = ((places >= first[:, None]) & (places <= last[:, None])) | (places == 0)
        masked = logits.float().masked_fill(~allowed[..., None], -torch.inf)
        sides = functional.cross_entropy(masked[..., START], start), functional.cross_entropy(masked[..., END], end)
        return (sides[0] + sides[1]) / 2

    def mass(self, targets: torch.Tensor, class_weights: torch.Tensor | None) -> float:
        return float(len(targets))

    def tally(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> Tally:
        """Per row: exact match and F1 (in parts), whether it has an answer, and the first two of those that have."""
        columns = np.zeros((len(rows), 5), np.int64)
        for i, (said, row, encoding) in enumerate(zip(logits, rows, encodings, strict=True)):
            text = self._span(said, encoding, row["pair"])[0]
            exact, f1 = spelled.compare(text, row["answers"])
            columns[i, :2] = exact, round(f1 * MICRO)
            columns[i, 2:] = (1, *columns[i, :2]) if row["answers"] else 0
        return Tally.of_sums(columns)

    def scores(self, totals: Totals) -> dict[str, Floats]:
        """As SQuAD has them; `no_answer_accuracy` is of rows without an answer, `answered_f1` of the others."""
        exact, f1, answered, answered_exact, answered_f1 = np.moveaxis(totals.sums, -1, 0)
        named = {"f1": ratio(f1 / MICRO, totals.rows), "exact_match": ratio(exact, totals.rows)}
        if self.unanswerable:
            named["answered_f1"] = ratio(answered_f1 / MICRO, answered)
            named["no_answer_accuracy"] = ratio(exact - answered_exact, totals.rows - answered)
        return named

    def verdicts(
        self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> list[Verdict | None]:
        """Of each answer whether it is right, word for word: the more certain a wrong one is, the higher its loss."""
        found: list[Verdict | None] = []
        for said, row, encoding in zip(logits, rows, encodings, strict=True):
            text, _, _, score = self._span(said, encoding, row["pair"])
            decision = Decisions.whether_right(score, right=spelled.compare(text, row["answers"])[0])
            right = " / ".join(dict.fromkeys(row["answers"])) or NO_ANSWER
            found.append(Verdict(decision.surprise, right, NO_ANSWER if text is None else text, score, decision))
        return found

    def answer(self, logits: Logits, encoding: Encoding, asked: Asked) -> dict[str, Any]:
        """`answer` and where it stands in the context (characters `start` to `end`); null where there is none."""
        text, start, end, score = self._span(logits, encoding, self.given(asked)[1])
        place = {} if text is None else {"start": start, "end": end}
        return {"answer": text, **place, "score": score, **seen(encoding)}

    def agree(self, a: Logits, b: Logits, encoding: Encoding | None = None) -> bool:
        if encoding is None:
            return bool((a.argmax(0) == b.argmax(0)).all())
        one, other = self._best(a, encoding), self._best(b, encoding)
        return (one.first, one.last) == (other.first, other.last)

    @property
    def _overlap(self) -> int:
        """Tokens that two windows of one context share."""
        return self.max_length // 3

    def _check_question(self, tokens: int) -> None:
        if tokens > self.max_length // 2:
            raise InputError(
                f"a question has {tokens} tokens, and this model reads questions of at most {self.max_length // 2}",
                hint="shorten it, or train with a larger task.max_length; the context is the other text",
            )

    def _windows(self, found: Sequence[Any]) -> Encoding:
        kept = found[:MOST_WINDOWS]
        if not kept[0].special_tokens_mask[0]:
            raise ModelError(
                "the tokeniser puts no token before a text, which could stand for no answer",
                hint="take an encoder such as BERT or RoBERTa for this task",
            )
        ids, offsets, words, ends = [], [], [], []
        for window in kept:
            inside = [number == 1 for number in window.sequence_ids]
            ids += window.ids
            offsets += [place if own else (0, 0) for place, own in zip(window.offsets, inside, strict=True)]
            words += [word if own else None for word, own in zip(window.word_ids, inside, strict=True)]
            ends.append(len(ids))
        length = sum(len(window.ids) for window in found)
        return Encoding(ids, length, offsets, words, ends=tuple(ends) if len(ends) > 1 else ())

    def _place(self, row: Row, window: Encoding) -> tuple[int, int] | None:
        """The tokens where a row's answer starts and ends, (0, 0) where nothing of it is; None where it is cut."""
        inside = _context(window.word_ids)
        if not row["answers"] or not len(inside):
            return NOWHERE
        start = row["answer_start"]
        end = start + len(row["answers"][0])
        touched = [i for i in inside if window.offsets[i][0] < end and window.offsets[i][1] > start]
        if not touched:
            return NOWHERE
        whole = window.offsets[inside[0]][0] <= start and window.offsets[inside[-1]][1] >= end
        return (int(touched[0]), int(touched[-1])) if whole else None

    def _span(self, logits: Logits, encoding: Encoding, context: str) -> tuple[str | None, int, int, float]:
        """The answer, the characters of the context where it starts and ends, and its probability."""
        best = self._best(logits, encoding)
        if best.first is None or best.last is None:
            return None, 0, 0, best.nothing
        start, end = encoding.offsets[best.first][0], encoding.offsets[best.last][1]
        start += len(context[start:end]) - len(context[start:end].lstrip())
        end -= len(context[start:end]) - len(context[start:end].rstrip())
        return context[start:end], start, end, best.score

    def _best(self, logits: Logits, encoding: Encoding) -> Found:
        bounds = pairwise((0, *(encoding.ends or (len(encoding.input_ids),))))
        found = [_search(logits[a:b].astype(np.float64), _context(encoding.word_ids[a:b]), a) for a, b in bounds]
        best = max(found, key=lambda one: one.margin)
        if self.unanswerable and best.margin < 0:
            return Found(None, None, best.margin, best.score, best.nothing)
        return best


def _context(words: Sequence[int | None]) -> NDArray[np.int64]:
    """The numbers of the tokens that are of the context."""
    return np.flatnonzero([word is not None for word in words])


def _search(logits: Floats, inside: NDArray[np.int64], before: int) -> Found:
    """The best span of one window, whose tokens come after `before` others. `inside` are those of the context."""
    if not len(inside):
        return Found(None, None, -np.inf, 0.0, 1.0)
    allowed = logits[np.append(0, inside)]
    shifted = allowed - allowed.max(0)
    logs = shifted - np.log(np.exp(shifted).sum(0))  # of no answer, then of the context's tokens
    starts, ends = logs[1:, START], logs[1:, END]
    sums = [starts[: len(starts) - wide] + ends[wide:] for wide in range(min(MOST_TOKENS, len(starts)))]
    wide = int(np.argmax([one.max() for one in sums]))
    first = int(sums[wide].argmax())
    best, nothing = float(sums[wide][first]), float(logs[0].sum())
    first_token, last_token = inside[first] + before, inside[first + wide] + before
    return Found(int(first_token), int(last_token), best - nothing, float(np.exp(best)), float(np.exp(nothing)))
