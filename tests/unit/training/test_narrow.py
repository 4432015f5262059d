"""Base weights in 8 and 4 bits: what a layer computes with, and training over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmo import plugins
from llmo.specs import TrainSpec
from llmo.training import narrow
from llmo.training.model import build
from support.tiny import chat_rows
from support.trained import golden_logits, plain, run_twice, verified

QUICK: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, "precision": "fp32"}
CLOSE = 1e-4


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "bottleneck"])
def test_narrow_base_weights(train: Any, texts: Path, tmp_path: Path, method: str, bits: str) -> None:
    run_twice(lambda out, ctx: train(texts, out, ctx=ctx, method=method, base_weights=bits, **QUICK), tmp_path, 7)
    assert all(check["passed"] for check in verified(tmp_path / "whole", tmp_path / "v").values())
    if method == "lora":
        assert golden_logits(tmp_path / "whole", plain(tmp_path / "whole")) < CLOSE


@pytest.mark.parametrize(("bits", "error", "bytes_each"), [("int8", 0.005, 1.0), ("int4", 0.1, 0.5)])
def test_a_narrow_layer_computes_with_what_it_says(bits: str, error: float, bytes_each: float) -> None:
    torch.manual_seed(0)
    wide = nn.Linear(96, 40)
    layer = narrow.NarrowLinear(wide, 8 if bits == "int8" else 4)
    x = torch.randn(7, 96, requires_grad=True)
    again = layer.plain()
    assert torch.allclose(layer(x), again(x), atol=1e-6)
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (layer, again))
    assert torch.allclose(mine, theirs, atol=1e-4)
    with torch.no_grad():
        assert float((again.weight - wide.weight).norm() / wide.weight.norm()) < error
    assert layer.weight.nbytes == bytes_each * wide.weight.numel()


def test_a_projection_that_shares_its_weights_stays_wide(talker: Path) -> None:
    task = plugins.load("llmo.tasks", "generation")
    made = task.from_rows(chat_rows(4), max_length=64, options=task.of_base(talker))
    built = build(talker, made, TrainSpec(method="lora", base_weights="int4"))
    held = [name for name, module in built.network.named_modules() if isinstance(module, narrow.NarrowLinear)]
    assert len(held) == len(built.adapted) == 14
    assert type(built.network.get_output_embeddings()) is nn.Linear
    assert built.network.get_output_embeddings().weight is built.network.get_input_embeddings().weight
