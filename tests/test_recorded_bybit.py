"""Recorded Bybit traffic through normalize: every stored row against plain json, every book against a plain dict.

Also what the dialogue with the venue demands and no recording shows: refused batches, late replies, pings.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from recorded import (
    ASK,
    BID,
    DATA,
    INVALID,
    LAST,
    RESYNCED,
    Expected,
    PlainBook,
    compare,
    entries,
    needs_data,
    rebuild,
    run,
    same_decimal,
    table,
)

from mdcollector import OrderBook
from mdcollector.emit import Emit
from mdcollector.errors import ConfigError, FrameError, RateLimited
from mdcollector.exchanges import Fetch, Options, Send, Venue, venue_class
from mdcollector.exchanges.bybit import Bybit
from mdcollector.normalize import Report, normalize
from mdcollector.recording import Entry, RecordingWriter

pytestmark = needs_data

FOLDER = DATA / "bybit"
CATEGORIES = ("spot", "linear", "inverse", "option")
SAMPLE_TIME_NS = 1_796_083_200_000_000_000  # behind every sample, so that no time of theirs lies in the future
SMALL = dict.fromkeys(("trades", "orderbook_l2", "bbo", "tickers", "candles", "liquidations", "gaps"), 4096)
LINEAR = "linear_20260809"
RECORDINGS = {LINEAR: "bybit_linear", "spot_20250613": "bybit_spot", "ob500_xrpusdt_20241201": "bybit_linear"}
BOOKS = (LINEAR, "ob500_xrpusdt_20241201")
REPAIRED = 16
INTERVALS = {"1": "1m", "5": "5m", "M": "1M"}

# What becomes of every sample, category by category where it is not the same: rows of a feed | refused for a reason |
# control (a reply or notice; no row belongs to it).
NO_TOPIC, MADE_UP = "refused unhandled_topic", "refused unknown_symbol"
FORCED = {"spot": NO_TOPIC, "linear": "liquidations 1", "option": NO_TOPIC}
BEST = {"linear": "bbo 1", "option": NO_TOPIC}
DELTA_OF_BEST = {"linear": "refused unknown_book_type", "option": NO_TOPIC}
BAR = {"linear": "candles 1", "option": NO_TOPIC}
OPTIONS_TRADE = {"linear": MADE_UP, "option": "trades 1"}
TICKER_DELTA = {
    "spot": "refused unknown_ticker_type", "linear": "refused delta_before_snapshot",
    "option": "refused unknown_ticker_type",
}  # fmt: skip
SAMPLES: dict[str, str | dict[str, str]] = {
    "ack_linear_liquidations.json": "control",
    "ack_option_book.json": "control",
    "ack_option_klines.json": "control",
    "ack_option_ticker.json": "control",
    "ack_option_trades.json": "control",
    "ack_spot_price_limit.json": "control",
    "allliquidation_snapshot.json": FORCED,
    "auth_failure.json": "refused unhandled_event",
    "auth_success.json": "refused unhandled_event",
    "cap2026_allliquidation_01.json": FORCED,
    "cap2026_allliquidation_03.json": FORCED,
    "cap2026_allliquidation_multi.json": {**FORCED, "linear": "liquidations 2"},
    "cap2026_publictrade_linear.json": "trades 2",
    "cap2026_subscribe_ack_after_data.json": "control",
    "cap2026_tickers_linear_snapshot.json": "tickers 1",
    "doc_all_liquidation.json": FORCED,
    "doc_full_ob.json": NO_TOPIC,
    "doc_insurance_pool_01.json": "control",
    "doc_order_price_limit.json": "control",
    "doc_orderbook.json": "orderbook_l2 12",
    "doc_orderbook_rpi_01.json": "control",
    "doc_orderbook_rpi_03.json": NO_TOPIC,
    "doc_trade.json": "trades 1",
    "gct_tickers_inverse_delta.json": TICKER_DELTA,
    "gct_tickers_inverse_snapshot.json": "tickers 1",
    "gct_tickers_option_snapshot.json": "tickers 1",
    "kline.json": BAR,
    "linear_liquidations.json": FORCED,
    "linear_ticker.json": "tickers 1",
    "linear_trades.json": "trades 1",
    "liquidation_snapshot_01.json": NO_TOPIC,
    "op_ping.json": "control",
    "op_subscribe.json": "control",
    "option_book.json": "orderbook_l2 4",
    "option_klines.json": BAR,
    "option_ticker.json": MADE_UP,
    "option_trades.json": OPTIONS_TRADE,
    "orderbook.1_delta_01.json": DELTA_OF_BEST,
    "orderbook.1_delta_03.json": DELTA_OF_BEST,
    "orderbook.1_snapshot_01.json": BEST,
    "orderbook.25_delta.json": "orderbook_l2 2",
    "orderbook.25_snapshot_01.json": "orderbook_l2 1",
    "orderbook.50_delta_01.json": "orderbook_l2 2",
    "orderbook.50_snapshot_01.json": "orderbook_l2 2",
    "orderbook_delta.json": DELTA_OF_BEST,
    "orderbook_snapshot.json": BEST,
    "public_trade.json": NO_TOPIC,
    "publictrade.btcusdt_snapshot.json": NO_TOPIC,
    "publictrade_snapshot_01.json": "trades 1",
    "publictrade_snapshot_03.json": "trades 1",
    "publictrade_snapshot_04.json": OPTIONS_TRADE,
    "publictrade_snapshot_06.json": "trades 1",
    "rec_kline.1_snapshot_linear_20260809.json": BAR,
    "rec_op_subscribe_linear_20260809.json": "control",
    "rec_op_subscribe_spot_20250613.json": "control",
    "rec_orderbook.1_snapshot_spot_20250613.json": BEST,
    "rec_orderbook.200_delta_linear_20260809.json": "orderbook_l2 22",
    "rec_orderbook.200_snapshot_linear_20260809.json": "orderbook_l2 400",
    "rec_orderbook.500_delta_ob500_xrpusdt_20241201.json": "orderbook_l2 35",
    "rec_orderbook.500_snapshot_ob500_xrpusdt_20241201.json": "orderbook_l2 1000",
    "rec_publictrade_snapshot_linear_20260809.json": "trades 1",
    "rec_tickers_delta_linear_20260809.json": TICKER_DELTA,
    "rec_tickers_snapshot_linear_20260809.json": "tickers 1",
    "roq_auth_01.json": "refused unhandled_event",
    "roq_auth_2_01.json": "refused unhandled_event",
    "roq_order_book_02.json": "orderbook_l2 100",
    "roq_order_book_03.json": "orderbook_l2 1",
    "roq_public_trade_01.json": "trades 1",
    "roq_subscribe_01.json": "control",
    "roq_subscribe_03.json": "control",
    "roq_subscribe_04.json": "control",
    "roq_tickers_02.json": "tickers 1",
    "roq_tickers_03.json": "tickers 1",
    "spot_price_limit.json": NO_TOPIC,
    "spot_system_status.json": NO_TOPIC,
    "spot_ticker.json": "tickers 1",
    "subscription_ack.json": "control",
    "subscription_failure.json": "control",
    "ticker_linear.json": "tickers 1",
    "ticker_option.json": "tickers 1",
    "tickers_delta_01.json": TICKER_DELTA,
    "tickers_snapshot_01.json": "tickers 1",
    "tickers_snapshot_03.json": "tickers 1",
    "tickers_snapshot_04.json": "tickers 1",
}


def _judge(local: int, _first: int, last: int, _prev: int) -> str:
    if last <= local:
        return "old"
    return "next" if last == local + 1 else "hole"


def told(i: Any, category: str) -> dict[str, Any]:
    """What an element of a list of instruments says, as the columns have it."""
    lot, phase = i["lotSizeFilter"], (i.get("preListingInfo") or {}).get("curAuctionPhase")
    kind = i.get("contractType", category)
    return {
        "active": i["status"] == "Trading" or (i["status"], phase) == ("PreLaunch", "ContinuousTrading"),
        "kind": "perpetual" if kind.endswith("Perpetual") else "future" if kind.endswith("Futures") else kind,
        "base": i["baseCoin"], "quote": i["quoteCoin"], "status": i["status"],
        "tick_size": float(i["priceFilter"]["tickSize"]),
        "qty_step": float(lot.get("qtyStep") or lot["basePrecision"]), "contract_size": 1.0,
        "listed_time": int(i.get("launchTime", 0)) * 1000 or None,
        "expiry_time": int(i.get("deliveryTime", 0)) * 1000 or None,
    }  # fmt: skip


class BybitModel:
    """Bybit by plain json, from exchange-protocols section 7 and the column docs of records.py."""

    def __init__(self, category: str = "linear") -> None:
        self.category = category
        self.expected = Expected(f"BYBIT_{category.upper()}")
        self.expected.rows["liquidations"] = []
        self.books: dict[str, PlainBook] = {}
        self.best: dict[str, int] = {}
        self.tickers: dict[str, dict[str, str]] = {}
        self.trade_ids: set[tuple[str, str]] = set()

    def frame(self, message: Any) -> None:
        kind, _, rest = message.get("topic", "").partition(".")
        if not kind:
            return
        if kind == "orderbook":
            self._book(rest.partition(".")[0], message)
        else:
            {
                "publicTrade": self._trades, "tickers": self._ticker, "kline": self._kline,
                "allLiquidation": self._liquidations,
            }[kind](message)  # fmt: skip

    def _book(self, depth: str, message: Any) -> None:
        data, time = message["data"], int(message.get("cts", message["ts"])) * 1000
        name, levels = data["s"], ([tuple(x) for x in data["b"]], [tuple(x) for x in data["a"]])
        if depth == "1":
            if self.best.get(name) != data["u"]:
                best = [float(x) for side in levels for x in (side[0] if side else ("nan", "0"))]
                names = ("bid_price", "bid_qty", "ask_price", "ask_qty")
                row = {**self.expected.head(name, time, LAST), **dict(zip(names, best, strict=True))}
                self.expected.rows["bbo"].append({**row, "update_id": data["u"]})
            self.best[name] = data["u"]
            return
        book = self.books.setdefault(name, PlainBook(self.expected, name, _judge, in_band=True))
        if message["type"] == "snapshot" or data["u"] == 1:
            book.snapshot(data["u"], time, *levels)
        else:
            book.delta(data["u"], data["u"], -1, time, *levels)

    def _trades(self, message: Any) -> None:
        rows = []
        for t in message["data"]:
            if (t["s"], t["i"]) in self.trade_ids:
                self.expected.counters["trade_duplicate"] += 1
                continue
            self.trade_ids.add((t["s"], t["i"]))
            rows.append(
                {
                    **self.expected.head(t["s"], t["T"] * 1000, 0), "side": {"Buy": 1, "Sell": -1}[t["S"]],
                    "price": float(t["p"]), "qty": float(t["v"]), "trade_seq": None, "trade_id": t["i"],
                }
            )  # fmt: skip
            self.expected.texts.append((t["p"], t["v"]))
        for row in rows[-1:]:
            row["flags"] |= LAST
        self.expected.rows["trades"] += rows

    def _ticker(self, message: Any) -> None:
        name = message["data"]["symbol"]
        before = {} if message["type"] == "snapshot" or "type" not in message else self.tickers[name]
        data = self.tickers[name] = {**before, **message["data"]}

        def number(*keys: str) -> Any:
            texts = [data[key] for key in keys if data.get(key, "") != ""]
            return float(texts[0]) if texts else "nan"

        def price(*keys: str) -> Any:
            return number(*keys) or "nan"

        volume, turnover = number("volume24h"), number("turnover24h")
        if self.category == "inverse":
            volume, turnover = turnover, volume
        due = data.get("nextFundingTime", "")
        row = {
            "last": number("lastPrice"), "open_24h": number("prevPrice24h"), "high_24h": number("highPrice24h"),
            "low_24h": number("lowPrice24h"), "volume_24h": volume, "quote_volume_24h": turnover,
            "bid_price": price("bid1Price", "bidPrice"), "ask_price": price("ask1Price", "askPrice"),
            "mark_price": number("markPrice"), "index_price": number("indexPrice"),
            "funding_rate": number("fundingRate"), "open_interest": number("openInterest"),
            "next_funding_time": int(due) * 1000 if due else None,
        }  # fmt: skip
        self.expected.rows["tickers"].append({**self.expected.head(name, message["ts"] * 1000, LAST), **row})

    def _kline(self, message: Any) -> None:
        _, interval, name = message["topic"].split(".")
        for k in message["data"]:
            self.expected.rows["candles"].append(
                {
                    **self.expected.head(name, k["timestamp"] * 1000, LAST), "interval": INTERVALS[interval],
                    "open_time": k["start"] * 1000, "open": float(k["open"]), "high": float(k["high"]),
                    "low": float(k["low"]), "close": float(k["close"]), "closed": k["confirm"], "trades": None,
                    "volume": float(k["turnover"] if self.category == "inverse" else k["volume"]),
                }
            )  # fmt: skip

    def _liquidations(self, message: Any) -> None:
        for x in message["data"]:
            forced = {"Buy": -1, "Sell": 1}[x["S"]]  # a long position is closed by selling
            head = self.expected.head(x["s"], x["T"] * 1000, LAST)
            self.expected.rows["liquidations"].append(
                {**head, "side": forced, "price": float(x["p"]), "qty": float(x["v"])}
            )

    def body(self, url: str, answer: Any) -> None:
        """A list of instruments is the only answer that a recording holds."""
        assert "/v5/market/instruments-info?" in url
        for i in answer["result"]["list"]:
            self.expected.instrument(i["symbol"], **told(i, answer["result"]["category"]))


def recording(name: str) -> Path:
    return FOLDER / "recorded" / f"{name}.jsonl.zst"


def model_of(name: str) -> BybitModel:
    return BybitModel(RECORDINGS[name].removeprefix("bybit_"))


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    with RecordingWriter(path) as out:
        for line in lines:
            out.write(Entry(**line))
    return path


def normalized(lines: list[dict[str, Any]], tmp_path: Path) -> tuple[Report, Path, BybitModel]:
    """A recording of these lines through the product, and by plain json."""
    report = normalize("bybit_linear", [write(tmp_path / "modified.jsonl", lines)], tmp_path / "out")
    return report, tmp_path / "out", run(BybitModel(), lines)


def proven(out: Path, model: BybitModel) -> None:
    """All tables are what the model says, and a reader's books are the plain ones."""
    for feed, rows in model.expected.rows.items():
        compare(table(out, feed), rows)
    if model.expected.messages:
        rebuild(table(out, "orderbook_l2"), model.expected.messages)


def message_of(line: dict[str, Any], topic: str) -> dict[str, Any]:
    """The message of a line if its topic begins so, else nothing."""
    message: dict[str, Any] = json.loads(line["raw"]) if line["dir"] == "in" else {}
    return message if message.get("topic", "").startswith(topic) else {}


def changes(lines: list[dict[str, Any]], ticker: str = "") -> list[int]:
    """Where the deltas of books are (of one instrument), the last one of each instrument left out."""
    found = [i for i, line in enumerate(lines) if message_of(line, "orderbook.").get("type") == "delta"]
    last = {message_of(lines[i], "orderbook.")["data"]["s"]: i for i in found}
    names = {i: message_of(lines[i], "orderbook.")["data"]["s"] for i in found}
    return [i for i in found if last[names[i]] != i and ticker in ("", names[i])]


def ledger(out: Path) -> list[tuple[Any, ...]]:
    gaps = table(out, "gaps")
    columns = ("feed", "ticker", "first_id", "last_id", "cause", "repaired")
    return sorted(zip(*(gaps[c] for c in columns), strict=True), key=str) if gaps else []


# Recordings as they are


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_row_equals_the_raw_frames(name: str, tmp_path: Path) -> None:
    report = normalize(RECORDINGS[name], [recording(name)], tmp_path)
    lines = entries(recording(name))
    model = run(model_of(name), lines)
    assert not model.expected.rows["gaps"], "the README says that no frame is missing"
    proven(tmp_path, model)
    assert report.findings == []
    assert (report.entries, report.rows_left) == (len(lines), 0)
    assert report.rows_written == sum(len(rows) for rows in model.expected.rows.values()) > 0
    assert not [c for c in report.counters if c.startswith(("refused_", "gap_")) or c == "protocol_drift"]
    assert not any(flags & INVALID for flags in table(tmp_path, "orderbook_l2").get("flags", []))


def test_best_prices_that_are_repeated_make_one_row(tmp_path: Path) -> None:
    """F7. Each 3 s of silence the venue sends the same `u` again, under a new `seq`."""
    report = normalize("bybit_spot", [recording("spot_20250613")], tmp_path)
    stored = table(tmp_path, "bbo")
    told = [d for line in entries(recording("spot_20250613")) if (d := message_of(line, "orderbook.1").get("data"))]
    assert len(set(zip(stored["ticker"], stored["update_id"], strict=True))) == len(stored["update_id"])
    assert report.counters["bbo_repeated"] == len(told) - len(stored["update_id"]) == 45


@pytest.mark.parametrize("name", BOOKS)
def test_numbers_are_kept_as_they_were_written(name: str, tmp_path: Path) -> None:
    normalize(RECORDINGS[name], [recording(name)], tmp_path)
    seen = [level for line in entries(recording(name)) if (m := message_of(line, "orderbook."))
            for side in ("b", "a") for level in m["data"][side]]  # fmt: skip
    stored = table(tmp_path, "orderbook_l2")
    for (price, qty), stored_price, stored_qty in zip(seen, stored["price"], stored["qty"], strict=True):
        assert same_decimal(stored_price, price)
        assert same_decimal(stored_qty, qty)
    trades = [t for line in entries(recording(name)) for t in message_of(line, "publicTrade").get("data", [])]
    stored = table(tmp_path, "trades")
    for trade, price, qty in zip(trades, stored.get("price", ()), stored.get("qty", ()), strict=True):
        assert same_decimal(price, trade["p"])
        assert same_decimal(qty, trade["v"])


@pytest.mark.parametrize("name", BOOKS)
def test_order_book_of_the_library_equals_the_plain_one(name: str, tmp_path: Path) -> None:
    normalize(RECORDINGS[name], [recording(name)], tmp_path)
    stored = table(tmp_path, "orderbook_l2")
    rows = [dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)]
    books: dict[str, OrderBook] = {}
    at = 0
    for count, ticker, update_id, truth in run(model_of(name), entries(recording(name))).expected.messages:
        book = books.setdefault(ticker, OrderBook())
        book.apply(rows[at : at + count])
        at += count
        assert book.is_valid
        assert (book.update_id, book.bids, book.asks) == (update_id, truth[BID], truth[ASK])
    assert at == len(rows)


def test_names_in_another_order_are_understood(tmp_path: Path) -> None:
    """The order of the names differs between products, so nothing may hang on it."""
    lines = entries(recording(LINEAR))
    normalize("bybit_linear", [recording(LINEAR)], tmp_path / "plain")
    turned = [{**line, "raw": json.dumps(dict(reversed(json.loads(line["raw"]).items())))} if line["dir"] == "in" else line
              for line in lines]  # fmt: skip
    report, out, model = normalized(turned, tmp_path)
    proven(out, model)
    assert not [c for c in report.counters if c.startswith("refused_")]
    for feed in ("trades", "orderbook_l2", "tickers", "candles"):
        assert table(out, feed) == table(tmp_path / "plain", feed)


# Frames taken out, doubled, swapped, put in


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_change_taken_out_is_in_the_ledger_and_nothing_else(length: int, seed: int, tmp_path: Path) -> None:
    """F2. One book breaks, the three others do not notice."""
    lines = entries(recording(LINEAR))
    rng = random.Random(seed)
    ticker = rng.choice(("BTCUSDT", "ETHUSDT", "SOLUSDT", "DOGEUSDT"))
    places = changes(lines, ticker)
    at = rng.randrange(len(places) - length + 1)
    out = places[at : at + length]
    report, tables, model = normalized([line for i, line in enumerate(lines) if i not in out], tmp_path)
    proven(tables, model)
    first, last = (message_of(lines[i], "orderbook.")["data"]["u"] for i in (out[0], out[-1]))
    assert ledger(tables) == [("orderbook_l2", ticker, first, last, "sequence", False)]
    assert report.findings == ["rows of the table gaps that tell of holes: 1"]
    stored = table(tables, "orderbook_l2")
    doubted = {(name, u) for name, u, flags in zip(
        stored["ticker"], stored["update_id"], stored["flags"], strict=True) if flags & INVALID}  # fmt: skip
    behind = {(ticker, m["data"]["u"]) for line in lines
              if (m := message_of(line, "orderbook.")) and m["data"]["s"] == ticker and m["data"]["u"] > last}  # fmt: skip
    assert doubted == behind


def with_snapshot(lines: list[dict[str, Any]], at: int, u: int) -> list[dict[str, Any]]:
    """The recording with a snapshot of the true book put in behind the delta at `at`, numbered `u` from there on."""
    ticker = message_of(lines[at], "orderbook.")["data"]["s"]
    true_u = message_of(lines[at], "orderbook.")["data"]["u"]
    book = next(
        b for _, name, last, b in run(BybitModel(), lines).expected.messages if (name, last) == (ticker, true_u)
    )
    message = message_of(lines[at], "orderbook.")
    sides = {"b": book[BID], "a": book[ASK]}
    data = {key: [[repr(p), repr(q)] for p, q in levels.items()] for key, levels in sides.items()}
    snapshot = {**message, "type": "snapshot", "data": {"s": ticker, **data, "u": u, "seq": message["data"]["seq"]}}
    behind = []
    for line in lines[at + 1 :]:
        if (m := message_of(line, "orderbook.")) and m["data"]["s"] == ticker:
            m["data"]["u"] += u - true_u
            behind.append({**line, "raw": json.dumps(m, separators=(",", ":"))})
        else:
            behind.append(line)
    return [*lines[: at + 1], {**lines[at], "raw": json.dumps(snapshot, separators=(",", ":"))}, *behind]


def test_a_snapshot_that_nobody_asked_for_replaces_the_book(tmp_path: Path) -> None:
    """F7. It repeats what the live book is already: no hole, and the next delta follows."""
    lines = entries(recording(LINEAR))
    at = changes(lines, "ETHUSDT")[100]
    u = message_of(lines[at], "orderbook.")["data"]["u"]
    _, tables, model = normalized(with_snapshot(lines, at, u), tmp_path)
    proven(tables, model)
    assert ledger(tables) == []
    stored = table(tables, "orderbook_l2")
    again = {(name, u) for name, u, flags in zip(
        stored["ticker"], stored["update_id"], stored["flags"], strict=True) if flags & RESYNCED}  # fmt: skip
    assert again == {("ETHUSDT", u)}
    assert not any(flags & INVALID for flags in stored["flags"])


def test_u_1_begins_the_book_anew(tmp_path: Path) -> None:
    """F7. The venue restarted: `u` counts from 1 again. The ledger says that something may lie between."""
    lines = entries(recording(LINEAR))
    at = changes(lines, "ETHUSDT")[100]
    _, tables, model = normalized(with_snapshot(lines, at, 1), tmp_path)
    assert ledger(tables) == [("orderbook_l2", "ETHUSDT", 1, 1, "snapshot", False)]
    model.expected.rows["gaps"] = []  # the model knows of no such row
    compare(table(tables, "orderbook_l2"), model.expected.rows["orderbook_l2"])
    rebuild(table(tables, "orderbook_l2"), model.expected.messages)
    assert not any(flags & INVALID for flags in table(tables, "orderbook_l2")["flags"])


def test_a_broken_book_is_believed_again_from_the_next_snapshot_on(tmp_path: Path) -> None:
    lines = entries(recording(LINEAR))
    places = changes(lines, "SOLUSDT")
    at = places[60]
    u = message_of(lines[at], "orderbook.")["data"]["u"]
    whole = with_snapshot(lines, at, u)
    gone = message_of(lines[places[20]], "orderbook.")["data"]["u"]
    _, tables, model = normalized([*whole[: places[20]], *whole[places[20] + 1 :]], tmp_path)
    proven(tables, model)
    told = [(gone, gone), (gone + 1, u)]
    assert ledger(tables) == [("orderbook_l2", "SOLUSDT", *ids, "sequence", False) for ids in told]
    stored = table(tables, "orderbook_l2")
    assert not any(flags & INVALID for flags in stored["flags"]), "what was held is in the snapshot"
    assert {name for name, flags in zip(stored["ticker"], stored["flags"], strict=True) if flags & RESYNCED} == {
        "SOLUSDT"
    }


COLUMNS = ("update_id", "timestamp", "side", "action", "price", "qty", "flags")


def _books(out: Path) -> dict[str, list[tuple[Any, ...]]]:
    stored, rows = table(out, "orderbook_l2"), {}
    for ticker, *values in zip(stored["ticker"], *(stored[c] for c in COLUMNS), strict=True):
        rows.setdefault(ticker, []).append(tuple(values))
    return rows


def test_doubled_and_swapped_changes_lose_nothing(tmp_path: Path) -> None:
    """F11."""
    lines = entries(recording(LINEAR))
    normalize("bybit_linear", [recording(LINEAR)], tmp_path / "plain")
    places = changes(lines, "BTCUSDT")
    twice = set(random.Random(3).sample(places[:100], 30))
    modified = [dict(line) for line in lines]
    holes = []
    for a, b in zip(places[100:160:3], places[101:161:3], strict=True):
        modified[a]["raw"], modified[b]["raw"] = lines[b]["raw"], lines[a]["raw"]
        u = message_of(lines[a], "orderbook.")["data"]["u"]
        holes += [("orderbook_l2", "BTCUSDT", u, u, *end) for end in (("reordered", True), ("sequence", False))]
    report, tables, _ = normalized(
        [c for i, line in enumerate(modified) for c in [line] * (1 + (i in twice))], tmp_path
    )
    assert report.counters["book_duplicate"] == 30
    assert ledger(tables) == sorted(holes, key=str)
    assert _books(tables) == _books(tmp_path / "plain")


def test_doubled_trades_make_one_row(tmp_path: Path) -> None:
    """F11, F18. There is no counter: the id tells that a trade was seen before."""
    lines = entries(recording(LINEAR))
    twice = [copy for line in lines for copy in [line] * (1 + bool(message_of(line, "publicTrade")))]
    report, tables, model = normalized(twice, tmp_path)
    proven(tables, model)
    assert report.counters["trade_duplicate"] == model.expected.counters["trade_duplicate"] == 327
    assert ledger(tables) == []


def test_what_a_reconnect_cost_is_recorded_by_time(tmp_path: Path) -> None:
    """Trades without a counter: the next one behind the reconnect is preceded by a row in `gaps`."""
    lines = entries(recording(LINEAR))
    times = [message_of(line, "publicTrade.BTCUSDT") for line in lines]
    places = [i for i, m in enumerate(times) if m]
    before, behind = places[2], places[-2]
    opened = {
        "t": lines[behind]["t"],
        "conn": "BYBIT.ws.2",
        "dir": "open",
        "url": "wss://x/v5/public/linear",
        "raw": "",
    }
    cut = [*lines[: before + 1], opened, *lines[behind:]]
    report = normalize("bybit_linear", [write(tmp_path / "modified.jsonl", cut)], tmp_path / "out")
    gaps = table(tmp_path / "out", "gaps")
    of_btc = [i for i, (feed, name) in enumerate(zip(gaps["feed"], gaps["ticker"], strict=True))
              if (feed, name) == ("trades", "BTCUSDT")]  # fmt: skip
    told = [(gaps["from_time"][i], gaps["to_time"][i], gaps["cause"][i], gaps["repaired"][i]) for i in of_btc]
    last, first = max(t["T"] for t in times[before]["data"]), min(t["T"] for t in times[behind]["data"])
    assert told == [(last * 1000, first * 1000, "reconnect", False)]
    traded = [
        {m["topic"] for line in part if (m := message_of(line, "publicTrade"))}
        for part in (cut[: before + 1], cut[before + 1 :])
    ]
    assert report.counters["gap_trades_reconnect"] == len(traded[0] & traded[1]) > 0


# Samples and REST bodies


def test_the_table_names_every_sample() -> None:
    assert {path.name for path in (FOLDER / "samples").iterdir()} == set(SAMPLES)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("name", SAMPLES)
def test_sample(name: str, category: str, tmp_path: Path) -> None:
    outcomes = SAMPLES[name]
    outcome = outcomes if isinstance(outcomes, str) else outcomes.get(category, outcomes["linear"])
    raw = (FOLDER / "samples" / name).read_text()
    line = {"t": SAMPLE_TIME_NS, "conn": "sample", "dir": "in", "raw": raw}
    report = normalize(f"bybit_{category}", [write(tmp_path / "sample.jsonl", [line])], tmp_path / "out")
    refused = [c.removeprefix("refused_") for c in report.counters if c.startswith("refused_")]
    rows = "+".join(f"{feed} {count}" for feed, count in report.rows.items() if count)
    assert (rows or ("refused " + refused[0] if refused else "control")) == outcome
    assert len(refused) == outcome.startswith("refused")
    assert "protocol_drift" not in report.counters
    if refused:
        assert report.samples[f"refused_{refused[0]}"].endswith(raw[:512])
    if rows:
        model = run(BybitModel(category), [line])
        for feed in (f for f, rows in model.expected.rows.items() if rows):
            compare(table(tmp_path / "out", feed), model.expected.rows[feed])
        assert sum(len(r) for r in model.expected.rows.values()) == sum(report.rows.values())


Make = Callable[..., Venue]


@pytest.fixture
def venue(tmp_path: Path) -> Iterator[Make]:
    """A venue over small rings; with tickers it wants those only, and is connected."""
    made: list[Emit] = []

    def make(category: str, *tickers: str, feeds: tuple[str, ...] = (), options: Options | None = None) -> Venue:
        kind, options = venue_class(f"bybit_{category}"), options or Options()
        made.append(Emit(tmp_path / str(len(made)), "t", kind.EXCHANGE, kind.FEEDS, semaphore=False, capacities=SMALL))
        made[-1].packet(SAMPLE_TIME_NS, made[-1].clock())
        streams = [s for t in tickers for s in kind.streams_of(t, feeds or kind.FEEDS, options)]
        found = kind(made[-1], options, streams, open_world=not tickers)
        if tickers:
            found.opened()
        return found

    yield make
    for emit in made:
        emit.close()


BODIES = sorted(path.name for path in (FOLDER / "rest").iterdir()) if DATA.is_dir() else []
INSTRUMENTS = [
    name for name in BODIES
    if name.startswith(("instruments_", "doc_instrument", "roq_instruments", "rec_v5_market_instruments"))
    or name in ("linear_inverse_symbols.json", "linear_inverse_symbols_pre_listing.json", "option_symbols.json", "spot_symbols.json")
]  # fmt: skip
RECENT = ("doc_recent_trade.json", "trades_recent.json", "trade_history.json")


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_instruments_body(name: str) -> None:
    body = (FOLDER / "rest" / name).read_bytes()
    result = json.loads(body)["result"]
    category = result.get("category") or name.split("_")[1].removesuffix(".json")
    kind = venue_class(f"bybit_{category}")
    found = kind.instruments(body)
    assert len(found) == len(result["list"]) > 0
    for info, i in zip(found, result["list"], strict=True):
        said = {name: getattr(info, name) for name in told(i, category)}
        said |= {name: None for name in ("listed_time", "expiry_time") if said[name] == -1}
        assert (info.ticker, said) == (i["symbol"], told(i, category))
    cursor = result.get("nextPageCursor")
    first = f"/v5/market/instruments-info?category={category}&limit=1000"
    pages = kind.pages_behind(first, body)
    assert pages == ([f"{first}&cursor={cursor}"] if cursor else [])
    for page in pages:  # the cursor of the last page replaces the one before
        assert kind.pages_behind(page, body) == [page]


@pytest.mark.parametrize("name", [name for name in RECENT if name in BODIES])
def test_recent_trades_are_published_where_they_are_new(name: str, venue: Make) -> None:
    """A live trade, a lost connection, the venue's answer: what is new is REPAIRED, and the hole is closed or stays."""
    body = (FOLDER / "rest" / name).read_bytes()
    result = json.loads(body)["result"]
    (trade,) = result["list"]
    one = venue(result["category"])
    for reaches_back in (True, False):
        ticker, time = trade["symbol"], int(trade["time"]) + (1 if reaches_back else -1)
        live = {"T": time, "s": ticker, "S": "Buy", "v": "1", "p": "2", "i": f"live-{reaches_back}", "BT": False}
        one.decode(
            json.dumps({"topic": f"publicTrade.{ticker}", "type": "snapshot", "ts": time, "data": [live]}).encode()
        )
        one.disconnected("reconnect")
        one.http(f"https://x/v5/market/recent-trade?category=spot&symbol={ticker}&limit=60", body)
        one.trade_ids.clear()
    rows = [(r["trade_id"].decode(), int(r["flags"])) for r in one.emit.rings["trades"].recent_rows(0)]
    assert rows == [("live-True", LAST), ("live-False", LAST), (trade["execId"], LAST | REPAIRED)]
    row = one.emit.rings["trades"].recent_rows(2)[0]
    assert (float(row["price"]), float(row["qty"]), int(row["timestamp"]), int(row["side"])) == (
        float(trade["price"]), float(trade["size"]), int(trade["time"]) * 1000, {"Buy": 1, "Sell": -1}[trade["side"]])  # fmt: skip
    gaps = one.emit.rings["gaps"].recent_rows(0)
    assert [(g["cause"].decode(), bool(g["repaired"])) for g in gaps] == [("reconnect", False)]
    assert one.emit.counters["trade_repair_incomplete"] == 1


@pytest.mark.parametrize("name", sorted(set(BODIES) - set(INSTRUMENTS) - set(RECENT)))
def test_other_bodies_make_no_rows(name: str, venue: Make) -> None:
    raw = (FOLDER / "rest" / name).read_bytes()
    one = venue("linear")
    with pytest.raises(FrameError) as refused:
        one.http("https://api.bybit.com/v5/market/orderbook?category=linear&symbol=A", raw)
    assert refused.value.reason == "unhandled_url"
    with suppress(FrameError, msgspec.DecodeError):
        one.http("https://api.bybit.com/v5/market/recent-trade?category=linear&symbol=A", raw)
    assert sum(ring.next for ring in one.emit.rings.values()) == 0


# The dialogue


def sent(one: Venue) -> list[dict[str, Any]]:
    """The requests that are wanted, taken."""
    found = [json.loads(want.text) for want in one.wants if isinstance(want, Send)]
    one.wants.clear()
    return found


def reply(one: Venue, request: dict[str, Any], success: bool = True, text: str = "") -> None:
    one.decode(json.dumps({"success": success, "ret_msg": text, "conn_id": "c", "req_id": request["req_id"],
                           "op": request["op"]}).encode())  # fmt: skip


def state(one: Venue) -> dict[str, str]:
    return {n: p.refused or ("confirmed" if p.acknowledged_ns else "open") for n, p in one.proof.items()}


def test_a_refused_batch_is_halved_until_the_bad_topic_is_alone(venue: Make) -> None:
    """F13. Replies are matched by their request, in whatever order they come."""
    tickers = [f"T{n}USDT" for n in range(40)]
    one = venue("linear", *tickers, feeds=("orderbook_l2",))
    bad = "orderbook.200.T17USDT"
    rounds = 0
    while requests := sent(one):
        rounds += 1
        for request in reversed(requests):
            reply(one, request, bad not in request["args"], f"error:handler not found,topic:{bad}")
    assert state(one) == {f"orderbook.200.{t}": "confirmed" for t in tickers} | {
        bad: f"error:handler not found,topic:{bad}"
    }
    assert rounds <= 8
    assert one.emit.counters["stream_refused"] == 1


def test_a_topic_that_is_subscribed_already_is_confirmed(venue: Make) -> None:
    one = venue("linear", "AUSDT", feeds=("bbo",))
    (request,) = sent(one)
    reply(one, request, False, "error:already subscribed,topic:orderbook.1.AUSDT")
    assert state(one) == {"orderbook.1.AUSDT": "confirmed"}


def test_requests_keep_to_the_venue_s_limits(venue: Make) -> None:
    spot = venue("spot", *(f"T{n}USDT" for n in range(30)))
    requests = sent(spot)
    assert max(len(request["args"]) for request in requests) == 10
    assert [a for r in requests for a in r["args"]] == [s.name for s in spot.streams]
    kind = venue_class("bybit_linear")
    plan = kind.plan([f"LONGNAME{n:04d}USDT" for n in range(900)], kind.FEEDS, Options())
    for connection in plan:
        names = [stream.name for stream in connection]
        assert len(json.dumps(names, separators=(",", ":"))) <= 21_000
        assert len(names) <= kind.LIMITS.streams_per_connection
    options = venue_class("bybit_option")
    tickers = [f"BTC-25DEC26-{n}-C-USDT" for n in range(10_000, 900_000, 1000)]
    for connection in options.plan(tickers, options.FEEDS, Options()):
        assert len(json.dumps(list({s.name for s in connection}), separators=(",", ":"))) <= 21_000
        assert len([s for s in connection if s.feed == "trades"]) == len({s.ticker for s in connection})


def test_options_share_a_trade_topic(venue: Make) -> None:
    """One topic a base coin carries the trades of all of them; those of others are counted."""
    mine = ("BTC-25DEC26-90000-C-USDT", "BTC-25DEC26-90000-P-USDT")
    one = venue("option", *mine)
    (request,) = sent(one)
    assert request["args"].count("publicTrade.BTC") == 1
    # The reply of this category names topics, not the request.
    topics = {
        "failTopics": ["tickers." + mine[0]],
        "successTopics": [a for a in request["args"] if a != "tickers." + mine[0]],
    }
    one.decode(json.dumps({"success": True, "conn_id": "c", "data": topics, "type": "COMMAND_RESP"}).encode())
    assert {n for n, s in state(one).items() if s != "confirmed"} == {"tickers." + mine[0]}
    data = [{"T": 1_796_083_100_000 + n, "s": s, "S": "Sell", "v": "0.1", "p": "5", "i": f"id{n}", "BT": False}
            for n, s in enumerate((*mine, "BTC-25DEC26-95000-C-USDT", mine[0]))]  # fmt: skip
    one.decode(json.dumps({"id": "x", "topic": "publicTrade.BTC", "ts": 1, "data": data, "type": "snapshot"}).encode())
    ring = one.emit.rings["trades"]
    rows = [(ring.tickers[r["ticker"]], r["trade_id"].decode()) for r in ring.recent_rows(0)]
    assert rows == [(mine[0], "id0"), (mine[0], "id3"), (mine[1], "id1")]
    assert one.emit.counters["trade_of_others"] == 1


def test_a_ping_each_20_s_and_both_forms_of_the_answer(venue: Make) -> None:
    one = venue("linear", "AUSDT", feeds=("bbo",))
    sent(one)
    pings = []
    for second in range(1, 61):
        one.tick(SAMPLE_TIME_NS + second * 1_000_000_000)
        if found := [r for r in sent(one) if r["op"] == "ping"]:
            pings.append(second)
            assert len(found) == 1
            if second == 1:
                one.decode(b'{"success":true,"ret_msg":"pong","conn_id":"c","req_id":"ping","op":"ping"}')
            elif second == 21:
                one.decode(b'{"req_id":"ping","op":"pong","args":["1672916271846"],"conn_id":"c"}')
    assert pings == [1, 21, 41]
    assert one.emit.counters["pong_missing"] == 0
    one.tick(SAMPLE_TIME_NS + 62_000_000_000)
    assert one.emit.counters["pong_missing"] == 1


def test_a_broken_book_leaves_its_topic_and_takes_it_again(venue: Make) -> None:
    one = venue("linear", "AUSDT", "BUSDT", feeds=("orderbook_l2",))
    for request in sent(one):
        reply(one, request)

    def book(ticker: str, u: int, kind: str) -> None:
        data = {"s": ticker, "b": [["1", "1"]], "a": [["2", "1"]], "u": u, "seq": u}
        one.decode(
            json.dumps({"topic": f"orderbook.200.{ticker}", "type": kind, "ts": 1, "data": data, "cts": 1}).encode()
        )

    now_ns = time.time_ns()
    for ticker in ("AUSDT", "BUSDT"):
        book(ticker, 5, "snapshot")
        book(ticker, 6, "delta")
    book("AUSDT", 8, "delta")
    one.tick(now_ns)
    requests = [(r["op"], r["args"]) for r in sent(one) if r["op"] != "ping"]
    assert requests == [("unsubscribe", ["orderbook.200.AUSDT"]), ("subscribe", ["orderbook.200.AUSDT"])]
    one.tick(now_ns + 2_000_000_000)
    assert not sent(one), "not again before it had time to come"
    book("AUSDT", 11, "snapshot")
    book("AUSDT", 12, "delta")
    assert [b.state for b in one.books.values()] == ["live", "live"]
    one.tick(now_ns + 25_000_000_000)
    assert [r["op"] for r in sent(one)] == ["ping"]
    gaps = one.emit.rings["gaps"].recent_rows(0)
    assert [(int(g["first_id"]), int(g["last_id"])) for g in gaps] == [(7, 7), (8, 11)]


def test_a_trade_frame_that_cannot_be_read_is_a_hole_that_is_asked_about(venue: Make) -> None:
    one = venue("linear", "AUSDT", feeds=("trades",))
    for request in sent(one):
        reply(one, request)

    def frame(*ids: str) -> bytes:
        data = [
            {"T": 1_796_083_100_000, "s": "AUSDT", "S": "Buy", "v": "1", "p": "2", "i": i, "BT": False} for i in ids
        ]
        return json.dumps({"topic": "publicTrade.AUSDT", "type": "snapshot", "ts": 1, "data": data},
                          separators=(",", ":")).encode()  # fmt: skip

    one.decode(frame("a"))
    with pytest.raises(msgspec.DecodeError):
        one.decode(frame("b")[:-20])
    (want,) = one.wants
    assert isinstance(want, Fetch)
    assert want.path == "/v5/market/recent-trade?category=linear&symbol=AUSDT&limit=1000"
    one.decode(frame("c"))
    want = one.wants[-1]  # asked for once more, now that the stream is heard
    assert isinstance(want, Fetch)
    rest = [
        {"execId": i, "symbol": "AUSDT", "price": "2", "size": "1", "side": "Buy", "time": "1796083100000"}
        for i in "cba"
    ]
    assert want.answer is not None
    want.answer(json.dumps({"retCode": 0, "result": {"list": rest}}).encode())
    rows = one.emit.rings["trades"].recent_rows(0)
    assert [(r["trade_id"].decode(), int(r["flags"])) for r in rows] == [
        ("a", LAST),
        ("c", LAST),
        ("b", LAST | REPAIRED),
    ]
    gaps = one.emit.rings["gaps"].recent_rows(0)
    assert [(g["cause"].decode(), bool(g["repaired"])) for g in gaps] == [("refused", False), ("filled", True)]
    assert len({int(g["to_time"]) for g in gaps}) == 1, "the second row replaces the first"


def test_an_answer_from_before_the_last_hole_closes_nothing(venue: Make) -> None:
    """The connection went again while the answer was on its way: what was missed since is not in it."""
    one = venue("linear", "AUSDT", feeds=("trades",))
    trades = one.trades_by_id("AUSDT")
    trades.publish([(-1, 1_000_000, 1, 2.0, 1.0, b"a")])
    one.disconnected("reconnect")
    asked = trades.doubts
    one.disconnected("reconnect")
    trades.recent([(-1, 1_000_000, 1, 2.0, 1.0, b"a")], asked)
    assert trades.unproven
    trades.recent([(-1, 1_000_000, 1, 2.0, 1.0, b"a")], trades.doubts)
    assert not trades.unproven
    assert not one.emit.rings["gaps"].next, "nothing was missed"


def test_ids_of_an_earlier_life_are_known(venue: Make, tmp_path: Path) -> None:
    """F18. A restarted process begins with a doubt, and publishes no trade again."""
    one = venue("linear", "AUSDT", feeds=("trades", "bbo"))
    one.trades_by_id("AUSDT").publish([(-1, 1_000_000 + n, 1, 2.0, 1.0, f"id{n}".encode()) for n in range(5)])
    one.emit.bbo(one.emit.instrument("AUSDT"), 1_000_000, 1.0, 1.0, 2.0, 1.0, 77)
    one.emit.close()
    kind = venue_class("bybit_linear")
    emit = Emit(tmp_path / "0", "t", kind.EXCHANGE, kind.FEEDS, semaphore=False, capacities=SMALL)
    again = kind(emit, Options(), one.streams)
    again.resume()
    emit.packet(SAMPLE_TIME_NS, emit.clock())
    trades = again.trade_ids["AUSDT"]
    assert trades.unproven
    trades.publish([(-1, 1_000_004, 1, 2.0, 1.0, b"id4"), (-1, 1_000_009, 1, 2.0, 1.0, b"id9")])
    rows = emit.rings["trades"].recent_rows(0)
    assert [r["trade_id"].decode() for r in rows] == ["id0", "id1", "id2", "id3", "id4", "id9"]
    (gap,) = emit.rings["gaps"].recent_rows(0)
    assert (gap["cause"].decode(), int(gap["from_time"]), int(gap["to_time"])) == ("restart", 1_000_004, 1_000_009)
    best = {
        "topic": "orderbook.1.AUSDT",
        "type": "snapshot",
        "ts": 1,
        "data": {"s": "AUSDT", "b": [], "a": [], "u": 77, "seq": 5},
    }
    again.decode(json.dumps(best).encode())
    assert emit.counters["bbo_repeated"] == 1
    emit.close()


def test_depths_that_the_venue_does_not_have(venue: Make) -> None:
    for category in CATEGORIES:
        kind = venue_class(f"bybit_{category}")
        assert issubclass(kind, Bybit)
        for depth in kind.BOOK_DEPTHS:
            (stream,) = kind.streams_of("X", ("orderbook_l2",), Options(book_depth=depth))
            assert stream.name == f"orderbook.{depth}.X"
        with pytest.raises(ConfigError, match=f"book_depth: 500 not offered by bybit_{category}; it has"):
            kind.streams_of("X", ("orderbook_l2",), Options(book_depth=500))


def test_rate_limits_in_the_body_of_an_answer(venue: Make) -> None:
    one = venue("linear", "AUSDT")
    body = b'{"retCode":10006,"retMsg":"Too many visits!","result":{},"retExtInfo":{},"time":1}'
    for use in (one.instruments, lambda b: one.http("https://x/v5/market/recent-trade?symbol=AUSDT", b)):
        with pytest.raises(RateLimited):
            use(body)
    with pytest.raises(FrameError, match="10001"):
        one.instruments(b'{"retCode":10001,"retMsg":"params error","result":{}}')
    assert one.RATE_LIMITED == {403: 600.0}


def test_two_connections_word_the_same_message_differently(venue: Make) -> None:
    """The gateway's time and the options' message number are the connection's own."""
    one = venue("option", "A-1-2-C")
    a = b'{"id":"tickers.A-1-2-C-77-1","topic":"tickers.A-1-2-C","ts":1,"data":{"symbol":"A-1-2-C","bidPrice":"5"},"type":"snapshot"}'
    b = b'{"id":"tickers.A-1-2-C-99-2","topic":"tickers.A-1-2-C","ts":2,"data":{"symbol":"A-1-2-C","bidPrice":"5"},"type":"snapshot"}'
    assert one.identity(a) == one.identity(b)
    assert one.identity(a) != one.identity(a.replace(b'"5"', b'"6"'))
    assert one.identity(b'{"success":true,"ret_msg":"pong","op":"ping"}') is None
