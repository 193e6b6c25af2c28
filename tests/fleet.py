"""A fleet of real processes for tests: a simulated exchange, connectors and writers, and the proof at the end.

Used by `test_fleet_*.py`. Nothing here sleeps for something to happen: every wait polls a condition with a deadline.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

from mdcollector.errors import RingError
from mdcollector.records import FEEDS
from mdcollector.ring import RingReader
from mdcollector.stats import read_stats
from tools.proof import Proof, load_rows, prove
from tools.sim.process import SimProcess

TICKERS = {
    "binance_spot": ("BTCUSDT", "ETHUSDT", "SOLUSDT"),
    "deribit": ("BTC-PERPETUAL", "ETH-PERPETUAL", "BTC_USDC-PERPETUAL"),
    "okx": ("BTC-USDT", "BTC-USDT-SWAP", "ETH-USD-SWAP"),
    "coinbase": ("BTC-USD", "ETH-USD", "SOL-USD"),
}
# What a fault's stream= must contain; trades.* is not chart.trades.
BOOK_STREAMS = {"binance_spot": "depth@100ms", "deribit": "book.", "okx": "books:", "coinbase": "level2:"}
TRADE_STREAMS = {"binance_spot": "@trade", "deribit": "trades.*", "okx": "trades:", "coinbase": "market_trades:"}
INTERVALS = {"coinbase": ["5m"]}  # of candles, where the venue has no 1m
NUMBERED_CONNECTIONS = ("coinbase",)  # one counter for all messages: a hole is everybody's, connections cannot overlap
ALL_FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles")
FEEDS_OF = {"okx": ALL_FEEDS[:4]}  # where one connection does not bring all of them
WITHIN_S = 30.0  # the machine that runs the tests may be slow; no test depends on how fast something is
POLL_S = 0.02
SEED = 1


def until(condition: Callable[[], Any], what: str | Callable[[], str], within_s: float = WITHIN_S) -> Any:
    """Poll until a condition holds; its value. `what` says what was waited for, at the moment when it is given up."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {within_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(POLL_S)
    return value


def mdcollector(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "mdcollector", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **(env or {})})


class Fleet:
    """One simulated exchange with a connector and a writer; as a context manager everything ends with it.

    A connector that needs several connections has a process for each, named by `connections`; its page is theirs taken
    together. The directory holds `ledger`, `fleet.toml`, `rings`, `data` and one log for each process.
    """

    NAME = "conn"

    def __init__(
        self,
        directory: Path,
        exchange: str,
        *,
        tickers: Sequence[str] = (),
        feeds: Sequence[str] = (),
        rate: float = 60,
        sim: Sequence[str] = (),
        sim_tickers: str = "",
        env: Mapping[str, str] | None = None,
        connections: Sequence[str] = (NAME,),
        **options: Any,
    ) -> None:
        self.directory, self.exchange, self.connections = directory, exchange, connections
        self.feeds = feeds = feeds or FEEDS_OF.get(exchange, ALL_FEEDS)
        self.rings, self.data, self.config = directory / "rings", directory / "data", directory / "fleet.toml"
        self.tickers = list(tickers or TICKERS[exchange])
        self.intervals = options.get("intervals", ())
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connectors: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []
        self._env = {**os.environ, **(env or {})}
        directory.mkdir(parents=True, exist_ok=True)
        arguments = ["--seed", str(SEED), "--rate", str(rate), *sim]
        if sim_tickers or not tickers:
            arguments += ["--tickers", sim_tickers or ",".join(f"{t}:1" for t in self.tickers)]
        self.sim = SimProcess(exchange, *arguments, ledger=directory / "ledger")
        connector = {
            "exchange": exchange, "tickers": self.tickers, "feeds": list(feeds), "ws_url": self.sim.ws_url,
            "rest_url": self.sim.rest_url, "reconnect_most_s": 0.3,
            "intervals": INTERVALS.get(exchange, ["1m"]), **options,
        }  # fmt: skip
        self.configure(connector)

    def configure(self, connector: Mapping[str, Any], writer: Mapping[str, Any] | None = None) -> None:
        """Write the fleet file."""
        file = {
            "rings": str(self.rings),
            "connectors": {self.NAME: dict(connector)},
            "writers": {"parquet": {"out": str(self.data), "roll_s": 0.5, **(writer or {})}},
        }
        self.config.write_text(tomli_w.dumps(file), encoding="utf-8")

    # Processes

    def spawn(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start `mdcollector ...`; what it prints goes to a log."""
        log = self.directory / f"process-{len(self.processes)}.log"
        self.logs.append(log)
        command = [sys.executable, "-m", "mdcollector", *map(str, arguments)]
        with open(log, "wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env={**self._env, **(env or {})})
        self.processes.append(process)
        return process

    def connect(self, name: str = NAME) -> subprocess.Popen[bytes]:
        return self.spawn("connect", name, "-c", self.config)

    def write(self) -> subprocess.Popen[bytes]:
        return self.spawn("write", "parquet", "-c", self.config)

    def start(self) -> Self:
        """A writer and a connector; returns when rows of every feed but candles come in, books are live, and every
        instrument that was named has traded: what an exchange loses before the first trade of a run leaves no hole.
        """
        self.writer = self.write()
        self.connectors = [self.connect(name) for name in self.connections]
        self.connector = self.connectors[0]
        self.wait_live()
        return self

    def pids(self) -> set[int]:
        """Processes that were started; who else has left a page behind is of an earlier life."""
        return {process.pid for process in self.processes}

    def wait_live(self) -> None:
        """Until the connector is connected, every book is live and every feed but candles has more rows than now."""
        before = {feed: self.published(feed) for feed in self.feeds if feed != "candles"}
        until(lambda: self._is_live(before), lambda: f"rows of all feeds and live books; {self.brief()}")

    def _is_live(self, before: Mapping[str, int]) -> bool:
        page = self.stats()
        assert not self.processes or self.processes[-1].poll() is None, self.tail()
        if page.get("state") != "connected" or page["pid"] not in self.pids():
            return False
        books = len(self.tickers) if "orderbook_l2" in self.feeds else 0
        if page["books"] < books or page["books_invalid_count"]:
            return False
        traded = {
            stream["ticker"] for stream in page["streams"].values() if stream["feed"] == "trades" and stream["data_ns"]
        }
        if "trades" in self.feeds and not traded >= {ticker for ticker in self.tickers if "*" not in ticker}:
            return False
        return all(page["rings"][feed]["published"] > rows for feed, rows in before.items())

    def stop(self, *processes: subprocess.Popen[bytes]) -> None:
        """Ask processes to end, in order, and wait for each."""
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(WITHIN_S)

    def refuse_one(self, feed: str, ticker: str) -> None:
        """The exchange takes one stream no more, and the connection is lost: until all others are subscribed anew and
        what is refused is named.
        """
        streams = self.stats()["streams"]
        (name,) = (n for n, stream in streams.items() if (stream["feed"], stream["ticker"]) == (feed, ticker))
        self.sim.fault("refuse", stream=name, rate=1)
        self.sim.fault("disconnect")
        self.wait_counter("stream_refused")
        others = streams.keys() - {name}
        until(
            lambda: {s for conn in self.sim.state()["connections"] for s in conn["subscriptions"]} == others,
            lambda: f"all but {name}; {self.sim.state()['connections']}",
        )
        until(lambda: f"refused {name}" in self.stats()["notes"], self.brief)
        assert [n for n, stream in self.stats()["streams"].items() if stream["refused"]] == [name]
        self.wait_more(feed, 20)
        assert self.counter("connections") == 2, (self.brief(), self.sim.state()["violations"])

    # What they say

    def stats(self, name: str = "") -> dict[str, Any]:
        """The stats page of a process, or of all connections together; {} as long as there is none."""
        try:
            pages = [read_stats(self.rings / n / "stats") for n in ([name] if name else self.connections)]
        except RingError:
            return {}
        return pages[0] if len(pages) == 1 else _together(pages)

    def counter(self, name: str) -> int:
        """A counter of the connector, 0 if it never counted."""
        return int(self.stats().get("counters", {}).get(name, 0))

    def counters(self, prefix: str) -> dict[str, int]:
        return {k: v for k, v in self.stats().get("counters", {}).items() if k.startswith(prefix)}

    def published(self, feed: str, name: str = "") -> int:
        published = 0
        for connection in [name] if name else self.connections:
            with suppress(RingError), RingReader(self.rings / connection, feed) as ring:
                published += ring.published
        return published

    def wait_more(self, feed: str, rows: int = 1) -> None:
        """Until a ring has so many rows more than now."""
        goal = self.published(feed) + rows
        until(lambda: self.published(feed) >= goal, lambda: f"{rows} more rows of {feed}; {self.brief()}")

    def wait_counter(self, name: str, at_least: int = 1) -> int:
        found = until(
            lambda: (count := self.counter(name)) >= at_least and count,
            lambda: f"{name} >= {at_least}; {self.brief()}",
        )
        return int(found)

    def ring_gaps(self, name: str = NAME) -> list[dict[str, Any]]:
        """Rows of the ring `gaps`, as dictionaries with text."""
        with RingReader(self.rings / name, "gaps") as ring:
            ring.seek("oldest")
            rows = ring.read()
            names = ring.names(rows)
            keys = ("first_id", "last_id", "from_time", "to_time", "repaired")
            return [
                {"feed": row["feed"].decode(), "ticker": ticker, "cause": row["cause"].decode(),
                 **{key: int(row[key]) for key in keys}}
                for row, ticker in zip(rows, names, strict=True)
            ]  # fmt: skip

    def best_id(self, ticker: str, name: str = NAME) -> int:
        """The exchange's id of the newest best prices in the ring, -1 without any."""
        with RingReader(self.rings / name, "bbo") as ring:
            ring.seek("oldest")
            rows = ring.read(ring.capacity)
            mine = rows["update_id"][ring.names(rows) == ticker]
            return int(mine[-1]) if len(mine) else -1

    def brief(self) -> str:
        page = self.stats()
        keys = ("state", "last_error", "counters", "samples", "books", "books_invalid", "fetches_waiting", "notes")
        return f"{ {key: page.get(key) for key in keys} }"

    def tail(self) -> str:
        """The end of every log."""
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in self.logs)

    # The end

    def settle(self, within_s: float = WITHIN_S) -> None:
        """Until nothing is being repaired: no request waits, every book is live."""
        until(
            lambda: (
                (page := self.stats()).get("state") == "connected"
                and not page["fetches_waiting"]
                and not page["books_invalid_count"]
            ),
            lambda: f"everything repaired; {self.brief()}",
            within_s,
        )

    def trades_are_proven(self) -> bool:
        """The connector that runs now says so itself; the page of one that was killed stays as it was."""
        page = self.stats()
        is_new = self.connector is self.writer or page.get("pid") == self.connector.pid
        return is_new and page["trades_unproven"] == 0

    def finish(self, *, book_stream: str = "", to_the_end: bool = True) -> Proof:
        """End in an order that loses nothing, and prove: the exchange first, then the connector, then the writer."""
        if to_the_end:
            until(self.trades_are_proven, lambda: f"every instrument's trades are proven up to now; {self.stats()}")
        self.settle()
        ended = self._disconnected()
        self.sim.stop()
        until(
            lambda: all(now > before for now, before in zip(self._disconnected(), ended, strict=True)),
            "the end of the exchange was noticed",
        )
        connectors = [self.connector, *self.connectors[1:]]
        self.stop(*connectors, self.writer)
        assert not any(process.returncode for process in connectors), self.tail()
        assert self.writer.returncode == 0, self.tail()
        return self.prove(book_stream=book_stream, to_the_end=to_the_end)

    def _disconnected(self) -> list[int]:
        """How often each connection ended."""
        return [self.stats(name).get("counters", {}).get("disconnected", 0) for name in self.connections]

    def prove(self, *, book_stream: str = "", to_the_end: bool = False) -> Proof:
        return prove(
            self.sim.ledger(), self.data, self.rings, self.exchange, feeds=self.feeds, intervals=self.intervals,
            book_stream=book_stream, to_the_end=to_the_end,
        )  # fmt: skip

    def rows(self, feed: str, name: str = NAME) -> list[dict[str, Any]]:
        """Rows of a table, in order."""
        assert feed in FEEDS
        return load_rows(self.data, feed).get(name, [])

    def holes(self) -> list[dict[str, Any]]:
        """Rows of the ledger; of a book's hole the row where it was seen and the one that goes on to the snapshot as one."""
        holes: list[dict[str, Any]] = []
        newest: dict[str, dict[str, Any]] = {}  # of each book
        for row in self.rows("gaps"):
            before = newest.get(row["ticker"])
            if row["feed"] == "orderbook_l2" and before is not None and before["last_id"] + 1 == row["first_id"]:
                before["last_id"] = row["last_id"]
                continue
            holes.append(row)
            if row["feed"] == "orderbook_l2":
                newest[row["ticker"]] = row
        return holes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait(WITHIN_S)
        if self.sim.process.poll() is None:
            self.sim.kill()
        elif self.sim.process.stdout is not None and not self.sim.process.stdout.closed:
            self.sim.process.communicate()
        if kind is not None:
            sys.stderr.write(self.tail() + "\n")


def _together(pages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The pages of several connections as one: what is counted is added up, what is listed is joined."""
    whole: dict[str, Any] = {}
    for page in pages:
        for key, value in page.items():
            if isinstance(value, dict):
                have = whole.setdefault(key, {})
                for name, item in value.items():
                    have[name] = have.get(name, 0) + item if isinstance(item, int) else item
            elif isinstance(value, list):
                whole[key] = whole.get(key, []) + value
            elif key.startswith(("books", "fetches", "trades_", "packets")):
                whole[key] = whole.get(key, 0) + value
            elif key == "state":  # the one that is not there yet
                whole[key] = value if whole.get(key, "connected") == "connected" else whole[key]
            else:
                whole.setdefault(key, value)
    return whole
