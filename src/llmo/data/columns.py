"""Chooses the columns that hold text, label, id and split: those the user told, else those whose names say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmo.errors import DataError, nearest
from llmo.specs import DataSpec

# In order of preference, compared without case.
_NAMES = {
    "text": """text content body message sentence review document utterance query question comment tweet post article
        description title headline input sms txt 文本 内容 正文 句子 评论 消息 问题 标题""",
    "label": """label labels category categories class target intent topic tag sentiment y gold output label_text
        label_name 标签 类别 分类 类型 意图 情感""",
    "tokens": "tokens words token 词",
    "tags": "tags ner_tags ner labels label bio 标签",
    "spans": "spans entities annotations labels label 实体",
    "id": "id _id uid guid doc_id row_id text_id key 编号 序号",
    "split": "split subset partition fold set 划分",
    "document": "document document_id doc",
}


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns; `text` and `label`, or `tokens` and `tags`, or `text` and `spans`."""

    text: str = ""
    label: str = ""
    tokens: str = ""
    tags: str = ""
    spans: str = ""
    id: str = ""
    split: str = ""
    document: str = ""

    def used(self) -> dict[str, str]:
        """What each role is read from, as the card keeps it."""
        roles = ("text", "label", "tokens", "tags", "spans", "id", "split", "document")
        return {role: getattr(self, role) for role in roles if getattr(self, role)}


def choose(names: Sequence[str], spec: DataSpec, task: str, where: str) -> Columns:
    """Raises DataError naming the columns there are, and the nearest, when a needed one is missing."""
    told = {
        "id": _told(names, spec.id, "id", where) or _found(names, "id"),
        "split": _told(names, spec.split_column, "split_column", where) or _found(names, "split"),
        "document": _found(names, "document") if task == "token-classification" else "",
    }
    if task == "token-classification":
        return _for_tokens(names, spec, where, told)
    if spec.text is None and not _found(names, "text") and _found(names, "tokens"):
        raise DataError(
            "this is text with a tag for each word, not with a label for each text",
            where=where,
            hint="say task: token-classification",
        )
    text = _told(names, spec.text, "text", where) or _needed(names, "text", "text", where)
    label = _told(names, spec.label, "label", where) or _needed(names, "label", "label", where, text)
    if text == label:
        raise DataError(
            f"the column '{text}' cannot be both text and label",
            where=where,
            hint=f"the columns are: {_listed(names)}; change data.text or data.label",
        )
    return Columns(text=text, label=label, **_unless(told, text, label))


def _for_tokens(names: Sequence[str], spec: DataSpec, where: str, rest: dict[str, str]) -> Columns:
    text = _told(names, spec.text, "text", where)
    label = _told(names, spec.label, "label", where)
    tokens = "" if text else _found(names, "tokens")
    if tokens:
        tags = label or _needed(names, "tags", "label", where, tokens)
        return Columns(tokens=tokens, tags=tags, **_unless(rest, tokens, tags))
    text = text or _needed(names, "text", "text", where)
    spans = label or _needed(names, "spans", "label", where, text)
    return Columns(text=text, spans=spans, **_unless(rest, text, spans))


def _unless(found: dict[str, str], *taken: str) -> dict[str, str]:
    return {role: name for role, name in found.items() if name and name not in taken}


def _told(names: Sequence[str], told: str | None, key: str, where: str) -> str:
    if told is None or told in names:
        return told or ""
    raise DataError(
        f"there is no column '{told}'{nearest(told, list(names))}",
        where=where,
        hint=f"the columns are: {_listed(names)}; change data.{key}",
    )


def _found(names: Sequence[str], role: str) -> str:
    folded = {name.strip().casefold(): name for name in reversed(names)}
    return next((folded[name] for name in _NAMES[role].split() if name in folded), "")


def _needed(names: Sequence[str], role: str, key: str, where: str, taken: str = "") -> str:
    free = [name for name in names if name != taken]
    found = _found(free, role)
    if found:
        return found
    close = [name for name in free if nearest(name.casefold(), _NAMES[role].split())]
    meant = f"; did you mean '{close[0]}'?" if close else ""
    raise DataError(
        f"no column is called like a {key} column{meant}",
        where=where,
        hint=f"the columns are: {_listed(names)} (a CSV or TSV file names them in its first row); "
        f"say which: data.{key}: NAME",
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")
