"""The server and its jobs: up, down, ps, top, logs, kill, key."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from functools import partial
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from llmo.api import Api
from llmo.doors import flow
from llmo.doors.cli.show import Json, ago, console, emit, grid_of, seconds, shorten, size, table
from llmo.types import Endpoint, Event, Job

Id = Annotated[int, typer.Argument(help="The job's number, as `llmo ps` shows it.")]

key_app = typer.Typer(name="key", help="API keys: make, list, revoke.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    for command in (up, down, ps, top, logs, kill):
        app.command()(command)
    app.add_typer(key_app)


def up(
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than loopback expose the server.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 8420,
    expose: Annotated[bool, typer.Option("--expose", help="Allow a host that other machines reach.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background.")] = False,
    as_json: Json = False,
) -> None:
    """Start the server: scheduler, gateway and API. Prints an admin key the first time, once.

    Example: llmo up --detach
    """
    from llmo.doors import server  # the HTTP stack is only needed here

    if detach:
        found = server.start_detached(host, port, expose=expose)
        emit(found, as_json, lambda: _show_up(found.url, found.key))
        return
    with suppress(KeyboardInterrupt):  # how a server in the foreground is meant to end
        server.serve(
            host, port, expose=expose, ready=lambda found: emit(found, as_json, lambda: _show_up(found.url, found.key))
        )


def _show_up(url: str, key: str | None) -> None:
    console.print(f"serving at [bold]{url}[/]  (chat: {url}/  API: {url}/docs)")
    if key:
        console.print("the admin key, shown this once:")
        console.print(f"  export LLMO_URL={url} LLMO_KEY={key}", soft_wrap=True)
    else:
        console.print("the admin key was shown at the first start; another one: llmo key make NAME --role admin")
    console.print("stop it with: llmo down")


def down(as_json: Json = False) -> None:
    """Stop the server of this store. Jobs it was running go on when it is started again.

    Example: llmo down
    """
    from llmo.doors import server

    pid = server.stop()
    emit({"stopped": pid}, as_json, lambda: console.print(f"stopped the server (process {pid})"))


def ps(
    all_jobs: Annotated[bool, typer.Option("--all", "-a", help="Children and ended jobs too.")] = False,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """List jobs: what runs, what waits and why, what ended and how.

    Example: llmo ps --all
    """
    with closing(flow.connect()) as api:
        found = api.jobs(all=all_jobs, limit=limit)
    emit(found, as_json, lambda: console.print(_jobs(found)))


def _jobs(jobs: list[Job]) -> RenderableType:
    if not jobs:
        return "no jobs"
    rows = []
    for job in jobs:
        end = job.ended_at or time.time()
        took = seconds(end - job.started_at) if job.started_at else "-"
        why = (job.error or {}).get("what") or job.waiting or (job.reason.value.replace("_", " ") if job.reason else "")
        attempt = f" (attempt {job.attempt})" if job.attempt > 1 else ""
        rows.append((job.id, job.op, job.name, job.state.value + attempt, took, shorten(str(why), 100)))
    return grid_of(["job>", "op", "name", "state", "took", "why"], rows)


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False, as_json: Json = False
) -> None:
    """Watch devices, jobs and endpoints, live, until Ctrl-C.

    Example: llmo top
    """
    with closing(flow.connect()) as api:
        if as_json:
            shown = {"devices": api.devices(), "jobs": api.jobs(), "endpoints": api.endpoints()}
            emit(shown, as_json, lambda: None)
            return
        if once or not console.is_terminal:
            console.print(_picture(api))
            return
        picture = Live(_picture(api), console=console, screen=True, auto_refresh=False)
        with suppress(KeyboardInterrupt), picture as live:  # how watching is meant to end
            while True:
                time.sleep(1)
                live.update(_picture(api), refresh=True)


def _picture(api: Api) -> Group:
    devices = [(d.name, d.cores, size(d.memory), size(d.free), d.reason) for d in api.devices()]
    shown = grid_of(["device", "cores>", "memory>", "free>", ""], devices)
    return Group(shown, "", _jobs(api.jobs(limit=15)), "", endpoints_table(api.endpoints()))


def endpoints_table(endpoints: list[Endpoint]) -> RenderableType:
    if not endpoints:
        return "no endpoints; make one with: llmo deploy MODEL"
    rows = []
    for e in endpoints:
        slept = f" for {seconds(time.time() - e.since)}" if e.state == "asleep" and e.since else ""
        state = f"{e.state}{slept}{', pinned' if e.deploy.get('pinned') else ''}"
        why = "" if e.state == "up" else shorten(e.waiting.removeprefix("asleep").lstrip(":; "), 100)
        engine = f"{e.engine} {e.precision}".strip()
        rows.append((e.name, state, e.model_ref or e.model[:19], engine, e.job or "-", why))
    return grid_of(["endpoint", "state", "model", "engine", "job>", "why"], rows)


def logs(
    id: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a job did and printed.

    Example: llmo logs -f 12
    """
    with closing(flow.connect()) as api:
        after, offset = 0, 0
        while True:
            job = api.job(id)
            events = [event for event in api.events(after, root=id) if event.job == id]
            text, offset = api.log(id, offset)
            for event in events:
                emit(event, as_json, partial(_show_event, event))
            if text:
                emit({"log": text}, as_json, partial(console.print, text, end="", markup=False, soft_wrap=True))
            after = events[-1].id if events else after
            if not events and not text and (not follow or job.state.ended):
                break
            if not events and not text:
                time.sleep(0.2)
    if job.error and not as_json:
        console.print(f"error: {job.error.get('what')}\n  {job.error.get('hint', '')}", markup=False, soft_wrap=True)


def _show_event(event: Event) -> None:
    if event.kind == "note":
        text = str(event.data.get("text", ""))
    elif event.kind == "state":
        text = " ".join(str(value) for value in event.data.values() if value)
    else:
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in event.data.items()
        )
    at = time.strftime("%H:%M:%S", time.localtime(event.at))
    console.print(f"{at} {event.kind}: {text}", markup=False, soft_wrap=True)


def kill(id: Id, as_json: Json = False) -> None:
    """Stop a job and its children; nothing of them is left running.

    Example: llmo kill 12
    """
    with closing(flow.connect()) as api:
        before = api.job(id)
        job = api.kill(id)
    if before.state.ended:
        text = f"job {id} ({job.op}) had ended before: {job.state.value}"
    else:
        text = f"job {id} ({job.op}) was asked to stop; it is {job.state.value} now"
    emit(job, as_json, lambda: console.print(text))


@key_app.command("make")
def key_make(
    owner: Annotated[str, typer.Argument(help="Who or what will use it.")],
    role: Annotated[str, typer.Option(help="admin, member or predict.")] = "predict",
    as_json: Json = False,
) -> None:
    """Make an API key. It is printed once; only its hash is kept.

    Example: llmo key make website --role predict
    """
    with closing(flow.connect()) as api:
        key, secret = api.make_key(owner, role)
    shown = {"id": key.id, "owner": owner, "role": role, "key": secret}
    emit(
        shown,
        as_json,
        lambda: console.print(f"key {key.id} for {owner} ({role}), shown this once:\n  {secret}", soft_wrap=True),
    )


@key_app.command("list")
def key_list(as_json: Json = False) -> None:
    """List API keys (never their secrets).

    Example: llmo key list
    """
    with closing(flow.connect()) as api:
        keys = api.api_keys()
    rows = [(k.id, k.owner, k.role, ago(k.created_at), "revoked" if k.revoked_at else "") for k in keys]
    emit(keys, as_json, lambda: table("", ["key", "owner", "role", "made", ""], rows))


@key_app.command("revoke")
def key_revoke(
    id: Annotated[str, typer.Argument(help="The key's id, as `llmo key list` shows it.")], as_json: Json = False
) -> None:
    """Revoke an API key; requests with it are refused within seconds.

    Example: llmo key revoke k3f9a1
    """
    with closing(flow.connect()) as api:
        api.revoke_key(id)
    emit({"revoked": id}, as_json, lambda: console.print(f"revoked {id}"))
