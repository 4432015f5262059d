"""Updates mixed row by row: what a batch costs nothing, and what cannot be mixed is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from llmo.engines.base import Request
from llmo.engines.heads import Head
from llmo.engines.torch import TorchEngine
from llmo.engines.updates import Updates
from llmo.errors import ModelError
from support.headed import SIZES, further_model, headed_model, topics
from support.serving import CPU
from support.tiny import HEADS, HIDDEN, INNER, LAYERS

IN, OUT = 6, 5


def update(rank: int, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return {"layer": (torch.randn(rank, IN, generator=made), torch.randn(rank, OUT, generator=made))}


def test_rows_of_several_ranks_get_their_own_and_the_rest_nothing() -> None:
    layer = nn.Linear(IN, OUT)
    one, other, elsewhere = update(2, 0), update(5, 1), {"another": update(3, 2)["layer"]}
    updates = Updates({"layer": layer, "another": nn.Linear(IN, OUT)})
    x = torch.randn(5, 3, IN)
    with torch.inference_mode():
        plain = layer(x)
        updates.apply([one, elsewhere, other, one])
        mixed = layer(x)
        updates.apply([])
        assert torch.equal(layer(x), plain)
    for row, mine in ((0, one), (2, other), (3, one)):
        down, up = mine["layer"]
        assert torch.allclose(mixed[row], plain[row] + x[row] @ down.T @ up, atol=1e-5)
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(mixed[4], plain[4])


def test_updates_of_modules_that_see_all_texts_at_once_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    monkeypatch.setitem(SIZES, "deberta-v2", relative)
    base = headed_model(tmp_path / "base", architecture="deberta-v2")
    engine = TorchEngine()
    engine.load(base, CPU)
    task = topics(2)
    with pytest.raises(ModelError, match=r"no place for .*\.(key|query)_proj.* apart") as caught:
        engine.add_adapter("all", further_model(tmp_path / "all", base, task, "lora"))
    assert "method: head" in caught.value.hint
    engine.add_adapter("some", further_model(tmp_path / "some", base, task, "lora", target_modules=["value_proj"]))
    engine.add_adapter("head", further_model(tmp_path / "head", base, task, "head"))
    found = {c.id: c.data for c in engine.run([Request(0, [2, 9, 3], "some"), Request(1, [2, 9, 3], "head")])}
    assert abs(found[0] - found[1]).max() > 1e-3


def test_a_trunk_that_pools_by_itself_keeps_its_head() -> None:
    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=HIDDEN,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
    )
    model = transformers.AlbertForSequenceClassification(config)
    with pytest.raises(ValueError, match="albert pools within its trunk"):
        Head(config, type(model), model.state_dict())
