"""Recorded Advanced Trade traffic through normalize: every stored row against plain json, every book against a plain dict."""

import json
import random
import signal
import subprocess
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from fleet import until
from recorded import (
    ASK,
    BID,
    DATA,
    INVALID,
    LAST,
    RESYNCED,
    SNAPSHOT,
    UNPROVEN,
    Expected,
    PlainTrades,
    compare,
    entries,
    needs_data,
    same_decimal,
    table,
)

from mdcollector import OrderBook
from mdcollector.emit import Emit
from mdcollector.errors import FrameError, RingError
from mdcollector.exchanges import Options
from mdcollector.exchanges.coinbase import Coinbase, time_us
from mdcollector.normalize import Report, normalize
from mdcollector.recording import Entry, RecordingWriter
from mdcollector.ring import RingReader

pytestmark = needs_data

FOLDER = DATA / "coinbase"
RECORDING = FOLDER / "recorded" / "advanced_20260809_part1.jsonl.zst"
SAMPLE_TIME_NS = 1_796_083_200_000_000_000  # behind every sample, so that no time of theirs lies in the future
REPAIRED = 16
Line = dict[str, Any]


@cache
def lines() -> list[Line]:
    return entries(RECORDING)


def message(line: Line) -> Any:
    return json.loads(line["raw"])


def us(text: str) -> int:
    """us of an RFC 3339 time, by another way than the product's."""
    day, _, rest = text.removesuffix("Z").partition(".")
    at = datetime.strptime(day, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    return round(at.timestamp()) * 1_000_000 + int(rest.ljust(9, "0")) // 1000


class Model:
    """The venue's rules by plain json; one connection, in the order of the recording."""

    def __init__(self) -> None:
        self.expected = Expected("COINBASE")
        self.expected.rows.pop("instruments", None)  # the list of products has its own test
        self.books: dict[str, dict[int, dict[float, float]]] = {}
        self.state: dict[str, str] = {}
        self.last: dict[str, int] = {}
        self.held: dict[str, list[Any]] = {}
        self.best: dict[str, Any] = {}
        self.told_us: dict[str, int] = {}
        self.trades: dict[str, PlainTrades] = {}
        self.candles: dict[str, Any] = {}
        self.holes: dict[tuple[str, str], int] = {}  # what no snapshot ends before the recording does
        self.number = -1
        self.heard = -1
        self.after: list[tuple[str, int, int]] = []  # ticker, update id, rows of each book message

    def run(self, recorded: Iterable[Line]) -> "Model":
        for entry in recorded:
            self.step(entry)
        now = self.expected.rcv, self.expected.packet
        for ticker, held in self.held.items():
            for levels, update_id, timestamp, rcv, packet in held:
                self.expected.rcv, self.expected.packet = rcv, packet
                self._rows(ticker, levels, update_id, timestamp, INVALID | UNPROVEN)
        self.expected.rcv, self.expected.packet = now
        for (feed, ticker), from_us in self.holes.items():
            self._hole(feed, ticker, from_us, "resync")
        return self

    def _hole(self, feed: str, ticker: str, from_us: int, cause: str) -> None:
        self.expected.gap(feed, ticker, -1, -1, from_us, self.expected.rcv, cause)
        self.expected.rows["gaps"][-1] |= {"first_id": None, "last_id": None}

    def step(self, entry: Line) -> None:
        self.expected.packet += 1
        self.expected.rcv = entry["t"] // 1000
        if entry["dir"] == "in":
            m = message(entry)
            if self.number >= 0 and m["sequence_num"] == self.number:
                self.expected.counters["duplicate"] += 1
                return
            if self.number >= 0 and m["sequence_num"] != self.number + 1:
                self._jump()
            self.number = m["sequence_num"]
            for event in m["events"]:
                getattr(self, "_" + m["channel"])(event, m)
            self.heard = self.expected.rcv

    def _jump(self) -> None:
        e = self.expected
        for ticker, state in self.state.items():
            if state == "live":
                first = self.last[ticker] + 1
                e.gap("orderbook_l2", ticker, first, max(first, e.rcv), self.last_time[ticker], e.rcv, "sequence")
                self.state[ticker] = "broken"
                self.holes["bbo", ticker] = self.heard
        for feed in ("bbo", "tickers", "candles"):
            self._hole(feed, "*", self.heard, "sequence")
        self.holes |= dict.fromkeys((("candles", ticker) for ticker in self.candles), self.heard)
        self.candles = dict.fromkeys(self.candles)

    last_time: dict[str, int]

    def _subscriptions(self, _event: Any, _m: Any) -> None:
        pass

    _heartbeats = _subscriptions

    def _l2_data(self, event: Any, m: Any) -> None:
        ticker = event["product_id"]
        timestamp = max(us(level["event_time"]) for level in event["updates"])
        levels = [
            ({"bid": BID, "offer": ASK}[level["side"]], float(level["price_level"]), float(level["new_quantity"]))
            for level in event["updates"]
        ]
        levels.sort(key=lambda level: -level[0])  # bids first, each side in the order of the message
        if event["type"] == "snapshot":
            again = ticker in self.last
            self.books[ticker], self.held[ticker] = {BID: {}, ASK: {}}, []
            self._rows(ticker, levels, timestamp, timestamp, SNAPSHOT | (RESYNCED if again else 0))
            self.state[ticker] = "live"
            self.best.pop(ticker, None)
        elif self.state.get(ticker) == "live":
            self._rows(ticker, levels, timestamp, timestamp, 0)
        else:
            self.held.setdefault(ticker, []).append(
                (levels, timestamp, timestamp, self.expected.rcv, self.expected.packet)
            )
            return
        bids, asks = self.books[ticker][BID], self.books[ticker][ASK]
        best = (max(bids), bids[max(bids)], min(asks), asks[min(asks)])
        if self.best.get(ticker) != best:
            self.best[ticker] = best
            names = ("bid_price", "bid_qty", "ask_price", "ask_qty")
            self.expected.rows["bbo"].append(
                {**self.expected.head(ticker, timestamp, LAST), **dict(zip(names, best, strict=True)),
                 "update_id": timestamp}
            )  # fmt: skip

    def _rows(self, ticker: str, levels: list[Any], update_id: int, timestamp: int, flags: int) -> None:
        head, rows = self.expected.head(ticker, timestamp, flags), []
        for side, price, qty in levels:
            book = self.books[ticker][side]
            action = "DELETE" if not qty else "UPDATE" if price in book or flags & INVALID else "NEW"
            if not flags & INVALID:
                book.pop(price, None)
                if qty:
                    book[price] = qty
            rows.append({**head, "side": side, "action": action, "price": price, "qty": qty, "update_id": update_id})
        rows[-1]["flags"] |= LAST
        if not flags & INVALID:
            self.last[ticker] = update_id
            self.last_time = {**getattr(self, "last_time", {}), ticker: timestamp}
        self.expected.rows["orderbook_l2"] += rows
        self.after.append((ticker, update_id, len(rows)))

    def _market_trades(self, event: Any, _m: Any) -> None:
        taker = {"BUY": -1, "SELL": 1}  # the side is the maker's
        by_product: dict[str, list[Any]] = {}
        for t in sorted(event["trades"], key=lambda t: int(t["trade_id"])):
            row = int(t["trade_id"]), us(t["time"]), taker[t["side"]], t["price"], t["size"], t["trade_id"]
            by_product.setdefault(t["product_id"], []).append(row)
        for ticker, rows in by_product.items():
            trades = self.trades.setdefault(ticker, PlainTrades(self.expected, ticker))
            if event["type"] == "snapshot":
                assert trades.last < 0, "a second greeting has its own test"
                trades.last, trades.last_time = rows[-1][:2]
            else:
                trades.message(rows)

    def _ticker(self, event: Any, m: Any) -> None:
        names = {"last": "price", "high_24h": "high_24_h", "low_24h": "low_24_h", "volume_24h": "volume_24_h",
                 "bid_price": "best_bid", "ask_price": "best_ask"}  # fmt: skip
        absent = ("open_24h", "quote_volume_24h", "mark_price", "index_price", "funding_rate", "open_interest")
        for t in event["tickers"]:
            row = {**self.expected.head(t["product_id"], us(m["timestamp"]), LAST), "next_funding_time": None}
            given = {name: float(t[word]) for name, word in names.items()}
            self.expected.rows["tickers"].append({**row, **given, **dict.fromkeys(absent, "nan")})

    def _candles(self, event: Any, m: Any) -> None:
        for c in event["candles"][-1:] if event["type"] == "snapshot" else event["candles"]:
            known = self.candles.get(c["product_id"])
            if known is not None and known["start"] != c["start"]:
                self._candle(known, m, True)
            self._candle(c, m, False)
            self.candles[c["product_id"]] = c

    def _candle(self, c: Any, m: Any, closed: bool) -> None:
        numbers = {name: float(c[name]) for name in ("open", "high", "low", "close", "volume")}
        self.expected.rows["candles"].append(
            {**self.expected.head(c["product_id"], us(m["timestamp"]), LAST), **numbers, "interval": "5m",
             "open_time": int(c["start"]) * 1_000_000, "trades": None, "closed": closed}
        )  # fmt: skip


def write(path: Path, recorded: list[Line]) -> Path:
    with RecordingWriter(path) as out:
        for line in recorded:
            out.write(Entry(**line))
    return path


def normalized(recorded: list[Line], tmp_path: Path) -> tuple[Report, Path]:
    return normalize("coinbase", [write(tmp_path / "modified.jsonl", recorded)], tmp_path / "out"), tmp_path / "out"


def proven(out: Path, model: Model) -> None:
    """All tables are what the model says."""
    for feed, rows in model.expected.rows.items():
        compare(table(out, feed), rows)


def places(channel: str, kind: str = "") -> list[int]:
    """Where the frames of a channel are (of one type of event)."""
    start = f'{{"channel":"{channel}"'
    return [i for i, line in enumerate(lines()) if line["dir"] == "in" and line["raw"].startswith(start)
            and kind in line["raw"][:200]]  # fmt: skip


def renumbered(recorded: list[Line], first: int) -> list[Line]:
    """The same frames with numbers from `first` on, as if the connection had sent just these."""
    numbered = []
    for line in recorded:
        if line["dir"] == "in":
            old = f'"sequence_num":{message(line)["sequence_num"]}'
            numbered.append({**line, "raw": line["raw"].replace(old, f'"sequence_num":{first}')})
            first += 1
        else:
            numbered.append(line)
    return numbered


def test_every_row_equals_the_raw_frames(tmp_path: Path) -> None:
    report = normalize("coinbase", [RECORDING], tmp_path)
    model = Model().run(lines())
    assert not model.expected.rows["gaps"], "the README says that no number is missing"
    proven(tmp_path, model)
    assert report.findings == []
    assert (report.entries, report.rows_left) == (len(lines()), 0)
    told = report.rows["instruments"]
    assert told == len(message(lines()[0])["products"]) == 920
    assert report.rows_written - told == sum(len(rows) for rows in model.expected.rows.values()) > 72_000
    assert not [c for c in report.counters if c.startswith(("refused_", "gap_", "protocol_drift", "sequence_"))]
    assert not any(flags & INVALID for flags in table(tmp_path, "orderbook_l2")["flags"])


def test_readers_have_the_plain_book_after_every_message(tmp_path: Path) -> None:
    """The library's book, from the stored rows alone; the first of them is the snapshot of 46,000 levels."""
    normalize("coinbase", [RECORDING], tmp_path)
    stored = table(tmp_path, "orderbook_l2")
    rows = [dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)]
    books: dict[str, OrderBook] = {}
    model, at = Model(), 0
    for line in lines():
        seen = len(model.after)
        model.step(line)
        for ticker, update_id, count in model.after[seen:]:
            book = books.setdefault(ticker, OrderBook())
            book.apply(rows[at : at + count])
            at += count
            assert book.is_valid
            assert book.is_complete
            truth = model.books[ticker]
            assert (book.update_id, book.bids, book.asks) == (update_id, truth[BID], truth[ASK])
    assert at == len(rows)
    assert [count for _, _, count in model.after[:1]] == [46_000]


def test_numbers_are_kept_as_they_were_written(tmp_path: Path) -> None:
    normalize("coinbase", [RECORDING], tmp_path)
    stored = table(tmp_path, "orderbook_l2")
    at = 0
    for i in places("l2_data"):
        for event in message(lines()[i])["events"]:
            levels = sorted(event["updates"], key=lambda level: level["side"])  # "bid" is before "offer"
            for level in levels:
                assert same_decimal(stored["price"][at], level["price_level"])
                assert same_decimal(stored["qty"][at], level["new_quantity"])
                at += 1
    assert at == len(stored["price"])
    trades = table(tmp_path, "trades")
    written = {t["trade_id"]: t for i in places("market_trades", '"update"') for e in message(lines()[i])["events"]
               for t in e["trades"]}  # fmt: skip
    for trade_id, seq, price, qty in zip(*(trades[c] for c in ("trade_id", "trade_seq", "price", "qty")), strict=True):
        t = written.pop(trade_id)
        assert trade_id == str(seq)
        assert same_decimal(price, t["price"])
        assert same_decimal(qty, t["size"])
    assert not written


def test_the_side_of_a_trade_is_the_makers(tmp_path: Path, record_property: Any) -> None:
    """The documents do not say whose side it is: trades lie at the ask or bid of the book just before them."""
    quotes: dict[str, list[tuple[int, float, float]]] = {}
    model = Model()
    for line in lines():
        seen = len(model.after)
        model.step(line)
        for ticker, update_id, _ in model.after[seen:]:
            book = model.books[ticker]
            quotes.setdefault(ticker, []).append((update_id, max(book[BID]), min(book[ASK])))
    seen_at: Counter[tuple[str, str]] = Counter()
    for i in places("market_trades", '"update"'):
        for t in (t for event in message(lines()[i])["events"] for t in event["trades"]):
            known = quotes[t["product_id"]]
            before = bisect_left(known, (us(t["time"]),)) - 1
            if before >= 0:
                _, bid, ask = known[before]
                price = float(t["price"])
                seen_at[t["side"], "bid" if price <= bid else "ask" if price >= ask else "between"] += 1
    print("reported side and place of each trade:", dict(seen_at))
    record_property("coinbase_trade_sides", str(dict(seen_at)))
    makers = seen_at["SELL", "ask"] + seen_at["BUY", "bid"]
    assert seen_at["SELL", "ask"] >= 30
    assert seen_at["BUY", "bid"] >= 15
    assert makers == seen_at.total(), "a taker's side would be at the other side of the book"
    normalize("coinbase", [RECORDING], tmp_path)
    stored = table(tmp_path, "trades")
    for ticker, timestamp, side, price in zip(
        *(stored[c] for c in ("ticker", "timestamp", "side", "price")), strict=True
    ):
        before = bisect_left(quotes[ticker], (timestamp,)) - 1
        if before >= 0:
            _, bid, ask = quotes[ticker][before]
            assert side == (1 if price >= ask else -1)


def test_the_book_tells_more_best_prices_than_the_ticker(tmp_path: Path) -> None:
    """Why best prices come from the book: the ticker speaks at trades only."""
    normalize("coinbase", [RECORDING], tmp_path)
    keys = ("ticker", "bid_price", "bid_qty", "ask_price", "ask_qty")
    stored = table(tmp_path, "bbo")
    of_book = set(zip(*(stored[key] for key in keys), strict=True))
    names = ("best_bid", "best_bid_quantity", "best_ask", "best_ask_quantity")
    tickers = [t for i in places("ticker", '"update"') for e in message(lines()[i])["events"] for t in e["tickers"]]
    of_ticker = {(t["product_id"], *(float(t[name]) for name in names)) for t in tickers}
    assert len(of_ticker & of_book) >= 0.95 * len(of_ticker), "they speak of the same book"
    assert len(of_book - of_ticker) > 0.3 * len(of_book)


# Frames taken out, doubled, in another form, on a second connection


@pytest.mark.parametrize(
    ("channel", "length"),
    [("l2_data", 1), ("l2_data", 3), ("heartbeats", 1), ("ticker", 1), ("market_trades", 1), ("candles", 1), ("", 5)],
)
def test_every_frame_taken_out_breaks_every_book_of_the_connection(channel: str, length: int, tmp_path: Path) -> None:
    """F8. The next frame shows it, whatever its channel: holes of books and of feeds without ids, none unsaid."""
    live_from = places("subscriptions")[-1] + 1
    choice = [i for i in (places(channel) if channel else range(len(lines()))) if live_from < i < len(lines()) - 20]
    at = random.Random(f"{channel}{length}").choice(choice)
    kept = [*lines()[:at], *lines()[at + length :]]
    report, out = normalized(kept, tmp_path)
    model = Model().run(kept)
    proven(out, model)
    gaps = table(out, "gaps")
    found = Counter(zip(gaps["feed"], gaps["ticker"], gaps["cause"], strict=True))
    missed_trades = [
        t for line in lines()[at : at + length] for e in message(line)["events"] for t in e.get("trades", [])
    ]
    books = {("orderbook_l2", ticker, "sequence"): 1 for ticker in ("BTC-USD", "ETH-USD")}
    others = {(feed, "*", "sequence"): 1 for feed in ("bbo", "tickers", "candles")}
    others |= {(feed, t, "resync"): 1 for feed in ("bbo", "candles") for t in ("BTC-USD", "ETH-USD")}
    trades = {("trades", t["product_id"], "sequence"): 1 for t in missed_trades}
    assert found == books | others | trades
    assert report.counters["lost_sequence"] == 1


def test_a_frame_that_comes_twice_is_dropped(tmp_path: Path) -> None:
    twice = set(random.Random(5).sample([i for i, line in enumerate(lines()) if line["dir"] == "in"], 60))
    report, out = normalized([copy for i, line in enumerate(lines()) for copy in [line] * (1 + (i in twice))], tmp_path)
    assert report.findings == []
    assert report.counters["sequence_duplicate"] == 60
    model = Model().run(lines())
    for feed in ("trades", "orderbook_l2", "bbo", "tickers", "candles"):
        rows = [{k: v for k, v in row.items() if k != "packet_id"} for row in model.expected.rows[feed]]
        compare(table(out, feed), rows)


def test_the_order_of_fields_does_not_matter(tmp_path: Path) -> None:
    """Sorted keys put the number behind the events; blanks and `client_id` are what older frames have."""
    small = [line for line in lines() if line["dir"] == "in" and len(line["raw"]) < 20_000]
    small = renumbered(small, 0)
    plainly, out = normalized(small, tmp_path / "plain")
    for name, form in {
        "sorted": lambda m: json.dumps(m, sort_keys=True),
        "blanks": lambda m: json.dumps({"channel": m["channel"], "client_id": "", **m}, indent=1),
        "reversed": lambda m: json.dumps(dict(reversed(m.items())), separators=(",", ":")),
    }.items():
        report, other = normalized([{**line, "raw": form(message(line))} for line in small], tmp_path / name)
        assert report.counters == plainly.counters
        for feed in ("trades", "orderbook_l2", "tickers", "candles"):
            assert table(other, feed) == table(out, feed), (name, feed)
    assert plainly.rows["trades"] == 59


def test_a_second_connection_fills_the_hole_from_its_greeting(tmp_path: Path) -> None:
    """F18. Old trades of the greeting are not stored again; new ones are, once, and the hole in the ledger is filled."""
    updates = places("market_trades", '"update"')
    cut, again = updates[5], updates[25]
    missed = [t for i in updates if cut <= i < again for e in message(lines()[i])["events"] for t in e["trades"]]
    seen = [t for i in places("market_trades") if i < cut for e in message(lines()[i])["events"] for t in e["trades"]]
    greetings = []
    for ticker in ("BTC-USD", "ETH-USD"):
        newest = sorted((t for t in seen + missed if t["product_id"] == ticker), key=lambda t: -int(t["trade_id"]))[
            :100
        ]
        greetings.append({"type": "snapshot", "trades": newest})
    frames = [{"channel": "market_trades", "timestamp": "2026-08-09T21:05:58Z", "sequence_num": n, "events": [event]}
              for n, event in enumerate(greetings)]  # fmt: skip
    opening = {"t": lines()[again]["t"], "conn": lines()[1]["conn"], "dir": "open", "raw": "", "url": "wss://x"}
    greeted = [{**opening, "dir": "in", "raw": json.dumps(f, separators=(",", ":"))} for f in frames]
    rest = [line for line in lines()[again:] if '"l2_data"' not in line["raw"][:40]]
    report, out = normalized([*lines()[:cut], opening, *renumbered([*greeted, *rest], 0)], tmp_path)
    stored = table(out, "trades")
    every = [t for i in updates for e in message(lines()[i])["events"] for t in e["trades"]]
    assert sorted(stored["trade_id"]) == sorted(t["trade_id"] for t in every), "each once, and none of before the start"
    repaired = {i for i, flags in zip(stored["trade_id"], stored["flags"], strict=True) if flags & REPAIRED}
    assert repaired == {t["trade_id"] for t in missed}
    gaps = table(out, "gaps")
    rows = list(zip(*(gaps[c] for c in ("feed", "ticker", "first_id", "last_id", "cause", "repaired")), strict=True))
    for ticker in ("BTC-USD", "ETH-USD"):
        ids = [int(t["trade_id"]) for t in missed if t["product_id"] == ticker]
        assert ("trades", ticker, min(ids), max(ids), "reconnect", False) in rows
        assert ("trades", ticker, min(ids), max(ids), "filled", True) in rows
    assert "lost_sequence" not in report.counters, "numbers of two connections have nothing to do with each other"


# Samples and REST bodies

# What becomes of every sample of this feed: rows of a feed | refused for a reason | control (no row belongs to it).
SAMPLES = {
    "ack_batch_ticker.json": "control",
    "ack_heartbeat.json": "control",
    "ack_klines.json": "control",
    "ack_symbol.json": "control",
    "ack_ticker.json": "control",
    "ack_trades.json": "control",
    "batch_ticker.json": "refused unhandled_channel",
    "candles.json": "candles 1",
    "cap2026_adv_ticker.json": "tickers 1",
    "cap2026_error_unknown_channel.json": "refused venue_error",
    "heartbeat.json": "control",
    "heartbeats.json": "control",
    "klines.json": "candles 1",
    "l2_data_snapshot.json": "orderbook_l2 6+bbo 1",
    "l2_data_update.json": "orderbook_l2 2",
    "rec_adv_candles_snapshot_advanced_20260809_part1.json": "candles 1",
    "rec_adv_candles_update_advanced_20260809_part1.json": "candles 1",
    "rec_adv_heartbeats_advanced_20260809_part1.json": "control",
    "rec_adv_l2_data_snapshot_advanced_20260809_part1.json": "orderbook_l2 46000+bbo 1",
    "rec_adv_l2_data_update_advanced_20260809_part1.json": "orderbook_l2 18",
    "rec_adv_market_trades_snapshot_advanced_20260809_part1.json": "control",
    "rec_adv_market_trades_update_advanced_20260809_part1.json": "trades 1",
    "rec_adv_subscriptions_advanced_20260809_part1.json": "control",
    "rec_adv_ticker_snapshot_advanced_20260809_part1.json": "tickers 1",
    "rec_adv_ticker_update_advanced_20260809_part1.json": "tickers 1",
    "subscriptions.json": "control",
    "symbol.json": "refused unhandled_channel",
    "ticker_01.json": "tickers 1",
    "trades_01.json": "trades 2",
}


def test_the_table_names_every_sample_of_this_feed() -> None:
    """The others, `exch_*`, are of the older Exchange feed."""
    names = {path.name for path in (FOLDER / "samples").iterdir()}
    assert {name for name in names if not name.startswith(("exch_", "rec_exch_"))} == set(SAMPLES)


@pytest.mark.parametrize(("name", "outcome"), SAMPLES.items())
def test_sample(name: str, outcome: str, tmp_path: Path) -> None:
    raw = (FOLDER / "samples" / name).read_text()
    line = {"t": SAMPLE_TIME_NS, "conn": "sample", "dir": "in", "raw": raw}
    report, out = normalized([line], tmp_path)
    refused = [c.removeprefix("refused_") for c in report.counters if c.startswith("refused_")]
    rows = "+".join(f"{feed} {count}" for feed, count in report.rows.items() if count)
    assert (rows or ("refused " + refused[0] if refused else "control")) == outcome
    assert len(refused) == outcome.startswith("refused")
    assert "protocol_drift" not in report.counters
    without_snapshot = "l2_data_update" in name
    other_channels = name.startswith("ack_")
    if not (refused or without_snapshot or other_channels):
        proven(out, Model().run([line]))


@pytest.fixture
def venue(tmp_path: Path) -> Any:
    emit = Emit(tmp_path / "rings", "t", Coinbase.EXCHANGE, Coinbase.FEEDS, semaphore=False,
                capacities=dict.fromkeys(("trades", "orderbook_l2", "bbo", "tickers", "candles", "gaps"), 4096))  # fmt: skip
    emit.packet(SAMPLE_TIME_NS, emit.clock())
    yield Coinbase(emit, Options(), [], open_world=True)
    emit.close()


LISTS = (
    "rec_api_v3_brokerage_market_products_advanced_20260809_part1.json",
    "products.json",
    "products_future.json",
    "symbols.json",
)


@pytest.mark.parametrize("name", LISTS)
def test_list_of_products(name: str, venue: Coinbase) -> None:
    body = (FOLDER / "rest" / name).read_bytes()
    listed = json.loads(body)["products"]
    infos = Coinbase.instruments(body)
    assert [i.ticker for i in infos] == [p["product_id"] for p in listed]
    for info, p in zip(infos, listed, strict=True):
        assert info.active == (not p["alias"] and p["status"] != "delisted" and not p["trading_disabled"])
        assert info.status == (f"alias of {p['alias']}" if p["alias"] else p["status"])
        assert (info.base, info.quote) == (p["base_currency_id"], p["quote_currency_id"])
        assert same_decimal(info.tick_size, p["price_increment"])
        assert same_decimal(info.qty_step, p["base_increment"])
        new_at = p.get("new_at")
        assert info.listed_time == (us(new_at) if new_at else -1)
        if p["product_type"] == "FUTURE":
            details = p["future_product_details"]
            assert info.kind == "future"
            assert same_decimal(info.contract_size, details["contract_size"])
            assert info.expiry_time == us(details["contract_expiry"])
        elif p["product_type"] == "SPOT":
            assert (info.kind, info.contract_size, info.expiry_time) == ("spot", 1.0, -1)
    assert Coinbase.pages_behind(Coinbase.instruments_paths()[0], body) == []
    venue.http("https://api.coinbase.com/api/v3/brokerage/market/products", body)
    ring = venue.emit.rings["instruments"]
    rows = ring.recent_rows(0)
    assert [ring.tickers[row["ticker"]] for row in rows] == [p["product_id"] for p in listed]
    assert [row["status"].decode() for row in rows] == [info.status for info in infos]
    assert [bool(row["active"]) for row in rows] == [info.active for info in infos]


def test_usdc_products_are_listed_under_the_name_whose_data_they_bring() -> None:
    infos = {i.ticker: i for i in Coinbase.instruments((FOLDER / "rest" / LISTS[0]).read_bytes())}
    real = {"USDT-USDC", "EURC-USDC", "XSGD-USDC", "TGBP-USDC", "AUDD-USDC"}
    usdc = {ticker for ticker in infos if ticker.endswith("-USDC")}
    assert {ticker for ticker in usdc if infos[ticker].active} <= real
    assert {"USDT-USDC", "EURC-USDC"} <= {ticker for ticker in usdc if infos[ticker].active}
    assert infos["BTC-USDC"].status == "alias of BTC-USD"
    assert len(usdc) > 400


@pytest.mark.parametrize("name", ["ticker.json", "trade_history.json"])
def test_rest_trades_say_when_a_stream_should_have_spoken(name: str, venue: Coinbase) -> None:
    body = (FOLDER / "rest" / name).read_bytes()
    (stream,) = Coinbase.streams_of("BTC-USD", ("trades",), Options())
    newest = max(us(t["time"]) for t in json.loads(body)["trades"])
    assert venue.newest_us(stream, body) == newest
    probe = venue.probe(stream)
    assert probe is not None
    assert probe.path == "/api/v3/brokerage/market/products/BTC-USD/ticker?limit=1"


def test_other_bodies_make_no_rows(venue: Coinbase) -> None:
    taken = {*LISTS, "ticker.json", "trade_history.json", "product.json"}
    for path in sorted((FOLDER / "rest").iterdir()):
        if path.name not in taken:
            with pytest.raises(FrameError) as refused:
                venue.http("https://api.coinbase.com/api/v3/brokerage/market/product_book", path.read_bytes())
            assert refused.value.reason == "unhandled_url"
            if not path.name.startswith(("products", "rec_")):
                with pytest.raises(msgspec.DecodeError):
                    Coinbase.instruments(path.read_bytes())
    assert not any(ring.next for ring in venue.emit.rings.values())


def test_times_of_the_recording_are_read_to_the_microsecond() -> None:
    texts = {word for i in range(len(lines())) if lines()[i]["dir"] == "in" and len(lines()[i]["raw"]) < 20_000
             for word in lines()[i]["raw"].split('"') if word[:5] == "2026-" and word.endswith("Z")}  # fmt: skip
    assert {len(text) for text in texts} >= {27, 30}
    for text in texts:
        assert time_us(text) == us(text)


# A replay, live


def test_a_replay_gives_the_connector_what_normalize_gives(tmp_path: Path) -> None:
    """`mdreplay serve` speaks to a real connector, under numbers of its own; every row is the recording's."""
    command = [sys.executable, "-m", "tools.replay", "serve", str(RECORDING), "--speed", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        connector = None
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            settings = {
                "exchange": "coinbase", "tickers": ["BTC-USD", "ETH-USD"], "feeds": list(Coinbase.FEEDS),
                "intervals": ["5m"], "ws_url": ready["ws_url"], "rest_url": ready["rest_url"],
            }  # fmt: skip
            fleet = {"rings": str(tmp_path / "rings"), "connectors": {"c": settings},
                     "writers": {"parquet": {"out": str(tmp_path / "out"), "roll_s": 0.5}}}  # fmt: skip
            (tmp_path / "fleet.toml").write_text(tomli_w.dumps(fleet))
            command = [sys.executable, "-m", "mdcollector", "connect", "c", "-c", str(tmp_path / "fleet.toml")]
            connector = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            model = Model().run(lines())
            for feed, rows in model.expected.rows.items():
                if rows:
                    until(lambda f=feed, r=rows: published(tmp_path / "rings" / "c", f) >= len(r), f"all {feed}")
            connector.send_signal(signal.SIGTERM)
            assert connector.wait(30) == 0
            for feed, rows in model.expected.rows.items():
                with RingReader(tmp_path / "rings" / "c", feed) as ring:
                    ring.seek("oldest")
                    stored = ring.read(len(rows) + 1)
                    names = ring.names(stored)
                assert len(stored) == len(rows), feed
                columns = ("timestamp", *(c for c in ("side", "price", "qty", "trade_seq", "update_id", "bid_price",
                           "bid_qty", "ask_price", "ask_qty", "last", "open", "close", "volume") if rows and c in rows[0]))  # fmt: skip
                for column in columns if rows else ():
                    assert stored[column].tolist() == [row[column] for row in rows], (feed, column)
                assert list(names) == [row["ticker"] for row in rows]
        finally:
            for process in (connector, server):
                if process is not None and process.poll() is None:
                    process.kill()


def published(directory: Path, feed: str) -> int:
    try:
        with RingReader(directory, feed) as ring:
            return ring.published
    except RingError:
        return 0
