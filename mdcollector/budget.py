"""Budgets: what a venue allows one IP address, shared by all connectors of this machine through a small locked file.

A token bucket each for request weight and for new connections. `block` closes it for everybody until the time a venue
named (429, 418). Used by `transport.py` and `connector.py`; the file holds a few numbers and is locked for microseconds.

Time is counted since the machine started, sleep included: all processes share that clock and nobody sets it, while a
step of the wall clock would end a ban early. A ban that outlasts a restart of the machine is taken up by wall clock.
"""

import asyncio
import fcntl
import functools
import logging
import math
import os
import struct
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

# Which start of the machine; tokens left, time of that count, blocked until (s since then); that again since the epoch.
_STATE = struct.Struct("<16sdddd")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
BLOCK_MOST_S = 4 * 86_400.0  # the longest ban any venue speaks of is three days
BURST = 0.25  # of what is allowed within a window may go at once; the rest comes evenly while the window lasts
LOCK_WAIT_S = 0.3  # whoever has the file writes a few numbers; a connector receives nothing meanwhile
HELD_S = 2.0  # until a file that somebody has is asked for again
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
        self.held = 0  # how often the file could not be had
        self._held_until = self._ban_until = 0.0  # by the clock of this file
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)

    def take(self, cost: float, keep: float = 0.0) -> float:
        """Take `cost` tokens (at most a full bucket) if they are there; else the seconds to wait before asking again.

        `keep`: so many must be left for others.
        """
        cost, now = min(cost, self.capacity), _now()
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            if not self._locked(fd, now):
                return max(HELD_S, self._ban_until - now)
            tokens, blocked_until = self._state(fd, now)
            if self._ban_until > now:
                tokens, blocked_until = min(tokens, 0.0), max(blocked_until, self._ban_until)
            wait_s = max(blocked_until - now, (cost + keep - tokens) * self._per_token_s)
            if wait_s <= 0:
                tokens -= cost
            self._store(fd, tokens, now, blocked_until)
            self._ban_until = 0.0  # the file has it
        finally:
            os.close(fd)
        return max(0.0, wait_s)

    def block(self, seconds: float) -> None:
        """Let nobody take anything for so long; others learn of it when the file can be had."""
        self._ban_until = max(self._ban_until, _now() + seconds)
        self.take(0.0)

    def _locked(self, fd: int, now: float) -> bool:
        """Whether the file can be had. Somebody who was stopped may keep it: nobody dies of that, or stands still for long."""
        while now >= self._held_until:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if _now() < now + LOCK_WAIT_S:
                    time.sleep(0.001)
                    continue
                if not self._held_until:
                    log.error("%s: held by another process for more than %g s; asked for again", self.path, LOCK_WAIT_S)
                self._held_until = _now() + HELD_S
                self.held += 1
            else:
                self._held_until = 0.0
                return True
        return False

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
