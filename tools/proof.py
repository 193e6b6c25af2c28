"""The proof: what a simulated exchange did, what the rings published and what the tables hold agree row for row.

Called by tests and by the demo with the ledger of `mdsim`. It decodes nothing: the ledger's text is turned into plain
dictionaries, the tables are read with pyarrow, and every rule is written here a second time. What it shows:

    trades      every trade between the first and the last recorded one of a ticker is there once and equal, or an
                unrepaired row of `gaps` names its id; no trade that the exchange did not make
    books       a book rebuilt from the rows equals the exchange's after every message that no row of `gaps` names, is
                crossed exactly where rows say BOOK_INVALID, every row says truly what it did to the book, and every
                depth event is there once, is named by `gaps`, or lies before the snapshot that ended the hole. Only
                rows flagged UNPROVEN stand in no book: they are the exchange's, and nothing but a snapshot or the end
                follows them
    bbo, tickers, candles, liquidations
                rows are the exchange's, in its order; a missing one lies in the time of a hole that `gaps` records, or
                lay between two polls of a polled venue, of which only every closed candle must be there
    rings       tables have the very rows of the rings, seq_ids without a hole up to what was published
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mdcollector.records import ALWAYS_ON
from mdcollector.ring import RingReader
from tools.sim.ledger import Ledger
from tools.sim.server import venues

DIFFERENCES_MAX = 100  # kept in words; all of them are counted
LATE_US = 1_000_000  # the simulator's stamps may be so much older than the moment it really sent
DATA_FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles")
LAST, SNAPSHOT, BOOK_INVALID, REPAIRED, TIME_LOCAL, UNPROVEN = 1, 2, 8, 16, 64, 128

Row = dict[str, Any]
Levels = dict[float, float]


@dataclass
class FeedProof:
    """What the comparison of one feed came to."""

    rows: int = 0  # in the tables
    equal: int = 0  # rows, or for books messages, that equal the ledger's
    explained: int = 0  # of the ledger's that are not in the tables, and `gaps` or a snapshot says why
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
    feeds: Sequence[str] = DATA_FEEDS,
    book_stream: str = "",
    intervals: Sequence[str] = (),
    snapshot_levels: int = 0,
    to_the_end: bool = False,
) -> Proof:
    """Compare the tables below `out` (and the rings, where they are named) with the ledger of `exchange`.

    `intervals` are those of the recorded candles: one minute, or all that a venue without it has, when none is named.
    `book_stream` is the speed that was recorded, if it is not the venue's usual one; `snapshot_levels` the levels that
    a snapshot was asked for, if books are deeper than that. `to_the_end`: nothing after the last row may be missing
    either, for runs whose market stood still before they were stopped.
    """
    truth = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
    if exchange not in ("", truth.start["exchange"]):
        raise ValueError(f"{ledger} is of {truth.start['exchange']}, not of {exchange}")
    comparison = _Comparison(truth, out, book_stream, intervals, snapshot_levels, to_the_end)
    for feed in feeds:
        comparison.feed(feed)
    if rings is not None:
        for feed in (*feeds, *ALWAYS_ON):
            comparison.rings(rings, feed)
    return comparison.proof


def load_rows(out: Path, feed: str, exchange: str = "*") -> dict[str, list[Row]]:
    """Rows of a feed per connector, in the order of seq_id; times are integers in us, texts plain text."""
    found: dict[str, list[pa.Table]] = defaultdict(list)
    for path in sorted(out.glob(f"{feed}/{exchange}/date=*/*.parquet")):
        found[path.name.rsplit("-", 3)[0]].append(pq.read_table(path, partitioning=None))
    rows: dict[str, list[Row]] = {}
    for connector, tables in found.items():
        columns = {}
        for name in tables[0].column_names:
            column = pa.chunked_array([chunk for table in tables for chunk in _plain(table[name]).chunks])
            columns[name] = column.to_pylist()
        names = list(columns)
        rows[connector] = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows[connector].sort(key=lambda row: row["seq_id"])
    return rows


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.int64())
    return pc.cast(column, pa.string()) if pa.types.is_dictionary(column.type) else column


def standing_gaps(rows: Sequence[Row]) -> list[Row]:
    """Holes that no later row with the same feed, ticker and ids (without ids: the same end) calls repaired."""
    state: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        ids = (row["first_id"], row["last_id"]) if row["first_id"] is not None else ("time", row["to_time"])
        state[row["feed"], row["ticker"], *ids] = row
    return [row for row in state.values() if not row["repaired"]]


@dataclass(frozen=True)
class _Holes:
    """The unrepaired holes of one connector."""

    rows: list[Row]

    def names_id(self, feed: str, ticker: str, number: int) -> bool:
        return any(
            g["feed"] == feed and g["ticker"] == ticker and g["first_id"] is not None
            and g["first_id"] <= number <= g["last_id"]
            for g in self.rows
        )  # fmt: skip

    def overlaps_ids(self, feed: str, ticker: str, first: int, last: int) -> bool:
        return any(
            g["feed"] == feed and g["ticker"] == ticker and g["first_id"] is not None
            and g["first_id"] <= last and first <= g["last_id"]
            for g in self.rows
        )  # fmt: skip

    def at_time(self, feed: str, ticker: str, t: int) -> bool:
        return any(
            g["feed"] == feed and g["ticker"] in ("*", ticker) and g["from_time"] is not None
            and g["from_time"] - LATE_US <= t <= g["to_time"]
            for g in self.rows
        )  # fmt: skip


class _Comparison:
    def __init__(
        self, truth: Ledger, out: Path, book_stream: str, intervals: Sequence[str], snapshot_levels: int, to_end: bool
    ) -> None:
        self.truth, self.out, self.to_end = truth, out, to_end
        self.snapshot_levels = snapshot_levels
        name = truth.start["exchange"]
        kind = venues()[name]
        self.dialect, self.exchange = kind.dialect, name.upper()
        has_minutes = self.dialect.intervals.get("1m", "1m") in kind.intervals
        self.intervals = intervals or (("1m",) if has_minutes else tuple(kind.intervals))
        self.stream = book_stream or self.dialect.book_stream
        self.proof = Proof(name, faults=truth.faults_fired())
        self.holes: dict[str, _Holes] = {}
        for connector, rows in load_rows(out, "gaps", self.exchange).items():
            standing = standing_gaps(rows)
            self.proof.gaps.update((row["feed"], row["cause"]) for row in standing)
            origin, mark, _feed = connector.partition("~")  # rows behind a mark are the writer's own: rows it lost
            if mark:
                for row in standing:
                    self.proof.differ(row["feed"], f"{origin}: local rows {row['first_id']}..{row['last_id']} lost")
            else:
                self.holes[connector] = _Holes(standing)

    def feed(self, feed: str) -> None:
        count = self.proof.feeds.setdefault(feed, FeedProof())
        check: Callable[[str, str, list[Row]], None] = {
            "trades": self._trades,
            "orderbook_l2": self._book,
            "bbo": self._bbo,
            "tickers": self._tickers,
            "candles": self._candles,
            "liquidations": self._liquidations,
        }[feed]
        seen: dict[str, str] = {}
        for connector, rows in load_rows(self.out, feed, self.exchange).items():
            count.rows += len(rows)
            count.repaired += sum(1 for row in rows if row["flags"] & REPAIRED)
            self._contiguous(feed, connector, [row["seq_id"] for row in rows])
            by_ticker: dict[str, list[Row]] = defaultdict(list)
            for row in rows:
                by_ticker[row["ticker"]].append(row)
                if row["exchange"] != self.exchange:
                    self.proof.differ(feed, f"seq_id {row['seq_id']} says exchange {row['exchange']}")
            for ticker, mine in by_ticker.items():
                if ticker not in self.truth.start["tickers"]:
                    self.proof.differ(feed, f"{len(mine)} rows of {ticker}, which the exchange does not list")
                elif seen.setdefault(ticker, connector) != connector:
                    self.proof.differ(feed, f"{ticker} was recorded by {seen[ticker]} and by {connector}")
                else:
                    check(connector, ticker, mine)

    def _contiguous(self, feed: str, connector: str, seqs: Sequence[int]) -> None:
        if list(seqs) != list(range(len(seqs))):
            at = next(i for i, seq in enumerate(seqs) if seq != i)
            self.proof.differ(feed, f"{connector}: seq_id {seqs[at]} stands where {at} is due")

    def _holes_of(self, connector: str) -> _Holes:
        return self.holes.get(connector, _Holes([]))

    def _explained(self, feed: str) -> None:
        self.proof.feeds[feed].explained += 1

    def _equal(self, feed: str, where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        wrong = [f"{k} {found[k]!r} instead of {v!r}" for k, v in expected.items() if not _same(found[k], v)]
        if wrong:
            self.proof.differ(feed, f"{where}: {', '.join(wrong)}")
        else:
            self.proof.feeds[feed].equal += 1

    def _time(self, t: int) -> int:
        return t // self.dialect.unit_us * self.dialect.unit_us

    # Trades

    def _trades(self, connector: str, ticker: str, rows: list[Row]) -> None:
        truth = {row["seq"]: row for row in self.truth.rows("trade", ticker)}
        merged = self.truth.aggtrades(ticker)
        counted = self.dialect.trades_have_counter
        seq_of = {row["id"]: row["seq"] for row in truth.values()}  # the counter that some venues keep to themselves
        found: dict[int, Row] = {}
        for row in rows:
            seq, ids = row["trade_seq"], range(0)
            if not counted:
                if seq is not None:
                    self.proof.differ("trades", f"{ticker} {row['trade_id']}: has a counter that was never told")
                seq = seq_of.get(row["trade_id"], -1)
            elif seq is None:  # the venue merges trades: the row stands for as many as its ledger says
                real = merged.get(row["trade_id"], {})
                seq = int(row["trade_id"])
                ids = range(int(real.get("first", seq)), seq + 1)
            if row["flags"] & REPAIRED or not ids:  # what is fetched comes one by one
                ids, real = range(seq, seq + 1), truth.get(seq, {})
            if any(one not in truth for one in ids):
                self.proof.differ("trades", f"{ticker} {seq}: the exchange made no such trade")
            elif any(one in found for one in ids):
                self.proof.differ("trades", f"{ticker} {seq}: is there twice")
            else:
                found.update(dict.fromkeys(ids, row))
                expected = {
                    "trade_id": real["id"], "price": float(real["price"]), "qty": float(real["qty"]),
                    "side": 1 if real["side"] == "BUY" else -1, "timestamp": self._time(real["t"]),
                }  # fmt: skip
                self._equal("trades", f"{ticker} {seq}", row, expected)
        if not found:
            return
        last = max(truth) if self.to_end else max(found)
        holes = self._holes_of(connector)
        for seq in range(min(found), last + 1):
            if seq not in found and seq in truth:
                if holes.names_id("trades", ticker, seq) or (
                    not counted and holes.at_time("trades", ticker, self._time(truth[seq]["t"]))
                ):
                    self._explained("trades")
                else:
                    self.proof.differ("trades", f"{ticker} {seq}: is missing and no row of gaps names it")

    # Books

    def _book(self, connector: str, ticker: str, rows: list[Row]) -> None:
        events = self.truth.book_events(ticker, self.stream)
        lasts = [event["last"] for event in events]
        books = _Truth(self.truth.start["tickers"][ticker]["book"], events)
        mine = _Rebuilt(self.snapshot_levels)
        holes = self._holes_of(connector)
        applied = -1
        unproven: list[int] = []  # ids of messages since the book was last proven
        for message in _messages(rows):
            update_id, flags = message[0]["update_id"], message[0]["flags"]
            where = f"{ticker} update {update_id} (seq_id {message[0]['seq_id']})"
            if not message[-1]["flags"] & LAST or any(row["update_id"] != update_id for row in message):
                self.proof.differ("orderbook_l2", f"{where}: its message is not whole")
            if flags & SNAPSHOT:
                self._skipped(ticker, holes, events, lasts, applied, update_id)
                mine.load(message)
                applied, unproven = update_id, []
                number = bisect_right(lasts, update_id) - 1
                if (number >= 0 and lasts[number] == update_id) or update_id == books.first:
                    self._compare(where, mine, books.at(number))
                else:
                    self.proof.feeds["orderbook_l2"].equal += 1  # between two events: the next one will show it
                continue
            number = bisect_right(lasts, update_id) - 1
            if number < 0 or lasts[number] != update_id:
                self.proof.differ("orderbook_l2", f"{where}: the exchange published no such event")
                continue
            event = events[number]
            if update_id <= applied or update_id in unproven:
                self.proof.differ("orderbook_l2", f"{where}: is there twice or comes after {applied}")
                continue
            before = max([applied, *unproven])
            self._skipped(ticker, holes, events, lasts, before, event["first"] - 1 if number else before)
            self._levels(where, message, event, None if flags & UNPROVEN else mine)
            if message[0]["timestamp"] != self._time(event["t"]):
                self.proof.differ(
                    "orderbook_l2", f"{where}: timestamp {message[0]['timestamp']} instead of {event['t']}"
                )
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
            bids, asks = books.at(number)
            crossed = bool(bids and asks and max(bids) >= min(asks))
            if crossed != bool(flags & BOOK_INVALID):
                says, is_ = ("", "not ") if flags & BOOK_INVALID else ("not ", "")
                self.proof.differ("orderbook_l2", f"{where}: {says}flagged invalid, but the book is {is_}crossed")
            self._compare(where, mine, (bids, asks))
        if self.to_end and lasts:
            self._skipped(ticker, holes, events, lasts, max([applied, *unproven]), lasts[-1])

    def _levels(self, where: str, message: list[Row], event: Mapping[str, Any], mine: "_Rebuilt | None") -> None:
        """The rows of a message are the event's levels, and say truly what each one did to the book, if it has one."""
        expected = Counter(
            (side, float(price), float(qty))
            for side, levels in ((1, event["bids"]), (-1, event["asks"]))
            for price, qty in levels
        )
        found = Counter((row["side"], row["price"], row["qty"]) for row in message)
        if found != expected:
            gone, extra = expected - found, found - expected
            self.proof.differ(
                "orderbook_l2", f"{where}: levels missing {list(gone)[:3]}, not the exchange's {list(extra)[:3]}"
            )
        for row in message:
            true = mine.apply(row) if mine is not None else "UPDATE" if row["qty"] else "DELETE"
            if true != row["action"]:
                self.proof.differ("orderbook_l2", f"{where}: price {row['price']} says {row['action']}, it is {true}")

    def _skipped(
        self, ticker: str, holes: _Holes, events: Sequence[Row], lasts: Sequence[int], applied: int, upto: int
    ) -> None:
        """Account for the events with ids behind `applied` up to `upto`, of which there are no rows."""
        if applied < 0 or upto <= applied:
            return
        skipped = events[bisect_right(lasts, applied) : bisect_right(lasts, upto)]
        if not skipped:
            return
        if holes.overlaps_ids("orderbook_l2", ticker, applied + 1, upto):
            self.proof.feeds["orderbook_l2"].explained += len(skipped)
        else:
            text = (
                f"{ticker}: {len(skipped)} events between {applied} and {upto} are missing and no row of gaps says so"
            )
            self.proof.differ("orderbook_l2", text)

    def _compare(self, where: str, mine: "_Rebuilt", truth: tuple[Levels, Levels]) -> None:
        self.proof.books_checked += 1
        wrong = mine.differences(truth)
        if wrong:
            self.proof.differ("orderbook_l2", f"{where}: the book differs: {'; '.join(wrong[:3])}")
        else:
            self.proof.feeds["orderbook_l2"].equal += 1

    # Feeds without ids: rows must come in the order of the ledger

    def _bbo(self, connector: str, ticker: str, rows: list[Row]) -> None:
        has_id, has_time = self.dialect.bbo_has_id, self.dialect.bbo_has_time

        def of_row(row: Row) -> tuple[Any, ...]:
            prices = row["bid_price"], row["bid_qty"], row["ask_price"], row["ask_qty"]
            return (*prices, row["update_id"] if has_id else None, row["timestamp"] if has_time else None)

        def of_truth(real: Row) -> tuple[Any, ...]:
            prices = (float(real[k]) for k in ("bid", "bid_qty", "ask", "ask_qty"))
            return (*prices, real["id"] if has_id else None, self._time(real["t"]) if has_time else None)

        lines = self.truth.rows("bbo", ticker)
        truth = [(of_truth(real), real["t"]) for real in lines]
        greetings = {of_truth(real) for real in lines if real.get("greeting")}
        self._in_order("bbo", connector, ticker, [(of_row(row), row) for row in rows], truth, greetings)
        if not has_time:
            self._times_local("bbo", ticker, rows)

    def _tickers(self, connector: str, ticker: str, rows: list[Row]) -> None:
        words = self.dialect.ticker_words

        def numbers(data: Mapping[str, Any]) -> tuple[float | None, ...]:
            return tuple(_number(data, word) for word in words.values())

        def of_truth(real: Row) -> tuple[Any, ...]:
            return (self._time(real["t"]), *numbers(real["data"]))

        def of_row(row: Row) -> tuple[Any, ...]:
            return (row["timestamp"], *(None if row[c] is None or row[c] != row[c] else row[c] for c in words))

        lines = self.truth.rows("ticker", ticker)
        truth = [(of_truth(real), real["t"]) for real in lines if real.get("stream", self.stream) == self.stream]
        # What a new subscriber is told at once belongs to no timer of the exchange.
        greetings = Counter(of_truth(real) for real in self.truth.rows("first_ticker", ticker))
        mine: list[tuple[tuple[Any, ...], Row]] = []
        in_order = {key for key, _ in truth}
        for row in rows:
            key = of_row(row)
            if key not in in_order and greetings[key]:
                greetings[key] -= 1
                self.proof.feeds["tickers"].equal += 1
            else:
                mine.append((key, row))
        self._in_order("tickers", connector, ticker, mine, truth)

    def _candles(self, connector: str, ticker: str, rows: list[Row]) -> None:
        has_time, counts = self.dialect.candle_has_time, self.dialect.candle_counts_trades

        def of_truth(real: Row) -> tuple[Any, ...]:
            ohlcv = (None if real[k] is None else float(real[k]) for k in ("open", "high", "low", "close", "volume"))
            times = real["open_time"], self._time(real["t"]) if has_time else None
            return (*times, *ohlcv, real["trades"] if counts else None)

        def of_row(row: Row) -> tuple[Any, ...]:
            times = row["open_time"], row["timestamp"] if has_time else None
            return (*times, *(row[k] for k in ("open", "high", "low", "close", "volume")), row["trades"])

        for interval in self.intervals:
            name = self.dialect.intervals.get(interval, interval)
            truth = [real for real in self.truth.rows("candle", ticker) if real["interval"] == name]
            mine = [row for row in rows if row["interval"] == interval]
            if self.dialect.polled:
                self._polled_candles(f"{ticker} {interval}", mine, truth, of_row, of_truth)
                continue
            closed = [(of_truth(real), real["t"]) for real in truth if real["closed"]]
            if counts or self.dialect.candle_says_closed:
                opened = [(of_truth(real), real["t"]) for real in truth if not real["closed"]]
                self._in_order("candles", connector, ticker, [(of_row(r), r) for r in mine if not r["closed"]], opened)
                self._in_order("candles", connector, ticker, [(of_row(r), r) for r in mine if r["closed"]], closed)
                continue
            every = [(of_truth(real), real["t"]) for real in truth]
            self._in_order("candles", connector, ticker, [(of_row(r), r) for r in mine if not r["closed"]], every)
            finals = {key for key, _ in closed}
            for row in (row for row in mine if row["closed"]):
                if of_row(row) not in finals:
                    self.proof.differ(
                        "candles", f"{ticker} {interval} {row['open_time']}: said to be closed, it is not"
                    )
        others = {row["interval"] for row in rows} - set(self.intervals)
        if others:
            self.proof.differ("candles", f"{ticker}: unexpected intervals {sorted(others)}")

    def _liquidations(self, connector: str, ticker: str, rows: list[Row]) -> None:
        def of_truth(real: Row) -> tuple[Any, ...]:
            side = 1 if real["side"] == "BUY" else -1
            return self._time(real["t"]), side, float(real["price"]), float(real["qty"])

        truth = [(of_truth(real), real["t"]) for real in self.truth.rows("liquidation", ticker)]
        mine = [((row["timestamp"], row["side"], row["price"], row["qty"]), row) for row in rows]
        self._in_order("liquidations", connector, ticker, mine, truth)

    def _polled_candles(
        self,
        where: str,
        rows: Sequence[Row],
        truth: Sequence[Row],
        of_row: Callable[[Row], tuple[Any, ...]],
        of_truth: Callable[[Row], tuple[Any, ...]],
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

    def _times_local(self, feed: str, ticker: str, rows: Sequence[Row]) -> None:
        for row in rows:
            if row["timestamp"] != row["rcv_timestamp"] or not row["flags"] & TIME_LOCAL:
                self.proof.differ(feed, f"{ticker} seq_id {row['seq_id']}: the exchange gave no time, the row says one")

    def _in_order(
        self,
        feed: str,
        connector: str,
        ticker: str,
        rows: Sequence[tuple[tuple[Any, ...], Row]],
        truth: Sequence[tuple[tuple[Any, ...], int]],
        greetings: Set[tuple[Any, ...]] = frozenset(),
    ) -> None:
        """Rows are a subsequence of the truth; what lies between two of them and is missing has a hole to lie in.

        `greetings` repeat what was known, to one client that has just come; the others never see them.
        """
        places: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for place, (key, _) in enumerate(truth):
            places[key].append(place)
        holes, reached = self._holes_of(connector), -1
        for key, row in rows:
            known = places.get(key, [])
            behind = bisect_right(known, reached)
            if behind == len(known):
                why = "is there twice or out of order" if known else "is not the exchange's"
                self.proof.differ(feed, f"{ticker} seq_id {row['seq_id']} {key}: {why}")
                continue
            place = known[behind]
            if reached >= 0 and not self.dialect.polled:
                self._between(
                    feed, ticker, holes, [line for line in truth[reached + 1 : place] if line[0] not in greetings]
                )
            reached = place
            self.proof.feeds[feed].equal += 1
        if self.to_end and rows and not self.dialect.polled:
            self._between(feed, ticker, holes, [line for line in truth[reached + 1 :] if line[0] not in greetings])

    def _between(self, feed: str, ticker: str, holes: _Holes, missing: Sequence[tuple[tuple[Any, ...], int]]) -> None:
        for key, t in missing:
            if holes.at_time(feed, ticker, t):
                self._explained(feed)
            else:
                self.proof.differ(feed, f"{ticker} {key} at {t}: is missing and lies in no recorded hole")

    # Rings

    def rings(self, rings: Path, feed: str) -> None:
        """Tables hold the rows that the rings published: all numbers of them, and equal where a ring still has them."""
        tables = load_rows(self.out, feed, self.exchange)
        for path in sorted(rings.glob(f"*/{feed}.meta")):
            with RingReader(path.parent, feed) as ring:
                if ring.exchange != self.exchange:
                    continue
                ring.seek("oldest")
                batches = [ring.read()]
                while len(batches[-1]):
                    batches.append(ring.read())
                stored, published = tables.get(ring.connector, []), ring.published
                if len(stored) != published:
                    self.proof.differ(
                        feed, f"{ring.connector}: {published} rows published, {len(stored)} in the tables"
                    )
                    continue
                for batch in batches:
                    if len(batch):
                        first = int(batch["seq_id"][0])
                        self._ring_rows(ring, batch, stored[first : first + len(batch)])

    def _ring_rows(self, ring: RingReader, batch: np.ndarray[Any, Any], stored: Sequence[Row]) -> None:
        names = ring.names(batch)
        action = {1: "NEW", 2: "UPDATE", 3: "DELETE"}
        columns: dict[str, list[Any]] = {}
        for name in batch.dtype.names or ():
            values = batch[name].tolist()
            if name == "ticker":
                values = names.tolist()
            elif name == "exchange":
                values = [self.exchange] * len(batch)
            elif name == "action":
                values = [action[value] for value in values]
            elif name == "trade_id":
                seqs = batch["trade_seq"].tolist()
                values = [v.decode() or str(seq) for v, seq in zip(values, seqs, strict=True)]
            elif batch.dtype[name].kind == "S":
                values = [value.decode() for value in values]
            columns[name] = values
        for number, row in enumerate(stored):
            wrong = [n for n, values in columns.items() if not _same_in_ring(row[n], values[number])]
            if wrong:
                self.proof.differ(
                    ring.feed.name, f"{ring.connector} seq_id {row['seq_id']}: {', '.join(wrong)} not as in the ring"
                )


class _Truth:
    """The exchange's book after each depth event; asked for in rising order."""

    def __init__(self, first: Mapping[str, Any], events: Sequence[Row]) -> None:
        self.first = first["last"]
        self._sides: tuple[Levels, Levels] = tuple({float(p): float(q) for p, q in first[s]} for s in ("bids", "asks"))  # type: ignore[assignment]
        self._events, self._done = events, -1

    def at(self, number: int) -> tuple[Levels, Levels]:
        """The book after event `number`, -1 for the first one."""
        while self._done < number:
            self._done += 1
            event = self._events[self._done]
            for side, levels in zip(self._sides, (event["bids"], event["asks"]), strict=True):
                for price, qty in levels:
                    if float(qty):
                        side[float(price)] = float(qty)
                    else:
                        side.pop(float(price), None)
        return self._sides


class _Rebuilt:
    """A book made from rows alone, as a reader of the tables makes it."""

    def __init__(self, snapshot_levels: int) -> None:
        self.sides: dict[int, Levels] = {1: {}, -1: {}}
        self._whole_below = snapshot_levels
        self._horizon: dict[int, float] = {}  # side -> worst price that the snapshot could show

    def load(self, message: Sequence[Row]) -> None:
        self.sides = {1: {}, -1: {}}
        for row in message:
            self.sides[row["side"]][row["price"]] = row["qty"]
        self._horizon = {}
        for side, levels in self.sides.items():
            if self._whole_below and len(levels) >= self._whole_below:
                self._horizon[side] = min(levels) if side == 1 else max(levels)

    def apply(self, row: Row) -> str:
        """Apply a level; what it did."""
        side, price = self.sides[row["side"]], row["price"]
        if not row["qty"]:
            side.pop(price, None)
            return "DELETE"
        known = price in side
        side[price] = row["qty"]
        return "UPDATE" if known else "NEW"

    def differences(self, truth: tuple[Levels, Levels]) -> list[str]:
        wrong: list[str] = []
        for side, real in ((1, truth[0]), (-1, truth[1])):
            mine = self.sides[side]
            if mine == real:
                continue
            horizon = self._horizon.get(side)
            for price in sorted(mine.keys() | real.keys()):
                beyond = horizon is not None and (price < horizon if side == 1 else price > horizon)
                if mine.get(price) != real.get(price) and not (beyond and price not in mine):
                    wrong.append(
                        f"{'bid' if side == 1 else 'ask'} {price}: {mine.get(price)} instead of {real.get(price)}"
                    )
        return wrong


def _messages(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one ticker as exchange messages: each ends with a row flagged LAST."""
    message: list[Row] = []
    for row in rows:
        message.append(row)
        if row["flags"] & LAST:
            yield message
            message = []
    if message:
        yield message


def _number(data: Mapping[str, Any], word: str) -> float | None:
    value: Any = data
    for part in word.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return None if value is None else float(value)


def _same(found: Any, expected: Any) -> bool:
    return bool(found == expected)


def _same_in_ring(stored: Any, ring: Any) -> bool:
    """A null of the table is -1 or NaN in the ring; booleans are bytes there."""
    if stored is None:
        return bool(ring == -1 or ring != ring)
    if isinstance(stored, float) and stored != stored:
        return bool(ring != ring)
    return bool(stored == ring)
