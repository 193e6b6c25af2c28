"""The commands as a user meets them: start, look, stop, wrong configuration, secrets, exit codes. Real processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from fleet import TICKERS, Fleet, mdcollector, until

from mdcollector.config import ArbiterConfig, ConnectorConfig, FleetConfig, WriterConfig
from mdcollector.emit import Emit
from mdcollector.exchanges import Stream
from mdcollector.planning import Planned
from mdcollector.records import Exchange
from mdcollector.ring import RingReader
from mdcollector.stats import StatsWriter
from mdcollector.supervisor import balance, left_behind, undrained, unread
from tools.proof import prove
from tools.sim.process import SimProcess

SECRET = "pa55-w0rd-nobody-may-see"
Start = Callable[..., Fleet]
both_venues = pytest.mark.parametrize("exchange", tuple(TICKERS))


@pytest.fixture
def fleet_of(tmp_path: Path) -> Iterator[Start]:
    """A fleet whose simulator runs; processes are started by the test."""
    with ExitStack() as stack:

        def make(exchange: str, **options: Any) -> Fleet:
            return stack.enter_context(Fleet(tmp_path / exchange, exchange, **options))

        yield make


# Stopping


@both_venues
def test_sigterm_ends_in_order_and_nothing_is_left(fleet_of: Start, exchange: str) -> None:
    """Unsubscribed at the venue, ring marked closed, rows in = rows written, exit code 0."""
    fleet = fleet_of(exchange).start()
    received = fleet.sim.state()["connections"][0]["received"]["text"]
    fleet.stop(fleet.connector)
    assert fleet.connector.returncode == 0
    fleet.sim.wait_state(lambda state: not state["connections"])
    fleet.sim.stop()
    (closed,) = [line for line in fleet.sim.ledger().connections if line["event"] == "close"]
    assert closed["received"]["text"] > received, "an unsubscribe was sent before the connection was closed"
    assert closed["reason"].startswith("the client closed (100")
    fleet.stop(fleet.writer)
    assert fleet.writer.returncode == 0
    for feed in fleet.feeds:
        with RingReader(fleet.rings / fleet.NAME, feed) as ring:
            assert not ring.is_open
            assert not ring.writer_alive
            assert len(fleet.rows(feed)) == ring.published
    proof = fleet.prove()
    assert proof.ok, str(proof)
    assert not proof.gaps


@pytest.mark.parametrize(
    ("exchange", "rate", "trades"), [("binance_spot", 60, 20), ("deribit", 60, 20), ("binance_spot", 1500, 2000)]
)
def test_run_collects_until_stopped_and_prints_rows_in_equals_rows_written(
    fleet_of: Start, exchange: str, rate: float, trades: int
) -> None:
    """Stopped while the exchange goes on, also at its full speed."""
    fleet = fleet_of(exchange, rate=rate)
    urls = ("--ws-url", fleet.sim.ws_url, "--rest-url", fleet.sim.rest_url)
    target = fleet.directory / "target"
    run = fleet.spawn("run", exchange, *fleet.tickers, "--target", target, "--roll-s", "1", "--json", *urls)
    fleet.rings = target / "_rings"
    until(lambda: fleet.published("trades", exchange) > trades, lambda: f"rows; {fleet.tail()}")
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 0, fleet.tail()
    line = next(line for line in fleet.logs[0].read_text().splitlines() if line.startswith('{"rings"'))
    report = json.loads(line)
    assert report["lost"] == 0
    assert {row["feed"] for row in report["rings"]} == {
        "trades",
        "orderbook_l2",
        "bbo",
        "instruments",
        "gaps",
        "clocks",
    }
    assert all(row["received"] == row["published"] == row["durable"] for row in report["rings"])
    fleet.sim.stop()
    proof = prove(fleet.sim.ledger(), target, fleet.rings, exchange, feeds=("trades", "orderbook_l2", "bbo"))
    assert proof.ok, str(proof)


def test_run_stops_by_itself_after_seconds(fleet_of: Start) -> None:
    fleet = fleet_of("binance_spot")
    done = mdcollector(
        "run", "binance_spot", "BTCUSDT", "--target", fleet.data, "--seconds", "10", "--roll-s", "1",
        "--ws-url", fleet.sim.ws_url, "--rest-url", fleet.sim.rest_url,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "every row that went in was written" in done.stdout


def test_up_with_two_venues_patterns_and_chunks(tmp_path: Path) -> None:
    """Patterns are resolved, a connection takes no more streams than allowed, everything is proven."""
    with Fleet(
        tmp_path / "x", "binance_spot", sim_tickers=",".join(f"T{n:03d}USDT:1" for n in range(90)), rate=4
    ) as one:
        one.configure(
            {"exchange": "binance_spot", "tickers": ["T*USDT", "!T00*"], "ws_url": one.sim.ws_url,
             "rest_url": one.sim.rest_url, "feeds": ["trades", "orderbook_l2", "bbo", "tickers", "candles"],
             "book_depth": 100}
        )  # fmt: skip
        plan = json.loads(mdcollector("check", "-c", one.config, "--json").stdout)["connections"]
        assert [connection["name"] for connection in plan] == ["conn.1", "conn.2"] or len(plan) == 1
        up = one.spawn("up", "-c", one.config)
        names = [connection["name"] for connection in plan]
        until(lambda: all(one.published("trades", name) > 20 for name in names), lambda: f"rows; {one.tail()}")
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0, one.tail()
        one.sim.stop()
        proof = prove(one.sim.ledger(), one.data, one.rings, "binance_spot")
        assert proof.ok, str(proof)
        assert "every row that went in was written" in one.tail()


# Two at once


def test_a_second_connector_on_the_same_rings_is_refused(fleet_of: Start) -> None:
    fleet = fleet_of("binance_spot").start()
    second = fleet.connect()
    assert second.wait(60) == 78
    assert "another process writes this ring" in fleet.logs[-1].read_text()
    fleet.processes.pop()
    fleet.wait_more("trades", 20)
    proof = fleet.finish()
    assert proof.ok, str(proof)


def test_up_restarts_what_dies_but_gives_up_on_wrong_configuration(fleet_of: Start) -> None:
    fleet = fleet_of("binance_spot").start()  # holds the rings, so the connector of `up` is refused
    fleet.stop(fleet.writer)
    up = fleet.spawn("up", "-c", fleet.config)
    page = until(
        lambda: (p := fleet.stats("_supervisor").get("processes", {}).get("conn", {})).get("gave_up") and p, "given up"
    )
    assert page["last_exit"] == 78
    assert page["starts"] == 1
    up.send_signal(signal.SIGTERM)
    assert up.wait(60) == 78
    assert "not started again" in fleet.tail()
    assert fleet.connector.poll() is None


def test_a_writer_that_never_ran_is_named_and_hides_no_other_one(tmp_path: Path) -> None:
    StatsWriter(tmp_path / "_writers" / "one").publish({"role": "writer", "streams": {}, "refused": {"ring": "why"}})
    assert balance(tmp_path, ["nobody", "one"]) == []
    found = unread(tmp_path, ["nobody", "one"])
    assert found.pop("ring") == "why"
    assert list(found) == ["all of nobody"]
    assert "no readable stats page" in found["all of nobody"]


def test_what_a_connector_received_is_its_own_last_word(tmp_path: Path) -> None:
    """Rows that it says to have received and that are neither in the ring nor written are missing."""
    connector, writer = StatsWriter(tmp_path / "conn"), StatsWriter(tmp_path / "_writers" / "one")
    numbers = {"published": 9, "durable": 9, "lapped": 0, "damaged": 0}
    writer.publish({"role": "writer", "streams": {"conn/trades": numbers}, "refused": {}})
    for state, received, missing in (("connected", None, 0), ("stopped", 11, 2)):
        connector.publish({"role": "connector", "state": state, "rings": {"trades": {"published": 11}}})
        (row,) = balance(tmp_path, ["one"])
        assert (row.received, row.published, row.missing) == (received, 9, missing)


def test_rows_that_stay_in_the_rings_are_told_by_connector_and_feed(tmp_path: Path) -> None:
    """Not those that a writer has, could not read, or gets from an arbiter that merges them."""
    for name in ("a", "b", "both", "conn.1"):
        emit = Emit(tmp_path / "rings", name, Exchange.DERIBIT, ["trades", "bbo"], semaphore=False)
        emit.packet(1, 1)
        emit.gap("trades", "X", first_id=1, last_id=2, to_time=1, cause="sequence")
        emit.close()
    fleet = FleetConfig(
        connectors={name: ConnectorConfig(exchange="deribit", tickers=["X"]) for name in ("a", "b", "conn")},
        arbiters={"both": ArbiterConfig(legs=["a", "b"], feeds=["trades"])},
    )
    names = ["a", "b", "both", "conn.1", "never-ran"]
    assert undrained(tmp_path / "rings", fleet, names) == {"both/gaps": 1, "conn.1/gaps": 1}, (
        "rings without rows are none"
    )
    fleet.writers = {"one": WriterConfig(out="data"), "never": WriterConfig(out="data")}
    page = StatsWriter(tmp_path / "rings" / "_writers" / "one")
    page.publish({"role": "writer", "streams": {"both/gaps": {}}, "refused": {}})
    assert undrained(tmp_path / "rings", fleet, names) == {"conn.1/gaps": 1}
    unreadable = {str(tmp_path / "rings" / "conn.1" / "gaps.meta"): "why"}
    page.publish({"role": "writer", "streams": {"both/gaps": {}}, "refused": unreadable})
    assert undrained(tmp_path / "rings", fleet, names) == {}


def test_a_connection_that_is_written_nowhere_while_its_siblings_are_is_left_behind() -> None:
    settings = {name: ConnectorConfig(exchange="deribit", tickers=["X"], feeds=["trades", "bbo"]) for name in "ab"}
    connections = [
        Planned(name, "a", ["X"], [Stream(f"{feed} {name}", feed, "X") for feed in ("trades", "bbo")])
        for name in ("a", "a.2")
    ]

    def left(connectors: list[str], legs: list[str], feeds: tuple[str, ...] = ("trades", "bbo")) -> list[str]:
        arbiters = {"both": ArbiterConfig(legs=legs, feeds=list(feeds))} if legs else {}
        writers = {"w": WriterConfig(out="data", connectors=connectors)}
        return left_behind(FleetConfig(connectors=settings, arbiters=arbiters, writers=writers), connections)

    assert left(["*"], []) == left(["a"], []) == []
    assert left(["b"], []) == [], "nobody writes any of it: that is meant"
    assert left(["both"], ["a", "b"]) == ["a.2/trades", "a.2/bbo"]
    assert left(["both"], ["a", "b"], ("trades",)) == ["a.2/trades"], "best prices of neither are written"
    assert left(["a.2"], []) == ["a/trades", "a/bbo"]


def test_check_tells_what_no_writer_takes(tmp_path: Path) -> None:
    """By the names of the processes: that of a connector means all of its connections."""
    path = tmp_path / "fleet.toml"
    many = {"exchange": "deribit", "tickers": [f"T{n}-PERPETUAL" for n in range(501)], "feeds": ["trades"]}
    legs = {name: {"exchange": "deribit", "tickers": ["X"], "feeds": ["trades", "bbo"]} for name in ("a", "b")}
    arbiters = {"both": {"legs": ["a", "b"], "feeds": ["trades"]}}
    always = ("instruments", "gaps", "clocks")

    def untaken(writers: dict[str, Any]) -> tuple[list[str], str]:
        file = {"connectors": {"many": many, **legs}, "arbiters": arbiters, "writers": writers}
        path.write_text(tomli_w.dumps(file))
        text, found = (mdcollector("check", "-c", path, "--offline", *more) for more in ((), ("--json",)))
        assert (text.returncode, found.returncode) == (0, 0), text.stderr
        return json.loads(found.stdout)["untaken"], text.stdout

    names, text = untaken({"all": {"out": "data"}})
    assert names == []
    assert "no writer" not in text
    names, text = untaken({"some": {"out": "data", "connectors": ["many.1", "both"]}})
    left = [f"many.2/{feed}" for feed in ("trades", *always)] + ["a/bbo", "b/bbo"]
    assert untaken({"some": {"out": "data", "connectors": ["many", "both"]}})[0] == ["a/bbo", "b/bbo"]
    assert names == left
    assert f"warning: no writer takes {', '.join(left)}: " in text
    names, _ = untaken({"some": {"out": "data", "connectors": ["many.*", "a", "b"], "feeds": ["tr*", "bbo", "gaps"]}})
    assert set(names) == {
        *(f"both/{feed}" for feed in ("trades", *always)), *(f"many.{n}/{feed}" for n in (1, 2) for feed in always[::2]),
    }  # fmt: skip
    names, text = untaken({})
    assert "many.1/trades" in names
    assert "no writer: rows stay in the rings" in text
    assert "warning" not in text


@pytest.mark.parametrize(
    ("taken", "left", "code"),
    [
        ([], ["bbo", "trades", "instruments"], 0),
        (["trades", "gaps", "clocks"], ["bbo", "instruments"], 1),
        (["trades", "bbo"], ["instruments"], 0),
    ],
)
def test_up_does_not_claim_that_rows_were_written_which_no_writer_took(
    fleet_of: Start, taken: list[str], left: list[str], code: int
) -> None:
    """No writer at all, and one that leaves out what is not data, are as configured."""
    writers = {"parquet": {"out": "data", "feeds": taken}} if taken else {}
    fleet = fleet_of("binance_spot", feeds=("trades", "bbo"))
    file = tomllib.loads(fleet.config.read_text())
    fleet.config.write_text(tomli_w.dumps({**file, "writers": writers}))
    for more in ((), ("--json",)):
        rows = fleet.published("bbo"), fleet.published("trades"), 0
        up = fleet.spawn("up", "-c", fleet.config, *more)
        until(
            lambda rows=rows: all(
                fleet.published(feed) > n for feed, n in zip(("bbo", "trades", "instruments"), rows, strict=True)
            ),
            lambda: f"rows; {fleet.tail()}",
        )
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == code, fleet.tail()
    text, found = fleet.logs[-2].read_text(), json.loads(fleet.logs[-1].read_text().splitlines()[-1])
    assert "every row that went in was written" not in text
    assert found["lost"] == 0
    assert found["undrained"].keys() - {"conn/gaps", "conn/clocks"} == {f"conn/{feed}" for feed in left}
    assert found["undrained"][f"conn/{left[0]}"] == fleet.published(left[0])
    if writers:
        assert re.search(rf"\d rows are in the rings only, those of conn/{left[0]}[, a-z/]*: no writer takes", text)
    else:
        assert re.search(r"\d rows are in the rings only, those of conn: no writer is configured", text)
    assert re.search(rf"conn .* {left[0]} .* no writer", text)


# Status


def test_status_while_running_after_kill_and_when_stopped(fleet_of: Start) -> None:
    fleet = fleet_of("deribit").start()
    well = mdcollector("status", "-c", fleet.config)
    assert well.returncode == 0, well.stdout
    assert "all well" in well.stdout
    assert "100 ms channels instead of raw" in well.stdout
    found = json.loads(mdcollector("status", "--rings", fleet.rings, "--json").stdout)
    assert found["problems"] == []
    connector = found["connectors"]["conn"]
    assert connector["state"] == "connected"
    assert connector["books"] == 3
    assert all(beat["alive"] and beat["open"] for beat in connector["heartbeats"].values())
    assert found["writers"]["parquet"]["streams"]["conn/trades"]["durable"] >= 0

    fleet.connector.kill()
    fleet.connector.wait()
    killed = until(
        lambda: (done := mdcollector("status", "--rings", fleet.rings)).returncode == 1 and done, "status says so"
    )
    assert re.search(r"conn: silent for \d+ s: dead or hanging", killed.stdout), killed.stdout

    fleet.connector = fleet.connect()
    fleet.wait_live()
    fleet.stop(fleet.connector, fleet.writer)
    stopped = mdcollector("status", "--rings", fleet.rings, "--json")
    assert stopped.returncode == 0, stopped.stdout
    assert json.loads(stopped.stdout)["connectors"]["conn"]["state"] == "stopped"


def test_status_names_what_is_not_well(fleet_of: Start) -> None:
    """A venue that is gone, a book that is not proven, a stats page that is none."""
    fleet = fleet_of("binance_spot", stale_s=60.0).start()
    fleet.sim.fault("ban", seconds=300, status=418)
    fleet.sim.fault("drop", stream="depth@100ms")
    until(lambda: fleet.stats().get("books_invalid_count") == 1, "a book is invalid")
    assert "1 books are not proven at the moment" in mdcollector("status", "--rings", fleet.rings).stdout
    fleet.sim.kill()
    fleet.wait_counter("disconnected", 2)
    (fleet.rings / "broken").mkdir()
    (fleet.rings / "broken" / "stats").write_bytes(b"no stats page")
    done = mdcollector("status", "--rings", fleet.rings)
    assert done.returncode == 1
    assert "not a stats page" in done.stdout
    assert "conn: " in done.stdout


def test_status_without_rings_is_a_configuration_error(tmp_path: Path) -> None:
    done = mdcollector("status", "--rings", tmp_path / "nothing")
    assert done.returncode == 78
    assert str(tmp_path / "nothing") in done.stderr


# Wrong configuration

GOOD = {
    "exchange": "binance_spot",
    "tickers": ["BTCUSDT"],
    "rest_url": "http://127.0.0.1:9",
    "ws_url": "ws://127.0.0.1:9",
}
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"exchnage": "x"}, ["connectors.conn.exchnage", "'x'", "unknown key", "exchange, tickers, kinds"]),
    "wrong type": ({"cpu": "one"}, ["connectors.conn.cpu", "'one'", "int"]),
    "wrong type in a list": ({"tickers": ["BTCUSDT", 5]}, ["connectors.conn.tickers", "5", "str"]),
    "out of range": ({"book_depth": 9999}, ["connectors.conn.book_depth", "9999", "0 to 5000"]),
    "negative": ({"stale_s": -1.0}, ["connectors.conn.stale_s", "-1", "0 to 86400"]),
    "no backoff": ({"reconnect_most_s": 0.0}, ["connectors.conn.reconnect_most_s", "0.1 to 3600"]),
    "unknown exchange": ({"exchange": "binanec"}, ["connectors.conn", "'binanec'", "binance_futures, binance_spot, bybit_inverse"]),
    "unknown feed": ({"feeds": ["trades", "quotes"]}, ["connectors.conn.feeds", "'quotes'", "trades, orderbook_l2"]),
    "feed the venue has not": ({"feeds": ["liquidations"]}, ["connectors.conn", "liquidations", "trades, orderbook_l2"]),
    "no feeds": ({"feeds": []}, ["connectors.conn.feeds", "trades, orderbook_l2"]),
    "no tickers": ({"tickers": []}, ["connectors.conn.tickers", "[]", "at least one"]),
    "bad ws url": ({"ws_url": "http://x"}, ["connectors.conn.ws_url", "'http://x'", "ws:// or wss://"]),
    "bad rest url": ({"rest_url": "127.0.0.1"}, ["connectors.conn.rest_url", "'127.0.0.1'", "http:// or https://"]),
    "capacity no power of two": ({"capacity": {"trades": 1000}}, ["connectors.conn.capacity.trades", "1000", "powers of two"]),
    "capacity of no feed": ({"capacity": {"quotes": 1024}}, ["connectors.conn.capacity", "'quotes'", "trades"]),
    "no such cpu": ({"cpu": 4096}, ["connectors.conn.cpu", "4096", "allowed are 0"]),
    "unknown trade channel": ({"trade_channel": "fills"}, ["connectors.conn", "trade_channel", "'fills'", "binance_spot"]),
    "unknown book interval": ({"exchange": "deribit", "book_interval": "10s"}, ["connectors.conn", "book_interval", "'10s'", "raw, 100ms"]),
    "no book interval to choose": ({"book_interval": "100ms"}, ["connectors.conn", "book_interval", "none to choose"]),
    "unknown interval": ({"feeds": ["candles"], "intervals": ["7m"]}, ["connectors.conn", "intervals", "7m", "1m, 3m, 5m"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_configuration_names_file_key_value_and_what_is_allowed(tmp_path: Path, what: str) -> None:
    change, expected = WRONG[what]
    path = tmp_path / "fleet.toml"
    path.write_text(tomli_w.dumps({"connectors": {"conn": {**GOOD, **change}}}))
    done = mdcollector("check", "-c", path, "--offline")
    assert done.returncode == 78, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for text in (str(path), *expected):
        assert text in done.stderr, done.stderr


CONN = "[connectors.conn]\nexchange = 'binance_spot'\ntickers = ['BTCUSDT']\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("connectors = 3", "connectors = 3"),
        ("[connectors.conn", "not TOML"),
        ("surprise = 1", "unknown key 'surprise'; allowed are rings, connectors"),
        ("rings = 7", "rings = 7"),
        ("[connectors.'a b']\nexchange = 'deribit'\ntickers = ['x']", "a name has letters"),
        ("[connectors.c]\ntickers = ['x']", "connectors.c: Object missing required field `exchange`"),
        ("[writers.w]\nout = 'o'\nroll_s = 0.0", "writers.w.roll_s = 0.0: allowed is 0.1 to 86400"),
        ("[writers.w]\nout = 'o'\nfeeds = ['quotes']", "no such feed"),
        ("", "nothing to collect"),
        ("[writers.w]\nout = ''", "writers.w.out is empty"),
        ("[writers.w]\nout = 'o'\nsink = 'kafak'", "writers.w.sink = 'kafak': not known; there are"),
        (
            f"{CONN}[writers.w]\nout = 'o'\nconnectors = ['con']",
            "writers.w.connectors = 'con': fits none; there are conn",
        ),
        (
            f"{CONN}[writers.w]\nout = 'o'\n[writers.v]\nout = './o'\nfeeds = ['tr*']",
            "writers.v: w puts trades of conn",
        ),
        (
            f"{CONN}[writers.w]\nout = 'o'\nconnectors = ['conn.2']\n[writers.v]\nout = 'o'\nfeeds = ['tr*']\nconnectors = ['conn']",
            "writers.v: w puts trades of conn",
        ),
        (
            f"{CONN}[writers.w]\nout = 'o'\nconnectors = ['conn.*']\n[writers.v]\nout = 'o'\nfeeds = ['tr*']\nconnectors = ['conn.2']",
            "writers.v: w puts trades of conn.2",
        ),
        (f"{CONN}[writers.conn]\nout = 'o'", "writers.conn: connectors.conn has this name too"),
        (f"{CONN}[writers.'conn.2']\nout = 'o'", "writers.conn.2: a connector conn calls its connections so"),
        ("[connectors.'leg.1']\nexchange = 'deribit'\ntickers = ['x']", "connectors.leg.1: a connector leg calls"),
    ],
)
def test_a_file_that_is_no_fleet(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    done = mdcollector("check", "-c", path, "--offline")
    assert done.returncode == 78, done.stdout + done.stderr
    assert str(path) in done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_writers_may_share_a_place_when_no_stream_is_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        f"{CONN}[connectors.more]\nexchange = 'deribit'\ntickers = ['BTC-PERPETUAL']\n"
        "[writers.a]\nout = 'o'\nconnectors = ['conn.1']\n[writers.b]\nout = 'o'\nconnectors = ['conn.2', 'mo*']\n"
        "[writers.c]\nout = 'p'\nfeeds = ['trades']\n[writers.d]\nout = 'p'\nfeeds = ['bbo']\n"
    )
    done = mdcollector("check", "-c", path, "--offline")
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(tomli_w.dumps({"connectors": {"conn": GOOD}, "writers": {"w": {"out": "data"}}}))
    for arguments, expected in (
        (("connect", "nobody", "-c", path), "no connector 'nobody'; there are conn"),
        (("write", "nobody", "-c", path), "no writer 'nobody'; there are w"),
        (("check", "-c", tmp_path / "none.toml"), "none.toml: cannot be read"),
    ):
        done = mdcollector(*arguments)
        assert done.returncode == 78, done.stderr
        assert expected in done.stderr


def test_check_shows_the_plan(fleet_of: Start) -> None:
    fleet = fleet_of("deribit")
    done = mdcollector("check", "-c", fleet.config)
    assert done.returncode == 0, done.stderr
    assert "conn: 15 streams of 3 tickers" in done.stdout
    assert "good, 1 connections, 1 writers" in done.stdout


def test_patterns_without_a_venue_that_answers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(tomli_w.dumps({"connectors": {"conn": {**GOOD, "tickers": ["*USDT"]}}}))
    for command in (("check", "-c", path), ("connect", "conn", "-c", path)):
        done = mdcollector(*command)
        assert done.returncode == 1, "no fault of the configuration: systemd may start it again"
        assert "connectors.conn.tickers: patterns and filters need the venue's list of instruments" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_list_of_instruments_that_cannot_be_read_is_asked_for_again(fleet_of: Start) -> None:
    fleet = fleet_of("binance_spot", tickers=["BTC*"], sim=("--fault", "bad_body:every=0.01,count=2,kind=half"))
    done = mdcollector("check", "-c", fleet.config)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("an answer that cannot be read, asked for again") == 2
    assert "conn: 5 streams of 1 tickers (BTCUSDT)" in done.stdout


def test_an_empty_list_of_instruments_is_no_answer(fleet_of: Start) -> None:
    fleet = fleet_of(
        "gmx", tickers=["ETH"], feeds=["tickers"], sim=("--fault", "bad_body:every=0.01,count=9,kind=empty")
    )
    done = mdcollector("check", "-c", fleet.config)
    assert done.returncode == 0, done.stderr
    assert "tickers not checked, no list of instruments: " in done.stderr
    assert "the list of instruments is empty" in done.stderr


def test_up_begins_with_the_venues_that_answer_and_takes_the_others_when_they_do(fleet_of: Start) -> None:
    fleet = fleet_of("binance_spot")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    late = {"exchange": "deribit", "tickers": ["BTC*"], "feeds": ["trades"], "reconnect_most_s": 0.3,
            "ws_url": f"ws://127.0.0.1:{port}", "rest_url": f"http://127.0.0.1:{port}"}  # fmt: skip
    file = tomllib.loads(fleet.config.read_text())
    fleet.config.write_text(tomli_w.dumps({**file, "connectors": {"late": late, **file["connectors"]}}))
    up = fleet.spawn("up", "-c", fleet.config)
    until(lambda: fleet.published("trades") > 10, lambda: f"rows of the one that answers; {fleet.tail()}", 60)
    status = mdcollector("status", "-c", fleet.config)
    assert status.returncode == 1
    assert "late: not begun yet" in status.stdout
    with SimProcess("deribit", "--port", str(port), "--rate", "60", "--tickers", "BTC-PERPETUAL:1"):
        until(lambda: fleet.published("trades", "late") > 10, lambda: f"rows of the late one; {fleet.tail()}", 60)
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0, fleet.tail()
    assert "every row that went in was written" in fleet.tail()


def test_a_venue_that_answers_late_and_refuses_the_tickers_harms_no_other_one(fleet_of: Start) -> None:
    fleet = fleet_of("binance_spot")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    late = {"exchange": "deribit", "tickers": ["NOSUCH*"], "feeds": ["trades"],
            "ws_url": f"ws://127.0.0.1:{port}", "rest_url": f"http://127.0.0.1:{port}"}  # fmt: skip
    file = tomllib.loads(fleet.config.read_text())
    fleet.config.write_text(tomli_w.dumps({**file, "connectors": {"late": late, **file["connectors"]}}))
    up = fleet.spawn("up", "-c", fleet.config)
    until(lambda: fleet.published("trades") > 10, lambda: f"rows of the one that answers; {fleet.tail()}", 60)
    with SimProcess("deribit", "--port", str(port), "--tickers", "BTC-PERPETUAL:1"):
        until(lambda: "NOSUCH*" in fleet.logs[-1].read_text(), lambda: f"the refusal; {fleet.tail()}", 60)
        fleet.wait_more("trades", 10)
    up.send_signal(signal.SIGTERM)
    assert up.wait(60) == 78, fleet.tail()
    assert "late: brought no row: " in fleet.tail()


def test_wrong_use_is_exit_code_2() -> None:
    for arguments in (("--nonsense",), ("connect",), ("run", "binance_spot"), ("frobnicate",)):
        assert mdcollector(*arguments).returncode == 2


def test_output_that_cannot_be_written_is_told_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "mdcollector", "schema"], stdout=full, stderr=subprocess.PIPE,
                              text=True, timeout=60)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "mdcollector: standard output cannot be written: No space left on device\n"


# Secrets


def test_credentials_appear_nowhere(fleet_of: Start) -> None:
    """Not in logs, errors, the process list, stats pages, rings or tables; right and wrong ones alike."""
    env = {"MDCOLLECTOR_DERIBIT_CLIENT_ID": "reader-1", "MDCOLLECTOR_DERIBIT_CLIENT_SECRET": SECRET}
    fleet = fleet_of("deribit", env=env, sim=("--credential", f"reader-1:{SECRET}"))
    up = fleet.spawn("--log-level", "debug", "up", "-c", fleet.config)
    until(lambda: fleet.published("trades") > 10, lambda: f"rows; {fleet.tail()}")
    processes = [up.pid, *(child.pid for child in psutil.Process(up.pid).children(recursive=True))]
    lines = "\n".join(" ".join(psutil.Process(pid).cmdline()) for pid in processes)
    assert "connect conn" in lines
    assert SECRET not in lines
    shown = (
        subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
        if shutil.which("ps")
        else ""
    )
    assert f"--credential reader-1:{SECRET}" in shown or not shown, (
        "the simulator's own argument shows that this can fail"
    )
    assert SECRET not in "\n".join(line for line in shown.splitlines() if "tools.sim" not in line)
    for fault in ("disconnect", "auth_expire", "garbage", "truncate"):
        fleet.sim.fault(fault)
    fleet.wait_counter("connections", 2)
    status = mdcollector("status", "-c", fleet.config, "--json", env=env)
    check = mdcollector("check", "-c", fleet.config, env=env)
    up.send_signal(signal.SIGTERM)
    up.wait(60)
    for text in (status.stdout, status.stderr, check.stdout, check.stderr):
        assert SECRET not in text
    files = [path for path in fleet.directory.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert any(re.search(rb"sim-(access|refresh)-\d", path.read_bytes()) for path in files) is False, "tokens neither"


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        (f'client_id = "a"\nclient_secret = "{SECRET}"', 0o644, "open to others"),
        (f'client_id = "{SECRET}"', 0o600, "lack client_secret"),
        (f'client_id = "a"\nclient_secret = {SECRET}', 0o600, "not TOML"),
        (f'client_id = "a"\nclient_secret = ["{SECRET}"]', 0o600, "lack client_secret"),
        (None, 0o600, "cannot be read"),
    ],
)
def test_a_bad_credentials_file_is_said_without_its_content(
    tmp_path: Path, text: str | None, mode: int, expected: str
) -> None:
    path, secrets = tmp_path / "fleet.toml", tmp_path / "secrets.toml"
    if text is not None:
        secrets.write_text(text)
        secrets.chmod(mode)
    connector = {**GOOD, "exchange": "deribit", "credentials_file": "secrets.toml"}
    path.write_text(tomli_w.dumps({"connectors": {"conn": connector}}))
    done = mdcollector("check", "-c", path, "--offline")
    assert done.returncode == 78, done.stdout + done.stderr
    assert expected in done.stderr
    assert str(secrets) in done.stderr
    assert SECRET not in done.stderr + done.stdout


def test_half_of_the_credentials_in_the_environment_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(tomli_w.dumps({"connectors": {"conn": {**GOOD, "exchange": "deribit"}}}))
    done = mdcollector("check", "-c", path, "--offline", env={"MDCOLLECTOR_DERIBIT_CLIENT_SECRET": SECRET})
    assert done.returncode == 78
    assert "lack client_id" in done.stderr
    assert SECRET not in done.stderr


# The clock of the machine

FAKETIME = next(
    (str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), ""
)  # Debian: apt install libfaketime


def test_others_can_read_nothing_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Fleet(tmp_path / "fleet", "binance_spot", feeds=("trades", "bbo")) as fleet:
            with fleet.config.open("a") as file:
                file.write('[monitor]\ncsv = "monitor/metrics.csv"\n')
            up = fleet.spawn("up", "-c", fleet.config)
            monitor = fleet.spawn("monitor", "-c", fleet.config, "--listen", "127.0.0.1:0")
            csv = tmp_path / "fleet" / "monitor" / "metrics.csv"
            until(lambda: csv.exists() and any(fleet.data.rglob("*.parquet")), fleet.tail)
            fleet.stop(monitor, up)
            made = [path for top in (fleet.rings, fleet.data, csv.parent) for path in (top, *top.rglob("*"))]
    finally:
        os.umask(before)
    assert {path.name for path in made} >= {"stats", "trades.data", "metrics.csv", "_supervisor", "conn.tickers.json"}
    modes = {str(path): path.stat().st_mode & 0o777 & ~(0o750 if path.is_dir() else 0o640) for path in made}
    assert {path: oct(mode) for path, mode in modes.items() if mode} == {}


@pytest.mark.skipif(not FAKETIME, reason="libfaketime (Debian: libfaketime) is not installed")
@both_venues
def test_the_host_clock_steps_by_two_seconds(fleet_of: Start, exchange: str) -> None:
    """F17. Receive times follow the clock, wherever it goes; order, continuity and stage times do not depend on it."""
    fleet = fleet_of(exchange)
    offset = fleet.directory / "offset"
    offset.write_text("+0\n")
    env = {
        "LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    fleet.writer = fleet.write()
    fleet.connector = fleet.spawn("connect", fleet.NAME, "-c", fleet.config, env=env)
    fleet.wait_live()
    for step in ("+2", "-2", "+0"):
        offset.write_text(f"{step}\n")
        fleet.wait_more("trades", 20)
    fleet.wait_live()
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert not proof.gaps
    assert fleet.counter("connections") == 1
    rows = fleet.rows("trades")
    late_us = [row["rcv_timestamp"] - row["timestamp"] for row in rows]
    assert max(late_us) > 1_500_000, "the step forward shows in the receive times"
    assert min(late_us) < -1_000_000, "and the step back"
    assert all(0 < row["parse_ns"] <= row["publish_ns"] < 1_000_000_000 for row in rows), "stage times are monotonic"
    packets = [row["packet_id"] for row in rows]
    assert packets == sorted(packets)
    steps = [row["step_us"] for row in fleet.rows("clocks") if row["source"] == "step"]
    assert [round(step / 1e6) for step in steps] == [2, -4, 2]
    assert fleet.counter("clock_steps") == 3
