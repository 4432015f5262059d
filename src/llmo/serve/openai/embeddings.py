"""POST /v1/embeddings: reads the request, writes the answer."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic_core import to_json  # eleven times as fast as `json` for floats, and the same numbers

from llmo.serve.openai.errors import invalid
from llmo.serve.openai.fields import Fields, read
from llmo.serve.openai.request import is_ids, model_of

EXAMPLE = 'send {"model": "ENDPOINT", "input": "..."}'
_MOST_INPUTS = 2048  # OpenAI's own
_MOST_DIMENSIONS = 1 << 16


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request as it was read; each input is a text or token ids."""

    model: str
    inputs: Sequence[str | Sequence[int]]
    base64: bool
    dimensions: int | None

    def answer(self, answers: bytes) -> bytes:
        """The body of the answer, from what the replica said; of many vectors it takes long, so a thread writes it.

        Raises InputError for dimensions that the model does not have.
        """
        found = json.loads(answers)
        tokens = sum(one["tokens"] for one in found)
        data = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, self._vector(one["embedding"]))
            for index, one in enumerate(found)
        )
        rest = {"model": self.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
        return b'{"object":"list","data":[%b],%b' % (data, json.dumps(rest)[1:].encode())

    def _vector(self, encoded: str) -> bytes:
        vector = base64.b64decode(encoded)
        width = len(vector) // 4
        if self.dimensions not in (None, width):
            raise invalid(
                f"the model's embeddings have {width} numbers, and a part of them means nothing",
                "dimensions",
                code="unsupported_value",
                hint="leave it out",
            )
        return to_json(encoded if self.base64 else struct.unpack(f"<{width}f", vector))


def parse(data: bytes) -> Wanted:
    """The request. Raises InputError that says what is wrong with it and where."""
    fields = read(data, EXAMPLE)
    model = model_of(fields)
    form = fields.get("encoding_format")
    if form not in (None, "float", "base64"):
        raise invalid("'encoding_format' is float or base64", "encoding_format", code="invalid_value")
    return Wanted(model, _inputs(fields), form == "base64", fields.integer("dimensions", 1, _MOST_DIMENSIONS))


def _inputs(fields: Fields) -> list[str | Sequence[int]]:
    """One text, a list of texts, one list of tokens, or a list of those."""
    value = fields.get("input")
    if isinstance(value, str) or is_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise invalid(
            "'input' is a string, or a list of strings or of tokens", "input", code="missing_required_parameter"
        )
    if len(value) > _MOST_INPUTS:
        raise invalid(f"'input' holds at most {_MOST_INPUTS}", "input", code="array_above_max_length")
    if all(isinstance(one, str) for one in value) or all(is_ids(one) for one in value):
        return value
    raise invalid("'input' is a string, or a list of strings or of tokens", "input", code="invalid_type")
