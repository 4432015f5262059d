"""A small project of its own text: a CSV, a tiny base model and the YAML over them; and the command line over it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.tiny import text_rows, tiny_model
from support.tiny_chat import tiny_chat_model

YAML = """\
name: tickets
task: {name: text-classification, max_length: 32}
data: {source: tickets.csv, text: body, label: queue, split: {test: 0.2, dev: 0.2}}
model: base
train: {epochs: 10, learning_rate: 5e-3, batch_size: 8}
"""


def project(folder: Path, *, rows: int = 240, extra: str = "") -> Path:
    """`folder/llmo.yaml` with its data and its base model; `extra` is appended."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "queue"])
        writer.writerows([row["text"], row["label"]] for row in text_rows(rows))
    tiny_model(folder / "base")
    (folder / "llmo.yaml").write_text(YAML + extra, encoding="utf-8")
    return folder / "llmo.yaml"


CHAT_YAML = """\
name: talk
task: {name: generation, max_length: 128}
data: {source: talk.jsonl, split: {test: 0.2, dev: 0.2}}
model: base
train: {method: lora, epochs: 2, learning_rate: 5e-3}
compress: {max_drop: 0.9, variants: [torch-bf16, torch-int8, llamacpp-q8]}
deploy: {endpoint: talk, cores: 1}
"""
COLOURS = ("red", "blue", "green", "black", "white", "pink", "grey", "gold")


def chat_project(folder: Path, *, rows: int = 80) -> Path:
    """`folder/llmo.yaml` over conversations and a tiny chat model."""
    tiny_chat_model(folder / "base")
    talks = []
    for i in range(rows):
        first, second = COLOURS[i % 8], COLOURS[(i // 8 + i + 1) % 8]
        asked = {"role": "user", "content": f"say {first} {second} {i}"}
        talks.append(json.dumps({"messages": [asked, {"role": "assistant", "content": first}]}))
    (folder / "talk.jsonl").write_text("\n".join(talks) + "\n", encoding="utf-8")
    (folder / "llmo.yaml").write_text(CHAT_YAML, encoding="utf-8")
    return folder / "llmo.yaml"


@dataclass(frozen=True)
class Said:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


def llmo(*arguments: str | Path, stdin: str = "", timeout: float = 180, **env: str) -> Said:
    """Run the command line in a process of its own, in the store that LLMO_HOME names."""
    command = [sys.executable, "-m", "llmo.doors.cli", *(str(a) for a in arguments)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout, env={**os.environ, **env}, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "does not know how to explain" not in done.stderr, done.stderr
    return Said(done.returncode, done.stdout, done.stderr)
