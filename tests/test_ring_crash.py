"""A writer that is killed at any instruction leaves a ring that the next one continues: nothing published is lost."""

import random
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdcollector.records import TRADES
from mdcollector.ring import RingReader, RingWriter

KILLS = 60
CAPACITY = 1 << 14
START_TIMEOUT_S = 60.0

# Every row is a function of its number; all ways to write are used, sealing and new instruments in between.
WRITER = """
import sys
from pathlib import Path
import numpy as np
from mdcollector.records import TRADES
from mdcollector.ring import RingWriter

def trade(n):
    return (n * 7, n * 11, n // 3, n % 1000, n % 777, n % 5, 3, n % 128, 1 if n % 2 else -1, n * 0.5, n * 0.25, n, b"id%d" % n)

with RingWriter(Path(sys.argv[1]), TRADES, exchange="DERIBIT", connector="c", capacity=int(sys.argv[2]),
                semaphore=False) as ring:
    for code in range(5):
        ring.code(f"T{code}")
    print("writing", flush=True)
    while True:
        for _ in range(50):
            ring.append(trade(ring.next))
        ring.append_many([trade(ring.next + i) for i in range(20)])
        rows = np.zeros(100, TRADES.dtype)
        for i in range(100):
            rows[i] = (*trade(ring.next + i), 0)
        ring.append_rows(rows)
        if ring.next % 3 == 0:
            ring.seal()
        ring.heartbeat()
"""


def check(rows: Any) -> None:
    """Fail unless each row is what was written under its number, in every column."""
    n = rows["seq_id"]
    for column, values in (
        ("timestamp", n * 7), ("rcv_timestamp", n * 11), ("packet_id", n // 3), ("parse_ns", n % 1000),
        ("publish_ns", n % 777), ("ticker", n % 5), ("exchange", 3), ("flags", n % 128),
        ("side", np.where(n % 2, 1, -1)), ("price", n * 0.5), ("qty", n * 0.25), ("trade_seq", n),
        ("trade_id", np.char.add(b"id", n.astype("S20"))),
    ):  # fmt: skip
        assert (rows[column] == values).all(), column


class Witness:
    """A reader that stays open over all lives and knows exactly what it saw."""

    def __init__(self, directory: Path) -> None:
        self.reader = RingReader(directory, "trades")
        self.seen = 0
        self.next = 0

    def read(self) -> None:
        rows = self.reader.read()
        if not len(rows):
            return
        check(rows)
        sequence = rows["seq_id"]
        assert (np.diff(sequence) == 1).all()
        assert sequence[0] >= self.next, "a row came twice"
        self.seen += len(rows)
        self.next = int(sequence[-1]) + 1
        assert self.seen + self.reader.lapped == self.next, "each row is either seen or counted as lapped"


@pytest.mark.crash
def test_a_writer_killed_at_random_moments_loses_nothing_it_published(tmp_path: Path) -> None:
    random_ = random.Random(4)  # of the moments of the kills; where the writer is then differs from run to run
    RingWriter(tmp_path, TRADES, exchange="DERIBIT", connector="c", capacity=CAPACITY, semaphore=False, epoch=1).close()
    witness = Witness(tmp_path)
    reader = witness.reader
    published_before, unpublished_claims = 0, 0
    for life in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(CAPACITY)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], START_TIMEOUT_S)[0], "the writer did not start"
            assert process.stdout.readline() == "writing\n"
            assert len(reader.epochs) == life + 2
            assert reader.epochs[-1][1] == published_before, "the next life goes on where the last one ended"
            end = time.monotonic() + random_.uniform(0.0, 0.03)
            while time.monotonic() < end:
                witness.read()
            deadline = time.monotonic() + START_TIMEOUT_S
            while reader.published == published_before:
                assert time.monotonic() < deadline, "the writer writes nothing"
        finally:
            process.kill()
            process.communicate()
        assert not reader.writer_alive
        assert reader.is_open, "a writer that was killed does not say goodbye"
        published_before = reader.published
        unpublished_claims += reader.oldest > max(0, published_before - CAPACITY)

        fresh = RingReader(tmp_path, "trades")
        fresh.seek("oldest")
        rows = fresh.read(2 * CAPACITY)
        check(rows)
        assert rows["seq_id"].tolist() == list(range(fresh.oldest, published_before))
        assert fresh.lapped == 0
        assert published_before - fresh.oldest <= CAPACITY
    witness.read()
    assert witness.next == published_before
    assert witness.seen + reader.lapped == published_before
    assert witness.seen > 0
    assert unpublished_claims, "no kill hit a writer in the middle of its work: the test shows too little"

    with RingWriter(tmp_path, TRADES, exchange="DERIBIT", connector="c", capacity=CAPACITY, semaphore=False) as last:
        assert last.next == published_before
        assert last.tickers == [f"T{code}" for code in range(5)]
        fresh = RingReader(tmp_path, "trades")
        fresh.seek("oldest")
        rows = fresh.read_sealed(2 * CAPACITY)
        check(rows)
        assert rows["seq_id"].tolist() == list(range(published_before - len(rows), published_before))
        assert (fresh.damaged, fresh.lapped) == (0, 0), "what a killed writer left unsealed is sealed by the next one"
        epochs = [epoch for epoch, _, _ in fresh.epochs]
        assert epochs == sorted(set(epochs))
        assert len(epochs) == KILLS + 2


@pytest.mark.crash
def test_a_writer_killed_while_it_makes_the_ring_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    random_ = random.Random(5)
    source = """
import sys
from pathlib import Path
from mdcollector.records import TRADES
from mdcollector.ring import RingWriter
print("ready", flush=True)
sys.stdin.readline()
RingWriter(Path(sys.argv[1]), TRADES, exchange="DERIBIT", connector="c", capacity=1 << 16, semaphore=False)
"""
    for number in range(12):
        directory = tmp_path / str(number)
        process = subprocess.Popen(
            [sys.executable, "-c", source, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("go\n")
            process.stdin.flush()
            end = time.monotonic() + random_.uniform(0.0, 0.004)
            while time.monotonic() < end:
                pass
        finally:
            process.kill()
            process.communicate()
        with RingWriter(directory, TRADES, exchange="DERIBIT", connector="c", capacity=1 << 16, semaphore=False) as out:
            assert out.next == 0
            out.append((0,) * 12 + (b"",))
        assert RingReader(directory, "trades").published == 1
