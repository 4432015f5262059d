"""RMSNorm by its own gradient against transformers' chain, and left alone where it is another norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmo.training.norms import Norm, replace_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_output_and_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = LlamaRMSNorm(24, eps=1e-5)
    nn.init.normal_(module.weight)
    x = torch.randn(2, 3, 24).to(dtype).requires_grad_()
    slope = torch.randn(2, 3, 24)
    found = []
    for forward in (module.forward, Norm(module, 1e-5)):
        said = forward(x)
        found.append((said.detach(), *torch.autograd.grad(said, (x, module.weight), slope)))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one.float(), other.float(), atol=1e-5 if dtype == torch.float32 else 5e-2)


class Gated(LlamaRMSNorm):
    """As some state-space models have it: plain where no gate is given."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        said: torch.Tensor = super().forward(hidden_states)
        return said if gate is None else said * nn.functional.silu(gate)


def test_a_norm_that_may_be_given_more_is_left_alone() -> None:
    module = Gated(8)
    assert replace_norms(nn.ModuleList([module])) == 0
    assert module(torch.ones(2, 8), torch.zeros(2, 8)).abs().max() == 0


def test_only_this_norm_is_replaced() -> None:
    plain, shifted = LlamaRMSNorm(8), GemmaRMSNorm(8)
    shifted.variance_epsilon = shifted.eps  # as if it were called the same
    nn.init.constant_(shifted.weight, 0.5)
    model = nn.ModuleList([plain, shifted, nn.LayerNorm(8), nn.Linear(8, 8)])
    assert replace_norms(model) == 1
    assert isinstance(plain.forward, Norm)
    assert "forward" not in vars(shifted)
    assert {name for name, _ in model.named_parameters()} >= {"0.weight", "1.weight"}
