"""The supervisor: plans a fleet, runs its processes, restarts what dies, stops it in order and proves what it wrote.

Run by `mdcollector up` and `mdcollector run`; systemd does the same job in production. Connectors and writers are
separate processes; this one only watches them.
"""

import asyncio
import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from mdcollector.config import ConnectorConfig, FleetConfig
from mdcollector.connector import rest_hosts, selection, venue_options
from mdcollector.errors import EXIT_CONFIG, ConfigError, Disconnected, FrameError, RateLimited, RingError
from mdcollector.exchanges import PAGES_MAX, InstrumentInfo, Stream, Venue, venue_class
from mdcollector.records import DATA_FEEDS, FEEDS
from mdcollector.ring import RingReader
from mdcollector.stats import StatsWriter, read_stats
from mdcollector.transport import get, open_session, tls_context

log = logging.getLogger(__name__)

RESTART_FIRST_S, RESTART_MOST_S = 0.5, 30.0
STEADY_S = 30.0  # a process that lived so long starts over with short waits
STOP_CONNECTOR_S, STOP_ARBITER_S, STOP_WRITER_S = 20.0, 40.0, 60.0
BEGIN_WRITER_S = 20.0
WATCH_S = 0.1
RESOLVE_TIMEOUT_S = 30.0


class Planned(msgspec.Struct):
    """One connection of the plan: the process `name` subscribes to `streams`."""

    name: str
    connector: str
    tickers: list[str]
    streams: list[Stream]
    takes_new: bool = True  # the last connection of its path: what is listed while it runs is its own


def resolve(where: str, settings: ConnectorConfig) -> list[str]:
    """Tickers of a connector, patterns resolved and names checked against the venue's list of instruments.

    Plain names go unchecked, with a warning, when the venue does not answer; patterns cannot do without it.
    """
    try:
        listed = asyncio.run(_instruments(settings))
    except (msgspec.DecodeError, FrameError) as error:
        raise ConfigError(f"{where}: the venue's list of instruments cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error
    except (Disconnected, RateLimited, aiohttp.ClientError, TimeoutError, OSError) as error:
        if selection(settings).needs_list:
            raise ConfigError(
                f"{where}.tickers: patterns and filters need the venue's list of instruments: {error}"
            ) from error
        log.warning("%s: tickers not checked, no list of instruments: %s", where, error)
        return list(dict.fromkeys(settings.tickers))
    try:
        selection(settings).check(listed)
        return selection(settings).chosen(listed)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error


async def _instruments(settings: ConnectorConfig) -> list[InstrumentInfo]:
    """What the venue lists now, all pages of it; the next host is asked where one does not answer."""
    kind = venue_class(settings.exchange)
    hosts = rest_hosts(settings, kind)
    secure = any(url.startswith("https") for url in hosts)
    tls = tls_context(Path(settings.ca_file) if settings.ca_file else None) if secure else None
    async with asyncio.timeout(RESOLVE_TIMEOUT_S), open_session(tls, kind.HTTP_HEADERS) as session:
        for host in hosts[:-1]:
            try:
                return await _pages(session, host.rstrip("/"), kind)
            except (Disconnected, aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("%s: no list of instruments: %s", host, error)
        return await _pages(session, hosts[-1].rstrip("/"), kind)


async def _pages(session: aiohttp.ClientSession, base: str, kind: type[Venue]) -> list[InstrumentInfo]:
    listed: list[InstrumentInfo] = []
    for first in kind.instruments_paths():
        path: str | None = first
        for _ in range(PAGES_MAX):
            if path is None:
                break
            status, body = await get(session, base + path, kind.RATE_LIMITED)
            if status >= 400:
                raise Disconnected(f"{base}{path}: HTTP {status}")
            listed += kind.instruments(body)
            path = kind.next_page(path, body)
        else:
            raise Disconnected(f"{base}{first}: more than {PAGES_MAX} pages of instruments")
    return listed


def plan(where: str, name: str, settings: ConnectorConfig, tickers: Sequence[str]) -> list[Planned]:
    """Connections of one connector; more than one are called NAME.1, NAME.2, ..."""
    try:
        kind = venue_class(settings.exchange)
        options = venue_options(settings, kind)
        connections = kind.plan(tickers, settings.feeds, options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    names = [name] if len(connections) == 1 else [f"{name}.{i}" for i in range(1, len(connections) + 1)]
    last_of = {streams[0].path: process for process, streams in zip(names, connections, strict=True)}
    return [
        Planned(process, name, list(dict.fromkeys(s.ticker for s in streams)), streams, process in last_of.values())
        for process, streams in zip(names, connections, strict=True)
    ]


def find_planned(
    where: str, name: str, fleet: FleetConfig, resolved: Path | None = None
) -> tuple[Planned, list[str], ConnectorConfig]:
    """The connection that the process `name` runs, the tickers of all connections, and the configuration.

    `resolved` is a list of tickers in JSON: what a supervisor has planned with stays the plan when a process begins
    anew, so that no two connections take the same instrument.
    """
    for connector, settings in fleet.connectors.items():
        if name != connector and name.rpartition(".")[0] != connector:
            continue
        place = f"{where}: connectors.{connector}"
        tickers = resolve(place, settings) if resolved is None else _read_tickers(resolved)
        planned = plan(place, connector, settings, tickers)
        for connection in planned:
            if connection.name == name:
                return connection, tickers, settings
        names = ", ".join(connection.name for connection in planned)
        raise ConfigError(f"{place}: needs {len(planned)} connections, run one of {names}")
    raise ConfigError(f"{where}: no connector {name!r}; there are {', '.join(fleet.connectors) or 'none'}")


def _read_tickers(path: Path) -> list[str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: expected a list of tickers in JSON: {error}") from error


class Child:
    """One process that is kept running."""

    def __init__(self, name: str, role: str, command: Sequence[str]) -> None:
        self.name, self.role, self.command = name, role, list(command)
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.last_exit: int | None = None
        self.gave_up = False
        self._started = self._start_at = 0.0
        self._failures = 0

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    def watch(self, now: float) -> None:
        """Start it, notice that it died, start it again after a while. Exit code 78 is final."""
        if self.process is None:
            if not self.gave_up and now >= self._start_at:
                self.process = subprocess.Popen(self.command, start_new_session=True)  # noqa: S603 (our own program)
                self.starts += 1
                self._started = now
            return
        code = self.process.poll()
        if code is None:
            return
        self.process, self.last_exit = None, code
        if code == EXIT_CONFIG:
            self.gave_up = True
            log.error("%s: cannot run like this (it said why above), not started again", self.name)
            return
        self._failures = 0 if now - self._started > STEADY_S else self._failures + 1
        wait_s = random.uniform(0, min(RESTART_MOST_S, RESTART_FIRST_S * 2.0**self._failures))  # noqa: S311 (jitter)
        self._start_at = now + wait_s
        log.warning("%s: ended with %s, started again in %.1f s", self.name, _cause(code), wait_s)

    def stop(self) -> None:
        """Ask it to end; it is not started again."""
        self.gave_up = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Until it has ended; after `seconds` it is killed."""
        if self.process is None:
            return
        try:
            self.last_exit = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.error("%s: did not end within %g s, killed", self.name, seconds)
            self.process.kill()
            self.last_exit = self.process.wait(STOP_CONNECTOR_S)
        self.process = None


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Supervisor:
    """Runs the processes of a fleet file until told to stop."""

    def __init__(self, config_path: Path, fleet: FleetConfig, log_args: Sequence[str] = ()) -> None:
        self.rings = Path(fleet.rings)
        base = [sys.executable, "-m", "mdcollector", *log_args, "--parent", str(os.getpid())]
        self._stats = StatsWriter(self.rings / "_supervisor")
        self.connectors: list[Child] = []
        for name, settings in fleet.connectors.items():
            where = f"{config_path}: connectors.{name}"
            tickers = resolve(where, settings)
            resolved = self.rings / "_supervisor" / f"{name}.tickers.json"
            resolved.write_bytes(msgspec.json.encode(tickers))
            for p in plan(where, name, settings, tickers):
                command = [*base, "connect", p.name, "-c", str(config_path), "--resolved", str(resolved)]
                self.connectors.append(Child(p.name, "connector", command))
        self.arbiters = [
            Child(name, "arbiter", [*base, "arbitrate", name, "-c", str(config_path)]) for name in fleet.arbiters
        ]
        self.writers = [Child(name, "writer", [*base, "write", name, "-c", str(config_path)]) for name in fleet.writers]
        self._locks = [self._lock(child.name) for child in self.children]
        self._rows_before = self._rows()

    def _let_writers_begin(self) -> None:
        """A writer that is told to stop while it still loads its libraries would leave all rows behind."""
        deadline = time.monotonic() + BEGIN_WRITER_S
        for child in self.writers:
            while child.process is not None and child.process.poll() is None and time.monotonic() < deadline:
                with suppress(RingError):
                    if read_stats(self.rings / "_writers" / child.name / "stats")["pid"] == child.pid:
                        break
                time.sleep(WATCH_S)

    def _lock(self, name: str) -> int:
        """Hold a process name in these rings as long as this supervisor lives: two of them would fight over it."""
        path = self.rings / "_supervisor" / f"{name}.lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(
                f"{self.rings}: another mdcollector runs {name!r} there; stop it or use other rings"
            ) from None
        return fd

    def _rows(self) -> dict[str, int]:
        """Rows of data ever published by each connector."""
        rows = {}
        for child in self.connectors:
            rows[child.name] = 0
            for feed in DATA_FEEDS:
                if (self.rings / child.name / f"{feed}.meta").exists():
                    with suppress(RingError), RingReader(self.rings / child.name, feed) as ring:
                        rows[child.name] += ring.published
        return rows

    def idle(self) -> dict[str, str]:
        """Connectors that brought no row since this supervisor began, and what they said last."""
        found = {}
        for name, rows in self._rows().items():
            if rows == self._rows_before[name]:
                try:
                    page = read_stats(self.rings / name / "stats")
                    found[name] = page["last_error"] or f"it was {page['state']}, nothing came"
                except RingError as error:
                    found[name] = str(error)
        return found

    def close(self) -> None:
        """Let go of the names; the processes have ended."""
        while self._locks:
            os.close(self._locks.pop())

    @property
    def children(self) -> list[Child]:
        """All processes, in the order in which they are started: who drains is there before who fills."""
        return [*self.writers, *self.arbiters, *self.connectors]

    def run(self, should_stop: Callable[[], bool], on_tick: Callable[[], None] | None = None) -> None:
        """Watch until told to stop; then connectors first, arbiters and writers after them, so that all is drained."""
        children = self.children
        try:
            while not should_stop() and not all(child.gave_up and child.process is None for child in children):
                now = time.monotonic()
                for child in children:
                    child.watch(now)
                self._publish()
                if on_tick is not None:
                    on_tick()
                time.sleep(WATCH_S)
        finally:
            for group, seconds in (
                (self.connectors, STOP_CONNECTOR_S),
                (self.arbiters, STOP_ARBITER_S),
                (self.writers, STOP_WRITER_S),
            ):
                if group is self.writers:
                    self._let_writers_begin()
                for child in group:
                    child.stop()
                deadline = time.monotonic() + seconds
                for child in group:
                    child.wait(max(0.1, deadline - time.monotonic()))
            self._publish()

    def _publish(self) -> None:
        self._stats.publish(
            {
                "role": "supervisor",
                "processes": {
                    child.name: {
                        "role": child.role,
                        "child_pid": child.pid,
                        "starts": child.starts,
                        "last_exit": child.last_exit,
                        "gave_up": child.gave_up,
                    }
                    for child in self.children
                },
            }
        )


class Balance(msgspec.Struct):
    """Rows of one ring against what a writer made durable of it."""

    connector: str
    feed: str
    published: int
    durable: int
    lapped: int
    damaged: int

    @property
    def missing(self) -> int:
        """Rows published and neither durable nor accounted for as lost."""
        return self.published - self.durable


def balance(rings: Path, writers: Sequence[str]) -> list[Balance]:
    """For each of these writers and every ring that it drains: rows in, rows durable."""
    found = []
    for page in sorted(rings / "_writers" / writer / "stats" for writer in writers):
        for stream, numbers in read_stats(page)["streams"].items():
            connector, _, feed = stream.rpartition("/")
            try:
                with RingReader(rings / connector, feed) as ring:
                    published = ring.published
            except RingError:
                published = numbers["published"]
            found.append(Balance(connector, feed, published, numbers["durable"], numbers["lapped"], numbers["damaged"]))
    return found


def unread(rings: Path, writers: Sequence[str]) -> dict[str, str]:
    """Rings that one of these writers could not read, so nobody counted their rows, and why."""
    return {
        ring: why
        for writer in writers
        for ring, why in read_stats(rings / "_writers" / writer / "stats")["refused"].items()
    }


def status(rings: Path) -> dict[str, Any]:
    """Everything the stats pages and ring headers say: each kind of process, and what cannot be read."""
    found: dict[str, Any] = {"connectors": {}, "arbiters": {}, "writers": {}, "supervisor": None, "problems": []}
    now_ns = time.time_ns()
    for page in sorted(rings.glob("*/stats")) + sorted(rings.glob("_writers/*/stats")):
        try:
            numbers = read_stats(page)
        except RingError as error:
            found["problems"].append(str(error))
            continue
        numbers["age_s"] = max(0.0, (now_ns - numbers["time_ns"]) / 1e9)
        if numbers["role"] == "supervisor":
            found["supervisor"] = numbers
        elif numbers["role"] == "writer":
            found["writers"][numbers["name"]] = numbers
        else:
            numbers["heartbeats"] = _heartbeats(page.parent, found["problems"])
            found["arbiters" if numbers["role"] == "arbiter" else "connectors"][numbers["name"]] = numbers
    return found


def _heartbeats(directory: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    beats = {}
    for path in sorted(directory.glob("*.meta")):
        if path.stem not in FEEDS:
            continue
        try:
            with RingReader(directory, path.stem) as ring:
                beats[path.stem] = {
                    "age_s": ring.heartbeat_age_s,
                    "open": ring.is_open,
                    "alive": ring.writer_alive,
                    "published": ring.published,
                    "epoch": ring.epoch,
                }
        except RingError as error:
            problems.append(str(error))
    return beats
