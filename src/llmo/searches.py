"""What a search is told before it begins: how wide this machine runs it, and the earlier searches it can learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmo.kernel.submit import cache_key
from llmo.pipeline import Step
from llmo.plugins import operation
from llmo.searchspec import EARLIER, TRIALS
from llmo.store import Store
from llmo.types import Device, Job, Kind

LEARNT_FROM = 3
TIMED = {"seconds", "latency"}  # figures that a neighbour on the same machine changes


def known(store: Store, steps: Sequence[Step]) -> dict[str, Job]:
    """The steps that are done already, by their keys."""
    found: dict[str, Job] = {}
    for step in steps:
        outputs = {key: job.output for key, job in found.items() if job.output is not None}
        inputs = step.resolved(outputs)
        spec = step.settled({key: job.result or {} for key, job in found.items()})
        about = operation(step.op)
        if inputs is None or spec is None or not about.cached or about.service:
            continue
        done = store.jobs.find_done(cache_key(about, spec, inputs))
        if done is not None:
            found[step.key] = done
    return found


def settle(store: Store, devices: Sequence[Device], steps: Sequence[Step]) -> list[Step]:
    """The steps of a plan, its search complete."""
    at = next((number for number, step in enumerate(steps) if step.op == "tune"), None)
    if at is None:
        return list(steps)
    outputs = {key: job.output for key, job in known(store, steps[:at]).items() if job.output is not None}
    there = {name: outputs.get(value.removeprefix("step:"), value) for name, value in steps[at].inputs.items()}
    spec, inputs = complete(store, devices, steps[at].spec, there)
    more = {name: digest for name, digest in inputs.items() if name.startswith(EARLIER)}
    return [*steps[:at], replace(steps[at], spec=spec, inputs={**steps[at].inputs, **more}), *steps[at + 1 :]]


def complete(
    store: Store, devices: Sequence[Device], spec: Mapping[str, Any], inputs: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The specification with the width of this machine, and the inputs with the reports of earlier searches.

    The same search keeps the earlier ones that it began with, so that it is found again.
    """
    whole = {**spec, **_wide(devices, spec)}
    for job in store.jobs.list(op="tune", limit=None):
        if dict(job.spec) == whole and {**job.inputs, **inputs} == dict(job.inputs):
            return whole, dict(job.inputs)
    earlier = _earlier(store, spec, inputs) if spec["warm_start"] else []
    return whole, {**inputs, **{f"{EARLIER}{number}": digest for number, digest in enumerate(earlier, 1)}}


def _wide(devices: Sequence[Device], spec: Mapping[str, Any]) -> dict[str, int]:
    """How many trials run at once, and on how many cores each at most.

    A wide search learns less from each trial before it begins the next, so the default leaves it four rounds at least.
    """
    cpu = next(device for device in devices if device.kind == "cpu")
    fitting = max(1, min(cpu.cores, cpu.memory // operation("trial").needs.memory))
    rounds = max(1, (spec["trials"] or TRIALS) // 4)
    usual = 1 if TIMED & set(spec["objectives"]) else min(fitting, rounds)
    width = min(spec["parallel"] or usual, cpu.cores)
    return {"width": width, "cores": max(1, cpu.cores // width)}


def _earlier(store: Store, spec: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """Reports of searches for the same task on the same base, the newest first."""
    found = [
        artifact
        for artifact in store.catalog.list(Kind.REPORT)
        if artifact.card.get("kind") == "search"
        and artifact.card.get("task") == spec["task"]["name"]
        and artifact.inputs.get("model") == inputs["model"]
    ]
    found.sort(key=lambda artifact: -artifact.created_at)
    return list(dict.fromkeys(artifact.digest for artifact in found))[:LEARNT_FROM]
