"""LoRA layers joined: the same losses and gradients as peft's own layers, step for step, and the same weights after."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmo.specs import LoraSpec, TrainSpec
from llmo.tasks.base import Task
from llmo.tasks.generation import Generation
from llmo.tasks.text_classification import TextClassification
from llmo.training import lowrank, model
from llmo.training.causal import Speaker
from llmo.training.precision import Precision

CPU = torch.device("cpu")
FP32, BF16 = (Precision(name, CPU, "as asked") for name in ("fp32", "bf16"))
LABELS = TextClassification(["a", "b", "c"], max_length=32)


def spec(**keys: Any) -> TrainSpec:
    return TrainSpec(method="lora", lora=LoraSpec(rank=4, alpha=6, **keys))


def opened(base: Path, task: Task, request: TrainSpec | None = None) -> model.Built:
    """The same every time, with an update that matters."""
    torch.manual_seed(0)
    built = model.build(base, task, request or spec())
    for name, p in built.trainable():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return built


def talking(base: Path) -> Generation:
    return Generation(max_length=64, **Generation.of_base(base))


def said(built: model.Built, precision: Precision, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    built.model.zero_grad()
    with precision.autocast():
        logits = built.model(input_ids=ids).logits
        loss = (logits.float() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    slopes = {name: p.grad.clone() for name, p in built.trainable() if p.grad is not None}
    return logits.detach().float(), slopes


def distance(slopes: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, as a share of their size."""
    assert slopes.keys() == exact.keys()
    off = sum(float((slopes[name] - exact[name]).norm() ** 2) for name in exact)
    return (off / sum(float(slope.norm() ** 2) for slope in exact.values())) ** 0.5


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_outputs_and_gradients_are_pefts(base: Path, talker: Path, kind: str) -> None:
    folder, task = (base, LABELS) if kind == "encoder" else (talker, talking(talker))
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    exact = said(opened(folder, task), FP32, ids)
    peft = said(opened(folder, task), BF16, ids)
    for precision, output, slope in ((FP32, 1e-5, 1e-5), (BF16, 0.05, 1.25 * distance(peft[1], exact[1]))):
        built = opened(folder, task)
        assert lowrank.join(built, precision)
        mine, slopes = said(built, precision, ids)
        assert (mine - exact[0]).norm() <= output * exact[0].norm()
        assert distance(slopes, exact[1]) <= slope
        assert {slope.dtype for slope in slopes.values()} == {torch.float32}
        with torch.no_grad(), precision.autocast():  # what one pass leaves behind is not taken for the next one's
            assert torch.allclose(built.model(input_ids=ids).logits.float(), mine, atol=1e-5)


def test_layers_that_read_the_same_are_one_product(talker: Path) -> None:
    built = opened(talker, talking(talker))
    joined = lowrank.join(built, FP32)
    assert len(built.adapted) == 14
    assert len(joined) == 2 * 4  # queries, keys and values; what they give; gate and up; down
    own = opened(talker, talking(talker), spec(target_modules=["q_proj", "v_proj", "down_proj"]))
    assert len(lowrank.join(own, FP32)) == 2 * 2


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_afterwards_all_is_as_peft_left_it(talker: Path, precision: Precision) -> None:
    task = talking(talker)
    before, built = opened(talker, task), opened(talker, task)
    joined = lowrank.join(built, precision)
    base = built.network.model.layers[0].mlp.up_proj.base_layer
    assert base.weight.dtype == (torch.bfloat16 if precision is BF16 else torch.float32)
    said(built, precision, torch.arange(8)[None])
    joined.undo()
    for (name, p), (_, other) in zip(built.model.named_parameters(), before.model.named_parameters(), strict=True):
        assert torch.equal(p, other), name
        assert p.is_contiguous()
    assert not any("forward" in vars(module) for module in built.model.modules() if "lora" in type(module).__module__)
    joined.undo()  # once more is no harm


def test_layers_with_dropout_are_left_to_peft(talker: Path) -> None:
    built = opened(talker, talking(talker), spec(dropout=0.5))
    assert len(lowrank.join(built, FP32)) == 0
    assert len(lowrank.join(model.build(talker, talking(talker), TrainSpec(method="full")), FP32)) == 0


def test_layers_that_are_run_again_on_the_way_back_have_the_same_gradients(talker: Path) -> None:
    ids = torch.randint(3, 250, (3, 20), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for again in (False, True):
        built = opened(talker, talking(talker))
        speaker = Speaker(built.network)
        lowrank.join(built, FP32)
        read: list[weakref.ref[torch.Tensor]] = []
        for name in built.adapted:
            layer = built.network.get_submodule(name)
            layer.register_forward_pre_hook(lambda _, given, read=read: read.append(weakref.ref(given[0])))
        if again:
            built.network.activation_checkpointing_enable({"use_reentrant": False})
        built.model.train()
        speaker.log_probs(inputs, ids).mean().backward()  # type: ignore[no-untyped-call]
        found.append([p.grad for _, p in built.trainable()])
        gc.collect()
        assert read
        assert not any(one() is not None for one in read)  # with it all that the layer keeps would stay
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_the_losses_of_each_step_are_those_of_a_plain_loop(talker: Path) -> None:
    """Packed, joined and projected where a token is learnt, against peft's model, padded rows and all logits."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 250, size).tolist() for size in (9, 30, 17, 12, 25, 40, 8, 21)]
    rows = [[*range(3, 15), *row] for row in rows]  # a beginning that all share
    task = talking(talker)
    losses: dict[str, list[float]] = {"ours": [], "plain": []}
    for way, found in losses.items():
        built = opened(talker, task)
        speaker = Speaker(built.network) if way == "ours" else None
        if speaker is not None:
            assert speaker.packs
            assert lowrank.join(built, FP32)
        optimiser = torch.optim.AdamW([p for _, p in built.trainable()], lr=1e-2)
        for step in range(6):
            batch = rows[:4] if step % 2 else rows[4:]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True)
            mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in batch], True)
            targets = torch.where((mask == 1) & (torch.arange(ids.shape[1]) >= 14), ids, -100)
            inputs = {"input_ids": ids, "attention_mask": mask}
            if speaker is not None:
                loss = -speaker.log_probs(inputs, targets).mean()
            else:
                logits = built.model(**inputs).logits[:, :-1].flatten(0, 1)
                loss = nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=-100)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            found.append(loss.item())
    assert losses["ours"] == pytest.approx(losses["plain"], abs=1e-4)
    assert losses["plain"][-1] < losses["plain"][0] - 0.5
