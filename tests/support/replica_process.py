"""A process that is one replica: imports what `serve` imports and nothing else, so that tests can see what that is.

Run: python replica_process.py FOLDER SPEC [CORES]
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from llmo.context import NullContext
from llmo.serve import replica


class Told(NullContext):
    """Stops when standard input ends."""

    stopping = False

    def ready(self, address: str) -> None:
        print(address, flush=True)

    def should_stop(self) -> bool:
        return self.stopping

    def listen(self) -> None:
        sys.stdin.read()
        self.stopping = True


def main() -> None:
    """Serve until standard input ends, then print the names of the imported modules."""
    context = Told(cores=int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    threading.Thread(target=context.listen, daemon=True).start()
    model = Path(sys.argv[1])
    replica.run(json.loads(sys.argv[2]), {"model": model}, model, context)
    print(json.dumps(sorted(sys.modules)))


if __name__ == "__main__":
    main()
