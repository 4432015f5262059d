"""The names by which files, folders and columns say that rows are for training, development or testing."""

from __future__ import annotations

import re

_NAMES = {
    "train": "train",
    "training": "train",
    "训练": "train",
    "训练集": "train",
    "dev": "dev",
    "devel": "dev",
    "development": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "验证": "dev",
    "验证集": "dev",
    "test": "test",
    "testing": "test",
    "测试": "test",
    "测试集": "test",
}


def split_name(text: str) -> str | None:
    """train, dev or test when the text is one of their names; else None."""
    return _NAMES.get(text.strip().casefold())


def split_of_file(stem: str) -> str | None:
    """The split a file's name tells, as in `train`, `news_dev` or `test-00000-of-00002`."""
    words = [word for word in re.split(r"[-_. ]+|\d+", stem) if word]
    found = {name for name in map(split_name, words) if name}
    return found.pop() if len(found) == 1 else None
