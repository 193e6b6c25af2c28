"""The venue's clock: what is measured holds the truth within its uncertainty, is stored with the data, and shown."""

import json
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mdcollector import clocks
from mdcollector.clocks import DRIFT, VenueClock
from mdcollector.emit import Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import Fetch, Options, venue_class
from mdcollector.exchanges.binance import BinanceSpot
from mdcollector.exchanges.gmx import Gmx
from mdcollector.health import judge
from mdcollector.records import Exchange
from mdcollector.stats import clock_text
from tests.fleet import Fleet, mdcollector, until

NOW_US = 1_790_000_000_000_000


class Measuring:
    """A clock whose answers, round trips and times the test sets."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type = BinanceSpot) -> None:
        self.emit = Emit(folder, "c", Exchange.BINANCE_SPOT, ["trades"], semaphore=False)
        self.venue = kind(self.emit, Options(), [])
        self.now_s, self.ahead_ns, self.round_trip_us = 100.0, 0, 0.0
        monkeypatch.setattr(clocks.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(clocks, "_wall_ahead_ns", lambda: self.ahead_ns)
        self.clock = VenueClock(self.venue, 10.0, lambda: int(self.round_trip_us * 1000))

    def ask(self, after_s: float = 10.0) -> Fetch | None:
        self.now_s += after_s
        self.clock.tick()
        return self.venue.wants.popleft() if self.venue.wants else None

    def answer(self, offset_ms: int, round_trip_us: float) -> None:
        """The venue, whose clock is so far ahead, answered half way."""
        fetch = self.ask()
        assert fetch is not None
        assert fetch.answer is not None
        self.round_trip_us = round_trip_us
        self.emit.packet(NOW_US * 1000, self.emit.clock())
        fetch.answer(json.dumps({"serverTime": int(NOW_US - round_trip_us / 2) // 1000 + offset_ms}).encode())

    def rows(self) -> list[tuple[Any, ...]]:
        rows = self.emit.rings["clocks"].recent_rows(0)
        return [tuple(row) for row in rows[["source", "offset_us", "uncertainty_us", "step_us"]].tolist()]


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measuring]:
    made = Measuring(tmp_path, monkeypatch)
    yield made
    made.emit.close()


def test_offset_and_uncertainty_follow_from_the_round_trip(one: Measuring) -> None:
    assert one.clock.snapshot() == {"steps": 0, "last_step_us": 0}
    one.answer(250, 8_000)
    ((source, offset, unsure, step),) = one.rows()
    assert (source, unsure, step) == (b"request", (8_000 + 1_000) / 2, 0)
    assert abs(offset - 250_000) <= 500, "what is cut off to a ms is half a ms later on average"
    assert one.clock.snapshot()["source"] == "request"
    assert clock_text(one.clock.snapshot()) == "+250.5 ± 4.5 ms"


def test_the_surest_measurement_counts_and_becomes_less_sure(one: Measuring) -> None:
    one.answer(0, 2_000)
    one.answer(0, 40_000)
    said = one.clock.snapshot()
    assert said["uncertainty_us"] == pytest.approx(1_500 + 10 * DRIFT * 1e6, abs=0.1)
    assert said["age_s"] == 0
    assert [row[2] for row in one.rows()] == [1_500, 20_500], "each is stored as it was measured"


def test_measurements_that_contradict_each_other_are_of_a_clock_that_was_set(one: Measuring) -> None:
    one.answer(0, 2_000)
    one.answer(2_000, 40_000)
    assert one.clock.snapshot()["offset_us"] == pytest.approx(2_000_000, abs=1000)


def test_a_step_is_told_shifts_what_is_known_and_is_measured_anew_at_once(one: Measuring) -> None:
    one.answer(0, 2_000)
    one.clock.look_for_step()
    assert len(one.rows()) == 1
    one.ahead_ns += 3_000_000_000
    one.clock.look_for_step()
    one.clock.look_for_step()
    _, (source, offset, unsure, step) = one.rows()
    assert (source, step) == (b"step", 3_000_000)
    assert offset == pytest.approx(-3_000_000, abs=1000)
    assert unsure == pytest.approx(1_500)
    assert one.emit.counters["clock_steps"] == 1
    assert one.clock.snapshot()["last_step_us"] == 3_000_000
    assert one.ask(0.1) is not None
    one.ahead_ns += 50_000  # what slewing does
    one.clock.look_for_step()
    assert one.emit.counters["clock_steps"] == 1


def test_a_step_before_anything_is_measured_is_a_row_without_an_offset(one: Measuring) -> None:
    one.ahead_ns -= 10_000_000
    one.clock.look_for_step()
    ((_, offset, unsure, step),) = one.rows()
    assert (math.isnan(offset), math.isnan(unsure), step) == (True, True, -10_000)


def test_a_venue_that_refuses_leaves_a_bound_from_its_events(one: Measuring) -> None:
    fetch = one.ask()
    assert fetch is not None
    assert fetch.failed is not None
    fetch.failed(404, b"not here")
    assert "HTTP 404 not here" in one.venue.notes["clock"]
    one.emit.packet(NOW_US * 1000, one.emit.clock())
    one.emit.trade(one.emit.instrument("A"), NOW_US + 700_000, 1, 1.0, 1.0, 1)
    one.ask()
    ((source, offset, unsure, _),) = one.rows()
    assert (source, offset, math.isnan(unsure)) == (b"events", 700_000, True)
    assert clock_text(one.clock.snapshot()) == ">= +700.0 ms"
    one.answer(0, 2_000)
    assert "clock" not in one.venue.notes
    assert one.clock.snapshot()["source"] == "request"


def test_a_venue_without_a_time_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Measuring(tmp_path, monkeypatch, Gmx)
    assert one.ask() is None
    assert one.rows() == [], "and without rows nothing is known"
    one.emit.close()


def _ms(*path: str) -> Callable[[Any], int]:
    def found(body: Any) -> int:
        for key in path:
            body = body[int(key) if key.isdigit() else key]
        return int(body) * 1000

    return found


@pytest.mark.parametrize(
    ("exchange", "body", "truth"),
    [
        ("binance_spot", '{"serverTime":1499827319559}', _ms("serverTime")),
        ("binance_futures", '{"serverTime":1499827319559}', _ms("serverTime")),
        ("okx", '{"code":"0","msg":"","data":[{"ts":"1597026383085"}]}', _ms("data", "0", "ts")),
        (
            "bybit_linear",
            '{"retCode":0,"retMsg":"OK","result":{"timeSecond":"1688639403","timeNano":"1688639403423213947"},"time":1}',
            lambda body: int(body["result"]["timeNano"]) // 1000,
        ),
        ("deribit", '{"jsonrpc":"2.0","id":1,"result":1733338800000}', _ms("result")),
        (
            "deribit", '{"jsonrpc":"2.0","result":1733338800000,"usIn":1733338800000100,"usOut":1733338800000123}',
            lambda body: body["usOut"],
        ),
        (
            "coinbase_exchange", '{"iso":"2026-07-01T23:47:25.201Z","epoch":1782949645.201}',
            lambda body: int(datetime.fromisoformat(body["iso"]).timestamp() * 1000) * 1000,
        ),
    ],
)  # fmt: skip
def test_times_are_read_as_the_venue_writes_them(exchange: str, body: str, truth: Callable[[Any], int]) -> None:
    kind = venue_class(exchange)
    assert kind.TIME_PATH
    us, cut_off_us = kind.server_time(body.encode())
    assert us == truth(json.loads(body))
    assert cut_off_us == (1 if us % 1000 else 1000)
    for senseless in (b"{}", b"[]", b'{"serverTime":"x"}', b'{"code":"0","msg":"","data":[]}', b'{"result":null}'):
        with pytest.raises((FrameError, ValueError)):
            kind.server_time(senseless)


@pytest.mark.parametrize(
    ("exchange", "body"),
    [
        ("binance_spot", '{"serverTime":%s}'),
        ("binance_futures", '{"serverTime":%s}'),
        ("okx", '{"code":"0","msg":"","data":[{"ts":"%s"}]}'),
        ("bybit_linear", '{"retCode":0,"retMsg":"OK","result":{"timeNano":"%s"}}'),
        ("deribit", '{"jsonrpc":"2.0","id":1,"result":%s}'),
        ("deribit", '{"jsonrpc":"2.0","result":1733338800000,"usOut":%s}'),
        ("coinbase_exchange", '{"iso":"%s-07-01T23:47:25.201Z"}'),
    ],
)
def test_an_impossible_time_is_refused(exchange: str, body: str) -> None:
    """Arithmetic with it would end the process."""
    for impossible in ("9" * 19, "9" * 400, "-1"):
        with pytest.raises((FrameError, msgspec.DecodeError)):
            venue_class(exchange).server_time((body % impossible).encode())


def test_the_offset_of_a_fleet_is_true_within_its_uncertainty_and_stored_and_shown(tmp_path: Path) -> None:
    """Simulator and connector have the same clock, so the truth is known: zero, and the skew while there is one."""
    with Fleet(tmp_path, "binance_spot", feeds=("trades", "bbo"), clock_s=0.2) as fleet:
        fleet.start()

        def clock() -> dict[str, Any]:
            return dict(fleet.stats().get("clock", {}))

        until(lambda: clock().get("source") == "request", fleet.brief)
        said = clock()
        assert abs(said["offset_us"]) <= said["uncertainty_us"] < 10_000_000, said
        fleet.sim.fault("clock_skew", ms=5_000, seconds=60)
        until(lambda: clock()["offset_us"] > 2_000_000, lambda: f"the skew is seen; {clock()}")
        said = clock()
        assert abs(said["offset_us"] - 5_000_000) <= said["uncertainty_us"], said
        status = json.loads(mdcollector("status", "--json", "--rings", fleet.rings).stdout)
        assert [f.kind for f in judge({**status, "problems": []}) if f.kind.startswith("clock")] == ["clock_offset"]
        assert "± " in mdcollector("status", "--rings", fleet.rings).stdout
        fleet.stop(fleet.connector, fleet.writer)
        rows = fleet.rows("clocks")
    assert {row["source"] for row in rows} == {"request"}
    assert {row["ticker"] for row in rows} == {"*"}
    for row in rows:
        truth = 5_000_000 if row["offset_us"] > 2_500_000 else 0
        assert abs(row["offset_us"] - truth) <= row["uncertainty_us"], row
    assert {row["offset_us"] > 2_500_000 for row in rows} == {True, False}
