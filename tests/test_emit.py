"""The emitter, byte by byte: rows are built here from the documented layout and compared with what lies in the ring."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdcollector import emit as emit_module
from mdcollector.emit import BEGINNING_S, Emit, level_code
from mdcollector.errors import FrameError, RingError
from mdcollector.records import ALWAYS_ON, FEEDS, Exchange
from mdcollector.ring import RingReader

NEW, UPDATE, DELETE = 1, 2, 3
LAST, SNAPSHOT, INVALID, REPAIRED, REPLAYED, TIME_LOCAL = 1, 2, 8, 16, 32, 64
U32 = 0xFFFF_FFFF
NOW_NS = 1_796_083_200_123_456_789
RCV_US = 1_796_083_200_123_456
ALL = ("trades", "orderbook_l2", "bbo", "tickers", "candles", "liquidations")
SIZES = {
    "trades": 128,
    "orderbook_l2": 128,
    "bbo": 128,
    "tickers": 192,
    "candles": 128,
    "liquidations": 64,
    "instruments": 192,
    "gaps": 128,
    "clocks": 128,
}


class Clock:
    """Monotonic ns: every look is `step` later."""

    def __init__(self) -> None:
        self.now, self.step = 5_000, 10

    def __call__(self) -> int:
        self.now += self.step
        return self.now


def row(feed: str, seq: int, ticker: int, flags: int, *fields: bytes, timestamp: int = RCV_US, one: bytes = b"", parse: int = 10,
        publish: int = 10, packet: int = 1, exchange: int = 3) -> bytes:  # fmt: skip
    """A record by its documentation: 40 bytes that all have, the own columns of 8 bytes, zeros, seq_id last."""
    head = struct.pack("<qqqIIIBB", timestamp, RCV_US, packet, parse, publish, ticker, exchange, flags) + one
    body = head.ljust(40, b"\0") + b"".join(fields)
    assert len(body) <= SIZES[feed] - 8
    return body.ljust(SIZES[feed] - 8, b"\0") + seq.to_bytes(8, "little")


def f8(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def i8(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


class Made:
    """An emitter with a clock of its own, one packet read."""

    def __init__(self, folder: Path, capacity: int = 512, feeds: tuple[str, ...] = ALL, **options: Any) -> None:
        self.clock = Clock()
        self.emit = Emit(
            folder, "c", Exchange.DERIBIT, feeds, capacities=dict.fromkeys((*feeds, *ALWAYS_ON), capacity), clock=self.clock,
            semaphore=False, **options,
        )  # fmt: skip
        self.a = self.emit.instrument("A")
        self.b = self.emit.instrument("BÉ")
        self.packet()

    def packet(self) -> None:
        self.emit.packet(NOW_NS, self.clock.now)

    def stored(self, feed: str) -> list[bytes]:
        """The records as they lie in the data file, in order of their number; only the published ones."""
        raw = (self.emit.directory / f"{feed}.data").read_bytes()
        size, ring = SIZES[feed], self.emit.rings[feed]
        first = max(0, ring.next - ring.capacity)
        return [raw[at * size : (at + 1) * size] for at in (n % ring.capacity for n in range(first, ring.next))]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    one = Made(tmp_path)
    yield one
    one.emit.close()


def values(*pairs: tuple[float, float]) -> np.ndarray[Any, Any]:
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def test_record_sizes_are_the_documented_ones() -> None:
    assert {name: feed.dtype.itemsize for name, feed in FEEDS.items()} == SIZES


def test_what_a_connection_begins_with_is_not_published_twice(tmp_path: Path) -> None:
    """Only the newest of each instrument, only when it is the same to the last bit, and not for ever."""

    def tell(emit: Emit, ticker: str, time: int, bid: float) -> None:
        emit.bbo(emit.instrument(ticker), time, bid, 1.0, float("nan"), 0.0)
        emit.ticker(emit.instrument(ticker), time, last=bid, mark_price=2.0)

    def stored() -> list[tuple[str, int, float]]:
        found = []
        for feed, column in (("bbo", "bid_price"), ("tickers", "last")):
            rows = made.emit.rings[feed].recent_rows(0)
            names = [made.emit.rings[feed].tickers[code] for code in rows["ticker"]]
            found.append(list(zip(names, rows["timestamp"].tolist(), rows[column].tolist(), strict=True)))
        assert found[0] == found[1]
        return found[0]

    made = Made(tmp_path)
    made.emit.instrument("not yet traded")
    first = [("A", 5, 1.0), ("B", 5, 1.0), ("A", 6, 2.0)]
    for event in first:
        tell(made.emit, *event)
    made.emit.close()
    made = Made(tmp_path)  # the next life finds them in its rings
    tell(made.emit, "A", 6, 2.0)
    assert stored() == [*first, ("A", 6, 2.0)], "no connection has begun"
    made.emit.connection_opened()
    for event in [("A", 6, 2.0), ("B", 5, 1.0), ("C", 5, 1.0)]:
        tell(made.emit, *event)
    assert stored()[4:] == [("C", 5, 1.0)]
    assert made.emit.counters["told_again"] == 4
    news = [("A", 5, 1.0), ("A", 7, 2.0), ("B", 5, 3.0)]  # an older one, a later one, one with another number
    for event in news:
        tell(made.emit, *event)
    assert stored()[5:] == news
    with mock.patch("mdcollector.emit.time.monotonic", return_value=time.monotonic() + BEGINNING_S + 1):
        made.emit.tick()
    tell(made.emit, "B", 5, 1.0)
    assert stored()[8:] == [("B", 5, 1.0)]
    made.emit.close()


def test_what_was_asked_for_twice_may_begin_twice(tmp_path: Path) -> None:
    made = Made(tmp_path)
    instrument = made.emit.instrument("A")

    def tell(time: int) -> None:
        made.emit.bbo(instrument, time, 1.0, 1.0, 2.0, 1.0)
        made.emit.ticker(instrument, time, last=1.0)

    made.emit.connection_opened()
    made.emit.asked_again()
    for at in (5, 5, 6, 6, 5):
        tell(at)
    for feed in ("bbo", "tickers"):
        assert made.emit.rings[feed].recent_rows(0)["timestamp"].tolist() == [5, 6, 5]
    assert made.emit.counters["told_again"] == 4
    made.emit.close()


# Each method, bit by bit


def test_trade(made: Made) -> None:
    made.emit.trade(made.b, 1_700_000_000_000_001, -1, 1234.5, 0.1, 2**61)
    assert made.stored("trades") == [
        row(
            "trades",
            0,
            1,
            LAST,
            f8(1234.5, 0.1),
            i8(2**61),
            timestamp=1_700_000_000_000_001,
            one=b"\xff",
            parse=10,
            publish=10,
        )
    ]


def test_trades_are_visible_at_once_and_the_last_one_says_so(made: Made) -> None:
    shown = _publications(made, "trades")
    made.emit.trades([(made.a, 7, 1, -5.0, 2.0, 8, b""), (made.b, 8, -1, 6.0, 0.0, 9, b"x" * 56)], REPAIRED)
    assert shown == [2]
    assert made.stored("trades") == [
        row("trades", 0, 0, REPAIRED, f8(-5.0, 2.0), i8(8), timestamp=7, one=b"\1", parse=10, publish=20),
        row(
            "trades",
            1,
            1,
            REPAIRED | LAST,
            f8(6.0, 0.0),
            i8(9),
            b"x" * 56,
            timestamp=8,
            one=b"\xff",
            parse=10,
            publish=20,
        ),
    ]
    made.emit.trades([])
    assert made.emit.rings["trades"].next == 2


def test_bbo(made: Made) -> None:
    nan = float("nan")
    made.emit.bbo(made.a, 5, 1.5, 2.5, 3.5, 4.5, 77)
    made.emit.bbo(made.a, 0, nan, 0.0, -3.5, 4.5)
    first, second = made.stored("bbo")
    assert first == row("bbo", 0, 0, LAST, f8(1.5, 2.5, 3.5, 4.5), i8(77), timestamp=5, publish=10)
    assert second == row("bbo", 1, 0, LAST | TIME_LOCAL, f8(nan, 0.0, -3.5, 4.5), i8(-1), parse=20, publish=20)


def test_levels(made: Made) -> None:
    shown = _publications(made, "orderbook_l2")
    codes = [level_code(1, NEW), level_code(-1, UPDATE), level_code(-1, DELETE), level_code(0, DELETE)]
    made.emit.levels(made.b, 9, INVALID, 3, values((1.0, 2.0), (3.0, 4.0), (5.0, 0.0), (0.0, 0.0)), codes, 2**62)
    assert shown == [4]
    same: dict[str, Any] = {"timestamp": 9, "parse": 3, "publish": 10}
    assert made.stored("orderbook_l2") == [
        row("orderbook_l2", 0, 1, INVALID, f8(1.0, 2.0), i8(2**62), one=b"\x01\x01", **same),
        row("orderbook_l2", 1, 1, INVALID, f8(3.0, 4.0), i8(2**62), one=b"\xff\x02", **same),
        row("orderbook_l2", 2, 1, INVALID, f8(5.0, 0.0), i8(2**62), one=b"\xff\x03", **same),
        row("orderbook_l2", 3, 1, INVALID | LAST, f8(0.0, 0.0), i8(2**62), one=b"\x00\x03", **same),
    ]
    made.emit.levels(made.b, 0, SNAPSHOT, 3, values((1.0, 2.0)), [level_code(1, NEW)], -1)
    assert made.stored("orderbook_l2")[4] == row(
        "orderbook_l2", 4, 1, SNAPSHOT | LAST | TIME_LOCAL, f8(1.0, 2.0), i8(-1), one=b"\x01\x01", parse=3, publish=20
    )
    made.emit.levels(made.a, 9, 0, 3, values(), [], 5)
    assert made.emit.rings["orderbook_l2"].next == 5, "no level, no row"


def test_ticker(made: Made) -> None:
    made.emit.ticker(made.a, 6, last=1.0, low_24h=-2.0, funding_rate=-0.0001, open_interest=9.0, next_funding_time=123)
    nan = float("nan")
    numbers = f8(1.0, nan, nan, -2.0, nan, nan, nan, nan, nan, nan, -0.0001) + i8(123) + f8(9.0)
    assert made.stored("tickers") == [row("tickers", 0, 0, LAST, numbers, timestamp=6)]
    made.emit.ticker(made.a, 0)
    assert made.stored("tickers")[1] == row(
        "tickers", 1, 0, LAST | TIME_LOCAL, f8(*[nan] * 11), i8(-1), f8(nan), parse=20, publish=20
    )


def test_candle(made: Made) -> None:
    made.emit.candle(made.b, 4, b"1m", 60_000_000, (1.0, 4.0, 0.5, 2.0), 10.0, 3, True)
    made.emit.candle(made.b, 0, b"12345678", 60_000_000, (1.0, 4.0, 0.5, 2.0), float("nan"), -1, False, REPAIRED)
    assert made.stored("candles") == [
        row("candles", 0, 1, LAST, b"1m\0\0\0\0\0\0", i8(60_000_000), f8(1.0, 4.0, 0.5, 2.0, 10.0), i8(3), timestamp=4, one=b"\1"),
        row("candles", 1, 1, LAST | TIME_LOCAL | REPAIRED, b"12345678", i8(60_000_000), f8(1.0, 4.0, 0.5, 2.0, float("nan")),
            i8(-1), parse=20, publish=20),
    ]  # fmt: skip


def test_liquidation(made: Made) -> None:
    made.emit.liquidation(made.a, 3, -1, 2.0, 1.0)
    assert made.stored("liquidations") == [row("liquidations", 0, 0, LAST, f8(2.0, 1.0), timestamp=3, one=b"\xff")]


def test_gap(made: Made) -> None:
    made.emit.gap("orderbook_l2", "BÉ", first_id=5, last_id=9, from_time=1, to_time=2, cause="sequence")
    made.emit.gap("trades", "C", cause="filled", repaired=True)
    first = b"orderbook_l2".ljust(16, b"\0") + i8(5, 9, 1, 2) + b"sequence".ljust(32, b"\0")
    second = b"trades".ljust(16, b"\0") + i8(-1, -1, -1, RCV_US) + b"filled".ljust(32, b"\0")
    assert made.stored("gaps") == [
        row("gaps", 0, 1, LAST | TIME_LOCAL, first),
        row("gaps", 1, 2, LAST | TIME_LOCAL, second, one=b"\1", parse=20, publish=20),
    ]
    assert made.emit.rings["trades"].tickers == ["A", "BÉ", "C"]
    assert made.emit.counters == {"gap_orderbook_l2_sequence": 1, "gap_trades_filled_repaired": 1}


def test_clock_offset(made: Made) -> None:
    made.emit.clock_offset("request", 7, -1500.5, 12.5)
    made.emit.clock_offset("step", 0, 1.0, step_us=-3)
    first = b"request".ljust(8, b"\0") + f8(-1500.5, 12.5) + i8(0)
    second = b"step".ljust(8, b"\0") + f8(1.0, NAN) + i8(-3)
    assert made.stored("clocks") == [
        row("clocks", 0, 2, LAST, first, timestamp=7),
        row("clocks", 1, 2, LAST | TIME_LOCAL, second, parse=20, publish=20),
    ]
    assert made.emit.rings["clocks"].tickers == ["A", "BÉ", "*"]
    assert made.emit.rings["trades"].tickers == ["A", "BÉ"], "nothing else has it"
    with pytest.raises(FrameError):
        made.emit.clock_offset("request", 1 << 62, 0.0)


def test_an_instrument_is_told_when_something_of_it_is_new(made: Made) -> None:
    def tell(tick_size: float) -> None:
        made.emit.instrument_info(
            "Ä", True, "option", "BTC", "USD", "open", tick_size=tick_size, expiry_time=1_700_000_000_000_000
        )

    tell(0.5)
    tell(0.5)
    tell(0.25)
    made.emit.instrument_gone("Ä")
    made.emit.instrument_gone("Ä")
    texts = b"option".ljust(16, b"\0") + b"BTC".ljust(24, b"\0") + b"USD".ljust(16, b"\0") + b"open".ljust(32, b"\0")
    times, nan, wanted = i8(-1, 1_700_000_000_000_000), float("nan"), []
    for seq, (tick, active) in enumerate(((0.5, b"\1"), (0.25, b"\1"), (0.25, b"\0"))):
        stage, numbers = 10 * (seq + 1), f8(tick, nan, nan)
        wanted.append(
            row("instruments", seq, 2, LAST | TIME_LOCAL, texts, numbers, times, one=active, parse=stage, publish=stage)
        )
    assert made.stored("instruments") == wanted
    assert "Ä" not in made.emit.rings["trades"].tickers, "what is only listed takes no place among what is collected"


def test_an_instrument_is_not_told_again_by_the_next_life(tmp_path: Path) -> None:
    for tick_size in (0.5, 0.5, 0.25):
        one = Made(tmp_path, epoch=1)
        one.emit.instrument_info("A", True, "spot", "B", "Q", "ok", tick_size=tick_size)
        one.emit.instrument_info("B", False, "", "", "", "")
        told = [(int(r["ticker"]), float(r["tick_size"])) for r in one.emit.rings["instruments"].recent_rows(0)]
        one.emit.close()
    assert [tick for code, tick in told if code == 0] == [0.5, 0.25]
    assert len([code for code, _ in told if code == 2]) == 1, "numbers that are not given are equal, too"


@pytest.mark.parametrize(
    ("reason", "what"),
    [
        ("absurd_number", {"tick_size": 0.0}), ("absurd_number", {"qty_step": -1.0}),
        ("absurd_number", {"contract_size": float("inf")}), ("absurd_number", {"listed_time": -2}),
        ("absurd_number", {"expiry_time": 1 << 62}), ("text_too_long", {"kind": "k" * 17}),
        ("text_too_long", {"status": "é" * 17}), ("instrument_refused", {"ticker": "T" * 61}),
    ],
)  # fmt: skip
def test_an_impossible_instrument_is_refused(made: Made, reason: str, what: dict[str, Any]) -> None:
    good: dict[str, Any] = {"ticker": "A", "active": True, "kind": "spot", "base": "B", "quote": "Q", "status": "ok"}
    with pytest.raises(FrameError) as refusal:
        made.emit.instrument_info(**{**good, **what})
    assert refusal.value.reason == reason
    assert not made.stored("instruments")
    made.emit.instrument_info(**good)
    assert len(made.stored("instruments")) == 1


def test_a_replay_is_flagged_in_every_row(tmp_path: Path) -> None:
    one = Made(tmp_path, replayed=True)
    one.emit.trade(one.a, 1, 1, 1.0, 1.0, 1)
    one.emit.trades([(one.a, 1, 1, 1.0, 1.0, 2, b""), (one.a, 1, 1, 1.0, 1.0, 3, b"")])
    one.emit.bbo(one.a, 1, 1.0, 1.0, 2.0, 1.0)
    one.emit.levels(one.a, 1, 0, 0, values((1.0, 1.0), (2.0, 1.0)), [level_code(1, NEW)] * 2, 1)
    one.emit.ticker(one.a, 1)
    one.emit.candle(one.a, 1, b"1m", 1, (1.0,) * 4, 1.0, 1, False)
    one.emit.liquidation(one.a, 1, 1, 1.0, 1.0)
    one.emit.instrument_info("A", True, "spot", "A", "", "")
    one.emit.gap("trades", "A", cause="x")
    one.emit.clock_offset("request", 1, 1.0, 2.0)
    flags = {name: ring.recent_rows(0)["flags"].tolist() for name, ring in one.emit.rings.items()}
    one.emit.close()
    both = [REPLAYED | LAST]
    assert flags == {
        "trades": [*both, REPLAYED, *both], "orderbook_l2": [REPLAYED, *both], "bbo": both, "tickers": both, "candles": both,
        "liquidations": both, "instruments": [REPLAYED | LAST | TIME_LOCAL], "gaps": [REPLAYED | LAST | TIME_LOCAL],
        "clocks": both,
    }  # fmt: skip


def _publications(made: Made, feed: str) -> list[int]:
    """Every value that `published` of this ring is set to from now on."""
    ring, seen = made.emit.rings[feed], []
    real = ring.published

    class Watched:
        def __setitem__(self, at: int, value: int) -> None:
            seen.append(value)
            real[at] = value

        def __getitem__(self, at: int) -> int:
            return real[at]

    ring.published = Watched()  # type: ignore[assignment]
    return seen


# Wrap-around


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 256), st.sampled_from([255, 256, 1])), min_size=1, max_size=25),
    kind=st.booleans(),
)
def test_messages_of_any_size_wrap_around(
    sizes: list[int], kind: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one = Made(tmp_path_factory.mktemp("wrap"))
    expected: list[bytes] = []
    feed = "orderbook_l2" if kind else "trades"
    for message, size in enumerate(sizes):
        one.packet()
        first = len(expected)
        if kind:
            levels = values(*((float(first + i), float(message)) for i in range(size)))
            one.emit.levels(
                one.a, 7, 0, 1, levels, [level_code(1 - 2 * (i % 2), 1 + i % 3) for i in range(size)], message
            )
        else:
            one.emit.trades(
                [(one.a, 7, 1, float(first + i), float(message), first + i, b"%d" % i) for i in range(size)]
            )
        for i in range(size):
            flags, at = LAST if i == size - 1 else 0, first + i
            if kind:
                side = b"\x01" if i % 2 == 0 else b"\xff"
                expected.append(row(feed, at, 0, flags, f8(at, message), i8(message), timestamp=7, parse=1, publish=10,
                                    one=side + bytes([1 + i % 3]), packet=2 + message))  # fmt: skip
            else:
                expected.append(row(feed, at, 0, flags, f8(at, message), i8(at), b"%d" % i, timestamp=7, publish=20, one=b"\1",
                                    packet=2 + message))  # fmt: skip
    assert one.stored(feed) == expected[-512:]
    with RingReader(one.emit.directory, feed) as reader:
        reader.seek("oldest")
        rows = reader.read()
        assert rows["seq_id"].tolist() == list(range(reader.oldest, len(expected)))
        assert rows.tobytes() == b"".join(expected[reader.oldest :])
    one.emit.close()


def test_a_book_larger_than_the_table_of_numbers(tmp_path: Path) -> None:
    one = Made(tmp_path, capacity=1 << 15)
    first = 3
    for size in (first, 12_000, 1, 16_000, 15_000):
        one.emit.levels(one.a, 7, 0, 0, np.arange(2.0 * size).reshape(-1, 2), [level_code(1, NEW)] * size, size)
    rows = one.emit.rings["orderbook_l2"].recent_rows(0)
    one.emit.close()
    total = 3 + 12_000 + 1 + 16_000 + 15_000
    assert rows["seq_id"].tolist() == list(range(total - len(rows), total))
    assert rows["price"][-15_000:].tolist() == [2.0 * i for i in range(15_000)]
    assert rows["qty"][-15_000:].tolist() == [2.0 * i + 1 for i in range(15_000)]
    ends = np.flatnonzero(rows["flags"] & LAST) + total - len(rows) + 1
    assert [e for e in (12_003, 12_004, 28_004, 43_004) if e > total - len(rows)] == ends.tolist()


def test_a_message_that_no_ring_of_this_size_takes_leaves_it_as_it_was(made: Made) -> None:
    made.emit.levels(made.a, 7, 0, 0, values((1.0, 1.0)), [level_code(1, NEW)], 1)
    before = made.stored("orderbook_l2")
    with pytest.raises(RingError, match="capacity of at least"):
        made.emit.levels(made.a, 7, 0, 0, np.ones((300, 2)), [level_code(1, NEW)] * 300, 2)
    assert made.stored("orderbook_l2") == before


# Stage times


@pytest.mark.parametrize(
    ("step", "parse", "publish"),
    [(0, 0, 0), (U32 // 2, U32 // 2, U32 - 1), (U32 // 2 + 1, U32 // 2 + 1, U32), (U32, U32, U32), (U32 + 1, U32, U32),
     (1 << 60, U32, U32)],
)  # fmt: skip
def test_stage_times_saturate(step: int, parse: int, publish: int, made: Made) -> None:
    """Two looks at the clock, `step` ns apart: decoded, visible. One look for a message of a single row."""
    made.clock.step = step
    made.packet()
    made.emit.trades([(made.a, 1, 1, 1.0, 1.0, 2, b"")])
    trades = made.emit.rings["trades"]
    assert trades.recent_rows(0)[["parse_ns", "publish_ns"]].tolist() == [(parse, publish)]
    made.packet()
    made.emit.trade(made.a, 1, 1, 1.0, 1.0, 1)
    made.packet()
    made.emit.trade(made.a, 1, 1, 1.0, 1.0, 1, trade_id=b"x")
    made.packet()
    made.emit.bbo(made.a, 1, 1.0, 1.0, 2.0, 1.0)
    rows = [
        *trades.recent_rows(1)[["parse_ns", "publish_ns"]].tolist(),
        *made.emit.rings["bbo"].recent_rows(0)[["parse_ns", "publish_ns"]].tolist(),
    ]
    assert rows == [(parse, parse)] * 3
    made.packet()
    made.emit.levels(made.a, 1, 0, min(step, 1 << 62), values((1.0, 1.0)), [level_code(1, NEW)], 1)
    made.packet()
    made.emit.ticker(made.a, 1)
    level, ticker = (made.emit.rings[f].recent_rows(0)[0] for f in ("orderbook_l2", "tickers"))
    assert (level["parse_ns"], level["publish_ns"]) == (min(step, U32), min(step, U32))
    assert (ticker["parse_ns"], ticker["publish_ns"]) == (min(step, U32), min(step, U32))


def test_a_feed_reaches_to_its_newest_event_also_where_it_came_seconds_later(made: Made) -> None:
    """Else a hole behind it would not hold what was on its way when the connection ended."""
    assert made.emit.newest_us("bbo") == 0
    for late_us, reaches_us in ((7_000_000, -7_000_000), (-2_000_000, 0), (0, 0)):
        made.packet()
        rcv_us = made.emit.rcv_us
        made.emit.bbo(made.a, rcv_us - late_us, 1.0, 1.0, 2.0, 1.0)
        assert made.emit.newest_us("bbo") == rcv_us + reaches_us
    made.emit.bbo(made.a, 0, 1.0, 1.0, 2.0, 1.0)
    assert made.emit.newest_us("bbo") == made.emit.rcv_us
    for late_us, reaches_us in ((3_000_000, -3_000_000), (-3_000_000, 0)):  # what has no time is as late as the others
        made.emit.trade(made.a, made.emit.rcv_us - late_us, 1, 1.0, 1.0, 1)
        assert made.emit.newest_us("bbo") == made.emit.rcv_us + reaches_us


def test_what_was_fetched_does_not_show_how_far_a_stream_reaches(made: Made) -> None:
    made.emit.trade(made.a, made.emit.rcv_us - 5_000_000, 1, 1.0, 1.0, 1)
    with made.emit.fetching():
        made.emit.trade(made.a, made.emit.rcv_us - 1_000_000, 1, 1.0, 1.0, 3)
        made.emit.trade(made.a, made.emit.rcv_us - 2_000_000, 1, 1.0, 1.0, 2)
    assert made.emit.newest_us("trades") == made.emit.rcv_us - 5_000_000
    made.emit.trade(made.a, made.emit.rcv_us - 500_000, 1, 1.0, 1.0, 4)
    assert made.emit.newest_us("trades") == made.emit.rcv_us - 500_000


@pytest.mark.parametrize("flags", [0, LAST, REPAIRED, LAST | REPAIRED, LAST | INVALID])
@pytest.mark.parametrize("side", [1, -1, 0])
def test_flags_stand_where_they_belong_beside_venue_and_side(made: Made, side: int, flags: int) -> None:
    made.emit.trade(made.a, 1, side, 1.0, 1.0, 1, flags)
    made.emit.bbo(made.b, 1, 1.0, 1.0, 2.0, 1.0, 1, flags)
    trade, bbo = (made.emit.rings[feed].recent_rows(0)[0] for feed in ("trades", "bbo"))
    assert trade[["ticker", "exchange", "side"]].tolist() == (made.a.codes["trades"], Exchange.DERIBIT, side)
    assert bbo[["ticker", "exchange"]].tolist() == (made.b.codes["bbo"], Exchange.DERIBIT)
    assert trade["flags"] == bbo["flags"] == flags | LAST


def test_latency_is_counted_for_live_rows_only(made: Made) -> None:
    made.emit.trade(made.a, 1, 1, 1.0, 1.0, 1)
    made.emit.trades([(made.a, 1, 1, 1.0, 1.0, 2, b"")], REPAIRED)
    made.emit.levels(made.a, 1, SNAPSHOT, 0, values((1.0, 1.0)), [level_code(1, NEW)], 1)
    made.emit.gap("trades", "A", cause="x")
    assert made.emit.last_row_ns("trades", "A") == 0
    made.emit.tick()
    made.emit.tick()
    assert made.emit.snapshot()["parse_ns"]["count"] == 1
    assert made.emit.last_row_ns("trades", "A") > 0
    assert (
        made.emit.last_row_ns("trades", "BÉ")
        == made.emit.last_row_ns("bbo", "A")
        == made.emit.last_row_ns("trades", "?")
        == 0
    )
    rings = made.emit.rings
    assert all(ring.sealed == ring.next for ring in rings.values())
    assert made.emit.snapshot()["rings"]["trades"]["published"] == 2


def test_a_burst_is_sealed_before_it_could_be_overwritten(tmp_path: Path) -> None:
    one = Made(tmp_path, capacity=4096)
    for i in range(3000):
        one.emit.trade(one.a, 1, 1, 1.0, 1.0, i)
        one.emit.end_packet()
        assert one.emit.rings["trades"].next - one.emit.rings["trades"].sealed < 1024
    one.emit.close()


# Impossible numbers


INF, NAN = float("inf"), float("nan")
GOOD_TIME, END = 1, 4_102_444_800_000_000
IMPOSSIBLE: dict[str, Any] = {
    "trade price": lambda e, a, x: e.trade(a, 1, 1, x, 1.0, 1), "trade qty": lambda e, a, x: e.trade(a, 1, 1, 1.0, x, 1),
    "trades price": lambda e, a, x: e.trades([(a, 1, 1, 1.0, 1.0, 1, b""), (a, 1, 1, x, 1.0, 2, b"")]),
    "trades qty": lambda e, a, x: e.trades([(a, 1, 1, 1.0, x, 1, b"")]),
    "bbo bid": lambda e, a, x: e.bbo(a, 1, x, 1.0, 2.0, 1.0), "bbo ask": lambda e, a, x: e.bbo(a, 1, 1.0, 1.0, x, 1.0),
    "bbo bid qty": lambda e, a, x: e.bbo(a, 1, 1.0, x, 2.0, 1.0), "bbo ask qty": lambda e, a, x: e.bbo(a, 1, 1.0, 1.0, 2.0, x),
    "ticker": lambda e, a, x: e.ticker(a, 1, mark_price=x), "candle": lambda e, a, x: e.candle(a, 1, b"1m", 1, (1, 1, x, 1), 1.0, 1, True),
    "liquidation price": lambda e, a, x: e.liquidation(a, 1, 1, x, 1.0), "liquidation qty": lambda e, a, x: e.liquidation(a, 1, 1, 1.0, x),
}  # fmt: skip


# NaN is how a ticker says that a value was not given.
CASES = [(w, x) for w in IMPOSSIBLE for x in (INF, -INF, NAN, 1e18, -1e18, 1e308) if (w, x) != ("ticker", NAN)]


@pytest.mark.parametrize(("where", "number"), CASES)
def test_an_impossible_number_makes_no_row(where: str, number: float, made: Made) -> None:
    with pytest.raises(FrameError) as refused:
        IMPOSSIBLE[where](made.emit, made.a, number)
    assert refused.value.reason == "absurd_number"
    assert not any(ring.next for ring in made.emit.rings.values())


@pytest.mark.parametrize("time", [-1, 0, END, 1 << 62])
def test_an_impossible_time_makes_no_row(time: int, made: Made) -> None:
    emit, a = made.emit, made.a
    calls = [lambda: emit.trade(a, time, 1, 1.0, 1.0, 1), lambda: emit.trades([(a, time, 1, 1.0, 1.0, 1, b"")]),
             lambda: emit.liquidation(a, time, 1, 1.0, 1.0), lambda: emit.candle(a, 1, b"1m", time, (1.0,) * 4, 1.0, 1, True)]  # fmt: skip
    if time:  # of these feeds the venue may have given none
        calls += [lambda: emit.bbo(a, time, 1.0, 1.0, 2.0, 1.0), lambda: emit.ticker(a, time),
                  lambda: emit.candle(a, time, b"1m", 1, (1.0,) * 4, 1.0, 1, True)]  # fmt: skip
    for call in calls:
        with pytest.raises(FrameError):
            call()
    for options in ({"next_funding_time": -2}, {"next_funding_time": END}):
        with pytest.raises(FrameError):
            emit.ticker(a, 1, **options)
    for trades, volume in ((-2, 1.0), (1 << 62, 1.0), (1, -1.0), (1, INF)):
        with pytest.raises(FrameError):
            emit.candle(a, 1, b"1m", 1, (1.0,) * 4, volume, trades, True)
    for refused in (lambda: emit.candle(a, 1, b"123456789", 1, (1.0,) * 4, 1.0, 1, True),
                    lambda: emit.trades([(a, 1, 1, 1.0, 1.0, 1, b"x" * 57)]), lambda: emit.trade(a, 1, 1, 1.0, 1.0, 1, 1, b"x" * 57),
                    lambda: emit.trades([(a, 1, 1, 1.0, 1.0, 1, b"")] * (emit_module.TRADES_MAX + 1))):  # fmt: skip
        with pytest.raises(FrameError):
            refused()
    assert not any(ring.next for ring in emit.rings.values())


@pytest.mark.parametrize("number", [0.0, -0.0, 5e-324, 999_999_999_999_999.9, -999_999_999_999_999.9])
def test_what_is_merely_extreme_is_kept_bit_by_bit(number: float, made: Made) -> None:
    made.emit.trade(made.a, END - 1, 0, number, abs(number), 0)
    made.emit.bbo(made.a, END - 1, number, abs(number), number, abs(number))
    assert made.stored("trades")[0][40:56] == f8(number, abs(number))
    assert made.stored("bbo")[0][40:72] == f8(number, abs(number), number, abs(number))


# Instruments, feeds, reasons, restart


def test_instruments_have_a_code_in_every_ring(made: Made) -> None:
    assert made.emit.instrument("A") is made.a
    assert set(made.a.codes) == set(SIZES)
    assert made.a.codes == dict.fromkeys(SIZES, 0)
    assert made.b.codes == dict.fromkeys(SIZES, 1)
    for name in ("", "x" * 61, "É" * 31):
        with pytest.raises(FrameError) as refused:
            made.emit.instrument(name)
        assert refused.value.reason == "instrument_refused"
    assert made.emit.instrument("É" * 30).codes["gaps"] == 2


def test_feeds_that_are_not_configured_are_checked_and_left_out(tmp_path: Path) -> None:
    one = Made(tmp_path, feeds=("bbo",))
    one.emit.trade(one.a, 1, 1, 1.0, 1.0, 1)
    one.emit.trades([(one.a, 1, 1, 1.0, 1.0, 1, b"")])
    one.emit.levels(one.a, 1, 0, 0, values((1.0, 1.0)), [level_code(1, NEW)], 1)
    one.emit.ticker(one.a, 1)
    one.emit.candle(one.a, 1, b"1m", 1, (1.0,) * 4, 1.0, 1, False)
    one.emit.liquidation(one.a, 1, 1, 1.0, 1.0)
    with pytest.raises(FrameError):
        one.emit.trade(one.a, 1, 1, NAN, 1.0, 1)
    one.emit.bbo(one.a, 1, 1.0, 1.0, 2.0, 1.0)
    assert {name: ring.next for name, ring in one.emit.rings.items()} == {
        "bbo": 1,
        "instruments": 0,
        "gaps": 0,
        "clocks": 0,
    }
    one.emit.close()


def test_refusals_are_counted_by_reason_with_one_bounded_sample(made: Made) -> None:
    emit = made.emit
    emit.refused("a", b"first \xff", "why")
    emit.refused("a", b"second")
    emit.refused_error(FrameError("b", "x" * 10_000), b"y" * 10_000)
    emit.refused_error(msgspec.ValidationError("wrong"), b"{}")
    emit.refused_error(msgspec.DecodeError("broken"), b"{")
    emit.refused_error(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), b"\xff")
    assert emit.counters == {"refused_a": 2, "refused_b": 1, "refused_wrong_type": 1, "refused_malformed": 2}
    assert emit.samples["refused_a"] == "why | first \\xff"
    assert emit.samples["refused_b"] == "x" * 512 + " | " + "y" * 512
    for i in range(2 * emit_module.REASONS_MAX):
        emit.refused(f"r{i}", b"")
    assert len(emit.samples) == emit_module.REASONS_MAX + 1
    assert emit.counters["refused_other"] == 2 * emit_module.REASONS_MAX - (emit_module.REASONS_MAX - 4)
    emit.refused("a", b"")
    assert emit.counters["refused_a"] == 3


def test_a_restart_continues_rows_packets_and_instruments(tmp_path: Path) -> None:
    one = Made(tmp_path, epoch=5)
    for i in range(600):  # the ring of 512 is lapped
        one.packet()
        one.emit.trade(one.b, 1, 1, 1.0, 1.0, i)
    one.emit.bbo(one.a, 1, 1.0, 1.0, 2.0, 1.0)
    one.packet()
    one.emit.gap("trades", "A", cause="x")  # the newest packet of all left its row here
    newest = one.emit.packet_id
    one.emit.close()
    two = Emit(
        tmp_path,
        "c",
        Exchange.DERIBIT,
        ALL,
        capacities=dict.fromkeys((*ALL, *ALWAYS_ON), 512),
        semaphore=False,
        epoch=6,
    )
    assert two.packet_id == newest + 1
    assert two.instrument("BÉ").codes == dict.fromkeys(SIZES, 1)
    two.packet(NOW_NS, two.clock())
    two.trade(two.instrument("C"), 1, 1, 1.0, 1.0, 600)
    rows = two.rings["trades"].recent_rows(599)
    assert rows["seq_id"].tolist() == [599, 600]
    assert rows["packet_id"].tolist() == [newest - 1, newest + 2]
    assert rows["ticker"].tolist() == [1, 2]
    with RingReader(two.directory, "trades") as reader:
        assert [(epoch, first) for epoch, first, _ in reader.epochs] == [(5, 0), (6, 600)]
    two.close()


def test_a_second_emitter_is_refused_and_leaves_nothing_open(made: Made, tmp_path: Path) -> None:
    with pytest.raises(RingError):
        Emit(tmp_path, "c", Exchange.DERIBIT, ALL, capacities=dict.fromkeys((*ALL, *ALWAYS_ON), 512), semaphore=False)
    made.emit.trade(made.a, 1, 1, 1.0, 1.0, 1)
    assert made.emit.rings["trades"].next == 1


def sibling(folder: Path, name: str, trades: list[tuple[str, int, int]], exchange: Exchange = Exchange.DERIBIT) -> Path:
    """Rings of another connection: instrument, receive time in us, trade counter."""
    emit = Emit(folder, name, exchange, ["trades"], capacities={"trades": 512}, semaphore=False)
    for ticker, rcv_us, seq in trades:
        emit.packet(rcv_us * 1000, 0)
        emit.trade(emit.instrument(ticker), rcv_us, 1, 1.0, 1.0, seq)
    emit.close()
    return emit.directory


def taken_over(folder: Path, siblings: list[Path], *wanted: str) -> dict[str, list[int]]:
    """Counters by instrument that a connection takes over; its own last trades are A 7 at 500 and B 7 at 500."""
    sibling(folder, "mine", [("A", 500, 7), ("B", 500, 7)])
    emit = Emit(
        folder, "mine", Exchange.DERIBIT, ["trades"], capacities={"trades": 512}, semaphore=False, siblings=siblings
    )
    found: dict[str, list[int]] = {}
    for tickers, (codes, counters) in emit.taken_over(wanted, "trades", "trade_seq"):
        for code, counter in zip(codes, counters, strict=True):
            found.setdefault(tickers[code], []).append(int(counter))
    emit.close()
    return found


def test_instruments_are_taken_over_from_the_sibling_that_has_their_newest_row(tmp_path: Path) -> None:
    one = sibling(tmp_path, "one", [("A", 100, 1), ("B", 600, 8), ("C", 100, 3), ("D", 900, 1)])
    two = sibling(tmp_path, "two", [("C", 200, 4), ("C", 300, 5), ("A", 400, 6)])
    assert taken_over(tmp_path, [one, two], "A", "B", "C") == {"B": [8], "C": [4, 5]}


def test_of_siblings_that_cannot_be_read_or_are_of_another_venue_nothing_is_taken(tmp_path: Path) -> None:
    broken = sibling(tmp_path, "broken", [("B", 900, 9)])
    (broken / "trades.meta").write_bytes(b"no ring")
    other = sibling(tmp_path, "other", [("B", 900, 9)], Exchange.OKX)
    assert taken_over(tmp_path, [broken, other, tmp_path / "none"], "A", "B") == {}
    emit = Emit(
        tmp_path, "t", Exchange.DERIBIT, ["trades"], capacities={"trades": 512}, semaphore=False,
        siblings=[broken, other, tmp_path / "none"],
    )  # fmt: skip
    assert list(emit.taken_over({"B"}, "trades", "trade_seq")) == []
    assert emit.counters["sibling_unreadable"] == 1
    assert "too short for a ring" in emit.samples["sibling_unreadable"]
    emit.close()
    assert taken_over(tmp_path, [sibling(tmp_path, "good", [("B", 900, 9)])], "B") == {"B": [9]}


def test_of_a_sibling_that_is_live_what_it_has_now_is_taken(tmp_path: Path) -> None:
    live = Emit(tmp_path, "live", Exchange.DERIBIT, ["trades"], capacities={"trades": 512}, semaphore=False)
    for n in range(1000):  # its ring has gone round
        live.packet((1000 + n) * 1000, 0)
        live.trade(live.instrument("B"), 1000 + n, 1, 1.0, 1.0, n)
    assert taken_over(tmp_path, [live.directory], "B")["B"][-1] == 999
    live.close()
