"""Compiles the kernels for the processor they run on, once: with the machine's C++ compiler, else with the one that the
package `ziglang` brings."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llmo.errors import EnvironmentProblem

HERE = Path(__file__).parent
SOURCES = ("kernels.h", "decoder.cpp")
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden",
    "-Wno-psabi", "-shared", "-fPIC", "-pthread",
)  # fmt: skip


def library() -> Path:
    """The compiled kernels. Raises EnvironmentProblem where nothing can compile them."""
    compiler = _compiler()
    key = hashlib.sha256(repr((compiler, FLAGS, _processor())).encode())
    for name in SOURCES:
        key.update((HERE / name).read_bytes())
    made = _folder() / f"{key.hexdigest()[:24]}.so"
    if not made.is_file():
        _compile(compiler, made)
    return made


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise EnvironmentProblem(
        f"the native engine needs a C++ compiler, and there is no {named or 'c++, g++ or clang++'}",
        hint="pip install ziglang, install g++, or deploy on another engine",
    )


def _compile(compiler: list[str], made: Path) -> None:
    """Into place in one move, so that processes that start together do not see half of it."""
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        built = Path(folder) / made.name
        command = [*compiler, *FLAGS, str(HERE / SOURCES[-1]), "-o", str(built)]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _failed(compiler, str(error)) from error
        if done.returncode:
            raise _failed(compiler, (done.stderr.strip().splitlines() or ["no message"])[0])
        built.replace(made)


def _failed(compiler: list[str], why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{compiler[0]} cannot compile the native engine: {why[:300]}",
        hint="set CXX to another compiler, or deploy on another engine",
    )


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llmo" / "native"


def _processor() -> str:
    """What this processor can do, for a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
        return "\n".join(sorted(set(told)))
    except OSError:
        return platform.platform() + platform.processor()
