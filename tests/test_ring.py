"""The ring against a plain list, its files against damage, and its waits with a second process."""

import contextlib
import os
import platform
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import posix_ipc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdcollector import ring as ring_module
from mdcollector.errors import RingError
from mdcollector.records import FEEDS, ORDERBOOK_L2, TRADES
from mdcollector.ring import BLOCK_ROWS, CAPACITY_MIN, EPOCHS_KEPT, INSTRUMENTS_MAX, RingReader, RingWriter

CAPACITY = CAPACITY_MIN
START_TIMEOUT_S = 30.0
CLAIMED, PUBLISHED, SEALED = 8192, 8256, 8320  # where the format puts the cursors
INSTRUMENT_COUNT = 8576
INSTRUMENTS_AT = 12288 + EPOCHS_KEPT * 24


def writer(directory: Path, **changes: Any) -> RingWriter:
    how: dict[str, Any] = {"exchange": "DERIBIT", "connector": "c", "capacity": CAPACITY, "semaphore": False, **changes}
    return RingWriter(directory, how.pop("feed", TRADES), **how)


def trade(n: int, ticker: int = 0) -> tuple[object, ...]:
    """The values of a row that says of itself which one it is, in every column."""
    return (
        n,
        n + 1,
        n // 3,
        n % 1000,
        n % 777,
        ticker,
        3,
        n % 128,
        1 if n % 2 else -1,
        n * 0.5,
        n * 0.25,
        n,
        b"id%d" % n,
    )


def trades(first: int, count: int) -> Any:
    rows = np.zeros(count, TRADES.dtype)
    for i in range(count):
        rows[i] = (*trade(first + i), 0)
    return rows


def numbers(rows: Any) -> list[int]:
    """The sequence numbers of rows; fails if a row is not, in every column, what was written under its number."""
    for row in rows.tolist():
        assert row[:-1] == trade(row[-1]), row
    return [int(n) for n in rows["seq_id"]]


@contextlib.contextmanager
def second_process(source: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A real second process; whatever happens it is gone at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", source, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()


# ---------------------------------------------------------------- against a model


_STEP = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40)),
    st.tuples(st.just("append_rows"), st.integers(0, CAPACITY // 2)),
    st.tuples(st.just("append_many"), st.integers(0, CAPACITY // 2)),
    st.tuples(st.just("read"), st.one_of(st.integers(0, 20), st.integers(0, 2 * CAPACITY))),
    st.tuples(st.just("read_sealed"), st.one_of(st.integers(1, 20), st.integers(1, 2 * CAPACITY))),
    st.tuples(st.just("seal"), st.just(0)),
    st.tuples(st.just("reopen"), st.booleans()),
    st.tuples(st.just("seek"), st.one_of(st.sampled_from(["oldest", "newest"]), st.integers(0, 4 * CAPACITY))),
    st.tuples(st.just("ticker"), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15)),
)


class Model:
    """What a ring is meant to be: a list of rows of which the last so many can be read, and a reader's place in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ring = writer(directory, epoch=1)
        self.reader = RingReader(directory, "trades")
        self.published = self.sealed = self.position = self.lapped = self.delivered = 0
        self.tickers: list[str] = []
        self.epochs = [(1, 0)]

    def oldest(self) -> int:
        """The first row that surely is not being overwritten: the writer announces at most 1/256 of the ring ahead."""
        oldest = self.reader.oldest
        assert max(0, self.published - CAPACITY) <= oldest
        assert oldest <= max(0, self.published + (CAPACITY >> 8) + self.unused_claim - CAPACITY)
        return oldest

    unused_claim = 0

    def append(self, count: int) -> None:
        for _ in range(count):
            self.ring.append(trade(self.published))
            self.published += 1

    def append_rows(self, count: int) -> None:
        self.ring.append_rows(trades(self.published, count))
        self.published += count

    def append_many(self, count: int) -> None:
        self.ring.append_many([trade(self.published + i) for i in range(count)])
        self.published += count

    def skip_lapped(self) -> None:
        gone = max(0, self.oldest() - self.position)
        self.lapped += gone
        self.position += gone

    def read(self, most: int) -> None:
        self.skip_lapped()
        rows = self.reader.read(most)
        count = max(0, min(most, self.published - self.position))
        assert numbers(rows) == list(range(self.position, self.position + count))
        self.position += count
        self.delivered += count

    def read_sealed(self, most: int) -> None:
        self.skip_lapped()
        rows = self.reader.read_sealed(most)
        stop = max(self.position, min(self.sealed, self.position + most))
        block_end = -(-stop // BLOCK_ROWS) * BLOCK_ROWS
        if stop > self.position and self.sealed <= block_end - BLOCK_ROWS + CAPACITY:
            # Whole as far as the checksum reaches, to the end of the block or what is sealed of it, unless the
            # checksum is gone because the block is being overwritten.
            stop = min(self.sealed, block_end)
        assert numbers(rows) == list(range(self.position, stop))
        self.delivered += stop - self.position
        self.position = stop

    def seal(self, _: int) -> None:
        self.ring.seal()
        self.sealed = self.published

    def reopen(self, in_order: bool) -> None:
        if in_order:
            self.ring.close()
            assert not self.reader.is_open
        else:
            os.close(self.ring._lock_fd)  # what is left when a process is killed
            self.ring._lock_fd = -1
        self.ring = writer(self.directory, epoch=len(self.epochs) + 1)
        self.sealed = self.published
        self.epochs.append((len(self.epochs) + 1, self.published))
        assert self.ring.next == self.published
        assert self.reader.is_open
        assert not self.reader.replaced

    def seek(self, to: str | int) -> None:
        if isinstance(to, int) and to > self.published:
            with pytest.raises(IndexError):
                self.reader.seek(to)
            return
        self.reader.seek(to)  # type: ignore[arg-type]
        self.position = self.oldest() if to == "oldest" else self.published if to == "newest" else int(to)
        assert self.reader.position == self.position

    def ticker(self, name: str) -> None:
        code = self.ring.code(name)
        if name not in self.tickers:
            self.tickers.append(name)
        assert self.tickers[code] == name

    def check(self) -> None:
        reader = self.reader
        assert (reader.published, reader.sealed, reader.position) == (self.published, self.sealed, self.position)
        assert (reader.lapped, reader.damaged) == (self.lapped, 0)
        assert reader.lag == self.published - self.position
        assert reader.tickers == self.ring.tickers == self.tickers
        assert [(epoch, first) for epoch, first, _ in reader.epochs] == self.epochs
        assert reader.epoch == self.ring.epoch == self.epochs[-1][0]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(_STEP, max_size=25))
def test_any_sequence_of_operations_agrees_with_a_plain_model(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any]]
) -> None:
    model = Model(tmp_path_factory.mktemp("ring"))
    for name, argument in steps:
        getattr(model, name)(argument)
        model.check()
    model.seek("oldest")
    model.read(4 * CAPACITY)
    model.ring.close()
    assert model.position == model.published


@given(count=st.integers(0, 5 * CAPACITY), read_first=st.integers(0, CAPACITY))
@settings(max_examples=60, deadline=None)
def test_read_and_lapped_add_up_to_what_was_published(
    tmp_path_factory: pytest.TempPathFactory, count: int, read_first: int
) -> None:
    with writer(tmp_path_factory.mktemp("ring")) as out:
        reader = RingReader(out._files.data_path.parent, "trades")
        out.append_rows(trades(0, CAPACITY // 2))
        seen = numbers(reader.read(read_first))
        while out.next < count:
            out.append_rows(trades(out.next, min(CAPACITY // 2, count - out.next)))
        seen += numbers(reader.read())
        assert len(seen) + reader.lapped == out.next
        assert seen == sorted(set(seen))
        # Rows that were announced but not written count as gone: never more than 1/256 of the ring.
        assert out.next - len(seen) <= max(0, out.next - CAPACITY) + (CAPACITY >> 8)


def test_every_feed_has_a_ring(tmp_path: Path) -> None:
    for feed in FEEDS.values():
        with writer(tmp_path, feed=feed) as out:
            zero = [b"" if c.ring[0] == "S" else 0 for c in feed.columns[:-1]]
            for _ in range(3):
                out.append(zero)
        reader = RingReader(tmp_path, feed.name)
        reader.seek("oldest")
        assert reader.read()["seq_id"].tolist() == [0, 1, 2]
        assert reader.read().dtype == feed.dtype
        assert (reader.exchange, reader.connector, reader.feed) == ("DERIBIT", "c", feed)


def test_numpy_memmap_reads_the_data_file_as_it_is(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.append_rows(trades(0, 200))
        out.append_rows(trades(200, 200))
        out.append_rows(trades(400, 200))
    rows = np.memmap(tmp_path / "trades.data", TRADES.dtype, mode="r")
    assert len(rows) == CAPACITY
    for n in range(600 - CAPACITY, 600):
        assert rows[n % CAPACITY]["seq_id"] == n
        assert rows[n % CAPACITY].tolist()[:-1] == trade(n)


def test_the_description_tells_a_reader_in_any_language_what_it_needs(tmp_path: Path) -> None:
    with writer(tmp_path, epoch=77) as out:
        out.code("BTC-PERPETUAL")
        out.append_rows(trades(0, 10))
    raw = (tmp_path / "trades.meta").read_bytes()
    magic, version, record_size, capacity, block, length, crc = struct.unpack_from("<8sIIQIII", raw)
    assert (magic, version, record_size, capacity, block) == (b"MDRING\r\n", 1, 128, CAPACITY, BLOCK_ROWS)
    assert zlib.crc32(raw[64 : 64 + length]) == crc
    said = msgspec.json.decode(raw[64 : 64 + length])
    assert [f["name"] for f in said["fields"]] == list(TRADES.dtype.names or ())
    assert {f["name"]: f["offset"] for f in said["fields"]} == {n: f[1] for n, f in (TRADES.dtype.fields or {}).items()}
    at = said["layout"]
    words = {
        k: struct.unpack_from("<q", raw, at[k])[0] for k in ("claimed", "published", "sealed", "epoch", "pid", "state")
    }
    assert words == {"claimed": 12, "published": 10, "sealed": 10, "epoch": 77, "pid": os.getpid(), "state": 2}
    (size,) = struct.unpack_from("<H", raw, at["instruments"])
    assert raw[at["instruments"] + 2 : at["instruments"] + 2 + size] == b"BTC-PERPETUAL"
    end, crc, _ = struct.unpack_from("<QII", raw, at["seals"])
    assert (end, crc) == (10, zlib.crc32((tmp_path / "trades.data").read_bytes()[: 10 * record_size]))
    assert len({at[k] // 64 for k in ("claimed", "published", "sealed", "heartbeat")}) == 4, "a cache line each"


def test_a_batch_beyond_half_the_ring_is_refused_and_leaves_the_ring_usable(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        for refused in (lambda: out.append_rows(trades(0, 257)), lambda: out.append_many([trade(0)] * 257)):
            with pytest.raises(RingError, match=r"257 rows of one message do not fit a ring of 512; .* at least 1024"):
                refused()
        assert out.next == 0
        out.append_rows(trades(0, 256))
        assert RingReader(tmp_path, "trades").published == 256
    with writer(tmp_path / "larger", capacity=1024) as out:
        out.append_rows(trades(0, 257))


def test_names_and_batches(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        for code, name in enumerate(["BTC-PERPETUAL", "ソラUSDT", "x" * 60]):
            assert out.code(name) == code
        reader = RingReader(tmp_path, "trades")
        batches = reader.batches(timeout_s=0.01)
        assert len(next(batches)) == 0, "an empty batch, so that the caller can look around"
        for n in range(6):
            out.append(trade(n, ticker=n % 3))
        rows = next(batches)
        assert reader.names(rows).tolist() == ["BTC-PERPETUAL", "ソラUSDT", "x" * 60] * 2
        assert reader.names(rows[:0]).tolist() == []
        late = out.code("LATE")
        out.append(trade(6, ticker=late))
        assert reader.names(next(batches)).tolist() == ["LATE"]


def test_the_instrument_table_refuses_what_it_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert INSTRUMENTS_MAX == 16384
    monkeypatch.setattr(ring_module, "INSTRUMENTS_MAX", 3)
    with writer(tmp_path) as out:
        for name in ("", "x" * 61, "ソ" * 21):
            with pytest.raises(RingError, match="allowed are 1 to 60"):
                out.code(name)
        for name in ("A", "B", "C"):
            out.code(name)
        with pytest.raises(RingError, match=r"the instrument table is full \(3\)"):
            out.code("D")
        assert out.code("B") == 1
    with writer(tmp_path) as out:
        assert out.tickers == ["A", "B", "C"]
        with pytest.raises(RingError, match="full"):
            out.code("D")


def test_the_last_epochs_are_kept(tmp_path: Path) -> None:
    for number in range(EPOCHS_KEPT + 3):
        with writer(tmp_path, epoch=number + 1) as out:
            if number % 100 == 0:
                out.append(trade(out.next))
    epochs = RingReader(tmp_path, "trades").epochs
    assert [epoch for epoch, _, _ in epochs] == list(range(4, EPOCHS_KEPT + 4))
    assert epochs[-1][1] == 11


def test_an_epoch_is_never_given_twice(tmp_path: Path) -> None:
    with writer(tmp_path, epoch=50):
        pass
    with writer(tmp_path, epoch=10) as out:
        assert out.epoch == 51
    with writer(tmp_path) as out:
        assert abs(out.epoch - time.time() * 1000) < 60_000


def test_state_heartbeat_and_the_writers_life_are_seen(tmp_path: Path) -> None:
    out = writer(tmp_path)
    reader = RingReader(tmp_path, "trades")
    assert (reader.is_open, reader.writer_alive, reader.writer_pid) == (True, True, os.getpid())
    assert reader.heartbeat_age_s < 60
    out.close()
    out.close()
    assert (reader.is_open, reader.writer_alive) == (False, False)


def test_recent_rows_are_those_still_there(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        assert len(out.recent_rows(-1)) == 0
        for first in range(0, 3 * CAPACITY, CAPACITY // 2):
            out.append_rows(trades(first, CAPACITY // 2))
        assert numbers(out.recent_rows(3 * CAPACITY - 7)) == list(range(3 * CAPACITY - 7, 3 * CAPACITY))
        everything = numbers(out.recent_rows(0))
        assert everything == list(range(out.limit - CAPACITY, 3 * CAPACITY))
        assert len(out.recent_rows(3 * CAPACITY)) == 0


# ---------------------------------------------------------------- damaged and wrong files


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A ring with some rows and two instruments, closed."""
    with writer(tmp_path) as out:
        out.code("BTC")
        out.code("ETH")
        out.append_rows(trades(0, 200))
    return tmp_path


def patch(path: Path, offset: int, raw: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(raw)


def word(value: int) -> bytes:
    return struct.pack("<q", value)


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "magic": (lambda meta, data: patch(meta, 0, b"PAR1"), r"trades\.meta: not a ring \(magic b'PAR1"),
    "version": (lambda meta, data: patch(meta, 8, b"\x02"), r"layout version 2, this program reads 1"),
    "record size": (lambda meta, data: patch(meta, 12, b"\x40"), r"record size 64, this program reads 128"),
    "capacity": (lambda meta, data: patch(meta, 16, b"\x01"), r"capacity 513 or block of 256 rows is not possible"),
    "huge capacity": (lambda meta, data: patch(meta, 16, b"\0" * 7 + b"\x40"), r"capacity \d+ or block"),
    "no capacity": (lambda meta, data: patch(meta, 16, bytes(8)), r"capacity 0 or block"),
    "another capacity": (lambda meta, data: patch(meta, 16, b"\0\x04"), r"trades\.meta: \d+ bytes, expected \d+: truncated"),
    "block": (lambda meta, data: patch(meta, 24, b"\x01"), r"block of 257 rows"),
    "description": (lambda meta, data: patch(meta, 80, b"!"), r"its description is damaged"),
    "length of the description": (lambda meta, data: patch(meta, 28, b"\xff" * 4), r"its description is damaged"),
    "empty meta": (lambda meta, data: meta.write_bytes(b""), r"0 bytes, too short for a ring: truncated"),
    "short meta": (lambda meta, data: os.truncate(meta, 100), r"100 bytes, too short"),
    "cut meta": (lambda meta, data: os.truncate(meta, meta.stat().st_size - 1), r"trades\.meta: \d+ bytes, expected \d+"),
    "cut data": (lambda meta, data: os.truncate(data, 512 * 128 - 1), r"trades\.data: 65535 bytes, expected 65536"),
    "empty data": (lambda meta, data: os.truncate(data, 0), r"trades\.data: 0 bytes, expected 65536"),
    "longer data": (lambda meta, data: os.truncate(data, 512 * 128 + 64), r"trades\.data: 65600 bytes"),
    "published behind sealed": (lambda meta, data: patch(meta, PUBLISHED, word(5)), r"impossible cursors: sealed 200"),
    "claimed behind published": (lambda meta, data: patch(meta, CLAIMED, word(5)), r"impossible cursors"),
    "claimed far ahead": (lambda meta, data: patch(meta, CLAIMED, word(713)), r"published 200, claimed 713"),
    "negative": (lambda meta, data: patch(meta, SEALED, word(-1)), r"impossible cursors: sealed -1"),
    "too many instruments": (
        lambda meta, data: patch(meta, INSTRUMENT_COUNT, word(INSTRUMENTS_MAX + 1)), r"impossible number of instruments",
    ),
    "epoch at the end of time": (
        lambda meta, data: patch(meta, 8472, word((1 << 63) - 1)), r"impossible number of ms since 1970 in the epoch",
    ),
    "negative epochs": (lambda meta, data: patch(meta, 8512, word(-1)), r"impossible number of epochs"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ring_is_refused_by_reader_and_writer(made: Path, damage: str) -> None:
    RingReader(made, "trades").close()
    act, text = DAMAGES[damage]
    act(made / "trades.meta", made / "trades.data")
    with pytest.raises(RingError, match=text):
        RingReader(made, "trades")
    data_size = (made / "trades.data").stat().st_size
    with pytest.raises(RingError, match=text):
        writer(made)
    assert (made / "trades.data").stat().st_size == data_size, "what may be somebody's data is left as it is"


def test_a_description_that_is_no_description_is_refused(made: Path) -> None:
    for text, said in ((b'{"feed": 5}', "not what a ring has"), (b"nonsense", "not what a ring has")):
        patch(made / "trades.meta", 28, struct.pack("<II", len(text), zlib.crc32(text)))
        patch(made / "trades.meta", 64, text)
        with pytest.raises(RingError, match=said):
            RingReader(made, "trades")


def test_an_impossible_life_becomes_no_name_of_a_file(made: Path) -> None:
    patch(made / "trades.meta", 12288, word(-7))
    with RingReader(made, "trades") as reader, pytest.raises(RingError, match="impossible life: epoch -7 from row 0"):
        assert reader.epochs


def test_a_damaged_instrument_table_is_refused(made: Path) -> None:
    for raw, said in ((b"\xff\x00", "instrument 1 has 255 bytes"), (b"\x02\x00\xff\xfe", "instrument 1 is not text")):
        patch(made / "trades.meta", INSTRUMENTS_AT + 64, raw)
        with pytest.raises(RingError, match=said):
            _ = RingReader(made, "trades").tickers
        with pytest.raises(RingError, match=said):
            writer(made)


def test_another_feed_or_nothing_under_that_name_is_refused(made: Path) -> None:
    with pytest.raises(RingError, match=r"bbo\.meta: cannot be opened: No such file"):
        RingReader(made, "bbo")
    for end in ("meta", "data"):
        (made / f"trades.{end}").rename(made / f"orderbook_l2.{end}")
    with pytest.raises(RingError, match="holds feed 'trades', expected 'orderbook_l2'"):
        RingReader(made, "orderbook_l2")
    with pytest.raises(RingError, match="holds feed 'trades'"):
        writer(made, feed=ORDERBOOK_L2)
    (made / "orderbook_l2.data").unlink()
    with pytest.raises(RingError, match=r"orderbook_l2\.meta: holds feed|orderbook_l2\.data: cannot be opened"):
        RingReader(made, "orderbook_l2")


@pytest.mark.parametrize(("change", "value"), [("capacity", 1024), ("exchange", "OKX"), ("connector", "other")])
def test_a_ring_of_another_size_or_owner_is_not_taken_over(made: Path, change: str, value: Any) -> None:
    with pytest.raises(RingError, match="is a ring of DERIBIT/c with capacity 512, wanted is"):
        writer(made, **{change: value})
    with writer(made) as out:
        assert out.next == 200


@pytest.mark.parametrize("capacity", [0, 1, 256, 1000, 1 << 27, -512])
def test_an_impossible_capacity_is_refused_before_anything_is_made(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(RingError, match=f"capacity {capacity}: allowed are powers of two from 512 to 67108864"):
        writer(tmp_path / "r", capacity=capacity)
    assert not (tmp_path / "r").exists()


def test_no_room_is_said_with_file_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RingError, match=r"trades\.data: no room for 65536 bytes: No space left"):
        writer(tmp_path)
    assert not (tmp_path / "trades.meta").exists()
    monkeypatch.undo()
    with writer(tmp_path) as out:  # what was half made does not stand in the way
        assert out.next == 0


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RingError, match=r"file/rings: the ring trades cannot be opened to write: Not a directory"):
        writer(tmp_path / "file" / "rings")


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64", ""])
def test_a_machine_that_was_not_shown_safe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(RingError, match=f"shown on x86-64 only; this machine is {machine}: refusing to write"):
        writer(tmp_path / "r")
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------- checksums


def test_a_flipped_bit_is_found_counted_and_never_passed_on(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.append_rows(trades(0, 256))
        out.append_rows(trades(256, 200))
    for row in (0, 100, 255, 256, 455):
        for byte in (0, 40, 90, 127):
            at = row * 128 + byte
            raw = (tmp_path / "trades.data").read_bytes()[at]
            patch(tmp_path / "trades.data", at, bytes([raw ^ 4]))
            reader = RingReader(tmp_path, "trades")
            reader.seek("oldest")
            good = range(256, 456) if row < 256 else range(256)
            assert numbers(reader.read_sealed()) == list(good)
            assert reader.damaged == 456 - len(good)
            assert (reader.lapped, reader.unchecked, reader.position) == (0, 0, 456)
            patch(tmp_path / "trades.data", at, bytes([raw]))
    reader = RingReader(tmp_path, "trades")
    reader.seek("oldest")
    assert numbers(reader.read_sealed()) == list(range(456))
    assert reader.damaged == 0


def test_a_bit_that_flips_before_the_next_life_is_found_too(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.append_rows(trades(0, 100))
    patch(tmp_path / "trades.data", 50 * 128 + 40, b"\x01")
    with writer(tmp_path) as out:
        out.append_rows(trades(100, 200))
    reader = RingReader(tmp_path, "trades")
    reader.seek("oldest")
    assert numbers(reader.read_sealed()) == list(range(256, 300))
    assert reader.damaged == 256


def test_what_a_killed_writer_published_unsealed_is_sealed_by_the_next(tmp_path: Path) -> None:
    out = writer(tmp_path, capacity=2048)
    out.append_rows(trades(0, 300))
    out.seal()
    for first in range(300, 1500, 100):
        out.append_rows(trades(first, 100))
    os.close(out._lock_fd)  # killed: nothing is sealed, nothing is said
    out._lock_fd = -1
    reader = RingReader(tmp_path, "trades")
    reader.seek("oldest")
    assert numbers(reader.read_sealed()) == list(range(300))
    with writer(tmp_path, capacity=2048):
        assert numbers(reader.read_sealed()) == list(range(300, 1500))
    assert (reader.damaged, reader.unchecked) == (0, 0)


def test_rows_that_a_killed_writer_was_overwriting_are_not_read_in_its_next_life_either(tmp_path: Path) -> None:
    out = writer(tmp_path)
    for first in range(0, 1024, 256):
        out.append_rows(trades(first, 256))
    out.claim(200)
    at = (out.next & out.mask) * out.record_size
    out.data[at : at + 100 * out.record_size] = b"\xff" * 100 * out.record_size
    os.close(out._lock_fd)  # killed in the middle of a large message
    out._lock_fd = -1
    reader = RingReader(tmp_path, "trades")
    oldest = reader.oldest
    assert oldest >= 1024 + 200 - CAPACITY
    with writer(tmp_path) as out:
        out.append(trade(1024))
        assert reader.oldest >= oldest, "what was announced once stays announced"
        reader.seek("oldest")
        assert numbers(reader.read()) == list(range(oldest, 1025))


@pytest.mark.parametrize("how", ["read", "read_sealed"])
def test_rows_that_were_announced_to_be_overwritten_while_they_were_copied_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with writer(tmp_path) as out:
        out.append_rows(trades(0, 256))
        out.append_rows(trades(256, 244))
        out.seal()
        reader = RingReader(tmp_path, "trades")
        reader.seek("oldest")
        copy_rows = ring_module._copy_rows

        def copied_while_the_writer_begins(*args: Any) -> Any:
            rows = copy_rows(*args)
            out.claim(200)  # it writes them now; they are not published
            return rows

        monkeypatch.setattr(ring_module, "_copy_rows", copied_while_the_writer_begins)
        rows = getattr(reader, how)()
        assert out.limit - CAPACITY >= 188
        assert numbers(rows) == list(range(out.limit - CAPACITY, 500))
        assert (reader.lapped, reader.position, reader.damaged) == (out.limit - CAPACITY, 500, 0)


def test_rows_of_a_block_that_is_half_overwritten_are_passed_on_and_counted_as_unchecked(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        for first in range(0, 640, 128):
            out.append_rows(trades(first, 128))
        out.seal()
        reader = RingReader(tmp_path, "trades")
        reader.seek(0)
        seen = numbers(reader.read_sealed())
        assert seen == list(range(reader.lapped, 640))
        assert reader.lapped >= 128
        assert reader.unchecked == 256 - reader.lapped
        assert reader.damaged == 0
        patch(tmp_path / "trades.data", (200 + 1) * 128 - 8, word(7))  # no checksum covers it, its own number does
        reader = RingReader(tmp_path, "trades")
        reader.seek(0)
        assert numbers(reader.read_sealed()) == [n for n in seen if n != 200]
        assert reader.damaged == 1


def test_a_seal_that_was_torn_by_a_kill_is_made_again(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.append_rows(trades(0, 200))
    seals = (tmp_path / "trades.meta").stat().st_size - CAPACITY // BLOCK_ROWS * 16
    patch(tmp_path / "trades.meta", seals, b"\x07")
    reader = RingReader(tmp_path, "trades")
    reader.seek("oldest")
    assert len(reader.read_sealed()) == 0
    assert reader.damaged == 200
    with writer(tmp_path) as out:
        out.append_rows(trades(200, 10))
    reader = RingReader(tmp_path, "trades")
    reader.seek("oldest")
    assert numbers(reader.read_sealed()) == list(range(210))


# ---------------------------------------------------------------- two processes


HOLD = """
import sys
from pathlib import Path
from mdcollector.records import TRADES
from mdcollector.ring import RingWriter
with RingWriter(Path(sys.argv[1]), TRADES, exchange="DERIBIT", connector="c", capacity=512, semaphore=False):
    print("open", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with second_process(HOLD, tmp_path) as holder:
        assert line_of(holder) == "open"
        reader = RingReader(tmp_path, "trades")
        assert reader.writer_pid == holder.pid
        assert reader.writer_alive
        with pytest.raises(RingError, match=r"trades\.data: another process writes this ring; a ring has one writer"):
            writer(tmp_path)
        holder.kill()
        holder.wait()
        assert not reader.writer_alive
        assert reader.is_open, "it had no time to say so"
        with writer(tmp_path) as out:
            assert reader.epochs[-1][0] == out.epoch
            assert len(reader.epochs) == 2


def test_readers_that_ask_whether_the_writer_lives_do_not_keep_one_out(tmp_path: Path) -> None:
    writer(tmp_path).close()
    reader, stop, answers = RingReader(tmp_path, "trades"), threading.Event(), set()

    def ask() -> None:
        while not stop.wait(0.0005):
            answers.add(reader.writer_alive)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        for _ in range(50):
            writer(tmp_path).close()
        while not asking.is_alive() or not answers:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        stop.set()
        asking.join()
    assert len(reader.epochs) == 51


READ_AS_NOBODY = """
import os, sys, pwd
from mdcollector.errors import RingError
from mdcollector.ring import RingReader, RingWriter
from mdcollector.records import TRADES
from pathlib import Path
if os.getuid() == 0:
    nobody = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
directory = Path(sys.argv[1])
for name in ("trades.data", "trades.meta"):
    try:
        open(directory / name, "r+b")
    except PermissionError:
        continue
    sys.exit("this process can write, so the test shows nothing")
with RingReader(directory, "trades") as ring:
    ring.seek("oldest")
    print(len(ring.read_sealed()), ring.tickers, ring.writer_alive, ring.replaced, flush=True)
    try:
        RingWriter(directory, TRADES, exchange="DERIBIT", connector="c", capacity=512)
    except RingError as error:
        print(error, flush=True)
"""


def test_a_reader_needs_read_permission_only() -> None:
    # Not below pytest's own directory: another run of pytest closes that to other users at any time.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if any(not parent.stat().st_mode & 0o001 for parent in directory.parents):
            pytest.skip(f"{directory.parent} is closed to other users")
        with writer(directory) as out:
            out.code("BTC")
            out.append_rows(trades(0, 200))
            out.seal()
            out.append(trade(200))
            (directory / "trades.data").chmod(0o444)
            (directory / "trades.meta").chmod(0o444)
            directory.chmod(0o555)
            before = (directory / "trades.data").read_bytes(), (directory / "trades.meta").read_bytes()
            with second_process(READ_AS_NOBODY, directory) as reader:
                assert line_of(reader) == "200 ['BTC'] True False"
                assert "the ring trades cannot be opened to write: Permission denied" in line_of(reader)
                assert reader.wait(START_TIMEOUT_S) == 0
            directory.chmod(0o755)
            assert before == ((directory / "trades.data").read_bytes(), (directory / "trades.meta").read_bytes())


def test_a_replaced_or_removed_ring_is_noticed(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.append(trade(0))
    reader = RingReader(tmp_path, "trades")
    with writer(tmp_path):
        assert not reader.replaced, "the same ring goes on"
    for end in ("data", "meta"):
        (tmp_path / f"trades.{end}").rename(tmp_path / f"old.{end}")
    assert reader.replaced
    writer(tmp_path).close()
    assert reader.replaced
    assert numbers(reader.read()) == []
    reader.seek("oldest")
    assert numbers(reader.read()) == [0], "what it opened it can still read"


ECHO = """
import sys
from pathlib import Path
from mdcollector.records import TRADES
from mdcollector.ring import RingWriter
row = (0,) * 12 + (b"",)
with RingWriter(Path(sys.argv[1]), TRADES, exchange="DERIBIT", connector="c", capacity=512) as ring:
    print("open", flush=True)
    while command := sys.stdin.readline().strip():
        for _ in range(int(command)):
            ring.append(row)
        ring.wake()
"""


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes as many rows as it is told to, then wakes sleepers; its semaphores are removed."""
    with second_process(ECHO, tmp_path) as process:
        assert line_of(process) == "open"
        yield process
    for name in ring_module._semaphore_names(tmp_path / "trades.data"):
        posix_ipc.unlink_semaphore(name)  # the process was killed


@pytest.mark.parametrize("how", ["spin", "poll", "semaphore"])
def test_each_way_to_wait_sees_what_another_process_writes(
    tmp_path: Path, echo: subprocess.Popen[str], how: ring_module.Wait
) -> None:
    with RingReader(tmp_path, "trades") as reader:
        assert not reader.wait(0.01, how), "nothing was written"
        expected = 0
        for rows in [1, 3, 200] * 30:
            tell(echo, str(rows))
            expected += rows
            deadline = time.monotonic() + START_TIMEOUT_S
            while reader.position < expected:
                assert time.monotonic() < deadline, "a wake-up was lost, and the time-out of the wait too"
                reader.wait(1.0, how)
                reader.read()
        assert reader.lapped == 0
        tell(echo, "1")
        assert reader.wait(START_TIMEOUT_S, how)
        assert reader.wait(0.0, how), "rows that are there need no wait"


def test_two_sleepers_are_both_woken(tmp_path: Path, echo: subprocess.Popen[str]) -> None:
    sleep = """
import sys
from mdcollector.ring import RingReader
with RingReader(sys.argv[1], "trades") as ring:
    print("here", flush=True)
    print(ring.wait(60, "semaphore"), flush=True)
"""
    with second_process(sleep, tmp_path) as one, second_process(sleep, tmp_path) as two:
        assert line_of(one) == line_of(two) == "here"
        sleepers = posix_ipc.Semaphore(ring_module._semaphore_names(tmp_path / "trades.data")[0])
        deadline = time.monotonic() + START_TIMEOUT_S
        while sleepers.value < 2:
            assert time.monotonic() < deadline, "the readers do not say that they sleep"
            time.sleep(0.001)
        sleepers.close()
        tell(echo, "1")
        assert [line_of(one), line_of(two)] == ["True", "True"]


def test_a_sleeper_whose_time_is_up_leaves_no_announcement(tmp_path: Path, echo: subprocess.Popen[str]) -> None:
    sleepers, wake = (posix_ipc.Semaphore(n) for n in ring_module._semaphore_names(tmp_path / "trades.data"))
    with RingReader(tmp_path, "trades") as reader:
        for _ in range(20):
            assert not reader.wait(0.001, "semaphore")
        assert (sleepers.value, wake.value) == (0, 0), "each would cost the writer a needless wake-up"
        tell(echo, "1")
        assert reader.wait(START_TIMEOUT_S, "semaphore")
        assert (sleepers.value, wake.value) == (0, 0)
    sleepers.close()
    wake.close()


def test_a_ring_without_semaphores_says_so(tmp_path: Path) -> None:
    with (
        writer(tmp_path),
        RingReader(tmp_path, "trades") as reader,
        pytest.raises(RingError, match="its writer offers no semaphore"),
    ):
        reader.wait(0.01, "semaphore")


def test_a_reader_in_another_process_that_never_seeks_sees_every_row_once(tmp_path: Path) -> None:
    source = """
import sys
import numpy as np
from pathlib import Path
from mdcollector.records import TRADES
from mdcollector.ring import RingWriter
with RingWriter(Path(sys.argv[1]), TRADES, exchange="DERIBIT", connector="c", capacity=1 << 17, semaphore=False) as ring:
    print("open", flush=True)
    sys.stdin.readline()
    for n in range(100_000):
        ring.append((n, n + 1, n // 3, n % 1000, n % 777, 0, 3, n % 128, 1 if n % 2 else -1, n * 0.5, n * 0.25, n, b"id%d" % n))
"""
    with second_process(source, tmp_path) as process:
        assert line_of(process) == "open"
        reader = RingReader(tmp_path, "trades")
        tell(process, "go")
        seen: list[Any] = []
        deadline = time.monotonic() + START_TIMEOUT_S
        while reader.position < 100_000:
            assert time.monotonic() < deadline
            reader.wait(0.1, "spin")
            seen.append(reader.read())
        rows = np.concatenate(seen)
    assert rows["seq_id"].tolist() == list(range(100_000))
    assert reader.lapped == 0
    n = np.arange(100_000)
    for column, values in (
        ("timestamp", n),
        ("packet_id", n // 3),
        ("price", n * 0.5),
        ("qty", n * 0.25),
        ("trade_seq", n),
    ):
        assert (rows[column] == values).all(), column
