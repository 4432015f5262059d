"""The settings of an answer that a person may give: an endpoint ignores what it does not know, so they are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmo.errors import InputError, nearest

SETTINGS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop",
    "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, if they are ones an endpoint knows and JSON can say."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise InputError(f"there is no setting '{name}'{nearest(name, list(SETTINGS))}", hint=", ".join(SETTINGS))
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise InputError(f"'{name}' cannot be {value}", hint="write a finite number") from None
    return dict(settings)
