"""POST /v1/completions: reads the request, writes the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from llmo.serve.ask import Ask, Input
from llmo.serve.openai import grammar
from llmo.serve.openai.errors import invalid
from llmo.serve.openai.fields import Fields, read
from llmo.serve.openai.request import DONE, Head, Wanted, event, is_ids, model_of, usage_of, wants_usage
from llmo.serve.openai.sampling import choices_of, max_tokens_of, sampling_of, stop_of

EXAMPLE = 'send {"model": "ENDPOINT", "prompt": "..."}'
_MOST_PROMPTS = 64
_MOST_LOGPROBS = 5
_DEFAULT_TOKENS = 16  # OpenAI's own
_UNSUPPORTED: dict[str, Sequence[Any]] = {"logit_bias": ({},), "suffix": ("",), "echo": (False,)}


def parse(data: bytes) -> Wanted:
    """The request. Raises InputError that says what is wrong with it and where."""
    fields = read(data, EXAMPLE)
    model = model_of(fields)
    inputs = _inputs(fields)
    fields.refuse(_UNSUPPORTED)
    stream = fields.flag("stream")
    n = choices_of(fields)
    if fields.integer("best_of", 1, 20) not in (None, n):
        raise invalid("'best_of' is not supported here", "best_of", code="unsupported_parameter", hint="leave it out")
    include_usage = wants_usage(fields, stream)
    ask = Ask(
        inputs=inputs,
        sampling=sampling_of(fields, grammar.wanted(fields), fields.integer("logprobs", 0, _MOST_LOGPROBS)),
        max_tokens=max_tokens_of(fields, "max_tokens") or _DEFAULT_TOKENS,
        stop=stop_of(fields),
        n=n,
        stream=stream,
        token_ids=fields.flag("return_token_ids"),
    )
    return Wanted(model, ask, partial(CompletionShape, model, ask, include_usage))


def _inputs(fields: Fields) -> list[Input]:
    """One text, a list of texts, one list of tokens, or a list of those."""
    value = fields.get("prompt")
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list) or not value:
        raise invalid(
            "'prompt' is a string, or a list of strings or of tokens", "prompt", code="missing_required_parameter"
        )
    if is_ids(value):
        return [Input(ids=value)]
    if len(value) > _MOST_PROMPTS:
        raise invalid(f"'prompt' holds at most {_MOST_PROMPTS} prompts", "prompt", code="array_above_max_length")
    if all(isinstance(one, str) for one in value):
        return [_text(one) for one in value]
    if all(is_ids(one) for one in value):
        return [Input(ids=one) for one in value]
    raise invalid("'prompt' is a string, or a list of strings or of tokens", "prompt", code="invalid_type")


def _text(text: str) -> Input:
    if not text:
        raise invalid("the prompt is empty", "prompt", hint="send some words")
    return Input(text=text)


class CompletionShape:
    """A text completion, whole or in chunks."""

    def __init__(self, model: str, ask: Ask, include_usage: bool, fingerprint: str) -> None:
        self._head = Head(model, fingerprint, "cmpl-")
        self._include_usage = include_usage
        self._offsets = [0] * ask.choices

    def whole(self, parts: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        choices = [self._choice(part) for part in sorted(parts, key=lambda part: int(part["choice"]))]
        body = self._head.object("text_completion", choices=choices, usage=usage_of(usage))
        if "prompt_ids" in usage:
            body["prompt_token_ids"] = usage["prompt_ids"]
        return body

    def begin(self) -> list[bytes]:
        return []

    def part(self, part: Mapping[str, Any]) -> list[bytes]:
        usage = {"usage": None} if self._include_usage else {}
        return [event(self._head.object("text_completion", choices=[self._choice(part)], **usage))]

    def end(self, usage: Mapping[str, Any]) -> list[bytes]:
        if not self._include_usage:
            return [DONE]
        return [event(self._head.object("text_completion", choices=[], usage=usage_of(usage))), DONE]

    def broken(self, body: Mapping[str, Any]) -> list[bytes]:
        return [event(body)]

    def _choice(self, part: Mapping[str, Any]) -> dict[str, Any]:
        index = part["choice"]
        choice = {
            "index": index,
            "text": part["text"],
            "logprobs": self._logprobs(index, part["logprobs"]) if "logprobs" in part else None,
            "finish_reason": part.get("finish"),
        }
        if "token_ids" in part:
            choice["token_ids"] = part["token_ids"]
        return choice

    def _logprobs(self, index: int, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """In the older form: one list a property; offsets are characters of the answer."""
        offsets = []
        for one in found:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(one["token"])
        return {
            "tokens": [one["token"] for one in found],
            "token_logprobs": [one["logprob"] for one in found],
            "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in found],
            "text_offset": offsets,
        }
