"""Decoders against frames that no venue should send: seeded mutations of real ones, impossible numbers, floods.

Whatever comes, `decode` raises nothing but the three errors that mean "this frame is unusable", every refused frame is
counted with one sample, no impossible number reaches a ring, and what follows is not lost.
"""

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from recorded import DATA, entries, needs_data

from mdcollector import continuity
from mdcollector import emit as emit_module
from mdcollector.emit import Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import Fetch, Options, Stream, Venue, venue_class
from mdcollector.records import Flag

UNUSABLE = (FrameError, msgspec.DecodeError, UnicodeDecodeError)
NOW_NS = 1_796_083_200_000_000_000
MS = NOW_NS // 1_000_000
SMALL = {
    "trades": 1 << 15,
    "orderbook_l2": 1 << 18,
    "bbo": 1 << 15,
    "tickers": 1 << 12,
    "candles": 1 << 12,
    "gaps": 1 << 12,
}
INVALID = int(Flag.BOOK_INVALID)


class Probe:
    """A venue over small rings, and the way in that connector and normalize use."""

    def __init__(self, venue: str, folder: Path, tickers: tuple[str, ...] = ()) -> None:
        kind = venue_class(venue)
        self.emit = Emit(folder, "t", kind.EXCHANGE, kind.FEEDS, capacities=SMALL, semaphore=False)
        streams: list[Stream] = [s for t in tickers for s in kind.streams_of(t, kind.FEEDS, Options())]
        self.venue: Venue = kind(self.emit, Options(), streams, open_world=not tickers)
        self.refused = 0
        self.now_ns = NOW_NS
        self.emit.packet(NOW_NS, self.emit.clock())

    def feed(self, frame: bytes | dict[str, Any]) -> bool:
        """Whether the frame was taken."""
        raw = frame if isinstance(frame, bytes) else json.dumps(frame, separators=(",", ":")).encode()
        self.now_ns += 1_000_000
        self.emit.packet(self.now_ns, self.emit.clock())
        try:
            self.venue.decode(raw)
        except UNUSABLE as error:
            self.emit.refused_error(error, raw)
            self.refused += 1
            return False
        finally:
            self.emit.end_packet()
        return True

    def rows(self, feed: str) -> np.ndarray[Any, Any]:
        return self.emit.rings[feed].recent_rows(0)

    def trades(self, ticker: str) -> list[int]:
        rows = self.rows("trades")
        mine = rows["ticker"] == self.emit.instrument(ticker).trades
        return rows["trade_seq"][mine].tolist()

    def gaps(self) -> list[tuple[str, int, int, str, bool]]:
        rows = self.rows("gaps")
        names = ("feed", "first_id", "last_id", "cause", "repaired")
        return [
            (f.decode(), a, b, c.decode(), bool(r))
            for f, a, b, c, r in zip(*(rows[n].tolist() for n in names), strict=True)
        ]

    def same_books(self) -> None:
        """Who rebuilds the books from the rows has what the live books have."""
        ring = self.emit.rings["orderbook_l2"]
        rows = ring.recent_rows(0)
        for ticker, live in self.venue.books.items():
            mine = rows[rows["ticker"] == self.emit.instrument(ticker).orderbook_l2]
            books: dict[int, dict[float, float]] = {1: {}, -1: {}}
            inside = False
            names = ("side", "action", "price", "qty", "flags")
            for side, action, price, qty, flags in zip(*(mine[n].tolist() for n in names), strict=True):
                if flags & int(Flag.SNAPSHOT) and not inside:
                    books = {1: {}, -1: {}}
                inside = bool(flags & int(Flag.SNAPSHOT)) and not flags & int(Flag.LAST)
                assert (action == 3) == (qty == 0)
                if side and qty:
                    books[side][price] = qty
                elif side:
                    books[side].pop(price, None)
            if live.state == continuity.LIVE:
                assert (books[1], books[-1]) == live.book(), ticker

    def sane(self) -> None:
        """Nothing impossible is in any ring, and everything refused was counted and sampled."""
        bounds = {"price": 1e15, "qty": 1e18}
        for name, ring in self.emit.rings.items():
            rows = ring.recent_rows(0)
            assert np.array_equal(rows["seq_id"], np.arange(ring.next - len(rows), ring.next))
            assert ((rows["timestamp"] > 0) & (rows["timestamp"] < 4_102_444_800_000_000)).all(), name
            for column in ("price", "qty"):
                if column in rows.dtype.names:
                    assert (np.abs(rows[column]) < bounds[column]).all(), (name, column)
            if "qty" in rows.dtype.names:
                assert (rows["qty"] >= 0).all(), name
            for column in (c for c in ("open", "high", "low", "close") if name == "candles"):
                assert (np.abs(rows[column]) < 1e15).all()
            if name == "candles":
                assert not np.isinf(rows["volume"]).any()
            if name == "tickers":
                numbers = np.array([rows[c.name] for c in ring.feed.words if c.ring == "f8"])
                assert (np.isnan(numbers) | (np.abs(numbers) < 1e18)).all()
            if name == "bbo":
                for side in ("bid", "ask"):
                    prices, qty = rows[f"{side}_price"], rows[f"{side}_qty"]
                    assert ((np.abs(prices) < 1e15) | (np.isnan(prices) & (qty == 0))).all()
                    assert ((qty >= 0) & (qty < 1e18)).all()
            for column in ("trade_seq", "update_id"):
                if column in rows.dtype.names:
                    assert (rows[column] >= -1).all()
        self.same_books()
        counted = {name: count for name, count in self.emit.counters.items() if name.startswith("refused_")}
        assert sum(counted.values()) == self.refused
        assert set(counted) == {name for name in self.emit.samples if name.startswith("refused_")}
        json.dumps(self.emit.snapshot()["samples"])  # the page of numbers takes them


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Any]:
    made: list[Probe] = []

    def make(venue: str, *tickers: str) -> Probe:
        made.append(Probe(venue, tmp_path / str(len(made)), tickers))
        return made[-1]

    yield make
    for one in made:
        one.emit.close()


def binance(stream: str, **data: Any) -> dict[str, Any]:
    return {"stream": stream, "data": data}


def b_trade(seq: int, *, ticker: str = "AB", time_ms: int = MS, **changed: Any) -> dict[str, Any]:
    data = {
        "e": "trade",
        "E": time_ms,
        "s": ticker,
        "t": seq,
        "p": "10.5",
        "q": "2",
        "T": time_ms,
        "m": True,
        "M": True,
    }
    return binance(f"{ticker.lower()}@trade", **{**data, **changed})


def b_depth(
    first: int, last: int, bids: Any = (), asks: Any = (), *, ticker: str = "AB", time_ms: int = MS
) -> dict[str, Any]:
    data = {"e": "depthUpdate", "E": time_ms, "s": ticker, "U": first, "u": last, "b": bids, "a": asks}
    return binance(f"{ticker.lower()}@depth@100ms", **data, pu=first - 1, T=time_ms)  # the last two are of futures


def b_snapshot(one: Probe, last: int, bids: Any, asks: Any, ticker: str = "AB") -> None:
    body = json.dumps({"lastUpdateId": last, "bids": bids, "asks": asks}).encode()
    one.venue.http(f"https://x/api/v3/depth?symbol={ticker}&limit=1000", body)


def deribit(channel: str, data: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": "subscription", "params": {"channel": channel, "data": data}}


def d_trade(*seqs: int, ticker: str = "BTC-PERPETUAL", time_ms: int = MS, **changed: Any) -> dict[str, Any]:
    trades = [{"trade_seq": seq, "trade_id": f"T{seq}", "timestamp": time_ms, "price": 8950.0, "amount": 10.0,
               "direction": "sell", "instrument_name": ticker, **changed} for seq in seqs]  # fmt: skip
    return deribit(f"trades.{ticker}.100ms", trades)


def d_book(change: int, previous: int | None, bids: Any = (), asks: Any = (), *, ticker: str = "BTC-PERPETUAL",
           time_ms: int = MS) -> dict[str, Any]:  # fmt: skip
    data = {"timestamp": time_ms, "type": "snapshot" if previous is None else "change", "instrument_name": ticker,
            "change_id": change, "bids": bids, "asks": asks}  # fmt: skip
    if previous is not None:
        data["prev_change_id"] = previous
    return deribit(f"book.{ticker}.100ms", data)


def o_trade(seq: int, *, ticker: str = "BTC-USDT") -> dict[str, Any]:
    data = {"instId": ticker, "tradeId": str(seq), "px": "10.5", "sz": "2", "side": "buy", "ts": str(MS)}
    return {"arg": {"channel": "trades-all", "instId": ticker}, "data": [data]}


def o_book(seq: int, previous: int, bids: Any = (), asks: Any = (), *, ticker: str = "BTC-USDT") -> dict[str, Any]:
    data = {"asks": asks, "bids": bids, "ts": str(MS), "checksum": 0, "seqId": seq, "prevSeqId": previous}
    action = "snapshot" if previous < 0 else "update"
    return {"arg": {"channel": "books", "instId": ticker}, "action": action, "data": [data]}


# Mutations of real frames

NUMBERS = [
    "NaN", "Infinity", "-Infinity", "-1", "-0", "0", "-1e15", "1e15", "1e18", "-1e300", "1e300", "1e999", "-1e999",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616", "1" * 400, "1e-400",
    "0.1e1", "01", "1.", "true", "null", "{}", "[]", '""', '"nan"', '"inf"', '"-inf"', '"1e999"', '"-1"', '"-0"',
    '"1e300"', '" 1"', '"0x10"', '"1_0"', '"\\ud800"', '"\\u0000"', '"x"', "[1]", "[[1,2,3]]", '[["1","2"],["1"]]',
    '[["1","2","3","4"]]', '[["nan","1"]]', '[["1","inf"]]', '[["1","-1"]]', '[["new",1e300,1],["new",-1e300,1]]',
    '[["new",1,1e18]]', '[["delete",null,0]]', '[["",1,1]]', "4611686018427387904", "4611686018427387905", "4102444800001",
    "99999999999999",
]  # fmt: skip


def _spans(raw: str) -> list[tuple[int, int]]:
    """Places of all values in a JSON text, found with the plain decoder."""
    spans, decoder = [], json.JSONDecoder()
    for i, c in enumerate(raw):
        if c in ":,[":
            try:
                _, end = decoder.raw_decode(raw, i + 1)
            except ValueError:
                continue
            spans.append((i + 1, end))
    return spans


def mutated(raw: str, rng: random.Random) -> bytes:
    """The frame with one or two things broken."""
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.randrange(9)
        spans = _spans(raw)
        if kind <= 3 and spans:  # a value of another kind
            a, b = rng.choice(spans)
            raw = raw[:a] + rng.choice(NUMBERS) + raw[b:]
        elif kind == 4:  # a field is gone, or comes twice
            try:
                value = json.loads(raw)
            except ValueError:
                continue
            inner = value.get("data", value.get("params", value)) if isinstance(value, dict) else value
            inner = inner if isinstance(inner, dict) and inner else {"x": 1}
            key = rng.choice(list(inner))
            if rng.random() < 0.5:
                del inner[key]
                raw = json.dumps(value, separators=(",", ":"))
            else:
                raw = raw.replace(f'"{key}":', f'"{key}":{rng.choice(NUMBERS)},"{key}":', 1)
        elif kind == 5:
            raw = raw[: rng.randrange(len(raw))] if raw else raw
        elif kind == 6:
            names = [
                "trade",
                "depth@100ms",
                "bookTicker",
                "ticker",
                "kline_1m",
                "chart",
                "",
                "@",
                ".",
                "\\u0000",
                "é" * 40,
            ]
            at = raw.find("@") if "@" in raw else raw.find('channel":"') + 9
            raw = (
                raw[: at + 1] + rng.choice(names) + raw[rng.randrange(at + 1, len(raw)) if at + 1 < len(raw) else at :]
            )
        else:  # bytes flipped, put in or taken out
            bent = bytearray(raw.encode())
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(len(bent)) if bent else 0
                what = rng.randrange(3)
                if what == 0 and bent:
                    bent[at] ^= 1 << rng.randrange(8)
                elif what == 1:
                    bent[at:at] = bytes([rng.randrange(256)])
                elif bent:
                    del bent[at]
            return bytes(bent)
    return raw.encode()


def seeds(venue: str) -> list[str]:
    """Real frames of every kind of stream of a venue."""
    frames = [path.read_text() for path in sorted((DATA / venue / "samples").glob("*.json"))]
    frames = [json.dumps(json.loads(f), separators=(",", ":")) for f in frames]
    names = {"binance_spot": "multi_20211012", "binance_futures": "multi_20210722", "deribit": "options_20210722",
             "okx": "multi_20220513"}  # fmt: skip
    name = names[venue]
    recorded = [line["raw"] for line in entries(DATA / venue / "recorded" / f"{name}.jsonl.zst") if line["dir"] == "in"]
    return frames + recorded[:150]


@needs_data
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("venue", ["binance_spot", "binance_futures", "deribit", "okx"])
def test_mutated_frames(venue: str, seed: int, probe: Any) -> None:
    rng, frames = random.Random(seed), seeds(venue)
    one: Probe = probe(venue)
    calm, truth = "CALMUSDT", {}
    if venue == "deribit":
        assert one.feed(d_book(0, None, ticker=calm))
    elif venue == "okx":
        assert one.feed(o_book(0, -1, ticker=calm))
    else:
        b_snapshot(one, 0, [], [], ticker=calm)
    for i in range(1, 4001):
        one.feed(mutated(rng.choice(frames), rng))
        if i % 10:
            continue
        # An instrument whose own frames are whole: it must not feel what happens to the others.
        n, price, qty = i // 10, rng.randrange(1, 9), rng.randrange(0, 4)
        truth[float(price)] = float(qty)
        if venue == "deribit":
            assert one.feed(d_trade(n, ticker=calm))
            assert one.feed(d_book(n, n - 1, [["change" if qty else "delete", price, qty]], ticker=calm))
        elif venue == "okx":
            assert one.feed(o_trade(n, ticker=calm))
            assert one.feed(o_book(n, n - 1, [[str(price), str(qty), "0", "1"]], ticker=calm))
        else:
            assert one.feed(b_trade(n, ticker=calm))
            assert one.feed(b_depth(n, n, [[str(price), str(qty)]], ticker=calm))
        one.venue.wants.clear()
    for _ in one.venue.finish():
        pass
    assert one.refused > 1000, "the mutations do not bite"
    assert sum(ring.next for ring in one.emit.rings.values()) > 1100, "nothing at all gets through"
    assert one.trades(calm) == list(range(1, 401))
    assert one.venue.books[calm].book() == ({price: qty for price, qty in truth.items() if qty}, {})
    one.sane()


@needs_data
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("venue", "url"),
    [
        ("binance_spot", "https://x/api/v3/depth?symbol=AB&limit=10"),
        ("binance_spot", "https://x/api/v3/historicalTrades?symbol=AB&fromId=28457&limit=10"),
        ("binance_futures", "https://x/fapi/v1/depth?symbol=AB&limit=10"),
        ("binance_futures", "https://x/fapi/v1/trades?symbol=AB&limit=10"),
        ("binance_futures", "https://x/fapi/v1/openInterest?symbol=AB"),
        ("deribit", "https://x/api/v2/public/get_last_trades_by_instrument?instrument_name=A&start_seq=1"),
        ("okx", "https://x/api/v5/market/history-trades?instId=BTC-USDT&type=1&after=734864431&limit=100"),
    ],
)
def test_mutated_bodies(venue: str, url: str, seed: int, probe: Any) -> None:
    names = {"depth": ["depth_snapshot.json", "depth_snapshot_01.json"], "historicalTrades": ["trades_01.json"],
             "get_last_trades_by_instrument": ["last_trades.json"], "history-trades": ["trades.json"],
             "trades": ["trades.json"],
             "openInterest": ["open_interest.json"]}  # fmt: skip
    paths = [DATA / venue / "rest" / name for name in names[url.partition("?")[0].rpartition("/")[2]]]
    body = next(path for path in paths if path.exists()).read_text()
    body, rng = json.dumps(json.loads(body), separators=(",", ":")), random.Random(seed)
    one: Probe = probe(venue)
    for _ in range(1500):
        raw = mutated(body, rng)
        one.emit.packet(one.now_ns, one.emit.clock())
        try:
            one.venue.http(url, raw)
        except UNUSABLE as error:
            one.emit.refused_error(error, raw)
            one.refused += 1
        one.venue.wants.clear()
        for book in one.venue.books.values():
            book.state = continuity.WAITING  # or the first one that is taken ends the test
        kind = venue_class(venue)
        try:
            kind.instruments(raw)
        except UNUSABLE:
            continue
    assert one.refused > 300
    one.sane()


# Frames of awkward shape

DEEP = 200_000
SHAPES: dict[str, bytes] = {
    "empty": b"", "blank": b"   ", "null": b"null", "number": b"1", "text": b'"x"', "array": b"[]", "object": b"{}",
    "nested objects": b'{"stream":"ab@trade","data":' + b'{"x":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "nested arrays": b'{"jsonrpc":"2.0","method":"subscription","params":{"channel":"book.A.raw","data":' + b"[" * DEEP,
    "nested on the routed way": b'{"stream":"ab@trade","data":{"x":' + b"[" * DEEP + b"]" * DEEP + b"}}",
    "nested in a reply": b'{"id":1,"result":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "invalid utf-8": b'{"stream":"ab@trade","data":{"e":"\xff\xfe"}}',
    "invalid utf-8 name": b'{"stream":"\xc3\x28@trade","data":{}}',
    "invalid utf-8 channel": b'{"jsonrpc":"2.0","method":"subscription","params":{"channel":"quote.\xff","data":{}}}',
    "lone surrogate": b'{"stream":"\\udc80@bookTicker","data":{"u":1,"b":"1","B":"1","a":"2","A":"1"}}',
    "zero byte": b'{"stream":"ab\x00@trade","data":{}}',
    "two values": b'{"stream":"ab@trade","data":{}}{"stream":"ab@trade","data":{}}',
    "long name": b'{"stream":"' + b"x" * 10_000 + b'@trade","data":{"t":1,"p":"1","q":"1","T":1,"m":true}}',
    "no name": b'{"stream":"@trade","data":{"t":1,"p":"1","q":"1","T":1,"m":true}}',
    "no quote": b'{"stream":"' + b"x" * 100,
    "bom": b"\xef\xbb\xbf{}",
    "binary": bytes(range(256)) * 20,
    "5 MB of noise": bytes(random.Random(1).randbytes(5 << 20)),
    "5 MB of blanks": b" " * (5 << 20),
    "5 MB text": b'{"stream":"ab@trade","data":"' + b"x" * (5 << 20) + b'"}',
}  # fmt: skip


@pytest.mark.parametrize(
    ("rate", "next_ms"), [("", 0), (None, 0), ("0.00010000", 0), ("", MS + 1), ("-0.0001", MS + 1)]
)
def test_a_mark_price_without_a_funding_rate_is_a_row(rate: str | None, next_ms: int, probe: Any) -> None:
    """Futures with delivery have none, which the venue writes as an empty text."""
    one = probe("binance_futures", "ABUSD_261225")
    data = {
        "e": "markPriceUpdate",
        "E": MS,
        "s": "ABUSD_261225",
        "p": "10.5",
        "P": "10.6",
        "i": "10.4",
        "r": rate,
        "T": next_ms,
    }
    assert one.feed(binance("abusd_261225@markPrice@1s", **data))
    (row,) = one.rows("tickers")
    assert (row["mark_price"], row["index_price"], row["timestamp"]) == (10.5, 10.4, MS * 1000)
    expected = float(rate) if rate and next_ms else float("nan")
    np.testing.assert_equal(row["funding_rate"], expected)
    assert row["next_funding_time"] == (next_ms * 1000 or -1)


@pytest.mark.parametrize("venue", ["binance_spot", "binance_futures", "deribit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_awkward_shapes_are_refused(venue: str, shape: str, probe: Any) -> None:
    one: Probe = probe(venue, "BTC-PERPETUAL" if venue == "deribit" else "AB")
    good = d_trade(1) if venue == "deribit" else b_trade(1)
    assert one.feed(good)
    assert not one.feed(SHAPES[shape])
    (reason,) = [name for name in one.emit.counters if name.startswith("refused_")]
    assert len(one.emit.samples[reason]) <= 2 * 4 * emit_module.SAMPLE_BYTES_MAX + 3
    assert one.feed(d_trade(2) if venue == "deribit" else b_trade(2))
    assert one.trades("BTC-PERPETUAL" if venue == "deribit" else "AB") == [1, 2]
    one.sane()


def test_a_frame_of_5_mb_is_taken_when_it_is_a_book(probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    bids = [[f"{i}.00000000", "1.00000000"] for i in range(1, 90_000)]
    frame = json.dumps(b_depth(1, 2, bids, [["100000", "1"]]), separators=(",", ":")).encode()
    assert len(frame) > 2 << 20
    assert one.feed(frame)
    b_snapshot(one, 1, [["0.5", "1"]], [["100000", "2"]])
    bids_now, asks_now = one.venue.books["AB"].book()
    assert len(bids_now) == 90_000
    assert asks_now == {100_000.0: 1.0}
    assert one.emit.rings["orderbook_l2"].next == 2 + 90_000


@pytest.mark.parametrize("venue", ["binance_spot", "deribit"])
def test_a_message_larger_than_any_book_is_refused(venue: str, probe: Any) -> None:
    """More rows than a ring takes at once would end the process; so many levels are no book."""
    one: Probe = probe(venue)
    levels: list[list[Any]] = [["1", "1"]] * 110_000 if venue == "binance_spot" else [["new", 1, 1]] * 110_000
    big = b_depth(5, 6, levels) if venue == "binance_spot" else d_book(6, 5, levels)
    assert not one.feed(big)
    assert one.emit.counters["refused_too_many_levels"] == 1
    if venue == "deribit":
        assert not one.feed(d_trade(*range(1, 10_002)))
        assert one.emit.counters["refused_too_many_trades"] == 1
        assert one.feed(d_trade(*range(1, 10_001)))
    one.sane()


# Numbers that cannot be


@pytest.mark.parametrize("changed", [{"p": "1e15"}, {"p": "-1e15"}, {"p": "inf"}, {"p": "nan"}, {"q": "-0.1"}, {"q": "nan"},
                                     {"q": "1e18"}, {"T": 0}, {"T": 4_102_444_800_000}, {"T": 4_102_444_800_000_000}, {"t": -1},
                                     {"t": 1 << 63}, {"m": None}, {"p": None}])  # fmt: skip
def test_a_refused_trade_is_a_hole_that_wants_a_repair(changed: dict[str, Any], probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    assert one.feed(b_trade(100))
    assert not one.feed(b_trade(101, **changed))
    assert one.feed(b_trade(102))
    assert one.trades("AB") == [100, 102]
    assert one.gaps() == [("trades", 101, 101, "sequence", False)]
    (want,) = [w for w in one.venue.wants if isinstance(w, Fetch)]
    assert "fromId=101&limit=1" in want.path
    one.sane()


@pytest.mark.parametrize("changed", [{"price": 1e15}, {"price": -1e16}, {"amount": -1}, {"amount": 1e18}, {"timestamp": 0},
                                     {"direction": 1}, {"trade_id": "x" * 57}, {"trade_id": 5},
                                     {"trade_seq": -1}, {"timestamp": 4_102_444_800_001}])  # fmt: skip
def test_a_refused_message_of_trades_is_a_hole_that_wants_a_repair(changed: dict[str, Any], probe: Any) -> None:
    one: Probe = probe("deribit", "BTC-PERPETUAL")
    assert one.feed(d_trade(100))
    message = d_trade(101, 102, 103)
    message["params"]["data"][1].update(changed)
    assert not one.feed(message)
    assert one.feed(d_trade(104))
    assert one.trades("BTC-PERPETUAL") == [100, 104]
    assert one.gaps() == [("trades", 101, 103, "sequence", False)]
    (want,) = [w for w in one.venue.wants if isinstance(w, Fetch)]
    assert "start_seq=101&end_seq=103" in want.path
    one.sane()


@pytest.mark.parametrize("level", [["1e15", "1"], ["nan", "1"], ["inf", "1"], ["1", "inf"], ["1", "1e18"], ["-1", "1"], ["1", "-1"],
                                   ["1"], ["1", "1", "1"], [[], "1"], ["", "1"]])  # fmt: skip
@pytest.mark.parametrize("live", [True, False])
def test_an_impossible_level_refuses_its_message_and_the_book_heals(level: list[Any], live: bool, probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    assert one.feed(b_depth(9, 10, [["1", "1"]]))
    if live:
        b_snapshot(one, 10, [["1", "1"]], [["3", "1"]])
        one.venue.wants.clear()
    assert not one.feed(b_depth(11, 11, [["2", "2"], level]))
    assert one.feed(b_depth(12, 12, [["1.5", "2"]]))
    if live:
        assert one.venue.books["AB"].state == continuity.BROKEN
        assert one.gaps() == [("orderbook_l2", 11, 11, "sequence", False)]
        assert [w.key for w in one.venue.wants if isinstance(w, Fetch)] == ["depth AB"]
    b_snapshot(one, 11, [["1", "1"]], [["3", "1"]])
    assert one.venue.books["AB"].book() == ({1.0: 1.0, 1.5: 2.0}, {3.0: 1.0})
    one.sane()


def test_prices_that_cancel_out_are_still_impossible(probe: Any) -> None:
    """Combination books have negative prices, so a sum alone proves nothing."""
    one: Probe = probe("deribit", "BTC-PERPETUAL")
    assert one.feed(d_book(1, None, [["new", -7, 3]], [["new", -5, 3]]))
    assert not one.feed(d_book(2, 1, [["new", 1e300, 1]], [["new", -1e300, 1]]))
    assert not one.feed(d_book(2, 1, [["new", 2e15, 1], ["new", -2e15, 1]]))
    assert one.emit.counters["refused_absurd_number"] == 2
    assert one.feed(d_book(2, 1, [["new", -6, 1e15]]))  # a large quantity is no impossible price
    assert one.venue.books["BTC-PERPETUAL"].book() == ({-7.0: 3.0, -6.0: 1e15}, {-5.0: 3.0})
    one.sane()


def test_a_deletion_removes_whatever_amount_it_names(probe: Any) -> None:
    one: Probe = probe("deribit", "BTC-PERPETUAL")
    assert one.feed(d_book(1, None, [["new", 5, 3], ["delete", 4, 3]], [["new", 9, 0]]))
    assert one.venue.books["BTC-PERPETUAL"].book() == ({5.0: 3.0}, {})
    assert one.feed(d_book(2, 1, [["delete", 5, 3], ["delete", 1, 2]]))
    assert one.venue.books["BTC-PERPETUAL"].book() == ({}, {})
    rows = one.rows("orderbook_l2")
    assert rows["action"].tolist() == [1, 3, 3, 3, 3]
    assert rows["qty"].tolist() == [3.0, 0.0, 0.0, 0.0, 0.0]
    one.sane()


def test_an_impossible_snapshot_is_asked_for_again(probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    one.feed(b_depth(11, 11, [["1", "1"]]))
    assert [w.key for w in one.venue.wants if isinstance(w, Fetch)] == ["depth AB"]
    for bad in (
        '{"lastUpdateId":10,"bids":[["nan","1"]],"asks":[]}',
        '{"lastUpdateId":10,"bids":[["1","inf"]],"asks":[]}',
        "{}",
        "",
    ):
        one.venue.wants.clear()
        with pytest.raises(UNUSABLE):
            one.venue.http("https://x/api/v3/depth?symbol=AB", bad.encode())
        assert [w.key for w in one.venue.wants if isinstance(w, Fetch)] == ["depth AB"]
    b_snapshot(one, 10, [["2", "1"]], [])
    assert one.venue.books["AB"].book() == ({2.0: 1.0, 1.0: 1.0}, {})


def asks_at(one: Probe, until_ns: int) -> list[int]:
    """When within this time, seen each tenth of a second, the snapshot of AB is asked for."""
    asked = []
    while one.now_ns < until_ns:
        one.venue.wants.clear()
        one.now_ns += 100_000_000
        one.emit.packet(one.now_ns, one.emit.clock())
        one.venue.tick(one.now_ns)
        asked += [one.now_ns for w in one.venue.wants if isinstance(w, Fetch) and w.key == "depth AB"]
    return asked


@pytest.mark.parametrize("venue", ["binance_spot", "binance_futures"])
def test_a_snapshot_that_is_too_old_gets_time_to_catch_up(venue: str, probe: Any) -> None:
    """What is held outlives a REST cache that lags by 7 seconds; the longer it lags, the more rarely it is asked."""
    one: Probe = probe(venue, "AB")
    assert one.feed(b_depth(10, 11, [["1", "1"]]))
    waits = []
    for _ in range(continuity.STALE_SNAPSHOTS_MAX - 1):
        one.venue.wants.clear()
        began_ns = one.now_ns
        b_snapshot(one, 5, [["9", "1"]], [])
        assert not one.venue.wants, "not at once"
        (asked_ns,) = asks_at(one, began_ns + 4_050_000_000)
        waits.append(asked_ns - began_ns)
        one.now_ns = asked_ns
        one.emit.packet(asked_ns, one.emit.clock())
    assert waits == [500_000_000, 1_000_000_000, 2_000_000_000, 4_000_000_000]
    b_snapshot(one, 10, [["2", "1"]], [])
    assert one.venue.books["AB"].book() == ({2.0: 1.0, 1.0: 1.0}, {})
    assert one.gaps() == []
    assert not asks_at(one, one.now_ns + 10_000_000_000)


def test_a_snapshot_is_asked_for_again_only_while_it_is_needed_and_whatever_the_clock_does(probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    b_snapshot(one, 9, [["9", "1"]], [])
    assert one.feed(b_depth(12, 12))
    b_snapshot(one, 10, [["9", "1"]], [])
    one.now_ns -= 3_600_000_000_000
    assert len(asks_at(one, one.now_ns + 50_000_000)) == 1, "an hour back: nobody waits for that hour to pass"
    b_snapshot(one, 10, [["9", "1"]], [])
    assert one.feed(b_depth(10, 11, [["8", "1"]]))
    assert one.venue.books["AB"].state == continuity.LIVE
    assert not asks_at(one, one.now_ns + 10_000_000_000), "a late message has healed it"
    assert one.feed(b_depth(20, 20))
    began_ns = one.now_ns
    b_snapshot(one, 15, [["9", "1"]], [])
    assert asks_at(one, began_ns + 5_000_000_000)[0] - began_ns == 500_000_000, "another hole, from the start"


def test_an_unusable_book_snapshot_on_the_channel_is_asked_for_again(probe: Any) -> None:
    one: Probe = probe("deribit", "BTC-PERPETUAL")
    one.venue.opened()
    one.venue.wants.clear()
    assert not one.feed(d_book(5, None, [["new", 1e300, 1]]))
    assert one.feed(d_book(6, 5, [["new", 1, 1]]))
    one.venue.tick(one.now_ns)
    texts = [json.loads(w.text) for w in one.venue.wants]  # type: ignore[union-attr]
    assert [t["method"] for t in texts] == ["public/unsubscribe", "public/subscribe"]
    assert all(t["params"]["channels"] == ["book.BTC-PERPETUAL.100ms"] for t in texts)
    assert one.feed(d_book(7, None, [["new", 2, 1]]))
    assert one.venue.books["BTC-PERPETUAL"].book() == ({2.0: 1.0}, {})
    one.venue.wants.clear()
    one.venue.tick(one.now_ns + 60_000_000_000)
    assert not one.venue.wants


# Ids that cannot be


@pytest.mark.parametrize("absurd", [1 << 62, 10**15, 100 + continuity.COUNTER_JUMP_MAX + 2, 5_000])
def test_an_absurd_trade_id_does_not_hide_the_trades_behind_it(absurd: int, probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    one.feed(b_trade(100))
    one.feed(b_trade(absurd))  # should have been 101
    for i in range(102, 150):
        one.feed(b_trade(i, time_ms=MS + i))
    trades = one.trades("AB")
    assert [t for t in trades if t != absurd] == [100, *range(102, 150)], "none lost, none twice"
    if absurd > 100 + continuity.COUNTER_JUMP_MAX:
        assert one.emit.counters["refused_absurd_trade_id"] == 1
        assert one.gaps() == [("trades", 101, 101, "sequence", False)]
    else:  # cannot be told from a long loss: the ledger has the whole, which is never filled
        assert one.gaps() == [("trades", 101, absurd - 1, "sequence", False)]
    one.sane()


@pytest.mark.parametrize("first", [1 << 62, 10**12, 5_000_000, 200])
def test_an_absurd_first_trade_id_does_not_hide_the_trades_behind_it(first: int, probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    one.feed(b_trade(first))
    for i in range(100, 150):
        one.feed(b_trade(i, time_ms=MS + i))
    assert one.trades("AB") == [first, *range(102, 150)], "two are not believed, the third confirms them"
    assert one.emit.counters["refused_absurd_trade_id"] == 2
    assert one.gaps() == [("trades", 100, 101, "ids_reset", False)]
    (want,) = [w for w in one.venue.wants if isinstance(w, Fetch)]
    assert "fromId=100&limit=2" in want.path
    body = [{"id": i, "price": "1", "qty": "1", "time": MS, "isBuyerMaker": True} for i in (100, 101)]
    one.venue.http("https://x" + want.path, json.dumps(body).encode())
    assert sorted(one.trades("AB")) == sorted([first, *range(100, 150)])
    assert one.gaps()[1:] == [("trades", 100, 101, "filled", True)]
    one.sane()


def test_a_counter_that_begins_anew_within_one_message(probe: Any) -> None:
    """Those of a message that are believed are published although the message is counted as refused."""
    one: Probe = probe("deribit", "BTC-PERPETUAL")
    assert one.feed(d_trade(500, 501))
    assert not one.feed(d_trade(1, 2, 3, 4, time_ms=MS + 5))
    assert one.trades("BTC-PERPETUAL") == [500, 501, 3, 4]
    assert one.gaps() == [("trades", 1, 2, "ids_reset", False)]
    assert one.feed(d_trade(5))
    assert one.trades("BTC-PERPETUAL") == [500, 501, 3, 4, 5]


def test_duplicates_are_duplicates_and_never_a_counter_that_begins_anew(probe: Any) -> None:
    one: Probe = probe("deribit", "BTC-PERPETUAL")
    for i in range(1, 2000):
        one.feed(d_trade(i, time_ms=MS + i))
    for i in range(1, 2000):
        assert one.feed(d_trade(i, time_ms=MS + i))
    assert one.trades("BTC-PERPETUAL") == list(range(1, 2000))
    assert one.emit.counters["trade_duplicate"] == 1999
    assert one.gaps() == []


@pytest.mark.parametrize("u", [1 << 62, 5_000])
def test_an_absurd_update_id_does_not_stop_a_book(u: int, probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    one.feed(b_depth(10, 10))
    b_snapshot(one, 10, [["1", "1"]], [["9", "1"]])
    one.venue.wants.clear()
    assert one.feed(b_depth(11, u, [["2", "1"]]))  # believed: it contains the id that follows
    i = 12
    while not one.venue.wants and i < 12 + 2 * continuity.OLD_RUN_MAX:
        one.feed(b_depth(i, i, [["3", str(i)]]))
        i += 1
    assert [w.key for w in one.venue.wants if isinstance(w, Fetch)] == ["depth AB"]
    assert one.gaps() == [("orderbook_l2", 12, i - 1, "ids_reset", False)], "exactly what was dropped"
    one.feed(b_depth(i, i, [["4", "1"]]))
    b_snapshot(one, i - 1, [["1", "1"], ["3", str(i - 1)]], [["9", "1"]])
    assert one.venue.books["AB"].book() == ({1.0: 1.0, 3.0: i - 1.0, 4.0: 1.0}, {9.0: 1.0})
    one.sane()


def test_an_absurd_change_id_does_not_stop_a_book(probe: Any) -> None:
    one: Probe = probe("deribit", "BTC-PERPETUAL")
    one.feed(d_book(10, None, [["new", 1, 1]]))
    assert one.feed(d_book(1 << 62, 10, [["new", 2, 1]]))
    i = 12
    while one.venue.books["BTC-PERPETUAL"].state == continuity.LIVE and i < 12 + 2 * continuity.OLD_RUN_MAX:
        one.feed(d_book(i, i - 1, [["new", 3, i]]))
        i += 1
    one.venue.tick(one.now_ns)
    assert [json.loads(w.text)["method"] for w in one.venue.wants] == ["public/unsubscribe", "public/subscribe"]  # type: ignore[union-attr]
    assert one.feed(d_book(i, None, [["new", 3, 5]]))
    assert one.feed(d_book(i + 1, i, [["new", 4, 5]]))
    assert one.venue.books["BTC-PERPETUAL"].book() == ({3.0: 5.0, 4.0: 5.0}, {})
    one.sane()


def test_ids_that_contradict_each_other_are_refused(probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    assert not one.feed(b_depth(12, 11, [["2", "1"]]))
    assert one.emit.counters["refused_absurd_update_id"] == 1
    two: Probe = probe("deribit", "BTC-PERPETUAL")
    two.feed(d_book(10, None))
    for previous in (-5, 10**30, 1.5, "9", True):
        assert not two.feed(d_book(11, previous, [["new", 1, 1]]))  # type: ignore[arg-type]
    assert two.feed(d_book(11, 10, [["new", 1, 1]]))
    assert two.gaps() == []


def test_a_time_between_the_units_is_refused(probe: Any) -> None:
    """Too large for milliseconds, too small for microseconds of our days."""
    one: Probe = probe("binance_spot", "AB")
    one.feed(b_depth(10, 10))
    b_snapshot(one, 10, [["1", "1"]], [["9", "1"]])
    assert not one.feed(b_depth(11, 11, [["2", "1"]], time_ms=99_999_999_999_999))
    assert one.feed(b_depth(11, 11, [["2", "1"]], time_ms=MS))
    one.sane()


def test_a_candle_from_the_future_does_not_stop_the_candles(probe: Any) -> None:
    one: Probe = probe("deribit", "BTC-PERPETUAL")
    stream = "chart.trades.BTC-PERPETUAL.1"

    def candle(tick: int, close: float = 1.0) -> dict[str, Any]:
        return deribit(
            stream, {"tick": tick, "open": 1.0, "high": 9.0, "low": 1.0, "close": close, "volume": 1.0, "cost": 1.0}
        )

    assert one.feed(candle(MS))
    assert not one.feed(candle(4_000_000_000_000))
    assert not one.feed(candle(MS + 60_000, close=1e300))
    assert one.feed(candle(MS + 60_000))
    assert one.feed(candle(MS + 120_000))
    rows = one.rows("candles")
    assert [((int(r["open_time"]) // 1000 - MS) // 60_000, bool(r["closed"])) for r in rows] == [
        (0, False), (0, True), (1, False), (1, True), (2, False)
    ]  # fmt: skip
    one.sane()


# Floods


def test_reasons_streams_and_instruments_are_bounded(probe: Any) -> None:
    one: Probe = probe("binance_spot", "AB")
    for i in range(6000):
        one.feed(binance(f"ab@kline_{i}", e="kline", E=MS, s="AB", k={"t": MS, "i": "1m", "o": "1", "c": "1", "h": "1", "l": "1",
                                                                     "v": "1", "n": 1, "x": False}))  # fmt: skip
        one.feed(b_trade(1, ticker=f"X{i}"))
    assert len(one.venue._routes) <= 4096  # type: ignore[attr-defined]
    assert one.emit.counters["refused_unknown_symbol"] == 6000
    assert one.emit.rings["trades"].tickers in ([], ["AB"])
    for i in range(3 * emit_module.REASONS_MAX):
        one.emit.refused(f"reason {i}", b"x")
    reasons = [name for name in one.emit.counters if name.startswith("refused_")]
    assert len(reasons) == len(one.emit.samples) == emit_module.REASONS_MAX + 1
    assert one.emit.counters["refused_other"] == 3 * emit_module.REASONS_MAX - (emit_module.REASONS_MAX - 1)


def test_instruments_without_end_are_refused_when_the_table_is_full(
    probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdcollector.ring.INSTRUMENTS_MAX", 50)
    one: Probe = probe("binance_spot")
    taken = [one.feed(b_trade(1, ticker=f"X{i}")) for i in range(80)]
    assert taken == [True] * 50 + [False] * 30
    assert one.emit.counters["refused_instrument_refused"] == 30
    assert one.feed(b_trade(2, ticker="X3"))
    one.sane()


@pytest.mark.parametrize("venue", ["binance_spot", "deribit"])
def test_what_is_held_without_a_snapshot_is_bounded(venue: str, probe: Any) -> None:
    """Messages wait for a snapshot that never comes; beyond the limit the oldest are published as not proven."""
    one: Probe = probe(venue)
    count, levels = 140, 2_000
    tracemalloc.start()
    try:
        for i in range(count):
            pairs = [[str(j), str(i + 1)] for j in range(1, levels + 1)]
            if venue == "binance_spot":
                assert one.feed(b_depth(i + 1, i + 1, pairs))
            else:
                assert one.feed(d_book(i + 1, i, [["new", float(p), float(q)] for p, q in pairs]))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = continuity.HELD_LEVELS_MAX // levels
    assert one.emit.counters["book_held_overflow"] == count - held
    assert one.emit.rings["orderbook_l2"].next == (count - held) * levels
    assert most < 120 << 20, most
    for _ in one.venue.finish():
        pass
    ring = one.emit.rings["orderbook_l2"]
    assert ring.next == count * levels
    rows = one.rows("orderbook_l2")
    assert (rows["flags"] & INVALID != 0).all()
    assert rows["update_id"][-1] == count
    one.sane()


def test_small_messages_are_held_up_to_their_number(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuity, "HELD_MESSAGES_MAX", 100)
    one: Probe = probe("binance_spot")
    for i in range(1, 151):
        one.feed(b_depth(i, i, [["1", str(i)]]))
    assert one.rows("orderbook_l2")["update_id"].tolist() == list(range(1, 51)), "the oldest first"
    b_snapshot(one, 120, [["2", "1"]], [])
    rows = one.rows("orderbook_l2")
    assert rows["update_id"].tolist()[50:] == [120, *range(121, 151)]
    assert one.venue.books["AB"].book() == ({2.0: 1.0, 1.0: 150.0}, {})
    assert not (rows["flags"][50:] & INVALID).any()
