"""What only OKX has: two paths, text pings, a notice before an upgrade, logins, 480 requests an hour, merged trades.

Real processes against the simulated venue; each test ends with the proof against its ledger.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fleet import ALL_FEEDS, WITHIN_S, Fleet, until
from recorded import DATA, entries, needs_data, run
from test_recorded_okx import OkxModel

from mdcollector.errors import RingError
from mdcollector.ring import RingReader
from mdcollector.stats import read_stats
from tools.proof import prove

KEY = {"api_key": "reader-1", "secret": "S3cr3t-of-the-tests", "passphrase": "Open-sesame"}
ENV = {f"MDCOLLECTOR_OKX_{name.upper()}": value for name, value in KEY.items()}
ACCEPTED = ("--credential", f"{KEY['api_key']}:{KEY['secret']}/{KEY['passphrase']}")
TBT = "books-l2-tbt"

Start = Callable[..., Fleet]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Start]:
    """A fleet on OKX that does not run yet; it is ended with the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Fleet(tmp_path / "okx", "okx", **options))


@pytest.fixture
def start(make: Start) -> Start:
    """Start a fleet on OKX that collects."""
    return lambda **options: make(**options).start()


def agrees(fleet: Fleet, **options: Any) -> None:
    proof = fleet.finish(**options)
    assert proof.ok, str(proof)


def subscriptions(fleet: Fleet) -> set[str]:
    return {name for conn in fleet.sim.state()["connections"] for name in conn["subscriptions"]}


def connect_with(fleet: Fleet, *, keyed: bool = False, **constants: int) -> None:
    """Start writer and connector, the latter with other constants of its venue, so that nobody waits for minutes."""
    fleet.writer = fleet.write()
    changes = "; ".join(f"okx.{name} = {value}" for name, value in constants.items())
    code = f"from mdcollector.exchanges import okx; {changes}; from mdcollector.cli import main; main()"
    log = fleet.directory / "connector.log"
    fleet.logs.append(log)
    with open(log, "wb") as out:
        command = [sys.executable, "-c", code, "connect", fleet.NAME, "-c", str(fleet.config)]
        fleet.connector = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **ENV} if keyed else None
        )
    fleet.processes.append(fleet.connector)
    fleet.wait_live()


# Two paths


def test_candles_and_single_trades_come_on_the_business_path(start: Start) -> None:
    """`trades-all`: each trade is a row with the venue's counter; candles say themselves when they are closed."""
    fleet = start(trade_channel="trades-all", feeds=("trades", "candles"), intervals=["1s"])
    (conn,) = fleet.sim.state()["connections"]
    assert conn["path"] == "/ws/v5/business"
    assert {name.partition(":")[0] for name in conn["subscriptions"]} == {"trades-all", "candle1s"}
    fleet.sim.fault("gap", stream="trades-all:", n=4)
    fleet.wait_counter("gap_trades_filled_repaired")
    fleet.sim.fault("disconnect")
    fleet.wait_counter("connections", 2)
    fleet.wait_more("candles", 20)
    fleet.wait_more("trades", 40)
    fleet.finish()
    proof = prove(fleet.sim.ledger(), fleet.data, fleet.rings, "okx", feeds=fleet.feeds, intervals=("1s",))
    assert proof.ok, str(proof)
    assert not [cause for feed, cause in proof.gaps if feed == "trades"], "every hole in the trades is repaired"
    assert None not in {row["trade_seq"] for row in fleet.rows("trades")}
    assert {row["closed"] for row in fleet.rows("candles")} == {True, False}


def test_all_feeds_on_two_connections(make: Start) -> None:
    """One connector is two processes; indices are shared by what has them. Both are cut off once, and go on."""
    tickers = ("BTC-USDT", "BTC-USDT-SWAP", "BTC-USDT-261225", "BTC-USD-261225-90000-C")
    fleet = make(feeds=ALL_FEEDS, tickers=tickers, sim_tickers=",".join(f"{t}:1" for t in tickers))
    legs = ("conn.1", "conn.2")
    fleet.writer, processes = fleet.write(), [fleet.connect(leg) for leg in legs]

    def flows(more: int) -> bool:
        pages = [fleet.stats(leg) for leg in legs]
        if not all(page.get("state") == "connected" and not page["books_invalid_count"] for page in pages):
            return False
        return all(fleet.published(feed, leg) > more for leg, feeds in zip(legs, (ALL_FEEDS[:4], ALL_FEEDS[4:]), strict=True)
                   for feed in feeds)  # fmt: skip

    until(lambda: flows(20), "rows of all feeds", 60)
    paths = {conn["path"].rpartition("/")[2]: conn for conn in fleet.sim.state()["connections"]}
    assert set(paths) == {"public", "business"}
    assert paths["public"]["subscriptions"].count("index-tickers:BTC-USDT") == 1
    fleet.sim.fault("disconnect")
    until(lambda: all(fleet.stats(leg)["counters"]["connections"] == 2 for leg in legs), "both are connected again")
    rows = min(fleet.published("tickers", "conn.1"), fleet.published("candles", "conn.2"))
    until(lambda: flows(rows) and not fleet.stats("conn.1")["trades_unproven"], "rows behind the hole")
    fleet.sim.stop()
    until(lambda: all(fleet.stats(leg)["counters"].get("disconnected", 0) >= 2 for leg in legs), "the end was noticed")
    fleet.stop(*processes, fleet.writer)
    assert [process.returncode for process in (*processes, fleet.writer)] == [0, 0, 0], fleet.tail()
    proof = fleet.prove()
    assert proof.ok, str(proof)
    assert all(counts.rows for counts in proof.feeds.values()), str(proof)


# Books


def test_a_keep_alive_is_no_gap_and_no_row(start: Start) -> None:
    """F6. A quiet book says now and then that it is still the same."""
    fleet = start(
        tickers=["BTC-USDT", "ETH-USDT"], sim_tickers="BTC-USDT:1,ETH-USDT:0.02", sim=("--limit", "keep_alive_s=0.3"),
        feeds=("trades", "orderbook_l2", "bbo"),
    )  # fmt: skip
    fleet.wait_counter("book_keep_alive", 5)
    agrees(fleet)
    assert not fleet.prove().gaps


def test_a_reset_of_the_sequence_is_counted_and_followed_and_a_gap_behind_it_is_found(start: Start) -> None:
    """F6. The venue numbers a book anew; it names its predecessor, so nothing is missing."""
    fleet = start(feeds=("trades", "orderbook_l2"))
    hit, *others = fleet.tickers
    fleet.sim.fault("renumber", ticker=hit)
    fleet.wait_counter("book_sequence_reset")
    fleet.wait_more("orderbook_l2", 100)
    assert not fleet.counters("gap_orderbook")
    fleet.sim.fault("drop", stream="books:", ticker=hit)
    fleet.wait_counter("gap_orderbook_l2_sequence")
    fleet.settle()
    fleet.wait_more("orderbook_l2", 100)
    fleet.finish()
    rows = fleet.rows("orderbook_l2")
    (gap,) = [row for row in fleet.holes() if row["feed"] == "orderbook_l2"]
    assert gap["ticker"] == hit
    for ticker in (hit, *others):
        messages: dict[int, set[tuple[int, float, float]]] = {}
        for row in (row for row in rows if row["ticker"] == ticker and not row["flags"] & 2):
            messages.setdefault(row["update_id"], set()).add((row["side"], row["price"], row["qty"]))
        events = fleet.sim.ledger().book_events(ticker, "books")
        told = {
            event["last"]: {(side, float(p), float(q)) for side, levels in ((1, event["bids"]), (-1, event["asks"]))
                            for p, q in levels} for event in events
        }  # fmt: skip
        order = [event["last"] for event in events]
        assert all(messages[update_id] == told[update_id] for update_id in messages)
        mine = [order.index(update_id) for update_id in messages]
        assert mine == sorted(mine)
        missing = [order[i] for i in range(mine[0], mine[-1]) if i not in mine]
        if ticker == hit:
            assert any(gap["first_id"] <= update_id <= gap["last_id"] for update_id in missing)
            assert min(order[mine[0] :]) < 5000 < order[mine[0]]
        else:
            assert missing == []
    without_books = prove(fleet.sim.ledger(), fleet.data, fleet.rings, "okx", feeds=("trades",))
    assert without_books.ok, str(without_books)


def test_missing_events_on_200_books_at_once(make: Start, record_property: Callable[[str, object], None]) -> None:
    """F3. All books break in the same moment: they leave and take their channels together, some requests in all."""
    tickers = [f"T{n:03d}-USDT" for n in range(200)]
    fleet = make(
        tickers=["T*-USDT"], sim_tickers=",".join(f"{t}:1" for t in tickers), rate=3, feeds=("trades", "orderbook_l2")
    )
    connect_with(fleet, BOOKS_PER_CONNECTION=200)
    until(lambda: fleet.stats().get("books") == 200, "200 books", 60)
    fleet.settle(60)
    before = fleet.sim.state()["connections"][0]["received"]["text"]
    fleet.sim.pause()
    for ticker in tickers:
        fleet.sim.fault("gap", stream="books:", ticker=ticker, n=2)
    began = time.monotonic()
    fleet.sim.resume()
    fleet.wait_counter("gap_orderbook_l2_sequence", 200)
    fleet.settle(90)
    record_property("resync_of_200_books_s", time.monotonic() - began)
    state = fleet.sim.state()
    assert all(fault["fired"] == 1 for fault in state["faults"])
    assert fleet.counter("gap_orderbook_l2_sequence") == 200
    assert state["connections"][0]["received"]["text"] - before < 100, "of 480 an hour"
    assert state["counts"].get("http_429", 0) == 0
    assert not state["violations"]
    assert fleet.counter("connections") == 1
    agrees(fleet)


def test_a_stream_that_is_confirmed_and_silent_is_found_by_rest_and_taken_anew(start: Start) -> None:
    """F1. One book brings nothing while REST shows that it changes: it is taken anew and its hole is told."""
    fleet = start(feeds=("trades", "orderbook_l2"), silent_s=2.0)
    hit, *others = fleet.tickers
    fleet.sim.fault("silence", stream="books:", ticker=hit, seconds=16)
    fleet.wait_counter("stream_silent")
    fleet.wait_counter("stream_recovered")
    fleet.settle()
    fleet.wait_more("orderbook_l2", 100)
    assert not fleet.sim.state()["violations"]
    agrees(fleet)
    gaps = {row["ticker"] for row in fleet.rows("gaps") if row["feed"] == "orderbook_l2"}
    assert hit in gaps
    assert not gaps & set(others) or fleet.counter("rollovers"), "only its own book, unless the connection was replaced"


# Logins


def test_with_a_key_every_change_of_a_book_is_recorded(start: Start) -> None:
    """Each 10 ms instead of each 100; and again after a reconnect, which needs a login of its own."""
    fleet = start(env=ENV, sim=ACCEPTED)
    assert {name for name in subscriptions(fleet) if name.startswith("books")} == {f"{TBT}:{t}" for t in fleet.tickers}
    assert fleet.stats()["notes"] == {}
    fleet.sim.fault("drop", stream=f"{TBT}:")
    fleet.wait_counter("gap_orderbook_l2_sequence")
    fleet.sim.fault("disconnect")
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    agrees(fleet, book_stream=TBT)


def test_logged_in_over_a_rollover(start: Start) -> None:
    fleet = start(env=ENV, sim=ACCEPTED, lifetime_s=2.0)
    fleet.wait_counter("rollovers", 2)
    until(lambda: fleet.stats().get("state") == "connected", "the second rollover is done")
    fleet.wait_more("orderbook_l2", 100)
    agrees(fleet, book_stream=TBT)
    assert not fleet.prove(book_stream=TBT).gaps


@pytest.mark.parametrize(
    ("changed", "limit", "code"),
    [
        ({}, "tier_ok=0", "64003"),
        ({"MDCOLLECTOR_OKX_SECRET": "another-S3cr3t"}, "tier_ok=1", "60007"),
    ],
)
def test_a_refused_login_or_tier_is_said_and_the_public_books_are_recorded(
    start: Start, changed: dict[str, str], limit: str, code: str
) -> None:
    """No reason to record nothing; and the next connection does not ask again."""
    fleet = start(env=ENV | changed, sim=(*ACCEPTED, "--limit", limit))
    note = fleet.stats()["notes"]["credentials"]
    assert note.startswith(code)
    assert "books each 100 ms" in note
    fleet.sim.fault("disconnect")
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    refused = fleet.counter("tbt_refused")
    agrees(fleet)
    assert 1 <= refused <= len(fleet.tickers)
    assert not [secret for secret in (*KEY.values(), "another-S3cr3t")[1:] if secret in fleet.tail()]


# Limits


def test_50011_under_http_200_is_a_limit_too(start: Start) -> None:
    """F4. The venue's own code says it, not the status: it is waited, and the trades are fetched afterwards."""
    fleet = start(clock_s=3600.0)
    until(lambda: fleet.stats()["clock"].get("source"), "the venue was asked for its time")
    before = fleet.counter("http_requests")
    fleet.sim.fault("ban", seconds=3, status=200)
    fleet.sim.fault("gap", stream="trades:", ticker=fleet.tickers[0], n=4)
    fleet.wait_counter("http_rate_limited")
    fleet.wait_counter("gap_trades_filled_repaired")
    assert fleet.counters("refused_") == {}
    assert fleet.counter("trade_repair_refused") == 0
    assert fleet.counter("http_requests") - before <= 4, "one each two seconds while it lasts"
    agrees(fleet)
    assert fleet.prove().feeds["trades"].explained == 0


def test_60014_brings_a_connection_that_has_requests_left(start: Start) -> None:
    """F4. By the venue's count this connection has none for a book that must be taken anew; a new one is opened first."""
    fleet = start(sim=("--limit", "requests_per_hour=2"))
    hit = fleet.tickers[0]
    fleet.sim.fault("drop", stream="books:", ticker=hit)
    fleet.wait_counter("venue_rate_limited")
    fleet.wait_counter("rollovers")
    until(lambda: len(fleet.sim.state()["connections"]) == 1, "one connection is left")
    fleet.settle()
    fleet.wait_more("orderbook_l2", 50)
    assert fleet.counter("disconnected") == 0
    assert fleet.counter("connections") == 2
    assert fleet.sim.state()["violations"] == {"requests_per_hour": 1}
    agrees(fleet)
    gaps = [row for row in fleet.rows("gaps") if row["feed"] == "orderbook_l2"]
    assert {row["ticker"] for row in gaps} == {hit}


def test_a_login_that_came_too_soon_is_sent_again(make: Start) -> None:
    """F4. 60014 says nothing against the key: the fast books are not given up for it."""
    fleet = make(sim=(*ACCEPTED, "--fault", "refuse:stream=login,code=60014"))
    connect_with(fleet, keyed=True, LOGIN_AGAIN_NS=500_000_000)
    assert {name for name in subscriptions(fleet) if name.startswith("books")} == {f"{TBT}:{t}" for t in fleet.tickers}
    assert fleet.stats()["notes"] == {}
    assert fleet.counter("venue_rate_limited") == 1
    assert fleet.counter("connections") == 1
    fleet.wait_more("trades", 40)
    agrees(fleet, book_stream=TBT)


# The life of a connection


def test_a_notice_of_an_upgrade_is_followed_in_time(start: Start) -> None:
    """F5. 64008: the next connection is open before the old one ends; no row is lost or doubled."""
    fleet = start(rate=150)
    fleet.sim.fault("shutdown", after_s=8)
    fleet.wait_counter("rollovers")
    until(
        lambda: fleet.stats().get("state") == "connected" and len(fleet.sim.state()["connections"]) == 1,
        "one connection is left",
    )
    fleet.wait_more("trades", 40)
    assert fleet.counter("disconnected") == 0
    assert fleet.counter("connections") == 2
    agrees(fleet)
    assert not fleet.prove().gaps


def test_pings_keep_a_silent_connection(make: Start) -> None:
    """Nothing is traded for longer than the venue keeps a connection on which nothing comes or goes."""
    fleet = make(sim=("--limit", "silent_s=3"), stale_s=60.0)
    connect_with(fleet, PING_EVERY_NS=500_000_000)
    fleet.sim.pause()
    began = fleet.sim.state()["seconds"]
    state = fleet.sim.wait_state(lambda state: state["seconds"] > began + 8, 60)
    assert not state["violations"]
    assert fleet.counter("connections") == 1
    fleet.sim.resume()
    fleet.wait_more("trades", 20)
    agrees(fleet)
    assert not fleet.prove().gaps


def test_without_pings_the_venue_hangs_up(make: Start) -> None:
    """The test above can fail: who does not ping is disconnected."""
    fleet = make(sim=("--limit", "silent_s=2"), stale_s=60.0)
    connect_with(fleet, PING_EVERY_NS=10**12)
    fleet.sim.pause()
    fleet.wait_counter("disconnected")
    assert "4004" in fleet.stats()["last_error"]


def test_an_unanswered_ping_in_silence_is_a_lost_connection(make: Start) -> None:
    fleet = make(stale_s=60.0)
    connect_with(fleet, PING_EVERY_NS=500_000_000, PONG_WITHIN_NS=500_000_000)
    fleet.sim.fault("no_heartbeat_answer", seconds=4)
    fleet.wait_more("trades", 20)
    assert fleet.counter("connections") == 1, "as long as data comes nothing is missed"
    fleet.sim.pause()
    fleet.sim.fault("no_heartbeat_answer", seconds=4)
    fleet.wait_counter("disconnected")
    assert "ping_unanswered" in fleet.stats()["last_error"]
    fleet.sim.resume()
    fleet.wait_live()
    fleet.wait_more("trades", 20)
    agrees(fleet)


def test_a_killed_connector_goes_on_behind_its_last_trade(start: Start) -> None:
    """Rows of merged trades have no counter, but their ids tell the next life where to begin: the rest is fetched."""
    fleet = start()
    os.kill(fleet.connector.pid, signal.SIGKILL)
    fleet.connector.wait()
    traded = sum(fleet.sim.state()["ledger"]["trade"].values())
    fleet.sim.wait_state(lambda state: sum(state["ledger"]["trade"].values()) > traded + 60, 30)
    fleet.connector = fleet.connect()
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    agrees(fleet)
    proof = fleet.prove()
    assert proof.feeds["trades"].repaired >= 30
    assert proof.feeds["trades"].explained == 0
    assert {row["trade_seq"] for row in fleet.rows("trades")} == {None}


# What one channel brings for many


def test_liquidations_of_the_wanted_instruments_only(make: Start) -> None:
    """The channel has all perpetuals; sides are those of the forced orders."""
    fleet = make(
        tickers=["BTC-USDT-SWAP"],
        sim_tickers="BTC-USDT-SWAP:1,ETH-USDT-SWAP:1",
        rate=300,
        feeds=("trades", "liquidations"),
    )
    fleet.writer, fleet.connector = fleet.write(), fleet.connect()
    until(lambda: fleet.published("liquidations") >= 10 and fleet.published("trades") > 50, fleet.brief, 60)
    assert fleet.counter("liquidations_of_others") > 0
    fleet.sim.stop()
    fleet.wait_counter("disconnected")
    fleet.stop(fleet.connector, fleet.writer)
    rows = [
        (row["ticker"], row["side"], row["price"], row["qty"], row["timestamp"]) for row in fleet.rows("liquidations")
    ]
    truth = [
        (line["ticker"], {"BUY": 1, "SELL": -1}[line["side"]], float(line["price"]), float(line["qty"]), line["t"] // 1000 * 1000)
        for line in fleet.sim.ledger().rows("liquidation", "BTC-USDT-SWAP")
    ]  # fmt: skip
    assert rows == truth[-len(rows) :]
    assert len(set(Counter(row[1] for row in rows))) == 2


# The tools


@needs_data
def test_a_connector_on_a_recording_has_what_was_recorded(tmp_path: Path) -> None:
    """`mdreplay serve` plays the run of 2026 over a socket: every frame is in the rings, in its order."""
    recording = DATA / "okx" / "recorded" / "btcusdtswap_20260926_part1.jsonl.zst"
    feeds = ("trades", "orderbook_l2", "bbo")
    command = [sys.executable, "-m", "tools.replay", "serve", str(recording), "--speed", "max", "--exit"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        fleet = {
            "rings": str(tmp_path / "rings"),
            "connectors": {
                "conn": {"exchange": "okx", "tickers": ["BTC-USDT-SWAP"], "feeds": list(feeds), "ws_url": ready["ws_url"],
                         "rest_url": ready["rest_url"]},
            },
        }  # fmt: skip
        (tmp_path / "fleet.toml").write_text(tomli_w.dumps(fleet))
        connector = subprocess.Popen(
            [sys.executable, "-m", "mdcollector", "connect", "conn", "-c", str(tmp_path / "fleet.toml")]
        )
        try:
            out, _ = server.communicate(timeout=WITHIN_S)
            until(lambda: disconnects(tmp_path / "rings") > 0, "the end of the recording was noticed")
        finally:
            connector.send_signal(signal.SIGTERM)
            connector.wait(WITHIN_S)
    assert json.loads(out)["unclaimed"] == 0
    assert connector.returncode == 0
    model = run(OkxModel(), entries(recording)).expected
    for feed in feeds:
        with RingReader(tmp_path / "rings" / "conn", feed) as ring:
            ring.seek("oldest")
            rows = ring.read(ring.capacity)
        names = [name for name in rows.dtype.names if name in ("timestamp", "side", "price", "qty", "update_id", "bid_price",
                 "bid_qty", "ask_price", "ask_qty", "trade_id")]  # fmt: skip
        found = [tuple(v.decode() if isinstance(v, bytes) else v for v in row) for row in rows[names].tolist()]
        assert found == [tuple(row[name] for name in names) for row in model.rows[feed]]
        assert len(found) > 5


def disconnects(rings: Path) -> int:
    try:
        return int(read_stats(rings / "conn" / "stats").get("counters", {}).get("disconnected", 0))
    except RingError:
        return 0


def test_the_comparator_finds_nothing_but_what_was_lost(start: Start, tmp_path: Path) -> None:
    """mdcompare reads the venue by its own few lines beside the connector: merged trades, books and best prices agree."""
    fleet = start(feeds=("trades", "orderbook_l2", "bbo"))
    command = [sys.executable, "-m", "tools.compare", "okx", *fleet.tickers, "--rings", str(fleet.rings), "--out",
               str(tmp_path / "out"), "--ws-url", fleet.sim.ws_url, "--rest-url", fleet.sim.rest_url, "--edge", "1",
               "--json"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        fleet.sim.wait_state(lambda state: len(state["connections"]) == 2, 30)
        fleet.wait_more("trades", 60)
        fleet.wait_more("bbo", 60)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=WITHIN_S)
    summary = json.loads(out)
    assert process.returncode == 0, summary
    assert summary["compared"] > 100
    agrees(fleet)
