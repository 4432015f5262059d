"""Real replicas for tests: a tiny trained-looking model, served in a thread of this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from llmo.context import NullContext
from llmo.doors.server import serve_in_thread
from llmo.engines.base import Request
from llmo.engines.torch import TorchEngine
from llmo.serve import replica
from llmo.settings import Settings
from llmo.specs import DeploySpec
from llmo.system import System
from llmo.tasks.card import load_task, load_tokenizer, write_card, write_golden
from llmo.types import Artifact, Device, Kind
from support.headed import headed_model
from support.tiny import span_rows, text_rows
from support.tiny_chat import END, SPECIAL, TEMPLATE, tiny_chat_model

PATIENCE = 60.0
CPU = Device("cpu", "cpu", 0, 0, 1)
T = TypeVar("T")


def eventually(get: Callable[[], T], what: str, patience: float = PATIENCE) -> T:
    """The first true value of `get`; polls, and fails with `what` when none comes."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        value = get()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"it never came true: {what}")


def served_model(folder: Path, task: str = "text-classification", *, seed: int = 0) -> Path:
    """A model folder with a card and golden evidence, as training leaves it."""
    return with_evidence(headed_model(folder, task, seed=seed))


def with_evidence(folder: Path) -> Path:
    """The folder of an encoder, with golden evidence now."""
    task = load_task(folder)
    texts = [row["text"] for row in (span_rows(8) if task.name == "token-classification" else text_rows(8))]
    encodings = task.encode(load_tokenizer(folder), texts)
    logits = direct(folder, [e.input_ids for e in encodings])
    write_golden(
        folder,
        [
            {"text": text, "input_ids": e.input_ids, "logits": found}
            for text, e, found in zip(texts, encodings, logits, strict=True)
        ],
    )
    return folder


GREETINGS = ("Hello there", "What is a cat?", "Count to three", "Good night")


def served_chat_model(folder: Path, *, seed: int = 0, template: str = TEMPLATE, **config: Any) -> Path:
    """A chat model's folder with a card and golden evidence, as training leaves it: greedy answers of transformers."""
    tiny_chat_model(folder, seed, **config)
    special = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[END], "pad_token": SPECIAL[0]}
    options = {"template": template, "special": special, "end_ids": [END]}
    task = {"task": "generation", "labels": [], "max_length": 512, "options": options}
    write_card(folder, {"task": task, "engine": "torch", "precision": "fp32"})
    made: Any = load_task(folder)
    tokenizer = load_tokenizer(folder)
    golden = []
    for text in GREETINGS:
        messages = [{"role": "user", "content": text}]
        ids = made.prompt(tokenizer, messages)
        golden.append({"text": text, "messages": messages, "input_ids": ids, "greedy": greedy(folder, ids, 16)})
    write_golden(folder, golden)
    return folder


def greedy(folder: Path, ids: list[int], most: int) -> list[int]:
    """The greedy answer of the model as transformers runs it, without the end token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False)[0, len(ids) :].tolist()
    return found[: found.index(END)] if END in found else found


def direct(folder: Path, ids: list[list[int]]) -> list[Any]:
    """Logits of each text run alone through the reference engine: what batching must not change."""
    engine = TorchEngine()
    engine.load(folder, CPU)
    logits = [next(iter(engine.run([Request(0, one)]))).data.tolist() for one in ids]
    engine.close()
    return logits


def deploy(**changes: Any) -> dict[str, Any]:
    return DeploySpec(endpoint="topics", **changes).plain()


class ThreadReplica(NullContext):
    """`serve` in a thread of this process."""

    def __init__(self, model: Path, spec: Mapping[str, Any] | None = None) -> None:
        super().__init__(cores=1)
        self.address = ""
        self.result: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self.notes: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(model, spec or deploy()), daemon=True)

    def _run(self, model: Path, spec: Mapping[str, Any]) -> None:
        try:
            self.result = replica.run(spec, {"model": model}, model, self)
        except BaseException as error:
            self.error = error

    def ready(self, address: str) -> None:
        self.address = address

    def note(self, message: str) -> None:
        self.notes.append(message)

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def ask_to_stop(self) -> None:
        self._stop.set()

    def start(self) -> ThreadReplica:
        self._thread.start()
        eventually(lambda: self.address or self.error, "the replica is ready")
        if self.error is not None:
            raise self.error
        return self

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def __enter__(self) -> ThreadReplica:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


class ProcessReplica:
    """`serve` in a process of its own, as a worker runs it."""

    def __init__(self, model: Path, spec: Mapping[str, Any] | None = None) -> None:
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.replica_process", str(model), json.dumps(spec or deploy())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("unix:"), self.address

    def modules(self) -> set[str]:
        """Names of the modules the process has imported; ends the replica."""
        out, _ = self.process.communicate("", PATIENCE)
        assert self.process.returncode == 0
        return set(json.loads(out))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> ProcessReplica:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


@dataclass
class Place:
    """A server over a store that holds `base@1`, and a member's key."""

    system: System
    folder: Path
    stack: ExitStack
    base: Artifact
    url: str
    key: str

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Self]:
        with System(Settings(home=folder / "store")) as system, ExitStack() as stack:
            system.start()  # an endpoint is up only while somebody runs this store
            (folder / "base").mkdir()
            (folder / "base" / "config.json").write_text("{}")
            base = system.store.catalog.publish(Kind.MODEL, "base", folder / "base", {}, job=None, inputs={})
            url = stack.enter_context(serve_in_thread(system))
            yield cls(system, folder, stack, base, url, key=system.make_key("ann", "member")[1])
