"""Finds out what this machine computes with: its CPU and its GPUs, each with how (or why not) it was detected."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from llmo import hardware
from llmo.kernel.placement import size
from llmo.settings import Settings
from llmo.types import Device

_SHARE_OF_MEMORY = 0.9


def detect(settings: Settings) -> list[Device]:
    """The CPU first, then the GPUs; a kind of device that was looked for in vain is there with `usable=False`."""
    return [cpu(settings), *gpus()]


def cpu(settings: Settings, root: Path = Path("/")) -> Device:
    """Cores and bytes that LLMO may use here: the least of the machine's, the control group's and the user's."""
    allowed = len(os.sched_getaffinity(0))
    quota = _quota(root)
    there = min(allowed, max(1, int(quota))) if quota else allowed
    cores = min(there, settings.cores) if settings.cores else there
    table = _meminfo(root)
    limit = _memory_limit(root)
    physical = min(table["MemTotal"], limit) if limit else table["MemTotal"]
    memory = min(physical, settings.memory) if settings.memory else int(physical * _SHARE_OF_MEMORY)
    found = hardware.processor(root)
    reasons = [found.model or "CPU", f"{cores} of {os.cpu_count() or there} cores"]
    if quota and int(quota) < allowed:
        reasons.append(f"the control group allows {quota:g}")
    if settings.cores:
        reasons.append(
            f"LLMO_CORES={settings.cores}" + (f", but only {there} are there" if settings.cores > there else "")
        )
    reasons.append("LLMO_MEMORY sets the memory" if settings.memory else "90% of the memory")
    serve_memory = min(settings.serve_memory or 0, memory)
    if serve_memory:
        reasons.append(f"endpoints may take {size(serve_memory)} of it (LLMO_SERVE_MEMORY)")
    if limit and limit < table["MemTotal"]:
        reasons.append("the control group limits the memory")
    free = min(memory, table.get("MemAvailable", memory))
    return Device(
        "cpu", "cpu", memory, free, cores, reason="; ".join(reasons), features=found.features, serve_memory=serve_memory
    )


def gpus() -> list[Device]:
    """Every NVIDIA GPU, numbered by PCI bus as NVML does; one unusable device says why there is none."""
    driver = Path("/proc/driver/nvidia/version").exists() or any(Path("/dev").glob("nvidia[0-9]*"))
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        why = "there is an NVIDIA driver, but to use it: pip install 'llmo-os[gpu]'" if driver else "no NVIDIA driver"
        return [_none(why)]
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [_none(f"the NVIDIA driver does not answer: {error}" if driver else "no NVIDIA driver")]
    try:
        found = [_gpu(nvml, number) for number in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        return [_none(f"the NVIDIA driver does not answer: {error}")]
    finally:
        nvml.nvmlShutdown()
    return found or [_none("the NVIDIA driver lists no GPU")]


def _gpu(nvml: Any, number: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(number)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = nvml.nvmlDeviceGetName(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    features = (f"compute {major}.{minor}", *(("bf16",) if major >= 8 else ()))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and not {str(number), nvml.nvmlDeviceGetUUID(handle)} & set(visible.split(","))
    return Device(
        f"cuda:{number}",
        "cuda",
        int(memory.total),
        int(memory.free),
        0,
        usable=not hidden,
        reason=f"{name}; hidden by CUDA_VISIBLE_DEVICES={visible}" if hidden else str(name),
        features=features,
    )


def _none(why: str) -> Device:
    return Device("cuda", "cuda", 0, 0, 0, usable=False, reason=why)


def _meminfo(root: Path) -> dict[str, int]:
    """`/proc/meminfo` in bytes."""
    table = {}
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            table[key] = int(value.split()[0]) * 1024
    if "MemTotal" not in table:
        table["MemTotal"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return table


def _quota(root: Path) -> float | None:
    """The tightest CPU quota of the control groups above this process, in cores."""
    found = []
    for folder in _groups(root, "cpu"):
        amount, _, period = _read(folder / "cpu.max").partition(" ")
        if not amount:
            amount, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if amount.strip().isdigit() and period.strip().isdigit() and int(period) > 0:
            found.append(int(amount) / int(period))
    return min(found, default=None)


def _memory_limit(root: Path) -> int | None:
    """The tightest memory limit of the control groups above this process, in bytes."""
    texts = [
        _read(folder / name).strip()
        for folder in _groups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min((int(text) for text in texts if text.isdigit()), default=None)


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of all above it, in version 1 or 2 of the interface."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [f"sys/fs/cgroup/{controllers}", f"sys/fs/cgroup/{controller}"]
        else:
            continue
        inner = Path(path.lstrip("/"))
        folders += [root / mount / part for mount in mounts for part in (inner, *inner.parents)]
    return folders


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for memory in this control group so far; 0 where it does not say."""
    for folder in _groups(root, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            for line in _read(folder / name).splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
