"""The writer: drains any number of rings into one sink, with a durable position of its own.

Run by `mdcollector write`, by the supervisor and by stand-alone commands. Owns what all sinks share: which rings, the
batches, when they are due, back-off, the ledger of what could not be read, and the numbers on the stats page.

A row stays in memory until the sink has it, and it stays in its ring at least that long: a batch is due at the latest
when a quarter of the ring waits for the sink, so that a writer killed at any instruction finds every row again. The
position after a restart is what the sink holds. Rows that are gone are written to the table `gaps` before the rows
behind the hole: cause "lapped" (overwritten before they were read) or "damaged" (wrong checksum), `feed` the feed,
`ticker` empty, `first_id` and `last_id` the local seq_ids. These rows come from no ring; they have a line of seq_ids
of their own, under the connector name `<connector>~<feed>` and the epoch of the rows that are gone.
"""

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mdcollector.config import takes
from mdcollector.errors import RingError, StorageError
from mdcollector.records import FEEDS, GAPS, Flag
from mdcollector.ring import RingReader
from mdcollector.sinks import DAY_US, LEDGER_MARK, Batch, Sink, Stream, open_sink
from mdcollector.stats import StatsWriter
from mdcollector.tables import Rows, Values

log = logging.getLogger(__name__)

READ_ROWS = 8192  # 1 MB: the rows are still in the second cache when they become columns (67 against 98 ns a row)
READS_PER_TURN = 16  # rows of one ring before the others have their turn: one row group
RING_SHARE_DUE = 4  # a batch is due when this part of the ring waits
RING_SHARE_ALARM = 2
MEMORY_BYTES = 512 << 20
LOST_MAX = 4096  # rows of the ledger that wait for a sink that refuses them
DISCOVER_S = 1.0
STATS_S = 0.25
LOOK_FOR_WRITER_S = 0.25
BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.1, 10.0
FINISH_S = 30.0
SEAL_WAIT_S = 2.0
RCV_TIMESTAMP_END = 253_402_300_800_000_000  # year 10000: a time beyond it has no date
LATENCY_BOUNDS_NS = tuple(1_000_000 * 2**i for i in range(24))  # 1 ms to 2.3 hours: a batch waits for its roll


@dataclass(frozen=True)
class StreamReport:
    """What one stream came to."""

    connector: str
    feed: str
    rows_read: int
    rows_written: int
    rows_left: int  # published, but not durable
    files: int
    bytes: int
    lapped: int
    damaged: int


@dataclass(frozen=True)
class Report:
    """What a writer leaves behind when it stops."""

    streams: list[StreamReport]
    refused: dict[str, str]  # rings that could not be read, and why

    @property
    def complete(self) -> bool:
        """Every ring could be read, every row that was read is written, nothing is left in a ring, nothing was lost."""
        whole = (s.rows_read == s.rows_written and not (s.rows_left or s.lapped or s.damaged) for s in self.streams)
        return not self.refused and all(whole)


_EVERY = 16


class _Latency:
    """From packet received to durable, of one row in sixteen (all of them would cost 15 ns a row)."""

    def __init__(self) -> None:
        self._bounds_us = np.array(LATENCY_BOUNDS_NS) // 1000
        self._counts = np.zeros(len(LATENCY_BOUNDS_NS) + 1, dtype=np.int64)
        self._sum_ns = 0

    def add(self, rcv_timestamps: Values) -> None:
        waited_us = time.time_ns() // 1000 - rcv_timestamps[::_EVERY]
        self._counts += np.bincount(np.searchsorted(self._bounds_us, waited_us), minlength=len(self._counts))
        self._sum_ns += int(waited_us.sum()) * 1000

    def snapshot(self) -> dict[str, Any]:
        count, cumulative = int(self._counts.sum()), np.cumsum(self._counts)
        bounds = (*LATENCY_BOUNDS_NS, 2 * LATENCY_BOUNDS_NS[-1])
        quantiles = {
            name: bounds[int(np.searchsorted(cumulative, share * count))] if count else 0
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))
        }
        counts = self._counts.tolist()
        return {"count": count, "sum_ns": self._sum_ns, "bounds_ns": LATENCY_BOUNDS_NS, "counts": counts, **quantiles}


class _Backoff:
    """When to try again: twice as long after every failure, up to a limit."""

    def __init__(self) -> None:
        self._wait_s = 0.0
        self._until = 0.0

    @property
    def waiting(self) -> bool:
        return time.monotonic() < self._until

    def failed(self) -> None:
        self._wait_s = min(max(2 * self._wait_s, BACKOFF_FIRST_S), BACKOFF_MOST_S)
        self._until = time.monotonic() + self._wait_s

    def succeeded(self) -> None:
        self._wait_s = self._until = 0.0


class _Drain:
    """One ring on its way into the sink."""

    def __init__(self, reader: RingReader, sink: Sink, roll_rows: int, latency: _Latency) -> None:
        self.reader, self.sink = reader, sink
        self.stream = Stream(reader.connector, reader.feed, reader.exchange.upper())
        self._latency = latency
        self.rows_due = min(roll_rows, max(1, reader.capacity // RING_SHARE_DUE))
        self.rows_read = self.rows_written = self.files = self.bytes = self.damaged = self.lapped = 0
        self.behind, self.behind_alarms = False, 0
        self.errors: Counter[str] = Counter()
        self.backoff = _Backoff()
        self.ending = False  # the ring's files were replaced: only what is left in the old ones is still to be had
        self._batches: list[Batch] = []
        self._lost: list[tuple[int, Rows]] = []  # (epoch, row of the ledger) not yet written
        self._waiting_since = 0.0
        self._last_look = 0.0
        self._last_rcv = -1
        self._epochs: list[tuple[int, int, int]] = []
        sink.open(self.stream)
        try:
            sink.open(self.stream.ledger)
            self._ledger_last = sink.stored(self.stream.ledger)
            self._seek()
        except BaseException:
            sink.close(self.stream)
            raise

    # Position

    def _seek(self) -> None:
        """Go on behind what the sink holds of this very ring; start a ring that it does not know at its oldest row."""
        epochs = self._epochs = self.reader.epochs
        stored = self.sink.stored(self.stream)
        position = None
        ends = {e: after for (e, _, _), (_, after, _) in pairwise(epochs)}
        for epoch, last in stored.items():
            if epoch in ends:
                # After a power failure the sink may hold rows that the ring has forgotten and numbered anew.
                found = min(last + 1, ends[epoch])
            elif epochs and epoch == epochs[-1][0]:
                found = last + 1
            elif epochs and epochs[0][1] > 0 and epoch < epochs[0][0]:  # the table keeps the newest lives only
                found = min(last + 1, epochs[0][1])
            else:
                continue  # of an earlier ring of this name
            position = found if position is None else max(position, found)
        self._ahead = position is not None and position > self.reader.published
        if self._ahead:
            log.warning("%s: the ring forgot rows that are stored; waiting for its next life", self.stream)
        elif position is None:
            self.reader.seek("oldest")
            if self.reader.position:
                log.warning(
                    "%s: nothing of this ring is stored; begins at its oldest row, %d",
                    self.stream,
                    self.reader.position,
                )
        else:
            self.reader.seek(position)
        self._durable = self.reader.position

    @property
    def buffered(self) -> int:
        """Rows in memory."""
        return sum(batch.rows for batch in self._batches)

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in self._batches)

    @property
    def lag(self) -> int:
        """Rows that are published and not durable."""
        return max(0, self.reader.published - self._durable)

    @property
    def idle(self) -> bool:
        """Nothing is published that is not durable."""
        return not self._batches and not self._lost and self.reader.position >= self.reader.published

    # Reading

    def take(self, *, sealed_only: bool) -> int:
        """Read one portion; says how many rows the position moved. Never more than a batch that is due."""
        if self._ahead and self.reader.epoch != self._epochs[-1][0]:
            self._seek()
        if self._ahead:
            return 0
        reader, before, lapped_before = self.reader, self.reader.position, self.reader.lapped
        rows_max = min(READ_ROWS, self.rows_due - self.buffered)
        if rows_max <= 0 or len(self._lost) >= LOST_MAX:
            return 0
        if sealed_only:
            rows = reader.read_sealed(rows_max)
        else:
            rows = reader.read(rows_max)
            rows = rows[rows["seq_id"] == np.arange(reader.position - len(rows), reader.position)]
        if reader.position > before:
            self._sort_in(self._without_nonsense(rows), before, reader.lapped - lapped_before)
        return reader.position - before

    def take_unsealed(self, *, now: bool) -> int:
        """Rows that a killed collector published and could not seal any more: nobody else will.

        `now`: take them also from a collector that lives, because there is no more time to wait for its seal.
        """
        if self.reader.position >= self.reader.published:
            return 0
        if not now and not self.ending:
            if time.monotonic() < self._last_look + LOOK_FOR_WRITER_S:
                return 0
            self._last_look = time.monotonic()
            if self.reader.writer_alive:
                return 0
        return self.take(sealed_only=False)

    def _without_nonsense(self, rows: Rows) -> Rows:
        """Drop rows that name no instrument or no day: no checksum covered them, or their collector is broken."""
        instruments = len(self.reader.tickers)
        times = rows["rcv_timestamp"]
        if len(rows) and (rows["ticker"].max() >= instruments or times.min() < 0 or times.max() >= RCV_TIMESTAMP_END):
            return rows[(rows["ticker"] < instruments) & (times >= 0) & (times < RCV_TIMESTAMP_END)]
        return rows

    def _sort_in(self, rows: Rows, before: int, lapped: int) -> None:
        """Put rows into batches and note the holes between `before` and the reader's position."""
        if self.reader.epoch != (self._epochs[-1][0] if self._epochs else None):
            self._epochs = self.reader.epochs
        if not self._batches and not self._lost:
            self._waiting_since = time.monotonic()
        if lapped:
            self._note_lost(before, before + lapped, "lapped", rows)
        expected, stop = before + lapped, self.reader.position
        self.rows_read += len(rows)
        if len(rows) == stop - expected:
            parts = [rows] if len(rows) else []
        else:
            parts = np.split(rows, np.flatnonzero(np.diff(rows["seq_id"]) != 1) + 1) if len(rows) else []
        for part in parts:
            first = int(part["seq_id"][0])
            if first > expected:
                self._note_lost(expected, first, "damaged", part)
            self._append(part, first)
            expected = first + len(part)
        if expected < stop:
            self._note_lost(expected, stop, "damaged", rows[:0])

    def _append(self, rows: Rows, first: int) -> None:
        """Append rows without a hole, cut where an epoch or a day changes."""
        days = rows["rcv_timestamp"] // DAY_US
        cuts = [start - first for _, start, _ in self._epochs if first < start < first + len(rows)]
        if days[0] != days[-1] or days.min() != days.max():
            cuts += (np.flatnonzero(np.diff(days)) + 1).tolist()
        edges = [0, *sorted(set(cuts)), len(rows)]
        for low, high in pairwise(edges):
            at, day, epoch = first + low, int(days[low]), self._epoch_of(first + low)
            batch = self._batches[-1] if self._batches else None
            if batch is None or (batch.epoch, batch.day, batch.last + 1) != (epoch, day, at):
                batch = Batch(self.stream, epoch, self._ring, day, at)
                self._batches.append(batch)
            batch.append(rows[low:high])
        self._last_rcv = int(rows["rcv_timestamp"][-1])

    def _epoch_of(self, seq: int) -> int:
        """The life in which a row was written; 0 when the ring no longer knows."""
        return next((epoch for epoch, start, _ in reversed(self._epochs) if start <= seq), 0)

    @property
    def _ring(self) -> int:
        return self._epochs[0][0] if self._epochs and self._epochs[0][1] == 0 else 0

    def _note_lost(self, first: int, stop: int, cause: str, behind: Rows) -> None:
        if cause == "lapped":
            self.lapped += stop - first
        else:
            self.damaged += stop - first
        log.error("%s: %d rows %s (seq_id %d to %d)", self.stream, stop - first, cause, first, stop - 1)
        now = time.time_ns() // 1000
        starts = [start for _, start, _ in self._epochs if first < start < stop]
        for low, high in zip([first, *starts], [*starts, stop], strict=True):
            row = np.zeros(1, dtype=GAPS.dtype)
            row["timestamp"] = row["rcv_timestamp"] = now
            row["flags"] = Flag.TIME_LOCAL | Flag.LAST
            row["feed"], row["cause"] = self.stream.feed.name.encode(), cause.encode()
            row["first_id"], row["last_id"] = low, high - 1
            row["from_time"] = self._last_rcv
            row["to_time"] = behind["rcv_timestamp"][0] if len(behind) else now
            self._lost.append((self._epoch_of(low), row))

    # Writing

    def due(self, roll_s: float) -> bool:
        """A batch is large or old enough."""
        if not self._batches and not self._lost:
            return False
        return self.buffered >= self.rows_due or time.monotonic() - self._waiting_since >= roll_s

    def roll(self) -> bool:
        """Give everything in memory to the sink; after an error it stays here until the next try."""
        if self.backoff.waiting:
            return False
        try:
            self._write_ledger()
            tickers = self.reader.tickers
            while self._batches:
                batch = self._batches[0]
                batch.tickers = tickers
                self.bytes += self.sink.write(batch)
                self.files += 1
                self.rows_written += batch.rows
                self._durable = batch.last + 1
                for times in batch.rcv_timestamps():
                    self._latency.add(times)
                del self._batches[0]
            self._durable = max(self._durable, self.reader.position)  # behind a hole there may be no row yet
        except (OSError, RingError, StorageError) as error:
            name = (
                errno.errorcode.get(error.errno or 0, "OSError") if isinstance(error, OSError) else type(error).__name__
            )
            if not self.errors[name]:
                log.error("%s: cannot be written, kept and tried again: %s", self.stream, error)
            self.errors[name] += 1
            self.backoff.failed()
            return False
        self.backoff.succeeded()
        self._waiting_since = time.monotonic()
        return True

    def _write_ledger(self) -> None:
        """Write what is lost before the rows behind it: a position beyond a hole must not hide the hole."""
        while self._lost:
            epoch, row = self._lost[0]
            same = [r for e, r in self._lost if e == epoch]
            rows = np.zeros(len(same), dtype=GAPS.dtype)
            for i, found in enumerate(same):
                rows[i] = found[0]
            first = self._ledger_last.get(epoch, -1) + 1
            rows["seq_id"] = np.arange(first, first + len(rows))
            rows["rcv_timestamp"] = row["rcv_timestamp"][0]  # one batch, one day
            day = int(row["rcv_timestamp"][0]) // DAY_US
            batch = Batch(self.stream.ledger, epoch, self._ring, day, first, tickers=("",))
            batch.append(rows)
            self.sink.write(batch)
            self._ledger_last[epoch] = batch.last
            self._lost = [(e, r) for e, r in self._lost if e != epoch]

    def watch(self) -> None:
        """Raise the alarm when half of the ring waits."""
        behind = self.lag > self.reader.capacity // RING_SHARE_ALARM
        if behind and not self.behind:
            self.behind_alarms += 1
            log.warning("%s: behind by %d rows, more than half of the ring", self.stream, self.lag)
        self.behind = behind

    def close(self) -> None:
        self.sink.close(self.stream.ledger)
        self.sink.close(self.stream)
        self.reader.close()

    def snapshot(self) -> dict[str, Any]:
        return {
            "position": self.reader.position, "durable": self._durable, "published": self.reader.published,
            "lag_rows": self.lag, "lag_share": round(self.lag / self.reader.capacity, 4), "buffered_rows": self.buffered,
            "rows_read": self.rows_read, "rows_written": self.rows_written, "files": self.files, "bytes": self.bytes,
            "lapped": self.lapped, "damaged": self.damaged, "unchecked": self.reader.unchecked, "behind": self.behind,
            "behind_alarms": self.behind_alarms, "errors": dict(self.errors),
        }  # fmt: skip

    def report(self) -> StreamReport:
        return StreamReport(
            self.stream.connector, self.stream.feed.name, self.rows_read, self.rows_written, self.lag,
            self.files, self.bytes, self.lapped, self.damaged,
        )  # fmt: skip


class Writer:
    """Drains all rings below `rings` whose connector and feed match, also those that appear later, into `out`.

    >>> report = Writer(Path("rings"), Path("data"), name="parquet").run(should_stop=stop.is_set)

    `roll_rows` and `roll_s` bound how long rows wait before they are made durable, `memory_bytes` what all rings
    together hold in memory. Raises StorageError when another writer puts the same stream into `out`.
    """

    def __init__(
        self,
        rings: Path,
        out: Path,
        *,
        name: str,
        connectors: Sequence[str] = ("*",),
        feeds: Sequence[str] = ("*",),
        roll_rows: int = 1_000_000,
        roll_s: float = 60.0,
        poll_s: float = 0.02,
        memory_bytes: int = MEMORY_BYTES,
        sink: str | Sink = "parquet",
    ) -> None:
        self.rings, self.name = rings, name
        self._connectors, self._feeds = connectors, feeds
        self._roll_rows, self._roll_s, self._poll_s = roll_rows, roll_s, poll_s
        self._memory_bytes = memory_bytes
        self._sink = open_sink(sink, str(out)) if isinstance(sink, str) else sink
        self._drains: dict[Path, _Drain] = {}
        self._ended: list[StreamReport] = []
        self._refused: dict[str, str] = {}
        self._latency = _Latency()
        self._stats = StatsWriter(rings / "_writers" / name)
        self._next_discovery = self._next_stats = 0.0
        self._started = False
        self._state = "running"

    def run(self, should_stop: Callable[[], bool]) -> Report:
        """Drain until told to stop, then everything that is published by then."""
        while not should_stop():
            if not self.drain_once():
                time.sleep(self._poll_s)
        return self.finish()

    def drain_once(self) -> int:
        """Give every ring one turn and write what is due; says how many rows moved."""
        if time.monotonic() >= self._next_discovery:
            self._discover()
            self._next_discovery = time.monotonic() + DISCOVER_S
        moved = 0
        for drain in self._drains.values():
            moved += self._turn(drain)
            if drain.due(self._roll_s):
                drain.roll()
        if self._memory_is_short():
            for drain in sorted(self._drains.values(), key=lambda d: -d.nbytes):
                drain.roll()
                if not self._memory_is_short():
                    break
        self._publish_if_due()
        return moved

    def _turn(self, drain: _Drain, *, unsealed: bool = False) -> int:
        moved = 0
        for _ in range(READS_PER_TURN):
            if drain.backoff.waiting and self._memory_is_short():
                break
            try:
                step = drain.take(sealed_only=True) or drain.take_unsealed(now=unsealed)
            except RingError as error:
                self._refuse(drain.reader.path, error)
                break
            moved += step
            if not step:
                break
        drain.watch()
        return moved

    def _memory_is_short(self) -> bool:
        return sum(drain.nbytes for drain in self._drains.values()) > self._memory_bytes

    def _discover(self) -> None:
        """Open rings that appeared, and let go of those whose files were replaced."""
        for path, drain in list(self._drains.items()):
            drain.ending = drain.ending or drain.reader.replaced
            if drain.ending and (drain.idle or (drain.reader.position >= drain.reader.published and drain.roll())):
                self._ended.append(drain.report())
                drain.close()
                del self._drains[path]
        for path in sorted(self.rings.glob("*/*.meta")):
            feed, connector = path.stem, path.parent.name
            if path in self._drains or connector.startswith("_") or feed not in FEEDS:
                continue
            if not takes(self._connectors, self._feeds, connector, feed):
                continue
            try:
                reader = RingReader(path.parent, feed)
                if LEDGER_MARK in reader.connector or "/" in reader.connector:
                    raise RingError(f"{path}: connector name {reader.connector!r} may not hold {LEDGER_MARK!r} or '/'")
                self._drains[path] = _Drain(reader, self._sink, self._roll_rows, self._latency)
                self._refused.pop(str(path), None)
            except StorageError as error:
                if not self._started:
                    raise
                self._refuse(path, error)  # what is already being drained must not stop for a late conflict
            except (RingError, OSError) as error:
                self._refuse(path, error)
        self._refused = {path: why for path, why in self._refused.items() if Path(path).exists()}
        self._started = True

    def _refuse(self, path: Path, error: Exception) -> None:
        if self._refused.get(str(path)) != str(error):
            log.error("ring passed over: %s", error)
        self._refused[str(path)] = str(error)

    def _publish_if_due(self) -> None:
        if time.monotonic() >= self._next_stats:
            self._next_stats = time.monotonic() + STATS_S
            self._publish()

    def _publish(self) -> None:
        drains = [*self._drains.values()]
        errors: Counter[str] = Counter()
        for drain in drains:
            errors.update(drain.errors)
        self._stats.publish(
            {
                "role": "writer",
                "name": self.name,
                "state": self._state,
                "streams": {str(drain.stream): drain.snapshot() for drain in drains},
                "rows_written": sum(d.rows_written for d in drains) + sum(r.rows_written for r in self._ended),
                "memory_bytes": sum(drain.nbytes for drain in drains),
                "errors": dict(errors),
                "refused": self._refused,
                "persisted": self._latency.snapshot(),
            }
        )

    def finish(self, finish_s: float = FINISH_S) -> Report:
        """Write everything that was published when this was called, then let go of all rings."""
        self._discover()
        deadline = time.monotonic() + finish_s
        seal_deadline = time.monotonic() + SEAL_WAIT_S  # a collector that lives seals within milliseconds
        targets = {path: drain.reader.published for path, drain in self._drains.items()}
        left = dict(self._drains)
        while left and time.monotonic() < deadline:
            moved = 0
            for path, drain in list(left.items()):
                moved += self._turn(drain, unsealed=time.monotonic() > seal_deadline)
                read = drain.reader.position >= targets[path]
                if (read or drain.due(self._roll_s)) and drain.roll() and read:
                    del left[path]
            self._publish_if_due()
            if left and not moved:
                time.sleep(self._poll_s)
        self._state = "stopped"
        self._publish()
        reports = [*self._ended, *(drain.report() for drain in self._drains.values())]
        for drain in self._drains.values():
            drain.close()
        self._drains.clear()
        return Report(reports, self._refused)
