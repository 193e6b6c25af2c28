"""mdtail: looks at rings while they are written, as a table, JSON, CSV or trade prints, or at their rates and lag.

A program for people and pipes (`mdtail --help`); reads rings only, through `RingReader`, and never holds up a writer.
"""

import contextlib
import fnmatch
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, TextIO

import click
import msgspec
import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table

from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS, RingError
from mdcollector.options import Finite
from mdcollector.records import ASK, BID, BUY, FEEDS, SELL, UINT32_MAX, Action, Column, Exchange, Feed, Flag
from mdcollector.ring import RingReader, Rows
from mdcollector.stats import clock_text, venue_clock

BATCH_ROWS = 8192  # held of one ring at most: bounds memory, and is far beyond what numpy needs to be quick
LOOK_S = 0.5  # how often to look for new and replaced rings, and for what has to be said
STOP_S = 3.0  # how long the line being written may take once somebody asked to stop
RATE_S = 1.0  # how often --rates measures
RATE_READ_S = 0.05  # how often it reads meanwhile, so that it is not lapped by its own idleness
RATE_BATCHES_MAX = 16  # read of one ring at a time, so that a flood cannot hold up the view
RATE_SAMPLES_MAX = 1 << 18  # latencies kept of one ring between two measurements
HEADER_EVERY = 40  # lines of a table on a terminal until its header comes again

Start = Literal["newest", "oldest"] | int
Level = Literal["debug", "info", "warning", "error"]
Line = tuple[str, str]  # feed, text of one row

_EXCHANGES = np.array([Exchange(i).name if i in Exchange._value2member_map_ else str(i) for i in range(256)], object)
_ACTIONS = np.array([Action(i).name if i in Action._value2member_map_ else str(i) for i in range(256)], object)
_FLAGS = ["|".join(f.name.lower() for f in Flag if f & i and f.name) for i in range(256)]
# `table` and not `feed`: gaps rows have a column of that name, the feed that has the hole.
_CONNECTOR, _TABLE = (Column(name, "", "category", "") for name in ("connector", "table"))
_encode = msgspec.json.Encoder().encode


class Say:
    """What has to be said beside the rows, on stderr."""

    def __init__(self, level: Level = "info", log_format: Literal["text", "json"] = "text") -> None:
        order: tuple[Level, ...] = ("debug", "info", "warning", "error")
        self._shown = order[order.index(level) :]
        self._json = log_format == "json"

    def __call__(self, level: Level, text: str) -> None:
        if level in self._shown:
            at = datetime.now(UTC).isoformat()
            line = _encode({"time": at, "level": level, "logger": "mdtail", "message": text}).decode()
            click.echo(line if self._json else f"mdtail: {text}", err=True)


# ---------------------------------------------------------------- rings


class Source:
    """One ring that is followed: its reader, the rows held of it, and what was already said about it."""

    def __init__(
        self, directory: Path, feed: str, patterns: Sequence[re.Pattern[str]], start: Start, end: bool
    ) -> None:
        self.reader, self.directory = RingReader(directory, feed), directory
        self.feed = self.reader.feed
        self.connector = self.reader.connector
        self.label = f"{self.connector}/{feed}"
        self.reader.seek(start)
        self.end = self.reader.published if end else None  # where to stop without --follow
        self.names: np.ndarray[Any, np.dtype[np.object_]] = np.empty(0, object)
        self._patterns = patterns
        self._wanted = np.empty(0, bool)
        self.pending: Rows = np.empty(0, self.feed.dtype)
        self.arrivals: np.ndarray[Any, np.dtype[np.int64]] = np.empty(0, np.int64)
        self.seen_to = 0  # time of arrival of the last row read
        self.torn = 0  # rows behind the sealed part that do not carry their own number
        self.epoch = self.reader.epoch
        self.told_lapped = self.told_damaged = 0

    @property
    def damaged(self) -> int:
        return self.reader.damaged + self.torn

    @property
    def caught_up(self) -> bool:
        return self.reader.position >= (self.reader.published if self.end is None else self.end)

    def read(self, rows_max: int = BATCH_ROWS) -> Rows:
        """The next rows: compared with their checksum where the writer has sealed them, else as they are."""
        reader = self.reader
        if self.end is not None:
            rows_max = min(rows_max, self.end - reader.position)
        if rows_max <= 0:
            return np.empty(0, self.feed.dtype)
        rows = reader.read_sealed(rows_max)
        if not len(rows):
            rows = reader.read(rows_max)
            whole = rows["seq_id"] == np.arange(reader.position - len(rows), reader.position)
            if not whole.all():
                self.torn += int(len(rows) - whole.sum())
                rows = rows[whole]
        if len(rows):
            self._learn_names(int(rows["ticker"].max()))
        return rows

    def fill(self) -> None:
        """Hold the next wanted rows, if none are held."""
        if len(self.pending) or self.caught_up:
            return
        rows = self.read()
        if not len(rows):
            return
        # A clock may have been set back; the order of a ring's own rows is that of its sequence numbers.
        arrivals = np.maximum(np.maximum.accumulate(rows["rcv_timestamp"]), self.seen_to)
        self.seen_to = int(arrivals[-1])
        if self._patterns:
            wanted = self._wanted[rows["ticker"]]
            rows, arrivals = rows[wanted], arrivals[wanted]
        self.pending, self.arrivals = rows, arrivals

    def take(self, count: int) -> Rows:
        rows, self.pending, self.arrivals = self.pending[:count], self.pending[count:], self.arrivals[count:]
        return rows

    def _learn_names(self, code: int) -> None:
        if code < len(self.names):
            return
        tickers = self.reader.tickers
        if code >= len(tickers):
            raise RingError(f"{self.reader.path}: a row names instrument {code} of {len(tickers)}: damaged")
        self.names = np.array(tickers, dtype=object)
        self._wanted = np.array([any(p.match(t.casefold()) for p in self._patterns) for t in tickers], dtype=bool)

    def state(self) -> str:
        """open, closed (its writer ended in order) or dead (its writer is gone without a word)."""
        if not self.reader.is_open:
            return "closed"
        try:
            return "open" if self.reader.writer_alive else "dead"
        except FileNotFoundError:
            return "gone"


class Rings:
    """All rings that are selected, now and later: finds them, reopens replaced ones, gives up damaged ones."""

    def __init__(
        self,
        root: Path,
        feeds: Sequence[str],
        connectors: Sequence[str],
        patterns: Sequence[re.Pattern[str]],
        say: Say,
        *,
        follow: bool,
    ) -> None:
        self.root, self.feeds, self.connectors, self.patterns, self.say = root, feeds, connectors, patterns, say
        self.follow = follow
        self.sources: dict[Path, Source] = {}
        self.findings = False
        self._bad: dict[Path, tuple[tuple[int, int, int], ...]] = {}
        self._gone: list[Source] = []  # replaced or removed; what they still hold is shown first

    def _directories(self) -> Iterator[Path]:
        try:
            here = [self.root] if any(self.root.glob("*.meta")) else []
            for directory in here + sorted(path for path in self.root.iterdir() if path.is_dir()):
                if not self.connectors or directory.name in self.connectors:
                    yield directory
        except OSError as error:
            self._give_up(self.root, f"{self.root}: cannot be listed: {error.strerror}")

    @staticmethod
    def _signature(meta: Path) -> tuple[tuple[int, int, int], ...]:
        signature = []
        for path in (meta, meta.with_suffix(".data")):
            with contextlib.suppress(OSError):
                found = path.stat()
                signature.append((found.st_ino, found.st_size, found.st_mtime_ns))
        return tuple(signature)

    def _give_up(self, meta: Path, text: str) -> None:
        """Say what is wrong with a ring, once until its files change, and go on with the others."""
        signature = self._signature(meta)
        if self._bad.get(meta) != signature:
            self._bad[meta] = signature
            self.findings = True
            self.say("error", text)

    def look(self, start: Start, *, first: bool) -> None:
        """Open what is new, reopen what was replaced, say what happened since the last look."""
        for meta, source in list(self.sources.items()):
            self._tell(source)
            if source.reader.replaced and source.caught_up:
                del self.sources[meta]
                self._gone.append(source)
                self.say("info", f"{source.label}: its files were replaced or removed")
        for directory in self._directories():
            for feed in self.feeds:
                meta = directory / f"{feed}.meta"
                if meta in self.sources or not meta.exists() or self._bad.get(meta) == self._signature(meta):
                    continue
                try:
                    # What appears later is new from its first row on.
                    source = Source(directory, feed, self.patterns, start if first else "oldest", not self.follow)
                except RingError as error:
                    self._give_up(meta, str(error))
                except OSError as error:
                    self._give_up(meta, f"{meta}: cannot be read: {error.strerror}")
                else:
                    self._bad.pop(meta, None)
                    self.sources[meta] = source
                    if not first:
                        self.say("info", f"{source.label}: found")

    def _tell(self, source: Source) -> None:
        reader = source.reader
        if reader.lapped > source.told_lapped:
            self.findings = True
            new, source.told_lapped = reader.lapped - source.told_lapped, reader.lapped
            self.say("warning", f"{source.label}: lapped, {new} rows were overwritten before they could be read")
        if source.damaged > source.told_damaged:
            self.findings = True
            new, source.told_damaged = source.damaged - source.told_damaged, source.damaged
            self.say("error", f"{source.label}: {new} rows are damaged (wrong checksum) and left out")
        if reader.epoch != source.epoch:
            source.epoch = reader.epoch
            self.say("info", f"{source.label}: its writer was restarted (epoch {source.epoch})")

    def tell_all(self) -> None:
        for source in self.sources.values():
            self._tell(source)

    def drop(self, source: Source, text: str) -> None:
        """A ring turned out to be damaged while it was read."""
        for meta, found in list(self.sources.items()):
            if found is source:
                del self.sources[meta]
                self._give_up(meta, text)

    def caught_up(self) -> bool:
        return all(s.caught_up and not len(s.pending) for s in self.sources.values())

    def merged(self) -> list[tuple[Source, Rows, np.ndarray[Any, Any]]]:
        """The next rows of all rings that can be shown in order of arrival: (ring, rows, times of arrival).

        Rows that came after the last one read of a ring that has more to read must wait: its next rows may be older.
        """
        for source in list(self.sources.values()):
            try:
                source.fill()
            except RingError as error:
                self.drop(source, str(error))
        holders = [s for s in (*self._gone, *self.sources.values()) if len(s.pending)]
        behind = [s.seen_to for s in self.sources.values() if not s.caught_up]
        parts = []
        for source in holders:
            count = int(np.searchsorted(source.arrivals, min(behind), "right")) if behind else len(source.pending)
            if count:
                arrivals = source.arrivals[:count]
                parts.append((source, source.take(count), arrivals))
        self._gone = [s for s in self._gone if len(s.pending)]
        return parts


# ---------------------------------------------------------------- rows to text


def values(source: Source, column: Column, rows: Rows) -> list[Any]:
    """One column as Python values, as stored tables hold them; None where nothing was given. Times are us UTC."""
    if column is _CONNECTOR:
        return [source.connector] * len(rows)
    if column is _TABLE:
        return [source.feed.name] * len(rows)
    cells: np.ndarray[Any, Any] = rows[column.name]
    if column.name == "ticker":
        return list(source.names[cells])
    if column.name in ("exchange", "action"):
        return list((_EXCHANGES if column.name == "exchange" else _ACTIONS)[cells])
    if column.table == "bool":
        return list(map(bool, cells.tolist()))
    if column.table in ("text", "category"):
        texts = [text.decode(errors="backslashreplace") for text in cells.tolist()]
        if column.name == "trade_id":  # empty in the ring where it is trade_seq in decimal
            texts = [
                text or (str(seq) if seq >= 0 else "")
                for text, seq in zip(texts, rows["trade_seq"].tolist(), strict=True)
            ]
        return texts
    numbers: list[Any] = cells.tolist()
    missing = (
        np.isnan(cells) if column.table == "float64" else cells == column.null if column.null is not None else None
    )
    if missing is not None and missing.any():
        for i in np.flatnonzero(missing).tolist():
            numbers[i] = None
    return numbers


def columns_of(feed: Feed, wanted: Sequence[str], default: Sequence[Column]) -> list[Column]:
    """The columns to show of a feed: those asked for that it has, in that order, or the default ones."""
    have = {c.name: c for c in (_CONNECTOR, _TABLE, *feed.table_columns)}
    return [have[name] for name in wanted if name in have] if wanted else list(default)


def json_lines(source: Source, rows: Rows, wanted: Sequence[str]) -> list[str]:
    """One JSON object per row: the columns of the table, with connector and table; null where nothing was given."""
    columns = columns_of(source.feed, wanted, (_CONNECTOR, _TABLE, *source.feed.table_columns))
    names = [c.name for c in columns]
    cells = zip(*(values(source, c, rows) for c in columns), strict=True)
    return [_encode(dict(zip(names, row, strict=True))).decode() for row in cells]


_NEEDS_QUOTES = re.compile(r'[",\r\n]|^\s|\s$')


def _csv_text(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if _NEEDS_QUOTES.search(text) else text


def _csv_cells(source: Source, column: Column, rows: Rows) -> Iterable[str]:
    cells = values(source, column, rows)
    if column.table in ("text", "category"):
        quoted = {text: _csv_text(text) for text in set(cells)}
        return [quoted[text] for text in cells]
    if column.table == "bool":
        return ["true" if cell else "false" for cell in cells]
    return ["" if cell is None else repr(cell) for cell in cells]


def csv_columns(feed: Feed, wanted: Sequence[str]) -> list[Column]:
    return columns_of(feed, wanted, (_CONNECTOR, *feed.table_columns))


def csv_lines(source: Source, rows: Rows, wanted: Sequence[str]) -> list[str]:
    """CSV lines: floats with every digit they have (`repr`), times as us UTC, empty where nothing was given."""
    columns = csv_columns(source.feed, wanted)
    return [",".join(cells) for cells in zip(*(_csv_cells(source, c, rows) for c in columns), strict=True)]


# What a symbol says of its kind, the same for all venues that write it so; the first that fits decides.
_KINDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(-PERPETUAL|-SWAP|PERP|-PERP-\w+)$"), "perp"),
    (re.compile(r"-\d+(?:[.D]\d+)?-[CP](?:-[A-Z]+)?$", re.IGNORECASE), "option"),
    (re.compile(r"[-_](\d{6}|\d{1,2}[A-Z]{3}\d{2})(?:-[A-Z]+)?$"), "future"),
)
_SPOT_PAIR = re.compile(r"[A-Z0-9]+[-_/][A-Z]{3,5}$")
_MONTH_CODE = re.compile(r"[FGHJKMNQUVXZ]\d{2}$")


def kind_of(exchange: str, ticker: str) -> str | None:
    """spot, perp, future or option as far as the exchange code and the symbol tell, else None."""
    market = exchange.rpartition("_")[2]
    if market in ("SPOT", "OPTION"):
        return market.lower()
    for pattern, kind in _KINDS:
        if pattern.search(ticker):
            return kind
    if market in ("FUTURES", "LINEAR", "INVERSE"):  # derivatives only: what carries no date is perpetual
        return "future" if _MONTH_CODE.search(ticker) else "perp"
    return "spot" if _SPOT_PAIR.match(ticker) else None


def tradeprint_lines(source: Source, rows: Rows, _wanted: Sequence[str]) -> list[str]:
    """The trade print view, see --help."""
    by_name = {c.name: c for c in source.feed.columns}
    exchanges, tickers, px, sz, ids = (
        values(source, by_name[name], rows) for name in ("exchange", "ticker", "price", "qty", "trade_id")
    )
    sides = [{BUY: "buy", SELL: "sell"}.get(side) for side in rows["side"].tolist()]
    times = rows["timestamp"].tolist(), rows["rcv_timestamp"].tolist()
    stages = rows["parse_ns"].tolist(), rows["publish_ns"].tolist()
    kinds = {pair: kind_of(*pair) for pair in set(zip(exchanges, tickers, strict=True))}
    seen_ms = time.time_ns() / 1e6
    return [
        _encode(
            {
                "exchange": exchange, "asset": ticker, "kind": kinds[exchange, ticker], "px": price, "sz": qty,
                "side": side, "exchange_trade_id": trade_id, "exchange_ts_ms": at / 1000, "recv_ts_ms": rcv / 1000,
                "parse_ts_ms": _stage_ms(rcv, parse_ns), "enqueue_ts_ms": _stage_ms(rcv, publish_ns),
                "writer_ts_ms": seen_ms,
            }
        ).decode()
        for exchange, ticker, price, qty, side, trade_id, at, rcv, parse_ns, publish_ns in zip(
            exchanges, tickers, px, sz, sides, ids, *times, *stages, strict=True
        )
    ]  # fmt: skip


def _stage_ms(rcv_us: int, stage_ns: int) -> float | None:
    return None if stage_ns == UINT32_MAX else (rcv_us * 1000 + stage_ns) / 1e6  # saturated: nobody knows


_TABLE_HIDDEN = ("rcv_timestamp", "packet_id", "parse_ns", "publish_ns")
_WIDTHS = {"timestamp": 26, "float64": 14, "text": 20, "category": 10, "bool": 8}


def _printable(text: str) -> str:
    """Text of an exchange may hold anything; a terminal gets no control characters from it."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


class TableView:
    """Aligned columns for people; each feed has its header, and its name in front where several are shown."""

    def __init__(self, wanted: Sequence[str], *, several: bool, colours: bool, repeat_header: bool) -> None:
        self._wanted, self._several, self._colours, self._repeat = wanted, several, colours, repeat_header
        self._lines: dict[str, int] = {}  # of each feed since its header

    def _columns(self, feed: Feed) -> list[Column]:
        default = [c for c in feed.table_columns if c.name not in _TABLE_HIDDEN]
        return columns_of(feed, self._wanted, [_TABLE, *default] if self._several else default)

    @staticmethod
    def _width(column: Column) -> int:
        if column.name in ("ticker", "exchange", "connector"):
            return 16
        least = {"flags": 14, "seq_id": 10, "table": 12}.get(column.name, 0)
        return max(least, len(column.name), _WIDTHS.get(column.table, 6))

    def _cells(self, source: Source, column: Column, rows: Rows) -> list[str]:
        width = self._width(column)
        if column.name == "side":
            words = {BID: "bid", ASK: "ask"} if source.feed.name == "orderbook_l2" else {BUY: "buy", SELL: "sell"}
            texts = [words.get(side, "?") for side in rows["side"].tolist()]
        elif column.name == "flags":
            texts = [_FLAGS[flags] for flags in rows["flags"].tolist()]
        elif column.table == "timestamp":
            stamps = np.datetime_as_string(rows[column.name].astype("M8[us]")).tolist()
            texts = [
                stamp if given is not None else ""
                for stamp, given in zip(stamps, values(source, column, rows), strict=True)
            ]
        elif column.table == "float64":
            texts = ["" if v is None else repr(v).removesuffix(".0") for v in values(source, column, rows)]
            return [text.rjust(width) for text in texts]
        else:
            texts = [
                "" if v is None else _printable(str(v).lower() if isinstance(v, bool) else str(v))
                for v in values(source, column, rows)
            ]
        if column.table in ("int64", "uint32"):
            return [text.rjust(width) for text in texts]
        return [text + " " * (width - (len(text) if text.isascii() else cell_len(text))) for text in texts]

    def lines(self, source: Source, rows: Rows) -> list[str]:
        cells = zip(*(self._cells(source, c, rows) for c in self._columns(source.feed)), strict=True)
        texts = [" ".join(row).rstrip() for row in cells]
        if self._colours and "side" in (source.feed.dtype.names or ()):
            colour = {1: "\x1b[32m", -1: "\x1b[31m"}
            texts = [
                f"{colour[side]}{text}\x1b[0m" if side in colour else text
                for side, text in zip(rows["side"].tolist(), texts, strict=True)
            ]
        return texts

    def header(self, feed: Feed) -> str:
        names = []
        for column in self._columns(feed):
            width = self._width(column)
            right = column.table in ("float64", "int64", "uint32")
            names.append(column.name.rjust(width) if right else column.name.ljust(width))
        text = " ".join(names).rstrip()
        return f"\x1b[1m{text}\x1b[0m" if self._colours else text

    def with_headers(self, lines: Iterable[Line]) -> Iterator[str]:
        for feed, text in lines:
            if feed not in self._lines or (self._repeat and self._lines[feed] >= HEADER_EVERY):
                self._lines[feed] = 0
                yield self.header(FEEDS[feed])
            self._lines[feed] += 1
            yield text


# ---------------------------------------------------------------- where rows go


class CsvFiles:
    """`--csv FILE`: one file per feed, each begun with its header and written whole lines at a time."""

    def __init__(self, path: Path, wanted: Sequence[str], feeds: Sequence[str], say: Say) -> None:
        self._path, self._wanted, self._say = path, wanted, say
        self._only_feed = feeds[0] if len(feeds) == 1 else None
        self._files: dict[str, IO[bytes]] = {}
        for feed in feeds:
            self.begin(feed)

    def _path_of(self, feed: str) -> Path:
        return (
            self._path
            if feed == self._only_feed
            else self._path.with_name(f"{self._path.stem}.{feed}{self._path.suffix}")
        )

    def begin(self, feed: str) -> IO[bytes]:
        if feed not in self._files:
            path = self._path_of(feed)
            self._files[feed] = open(path, "wb")  # noqa: SIM115 (closed in close)
            self._say("info", f"writing {feed} to {path}")
            header = ",".join(c.name for c in csv_columns(FEEDS[feed], self._wanted))
            self._files[feed].write(header.encode() + b"\n")
        return self._files[feed]

    def write(self, lines: Sequence[Line]) -> None:
        by_feed: dict[str, list[str]] = {}
        for feed, text in lines:
            by_feed.setdefault(feed, []).append(text)
        for feed, texts in by_feed.items():
            file = self.begin(feed)
            file.write(("\n".join(texts) + "\n").encode())
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def in_order(
    parts: Sequence[tuple[Source, Rows, np.ndarray[Any, Any]]], to_lines: Callable[[Source, Rows], list[str]], most: int
) -> list[Line]:
    """At most `most` rows of several rings as lines, in order of arrival."""
    lines: list[Line] = []
    for source, rows, _ in parts:
        lines += [(source.feed.name, text) for text in to_lines(source, rows[:most])]
    if len(parts) > 1:
        arrivals = np.concatenate([arrivals[:most] for _, _, arrivals in parts])
        lines = [lines[i] for i in np.argsort(arrivals, kind="stable").tolist()]
    return lines[:most]


class Stop:
    """Ctrl-C and SIGTERM: the first one ends mdtail behind the line being written, a second one at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGALRM, self._too_long)

    def _ask(self, number: int, _frame: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, STOP_S)  # whoever reads our output may have stopped reading

    @staticmethod
    def _too_long(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    def sleep(self, seconds: float) -> None:
        """Sleep, at most a moment longer than until somebody asks to stop."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


@dataclass
class View:
    """What is shown and for how long."""

    rings: Rings
    stop: Stop
    start: Start
    poll_s: float
    rows_max: int
    seconds: float
    shown: int = 0
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    def batches(self) -> Iterator[Sequence[tuple[Source, Rows, np.ndarray[Any, Any]]]]:
        """Rows in order of arrival until enough was shown, time is up or, without following, all was read."""
        look_at = 0.0
        while self.shown < self.rows_max and time.monotonic() < self.deadline and not self.stop.asked:
            if (now := time.monotonic()) >= look_at:
                self.rings.look(self.start, first=False)
                look_at = now + LOOK_S
            if parts := self.rings.merged():
                yield parts
            elif self.rings.caught_up():
                if not self.rings.follow:
                    return
                self.stop.sleep(min(self.poll_s, self.deadline - time.monotonic()))


def write_out(text: str) -> None:
    out, left = sys.stdout.buffer, memoryview(text.encode(errors="backslashreplace"))
    while left:  # without a buffer (PYTHONUNBUFFERED) a signal may cut a write short
        left = left[out.write(left) :]
    out.flush()


def show_rows(view: View, output: str, wanted: Sequence[str], csv_files: CsvFiles | None) -> None:
    """Show rows on standard output (`output`: table, json, csv, tradeprint or nothing) and write the CSV files."""
    terminal = sys.stdout.isatty()
    several = len(view.rings.feeds) > 1
    table = TableView(
        wanted, several=several, colours=terminal and "NO_COLOR" not in os.environ, repeat_header=terminal
    )
    formats: dict[str, Callable[[Source, Rows], list[str]]] = {
        "table": table.lines,
        "json": lambda source, rows: json_lines(source, rows, wanted),
        "csv": lambda source, rows: csv_lines(source, rows, wanted),
        "tradeprint": lambda source, rows: tradeprint_lines(source, rows, wanted),
    }
    if output == "csv":
        (feed,) = view.rings.feeds
        write_out(",".join(c.name for c in csv_columns(FEEDS[feed], wanted)) + "\n")
    for parts in view.batches():
        left = view.rows_max - view.shown
        if csv_files is not None:
            csv_files.write(in_order(parts, formats["csv"], left))
        if output:
            lines = in_order(parts, formats[output], left)
            texts = table.with_headers(lines) if output == "table" else (text for _, text in lines)
            write_out("\n".join(texts) + "\n")
        view.shown += min(left, sum(len(rows) for _, rows, _ in parts))


# ---------------------------------------------------------------- rates and lag


@dataclass
class Rate:
    """What --rates says of one ring for one interval."""

    ring: str
    state: str
    rows_per_s: float
    published: int
    lag: int
    lapped: int
    damaged: int
    heartbeat_age_s: float
    parse_us_p50: float | None
    parse_us_p99: float | None
    publish_us_p50: float | None
    publish_us_p99: float | None
    clock: str  # of the venue against ours: what `timestamp` and `rcv_timestamp` differ by is as unsure


class Meter:
    """What was read of one ring since the last measurement."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._published = source.reader.published
        self._stages: list[Rows] = []
        self._samples = 0

    def read(self) -> None:
        for _ in range(RATE_BATCHES_MAX):
            rows = self.source.read()
            if not len(rows):
                return
            if self._samples < RATE_SAMPLES_MAX:
                self._stages.append(rows[["parse_ns", "publish_ns"]].copy())
                self._samples += len(rows)

    def measure(self, elapsed_s: float) -> Rate:
        source, reader = self.source, self.source.reader
        published = reader.published
        rate = Rate(
            source.label, source.state(), round((published - self._published) / elapsed_s, 1), published,
            max(0, published - reader.position), reader.lapped, source.damaged, round(reader.heartbeat_age_s, 3),
            *self._percentiles("parse_ns"), *self._percentiles("publish_ns"), clock_text(venue_clock(source.directory)),
        )  # fmt: skip
        self._published, self._stages, self._samples = published, [], 0
        return rate

    def _percentiles(self, stage: str) -> tuple[float | None, float | None]:
        taken = np.concatenate([np.empty(0, np.uint32), *(rows[stage] for rows in self._stages)])
        taken = taken[taken != UINT32_MAX]  # saturated: nobody knows
        if not len(taken):
            return None, None
        low, high = np.percentile(taken, (50, 99))
        return round(float(low) / 1e3, 3), round(float(high) / 1e3, 3)


def rate_table(rates: Sequence[Rate]) -> Table:
    table = Table("ring", "state")
    for title in (
        "rows/s",
        "published",
        "lag",
        "lapped",
        "damaged",
        "heartbeat",
        "parse p50 / p99",
        "publish p50 / p99",
        "venue's clock",
    ):
        table.add_column(title, justify="right")
    colours = {"open": "green", "closed": "yellow"}
    for r in rates:
        table.add_row(
            _printable(r.ring), f"[{colours.get(r.state, 'red')}]{r.state}[/]", f"{r.rows_per_s:,.0f}", f"{r.published:,}",
            f"{r.lag:,}", f"{r.lapped:,}", f"{r.damaged:,}", f"{r.heartbeat_age_s:.1f} s",
            _us_pair(r.parse_us_p50, r.parse_us_p99), _us_pair(r.publish_us_p50, r.publish_us_p99), r.clock,
        )  # fmt: skip
    return table


def _us_pair(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.1f} / {high:.1f} us"


def rate_line(r: Rate) -> str:
    parse, publish = _us_pair(r.parse_us_p50, r.parse_us_p99), _us_pair(r.publish_us_p50, r.publish_us_p99)
    return (
        f"{_printable(r.ring)} {r.state} rows/s={r.rows_per_s:.1f} published={r.published} lag={r.lag} lapped={r.lapped} "
        f"damaged={r.damaged} heartbeat_age={r.heartbeat_age_s:.1f}s parse_p50/p99={parse} publish_p50/p99={publish} clock={r.clock}"
    )


def show_rates(view: View, *, as_json: bool, once: bool) -> None:
    """Once per interval, what each ring does: a live table on a terminal, else lines."""
    live = None
    if sys.stdout.isatty() and not as_json:
        live = Live(rate_table([]), console=Console(), auto_refresh=False)
    with live or contextlib.nullcontext():
        meters: dict[int, Meter] = {}
        before = time.monotonic()
        while True:
            until = min(before + RATE_S, view.deadline)
            while (left := until - time.monotonic()) > 0 and not view.stop.asked:
                sources = view.rings.sources.values()
                meters = {id(source): meters.get(id(source)) or Meter(source) for source in sources}
                for meter in meters.values():
                    try:
                        meter.read()
                    except RingError as error:
                        view.rings.drop(meter.source, str(error))
                view.stop.sleep(min(RATE_READ_S, left))
            if view.stop.asked:
                return
            elapsed, before = time.monotonic() - before, time.monotonic()
            view.rings.look(view.start, first=False)
            kept = {id(source) for source in view.rings.sources.values()}
            rates = [meter.measure(elapsed) for key, meter in meters.items() if key in kept]
            if live is not None:
                live.update(rate_table(rates), refresh=True)
            elif rates:
                lines = (_encode(rate).decode() if as_json else rate_line(rate) for rate in rates)
                write_out("\n".join(lines) + "\n")
            if once or time.monotonic() >= view.deadline:
                return


# ---------------------------------------------------------------- the command


def _feeds(_context: click.Context, _option: click.Parameter, given: Sequence[str]) -> list[str]:
    names = [name.strip() for text in given for name in text.split(",")]
    for name in names:
        if name not in FEEDS:
            raise click.BadParameter(f"{name!r} is not a feed; there are {', '.join(FEEDS)}")
    return list(dict.fromkeys(names))


def _patterns(_context: click.Context, _option: click.Parameter, given: Sequence[str]) -> list[re.Pattern[str]]:
    texts = [text.strip() for item in given for text in item.split(",")]
    if not all(texts):
        raise click.BadParameter("an empty pattern matches nothing; write * for all")
    return [re.compile(fnmatch.translate(text.casefold())) for text in texts]


def _start(_context: click.Context, _option: click.Parameter, given: str | None) -> Start | None:
    if given is None or given in ("newest", "oldest"):
        return given  # type: ignore[return-value]
    if not (given.isascii() and given.isdigit()):
        raise click.BadParameter(f"{given!r} is neither newest, oldest nor a sequence number")
    return int(given)


def _columns(_context: click.Context, _option: click.Parameter, given: str | None) -> list[str]:
    return [] if given is None else [name.strip() for name in given.split(",")]


def _check_columns(wanted: Sequence[str], feeds: Sequence[str]) -> None:
    for name in wanted:
        if not any(columns_of(FEEDS[feed], [name], ()) for feed in feeds):
            have = dict.fromkeys(c.name for feed in feeds for c in FEEDS[feed].table_columns)
            raise click.UsageError(
                f"--columns: no selected feed has {name!r}; there are connector, table, {', '.join(have)}"
            )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--rings", type=click.Path(exists=True, file_okay=False, path_type=Path), envvar="MDCOLLECTOR_RINGS",
              default="rings", show_default=True, show_envvar=True,
              help="Directory of all rings, or of one connector.")  # fmt: skip
@click.option("--feed", "feeds", multiple=True, callback=_feeds, metavar="FEED",
              help=f"Feed to show, repeated or with commas; all if not given. There are {', '.join(FEEDS)}.")  # fmt: skip
@click.option("--connector", "connectors", multiple=True, help="Connector to show, repeated; all if not given.")
@click.option("--filter", "patterns", multiple=True, callback=_patterns, metavar="PATTERN",
              help="Tickers to show: *, ? and [..] as in file names, upper and lower case alike, repeated or with "
                   "commas.")  # fmt: skip
@click.option("--columns", "wanted", callback=_columns, metavar="A,B", help="Columns to show, in this order.")
@click.option("--format", "output", type=click.Choice(["table", "json", "csv", "tradeprint"]),
              help="How rows are shown; table if not given.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row, the same as --format json.")
@click.option("--csv", "csv_path", metavar="FILE",
              help="Write rows to FILE as CSV; it is overwritten. Shows nothing unless a format is given; - is "
                   "stdout.")  # fmt: skip
@click.option("--rates", is_flag=True, help="Show rates, lag, latencies and state of each ring, once a second.")
@click.option("--from", "start", callback=_start, metavar="WHERE",
              help="newest, oldest or a sequence number. Without it newest; oldest with --csv FILE or "
                   "--no-follow.")  # fmt: skip
@click.option("--rows", "rows_max", type=click.IntRange(1), help="Stop after so many rows.")
@click.option("--seconds", type=Finite(0, min_open=True), help="Stop after so many seconds.")
@click.option("--no-follow", is_flag=True, help="Show what is there now, then stop.")
@click.option("--poll-ms", type=Finite(0.1, 10_000), default=20.0, show_default=True,
              help="How long to sleep when there is nothing new.")  # fmt: skip
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True,
              help="What is said on stderr.")  # fmt: skip
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="How it is said.")  # fmt: skip
def main(
    rings: Path, feeds: list[str], connectors: tuple[str, ...], patterns: list[re.Pattern[str]], wanted: list[str],
    output: str | None, as_json: bool, csv_path: str | None, rates: bool, start: Start | None, rows_max: int | None,
    seconds: float | None, no_follow: bool, poll_ms: float, log_level: Level, log_format: Literal["text", "json"],
) -> None:  # fmt: skip
    """Look at rings while they are written. Rows of several rings come in the order in which they arrived.

    \b
    mdtail                                          everything that comes, as a table
    mdtail --feed trades --filter 'btc*,eth*'       trades of some instruments
    mdtail --feed trades --json | jq .price         one JSON object per row
    mdtail --feed bbo --columns ticker,bid_price,ask_price
    mdtail --feed trades --csv trades.csv           all trades still in the rings, then those that come
    mdtail --csv all.csv --no-follow                everything that is there now: all.trades.csv, all.bbo.csv, ...
    mdtail --feed trades --from 1000 --rows 10      rows 1000 to 1009 of each ring's numbering, ten in all
    mdtail --rates                                  rows/s, lag, heartbeat and latencies of each ring

    CSV and JSON hold the columns of the stored tables, with the connector in front: times are integers, microseconds
    UTC; floats have every digit; what was not given is empty in CSV and null in JSON. --csv FILE writes FILE itself
    when one --feed is given or the rings found at the start are all of one feed; otherwise each feed gets a file of
    its own with the feed before the suffix (out.csv: out.trades.csv, out.bbo.csv).

    --format tradeprint shows trades as JSON with exchange, asset (the symbol as the exchange writes it), kind (spot,
    perp, future or option as far as the exchange and the symbol tell, else null), px, sz, side (the taker's: buy,
    sell or null), exchange_trade_id, and times in ms since 1970 with fraction: exchange_ts_ms (the exchange's),
    recv_ts_ms (packet read), parse_ts_ms (decoded), enqueue_ts_ms (visible in the ring), writer_ts_ms (seen by
    mdtail). parse_ts_ms and enqueue_ts_ms are null where the stage took more than 4.29 s.

    Rows whose checksum is wrong are left out and counted. Rows that were overwritten before they could be read are
    counted as lapped. Writers may be restarted and ring files replaced meanwhile; new rings are shown from their
    first row on. Exit code: 0, or 1 if a ring was damaged or rows were lapped, or 2 for wrong use.
    """
    if as_json and output not in (None, "json"):
        raise click.UsageError(f"--json and --format {output} exclude each other")
    output = "json" if as_json else output
    if csv_path == "-":
        if output not in (None, "csv"):
            raise click.UsageError("--csv - and another format on standard output exclude each other")
        output, csv_path = "csv", None
    if output == "tradeprint":
        if feeds not in ([], ["trades"]) or wanted:
            raise click.UsageError("--format tradeprint shows the feed trades with columns of its own")
        feeds = ["trades"]
    if output == "csv" and len(feeds) != 1:
        raise click.UsageError("CSV on standard output needs exactly one --feed; --csv FILE writes a file per feed")
    if rates and (csv_path or wanted or patterns or rows_max or output not in (None, "json") or start is not None):
        raise click.UsageError("--rates goes with --rings, --connector, --feed, --json, --seconds and --no-follow only")
    selected = feeds or list(FEEDS)
    _check_columns(wanted, selected)
    if start is None:
        start = "oldest" if (csv_path or no_follow) and not rates else "newest"
    say = Say(log_level, log_format)
    found = Rings(rings, selected, connectors, patterns, say, follow=rates or not no_follow)
    view = View(found, Stop(), start, poll_ms / 1000, rows_max or sys.maxsize, seconds or float("inf"))
    try:
        try:
            found.look(start, first=True)
        except IndexError as error:
            raise click.UsageError(f"--from: {error}") from error
        _say_what_was_found(found, say, wait=not no_follow)
        if found.sources or not (no_follow or found.findings):
            if rates:
                show_rates(view, as_json=output == "json", once=no_follow)
            elif csv_path:
                have = feeds or sorted({source.feed.name for source in found.sources.values()})
                with contextlib.closing(CsvFiles(Path(csv_path), wanted, have, say)) as csv_files:
                    show_rows(view, output or "", wanted, csv_files)
            else:
                show_rows(view, output or "table", wanted, None)
    except KeyboardInterrupt:
        _let_go(sys.stdout)  # nobody reads it
        say("warning", "the last rows could not be written: nobody reads them")
        found.findings = True
    except BrokenPipeError:
        _let_go(sys.stdout)
        sys.exit(EXIT_DONE)  # whoever read our output has seen enough
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'output'}: {error.strerror}") from error
    found.tell_all()
    if not rates:
        say("info", f"{view.shown} rows shown")
    sys.exit(EXIT_FINDINGS if found.findings else EXIT_DONE)


def _say_what_was_found(rings: Rings, say: Say, *, wait: bool) -> None:
    if not rings.sources:
        what = f"no ring of {', '.join(rings.feeds)} that can be read in {rings.root}"
        if not wait:
            rings.findings = True
            say("error", what)
        elif not rings.findings:
            say("info", f"{what} yet, waiting")


def _let_go(stream: TextIO) -> None:
    """Point a broken pipe elsewhere, so that the interpreter's last flush does not complain about it."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


if __name__ == "__main__":
    main()
