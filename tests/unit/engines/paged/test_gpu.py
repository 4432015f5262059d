"""The GPU's kernels: right, the same bits for a row in any company, and tokens chosen as the sampler chooses them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmo.engines.generation import Sampling
from llmo.engines.place import index
from llmo.engines.sampling import LEAST_TEMPERATURE, Sampler
from support.places import ON_GPU

on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: LLMO_TEST_DEVICE=cuda")
ROWS = (1, 7, 16, 20, 32, 33, 64, 200, 256, 300, 512)
DRAWN = Sampling(temperature=1.3)
SAMPLINGS = [
    replace(DRAWN, temperature=0.0),
    DRAWN,
    replace(DRAWN, temperature=1e-5),
    replace(DRAWN, top_k=1),
    replace(DRAWN, top_k=40),
    replace(DRAWN, top_k=10**6),
    replace(DRAWN, top_p=0.9),
    replace(DRAWN, top_p=1e-6),
    replace(DRAWN, min_p=0.05),
    replace(DRAWN, min_p=1.0),
    replace(DRAWN, top_k=100, top_p=0.7, min_p=0.01),
]


@on_gpu
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    ("outs", "ins", "gated"),
    [
        (960, 576, False),
        (3072, 576, True),
        (576, 1536, False),
        (1536, 8960, False),
        (17920, 1536, True),
        (49, 48, False),
    ],
)
@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_row_of_a_product_has_the_same_bits_among_any_others(
    dtype: torch.dtype, int8: bool, outs: int, ins: int, gated: bool, prompt: bool
) -> None:
    from llmo.engines.paged.gpu.products import Matrix

    torch.manual_seed(0)
    matrix = Matrix.of(torch.randn(outs, ins, device="cuda"), torch.randn(outs, device="cuda"), dtype, int8=int8)
    x = torch.randn(max(ROWS), ins, device="cuda").to(dtype)
    wide = outs // 2 if gated else outs
    parts = 1 if gated else matrix.parts(prompt=prompt)
    found = []
    for rows in ROWS:
        out = torch.full((parts, max(ROWS), wide), torch.nan, device="cuda")
        matrix(x, out, rows, prompt=prompt, gated=gated, parts=parts)
        assert out[:, rows:].isnan().all()
        found.append(out[:, :rows].sum(0))
    weight = matrix.weight.double() * (1 if matrix.scale is None else matrix.scale.double()[:, None])
    assert matrix.bias is not None
    expected = x.double() @ weight.T + matrix.bias.double()
    if gated:
        expected = torch.nn.functional.silu(expected[:, :wide]) * expected[:, wide:]
    assert (found[-1] - expected).norm() / expected.norm() < 1e-4
    for rows, one in zip(ROWS, found, strict=True):
        assert torch.equal(one, found[-1][:rows]), rows


@on_gpu
@pytest.mark.parametrize("vocabulary", [259, 4096, 49_152])
def test_tokens_are_chosen_as_the_sampler_chooses_them(vocabulary: int) -> None:
    from llmo.engines.paged.gpu.decoder import choose

    rng = np.random.default_rng(0)
    logits, settings, expected = [], [], []
    for number, sampling in enumerate(SAMPLINGS * 8):
        row = rng.normal(0, 3, vocabulary).astype(np.float32)
        sampler = Sampler(replace(sampling, seed=number), ())
        warmth = max(sampling.temperature, LEAST_TEMPERATURE) if sampling.temperature else 0.0
        settings.append((warmth, sampling.top_k, sampling.top_p, sampling.min_p, sampler.uniform()))
        logits.append(row)
        expected.append(sampler.choose(row))
    tokens = torch.empty(len(logits), dtype=torch.int32, device="cuda")
    on = torch.tensor(np.stack(logits), device="cuda")
    choose(on, torch.tensor(settings, dtype=torch.float64, device="cuda"), tokens)
    assert tokens.tolist() == expected


@on_gpu
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_choose_nothing(value: float) -> None:
    from llmo.engines.paged.gpu.decoder import choose

    logits = torch.zeros(2, 5000, device="cuda")
    logits[0, :] = value if value == -np.inf else 0.0
    logits[0, 4999] = value
    logits[1, 7] = 1.0
    settings = torch.tensor([[0.0, 0, 1, 0, 0], [0.0, 0, 1, 0, 0]], dtype=torch.float64, device="cuda")
    tokens = torch.empty(2, dtype=torch.int32, device="cuda")
    choose(logits, settings, tokens)
    assert tokens.tolist() == [-1, 7]


@pytest.mark.parametrize(
    ("name", "visible", "expected"),
    [("cuda:0", None, 0), ("cuda:3", None, 3), ("cuda:3", "1,3", 1), ("cuda:2", "2", 0), ("cuda", "", 0)],
)
def test_torch_counts_only_the_gpus_that_it_may_see(name: str, visible: str | None, expected: int) -> None:
    assert index(name, visible) == expected
