"""The optimiser Lion: the sign of a blend of gradient and momentum (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BETAS = (0.9, 0.99)


class Lion(torch.optim.Optimizer):
    """Every weight moves by the learning rate, so a tenth of AdamW's is about right. Weight decay is decoupled."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                momentum = state["exp_avg"]
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(momentum.lerp(p.grad, 1.0 - BETAS[0]).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 1.0 - BETAS[1])
