"""Which connection carries which instrument, while the list changes between two lives. Real processes."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, until

from mdcollector.ring import RingReader

NAMES = [f"T{n:02d}-USDT" for n in range(35)]  # a connection of OKX carries 29 books
BOTH = ("conn.1", "conn.2")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    tickers = ",".join(f"{name}:1" for name in NAMES)
    feeds = ("trades", "orderbook_l2", "bbo")
    with Fleet(
        tmp_path / "x", "okx", tickers=["*-USDT"], sim_tickers=tickers, feeds=feeds, rate=20, connections=BOTH,
        instruments_s=600.0,
    ) as made:  # fmt: skip
        yield made


def tickers_of(fleet: Fleet, name: str) -> set[str]:
    return {stream["ticker"] for stream in fleet.stats(name).get("streams", {}).values()}


def all_deliver(fleet: Fleet, process: subprocess.Popen[bytes], name: str) -> bool:
    page = fleet.stats(name)
    return page.get("pid") == process.pid and all(
        s["data_ns"] for s in page["streams"].values() if s["feed"] == "trades"
    )


def last_trades(fleet: Fleet, name: str) -> dict[str, int]:
    """Ticker -> the newest trade id in a ring."""
    with RingReader(fleet.rings / name, "trades") as ring:
        ring.seek("oldest")
        rows = ring.read(ring.capacity)
        return {ticker: int(trade) for ticker, trade in zip(ring.names(rows), rows["trade_id"], strict=True)}


def gaps(fleet: Fleet, feed: str, cause: str) -> list[dict[str, Any]]:
    return [g for name in BOTH for g in fleet.ring_gaps(name) if (g["feed"], g["cause"]) == (feed, cause)]


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
    """One connection becomes two, since books are wanted as well: every hole between is told, and repaired."""
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
    up = run_up(fleet, BOTH)
    until(lambda: not any(fleet.stats(name)["trades_unproven"] for name in BOTH), fleet.tail)
    holes = {(gap["ticker"], gap["first_id"], gap["last_id"]) for gap in gaps(fleet, "trades", "restart")}
    assert {(ticker, first) for ticker, first, _ in holes} == {(name, before[name] + 1) for name in NAMES}
    until(
        lambda: holes <= {(g["ticker"], g["first_id"], g["last_id"]) for g in gaps(fleet, "trades", "filled")},
        lambda: f"every hole is repaired; {fleet.tail()}",
    )
    assert {gap["ticker"] for gap in gaps(fleet, "bbo", "restart")} == set(NAMES), "it has no ids"
    stop_up(fleet, up)
