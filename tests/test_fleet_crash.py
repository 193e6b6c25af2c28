"""kill -9 at random moments: of connectors, of writers, of the supervisor. What the ledger says is in the tables, once."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from fleet import TICKERS, Fleet, until

KILLS = 10
both_venues = pytest.mark.parametrize("exchange", tuple(TICKERS))


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def is_back(fleet: Fleet) -> bool:
    """The process that the supervisor runs now is connected: the page of a killed one says so for ever."""
    page, processes = fleet.stats(), fleet.stats("_supervisor").get("processes", {})
    return bool(page.get("state") == "connected" and page["pid"] == processes[Fleet.NAME]["child_pid"])


@pytest.mark.crash
@both_venues
def test_kill_9_of_connector_and_writer_at_random_moments(tmp_path: Path, exchange: str) -> None:
    """Rows in Parquet = ledger: none twice; trades all there; the other feeds miss only what `gaps` records."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"random seed {seed}")
    with Fleet(tmp_path, exchange, rate=100) as fleet:
        fleet.start()
        for _ in range(KILLS):
            time.sleep(rng.uniform(0.0, 1.2))  # the moment is what is random here
            if rng.random() < 0.6:
                kill(fleet.connector.pid)
                fleet.connector.wait()
                fleet.connector = fleet.connect()
            else:
                kill(fleet.writer.pid)
                fleet.writer.wait()
                fleet.writer = fleet.write()
        fleet.wait_live()
        fleet.wait_more("trades", 20)
        fleet.wait_more("bbo", 20)
        proof = fleet.finish()
        assert proof.ok, str(proof)
        assert proof.feeds["trades"].explained == 0
        assert not [cause for feed, cause in proof.gaps if feed == "trades"], str(proof)


@pytest.mark.crash
@both_venues
def test_kill_9_while_trades_are_being_repaired(tmp_path: Path, exchange: str) -> None:
    """The hole is in the ledger, its repair is on the way, the process dies: the next life repairs it, once."""
    with Fleet(tmp_path, exchange, rate=100) as fleet:
        fleet.start()
        fleet.sim.fault("slow_rest", stream="rades", ms=3000, count=2)
        fleet.sim.fault("gap", stream="trade", n=3)
        fleet.wait_counter("gap_trades_sequence")
        kill(fleet.connector.pid)
        fleet.connector.wait()
        fleet.connector = fleet.connect()
        fleet.wait_live()
        fleet.wait_more("trades", 20)
        proof = fleet.finish()
        assert proof.ok, str(proof)
        assert proof.feeds["trades"].repaired >= 3
        assert not [cause for feed, cause in proof.gaps if feed == "trades"], str(proof)


@pytest.mark.crash
def test_kill_9_of_the_supervisor_leaves_no_orphans_and_loses_nothing(tmp_path: Path) -> None:
    """Its processes end in order without it; a new supervisor goes on where they ended."""
    with Fleet(tmp_path, "binance_spot") as fleet:
        up = fleet.spawn("up", "-c", fleet.config)
        until(lambda: fleet.published("trades") > 20, lambda: f"rows; {fleet.tail()}")
        children = psutil.Process(up.pid).children()
        assert len(children) == 2
        kill(up.pid)
        up.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive, "orphans"
        before = fleet.published("trades")
        up = fleet.spawn("up", "-c", fleet.config)
        until(lambda: fleet.published("trades") > before + 20, lambda: f"rows; {fleet.tail()}")
        fleet.connector = fleet.writer = up
        until(lambda: is_back(fleet), "the newest connector is connected and says so itself")
        proof = fleet.finish()
        assert proof.ok, str(proof)


@pytest.mark.crash
def test_the_supervisor_restarts_what_is_killed(tmp_path: Path) -> None:
    with Fleet(tmp_path, "deribit") as fleet:
        up = fleet.spawn("up", "-c", fleet.config)
        until(lambda: fleet.published("trades") > 20, lambda: f"rows; {fleet.tail()}")
        for _ in range(2):
            for child in psutil.Process(up.pid).children():
                before = fleet.published("trades")
                kill(child.pid)
                until(
                    lambda before=before: fleet.published("trades") > before + 5, lambda: f"rows again; {fleet.tail()}"
                )
        pages = until(
            lambda: (
                all((p := list(fleet.stats("_supervisor")["processes"].values()))[i]["starts"] == 3 for i in (0, 1))
                and p
            ),
            "both were started three times",
        )
        assert {page["last_exit"] for page in pages} == {-signal.SIGKILL}
        until(lambda: is_back(fleet), "the newest connector is connected and says so itself")
        fleet.connector = fleet.writer = up
        proof = fleet.finish()
        assert proof.ok, str(proof)
        assert "every row that went in was written" in fleet.tail()
