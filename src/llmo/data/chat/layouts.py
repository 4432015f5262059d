"""Finds how a source of conversations is written, from the names of its columns and its first rows."""

from __future__ import annotations

from collections.abc import Sequence

from llmo.data.chat.messages import is_messages, kind
from llmo.data.columns import LABEL, TAGS, TOKENS
from llmo.data.named import Columns, listed, named, row_columns, told, unless
from llmo.data.readers.base import RawRow
from llmo.errors import DataError
from llmo.specs import DataSpec

_MESSAGES = "messages conversations conversation dialogue dialog turns chat 对话 消息"
_PROMPT = "prompt question instruction query input 提问 问题 指令"
_ANSWER = "completion response answer output reply 回答 答案 回复 输出"
_INSTRUCTION = ("instruction", "指令")
_INPUT = "input context 输入"
_TEXT = "text content document body article 文本 内容 正文"
_REST = {"system": "system system_prompt 系统", "tools": "tools functions", "history": "history"}
SHAPES = {
    "openai": "messages",
    "sharegpt": "messages",
    "turns": "messages",
    "alpaca": "messages",
    "prompt-completion": "messages",
    "preference": "preference",
    "text": "text",
}
"""What each layout becomes."""


def choose(names: Sequence[str], head: Sequence[RawRow], spec: DataSpec, where: str) -> Columns:
    """The layout and its columns. Raises DataError when it is none of those known, or meant for another task."""
    text = told(names, spec.text, "text", where)
    answer = told(names, spec.label, "label", where)
    if text and text == answer:
        raise DataError(
            f"the column '{text}' cannot be both question and answer",
            where=where,
            hint=f"the columns are: {listed(names)}; change data.text or data.label",
        )
    by_name = [text] if text else [name for word in _MESSAGES.split() if (name := named(names, word))]
    found = (
        _messages(names, head, by_name, answer, turns=True)
        or _answered(names, text, answer)
        or _messages(names, head, [] if text else names, answer, turns=False)
        or _plain(names, head, text, where)
    )
    rest = {**row_columns(names, spec, where), **{role: named(names, words) for role, words in _REST.items()}}
    taken = found.values()
    if found["layout"] == "text":
        rest = {role: rest[role] for role in ("id", "split")}
    return Columns(**found, **unless(rest, *taken))


def _messages(
    names: Sequence[str], head: Sequence[RawRow], among: Sequence[str], answer: str, *, turns: bool
) -> dict[str, str]:
    """A column of lists of messages (with `turns`, of strings too), alone or with the answers to them."""
    column = next((name for name in among if name != answer and _sample(head, name, turns) is not None), "")
    if not column:
        return {}
    pair = _pair(names)
    if pair and not answer:
        return {"layout": "preference", "messages": column, **pair}
    if answer:
        return {"layout": "prompt-completion", "messages": column, "answer": answer}
    return {"layout": kind(_sample(head, column, turns)), "messages": column}


def _answered(names: Sequence[str], text: str, answer: str) -> dict[str, str]:
    """Columns of prompts and answers, or of two answers of which one was preferred."""
    pair = {} if answer else _pair(names)
    prompt = text or named(names, _PROMPT, answer, *pair.values())
    answer = answer or ("" if pair else named(names, _ANSWER, prompt) or named(names, "chosen", prompt))
    context = named(names, _INPUT, prompt, answer)
    found = {"prompt": prompt, **({"input": context} if context else {})} if prompt else {}
    if pair:
        return {"layout": "preference", **found, **pair}
    if not prompt and answer:
        prompt = named(names, _TEXT, answer)
        found = {"prompt": prompt}
    if not prompt or not answer:
        return {}
    alpaca = prompt.strip().casefold() in _INSTRUCTION
    return {"layout": "alpaca" if alpaca else "prompt-completion", **found, "answer": answer}


def _plain(names: Sequence[str], head: Sequence[RawRow], text: str, where: str) -> dict[str, str]:
    if text:
        return {"layout": "text", "text": text}
    text = named(names, _TEXT)
    if len(names) == 1 and not named(names, _PROMPT) and isinstance(head[0].values.get(names[0]), str):
        text = names[0]
    label = named(names, LABEL, text) or named(names, TAGS, text)
    if label and (text or named(names, f"{TOKENS} {_PROMPT}", label)):
        task = "text-classification" if text or not named(names, TOKENS) else "token-classification"
        raise DataError(
            f"these are texts with labels (column '{label}'), and no column is called like one of answers",
            where=where,
            hint=f"say task: {task}; or data.label: NAME for the column of answers, or data.text: NAME alone to learn "
            "to write such texts",
        )
    if text:
        return {"layout": "text", "text": text}
    raise DataError(
        "no columns are called like those of conversations or texts",
        where=where,
        hint=f"the columns are: {listed(names)}; say which holds the messages or prompts, and which the answers: "
        "data.text: NAME, data.label: NAME",
    )


def _pair(names: Sequence[str]) -> dict[str, str]:
    chosen, rejected = named(names, "chosen"), named(names, "rejected")
    return {"chosen": chosen, "rejected": rejected} if chosen and rejected else {}


def _sample(head: Sequence[RawRow], name: str, turns: bool) -> object:
    """The first value of the column that is a list of messages; None when there is none."""
    return next((row.values[name] for row in head if is_messages(row.values.get(name), turns=turns)), None)
