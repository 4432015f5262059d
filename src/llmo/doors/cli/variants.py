"""What a search among variants found, as tables: of encoders, of models that write, and of streams and threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from llmo.doors.cli.show import console, size, table


def show_variants(result: Mapping[str, Any]) -> None:
    """Those on the Pareto front of speed, loss and size are marked."""
    front = result.get("front", ())
    result = {
        **result,
        "variants": [{**v, "name": v["name"] + " *" * (v["name"] in front)} for v in result["variants"]],
    }
    if any("tokens_per_second" in row for row in result["variants"]):
        _show_generators(result)
    else:
        _show_encoders(result)
    if front:
        console.print("[dim]* no other one is better in speed, loss and size at once[/]")
    console.print(f"[bold]chosen[/] {escape(result['why'])}\n", soft_wrap=True)


def _show_generators(result: Mapping[str, Any]) -> None:
    rows = [
        (
            v["name"], f"{v['bits']:.1f}", size(v["size_bytes"]), f"{v['tokens_per_second']:.0f}",
            f"{v['tokens_per_second_together']:.0f}", f"{v['first_token_ms']:.0f}", f"{v['speedup']:.2f}x",
            f"{v['value']:.3f}", f"{v['drop']:+.2%}", v["verdict"],
        )
        if "value" in v
        else (v["name"], *["-"] * 8, v["verdict"])
        for v in result["variants"]
    ]  # fmt: skip
    columns = ["variant", "bits>", "size>", "tokens/s alone>", "together>", "first token ms>", "speed>"]
    table("compression, measured on dev", [*columns, f"{result['metric']}>", "drop>", "verdict"], rows)
    _show_width(result.get("width", []))


def _show_width(measured: Sequence[Mapping[str, Any]]) -> None:
    """A line for each number of threads; a column for each number of answers at once."""
    speeds = {(row["threads"], row["streams"]): row["tokens_per_second"] for row in measured}
    streams = sorted({count for _, count in speeds})
    rows = [
        (str(threads), *(f"{speeds[threads, count]:.0f}" for count in streams))
        for threads in sorted({threads for threads, _ in speeds})
    ]
    if rows:
        table("tokens/s of the chosen one", ["threads>", *(f"{count} at once>" for count in streams)], rows)


def _show_encoders(result: Mapping[str, Any]) -> None:
    columns = [
        "variant", "size>", "memory>", "ready s>", "one text ms>", "16 at once/s>", "64/s>", "speed>",
        f"{result['metric']}>", "drop>", "95% interval>", "agree>", "verdict",
    ]  # fmt: skip
    rows = [
        (v["name"], *_sized(v), *_timed(v), *_judged(v), v["verdict"])
        if "value" in v
        else (v["name"], *["-"] * (len(columns) - 2), v["verdict"])
        for v in result["variants"]
    ]
    table("compression, measured on dev", columns, rows)


def _sized(variant: Mapping[str, Any]) -> tuple[str, ...]:
    return size(variant["size_bytes"]), size(variant["rss_bytes"]), f"{variant['ready_seconds']:.1f}"


def _timed(variant: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that lose too much are not timed."""
    if "clients" not in variant:
        return ("-",) * 4
    rates = (f"{variant['clients'][clients]['texts_per_second']:.0f}" for clients in ("16", "64"))
    return f"{variant['latency_ms']:.1f}", *rates, f"{variant['speedup']:.2f}x"


def _judged(variant: Mapping[str, Any]) -> tuple[str, ...]:
    interval = f"{variant['drop_low']:+.3f}..{variant['drop_high']:+.3f}"
    return f"{variant['value']:.3f}", f"{variant['drop']:+.3f}", interval, f"{variant['agreement']:.1%}"
