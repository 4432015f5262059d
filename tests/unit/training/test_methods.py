"""Every method: learns, is saved so that plain transformers and peft say the same, goes on, merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llmo import methods, plugins
from llmo.compression.export import export
from llmo.context import NullContext
from llmo.engines.applied import MeanHead
from llmo.engines.applied.base import write
from llmo.engines.base import Request
from llmo.engines.generation import GenerationOptions
from llmo.engines.onnx import OnnxEngine
from llmo.engines.paged.engine import PagedEngine
from llmo.engines.torch import TorchEngine, open_model
from llmo.errors import GateRefused, ModelError, SpecError
from llmo.specs import LoraSpec, TrainSpec
from llmo.tasks.card import read_card, read_golden
from llmo.tasks.text_classification import TextClassification
from llmo.training import operation
from llmo.training.causal import Speaker
from llmo.training.model import build
from support.tiny import chat_rows
from support.trained import golden_logits, over_base, plain, replica, run_twice, verified

# peft asks transformers in a way that is going out of use.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # those that it wrote itself
]
MERGED = [name for name, method in methods.METHODS.items() if method.merges]
BESIDE = ["prefix", "prompt", "bottleneck"]
SHOTS = ["few-shot", "zero-shot"]
CLOSE = 1e-4
# A rate at which a few steps move a random model.
QUICK: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, "precision": "fp32"}
LABELS = TextClassification(["a", "b", "c"], 32)


def test_the_table_is_what_the_specification_takes() -> None:
    assert list(methods.METHODS) == list(get_args(methods.MethodName))
    assert list(methods.OPTIMISERS) == list(get_args(methods.OptimiserName))


@pytest.mark.parametrize("method", [*MERGED, *BESIDE, "few-shot"])
def test_every_method_trains_goes_on_and_opens_elsewhere(
    train: Any, texts: Path, base: Path, tmp_path: Path, method: str
) -> None:
    run_twice(lambda out, ctx: train(texts, out, ctx=ctx, method=method, **QUICK), tmp_path, 7)
    folder = tmp_path / "whole"
    card = read_card(folder)
    assert card["method"] == method
    assert card["trained_parameters"] > 0
    if method in MERGED:
        assert golden_logits(folder, plain(folder)) < CLOSE
        assert golden_logits(folder, over_base(base, folder)) < CLOSE
    else:
        assert card["applied"] == ("mean-head" if method == "few-shot" else method)
        assert golden_logits(folder, plain(folder)) > CLOSE
    if method in ("prefix", "prompt"):
        assert golden_logits(folder, PeftModel.from_pretrained(plain(folder), folder / "adapter")) < CLOSE
    assert golden_logits(folder, open_model(folder)) < CLOSE
    checks = verified(folder, tmp_path / "v")
    assert all(check["passed"] for check in checks.values())
    assert ("adapter effect" in checks) == (method != "dora")
    assert ("adapter modules" in checks) == (method in MERGED)
    assert "16 of 16" in replica(folder)


@pytest.mark.parametrize("method", [*MERGED, *BESIDE])
def test_a_model_that_writes_too(chats: Path, talker: Path, tmp_path: Path, method: str) -> None:
    def run(out: str, ctx: NullContext) -> None:
        (tmp_path / out).mkdir()
        spec = TrainSpec(method=method, epochs=1, learning_rate=5e-3, precision="fp32").plain()
        spec |= {"task": {"name": "generation", "max_length": 64}}
        operation.run(spec, {"data": chats, "model": talker}, tmp_path / out, ctx)

    run_twice(run, tmp_path, 2)
    folder = tmp_path / "whole"
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if method in ("prefix", "prompt"):
        opened = PeftModel.from_pretrained(opened, folder / "adapter")
    elif method == "bottleneck":
        opened = open_model(folder)
    for row in read_golden(folder):
        ids = torch.tensor([[*row["input_ids"], *row["greedy"]]])
        with torch.no_grad():
            logits = opened(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] : -1]
        found = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert float((found - torch.tensor(row["logprobs"])).abs().max()) < CLOSE
    if method in MERGED:
        assert all(check["passed"] for check in verified(folder, tmp_path / "v").values())
    else:
        with pytest.raises(ModelError, match=f"runs with a {method} beside its weights"):
            PagedEngine().load(folder, NullContext(1).device, GenerationOptions())


def test_a_written_answer_is_the_same_with_virtual_tokens(chats: Path, talker: Path, tmp_path: Path) -> None:
    """transformers' own `generate` over what `open_model` attached, against the training graph's greedy answers."""
    for method in ("prefix", "prompt"):
        out = tmp_path / method
        out.mkdir()
        spec = TrainSpec(method=method, epochs=1, learning_rate=5e-2).plain()
        spec |= {"task": {"name": "generation", "max_length": 64}}
        operation.run(spec, {"data": chats, "model": talker}, out, NullContext(1, tmp_path / f"{method}-c"))
        opened = open_model(out)
        for row in read_golden(out)[:3]:
            ids = torch.tensor([row["input_ids"]])
            said = opened.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
            assert said[0, ids.shape[1] :].tolist()[: len(row["greedy"])] == row["greedy"]


@pytest.mark.parametrize("method", [*MERGED, *BESIDE])
def test_the_words_of_a_text_too(train: Any, spans: Path, tmp_path: Path, method: str) -> None:
    train(spans, task="token-classification", method=method, **QUICK)
    assert all(check["passed"] for check in verified(tmp_path / "out", tmp_path / "v").values())
    if method in ("prefix", "prompt"):
        folder = tmp_path / "out"
        bare = transformers.AutoModelForTokenClassification.from_pretrained(folder)
        opened = PeftModel.from_pretrained(bare, folder / "adapter").eval()
        for row in read_golden(folder)[:4]:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                said = opened(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
            assert float((said - torch.tensor(row["logits"])).abs().max()) < CLOSE


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_what_lies_beside_the_weights_goes_into_an_exported_graph(
    train: Any, texts: Path, tmp_path: Path, method: str
) -> None:
    train(texts, method=method, **{**QUICK, "epochs": 0.5})
    folder = tmp_path / "out"
    export(folder, folder / "model.onnx")
    requests = [Request(i, list(range(5, 5 + n))) for i, n in enumerate((3, 17, 40))]
    engines = TorchEngine(), OnnxEngine()
    said = []
    for engine in engines:
        engine.load(folder, NullContext(1).device)
        said.append([{c.id: c.data for c in ask(requests)} for ask in (engine.run, engine.embed)])
        engine.close()
    for ours, theirs in zip(*said, strict=True):
        assert all(np.abs(ours[i] - theirs[i]).max() < CLOSE for i in ours)
    assert {len(data) for data in said[0][1].values()} == {32}


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_what_a_batch_begins_with_is_run_once_with_virtual_tokens_too(talker: Path, method: str) -> None:
    task = plugins.load("llmo.tasks", "generation")
    made = task.from_rows(chat_rows(4), max_length=64, options=task.of_base(talker))
    built = build(talker, made, TrainSpec(method=method))
    speaker = Speaker(built.network)
    ids = torch.randint(3, 200, (3, 24))
    ids[:, :10] = ids[0, :10]
    targets = ids.masked_fill(torch.arange(24) < 12, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert speaker._shares
    shared = speaker.judge(inputs, targets)
    speaker._shares = False
    assert torch.allclose(shared, speaker.judge(inputs, targets), atol=1e-4)


@pytest.mark.parametrize("method", ["adalora", "dora", "ia3", "prefix", "bottleneck"])
def test_early_stopping_smoothing_and_class_weights_hold(train: Any, texts: Path, tmp_path: Path, method: str) -> None:
    result = train(
        texts, method=method, epochs=12, learning_rate=2e-2, early_stopping=2, evaluate_every=3, schedule="constant",
        label_smoothing=0.1, class_weights="balanced", precision="fp32", ema=0.5, dropout=0.1,
    )  # fmt: skip
    assert result["dev"]["accuracy"]["value"] == pytest.approx(max(e["dev_accuracy"] for e in result["history"]))
    assert all(check["passed"] for check in verified(tmp_path / "out", tmp_path / "v").values())


REFUSED: list[tuple[dict[str, Any], type[Exception], str, str]] = [
    ({"method": "lora", "lora": LoraSpec(rank=32)}, SpecError, "rank 32 is no smaller", "below 32"),
    ({"method": "adalora", "lora": LoraSpec(rank=40)}, SpecError, "rank 40", "train.lora.rank"),
    ({"method": "prefix", "virtual_tokens": 97}, SpecError, "more than the 128 tokens", "to 31 or less"),
    ({"method": "prompt", "virtual_tokens": 200}, SpecError, "200 virtual tokens", "virtual_tokens lower"),
    (
        {"method": "prefix", "activation_checkpointing": True},
        SpecError,
        "leaves out what comes before",
        "prompt or lora",
    ),
    ({"method": "ia3", "lora": LoraSpec(target_modules=["q"])}, SpecError, "no linear layer is called q", "query"),
    ({"method": "full", "base_weights": "int8"}, SpecError, "full does not train so", "lora, rslora"),
    ({"method": "dora", "base_weights": "int4"}, SpecError, "dora measures them", "rslora"),
]


@pytest.mark.parametrize(("keys", "error", "says", "hint"), REFUSED)
def test_what_a_model_cannot_take_is_refused(
    base: Path, keys: dict[str, Any], error: type[Exception], says: str, hint: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        build(base, LABELS, TrainSpec(**keys))
    assert hint in raised.value.hint


def test_a_base_that_runs_with_more_than_its_weights_is_refused(train: Any, texts: Path, tmp_path: Path) -> None:
    train(texts, "first", method="bottleneck", epochs=0.2)
    with pytest.raises(ModelError, match="runs with a bottleneck beside its weights"):
        train(texts, "second", model=tmp_path / "first")


@pytest.mark.parametrize("tensors", [{}, {"bias": torch.zeros(())}, {"bias": torch.zeros(3)}])
def test_a_mean_head_that_does_not_fit_is_said(base: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tmp_path, {"kind": "mean-head"}, {"other": torch.zeros(1), **tensors})
    with pytest.raises(ModelError, match="the head does not fit the model"):
        MeanHead.open(tmp_path, build(base, LABELS, TrainSpec()).network)


def test_an_adapter_that_is_broken_or_gone_is_said(train: Any, texts: Path, tmp_path: Path) -> None:
    for method, name in (("bottleneck", "llmo_adapter.safetensors"), ("prompt", "adapter_model.safetensors")):
        train(texts, method, method=method, epochs=0.2)
        path = tmp_path / method / "adapter" / name
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(ModelError, match="cannot be read"):
            open_model(tmp_path / method)
        path.unlink()
        with pytest.raises(ModelError, match=f"no {name}"):
            open_model(tmp_path / method)


def test_verify_sees_an_adapter_that_does_nothing(train: Any, texts: Path, tmp_path: Path) -> None:
    train(texts, method="bottleneck", epochs=0.2, learning_rate=1e-9)
    path = tmp_path / "out" / "adapter" / "llmo_adapter.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(GateRefused, match="effect of the adapter"):
        verified(tmp_path / "out", tmp_path / "v")


def test_ia3_names_the_modules_where_peft_knows_none(tmp_path: Path) -> None:
    """peft maps IA3 for a few architectures; ELECTRA is none of them."""
    config = transformers.ElectraConfig(
        vocab_size=200, hidden_size=32, embedding_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.ElectraForSequenceClassification(config).save_pretrained(tmp_path)
    for method in (*MERGED, *BESIDE):
        built = build(tmp_path, LABELS, TrainSpec(method=method))
        ids = torch.randint(5, 60, (2, 9))
        built.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        learning = {name for name, p in built.trainable() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any("classifier" in name for name in learning)
        if method == "ia3":
            assert {name.split(".")[-1] for name in built.adapted} == {"key", "value", "dense"}


def test_prefix_is_refused_where_no_keys_can_come_before(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(vocab_size=200, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match="'distilbert' takes no keys and values"):
        build(tmp_path, LABELS, TrainSpec(method="prefix"))
    for method in ("ia3", "bottleneck", "prompt"):
        assert build(tmp_path, LABELS, TrainSpec(method=method)).trained > 0


def test_a_scaled_lora_shares_a_trunk_and_the_others_do_not(train: Any, texts: Path, tmp_path: Path) -> None:
    train(texts, "head", method="head", **QUICK)
    engine = TorchEngine()
    engine.load(tmp_path / "head", NullContext(1).device)
    train(texts, "rslora", method="rslora", **QUICK)
    engine.add_adapter("rslora", tmp_path / "rslora")
    golden = read_golden(tmp_path / "rslora")
    requests = [Request(i, row["input_ids"], "rslora") for i, row in enumerate(golden)]
    said = {chunk.id: chunk.data for chunk in engine.run(requests)}
    assert all(np.abs(said[i] - np.array(row["logits"])).max() < CLOSE for i, row in enumerate(golden))
    for method, says in (("dora", "use_dora"), ("ia3", "not a LoRA"), ("bottleneck", "runs with a bottleneck")):
        train(texts, method, method=method, **QUICK)
        with pytest.raises(ModelError, match=says):
            engine.add_adapter(method, tmp_path / method)
