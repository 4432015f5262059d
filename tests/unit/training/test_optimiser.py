"""Learning rates and parameter groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from llmo.methods import METHODS, OPTIMISERS
from llmo.specs import TrainSpec
from llmo.training import optimiser


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


@pytest.mark.parametrize("name", ["adamw", "sgd"])
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
