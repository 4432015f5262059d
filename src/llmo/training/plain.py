"""The operation `plain`: an untouched base model gets the card and the evidence that serving and compressing need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmo.context import Context
from llmo.engines.folder import position_limit
from llmo.errors import ModelError
from llmo.specs import TaskSpec, TrainSpec
from llmo.tasks.base import Row
from llmo.tasks.card import load_tokenizer, write_card, write_golden
from llmo.tasks.generation import Generation
from llmo.training import folder, golden, lineage, precision
from llmo.training.architecture import check_config, writes_text
from llmo.training.failures import memory_errors
from llmo.training.model import Built, build

# What a model of any language may be asked; what it says to them is the evidence that it is served as it is.
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in one sentence why the sky is blue.",
    "def fibonacci(n):",
    "Translate into German: Good morning, how are you?",
    "一年有几个月？",
    "What is 17 plus 25?",
    "Name three things that one can do on a rainy day.",
)


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`inputs` is the base `model`, as `base-model` stored it; nothing of its weights is changed, but they become fp32.

    Returns `{"model_type", "parameters", "max_length"}`. Raises ModelError for one that does not write text, and for
    what cannot be opened.
    """
    base = inputs["model"]
    config = check_config(base)
    if not writes_text(config):
        raise ModelError(
            f"the base model is a {config['architectures'][0]}, which writes no text, so it gives no answers before it "
            "is trained",
            hint="train it: llmo train",
            where=str(base),
        )
    torch.set_num_threads(max(1, ctx.device.cores))
    chosen = precision.choose("fp32", ctx.device)
    length = TaskSpec(name=Generation.name).max_length
    task = Generation((), min(length, position_limit(config) or length), **Generation.of_base(base))
    with memory_errors():
        ctx.report(0, 2, phase="open the model")
        built = build(base, task, TrainSpec(), on_cpu=chosen.device.type == "cpu")
        built.model.to(chosen.device)
        ctx.report(1, 2, phase="take its evidence")
        write_golden(out, golden.evidence(task, load_tokenizer(base), _rows(), built, chosen))
        folder.write(out, built, base, task)
    write_card(out, _card(task, built, base))
    if task.template.is_default:
        ctx.note("the base model has no chat template: turns are written as `User:` and `Assistant:`")
    ctx.report(2, 2, phase="done")
    return {"model_type": config["model_type"], "parameters": built.parameters, "max_length": task.max_length}


def _rows() -> list[Row]:
    """The questions as rows of a data set; what stands in place of the answer is not looked at."""
    return [
        {
            "id": str(number),
            "text": question,
            "messages": json.dumps([{"role": "user", "content": question}, {"role": "assistant", "content": ""}]),
        }
        for number, question in enumerate(QUESTIONS)
    ]


def _card(task: Generation, built: Built, base: Path) -> dict[str, Any]:
    return {
        "task": task.to_card(),
        "engine": "torch",
        "precision": "fp32",
        "origin": "an untouched base model",
        "base": lineage.base_of(base),
        "method": "none",
        "parameters": built.parameters,
        "trained_parameters": 0,
        "versions": lineage.versions(),
        "code": lineage.code_digest(),
        "template_sha256": task.template.sha256,
    }
