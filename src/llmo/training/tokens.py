"""Training rows as token ids, made once and kept on disk: every trial and fold of a search learns of the same rows."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tokenizers import Tokenizer

from llmo.context import Context
from llmo.files import digest_of_value
from llmo.tasks.base import Row, Task
from llmo.training import batches, states
from llmo.training.batches import Encoded
from llmo.training.failures import disk_errors

NUMBERS = ("truncated", "max_length", "empty", "group")  # of `Encoded`
WORTH = 1 << 18  # characters: fewer take less time than finding them again is worth
SINGLE = -1  # the size of a target that is one number


def encode(
    task: Task, tokenizer: Tokenizer, rows: Sequence[Row], progress: Callable[[int], None], ctx: Context
) -> Encoded:
    """As `batches.encode`, or as it was for the same task, tokeniser and rows before, where that is worth keeping."""
    if sum(len(row.get("text") or "") for row in rows) < WORTH:
        return batches.encode(task, tokenizer, rows, progress)
    key = digest_of_value([task.to_card(), tokenizer.to_str(), _digest(rows)]).removeprefix("sha256:")
    folder = ctx.cache()
    entry = folder / key
    with states.alone(folder, key, ctx):
        try:
            found = _read(entry / states.FILE)
            entry.touch()
        except (OSError, KeyError, ValueError, BadZipFile):  # not there, or not whole
            found = batches.encode(task, tokenizer, rows, progress)
            _write(entry, found)
    return found


def _digest(rows: Sequence[Row]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(dict(row), default=str).encode())
        found.update(b"\n")
    return found.hexdigest()


def _write(entry: Path, data: Encoded) -> None:
    aside = entry.with_suffix(".tmp")
    sizes = [SINGLE if target.ndim == 0 else len(target) for target in data.targets]
    flat = np.concatenate([target.reshape(-1) for target in data.targets])
    numbers = np.array([getattr(data, name) for name in NUMBERS])
    size = data.ids.nbytes + data.starts.nbytes + flat.nbytes + 8 * len(sizes)
    if size > states.room(entry.parent):
        return
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with disk_errors(aside):
            states.make_room(entry.parent, size)
            aside.mkdir(parents=True)
            with (aside / states.FILE).open("wb") as file:
                np.savez(file, ids=data.ids, starts=data.starts, flat=flat, sizes=np.array(sizes), numbers=numbers)
            shutil.rmtree(entry, ignore_errors=True)
            aside.replace(entry)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _read(path: Path) -> Encoded:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
        ids, starts, flat, sizes = (kept[name] for name in ("ids", "starts", "flat", "sizes"))
        numbers = dict(zip(NUMBERS, kept["numbers"].tolist(), strict=True))
    ends = np.cumsum(np.where(sizes == SINGLE, 1, sizes))
    parts = np.split(flat, ends[:-1])
    targets = [part[0].reshape(()) if size == SINGLE else part for part, size in zip(parts, sizes, strict=True)]
    return Encoded(ids, starts, targets, **numbers)
