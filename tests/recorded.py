"""What the recordings say, worked out with plain `json` and plain dicts; shared by the tests of recorded traffic.

Nothing here uses the product: the venue's rules are written down once more, from exchange-protocols sections 3.5 and 5.6,
in the slowest and plainest way. `expected_binance` and `expected_deribit` turn recordings into the rows that the stored
tables must hold, `table` reads what they do hold.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mdcollector.exchanges import InstrumentInfo

DATA = Path(os.environ.get("MD_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="recorded traffic is not here (MD_DATA)")

LAST, SNAPSHOT, RESYNCED, INVALID, REPLAYED, TIME_LOCAL, UNPROVEN = 1, 2, 4, 8, 32, 64, 128
BID, ASK = 1, -1

Json = Any
Row = dict[str, Any]
Book = dict[int, dict[float, float]]  # side -> price -> quantity


class Num(str):
    """A JSON number as it was written."""

    __slots__ = ()


def plain(raw: str | bytes) -> Json:
    """The JSON value; numbers with a point or an exponent stay text."""
    return json.loads(raw, parse_float=Num)


def entries(path: Path) -> list[Json]:
    """The lines of one recording."""
    if path.suffix != ".zst":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as packed:
        return [json.loads(line) for line in io.TextIOWrapper(packed, encoding="utf-8")]


# What is stored


def table(out: Path, feed: str) -> dict[str, list[Any]]:
    """All rows of a feed in the order of their seq_id, column by column; times as integers, NaN as text."""
    files = sorted((out / feed).rglob("*.parquet"))
    if not files:
        return {}
    whole = pa.concat_tables([pq.ParquetFile(file).read() for file in files]).sort_by("seq_id")
    columns = {}
    for name in whole.column_names:
        column = whole[name]
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.int64())
        values = column.to_pylist()
        if pa.types.is_floating(column.type):
            values = ["nan" if value is not None and value != value else value for value in values]
        columns[name] = values
    assert columns["seq_id"] == list(range(len(columns["seq_id"]))), feed
    return columns


def compare(stored: dict[str, list[Any]], expected: Sequence[Row]) -> None:
    """Every row equals the expected one in all columns that are expected; the first difference is shown."""
    assert len(stored.get("seq_id", ())) == len(expected), f"{len(stored.get('seq_id', ()))} rows for {len(expected)}"
    if not expected:
        return
    for name in expected[0]:
        want = [row[name] for row in expected]
        if stored[name] != want:
            at = next(i for i, (a, b) in enumerate(zip(stored[name], want, strict=True)) if a != b)
            raise AssertionError(f"row {at}, {name}: stored {stored[name][at]!r}, expected {expected[at]}")


def same_decimal(stored: float, text: str) -> bool:
    """The stored number, written out shortest, is the number that the venue wrote."""
    return Decimal(repr(stored)) == Decimal(text)


# What is expected


class Expected:
    """Rows of all tables, in the order in which they must be published."""

    def __init__(self, exchange: str) -> None:
        self.exchange = exchange
        self.rows: dict[str, list[Row]] = {
            f: [] for f in ("trades", "orderbook_l2", "bbo", "tickers", "candles", "instruments", "gaps")
        }
        self.messages: list[tuple[int, str, int, Book]] = []  # rows of a book message, ticker, id, the book behind it
        self.texts: list[tuple[str, str]] = []  # of every trade: price and quantity as they were written
        self.counters: Counter[str] = Counter()
        self.instruments: dict[str, Row] = {}
        self.rcv = self.packet = 0

    def head(self, ticker: str, timestamp: int, flags: int) -> Row:
        """The columns that all rows begin with."""
        if not timestamp:
            timestamp, flags = self.rcv, flags | TIME_LOCAL
        return {
            "timestamp": timestamp, "rcv_timestamp": self.rcv, "exchange": self.exchange, "ticker": ticker,
            "packet_id": self.packet, "flags": flags | REPLAYED, "parse_ns": 0, "publish_ns": 0,
        }  # fmt: skip

    def instrument(self, ticker: str, **said: Any) -> None:
        """What a list of instruments says of one (None = nothing); told only when it is something new."""
        if self.instruments.get(ticker) == said:
            return
        self.instruments[ticker] = said
        self.rows["instruments"].append({**self.head(ticker, 0, LAST), **said})

    def gap(self, feed: str, ticker: str, first: int, last: int, from_time: int, to_time: int, cause: str) -> None:
        self.rows["gaps"].append(
            {
                **self.head(ticker, 0, LAST), "feed": feed, "first_id": first, "last_id": last,
                "from_time": None if from_time < 0 else from_time, "to_time": to_time, "cause": cause, "repaired": False,
            }
        )  # fmt: skip


class PlainTrades:
    """A trade counter that grows by one: what is behind it was seen, what it skips is a hole."""

    def __init__(self, expected: Expected, ticker: str) -> None:
        self.expected, self.ticker = expected, ticker
        self.last = self.last_time = -1

    def message(self, trades: Iterable[tuple[int, int, int, str, str, str]]) -> None:
        """counter, time us, side, price, quantity, id; all of one message."""
        rows = []
        for seq, timestamp, side, price, qty, trade_id in trades:
            if self.last >= 0 and seq <= self.last:
                self.expected.counters["trade_duplicate"] += 1
                continue
            if self.last >= 0 and seq != self.last + 1:
                self.expected.gap("trades", self.ticker, self.last + 1, seq - 1, self.last_time, timestamp, "sequence")
            self.last, self.last_time = seq, timestamp
            rows.append(
                {
                    **self.expected.head(self.ticker, timestamp, 0), "side": side, "price": float(price),
                    "qty": float(qty), "trade_seq": seq, "trade_id": trade_id,
                }
            )  # fmt: skip
            self.expected.texts.append((price, qty))
        if rows:
            rows[-1]["flags"] |= LAST
        self.expected.rows["trades"] += rows


Delta = tuple[int, int, int, int, list[tuple[str, str]], list[tuple[str, str]], int, int]


class PlainBook:
    """One order book by the venue's rule: `judge(last id, first, last, previous)` says old, next or hole."""

    def __init__(
        self, expected: Expected, ticker: str, judge: Callable[[int, int, int, int], str], in_band: bool
    ) -> None:
        self.expected, self.ticker, self.judge, self.in_band = expected, ticker, judge, in_band
        self.sides: Book = {BID: {}, ASK: {}}
        self.state = "waiting"
        self.last_id = self.last_time = -1
        self.buffer: list[Delta] = []
        self.known_id = -1  # in a broken book: published, or in the ledger as missing

    def delta(self, first: int, last: int, prev: int, time: int, bids: Any, asks: Any) -> None:
        delta = first, last, prev, time, bids, asks, self.expected.rcv, self.expected.packet
        if self.state != "live":
            self.buffer.append(delta)
            return
        what = self.judge(self.last_id, first, last, prev)
        if what == "old":
            self.expected.counters["book_duplicate"] += 1
        elif what == "next":
            self._publish(delta, 0)
        else:
            missing = prev if prev >= 0 else first - 1
            self.expected.gap("orderbook_l2", self.ticker, self.last_id + 1, missing, self.last_time, time, "sequence")
            self.state, self.known_id = "broken", missing
            self.buffer.append(delta)

    def snapshot(self, last_id: int, time: int, bids: Any, asks: Any) -> None:
        kept = [d for d in self.buffer if self.judge(last_id, d[0], d[1], d[2]) != "old"]
        if kept and self.judge(last_id, kept[0][0], kept[0][1], kept[0][2]) == "hole":
            if not self.in_band:
                return
            kept = []
        if self.state == "broken" and last_id > self.known_id:  # it came and is superseded, or never came
            ids = self.known_id + 1, last_id, self.last_time, time or self.expected.rcv
            self.expected.gap("orderbook_l2", self.ticker, *ids, "sequence")
        resynced = RESYNCED if self.last_id >= 0 else 0
        self.sides = {BID: {}, ASK: {}}
        head = self.expected.head(self.ticker, time, SNAPSHOT | resynced)
        rows = []
        for side, levels in ((BID, bids), (ASK, asks)):
            for price, qty in levels:
                self.sides[side][float(price)] = float(qty)
                rows.append({**head, "side": side, "action": "NEW", "price": float(price), "qty": float(qty),
                             "update_id": last_id})  # fmt: skip
        if not rows:
            rows = [{**head, "side": 0, "action": "DELETE", "price": 0.0, "qty": 0.0, "update_id": last_id}]
        self._done(rows, last_id)
        self.state, self.last_id, self.last_time = "live", last_id, time or self.expected.rcv
        self.buffer = []
        for delta in kept:
            now = self.expected.rcv, self.expected.packet
            self.expected.rcv, self.expected.packet = delta[6:]
            self.delta(*delta[:6])
            self.expected.rcv, self.expected.packet = now

    def end(self) -> None:
        """What was never joined to a snapshot is published as not proven; recordings have it in order."""
        for delta in self.buffer:
            self.expected.rcv, self.expected.packet = delta[6:]
            first, last, prev, time = delta[:4]
            if self.known_id >= 0 and self.judge(self.known_id, first, last, prev) == "hole":
                missing = prev if prev >= 0 else first - 1
                ids = self.known_id + 1, missing, self.last_time, time
                self.expected.gap("orderbook_l2", self.ticker, *ids, "sequence")
            self.known_id = last
            self._publish(delta, INVALID | UNPROVEN)

    def _publish(self, delta: Delta, flags: int) -> None:
        _, last, _, time, bids, asks, _, _ = delta
        head, rows = self.expected.head(self.ticker, time, flags), []
        for side, levels in ((BID, bids), (ASK, asks)):
            book = self.sides[side]
            for text, amount in levels:
                price, qty = float(text), float(amount)
                action = "DELETE" if qty == 0 else "UPDATE" if price in book or flags else "NEW"
                if not flags and qty == 0:
                    book.pop(price, None)
                elif not flags:
                    book[price] = qty
                rows.append({**head, "side": side, "action": action, "price": price, "qty": qty, "update_id": last})
        if not flags:
            self.last_id, self.last_time = last, time
            bids_now, asks_now = self.sides[BID], self.sides[ASK]
            if bids_now and asks_now and max(bids_now) >= min(asks_now):
                for row in rows:
                    row["flags"] |= INVALID
        self._done(rows, last)

    def _done(self, rows: list[Row], update_id: int) -> None:
        if rows:
            rows[-1]["flags"] |= LAST
            book = {side: dict(levels) for side, levels in self.sides.items()}
            self.expected.messages.append((len(rows), self.ticker, update_id, book))
            self.expected.rows["orderbook_l2"] += rows


# Binance Spot


def _binance_judge(local: int, first: int, last: int, _prev: int) -> str:
    if last <= local:
        return "old"
    return "next" if first <= local + 1 else "hole"


def _us(time: int) -> int:
    return time if time > 10**14 else time * 1000


class BinanceModel:
    """Binance Spot by plain json."""

    EXCHANGE = "BINANCE_SPOT"

    def __init__(self) -> None:
        self.expected = Expected(self.EXCHANGE)
        self.books: dict[str, PlainBook] = {}
        self.trades: dict[str, PlainTrades] = {}
        self.best: dict[tuple[str, int], tuple[float, float, float, float]] = {}  # (ticker, u) -> bookTicker

    def _book(self, ticker: str) -> PlainBook:
        if ticker not in self.books:
            self.books[ticker] = PlainBook(self.expected, ticker, self._judge(ticker), in_band=False)
        return self.books[ticker]

    def _judge(self, _ticker: str) -> Callable[[int, int, int, int], str]:
        return _binance_judge

    def _depth(self, ticker: str, data: Json) -> None:
        self._book(ticker).delta(data["U"], data["u"], -1, _us(data["E"]), data["b"], data["a"])

    def _ticker(self, ticker: str, time: int, **given: Any) -> None:
        """A row of statistics with what is given, as text."""
        names = (
            "last", "open_24h", "high_24h", "low_24h", "volume_24h", "quote_volume_24h", "bid_price", "ask_price",
            "mark_price", "index_price", "funding_rate", "open_interest",
        )  # fmt: skip
        next_funding_time = given.pop("next_funding_time", None)
        numbers = {name: float(given.pop(name)) if name in given else "nan" for name in names}
        assert not given
        row = {**self.expected.head(ticker, time, LAST), **numbers, "next_funding_time": next_funding_time}
        self.expected.rows["tickers"].append(row)

    def frame(self, message: Json) -> None:
        name, data = message["stream"], message["data"]
        ticker, kind = name.partition("@")[0].upper(), name.partition("@")[2]
        rows, head = self.expected.rows, self.expected.head
        if kind in ("trade", "aggTrade"):
            seq = data["t"] if kind == "trade" else data["a"]
            trades = self.trades.setdefault(ticker, PlainTrades(self.expected, ticker))
            trades.message([(seq, _us(data["T"]), -1 if data["m"] else 1, data["p"], data["q"], str(seq))])
        elif kind.startswith("depth"):
            self._depth(ticker, data)
        elif kind == "bookTicker":
            best = tuple(float(data[key]) for key in "bBaA")
            rows["bbo"].append(
                {
                    **head(ticker, _us(data.get("T", 0)), LAST),  # spot gives none
                    "bid_price": best[0], "bid_qty": best[1], "ask_price": best[2],
                    "ask_qty": best[3], "update_id": data["u"],
                }
            )  # fmt: skip
            self.best[ticker, data["u"]] = best
        elif kind == "ticker":
            words = {
                "last": "c", "open_24h": "o", "high_24h": "h", "low_24h": "l", "volume_24h": "v",
                "quote_volume_24h": "q", "bid_price": "b", "ask_price": "a",
            }  # fmt: skip
            self._ticker(ticker, _us(data["E"]), **{name: data[key] for name, key in words.items() if key in data})
        elif kind.startswith("kline"):
            k = data["k"]
            rows["candles"].append(
                {
                    **head(ticker, _us(data["E"]), LAST), "interval": k["i"], "open_time": _us(k["t"]),
                    "open": float(k["o"]), "high": float(k["h"]), "low": float(k["l"]), "close": float(k["c"]),
                    "volume": float(k["v"]), "trades": k["n"], "closed": k["x"],
                }
            )  # fmt: skip
        else:
            raise AssertionError(f"no recording has {name}")

    def body(self, url: str, answer: Json) -> None:
        if urlsplit(url).path.endswith("/exchangeInfo"):
            for s in answer["symbols"]:
                steps = {f["filterType"]: f for f in s.get("filters", [])}
                tick, lot = steps.get("PRICE_FILTER", {}).get("tickSize"), steps.get("LOT_SIZE", {}).get("stepSize")
                self.expected.instrument(
                    s["symbol"], active=s["status"] == "TRADING", base=s["baseAsset"],
                    quote=s["quoteAsset"], status=s["status"], tick_size=tick and float(tick),
                    qty_step=lot and float(lot), contract_size=1.0, **self._contract(s),
                )  # fmt: skip
        if not urlsplit(url).path.endswith("/depth"):
            return
        book = self._book(parse_qs(urlsplit(url).query)["symbol"][0])
        if book.state != "live":
            book.snapshot(answer["lastUpdateId"], _us(answer.get("T", 0)), answer["bids"], answer["asks"])

    def _contract(self, _symbol: Json) -> Row:
        return {"kind": "spot", "listed_time": None, "expiry_time": None}


class BinanceFuturesModel(BinanceModel):
    """Binance USD-M by plain json: what differs from spot."""

    EXCHANGE = "BINANCE_FUTURES"

    def __init__(self) -> None:
        super().__init__()
        self.snapshots: dict[str, int] = {}  # ticker -> lastUpdateId

    def _judge(self, ticker: str) -> Callable[[int, int, int, int], str]:
        def judge(local: int, first: int, last: int, prev: int) -> str:
            """Only `pu` chains; the first event behind a snapshot may hold the snapshot's id instead."""
            if last <= local:
                return "old"
            bridges = local == self.snapshots.get(ticker) and first <= local <= last
            return "next" if prev == local or bridges else "hole"

        return judge

    def _contract(self, symbol: Json) -> Row:
        ends = symbol["deliveryDate"] * 1000
        return {
            "kind": "future" if "QUARTER" in symbol["contractType"] else "perpetual",
            "listed_time": symbol["onboardDate"] * 1000,
            "expiry_time": ends if ends < 4_133_404_800_000_000 else None,
        }

    def _depth(self, ticker: str, data: Json) -> None:
        self._book(ticker).delta(data["U"], data["u"], data["pu"], data["T"] * 1000, data["b"], data["a"])

    def frame(self, message: Json) -> None:
        name, data = message["stream"], message["data"]
        ticker, kind = name.partition("@")[0].upper(), name.partition("@")[2]
        if kind == "trade" and data["X"] != "MARKET":
            time, seq = data["T"] * 1000, data["t"]
            trades = self.trades.setdefault(ticker, PlainTrades(self.expected, ticker))
            if trades.last >= 0 and seq != trades.last + 1:
                self.expected.gap("trades", ticker, trades.last + 1, seq - 1, trades.last_time, time, "sequence")
            self.expected.gap("trades", ticker, seq, seq, time, time, "no_execution")
            trades.last, trades.last_time = seq, time
        elif kind.startswith("markPrice"):
            given = {"mark_price": data["p"], "index_price": data["i"]}
            if data["T"]:
                given |= {"funding_rate": data["r"], "next_funding_time": data["T"] * 1000}
            self._ticker(ticker, data["E"] * 1000, **given)
        elif kind == "forceOrder":
            o = data["o"]
            row = {"side": {"BUY": 1, "SELL": -1}[o["S"]], "price": float(o["p"]), "qty": float(o["q"])}
            head = self.expected.head(ticker, o["T"] * 1000, LAST)
            self.expected.rows.setdefault("liquidations", []).append({**head, **row})
        else:
            super().frame(message)

    def body(self, url: str, answer: Json) -> None:
        if urlsplit(url).path.endswith("/depth"):
            self.snapshots[parse_qs(urlsplit(url).query)["symbol"][0]] = answer["lastUpdateId"]
        super().body(url, answer)


# Deribit


def _deribit_judge(local: int, _first: int, last: int, prev: int) -> str:
    if prev == local:
        return "next"
    return "old" if last <= local else "hole"


def _levels(levels: list[list[Any]]) -> list[tuple[str, str]]:
    return [(str(price), "0" if what == "delete" else str(amount)) for what, price, amount in levels]


def price_of(data: Json, side: str) -> float | str:
    """The best price of a side, NaN where it has no orders."""
    price = data.get(f"best_{side}_price")
    return "nan" if price is None or float(data.get(f"best_{side}_amount", 1)) == 0 else float(price)


class DeribitModel:
    """Deribit by plain json; candles of the chart channel are left to their own test (they need a memory)."""

    def __init__(self) -> None:
        self.expected = Expected("DERIBIT")
        self.books: dict[str, PlainBook] = {}
        self.trades: dict[str, PlainTrades] = {}

    def frame(self, message: Json) -> None:
        if message.get("method") != "subscription":
            return
        channel, data = message["params"]["channel"], message["params"]["data"]
        kind = channel.partition(".")[0]
        rows, head = self.expected.rows, self.expected.head

        def number(value: Any) -> Any:
            return "nan" if value is None else float(value)

        if kind == "trades":
            by_name: dict[str, list[Any]] = {}
            for t in data:
                by_name.setdefault(t["instrument_name"], []).append(
                    (t["trade_seq"], t["timestamp"] * 1000, {"buy": 1, "sell": -1}[t["direction"]],
                     str(t["price"]), str(t["amount"]), t["trade_id"])
                )  # fmt: skip
            for name, trades in by_name.items():
                self.trades.setdefault(name, PlainTrades(self.expected, name)).message(trades)
        elif kind == "book":
            name = data["instrument_name"]
            if name not in self.books:
                self.books[name] = PlainBook(self.expected, name, _deribit_judge, in_band=True)
            book, time = self.books[name], data["timestamp"] * 1000
            bids, asks = _levels(data["bids"]), _levels(data["asks"])
            if data["type"] == "snapshot":
                book.snapshot(data["change_id"], time, bids, asks)
            else:
                book.delta(data["change_id"], data["change_id"], data["prev_change_id"], time, bids, asks)
        elif kind == "quote":
            rows["bbo"].append(
                {
                    **head(data["instrument_name"], data["timestamp"] * 1000, LAST),
                    "bid_price": price_of(data, "bid"), "bid_qty": float(data["best_bid_amount"]),
                    "ask_price": price_of(data, "ask"), "ask_qty": float(data["best_ask_amount"]),
                    "update_id": None,
                }
            )  # fmt: skip
        elif kind == "ticker":
            stats = data.get("stats", {})
            rows["tickers"].append(
                {
                    **head(data["instrument_name"], data["timestamp"] * 1000, LAST),
                    "last": number(data.get("last_price")), "open_24h": "nan", "high_24h": number(stats.get("high")),
                    "low_24h": number(stats.get("low")), "volume_24h": number(stats.get("volume")),
                    "quote_volume_24h": number(stats.get("volume_usd")), "bid_price": price_of(data, "bid"),
                    "ask_price": price_of(data, "ask"), "mark_price": number(data.get("mark_price")),
                    "index_price": number(data.get("index_price")), "open_interest": number(data.get("open_interest")),
                    "funding_rate": number(data.get("current_funding")), "next_funding_time": None,
                }
            )  # fmt: skip
        else:
            raise AssertionError(f"no recording has {channel}")

    def body(self, url: str, answer: Json) -> None:
        if not urlsplit(url).path.endswith("/get_instruments"):
            return
        for i in answer["result"]:
            listed, expiry = (
                i[key] * 1000 if key in i else None for key in ("creation_timestamp", "expiration_timestamp")
            )
            self.expected.instrument(
                i["instrument_name"], active=i["is_active"],
                kind="perpetual" if i.get("settlement_period") == "perpetual" else i["kind"], base=i["base_currency"],
                quote=i["quote_currency"], status=i.get("state", ""), tick_size=float(i["tick_size"]),
                qty_step=float(i["min_trade_amount"]), contract_size=1.0, listed_time=listed,
                expiry_time=None if expiry is None or expiry >= 4_102_444_800_000_000 else expiry,
            )  # fmt: skip


def told(info: InstrumentInfo) -> Row:
    """What a venue's file read of an instrument, as the model writes it down."""
    said = {name: getattr(info, name) for name in info.__struct_fields__ if name != "ticker"}
    return {name: None if value == -1 or value != value else value for name, value in said.items()}


def run(model: Any, lines: Iterable[Json]) -> Any:
    """The model after all entries of a recording; `packet_id` counts every entry."""
    expected = model.expected
    for entry in lines:
        expected.packet += 1
        expected.rcv = entry["t"] // 1000
        if entry["dir"] == "in":
            model.frame(plain(entry["raw"]))
        elif entry["dir"] == "http":
            model.body(entry["url"], plain(entry["raw"]))
    for book in model.books.values():
        book.end()
    return model


# A reader's view


def rebuild(stored: dict[str, list[Any]], messages: Sequence[tuple[int, str, int, Book]]) -> None:
    """Rebuild every book from the stored rows as a reader does; after each LAST it must be the plain one."""
    books: dict[str, Book] = {}
    in_snapshot: dict[str, bool] = {}
    at, wanted = 0, iter(messages)
    columns = ("ticker", "flags", "side", "action", "price", "qty", "update_id")
    for ticker, flags, side, action, price, qty, update_id in zip(*(stored[c] for c in columns), strict=True):
        book = books.setdefault(ticker, {BID: {}, ASK: {}})
        if flags & SNAPSHOT and not in_snapshot.get(ticker):
            books[ticker] = book = {BID: {}, ASK: {}}
        in_snapshot[ticker] = bool(flags & SNAPSHOT) and not flags & LAST
        if side:
            if action == "DELETE":
                assert qty == 0
                book[side].pop(price, None)
            else:
                assert qty > 0
                book[side][price] = qty
        at += 1
        if flags & LAST:
            rows, name, last_id, truth = next(wanted)
            assert (at, ticker, update_id) == (rows, name, last_id)
            at = 0
            if not flags & INVALID:
                assert book == truth, f"{ticker} after {update_id}"
    assert next(wanted, None) is None
    assert at == 0
