"""Binance USD-M as a fleet: one connector in two processes, one for each path, against an exchange with faults.

Whatever happens, the exchange's ledger, the rings and the tables agree. The feeds are named in the order of the paths, so
`conn.1` is on /public and `conn.2` on /market.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, mdcollector, until

from mdcollector.budget import Budget
from mdcollector.connector import WEIGHT_SHARE
from mdcollector.exchanges.binance import BinanceFutures

VENUE = "binance_futures"
TICKERS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
PUBLIC = ("trades", "orderbook_l2", "bbo")
MARKET = ("tickers", "candles", "liquidations")
BOTH = ("conn.1", "conn.2")

Start = Callable[..., Fleet]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a fleet that collects; it is ended with the test."""
    with ExitStack() as stack:

        def make(feeds: tuple[str, ...] = PUBLIC, **options: Any) -> Fleet:
            given = {"tickers": TICKERS, "sim_tickers": ",".join(f"{t}:1" for t in TICKERS), **options}
            return stack.enter_context(Fleet(tmp_path, VENUE, feeds=feeds, **given)).start()

        yield make


def agrees(fleet: Fleet) -> Any:
    proof = fleet.finish()
    assert proof.ok, str(proof)
    return proof


def test_every_feed_on_the_path_that_delivers_it_over_a_rollover(start: Start) -> None:
    """Marks and statistics, open interest that is polled, liquidations; and both connections are replaced meanwhile."""
    fleet = start((*PUBLIC, *MARKET), connections=BOTH, rate=150, lifetime_s=4.0)
    paths = {conn["path"]: conn["subscriptions"] for conn in fleet.sim.state()["connections"]}
    assert paths.keys() == {"/public/stream", "/market/stream"}
    assert {name.partition("@")[2] for name in paths["/public/stream"]} == {"trade", "depth@100ms", "bookTicker"}
    assert {name.partition("@")[2] for name in paths["/market/stream"]} == {
        "ticker", "markPrice@1s", "kline_1m", "forceOrder",
    }  # fmt: skip
    for name in BOTH:
        until(lambda name=name: fleet.stats(name)["counters"].get("rollovers", 0) >= 1, f"{name} was replaced")
    fleet.wait_live()
    fleet.wait_more("liquidations", 2)
    proof = agrees(fleet)
    assert not proof.gaps, str(proof)
    assert all(counts.explained == 0 for counts in proof.feeds.values()), str(proof)
    given = Counter(
        name for row in fleet.rows("tickers", "conn.2") for name in ("last", "mark_price", "open_interest")
        if row[name] == row[name]
    )  # fmt: skip
    assert given["last"] > 5
    assert given["mark_price"] > 5
    polled = sum(len(fleet.sim.ledger().rows("first_ticker", ticker)) for ticker in TICKERS)
    assert given["open_interest"] == polled >= len(TICKERS)
    assert fleet.counters("refused_") == {}
    assert fleet.counter("protocol_drift") == 0


def test_missing_doubled_reordered_cut_and_senseless_frames(start: Start) -> None:
    """F2, F11, F16 on one connection: trades are fetched from the newest ones, books start anew, and nothing else feels it.

    After every ninth trade the exchange lets its insurance fund trade: these use a counter and are no executions.
    """
    fleet = start(rate=100, sim=("--limit", "off_book_every=9"))
    fleet.sim.fault("drop", stream="depth@100ms", ticker="BTCUSDT")
    fleet.wait_counter("gap_orderbook_l2_sequence")
    fleet.settle()
    lost = (
        ("gap", {"stream": "@trade", "n": 6, "every": 1.0, "count": 3}),
        ("drop", {"stream": "@trade", "every": 0.4, "count": 6}),
        ("duplicate", {"every": 0.2, "count": 20, "stream": "@depth"}),
        ("duplicate", {"every": 0.2, "count": 20, "stream": "@trade"}),
        ("reorder", {"stream": "@depth", "every": 0.5, "count": 6}),
        ("reorder", {"stream": "@trade", "every": 0.3, "count": 8}),
        ("split", {"mode": "fragments", "rate": 0.1, "count": 50}),
    )
    broken = (("truncate", {"stream": "@trade", "every": 0.7, "count": 4}), ("garbage", {"every": 0.1, "count": 28}))
    for faults in (lost, broken):  # a frame that is lost cannot be cut
        for name, keys in faults:
            fleet.sim.fault(name, **keys)
        fleet.sim.wait_state(lambda state: all(f["fired"] >= f.get("count", 1) for f in state["faults"]), 60)
    until(lambda: sum(fleet.counters("refused_").values()) == 28 + 4, lambda: f"all refused; {fleet.brief()}")
    fleet.wait_more("trades", 40)
    fleet.settle()
    assert fleet.counter("connections") == 1
    proof = agrees(fleet)
    assert {cause for feed, cause in proof.gaps if feed == "trades"} == {"no_execution"}, str(proof)
    assert proof.feeds["trades"].explained == 0
    assert proof.feeds["trades"].repaired >= 3 * 6
    told = {(g["ticker"], g["first_id"] + n) for g in fleet.rows("gaps") if g["cause"] == "no_execution"
            for n in range(g["last_id"] - g["first_id"] + 1)}  # fmt: skip
    truth = {(ticker, row["seq"]) for ticker in TICKERS for row in fleet.sim.ledger().rows("off_book", ticker)}
    assert len(told) > 20
    assert told <= truth
    done = mdcollector("verify", fleet.data)
    assert done.returncode == 0, done.stdout + done.stderr


def test_aggregated_trades_on_the_other_path(start: Start) -> None:
    """`trade_channel`: they come on /market, and what is missing is fetched by their own ids, however old it is."""
    fleet = start(("trades",), trade_channel="aggTrade", rate=100)
    (connection,) = fleet.sim.state()["connections"]
    assert connection["path"] == "/market/stream"
    fleet.sim.fault("gap", stream="@aggTrade", n=5, every=0.5, count=4)
    fleet.wait_counter("gap_trades_filled_repaired", 4)
    fleet.sim.fault("disconnect")
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    fleet.sim.pause()
    until(fleet.trades_are_proven, "trades are proven")
    fleet.settle()
    fleet.sim.stop()
    fleet.wait_counter("disconnected", 2)
    fleet.stop(fleet.connector, fleet.writer)
    ledger, repaired = fleet.sim.ledger(), 0
    for ticker in TICKERS:
        truth = {
            int(a["id"]): (float(a["price"]), float(a["qty"]), {"BUY": 1, "SELL": -1}[a["side"]], a["t"] // 1000 * 1000)
            for a in ledger.aggtrades(ticker).values()
        }
        rows = [row for row in fleet.rows("trades") if row["ticker"] == ticker]
        repaired += sum(row["flags"] & 16 != 0 for row in rows)
        found = {r["trade_seq"]: (r["price"], r["qty"], r["side"], r["timestamp"]) for r in rows}
        assert len(rows) == len(found), "none is there twice"
        assert found == {seq: row for seq, row in truth.items() if seq >= min(found)}
    assert repaired >= 4 * 5


@pytest.mark.parametrize("how", ["disconnect", "truncate"])
def test_a_lost_connection_is_a_recorded_hole_of_its_own_feeds(start: Start, how: str) -> None:
    """F5. One path goes, the other one goes on without a hole."""
    fleet = start((*PUBLIC, *MARKET), connections=BOTH)
    fleet.sim.fault(how, stream="bookTicker", **({"mode": "wire"} if how == "truncate" else {}))
    until(lambda: fleet.stats("conn.1")["counters"]["connections"] == 2, lambda: f"reconnected; {fleet.brief()}")
    fleet.wait_live()
    fleet.wait_more("trades", 20)
    fleet.wait_more("tickers", 5)
    proof = agrees(fleet)
    assert ("bbo", "reconnect") in proof.gaps
    assert {feed for feed, _ in proof.gaps} <= {"bbo", "orderbook_l2"}, str(proof)
    assert fleet.stats("conn.2")["counters"]["connections"] == 1


def test_missing_events_on_200_books_at_once(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """F3. All books break in the same moment; the snapshots are paced by weight, so the venue never has to say 429.

    200 snapshots of weight 2 are more than this exchange allows in ten seconds, and the budget is empty at the start.
    They lie on two connections, as 400 streams do not fit on one; the two share the budget.
    """
    tickers = ",".join(f"T{n:03d}USDT:1" for n in range(200))
    limits = ("--limit", "weight_max=360", "--limit", "weight_window_s=10", "--depth", "20")
    with Fleet(
        tmp_path, VENUE, tickers=["T*USDT"], sim_tickers=tickers, rate=4, sim=limits, book_depth=50,
        feeds=("trades", "orderbook_l2"), connections=BOTH,
    ) as fleet:  # fmt: skip
        limit, window_s = BinanceFutures.LIMITS.weight
        budget = Budget(fleet.rings / "_budgets" / f"{VENUE}-weight", limit * WEIGHT_SHARE, window_s)
        while not budget.take(1):
            continue
        fleet.start()
        until(lambda: fleet.stats().get("books") == 200, "200 books", 90)
        fleet.settle(90)
        while not budget.take(1):  # what has come together meanwhile would be more than this exchange allows at once
            continue
        began = time.monotonic()
        fleet.sim.fault("gap", stream="depth@100ms", rate=1, n=2, count=200)
        fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] == 200, 30)
        fleet.wait_counter("gap_orderbook_l2_sequence", 150)
        fleet.settle(90)
        record_property("resync_of_200_books_s", time.monotonic() - began)
        state = fleet.sim.state()
        assert state["paths"]["/fapi/v1/depth"] >= 350
        assert state["counts"].get("http_429", 0) == state["counts"].get("http_418", 0) == 0
        assert not state["violations"]
        agrees(fleet)


def test_bans_stale_and_early_snapshots_a_crossed_book_and_a_wrong_clock(start: Start) -> None:
    """F4, F12, F17, F19: not one request before its time, one hole for each loss, and what is odd is flagged."""
    fleet = start()
    hit = TICKERS[0]
    fleet.sim.fault("ban", seconds=2, status=429)
    fleet.sim.fault("drop", stream="depth@100ms", ticker=hit)
    until(lambda: fleet.sim.state()["http_429"] == 1, "one answer 429")
    until(lambda: fleet.stats().get("books_invalid") == [hit], lambda: f"the book is flagged; {fleet.brief()}")
    fleet.wait_more("trades", 5)
    fleet.settle()
    fleet.sim.fault("clock_skew", ms=-2000, seconds=2)
    fleet.sim.fault("stale_snapshot", ticker=hit, count=2)
    fleet.sim.fault("drop", stream="depth@100ms", ticker=hit)
    fleet.wait_counter("book_snapshot_stale", 2)
    fleet.settle()
    holes = fleet.counter("gap_orderbook_l2_sequence")
    fleet.sim.fault("future_snapshot", ticker=hit, ms=1500)
    fleet.sim.fault("drop", stream="depth@100ms", ticker=hit)
    fleet.wait_counter("gap_orderbook_l2_sequence", holes + 1)
    fleet.settle()
    fleet.sim.fault("cross", ticker=hit, ms=1200)
    fleet.wait_counter("book_crossed")
    fleet.wait_more("orderbook_l2", 200)
    assert fleet.counter("gap_orderbook_l2_sequence") == holes + 1, "no second hole behind the snapshot"
    assert fleet.sim.state()["requests_before_retry_after"] == 0
    agrees(fleet)
    flagged = {row["ticker"] for row in fleet.rows("orderbook_l2") if row["flags"] & 8}
    assert flagged == {hit}


def test_a_refused_stream_does_not_silence_its_batch(start: Start) -> None:
    """F13. The venue refuses the whole request because of one stream: it is halved until that one is alone."""
    fleet = start()
    fleet.refuse_one("bbo", TICKERS[1])
    assert fleet.counter("subscribe_bisected") >= 3
    proof = fleet.finish(to_the_end=False)
    assert proof.ok, str(proof)


def test_a_frozen_path_is_given_up_though_rest_still_answers(start: Start) -> None:
    """Open interest is polled all the while: it is no sign of life of the streams, and the hole begins before it."""
    fleet = start(MARKET, stale_s=8.0)  # three instruments are polled every five seconds
    fleet.wait_more("tickers", 12)  # so that streams brought most of them
    (connection,) = fleet.sim.state()["connections"]
    fleet.sim.fault("freeze", seconds=600, conn=connection["conn"])
    fleet.wait_counter("stale")
    fleet.wait_live()
    fleet.wait_more("tickers", 5)
    proof = agrees(fleet)
    assert ("tickers", "reconnect") in proof.gaps
    (frozen,) = (f["t"] for f in fleet.sim.ledger().faults if f["name"] == "freeze")
    holes = [g for g in fleet.rows("gaps") if g["feed"] == "tickers" and g["from_time"] < frozen < g["to_time"]]
    polled = [row["timestamp"] for row in fleet.rows("tickers") if row["open_interest"] == row["open_interest"]]
    assert any(hole["from_time"] < t < hole["to_time"] for t in polled for hole in holes), "REST answered in the hole"


def test_a_stream_that_is_acknowledged_and_never_comes_is_taken_anew(start: Start) -> None:
    """F1. No trade from the begin on, while REST shows some: the stream is asked for again, then the connection."""
    fleet = start(silent_s=1.0, sim=("--fault", "silence:stream=btcusdt@trade,at=0,seconds=9"))
    assert fleet.counter("stream_silent") >= 1
    assert fleet.counter("stream_recovered") == 1
    assert "silent btcusdt@trade" not in fleet.stats()["notes"]
    fleet.wait_more("trades", 40)
    agrees(fleet)
