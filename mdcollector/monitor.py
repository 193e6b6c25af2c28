"""The monitor: one process that reads all stats pages and ring headers and tells the world. Nothing is added to hot paths.

Once a second it looks at the fleet (`supervisor.status`), judges it (`health`), writes a line per connector into
`metrics.csv` and passes the findings to `alerts`. Over HTTP, on loopback unless told otherwise, it serves

    /metrics           Prometheus exposition, made anew from the last look at each scrape
    /health            200 while the monitor itself looks, with the state of everything as JSON
    /ready             200 when no process is down, else 503
    /health/NAME       one process: 200 ok or degraded, 503 down, 404 unknown; with the reasons, those of who drains
                       its rings and of the disks among them
"""

import asyncio
import csv
import importlib.metadata
import io
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import msgspec
import psutil
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from mdcollector.alerts import Alerts, Messenger
from mdcollector.config import MonitorConfig
from mdcollector.errors import ConfigError
from mdcollector.health import DISK_FREE_LEAST, DOWN, KINDS, Finding, concerning, counts_holes, judge, state_of
from mdcollector.records import ALWAYS_ON, FEEDS, TRADES
from mdcollector.stats import HISTOGRAM_BOUNDS_NS, notify_alive
from mdcollector.supervisor import status

log = logging.getLogger(__name__)

LOOK_S = 1.0
WINDOW_S = 60.0  # what is counted is judged by its growth within this time
TOP_STREAMS = 20  # streams that are shown one by one: those that have been silent the longest
CSV_BYTES_MAX, CSV_FILES = 64 << 20, 5
CSV_COLUMNS = (
    "time", "connector", "state", "trade_count", "trade_bytes", "rows", "packets", "recv_to_write_avg_us",
    "recv_to_write_max_us", "writer_seq", "writer_lag_rows", "dedupe_count", "lap_count", "gap_count", "refused_count",
    "reconnects", "books_invalid", "rss_bytes", "cpu_share",
    "clock_offset_us", "clock_uncertainty_us",
)  # fmt: skip


class View(msgspec.Struct):
    """One look at the fleet."""

    time: float  # s since the epoch
    found: dict[str, Any]
    findings: list[Finding]
    cpu_s: dict[str, float]  # process -> seconds of CPU since it started
    rss: dict[str, int]  # process -> resident bytes
    disks: dict[str, tuple[int, int]]  # directory -> free and total bytes


def pages(found: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Role, name and page of every process that has one."""
    for role in ("connector", "arbiter", "writer"):
        for name, page in found[f"{role}s"].items():
            yield role, name, page


def look(rings: Path, disks: Sequence[Path], before: View | None) -> View:
    """Read everything there is to read."""
    found = status(rings)
    findings = judge(found, before.found if before is not None else None)
    cpu_s: dict[str, float] = {}
    rss: dict[str, int] = {}
    for _, name, page in pages(found):
        try:
            process = psutil.Process(page["pid"])
            with process.oneshot():
                times = process.cpu_times()
                cpu_s[name], rss[name] = times.user + times.system, process.memory_info().rss
        except psutil.Error:
            continue  # it is gone: the age of its page says so
    room = {}
    for directory in dict.fromkeys((rings, *disks)):
        try:
            usage = shutil.disk_usage(directory)
        except OSError as error:
            findings.append(Finding("disk_low", str(directory), f"cannot be looked at: {error.strerror}"))
            continue
        room[str(directory)] = usage.free, usage.total
        if usage.free < DISK_FREE_LEAST * usage.total:
            text = f"{usage.free / 2**20:,.0f} MiB of {usage.total / 2**20:,.0f} MiB are free"
            findings.append(Finding("disk_low", str(directory), text))
    return View(time.time(), found, findings, cpu_s, rss, room)


# Prometheus


class Exposition(Collector):
    """The newest view as metrics; base units, counters end in `_total`, no label of unbounded values but the top few."""

    def __init__(self) -> None:
        self.view: View | None = None
        self.messenger: Messenger | None = None

    def collect(self) -> Iterable[Metric]:
        version = importlib.metadata.version("mdcollector")
        build = GaugeMetricFamily("mdcollector_build_info", "Version that runs; always 1.", labels=["version"])
        build.add_metric([version], 1)
        yield build
        if self.view is None:
            return
        yield from _process_metrics(self.view)
        yield from _connector_metrics(self.view.found["connectors"])
        yield from _arbiter_metrics(self.view.found["arbiters"])
        yield from _writer_metrics(self.view.found["writers"])
        disk = GaugeMetricFamily("mdcollector_disk_free_bytes", "Free bytes of a disk.", labels=["path"])
        size = GaugeMetricFamily("mdcollector_disk_size_bytes", "Size of a disk.", labels=["path"])
        for path, (free, total) in self.view.disks.items():
            disk.add_metric([path], free)
            size.add_metric([path], total)
        yield from (disk, size)
        finding = GaugeMetricFamily(
            "mdcollector_finding",
            "How many things of this kind are not well with a process.",
            labels=["kind", "process"],
        )
        kinds = [(f.kind, f.process) for f in self.view.findings]
        for kind, process in dict.fromkeys(kinds):
            finding.add_metric([kind, process], kinds.count((kind, process)))
        yield finding
        if self.messenger is not None:
            notices = CounterMetricFamily("mdcollector_notices", "Notices by what became of them.", labels=["outcome"])
            for outcome, count in self.messenger.counters.items():
                notices.add_metric([outcome], count)
            yield notices


def _process_metrics(view: View) -> Iterable[Metric]:
    up = GaugeMetricFamily("mdcollector_up", "1 while a process publishes its page.", labels=["process", "role"])
    age = GaugeMetricFamily("mdcollector_page_age_seconds", "Age of the page of a process.", labels=["process"])
    cpu = CounterMetricFamily("mdcollector_process_cpu_seconds", "CPU used by a process.", labels=["process"])
    rss = GaugeMetricFamily("mdcollector_process_resident_bytes", "Resident memory.", labels=["process"])
    starts = CounterMetricFamily("mdcollector_process_starts", "Starts by the supervisor.", labels=["process"])
    dead = {finding.process for finding in view.findings if finding.kind == "dead"}
    for role, name, page in pages(view.found):
        up.add_metric([name, role], name not in dead and page["state"] != "stopped")
        age.add_metric([name], page["age_s"])
    for name, seconds in view.cpu_s.items():
        cpu.add_metric([name], seconds)
        rss.add_metric([name], view.rss[name])
    for name, process in ((view.found["supervisor"] or {}).get("processes") or {}).items():
        starts.add_metric([name], process["starts"])
    return up, age, cpu, rss, starts


def _histogram(name: str, doc: str, label: str, of: Mapping[str, Mapping[str, Any]]) -> HistogramMetricFamily:
    """Latencies of each process; every fourth bound is enough for a dashboard, 12 buckets for 3 s."""
    family = HistogramMetricFamily(name, doc, labels=[label])
    for process, numbers in of.items():
        bounds = numbers.get("bounds_ns", HISTOGRAM_BOUNDS_NS)
        running, buckets = 0, []
        for i, count in enumerate(numbers["counts"][: len(bounds)]):
            running += count
            if i % 4 == 3:
                buckets.append((repr(bounds[i] / 1e9), running))
        buckets.append(("+Inf", numbers["count"]))
        family.add_metric([process], buckets, numbers["sum_ns"] / 1e9)
    return family


def _connector_metrics(connectors: Mapping[str, dict[str, Any]]) -> Iterable[Metric]:
    rows = CounterMetricFamily("mdcollector_ring_rows", "Rows published.", labels=["connector", "feed"])
    gaps = CounterMetricFamily("mdcollector_gaps", "Holes told, by feed and cause.", labels=["connector", "gap"])
    refused = CounterMetricFamily("mdcollector_refused_frames", "Frames refused.", labels=["connector", "reason"])
    events = CounterMetricFamily(
        "mdcollector_events", "Everything else that is counted.", labels=["connector", "event"]
    )
    connected = GaugeMetricFamily("mdcollector_connected", "1 while connected.", labels=["connector", "exchange"])
    data = GaugeMetricFamily("mdcollector_last_row_timestamp_seconds", "When the last row came.", labels=["connector"])
    books = GaugeMetricFamily("mdcollector_books", "Books by state.", labels=["connector", "state"])
    fetches = GaugeMetricFamily("mdcollector_fetches_waiting", "REST requests that wait.", labels=["connector"])
    silent = GaugeMetricFamily(
        "mdcollector_stream_silence_seconds", f"The {TOP_STREAMS} streams without data for longest.",
        labels=["connector", "stream"],
    )  # fmt: skip
    offset = GaugeMetricFamily(
        "mdcollector_clock_offset_seconds", "Venue's clock minus this machine's.", labels=["connector", "source"]
    )
    unsure = GaugeMetricFamily(
        "mdcollector_clock_uncertainty_seconds", "The true offset is at most so far from that; +Inf = only a bound.",
        labels=["connector"],
    )  # fmt: skip
    silences: list[tuple[float, str, str]] = []
    for name, page in connectors.items():
        for feed, ring in page["rings"].items():
            rows.add_metric([name, feed], ring["published"])
        for key, count in page["counters"].items():
            if key.startswith("gap_"):
                gaps.add_metric([name, key.removeprefix("gap_")], count)
            elif key.startswith("refused_"):
                refused.add_metric([name, key.removeprefix("refused_")], count)
            else:
                events.add_metric([name, key], count)
        connected.add_metric([name, page["exchange"]], page["state"] in ("connected", "polling"))
        data.add_metric([name], page["data_ns"] / 1e9)
        books.add_metric([name, "live"], page["books"] - page["books_invalid_count"])
        books.add_metric([name, "invalid"], page["books_invalid_count"])
        fetches.add_metric([name], page["fetches_waiting"])
        if (clock := page.get("clock", {})).get("offset_us") is not None:
            offset.add_metric([name, clock["source"]], clock["offset_us"] / 1e6)
            unsure_us = clock["uncertainty_us"]
            unsure.add_metric([name], math.inf if unsure_us is None else unsure_us / 1e6)
        now_ns = page["time_ns"]
        silences += [
            ((now_ns - max(s["data_ns"], s["acknowledged_ns"])) / 1e9, name, stream)
            for stream, s in page["streams"].items()
            if s["acknowledged_ns"]
        ]
    for seconds, name, stream in sorted(silences, reverse=True)[:TOP_STREAMS]:
        silent.add_metric([name, stream], max(0.0, seconds))
    live = {name: page for name, page in connectors.items() if "publish_ns" in page}
    parse = _histogram(
        "mdcollector_receive_to_parse_seconds", "Packet read until decoded.", "connector",
        {name: page["parse_ns"] for name, page in live.items()},
    )  # fmt: skip
    visible = _histogram(
        "mdcollector_receive_to_visible_seconds", "Packet read until the row was visible in the ring.", "connector",
        {name: page["publish_ns"] for name, page in live.items()},
    )  # fmt: skip
    return rows, gaps, refused, events, connected, data, books, fetches, silent, offset, unsure, parse, visible


def _arbiter_metrics(arbiters: Mapping[str, dict[str, Any]]) -> Iterable[Metric]:
    read = CounterMetricFamily("mdcollector_leg_rows", "Rows read of a leg.", labels=["arbiter", "leg", "feed"])
    copies = CounterMetricFamily(
        "mdcollector_leg_duplicate_rows",
        "Rows of a leg that another one had brought.",
        labels=["arbiter", "leg", "feed"],
    )
    alive = GaugeMetricFamily("mdcollector_leg_alive", "1 while a leg lives.", labels=["arbiter", "leg"])
    for name, page in arbiters.items():
        for leg, numbers in page["legs"].items():
            alive.add_metric([name, leg], numbers["alive"])
            for feed, n in numbers["feeds"].items():
                read.add_metric([name, leg, feed], n["read"])
                copies.add_metric([name, leg, feed], n["duplicates"])
    return read, copies, alive


def _writer_metrics(writers: Mapping[str, dict[str, Any]]) -> Iterable[Metric]:
    labels = ["writer", "stream"]
    durable = CounterMetricFamily("mdcollector_durable_rows", "Rows of a ring that are durable.", labels=labels)
    lag = GaugeMetricFamily("mdcollector_writer_lag_rows", "Rows published and not yet durable.", labels=labels)
    share = GaugeMetricFamily("mdcollector_writer_lag_ratio", "The same as a share of the ring.", labels=labels)
    lapped = CounterMetricFamily(
        "mdcollector_lapped_rows", "Rows lost: overwritten before they were read.", labels=labels
    )
    damaged = CounterMetricFamily("mdcollector_damaged_rows", "Rows lost: damaged in the ring.", labels=labels)
    size = CounterMetricFamily("mdcollector_written_bytes", "Bytes of files written.", labels=labels)
    files = CounterMetricFamily("mdcollector_written_files", "Files written.", labels=labels)
    errors = CounterMetricFamily("mdcollector_writer_errors", "Errors of a sink.", labels=["writer", "error"])
    for name, page in writers.items():
        for stream, n in page["streams"].items():
            durable.add_metric([name, stream], n["durable"])
            lag.add_metric([name, stream], n["lag_rows"])
            share.add_metric([name, stream], n["lag_share"])
            lapped.add_metric([name, stream], n["lapped"])
            damaged.add_metric([name, stream], n["damaged"])
            size.add_metric([name, stream], n["bytes"])
            files.add_metric([name, stream], n["files"])
        for kind, count in page["errors"].items():
            errors.add_metric([name, kind], count)
    persisted = _histogram(
        "mdcollector_receive_to_persisted_seconds", "Packet read until the row was durable.", "writer",
        {name: page["persisted"] for name, page in writers.items()},
    )  # fmt: skip
    return durable, lag, share, lapped, damaged, size, files, errors, persisted


def rules() -> str:
    """The alerts of this program as rules for Prometheus: a finding of each kind that lasts as long as it may not."""
    alerts = [
        {
            "alert": "Mdcollector" + "".join(word.title() for word in name.split("_")),
            "expr": f'max by (process) (mdcollector_finding{{kind="{name}"}}) > 0',
            **({"for": f"{kind.for_s:.0f}s"} if kind.for_s else {}),
            "labels": {"severity": "critical" if kind.state == DOWN else "warning"},
            "annotations": {"summary": "{{ $labels.process }}: " + kind.meaning, "description": kind.advice},
        }
        for name, kind in KINDS.items()
    ]
    alerts.append(
        {
            "alert": "MdcollectorMonitorDown",
            "expr": "absent(mdcollector_build_info)",
            "for": "1m",
            "labels": {"severity": "critical"},
            "annotations": {"summary": "the monitor is not scraped", "description": "start mdcollector monitor"},
        }
    )
    return msgspec.yaml.encode({"groups": [{"name": "mdcollector", "rules": alerts}]}).decode()


# metrics.csv


class MetricsCsv(RotatingFileHandler):
    """A line per connector and second; a new file, with its head, when one is full."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        super().__init__(path, maxBytes=CSV_BYTES_MAX, backupCount=CSV_FILES, encoding="utf-8")

    def _open(self) -> io.TextIOWrapper:
        stream = super()._open()
        if not stream.tell():
            csv.writer(stream).writerow(CSV_COLUMNS)
        return stream

    def write(self, rows: Iterable[Sequence[object]]) -> None:
        """Append the rows and let readers see them. OSError when the disk is full."""
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        line = logging.makeLogRecord({"msg": text.getvalue().rstrip("\r\n")})
        if self.shouldRollover(line):
            self.doRollover()
        assert self.stream is not None
        self.stream.write(text.getvalue())
        self.stream.flush()


def csv_rows(view: View, before: View | None) -> Iterator[tuple[object, ...]]:
    """What happened between two looks, a row per connector; counts are of this time only."""
    writers = [page for _, page in view.found["writers"].items()]
    for name, page in view.found["connectors"].items():
        earlier = (before.found["connectors"].get(name) if before is not None else None) or {}
        if earlier.get("pid") != page["pid"]:
            earlier = {}
        trades = _grown(page, earlier, "rings", TRADES.name, "published")
        streams = [n for writer in writers for s, n in writer["streams"].items() if s.rpartition("/")[0] == name]
        latency, then = page["publish_ns"], earlier.get("publish_ns") or {"count": 0, "sum_ns": 0}
        count = latency["count"] - then["count"]
        counters = page["counters"]
        was = earlier.get("counters", {})
        cpu = view.cpu_s.get(name, 0.0) - (before.cpu_s.get(name, 0.0) if before is not None else 0.0)
        yield (
            f"{view.time:.3f}", name, page["state"], trades, trades * FEEDS[TRADES.name].dtype.itemsize,
            sum(_grown(page, earlier, "rings", feed, "published") for feed in page["rings"] if feed not in ALWAYS_ON),
            max(0, page["packets"] - earlier.get("packets", 0)),
            round((latency["sum_ns"] - then["sum_ns"]) / count / 1000, 2) if count else 0,
            _highest(latency["counts"], then.get("counts")) / 1000,
            max((n["durable"] for n in streams), default=0),
            sum(n["lag_rows"] for n in streams),
            sum(n - was.get(key, 0) for key, n in counters.items() if "duplicate" in key),
            sum(n["lapped"] for n in streams),
            sum(n - was.get(key, 0) for key, n in counters.items() if counts_holes(key)),
            sum(n - was.get(key, 0) for key, n in counters.items() if key.startswith("refused_")),
            counters.get("connections", 0) - was.get("connections", 0),
            page["books_invalid_count"], view.rss.get(name, 0),
            round(cpu / (view.time - before.time), 4) if before is not None and view.time > before.time else 0,
            page.get("clock", {}).get("offset_us"), page.get("clock", {}).get("uncertainty_us"),
        )  # fmt: skip


def _grown(page: Mapping[str, Any], earlier: Mapping[str, Any], *keys: str) -> int:
    now: Any = page
    then: Any = earlier
    for key in keys:
        now = now.get(key, {}) if isinstance(now, dict) else {}
        then = then.get(key, {}) if isinstance(then, dict) else {}
    return (now or 0) - (then or 0) if earlier else 0


def _highest(counts: Sequence[int], then: Sequence[int] | None) -> int:
    """Upper bound, in ns, of the highest bucket that grew."""
    for i in range(len(counts) - 1, -1, -1):
        if counts[i] > (then[i] if then else 0):
            return HISTOGRAM_BOUNDS_NS[min(i, len(HISTOGRAM_BOUNDS_NS) - 1)]
    return 0


# The process


class Monitor:
    """Looks, judges, serves and tells until `stop` is set."""

    def __init__(self, rings: Path, settings: MonitorConfig, disks: Sequence[Path], messenger: Messenger) -> None:
        self._rings, self._settings, self._disks, self._messenger = rings, settings, disks, messenger
        self._alerts = Alerts(settings.group_s, settings.cooldown_s)
        self._exposition = Exposition()
        self._exposition.messenger = messenger
        self._registry = CollectorRegistry()
        self._registry.register(self._exposition)
        self._views: deque[View] = deque()
        self._csv: MetricsCsv | None = None
        self._csv_broken = False
        self.stop = asyncio.Event()
        self.port = 0

    @property
    def view(self) -> View | None:
        """The last look."""
        return self._exposition.view

    def look(self) -> View:
        """One look; findings that are counted are judged over the last minute."""
        now = time.time()
        while len(self._views) > 1 and self._views[1].time <= now - WINDOW_S:
            self._views.popleft()
        view = look(self._rings, self._disks, self._views[0] if self._views else None)
        before = self._views[-1] if self._views else None
        self._views.append(view)
        self._exposition.view = view
        self._write_csv(view, before)
        return view

    def _write_csv(self, view: View, before: View | None) -> None:
        if not self._settings.csv:
            return
        try:
            if self._csv is None:
                self._csv = MetricsCsv(Path(self._settings.csv))
            self._csv.write(csv_rows(view, before))
            self._csv_broken = False
        except OSError as error:
            view.findings.append(Finding("disk_low", "monitor", f"{self._settings.csv}: {error.strerror}"))
            if not self._csv_broken:
                log.error("%s: not written: %s", self._settings.csv, error.strerror)
            self._csv_broken = True

    async def run(self) -> None:
        """Serve until `stop` is set. ConfigError when the address cannot be had."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._metrics), web.get("/health", self._health), web.get("/ready", self._ready),
                web.get("/health/{name}", self._health_of),
            ]
        )  # fmt: skip
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        host, _, port = self._settings.listen.rpartition(":")
        try:
            await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(f"monitor.listen = {self._settings.listen!r}: {os.strerror(error.errno or 0)}") from error
        self.port = int(runner.addresses[0][1])
        telling = asyncio.create_task(self._messenger.run())
        log.info("monitor: serving on %s:%d", host, self.port)
        try:
            while not self.stop.is_set():
                began = time.monotonic()
                view = await asyncio.to_thread(self.look)
                notify_alive()
                if notice := self._alerts.update(view.findings, time.monotonic()):
                    self._messenger.tell(notice)
                try:
                    await asyncio.wait_for(self.stop.wait(), max(0.05, LOOK_S - (time.monotonic() - began)))
                except TimeoutError:
                    continue
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await runner.cleanup()
            if self._csv is not None:
                self._csv.close()

    # HTTP

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _health(self, _: web.Request) -> web.Response:
        view = self.view
        if view is None:
            return _json({"state": "starting"}, 503)
        names = {name for _, name, _ in pages(view.found)} | {f.process for f in view.findings}
        each = {name: state_of([f for f in view.findings if f.process == name]) for name in sorted(names)}
        return _json({"state": state_of(view.findings), "age_s": round(time.time() - view.time, 3), "processes": each})

    async def _ready(self, _: web.Request) -> web.Response:
        view = self.view
        if view is None:
            return _json({"ready": False, "reasons": ["the monitor has not looked yet"]}, 503)
        reasons = [str(f) for f in view.findings if f.state == DOWN]
        return _json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def _health_of(self, request: web.Request) -> web.Response:
        name, view = request.match_info["name"], self.view
        known = {found: page for _, found, page in pages(view.found)} if view is not None else {}
        if view is None or name not in known:
            return _json({"error": f"no process {name!r}", "processes": sorted(known)}, 404)
        findings = concerning(view.findings, name)
        reasons = [{"kind": f.kind, "text": f.text, "advice": KINDS[f.kind].advice} for f in findings]
        state, page = state_of(findings), known[name]
        body = {
            "name": name,
            "state": state,
            "process_state": page["state"],
            "reasons": reasons,
            "age_s": page["age_s"],
        }
        return _json(body, 503 if state == DOWN else 200)


def _json(body: Mapping[str, object], http_status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=http_status, content_type="application/json")
