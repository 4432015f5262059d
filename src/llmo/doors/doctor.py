"""What of the machine and the installation works, and the line that mends what does not."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmo.doors.server import running_server
from llmo.errors import LLMOError
from llmo.files import make_home, publish
from llmo.kernel.devices import detect
from llmo.settings import Settings
from llmo.types import Device

EXTRAS = {
    "data": ("pyarrow", "ftfy", "selectolax", "rensa", "charset-normalizer"),
    "train": ("torch", "transformers", "tokenizers", "safetensors", "peft"),
    "compress": ("onnx", "onnxruntime", "onnxscript"),
    "serve": ("fastapi", "uvicorn", "httptools", "uvloop", "prometheus-client"),
}
ROOM = 5 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing examined; an `optional` one that does not work is no fault."""

    name: str
    works: bool
    found: str
    mend: str = ""
    optional: bool = False


def examine(settings: Settings | None = None) -> list[Check]:
    """Every check, in the order a person would ask."""
    settings = settings or Settings.from_environment()
    checks = [_python(), *(_packages(extra, names) for extra, names in EXTRAS.items())]
    checks += [_device(device) for device in detect(settings)]
    return [*checks, _home(settings), _room(settings), _sqlite(), _server(settings)]


def _python() -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    return Check(
        "Python", sys.version_info >= (3, 11), found, "" if sys.version_info >= (3, 11) else "install Python 3.11+"
    )


def _packages(extra: str, names: tuple[str, ...]) -> Check:
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    text = f"missing: {', '.join(missing)}" if missing else ", ".join(found)
    return Check(f"packages: {extra}", not missing, text, f"pip install 'llmo-os[{extra}]'" if missing else "")


def _device(device: Device) -> Check:
    gibibytes = device.memory / (1 << 30)
    found = f"{device.cores} cores, {gibibytes:.1f} GiB; {device.reason}" if device.usable else device.reason
    return Check(f"device {device.name}", device.usable, found, optional=device.kind != "cpu")


def _home(settings: Settings) -> Check:
    probe = settings.home / ".probe"
    try:
        make_home(settings.home)
        publish(probe, b"")
        probe.unlink()
    except (LLMOError, OSError) as error:
        return Check("store", False, str(error), "export LLMO_HOME=/a/folder/you/can/write")
    return Check("store", True, str(settings.home))


def _room(settings: Settings) -> Check:
    folder = next(p for p in (settings.home, *settings.home.parents) if _there(p))
    free = shutil.disk_usage(folder).free
    return Check(
        "disk", free > ROOM, f"{free / (1 << 30):.1f} GiB free", "" if free > ROOM else "free 5 GiB or move LLMO_HOME"
    )


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, a folder that may not be looked into
        return False


def _sqlite() -> Check:
    works = sqlite3.sqlite_version_info >= (3, 35)
    return Check(
        "SQLite", works, sqlite3.sqlite_version, "" if works else "use a newer Python build, or set LLMO_DATABASE"
    )


def _server(settings: Settings) -> Check:
    found = running_server(settings.home)
    text = f"running at {found.url} (process {found.pid})" if found else "not running"
    return Check("server", found is not None, text, "" if found else "llmo up", optional=True)
