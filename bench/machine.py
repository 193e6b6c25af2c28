"""The machine that is measured on: what it is, which cores are used, whether it is quiet enough to be believed."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "picows",
    "msgspec",
    "numpy",
    "pyarrow",
    "posix_ipc",
    "aiohttp",
    "orjson",
    "ujson",
    "pydantic",
    "websockets",
)
LOAD_QUIET = 0.3  # of one core, used by others while this process sleeps: beyond it figures are not to be compared
LOOK_S = 0.5


def cores() -> list[int]:
    """CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0))


def pin(index: int) -> None:
    """Pin this process to the index-th CPU it may use; the last one when there are fewer."""
    available = cores()
    psutil.Process().cpu_affinity([available[min(index, len(available) - 1)]])


def release(cpus: list[int]) -> None:
    """Let this process use these CPUs again."""
    psutil.Process().cpu_affinity(cpus)


def used_by_others() -> float:
    """Cores that are busy while this process sleeps."""
    psutil.cpu_percent()
    time.sleep(LOOK_S)
    return psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)


def describe() -> dict[str, Any]:
    """What the figures depend on, with warnings."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    busy, warnings = used_by_others(), []
    if busy > LOAD_QUIET:
        warnings.append(f"the machine is busy: others use {busy:.1f} cores; believe ratios, not single figures")
    if len(cores()) < 2:
        warnings.append("one core only: sender, collector and reader take turns, so latencies and rates mean little")
    elif len(cores()) < 3:
        warnings.append("two cores: whatever runs beside collector and sender shares a core with the sender")
    return {
        "cpu": model,
        "cores": len(cores()),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "busy_cores": round(busy, 2),
        "warnings": warnings,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_ns(pid: int) -> int:
    """CPU time that a process (its main thread) has used, in ns; the kernel's own count, user and system."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
