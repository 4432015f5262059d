"""ONNX Runtime's own dynamic int8 as it comes: what most people deploy, kept as a variant so that its price is seen.

One scale for a whole weight matrix, one for all tokens of a batch (so an answer depends on the texts beside it), and
attention as the exporter spells it. The search measures it, and refuses it where it breaks the budget.
"""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
from onnxruntime.quantization import quantize_dynamic


def quantise(plain: Path, target: Path) -> None:
    """Write the int8 graph of a plain one (`export(folder, plain, fused=False)`) with every default of the library."""
    model = onnx.load(plain)
    del model.graph.value_info[:]  # what the exporter says of shapes makes the library refuse its own graph
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises to run its preparation first, which refuses this graph
    try:
        quantize_dynamic(model, target)
    finally:
        root.setLevel(level)
