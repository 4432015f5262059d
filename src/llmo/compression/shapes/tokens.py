"""A tokeniser with part of its vocabulary: `tokenizer.json` is written again, so that kept tokens are found as before.

Dropping what a text does not use changes nothing of its tokens. WordPiece takes the longest token that fits and
Unigram the likeliest way to divide a word; neither can be a dropped one. Of BPE every merge on the way to a token is
kept, and the others were not applied.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from llmo.errors import ModelError

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "▁"  # SentencePiece's mark of a word's beginning
USED_SCRIPT = 0.001  # of all letters: fewer are strays


@dataclass(frozen=True, slots=True)
class Trimmed:
    """`kept` are the old ids in the order of the new ones."""

    tokenizer: Tokenizer
    text: str  # of `tokenizer.json`
    kept: list[int]

    @property
    def new(self) -> dict[int, int]:
        """New ids by old ones."""
        return {old: new for new, old in enumerate(self.kept)}


def trimmed(tokenizer: Tokenizer, used: Iterable[int], texts: Sequence[str]) -> Trimmed:
    """Keep the ids `used`, all added tokens, all bytes, and the single characters of the scripts that `texts` are
    written in, so that other texts in these still have tokens; ids keep their order.

    Raises ModelError for a kind of vocabulary that is not known.
    """
    body: dict[str, Any] = json.loads(tokenizer.to_str())
    body["truncation"] = None
    kind = body["model"]["type"]
    if kind not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise ModelError(f"a vocabulary of kind {kind} cannot be trimmed", hint="leave its vocabulary whole")
    ids = tokenizer.get_vocab(with_added_tokens=True)
    names = {i: token for token, i in ids.items()}
    kept = {i for i in used if i in names} | {token["id"] for token in body["added_tokens"]}
    bytewise = "ByteLevel" in json.dumps([body["pre_tokenizer"], body["decoder"]])
    kept |= _spelling(ids, body["model"], None if bytewise else scripts(texts))
    if kind == "WordPiece":
        kept |= {ids[token] for token in _tried(tokenizer, body["model"], texts)}
    if kind == "BPE":
        made = _formed({names[i] for i in kept}, body["model"])
        kept |= {ids[token] for token in made if token in ids}
    order = sorted(kept)
    new = {old: i for i, old in enumerate(order)}
    _rewrite(body, new, names)
    text = json.dumps(body, ensure_ascii=False)
    return Trimmed(Tokenizer.from_str(text), text, order)


def settings(body: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """`tokenizer_config.json` with the ids that it may name."""
    known = body.get("added_tokens_decoder")
    if isinstance(known, dict):
        body = {**body, "added_tokens_decoder": {str(new[int(i)]): t for i, t in known.items() if int(i) in new}}
    return body


def scripts(texts: Iterable[str]) -> set[str]:
    """The scripts that a thousandth of the letters at least is written in, by the names that Unicode gives letters."""
    letters: Counter[str] = Counter()
    for text in texts:
        letters.update(text)
    found: Counter[str] = Counter()
    for letter, times in letters.items():
        found[_script(letter)] += times
    del found[""]
    return {name for name, times in found.items() if times >= USED_SCRIPT * found.total()}


def _script(character: str) -> str:
    """Empty for what is no letter and belongs to all of them."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    return unicodedata.name(character, "").split(" ")[0].replace("COMBINING", "")


def _spelling(ids: Mapping[str, int], model: Mapping[str, Any], known: set[str] | None) -> set[int]:
    """Bytes and single characters, those of scripts that are not `known` left out (None: all are kept)."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    found = set()
    for token, i in ids.items():
        bare = token.removeprefix(prefix).removesuffix(suffix).removeprefix(SPACE)
        letter = len(bare) == 1 and (known is None or bare.isascii() or _script(bare) in known | {""})
        if letter or not bare or BYTE.fullmatch(token):
            found.add(i)
    return found


def _tried(tokenizer: Tokenizer, model: Mapping[str, Any], texts: Sequence[str]) -> set[str]:
    """What WordPiece takes of a word before it finds that the rest is unknown: without these it might find a way."""
    unknown, vocabulary = model["unk_token"], model["vocab"]
    prefix = model.get("continuing_subword_prefix") or ""
    found: set[str] = set()
    for text, encoding in zip(texts, tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True):
        spans = {o for token, o in zip(encoding.tokens, encoding.offsets, strict=True) if token == unknown}
        for start, end in spans:
            word = (
                text[start:end] if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text[start:end])
            )
            at = 0
            while at < len(word):
                pieces = ((prefix if at else "") + word[at:to] for to in range(len(word), at, -1))
                piece = next((piece for piece in pieces if piece in vocabulary), None)
                if piece is None:
                    break
                found.add(piece)
                at += len(piece) - (len(prefix) if at else 0)
    return found


def _formed(tokens: Iterable[str], model: Mapping[str, Any]) -> set[str]:
    """The tokens that merges make on the way to these ones."""
    ranks = {pair: rank for rank, pair in enumerate(_pairs(model))}
    suffix = model.get("end_of_word_suffix") or ""
    found: set[str] = set()
    for token in tokens:
        parts = list(token.removesuffix(suffix))
        if suffix and token.endswith(suffix) and parts:
            parts[-1] += suffix
        while len(parts) > 1:
            rank, at = min((ranks.get((a, b), len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            found.add(parts[at])
    return found


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for pair in model["merges"]:
        first, second = pair.split(" ", 1) if isinstance(pair, str) else pair
        found.append((str(first), str(second)))
    return found


def _rewrite(body: dict[str, Any], new: Mapping[int, int], names: Mapping[int, str]) -> None:
    """Put the new ids wherever `tokenizer.json` has ids, and leave out what is not kept."""
    model = body["model"]
    if model["type"] == "Unigram":
        there = range(len(model["vocab"]))
        model["vocab"] = [model["vocab"][i] for i in there if i in new]
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[i] for token, i in sorted(model["vocab"].items(), key=lambda e: e[1]) if i in new}
    if model["type"] == "BPE":
        there_still = {names[i] for i in new}
        kept = [(a, b) for a, b in _pairs(model) if a in there_still and b in there_still and a + b in there_still]
        model["merges"] = [[a, b] for a, b in kept]
    for token in body["added_tokens"]:
        token["id"] = new[token["id"]]
    if isinstance(body.get("padding"), dict):
        body["padding"]["pad_id"] = new.get(body["padding"]["pad_id"], 0)
    if body.get("post_processor"):
        _rewrite_processor(body["post_processor"], new)


def _rewrite_processor(processor: dict[str, Any], new: Mapping[int, int]) -> None:
    for inner in processor.get("processors", []):
        _rewrite_processor(inner, new)
    for name in ("sep", "cls"):  # of BERT's and RoBERTa's own processors: a token and its id
        if isinstance(processor.get(name), list):
            processor[name][1] = new[processor[name][1]]
    special = processor.get("special_tokens")
    if isinstance(special, dict):
        for token in special.values():
            token["ids"] = [new[i] for i in token["ids"]]
