"""Steps that are recorded on a GPU: the numbers of launched ones, a resumed run's too, and a model that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.specs import TrainSpec
from llmo.tasks.text_classification import TextClassification
from llmo.training import batches, recorded
from llmo.training.loop import Loop
from llmo.training.model import build
from llmo.training.objectives import Labels
from llmo.training.precision import Precision
from support.places import ON_GPU, place

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: LLMO_TEST_DEVICE=cuda")
GPU = torch.device("cuda:0")


class Stops(NullContext):
    """Asks to stop after so many steps."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(1, folder)
        self.device, self._left = place(), steps

    def should_stop(self) -> bool:
        self._left -= 1
        return self._left == 0


def loop(base: Path, texts: Path, ctx: NullContext, **keys: Any) -> Loop:
    from llmo.tasks.card import load_tokenizer

    spec = TrainSpec(dropout=0.2, batch_size=4, epochs=2.0, learning_rate=1e-3, **keys)
    rows = list(Dataset.open(texts).split("train"))
    task = TextClassification.from_rows(rows, max_length=48, options={})
    data = batches.encode(task, load_tokenizer(base), rows, lambda _: None)
    torch.manual_seed(0)
    built = build(base, task, spec, on_cpu=False)
    built.model.to(GPU)
    how = Precision("bf16", GPU, "as asked")
    ctx.device = place()
    labels = Labels(built.model, task, data, spec, built.pad_id, GPU)
    return Loop(built, task, labels, spec, data, None, ctx, how)


def stepped(one: Loop, steps: int) -> list[float]:
    """The losses of the first steps, with the same random numbers every time."""
    torch.cuda.manual_seed(7)
    one.built.model.train()
    return [one.step() for _ in range(steps)]


def weights(of: Loop) -> dict[str, np.ndarray[Any, Any]]:
    return {name: p.detach().float().cpu().numpy() for name, p in of.built.trainable()}


def test_recorded_steps_are_the_launched_ones(base: Path, texts: Path) -> None:
    mine, theirs = (loop(base, texts, NullContext(1)) for _ in range(2))
    theirs.recorder = None
    losses = [stepped(one, 12) for one in (mine, theirs)]
    assert mine.recorder is not None
    assert mine.recorder.refused is None
    assert 1 <= len(mine.recorder) < 12
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # the attention may take another kernel without a mask


def test_a_resumed_run_is_the_unbroken_one(base: Path, texts: Path, tmp_path: Path) -> None:
    from llmo.context import Stopped

    torch.cuda.manual_seed(7)
    whole = loop(base, texts, NullContext(1, tmp_path / "whole"))
    whole.run()
    torch.cuda.manual_seed(7)
    with pytest.raises(Stopped):
        loop(base, texts, Stops(tmp_path / "broken", 5)).run()
    rest = loop(base, texts, NullContext(1, tmp_path / "broken"))
    assert rest.resume()
    rest.run()
    found, expected = weights(rest), weights(whole)
    assert all((found[name] == expected[name]).all() for name in expected)


def test_old_recordings_make_room(base: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST", 1)
    one = loop(base, texts, NullContext(1))
    one.run()
    assert one.recorder is not None
    assert len(one.recorder) == 1
    assert np.isfinite(one.state.losses).all()


def test_a_model_that_reads_numbers_back_is_launched_step_by_step(base: Path, texts: Path) -> None:
    mine, theirs = (loop(base, texts, NullContext(1)) for _ in range(2))
    theirs.recorder = None
    for one in (mine, theirs):
        first = next(module for module in one.built.model.modules() if isinstance(module, torch.nn.LayerNorm))
        first.register_forward_hook(lambda _, __, said: said * (1.0 if said.sum().item() < 1e9 else 0.5))
    losses = [stepped(one, 6) for one in (mine, theirs)]
    assert mine.recorder is not None
    assert mine.recorder.refused is not None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
