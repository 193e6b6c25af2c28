"""The venue's clock against this machine's: how far they are apart, how sure that is, and steps of this machine's clock.

Used by `connector.py`. A venue that tells its time is asked now and then: it said so between request and answer, so the
offset is known to half of the round trip (and of what the venue cuts off). Each measurement is a row of the table
`clocks`, stored beside the data whose times it qualifies. Where a venue tells no time the times of its events are a
bound: they are past when they come, so its clock is ahead by at least that.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from mdcollector.emit import Emit
from mdcollector.exchanges import REASON_CHARS_MAX, Fetch, Venue
from mdcollector.subscriptions import ahead_us

log = logging.getLogger(__name__)

FIRST_S = 2.0  # after the start: the first snapshots go before
REMEMBERED = 8  # measurements, of which the surest counts
DRIFT = 15e-6  # two clocks may drift apart so fast (PHI of RFC 5905): an old measurement is less sure
STEP_LEAST_US = 5_000  # a clock that is merely slewed moves 50 us in a tick
READING_MOST_NS = 1_000_000  # the process was interrupted between two readings of clocks: they say nothing
NOTE = "clock"


class Measured(msgspec.Struct):
    """One measurement; `uncertainty_us` is NaN when the offset is only known to be at least so much."""

    at: float  # monotonic
    source: str
    offset_us: float
    uncertainty_us: float

    def uncertainty_at(self, now: float) -> float:
        """How unsure it has become."""
        return self.uncertainty_us + (now - self.at) * DRIFT * 1e6


class VenueClock:
    """Measures every `every_s` seconds. `round_trip_ns`: of the request whose answer is being taken."""

    def __init__(self, venue: Venue, every_s: float, round_trip_ns: Callable[[], int]) -> None:
        self._venue, self._every_s, self._round_trip_ns = venue, every_s, round_trip_ns
        self._emit: Emit = venue.emit
        self._due = time.monotonic() + min(FIRST_S, every_s)
        self._measured: deque[Measured] = deque(maxlen=REMEMBERED)
        self._refused = False
        self._steps, self._last_step_us = 0, 0
        self._wall_ahead_ns = _wall_ahead_ns()

    def tick(self) -> None:
        """Measure when it is due; called while the venue can be asked."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self._every_s
        if self._venue.TIME_PATH:
            self._venue.wants.append(
                Fetch("clock", self._venue.TIME_PATH, 1, answer=self._answered, failed=self._not_answered)
            )
        if self._refused or not self._venue.TIME_PATH:
            self._by_events()

    def look_for_step(self) -> None:
        """Was this machine's clock set? Then all that was measured is shifted by as much, and measured anew soon."""
        ahead_ns, before_ns = _wall_ahead_ns(), self._wall_ahead_ns
        if ahead_ns is None or before_ns is None:
            self._wall_ahead_ns = before_ns if ahead_ns is None else ahead_ns
            return
        self._wall_ahead_ns = ahead_ns
        step_us = (ahead_ns - before_ns) // 1000
        if abs(step_us) < STEP_LEAST_US:
            return
        self._steps, self._last_step_us = self._steps + 1, step_us
        self._emit.counters["clock_steps"] += 1
        log.warning("%s: the clock of this machine was set by %+.3f s", self._emit.connector, step_us / 1e6)
        for measured in self._measured:
            measured.offset_us -= step_us
        self._due = 0.0
        best, now = self.best(), time.monotonic()
        offset_us, unsure_us = (best.offset_us, best.uncertainty_at(now)) if best is not None else (math.nan, math.nan)
        self._emit.packet(time.time_ns(), self._emit.clock())
        self._emit.clock_offset("step", 0, offset_us, unsure_us, step_us)

    def _answered(self, body: bytes) -> None:
        venue_us, cut_off_us = self._venue.server_time(body)
        round_trip_us = self._round_trip_ns() / 1000
        half_way_us = self._emit.rcv_us - round_trip_us / 2
        self._take("request", venue_us, venue_us + cut_off_us / 2 - half_way_us, (round_trip_us + cut_off_us) / 2)
        self._refused = False
        self._venue.notes.pop(NOTE, None)

    def _not_answered(self, status: int, body: bytes) -> None:
        self._refused = True
        text = f"HTTP {status} {body[:REASON_CHARS_MAX].decode(errors='replace')}"
        self._venue.notes[NOTE] = f"the venue does not tell its time ({text}): offset from times of events only"

    def _by_events(self) -> None:
        if (offset_us := ahead_us(self._emit)) is not None:
            self._emit.packet(time.time_ns(), self._emit.clock())
            self._take("events", 0, float(offset_us), math.nan)

    def _take(self, source: str, venue_us: int, offset_us: float, uncertainty_us: float) -> None:
        self._emit.clock_offset(source, venue_us, offset_us, uncertainty_us)
        new = Measured(time.monotonic(), source, offset_us, uncertainty_us)
        for old in self._measured:
            if old.source != source or abs(old.offset_us - offset_us) > old.uncertainty_at(new.at) + uncertainty_us:
                self._measured.clear()  # both cannot be true: one of the clocks was set
                break
        self._measured.append(new)

    def best(self) -> Measured | None:
        """The surest measurement; where only bounds are known the highest one."""
        now = time.monotonic()
        if not self._measured:
            return None
        if math.isnan(self._measured[-1].uncertainty_us):
            return max(self._measured, key=lambda m: m.offset_us)
        return min(self._measured, key=lambda m: m.uncertainty_at(now))

    def snapshot(self) -> dict[str, Any]:
        """For the stats page: {} before the first measurement; `uncertainty_us` None = the offset is at least so much."""
        best, now = self.best(), time.monotonic()
        steps = {"steps": self._steps, "last_step_us": self._last_step_us}
        if best is None:
            return steps
        unsure_us = best.uncertainty_at(now)
        return {
            "source": best.source,
            "offset_us": round(best.offset_us, 1),
            "uncertainty_us": None if math.isnan(unsure_us) else round(unsure_us, 1),
            "age_s": round(now - self._measured[-1].at, 1),
            **steps,
        }


def _wall_ahead_ns() -> int | None:
    """How far the wall clock is ahead of the steady one; None when they could not be read at the same time."""
    before = time.monotonic_ns()
    wall = time.time_ns()
    after = time.monotonic_ns()
    return wall - (before + after) // 2 if after - before < READING_MOST_NS else None
