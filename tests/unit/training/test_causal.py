"""The projection where tokens are learnt, and what a batch begins with run once: the same numbers, less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmo.errors import ModelError
from llmo.specs import TrainSpec
from llmo.tasks.generation import Generation
from llmo.training import causal
from llmo.training.causal import Speaker
from llmo.training.model import Built, build
from support.tiny_chat import tiny_chat_model


def opened(talker: Path, method: str) -> Built:
    built = build(talker, Generation(max_length=64, **Generation.of_base(talker)), TrainSpec(method=method))
    for name, p in built.trainable():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return built


def batch(common: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[:, :common] = ids[0, :common]
    mask = (torch.arange(40)[None] < torch.tensor([[40], [33], [25]])).long()
    learnt = (torch.arange(40)[None] % 3 != 0) & (torch.arange(40)[None] > common) & (mask == 1)
    return {"input_ids": ids, "attention_mask": mask}, torch.where(learnt, ids, -100)


def step(built: Built, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    built.model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {n: p.grad.clone() for n, p in built.trainable() if p.grad is not None}


def alike(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.allclose(gradient, other[1][name], atol=1e-5, rtol=1e-3), name


@pytest.mark.parametrize("method", ["full", "lora", "last-n"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_projected_loss_and_its_gradients_are_those_of_all_logits(
    talker: Path, monkeypatch: pytest.MonkeyPatch, method: str, smoothing: float
) -> None:
    monkeypatch.setattr(causal, "CHUNK_BYTES", 0)  # 16 positions at a time
    built, (inputs, targets) = opened(talker, method), batch()
    logits = built.model(**inputs).logits[:, :-1].flatten(0, 1)
    wanted = targets[:, 1:].flatten()
    whole = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, label_smoothing=smoothing)
    ours = -Speaker(built.network).log_probs(inputs, targets, smoothing).mean()
    alike(step(built, ours), step(built, whole))


@pytest.mark.parametrize("method", ["full", "lora", "last-n"])
@pytest.mark.parametrize("common", [0, 12])
def test_packed_rows_have_no_padding_and_the_same_loss_and_gradients(
    talker: Path, monkeypatch: pytest.MonkeyPatch, method: str, common: int
) -> None:
    built, (inputs, targets) = opened(talker, method), batch(common)
    seen: list[tuple[int, ...]] = []
    built.network.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    speaker = Speaker(built.network)
    assert speaker.packs
    seen.clear()
    packed = step(built, -speaker.log_probs(inputs, targets).mean())
    judged = speaker.judge(inputs, targets)
    assert seen == 2 * [(1, 40 + 33 + 25 - 2 * common)]
    speaker.packs = False
    monkeypatch.setattr(causal, "WORTH_SHARING", 100)
    alike(packed, step(built, -speaker.log_probs(inputs, targets).mean()))
    assert seen[2:] == [(3, 40)]
    assert torch.allclose(judged, speaker.judge(inputs, targets), atol=1e-5)


SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99},
    **{"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
}


@pytest.mark.parametrize(
    ("family", "packs"),
    [("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True), ("gemma", True), ("gemma2", False),
     ("gpt_oss", False), ("mamba", False)],
)  # fmt: skip
def test_an_architecture_packs_when_it_says_the_same_so(family: str, packs: bool) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **({"num_local_experts": 4} if family == "gpt_oss" else {}))
    network = AutoModelForCausalLM.from_config(config).eval()
    before = network.config._attn_implementation
    speaker = Speaker(network)
    assert speaker.packs == packs
    if not packs:
        assert speaker.why == f"the architecture '{family}' is not proved to take packed rows"
        assert network.config._attn_implementation == before
        return
    ids = torch.randint(3, 99, (3, 30))
    mask = (torch.arange(30)[None] < torch.tensor([[30], [11], [22]])).long()
    inputs, targets = {"input_ids": ids, "attention_mask": mask}, torch.where(mask == 1, ids, -100)
    found = speaker.judge(inputs, targets)
    speaker.packs = False
    assert torch.allclose(found, speaker.judge(inputs, targets), atol=1e-5)


def test_no_row_sees_another(talker: Path) -> None:
    built, (inputs, targets) = opened(talker, "lora"), batch(common=12)
    speaker = Speaker(built.network)
    before = speaker.judge(inputs, targets)
    last = int((targets[2, 1:] != -100).sum())
    inputs["input_ids"][:2, 20:] = 7
    assert torch.equal(speaker.judge(inputs, targets)[-last:], before[-last:])


@pytest.mark.parametrize("config", [{"attention_dropout": 0.1}, {"sliding_window": 8}])
def test_what_packed_rows_do_not_have_is_done_row_by_row(tmp_path: Path, config: dict[str, Any]) -> None:
    kind = {} if "attention_dropout" in config else {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    talker = tiny_chat_model(tmp_path / "base", **kind, **config)
    built, (inputs, targets) = opened(talker, "lora"), batch()
    speaker = Speaker(built.network)
    found = speaker.judge(inputs, targets)[:, 0]
    logits = built.network(**inputs).logits[:, :-1].log_softmax(-1)
    wanted = targets[:, 1:]
    expected = logits.gather(-1, wanted.clamp(min=0)[..., None])[..., 0][wanted != -100]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_common_beginning_is_run_once_with_the_same_loss_and_gradients(
    talker: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    built, (inputs, targets) = opened(talker, method), batch(common=12)
    seen: list[tuple[int, ...]] = []
    built.network.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    speaker = Speaker(built.network)
    speaker.packs = False
    seen.clear()
    shared = step(built, -speaker.log_probs(inputs, targets).mean())
    assert seen == [(1, 12), (3, 28)]
    monkeypatch.setattr(causal, "WORTH_SHARING", 100)
    alike(shared, step(built, -speaker.log_probs(inputs, targets).mean()))
    assert seen[2:] == [(3, 40)]
    monkeypatch.undo()
    judged = speaker.judge(inputs, targets)
    assert -judged[:, 0].mean().item() == pytest.approx(shared[0], rel=1e-5)


def test_nothing_learnt_gives_nothing(talker: Path) -> None:
    built, (inputs, targets) = opened(talker, "lora"), batch()
    none = torch.full_like(targets, -100)
    speaker = Speaker(built.network)
    assert speaker.log_probs(inputs, none).shape == (0,)
    assert speaker.judge(inputs, none).shape == (0, 2)


def test_logits_made_in_an_unknown_way_are_refused(talker: Path) -> None:
    network = opened(talker, "full").network
    plain = network.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        said = plain(*args, **kwargs)
        said.logits = said.logits * 2
        return said

    network.forward = doubled
    with pytest.raises(ModelError, match="makes its logits in a way"):
        Speaker(network)
    network.config.logit_scale = 2.0
    assert Speaker(network).vocabulary == 259
