"""Cleans a text, and keeps the spans of its entities on the same words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import ftfy

from llmo.data import html
from llmo.data.row import Span
from llmo.specs import CleanSpec

# Only what is certainly damage is mended: quotes, widths and ligatures that the author wrote stay.
_FTFY = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_encoding=True,
    restore_byte_a0=True,
    replace_lossy_sequences=True,
    decode_inconsistent_utf8=True,
    fix_c1_controls=True,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=True,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Not U+200C/D: Persian and emoji need the joiners. Tab, line ends and separators are white space, handled below.
_DROPPED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"\s+")
_PLAIN = re.compile(r"[!-~]+(?: [!-~]+)*")
_LINE_ENDS = frozenset("\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
_ENDS = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_ODD_SPACE = re.compile(r"[^\S\t\n ]")
_BLANK_LINES = re.compile(r"\A(?:[ \t]*\n)+")
_ROUNDS = 4


def clean(text: str, spec: CleanSpec, changed: Counter[str]) -> str:
    """The cleaned text; `changed` counts the texts that each step altered. Cleaning twice changes nothing more."""
    if _PLAIN.fullmatch(text) and "<" not in text:
        return text
    if spec.strip_html is not False and html.is_html(text):
        text = html.strip(text)
        changed["html"] += 1
    steps: set[str] = set()
    text = _mended(text, spec, steps, lambda given: normalise(given).strip())
    changed.update(steps)
    return text


def clean_block(text: str, spec: CleanSpec, steps: set[str]) -> str:
    """As `clean`, for what is written over several lines: line ends, indentation and code stay, and so does HTML unless
    it is told to go, since in an answer it is an example and not damage. `steps` takes the names of those that altered
    something."""
    if _PLAIN.fullmatch(text) and "<" not in text:
        return text
    if spec.strip_html and html.is_html(text):
        text = html.strip(text)
        steps.add("html")
    return _mended(text, spec, steps, normalise_block)


def clean_spans(text: str, spans: Sequence[Span], spec: CleanSpec, changed: Counter[str]) -> tuple[str, list[Span]]:
    """As `clean`, with every span moved to where its words now are.

    The text is cleaned in pieces, cut where spans begin and end, so no step reaches across an edge; white space at
    the edges of a span is left outside of it. HTML is not stripped here: annotations count its characters.
    Spans must not overlap; one with nothing left in it is dropped and counted.
    """
    parts: list[str] = []
    moved: list[Span] = []
    length = 0
    steps: set[str] = set()
    for piece, label in _pieces(text, spans):
        cleaned = _piece(piece, spec, steps)
        if spec.normalise and (not parts or parts[-1].endswith((" ", "\n"))):
            cleaned = cleaned.lstrip()
        if label is not None:
            start = length + len(cleaned) - len(cleaned.lstrip())
            end = length + len(cleaned.rstrip())
            changed["spans_emptied"] += start >= end
            moved += [Span(start, end, label)] if start < end else []
        if cleaned:
            parts.append(cleaned)
            length += len(cleaned)
    result = "".join(parts)
    changed.update(steps)
    return (result.rstrip() if spec.normalise else result), moved


def _mended(text: str, spec: CleanSpec, steps: set[str], tidy: Callable[[str], str]) -> str:
    before = text
    taken: set[str] = set()
    for _ in range(_ROUNDS):  # mending can only meet more to mend where texts were damaged twice
        start = text
        if spec.fix_encoding:
            text = _noted(text, mend(text), "encoding", taken)
        if spec.normalise:
            text = _noted(text, tidy(text), "normalised", taken)
        if text == start:
            break
    if text != before:
        steps |= taken
    return text


def mend(text: str) -> str:
    """Undo text that was decoded with the wrong encoding; correct text stays as it is."""
    if text.isascii():
        return text
    return ftfy.fix_text(_SURROGATES.sub("\ufffd", text), _FTFY)


def normalise(text: str) -> str:
    """NFC, no control characters, white space folded: a run with a line end is one `\\n`, any other one space."""
    text = _DROPPED.sub("", _ESCAPES.sub("", _SURROGATES.sub("\ufffd", text)))
    return _SPACE.sub(_fold, unicodedata.normalize("NFC", text))


def normalise_block(text: str) -> str:
    """NFC, no control characters, line ends as `\\n`; nothing blank around: lines, or the space around a single one."""
    text = _DROPPED.sub("", _ESCAPES.sub("", _SURROGATES.sub("\ufffd", text)))
    text = _ODD_SPACE.sub(" ", _ENDS.sub("\n", unicodedata.normalize("NFC", text)))
    text = _BLANK_LINES.sub("", text).rstrip()
    return text if "\n" in text else text.lstrip()


def _fold(match: re.Match[str]) -> str:
    run = match[0]
    return " " if run == " " or _LINE_ENDS.isdisjoint(run) else "\n"


def _noted(before: str, after: str, step: str, steps: set[str]) -> str:
    if after != before:
        steps.add(step)
    return after


def _piece(piece: str, spec: CleanSpec, steps: set[str]) -> str:
    for _ in range(_ROUNDS):
        start = piece
        if spec.fix_encoding and not piece.isascii():
            # Word by word, since an edge of a span may stand between the words that explain each other.
            piece = _noted(piece, re.sub(r"[^ \t\n]+", lambda m: mend(m[0]), piece), "encoding", steps)
        if spec.normalise:
            piece = _noted(piece, normalise(piece), "normalised", steps)
        if piece == start:
            break
    return piece


def _pieces(text: str, spans: Sequence[Span]) -> Iterator[tuple[str, str | None]]:
    at = 0
    for span in spans:
        yield text[at : span.start], None
        yield text[span.start : span.end], span.label
        at = span.end
    yield text[at:], None
