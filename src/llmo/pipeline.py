"""The whole way as child jobs: which steps a project needs, in what order, and the parent job that walks them.

A step's inputs are named by content, so a step whose specification and inputs are unchanged is found done.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmo import scratch
from llmo.context import Context, Stopped
from llmo.errors import JobFailed
from llmo.errors import from_json as error_from_json
from llmo.jobspecs import ALSO
from llmo.searchspec import TRIALS, merged
from llmo.types import JobState, Result, from_json

POLL_SECONDS = 0.02
EVALUATION = {"split": "test", "answers": 0}  # as EvaluateSpec writes it, so that the single step is the same work


@dataclass(frozen=True, slots=True)
class Step:
    """One child job. `inputs` maps a name to `step:KEY` or to an artifact's digest; `tuned` names the search whose
    result says what of `spec` is to be otherwise."""

    key: str
    op: str
    name: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    title: str
    tuned: str = ""

    def settled(self, results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The specification, or None while the search it waits for has no result yet."""
        if not self.tuned:
            return self.spec
        found = results.get(self.tuned)
        return None if found is None else merged(self.spec, found["settings"])

    def resolved(self, outputs: Mapping[str, str]) -> dict[str, str] | None:
        """The inputs as digests, or None while a step it needs has no output yet."""
        found = {}
        for name, value in self.inputs.items():
            digest = outputs.get(value.removeprefix("step:")) if value.startswith("step:") else value
            if digest is None:
                return None
            found[name] = digest
        return found


def plan(project: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> list[Step]:
    """The steps of a project (`ProjectSpec.plain()`), each after the steps it needs.

    `sources` says of `data`, of `data:NAME` of every other task and of `model` either `{"artifact": digest}` (in the
    store already) or `{"source", "digest", "uploads"}` (to be imported); of `model` also
    `{"scratch": ScratchSpec.plain()}` (to be made).
    """
    name, task = project["name"], project["task"]
    steps: list[Step] = []
    model = sources["model"]
    inputs = {"model": model.get("artifact") or "step:base"}
    rows = {"data": project, **{f"{ALSO}{also['name']}": also for also in project["also"]}}
    for key, one in rows.items():
        inputs[key] = sources[key].get("artifact") or f"step:{key}"
        if "artifact" not in sources[key]:
            spec = {**one["data"], "task": one["task"], **_source(sources[key])}
            steps.append(Step(key, "import", one["name"], spec, {}, f"read and clean {one['data']['source']}"))
    if "scratch" in model:
        title = f"make a base model from scratch ({model['scratch']['architecture']})"
        needs = {"data": inputs["data"]}
        steps.append(Step("base", "scratch-model", base_name(project["model"]), model["scratch"], needs, title))
    elif "artifact" not in model:
        title = f"fetch the base model {project['model']}"
        steps.append(Step("base", "base-model", base_name(project["model"]), _source(model), {}, title))
    train, tune = project["train"], project["tune"]
    title = f"train ({train['method']}, {train['epochs']:g} epochs)"
    if tune is not None:
        spec = {**tune, "task": task, "train": train}
        steps.append(Step("tune", "tune", f"{name}-search", spec, inputs, _searching(tune)))
        title = f"train ({train['method']}) with the best settings"
    others = [{"name": also["name"], "task": also["task"]} for also in project["also"]]
    title += f", together with {', '.join(also['name'] for also in others)}" if others else ""
    spec = {**train, "task": task, "also": others}
    steps.append(Step("train", "train", name, spec, inputs, title, tuned="" if tune is None else "tune"))
    for also in others:
        steps += _part(also["name"], inputs[f"{ALSO}{also['name']}"])
    final = "step:train"
    if project["compress"] is not None:
        title = f"compress (lose at most {project['compress']['max_drop']:g})"
        needs = {"data": inputs["data"], "model": "step:train"}
        steps.append(Step("compress", "compress", f"{name}-compressed", project["compress"], needs, title))
        final = "step:compress"
        needs = {"data": inputs["data"], "model": final}
        steps.append(Step("evaluate", "evaluate", f"{name}-report", EVALUATION, needs, "measure what will be served"))
    needs = {"model": final, "reference": "step:train"}
    steps.append(Step("verify", "verify", f"{name}-verify", {}, needs, "verify it against the training graph"))
    if project["deploy"] is not None:
        endpoint = project["deploy"]["endpoint"]
        steps.append(Step("deploy", "serve", endpoint, project["deploy"], {"model": final}, f"serve as '{endpoint}'"))
    return steps


def _part(name: str, data: str) -> list[Step]:
    """The steps that make the model of another task that was learnt together with the first."""
    needs = {"data": data, "model": "step:train"}
    title = f"verify {name} against the training graph"
    return [
        Step(f"part:{name}", "part", name, {"name": name}, needs, f"make the model {name} of the same trunk"),
        Step(f"verify:{name}", "verify", f"{name}-verify", {}, {"model": f"step:part:{name}"}, title),
    ]


def deployment(model: str, reference: str | None, deploy: Mapping[str, Any]) -> list[Step]:
    """The steps that put a stored model behind an endpoint: verify it, then serve it. Both are digests."""
    endpoint = deploy["endpoint"]
    inputs = {"model": model} | ({"reference": reference} if reference else {})
    return [
        Step("verify", "verify", f"{endpoint}-verify", {}, inputs, "verify it against the training graph"),
        Step("deploy", "serve", endpoint, deploy, {"model": model}, f"serve as '{endpoint}'"),
    ]


def _searching(tune: Mapping[str, Any]) -> str:
    """What a search is called in a plan."""
    most = f"{tune['trials'] or TRIALS} trials" if tune["trials"] or not tune["budget"] else "trials"
    within = f" within {tune['budget']:g} s" if tune["budget"] else ""
    return f"search for settings ({tune['sampler']}, {most}{within})"


def _source(source: Mapping[str, Any]) -> dict[str, Any]:
    """As `ImportSpec` and `BaseModelSpec` write it, so that a single step and a project's step are one."""
    return {"source": source["source"], "source_digest": source["digest"], "uploads": source.get("uploads")}


def base_name(source: str) -> str:
    """What a base model is called in the store: the last readable part of its source."""
    if scratch.is_scratch(source):
        return scratch.name_of(source)
    # What was sent to a server is `upload:DIGEST/NAME`; the sender calls it NAME.
    local = ":" not in source or source.startswith("upload:")
    readable = Path(source).name if local else source.partition(":")[2].replace("/", ".")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", readable).strip("-.") or "base"


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """The parent job. `spec["steps"]` are steps as JSON; restarted, it finds its children again by their keys.

    Raises the child's own error when a step fails, and Stopped when asked to stop.
    """
    steps = [from_json(Step, step) for step in spec["steps"]]
    waiting = {step.key: step for step in steps}
    running: dict[str, Step] = {}
    finished: dict[str, Result] = {}
    outputs: dict[str, str] = {}
    while waiting or running:
        for step in [s for s in waiting.values() if _may_start(s, waiting, running)]:
            digests = step.resolved(outputs)
            settled = step.settled({key: result.result for key, result in finished.items()})
            if digests is not None and settled is not None:
                ctx.spawn(step.key, step.op, settled, digests, step.name)
                running[step.key] = waiting.pop(step.key)
        for key in list(running):
            result = ctx.result(key)
            if result is None:
                continue
            _raise_if_failed(running.pop(key), result)
            finished[key] = result
            if result.output is not None:
                outputs[key] = result.output
            ctx.report(len(finished), len(steps), finished=key)
        if ctx.should_stop():
            raise Stopped
        time.sleep(POLL_SECONDS)
    return {"steps": {key: _summary(result) for key, result in finished.items()}}


def _may_start(step: Step, waiting: Mapping[str, Step], running: Mapping[str, Step]) -> bool:
    """An endpoint moves only after every gate before it has passed."""
    return step.op != "serve" or (set(waiting) | set(running)) == {step.key}


def _raise_if_failed(step: Step, result: Result) -> None:
    if result.state in (JobState.DONE, JobState.RUNNING):
        return
    if result.error:
        raise error_from_json(dict(result.error))
    raise JobFailed(
        f"the step '{step.key}' (job {result.job}) ended as {result.state.value}",
        hint=f"see: llmo logs {result.job}; running it again continues from its last checkpoint",
    )


def _summary(result: Result) -> dict[str, Any]:
    return {
        "job": result.job,
        "cached": result.cached,
        "ref": result.ref,
        "output": result.output,
        "result": dict(result.result),
    }
