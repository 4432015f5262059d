"""One window of closed-loop load by `wrk`, the lightest there is: under 50 us of CPU a request."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WRK = shutil.which("wrk")

# A list of prepared bodies, walked from the start by all connections together; then one line of JSON.
SCRIPT = """
local requests, at = {}, 0
function init(args)
  local headers = {["content-type"] = "application/json"}
  if args[2] ~= "" then headers["authorization"] = "Bearer " .. args[2] end
  for line in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, headers, line)
  end
end
function request()
  at = at % #requests + 1
  return requests[at]
end
function done(summary, latency, found)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p95_ms": %.3f, "p99_ms": %.3f, ' ..
    '"refused": %d, "failed": %d}\\n', summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(95) / 1e3, latency:percentile(99) / 1e3, e.status, e.connect + e.read + e.write + e.timeout))
end
"""


def window(url: str, key: str, clients: int, seconds: float, bodies: Sequence[str]) -> dict[str, Any]:
    """`refused` counts answers other than 2xx and 3xx, `failed` the requests without one. wrk takes whole seconds."""
    with tempfile.TemporaryDirectory() as name:
        script, lines = Path(name, "load.lua"), Path(name, "bodies")
        script.write_text(SCRIPT)
        lines.write_text("\n".join(bodies) + "\n")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = ["wrk", "-t", "1", "-c", str(clients), "-d", f"{max(1, round(seconds))}s", "--timeout", "60s"]
        said = subprocess.run(
            [*command, "-s", str(script), url, "--", str(lines), key], check=True, capture_output=True, text=True
        ).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found | {"cpu_us": 1e6 * cpu / max(1, found["requests"])}
