"""Bybit as real processes: a connector and a writer against the simulated venue with faults, ended by the proof.

Trades have no counter here, so what a lost connection cost is fetched from the most recent trades, or recorded by time.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, until

from mdcollector.exchanges import venue_class
from tools.proof import Proof

TICKERS = {
    "spot": ("BTCUSDT", "ETHUSDT", "SOLUSDC"),
    "linear": ("BTCUSDT", "ETHPERP", "BTC-25DEC26"),
    "inverse": ("BTCUSD", "ETHUSD"),
    "option": ("BTC-25DEC26-90000-C-USDT", "BTC-25DEC26-90000-P-USDT", "ETH-25DEC26-3000-C-USDT"),
}
WITHIN_S = 60.0  # for what takes a reconnect or two on a busy machine
every_category = pytest.mark.parametrize("category", TICKERS)

Start = Callable[..., Fleet]


@pytest.fixture
def fleet_of(tmp_path: Path) -> Iterator[Start]:
    """A fleet that is not started yet; it is ended with the test."""
    with ExitStack() as stack:

        def make(category: str, **options: Any) -> Fleet:
            name, tickers = f"bybit_{category}", TICKERS[category]
            sim = {
                "sim_tickers": ",".join(f"{t}:1" for t in tickers),
                "feeds": venue_class(name).FEEDS,
                "tickers": tickers,
            }
            return stack.enter_context(Fleet(tmp_path / name, name, **{**sim, **options}))

        yield make


@pytest.fixture
def start(fleet_of: Start) -> Start:
    """A fleet that collects."""
    return lambda category, **options: fleet_of(category, **options).start()


def agrees(fleet: Fleet, **options: Any) -> Proof:
    proof = fleet.finish(**options)
    assert proof.ok, str(proof)
    assert all(proof.feeds[feed].rows for feed in fleet.feeds if feed != "candles"), str(proof)
    return proof


def trade_holes(proof: Proof) -> dict[str, int]:
    return {cause: count for (feed, cause), count in proof.gaps.items() if feed == "trades"}


# Missing, doubled and reordered messages


@every_category
def test_one_missing_book_event_resyncs_only_that_book(start: Start, category: str) -> None:
    """F2. Its topic is left and taken again; the others notice nothing."""
    fleet = start(category)
    hit, *others = fleet.tickers
    depth = venue_class(fleet.exchange).BOOK_DEPTH_DEFAULT  # type: ignore[attr-defined]
    fleet.sim.fault("drop", stream=f"orderbook.{depth}.", ticker=hit)
    fleet.wait_counter("gap_orderbook_l2_sequence")
    fleet.settle()
    fleet.wait_more("orderbook_l2", 20)
    agrees(fleet)
    gaps = [gap for gap in fleet.holes() if gap["feed"] == "orderbook_l2"]
    assert [gap["ticker"] for gap in gaps] == [hit]
    (fault,) = fleet.sim.ledger().faults
    assert gaps[0]["first_id"] <= fault["last"] <= gaps[0]["last_id"]
    snapshots = Counter(row["ticker"] for row in fleet.rows("orderbook_l2") if row["flags"] & 2 and row["flags"] & 1)
    assert snapshots == {hit: 2, **dict.fromkeys(others, 1)}
    assert not fleet.counters("refused_")


def test_duplicated_and_reordered_frames(start: Start) -> None:
    """F11. Trades are told apart by their ids, book messages by `u`."""
    fleet = start("linear", feeds=("trades", "orderbook_l2"))
    for name, streams in (("duplicate", ("publicTrade.", "orderbook.200.")), ("reorder", ("orderbook.200.",))):
        for stream in streams:
            fleet.sim.fault(name, stream=stream, every=0.3)
    fleet.sim.wait_state(lambda state: all(fault["fired"] >= 5 for fault in state["faults"]), 60)
    assert fleet.wait_counter("trade_duplicate", 5)
    proof = agrees(fleet)
    assert not trade_holes(proof)


def test_missing_events_on_200_books_at_once(fleet_of: Start, record_property: Callable[[str, object], None]) -> None:
    """F3. Ten topics a request: the venue gets 20 to leave and 20 to take them, and no limit of it is touched."""
    tickers = [f"T{n:03d}USDT" for n in range(200)]
    names = ",".join(f"{ticker}:1" for ticker in tickers)
    fleet = fleet_of("spot", tickers=["T*USDT"], sim_tickers=names, rate=2, feeds=("trades", "orderbook_l2")).start()
    until(lambda: fleet.stats().get("books") == 200, lambda: f"200 books; {fleet.brief()}", 120)
    fleet.settle(120)
    fleet.sim.pause()
    for ticker in tickers:
        fleet.sim.fault("gap", stream="orderbook.200.", ticker=ticker, n=2)
    began = time.monotonic()
    fleet.sim.resume()
    fleet.wait_counter("gap_orderbook_l2_sequence", 200)
    fleet.settle(120)
    record_property("resync_of_200_books_s", time.monotonic() - began)
    state = fleet.sim.state()
    assert not state["violations"]
    assert not [name for name in state["counts"] if name in ("http_429", "http_403")]
    assert fleet.counter("connections") == 1
    proof = fleet.finish(to_the_end=False)
    assert proof.ok, str(proof)


# What is subscribed


def test_a_delisted_symbol_does_not_silence_its_batch(fleet_of: Start) -> None:
    """F13. The venue refuses whole batches because of one symbol that it does not know: the others are recorded."""
    fleet = fleet_of("linear", sim=("--fault", "refuse:ticker=ETHPERP,rate=1"))
    fleet.writer, fleet.connector = fleet.write(), fleet.connect()
    topics = len(fleet.feeds)
    fleet.wait_counter("stream_refused", topics)
    until(lambda: fleet.stats().get("books") == 2, lambda: f"the two other books; {fleet.brief()}")
    fleet.wait_more("trades", 20)
    page = fleet.stats()
    refused = {name for name, proof in page["streams"].items() if proof["refused"]}
    assert {name for name in page["streams"] if name.endswith(".ETHPERP")} == refused
    assert all(proof["acknowledged_ns"] for name, proof in page["streams"].items() if name not in refused)
    assert page["counters"]["subscribe_bisected"] >= 2
    assert not fleet.counters("refused_")
    agrees(fleet)
    assert {row["ticker"] for row in fleet.rows("trades")} == {"BTCUSDT", "BTC-25DEC26"}


def test_options_refuse_topic_by_topic(fleet_of: Start) -> None:
    """F13. This category names what it does not know; nothing has to be halved."""
    gone = TICKERS["option"][1]
    fleet = fleet_of("option", sim=("--fault", f"refuse:ticker={gone},rate=1"))
    fleet.writer, fleet.connector = fleet.write(), fleet.connect()
    fleet.wait_counter("stream_refused", 2)
    fleet.wait_more("trades", 20)
    page = fleet.stats()
    assert {n for n, p in page["streams"].items() if p["refused"]} == {f"orderbook.100.{gone}", f"tickers.{gone}"}
    assert "subscribe_bisected" not in page["counters"]
    agrees(fleet)


def test_replies_that_come_long_behind_the_data(start: Start) -> None:
    fleet = start("linear", sim=("--limit", "reply_ms=1500"))
    until(lambda: all(p["acknowledged_ns"] for p in fleet.stats()["streams"].values()), "every reply")
    fleet.wait_more("trades", 20)
    assert not fleet.counters("refused_")
    assert not agrees(fleet).gaps


def test_instruments_are_read_page_by_page_and_a_depth_is_chosen(start: Start) -> None:
    fleet = start("linear", tickers=["BTC*"], sim=("--limit", "page_max=1"), book_depth=50)
    assert {name for name in fleet.stats()["streams"] if name.startswith("orderbook.") and ".1." not in name} == {
        "orderbook.50.BTCUSDT", "orderbook.50.BTC-25DEC26"}  # fmt: skip
    fleet.wait_more("orderbook_l2", 100)
    agrees(fleet, book_stream="orderbook.50")


def test_a_depth_that_is_not_offered_is_a_configuration_error(fleet_of: Start) -> None:
    fleet = fleet_of("inverse", book_depth=500)
    process = fleet.connect()
    assert process.wait(WITHIN_S) == 78
    assert "book_depth: 500 not offered by bybit_inverse; it has 50, 200, 1000" in fleet.logs[0].read_text()


# The life of a connection


@pytest.mark.parametrize(("category", "how"), [("linear", "disconnect"), ("spot", "close"), ("option", "truncate")])
def test_a_lost_connection_costs_no_trade(start: Start, category: str, how: str) -> None:
    """F18. The most recent trades reach back over the hole: what was missed is there once, flagged REPAIRED."""
    fleet = start(category, rate=100)
    fleet.sim.fault(how, **({"mode": "wire"} if how == "truncate" else {}))
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 20)
    proof = agrees(fleet)
    assert ("tickers", "reconnect") in proof.gaps
    assert not trade_holes(proof), str(proof)
    assert proof.feeds["trades"].explained == 0


def test_what_the_venue_no_longer_gives_stays_in_the_ledger(start: Start) -> None:
    """Spot gives 60 trades at most: a longer hole is filled as far as they reach, and recorded by time."""
    fleet = start("spot", rate=400, stale_s=1.5, feeds=("trades", "orderbook_l2"))
    fleet.sim.fault("freeze", seconds=30)
    fleet.wait_counter("stale")
    fleet.wait_live()
    fleet.wait_counter("trade_repair_incomplete")
    fleet.wait_more("trades", 40)
    proof = agrees(fleet)
    assert proof.feeds["trades"].repaired > 0
    assert proof.feeds["trades"].explained > 0
    assert trade_holes(proof)["reconnect"] >= 1


@pytest.mark.parametrize("category", ["linear", "spot"])
def test_rollover_loses_and_doubles_no_row_in_any_feed(start: Start, category: str) -> None:
    """F5. Two gateways stamp the same message with another `ts`; merged tickers go on without a break."""
    fleet = start(category, lifetime_s=3.0, rate=100)
    fleet.wait_counter("rollovers", 2)
    until(lambda: fleet.stats().get("state") == "connected", "the second rollover is done", WITHIN_S)
    fleet.wait_more("trades", 40)
    proof = agrees(fleet)
    assert not proof.gaps, str(proof)
    assert all(counts.explained == 0 for counts in proof.feeds.values()), str(proof)
    assert fleet.counter("overlap_duplicate") > 0
    assert fleet.counter("overlap_overflow") == 0


def test_a_storm_of_disconnects(start: Start) -> None:
    fleet = start("linear")
    fleet.sim.fault("disconnect", every=0.4, count=6)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] == 6, 60)
    fleet.wait_live()
    assert fleet.sim.state()["counts"]["connects"] == fleet.counter("connections") <= 1 + 6 + 2
    fleet.wait_more("trades", 40)
    proof = agrees(fleet)
    assert not trade_holes(proof), str(proof)


def test_pongs_do_not_count_as_data(start: Start) -> None:
    """F1. All topics go silent; that the venue still answers is no reason to stay."""
    fleet = start("linear", stale_s=2.0)
    fleet.sim.fault("silence", seconds=3)
    fleet.wait_counter("stale")
    assert fleet.counter("disconnected") == 0
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    assert not trade_holes(agrees(fleet))


def test_a_killed_connector_goes_on_where_it_was(start: Start) -> None:
    """Ids that the ring still has are not published again; what was missed meanwhile is fetched."""
    fleet = start("linear", rate=100)
    fleet.wait_more("trades", 40)
    fleet.connector.send_signal(signal.SIGKILL)
    fleet.connector.wait(WITHIN_S)
    state = fleet.sim.state()["ledger"]["trade"]
    until(
        lambda: sum(fleet.sim.state()["ledger"]["trade"].values()) > sum(state.values()) + 30, "trades while it is dead"
    )
    fleet.connector = fleet.connect()
    fleet.wait_live()
    until(fleet.trades_are_proven, lambda: f"proven; {fleet.brief()}")
    proof = agrees(fleet)
    assert not trade_holes(proof), str(proof)
    assert proof.feeds["trades"].repaired >= 20
    assert {gap["cause"] for gap in fleet.rows("gaps") if gap["feed"] == "trades"} <= {"restart", "filled"}


@pytest.mark.parametrize("stream", ["publicTrade.BTCUSDT", "orderbook.200.BTCUSDT", "tickers.BTCUSDT"])
def test_a_stream_that_is_acknowledged_and_silent(start: Start, stream: str) -> None:
    """F1. The newest trade tells that it should have brought something: it is left and taken anew, the others go on."""
    fleet = start("linear", silent_s=1.5, stale_s=60.0)
    fleet.sim.fault("silence", stream=stream, seconds=7)
    until(lambda: fleet.counter("stream_silent"), lambda: f"found silent; {fleet.brief()}", WITHIN_S)
    until(lambda: fleet.counter("stream_recovered"), lambda: f"recovered; {fleet.brief()}", WITHIN_S)
    fleet.settle()
    fleet.wait_more("trades", 40)
    fleet.wait_more("tickers", 20)
    proof = agrees(fleet)
    assert fleet.counter("connections") <= 2
    assert not trade_holes(proof), str(proof)


def test_a_ticker_delta_that_cannot_be_read_is_a_hole_until_the_next_snapshot(start: Start) -> None:
    """What it changed would be wrong until it changes again."""
    fleet = start("linear")
    fleet.sim.fault("truncate", stream="tickers.BTCUSDT", every=3, count=3)  # the snapshots between them come whole
    fleet.wait_counter("gap_tickers_refused", 3)
    fleet.wait_more("tickers", 30)
    proof = agrees(fleet)
    assert proof.gaps[("tickers", "refused")] == 3
    assert proof.feeds["tickers"].explained >= 3


# Books


def test_a_snapshot_that_nobody_asked_for_replaces_the_book(start: Start) -> None:
    """F7. It says what the book is already."""
    fleet = start("linear")
    for ticker in fleet.tickers:
        fleet.sim.fault("snapshot", ticker=ticker)
    fleet.sim.wait_state(lambda state: all(fault["fired"] for fault in state["faults"]))
    fleet.wait_more("orderbook_l2", 300)
    proof = agrees(fleet)
    assert not proof.gaps
    resynced = {row["ticker"] for row in fleet.rows("orderbook_l2") if row["flags"] & 4}
    assert resynced == set(fleet.tickers)


def test_u_1_begins_a_book_anew(start: Start) -> None:
    """F7. The venue restarted: the numbers of one book begin again, what it holds is true all the time."""
    fleet = start("spot", feeds=("trades", "orderbook_l2"))
    hit = fleet.tickers[0]
    fleet.sim.fault("snapshot", ticker=hit, anew=1)
    fleet.wait_counter("gap_orderbook_l2_snapshot")
    fleet.wait_more("orderbook_l2", 100)
    fleet.finish()  # its numbers go back, so the proof cannot follow this one book: what it came to is compared here
    rows = [row for row in fleet.rows("orderbook_l2") if row["ticker"] == hit]
    book: dict[int, dict[float, float]] = {}
    inside = False
    for row in rows:
        if row["flags"] & 2 and not inside:
            book = {1: {}, -1: {}}
        inside = bool(row["flags"] & 2) and not row["flags"] & 1
        book[row["side"]][row["price"]] = row["qty"]
    u, sides = fleet.sim.ledger().final_book(hit)
    assert rows[-1]["update_id"] == u < 10_000
    for side, levels in zip((1, -1), sides, strict=True):
        assert {p: q for p, q in book[side].items() if q} == {float(p): float(q) for p, q in levels.items()}
    assert [(g["ticker"], g["cause"]) for g in fleet.rows("gaps") if g["feed"] == "orderbook_l2"] == [(hit, "snapshot")]


def test_a_crossed_book_is_flagged_while_it_is_crossed(start: Start) -> None:
    """F19."""
    fleet = start("linear")
    fleet.sim.fault("cross", ticker=fleet.tickers[0], ms=1200)
    fleet.wait_counter("book_crossed")
    fleet.wait_more("orderbook_l2", 200)
    assert not agrees(fleet).gaps
    flagged = {row["ticker"] for row in fleet.rows("orderbook_l2") if row["flags"] & 8}
    assert flagged == {fleet.tickers[0]}


# Frames that are no good


@pytest.mark.parametrize(("category", "mode"), [("option", "fragments"), ("spot", "tcp")])
def test_split_frames_are_put_together(start: Start, category: str, mode: str) -> None:
    """F16."""
    fleet = start(category)
    fleet.sim.fault("split", mode=mode, parts=4, rate=0.3)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] >= 60, 60)
    assert not agrees(fleet).gaps
    assert not fleet.counters("refused_")


def test_garbage_is_counted_by_reason_and_the_connection_stays(start: Start) -> None:
    """F16. A frame of trades that cannot be read is a doubt; the most recent trades show that nothing was lost."""
    fleet = start("linear", rate=100)
    count = 6 * 7  # each kind in turn
    fleet.sim.fault("garbage", every=0.05, count=count)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] == count, 60)
    until(lambda: sum(fleet.counters("refused_").values()) >= count, lambda: f"counted; {fleet.brief()}")
    refused = fleet.counters("refused_")
    assert len(refused) >= 4, refused
    assert sum(refused.values()) == count, refused
    assert fleet.counter("connections") == 1
    assert not trade_holes(agrees(fleet))


def test_truncated_trades_are_fetched(start: Start) -> None:
    """F16. Half a message: no counter tells what was in it, so the most recent trades are asked for at once."""
    fleet = start("linear", feeds=("trades", "orderbook_l2"), rate=100)
    fleet.sim.fault("truncate", every=0.4, count=6, stream="publicTrade.")
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] == 6, 60)
    until(lambda: sum(fleet.counters("refused_").values()) >= 6, lambda: f"six refused frames; {fleet.brief()}")
    fleet.wait_more("trades", 40)
    until(fleet.trades_are_proven, lambda: f"proven; {fleet.brief()}")
    proof = agrees(fleet)
    assert not trade_holes(proof), str(proof)
    assert proof.feeds["trades"].repaired >= 6
    assert fleet.counter("connections") == 1


@pytest.mark.parametrize("ms", [-2000, 2000])
def test_the_exchange_clock_is_wrong(start: Start, ms: int) -> None:
    """F17. Event times step; order and ids do not depend on them."""
    fleet = start("linear", feeds=("trades", "orderbook_l2", "bbo"))
    fleet.sim.fault("clock_skew", ms=ms, seconds=2)
    fleet.wait_more("trades", 60)
    fleet.wait_more("orderbook_l2", 200)
    agrees(fleet)
    rows = fleet.rows("trades")
    assert any(abs(row["rcv_timestamp"] - row["timestamp"] - -1000 * ms) < 900_000 for row in rows), "the skew shows"


# Limits


def test_403_stops_all_requests_for_ten_minutes(start: Start) -> None:
    """F4. "access too frequent" comes without a Retry-After; what comes over the socket is still collected."""
    fleet = start("linear", clock_s=3600.0)
    until(lambda: fleet.stats()["clock"].get("source"), "the venue was asked for its time")
    before = fleet.counter("http_requests")
    fleet.sim.fault("ban", seconds=600, status=403)
    fleet.sim.fault("disconnect")
    fleet.wait_counter("http_rate_limited")
    page = fleet.stats()
    assert 540 < (page["fetch_blocked_until_ns"] - time.time_ns()) / 1e9 <= 600
    fleet.wait_live()
    fleet.wait_counter("gap_trades_reconnect", len(fleet.tickers))
    assert fleet.sim.state()["counts"]["http_403"] == 1
    assert fleet.counter("http_requests") == before + 1
    assert fleet.counter("http_rate_limited") == 1
    fleet.sim.stop()
    fleet.stop(fleet.connector, fleet.writer)
    proof = fleet.prove()
    assert proof.ok, str(proof)
    assert trade_holes(proof)["reconnect"] == len(fleet.tickers)


def test_too_many_visits_in_the_body_of_an_answer(start: Start) -> None:
    """retCode 10006 with status 200: wait, and ask again."""
    fleet = start("linear", sim=("--limit", "visits_max=2", "--limit", "visits_window_s=3"))
    fleet.sim.fault("disconnect")
    fleet.wait_counter("http_rate_limited")
    fleet.wait_live()
    until(fleet.trades_are_proven, lambda: f"proven in the end; {fleet.brief()}", WITHIN_S)
    proof = agrees(fleet)
    assert not trade_holes(proof), str(proof)
    assert not fleet.sim.summary["violations"]


@pytest.mark.parametrize("code", [10016, 10429])
def test_a_venue_that_has_no_time_is_left_alone_for_a_while(start: Start, code: int) -> None:
    """F4. Server error and system protection come with status 200: one request, a pause, then the hole is repaired."""
    fleet = start("linear", clock_s=3600.0)
    until(lambda: fleet.stats()["clock"].get("source"), "the venue was asked for its time")
    before = fleet.counter("http_requests")
    fleet.sim.fault("ban", seconds=8, status=code)
    fleet.sim.fault("disconnect")
    fleet.wait_counter("http_rate_limited")
    fleet.wait_live()
    until(fleet.trades_are_proven, lambda: f"proven in the end; {fleet.brief()}", WITHIN_S)
    assert fleet.counters("refused_") == {}
    assert fleet.counter("trade_repair_refused") == 0
    assert fleet.counter("http_rate_limited") == 1, "nobody asked again before the venue had time"
    assert fleet.counter("http_requests") - before >= 1 + len(fleet.tickers)
    proof = agrees(fleet)
    assert not trade_holes(proof), str(proof)


def test_a_stopped_process_is_pinged_again(start: Start) -> None:
    """The venue ends a connection that is silent too long; the process stood still, then it goes on."""
    fleet = start("inverse", sim=("--limit", "ping_within_s=24"), feeds=("trades", "orderbook_l2"))
    os.kill(fleet.connector.pid, signal.SIGSTOP)
    try:
        fleet.sim.wait_state(lambda state: state["violations"].get("no_ping"), 60)
        fleet.sim.wait_state(lambda state: not state["connections"], 60)
    finally:
        os.kill(fleet.connector.pid, signal.SIGCONT)
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 20)
    agrees(fleet)
