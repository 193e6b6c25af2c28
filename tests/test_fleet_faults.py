"""A connector and a writer as real processes against an exchange with faults: whatever happens, ledger and tables agree."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fleet import BOOK_STREAMS, NUMBERED_CONNECTIONS, TICKERS, TRADE_STREAMS, Fleet, until

from mdcollector.budget import Budget
from mdcollector.connector import WEIGHT_SHARE
from mdcollector.exchanges.binance import BinanceSpot
from mdcollector.exchanges.deribit import Deribit
from mdcollector.records import Flag

EXCHANGES = tuple(TICKERS)
BOOKS_OVER_HTTP = ("binance_spot",)  # whose books begin over HTTP; the others have their snapshots on the socket
SHORT_GREETING = {"coinbase": ("--limit", "greeting_trades=1")}  # where what is missed comes with a greeting, too
both_venues = pytest.mark.parametrize("exchange", EXCHANGES)
# Where each instrument has a number of its own. Venues that number the connection have tests of their own for these.
own_numbers = pytest.mark.parametrize("exchange", [e for e in EXCHANGES if e not in NUMBERED_CONNECTIONS])

Start = Callable[..., Fleet]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a fleet that collects; it is ended with the test."""
    with ExitStack() as stack:

        def make(exchange: str, **options: Any) -> Fleet:
            return stack.enter_context(Fleet(tmp_path / exchange, exchange, **options)).start()

        yield make


def agrees(fleet: Fleet, **options: Any) -> None:
    proof = fleet.finish(**options)
    assert proof.ok, str(proof)


# Missing, doubled and reordered messages


@own_numbers
def test_one_missing_book_event_resyncs_only_that_book(start: Start, exchange: str) -> None:
    fleet = start(exchange)
    hit, *others = fleet.tickers
    fleet.sim.fault("drop", stream=BOOK_STREAMS[exchange], ticker=hit)
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


def test_a_fleet_that_stops_while_a_book_is_broken(start: Start) -> None:
    """No snapshot is to be had, and then the end: what came behind the hole is stored, and said to be in no book.

    Among what is held one more event is missing, and two change places.
    """
    fleet = start("binance_spot")
    hit = fleet.tickers[0]

    def held_behind_a_fault(name: str) -> None:
        """Let a fault hit the book, and wait until two events behind it have reached the connector."""
        fleet.sim.fault(name, stream=BOOK_STREAMS["binance_spot"], ticker=hit)
        nth = len(fleet.sim.state()["faults"]) - 1
        fleet.sim.wait_state(lambda state: state["faults"][nth]["fired"] == 1, 30)
        before = len(fleet.sim.ledger().book_events(hit))
        event = until(lambda: fleet.sim.ledger().book_events(hit)[before + 2 :], f"two events behind {name}")[0]
        # Best prices come on the same connection, each when it changes: one with a higher id was sent later.
        until(lambda: fleet.best_id(hit) > event["last"], lambda: f"best prices behind {event}; {fleet.brief()}")

    fleet.sim.fault("ban", seconds=600, status=418)
    for name in ("drop", "drop", "reorder"):
        held_behind_a_fault(name)
    assert fleet.stats()["books_invalid"] == [hit]
    fleet.stop(fleet.connector, fleet.writer)
    assert fleet.connector.returncode == fleet.writer.returncode == 0, fleet.tail()
    proof = fleet.prove()
    assert proof.ok, str(proof)
    faults = [fault for fault in fleet.sim.ledger().faults if fault["name"] == "drop"]
    gaps = [gap for gap in fleet.rows("gaps") if gap["feed"] == "orderbook_l2"]
    assert [(gap["ticker"], gap["repaired"]) for gap in gaps] == [(hit, False)] * 2, "one for each missing event"
    assert all(gap["first_id"] <= fault["last"] <= gap["last_id"] for gap, fault in zip(gaps, faults, strict=True))
    unproven = [row for row in fleet.rows("orderbook_l2") if row["flags"] & Flag.UNPROVEN]
    assert {row["ticker"] for row in unproven} == {hit}
    assert len({row["update_id"] for row in unproven}) >= 6


@both_venues
def test_missing_trades_are_fetched_and_stand_in_the_table_once(start: Start, exchange: str) -> None:
    fleet = start(exchange)
    for ticker in fleet.tickers:
        fleet.sim.fault("gap", stream=TRADE_STREAMS[exchange], ticker=ticker, n=4)
    for filled in (3, 4, 5):
        fleet.wait_counter("gap_trades_filled_repaired", filled)
        fleet.sim.fault("drop", stream=TRADE_STREAMS[exchange])
    lost = len(fleet.tickers) * 4 + 3  # else a rare ticker loses the last of its four when nothing follows any more
    fleet.sim.wait_state(lambda state: sum(state["ledger"]["fault"].values()) >= lost, 60)
    fleet.wait_counter("gap_trades_filled_repaired", 6)
    agrees(fleet)
    proof = fleet.prove()
    assert proof.feeds["trades"].repaired >= 3 * 4 + 3
    assert proof.feeds["trades"].explained == 0
    assert not [cause for feed, cause in proof.gaps if feed == "trades"], "every hole in the trades is repaired"


@own_numbers
def test_duplicated_and_reordered_frames(start: Start, exchange: str) -> None:
    """F11. Feeds with ids come out exactly once and in order; a doubled frame of the others is what was sent."""
    fleet = start(exchange, feeds=("trades", "orderbook_l2"))
    for name in ("duplicate", "reorder"):
        for stream in (TRADE_STREAMS[exchange], BOOK_STREAMS[exchange]):
            fleet.sim.fault(name, stream=stream, every=0.3)
    fleet.sim.wait_state(lambda state: all(fault["fired"] >= 5 for fault in state["faults"]), 30)
    agrees(fleet)
    proof = fleet.prove()
    assert not [cause for feed, cause in proof.gaps if feed == "trades"], str(proof)


def test_missing_events_on_200_books_at_once(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """F3. All books break in the same moment; the snapshots are paced by weight, so the venue never has to say 429.

    200 snapshots of weight 5 are more than this exchange allows in three seconds. The budget is empty both times, so
    what it allows is far below that, also if much of a slow machine's time passes before the first request.
    """
    tickers = [f"T{n:03d}USDT" for n in range(200)]
    limits = ("--limit", "weight_max=900", "--limit", "weight_window_s=3")
    with Fleet(
        tmp_path, "binance_spot", tickers=["T*USDT"], sim_tickers=",".join(f"{t}:1" for t in tickers), rate=4,
        sim=limits, book_depth=100, feeds=("trades", "orderbook_l2"),
    ) as fleet:  # fmt: skip
        limit, per_s = BinanceSpot.LIMITS.weight
        budget = Budget(fleet.rings / "_budgets" / "binance_spot-weight", limit * WEIGHT_SHARE, per_s)
        assert budget.take(limit) == 0
        fleet.start()
        until(lambda: fleet.stats().get("books") == 200, "200 books", 60)
        fleet.settle(60)
        fleet.sim.pause()
        for ticker in tickers:
            fleet.sim.fault("gap", stream="depth@100ms", ticker=ticker, n=2)
        while budget.take(1) == 0:
            pass
        began = time.monotonic()
        fleet.sim.resume()
        fleet.wait_counter("gap_orderbook_l2_sequence", 200)
        fleet.settle(60)
        record_property("resync_of_200_books_s", time.monotonic() - began)
        state = fleet.sim.state()
        assert all(fault["fired"] == 1 for fault in state["faults"])
        assert fleet.counter("gap_orderbook_l2_sequence") == 200
        assert state["paths"]["/api/v3/depth"] >= 400
        assert state["counts"].get("http_429", 0) == state["counts"].get("http_418", 0) == 0
        assert not state["violations"]
        agrees(fleet)


# Limits


def test_429_then_418_with_retry_after(start: Start) -> None:
    """F4. (403 is what the venue's firewall says for too many requests.) Not one request before the time; what comes over the socket is still collected, books say that they are invalid."""
    fleet = start("binance_spot")
    hit = fleet.tickers[0]
    for status in (429, 418, 403):
        fleet.sim.fault("ban", seconds=2, status=status)
        fleet.sim.fault("drop", stream="depth@100ms", ticker=hit)
        until(lambda status=status: fleet.sim.state()["counts"].get(f"http_{status}") == 1, f"one answer {status}")
        until(
            lambda: fleet.stats().get("books_invalid") == [hit],
            lambda: f"the book of {hit} is flagged; {fleet.brief()}",
        )
        fleet.wait_more("trades", 5)
        fleet.settle()
    state = fleet.sim.state()
    assert state["requests_before_retry_after"] == 0
    assert [state["counts"][f"http_{status}"] for status in (429, 418, 403)] == [1, 1, 1]
    assert fleet.counter("stream_refused") == 0
    fleet.wait_more("orderbook_l2", 5)
    agrees(fleet)


@pytest.mark.parametrize("exchange", [exchange for exchange in EXCHANGES if exchange not in BOOKS_OVER_HTTP])
def test_429_and_418_where_books_come_over_the_socket(start: Start, exchange: str) -> None:
    """F4. Not one request before the time, then the missing trades are fetched. Until then the socket is collected, and a
    book that breaks meanwhile is told and comes back by it; after a ban that does not end the hole stands in `gaps`.
    """
    fleet = start(exchange, sim=SHORT_GREETING.get(exchange, ()), rate=150)
    hit = fleet.tickers[0]
    fleet.sim.fault("ban", seconds=2, status=429)
    fleet.sim.fault("gap", stream=TRADE_STREAMS[exchange], ticker=hit, n=6)
    until(lambda: fleet.sim.state()["http_429"] == 1, lambda: f"one answer 429; {fleet.brief()}")
    fleet.wait_more("trades", 5)
    fleet.wait_counter("gap_trades_filled_repaired")
    fleet.settle()
    fleet.sim.fault("ban", seconds=600, status=418)
    fleet.sim.fault("gap", stream=TRADE_STREAMS[exchange], ticker=hit, n=6)
    until(lambda: fleet.sim.state()["http_418"] == 1, lambda: f"one answer 418; {fleet.brief()}")
    books_lost = fleet.counter("gap_orderbook_l2_sequence")
    fleet.sim.fault("drop", stream=BOOK_STREAMS[exchange], ticker=hit)
    fleet.wait_counter("gap_orderbook_l2_sequence", books_lost + 1)
    until(lambda: not fleet.stats()["books_invalid_count"], lambda: f"the book is live again; {fleet.brief()}")
    page = fleet.stats()
    assert page["fetch_blocked_until_ns"] > page["data_ns"]
    assert page["fetches_waiting"]
    fleet.wait_more("trades", 20)
    fleet.wait_more("orderbook_l2", 20)
    state = fleet.sim.state()
    assert state["requests_before_retry_after"] == 0
    assert (state["http_429"], state["http_418"]) == (1, 1)
    assert not state["violations"]
    fleet.stop(fleet.connector, fleet.writer)
    proof = fleet.prove()
    assert proof.ok, str(proof)
    assert proof.feeds["trades"].repaired >= 6
    gaps = [gap for gap in fleet.rows("gaps") if gap["ticker"] == hit]
    assert {gap["repaired"] for gap in gaps if gap["feed"] == "trades"} == {True, False}
    assert [gap for gap in gaps if gap["feed"] == "orderbook_l2"]


def test_a_start_during_a_ban_asks_for_nothing(tmp_path: Path) -> None:
    """F4. Another process of the machine was told to wait: whoever begins meanwhile collects, and sends no request."""
    with Fleet(tmp_path, "deribit") as fleet:
        limit, per_s = Deribit.LIMITS.weight
        Budget(fleet.rings / "_budgets" / "deribit-weight", limit * WEIGHT_SHARE, per_s).block(600)
        fleet.start()
        fleet.wait_more("trades", 20)
        assert fleet.sim.state()["counts"].get("requests", 0) == 0
        assert "not asked: blocked for another" in fleet.tail()
        fleet.stop(fleet.connector, fleet.writer)


def test_a_refused_handshake_is_not_repeated_before_retry_after(start: Start) -> None:
    """The venue lets nobody in for a while: attempts stop for as long as it says."""
    fleet = start("binance_spot", sim=("--limit", "connects_max=2", "--limit", "connects_window_s=2"))
    for _ in range(3):
        before = fleet.counter("connections")
        fleet.sim.fault("disconnect")
        until(lambda before=before: fleet.counter("connections") > before, lambda: f"reconnected; {fleet.brief()}")
        fleet.wait_live()
    counts = fleet.sim.state()["counts"]
    assert counts.get("connects_refused", 0) <= 3
    assert counts.get("connects_before_retry_after", 0) == 0
    agrees(fleet)


# The life of a connection


@own_numbers
def test_rollover_loses_and_doubles_no_row_in_any_feed(start: Start, exchange: str) -> None:
    """F5. The connection is replaced while it works: make before break, with every feed."""
    fleet = start(exchange, lifetime_s=3.0, rate=150)
    fleet.wait_counter("rollovers", 2)
    until(lambda: fleet.stats().get("state") == "connected", "the second rollover is done")
    fleet.wait_more("trades", 40)
    agrees(fleet)
    proof = fleet.prove()
    assert not proof.gaps, str(proof)
    assert all(counts.explained == 0 for counts in proof.feeds.values()), str(proof)
    assert fleet.counter("overlap_duplicate") > 0
    assert fleet.counter("overlap_overflow") == 0


def test_server_shutdown_notice_is_followed_in_time(start: Start) -> None:
    """F5. The venue says that it goes; the next connection is open before it does."""
    fleet = start("binance_spot", rate=150)
    fleet.sim.fault("shutdown", after_s=6)
    fleet.wait_counter("rollovers")
    until(lambda: len(fleet.sim.state()["connections"]) == 2, "two connections side by side")
    until(
        lambda: fleet.stats().get("state") == "connected" and len(fleet.sim.state()["connections"]) == 1, "one is left"
    )
    fleet.wait_more("trades", 40)
    assert fleet.counter("disconnected") == 0
    agrees(fleet)
    assert not fleet.prove().gaps


def test_a_rollover_that_cannot_connect_keeps_the_old_connection(start: Start) -> None:
    """The replacement is refused at first; nothing is given up for it."""
    fleet = start("binance_spot", sim=("--limit", "connects_max=1", "--limit", "connects_window_s=4"))
    fleet.sim.fault("shutdown", after_s=20)
    fleet.wait_counter("rollover_failed")
    fleet.wait_more("trades", 10)
    until(
        lambda: fleet.counter("connections") == 2 and fleet.stats().get("state") == "connected", "replaced in the end"
    )
    assert fleet.sim.state()["counts"].get("connects_before_retry_after", 0) == 0
    agrees(fleet)
    assert not fleet.prove().gaps


@both_venues
@pytest.mark.parametrize("how", ["disconnect", "close", "lifetime", "truncate"])
def test_a_lost_connection_is_a_recorded_hole(start: Start, exchange: str, how: str) -> None:
    fleet = start(exchange)
    if how == "truncate":
        fleet.sim.fault("truncate", mode="wire")
    else:
        fleet.sim.fault(how)
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 20)
    fleet.wait_more("tickers", 5)
    agrees(fleet)
    proof = fleet.prove()
    assert ("bbo", "reconnect") in proof.gaps
    assert not [cause for feed, cause in proof.gaps if feed == "trades"], str(proof)


@both_venues
def test_a_storm_of_disconnects(start: Start, exchange: str) -> None:
    """Attempts are spread and bounded; when it is over everything is accounted for."""
    fleet = start(exchange)
    fleet.sim.fault("disconnect", every=0.4, count=10)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] == 10, 30)
    fleet.wait_live()
    attempts = fleet.sim.state()["counts"]["connects"]
    assert attempts <= 1 + 10 + 2, "at most one attempt for each disconnect"
    assert attempts == fleet.counter("connections")
    fleet.wait_more("trades", 40)
    agrees(fleet)


def test_attempts_are_few_while_nobody_listens(start: Start) -> None:
    """Back-off: without an exchange the number of attempts grows with the logarithm of time until the cap."""
    fleet = start("binance_spot", reconnect_most_s=60.0)
    fleet.sim.kill()
    fleet.wait_counter("disconnected", 4)
    assert "Connect" in fleet.stats()["last_error"] or "refused" in fleet.stats()["last_error"]
    fleet.stop(fleet.connector)
    assert fleet.connector.returncode == 0, "SIGTERM ends a connector that waits for its next attempt"


@both_venues
def test_a_frozen_connection_is_given_up(start: Start, exchange: str) -> None:
    """Open, but silent: no row for stale_s, then a new connection."""
    fleet = start(exchange, stale_s=1.5)
    fleet.sim.fault("freeze", seconds=30)
    fleet.wait_counter("stale")
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    agrees(fleet)
    assert ("bbo", "reconnect") in fleet.prove().gaps


@both_venues
def test_heartbeats_do_not_count_as_data(start: Start, exchange: str) -> None:
    """All streams go silent but the venue's heartbeats come on: the connection is given up all the same.

    (A binance ping comes each half second; on Deribit and Coinbase heartbeats come each 0.3 s; OKX sends none.)
    """
    limits = {
        "binance_spot": "ping_every_s=0.5", "deribit": "heartbeat_scale=0.02", "okx": "silent_s=30",
        "coinbase": "heartbeat_s=0.3",
    }  # fmt: skip
    limit = limits[exchange]
    fleet = start(exchange, stale_s=2.0, sim=("--limit", limit))
    fleet.sim.fault("silence", seconds=3)
    fleet.wait_counter("stale")
    assert fleet.counter("disconnected") == 0
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    agrees(fleet)


@own_numbers
def test_refused_subscription_leaves_the_others_alone(start: Start, exchange: str) -> None:
    """F13. One stream is refused for good, with its whole request where the venue does that: all others are recorded."""
    fleet = start(exchange)
    fleet.refuse_one("bbo", fleet.tickers[1])
    agrees(fleet, to_the_end=False)


# Snapshots


def test_a_snapshot_older_than_the_buffer_is_fetched_again(start: Start) -> None:
    """F12."""
    fleet = start("binance_spot")
    fleet.wait_more("orderbook_l2", 100)
    hit = fleet.tickers[0]
    fleet.sim.fault("stale_snapshot", ticker=hit, count=2)
    fleet.sim.fault("drop", stream="depth@100ms", ticker=hit)
    fleet.wait_counter("book_snapshot_stale", 2)
    fleet.settle()
    fleet.wait_more("orderbook_l2", 20)
    agrees(fleet)


def test_a_snapshot_newer_than_everything_is_waited_for(start: Start) -> None:
    """F12. The streams lag behind the snapshot: what comes late is older and dropped, then the book goes on."""
    fleet = start("binance_spot")
    hit = fleet.tickers[0]
    fleet.sim.fault("future_snapshot", ticker=hit, ms=1500)
    fleet.sim.fault("drop", stream="depth@100ms", ticker=hit)
    fleet.wait_counter("gap_orderbook_l2_sequence")
    fleet.settle()
    fleet.wait_more("orderbook_l2", 20)
    agrees(fleet)
    assert fleet.counter("gap_orderbook_l2_sequence") == 1, "one hole, no second one behind the snapshot"


def test_slow_and_failing_rest(start: Start) -> None:
    fleet = start("binance_spot")
    for name, keys in (("slow_rest", {"ms": 1500}), ("rest_error", {"status": 503}), ("rest_error", {"status": 500})):
        fleet.sim.fault(name, stream="/api/v3/", **keys)
    fleet.sim.fault("drop", stream="depth@100ms")
    fleet.sim.fault("drop", stream="@trade")
    fleet.wait_counter("gap_orderbook_l2_sequence")
    fleet.wait_counter("gap_trades_sequence")
    fleet.wait_more("trades", 10)
    fleet.settle()
    agrees(fleet)
    assert fleet.prove().feeds["trades"].explained == 0


# Frames that are no good


@both_venues
@pytest.mark.parametrize("mode", ["fragments", "tcp"])
def test_split_frames_are_put_together(start: Start, exchange: str, mode: str) -> None:
    """F16."""
    fleet = start(exchange)
    fleet.sim.fault("split", mode=mode, parts=4, rate=0.3)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] >= 100)
    agrees(fleet)
    assert not fleet.prove().gaps
    assert not fleet.counters("refused_")


@both_venues
def test_garbage_is_counted_by_reason_and_the_connection_stays(start: Start, exchange: str) -> None:
    """F16. Binary nonsense, invalid UTF-8, wrong types, NaN, absurd numbers, unknown symbols and events."""
    fleet = start(exchange, rate=100)
    count = 10 * 7  # each kind in turn
    fleet.sim.fault("garbage", every=0.05, count=count)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] == count, 30)
    refused = until(
        lambda: sum((r := fleet.counters("refused_")).values()) >= count and r, lambda: f"counted; {fleet.brief()}"
    )
    assert len(refused) >= 4, refused
    assert sum(refused.values()) == count, refused
    assert set(refused) <= set(fleet.stats()["samples"])
    assert fleet.counter("connections") == 1
    agrees(fleet)


@both_venues
def test_truncated_json_is_a_counted_loss(start: Start, exchange: str) -> None:
    """F16. Half a message: refused, and what it would have brought is found missing and repaired or recorded."""
    fleet = start(exchange, feeds=("trades", "orderbook_l2"))
    fleet.sim.fault("truncate", every=0.3, count=6)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] == 6)
    until(lambda: sum(fleet.counters("refused_").values()) >= 6, lambda: f"six refused frames; {fleet.brief()}")
    assert fleet.counter("connections") == 1
    fleet.wait_more("trades", 40)
    agrees(fleet)
    assert fleet.prove().feeds["trades"].explained == 0


# Markets that look odd


@both_venues
def test_a_crossed_book_is_flagged_while_it_is_crossed(start: Start, exchange: str) -> None:
    """F19. Best bid at or above best ask: published as invalid; it heals by itself, so no resync."""
    fleet = start(exchange)
    fleet.sim.fault("cross", ticker=fleet.tickers[0], ms=1200)
    fleet.wait_counter("book_crossed")
    fleet.wait_more("orderbook_l2", 200)
    agrees(fleet)
    flagged = [row for row in fleet.rows("orderbook_l2") if row["flags"] & 8]
    assert flagged
    assert {row["ticker"] for row in flagged} == {fleet.tickers[0]}
    assert not fleet.prove().gaps


@both_venues
@pytest.mark.parametrize("ms", [-2000, 2000])
def test_the_exchange_clock_is_wrong(start: Start, exchange: str, ms: int) -> None:
    """Event times step; they are stored as the venue gave them, and order and ids do not depend on them."""
    fleet = start(exchange, feeds=("trades", "orderbook_l2", "bbo"))
    fleet.sim.fault("clock_skew", ms=ms, seconds=2)
    fleet.wait_more("trades", 60)
    fleet.wait_more("orderbook_l2", 300)
    agrees(fleet)
    rows = fleet.rows("trades")
    assert any(abs(row["rcv_timestamp"] - row["timestamp"] - -1000 * ms) < 900_000 for row in rows), "the skew shows"


def test_unknown_symbol_is_a_configuration_error(tmp_path: Path) -> None:
    with Fleet(tmp_path, "binance_spot", tickers=["BTCUSDT", "NOPEUSDT"], sim_tickers="BTCUSDT") as fleet:
        process = fleet.connect()
        assert process.wait(30) == 78
        assert "'NOPEUSDT' names no active instrument" in fleet.logs[0].read_text()
        assert "connectors.conn.tickers" in fleet.logs[0].read_text()
