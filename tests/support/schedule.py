"""A scheduler as a process of its own, to be killed: `python -m support.schedule HOME`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from llmo.kernel.local import LocalExecutor
from llmo.kernel.scheduler import Scheduler
from llmo.store import Store
from support.kernel import DEVICES, TESTS
from support.ops import lookup


def main(home: Path) -> None:
    store = Store.open(home)
    scheduler = Scheduler(store, LocalExecutor({"PYTHONPATH": TESTS}), DEVICES, lookup=lookup)
    signal.signal(signal.SIGTERM, lambda *_: scheduler.stop())
    scheduler.run()
    scheduler.shutdown()
    store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
