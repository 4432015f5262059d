"""The page about shapes: its example runs as it stands, but for a model of three narrow layers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmo.tasks.card import read_card
from support.trained import plain, verified

PAGE = Path(__file__).parents[4] / "docs" / "shapes.md"


def test_the_example_makes_the_model_smaller(
    taught: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert example
    for folder, name in zip(taught(), ("model", "data"), strict=True):
        shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    # Fewer of everything, a short run, and one core.
    code = example[1].replace("keep=3", "keep=2").replace("keep=512", "keep=32").replace("cores=2", "cores=1")
    code = code.replace(
        'model, data, Path("distilled"), ctx', 'model, data, Path("distilled"), ctx, Recovery(samples=200)'
    )
    exec(compile(code.replace("samples=4000", "samples=200"), str(PAGE), "exec"), {})
    steps = [step["step"] for step in read_card(tmp_path / "small")["shape"]["steps"]]
    assert steps == ["vocabulary", "student", "recovery", "columns", "recovery"]
    assert all(check["passed"] for check in verified(tmp_path / "small", tmp_path / "verify").values())
    config = plain(tmp_path / "small").config
    assert (config.num_hidden_layers, config.intermediate_size) == (2, 32)
