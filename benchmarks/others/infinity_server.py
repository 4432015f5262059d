"""infinity's own command line: python infinity_server.py FOLDER MAX_LENGTH PORT.

It cuts texts at what the tokeniser says, so it gets a folder that says `MAX_LENGTH`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"
    from infinity_emb.cli import cli

    folder, max_length, port = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        for path in Path(folder).iterdir():
            Path(name, path.name).symlink_to(path)
        told = Path(name, "tokenizer_config.json")
        config = json.loads(told.read_text(encoding="utf-8"))
        told.unlink()
        told.write_text(json.dumps({**config, "model_max_length": int(max_length)}), encoding="utf-8")
        sys.argv = ["infinity_emb", "v2", "--model-id", name, "--served-model-name", "model", "--engine", "torch"]
        sys.argv += ["--device", "cpu", "--host", "127.0.0.1", "--port", port, "--log-level", "warning"]
        cli()
