"""What tests of trained folders share: resumed runs, golden answers, verification, and a replica's own test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from llmo.context import NullContext, Stopped
from llmo.files import sha256_file
from llmo.serve import encoder
from llmo.specs import DeploySpec
from llmo.tasks.card import load_task, read_card, read_golden
from llmo.verify import operation as verify
from support.listening import Listening


def run_twice(run: Callable[[str, NullContext], object], folder: Path, stop_at: int) -> None:
    """Once in one go as `whole`, and once stopped and resumed as `resumed`: the same bytes."""
    run("whole", Listening(folder / "c1"))
    with pytest.raises(Stopped):
        run("stopped", Listening(folder / "c2", stop_at=stop_at))
    ctx = Listening(folder / "c2")
    run("resumed", ctx)
    assert any(f"step {stop_at}" in note for note in ctx.notes)
    names = [p.relative_to(folder / "whole") for p in (folder / "whole").rglob("*.safetensors")]
    for name in names:
        assert sha256_file(folder / "whole" / name) == sha256_file(folder / "resumed" / name), name
    configs = [p.read_text() for p in folder.glob("*/adapter/adapter_config.json") if p.parts[-3] != "stopped"]
    assert all(config == configs[0] for config in configs)


def golden_logits(folder: Path, opened: Any) -> float:
    """The largest difference between the training graph's logits and those of the opened model."""
    tokenizer, length = transformers.AutoTokenizer.from_pretrained(folder), load_task(folder).max_length
    worst = 0.0
    for row in read_golden(folder):
        given = tokenizer(row["text"], truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            said = opened.eval()(**given).logits[0]
        worst = max(worst, float((said - torch.tensor(row["logits"])).abs().max()))
    return worst


def plain(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def over_base(base: Path, folder: Path) -> Any:
    """The adapter in plain peft, over the base that it was trained on, whose head it brings along."""
    bare = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, problem_type="single_label_classification"
    )
    return PeftModel.from_pretrained(bare, folder / "adapter")


def verified(folder: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    return {c["name"]: c for c in verify.run({}, {"model": folder}, out, NullContext(1))["checks"]}


def replica(folder: Path) -> str:
    """What a replica says of its own test, which asks as a client does."""
    card = read_card(folder)
    pipeline = encoder.make(folder, card, DeploySpec(endpoint="e").plain(), NullContext(1).device)
    pipeline.start()
    try:
        return encoder.check(pipeline, folder, card)
    finally:
        pipeline.close()
