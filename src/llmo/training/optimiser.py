"""The optimiser over the trained weights, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from llmo.methods import METHODS, OPTIMISERS, PREFERENCE
from llmo.specs import TrainSpec
from llmo.training.lion import Lion


def peak(spec: TrainSpec) -> float:
    """The peak learning rate: as written, else the method's own, for preferences a tenth of it."""
    if spec.learning_rate is not None:
        return spec.learning_rate
    usual = METHODS[spec.method].learning_rate * OPTIMISERS[spec.optimizer].factor
    return usual * (PREFERENCE if spec.objective == "preference" else 1.0)


def build(named: list[tuple[str, nn.Parameter]], spec: TrainSpec) -> torch.optim.Optimizer:
    """The optimiser that `spec` names; weight decay on matrices only (vectors are biases and norms), decoupled or L2 as
    `methods.OPTIMISERS` says."""
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    top = peak(spec)
    match spec.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=top, momentum=spec.momentum, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=top, fused=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=top)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=top)
        case "lion":
            return Lion(groups, lr=top)
    return torch.optim.AdamW(groups, lr=top, fused=True)


def rate(spec: TrainSpec, step: int, total: int) -> float:
    """The learning rate of step `step` (from 0) of `total`: a linear warm-up, then the schedule down to 0."""
    warm = round(spec.warmup * total)
    top = peak(spec)
    if step < warm:
        return top * (step + 1) / warm
    if spec.schedule == "constant":
        return top
    left = (total - step) / max(1, total - warm)
    return top * left if spec.schedule == "linear" else top * 0.5 * (1.0 - math.cos(math.pi * left))
