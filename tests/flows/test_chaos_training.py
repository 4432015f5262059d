"""kill -9 of trainings, their groups and a real server: nothing is lost or done twice, and the weights are the same."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import llmo
from llmo.doors.cli.project import portable
from llmo.errors import UnreachableError
from llmo.settings import Settings
from llmo.specfile import read
from llmo.specs import ProjectSpec
from llmo.store import Store
from llmo.system import System
from llmo.types import Event, Job, JobState, Needs
from support.crashes import Server, members, side_by_side, until, workers
from support.project import llmo as command
from support.project import project

pytestmark = pytest.mark.chaos

ROUNDS = int(os.environ.get("LLMO_CHAOS", "3"))
SEED = int(os.environ.get("LLMO_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
LONG = ROUNDS > 5
CORES = "2"
KINDS = ("worker", "group", "server")
TASK = {"name": "text-classification", "max_length": 32}
DATA = {"text": "body", "label": "queue", "split": {"test": 0.2, "dev": 0.2}}
EPOCHS = 100 if LONG else 20
# Every train of this test; the pipeline's is the plain one.
TRAIN = {"epochs": EPOCHS, "batch_size": 8, "learning_rate": 2e-3, "precision": "fp32", "evaluate_every": 40}
TRAIN |= {"checkpoint_seconds": 0.2}
VARIANTS: Sequence[dict[str, Any]] = (
    {"early_stopping": 1000, "class_weights": "balanced", "dropout": 0.2},
    {"optimizer": "sgd", "schedule": "cosine", "gradient_accumulation_steps": 2, "learning_rate": 0.05},
    {"precision": "auto", "method": "last-n", "last_n": 1},
    {"method": "lora", "lora": {"dropout": 0.1}},
)
ONE = Needs(1, 1, 512 << 20)


def trained(number: int) -> dict[str, Any]:
    return {**TRAIN, "seed": 100 + number, **VARIANTS[number % len(VARIANTS)]}


def written(folder: Path, *, endpoint: bool) -> Path:
    """A project that trains as `TRAIN` says."""
    file = project(folder)
    train = ", ".join(f"{key}: {value}" for key, value in TRAIN.items())
    deploy = "deploy: {endpoint: tickets, cores: 1}\n" if endpoint else ""
    kept = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith("train:")]
    file.write_text("".join(kept) + f"train: {{{train}}}\n{deploy}")
    return file


def digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


class Unbroken:
    """The same trainings in another home, where nobody is killed: what the weights have to be."""

    def __init__(self, folder: Path) -> None:
        written(folder, endpoint=False)
        self.folder, self.known = folder, dict[str, str]()
        self.system = System(Settings(home=folder / "home", cores=int(CORES)))
        source = {"source": str(folder / "tickets.csv"), **DATA, "task": TASK}
        made = [self.system.submit("import", source, name="data")]
        made += [self.system.submit("base-model", {"source": str(folder / "base")}, name="base")]
        self._wait(made)

    def weights(self, wanted: dict[str, tuple[dict[str, Any], int]]) -> dict[str, str]:
        """Digests of the weights of each train specification and number of cores."""
        for cores in (1, 2):  # not at once: one of two jobs that do the same work takes the other's result
            new = {name: spec for name, (spec, n) in wanted.items() if n == cores and name not in self.known}
            jobs = {name: self._train(name, spec, cores) for name, spec in new.items()}
            self._wait(list(jobs.values()))
            for name, submitted in jobs.items():
                job = self.system.job(submitted.id)
                assert (job.attempt, job.reason) == (1, "finished")
                self.known[name] = digest(self.system.path(str(job.output)))
        return {name: self.known[name] for name in wanted}

    def _train(self, name: str, spec: dict[str, Any], cores: int) -> Job:
        inputs, needs = {"data": "data", "model": "base"}, Needs(cores, cores, 512 << 20)
        return self.system.submit("train", {**spec, "task": TASK}, inputs, name=name, needs=needs, fresh=True)

    def _wait(self, jobs: Sequence[Job]) -> None:
        until(lambda: all(self.system.job(job.id).state.ended for job in jobs), "the unbroken runs", 600)
        assert [self.system.job(job.id).error for job in jobs if self.system.job(job.id).error] == []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unbroken]:
    made = Unbroken(tmp_path_factory.mktemp("unbroken"))
    yield made
    made.system.close()


class Chaos:
    """A server with work to do, whoever kills it, and what must be true of it at any moment."""

    def __init__(self, folder: Path) -> None:
        self.pick = random.Random(SEED)
        self.file = written(folder / "project", endpoint=True)
        self.server = Server(folder / "home", LLMO_CORES=CORES)
        self.client = llmo.Client(self.server.url, self.server.key)
        self.acknowledged: dict[int, str] = {}
        self.ended: dict[int, int] = {}  # job -> the attempt that it had when it was first seen ended
        self.trained = 0
        self.kills: Counter[str] = Counter()
        self.resubmitted = 0

    # -- as a user

    def ask(self, request: Callable[[], Job], name: str) -> Job:
        """Submit until the server says that it has it, however often it is killed meanwhile."""
        for _ in range(20):
            try:
                job = request()
            except UnreachableError:
                until(lambda: not self.server.alive, "the server to be dead", 20)
                self.revive()
                self.resubmitted += 1
                continue
            self.acknowledged[job.id] = name
            return job
        raise AssertionError(f"{name} could not be submitted")

    def prepare(self) -> None:
        """What trainings need; a victim like everything else."""
        source = {"source": str(self.file.with_name("tickets.csv")), **DATA, "task": TASK}
        made = [self.ask(lambda: self.client.submit("import", source, name="data"), "data")]
        base = {"source": str(self.file.with_name("base"))}
        made += [self.ask(lambda: self.client.submit("base-model", base, name="base"), "base")]
        self.watch(lambda: all(self.client.job(job.id).state.ended for job in made), "data and model")

    def train(self) -> None:
        name, spec = f"train-{self.trained}", {**trained(self.trained), "task": TASK}
        self.trained += 1
        inputs = {"data": "data", "model": "base"}
        self.ask(lambda: self.client.submit("train", spec, inputs, name=name, needs=ONE), name)

    def pipeline(self) -> None:
        spec = portable(read(self.file, ProjectSpec).spec, self.file)
        self.ask(lambda: self.client.run(spec), "pipeline")

    # -- as a killer

    def kill(self, kind: str) -> None:
        """End something now; a server also in the middle of taking in a job."""
        if kind == "server":
            starts = self.server.starts
            self.kills[kind] += 1
            if self.pick.random() < 0.5:
                timer = threading.Timer(self.pick.uniform(0, 0.03), self.server.process.kill)
                timer.start()
                # Asked for twice, the same work is one job, or is found done.
                (self.train if LONG else self.pipeline)()
                timer.join()
            else:
                self.server.process.kill()
            until(lambda: not self.server.alive or self.server.starts > starts, "the server to be dead", 20)
            if self.pick.random() < 0.5 and not self.server.alive:
                until(lambda: not members(self.server.home), "the workers to die with the server", 20)
            self.revive()
            return
        # A worker that dies three times and gets nowhere is given up, and rightly so.
        patient = {job.id for job in self.observe() if job.attempt < job.max_attempts}
        victims = [pid for job, pids in sorted(workers(self.server.home).items()) for pid in pids if job in patient]
        if victims:
            self.kills[kind] += 1
            with suppress(ProcessLookupError):  # it ended this very moment
                (os.kill if kind == "worker" else os.killpg)(self.pick.choice(victims), signal.SIGKILL)

    def revive(self) -> None:
        if self.server.alive:
            return
        self.client.close()
        self.server.start()
        self.client = llmo.Client(self.server.url, self.server.key)

    # -- as a witness

    def jobs(self) -> list[Job]:
        return self.client.jobs(all=True, limit=1000)

    def observe(self) -> list[Job]:
        """Every job, after checking what must hold at any moment."""
        before = set(self.ended)
        running = workers(self.server.home)
        assert not before & set(running), "a job runs again after it ended"
        assert side_by_side(self.server.home) == []
        jobs = self.jobs()
        assert set(self.acknowledged) <= {job.id for job in jobs}, "an acknowledged job is lost"
        for job in jobs:
            assert job.state not in (JobState.FAILED, JobState.STOPPED), (job, self.server.complaints())
            if job.state.ended:
                assert self.ended.setdefault(job.id, job.attempt) == job.attempt, f"{job} was tried again"
        assert self.server.alive, "the server ended by itself: " + self.server.complaints()
        return jobs

    def watch(self, done: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
        """Look on until it is so."""

        def now() -> bool:
            self.observe()
            return done()

        until(now, what, seconds, pause=0.1)  # each look costs the cores that the work needs

    def look_on(self, seconds: float) -> None:
        over = time.monotonic() + seconds
        self.watch(lambda: time.monotonic() >= over, "time to pass")

    def busy(self) -> list[Job]:
        return [job for job in self.observe() if not job.state.ended and not job.service]

    def events(self) -> dict[int, list[Event]]:
        found: dict[int, list[Event]] = defaultdict(list)
        after = 0
        while page := self.client.events(after):
            after = page[-1].id
            for event in page:
                found[event.job].append(event)
        return found

    def answers(self) -> list[dict[str, Any]]:
        """The endpoint's, once it is up."""
        self.watch(lambda: [e.state for e in self.client.endpoints()] == ["up"], "the endpoint to be up", 120)
        return self.client.predict("tickets", ["market shares profit", "match goal team", "phone chip network"])


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    made = Chaos(tmp_path)
    try:
        yield made
    finally:
        made.client.close()
        if made.server.alive:
            made.server.stop()


def test_killed_at_random_moments(chaos: Chaos, unbroken: Unbroken, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    print(f"LLMO_CHAOS_SEED={SEED} repeats the choices of this run")
    chaos.prepare()
    chaos.train()
    chaos.pipeline()
    kinds = list(KINDS)
    chaos.pick.shuffle(kinds)
    done = 0
    while done < ROUNDS:
        while LONG and len([job for job in chaos.busy() if job.op == "train"]) < 3:
            chaos.train()
        if done == 0:
            chaos.watch(lambda: bool(checkpoints(chaos.server.home)), "the first checkpoint")
        chaos.look_on(chaos.pick.uniform(0, chaos.pick.choice((1.0, 4.0, 12.0)) if LONG else 1.0))
        chaos.kill(kinds[done % 3] if not LONG else chaos.pick.choice(KINDS))
        done = chaos.kills.total()
    chaos.watch(lambda: not chaos.busy(), "the end of all jobs")

    told = chaos.answers()
    chaos.server.process.kill()
    chaos.server.process.wait(20)
    until(lambda: not members(chaos.server.home), "the replica to die with the server", 20)
    with System(Settings(home=chaos.server.home)) as system:
        assert [e.state for e in system.endpoints()] == ["down"]
    chaos.revive()
    assert chaos.answers() == told, "the endpoint came back as another"

    jobs, events = chaos.observe(), chaos.events()
    resumed = check_history(chaos, jobs, events)
    weights = {job.name: job.output for job in jobs if job.op == "train"}
    assert chaos.server.stop() == 0
    until(lambda: not members(chaos.server.home), "all workers to end", 20)
    check_store(chaos, unbroken, weights)
    attempts = sum(job.attempt for job in jobs)
    with capsys.disabled():
        print(
            f"\nchaos, seed {SEED}: kills {dict(chaos.kills)}, {len(jobs)} jobs ({len(weights)} trainings)"
            f" in {attempts} attempts, {resumed} resumed from a checkpoint, {chaos.resubmitted} submitted again,"
            f" {chaos.server.starts} servers, {time.monotonic() - began:.0f} s"
        )


def check_history(chaos: Chaos, jobs: Sequence[Job], events: dict[int, list[Event]]) -> int:
    """Every job was done once, by one attempt at a time; returns how many attempts went on from a checkpoint."""
    resumed = 0
    for job in jobs:
        states = [e.data["state"] for e in events[job.id] if e.kind == "state"]
        if job.service:
            assert job.state is JobState.RUNNING
            continue
        assert job.state is JobState.DONE
        assert states.count("done") == (0 if job.reason == "cached" else 1), states
        spans: dict[int, list[float]] = defaultdict(list)
        for event in events[job.id]:
            spans[event.attempt].append(event.at)
        ordered = [spans[attempt] for attempt in sorted(spans)]
        assert all(max(a) <= min(b) for a, b in pairwise(ordered)), "two attempts overlapped"
        notes = [str(e.data["text"]) for e in events[job.id] if e.kind == "note"]
        resumed += sum(note.startswith("resumed from the checkpoint") for note in notes)
    worked = Counter(job.cache_key for job in jobs if job.op != "pipeline" and job.reason == "finished")
    assert [key for key, times in worked.items() if times > 1] == [], "the same work was done twice"
    assert Counter(job.op for job in jobs if job.reason == "finished")["train"] == chaos.trained + 1
    assert resumed > 0
    return resumed


def check_store(chaos: Chaos, unbroken: Unbroken, weights: dict[str, str | None]) -> None:
    """Everything in the store is whole, and the weights are those of runs that nobody disturbed."""
    with_store = Store.open(chaos.server.home)
    try:
        for artifact in with_store.catalog.list():
            with_store.catalog.check(artifact.digest)
            assert artifact.version == 1, "something was published twice"
        found = {name: digest(with_store.catalog.path(str(output))) for name, output in weights.items()}
    finally:
        with_store.close()
    right = unbroken.weights({f"train-{n}": (trained(n), 1) for n in range(chaos.trained)} | {"tickets-1": (TRAIN, 1)})
    if found["tickets"] != right["tickets-1"]:
        # It takes the cores that are free when it begins, and keeps to their number.
        right |= unbroken.weights({"tickets-2": (TRAIN, 2)})
    assert found.pop("tickets") in (right.pop("tickets-1"), right.pop("tickets-2", None))
    assert found == right


def test_an_embedded_run_goes_on_from_its_checkpoint(tmp_path: Path, unbroken: Unbroken) -> None:
    print(f"LLMO_CHAOS_SEED={SEED} repeats the choices of this run")
    pick = random.Random(SEED)
    file, home = written(tmp_path / "project", endpoint=False), tmp_path / "home"
    env = {"LLMO_HOME": str(home), "LLMO_CORES": "1"}
    # The first time in the training, then anywhere.
    for number in range(6 if LONG else 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "llmo.doors.cli", "run", str(file)],
            env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            if number == 0:
                until(lambda: checkpoints(home), "the first checkpoint")
            moment = time.monotonic() + pick.uniform(0, 0.5 if number == 0 else 8.0)
            until(lambda end=moment, who=process: time.monotonic() > end or who.poll() is not None, "a random moment")
        finally:
            process.kill()
            process.wait()
        until(lambda: not members(home), "the workers to die with the command", 20)
        assert number > 0 or checkpoints(home), "it was killed too late"
    said = command("run", file, "--json", **env)
    assert said.code == 0, said.err + said.out
    with System(Settings(home=home)) as system:
        jobs = system.jobs(all=True, limit=100)
        assert all(job.state is JobState.DONE for job in jobs)
        train = next(job for job in jobs if job.op == "train" and job.reason == "finished")
        events = [event for event in system.events() if event.job == train.id]
        resumed = [e for e in events if e.kind == "note" and str(e.data["text"]).startswith("resumed")]
        assert resumed
        assert min(int(e.data["step"]) for e in events if e.attempt > 1 and "loss" in e.data) > 1
        assert Counter(job.op for job in jobs if job.reason == "finished")["train"] == 1
        assert digest(system.path(str(train.output))) == unbroken.weights({"tickets-1": (TRAIN, 1)})["tickets-1"]


def checkpoints(home: Path) -> list[Path]:
    return sorted(home.glob("jobs/*/checkpoint/step-*/state.json"))
