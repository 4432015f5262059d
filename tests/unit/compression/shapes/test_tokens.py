"""A tokeniser with part of its vocabulary divides the texts that it was made for as before, whatever its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmo.compression.shapes.tokens import scripts, settings, trimmed
from support.tiny import tiny_tokenizer

MANY = [
    "the quick brown fox jumps over the lazy dog", "lower lowest newer newest wider widest", "banana bandana ananas",
    "réseau façade naïve", "今天天气很好", "слово за слово", "aaaa aaaaa aa", "unbelievable believable belief",
] * 4  # fmt: skip
SOME = ["the lowest banana fox", "newest belief, aaaaa aa!", "réseau the dog 123 👍"]
OTHERS = ["a completely different sentence", "widest bandana 天", "слово", "ZZZ qqq ~ é"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def bytewise() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        MANY,
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    made.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return made


def ended() -> Tokenizer:
    """BPE that marks where a word ends, with letters that it does not know."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        MANY,
        trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False),
    )
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        MANY, trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return made


KINDS = {"wordpiece": tiny_tokenizer, "bytewise": bytewise, "ended": ended, "unigram": unigram}


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_have_the_tokens_they_had(kind: str) -> None:
    whole = KINDS[kind]()
    before = [whole.encode(text).tokens for text in SOME]
    used = {i for text in SOME for i in whole.encode(text).ids}
    found = trimmed(whole, used, SOME)
    assert [found.tokenizer.encode(text).tokens for text in SOME] == before
    assert [[found.kept[i] for i in found.tokenizer.encode(t).ids] for t in SOME] == [whole.encode(t).ids for t in SOME]
    assert found.kept == sorted(found.kept)
    assert len(found.kept) < whole.get_vocab_size() == len(whole.get_vocab())
    assert found.tokenizer.get_vocab_size() == len(found.kept)
    for text in OTHERS:  # the rest is spelled, and nothing that was known is unknown now, but other scripts' letters
        ids = found.tokenizer.encode(text).ids
        assert ids
        assert max(ids) < len(found.kept)
    once_more = Tokenizer.from_str(found.text)
    assert once_more.encode(OTHERS[0]).ids == found.tokenizer.encode(OTHERS[0]).ids


def test_every_text_of_bytes_can_be_read_still() -> None:
    whole = bytewise()
    used = {i for text in SOME for i in whole.encode(text).ids}
    found = trimmed(whole, used, SOME).tokenizer
    for text in [*MANY, *OTHERS]:
        assert found.decode(found.encode(text).ids) == text


def test_words_that_were_unknown_stay_unknown() -> None:
    """`##bc` would spell what `ab` leads astray from."""
    names = ["[PAD]", "[UNK]", "a", "##b", "ab", "##bc", "x"]
    whole = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    whole.add_special_tokens(["[PAD]", "[UNK]"])
    text = "abc x"
    assert whole.encode(text).tokens == ["[UNK]", "x"]
    used = {*whole.encode(text).ids, names.index("##bc")}
    assert trimmed(whole, used, [text]).tokenizer.encode(text).tokens == ["[UNK]", "x"]


def test_letters_of_scripts_that_the_texts_do_not_use_go() -> None:
    assert scripts(["plain text, 12 €", "naïve"]) == {"LATIN"}
    assert scripts(["今天 and слово"]) == {"CJK", "LATIN", "CYRILLIC"}
    whole = tiny_tokenizer()
    kept = trimmed(whole, [], ["plain text"]).tokenizer.get_vocab()
    assert "王" not in kept
    assert {"a", "##z", "7", "~"} <= set(kept)
    assert "王" in trimmed(whole, [], ["北 plain"]).tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("bytewise", "RobertaTokenizer"), ("unigram", "XLMRobertaTokenizer"), ("wordpiece", "BertTokenizer")],
)
def test_plain_transformers_reads_the_same(kind: str, name: str, tmp_path: Path) -> None:
    whole = KINDS[kind]()
    found = trimmed(whole, {i for text in SOME for i in whole.encode(text).ids}, SOME)
    (tmp_path / "tokenizer.json").write_text(found.text, encoding="utf-8")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "bos_token": "<s>"}
    special |= {"eos_token": "</s>", "mask_token": "<mask>"}
    if kind == "wordpiece":
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        special = dict(zip(names, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], strict=True))
    known = {str(whole.token_to_id(t)): {"content": t, "special": True} for t in special.values()}
    body = settings({"tokenizer_class": name, "added_tokens_decoder": known, **special}, found.new)
    assert {token["content"]: int(i) for i, token in body["added_tokens_decoder"].items()} == {
        token: found.tokenizer.token_to_id(token) for token in special.values()
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(body), encoding="utf-8")
    plain = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SOME, *OTHERS]:
        assert plain(text)["input_ids"] == found.tokenizer.encode(text).ids, text
