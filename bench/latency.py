"""From the ring to a reader in another process: how long until it knows of a row, for each way of waiting.

    python -m bench.latency DIRECTORY RATE SECONDS      the writer: one row at a time, each at its time, stamped

The reader is the benchmark's own process, on the next core. Both read the same monotonic clock.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.endtoend import percentiles
from bench.micro import quiet_gc, ring_directory
from bench.processes import child, module
from mdcollector.records import TRADES
from mdcollector.ring import RingReader, RingWriter, Wait

WAITS: tuple[tuple[str, Wait, float], ...] = (
    ("spinning", "spin", 0.0),
    ("polling every 20 us", "poll", 20e-6),
    ("polling every 100 us", "poll", 100e-6),
    ("semaphore", "semaphore", 0.0),
)
CAPACITY = 1 << 16
START_S = 20.0


def write(directory: Path, rate: float, seconds: float) -> None:
    """Write rows at `rate`; the stamp is taken just before the row is written. Spins between rows."""
    clock = time.perf_counter_ns
    with (
        RingWriter(directory, TRADES, exchange="BINANCE_SPOT", connector="bench", capacity=CAPACITY) as ring,
        quiet_gc(),
    ):
        ring.code("BTCUSDT")
        print('{"ready": true}', flush=True)
        sys.stdin.readline()
        gap, due = int(1e9 / rate), clock()
        end = due + int(seconds * 1e9)
        while due < end:
            while clock() < due:
                pass
            stamp = clock()
            ring.append((stamp, 0, 0, 0, 0, 0, 1, 1, 1, 61837.63, 0.5, 1000, b""))
            ring.wake()
            due += gap


def run(rate: float, seconds: float) -> list[dict[str, Any]]:
    """One row of results for each way of waiting."""
    return [_one(name, how, poll_s, rate, seconds) for name, how, poll_s in WAITS]


def _one(name: str, how: Wait, poll_s: float, rate: float, seconds: float) -> dict[str, Any]:
    noticed, taken, clock = [], [], time.perf_counter_ns
    before = machine.cores()
    with ring_directory() as directory, child(*module("bench.latency", directory, rate, seconds)) as writer:
        writer.line(START_S)
        with RingReader(directory, "trades") as reader, quiet_gc():
            machine.pin(1)
            slowness = machine.Reference().slowness(machine.SLOWNESS_S)
            writer.say("go")
            reader.wait(START_S, how, poll_s)
            cpu = time.process_time()
            began = time.perf_counter()
            while reader.wait(0.5, how, poll_s):
                at = clock()
                rows = reader.read()
                noticed.append(at - int(rows["timestamp"][-1]))
                taken.append(clock() - int(rows["timestamp"][0]))
            seconds_used = max(time.perf_counter() - began - 0.5, 1e-9)
            cpu = time.process_time() - cpu
            lapped, read = reader.lapped, reader.position
    machine.release(before)
    if lapped or not noticed:
        raise AssertionError(f"{name}: {lapped} rows lapped, {read} read")
    return {
        "reader": name, "rate": rate, "rows": read, "reads": len(noticed), "reader_cpu_share": min(1.0, cpu / seconds_used), "slowness": slowness,
        "noticed_ns": percentiles(np.array(noticed)), "oldest_row_in_hand_ns": percentiles(np.array(taken)),
    }  # fmt: skip


if __name__ == "__main__":
    machine.pin(0)
    write(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
