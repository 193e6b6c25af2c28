"""Torn reads, on purpose: a real writer laps real readers. The good one never passes a torn row on; a broken one does.

The broken reader stays here to prove that this test can fail: the same harness catches it.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdcollector.ring import RingReader, Rows, _copy_rows

pytestmark = pytest.mark.stress

SECONDS = 3.0
ROUNDS_MAX = 10  # of the hunt for a torn row in what the broken reader delivers
START_TIMEOUT_S = 60.0
COLUMNS = (
    "timestamp",
    "rcv_timestamp",
    "packet_id",
    "price",
    "qty",
    "trade_seq",
    "seq_id",
)  # all hold the row's number

# argv: directory, capacity, rows per block, how the block is written, pause in seconds after each block.
WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from mdcollector.records import TRADES
from mdcollector.ring import RingWriter

directory, capacity, block, how, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5])
with RingWriter(Path(directory), TRADES, exchange="DERIBIT", connector="c", capacity=capacity, semaphore=False) as ring:
    rows = np.zeros(block, TRADES.dtype)
    print("ready", flush=True)
    while True:
        if how == "append_many":  # spends most of its time between announcing and publishing
            first = ring.next
            ring.append_many(
                [(n, n, n, 0, 0, 0, 3, 0, 1, float(n), float(n), n, b"") for n in range(first, first + block)]
            )
            continue
        numbers = np.arange(ring.next, ring.next + block)
        for column in ("timestamp", "rcv_timestamp", "packet_id", "price", "qty", "trade_seq"):
            rows[column] = numbers
        ring.append_rows(rows)
        ring.seal()
        if pause:
            time.sleep(pause)
"""


class BelievesPublished(RingReader):
    """Broken on purpose: it looks at `published` before it copies, and never asks whether it was lapped meanwhile."""

    def read(self, rows_max: int = 65536) -> Rows:
        stop = self.published
        start = max(self.position, stop - self.capacity)
        self.lapped += start - self.position
        rows = _copy_rows(self._files.data, self.feed, self.capacity, start, stop)
        self.position = stop
        return rows


class BelievesPublishedTwice(BelievesPublished):
    """Broken on purpose: it drops what `published` says was overwritten, and does not know of rows being written."""

    def read(self, rows_max: int = 65536) -> Rows:
        rows = super().read(rows_max)
        gone = min(len(rows), max(0, self.published - self.capacity - (self.position - len(rows))))
        self.lapped += gone
        return rows[gone:]


def torn(rows: Any) -> int:
    """How many rows are not, in every column, the row of their place in the batch."""
    if not len(rows):
        return 0
    wrong = np.zeros(len(rows), bool)
    expected = np.arange(len(rows)) + int(rows["seq_id"][-1]) - len(rows) + 1
    for column in COLUMNS:
        wrong |= rows[column] != expected
    return int(wrong.sum())


@contextmanager
def lapping_writer(
    directory: Path, capacity: int, block: int, how: str = "append_rows", pause: float = 0.0
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, *map(str, (directory, capacity, block, how, pause))],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("capacity", "block", "written", "how"),
    [
        (512, 256, "append_rows", "read"),
        (512, 1, "append_many", "read"),
        (512, 256, "append_many", "read"),
        (1 << 14, 1 << 12, "append_rows", "read"),
        (1 << 12, 512, "append_rows", "read_sealed"),
    ],
    ids=["small ring, large blocks", "row by row", "slow blocks", "large ring", "sealed"],
)
def test_a_lapped_reader_passes_on_no_torn_row_and_counts_every_lost_one(
    tmp_path: Path, capacity: int, block: int, written: str, how: str
) -> None:
    with lapping_writer(tmp_path, capacity, block, written) as process:
        reader = RingReader(tmp_path, "trades")
        reader.seek(0)
        read = getattr(reader, how)
        delivered, rounds, expected = 0, 0, 0
        end, deadline = time.monotonic() + SECONDS, time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end or not (delivered and reader.lapped):
            assert time.monotonic() < deadline, f"{delivered} delivered, {reader.lapped} lapped: nothing was shown"
            rows = read()
            assert torn(rows) == 0
            if len(rows):
                assert rows["seq_id"][0] >= expected, "a row came twice"
                expected = int(rows["seq_id"][-1]) + 1
            delivered += len(rows)
            rounds += 1
            assert delivered + reader.lapped + reader.damaged == reader.position, "a row is neither read nor lapped"
        process.kill()
        process.wait()
    rows = reader.read()
    assert torn(rows) == 0
    assert delivered + len(rows) + reader.lapped == reader.published == reader.position
    assert reader.damaged == 0, "being lapped is not damage"
    assert reader.lapped > 0
    assert rounds > 10


@pytest.mark.parametrize(
    ("broken", "written"), [(BelievesPublished, "append_rows"), (BelievesPublishedTwice, "append_many")]
)
def test_a_broken_reader_is_caught(tmp_path: Path, broken: type[BelievesPublished], written: str) -> None:
    for round_ in range(ROUNDS_MAX):
        with lapping_writer(tmp_path / str(round_), 512, 256, written):
            reader = broken(tmp_path / str(round_), "trades")
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                if torn(reader.read()):
                    return
    pytest.fail(f"no torn row in {ROUNDS_MAX * SECONDS:.0f} s: this harness could not find a broken reader")


def test_a_reader_that_keeps_up_is_not_lapped(tmp_path: Path) -> None:
    with lapping_writer(tmp_path, 1 << 16, 64, pause=0.001) as process:
        reader = RingReader(tmp_path, "trades")
        reader.seek("oldest")
        first = reader.position
        delivered, end = 0, time.monotonic() + SECONDS
        while time.monotonic() < end:
            reader.wait(0.1, "poll")
            rows = reader.read()
            assert torn(rows) == 0
            delivered += len(rows)
        process.kill()
        process.wait()
    delivered += len(reader.read())
    assert first + delivered + reader.lapped == reader.published
    assert delivered > 0
