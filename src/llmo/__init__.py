"""LLMO, an operating system for language models.

Names are imported when they are first used, so that `import llmo` stays quick and brings no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmo.classic import AdamW, BERTForTextClassification, BERTForTokenClassification, BERTTokenizer
    from llmo.doors.client import Client
    from llmo.doors.sdk import Dataset, Model, compress, deploy, export, gateway, train
    from llmo.errors import LLMOError
    from llmo.system import System

_HOMES = {
    "AdamW": "llmo.classic",
    "BERTForTextClassification": "llmo.classic",
    "BERTForTokenClassification": "llmo.classic",
    "BERTTokenizer": "llmo.classic",
    "Client": "llmo.doors.client",
    "Dataset": "llmo.doors.sdk",
    "LLMOError": "llmo.errors",
    "Model": "llmo.doors.sdk",
    "System": "llmo.system",
    "compress": "llmo.doors.sdk",
    "deploy": "llmo.doors.sdk",
    "export": "llmo.doors.sdk",
    "gateway": "llmo.doors.sdk",
    "train": "llmo.doors.sdk",
}

__all__ = [
    "AdamW",
    "BERTForTextClassification",
    "BERTForTokenClassification",
    "BERTTokenizer",
    "Client",
    "Dataset",
    "LLMOError",
    "Model",
    "System",
    "compress",
    "deploy",
    "export",
    "gateway",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmo' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
