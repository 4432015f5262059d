"""Detection on made-up machines: control groups of both versions, the user's limits, GPUs with and without a driver."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmo.kernel import devices
from llmo.settings import Settings

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 cores and 16 GiB without control groups."""
    put(tmp_path, "proc/meminfo", "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total: 0\n")
    flags = "fpu avx2 avx512f avx512_vnni amx_bf16 zzz"
    core = f"cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\n"
    put(tmp_path, "proc/cpuinfo", 2 * core)
    put(tmp_path, "proc/self/cgroup", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def settings(**values: int) -> Settings:
    return Settings(home=Path("/nowhere"), **values)


def test_a_bare_machine(root: Path) -> None:
    cpu = devices.cpu(settings(), root)
    assert (cpu.name, cpu.kind, cpu.cores, cpu.usable) == ("cpu", "cpu", 8, True)
    assert cpu.memory == int(16384 * MIB * 0.9)
    assert cpu.free == 8192 * MIB
    assert cpu.features == ("avx2", "avx512f", "avx512_vnni", "amx_bf16")
    assert cpu.reason == "Some CPU, family 25, model 17; 8 of 8 cores; 90% of the memory"


def test_control_groups_of_version_2(root: Path) -> None:
    put(root, "proc/self/cgroup", "0::/outer/inner\n")
    put(root, "sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n")
    put(root, "sys/fs/cgroup/outer/cpu.max", "250000 100000\n")
    put(root, "sys/fs/cgroup/outer/inner/memory.max", "2147483648\n")
    put(root, "sys/fs/cgroup/outer/memory.max", "max\n")
    put(root, "sys/fs/cgroup/outer/inner/memory.events", "low 0\noom 4\noom_kill 3\n")
    cpu = devices.cpu(settings(), root)
    assert (cpu.cores, cpu.memory) == (2, int(2048 * MIB * 0.9))
    assert "allows 2.5" in cpu.reason
    assert devices.oom_kills(root) == 3


def test_control_groups_of_version_1(root: Path) -> None:
    put(root, "proc/self/cgroup", "4:memory:/box\n3:cpu,cpuacct:/box\n")
    put(root, "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "50000\n")
    put(root, "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n")
    put(root, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", "1073741824\n")
    put(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    put(root, "sys/fs/cgroup/memory/box/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    cpu = devices.cpu(settings(), root)
    assert (cpu.cores, cpu.memory) == (1, int(1024 * MIB * 0.9))
    assert devices.oom_kills(root) == 7


def test_what_the_user_says_is_a_limit_and_no_more(root: Path) -> None:
    assert devices.cpu(settings(cores=3, memory=512 * MIB), root).cores == 3
    assert devices.cpu(settings(cores=3, memory=512 * MIB), root).memory == 512 * MIB
    many = devices.cpu(settings(cores=64, memory=1 << 50), root)
    assert (many.cores, many.memory) == (8, 16384 * MIB)
    assert "LLMO_CORES=64, but only 8 are there" in many.reason
    few = devices.cpu(settings(memory=512 * MIB, serve_memory=1 << 50), root)
    assert few.serve_memory == 512 * MIB
    assert "endpoints may take 512 MiB of it" in few.reason


def test_this_machine() -> None:
    found = devices.detect(settings())
    assert found[0].kind == "cpu"
    assert 1 <= found[0].cores <= (os.cpu_count() or 1)
    assert found[0].memory > 256 * MIB
    assert all(device.reason for device in found)


class NVMLError(Exception):
    pass


def nvml(count: int, *, dead: bool = False) -> SimpleNamespace:
    """Stands for the driver's library, which this machine may not have."""

    def init() -> None:
        if dead:
            raise NVMLError("Driver Not Loaded")

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetMemoryInfo=lambda number: SimpleNamespace(total=80 << 30, free=79 << 30),
        nvmlDeviceGetName=lambda number: "NVIDIA H100",
        nvmlDeviceGetUUID=lambda number: f"GPU-{number}",
        nvmlDeviceGetCudaComputeCapability=lambda number: (9, 0),
    )


def test_gpus_are_listed_and_hidden_ones_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(3))  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [(d.name, d.usable, d.memory, d.free) for d in devices.gpus()] == [
        (f"cuda:{n}", True, 80 << 30, 79 << 30) for n in range(3)
    ]
    assert devices.gpus()[0].features == ("compute 9.0", "bf16")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2,0")
    assert [d.usable for d in devices.gpus()] == [True, False, True]
    assert "hidden by CUDA_VISIBLE_DEVICES" in devices.gpus()[1].reason


@pytest.mark.parametrize("library", [nvml(0), nvml(1, dead=True), None])
def test_no_gpu_has_a_reason(monkeypatch: pytest.MonkeyPatch, library: SimpleNamespace | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
    (found,) = devices.gpus()
    assert (found.kind, found.usable) == ("cuda", False)
    assert found.reason
