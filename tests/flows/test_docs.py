"""What the README tells a newcomer to type works, in order, on a CSV of their own and the real base model."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmo.doors.server import running_server
from support.project import llmo
from support.tiny import text_rows

ROOT = Path(__file__).parents[2]


def section(page: str, heading: str) -> str:
    return re.split(r"^## ", page.split(f"## {heading}")[1], flags=re.MULTILINE)[0]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `tickets.csv`, as the README assumes it, and no store."""
    monkeypatch.setenv("LLMO_HOME", str(tmp_path / ".llmo"))
    monkeypatch.chdir(tmp_path)
    with Path("tickets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "queue"])
        writer.writerows([row["text"], row["label"]] for row in text_rows(240))
    return tmp_path


@pytest.mark.models
@pytest.mark.slow
def test_the_commands_of_the_readme(desk: Path) -> None:
    block = re.findall(r"```\n(.*?)```", section((ROOT / "README.md").read_text(), "With your own text"), re.DOTALL)[0]
    # The one change: a free port, so that this runs beside anything.
    script = block.replace("llmo up --detach", "llmo up --detach --port 0")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        done = subprocess.run(
            ["bash", "-euxc", script],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env={**os.environ, "PATH": path},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "tickets-compressed@1" in done.stdout
    finally:
        if running_server(desk / ".llmo"):
            assert llmo("down").code == 0


@pytest.mark.models
@pytest.mark.slow
def test_the_python_of_the_docs(desk: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "doors.md").read_text(), re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tickets@1" in done.stdout
