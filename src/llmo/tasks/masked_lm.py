"""Masked language modelling: hidden tokens are found from those around them; the result is a base for other tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.errors import DataError, InputError, ModelError
from llmo.tasks.base import IGNORED, Encoding, Logits, Row, Task
from llmo.tasks.card import load_tokenizer
from llmo.tasks.metrics import MICRO, Floats, Tally, Totals, ratio
from llmo.tasks.verdict import Verdict
from llmo.types import Asked

SHARE = 0.15  # of a text's tokens that are to be found (Devlin et al. 2019)
HIDDEN, RANDOM = 0.8, 0.1  # of these: hidden behind the mask, another token; the rest stay as they are
LIKELY = float(np.log(0.5))
MOST_EXPONENT = 700.0
MASKS = ("[MASK]", "<mask>")

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Hidden(Encoding):
    """A text with some of its tokens hidden; `answers[i]` is the token to be found at `i`, or -100."""

    answers: list[int]


class MaskedLm(Task):
    """Rows carry `text`. `mask_id` is the token that hides, `special_ids` those that are no text, and `vocabulary` how
    many there are. The outputs that `tally` counts are, per hidden token, its natural log-probability and whether it
    was the likeliest: `[hidden, 2]`."""

    name: ClassVar[str] = "masked-lm"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    higher_is_better: ClassVar[bool] = False
    has_classes: ClassVar[bool] = False
    hides: ClassVar[bool] = True

    def __init__(
        self,
        labels: Sequence[str] = (),
        max_length: int = 128,
        *,
        mask_id: int,
        special_ids: Collection[int],
        vocabulary: int,
    ) -> None:
        super().__init__(labels, max_length)
        self.mask_id = mask_id
        self.special_ids = frozenset(special_ids)
        self.vocabulary = vocabulary

    @property
    def metric(self) -> str:
        return "masked_perplexity"

    def drop(self, before: float, after: float) -> float:
        """By what share the perplexity grew."""
        return after / before - 1.0

    @classmethod
    def of_base(cls, folder: Path) -> dict[str, Any]:
        """The special tokens. Raises ModelError for a tokeniser without one that hides."""
        tokenizer = load_tokenizer(folder)
        mask = next((i for token in MASKS if (i := tokenizer.token_to_id(token)) is not None), None)
        if mask is None:
            raise ModelError(
                f"the base model has no token to hide others with ({' or '.join(MASKS)})",
                hint="take an encoder such as BERT or RoBERTa, or make one: model: scratch:transformer-tiny",
                where=str(folder),
            )
        special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        return {"mask_id": mask, "special_ids": sorted({*special, mask}), "vocabulary": tokenizer.get_vocab_size()}

    @classmethod
    def from_rows(cls, rows: Sequence[Row], *, max_length: int, options: Mapping[str, Any]) -> Self:
        if not len(rows):
            raise DataError("there are no training rows", hint="look at what was dropped: llmo data show NAME")
        kept = {name: options[name] for name in ("mask_id", "special_ids", "vocabulary")}
        return cls((), max_length, **kept)

    def options(self) -> dict[str, Any]:
        return {"mask_id": self.mask_id, "special_ids": sorted(self.special_ids), "vocabulary": self.vocabulary}

    def encode_rows(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[Encoding]:
        """Each text's beginning with the same tokens hidden every time: which ones is a function of the tokens."""
        return [self._hidden(encoding) for encoding in super().encode_rows(tokenizer, rows)]

    def lessons(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[tuple[Row, Encoding]]:
        """A text that is too long is gone through in pieces; nothing is hidden yet."""
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)
        found: list[tuple[Row, Encoding]] = []
        for row, whole in zip(rows, tokenizer.encode_batch([row["text"] for row in rows]), strict=True):
            found += [(row, Encoding(part.ids, len(part.ids), [], [])) for part in (whole, *whole.overflowing)]
        return found

    def target(self, row: Row, encoding: Encoding) -> NDArray[Any]:
        """Each token that may be hidden itself, -100 for special ones `[tokens]`; where some are hidden, those only."""
        if isinstance(encoding, Hidden):
            return np.asarray(encoding.answers, np.int64)
        ids = np.asarray(encoding.input_ids, np.int64)
        return np.where(np.isin(ids, list(self.special_ids)), IGNORED, ids)

    def hide(self, targets: Ids, ids: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """A text as it is shown, and what is to be found in it; `targets` are as `target` gives them without any
        hidden. At least one token is hidden, where there is one."""
        places = np.flatnonzero(targets != IGNORED)
        chosen = rng.permutation(places)[: max(1, round(SHARE * len(places)))]
        answers = np.full_like(targets, IGNORED)
        answers[chosen] = targets[chosen]
        shown, how = ids.copy(), rng.random(len(chosen))
        shown[chosen[how < HIDDEN]] = self.mask_id
        other = chosen[(how >= HIDDEN) & (how < HIDDEN + RANDOM)]
        shown[other] = rng.integers(0, self.vocabulary, len(other))
        return shown, answers

    def _hidden(self, encoding: Encoding) -> Hidden:
        ids = np.asarray(encoding.input_ids, np.int64)
        seed = int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "big")
        shown, answers = self.hide(self.target({}, encoding), ids, np.random.default_rng(seed))
        return Hidden(shown.tolist(), encoding.length, encoding.offsets, encoding.word_ids, answers.tolist())

    def kept(self, logits: Logits, encoding: Encoding) -> Logits:
        """Of hidden tokens the log-probability and whether it is the likeliest `[hidden, 2]`; of a text as it was sent,
        the log-probability of each of its tokens `[tokens, 1]`."""
        targets = self.target({}, encoding) if isinstance(encoding, Hidden) else np.asarray(encoding.input_ids)
        places = np.flatnonzero(targets != IGNORED)
        wide = logits[places].astype(np.float64)
        whole = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
        found = wide[np.arange(len(places)), targets[places]] - whole
        columns = [found, wide.argmax(1) == targets[places]] if isinstance(encoding, Hidden) else [found]
        return np.stack(columns, 1).astype(np.float32)

    def tally(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> Tally:
        """Of each row the summed log-probability (in millionths), its hidden tokens, and those likeliest."""
        columns = np.zeros((len(logits), 3), np.int64)
        for i, found in enumerate(logits):
            lost, right = found.astype(np.float64).reshape(-1, 2).sum(0)
            columns[i] = -round(float(lost) * MICRO), len(found), int(right)
        return Tally.of_sums(columns)

    def scores(self, totals: Totals) -> dict[str, Floats]:
        lost, tokens, right = np.moveaxis(totals.sums, -1, 0)
        loss = ratio(lost / MICRO, tokens)
        return {
            "loss": loss,
            "masked_perplexity": np.exp(np.minimum(loss, MOST_EXPONENT)),
            "masked_accuracy": ratio(right, tokens),
        }

    def verdicts(
        self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> list[Verdict | None]:
        """How unlikely the hidden tokens are, each; which they are says nothing without the text around them."""
        return [Verdict(-float(one.reshape(-1, 2)[:, 0].mean()), "", "") if len(one) else None for one in logits]

    def details(self, tally: Tally) -> dict[str, Any]:
        """How many tokens the figures are of."""
        return {"tokens": int(tally.totals().sums[1])}

    def answer(self, logits: Logits, encoding: Encoding, asked: Asked) -> dict[str, Any]:
        raise InputError(
            f"a model of {self.name} answers nothing: it is a base for other tasks",
            hint="train one on it, and deploy that",
        )

    def agree(self, a: Logits, b: Logits, encoding: Encoding | None = None) -> bool:
        """Of what `kept` gives of two texts: whether the same tokens are thought likelier than not."""
        return bool(((a[:, 0] > LIKELY) == (b[:, 0] > LIKELY)).all())
