"""The frames that are measured: seeded, of the shape and size that the venues send, contiguous where ids must be.

Used by all benchmarks and by the sender process. Recorded frames are added where the recordings lie (MD_DATA).
"""

import json
import os
import random
from collections.abc import Callable, Iterator
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


def usdm_trades(count: int, first: int = 1000) -> Iterator[bytes]:
    r = random.Random(8)
    for i in range(count):
        time = START_US // 1000 + i
        data = {"e": "trade", "E": time + 1, "T": time, "s": "BTCUSDT", "t": first + i, "p": f"{61_837 + r.random():.2f}", "q": f"{r.random():.3f}", "X": "MARKET", "m": r.random() < 0.5}  # fmt: skip
        yield _combined("btcusdt@trade", data)


def usdm_depths(count: int) -> Iterator[bytes]:
    """Frames that follow `binance_snapshot`; the first one contains its id."""
    r, last = random.Random(9), BOOK_ID - 1
    for i in range(count):
        previous, last = last, last + r.randint(2, 60)
        time = START_US // 1000 + 100 * i
        bids, asks = ([[_price(t), f"{q:.3f}"] for t, q in _changes(r, d)] for d in (-1, 1))
        data = {"e": "depthUpdate", "E": time, "T": time - 3, "s": "BTCUSDT", "U": previous + 1, "u": last, "pu": previous, "b": bids, "a": asks}  # fmt: skip
        yield _combined("btcusdt@depth@100ms", data)


def _okx(channel: str, data: object, **more: object) -> bytes:
    return _encode({"arg": {"channel": channel, "instId": "BTC-USDT-SWAP"}, **more, "data": [data]})


def okx_trades(count: int) -> Iterator[bytes]:
    r = random.Random(10)
    for i in range(count):
        data = {"instId": "BTC-USDT-SWAP", "tradeId": f"{130_639_474 + i}", "px": f"{61_837 + r.random():.1f}", "sz": f"{r.random():.2f}", "side": r.choice(("buy", "sell")), "ts": f"{START_US // 1000 + i}", "count": "1", "source": "0", "seqId": 123 + i}  # fmt: skip
        yield _okx("trades", data)


def okx_books(count: int) -> Iterator[bytes]:
    """A snapshot, then updates that follow."""
    r, last = random.Random(11), BOOK_ID
    sides = ([[f"{(MID_TICKS + d * (i + 1)) / 100:.1f}", "1.5", "0", "4"] for i in range(400)] for d in (-1, 1))
    book = dict(zip(("bids", "asks"), sides, strict=True))
    yield _okx("books", {**book, "ts": f"{START_US // 1000}", "checksum": 0, "seqId": last, "prevSeqId": -1}, action="snapshot")  # fmt: skip
    for i in range(count - 1):
        previous, last = last, last + r.randint(1, 60)
        bids, asks = ([[f"{t / 100:.2f}", f"{q:.2f}", "0", "3"] for t, q in _changes(r, d)] for d in (-1, 1))
        ids = {"ts": f"{START_US // 1000 + 100 * i}", "checksum": 0, "seqId": last, "prevSeqId": previous}
        yield _okx("books", {"asks": asks, "bids": bids, **ids}, action="update")


def bybit_trades(count: int) -> Iterator[bytes]:
    r = random.Random(12)
    for i in range(count):
        time = START_US // 1000 + i
        trade = {"T": time, "s": "BTCUSDT", "S": r.choice(("Buy", "Sell")), "v": f"{r.random():.3f}", "p": f"{61_837 + r.random():.2f}", "L": "PlusTick", "i": f"2d6ac04d-89c2-5ff1-9e8f-{i:012x}", "BT": False, "RPI": False, "seq": 9_000 + i}  # fmt: skip
        yield _encode({"topic": "publicTrade.BTCUSDT", "type": "snapshot", "ts": time + 1, "data": [trade]})


def bybit_books(count: int) -> Iterator[bytes]:
    """A snapshot, then deltas that follow."""
    r = random.Random(13)
    for i in range(count):
        if i:
            bids, asks = ([[f"{t / 100:.2f}", f"{q:.3f}"] for t, q in _changes(r, d)] for d in (-1, 1))
        else:
            bids, asks = ([[f"{(MID_TICKS + d * (n + 1)) / 100:.2f}", "1.5"] for n in range(200)] for d in (-1, 1))
        time = START_US // 1000 + 20 * i
        data = {"s": "BTCUSDT", "b": bids, "a": asks, "u": BOOK_ID + i, "seq": 9_000 + 3 * i}
        yield _encode({"topic": "orderbook.50.BTCUSDT", "type": "delta" if i else "snapshot", "ts": time, "data": data, "cts": time - 2})  # fmt: skip


def _coinbase(channel: str, sequence: int, event: object) -> bytes:
    head = {
        "channel": channel,
        "client_id": "",
        "timestamp": "2026-08-09T21:05:48.123456789Z",
        "sequence_num": sequence,
    }
    return _encode({**head, "events": [event]})


def coinbase_trades(count: int) -> Iterator[bytes]:
    r = random.Random(14)
    for i in range(count):
        trade = {"product_id": "BTC-USD", "trade_id": f"{8_000_000 + i}", "price": f"{61_837 + r.random():.2f}", "size": f"{r.random():.8f}", "time": f"2026-08-09T21:05:48.{i % 1_000_000:06d}Z", "side": r.choice(("BUY", "SELL"))}  # fmt: skip
        yield _coinbase("market_trades", i, {"type": "update", "trades": [trade]})


def coinbase_books(count: int) -> Iterator[bytes]:
    """A snapshot, then updates that follow."""
    r, time = random.Random(15), "2026-08-09T21:05:48.123456Z"
    for i in range(count):
        if i:
            sides = [_changes(r, d) for d in (-1, 1)]
        else:
            sides = [[(MID_TICKS + d * (n + 1), 1.5) for n in range(1000)] for d in (-1, 1)]
        updates = [
            {
                "side": side,
                "event_time": time,
                "price_level": f"{t / 100:.2f}",
                "new_quantity": f"{q:.8f}" if q else "0",
            }
            for side, levels in zip(("bid", "offer"), sides, strict=True)
            for t, q in levels
        ]
        yield _coinbase(
            "l2_data", i, {"type": "update" if i else "snapshot", "product_id": "BTC-USD", "updates": updates}
        )


def coinbase_exchange_matches(count: int) -> Iterator[bytes]:
    r = random.Random(16)
    for i in range(count):
        ids = {"maker_order_id": "ac928c66-ca53-498f-9c13-a110027a60e8", "taker_order_id": "132fb6ae-456b-4654-b4e0-d681ac05cea1"}  # fmt: skip
        yield _encode({"type": "match", "trade_id": 10 + i, **ids, "side": r.choice(("buy", "sell")), "size": f"{r.random():.8f}", "price": f"{61_837 + r.random():.2f}", "product_id": "BTC-USD", "sequence": 50 + 7 * i, "time": f"2026-08-09T21:05:48.{i % 1_000_000:06d}Z"})  # fmt: skip


def coinbase_exchange_books(count: int) -> Iterator[bytes]:
    """A snapshot, then updates."""
    r, time = random.Random(17), "2026-08-09T21:05:48.123456Z"
    sides = ([[f"{(MID_TICKS + d * (i + 1)) / 100:.2f}", "1.5"] for i in range(1000)] for d in (-1, 1))
    yield _encode({"type": "snapshot", "product_id": "BTC-USD", **dict(zip(("bids", "asks"), sides, strict=True)), "time": time})  # fmt: skip
    for _ in range(count - 1):
        changes = [
            [side, f"{t / 100:.2f}", f"{q:.8f}"] for side, d in (("buy", -1), ("sell", 1)) for t, q in _changes(r, d)
        ]
        yield _encode({"type": "l2update", "product_id": "BTC-USD", "changes": changes, "time": time})


# Trades one by one and books of 2x20 levels, as each venue sends them: what costs how much where.
Makers = tuple[Callable[[int], Iterator[bytes]], Callable[[int], Iterator[bytes]]]
VENUES: dict[str, Makers] = {
    "binance_spot": (binance_trades, binance_depths),
    "binance_futures": (usdm_trades, usdm_depths),
    "deribit": (deribit_trades, deribit_books),
    "okx": (okx_trades, okx_books),
    "bybit_linear": (bybit_trades, bybit_books),
    "coinbase": (coinbase_trades, coinbase_books),
    "coinbase_exchange": (coinbase_exchange_matches, coinbase_exchange_books),
}
SNAPSHOT_URLS = {
    "binance_spot": "http://bench/api/v3/depth?symbol=BTCUSDT&limit=1000",
    "binance_futures": "http://bench/fapi/v1/depth?symbol=BTCUSDT&limit=1000",
}  # of venues whose book starts over HTTP; all take the body of `binance_snapshot`


STREAM_TICKERS = [f"S{n:03d}USDT" for n in range(100)]  # four streams each: as many as one connection takes


def binance_streams(count: int) -> Iterator[bytes]:
    """A day's mix over 400 streams: best prices and trades, a tenth of book changes, now and then a ticker."""
    r = random.Random(18)
    ids, books = dict.fromkeys(STREAM_TICKERS, 1000), dict.fromkeys(STREAM_TICKERS, BOOK_ID)
    for i in range(count):
        first_round = i < len(STREAM_TICKERS)  # every book begins at once
        symbol, kind = (STREAM_TICKERS[i], 0.9) if first_round else (r.choice(STREAM_TICKERS), r.random())
        time, stream = START_US + 200 * i, symbol.lower()
        if kind < 0.45:
            data = {"u": 400_900_217 + i, "s": symbol, "b": _price(MID_TICKS), "B": f"{r.random():.8f}", "a": _price(MID_TICKS + 1), "A": f"{r.random():.8f}"}  # fmt: skip
            yield _combined(f"{stream}@bookTicker", data)
        elif kind < 0.88:
            ids[symbol] += 1
            data = {"e": "trade", "E": time, "s": symbol, "t": ids[symbol], "p": _price(MID_TICKS), "q": f"{r.random():.8f}", "T": time, "m": True, "M": True}  # fmt: skip
            yield _combined(f"{stream}@trade", data)
        elif kind < 0.99:
            first, books[symbol] = books[symbol] + 1, books[symbol] + r.randint(1, 9)
            bids, asks = ([[_price(t), f"{q:.8f}"] for t, q in _changes(r, d)[:5]] for d in (-1, 1))
            data = {"e": "depthUpdate", "E": time, "s": symbol, "U": first, "u": books[symbol], "b": bids, "a": asks}
            yield _combined(f"{stream}@depth@100ms", data)
        else:
            yield binance_ticker().replace(b"btcusdt@", stream.encode() + b"@").replace(b"BTCUSDT", symbol.encode())


def deribit_ticker() -> bytes:
    stats = {"volume_usd": 223_463_290.0, "volume": 3612.5, "price_change": 0.3, "low": 59_550.0, "high": 62_745.0}
    data = {"timestamp": START_US // 1000, "stats": stats, "state": "open", "settlement_price": 61_000.1, "open_interest": 502_000_000.0, "min_price": 60_000.0, "max_price": 63_000.0, "mark_price": 61_838.1, "last_price": 61_837.5, "interest_value": 0.1, "instrument_name": "BTC-PERPETUAL", "index_price": 61_833.73, "funding_8h": 1e-05, "estimated_delivery_price": 61_833.73, "current_funding": 0.0, "best_bid_price": 61_837.0, "best_bid_amount": 1200.0, "best_ask_price": 61_837.5, "best_ask_amount": 300.0}  # fmt: skip
    return _notification("ticker.BTC-PERPETUAL.100ms", data)


KINDS = {
    "trade": binance_trades,
    "aggtrade": binance_agg_trades,
    "bookticker": binance_book_tickers,
    "depth": binance_depths,
    "streams": binance_streams,
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
