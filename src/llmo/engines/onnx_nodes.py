"""Which products an ONNX file holds, read off its bytes: importing the package onnx would take longer than all else.

In the file a node's type is a field of its own (4, a string), so it stands there as tag, length and name.
"""

from __future__ import annotations

import mmap
from collections import Counter
from pathlib import Path

FP32 = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Attention")
INT8 = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention")
APART = "DequantizeLinear"  # its products are plain ones in the file, and int8 once they are joined with it
_TAG = 4 << 3 | 2


def nodes(path: Path, names: tuple[str, ...] = FP32 + INT8) -> Counter[str]:
    """How many nodes of each of these types there are."""
    found: Counter[str] = Counter()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name in names:
            wanted = bytes((_TAG, len(name))) + name.encode()
            at = content.find(wanted)
            while at >= 0:
                found[name] += 1
                at = content.find(wanted, at + len(wanted))
    return found


def precision(found: Counter[str]) -> str:
    """What most products are computed in."""
    eight = sum(found[name] for name in INT8)
    return "int8" if eight > sum(found.values()) - eight else "fp32"
