"""mdcompare: holds the rings of a connector against the feed itself, seen over an own connection beside it.

Run by hand, by the demo and by CI. It decodes the feed with the few lines of plain `json` in `tools.venues`, never with
the connector's decoder, and only reads the rings.
"""

import asyncio
import csv
import itertools
import logging
import math
import random
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import click
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from mdcollector import logs
from mdcollector.config import connector_of
from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS, EXIT_USAGE, Disconnected, RingError
from mdcollector.options import Finite
from mdcollector.records import GAPS, Flag
from mdcollector.ring import RingReader
from mdcollector.stats import PAGE_NAME, clock_text, read_stats, venue_clock
from tools.live import USER_AGENT, LiveFeed, fetch, log_options, stop_on_signals
from tools.venues import (
    CANDLES_COMPARED,
    BookChange,
    Candle,
    Choice,
    Quote,
    Seen,
    Trade,
    Venue,
    load_venue,
    text_of,
    venue_names,
)

PENDING_MAX = 500_000  # rows of both sides that wait for their counterpart; beyond it the oldest are judged at once
RECENT_IDS = 256  # matched ids that are remembered per instrument and feed, to tell a duplicate from an extra row
RANGES_MAX = 1000  # holes remembered per instrument and feed
DETAILS_MAX = 100_000  # rows of differences.csv; all are counted
ROWS_PER_READ = 512  # small, because frames of the own connection wait while rows are looked at
POLL_S = 0.02
DRAIN_S = 3.0  # how long the ring may take to show what the own connection has already seen
RECONNECTS_MAX = 5  # failed attempts in a row
BACKOFF_S_MAX = 10.0
TABLE_ROWS_MAX = 40
TEXT_MAX = 200
PLAIN_WIDTH = 160  # of the table where there is no terminal to ask

Levels = tuple[tuple[int, float, float], ...]
Values = tuple[float, ...] | Levels

log = logging.getLogger("mdcompare")


class WrongUse(Exception):
    """Nothing can be compared; the text says why. Exit code 2."""


class Spread:
    """Percentiles of signed microseconds in bounded memory: buckets of about 3 % width."""

    __slots__ = ("_buckets", "count")

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = 0

    def add(self, value_us: float) -> None:
        size = abs(value_us)
        bucket = 0 if size < 1 else int(math.log2(size) * 24) + 1
        self._buckets[bucket if value_us >= 0 else -bucket] += 1
        self.count += 1

    def percentile(self, share: float) -> float | None:
        if not self.count:
            return None
        rank, passed = math.ceil(share * self.count), 0
        for bucket, count in sorted(self._buckets.items()):
            passed += count
            if passed >= rank:
                size = 0.0 if bucket == 0 else 2 ** ((abs(bucket) - 0.5) / 24)
                return round(size if bucket >= 0 else -size, 1)
        raise AssertionError("the buckets hold fewer values than were counted")


@dataclass(slots=True)
class Waiting:
    """A row or message that one side has shown."""

    order: int
    values: Values
    time_us: int  # of the exchange; -1 where it gives none
    rcv_us: int
    visible_us: float = 0.0
    flags: int = 0


@dataclass
class Count:
    """Result of one instrument of one feed."""

    own: int = 0
    ring: int = 0
    identical: int = 0
    different: int = 0
    missing: int = 0
    extra: int = 0
    duplicate: int = 0
    explained: int = 0
    edge_own: int = 0
    edge_ring: int = 0
    snapshots: int = 0

    @property
    def matched(self) -> int:
        return self.identical + self.different

    @property
    def findings(self) -> int:
        return self.different + self.missing + self.extra + self.duplicate


@dataclass(frozen=True)
class Hole:
    """A row of the `gaps` ring."""

    feed: str
    first_id: int
    last_id: int
    from_us: int
    to_us: int
    cause: str


@dataclass
class Live:
    """When both sides were live, by this machine's clock; edges around it are not differences."""

    edge_us: int
    since_us: int | None = None
    until_us: int = 0
    outages: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=RANGES_MAX))

    def covers(self, rcv_us: int) -> bool:
        if self.since_us is None or not self.since_us + self.edge_us <= rcv_us <= self.until_us - self.edge_us:
            return False
        return not self.own_was_away(rcv_us)

    def own_was_away(self, rcv_us: int) -> bool:
        return any(low - self.edge_us <= rcv_us <= high + self.edge_us for low, high in self.outages)


class Matcher:
    """Both sides of one instrument of one feed. What matches is released at once."""

    def __init__(self, feed: str, ticker: str, report: "Report") -> None:
        self.feed, self.ticker, self._report = feed, ticker, report
        self.count = Count()
        self.first_common: int | None = None
        self.last_common: int | None = None
        self.own_pending: OrderedDict[str, Waiting] = OrderedDict()
        self.ring_pending: OrderedDict[str, Waiting] = OrderedDict()
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._repeats: Counter[str] = Counter()  # copies in the ring minus, for quotes, copies on the wire
        self._own_last = -1
        self._own_holes: deque[tuple[int, int]] = deque(maxlen=RANGES_MAX)
        self._ring_last = -1
        self._ring_snapshots: deque[tuple[int, int, bool]] = deque(maxlen=RANGES_MAX)
        self.rcv_diff, self.visible_diff = Spread(), Spread()
        self.exchange_to_own, self.exchange_to_ring = Spread(), Spread()

    def own(self, key: str, seen: Waiting, prev: int) -> None:
        """The own connection has shown this; `prev` is the id before it by the venue's words, -1 = unknown."""
        if prev >= 0 and 0 <= self._own_last < prev:
            self._own_holes.append((self._own_last + 1, prev))
        self._own_last = max(self._own_last, seen.order)
        if key in self._recent or key in self.own_pending:
            if self.feed == "bbo":  # quotes carry no counter: what the venue sends twice stands twice in the ring
                self._repeat(key, -1)
            return
        self.count.own += 1
        other = self.ring_pending.pop(key, None)
        if other is not None:
            self._match(key, seen, other)
            return
        self.own_pending[key] = seen
        self._report.pending += 1
        self._keep_bounded()

    def ring(self, key: str, row: Waiting) -> None:
        """The ring has shown this."""
        if key in self._recent or key in self.ring_pending:
            self._repeat(key, 1)
            return
        self.count.ring += 1
        self._ring_last = max(self._ring_last, row.order)
        other = self.own_pending.pop(key, None)
        if other is not None:
            self._match(key, other, row)
            return
        self.ring_pending[key] = row
        self._report.pending += 1
        self._keep_bounded()

    def ring_snapshot(self, order: int, resynced: bool) -> None:
        """A full book stands for all messages between the ring's last one and its own id."""
        self.count.snapshots += 1
        self._ring_snapshots.append((self._ring_last + 1, order, resynced))
        self._ring_last = max(self._ring_last, order)

    def finish(self) -> None:
        """Judge what is left, and the repetitions."""
        while self.own_pending or self.ring_pending:
            self._judge_oldest()
        for key, surplus in self._repeats.items():
            for _ in range(max(0, surplus)):
                self.count.duplicate += 1
                self._report.detail(self, "duplicate", key, None, None, "")

    def _repeat(self, key: str, step: int) -> None:
        if key in self._repeats or len(self._repeats) < RECENT_IDS:
            self._repeats[key] += step
        elif step > 0:
            self.count.duplicate += 1

    def _match(self, key: str, own: Waiting, row: Waiting) -> None:
        self._report.pending -= 1
        self._recent[key] = None
        if len(self._recent) > RECENT_IDS:
            self._recent.popitem(last=False)
        order = own.order
        self.first_common = order if self.first_common is None else min(self.first_common, order)
        self.last_common = order if self.last_common is None else max(self.last_common, order)
        repaired = bool(row.flags & Flag.REPAIRED)
        if same(own.values, row.values):
            self.count.identical += 1
        elif reason := "repaired" if repaired else self._hole_of(own):
            self.count.explained += 1
            self._report.detail(self, "different", key, own, row, reason)
        else:
            self.count.different += 1
            self._report.detail(self, "different", key, own, row, "")
        if repaired:
            return
        self.rcv_diff.add(row.rcv_us - own.rcv_us)
        self.visible_diff.add(row.visible_us - own.rcv_us)
        if own.time_us >= 0:
            self.exchange_to_own.add(own.rcv_us - own.time_us)
            self.exchange_to_ring.add(row.rcv_us - own.time_us)

    def _keep_bounded(self) -> None:
        if self._report.pending > PENDING_MAX:
            self._judge_oldest()

    def _judge_oldest(self) -> None:
        """Without counterpart for good: missing, extra, explained, or outside the window that counts."""
        self._report.pending -= 1
        if len(self.own_pending) >= len(self.ring_pending):
            key, own = self.own_pending.popitem(last=False)
            if not self._counts(own) or self._before_first_book(own.order):
                self.count.edge_own += 1
            elif reason := self._hole_of(own) or self._snapshot_over(own.order):
                self.count.explained += 1
                self._report.detail(self, "missing", key, own, None, reason)
            else:
                self.count.missing += 1
                self._report.detail(self, "missing", key, own, None, "")
            return
        key, row = self.ring_pending.popitem(last=False)
        if not self._counts(row) or self._report.live.own_was_away(row.rcv_us):
            self.count.edge_ring += 1
        elif reason := "repaired" if row.flags & Flag.REPAIRED else self._hole_of(row) or self._own_hole(row.order):
            self.count.explained += 1
            self._report.detail(self, "extra", key, None, row, reason)
        else:
            self.count.extra += 1
            self._report.detail(self, "extra", key, None, row, "")

    def _counts(self, one: Waiting) -> bool:
        first, last = self.first_common, self.last_common
        in_window = first is not None and last is not None and first <= one.order <= last
        return in_window or self._report.live.covers(one.rcv_us)

    def _before_first_book(self, order: int) -> bool:
        return any(order <= last for _, last, resynced in self._ring_snapshots if not resynced)

    def _snapshot_over(self, order: int) -> str:
        covered = any(first <= order <= last for first, last, resynced in self._ring_snapshots if resynced)
        return "snapshot" if covered else ""

    def _own_hole(self, order: int) -> str:
        return "own connection missed it" if any(low <= order <= high for low, high in self._own_holes) else ""

    def _hole_of(self, one: Waiting) -> str:
        """The row of `gaps` that tells of this: by ids, or by time where the feed has none there."""
        for hole in self._report.holes.get(self.ticker, ()):
            if hole.feed == self.feed and hole.first_id >= 0:
                if hole.first_id <= one.order <= hole.last_id:
                    return f"gap {hole.cause}"
            elif hole.feed == self.feed or self.feed == "bbo":
                at_us = one.time_us if one.time_us >= 0 else one.rcv_us
                edge_us = self._report.live.edge_us
                if hole.from_us >= 0 and hole.from_us - edge_us <= at_us <= hole.to_us + edge_us:
                    return f"gap {hole.cause}"
        return ""


def same(a: Values, b: Values) -> bool:
    return a == b or (len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True)))


class Report:
    """All matchers, what explains differences, and the list of differences."""

    def __init__(self, live: Live, differences: Path, exchange: str) -> None:
        self.live = live
        self.exchange = exchange
        self.pending = 0
        self.holes: dict[str, deque[Hole]] = {}
        self.matchers: dict[tuple[str, str], Matcher] = {}
        self.details = 0
        self._file = differences.open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerow(
            ("exchange", "feed", "ticker", "kind", "id", "explained_by", "own", "ring", "own_rcv_us", "ring_rcv_us")
        )

    def matcher(self, feed: str, ticker: str) -> Matcher:
        found = self.matchers.get((feed, ticker))
        if found is None:
            found = self.matchers[feed, ticker] = Matcher(feed, ticker, self)
        return found

    def hole(self, ticker: str, hole: Hole) -> None:
        self.holes.setdefault(ticker, deque(maxlen=RANGES_MAX)).append(hole)

    def detail(
        self, matcher: Matcher, kind: str, key: str, own: Waiting | None, row: Waiting | None, reason: str
    ) -> None:
        self.details += 1
        if self.details > DETAILS_MAX:
            return
        own_text, ring_text = difference(own.values if own else (), row.values if row else ())
        times = (own.rcv_us if own else "", row.rcv_us if row else "")
        self._csv.writerow(
            (self.exchange, matcher.feed, matcher.ticker, kind, key, reason, own_text, ring_text, *times)
        )

    def finish(self) -> None:
        for matcher in self.matchers.values():
            matcher.finish()
        self._file.close()


def difference(own: Values, ring: Values) -> tuple[str, str]:
    """Only what differs, as text: of a book message the levels that the other side does not have."""
    own_items, ring_items = Counter[object](own), Counter[object](ring)
    if own and ring and isinstance(own[0], tuple):
        own_items, ring_items = own_items - ring_items, ring_items - own_items
    texts = (" ".join(str(item).replace(" ", "") for item in items.elements()) for items in (own_items, ring_items))
    first, second = (text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "..." for text in texts)
    return first, second


# the own side


class OwnSide:
    """Connections of our own, reconnected with backoff; every decoded event goes to its matcher."""

    def __init__(
        self, venue: Venue, report: Report, feeds: list[str], tickers: list[str], url: str, choice: Choice
    ) -> None:
        self._venue, self._report, self._url = venue, report, url.rstrip("/")
        self._tickers = {ticker.lower() for ticker in tickers}
        self._chunks = venue.connections(venue.streams_for(tickers, feeds, choice))
        self._away_since: dict[str, int] = {}
        self._never_ready = {f"ws{number}" for number in range(1, len(self._chunks) + 1)}
        self.frames = self.unreadable = self.disconnects = 0
        self.complaints: list[str] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; Disconnected when the venue cannot be reached any more."""
        if not self._venue.ws_url:
            await self._keep_polling(stop)
            return
        tasks = [
            asyncio.ensure_future(self._keep_connected(f"ws{number}", streams, stop))
            for number, streams in enumerate(self._chunks, 1)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            now_us = time.time_ns() // 1000
            self._report.live.outages.extend((since_us, now_us) for since_us in self._away_since.values())

    async def _keep_connected(self, conn: str, streams: list[str], stop: asyncio.Event) -> None:
        failures = 0
        while not stop.is_set():
            frames_before = self.frames
            feed = LiveFeed(self._venue, conn, streams, self._url, self._on_frame)
            error: Disconnected | None = None
            try:
                await feed.run(stop, lambda: self._on_ready(conn))
            except Disconnected as disconnected:
                error = disconnected
            self.unreadable += feed.unreadable
            self.complaints = (self.complaints + feed.complaints)[:RANGES_MAX]
            if stop.is_set():
                return
            self._away_since.setdefault(conn, time.time_ns() // 1000)
            self.disconnects += 1
            failures = 0 if self.frames > frames_before else failures + 1
            if failures >= RECONNECTS_MAX:
                raise error or Disconnected(f"{self._url}: closes every connection before it sends anything")
            log.warning("%s: own connection lost%s", conn, f": {error}" if error else "")
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0.1, min(BACKOFF_S_MAX, 0.5 * 2**failures))):
                    await stop.wait()

    async def _keep_polling(self, stop: asyncio.Event) -> None:
        """A venue without WebSocket: ask in turn for what is due."""
        polls = {stream: self._venue.poll(stream, True) for stream in itertools.chain.from_iterable(self._chunks)}
        due_s, failures = dict.fromkeys(polls, 0.0), 0
        async with aiohttp.ClientSession(headers={"User-Agent": USER_AGENT}) as http:
            while not stop.is_set():
                stream = min(due_s, key=lambda name: due_s[name])
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, due_s[stream] - time.monotonic())):
                        await stop.wait()
                        return
                try:
                    t, body = await fetch(http, self._url + polls[stream].path)
                except Disconnected as error:
                    failures += 1
                    if failures >= RECONNECTS_MAX:
                        raise
                    log.warning("%s", error)
                    due_s[stream] = time.monotonic() + min(BACKOFF_S_MAX, 0.5 * 2**failures)
                    continue
                failures = 0
                self._on_body(polls[stream].path, t, body)
                polls[stream] = self._venue.poll(stream, False)
                due_s[stream] = time.monotonic() + polls[stream].every_s
                if all(due_s.values()):
                    self._on_ready("ws1")

    def _on_body(self, path: str, t: int, body: str) -> None:
        self.frames += 1
        parts = urlsplit(path)
        try:
            for seen in self._venue.decode_body(parts.path, dict(parse_qsl(parts.query)), body):
                self._take(seen, t // 1000)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self.unreadable += 1
            log.debug("%s: an answer cannot be read: %r: %.200s", path, error, body)

    def _on_ready(self, conn: str) -> None:
        now_us = time.time_ns() // 1000
        if conn in self._never_ready:
            self._never_ready.discard(conn)
            self._away_since.pop(conn, None)
            if not self._never_ready:  # the last of all connections
                self._report.live.since_us = now_us
        elif conn in self._away_since:
            self._report.live.outages.append((self._away_since.pop(conn), now_us))

    def _on_frame(self, conn: str, t: int, raw: str) -> None:
        if not self._venue.stream_of(raw):  # the dialogue, and notices
            return
        self.frames += 1
        try:
            for seen in self._venue.decode(raw):
                if seen.ticker.lower() in self._tickers:
                    self._take(seen, t // 1000)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self.unreadable += 1
            log.debug("%s: a frame cannot be read: %r: %.200s", conn, error, raw)

    def _take(self, seen: Seen, rcv_us: int) -> None:
        if isinstance(seen, Trade):
            values: Values = (seen.price, seen.qty, float(seen.side))
            waiting = Waiting(seen.order, values, seen.time_us, rcv_us)
            self._report.matcher("trades", seen.ticker).own(seen.trade_id, waiting, seen.order - seen.count)
        elif isinstance(seen, BookChange):
            if seen.snapshot or not seen.levels:  # each connection has snapshots of its own
                return
            waiting = Waiting(seen.order, tuple(sorted(seen.levels)), seen.time_us, rcv_us)
            self._report.matcher("orderbook_l2", seen.ticker).own(str(seen.order), waiting, seen.prev)
        elif isinstance(seen, Quote):
            waiting = Waiting(seen.order, seen.values, seen.time_us, rcv_us)
            self._report.matcher("bbo", seen.ticker).own(str(seen.order), waiting, -1)
        elif isinstance(seen, Candle):
            waiting = Waiting(seen.open_us, seen.values, -1, rcv_us)
            self._report.matcher("candles", seen.ticker).own(f"{seen.interval} {seen.open_us}", waiting, -1)


# the ring side


class RingSide:
    """Reads one ring and hands its rows, or its whole book messages, to the matchers."""

    def __init__(self, directory: Path, feed: str, tickers: list[str], report: Report, seek: str) -> None:
        self._directory, self._feed, self._report, self._seek = directory, feed, report, seek
        self._tickers = {ticker.lower() for ticker in tickers}
        self._reader = RingReader(directory, feed)
        self._reader.seek("oldest" if seek == "oldest" else "newest")
        self._lapped_before = 0
        self._end: int | None = None  # of the ring: what comes behind it is not read any more
        self._skip_to_last = seek == "oldest" and self._reader.position > 0
        self._levels: list[tuple[int, float, float]] = []
        self._candles: OrderedDict[tuple[str, str], Values] = OrderedDict()  # closed ones that were handed over

    @property
    def lapped(self) -> int:
        return self._lapped_before + self._reader.lapped

    @property
    def is_open(self) -> bool:
        return self._reader.is_open

    def take(self) -> int:
        """Read and hand over one batch; how many rows it had."""
        if self._reader.replaced and not self._reader.lag and self._end is None:
            self._reopen()
        lapped = self._reader.lapped
        left = ROWS_PER_READ if self._end is None else min(ROWS_PER_READ, self._end - self._reader.position)
        if left <= 0:
            return 0
        rows = self._reader.read(left)
        if self._reader.lapped > lapped:
            self._levels.clear()
            self._skip_to_last = True
        if not len(rows):
            return 0
        names = self._reader.tickers
        wanted = np.array([name.lower() in self._tickers for name in names])
        fields = rows.dtype.names or ()
        for values in rows[wanted[rows["ticker"]]].tolist():
            row = dict(zip(fields, values, strict=True))
            self._hand_over(names[row["ticker"]], row)
        return len(rows)

    def end_here(self) -> None:
        """Read no more than what is there now: a ring that fills as fast as it is read would have no end."""
        if self._end is None:
            self._end = self._reader.published

    def _reopen(self) -> None:
        self._lapped_before = self.lapped
        self._reader.close()
        self._reader = RingReader(self._directory, self._feed)
        self._reader.seek("oldest")
        self._levels.clear()

    def _hand_over(self, ticker: str, row: dict[str, Any]) -> None:
        if self._feed == "orderbook_l2":
            self._hand_over_level(ticker, row)
        elif self._feed == "trades":
            key, order = row["trade_id"].decode() or str(row["trade_seq"]), row["trade_seq"]
            if order < 0 and key.isdecimal():  # rows of merged trades have no counter, but an id that is one
                order = int(key)
            values: Values = (row["price"], row["qty"], float(row["side"]))
            self._report.matcher("trades", ticker).ring(key, _waiting(order, values, row))
        elif self._feed == "bbo":
            values = (row["bid_price"], row["bid_qty"], row["ask_price"], row["ask_qty"])
            self._report.matcher("bbo", ticker).ring(str(row["update_id"]), _waiting(row["update_id"], values, row))
        elif self._feed == "candles":
            self._hand_over_candle(ticker, row)
        else:
            hole = Hole(
                row["feed"].decode(), row["first_id"], row["last_id"], row["from_time"], row["to_time"],
                row["cause"].decode(),
            )  # fmt: skip
            self._report.hole(ticker, hole)

    def _hand_over_candle(self, ticker: str, row: dict[str, Any]) -> None:
        """Closed candles, each once; a version that the venue revised later is told as explained."""
        if not row["closed"] or row["interval"].decode() != CANDLES_COMPARED:
            return
        key = f"{row['interval'].decode()} {row['open_time']}"
        values = (row["open"], row["high"], row["low"], row["close"])
        matcher, waiting = self._report.matcher("candles", ticker), _waiting(row["open_time"], values, row)
        before = self._candles.get((ticker, key))
        if before is not None and before != values:
            matcher.count.explained += 1
            self._report.detail(matcher, "revised", key, None, waiting, "revised")
            return
        self._candles[ticker, key] = values
        if len(self._candles) > RECENT_IDS:
            self._candles.popitem(last=False)
        matcher.ring(key, waiting)

    def _hand_over_level(self, ticker: str, row: dict[str, Any]) -> None:
        is_last = bool(row["flags"] & Flag.LAST)
        if self._skip_to_last:  # the head of this message was overwritten
            self._skip_to_last = not is_last
            return
        if not row["flags"] & Flag.SNAPSHOT:
            self._levels.append((row["side"], row["price"], row["qty"]))
        if not is_last:
            return
        matcher = self._report.matcher("orderbook_l2", ticker)
        if row["flags"] & Flag.SNAPSHOT:
            matcher.ring_snapshot(row["update_id"], bool(row["flags"] & Flag.RESYNCED))
        else:
            values = tuple(sorted(self._levels))
            matcher.ring(str(row["update_id"]), _waiting(row["update_id"], values, row))
        self._levels.clear()

    def close(self) -> None:
        self._reader.close()


def _waiting(order: int, values: Values, row: dict[str, Any]) -> Waiting:
    time_us = -1 if row["flags"] & Flag.TIME_LOCAL else row["timestamp"]
    return Waiting(
        order, values, time_us, row["rcv_timestamp"], row["rcv_timestamp"] + row["publish_ns"] / 1000, row["flags"]
    )


class Rings:
    """Finds the rings of one connector, in all its connections (NAME.1, NAME.2, ...), waiting for them if need be."""

    def __init__(self, venue: Venue, rings: Path, connector: str | None, feeds: list[str] | None) -> None:
        self._venue, self._rings, self._connector = venue, rings, connector
        self._wanted, self._all_of_them = feeds or list(venue.compared), feeds is not None
        self.found: list[tuple[Path, str]] = []  # directory of a connection, feed
        self.feeds: list[str] = []  # that are compared

    def find(self, timeout_s: float) -> list[str]:
        """Instruments of the rings; WrongUse tells what was not there in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._look()
            except (RingError, OSError, LookupError) as error:
                if time.monotonic() > deadline:
                    raise WrongUse(f"waited {timeout_s:g} s for rings: {error}") from error
            time.sleep(min(0.1, timeout_s))

    def _look(self) -> list[str]:
        directories, tickers = self._directories(), dict[str, None]()
        self.found = []
        for directory in directories:
            for feed in (*self._wanted, GAPS.name):
                if not (directory / f"{feed}.meta").exists():
                    continue
                with RingReader(directory, feed) as reader:
                    if reader.exchange.lower() != self._venue.exchange:
                        raise WrongUse(f"{directory}: rings of {reader.exchange}, not of {self._venue.exchange}")
                    self.found.append((directory, feed))
                    if feed != GAPS.name:
                        tickers.update(dict.fromkeys(ticker for ticker in reader.tickers if ticker != "*"))
        self.feeds = [feed for feed in self._wanted if any(found == feed for _, found in self.found)]
        if not self.feeds or (self._all_of_them and len(self.feeds) < len(self._wanted)):
            missing = ", ".join(feed for feed in self._wanted if feed not in self.feeds)
            raise LookupError(f"{', '.join(map(str, directories))}: no ring of {missing}")
        return list(tickers)

    def _directories(self) -> list[Path]:
        """Those of the connector that was named, or of the only one of this exchange."""
        found: dict[str, list[Path]] = {}
        for meta in sorted(self._rings.glob("*/*.meta")):
            connector = connector_of(meta.parent.name)
            if self._connector is None:
                with RingReader(meta.parent, meta.stem) as reader:
                    meant = reader.exchange.lower() == self._venue.exchange
            else:
                meant = self._connector in (connector, meta.parent.name)
            if meant and meta.parent not in found.setdefault(connector, []):
                found[connector].append(meta.parent)
        if not found:
            named = f"connector {self._connector}" if self._connector else f"rings of {self._venue.exchange}"
            raise LookupError(f"{self._rings} has no {named}")
        if len(found) > 1:
            names = ", ".join(found)
            raise WrongUse(f"{self._rings} has several connectors of {self._venue.exchange}: {names}; give --connector")
        return next(iter(found.values()))

    def choice(self, asked: Choice) -> dict[str, str]:
        """What chooses the channels of an own connection: what was asked for, else what the connector says it records."""
        recorded: dict[str, set[str]] = {}
        for process in dict.fromkeys(directory.name for directory, _ in self.found):
            for stream in self._streams_of(process):
                for key, value in self._venue.choice_of(stream).items():
                    recorded.setdefault(key, set()).add(value)
        chosen, choices = dict(asked), self._venue.choices
        for key, value in asked.items():
            if value not in choices.get(key, ()):
                has = ", ".join(choices.get(key, ())) or "nothing to choose"
                raise WrongUse(f"{key} = {value} cannot be compared at {self._venue.exchange}, which has {has}")
        for key in recorded.keys() - asked.keys():
            possible = [value for value in choices[key] if value in recorded[key]]
            if len(possible) != 1:
                have, has = ", ".join(sorted(recorded[key])), ", ".join(choices[key])
                raise WrongUse(
                    f"the connector records {key} = {have}: of {self._venue.exchange} one of {has} can be compared; leave the "
                    "feed out (--feeds)"
                )
            chosen[key] = possible[0]
        return chosen

    def _streams_of(self, process: str) -> Iterator[str]:
        """Streams that bring the compared feeds, as the process itself, or the legs of an arbiter, say."""
        with suppress(RingError):
            page = read_stats(self._rings / process / PAGE_NAME)
            yield from (name for name, stream in page.get("streams", {}).items() if stream["feed"] in self.feeds)
            for leg in page.get("legs", ()):
                yield from self._streams_of(leg)


class Filters(msgspec.Struct, forbid_unknown_fields=True):
    """filters.json."""

    symbols: list[str] = []
    exchanges: list[str] = []

    @classmethod
    def read(cls, path: Path | None) -> "Filters":
        if path is None:
            return cls()
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise WrongUse(f"{path}: {error}") from error

    def check(self, exchange: str) -> None:
        if self.exchanges and not any(fnmatchcase(exchange, pattern.lower()) for pattern in self.exchanges):
            raise WrongUse(f"the filters leave out {exchange}: they name {', '.join(self.exchanges)}")

    def keep(self, tickers: Iterable[str]) -> list[str]:
        patterns = [pattern.lower() for pattern in self.symbols]
        return [t for t in tickers if not patterns or any(fnmatchcase(t.lower(), p) for p in patterns)]


# the comparison


@dataclass
class Settings:
    """What to compare and for how long."""

    seconds: float | None
    edge_s: float
    wait_s: float
    seek: str
    choice: Choice = field(default_factory=dict)  # by options


class Comparison:
    """One run: both sides read at the same time, then judged."""

    def __init__(self, venue: Venue, rings: Rings, tickers: list[str], out: Path, url: str, settings: Settings) -> None:
        self._venue, self._settings, self._out, self._rings = venue, settings, out, rings
        self.choice = rings.choice(settings.choice)
        self.tickers = tickers
        self.live = Live(int(settings.edge_s * 1e6))
        self.report = Report(self.live, out / "differences.csv", venue.exchange)
        self.feeds = rings.feeds
        self._ring_sides = [
            RingSide(directory, feed, tickers, self.report, settings.seek) for directory, feed in rings.found
        ]
        self._found = rings.found
        self._own_side = OwnSide(venue, self.report, rings.feeds, tickers, url, self.choice)
        self.error = ""

    async def run(self) -> None:
        with stop_on_signals() as stop:
            ending, seconds = asyncio.Event(), self._settings.seconds
            ring = asyncio.ensure_future(self._read_rings(ending))
            own = asyncio.ensure_future(self._own_side.run(ending))
            stopped = asyncio.ensure_future(stop.wait())
            progress = asyncio.ensure_future(self._show_progress())
            tasks: list[asyncio.Future[Any]] = [ring, own, stopped, progress]
            try:
                await asyncio.wait((ring, own, stopped), timeout=seconds, return_when="FIRST_COMPLETED")
                self.live.until_us = time.time_ns() // 1000
                ending.set()
                await asyncio.wait((own, ring))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        ring.result()
        try:
            own.result()
        except Disconnected as error:
            self.error = str(error)
        for side in self._ring_sides:
            side.close()
        self.report.finish()
        if (now := self._rings.choice(self._settings.choice)) != self.choice:
            raise WrongUse(f"the connector records {now} now, the own connection had {self.choice}: compare again")

    async def _read_rings(self, ending: asyncio.Event) -> None:
        """Until the end, and then as long as the ring has not shown what the own connection has.

        After DRAIN_S only what is there by then is still read.
        """
        deadline: float | None = None
        while True:
            count = 0
            for side in self._ring_sides:
                count += side.take()
                await asyncio.sleep(0)  # frames of the own connection get their turn, and so a true receive time
            if ending.is_set():
                deadline = deadline or time.monotonic() + DRAIN_S
                if not count and (time.monotonic() > deadline or not self._more_to_come()):
                    return
                if time.monotonic() > deadline:
                    for side in self._ring_sides:
                        side.end_here()
            await asyncio.sleep(0 if count else POLL_S)

    def _more_to_come(self) -> bool:
        """The own connection has seen what the ring does not show yet, and the ring's writer has not closed it."""
        own_waits = any(matcher.own_pending for matcher in self.report.matchers.values())
        return own_waits and any(side.is_open for side in self._ring_sides)

    async def _show_progress(self) -> None:
        console = Console(stderr=True)
        if not console.is_terminal:
            return
        started = time.monotonic()
        with console.status("comparing") as status:
            while True:
                counts = [matcher.count for matcher in self.report.matchers.values()]
                same_count, different = sum(c.identical for c in counts), sum(c.different for c in counts)
                elapsed_s = time.monotonic() - started
                status.update(
                    f"{same_count} identical, {different} different, {self.report.pending} open, {elapsed_s:.0f} s"
                )
                await asyncio.sleep(0.5)

    # results

    @property
    def lapped(self) -> int:
        return sum(side.lapped for side in self._ring_sides)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per feed and instrument, those without anything seen included."""
        for feed in self.feeds:
            names = {t.lower(): t for t in self.tickers} | {
                t.lower(): t for f, t in self.report.matchers if f == feed and t.lower() in map(str.lower, self.tickers)
            }
            for ticker in sorted(names.values()):
                yield self._row(self.report.matcher(feed, ticker))

    def _row(self, matcher: Matcher) -> dict[str, Any]:
        count = matcher.count
        row: dict[str, Any] = {
            "exchange": self._venue.exchange,
            "feed": matcher.feed,
            "ticker": matcher.ticker,
            "own": count.own,
            "ring": count.ring,
            "identical": count.identical,
            "different": count.different,
            "missing": count.missing,
            "extra": count.extra,
            "duplicate": count.duplicate,
            "explained": count.explained,
            "edge_own": count.edge_own,
            "edge_ring": count.edge_ring,
            "snapshots": count.snapshots,
            "first_common_id": matcher.first_common,
            "last_common_id": matcher.last_common,
        }
        for name in ("rcv_diff", "visible_diff", "exchange_to_own", "exchange_to_ring"):
            spread: Spread = getattr(matcher, name)
            row |= {f"{name}_p50_us": spread.percentile(0.5), f"{name}_p99_us": spread.percentile(0.99)}
        clock = self._clock()
        return row | {"clock_offset_us": clock.get("offset_us"), "clock_uncertainty_us": clock.get("uncertainty_us")}

    def _clock(self) -> dict[str, Any]:
        """The exchange's clock against ours, as the connector measured it: latencies from the exchange are as unsure."""
        clocks = [venue_clock(directory) for directory in dict.fromkeys(d for d, _ in self._found)]
        return min(clocks, key=lambda clock: clock.get("uncertainty_us") or math.inf, default={})

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        sums = ("own", "ring", "identical", "different", "missing", "extra", "duplicate", "explained")
        by_feed = {f: {key: sum(r[key] for r in rows if r["feed"] == f) for key in sums} for f in self.feeds}
        compared = sum(r["identical"] + r["different"] for r in rows)
        findings = sum(r["different"] + r["missing"] + r["extra"] + r["duplicate"] for r in rows)
        return {
            "exchange": self._venue.exchange,
            "verdict": "identical"
            if compared and not findings and not self.lapped
            else "differences"
            if compared
            else "nothing in common",
            "compared": compared,
            "findings": findings,
            "explained": sum(r["explained"] for r in rows),
            "tickers": len(self.tickers),
            "feeds": by_feed,
            "not_compared": [f for f in _comparable(self._venue) if f not in self.feeds],
            "chosen": self.choice,
            "window": "per instrument and feed from the first to the last id that both sides showed",
            "exchange_clock": clock_text(self._clock()),
            "ring_rows_lapped": self.lapped,
            "own_frames": self._own_side.frames,
            "own_unreadable": self._own_side.unreadable,
            "own_disconnects": self._own_side.disconnects,
            "own_complaints": self._own_side.complaints[:10],
            "error": self.error,
            "out": str(self._out),
        }


def _comparable(venue: Venue) -> tuple[str, ...]:
    return ("trades", "orderbook_l2", "bbo") if venue.ws_url else venue.compared


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["exchange"])
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """What a person wants to see; the symbols with findings first."""
    table = Table(title=f"{summary['exchange']}: rings against the feed")
    shown = ("feed", "ticker", "own", "ring", "identical", "different", "missing", "extra", "duplicate", "explained")
    for name in shown:
        table.add_column(name, justify="left" if name in ("feed", "ticker") else "right", no_wrap=name == "ticker")
    table.add_column("visible after own receive, p50 / p99 us", justify="right")
    keys = ("different", "missing", "extra", "duplicate")
    for row in sorted(rows, key=lambda r: (-sum(r[k] for k in keys), r["feed"], r["ticker"]))[:TABLE_ROWS_MAX]:
        latency = f"{row['visible_diff_p50_us']} / {row['visible_diff_p99_us']}" if row["identical"] else "-"
        style = "red" if any(row[k] for k in keys) else None
        table.add_row(*(str(row[name]) for name in shown), latency, style=style)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    console.print(table)
    if len(rows) > TABLE_ROWS_MAX:
        console.print(f"and {len(rows) - TABLE_ROWS_MAX} more in {summary['out']}/summary.csv")
    console.print(f"the exchange's clock against this machine's: {summary['exchange_clock']}", markup=False)
    for text in (summary["error"], *summary["own_complaints"]):
        if text:
            console.print(text, style="red", markup=False)
    if summary["ring_rows_lapped"]:
        console.print(
            f"{summary['ring_rows_lapped']} rows of the ring were overwritten before they were read", style="red"
        )
    console.print(
        f"{summary['verdict']}: {summary['compared']} compared, {summary['findings']} findings, {summary['explained']} "
        f"explained; window: {summary['window']}",
        style="green" if summary["verdict"] == "identical" else "red",
        markup=False,
    )


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]}, epilog=f"EXCHANGE: {', '.join(venue_names())}."
)
@click.argument("exchange", type=click.Choice(venue_names()), metavar="EXCHANGE")
@click.argument("tickers", nargs=-1)
@click.option(
    "--rings", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory of all rings."
)
@click.option("--connector", help="Its name; default: the only one of this exchange.")
@click.option("--feeds", help="By comma; default: those that exist and carry ids (of a polled venue: candles).")
@click.option("--filters", type=click.Path(dir_okay=False, path_type=Path),
              help='JSON: {"symbols": [patterns], "exchanges": [names]}.')  # fmt: skip
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory of the CSV files."
)
@click.option("--seconds", type=Finite(0, min_open=True), help="Default: until Ctrl-C or SIGTERM.")
@click.option("--edge", "edge_s", type=Finite(0), default=5.0, show_default=True,
              help="Seconds at both ends, and around losses of the own connection, in which one side may be alone.")  # fmt: skip
@click.option("--wait", "wait_s", type=Finite(0), default=30.0, show_default=True,
              help="Seconds to wait for rings that do not exist yet.")  # fmt: skip
@click.option("--seek", type=click.Choice(["newest", "oldest"]), default="newest", show_default=True,
              help="Where in the rings to begin.")  # fmt: skip
@click.option("--trade-channel", help="As in the fleet file. Default: what the connector says it records.")
@click.option("--book-depth", type=click.IntRange(1), help="As --trade-channel.")
@click.option("--book-interval", help="As --trade-channel.")
@click.option("--ws-url", help="Default: the venue's.")
@click.option("--rest-url", help="Default: the venue's. Only a polled venue is asked over REST.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead of the table.")
@log_options
def main(
    exchange: str,
    tickers: tuple[str, ...],
    rings: Path,
    connector: str | None,
    feeds: str | None,
    filters: Path | None,
    out: Path,
    trade_channel: str | None,
    book_depth: int | None,
    book_interval: str | None,
    ws_url: str | None,
    rest_url: str | None,
    as_json: bool,
    log_level: str,
    log_format: str,
    **settings: Any,
) -> None:
    """Hold the rings of a connector against the feed of EXCHANGE, for TICKER... or all instruments of the rings.

    Trades are matched by trade id, books message by message by update id, quotes by update id where the venue gives
    one, closed candles of a polled venue by interval and open time. What counts lies between the first and the last id
    that both sides showed, or was received while both were surely live (--edge). Rows fetched over REST (REPAIRED) and
    differences that a row of the ring `gaps`, or a new snapshot after a gap, tells of are counted as explained.

    The own connection has the trade channel, book depth and book interval that the connector records, as its stats page
    tells, unless options say otherwise. What only a key opens is refused: leave that feed out.

    Writes summary.csv (one row per feed and instrument, latencies included) and differences.csv. Exit code 0:
    identical, 1: differences or nothing to compare, 2: wrong use.
    """
    logs.set_up(log_level, log_format)
    venue = load_venue(exchange)
    url = ws_url or venue.ws_url if venue.ws_url else rest_url or venue.rest_url
    asked = {"trade_channel": trade_channel, "book_depth": book_depth, "book_interval": book_interval}
    choice = {key: str(value) for key, value in asked.items() if value}
    try:
        comparison = _prepare(
            venue, tickers, rings, connector, feeds, filters, out, url, Settings(**settings, choice=choice)
        )
        asyncio.run(comparison.run())
    except (WrongUse, RingError) as error:
        _fail(str(error))
    rows = list(comparison.rows())
    write_csv(out / "summary.csv", rows)
    summary = comparison.summary(rows)
    if as_json:
        click.echo(text_of(summary))
    else:
        print_table(rows, summary)
    sys.exit(EXIT_DONE if summary["verdict"] == "identical" and not comparison.error else EXIT_FINDINGS)


def _prepare(
    venue: Venue,
    tickers: tuple[str, ...],
    rings: Path,
    connector: str | None,
    feeds: str | None,
    filters: Path | None,
    out: Path,
    url: str,
    settings: Settings,
) -> Comparison:
    chosen = [feed for feed in feeds.split(",") if feed] if feeds else None
    for feed in chosen or ():
        if feed not in venue.compared:
            raise WrongUse(f"{venue.exchange} can be compared in {', '.join(venue.compared)}, not in {feed!r}")
    narrowing = Filters.read(filters)
    narrowing.check(venue.exchange)
    found = Rings(venue, rings, connector, chosen)
    known = found.find(settings.wait_s)
    wanted = narrowing.keep(tickers or known)
    if not wanted:
        raise WrongUse(
            "no instrument is left to compare" if tickers or known else f"{found.found[0][0]}: no instrument yet"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Comparison(venue, found, wanted, out, url, settings)
    except OSError as error:
        raise WrongUse(f"{out}: {error}") from error


def _fail(text: str) -> NoReturn:
    click.echo(f"mdcompare: {text}", err=True)
    sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
