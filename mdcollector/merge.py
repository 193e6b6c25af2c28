"""The merges of the arbiter: rows of several legs in the order of receipt go in, each row once and in its order comes out.

Called by `arbiter.py`, feed by feed; knows rows, flags and the own ring, never a leg's ring or a file. What is here
in `msgspec` structs is the arbiter's checkpoint as it stands. The rules are told at the head of `arbiter.py`.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import Any

import msgspec
import numpy as np

from mdcollector.errors import RingError
from mdcollector.records import BBO, BID, ORDERBOOK_L2, TRADES, UINT32_MAX, Action, Feed, Flag
from mdcollector.ring import RingWriter, Rows
from mdcollector.stats import Histogram

Parts = list[tuple[Rows, Any, int]]  # of each leg: rows, their times of receipt (never falling), its number

WAIT_S = 0.05  # a trade ahead of a missing one
BOOK_WAIT_S = 1.0  # a snapshot while another leg may still continue the book: venues send every 100 ms
BOOK_WAIT_MOST_S = 5.0  # the same while the other leg does continue it, but does not catch up with the snapshot
HELD_TRADES_MAX = 10_000  # of one instrument; then the missing one is not waited for any longer
HELD_MESSAGES_MAX = 10_000  # of one book
HELD_BYTES_MAX = 256 << 20  # of all books
HOLES_MAX = 1000  # of one instrument
COPIES_MAX = 1 << 17  # rows of one feed that are remembered; a copy that comes still later is not recognised
COPY_WINDOW_US = 60_000_000  # receive times of copies differ by no more
LOCAL_WINDOW_US = 2_000_000  # the same where the exchange gave no time, so equal content may be another event
COUNTER_RESET_MIN = 1000  # a counter so far back under a newer time began anew
GAP_GRACE_S = 1.0  # a leg tells its gap so long after data flows again at the latest
GAP_DECIDE_S = 10.0
LEG_GAPS_KEPT = 200
SAID_MAX = 1000
DUE_STEP_US = 10_000  # books that wait are not looked at more often than this
RING_SHARE = 4  # a checkpoint is due when this part of an own ring was written since the last one

_LAST, _SNAPSHOT, _RESYNCED = int(Flag.LAST), int(Flag.SNAPSHOT), int(Flag.RESYNCED)
_INVALID, _UNPROVEN = int(Flag.BOOK_INVALID), int(Flag.UNPROVEN)
_REPAIRED, _LOCAL = int(Flag.REPAIRED), int(Flag.TIME_LOCAL)
_NEW, _UPDATE, _DELETE = int(Action.NEW), int(Action.UPDATE), int(Action.DELETE)
NEVER = 1 << 62
_NOT_CONTENT = ("rcv_timestamp", "packet_id", "parse_ns", "publish_ns", "flags", "seq_id")


def _offset(feed: Feed, column: str) -> int:
    fields: Any = feed.dtype.fields
    return int(fields[column][1])


def _unpacker(feed: Feed, columns: Sequence[tuple[str, str]]) -> Callable[[bytes], Iterator[tuple[Any, ...]]]:
    """Iterator over some columns of packed rows; columns in the order of their offsets."""
    parts, end = ["<"], 0
    for column, code in columns:
        at = _offset(feed, column)
        parts += [f"{at - end}x", code]
        end = at + Struct("<" + code).size
    return Struct("".join([*parts, f"{feed.dtype.itemsize - end}x"])).iter_unpack


_levels_of = _unpacker(ORDERBOOK_L2, [("side", "b"), ("action", "B"), ("price", "d"), ("qty", "d")])
_ROW = TRADES.dtype.itemsize


# State. Everything here goes into the checkpoint as it stands.


class Waiting(msgspec.Struct):
    """A trade that waits for an earlier one."""

    raw: bytes
    leg: int
    time: int
    rcv: int
    since: float


class Hole(msgspec.Struct):
    """Missing trades first..last, what is left of a hole that the ledger knows as `whole`; () = it does not."""

    first: int
    last: int
    whole: tuple[int, ...]


class Trades(msgspec.Struct):
    """The counter of one instrument."""

    last: int = -1
    time: int = -1
    old_last: int = -1  # of the numbering before the counter began anew, at `old_time`
    old_time: int = -1
    holes: list[Hole] = []
    hole_last: int = -1  # the last missing one of all holes
    held: dict[int, Waiting] = {}


class Message(msgspec.Struct):
    """A book message: `prev` is the message before it on its leg, -1 = not known."""

    prev: int
    id: int
    time: int
    flags: int
    rcv: int
    since: float
    raw: bytes


class Chain(msgspec.Struct):
    """What one leg said of one book: id of its newest message, and what is not merged yet."""

    last: int = -1
    base: Message | None = None
    rewound: bool = False  # the snapshot is older than what this leg said before
    items: list[Message] = []


class Book(msgspec.Struct):
    """The merged book of one instrument."""

    chains: list[Chain]
    last: int = -1
    time: int = -1
    moved: float = 0.0
    moved_rcv: int = -1
    proven: bool = False  # it began with a snapshot and every message since is there
    crossed: bool = False
    bids: dict[float, float] = {}
    asks: dict[float, float] = {}
    doubted: int = -1  # behind this id, of this time, messages may be missing that the ledger does not name yet
    doubted_time: int = -1


class Copy(msgspec.Struct):
    """A published row: when it was received, and which legs (bits) brought it."""

    rcv: int
    legs: int


class LegGap(msgspec.Struct):
    """What a leg says it missed of a feed without ids."""

    feed: str
    ticker: str
    leg: int
    first: int
    last: int
    cause: str
    since: float = 0.0
    seen: dict[int, float] = {}  # leg -> since when it is known to have gone on behind the gap


_ONCE = [Copy(0, 0)]  # of a row with an id: who brought it does not matter, it is published once


# Merging


class Merge:
    """What the merges of all feeds share: sources, the own ring, counters, the batch that is about to be published."""

    def __init__(self, own: RingWriter, legs: int, ledger: "Ledger", clock: Callable[[], float]) -> None:
        self.own, self.feed, self.legs, self.ledger, self.clock = own, own.feed, legs, ledger, clock
        self.out: list[bytes] = []
        self.wins, self.duplicates = [0] * legs, [0] * legs
        self.counters: Counter[str] = Counter()
        self.publish_ns = Histogram()
        self.last_rcv = [-1] * legs

    def merge(self, parts: Parts) -> None:
        raise NotImplementedError

    def expire(self, through: float) -> None:
        """Give up waiting for what was due; everything that legs published before `through` was taken."""

    def finish(self) -> None:
        """The last row was merged."""

    def broken(self, leg: int) -> None:
        """What a leg says next does not follow what it said before."""

    def note(self, rows: Rows) -> None:
        """Rows that are in the own ring already, published behind the checkpoint."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        return 0

    def flush(self) -> None:
        """Publish the batch."""
        if not self.out:
            return
        rows = np.frombuffer(bytearray(b"".join(self.out)), dtype=self.feed.dtype)
        self.out.clear()
        self.finish_rows(rows)
        passed_ns = (time.time_ns() // 1000 - rows["rcv_timestamp"]) * 1000
        rows["publish_ns"] = np.clip(passed_ns, rows["publish_ns"], UINT32_MAX)
        self.publish_ns.add(rows["publish_ns"][rows["flags"] & (_REPAIRED | _SNAPSHOT) == 0])
        most, start = self.own.capacity // RING_SHARE, 0
        while len(rows) - start > most:  # a message is visible at once, so cut behind the end of one
            ends = np.flatnonzero(rows["flags"][start : start + most] & _LAST)
            if not len(ends):
                ends = np.flatnonzero(rows["flags"][start:] & _LAST)[:1]
            stop = start + int(ends[-1]) + 1
            self._append(rows[start:stop])
            start = stop
        self._append(rows[start:])

    def _append(self, rows: Rows) -> None:
        if len(rows):
            self.own.append_rows(rows)
            if self.own.next - self.own.sealed >= 1024:
                self.own.seal()
            self.own.wake()

    def finish_rows(self, rows: Rows) -> None:
        """Mark the end of each run of rows that one packet brought for one instrument."""
        ends = np.ones(len(rows), dtype=bool)
        ends[:-1] = (np.diff(rows["packet_id"]) != 0) | (np.diff(rows["ticker"].astype(np.int64)) != 0)
        rows["flags"][ends] |= _LAST


def _in_order(parts: Parts) -> tuple[Rows, list[int], list[int]]:
    """Rows of all legs in the order of receipt; leg and time of receipt of each."""
    if len(parts) == 1:
        rows, keys, leg = parts[0]
        return rows, [leg] * len(rows), keys.tolist()
    keys = np.concatenate([keys for _, keys, _ in parts])
    order = np.argsort(keys, kind="stable")
    legs = np.concatenate([np.full(len(rows), leg, dtype=np.int64) for rows, _, leg in parts])
    rows = joined([rows for rows, _, _ in parts])
    return chosen(rows, order), legs[order].tolist(), keys[order].tolist()


def chosen(rows: Rows, which: Any) -> Rows:
    """Rows by mask or index, as plain bytes: ten times as fast, and what lies between the columns comes along."""
    found: Rows = rows.view(f"V{rows.dtype.itemsize}")[which].view(rows.dtype)
    return found


def joined(parts: Sequence[Rows]) -> Rows:
    """A writable copy of all parts, byte by byte: numpy's own would leave out or pack what lies between the columns."""
    return np.frombuffer(bytearray().join(part.tobytes() for part in parts), dtype=parts[0].dtype)


class CopyMerge(Merge):
    """Feeds without a line of ids: a row is new unless the same was published and this leg has not brought it yet."""

    def __init__(self, own: RingWriter, legs: int, ledger: "Ledger", clock: Callable[[], float]) -> None:
        super().__init__(own, legs, ledger, clock)
        self.copies: dict[Any, list[Copy]] = {}
        self._ages: deque[tuple[int, Any]] = deque()
        self._newest = -1

    def merge(self, parts: Parts) -> None:
        rows, legs, _ = _in_order(parts)
        raw = rows.tobytes()
        size = self.feed.dtype.itemsize
        times = rows["rcv_timestamp"].tolist()
        local = (rows["flags"] & _LOCAL != 0).tolist()
        for i, key in enumerate(self.keys_of(rows)):
            if self.is_new(key, legs[i], times[i], local[i]):
                self.out.append(raw[i * size : (i + 1) * size])
                self.wins[legs[i]] += 1
            else:
                self.duplicates[legs[i]] += 1

    def keys_of(self, rows: Rows) -> list[Any]:
        """What makes rows copies of each other: ticker and id, or else the content."""
        content = joined([rows])
        for name in _NOT_CONTENT:
            content[name] = 0
        content["timestamp"][rows["flags"] & _LOCAL != 0] = 0
        keys: list[Any] = content.view(f"V{rows.dtype.itemsize}").tolist()
        if self.feed is BBO:
            ids, codes = rows["update_id"].tolist(), rows["ticker"].tolist()
            keys = [(c, i) if i >= 0 else key for key, c, i in zip(keys, codes, ids, strict=True)]
        return keys

    def is_new(self, key: Any, leg: int, rcv: int, local: bool) -> bool:
        """Whether to publish; remembers who brought what."""
        found = self.copies.get(key)
        if type(key) is tuple:
            if found is not None:
                return False
            self.remember(key, rcv, 0)
            return True
        bit = 1 << leg
        if found:
            window = LOCAL_WINDOW_US if local else COPY_WINDOW_US
            near = [c for c in found if not c.legs & bit and abs(c.rcv - rcv) <= window]
            if near:
                min(near, key=lambda c: abs(c.rcv - rcv)).legs |= bit
                return False
        self.remember(key, rcv, bit)
        return True

    def remember(self, key: Any, rcv: int, legs: int) -> None:
        if type(key) is tuple:
            self.copies[key] = _ONCE
        else:
            self.copies.setdefault(key, []).append(Copy(rcv, legs))
        self._ages.append((rcv, key))
        if rcv > self._newest:
            self._newest = rcv
        while self._ages and (self._ages[0][0] < self._newest - COPY_WINDOW_US or len(self._ages) > COPIES_MAX):
            self._forget(self._ages.popleft()[1])

    def _forget(self, key: Any) -> None:
        if type(key) is tuple:
            self.copies.pop(key, None)
            return
        found = self.copies[key]
        del found[0]
        if not found:
            del self.copies[key]

    def note(self, rows: Rows) -> None:
        for key, rcv in zip(self.keys_of(rows), rows["rcv_timestamp"].tolist(), strict=True):
            self.remember(key, rcv, 0)

    def note_ids(self, rows: Rows) -> None:
        """Rows published before the checkpoint: those with an id are not in it, the own ring has them."""
        for key, rcv in zip(self.keys_of(rows), rows["rcv_timestamp"].tolist(), strict=True):
            if type(key) is tuple:
                self.remember(key, rcv, 0)

    def saved(self) -> list[tuple[bytes, int, int]]:
        """Rows without an id for the checkpoint, oldest first."""
        seen: Counter[Any] = Counter()
        kept = []
        for _, key in self._ages:
            if type(key) is tuple:
                continue
            copy = self.copies[key][seen[key]]
            seen[key] += 1
            kept.append((key, copy.rcv, copy.legs))
        return kept

    def restore(self, saved: Sequence[tuple[bytes, int, int]]) -> None:
        for key, rcv, legs in saved:
            self.remember(key, rcv, legs)


class LatestMerge(Merge):
    """What is said of instruments: a row is new when it is younger than the last one and says something else."""

    def __init__(self, own: RingWriter, legs: int, ledger: "Ledger", clock: Callable[[], float]) -> None:
        super().__init__(own, legs, ledger, clock)
        self._last: dict[int, tuple[int, bytes]] = {}  # ticker -> time of receipt and content of the newest row

    def merge(self, parts: Parts) -> None:
        rows, legs, _ = _in_order(parts)
        size, raw = self.feed.dtype.itemsize, rows.tobytes()
        for i, is_new in enumerate(self._news(rows)):
            if is_new:
                self.out.append(raw[i * size : (i + 1) * size])
                self.wins[legs[i]] += 1
            else:
                self.duplicates[legs[i]] += 1

    def note(self, rows: Rows) -> None:
        for _ in self._news(rows):
            continue

    def _news(self, rows: Rows) -> Iterator[bool]:
        content = joined([rows])
        for name in (*_NOT_CONTENT, "timestamp"):
            content[name] = 0
        said = content.view(f"V{rows.dtype.itemsize}").tolist()
        for code, rcv, what in zip(rows["ticker"].tolist(), rows["rcv_timestamp"].tolist(), said, strict=True):
            last_rcv, last = self._last.get(code, (-1, b""))
            is_new = rcv > last_rcv and what != last
            if is_new:
                self._last[code] = rcv, what
            yield is_new


class TradeMerge(CopyMerge):
    """Trades by their counter, in its order; those without one by their id."""

    def __init__(self, own: RingWriter, legs: int, ledger: "Ledger", clock: Callable[[], float], wait_s: float) -> None:
        super().__init__(own, legs, ledger, clock)
        self.trades: dict[int, Trades] = {}
        self._wait_s = wait_s
        self._wait_us = int(wait_s * 1e6)
        self._due = NEVER  # received then or later, a row proves that a trade has waited long enough
        self._holding: set[int] = set()  # tickers with trades that wait
        self._filled: list[tuple[int, Hole]] = []

    def keys_of(self, rows: Rows) -> list[Any]:
        return list(zip(rows["ticker"].tolist(), rows["trade_id"].tolist(), strict=True))

    def merge(self, parts: Parts) -> None:
        rows, legs, keys = _in_order(parts)
        raw, out, trades, wins = rows.tobytes(), self.out, self.trades, self.wins
        codes, seqs, times = rows["ticker"].tolist(), rows["trade_seq"].tolist(), rows["timestamp"].tolist()
        at = 0
        for leg, key, code, seq, timestamp in zip(legs, keys, codes, seqs, times, strict=True):
            if key >= self._due:
                self._expire_received(key)
            state = trades.get(code)
            if state is not None and seq == state.last + 1 and seq and not state.held:
                state.last, state.time = seq, timestamp
                out.append(raw[at : at + _ROW])
                wins[leg] += 1
            elif state is not None and state.hole_last < seq <= state.last and state.last - seq < COUNTER_RESET_MIN:
                self.duplicates[leg] += 1
            else:
                self._other(leg, key, code, seq, timestamp, raw[at : at + _ROW])
            at += _ROW
        self._say_filled()

    def _other(self, leg: int, key: int, code: int, seq: int, timestamp: int, raw: bytes) -> None:
        """Everything but the next trade: the first one, one ahead, one that fills a hole, a copy, a counter anew."""
        if seq < 0:
            row = np.frombuffer(raw, dtype=TRADES.dtype)
            if self.is_new(self.keys_of(row)[0], leg, int(row["rcv_timestamp"][0]), local=False):
                self._publish(leg, raw)
            else:
                self.duplicates[leg] += 1
            return
        state = self.trades.get(code)
        if state is None:
            state = self.trades[code] = Trades()
        if seq <= state.last:
            self._behind(state, leg, code, seq, timestamp, raw)
        elif seq in state.held or (timestamp <= state.old_time and seq <= state.old_last):
            self.duplicates[leg] += 1
        else:
            state.held[seq] = Waiting(raw, leg, timestamp, key, self.clock())
            self._holding.add(code)
            self._due = min(self._due, key + self._wait_us)
            self._advance(state, code)
            if len(state.held) > HELD_TRADES_MAX:
                self.counters["held_overflow"] += 1
                self._go_on(state, code)

    def _behind(self, state: Trades, leg: int, code: int, seq: int, timestamp: int, raw: bytes) -> None:
        anew = timestamp > state.time and state.last - seq >= COUNTER_RESET_MIN
        if anew and not int(np.frombuffer(raw, dtype=TRADES.dtype)["flags"][0]) & _REPAIRED:
            while state.held:  # what they wait for does not come any more
                self._go_on(state, code)
            self._publish(leg, raw)
            self._begin_anew(state, code, seq, timestamp)
        elif self._fill(state, code, seq):
            self.counters["late"] += 1
            self._publish(leg, raw)
        else:
            self.duplicates[leg] += 1

    def _begin_anew(self, state: Trades, code: int, seq: int, timestamp: int) -> None:
        self.counters["counter_reset"] += 1
        self.ledger.gap("trades", self.own.tickers[code], -1, -1, state.time, timestamp, "ids_reset")
        state.old_last, state.old_time = state.last, state.time
        state.last, state.time = seq, timestamp
        state.holes, state.held, state.hole_last = [], {}, -1

    def _publish(self, leg: int, raw: bytes) -> None:
        self.out.append(raw)
        self.wins[leg] += 1

    def _advance(self, state: Trades, code: int) -> None:
        """Publish what waits and is next."""
        while state.last >= 0 and (next_ := state.held.pop(state.last + 1, None)) is not None:
            state.last, state.time = state.last + 1, next_.time
            self._publish(next_.leg, next_.raw)
        if not state.held:
            self._holding.discard(code)

    def _go_on(self, state: Trades, code: int) -> None:
        """The missing ones are a hole for now: publish the first one behind it."""
        seq = min(state.held)
        self._pass_over(state, code, seq, state.held[seq].time)
        state.last = seq - 1
        self._advance(state, code)

    def _pass_over(self, state: Trades, code: int, seq: int, timestamp: int) -> None:
        """Note the hole between the last trade and `seq`; what was before the first trade ever is none."""
        first = state.last + 1
        state.hole_last = max(state.hole_last, seq - 1) if first < seq else state.hole_last
        if state.last < 0:
            if seq:
                state.holes.append(Hole(0, seq - 1, ()))
            return
        if first <= seq - 1:
            state.holes.append(Hole(first, seq - 1, (first, seq - 1)))
            self.ledger.gap("trades", self.own.tickers[code], first, seq - 1, state.time, timestamp, "sequence")
        if len(state.holes) > HOLES_MAX:
            del state.holes[1 if not state.holes[0].whole else 0]
            self.counters["hole_forgotten"] += 1

    def _fill(self, state: Trades, code: int, seq: int) -> bool:
        """Take a trade out of the hole it lies in; False when it lies in none."""
        at = next((i for i, hole in enumerate(state.holes) if hole.first <= seq <= hole.last), -1)
        if at < 0:
            return False
        hole = state.holes[at]
        behind = hole.whole or (
            seq + 1,
            hole.last,
        )  # before the first trade ever nothing is missing, behind this one it is
        rest = [Hole(hole.first, seq - 1, hole.whole), Hole(seq + 1, hole.last, behind)]
        if not hole.whole and seq < hole.last:
            self.ledger.gap("trades", self.own.tickers[code], seq + 1, hole.last, -1, 0, "sequence")
        state.holes[at : at + 1] = [part for part in rest if part.first <= part.last]
        state.hole_last = max((part.last for part in state.holes), default=-1)
        if hole.whole and all(part.whole != hole.whole for part in state.holes):
            self._filled.append((code, hole))
        return True

    def _say_filled(self) -> None:
        for code, hole in self._filled:
            first, last = hole.whole
            self.ledger.gap("trades", self.own.tickers[code], first, last, -1, 0, "filled", repaired=True)
        self._filled.clear()

    def _expire_received(self, rcv: int) -> None:
        """As `expire`, in times of receipt: a backlog is merged as it would have been when it came."""
        self._due = NEVER
        for code in list(self._holding):
            state = self.trades[code]
            while state.held and (due := state.held[min(state.held)].rcv + self._wait_us) <= rcv:
                self._go_on(state, code)
            if state.held:
                self._due = min(self._due, due)

    def expire(self, through: float) -> None:
        for code in list(self._holding):
            state = self.trades[code]
            while state.held and state.held[min(state.held)].since + self._wait_s <= through:
                self._go_on(state, code)

    def note_ids(self, rows: Rows) -> None:
        super().note_ids(chosen(rows, rows["trade_seq"] < 0))

    def note(self, rows: Rows) -> None:
        counted = rows["trade_seq"] >= 0
        super().note(chosen(rows, ~counted))
        columns = (rows[name][counted].tolist() for name in ("ticker", "trade_seq", "timestamp", "flags"))
        for code, seq, timestamp, flags in zip(*columns, strict=True):
            state = self.trades.setdefault(code, Trades())
            state.held.pop(seq, None)
            if seq > state.last:
                self._pass_over(state, code, seq, timestamp)
                state.last, state.time = seq, timestamp
            elif timestamp > state.time and state.last - seq >= COUNTER_RESET_MIN and not flags & _REPAIRED:
                self._begin_anew(state, code, seq, timestamp)
            else:
                self._fill(state, code, seq)
        self._say_filled()

    def restore_trades(self, trades: dict[int, Trades]) -> None:
        self.trades, now = trades, self.clock()
        for state in trades.values():
            for waiting in state.held.values():
                waiting.since = now

    def settle(self) -> None:
        """After `note`: publish what the own rows made next."""
        for code, state in self.trades.items():
            for seq in [seq for seq in state.held if seq <= state.last]:
                del state.held[seq]
            if state.held:
                self._holding.add(code)
                self._due = 0
            self._advance(state, code)

    @property
    def waiting(self) -> int:
        return sum(len(self.trades[code].held) for code in self._holding)


class BookMerge(Merge):
    """Books, message by message; see the head of the file for the rule."""

    def __init__(self, own: RingWriter, legs: int, ledger: "Ledger", clock: Callable[[], float], wait_s: float) -> None:
        super().__init__(own, legs, ledger, clock)
        self.books: dict[int, Book] = {}
        self.alive: Callable[[int], bool] = lambda _leg: True
        self._wait_s = wait_s
        self._due = NEVER  # as for trades
        self._pending: set[int] = set()  # tickers with messages that are not merged yet
        self._held_bytes = 0
        self._counts: list[int] = []  # per message of the batch: rows, flags to set, flags to clear
        self._set: list[int] = []
        self._clear: list[int] = []
        self._actions: list[int] = []

    def merge(self, parts: Parts) -> None:
        now = self.clock()
        messages: list[tuple[Any, ...]] = []
        for rows, keys, leg in parts:
            raw = rows.tobytes()
            ends = np.flatnonzero(rows["flags"] & _LAST) + 1
            starts = np.concatenate(([0], ends[:-1]))
            last = rows[ends - 1]
            columns = (last[name].tolist() for name in ("ticker", "update_id", "flags", "timestamp"))
            bounds = (starts * _ROW).tolist(), (ends * _ROW).tolist()
            for key, low, high, *values in zip(keys[ends - 1].tolist(), *bounds, *columns, strict=True):
                messages.append((key, leg, *values, raw[low:high]))
        if len(parts) > 1:
            messages.sort(key=lambda m: m[0])
        for key, leg, code, update_id, flags, timestamp, raw in messages:
            if key >= self._due:
                self._expire_received(key)
            book = self.books.get(code)
            if book is None:
                book = self.books[code] = Book([Chain() for _ in range(self.legs)])
            chain = book.chains[leg]
            if flags & _SNAPSHOT:
                self._snapshot(book, chain, leg, code, Message(-1, update_id, timestamp, flags, key, now, raw))
                continue
            prev, chain.last = chain.last, update_id
            if not chain.items and chain.base is None and not flags & _INVALID:  # the common cases, without detour
                if 0 <= prev <= book.last < update_id:
                    self._apply(book, leg, update_id, timestamp, 0, raw, key, now)
                    if code in self._pending:
                        self._drain(book, code)
                    continue
                if update_id <= book.last:
                    self.duplicates[leg] += len(raw) // _ROW
                    continue
            chain.items.append(Message(prev, update_id, timestamp, flags, key, now, raw))
            self._held_bytes += len(raw)
            self._wait_for(code, key)
            if chain.rewound:
                self._rewound(book, chain, leg, code)
            self._drain(book, code)
            if len(chain.items) > HELD_MESSAGES_MAX:
                self.counters["held_overflow"] += 1
                self._give_up(book, code)
        if self._held_bytes > HELD_BYTES_MAX:
            self.counters["held_overflow"] += 1
            for code in list(self._pending):
                self._give_up(self.books[code], code)

    # What a leg says

    def _snapshot(self, book: Book, chain: Chain, leg: int, code: int, message: Message) -> None:
        self.counters["superseded"] += len(chain.items)
        self._held_bytes += len(message.raw) - sum(len(item.raw) for item in chain.items)
        if chain.base is not None:
            self._held_bytes -= len(chain.base.raw)
        chain.items = []
        chain.base, chain.rewound, chain.last = message, 0 <= message.id < chain.last, message.id
        self._wait_for(code, message.rcv)
        self._drain(book, code)

    def _wait_for(self, code: int, rcv: int) -> None:
        self._pending.add(code)
        self._due = min(self._due, rcv + int(min(self._wait_s, WAIT_S) * 1e6))

    def _rewound(self, book: Book, chain: Chain, leg: int, code: int) -> None:
        """A snapshot older than what the leg said before: an old answer, unless newer events have lower ids."""
        newest = chain.items[-1]
        if newest.id > book.last or len(chain.items) > HELD_MESSAGES_MAX // 2:
            chain.rewound = False
        elif newest.time > book.time and chain.base is not None:
            chain.rewound = False
            self.counters["ids_reset"] += 1
            self._load(book, leg, code, "ids_reset")

    def broken(self, leg: int) -> None:
        for book in self.books.values():
            book.chains[leg].last = -1

    # The merged book

    def _drain(self, book: Book, code: int) -> None:
        """Apply everything that continues the book, drop what it holds already."""
        progress = True
        while progress:
            progress = False
            for leg, chain in enumerate(book.chains):
                if chain.rewound:
                    continue
                base = chain.base
                old = base is not None and base.id <= book.last
                # Without its state the arbiter reads again what the legs had said before the last of its own rows.
                again = base is not None and old and base.rcv < book.moved_rcv
                if base is not None and not again and (book.last < 0 or not book.proven or (book.crossed and old)):
                    self._load(book, leg, code, "snapshot")
                    progress = True
                elif base is not None and old:
                    self.duplicates[leg] += len(base.raw) // _ROW
                    self._held_bytes -= len(base.raw)
                    chain.base = None
                progress = self._drain_chain(book, leg, chain) or progress
        if not any(chain.items or chain.base for chain in book.chains):
            self._pending.discard(code)

    def _drain_chain(self, book: Book, leg: int, chain: Chain) -> bool:
        done, applied = 0, False
        for item in chain.items:
            if item.id <= book.last:
                self.duplicates[leg] += len(item.raw) // _ROW
            elif not 0 <= item.prev <= book.last or (item.flags & _UNPROVEN and book.proven):
                break  # an unproven one its leg could not join to a book: what it follows is not known
            else:
                if item.flags & _UNPROVEN:
                    self._doubt(book)
                self._apply(book, leg, item.id, item.time, item.flags, item.raw, item.rcv, self.clock())
                applied = True
            self._held_bytes -= len(item.raw)
            done += 1
        del chain.items[:done]
        return applied

    def _apply(
        self, book: Book, leg: int, id_: int, timestamp: int, flags: int, raw: bytes, rcv: int, now: float
    ) -> None:
        self._change(book, raw)
        book.last, book.time, book.moved, book.moved_rcv = id_, timestamp, now, rcv
        book.crossed = bool(flags & _INVALID)
        self.out.append(raw)
        self.wins[leg] += len(raw) // _ROW
        self._counts.append(len(raw) // _ROW)
        self._set.append(0 if book.proven else _INVALID | _UNPROVEN)
        self._clear.append(0)

    def _change(self, book: Book, raw: bytes) -> None:
        """Apply absolute quantities and say what each did to this book; of one that is not proven nobody knows."""
        bids, asks, proven, actions = book.bids, book.asks, book.proven, self._actions
        for side, action, price, qty in _levels_of(raw):
            levels = bids if side == BID else asks
            if qty and side:
                actions.append(_UPDATE if price in levels or not proven else _NEW)
                levels[price] = qty
            else:
                levels.pop(price, None)
                actions.append(_DELETE if side else action)

    def _load(self, book: Book, leg: int, code: int, cause: str) -> None:
        """Begin the book anew with the snapshot of a leg."""
        chain = book.chains[leg]
        base = chain.base
        assert base is not None
        again = book.last >= 0
        if again:
            self._tell_skipped(book, code, base.id, base.time, cause)
        chain.base = None
        self._held_bytes -= len(base.raw)
        self._take_snapshot(book, base.id, base.time, base.raw)
        book.moved, book.moved_rcv = self.clock(), base.rcv
        self.out.append(base.raw)
        self.wins[leg] += len(base.raw) // _ROW
        self._counts.append(len(base.raw) // _ROW)
        self._set.append(_RESYNCED if again else 0)
        self._clear.append(0 if again else _RESYNCED)
        self.counters["resyncs" if again else "books_started"] += 1

    def _take_snapshot(self, book: Book, id_: int, timestamp: int, raw: bytes) -> None:
        book.bids, book.asks = {}, {}
        for side, action, price, qty in _levels_of(raw):
            if side and qty:
                (book.bids if side == BID else book.asks)[price] = qty
            self._actions.append(action)
        book.last, book.time, book.proven, book.crossed = id_, timestamp, True, False
        book.doubted = book.doubted_time = -1

    def _tell_skipped(self, book: Book, code: int, id_: int, timestamp: int, cause: str) -> None:
        """A snapshot replaces the book: what lies between is missing, and what was in doubt before stays so."""
        if book.proven and id_ == book.last:
            return
        last, time_ = (book.last, book.time) if book.doubted < 0 else (book.doubted, book.doubted_time)
        first, last = min(last + 1, id_), max(id_, book.last)
        self.ledger.gap("orderbook_l2", self.own.tickers[code], first, last, time_, timestamp, cause)

    def _doubt(self, book: Book) -> None:
        """The next message stands in no book either, so between the two may be a hole; told when it is known how far."""
        if book.doubted < 0:
            book.doubted, book.doubted_time = book.last, book.time

    def finish(self) -> None:
        for code, book in self.books.items():
            if book.doubted >= 0:
                span = book.doubted + 1, book.last, book.doubted_time, book.time
                self.ledger.gap("orderbook_l2", self.own.tickers[code], *span, "sequence")

    # What waits

    def expire(self, through: float) -> None:
        for code in list(self._pending):
            book = self.books[code]
            waiting = self._waiting_of(book)
            if waiting:
                since, wait_s = min(message.since for message in waiting), self._wait_of(book)
                if max(since, book.moved) + wait_s <= through or since + BOOK_WAIT_MOST_S <= through:
                    self._give_up(book, code)

    def _expire_received(self, rcv: int) -> None:
        """As `expire`, in times of receipt: a backlog is merged as it would have been when it came."""
        self._due = NEVER
        for code in list(self._pending):
            book = self.books[code]
            while waiting := self._waiting_of(book):
                since, wait_us = min(message.rcv for message in waiting), int(self._wait_of(book) * 1e6)
                due = min(max(since, book.moved_rcv) + wait_us, since + int(BOOK_WAIT_MOST_S * 1e6))
                if due > rcv:
                    self._due = min(self._due, max(due, rcv + DUE_STEP_US))
                    break
                self._give_up(book, code)

    def _waiting_of(self, book: Book) -> list[Message]:
        """The first messages of each leg that cannot be merged yet."""
        chains = [chain for chain in book.chains if (chain.base or chain.items) and not chain.rewound]
        return [chain.base or chain.items[0] for chain in chains]

    def _wait_of(self, book: Book) -> float:
        return self._wait_s if self._may_continue(book) else min(self._wait_s, WAIT_S)

    def _may_continue(self, book: Book) -> bool:
        """Some leg that lives is not beyond the merged book yet."""
        return any(
            self.alive(leg) and (chain.rewound or (chain.base is None and not chain.items))
            for leg, chain in enumerate(book.chains)
        )

    def _give_up(self, book: Book, code: int) -> None:
        """No leg continues the book: take the oldest snapshot, or without any go on as not proven."""
        chains = [(leg, chain) for leg, chain in enumerate(book.chains) if not chain.rewound]
        bases = [(chain.base.id, leg) for leg, chain in chains if chain.base is not None]
        if bases:
            leg = min(bases)[1]
            self._load(book, leg, code, "sequence")
        else:
            heads = [(chain.items[0].id, leg) for leg, chain in chains if chain.items]
            if not heads:
                return
            leg = min(heads)[1]
            item = book.chains[leg].items.pop(0)
            self._held_bytes -= len(item.raw)
            self._go_on_unproven(book, code, item.id, item.time)
            self._apply(book, leg, item.id, item.time, item.flags, item.raw, item.rcv, self.clock())
        self._drain(book, code)

    def _go_on_unproven(self, book: Book, code: int, id_: int, timestamp: int) -> None:
        if book.last >= 0:
            first, last = book.last + 1, max(book.last + 1, id_ - 1)
            self.ledger.gap("orderbook_l2", self.own.tickers[code], first, last, book.time, timestamp, "sequence")
        book.proven = False
        self.counters["gone_on_unproven"] += 1

    @property
    def waiting(self) -> int:
        chains = [chain for code in self._pending for chain in self.books[code].chains]
        return sum(len(chain.items) + (chain.base is not None) for chain in chains)

    @property
    def unproven(self) -> int:
        return sum(not book.proven or book.crossed for book in self.books.values())

    def finish_rows(self, rows: Rows) -> None:
        rows["action"] = self._actions
        set_, clear = np.array(self._set, dtype=np.uint8), np.array(self._clear, dtype=np.uint8)
        rows["flags"] = (rows["flags"] | np.repeat(set_, self._counts)) & ~np.repeat(clear, self._counts)
        for part in (self._actions, self._counts, self._set, self._clear):
            part.clear()

    # After a crash

    def note(self, rows: Rows) -> None:
        ends = np.flatnonzero(rows["flags"] & _LAST) + 1
        raw, start = rows.tobytes(), 0
        names = ("ticker", "update_id", "flags", "timestamp", "rcv_timestamp")
        columns = (rows[name][ends - 1].tolist() for name in names)
        for end, code, update_id, flags, timestamp, rcv in zip(ends.tolist(), *columns, strict=True):
            message, start = raw[start * _ROW : end * _ROW], end
            book = self.books.setdefault(code, Book([Chain() for _ in range(self.legs)]))
            book.moved_rcv = rcv
            if flags & _SNAPSHOT:
                if flags & _RESYNCED:
                    self._tell_skipped(book, code, update_id, timestamp, "snapshot")
                self._take_snapshot(book, update_id, timestamp, message)
                continue
            if flags & _UNPROVEN and book.proven:
                self._go_on_unproven(book, code, update_id, timestamp)
            elif flags & _UNPROVEN:
                self._doubt(book)
            self._change(book, message)
            book.last, book.time, book.crossed = update_id, timestamp, bool(flags & _INVALID)
        self._actions.clear()

    def restore_books(self, books: dict[int, Book]) -> None:
        self.books, now = books, self.clock()
        for book in books.values():
            book.moved = now
            for chain in book.chains:
                for message in (*chain.items, *([chain.base] if chain.base else [])):
                    message.since = now
                    self._held_bytes += len(message.raw)

    def settle(self) -> None:
        """After `note`: drop what the own rows hold, apply what they made next."""
        for code, book in self.books.items():
            if any(chain.items or chain.base for chain in book.chains):
                self._pending.add(code)
                self._due = 0
                self._drain(book, code)


# The ledger of the merged feed


class Ledger:
    """Writes the own `gaps` rows: holes in ids as the merges find them, and times in which every leg had a gap."""

    def __init__(self, own: RingWriter, exchange: int, legs: int, clock: Callable[[], float]) -> None:
        self.own, self._exchange, self._legs, self._clock = own, exchange, legs, clock
        self.out: list[tuple[object, ...]] = []
        self.counters: Counter[str] = Counter()
        self.leg_gaps: list[LegGap] = []
        self.undecided: list[LegGap] = []
        self.said: dict[tuple[str, str, int, int], None] = {}

    def gap(
        self, feed: str, ticker: str, first: int, last: int, from_time: int, to_time: int, cause: str,
        *, repaired: bool = False,
    ) -> None:  # fmt: skip
        """A hole; ids both included, times in us (`to_time` 0 = now)."""
        self.counters[f"gap_{feed}_{cause}" + ("_repaired" if repaired else "")] += 1
        now = time.time_ns() // 1000
        try:
            code = self.own.code(ticker)
        except RingError:  # the table is full
            self.counters["gap_not_told"] += 1
            return
        self.out.append(
            (now, now, 0, 0, 0, code, self._exchange, _LAST | _LOCAL,
             repaired, feed.encode(), first, last, from_time, to_time or now, cause.encode())
        )  # fmt: skip

    def drop_known(self, rows: Rows) -> None:
        """Take out of the batch what is in the own ring already."""
        columns = [rows[name].tolist() for name in ("feed", "ticker", "first_id", "last_id", "repaired")]
        known = set(zip(*columns, strict=True))
        self.out = [r for r in self.out if (r[9], r[5], r[10], r[11], int(bool(r[8]))) not in known]
        for feed, code, first, from_time, to_time in zip(
            *(rows[name].tolist() for name in ("feed", "ticker", "first_id", "from_time", "to_time")), strict=True
        ):
            if first < 0:
                self._say((feed.decode(), self.own.tickers[code], from_time, to_time))

    def _say(self, key: tuple[str, str, int, int]) -> bool:
        """Whether this was not said before."""
        if key in self.said:
            return False
        self.said[key] = None
        if len(self.said) > SAID_MAX:
            del self.said[next(iter(self.said))]
        return True

    def leg_gap(self, gap: LegGap) -> None:
        """A leg missed something that has no ids."""
        gap.since = self._clock()
        self.leg_gaps.append(gap)
        del self.leg_gaps[: -LEG_GAPS_KEPT * self._legs]
        self.undecided.append(gap)

    def decide(self, last_rcv: Sequence[int], *, force: bool = False) -> None:
        """Whether another leg covered what one missed: it did when it went on and does not say that it missed it too."""
        left, now = [], self._clock()
        for gap in self.undecided:
            late = force or now - gap.since > GAP_DECIDE_S
            first, last, covered, known = gap.first, gap.last, False, True
            for leg in range(self._legs):
                if leg == gap.leg:
                    continue
                same = [
                    g for g in self.leg_gaps
                    if g.leg == leg and g.feed == gap.feed and (g.ticker == gap.ticker or "*" in (g.ticker, gap.ticker))
                    and g.first <= last and g.last >= first
                ]  # fmt: skip
                if same:
                    first, last = max(first, min(g.first for g in same)), min(last, max(g.last for g in same))
                elif last_rcv[leg] > gap.last:
                    seen = gap.seen.setdefault(leg, now)
                    covered = covered or force or now - seen > GAP_GRACE_S
                    known = False
                else:
                    known = False  # it was silent: dead, or there was nothing to say
            if covered:
                self.counters["leg_gap_covered"] += 1
            elif not (known or late):
                left.append(gap)
            elif self._say((gap.feed, gap.ticker, first, last)):
                self.gap(gap.feed, gap.ticker, -1, -1, first, last, gap.cause)
        self.undecided = left

    def flush(self) -> None:
        if self.out:
            self.own.append_many(self.out)
            self.out.clear()
            self.own.seal()
            self.own.wake()
