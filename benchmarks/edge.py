"""An edge bundle in a clean virtual environment: answers beside the endpoint's, start, memory, and flipped bytes.

Run `make demo` first, then: python benchmarks/edge.py [--model MODEL] [--texts 200] [--rounds 5]
It installs the bundle's two packages from the index that pip is set up for.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llmo
from llmo.types import Kind

ENDPOINT = "edge-benchmark"
MEBI = 1 << 20


def environment(folder: Path, requirements: Path) -> Path:
    """A virtual environment with nothing but what the bundle asks for; its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True).stdout
    names = {package["name"] for package in json.loads(listed)}
    assert not names & {"torch", "transformers", "llmo-os"}, names
    print(f"in the environment: {', '.join(sorted(names - {'pip', 'setuptools'}))}")
    return python


def same(bundle: Sequence[dict[str, Any]], endpoint: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """How many answers are alike in all that is no float, and the largest difference of a float."""
    worst = 0.0

    def plain(a: Any, b: Any) -> Any:
        nonlocal worst
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return [plain(a[key], b[key]) for key in a].count(False) == 0
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            return [plain(x, y) for x, y in zip(a, b, strict=True)].count(False) == 0
        if isinstance(a, float) and isinstance(b, float):
            worst = max(worst, abs(a - b))
            return True
        return a == b

    return sum(plain(a, b) for a, b in zip(bundle, endpoint, strict=True)), worst


def first_answer(python: Path, folder: Path, text: str) -> tuple[float, int]:
    """Seconds from the command to its answer, and the most memory it had, in bytes."""
    began = time.perf_counter()
    process = subprocess.Popen([python, "-I", folder / "run.py", text], stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - began
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert json.loads(line)["tokens"] > 0
    return seconds, used.ru_maxrss << 10


def served(python: Path, folder: Path, texts: Sequence[str]) -> tuple[float, float, float, int]:
    """Of the HTTP mode: seconds to its first answer, texts a second one by one, the same in one request, and VmHWM."""
    began = time.perf_counter()
    command = [python, "-I", folder / "run.py", "--serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().split("/predict")[0].rpartition(":")[2])
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        ask(client, {"text": texts[0]})
        ready = time.perf_counter() - began
        began = time.perf_counter()
        for text in texts:
            ask(client, {"text": text})
        alone = time.perf_counter() - began
        began = time.perf_counter()
        ask(client, {"texts": list(texts)})
        together = time.perf_counter() - began
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = int(status.split("VmHWM:")[1].split()[0]) << 10
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    return ready, len(texts) / alone, len(texts) / together, most


def ask(client: http.client.HTTPConnection, body: dict[str, Any]) -> Any:
    client.request("POST", "/predict", json.dumps(body), {"Content-Type": "application/json"})
    reply = client.getresponse()
    told = json.loads(reply.read())
    assert reply.status == 200, told
    return told["answers"]


def flipped(python: Path, folder: Path, text: str) -> None:
    """One byte of each file in turn."""
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        at = len(whole) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        done = subprocess.run([python, "-I", folder / "run.py", text], capture_output=True, text=True, check=False)
        path.write_bytes(whole)
        assert done.returncode != 0, path
        assert done.stdout == "", path
        print(f"  {path.name}, byte {at}: exit {done.returncode}, {done.stderr.strip().splitlines()[-1]}")
    assert first_answer(python, folder, text)[0] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: newsdesk, compressed to int8 on ONNX Runtime")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.model is None:
        newsdesk = llmo.Model.get("newsdesk")
        model = llmo.compress(newsdesk, name="newsdesk-onnx", variants=["onnx-int8", "onnx-int8-static"], max_drop=0.05)
    else:
        model = llmo.Model.get(options.model)
    api = model.api
    data = next(a.inputs["data"] for a in reversed(api.lineage(model.artifact.digest)) if "data" in a.inputs)
    texts = [str(row["text"]) for row in api.rows(api.artifact(data, Kind.DATASET).digest, "test", limit=options.texts)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = llmo.export(model, Path(scratch) / "bundle")
        size = sum(path.stat().st_size for path in folder.iterdir())
        lines = (folder / "run.py").read_text().count("\n")
        print(f"{model.ref}: {size / 1e6:.1f} MB, run.py of {lines} lines")
        python = environment(Path(scratch) / "environment", folder / "requirements.txt")
        (Path(scratch) / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        command = [python, "-I", folder / "run.py", "--jsonl", "--file", Path(scratch) / "texts.jsonl"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        endpoint = llmo.deploy(model, ENDPOINT, cores=1).predict(texts)
        api.remove_endpoint(ENDPOINT)
        alike, worst = same([json.loads(line) for line in said], endpoint)
        print(f"answers as the endpoint's: {alike} of {len(texts)}; largest difference of a number {worst:.1e}")
        starts = [first_answer(python, folder, texts[0]) for _ in range(options.rounds)]
        seconds, memory = zip(*starts, strict=True)
        told = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"command to first answer: {told}; most memory {max(memory) / MEBI:.0f} MiB")
        rounds = [served(python, folder, texts) for _ in range(options.rounds)]
        ready, alone, together, most = (list(column) for column in zip(*rounds, strict=True))
        told = f"{statistics.median(ready):.2f} s ({min(ready):.2f} to {max(ready):.2f})"
        print(
            f"HTTP mode, start with its self-test to first answer: {told}; VmHWM after all {max(most) / MEBI:.0f} MiB"
        )
        speeds = f"{statistics.median(alone):.0f} one by one, {statistics.median(together):.0f} in one request"
        print(f"texts a second, one thread: {speeds}")
        print("one byte flipped:")
        flipped(python, folder, texts[0])


if __name__ == "__main__":
    main()
