"""Text from tokens: nothing is lost, no stop string leaks, and it does not matter how the text was cut."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
from tokenizers.models import BPE

from llmo.engines.generation import TokenLogprob
from llmo.errors import ModelError
from llmo.serve.answer import AnswerText, TokenPieces
from support.tiny_chat import END, tiny_chat_tokenizer

TOKENIZER = tiny_chat_tokenizer()
PIECES = TokenPieces(TOKENIZER)


def ids(text: str | bytes) -> list[int]:
    """One token a byte, whatever the bytes are."""
    data = text.encode() if isinstance(text, str) else text
    return [byte_ids()[byte] for byte in data]


def byte_ids() -> dict[int, int]:
    return {PIECES.bytes_of(token)[0]: token for token in range(3, TOKENIZER.get_vocab_size())}


def written(tokens: list[int], cuts: list[int], stop: tuple[str, ...] = ()) -> tuple[str, AnswerText, list[str]]:
    answer = AnswerText(TOKENIZER, stop, PIECES)
    sent = []
    left = list(tokens)
    for cut in [*cuts, len(tokens)]:
        sent.append(answer.add(left[:cut], [TokenLogprob(t, -1.0) for t in left[:cut]]))
        left = left[cut:]
    sent.append(answer.end())
    return "".join(sent), answer, sent


@given(st.binary(max_size=40), st.lists(st.integers(1, 5), max_size=40))
def test_any_bytes_in_any_pieces_become_what_decoding_them_at_once_gives(data: bytes, cuts: list[int]) -> None:
    text, answer, _ = written(ids(data), cuts)
    assert text == data.decode("utf-8", "replace")
    assert len(answer.logprobs) == len(data)
    assert bytes(byte for one in answer.logprobs for byte in one["bytes"]) == data


def test_a_character_is_sent_when_it_is_whole() -> None:
    answer = AnswerText(TOKENIZER)
    assert [answer.add([token]) for token in ids("a👍")] == ["a", "", "", "", "👍"]


def cut_by_hand(text: str, stop: tuple[str, ...]) -> str:
    """The stop string that is complete first counts, the longest of those."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    st.text("ab\né", max_size=30),
    st.lists(st.text("ab\né", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(1, 7), max_size=30),
)
def test_the_answer_ends_before_the_first_stop_string(text: str, stop: list[str], cuts: list[int]) -> None:
    found, answer, sent = written(ids(text), cuts, tuple(stop))
    expected = cut_by_hand(text, tuple(stop))
    assert found == expected
    assert answer.stopped == (expected != text)
    for n in range(len(sent)):
        assert expected.startswith("".join(sent[: n + 1]))


def test_what_may_become_a_stop_string_is_held_only_as_long_as_it_may() -> None:
    answer = AnswerText(TOKENIZER, ("STOP",))
    assert [answer.add([token]) for token in ids("aSTSTx")] == ["a", "", "", "ST", "", "STx"]


def test_log_probabilities_come_with_the_text_their_tokens_begin_in() -> None:
    answer = AnswerText(TOKENIZER, ("END",), PIECES)
    tokens = ids("okENDno")
    counts = []
    for token in tokens:
        answer.add([token], [TokenLogprob(token, -0.5, ((token, -0.5), (END, -math.inf)))])
        counts.append(len(answer.logprobs))
    assert counts == [1, 2, 2, 2, 2, 2, 2]
    assert [one["token"] for one in answer.logprobs] == ["o", "k"]
    assert answer.logprobs[0]["top_logprobs"][1]["logprob"] == -9999.0
    assert len(answer.tokens) == 5, "those behind the stop string are not counted"


def test_a_log_probability_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ModelError, match="finite"):
        AnswerText(TOKENIZER, (), PIECES).add(ids("a"), [TokenLogprob(ids("a")[0], math.nan)])


def test_special_tokens_are_no_text_but_have_bytes() -> None:
    text, _, _ = written([*ids("a"), END, *ids("b")], [])
    assert text == "ab"
    assert PIECES.bytes_of(END) == b"<|im_end|>"
    assert PIECES.bytes_of(10**6) == b""
    assert PIECES.longest() == len("<|endoftext|>")


def test_tokenisers_that_fall_back_to_bytes() -> None:
    tokens = {"<0xC3>": 0, "<0xA9>": 1, "▁caf": 2}
    tokenizer = Tokenizer(BPE(tokens, [], byte_fallback=True))
    tokenizer.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse()])
    answer = AnswerText(tokenizer)
    assert [answer.add([token]) for token in (2, 0, 1)] == [" caf", "", "é"]
    pieces = TokenPieces(tokenizer)
    assert [pieces.bytes_of(token) for token in (2, 0, 1)] == [b" caf", b"\xc3", b"\xa9"]
