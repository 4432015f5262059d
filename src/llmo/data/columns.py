"""Chooses the columns of texts with labels, tags or entities."""

from __future__ import annotations

from collections.abc import Sequence

from llmo.data.named import Columns, listed, named, needed, once, row_columns, told, unless
from llmo.errors import DataError
from llmo.specs import DataSpec

# In order of preference, compared without case.
TEXT = """text content body message sentence review document utterance query question comment tweet post article
    description title headline input sms txt 文本 内容 正文 句子 评论 消息 问题 标题"""
LABEL = """label labels category categories class target intent topic tag sentiment y gold output label_text label_name
    标签 类别 分类 类型 意图 情感"""
TOKENS = "tokens words token 词"
TAGS = "tags ner_tags ner labels label bio 标签"
_SPANS = "spans entities annotations labels label 实体"
_DOCUMENT = "document document_id doc"
# Who has these has conversations: the columns of messages, of answers, and of answers that were compared.
_CONVERSATIONS = "messages conversations turns chosen rejected completion response answer"


def for_labels(names: Sequence[str], spec: DataSpec, where: str) -> Columns:
    """`text` and `label`. Raises DataError naming the columns there are, and the nearest, when one is missing."""
    rest = row_columns(names, spec, where)
    if spec.text is None and not named(names, TEXT) and named(names, TOKENS):
        raise DataError(
            "this is text with a tag for each word, not with a label for each text",
            where=where,
            hint="say task: token-classification",
        )
    if spec.text is None and spec.label is None and named(names, "instruction 指令") and named(names, "output 输出"):
        raise DataError(
            "these are instructions and what to answer, not texts with labels",
            where=where,
            hint="say task: generation; or name the columns: data.text: NAME, data.label: NAME",
        )
    text = told(names, spec.text, "text", where) or _needed(names, "text", TEXT, where)
    label = told(names, spec.label, "label", where) or _needed(names, "label", LABEL, where, text)
    once(names, where, text=text, label=label)
    return Columns(text=text, label=label, **unless(rest, text, label))


def for_tags(names: Sequence[str], spec: DataSpec, where: str) -> Columns:
    """`tokens` and `tags`, or `text` and `spans`, with the `document` they are from. Raises DataError."""
    rest = {**row_columns(names, spec, where), "document": named(names, _DOCUMENT)}
    text = told(names, spec.text, "text", where)
    label = told(names, spec.label, "label", where)
    tokens = "" if text else named(names, TOKENS)
    if tokens:
        tags = label or _needed(names, "label", TAGS, where, tokens)
        return Columns(tokens=tokens, tags=tags, **unless(rest, tokens, tags))
    text = text or _needed(names, "text", TEXT, where)
    spans = label or _needed(names, "label", _SPANS, where, text)
    return Columns(text=text, spans=spans, **unless(rest, text, spans))


def _needed(names: Sequence[str], key: str, words: str, where: str, taken: str = "") -> str:
    found = named(names, words, taken)
    if not found and named(names, _CONVERSATIONS):
        raise DataError(
            f"these are conversations, and no column is called like a {key} column",
            where=where,
            hint=f"say task: generation; or say which column holds it: data.{key}: NAME (there are: {listed(names)})",
        )
    return found or needed(names, key, words, where, taken)
