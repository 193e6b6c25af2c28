"""The stats page: what a process says of itself, as the newest JSON snapshot in a small memory-mapped file.

Written by every process a few times a second, outside its hot path; read by status, mdtail, the monitor and tests
without a lock: two slots are written in turn, each with its length and CRC, and the head names the newer one.
Holds counters (since the process started), latency histograms, the state of streams and samples of refused frames.
"""

import contextlib
import mmap
import os
import socket
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mdcollector.errors import RingError

PAGE_NAME = "stats"
_MAGIC = b"MDSTATS\n"
_SLOT = 1 << 20  # bytes of one slot; details that do not fit are left out by the writer, and counted
_HEAD = struct.Struct("<8sQ")  # magic, number of the newest snapshot
_SLOT_HEAD = struct.Struct("<QII")  # number, length, CRC32 of the JSON
_FIRST_SLOT = 4096
_SIZE = _FIRST_SLOT + 2 * _SLOT
_READ_RETRIES_MAX = 100
_SHORT = 1024  # bytes of one value that stays in a snapshot that was too large

HISTOGRAM_BOUNDS_NS = tuple(int(250 * 2 ** (i / 2)) for i in range(48))  # 250 ns to about 3 s, two a doubling


class StatsWriter:
    """Publishes snapshots into `<directory>/stats` (or `name`)."""

    def __init__(self, directory: Path, name: str = PAGE_NAME) -> None:
        self.path = directory / name
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise RingError(f"{self.path}: cannot be made: {error.strerror}") from error
        try:
            os.posix_fallocate(fd, 0, _SIZE)
            self._map = mmap.mmap(fd, _SIZE)
        except OSError as error:
            raise RingError(f"{self.path}: no room for {_SIZE} bytes: {error.strerror}") from error
        finally:
            os.close(fd)
        magic, number = _HEAD.unpack_from(self._map)
        self._number = number if magic == _MAGIC else 0
        self._encode = msgspec.json.Encoder(enc_hook=str).encode

    def publish(self, snapshot: dict[str, Any]) -> None:
        """Make `snapshot` the newest one. If it is too large its key "streams" is replaced by a count of them.

        If that is not enough only its numbers and short texts stay, and `left_out` counts the other keys.
        """
        snapshot = {"pid": os.getpid(), "time_ns": time.time_ns(), **snapshot}
        text = self._encode(snapshot)
        if len(text) > _SLOT - _SLOT_HEAD.size:
            snapshot = {**snapshot, "streams": {}, "streams_left_out": len(snapshot.get("streams", ()))}
            text = self._encode(snapshot)
        if len(text) > _SLOT - _SLOT_HEAD.size:
            short = {key: value for key, value in snapshot.items() if len(self._encode(value)) <= _SHORT}
            text = self._encode({**short, "left_out": len(snapshot) - len(short)})
        self._number += 1
        at = _FIRST_SLOT + self._number % 2 * _SLOT
        _SLOT_HEAD.pack_into(self._map, at, self._number, len(text), zlib.crc32(text))
        self._map[at + _SLOT_HEAD.size : at + _SLOT_HEAD.size + len(text)] = text
        _HEAD.pack_into(self._map, 0, _MAGIC, self._number)
        notify_alive()


def notify_alive() -> None:
    """Tell systemd, where it started this process and asked for it, that it is up and its loop goes round (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    behind = contextlib.suppress(BlockingIOError)  # systemd has not read the last ones: the next one will do
    with socket.socket(socket.AF_UNIX, kind) as sender, behind:
        sender.sendto(b"READY=1\nWATCHDOG=1", "\0" + address[1:] if address[0] == "@" else address)


def read_stats(path: Path) -> dict[str, Any]:
    """The newest snapshot of a stats page. RingError when there is none or it is not a stats page."""
    try:
        with open(path, "rb") as file:
            for _ in range(_READ_RETRIES_MAX):
                head = os.pread(file.fileno(), _HEAD.size, 0)
                if len(head) < _HEAD.size or (head[:8] != _MAGIC and any(head[:8])):
                    raise RingError(f"{path}: not a stats page")
                number = _HEAD.unpack(head)[1]
                at = _FIRST_SLOT + number % 2 * _SLOT
                slot = os.pread(file.fileno(), _SLOT, at)
                found, length, crc = _SLOT_HEAD.unpack_from(slot.ljust(_SLOT_HEAD.size, b"\0"))
                text = slot[_SLOT_HEAD.size : _SLOT_HEAD.size + length]
                if number and found == number and zlib.crc32(text) == crc:
                    snapshot: dict[str, Any] = msgspec.json.decode(text)
                    return snapshot
                time.sleep(0.001)
    except (OSError, msgspec.DecodeError) as error:
        raise RingError(f"{path}: no readable stats page: {error}") from error
    raise RingError(f"{path}: no whole snapshot in the stats page")


def venue_clock(directory: Path) -> dict[str, Any]:
    """What the connector with this directory says of its venue's clock (`clocks.VenueClock.snapshot`); {} = nothing."""
    with contextlib.suppress(RingError):
        return dict(read_stats(directory / PAGE_NAME).get("clock", {}))
    return {}


def clock_text(clock: Mapping[str, Any]) -> str:
    """How far a venue's clock is ahead of this machine's, in words: times of the venue against ours are as unsure."""
    offset_us, unsure_us = clock.get("offset_us"), clock.get("uncertainty_us")
    if offset_us is None:
        return "unknown"
    if unsure_us is None:
        return f">= {offset_us / 1000:+.1f} ms"
    return f"{offset_us / 1000:+.1f} ± {unsure_us / 1000:.1f} ms"


class Histogram:
    """Counts of durations between `HISTOGRAM_BOUNDS_NS`; filled in blocks, never per message."""

    _edges = np.array(HISTOGRAM_BOUNDS_NS)

    def __init__(self) -> None:
        self.counts = np.zeros(len(HISTOGRAM_BOUNDS_NS) + 1, dtype=np.int64)
        self.total_ns = 0

    def add(self, values_ns: np.ndarray[Any, Any], weight: int = 1) -> None:
        """Add an array of durations in ns; `weight`: each stands for so many."""
        self.counts += weight * np.bincount(np.searchsorted(self._edges, values_ns), minlength=len(self.counts))
        self.total_ns += weight * int(values_ns.sum(dtype=np.int64))

    def snapshot(self) -> dict[str, Any]:
        """Counts and the percentiles that people ask for (upper bound of their bucket, ns)."""
        count = int(self.counts.sum())
        cumulative = np.cumsum(self.counts)
        bounds = (*HISTOGRAM_BOUNDS_NS, 2 * HISTOGRAM_BOUNDS_NS[-1])
        quantiles = {
            name: bounds[int(np.searchsorted(cumulative, share * count))] if count else 0
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))
        }
        return {"count": count, "sum_ns": self.total_ns, "counts": self.counts.tolist(), **quantiles}
