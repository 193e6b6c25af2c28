"""The arbiter: merges the rings of several legs, redundant connections to the same streams, into one ring set.

Run by `mdcollector arbitrate`. Reads rings and writes rings, knows no venue and no socket. The first copy of a row
wins, every row appears exactly once, what has a sequence comes in its order:

    trades         by trade_seq. A trade ahead of a missing one waits `wait_s` for another leg to bring that; a later
                   one is still published when it comes. Without a counter: by trade_id, in the order of arrival.
    orderbook_l2   whole messages. On one leg message B behind message A, with neither a snapshot nor an invalid row in
                   between, proves that B holds every change after A. So B continues a merged book that stands at
                   any id m with A <= m < B, whichever leg brought the book there. A snapshot is published only at the
                   start, or when no leg can continue the book (RESYNCED), or when the book is not proven.
    bbo            by update_id where there is one.
    instruments    what is younger than the last row of its instrument and says something else.
    the others     equal content under the same exchange time is a copy; each leg's copies are matched one to one, so
                   a row that a leg rightly repeats stays.

`gaps` is the ledger of the merged feed: what another leg covered in time is no gap and is not in it; what came later
than the wait is in it first as open, then as repaired. A feed without ids has a gap where all legs have one.

Rows keep exchange time, receive time, parse time and flags of the copy that won. publish_ns is stamped anew (packet
read until visible in this ring), LAST is also set where the rest of a message of trades was somebody else's,
NEW / UPDATE / DELETE are those of the merged book, and packet_id is (packet_id of the leg) * legs + number of the leg:
own, unique, and it tells who won.

Position: a state file beside the rings holds everything that is not in the own rings yet: the legs' positions, what
waits, the books. It is written some times a minute; after a crash the own rows published since are applied to it, so
the rings are the truth, and the legs are read again from the positions in it: what comes twice is dropped as a copy.
"""

import contextlib
import errno
import logging
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mdcollector.emit import CAPACITIES
from mdcollector.errors import RingError
from mdcollector.merge import (
    BOOK_WAIT_MOST_S,
    BOOK_WAIT_S,
    COPIES_MAX,
    LEG_GAPS_KEPT,
    NEVER,
    RING_SHARE,
    WAIT_S,
    Book,
    BookMerge,
    CopyMerge,
    LatestMerge,
    Ledger,
    LegGap,
    Merge,
    Parts,
    TradeMerge,
    Trades,
    chosen,
    joined,
)
from mdcollector.records import ALWAYS_ON, CLOCKS, DATA_FEEDS, FEEDS, GAPS, INSTRUMENTS, ORDERBOOK_L2, Flag
from mdcollector.ring import RingReader, RingWriter, Rows, ring_dir
from mdcollector.stats import StatsWriter

log = logging.getLogger(__name__)

CHUNK_ROWS = 8192  # of one leg and feed in one turn
LEG_DEAD_S = 5.0
LOOK_S = 0.5
TICK_S = 0.1
STATS_S = 0.25
POLL_S = 0.0005
CHECKPOINT_S = 1.0
CHECKPOINT_SHARE = 50  # at most this part of the time goes into checkpoints
FINISH_S = 20.0
STATE_NAME = "arbiter.state"
STATE_VERSION = 1

_LAST = int(Flag.LAST)
_NO_CODE = 0xFFFF_FFFF


class Place(msgspec.Struct):
    """How far a leg's ring was read."""

    leg: str
    feed: str
    epoch: int
    position: int


class State(msgspec.Struct):
    """The checkpoint."""

    version: int
    legs: list[str]
    epoch: int  # of the own rings
    published: dict[str, int]
    places: list[Place]
    trades: dict[int, Trades]
    books: dict[int, Book]
    copies: dict[str, list[tuple[bytes, int, int]]]
    leg_gaps: list[LegGap]
    undecided: list[LegGap]
    said: list[tuple[str, str, int, int]]
    last_rcv: list[int]


# Reading the legs


class Source:
    """One ring of one leg: rows in the codes of the own ring, cut where the leg's line breaks."""

    def __init__(
        self, directory: Path, exchange: str, leg: int, legs: int, own: RingWriter, place: Place | None
    ) -> None:
        self.directory, self._exchange, self.leg, self._legs, self._own = directory, exchange, leg, legs, own
        self.feed = own.feed
        self._whole_messages = own.feed is ORDERBOOK_L2
        self.reader: RingReader | None = None
        self.rows: Rows = np.empty(0, own.feed.dtype)
        self.keys: Any = np.empty(0, np.int64)
        self.breaks = False  # nothing is known of what came before `rows`
        self.drained = True
        self.drained_at = -1.0
        self.lapped = self.damaged = self.read = 0
        self.lost: list[tuple[int, int, str]] = []  # from, to (us), cause
        self.error = ""
        self._place = place
        self._codes: Any = np.empty(0, np.uint32)
        self._left_out: Any = np.empty(0, np.int64)  # those of the leg's codes that have no own one
        self._epoch = self._high = self._last_rcv = -1
        self._skip = False  # the first rows may be the end of a message whose begin is lost

    def look(self) -> None:
        """Open the ring when it appears; let go of one whose files were replaced, after its last row."""
        if self.reader is not None:
            if not (self.reader.replaced and not len(self.rows) and self.reader.position >= self.reader.published):
                return
            self.reader.close()
            self.reader = None
        try:
            reader = RingReader(self.directory, self.feed.name)
        except RingError as error:
            self.error = str(error)
            return
        if reader.exchange != self._exchange:
            self.error = f"{reader.path}: a ring of {reader.exchange}, expected {self._exchange}"
            reader.close()
            return
        self.error = ""
        self._open(reader)

    def _open(self, reader: RingReader) -> None:
        epochs = reader.epochs
        reader.seek("oldest")
        self.breaks, self._skip = True, reader.position > 0
        place, self._place = self._place, None
        starts = {epoch: i for i, (epoch, _, _) in enumerate(epochs)}
        if place is not None and place.epoch in starts:
            behind = starts[place.epoch] + 1
            end = epochs[behind][1] if behind < len(epochs) else reader.published
            reader.seek(min(place.position, end))  # a ring that lost rows in a power failure numbers them anew
            self.breaks, self._skip = place.position > end, False
        self._epoch = place.epoch if place is not None and place.epoch in starts else reader.epoch
        self._codes = np.empty(0, np.uint32)
        self.reader = reader

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, position) behind the last row that was taken."""
        if self.reader is None:
            return (self._place.epoch, self._place.position) if self._place else (-1, 0)
        return self._epoch, self.reader.position - len(self.rows)

    def fill(self) -> None:
        """Read on when everything read before was taken."""
        reader = self.reader
        if reader is None:
            return
        if len(self.rows) and not (self._whole_messages and not self._has_end()):
            return
        while True:
            if not self._read(reader):
                return
            if not self._whole_messages or self._has_end():
                return

    def _has_end(self) -> bool:
        return bool((self.rows["flags"] & _LAST).any())

    def _read(self, reader: RingReader) -> bool:
        """Append one chunk, at most up to a break in the line; False when there is nothing more."""
        before, lapped = reader.position, reader.lapped
        rows = reader.read(CHUNK_ROWS)
        self.drained = reader.position >= reader.published
        if reader.lapped > lapped:
            self._break(reader.lapped - lapped, "lapped", rows)
            before += reader.lapped - lapped
        if reader.epoch != self._epoch:
            rows = self._cut_at_epoch(reader, rows, before)
        right = rows["seq_id"] == np.arange(before, before + len(rows))
        if not right.all():
            first = int(np.argmin(right))
            if first:
                rows = rows[:first]
            else:
                bad = int(np.argmax(right)) if right.any() else len(rows)
                self._break(bad, "damaged", rows[bad:])
                before, rows = before + bad, rows[:0]
            reader.seek(before + len(rows))
            self.drained = False
        if not len(rows):
            return not self.drained
        self.read += len(rows)
        rows = self._translated(reader, rows)
        if self._skip and self._whole_messages:
            ends = np.flatnonzero(rows["flags"] & _LAST)
            if not len(ends):
                return True
            rows = rows[ends[0] + 1 :]
        self._skip = False
        self.rows = joined([self.rows, rows]) if len(self.rows) else rows
        self.keys = np.maximum.accumulate(np.maximum(self.rows["rcv_timestamp"], self._high))
        return True

    def _cut_at_epoch(self, reader: RingReader, rows: Rows, before: int) -> Rows:
        """A new life of the leg begins in these rows: what comes behind its first row proves nothing about before."""
        ahead = [(epoch, first) for epoch, first, _ in reader.epochs if epoch > self._epoch]
        for epoch, first in ahead:
            if first > before + len(rows) or (first == before + len(rows) and len(rows)):
                break
            if first > before:
                reader.seek(first)
                self.drained = False
                return rows[: first - before]
            self._epoch, self.breaks = epoch, True
            self._drop()  # the begin of a message that its writer did not finish
        return rows

    def _break(self, count: int, cause: str, behind: Rows) -> None:
        if cause == "lapped":
            self.lapped += count
        else:
            self.damaged += count
        log.error("%s/%s: %d rows %s", self.directory.name, self.feed.name, count, cause)
        self.breaks = self._skip = True
        self._drop()
        to = int(behind["rcv_timestamp"][0]) if len(behind) else time.time_ns() // 1000
        self.lost.append((self._last_rcv, to, cause))
        del self.lost[:-LEG_GAPS_KEPT]

    def _drop(self) -> None:
        self.rows, self.keys = self.rows[:0], self.keys[:0]

    @property
    def is_through(self) -> bool:
        """Everything that was published when the source was last filled is taken."""
        return self.drained and not (len(self.rows) and (not self._whole_messages or self._has_end()))

    def _translated(self, reader: RingReader, rows: Rows) -> Rows:
        """Own ticker codes and packet ids; a row that names no instrument, or none there is room for, is dropped."""
        if len(self._codes) < len(reader.tickers):
            self._codes = np.array([self._own_code(name) for name in reader.tickers], dtype=np.uint32)
            self._left_out = np.flatnonzero(self._codes == _NO_CODE)
        known = rows["ticker"] < len(self._codes)
        if len(self._left_out):
            known &= ~np.isin(rows["ticker"], self._left_out)
        if not known.all():
            self.damaged += int(len(rows) - known.sum())
            rows = chosen(rows, known)
        rows = joined([rows])
        rows["ticker"] = self._codes[rows["ticker"]]
        rows["packet_id"] = rows["packet_id"] * self._legs + self.leg
        return rows

    def _own_code(self, name: str) -> int:
        try:
            return self._own.code(name)
        except RingError as error:  # the table is full; that of a connector takes no new name either
            self.error = str(error)
            return _NO_CODE

    def take(self, horizon: int) -> tuple[Rows, Any]:
        """Rows received up to `horizon`, of books whole messages only, with their keys of order."""
        stop = int(np.searchsorted(self.keys, horizon, side="right"))
        if self._whole_messages:
            ends = np.flatnonzero(self.rows["flags"][:stop] & _LAST)
            stop = int(ends[-1]) + 1 if len(ends) else 0
        rows, keys = self.rows[:stop], self.keys[:stop]
        self.rows, self.keys = self.rows[stop:], self.keys[stop:]
        if stop:
            self._high = int(keys[-1])
            self._last_rcv = int(rows["rcv_timestamp"][-1])
        return rows, keys

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


class Lane:
    """One feed: the sources of all legs and what merges them."""

    def __init__(self, merge: Merge, sources: list[Source], clock: Callable[[], float]) -> None:
        self.merge, self.sources, self._clock = merge, sources, clock

    def turn(self) -> int:
        """Take what the legs have, in the order of receipt, and publish what is new; says how many rows were taken."""
        began, merge = self._clock(), self.merge
        active = [source for source in self.sources if source.reader is not None]
        for source in active:
            source.fill()
        behind = [int(s.keys[-1]) for s in active if len(s.keys) and not s.drained]
        horizon = min(behind, default=NEVER)
        taken = 0
        parts: Parts = []
        for source in active:
            if source.breaks:
                source.breaks = False
                merge.broken(source.leg)
            rows, keys = source.take(horizon)
            if len(rows):
                parts.append((rows, keys, source.leg))
                merge.last_rcv[source.leg] = max(merge.last_rcv[source.leg], int(keys[-1]))
                taken += len(rows)
            if source.is_through:
                source.drained_at = began
        if parts:
            merge.merge(parts)
        merge.expire(min((s.drained_at for s in active), default=began))
        merge.flush()
        return taken


# The process


class Arbiter:
    """Merges the rings of `legs` (process names) into the rings of `name`.

    >>> Arbiter(Path("rings"), "binance", exchange=("BINANCE_SPOT", 1), legs=["binance_a", "binance_b"]).run(stop.is_set)

    Legs may come, go and come back. RingError when another process writes the own rings or they cannot be used.
    """

    def __init__(
        self,
        rings: Path,
        name: str,
        *,
        exchange: tuple[str, int],
        legs: Sequence[str],
        feeds: Sequence[str] = DATA_FEEDS,
        capacity: Mapping[str, int] | None = None,
        wait_s: float = WAIT_S,
        book_wait_s: float = BOOK_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rings, self.name, self.legs, self._clock = rings, name, list(legs), clock
        self.directory = ring_dir(rings, name)
        self._state_path = self.directory / STATE_NAME
        self._exchange = exchange[0]
        sizes = {**CAPACITIES, **(capacity or {})}
        epoch = time.time_ns() // 1_000_000
        self.own: dict[str, RingWriter] = {}
        try:
            for feed in (*feeds, *ALWAYS_ON):
                self.own[feed] = RingWriter(
                    self.directory, FEEDS[feed], exchange=exchange[0], connector=name, capacity=sizes[feed], epoch=epoch
                )
        except RingError:
            self._close_rings()
            raise
        self.epoch = next(iter(self.own.values())).epoch
        count = len(self.legs)
        self.ledger = Ledger(self.own[GAPS.name], exchange[1], count, clock)
        self.merges: dict[str, Merge] = {}
        for feed in (*feeds, INSTRUMENTS.name, CLOCKS.name):
            own = self.own[feed]
            if feed == "trades":
                self.merges[feed] = TradeMerge(own, count, self.ledger, clock, wait_s)
            elif feed == "orderbook_l2":
                book_merge = self.merges[feed] = BookMerge(own, count, self.ledger, clock, book_wait_s)
                book_merge.alive = self._alive
            elif feed == INSTRUMENTS.name:
                self.merges[feed] = LatestMerge(own, count, self.ledger, clock)
            else:
                self.merges[feed] = CopyMerge(own, count, self.ledger, clock)
        state = self._load_state()
        places = {(p.leg, p.feed): p for p in state.places} if state else {}
        self.lanes: dict[str, Lane] = {}
        for feed, merge in self.merges.items():
            sources = [
                Source(ring_dir(rings, leg), exchange[0], number, count, merge.own, places.get((leg, feed)))
                for number, leg in enumerate(self.legs)
            ]
            self.lanes[feed] = Lane(merge, sources, clock)
        ledger_ring = self.own[GAPS.name]
        self._gap_sources = [
            Source(ring_dir(rings, leg), exchange[0], number, count, ledger_ring, places.get((leg, GAPS.name)))
            for number, leg in enumerate(self.legs)
        ]
        self._restore(state)
        self._stats = StatsWriter(self.directory)
        self._started_ns = time.time_ns()
        self._state_name = "starting"
        self._alive_legs = [False] * count
        self._next_look = self._next_tick = self._next_stats = -1.0
        self._checkpoint_at = clock() + CHECKPOINT_S
        self._checkpointed = {feed: ring.next for feed, ring in self.own.items()}
        self.checkpoints = 0

    # The loop

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Merge until told to stop, then everything that the legs have published by then."""
        while not should_stop():
            if not self.turn():
                time.sleep(POLL_S)
        self.finish()

    def turn(self) -> int:
        """One round over all feeds; says how many rows were taken from the legs."""
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._look()
        taken = self._turn_feeds()
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._tick()
        if now >= self._next_stats:
            self._next_stats = now + STATS_S
            self._publish()
        written = any(
            ring.next - self._checkpointed[feed] > ring.capacity // RING_SHARE for feed, ring in self.own.items()
        )
        if now >= self._checkpoint_at or written:
            self.checkpoint()
        return taken

    def _turn_feeds(self) -> int:
        taken = sum(lane.turn() for lane in self.lanes.values())
        self.ledger.flush()  # behind the rows: a crash in between is seen from them, a row of the ledger proves none
        return taken

    def _look(self) -> None:
        for source in (*self._all_sources(), *self._gap_sources):
            source.look()
        for number in range(len(self.legs)):
            reader = self._gap_sources[number].reader
            self._alive_legs[number] = reader is not None and reader.is_open and reader.heartbeat_age_s < LEG_DEAD_S
        self._state_name = "connected" if any(self._alive_legs) else "no leg lives"

    def _all_sources(self) -> list[Source]:
        return [source for lane in self.lanes.values() for source in lane.sources]

    def _alive(self, leg: int) -> bool:
        return self._alive_legs[leg]

    def _tick(self) -> None:
        """Read what the legs say they missed, decide what it means, seal and beat."""
        for source in self._gap_sources:
            source.fill()
            source.breaks = False
            rows, _ = source.take(NEVER)
            tickers = self.own[GAPS.name].tickers
            for row in rows:
                feed = row["feed"].decode()
                if row["first_id"] < 0 and not row["repaired"] and feed in self.merges:
                    first, last, cause = int(row["from_time"]), int(row["to_time"]), row["cause"].decode()
                    self.ledger.leg_gap(LegGap(feed, tickers[row["ticker"]], source.leg, first, last, cause))
        for feed, merge in self.merges.items():
            has_ids = isinstance(merge, BookMerge) or (isinstance(merge, TradeMerge) and bool(merge.trades))
            for source in self.lanes[feed].sources:
                for first, last, cause in source.lost:
                    if not has_ids:  # else the ids tell by themselves what it cost
                        self.ledger.leg_gap(LegGap(feed, "*", source.leg, first, last, cause))
                source.lost.clear()
        self.ledger.decide(self._last_rcv())
        self.ledger.flush()
        for ring in self.own.values():
            ring.seal()
            ring.heartbeat()

    def _last_rcv(self) -> list[int]:
        """Receive time of the newest row of each leg, of any feed that tells whether data flows."""
        merges = [merge for feed, merge in self.merges.items() if feed not in ALWAYS_ON]
        return [max((merge.last_rcv[n] for merge in merges), default=-1) for n in range(len(self.legs))]

    def finish(self) -> None:
        """Take everything published by now, wait out what waits, close the rings."""
        self._look()
        targets = [(s, s.reader.published) for s in self._all_sources() if s.reader is not None]
        deadline, through = self._clock() + FINISH_S, False
        while self._clock() < deadline:
            moved = self._turn_feeds()
            if not through and all(s.reader is None or s.place[1] >= target for s, target in targets):
                through, deadline = True, min(deadline, self._clock() + BOOK_WAIT_MOST_S)
            if through and not any(merge.waiting for merge in self.merges.values()):
                break
            if not moved:
                time.sleep(POLL_S)
        self._tick()
        for merge in self.merges.values():
            merge.expire(float("inf"))
            merge.finish()
            merge.flush()
        self.ledger.decide(self._last_rcv(), force=True)
        self.ledger.flush()
        self.checkpoint()
        self._state_name = "stopped"
        self._publish()
        self.close()

    def close(self) -> None:
        """Let go of all rings."""
        for source in (*self._all_sources(), *self._gap_sources):
            source.close()
        self._close_rings()

    def _close_rings(self) -> None:
        for ring in self.own.values():
            ring.close()

    # Position

    def checkpoint(self) -> None:
        """Write the state beside the rings. It lives as long as they do, so it is renamed into place, not synced."""
        began = self._clock()
        trades, books = self.merges.get("trades"), self.merges.get("orderbook_l2")
        copies = {feed: merge for feed, merge in self.merges.items() if isinstance(merge, CopyMerge)}
        state = State(
            version=STATE_VERSION,
            legs=self.legs,
            epoch=self.epoch,
            published={feed: ring.next for feed, ring in self.own.items()},
            places=[Place(self.legs[s.leg], s.feed.name, *s.place) for s in (*self._all_sources(), *self._gap_sources)],
            trades=trades.trades if isinstance(trades, TradeMerge) else {},
            books=books.books if isinstance(books, BookMerge) else {},
            copies={feed: merge.saved() for feed, merge in copies.items()},
            leg_gaps=self.ledger.leg_gaps,
            undecided=self.ledger.undecided,
            said=list(self.ledger.said),
            last_rcv=self._last_rcv(),
        )
        text = msgspec.msgpack.encode(state)
        part = self._state_path.with_suffix(".part")
        try:
            part.write_bytes(zlib.crc32(text).to_bytes(4, "little") + text)
            part.replace(self._state_path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
                raise
            log.error("%s: cannot be written, the one before stays: %s", self._state_path, error.strerror)
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
        self._checkpointed = dict(state.published)
        self.checkpoints += 1
        now = self._clock()
        self._checkpoint_at = now + max(CHECKPOINT_S, CHECKPOINT_SHARE * (now - began))

    def _load_state(self) -> State | None:
        """The checkpoint, when it belongs to the rings that are there and to these legs."""
        try:
            raw = self._state_path.read_bytes()
        except FileNotFoundError:
            return None
        if len(raw) < 4 or zlib.crc32(raw[4:]) != int.from_bytes(raw[:4], "little"):
            log.error("%s: damaged, the own rings alone say what is published", self._state_path)
            return None
        try:
            state = msgspec.msgpack.decode(raw[4:], type=State)
        except msgspec.DecodeError as error:
            log.error("%s: of another version, passed over: %s", self._state_path, error)
            return None
        fits = state.version == STATE_VERSION and state.legs == self.legs and state.published.keys() == self.own.keys()
        if not fits or not all(self._continues(feed, state) for feed in self.own):
            log.warning("%s: of other legs, feeds or rings, passed over", self._state_path)
            return None
        return state

    def _continues(self, feed: str, state: State) -> bool:
        with RingReader(self.directory, feed) as ring:
            known = any(epoch == state.epoch for epoch, _, _ in ring.epochs)
            return known and ring.oldest <= state.published[feed] <= self.own[feed].next

    def _restore(self, state: State | None) -> None:
        """State and own rows since; without a state all own rows that are still there."""
        for feed, merge in self.merges.items():
            if state is not None and isinstance(merge, CopyMerge):
                merge.restore(state.copies[feed])
            if state is not None and isinstance(merge, TradeMerge):
                merge.restore_trades(state.trades)
            if state is not None and isinstance(merge, BookMerge):
                merge.restore_books(state.books)
            since = state.published[feed] if state and not isinstance(merge, LatestMerge) else 0
            if isinstance(merge, CopyMerge):
                earlier = self.own[feed].recent_rows(max(0, since - COPIES_MAX))
                merge.note_ids(chosen(earlier, earlier["seq_id"] < since))
            rows = self.own[feed].recent_rows(since)
            if isinstance(merge, BookMerge) and len(rows) and int(rows["seq_id"][0]) > since:
                ends = np.flatnonzero(rows["flags"] & _LAST)  # the first message may have lost its begin
                rows = rows[ends[0] + 1 :] if len(ends) else rows[:0]
            merge.note(rows)
            if state is not None:
                merge.last_rcv = list(state.last_rcv)
        if state is not None:
            self.ledger.leg_gaps, self.ledger.undecided = state.leg_gaps, state.undecided
            self.ledger.said = dict.fromkeys(state.said)
            for gap in self.ledger.undecided:
                gap.since, gap.seen = self._clock(), {}
        self.ledger.drop_known(self.own[GAPS.name].recent_rows(state.published[GAPS.name] if state else 0))
        self.ledger.counters.clear()
        for merge in self.merges.values():
            if isinstance(merge, TradeMerge | BookMerge):
                merge.settle()
            merge.flush()
        self.ledger.flush()

    # Numbers

    def _publish(self) -> None:
        counters: Counter[str] = Counter(self.ledger.counters)
        for merge in self.merges.values():
            counters.update(merge.counters)
        books = self.merges.get("orderbook_l2")
        self._stats.publish(
            {
                "role": "arbiter",
                "name": self.name,
                "exchange": self._exchange,
                "state": self._state_name,
                "started_ns": self._started_ns,
                "counters": dict(counters),
                "checkpoints": self.checkpoints,
                "books": len(books.books) if isinstance(books, BookMerge) else 0,
                "books_unproven": books.unproven if isinstance(books, BookMerge) else 0,
                "waiting": {feed: merge.waiting for feed, merge in self.merges.items()},
                "gaps_undecided": len(self.ledger.undecided),
                "rings": {feed: ring.snapshot() for feed, ring in self.own.items()},
                "publish_ns": {feed: merge.publish_ns.snapshot() for feed, merge in self.merges.items()},
                "legs": {leg: self._leg_numbers(number) for number, leg in enumerate(self.legs)},
            }
        )

    def _leg_numbers(self, number: int) -> dict[str, Any]:
        feeds = {}
        for feed, merge in self.merges.items():
            source = self.lanes[feed].sources[number]
            feeds[feed] = {
                "read": source.read,
                "wins": merge.wins[number],
                "duplicates": merge.duplicates[number],
                "lapped": source.lapped,
                "damaged": source.damaged,
                "lag_rows": source.reader.lag + len(source.rows) if source.reader is not None else 0,
                "error": source.error,
            }
        newest = self._last_rcv()[number]
        age_s = max(0.0, time.time() - newest / 1e6) if newest >= 0 else -1.0
        return {"alive": self._alive_legs[number], "data_age_s": age_s, "feeds": feeds}
