"""Rows of sequences end to end: few sizes, every learnt token at its place, and on a GPU what each says alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmo.context import NullContext
from llmo.specs import LoraSpec, TrainSpec
from llmo.tasks.generation import Generation
from llmo.training import batches, lowrank, varlen
from llmo.training.causal import Speaker
from llmo.training.loop import Loop
from llmo.training.model import build
from llmo.training.objectives import Likelihood, VarlenLikelihood
from llmo.training.precision import Precision
from support.places import ON_GPU, place

on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: LLMO_TEST_DEVICE=cuda")
LENGTHS = (5, 70, 9, 33, 21, 64)


def drawn(seed: int = 0) -> batches.Encoded:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 250, length).astype(np.int32) for length in LENGTHS]
    targets = [np.where(rng.random(len(one)) < 0.4, one, -100).astype(np.int64) for one in ids]
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    return batches.Encoded(np.concatenate(ids), starts, list(targets), 0, 128)


def test_a_row_has_every_token_once_and_the_places_before_the_learnt_ones() -> None:
    data = drawn()
    picked = [4, 0, 2]
    inputs, targets = varlen.rows([data.sequence(i) for i in picked], [data.targets[i] for i in picked], 0)
    starts = inputs["starts"].tolist()
    assert starts == [0, 21, 26, 35, 64]
    assert len(inputs["longest"]) == 32
    for first, i in zip(starts, picked, strict=False):
        there = slice(first, first + len(data.sequence(i)))
        assert inputs["input_ids"][0, there].tolist() == data.sequence(i).tolist()
        assert inputs["position_ids"][0, there].tolist() == list(range(len(data.sequence(i))))
    meant = targets != -100
    assert meant.sum() == sum(int((data.targets[i][1:] != -100).sum()) for i in picked)
    after = inputs["input_ids"][0][inputs["places"] + 1]
    assert after[meant].tolist() == targets[meant].tolist()
    assert not set(inputs["places"][meant].tolist()) & {start - 1 for start in starts}


def test_what_the_attention_does_not_do_is_refused() -> None:
    given = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    bounds = varlen.Bounds(torch.tensor([0, 5, 8], dtype=torch.int32), 8)
    with pytest.raises(NotImplementedError, match="with softcap, dropout"):
        varlen.attention(torch.nn.Module(), *given, None, bounds=bounds, softcap=30.0, dropout=0.1)


@on_gpu
@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_and_gradients_are_those_of_padded_rows(talker: Path, method: str) -> None:
    data, rows = drawn(), np.arange(len(LENGTHS))
    spec = TrainSpec(method=method, lora=LoraSpec(rank=4, alpha=8))
    task = Generation(max_length=128, **Generation.of_base(talker))
    how = Precision("bf16", torch.device("cuda:0"), "as asked")
    found = []
    for kind in (Likelihood, VarlenLikelihood):
        torch.manual_seed(0)
        built = build(talker, task, spec, on_cpu=False)
        for name, p in built.trainable():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        built.model.to(how.device)
        speaker = Speaker(built.network)
        assert speaker.flow() or kind is Likelihood
        joined = lowrank.join(built, how)
        assert bool(joined) == (method == "lora")
        ctx = NullContext(1)
        ctx.device = place()
        loop = Loop(built, task, kind(speaker, task, data, spec, 0), spec, data, None, ctx, how)
        assert (loop.recorder is not None) == (kind is VarlenLikelihood)
        loss = loop.backward(rows).item()
        slopes = {name: p.grad.float().cpu() for name, p in built.trainable() if p.grad is not None}
        assert loop.recorder is None or (len(loop.recorder), loop.recorder.refused) == (1, None)
        found.append((loss, slopes))
    (padded, exact), (flowing, slopes) = found
    assert flowing == pytest.approx(padded, rel=0.01)
    assert slopes.keys() == exact.keys()
    off = sum(float((slopes[name] - exact[name]).norm() ** 2) for name in exact)
    assert (off / sum(float(one.norm() ** 2) for one in exact.values())) ** 0.5 < 0.05
