"""What a replica of an encoder is: its pipeline, and the test of each model on its own evidence before it answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from llmo import plugins
from llmo.engines.base import Engine, Shared
from llmo.engines.batcher import batcher_for
from llmo.errors import GateRefused, LLMOError, ModelError
from llmo.serve.pipeline import Call, Pipeline
from llmo.serve.session import EncoderSession as Session
from llmo.specs import adapter_bytes
from llmo.tasks.base import Task
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden
from llmo.types import Device

__all__ = ["Session", "check", "make"]

_LOSSY_AGREEMENT = 0.8  # a model of lower precision may answer a borderline text otherwise; a wrong one is near chance


class EncoderPipeline(Pipeline):
    """A model that is added is tested as the first one was, before anybody is told that it answers."""

    def load_adapter(self, folder: str) -> None:
        """Raises GateRefused for a model that does not repeat its golden answers on this trunk."""
        super().load_adapter(folder)
        try:
            self_test(self, load_task(Path(folder)), read_golden(Path(folder)), exact=True, adapter=folder)
        except BaseException:
            self._adapters.drop(folder)
            raise


def make(folder: Path, card: Mapping[str, Any], spec: Mapping[str, Any], device: Device) -> Pipeline:
    """The pipeline of the model in `folder`, not started yet."""
    engine: Engine = plugins.load("llmo.engines", card["engine"])()
    load = partial(engine.load, folder, device)
    if "adapters" in engine.abilities:
        load = partial(cast(Shared, engine).load, folder, device, adapter_bytes=adapter_bytes(spec, generates=False))

    def check_adapter(other: Path) -> None:
        if read_card(other)["tokenizer_sha256"] != card["tokenizer_sha256"]:
            raise ModelError(
                "its tokeniser is another one than that of the model that is served",
                where=str(other),
                hint="train it on what is served, or deploy it by itself",
            )

    return EncoderPipeline(
        load_task(folder),
        load_tokenizer(folder),
        engine,
        load,
        queue=spec["queue"],
        repeats=spec.get("repeats_mib", 0) << 20,
        batcher=batcher_for(engine, device, spec["max_batch_tokens"]),
        check_adapter=check_adapter,
    )


def check(pipeline: Pipeline, folder: Path, card: Mapping[str, Any]) -> str:
    """The self-test on what the model folder carries; one line on how it went. Raises GateRefused."""
    return self_test(pipeline, load_task(folder), read_golden(folder), exact=card["precision"] == "fp32")


def self_test(
    pipeline: Pipeline,
    task: Task,
    golden: Sequence[Mapping[str, Any]],
    *,
    exact: bool,
    adapter: str | None = None,
) -> str:
    """Ask for the golden texts as a client would; one line on how it went. Raises GateRefused.

    Token ids must be equal. Answers must agree: all of them for fp32, most of them for a lower precision.
    """
    answers: list[dict[str, Any]] = []
    step = min(16, pipeline.queue)
    for start in range(0, len(golden), step):
        answers += _ask(pipeline, [g["text"] for g in golden[start : start + step]], adapter)
    agreed = 0
    for said, expected in zip(answers, golden, strict=True):
        if said["input_ids"] != list(expected["input_ids"]):
            raise GateRefused(
                f"the text {str(expected['text'])[:60]!r} becomes other tokens than in training",
                hint="the tokeniser in the model folder is not the one of training: train the model again",
            )
        agreed += task.agree(
            np.asarray(said["logits"], dtype=np.float32), np.asarray(expected["logits"], dtype=np.float32)
        )
    needed = len(golden) if exact else _LOSSY_AGREEMENT * len(golden)
    if not golden or agreed < needed:
        raise GateRefused(
            f"the model repeats {agreed} of its {len(golden)} golden answers",
            hint="it is not what was trained: run `llmo verify` on it",
        )
    return f"self-test: {agreed} of {len(golden)} golden answers repeated"


def _ask(pipeline: Pipeline, texts: Sequence[str], adapter: str | None) -> list[dict[str, Any]]:
    heard = threading.Event()
    outcome: list[bytes | LLMOError] = []

    def done(what: bytes | LLMOError) -> None:
        outcome.append(what)
        heard.set()

    pipeline.submit(Call(texts, float("inf"), done, logits=True, adapter=adapter, test=True))
    heard.wait()
    if isinstance(outcome[0], LLMOError):
        raise outcome[0]
    answers: list[dict[str, Any]] = json.loads(outcome[0])
    return answers
