"""Tells whether a text is HTML, and takes its tags, scripts and styles away without touching `a < b` or code."""

from __future__ import annotations

import re

from selectolax.lexbor import LexborHTMLParser

_TAGS = (
    "a abbr address article aside b big blockquote body br button caption center cite code col colgroup dd del details "
    "div dl dt em fieldset figcaption figure font footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe img input "
    "ins label legend li link main mark meta nav noscript ol option p picture pre q s samp script section select small "
    "source span strike strong style sub summary sup svg table tbody td template textarea tfoot th thead time title tr "
    "tt u ul var video"
)
_KNOWN = "|".join(sorted(_TAGS.split(), key=len, reverse=True))
_BLOCKS = (
    "address,article,aside,blockquote,br,dd,div,dl,dt,fieldset,figcaption,figure,footer,form,h1,h2,h3,h4,h5,h6,header,"
    "hr,li,main,nav,ol,option,p,pre,section,table,td,th,tr,ul"
)
_TAG = re.compile(rf"<(/?)({_KNOWN})(?:\s[^<>]*)?>", re.IGNORECASE)
_VOID = re.compile(r"<(?:br|hr|p)\s*/?>|<(?:img|input|meta|link)\s[^<>]*=[^<>]*>", re.IGNORECASE)
_PAGE = re.compile(r"\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
# What a person writes about HTML or code: fenced, between back-ticks, or a lone tag with spaces around it.
_QUOTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_HOLD = "\ue0b1"  # stands for a quoted part while the rest is parsed
_MENTION = re.compile(rf"(?<!\S)<(?:{_KNOWN})\s*/?>(?!\S)", re.IGNORECASE)
_NOT_A_TAG = re.compile(rf"<(?!/?(?:{_KNOWN})(?:[\s/>])|!--|!doctype\b)", re.IGNORECASE)


def is_html(text: str) -> bool:
    """True when the text has real HTML: a page, an element with its end, or line breaks between its words."""
    if "<" not in text or ">" not in text:
        return False
    if _PAGE.match(text):
        return True
    bare = _QUOTED.sub(" ", text)
    if "</" in bare and _has_closed_element(bare):
        return True
    return bool(_VOID.search(_MENTION.sub(" ", bare)))


def strip(text: str) -> str:
    """The text a reader of the page sees: blocks on lines of their own, entities as characters."""
    if "`" not in text or _HOLD in text or _PAGE.match(text):
        return _stripped(text)
    quoted = iter(_QUOTED.findall(text))
    return re.sub(_HOLD, lambda _: next(quoted), _stripped(_QUOTED.sub(_HOLD, text)))


def _has_closed_element(text: str) -> bool:
    opened: set[str] = set()
    for end, name in _TAG.findall(text):  # one pass, since a pattern with `.*?` would be quadratic
        if not end:
            opened.add(name.casefold())
        elif name.casefold() in opened:
            return True
    return False


def _stripped(text: str) -> str:
    tree = LexborHTMLParser(_NOT_A_TAG.sub("&lt;", text))
    tree.strip_tags(["script", "style", "noscript", "template", "head", "svg", "iframe"])
    if tree.body is None:
        return ""
    for node in tree.css(_BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    return tree.body.text(deep=True)
