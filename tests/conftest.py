"""Rules for every test: no address but loopback, no hub, a store of its own."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test asserts a time, and none leaves a file behind.
settings.register_profile("llmo", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llmo")

# What a script starts with & is born deaf to Ctrl-C, and so would be all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two processes of tests share two cores: threads that wait must not spin on them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_connect = socket.socket.connect
_bind = socket.socket.bind


def _checked(address: object) -> None:
    if isinstance(address, tuple):
        host = str(address[0])
        inside = host == "localhost" or (host and ipaddress.ip_address(host).is_loopback)
        assert inside, f"a test may only use loopback, not {host!r}"


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: socket.socket, address: object) -> None:
        _checked(address)
        _connect(self, address)  # type: ignore[arg-type]

    def bind(self: socket.socket, address: object) -> None:
        _checked(address)
        _bind(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "bind", bind)


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLMO_URL", "LLMO_KEY", "LLMO_DATABASE", "LLMO_CORES", "LLMO_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMO_HOME", str(tmp_path / "home"))
