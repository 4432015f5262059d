"""Sentence embedding: texts that belong together lie near each other, for search and for similarity."""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.errors import DataError
from llmo.tasks.base import Encoding, Logits, Row, Task, seen
from llmo.tasks.metrics import MICRO, Counts, Floats, Tally, Totals, correlation, ratio, spearman
from llmo.tasks.verdict import Verdict
from llmo.types import Asked

if TYPE_CHECKING:
    import torch

SCALE = 20.0  # of cosines before the softmax, as sentence-transformers has it
AGREED = 0.98  # cosine of two vectors that count as the same answer
DIGITS = 7  # after the point: a float32 of length 1 has no more
TIE = 1e-9  # of cosines that are the same
BLOCK = 1024  # texts that are compared with all others at once


class SentenceEmbedding(Task):
    """Rows carry `text` and `pair`, and either a third text `negative` or a `score` of how alike the two are.

    Pairs are learnt against the other pairs of their micro-batch, and the negatives of all of them (Henderson et al.
    2017, "Efficient Natural Language Response Suggestion"; the loss of van den Oord et al. 2018, InfoNCE). With
    `scored` rows the cosine learns the score (Reimers and Gurevych 2019), brought to 0..1 from `low`..`high`.

    The model's logits are the vector itself: the mean of the last hidden states, at length 1, as `Embedder` has it.
    """

    name: ClassVar[str] = "sentence-embedding"
    auto_class: ClassVar[str] = "AutoModel"
    may_ask: ClassVar[tuple[str, ...]] = ("pair",)
    has_classes: ClassVar[bool] = False
    has_head: ClassVar[bool] = False
    whole: ClassVar[bool] = True

    def __init__(
        self,
        labels: Sequence[str] = (),
        max_length: int = 128,
        *,
        scored: bool = False,
        negatives: bool = False,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        super().__init__(labels, max_length)
        self.scored, self.negatives, self.low, self.high = scored, negatives, low, high

    @property
    def metric(self) -> str:
        return "spearman" if self.scored else "mrr"

    @property
    def group(self) -> int:
        return 3 if self.negatives else 2

    @classmethod
    def from_rows(cls, rows: Sequence[Row], *, max_length: int, options: Mapping[str, Any]) -> Self:
        if not len(rows):
            raise DataError("there are no training rows", hint="look at what was dropped: llmo data show NAME")
        if rows[0]["score"] is None:
            if len(rows) < 2:
                raise DataError("one pair has nothing to be told apart from", hint="give two pairs at least")
            return cls(max_length=max_length, negatives=rows[0]["negative"] is not None)
        scores = [float(row["score"]) for row in rows]
        low, high = min(scores), max(scores)
        if low == high:
            raise DataError(f"all training pairs have the score {low:g}", hint="check `data.label`, the scores' column")
        if low >= -1.0 and high <= 1.0:
            low, high = 0.0, 1.0  # they are cosines as they stand
        return cls(max_length=max_length, scored=True, low=low, high=high)

    def options(self) -> dict[str, Any]:
        return {"scored": self.scored, "negatives": self.negatives, "low": self.low, "high": self.high}

    def asked(self, row: Row) -> Asked:
        return {"text": row["text"], "pair": row["pair"]}

    def encode(self, tokenizer: Tokenizer, asked: Sequence[Asked]) -> list[Encoding]:
        """One sequence for a text, two for a pair."""
        return self._joined(tokenizer, [self.given(one) for one in asked])

    def lessons(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[tuple[Row, Encoding]]:
        texts = [[row["text"], row["pair"], *([row["negative"]] if self.negatives else ())] for row in rows]
        return list(zip(rows, self._joined(tokenizer, texts), strict=True))

    def plain_ids(self, tokenizer: Any, asked: Sequence[Asked]) -> list[list[int]]:
        texts = [self.given(one) for one in asked]
        flat = [text for some in texts for text in some]
        found = iter(tokenizer(flat, truncation=True, max_length=self.max_length)["input_ids"])
        return [[token for ids in islice(found, len(some)) for token in ids] for some in texts]

    def target(self, row: Row, encoding: Encoding) -> NDArray[Any]:
        """The score between 0 and 1 `[1]`; else a number for each text `[group]`, the same for the same text."""
        if self.scored:
            return np.array([(row["score"] - self.low) / (self.high - self.low)], np.float32)
        texts = [row["text"], row["pair"], *([row["negative"]] if self.negatives else ())]
        return np.array([_number(text) for text in texts], np.int32)

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None, smoothing: float = 0.0
    ) -> torch.Tensor:
        """`logits` `[rows * group, width]` are vectors, those of a row one after the other; so are the targets.

        What equals a row's own pair, or is the pair of the same text, is no negative of it.
        """
        import torch
        from torch.nn import functional  # a replica uses this file without torch

        vectors = logits.float().reshape(-1, self.group, logits.shape[-1])
        wanted = targets[:: self.group]
        if self.scored:
            return functional.mse_loss((vectors[:, 0] * vectors[:, 1]).sum(-1), wanted[:, 0])
        others = vectors[:, 1:].transpose(0, 1).flatten(0, 1)  # all pairs, then all negatives
        numbers = wanted[:, 1:].T.flatten()
        rows = len(vectors)
        same = numbers[None, :] == wanted[:, 1:2]
        same[:, :rows] |= wanted[:, :1] == wanted[:, 0][None, :]
        own = torch.arange(rows, device=logits.device)
        same[own, own] = False
        cosines = (SCALE * vectors[:, 0] @ others.T).masked_fill(same, -torch.inf)
        return functional.cross_entropy(cosines, own)

    def mass(self, targets: torch.Tensor, class_weights: torch.Tensor | None) -> float:
        return len(targets) / self.group

    def tally(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> Tally:
        """Of scored rows cosine and score; else whether the pair is the nearest, one of the ten nearest, and the
        reciprocal of its rank among the pairs of all rows (those of the same text, and equal ones, left out)."""
        return Tally.of_sums(self._columns(logits, rows))

    def counted(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> list[Counts]:
        """A row alone would always be the nearest, so all of them are ranked together."""
        return list(self._columns(logits, rows))

    def _columns(self, logits: Sequence[Logits], rows: Sequence[Row]) -> Counts:
        texts, pairs = np.stack(list(logits)).astype(np.float64).transpose(1, 0, 2)
        if self.scored:
            scores = [(row["score"] - self.low) / (self.high - self.low) for row in rows]
            return _parts([(texts * pairs).sum(1), np.array(scores)])
        rank = _ranks(texts, pairs, rows)
        return _parts([rank <= 1, rank <= 10, 1 / rank])

    def verdicts(
        self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> list[Verdict | None]:
        """Their losses say how far from its pair a text lies (one less the cosine), or the squared error of a score."""
        found: list[Verdict | None] = []
        for vectors, row in zip(logits, rows, strict=True):
            cosine = float(vectors[0].astype(np.float64) @ vectors[1])
            if self.scored:
                wanted = (row["score"] - self.low) / (self.high - self.low)
                answer = self.low + cosine * (self.high - self.low)
                found.append(Verdict((cosine - wanted) ** 2, f"{row['score']:g}: {row['pair']}", f"{answer:.4g}"))
            else:
                found.append(Verdict(1.0 - cosine, row["pair"], f"cosine {cosine:.3f}"))
        return found

    def scores(self, totals: Totals) -> dict[str, Floats]:
        if self.scored:
            return {}
        first, ten, reciprocal = np.moveaxis(totals.sums / MICRO, -1, 0)
        named = {"mrr": reciprocal, "recall_at_1": first, "recall_at_10": ten}
        return {name: ratio(value, totals.rows) for name, value in named.items()}

    def ranked(self, tally: Tally, times: Floats) -> dict[str, Floats]:
        if not self.scored:
            return {}
        cosines, scores = tally.counts.T.astype(np.float64)
        return {"spearman": spearman(cosines, scores, times), "pearson": correlation(cosines, scores, times)}

    def answer(self, logits: Logits, encoding: Encoding, asked: Asked) -> dict[str, Any]:
        """`embedding` of a text, `similarity` (the cosine, -1 to 1) of a pair."""
        if logits.ndim == 2:
            return {"similarity": round(float(logits[0] @ logits[1]), DIGITS), **seen(encoding)}
        return {"embedding": [round(float(x), DIGITS) for x in logits], **seen(encoding)}

    def agree(self, a: Logits, b: Logits, encoding: Encoding | None = None) -> bool:
        """Each text's two vectors point the same way."""
        return bool((np.atleast_2d(a) * np.atleast_2d(b)).sum(-1).min() >= AGREED)

    def _joined(self, tokenizer: Tokenizer, texts: Sequence[Sequence[str]]) -> list[Encoding]:
        rest = iter(self.tokens(tokenizer, [text for some in texts for text in some]))
        return [_one(list(islice(rest, len(some)))) for some in texts]


def _one(parts: list[Encoding]) -> Encoding:
    if len(parts) == 1:
        return parts[0]
    return Encoding(
        [i for part in parts for i in part.input_ids],
        sum(part.length for part in parts),
        [place for part in parts for place in part.offsets],
        [word for part in parts for word in part.word_ids],
        ends=tuple(accumulate(len(part.input_ids) for part in parts)),
    )


def _ranks(texts: NDArray[np.float64], pairs: NDArray[np.float64], rows: Sequence[Row]) -> Floats:
    """The rank of each row's pair, from 1; what is as near as it counts as nearer."""
    asked, answers = (np.array([_number(row[name]) for row in rows]) for name in ("text", "pair"))
    found = []
    for first in range(0, len(rows), BLOCK):
        some = slice(first, first + BLOCK)
        cosines = texts[some] @ pairs.T
        own = np.diagonal(cosines, first) - TIE
        same = (asked[some, None] == asked) | (answers[some, None] == answers)
        found.append(1.0 + ((cosines >= own[:, None]) & ~same).sum(1))
    return np.concatenate(found)


def _parts(columns: Sequence[NDArray[Any]]) -> Counts:
    return np.rint(np.stack(columns, axis=1).astype(np.float64) * MICRO).astype(np.int64)


def _number(text: str) -> int:
    key = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return zlib.crc32(key.encode("utf-8", "replace")) >> 1
