"""Budgets: what a venue allows one IP address, shared by all connectors of this machine through a small locked file.

A token bucket each for request weight and for new connections. `block` closes it for everybody until the time a venue
named (429, 418). Used by `transport.py` and `connector.py`; the file holds three numbers and is locked for microseconds.
"""

import asyncio
import fcntl
import math
import os
import struct
import time
from pathlib import Path

_STATE = struct.Struct("<ddd")  # tokens left, time of that count, blocked until (s since the epoch)
BURST = 0.25  # of what is allowed within a window may go at once; the rest comes evenly while the window lasts
WAIT_MOST_S = 5.0  # one sleep at most: somebody else may block or free the bucket meanwhile


class Budget:
    """At most `allowed` within any `per_s` seconds: a full bucket and what flows into it meanwhile are together so much."""

    def __init__(self, path: Path, allowed: float, per_s: float) -> None:
        self.path, self.capacity = path, allowed * BURST
        self._per_token_s = per_s / (allowed - self.capacity)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)

    def take(self, cost: float) -> float:
        """Take `cost` tokens (at most a full bucket) if they are there; else the seconds to wait before asking again."""
        cost, now = min(cost, self.capacity), time.time()
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            tokens, blocked_until = self._state(fd, now)
            wait_s = max(blocked_until - now, (cost - tokens) * self._per_token_s)
            if wait_s <= 0:
                tokens -= cost
            os.pwrite(fd, _STATE.pack(tokens, now, blocked_until), 0)
        finally:
            os.close(fd)
        return max(0.0, wait_s)

    def block(self, seconds: float) -> None:
        """Let nobody take anything for so long."""
        fd, now = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640), time.time()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            tokens, blocked_until = self._state(fd, now)
            os.pwrite(fd, _STATE.pack(min(tokens, 0.0), now, max(blocked_until, now + seconds)), 0)
        finally:
            os.close(fd)

    async def spend(self, cost: float) -> None:
        """Wait until `cost` tokens could be taken; more than a full bucket holds is taken in parts."""
        while cost > 0:
            part = min(cost, self.capacity)
            while wait_s := self.take(part):  # noqa: ASYNC110 (other processes change the file; no event tells)
                await asyncio.sleep(min(wait_s, WAIT_MOST_S))
            cost -= part

    def _state(self, fd: int, now: float) -> tuple[float, float]:
        """Tokens by now and the end of a block; a file that makes no sense, or a clock set back, starts over."""
        raw = os.pread(fd, _STATE.size, 0)
        if len(raw) < _STATE.size:
            return self.capacity, 0.0
        tokens, at, blocked_until = _STATE.unpack(raw)
        if not (math.isfinite(tokens) and math.isfinite(blocked_until) and tokens <= self.capacity and at <= now + 1):
            return 0.0, blocked_until if math.isfinite(blocked_until) and blocked_until < now + 86400 * 4 else 0.0
        return min(self.capacity, tokens + max(0.0, now - at) / self._per_token_s), blocked_until
