"""What only a polled venue has: poll instead of stream, fail-over between hosts, back-off, revised candles. F20.

Real processes against simulated hosts; two hosts of one seed and one epoch say the same. The minute ends some seconds
after an exchange begins, so that each fleet sees candles close.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fleet import SEED, WITHIN_S, Fleet, until

from mdcollector import transport
from mdcollector.budget import Budget
from mdcollector.emit import Emit
from mdcollector.errors import EXIT_CONFIG
from mdcollector.exchanges import Fetch, Options
from mdcollector.exchanges.gmx import CANDLES_EVERY_S, TICKERS_EVERY_S, Gmx
from mdcollector.ring import RingReader
from mdcollector.transport import Fetcher
from tools.proof import Proof, prove
from tools.sim.process import SimProcess

MINUTE_US = 60_000_000
ENDS_IN_US = 8_000_000  # of the minute in which an exchange begins
TICKERS = ("ETH", "BTC", "PEPE")
INTERVALS = {"1m": 60, "5m": 300, "15m": 900, "1h": 3600, "4h": 14_400, "1d": 86_400}
SIM_TICKERS = ",".join(f"{ticker}:1" for ticker in TICKERS)
FEEDS = ("candles", "tickers")

Start = Callable[..., Fleet]


def epoch_us() -> int:
    """A moment near now, so that answers are up to date, shortly before the end of a minute."""
    return round(time.time_ns() / 1000 / MINUTE_US) * MINUTE_US - ENDS_IN_US


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A fleet on GMX; `begun=False` leaves starting it to the test. It is ended with the test."""
    with ExitStack() as stack:

        def make(*, sim: tuple[str, ...] = (), begun: bool = True, epoch: int = 0, **options: Any) -> Fleet:
            settings = {"poll_s": 1.0, "backfill": 100, "stale_s": 30, **options}
            names = {"tickers": TICKERS, "sim_tickers": SIM_TICKERS, "feeds": FEEDS}
            sim = ("--epoch", str(epoch or epoch_us()), *sim)
            fleet = Fleet(tmp_path / "gmx", "gmx", sim=sim, **{**names, **settings})
            stack.enter_context(fleet)
            return fleet.start() if begun else fleet

        yield make


@pytest.fixture
def second_host(tmp_path: Path) -> Iterator[Callable[[int], SimProcess]]:
    """Another host that says the same as the fleet's exchange, if it was given the same epoch."""
    with ExitStack() as stack:

        def make(epoch: int) -> SimProcess:
            arguments = ("--seed", str(SEED), "--rate", "60", "--tickers", SIM_TICKERS, "--epoch", str(epoch))
            return stack.enter_context(SimProcess("gmx", *arguments, ledger=tmp_path / "second-ledger"))

        yield make


def candles(fleet: Fleet, **wanted: Any) -> list[dict[str, Any]]:
    """Rows of the ring `candles` that have these values."""
    with RingReader(fleet.rings / fleet.NAME, "candles") as ring:
        ring.seek("oldest")
        batches = [ring.read()]
        while len(batches[-1]):
            batches.append(ring.read())
        found = []
        for batch in batches:
            names = batch.dtype.names or ()
            for values, ticker in zip(batch.tolist(), ring.names(batch), strict=True):
                row = {**dict(zip(names, values, strict=True)), "ticker": ticker}
                row["interval"] = row["interval"].decode()
                if all(row[key] == value for key, value in wanted.items()):
                    found.append(row)
        return found


def tickers_of(fleet: Fleet) -> set[str]:
    return {stream["ticker"] for stream in fleet.stats()["streams"].values()}


def has_data(fleet: Fleet, ticker: str) -> bool:
    """Every stream of a token is confirmed and brought rows since it was asked for."""
    streams = [s for s in fleet.stats()["streams"].values() if s["ticker"] == ticker]
    return bool(streams) and all(s["acknowledged_ns"] and s["data_ns"] > s["requested_ns"] for s in streams)


def finish(fleet: Fleet, intervals: tuple[str, ...] = ("1m",)) -> Proof:
    """End the fleet in order and compare everything."""
    fleet.finish(to_the_end=False)
    proof = prove(fleet.sim.ledger(), fleet.data, fleet.rings, "gmx", feeds=FEEDS, intervals=intervals)
    assert proof.ok, str(proof)
    assert fleet.sim.summary["violations"] == {}, "no host ever had to say 429"
    return proof


def test_all_intervals_are_backfilled_and_closed_candles_follow(start: Start) -> None:
    """1000 closed candles of each interval, the open one with its versions, and the final one when its minute is over."""
    fleet = start(intervals=list(INTERVALS), backfill=1000, poll_s=4)
    boundary = -(-int(fleet.sim.ledger().start["t"]) // MINUTE_US) * MINUTE_US
    for ticker in TICKERS:
        last = {"ticker": ticker, "interval": "1m", "open_time": boundary - MINUTE_US, "closed": 1}
        until(lambda last=last: candles(fleet, **last), f"the candle of {ticker} that ends at {boundary} is closed")
    until(lambda: all(s["acknowledged_ns"] for s in fleet.stats()["streams"].values()), "every stream is confirmed")
    fleet.wait_more("tickers", len(TICKERS))
    proof = finish(fleet, tuple(INTERVALS))
    rows = fleet.rows("candles")
    for ticker in TICKERS:
        for interval, seconds in INTERVALS.items():
            times = [
                row["open_time"] for row in rows
                if row["closed"] and (row["ticker"], row["interval"]) == (ticker, interval)
            ]  # fmt: skip
            assert len(times) >= 1000, (ticker, interval)
            assert times == list(range(times[0], times[-1] + 1, seconds * 1_000_000)), (
                "each once, in order, none left out"
            )
    assert {(row["volume"], row["trades"]) for row in rows} == {(None, None)}
    assert not fleet.rows("gaps")
    assert proof.feeds["tickers"].equal >= 2 * len(TICKERS), "some at the start, some at the end"
    notes = fleet.stats()["notes"]
    assert notes == {"decimal rule": "USD = value / 10^(30 - decimals)"}


def test_a_host_that_dies_is_replaced_by_the_next(start: Start, second_host: Callable[[int], SimProcess]) -> None:
    """F20. The first host is killed in the middle; closed candles have no hole, and the status says who answers."""
    epoch = epoch_us()
    other = second_host(epoch)
    fleet = start(epoch=epoch, rest_fallbacks=[other.rest_url])
    assert not other.state()["paths"], "the second host is asked only when the first one does not answer"
    fleet.sim.kill()
    fleet.wait_counter("http_host_changed")
    assert fleet.stats()["notes"]["REST host"] == other.rest_url
    fleet.wait_more("tickers", 2 * len(TICKERS))
    boundary = epoch + ENDS_IN_US
    for ticker in TICKERS:
        last = {"ticker": ticker, "interval": "1m", "open_time": boundary - MINUTE_US, "closed": 1}
        until(lambda last=last: candles(fleet, **last), f"the candle of {ticker} that ends at {boundary} is closed")
    assert fleet.counter("connections") == 1, "one host of two was down: the venue was not"
    fleet.sim = other
    finish(fleet)


def test_without_any_host_it_waits_and_goes_on(start: Start) -> None:
    """All hosts refuse for a while: that is a lost connection, recorded as a hole; what was missed is fetched again."""
    fleet = start()
    fleet.sim.fault("rest_error", status=503, rate=1, count=12)
    fleet.wait_counter("disconnected")
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    finish(fleet)
    assert {(gap["feed"], gap["cause"]) for gap in fleet.rows("gaps")} == {
        ("candles", "reconnect"),
        ("tickers", "reconnect"),
    }


def test_revised_candles_are_new_versions_of_the_row(start: Start) -> None:
    """F20."""
    fleet = start(intervals=["1m", "5m"])
    fleet.sim.fault("revise", ticker="ETH")
    fleet.wait_counter("candle_revised", 2)
    proof = finish(fleet, ("1m", "5m"))
    revised = Counter(
        (row["interval"], row["open_time"]) for row in fleet.rows("candles") if row["ticker"] == "ETH" and row["closed"]
    )
    assert sorted(interval for (interval, _), count in revised.items() if count == 2) == ["1m", "5m"]
    assert max(revised.values()) == 2
    assert proof.faults == {"revise": 1}


def test_answers_that_cannot_be_believed(start: Start) -> None:
    """F20 and more: empty, halved, mistyped and absurd answers, HTML, refusals, slowness. All counted, nothing lost."""
    fleet = start()
    fleet.sim.fault("bad_body", every=0.2, count=18)
    fleet.sim.fault("slow_rest", every=1, ms=300, count=3)
    fleet.sim.fault("rest_error", every=1, status=500, count=3)
    fleet.sim.wait_state(lambda state: [fault["fired"] for fault in state["faults"]] == [18, 3, 3], WITHIN_S)
    fleet.wait_live()
    counters = fleet.stats()["counters"]
    finish(fleet)
    assert counters["refused_malformed"] >= 3
    assert counters["refused_wrong_type"] >= 1
    assert counters["http_failed"] == 3
    assert counters.get("candles_empty", 0) + counters.get("tickers_empty", 0) >= 1


def test_a_limit_is_obeyed(start: Start) -> None:
    """F4. 429 with Retry-After: no request before its end."""
    fleet = start()
    fleet.sim.fault("ban", status=429, seconds=3)
    fleet.wait_counter("http_rate_limited")
    fleet.wait_more("tickers", len(TICKERS))
    state = fleet.sim.state()
    assert state["http_429"] >= 1
    assert state["requests_before_retry_after"] == 0
    finish(fleet)


def test_a_host_whose_answers_are_old_is_left(start: Start, second_host: Callable[[int], SimProcess]) -> None:
    """The first host stands still since ten minutes; it answers quickly and in the right form."""
    other = second_host(epoch_us())
    fleet = start(begun=False, epoch=epoch_us() - 10 * MINUTE_US, rest_fallbacks=[other.rest_url])
    fleet.writer, fleet.connector = fleet.write(), fleet.connect()
    fleet.wait_counter("host_behind")
    fleet.wait_live()
    assert fleet.counter("stale_answer") > 0
    assert fleet.stats()["notes"]["REST host"] == other.rest_url
    newest = other.ledger().rows("ticker", "ETH")[0]["t"]
    assert min(int(row["timestamp"]) for row in fleet.rows("tickers") or [{"timestamp": newest}]) >= newest
    fleet.stop(fleet.connector, fleet.writer)
    assert fleet.connector.returncode == 0, fleet.tail()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_another_life_publishes_no_candle_twice(start: Start, how: signal.Signals) -> None:
    fleet = start(intervals=["1m", "1h"])
    fleet.connector.send_signal(how)
    fleet.connector.wait(WITHIN_S)
    before = Counter((row["ticker"], row["interval"], row["open_time"]) for row in candles(fleet, closed=1))
    fleet.connector = fleet.connect()
    fleet.wait_live()
    until(lambda: all(s["acknowledged_ns"] for s in fleet.stats()["streams"].values()), "every stream is confirmed")
    finish(fleet, ("1m", "1h"))
    after = Counter((row["ticker"], row["interval"], row["open_time"]) for row in candles(fleet, closed=1))
    assert max(after.values()) == 1
    assert before.items() <= after.items()
    assert {gap["cause"] for gap in fleet.rows("gaps")} == {"restart"}


@pytest.mark.parametrize("rule", [1, 2])
def test_prices_are_scaled_as_the_candles_say(start: Start, rule: int) -> None:
    """The rule is told by comparison; also without `medianPrice`, and with a bare list of tokens."""
    fleet = start(sim=("--limit", f"rule={rule}", "--limit", "median=0", "--limit", "bare_tokens=1"))
    finish(fleet)
    assert fleet.rows("tickers")


def test_prices_that_fit_no_rule_are_refused(start: Start) -> None:
    fleet = start(begun=False, sim=("--limit", "rule=3"))
    process = fleet.connect()
    assert process.wait(WITHIN_S) == EXIT_CONFIG
    assert "no decimal rule fits within 5%" in fleet.tail()
    assert fleet.published("tickers") == 0


def test_it_stops_in_order_while_nobody_answers(start: Start) -> None:
    fleet = start()
    fleet.sim.kill()
    fleet.wait_counter("disconnected")
    fleet.stop(fleet.connector, fleet.writer)
    assert (fleet.connector.returncode, fleet.writer.returncode) == (0, 0), fleet.tail()
    assert fleet.stats()["state"] == "stopped"


# The list of tokens


def test_the_list_of_tokens_is_followed_while_running(start: Start) -> None:
    """F14. A new token is polled, one that is gone is left; listed again, it goes on where it ended: no row twice."""
    fleet = start(tickers=["*", "!DOGE"], instruments_s=0.5)
    for ticker in ("SOL", "DOGE"):
        fleet.sim.fault("listing", ticker=ticker)
    until(lambda: has_data(fleet, "SOL"), lambda: f"SOL is recorded; {fleet.brief()}")
    fleet.sim.fault("delist", ticker="ETH")
    until(lambda: "ETH" not in tickers_of(fleet), lambda: f"ETH is left; {fleet.brief()}")
    told = len(candles(fleet, ticker="ETH"))
    fleet.wait_more("tickers", 6)
    assert len(candles(fleet, ticker="ETH")) == told, "nobody asks for it"
    fleet.sim.fault("listing", ticker="ETH")
    until(lambda: has_data(fleet, "ETH"), lambda: f"ETH is recorded again; {fleet.brief()}")
    counters = fleet.stats()["counters"]
    finish(fleet)
    assert (counters["instruments_taken"], counters["instruments_left"]) == (2, 1)
    assert not {name for name in counters if name.startswith("refused_")}, counters
    rows = [(row["ticker"], row["active"]) for row in fleet.rows("instruments")]
    assert sorted(rows[:3]) == [(ticker, True) for ticker in sorted(TICKERS)]
    assert rows[3:] == [("SOL", True), ("ETH", False), ("ETH", True)]
    assert {row["ticker"] for row in fleet.rows("tickers")} == {*TICKERS, "SOL"}
    assert {(gap["feed"], gap["ticker"], gap["cause"]) for gap in fleet.rows("gaps")} == {
        ("tickers", "ETH", "listing"), ("candles", "ETH", "listing"),
    }  # fmt: skip


# Without processes


def test_polls_are_gentle(tmp_path: Path) -> None:
    """A minute of ticks: each candle stream and the prices are asked for as often as intended, and spread."""
    streams = [s for ticker in TICKERS for s in Gmx.streams_of(ticker, FEEDS, Options(intervals=tuple(INTERVALS)))]
    venue = Gmx(Emit(tmp_path, "t", Gmx.EXCHANGE, FEEDS, semaphore=False), Options(intervals=tuple(INTERVALS)), streams)
    venue._decimals, venue._closes = {"0x": 18}, dict.fromkeys(TICKERS, 1.0)
    venue.opened()
    began = time.time_ns()
    asked: Counter[str] = Counter()
    at_once = 0
    for tenth in range(600):
        venue.tick(began + tenth * 100_000_000)
        fetches = [want.key for want in venue.wants if isinstance(want, Fetch)]
        at_once = max(at_once, len(fetches))
        asked.update(fetches)
        venue.wants.clear()
    candle_keys = {stream.name for stream in streams if stream.feed == "candles"}
    assert asked.keys() == {*candle_keys, "/prices/tickers"}
    assert {asked[key] for key in candle_keys} == {60 // int(CANDLES_EVERY_S)}
    assert asked["/prices/tickers"] == 60 // int(TICKERS_EVERY_S)
    assert at_once <= 3


def test_a_round_without_an_answer_is_followed_by_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hot loop: both hosts are asked once, then it waits, longer each time and at most as long as told."""
    urls: list[str] = []
    waits: list[tuple[int, float]] = []

    class Enough(Exception):
        pass

    async def refuse(_session: object, url: str, _limits: object, tries: int, _header: str) -> tuple[int, bytes]:
        assert tries == 1
        urls.append(url)
        raise TimeoutError

    async def wait(seconds: float) -> None:
        waits.append((len(urls), seconds))
        if len(waits) == 12:
            raise Enough

    monkeypatch.setattr(transport, "get", refuse)
    monkeypatch.setattr(transport.asyncio, "sleep", wait)
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    emit = Emit(tmp_path, "t", Gmx.EXCHANGE, FEEDS, semaphore=False)
    fetcher = Fetcher(
        emit, Gmx(emit, Options(), []), ["http://a", "http://b"], Budget(tmp_path / "b", 1000, 1), None, tries=1,
        wait_most_s=20,
    )  # fmt: skip
    fetcher.want(Fetch("k", "/ping", 1))

    def nothing() -> None:
        raise AssertionError("there was no answer")

    with pytest.raises(Enough):
        asyncio.run(fetcher.run(lambda: None, nothing))
    assert urls[:4] == ["http://a/ping", "http://b/ping", "http://a/ping", "http://b/ping"]
    assert [count for count, _ in waits][:3] == [2, 3, 4]
    assert [seconds for _, seconds in waits][:1] == [1.0]
    assert [seconds for _, seconds in waits] == sorted(seconds for _, seconds in waits)
    assert waits[-1][1] == 20
    assert emit.counters["http_failed"] == len(urls)
