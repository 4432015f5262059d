"""Decides, as a pure function of the ledger, where a job runs, or says in a sentence why it has to wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from llmo.errors import NeedsError
from llmo.types import Device, Needs, Placement

T = TypeVar("T")
Running = tuple[Needs, Placement, str]  # what was asked, what was granted, and what to call it in a sentence


@dataclass(frozen=True, slots=True)
class Wait:
    """No room now; `reason` is a sentence for the user."""

    reason: str


def place(devices: Sequence[Device], running: Sequence[Running], needs: Needs, service: bool) -> Placement | Wait:
    """Grant cores, bytes and GPUs that nobody holds.

    A job of 0 cores always fits: it only waits for others. `cores_max=None` takes every free core, but a service
    at most half of the machine, so that training can still start beside an endpoint.
    """
    cores, memory, gpus = _free(devices, running)
    if _only_waits(needs):
        return Placement(0, min(needs.memory, memory))
    short = []
    if needs.cores > cores:
        held = _holders(running, lambda p: f"{p.cores}" if p.cores else "")
        short.append(f"needs {_count(needs.cores, 'core')}, {_are(cores)} free{held}")
    if needs.memory > memory:
        held = _holders(running, lambda p: size(p.memory) if p.memory else "")
        short.append(f"needs {size(needs.memory)} of memory, {size(memory)} is free{held}")
    if needs.gpus > len(gpus):
        held = _holders(running, lambda p: ", ".join(p.gpus))
        short.append(f"needs {_count(needs.gpus, 'GPU')}, {_are(len(gpus))} free{held}")
    if short:
        return Wait(", and ".join(short))
    return Placement(min(cores, _most(devices, needs, service)), needs.memory, tuple(gpus[: needs.gpus]))


def make_room(movable: Sequence[T], fits: Callable[[Sequence[T]], bool]) -> list[T] | None:
    """Which of `movable` must leave, those at its beginning before those at its end; none more than must.

    `fits` says whether there is room when only so many of them stay; None when there is none even without them all.
    """
    staying: list[T] = []
    if not fits(staying):
        return None
    leaving: list[T] = []
    for one in reversed(movable):
        if fits([*staying, one]):
            staying.append(one)
        else:
            leaving.insert(0, one)
    return leaving


def for_endpoints(devices: Sequence[Device]) -> list[Device]:
    """The machine as large as endpoints together may take it."""
    return [replace(d, memory=min(d.memory, d.serve_memory or d.memory)) for d in devices]


def refuse(devices: Sequence[Device], needs: Needs) -> None:
    """Raises NeedsError when the job would not fit even on the empty machine."""
    cores, memory, gpus = _free(devices, [])
    if needs.cores > cores:
        raise NeedsError(
            f"needs {_count(needs.cores, 'core')}; this machine has {cores}",
            hint="ask for fewer cores, or raise LLMO_CORES if it is set (see `llmo devices`)",
        )
    if needs.memory > memory and not _only_waits(needs):
        raise NeedsError(
            f"needs {size(needs.memory)} of memory; LLMO may use {size(memory)} on this machine",
            hint="use a smaller model or batch, or raise LLMO_MEMORY or, for endpoints, LLMO_SERVE_MEMORY "
            "(see `llmo devices`)",
        )
    if needs.gpus > len(gpus):
        why = "; ".join(f"{d.name}: {d.reason}" for d in devices if d.kind != "cpu" and not d.usable)
        raise NeedsError(
            f"needs {_count(needs.gpus, 'GPU')}; this machine has {len(gpus)}" + (f" ({why})" if why else ""),
            hint="run it without a GPU, or on a machine that has them (see `llmo devices`)",
        )


def for_processes(devices: Sequence[Device], needs: Needs, processes: Any) -> Needs:
    """What a job whose specification asks for so many processes (`devices`) needs: a GPU for each, or where it asks for
    none, a core. Raises NeedsError when the machine has fewer."""
    if not isinstance(processes, int) or processes < 2:
        return needs
    cores, _, gpus = _free(devices, [])
    if processes > (len(gpus) if needs.gpus else cores):
        there = _count(len(gpus), "GPU") if needs.gpus else _count(cores, "core")
        raise NeedsError(
            f"train.devices is {processes}, and this machine has {there}",
            hint="set train.devices lower (see `llmo devices`)",
        )
    if needs.gpus:
        return replace(needs, gpus=max(needs.gpus, processes))
    most = needs.cores_max and max(needs.cores_max, processes)
    return replace(needs, cores=max(needs.cores, processes), cores_max=most)


def size(amount: int) -> str:
    """Bytes as a person reads them."""
    return f"{amount / (1 << 30):.1f} GiB" if amount >= 1 << 30 else f"{amount / (1 << 20):.0f} MiB"


def _free(devices: Sequence[Device], running: Sequence[Running]) -> tuple[int, int, list[str]]:
    cpus = [d for d in devices if d.kind == "cpu" and d.usable]
    granted = [placement for _, placement, _ in running]
    taken = {name for placement in granted for name in placement.gpus}
    cores = sum(d.cores for d in cpus) - sum(p.cores for p in granted)
    memory = sum(d.memory for d in cpus) - sum(p.memory for p in granted)
    gpus = [d.name for d in devices if d.kind != "cpu" and d.usable and d.name not in taken]
    # Below zero when the machine was made smaller (LLMO_CORES) while a job ran on.
    return max(0, cores), max(0, memory), gpus


def _only_waits(needs: Needs) -> bool:
    return needs.cores == 0 and needs.gpus == 0


def _most(devices: Sequence[Device], needs: Needs, service: bool) -> int:
    total, _, _ = _free(devices, [])
    if needs.cores_max is not None:
        return max(needs.cores, needs.cores_max)
    return max(needs.cores, (total + 1) // 2) if service else total


def _holders(running: Sequence[Running], held: Callable[[Placement], str]) -> str:
    parts = [f"{label} holds {held(placement)}" for _, placement, label in running if held(placement)]
    if not parts:
        return ""
    more = f", and {len(parts) - 3} more hold the rest" if len(parts) > 3 else ""
    return "; " + ", ".join(parts[:3]) + more


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _are(number: int) -> str:
    return f"{number} is" if number == 1 else f"{number} are"
