"""The writer as a process: killed, stopped and told to end at any moment, nothing is lost and nothing stored twice."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mdcollector.errors import RingError
from mdcollector.ring import RingReader
from mdcollector.stats import read_stats
from mdcollector.verify import verify

pytestmark = pytest.mark.crash

# Both processes make row n from n alone, so the truth needs no channel between them.
FEEDER = """
import sys, time
from pathlib import Path
from mdcollector.records import FEEDS
from mdcollector.ring import RingWriter
rings, capacity, rows_s, rows_max = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
writers = {
    feed: RingWriter(rings / "feeder", FEEDS[feed], exchange="DERIBIT", connector="feeder", capacity=capacity, semaphore=False)
    for feed in ("trades", "orderbook_l2")
}
for writer in writers.values():
    for ticker in ("BTC-PERPETUAL", "ETH-PERPETUAL"):
        writer.code(ticker)
start, first = time.monotonic(), {feed: writer.next for feed, writer in writers.items()}
done = 0
while done < rows_max:
    due = min(rows_max, int((time.monotonic() - start) * rows_s))
    now = time.time_ns() // 1000
    for feed, writer in writers.items():
        for n in range(first[feed] + done, first[feed] + due):
            own = (1, n / 4, float(n % 7), n // 2, b"") if feed == "trades" else (1, 2, n / 4, 1.0, n)
            writer.append((now, now, n, 1, 2, n % 2, 3, 1, *own))
        writer.seal()
    done = due
    time.sleep(0.0005)
for writer in writers.values():
    writer.close()
"""

WRITER = """
import signal, sys
from pathlib import Path
from mdcollector.writer import Writer
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
report = Writer(Path(sys.argv[1]), Path(sys.argv[2]), name="w", roll_rows=int(sys.argv[3]), roll_s=float(sys.argv[4]), poll_s=0.001).run(lambda: bool(stop))
for s in report.streams:
    print(s.feed, s.rows_read, s.rows_written, s.rows_left, s.lapped, s.damaged)
sys.exit(0 if report.complete else 1)
"""


class Processes:
    """Children of one test, killed at its end whatever happened."""

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[str]] = []

    def start(self, script: str, *args: object) -> subprocess.Popen[str]:
        child = subprocess.Popen([sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, text=True)
        self.all.append(child)
        return child


@pytest.fixture
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    for child in started.all:
        if child.poll() is None:
            child.kill()
        child.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def stored(out: Path, feed: str, connector: str = "feeder") -> list[tuple[int, float, str]]:
    """(seq_id, price, ticker) of every stored row, in the order of the file names."""
    paths = [p for p in (out / feed).rglob("*.parquet") if p.name.startswith(connector + "-")]
    rows = []
    for path in sorted(paths, key=lambda p: [int(x) for x in p.stem.rsplit("-", 3)[1:]]):
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        rows += zip(*(table[c].to_pylist() for c in ("seq_id", "price", "ticker")), strict=True)
    return rows


def truth(first: int, stop: int) -> list[tuple[int, float, str]]:
    return [(n, n / 4, ("BTC-PERPETUAL", "ETH-PERPETUAL")[n % 2]) for n in range(first, stop)]


def published(rings: Path, feed: str) -> int:
    try:
        return RingReader(rings / "feeder", feed).published
    except RingError:  # the feeder has not made it yet
        return 0


def tells(page: Path, pid: int) -> bool:
    """A process has published its first numbers; one that was killed before leaves a page without any."""
    try:
        return bool(read_stats(page)["pid"] == pid)
    except RingError:
        return False


def test_a_writer_killed_at_random_moments_stores_every_row_once(tmp_path: Path, processes: Processes) -> None:
    rings, out, rows = tmp_path / "rings", tmp_path / "out", 60_000
    seed = int.from_bytes(os.urandom(4))
    chance = random.Random(seed)
    feeder = processes.start(FEEDER, rings, 1 << 17, 12_000, rows)
    kills = 0
    while feeder.poll() is None or kills < 25:
        writer = processes.start(WRITER, rings, out, chance.choice([256, 1000]), 0.02)
        # Importing takes most of a second; kill at a random moment of what comes behind it, and sometimes before.
        page = rings / "_writers" / "w" / "stats"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and chance.random() > 0.002:
            if tells(page, writer.pid):
                break
            time.sleep(0.002)
        time.sleep(chance.random() * 0.15)
        writer.kill()
        writer.wait()
        kills += 1
    last = processes.start(WRITER, rings, out, 1000, 0.02)
    wait_for(lambda: feeder.poll() is not None and tells(rings / "_writers/w/stats", last.pid))
    last.terminate()
    assert last.wait(60) == 0, f"seed {seed}"
    for feed in ("trades", "orderbook_l2"):
        assert stored(out, feed) == truth(0, rows), f"seed {seed}"
    result = verify(out)
    assert (result.findings, result.missing, result.explained) == ([], 0, 0), f"seed {seed}"


def test_killed_collectors_and_a_killed_writer_together_lose_nothing_published(
    tmp_path: Path, processes: Processes
) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    chance = random.Random(11)
    writer = processes.start(WRITER, rings, out, 500, 0.02)
    for life in range(8):
        before = {feed: published(rings, feed) for feed in ("trades", "orderbook_l2")}
        feeder = processes.start(FEEDER, rings, 1 << 15, 20_000, 1 << 30)
        wait_for(lambda before=before: all(published(rings, f) > before[f] + 50 for f in before))
        time.sleep(chance.random() * 0.05)
        feeder.kill()
        feeder.wait()
        if life % 3 == 1:
            writer.kill()
            writer.wait()
            writer = processes.start(WRITER, rings, out, 500, 0.02)
    rows = {feed: published(rings, feed) for feed in ("trades", "orderbook_l2")}
    page = rings / "_writers/w/stats"
    wait_for(lambda: tells(page, writer.pid))
    writer.terminate()
    text, _ = writer.communicate(timeout=60)
    assert writer.returncode == 0, text
    for feed, count in rows.items():
        assert stored(out, feed) == truth(0, count)
    assert verify(out).findings == []
    epochs = {int(p.stem.rsplit("-", 3)[1]) for p in (out / "trades").rglob("*.parquet")}
    assert len(epochs) == 8


def test_a_writer_that_was_stopped_until_it_was_lapped_reports_the_loss_exactly(
    tmp_path: Path, processes: Processes
) -> None:
    rings, out, capacity = tmp_path / "rings", tmp_path / "out", 2048
    assert processes.start(FEEDER, rings, capacity, 6_000, 100).wait(60) == 0  # before it has begun it can lose nothing
    writer = processes.start(WRITER, rings, out, 1 << 20, 0.02)
    wait_for(lambda: all(stored(out, feed) for feed in ("trades", "orderbook_l2")))
    feeder = processes.start(FEEDER, rings, capacity, 6_000, 1 << 30)
    wait_for(lambda: len(list((out / "trades").rglob("*.parquet"))) > 3)
    for _ in range(3):
        writer.send_signal(signal.SIGSTOP)
        target = published(rings, "trades") + 2 * capacity
        wait_for(lambda target=target: published(rings, "trades") > target)
        files = len(list((out / "trades").rglob("*.parquet")))
        writer.send_signal(signal.SIGCONT)
        wait_for(lambda files=files: len(list((out / "trades").rglob("*.parquet"))) > files)
    feeder.kill()
    feeder.wait()
    writer.terminate()
    text, _ = writer.communicate(timeout=60)
    assert writer.returncode == 1, text  # finished, and it says that rows were lost
    reports = {line.split()[0]: [int(x) for x in line.split()[1:]] for line in text.splitlines()}
    for feed in ("trades", "orderbook_l2"):
        rows = stored(out, feed)
        there = {seq for seq, *_ in rows}
        assert [*rows] == [truth(seq, seq + 1)[0] for seq in sorted(there)]
        lost = set(range(published(rings, feed))) - there
        noted: set[int] = set()
        for path in (out / "gaps").rglob(f"feeder~{feed}-*.parquet"):
            for row in pq.ParquetFile(path).read().to_pylist():
                assert row["cause"] == "lapped"
                noted |= set(range(row["first_id"], row["last_id"] + 1))
        assert lost == noted
        assert len(lost) > 2 * capacity
        read, written, left, lapped, damaged = reports[feed]
        assert (read, written, left, lapped, damaged) == (len(rows), len(rows), 0, len(lost), 0)
    result = verify(out)
    assert (result.findings, result.missing) == ([], 0)
    assert result.explained > 0
