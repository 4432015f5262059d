"""Generation: a causal language model learns the answers of conversations, or all of plain texts, and writes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.errors import DataError, InputError, ModelError
from llmo.tasks import turns
from llmo.tasks.base import Encoding, Logits, Row, Task, refuse_surrogates
from llmo.tasks.card import load_tokenizer
from llmo.tasks.metrics import MICRO, Floats, Tally, Totals, ratio
from llmo.tasks.template import ChatTemplate, Messages
from llmo.tasks.verbatim import Tools, Verbatim
from llmo.tasks.verdict import Verdict

IGNORED = -100
MOST_EXPONENT = 700.0  # of a loss, so that a perplexity stays a finite number
PROMPT_TOKENS = 64  # of a plain text that is given to be gone on with

Learns = Literal["answers", "text"]


@dataclass(frozen=True, slots=True)
class Passage(Encoding):
    """What a row becomes; `learnt[i]` says whether token `i` is one the model should come up with.

    `offsets` and `word_ids` are empty. `length` counts the tokens before truncation.
    """

    learnt: list[bool]


class Generation(Task):
    """Rows carry `messages` (JSON, or null for a plain `text`), `tools`, and as preferences `chosen` and `rejected`.

    `template` is Jinja, `special` its special tokens by name, `end_ids` the tokens that end an answer. `learns` is
    "text" where all of a conversation is learnt, not its answers only. The outputs that `tally` counts are, per
    learnt token, its natural log-probability and, where known, whether it was the likeliest: `[learnt, 1 or 2]`.
    """

    name: ClassVar[str] = "generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    generates: ClassVar[bool] = True
    has_head: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = False

    def __init__(
        self,
        labels: Sequence[str] = (),
        max_length: int = 128,
        *,
        template: str,
        special: Mapping[str, str],
        end_ids: Sequence[int],
        learns: Learns = "answers",
    ) -> None:
        super().__init__(labels, max_length)
        self.template = ChatTemplate(template, special)
        self.end_ids = tuple(end_ids)
        self.learns = learns

    @property
    def metric(self) -> str:
        return "perplexity"

    def drop(self, before: float, after: float) -> float:
        """By what share the perplexity grew."""
        return after / before - 1.0

    @classmethod
    def of_base(cls, folder: Path) -> dict[str, Any]:
        """The model's template, special tokens and end tokens. Raises ModelError when it has nothing to end with."""
        template = ChatTemplate.of(folder)
        found = end_ids(folder, template, load_tokenizer(folder))
        return {"template": template.source, "special": template.special, "end_ids": found}

    @classmethod
    def from_rows(cls, rows: Sequence[Row], *, max_length: int, options: Mapping[str, Any]) -> Self:
        if not len(rows):
            raise DataError("there are no training rows", hint="look at what was dropped: llmo data show NAME")
        kept = {name: value for name, value in options.items() if name in ("template", "special", "end_ids", "learns")}
        return cls((), max_length, **kept)

    def options(self) -> dict[str, Any]:
        named = {
            "template": self.template.source,
            "special": self.template.special,
            "end_ids": list(self.end_ids),
        }
        return named if self.learns == "answers" else {**named, "learns": self.learns}

    def prompt(self, tokenizer: Tokenizer, messages: Messages, tools: Tools = None) -> list[int]:
        """A conversation up to where the model answers, as token ids.

        Raises InputError for messages that the template refuses.
        """
        return self.rendered(tokenizer, messages, tools)[1]

    def rendered(self, tokenizer: Tokenizer, messages: Messages, tools: Tools = None) -> tuple[str, list[int]]:
        """As `prompt`, with the text."""
        if not messages:
            raise InputError("there are no messages", hint="send at least one message of the user")
        verbatim = Verbatim.of(tokenizer, messages, tools)
        text = self.template.render(verbatim.messages, verbatim.tools, add_generation_prompt=True)
        ids = verbatim.tokens(tokenizer, text)[0]
        if not ids:
            raise InputError("the messages hold no text", hint="send a message with some content")
        return verbatim.plain(text), ids

    def prompt_of(self, tokenizer: Tokenizer, row: Row) -> list[int]:
        """What the model is given to answer a row: its messages before the last answer, or the head of its text."""
        return self.question(tokenizer, row)[1]

    def question(self, tokenizer: Tokenizer, row: Row) -> tuple[str, list[int]]:
        """As `prompt_of`, with the text."""
        messages, tools = conversation(row)
        if messages is None:
            ids, stops = _plain_ids(tokenizer, row["text"])
            kept = max(1, min(len(ids) // 2, PROMPT_TOKENS, self.max_length))
            return row["text"][: stops[kept - 1]], ids[:kept]
        answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        return self.rendered(tokenizer, messages[: answers[-1]] if answers and answers[-1] else messages, tools)

    def encode_rows(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[Encoding]:
        """One `Passage` a row, cut to `max_length`; of a preference, the conversation with the chosen answer.

        Raises DataError for a conversation whose answers cannot be found in what the template writes.
        """
        return [self.passage(tokenizer, row) for row in rows]

    def lessons(self, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[tuple[Row, Encoding]]:
        """As the base, but a plain text that is too long is gone through in pieces, each beginning with the token that
        the last one ended with; a conversation is cut, as its answers need what stands before them."""
        return [(row, piece) for row in rows for piece in self._pieces(tokenizer, row)]

    def _pieces(self, tokenizer: Tokenizer, row: Row) -> list[Passage]:
        if conversation(row)[0] is not None:
            return [self.passage(tokenizer, row)]
        ids = self._text_ids(tokenizer, row["text"])
        starts = range(0, max(1, len(ids) - 1), self.max_length - 1)
        parts = [ids[start : start + self.max_length] for start in starts]
        return [Passage(part, len(part), [], [], [True] * len(part)) for part in parts]

    def passage(self, tokenizer: Tokenizer, row: Row, answer: Literal["chosen", "rejected"] = "chosen") -> Passage:
        """A row as it is learnt; of a preference, with one of its two answers."""
        messages, tools = conversation(row, answer)
        if messages is None:
            ids = self._text_ids(tokenizer, row["text"])
            return self._cut(ids, np.ones(len(ids), np.bool_))
        since = len(json.loads(row["messages"])) if row.get(answer) and row.get("messages") else 0
        try:
            spoken = turns.speak(self.template, tokenizer, messages, tools, self.end_ids, since)
        except InputError as error:
            raise DataError(error.what, where=f"row {row.get('id', '')}".strip(), hint=error.hint) from error
        if self.learns == "text":
            return self._cut(spoken.ids, np.ones(len(spoken.ids), np.bool_))
        last = int(np.flatnonzero(spoken.learnt)[-1]) + 1 if spoken.learnt.any() else len(spoken.ids)
        return self._cut(spoken.ids[:last], spoken.learnt[:last])  # what follows the last answer teaches nothing

    def target(self, row: Row, encoding: Encoding) -> NDArray[Any]:
        """The token itself where it is learnt, -100 elsewhere `[tokens]`; nothing comes before the first one."""
        assert isinstance(encoding, Passage)  # noqa: S101 (what `encode_rows` makes)
        wanted = np.where(encoding.learnt, encoding.input_ids, IGNORED).astype(np.int64)
        wanted[:1] = IGNORED
        return wanted

    def tally(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> Tally:
        """Of each row the summed log-probability (in millionths), its learnt tokens, those judged, those likeliest."""
        columns = np.zeros((len(logits), 4), np.int64)
        for i, output in enumerate(logits):
            found = output.astype(np.float64).reshape(len(output), -1)
            columns[i, :2] = -round(float(found[:, 0].sum()) * MICRO), len(found)
            if found.shape[1] == 2:
                columns[i, 2:] = len(found), int(found[:, 1].sum())
        return Tally.of_sums(columns)

    def tally_scores(
        self, scores: Sequence[NDArray[np.float32]], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> Tally:
        """As `tally`, from what an engine's `score` says of each encoding's `input_ids`: `[tokens - 1]`."""
        picked = [
            score[self.target(row, encoding)[1:] != IGNORED]
            for score, row, encoding in zip(scores, rows, encodings, strict=True)
        ]
        return self.tally(picked, rows, encodings)

    def scores(self, totals: Totals) -> dict[str, Floats]:
        lost, tokens, judged, likeliest = np.moveaxis(totals.sums, -1, 0)
        loss = ratio(lost / MICRO, tokens)
        named = {"loss": loss, "perplexity": np.exp(np.minimum(loss, MOST_EXPONENT))}
        if np.any(judged > 0):
            named["token_accuracy"] = ratio(likeliest, judged)
        return named

    def verdicts(
        self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> list[Verdict | None]:
        """How unlikely the reference is to the model, per token; nothing is answered, so nothing is calibrated."""
        return [
            Verdict(-float(output.reshape(len(output), -1)[:, 0].mean()), _reference(row), "") if len(output) else None
            for output, row in zip(logits, rows, strict=True)
        ]

    def details(self, tally: Tally) -> dict[str, Any]:
        """How many tokens the figures are of."""
        return {"tokens": int(tally.totals().sums[1])}

    def _cut(self, ids: list[int], learnt: NDArray[np.bool_]) -> Passage:
        kept = turns.window(learnt, self.max_length)
        return Passage(ids[kept], len(ids), [], [], learnt[kept].tolist())

    def _text_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        refuse_surrogates([text])
        ids, _ = _plain_ids(tokenizer, text)
        return ids if ids and ids[-1] in self.end_ids else [*ids, self._end_of_text(tokenizer)]

    def _end_of_text(self, tokenizer: Tokenizer) -> int:
        own = tokenizer.token_to_id(self.template.special.get("eos_token", ""))
        return self.end_ids[0] if own is None else own


def conversation(
    row: Row, answer: Literal["chosen", "rejected"] = "chosen"
) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None]:
    """A row's messages, of a preference with one of its answers, and its tools; no messages for a plain text."""
    messages, tools = (json.loads(row[name]) if row.get(name) else None for name in ("messages", "tools"))
    if row.get(answer):
        messages = [*(messages or []), *json.loads(row[answer])]
    return messages, tools


def _reference(row: Row) -> str:
    """The last answer of a conversation; nothing for a plain text, which is shown anyway."""
    messages, _ = conversation(row)
    return str((messages or [{}])[-1].get("content") or "")


def end_ids(folder: Path, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: those the model's configs name, and the one its template writes after answers.

    The template's comes first. Raises ModelError when there is none, or one that the tokeniser does not have.
    """
    named = [turns.closing_token(template, tokenizer)]
    for file in ("generation_config.json", "config.json"):
        value = _json(folder / file).get("eos_token_id")
        named += value if isinstance(value, list) else [value]
    named.append(tokenizer.token_to_id(template.special.get("eos_token", "")))
    found = list(dict.fromkeys(int(i) for i in named if isinstance(i, int)))
    size = tokenizer.get_vocab_size()
    if not found or max(found) >= size or min(found) < 0:
        what = "names no token that ends an answer" if not found else f"ends with a token that is not among its {size}"
        raise ModelError(
            f"the model {what}",
            hint="set eos_token_id in generation_config.json to the token after which it stops",
            where=str(folder),
        )
    return found


def _plain_ids(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """A plain text as the tokeniser reads it (with a beginning token, if it has one), and where each token ends."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found = tokenizer.encode(text)
    return found.ids, [end for _, end in found.offsets]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}", where=str(path)) from None
    return found if isinstance(found, dict) else {}
