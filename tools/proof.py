"""The proof: what a simulated exchange did, what the rings published and what the tables hold agree row for row.

Called by tests, the demo and the soak with the ledger of `mdsim`. It uses no decoder of the collector: the ledger's
text is turned into plain values, the tables are read with pyarrow, and every rule is written here a second time.
Rows stay columns and ledger lines text until they are compared: a long run has tens of millions. What it shows:

    trades      every trade between the first and the last recorded one of a ticker is there once and equal, or an
                unrepaired row of `gaps` names its id; no trade that the exchange did not make
    books       a book rebuilt from the rows equals the exchange's after every message that no row of `gaps` names, is
                crossed exactly where rows say BOOK_INVALID, every row says truly what it did to the book, and every
                depth event behind the first row is there once or is named by `gaps`. Only rows flagged UNPROVEN stand
                in no book: they are the exchange's, and nothing but a snapshot or the end follows them
    bbo, tickers, candles, liquidations
                rows are the exchange's, in its order; a missing one lies in the time of a hole that `gaps` records, or
                lay between two polls of a polled venue, of which only every closed candle must be there
    rings       tables have the very rows of the rings, seq_ids without a hole up to what was published
"""

from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from operator import eq
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mdcollector.config import connector_of
from mdcollector.records import ALWAYS_ON
from mdcollector.ring import RingReader
from mdcollector.sinks import LEDGER_MARK
from tools.sim.ledger import Ledger, Lines
from tools.sim.server import venues

DIFFERENCES_MAX = 100  # kept in words; all of them are counted
LATE_US = 1_000_000  # the simulator's stamps may be so much older than the moment it really sent
DATA_FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles")
BATCH_ROWS = 65_536  # that are Python objects at a time, where rows are taken one after the other
LAST, SNAPSHOT, BOOK_INVALID, REPAIRED, TIME_LOCAL, UNPROVEN = 1, 2, 8, 16, 64, 128

Row = dict[str, Any]
Key = tuple[Any, ...]  # what of a row is compared with the ledger
Level = tuple[int, float, float]  # side, price, quantity


@dataclass
class FeedProof:
    """What the comparison of one feed came to."""

    rows: int = 0  # in the tables
    equal: int = 0  # rows, or for books messages, that equal the ledger's
    explained: int = 0  # of the ledger's that are not in the tables, and `gaps` says why
    repaired: int = 0  # rows that were fetched over REST
    different: int = 0


@dataclass
class Proof:
    """The outcome. `differences` says in words what does not agree, the first hundred of it."""

    exchange: str
    feeds: dict[str, FeedProof] = field(default_factory=dict)
    gaps: Counter[tuple[str, str]] = field(default_factory=Counter)  # (feed, cause) -> holes that stay unrepaired
    faults: Counter[str] = field(default_factory=Counter)  # that the simulator let happen
    books_checked: int = 0  # messages after which a whole book was compared
    differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing differs, and there was something to compare."""
        return not any(f.different for f in self.feeds.values()) and any(f.rows for f in self.feeds.values())

    @property
    def compared(self) -> dict[str, int]:
        """Rows of the tables, by feed."""
        return {feed: counts.rows for feed, counts in self.feeds.items()}

    def differ(self, feed: str, text: str) -> None:
        self.feeds.setdefault(feed, FeedProof()).different += 1
        if len(self.differences) < DIFFERENCES_MAX:
            self.differences.append(f"{feed}: {text}")

    def __str__(self) -> str:
        lines = [f"{self.exchange}: {'agrees' if self.ok else 'DIFFERS'}, {self.books_checked} books compared"]
        lines += [f"  {feed}: {counts}" for feed, counts in self.feeds.items()]
        lines += [f"  unrepaired holes: {dict(self.gaps)}"] if self.gaps else []
        return "\n".join([*lines, *(f"  {text}" for text in self.differences)])


def prove(
    ledger: Path | Ledger,
    out: Path,
    rings: Path | None = None,
    exchange: str = "",
    *,
    connector: str = "",
    feeds: Sequence[str] = DATA_FEEDS,
    book_stream: str = "",
    intervals: Sequence[str] = (),
    snapshot_levels: int = 0,
    to_the_end: bool = False,
) -> Proof:
    """Compare the tables below `out` (and the rings, where they are named) with the ledger of `exchange`.

    `connector`: only what it recorded, where several record the same; a ticker may have one only.
    `intervals` are those of the recorded candles: one minute, or all that a venue without it has, when none is named.
    `book_stream` is the speed that was recorded, if it is not the venue's usual one; `snapshot_levels` the levels that
    a snapshot was asked for, if books are deeper than that. `to_the_end`: nothing after the last row may be missing
    either, for runs whose market stood still before they were stopped.
    """
    truth = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
    if exchange not in ("", truth.start["exchange"]):
        raise ValueError(f"{ledger} is of {truth.start['exchange']}, not of {exchange}")
    comparison = _Comparison(truth, out, connector, book_stream, intervals, snapshot_levels, to_the_end)
    for feed in feeds:
        comparison.feed(feed)
    if rings is not None:
        for feed in (*feeds, *ALWAYS_ON):
            comparison.rings(rings, feed)
    return comparison.proof


def load_rows(out: Path, feed: str, exchange: str = "*") -> dict[str, list[Row]]:
    """Rows of a feed per connector, in the order of seq_id; times are integers in us, texts plain text."""
    return {connector: list(rows) for connector, rows in _load(out, feed, exchange).items()}


class Rows:
    """Rows of a feed as columns, in the order of seq_id; a row is made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[Row]:
        names = self.table.column_names
        for start in range(0, len(self), BATCH_ROWS):
            for values in self.slice(start, start + BATCH_ROWS).values(*names):
                yield dict(zip(names, values, strict=True))

    def slice(self, start: int, stop: int) -> "Rows":
        return Rows(self.table.slice(start, max(0, stop - start)))

    def values(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """These columns of every row, None where they are null."""
        return zip(*(self.column(name) for name in names), strict=True)

    def column(self, name: str) -> list[Any]:
        column = self.table[name]
        if column.null_count:
            return list(column.to_pylist())
        if pa.types.is_dictionary(column.type):
            words: list[Any] = []
            for chunk in column.chunks:
                words += chunk.dictionary.to_numpy(zero_copy_only=False)[chunk.indices.to_numpy()].tolist()
            return words
        return list(column.to_numpy().tolist())

    def numbers(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """A column of numbers, and where it is null; there the number means nothing."""
        column = self.table[name]
        nulls = column.is_null().to_numpy()
        return (column.fill_null(0) if column.null_count else column).to_numpy(), nulls

    def by_ticker(self) -> Iterator[tuple[str, "Rows"]]:
        """Rows of each ticker, those of the first one first."""
        for ticker in pc.unique(self.table["ticker"]).to_pylist():
            yield ticker, self.where(pc.equal(self.table["ticker"], ticker))

    def where(self, which: pa.ChunkedArray) -> "Rows":
        return Rows(self.table.filter(which))


def _is_of(name: str, connector: str) -> bool:
    """Whether rows of this name came by a connector or one of its connections; every name where none is asked for."""
    process = name.partition(LEDGER_MARK)[0]
    return connector in ("", process, connector_of(process))


def _load(out: Path, feed: str, exchange: str, connector: str = "") -> dict[str, Rows]:
    found: dict[str, list[pa.Table]] = defaultdict(list)
    for path in sorted(out.glob(f"{feed}/{exchange}/date=*/*.parquet")):
        name = path.name.rsplit("-", 3)[0]
        if _is_of(name, connector):
            found[name].append(pq.read_table(path, partitioning=None))
    rows: dict[str, Rows] = {}
    for name in list(found):
        tables = found.pop(name)
        columns = {
            column: pa.chunked_array(
                [chunk for table in tables for chunk in _plain(table[column]).chunks], _plain(tables[0][column]).type
            )
            for column in tables[0].column_names
        }
        table = pa.table(columns).unify_dictionaries()
        seqs = table["seq_id"].to_numpy()
        if (seqs[1:] < seqs[:-1]).any():
            table = table.take(np.argsort(seqs, kind="stable"))
        rows[name] = Rows(table)
    return rows


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column


def standing_gaps(rows: Sequence[Row]) -> list[Row]:
    """Holes that no later row with the same feed, ticker and ids (without ids: the same end) calls repaired."""
    state: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        ids = (row["first_id"], row["last_id"]) if row["first_id"] is not None else ("time", row["to_time"])
        state[row["feed"], row["ticker"], *ids] = row
    return [row for row in state.values() if not row["repaired"]]


class _Holes:
    """The unrepaired holes of one connector."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._ids = defaultdict[tuple[str, str], list[tuple[int, int]]](list)
        self._times = defaultdict[tuple[str, str], list[tuple[int, int]]](list)
        for row in rows:
            where = row["feed"], row["ticker"]
            if row["first_id"] is not None:
                self._ids[where].append((row["first_id"], row["last_id"]))
            if row["from_time"] is not None:
                self._times[where].append((row["from_time"] - LATE_US, row["to_time"]))

    def names_id(self, feed: str, ticker: str, number: int) -> bool:
        return any(low <= number <= high for low, high in self._ids.get((feed, ticker), ()))

    def at_time(self, feed: str, ticker: str, t: int) -> bool:
        return any(low <= t <= high for name in ("*", ticker) for low, high in self._times.get((feed, name), ()))


class _Comparison:
    def __init__(
        self, truth: Ledger, out: Path, connector: str, book_stream: str, intervals: Sequence[str],
        snapshot_levels: int, to_end: bool,
    ) -> None:  # fmt: skip
        self.truth, self.out, self.connector, self.to_end = truth, out, connector, to_end
        self.snapshot_levels = snapshot_levels
        name = truth.start["exchange"]
        kind = venues()[name]
        self.dialect, self.exchange = kind.dialect, name.upper()
        has_minutes = self.dialect.intervals.get("1m", "1m") in kind.intervals
        self.intervals = intervals or (("1m",) if has_minutes else tuple(kind.intervals))
        self.stream = book_stream or self.dialect.book_stream
        self.proof = Proof(name, faults=truth.faults_fired())
        self.holes: dict[str, _Holes] = {}
        for connector, rows in _load(out, "gaps", self.exchange, self.connector).items():
            standing = standing_gaps(list(rows))
            self.proof.gaps.update((row["feed"], row["cause"]) for row in standing)
            origin, mark, _feed = connector.partition(
                LEDGER_MARK
            )  # rows behind a mark are the writer's own: rows it lost
            if mark:
                for row in standing:
                    self.proof.differ(row["feed"], f"{origin}: local rows {row['first_id']}..{row['last_id']} lost")
            else:
                self.holes[connector] = _Holes(standing)

    def feed(self, feed: str) -> None:
        count = self.proof.feeds.setdefault(feed, FeedProof())
        check: Callable[[str, str, Rows], None] = {
            "trades": self._trades,
            "orderbook_l2": self._book,
            "bbo": self._bbo,
            "tickers": self._tickers,
            "candles": self._candles,
            "liquidations": self._liquidations,
        }[feed]
        seen: dict[str, str] = {}
        for connector, rows in _load(self.out, feed, self.exchange, self.connector).items():
            count.rows += len(rows)
            count.repaired += int(np.count_nonzero(rows.numbers("flags")[0] & REPAIRED))
            self._contiguous(feed, connector, rows.numbers("seq_id")[0])
            for seq_id, exchange in rows.where(pc.not_equal(rows.table["exchange"], self.exchange)).values(
                "seq_id", "exchange"
            ):
                self.proof.differ(feed, f"seq_id {seq_id} says exchange {exchange}")
            for ticker, mine in rows.by_ticker():
                if ticker not in self.truth.start["tickers"]:
                    self.proof.differ(feed, f"{len(mine)} rows of {ticker}, which the exchange does not list")
                elif seen.setdefault(ticker, connector) != connector:
                    self.proof.differ(feed, f"{ticker} was recorded by {seen[ticker]} and by {connector}")
                else:
                    check(connector, ticker, mine)

    def _contiguous(self, feed: str, connector: str, seqs: np.ndarray[Any, Any]) -> None:
        wrong = np.flatnonzero(seqs != np.arange(len(seqs)))
        if len(wrong):
            self.proof.differ(feed, f"{connector}: seq_id {seqs[wrong[0]]} stands where {wrong[0]} is due")

    def _holes_of(self, connector: str) -> _Holes:
        return self.holes.get(connector, _Holes([]))

    def _explained(self, feed: str) -> None:
        self.proof.feeds[feed].explained += 1

    def _equal(self, feed: str, where: str, names: Sequence[str], found: Key, expected: Key) -> None:
        if found == expected:
            self.proof.feeds[feed].equal += 1
        else:
            values = zip(names, found, expected, strict=True)
            wrong = [f"{name} {mine!r} instead of {real!r}" for name, mine, real in values if mine != real]
            self.proof.differ(feed, f"{where}: {', '.join(wrong)}")

    def _time(self, t: int) -> int:
        return t // self.dialect.unit_us * self.dialect.unit_us

    # Trades

    def _trades(self, connector: str, ticker: str, rows: Rows) -> None:
        words = "id", "price", "qty", "side", "t"
        names = "trade_id", "price", "qty", "side", "timestamp"
        truth = {seq: real for seq, *real in self.truth.lines("trade", ticker).values("seq", *words)}
        merged = {
            real[0]: (first, real) for first, *real in self.truth.lines("aggtrade", ticker).values("first", *words)
        }
        counted = self.dialect.trades_have_counter
        # The counter that some venues keep to themselves.
        seq_of = {} if counted else {real[0]: seq for seq, real in truth.items()}
        found: set[int] = set()
        for flags, counter, *mine in rows.values("flags", "trade_seq", *names):
            seq, ids, real = counter, range(0), None
            if not counted:
                if counter is not None:
                    self.proof.differ("trades", f"{ticker} {mine[0]}: has a counter that was never told")
                seq = seq_of.get(mine[0], -1)
            elif counter is None:  # the venue merges trades: the row stands for as many as its ledger says
                seq = int(mine[0])
                first, real = merged.get(mine[0], (seq, None))
                ids = range(int(first), seq + 1)
            if flags & REPAIRED or not ids:  # what is fetched comes one by one
                ids, real = range(seq, seq + 1), truth.get(seq)
            if real is None or any(one not in truth for one in ids):
                self.proof.differ("trades", f"{ticker} {seq}: the exchange made no such trade")
            elif any(one in found for one in ids):
                self.proof.differ("trades", f"{ticker} {seq}: is there twice")
            else:
                found.update(ids)
                trade_id, price, qty, side, t = real
                expected = trade_id, float(price), float(qty), 1 if side == "BUY" else -1, self._time(t)
                self._equal("trades", f"{ticker} {seq}", names, tuple(mine), expected)
        if not found:
            return
        last = max(truth) if self.to_end else max(found)
        holes = self._holes_of(connector)
        for seq in range(min(found), last + 1):
            if seq not in found and seq in truth:
                if holes.names_id("trades", ticker, seq) or (
                    not counted and holes.at_time("trades", ticker, self._time(truth[seq][-1]))
                ):
                    self._explained("trades")
                else:
                    self.proof.differ("trades", f"{ticker} {seq}: is missing and no row of gaps names it")

    # Books

    def _book(self, connector: str, ticker: str, rows: Rows) -> None:
        events = _Events(self.truth.lines("book", ticker), self.stream)
        books = _Books(self.truth.start["tickers"][ticker]["book"], events, self.snapshot_levels)
        holes = self._holes_of(connector)
        applied = -1
        unproven: list[int] = []  # ids of messages since the book was last proven
        for message in _messages(rows):
            update_id, flags = message.update_id, message.flags
            where = f"{ticker} update {update_id} (seq_id {message.seq_id})"
            if not message.whole:
                self.proof.differ("orderbook_l2", f"{where}: its message is not whole")
            number = events.ending_at(update_id)
            if flags & SNAPSHOT:
                self._skipped(ticker, holes, events, max([applied, *unproven]), update_id)
                books.load(message.levels)
                applied, unproven = update_id, []
                if number is not None or update_id == books.first:
                    self._compare(where, books, -1 if number is None else number)
                else:
                    self.proof.feeds["orderbook_l2"].equal += 1  # between two events: the next one will show it
                continue
            if number is None:
                self.proof.differ("orderbook_l2", f"{where}: the exchange published no such event")
                continue
            if update_id <= applied or update_id in unproven:
                self.proof.differ("orderbook_l2", f"{where}: is there twice or comes after {applied}")
                continue
            before = max([applied, *unproven])
            self._skipped(ticker, holes, events, before, events.firsts[number] - 1 if number else before)
            self._levels(where, message, events.levels(number), None if flags & UNPROVEN else books)
            t = events.times[number]
            if message.timestamp != self._time(t):
                self.proof.differ("orderbook_l2", f"{where}: timestamp {message.timestamp} instead of {t}")
            if flags & UNPROVEN:
                unproven.append(update_id)
                if not flags & BOOK_INVALID:
                    self.proof.differ("orderbook_l2", f"{where}: not proven, but not flagged invalid")
                continue
            if unproven:
                self.proof.differ("orderbook_l2", f"{where}: said to be proven behind {unproven[-1]}, which is not")
            applied = update_id
            if holes.names_id("orderbook_l2", ticker, update_id):
                self._explained("orderbook_l2")  # `gaps` doubts it: a loss was found that no id told at once
                continue
            crossed = books.crossed(number)
            if crossed != bool(flags & BOOK_INVALID):
                says, is_ = ("", "not ") if flags & BOOK_INVALID else ("not ", "")
                self.proof.differ("orderbook_l2", f"{where}: {says}flagged invalid, but the book is {is_}crossed")
            self._compare(where, books, number)
        if self.to_end and events.lasts:
            self._skipped(ticker, holes, events, max([applied, *unproven]), events.lasts[-1])

    def _levels(self, where: str, message: "_Message", expected: list[Level], books: "_Books | None") -> None:
        """The rows of a message are the event's levels, and say truly what each one did to the book, if it has one."""
        if message.levels != expected:
            real, found = Counter(expected), Counter(message.levels)
            gone, extra = real - found, found - real
            if gone or extra:  # else only their order is another one
                self.proof.differ(
                    "orderbook_l2", f"{where}: levels missing {list(gone)[:3]}, not the exchange's {list(extra)[:3]}"
                )
        for level, action in zip(message.levels, message.actions, strict=True):
            true = books.apply(level) if books is not None else "UPDATE" if level[2] else "DELETE"
            if true != action:
                self.proof.differ("orderbook_l2", f"{where}: price {level[1]} says {action}, it is {true}")

    def _skipped(self, ticker: str, holes: _Holes, events: "_Events", applied: int, upto: int) -> None:
        """Account for the events with ids behind `applied` up to `upto`, of which there are no rows."""
        if applied < 0 or upto <= applied:
            return
        skipped = events.lasts[bisect_right(events.lasts, applied) : bisect_right(events.lasts, upto)]
        untold = [update_id for update_id in skipped if not holes.names_id("orderbook_l2", ticker, update_id)]
        self.proof.feeds["orderbook_l2"].explained += len(skipped) - len(untold)
        if untold:
            text = f"{ticker}: {len(untold)} events from {untold[0]} to {untold[-1]} are missing and no row of gaps says so"
            self.proof.differ("orderbook_l2", text)

    def _compare(self, where: str, books: "_Books", number: int) -> None:
        self.proof.books_checked += 1
        wrong = books.differences(number)
        if wrong:
            self.proof.differ("orderbook_l2", f"{where}: the book differs: {'; '.join(wrong[:3])}")
        else:
            self.proof.feeds["orderbook_l2"].equal += 1

    # Feeds without ids: rows must come in the order of the ledger

    def _bbo(self, connector: str, ticker: str, rows: Rows) -> None:
        has_id, has_time = self.dialect.bbo_has_id, self.dialect.bbo_has_time
        truth: list[tuple[Key, int]] = []
        greetings: set[Key] = set()
        words = "bid", "bid_qty", "ask", "ask_qty"
        for greeting, number, t, *prices in self.truth.lines("bbo", ticker).values("greeting", "id", "t", *words):
            key = (*map(float, prices), number if has_id else None, self._time(t) if has_time else None)
            truth.append((key, t))
            if greeting:
                greetings.add(key)
        columns = [rows.column(name) for name in ("bid_price", "bid_qty", "ask_price", "ask_qty")]
        columns += [
            rows.column(name) if told else [None] * len(rows)
            for name, told in (("update_id", has_id), ("timestamp", has_time))
        ]
        mine = list(zip(zip(*columns, strict=True), rows.column("seq_id"), strict=True))
        self._in_order("bbo", connector, ticker, mine, truth, greetings)
        if not has_time:
            self._times_local("bbo", ticker, rows)

    def _tickers(self, connector: str, ticker: str, rows: Rows) -> None:
        words = self.dialect.ticker_words

        def numbers(data: Mapping[str, Any]) -> tuple[float | None, ...]:
            return tuple(_number(data, word) for word in words.values())

        def of_truth(real: Row) -> Key:
            return (self._time(real["t"]), *numbers(real["data"]))

        def of_row(row: Row) -> Key:
            return (row["timestamp"], *(None if row[c] is None or row[c] != row[c] else row[c] for c in words))

        lines = self.truth.rows("ticker", ticker)
        truth = [(of_truth(real), real["t"]) for real in lines if real.get("stream", self.stream) == self.stream]
        # What a new subscriber is told at once belongs to no timer of the exchange.
        greetings = Counter(of_truth(real) for real in self.truth.rows("first_ticker", ticker))
        mine: list[tuple[Key, int]] = []
        in_order = {key for key, _ in truth}
        for row in rows:
            key = of_row(row)
            if key not in in_order and greetings[key]:
                greetings[key] -= 1
                self.proof.feeds["tickers"].equal += 1
            else:
                mine.append((key, row["seq_id"]))
        self._in_order("tickers", connector, ticker, mine, truth)

    def _candles(self, connector: str, ticker: str, rows: Rows) -> None:
        has_time, counts = self.dialect.candle_has_time, self.dialect.candle_counts_trades

        def of_truth(real: Row) -> Key:
            ohlcv = (None if real[k] is None else float(real[k]) for k in ("open", "high", "low", "close", "volume"))
            times = real["open_time"], self._time(real["t"]) if has_time else None
            return (*times, *ohlcv, real["trades"] if counts else None)

        def of_row(row: Row) -> Key:
            times = row["open_time"], row["timestamp"] if has_time else None
            return (*times, *(row[k] for k in ("open", "high", "low", "close", "volume")), row["trades"])

        every_row = list(rows)
        for interval in self.intervals:
            name = self.dialect.intervals.get(interval, interval)
            truth = [real for real in self.truth.rows("candle", ticker) if real["interval"] == name]
            mine = [row for row in every_row if row["interval"] == interval]
            if self.dialect.polled:
                self._polled_candles(f"{ticker} {interval}", mine, truth, of_row, of_truth)
                continue
            done = [(of_row(row), row["seq_id"]) for row in mine if row["closed"]]
            not_done = [(of_row(row), row["seq_id"]) for row in mine if not row["closed"]]
            closed = [(of_truth(real), real["t"]) for real in truth if real["closed"]]
            if counts or self.dialect.candle_says_closed:
                opened = [(of_truth(real), real["t"]) for real in truth if not real["closed"]]
                self._in_order("candles", connector, ticker, not_done, opened)
                self._in_order("candles", connector, ticker, done, closed)
                continue
            every = [(of_truth(real), real["t"]) for real in truth]
            self._in_order("candles", connector, ticker, not_done, every)
            finals = {key for key, _ in closed}
            for row in (row for row in mine if row["closed"]):
                if of_row(row) not in finals:
                    self.proof.differ(
                        "candles", f"{ticker} {interval} {row['open_time']}: said to be closed, it is not"
                    )
        others = set(rows.column("interval")) - set(self.intervals)
        if others:
            self.proof.differ("candles", f"{ticker}: unexpected intervals {sorted(others)}")

    def _liquidations(self, connector: str, ticker: str, rows: Rows) -> None:
        def of_truth(real: Row) -> Key:
            side = 1 if real["side"] == "BUY" else -1
            return self._time(real["t"]), side, float(real["price"]), float(real["qty"])

        truth = [(of_truth(real), real["t"]) for real in self.truth.rows("liquidation", ticker)]
        mine = list(zip(rows.values("timestamp", "side", "price", "qty"), rows.column("seq_id"), strict=True))
        self._in_order("liquidations", connector, ticker, mine, truth)

    def _polled_candles(
        self,
        where: str,
        rows: Sequence[Row],
        truth: Sequence[Row],
        of_row: Callable[[Row], Key],
        of_truth: Callable[[Row], Key],
    ) -> None:
        """Of each candle some versions in the exchange's order; of those that are closed each one, and the last version."""
        real_of, mine_of = defaultdict[int, list[Row]](list), defaultdict[int, list[Row]](list)
        for real in truth:
            real_of[real["open_time"]].append(real)
        for row in rows:
            mine_of[row["open_time"]].append(row)
        for open_time, mine in mine_of.items():
            keys, reached = [(of_truth(real), real["closed"]) for real in real_of[open_time]], -1
            for row in mine:
                found = [n for n, key in enumerate(keys) if n > reached and key == (of_row(row), row["closed"])]
                if found:
                    reached = found[0]
                    self.proof.feeds["candles"].equal += 1
                else:
                    self.proof.differ(
                        "candles", f"{where} seq_id {row['seq_id']} {of_row(row)}: not the exchange's now"
                    )
        done = [open_time for open_time, mine in mine_of.items() if mine[-1]["closed"]]
        for open_time in (t for t in real_of if done and min(done) <= t <= max(done)):
            last = next((real for real in reversed(real_of[open_time]) if real["closed"]), None)
            mine = mine_of.get(open_time, [])
            if last is not None and not (mine and mine[-1]["closed"] and of_row(mine[-1]) == of_truth(last)):
                self.proof.differ("candles", f"{where} {open_time}: its closed version is missing, or not the last one")

    def _times_local(self, feed: str, ticker: str, rows: Rows) -> None:
        for seq_id, time, rcv_time, flags in rows.values("seq_id", "timestamp", "rcv_timestamp", "flags"):
            if time != rcv_time or not flags & TIME_LOCAL:
                self.proof.differ(feed, f"{ticker} seq_id {seq_id}: the exchange gave no time, the row says one")

    def _in_order(
        self,
        feed: str,
        connector: str,
        ticker: str,
        rows: Sequence[tuple[Key, int]],
        truth: Sequence[tuple[Key, int]],
        greetings: Set[Key] = frozenset(),
    ) -> None:
        """Rows, keys with their seq_id, are a subsequence of the truth, keys with the exchange's time; what lies between two of them and is missing has a hole to lie in.

        `greetings` repeat what was known, to one client that has just come; the others never see them. Nor does a best price
        or ticker say anything that repeats one of the same event time word for word: it may be left out (`told_again`).
        """
        if feed in ("bbo", "tickers"):
            greetings = {*greetings, *(key for key, _ in rows)}
        places: dict[Key, list[int]] = defaultdict(list)
        for place, (key, _) in enumerate(truth):
            places[key].append(place)
        holes, reached = self._holes_of(connector), -1
        for key, seq_id in rows:
            known = places.get(key, [])
            behind = bisect_right(known, reached)
            if behind == len(known):
                why = "is there twice or out of order" if known else "is not the exchange's"
                self.proof.differ(feed, f"{ticker} seq_id {seq_id} {key}: {why}")
                continue
            place = known[behind]
            if 0 <= reached < place - 1 and not self.dialect.polled:
                self._between(
                    feed, ticker, holes, [line for line in truth[reached + 1 : place] if line[0] not in greetings]
                )
            reached = place
            self.proof.feeds[feed].equal += 1
        if self.to_end and rows and not self.dialect.polled:
            self._between(feed, ticker, holes, [line for line in truth[reached + 1 :] if line[0] not in greetings])

    def _between(self, feed: str, ticker: str, holes: _Holes, missing: Sequence[tuple[Key, int]]) -> None:
        for key, t in missing:
            if holes.at_time(feed, ticker, t):
                self._explained(feed)
            else:
                self.proof.differ(feed, f"{ticker} {key} at {t}: is missing and lies in no recorded hole")

    # Rings

    def rings(self, rings: Path, feed: str) -> None:
        """Tables hold the rows that the rings published: all numbers of them, and equal where a ring still has them."""
        tables = _load(self.out, feed, self.exchange, self.connector)
        for path in sorted(rings.glob(f"*/{feed}.meta")):
            with RingReader(path.parent, feed) as ring:
                if ring.exchange != self.exchange or not _is_of(ring.connector, self.connector):
                    continue
                ring.seek("oldest")
                batches = [ring.read()]
                while len(batches[-1]):
                    batches.append(ring.read())
                stored, published = tables.get(ring.connector), ring.published
                found = len(stored or ())
                if found != published:
                    self.proof.differ(feed, f"{ring.connector}: {published} rows published, {found} in the tables")
                    continue
                for batch in batches:
                    if stored and len(batch):
                        first = int(batch["seq_id"][0])
                        self._ring_rows(ring, batch, stored.slice(first, first + len(batch)))

    def _ring_rows(self, ring: RingReader, batch: np.ndarray[Any, Any], stored: Rows) -> None:
        action = {1: "NEW", 2: "UPDATE", 3: "DELETE"}
        wrong = defaultdict[int, list[str]](list)  # row -> columns
        for name in batch.dtype.names or ():
            values = batch[name][: len(stored)]
            texts: list[Any] | None = None
            if name == "ticker":
                texts = ring.names(batch).tolist()
            elif name == "exchange":
                texts = [self.exchange] * len(batch)
            elif name == "action":
                texts = [action[value] for value in values.tolist()]
            elif name == "trade_id":
                seqs = batch["trade_seq"].tolist()
                texts = [v.decode() or str(seq) for v, seq in zip(values.tolist(), seqs, strict=False)]
            elif values.dtype.kind == "S":
                texts = [value.decode() for value in values.tolist()]
            if texts is not None:
                same = np.fromiter(map(eq, stored.column(name), texts), bool, len(stored))
            else:
                same = _same_in_ring(*stored.numbers(name), values)
            for number in np.flatnonzero(~same).tolist():
                wrong[number].append(name)
        seq_ids = stored.numbers("seq_id")[0]
        for number, names in sorted(wrong.items()):
            self.proof.differ(
                ring.feed.name, f"{ring.connector} seq_id {seq_ids[number]}: {', '.join(names)} not as in the ring"
            )


class _Events:
    """The depth events of one ticker and speed."""

    def __init__(self, lines: Lines, stream: str) -> None:
        self._lines = lines
        self._places, self.firsts, self.lasts, self.times = array("q"), array("q"), array("q"), array("q")
        for place, (name, first, last, t) in enumerate(lines.values("stream", "first", "last", "t")):
            if name == stream:
                self._places.append(place)
                self.firsts.append(first)
                self.lasts.append(last)
                self.times.append(t)
        self._latest: tuple[int, list[Level]] = (-1, [])

    def ending_at(self, update_id: int) -> int | None:
        """The event with this last id."""
        number = bisect_right(self.lasts, update_id) - 1
        return number if number >= 0 and self.lasts[number] == update_id else None

    def levels(self, number: int) -> list[Level]:
        if number != self._latest[0]:  # it is asked for twice: for the message, and for the book behind it
            self._latest = number, _levels(self._lines[self._places[number]])
        return self._latest[1]


def _levels(line: Mapping[str, Any]) -> list[Level]:
    bids = [(1, float(price), float(qty)) for price, qty in line["bids"]]
    return bids + [(-1, float(price), float(qty)) for price, qty in line["asks"]]


class _Books:
    """The exchange's book and the one that a reader of the tables makes from rows alone, side by side.

    Which prices differ is known at any time, for only a price that is touched can begin or cease to.
    """

    def __init__(self, first: Mapping[str, Any], events: _Events, snapshot_levels: int) -> None:
        self.first = first["last"]
        self._events, self._done = events, -1  # the real book is the one behind event `_done`
        self._real: dict[int, dict[float, float]] = {1: {}, -1: {}}
        for side, price, qty in _levels(first):
            self._real[side][price] = qty
        self._best: dict[int, float | None] = {1: None, -1: None}  # of the real book, None = to be looked for
        self._mine: dict[int, dict[float, float]] = {1: {}, -1: {}}
        self._unequal: dict[int, set[float]] = {side: set(levels) for side, levels in self._real.items()}
        self._whole_below = snapshot_levels
        self._horizon: dict[int, float] = {}  # side -> worst price that the snapshot could show

    def load(self, levels: Iterable[Level]) -> None:
        """Begin anew with a snapshot."""
        self._mine = {1: {}, -1: {}}
        for side, price, qty in levels:
            self._mine[side][price] = qty
        self._horizon = {}
        for side, mine in self._mine.items():
            if self._whole_below and len(mine) >= self._whole_below:
                self._horizon[side] = min(mine) if side == 1 else max(mine)
            real = self._real[side]
            self._unequal[side] = {price for price in mine.keys() | real.keys() if mine.get(price) != real.get(price)}

    def apply(self, level: Level) -> str:
        """Apply a row; what it did."""
        side, price, qty = level
        mine = self._mine[side]
        known = price in mine
        if qty:
            mine[price] = qty
        else:
            mine.pop(price, None)
        self._touch(side, price)
        return "DELETE" if not qty else "UPDATE" if known else "NEW"

    def _touch(self, side: int, price: float) -> None:
        if self._mine[side].get(price) == self._real[side].get(price):
            self._unequal[side].discard(price)
        else:
            self._unequal[side].add(price)

    def _advance(self, number: int) -> None:
        """Bring the real book behind event `number`, -1 for the first one; asked for in rising order."""
        while self._done < number:
            self._done += 1
            for side, price, qty in self._events.levels(self._done):
                real, best = self._real[side], self._best[side]
                if qty:
                    real[price] = qty
                    if best is not None and (price - best) * side > 0:
                        self._best[side] = price
                else:
                    real.pop(price, None)
                    if price == best:
                        self._best[side] = None
                self._touch(side, price)

    def crossed(self, number: int) -> bool:
        """Whether the exchange's book is, after event `number`."""
        self._advance(number)
        bids, asks = self._real[1], self._real[-1]
        if not (bids and asks):
            return False
        bid, ask = self._best[1], self._best[-1]
        if bid is None:
            bid = self._best[1] = max(bids)
        if ask is None:
            ask = self._best[-1] = min(asks)
        return bid >= ask

    def differences(self, number: int) -> list[str]:
        """What differs from the exchange's book after event `number`."""
        self._advance(number)
        wrong: list[str] = []
        for side, unequal in self._unequal.items():
            mine, real, horizon = self._mine[side], self._real[side], self._horizon.get(side)
            for price in sorted(unequal) if unequal else ():
                beyond = horizon is not None and (price < horizon if side == 1 else price > horizon)
                if not (beyond and price not in mine):
                    wrong.append(
                        f"{'bid' if side == 1 else 'ask'} {price}: {mine.get(price)} instead of {real.get(price)}"
                    )
        return wrong


class _Message(NamedTuple):
    """The rows of one exchange message."""

    seq_id: int  # this, its id, flags and time are those of the first row
    update_id: int
    flags: int
    timestamp: int
    whole: bool  # the last row says that it is, and all have the same id
    levels: list[Level]
    actions: list[str]


def _messages(rows: Rows) -> Iterator[_Message]:
    """Rows of one ticker as exchange messages: each ends with a row flagged LAST."""
    stops = np.flatnonzero(rows.numbers("flags")[0] & LAST) + 1
    if len(rows) and (not len(stops) or stops[-1] != len(rows)):
        stops = np.append(stops, len(rows))
    start = 0
    while start < len(rows):  # whole messages of about so many rows
        after = int(np.searchsorted(stops, start + BATCH_ROWS, side="right"))
        here = stops[np.searchsorted(stops, start, side="right") : after]
        if not len(here):
            here = stops[after : after + 1]
        part = rows.slice(start, int(here[-1]))
        names = "seq_id", "update_id", "flags", "timestamp", "action"
        seq_ids, ids, flags, times, actions = (part.column(name) for name in names)
        levels = list(part.values("side", "price", "qty"))
        low = 0
        for high in (here - start).tolist():
            whole = bool(flags[high - 1] & LAST) and ids[low:high].count(ids[low]) == high - low
            yield _Message(seq_ids[low], ids[low], flags[low], times[low], whole, levels[low:high], actions[low:high])
            low = high
        start = int(here[-1])


def _number(data: Mapping[str, Any], word: str) -> float | None:
    value: Any = data
    for part in word.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return None if value is None else float(value)


def _same_in_ring(
    stored: np.ndarray[Any, Any], nulls: np.ndarray[Any, Any], ring: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """A null of the table is -1 or NaN in the ring; booleans are bytes there."""
    nothing = ring != ring  # NaN
    same: np.ndarray[Any, Any] = np.where(
        nulls, nothing | (ring == -1), (stored == ring) | (nothing & (stored != stored))
    )
    return same
