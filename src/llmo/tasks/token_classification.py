"""Token classification: labelled spans of a text (names, slots), learnt and answered word by word.

A word is the pre-tokeniser's word, cut further where one holds punctuation or characters of a script written
without spaces, so that spans end where they should whatever the tokeniser. Its first piece carries the label.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.errors import DataError, nearest
from llmo.tasks.base import Encoding, Logits, Row, Task, seen
from llmo.tasks.metrics import Floats, Tally, Totals, macro_f1, micro_f1, per_class, ratio, softmax
from llmo.tasks.verdict import Decisions, Verdict, surprise
from llmo.types import Asked

if TYPE_CHECKING:
    import torch

OUTSIDE = "O"
IGNORED = -100
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass(frozen=True, slots=True)
class Entity:
    """A labelled span `[start, end)` in characters of the text as sent; `score` is the mean over its words."""

    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Word:
    """A word's first token, and its span in characters."""

    token: int
    start: int
    end: int


class TokenClassification(Task):
    """Rows carry `spans`: `{"start", "end", "label"}`. The classes are `O` and, per label, `B-` and `I-`."""

    name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"

    def __init__(self, labels: Sequence[str], max_length: int = 128) -> None:
        super().__init__(labels, max_length)
        self._index = {label: i for i, label in enumerate(self.labels)}
        self.types = tuple(label[2:] for label in self.labels if label.startswith("B-"))
        self._type_index = {name: i for i, name in enumerate(self.types)}

    @property
    def metric(self) -> str:
        return "f1"

    @classmethod
    def from_rows(cls, rows: Sequence[Row], *, max_length: int, options: Mapping[str, Any]) -> Self:
        types = sorted({span["label"] for row in rows for span in row["spans"]})
        if not types:
            raise DataError("no training row carries a labelled span", hint="check `data.label` and the tags' scheme")
        return cls([OUTSIDE, *(f"{tag}-{name}" for name in types for tag in "BI")], max_length)

    def encode(self, tokenizer: Tokenizer, asked: Sequence[Asked]) -> list[Encoding]:
        """As the base, with `word_ids` cut to this task's words and white space trimmed off the offsets."""
        texts = [self.given(one)[0] for one in asked]
        return [_words_of(e, text) for e, text in zip(self.tokens(tokenizer, texts), texts, strict=True)]

    def target(self, row: Row, encoding: Encoding) -> NDArray[Any]:
        """One class per token `[tokens]`; of overlapping spans the first, then the longest, is learnt."""
        spans = sorted(row["spans"], key=lambda s: (s["start"], -s["end"]))
        target = np.full(len(encoding.input_ids), IGNORED, np.int64)
        begun: set[int] = set()
        first = 0
        for word in _words(encoding, row["text"]):
            while first < len(spans) and spans[first]["end"] <= word.start:
                first += 1
            target[word.token] = self._index[OUTSIDE]
            for i in range(first, len(spans)):
                if spans[i]["start"] >= word.end:
                    break
                if spans[i]["end"] > word.start:
                    self._type(spans[i]["label"])
                    target[word.token] = self._index[f"{'I' if i in begun else 'B'}-{spans[i]['label']}"]
                    begun.add(i)
                    break
        return target

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None, smoothing: float = 0.0
    ) -> torch.Tensor:
        from torch.nn import functional  # a replica uses this file without torch

        summed = functional.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            class_weights,
            ignore_index=IGNORED,
            label_smoothing=smoothing,
            reduction="sum",
        )
        meant = targets != IGNORED
        mass = meant.sum() if class_weights is None else (class_weights[targets.clamp(min=0)] * meant).sum()
        return summed / mass.clamp(min=1e-9)  # a batch without words has no loss, not NaN

    def mass(self, targets: torch.Tensor, class_weights: torch.Tensor | None) -> float:
        kept = targets[targets != IGNORED]
        return float(len(kept)) if class_weights is None else float(class_weights[kept].sum())

    def class_counts(self, targets: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
        joined = np.concatenate(list(targets))
        return np.bincount(joined[joined != IGNORED], minlength=len(self.labels)).astype(np.int64)

    def tally(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> Tally:
        """Strict: an entity is right when start, end and label are; gold beyond the truncation counts as missed."""
        counts = np.zeros((3, len(rows), len(self.types)), np.int64)
        for i, (each, row, encoding) in enumerate(zip(logits, rows, encodings, strict=True)):
            given = {(e.start, e.end, e.label) for e in self.decode(each, encoding, row["text"])}
            wanted = {(s["start"], s["end"], s["label"]) for s in row["spans"]}
            for number, group in enumerate((given & wanted, given, wanted)):
                for _, _, label in group:
                    counts[number, i, self._type(label)] += 1
        return Tally.of_counts(*counts)

    def scores(self, totals: Totals) -> dict[str, Floats]:
        hits = totals.hits.sum(-1)
        return {
            "f1": micro_f1(totals),
            "precision": ratio(hits, totals.predicted.sum(-1)),
            "recall": ratio(hits, totals.gold.sum(-1)),
            "macro_f1": macro_f1(totals),
            **per_class(totals, self.types),
        }

    def details(self, tally: Tally) -> dict[str, Any]:
        """Per type: entities right, answered and gold."""
        totals = tally.totals()
        columns = {"right": totals.hits, "answered": totals.predicted, "gold": totals.gold}
        return {"per_type": {name: {k: int(v[i]) for k, v in columns.items()} for i, name in enumerate(self.types)}}

    def verdicts(
        self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> list[Verdict | None]:
        """Over the words; a text of which no word was seen has none."""
        return [self._said(*each) for each in zip(logits, rows, encodings, strict=True)]

    def _said(self, logits: Logits, row: Row, encoding: Encoding) -> Verdict | None:
        target = self.target(row, encoding)
        words = np.flatnonzero(target != IGNORED)
        if not len(words):
            return None
        each, gold = softmax(logits[words]), target[words]
        decided = Decisions.among(each, gold)
        found = self.decode(logits, encoding, row["text"])
        answer = [(e.start, e.end, e.label) for e in found]
        wanted = [(s["start"], s["end"], s["label"]) for s in row["spans"]]
        score = min((e.score for e in found), default=None)
        loss = surprise(each[np.arange(len(gold)), gold])
        return Verdict(loss, _named(wanted, row["text"]), _named(answer, row["text"]), score, decided)

    def answer(self, logits: Logits, encoding: Encoding, asked: Asked) -> dict[str, Any]:
        (text,) = self.given(asked)
        entities = [
            {"start": e.start, "end": e.end, "label": e.label, "text": text[e.start : e.end], "score": e.score}
            for e in self.decode(logits, encoding, text)
        ]
        return {"entities": entities, **seen(encoding)}

    def agree(self, a: Logits, b: Logits, encoding: Encoding | None = None) -> bool:
        if encoding is not None:
            first = [w.token for w in _words(encoding, "")]
            a, b = a[first], b[first]
        return bool((a.argmax(-1) == b.argmax(-1)).all())

    def decode(self, logits: Logits, encoding: Encoding, text: str) -> list[Entity]:
        """Entities in order; an `I-` that continues nothing of its type begins an entity."""
        words = _words(encoding, text)
        if not words:
            return []
        probabilities = softmax(logits[[word.token for word in words]])
        best = probabilities.argmax(-1)
        groups: list[tuple[str, list[int]]] = []
        before = OUTSIDE
        for i, index in enumerate(best):
            label = self.labels[index]
            if label != OUTSIDE:
                if label[0] == "I" and before[1:] == label[1:]:
                    groups[-1][1].append(i)
                else:
                    groups.append((label[2:], [i]))
            before = label
        return [
            Entity(words[g[0]].start, words[g[-1]].end, name, float(np.mean([probabilities[i, best[i]] for i in g])))
            for name, g in groups
        ]

    def _type(self, label: str) -> int:
        found = self._type_index.get(label)
        if found is None:
            raise DataError(
                f"the label '{label}' is not one the model knows{nearest(label, list(self.types))}",
                hint=f"known: {', '.join(self.types[:20])}; every label needs rows in the training split",
            )
        return found


def _named(spans: Sequence[tuple[int, int, str]], text: str) -> str:
    return ", ".join(f"{label}: {text[start:end]}" for start, end, label in spans) or "(none)"


def _words(encoding: Encoding, text: str) -> list[Word]:
    """The words the model saw. One that truncation cut in two is given its whole span (as far as `text` tells)."""
    words: list[Word] = []
    before: int | None = None
    for token, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
        if word is None:
            continue
        if words and word == before:
            words[-1] = replace(words[-1], end=max(end, words[-1].end))
        else:
            words.append(Word(token, start, end))
        before = word
    if encoding.truncated and words:
        end = words[-1].end
        while 0 < end < len(text) and _kind(text[end - 1]) == _kind(text[end]) == "letter":
            end += 1
        words[-1] = replace(words[-1], end=end)
    return words


def _words_of(encoding: Encoding, text: str) -> Encoding:
    """Number the words: a token continues the word before it only within one run of letters and digits."""
    numbers: list[int | None] = []
    offsets = []
    number = -1
    word_before: int | None = None
    end_before = 0
    for word, (first, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
        start = first
        while start < end and text[start].isspace():
            start += 1
        offsets.append((start, end))
        if word is None or start >= end:
            numbers.append(None)
            continue
        overlaps = start < end_before  # the bytes of one character
        joined = start == end_before and _kind(text[start - 1]) == _kind(text[start]) == "letter"
        if not (word == word_before and (overlaps or joined)):
            number += 1
        numbers.append(number)
        word_before, end_before = word, end
    return replace(encoding, offsets=offsets, word_ids=numbers)


@lru_cache(maxsize=65536)
def _kind(character: str) -> str:
    """`letter` (also digits and combining marks), or `alone`: what is a word by itself."""
    if character.isascii():
        return "letter" if character.isalnum() else "alone"
    if unicodedata.name(character, "").startswith(UNSPACED):
        return "alone"
    return "letter" if character.isalnum() or unicodedata.category(character)[0] == "M" else "alone"
