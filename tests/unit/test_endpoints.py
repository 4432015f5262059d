"""An endpoint can be taken back at any time, also before it ever answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmo.errors import NotFoundError
from llmo.settings import Settings
from llmo.system import System
from llmo.types import JobState, Needs


def test_an_endpoint_that_still_waits_is_removed(tmp_path: Path) -> None:
    with System(Settings(home=tmp_path)) as system:
        waiting = system.store.jobs.insert(
            op="serve", spec={"endpoint": "news"}, inputs={}, needs=Needs(), service=True
        )
        other = system.store.jobs.insert(op="serve", spec={"endpoint": "else"}, inputs={}, needs=Needs(), service=True)
        system.remove_endpoint("news")
        assert system.job(waiting.id).state is JobState.STOPPED
        assert system.job(other.id).state is JobState.QUEUED
        with pytest.raises(NotFoundError):
            system.remove_endpoint("news")
