"""The contract of a task: the one definition of how text becomes tensors and tensors become answers.

Training, evaluation, compression, verification and serving all go through it, so what is served is what was
trained. Only `loss` and `mass` need torch; everything else is NumPy and `tokenizers`, so a replica stays light.

Every task encodes rows, says which tokens or labels are learnt, and measures. A task that answers in one pass over a
text (all but generation) also has a loss over its labels, an `answer`, and `agree`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.errors import InputError
from llmo.tasks.metrics import Counts, Floats, Tally, Totals, with_intervals
from llmo.tasks.verdict import Verdict
from llmo.types import Asked

if TYPE_CHECKING:
    import torch

Row = Mapping[str, Any]
Logits = NDArray[np.float32]
IGNORED = -100  # a target that is not learnt


@dataclass(frozen=True, slots=True)
class Encoding:
    """One text as the model sees it, special tokens included.

    `offsets` and `word_ids` are per token: characters (code points) of the text as sent, and the word's
    number or None for special tokens. `length` is the number of tokens before truncation.

    Where the model reads several sequences apart (two texts, or the parts of a long one), all of them stand here one
    after the other, and `ends` says where each one ends.
    """

    input_ids: list[int]
    length: int
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]
    ends: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def truncated(self) -> bool:
        return self.length > len(self.input_ids)

    def apart(self) -> list[Encoding]:
        """One encoding a sequence; the last one has what is cut."""
        if not self.ends:
            return [self]
        cut = self.length - len(self.input_ids)
        return [
            Encoding(
                self.input_ids[a:b], b - a + (cut if b == self.ends[-1] else 0), self.offsets[a:b], self.word_ids[a:b]
            )
            for a, b in pairwise((0, *self.ends))
        ]


def sequences(encodings: Sequence[Encoding]) -> list[list[int]]:
    """What the model reads: the token ids of one sequence of each encoding, or of its several, in order."""
    return [part.input_ids for encoding in encodings for part in encoding.apart()]


def gathered(said: Sequence[Logits], encodings: Sequence[Encoding]) -> list[Logits]:
    """What the model said of `sequences(encodings)`, as one array an encoding.

    Of several sequences these are their `[tokens, labels]` one after the other, or their vectors `[sequences, width]`.
    """
    rest = iter(said)
    found = []
    for encoding in encodings:
        own = list(islice(rest, max(1, len(encoding.ends))))
        if not encoding.ends:
            found.append(own[0])
        else:
            found.append(np.concatenate(own) if own[0].ndim == 2 else np.stack(own))
    return found


def kept(task: Task, said: Sequence[Logits], encodings: Sequence[Encoding]) -> list[Logits]:
    """What the task keeps of the logits of each encoding."""
    return [task.kept(logits, encoding) for logits, encoding in zip(said, encodings, strict=True)]


class Task(ABC):
    """Construct with the labels in the order of the logits; a task that writes text has none."""

    name: ClassVar[str]
    auto_class: ClassVar[str]  # the transformers class that opens the model folder
    generates: ClassVar[bool] = False  # whether it answers by writing, token after token
    higher_is_better: ClassVar[bool] = True  # of `metric`
    asks: ClassVar[tuple[str, ...]] = ("text",)  # the texts of an input by name; the first may be sent as it is
    may_ask: ClassVar[tuple[str, ...]] = ()  # those that an input may have besides
    has_classes: ClassVar[bool] = True  # whether `labels` are classes, which can be weighted and smoothed
    has_head: ClassVar[bool] = True  # whether something of the task's own stands on the trunk
    whole: ClassVar[bool] = False  # whether a row is measured among all rows of its split, not by itself
    hides: ClassVar[bool] = False  # whether training shows tokens that the rows do not hold
    unlearnt: ClassVar[str] = "hold nothing to learn"  # why `lessons` may leave out a row

    def __init__(self, labels: Sequence[str], max_length: int = 128) -> None:
        self.labels = tuple(labels)
        self.max_length = max_length

    @property
    @abstractmethod
    def metric(self) -> str:
        """The key of `scores` that gates and early stopping use; `higher_is_better` says which way."""

    def drop(self, before: float, after: float) -> float:
        """How much worse `after` is, on the scale of `compress.max_drop`; negative when it is better."""
        return before - after

    @property
    def group(self) -> int:
        """How many sequences every row is trained on together."""
        return 1

    @property
    def problem_type(self) -> str | None:
        """What `config.problem_type` says in the model folder."""
        return None

    @classmethod
    def of_base(cls, folder: Path) -> dict[str, Any]:
        """What the task reads off the base model's folder, as `options` of `from_rows`."""
        return {}

    @classmethod
    @abstractmethod
    def from_rows(cls, rows: Sequence[Row], *, max_length: int, options: Mapping[str, Any]) -> Self:
        """The task that fits these training rows: finds the labels. Raises DataError if nothing can be learnt.

        `options` are what the specification says (`multi_label`) and what `of_base` found.
        """

    def to_card(self) -> dict[str, Any]:
        """What `from_card` needs to build the same task again."""
        return {
            "task": self.name,
            "labels": list(self.labels),
            "max_length": self.max_length,
            "options": self.options(),
        }

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Self:
        return cls(card["labels"], card["max_length"], **card.get("options", {}))

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the constructor beyond labels and max_length."""
        return {}

    def asked(self, row: Row) -> Asked:
        """A row of a data set as whoever wants an answer would send it."""
        return str(row["text"])

    def given(self, asked: Asked) -> tuple[str, ...]:
        """The texts of an input, in the order of `asks` and `may_ask`. Raises InputError when they are others."""
        named = {self.asks[0]: asked} if isinstance(asked, str) else asked
        known = (*self.asks, *self.may_ask)
        if any(name not in named for name in self.asks) or any(name not in known for name in named):
            example = ", ".join(f'"{name}": "..."' for name in self.asks)
            more = "".join(f', and "{name}" if you like' for name in self.may_ask)
            raise InputError(
                f"a model for {self.name} takes {' and '.join(self.asks)}, not {' and '.join(named) or 'nothing'}",
                hint=f"send {{{example}}}{more}",
            )
        return tuple(named[name] for name in known if name in named)

    def encode(self, tokenizer: Tokenizer, asked: Sequence[Asked]) -> list[Encoding]:
        """Inputs as the model sees them, one encoding each. Raises InputError for one that this task does not take."""
        return self.tokens(tokenizer, [self.given(one)[0] for one in asked])

    def tokens(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
        """Tokenise without padding, cut to `max_length` as transformers does, and remember the full length.

        Raises InputError for a text that is no valid Unicode (a lone surrogate).
        """
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)
        refuse_surrogates(texts)
        encodings = []
        for kept in tokenizer.encode_batch(list(texts)):
            cut = sum(len(rest.ids) - sum(rest.special_tokens_mask) for rest in kept.overflowing)
            encodings.append(Encoding(kept.ids, len(kept.ids) + cut, kept.offsets, kept.word_ids))
        return encodings

    def encode_rows(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[Encoding]:
        """Rows of a data set as they are learnt and measured, one encoding each."""
        return self.encode(tokenizer, [self.asked(row) for row in rows])

    def plain_ids(self, tokenizer: Any, asked: Sequence[Asked]) -> list[list[int]]:
        """The `input_ids` of `encode`, as somebody with a tokeniser of plain transformers gets them."""
        texts = [self.given(one)[0] for one in asked]
        found: list[list[int]] = tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return found

    def lessons(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[tuple[Row, Encoding]]:
        """Rows as they are trained on: one encoding each, unless the task divides what is too long, or leaves out what
        is `unlearnt`."""
        return list(zip(rows, self.encode_rows(tokenizer, rows), strict=True))

    @abstractmethod
    def target(self, row: Row, encoding: Encoding) -> NDArray[Any]:
        """What the loss compares with: a class index, one index per token (int64, -100: none), or some numbers of
        another type, as many for every row.

        Raises DataError for a label that the task does not know.
        """

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None, smoothing: float = 0.0
    ) -> torch.Tensor:
        """Scalar mean loss of a padded batch; padded targets are -100 (token) or absent (text)."""
        raise self._writes()

    def mass(self, targets: torch.Tensor, class_weights: torch.Tensor | None) -> float:
        """What `loss` divided by: micro-batches weighted by their mass add up to the big batch exactly."""
        raise self._writes()

    def class_counts(self, targets: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
        """How often each label is a target: what balanced class weights are made of."""
        raise self._without_classes()

    @abstractmethod
    def tally(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> Tally:
        """Counts per row that add up. `logits[i]` is `[labels]`, or `[tokens, labels]` without padding, or of several
        sequences as `gathered` makes them; for a task that generates, what its docstring says."""

    def counted(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> list[Counts]:
        """What `tally` adds up, of each row in their order: two models are compared row by row."""
        alone = zip(logits, rows, encodings, strict=True)
        return [self.tally([one], [row], [encoding]).counts[0] for one, row, encoding in alone]

    @abstractmethod
    def scores(self, totals: Totals) -> dict[str, Floats]:
        """The metrics made of summed counts; works on many resampled sums at once."""

    def kept(self, logits: Logits, encoding: Encoding) -> Logits:
        """What is kept of a text's logits, for figures and as evidence: all of them, unless the labels are a whole
        vocabulary for every token."""
        return logits

    def ranked(self, tally: Tally, times: Floats) -> dict[str, Floats]:
        """The metrics that sums do not tell: of the tally's distinct rows, each of them `times` `[..., distinct]`."""
        return {}

    def figures(self, tally: Tally) -> dict[str, float]:
        """Every metric of the rows that were tallied."""
        found = self.scores(tally.totals()) | self.ranked(tally, tally.times.astype(np.float64))
        return {name: float(value) for name, value in found.items()}

    def measure(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> dict[str, float]:
        """Metrics over a whole split."""
        return self.figures(self.tally(logits, rows, encodings))

    def intervals(self, tally: Tally, seed: int = 0) -> dict[str, dict[str, float]]:
        """Each metric as `{"value", "low", "high"}`: with its 95% bootstrap interval over rows."""
        return with_intervals(tally, self.scores, seed, self.ranked)

    def details(self, tally: Tally) -> dict[str, Any]:
        """What a report shows beyond the metrics, such as a confusion matrix; JSON values."""
        return {}

    def verdicts(
        self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> list[Verdict | None]:
        """What was said of each row, for worst errors and calibration; None where nothing was asked."""
        return [None] * len(rows)

    def answer(self, logits: Logits, encoding: Encoding, asked: Asked) -> dict[str, Any]:
        """The JSON answer for one input; carries `truncated: true` when the model did not see all of it."""
        raise self._writes()

    def agree(self, a: Logits, b: Logits, encoding: Encoding | None = None) -> bool:
        """Whether two logits give the same answer (used by compress and verify).

        With the encoding, only what carries an answer is compared (the first piece of each word).
        """
        raise self._writes()

    def _writes(self) -> InputError:
        return InputError(
            f"a model for {self.name} has no labels: it writes its answers",
            hint="ask it through /v1/chat/completions or /v1/completions",
        )

    def _without_classes(self) -> InputError:
        if self.generates:
            return self._writes()
        return InputError(f"a model for {self.name} has no classes", hint="leave train.class_weights out")


def seen(encoding: Encoding) -> dict[str, Any]:
    """What every answer says of its input: the text's tokens, and whether the model saw fewer."""
    found: dict[str, Any] = {"tokens": encoding.length}
    if encoding.truncated:
        found["truncated"] = True
    return found


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raises InputError for the first text that is no valid Unicode."""
    for number, text in enumerate(texts):
        try:
            if not text.isascii():
                text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text {number} is not valid Unicode: a lone surrogate at character {error.start}",
                hint="send UTF-8; in JSON, escapes like \\ud83d come in pairs",
            ) from None
