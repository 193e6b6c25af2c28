"""The machine that is measured on: what it is, which cores are used, whether it is quiet enough to be believed."""

import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil

from bench import frames

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


# How fast the machine is just now, by the decode that performance notes quote for the machine of the targets. A virtual
# machine changes its speed twofold from one second to the next: a figure is only worth what was measured beside it.

NOMINAL_DECODE_NS = 297.0
REFERENCE_CHUNK = 100


class _PlainTrade(msgspec.Struct, gc=False):
    t: int
    p: float
    q: float
    T: int
    m: bool


class _PlainTradeFrame(msgspec.Struct, gc=False):
    data: _PlainTrade


class Reference:
    """The reference decode, over and over."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_PlainTradeFrame, strict=False).decode
        items = list(frames.binance_trades(20 * REFERENCE_CHUNK))
        self._chunks = itertools.cycle([items[i : i + REFERENCE_CHUNK] for i in range(0, len(items), REFERENCE_CHUNK)])

    def decode_ns(self) -> float:
        """CPU ns of one decode now: the mean over a chunk."""
        decode, items, clock = self._decode, next(self._chunks), time.thread_time_ns
        began = clock()
        for item in items:
            decode(item)
        return (clock() - began) / REFERENCE_CHUNK

    def slowness(self, seconds: float) -> float:
        """How many times slower this core is now than the machine of the targets: the median over so long."""
        found, deadline = [self.decode_ns()], time.monotonic() + seconds
        while time.monotonic() < deadline:
            found.append(self.decode_ns())
        return sorted(found)[len(found) // 2] / NOMINAL_DECODE_NS


SLOWNESS_S = 0.1


@contextmanager
def slowness_around(index: int) -> Iterator[list[float]]:
    """Look at the speed of the index-th CPU before and after what is measured there; the list then holds the mean."""
    reference, before, found = Reference(), cores(), list[float]()

    def look() -> float:
        pin(index)
        try:
            return reference.slowness(SLOWNESS_S)
        finally:
            release(before)

    first = look()
    yield found
    found.append((first + look()) / 2)


def middle(runs: Sequence[dict[str, Any]], figure: str) -> dict[str, Any]:
    """The run whose figure, at nominal speed, is the median of them."""
    return sorted(runs, key=lambda run: float(run[figure] / run["slowness"]))[len(runs) // 2]


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
