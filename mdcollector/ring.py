"""The ring: one writer, any number of readers, a pair of memory-mapped files. Owns the file format and its cursors.

`<feed>.data` is nothing but records: row n lies at n mod capacity. `<feed>.meta` says everything else:

    0       magic, layout version, record size, capacity, rows per block, length and CRC of the JSON
    64      JSON: exchange, feed, connector, fields, and the offsets of everything below
    8192    cursors, each on a cache line of its own: claimed, published, sealed, heartbeat (ns since the epoch)
    8448    life: state, writer pid, start time (ns since the epoch), epoch; then the lengths of the two tables
    12288   epoch table (epoch, first row, start time), the last 1024 lives
    ...     instrument table, append-only, 64 bytes an entry (length, UTF-8)
    ...     seal table: for each block of 256 rows the CRC32 of its rows so far

Protocol. The writer announces rows in `claimed` (a little ahead, so that the store is rare), writes them, sets
`published`, and never waits. A reader reads `published`, copies the bytes out, then reads `claimed`: a row n with
n < claimed - capacity may have been overwritten meanwhile and is dropped and counted as lapped. `claimed` never goes
back, also when the next writer takes over from one that was killed. Outside the per-message path the writer seals:
it extends the CRC of the current block to all published rows and then sets `sealed`.

The order in which other cores see plain stores is what makes this safe; it was shown on x86-64 only (see
bench/README.md), so everywhere else the writer refuses to start.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import platform
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import msgspec
import numpy as np
import posix_ipc
from isal.isal_zlib import crc32  # the very CRC of zlib, ten times as fast: 3 ns a row of 128 bytes

from mdcollector.errors import RingError
from mdcollector.records import FEEDS, LAYOUT_VERSION, TICKER_BYTES_MAX, Feed

Rows = np.ndarray[tuple[int], np.dtype[np.void]]
Wait = Literal["spin", "poll", "semaphore"]

MAGIC = b"MDRING\r\n"
BLOCK_ROWS = 256
CAPACITY_MIN, CAPACITY_MAX = 1 << 9, 1 << 26
INSTRUMENTS_MAX = 16384
EPOCHS_KEPT = 1024
OPEN, CLOSED = 1, 2  # state of the ring; 0 = never written

_PREFIX = struct.Struct("<8sIIQIII")
_JSON_AT, _JSON_MAX = 64, 8192 - 64
_CLAIMED, _PUBLISHED, _SEALED, _HEARTBEAT = 8192, 8256, 8320, 8384
_STATE, _PID, _STARTED, _EPOCH = 8448, 8456, 8464, 8472
_EPOCH_COUNT, _INSTRUMENT_COUNT = 8512, 8576
_EPOCHS_AT = 12288
_EPOCH_ENTRY = struct.Struct("<qqq")
_INSTRUMENTS_AT = _EPOCHS_AT + EPOCHS_KEPT * _EPOCH_ENTRY.size
_INSTRUMENT_SIZE = 64
_SEALS_AT = _INSTRUMENTS_AT + INSTRUMENTS_MAX * _INSTRUMENT_SIZE
_SEAL = struct.Struct("<QII")  # row behind the last one covered, CRC32, check word over both
_SEAL_SALT = 0x5EA1
_READ_RETRIES_MAX = 1000
_EPOCH_MAX = 1 << 62
_LOCK_WAIT_S = 0.3
# ISA-L leaves the upper halves of the vector registers in use, and every copy of 16 to 31 bytes in the process takes
# 140 ns longer from then on: 0.3 us a trade. A vector loop of numpy gives them back as it ends.
_VECTOR = np.zeros(64)


class Description(msgspec.Struct):
    """The JSON part of `.meta`."""

    exchange: str
    feed: str
    connector: str
    fields: list[dict[str, str | int]]
    layout: dict[str, int]


def ring_dir(rings: Path, connector: str) -> Path:
    """Directory of one connector's rings."""
    return rings / connector


def _require_proven_memory_model() -> None:
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        raise RingError(
            f"the ring's readers rely on stores being seen in order, which was shown on x86-64 only; "
            f"this machine is {machine}: refusing to write"
        )


def _semaphore_names(data: Path) -> tuple[str, str]:
    digest = hashlib.sha1(os.fsencode(data.resolve()), usedforsecurity=False).hexdigest()[:20]
    return f"/mdring-{digest}-sleepers", f"/mdring-{digest}-wake"


def _describe(feed: Feed, exchange: str, connector: str, capacity: int) -> bytes:
    fields = cast(Any, feed.dtype.fields)
    description = Description(
        exchange=exchange,
        feed=feed.name,
        connector=connector,
        fields=[{"name": c.name, "type": c.ring, "offset": fields[c.name][1], "doc": c.doc} for c in feed.columns],
        layout={
            "record_size": feed.dtype.itemsize, "capacity": capacity,
            "claimed": _CLAIMED, "published": _PUBLISHED, "sealed": _SEALED, "heartbeat": _HEARTBEAT,
            "state": _STATE, "pid": _PID, "started": _STARTED, "epoch": _EPOCH,
            "epoch_count": _EPOCH_COUNT, "epochs": _EPOCHS_AT, "epochs_kept": EPOCHS_KEPT,
            "instrument_count": _INSTRUMENT_COUNT, "instruments": _INSTRUMENTS_AT, "instrument_size": _INSTRUMENT_SIZE,
            "seals": _SEALS_AT, "block_rows": BLOCK_ROWS,
        },
    )  # fmt: skip
    return msgspec.json.encode(description)


def _meta_size(capacity: int) -> int:
    return _SEALS_AT + capacity // BLOCK_ROWS * _SEAL.size


def ring_bytes(feed: Feed, capacity: int) -> int:
    """Memory that the files of a ring take."""
    return capacity * feed.dtype.itemsize + _meta_size(capacity)


class _Files:
    """The two files of a ring, validated and mapped. Shared by writer and reader."""

    def __init__(self, directory: Path, feed_name: str, *, writable: bool) -> None:
        self.data_path = directory / f"{feed_name}.data"
        self.meta_path = directory / f"{feed_name}.meta"
        flags = os.O_RDWR if writable else os.O_RDONLY
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        try:
            meta_fd = os.open(self.meta_path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise RingError(f"{self.meta_path}: cannot be opened: {error.strerror}") from error
        try:
            self.inode = os.fstat(meta_fd).st_ino
            self._validate(meta_fd, feed_name)
            self.meta = mmap.mmap(meta_fd, _meta_size(self.capacity), access=access)
        finally:
            os.close(meta_fd)
        try:
            data_fd = os.open(self.data_path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise RingError(f"{self.data_path}: cannot be opened: {error.strerror}") from error
        try:
            size = self.capacity * self.record_size
            if os.fstat(data_fd).st_size != size:
                raise RingError(
                    f"{self.data_path}: {os.fstat(data_fd).st_size} bytes, expected {size}: truncated or not its data"
                )
            if writable:  # touched now, and not row by row for a whole lap: 0.7 us of the hot path for each page
                flags, rights = mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE
                self.data = mmap.mmap(data_fd, size, flags=flags, prot=rights)
            else:
                self.data = mmap.mmap(data_fd, size, access=mmap.ACCESS_READ)
        finally:
            os.close(data_fd)
        self.meta_view = memoryview(self.meta)

    def _validate(self, fd: int, feed_name: str) -> None:
        path = self.meta_path
        head = os.pread(fd, _JSON_AT + _JSON_MAX, 0)
        if len(head) < _JSON_AT + _JSON_MAX:
            raise RingError(f"{path}: {len(head)} bytes, too short for a ring: truncated")
        magic, version, self.record_size, self.capacity, block_rows, json_size, json_crc = _PREFIX.unpack_from(head)
        if magic != MAGIC:
            raise RingError(f"{path}: not a ring (magic {magic!r}, expected {MAGIC!r})")
        if version != LAYOUT_VERSION:
            raise RingError(f"{path}: layout version {version}, this program reads {LAYOUT_VERSION}")
        if json_size > _JSON_MAX or crc32(head[_JSON_AT : _JSON_AT + json_size]) != json_crc:
            raise RingError(f"{path}: its description is damaged")
        try:
            self.description = msgspec.json.decode(head[_JSON_AT : _JSON_AT + json_size], type=Description)
        except msgspec.DecodeError as error:
            raise RingError(f"{path}: its description is not what a ring has: {error}") from error
        if self.description.feed != feed_name or feed_name not in FEEDS:
            raise RingError(f"{path}: holds feed {self.description.feed!r}, expected {feed_name!r}")
        self.feed = FEEDS[feed_name]
        if self.record_size != self.feed.dtype.itemsize:
            raise RingError(f"{path}: record size {self.record_size}, this program reads {self.feed.dtype.itemsize}")
        power_of_two = self.capacity & (self.capacity - 1) == 0
        if not (power_of_two and CAPACITY_MIN <= self.capacity <= CAPACITY_MAX and block_rows == BLOCK_ROWS):
            raise RingError(f"{path}: capacity {self.capacity} or block of {block_rows} rows is not possible")
        if os.fstat(fd).st_size != _meta_size(self.capacity):
            raise RingError(f"{path}: {os.fstat(fd).st_size} bytes, expected {_meta_size(self.capacity)}: truncated")

    def word(self, offset: int) -> "memoryview[int]":
        """One aligned 64-bit word of `.meta`; a store to [0] is a single machine store."""
        return self.meta_view[offset : offset + 8].cast("q")

    def get(self, offset: int) -> int:
        return self.word(offset)[0]

    def check_cursors(self) -> None:
        sealed, published, claimed = self.get(_SEALED), self.get(_PUBLISHED), self.get(_CLAIMED)
        # A live writer moves on between two looks, so `claimed` is bounded by what is published after it was read.
        if not 0 <= sealed <= published <= claimed <= self.get(_PUBLISHED) + self.capacity:
            raise RingError(
                f"{self.meta_path}: impossible cursors: sealed {sealed}, published {published}, claimed {claimed}"
            )
        for name, offset, most in (
            ("instruments", _INSTRUMENT_COUNT, INSTRUMENTS_MAX),
            ("epochs", _EPOCH_COUNT, 1 << 40),
            ("ms since 1970 in the epoch", _EPOCH, _EPOCH_MAX),
        ):
            if not 0 <= self.get(offset) <= most:
                raise RingError(f"{self.meta_path}: impossible number of {name}: {self.get(offset)}")

    def tickers(self, first: int) -> list[str]:
        """Instrument names from entry `first` on."""
        names = []
        for i in range(first, self.get(_INSTRUMENT_COUNT)):
            at = _INSTRUMENTS_AT + i * _INSTRUMENT_SIZE
            length = int.from_bytes(self.meta[at : at + 2], "little")
            if length > TICKER_BYTES_MAX:
                raise RingError(f"{self.meta_path}: instrument {i} has {length} bytes: damaged")
            try:
                names.append(self.meta[at + 2 : at + 2 + length].decode())
            except UnicodeDecodeError as error:
                raise RingError(f"{self.meta_path}: instrument {i} is not text: damaged") from error
        return names

    def seal(self, block: int) -> tuple[int, int]:
        """(row behind the last one covered, CRC32) of the seal in the slot of `block`, read consistently."""
        at = _SEALS_AT + block % (self.capacity // BLOCK_ROWS) * _SEAL.size
        for _ in range(_READ_RETRIES_MAX):
            end, crc, check = _SEAL.unpack_from(self.meta, at)
            if check == (crc ^ (end & 0xFFFFFFFF) ^ _SEAL_SALT):
                return end, crc
        return 0, 0


class RingWriter:
    """The only writer of one ring.

    Opening continues a ring that is already there: same seq_id line, new epoch. `epoch` defaults to the time in ms,
    which also tells apart the lives of a ring whose files were lost in between.
    Raises RingError when the machine is not proven safe, another writer is alive, space is short, or the files are
    not a ring of this feed, capacity and layout.

    The hot path (`emit.py`) writes rows itself: `slot = next & mask`, `if next + k > limit: claim(k)`, pack, then
    `published[0] = next = next + k`. Everything else uses `append` and `append_rows`.
    """

    def __init__(
        self,
        directory: Path,
        feed: Feed,
        *,
        exchange: str,
        connector: str,
        capacity: int,
        epoch: int | None = None,
        semaphore: bool = True,
    ) -> None:
        _require_proven_memory_model()
        if capacity & (capacity - 1) or not CAPACITY_MIN <= capacity <= CAPACITY_MAX:
            raise RingError(f"capacity {capacity}: allowed are powers of two from {CAPACITY_MIN} to {CAPACITY_MAX}")
        self.feed = feed
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._lock_fd = self._lock(directory / f"{feed.name}.data")
        except OSError as error:
            raise RingError(f"{directory}: the ring {feed.name} cannot be opened to write: {error.strerror}") from error
        try:
            if not (directory / f"{feed.name}.meta").exists():
                self._create(directory, feed, exchange, connector, capacity)
            files = self._files = _Files(directory, feed.name, writable=True)
            found = files.description
            if files.capacity != capacity or (found.exchange, found.connector) != (exchange, connector):
                raise RingError(
                    f"{files.meta_path}: is a ring of {found.exchange}/{found.connector} with capacity {files.capacity}, "
                    f"wanted is {exchange}/{connector} with capacity {capacity}; let a writer drain it, then move it away"
                )
            files.check_cursors()
            self._codes = {name: code for code, name in enumerate(files.tickers(0))}
            self._semaphores = self._open_semaphores() if semaphore else None
        except BaseException:
            os.close(self._lock_fd)
            raise
        self.capacity, self.mask, self.record_size = capacity, capacity - 1, files.record_size
        self.data = memoryview(files.data)
        self.pack_into = feed.packer.pack_into
        self.published = files.word(_PUBLISHED)
        self._claimed = files.word(_CLAIMED)
        self._sealed = files.word(_SEALED)
        self._heartbeat = files.word(_HEARTBEAT)
        self.next: int = self.published[0]
        self.limit: int = self._claimed[0]  # rows below it are announced
        self._ahead = max(1, capacity >> 8)
        self._begin_epoch(epoch)
        self._resume_seal()

    @staticmethod
    def _lock(path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise RingError(f"{path}: another process writes this ring; a ring has one writer") from None
                time.sleep(0.01)  # a reader that looks whether the writer lives holds the lock for microseconds
            else:
                return fd

    @staticmethod
    def _create(directory: Path, feed: Feed, exchange: str, connector: str, capacity: int) -> None:
        data_path, meta_path = directory / f"{feed.name}.data", directory / f"{feed.name}.meta"
        temporary = meta_path.with_suffix(".meta.part")
        text = _describe(feed, exchange, connector, capacity)
        prefix = _PREFIX.pack(MAGIC, LAYOUT_VERSION, feed.dtype.itemsize, capacity, BLOCK_ROWS, len(text), crc32(text))
        for path, size in ((data_path, capacity * feed.dtype.itemsize), (temporary, _meta_size(capacity))):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                os.ftruncate(fd, 0)  # a half-made pair of an earlier try may hold rows
                os.posix_fallocate(fd, 0, size)
                if path == temporary:
                    os.pwrite(fd, prefix, 0)
                    os.pwrite(fd, text, _JSON_AT)
            except OSError as error:
                raise RingError(f"{path}: no room for {size} bytes: {error.strerror}") from error
            finally:
                os.close(fd)
        temporary.replace(meta_path)  # a ring exists once its description has its name

    def _begin_epoch(self, epoch: int | None) -> None:
        files, now = self._files, time.time_ns()
        self.epoch = max(epoch if epoch is not None else now // 1_000_000, files.get(_EPOCH) + 1)
        count = files.get(_EPOCH_COUNT)
        _EPOCH_ENTRY.pack_into(
            files.meta, _EPOCHS_AT + count % EPOCHS_KEPT * _EPOCH_ENTRY.size, self.epoch, self.next, now
        )
        files.word(_EPOCH_COUNT)[0] = count + 1
        for offset, value in ((_EPOCH, self.epoch), (_PID, os.getpid()), (_STARTED, now), (_STATE, OPEN)):
            files.word(offset)[0] = value
        self.heartbeat()

    def _resume_seal(self) -> None:
        """Take up the CRCs where the last life left them, and cover what it published but did not seal any more.

        The CRC of a block that grows on is continued, not made anew: a bit that flipped meanwhile is still found.
        """
        sealed = self._files.get(_SEALED)
        start, crc = sealed - sealed % BLOCK_ROWS, 0
        end, crc_found = self._files.seal(start // BLOCK_ROWS)
        if max(sealed, start + 1) <= end <= min(self.next, start + BLOCK_ROWS):
            start, crc = end, crc_found if end % BLOCK_ROWS else 0
        whole = -(-max(0, self.limit - self.capacity) // BLOCK_ROWS) * BLOCK_ROWS  # the first block that is all there
        if start < whole:
            start, crc = min(whole, self.next - self.next % BLOCK_ROWS), 0
        self.sealed: int = start
        self._crc = crc
        self.seal()

    def _open_semaphores(self) -> tuple[posix_ipc.Semaphore, posix_ipc.Semaphore]:
        names = _semaphore_names(self._files.data_path)
        try:
            sleepers, wake = (posix_ipc.Semaphore(n, posix_ipc.O_CREAT, mode=0o660, initial_value=0) for n in names)
        except (OSError, posix_ipc.Error) as error:
            raise RingError(f"{self._files.data_path}: no semaphore for its readers: {error}") from error
        return sleepers, wake

    def code(self, ticker: str) -> int:
        """Index of an instrument in this ring's table; a new one is appended. RingError when the table is full."""
        code = self._codes.get(ticker)
        if code is not None:
            return code
        raw, code = ticker.encode(), len(self._codes)
        if len(raw) > TICKER_BYTES_MAX or not raw:
            raise RingError(f"instrument name {ticker!r}: {len(raw)} bytes, allowed are 1 to {TICKER_BYTES_MAX}")
        if code >= INSTRUMENTS_MAX:
            raise RingError(f"{self._files.meta_path}: the instrument table is full ({INSTRUMENTS_MAX})")
        at = _INSTRUMENTS_AT + code * _INSTRUMENT_SIZE
        self._files.meta[at : at + 2 + len(raw)] = len(raw).to_bytes(2, "little") + raw
        self._files.word(_INSTRUMENT_COUNT)[0] = code + 1
        self._codes[ticker] = code
        return code

    @property
    def tickers(self) -> list[str]:
        """Instrument names by code."""
        return list(self._codes)

    def snapshot(self) -> dict[str, Any]:
        """What a stats page shows of it; `instruments`: how many the table holds, of how many at most."""
        return {
            "published": self.next,
            "capacity": self.capacity,
            "epoch": self.epoch,
            "instruments": (len(self._codes), INSTRUMENTS_MAX),
        }

    def claim(self, rows: int) -> None:
        """Announce that `rows` more rows, and a few ahead, are about to be overwritten."""
        if rows > self.capacity // 2:
            raise RingError(
                f"{self._files.data_path}: {rows} rows of one message do not fit a ring of {self.capacity}; "
                f"configure a capacity of at least {1 << (2 * rows - 1).bit_length()}"
            )
        self._claimed[0] = self.limit = self.next + rows + self._ahead

    def append(self, row: Sequence[object]) -> None:
        """Write and publish one row: the values in ring order, without seq_id."""
        n = self.next
        if n >= self.limit:
            self.claim(1)
        self.pack_into(self.data, (n & self.mask) * self.record_size, *row, n)
        self.published[0] = self.next = n + 1

    def append_many(self, rows: Sequence[Sequence[object]]) -> None:
        """Write several rows (each as for `append`) and publish them at once."""
        n = self.next
        if n + len(rows) > self.limit:
            self.claim(len(rows))
        for row in rows:
            self.pack_into(self.data, (n & self.mask) * self.record_size, *row, n)
            n += 1
        self.published[0] = self.next = n

    def append_rows(self, rows: Rows) -> None:
        """Write rows (dtype of the feed, ticker codes of this ring) and publish them at once; seq_id is set here."""
        count, n = len(rows), self.next
        if n + count > self.limit:
            self.claim(count)
        # As plain bytes: numpy's copy of records leaves between the columns whatever memory held there before.
        out = rows.view(f"V{self.record_size}").copy().view(rows.dtype)
        out["seq_id"] = np.arange(n, n + count)
        raw, at = out.tobytes(), (n & self.mask) * self.record_size
        first = min(len(raw), len(self.data) - at)
        self.data[at : at + first] = raw[:first]
        self.data[: len(raw) - first] = raw[first:]
        self.published[0] = self.next = n + count

    def seal(self) -> None:
        """Extend the block CRCs over everything published, then say so. Called outside the per-message path."""
        crc, start, blocks = self._crc, self.sealed, self.capacity // BLOCK_ROWS
        while start < self.next:
            block = start // BLOCK_ROWS
            end = min(self.next, (block + 1) * BLOCK_ROWS)
            at = (start & self.mask) * self.record_size
            crc = crc32(self.data[at : at + (end - start) * self.record_size], crc)
            _SEAL.pack_into(
                self._files.meta,
                _SEALS_AT + block % blocks * _SEAL.size,
                end,
                crc,
                crc ^ (end & 0xFFFFFFFF) ^ _SEAL_SALT,
            )
            if end % BLOCK_ROWS == 0:
                crc = 0
            start = end
        self._crc, self.sealed = crc, start
        self._sealed[0] = start
        np.negative(_VECTOR, _VECTOR)

    def wake(self) -> None:
        """Wake the readers that said they sleep; called once per packet."""
        if self._semaphores is None or not self._semaphores[0].value:
            return
        sleepers, wake = self._semaphores
        with contextlib.suppress(posix_ipc.BusyError):  # a sleeper whose time was up took its announcement back
            for _ in range(sleepers.value):
                sleepers.acquire(0)
                wake.release()

    def heartbeat(self) -> None:
        self._heartbeat[0] = time.time_ns()

    def recent_columns(self, *names: str) -> list[np.ndarray[Any, Any]]:
        """Columns of all published rows that are still there, oldest first; only these columns are copied."""
        first = max(self.limit - self.capacity, 0)
        rows = np.frombuffer(self.data, dtype=self.feed.dtype)
        if first == self.next:
            return [rows[name][:0].copy() for name in names]
        low, high = first & self.mask, ((self.next - 1) & self.mask) + 1
        parts = [rows[low:high]] if low < high else [rows[low:], rows[:high]]
        return [np.concatenate([part[name] for part in parts]) for name in names]

    def recent_views(self, first: int) -> list[Rows]:
        """As `recent_rows`, without a copy: one or two views, good until the next row is written."""
        first = max(first, self.limit - self.capacity, 0)
        rows = np.frombuffer(self._files.data, dtype=self.feed.dtype)
        low, high = first & self.mask, (first & self.mask) + self.next - first
        return [part for part in (rows[low:high], rows[: max(0, high - self.capacity)]) if len(part)]

    def recent_rows(self, first: int) -> Rows:
        """Copy of the published rows from `first` (or the oldest still there) to the newest."""
        first = max(first, self.limit - self.capacity, 0)
        return _copy_rows(self._files.data, self.feed, self.capacity, first, self.next)

    def close(self) -> None:
        """Seal everything, mark the ring closed and release the lock; the files stay for readers and the next life."""
        if self._lock_fd < 0:
            return
        self.seal()
        self.heartbeat()
        self._files.word(_STATE)[0] = CLOSED
        self.wake()
        for semaphore in self._semaphores or ():
            with contextlib.suppress(posix_ipc.ExistentialError):
                semaphore.unlink()  # a name left behind costs a page of memory until the machine is started again
            semaphore.close()
        os.close(self._lock_fd)
        self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _copy_rows(data: mmap.mmap, feed: Feed, capacity: int, first: int, stop: int) -> Rows:
    """Rows [first, stop) copied out of the mapped file; plain bytes are copied, which is ten times a structured copy."""
    size, at, count = feed.dtype.itemsize, first % capacity, stop - first
    head = min(count, capacity - at)
    raw = data[at * size : (at + head) * size]
    if head < count:
        raw += data[: (count - head) * size]
    return np.frombuffer(raw, dtype=feed.dtype)


class RingReader:
    """Reads one ring, live, without ever holding up its writer. Needs read permission only.

    >>> with RingReader(Path("rings/binance"), "trades") as ring:      # starts at the newest row
    ...     for rows in ring.batches(timeout_s=1.0):                   # numpy structured arrays of the feed's dtype
    ...         print(ring.names(rows), rows["price"], ring.lapped)

    `lapped` counts rows that were overwritten before they could be read, exactly; `damaged` and `unchecked` count rows
    that `read_sealed` dropped for a wrong checksum, or passed on without one because half their block was lapped.
    Raises RingError when the files are not a whole ring of this feed, version and layout.
    """

    def __init__(self, directory: Path | str, feed: str) -> None:
        self.path = Path(directory) / f"{feed}.meta"
        self._files = _Files(Path(directory), feed, writable=False)
        self._files.check_cursors()
        self.feed = self._files.feed
        self.exchange, self.connector = self._files.description.exchange, self._files.description.connector
        self.capacity = self._files.capacity
        self._claimed = self._files.word(_CLAIMED)
        self._published = self._files.word(_PUBLISHED)
        self._sealed = self._files.word(_SEALED)
        self._tickers: list[str] = []
        self._semaphores: tuple[posix_ipc.Semaphore, posix_ipc.Semaphore] | None = None
        self._semaphores_epoch = -1
        self.lapped = 0
        self.damaged = 0
        self.unchecked = 0
        self.position: int = self._published[0]

    # What the ring says of itself

    @property
    def published(self) -> int:
        """Number of rows ever published."""
        return self._published[0]

    @property
    def sealed(self) -> int:
        """Number of rows that a checksum covers."""
        return self._sealed[0]

    @property
    def oldest(self) -> int:
        """Sequence number of the oldest row that can still be read."""
        oldest: int = self._claimed[0] - self.capacity
        return max(0, oldest)

    @property
    def lag(self) -> int:
        """Rows that are published and not yet read."""
        return self.published - self.position

    @property
    def epoch(self) -> int:
        return self._files.get(_EPOCH)

    @property
    def epochs(self) -> list[tuple[int, int, int]]:
        """(epoch, first row, start time in ns) of the lives this ring still knows, oldest first."""
        count = self._files.get(_EPOCH_COUNT)
        lives = [
            _EPOCH_ENTRY.unpack_from(self._files.meta, _EPOCHS_AT + i % EPOCHS_KEPT * _EPOCH_ENTRY.size)
            for i in range(max(0, count - EPOCHS_KEPT), count)
        ]
        for epoch, first, _ in lives:  # they become names of files
            if not (0 <= epoch <= _EPOCH_MAX and first >= 0):
                raise RingError(f"{self.path}: impossible life: epoch {epoch} from row {first}")
        return lives

    @property
    def is_open(self) -> bool:
        """The writer has not closed the ring; it may still have been killed, see `heartbeat_age_s`."""
        return self._files.get(_STATE) == OPEN

    @property
    def writer_pid(self) -> int:
        return self._files.get(_PID)

    @property
    def writer_alive(self) -> bool:
        """Some process holds the writer's lock."""
        fd = os.open(self._files.data_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    @property
    def heartbeat_age_s(self) -> float:
        return max(0.0, (time.time_ns() - self._files.get(_HEARTBEAT)) / 1e9)

    @property
    def replaced(self) -> bool:
        """The files were replaced by new ones since this reader opened them: open a new reader."""
        try:
            return self.path.stat().st_ino != self._files.inode
        except FileNotFoundError:
            return True

    @property
    def tickers(self) -> list[str]:
        """Instrument names; `rows["ticker"]` indexes this list."""
        if len(self._tickers) < self._files.get(_INSTRUMENT_COUNT):
            self._tickers += self._files.tickers(len(self._tickers))
        return self._tickers

    def names(self, rows: Rows) -> np.ndarray[Any, np.dtype[np.object_]]:
        """Instrument names of rows, as an object array."""
        names: np.ndarray[Any, np.dtype[np.object_]] = np.array(self.tickers, dtype=object)[rows["ticker"]]
        return names

    # Reading

    def seek(self, to: Literal["oldest", "newest"] | int) -> None:
        """Go to the oldest row still there, behind the newest, or to a sequence number (IndexError if not yet written)."""
        if to == "newest":
            self.position = self.published
        elif to == "oldest":
            self.position = self.oldest
        elif 0 <= to <= self.published:
            self.position = to
        else:
            raise IndexError(f"{self.path}: row {to} is not in 0..{self.published}")

    def read(self, rows_max: int = 65536) -> Rows:
        """Up to `rows_max` rows from the position on, copied out; empty when there is nothing new.

        Rows that were overwritten before or while they were copied are left out and counted in `lapped`.
        """
        stop = self._stop_of_next_copy(self.published, rows_max)
        rows = _copy_rows(self._files.data, self.feed, self.capacity, self.position, stop)
        return self._without_lapped(rows, stop)

    def read_sealed(self, rows_max: int = 65536) -> Rows:
        """As `read`, but only rows whose block checksum was compared; wrong blocks are left out and counted."""
        stop = self._stop_of_next_copy(self.sealed, rows_max)
        if stop == self.position:
            return np.empty(0, self.feed.dtype)
        first_block, last_block = self.position // BLOCK_ROWS, (stop - 1) // BLOCK_ROWS
        seals = [self._files.seal(block) for block in range(first_block, last_block + 1)]
        # The last block may have grown meanwhile: its checksum covers rows up to its own end.
        last_end = seals[-1][0]
        if stop < last_end <= (last_block + 1) * BLOCK_ROWS:
            stop = last_end
        start = first_block * BLOCK_ROWS
        rows = _copy_rows(self._files.data, self.feed, self.capacity, start, stop)
        keep = rows["seq_id"] == np.arange(start, stop)
        unchecked_to = 0
        raw, size, oldest = rows.view("u1").data, self.feed.dtype.itemsize, self.oldest
        for block, (end, crc) in enumerate(seals, first_block):
            low, high = block * BLOCK_ROWS - start, min((block + 1) * BLOCK_ROWS, stop) - start
            if block * BLOCK_ROWS < oldest:
                unchecked_to = start + high
            elif end != start + high or crc32(raw[low * size : high * size]) != crc:
                keep[low:high] = False
        skip = self.position - start
        rows, keep = rows[skip:], keep[skip:]
        rows = self._without_lapped(rows, stop)
        keep = keep[len(keep) - len(rows) :]
        self.unchecked += max(0, unchecked_to - (stop - len(rows)))
        whole = bool(keep.all())
        self.damaged += 0 if whole else int(len(keep) - keep.sum())
        return rows if whole else rows[keep]

    def _stop_of_next_copy(self, available: int, rows_max: int) -> int:
        oldest = self.oldest
        if self.position < oldest:
            self.lapped += oldest - self.position
            self.position = oldest
        return max(self.position, min(available, self.position + rows_max))

    def _without_lapped(self, rows: Rows, stop: int) -> Rows:
        """Drop the rows at the front that may have been overwritten while they were copied; move the position."""
        lapped = min(max(0, self.oldest - self.position), len(rows))
        self.lapped += lapped
        self.position = stop
        return rows[lapped:]

    # Waiting

    def wait(self, timeout_s: float, how: Wait = "poll", poll_s: float = 100e-6) -> bool:
        """Wait until there is something to read, at most `timeout_s`; says whether there is."""
        if self._published[0] > self.position:
            return True
        if how == "semaphore":
            if self._open_semaphores():
                return self._wait_semaphore(timeout_s)
            how = "poll"
        deadline = time.monotonic() + timeout_s
        published, position = self._published, self.position
        while time.monotonic() < deadline:
            if how == "poll":
                time.sleep(poll_s)
            if published[0] > position:
                return True
        return bool(published[0] > position)

    def _open_semaphores(self) -> bool:
        """Have the semaphores of the writer's present life; False when it has closed the ring and taken them away."""
        epoch = self.epoch
        if self._semaphores is not None and self._semaphores_epoch == epoch:
            return self.is_open
        self._let_go_of_semaphores()
        try:
            first, second = (posix_ipc.Semaphore(n) for n in _semaphore_names(self._files.data_path))
        except posix_ipc.Error as error:
            if not self.is_open:
                return False
            raise RingError(f"{self.path}: its writer offers no semaphore: {error}") from error
        self._semaphores, self._semaphores_epoch = (first, second), epoch
        return True

    def _wait_semaphore(self, timeout_s: float) -> bool:
        assert self._semaphores is not None
        sleepers, wake = self._semaphores
        sleepers.release()  # "I sleep"; the writer takes it when it wakes us
        woken = False
        if self._published[0] <= self.position:  # it may have published before it could see that we sleep
            with contextlib.suppress(posix_ipc.BusyError, posix_ipc.SignalError):  # time is up, or a signal came
                wake.acquire(timeout_s)
                woken = True
        if not woken:  # an announcement left behind would cost the writer a needless wake-up, one more each time
            try:
                sleepers.acquire(0)
            except posix_ipc.BusyError:
                with contextlib.suppress(posix_ipc.BusyError):  # the writer took it: then its wake-up is ours too
                    wake.acquire(0)
        return bool(self._published[0] > self.position)

    def batches(self, timeout_s: float = 1.0, rows_max: int = 65536, how: Wait = "poll") -> Iterator[Rows]:
        """Yield batches for ever; an empty one when nothing came for `timeout_s`, so that the caller can look around."""
        while True:
            self.wait(timeout_s, how)
            yield self.read(rows_max)

    def _let_go_of_semaphores(self) -> None:
        for semaphore in self._semaphores or ():
            semaphore.close()
        self._semaphores = None

    def close(self) -> None:
        self._let_go_of_semaphores()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
