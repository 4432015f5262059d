"""Compiles the kernels for the processor they run on, once: with the machine's C++ compiler, else with the one that the
package `ziglang` brings."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmo.errors import EnvironmentProblem

HERE = Path(__file__).parent
HEADERS = ("crew.h", "kernels.h")
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden",
    "-Wno-psabi", "-shared", "-fPIC", "-pthread",
)  # fmt: skip
KNOWN = ("c++", "g++", "clang++")
HINT = "pip install ziglang, install g++ 12 or newer, or deploy on another engine"


def opened(source: str, sizes: str, kinds: Sequence[type[ctypes.Structure]]) -> Any:
    """The kernels of a file here, compiled and loaded; `sizes(i)` of them is the size of structure `kinds[i]`.

    Raises EnvironmentProblem where they cannot be compiled, kept or opened.
    """
    try:
        found = ctypes.CDLL(str(library(source)))
    except OSError:
        try:
            found = ctypes.CDLL(str(library(source, anew=True)))
        except OSError as error:
            raise EnvironmentProblem(
                f"the compiled native engine cannot be opened: {error}",
                hint="set XDG_CACHE_HOME to a folder from which programs may run, or deploy on another engine",
            ) from error
    size = found[sizes]
    size.restype = ctypes.c_int64
    for i, kind in enumerate(kinds):
        if size(i) != ctypes.sizeof(kind):
            raise ImportError(f"{kind.__name__} differs between {source} and its module")
    return found


def library(source: str, anew: bool = False) -> Path:
    """The compiled kernels of a file here, compiled again if `anew`. Raises EnvironmentProblem where nothing can
    compile or keep them."""
    compilers = _compilers()
    key = hashlib.sha256(repr((compilers, FLAGS, _processor())).encode())
    for name in (*HEADERS, source):
        key.update((HERE / name).read_bytes())
    folder = _folder()
    made = folder / f"{key.hexdigest()[:24]}.so"
    try:
        if anew or not made.is_file():
            with _alone(folder):
                if anew or not made.is_file():
                    _compile(compilers, HERE / source, made)
    except OSError as error:
        raise EnvironmentProblem(
            f"the native engine cannot keep what it compiles in {folder}: {error.strerror or error}",
            hint="make room there, or set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    return made


def _compilers() -> list[list[str]]:
    """What can be tried, best first."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if not shutil.which(command[0]):
            raise EnvironmentProblem(f"CXX names {named}, which is not there", hint="name another compiler, or none")
        return [command]
    found = [[name] for name in KNOWN if shutil.which(name)]
    if importlib.util.find_spec("ziglang") is not None:
        found.append([sys.executable, "-m", "ziglang", "c++"])
    if not found:
        raise EnvironmentProblem(
            f"the native engine needs a C++ compiler, and there is no {', '.join(KNOWN)}", hint=HINT
        )
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process compiles, others wait; what a killed one left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob("tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _compile(compilers: Sequence[list[str]], source: Path, made: Path) -> None:
    """With the first that can, into place in one move."""
    said = []
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        built = Path(folder) / made.name
        for compiler in compilers:
            try:
                command = [*compiler, *FLAGS, str(source), "-o", str(built)]
                done = subprocess.run(
                    command, check=False, capture_output=True, text=True, errors="replace", timeout=600
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                said.append(f"{' '.join(compiler[-2:])}: {error}")
                continue
            if done.returncode == 0:
                with built.open("rb") as file:
                    os.fsync(file.fileno())  # before the name is there: half a library ends the process that opens it
                built.replace(made)
                return
            lines = done.stderr.strip().splitlines()
            wrong = next((line for line in lines if "error" in line.lower()), (lines or ["no message"])[0])
            said.append(f"{' '.join(compiler[-2:])}: {wrong[:200]}")
    raise EnvironmentProblem(f"the native engine cannot be compiled: {'; '.join(said)}", hint=HINT)


def _folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmo" / "native"
    except RuntimeError as error:
        raise EnvironmentProblem(
            f"the native engine finds no folder to keep what it compiles: {error}", hint="set XDG_CACHE_HOME to one"
        ) from error


def _processor() -> str:
    """What this processor can do, for a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
        return "\n".join(sorted(set(told)))
    except OSError:
        return platform.platform() + platform.processor()
