"""The stats page: the newest whole snapshot, also while it is written, and nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mdcollector.errors import RingError
from mdcollector.stats import HISTOGRAM_BOUNDS_NS, Histogram, StatsWriter, read_stats

SLOT, FIRST = 1 << 20, 4096


def test_the_newest_snapshot_is_read_with_who_and_when(tmp_path: Path) -> None:
    page = StatsWriter(tmp_path / "deep" / "er")
    for number in range(5):
        page.publish({"counters": {"frames": number}, "name": "ソラ"})
        snapshot = read_stats(page.path)
        assert snapshot["counters"] == {"frames": number}
        assert snapshot["name"] == "ソラ"
        assert snapshot["pid"] == os.getpid()
        assert abs(time.time_ns() - snapshot["time_ns"]) < 60e9


def test_a_new_process_goes_on_with_the_page_of_the_last_one(tmp_path: Path) -> None:
    StatsWriter(tmp_path).publish({"life": 1})
    second = StatsWriter(tmp_path)
    assert read_stats(second.path)["life"] == 1, "the last words of the life before stay until there are newer ones"
    second.publish({"life": 2})
    assert read_stats(second.path)["life"] == 2


def test_two_pages_of_one_directory_do_not_meet(tmp_path: Path) -> None:
    one, two = StatsWriter(tmp_path, "stats-a"), StatsWriter(tmp_path, "stats-b")
    one.publish({"who": "a"})
    two.publish({"who": "b"})
    assert [read_stats(page.path)["who"] for page in (one, two)] == ["a", "b"]


def test_what_is_no_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RingError, match="No such file"):
        read_stats(tmp_path / "stats")
    (tmp_path / "short").write_bytes(b"MD")
    (tmp_path / "other").write_bytes(b"GIF89a" * 1000)
    for name in ("short", "other"):
        with pytest.raises(RingError, match=f"{name}: not a stats page"):
            read_stats(tmp_path / name)
    empty = StatsWriter(tmp_path)
    with pytest.raises(RingError, match="no whole snapshot"):
        read_stats(empty.path)


def test_a_torn_or_damaged_snapshot_is_never_passed_on(tmp_path: Path) -> None:
    page = StatsWriter(tmp_path)
    page.publish({"n": 1})
    page.publish({"n": 2})
    raw = bytearray(page.path.read_bytes())
    newest = FIRST  # the second snapshot lies in the first slot
    assert b'"n":2' in raw[newest : newest + 200]
    for at in (newest, newest + 8, newest + 12, newest + 20):  # its number, length, checksum, text
        broken = bytearray(raw)
        broken[at] ^= 1
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(RingError, match="no whole snapshot"):
            read_stats(tmp_path / "broken")


def test_a_snapshot_that_is_too_large_loses_its_streams_then_its_long_parts(tmp_path: Path) -> None:
    page = StatsWriter(tmp_path)
    long = {f"stream{i}": "x" * 100 for i in range(SLOT // 100)}
    page.publish({"counters": {"rows": 3}, "streams": long})
    snapshot = read_stats(page.path)
    assert snapshot["counters"] == {"rows": 3}
    assert (snapshot["streams"], snapshot["streams_left_out"]) == ({}, len(long))
    page.publish({"rows": 4, "streams": long, "samples": long})
    snapshot = read_stats(page.path)
    assert snapshot["rows"] == 4
    assert snapshot["left_out"] == 1
    assert "samples" not in snapshot
    page.publish({"n": 5})
    assert read_stats(page.path)["n"] == 5, "the slot beside it is whole"


WRITER = """
import sys
from pathlib import Path
from mdcollector.stats import StatsWriter
page = StatsWriter(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    page.publish({"number": number, "again": [number] * (number % 400)})
"""


def test_another_process_reads_whole_snapshots_that_never_go_back(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "stats").exists() or not any((tmp_path / "stats").read_bytes()[FIRST : FIRST + 64]):
            assert time.monotonic() < deadline, "the writer did not start"
        seen, reads = 0, 0
        while reads < 300 or seen < 1000:
            assert time.monotonic() < deadline, (reads, seen)
            snapshot = read_stats(tmp_path / "stats")
            assert snapshot["pid"] == writer.pid
            assert snapshot["again"] == [snapshot["number"]] * (snapshot["number"] % 400)
            assert snapshot["number"] >= seen
            seen, reads = snapshot["number"], reads + 1
    finally:
        writer.kill()
        writer.wait()
    last = read_stats(tmp_path / "stats")
    assert last["number"] >= seen, "a writer that was killed leaves its last whole snapshot"


def test_a_histogram_counts_each_value_once_and_bounds_its_percentiles() -> None:
    histogram = Histogram()
    assert histogram.snapshot()["p99"] == 0
    values = np.array([0, 250, 251, 1000, 10_000, 10**12], dtype=np.int64)
    histogram.add(values)
    histogram.add(values[:0])
    histogram.add(np.array([2**32 - 1] * 2, dtype=np.uint32))
    snapshot = histogram.snapshot()
    assert snapshot["count"] == sum(snapshot["counts"]) == 8
    assert snapshot["sum_ns"] == int(values.sum()) + 2 * (2**32 - 1)
    assert snapshot["counts"][0] == 2
    assert snapshot["counts"][-1] == 3, "beyond the last bound"
    assert list(HISTOGRAM_BOUNDS_NS) == sorted(set(HISTOGRAM_BOUNDS_NS))


def test_a_percentile_is_the_upper_bound_of_its_bucket() -> None:
    histogram = Histogram()
    values = np.arange(1, 1001) * 1000
    histogram.add(values)
    snapshot = histogram.snapshot()
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        exact = int(np.quantile(values, share, method="inverted_cdf"))
        assert snapshot[name] == min(bound for bound in HISTOGRAM_BOUNDS_NS if bound >= exact)
