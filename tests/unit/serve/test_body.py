"""What a predict body may hold, and what is said of each that may not."""

from __future__ import annotations

import json

import pytest

from llmo.errors import InputError, TooLargeError
from llmo.serve.body import parse


def test_reads_one_text_and_many() -> None:
    assert parse(b'{"text": "a"}').texts == ["a"]
    body = parse('{"texts": ["é", "👍"], "logits": true, "deadline_seconds": 2}'.encode())
    assert (body.texts, body.logits, body.deadline_seconds) == (["é", "👍"], True, 2.0)


def test_a_history_is_the_text_that_means_it() -> None:
    assert parse(b'{"history": ["50", 172, "toy  story"]}').texts == ["50 172 toy_story"]


def test_reads_texts_by_name_alone_and_among_others() -> None:
    asked = {"question": "Who?", "context": "Bob."}
    assert parse(json.dumps(asked).encode()).texts == [asked]
    assert parse(b'{"text": "a", "pair": "b"}').texts == [{"text": "a", "pair": "b"}]
    assert parse(json.dumps({"texts": ["a", asked, {"text": "b"}]}).encode()).texts == ["a", asked, {"text": "b"}]


def test_a_byte_order_mark_is_not_an_error() -> None:
    assert parse(b'\xef\xbb\xbf{"text": "a"}').texts == ["a"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not valid JSON"),
        (b'{"text": "a"', "not valid JSON"),
        (b'"a"', "not a JSON object"),
        (b'["a"]', "not a JSON object"),
        (b"{}", "neither"),
        (b'{"text": "a", "texts": ["b"]}', "both"),
        (b'{"texts": []}', "at least one"),
        (b'{"history": ["b"], "texts": ["c"]}', "both 'texts' and 'history'"),
        (b'{"text": "a", "history": ["b"]}', "both 'text' and 'history'"),
        (b'{"history": []}', "at least one item"),
        (b'{"history": "50 172"}', "at least one item"),
        (b'{"history": ["a", null]}', "an item is a string"),
        (b'{"history": ["a", " "]}', "an item is a string"),
        (b'{"texts": "a"}', "at least one"),
        (b'{"text": 3}', "not a number"),
        (b'{"text": null}', "not null"),
        (b'{"texts": ["a", {}]}', "not an object"),
        (b'{"texts": ["a", {"txt": "b"}]}', "did you mean 'text'"),
        (b'{"texts": ["a", {"question": 3, "context": "b"}]}', "not a number"),
        (b'{"question": "a", "context": ["b"]}', "not a list"),
        (b'{"question": "a", "texts": ["b"]}', "both 'question' and 'texts'"),
        (b'{"text": "a", "text": "b"}', "written twice"),
        (b'{"text": "a", "deadline_seconds": NaN}', "NaN"),
        (b'{"text": "a", "deadline_seconds": Infinity}', "Infinity"),
        (b'{"text": "a", "deadline_seconds": 1e999}', "too large"),
        (b'{"text": "a", "deadline_seconds": 0}', "above 0"),
        (b'{"text": "a", "deadline_seconds": -1}', "above 0"),
        (b'{"text": "a", "deadline_seconds": true}', "above 0"),
        (b'{"text": "a", "deadline_seconds": "1"}', "above 0"),
        (b'{"text": "a", "deadline_seconds": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"text": "a", "logits": 1}', "true or false"),
        (b'{"text": "a", "logit": true}', "did you mean 'logits'"),
        (b'{"text": "a", "\\ud800": 1}', "unknown key"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text":' + b"[" * 101 + b"]" * 101 + b"}", "nested too deeply"),
        (b'{"text":' * 50_000, "nested too deeply"),
        (b'{"text": "a"}\x00', "not valid JSON"),
    ],
)
def test_says_what_is_wrong(data: bytes, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(data)
    assert says in caught.value.what
    assert caught.value.status == 422
    json.dumps(caught.value.to_json()).encode()  # it can always be sent


def test_too_many_texts() -> None:
    assert len(parse(json.dumps({"texts": ["a"] * 512}).encode()).texts) == 512
    with pytest.raises(TooLargeError, match="513 texts"):
        parse(json.dumps({"texts": ["a"] * 513}).encode())
