"""The tasks that a bundle can answer. Each class goes into the bundle's runner as it stands here, behind `frame`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmo.compression.edge.frame import Problem, Seen, Task


class TextClassification(Task):
    def answer(self, said: list[Any], seen: list[Seen], texts: list[str]) -> dict[str, Any]:
        if self.options["multi_label"]:
            each = 1.0 / (1.0 + np.exp(-np.clip(said[0].astype(np.float64), -60.0, 60.0)))
            scores = dict(zip(self.labels, each.tolist(), strict=True))
            return {"labels": [label for label, score in scores.items() if score > 0.5], "scores": scores}
        scores = dict(zip(self.labels, self.softmax(said[0]).tolist(), strict=True))
        best = self.labels[int(said[0].argmax())]
        return {"label": best, "score": scores[best], "scores": scores}


class Regression(Task):
    def answer(self, said: list[Any], seen: list[Seen], texts: list[str]) -> dict[str, Any]:
        return {"value": self.options["mean"] + self.options["std"] * float(said[0][0])}


class SentenceEmbedding(Task):
    may_ask = ("pair",)

    def answer(self, said: list[Any], seen: list[Seen], texts: list[str]) -> dict[str, Any]:
        if len(said) == 2:
            return {"similarity": round(float(said[0] @ said[1]), 7)}
        return {"embedding": [round(float(x), 7) for x in said[0]]}


class TokenClassification(Task):
    def answer(self, said: list[Any], seen: list[Seen], texts: list[str]) -> dict[str, Any]:
        words = self.words(seen[0], texts[0])
        each = self.softmax(said[0][[token for token, _, _ in words]]) if words else []
        entities: list[dict[str, Any]] = []
        before = "O"
        for (_, start, end), scores in zip(words, each, strict=True):
            label = self.labels[int(scores.argmax())]
            if label != "O" and not (label[0] == "I" and before[1:] == label[1:]):
                entities.append({"start": start, "end": end, "label": label[2:], "text": "", "score": []})
            if label != "O":
                entities[-1]["end"] = end
                entities[-1]["score"].append(scores.max())
            before = label
        for one in entities:
            one |= {"text": texts[0][one["start"] : one["end"]], "score": float(np.mean(one["score"]))}
        return {"entities": entities}

    def words(self, seen: Seen, text: str) -> list[tuple[int, int, int]]:
        """Each word's first token, start and end. It is the tokeniser's, cut further at what is no letter."""
        words: list[tuple[int, int, int]] = []
        word_before, end_before = None, 0
        for token, (word, (first, end)) in enumerate(zip(seen.words, seen.offsets, strict=True)):
            start = first + len(text[first:end]) - len(text[first:end].lstrip())
            if word is None or start >= end:
                continue
            inside = start == end_before and self.letter(text[start - 1]) and self.letter(text[start])
            if word == word_before and (start < end_before or inside):
                words[-1] = (*words[-1][:2], max(end, words[-1][2]))
            else:
                words.append((token, start, end))
            word_before, end_before = word, end
        if words and seen.length > len(seen.ids):
            end = words[-1][2]
            while 0 < end < len(text) and self.letter(text[end - 1]) and self.letter(text[end]):
                end += 1
            words[-1] = (*words[-1][:2], end)
        return words

    def letter(self, character: str) -> bool:  # or a digit, or a mark, of a script with spaces
        from unicodedata import category, name

        alone = name(character, "").startswith(
            ("CJK", "HIRA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
        )
        return not alone and (character.isalnum() or category(character)[0] == "M")


class ExtractiveQA(Task):
    """A context is read in windows that overlap; the best span is weighed against the first token: no answer."""

    asks = ("question", "context")

    def encode(self, texts: Sequence[str]) -> list[Seen]:
        self.tokenizer.no_truncation()
        asked = len(self.tokenizer.encode(texts[0], add_special_tokens=False).ids)
        if asked > self.max_length // 2:
            raise Problem(f"a question has {asked} tokens; this model reads at most {self.max_length // 2}")
        self.tokenizer.enable_truncation(self.max_length, stride=self.max_length // 3, strategy="only_second")
        found = self.tokenizer.encode(*texts)
        windows = [found, *found.overflowing]
        seen = []
        for window in windows[:64]:
            words = [w if n == 1 else None for w, n in zip(window.word_ids, window.sequence_ids, strict=True)]
            seen.append(Seen(window.ids, len(window.ids), window.offsets, words))
        beyond = sum(len(window.ids) for window in windows[64:])
        return [*seen[:-1], seen[-1]._replace(length=seen[-1].length + beyond)]

    def answer(self, said: list[Any], seen: list[Seen], texts: list[str]) -> dict[str, Any]:
        margin, score, nothing, start, end = max(map(self.search, said, seen), key=lambda one: one[0])
        if margin == -np.inf or (self.options["unanswerable"] and margin < 0):
            return {"answer": None, "score": nothing}
        span = texts[1][start:end]
        start, end = start + len(span) - len(span.lstrip()), end - len(span.lstrip()) + len(span.strip())
        return {"answer": texts[1][start:end], "start": start, "end": end, "score": score}

    def search(self, logits: Any, seen: Seen) -> tuple[float, float, float, int, int]:
        """How far a window's best span is above no answer, the probability of either, and the span's characters."""
        inside = [i for i, word in enumerate(seen.words) if word is not None]
        if not inside:
            return -np.inf, 0.0, 1.0, 0, 0
        logs = logits[[0, *inside]].astype(np.float64)
        logs = logs - logs.max(0)
        logs = logs - np.log(np.exp(logs).sum(0))
        sums = [logs[1 : len(logs) - wide, 0] + logs[1 + wide :, 1] for wide in range(min(30, len(inside)))]
        wide = int(np.argmax([one.max() for one in sums]))
        first = int(sums[wide].argmax())
        best, nothing = float(sums[wide][first]), float(logs[0].sum())
        start, end = seen.offsets[inside[first]][0], seen.offsets[inside[first + wide]][1]
        return best - nothing, float(np.exp(best)), float(np.exp(nothing)), start, end


TASKS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "extractive-qa": ExtractiveQA,
    "regression": Regression,
    "sentence-embedding": SentenceEmbedding,
}
