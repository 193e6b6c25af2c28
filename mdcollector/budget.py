"""Budgets: what a venue allows one IP address, shared by all connectors of this machine through a small locked file.

A token bucket each for request weight and for new connections. `block` closes it for everybody until the time a venue
named (429, 418). Used by `transport.py` and `connector.py`; the file holds a few numbers and is locked for microseconds.

Time is counted since the machine started, sleep included: all processes share that clock and nobody sets it, while a
step of the wall clock would end a ban early. A ban that outlasts a restart of the machine is taken up by wall clock.
"""

import asyncio
import fcntl
import functools
import math
import os
import struct
import time
from contextlib import suppress
from pathlib import Path

# Which start of the machine; tokens left, time of that count, blocked until (s since then); that again since the epoch.
_STATE = struct.Struct("<16sdddd")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
BLOCK_MOST_S = 4 * 86_400.0  # the longest ban any venue speaks of is three days
BURST = 0.25  # of what is allowed within a window may go at once; the rest comes evenly while the window lasts
WAIT_MOST_S = 5.0  # one sleep at most: somebody else may block or free the bucket meanwhile


def seconds_for(cost: float, allowed: float, per_s: float) -> float:
    """How long taking so much lasts, beginning with a full bucket that nobody else takes from."""
    burst = allowed * BURST
    return max(0.0, cost - burst) * per_s / (allowed - burst)


class Budget:
    """At most `allowed` within any `per_s` seconds: a full bucket and what flows into it meanwhile are together so much."""

    def __init__(self, path: Path, allowed: float, per_s: float, *, visitor: bool = False) -> None:
        """`visitor`: a command beside the fleet, which shares the file that is there, but makes none for others to find."""
        if visitor and not os.access(path, os.R_OK | os.W_OK):
            path = _copy_of(path)
        self.path, self.capacity = path, allowed * BURST
        self._per_token_s = per_s / (allowed - self.capacity)
        self._boot = bytes.fromhex(_BOOT_ID.read_text(encoding="ascii").strip().replace("-", ""))
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)

    def take(self, cost: float, keep: float = 0.0) -> float:
        """Take `cost` tokens (at most a full bucket) if they are there; else the seconds to wait before asking again.

        `keep`: so many must be left for others.
        """
        cost, now = min(cost, self.capacity), _now()
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            tokens, blocked_until = self._state(fd, now)
            wait_s = max(blocked_until - now, (cost + keep - tokens) * self._per_token_s)
            if wait_s <= 0:
                tokens -= cost
            self._store(fd, tokens, now, blocked_until)
        finally:
            os.close(fd)
        return max(0.0, wait_s)

    def block(self, seconds: float) -> None:
        """Let nobody take anything for so long."""
        fd, now = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640), _now()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            tokens, blocked_until = self._state(fd, now)
            self._store(fd, min(tokens, 0.0), now, max(blocked_until, now + seconds))
        finally:
            os.close(fd)

    async def spend(self, cost: float) -> None:
        """Wait until `cost` tokens could be taken; more than a full bucket holds is taken in parts."""
        while cost > 0:
            part = min(cost, self.capacity)
            while wait_s := self.take(part):  # noqa: ASYNC110 (other processes change the file; no event tells)
                await asyncio.sleep(min(wait_s, WAIT_MOST_S))
            cost -= part

    def _store(self, fd: int, tokens: float, now: float, blocked_until: float) -> None:
        os.ftruncate(fd, _STATE.size)
        os.pwrite(fd, _STATE.pack(self._boot, tokens, now, blocked_until, time.time() + blocked_until - now), 0)

    def _state(self, fd: int, now: float) -> tuple[float, float]:
        """Tokens by now and the end of a block; without tokens where the file makes no sense, or is of an earlier start
        of the machine.
        """
        raw = os.pread(fd, _STATE.size + 1, 0)
        if not raw:
            return self.capacity, 0.0
        if len(raw) != _STATE.size:
            return 0.0, 0.0
        boot, tokens, at, blocked_until, blocked_until_wall = _STATE.unpack(raw)
        if boot != self._boot:
            tokens, blocked_until = math.nan, now + blocked_until_wall - time.time()
        if not now < blocked_until < now + BLOCK_MOST_S:
            blocked_until = 0.0
        if not (tokens <= self.capacity and at <= now):  # NaN is neither
            return 0.0, blocked_until
        return min(self.capacity, tokens + (now - at) / self._per_token_s), blocked_until


@functools.cache  # all budgets of this process on that path share it
def _copy_of(path: Path) -> Path:
    """A copy in memory, which ends with this process; empty where nothing can be read."""
    fd = os.memfd_create(path.name)
    with suppress(OSError):
        os.pwrite(fd, path.read_bytes(), 0)
    return Path(f"/proc/self/fd/{fd}")


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
