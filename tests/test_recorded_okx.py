"""Recorded OKX traffic through normalize: every stored row against plain json, every book against a plain dict and CRC32."""

import itertools
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
    PlainTrades,
    compare,
    entries,
    needs_data,
    rebuild,
    run,
    same_decimal,
    table,
    told,
)

from mdcollector import OrderBook
from mdcollector.emit import Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import Options, Stream
from mdcollector.exchanges.okx import Okx
from mdcollector.normalize import Report, normalize
from mdcollector.recording import Entry, RecordingWriter

pytestmark = needs_data

FOLDER = DATA / "okx"
SAMPLE_TIME_NS = 1_796_083_200_000_000_000  # behind every sample, so that no time of theirs lies in the future
SMALL = dict.fromkeys(("trades", "orderbook_l2", "bbo", "tickers", "candles", "liquidations", "gaps"), 4096)
RECORDINGS = ("multi_20210722", "multi_20220513", "btcusdtswap_20260926_part1", "perp_20260930")
BOOK_CHANNELS = ("books", "books-l2-tbt")
OLD = ("multi_20210722", "multi_20220513")  # with a checksum, without seqId

# What becomes of every sample: rows of a feed | refused for a reason | control (a reply or notice; no row belongs to it).
# Snapshots that their source has shortened fail the venue's checksum.
SAMPLES = {
    "ack_estimated_price.json": "control",
    "ack_funding_rate.json": "control",
    "ack_index_klines.json": "control",
    "ack_index_ticker.json": "control",
    "ack_interest.json": "control",
    "ack_klines.json": "control",
    "ack_mark_price.json": "control",
    "ack_mark_price_klines.json": "control",
    "ack_option_summary.json": "control",
    "ack_order_book.json": "control",
    "ack_price_limit.json": "control",
    "ack_symbol.json": "control",
    "ack_system_status.json": "control",
    "ack_ticker.json": "control",
    "ack_trades.json": "control",
    "bbo_tbt_01.json": "bbo 1",
    "bbo_tbt_03.json": "bbo 1",
    "bbo_tbt_04.json": "bbo 1",
    "bbo_tbt_06.json": "bbo 1",
    "bbo_tbt_07.json": "bbo 1",
    "books5_01.json": "refused unhandled_channel",
    "books5_03.json": "refused unhandled_channel",
    "books5_04.json": "refused unhandled_channel",
    "books5_06.json": "refused unhandled_channel",
    "books_l2_tbt_snapshot_01.json": "refused checksum",
    "books_l2_tbt_snapshot_03.json": "refused checksum",
    "books_l2_tbt_snapshot_04.json": "orderbook_l2 2",
    "books_l2_tbt_snapshot_06.json": "refused checksum",
    "books_l2_tbt_update_01.json": "orderbook_l2 2",
    "books_l2_tbt_update_03.json": "orderbook_l2 2",
    "books_l2_tbt_update_04.json": "orderbook_l2 3",
    "books_snapshot.json": "refused checksum",
    "books_update.json": "orderbook_l2 16",
    "candle.json": "candles 1",
    "candle1m_01.json": "candles 1",
    "candle1m_03.json": "candles 1",
    "candle1m_04.json": "candles 1",
    "candle1m_06.json": "candles 1",
    "cap2025_books5.json": "refused unhandled_channel",
    "cap2026_books5_spot.json": "refused unhandled_channel",
    "cap2026_books_seqid_excerpt.jsonl": "refused malformed",
    "cap2026_candle1m_swap_forming.json": "candles 1",
    "cap2026_error_candle_wrong_url.json": "refused venue_error",
    "cap2026_liquidation_orders_01.json": "liquidations 1",
    "cap2026_liquidation_orders_02.json": "liquidations 1",
    "cap2026_tickers_spot.json": "tickers 1",
    "cap2026_tickers_spot_02.json": "tickers 1",
    "cap2026_trades_spot_source1.json": "trades 1",
    "estimated_price.json": "refused unhandled_channel",
    "event_error.json": "refused venue_error",
    "event_subscribe_01.json": "refused unhandled_event",
    "event_subscribe_03.json": "control",
    "funding_rate_01.json": "tickers 1",
    "funding_rate_03.json": "tickers 1",
    "funding_rate_04.json": "tickers 1",
    "funding_rate_06.json": "refused nothing_given",
    "gct_trades_01.json": "trades 1",
    "index_klines.json": "refused unhandled_channel",
    "index_ticker.json": "tickers 1",
    "index_tickers_01.json": "tickers 1",
    "index_tickers_03.json": "tickers 1",
    "instruments.json": "refused unhandled_channel",
    "interest.json": "tickers 1",
    "klines.json": "candles 1",
    "liquidation_orders.json": "liquidations 1",
    "liquidations_01.json": "refused unhandled_channel",
    "mark_price_01.json": "tickers 1",
    "mark_price_03.json": "tickers 1",
    "mark_price_04.json": "tickers 1",
    "mark_price_klines.json": "refused unhandled_channel",
    "open_interest_01.json": "tickers 1",
    "open_interest_03.json": "tickers 1",
    "opt_summary_01.json": "refused wrong_type",
    "opt_summary_03.json": "refused unhandled_channel",
    "option_summary.json": "refused unhandled_channel",
    "order_book.json": "refused unknown_book_action",
    "price_limit_01.json": "refused unhandled_channel",
    "rec_bbo_tbt_btcusdtswap_20260926_part1.json": "bbo 1",
    "rec_books_l2_tbt_snapshot_multi_20210722.json": "orderbook_l2 9",
    "rec_books_l2_tbt_update_multi_20210722.json": "orderbook_l2 2",
    "rec_books_snapshot_btcusdtswap_20260926_part1.json": "orderbook_l2 800",
    "rec_books_snapshot_multi_20220513.json": "orderbook_l2 136",
    "rec_books_update_btcusdtswap_20260926_part1.json": "orderbook_l2 24",
    "rec_books_update_multi_20220513.json": "orderbook_l2 4",
    "rec_event_subscribe_btcusdtswap_20260926_part1.json": "control",
    "rec_event_subscribe_multi_20210722.json": "control",
    "rec_event_subscribe_multi_20220513.json": "control",
    "rec_event_subscribe_perp_20260930.json": "control",
    "rec_funding_rate_perp_20260930.json": "tickers 1",
    "rec_index_tickers_perp_20260930.json": "tickers 1",
    "rec_mark_price_perp_20260930.json": "tickers 1",
    "rec_open_interest_perp_20260930.json": "tickers 1",
    "rec_tickers_multi_20210722.json": "tickers 1",
    "rec_tickers_multi_20220513.json": "tickers 1",
    "rec_trades_btcusdtswap_20260926_part1.json": "trades 1",
    "rec_trades_multi_20210722.json": "trades 1",
    "rec_trades_multi_20220513.json": "trades 1",
    "roq_bbo_tbt_01.json": "bbo 1",
    "roq_books_l2_tbt_01.json": "refused checksum",
    "roq_books_l2_tbt_03.json": "refused unhandled_channel",
    "roq_candle_01.json": "candles 1",
    "roq_error_01.json": "refused venue_error",
    "roq_error_02.json": "refused venue_error",
    "roq_index_tickers_01.json": "tickers 1",
    "roq_instruments_01.json": "refused unhandled_channel",
    "roq_notice_01.json": "control",
    "roq_status_01.json": "refused unhandled_channel",
    "roq_subscribe_01.json": "control",
    "roq_subscribe_03.json": "control",
    "roq_subscribe_04.json": "control",
    "roq_subscribe_06.json": "control",
    "roq_subscribe_07.json": "control",
    "roq_tickers_01.json": "tickers 1",
    "roq_trades_01.json": "trades 1",
    "symbol.json": "refused unhandled_channel",
    "system_status.json": "refused unhandled_channel",
    "ticker.json": "tickers 1",
    "tickers_01.json": "tickers 1",
    "tickers_03.json": "tickers 1",
    "tickers_04.json": "tickers 1",
    "tickers_06.json": "tickers 1",
    "tickers_07.json": "tickers 1",
    "tickers_09.json": "tickers 1",
    "tickers_10.json": "tickers 1",
    "trades_01.json": "trades 1",
    "trades_03.json": "trades 1",
    "trades_04.json": "trades 1",
    "trades_06.json": "trades 1",
    "trades_07.json": "trades 1",
    "trades_09.json": "trades 1",
    "trades_10.json": "trades 1",
    "trades_12.json": "trades 1",
    "trades_13.json": "trades 1",
    "trades_all.json": "trades 1",
}


def recording(name: str) -> Path:
    return FOLDER / "recorded" / f"{name}.jsonl.zst"


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    with RecordingWriter(path) as out:
        for line in lines:
            out.write(Entry(**line))
    return path


def _judge(local: int, _first: int, last: int, prev: int) -> str:
    if prev == local:
        return "next"
    return "old" if last <= local else "hole"


def is_contract(ticker: str) -> bool:
    return len(ticker.split("-")) > 2


class OkxModel:
    """OKX by plain json, from exchange-protocols section 6."""

    def __init__(self) -> None:
        self.expected = Expected("OKX")
        self.expected.rows["liquidations"] = []
        self.books: dict[str, PlainBook] = {}
        self.trades: dict[str, PlainTrades] = {}
        self.reached: dict[str, int] = {}  # last trade of those that are merged

    def body(self, url: str, answer: Any) -> None:
        assert urlsplit(url).path == "/api/v5/public/instruments"
        kinds = {"SPOT": "spot", "SWAP": "perpetual", "FUTURES": "future", "OPTION": "option"}
        for i in answer["data"]:
            base, quote = (i["baseCcy"], i["quoteCcy"]) if i["instType"] == "SPOT" else i["uly"].split("-")
            size = Decimal(i["ctVal"]) * Decimal(i["ctMult"] or 1) if i["ctVal"] else Decimal(1)
            listed, expiry = (1000 * int(i[key]) if i[key] else None for key in ("listTime", "expTime"))
            self.expected.instrument(
                i["instId"], active=i["state"] == "live", kind=kinds[i["instType"]], base=base, quote=quote,
                status=i["state"], tick_size=float(i["tickSz"]), qty_step=float(i["lotSz"]), contract_size=float(size),
                listed_time=listed, expiry_time=expiry,
            )  # fmt: skip

    def frame(self, message: Any) -> None:
        if "data" not in message:
            return
        channel, ticker = message["arg"]["channel"], message["arg"].get("instId", "")
        for data in message["data"]:
            if channel in ("trades", "trades-all"):
                self._trade(ticker, data)
            elif channel in BOOK_CHANNELS:
                self._book(ticker, message["action"], data)
            elif channel == "bbo-tbt":
                self._best(ticker, data)
            elif channel.startswith("candle"):
                self._candle(ticker, channel.removeprefix("candle"), data)
            elif channel == "liquidation-orders":
                self._liquidations(data)
            else:
                self._marks(channel, ticker, data)

    def _trade(self, ticker: str, t: Any) -> None:
        seq, time, side = int(t["tradeId"]), 1000 * int(t["ts"]), {"buy": 1, "sell": -1}[t["side"]]
        if "count" not in t:
            trades = self.trades.setdefault(ticker, PlainTrades(self.expected, ticker))
            trades.message([(seq, time, side, t["px"], t["sz"], t["tradeId"])])
            return
        assert seq - int(t["count"]) == self.reached.get(ticker, seq - int(t["count"])), "no trade is missing"
        self.reached[ticker] = seq
        row = {
            "side": side,
            "price": float(t["px"]),
            "qty": float(t["sz"]),
            "trade_seq": None,
            "trade_id": t["tradeId"],
        }
        self.expected.rows["trades"].append({**self.expected.head(ticker, time, LAST), **row})

    def _book(self, ticker: str, action: str, data: Any) -> None:
        if ticker not in self.books:
            self.books[ticker] = PlainBook(self.expected, ticker, _judge, in_band=True)
        book, time = self.books[ticker], 1000 * int(data["ts"])
        bids, asks = ([(level[0], level[1]) for level in data[side]] for side in ("bids", "asks"))
        seq = data.get("seqId", int(data["ts"]))
        if action == "snapshot":
            if book.state != "live" or seq > book.last_id:  # else another connection has told it before
                book.snapshot(seq, time, bids, asks)
            return
        prev = data["prevSeqId"] if "seqId" in data else book.last_id if seq > book.last_id else -1
        book.delta(seq, seq, prev, time, bids, asks)

    def _best(self, ticker: str, data: Any) -> None:
        values: dict[str, Any] = {}
        for side, name in (("bids", "bid"), ("asks", "ask")):
            price, qty = data[side][0][:2] if data[side] else ("nan", "0")
            values[f"{name}_price"] = float(price) if data[side] else "nan"
            values[f"{name}_qty"] = float(qty)
        head = self.expected.head(ticker, 1000 * int(data["ts"]), LAST)
        self.expected.rows["bbo"].append({**head, **values, "update_id": data.get("seqId")})

    def _marks(self, channel: str, ticker: str, data: Any) -> None:
        def number(word: str) -> Any:
            return float(data[word]) if data.get(word) else "nan"

        row = dict.fromkeys(
            ("last", "open_24h", "high_24h", "low_24h", "volume_24h", "quote_volume_24h", "bid_price", "ask_price",
             "mark_price", "index_price", "funding_rate", "open_interest"), "nan",
        )  # fmt: skip
        if channel == "tickers":
            row |= {"last": number("last"), "open_24h": number("open24h"), "high_24h": number("high24h")}
            row |= {"low_24h": number("low24h"), "bid_price": number("bidPx"), "ask_price": number("askPx")}
            base, quote = ("volCcy24h", "") if data["instType"] != "SPOT" else ("vol24h", "volCcy24h")
            row |= {"volume_24h": number(base), "quote_volume_24h": number(quote)}
        elif channel == "index-tickers":
            row["index_price"] = number("idxPx")
        else:
            column, word = {
                "mark-price": ("mark_price", "markPx"), "open-interest": ("open_interest", "oi"),
                "funding-rate": ("funding_rate", "fundingRate"),
            }[channel]  # fmt: skip
            row[column] = number(word)
        funding = 1000 * int(data["fundingTime"]) if "fundingTime" in data else None
        head = self.expected.head(ticker, 1000 * int(data.get("ts", 0)), LAST)
        self.expected.rows["tickers"].append({**head, **row, "next_funding_time": funding})

    def _candle(self, ticker: str, bar: str, row: Any) -> None:
        values = dict(zip(("open", "high", "low", "close"), map(float, row[1:5]), strict=True))
        self.expected.rows["candles"].append(
            {
                **self.expected.head(ticker, 0, LAST), **values, "volume": float(row[6 if is_contract(ticker) else 5]),
                "interval": bar, "open_time": 1000 * int(row[0]), "trades": None, "closed": row[8:9] == ["1"],
            }
        )  # fmt: skip

    def _liquidations(self, data: Any) -> None:
        for d in data["details"]:
            head = self.expected.head(data["instId"], 1000 * int(d["ts"]), LAST)
            side = {"buy": 1, "sell": -1}[d["side"]]
            self.expected.rows["liquidations"].append(
                {**head, "side": side, "price": float(d["bkPx"]), "qty": float(d["sz"])}
            )


def normalized(lines: list[dict[str, Any]], tmp_path: Path) -> tuple[Report, Path, OkxModel]:
    """A recording of these lines through the product, and by plain json."""
    report = normalize("okx", [write(tmp_path / "modified.jsonl", lines)], tmp_path / "out")
    return report, tmp_path / "out", run(OkxModel(), lines)


def proven(out: Path, model: OkxModel) -> None:
    """All tables are what the model says, and a reader's books are the plain ones."""
    for feed, rows in model.expected.rows.items():
        compare(table(out, feed), rows)
    if model.expected.messages:
        rebuild(table(out, "orderbook_l2"), model.expected.messages)


def book_of(line: dict[str, Any]) -> dict[str, Any]:
    """The payload of a book push with its instrument and action, else nothing."""
    message = json.loads(line["raw"]) if line["dir"] == "in" else {}
    if "data" not in message or message["arg"]["channel"] not in BOOK_CHANNELS:
        return {}
    return {**message["data"][0], "ticker": message["arg"]["instId"], "action": message["action"]}


def with_book(line: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The same push with other values in its payload."""
    message = json.loads(line["raw"])
    message["data"][0].update(changed)
    return {**line, "raw": json.dumps(message, separators=(",", ":"))}


def updates(lines: list[dict[str, Any]], ticker: str = "") -> list[int]:
    """Where the updates of books are (of one instrument), the last one of each instrument left out."""
    found = [i for i, line in enumerate(lines) if book_of(line).get("action") == "update"]
    last = {book_of(lines[i])["ticker"]: i for i in found}
    names = {i: book_of(lines[i])["ticker"] for i in found}
    return [i for i in found if last[names[i]] != i and ticker in ("", names[i])]


def ledger(out: Path) -> list[tuple[Any, ...]]:
    gaps = table(out, "gaps")
    columns = ("feed", "ticker", "first_id", "last_id", "cause", "repaired")
    return list(zip(*(gaps[c] for c in columns), strict=True)) if gaps else []


def of_conn(name: str, conn: str) -> list[dict[str, Any]]:
    return [line for line in entries(recording(name)) if line["conn"] == conn]


# Whole recordings


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_row_equals_the_raw_frames(name: str, tmp_path: Path) -> None:
    report = normalize("okx", [recording(name)], tmp_path)
    lines = entries(recording(name))
    model = run(OkxModel(), lines)
    assert not model.expected.rows["gaps"], "the README says that no frame is missing"
    proven(tmp_path, model)
    assert report.findings == []
    assert (report.entries, report.rows_left) == (len(lines), 0)
    assert report.rows_written == sum(len(rows) for rows in model.expected.rows.values()) > 0
    assert not [c for c in report.counters if c.startswith(("refused_", "gap_", "protocol_"))]
    assert not any(flags & (INVALID | RESYNCED) for flags in table(tmp_path, "orderbook_l2").get("flags", []))


def plain_checksum(book: tuple[dict[str, str], dict[str, str]]) -> int:
    """The venue's rule with sorted Decimals: the 25 best of both sides in turn as they were written, CRC32, signed."""
    bids, asks = book
    parts = []
    pairs = sorted(bids, key=Decimal, reverse=True), sorted(asks, key=Decimal)
    for n in range(25):
        for prices, side in zip(pairs, book, strict=True):
            parts += [prices[n], side[prices[n]]] if n < len(prices) else []
    value = zlib.crc32(":".join(parts).encode())
    return value if value < 2**31 else value - 2**32


@pytest.mark.parametrize(
    ("name", "conn"), [("multi_20220513", "ws1"), *[("multi_20210722", f"ws{n}") for n in (1, 2, 3)]]
)
def test_every_book_frame_of_old_is_verified_by_its_checksum(name: str, conn: str, tmp_path: Path) -> None:
    """By us and by a plain reckoning alike; each of the three connections is a whole recording of its own."""
    lines = of_conn(name, conn)
    books: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    frames = 0
    for line in lines:
        if not (data := book_of(line)):
            continue
        book = ({}, {}) if data["action"] == "snapshot" else books[data["ticker"]]
        books[data["ticker"]] = book
        for side, levels in zip(book, (data["bids"], data["asks"]), strict=True):
            for price, qty, *_ in levels:
                if Decimal(qty):
                    side[price] = qty
                else:
                    side.pop(price, None)
        assert plain_checksum(book) == data["checksum"]
        frames += 1
    report, out, model = normalized(lines, tmp_path)
    proven(out, model)
    assert report.counters["checksum_verified"] == frames > 280
    assert not {"checksum_mismatch", "checksum_unverified", "book_duplicate"} & set(report.counters)


def test_three_connections_told_the_same() -> None:
    """What the recording holds: three connections with the same subscriptions that began some seconds apart and then
    brought the very same bytes, each frame once on each; so an instrument's time never comes twice on one of them."""
    by_conn = {n: [line for line in of_conn("multi_20210722", f"ws{n}") if book_of(line)] for n in (1, 2, 3)}
    began: dict[str, int] = {}
    for lines in by_conn.values():
        times: dict[str, list[int]] = {}
        for line in lines:
            data = book_of(line)
            times.setdefault(data["ticker"], []).append(int(data["ts"]))
        assert all(a < b for of in times.values() for a, b in itertools.pairwise(of))
        for ticker, of in times.items():
            began[ticker] = max(began.get(ticker, 0), of[0])
    later = [
        {
            line["raw"]
            for line in lines
            if (d := book_of(line))["action"] == "update" and int(d["ts"]) > began[d["ticker"]]
        }
        for lines in by_conn.values()
    ]
    ends = [max(line["t"] for line in lines) for lines in by_conn.values()]
    assert len(later[0]) > 1300
    assert later[0] == later[1] == later[2], ends


@pytest.mark.parametrize("name", RECORDINGS[:3])
def test_numbers_are_kept_as_they_were_written(name: str, tmp_path: Path) -> None:
    lines = of_conn(name, "ws1")
    _, out, _ = normalized(lines, tmp_path)
    stored = table(out, "orderbook_l2")
    seen = [level for line in lines if (data := book_of(line)) for side in ("bids", "asks") for level in data[side]]
    rows = [row for row in zip(stored["side"], stored["action"], stored["price"], stored["qty"], strict=True) if row[0]]
    assert len(seen) == len(rows)
    for (price, qty, *_), (_, action, stored_price, stored_qty) in zip(seen, rows, strict=True):
        assert same_decimal(stored_price, price)
        assert same_decimal(stored_qty, qty)
        assert (action == "DELETE") == (Decimal(qty) == 0)


def test_order_book_of_the_library_equals_the_plain_one_and_has_400_levels(tmp_path: Path) -> None:
    """README: 400 levels a side after every update, best prices those of the bbo frame of the same seqId."""
    lines = entries(recording("btcusdtswap_20260926_part1"))
    _, out, model = normalized(lines, tmp_path)
    stored = table(out, "orderbook_l2")
    rows = [dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)]
    best = {row["update_id"]: row for row in model.expected.rows["bbo"]}
    book, at, compared = OrderBook(), 0, 0
    for count, _, update_id, truth in model.expected.messages:
        book.apply(rows[at : at + count])
        at += count
        assert book.is_valid
        assert (book.update_id, book.bids, book.asks) == (update_id, truth[BID], truth[ASK])
        assert (len(book.bids), len(book.asks)) == (400, 400)
        if (row := best.get(update_id)) is not None:
            bid, ask = max(book.bids), min(book.asks)
            assert (bid, book.bids[bid]) == (row["bid_price"], row["bid_qty"])
            assert (ask, book.asks[ask]) == (row["ask_price"], row["ask_qty"])
            compared += 1
    assert at == len(rows)
    assert compared >= 4


def test_an_excerpt_of_2026_is_chained(tmp_path: Path) -> None:
    raws = (FOLDER / "samples" / "cap2026_books_seqid_excerpt.jsonl").read_text().splitlines()
    lines = [{"t": SAMPLE_TIME_NS + n, "conn": "a", "dir": "in", "raw": raw} for n, raw in enumerate(raws)]
    report, out, model = normalized(lines, tmp_path)
    proven(out, model)
    assert len(model.expected.messages) == sum(bool(book_of(line)) for line in lines) == 7
    assert (report.gaps, report.findings) == (0, [])


# Frames taken out, doubled, swapped, changed


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_updates_taken_out_are_in_the_ledger_and_nothing_else(length: int, seed: int, tmp_path: Path) -> None:
    lines = entries(recording("btcusdtswap_20260926_part1"))
    places = updates(lines)
    at = random.Random(seed).randrange(len(places) - length)
    out = places[at : at + length]
    report, tables, model = normalized([line for i, line in enumerate(lines) if i not in out], tmp_path)
    proven(tables, model)
    first, last = book_of(lines[out[0]])["prevSeqId"] + 1, book_of(lines[out[-1]])["seqId"]
    assert ledger(tables) == [("orderbook_l2", "BTC-USDT-SWAP", first, last, "sequence", False)]
    assert report.findings == ["rows of the table gaps that tell of holes: 1"]


@pytest.mark.parametrize("seed", range(6))
def test_a_missing_update_of_old_is_found_by_the_checksum(seed: int, tmp_path: Path) -> None:
    """Without seqId only the 25 best levels tell: from the first wrong sum on nothing of that book is believed."""
    lines = of_conn("multi_20220513", "ws1")
    rng = random.Random(seed)
    places = updates(lines, "BTC-USDT")
    at = next(i for i in rng.sample(places, len(places)) if _touches_best(lines, i))
    ticker = book_of(lines[at])["ticker"]
    lost = book_of(lines[at])
    report = normalize("okx", [write(tmp_path / "r.jsonl", lines[:at] + lines[at + 1 :])], tmp_path / "out")
    assert report.counters["checksum_mismatch"] == 1
    ((feed, name, first, _, cause, repaired),) = ledger(tmp_path / "out")
    assert (feed, name, cause, repaired) == ("orderbook_l2", ticker, "checksum", False)
    assert first < int(lost["ts"]), "the last id that was believed"
    stored = table(tmp_path / "out", "orderbook_l2")
    rows = list(zip(stored["ticker"], stored["update_id"], stored["flags"], strict=True))
    assert all(bool(flags & INVALID) == (of == ticker and update_id > int(lost["ts"])) for of, update_id, flags in rows)


def _touches_best(lines: list[dict[str, Any]], at: int) -> bool:
    """Whether this update changes one of the 25 best levels of a side, and the next one does not hide it again."""
    ticker = book_of(lines[at])["ticker"]
    of_book = [i for i, line in enumerate(lines) if book_of(line).get("ticker") == ticker]
    following = next(i for i in of_book if i > at)
    truth = {u: b for _, t, u, b in run(OkxModel(), lines[:at]).expected.messages if t == ticker}
    book = truth[max(truth)]
    best = {*sorted(book[BID], reverse=True)[:10], *sorted(book[ASK])[:10]}
    prices = [
        {float(level[0]) for side in ("bids", "asks") for level in book_of(lines[i])[side]} for i in (at, following)
    ]
    return bool(prices[0] & best - prices[1])


def test_a_wrong_checksum_is_told_once_and_the_next_snapshot_heals(tmp_path: Path) -> None:
    lines = of_conn("multi_20220513", "ws1")
    places = updates(lines, "BTC-USDT")
    wrong, again = places[5], places[20]
    model = run(OkxModel(), lines[: again + 1])
    truth = {u: b for _, t, u, b in model.expected.messages if t == "BTC-USDT"}
    data = book_of(lines[again])
    book = truth[int(data["ts"])]
    message = json.loads(lines[again]["raw"]) | {"action": "snapshot"}
    whole = {
        side: [[repr(p), repr(q), "0", "1"] for p, q in book[s].items()] for side, s in (("bids", BID), ("asks", ASK))
    }
    sides: Any = tuple({p: q for p, q, *_ in whole[side]} for side in ("bids", "asks"))
    message["data"][0] |= whole | {"checksum": plain_checksum(sides)}
    modified = list(lines)
    modified[wrong] = with_book(lines[wrong], checksum=book_of(lines[wrong])["checksum"] ^ 1)
    modified[again] = {**lines[again], "raw": json.dumps(message)}
    # The numbers of the snapshot are spelled otherwise, so the sums of what follows are not the recorded ones.
    modified = [line for i, line in enumerate(modified) if i <= again or book_of(line).get("ticker") != "BTC-USDT"]
    report = normalize("okx", [write(tmp_path / "r.jsonl", modified)], tmp_path / "out")
    assert ledger(tmp_path / "out")[0][4:] == ("checksum", False)
    stored = table(tmp_path / "out", "orderbook_l2")
    mine = [i for i, name in enumerate(stored["ticker"]) if name == "BTC-USDT"]
    healed = [i for i in mine if stored["flags"][i] & RESYNCED]
    assert {stored["update_id"][i] for i in healed} == {int(data["ts"])}
    assert {(stored["side"][i], stored["price"][i]): stored["qty"][i] for i in healed} == {
        (side, price): qty for side, levels in book.items() for price, qty in levels.items()
    }
    between = {int(book_of(lines[i])["ts"]) for i in places[5:20]}
    assert not between & {stored["update_id"][i] for i in mine}, "what was not proven is superseded by the snapshot"
    assert report.counters["checksum_mismatch"] == 1


def test_a_snapshot_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    lines = of_conn("multi_20220513", "ws1")
    at = next(i for i, line in enumerate(lines) if book_of(line).get("action") == "snapshot")
    ticker, wrong = book_of(lines[at])["ticker"], book_of(lines[at])["checksum"] ^ 1
    report = normalize(
        "okx", [write(tmp_path / "r.jsonl", [*lines[:at], with_book(lines[at], checksum=wrong), *lines[at + 1 :]])],
        tmp_path / "out",
    )  # fmt: skip
    assert report.counters["refused_checksum"] == 1
    stored = table(tmp_path / "out", "orderbook_l2")
    assert {name for name, flags in zip(stored["ticker"], stored["flags"], strict=True) if flags & INVALID} == {ticker}


def test_doubled_and_swapped_updates(tmp_path: Path) -> None:
    lines = entries(recording("btcusdtswap_20260926_part1"))
    places = updates(lines)
    a, b = places[4], places[5]
    modified = [copy for i, line in enumerate(lines) for copy in [line] * (1 + (i == places[8]))]
    modified[a], modified[b] = {**lines[a], "raw": lines[b]["raw"]}, {**lines[b], "raw": lines[a]["raw"]}
    report, tables, _ = normalized(modified, tmp_path)
    normalize("okx", [recording("btcusdtswap_20260926_part1")], tmp_path / "plain")
    columns = ("update_id", "timestamp", "side", "action", "price", "qty", "flags")
    stored, plain = (table(out, "orderbook_l2") for out in (tables, tmp_path / "plain"))
    assert [stored[c] for c in columns] == [plain[c] for c in columns]
    hole = book_of(lines[a])["prevSeqId"] + 1, book_of(lines[a])["seqId"]
    assert ledger(tables) == [
        ("orderbook_l2", "BTC-USDT-SWAP", *hole, "sequence", False),
        ("orderbook_l2", "BTC-USDT-SWAP", *hole, "reordered", True),
    ]
    assert report.counters["book_duplicate"] == 1


def renumbered(lines: list[dict[str, Any]], at: int) -> list[dict[str, Any]]:
    """The venue counts anew from the update `at` on: it names its predecessor, and has a smaller number."""
    shift = book_of(lines[at])["seqId"] - 1000
    out = list(lines)
    for i, line in enumerate(lines[at:], at):
        if data := book_of(line):
            prev = data["prevSeqId"] if i == at else data["prevSeqId"] - shift
            out[i] = with_book(line, seqId=data["seqId"] - shift, prevSeqId=prev)
    return out


def test_keep_alive_and_a_reset_of_the_sequence_are_no_gaps(tmp_path: Path) -> None:
    """F6."""
    lines = entries(recording("btcusdtswap_20260926_part1"))
    at = updates(lines)[7]
    data = book_of(lines[at])
    quiet = with_book(lines[at], asks=[], bids=[], seqId=data["seqId"], prevSeqId=data["seqId"])
    report, tables, model = normalized([*lines[: at + 1], quiet, *lines[at + 1 :]], tmp_path / "quiet")
    proven(tables, model)
    assert (report.counters["book_keep_alive"], report.gaps) == (1, 0)
    report, tables, model = normalized(renumbered(lines, at), tmp_path / "reset")
    proven(tables, model)
    assert (report.counters["book_sequence_reset"], report.gaps) == (1, 0)
    assert "book_keep_alive" not in report.counters
    assert table(tables, "orderbook_l2")["update_id"][-1] < 2000 < data["seqId"]


def test_a_missed_reset_of_the_sequence_is_a_gap(tmp_path: Path) -> None:
    """All later numbers are smaller than the last one and yet new, as their time tells: none passes for a duplicate."""
    lines = entries(recording("btcusdtswap_20260926_part1"))
    at = updates(lines)[7]
    modified = renumbered(lines, at)
    report = normalize("okx", [write(tmp_path / "r.jsonl", modified[:at] + modified[at + 1 :])], tmp_path / "out")
    before = book_of(lines[at])["prevSeqId"]
    assert ledger(tmp_path / "out") == [("orderbook_l2", "BTC-USDT-SWAP", before, before, "ids_reset", False)]
    assert "book_duplicate" not in report.counters
    stored = table(tmp_path / "out", "orderbook_l2")
    rows = zip(stored["update_id"], stored["flags"], strict=True)
    assert all(bool(flags & INVALID) == (update_id < 1_000_000) for update_id, flags in rows)


def test_an_update_without_seqid_and_checksum_is_refused(tmp_path: Path) -> None:
    lines = entries(recording("btcusdtswap_20260926_part1"))
    at = updates(lines)[7]
    message = json.loads(lines[at]["raw"])
    del message["data"][0]["seqId"]
    modified = [*lines[:at], {**lines[at], "raw": json.dumps(message)}, *lines[at + 1 :]]
    report = normalize("okx", [write(tmp_path / "r.jsonl", modified)], tmp_path / "out")
    assert report.counters["refused_no_sequence"] == 1
    assert [gap[4:] for gap in ledger(tmp_path / "out")] == [("sequence", False)]


def merged_trades(*ids: tuple[int, int]) -> list[dict[str, Any]]:
    """Frames of the channel `trades`: counter of the last trade, and how many it stands for."""
    frame = json.loads((FOLDER / "samples" / "roq_trades_01.json").read_text())
    lines = []
    for n, (last, count) in enumerate(ids):
        frame["data"][0] |= {"tradeId": str(last), "count": str(count)}
        lines.append(
            {"t": SAMPLE_TIME_NS + n, "conn": "a", "dir": "in", "raw": json.dumps(frame, separators=(",", ":"))}
        )
    return lines


def test_merged_trades_are_held_against_their_count(tmp_path: Path) -> None:
    """A row for each message, no `trade_seq`; a hole is what lies between the last one and the first it stands for."""
    lines = merged_trades((100, 3), (101, 1), (110, 9), (115, 3), (115, 3), (113, 2), (112, 2), (111, 1))
    report = normalize("okx", [write(tmp_path / "r.jsonl", lines)], tmp_path / "out")
    stored = table(tmp_path / "out", "trades")
    assert stored["trade_id"] == ["100", "101", "110", "115", "112"]
    assert set(stored["trade_seq"]) == {None}
    hole = "trades", "BTC-USDT-SWAP", 111, 112
    assert ledger(tmp_path / "out") == [(*hole, "sequence", False), (*hole, "filled", True)]
    assert report.counters["trade_duplicate"] == 3


def test_a_candle_belongs_to_the_day_that_its_name_says(tmp_path: Path) -> None:
    """1Dutc begins at midnight UTC and is `1d`; 1D begins at that of Hong Kong and keeps the venue's name."""
    frame = json.loads((FOLDER / "samples" / "roq_candle_01.json").read_text())
    lines = []
    for n, bar in enumerate(("1m", "1H", "6Hutc", "1Dutc", "1D", "7m")):
        frame["arg"]["channel"] = f"candle{bar}"
        lines.append({"t": SAMPLE_TIME_NS + n, "conn": "a", "dir": "in", "raw": json.dumps(frame)})
    report = normalize("okx", [write(tmp_path / "r.jsonl", lines)], tmp_path / "out")
    assert table(tmp_path / "out", "candles")["interval"] == ["1m", "1h", "6h", "1d", "1D"]
    assert report.counters["refused_unhandled_channel"] == 1


# Samples and REST bodies


def test_the_table_names_every_sample() -> None:
    assert {path.name for path in (FOLDER / "samples").iterdir()} == set(SAMPLES)


@pytest.mark.parametrize(("name", "outcome"), SAMPLES.items())
def test_sample(name: str, outcome: str, tmp_path: Path) -> None:
    raw = (FOLDER / "samples" / name).read_text()
    line = {"t": SAMPLE_TIME_NS, "conn": "sample", "dir": "in", "raw": raw}
    report = normalize("okx", [write(tmp_path / "sample.jsonl", [line])], tmp_path / "out")
    refused = [c.removeprefix("refused_") for c in report.counters if c.startswith("refused_")]
    rows = "+".join(f"{feed} {count}" for feed, count in report.rows.items() if count)
    assert (rows or ("refused " + refused[0] if refused else "control")) == outcome
    assert len(refused) == outcome.startswith("refused")
    assert "protocol_drift" not in report.counters, "all its fields are known"
    if refused:
        assert report.samples[f"refused_{refused[0]}"].endswith(raw[:512])
    if rows:
        proven(tmp_path / "out", run(OkxModel(), [line]))


Make = Callable[..., Okx]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """A venue over small rings; without streams it takes every instrument."""
    made: list[Emit] = []

    def make_(*streams: Stream, **options: Any) -> Okx:
        emit = Emit(tmp_path / str(len(made)), "t", Okx.EXCHANGE, Okx.FEEDS, semaphore=False, capacities=SMALL)
        made.append(emit)
        emit.packet(SAMPLE_TIME_NS, emit.clock())
        return Okx(emit, Options(**options), list(streams), open_world=not streams)

    yield make_
    for emit in made:
        emit.close()


BODIES = sorted(path.name for path in (FOLDER / "rest").iterdir()) if DATA.is_dir() else []
INSTRUMENTS = [name for name in BODIES if "instruments" in name or name == "symbols.json"]
LAST_TRADES = ["trades.json", "recent_trades.json"]


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_instruments_body(name: str) -> None:
    raw = (FOLDER / "rest" / name).read_bytes()
    model = OkxModel()
    model.body("/api/v5/public/instruments", json.loads(raw))
    assert {i.ticker: told(i) for i in Okx.instruments(raw)} == model.expected.instruments != {}


def test_sizes_of_contracts() -> None:
    """BTC-USD_UM-261030 is linear: 0.01 BTC; BTC-USD-261030 inverse: 100 USD."""
    found = Okx.instruments((FOLDER / "rest" / "cap2026_instruments_futures_excerpt.json").read_bytes())
    assert [(i.ticker, i.contract_size, i.base, i.quote) for i in found] == [
        ("BTC-USD_UM-261030", 0.01, "BTC", "USD"),
        ("BTC-USD-261030", 100.0, "BTC", "USD"),
    ]


@pytest.mark.parametrize("odd", [{"listTime": "-1"}, {"expTime": "4102444800001"}, {"listTime": "soon"}, {"tickSz": "0.1 USD"}, {"lotSz": "-1"}])  # fmt: skip
def test_one_impossible_instrument_harms_no_other(odd: dict[str, str], make: Make) -> None:
    venue = make()
    listed = [{"instId": f"{base}-USDT", "instType": "SPOT", "state": "live", "tickSz": "0.1"} for base in "ABC"]
    listed[1] |= odd
    url = "/api/v5/public/instruments?instType=SPOT"
    found = venue.take_instruments(url, json.dumps({"code": "0", "data": listed}).encode())
    assert [info.ticker for info in found if info.active] == ["A-USDT", "B-USDT", "C-USDT"], "all can be collected"
    ring = venue.emit.rings["instruments"]
    assert [ring.tickers[code] for code in ring.recent_rows(0)["ticker"].tolist()] == ["A-USDT", "C-USDT"]
    assert venue.emit.counters["refused_absurd_number"] == 1
    assert "B-USDT" in venue.emit.samples["refused_absurd_number"]


@pytest.mark.parametrize("name", LAST_TRADES)
def test_trades_body_repairs_a_hole(name: str, make: Make) -> None:
    """A live trade before and one behind those of the answer; it fills the hole between them."""
    venue = make()
    raw = (FOLDER / "rest" / name).read_bytes()
    trades = json.loads(raw)["data"]
    ticker, ids = trades[0]["instId"], sorted(int(t["tradeId"]) for t in trades)
    for seq in (ids[0] - 1, ids[-1] + 1):
        data = {"instId": ticker, "tradeId": str(seq), "px": "1", "sz": "2", "side": "buy", "ts": "1796083200000"}
        venue.decode(json.dumps({"arg": {"channel": "trades-all", "instId": ticker}, "data": [data]}).encode())
    (want,) = venue.wants
    path = f"/api/v5/market/history-trades?instId={ticker}&type=1&after={ids[0] + 100}&limit=100"
    assert want.path == path
    venue.http("https://www.okx.com" + path, raw)
    rows = venue.emit.rings["trades"].recent_rows(0)[2:]
    assert [
        (int(r["trade_seq"]), r["trade_id"], float(r["price"]), float(r["qty"]), int(r["side"]), int(r["timestamp"]))
        for r in rows
    ] == [
        (int(t["tradeId"]), b"", float(t["px"]), float(t["sz"]), 1 if t["side"] == "buy" else -1, 1000 * int(t["ts"]))
        for t in trades[::-1]
    ]
    assert all(flags & 16 for flags in rows["flags"].tolist())
    gaps = venue.emit.rings["gaps"].recent_rows(0)
    assert [(int(g["first_id"]), int(g["last_id"]), bool(g["repaired"])) for g in gaps] == [
        (ids[0], ids[-1], False), (ids[0], ids[-1], True),
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(BODIES) - set(INSTRUMENTS) - set(LAST_TRADES)))
def test_other_bodies_make_no_rows(name: str, make: Make) -> None:
    venue = make()
    raw = (FOLDER / "rest" / name).read_bytes()
    with pytest.raises(FrameError) as refused:
        venue.http("https://www.okx.com/api/v5/market/books?instId=A-B", raw)
    assert refused.value.reason == "unhandled_url"
    if name != "block_trades.json":  # its rows have the fields of a trade; only its URL tells it apart
        with pytest.raises((msgspec.DecodeError, FrameError)):
            venue.http("https://www.okx.com/api/v5/market/history-trades?instId=A-B&after=1", raw)
    assert sum(ring.next for ring in venue.emit.rings.values()) == 0


# A connection of our own


def stream(name: str, feed: str, ticker: str, path: str = "/ws/v5/public") -> Stream:
    return Stream(name, feed, ticker, path)


def sent(venue: Okx) -> list[Any]:
    """What it wants to send, as JSON where it is some; wants are used up."""
    texts = [want.text for want in venue.wants if hasattr(want, "text")]
    venue.wants.clear()
    return [json.loads(text) if text.startswith("{") else text for text in texts]


def test_streams_of_every_kind_of_instrument() -> None:
    feeds, day = Okx.FEEDS, Options(intervals=("1d",), trade_channel="trades-all")
    names = {
        ticker: {(s.name, s.feed, s.path.rpartition("/")[2]) for s in Okx.streams_of(ticker, feeds, day)}
        for ticker in ("BTC-USDT", "BTC-USD-SWAP", "BTC-USD_UM-261030", "BTC-USD-261030-90000-C")
    }
    common = {
        ("trades-all:{}", "trades", "business"), ("books:{}", "orderbook_l2", "public"), ("bbo-tbt:{}", "bbo", "public"),
        ("tickers:{}", "tickers", "public"), ("candle1Dutc:{}", "candles", "business"),
    }  # fmt: skip
    contract = {
        ("mark-price:{}", "tickers", "public"), ("open-interest:{}", "tickers", "public"),
        ("index-tickers:BTC-USD", "tickers", "public"),
    }  # fmt: skip
    own = {
        "BTC-USDT": set(),
        "BTC-USD-SWAP": contract | {("funding-rate:{}", "tickers", "public"), ("liquidation-orders:SWAP", "liquidations", "public")},
        "BTC-USD_UM-261030": contract | {("liquidation-orders:FUTURES", "liquidations", "public")},
        "BTC-USD-261030-90000-C": contract | {("liquidation-orders:OPTION", "liquidations", "public")},
    }  # fmt: skip
    for ticker, found in names.items():
        assert found == {(name.format(ticker), feed, path) for name, feed, path in common | own[ticker]}


def test_a_connection_has_fewer_than_30_books_and_one_path() -> None:
    tickers = [f"T{n}-USDT" for n in range(70)]
    plan = Okx.plan(tickers, ("orderbook_l2", "trades", "candles"), Options())
    assert [len({s.path for s in connection}) for connection in plan] == [1] * len(plan)
    assert [sum(s.feed == "orderbook_l2" for s in c) for c in plan if c[0].path.endswith("public")] == [29, 29, 12]
    assert sum(len(c) for c in plan) == 3 * 70


def test_what_several_instruments_share_is_subscribed_once_and_written_for_each(make: Make) -> None:
    wanted = ("BTC-USDT-SWAP", "BTC-USDT-261030")
    streams = [s for t in wanted for s in Okx.streams_of(t, ("tickers",), Options())]
    venue = make(*streams, stream("liquidation-orders:SWAP", "liquidations", "BTC-USDT-SWAP"))
    venue.opened()
    ((request),) = sent(venue)
    args = [tuple(arg.values()) for arg in request["args"]]
    assert len(args) == len(set(args)) == len(streams)
    assert {"channel": "liquidation-orders", "instType": "SWAP"} in request["args"]
    venue.decode((FOLDER / "samples" / "rec_index_tickers_perp_20260930.json").read_bytes())
    rows = venue.emit.rings["tickers"].recent_rows(0)
    assert [(venue.emit.rings["tickers"].tickers[row["ticker"]], row["index_price"]) for row in rows] == [
        (ticker, 83043.9) for ticker in wanted
    ]
    for name in ("cap2026_liquidation_orders_01.json", "cap2026_liquidation_orders_02.json"):
        venue.decode((FOLDER / "samples" / name).read_bytes())
    (row,) = venue.emit.rings["liquidations"].recent_rows(0)
    assert (row["side"], row["price"], row["qty"]) == (-1, 82655.7, 8.55)
    assert venue.emit.counters["liquidations_of_others"] == 1


def test_leaving_one_of_those_that_share_a_stream_leaves_it_to_the_others(make: Make) -> None:
    """A delisted future must neither end the index of the perpetual nor be written any more; and it may come back."""
    stays, goes = "BTC-USDT-SWAP", "BTC-USDT-261030"
    of = {ticker: Okx.streams_of(ticker, ("tickers",), Options()) for ticker in (stays, goes)}
    venue = make(*of[stays], *of[goes])
    frame = (FOLDER / "samples" / "rec_index_tickers_perp_20260930.json").read_bytes()

    def written() -> list[str]:
        before = venue.emit.rings["tickers"].next
        venue.decode(frame)
        rows = venue.emit.rings["tickers"].recent_rows(before)
        return [venue.emit.rings["tickers"].tickers[code] for code in rows["ticker"].tolist()]

    assert written() == [stays, goes]
    venue.remove([goes], connected=True)
    ((request),) = sent(venue)
    assert request["op"] == "unsubscribe"
    assert {tuple(arg.values()) for arg in request["args"]} == {
        (channel, goes) for channel in ("tickers", "mark-price", "open-interest")
    }
    assert written() == [stays]
    assert "index-tickers:BTC-USDT" in venue.proof
    venue.add(of[goes], connected=True)
    ((request),) = sent(venue)
    assert {"channel": "index-tickers", "instId": "BTC-USDT"} not in request["args"]
    assert written() == [stays, goes]


def test_a_trade_of_a_new_side_is_told_and_kept(make: Make) -> None:
    venue = make(stream("trades:A-USDT", "trades", "A-USDT"))
    for number, side in enumerate(("buy", "both", "sell"), start=1):
        trade = {
            "instId": "A-USDT",
            "tradeId": str(number),
            "px": "1.5",
            "sz": "2",
            "side": side,
            "ts": "1796083200000",
            "count": "1",
        }
        venue.decode(json.dumps({"arg": {"channel": "trades", "instId": "A-USDT"}, "data": [trade]}).encode())
    assert venue.emit.rings["trades"].recent_rows(0)["side"].tolist() == [1, 0, -1]
    assert venue.emit.counters["protocol_drift"] == 1
    assert "new side of a trade both" in venue.notes


def liquidations(*orders: tuple[str, list[dict[str, str]]]) -> bytes:
    detail = {"bkPx": "2", "posSide": "long", "side": "sell", "sz": "3", "ts": "1796083200000"}
    data = [
        {"details": [detail | changed for changed in details], "instId": ticker, "instType": "SWAP"}
        for ticker, details in orders
    ]
    return json.dumps({"arg": {"channel": "liquidation-orders", "instType": "SWAP"}, "data": data}).encode()


@pytest.mark.parametrize("odd", [{"side": "none"}, {"sz": "-1"}, {"bkPx": ""}, {"ts": "-1"}])
def test_a_forced_order_of_another_instrument_harms_no_wanted_one(odd: dict[str, str], make: Make) -> None:
    venue = make(stream("liquidation-orders:SWAP", "liquidations", "A-USDT-SWAP"))
    venue.decode(liquidations(("B-USDT-SWAP", [odd]), ("A-USDT-SWAP", [{}])))
    assert venue.emit.rings["liquidations"].recent_rows(0)["qty"].tolist() == [3.0]
    assert (venue.emit.counters["liquidations_of_others"], venue.emit.counters["protocol_drift"]) == (1, 0)


def test_a_forced_order_of_a_new_side_is_told_and_kept(make: Make) -> None:
    venue = make(stream("liquidation-orders:SWAP", "liquidations", "A-USDT-SWAP"))
    venue.decode(liquidations(("A-USDT-SWAP", [{}, {"side": "none"}, {"side": "buy"}])))
    assert venue.emit.rings["liquidations"].recent_rows(0)["side"].tolist() == [-1, 0, 1]
    assert venue.emit.counters["protocol_drift"] == 1


def test_half_a_message_of_forced_orders_is_not_written(make: Make) -> None:
    venue = make(stream("liquidation-orders:SWAP", "liquidations", "A-USDT-SWAP"))
    with pytest.raises(FrameError, match="liquidation price=1e\\+300"):
        venue.decode(liquidations(("A-USDT-SWAP", [{}, {"bkPx": "1e300"}, {}])))
    assert venue.emit.rings["liquidations"].next == 0


def test_an_error_refuses_the_stream_that_it_names_or_halves_the_request(make: Make) -> None:
    names = [f"tickers:T{n}-USDT" for n in range(4)]
    venue = make(*[stream(name, "tickers", name.partition(":")[2]) for name in names])
    venue.opened()
    ((request),) = sent(venue)
    ack = {"id": request["id"], "event": "subscribe", "arg": request["args"][0], "connId": "a"}
    venue.decode(json.dumps(ack).encode())
    text = (
        "Wrong URL or channel:tickers,instId:T1-USDT doesn't exist. Please use the correct URL, channel and parameters"
    )
    error = {"id": request["id"], "event": "error", "code": "60018", "msg": text, "connId": "a"}
    venue.decode(json.dumps(error).encode())
    states = [venue.proof[name] for name in names]
    assert [bool(s.acknowledged_ns) for s in states] == [True, False, False, False]
    assert [s.refused.partition(" ")[0] for s in states] == ["", "60018", "", ""]
    venue.decode(json.dumps({**error, "code": "60012", "msg": "Invalid request"}).encode())
    assert [s.refused.partition(" ")[0] for s in states] == ["", "60018", "", ""]
    halves = sent(venue)
    assert [[arg["instId"] for arg in half["args"]] for half in halves] == [["T2-USDT"], ["T3-USDT"]]
    venue.decode(json.dumps({**error, "id": halves[0]["id"], "code": "60012", "msg": "Invalid request"}).encode())
    venue.decode(json.dumps({**ack, "id": halves[1]["id"], "arg": halves[1]["args"][0]}).encode())
    assert [s.refused.partition(" ")[0] for s in states] == ["", "60018", "60012", ""]
    assert [bool(s.acknowledged_ns) for s in states] == [True, False, False, True]
    assert venue.emit.counters["stream_refused"] == 2
    with pytest.raises(FrameError, match="60012"):  # of no request that is known
        venue.decode(json.dumps({**error, "code": "60012", "msg": "Invalid request"}).encode())


def test_a_ping_in_silence_and_a_reconnect_when_nothing_answers(make: Make) -> None:
    """F9-like: the venue hangs up after 30 s without anything; its pong is no JSON and no data."""
    venue = make(stream("tickers:A-USDT", "tickers", "A-USDT"))
    venue.opened()
    venue._pending.clear()
    sent(venue)
    start = venue._pinged_ns
    venue.tick(start + 15_000_000_000)
    assert sent(venue) == []
    venue.tick(start + 21_000_000_000)
    assert sent(venue) == ["ping"]
    venue.decode(b"pong")
    venue.tick(start + 35_000_000_000)
    assert not venue.wants
    venue._ponged_ns = start
    venue.emit.packet(start, 0)
    venue.tick(start + 36_000_000_000)
    (want,) = venue.wants
    assert (want.cause, want.overlap) == ("ping_unanswered", False)


def test_a_notice_of_an_upgrade_is_a_replacement_in_time(make: Make) -> None:
    """F5."""
    venue = make(stream("tickers:A-USDT", "tickers", "A-USDT"))
    venue.decode((FOLDER / "samples" / "roq_notice_01.json").read_bytes())
    (want,) = venue.wants
    assert (want.cause, want.overlap) == ("service_upgrade", True)
    venue.decode(b'{"event":"notice","code":"64099","msg":"something new","connId":"a"}')
    assert len(venue.wants) == 1
    assert venue.emit.counters["protocol_drift"] == 1


def broken_book(venue: Okx, ticker: str, seq: int) -> None:
    """A snapshot and an update that does not follow it."""
    for action, prev, number in (("snapshot", -1, seq), ("update", seq + 1, seq + 2)):
        data = {"asks": [["2", "1", "0", "1"]], "bids": [["1", "1", "0", "1"]], "ts": "1796083200000"}
        data |= {"checksum": 0, "prevSeqId": prev, "seqId": number}
        frame = {"arg": {"channel": "books", "instId": ticker}, "action": action, "data": [data]}
        venue.decode(json.dumps(frame, separators=(",", ":")).encode())


def test_broken_books_are_resubscribed_together_and_never_in_a_storm(make: Make) -> None:
    """480 requests an hour: one pair for all that are broken, and a book that waits for its snapshot asks no more."""
    tickers = [f"T{n}-USDT" for n in range(20)]
    venue = make(*[stream(f"books:{t}", "orderbook_l2", t) for t in tickers])
    venue.opened()
    venue._pending.clear()
    sent(venue)
    now = venue._pinged_ns
    for ticker in tickers:
        broken_book(venue, ticker, 1)
    venue.tick(now)
    leave, take = sent(venue)
    assert (leave["op"], take["op"]) == ("unsubscribe", "subscribe")
    assert leave["args"] == take["args"] == [{"channel": "books", "instId": t} for t in tickers]
    for ticker in tickers:
        for n in range(5):  # what comes meanwhile does not ask again
            data = {
                "asks": [],
                "bids": [["1", "2", "0", "1"]],
                "ts": "1796083200001",
                "seqId": 9 + n,
                "prevSeqId": 8 + n,
            }
            frame = {"arg": {"channel": "books", "instId": ticker}, "action": "update", "data": [data]}
            venue.decode(json.dumps(frame, separators=(",", ":")).encode())
    venue._pending.clear()
    venue.tick(now + 5_000_000_000)
    assert sent(venue) == []


def test_the_requests_of_an_hour_are_counted_and_a_new_connection_comes_before_the_last(make: Make) -> None:
    """A book that breaks all the time: spaced more and more, never more than 480 requests, in the end a replacement."""
    venue = make(stream("books:A-USDT", "orderbook_l2", "A-USDT"))
    venue.opened()
    (first,) = sent(venue)
    assert first["op"] == "subscribe"
    now, requests, times = venue._requests_ns[0], 1, []
    for step in range(36_000):  # an hour, ten times a second
        venue._pending.clear()
        venue._ponged_ns = venue._pinged_ns = now + step * 100_000_000
        if "A-USDT" not in venue._resubscribe:
            broken_book(venue, "A-USDT", 10 * step + 1)
        monotonic = now + step * 100_000_000
        venue.tick(monotonic)
        if any(not hasattr(want, "text") for want in venue.wants):
            break
        for message in sent(venue):
            requests += 1
            times.append(monotonic)
            venue._requests_ns[-1] = monotonic
            assert message["op"] in ("subscribe", "unsubscribe")
        venue._resubscribe.clear()
    assert requests <= 480
    gaps = [b - a for a, b in zip(times[::2], times[2::2], strict=False)]
    assert gaps == sorted(gaps), "more and more spaced"
    assert gaps[-1] > 30 * gaps[0]


def test_a_probe_tells_how_new_the_venues_own_data_is(make: Make) -> None:
    venue = make(stream("trades:BTC-USDT", "trades", "BTC-USDT"))
    body = (FOLDER / "rest" / "trades.json").read_bytes()
    found = {}
    for channel in ("trades", "trades-all", "books", "bbo-tbt", "tickers", "candle1Dutc", "funding-rate"):
        fetch = venue.probe(stream(f"{channel}:BTC-USDT", "x", "BTC-USDT"))
        found[channel] = fetch.path if fetch else None
    trades = "/api/v5/market/trades?limit=1&instId=BTC-USDT"
    assert found["trades"] == found["trades-all"] == found["candle1Dutc"] == trades, "a trade changes the candles, too"
    assert found["funding-rate"] == "/api/v5/public/funding-rate?&instId=BTC-USDT"
    assert venue.newest_us(venue.streams[0], body) == 1747087163557000
    with pytest.raises(FrameError, match="51001"):
        venue.newest_us(venue.streams[0], (FOLDER / "rest" / "cap2026_error_51001.json").read_bytes())


def test_identity_of_a_best_price_is_its_seqid_not_when_it_was_pushed(make: Make) -> None:
    venue = make()
    frame = (FOLDER / "samples" / "rec_bbo_tbt_btcusdtswap_20260926_part1.json").read_bytes()
    later = frame.replace(b"1790439594900", b"1790439594907")
    other = frame.replace(b"342177336945", b"342177336946")
    assert later != frame
    assert venue.identity(later) == venue.identity(frame) != venue.identity(other)
    book = (FOLDER / "samples" / "rec_books_update_btcusdtswap_20260926_part1.json").read_bytes()
    assert venue.identity(book) == book
    assert venue.identity(b"pong") is None


def test_order_of_fields_decides_nothing(make: Make) -> None:
    """The same pushes with their fields turned round, and replies that begin like data, give the same rows."""
    for name in ("rec_bbo_tbt_btcusdtswap_20260926_part1.json", "roq_trades_01.json", "cap2026_tickers_spot.json"):
        message = json.loads((FOLDER / "samples" / name).read_text())
        plain, turned = make(), make()
        for _ in range(2):
            plain.decode(json.dumps(message, separators=(",", ":")).encode())
            turned.decode(json.dumps({k: message[k] for k in reversed(message)}, separators=(",", ":")).encode())
            reply = {"arg": message["arg"], "event": "subscribe", "connId": "a"}
            plain.decode(json.dumps(reply, separators=(",", ":")).encode())
        counts = [Counter({f: r.next for f, r in v.emit.rings.items()}) for v in (plain, turned)]
        assert counts[0] == counts[1]
        assert counts[0].total() > 0
