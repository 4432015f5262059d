"""Next item: which item of a catalogue comes after a user's history (sequential recommendation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

from llmo.errors import DataError, InputError, ModelError
from llmo.tasks.base import IGNORED, Encoding, Logits, Row, Task, refuse_surrogates, seen
from llmo.tasks.card import load_tokenizer
from llmo.tasks.metrics import MICRO, Floats, Tally, Totals, ratio, softmax
from llmo.tasks.verdict import Decisions, Verdict, surprise
from llmo.types import Asked

TOP = 10  # items of an answer, and of the metrics
SAME = 8  # of them that two answers share when they are the same
SPECIAL = 2  # entries of the vocabulary before the first item: padding and unknown


@dataclass(frozen=True, slots=True)
class Lesson(Encoding):
    """A history with the vocabulary's entry for the item after each of its items; no offsets and words."""

    following: list[int]


class NextItem(Task):
    """A row's `text` is a history, items with spaces between; `label` is what came next, or None for a training row, in
    which every item is the next one of those before it.

    The labels are the catalogue, in the order of the logits. Only the last `max_length` items are looked at. With
    `repeats` an item of the history may be the answer; else those are left out of answers and of the ranking.
    """

    name: ClassVar[str] = "next-item"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    has_classes: ClassVar[bool] = False

    def __init__(self, labels: Sequence[str], max_length: int = 128, repeats: bool = False) -> None:
        super().__init__(labels, max_length)
        self.repeats = repeats
        self._index = {label: i for i, label in enumerate(self.labels)}

    @property
    def metric(self) -> str:
        return f"ndcg@{TOP}"

    @property
    def problem_type(self) -> str:
        return "single_label_classification"

    @classmethod
    def of_base(cls, folder: Path) -> dict[str, Any]:
        """The catalogue: what the base's tokeniser has entries for. Raises ModelError for a tokeniser of text."""
        tokenizer = load_tokenizer(folder)
        if not isinstance(tokenizer.model, models.WordLevel):
            raise ModelError(
                "this base model reads text, and next-item learns of items",
                hint="write model: scratch:sasrec, which makes one for the catalogue",
                where=str(folder),
            )
        entries = tokenizer.get_vocab()
        return {"catalogue": sorted(entries, key=lambda entry: entries[entry])[SPECIAL:]}

    @classmethod
    def from_rows(cls, rows: Sequence[Row], *, max_length: int, options: Mapping[str, Any]) -> Self:
        if not len(rows):
            raise DataError("there are no training rows", hint="look at what was dropped: llmo data show NAME")
        return cls(options["catalogue"], max_length, repeats=bool(options.get("repeats")))

    def options(self) -> dict[str, Any]:
        return {"repeats": self.repeats}

    def asked(self, row: Row) -> Asked:
        return _question(row)[0]

    def tokens(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
        """As the base, but what is cut off is the beginning."""
        refuse_surrogates(texts)
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length, direction="left")
        found = zip(tokenizer.encode_batch(list(texts)), texts, strict=True)
        return [Encoding(kept.ids, len(text.split()), kept.offsets, kept.word_ids) for kept, text in found]

    def lessons(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[tuple[Row, Encoding]]:
        """A history that is too long is gone through from its end in pieces, each beginning with the item that the one
        before it ends with."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        found: list[tuple[Row, Encoding]] = []
        for row, whole in zip(rows, tokenizer.encode_batch([row["text"] for row in rows]), strict=True):
            for end in range(len(whole.ids), 1, -self.max_length):
                ids = whole.ids[max(0, end - self.max_length - 1) : end]
                found.append((row, Lesson(ids[:-1], len(ids) - 1, [], [], ids[1:])))
        return found

    def target(self, row: Row, encoding: Encoding) -> NDArray[Any]:
        """Of a lesson the item after each one `[tokens]`, -100 where it is unknown."""
        assert isinstance(encoding, Lesson)  # noqa: S101 (what `lessons` makes)
        following = np.asarray(encoding.following, np.int64) - SPECIAL
        return np.where(following >= 0, following, IGNORED)

    def tally(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> Tally:
        """Of each row whether its item is among the first, and its discounted gain in millionths.

        The item's rank is among the whole catalogue (Krichene & Rendle 2020), and the worse one where logits are equal.
        """
        columns = np.zeros((len(rows), 2), np.int64)
        for i, (found, row) in enumerate(zip(logits, rows, strict=True)):
            history, item = _question(row)
            at = self._index.get(item)
            if at is None or (not self.repeats and item in history.split()):
                continue
            allowed = self._allowed(found, history)
            rank = int((allowed >= found[at]).sum()) - 1
            if rank < TOP:
                columns[i] = 1, round(MICRO / np.log2(rank + 2))
        return Tally.of_sums(columns)

    def scores(self, totals: Totals) -> dict[str, Floats]:
        hits, gain = np.moveaxis(totals.sums, -1, 0)
        return {
            f"recall@{TOP}": ratio(hits, totals.rows),
            f"ndcg@{TOP}": ratio(gain / MICRO, totals.rows),
        }

    def verdicts(
        self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> list[Verdict | None]:
        """Of each row the likeliest item; None where the right one may not be answered."""
        found: list[Verdict | None] = []
        for said, row in zip(logits, rows, strict=True):
            history, item = _question(row)
            at = self._index.get(item)
            if at is None or (not self.repeats and item in history.split()):
                found.append(None)
                continue
            each = softmax(np.asarray(self._allowed(said, history), np.float32)[None]).astype(np.float64)
            best = int(each[0].argmax())
            decision = Decisions.among(each, np.array([at]))
            found.append(Verdict(surprise(each[:, at]), item, self.labels[best], float(each[0, best]), decision))
        return found

    def details(self, tally: Tally) -> dict[str, Any]:
        """Among how many items the ranks are."""
        return {"catalogue": len(self.labels)}

    def answer(self, logits: Logits, encoding: Encoding, asked: Asked) -> dict[str, Any]:
        """`{"items": [{"item", "score"}], ...}`, the likeliest first; scores are probabilities among those that may be
        answered. `unknown` names items of the history that are not in the catalogue. Raises InputError when none is."""
        (text,) = self.given(asked)
        unknown = [item for item in dict.fromkeys(text.split()) if item not in self._index]
        if unknown and len(unknown) == len(set(text.split())):
            raise InputError(
                f"no item of this history is in the catalogue, such as '{unknown[0][:80]}'",
                hint="send items of the training data, oldest first, with spaces between: '50 172 181'",
            )
        allowed = self._allowed(logits, text)
        each = softmax(np.asarray(allowed, np.float32))
        best = [i for i in np.argsort(-allowed, kind="stable")[:TOP] if np.isfinite(allowed[i])]
        items = [{"item": self.labels[i], "score": float(each[i])} for i in best]
        return {"items": items, **({"unknown": unknown} if unknown else {}), **seen(encoding)}

    def agree(self, a: Logits, b: Logits, encoding: Encoding | None = None) -> bool:
        """Whether most of the best items are the same."""
        count = min(TOP, len(self.labels))
        best = [set(np.argsort(-x, kind="stable")[:count].tolist()) for x in (a, b)]
        return len(best[0] & best[1]) >= min(SAME, count)

    def _allowed(self, logits: Logits, history: str) -> Logits:
        """The logits, minus infinity where an item may not be answered."""
        if self.repeats:
            return logits
        left = logits.copy()
        left[[self._index[item] for item in history.split() if item in self._index]] = -np.inf
        return left


def _question(row: Row) -> tuple[str, str]:
    """A row's history and the item to be found after it; of a training row, the last one."""
    if row.get("label") is not None:
        return row["text"], row["label"]
    history, _, item = row["text"].rpartition(" ")
    return history, item
