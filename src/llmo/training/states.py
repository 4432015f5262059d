"""What a frozen trunk says of each text, computed once and kept on disk for every epoch, trial and fold.

One entry is one trunk over one set of texts, in the number format that it was computed in, so that nothing is lost by
keeping it. Entries are written aside and renamed, the longest unused go first when the bound is reached, and one that
vanishes is computed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llmo.context import Context, Stopped
from llmo.files import digest_of_value
from llmo.training.batches import padded
from llmo.training.failures import disk_errors
from llmo.training.precision import Precision
from llmo.training.scoring import of_like_length
from llmo.training.trunk import Trunk

SHARE = 0.1  # of the disk's free space that all entries may take
POLL_SECONDS = 0.2
FILE = "states"
KINDS = {"fp32": (np.float32, torch.float32), "bf16": (np.int16, torch.bfloat16)}
Ids = NDArray[np.int32]
Compute = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


class States:
    """The states of `texts`, memory-mapped: `starts[i]` is where those of text `i` begin, in tokens."""

    def __init__(self, path: Path, texts: Sequence[Ids], trunk: Trunk, precision: Precision) -> None:
        lengths = [1 if trunk.first_only else len(ids) for ids in texts]
        self.precision = precision
        self.trunk = trunk
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        kind, self._kind = KINDS[precision.name]
        self._data = np.memmap(path, kind, "r", shape=(int(self._starts[-1]), trunk.width))
        self._places = {ids.tobytes(): place for place, ids in enumerate(texts)}

    def has(self, ids: Ids) -> bool:
        return ids.tobytes() in self._places

    def batch(self, texts: Sequence[Ids], columns: int = 0) -> torch.Tensor:
        """`[texts, tokens, width]`, padded with zeros to the longest, or to `columns` where all tokens are kept. Raises
        KeyError for a text that is not here."""
        places = [self._places[ids.tobytes()] for ids in texts]
        sizes = self._starts[[p + 1 for p in places]] - self._starts[places]
        longest = 1 if self.trunk.first_only else max(columns, int(sizes.max()))
        found = np.zeros((len(texts), longest, self._data.shape[1]), self._data.dtype)
        for row, (place, size) in enumerate(zip(places, sizes, strict=True)):
            found[row, :size] = self._data[self._starts[place] : self._starts[place] + size]
        return torch.from_numpy(found).view(self._kind)


def distinct(texts: Iterable[Ids]) -> list[Ids]:
    """Each text once, the longest first, in an order that depends on the set alone."""
    return sorted({ids.tobytes(): ids for ids in texts}.values(), key=lambda ids: (-len(ids), ids.tobytes()))


def size(trunk: Trunk, texts: Sequence[Ids], precision: Precision) -> int:
    """Bytes of an entry."""
    tokens = len(texts) if trunk.first_only else sum(len(ids) for ids in texts)
    return tokens * trunk.width * np.dtype(KINDS[precision.name][0]).itemsize


def room(folder: Path) -> int:
    """Bytes that the entries in `folder` may take together."""
    return int(SHARE * (shutil.disk_usage(folder).free + sum(_bytes(entry) for entry in _entries(folder))))


def open_states(
    folder: Path,
    trunk: Trunk,
    texts: list[Ids],
    compute: Compute,
    limit: int,
    precision: Precision,
    ctx: Context,
) -> tuple[States, bool]:
    """The states of `texts` (as `distinct` gave them), and whether they were there already.

    `compute` gives those of a batch; `limit` is the longest text. Another job that makes the same entry is waited for.
    Raises Stopped when asked to stop, StorageError when the disk is full.
    """
    rows = hashlib.sha256(b"".join(len(ids).to_bytes(4, "little") + ids.tobytes() for ids in texts)).hexdigest()
    key = digest_of_value([trunk.digest, rows, precision.name]).removeprefix("sha256:")
    entry = folder / key
    with alone(folder, key, ctx):
        there = (entry / FILE).is_file()
        if there:
            entry.touch()
        else:
            make_room(folder, size(trunk, texts, precision))
            _write(entry, trunk, texts, compute, limit, precision, ctx)
        return States(entry / FILE, texts, trunk, precision), there


def _write(
    entry: Path,
    trunk: Trunk,
    texts: list[Ids],
    compute: Compute,
    limit: int,
    precision: Precision,
    ctx: Context,
) -> None:
    kind, tensor_kind = KINDS[precision.name]
    aside = entry.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    done = 0
    try:
        with disk_errors(aside):
            aside.mkdir(parents=True)
            with (aside / FILE).open("wb") as file:
                for batch in of_like_length([len(ids) for ids in texts]):
                    _heed(ctx)
                    inputs = padded([texts[i] for i in batch], trunk.pad_id, limit)
                    states = compute({k: v.to(precision.device) for k, v in inputs.items()})
                    plain = states.to(tensor_kind).cpu().contiguous().view(getattr(torch, np.dtype(kind).name)).numpy()
                    for row, i in enumerate(batch):
                        file.write(plain[row, : 1 if trunk.first_only else len(texts[i])].tobytes())
                    done += len(batch)
                    ctx.report(done, len(texts), phase="frozen layers")
            aside.replace(entry)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def make_room(folder: Path, wanted: int) -> None:
    """Remove the entries that were not used the longest, but none that another job is writing or opening now. A job
    that reads one keeps it mapped."""
    entries = sorted(_entries(folder), key=_used)
    taken, limit = sum(_bytes(entry) for entry in entries), room(folder)
    while entries and taken + wanted > limit:
        oldest = entries.pop(0)
        with _lock(folder, oldest.stem).open("a") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken -= _bytes(oldest)
            shutil.rmtree(oldest, ignore_errors=True)


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def _lock(folder: Path, key: str) -> Path:
    return folder / f"{key}.lock"


def _used(entry: Path) -> float:
    with suppress(FileNotFoundError):
        return entry.stat().st_mtime
    return 0.0


def _bytes(entry: Path) -> int:
    with suppress(FileNotFoundError):
        return (entry / FILE).stat().st_size
    return 0


@contextmanager
def alone(folder: Path, key: str, ctx: Context) -> Iterator[None]:
    """One job at a time is at work on an entry. Raises Stopped when asked to stop while another is."""
    path = _lock(folder, key)
    with disk_errors(path), path.open("a") as lock:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            _heed(ctx)
            time.sleep(POLL_SECONDS)
        yield


def _heed(ctx: Context) -> None:
    if ctx.should_stop():
        raise Stopped
