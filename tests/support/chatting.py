"""A place to chat in for tests: a store, a tiny chat model that really answers, and the gateway over it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from llmo.doors.server import serve_in_thread
from llmo.settings import Settings
from llmo.system import System
from support.serving import ThreadReplica, deploy, served_chat_model

VERSION = "assistant@3"


@dataclass(frozen=True)
class Place:
    """Where it is, and keys for it; `assistant` and `other` generate, `news` does not."""

    system: System
    url: str
    key: str  # of a member
    asking: str  # of one who may only ask

    def env(self, key: str | None = None) -> dict[str, str]:
        return {"LLMO_URL": self.url, "LLMO_KEY": self.key if key is None else key}

    def streams(self) -> int:
        """Answers that the model is writing now."""
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {self.key}"}, trust_env=False).text
        found = re.search(r'^llmo_streams\{endpoint="assistant"\} (\S+)$', text, re.MULTILINE)
        assert found is not None, text
        return int(float(found[1]))


@contextmanager
def chat_place(folder: Path, *, endless: bool = False) -> Iterator[Place]:
    """The context is long, so that an `endless` answer can be stopped long before it is full."""
    model = served_chat_model(folder / "model", max_position_embeddings=1 << 16, endless=endless)
    with System(Settings(home=folder / "store")) as system, ThreadReplica(model, deploy(cache_mib=64)) as replica:
        described: dict[str, Any] = {"job": None, "model": "sha256:3", "model_ref": VERSION, "state": "up"}
        for name in ("assistant", "other"):
            system.store.endpoints.set(name, task="generation", address=replica.address, **described)
        system.store.endpoints.set("news", task="text-classification", **described)
        keys = [system.make_key(owner, role)[1] for owner, role in (("ann", "member"), ("bob", "predict"))]
        with serve_in_thread(system) as url:
            yield Place(system, url, *keys)
