"""Which connection carries which instrument, while the list changes between two lives. Real processes."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fleet import WITHIN_S, Fleet, mdcollector, until

from mdcollector import config, supervisor
from mdcollector.assignment import Assignment
from mdcollector.exchanges.okx import Okx
from mdcollector.health import judge
from mdcollector.ring import RingReader
from mdcollector.supervisor import Supervisor

NAMES = [f"T{n:02d}-USDT" for n in range(35)]  # a connection of OKX carries 29 books
BOTH = ("conn.1", "conn.2")
GROWN = ("conn", "conn.2")  # it began as one
FULL = NAMES[:29]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    tickers = ",".join(f"{name}:1" for name in NAMES)
    feeds = ("trades", "orderbook_l2", "bbo")
    with Fleet(
        tmp_path / "x", "okx", tickers=["*-USDT"], sim_tickers=tickers, feeds=feeds, rate=20, connections=BOTH,
        instruments_s=600.0,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Fleet]:
    """A connector whose only connection has no room for another book, and that follows the list."""
    tickers = ",".join(f"{name}:1" for name in FULL)
    feeds = ("trades", "orderbook_l2", "bbo")
    with Fleet(
        tmp_path / "x", "okx", tickers=["*-USDT"], sim_tickers=tickers, feeds=feeds, rate=20, instruments_s=3.0,
    ) as made:  # fmt: skip
        yield made


def tickers_of(fleet: Fleet, name: str) -> set[str]:
    return {stream["ticker"] for stream in fleet.stats(name).get("streams", {}).values()}


def all_deliver(fleet: Fleet, process: subprocess.Popen[bytes], name: str) -> bool:
    page = fleet.stats(name)
    return page.get("pid") == process.pid and all(
        s["data_ns"] for s in page["streams"].values() if s["feed"] == "trades"
    )


def has_rows(fleet: Fleet, name: str) -> bool:
    return all(s["data_ns"] for s in fleet.stats(name)["streams"].values())


def last_trades(fleet: Fleet, name: str) -> dict[str, int]:
    """Ticker -> the newest trade id in a ring."""
    with RingReader(fleet.rings / name, "trades") as ring:
        ring.seek("oldest")
        rows = ring.read(ring.capacity)
        return {ticker: int(trade) for ticker, trade in zip(ring.names(rows), rows["trade_id"], strict=True)}


def gaps(fleet: Fleet, feed: str, cause: str) -> list[dict[str, Any]]:
    return [g for name in GROWN for g in fleet.ring_gaps(name) if (g["feed"], g["cause"]) == (feed, cause)]


def test_one_process_that_begins_anew_behind_a_listing_loses_nobody_of_its_sibling(fleet: Fleet) -> None:
    """Without a supervisor, as units do it: AAA-USDT comes first in the list, so a new cut would shift all others."""
    first, second = processes = [fleet.connect(name) for name in BOTH]
    for process, name in zip(processes, BOTH, strict=True):
        until(lambda p=process, n=name: all_deliver(fleet, p, n), fleet.tail)  # type: ignore[misc]
    before = {name: tickers_of(fleet, name) for name in BOTH}
    assert before == {"conn.1": set(NAMES[:29]), "conn.2": set(NAMES[29:])}
    fleet.sim.fault("listing", ticker="AAA-USDT")
    first.kill()
    first.wait()
    first = fleet.connect("conn.1")
    until(lambda: all_deliver(fleet, first, "conn.1"), fleet.tail)
    assert tickers_of(fleet, "conn.1") == before["conn.1"]
    fleet.stop(second)
    second = fleet.connect("conn.2")
    until(lambda: all_deliver(fleet, second, "conn.2"), fleet.tail)
    assert tickers_of(fleet, "conn.2") == {*before["conn.2"], "AAA-USDT"}
    streams = [s for conn in fleet.sim.state()["connections"] for s in conn["subscriptions"]]
    assert len(set(streams)) == len(streams) == 3 * 36, "each stream once"


def run_up(fleet: Fleet, names: tuple[str, ...]) -> Any:
    """`up` until all of its connections deliver."""
    up = fleet.spawn("up", "-c", fleet.config)

    def delivers(name: str) -> bool:
        page = fleet.stats(name)
        return page.get("state") == "connected" and all(
            s["data_ns"] for s in page["streams"].values() if s["feed"] == "trades"
        )

    seen = {name: fleet.stats(name).get("pid") for name in names}
    until(lambda: all(fleet.stats(n).get("pid") != seen[n] and delivers(n) for n in names), fleet.tail)
    return up


def stop_up(fleet: Fleet, up: Any) -> None:
    up.send_signal(signal.SIGTERM)
    assert up.wait(60) == 0, fleet.tail()


def test_up_again_behind_a_listing_moves_nobody(fleet: Fleet) -> None:
    stop_up(fleet, run_up(fleet, BOTH))
    before = {name: last_trades(fleet, name) for name in BOTH}
    fleet.sim.fault("listing", ticker="AAA-USDT")
    up = run_up(fleet, BOTH)
    assert tickers_of(fleet, "conn.1") == before["conn.1"].keys()
    assert tickers_of(fleet, "conn.2") == {*before["conn.2"], "AAA-USDT"}
    stop_up(fleet, up)


def test_who_moves_goes_on_from_where_the_sibling_ended(fleet: Fleet) -> None:
    """One connection becomes two, since books are wanted as well: every hole between is told, and repaired. Who stays
    stays in its rings: the first connection keeps its name.
    """
    file = fleet.config.read_text()
    fleet.config.write_text(file.replace('"orderbook_l2",\n', ""))
    stop_up(fleet, run_up(fleet, ("conn",)))
    before = last_trades(fleet, "conn")
    assert before.keys() == set(NAMES)
    made = fleet.sim.state()["ledger"]["trade"]
    until(
        lambda: all(now > made[t] for t, now in fleet.sim.state()["ledger"]["trade"].items()),
        lambda: f"every instrument has traded meanwhile; {made} {fleet.sim.state()['ledger']}",
    )
    fleet.config.write_text(file)
    up = run_up(fleet, GROWN)
    assert tickers_of(fleet, "conn") == set(NAMES[:29])
    until(lambda: not any(fleet.stats(name)["trades_unproven"] for name in GROWN), fleet.tail)
    holes = {(gap["ticker"], gap["first_id"], gap["last_id"]) for gap in gaps(fleet, "trades", "restart")}
    assert {(ticker, first) for ticker, first, _ in holes} == {(name, before[name] + 1) for name in NAMES}
    until(
        lambda: holes <= {(g["ticker"], g["first_id"], g["last_id"]) for g in gaps(fleet, "trades", "filled")},
        lambda: f"every hole is repaired; {fleet.tail()}",
    )
    assert {gap["ticker"] for gap in gaps(fleet, "bbo", "restart")} == {"*", *NAMES[29:]}, "it has no ids"
    stop_up(fleet, up)


def test_up_opens_a_further_connection_for_a_new_listing_without_room(full: Fleet) -> None:
    up = run_up(full, ("conn",))
    pid = full.stats("conn")["pid"]
    full.sim.fault("listing", ticker="AAA-USDT")
    until(lambda: tickers_of(full, "conn.2") == {"AAA-USDT"}, full.tail)
    until(lambda: has_rows(full, "conn.2"), full.tail)
    assert full.stats("conn")["counters"]["listing_no_room"] == 1
    status = json.loads(mdcollector("status", "-c", full.config, "--json").stdout)
    assert set(status["connectors"]) == set(status["supervisor"]["processes"]) - {"parquet"} == {"conn", "conn.2"}
    assert not [problem for problem in status["problems"] if "AAA-USDT" in problem]
    full.sim.fault("listing", ticker="BBB-USDT")
    until(lambda: tickers_of(full, "conn.2") == {"AAA-USDT", "BBB-USDT"}, full.tail)
    stop_up(full, up)
    assert full.stats("conn")["pid"] == pid, "it went on"
    assert "every row that went in was written" in full.tail()
    first = {name: last_trades(full, name) for name in GROWN}
    written = {row["ticker"] for row in full.rows("trades", "conn.2")}
    assert written == first["conn.2"].keys() >= {"AAA-USDT"}

    up = run_up(full, GROWN)
    assert tickers_of(full, "conn") == set(FULL), "nobody moved"
    assert tickers_of(full, "conn.2") == {"AAA-USDT", "BBB-USDT"}
    assert {path.name for path in full.rings.glob("conn*")} == {"conn", "conn.2"}
    until(lambda: not any(full.stats(name)["trades_unproven"] for name in GROWN), full.tail)
    until(lambda: not any(full.stats(name)["books_invalid_count"] for name in GROWN), full.tail)
    full.sim.stop()
    stop_up(full, up)
    proof = full.prove()
    assert proof.ok, str(proof)


def test_what_a_limit_forbids_is_told_and_not_opened(full: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor runs here, so that its venue allows one connection; its processes are real ones."""
    monkeypatch.setattr(Okx, "LIMITS", msgspec.structs.replace(Okx.LIMITS, open_per_ip=1))
    monkeypatch.setattr(supervisor, "HOUSE_EVERY_S", 0.0)
    asked, house = list[None](), Assignment.house

    def count(*arguments: Any) -> Any:
        asked.append(None)
        return house(*arguments)

    monkeypatch.setattr(Assignment, "house", count)
    fleet = Supervisor(full.config, config.load(full.config))
    looks, listed = list[dict[str, Any]](), list[str]()
    give_up_at = time.monotonic() + 2 * WITHIN_S

    def enough() -> bool:
        assert time.monotonic() < give_up_at, full.brief()
        if not listed and full.stats("conn").get("state") == "connected":
            listed.append("AAA-USDT")
            full.sim.fault("listing", ticker=listed[0])
        if asked:
            looks.append(supervisor.status(full.rings))
        return len(looks) > 20

    fleet.run(enough)
    fleet.close()
    (problem,) = [finding for finding in judge(looks[-1]) if finding.kind == "no_connection"]
    assert problem.process == "conn"
    assert "AAA-USDT: no connection has room, and no further one is opened: " in problem.text
    assert "2 connections to okx at the same time; it allows 1" in problem.text
    assert len(asked) == 1, "not at every look"
    assert [child.name for child in fleet.connectors] == ["conn"]
    assert not (full.rings / "conn.2").exists()


def test_without_a_supervisor_health_says_that_units_have_to_be_made_anew(full: Fleet) -> None:
    conn = full.connect()
    until(lambda: all_deliver(full, conn, "conn"), full.tail)
    full.sim.fault("listing", ticker="AAA-USDT")

    def told() -> list[str]:
        problems = json.loads(mdcollector("status", "-c", full.config, "--json").stdout)["problems"]
        return [problem for problem in problems if "AAA-USDT" in problem]

    until(told, full.tail)
    assert told() == ["conn: AAA-USDT: no connection has room; run mdcollector units again and start the new unit"]
    made = mdcollector("units", "-c", full.config, "--out", full.directory / "units")
    assert made.returncode == 0, made.stderr
    target = (full.directory / "units" / "mdcollector.target").read_text()
    assert "mdcollector-connector@conn.service mdcollector-connector@conn.2.service" in target
    second = full.connect("conn.2")
    until(lambda: all_deliver(full, second, "conn.2"), full.tail)
    assert tickers_of(full, "conn.2") == {"AAA-USDT"}
    assert tickers_of(full, "conn") == set(FULL)
    assert told() == []
    assert conn.poll() is None
