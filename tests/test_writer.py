"""The writer: rows in the rings are rows in the files, whatever comes between."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from mdcollector.config import sink_kinds
from mdcollector.errors import ConfigError, StorageError
from mdcollector.records import FEEDS, TRADES, Action, Flag
from mdcollector.ring import RingReader, RingWriter
from mdcollector.sinks import open_sink
from mdcollector.sinks.parquet import ParquetSink
from mdcollector.stats import read_stats
from mdcollector.verify import verify
from mdcollector.writer import Writer

NOON_US = int(datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()) * 1_000_000
DAY_US = 86_400_000_000
TICKERS = ["BTCUSDT", "ETHUSDT", "币安人生USDT"]


def trade(n: int, rcv_us: int = 0) -> tuple[object, ...]:
    """Values of trade n in ring order, without seq_id; every column depends on n."""
    rcv = rcv_us or NOON_US + 1000 * n
    side, price, qty = (1, -1)[n % 2], 60_000 + n / 8, (n % 97) / 64
    return (
        rcv - 500 - n % 50,
        rcv,
        n // 3,
        n % 9000,
        50 + n % 9000,
        n % 3,
        1,
        int(Flag.LAST),
        side,
        price,
        qty,
        n // 3,
        b"",
    )


def level(n: int) -> tuple[object, ...]:
    rcv, last = NOON_US + 1000 * (n // 4), int(Flag.LAST) if n % 4 == 3 else 0
    qty = float(n % 3)
    action = Action.UPDATE if qty else Action.DELETE
    return (rcv - 200, rcv, n // 4, 5, 9, 0, 1, last, (1, -1)[n % 2], int(action), 100.0 + n % 11, qty, n // 4)


@contextlib.contextmanager
def ring(
    rings: Path, feed: str = "trades", connector: str = "conn-1", capacity: int = 1 << 14, epoch: int | None = None
) -> Iterator[RingWriter]:
    with RingWriter(
        rings / connector,
        FEEDS[feed],
        exchange="BINANCE_SPOT",
        connector=connector,
        capacity=capacity,
        epoch=epoch,
        semaphore=False,
    ) as writer:
        for ticker in TICKERS:
            writer.code(ticker)
        yield writer


def append(writer: RingWriter, values: list[tuple[object, ...]]) -> None:
    for row in values:
        writer.append(row)
    writer.seal()


def drain(rings: Path, out: Path, **options: object) -> Writer:
    """Start a writer, let it write everything that is there, and stop it."""
    writer = Writer(rings, out, name="test", **{"roll_rows": 1000, "poll_s": 0.002, **options})
    writer.report = writer.run(lambda: True)
    return writer


def files(out: Path, feed: str = "trades") -> list[Path]:
    return sorted((out / feed).rglob("*.parquet"), key=lambda p: [int(x) for x in p.stem.rsplit("-", 3)[1:]])


def stored(out: Path, feed: str = "trades") -> list[dict[str, object]]:
    return [row for path in files(out, feed) for row in pq.read_table(path, partitioning=None).to_pylist()]


def us(time_: datetime) -> int:
    return (time_ - datetime(1970, 1, 1, tzinfo=UTC)) // (datetime.resolution)


def as_ring_values(row: dict[str, object]) -> tuple[object, ...]:
    """A stored trade back as the tuple it was written from."""
    return (
        us(row["timestamp"]), us(row["rcv_timestamp"]), row["packet_id"], row["parse_ns"], row["publish_ns"],
        TICKERS.index(row["ticker"]), {"BINANCE_SPOT": 1}[row["exchange"]], row["flags"], row["side"], row["price"],
        row["qty"], row["trade_seq"], b"" if row["trade_id"] == str(row["trade_seq"]) else row["trade_id"].encode(),
    )  # fmt: skip


def wait_for(
    condition: Callable[[], bool], step: Callable[[], object] = lambda: time.sleep(0.005), seconds: float = 20
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        step()


def test_every_row_of_every_ring_is_stored_as_it_was_written(tmp_path: Path) -> None:
    trades = {c: [trade(n + shift) for n in range(5000)] for shift, c in enumerate(("conn-1", "conn-2"))}
    levels = [level(n) for n in range(4000)]
    for connector, values in trades.items():
        with ring(tmp_path / "rings", connector=connector) as writer:
            append(writer, values)
    with ring(tmp_path / "rings", "orderbook_l2") as writer:
        append(writer, levels)
    report = drain(tmp_path / "rings", tmp_path / "out").report
    assert report.complete
    assert {(s.connector, s.feed): (s.rows_read, s.rows_written) for s in report.streams} == {
        ("conn-1", "trades"): (5000, 5000), ("conn-2", "trades"): (5000, 5000), ("conn-1", "orderbook_l2"): (4000, 4000)
    }  # fmt: skip
    for connector, values in trades.items():
        rows = [
            r
            for p in files(tmp_path / "out")
            if p.name.startswith(connector)
            for r in pq.read_table(p, partitioning=None).to_pylist()
        ]
        assert [row["seq_id"] for row in rows] == list(range(5000))
        assert [as_ring_values(row) for row in rows] == values
    rows = stored(tmp_path / "out", "orderbook_l2")
    assert [(r["price"], r["qty"], r["update_id"], r["side"], r["action"]) for r in rows] == [
        (v[10], v[11], v[12], v[8], Action(v[9]).name) for v in levels
    ]
    assert verify(tmp_path / "out").findings == []


def test_a_file_says_what_it_holds_in_its_name_and_its_footer(tmp_path: Path) -> None:
    with ring(tmp_path / "rings", epoch=77) as writer:
        append(writer, [trade(n) for n in range(10)])
    drain(tmp_path / "rings", tmp_path / "out")
    (path,) = files(tmp_path / "out")
    assert path == tmp_path / "out/trades/BINANCE_SPOT/date=2026-03-01/conn-1-77-0-9.parquet"
    footer = {k.decode(): v.decode() for k, v in pq.read_metadata(path).metadata.items() if k.startswith(b"mdc")}
    assert footer.pop("mdcollector.version")
    assert footer == {
        "mdcollector.feed": "trades", "mdcollector.exchange": "BINANCE_SPOT", "mdcollector.connector": "conn-1",
        "mdcollector.epoch": "77", "mdcollector.first_seq": "0", "mdcollector.last_seq": "9", "mdcollector.ring": "77",
        "mdcollector.date": "2026-03-01", "mdcollector.schema_version": "1",
    }  # fmt: skip
    alone = pq.ParquetFile(path).read()
    assert alone.column_names == [c.name for c in TRADES.table_columns]


def test_the_tree_opens_without_options_in_pyarrow_duckdb_and_polars(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    values = [trade(n) for n in range(2500)] + [trade(n, NOON_US + DAY_US + n) for n in range(2500, 3000)]
    with ring(tmp_path / "rings") as writer:
        append(writer, values)
    with ring(tmp_path / "rings", connector="conn-2") as writer:
        append(writer, [trade(5)])
    drain(tmp_path / "rings", tmp_path / "out")
    # What a killed writer leaves behind must be invisible.
    part = files(tmp_path / "out")[0]
    (tmp_path / "out/.parts" / f"trades.{part.name}.writing").write_bytes(b"half a file")
    total, price = 3001, sum(v[9] for v in values) + trade(5)[9]
    names = {c.name for c in TRADES.table_columns} | {"date"}

    table = ds.dataset(tmp_path / "out" / "trades", partitioning="hive").to_table()
    assert (len(table), set(table.column_names)) == (total, names)
    assert sum(table["price"].to_pylist()) == pytest.approx(price, rel=1e-12)
    assert sorted(set(table["date"].to_pylist())) == ["2026-03-01", "2026-03-02"]

    with duckdb.connect() as db:
        query = f"select count(*), sum(price), count(distinct date), any_value(exchange) from '{tmp_path}/out/trades/*/*/*.parquet'"
        count, total_price, dates, exchange = db.execute(query).fetchone()
        assert (count, dates, exchange) == (total, 2, "BINANCE_SPOT")
        assert total_price == pytest.approx(price, rel=1e-12)
        described = db.execute(f"describe select * from '{tmp_path}/out/trades/*/*/*.parquet'").fetchall()
        assert {row[0] for row in described} == names

    for target in (tmp_path / "out" / "trades", tmp_path / "out" / "trades" / "**" / "*.parquet"):
        frame = polars.scan_parquet(target, hive_partitioning=True).collect()
        assert (len(frame), set(frame.columns)) == (total, names)
        assert frame["price"].sum() == pytest.approx(price, rel=1e-12)
        assert sorted(frame["ticker"].cast(polars.String).unique().to_list()) == sorted(TICKERS)


def test_pages_carry_checksums_an_index_and_zstd(tmp_path: Path) -> None:
    with ring(tmp_path / "rings") as writer:
        append(writer, [trade(n) for n in range(900)])
    drain(tmp_path / "rings", tmp_path / "out")
    (path,) = files(tmp_path / "out")
    group = pq.read_metadata(path).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {c.compression for c in columns.values()} == {"ZSTD"}
    assert all(columns[name].has_column_index and columns[name].has_offset_index for name in ("timestamp", "seq_id"))
    assert "DELTA_BINARY_PACKED" in columns["seq_id"].encodings
    assert "BYTE_STREAM_SPLIT" in columns["price"].encodings
    assert columns["ticker"].has_dictionary_page
    # A flipped bit in any page is found.
    content = bytearray(path.read_bytes())
    content[columns["price"].data_page_offset + columns["price"].total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"), pq.ParquetFile(path, page_checksum_verification=True) as parquet:
        parquet.read()


def test_a_file_holds_one_utc_day_also_when_receive_times_go_back_over_midnight(tmp_path: Path) -> None:
    midnight = NOON_US + DAY_US // 2
    offsets = [-2, -1, 0, 1, -1, 2, 3, -1]  # begins and ends on the same day
    with ring(tmp_path / "rings", epoch=1) as writer:
        append(writer, [trade(n, midnight + 1_000_000 * offset) for n, offset in enumerate(offsets)])
    drain(tmp_path / "rings", tmp_path / "out")
    found = [(p.parent.name[5:], *map(int, p.stem.rsplit("-", 2)[1:])) for p in files(tmp_path / "out")]
    assert found == [
        ("2026-03-01", 0, 1),
        ("2026-03-02", 2, 3),
        ("2026-03-01", 4, 4),
        ("2026-03-02", 5, 6),
        ("2026-03-01", 7, 7),
    ]
    assert [row["seq_id"] for row in stored(tmp_path / "out")] == list(range(8))


def test_the_next_writer_goes_on_at_the_next_row_over_epochs(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    written = 0
    for epoch in (5, 6, 9):
        with ring(rings, epoch=epoch) as writer:
            append(writer, [trade(n) for n in range(written, written + 300)])
            written += 300
            if epoch != 6:  # the second life is met only by the third writer
                drain(rings, out)
    drain(rings, out)  # nothing new: nothing happens
    names = [tuple(map(int, p.stem.rsplit("-", 3)[1:])) for p in files(out)]
    assert names == [(5, 0, 299), (6, 300, 599), (9, 600, 899)]
    assert [row["seq_id"] for row in stored(out)] == list(range(900))
    assert verify(out).findings == []


def test_a_recreated_ring_starts_at_its_oldest_row(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    with ring(rings, epoch=5) as writer:
        append(writer, [trade(n) for n in range(300)])
    drain(rings, out)
    shutil.rmtree(rings / "conn-1")
    with ring(rings, epoch=6, capacity=512) as writer:
        append(writer, [trade(n) for n in range(300, 1000)])
        oldest = RingReader(rings / "conn-1", "trades").oldest
    report = drain(rings, out).report
    rows = stored(out)
    assert [r["seq_id"] for r in rows] == [*range(300), *range(oldest, 700)]
    assert report.streams[0].lapped == 0  # nobody was there to be lapped
    new = [p for p in files(out) if "-6-" in p.name]
    assert new[0].name == f"conn-1-6-{oldest}-{oldest + int(new[0].stem.rsplit('-', 1)[1]) - oldest}.parquet"


def test_a_ring_replaced_under_a_running_writer_is_drained_to_its_end_and_the_new_one_taken(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    writer = Writer(rings, out, name="test", roll_s=0.01, poll_s=0.002)
    with ring(rings, epoch=5) as first:
        append(first, [trade(n) for n in range(300)])
        writer.drain_once()
        for n in range(300, 350):
            first.append(trade(n))
    (rings / "conn-1").rename(rings / "_moved-away")
    with ring(rings, epoch=6) as second:
        append(second, [trade(n) for n in range(350, 400)])
        wait_for(lambda: len(stored(out)) == 400, writer.drain_once)
    report = writer.finish()
    assert sum(s.rows_written for s in report.streams) == 400
    assert sorted(row["trade_seq"] * 3 + row["seq_id"] % 1 for row in stored(out)) == sorted(
        n // 3 * 3 for n in range(400)
    )


def test_rows_that_a_power_failure_took_from_the_ring_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    with ring(rings, epoch=5) as writer:
        append(writer, [trade(n) for n in range(100)])
    shutil.copytree(rings / "conn-1", tmp_path / "on-disk")  # what reached the disk
    with ring(rings, epoch=6) as writer:
        append(writer, [trade(n) for n in range(100, 200)])
    drain(rings, out)
    shutil.rmtree(rings / "conn-1")
    shutil.copytree(tmp_path / "on-disk", rings / "conn-1")
    with ring(rings, epoch=7) as writer:
        append(writer, [trade(n) for n in range(500, 540)])
    drain(rings, out)
    found = [(int(p.stem.rsplit("-", 3)[1]), *map(int, p.stem.rsplit("-", 2)[1:])) for p in files(out)]
    assert found == [(5, 0, 99), (6, 100, 199), (7, 100, 139)]
    assert [as_ring_values(r) for r in stored(out)][200:] == [trade(n) for n in range(500, 540)]


def test_a_running_writer_waits_for_the_next_life_of_a_ring_that_forgot(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    with ring(rings, epoch=5) as writer:
        append(writer, [trade(n) for n in range(100)])
        shutil.copytree(rings / "conn-1", tmp_path / "on-disk")
        append(writer, [trade(n) for n in range(100, 200)])
    drain(rings, out)
    shutil.rmtree(rings / "conn-1")
    shutil.copytree(tmp_path / "on-disk", rings / "conn-1")
    running = Writer(rings, out, name="test", roll_s=0.01)
    assert running.drain_once() == 0
    with ring(rings, epoch=7) as writer:
        append(writer, [trade(n) for n in range(300, 310)])
        wait_for(lambda: len(stored(out)) == 210, running.drain_once)
    running.finish()
    assert files(out)[-1].name == "conn-1-7-100-109.parquet"


def test_rings_are_taken_when_they_appear_and_only_those_that_match(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    writer = Writer(rings, out, name="test", connectors=("a*", "late"), feeds=("trades", "gaps"), roll_s=0.01)
    assert writer.drain_once() == 0
    for connector, feed in (
        ("a1", "trades"),
        ("a1", "bbo"),
        ("b", "trades"),
        ("late", "trades"),
        ("_hidden", "trades"),
    ):
        with ring(rings, feed, connector) as one:
            append(one, [trade(n) for n in range(3)] if feed == "trades" else [])
    wait_for(lambda: len(stored(out)) == 6, writer.drain_once)
    report = writer.finish()
    assert sorted((s.connector, s.feed, s.rows_written) for s in report.streams) == [
        ("a1", "trades", 3),
        ("late", "trades", 3),
    ]
    assert {p.name.split("-")[0] for p in files(out)} == {"a1", "late"}


def test_files_roll_by_rows_by_time_and_before_a_quarter_of_the_ring_waits(tmp_path: Path) -> None:
    rings = tmp_path / "rings"
    with ring(rings, capacity=1 << 12) as one:
        append(one, [trade(n) for n in range(3000)])
        assert (
            drain(rings, tmp_path / "rows", roll_rows=100).report.streams[0].files == 12
        )  # rows are read in blocks of 256
        assert drain(rings, tmp_path / "ring", roll_rows=1_000_000).report.streams[0].files == 3
        slow = Writer(rings, tmp_path / "time", name="test", roll_s=3600)
        slow.drain_once()
        assert [p.stem.rsplit("-", 2)[1:] for p in files(tmp_path / "time")] == [["0", "1023"]]
        quick = Writer(rings, tmp_path / "quick", name="quick", roll_s=0.01)
        wait_for(lambda: len(stored(tmp_path / "quick")) == 3000, quick.drain_once)
        quick.finish()
        assert slow.finish().complete


def test_what_was_overwritten_is_in_the_ledger_exactly(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    with ring(rings, capacity=512, epoch=5) as one:
        writer = Writer(rings, out, name="test", roll_s=0.0)
        append(one, [trade(n) for n in range(100)])
        wait_for(lambda: len(stored(out)) == 100, writer.drain_once)
        append(one, [trade(n) for n in range(100, 2000)])
        oldest = RingReader(rings / "conn-1", "trades").oldest
        report = writer.finish()
    assert [r["seq_id"] for r in stored(out)] == [*range(100), *range(oldest, 2000)]
    assert (report.streams[0].lapped, report.streams[0].damaged) == (oldest - 100, 0)
    assert not report.complete
    (gap,) = stored(out, "gaps")
    assert (gap["feed"], gap["ticker"], gap["cause"], gap["first_id"], gap["last_id"]) == (
        "trades", "", "lapped", 100, oldest - 1
    )  # fmt: skip
    assert (us(gap["from_time"]), us(gap["to_time"])) == (trade(99)[1], trade(oldest)[1])
    assert (gap["repaired"], gap["seq_id"]) == (False, 0)
    (path,) = files(out, "gaps")
    assert path.name == "conn-1~trades-5-0-0.parquet"
    result = verify(out)
    assert (result.findings, result.missing) == ([], 0)
    assert result.explained >= oldest - 100
    # The same again under a writer that finds its position in the names: a second row in the same line of ids.
    with ring(rings, capacity=512, epoch=6) as one:
        append(one, [trade(n) for n in range(2000, 4000)])
        drain(rings, out)
    again = stored(out, "gaps")[1:]
    assert [(g["first_id"], g["from_time"]) for g in again] == [(2000, None)]
    assert verify(out).findings == []


def test_a_hole_over_the_end_of_a_life_is_one_row_for_each_life(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    with ring(rings, capacity=512, epoch=5) as one:
        append(one, [trade(n) for n in range(50)])
    drain(rings, out)
    with ring(rings, capacity=512, epoch=6) as one:
        append(one, [trade(n) for n in range(50, 1000)])
    drain(rings, out)
    assert [
        (p.name.split("-")[2], r["first_id"]) for p in files(out, "gaps") for r in pq.read_table(p).to_pylist()
    ] == [("6", 50)]
    with ring(rings, capacity=512, epoch=7) as one:
        append(one, [trade(n) for n in range(1000, 1100)])
    with ring(rings, capacity=512, epoch=8) as one:
        append(one, [trade(n) for n in range(1100, 3000)])
        oldest = RingReader(rings / "conn-1", "trades").oldest
    drain(rings, out)
    found = [
        (int(p.stem.rsplit("-", 3)[1]), r["first_id"], r["last_id"])
        for p in files(out, "gaps")
        for r in pq.read_table(p).to_pylist()
    ]
    assert found[1:] == [(7, 1000, 1099), (8, 1100, oldest - 1)]
    assert verify(out).findings == []


def test_rows_of_a_damaged_block_are_left_out_and_written_down(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    with ring(rings) as one:
        append(one, [trade(n) for n in range(1000)])
    path = rings / "conn-1" / "trades.data"
    with open(path, "r+b") as data:
        data.seek(600 * TRADES.dtype.itemsize + 44)  # a byte of a price in the third block of 256
        byte = data.read(1)[0]
        data.seek(-1, os.SEEK_CUR)
        data.write(bytes((byte ^ 4,)))
    report = drain(rings, out).report
    assert [r["seq_id"] for r in stored(out)] == [*range(512), *range(768, 1000)]
    assert (report.streams[0].damaged, report.streams[0].lapped) == (256, 0)
    (gap,) = stored(out, "gaps")
    assert (gap["cause"], gap["first_id"], gap["last_id"]) == ("damaged", 512, 767)
    assert verify(out).findings == []


def test_a_row_that_names_no_instrument_is_damaged_and_stops_nothing(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    with ring(rings) as one:
        append(one, [trade(n) if n != 7 else (*trade(n)[:5], 999, *trade(n)[6:]) for n in range(20)])
        append(one, [trade(20, rcv_us=2**62)])
    report = drain(rings, out).report
    assert [r["seq_id"] for r in stored(out)] == [*range(7), *range(8, 20)]
    assert report.streams[0].damaged == 2
    assert sorted((g["first_id"], g["last_id"]) for g in stored(out, "gaps")) == [(7, 7), (20, 20)]


def test_rows_that_a_killed_collector_could_not_seal_are_stored(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom mdcollector.records import TRADES\n"
        "from mdcollector.ring import RingWriter\n"
        "w = RingWriter(Path(sys.argv[1]), TRADES, exchange='BINANCE_SPOT', connector='conn-1', capacity=4096, semaphore=False)\n"
        "w.code('BTCUSDT')\n"
        f"for n in range(300): w.append({trade(0)[:9]!r} + (1.5 + n, 1.0, n, b''))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(rings / "conn-1")], check=False)
    assert done.returncode == -9
    reader = RingReader(rings / "conn-1", "trades")
    assert (reader.published, reader.sealed) == (300, 0)
    writer = Writer(rings, out, name="test", roll_s=0.0)
    wait_for(lambda: bool(files(out)) and len(stored(out)) == 300, writer.drain_once)
    assert writer.finish().complete
    assert [r["price"] for r in stored(out)] == [1.5 + n for n in range(300)]


def test_a_stopping_writer_takes_what_a_living_collector_has_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdcollector.writer.SEAL_WAIT_S", 0.05)
    with ring(tmp_path / "rings") as one:
        for n in range(70):
            one.append(trade(n))
        report = drain(tmp_path / "rings", tmp_path / "out").report
    assert report.complete
    assert len(stored(tmp_path / "out")) == 70


def test_a_stream_has_one_writer_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdcollector.sinks.parquet.LOCK_WAIT_S", 0.05)
    with ring(tmp_path / "rings") as one:
        append(one, [trade(0)])
    first = Writer(tmp_path / "rings", tmp_path / "out", name="one")
    first.drain_once()
    second = Writer(tmp_path / "rings", tmp_path / "out", name="two")
    with pytest.raises(StorageError, match=r"another writer puts conn-1/trades into .*out"):
        second.drain_once()
    elsewhere = Writer(tmp_path / "rings", tmp_path / "other", name="three")
    elsewhere.drain_once()
    assert elsewhere.finish().complete
    assert first.finish().complete
    second.drain_once()
    assert second.finish().complete
    assert len(stored(tmp_path / "out")) == 1


def test_what_a_killed_writer_left_unfinished_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    with ring(rings) as one:
        append(one, [trade(0)])
    parts = out / ".parts"
    parts.mkdir(parents=True)
    own = [parts / "trades.conn-1-5-0-9.parquet.writing", parts / "gaps.conn-1~trades-5-0-0.parquet.writing"]
    others = [
        parts / "trades.conn-12-5-0-9.parquet.writing",
        parts / "bbo.conn-1-5-0-9.parquet.writing",
        parts / "trades.conn-1-5-0-9.parquet.merging",
    ]
    for path in (*own, *others):
        path.write_bytes(b"x")
    drain(rings, out)
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others)


def test_a_broken_ring_is_reported_and_the_others_are_drained(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    for connector in ("good", "cut", "garbage"):
        with ring(rings, connector=connector) as one:
            append(one, [trade(n) for n in range(10)])
    os.truncate(rings / "cut" / "trades.data", 1000)
    (rings / "garbage" / "trades.meta").write_bytes(os.urandom(20_000))
    writer = Writer(rings, out, name="test", roll_s=0.0)
    wait_for(lambda: len(stored(out)) == 10, writer.drain_once)
    writer._publish()
    refused = read_stats(rings / "_writers/test/stats")["refused"]
    assert sorted(Path(path).parent.name for path in refused) == ["cut", "garbage"]
    assert "truncated" in refused[str(rings / "cut" / "trades.meta")]
    report = writer.finish()
    assert [s.connector for s in report.streams] == ["good"]
    assert not report.complete, "nobody knows what was in the others"


def test_the_stats_page_says_where_every_stream_stands(tmp_path: Path) -> None:
    rings = tmp_path / "rings"
    with ring(rings, capacity=1024) as one:
        append(one, [trade(n) for n in range(700)])
        writer = Writer(rings, tmp_path / "out", name="page", roll_s=3600)
        writer.drain_once()
        stats = read_stats(rings / "_writers/page/stats")
        stream = stats["streams"]["conn-1/trades"]
        assert (stats["role"], stats["name"], stats["rows_written"]) == ("writer", "page", 256)
        assert (stream["position"], stream["durable"], stream["published"]) == (256, 256, 700)
        assert (stream["rows_read"], stream["rows_written"], stream["files"]) == (256, 256, 1)
        assert (stream["lag_rows"], stream["lag_share"]) == (444, round(444 / 1024, 4))
        assert (stream["behind"], stream["behind_alarms"]) == (True, 1) or stream["lag_rows"] < 512
        persisted = stats["persisted"]
        assert persisted["count"] == 16
        assert sum(persisted["counts"]) == 16
        assert len(persisted["counts"]) == len(persisted["bounds_ns"]) + 1
        assert writer.finish().complete
    stats = read_stats(rings / "_writers/page/stats")
    assert stats["streams"]["conn-1/trades"]["lag_rows"] == 0
    assert not stats["streams"]["conn-1/trades"]["behind"]


def test_the_alarm_is_raised_once_each_time_half_a_ring_waits(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    with ring(rings, capacity=1024) as one:
        writer = Writer(rings, out, name="test", roll_s=0.0)
        for start in (0, 900):
            append(one, [trade(n) for n in range(start, start + 900)])
            wait_for(lambda stop=start + 900: len(stored(out)) == stop, writer.drain_once)
        append(one, [trade(n) for n in range(1800, 1900)])
        wait_for(lambda: len(stored(out)) == 1900, writer.drain_once)
        writer._publish()
        assert read_stats(rings / "_writers/test/stats")["streams"]["conn-1/trades"]["behind_alarms"] == 2
        writer.finish()


def test_all_rings_together_stay_within_the_memory_bound(tmp_path: Path) -> None:
    rings, out = tmp_path / "rings", tmp_path / "out"
    bound = 4 << 20
    with contextlib.ExitStack() as stack:
        for i in range(6):
            one = stack.enter_context(ring(rings, connector=f"c{i}", capacity=1 << 15))
            append(one, [trade(n) for n in range(8000)])
        writer = Writer(rings, out, name="test", roll_s=3600, memory_bytes=bound)
        most = 0
        while writer.drain_once():
            most = max(most, sum(d.nbytes for d in writer._drains.values()))
        assert most <= bound
        assert writer.finish().complete
    assert len(stored(out)) == 48_000


class FullSink(ParquetSink):
    """A real tree whose disk refuses everything for a while."""

    error: OSError | None = None

    def write(self, batch: object) -> int:
        if self.error:
            raise self.error
        return super().write(batch)


@pytest.mark.parametrize("number", ["EIO", "EROFS", "ENOSPC"])
def test_rows_are_kept_while_the_disk_refuses_and_the_errors_are_counted(tmp_path: Path, number: str) -> None:
    import errno

    rings, sink = tmp_path / "rings", FullSink(tmp_path / "out")
    with ring(rings, capacity=1024) as one:
        writer = Writer(rings, tmp_path / "out", name="test", roll_s=0.0, sink=sink)
        sink.error = OSError(getattr(errno, number), "refused")
        append(one, [trade(n) for n in range(200)])
        wait_for(lambda: writer._drains and next(iter(writer._drains.values())).errors[number] >= 2, writer.drain_once)
        append(one, [trade(n) for n in range(200, 900)])
        for _ in range(20):
            writer.drain_once()
        drain_ = next(iter(writer._drains.values()))
        assert drain_.buffered <= 256  # a quarter of the ring; the rest waits in the ring
        assert files(tmp_path / "out") == []
        sink.error = None
        wait_for(lambda: len(stored(tmp_path / "out")) == 900, writer.drain_once)
        writer._publish()
        stats = read_stats(rings / "_writers/test/stats")
        assert stats["errors"][number] == drain_.errors[number] >= 2
        assert writer.finish().complete
    assert [as_ring_values(r) for r in stored(tmp_path / "out")] == [trade(n) for n in range(900)]


def test_the_ledger_that_waits_for_a_refusing_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdcollector.writer.LOST_MAX", 3)
    monkeypatch.setattr("mdcollector.writer.READ_ROWS", 256)
    rings, sink = tmp_path / "rings", FullSink(tmp_path / "out")
    with ring(rings) as one:
        append(one, [trade(n) for n in range(2560)])
    with open(rings / "conn-1" / "trades.data", "r+b") as data:
        for block in range(8):
            data.seek(block * 256 * TRADES.dtype.itemsize)
            data.write(b"\xff")
    sink.error = OSError(5, "refused")
    writer = Writer(rings, tmp_path / "out", name="test", roll_s=0.0, sink=sink)
    while writer.drain_once():
        pass
    assert next(iter(writer._drains.values())).reader.position == 3 * 256
    sink.error = None
    writer.finish()
    lost = {n for g in stored(tmp_path / "out", "gaps") for n in range(g["first_id"], g["last_id"] + 1)}
    assert lost == set(range(2048))
    assert [r["seq_id"] for r in stored(tmp_path / "out")] == list(range(2048, 2560))


def test_a_writer_that_must_stop_while_the_disk_refuses_says_what_is_left(tmp_path: Path) -> None:
    rings, sink = tmp_path / "rings", FullSink(tmp_path / "out")
    with ring(rings) as one:
        append(one, [trade(n) for n in range(50)])
    sink.error = OSError(28, "full")
    writer = Writer(rings, tmp_path / "out", name="test", sink=sink)
    writer.drain_once()
    (stream,) = writer.finish(finish_s=0.2).streams
    assert (stream.rows_read, stream.rows_written, stream.rows_left) == (50, 0, 50)
    sink.error = None
    assert drain(rings, tmp_path / "out").report.complete
    assert len(stored(tmp_path / "out")) == 50


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_loses_nothing_that_is_still_in_the_ring(tmp_path: Path, small_disk: Path) -> None:
    rings, out = tmp_path / "rings", small_disk / "out"
    rng = np.random.default_rng(4)
    values = [
        (*trade(n)[:9], float(rng.random()), float(rng.random()), n // 3, rng.bytes(16).hex().encode())
        for n in range(20_000)
    ]
    ballast = small_disk / "ballast"
    with ring(rings, capacity=1 << 15) as one:
        append(one, values[:2000])
        writer = Writer(rings, out, name="test", roll_rows=1000, poll_s=0.002)
        writer.drain_once()
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        append(one, values[2000:])
        wait_for(lambda: next(iter(writer._drains.values())).errors["ENOSPC"] >= 2, writer.drain_once)
        before = len(stored(out))
        assert before < 20_000
        assert list((out / ".parts").iterdir()) == []
        ballast.unlink()
        report = writer.finish()
    assert report.complete
    assert [as_ring_values(r) for r in stored(out)] == values
    assert verify(out).findings == []


def test_the_order_is_file_synced_renamed_directory_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(fd: int) -> None:
        steps.append("sync " + Path(f"/proc/self/fd/{fd}").readlink().name)
        real_fsync(fd)

    def rename(self: Path, target: Path) -> Path:
        steps.append(f"rename {self.name}")
        return real_rename(self, target)

    with ring(tmp_path / "rings", epoch=3) as one:
        append(one, [trade(0)])
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    drain(tmp_path / "rings", tmp_path / "out")
    part = "trades.conn-1-3-0-0.parquet.writing"
    assert steps[-3:] == [f"sync {part}", f"rename {part}", "sync date=2026-03-01"]
    assert {"sync out", "sync trades", "sync BINANCE_SPOT"} <= set(steps[:-3])  # names of new directories, too


def test_a_file_whose_name_could_not_be_made_durable_is_not_stored_beside_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next try has more rows, hence another name: those of the first try would be there twice."""
    import errno

    rings, out, real_fsync, refused = tmp_path / "rings", tmp_path / "out", os.fsync, list[str]()

    def fsync(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name == "date=2026-03-01" and files(out) and not refused:
            refused.append(name)
            raise OSError(errno.EIO, "refused")
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with ring(rings, capacity=4096) as one:
        writer = Writer(rings, out, name="test", roll_s=0.0)
        append(one, [trade(n) for n in range(200)])
        wait_for(lambda: bool(refused), writer.drain_once)
        append(one, [trade(n) for n in range(200, 300)])
        assert writer.finish().complete
    assert [as_ring_values(r) for r in stored(out)] == [trade(n) for n in range(300)]


def test_sinks_are_found_by_their_name() -> None:
    assert "parquet" in sink_kinds()
    with pytest.raises(ConfigError, match=r"sink 'carrier pigeon' is not known; there are: .*parquet"):
        open_sink("carrier pigeon", "")
    with pytest.raises(ConfigError, match="no option colour"):
        open_sink("parquet", "out", {"colour": "red"})
