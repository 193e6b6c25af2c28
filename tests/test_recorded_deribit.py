"""Recorded Deribit traffic through normalize: every stored row against plain json, every book against a plain dict."""

import json
import math
import random
import subprocess
import sys
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
    SNAPSHOT,
    DeribitModel,
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

from mdcollector import OrderBook
from mdcollector.emit import Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import Options
from mdcollector.exchanges.deribit import Deribit
from mdcollector.normalize import Report, normalize
from mdcollector.recording import Entry, RecordingWriter

pytestmark = needs_data

FOLDER = DATA / "deribit"
SAMPLE_TIME_NS = 1_796_083_200_000_000_000  # behind every sample, so that no time of theirs lies in the future
SMALL = {"trades": 4096, "orderbook_l2": 4096, "bbo": 512, "tickers": 512, "candles": 512, "gaps": 512}
RECORDINGS = (
    "options_20210405", "options_20210722", "tickers_20260930", "book_btc_perpetual_20261004",
    "book_btc_usdc_perpetual_20261004", "book_btcperp_testnet_20260913",
)  # fmt: skip
BOOKS = [name for name in RECORDINGS if "tickers" not in name]

# What becomes of every sample: rows of a feed | refused for a reason | control (a reply or notice; no row belongs to it).
SAMPLES = {
    "book_01.json": "orderbook_l2 6",
    "book_03.json": "orderbook_l2 6",
    "book_04.json": "orderbook_l2 4",
    "book_06.json": "refused unhandled_channel",
    "book_07.json": "refused unhandled_channel",
    "book_09.json": "refused unknown_book_type",
    "book_10.json": "refused unknown_book_type",
    "book_12.json": "orderbook_l2 5",
    "book_delta.json": "orderbook_l2 4",
    "book_grouped_snapshot.json": "refused unhandled_channel",
    "book_snapshot.json": "orderbook_l2 10",
    "cap2026_book_change.json": "orderbook_l2 5",
    "cap2026_book_grouped.json": "refused unhandled_channel",
    "cap2026_book_snapshot_trimmed.json": "orderbook_l2 6",
    "cap2026_error_heartbeat_interval.json": "refused venue_error",
    "cap2026_error_invalid_credentials.json": "refused venue_error",
    "cap2026_error_invalid_json.json": "refused venue_error",
    "cap2026_error_raw_unauthorized.json": "control",
    "cap2026_error_unauthorized.json": "refused venue_error",
    "cap2026_heartbeat_test_request.json": "control",
    "cap2026_perpetual.json": "refused unhandled_channel",
    "cap2026_set_heartbeat_ok.json": "control",
    "cap2026_subscribe_ack.json": "control",
    "cap2026_subscribe_partial.json": "control",
    "cap2026_subscribe_unknown_channel.json": "control",
    "cap2026_test_ok.json": "control",
    "cap2026_ticker.json": "tickers 1",
    "cap2026_trades_perp_prod_01.json": "trades 1",
    "cap2026_trades_perp_starbase.json": "trades 3",
    "chart_01.json": "candles 1",
    "chart_03.json": "candles 1",
    "chart_04.json": "candles 1",
    "error.json": "control",
    "gct_trades_agg2_01.json": "trades 1",
    "quote_01.json": "bbo 1",
    "quote_03.json": "bbo 1",
    "quote_04.json": "bbo 1",
    "rec_book_change_book_btc_perpetual_20261004.json": "orderbook_l2 5",
    "rec_book_change_book_btc_usdc_perpetual_20261004.json": "orderbook_l2 4",
    "rec_book_change_book_btcperp_testnet_20260913.json": "orderbook_l2 10",
    "rec_book_options_20210405.json": "orderbook_l2 14",
    "rec_book_options_20210722.json": "orderbook_l2 16",
    "rec_book_snapshot_book_btc_perpetual_20261004.json": "orderbook_l2 8",
    "rec_book_snapshot_book_btc_usdc_perpetual_20261004.json": "orderbook_l2 8",
    "rec_book_snapshot_book_btcperp_testnet_20260913.json": "orderbook_l2 24",
    "rec_rpc_result_book_btc_perpetual_20261004.json": "control",
    "rec_rpc_result_book_btc_usdc_perpetual_20261004.json": "control",
    "rec_rpc_result_options_20210405.json": "control",
    "rec_rpc_result_options_20210722.json": "control",
    "rec_ticker_options_20210405.json": "tickers 1",
    "rec_ticker_options_20210722.json": "tickers 1",
    "rec_ticker_tickers_20260930.json": "tickers 1",
    "roq_auth_ok_redacted.json": "control",
    "roq_error_method_not_found.json": "refused venue_error",
    "roq_quote.json": "bbo 1",
    "roq_subscribe_ack_platform_state.json": "control",
    "subscribe.json": "control",
    "test_request.json": "control",
    "ticker_01.json": "tickers 1",
    "ticker_03.json": "tickers 1",
    "ticker_04.json": "tickers 1",
    "ticker_06.json": "tickers 1",
    "ticker_07.json": "tickers 1",
    "ticker_09.json": "tickers 1",
    "ticker_10.json": "tickers 1",
    "ticker_12.json": "tickers 1",
    "ticker_13.json": "tickers 1",
    "trades_01.json": "trades 2",
    "trades_03.json": "trades 2",
    "trades_04.json": "trades 1",
    "trades_06.json": "trades 1",
    "trades_07.json": "trades 1",
    "trades_option_combo.json": "trades 1",
    "volatility_index.json": "refused unhandled_channel",
}


def recording(name: str) -> Path:
    return FOLDER / "recorded" / f"{name}.jsonl.zst"


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    with RecordingWriter(path) as out:
        for line in lines:
            out.write(Entry(**line))
    return path


def normalized(lines: list[dict[str, Any]], tmp_path: Path) -> tuple[Report, Path, DeribitModel]:
    """A recording of these lines through the product, and by plain json."""
    report = normalize("deribit", [write(tmp_path / "modified.jsonl", lines)], tmp_path / "out")
    return report, tmp_path / "out", run(DeribitModel(), lines)


def proven(out: Path, model: DeribitModel) -> None:
    """All tables are what the model says, and a reader's books are the plain ones."""
    for feed, rows in model.expected.rows.items():
        compare(table(out, feed), rows)
    if model.expected.messages:
        rebuild(table(out, "orderbook_l2"), model.expected.messages)


def book_of(line: dict[str, Any]) -> dict[str, Any]:
    """The payload of a book notification, else nothing."""
    params = json.loads(line["raw"]).get("params", {}) if line["dir"] == "in" else {}
    data: dict[str, Any] = params.get("data", {}) if params.get("channel", "").startswith("book.") else {}
    return data


def changes(lines: list[dict[str, Any]], name: str | None = None) -> list[int]:
    """Where the changes of books are (of one instrument), the last one of each instrument left out."""
    found = [i for i, line in enumerate(lines) if book_of(line).get("type") == "change"]
    last = {book_of(lines[i])["instrument_name"]: i for i in found}
    return [i for i in found if last[book_of(lines[i])["instrument_name"]] != i
            and name in (None, book_of(lines[i])["instrument_name"])]  # fmt: skip


def ledger(out: Path) -> list[tuple[Any, ...]]:
    gaps = table(out, "gaps")
    columns = ("feed", "ticker", "first_id", "last_id", "cause", "repaired")
    return sorted(zip(*(gaps[c] for c in columns), strict=True)) if gaps else []


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_row_equals_the_raw_frames(name: str, tmp_path: Path) -> None:
    report = normalize("deribit", [recording(name)], tmp_path)
    lines = entries(recording(name))
    model = run(DeribitModel(), lines)
    assert not model.expected.rows["gaps"], "the README says that no frame is missing"
    proven(tmp_path, model)
    assert report.findings == []
    assert (report.entries, report.rows_left) == (len(lines), 0)
    assert report.rows_written == sum(len(rows) for rows in model.expected.rows.values()) > 0
    assert not [c for c in report.counters if c.startswith(("refused_", "gap_"))]
    assert not any(flags & INVALID for flags in table(tmp_path, "orderbook_l2").get("flags", []))


@pytest.mark.parametrize("name", BOOKS)
def test_numbers_are_kept_as_they_were_written(name: str, tmp_path: Path) -> None:
    """Also 8.55e4 and 2.1e3: what is stored is the decimal number that the frame spells."""
    normalize("deribit", [recording(name)], tmp_path)
    stored = table(tmp_path, "orderbook_l2")
    seen = [level for line in entries(recording(name)) if (data := plain(line["raw"]) if book_of(line) else None)
            for side in ("bids", "asks") for level in data["params"]["data"][side]]  # fmt: skip
    rows = [row for row in zip(stored["side"], stored["action"], stored["price"], stored["qty"], strict=True) if row[0]]
    assert len(seen) == len(rows)
    for (what, price, amount), (_, action, stored_price, stored_qty) in zip(seen, rows, strict=True):
        assert same_decimal(stored_price, str(price))
        assert same_decimal(stored_qty, "0" if what == "delete" else str(amount))
        assert (action == "DELETE") == (what == "delete")


@pytest.mark.parametrize("name", BOOKS)
def test_order_book_of_the_library_equals_the_plain_one(name: str, tmp_path: Path) -> None:
    normalize("deribit", [recording(name)], tmp_path)
    stored = table(tmp_path, "orderbook_l2")
    rows = [dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)]
    books: dict[str, OrderBook] = {}
    at = 0
    for count, ticker, update_id, truth in run(DeribitModel(), entries(recording(name))).expected.messages:
        book = books.setdefault(ticker, OrderBook())
        book.apply(rows[at : at + count])
        at += count
        assert book.is_valid
        assert book.is_complete
        assert (book.update_id, book.bids, book.asks) == (update_id, truth[BID], truth[ASK])
    assert at == len(rows)


@pytest.mark.parametrize("name", ["options_20210405", "options_20210722"])
def test_an_empty_book_is_said_to_be_empty(name: str, tmp_path: Path) -> None:
    """These recordings hold a snapshot without any level: one row without a side, there for its flags."""
    normalize("deribit", [recording(name)], tmp_path)
    empty = [book_of(line)["instrument_name"] for line in entries(recording(name))
             if (data := book_of(line)) and data["type"] == "snapshot" and not data["bids"] and not data["asks"]]  # fmt: skip
    stored = table(tmp_path, "orderbook_l2")
    found = [i for i, side in enumerate(stored["side"]) if side == 0]
    assert [stored["ticker"][i] for i in found] == empty != []
    assert all(stored["flags"][i] & (SNAPSHOT | LAST) == SNAPSHOT | LAST for i in found)


def test_two_runs_and_the_command_give_the_same_bytes(tmp_path: Path) -> None:
    names = [str(recording(name)) for name in RECORDINGS[:3]]
    for run_ in ("a", "b"):
        normalize("deribit", [Path(name) for name in names], tmp_path / run_)
    command = [
        sys.executable,
        "-m",
        "mdcollector.cli",
        "normalize",
        "deribit",
        *names,
        "--out",
        tmp_path / "c",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["findings"] == []
    read = [
        {
            str(path.relative_to(tmp_path / run_)): path.read_bytes()
            for path in sorted((tmp_path / run_).rglob("*.parquet"))
        }
        for run_ in "abc"
    ]
    assert len(read[0]) >= 3
    assert read[0] == read[1] == read[2]


# Frames taken out, doubled, swapped


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_every_change_taken_out_is_in_the_ledger_and_nothing_else(length: int, seed: int, tmp_path: Path) -> None:
    lines = entries(recording("options_20210405"))
    rng = random.Random(seed)
    busy = [book_of(lines[i])["instrument_name"] for i in changes(lines)]
    ticker = rng.choice(sorted({name for name in busy if busy.count(name) > length}))
    places = changes(lines, ticker)
    at = rng.randrange(len(places) - length + 1)
    out = places[at : at + length]
    report, tables, model = normalized([line for i, line in enumerate(lines) if i not in out], tmp_path)
    proven(tables, model)
    first, last = book_of(lines[out[0]])["prev_change_id"] + 1, book_of(lines[out[-1]])["change_id"]
    assert ledger(tables) == [("orderbook_l2", ticker, first, last, "sequence", False)]
    assert report.findings == ["rows of the table gaps that tell of holes: 1"]
    stored = table(tables, "orderbook_l2")
    doubted = [(name, update_id) for name, update_id, flags in zip(
        stored["ticker"], stored["update_id"], stored["flags"], strict=True) if flags & INVALID]  # fmt: skip
    behind = {(ticker, book_of(line)["change_id"]) for line in lines
              if (data := book_of(line)) and data["instrument_name"] == ticker and data["change_id"] > last}  # fmt: skip
    assert set(doubted) == behind


def test_a_book_without_its_snapshot_is_not_believed(tmp_path: Path) -> None:
    lines = entries(recording("options_20210405"))
    ticker = book_of(lines[changes(lines)[0]])["instrument_name"]
    kept = [
        line
        for line in lines
        if (book_of(line).get("type"), book_of(line).get("instrument_name")) != ("snapshot", ticker)
    ]
    assert len(kept) == len(lines) - 1
    report, tables, model = normalized(kept, tmp_path)
    proven(tables, model)
    assert report.gaps == 0
    stored = table(tables, "orderbook_l2")
    assert {name for name, flags in zip(stored["ticker"], stored["flags"], strict=True) if flags & INVALID} == {ticker}


def test_a_book_is_believed_again_from_the_next_snapshot_on(tmp_path: Path) -> None:
    lines = entries(recording("options_20210405"))
    counted = [book_of(lines[i])["instrument_name"] for i in changes(lines)]
    ticker = max(set(counted), key=counted.count)
    places = changes(lines, ticker)
    lost, at = places[1], places[len(places) // 2]
    truth = {(name, last): book for _, name, last, book in run(DeribitModel(), lines).expected.messages}
    change = book_of(lines[at])
    book = truth[ticker, change["change_id"]]
    data = {key: change[key] for key in ("timestamp", "instrument_name", "change_id")} | {
        "type": "snapshot",
        "bids": [["new", price, qty] for price, qty in book[BID].items()],
        "asks": [["new", price, qty] for price, qty in book[ASK].items()],
    }
    frame = json.loads(lines[at]["raw"])
    frame["params"]["data"] = data
    snapshot = {**lines[at], "raw": json.dumps(frame)}  # spelled with blanks: the slow path must take it as well
    modified = [*lines[:lost], *lines[lost + 1 : at + 1], snapshot, *lines[at + 1 :]]
    _, tables, model = normalized(modified, tmp_path)
    proven(tables, model)
    gone = book_of(lines[lost])
    assert ledger(tables) == [
        ("orderbook_l2", ticker, gone["prev_change_id"] + 1, gone["change_id"], "sequence", False),
        ("orderbook_l2", ticker, gone["change_id"] + 1, change["change_id"], "sequence", False),
    ]
    stored = table(tables, "orderbook_l2")
    assert not any(flags & INVALID for flags in stored["flags"])
    assert {name for name, flags in zip(stored["ticker"], stored["flags"], strict=True) if flags & RESYNCED} == {ticker}


COLUMNS = ("update_id", "timestamp", "side", "action", "price", "qty", "flags")


def _books(out: Path) -> dict[str, list[tuple[Any, ...]]]:
    stored, rows = table(out, "orderbook_l2"), {}
    for ticker, *values in zip(stored["ticker"], *(stored[c] for c in COLUMNS), strict=True):
        rows.setdefault(ticker, []).append(tuple(values))
    return rows


def test_doubled_changes_are_counted_and_make_no_rows(tmp_path: Path) -> None:
    lines = entries(recording("options_20210405"))
    normalize("deribit", [recording("options_20210405")], tmp_path / "plain")
    twice = set(random.Random(3).sample(changes(lines), 30))
    report, tables, model = normalized(
        [copy for i, line in enumerate(lines) for copy in [line] * (1 + (i in twice))], tmp_path
    )
    proven(tables, model)
    assert report.findings == []
    assert report.counters["book_duplicate"] == 30
    assert _books(tables) == _books(tmp_path / "plain")


def test_swapped_changes_lose_nothing_and_the_ledger_says_so(tmp_path: Path) -> None:
    lines = entries(recording("options_20210405"))
    normalize("deribit", [recording("options_20210405")], tmp_path / "plain")
    modified, expected, used = [dict(line) for line in lines], [], set()
    for a in changes(lines)[::4]:
        ticker = book_of(lines[a])["instrument_name"]
        b = next(i for i in range(a + 1, len(lines)) if book_of(lines[i]).get("instrument_name") == ticker)
        if used & {a, b}:
            continue
        used |= {a, b}
        modified[a]["raw"], modified[b]["raw"] = lines[b]["raw"], lines[a]["raw"]
        hole = book_of(lines[a])["prev_change_id"] + 1, book_of(lines[a])["change_id"]
        expected += [
            ("orderbook_l2", ticker, *hole, "sequence", False),
            ("orderbook_l2", ticker, *hole, "reordered", True),
        ]
    assert len(expected) > 20
    _, tables, _ = normalized(modified, tmp_path)
    assert _books(tables) == _books(tmp_path / "plain")
    assert ledger(tables) == sorted(expected)


def test_trades_missed_between_two_real_messages(tmp_path: Path) -> None:
    """Two messages of BTC-PERPETUAL, 93 trades apart."""
    frames = [(FOLDER / "samples" / name).read_text() for name in ("trades_06.json", "trades_07.json")]
    lines = [{"t": SAMPLE_TIME_NS + i, "conn": "a", "dir": "in", "raw": raw} for i, raw in enumerate(frames)]
    report, tables, model = normalized(lines, tmp_path)
    proven(tables, model)
    assert ledger(tables) == [("trades", "BTC-PERPETUAL", 40781987, 40782079, "sequence", False)]
    assert report.counters["gap_trades_sequence"] == 1


def test_an_open_candle_is_closed_by_the_next_one(tmp_path: Path) -> None:
    frame = json.loads((FOLDER / "samples" / "chart_01.json").read_bytes())
    ticks = []
    for minute, close in ((0, 1.5), (0, 2.5), (1, 3.5), (1, 4.5), (0, 9.0), (3, 5.5)):
        data = {**frame["params"]["data"], "close": close}
        data["tick"] += 60_000 * minute
        ticks.append({**frame, "params": {**frame["params"], "data": data}})
    lines = [{"t": SAMPLE_TIME_NS + i, "conn": "a", "dir": "in", "raw": json.dumps(f)} for i, f in enumerate(ticks)]
    normalize("deribit", [write(tmp_path / "chart.jsonl", lines)], tmp_path / "out")
    stored = table(tmp_path / "out", "candles")
    start = frame["params"]["data"]["tick"] * 1000
    minutes = [(time - start) // 60_000_000 for time in stored["open_time"]]
    # The late version of minute 0 is older than what is known; minute 2 had no trade, so minute 3 closes minute 1.
    assert list(zip(minutes, stored["close"], stored["closed"], strict=True)) == [
        (0, 1.5, False), (0, 2.5, False), (0, 2.5, True), (1, 3.5, False), (1, 4.5, False), (1, 4.5, True), (3, 5.5, False)
    ]  # fmt: skip
    assert set(stored["interval"]) == {"1m"}
    assert set(stored["trades"]) == {None}


# Samples and REST bodies


def test_the_table_names_every_sample() -> None:
    assert {path.name for path in (FOLDER / "samples").iterdir()} == set(SAMPLES)


@pytest.mark.parametrize(("name", "outcome"), SAMPLES.items())
def test_sample(name: str, outcome: str, tmp_path: Path) -> None:
    raw = (FOLDER / "samples" / name).read_text()
    line = {"t": SAMPLE_TIME_NS, "conn": "sample", "dir": "in", "raw": raw}
    report = normalize("deribit", [write(tmp_path / "sample.jsonl", [line])], tmp_path / "out")
    refused = [c.removeprefix("refused_") for c in report.counters if c.startswith("refused_")]
    rows = "+".join(f"{feed} {count}" for feed, count in report.rows.items() if count)
    assert (rows or ("refused " + refused[0] if refused else "control")) == outcome
    assert len(refused) == outcome.startswith("refused")
    if refused:
        assert report.samples[f"refused_{refused[0]}"].endswith(raw[:512])
    if not rows:
        return
    if rows == "candles 1":
        data = plain(raw)["params"]["data"]
        stored = {column: values[0] for column, values in table(tmp_path / "out", "candles").items()}
        for key in ("open", "high", "low", "close", "volume"):
            assert same_decimal(stored[key], str(data[key]))
        interval = {"1": "1m", "3": "3m"}[plain(raw)["params"]["channel"].rpartition(".")[2]]
        assert (stored["open_time"], stored["interval"], stored["closed"]) == (data["tick"] * 1000, interval, False)
        return
    proven(tmp_path / "out", run(DeribitModel(), [line]))


@pytest.fixture
def venue(tmp_path: Path) -> Any:
    emit = Emit(tmp_path / "rings", "t", Deribit.EXCHANGE, Deribit.FEEDS, semaphore=False, capacities=SMALL)
    yield Deribit(emit, Options(), [], open_world=True)
    emit.close()


BODIES = sorted(path.name for path in (FOLDER / "rest").iterdir()) if DATA.is_dir() else []
INSTRUMENTS = [name for name in BODIES if "get_instruments" in name or name.startswith("instruments")]
LAST_TRADES = [name for name in BODIES if name.startswith("last_trades")]
# Every body whose rows carry an `instrument_name` reads like a list of instruments; only its URL tells it apart.
SUMMARIES = [name for name in BODIES if name.startswith("open_interest")]


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_instruments_body(name: str) -> None:
    raw = (FOLDER / "rest" / name).read_bytes()
    model = DeribitModel()
    model.body("/api/v2/public/get_instruments", json.loads(raw))
    assert {i.ticker: told(i) for i in Deribit.instruments(raw)} == model.expected.instruments


@pytest.mark.parametrize("name", LAST_TRADES)
def test_trades_body_repairs_a_hole(name: str, venue: Any) -> None:
    """A live trade before and one behind those of the answer; it fills what it has of the hole between them."""
    body = plain((FOLDER / "rest" / name).read_bytes())
    trades = body["result"]["trades"]
    ticker = trades[0]["instrument_name"]
    of_ticker = [t for t in trades if t["instrument_name"] == ticker]
    first, last = min(t["trade_seq"] for t in of_ticker), max(t["trade_seq"] for t in of_ticker)
    venue.emit.packet(SAMPLE_TIME_NS, venue.emit.clock())
    for seq in (first - 1, last + 1):
        live = {"trade_seq": seq, "trade_id": f"x{seq}", "timestamp": 1_796_000_000_000, "price": 1.0, "amount": 2.0,
                "direction": "buy", "instrument_name": ticker}  # fmt: skip
        params = {"channel": f"trades.{ticker}.100ms", "data": [live]}
        venue.decode(json.dumps({"jsonrpc": "2.0", "method": "subscription", "params": params}).encode())
    (want,) = venue.wants
    assert want.path.startswith(
        f"/api/v2/public/get_last_trades_by_instrument?instrument_name={ticker}&start_seq={first}&"
    )
    venue.http("https://www.deribit.com" + want.path, (FOLDER / "rest" / name).read_bytes())
    rows = venue.emit.rings["trades"].recent_rows(0)[2:]
    assert {
        (int(r["trade_seq"]), r["trade_id"].decode(), float(r["price"]), float(r["qty"]), int(r["side"]), int(r["timestamp"]))
        for r in rows
    } == {
        (t["trade_seq"], t["trade_id"], float(t["price"]), float(t["amount"]), 1 if t["direction"] == "buy" else -1,
         t["timestamp"] * 1000) for t in of_ticker
    }  # fmt: skip
    assert all(flags & 16 for flags in rows["flags"].tolist())
    gaps = venue.emit.rings["gaps"].recent_rows(0)
    whole = len({t["trade_seq"] for t in of_ticker}) == last - first + 1
    assert [(int(g["first_id"]), int(g["last_id"]), bool(g["repaired"])) for g in gaps] == [
        (first, last, False), *([(first, last, True)] if whole else [])
    ]  # fmt: skip


@pytest.mark.parametrize("nothing", [{"price": 0, "amount": 0}, {"price": 0.0, "amount": 0.0},
                                     {"price": None, "amount": 0}, {"price": None, "amount": None}])  # fmt: skip
@pytest.mark.parametrize("side", ["bid", "ask"])
def test_a_side_without_orders_has_no_price(side: str, nothing: dict[str, Any], venue: Any) -> None:
    venue.emit.packet(SAMPLE_TIME_NS, venue.emit.clock())
    data = {"timestamp": 1_796_000_000_000, "instrument_name": "A", "best_bid_price": -1.5, "best_bid_amount": 2.0,
            "best_ask_price": 3.5, "best_ask_amount": 4.0}  # fmt: skip
    data |= {f"best_{side}_{what}": value for what, value in nothing.items()}
    for channel in ("quote.A", "ticker.A.100ms"):
        params = {"channel": channel, "data": data}
        venue.decode(json.dumps({"jsonrpc": "2.0", "method": "subscription", "params": params}).encode())
    ((quote,), (ticker,)) = (venue.emit.rings[feed].recent_rows(0) for feed in ("bbo", "tickers"))
    other = "ask" if side == "bid" else "bid"
    for row in (quote, ticker):
        assert math.isnan(row[f"{side}_price"])
        assert row[f"{other}_price"] == {"bid": -1.5, "ask": 3.5}[other]
    assert (quote[f"{side}_qty"], quote[f"{other}_qty"]) == (0, {"bid": 2.0, "ask": 4.0}[other])


@needs_data
def test_the_recorded_ticker_of_an_option_that_nobody_quotes(venue: Any) -> None:
    venue.emit.packet(SAMPLE_TIME_NS, venue.emit.clock())
    venue.decode((FOLDER / "samples" / "ticker_09.json").read_bytes())
    (row,) = venue.emit.rings["tickers"].recent_rows(0)
    assert math.isnan(row["bid_price"])
    assert math.isnan(row["ask_price"])
    assert row["open_interest"] == 0


def test_an_open_candle_is_forgotten_with_its_instrument(tmp_path: Path) -> None:
    """Listed anew, the first candle does not close the one from before: that one may have changed meanwhile."""
    emit = Emit(tmp_path / "rings", "t", Deribit.EXCHANGE, Deribit.FEEDS, semaphore=False, capacities=SMALL)
    streams = [s for ticker in "AB" for s in Deribit.streams_of(ticker, ("candles",), Options(intervals=("1m",)))]
    venue = Deribit(emit, Options(), streams)

    def candle(ticker: str, minute: int) -> None:
        emit.packet(SAMPLE_TIME_NS, emit.clock())
        data = {"tick": 1_700_000_040_000 + minute * 60_000, "open": 1, "high": 1, "low": 1, "close": 1, "volume": 1}
        params = {"channel": f"chart.trades.{ticker}.1", "data": data}
        venue.decode(json.dumps({"jsonrpc": "2.0", "method": "subscription", "params": params}).encode())

    for ticker in "AB":
        candle(ticker, 0)
    venue.remove(["A"], connected=False)
    venue.add(streams[:1], connected=False)
    for ticker in "AB":
        candle(ticker, 1)
    rows = emit.rings["candles"].recent_rows(0)
    a, b = (emit.instrument(ticker).codes["candles"] for ticker in "AB")
    assert rows[["ticker", "closed"]].tolist() == [(a, 0), (b, 0), (a, 0), (b, 1), (b, 0)]
    emit.close()


def test_a_trade_of_a_new_direction_is_told_and_kept(venue: Any) -> None:
    venue.emit.packet(SAMPLE_TIME_NS, venue.emit.clock())
    for seq, direction in enumerate(("buy", "both", "sell"), start=1):
        live = {"trade_seq": seq, "trade_id": f"x{seq}", "timestamp": 1_796_000_000_000, "price": 1.0, "amount": 2.0,
                "direction": direction, "instrument_name": "A"}  # fmt: skip
        params = {"channel": "trades.A.100ms", "data": [live]}
        venue.decode(json.dumps({"jsonrpc": "2.0", "method": "subscription", "params": params}).encode())
    assert venue.emit.rings["trades"].recent_rows(0)["side"].tolist() == [1, 0, -1]
    assert venue.emit.counters["protocol_drift"] == 1
    assert "new side of a trade both" in venue.notes


@pytest.mark.parametrize("name", sorted(set(BODIES) - set(INSTRUMENTS) - set(LAST_TRADES)))
def test_other_bodies_make_no_rows(name: str, venue: Any) -> None:
    raw = (FOLDER / "rest" / name).read_bytes()
    venue.emit.packet(SAMPLE_TIME_NS, venue.emit.clock())
    with pytest.raises(FrameError) as refused:
        venue.http("https://www.deribit.com/api/v2/public/get_order_book?instrument_name=A", raw)
    assert refused.value.reason == "unhandled_url"
    with pytest.raises(msgspec.DecodeError):
        venue.http(
            "https://www.deribit.com/api/v2/public/get_last_trades_by_instrument?instrument_name=A&start_seq=1", raw
        )
    if name not in SUMMARIES:
        with pytest.raises(msgspec.DecodeError):
            Deribit.instruments(raw)
    assert sum(ring.next for ring in venue.emit.rings.values()) == 0


def test_all_recorded_fields_are_known_and_a_new_one_is_told_once(tmp_path: Path) -> None:
    report = normalize("deribit", [recording(name) for name in RECORDINGS], tmp_path / "out")
    assert "protocol_drift" not in report.counters
    emit = Emit(tmp_path / "rings", "t", Deribit.EXCHANGE, Deribit.FEEDS, capacities=SMALL, semaphore=False)
    venue = Deribit(emit, Options(), [], open_world=True)
    frame = next(line for line in entries(recording("tickers_20260930")) if '"ticker.' in line.get("raw", ""))["raw"]
    emit.packet(SAMPLE_TIME_NS, 0)
    for _ in range(3):
        venue.decode(frame.replace('"stats":{', '"stats":{"median":1.5,', 1).encode())
    assert emit.counters["protocol_drift"] == 1
    assert "new field median" in venue.notes
    emit.close()
