"""Cleaning mends damage, leaves what is right, changes nothing the second time, and keeps entities in place."""

from __future__ import annotations

import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmo.data.clean import clean, clean_block, clean_spans
from llmo.data.html import is_html
from llmo.data.row import Span
from llmo.specs import CleanSpec

SPEC = CleanSpec()
# What texts are made of, with the pieces that cleaning looks at.
_PIECES = (
    "a|Z|9| |  |\t|\n|\r\n|\u2028|\xa0|\x00|\x1b[31m|\u200b|\u200d|\ud800|é|e\u0301|Ã©|â€™|Â£|Ãƒ|\x85|\x91|"
    "ﬁ|Ａ|“|中|😀|👩‍👧|\u0301|ᄀ|ᅡ|<|>|&|&amp;|<b>|</b>"
)
PIECES = st.sampled_from(_PIECES.split("|"))
WORDY = st.lists(PIECES | st.characters(), max_size=25).map("".join)


def cleaned(text: str, **spec) -> str:
    return clean(text, CleanSpec(**spec), Counter())


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("schÃ¶n", "schön"),
        ("l’humanitÃ©", "l’humanité"),
        ("price: â‚¬5 â€œhiâ€\x9d", "price: €5 “hi”"),
        ("Ã\xa0 la carte", "à la carte"),
        ("ÃƒÂ©tÃƒÂ©", "été"),
        ("ä½\xa0å¥½", "你好"),
        ("a \n\n  b\t\tc \r\n d", "a\nb c\nd"),
        ("bell\x07 and \x1b[31mred\x1b[0m", "bell and red"),
        ("zero\u200bwidth soft\u00adhyphen \ufeffmark", "zerowidth softhyphen mark"),
        ("e\u0301te\u0301", "été"),
        ("half \ud83d pair", "half \ufffd pair"),
    ],
)
def test_damage_is_mended(text, right):
    assert cleaned(text) == right


@pytest.mark.parametrize(
    "text",
    [
        "“curly” ‘quotes’ stay",
        "ﬁ ligature, Ａ wide, … dots, — dash",
        "à la carte, naïve, São Paulo, Ångström, ÀÉÎ",
        "VOILÀ LE CAFÉ",
        "中文，标点。「引号」",
        "日本語のテキスト、ｶﾀｶﾅ",
        "👨‍👩‍👧 ❤️ 🇩🇪",
        "می‌خواهم",
        "£5 €6 ¥7 ½ ²",
        "a < b and c > d",
        "if (a<b && c>d) { x->y = vector<int>(); }",
        "I <3 you </3",
        "How do I close a <div> tag?",
        "use <br> for a new line, or `<b>bold</b>` for bold",
        "```html\n<p>code</p>\n```",
        "<UNK> said <PERSON> to <LOC>",
        "a <- b; c <b",
        "AT&T &amp; others",
    ],
)
def test_what_is_right_stays(text):
    assert cleaned(text) == text


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Great film.<br /><br />But long", "Great film.\nBut long"),
        ("<p>One</p><p>Two &amp; three</p>", "One\nTwo & three"),
        ("a <b>bo</b>ld word", "a bold word"),
        ("<p>2 < 3 and vector<int></p>", "2 < 3 and vector<int>"),
        ("<div><script>var x = '<p>no</p>';</script><style>p{}</style>yes</div>", "yes"),
        ("<!DOCTYPE html><html><head><title>t</title></head><body><h1>H</h1>text</body></html>", "H\ntext"),
        ("<p>code: `<b>x</b>` ok</p> <i>end</i>", "code: `<b>x</b>` ok\nend"),
        ("<p>show &lt;b&gt; as code</p>", "show <b> as code"),
    ],
)
def test_html_becomes_what_its_reader_sees(text, right):
    assert is_html(text)
    assert cleaned(text) == right


def test_each_step_can_be_turned_off():
    text = " <b>Ã©</b> "
    assert cleaned(text) == "é"
    assert cleaned(text, strip_html=False) == "<b>é</b>"
    assert cleaned(text, fix_encoding=False) == "Ã©"
    assert cleaned(text, normalise=False, strip_html=False) == " <b>é</b> "


def test_what_each_step_changed_is_counted():
    changed: Counter[str] = Counter()
    for text in ("plain", "Ã©", "<b>x</b>", "a  b", "é"):
        clean(text, SPEC, changed)
    assert changed == {"encoding": 1, "html": 1, "normalised": 1}


def test_a_long_text_of_tags_takes_no_quadratic_time():
    assert not is_html("<b>" * 300_000 + "</i>")
    assert not is_html("`" * 300_000 + "<a ")


@given(WORDY)
@example("â\u0080Â\x99")
def test_cleaning_twice_changes_nothing_more(text):
    spec = CleanSpec(strip_html=False)  # HTML is stripped once: `&lt;b&gt;` in it is text, and stays
    once = clean(text, spec, Counter())
    assert clean(once, spec, Counter()) == once


@given(WORDY)
def test_clean_text_is_well_formed(text):
    result = clean(text, SPEC, Counter())
    assert result == unicodedata.normalize("NFC", result)
    assert result == result.strip()
    result.encode()
    assert not any(unicodedata.category(char) in ("Cc", "Cs") and char != "\n" for char in result)
    assert "  " not in result
    assert "\n\n" not in result


@st.composite
def annotated(draw) -> tuple[str, list[Span]]:
    text = draw(WORDY.filter(bool))
    edges = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pairs = list(zip(edges[::2], edges[1::2], strict=False))
    return text, [Span(start, end, f"L{i}") for i, (start, end) in enumerate(pairs)]


@given(annotated())
def test_spans_stay_on_their_words(case):
    text, spans = case
    result, moved = clean_spans(text, spans, SPEC, Counter())
    surfaces = {span.label: text[span.start : span.end] for span in spans}
    spec = CleanSpec(strip_html=False)
    for span in moved:
        surface = result[span.start : span.end]
        assert surface, "no span is empty"
        assert surface == surface.strip()
        # The same words as cleaning the surface alone gives; words are mended one by one.
        again, _ = clean_spans(surfaces[span.label], [], spec, Counter())
        assert surface.split() == again.split()
    assert [span.label for span in moved] == sorted(span.label for span in moved)
    assert all(a.end <= b.start for a, b in pairwise(moved))


@given(annotated())
def test_cleaning_spans_twice_changes_nothing_more(case):
    once, moved = clean_spans(*case, SPEC, Counter())
    again, same = clean_spans(once, moved, SPEC, Counter())
    assert again == once
    assert same == moved


def test_spans_on_emoji_chinese_and_mojibake():
    text = "  😀 Met MÃ¼nchen\t\tin\n\n 北京\u200b市 \x00 now"
    words = ["MÃ¼nchen", "北京\u200b市"]
    spans = [Span(text.index(w), text.index(w) + len(w), "LOC") for w in words]
    result, moved = clean_spans(text, spans, SPEC, Counter())
    assert result == "😀 Met München in\n北京市 now"
    assert [result[s.start : s.end] for s in moved] == ["München", "北京市"]


def test_a_span_of_nothing_is_dropped_and_counted():
    changed: Counter[str] = Counter()
    result, moved = clean_spans("a \u200b b", [Span(2, 3, "X")], SPEC, changed)
    assert (result, moved) == ("a b", [])
    assert changed["spans_emptied"] == 1


def cleaned_block(text: str, **spec) -> str:
    return clean_block(text, CleanSpec(**spec), set())


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a\r\n\r\n\tb\r  c \u2028d\x0be", "a\n\n\tb\n  c \nd\ne"),
        ("\n \n    indented\n    code\n\n", "    indented\n    code"),
        ("  one line \n", "one line"),
        ("two  spaces\xa0and <b>bold</b>", "two  spaces and <b>bold</b>"),
        ("bell\x07 \x1b[31mred\x1b[0m \ud83d\n", "bell red \ufffd"),
        ("schÃ¶n\n  Ã©tÃ©", "schön\n  été"),
    ],
)
def test_a_block_keeps_its_lines(text, right):
    assert cleaned_block(text) == right


def test_a_block_is_left_as_told():
    assert cleaned_block(" Ã©\x07\r\n", normalise=False, fix_encoding=False) == " Ã©\x07\r\n"


@given(WORDY)
def test_cleaning_a_block_twice_changes_nothing_more(text):
    once = cleaned_block(text)
    steps: set[str] = set()
    assert clean_block(once, SPEC, steps) == once
    assert not steps
    assert once.isascii() or once == unicodedata.normalize("NFC", once)
    assert not any(ord(sign) < 32 and sign not in "\t\n" for sign in once)
