"""The arbiter: two legs that lose, double, delay and swap become one feed without holes, through crashes and restarts.

Legs are written by the connector's own emitter and continuity, so their rings hold what a connector would leave in them.
Time is handed in where the property needs it; the last tests run real processes against the simulated exchange.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdcollector.arbiter import Arbiter
from mdcollector.book import OrderBook
from mdcollector.config import load
from mdcollector.continuity import BROKEN, HOLE, NEXT, OLD, WAITING, BookSync, TradeSync
from mdcollector.emit import Emit
from mdcollector.errors import ConfigError, RingError
from mdcollector.merge import Merge
from mdcollector.records import Action, Exchange, Flag
from mdcollector.ring import RingReader, RingWriter, Rows
from mdcollector.stats import read_stats
from tools.proof import prove
from tools.sim.process import SimProcess

FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "liquidations")
SIZES = dict.fromkeys((*FEEDS, "gaps"), 1 << 14)
SMALL = dict.fromkeys((*FEEDS, "gaps"), 1 << 9)
BASE_US = 1_700_000_000_000_000
EXCHANGE = ("BINANCE_SPOT", int(Exchange.BINANCE_SPOT))
TICKER = "BTCUSDT"
KILLS = 3  # of the arbiter, at least
PROVEN = ("trades", "orderbook_l2")  # feeds with ids, of which a merged one must have every row
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


class Leg:
    """One connector's emitter; `at(ms)` begins a packet received then."""

    def __init__(self, rings: Path, name: str, feeds: Sequence[str] = FEEDS, sizes: dict[str, int] = SIZES) -> None:
        self.emit = Emit(rings, name, Exchange.BINANCE_SPOT, feeds, capacities=sizes, semaphore=False)
        self.instrument = self.emit.instrument(TICKER)

    def at(self, ms: float) -> Emit:
        self.emit.packet(BASE_US * 1000 + int(ms * 1e6), self.emit.clock())
        return self.emit

    def trade(self, ms: float, seq: int, flags: int = int(Flag.LAST), price: float | None = None) -> None:
        self.at(ms).trade(self.instrument, BASE_US + 1000 * seq, 1, price or 100.0 + seq, 1.0, seq, flags)

    def kill(self) -> None:
        """As after kill -9: the lock is gone, nothing is sealed or closed."""
        _abandon(self.emit.rings.values())


def _abandon(rings: Any) -> None:
    for ring in rings:
        os.close(ring._lock_fd)
        ring._lock_fd = -1


class Bench:
    """Two legs, an arbiter under a handed-in clock, and what it published."""

    def __init__(self, rings: Path, *, legs: int = 2, feeds: Sequence[str] = FEEDS, **options: Any) -> None:
        self.rings, self.feeds, self.options, self.now_s = rings, feeds, options, 1000.0
        self.names = [f"leg{i}" for i in range(legs)]
        self.legs = [Leg(rings, name, feeds) for name in self.names]
        self.step_s = 0.0  # by which the clock goes on whenever somebody looks at it
        self.arbiter = self.start()

    def clock(self) -> float:
        self.now_s += self.step_s
        return self.now_s

    def start(self) -> Arbiter:
        self.arbiter = Arbiter(
            self.rings, "merged", exchange=EXCHANGE, legs=self.names, feeds=self.feeds, capacity=SIZES,
            clock=self.clock, **self.options,
        )  # fmt: skip
        return self.arbiter

    def crash(self) -> None:
        _abandon(self.arbiter.own.values())
        self.start()

    def turn(self, ms: float = 1.0) -> None:
        self.now_s += ms / 1000
        self.arbiter.turn()

    def rest(self, ms: float = 100.0) -> None:
        """Let so much time pass, with turns in between."""
        for _ in range(10):
            self.turn(ms / 10)

    def rows(self, feed: str) -> Rows:
        with RingReader(self.rings / "merged", feed) as ring:
            ring.seek("oldest")
            rows = ring.read(1 << 20)
        assert (rows["seq_id"] == np.arange(len(rows))).all()
        return rows

    def seqs(self) -> list[int]:
        seqs: list[int] = self.rows("trades")["trade_seq"].tolist()
        return seqs

    def ledger(self, feed: str) -> dict[tuple[int, int], bool]:
        """Newest row of each hole: ids -> repaired."""
        rows = self.rows("gaps")
        columns = (rows[name].tolist() for name in ("feed", "first_id", "last_id", "repaired"))
        return {(first, last): bool(done) for f, first, last, done in zip(*columns, strict=True) if f.decode() == feed}

    def said_twice(self) -> int:
        """Rows of the ledger that say what another one says."""
        rows = self.rows("gaps")
        columns = ("feed", "ticker", "first_id", "last_id", "from_time", "repaired")
        said = list(zip(*(rows[name].tolist() for name in columns), strict=True))
        return len(said) - len(set(said))

    def close(self) -> None:
        self.arbiter.close()
        for leg in self.legs:
            leg.emit.close()


@contextmanager
def bench(**options: Any) -> Iterator[Bench]:
    """A bench in a directory of its own, for tests that run many examples."""
    directory = Path(tempfile.mkdtemp(prefix="arbiter-"))
    made = Bench(directory, **options)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


# Instruments


def test_what_is_said_of_instruments_is_merged_by_content_over_restarts(two: Bench) -> None:
    """Legs read the list minutes apart: what one says later is no news, nor is what an older list said."""
    minute = 60_000

    def tell(leg: int, ms: float, tick_size: float, ticker: str = TICKER) -> None:
        two.legs[leg].at(ms).instrument_info(ticker, True, "spot", "BTC", "USDT", "TRADING", tick_size=tick_size)
        two.turn()

    tell(0, 1, 0.01)
    tell(1, 9 * minute, 0.01)
    tell(1, 9 * minute, 0.01, "ETHUSDT")
    tell(1, 10 * minute, 0.001)
    two.rest()
    two.arbiter.checkpoint()
    two.crash()
    tell(0, 11 * minute, 0.001)
    tell(0, 11 * minute, 0.01, "ETHUSDT")
    two.legs[0].at(12 * minute).instrument_gone(TICKER)
    two.rest()
    rows, names = two.rows("instruments"), two.arbiter.own["instruments"].tickers
    said = [(names[row["ticker"]], float(row["tick_size"]), bool(row["active"])) for row in rows]
    assert said == [
        (TICKER, 0.01, True), ("ETHUSDT", 0.01, True), (TICKER, 0.001, True), (TICKER, 0.001, False),
    ]  # fmt: skip
    assert (rows["packet_id"] % 2).tolist() == [0, 1, 1, 0], "who said it first"


def test_what_both_legs_measure_of_the_clock_is_kept(two: Bench) -> None:
    """Each measured by itself, so neither is a copy of the other."""
    two.legs[0].at(1000).clock_offset("request", 900, 10.0, 5.0)
    two.legs[1].at(1500).clock_offset("request", 1400, 12.0, 4.0)
    two.rest()
    assert two.rows("clocks")["uncertainty_us"].tolist() == [5.0, 4.0]


def test_a_list_that_is_older_than_the_newest_word_says_nothing(two: Bench) -> None:
    """Leg 0 comes back with rows of before: its word is older than what is known, whatever it says."""
    two.legs[1].at(1000).instrument_info(TICKER, True, "spot", "BTC", "USDT", "TRADING", tick_size=0.001)
    two.rest()
    two.legs[0].at(500).instrument_info(TICKER, True, "spot", "BTC", "USDT", "TRADING", tick_size=0.01)
    two.rest()
    assert two.rows("instruments")["tick_size"].tolist() == [0.001]


# Trades


def test_the_first_copy_wins_and_says_which_leg_it_was(two: Bench) -> None:
    a, b = two.legs
    for seq in range(1, 7):
        first, second = (a, b) if seq % 3 else (b, a)
        first.trade(seq * 10, seq)
        second.trade(seq * 10 + 1, seq)
        two.turn()
    two.rest()
    rows = two.rows("trades")
    assert rows["trade_seq"].tolist() == [1, 2, 3, 4, 5, 6]
    assert (rows["packet_id"] % 2).tolist() == [0, 0, 1, 0, 0, 1]
    assert rows["rcv_timestamp"].tolist() == [BASE_US + 10_000 * seq for seq in range(1, 7)]
    assert rows["timestamp"].tolist() == [BASE_US + 1000 * seq for seq in range(1, 7)]
    assert (rows["publish_ns"] >= rows["parse_ns"]).all()
    assert not len(two.rows("gaps"))
    merge = two.arbiter.merges["trades"]
    assert (merge.wins, merge.duplicates) == ([4, 2], [2, 4])


def test_a_trade_ahead_waits_for_the_missing_one_and_then_goes_on(two: Bench) -> None:
    a, b = two.legs
    a.trade(0, 1)
    two.rest()
    a.trade(110, 3)
    two.turn(40)
    assert two.seqs() == [1]
    b.trade(120, 2)
    two.turn()
    assert two.seqs() == [1, 2, 3]
    assert not len(two.rows("gaps"))
    a.trade(200, 6)
    two.turn(40)
    two.turn(40)
    two.turn(40)
    assert two.seqs() == [1, 2, 3, 6]
    assert two.ledger("trades") == {(4, 5): False}
    b.trade(400, 5)
    two.turn()
    assert two.ledger("trades") == {(4, 5): False}
    b.trade(410, 4, int(Flag.REPAIRED | Flag.LAST))
    a.trade(411, 4, int(Flag.REPAIRED | Flag.LAST))
    two.turn()
    assert two.seqs() == [1, 2, 3, 6, 5, 4]
    assert two.ledger("trades") == {(4, 5): True}
    assert two.rows("trades")["flags"][-1] & Flag.REPAIRED


def test_a_backlog_is_read_in_the_order_of_receipt_before_anything_is_given_up(two: Bench) -> None:
    a, b = two.legs
    for seq in range(1, 16_001):
        (b if 2000 <= seq < 14_000 else a).trade(seq / 10, seq)
    two.rest()
    assert two.seqs() == list(range(1, 16_001))
    assert not len(two.rows("gaps"))


def test_trades_before_the_first_one_that_was_seen_are_not_lost(two: Bench) -> None:
    a, b = two.legs
    a.trade(0, 100)
    two.rest()
    b.trade(300, 98)
    b.trade(301, 99)
    b.trade(302, 100)
    two.rest()
    assert two.seqs() == [100, 98, 99]
    assert two.ledger("trades") == {(99, 99): True}


def test_a_counter_that_begins_anew_is_followed(two: Bench) -> None:
    a, b = two.legs
    for leg in (a, b):
        leg.trade(0, 50_000)
    two.rest()
    for leg in (a, b):
        for seq in (1, 2, 3):
            emit = leg.at(500)
            emit.trade(leg.instrument, BASE_US + 900_000_000 + seq, 1, 1.0, 1.0, seq)
    two.rest()
    assert two.seqs() == [50_000, 1, 2, 3]
    (gap,) = two.rows("gaps")
    assert gap["cause"] == b"ids_reset"


def test_a_counter_that_begins_anew_costs_no_trade_that_waits(two: Bench) -> None:
    """50,002 waits for 50,001 when the numbers begin anew: nothing comes before it any more."""
    leg = two.legs[0]
    leg.trade(0, 50_000)
    two.rest()
    leg.trade(500, 50_002)
    two.turn()
    emit = leg.at(501)
    emit.trade(leg.instrument, BASE_US + 900_000_000, 1, 1.0, 1.0, 1)
    two.rest()
    assert two.seqs() == [50_000, 50_002, 1]
    rows = two.rows("gaps")
    assert [(row["cause"], int(row["first_id"]), int(row["last_id"])) for row in rows] == [
        (b"sequence", 50_001, 50_001), (b"ids_reset", -1, -1)
    ]  # fmt: skip
    two.arbiter.checkpoint()
    two.crash()
    two.rest()
    assert two.seqs() == [50_000, 50_002, 1]


def test_an_instrument_for_which_the_own_table_has_no_room_stops_no_other(
    two: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a connector: a full table takes no new name. The rows left out are counted, and the reason is told."""
    code = RingWriter.code

    def full(ring: RingWriter, ticker: str) -> int:
        if ticker == "NEW" and ring in two.arbiter.own.values():
            raise RingError("the instrument table is full")
        return code(ring, ticker)

    monkeypatch.setattr(RingWriter, "code", full)
    leg = two.legs[0]
    for seq in (1, 2, 3):
        leg.trade(seq, seq)
        leg.at(seq).trade(leg.emit.instrument("NEW"), BASE_US, 1, 1.0, 1.0, seq)
    leg.emit.gap("bbo", "NEW", from_time=BASE_US, to_time=BASE_US + 1, cause="silent")
    two.rest()
    assert two.seqs() == [1, 2, 3]
    assert {row["ticker"] for row in two.rows("trades")} == {0}
    (source,) = (s for s in two.arbiter.lanes["trades"].sources if s.damaged)
    assert (source.damaged, source.error) == (3, "the instrument table is full")


def test_trades_without_a_counter_are_told_apart_by_their_id(two: Bench) -> None:
    a, b = two.legs
    for name in (b"x", b"y", b"z"):
        for leg in (a, b):
            if (name, leg) != (b"y", a):
                leg.at(1).trades([(leg.instrument, BASE_US, 1, 5.0, 1.0, -1, name)])
    two.rest()
    assert sorted(two.rows("trades")["trade_id"].tolist()) == [b"x", b"y", b"z"]


def _deliveries(draw: Any, count: int, delay_most: int) -> list[tuple[int, int]]:
    """(ms, number) of what one leg brings of 1..count, in the order in which it brings it."""
    lost = draw(st.sets(st.integers(1, count), max_size=count // 3))
    delay = draw(st.integers(0, delay_most // 2))
    late = draw(st.dictionaries(st.integers(1, count), st.integers(0, delay_most // 2), max_size=5))
    twice = draw(st.sets(st.integers(1, count), max_size=4))
    found = [(n * 3 + delay + late.get(n, 0), n) for n in range(1, count + 1) if n not in lost]
    return sorted(found + [(ms + 2, n) for ms, n in found if n in twice])


@st.composite
def two_trade_legs(draw: Any, delay_most: int) -> list[list[tuple[int, int]]]:
    return [_deliveries(draw, 40, delay_most) for _ in range(2)]


def _play_trades(
    made: Bench, legs: list[list[tuple[int, int]]], on_ms: Callable[[int], None] = lambda _ms: None
) -> set[int]:
    """Deliver through each leg's own continuity; what the legs published."""
    syncs = [TradeSync(leg.emit, leg.instrument, lambda *_: None) for leg in made.legs]
    for ms in range(400):
        for leg, sync, events in zip(made.legs, syncs, legs, strict=True):
            for at, n in events:
                if at == ms:
                    leg.at(ms)
                    sync.publish([(n, BASE_US + 1000 * n, 1, 100.0 + n, 1.0, b"")])
        on_ms(ms)
        made.turn()
    made.rest(200)
    union: set[int] = set()
    for name in made.names:
        with RingReader(made.rings / name, "trades") as ring:
            ring.seek(0)
            union |= set(ring.read()["trade_seq"].tolist())
    return union


def _open(ledger: dict[tuple[int, int], bool]) -> set[int]:
    return {n for (first, last), repaired in ledger.items() if not repaired for n in range(first, last + 1)}


@FEW
@given(legs=two_trade_legs(40))
def test_what_any_leg_brings_in_time_is_there_once_in_order_and_the_rest_is_a_gap(
    legs: list[list[tuple[int, int]]],
) -> None:
    with bench(feeds=("trades",)) as made:
        union = _play_trades(made, legs)
        assert made.seqs() == sorted(union)
        missing = set(range(min(union), max(union))) - union
        assert _open(made.ledger("trades")) == missing
        assert all(not repaired for repaired in made.ledger("trades").values())


@FEW
@given(legs=two_trade_legs(300))
def test_what_comes_too_late_is_still_there_once_and_its_gap_is_closed(legs: list[list[tuple[int, int]]]) -> None:
    with bench(feeds=("trades",)) as made:
        union = _play_trades(made, legs)
        assert sorted(made.seqs()) == sorted(union)
        missing = set(range(min(union), max(union))) - union
        ledger = made.ledger("trades")
        # A hole is closed as a whole when its last trade comes: what is still open holds everything that is missing.
        assert missing <= _open(ledger)
        assert all(
            repaired == (not set(range(first, last + 1)) & missing) for (first, last), repaired in ledger.items()
        )


class Crash(BaseException):
    """Stands for kill -9 at this instruction."""


@contextmanager
def crashing(rng: random.Random, share: float) -> Iterator[None]:
    """Now and then the arbiter dies right behind a publication, before anything else of its turn is done."""
    real = Merge._append

    def append(self: Merge, rows: Rows) -> None:
        cut = rng.random() < share
        if cut and len(rows) > 1 and self.feed.name != "orderbook_l2":
            rows = rows[: rng.randrange(1, len(rows))]
        real(self, rows)
        if cut:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Merge, "_append", append)
        yield


class CrashingBench(Bench):
    """Starts the arbiter anew whenever it dies."""

    crashes = 0

    def turn(self, ms: float = 1.0) -> None:
        self.now_s += ms / 1000
        try:
            self.arbiter.turn()
        except Crash:
            self.restart()

    def restart(self) -> None:
        while True:
            self.crashes += 1
            _abandon(self.arbiter.own.values())
            try:
                self.start()
            except Crash:
                continue
            return

    def start(self) -> Arbiter:
        made: Arbiter = Arbiter.__new__(Arbiter)
        self.arbiter = made
        made.__init__(  # type: ignore[misc] (a crash in it must leave something whose rings can be let go)
            self.rings, "merged", exchange=EXCHANGE, legs=self.names, feeds=self.feeds, capacity=SIZES,
            clock=self.clock, **self.options,
        )  # fmt: skip
        return made


@FEW
@given(legs=two_trade_legs(300), seed=st.integers(0, 1 << 20), checkpoints=st.booleans())
def test_trades_survive_crashes_at_any_publication(
    legs: list[list[tuple[int, int]]], seed: int, checkpoints: bool
) -> None:
    rng = random.Random(seed)
    directory = Path(tempfile.mkdtemp(prefix="arbiter-"))
    with crashing(rng, 0.15):
        made = CrashingBench(directory, feeds=("trades",))

        def checkpoint(_ms: int) -> None:
            if checkpoints and rng.random() < 0.1:
                made.arbiter.checkpoint()

        union = _play_trades(made, legs, checkpoint)
    try:
        made.rest(300)
        assert sorted(made.seqs()) == sorted(union)
        assert not made.said_twice()
        missing = set(range(min(union), max(union))) - union
        ledger = made.ledger("trades")
        assert missing <= _open(ledger)
        assert all(repaired == (not set(range(a, z + 1)) & missing) for (a, z), repaired in ledger.items())
    finally:
        made.close()
        shutil.rmtree(directory)


# Books


def _follows(last_id: int, first: int, last: int, _prev: int) -> int:
    if last <= last_id:
        return OLD
    return NEXT if first <= last_id + 1 else HOLE


Pairs = list[tuple[float, float]]
Update = tuple[int, int, Pairs, Pairs]  # first id, last id, bids, asks


class Truth:
    """A small book whose messages span several ids."""

    def __init__(self, rng: random.Random, count: int) -> None:
        self.bids, self.asks = {90.0 + i: 1.0 + i for i in range(5)}, {101.0 + i: 1.0 + i for i in range(5)}
        self.updates: list[Update] = []
        self.books: dict[int, tuple[dict[float, float], dict[float, float]]] = {10: (dict(self.bids), dict(self.asks))}
        last = 10
        for _ in range(count):
            first, last = last + 1, last + rng.randint(1, 4)
            changed: list[Pairs] = []
            for side, low in ((self.bids, 85), (self.asks, 101)):
                prices = rng.sample(range(low, low + 12), rng.randint(0, 3))
                changed.append([(float(p), float(rng.choice([0, 1, 2, 3]))) for p in prices])
                for price, qty in changed[-1]:
                    if qty:
                        side[price] = qty
                    else:
                        side.pop(price, None)
            if not any(changed):
                changed[0] = [(90.0, 7.0)]
                self.bids[90.0] = 7.0
            self.updates.append((first, last, *changed))
            self.books[last] = dict(self.bids), dict(self.asks)


class BookLeg:
    """The connector's side of one leg: its book procedure, and the snapshots that it asks for."""

    def __init__(self, leg: Leg, truth: Truth) -> None:
        self.leg, self.truth = leg, truth
        self.wanted_at = -1
        self.now = 0
        self.sync = BookSync(leg.emit, leg.instrument, _follows, self._want)

    def _want(self, _sync: BookSync) -> None:
        self.wanted_at = self.now

    def deliver(self, ms: int, update: Update) -> None:
        self.now = ms
        first, last, bids, asks = update
        self.leg.at(ms)
        self.sync.delta(first, last, -1, BASE_US + last, bids, asks)

    def snapshot(self, ms: int, last_id: int) -> None:
        self.now = ms
        bids, asks = self.truth.books[last_id]
        self.leg.at(ms)
        self.wanted_at = -1
        if not self.sync.snapshot(last_id, 0, list(bids.items()), list(asks.items())):
            self.wanted_at = ms


@st.composite
def two_book_legs(draw: Any) -> tuple[int, list[set[int]], list[int], list[int]]:
    seed = draw(st.integers(0, 1 << 20))
    lost = [draw(st.sets(st.integers(1, 39), max_size=4)) for _ in range(2)]
    delays = [draw(st.integers(0, 30)) for _ in range(2)]
    rest = [draw(st.sampled_from([15, 60, 250])) for _ in range(2)]
    return seed, lost, delays, rest


Plan = tuple[int, list[set[int]], list[int], list[int]]


def _play_books(
    made: Bench, plan: Plan, on_ms: Callable[[int], None] = lambda _ms: None, *, live: bool = True
) -> Truth:
    """40 messages, one each 10 ms; a snapshot takes `rest` ms and is of that time. Not `live`: merged afterwards."""
    seed, lost, delays, rest = plan
    truth = Truth(random.Random(seed), 40)
    legs = [BookLeg(leg, truth) for leg in made.legs]
    for ms in range(700):
        for i, leg in enumerate(legs):
            n, off = divmod(ms - delays[i], 10)
            if off == 0 and 0 <= n < 40 and n not in lost[i]:
                leg.deliver(ms, truth.updates[n])
            needs = leg.sync.state in (WAITING, BROKEN)
            if needs and leg.wanted_at >= 0 and ms >= leg.wanted_at + rest[i]:
                newest = min(max((ms - 1) // 10, 0), 39)
                leg.snapshot(ms, truth.updates[newest][1])
        on_ms(ms)
        if live:
            made.turn()
    for _ in range(8):
        made.rest(1000)
    return truth


def _messages(rows: Rows) -> list[Rows]:
    return np.split(rows, np.flatnonzero(rows["flags"] & Flag.LAST)[:-1] + 1) if len(rows) else []


def _chains(made: Bench) -> tuple[set[int], list[tuple[int, int]]]:
    """From the legs' rings: ids of snapshots, and (id before, id) of every message that is proven to follow."""
    starts, links = set(), []
    for name in made.names:
        with RingReader(made.rings / name, "orderbook_l2") as ring:
            ring.seek(0)
            before = -1
            for message in _messages(ring.read()):
                id_, flags = int(message["update_id"][-1]), int(message["flags"][-1])
                if flags & Flag.SNAPSHOT:
                    starts.add(id_)
                else:
                    links.append((before, id_))
                before = id_
    return starts, links


def _check_book(made: Bench, truth: Truth) -> tuple[list[int], list[int]]:
    """Every state of the merged book is the truth's and every action is right; ids of messages, and of snapshots."""
    book, known, ids, snapshots = OrderBook(), {1: set[float](), -1: set[float]()}, [], []
    for message in _messages(made.rows("orderbook_l2")):
        assert len(set(message["update_id"].tolist())) == 1
        snapshot = bool(message["flags"][0] & Flag.SNAPSHOT)
        if snapshot:
            known = {1: set(), -1: set()}
        for side, action, price, qty in zip(
            *(message[f].tolist() for f in ("side", "action", "price", "qty")), strict=True
        ):
            levels = known[side]
            assert action == (Action.DELETE if not qty else Action.UPDATE if price in levels else Action.NEW)
            (levels.add if qty else levels.discard)(price)
        book.apply(message)
        assert book.is_valid
        assert (book.bids, book.asks) == truth.books[book.update_id]
        (snapshots if snapshot else ids).append(book.update_id)
        assert book.is_complete
    return ids, snapshots


def _check_merged_books(made: Bench, truth: Truth) -> None:
    ids, snapshots = _check_book(made, truth)
    assert ids == sorted(set(ids))
    starts, links = _chains(made)
    final = max([b for _, b in links] + list(starts))
    m = snapshots[0]
    while onward := [b for a, b in links if a <= m < b]:
        m = max(onward)
    if m == final:
        assert len(snapshots) == 1, "a leg could continue the book"
        assert not made.ledger("orderbook_l2")
    else:
        assert len(snapshots) > 1
        rows = made.rows("orderbook_l2")
        resynced = {int(i) for i in rows["update_id"][rows["flags"] & Flag.RESYNCED != 0]}
        assert resynced == set(snapshots[1:]) == {last for _, last in made.ledger("orderbook_l2")}
    assert max(ids + snapshots) == final


@FEW
@given(plan=two_book_legs(), live=st.booleans())
def test_the_merged_book_has_a_hole_only_where_no_leg_can_continue_it(plan: Plan, live: bool) -> None:
    with bench(feeds=("orderbook_l2",)) as made:
        truth = _play_books(made, plan, live=live)
        _check_merged_books(made, truth)


@FEW
@given(plan=two_book_legs(), seed=st.integers(0, 1 << 20), checkpoints=st.booleans())
def test_books_survive_crashes_at_any_publication(plan: Plan, seed: int, checkpoints: bool) -> None:
    rng = random.Random(seed)
    directory = Path(tempfile.mkdtemp(prefix="arbiter-"))
    with crashing(rng, 0.15):
        made = CrashingBench(directory, feeds=("orderbook_l2",))

        def checkpoint(_ms: int) -> None:
            if checkpoints and rng.random() < 0.1:
                made.arbiter.checkpoint()

        truth = _play_books(made, plan, checkpoint)
    try:
        made.rest(5000)
        _check_merged_books(made, truth)
        assert not made.said_twice()
    finally:
        made.close()
        shutil.rmtree(directory)


def test_a_hole_of_one_leg_is_taken_from_the_other_one(two: Bench) -> None:
    """The leg in use loses a message and takes a new snapshot: the merged book does not notice."""
    truth = Truth(random.Random(5), 20)
    a, b = (BookLeg(leg, truth) for leg in two.legs)
    for n in range(20):
        for leg in (a, b):
            if n in (0, 8) and leg.sync.state != "live":
                leg.snapshot(10 * n, truth.updates[n][1])
            if (leg, n) != (a, 5):
                leg.deliver(10 * n + (leg is b), truth.updates[n])
            if n == 0 and leg.sync.state == WAITING:
                leg.snapshot(10 * n, truth.updates[0][1])
        two.turn(10)
    two.rest(2000)
    ids, snapshots = _check_book(two, truth)
    assert len(snapshots) == 1
    assert ids == [last for _, last, *_ in truth.updates if last > snapshots[0]]
    rows = two.rows("orderbook_l2")
    assert set((rows["packet_id"] % 2).tolist()) == {0, 1}
    with RingReader(two.rings / "leg0", "gaps") as ring:
        assert ring.published > 0, "the leg itself had a hole"
    assert not len(two.rows("gaps"))


def test_what_a_message_did_is_said_of_the_merged_book_not_of_the_legs(two: Bench) -> None:
    """Snapshots have a limited depth, so the same price can be known to one leg and new to the merged book."""
    a, b = (BookLeg(leg, Truth(random.Random(1), 1)) for leg in two.legs)
    for leg, bids in ((a, [(90.0, 1.0)]), (b, [(90.0, 1.0), (50.0, 9.0)])):
        leg.leg.at(0 if leg is a else 1)
        leg.sync.snapshot(10, 0, bids, [(101.0, 1.0)])
    two.rest()
    b.leg.at(100)
    b.sync.delta(11, 11, -1, BASE_US, [(50.0, 8.0)], [])
    two.rest()
    a.leg.at(200)
    a.sync.delta(11, 11, -1, BASE_US, [(50.0, 8.0)], [])
    a.sync.delta(12, 12, -1, BASE_US, [(50.0, 7.0)], [])
    two.rest()
    rows = two.rows("orderbook_l2")[2:]
    assert rows["qty"].tolist() == [8.0, 7.0]
    assert rows["action"].tolist() == [Action.NEW, Action.UPDATE]
    assert (rows["packet_id"] % 2).tolist() == [1, 0]


def test_a_backlog_of_books_is_merged_as_it_would_have_been_when_it_came(two: Bench) -> None:
    """Two holes of both legs, seconds apart: the first snapshot is not passed over for the second one."""
    truth = Truth(random.Random(3), 60)
    legs = [BookLeg(leg, truth) for leg in two.legs]
    for n, update in enumerate(truth.updates):
        for leg in legs:
            if n not in (20, 40):
                leg.deliver(n * 200, update)
            if leg.sync.state in (WAITING, BROKEN):
                leg.snapshot(n * 200 + 1, update[1])
    two.rest(8000)
    ids, snapshots = _check_book(two, truth)
    assert snapshots == [truth.updates[n][1] for n in (0, 21, 41)]
    assert ids == [
        last for _, last, *_ in truth.updates if last not in (truth.updates[n][1] for n in (0, 20, 21, 40, 41))
    ]


def test_a_book_whose_messages_were_lapped_is_flagged_until_the_next_snapshot(tmp_path: Path) -> None:
    made = Bench(tmp_path, legs=1, feeds=("orderbook_l2",))
    made.legs[0].emit.close()
    shutil.rmtree(tmp_path / "leg0")
    leg = made.legs[0] = Leg(tmp_path, "leg0", made.feeds, SMALL)
    sync = BookSync(leg.emit, leg.instrument, _follows, lambda _book: None)
    leg.at(0)
    sync.snapshot(10, 0, [(90.0, 1.0)], [(101.0, 1.0)])
    made.rest(600)
    for id_ in range(11, 1011):
        leg.at(id_)
        sync.delta(id_, id_, -1, BASE_US + id_, [(90.0, float(id_))], [])
    made.rest(3000)
    rows = made.rows("orderbook_l2")[2:]
    first = int(rows["update_id"][0])
    assert first > 11
    assert rows["update_id"].tolist() == list(range(first, 1011))
    assert (rows["flags"] & Flag.BOOK_INVALID != 0).all()
    assert made.ledger("orderbook_l2") == {(11, first - 1): False}
    leg.at(5000)
    sync.distrust("test")
    sync.snapshot(1010, 0, [(90.0, 1.0)], [(101.0, 1.0)])
    sync.delta(1011, 1011, -1, BASE_US, [(91.0, 1.0)], [])
    made.rest(3000)
    assert not (made.rows("orderbook_l2")["flags"][-3:] & Flag.BOOK_INVALID).any()
    made.close()


@pytest.mark.parametrize("ends", ["a snapshot", "the end", "a crash", "a crash that leaves only the rings"])
def test_messages_that_stand_in_no_book_are_all_there_and_what_may_be_missing_between_them_is_told(
    tmp_path: Path, ends: str
) -> None:
    """Both legs lost 12 and 14: nothing but the leg's own ledger would tell the second hole."""
    made = Bench(tmp_path, legs=2, feeds=("orderbook_l2",))
    legs = [BookLeg(leg, Truth(random.Random(1), 1)) for leg in made.legs]
    for leg in legs:
        leg.leg.at(0)
        leg.sync.snapshot(10, 0, [(90.0, 1.0)], [(101.0, 1.0)])
        for id_ in (11, 13, 15, 16):
            leg.leg.at(id_)
            leg.sync.delta(id_, id_, -1, BASE_US + id_, [(80.0 + id_, 1.0)], [])
        for _ in leg.sync.flush():
            pass
    made.rest(3000)
    rows = made.rows("orderbook_l2")[2:]
    assert rows["update_id"].tolist() == [11, 13, 15, 16]
    assert rows["action"].tolist() == [Action.NEW, Action.UPDATE, Action.UPDATE, Action.UPDATE]
    assert (rows["flags"] & Flag.UNPROVEN != 0).tolist() == [False, True, True, True]
    if ends == "a crash that leaves only the rings":
        (tmp_path / "merged" / "arbiter.state").unlink(missing_ok=True)
    if ends.startswith("a crash"):
        made.crash()
    if ends == "the end":
        made.arbiter.finish()
    else:
        for leg in legs:
            leg.leg.at(9000)
            leg.sync.snapshot(20, BASE_US + 20, [(90.0, 1.0)], [(101.0, 1.0)])
            leg.sync.delta(21, 21, -1, BASE_US + 21, [(91.0, 1.0)], [])
        made.rest(3000)
        made.arbiter.finish()  # the snapshot has ended the doubt: nothing more to tell
    assert made.ledger("orderbook_l2") == {(12, 12): False, (14, 16 if ends == "the end" else 20): False}
    made.close()


def test_ids_that_begin_anew_are_followed(two: Bench) -> None:
    truth = Truth(random.Random(1), 6)
    legs = [BookLeg(leg, truth) for leg in two.legs]
    for leg in legs:
        leg.leg.at(0)
        leg.sync.snapshot(1_000_000, BASE_US, [(90.0, 1.0)], [(101.0, 1.0)])
    two.rest()
    for leg in legs:
        leg.leg.at(500)
        leg.sync.distrust("ids_reset")
        leg.sync.snapshot(10, BASE_US + 10, *(list(side.items()) for side in truth.books[10]))
        for first, last, bids, asks in truth.updates:
            leg.leg.at(510)
            leg.sync.delta(first, last, -1, BASE_US + last, bids, asks)
    two.rest()
    rows = two.rows("orderbook_l2")
    assert rows["update_id"][-1] == truth.updates[-1][1]
    book = OrderBook()
    book.apply(rows)
    assert (book.bids, book.asks) == truth.books[book.update_id]
    assert b"ids_reset" in two.rows("gaps")["cause"].tolist()


def test_a_crossed_book_stays_flagged_and_a_snapshot_puts_it_right(two: Bench) -> None:
    legs = [BookLeg(leg, Truth(random.Random(1), 1)) for leg in two.legs]
    for leg in legs:
        leg.leg.at(0)
        leg.sync.delta(11, 11, -1, BASE_US, [(90.0, 1.0)], [])
        leg.sync.snapshot(10, 0, [(90.0, 1.0)], [(101.0, 1.0)])
        leg.leg.at(1)
        leg.sync.delta(12, 12, -1, BASE_US, [(102.0, 1.0)], [])
        leg.sync.delta(13, 13, -1, BASE_US, [(103.0, 1.0)], [])
    two.rest()
    rows = two.rows("orderbook_l2")
    assert rows["update_id"].tolist() == [10, 10, 11, 12, 13]
    assert (rows["flags"] & Flag.BOOK_INVALID != 0).tolist() == [False] * 3 + [True] * 2
    for leg in legs:
        leg.leg.at(9000)
        leg.sync.distrust("crossed")
        leg.sync.snapshot(13, 0, [(90.0, 1.0)], [(101.0, 1.0)])
        leg.sync.delta(14, 14, -1, BASE_US, [(91.0, 1.0)], [])
    two.rest()
    rows = two.rows("orderbook_l2")[5:]
    assert rows["update_id"].tolist() == [13, 13, 14]
    assert not (rows["flags"] & Flag.BOOK_INVALID).any()


@pytest.mark.parametrize("bid", [92.0, 102.0])  # the second one would cross the book that lacks the message before
def test_messages_that_no_leg_could_join_to_a_book_are_not_taken_for_proven(two: Bench, bid: float) -> None:
    a, b = (BookLeg(leg, Truth(random.Random(1), 1)) for leg in two.legs)
    a.leg.at(0)
    a.sync.snapshot(10, 0, [(90.0, 1.0)], [(101.0, 1.0)])
    a.sync.delta(11, 11, -1, BASE_US, [(91.0, 1.0)], [])
    a.sync.delta(13, 13, -1, BASE_US, [(bid, 1.0)], [])
    for _ in a.sync.flush():
        pass
    b.leg.at(1)
    b.sync.snapshot(12, 0, [(90.0, 1.0), (91.0, 2.0)], [(105.0, 1.0)])
    b.sync.delta(13, 13, -1, BASE_US, [(bid, 1.0)], [])
    two.rest(3000)
    rows = two.rows("orderbook_l2")
    assert not (rows["flags"] & Flag.BOOK_INVALID).any()
    book = OrderBook()
    book.apply(rows)
    assert book.bids == {90.0: 1.0, 91.0: 2.0, bid: 1.0}
    assert book.asks == {105.0: 1.0}
    assert two.ledger("orderbook_l2") == {(12, 12): False}


# Feeds without a line of ids


@FEW
@given(
    rows=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 400)), max_size=40),
    seed=st.integers(0, 1 << 20),
)
def test_copies_are_matched_one_to_one_also_over_crashes(rows: list[tuple[int, int, int]], seed: int) -> None:
    """Each leg's equal rows: the merged feed has as many as the leg that has more."""
    rng = random.Random(seed)
    directory = Path(tempfile.mkdtemp(prefix="arbiter-"))
    with crashing(rng, 0.1):
        made = CrashingBench(directory, feeds=("tickers", "liquidations"))
        for ms in range(0, 401, 5):
            for leg, what, at in rows:
                if at // 5 * 5 == ms:
                    emit = made.legs[leg].at(ms)
                    emit.liquidation(made.legs[leg].instrument, BASE_US + what, 1, 5.0, 1.0)
                    emit.ticker(made.legs[leg].instrument, 0, last=float(what))
            if rng.random() < 0.1:
                made.arbiter.checkpoint()
            made.turn(5)
    try:
        made.rest()
        counts = [Counter(what for leg, what, _ in rows if leg == n) for n in (0, 1)]
        wanted = counts[0] | counts[1]
        assert Counter((made.rows("liquidations")["timestamp"] - BASE_US).tolist()) == wanted
        assert Counter(int(x) for x in made.rows("tickers")["last"]) == wanted
    finally:
        made.close()
        shutil.rmtree(directory)


def test_bbo_is_told_apart_by_update_id_where_there_is_one(two: Bench) -> None:
    a, b = two.legs
    for leg, ids in ((a, (1, 2, 2, 4)), (b, (1, 2, 3, 4))):
        for update_id in ids:
            leg.at(update_id).bbo(leg.instrument, 0, 1.0, 1.0, 2.0, 1.0, update_id)
    for leg in (a, b):
        for _ in range(2 if leg is a else 1):
            leg.at(10).bbo(leg.instrument, BASE_US, 1.0, 1.0, 2.0, 1.0)
    two.rest()
    assert Counter(two.rows("bbo")["update_id"].tolist()) == {1: 1, 2: 1, 3: 1, 4: 1, -1: 2}


def test_a_gap_of_a_feed_without_ids_is_one_only_when_all_legs_have_it(two: Bench) -> None:
    a, b = two.legs
    for ms in (0, 3000, 6000, 9000):
        for leg in (a, b):
            leg.at(ms).ticker(leg.instrument, BASE_US + ms, last=float(ms))
    a.at(3100).gap("tickers", "*", from_time=BASE_US + 1_000_000, to_time=BASE_US + 2_000_000, cause="reconnect")
    two.rest(12_000)
    assert not len(two.rows("gaps"))
    a.at(9100).gap("tickers", "*", from_time=BASE_US + 4_000_000, to_time=BASE_US + 5_000_000, cause="reconnect")
    b.at(9200).gap("tickers", "*", from_time=BASE_US + 4_500_000, to_time=BASE_US + 5_500_000, cause="reconnect")
    two.rest(12_000)
    (gap,) = two.rows("gaps")
    assert (gap["feed"], gap["from_time"] - BASE_US, gap["to_time"] - BASE_US) == (b"tickers", 4_500_000, 5_000_000)


# Legs that come and go


def test_a_leg_that_dies_restarts_and_whose_files_are_replaced_goes_on(two: Bench) -> None:
    a, b = two.legs
    for seq in range(1, 5):
        a.trade(seq, seq)
        b.trade(seq, seq)
    two.rest()
    a.kill()
    for seq in range(5, 9):
        b.trade(seq, seq)
    two.rest()
    again = two.legs[0] = Leg(two.rings, "leg0")
    b.kill()
    for seq in range(8, 12):
        again.trade(seq + 100, seq)
    two.rest(1000)
    assert two.seqs() == list(range(1, 12))
    shutil.rmtree(two.rings / "leg1")
    fresh = two.legs[1] = Leg(two.rings, "leg1")
    for seq in range(12, 15):
        fresh.trade(seq + 200, seq)
    two.rest(2000)
    assert two.seqs() == list(range(1, 15))
    assert not len(two.rows("gaps"))


def test_a_leg_that_laps_the_arbiter_is_counted_and_the_other_one_covers_it(tmp_path: Path) -> None:
    made = Bench(tmp_path, feeds=("trades", "liquidations"))
    made.legs[0].emit.close()
    shutil.rmtree(tmp_path / "leg0")
    a = made.legs[0] = Leg(tmp_path, "leg0", made.feeds, SMALL)
    b = made.legs[1]
    for leg in (a, b):
        leg.trade(0, 1)
        leg.at(0).liquidation(leg.instrument, BASE_US, 1, 1.0, 1.0)
    made.rest(600)
    for seq in range(2, 2002):
        for leg in (a, b):
            leg.trade(seq, seq)
            leg.at(seq).liquidation(leg.instrument, BASE_US + seq, 1, 1.0, 1.0)
    made.rest(3000)
    made.rest(3000)
    assert made.seqs() == list(range(1, 2002))
    assert len(made.rows("liquidations")) == 2001
    assert not len(made.rows("gaps"))
    source = made.arbiter.lanes["trades"].sources[0]
    assert source.lapped == 2000 - source.read + 1 > 1000
    made.close()


def test_rows_lapped_on_every_leg_are_in_the_ledger(tmp_path: Path) -> None:
    made = Bench(tmp_path, legs=1, feeds=("trades", "liquidations"))
    made.legs[0].emit.close()
    shutil.rmtree(tmp_path / "leg0")
    leg = made.legs[0] = Leg(tmp_path, "leg0", made.feeds, SMALL)
    leg.trade(0, 1)
    leg.at(0).liquidation(leg.instrument, BASE_US, 1, 1.0, 1.0)
    made.rest(600)
    for seq in range(2, 2002):
        leg.trade(seq, seq)
        leg.at(seq).liquidation(leg.instrument, BASE_US + seq, 1, 1.0, 1.0)
    made.rest(3000)
    seqs = made.seqs()
    assert made.ledger("trades") == {(2, seqs[1] - 1): False}
    (lapped,) = [row for row in made.rows("gaps") if row["feed"] == b"liquidations"]
    assert lapped["cause"] == b"lapped"
    made.close()


def test_a_stop_waits_for_what_waits_and_the_next_life_goes_on(two: Bench) -> None:
    a, b = two.legs
    a.trade(0, 1)
    two.rest()
    a.trade(100, 3)
    two.turn()
    two.step_s = 0.0001
    two.arbiter.finish()
    two.step_s = 0.0
    assert two.seqs() == [1, 3]
    assert two.ledger("trades") == {(2, 2): False}
    two.start()
    b.trade(300, 2)
    b.trade(301, 3)
    b.trade(302, 4)
    two.rest()
    assert two.seqs() == [1, 3, 2, 4]
    assert two.ledger("trades") == {(2, 2): True}


def test_a_damaged_state_file_is_passed_over_and_the_rings_decide(two: Bench) -> None:
    a, b = two.legs
    for seq in (1, 2, 3):
        a.trade(seq, seq)
    two.rest()
    two.arbiter.checkpoint()
    path = two.rings / "merged" / "arbiter.state"
    path.write_bytes(path.read_bytes()[:-3] + b"bad")
    two.crash()
    for seq in (2, 3, 4):
        b.trade(10 + seq, seq)
    two.rest()
    assert two.seqs() == [1, 2, 3, 4]


def test_a_second_arbiter_of_the_same_name_is_refused(two: Bench) -> None:
    with pytest.raises(RingError, match="another process writes"):
        Arbiter(two.rings, "merged", exchange=EXCHANGE, legs=two.names, feeds=FEEDS, capacity=SIZES)


def test_a_leg_of_another_exchange_is_passed_over(two: Bench) -> None:
    other = Emit(two.rings, "leg2", Exchange.DERIBIT, ("trades",), capacities=SIZES, semaphore=False)
    two.names.append("leg2")
    two.arbiter.close()
    two.start()
    two.rest()
    assert "DERIBIT" in two.arbiter.lanes["trades"].sources[2].error
    other.close()


# Configuration


FLEET = """
[connectors.a]
exchange = "binance_spot"
tickers = ["BTCUSDT"]
feeds = ["trades", "bbo"]
[connectors.b]
exchange = "binance_spot"
tickers = ["BTCUSDT"]
feeds = ["trades", "orderbook_l2"]
[connectors.deep]
exchange = "binance_spot"
tickers = ["BTCUSDT"]
book_depth = 5000
[connectors.d]
exchange = "deribit"
tickers = ["BTC-PERPETUAL"]
"""


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ('[arbiters.m]\nlegs = ["a"]', "legs = ['a']: expected two or more"),
        ('[arbiters.m]\nlegs = ["a", "c"]', "legs = 'c': no such connector; there are a, b, deep, d"),
        ('[arbiters.m]\nlegs = ["a", "deep"]', "legs: their book_depth differs ('0', '5000'); expected one"),
        ('[arbiters.m]\nlegs = ["a", "d"]', "different exchanges (binance_spot, deribit)"),
        ('[arbiters.a]\nlegs = ["a", "b"]', "connectors.a has this name too"),
        ('[arbiters.m]\nlegs = ["a", "b"]\nfeeds = ["bbo"]', "feeds = 'bbo': no such feed; allowed are trades"),
        (
            '[arbiters.m]\nlegs = ["a", "b"]\ncapacity = {trades = 1000}',
            "capacity.trades = 1000: allowed are powers of two",
        ),
        ('[arbiters.m]\nlegs = ["a", "b"]\nwait_ms = -1', "wait_ms = -1"),
        ('[arbiters.m]\nlegs = ["a", "b"]\nleg = 1', "arbiters.m.leg = 1: unknown key; allowed are legs, feeds"),
    ],
)
def test_a_wrong_arbiter_section_is_refused_with_key_and_allowed_values(
    tmp_path: Path, section: str, words: str
) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET + section)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_an_arbiter_takes_the_feeds_that_all_legs_have(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET + '[arbiters.m]\nlegs = ["a", "b"]')
    assert load(path).arbiters["m"].feeds == ["trades"]


@pytest.mark.parametrize(
    ("exchange", "feed", "told"),
    [
        ("okx", "trades", 'take trade_channel = "trades-all"'),
        ("coinbase_exchange", "orderbook_l2", "have no number"),
        ("coinbase", "orderbook_l2", "are numbered by connection"),
    ],
)
@pytest.mark.parametrize("command", [["check", "--offline"], ["up"], ["arbitrate", "m"]])
def test_feeds_of_which_two_legs_cannot_make_one_are_refused(
    tmp_path: Path, exchange: str, feed: str, told: str, command: list[str]
) -> None:
    """Rows that stand for several trades would be there twice, a book whose messages have no numbers would be wrong."""
    text = "".join(f'[connectors.{n}]\nexchange = "{exchange}"\ntickers = ["BTC-USD"]\n' for n in "ab")
    path = tmp_path / "fleet.toml"
    path.write_text(f'rings = "{tmp_path / "rings"}"\n{text}[arbiters.m]\nlegs = ["a", "b"]\n')
    done = subprocess.run(
        [sys.executable, "-m", "mdcollector", *command, "-c", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 78, done.stderr
    assert f"arbiters.m.feeds: {feed} of {exchange} cannot be merged" in done.stderr
    assert told in done.stderr


# Real processes


def _fleet(tmp_path: Path, sim: SimProcess, exchange: str, **options: Any) -> Path:
    leg = {"exchange": exchange, "tickers": sim.tickers, "ws_url": sim.ws_url, "rest_url": sim.rest_url, **options}
    sizes = {"trades": 65536, "orderbook_l2": 131072, "bbo": 65536, "gaps": 4096}
    text = f'rings = "{tmp_path / "rings"}"\n'
    for name in ("leg_a", "leg_b"):
        text += f"[connectors.{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in leg.items())
        text += "reconnect_most_s = 0.5\n"
        text += f"[connectors.{name}.capacity]\n" + "".join(f"{k} = {v}\n" for k, v in sizes.items())
    text += '[arbiters.merged]\nlegs = ["leg_a", "leg_b"]\n'
    text += "[arbiters.merged.capacity]\n" + "".join(f"{k} = {v}\n" for k, v in sizes.items())
    text += f'[writers.parquet]\nout = "{tmp_path / "data"}"\nconnectors = ["merged"]\nroll_s = 2.0\n'
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return path


def _until(condition: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.02)


def _published(tmp_path: Path, name: str, feed: str) -> int:
    try:
        with RingReader(tmp_path / "rings" / name, feed) as ring:
            return ring.published
    except RingError:
        return 0


def _stats(tmp_path: Path, name: str) -> dict[str, Any]:
    return read_stats(tmp_path / "rings" / name / "stats")


@pytest.mark.crash
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("exchange", "options"),
    [
        ("binance_spot", {}), ("binance_futures", {}), ("bybit_linear", {}),
        ("coinbase", {"feeds": ["trades"]}),
        ("coinbase_exchange", {"feeds": ["trades"]}), ("deribit", {}),
        ("okx", {"feeds": ["trades"], "trade_channel": "trades-all"}), ("okx", {"feeds": ["orderbook_l2", "bbo"]}),
    ],
)  # fmt: skip
def test_two_connectors_with_faults_and_an_arbiter_that_is_killed_equal_the_ledger(
    tmp_path: Path, exchange: str, options: dict[str, Any]
) -> None:
    """Lost, doubled, swapped frames and dead connections of both legs, and kill -9 of the arbiter at random moments."""
    rng, feeds = random.Random(exchange), options.get("feeds", ["trades", "orderbook_l2"])
    # Each leg loses by itself. A trade of Bybit's that both lose leaves no trace: its trades are lost on one connection.
    kept = {"bybit_linear": ",stream=orderbook"}.get(exchange, "")
    faults = [f"drop:rate=0.02,conn={conn}{kept}" for conn in range(1, 9)]
    faults += ["drop:rate=0.05,conn=2,stream=publicTrade"] if kept else []
    faults += ["duplicate:rate=0.02", "reorder:rate=0.02", "disconnect:at=4,conn=1", "disconnect:at=7,conn=2"]
    faults += ["disconnect:at=10"]  # here both lose the same
    arguments = ["--rate", "60", "--hold", "--seconds", "120", "--seed", "11"]
    arguments += ["--tickers", "2"] + [x for fault in faults for x in ("--fault", fault)]
    with SimProcess(exchange, *arguments, ledger=tmp_path / "truth.jsonl") as sim:
        fleet = _fleet(tmp_path, sim, exchange, **options)
        command = [sys.executable, "-m", "mdcollector", "--log-level", "error", "up", "-c", str(fleet), "--json"]
        up = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            _until(lambda: all(_published(tmp_path, n, "bbo") or (tmp_path / "rings" / n / "stats").exists()
                               for n in ("leg_a", "leg_b", "merged")), "the fleet runs")  # fmt: skip
            _until(lambda: all(_subscribed(tmp_path, n) for n in ("leg_a", "leg_b")), "both legs are subscribed")
            sim.resume()
            kills = 0
            while kills < KILLS or not all(_fired(sim).values()) or not _each_leg_was_covered(tmp_path, feeds):
                goal = _published(tmp_path, "merged", feeds[0]) + rng.randrange(5, 60)
                _flows(tmp_path, feeds[0], goal)
                kills += _kill_the_arbiter(tmp_path)
                _flows(tmp_path, feeds[0], goal + 1)
            sim.stop()
            _until(lambda: _quiet(tmp_path), "everything is merged")
            up.send_signal(signal.SIGINT)
            out, _ = up.communicate(timeout=90)
        finally:
            if up.poll() is None:
                up.terminate()  # its children end with it
                up.communicate(timeout=60)
    result = json.loads(out.splitlines()[-1])
    assert result["lost"] == 0, result
    assert _each_leg_was_covered(tmp_path, feeds)
    if "trades" in feeds:
        _trades_are_those_of_the_legs(tmp_path)
    proof = prove(sim.ledger(), tmp_path / "data", exchange=exchange, feeds=[f for f in feeds if f in PROVEN])
    assert proof.ok, str(proof)
    if "orderbook_l2" in feeds:
        assert proof.books_checked > 40, str(proof)
    verified = subprocess.run(
        [sys.executable, "-m", "mdcollector", "verify", str(tmp_path / "data"), "--json"],
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stdout[-2000:] + verified.stderr


def _each_leg_was_covered(tmp_path: Path, feeds: Sequence[str]) -> bool:
    """Each leg's books had a hole of which nothing is missing in the merged ones."""
    if "orderbook_l2" not in feeds:
        return True
    merged, *legs = (_book_holes(tmp_path, name) for name in ("merged", "leg_a", "leg_b"))

    def is_covered(hole: tuple[str, int, int]) -> bool:
        ticker, first, last = hole
        return not any(t == ticker and a <= last and first <= b for t, a, b in merged)

    return all(any(map(is_covered, leg)) for leg in legs)


def _book_holes(tmp_path: Path, name: str) -> list[tuple[str, int, int]]:
    """Ticker, first and last id of what a connector's books missed."""
    with RingReader(tmp_path / "rings" / name, "gaps") as ring:
        ring.seek("oldest")
        rows = ring.read(1 << 20)
        tickers = ring.tickers
    rows = rows[(rows["feed"] == b"orderbook_l2") & (rows["first_id"] >= 0)]
    columns = (rows[column].tolist() for column in ("ticker", "first_id", "last_id"))
    return [(tickers[code], first, last) for code, first, last in zip(*columns, strict=True)]


def _fired(sim: SimProcess) -> Counter[str]:
    """Name of a fault -> how often it hit; disconnects only when all of them did."""
    fired: Counter[str] = Counter()
    faults = sim.state()["faults"]
    for fault in faults:
        fired[fault["name"]] += fault["fired"]
    if not all(fault["fired"] for fault in faults if fault["name"] == "disconnect"):
        fired["disconnect"] = 0
    return fired


def _flows(tmp_path: Path, feed: str, goal: int) -> None:
    """Wait until so many rows are merged."""
    _until(lambda: _published(tmp_path, "merged", feed) >= goal, f"rows of {feed} are merged")


def _kill_the_arbiter(tmp_path: Path) -> bool:
    with RingReader(tmp_path / "rings" / "merged", "gaps") as ring:
        if not ring.writer_alive:
            return False
        os.kill(ring.writer_pid, signal.SIGKILL)
        return True


def _subscribed(tmp_path: Path, name: str) -> bool:
    try:
        streams = _stats(tmp_path, name)["streams"]
    except RingError:
        return False
    return bool(streams) and all(stream["acknowledged_ns"] for stream in streams.values())


def _quiet(tmp_path: Path) -> bool:
    """The arbiter has read both legs to their ends and nothing waits."""
    try:
        page = _stats(tmp_path, "merged")
        with RingReader(tmp_path / "rings" / "merged", "gaps") as ring:
            if not ring.writer_alive or page["pid"] != ring.writer_pid:
                return False
    except RingError:
        return False
    lag = sum(f["lag_rows"] for leg in page["legs"].values() for f in leg["feeds"].values())
    read = all(
        f["read"] or name not in ("trades", "bbo") for leg in page["legs"].values() for name, f in leg["feeds"].items()
    )
    return time.time_ns() - page["time_ns"] < 2e9 and not lag and not sum(page["waiting"].values()) and read


def _trades_are_those_of_the_legs(tmp_path: Path) -> None:
    found: dict[str, list[tuple[str, int, bytes]]] = {}
    for name in ("merged", "leg_a", "leg_b"):
        with RingReader(tmp_path / "rings" / name, "trades") as ring:
            ring.seek(0)
            rows = ring.read(1 << 20)
            columns = ring.names(rows).tolist(), rows["trade_seq"].tolist(), rows["trade_id"].tolist()
            found[name] = list(zip(*columns, strict=True))
    merged = found.pop("merged")
    assert len(merged) == len(set(merged)), "no trade twice"
    assert set(merged) == {trade for trades in found.values() for trade in trades}, "every trade that a leg has"
