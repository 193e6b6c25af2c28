"""Recorded Binance Spot traffic through normalize: every stored row against plain json, every book against a plain dict."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
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
    BinanceModel,
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
from mdcollector.exchanges.binance import Binance, BinanceFutures, BinanceSpot
from mdcollector.normalize import Report, normalize
from mdcollector.recording import Entry, RecordingWriter

pytestmark = needs_data

FOLDER = DATA / "binance_spot"
SAMPLE_TIME_NS = 1_796_083_200_000_000_000  # behind every sample, so that no time of theirs lies in the future

# Recordings of one run, and how many bookTicker frames have the id of a book message (README of the data, and once more
# for the recordings taken together).
RUNS = {
    "btcusdt_20240808": (["btcusdt_20240808"], 564),
    "ethusdt_20240808": (["ethusdt_20240808"], 577),
    "multi_20211012": (["multi_20211012"], 26),
    "multi_20210417": (["multi_20210417"], 199),
    "multi_20210405": (["multi_20210405"], 1152),
    "btcusdt over midnight": (["btcusdt_20240808", "btcusdt_20240809"], None),
}
SMALL = {"trades": 4096, "orderbook_l2": 16384, "bbo": 512, "tickers": 512, "candles": 512, "gaps": 512}
# What becomes of every sample: rows of a feed | refused for a reason | control (a reply or notice; no row belongs to it).
SAMPLES = {
    "24hrticker_01.json": "tickers 1",
    "ack.json": "control",
    "ack_aggregated_trades.json": "control",
    "agg_trade.json": "trades 1",
    "aggregated_trades.json": "trades 1",
    "aggtrade.json": "trades 1",
    "book_ticker.json": "bbo 1",
    "bookticker_01.json": "refused unhandled_stream",
    "bookticker_03.json": "bbo 1",
    "bookticker_04.json": "bbo 1",
    "cap2026_aggtrade.json": "trades 1",
    "depthupdate_01.json": "orderbook_l2 4",
    "depthupdate_03.json": "orderbook_l2 2",
    "depthupdate_04.json": "orderbook_l2 6",
    "depthupdate_06.json": "orderbook_l2 2",
    "doc_aggregate_trade_streams.json": "trades 1",
    "doc_all_market_mini_tickers_stream.json": "refused wrong_type",
    "doc_average_price.json": "refused unhandled_event",
    "doc_block_trade_streams.json": "refused unhandled_event",
    "doc_diff_depth_stream.json": "orderbook_l2 2",
    "doc_individual_symbol_book_ticker_streams.json": "bbo 1",
    "doc_individual_symbol_mini_ticker_stream.json": "refused unhandled_event",
    "doc_individual_symbol_rolling_window_statistics_stream.json": "refused unhandled_event",
    "doc_individual_symbol_ticker_streams.json": "tickers 1",
    "doc_kline_candlestick_streams_for_utc.json": "candles 1",
    "doc_listing_subscriptions_01.json": "refused unhandled_event",
    "doc_partial_book_depth_streams.json": "refused unhandled_event",
    "doc_reference_price_streams.json": "refused unhandled_event",
    "doc_retrieving_properties_01.json": "refused unhandled_event",
    "doc_server_shutdown_01.json": "control",
    "doc_setting_properties_01.json": "refused unhandled_event",
    "doc_subscribe_to_a_stream.json": "refused unhandled_event",
    "doc_trade_streams.json": "trades 1",
    "doc_unsubscribe_to_a_stream_01.json": "refused unhandled_event",
    "doc_wsapi_24hr_ticker_price_change_statistics_01.json": "refused unhandled_event",
    "doc_wsapi_24hr_ticker_price_change_statistics_03.json": "control",
    "doc_wsapi_24hr_ticker_price_change_statistics_04.json": "control",
    "doc_wsapi_aggregate_trades_01.json": "refused unhandled_event",
    "doc_wsapi_check_server_time_01.json": "refused unhandled_event",
    "doc_wsapi_event_format.json": "refused unhandled_event",
    "doc_wsapi_exchange_information.json": "refused unhandled_event",
    "doc_wsapi_historical_block_trades_01.json": "refused unhandled_event",
    "doc_wsapi_historical_trades_01.json": "refused unhandled_event",
    "doc_wsapi_how_to_interpret_rate_limits.json": "control",
    "doc_wsapi_how_to_show_hide_rate_limit_information_01.json": "refused unhandled_event",
    "doc_wsapi_how_to_show_hide_rate_limit_information_03.json": "refused unhandled_event",
    "doc_wsapi_how_to_show_hide_rate_limit_information_04.json": "control",
    "doc_wsapi_ip_limits_01.json": "control",
    "doc_wsapi_klines_01.json": "refused unhandled_event",
    "doc_wsapi_order_book_01.json": "refused unhandled_event",
    "doc_wsapi_recent_trades_01.json": "refused unhandled_event",
    "doc_wsapi_response_format_01.json": "control",
    "doc_wsapi_symbol_order_book_ticker_01.json": "refused unhandled_event",
    "doc_wsapi_symbol_order_book_ticker_03.json": "control",
    "doc_wsapi_symbol_price_ticker_01.json": "refused unhandled_event",
    "doc_wsapi_symbol_price_ticker_03.json": "control",
    "doc_wsapi_trading_day_ticker_01.json": "refused unhandled_event",
    "doc_wsapi_trading_day_ticker_03.json": "control",
    "doc_wsapi_trading_day_ticker_04.json": "control",
    "doc_wsapi_ui_klines_01.json": "refused unhandled_event",
    "kline.json": "candles 1",
    "klines.json": "candles 1",
    "mini_ticker.json": "refused unhandled_stream",
    "partial_book.json": "refused unhandled_stream",
    "partial_depth.json": "refused unhandled_stream",
    "rec_aggtrade_multi_20210405.json": "trades 1",
    "rec_aggtrade_multi_20210417.json": "trades 1",
    "rec_aggtrade_multi_20211012.json": "trades 1",
    "rec_bookticker_btcusdt_20240808.json": "bbo 1",
    "rec_bookticker_btcusdt_20240809.json": "bbo 1",
    "rec_bookticker_ethusdt_20240808.json": "bbo 1",
    "rec_bookticker_multi_20210405.json": "bbo 1",
    "rec_bookticker_multi_20210417.json": "bbo 1",
    "rec_bookticker_multi_20211012.json": "bbo 1",
    "rec_depthupdate_btcusdt_20240808.json": "orderbook_l2 12",
    "rec_depthupdate_btcusdt_20240809.json": "orderbook_l2 19",
    "rec_depthupdate_ethusdt_20240808.json": "orderbook_l2 7",
    "rec_depthupdate_multi_20210405.json": "orderbook_l2 20",
    "rec_depthupdate_multi_20210417.json": "orderbook_l2 1",
    "rec_depthupdate_multi_20211012.json": "orderbook_l2 3",
    "rec_kline_multi_20210417.json": "candles 1",
    "rec_kline_multi_20211012.json": "candles 1",
    "rec_trade_btcusdt_20240808.json": "trades 1",
    "rec_trade_btcusdt_20240809.json": "trades 1",
    "rec_trade_ethusdt_20240808.json": "trades 1",
    "rolling_window_ticker.json": "refused unhandled_stream",
    "roq_agg_trade_01.json": "trades 1",
    "roq_book_ticker_01.json": "bbo 1",
    "roq_error_01.json": "refused venue_error",
    "roq_mini_ticker_01.json": "refused unhandled_stream",
    "roq_result_01.json": "control",
    "ticker.json": "tickers 1",
    "ticker_24hr.json": "tickers 1",
    "ticker_all.json": "refused unhandled_stream",
    "ticker_book.json": "bbo 1",
    "trade_01.json": "trades 1",
    "trade_03.json": "refused wrong_type",
    "trade_04.json": "trades 1",
    "trade_06.json": "trades 1",
    "trade_07.json": "trades 1",
    "trades.json": "trades 1",
}


def recording(name: str) -> Path:
    return FOLDER / "recorded" / f"{name}.jsonl.zst"


def opening(name: str) -> list[dict[str, Any]]:
    """The first entries of a recording: enough to be changed."""
    return entries(recording(name))[:9000]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    with RecordingWriter(path) as out:
        for line in lines:
            out.write(Entry(**line))
    return path


def normalized(lines: list[dict[str, Any]], tmp_path: Path) -> tuple[Report, Path, BinanceModel]:
    """A recording of these lines through the product, and by plain json."""
    report = normalize("binance_spot", [write(tmp_path / "modified.jsonl", lines)], tmp_path / "out")
    return report, tmp_path / "out", run(BinanceModel(), lines)


def proven(out: Path, model: BinanceModel) -> None:
    """All tables are what the model says, and a reader's books are the plain ones."""
    for feed, rows in model.expected.rows.items():
        compare(table(out, feed), rows)
    if model.expected.messages:
        rebuild(table(out, "orderbook_l2"), model.expected.messages)


def stream(line: dict[str, Any]) -> str:
    return json.loads(line["raw"])["stream"] if line["dir"] == "in" else ""


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


@pytest.mark.parametrize(("names", "comparable"), RUNS.values(), ids=RUNS)
def test_every_row_equals_the_raw_frames(names: list[str], comparable: int | None, tmp_path: Path) -> None:
    report = normalize("binance_spot", [recording(name) for name in names], tmp_path)
    lines = [line for name in names for line in entries(recording(name))]
    model = run(BinanceModel(), lines)
    assert not model.expected.rows["gaps"], "the README says that no frame is missing"
    proven(tmp_path, model)
    assert report.findings == []
    assert (report.entries, report.rows_left) == (len(lines), 0)
    assert report.rows_written == sum(len(rows) for rows in model.expected.rows.values())
    assert report.counters.get("book_duplicate", 0) == model.expected.counters["book_duplicate"]
    assert not [name for name in report.counters if name.startswith(("refused_", "gap_"))]

    trades = table(tmp_path, "trades")
    for price, qty, (price_text, qty_text) in zip(trades["price"], trades["qty"], model.expected.texts, strict=True):
        assert same_decimal(price, price_text)
        assert same_decimal(qty, qty_text)

    assert not any(flags & INVALID for flags in table(tmp_path, "orderbook_l2")["flags"])
    equal, snapshots = 0, set()
    for _, ticker, update_id, book in model.expected.messages:
        best = model.best.get((ticker, update_id))
        if best is not None:
            bid, ask = max(book[BID]), min(book[ASK])
            assert (bid, book[BID][bid], ask, book[ASK][ask]) == best, (ticker, update_id)
            equal += ticker in snapshots
        snapshots.add(ticker)  # the README counts updates; the first message of a book is its snapshot
    assert equal > 500 if comparable is None else equal == comparable


def test_order_book_of_the_library_equals_the_plain_one(tmp_path: Path) -> None:
    normalize("binance_spot", [recording("multi_20210405")], tmp_path)
    stored = table(tmp_path, "orderbook_l2")
    messages = run(BinanceModel(), entries(recording("multi_20210405"))).expected.messages
    rows = [dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)]
    books: dict[str, OrderBook] = {}
    at = 0
    for count, ticker, update_id, truth in messages:
        book = books.setdefault(ticker, OrderBook())
        book.apply(rows[at : at + count])
        at += count
        assert book.is_valid
        assert book.is_complete
        assert (book.update_id, book.bids, book.asks) == (update_id, truth[BID], truth[ASK])
        assert book.best_bid is not None
        assert book.best_bid[0] == max(truth[BID])
    assert at == len(rows)


def test_a_day_without_its_snapshot_is_stored_and_not_believed(tmp_path: Path) -> None:
    report = normalize("binance_spot", [recording("btcusdt_20240809")], tmp_path)
    proven(tmp_path, run(BinanceModel(), entries(recording("btcusdt_20240809"))))
    assert report.gaps == 0
    assert all(flags & INVALID for flags in table(tmp_path, "orderbook_l2")["flags"])


def test_two_runs_and_the_command_give_the_same_bytes(tmp_path: Path) -> None:
    names = [str(recording(name)) for name in ("multi_20210417", "multi_20211012")]
    for run_ in ("a", "b"):
        normalize("binance_spot", [Path(name) for name in names], tmp_path / run_)
    command = [
        sys.executable,
        "-m",
        "mdcollector.cli",
        "normalize",
        "binance_spot",
        *names,
        "--out",
        tmp_path / "c",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["findings"] == []
    first = bytes_of(tmp_path / "a")
    assert said["files"] == len(first) > 3
    assert first == bytes_of(tmp_path / "b") == bytes_of(tmp_path / "c")


def test_command_says_what_is_missing(tmp_path: Path) -> None:
    lines = entries(recording("multi_20211012"))
    at = next(i for i, line in reversed(list(enumerate(lines[:-20]))) if stream(line) == "nknusdt@depth@100ms")
    path = write(tmp_path / "hole.jsonl.zst", lines[:at] + lines[at + 1 :])
    command = [sys.executable, "-m", "mdcollector.cli", "normalize", "binance_spot", path, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "tell of holes: 1" in done.stdout


# Frames taken out


def _positions(lines: list[dict[str, Any]], kind: Callable[[str], bool], live: bool = True) -> list[int]:
    """Where frames of these streams are, from the second third on (every book is live then)."""
    return [i for i, line in enumerate(lines) if kind(stream(line)) and (not live or i > len(lines) // 3)]


def _without(lines: list[dict[str, Any]], out: set[int]) -> list[dict[str, Any]]:
    return [line for i, line in enumerate(lines) if i not in out]


def _holes(lines: list[dict[str, Any]], out: set[int]) -> list[tuple[Any, ...]]:
    """What the ledger must say of the frames taken out, read from these frames alone: runs of ids per instrument."""
    found: dict[tuple[str, str], list[list[int]]] = {}
    for i in sorted(out):
        name, data = stream(lines[i]), json.loads(lines[i]["raw"])["data"]
        ticker = name.partition("@")[0].upper()
        if "depth" in name:
            first, last, feed = data["U"], data["u"], "orderbook_l2"
        else:
            first = last = data["t"] if "t" in data else data["a"]
            feed = "trades"
        runs = found.setdefault((feed, ticker), [])
        if runs and runs[-1][1] + 1 == first:
            runs[-1][1] = last
        else:
            runs.append([first, last])
    return sorted(
        (feed, ticker, first, last, "sequence", False) for (feed, ticker), runs in found.items() for first, last in runs
    )


def _ledger(out: Path) -> list[tuple[Any, ...]]:
    gaps = table(out, "gaps")
    columns = ("feed", "ticker", "first_id", "last_id", "cause", "repaired")
    return sorted(zip(*(gaps[c] for c in columns), strict=True)) if gaps else []


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["multi_20210405", "ethusdt_20240808"])
def test_every_frame_taken_out_is_in_the_ledger_and_nothing_else(name: str, seed: int, tmp_path: Path) -> None:
    lines, rng = opening(name), random.Random(seed)
    depth = _positions(lines, lambda s: "@depth" in s)
    trades = _positions(lines, lambda s: "rade" in s)
    out: set[int] = set()
    if seed == 0:  # one book message
        out = {rng.choice(depth)}
    elif seed == 1:  # one trade
        out = {rng.choice(trades[:-20])}
    elif seed == 2:  # a run of book messages of one instrument
        at = rng.randrange(len(depth) - 400)
        same = [i for i in depth[at:] if stream(lines[i]) == stream(lines[depth[at]])]
        out = set(same[:5])
    elif seed == 3:  # a run of trades of one instrument
        at = rng.randrange(len(trades) // 2)
        same = [i for i in trades[at:] if stream(lines[i]) == stream(lines[trades[at]])]
        out = set(same[:7])
    elif seed == 4:  # a second in which nothing came at all
        at = rng.randrange(len(lines) // 2, len(lines) * 3 // 4)
        out = {i for i in depth + trades if at <= i < at + 60}
    else:  # here and there
        out = set(rng.sample(depth, 20) + rng.sample(trades, 20))
    # What is missing at the very end of a stream shows in nothing that comes later.
    last = {stream(lines[i]): i for i in depth + trades if i not in out}
    out = {i for i in out if i < last.get(stream(lines[i]), -1)}
    assert out
    report, tables, model = normalized(_without(lines, out), tmp_path)
    proven(tables, model)
    assert _ledger(tables) == _holes(lines, out)
    assert report.gaps == len(_holes(lines, out))
    assert not [counter for counter in report.counters if counter.startswith("refused_")]
    assert len(report.findings) == (1 if out else 0)


def test_a_missing_best_price_is_no_hole(tmp_path: Path) -> None:
    lines = entries(recording("multi_20211012"))
    out = set(_positions(lines, lambda s: s.endswith("bookTicker"))[:5])
    report, tables, model = normalized(_without(lines, out), tmp_path)
    proven(tables, model)
    assert report.findings == []


def test_without_its_snapshot_only_that_book_is_not_believed(tmp_path: Path) -> None:
    lines = opening("multi_20210405")
    out = {i for i, line in enumerate(lines) if line["dir"] == "http" and "MANAUSDT" in line["url"]}
    assert len(out) == 1
    report, tables, model = normalized(_without(lines, out), tmp_path)
    proven(tables, model)
    assert report.gaps == 0
    stored = table(tables, "orderbook_l2")
    doubted = {ticker for ticker, flags in zip(stored["ticker"], stored["flags"], strict=True) if flags & INVALID}
    assert doubted == {"MANAUSDT"}


@pytest.mark.parametrize("late", [0, 40])
def test_a_book_is_believed_again_from_the_next_snapshot_on(late: int, tmp_path: Path) -> None:
    """`late`: so many messages after the snapshot's own id the answer arrives; they are held meanwhile."""
    lines = opening("ethusdt_20240808")
    depth = _positions(lines, lambda s: "@depth" in s)
    truth = {update_id: book for _, _, update_id, book in run(BinanceModel(), lines).expected.messages}
    lost, at = depth[100], depth[300]
    last_id = json.loads(lines[at]["raw"])["data"]["u"]
    book = truth[last_id]
    body = {
        "lastUpdateId": last_id,
        "bids": [[f"{price:.8f}", f"{qty:.8f}"] for price, qty in sorted(book[BID].items(), reverse=True)],
        "asks": [[f"{price:.8f}", f"{qty:.8f}"] for price, qty in sorted(book[ASK].items())],
    }
    answer_at = depth[300 + late]
    answer = {
        "t": lines[answer_at]["t"], "conn": "http", "dir": "http", "raw": json.dumps(body),
        "url": "https://api.binance.com/api/v3/depth?symbol=ETHUSDT&limit=5000",
    }  # fmt: skip
    modified = [*lines[:lost], *lines[lost + 1 : answer_at + 1], answer, *lines[answer_at + 1 :]]
    report, tables, model = normalized(modified, tmp_path)
    proven(tables, model)
    rest = json.loads(lines[lost]["raw"])["data"]["u"] + 1, last_id
    assert _ledger(tables) == [*_holes(lines, {lost}), ("orderbook_l2", "ETHUSDT", *rest, "sequence", False)]
    stored = table(tables, "orderbook_l2")
    assert not any(flags & INVALID for flags in stored["flags"])
    assert RESYNCED in {flags & RESYNCED for flags in stored["flags"]}
    assert report.counters["book_superseded"] == 200 + 2  # between hole and snapshot, and before the first snapshot
    final = {ticker: book for _, ticker, _, book in model.expected.messages}
    assert final["ETHUSDT"] == truth[max(truth)], "healed, and the same book as without the loss"


# Frames doubled and swapped


def _values(out: Path, feed: str, *columns: str) -> dict[str, list[tuple[Any, ...]]]:
    """Rows per ticker, of these columns only."""
    stored, rows = table(out, feed), {}
    for ticker, *values in zip(stored["ticker"], *(stored[c] for c in columns), strict=True):
        rows.setdefault(ticker, []).append(tuple(values))
    return rows


BOOK_COLUMNS = ("update_id", "timestamp", "side", "action", "price", "qty", "flags")
TRADE_COLUMNS = ("trade_id", "trade_seq", "timestamp", "side", "price", "qty", "flags")


@pytest.mark.parametrize("name", ["multi_20210405", "ethusdt_20240808"])
def test_doubled_frames_are_counted_and_make_no_rows(name: str, tmp_path: Path) -> None:
    lines, rng = opening(name), random.Random(7)
    normalize("binance_spot", [write(tmp_path / "plain.jsonl", lines)], tmp_path / "plain")
    depth, trades = (_positions(lines, lambda s, k=k: k in s) for k in ("@depth", "rade"))
    twice = {"book": set(rng.sample(depth, 50)), "trade": set(rng.sample(trades, 50))}
    modified: list[dict[str, Any]] = []
    waiting: list[tuple[int, dict[str, Any]]] = []
    for i, line in enumerate(lines):
        modified.append(line)
        if i in twice["book"] | twice["trade"]:
            waiting.append((i + rng.choice([0, 1, 30]), {**line}))
        for due, copy in [w for w in waiting if w[0] <= i or i == len(lines) - 1]:
            modified.append({**copy, "t": line["t"]})
            waiting.remove((due, copy))
    report, tables, model = normalized(modified, tmp_path)
    proven(tables, model)
    assert report.findings == []
    assert (report.counters["book_duplicate"], report.counters["trade_duplicate"]) == (
        model.expected.counters["book_duplicate"], model.expected.counters["trade_duplicate"]
    )  # fmt: skip
    assert report.counters["trade_duplicate"] == 50
    for feed, columns in (("orderbook_l2", BOOK_COLUMNS), ("trades", TRADE_COLUMNS)):
        assert _values(tables, feed, *columns) == _values(tmp_path / "plain", feed, *columns)


@pytest.mark.parametrize("name", ["multi_20210405", "ethusdt_20240808"])
def test_swapped_frames_lose_nothing_and_the_ledger_says_so(name: str, tmp_path: Path) -> None:
    lines, rng = opening(name), random.Random(11)
    normalize("binance_spot", [write(tmp_path / "plain.jsonl", lines)], tmp_path / "plain")
    pairs: list[tuple[int, int]] = []
    for kind in ("@depth", "rade"):
        places = _positions(lines, lambda s, k=kind: k in s)
        for i in sorted(rng.sample(range(len(places) - 200), 20)):
            following = [j for j in places[i + 1 :] if stream(lines[j]) == stream(lines[places[i]])]
            if following and not any({places[i], following[0]} & set(pair) for pair in pairs):
                pairs.append((places[i], following[0]))
    modified = [dict(line) for line in lines]
    late = set()
    for a, b in pairs:
        modified[a]["raw"], modified[b]["raw"] = lines[b]["raw"], lines[a]["raw"]
        late.add(a)
    report, tables, _ = normalized(modified, tmp_path)
    for feed, columns in (("orderbook_l2", BOOK_COLUMNS), ("trades", TRADE_COLUMNS)):
        plain_rows, rows = _values(tmp_path / "plain", feed, *columns), _values(tables, feed, *columns)
        if feed == "trades":  # stored as they came; no id twice, none missing
            rows = {ticker: sorted(values, key=lambda v: v[1]) for ticker, values in rows.items()}
        assert rows == plain_rows
    expected = []
    for i in late:
        ((feed, ticker, first, last, cause, _),) = _holes(lines, {i})
        expected += [(feed, ticker, first, last, cause, False)]
        expected += [(feed, ticker, first, last, "filled" if feed == "trades" else "reordered", True)]
    assert _ledger(tables) == sorted(expected)
    assert not [c for c in report.counters if c.startswith("refused_")]
    assert not any(flags & INVALID for flags in table(tables, "orderbook_l2")["flags"])


# Samples and REST bodies


def _decoded(raw: str, tmp_path: Path) -> tuple[Report, str]:
    line = {"t": SAMPLE_TIME_NS, "conn": "sample", "dir": "in", "raw": raw}
    report = normalize("binance_spot", [write(tmp_path / "sample.jsonl", [line])], tmp_path / "out")
    said = "+".join(f"{feed} {count}" for feed, count in report.rows.items() if count)
    refused = [name.removeprefix("refused_") for name in report.counters if name.startswith("refused_")]
    assert len(refused) <= 1
    if refused:
        assert report.counters[f"refused_{refused[0]}"] == 1
        assert report.samples[f"refused_{refused[0]}"].endswith(raw[:512])
    return report, said or ("refused " + refused[0] if refused else "control")


def test_the_table_names_every_sample() -> None:
    assert {path.name for path in (FOLDER / "samples").iterdir()} == set(SAMPLES)


_RAW_KINDS = {"depthUpdate": "depth", "24hrTicker": "ticker", "": "bookTicker"}


@pytest.mark.parametrize(("name", "outcome"), SAMPLES.items())
def test_sample(name: str, outcome: str, tmp_path: Path) -> None:
    raw = (FOLDER / "samples" / name).read_text()
    report, found = _decoded(raw, tmp_path)
    assert found == outcome
    if outcome == "control" or outcome.startswith("refused"):
        assert report.rows_written == 0
        return
    message = plain(raw)
    if "stream" not in message:
        kind = message.get("e", "")
        message = {"stream": f"{message['s'].lower()}@{_RAW_KINDS.get(kind, kind)}", "data": message}
    line = {"t": SAMPLE_TIME_NS, "conn": "sample", "dir": "in", "raw": json.dumps(message)}
    model = run(BinanceModel(), [line])
    proven(tmp_path / "out", model)


@pytest.fixture
def venue(tmp_path: Path) -> Any:
    emit = Emit(tmp_path / "rings", "t", BinanceSpot.EXCHANGE, BinanceSpot.FEEDS, semaphore=False, capacities=SMALL)
    yield BinanceSpot(emit, Options(), [], open_world=True)
    emit.close()


BODIES = sorted(path.name for path in (FOLDER / "rest").iterdir()) if DATA.is_dir() else []
DEPTHS = [name for name in BODIES if "depth" in name or name == "order_book.json"]
INFOS = [name for name in BODIES if "exchange_info" in name or "exchangeinfo" in name or "exchange_information" in name]
TRADES = ["historical_trades.json", "trades_01.json"]


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_body(name: str, venue: Any) -> None:
    raw = (FOLDER / "rest" / name).read_bytes()
    venue.emit.packet(SAMPLE_TIME_NS, venue.emit.clock())
    venue.http("https://api.binance.com/api/v3/depth?symbol=AB&limit=1000", raw)
    rows = venue.emit.rings["orderbook_l2"].recent_rows(0)
    body = json.loads(raw)
    expected = [(BID, float(p), float(q)) for p, q in body["bids"]] + [
        (ASK, float(p), float(q)) for p, q in body["asks"]
    ]
    assert [(int(r["side"]), float(r["price"]), float(r["qty"])) for r in rows] == expected
    assert set(rows["update_id"].tolist()) == {body["lastUpdateId"]}
    assert [bool(f & LAST) for f in rows["flags"].tolist()] == [False] * (len(rows) - 1) + [True]
    bids, asks = venue.books["AB"].book()
    assert (bids, asks) == ({p: q for s, p, q in expected if s == BID}, {p: q for s, p, q in expected if s == ASK})


@pytest.mark.parametrize("name", INFOS)
def test_instruments_body(name: str) -> None:
    raw = (FOLDER / "rest" / name).read_bytes()
    model = BinanceModel()
    model.body("/api/v3/exchangeInfo", json.loads(raw))
    listed = {i.ticker: told(i) for i in BinanceSpot.instruments(raw)}
    assert listed == model.expected.instruments


@pytest.mark.parametrize("name", TRADES)
def test_trades_body_repairs_a_hole(name: str, venue: Any) -> None:
    """Live trades just before and behind the ids of the answer; it fills the hole between them."""
    body = json.loads((FOLDER / "rest" / name).read_bytes(), parse_float=str)
    first, last = min(t["id"] for t in body), max(t["id"] for t in body)
    venue.emit.packet(SAMPLE_TIME_NS, venue.emit.clock())
    for seq in (first - 1, last + 1):
        trade = {"e": "trade", "t": seq, "p": "1", "q": "1", "T": 1_790_000_000_000, "m": False}
        venue.decode(json.dumps({"stream": "ab@trade", "data": trade}, separators=(",", ":")).encode())
    (want,) = venue.wants
    assert want.path == f"/api/v3/historicalTrades?symbol=AB&fromId={first}&limit={min(last - first + 1, 1000)}"
    venue.http("https://x" + want.path, json.dumps(body).encode())
    rows = venue.emit.rings["trades"].recent_rows(0)
    found = {
        int(r["trade_seq"]): (float(r["price"]), float(r["qty"]), int(r["side"]), int(r["timestamp"])) for r in rows[2:]
    }
    assert found == {
        t["id"]: (float(t["price"]), float(t["qty"]), -1 if t["isBuyerMaker"] else 1, t["time"] * 1000) for t in body
    }
    assert len(rows) == 2 + len(body)
    assert all(flags & 16 for flags in rows["flags"][2:].tolist())
    gaps = venue.emit.rings["gaps"].recent_rows(0)
    whole = len(body) == last - first + 1
    assert [(int(g["first_id"]), int(g["last_id"]), bool(g["repaired"])) for g in gaps] == [
        (first, last, False), *([(first, last, True)] if whole else [])
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(BODIES) - set(DEPTHS) - set(INFOS) - set(TRADES)))
def test_other_bodies_make_no_rows(name: str, venue: Any) -> None:
    """As the answer to what the venue asks for they are refused; nothing of them becomes a row."""
    raw = (FOLDER / "rest" / name).read_bytes()
    venue.emit.packet(SAMPLE_TIME_NS, venue.emit.clock())
    url = f"https://api.binance.com/api/v3/{name.removesuffix('.json')}"
    if name in ("ping.json", "time.json"):
        venue.http(url, raw)
    else:
        with pytest.raises(FrameError) as refused:
            venue.http(url, raw)
        assert refused.value.reason == "unhandled_url"
    for path in ("depth?symbol=AB", "historicalTrades?symbol=AB&fromId=1&limit=10"):
        if name == "doc_historical_block_trades.json" and "Trades" in path:
            continue  # the same form; block trades have an id space and a URL of their own
        with pytest.raises((FrameError, msgspec.DecodeError)):
            venue.http(f"https://api.binance.com/api/v3/{path}", raw)
    with pytest.raises(msgspec.DecodeError):
        BinanceSpot.instruments(raw)
    assert sum(ring.next for ring in venue.emit.rings.values()) == 0


@pytest.mark.parametrize("kind", [BinanceSpot, BinanceFutures])
def test_another_request_weight_is_told_once(kind: type[Binance], tmp_path: Path) -> None:
    emit = Emit(tmp_path, "t", kind.EXCHANGE, kind.FEEDS, semaphore=False, capacities=SMALL)
    live, recorded = (kind(emit, Options(), [], open_world=open_world) for open_world in (False, True))

    def listed(venue: Binance, *limits: tuple[str, str, int, object]) -> int:
        names = ("rateLimitType", "interval", "intervalNum", "limit")
        body = {"symbols": [], "rateLimits": [dict(zip(names, limit, strict=True)) for limit in limits]}
        assert venue.take_instruments("/exchangeInfo", json.dumps(body).encode()) == []
        return emit.counters["protocol_drift"]

    allowed = int(kind.LIMITS.weight[0])
    usual, less = ("REQUEST_WEIGHT", "MINUTE", 1, allowed), ("REQUEST_WEIGHT", "MINUTE", 1, allowed // 2)
    assert listed(live) == 0
    assert listed(live, usual, ("RAW_REQUESTS", "MINUTE", 5, 300_000), ("ORDERS", "DAY", 1, 5)) == 0
    assert listed(recorded, less) == 0, "what was allowed then is no matter"
    assert listed(live, less) == listed(live, less) == 1
    assert list(live.notes) == [f"new request weight {allowed // 2} per 1 MINUTE, not {allowed} per 60 s"]
    assert listed(live, ("REQUEST_WEIGHT", "SECOND", 30, allowed)) == 2
    assert emit.counters["refused_wrong_type"] == 0
    assert listed(live, ("REQUEST_WEIGHT", "MINUTE", 1, "many")) == 2
    assert emit.counters["refused_wrong_type"] == 1
    emit.close()
