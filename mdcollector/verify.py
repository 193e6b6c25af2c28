"""Verify: proves from the files alone what a tree holds, ticker by ticker and hour by hour. Run by `mdcollector verify`.

Every file is read with its checksums and compared with its name. Every stream (process and feed) must be one line of
seq_ids; every trade counter of a connector must be without holes, also where a ticker went from one of its connections
to another; every book message must be whole and in order. What is missing must be in the connector's rows of the table
`gaps`, where a later row with the same feed, ticker and ids replaces an earlier one:

    lapped, damaged    local rows that the writer lost (ids are seq_ids); they also explain what is missing around them
    anything else      ids of the exchange; a row that says `repaired` explains nothing, its ids must be there

An hour is one of event time. A hole belongs to the hour of the first row behind it. Memory is bounded by the number of
tickers, hours and holes, never by the number of rows. Nothing is written.
"""

import bisect
import contextlib
import fcntl
import fnmatch
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mdcollector.config import connector_of
from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS, StorageError
from mdcollector.records import GAPS, Flag
from mdcollector.sinks import DAY_US, LEDGER_MARK
from mdcollector.sinks.parquet import (
    LOCKS,
    StoredFile,
    foreign_files,
    lock_file,
    read_footer,
    read_row_groups,
    stored_files,
)
from mdcollector.tables import Values

HOUR_US = 3_600_000_000
FINDINGS_MAX = 1000  # kept in words; all are counted
LOCK_WAIT_S = 30.0
TIME_MIN_US = 1_230_768_000_000_000  # 2009: before it nothing that is traded here existed
TIME_AHEAD_MAX_US = 400 * DAY_US  # an event time this far ahead of its receipt is nonsense


@dataclass
class Hour:
    """One line of the result: one ticker of one stream in one hour."""

    feed: str
    exchange: str
    connector: str
    ticker: str
    hour: str
    rows: int = 0
    first_id: int | None = None  # trade_seq of trades, update_id of orderbook_l2, of all others seq_id
    last_id: int | None = None
    missing: int = 0  # ids that are neither there nor in the ledger
    explained: int = 0  # ids that are not there and that the ledger names


@dataclass
class Report:
    """What is there, what is not, and what is wrong."""

    hours: list[Hour] = field(default_factory=list)
    files: int = 0
    rows: int = 0
    bytes: int = 0
    missing: int = 0  # ids and local rows
    explained: int = 0
    findings: list[str] = field(default_factory=list)
    findings_count: int = 0

    def find(self, text: str) -> None:
        self.findings_count += 1
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(text)

    @property
    def exit_code(self) -> int:
        return EXIT_FINDINGS if self.findings_count else EXIT_DONE

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "exit_code": self.exit_code}


Place = tuple[str, str, str]  # exchange, process that collected it or the connector that the process is of, feed
SEQ_END = 1 << 63


class _Position(NamedTuple):
    """Of a row; in this order the rows of a process were written."""

    epoch: int
    seq_id: int
    process: str


def _of_connector(place: Place) -> Place:
    """The place of all connections of a connector together."""
    exchange, process, feed = place
    return exchange, connector_of(process), feed


class _Gap(NamedTuple):
    """One row of the ledger. Ids are None where the feed has none: then it names a time."""

    first: int | None
    last: int | None
    from_us: int
    to_us: int
    repaired: bool


class _Ledger:
    """The table `gaps`: the newest version of every row. What one connector missed says nothing of another one."""

    def __init__(self) -> None:
        self._lost: dict[Place, list[tuple[int, int, int]]] = defaultdict(list)  # epoch, first and last seq_id
        self._newest: dict[tuple[Place, str, int | None, int | None, int], tuple[tuple[int, int, int], _Gap]] = {}
        self._gaps: dict[tuple[Place, str], list[_Gap]] = defaultdict(list)

    def add(self, file: StoredFile, table: pa.Table) -> None:
        times = {name: _micros(table[name]).tolist() for name in ("rcv_timestamp", "from_time", "to_time")}
        columns = ("feed", "ticker", "first_id", "last_id", "repaired", "seq_id")
        rows = zip(*(table[name].to_pylist() for name in columns), *times.values(), strict=True)
        for feed, ticker, first, last, repaired, seq, rcv_us, from_us, to_us in rows:
            if LEDGER_MARK in file.connector:  # the writer's own: local rows
                process = file.connector.rpartition(LEDGER_MARK)[0]
                self._lost[file.exchange, process, feed].append((file.epoch, first, last))
                continue
            # Where a feed has no ids it is the time that tells one hole from another.
            place = _of_connector((file.exchange, file.connector, feed))
            key = (place, ticker, first, last, to_us if first is None else 0)
            age = (rcv_us, file.epoch, seq)
            if key not in self._newest or age >= self._newest[key][0]:
                self._newest[key] = age, _Gap(first, last, from_us, to_us, repaired)

    def close(self) -> None:
        """All rows are in."""
        for (place, ticker, *_), (_, gap) in self._newest.items():
            self._gaps[place, ticker].append(gap)

    def gaps(self, place: Place, ticker: str) -> list[_Gap]:
        """What a connector says of one ticker."""
        return self._gaps.get((_of_connector(place), ticker), [])

    def lost_between(self, place: Place, low: _Position, high: _Position) -> bool:
        """The writer lost rows between two rows; of different processes, behind the one or before the other."""
        exchange, _, feed = place
        ways = [(low, high)]
        if low.process != high.process:  # in the same life, for others say nothing of how these two are joined
            ways = [(low, low._replace(seq_id=SEQ_END)), (high._replace(seq_id=-1), high)]
        return any(
            (epoch, last) > after[:2] and (epoch, first) < before[:2]
            for after, before in ways
            for epoch, first, last in self._lost.get((exchange, after.process, feed), ())
        )

    def lost_rows(self, place: Place, epochs: range, first: int, last: int) -> int:
        """How many of the rows first..last the writer says it lost."""
        known = [(f, u) for epoch, f, u in self._lost.get(place, ()) if epoch in epochs]
        return _covered(known, first, last)


def _covered(ranges: Iterable[tuple[int, int]], first: int, last: int) -> int:
    """How many of the numbers first..last lie in any of the ranges."""
    count, reached = 0, first
    for low, high in sorted(ranges):
        low, high = max(low, reached), min(high, last)  # noqa: PLW2901 (clipped)
        if low <= high:
            count += high - low + 1
            reached = high + 1
    return count


def _micros(column: pa.ChunkedArray) -> Values:
    """A timestamp column as integers, null as 0."""
    values: Values = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
    return values


@dataclass
class _Span:
    """Trade counters without a hole, and where and when the outermost were seen."""

    first: int
    last: int
    first_at: _Position
    last_at: _Position
    first_us: int
    last_us: int


class _Trades:
    """The trade counters of one ticker of one connector, in spans: one as long as nothing is missing."""

    def __init__(self) -> None:
        self.spans: list[_Span] = []
        self.twice = 0

    def add(self, new: _Span) -> None:
        """Take counters that may come in any order: repaired trades come late."""
        spans = self.spans
        at = bisect.bisect_left(spans, new.first - 1, key=lambda span: span.last)
        while at < len(spans) and spans[at].first <= new.last + 1:
            old = spans.pop(at)
            self.twice += max(0, min(old.last, new.last) - max(old.first, new.first) + 1)
            low, high = min((old, new), key=lambda s: s.first), max((old, new), key=lambda s: s.last)
            new = _Span(low.first, high.last, low.first_at, high.last_at, low.first_us, high.last_us)
        spans.insert(at, new)


class _Book:
    """What one ticker's book rows came to so far."""

    __slots__ = ("at", "update_id")

    def __init__(self, update_id: int, at: _Position) -> None:
        self.update_id, self.at = update_id, at


@dataclass
class _Tail:
    """The last row of a stream so far."""

    file: StoredFile
    ring: int
    ticker: str = ""
    update_id: int = 0
    flags: int = int(Flag.LAST)
    checked: bool = False  # its rows could be read


class _Verifier:
    def __init__(self, report: Report, ledger: _Ledger) -> None:
        self.report, self.ledger = report, ledger
        self.hours: dict[tuple[Place, str, int], Hour] = {}
        self.trades: dict[tuple[Place, str], _Trades] = defaultdict(_Trades)
        self.books: dict[tuple[Place, str], _Book] = {}
        self.unproven: dict[tuple[Place, str], _Position] = {}  # the newest row that stands in no book

    # Files and the line of seq_ids

    def stream(self, files: Sequence[StoredFile]) -> None:
        """All files of one connector and feed, in order."""
        tail: _Tail | None = None
        for file in files:
            self.report.files += 1
            self.report.rows += file.rows
            try:
                ring = read_footer(file)
            except StorageError as error:
                self.report.find(str(error))
                tail = _Tail(file, tail.ring if tail else 0)
                continue
            if tail is not None and not self._follows(tail, file, ring):
                continue
            whole = tail is not None and tail.checked and tail.file.last + 1 == file.first
            here = _Tail(file, ring, *((tail.ticker, tail.update_id, tail.flags) if tail and whole else ()))
            here.checked = True
            try:
                for table in read_row_groups(file):
                    self._rows(file, table, here)
            except StorageError as error:
                self.report.find(str(error))
                here = _Tail(file, ring)  # what its rows would have said about the next file's is not known
            tail = here

    def _follows(self, tail: _Tail, file: StoredFile, ring: int) -> bool:
        """Look at the step from one file to the next; False when these rows were there already."""
        before, report, place = tail.file, self.report, (file.exchange, file.connector, file.feed)
        if file.epoch == before.epoch and file.first <= before.last:
            report.find(f"{file.path}: its rows are in {before.path.name} too; `mdcollector compact` puts that right")
            return False
        another_ring = file.epoch != before.epoch and ring != tail.ring and ring and tail.ring
        if another_ring or file.first <= before.last + 1:  # a ring that lost rows in a power failure counts anew
            return True
        first, last = before.last + 1, file.first - 1
        lost = self.ledger.lost_rows(place, range(before.epoch, file.epoch + 1), first, last)
        report.explained += lost
        if missing := last - first + 1 - lost:
            report.missing += missing
            report.find(f"{file.path}: {missing} of the rows with seq_id {first} to {last} before it are missing")
        return True

    # Rows

    def _rows(self, file: StoredFile, table: pa.Table, tail: _Tail) -> None:
        place = (file.exchange, file.connector, file.feed)
        tickers, codes = _categories(table["ticker"])
        times, received = _micros(table["timestamp"]), _micros(table["rcv_timestamp"])
        seqs = table["seq_id"].to_numpy()
        self._sane(file, table, times, received)
        ids: Values | None = None
        if file.feed == "trades":
            ids = self._trades(place, file.epoch, table, tickers, codes, times, seqs)
        elif file.feed == "orderbook_l2":
            ids = table["update_id"].to_numpy()
            flags = table["flags"].to_numpy()
            self._messages_whole(file, tickers, codes, ids, flags, seqs, tail)
            self._books(place, file, tickers, codes, ids, flags, seqs)
        self._count(place, tickers, codes, times, seqs if ids is None else ids)

    def _sane(self, file: StoredFile, table: pa.Table, times: Values, received: Values) -> None:
        """Numbers that cannot be."""
        bad: dict[str, int] = {}
        day = np.datetime64(file.date, "D").astype(np.int64)
        bad[f"rcv_timestamp is not of {file.date}"] = int((received // DAY_US != day).sum())
        bad["timestamp cannot be"] = int(((times < TIME_MIN_US) | (times > received + TIME_AHEAD_MAX_US)).sum())
        must_be_given = ("price", "qty") if file.feed in ("trades", "orderbook_l2", "liquidations") else ()
        for name in table.column_names:
            if table.schema.field(name).type == pa.float64():
                values = pc.fill_null(table[name], 0.0).to_numpy()
                wrong = ~np.isfinite(values) if name in must_be_given else np.isinf(values)
                bad[f"{name} is not a finite number"] = int(wrong.sum())
                if name.endswith("qty"):
                    bad[f"{name} is negative"] = int((values < 0).sum())
        if file.feed == "orderbook_l2":
            deleted = pc.equal(table["action"].cast(pa.string()), "DELETE").to_numpy()
            bad["DELETE and a quantity of 0 do not go together"] = int(
                (deleted != (table["qty"].to_numpy() == 0)).sum()
            )
        for what, count in bad.items():
            if count:
                self.report.find(f"{file.path}: {count} rows whose {what}")

    def _count(self, place: Place, tickers: Sequence[str], codes: Values, times: Values, ids: Values) -> None:
        """Rows and ids of every ticker and hour."""
        hours = times // HOUR_US
        base, span = int(hours.min()), int(hours.max() - hours.min()) + 1
        order = np.argsort(codes * span + (hours - base), kind="stable")
        keys = (codes * span + (hours - base))[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        given = np.where(ids < 0, np.iinfo(np.int64).max, ids)  # -1 where a trade has no counter
        lows, highs = np.minimum.reduceat(given[order], starts), np.maximum.reduceat(ids[order], starts)
        counts = np.diff(starts, append=len(keys))
        for key, count, low, high in zip(
            keys[starts].tolist(), counts.tolist(), lows.tolist(), highs.tolist(), strict=True
        ):
            line = self._hour(place, tickers[key // span], (base + key % span) * HOUR_US)
            line.rows += count
            line.first_id = low if line.first_id is None else min(low, line.first_id)
            line.last_id = high if line.last_id is None else max(high, line.last_id)

    def _hour(self, place: Place, ticker: str, time_us: int) -> Hour:
        key = (place, ticker, time_us // HOUR_US)
        if key not in self.hours:
            exchange, connector, feed = place
            hour = str(np.datetime64(time_us // HOUR_US, "h"))
            self.hours[key] = Hour(feed, exchange, connector, ticker, hour)
        return self.hours[key]

    # Trades

    def _trades(
        self,
        place: Place,
        epoch: int,
        table: pa.Table,
        tickers: Sequence[str],
        codes: Values,
        times: Values,
        seqs: Values,
    ) -> Values | None:
        """Note the counters; the ids to be counted, None where the exchange has no counter."""
        column = table["trade_seq"]
        if column.null_count == len(column):
            return None
        process, place = place[1], _of_connector(place)
        counters: Values = pc.fill_null(column, -1).to_numpy()
        rows = np.flatnonzero(counters >= 0)
        order = rows[np.lexsort((counters[rows], codes[rows]))]
        ids, of = counters[order], codes[order]
        same = (np.diff(of, prepend=-1) == 0) & (np.diff(ids, prepend=-1) == 0)
        for code in of[same].tolist():
            self.trades[place, tickers[code]].twice += 1
        order, ids, of = order[~same], ids[~same], of[~same]
        breaks = np.flatnonzero((np.diff(of, prepend=-1) != 0) | (np.diff(ids, prepend=-2) != 1))
        for low, high in itertools.pairwise([*breaks.tolist(), len(order)]):
            a, b = int(order[low]), int(order[high - 1])
            span = _Span(
                int(ids[low]),
                int(ids[high - 1]),
                _Position(epoch, int(seqs[a]), process),
                _Position(epoch, int(seqs[b]), process),
                int(times[a]),
                int(times[b]),
            )
            self.trades[place, tickers[int(of[low])]].add(span)
        return counters

    def finish_trades(self) -> None:
        """All rows are seen: what is still missing is missing."""
        for (place, ticker), trades in self.trades.items():
            if trades.twice:
                self.report.find(f"{' '.join(place)} {ticker}: {trades.twice} trades twice")
            gaps = self.ledger.gaps(place, ticker)
            for before, behind in itertools.pairwise(trades.spans):
                self._hole(place, ticker, before, behind, gaps)

    def _hole(self, place: Place, ticker: str, before: _Span, behind: _Span, gaps: Sequence[_Gap]) -> None:
        first, last = before.last + 1, behind.first - 1
        open_gaps = [gap for gap in gaps if not gap.repaired]
        known = [(gap.first, gap.last) for gap in open_gaps if gap.first is not None and gap.last is not None]
        explained = _covered(known, first, last)
        low, high = sorted((before.last_at, behind.first_at))
        timed = any(g.first is None and g.from_us <= behind.first_us and g.to_us >= before.last_us for g in open_gaps)
        if timed or self.ledger.lost_between(place, low, high):
            explained = last - first + 1
        place = (place[0], behind.first_at.process, place[2])
        line = self._hour(place, ticker, behind.first_us)
        missing = last - first + 1 - explained
        line.explained += explained
        line.missing += missing
        self.report.explained += explained
        self.report.missing += missing
        if missing:
            said = any(g.repaired and g.first is not None and g.first <= last and (g.last or 0) >= first for g in gaps)
            claim = ", though the ledger says repaired" if said else ""
            self.report.find(
                f"{' '.join(place)} {ticker} {line.hour}: {missing} of the trades {first} to {last} are missing{claim}"
            )

    # Books

    def _messages_whole(
        self,
        file: StoredFile,
        tickers: Sequence[str],
        codes: Values,
        ids: Values,
        flags: Values,
        seqs: Values,
        tail: _Tail,
    ) -> None:
        """Rows of one message stand together and the last one is flagged LAST."""
        snapshot = flags & int(Flag.SNAPSHOT)
        changes = np.flatnonzero((np.diff(codes) != 0) | (np.diff(ids) != 0) | (np.diff(snapshot) != 0))
        cut = changes[flags[changes] & int(Flag.LAST) == 0].tolist()
        first = (tickers[int(codes[0])], int(ids[0]))
        if not tail.flags & Flag.LAST and first != (tail.ticker, tail.update_id):
            self.report.find(f"{file.path}: the book message before seq_id {int(seqs[0])} has no last row")
        if cut:
            row = cut[0]
            self.report.find(
                f"{file.path}: {len(cut)} book messages have no last row, the first is "
                f"{tickers[int(codes[row])]} {int(ids[row])} at seq_id {int(seqs[row])}"
            )
        tail.ticker, tail.update_id, tail.flags = tickers[int(codes[-1])], int(ids[-1]), int(flags[-1])

    def _books(
        self,
        place: Place,
        file: StoredFile,
        tickers: Sequence[str],
        codes: Values,
        ids: Values,
        flags: Values,
        seqs: Values,
    ) -> None:
        """Update ids of a ticker only grow between snapshots; a snapshot after a hole has its row in the ledger."""
        # The ids of messages that could never be joined to a book prove nothing.
        unproven = flags & int(Flag.UNPROVEN) != 0
        rows, doubted = np.flatnonzero(~unproven), np.flatnonzero(unproven)
        order = rows[np.argsort(codes[rows], kind="stable")]

        def position(i: int) -> _Position:
            return _Position(file.epoch, int(seqs[order[i]]), file.connector)

        of, updates = codes[order], ids[order]
        snapshot = (flags[order] & int(Flag.SNAPSHOT)) != 0
        starts = np.flatnonzero(np.diff(of, prepend=-1))
        before = np.empty(len(order), dtype=np.int64)
        before[1:] = updates[:-1]
        for start in starts.tolist():  # the first row of a ticker follows what an earlier table left
            book = self.books.get((place, tickers[int(of[start])]))
            before[start] = book.update_id if book else updates[start]
        back = np.flatnonzero((updates < before) & ~snapshot).tolist()
        for i in back[:1]:
            self.report.find(
                f"{file.path}: {len(back)} times an update id goes back, first "
                f"{tickers[int(of[i])]} {int(updates[i])} behind {int(before[i])} at seq_id {int(seqs[order[i]])}"
            )
        resynced = (flags[order] & int(Flag.RESYNCED)) != 0
        for i in np.flatnonzero(snapshot & resynced & (updates != before)).tolist():
            ticker = tickers[int(of[i])]
            book = self.books.get((place, ticker))
            at = book.at if book and i in starts else position(i - 1)
            of_ticker = doubted[(codes[doubted] == of[i]) & (doubted < order[i])]
            if len(of_ticker):
                self.unproven[place, ticker] = _Position(file.epoch, int(seqs[of_ticker[-1]]), file.connector)
            self._resync(place, file, ticker, int(before[i]), int(updates[i]), at, position(i))
        for start, stop in itertools.pairwise([*starts.tolist(), len(order)]):
            end = stop - 1
            self.books[place, tickers[int(of[start])]] = _Book(int(updates[end]), position(end))
        for i in doubted[np.flatnonzero(np.diff(codes[doubted], append=-1))].tolist():
            self.unproven[place, tickers[int(codes[i])]] = _Position(file.epoch, int(seqs[i]), file.connector)

    def _resync(
        self, place: Place, file: StoredFile, ticker: str, before: int, update: int, low: _Position, high: _Position
    ) -> None:
        """A hole must be told up to the snapshot; where rows without a book lie in between, these may be what reaches it."""
        unproven = self.unproven.get((place, ticker))
        first = before if unproven is not None and unproven > low else update
        for gap in self.ledger.gaps(place, ticker):
            if gap.repaired:
                continue
            if gap.first is None or gap.last is None or (gap.first <= max(update, first) and gap.last >= first):
                return
        if not self.ledger.lost_between(place, low, high):
            self.report.find(f"{file.path}: {ticker} was resynced at update {update} and the ledger does not say why")


def verify(out: Path, *, feeds: Sequence[str] = ("*",)) -> Report:
    """Prove what the tree below `out` holds. StorageError when there is no tree or it is being compacted.

    A tree that is being written is verified as it is at this moment: rows of `gaps` may reach it later than others.
    """
    report, ledger = Report(), _Ledger()
    with ExitStack() as stack:
        stack.callback(os.close, _hold_still(out))
        files = sorted(f for f in stored_files(out) if f.feed != GAPS.name)
        # The ledger is looked for last: the writer stores what it lost before the rows behind the hole.
        files += sorted(stored_files(out, GAPS.name))
        if not files:
            raise StorageError(f"{out}: holds no stored tables")
        for path in foreign_files(out):
            report.find(f"{path}: is no file of this tree")
        report.bytes = sum(file.path.stat().st_size for file in files)
        for file in files:
            if file.feed == GAPS.name:
                _read_ledger(ledger, file)
        ledger.close()
        verifier = _Verifier(report, ledger)
        for _, group in itertools.groupby(files, key=lambda f: (f.feed, f.exchange, f.connector)):
            stream = list(group)
            if any(fnmatch.fnmatchcase(stream[0].feed, pattern) for pattern in feeds):
                verifier.stream(stream)
        verifier.finish_trades()
    report.hours = [verifier.hours[key] for key in sorted(verifier.hours)]
    return report


def _read_ledger(ledger: _Ledger, file: StoredFile) -> None:
    with contextlib.suppress(StorageError):  # a damaged file of the ledger is found when its stream is verified
        for table in read_row_groups(file):
            ledger.add(file, table)


def _hold_still(out: Path) -> int:
    """Keep `compact` away from the tree while it is read; the descriptor of the lock."""
    if not out.is_dir():
        raise StorageError(f"{out}: no such directory")
    path = out / LOCKS / "compact"
    try:
        path.parent.mkdir(exist_ok=True, mode=0o750)
        fd = lock_file(path, fcntl.LOCK_SH, LOCK_WAIT_S)
    except OSError:  # a tree that cannot be written cannot be compacted either
        return os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    if fd is None:
        raise StorageError(f"{out}: is being compacted for more than {LOCK_WAIT_S:g} s")
    return fd


def _categories(column: pa.ChunkedArray) -> tuple[list[str], Values]:
    """(names, index of each row) of a dictionary-encoded column."""
    array = column.unify_dictionaries().combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.dictionary.to_pylist(), array.indices.to_numpy().astype(np.int64)
