"""What an import makes of a source: divided rows and their card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmo.data.row import Dropped, Row
from llmo.data.stored import Column


@dataclass(frozen=True, slots=True)
class Built:
    """`info` is the card but for the source's name and digest and the samples; `notes` are for the user."""

    splits: Mapping[str, list[Row]]
    dropped: list[Dropped]
    info: dict[str, Any]
    notes: list[str]
    samples: list[dict[str, Any]]
    stored: Sequence[Column]
