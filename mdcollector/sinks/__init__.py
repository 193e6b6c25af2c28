"""Sinks: where rows go behind the ring. Owns the one shape that all of them have; each sink is a file of its own here.

`writer.py` drives them: it cuts the rows into batches, keeps a batch until the sink has it, tries again with back-off
and decides when. A sink only says what it already holds and makes one batch durable; it never retries, never buffers.
A module `mdcollector/sinks/<kind>.py` is found by its name and gives `open_sink(target, options) -> Sink`.
"""

import datetime
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import pyarrow as pa

from mdcollector.config import sink_kinds
from mdcollector.errors import ConfigError
from mdcollector.records import GAPS, Feed
from mdcollector.tables import ColumnBuffer, Rows

ROW_GROUP_ROWS = 131_072  # a row group of this size costs 10 MB while it is built; 64k to 256k measured the same
DAY_US = 86_400_000_000
LEDGER_MARK = "~"  # stands in no connector's name


@dataclass(frozen=True)
class Stream:
    """The rows of one feed from one connector: what has a position of its own."""

    connector: str
    feed: Feed
    exchange: str

    @property
    def ledger(self) -> "Stream":
        """Where the writer itself notes the rows of this stream that it could not get (`gaps`, with its own ids)."""
        return Stream(f"{self.connector}{LEDGER_MARK}{self.feed.name}", GAPS, self.exchange)

    def __str__(self) -> str:
        return f"{self.connector}/{self.feed.name}"


@dataclass
class Batch:
    """Rows `first` to `last` of one stream without a hole, of one epoch and of one UTC day of `rcv_timestamp`.

    `ring` is the first epoch that the ring ever had (0 when it no longer knows): epochs of the same ring share one
    line of seq_ids. `tickers` is the ring's instrument table.
    """

    stream: Stream
    epoch: int
    ring: int
    day: int  # days since 1970
    first: int
    tickers: Sequence[str] = ()
    rows: int = 0
    buffers: list[ColumnBuffer] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.first + self.rows - 1

    @property
    def date(self) -> str:
        return (datetime.date(1970, 1, 1) + datetime.timedelta(days=self.day)).isoformat()

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def append(self, rows: Rows) -> None:
        """Take the rows that follow `last`."""
        while len(rows):
            if not self.buffers or not self.buffers[-1].room:
                self.buffers.append(ColumnBuffer(self.stream.feed, ROW_GROUP_ROWS))
            part = rows[: self.buffers[-1].room]
            self.buffers[-1].append(part)
            self.rows += len(part)
            rows = rows[len(part) :]

    def tables(self) -> Iterator[pa.Table]:
        """The rows as tables of at most ROW_GROUP_ROWS rows, made one at a time."""
        for buffer in self.buffers:
            yield buffer.table(self.tickers, self.stream.exchange)

    def rcv_timestamps(self) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        for buffer in self.buffers:
            yield buffer.rcv_timestamps


class Sink(Protocol):
    """What the writer asks of a sink."""

    def open(self, stream: Stream) -> None:
        """Become the only one that writes this stream, and clear away what a killed writer left unfinished.

        StorageError when somebody else writes it.
        """

    def stored(self, stream: Stream) -> dict[int, int]:
        """The last row that is durably there, for each epoch: the position after a restart."""

    def write(self, batch: Batch) -> int:
        """Make the batch durable, wholly or not at all, and return its bytes. OSError: try again later.

        A batch that is written twice counts once.
        """

    def close(self, stream: Stream) -> None:
        """Let others write this stream."""


def open_sink(kind: str, target: str, options: Mapping[str, str] | None = None) -> Sink:
    """The sink of that name. ConfigError when there is none."""
    if kind not in sink_kinds():
        raise ConfigError(f"sink {kind!r} is not known; there are: {', '.join(sink_kinds())}")
    module = importlib.import_module(f"{__name__}.{kind}")
    return cast(Sink, module.open_sink(target, options or {}))
