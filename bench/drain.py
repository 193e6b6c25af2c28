"""The writer: how fast it drains a full ring into Parquet, and whether it keeps up beside a collector.

python -m bench.drain RINGS OUT      the writer process: drains until its stdin ends, then says what it wrote
"""

import json
import logging
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import endtoend, frames, machine
from bench.micro import ring_directory
from bench.processes import child, module, until
from mdcollector.emit import Emit
from mdcollector.exchanges import Options, Venue, binance
from mdcollector.records import DATA_FEEDS
from mdcollector.writer import Writer

START_S, RUN_S = 30.0, 180.0
ROLL_ROWS = 250_000  # so that a run of some seconds writes several files


def write(rings: Path, out: Path) -> None:
    """Drain until stdin ends; report rows, bytes, seconds and CPU seconds since the first line on stdin."""
    logging.getLogger("mdcollector").setLevel(logging.ERROR)  # that it begins behind a full ring is the point
    writer = Writer(rings, out, name="bench", feeds=DATA_FEEDS, roll_rows=ROLL_ROWS, roll_s=5.0)
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    began, cpu = time.perf_counter(), time.process_time()
    report = writer.run(lambda: bool(select.select([sys.stdin], [], [], 0)[0]))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    found = {
        "rows": sum(s.rows_written for s in report.streams), "bytes": sum(s.bytes for s in report.streams),
        "files": sum(s.files for s in report.streams), "lapped": sum(s.lapped for s in report.streams),
        "complete": report.complete, "seconds": seconds, "cpu_s": cpu,
    }  # fmt: skip
    print(json.dumps(found), flush=True)


def _fill(directory: Path, feed: str, rows: int) -> int:
    """A ring of realistic rows, written by the connector's own way."""
    emit = Emit(directory, "bench", binance.BinanceSpot.EXCHANGE, [feed], capacities={feed: 1 << 20}, semaphore=False)
    venue: Venue = binance.BinanceSpot(emit, Options(), [], open_world=True)
    makers: dict[str, Callable[[int], Any]] = {
        "trades": frames.binance_trades, "bbo": frames.binance_book_tickers, "orderbook_l2": frames.binance_depths,
    }  # fmt: skip
    count = rows // (2 * frames.LEVELS) if feed == "orderbook_l2" else rows
    for i, frame in enumerate(makers[feed](count)):
        if i % 16 == 0:  # some frames of one network read
            emit.packet(time.time_ns(), emit.clock())
        venue.decode(frame)
        if i == 0 and feed == "orderbook_l2":
            venue.http("http://bench/api/v3/depth?symbol=BTCUSDT", frames.binance_snapshot())
    emit.end_packet()
    written: int = emit.rings[feed].next
    emit.close()
    return written


def alone(rows: int) -> list[dict[str, Any]]:
    """A full ring into Parquet, one writer process on one core; the middle one of three runs at nominal speed."""
    return [
        machine.middle([_alone(feed, rows) for _ in range(3)], "cpu_ns_per_row")
        for feed in ("trades", "orderbook_l2", "bbo")
    ]


def _alone(feed: str, rows: int) -> dict[str, Any]:
    with ring_directory() as directory:
        filled = _fill(directory / "rings", feed, rows)
        with child(*module("bench.drain", directory / "rings", directory / "out")) as writer:
            writer.line(START_S)
            with machine.slowness_around(1) as slowness:
                writer.say("go")
                writer.process.stdin.close()  # type: ignore[union-attr]
                found = writer.line(RUN_S)
        if found["rows"] != filled or not found["complete"]:
            raise AssertionError(f"{found} of {filled} rows of {feed}")
        return {
            "feed": feed, "rows": filled, "rows_per_s": filled / found["seconds"], "bytes_per_row": found["bytes"] / filled,
            "cpu_ns_per_row": found["cpu_s"] / filled * 1e9, "slowness": slowness[0],
        }  # fmt: skip


def sustained(rate: float, seconds: float) -> dict[str, Any]:
    """Sender, collector and writer at once: rows sent = rows stored, and what it costs."""
    count = int(rate * seconds)
    with (
        ring_directory() as directory,
        endtoend.sending("trade", count, rate) as (sender, port),
        endtoend.collecting(directory, "trade", port) as (_, reader),
        child(*module("bench.drain", directory, directory / "out")) as writer,
    ):
        writer.line(START_S)
        endtoend.settle(reader)
        writer.say("go")
        sender.say("go")
        sent = sender.line(seconds * 3 + RUN_S)
        until(lambda: reader.published >= count, RUN_S, f"{count} rows in the ring")
        writer.process.stdin.close()  # type: ignore[union-attr]
        found = writer.line(RUN_S)
    return {
        "rate": rate, "sent": count, "sent_per_s": (count - 1) / sent["seconds"], "stored": found["rows"],
        "lapped": found["lapped"], "writer_cpu_ns_per_row": found["cpu_s"] / max(found["rows"], 1) * 1e9,
        "writer_cpu_share": found["cpu_s"] / found["seconds"], "nothing_lost": found["complete"] and found["rows"] == count,
    }  # fmt: skip


if __name__ == "__main__":
    machine.pin(1)
    write(Path(sys.argv[1]), Path(sys.argv[2]))
