"""The ledger of a simulated exchange: JSON lines that say what the exchange really did, and the class that reads them.

Written by `server.py` and the venue files, read by tests, the demo and whoever judges a recording. Prices and
quantities stand in it as the exact text that was sent.

Kinds of lines, each with `t` in microseconds of the exchange's clock:

    start    seed, options and per ticker the instrument and the book that everything starts from
    trade    ticker, id, seq, price, qty, side (BUY or SELL, the taker's)
    aggtrade ticker, id, first, last, price, qty, side (only where the venue aggregates)
    off_book ticker, seq, type: what has a trade's counter and is no execution (only where the venue tells it)
    liquidation  ticker, price, qty, side (only where the venue tells them)
    book     ticker, stream, first, last, prev, bids, asks: one depth event of one speed; quantity 0 removes the level
    bbo      ticker, id, bid, bid_qty, ask, ask_qty
    ticker   ticker and the numbers of one 24 hour statistics message, in the venue's words; those that only an
             occasional subscriber asks for (Deribit's raw ones) while somebody is subscribed to them
    first_ticker  the same, told to one client only: a new subscriber that is greeted with it, or one that polls
    candle   ticker, interval, open_time, open, high, low, close, volume, trades, closed; every closed candle, and the
             open versions while somebody is subscribed to them
    fault    name and what was hit
    conn     event (open, close), conn, and path or reason
    end      totals per kind and ticker, and per ticker the final book
"""

import json
import mmap
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

import msgspec

from mdcollector.errors import StorageError

FLUSH_S = 0.2

Sides = tuple[dict[str, str], dict[str, str]]  # bids, asks: price text -> quantity text


@dataclass(frozen=True)
class Dialect:
    """How a venue's ledger is compared with tables: its unit of time, stream names and the words of its statistics."""

    unit_us: int  # times of the venue are whole multiples of it
    book_stream: str
    ticker_words: Mapping[str, str]  # column -> word in the ledger's data, a dot goes one object deeper
    bbo_has_id: bool
    bbo_has_time: bool
    candle_has_time: bool
    candle_counts_trades: bool
    intervals: Mapping[str, str]  # interval in the tables -> in the ledger, where they differ
    candle_says_closed: bool = False  # the venue says which version of a candle is the last, without counting trades
    trades_have_counter: bool = True  # else the rows know a trade by its id only
    polled: bool = False  # tables hold what polls happened to see: every closed candle, but not every version or price


class LedgerWriter:
    """Appends lines and counts them. Without a path it only counts, so that nothing is formatted in vain."""

    def __init__(self, path: Path | None) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._path = path
        self._file: TextIO | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "w", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115 (closed in close)
            except OSError as error:
                raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StorageError:
        """Ends the simulation: half of the truth is none."""
        return StorageError(f"{self._path}: the ledger cannot be written: {error.strerror}")

    @property
    def writing(self) -> bool:
        return self._file is not None

    def line(self, kind: str, ticker: str, text: str) -> None:
        """Append one ready line of a frequent kind; `text` is its JSON object."""
        self.counts[kind, ticker] += 1
        if self._file is not None:
            try:
                self._file.write(text + "\n")
            except OSError as error:
                raise self._unwritable(error) from error

    def record(self, kind: str, **values: Any) -> None:
        """Append one line of a rare kind."""
        text = json.dumps({"kind": kind, **values}, separators=(",", ":")) if self.writing else ""
        self.line(kind, str(values.get("ticker", "")), text)

    def totals(self) -> dict[str, dict[str, int]]:
        """Lines so far: kind -> ticker -> number."""
        totals: dict[str, dict[str, int]] = defaultdict(dict)
        for (kind, ticker), number in sorted(self.counts.items()):
            totals[kind][ticker] = number
        return dict(totals)

    def flush(self) -> None:
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise self._unwritable(error) from error


class Lines:
    """Lines of one kind and ticker in the order in which they happened, each decoded when it is asked for.

    Only where they begin is held in memory: the ledger of a long run is larger than what a machine has.
    """

    def __init__(self, file: mmap.mmap | bytes) -> None:
        self._file = file
        self._starts = array("Q")

    def append(self, start: int) -> None:
        self._starts.append(start)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        line: dict[str, Any] = msgspec.json.decode(self._text(self._starts[number]))
        return line

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def values(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """These values of every line, None where it has none: far less work than whole lines, at least two names."""
        decode = msgspec.json.Decoder(msgspec.defstruct("Line", [(name, Any, None) for name in names], gc=False)).decode
        take = attrgetter(*names)
        for start in self._starts:
            yield take(decode(self._text(start)))

    def _text(self, start: int) -> bytes:
        return self._file[start : self._file.find(b"\n", start)]


class _Head(msgspec.Struct, gc=False):
    kind: str
    ticker: str = ""


class Ledger:
    """A ledger: what is rare in memory, the lines of frequent kinds in the file until they are asked for.

    Opened on a ledger that is still being written it holds the whole lines up to that moment; `end` is then None.
    """

    def __init__(self, path: Path) -> None:
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] | None = None
        self.faults: list[dict[str, Any]] = []
        self.connections: list[dict[str, Any]] = []
        with open(path, "rb") as file:
            empty = not file.seek(0, 2)
            self._file = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._lines: dict[tuple[str, str], Lines] = defaultdict(lambda: Lines(self._file))
        decode, at = msgspec.json.Decoder(_Head).decode, 0
        while (end := self._file.find(b"\n", at)) >= 0:  # without one: the last line, that is still being written
            head = decode(self._file[at:end])
            if head.kind in ("start", "end", "fault", "conn", "listing"):
                self._take(head.kind, msgspec.json.decode(self._file[at:end]))
            else:
                self._lines[head.kind, head.ticker].append(at)
            at = end + 1
        if not self.start:
            raise ValueError(f"{path}: not a ledger: no line of kind start")

    def _take(self, kind: str, row: dict[str, Any]) -> None:
        if kind == "start":
            self.start = row
        elif kind == "end":
            self.end = row
        elif kind == "fault":
            self.faults.append(row)
        elif kind == "conn":
            self.connections.append(row)
        else:
            self.start["tickers"][row["ticker"]] = row["instrument"]

    @property
    def tickers(self) -> list[str]:
        return list(self.start["tickers"])

    def lines(self, kind: str, ticker: str) -> Lines:
        """Lines of a kind for a ticker, not yet decoded."""
        return self._lines.get((kind, ticker)) or Lines(self._file)

    def rows(self, kind: str, ticker: str) -> list[dict[str, Any]]:
        """All lines of a kind for a ticker, in the order in which they happened; decoded anew each time."""
        return list(self.lines(kind, ticker))

    def trades(self, ticker: str) -> dict[str, dict[str, Any]]:
        """Trades by id, in order."""
        return {row["id"]: row for row in self.rows("trade", ticker)}

    def aggtrades(self, ticker: str) -> dict[str, dict[str, Any]]:
        """Aggregated trades by id, in order."""
        return {row["id"]: row for row in self.rows("aggtrade", ticker)}

    def streams(self, ticker: str) -> list[str]:
        """The speeds in which depth events of a ticker were published, the finest first."""
        seen = Counter(row["stream"] for row in self.rows("book", ticker))
        return [stream for stream, _ in seen.most_common()]

    def book_events(self, ticker: str, stream: str | None = None) -> list[dict[str, Any]]:
        """Depth events of one speed; without a name, of the finest one that there is."""
        rows = self.rows("book", ticker)
        if stream is None:
            names = self.streams(ticker)
            if not names:
                return []
            stream = names[0]
        return [row for row in rows if row["stream"] == stream]

    def bbo(self, ticker: str) -> dict[int, dict[str, Any]]:
        """Best bid and offer by update id."""
        return {row["id"]: row for row in self.rows("bbo", ticker)}

    def candles(self, ticker: str, interval: str) -> dict[int, dict[str, Any]]:
        """Closed candles of an interval by open time (us)."""
        rows = self.rows("candle", ticker)
        return {row["open_time"]: row for row in rows if row["interval"] == interval and row["closed"]}

    def books(self, ticker: str, stream: str | None = None) -> Iterator[tuple[int, Sides]]:
        """The book before the first depth event and after each one, with its update id.

        The two dictionaries are the same objects each time; copy what is to be kept.
        """
        first = self.start["tickers"][ticker]["book"]
        sides: Sides = (dict(first["bids"]), dict(first["asks"]))
        yield first["last"], sides
        for event in self.book_events(ticker, stream):
            for book, levels in zip(sides, (event["bids"], event["asks"]), strict=True):
                for price, qty in levels:
                    if Decimal(qty):
                        book[price] = qty
                    else:
                        book.pop(price, None)
            yield event["last"], sides

    def book(self, ticker: str, update_id: int, stream: str | None = None) -> Sides:
        """The whole book of a ticker after the event whose last update id is `update_id`."""
        for last, sides in self.books(ticker, stream):
            if last == update_id:
                return dict(sides[0]), dict(sides[1])
            if last > update_id:
                break
        raise KeyError(f"{ticker}: no depth event of {stream or 'the finest stream'} ends at update id {update_id}")

    def final_book(self, ticker: str) -> tuple[int, Sides]:
        """Update id and book at the end of the run."""
        if self.end is None:
            raise ValueError("the ledger has no end yet")
        book = self.end["books"][ticker]
        return book["last"], (dict(book["bids"]), dict(book["asks"]))

    def totals(self) -> dict[str, dict[str, int]]:
        """Lines that were read: kind -> ticker -> number."""
        totals: dict[str, dict[str, int]] = defaultdict(dict)
        for (kind, ticker), lines in sorted(self._lines.items()):
            totals[kind][ticker] = len(lines)
        return dict(totals)

    def faults_fired(self) -> Counter[str]:
        """How often each fault was fired."""
        return Counter(row["name"] for row in self.faults)
