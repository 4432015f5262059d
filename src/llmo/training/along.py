"""What goes along with every step beside the optimiser: an average of the weights, and AdaLoRA's shares of rank.

Both are kept in checkpoints, so that a resumed run equals the unbroken one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmo.errors import SpecError
from llmo.specs import TrainSpec
from llmo.training.model import Built

Tensors = dict[str, torch.Tensor]


class Along:
    """Of one run of `total` steps over the trained weights `named`. Raises SpecError for a run that is too short."""

    def __init__(self, built: Built, spec: TrainSpec, named: Mapping[str, nn.Parameter], total: int) -> None:
        self._named = named
        self._average = None if spec.ema is None else Average(named, spec.ema)
        self._ranks = Ranks(built.model, total) if spec.method == "adalora" else None

    def before(self) -> None:
        """The gradients are there, the step is not taken yet."""
        if self._ranks is not None:
            self._ranks.regularise()

    def after(self, step: int) -> None:
        """Step number `step` (from 1) was taken; its gradients are still there."""
        if self._ranks is not None:
            self._ranks.allot(step)
        if self._average is not None:
            self._average.update(step)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """The weights as they are evaluated and saved."""
        if self._average is None:
            yield
            return
        with self._average.in_place():
            yield

    def finish(self, best: bool) -> None:
        """Training is over; `best` says that the weights are an earlier evaluation's already."""
        if self._average is not None and not best:
            self._average.settle()
        if self._ranks is not None:
            self._ranks.settle()

    def tensors(self) -> Tensors:
        """For the checkpoint."""
        found: Tensors = {}
        if self._average is not None:
            found |= {f"ema.{name}": tensor for name, tensor in self._average.values.items()}
        if self._ranks is not None:
            found |= {f"ranks.{name}": tensor for name, tensor in self._ranks.tensors().items()}
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._average is not None:
            for name, value in self._average.values.items():
                value.copy_(tensors[f"ema.{name}"])
        if self._ranks is not None:
            ours = {k.removeprefix("ranks."): v for k, v in tensors.items() if k.startswith("ranks.")}
            self._ranks.restore(ours)


class Average:
    """An exponential average of the weights (Polyak and Juditsky 1992), which forgets the first steps faster, so that a
    short run's average is not mostly what it began with."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        self._named, self._decay = named, decay
        self.values = {name: p.detach().clone() for name, p in named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        share = 1.0 - min(self._decay, (1.0 + step) / (10.0 + step))
        for name, p in self._named.items():
            self.values[name].lerp_(p, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        kept = {name: p.detach().clone() for name, p in self._named.items()}
        self.settle()
        try:
            yield
        finally:
            self._put(kept)

    def settle(self) -> None:
        self._put(self.values)

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, p in self._named.items():
            p.copy_(values[name])


class Ranks:
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) by peft: ranks are taken from modules where they matter least.

    A tenth of the steps warm up, a third at the end leave the ranks as they are.
    """

    def __init__(self, model: Any, total: int) -> None:
        self._tuner = model.base_model
        self._config = self._tuner.peft_config["default"]
        self._allocator = self._tuner.rankallocator
        if total < 3:
            raise SpecError(
                f"method adalora shares out ranks over a run, and this one has {total} step{'s' * (total != 1)}",
                hint="raise train.epochs, or set train.method to lora",
            )
        self._config.total_step = total
        self._config.tinit = max(1, total // 10)
        self._config.tfinal = max(1, min(total // 3, total - self._config.tinit - 1))
        self._config.deltaT = max(1, total // 100)

    def regularise(self) -> None:
        """Add the gradient of the penalty that keeps both sides of the updates orthogonal."""
        parts = []
        for name, p in self._tuner.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                square = p @ p.T if "lora_A" in name else p.T @ p
                parts.append(torch.linalg.norm(square - torch.eye(len(square), device=p.device)))
        penalty = self._config.orth_reg_weight * torch.stack(parts).mean()
        penalty.backward()

    def allot(self, step: int) -> None:
        self._tuner.update_and_allocate(step)

    def tensors(self) -> Tensors:
        found: Tensors = {f"pattern.{n}": torch.tensor(kept) for n, kept in (self._config.rank_pattern or {}).items()}
        for kind in ("exp_avg_ipt", "exp_avg_unc"):
            found |= {f"{kind}.{name}": tensor for name, tensor in getattr(self._allocator, kind).items()}
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        parts: dict[str, Tensors] = {"pattern": {}, "exp_avg_ipt": {}, "exp_avg_unc": {}}
        for full, tensor in tensors.items():
            kind, _, name = full.partition(".")
            parts[kind][name] = tensor.clone()
        device = next(self._tuner.parameters()).device
        for kind in ("exp_avg_ipt", "exp_avg_unc"):
            setattr(self._allocator, kind, {name: tensor.to(device) for name, tensor in parts[kind].items()})
        # The names of its last products are looked for in these, and the products made anew.
        self._allocator.ipt = dict(self._allocator.exp_avg_ipt)
        self._config.rank_pattern = {name: kept.tolist() for name, kept in parts["pattern"].items()} or None

    def settle(self) -> None:
        """The ranks as the weights have them: an average, or the weights of an earlier step, may have more."""
        self._config.rank_pattern = {
            name: (p != 0).view(-1).tolist() for name, p in self._tuner.model.named_parameters() if "lora_E" in name
        }
