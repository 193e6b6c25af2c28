"""Recorded Binance USD-M traffic through normalize: every row against plain json, the `pu` chain, books against bookTicker.

The recordings of 2021 and 2024 have the old form (no route, `depth@0ms`), those of 2026 the new fields.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
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
    RESYNCED,
    BinanceFuturesModel,
    compare,
    entries,
    needs_data,
    plain,
    rebuild,
    run,
    same_decimal,
    table,
)

from mdcollector.emit import Emit
from mdcollector.errors import FrameError, RingError
from mdcollector.exchanges import Fetch, Options
from mdcollector.exchanges.binance import BinanceFutures
from mdcollector.normalize import Report, normalize
from mdcollector.recording import Entry, RecordingWriter
from mdcollector.records import ALWAYS_ON
from mdcollector.ring import RingReader

pytestmark = needs_data

FOLDER = DATA / "binance_futures"
SAMPLE_TIME_NS = 1_796_083_200_000_000_000  # behind every sample, so that no time of theirs lies in the future
# Recordings, and how many book messages have the id of a bookTicker frame.
RUNS = {"multi_20210405": 216, "multi_20210722": 50, "btcusdt_demo_20260915_part1": 0, "markprice_20260930": 0}
SMALL = dict.fromkeys((*BinanceFutures.FEEDS, *ALWAYS_ON), 1 << 14)
# What becomes of every sample: rows of a feed | refused for a reason | control (a reply; no row belongs to it).
SAMPLES = {
    "24hrticker_01.json": "tickers 1",
    "24hrticker_03.json": "tickers 1",
    "ack_agg_trades.json": "control",
    "agg_trade.json": "trades 1",
    "agg_trades.json": "trades 1",
    "aggtrade_01.json": "trades 1",
    "aggtrade_03.json": "refused wrong_type",  # of 2019, without an id
    "array_24hrticker_01.json": "refused unhandled_stream",
    "array_markpriceupdate.json": "refused unhandled_stream",
    "asset_index.json": "refused unhandled_stream",
    "book.json": "orderbook_l2 2",
    "book_ticker_01.json": "bbo 1",
    "bookticker_01.json": "refused unhandled_stream",
    "bookticker_03.json": "bbo 1",
    "cap2026_aggtrade_june.json": "trades 1",
    "cap2026_aggtrade_market_path.json": "trades 1",
    "cap2026_bookticker.json": "bbo 1",
    "cap2026_bookticker_02.json": "bbo 1",
    "cap2026_forceorder_01.json": "liquidations 1",
    "cap2026_forceorder_03.json": "liquidations 1",
    "cap2026_forceorder_arr.json": "refused unhandled_stream",
    "cap2026_forceorder_june.json": "liquidations 1",
    "cap2026_kline_closed.json": "candles 1",
    "cap2026_markprice.json": "tickers 1",
    "composit_index.json": "refused unhandled_stream",
    "cont_klines.json": "refused unhandled_stream",
    "depth_diff_update.json": "orderbook_l2 2",
    "depth_update_01.json": "orderbook_l2 2",
    "depthupdate_01.json": "orderbook_l2 4",
    "depthupdate_03.json": "refused unhandled_stream",
    "depthupdate_04.json": "refused unhandled_stream",
    "depthupdate_06.json": "orderbook_l2 2",
    "depthupdate_07.json": "refused absurd_update_id",
    "forceorder_01.json": "liquidations 1",
    "kline_01.json": "candles 1",
    "kline_closed.json": "candles 1",
    "kline_open.json": "candles 1",
    "klines.json": "candles 1",
    "liquidation.json": "liquidations 1",
    "liquidations.json": "liquidations 1",
    "mark_price_01.json": "tickers 1",
    "markpriceupdate_01.json": "tickers 1",
    "markpriceupdate_03.json": "tickers 1",
    "markpriceupdate_04.json": "tickers 1",
    "mini_ticker.json": "refused unhandled_stream",
    "partial_book.json": "refused unhandled_stream",
    "rec_aggtrade_multi_20210405.json": "trades 1",
    "rec_aggtrade_multi_20210722.json": "trades 1",
    "rec_bookticker_btcusdt_20240808.json": "bbo 1",
    "rec_bookticker_btcusdt_demo_20260915_part1.json": "bbo 1",
    "rec_bookticker_multi_20210405.json": "bbo 1",
    "rec_bookticker_multi_20210722.json": "bbo 1",
    "rec_depthupdate_btcusdt_20240808.json": "orderbook_l2 82",
    "rec_depthupdate_btcusdt_demo_20260915_part1.json": "orderbook_l2 1",
    "rec_depthupdate_multi_20210405.json": "orderbook_l2 13",
    "rec_depthupdate_multi_20210722.json": "orderbook_l2 5",
    "rec_kline_multi_20210722.json": "candles 1",
    "rec_markpriceupdate_markprice_20260930.json": "tickers 1",
    "rec_trade_btcusdt_20240808.json": "trades 1",
    "roq_agg_trade_01.json": "trades 1",
    "roq_book_ticker_01.json": "bbo 1",
    "roq_book_ticker_02.json": "bbo 1",
    "roq_mark_price_update_01.json": "tickers 1",
    "roq_mini_ticker_01.json": "refused unhandled_event",
    "roq_wsapi_error_01.json": "refused venue_error",
    "symbol_updates.json": "refused unhandled_stream",
    "ticker_01.json": "tickers 1",
    "ticker_24hr.json": "tickers 1",
    "trade_01.json": "trades 1",
    "trade_03.json": "gaps 1",  # X is INSURANCE_FUND: its counter is accounted for, its price is nobody's
    "trade_04.json": "trades 1",
}  # fmt: skip
FIELDS_UNKNOWN: set[str] = set()


def recording(name: str) -> Path:
    return FOLDER / "recorded" / f"{name}.jsonl.zst"


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    with RecordingWriter(path) as out:
        for line in lines:
            out.write(Entry(**line))
    return path


def normalized(lines: list[dict[str, Any]], tmp_path: Path) -> tuple[Report, Path, BinanceFuturesModel]:
    """A recording of these lines through the product, and by plain json."""
    report = normalize("binance_futures", [write(tmp_path / "modified.jsonl", lines)], tmp_path / "out")
    return report, tmp_path / "out", run(BinanceFuturesModel(), lines)


def proven(out: Path, model: BinanceFuturesModel) -> None:
    """All tables are what the model says, and a reader's books are the plain ones."""
    for feed, rows in model.expected.rows.items():
        compare(table(out, feed), rows)
    if model.expected.messages:
        rebuild(table(out, "orderbook_l2"), model.expected.messages)


def stream(line: dict[str, Any]) -> str:
    return str(json.loads(line["raw"])["stream"]) if line["dir"] == "in" else ""


def ledger(out: Path) -> list[tuple[Any, ...]]:
    gaps = table(out, "gaps")
    columns = ("feed", "ticker", "first_id", "last_id", "cause", "repaired")
    return sorted(zip(*(gaps[c] for c in columns), strict=True)) if gaps else []


@pytest.mark.parametrize(("name", "comparable"), RUNS.items(), ids=RUNS)
def test_every_row_equals_the_raw_frames(name: str, comparable: int, tmp_path: Path) -> None:
    lines = entries(recording(name))
    report = normalize("binance_futures", [recording(name)], tmp_path)
    model = run(BinanceFuturesModel(), lines)
    assert not model.expected.rows["gaps"], "the README says that the chain is complete"
    proven(tmp_path, model)
    assert report.findings == []
    assert report.rows_written == sum(len(rows) for rows in model.expected.rows.values())
    assert report.counters.get("book_duplicate", 0) == model.expected.counters["book_duplicate"]
    assert not [c for c in report.counters if c.startswith(("refused_", "gap_")) or c == "protocol_drift"]
    trades = table(tmp_path, "trades")
    for price, qty, texts in zip(trades.get("price", ()), trades.get("qty", ()), model.expected.texts, strict=True):
        assert same_decimal(price, texts[0])
        assert same_decimal(qty, texts[1])
    equal = 0
    for _, ticker, update_id, book in model.expected.messages:
        best = model.best.get((ticker, update_id))
        if best is not None and book[BID] and book[ASK]:
            bid, ask = max(book[BID]), min(book[ASK])
            assert (bid, book[BID][bid], ask, book[ASK][ask]) == best, (ticker, update_id)
            equal += 1
    assert equal == comparable


def test_a_long_recording_of_the_old_form(tmp_path: Path) -> None:
    """Six minutes of BTCUSDT by `depth@0ms`: every trade, every best price, every level; books where it has one."""
    report = normalize("binance_futures", [recording("btcusdt_20240808")], tmp_path)
    assert report.findings == []
    assert not [name for name in report.counters if name.startswith(("refused_", "gap_", "book_dup"))]
    frames: dict[str, list[Any]] = {}
    snapshot: Any = None
    for line in entries(recording("btcusdt_20240808")):
        message = json.loads(line["raw"])
        if line["dir"] == "http":
            snapshot = message
        else:
            frames.setdefault(message["data"]["e"], []).append(message["data"])
    trades, bbo, levels = (table(tmp_path, feed) for feed in ("trades", "bbo", "orderbook_l2"))
    names = ("trade_seq", "price", "qty", "side", "timestamp")
    assert list(zip(*(trades[n] for n in names), strict=True)) == [
        (d["t"], float(d["p"]), float(d["q"]), -1 if d["m"] else 1, d["T"] * 1000) for d in frames["trade"]
    ]
    names = ("update_id", "bid_price", "bid_qty", "ask_price", "ask_qty", "timestamp")
    assert list(zip(*(bbo[n] for n in names), strict=True)) == [
        (d["u"], *(float(d[k]) for k in "bBaA"), d["T"] * 1000) for d in frames["bookTicker"]
    ]
    last, expected = snapshot["lastUpdateId"], []
    events = [(snapshot["T"], last, snapshot["bids"], snapshot["asks"])]
    for d in frames["depthUpdate"]:
        if d["u"] > last:
            assert d["pu"] == events[-1][1] or (len(events) == 1 and d["U"] <= last), "the chain"
            events.append((d["T"], d["u"], d["b"], d["a"]))
    books: dict[int, dict[float, float]] = {BID: {}, ASK: {}}
    best = {d["u"]: tuple(float(d[k]) for k in "bBaA") for d in frames["bookTicker"]}
    compared = 0
    for time_ms, update_id, bids, asks in events:
        for side, pairs in ((BID, bids), (ASK, asks)):
            for price, qty in ((float(p), float(q)) for p, q in pairs):
                action = "DELETE" if not qty else "UPDATE" if price in books[side] else "NEW"
                expected.append((time_ms * 1000, update_id, side, action, price, qty))
                books[side][price] = qty
                if not qty:
                    del books[side][price]
        if update_id in best:
            bid, ask = max(books[BID]), min(books[ASK])
            assert (bid, books[BID][bid], ask, books[ASK][ask]) == best[update_id]
            compared += 1
    names = ("timestamp", "update_id", "side", "action", "price", "qty")
    assert list(zip(*(levels[n] for n in names), strict=True)) == expected
    assert compared == 629
    assert not any(flags & INVALID for flags in levels["flags"])


def holes(lines: list[dict[str, Any]], out: set[int]) -> list[tuple[Any, ...]]:
    """What the ledger must say of frames taken out, read from these frames alone: runs of ids per instrument."""
    found: dict[tuple[str, str], list[list[int]]] = {}
    for i in sorted(out):
        data = json.loads(lines[i]["raw"])["data"]
        feed, first, last = (
            ("orderbook_l2", data["pu"] + 1, data["u"]) if "pu" in data else ("trades", data["a"], data["a"])
        )
        runs = found.setdefault((feed, data["s"]), [])
        if runs and runs[-1][1] + 1 == first:
            runs[-1][1] = last
        else:
            runs.append([first, last])
    return sorted(
        (feed, ticker, first, last, "sequence", False) for (feed, ticker), runs in found.items() for first, last in runs
    )


@pytest.mark.parametrize("count", [1, 5, 40])
def test_every_frame_taken_out_is_in_the_ledger_and_nothing_else(count: int, tmp_path: Path) -> None:
    lines, rng = entries(recording("multi_20210405"))[:6000], random.Random(count)
    numbered = [i for i, line in enumerate(lines) if i > 2000 and ("@depth" in stream(line) or "rade" in stream(line))]
    last = {stream(lines[i]): i for i in numbered}
    start = rng.randrange(len(numbered) // 2)
    out = {numbered[start], *rng.sample(numbered, count - 1)} - set(last.values())
    report, tables, model = normalized([line for i, line in enumerate(lines) if i not in out], tmp_path)
    proven(tables, model)
    assert ledger(tables) == holes(lines, out)
    assert report.gaps == len(holes(lines, out))
    assert not [counter for counter in report.counters if counter.startswith("refused_")]


@pytest.mark.parametrize("inside", [True, False])
def test_a_book_goes_on_behind_a_snapshot(inside: bool, tmp_path: Path) -> None:
    """Both ways in which the venue lets a snapshot be continued: by an event that holds its id, and by `pu` equal to it."""
    lines = entries(recording("multi_20210405"))[:6000]
    depth = [i for i, line in enumerate(lines) if stream(line) == "sandusdt@depth@100ms"]
    lost, at, answer_at = depth[200], depth[300], depth[320]
    truth = {
        (ticker, update_id): book for _, ticker, update_id, book in run(BinanceFuturesModel(), lines).expected.messages
    }
    data, behind = (json.loads(lines[i]["raw"])["data"] for i in (at, depth[301]))
    book = truth["SANDUSDT", data["u"]]
    last_id = data["u"]
    if inside:  # changes have absolute quantities, so the snapshot may hold a part of the next event already
        last_id = behind["U"]
        assert last_id < behind["u"]
    body = {
        "lastUpdateId": last_id, "E": data["E"], "T": data["T"],
        "bids": [[f"{p:.8f}", f"{q:.8f}"] for p, q in sorted(book[BID].items(), reverse=True)],
        "asks": [[f"{p:.8f}", f"{q:.8f}"] for p, q in sorted(book[ASK].items())],
    }  # fmt: skip
    answer = {
        "t": lines[answer_at]["t"], "conn": "http", "dir": "http", "raw": json.dumps(body),
        "url": "https://fapi.binance.com/fapi/v1/depth?symbol=SANDUSDT&limit=1000",
    }  # fmt: skip
    modified = [*lines[:lost], *lines[lost + 1 : answer_at + 1], answer, *lines[answer_at + 1 :]]
    report, tables, model = normalized(modified, tmp_path)
    proven(tables, model)
    rest = json.loads(lines[lost]["raw"])["data"]["u"] + 1, last_id
    told = [*holes(lines, {lost}), ("orderbook_l2", "SANDUSDT", *rest, "sequence", False)]
    assert ledger(tables) == told, "one hole up to the snapshot, and none behind it"
    stored = table(tables, "orderbook_l2")
    assert {t for t, f in zip(stored["ticker"], stored["flags"], strict=True) if f & RESYNCED} == {"SANDUSDT"}
    assert not any(flags & INVALID for flags in stored["flags"])
    final = {ticker: book for _, ticker, _, book in model.expected.messages}
    newest = max(update_id for ticker, update_id in truth if ticker == "SANDUSDT")
    assert final["SANDUSDT"] == truth["SANDUSDT", newest], "healed, and the same book as without the loss"
    assert not report.samples


def test_two_runs_and_the_command_give_the_same_bytes(tmp_path: Path) -> None:
    path = recording("multi_20210722")
    normalize("binance_futures", [path], tmp_path / "a")
    command = [
        sys.executable,
        "-m",
        "mdcollector",
        "normalize",
        "binance_futures",
        path,
        "--out",
        tmp_path / "b",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    a, b = ({f.relative_to(o): f.read_bytes() for f in o.rglob("*.parquet")} for o in (tmp_path / "a", tmp_path / "b"))
    assert len(a) >= 4
    assert a == b


# Samples and REST bodies


@pytest.fixture
def venue(tmp_path: Path) -> Iterator[BinanceFutures]:
    made = _venue(tmp_path / "rings")
    yield made
    made.emit.close()


def _venue(rings: Path, **options: Any) -> BinanceFutures:
    exchange, feeds = BinanceFutures.EXCHANGE, BinanceFutures.FEEDS
    emit = Emit(rings, "t", exchange, feeds, semaphore=False, capacities=SMALL, clock=lambda: 0)
    emit.packet(SAMPLE_TIME_NS, 0)
    return BinanceFutures(emit, Options(**options), [], open_world=True)


def _outcome(raw: bytes, rings: Path) -> str:
    """What one frame comes to, by a venue that never saw another one."""
    venue = _venue(rings)
    try:
        venue.decode(raw)
        for _ in venue.finish():
            pass
    except FrameError as error:
        return f"refused {error.reason}"
    except msgspec.ValidationError:
        return "refused wrong_type"
    finally:
        venue.emit.close()
    if venue.emit.counters["protocol_drift"]:
        FIELDS_UNKNOWN.update(venue.notes)
    return "+".join(f"{feed} {ring.next}" for feed, ring in venue.emit.rings.items() if ring.next) or "control"


def test_every_sample_makes_rows_or_is_refused_for_a_reason(tmp_path: Path) -> None:
    paths = sorted((FOLDER / "samples").iterdir())
    found = {path.name: _outcome(path.read_bytes(), tmp_path / path.stem) for path in paths}
    assert found == SAMPLES
    assert not FIELDS_UNKNOWN, "fields that the table of known ones lacks"


def test_rows_of_the_samples(tmp_path: Path) -> None:
    """Each sample under a name of its own, so that none is judged by the ids of another one."""
    kinds = {"depthUpdate": "depth", "24hrTicker": "ticker", "markPriceUpdate": "markPrice"}
    lines = []
    for number, (name, outcome) in enumerate(SAMPLES.items()):
        if outcome == "control" or outcome.startswith("refused"):
            continue
        message = plain((FOLDER / "samples" / name).read_text())
        kind = message["stream"].partition("@")[2] if "stream" in message else kinds.get(message["e"], message["e"])
        data = message.get("data", message)
        (data["o"] if kind == "forceOrder" else data)["s"] = f"S{number}"
        if kind == "trade":
            data.setdefault("X", "MARKET")  # trade_01 is of an example that has none
        raw = json.dumps({"stream": f"s{number}@{kind}", "data": data})
        lines.append({"t": SAMPLE_TIME_NS, "conn": "samples", "dir": "in", "raw": raw})
    report, tables, model = normalized(lines, tmp_path)
    proven(tables, model)
    made = Counter(outcome.split(" ")[0] for outcome in SAMPLES.values())
    assert report.rows["liquidations"] == made["liquidations"] == 6
    assert {o["funding_rate"] for o in model.expected.rows["tickers"]} > {"nan"}
    assert not [counter for counter in report.counters if counter.startswith("refused_")]


def body(name: str) -> bytes:
    return (FOLDER / "rest" / name).read_bytes()


@pytest.mark.parametrize("name", ["exchange_info_01.json", "rec_fapi_v1_exchangeinfo_multi_20210722.json"])
def test_instruments_body(name: str) -> None:
    def of(symbol: Any, kind: str, key: str) -> str:
        return next((f[key] for f in symbol["filters"] if f["filterType"] == kind), "nan")

    symbols = json.loads(body(name))["symbols"]
    listed = BinanceFutures.instruments(body(name))
    assert [
        (i.ticker, i.active, i.status, i.kind, str(i.tick_size), str(i.qty_step), i.listed_time, i.expiry_time) for i in listed
    ] == [
        (
            s["symbol"], s["status"] == "TRADING", s["status"],
            "future" if "QUARTER" in s["contractType"] else "perpetual",
            str(float(of(s, "PRICE_FILTER", "tickSize"))), str(float(of(s, "LOT_SIZE", "stepSize"))),
            s["onboardDate"] * 1000, s["deliveryDate"] * 1000 if s["deliveryDate"] < 4_133_404_800_000 else -1,
        )
        for s in symbols
    ]  # fmt: skip
    assert all(i.contract_size == 1 and i.base and i.quote for i in listed)


def test_open_interest_body(venue: BinanceFutures) -> None:
    venue.http("https://x/fapi/v1/openInterest?symbol=BTCUSDT", body("open_interest.json"))
    (row,) = venue.emit.rings["tickers"].recent_rows(0)
    assert (row["open_interest"], row["timestamp"]) == (10659.509, 1589437530011 * 1000)
    assert str(row["last"]) == str(row["mark_price"]) == "nan"


def trade(seq: int, kind: str = "MARKET", time_ms: int = SAMPLE_TIME_NS // 1_000_000) -> bytes:
    data = {"e": "trade", "E": time_ms, "T": time_ms, "s": "AB", "t": seq, "p": "1", "q": "1", "X": kind, "m": False}
    return json.dumps({"stream": "ab@trade", "data": data}, separators=(",", ":")).encode()


def gaps(venue: BinanceFutures) -> list[tuple[int, int, str, bool]]:
    names = ("first_id", "last_id", "cause", "repaired")
    rows = venue.emit.rings["gaps"].recent_rows(0)
    return [(a, b, c.decode(), bool(r)) for a, b, c, r in zip(*(rows[n].tolist() for n in names), strict=True)]


def seqs(venue: BinanceFutures) -> list[int]:
    return [int(seq) for seq in venue.emit.rings["trades"].recent_rows(0)["trade_seq"]]


def rest_trades(*ids: int) -> bytes:
    return json.dumps(
        [
            {"id": i, "price": "2", "qty": "3", "quoteQty": "6", "time": 1_790_000_000_000, "isBuyerMaker": True}
            for i in ids
        ]
    ).encode()


def test_a_trade_that_nobody_made_is_no_row_and_no_hole(venue: BinanceFutures) -> None:
    """Its counter is in the ledger, for whoever wonders about it; an unknown type is a trade, and is told."""
    for seq, kind in ((10, "MARKET"), (11, "INSURANCE_FUND"), (12, "MARKET"), (13, "ADL"), (14, "NA"), (15, "NOVELTY")):
        venue.decode(trade(seq, kind))
    assert seqs(venue) == [10, 12, 15]
    assert gaps(venue) == [(seq, seq, "no_execution", False) for seq in (11, 13, 14)]
    assert not venue.wants
    assert venue.emit.counters["protocol_drift"] == 1
    assert list(venue.notes) == ["new trade type NOVELTY"]
    with pytest.raises(FrameError, match="timestamp"):
        venue.decode(trade(16, "ADL", time_ms=0))
    venue.decode(trade(16))
    assert seqs(venue)[-1] == 16, "the refused frame did not count"


def test_a_hole_is_filled_from_the_newest_trades_without_a_key(venue: BinanceFutures) -> None:
    """What the list leaves out, within it, was no execution; what lies before it is out of reach and stays a hole."""
    for seq in (10, 20, 30, 36):
        venue.decode(trade(seq))
    wanted = [want for want in venue.wants if isinstance(want, Fetch)]
    assert {(want.path, want.weight) for want in wanted} == {("/fapi/v1/trades?symbol=AB&limit=1000", 5)}
    venue.wants.clear()
    answered = [i for i in range(15, 37) if i not in (17, 24, 25)]
    venue.http("https://x" + wanted[0].path, rest_trades(*answered))
    assert sorted(seqs(venue)) == [10, *answered]
    assert sorted(gaps(venue)[3:]) == [
        (17, 17, "no_execution", False), (21, 29, "filled", True), (24, 25, "no_execution", False),
        (31, 35, "filled", True),
    ]  # fmt: skip
    assert gaps(venue)[:3] == [(11, 19, "sequence", False), (21, 29, "sequence", False), (31, 35, "sequence", False)]
    assert venue.emit.counters["trade_repair_incomplete"] == 1
    assert not venue.wants


def test_a_list_that_is_behind_the_stream_is_asked_for_again_as_long_as_it_moves(venue: BinanceFutures) -> None:
    for seq in (10, 20):
        venue.decode(trade(seq))
    url = "https://x/fapi/v1/trades?symbol=AB&limit=1000"
    for newest, asked in ((12, True), (15, True), (15, False)):
        venue.wants.clear()
        venue.http(url, rest_trades(*range(5, newest + 1)))
        assert bool(venue.wants) == asked
    assert seqs(venue) == [10, 20, 11, 12, 13, 14, 15]
    assert venue.emit.counters["trade_repair_incomplete"] == 1


@pytest.mark.parametrize(
    "answer", [rest_trades(), rest_trades(1, 10_000_000_000), b'[{"id":1}]', b"{}", b"[" * 100_000]
)
def test_an_unusable_list_of_trades_changes_nothing(answer: bytes, venue: BinanceFutures) -> None:
    for seq in (10, 20):
        venue.decode(trade(seq))
    with pytest.raises((FrameError, msgspec.DecodeError)):
        venue.http("https://x/fapi/v1/trades?symbol=AB&limit=1000", answer)
    assert seqs(venue) == [10, 20]
    assert gaps(venue) == [(11, 19, "sequence", False)]


def test_with_a_key_a_hole_is_asked_for_by_its_id_and_without_a_valid_one_by_the_list(tmp_path: Path) -> None:
    keyed = _venue(tmp_path / "rings", credentials={"api_key": "K"})
    assert keyed.HTTP_HEADERS == {"X-MBX-APIKEY": "K"}
    assert BinanceFutures.HTTP_HEADERS == {}
    for seq in (10, 20, 30):
        keyed.decode(trade(seq))
    first, second = (want for want in keyed.wants if isinstance(want, Fetch))
    assert (first.path, first.weight) == ("/fapi/v1/historicalTrades?symbol=AB&fromId=11&limit=9", 20)
    keyed.wants.clear()
    keyed.http("https://x" + first.path, rest_trades(*range(12, 20)))
    assert sorted(seqs(keyed)) == [10, *range(12, 21), 30]
    assert gaps(keyed)[2:] == [(11, 19, "filled", True), (11, 11, "no_execution", False)]
    keyed.http_failed(second, 401, b'{"code":-2015,"msg":"Invalid API-key"}')
    assert [want.path for want in keyed.wants if isinstance(want, Fetch)] == ["/fapi/v1/trades?symbol=AB&limit=1000"]
    assert "HTTP 401" in keyed.notes["credentials"]
    assert "K" not in json.dumps(keyed.notes).replace("API-key", "").replace("API key", "")
    keyed.emit.close()


def test_aggregated_trades_are_repaired_by_their_own_ids(tmp_path: Path) -> None:
    venue = _venue(tmp_path / "rings", trade_channel="aggTrade")
    for seq in (26127, 26130):
        data = {
            "e": "aggTrade",
            "a": seq,
            "p": "1",
            "q": "1",
            "f": 1,
            "l": 1,
            "T": 1_790_000_000_000,
            "m": False,
            "s": "AB",
        }
        venue.decode(json.dumps({"stream": "ab@aggTrade", "data": data}).encode())
    (want,) = (w for w in venue.wants if isinstance(w, Fetch))
    assert (want.path, want.weight) == ("/fapi/v1/aggTrades?symbol=AB&fromId=26128&limit=2", 20)
    (sample,) = json.loads(body("agg_trades.json"))
    venue.http("https://x" + want.path, json.dumps([{**sample, "a": 26128}, sample]).encode())
    assert sorted(seqs(venue)) == [26127, 26128, 26129, 26130]
    row = venue.emit.rings["trades"].recent_rows(0)[-1]
    assert (row["price"], row["qty"], row["side"]) == (float(sample["p"]), float(sample["q"]), -1)
    with pytest.raises(FrameError, match="aggTrade"):
        venue.decode(trade(1))
    venue.emit.close()


@pytest.mark.parametrize("name", ["depth.json", "depth_snapshot_01.json"])
def test_depth_body(name: str, venue: BinanceFutures) -> None:
    venue.http("https://x/fapi/v1/depth?symbol=AB&limit=1000", body(name))
    said = json.loads(body(name))
    rows = venue.emit.rings["orderbook_l2"].recent_rows(0)
    expected = [(BID, float(p), float(q)) for p, q in said["bids"]] + [
        (ASK, float(p), float(q)) for p, q in said["asks"]
    ]
    assert [(int(r["side"]), float(r["price"]), float(r["qty"])) for r in rows] == expected
    assert set(rows["update_id"].tolist()) == {said["lastUpdateId"]}
    assert set(rows["timestamp"].tolist()) == {said["T"] * 1000}


def test_weights_and_levels_of_snapshots() -> None:
    """Only some numbers of levels are valid, so the next one is asked for; 4.5 of the protocol notes has the weights."""
    asked = {
        0: (1000, 20),
        5: (5, 2),
        7: (10, 2),
        50: (50, 2),
        51: (100, 5),
        500: (500, 10),
        501: (1000, 20),
        5000: (1000, 20),
    }
    for book_depth, (levels, weight) in asked.items():
        options = Options(book_depth=book_depth)
        assert BinanceFutures.snapshot_weight(options) == weight
        assert BinanceFutures._snapshot_levels(options) == levels


def test_streams_are_planned_on_the_path_that_delivers_them() -> None:
    options = Options(intervals=("1m", "1h"))
    planned = BinanceFutures.plan(["BTCUSDT", "ETHUSDT"], BinanceFutures.FEEDS, options)
    assert [{s.path for s in connection} for connection in planned] == [{"/public/stream"}, {"/market/stream"}]
    public, market = ([s.name for s in connection if s.ticker == "BTCUSDT"] for connection in planned)
    assert public == ["btcusdt@trade", "btcusdt@depth@100ms", "btcusdt@bookTicker"]
    assert market == [
        "btcusdt@ticker",
        "btcusdt@markPrice@1s",
        "btcusdt@kline_1m",
        "btcusdt@kline_1h",
        "btcusdt@forceOrder",
    ]
    (only,) = BinanceFutures.plan(["BTCUSDT"], ["trades"], Options(trade_channel="aggTrade"))
    assert [(s.name, s.path) for s in only] == [("btcusdt@aggTrade", "/market/stream")]
    many = BinanceFutures.plan([f"T{n}USDT" for n in range(150)], BinanceFutures.FEEDS, Options())
    assert all(len(c) <= 200 and len({s.path for s in c}) == 1 for c in many)
    assert sum(map(len, many)) == 150 * 7


def test_silent_streams_can_be_checked(venue: BinanceFutures) -> None:
    (streams,) = BinanceFutures.plan(["AB"], ["tickers", "liquidations", "candles"], Options())
    asked = {s.name: fetch.path if (fetch := venue.probe(s)) else None for s in streams}
    assert asked == {
        "ab@ticker": "/fapi/v1/trades?symbol=AB&limit=1", "ab@kline_1m": "/fapi/v1/trades?symbol=AB&limit=1",
        "ab@markPrice@1s": "/fapi/v1/premiumIndex?symbol=AB", "ab@forceOrder": None,
    }  # fmt: skip
    by_name = {s.name: s for s in streams}
    assert venue.newest_us(by_name["ab@ticker"], body("trades.json")) == 1499865549590 * 1000
    assert venue.newest_us(by_name["ab@ticker"], b"[]") == 0
    assert venue.newest_us(by_name["ab@markPrice@1s"], body("premium_index.json")) == 1597370495002 * 1000
    with pytest.raises((FrameError, msgspec.DecodeError)):
        venue.newest_us(by_name["ab@ticker"], b'{"time":"soon"}')


# A recording as a live venue


def test_a_recording_played_as_the_venue_is_collected_whole(tmp_path: Path) -> None:
    """mdreplay on the old unrouted recording; two connectors find its streams on the two paths, each on its own."""
    path = recording("multi_20210405")
    model = run(BinanceFuturesModel(), entries(path))
    command = [sys.executable, "-m", "tools.replay", "serve", path, "--speed", "40", "--wait-clients", "2"]
    started = [subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)]
    try:
        (server,) = started
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        assert ready["exchange"] == "binance_futures"
        connector = {
            "exchange": ready["exchange"], "tickers": sorted(model.books), "trade_channel": "aggTrade",
            "ws_url": ready["ws_url"], "rest_url": ready["rest_url"],
        }  # fmt: skip
        fleet = {
            "rings": str(tmp_path / "rings"), "connectors": {"conn": connector},
            "writers": {"parquet": {"out": str(tmp_path / "data")}},
        }  # fmt: skip
        (tmp_path / "fleet.toml").write_text(tomli_w.dumps(fleet))
        for words in (("connect", "conn.1"), ("connect", "conn.2"), ("write", "parquet")):
            line = [sys.executable, "-m", "mdcollector", *words, "-c", str(tmp_path / "fleet.toml")]
            started.append(subprocess.Popen(line))
        wanted = {feed: len(model.expected.rows[feed]) for feed in ("trades", "bbo", "orderbook_l2")}

        def published() -> dict[str, int]:
            count = Counter[str]()
            for path in tmp_path.glob("rings/conn.*/*.meta"):
                with suppress(RingError), RingReader(path.parent, path.stem) as ring:  # it may be in the making
                    count[path.stem] += ring.published
            return {feed: count[feed] for feed in wanted}

        until(lambda: published() == wanted, lambda: f"{wanted} rows, there are {published()}", 100)
        for process in started[1:]:
            process.terminate()
            assert process.wait(60) == 0
    finally:
        for process in started:
            process.kill()
            process.communicate()
    columns = {
        "trades": ("trade_seq", "timestamp", "side", "price", "qty"),
        "bbo": ("update_id", "timestamp", "bid_price", "bid_qty", "ask_price", "ask_qty"),
        "orderbook_l2": ("update_id", "timestamp", "side", "action", "price", "qty"),
    }
    for (
        feed,
        names,
    ) in columns.items():  # when the snapshots come, and so the order among instruments, is not the recording's
        stored = table(tmp_path / "data", feed)
        rows = sorted(
            enumerate(zip(stored["ticker"], *(stored[n] for n in names), strict=True)), key=lambda r: (r[1][0], r[0])
        )
        truth = sorted(model.expected.rows[feed], key=lambda row: row["ticker"])
        assert [row for _, row in rows] == [tuple(row[n] for n in ("ticker", *names)) for row in truth]
    assert not table(tmp_path / "data", "gaps")
