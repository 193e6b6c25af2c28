"""Parquet files in a directory tree whose file names are the position.

`<out>/<feed>/<EXCHANGE>/date=<YYYY-MM-DD>/<connector>-<epoch>-<first seq>-<last seq>.parquet`

A file is made in `<out>/.parts`, synced, renamed to its place, and its directory synced: a file that has its name is
whole. Locks lie in `<out>/.locks`, so the directory of a feed holds nothing but data. Used by the writer; compact and
verify take the names, the layout of a file and the locks from here.
"""

import contextlib
import fcntl
import importlib.metadata
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mdcollector.errors import ConfigError, StorageError
from mdcollector.records import BBO, FEEDS, ORDERBOOK_L2, TRADES, Column, Feed
from mdcollector.sinks import Batch, Sink, Stream
from mdcollector.tables import SCHEMA_VERSION, arrow_schema

PAGE_ROWS = 65_536  # larger pages cost less (193 -> 169 ns a row of trades); two a row group still let readers skip
LOCK_WAIT_S = 2.0
SCAN_LOCK_WAIT_S = 30.0
LOCKS, PARTS = ".locks", ".parts"  # below `out`
_UNREADABLE = (
    OSError,
    pa.ArrowException,
    UnicodeDecodeError,
)  # what pyarrow raises for a damaged file; names may be no text
META_PREFIX = "mdcollector."

_NAME = re.compile(r"(?P<connector>.+)-(?P<epoch>\d+)-(?P<first>\d+)-(?P<last>\d+)\.parquet")
_DATE = re.compile(r"date=(\d{4}-\d{2}-\d{2})")
_KIND = "writing"


@dataclass(frozen=True, order=True)
class StoredFile:
    """One file of the tree, as its place and name describe it; ordered by stream, then position."""

    feed: str
    exchange: str
    connector: str
    epoch: int
    first: int
    last: int
    date: str
    out: Path

    @property
    def path(self) -> Path:
        name = f"{self.connector}-{self.epoch}-{self.first}-{self.last}.parquet"
        return self.out / self.feed / self.exchange / f"date={self.date}" / name

    def part(self, kind: str) -> Path:
        """Where it is made before it is whole: not beside the data, where Polars would read a hidden file too."""
        return self.out / PARTS / f"{self.feed}.{self.path.name}.{kind}"

    @property
    def rows(self) -> int:
        return self.last - self.first + 1

    @classmethod
    def parse(cls, out: Path, path: Path) -> Self | None:
        """The file that `path` names, None when it is not one of ours."""
        parts = path.relative_to(out).parts
        found = _NAME.fullmatch(path.name)
        date = _DATE.fullmatch(parts[-2]) if len(parts) == 4 else None
        if found is None or date is None or parts[0] not in FEEDS:
            return None
        epoch, first, last = (int(found[k]) for k in ("epoch", "first", "last"))
        return cls(parts[0], parts[1], found["connector"], epoch, first, last, date[1], out)


def stored_files(out: Path, feed: str = "*", exchange: str = "*") -> Iterator[StoredFile]:
    """The whole files below `out`; foreign files are passed over."""
    for path in out.glob(f"{feed}/{exchange}/date=*/*.parquet"):
        if file := StoredFile.parse(out, path):
            yield file


# How a column is encoded, measured on recorded Binance trades and depth (ns and bytes a row, zstd 1):
#   price        dictionary 38 ns 2.63 B, plain 34 ns 3.09 B, byte stream split 17 ns 3.95 B
#   qty          dictionary 31 ns 1.95 B, plain 27 ns 2.26 B, byte stream split 33 ns 4.65 B
#   bbo, price   dictionary 27 ns 0.40 B, plain 19 ns 0.38 B, byte stream split 21 ns 0.86 B; where every price is new
#                (generated rows) 30 ns 1.28 B, 60 ns 2.60 B, 26 ns 3.67 B
#   bbo, qty     dictionary 124 ns 4.35 B, plain 48 ns 3.40 B, byte stream split 58 ns 5.30 B
#   seq_id       delta 7 ns 0.01 B, plain 26 ns 1.03 B, dictionary 84 ns 2.97 B
#   timestamps   of trades: delta 17 ns 0.94 B, plain 18 ns 1.04 B; of depth, in long runs: plain 5 ns 0.10 B, delta 12 ns
#   stage times  byte stream split 9 ns 1.48 B, delta 13 ns 1.49 B, dictionary 18 ns 1.42 B, plain 21 ns 1.82 B
#   flags, side  plain 4 ns 0.04 B, dictionary 9 ns 0.04 B
#   trade_id     plain 28 ns 0.32 B, delta byte array 42 ns 0.04 B, dictionary 77 ns 1.59 B
# The writer takes what is quick, so that it keeps up with any burst; `compact`, which has time, what is small.


def _encoding(feed: Feed, column: Column, *, small: bool) -> str | None:
    """Encoding of one column, None for a dictionary."""
    if column.table == "category":
        return None
    if column.table == "float64":
        if small or feed not in (TRADES, ORDERBOOK_L2, BBO):
            return None
        return "BYTE_STREAM_SPLIT" if column.name.endswith("price") else "PLAIN"
    if column.table == "uint32":
        return "BYTE_STREAM_SPLIT"
    if column.table == "text":
        return "DELTA_BYTE_ARRAY" if small else "PLAIN"
    if column.table in ("int64", "timestamp") and (feed is not ORDERBOOK_L2 or column.name == "seq_id"):
        return "DELTA_BINARY_PACKED"
    return "PLAIN"


def parquet_options(feed: Feed, *, small: bool = False) -> dict[str, Any]:
    """Arguments of `pyarrow.parquet.ParquetWriter` for files of this feed."""
    encodings = {c.name: _encoding(feed, c, small=small) for c in feed.table_columns}
    integers = [c.name for c in feed.table_columns if c.table in ("timestamp", "int64")]
    return {
        "compression": "zstd",
        "compression_level": 6 if small else 1,
        "use_dictionary": [name for name, encoding in encodings.items() if encoding is None],
        "column_encoding": {name: encoding for name, encoding in encodings.items() if encoding is not None},
        "write_statistics": [*integers, "ticker"] if small else integers,
        "write_page_index": True,
        "write_page_checksum": True,
        "max_rows_per_page": PAGE_ROWS,
        "write_batch_size": PAGE_ROWS,  # 5 % quicker than the 1024 rows of the default
    }


@cache
def product_version() -> str:
    return importlib.metadata.version("mdcollector")


def file_metadata(file: StoredFile, ring: int) -> dict[str, str]:
    """What the footer says of a file, so that it is understood also without its name."""
    values = {
        "feed": file.feed, "exchange": file.exchange, "connector": file.connector, "epoch": file.epoch,
        "first_seq": file.first, "last_seq": file.last, "date": file.date, "ring": ring,
        "schema_version": SCHEMA_VERSION, "version": product_version(),
    }  # fmt: skip
    return {META_PREFIX + key: str(value) for key, value in values.items()}


def foreign_files(out: Path) -> Iterator[Path]:
    """Parquet files in the tree of a feed that are not named as ours are: readers of the tree would read them too."""
    for feed in FEEDS:
        for path in out.glob(f"{feed}/**/*.parquet"):
            if StoredFile.parse(out, path) is None:
                yield path


def read_footer(file: StoredFile) -> int:
    """The ring (first epoch) that a file's rows came through. StorageError unless footer and name say the same."""
    try:
        metadata = pq.read_metadata(file.path)
    except _UNREADABLE as error:
        raise StorageError(f"{file.path}: unreadable: {error}") from error
    return _check_footer(file, metadata)


def _check_footer(file: StoredFile, metadata: pq.FileMetaData) -> int:
    found = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (metadata.metadata or {}).items()}
    ring = found.get(META_PREFIX + "ring", "")
    for key, value in file_metadata(file, 0).items():
        if found.get(key) != value and key not in (META_PREFIX + "ring", META_PREFIX + "version"):
            raise StorageError(f"{file.path}: its footer says {key} is {found.get(key)}, expected {value}")
    if metadata.num_rows != file.rows or not ring.isdecimal():
        raise StorageError(f"{file.path}: holds {metadata.num_rows} rows, expected {file.rows}, of ring {ring!r}")
    return int(ring)


def read_row_groups(file: StoredFile, path: Path | None = None) -> Iterator[pa.Table]:
    """The rows of a file (lying at `path`), one row group at a time, checksums compared.

    StorageError when it is damaged or is not exactly what its name says.
    """
    expected = file.first
    try:
        with pq.ParquetFile(path or file.path, page_checksum_verification=True) as parquet:
            _check_footer(file, parquet.metadata)
            if not parquet.schema_arrow.equals(arrow_schema(FEEDS[file.feed])):
                raise StorageError(f"{file.path}: its columns are not those of {file.feed}")
            for i in range(parquet.num_row_groups):
                table = parquet.read_row_group(i, use_threads=False)
                if not np.array_equal(table["seq_id"].to_numpy(), np.arange(expected, expected + len(table))):
                    raise StorageError(f"{file.path}: row group {i} does not hold the rows from seq_id {expected} on")
                _check_statistics(file, parquet.metadata.row_group(i), table)
                expected += len(table)
                yield table
    except _UNREADABLE as error:
        raise StorageError(f"{file.path}: unreadable: {error}") from error


def _check_statistics(file: StoredFile, group: pq.RowGroupMetaData, table: pa.Table) -> None:
    """Compare what the footer, which has no checksum, says of a row group: by this, readers with a filter skip it."""
    for i in range(group.num_columns):
        said, column = group.column(i).statistics, table.column(i)
        if said is None or not said.has_min_max:
            continue
        plain = column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
        if pa.types.is_dictionary(plain.type):
            plain = plain.cast(pa.string())
        held = pc.min_max(plain)
        low, high = held["min"].as_py(), held["max"].as_py()
        found = (said.min_raw, said.max_raw, said.null_count)
        if found != ((low, high) if not isinstance(low, str) else (low.encode(), high.encode())) + (column.null_count,):
            raise StorageError(f"{file.path}: its footer says {found} of {table.column_names[i]}, its rows {low, high}")


class ParquetSink:
    """The local tree below `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._locks: dict[Stream, int] = {}

    def open(self, stream: Stream) -> None:
        if stream in self._locks:
            return
        path = self.out / LOCKS / f"{stream.connector}.{stream.feed.name}"
        durable_mkdir(path.parent)
        fd = lock_file(path, fcntl.LOCK_EX, LOCK_WAIT_S)
        if fd is None:
            raise StorageError(
                f"{path}: another writer puts {stream} into {self.out}; a stream has one writer in a directory"
            )
        self._locks[stream] = fd
        for part in self.out.glob(f"{PARTS}/{stream.feed.name}.*.{_KIND}"):
            name = _NAME.fullmatch(part.name.removeprefix(f"{stream.feed.name}.").removesuffix(f".{_KIND}"))
            if name is not None and name["connector"] == stream.connector:
                part.unlink(missing_ok=True)

    def stored(self, stream: Stream) -> dict[int, int]:
        last: dict[int, int] = {}
        with tree_lock(self.out, "swap", fcntl.LOCK_SH, SCAN_LOCK_WAIT_S):
            for file in stored_files(self.out, stream.feed.name, stream.exchange):
                if file.connector == stream.connector:
                    last[file.epoch] = max(file.last, last.get(file.epoch, -1))
        return last

    def write(self, batch: Batch) -> int:
        stream = batch.stream
        file = StoredFile(
            stream.feed.name,
            stream.exchange,
            stream.connector,
            batch.epoch,
            batch.first,
            batch.last,
            batch.date,
            self.out,
        )
        encoded = pa.BufferOutputStream()
        with pq.ParquetWriter(encoded, arrow_schema(stream.feed), **parquet_options(stream.feed)) as writer:
            for table in batch.tables():
                writer.write_table(table, row_group_size=len(table))
            writer.add_key_value_metadata(file_metadata(file, batch.ring))
        content = encoded.getvalue()
        part = file.part(_KIND)
        durable_mkdir(file.path.parent)
        durable_mkdir(part.parent)
        made = part
        try:
            _write_durably(part, memoryview(content))
            made = part.rename(file.path)
            sync_file(file.path.parent)
        except OSError:
            # The next try may have more rows, hence another name: what has this one would hold some of them twice.
            with contextlib.suppress(
                OSError
            ):  # the disk that refused the data may refuse this too; `open` clears a part
                made.unlink()
            raise
        return int(content.size)

    def close(self, stream: Stream) -> None:
        os.close(self._locks.pop(stream))


def open_sink(target: str, options: Mapping[str, str]) -> Sink:
    """The sink for a directory; it has no options."""
    if options:
        raise ConfigError(f"sink parquet has no option {', '.join(options)}")
    return ParquetSink(Path(target))


def _write_durably(path: Path, content: memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        done = 0
        while done < len(content):
            done += os.write(fd, content[done : done + (8 << 20)])
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def durable_mkdir(path: Path) -> None:
    """Make a directory and its parents, and make their names durable."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True, mode=0o750)
        sync_file(directory.parent)


def lock_file(path: Path, kind: int, wait_s: float) -> int | None:
    """Lock a file, made if need be, for as long as the returned descriptor is open; None when others hold it."""
    fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                return None
            time.sleep(0.02)
        else:
            return fd


@contextlib.contextmanager
def tree_lock(out: Path, name: str, kind: int, wait_s: float) -> Iterator[None]:
    """Hold the lock `name` of a tree. "swap": files are being replaced; "compact": somebody compacts or verifies.

    StorageError when it cannot be had in time.
    """
    path = out / LOCKS / name
    durable_mkdir(path.parent)
    fd = lock_file(path, kind, wait_s)
    if fd is None:
        raise StorageError(f"{path}: held by another process for more than {wait_s:g} s")
    try:
        yield
    finally:
        os.close(fd)
