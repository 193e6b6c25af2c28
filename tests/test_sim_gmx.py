"""The simulated GMX: its answers against its ledger, by a plain client; mdreplay and mdcompare against it.

There is no third-party client to hold it against: cryptofeed has no GMX.
"""

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import tomli_w
import zstandard
from fleet import Fleet, until

from mdcollector.errors import RingError
from mdcollector.ring import RingReader
from tools.proof import load_rows, prove
from tools.sim.process import SimProcess

SECONDS = {"1m": 60, "5m": 300, "15m": 900, "1h": 3600, "4h": 14_400, "1d": 86_400}
DECIMALS = {"ETH": 18, "BTC": 8, "SOL": 9, "PEPE": 18}
FEEDS = ("candles", "tickers")
WITHIN_S = 60.0


def get(sim: SimProcess, path: str, **query: Any) -> tuple[int, Any]:
    """Status and body; numbers with a point stay text."""
    try:
        with urlopen(f"{sim.rest_url}{path}?{urlencode(query)}", timeout=10) as answer:
            return answer.status, json.loads(answer.read(), parse_float=str)
    except HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimProcess]:
    ledger = tmp_path_factory.mktemp("gmx") / "ledger"
    arguments = ("--rate", "20", "--tickers", "ETH:1,BTC:1,SOL:0.5,PEPE:1", "--limit", "history=120")
    with SimProcess("gmx", *arguments, ledger=ledger) as running:
        yield running


Versions = dict[tuple[int, bool], list[tuple[Decimal, ...]]]


def versions(sim: SimProcess, ticker: str, interval: str) -> Versions:
    """What each candle was, open and closed, in order, as far as the ledger has been written."""
    found: Versions = {}
    for row in sim.ledger().rows("candle", ticker):
        if row["interval"] == interval:
            prices = tuple(Decimal(row[key]) for key in ("open", "high", "low", "close"))
            found.setdefault((row["open_time"] // 1_000_000, row["closed"]), []).append(prices)
    return found


@pytest.mark.parametrize("interval", SECONDS)
@pytest.mark.parametrize("ticker", ["ETH", "PEPE"])
def test_candles_are_those_of_the_ledger(sim: SimProcess, ticker: str, interval: str) -> None:
    """Newest first, one bucket after the other, no volume; the first one is open, the others are closed for good."""
    status, answer = get(sim, "/prices/candles", tokenSymbol=ticker, period=interval, limit=50)
    assert (status, answer["period"], len(answer["candles"])) == (200, interval, 50)
    starts = [row[0] for row in answer["candles"]]
    assert {a - b for a, b in pairwise(starts)} == {SECONDS[interval]}
    assert starts[0] % SECONDS[interval] == 0
    said = {start: tuple(Decimal(str(price)) for price in prices) for start, *prices in answer["candles"]}
    is_open = starts[0], False
    until(lambda: said[starts[0]] in versions(sim, ticker, interval).get(is_open, ()), "the ledger has the open one")
    real = versions(sim, ticker, interval)
    assert [real[start, True] for start in starts[1:]] == [[said[start]] for start in starts[1:]]
    assert all(low <= min(first, last) <= max(first, last) <= high for first, high, low, last in said.values())


def test_prices_are_those_of_the_ledger(sim: SimProcess) -> None:
    status, answer = get(sim, "/prices/tickers")
    assert status == 200
    assert [row["tokenSymbol"] for row in answer] == list(DECIMALS)
    for row in answer:
        ticker, scale = row["tokenSymbol"], Decimal(10) ** (30 - DECIMALS[row["tokenSymbol"]])

        def line(ticker: str = ticker, at_ms: int = row["updatedAt"]) -> Any:
            return next((r["data"] for r in sim.ledger().rows("ticker", ticker) if r["t"] // 1000 == at_ms), None)

        real = until(line, "the ledger has this price")
        for word in ("min", "max", "median"):
            digits = row[f"{word}Price"]
            assert digits.isdecimal()
            assert Decimal(digits) / scale == Decimal(real[word])
        assert row["updatedAt"] // 1000 == row["timestamp"]


def test_tokens_and_other_resources(sim: SimProcess) -> None:
    tokens = get(sim, "/tokens")[1]["tokens"]
    assert {token["symbol"]: token["decimals"] for token in tokens} == DECIMALS
    assert get(sim, "/ping") == (200, {"ok": True})
    assert {row["tokenSymbol"] for row in get(sim, "/prices/24h")[1]} == set(DECIMALS)
    for query in ({"tokenSymbol": "BTC", "period": "2m"}, {"tokenSymbol": "X", "period": "1m"},
                  {"tokenSymbol": "BTC", "period": "1m", "limit": 10_001}):  # fmt: skip
        status, answer = get(sim, "/prices/candles", **query)
        assert status == 400
        assert answer["error"]
    assert get(sim, "/nothing")[0] == 404
    assert get(sim, "/ws")[0] == 404, "there is no WebSocket"


def test_two_hosts_of_one_seed_say_the_same() -> None:
    """What fail-over relies on: history and market depend on seed and epoch alone."""
    arguments = ("--seed", "5", "--epoch", str(1_795_000_000_000_000), "--tickers", "ETH:1", "--rate", "200", "--hold")
    with SimProcess("gmx", *arguments) as one, SimProcess("gmx", *arguments) as two:
        for interval in SECONDS:
            query = {"tokenSymbol": "ETH", "period": interval, "limit": 300}
            assert get(one, "/prices/candles", **query) == get(two, "/prices/candles", **query)
        assert len(get(one, "/prices/candles", tokenSymbol="ETH", period="1d")[1]["candles"]) == 1000, "the default"
    with SimProcess("gmx", "--seed", "6", *arguments[2:]) as other, SimProcess("gmx", *arguments) as one:
        query = {"tokenSymbol": "ETH", "period": "1m", "limit": 300}
        assert get(one, "/prices/candles", **query) != get(other, "/prices/candles", **query)


def test_faults_of_a_polled_venue() -> None:
    with SimProcess("gmx", "--tickers", "ETH:1", "--rate", "100", "--limit", "requests_max=40") as sim:
        query = {"tokenSymbol": "ETH", "period": "1m", "limit": 5}
        before = get(sim, "/prices/candles", **query)[1]["candles"]
        sim.fault("revise", ticker="ETH")
        revised = until(
            lambda: (now := get(sim, "/prices/candles", **query)[1]["candles"])[1:] != before[1:] and now,
            "the revision",
        )
        changed = [a for a, b in zip(revised, before, strict=True) if a[0] == b[0] and a != b and a is not revised[0]]
        assert [row[0] for row in changed] == [before[1][0]]
        sim.fault("bad_body", kind="empty", stream="tokenSymbol=ETH")
        assert get(sim, "/prices/tickers")[1] != [], "it was aimed at the candles"
        assert get(sim, "/prices/candles", **query)[1] == {"period": "1m", "candles": []}
        sim.fault("bad_body", kind="half")
        with pytest.raises(json.JSONDecodeError):
            get(sim, "/tokens")
        first = get(sim, "/prices/tickers")[1]
        sim.fault("stale_rest")
        until(lambda: sim.state()["actions"] > 0 and get(sim, "/ping")[0] == 200, "time goes on")
        state = sim.state()
        sim.wait_state(lambda now: now["ledger"]["ticker"]["ETH"] > state["ledger"]["ticker"]["ETH"] + 1)
        assert get(sim, "/prices/tickers")[1][0]["updatedAt"] >= first[0]["updatedAt"]
        stale = get(sim, "/prices/tickers")[1]
        assert get(sim, "/prices/tickers")[1] == stale
        while (status := get(sim, "/ping")[0]) == 200:
            pass
        assert status == 429
        assert sim.state()["violations"]["requests"] >= 1


# mdreplay and mdcompare


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"tools.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )


def entries(path: Path) -> list[dict[str, Any]]:
    raw = zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read()
    return [json.loads(line) for line in raw.splitlines()]


@contextmanager
def replaying(*arguments: object) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "tools.replay", "serve", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


def test_what_was_recorded_is_replayed_into_the_same_rows(tmp_path: Path) -> None:
    """mdreplay record, then serve with a connector in front of it: rows agree with the ledger of the recorded exchange."""
    recording, ledger = tmp_path / "r.jsonl.zst", tmp_path / "ledger"
    with SimProcess("gmx", "--tickers", "ETH:1,BTC:1", "--rate", "100", ledger=ledger) as sim:
        result = run("replay", "record", "gmx", "ETH", "BTC", "--out", recording, "--rest-url", sim.rest_url,
                     "--seconds", 6, "--every", 0.5, "--json")  # fmt: skip
        sim.stop()
        real = sim.ledger()
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["failed_requests"] == 0
    lines = entries(recording)
    assert len(lines) == summary["bodies"] >= 3 * 8
    assert {line["dir"] for line in lines} == {"http"}
    with replaying(recording, "--exchange", "gmx", "--speed", "1") as ready:
        config = {
            "rings": "rings",
            "connectors": {"conn": {
                "exchange": "gmx", "tickers": ["ETH", "BTC"], "feeds": list(FEEDS), "rest_url": ready["rest_url"],
                "poll_s": 0.5, "backfill": 900, "late_s": 0,
            }},
            "writers": {"parquet": {"out": "data", "roll_s": 0.5}},
        }  # fmt: skip
        (tmp_path / "fleet.toml").write_text(tomli_w.dumps(config))
        last_us = (
            max(row["updatedAt"] for line in lines if "tickers" in line["url"] for row in json.loads(line["raw"]))
            * 1000
        )
        processes = [collecting(tmp_path, "write", "parquet"), collecting(tmp_path, "connect", "conn")]
        try:
            until(
                lambda: newest_us(tmp_path / "rings" / "conn") == last_us,
                "the last recorded price is in the ring",
                WITHIN_S,
            )
            for process in reversed(processes):
                process.terminate()
                assert process.wait(WITHIN_S) == 0
        finally:
            for process in processes:
                process.kill()
    proof = prove(real, tmp_path / "data", tmp_path / "rings", "gmx", feeds=FEEDS)
    assert proof.ok, str(proof)
    closed = Counter(row["ticker"] for row in load_rows(tmp_path / "data", "candles")["conn"] if row["closed"])
    assert min(closed["ETH"], closed["BTC"]) >= 900


def collecting(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "mdcollector", *arguments, "-c", str(directory / "fleet.toml")])


def newest_us(rings: Path) -> int:
    try:
        with RingReader(rings, "tickers") as ring:
            ring.seek("oldest")
            return int(ring.read()["timestamp"].max(initial=0))
    except RingError:
        return 0


def test_a_polled_recording_cannot_be_played_without_a_pace(tmp_path: Path) -> None:
    with SimProcess("gmx", "--tickers", "ETH:1") as sim:
        path = tmp_path / "r.jsonl.zst"
        result = run("replay", "record", "gmx", "ETH", "--out", path, "--rest-url", sim.rest_url, "--seconds", 1)
        assert result.returncode == 0, result.stderr
    result = run("replay", "serve", path, "--exchange", "gmx", "--speed", "max")
    assert result.returncode == 2
    assert "is polled" in result.stderr


def test_mdcompare_finds_candles_the_same_and_a_changed_one(tmp_path: Path) -> None:
    """Closed candles of the ring against own requests, by token and open time; one changed number is found."""
    with Fleet(
        tmp_path, "gmx", tickers=["ETH", "BTC"], sim_tickers="ETH:1,BTC:1", feeds=FEEDS, poll_s=1,
        backfill=50, sim=("--limit", "history=60"),
    ) as fleet:  # fmt: skip
        fleet.start()
        until(lambda: fleet.published("candles") >= 2 * 51, fleet.brief)
        arguments = ("gmx", "--rings", fleet.rings, "--rest-url", fleet.sim.rest_url, "--seek", "oldest",
                     "--seconds", 3, "--json", "--out")  # fmt: skip
        result = run("compare", *arguments, tmp_path / "same")
        summary = json.loads(result.stdout)
        assert (result.returncode, summary["verdict"], summary["findings"]) == (0, "identical", 0), result.stdout
        assert summary["feeds"]["candles"]["identical"] >= 2 * 50
        assert summary["not_compared"] == []
        fleet.sim.fault("revise", ticker="ETH")
        fleet.wait_counter("candle_revised", 1)
        again = run("compare", *arguments, tmp_path / "revised")
        with open(tmp_path / "revised" / "differences.csv") as file:
            kinds = [(row["ticker"], row["kind"]) for row in csv.DictReader(file)]
        # The ring has the version before the revision as well, the venue only the one behind it.
        assert sorted(kinds) == [("ETH", "different"), ("ETH", "revised")], again.stdout
        fleet.stop(fleet.connector, fleet.writer)
