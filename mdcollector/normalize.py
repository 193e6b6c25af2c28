"""Normalize: recorded frames through the very same decode, book, ring and writer path, as fast as it goes.

Run by `mdcollector normalize`. Deterministic: the clock is the recording's, stage times are zero, the epoch is the
time of the first entry, so the same input gives byte-identical rows.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from mdcollector.emit import Emit
from mdcollector.errors import ConfigError, FrameError, RateLimited
from mdcollector.exchanges import Options, Venue, venue_class
from mdcollector.recording import Entry, read_recording
from mdcollector.writer import Report as WriterReport
from mdcollector.writer import Writer

CAPACITIES = {"trades": 1 << 17, "orderbook_l2": 1 << 18, "bbo": 1 << 17}  # drained as it goes: small rings do
BAD_LINES_KEPT = 100
DRAIN_SHARE = 8  # a ring is drained when this part of it is new
# Frames that are refused for these reasons are no loss: nothing of them belongs into a table.
HARMLESS = frozenset({"unhandled_event", "unhandled_stream", "unhandled_channel", "unhandled_url", "venue_error"})


class Report(msgspec.Struct):
    """What a run came to."""

    entries: int
    rows: dict[str, int]
    rows_written: int
    rows_left: int
    gaps: int
    counters: dict[str, int]
    samples: dict[str, str]
    bad_lines: list[str]  # the first ones
    bad_lines_count: int
    files: int

    @property
    def findings(self) -> list[str]:
        """Everything that keeps the run from being clean, in words."""
        found = [f"rows of the table gaps that tell of holes: {self.gaps}"] if self.gaps else []
        found += [f"{self.rows_left} rows could not be written"] if self.rows_left else []
        found += ["no row came of it: is it a recording of this exchange?"] if not any(self.rows.values()) else []
        found += [f"unreadable line {line}" for line in self.bad_lines]
        if more := self.bad_lines_count - len(self.bad_lines):
            found.append(f"{more} more unreadable lines")
        for name, count in self.counters.items():
            reason = name.removeprefix("refused_")
            if name.startswith("refused_") and reason not in HARMLESS:
                found.append(f"{count} frames refused: {reason}")
        return found


def normalize(
    exchange: str,
    recordings: Sequence[Path],
    out: Path,
    *,
    connector: str = "",
    options: Options | None = None,
    on_progress: Callable[[Path, int], None] | None = None,
) -> Report:
    """Turn recordings, in the order given, into tables below `out`; `on_progress(recording, entries so far)`."""
    kind = venue_class(exchange)
    with tempfile.TemporaryDirectory(prefix="mdcollector-") as scratch:
        rings = Path(scratch)
        run = _Run(kind, rings, out, connector or exchange, options or Options(), _first_time_ns(recordings))
        for recording in recordings:
            run.venue.disconnected("recording")
            for entry in read_recording(recording, partial(run.bad_line, recording)):
                run.entry(entry)
                if on_progress is not None and run.report.entries % 2048 == 0:
                    on_progress(recording, run.report.entries)
        return run.finish()


def _first_time_ns(recordings: Sequence[Path]) -> int:
    why: list[str] = []

    def on_bad_line(number: int, reason: str) -> None:
        if not why:
            why.append(f"; line {number}: {reason}")

    for recording in recordings:
        for entry in read_recording(recording, on_bad_line):
            return entry.t
    raise ConfigError(f"nothing to normalize in {', '.join(str(r) for r in recordings)}{''.join(why)}")


class _Run:
    """One pass: a venue, its emitter, and a writer that drains in the same process."""

    def __init__(
        self, kind: type[Venue], rings: Path, out: Path, connector: str, options: Options, start_ns: int
    ) -> None:
        self.emit = Emit(
            rings,
            connector,
            kind.EXCHANGE,
            kind.FEEDS,
            capacities=CAPACITIES,
            clock=lambda: 0,
            replayed=True,
            epoch=start_ns // 1_000_000,
            semaphore=False,
        )
        self.venue = kind(self.emit, options, [], open_world=True)
        self.writer = Writer(rings, out, name="normalize", roll_s=float("inf"))
        self.report = Report(0, {}, 0, 0, 0, {}, {}, [], 0, 0)
        self._open: set[str] = set()
        self._drained = Counter[str]()

    def entry(self, entry: Entry) -> None:
        self.report.entries += 1
        self.emit.packet(entry.t, 0)
        raw = entry.raw.encode()
        try:
            if entry.dir == "in":
                self.venue.decode(raw)
            elif entry.dir == "http":
                self.venue.http(entry.url, raw)
            elif entry.dir == "open":
                if entry.conn in self._open:
                    self.venue.disconnected("reconnect")
                self._open.add(entry.conn)
        except (FrameError, msgspec.DecodeError, UnicodeDecodeError) as error:
            self.emit.refused_error(error, raw)
        except RateLimited as error:  # an answer that told the recorder to wait
            self.emit.refused("rate_limited", raw, str(error))
        self.venue.wants.clear()  # a recording answers what was asked when it was made
        self._drain_if_due()

    def bad_line(self, recording: Path, number: int, why: str) -> None:
        self.report.bad_lines_count += 1
        if len(self.report.bad_lines) < BAD_LINES_KEPT:
            self.report.bad_lines.append(f"{recording.name}:{number}: {why}")

    def _drain_if_due(self) -> None:
        if any(r.next - self._drained[n] > r.capacity // DRAIN_SHARE for n, r in self.emit.rings.items()):
            self.emit.tick()
            while self.writer.drain_once():
                continue
            self._drained.update({name: ring.next - self._drained[name] for name, ring in self.emit.rings.items()})

    def finish(self) -> Report:
        for _ in self.venue.finish():
            self._drain_if_due()
        self.emit.tick()
        self.emit.close()
        written: WriterReport = self.writer.finish()
        report = self.report
        snapshot: dict[str, Any] = self.emit.snapshot()
        report.rows = {name: ring["published"] for name, ring in snapshot["rings"].items()}
        report.rows_written = sum(stream.rows_written for stream in written.streams)
        report.rows_left = sum(stream.rows_left for stream in written.streams)
        report.files = sum(stream.files for stream in written.streams)
        report.gaps = report.rows["gaps"]
        report.counters, report.samples = snapshot["counters"], snapshot["samples"]
        return report
