"""Compact: fewer files with the very same rows, whatever happens on the way."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdcollector import compact as compact_module
from mdcollector.compact import compact
from mdcollector.errors import StorageError
from mdcollector.records import FEEDS
from mdcollector.ring import RingWriter
from mdcollector.verify import verify
from mdcollector.writer import Writer

START_US = 1_772_366_400_000_000  # 2026-03-01 12:00 UTC
HALF_DAY_US = 43_200_000_000


def bbo(n: int, rcv_us: int = 0) -> tuple[object, ...]:
    rcv = rcv_us or START_US + n
    bid = math.nan if n % 10 == 0 else 100 + n / 3
    return (rcv, rcv, n, 1, 2, n % 2, 3, 1, bid, 1.0, 101 + n / 3, n / 7, -1 if n % 4 == 0 else n)


def fill(
    rings: Path, first: int, stop: int, *, connector: str = "conn", epoch: int = 1, feed: str = "bbo"
) -> RingWriter:
    with RingWriter(
        rings / connector,
        FEEDS[feed],
        exchange="DERIBIT",
        connector=connector,
        capacity=1 << 15,
        epoch=epoch,
        semaphore=False,
    ) as ring:
        for ticker in ("BTC-PERPETUAL", "ETH-PERPETUAL"):
            ring.code(ticker)
        for n in range(first, stop):
            ring.append(bbo(n))
    return ring


def make_tree(base: Path, rows: int = 3000, roll_rows: int = 256) -> Path:
    fill(base / "rings", 0, rows)
    return write(base, roll_rows)


def write(base: Path, roll_rows: int = 256) -> Path:
    assert Writer(base / "rings", base / "out", name="w", roll_rows=roll_rows).run(lambda: True).complete
    return base / "out"


def files(out: Path) -> list[Path]:
    return sorted((out / "bbo").rglob("*.parquet"), key=lambda p: [int(x) for x in p.stem.rsplit("-", 3)[1:]])


def rows_of(out: Path) -> list[str]:
    """Every row in words, so that NaN equals NaN."""
    return [repr(row) for path in files(out) for row in pq.ParquetFile(path).read().to_pylist()]


def test_small_files_become_one_with_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    out = make_tree(tmp_path)
    before, count = rows_of(out), len(files(out))
    assert count == 12
    report = compact(out, age_min_s=0)
    assert (report.merged, report.made, report.removed, report.rows, report.exit_code) == (12, 1, 0, 3000, 0)
    (path,) = files(out)
    assert path.name == "conn-1-0-2999.parquet"
    assert rows_of(out) == before
    assert [row["update_id"] for row in pq.ParquetFile(path).read().to_pylist()] == [
        None if n % 4 == 0 else n for n in range(3000)
    ]
    assert report.bytes_after == path.stat().st_size < report.bytes_before
    assert verify(out).findings == []
    assert list((out / ".parts").iterdir()) == []
    again = compact(out, age_min_s=0)
    assert (again.merged, again.made) == (0, 0)
    assert files(out) == [path]


def test_only_what_belongs_together_is_merged(tmp_path: Path) -> None:
    rings, midnight = tmp_path / "rings", START_US + HALF_DAY_US
    with RingWriter(
        rings / "a", FEEDS["bbo"], exchange="DERIBIT", connector="a", capacity=4096, epoch=1, semaphore=False
    ) as ring:
        ring.code("X")
        ring.code("Y")
        for n in range(1200):
            ring.append(bbo(n, midnight - 600 + n))
    fill(rings, 0, 600, connector="b", epoch=1)
    write(tmp_path)
    fill(rings, 600, 1200, connector="b", epoch=2)
    out = write(tmp_path)
    before = sorted(rows_of(out))
    compact(out, age_min_s=0)
    assert sorted(str(p.relative_to(out / "bbo" / "DERIBIT")) for p in files(out)) == [
        "date=2026-03-01/a-1-0-599.parquet",
        "date=2026-03-01/b-1-0-599.parquet",
        "date=2026-03-01/b-2-600-1199.parquet",
        "date=2026-03-02/a-1-600-1199.parquet",
    ]
    assert sorted(rows_of(out)) == before
    assert verify(out).findings == []


def test_files_are_not_merged_over_a_hole_and_not_beyond_the_bound(tmp_path: Path) -> None:
    out = make_tree(tmp_path, rows=256 * 12)
    files(out)[5].unlink()
    compact(out, age_min_s=0, rows_max=1024)
    assert [tuple(map(int, p.stem.rsplit("-", 2)[1:])) for p in files(out)] == [
        (0, 1023), (1024, 1279), (1536, 2559), (2560, 3071),
    ]  # fmt: skip
    compact(out, age_min_s=0, rows_max=1024)
    assert len(files(out)) == 4


def test_young_files_are_left_alone(tmp_path: Path) -> None:
    out = make_tree(tmp_path)
    for path in files(out)[:6]:
        os.utime(path, (time.time() - 1000, time.time() - 1000))
    compact(out, age_min_s=500)
    assert len(files(out)) == 7


def test_the_next_writer_goes_on_behind_merged_files(tmp_path: Path) -> None:
    out = make_tree(tmp_path)
    compact(out, age_min_s=0)
    fill(tmp_path / "rings", 3000, 3500, epoch=2)
    write(tmp_path)
    found = [tuple(map(int, p.stem.rsplit("-", 3)[1:])) for p in files(out)]
    assert found[:2] == [(1, 0, 2999), (2, 3000, found[1][2])]
    assert found[-1][2] == 3499
    assert [row.split("'seq_id': ")[1].split(",")[0] for row in rows_of(out)] == [str(n) for n in range(3500)]
    assert verify(out).findings == []


def test_leftovers_of_a_killed_run_go_with_the_next_one(tmp_path: Path) -> None:
    out = make_tree(tmp_path)
    kept = tmp_path / "kept"
    shutil.copytree(out / "bbo", kept)
    before = rows_of(out)
    compact(out, age_min_s=0)
    shutil.copytree(kept, out / "bbo", dirs_exist_ok=True)  # merged file and inputs together
    found = verify(out)
    assert found.exit_code == 1
    assert "mdcollector compact" in found.findings[0]
    fill(tmp_path / "rings", 3000, 3100, epoch=2)
    write(tmp_path)  # a writer that starts in this very moment is not led astray
    report = compact(out, age_min_s=0)
    assert (report.removed, report.made, report.findings) == (12, 0, [])
    assert rows_of(out)[:3000] == before
    assert len(rows_of(out)) == 3100
    assert verify(out).findings == []


def test_a_covered_file_with_other_rows_is_not_removed(tmp_path: Path) -> None:
    out = make_tree(tmp_path)
    other = tmp_path / "other"
    fill(other / "rings", 1, 3001)
    write(other)
    compact(out, age_min_s=0)
    stranger = files(other / "out")[2]
    shutil.copy(stranger, files(out)[0].with_name(stranger.name))
    report = compact(out, age_min_s=0)
    assert report.removed == 0
    assert "are not those in conn-1-0-2999.parquet" in report.findings[0]
    assert len(files(out)) == 2
    assert report.exit_code == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "renamed"])
def test_a_damaged_input_is_reported_and_left_alone(tmp_path: Path, damage: str) -> None:
    out = make_tree(tmp_path)
    victim = files(out)[4]
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        column = pq.read_metadata(victim).row_group(0).column(5)
        content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        victim.write_bytes(b"")
    else:  # another file's content under this name
        shutil.copy(files(out)[5], victim)
    damaged = victim.read_bytes()
    report = compact(out, age_min_s=0)
    assert report.exit_code == 1
    assert len(report.findings) == 1
    assert str(victim) in report.findings[0]
    assert victim.read_bytes() == damaged
    assert [tuple(map(int, p.stem.rsplit("-", 2)[1:])) for p in files(out)] == [(0, 1023), (1024, 1279), (1280, 2999)]
    assert any(str(victim) in finding for finding in verify(out).findings)


@pytest.mark.parametrize("column", ["bid_qty", "update_id", "flags"])
def test_a_merged_file_that_is_not_its_inputs_bit_by_bit_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    out = make_tree(tmp_path, rows=600, roll_rows=300)
    before = {path: path.read_bytes() for path in files(out)}
    tables_of = compact_module._row_groups

    def one_value_wrong(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables_of(tables):
            values = table[column].to_pylist()
            values[450] = (values[450] or 0) + 1
            at = table.schema.get_field_index(column)
            yield table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))

    monkeypatch.setattr(compact_module, "_row_groups", one_value_wrong)
    report = compact(out, age_min_s=0)
    assert (report.exit_code, report.made) == (1, 0)
    assert "are not those in conn-1-0-599.parquet; left alone" in report.findings[0]
    assert {path: path.read_bytes() for path in files(out)} == before
    assert list((out / ".parts").iterdir()) == []


def test_inputs_go_only_after_the_merged_file_is_durable_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = make_tree(tmp_path, rows=512), []
    real_fsync, real_rename, real_unlink = os.fsync, Path.rename, Path.unlink

    def fsync(fd: int) -> None:
        steps.append("sync " + Path(f"/proc/self/fd/{fd}").readlink().name)
        real_fsync(fd)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_rename(self, target)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        steps.append("unlink " + self.name.split("-", 2)[2])
        real_unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "unlink", unlink)
    compact(out, age_min_s=0)
    assert steps[:6] == [
        "sync bbo.conn-1-0-511.parquet.merging", "rename", "sync date=2026-03-01",
        "unlink 0-255.parquet", "unlink 256-511.parquet", "sync date=2026-03-01",
    ]  # fmt: skip


def test_two_do_not_compact_one_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from mdcollector.sinks.parquet import tree_lock

    monkeypatch.setattr("mdcollector.compact.LOCK_WAIT_S", 0.05)
    out = make_tree(tmp_path)
    with tree_lock(out, "compact", fcntl.LOCK_EX, 1.0), pytest.raises(StorageError, match="held by another process"):
        compact(out)
    with pytest.raises(StorageError, match="no such directory"):
        compact(tmp_path / "nowhere")


@pytest.mark.crash
def test_killed_at_random_moments_it_loses_no_row(tmp_path: Path) -> None:
    out = make_tree(tmp_path, rows=20_000)
    before = rows_of(out)
    script = (
        "import sys\nfrom pathlib import Path\nfrom mdcollector.compact import compact\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "compact(Path(sys.argv[1]), age_min_s=0, rows_max=int(sys.argv[2]))\nprint('done', flush=True)\n"
    )
    states = set()
    for round_ in range(18):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(out), str(1200 * 2 ** (round_ // 5))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("\n")
        child.stdin.flush()
        time.sleep(0.016 * round_)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        ranges = [tuple(map(int, p.stem.rsplit("-", 2)[1:])) for p in files(out)]
        states.add(tuple(ranges))
        reached = 0
        for first, last in sorted(ranges, key=lambda r: (r[0], -r[1])):
            assert first <= reached  # no row is missing
            reached = max(reached, last + 1)
        assert reached == 20_000
    assert len(states) > 3  # it was killed in different places
    compact(out, age_min_s=0)
    assert len(files(out)) == 1
    assert rows_of(out) == before
