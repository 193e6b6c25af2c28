"""The ledger of a simulated exchange: written whole, read back, replayed to a book; and repeatable by seed."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tools.sim.ledger import Ledger, LedgerWriter
from tools.sim.process import SimProcess

EPOCH = "1795000000000000"


def small(path: Path) -> LedgerWriter:
    writer = LedgerWriter(path)
    book = {"last": 10, "bids": [["99.0", "1.0"], ["98.0", "2.0"]], "asks": [["101.0", "1.0"]]}
    writer.record("start", seed=1, tickers={"A": {"book": book}})
    writer.line(
        "trade", "A", '{"kind":"trade","ticker":"A","id":"5","seq":5,"price":"99.0","qty":"1.0","side":"SELL","t":1}'
    )
    event = {"kind": "book", "ticker": "A", "stream": "fast", "first": 11, "last": 11, "prev": 10, "t": 1}
    writer.line("book", "A", json.dumps({**event, "bids": [["99.0", "0.0"]], "asks": []}))
    event |= {"first": 12, "last": 13, "prev": 11}
    writer.line("book", "A", json.dumps({**event, "bids": [["98.5", "3.0"]], "asks": [["101.0", "4.0"]]}))
    writer.line("book", "A", json.dumps({**event, "stream": "slow", "first": 11, "prev": 10, "bids": [], "asks": []}))
    writer.record("fault", name="drop", t=2)
    return writer


def test_a_book_is_replayed_to_any_update_id(tmp_path: Path) -> None:
    writer = small(tmp_path / "l")
    writer.close()
    ledger = Ledger(tmp_path / "l")
    assert ledger.book("A", 10) == ({"99.0": "1.0", "98.0": "2.0"}, {"101.0": "1.0"})
    assert ledger.book("A", 11) == ({"98.0": "2.0"}, {"101.0": "1.0"})
    assert ledger.book("A", 13) == ({"98.0": "2.0", "98.5": "3.0"}, {"101.0": "4.0"})
    with pytest.raises(KeyError, match="no depth event"):
        ledger.book("A", 12)
    with pytest.raises(KeyError, match="slow"):
        ledger.book("A", 11, "slow")
    assert ledger.streams("A") == ["fast", "slow"]
    assert [event["last"] for event in ledger.book_events("A")] == [11, 13]
    assert ledger.trades("A")["5"]["price"] == "99.0"
    assert ledger.faults_fired() == {"drop": 1}
    assert ledger.totals() == {"trade": {"A": 1}, "book": {"A": 3}}
    assert ledger.end is None


def test_a_ledger_that_is_still_written_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    writer = small(tmp_path / "l")
    writer.close()
    with open(tmp_path / "l", "a") as file:
        file.write('{"kind":"trade","tick')
    assert len(Ledger(tmp_path / "l").trades("A")) == 1


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("")
    with pytest.raises(ValueError, match="not a ledger"):
        Ledger(tmp_path / "l")


def test_a_writer_without_a_file_only_counts() -> None:
    writer = LedgerWriter(None)
    writer.line("trade", "A", "never looked at")
    assert not writer.writing
    assert writer.totals() == {"trade": {"A": 1}}


@pytest.mark.parametrize("venue", ["binance_spot", "binance_futures", "deribit"])
def test_the_same_seed_gives_the_same_ledger_and_another_one_another(venue: str, tmp_path: Path) -> None:
    def run(name: str, seed: int, *more: str) -> list[dict[str, Any]]:
        arguments = ("--rate", "max", "--epoch", EPOCH, "--seconds", "3", "--seed", str(seed), *more)
        with SimProcess(venue, *arguments, ledger=tmp_path / name) as sim:
            sim.wait()
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in ("seconds", "rate")} for row in rows]

    first = run("a", 5)
    assert len(first) > 2000
    assert first == run("b", 5)
    assert first != run("c", 6)


@pytest.mark.parametrize("venue", ["binance_spot", "binance_futures", "deribit"])
def test_a_paced_run_writes_what_the_fast_one_writes(venue: str, tmp_path: Path) -> None:
    arguments = ("--epoch", EPOCH, "--seconds", "2", "--seed", "5")
    with SimProcess(venue, *arguments, "--rate", "1000", ledger=tmp_path / "paced") as sim:
        sim.wait()
    with SimProcess(venue, *arguments, "--rate", "max", ledger=tmp_path / "fast") as sim:
        sim.wait()
    paced, fast = ((tmp_path / name).read_text().splitlines()[1:-1] for name in ("paced", "fast"))
    assert len(paced) > 1000
    assert paced == fast


@pytest.mark.parametrize("venue", ["binance_spot", "binance_futures", "deribit"])
def test_every_speed_of_the_book_ends_at_the_final_book(venue: str, tmp_path: Path) -> None:
    arguments = ("--rate", "max", "--epoch", EPOCH, "--seconds", "4.05")
    with SimProcess(venue, *arguments, ledger=tmp_path / "l") as sim:
        summary = sim.wait()
    ledger = sim.ledger()
    assert ledger.end is not None
    assert ledger.end["totals"] == summary["totals"]
    for ticker in ledger.tickers:
        _, final = ledger.final_book(ticker)
        for stream in ledger.streams(ticker):
            last = ledger.book_events(ticker, stream)[-1]["last"]
            assert ledger.book(ticker, last, stream) == final
            chain = ledger.book_events(ticker, stream)
            assert all(after["prev"] == before["last"] for before, after in itertools.pairwise(chain))
    for kind, numbers in ledger.totals().items():
        assert numbers == summary["totals"][kind]


@pytest.mark.parametrize(
    ("venue", "ticker", "interval"),
    [("binance_spot", "BTCUSDT", "1m"), ("binance_futures", "BTCUSDT", "1m"), ("deribit", "BTC-PERPETUAL", "1")],
)
def test_candles_in_the_ledger_hold_its_trades(venue: str, ticker: str, interval: str, tmp_path: Path) -> None:
    arguments = ("--rate", "max", "--epoch", EPOCH, "--seconds", "130", "--tickers", f"{ticker}:0.02")
    with SimProcess(venue, *arguments, ledger=tmp_path / "l") as sim:
        sim.wait(60)
    ledger = sim.ledger()
    candles = ledger.candles(ticker, interval)
    assert len(candles) == 2
    for start, candle in candles.items():
        inside = [t for t in ledger.trades(ticker).values() if start <= t["t"] < start + 60_000_000]
        assert candle["trades"] == len(inside) > 100
        assert (candle["open"], candle["close"]) == (inside[0]["price"], inside[-1]["price"])
