"""Asks an endpoint over HTTP as a client would, logits and token ids included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from llmo.errors import LLMOError, UnreachableError, from_json

SECONDS = 60.0


def ask(url: str, key: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """One answer a text, each with `logits` and `input_ids`.

    Raises UnreachableError when nothing answers, and the endpoint's own error when it refuses.
    """
    try:
        reply = httpx.post(
            url,
            json={"texts": list(texts), "logits": True},
            headers={"Authorization": f"Bearer {key}"},
            timeout=SECONDS,
            trust_env=False,
        )
        body = reply.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnreachableError(
            f"the endpoint does not answer: {error or type(error).__name__}", where=url, hint="see: llmo endpoints"
        ) from error
    except ValueError as error:
        raise _not_ours(url) from error
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        raise from_json(body["error"])
    answers = body.get("answers") if isinstance(body, dict) else None
    if not isinstance(answers, list) or len(answers) != len(texts):
        raise _not_ours(url)
    return answers


def _not_ours(url: str) -> LLMOError:
    return UnreachableError(
        "what answers is not an LLMO endpoint", where=url, hint="give the URL that ends in /predict"
    )
