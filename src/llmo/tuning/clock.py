"""How far a search has come over all its attempts: its time, the trials it began, and those it told its user of."""

from __future__ import annotations

import json
import time
from pathlib import Path

from llmo.files import publish_json

FILE = "clock.json"
SAVE_SECONDS = 5.0


class Clock:
    """Kept in the job's checkpoint. One that is lost or damaged begins anew, and nothing else is lost with it."""

    def __init__(self, folder: Path, budget: float | None) -> None:
        self._file, self._budget = folder / FILE, budget
        found = _read(self._file)
        self._before, self.begun, self.told = float(found[0]), int(found[1]), int(found[2])
        self._began = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return self._before + time.monotonic() - self._began

    @property
    def over(self) -> bool:
        return self._budget is not None and self.seconds >= self._budget

    def keep(self, *, begun: int, told: int) -> None:
        """Write it down, where there is news or some time went by."""
        news = begun > self.begun or told > self.told
        if news or time.monotonic() - self._saved >= SAVE_SECONDS:
            self.begun, self.told = max(begun, self.begun), max(told, self.told)
            self._saved = time.monotonic()
            publish_json(self._file, {"seconds": self.seconds, "begun": self.begun, "told": self.told})


def _read(file: Path) -> tuple[float, float, float]:
    try:
        found = json.loads(file.read_bytes())
        return float(found["seconds"]), int(found["begun"]), int(found["told"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0, 0, 0
