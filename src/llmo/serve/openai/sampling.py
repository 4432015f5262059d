"""How tokens are chosen, read from the fields that chat and completions share."""

from __future__ import annotations

from llmo.engines.generation import Grammar, Sampling
from llmo.serve.openai.errors import invalid
from llmo.serve.openai.fields import Fields

MOST_TOKENS = (1 << 31) - 1
MOST_CHOICES = 8
_MOST_STOPS, _LONGEST_STOP = 16, 256
_SEEDS = 1 << 63


def sampling_of(fields: Fields, grammar: Grammar | None, logprobs: int | None) -> Sampling:
    """OpenAI's settings, and ours: `top_k`, `min_p` and `repetition_penalty`."""
    top_p = fields.number("top_p", 0.0, 1.0, 1.0)
    if top_p == 0.0:
        raise invalid("'top_p' is above 0", "top_p", code="decimal_below_min_value", hint="temperature 0 is greedy")
    penalty = fields.number("repetition_penalty", 0.0, 10.0, 1.0)
    if penalty == 0.0:
        raise invalid("'repetition_penalty' is above 0", "repetition_penalty", hint="1 switches it off")
    seed = fields.integer("seed", -_SEEDS, _SEEDS - 1)
    return Sampling(
        temperature=fields.number("temperature", 0.0, 2.0, 1.0),
        top_p=top_p,
        top_k=max(0, fields.integer("top_k", -1, 1 << 20) or 0),  # elsewhere -1 switches it off
        min_p=fields.number("min_p", 0.0, 1.0, 0.0),
        repetition_penalty=penalty,
        presence_penalty=fields.number("presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=fields.number("frequency_penalty", -2.0, 2.0, 0.0),
        seed=None if seed is None else seed % _SEEDS,
        logprobs=logprobs,
        grammar=grammar,
    )


def max_tokens_of(fields: Fields, *names: str) -> int | None:
    """The first of these fields that is there."""
    return next((n for name in names if (n := fields.integer(name, 1, MOST_TOKENS)) is not None), None)


def choices_of(fields: Fields) -> int:
    return fields.integer("n", 1, MOST_CHOICES) or 1


def stop_of(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else fields.items("stop", _MOST_STOPS)
    for stop in stops or []:
        if not isinstance(stop, str):
            raise invalid("'stop' is a string or a list of strings", "stop", code="invalid_type")
        if not 1 <= len(stop) <= _LONGEST_STOP:
            raise invalid(f"a stop string has 1 to {_LONGEST_STOP} characters", "stop", code="invalid_value")
    return tuple(stops or ())
