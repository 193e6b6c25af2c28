"""Continuity: proves that nothing is missing between two messages of an instrument, and heals what is.

`BookSync` keeps the live book of one instrument by the venue's own procedure, `TradeSync` watches trade counters that
grow by one, `TradeIds` trades whose ids do not count. They are driven by `exchanges/*`, say what they need through the venue (a snapshot, a repair) and never do
I/O. Venue rules come in as one function; the procedure around them is the same everywhere:

    book   WAITING --snapshot--> LIVE --hole--> BROKEN --snapshot, or the missing messages--> LIVE
    Messages that cannot be applied yet are held, so after the snapshot they follow without a second hole.
    A hole is told when it is seen; a snapshot that ends it tells the rest, up to its own id, under the same cause.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from heapq import nlargest, nsmallest
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np

from mdcollector.emit import PRICE_MAX, QTY_MAX, TIME_MAX_US, Emit, Instrument, level_code
from mdcollector.errors import FrameError
from mdcollector.records import ASK, BID, UNKNOWN, Action, Flag

HELD_MESSAGES_MAX = 10_000  # 1000 s of a 100 ms stream; beyond it the oldest are published as not proven
HELD_LEVELS_MAX = 250_000  # bounds the memory of held messages, about 30 MB at the very worst
CROSSED_GRACE_US = 5_000_000  # a book that stays crossed this long is taken from a new snapshot
STALE_SNAPSHOTS_MAX = 5  # so many in a row are older than the first held message: it is not to be believed
OLD_RUN_MAX = 600  # so many old messages and not one that follows, a minute: then it is the own id that is wrong
LEVELS_MAX = 100_000  # in one message; the largest book ever recorded has 55,000, a ring takes half its capacity
HOLES_MAX = 1000  # open holes remembered per instrument
TAIL_IDS = 1000  # asked for behind the last trade after a connection ended; what venues give at once
REPAIR_IDS_MAX = 50_000  # a longer hole is recorded and not fetched: it would eat the venue's budget for hours
COUNTER_JUMP_MAX = 100_000_000  # a trade counter so far ahead, or one behind with a newer time, is not believed at once
SUSPECTS_BELIEVED = 3  # so many of them that follow each other closely are
SUSPECT_STEP_MAX = 10_000
TRADE_IDS_KEPT = 2000  # ids remembered at least, per instrument; venues give 1000 recent trades at once
DOUBTS_MAX = 100  # recorded holes that one answer may still close
NO_EXECUTION = "no_execution"  # cause in the ledger of a counter that no execution has

TOP_LEVELS = 128  # best levels of a side that are put in order
TOP_MAX, FRESH_MAX = 512, 512  # entries, dead and double ones among them; then they are sorted out
REMOVED_MAX = 2000  # removed levels that a side keeps beside twice the live ones
INFINITY = float("inf")
NOTHING = float("nan")  # the price of an empty side; one object, so that equal tuples of best prices compare equal

_INVALID, _SNAPSHOT, _RESYNCED = int(Flag.BOOK_INVALID), int(Flag.SNAPSHOT), int(Flag.RESYNCED)
_REPAIRED, _LAST = int(Flag.REPAIRED), int(Flag.LAST)
_UNPROVEN = _INVALID | int(Flag.UNPROVEN)
_BID_CODES, _ASK_CODES = ([level_code(side, action) for action in Action] for side in (BID, ASK))
_EMPTY_CODE = level_code(UNKNOWN, Action.DELETE)  # a row that is no level


Pairs = Sequence[tuple[float, float]]
Values = np.ndarray[Any, np.dtype[np.float64]]
OLD, NEXT, HOLE = -1, 0, 1  # what a book message is, seen from the last applied id
FollowRule = Callable[[int, int, int, int], int]  # (last applied id, first, last, previous id of the message)
WAITING, LIVE, BROKEN = "waiting", "live", "broken"


class Delta(NamedTuple):
    """A book message that is held; ids by the venue's meaning, quantity 0 removes a level."""

    first_id: int
    last_id: int
    prev_id: int
    timestamp: int
    bids: Pairs
    asks: Pairs
    rcv_us: int
    packet_id: int


class _Side:
    """One side of a live book: price -> quantity (0 = removed), and what it takes to see whether the book is crossed.

    `edge` is at least as good as the best price. In nine of ten recorded messages that proves that the book is not
    crossed; only when it does not, `best` is asked. `_top` holds every level at or above `_floor`, the best one last,
    except those that came since it was sorted: they wait in `_fresh`. Removed levels die in place, keep it when they
    come back, and are dropped when they come up. So a level costs a look-up and a dict store, and no work to keep it in
    order. A removed level that `levels` still knows is one that has its place, or needs none as it lies beyond `_floor`.
    """

    __slots__ = ("_better", "_codes", "_floor", "_fresh", "_levels_max", "_none", "_top", "edge", "levels")

    def __init__(self, side: int) -> None:
        self._codes = _BID_CODES if side == BID else _ASK_CODES
        self._better: Callable[[list[float]], float] = max if side == BID else min
        self._none = -INFINITY if side == BID else INFINITY  # a price worse than any
        self.load(())

    def load(self, pairs: Pairs) -> None:
        """Start over with these levels."""
        self.levels = dict(pairs)
        self._fresh: list[float] = []
        self._sort_all()

    def _drop_removed(self) -> None:
        self.levels = {price: qty for price, qty in self.levels.items() if qty}
        self._levels_max = REMOVED_MAX + 3 * len(self.levels)

    def _sort_all(self) -> None:
        """Put the best levels in order, looking at all of them."""
        self._drop_removed()
        best = nlargest if self._better is max else nsmallest
        self._top = best(TOP_LEVELS, self.levels)[::-1]
        self._floor = self._top[0] if len(self._top) == TOP_LEVELS else self._none
        self._fresh.clear()
        self.edge = self._top[-1] if self._top else self._none

    def change(self, pairs: Pairs, codes: list[bytes]) -> None:
        """Apply absolute quantities; adds for each level the code of what it did."""
        levels, fresh = self.levels, self._fresh
        get, (new, update, delete) = levels.get, self._codes
        edges = [self.edge]
        # One loop: a comprehension for the codes and dict.update behind it take 1.4 us more for 20 levels.
        for price, qty in pairs:
            old = get(price)
            if old:
                codes.append(update if qty else delete)
                levels[price] = qty
            elif qty:
                codes.append(new)
                edges.append(price)
                if old is None:
                    fresh.append(price)
                levels[price] = qty
            else:
                codes.append(delete)
        if len(edges) > 1:
            self.edge = self._better(edges)
            if len(fresh) > FRESH_MAX:
                self._sort_fresh()
        if len(levels) > self._levels_max:
            self._drop_removed()

    def _sort_fresh(self) -> None:
        """Put the levels that came since the last time in order with the others."""
        floor, top, bids = self._floor, self._top, self._better is max
        top += [price for price in self._fresh if (price >= floor if bids else price <= floor)]
        self._fresh.clear()
        top.sort(reverse=not bids)
        if len(top) > TOP_MAX:  # the best ones are enough, until they are used up
            del top[:-TOP_LEVELS]
            self._floor = top[0]

    def best(self) -> float:
        """The best price, a price worse than any when the side is empty; `edge` is exact then."""
        levels, top = self.levels, self._top
        if levels.get(self.edge):
            return self.edge
        if self._fresh:
            self._sort_fresh()
        while top and not levels.get(top[-1]):
            levels.pop(top.pop(), None)
        if top:
            self.edge = top[-1]
        elif self._floor == self._none:
            self.edge = self._none
        else:
            self._sort_all()
        return self.edge


class BookSync:
    """The live book of one instrument: applies, checks and emits every message; asks for a snapshot when it must.

    `follows` is the venue's continuity rule. `want_snapshot` asks the venue for a new snapshot (once per need).
    `published_id` is the last id that an earlier life of this connector published, -1 for none.
    """

    __slots__ = (
        "_accounted_id", "_asks", "_bids", "_cause_id", "_emit", "_follows", "_held", "_held_levels", "_hole",
        "_old_from", "_old_id", "_old_run", "_unproven_id", "_want_snapshot", "cause", "crossed_since",
        "instrument", "last_id", "last_time", "proven", "stale", "state",
    )  # fmt: skip

    def __init__(
        self,
        emit: Emit,
        instrument: Instrument,
        follows: FollowRule,
        want_snapshot: Callable[["BookSync"], None],
        published_id: int = -1,
    ) -> None:
        self._emit, self.instrument, self._follows, self._want_snapshot = emit, instrument, follows, want_snapshot
        self._bids, self._asks = _Side(BID), _Side(ASK)
        self._held: deque[Delta] = deque()
        self._held_levels = 0
        self.stale = 0  # snapshots in a row that were too old
        self.state = WAITING
        self.last_id = published_id
        self.last_time = -1
        # Live: of a hole that begins behind `_cause_id`; of any other one it is "sequence". Else of what a snapshot skips.
        self.cause = "restart" if published_id >= 0 else "snapshot"
        self._cause_id = published_id
        self._hole: tuple[int, int] | None = None  # as the ledger has it; late messages may fill it
        self._accounted_id = published_id  # while not live: all up to it is published or told as missing
        self._unproven_id = -1  # the newest that was published without a book
        self._old_run = self._old_from = 0  # old messages since `last_id` was `_old_id`, first id of the first one
        self._old_id = -1
        self.crossed_since = 0
        self.proven: tuple[int, int] | None = None  # id and time of the last proof, where ids cannot tell a hole

    # What the venue says

    def delta(self, first_id: int, last_id: int, prev_id: int, timestamp: int, bids: Pairs, asks: Pairs) -> None:
        """One message, in the order of arrival."""
        if self.state is not LIVE:
            self._hold(first_id, last_id, prev_id, timestamp, bids, asks)
            if self.state is BROKEN:
                self._try_held()
            return
        follows = self._follows(self.last_id, first_id, last_id, prev_id)
        if follows == NEXT:
            self._apply(last_id, timestamp, bids, asks)
        elif follows == OLD:
            self._old(first_id, last_id, timestamp)
        else:
            last_missing = prev_id if prev_id >= 0 else first_id - 1
            cause = self.cause if self.last_id == self._cause_id else "sequence"
            self._break(self.last_id + 1, max(last_missing, self.last_id + 1), timestamp, cause, fillable=True)
            self._hold(first_id, last_id, prev_id, timestamp, bids, asks)
            self._want_snapshot(self)

    def snapshot(self, last_id: int, timestamp: int, bids: Pairs, asks: Pairs, *, in_band: bool = False) -> bool:
        """A full book. False: it is older than the messages that are held, so it was not taken.

        `in_band`: it came on the channel of the changes, in their order, so nothing that is held can be newer.
        """
        follows = self._follows
        values = _checked(bids, asks, last_id)
        held: list[Delta] = []
        superseded: list[Delta] = []
        for d in self._held:
            (superseded if follows(last_id, d.first_id, d.last_id, d.prev_id) == OLD else held).append(d)
        if held and follows(last_id, held[0].first_id, held[0].last_id, held[0].prev_id) == HOLE:
            if not in_band:
                self._emit.counters["book_snapshot_stale"] += 1
                self.stale += 1
                if self.stale < STALE_SNAPSHOTS_MAX:
                    return False
                while self._held:  # then it is the held messages that are wrong
                    self._publish_unproven()
            held, superseded = [], [*self._held]
        self.stale = 0
        self._tell_skipped(last_id, timestamp, superseded)
        self._emit.counters["book_superseded"] += len(superseded)
        again = self.last_id >= 0
        self._bids.load(bids)
        self._asks.load(asks)
        self.last_id, self.last_time = last_id, timestamp or self._emit.rcv_us
        emit = self._emit
        flags = _SNAPSHOT | _RESYNCED if again else _SNAPSHOT
        sides = zip((_BID_CODES, _ASK_CODES), (bids, asks), strict=True)
        codes = [codes[0 if qty else 2] for codes, pairs in sides for _, qty in pairs]
        if not codes:  # a reader must see that the book is empty now
            codes, values = [_EMPTY_CODE], np.zeros((1, 2))
        parse_ns = emit.clock() - emit.t0_ns
        emit.levels(self.instrument, timestamp, flags, parse_ns, values, codes, last_id)
        self.state, self.cause = LIVE, "sequence"
        self._release(held)
        return True

    def disconnected(self, cause: str = "reconnect") -> None:
        """The connection ended: a hole that shows next is its doing."""
        if self.state is not WAITING:
            self.cause, self._cause_id = cause, self.last_id

    def distrust(self, cause: str, since: tuple[int, int] | None = None) -> None:
        """Give the book up and take a new snapshot: it is proven wrong, or its continuity cannot be shown any more.

        `since` (else `proven`): id and time of the last state that is sure; the ledger then names all that followed.
        """
        if self.state is LIVE:
            first, last, from_time = self.last_id, self.last_id, self.last_time
            if (since := since or self.proven) is not None:
                first, last, from_time = since[0] + 1, self.last_id + 1, since[1]
            self._break(first, last, self._emit.rcv_us, cause, fillable=False, from_time=from_time)
        self._want_snapshot(self)

    def lost(self, upto_id: int, cause: str) -> None:
        """Messages behind the last applied one, up to `upto_id`, may be missing: give the book up for a new snapshot."""
        if self.state is LIVE:
            first = self.last_id + 1
            self._break(first, max(first, upto_id), self._emit.rcv_us, cause, fillable=False)
        self._want_snapshot(self)

    def flush(self) -> Iterator[None]:
        """The end: publish what could never be joined to a snapshot, flagged as not proven; a step a message."""
        self._held = deque(sorted(self._held, key=lambda d: d.last_id))  # what came late is no hole
        while self._held:
            self._publish_unproven()
            yield

    def book(self) -> tuple[dict[float, float], dict[float, float]]:
        """Bids and asks, price -> quantity."""
        bids, asks = self._bids.levels, self._asks.levels
        return {p: q for p, q in bids.items() if q}, {p: q for p, q in asks.items() if q}

    def best(self) -> tuple[float, float, float, float]:
        """Best bid, its quantity, best ask, its quantity; `NOTHING` and 0 where a side is empty."""
        bid, ask = self._bids.best(), self._asks.best()
        bid_qty, ask_qty = self._bids.levels.get(bid, 0.0), self._asks.levels.get(ask, 0.0)
        return bid if bid_qty else NOTHING, bid_qty, ask if ask_qty else NOTHING, ask_qty

    # How it is done

    def _break(
        self, first_id: int, last_id: int, to_time: int, cause: str, *, fillable: bool, from_time: int | None = None
    ) -> None:
        self._hole = (first_id, last_id) if fillable else None
        self._accounted_id, self._unproven_id, self.stale = last_id, -1, 0
        self._gap(first_id, last_id, to_time, cause, from_time=from_time)
        self.state, self.cause = BROKEN, cause

    def _tell_skipped(self, last_id: int, timestamp: int, superseded: Sequence[Delta]) -> None:
        """A snapshot takes the book further than what is published or told: all in between is in no row.

        Some of it never came, some was held and is superseded; what is of newer ids than the snapshot is told by its own,
        as these may be impossible. Before the first row of all nothing was promised.
        """
        reached = self.last_id if self.state is LIVE else self._accounted_id
        cause, missing = self.cause, [(reached + 1, last_id)] if reached >= 0 else []
        if self.state is LIVE and (cause == "sequence" or self.last_id != self._cause_id):
            cause = "snapshot"  # it replaces a book that nothing was wrong with
        if last_id > reached:
            missing += self._runs([d for d in superseded if d.last_id > last_id])
        else:  # within what is told; or ids begin anew, and messages of both kinds may have been held
            missing = [(reached + 1, max((d.last_id for d in superseded), default=reached))]
            if last_id < self.last_id:
                begin = min((d.first_id for d in superseded if d.last_id <= last_id), default=last_id)
                missing.append((begin, last_id))
        for first, last in missing:
            if first <= last:
                self._gap(first, last, timestamp, cause, continued=self.state is BROKEN)

    def _runs(self, messages: Sequence[Delta]) -> list[tuple[int, int]]:
        """First and last id of each run of messages that follow each other."""
        runs: list[tuple[int, int]] = []
        for d in messages:
            if runs and self._follows(runs[-1][1], d.first_id, d.last_id, d.prev_id) == NEXT:
                runs[-1] = runs[-1][0], d.last_id
            else:
                runs.append((d.first_id, d.last_id))
        return runs

    def _old(self, first_id: int, last_id: int, timestamp: int) -> None:
        """A duplicate. Nothing but duplicates for long: an impossible id was believed, or the venue began anew."""
        self._emit.counters["book_duplicate"] += 1
        if self._old_id != self.last_id or not self._old_run:
            self._old_id, self._old_run, self._old_from = self.last_id, 0, first_id
        self._old_run += 1
        if self._old_run > OLD_RUN_MAX:
            self._old_run = 0
            self._break(min(self._old_from, last_id), last_id, timestamp, "ids_reset", fillable=False)
            self._want_snapshot(self)

    def _apply(self, last_id: int, timestamp: int, bids: Pairs, asks: Pairs) -> None:
        emit, bid_side, ask_side = self._emit, self._bids, self._asks
        parse_ns = emit.clock() - emit.t0_ns
        values = _checked(bids, asks, last_id)
        codes: list[bytes] = []
        bid_side.change(bids, codes)
        ask_side.change(asks, codes)
        self.last_id, self.last_time = last_id, timestamp
        crossed = bid_side.edge >= ask_side.edge and bid_side.best() >= ask_side.best()
        flags = _INVALID if crossed else 0
        emit.levels(self.instrument, timestamp, flags, parse_ns, values, codes, last_id)
        if crossed:
            self._crossed()
        else:
            self.crossed_since = 0

    def _crossed(self) -> None:
        now = self._emit.rcv_us
        self._emit.counters["book_crossed"] += 1
        if not self.crossed_since:
            self.crossed_since = now
        elif now - self.crossed_since > CROSSED_GRACE_US:
            self.crossed_since = 0
            self.distrust("crossed")

    def _gap(
        self,
        first_id: int,
        last_id: int,
        to_time: int,
        cause: str,
        *,
        repaired: bool = False,
        continued: bool = False,
        from_time: int | None = None,
    ) -> None:
        self._emit.gap(
            "orderbook_l2", self.instrument.ticker, first_id=first_id, last_id=last_id,
            from_time=self.last_time if from_time is None else from_time, to_time=to_time, cause=cause,
            repaired=repaired, continued=continued,
        )  # fmt: skip

    def _hold(self, first_id: int, last_id: int, prev_id: int, timestamp: int, bids: Pairs, asks: Pairs) -> None:
        _checked(bids, asks, last_id)
        if self._held and self._held[-1].last_id == last_id:
            self._emit.counters["book_duplicate"] += 1
            return
        if not self._held and self.state is WAITING:
            self._want_snapshot(self)
        emit = self._emit
        self._held.append(Delta(first_id, last_id, prev_id, timestamp, bids, asks, emit.rcv_us, emit.packet_id))
        self._held_levels += len(bids) + len(asks)
        while len(self._held) > HELD_MESSAGES_MAX or self._held_levels > HELD_LEVELS_MAX:
            emit.counters["book_held_overflow"] += 1
            self._publish_unproven()

    def _try_held(self) -> None:
        """The missing messages may have come late: then the held ones follow them and no snapshot is needed.

        A connection brings them in order, so the last to come ends the hole; where they are swapped, one that begins
        it may be the last. Only then all that is held is looked at: behind an absurd id it would be at each message.
        """
        if self._hole is None or not self._held or self._unproven_id >= 0:
            return
        follows, newest = self._follows, self._held[-1]
        ends = newest.last_id == self._hole[1]
        if not ends and follows(self.last_id, newest.first_id, newest.last_id, newest.prev_id) != NEXT:
            return
        chain_ = sorted(self._held, key=lambda d: d.last_id)
        last_id = self.last_id
        for d in chain_:
            step = follows(last_id, d.first_id, d.last_id, d.prev_id)
            if step == HOLE:
                return
            if step == NEXT:
                last_id = d.last_id
        self._gap(*self._hole, newest.timestamp, "reordered", repaired=True)
        self.state, self.cause = LIVE, "sequence"
        self._release(chain_)

    def _release(self, held: list[Delta]) -> None:
        """Go on with held messages, each under the receive time and packet that brought it."""
        self._held, self._held_levels = deque(), 0
        emit = self._emit
        now = emit.rcv_us, emit.packet_id
        for d in held:
            emit.rcv_us, emit.packet_id = d.rcv_us, d.packet_id
            self.delta(d.first_id, d.last_id, d.prev_id, d.timestamp, d.bids, d.asks)
        emit.rcv_us, emit.packet_id = now

    def _publish_unproven(self) -> None:
        """The first of the held messages. It stands in no book, but a hole before it is told as any other one."""
        d, emit = self._held.popleft(), self._emit
        self._held_levels -= len(d.bids) + len(d.asks)
        if d.last_id == self._unproven_id or (self._hole is not None and d.last_id <= self.last_id):
            emit.counters["book_duplicate"] += 1
            return
        now = emit.rcv_us, emit.packet_id
        emit.rcv_us, emit.packet_id = d.rcv_us, d.packet_id
        reached = self._accounted_id
        if reached >= 0 and self._follows(reached, d.first_id, d.last_id, d.prev_id) == HOLE:
            last_missing = d.prev_id if d.prev_id >= 0 else d.first_id - 1
            cause = self.cause if reached == self._cause_id else "sequence"
            self._gap(reached + 1, max(last_missing, reached + 1), d.timestamp, cause)
        self._accounted_id, self._unproven_id = max(reached, d.last_id), d.last_id
        sides = zip((_BID_CODES, _ASK_CODES), (d.bids, d.asks), strict=True)
        codes = [codes[1 if qty else 2] for codes, pairs in sides for _, qty in pairs]
        values = _checked(d.bids, d.asks, d.last_id)
        emit.levels(self.instrument, d.timestamp, _UNPROVEN, emit.clock() - emit.t0_ns, values, codes, d.last_id)
        emit.rcv_us, emit.packet_id = now


# MessagePack is the quickest way from pairs of floats to their bytes (1.1 us for 40 levels, against 2.9 us by lists and
# struct): 19 bytes a level, the mark of a pair, then twice the mark of a double and the double, highest byte first.
_encode_pairs = msgspec.msgpack.Encoder().encode
_PAIR_BYTES = 19
_BIG_ENDIAN = np.dtype(">f8")
# The highest byte of a double holds its sign and most of its exponent: these are of numbers from 0 to 5.6e14.
_PLAUSIBLE = bytes(range(0x43))


def _checked(bids: Pairs, asks: Pairs, update_id: int) -> Values:
    """Price and quantity of all levels of a book message; FrameError when a number is impossible.

    One look at the highest bytes finds whatever is negative, large, infinite or NaN; only then each number is looked at.
    """
    count = len(bids) + len(asks)
    if count > LEVELS_MAX:
        raise FrameError("too_many_levels", f"book message {update_id} with {count}")
    if not count:
        return np.empty((0, 2))
    raw = _encode_pairs([*bids, *asks])
    at = 1 if count < 16 else 3 if count < 1 << 16 else 5  # bytes that say how many pairs follow
    if len(raw) != at + _PAIR_BYTES * count:  # an int among them
        raw = _encode_pairs([(float(price), float(qty)) for price, qty in chain(bids, asks)])
    if (raw[at + 2 :: _PAIR_BYTES] + raw[at + 11 :: _PAIR_BYTES]).translate(None, _PLAUSIBLE):
        for price, qty in chain(bids, asks):
            if not (-PRICE_MAX < price < PRICE_MAX and 0.0 <= qty < QTY_MAX):
                raise FrameError("absurd_number", f"book message {update_id} price={price} qty={qty}")
    return np.ndarray((count, 2), _BIG_ENDIAN, raw, at + 2, (_PAIR_BYTES, 9))


TradeRow = tuple[int, int, int, float, float, bytes]  # counter, timestamp, side, price, qty, trade id


class _Hole(NamedTuple):
    """Missing counters first..last, what is left of the hole `whole` that the ledger knows."""

    first: int
    last: int
    whole: tuple[int, int]
    since: int = -1  # time of the trade before it


class TradeSync:
    """Watches a counter that grows by 1 with every trade of one instrument; remembers holes until they are filled.

    `want_repair(first, last)` asks the venue for the missing trades. `last` is the last counter that was published,
    also by an earlier life of this connector; -1 for none. `holes` are those that an earlier life left open.

    Where the venue sends several trades as one, with the counter of the last of them, `merged` is to be set: no row
    has a `trade_seq` then, since counters of rows no longer grow by one.
    """

    __slots__ = (
        "_cause_seq", "_emit", "_filled", "_holes", "_refused", "_since", "_suspects", "_want_repair", "cause",
        "instrument", "last", "last_time", "merged",
    )  # fmt: skip

    def __init__(
        self,
        emit: Emit,
        instrument: Instrument,
        want_repair: Callable[[str, int, int], None],
        last: int = -1,
        holes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._emit, self.instrument, self._want_repair, self.last = emit, instrument, want_repair, last
        self._holes = [_Hole(first, end, (first, end)) for first, end in holes]
        for first, end in holes:
            want_repair(instrument.ticker, first, end)
        self._filled: list[tuple[int, int]] = []
        self._suspects = (0, 0, 0)  # counters that cannot be believed yet: the first, the newest, how many
        self._refused: FrameError | None = None
        self._since = emit.rcv_us
        self.last_time = -1
        self.cause = "restart"  # of a hole that begins behind `_cause_seq`; of any other one it is "sequence"
        self._cause_seq = last
        self.merged = False

    def accept(self, seq: int, timestamp: int) -> bool:
        """Whether this trade is to be published: the next one, one behind a new hole, or one that fills a hole."""
        last = self.last
        if seq == last + 1 or last < 0:
            self.last, self.last_time = seq, timestamp
            return True
        if seq <= last and self._fill(seq, seq):
            return True
        if seq > last + COUNTER_JUMP_MAX or (seq <= last and timestamp > max(self.last_time, self._since)):
            return self._jump(seq, timestamp)
        if seq <= last:
            self._emit.counters["trade_duplicate"] += 1
            return False
        self._open_hole(last + 1, seq - 1, timestamp, self.cause if last == self._cause_seq else "sequence")
        self.last, self.last_time = seq, timestamp
        return True

    def _jump(self, seq: int, timestamp: int) -> bool:
        """An impossible counter is a broken number, until the next trades confirm it: then counting began anew."""
        first, newest, count = self._suspects
        if not (count and 0 < seq - newest <= SUSPECT_STEP_MAX):
            first, count = seq, 0
        self._suspects = first, seq, count + 1
        if count + 1 < SUSPECTS_BELIEVED:
            self._refused = FrameError("absurd_trade_id", f"{self.instrument.ticker} {seq} after {self.last}")
            return False
        self._suspects = (0, 0, 0)
        if first > self.last:
            self._open_hole(self.last + 1, first - 1, timestamp, "ids_reset")
        self._open_hole(first, seq - 1, timestamp, "ids_reset")  # what was refused meanwhile
        self.last, self.last_time = seq, timestamp
        return True

    def _accept_merged(self, count: int, seq: int, timestamp: int) -> bool:
        """`accept` for a trade that stands for `count` of them, the last of which has the counter `seq`."""
        first = seq - count + 1
        if count == 1 or self.last < 0:
            return self.accept(seq, timestamp)
        if first > self.last:
            if self.accept(first, timestamp):
                self.last = max(self.last, seq)
                return True
        elif seq > self.last:  # a part of it is there already: the others are fetched, each as a trade of its own
            self._open_hole(self.last + 1, seq, timestamp, "overlap")
            self.last, self.last_time = seq, timestamp
        elif all(self._hole_with(one) is not None for one in range(first, seq + 1)):
            for one in range(first, seq + 1):
                self._fill(one, one)
            return True
        else:
            self._emit.counters["trade_duplicate"] += 1
        return False

    def publish(self, trades: Sequence[TradeRow], flags: int = 0, counts: Sequence[int] = ()) -> int:
        """Publish those of one message that are accepted; returns how many. Hot venues inline the common case.

        `counts` says for each how many trades it stands for, where the venue merges them; none = one each.
        FrameError when a number or a counter is impossible; the others of the message are published before.
        """
        if len(trades) == 1 and not self.merged:  # the common case, in half the time
            seq, timestamp, side, price, qty, trade_id = trades[0]
            if seq == self.last + 1:
                self._emit.trade(self.instrument, timestamp, side, price, qty, seq, flags | _LAST, trade_id)
                self.last, self.last_time = seq, timestamp
                return 1
        rows = [(self.instrument, t, side, p, q, seq, i) for seq, t, side, p, q, i in trades]
        self._emit.check_trades(rows)  # before any of them counts as seen
        if counts:
            accepted = [row for row, n in zip(rows, counts, strict=True) if self._accept_merged(n, row[5], row[1])]
        else:
            accepted = [row for row in rows if self.accept(row[5], row[1])]
        if self.merged:
            accepted = [(*row[:5], -1, row[6]) for row in accepted]
        self._emit.trades(accepted, flags)
        self._say_filled()
        self._raise_refused()
        return len(accepted)

    def _raise_refused(self) -> None:
        if self._refused is not None:
            error, self._refused = self._refused, None
            raise error

    @property
    def unproven(self) -> bool:
        """No trade came since the connection ended, so nothing tells yet whether some were missed."""
        return 0 <= self.last == self._cause_seq

    def want_tail(self) -> None:
        """Ask for what may have been missed behind the last trade; else only the next one would tell."""
        self._want_repair(self.instrument.ticker, self.last + 1, self.last + TAIL_IDS)

    def _take_tail(self, trades: Sequence[TradeRow], *, newest_of_all: bool = False) -> None:
        """The venue's answer to `want_tail`: what lies behind the last trade was missed.

        Each venue gives as many at once as it likes: unless these are its newest of all, more may lie behind them.
        """
        missed = sorted((trade[0], trade[1]) for trade in trades if 0 < trade[0] - self.last <= COUNTER_JUMP_MAX)
        if not missed:
            self._cause_seq = -1  # nothing was missed
            return
        newest, timestamp = missed[-1]
        cause = self.cause if self.unproven else "sequence"
        self._open_hole(self.last + 1, newest, missed[0][1], cause, repair=False)
        self.last, self.last_time = newest, timestamp
        if not newest_of_all:
            self._cause_seq = newest
            self.want_tail()

    def repaired(self, asked_from: int, trades: Sequence[TradeRow]) -> None:
        """The venue's answer to a repair that asked from `asked_from` on: fill the hole, ask on while it helps."""
        if asked_from == self.last + 1 and self.unproven:
            self._take_tail(trades)
        self.publish([trade for trade in trades if self._hole_with(trade[0]) is not None], _REPAIRED)
        reached = max((trade[0] for trade in trades), default=asked_from - 1)
        behind = [hole for hole in self._holes if hole.whole[0] <= asked_from <= hole.whole[1]]
        if not behind:
            return
        if reached >= asked_from and (ahead := [hole for hole in behind if hole.first > reached]):
            self._want_repair(self.instrument.ticker, ahead[0].first, ahead[0].last)
        else:
            self._emit.counters["trade_repair_incomplete"] += 1  # the hole stays in the ledger as not repaired

    def greeted(self, trades: Sequence[TradeRow]) -> None:
        """The newest trades, with which some venues begin a subscription: what of them is not published was missed.

        Before the first trade of all they only say where the counter stands. What they do not reach back to is wanted.
        """
        if not trades:
            return
        newest, timestamp = max((trade[0], trade[1]) for trade in trades)
        if self.last < 0:
            self.last, self.last_time = newest, timestamp
            return
        self._take_tail(trades, newest_of_all=True)
        self.publish([trade for trade in trades if self._hole_with(trade[0]) is not None], _REPAIRED)
        oldest = min(trade[0] for trade in trades)
        for hole in [hole for hole in self._holes if hole.last == oldest - 1]:
            self._want_hole(hole.first, hole.last)

    def newest(self, seq: int, timestamp: int) -> None:
        """The venue says that its newest trade is `seq`: what lies between the last one and it was missed."""
        if seq == self.last:
            self._cause_seq = -1  # nothing was missed
        elif 0 <= self.last < seq <= self.last + COUNTER_JUMP_MAX:
            self._open_hole(self.last + 1, seq, timestamp, self.cause if self.unproven else "sequence")
            self.last, self.last_time = seq, timestamp

    def told(self, first: int, last: int, trades: Sequence[TradeRow]) -> list[tuple[int, int]]:
        """The venue's list of all its trades from counter first to last: what it leaves out was no execution.

        Returns what is still missing, before and behind the list.
        """
        if self.unproven:
            self._take_tail(trades)
        self.publish([trade for trade in trades if self._hole_with(trade[0]) is not None], _REPAIRED)
        for hole in [hole for hole in self._holes if hole.first <= last and hole.last >= first]:
            low, high = max(hole.first, first), min(hole.last, last)
            self._fill(low, high)
            self._say_filled()
            self._no_execution(low, high)
        return [(hole.first, hole.last) for hole in self._holes]

    def skip(self, seq: int, timestamp: int) -> None:
        """The venue gave this counter to something that is no execution: it makes no row and leaves no hole.

        FrameError as from `publish`.
        """
        if not 0 < timestamp < TIME_MAX_US:
            raise FrameError("absurd_number", f"{self.instrument.ticker} {seq} timestamp={timestamp}")
        accepted = self.accept(seq, timestamp)
        self._say_filled()
        if accepted:
            self._no_execution(seq, seq, timestamp)
        self._raise_refused()

    def _no_execution(self, first: int, last: int, timestamp: int = 0) -> None:
        """In the ledger as a hole that stays: who looks for these counters in the table finds why they are not there."""
        self._emit.gap(
            "trades", self.instrument.ticker, first_id=first, last_id=last,
            from_time=timestamp or -1, to_time=timestamp, cause=NO_EXECUTION,
        )  # fmt: skip

    def disconnected(self, cause: str = "reconnect") -> None:
        """The connection ended: a hole that shows next is its doing."""
        self.cause, self._cause_seq = cause, self.last

    def since(self, seq: int) -> int:
        """Time of the trade before the hole that holds this counter, or before what is not known yet; -1 = unknown."""
        hole = self._hole_with(seq)
        return self.last_time if hole is None else hole.since

    def _hole_with(self, seq: int) -> _Hole | None:
        return next((hole for hole in self._holes if hole.first <= seq <= hole.last), None)

    def _open_hole(self, first: int, last: int, timestamp: int, cause: str, *, repair: bool = True) -> None:
        self._emit.gap(
            "trades", self.instrument.ticker, first_id=first, last_id=last,
            from_time=self.last_time, to_time=timestamp, cause=cause,
        )  # fmt: skip
        self._holes.append(_Hole(first, last, (first, last), self.last_time))
        self._forget()
        if repair:
            self._want_hole(first, last)

    def _want_hole(self, first: int, last: int) -> None:
        if last - first >= REPAIR_IDS_MAX:
            self._emit.counters["trade_hole_not_repaired"] += 1
        else:
            self._want_repair(self.instrument.ticker, first, last)

    def _fill(self, first: int, last: int) -> bool:
        """Take counters out of the hole they lie in; what is left of the hole stays open."""
        hole = self._hole_with(first)
        if hole is None:
            return False
        at = self._holes.index(hole)
        rest = [hole._replace(last=first - 1), hole._replace(first=last + 1)]
        self._holes[at : at + 1] = [part for part in rest if part.first <= part.last]
        if all(part.whole != hole.whole for part in self._holes):
            self._filled.append(hole.whole)
        self._forget()
        return True

    def _forget(self) -> None:
        """Bound what is remembered: the oldest hole goes with all its parts, else the rest could pass for the whole."""
        while len(self._holes) > HOLES_MAX:
            oldest = self._holes[0].whole
            self._holes = [hole for hole in self._holes if hole.whole != oldest]
            self._emit.counters["trade_hole_forgotten"] += 1

    def _say_filled(self) -> None:
        """In the ledger, after the rows that fill a hole are published."""
        while self._filled:
            first, last = self._filled.pop()
            self._emit.gap(
                "trades", self.instrument.ticker, first_id=first, last_id=last, cause="filled", repaired=True
            )


class TradeIds:
    """Watches the trades of one instrument whose ids do not count, so that nothing in them tells of a missing one.

    Each is published once, by its id. Where trades may have been missed (the connection ended, a frame could not be
    read) the next one is preceded by a row in `gaps` that names the time, and `want_recent` asks the venue for its most
    recent trades, once the stream delivers: those that are new are published, and where they reach back to the last one
    that was known, the hole is closed. `known` are the ids, and `last_time` the newest time, that an earlier life of this connector published.
    """

    __slots__ = (
        "_answered", "_cause", "_emit", "_holes", "_last_id", "_new", "_old", "_since", "_since_id", "_want_recent", "doubts",
        "instrument", "last_time",
    )  # fmt: skip

    def __init__(
        self,
        emit: Emit,
        instrument: Instrument,
        want_recent: Callable[["TradeIds"], None],
        known: Sequence[bytes] = (),
        last_time: int = -1,
    ) -> None:
        self._emit, self.instrument, self._want_recent, self.last_time = emit, instrument, want_recent, last_time
        self._old, self._new = set[bytes](), set(known)  # two generations, so that forgetting costs nothing
        self._last_id = known[-1] if known else b""
        self.doubts = 0  # that ever arose; an answer is believed that was asked for behind the last one
        self._cause = ""  # of a doubt that no trade has shown yet
        self._answered = False  # the venue said that nothing was missed until then, and no trade has come since
        self._holes: list[tuple[int, int]] = []  # told, and not yet answered: from time, to time
        self._since, self._since_id = -1, b""  # the last trade before the first doubt
        if known:
            self.doubt("restart")

    def publish_new(self, timestamp: int, side: int, price: float, qty: float, trade_id: bytes) -> bool:
        """The common case of `publish`: a trade alone in its message, new, and with nothing missing before it.

        False when it is not that, and nothing is done. FrameError when a number is impossible.
        """
        new = self._new
        if self._cause or trade_id in new or trade_id in self._old:
            return False
        self._emit.trade(self.instrument, timestamp, side, price, qty, -1, _LAST, trade_id)
        new.add(trade_id)
        self._last_id = trade_id
        if timestamp > self.last_time:
            self.last_time = timestamp
        if len(new) > TRADE_IDS_KEPT:
            self._old, self._new = new, set()
        return True

    def publish(self, trades: Sequence[TradeRow]) -> int:
        """Publish those of one message that are new; returns how many. FrameError when a number is impossible."""
        self._emit.check_trades([(self.instrument, t, side, p, q, seq, i) for seq, t, side, p, q, i in trades])
        fresh = self._unseen(trades)
        if not fresh:
            return 0
        doubted = bool(self._cause)
        if self._answered:  # a confirmed stream may begin late: between the answer and now others may have been missed
            self._answered = False
            self._since, self._since_id = self.last_time, self._last_id
        if doubted:
            self.doubts += 1  # an answer that is on its way may be from before this trade
            self._tell(min(row[1] for row in fresh))
        self._emit.trades(fresh)
        self._note(fresh)
        if doubted:
            self.want_tail()
        return len(fresh)

    def _unseen(self, trades: Sequence[TradeRow]) -> list[tuple[Instrument, int, int, float, float, int, bytes]]:
        rows: dict[bytes, tuple[Instrument, int, int, float, float, int, bytes]] = {}
        for seq, timestamp, side, price, qty, trade_id in trades:
            if trade_id in self._new or trade_id in self._old or trade_id in rows:
                self._emit.counters["trade_duplicate"] += 1
            else:
                rows[trade_id] = (self.instrument, timestamp, side, price, qty, seq, trade_id)
        return list(rows.values())

    def _note(self, rows: Sequence[tuple[Instrument, int, int, float, float, int, bytes]]) -> None:
        self._new.update(row[6] for row in rows)
        newest = max(rows, key=lambda row: row[1])
        if newest[1] >= self.last_time:
            self.last_time, self._last_id = newest[1], rows[-1][6]
        if len(self._new) > TRADE_IDS_KEPT:
            self._old, self._new = self._new, set()

    @property
    def known(self) -> list[bytes]:
        """Ids that are remembered, the newest one last."""
        return [*((self._old | self._new) - {self._last_id}), self._last_id]

    @property
    def heard(self) -> bool:
        """A trade has come since the last doubt arose, so the stream delivers."""
        return not self._cause

    @property
    def unproven(self) -> bool:
        """Trades may have been missed, and the venue has not yet told."""
        return bool((self._cause and not self._answered) or self._holes)

    def doubt(self, cause: str) -> None:
        """Trades may be missed from here on: what is published next comes behind a hole, until an answer says no."""
        if self.last_time < 0:
            return  # nothing was recorded before, so there is nothing that could be incomplete
        if not self.unproven:
            self._since, self._since_id = self.last_time, self._last_id
        self._cause, self._answered = self._cause or cause, False
        self.doubts += 1

    def disconnected(self, cause: str = "reconnect") -> None:
        """The connection ended."""
        self.doubt(cause)

    def want_tail(self) -> None:
        """Ask for the most recent trades."""
        self._want_recent(self)

    def recent(self, trades: Sequence[TradeRow], doubts: int) -> None:
        """The venue's most recent trades; `doubts` is the number of them when they were asked for."""
        if doubts != self.doubts or not self.unproven:
            return  # since then more may have been missed
        rows = [(self.instrument, t, side, p, q, seq, i) for seq, t, side, p, q, i in trades]
        self._emit.check_trades(rows)
        known = self._new | self._old
        missed = sorted((row for row in rows if row[1] >= self._since and row[6] not in known), key=lambda row: row[1])
        # Reached back to where the hole begins: then whatever lies in it is in this answer.
        whole = any(row[6] == self._since_id or row[1] < self._since for row in rows)
        cause, heard = self._cause, self.heard
        if self._cause and missed:
            self._tell(missed[0][1])
        if missed:
            self._emit.trades(missed, _REPAIRED)
            self._note(missed)
        if self._cause and not whole:
            self._tell(self._emit.rcv_us)
        for from_time, to_time in self._holes if whole else ():
            self._emit.gap(
                "trades", self.instrument.ticker, from_time=from_time, to_time=to_time, cause="filled", repaired=True
            )
        if not whole:
            self._emit.counters["trade_repair_incomplete"] += 1  # the holes stay in the ledger as not repaired
        self._holes = []
        self._cause, self._answered = cause, not heard

    def unanswered(self) -> None:
        """The venue does not give its recent trades: the hole is recorded and stays."""
        if self._cause and not self._answered:
            self._tell(self._emit.rcv_us)
        self._holes, self._answered = [], False

    def _tell(self, to_time: int) -> None:
        """Record the hole before the first row behind it, so that even a crash right then leaves none untold."""
        from_time = min(self.last_time, to_time)
        self._emit.gap("trades", self.instrument.ticker, from_time=from_time, to_time=to_time, cause=self._cause)
        self._holes = [*self._holes[1 - DOUBTS_MAX :], (from_time, to_time)]
        self._cause = ""
