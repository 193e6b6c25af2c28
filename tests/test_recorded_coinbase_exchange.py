"""Recorded Coinbase Exchange traffic through normalize: every stored row against plain json, every book against a plain dict."""

import json
import random
import signal
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from fleet import until
from recorded import (
    ASK,
    BID,
    DATA,
    INVALID,
    LAST,
    RESYNCED,
    SNAPSHOT,
    Expected,
    Json,
    PlainBook,
    PlainTrades,
    compare,
    entries,
    needs_data,
    plain,
    rebuild,
    run,
    same_decimal,
    table,
    told,
)
from test_decode_hostile import Probe, mutated

from mdcollector import OrderBook
from mdcollector.emit import Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import Options
from mdcollector.exchanges.coinbase_exchange import CoinbaseExchange
from mdcollector.normalize import Report, normalize
from mdcollector.recording import Entry, RecordingWriter

pytestmark = needs_data

FOLDER = DATA / "coinbase"
SAMPLE_TIME_NS = 1_796_083_200_000_000_000  # behind every sample
SMALL = {"trades": 4096, "orderbook_l2": 4096, "bbo": 512, "tickers": 512, "gaps": 512}
RECORDINGS = ("exchange_20210417", "exchange_ethusd_20260930")
TAKER = {"buy": -1, "sell": 1}  # the side that a match names is the maker's

# What becomes of every sample of this feed, as in the other tests of recordings.
SAMPLES = {
    "exch_error.json": "refused venue_error",
    "exch_l2update_01.json": "control",  # no snapshot was before it: held, and published as not proven at the end
    "exch_l2update_03.json": "control",
    "exch_l2update_04.json": "control",
    "exch_last_match.json": "trades 1",
    "exch_match_01.json": "trades 1",
    "exch_open.json": "refused unhandled_event",
    "exch_snapshot_01.json": "orderbook_l2 6",
    "exch_snapshot_03.json": "refused wrong_type",  # a quantity of 0.-10000
    "exch_subscriptions.json": "control",
    "exch_ticker_01.json": "tickers 1",
    "exch_ticker_03.json": "tickers 1",
    "exch_ticker_04.json": "bbo 1+tickers 1",
    "cap2026_error_unknown_channel.json": "refused venue_error",
    "rec_exch_heartbeat_exchange_ethusd_20260930.json": "control",
    "rec_exch_l2update_exchange_20210417.json": "control",
    "rec_exch_l2update_exchange_ethusd_20260930.json": "control",
    "rec_exch_last_match_exchange_20210417.json": "trades 1",
    "rec_exch_last_match_exchange_ethusd_20260930.json": "trades 1",
    "rec_exch_match_exchange_20210417.json": "trades 1",
    "rec_exch_match_exchange_ethusd_20260930.json": "trades 1",
    "rec_exch_snapshot_exchange_20210417.json": "orderbook_l2 318",
    "rec_exch_snapshot_exchange_ethusd_20260930.json": "orderbook_l2 300",
    "rec_exch_subscriptions_exchange_20210417.json": "control",
    "rec_exch_subscriptions_exchange_ethusd_20260930.json": "control",
    "rec_exch_ticker_exchange_20210417.json": "tickers 1",
}


def us(text: str) -> int:
    """RFC 3339 with up to six decimals; the year 1 stands for no time."""
    moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    return max(0, (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1))


def newer(local: int, _first: int, last: int, _prev: int) -> str:
    return "next" if last > local else "old"


class Model:
    """The feed by plain json. A book message's id is its time, made strictly rising."""

    def __init__(self) -> None:
        self.expected = Expected("COINBASE_EXCHANGE")
        self.books: dict[str, PlainBook] = {}
        self.trades: dict[str, PlainTrades] = {}
        self.ids: dict[str, int] = {}

    def _id(self, ticker: str, time: int) -> int:
        self.ids[ticker] = max(time, self.ids.get(ticker, -1) + 1)
        return self.ids[ticker]

    def _book(self, ticker: str) -> PlainBook:
        if ticker not in self.books:
            self.books[ticker] = PlainBook(self.expected, ticker, newer, in_band=True)
        return self.books[ticker]

    def frame(self, m: Json) -> None:
        ticker, kind, rows = m.get("product_id", ""), m["type"], self.expected.rows
        if kind in ("match", "last_match"):
            trades = self.trades.setdefault(ticker, PlainTrades(self.expected, ticker))
            id_ = m["trade_id"]
            trades.message([(id_, us(m["time"]), TAKER[m["side"]], m["price"], m["size"], str(id_))])
        elif kind == "snapshot":
            time = us(m["time"]) if "time" in m else 0
            self._book(ticker).snapshot(self._id(ticker, time), time, m["bids"], m["asks"])
        elif kind == "l2update":
            bids, asks = ([(p, q) for s, p, q in m["changes"] if s == side] for side in ("buy", "sell"))
            time = us(m["time"])
            id_ = self._id(ticker, time)
            self._book(ticker).delta(id_, id_, -1, time, bids, asks)
        elif kind == "ticker":
            head = self.expected.head(ticker, us(m["time"]), LAST)
            columns = {
                "last": "price", "open_24h": "open_24h", "high_24h": "high_24h", "low_24h": "low_24h",
                "volume_24h": "volume_24h", "bid_price": "best_bid", "ask_price": "best_ask",
            }  # fmt: skip
            absent = ("quote_volume_24h", "mark_price", "index_price", "funding_rate", "open_interest")
            given = {column: float(m[word]) for column, word in columns.items()}
            rows["tickers"].append({**head, **given, **dict.fromkeys(absent, "nan"), "next_funding_time": None})
            if "best_bid_size" in m:
                words = ("best_bid", "best_bid_size", "best_ask", "best_ask_size")
                best = dict(
                    zip(("bid_price", "bid_qty", "ask_price", "ask_qty"), (float(m[w]) for w in words), strict=True)
                )
                rows["bbo"].append({**head, **best, "update_id": m["sequence"]})
        else:
            assert kind in ("subscriptions", "heartbeat", "error"), kind

    def body(self, url: str, answer: Json) -> None:
        for p in answer if url.endswith("/products") else ():
            self.expected.instrument(
                p["id"], active=p["status"] == "online" and not p["trading_disabled"], kind="spot",
                base=p["base_currency"], quote=p["quote_currency"], status=p["status"],
                tick_size=float(p["quote_increment"]), qty_step=float(p["base_increment"]), contract_size=1.0,
                listed_time=None, expiry_time=None,
            )  # fmt: skip


def recording(name: str) -> Path:
    return FOLDER / "recorded" / f"{name}.jsonl.zst"


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    with RecordingWriter(path) as out:
        for line in lines:
            out.write(Entry(**line))
    return path


def normalized(lines: list[dict[str, Any]], tmp_path: Path) -> tuple[Report, Path]:
    report = normalize("coinbase_exchange", [write(tmp_path / "modified.jsonl", lines)], tmp_path / "out")
    return report, tmp_path / "out"


def proven(out: Path, model: Model) -> None:
    """All tables are what the model says, and a reader's books are the plain ones."""
    for feed, rows in model.expected.rows.items():
        compare(table(out, feed), rows)
    if model.expected.messages:
        rebuild(table(out, "orderbook_l2"), model.expected.messages)


def message(line: dict[str, Any]) -> Json:
    return json.loads(line["raw"]) if line["dir"] == "in" else {"type": ""}


def places(lines: list[dict[str, Any]], kind: str, ticker: str = "") -> list[int]:
    """Where the messages of a kind (and product) are."""
    return [i for i, line in enumerate(lines) if (m := message(line))["type"] == kind
            and ticker in ("", m["product_id"])]  # fmt: skip


def ledger(out: Path) -> list[tuple[Any, ...]]:
    gaps = table(out, "gaps")
    columns = ("feed", "ticker", "first_id", "last_id", "cause", "repaired")
    return sorted(zip(*(gaps[c] for c in columns), strict=True)) if gaps else []


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_row_equals_the_raw_frames(name: str, tmp_path: Path) -> None:
    report = normalize("coinbase_exchange", [recording(name)], tmp_path)
    lines = entries(recording(name))
    model = run(Model(), lines)
    assert not model.expected.rows["gaps"], "the README says that no trade is missing"
    proven(tmp_path, model)
    assert report.findings == []
    assert (report.entries, report.rows_left) == (len(lines), 0)
    assert report.rows_written == sum(len(rows) for rows in model.expected.rows.values()) > 0
    assert len(model.expected.rows["instruments"]) == (162 if name == "exchange_20210417" else 0)
    bad = ("refused_", "gap_", "book_", "protocol_drift")
    assert not [name for name, count in report.counters.items() if count and name.startswith(bad)]
    assert not any(flags & INVALID for flags in table(tmp_path, "orderbook_l2")["flags"])


@pytest.mark.parametrize("name", RECORDINGS)
def test_numbers_are_kept_as_they_were_written(name: str, tmp_path: Path) -> None:
    normalize("coinbase_exchange", [recording(name)], tmp_path)
    levels, trades = [], []
    for line in entries(recording(name)):
        m = plain(line["raw"]) if line["dir"] == "in" else {"type": ""}
        if m["type"] == "snapshot":
            levels += [(price, size) for side in ("bids", "asks") for price, size in m[side]]
        elif m["type"] == "l2update":
            levels += [(p, q) for side in ("buy", "sell") for s, p, q in m["changes"] if s == side]
        elif m["type"] in ("match", "last_match"):
            trades.append((m["price"], m["size"]))
    for feed, texts in (("orderbook_l2", levels), ("trades", trades)):
        stored = table(tmp_path, feed)
        assert len(texts) == len(stored["price"])
        for price, qty, (price_text, qty_text) in zip(stored["price"], stored["qty"], texts, strict=True):
            assert same_decimal(price, price_text)
            assert same_decimal(qty, qty_text)


@pytest.mark.parametrize("name", RECORDINGS)
def test_order_book_of_the_library_equals_the_plain_one(name: str, tmp_path: Path) -> None:
    normalize("coinbase_exchange", [recording(name)], tmp_path)
    stored = table(tmp_path, "orderbook_l2")
    rows = [dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)]
    books: dict[str, OrderBook] = {}
    at = 0
    for count, ticker, update_id, truth in run(Model(), entries(recording(name))).expected.messages:
        book = books.setdefault(ticker, OrderBook())
        book.apply(rows[at : at + count])
        at += count
        assert book.is_valid
        assert (book.update_id, book.bids, book.asks) == (update_id, truth[BID], truth[ASK])
    assert at == len(rows)


def test_best_prices_of_the_venue_are_those_of_the_stored_books(tmp_path: Path) -> None:
    """A second witness: each ticker but the greeting (of a match before the snapshot) names prices that the book has."""
    normalize("coinbase_exchange", [recording("exchange_20210417")], tmp_path)
    rows = table(tmp_path, "orderbook_l2")
    best: dict[str, set[tuple[float, float]]] = {}
    books: dict[str, OrderBook] = {}
    columns = [rows[c] for c in ("ticker", "flags")]
    whole = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    for row, ticker, flags in zip(whole, *columns, strict=True):
        books.setdefault(ticker, OrderBook()).apply([row])
        if flags & LAST:
            book = books[ticker]
            best.setdefault(ticker, set()).add((max(book.bids), min(book.asks)))
    tickers = table(tmp_path, "tickers")
    best_told: dict[str, list[tuple[float, float]]] = {}
    for name, bid, ask in zip(tickers["ticker"], tickers["bid_price"], tickers["ask_price"], strict=True):
        best_told.setdefault(name, []).append((bid, ask))
    live = [(name, pair) for name, pairs in best_told.items() for pair in pairs[1:]]
    assert len(live) == 81
    assert [(name, pair) for name, pair in live if pair not in best[name]] == []


# Frames taken out, doubled, swapped, cut


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_trade_taken_out_is_in_the_ledger_and_nothing_else(length: int, seed: int, tmp_path: Path) -> None:
    lines = entries(recording("exchange_20210417"))
    found = places(lines, "match", "SKL-USD")
    at = random.Random(seed).randrange(len(found) - length)
    out = found[at : at + length]
    kept = [line for i, line in enumerate(lines) if i not in out]
    report, tables = normalized(kept, tmp_path)
    proven(tables, run(Model(), kept))
    first, last = (message(lines[out[i]])["trade_id"] for i in (0, -1))
    assert ledger(tables) == [("trades", "SKL-USD", first, last, "sequence", False)]
    assert report.findings == ["rows of the table gaps that tell of holes: 1"]


def heartbeat(line: dict[str, Any], ticker: str, last_trade_id: int) -> dict[str, Any]:
    frame = {"type": "heartbeat", "last_trade_id": last_trade_id, "product_id": ticker, "sequence": 1,
             "time": "2021-04-17T16:44:07.000000Z"}  # fmt: skip
    return {**line, "raw": json.dumps(frame, separators=(",", ":"))}


def test_trades_missing_at_the_end_are_found_by_two_heartbeats(tmp_path: Path) -> None:
    """No later trade would tell. One heartbeat alone is not believed: it may overtake the trade that it names."""
    lines = entries(recording("exchange_20210417"))
    last = message(lines[places(lines, "match", "SKL-USD")[-1]])["trade_id"]
    once = [*lines, heartbeat(lines[-1], "SKL-USD", last), heartbeat(lines[-1], "SKL-USD", last + 2)]
    assert ledger(normalized(once, tmp_path / "once")[1]) == []
    twice = [*once, heartbeat(lines[-1], "SKL-USD", last + 5)]
    expected = [("trades", "SKL-USD", last + 1, last + 2, "sequence", False)]
    assert ledger(normalized(twice, tmp_path / "twice")[1]) == expected


def test_an_absurd_heartbeat_between_true_ones_opens_no_hole(tmp_path: Path) -> None:
    lines = entries(recording("exchange_20210417"))
    last = message(lines[places(lines, "match", "SKL-USD")[-1]])["trade_id"]
    beats = [heartbeat(lines[-1], "SKL-USD", id_) for id_ in (last, last + 10**6, last, last)]
    assert ledger(normalized([*lines, *beats], tmp_path)[1]) == []


def test_doubled_messages_are_counted_and_make_no_rows(tmp_path: Path) -> None:
    """Every book update, ticker and match twice in a row; a reader sees what he sees without."""
    lines = entries(recording("exchange_20210417"))
    normalize("coinbase_exchange", [recording("exchange_20210417")], tmp_path / "plain")
    doubled = ("l2update", "match", "ticker")
    twice = [copy for line in lines for copy in [line] * (1 + (message(line)["type"] in doubled))]
    report, tables = normalized(twice, tmp_path)
    assert report.findings == []
    assert report.counters["book_duplicate"] == len(places(lines, "l2update"))
    assert report.counters["trade_duplicate"] == len(places(lines, "match"))
    assert report.counters["ticker_duplicate"] == len(places(lines, "ticker"))
    for feed in ("trades", "orderbook_l2", "tickers"):
        a, b = table(tables, feed), table(tmp_path / "plain", feed)
        assert {name: a[name] for name in a if name != "packet_id"} == {n: b[n] for n in b if n != "packet_id"}


def test_the_match_that_a_connection_begins_with_is_stored_once(tmp_path: Path) -> None:
    """F18. A second connection greets with the last match and the last ticker of each product."""
    lines = entries(recording("exchange_20210417"))
    newest = {message(lines[i])["product_id"]: lines[i] for i in places(lines, "match")}
    tickers = {message(lines[i])["product_id"]: lines[i] for i in places(lines, "ticker")}
    at = {"t": lines[-1]["t"] + 1, "conn": lines[-1]["conn"]}
    again = [{**at, "dir": "open", "url": "wss://ws-feed.exchange.coinbase.com", "raw": ""}]
    again += [{**at, "dir": "in", "raw": line["raw"].replace('"match"', '"last_match"')} for line in newest.values()]
    again += [{**at, "dir": "in", "raw": line["raw"]} for line in tickers.values()]
    report, tables = normalized([*lines, *again], tmp_path)
    assert report.counters["trade_duplicate"] == len(newest) > 4
    assert report.counters["ticker_duplicate"] == len(tickers) > 4
    assert report.gaps == 0
    proven(tables, run(Model(), lines))


def test_a_new_connection_replaces_the_book_and_the_ledger_says_so(tmp_path: Path) -> None:
    """Updates before the new snapshot belong to no book that is known: they are counted and not applied."""
    lines = entries(recording("exchange_ethusd_20260930"))
    snapshot, *_ = places(lines, "snapshot")
    updates = places(lines, "l2update")
    at = {"t": lines[-1]["t"] + 1, "conn": lines[-1]["conn"]}
    stray = json.loads(lines[updates[0]]["raw"]) | {"time": "2026-09-30T02:03:20.000000Z"}
    fresh = json.loads(lines[snapshot]["raw"]) | {"time": "2026-09-30T02:03:21.000000Z"}
    again = [
        {**at, "dir": "open", "url": "wss://ws-feed.exchange.coinbase.com", "raw": ""},
        {**at, "dir": "in", "raw": json.dumps(stray)},
        {**at, "dir": "in", "raw": json.dumps(fresh)},
    ]
    report, tables = normalized([*lines, *again], tmp_path)
    last = us(json.loads(lines[updates[-1]]["raw"])["time"])
    assert ledger(tables) == [("orderbook_l2", "ETH-USD", last + 1, us(fresh["time"]), "reconnect", False)]
    assert report.counters["book_superseded"] == 1
    rows = table(tables, "orderbook_l2")
    assert us(stray["time"]) not in rows["update_id"]
    assert rows["flags"].count(SNAPSHOT | RESYNCED | 32) == 299


def test_updates_in_the_wrong_order_give_the_book_up(tmp_path: Path) -> None:
    """The second of two swapped ones names older quantities: nothing tells which levels are right now."""
    lines = entries(recording("exchange_20210417"))
    found = places(lines, "l2update", "NMR-EUR")
    times = [message(lines[i])["time"] for i in found]
    at = next(i for i in range(50, len(found) - 1) if times[i] < times[i + 1])
    a, b = found[at], found[at + 1]
    swapped = [dict(line) for line in lines]
    swapped[a]["raw"], swapped[b]["raw"] = lines[b]["raw"], lines[a]["raw"]
    report, tables = normalized(swapped, tmp_path)
    assert ledger(tables) == [("orderbook_l2", "NMR-EUR", us(times[at]), us(times[at + 1]) + 1, "order", False)]
    assert report.findings == ["rows of the table gaps that tell of holes: 1"]
    rows = table(tables, "orderbook_l2")
    doubted = {name for name, flags in zip(rows["ticker"], rows["flags"], strict=True) if flags & INVALID}
    assert doubted == {"NMR-EUR"}
    assert sum(1 for f in rows["flags"] if f & INVALID) == sum(
        len(message(lines[i])["changes"]) for i in found[at + 2 :]
    )


@pytest.mark.parametrize("kept", ["half", "absurd", "side"])
def test_an_update_that_cannot_be_read_gives_its_book_up(kept: str, tmp_path: Path) -> None:
    """No number would tell that it is missing, so the frame itself is the evidence; other books go on."""
    lines = entries(recording("exchange_20210417"))
    found = places(lines, "l2update", "SKL-BTC")
    at = found[20]
    broken = [dict(line) for line in lines]
    raw = lines[at]["raw"]
    broken[at]["raw"] = {
        "half": raw[: len(raw) // 2], "absurd": raw.replace(message(lines[at])["changes"][0][2], "1e300"),
        "side": raw.replace('["buy"', '["bid"').replace('["sell"', '["offer"'),
    }[kept]  # fmt: skip
    report, tables = normalized(broken, tmp_path)
    reason = {"half": "malformed", "absurd": "wrong_type", "side": "wrong_type"}[kept]
    assert report.counters[f"refused_{reason}"] == 1
    before = table(tables, "orderbook_l2")
    last = [i for i, t, f in zip(before["update_id"], before["ticker"], before["flags"], strict=True)
            if t == "SKL-BTC" and not f & INVALID][-1]  # fmt: skip
    assert ledger(tables) == [("orderbook_l2", "SKL-BTC", last + 1, last + 1, "refused", False)]


def test_a_book_is_believed_again_from_the_next_snapshot_on(tmp_path: Path) -> None:
    lines = entries(recording("exchange_20210417"))
    found = places(lines, "l2update", "SKL-BTC")
    truth = {i: book for _, name, i, book in run(Model(), lines).expected.messages if name == "SKL-BTC"}
    lost, at = found[20], found[60]
    book = truth[us(message(lines[at])["time"])]
    frame = {"type": "snapshot", "product_id": "SKL-BTC"} | {
        side: [[repr(p), repr(q)] for p, q in book[number].items()] for side, number in (("asks", ASK), ("bids", BID))
    }
    half = {**lines[lost], "raw": lines[lost]["raw"][:60]}
    snapshot = {**lines[at], "raw": json.dumps(frame)}  # spelled with blanks: the slow path must take it as well
    changed = [*lines[:lost], half, *lines[lost + 1 : at + 1], snapshot, *lines[at + 1 :]]
    report, tables = normalized(changed, tmp_path)
    assert report.counters["book_superseded"] == 40
    rows = table(tables, "orderbook_l2")
    assert not any(flags & INVALID for flags in rows["flags"])
    mine = OrderBook()
    whole = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    mine.apply([row for row in whole if row["ticker"] == "SKL-BTC"])
    final = list(truth.values())[-1]
    assert (mine.bids, mine.asks) == (final[BID], final[ASK])


# Samples and REST bodies


def test_the_table_names_every_sample_of_this_feed() -> None:
    mine = [p.name for p in (FOLDER / "samples").iterdir() if p.name.startswith(("exch_", "rec_exch_"))]
    assert {*mine, "cap2026_error_unknown_channel.json"} == set(SAMPLES)


@pytest.mark.parametrize(("name", "outcome"), SAMPLES.items())
def test_sample(name: str, outcome: str, tmp_path: Path) -> None:
    raw = (FOLDER / "samples" / name).read_text()
    line = {"t": SAMPLE_TIME_NS, "conn": "sample", "dir": "in", "raw": raw}
    report = normalize("coinbase_exchange", [write(tmp_path / "sample.jsonl", [line])], tmp_path / "out")
    refused = [c.removeprefix("refused_") for c in report.counters if c.startswith("refused_")]
    if "l2update" in name:
        (flags,) = set(table(tmp_path / "out", "orderbook_l2")["flags"][-1:])
        assert flags & INVALID
        report.rows["orderbook_l2"] = 0
    rows = "+".join(f"{feed} {count}" for feed, count in sorted(report.rows.items()) if count)
    assert (rows or ("refused " + refused[0] if refused else "control")) == outcome
    assert len(refused) == outcome.startswith("refused")
    if refused:
        assert report.samples[f"refused_{refused[0]}"].endswith(raw[:512])
    else:
        proven(tmp_path / "out", run(Model(), [line]))


@pytest.fixture
def venue(tmp_path: Path) -> Any:
    kind = CoinbaseExchange
    emit = Emit(tmp_path / "rings", "t", kind.EXCHANGE, kind.FEEDS, semaphore=False, capacities=SMALL)
    emit.packet(SAMPLE_TIME_NS, emit.clock())
    yield kind(emit, Options(), [], open_world=True)
    emit.close()


def test_products_body() -> None:
    raw = (FOLDER / "rest" / "rec_products_exchange_20210417.json").read_bytes()
    listed = json.loads(raw)
    listed[3]["status"], listed[4]["trading_disabled"] = "delisted", True  # none is in the recording
    raw = json.dumps(listed).encode()
    model = Model()
    model.body("https://api.exchange.coinbase.com/products", listed)
    said = {info.ticker: told(info) for info in CoinbaseExchange.instruments(raw)}
    assert said == model.expected.instruments
    assert sum(not i.active for i in CoinbaseExchange.instruments(raw)) == 2


def test_other_bodies_make_no_rows(venue: Any) -> None:
    """What the recordings hold beside the products: none of it is asked for."""
    names = ("cap2025_exchange_ticker_btc.json", "cap2025_exchange_ticker_eth.json", "cap2025_exchange_candles_1m.json")
    for name in names:
        body = (FOLDER / "rest" / name).read_bytes()
        with pytest.raises(FrameError) as refused:
            venue.http("https://api.exchange.coinbase.com/products/BTC-USD/" + name.split("_")[2], body)
        assert refused.value.reason == "unhandled_url"
        with pytest.raises(msgspec.DecodeError):
            venue.http("https://api.exchange.coinbase.com/products/BTC-USD/trades?after=10&limit=5", body)
        with pytest.raises(msgspec.DecodeError):
            CoinbaseExchange.instruments(body)
    assert sum(ring.next for ring in venue.emit.rings.values()) == 0


@pytest.mark.parametrize("text", ["x", "-1", "9" * 30, "1.5"])
def test_a_repair_whose_url_makes_no_sense_is_refused(text: str, venue: Any) -> None:
    with pytest.raises(FrameError):
        venue.http(f"https://api.exchange.coinbase.com/products/BTC-USD/trades?after={text}&limit=5", b"[]")


# Frames that are no good


@pytest.mark.parametrize("seed", range(3))
def test_mutated_frames(seed: int, tmp_path: Path) -> None:
    """Real frames bent in all ways: at most they cost a whole book a snapshot (cut, they may be of any)."""
    rng, one = random.Random(seed), Probe("coinbase_exchange", tmp_path, ())
    frames = [
        json.dumps(json.loads((FOLDER / "samples" / name).read_text()), separators=(",", ":")) for name in SAMPLES
    ]
    frames += [line["raw"] for line in entries(recording("exchange_ethusd_20260930")) if line["dir"] == "in"]
    frames += [line["raw"] for line in entries(recording("exchange_20210417"))[2000:2300] if line["dir"] == "in"]
    frames = [frame for frame in frames if len(frame) < 20_000]
    calm: Json = {"product_id": "CALM-USD"}
    truth: dict[float, float] = {}
    assert one.feed({"type": "snapshot", **calm, "bids": [], "asks": []})
    for i in range(1, 4001):
        one.feed(mutated(rng.choice(frames), rng))
        if i % 10:
            continue
        n, price, size = i // 10, rng.randrange(1, 9), rng.randrange(0, 4)
        if one.venue.books["CALM-USD"].state != "live":
            assert one.feed({"type": "snapshot", **calm, "bids": list(truth.items()), "asks": []})
        truth[float(price)] = float(size)
        at = f"2026-11-24T02:{n // 60:02d}:{n % 60:02d}.000000Z"
        assert one.feed(
            {"type": "match", "trade_id": n, "side": "buy", "size": "2", "price": "1.5", **calm, "time": at}
        )
        assert one.feed({"type": "l2update", **calm, "changes": [["buy", str(price), str(size)]], "time": at})
        one.venue.tick(one.now_ns)
        one.venue.wants.clear()
    for _ in one.venue.finish():
        pass
    assert one.refused > 1000, "the mutations do not bite"
    assert sum(ring.next for ring in one.emit.rings.values()) > 1100, "nothing at all gets through"
    assert one.trades("CALM-USD") == list(range(1, 401))
    assert one.venue.books["CALM-USD"].book() == ({p: q for p, q in truth.items() if q}, {})
    assert one.venue.books["CALM-USD"].state == "live"
    one.sane()
    one.emit.close()


# Played back to a real connector


def stored_rows(out: Path, feed: str) -> int:
    return sum(pq.read_metadata(path).num_rows for path in (out / feed).rglob("*.parquet"))


def test_a_connector_collects_what_mdreplay_plays(tmp_path: Path) -> None:
    """Server and collector are processes; trades, books and tickers are those of the frames, whatever came between."""
    path, out = recording("exchange_20210417"), tmp_path / "out"
    model = run(Model(), entries(path))
    wanted = {feed: len(model.expected.rows[feed]) for feed in ("trades", "orderbook_l2", "tickers")}
    names = sorted({row["ticker"] for row in model.expected.rows["trades"]})
    serve = [sys.executable, "-m", "tools.replay", "serve", path, "--speed", "max"]
    with subprocess.Popen(list(map(str, serve)), stdout=subprocess.PIPE, text=True) as server, ExitStack() as stack:
        stack.callback(server.kill)
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        assert ready["exchange"] == "coinbase_exchange"
        urls = ["--ws-url", ready["ws_url"], "--rest-url", ready["rest_url"]]
        command = [sys.executable, "-m", "mdcollector", "run", "coinbase_exchange", *names, "--feeds", ",".join(wanted),
                   "--target", str(out), "--roll-s", "0.5", *urls]  # fmt: skip
        collector = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        stack.callback(collector.kill)
        until(lambda: all(stored_rows(out, feed) >= n for feed, n in wanted.items()), "all rows are stored", 60)
        collector.send_signal(signal.SIGTERM)
        assert collector.wait(60) == 0
    local = {"rcv_timestamp", "packet_id", "parse_ns", "publish_ns", "flags"}  # of this run, not of the recording's
    for feed, count in wanted.items():
        own = local | ({"timestamp"} if feed == "orderbook_l2" else set())  # snapshots of 2021 have no time
        expected = [{k: v for k, v in row.items() if k not in own} for row in model.expected.rows[feed]]
        compare({name: values[:count] for name, values in table(out, feed).items()}, expected)
