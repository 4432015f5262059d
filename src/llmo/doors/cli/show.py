"""How answers look in a terminal: one console, tables, sizes, and `--json` for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmo.types import to_json

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]


def emit(value: Any, as_json: bool, otherwise: Callable[[], object]) -> None:
    """Print `value` as JSON when asked, else let `otherwise` print it for people."""
    if as_json:
        sys.stdout.write(json.dumps(to_json(value), ensure_ascii=False, allow_nan=False) + "\n")
    else:
        otherwise()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "") -> None:
    """A plain table under its title, or the words `empty` when there is no row."""
    shown = list(rows)
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    if shown or not empty:
        console.print(grid_of(columns, shown))
    else:
        console.print(empty, markup=False, soft_wrap=True)


def grid_of(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A column whose name ends in `>` is aligned to the right. Cells are shown as they are, brackets and all."""
    grid = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        show_header=any(columns),
        collapse_padding=True,
    )
    for name in columns:
        grid.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    return grid


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""


def seconds(value: float | None) -> str:
    """A duration for people: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if value is None:
        return "-"
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    if value < 7200:
        return f"{value // 60:.0f} min {value % 60:02.0f} s"
    return f"{value // 3600:.0f} h {value % 3600 // 60:02.0f} min"


def ago(at: float | None) -> str:
    return f"{seconds(time.time() - at)} ago" if at else "-"


def figure(metric: Any) -> str:
    """A metric with its confidence interval: .967 (.950 to .981)."""
    if isinstance(metric, dict) and "low" in metric:
        return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"
    if isinstance(metric, dict):
        return f"{metric.get('value', 0):.3f}"
    return f"{metric:.3f}"


def shorten(text: str, width: int = 70) -> str:
    folded = " ".join(str(text).split())
    return folded if len(folded) <= width else folded[: width - 1] + "…"
