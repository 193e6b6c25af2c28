"""Benchmarks inside one process: ring, decode, and the hot path from frame to ring.

Every figure is the smallest mean of many short repeats: what the code costs when nothing else disturbs it.
"""

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson

from bench import frames, machine
from mdcollector.emit import Emit
from mdcollector.exchanges import Options, Venue, binance, deribit, venue_class
from mdcollector.records import TRADES
from mdcollector.ring import RingReader, RingWriter

CAPACITIES = {"trades": 1 << 16, "orderbook_l2": 1 << 16, "bbo": 1 << 16, "tickers": 1 << 12, "candles": 1 << 12}
FEEDS = tuple(CAPACITIES)


@contextmanager
def ring_directory() -> Iterator[Path]:
    """A directory in memory where there is one: rings on a disk would measure the disk."""
    base = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="mdbench-", dir=base if base.is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def quiet_gc() -> Iterator[None]:
    """As the connector runs: no collections."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def smallest(call: Callable[[Any], object], items: Sequence[Any], chunk: int, budget_s: float) -> float:
    """ns per call: the smallest mean over chunks of `items`, taken for at most `budget_s`, each item at most once."""
    clock, best = time.perf_counter_ns, float("inf")
    deadline = clock() + int(budget_s * 1e9)
    for start in range(0, len(items) - chunk + 1, chunk):
        part = items[start : start + chunk]
        began = clock()
        for item in part:
            call(item)
        ended = clock()
        best = min(best, (ended - began) / chunk)
        if ended > deadline:
            break
    return best


def again(call: Callable[[Any], object], items: Sequence[Any], chunk: int, budget_s: float) -> float:
    """As `smallest`, over the items again and again."""
    clock, best = time.perf_counter_ns, float("inf")
    deadline = clock() + int(budget_s * 1e9)
    while True:
        best = min(best, smallest(call, items, chunk, budget_s))
        if clock() > deadline:
            return best


def beside_reference(call: Callable[[Any], object], items: Sequence[Any], chunk: int) -> tuple[float, float]:
    """CPU ns per call, the smallest mean over chunks of `items`, each item once; and nominal ns: the median of how each
    chunk compares to a chunk of reference decodes right before it, in ns of the machine of the targets.
    """
    clock, reference, means, ratios = time.thread_time_ns, machine.Reference(), [], []
    for start in range(0, len(items) - chunk + 1, chunk):
        part, decode_ns = items[start : start + chunk], reference.decode_ns()
        began = clock()
        for item in part:
            call(item)
        means.append((clock() - began) / chunk)
        ratios.append(means[-1] / decode_ns)
    return min(means), float(np.median(ratios)) * machine.NOMINAL_DECODE_NS


def calibration(budget_s: float) -> dict[str, float]:
    """How much slower this machine is than the one that the targets were set on: at its best, and as it mostly was."""
    reference = machine.Reference()
    with quiet_gc():
        found, deadline = [reference.decode_ns()], time.monotonic() + budget_s
        while time.monotonic() < deadline:
            found.append(reference.decode_ns())
    return {
        "best_ns": min(found), "median_ns": float(np.median(found)), "nominal_ns": machine.NOMINAL_DECODE_NS,
        "factor": float(np.median(found)) / machine.NOMINAL_DECODE_NS,
    }  # fmt: skip


# Ring


def ring(budget_s: float) -> dict[str, float]:
    """ns per row."""
    row = (1, 2, 3, 4, 5, 0, 1, 1, 1, 61837.63, 0.5, 1000, b"")
    found: dict[str, float] = {}
    with ring_directory() as path, quiet_gc():
        writer = RingWriter(path, TRADES, exchange="BINANCE_SPOT", connector="bench", capacity=1 << 16)
        writer.code("BTCUSDT")
        found["append"] = again(lambda _: writer.append(row), range(2000), 500, budget_s)
        block = np.zeros(1024, TRADES.dtype)
        found["append_rows (1024 at once)"] = again(lambda _: writer.append_rows(block), range(20), 5, budget_s) / 1024
        found["seal (CRC32, blocks)"] = _seal(writer, block, budget_s)
        while writer.next <= writer.capacity:  # else nothing could be lapped
            writer.append_rows(block)
        reader = RingReader(path, "trades")
        for rows in (1, 64, 1024, 16384):
            found[f"read ({rows} at once)"] = _read(reader, rows, budget_s) / rows
        found["read_sealed (16384 at once)"] = _read(reader, 16384, budget_s, sealed=True) / 16384
        found["lapped, noticed and skipped (per call)"] = _lap(reader, budget_s)
        reader.close()
        writer.close()
    return found


def _seal(writer: RingWriter, block: Any, budget_s: float) -> float:
    best, deadline = float("inf"), time.monotonic() + budget_s
    while time.monotonic() < deadline:
        writer.append_rows(block)
        began = time.perf_counter_ns()
        writer.seal()
        best = min(best, (time.perf_counter_ns() - began) / len(block))
    return best


def _read(reader: RingReader, rows: int, budget_s: float, *, sealed: bool = False) -> float:
    read = reader.read_sealed if sealed else reader.read
    newest = reader.published - (1 << 15)

    def one(_: int) -> None:
        reader.position = newest
        if len(read(rows)) < rows:
            raise AssertionError("the ring did not give the rows that it holds")

    return again(one, range(40), 10, budget_s)


def _lap(reader: RingReader, budget_s: float) -> float:
    """What it costs a reader to find out that it was lapped, and by how much."""

    def one(_: int) -> None:
        reader.position = 0
        reader.read(1)

    before = reader.lapped
    ns = again(one, range(200), 50, budget_s)
    if reader.lapped == before:
        raise AssertionError("nothing was lapped: the ring is larger than what was written")
    return ns


# Decode


def decode(budget_s: float) -> list[dict[str, Any]]:
    """ns per frame: the venue's decoder (numbers become floats, bounds are checked) beside parsers without types."""
    untyped = msgspec.json.Decoder().decode
    cases: list[tuple[str, Callable[[bytes], object], list[bytes]]] = [
        ("binance trade", binance._decode_trade, list(frames.binance_trades(200))),
        ("binance bookTicker", binance._decode_book_ticker, list(frames.binance_book_tickers(200))),
        ("binance depth 2x20", binance._decode_depth, list(frames.binance_depths(200))),
        ("binance 24h ticker", binance._decode_ticker, [frames.binance_ticker()] * 200),
        ("binance kline", binance._decode_kline, [frames.binance_kline()] * 200),
        ("deribit trade", deribit._decode_trades, list(frames.deribit_trades(200))),
        ("deribit book 2x20", deribit._decode_book, list(frames.deribit_books(201))[1:]),
        ("deribit quote", deribit._decode_quote, list(frames.deribit_quotes(200))),
        ("deribit ticker", deribit._decode_ticker, [frames.deribit_ticker()] * 200),
    ]
    found = []
    with quiet_gc():
        for name, typed, items in cases:
            row: dict[str, Any] = {"frame": name, "bytes": round(sum(map(len, items)) / len(items))}
            parsers = {"msgspec typed": typed, "msgspec untyped": untyped, "orjson": orjson.loads, "json": json.loads}
            for parser, call in parsers.items():
                row[parser] = again(call, items, 20, budget_s / len(parsers))
            found.append(row)
    return found


# Hot path


def hot_path(budget_s: float, count: int) -> list[dict[str, Any]]:
    """ns per frame from the payload to the row that readers see, beside the decoder alone on the same frames.

    Every frame is new: ids go on, books change, rows are written to a ring that wraps.
    """
    books = list(frames.deribit_books(count // 10))
    snapshot = SNAPSHOT_URL, frames.binance_snapshot()
    cases: list[tuple[str, type[Venue], Any, Snapshot | None, list[bytes]]] = [
        ("binance trade", binance.BinanceSpot, binance._decode_trade, None, list(frames.binance_trades(count))),
        ("binance bookTicker", binance.BinanceSpot, binance._decode_book_ticker, None, list(frames.binance_book_tickers(count))),
        ("binance depth 2x20", binance.BinanceSpot, binance._decode_depth, snapshot, list(frames.binance_depths(count // 10))),
        ("binance 24h ticker", binance.BinanceSpot, binance._decode_ticker, None, [frames.binance_ticker()] * (count // 5)),
        ("deribit trade", deribit.Deribit, deribit._decode_trades, None, list(frames.deribit_trades(count // 2))),
        ("deribit book 2x20", deribit.Deribit, deribit._decode_book, None, books),
        ("deribit quote", deribit.Deribit, deribit._decode_quote, None, list(frames.deribit_quotes(count // 2))),
    ]  # fmt: skip
    recorded = frames.recorded_depth(count // 5)
    found = [_hot_case(budget_s, *case) for case in cases]
    return found if recorded is None else [*found, _recorded(*recorded)]


def venues(budget_s: float, count: int) -> list[dict[str, Any]]:
    """ns per frame from payload to rows on every venue, beside parsers without types on the same frames."""
    untyped, found = msgspec.json.Decoder().decode, []
    for name, makers in frames.VENUES.items():
        for what, make, number in zip(("trade", "book 2x20"), makers, (count, count // 10), strict=True):
            items = list(make(number))
            url = frames.SNAPSHOT_URLS.get(name) if what != "trade" else None
            snapshot = (url, frames.binance_snapshot()) if url is not None else None
            case = f"{name} {what}"
            row = _hot_case(budget_s, case, venue_class(name), untyped, snapshot, items)
            with quiet_gc():
                orjson_ns = again(orjson.loads, items[1:401], 20, budget_s)
            base = found[len(found) % 2]["nominal"] if len(found) >= 2 else row["nominal"]
            found.append(
                {
                    "frame": case, "rows": row["rows"], "msgspec untyped": row["decode"], "orjson": orjson_ns,
                    "total": row["total"], "nominal": row["nominal"], "to_binance_spot": row["nominal"] / base,
                }
            )  # fmt: skip
    return found


Snapshot = tuple[str, bytes]  # the URL that was asked, and its answer


@contextmanager
def _live(
    name: str, kind: type[Venue], snapshot: Snapshot | None, first: Sequence[bytes]
) -> Iterator[tuple[Emit, Venue]]:
    """A venue whose streams are known and whose books are live; fails when it refuses a frame meanwhile."""
    with ring_directory() as path:
        emit = Emit(path, "bench", kind.EXCHANGE, FEEDS, capacities=CAPACITIES, semaphore=False)
        venue = kind(emit, Options(), [], open_world=True)
        emit.packet(time.time_ns(), emit.clock())
        for item in first:
            venue.decode(item)
        if snapshot is not None:
            venue.http(*snapshot)
        with quiet_gc():
            emit.packet(time.time_ns(), emit.clock())
            yield emit, venue
        invalid = [ticker for ticker, book in venue.books.items() if book.state != "live"]
        refused = [key for key in emit.counters if key.startswith(("refused", "gap"))]
        if invalid or refused:
            raise AssertionError(f"{name}: books {invalid} not live, counters {refused}")
        emit.close()


def _rows(emit: Emit) -> int:
    return sum(ring.next for ring in emit.rings.values())


def _hot_case(
    budget_s: float, name: str, kind: type[Venue], decoder: Any, snapshot: Snapshot | None, items: list[bytes]
) -> dict[str, Any]:
    chunk, rest = 20 if "2x20" in name else 100, items[1:]
    with _live(name, kind, snapshot, items[:1]) as (emit, venue):
        decode_ns = again(decoder, rest[:400], chunk, budget_s)
        before = _rows(emit)
        emit.packet(time.time_ns(), emit.clock())
        full_ns, nominal_ns = beside_reference(venue.decode, rest, chunk)
        rows = (_rows(emit) - before) / (len(rest) // chunk * chunk)
    return {
        "frame": name, "rows": rows, "decode": decode_ns, "total": full_ns, "nominal": nominal_ns,
        "ratio": full_ns / decode_ns,
    }  # fmt: skip


PASSES = 3
SNAPSHOT_URL = frames.SNAPSHOT_URLS["binance_spot"]


def _recorded(snapshot: bytes, items: list[bytes]) -> dict[str, Any]:
    """Recorded frames differ in size: the mean over all of them, of each chunk the quickest of some passes; nominal, the
    median of them.
    """
    name, decoder, chunk, clock = "binance depth, recorded", binance._decode_depth, 20, time.thread_time_ns
    first, rest, reference = items[:5], items[5:], machine.Reference()
    passes = []
    for _ in range(PASSES):
        with _live(name, binance.BinanceSpot, (SNAPSHOT_URL, snapshot), first) as (emit, venue):
            before, times = _rows(emit), []
            for start in range(0, len(rest) - chunk + 1, chunk):
                part, reference_ns = rest[start : start + chunk], reference.decode_ns()
                began = clock()
                for item in part:
                    decoder(item)
                between = clock()
                for item in part:
                    venue.decode(item)
                full_ns = clock() - between
                times.append((between - began, full_ns, full_ns / reference_ns))
            rows = (_rows(emit) - before) / (len(times) * chunk)
        passes.append(times)
    decode_ns, full_ns, _ = (np.min(passes, axis=0).mean(axis=0) / chunk).tolist()
    nominal_ns = float(np.median(passes, axis=0).mean(axis=0)[2]) / chunk * machine.NOMINAL_DECODE_NS
    return {
        "frame": name, "rows": rows, "decode": decode_ns, "total": full_ns, "nominal": nominal_ns,
        "ratio": full_ns / decode_ns,
    }  # fmt: skip
