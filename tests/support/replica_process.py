"""A process that is one replica: imports what `serve` imports and nothing else, so that tests can see what that is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmo.context import UntilInputEnds
from llmo.serve import replica


def main() -> None:
    """Serve until standard input ends, then print the names of the imported modules."""
    model = Path(sys.argv[1])
    replica.run(json.loads(sys.argv[2]), {"model": model}, model, UntilInputEnds())
    print(json.dumps(sorted(sys.modules)))


if __name__ == "__main__":
    main()
