"""What a replica of a model that generates is: its pipeline, and the test on its own evidence before it is ready."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmo import plugins
from llmo.engines.generation import GenerationEngine, GenerationOptions, Sampling
from llmo.engines.width import choose
from llmo.errors import GateRefused, LLMOError, ModelError
from llmo.serve.ask import Ask, Input
from llmo.serve.calls import Call, Heard, Part, Usage
from llmo.serve.generation import GenerationPipeline
from llmo.serve.session import GenerationSession as Session
from llmo.specs import adapter_bytes
from llmo.tasks.card import load_task, load_tokenizer, read_golden
from llmo.types import Device

__all__ = ["Session", "check", "make"]

# As verification has it: a lower precision may choose otherwise at any token, after which all are others.
_LOSSY_FIRST = 4  # tokens that count as the beginning of an answer
_LOSSY_SAME = 0.5  # share of answers that must begin the same; a wrong model begins none so


def make(folder: Path, card: Mapping[str, Any], spec: Mapping[str, Any], device: Device) -> GenerationPipeline:
    """The pipeline of the model in `folder`, not started yet. Raises ModelError for a task without prompts."""
    task: Any = load_task(folder)
    if not hasattr(task, "prompt"):
        raise ModelError("the card's task makes no prompts, so its model cannot be served as one that generates")
    name = spec["engine"] or card["engine"]
    engine: GenerationEngine = plugins.load("llmo.generators", name)()
    measured = card.get("width", ()) if name == card["engine"] and device.kind == "cpu" else ()
    width = choose(measured, device.cores)
    device = device if spec["cores"] else replace(device, cores=width.threads)
    streams = spec["streams"] or width.streams
    options = GenerationOptions(
        streams=streams,
        cache_bytes=spec["cache_mib"] << 20,
        adapter_bytes=adapter_bytes(spec, generates=True),
        context=spec["context"],
        precision=card["precision"],
    )
    return GenerationPipeline(
        task,
        load_tokenizer(folder),
        engine,
        lambda: engine.load(folder, device, options),
        streams=streams,
        queue=spec["queue"],
        takes_tools="tools" in card["task"]["options"]["template"],
    )


def check(pipeline: GenerationPipeline, folder: Path, card: Mapping[str, Any]) -> str:
    """The self-test on what the model folder carries; one line on how it went. Raises GateRefused."""
    said = self_test(pipeline, read_golden(folder), exact=card["precision"] == "fp32")
    return f"{said}; at most {pipeline.stats()['streams_limit']} answers at once"


def self_test(pipeline: GenerationPipeline, golden: Sequence[Mapping[str, Any]], *, exact: bool) -> str:
    """Ask for the golden conversations as a client would; one line on how it went. Raises GateRefused.

    Prompts must become the same tokens. The greedy answers must be the same tokens too: all of them for fp32; for
    a lower precision, the first four of half of the answers.
    """
    most = None if exact else _LOSSY_FIRST
    agreed = 0
    for item in golden:
        prompt, written = _ask(pipeline, item)
        if prompt != list(item["input_ids"]):
            raise GateRefused(
                f"the conversation {str(item['text'])[:60]!r} becomes other tokens than in training",
                hint="the tokeniser or template in the model folder is not the one of training: train the model again",
            )
        agreed += written[:most] == list(item["greedy"])[:most]
    what = "golden answers" if exact else f"beginnings ({_LOSSY_FIRST} tokens) of golden answers"
    if not golden or agreed < (len(golden) if exact else _LOSSY_SAME * len(golden)):
        raise GateRefused(
            f"the model repeats {agreed} of its {len(golden)} {what}",
            hint="it is not what was trained: run `llmo verify` on it",
        )
    return f"self-test: {agreed} of {len(golden)} {what} repeated"


def _ask(pipeline: GenerationPipeline, item: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The prompt's tokens, and those of the greedy answer."""
    over = threading.Event()
    heard: list[Heard] = []

    def hear(what: Heard) -> None:
        heard.append(what)
        if isinstance(what, Usage | LLMOError):
            over.set()

    messages = item.get("messages")
    prompt = Input(ids=item["input_ids"]) if messages is None else Input(messages=messages, tools=item.get("tools"))
    ask = Ask([prompt], Sampling(temperature=0.0), max_tokens=max(1, len(item["greedy"])), token_ids=True)
    pipeline.submit(Call(ask, hear))
    over.wait()
    usage = heard[-1]
    if isinstance(usage, LLMOError):
        raise usage
    parts = [part for what in heard[:-1] if isinstance(what, Sequence) for part in what if isinstance(part, Part)]
    prompts = usage.prompt_ids if isinstance(usage, Usage) else None
    return list((prompts or [[]])[0]), list(parts[-1].token_ids or ())
