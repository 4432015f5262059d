"""Learning rates and parameter groups."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmo.methods import METHODS, OPTIMISERS
from llmo.specs import TrainSpec
from llmo.tasks.card import read_card
from llmo.training import optimiser
from llmo.training.lion import Lion
from support.trained import run_twice


def test_the_peak_is_the_methods_own_unless_written() -> None:
    assert optimiser.peak(TrainSpec(method="lora")) == METHODS["lora"].learning_rate
    assert optimiser.peak(TrainSpec(method="lora", learning_rate=3e-5)) == 3e-5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_to_the_peak(schedule: str) -> None:
    spec = TrainSpec(schedule=schedule, warmup=0.1, learning_rate=1.0)
    rates = [optimiser.rate(spec, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == 1.0
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[-1] == 1.0 if schedule == "constant" else rates[-1] < 0.02


def test_the_middle_of_each_schedule() -> None:
    def middle(schedule: str) -> float:
        return optimiser.rate(TrainSpec(schedule=schedule, warmup=0.0, learning_rate=2.0), 50, 100)

    assert (middle("linear"), middle("constant")) == (1.0, 2.0)
    assert middle("cosine") == pytest.approx(1.0)
    assert optimiser.rate(TrainSpec(schedule="cosine", warmup=0.0, learning_rate=2.0), 25, 100) > 1.5


@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
def test_one_step_has_a_rate(warmup: float) -> None:
    assert optimiser.rate(TrainSpec(warmup=warmup), 0, 1) > 0


@pytest.mark.parametrize("name", OPTIMISERS)
def test_weight_decay_spares_vectors(name: str) -> None:
    layer, norm = nn.Linear(3, 3), nn.LayerNorm(3)
    built = optimiser.build(
        [*layer.named_parameters(), *norm.named_parameters()], TrainSpec(optimizer=name, weight_decay=0.3)
    )
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert decay[id(layer.weight)] == 0.3
    assert {decay[id(p)] for p in (layer.bias, norm.weight, norm.bias)} == {0.0}


def test_fused_adamw_is_adamw() -> None:
    torch.manual_seed(0)
    ours, plain = nn.Linear(5, 2, bias=False), nn.Linear(5, 2, bias=False)
    plain.load_state_dict(ours.state_dict())
    spec = TrainSpec(learning_rate=0.01, weight_decay=0.1)
    a = optimiser.build(list(ours.named_parameters()), spec)
    b = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    for _ in range(5):
        x = torch.randn(4, 5)
        for model, optimizer in ((ours, a), (plain, b)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, plain.weight, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_every_optimiser_learns_and_goes_on(train: Any, texts: Path, tmp_path: Path, optimizer: str) -> None:
    rate = {"sgd": 0.03, "lion": 1e-3, "adafactor": 0.1}.get(optimizer, 5e-3)
    keys = {"optimizer": optimizer, "learning_rate": rate, "epochs": 3, "precision": "fp32"}
    run_twice(lambda out, ctx: train(texts, out, ctx=ctx, **keys), tmp_path, 7)
    losses = [entry["loss"] for entry in read_card(tmp_path / "whole")["history"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_decay_is_decoupled_or_l2_as_the_table_says(name: str) -> None:
    """Without a gradient of its own a weight shrinks by `rate * decay` where decay is decoupled; where it is L2 and the
    step does not depend on its size, by the rate."""
    layer = nn.Linear(4, 4, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    layer.weight.grad = torch.zeros_like(layer.weight)
    spec = TrainSpec(optimizer=name, weight_decay=0.1, learning_rate=0.01)
    optimiser.build(list(layer.named_parameters()), spec).step()
    moved = 0.5 - layer.weight.mean().item()
    decoupled = 0.5 * 0.01 * 0.1
    if OPTIMISERS[name].decoupled or name == "sgd":  # whose first L2 step is the same
        assert moved == pytest.approx(decoupled, rel=1e-3)
    else:
        assert moved > 5 * decoupled


def test_lion_is_the_papers() -> None:
    """Algorithm 2 of arXiv:2302.06675, two steps by hand."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    lion = Lion([{"params": [weight]}], lr=0.1, weight_decay=0.5)
    momentum, expected = torch.zeros(1, 2), weight.detach().clone()
    for gradient in (torch.tensor([[0.3, -0.2]]), torch.tensor([[-5.0, 0.001]])):
        weight.grad = gradient.clone()
        lion.step()
        expected = expected - 0.1 * ((0.9 * momentum + 0.1 * gradient).sign() + 0.5 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
        assert torch.allclose(weight, expected)
