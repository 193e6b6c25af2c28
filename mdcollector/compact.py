"""Compact: merges the small files of a tree into larger ones. Run by `mdcollector compact`, any time, also beside writers.

Files of one feed, exchange, day, connector and epoch whose rows follow each other become one file, in the same order,
encoded smaller. The merged file is made out of sight, read back and compared with its inputs value by value,
and only then gets its name and the inputs go, both under the tree's "swap" lock. Killed in between, the tree holds rows
twice; the next run removes every file whose rows a whole, compared file covers. A damaged input is reported and left.
"""

import fcntl
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS, StorageError
from mdcollector.records import FEEDS
from mdcollector.sinks import ROW_GROUP_ROWS
from mdcollector.sinks.parquet import (
    PARTS,
    StoredFile,
    durable_mkdir,
    file_metadata,
    parquet_options,
    read_footer,
    read_row_groups,
    stored_files,
    sync_file,
    tree_lock,
)
from mdcollector.tables import arrow_schema

ROWS_MAX = 8_000_000  # of a merged file: some 60 MB of trades
AGE_MIN_S = 300.0  # younger files are left alone: their row of neighbours is not complete yet
LOCK_WAIT_S = 10.0
_KIND = "merging"


@dataclass
class CompactReport:
    """What a run did. `findings` are files that were left alone because something is wrong with them."""

    merged: int = 0  # files that were merged away
    made: int = 0
    removed: int = 0  # leftovers of a killed run
    rows: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return EXIT_FINDINGS if self.findings else EXIT_DONE


class _Damaged(StorageError):
    """An input cannot be read, or is not what its name says."""

    def __init__(self, file: StoredFile, text: str) -> None:
        super().__init__(text)
        self.file = file


def compact(out: Path, *, rows_max: int = ROWS_MAX, age_min_s: float = AGE_MIN_S) -> CompactReport:
    """Merge what can be merged below `out`. StorageError when there is no such tree or somebody else works on it."""
    if not out.is_dir():
        raise StorageError(f"{out}: no such directory")
    report = CompactReport()
    with tree_lock(out, "compact", fcntl.LOCK_EX, LOCK_WAIT_S):
        for leftover in out.glob(f"{PARTS}/*.{_KIND}"):
            leftover.unlink()  # of a killed run; whoever holds the lock is the only one that makes such files
        born_before = time.time() - age_min_s
        files = sorted(file for file in stored_files(out) if file.path.stat().st_mtime <= born_before)
        for _, group in itertools.groupby(files, key=lambda f: (f.feed, f.exchange, f.connector, f.epoch, f.date)):
            left = _remove_covered(out, list(group), report)
            while run := _next_run(left, rows_max):
                try:
                    merged = _merge(out, run, report)
                except _Damaged as error:
                    if error.file not in left:
                        raise  # not an input: what was just written cannot be read back
                    report.findings.append(f"{error}; left alone")
                    left.remove(error.file)
                else:
                    left = sorted([merged, *(file for file in left if file not in run)])
    return report


def _remove_covered(out: Path, files: list[StoredFile], report: CompactReport) -> list[StoredFile]:
    """Remove files that a killed run merged but could not delete any more; those that merely overlap are findings."""
    left: list[StoredFile] = []
    for file in sorted(files, key=lambda f: (f.first, -f.last)):
        if not left or file.first > left[-1].last:
            left.append(file)
            continue
        cover = left[-1]
        try:
            if file.last > cover.last:
                raise _Damaged(file, f"{file.path}: its rows overlap with {cover.path.name}")
            _compare([file], cover)
        except _Damaged as error:
            report.findings.append(f"{error}; left alone, with {cover.path.name}")
            continue
        with tree_lock(out, "swap", fcntl.LOCK_EX, LOCK_WAIT_S):
            file.path.unlink()
            sync_file(file.path.parent)
        report.removed += 1
    return left


def _next_run(files: Sequence[StoredFile], rows_max: int) -> list[StoredFile]:
    """The first files to be merged with each other, empty when there are none.

    A file of half the size is done: to let it grow on would mean to write it again every time.
    """
    run: list[StoredFile] = []
    for file in files:
        done = file.rows * 2 > rows_max
        if run and (done or file.first != run[-1].last + 1 or sum(f.rows for f in run) + file.rows > rows_max):
            if len(run) > 1:
                return run
            run = []
        if not done:
            run.append(file)
    return run if len(run) > 1 else []


def _merge(out: Path, run: Sequence[StoredFile], report: CompactReport) -> StoredFile:
    """Make one file of several, prove it, and put it in their place."""
    merged = replace(run[0], last=run[-1].last)
    part = merged.part(_KIND)
    feed = FEEDS[merged.feed]
    try:
        ring = read_footer(run[0])
    except StorageError as error:
        raise _Damaged(run[0], str(error)) from error
    try:
        durable_mkdir(part.parent)
        with pq.ParquetWriter(part, arrow_schema(feed), **parquet_options(feed, small=True)) as writer:
            for table in _row_groups(itertools.chain.from_iterable(_read(file) for file in run)):
                writer.write_table(table, row_group_size=len(table))
            writer.add_key_value_metadata(file_metadata(merged, ring))
        sync_file(part)
        _compare(run, merged, part)
        before, after = sum(file.path.stat().st_size for file in run), part.stat().st_size
        with tree_lock(out, "swap", fcntl.LOCK_EX, LOCK_WAIT_S):
            part.rename(merged.path)
            sync_file(merged.path.parent)
            for file in run:
                file.path.unlink()
            sync_file(merged.path.parent)
    except OSError as error:
        raise StorageError(f"{part}: cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    report.made += 1
    report.merged += len(run)
    report.rows += merged.rows
    report.bytes_before += before
    report.bytes_after += after
    return merged


def _read(file: StoredFile, path: Path | None = None) -> Iterator[pa.Table]:
    try:
        yield from read_row_groups(file, path)
    except StorageError as error:
        raise _Damaged(file, str(error)) from error


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of ROW_GROUP_ROWS, each with one dictionary a column."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(map(len, held)) >= ROW_GROUP_ROWS:
            whole = pa.concat_tables(held)
            yield whole.slice(0, ROW_GROUP_ROWS).unify_dictionaries().combine_chunks()
            held = [whole.slice(ROW_GROUP_ROWS)]
    if sum(map(len, held)):
        yield pa.concat_tables(held).unify_dictionaries().combine_chunks()


def _compare(files: Sequence[StoredFile], whole: StoredFile, path: Path | None = None) -> None:
    """_Damaged unless `whole` (lying at `path`) holds the rows of `files`, value by value, bit by bit."""
    found = _read(whole, path)
    other = next(found)
    start = whole.first  # seq_id of the first row of `other`
    for file in files:
        expected = file.first
        for table in _read(file):
            while len(table):
                while expected >= start + len(other):
                    start += len(other)
                    other = next(found)
                piece = other.slice(expected - start, len(table))
                if not _same(table.slice(0, len(piece)), piece):
                    raise _Damaged(
                        file, f"{file.path}: its rows from seq_id {expected} on are not those in {whole.path.name}"
                    )
                expected += len(piece)
                table = table.slice(len(piece))  # noqa: PLW2901 (what is left of it)


def _same(one: pa.Table, two: pa.Table) -> bool:
    return all(_plain(a).equals(_plain(b)) for a, b in zip(one.columns, two.columns, strict=True))


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """A column whose values can be compared: text for a dictionary, bits for floats (NaN is not equal to itself)."""
    array = (
        pa.concat_arrays(chunk.dictionary_decode() for chunk in column.chunks)
        if pa.types.is_dictionary(column.type)
        else column.combine_chunks()
    )
    return array.view(pa.int64()) if pa.types.is_floating(array.type) else array
