"""Subscriptions: whether every stream was acknowledged and delivers, and what is done about one that does not.

Used by `connector.py`. Silence alone proves nothing, illiquid instruments are silent for hours: a stream is called silent
when REST shows something that it should have brought. Then it is left and taken anew, and if that does not help, the
connection is replaced. What the silence cost is told in `gaps` (feeds with ids tell it by themselves).
"""

import time
from collections.abc import Callable
from functools import partial

import msgspec

from mdcollector.continuity import TradeIds, TradeSync
from mdcollector.emit import Emit
from mdcollector.exchanges import REASON_CHARS_MAX, Reconnect, Stream, StreamState, Venue
from mdcollector.records import Flag

ACKNOWLEDGED_WITHIN_S = 15.0  # after the request was sent; then it is asked for again
ASKED_MOST = 3  # then on a new connection
NEWER_BY_S = (
    3.0  # REST must show something so much younger than the last data; and so long the stream may still bring it
)
PROBE_EVERY_S = 1.0
PROBE_WEIGHT_SHARE = 0.05  # of the venue's request weight
PROBE_MOST_S = 120.0  # a probe without an answer for so long is forgotten
BACKOFF_MOST = 4  # the wait doubles so often while nothing new shows
SEQUENCED = ("trades", "orderbook_l2")  # feeds whose ids tell by themselves what was missed
_NO_TIME = int(Flag.TIME_LOCAL | Flag.REPAIRED | Flag.SNAPSHOT)


class Subscriptions:
    """Watches the streams of one venue; `silent_s` without data, then a stream is checked.

    `may_ask`: a connection is open, only one, and everything that was to be sent is sent.
    """

    def __init__(self, venue: Venue, silent_s: float, may_ask: Callable[[], bool]) -> None:
        self._venue, self._emit, self._may_ask = venue, venue.emit, may_ask
        self._silent_ns = int(silent_s * 1e9)
        self._ack_ns = int(min(ACKNOWLEDGED_WITHIN_S, silent_s) * 1e9)
        self._newer_ns = int(min(NEWER_BY_S, silent_s) * 1e9)
        self._probing, self._probe_begun_ns, self._next_probe_ns = "", 0, 0
        self._busy_ns = 0  # when something was still to be sent last: until then no answer can be late

    def tick(self) -> None:
        """Look at every stream; called some times a second."""
        now, may_ask = time.time_ns(), self._may_ask()
        if not may_ask:
            self._busy_ns = now
        unacknowledged, due = list[str](), list[tuple[int, Stream]]()
        for stream in list(self._venue.streams):
            state = self._venue.proof.get(stream.name)
            if state is None or state.refused:
                continue
            data_ns = self._venue.last_data_ns(stream)
            self._note_data(stream, state, data_ns)
            if not may_ask or data_ns > now - self._silent_ns:
                continue
            if not state.is_acknowledged and state.first_data_ns <= state.requested_ns:
                if now - max(state.requested_ns, self._busy_ns) > self._ack_ns:
                    unacknowledged.append(stream.name)
            elif state.suspect_ns:
                if now > state.suspect_ns:
                    self._silent(stream, state, data_ns, now)
            elif now > max(state.probe_ns, state.requested_ns + self._silent_ns):
                due.append((state.probe_ns, stream))
        if unacknowledged:
            self._ask_again(list(dict.fromkeys(unacknowledged)), now)  # some topics carry several instruments
        if due:
            self._probe(min(due, key=lambda one: one[0])[1], now)

    def _note_data(self, stream: Stream, state: StreamState, data_ns: int) -> None:
        if data_ns > state.suspected_at_ns:  # it brought something after all
            state.suspect_ns = 0
        if data_ns > state.requested_ns:
            if state.first_data_ns < state.requested_ns:
                state.first_data_ns, state.asked = data_ns, 0
            if state.silent_ns:
                state.silent_ns = state.quiet = 0
                self._emit.counters["stream_recovered"] += 1
                self._venue.notes.pop(f"silent {stream.name}", None)
        if state.hole_us and not state.hole_told:
            state.hole_told = True
            self._tell_hole(stream, state)
        elif state.hole_us and state.is_acknowledged and not state.silent_ns:
            self._tell_hole(stream, state)
            state.hole_us, state.hole_told = 0, False
            for trades in self._trades_of(stream):
                if trades.unproven:
                    trades.want_tail()

    def _trades_of(self, stream: Stream) -> list[TradeSync | TradeIds]:
        """What watches the trades that this stream brings, of all instruments of its topic, with a counter or without."""
        if stream.feed != "trades":
            return []
        tickers = {other.ticker for other in self._venue.streams if other.name == stream.name}
        return [trades for trades in self._venue.trade_watches if trades.instrument.ticker in tickers]

    def _tell_hole(self, stream: Stream, state: StreamState) -> None:
        """At once, so that even a crash leaves no silent hole; again while it lasts; and when it ends.

        A hole of silence ends with the first data, any other one when the stream is acknowledged.
        """
        now = time.time_ns()
        self._emit.packet(now, self._emit.clock())
        for feed in (stream.feed, *stream.also):
            if feed in self._emit.rings and feed not in SEQUENCED:
                self._emit.gap(
                    feed, stream.ticker, from_time=state.hole_us, to_time=now // 1000, cause=state.hole_cause
                )

    def _ask_again(self, names: list[str], now: int) -> None:
        venue = self._venue
        self._emit.counters["stream_unacknowledged"] += len(names)
        self._emit.asked_again()
        for name in names:
            state = venue.proof[name]
            state.requested_ns, state.asked = now, state.asked + 1
        if any(venue.proof[name].asked > ASKED_MOST for name in names):
            for name in names:
                venue.proof[name].asked = 0
            venue.wants.append(Reconnect(f"{len(names)} streams not acknowledged, {names[0]} among them", overlap=True))
        else:
            venue.subscribe(names)

    def finish(self) -> None:
        """The connector ends: holes that are open now end here."""
        for stream in self._venue.streams:
            state = self._venue.proof.get(stream.name)
            if state is not None and state.hole_us:
                self._tell_hole(stream, state)

    # Silence

    def _probe(self, stream: Stream, now: int) -> None:
        if now < self._next_probe_ns or (self._probing and now - self._probe_begun_ns < PROBE_MOST_S * 1e9):
            return
        venue, state = self._venue, self._venue.proof[stream.name]
        state.probe_ns = now + self._wait_ns(state)
        fetch = venue.probe(stream)
        if fetch is None:
            return
        weight, per_s = venue.LIMITS.weight
        self._next_probe_ns = now + int(max(PROBE_EVERY_S, fetch.weight * per_s / (PROBE_WEIGHT_SHARE * weight)) * 1e9)
        self._probing, self._probe_begun_ns = stream.name, now
        self._emit.counters["probes"] += 1
        venue.wants.append(
            msgspec.structs.replace(
                fetch,
                key=f"probe {stream.name}",
                answer=partial(self._answered, stream, state),
                failed=partial(self._not_answered, stream),
            )
        )

    def _wait_ns(self, state: StreamState) -> int:
        return self._silent_ns << min(state.quiet, BACKOFF_MOST)

    def _answered(self, stream: Stream, state: StreamState, body: bytes) -> None:
        newest_us = self._venue.newest_us(stream, body)
        self._probing, now = "", time.time_ns()
        since_ns = max(self._venue.last_data_ns(stream), state.requested_ns)
        if newest_us and (newest_us - (ahead_us(self._emit) or 0)) * 1000 > since_ns + self._newer_ns:
            # What is that young may still be on its way.
            state.suspected_at_ns, state.suspect_ns = now, now + self._newer_ns
        else:
            state.quiet += 1
            state.probe_ns = now + self._wait_ns(state)

    def _not_answered(self, stream: Stream, status: int, body: bytes) -> None:
        self._probing = ""
        self._emit.counters["probe_refused"] += 1
        text = f"HTTP {status} {body[:REASON_CHARS_MAX].decode(errors='replace')}"
        self._emit.samples["probe_refused"] = f"{stream.name}: {text}"

    def silent_book(self, ticker: str) -> None:
        """Another stream shows that the book of this instrument changes without its stream saying so."""
        for stream in self._venue.streams:
            state = self._venue.proof.get(stream.name)
            if stream.feed == "orderbook_l2" and stream.ticker == ticker and state is not None and self._may_ask():
                now = time.time_ns()
                if state.is_acknowledged and now > state.probe_ns:
                    self._silent(stream, state, self._venue.last_data_ns(stream), now)

    def _silent(self, stream: Stream, state: StreamState, data_ns: int, now: int) -> None:
        """It is proven: take the stream anew, or when that was done already, the connection."""
        venue, again = self._venue, bool(state.silent_ns)
        self._emit.counters["stream_silent"] += 1
        state.suspect_ns = 0
        state.quiet += again
        state.probe_ns = now + self._wait_ns(state)
        if again:
            state.hole_told = False
            venue.wants.append(Reconnect(f"{stream.name} is silent", overlap=True))
            return
        state.silent_ns = data_ns or state.requested_ns
        state.hole_us, state.hole_cause, state.hole_told = state.silent_ns // 1000, "silent", False
        venue.notes[f"silent {stream.name}"] = "acknowledged, but it brings nothing that REST shows"
        if stream.feed == "orderbook_l2" and stream.ticker in venue.books:
            venue.books[stream.ticker].disconnected("silent")
        for trades in self._trades_of(stream):
            trades.disconnected("silent")
        state.requested_ns = now
        venue.unsubscribe([stream.name])
        venue.subscribe([stream.name])


def ahead_us(emit: Emit) -> int | None:
    """How far the exchange's clock is ahead of ours at least, by the newest rows: event time minus time of receipt."""
    found = []
    for feed in ("trades", "orderbook_l2", "bbo", "tickers"):
        ring = emit.rings.get(feed)
        if ring is not None and ring.next:
            row = ring.recent_rows(ring.next - 1)[-1]
            if not row["flags"] & _NO_TIME:
                found.append(int(row["timestamp"]) - int(row["rcv_timestamp"]))
    return max(found, default=None)
