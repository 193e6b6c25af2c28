"""The frames that are measured: seeded, of the shape and size that the venues send, contiguous where ids must be.

Used by all benchmarks and by the sender process. Recorded frames are added where the recordings lie (MD_DATA).
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

from mdcollector.recording import read_recording

START_US = 1_722_000_000_000_000
BOOK_ID = 100_000  # update id of the snapshot that the depth frames follow
MID_TICKS = 6_183_763  # 61837.63
LEVELS = 20  # a side of a depth frame
RECORDED_DEPTH = "binance_spot/recorded/btcusdt_20240808.jsonl.zst"


def _encode(message: object) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def _price(ticks: int) -> str:
    return f"{ticks / 100:.8f}"


def _combined(stream: str, data: object) -> bytes:
    return _encode({"stream": stream, "data": data})


def binance_trades(count: int, first: int = 1000) -> Iterator[bytes]:
    r = random.Random(1)
    for i in range(count):
        time = START_US + 37 * i
        price, qty = _price(MID_TICKS + r.randint(-500, 500)), f"{r.random():.8f}"
        data = {"e": "trade", "E": time + 900, "s": "BTCUSDT", "t": first + i, "p": price, "q": qty, "T": time, "m": r.random() < 0.5, "M": True}  # fmt: skip
        yield _combined("btcusdt@trade", data)


def binance_agg_trades(count: int, first: int = 1000) -> Iterator[bytes]:
    r = random.Random(2)
    for i in range(count):
        time = START_US + 37 * i
        price, qty = _price(MID_TICKS + r.randint(-500, 500)), f"{r.random():.8f}"
        data = {"e": "aggTrade", "E": time + 900, "s": "BTCUSDT", "a": first + i, "p": price, "q": qty, "f": i, "l": i, "T": time, "m": r.random() < 0.5, "M": True}  # fmt: skip
        yield _combined("btcusdt@aggTrade", data)


def binance_book_tickers(count: int) -> Iterator[bytes]:
    r = random.Random(3)
    for i in range(count):
        mid = MID_TICKS + r.randint(-500, 500)
        bid, ask, bid_qty, ask_qty = _price(mid), _price(mid + 1), f"{r.random():.8f}", f"{r.random():.8f}"
        data = {"u": 400_900_217 + i, "s": "BTCUSDT", "b": bid, "B": bid_qty, "a": ask, "A": ask_qty}
        yield _combined("btcusdt@bookTicker", data)


def _changes(r: random.Random, direction: int) -> list[tuple[int, float]]:
    """Levels of one side, best first, dense near the top; three in ten are removed."""
    ticks: set[int] = set()
    while len(ticks) < LEVELS:
        ticks.add(MID_TICKS + direction * (1 + int(r.expovariate(1 / 60))))
    return [
        (t, 0.0 if r.random() < 0.3 else round(3 * r.random(), 8)) for t in sorted(ticks, key=lambda t: direction * t)
    ]


def binance_depths(count: int) -> Iterator[bytes]:
    """Frames that follow `binance_snapshot`."""
    r, last = random.Random(4), BOOK_ID
    for i in range(count):
        first, last = last + 1, last + r.randint(1, 60)
        bids, asks = ([[_price(t), f"{q:.8f}"] for t, q in _changes(r, d)] for d in (-1, 1))
        data = {"e": "depthUpdate", "E": START_US + 100_000 * i, "s": "BTCUSDT", "U": first, "u": last, "b": bids, "a": asks}  # fmt: skip
        yield _combined("btcusdt@depth@100ms", data)


def binance_snapshot() -> bytes:
    sides = ([[_price(MID_TICKS + d * (i + 1)), "1.50000000"] for i in range(1000)] for d in (-1, 1))
    return _encode({"lastUpdateId": BOOK_ID, **dict(zip(("bids", "asks"), sides, strict=True))})


def binance_ticker() -> bytes:
    numbers = {"p": "94.99", "P": "0.154", "w": "61800.1", "x": "61742.6", "c": "61837.63", "Q": "0.02", "b": "61837.62", "B": "1.2", "a": "61837.63", "A": "3.1", "o": "61742.64", "h": "62745.14", "l": "59550.0", "v": "33021.8", "q": "2021343434.1"}  # fmt: skip
    data = {"e": "24hrTicker", "E": START_US, "s": "BTCUSDT", **numbers, "O": START_US, "C": START_US, "F": 1, "L": 9, "n": 9}  # fmt: skip
    return _combined("btcusdt@ticker", data)


def binance_kline() -> bytes:
    bar = {"t": START_US, "T": START_US + 59_999_999, "s": "BTCUSDT", "i": "1m", "f": 1, "L": 99, "o": "61800.1", "c": "61837.63", "h": "61840.0", "l": "61790.5", "v": "12.5", "n": 99, "x": False, "q": "772970.3", "V": "6.1", "Q": "377209.5", "B": "0"}  # fmt: skip
    return _combined("btcusdt@kline_1m", {"e": "kline", "E": START_US, "s": "BTCUSDT", "k": bar})


def _notification(channel: str, data: object) -> bytes:
    return _encode({"jsonrpc": "2.0", "method": "subscription", "params": {"channel": channel, "data": data}})


def deribit_trades(count: int, first: int = 1000) -> Iterator[bytes]:
    """One trade a frame."""
    r = random.Random(5)
    for i in range(count):
        trade = {"trade_seq": first + i, "trade_id": f"{48_079_269 + i}", "timestamp": START_US // 1000 + i, "tick_direction": 1, "price": 61_837.5 + r.randint(-9, 9), "mark_price": 61_840.12, "instrument_name": "BTC-PERPETUAL", "index_price": 61_833.73, "direction": r.choice(("buy", "sell")), "amount": 10.0 * r.randint(1, 99)}  # fmt: skip
        yield _notification("trades.BTC-PERPETUAL.100ms", [trade])


def deribit_books(count: int) -> Iterator[bytes]:
    """A snapshot, then changes that follow."""
    r, last = random.Random(6), BOOK_ID
    channel = "book.BTC-PERPETUAL.100ms"
    sides = ([["new", (MID_TICKS + d * (i + 1)) / 100, 1500.0] for i in range(1000)] for d in (-1, 1))
    book = dict(zip(("bids", "asks"), sides, strict=True))
    head = {"type": "snapshot", "timestamp": START_US // 1000, "instrument_name": "BTC-PERPETUAL", "change_id": last}
    yield _notification(channel, {**head, **book})
    for i in range(count - 1):
        previous, last = last, last + r.randint(1, 60)
        bids, asks = ([["change" if q else "delete", t / 100, round(10_000 * q)] for t, q in _changes(r, d)] for d in (-1, 1))  # fmt: skip
        head = {"type": "change", "timestamp": START_US // 1000 + 100 * i, "prev_change_id": previous, "instrument_name": "BTC-PERPETUAL", "change_id": last}  # fmt: skip
        yield _notification(channel, {**head, "bids": bids, "asks": asks})


def deribit_quotes(count: int) -> Iterator[bytes]:
    r = random.Random(7)
    for i in range(count):
        mid = MID_TICKS + r.randint(-500, 500)
        data = {"timestamp": START_US // 1000 + i, "instrument_name": "BTC-PERPETUAL", "best_bid_price": mid / 100, "best_bid_amount": 10.0 * r.randint(1, 99), "best_ask_price": (mid + 1) / 100, "best_ask_amount": 10.0 * r.randint(1, 99)}  # fmt: skip
        yield _notification("quote.BTC-PERPETUAL", data)


def deribit_ticker() -> bytes:
    stats = {"volume_usd": 223_463_290.0, "volume": 3612.5, "price_change": 0.3, "low": 59_550.0, "high": 62_745.0}
    data = {"timestamp": START_US // 1000, "stats": stats, "state": "open", "settlement_price": 61_000.1, "open_interest": 502_000_000.0, "min_price": 60_000.0, "max_price": 63_000.0, "mark_price": 61_838.1, "last_price": 61_837.5, "interest_value": 0.1, "instrument_name": "BTC-PERPETUAL", "index_price": 61_833.73, "funding_8h": 1e-05, "estimated_delivery_price": 61_833.73, "current_funding": 0.0, "best_bid_price": 61_837.0, "best_bid_amount": 1200.0, "best_ask_price": 61_837.5, "best_ask_amount": 300.0}  # fmt: skip
    return _notification("ticker.BTC-PERPETUAL.100ms", data)


KINDS = {
    "trade": binance_trades,
    "aggtrade": binance_agg_trades,
    "bookticker": binance_book_tickers,
    "depth": binance_depths,
}


def recorded_depth(limit: int) -> tuple[bytes, list[bytes]] | None:
    """Snapshot and depth frames of a recording, None where there are no recordings."""
    data = Path(os.environ.get("MD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    path = data / RECORDED_DEPTH
    if not path.exists():
        return None
    snapshot, frames = b"", []
    for entry in read_recording(path):
        if entry.dir == "http":
            snapshot = entry.raw.encode()
        elif entry.dir == "in" and "depthUpdate" in entry.raw:
            frames.append(entry.raw.encode())
            if len(frames) == limit:
                break
    return snapshot, frames
