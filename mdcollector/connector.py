"""The connector: one pinned process, one exchange connection, from frames to rings. The one loop that decides on errors.

Started by `mdcollector connect`. Everything in the process happens on one thread: the event loop reads a packet, the
venue decodes it, rows appear in the rings; between packets the loop keeps the connection alive, fetches what the venue
wants and publishes the stats page.
"""

import asyncio
import ctypes
import gc
import hashlib
import logging
import os
import random
import resource
import signal
import ssl
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mdcollector import config, logs
from mdcollector.assignment import Assignment
from mdcollector.budget import Budget
from mdcollector.clocks import VenueClock
from mdcollector.config import ConnectorConfig
from mdcollector.continuity import LIVE
from mdcollector.emit import Emit
from mdcollector.errors import ConfigError, Disconnected, RateLimited, Stale
from mdcollector.exchanges import Fetch, Options, Reconnect, Selection, Stream, Venue, venue_class
from mdcollector.listing import Followed, Listing
from mdcollector.records import ALWAYS_ON
from mdcollector.stats import StatsWriter
from mdcollector.subscriptions import SEQUENCED, Subscriptions
from mdcollector.transport import HTTP_TRIES, Fetcher, Leg, open_leg, tls_context

log = logging.getLogger(__name__)

TICK_S = 0.1
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4  # linux/mman.h on x86
STATS_EVERY_TICKS = 3
BACKOFF_FIRST_S = 0.5
DATA_FLOWS_S = 10.0  # data for so long, then the back-off starts over
ROLLOVER_BEFORE_END_S = 600.0  # a connection is replaced so long before the venue ends it, spread over half of that
TAIL_CHECK_S = 5.0  # after a connection opened: instruments that have not traded since are asked about
ROLLOVER_RETRY_S = 2.0
MESSAGES_PER_S_LEAST = 0.25
LIFETIME = "lifetime"  # cause of a replacement that was planned
OVERLAP_LEAD_S = 1.5  # frames of the old one are remembered so long before: a subscription may begin with the newest
OVERLAP_S = 3.0  # both connections deliver for so long after the new one has begun
OVERLAP_MOST_S = 30.0  # then the old one goes, unless the new one is acknowledged and only the old one brings data
OVERLAP_QUIET_S = 2.0  # without a duplicate, then the new one has brought all that the old one did before it went
OVERLAP_TAIL_MOST_S = 30.0
OVERLAP_FRAMES_MAX = 200_000  # frames remembered to drop what both connections bring
WEIGHT_SHARE = 0.8  # of a venue's request weight: the rest is for whoever else uses this IP address
SHUTDOWN_S = 2.0
BUDGETS = "_budgets"  # below the rings


class OverlapFilter:
    """Passes each frame once while two connections deliver the same: a frame is dropped when the other one brought it.

    What each connection brought beyond the other is counted by digest, so frames that are rightly sent twice on one
    connection pass twice. Books and trades would also be told apart by their ids; this serves the feeds without ids.
    """

    def __init__(self, venue: Venue, emit: Emit) -> None:
        self._decode, self._identity, self._emit = venue.decode, venue.identity, emit
        self._ahead: Counter[bytes] = Counter()  # frames of the first leg minus frames of the second one
        self._duplicate_at = time.monotonic()
        self._new_delivers = self._old_delivers = False

    def decode_of(self, sign: int) -> "FilteredDecode":
        """The decode function of the old (+1) or the new (-1) connection."""
        return FilteredDecode(self, sign)

    def passes(self, identity: bytes, sign: int) -> bool:
        digest = hashlib.blake2b(identity, digest_size=12).digest()
        seen = self._ahead[digest]
        self._ahead[digest] = seen + sign
        if not self._ahead[digest]:
            del self._ahead[digest]
        if len(self._ahead) > OVERLAP_FRAMES_MAX:
            self._emit.counters["overlap_overflow"] += 1
            self._ahead.clear()
        if seen * sign < 0:
            self._emit.counters["overlap_duplicate"] += 1
            self._duplicate_at = time.monotonic()
            return False
        return True

    @property
    def quiet(self) -> bool:
        """No duplicate for a while: neither connection is behind the other any more."""
        return time.monotonic() - self._duplicate_at > OVERLAP_QUIET_S

    def expect(self) -> None:
        """From now on the new connection should bring what the old one does."""
        self._old_delivers = False

    @property
    def delivers(self) -> bool:
        """The new connection has brought market data, or the old one brings none either."""
        return self._new_delivers or not self._old_delivers

    def decode(self, frame: bytes, sign: int) -> None:
        identity = self._identity(frame)
        if identity is not None:
            self._new_delivers |= sign < 0
            self._old_delivers |= sign > 0
        if identity is None or self.passes(identity, sign):
            self._decode(frame)


class FilteredDecode:
    """`decode` of one of two overlapping connections."""

    def __init__(self, overlap: OverlapFilter, sign: int) -> None:
        self._overlap, self._sign = overlap, sign

    def __call__(self, frame: bytes) -> None:
        self._overlap.decode(frame, self._sign)


class Connector:
    """Runs one connection until `stop` is set; `streams` is what it subscribes to."""

    def __init__(
        self,
        name: str,
        settings: ConnectorConfig,
        rings: Path,
        streams: Sequence[Stream],
        *,
        connector: str,
        number: int,
    ) -> None:
        """The process `name` is the connection `number` (from 0) of `connector`."""
        kind = venue_class(settings.exchange)
        self.name, self.settings = name, settings
        carriers = assignment(rings, connector, settings)
        self.emit = Emit(
            rings, name, kind.EXCHANGE, feeds_of(settings, streams), capacities=settings.capacity,
            siblings=carriers.siblings(name),
        )  # fmt: skip
        logs.identify(name, self.emit.epoch)
        options = venue_options(settings, kind)
        self.venue = kind(self.emit, options, streams)
        self.venue.resume()
        self.stop = asyncio.Event()
        self._limits = kind.LIMITS
        self._ws_url = (settings.ws_url or kind.WS_URL).rstrip("/")
        rest_urls = rest_hosts(settings, kind)
        self._tls: ssl.SSLContext | None = None
        if any(url.startswith(("wss", "https")) for url in (self._ws_url, *rest_urls)):
            self._tls = tls_context(Path(settings.ca_file) if settings.ca_file else None)
        limits, budgets, family = kind.LIMITS, rings / BUDGETS, kind.FAMILY or kind.NAME
        self._connects = Budget(budgets / f"{family}-connects", *limits.connects)
        weight = weight_budget(rings, kind)
        self._polled = not kind.WS_URL
        tries = 1 if self._polled else HTTP_TRIES  # polls come again by themselves, the next host may answer at once
        self._fetcher = Fetcher(
            self.emit, self.venue, rest_urls, weight, self._tls, tries=tries, wait_most_s=settings.reconnect_most_s
        )
        self._messages: Budget | None = None
        if limits.messages_per_ip[0]:
            self._messages = Budget(budgets / f"{family}-messages", *limits.messages_per_ip)
        self._budgets = [budget for budget in (self._connects, weight, self._messages) if budget is not None]
        self._answering = False  # a polled venue has answered since it was last given up
        followed = Followed(selection(settings), carriers, number)
        self._listing = Listing(self.venue, settings.instruments_s, followed, lambda: self._is_connected)
        self._clock = VenueClock(self.venue, settings.clock_s, lambda: self._fetcher.round_trip_ns)
        self._stats = StatsWriter(self.emit.directory)
        self._leg: Leg | None = None
        self._host_wanted: Reconnect | None = None  # another host, where the venue is polled
        self._woken = asyncio.Event()
        self._attempt = 0
        self._rows, self._data_ns, self._flowing_since_ns = self._rows_now(), 0, 0
        self._messages_per_s = limits.messages_per_s  # halved whenever the venue finds it too much
        self._send_tokens, self._sent_at = self._messages_per_s, time.monotonic()
        self._subscriptions = Subscriptions(self.venue, settings.silent_s or limits.silent_s, self._may_ask)
        self._ahead_since_ns: dict[str, int] = {}  # ticker -> since when its best prices change and its book does not
        self._started_ns = time.time_ns()
        self._state = "starting"
        self._last_error = ""
        # Feed and instrument (* = all) -> last row before the hole that is open now.
        self._holes_from_us = self._last_unsequenced_us() | self._last_of_siblings_us()

    # The life of the process

    async def run(self) -> None:
        """Collect until `stop` is set. Raises what is a bug; everything the outside does is handled here."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        gc.collect()
        give_back_memory()
        gc.freeze()
        gc.disable()  # nothing on the hot path makes cycles; a collection would stall it
        tasks = [
            loop.create_task(self._poll() if self._polled else self._keep_connected()),
            loop.create_task(self._fetcher.run(self._carry_out_current, self._before_answer)),
            loop.create_task(self._tick_for_ever()),
        ]
        stopped = loop.create_task(self.stop.wait())
        try:
            done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopped}:
                task.result()  # raises what ended it
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            await asyncio.gather(*tasks, stopped, return_exceptions=True)
            await self._shut_down()

    async def _keep_connected(self) -> None:
        while True:
            wait_s = 0.0
            try:
                if self._leg is None:
                    self._state = "connecting"
                    await self._connects.spend(1)
                    self._leg = await self._open(self.venue.decode)
                    self._tell_holes()
                await self._serve(self._leg)
            except RateLimited as error:
                self._connects.block(error.retry_after_s)
                self._note(error, "rate_limited")
            except Disconnected as error:
                self._note(error, "stale" if isinstance(error, Stale) else "disconnected")
            if self._leg is not None and self._leg.wanted is not None:
                wait_s = self._leg.wanted.wait_s
                self._slow_down(wait_s)
            self._drop_leg()
            self._state = "waiting to reconnect"
            await asyncio.sleep(wait_s + self._jitter_s())

    async def _poll(self) -> None:
        """The life of a venue without WebSocket: connected while it answers, stale when no answer is up to date.

        Pauses are the fetcher's: requests go on all the time, and what ends here begins anew with the next answer.
        """
        while True:
            self._state, self._answering, self._flowing_since_ns = "connecting", False, 0
            opened_ns = time.time_ns()
            for stream in self.venue.proof.values():
                stream.requested_ns = opened_ns
            self.venue.opened()
            self._carry_out(None)
            try:
                await self._watch_answers(opened_ns)
            except Stale as error:
                self._note(error, "stale")
                self._fetcher.next_host()
            except Disconnected as error:
                self._note(error, "disconnected")
            self._hold_on("reconnect")

    async def _watch_answers(self, opened_ns: int) -> None:
        """Raises Disconnected when no host answers any more, Stale when none has anything fresh, or as the venue wants."""
        stale_s, switch_at = self.settings.stale_s or self._limits.stale_s, 0.0
        while True:
            self._woken.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), TICK_S)
            if self._fetcher.is_down:
                if self._answering:
                    raise Disconnected(self._fetcher.last_failure)
                self._last_error = self._fetcher.last_failure
            # An answer that is up to date proves its streams anew, also where a price did not move and no row came.
            fresh_ns = max((state.acknowledged_ns for state in self.venue.proof.values()), default=0)
            if time.time_ns() - max(opened_ns, self._data_ns, fresh_ns) > stale_s * 1e9 and self.venue.streams:
                raise Stale(f"no fresh answer for {stale_s:g} s")
            wanted, self._host_wanted = self._host_wanted, None
            if wanted is not None and not wanted.overlap:
                await asyncio.sleep(wanted.wait_s + self._jitter_s())
                raise Disconnected(wanted.cause)
            if wanted is not None and time.monotonic() > switch_at:
                self._note(Stale(wanted.cause), "host_behind")
                self._fetcher.next_host()
                switch_at = time.monotonic() + self._jitter_s()

    def _before_answer(self) -> None:
        """The first answer of a polled venue, before its rows: what was missed until now is told ahead of them."""
        if self._polled and not self._answering:
            self._answering, self._state = True, "connected"
            self.emit.counters["connections"] += 1
            self._tell_holes()

    def _jitter_s(self) -> float:
        """The wait before the next attempt: full jitter below a cap that doubles with each attempt."""
        most_s = min(self.settings.reconnect_most_s, BACKOFF_FIRST_S * 2.0**self._attempt)
        self._attempt = min(self._attempt + 1, 30)
        return random.uniform(0, most_s)  # noqa: S311 (jitter, not secrecy)

    async def _open(self, decode: object) -> Leg:
        legs: list[Leg] = []

        def make() -> Leg:
            legs.append(Leg(self.emit, decode, self._on_packet))  # type: ignore[arg-type]
            return legs[-1]

        leg = await open_leg(self._ws_url + self.venue.ws_path(), make, self._tls, self.venue.RATE_LIMITED)
        self.emit.counters["connections"] += 1
        self.emit.connection_opened()
        for stream in self.venue.proof.values():
            stream.requested_ns = time.time_ns()
        self.venue.opened()
        self._carry_out(leg)
        return leg

    async def _serve(self, leg: Leg) -> None:
        """Watch one connection until it ends or is to be replaced. Returns after a new one has taken over."""
        self._state = "connected"
        self._data_ns, self._flowing_since_ns = time.time_ns(), 0
        self._ahead_since_ns = {}
        stale_s = self.settings.stale_s or self._limits.stale_s
        ends_at, again_at = self._end_of(), 0.0
        while True:
            await self._wait(leg, TICK_S)
            self._raise_if_over(leg)
            if time.time_ns() - self._data_ns > stale_s * 1e9 and self.venue.streams:
                raise Stale(f"no data for {stale_s:g} s")
            due = leg.wanted
            if due is None and ends_at and time.monotonic() > ends_at:
                due = Reconnect(LIFETIME, overlap=True)
            if due is None or (due.overlap and time.monotonic() < again_at):
                continue
            leg.wanted = due
            if not (due.overlap and self.venue.OVERLAPS):
                raise Disconnected(due.cause)
            try:
                leg = self._leg = await self._replace(leg, due.cause)
            except (Disconnected, RateLimited) as error:
                if leg.closed.is_set():
                    raise
                # The old connection still delivers: it stays, and the next attempt is spread as any other one.
                self._note(error, "rollover_failed")
                wait_s = error.retry_after_s if isinstance(error, RateLimited) else 0.0
                again_at = time.monotonic() + wait_s + self._jitter_s()
                continue
            ends_at = self._end_of()

    def _slow_down(self, wait_s: float) -> None:
        """The venue has named a wait: what was sent was too much for it."""
        if wait_s:
            self._messages_per_s = max(MESSAGES_PER_S_LEAST, self._messages_per_s / 2)

    def _end_of(self) -> float:
        """When (monotonic) a connection that begins now is to be replaced; 0 = never."""
        if self.settings.lifetime_s:
            return time.monotonic() + self.settings.lifetime_s
        if not self._limits.lifetime_s:
            return 0.0
        early_s = ROLLOVER_BEFORE_END_S * random.uniform(0.5, 1.0)  # noqa: S311 (spread, not secrecy)
        return time.monotonic() + self._limits.lifetime_s - early_s

    async def _replace(self, old: Leg, cause: str) -> Leg:
        """Open the next connection, let both deliver for a while, close the old one. No row is lost or doubled."""
        self._state = f"replacing ({cause})"
        self.emit.counters["rollovers"] += 1
        overlap = OverlapFilter(self.venue, self.emit)
        self.venue.overlap_begins()
        old.decode = overlap.decode_of(+1)
        new: Leg | None = None
        try:
            # A venue that gives notice may be gone soon: then there is no time to spare.
            begins = time.monotonic() + (OVERLAP_LEAD_S if cause == LIFETIME else 0.0)
            while time.monotonic() < begins and not old.closed.is_set():
                await self._wait(old, TICK_S)
            new = await self._open_beside(old, overlap.decode_of(-1))
            self._leg = new
            await self._overlap(old, new, overlap)
        except (Disconnected, RateLimited):
            if new is not None:
                new.close()
            old.decode, self._leg = self.venue.decode, old
            raise
        finally:
            self.venue.overlapping = False
        old.close()
        self.venue.older_left()
        # What the old one brought may still be on its way on the new one, so the filter stays for a while.
        tail_until = time.monotonic() + OVERLAP_TAIL_MOST_S
        while not overlap.quiet and time.monotonic() < tail_until and not new.closed.is_set():
            await self._wait(new, TICK_S)
        new.decode = self.venue.decode
        self._raise_if_over(new)
        self._state = "connected"
        return new

    async def _overlap(self, old: Leg, new: Leg, overlap: OverlapFilter) -> None:
        """Until the new connection has shown for a while that it delivers, or the old one ends by itself.

        Acknowledgements do not show it: Disconnected when the old one brings market data and the new one none.
        """
        deadline, flowing_since, is_proven = time.monotonic() + OVERLAP_MOST_S, 0.0, False
        while time.monotonic() < deadline and not old.closed.is_set():
            await self._wait(new, TICK_S)
            if new.wanted is not None and not new.wanted.overlap:  # it is not to be had for now, the old one is
                self._slow_down(new.wanted.wait_s)
                raise RateLimited(new.wanted.wait_s, new.wanted.cause)
            self._raise_if_over(new)
            if old.crash is not None:
                raise old.crash
            if not is_proven and new.packets and self._proven():
                is_proven = True
                overlap.expect()
            if not is_proven or not overlap.delivers:
                flowing_since = 0.0
            elif not flowing_since:
                flowing_since = time.monotonic()
            elif time.monotonic() - flowing_since > OVERLAP_S:
                return
        if is_proven and not overlap.delivers and not old.closed.is_set():
            raise Disconnected("the new connection is acknowledged and brings nothing")
        if not flowing_since:  # then the two were not open side by side
            self._holes_from_us = {**self._last_unsequenced_us(), **self._holes_from_us}
            self._tell_holes()
            self.venue.not_overlapped()

    async def _open_beside(self, old: Leg, decode: FilteredDecode) -> Leg:
        """Open the next connection, within the venue's limits, trying again as long as the old one lives.

        All connectors of a machine may be given notice at once, so even that is no reason to hurry past the limits.
        """
        while True:
            while wait_s := self._connects.take(1):
                await self._wait(old, min(wait_s, ROLLOVER_RETRY_S))
                self._raise_if_over(old)
            try:
                return await self._open(decode)
            except RateLimited as error:
                self._connects.block(error.retry_after_s)
                self._note(error, "rollover_failed")
            except Disconnected as error:
                self._note(error, "rollover_failed")
                await self._wait(old, ROLLOVER_RETRY_S)
                self._raise_if_over(old)

    def _raise_if_over(self, leg: Leg) -> None:
        if leg.crash is not None:
            raise leg.crash
        if leg.closed.is_set():
            raise Disconnected(leg.cause)

    async def _wait(self, leg: Leg, seconds: float) -> None:
        """Until the connection ends or something is wanted, at most so long."""
        closed = asyncio.ensure_future(leg.closed.wait())
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            await asyncio.wait([closed, woken], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
            woken.cancel()
        self._woken.clear()

    def _drop_leg(self) -> None:
        if self._leg is None:
            return
        self._leg.close()
        self._leg = None
        self._hold_on("reconnect")

    def _hold_on(self, cause: str) -> None:
        """Nothing comes any more: whatever is missed from here on is a hole.

        One that is still open is told up to now: rows may have come behind it, and the next life, should this one end
        before the next connection, knows only the last of them.
        """
        self._tell_holes()
        self._holes_from_us = {**self._last_unsequenced_us(), **self._holes_from_us}
        self.venue.disconnected(cause)

    def _note(self, error: Exception, kind: str) -> None:
        self.emit.counters[kind] += 1
        self._last_error = f"{type(error).__name__}: {error}"
        log.warning("%s: %s", self.name, self._last_error)

    async def _shut_down(self) -> None:
        """Say goodbye to the venue, publish what is held, close the rings."""
        self._state = "stopped"
        self._subscriptions.finish()
        if self._leg is not None or self._answering:
            self._tell_holes()
        if self._leg is not None and not self._leg.closed.is_set():
            for text in self.venue.closing():
                self._leg.send(text)
            self._leg.close()
            try:
                await asyncio.wait_for(self._leg.closed.wait(), SHUTDOWN_S)
            except TimeoutError:
                log.warning("%s: the venue did not end the connection within %g s", self.name, SHUTDOWN_S)
        for _ in self.venue.finish():
            await asyncio.sleep(0)
        self.emit.tick()
        self.emit.close()
        self._publish()

    # What the venue wants

    def _on_packet(self, leg: Leg) -> None:
        if self.venue.wants:
            self._carry_out(leg)

    @property
    def _is_connected(self) -> bool:
        return self._leg is not None or self._polled

    def _may_ask(self) -> bool:
        """One connection is open and has nothing left to send, so what is subscribed anew comes at once."""
        if self._leg is None:
            return self._answering
        return not (self._leg.outbox or self._leg.closed.is_set() or self.venue.overlapping or self._leg.wanted)

    def _carry_out_current(self) -> None:
        if self._is_connected:
            self._carry_out(self._leg)

    def _carry_out(self, leg: Leg | None) -> None:
        wants = self.venue.wants
        while wants:
            want = wants.popleft()
            if isinstance(want, Fetch):
                self._fetcher.want(want)
            elif isinstance(want, Reconnect):
                if leg is None:
                    self._host_wanted = want
                else:
                    leg.wanted = want
                self._woken.set()
            elif leg is None:
                raise AssertionError(f"{self.settings.exchange} is polled and wants to send {want.text!r}")
            elif want.urgent:
                leg.send(want.text)
            else:
                leg.outbox.append(want.text)
        if leg is not None:
            self._send_due(leg)

    def _send_due(self, leg: Leg) -> None:
        """Send what waits, as fast as the venue takes messages."""
        now, rate = time.monotonic(), self._messages_per_s
        self._send_tokens = min(max(1.0, rate), self._send_tokens + (now - self._sent_at) * rate)
        self._sent_at = now
        while leg.outbox and self._send_tokens >= 1:
            if self._messages is not None and self._messages.take(1):
                return  # another connector of this machine has used it up; the next tick asks again
            self._send_tokens -= 1
            leg.send(leg.outbox.popleft())

    # Housekeeping

    async def _tick_for_ever(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            ticks += 1
            self._look_for_data()
            self.emit.tick()
            self._clock.look_for_step()
            leg = self._leg
            if leg is not None or self._polled:
                self.venue.tick(time.time_ns())
                self._listing.tick()
                self._clock.tick()
                if leg is not None and not leg.tails_checked and time.time_ns() - leg.opened_ns > TAIL_CHECK_S * 1e9:
                    leg.tails_checked = True
                    self.venue.check_tails()
                self._carry_out(leg)
            if ticks % STATS_EVERY_TICKS == 0:
                self._look_for_silent_books()
                self._subscriptions.tick()
                self._carry_out_current()
                self._publish()

    def _rows_now(self) -> int:
        """Rows that the streams brought."""
        published = sum(ring.next for name, ring in self.emit.rings.items() if name not in ALWAYS_ON)
        return published - self.emit.fetched_rows

    def _look_for_data(self) -> None:
        """Only rows count as data: heartbeats, replies and refused frames do not keep a connection."""
        rows, now = self._rows_now(), time.time_ns()
        if rows == self._rows:
            return
        self._rows, self._data_ns = rows, now
        self._flowing_since_ns = self._flowing_since_ns or now
        if now - self._flowing_since_ns > DATA_FLOWS_S * 1e9:
            self._attempt = 0
        if self._holes_from_us and self._proven():
            self._tell_holes()
            self._holes_from_us = {}

    def _look_for_silent_books(self) -> None:
        """A changing best price is a changed book: one whose changes stay away has lost its stream.

        Other streams may rightly be silent for long, so only this one is held against a sibling.
        """
        now, emit = time.time_ns(), self.emit
        if "orderbook_l2" not in emit.rings:  # then a book is only kept for its best prices
            return
        patience_ns = int((self.settings.stale_s or self._limits.stale_s) * 1e9)
        for ticker, book in list(self.venue.books.items()):
            if book.state != LIVE or emit.last_row_ns("bbo", ticker) <= emit.last_row_ns("orderbook_l2", ticker):
                self._ahead_since_ns.pop(ticker, None)
            elif now - self._ahead_since_ns.setdefault(ticker, now) > patience_ns:
                self._subscriptions.silent_book(ticker)

    def _proven(self) -> bool:
        """Every subscription is confirmed on the connection that is open now, or refused for good."""
        if self._leg is None and not self._polled:
            return False
        return all(s.is_acknowledged or s.refused for s in self.venue.proof.values())

    def _tell_holes(self) -> None:
        """Record what the feeds without ids may have missed: once before the first row behind the hole, so that even
        a crash right then leaves no silent hole, and once more when it is known where it ends.
        """
        cause = "reconnect" if self.emit.counters["connections"] > 1 else "restart"
        if self._holes_from_us:  # the rows are of now, not of a packet that may never have come
            self.emit.packet(time.time_ns(), self.emit.clock())
        for (feed, ticker), from_us in self._holes_from_us.items():
            self.emit.gap(feed, ticker, from_time=from_us, to_time=time.time_ns() // 1000, cause=cause)

    def _last_unsequenced_us(self) -> dict[tuple[str, str], int]:
        """How far each feed without ids reaches that has a row from a stream."""
        return {(feed, "*"): us for feed in self._unsequenced() if (us := self.emit.newest_us(feed))}

    def _last_of_siblings_us(self) -> dict[tuple[str, str], int]:
        """The same of each instrument that this connection takes over from another one."""
        last, wanted = dict[tuple[str, str], int](), {stream.ticker for stream in self.venue.streams}
        for feed in self._unsequenced():
            for tickers, (codes, *times) in self.emit.taken_over(wanted, feed, "timestamp", "rcv_timestamp"):
                for code in set(codes.tolist()):
                    last[feed, tickers[code]] = min(int(column[codes == code].max()) for column in times)
        return last

    def _unsequenced(self) -> list[str]:
        return [name for name in self.emit.rings if name not in (*SEQUENCED, *ALWAYS_ON)]

    def _publish(self) -> None:
        emit, venue = self.emit, self.venue
        invalid = sorted(t for t, book in venue.books.items() if book.state != "live")
        if held := sum(budget.held for budget in self._budgets):
            emit.counters["budget_held"] = held
        shared = Counter(stream.name for stream in venue.streams)  # some topics carry several instruments
        self._stats.publish(
            {
                "role": "connector",
                "name": self.name,
                "exchange": self.settings.exchange,
                "state": self._state,
                "started_ns": self._started_ns,
                "data_ns": self._data_ns,
                "last_error": self._last_error,
                "packets": self._leg.packets if self._leg is not None else 0,
                "books": len(venue.books),
                "trades_unproven": sum(trades.unproven for trades in venue.trade_watches),
                "books_invalid": invalid[:100],
                "books_invalid_count": len(invalid),
                "fetches_waiting": self._fetcher.waiting,
                "fetch_blocked_until_ns": self._fetcher.blocked_until_ns,
                "clock": self._clock.snapshot(),
                "rss_bytes": resident_bytes(),
                "notes": dict(venue.notes),
                "streams": {
                    (s.name if shared[s.name] == 1 else f"{s.name} {s.ticker}"): {
                        "feed": s.feed,
                        "ticker": s.ticker,
                        "requested_ns": proof.requested_ns,
                        "acknowledged_ns": proof.acknowledged_ns,
                        "first_data_ns": proof.first_data_ns,
                        "silent_ns": proof.silent_ns,
                        "refused": proof.refused,
                        "data_ns": venue.last_data_ns(s),
                    }
                    for s in venue.streams
                    if (proof := venue.proof.get(s.name)) is not None
                },
                **emit.snapshot(),
            }
        )


def weight_budget(rings: Path, kind: type[Venue], *, visitor: bool = False) -> Budget:
    """What all processes of this machine that use these rings may request of a family of venues."""
    allowed, per_s = kind.LIMITS.weight
    path = rings / BUDGETS / f"{kind.FAMILY or kind.NAME}-weight"
    return Budget(path, allowed * WEIGHT_SHARE, per_s, visitor=visitor)


def rest_hosts(settings: ConnectorConfig, kind: type[Venue]) -> list[str]:
    """REST bases that are asked, the first one until it fails."""
    if settings.rest_url:
        return [settings.rest_url, *settings.rest_fallbacks]
    return [kind.REST_URL, *(settings.rest_fallbacks or kind.REST_FALLBACKS)]


def feeds_of(settings: ConnectorConfig, streams: Sequence[Stream]) -> list[str]:
    """Feeds of which these streams bring rows."""
    brought = {feed for stream in streams for feed in (stream.feed, *stream.also)}
    return [feed for feed in settings.feeds if feed in brought]


def selection(settings: ConnectorConfig) -> Selection:
    """Which instruments a connector's configuration means."""
    return Selection(*(tuple(getattr(settings, name)) for name in ("tickers", "kinds", "bases", "quotes")))


def assignment(rings: Path, connector: str, settings: ConnectorConfig) -> Assignment:
    """Which connection carries which instrument of a connector."""
    kind = venue_class(settings.exchange)
    return Assignment(rings, connector, kind, settings.feeds, venue_options(settings, kind))


def venue_options(settings: ConnectorConfig, kind: type[Venue]) -> Options:
    """What a connector's configuration says to its venue, with credentials from where they are kept."""
    unknown = [feed for feed in settings.feeds if feed not in kind.FEEDS]
    if unknown:
        raise ConfigError(f"feeds: {', '.join(unknown)} not offered by {kind.NAME}; it has {', '.join(kind.FEEDS)}")
    strange = [interval for interval in settings.intervals if interval not in kind.INTERVALS]
    if "candles" in settings.feeds and strange:
        raise ConfigError(
            f"intervals: {', '.join(strange)} not offered by {kind.NAME}; it has {', '.join(kind.INTERVALS)}"
        )
    if settings.trade_channel and settings.trade_channel not in kind.TRADE_CHANNELS:
        choice = ", ".join(kind.TRADE_CHANNELS) or "none to choose"
        raise ConfigError(f"trade_channel: {settings.trade_channel!r} not offered by {kind.NAME}; it has {choice}")
    if settings.book_interval and settings.book_interval not in kind.BOOK_INTERVALS:
        choice = ", ".join(kind.BOOK_INTERVALS) or "none to choose"
        raise ConfigError(f"book_interval: {settings.book_interval!r} not offered by {kind.NAME}; it has {choice}")
    if settings.book_depth > kind.BOOK_DEPTH_MAX:
        most = kind.BOOK_DEPTH_MAX
        allowed = f"0 to {most}" if most else "0: its books always come whole"
        raise ConfigError(f"book_depth: {settings.book_depth} not offered by {kind.NAME}; allowed is {allowed}")
    return Options(
        ws_url=settings.ws_url,
        rest_url=settings.rest_url,
        book_depth=settings.book_depth,
        book_interval=settings.book_interval,
        intervals=tuple(settings.intervals),
        trade_channel=settings.trade_channel,
        backfill=settings.backfill,
        poll_s=settings.poll_s,
        late_s=settings.late_s,
        credentials=config.credentials(kind.NAME, kind.CREDENTIALS, settings.credentials_file),
    )


def pin(cpu: int | None) -> None:
    """Pin this process to a CPU."""
    if cpu is not None:
        os.sched_setaffinity(0, [cpu])


def resident_bytes() -> int:
    """Memory of this process, its rings included; psutil says it too, and is 2 MB more of it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def give_back_memory() -> None:
    """Return to the system what start-up has used and let go: 2 MB of imports, more where lists of instruments are long."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def lock_memory() -> None:
    """Keep what this process has touched in memory, its rings included, where the limit was lifted for that.

    Units and compose file do so; without it a machine that is short of memory lets the next message wait for its disk.
    """
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
            log.warning("memory is not locked: %s", os.strerror(ctypes.get_errno()))


def run_connector(
    name: str, settings: ConnectorConfig, rings: Path, streams: Sequence[Stream],
    *, connector: str, number: int,
) -> None:  # fmt: skip
    """The process of one connector; returns after a stop signal. RingError or ConfigError: it cannot run as configured.

    `connector` and `number` as for `Connector`.
    """

    async def run() -> None:  # the connector is made inside the loop
        await Connector(name, settings, rings, streams, connector=connector, number=number).run()

    pin(settings.cpu)
    lock_memory()
    asyncio.run(run())
