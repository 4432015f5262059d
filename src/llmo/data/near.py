"""Finds near copies among texts: MinHash signatures propose pairs, the true Jaccard similarity decides."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from llmo.data.tags import UNSPACED

SHINGLE = 5
_PERMUTATIONS = 128
_SEED = 1
_CHUNK = 20_000  # rows hashed at once
_MARGIN = 0.12  # four standard deviations of a signature's estimate at similarity 0.9
_Hashes = NDArray[np.uint64]
# A character of a script without spaces is a word; so is a sign that is no punctuation, such as an emoji.
_WORD = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]|[^\w\s!-/:-@\[-`{{-~\u2000-\u206f\u00a1-\u00bf]")


def words(key: str) -> list[str]:
    return _WORD.findall(key)


def near_copies(
    keys: Sequence[str], threshold: float, tick: Callable[[int], None] = lambda done: None
) -> dict[int, tuple[int, float]]:
    """For each text that nearly copies an earlier one: `{its index: (the earlier kept one, similarity)}`.

    `keys` come in order of preference: what is kept is never dropped for something later. Similarity is the Jaccard
    index of 5-grams of words (of characters where a script has no spaces); shorter texts have no near copies.
    """
    shingles: list[_Hashes] = []
    matrices: list[NDArray[np.uint32]] = []
    vocabulary: dict[str, int] = {}
    for start in range(0, len(keys), _CHUNK):
        found = _shingles(keys[start : start + _CHUNK], vocabulary)
        shingles += found
        matrices.append(_signatures(found))
        tick(min(start + _CHUNK, len(keys)))
    if not matrices:
        return {}
    signatures = np.concatenate(matrices)
    bands = _bands(signatures, threshold)
    full = np.array([len(s) > 0 for s in shingles])
    return _greedy(shingles, signatures, bands, full, threshold)


def jaccard(a: _Hashes, b: _Hashes) -> float:
    """Of two arrays of distinct hashes."""
    common = np.intersect1d(a, b, assume_unique=True).size
    return float(common / (a.size + b.size - common))


def _shingles(keys: Sequence[str], vocabulary: dict[str, int]) -> list[_Hashes]:
    """The distinct 5-gram hashes of each text; none for texts of fewer words."""
    result = []
    for key in keys:
        hashes = np.fromiter((_word_hash(word, vocabulary) for word in words(key)), np.uint64)
        count = hashes.size - SHINGLE + 1
        if count < 1:
            result.append(hashes[:0])
            continue
        mixed = np.zeros(count, np.uint64)
        for i in range(SHINGLE):
            mixed = (mixed ^ hashes[i : i + count]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        result.append(np.unique(mixed))
    return result


def _word_hash(word: str, vocabulary: dict[str, int]) -> int:
    known = vocabulary.get(word)
    if known is None:
        known = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        vocabulary[word] = known
    return known


def _signatures(shingles: Sequence[_Hashes]) -> NDArray[np.uint32]:
    offsets = np.concatenate(([0], np.cumsum([s.size for s in shingles]))).astype(np.uint64)
    flat = np.concatenate(shingles) if shingles else np.empty(0, np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, _PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(shingles), _PERMUTATIONS)


def _bands(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.uint64]:
    """One hash per row and band, `[rows, bands]`; rows that share one are compared.

    The bands are as wide as they can be while a pair at the threshold is still found 999 times in 1000.
    """
    width = 1
    for r in range(1, 17):
        if 1 - (1 - threshold**r) ** (_PERMUTATIONS // r) >= 0.999:
            width = r
    count = _PERMUTATIONS // width
    mixed = np.zeros((len(signatures), count), np.uint64)
    for i in range(width):
        mixed = (mixed ^ signatures[:, i : count * width : width]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _greedy(
    shingles: Sequence[_Hashes],
    signatures: NDArray[np.uint32],
    bands: NDArray[np.uint64],
    full: NDArray[np.bool_],
    threshold: float,
) -> dict[int, tuple[int, float]]:
    shared = np.zeros(bands.shape, bool)
    for column in range(bands.shape[1]):
        _, inverse, counts = np.unique(bands[:, column], return_inverse=True, return_counts=True)
        shared[:, column] = (counts[inverse] > 1) & full
    kept: dict[tuple[int, int], list[int]] = defaultdict(list)
    copies: dict[int, tuple[int, float]] = {}
    for row in np.flatnonzero(shared.any(axis=1)).tolist():
        own = [(column, int(bands[row, column])) for column in np.flatnonzero(shared[row]).tolist()]
        rivals = sorted({other for band in own for other in kept[band]})
        copy = _copied(row, rivals, shingles, signatures, threshold)
        if copy is not None:
            copies[row] = copy
            continue
        for band in own:
            kept[band].append(row)
    return copies


def _copied(
    row: int, rivals: list[int], shingles: Sequence[_Hashes], signatures: NDArray[np.uint32], threshold: float
) -> tuple[int, float] | None:
    if not rivals:
        return None
    estimates = (signatures[rivals] == signatures[row]).mean(axis=1)
    for at in np.argsort(-estimates, kind="stable").tolist():
        if estimates[at] < threshold - _MARGIN:
            return None
        similarity = jaccard(shingles[row], shingles[rivals[at]])
        if similarity >= threshold:
            return rivals[at], similarity
    return None
