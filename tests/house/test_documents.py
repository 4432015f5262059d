"""The documents tell the truth: every command, option, setting, key and route they name is there, and the other way."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from llmo.doors.cli.commands import app
from llmo.settings import VARIABLES

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "README.zh-CN.md", *ROOT.glob("docs/*.md")])
GROUP = typer.main.get_command(app)


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(group, "commands"):
        for name, command in group.commands.items():
            yield from commands(command, (*path, name))
    else:
        yield path, group


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def written(page: Path) -> list[str]:
    """Every `llmo ...` command line of a page, from code blocks and from inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(llmo [^`]+)`", text)
    return [line.split("#")[0].strip() for line in lines if line.strip().startswith("llmo ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_written_commands_exist(page: Path) -> None:
    known = dict(commands(GROUP))
    for line in written(page):
        words = shlex.split(line.replace("...", ""))[1:]
        path = tuple(words[:2]) if tuple(words[:2]) in known else tuple(words[:1])
        assert path in known, f"{page.name}: there is no command '{line}'"
        used = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert used <= options(known[path]), f"{page.name}: '{line}' uses {used - options(known[path])}"


def test_every_command_is_documented_with_an_example_and_speaks_json() -> None:
    page = (ROOT / "docs" / "doors.md").read_text(encoding="utf-8")
    for path, command in commands(GROUP):
        name = " ".join(path)
        assert f"`llmo {name}" in page, f"docs/doors.md does not name 'llmo {name}'"
        assert f"Example: llmo {name}" in (command.help or ""), f"'llmo {name} --help' has no example"
        assert "--json" in options(command), f"'llmo {name}' has no --json"


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "ground.md").read_text(encoding="utf-8")
    for name, meaning in VARIABLES.items():
        assert f"| `{name}` | {meaning} |" in page
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    used = {name for source in sources for name in re.findall(r"\"(LLMO_[A-Z]+)\"", source)}
    internal = {"LLMO_JOB_DIR", "LLMO_LIFELINE", "LLMO_DOORBELL"}  # between the scheduler and its workers
    assert used - internal <= set(VARIABLES)


def test_the_specification_page_is_what_the_models_say() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "specification.py"))["page"]()
    there = (ROOT / "docs" / "specification.md").read_text(encoding="utf-8")
    assert there == made, "run: python tools/specification.py"


def test_both_readmes_have_the_same_yaml_and_commands() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))

    def block(text: str) -> list[str]:
        return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)

    assert block(english) == block(chinese) != []
    example = (ROOT / "examples" / "newsdesk" / "llmo.yaml").read_text(encoding="utf-8")
    assert block(english)[0].strip() in example
    assert written(ROOT / "README.md") == written(ROOT / "README.zh-CN.md")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
