"""What only Deribit has: logins, tokens, heartbeats that must be answered, credits. Real processes, simulated venue."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fleet import WITHIN_S, Fleet, until

KEY = {"client_id": "reader-1", "client_secret": "S3cr3t-of-the-tests"}
ENV = {f"MDCOLLECTOR_DERIBIT_{name.upper()}": value for name, value in KEY.items()}
ACCEPTED = ("--credential", ":".join(KEY.values()))

Start = Callable[..., Fleet]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a fleet on Deribit that collects; it is ended with the test."""
    with ExitStack() as stack:

        def make(**options: Any) -> Fleet:
            return stack.enter_context(Fleet(tmp_path / "deribit", "deribit", **options)).start()

        yield make


def subscriptions(fleet: Fleet) -> list[str]:
    return [name for conn in fleet.sim.state()["connections"] for name in conn["subscriptions"]]


def test_without_a_key_the_slower_channels_are_taken_and_status_says_so(start: Start) -> None:
    """F9. `raw` is asked for in the configuration, but it needs a login."""
    fleet = start(book_interval="raw")
    assert "100 ms channels instead of raw" in fleet.stats()["notes"]["credentials"]
    assert not [name for name in subscriptions(fleet) if name.endswith(".raw")]
    proof = fleet.finish()
    assert proof.ok, str(proof)


def test_with_a_key_raw_is_recorded_to_the_last_change(start: Start) -> None:
    """Every single change of the book; and again after a reconnect, which needs a login of its own."""
    fleet = start(env=ENV, sim=ACCEPTED)
    assert {f"{kind}.BTC-PERPETUAL.raw" for kind in ("trades", "book", "ticker")} <= set(subscriptions(fleet))
    assert fleet.stats()["notes"] == {}
    fleet.sim.fault("disconnect")
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    proof = fleet.finish(book_stream="raw")
    assert proof.ok, str(proof)


def test_raw_over_a_rollover(start: Start) -> None:
    """The second connection logs in by itself; both deliver, each row stands in the tables once."""
    fleet = start(env=ENV, sim=ACCEPTED, lifetime_s=2.0)
    fleet.wait_counter("rollovers", 2)
    until(lambda: fleet.stats().get("state") == "connected", "the second rollover is done")
    fleet.wait_more("orderbook_l2", 100)
    proof = fleet.finish(book_stream="raw")
    assert proof.ok, str(proof)
    assert not proof.gaps, str(proof)


def test_a_rollover_while_nothing_happens(start: Start) -> None:
    """The second connection begins with tickers that the first one brought long ago: they are not stored again."""
    fleet = start(env=ENV, sim=ACCEPTED, lifetime_s=4.0)
    fleet.sim.pause()
    fleet.wait_counter("rollovers", fleet.counter("rollovers") + 2)
    until(lambda: fleet.counter("told_again") >= len(fleet.tickers), lambda: f"all tickers again; {fleet.brief()}")
    fleet.sim.resume()
    fleet.wait_more("tickers", 20)
    proof = fleet.finish(book_stream="raw")
    assert proof.ok, str(proof)
    assert not proof.gaps, str(proof)


def test_a_token_is_refreshed_before_it_expires(start: Start) -> None:
    """F9. Raw channels end with the token; none of the refreshes may come too late."""
    fleet = start(env=ENV, sim=(*ACCEPTED, "--limit", "token_s=2"))
    fleet.sim.wait_state(lambda state: state["seconds"] > 9, 30)
    assert [name for name in subscriptions(fleet) if name.endswith(".raw")], "the session is still logged in"
    proof = fleet.finish(book_stream="raw")
    assert proof.ok, str(proof)
    assert not proof.gaps
    assert fleet.counter("connections") == 1


def test_a_session_that_lost_its_login_is_noticed(start: Start) -> None:
    """F9. The venue ends the raw channels without a word, the others go on: best prices tell that the book is dead.

    Taking it anew is refused (13778): a new connection logs in, and brings raw again instead of 100 ms for good.
    """
    fleet = start(env=ENV, sim=ACCEPTED, stale_s=1.5)
    fleet.sim.fault("auth_expire")
    fleet.wait_counter("stream_silent")
    fleet.wait_counter("login_lost")
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    raw = {name for name in subscriptions(fleet) if name.startswith(("trades.", "book.", "ticker."))}
    assert raw
    assert all(name.endswith(".raw") for name in raw), raw
    assert fleet.counter("raw_refused") == 0
    assert "credentials" not in fleet.stats()["notes"]
    proof = fleet.finish(book_stream="raw")
    assert proof.ok, str(proof)
    assert {gap["feed"] for gap in fleet.rows("gaps") if gap["cause"] == "silent"} >= {"orderbook_l2", "tickers"}


def test_wrong_credentials_are_said_and_the_public_channels_recorded(start: Start) -> None:
    """F9. 13004: no reason to record nothing."""
    fleet = start(env=ENV | {"MDCOLLECTOR_DERIBIT_CLIENT_SECRET": "another-S3cr3t"}, sim=ACCEPTED)
    note = fleet.stats()["notes"]["credentials"]
    assert "13004" in note
    assert "100 ms channels instead of raw" in note
    assert fleet.counter("raw_refused") == 1
    fleet.sim.fault("disconnect")
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 40)
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert "another-S3cr3t" not in fleet.tail()


def test_credentials_from_a_file(start: Start, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.toml"
    secrets.write_text("".join(f'{name} = "{value}"\n' for name, value in KEY.items()))
    secrets.chmod(0o600)
    fleet = start(sim=ACCEPTED, credentials_file=str(secrets))
    assert [name for name in subscriptions(fleet) if name.endswith(".raw")]


def test_every_test_request_is_answered(start: Start) -> None:
    """F9. The venue asks each 0.3 s and hangs up on who does not answer within two seconds."""
    fleet = start(sim=("--limit", "heartbeat_scale=0.02", "--limit", "test_within_s=2"))
    before = fleet.sim.state()["connections"][0]["received"]["text"]
    fleet.sim.wait_state(lambda state: state["connections"][0]["received"]["text"] > before + 8, 30)
    assert not fleet.sim.state()["violations"]
    assert fleet.counter("connections") == 1


def test_an_unanswered_test_request_ends_the_connection_and_it_is_opened_again(start: Start) -> None:
    """F9. The process stands still for longer than the venue waits; then it goes on where the hole ends."""
    fleet = start(sim=("--limit", "heartbeat_scale=0.02", "--limit", "test_within_s=0.5"))
    os.kill(fleet.connector.pid, signal.SIGSTOP)
    try:
        fleet.sim.wait_state(lambda state: state["violations"].get("test_request_unanswered"), 30)
        fleet.sim.wait_state(lambda state: not state["connections"], 30)
    finally:
        os.kill(fleet.connector.pid, signal.SIGCONT)
    fleet.wait_counter("connections", 2)
    assert "4000" in fleet.stats()["last_error"]
    fleet.wait_live()
    fleet.wait_more("trades", 20)
    proof = fleet.finish()
    assert proof.ok, str(proof)


def test_10028_ends_the_session_and_the_next_one_is_slower(start: Start) -> None:
    """F10. Three subscribe calls are too much for this pool at the usual pace: wait, come back, space them out."""
    tickers = [f"T{n:03d}_USDC-PERPETUAL" for n in range(90)]
    limits = ("subscribe_pool=6000", "refill_per_s=3000", "call_pool=50000")
    fleet = start(
        tickers=["T*"], sim_tickers=",".join(f"{t}:1" for t in tickers), rate=2,
        sim=[part for limit in limits for part in ("--limit", limit)],
    )  # fmt: skip
    fleet.wait_counter("venue_rate_limited")
    assert fleet.sim.state()["violations"] == {"credits": 1}
    until(lambda: len(subscriptions(fleet)) == 5 * len(tickers), "all subscribed")
    connections = [c for c in fleet.sim.ledger().connections if c["event"] == "open"]
    assert len(connections) == 2
    waited_us = connections[1]["t"] - connections[0]["t"]
    assert waited_us >= 10_000_000, "the pool was given time to refill"
    proof = fleet.finish(to_the_end=False)  # too few trades for every instrument to show its hole
    assert proof.ok, str(proof)


def test_missing_events_on_200_books_at_once(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """F3. All books break in the same moment: they leave and take their channels together, within the pool of credits."""
    tickers = [f"T{n:03d}_USDC-PERPETUAL" for n in range(200)]
    names, feeds = ",".join(f"{ticker}:1" for ticker in tickers), ("trades", "orderbook_l2")
    with Fleet(tmp_path, "deribit", tickers=["T*"], sim_tickers=names, rate=2, feeds=feeds) as fleet:
        fleet.writer, fleet.connector = fleet.write(), fleet.connect()
        until(lambda: fleet.stats().get("books") == 200, lambda: f"200 books; {fleet.brief()}", 120)
        fleet.settle(120)
        before = fleet.sim.state()["connections"][0]["received"]["text"]
        fleet.sim.pause()
        for ticker in tickers:
            fleet.sim.fault("gap", stream="book.", ticker=ticker, n=2)
        began = time.monotonic()
        fleet.sim.resume()
        until(lambda: fleet.counter("gap_orderbook_l2_sequence") == 200, fleet.brief, 120)
        fleet.settle(120)
        record_property("resync_of_200_books_s", time.monotonic() - began)
        state = fleet.sim.state()
        assert all(fault["fired"] == 1 for fault in state["faults"])
        assert state["connections"][0]["received"]["text"] - before < len(tickers), "two for each would be 400"
        assert not state["violations"]
        assert fleet.counter("venue_rate_limited") == 0
        assert fleet.counter("connections") == 1
        proof = fleet.finish(to_the_end=False)
        assert proof.ok, str(proof)


def test_unknown_channels_are_refused_one_by_one(start: Start) -> None:
    """F13. The venue leaves a channel that it does not know out of its reply; the others are recorded."""
    fleet = start()
    fleet.refuse_one("bbo", fleet.tickers[1])
    assert fleet.counter("subscribe_bisected") == 0
    proof = fleet.finish(to_the_end=False)
    assert proof.ok, str(proof)


def test_a_call_that_is_refused_as_a_whole_is_halved(start: Start) -> None:
    """F13. An error names no channel: the one that it means is found, the others are recorded."""
    fleet = start()
    fleet.sim.fault("refuse", stream="quote.ETH-PERPETUAL", rate=1, code=11050)
    fleet.sim.fault("disconnect")
    fleet.wait_counter("stream_refused")
    until(
        lambda: len(subscriptions(fleet)) == 5 * len(fleet.tickers) - 1, lambda: f"all others; {subscriptions(fleet)}"
    )
    assert fleet.stats()["notes"]["refused quote.ETH-PERPETUAL"].startswith("11050")
    assert fleet.counter("subscribe_bisected") >= 3
    proof = fleet.finish(to_the_end=False)
    assert proof.ok, str(proof)


# Limits


def test_429_of_the_33rd_connection_is_waited_for(start: Start) -> None:
    """F4. Others on this IP address have the places, HTTP included: neither is asked again before its time, and the
    trades that were missed are fetched once there is room.
    """
    fleet = start(sim=("--limit", "connections_max=2"))
    os.kill(fleet.connector.pid, signal.SIGSTOP)
    with ExitStack() as others:
        try:
            fleet.sim.fault("disconnect")
            fleet.sim.wait_state(lambda state: not state["connections"], 30)
            first, second = (others.enter_context(connected(fleet.sim.ws_url)) for _ in range(2))
            fleet.sim.wait_state(lambda state: len(state["connections"]) == 2, 30)
        finally:
            os.kill(fleet.connector.pid, signal.SIGCONT)
        fleet.wait_counter("rate_limited")
        assert "HTTP 429" in fleet.stats()["last_error"]
        first.close()
        fleet.wait_counter("connections", 2)
        fleet.wait_more("trades", 20)
        fleet.wait_counter("http_rate_limited")
        second.close()
    fleet.wait_live()
    until(fleet.trades_are_proven, fleet.brief)
    state = fleet.sim.state()
    assert state["requests_before_retry_after"] == 0
    assert state["counts"].get("connects_before_retry_after", 0) == 0
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert proof.feeds["trades"].explained == 0


@contextmanager
def connected(ws_url: str) -> Iterator[socket.socket]:
    """Another client's connection, which asks for nothing."""
    host = urlsplit(ws_url)
    with socket.create_connection((host.hostname, host.port), timeout=WITHIN_S) as client:
        client.sendall(
            b"GET /ws/api/v2 HTTP/1.1\r\nHost: sim\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b" 101 " in client.recv(4096)
        yield client


def test_a_venue_that_has_no_time_is_asked_again(start: Start) -> None:
    """Settlement or maintenance (11051): neither the login nor the raw channels are given up for it."""
    fleet = start(env=ENV, sim=ACCEPTED, silent_s=5.0)
    fleet.sim.fault("refuse", stream="login", code=11051)
    fleet.sim.fault("refuse", stream="book.", code=10041)
    fleet.sim.fault("disconnect")
    fleet.wait_counter("venue_busy", 2)
    fleet.wait_live()
    until(
        lambda: len([name for name in subscriptions(fleet) if name.endswith(".raw")]) == 3 * len(fleet.tickers),
        lambda: f"all raw channels: {subscriptions(fleet)}",
    )
    assert not [name for name, stream in fleet.stats()["streams"].items() if stream["refused"]]
    assert fleet.stats()["notes"] == {}
    fleet.wait_more("trades", 40)
    proof = fleet.finish(book_stream="raw")
    assert proof.ok, str(proof)
