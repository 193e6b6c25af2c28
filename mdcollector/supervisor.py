"""The supervisor: plans a fleet, runs its processes, restarts what dies, stops it in order and proves what it wrote.

Run by `mdcollector up` and `mdcollector run`; systemd does the same job in production. Connectors and writers are
separate processes; this one only watches them.
"""

import asyncio
import fcntl
import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from mdcollector.assignment import PLANS, Assignment, read_plan
from mdcollector.budget import Budget
from mdcollector.config import ArbiterConfig, ConnectorConfig, FleetConfig, connector_of, takes
from mdcollector.connector import assignment, feeds_of, rest_hosts, selection, venue_options, weight_budget
from mdcollector.errors import (
    EXIT_CONFIG,
    ConfigError,
    Disconnected,
    FrameError,
    RateLimited,
    RingError,
    StorageError,
)
from mdcollector.exchanges import PAGES_MAX, InstrumentInfo, Stream, Venue, venue_class
from mdcollector.planning import Planned, check_limits
from mdcollector.records import ALWAYS_ON, DATA_FEEDS, FEEDS, Exchange
from mdcollector.ring import RingReader
from mdcollector.stats import StatsWriter, read_stats
from mdcollector.transport import HTTP_TRIES, get_within, open_session, tls_context

log = logging.getLogger(__name__)

RESTART_FIRST_S, RESTART_MOST_S = 0.5, 30.0
STEADY_S = 30.0  # a process that lived so long starts over with short waits
STOP_CONNECTOR_S, STOP_ARBITER_S, STOP_WRITER_S = 20.0, 40.0, 60.0
BEGIN_WRITER_S = 20.0
WATCH_S = 0.1
RESOLVE_TIMEOUT_S = 30.0
HOUSE_EVERY_S = 1.0  # whether an instrument is homeless
HOUSE_AGAIN_S = 60.0  # after no connection could be opened for it


def resolve(where: str, settings: ConnectorConfig, rings: Path, *, visitor: bool = False) -> list[str]:
    """Tickers of a connector, patterns resolved and names checked against the venue's list of instruments.

    It is asked for within the request weight of the machine, so a ban that holds now is not broken; `visitor` as for
    `Budget`. Plain names go unchecked, with a warning, when the venue does not answer; patterns cannot do without it:
    Disconnected or RateLimited, which are no fault of the configuration and pass.
    """
    try:
        kind = venue_class(settings.exchange)
        listed = asyncio.run(_instruments(settings, kind, weight_budget(rings, kind, visitor=visitor)))
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error
    except (Disconnected, RateLimited, aiohttp.ClientError, TimeoutError, OSError) as error:
        if selection(settings).needs_list:
            text = f"{where}.tickers: patterns and filters need the venue's list of instruments: {error or type(error).__name__}"
            if isinstance(error, RateLimited):
                raise RateLimited(error.retry_after_s, text) from error
            raise Disconnected(text) from error
        log.warning("%s: tickers not checked, no list of instruments: %s", where, error)
        return list(dict.fromkeys(settings.tickers))
    try:
        selection(settings).check(listed)
        return selection(settings).chosen(listed)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error


async def _instruments(settings: ConnectorConfig, kind: type[Venue], budget: Budget) -> list[InstrumentInfo]:
    """What the venue lists now, all pages of it; the next host is asked where one does not answer."""
    hosts = rest_hosts(settings, kind)
    secure = any(url.startswith("https") for url in hosts)
    tls = tls_context(Path(settings.ca_file) if settings.ca_file else None) if secure else None
    async with asyncio.timeout(RESOLVE_TIMEOUT_S), open_session(tls, kind.HTTP_HEADERS) as session:
        for host in hosts[:-1]:
            try:
                return await _pages(session, host.rstrip("/"), kind, budget)
            except (Disconnected, aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("%s: no list of instruments: %s", host, error)
        return await _pages(session, hosts[-1].rstrip("/"), kind, budget)


async def _pages(session: aiohttp.ClientSession, base: str, kind: type[Venue], budget: Budget) -> list[InstrumentInfo]:
    listed: list[InstrumentInfo] = []
    paths = deque(kind.instruments_paths())
    for _ in range(PAGES_MAX):
        if not paths:
            break
        page, behind = await _page(session, base, paths.popleft(), kind, budget)
        listed += page
        paths += behind
    else:
        raise Disconnected(f"{base}{paths[0]}: more than {PAGES_MAX} pages of instruments")
    if not listed:  # half a failure of theirs, and nothing that could be held against a configuration
        raise Disconnected(f"{base}: the list of instruments is empty")
    return listed


async def _page(
    session: aiohttp.ClientSession, base: str, path: str, kind: type[Venue], budget: Budget
) -> tuple[list[InstrumentInfo], list[str]]:
    """One page and the paths that it leads to; an answer that cannot be read is asked for again, at most HTTP_TRIES times."""
    for tries_left in reversed(range(HTTP_TRIES)):
        weight = kind.LIMITS.instruments_weight
        status, body = await get_within(session, base + path, budget, weight, kind.RATE_LIMITED)
        if status >= 400:
            raise Disconnected(f"{base}{path}: HTTP {status}")
        try:
            return kind.instruments(body), kind.pages_behind(path, body)
        except (msgspec.DecodeError, FrameError) as error:
            if not tries_left:
                raise Disconnected(f"{base}{path}: an answer that cannot be read: {error}") from error
            log.warning("%s%s: an answer that cannot be read, asked for again: %s", base, path, error)
    raise AssertionError("the last try returns or raises")


def plan(
    where: str, name: str, settings: ConnectorConfig, tickers: Sequence[str], rings: Path,
    *, alone: int | None = None, remember: bool = True,
) -> list[Planned]:  # fmt: skip
    """Connections of one connector, as they are to begin.

    `alone`: only the connection of that number (from 0) is to begin. Without `remember` nothing is written.
    """
    try:
        known = assignment(rings, name, settings)
        connections = known.plan(tickers, alone) if remember else known.preview(tickers)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return _named(name, known, connections)


def _named(name: str, known: Assignment, connections: Sequence[list[Stream]]) -> list[Planned]:
    names = known.names(len(connections))
    return [Planned(names[n], name, _tickers(streams), streams, n) for n, streams in enumerate(connections) if streams]


def _tickers(streams: Sequence[Stream]) -> list[str]:
    return list(dict.fromkeys(stream.ticker for stream in streams))


def merged_exchange(where: str, arbiter: ArbiterConfig, connectors: Mapping[str, ConnectorConfig]) -> Exchange:
    """The exchange whose feeds an arbiter merges. ConfigError: no feed without holes and copies can come of them."""
    leg = arbiter.legs[0]  # what says which rows come is the same for all
    settings = connectors.get(leg) or connectors[leg.rpartition(".")[0]]
    kind = venue_class(settings.exchange)
    refused = kind.not_mergeable(venue_options(settings, kind))
    for feed in arbiter.feeds:
        if feed in refused:
            raise ConfigError(f"{where}.feeds: {feed} of {kind.NAME} cannot be merged: {refused[feed]}")
    return kind.EXCHANGE


def find_planned(
    where: str, name: str, fleet: FleetConfig, resolved: Path | None = None
) -> tuple[Planned, ConnectorConfig]:
    """The connection that the process `name` runs, and the configuration.

    `resolved` is a list of tickers in JSON: what a supervisor has planned with stays the list when a process begins
    anew.
    """
    for connector, settings in fleet.connectors.items():
        if connector not in (name, connector_of(name)):
            continue
        place, rings = f"{where}: connectors.{connector}", Path(fleet.rings)
        number = name.removeprefix(connector).removeprefix(".")
        alone = int(number) - 1 if number.isdecimal() else 0
        tickers = resolve(place, settings, rings) if resolved is None else _read_tickers(resolved)
        planned = plan(place, connector, settings, tickers, rings, alone=alone)
        for connection in planned:
            if connection.name == name:
                return connection, settings
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
        wait_s = _restart_wait_s(self._failures)
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


def _restart_wait_s(failures: int) -> float:
    """Capped, exponential, with full jitter."""
    return random.uniform(0, min(RESTART_MOST_S, RESTART_FIRST_S * 2.0 ** min(failures, 10)))  # noqa: S311 (jitter)


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Planning(threading.Thread):
    """Finds the tickers of one connector, beside everything else: asks again for as long as its venue gives no list.

    `asked` is set once there was an answer or none; `tickers` holds what was found, or the error that is final.
    """

    def __init__(self, where: str, settings: ConnectorConfig, rings: Path) -> None:
        super().__init__(daemon=True)  # an answer that is waited for never holds up the end
        self.where, self.settings, self.rings = where, settings, rings
        self.asked = threading.Event()
        self.tickers: Future[list[str]] = Future()
        self.waits_for = ""

    def run(self) -> None:
        failures = 0
        while not self.tickers.done():
            try:
                self.tickers.set_result(resolve(self.where, self.settings, self.rings))
            except (Disconnected, RateLimited) as error:
                failures += 1
                self.waits_for = str(error)
                wait_s = _restart_wait_s(failures)
                if isinstance(error, RateLimited):
                    wait_s += error.retry_after_s
                log.warning("%s; asked again in %.1f s", error, wait_s)
                self.asked.set()
                time.sleep(wait_s)
            except BaseException as error:  # noqa: BLE001 (a wrong configuration, or a bug: raised where it is taken)
                self.tickers.set_exception(error)
        self.asked.set()


class Supervisor:
    """Runs the processes of a fleet file until told to stop.

    A connector whose venue gives no list of instruments now begins when there is one; the others do not wait for it.
    """

    def __init__(self, config_path: Path, fleet: FleetConfig, log_args: Sequence[str] = ()) -> None:
        self.rings, self._config_path, self._fleet = Path(fleet.rings), config_path, fleet
        self._base = [sys.executable, "-m", "mdcollector", *log_args, "--parent", str(os.getpid())]
        for name, arbiter in fleet.arbiters.items():
            merged_exchange(f"{config_path}: arbiters.{name}", arbiter, fleet.connectors)
        self._stats = StatsWriter(self.rings / "_supervisor")
        self.arbiters = [self._child(name, "arbiter", "arbitrate") for name in fleet.arbiters]
        self.writers = [self._child(name, "writer", "write") for name in fleet.writers]
        self._locks = [self._lock(child.name) for child in (*self.arbiters, *self.writers)]
        self.connectors: list[Child] = []
        self.refused: dict[str, str] = {}  # connectors whose configuration turned out to be wrong behind the start
        self._rows_before: dict[str, int] = {}
        self._planned: dict[str, list[Planned]] = {}  # connections of each connector that has begun
        self._left_behind: dict[str, list[str]] = {}  # by connector, as `left_behind`
        self._unopened: dict[str, str] = {}  # connectors that need a further connection, and why it is not opened
        self._house_at: dict[str, float] = {}
        self._planning = {
            name: Planning(f"{config_path}: connectors.{name}", settings, self.rings)
            for name, settings in fleet.connectors.items()
        }
        for planning in self._planning.values():
            planning.start()
        for planning in self._planning.values():
            planning.asked.wait()  # bounded by what `resolve` takes
        self._take_planned()

    def _child(self, name: str, role: str, command: str, *options: str) -> Child:
        return Child(name, role, [*self._base, command, name, "-c", str(self._config_path), *options])

    def _take_planned(self) -> None:
        """Connections of the connectors whose tickers are known now. ConfigError: a connector cannot be like this."""
        for name, planning in list(self._planning.items()):
            if not planning.tickers.done():
                continue
            del self._planning[name]
            tickers = planning.tickers.result()
            self._take(name, tickers, plan(planning.where, name, planning.settings, tickers, self.rings))

    def _take(self, name: str, tickers: Sequence[str], planned: list[Planned]) -> list[Planned]:
        """Connections of a connector that do not run yet; each begins with the list of all `tickers`."""
        self._planned[name], self._left_behind[name] = planned, left_behind(self._fleet, planned)
        if self._left_behind[name]:
            log.warning("no writer takes %s, but it does their siblings", ", ".join(self._left_behind[name]))
        resolved = self.rings / "_supervisor" / f"{name}.tickers.json"
        new = resolved.with_suffix(".new")  # a running one that dies reads it when it begins anew
        new.write_bytes(msgspec.json.encode(tickers))
        new.replace(resolved)
        running = {child.name for child in self.connectors}
        begin = [connection for connection in planned if connection.name not in running]
        for p in begin:
            self._locks.append(self._lock(p.name))
            self._rows_before[p.name] = self._rows(p.name)
            self.connectors.append(self._child(p.name, "connector", "connect", "--resolved", str(resolved)))
        return begin

    def _take_late(self) -> None:
        """The same while the fleet runs: a connector that cannot be harms no other one."""
        while any(planning.tickers.done() for planning in self._planning.values()):
            waiting = set(self._planning)
            try:
                self._take_planned()
            except ConfigError as error:
                log.error("%s", error)
                self.refused.update(dict.fromkeys(waiting - set(self._planning), str(error)))

    def _open_further(self, now: float) -> None:
        """A connection for instruments that no running one has room for, as these have noted in the plan."""
        for name in self._planned:
            if now < self._house_at.get(name, 0.0):
                continue
            self._house_at[name] = now + HOUSE_EVERY_S
            known = assignment(self.rings, name, self._fleet.connectors[name])
            homeless = known.remembered().homeless
            if not homeless:
                self._unopened.pop(name, None)
                continue
            try:
                self._house(name, known)
                self._unopened.pop(name, None)
            except (ConfigError, StorageError, OSError) as error:
                self._house_at[name] = now + HOUSE_AGAIN_S
                if self._unopened.get(name) != str(error):
                    log.error("no connection is opened for %s: %s", ", ".join(homeless), error)
                self._unopened[name] = str(error)

    def _house(self, name: str, known: Assignment) -> None:
        connectors = self._fleet.connectors

        def check(connections: list[list[Stream]]) -> None:
            whole = self._planned | {name: _named(name, known, connections)}
            check_limits(str(self._config_path), {n: (connectors[n], planned) for n, planned in whole.items()})

        planned = _named(name, known, known.house(check))
        if not planned:  # they have got a place meanwhile
            return
        tickers = list(dict.fromkeys(ticker for connection in planned for ticker in connection.tickers))
        for connection in self._take(name, tickers, planned):
            log.info("%s: a further connection is opened, for %s", connection.name, ", ".join(connection.tickers))

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

    def _rows(self, name: str) -> int:
        """Rows of data ever published by a connector."""
        rows = 0
        for feed in DATA_FEEDS:
            if (self.rings / name / f"{feed}.meta").exists():
                with suppress(RingError), RingReader(self.rings / name, feed) as ring:
                    rows += ring.published
        return rows

    def idle(self) -> dict[str, str]:
        """Connectors that brought no row since this supervisor began, and what they said last."""
        found = {name: planning.waits_for for name, planning in self._planning.items()} | self.refused
        for name in (child.name for child in self.connectors):
            if self._rows(name) == self._rows_before[name]:
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
        try:
            while not should_stop() and not self._all_gave_up():
                self._take_late()
                now = time.monotonic()
                self._open_further(now)
                for child in self.children:
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

    def _all_gave_up(self) -> bool:
        return not self._planning and all(child.gave_up and child.process is None for child in self.children)

    def _publish(self) -> None:
        self._stats.publish(
            {
                "role": "supervisor",
                "waiting": {name: planning.waits_for for name, planning in self._planning.items()},
                "unopened": self._unopened,
                "left_behind": self._left_behind,
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
    """Rows of one ring, as three processes know them: who received them, the ring's own header, who made them durable."""

    connector: str
    feed: str
    received: int | None  # None where the connector runs, or was killed before it could say
    published: int
    durable: int
    lapped: int
    damaged: int

    @property
    def missing(self) -> int:
        """Rows received or published and neither durable nor accounted for as lost."""
        return max(self.published, self.received or 0) - self.durable


def balance(rings: Path, writers: Sequence[str]) -> list[Balance]:
    """For each of these writers and every ring that it drains: rows received, in the ring, durable."""
    found = []
    received: dict[str, dict[str, int]] = {}
    for writer in sorted(writers):
        try:
            page = read_stats(rings / "_writers" / writer / "stats")
        except RingError:
            continue  # told by `unread`
        for stream, numbers in page["streams"].items():
            connector, _, feed = stream.rpartition("/")
            try:
                with RingReader(rings / connector, feed) as ring:
                    published = ring.published
            except RingError:
                published = numbers["published"]
            if connector not in received:
                received[connector] = _received(rings, connector)
            found.append(
                Balance(
                    connector, feed, received[connector].get(feed), published,
                    numbers["durable"], numbers["lapped"], numbers["damaged"],
                )
            )  # fmt: skip
    return found


def _received(rings: Path, connector: str) -> dict[str, int]:
    """Feed -> rows, by the last word of a process that has ended in order."""
    try:
        page = read_stats(rings / connector / "stats")
    except RingError:
        return {}
    if page["state"] != "stopped":
        return {}
    return {feed: numbers["published"] for feed, numbers in page["rings"].items()}


def unread(rings: Path, writers: Sequence[str]) -> dict[str, str]:
    """Rings that one of these writers could not read, so nobody counted their rows, and why; or a writer that never ran."""
    found: dict[str, str] = {}
    for writer in writers:
        try:
            found |= read_stats(rings / "_writers" / writer / "stats")["refused"]
        except RingError as error:
            found[f"all of {writer}"] = str(error)
    return found


def untaken(fleet: FleetConfig, connections: Sequence[Planned]) -> list[str]:
    """Streams (NAME/feed) of a fleet that will be drained by no writer, and merged by no arbiter."""
    streams = [(name, feed) for name, arbiter in fleet.arbiters.items() for feed in (*arbiter.feeds, *ALWAYS_ON)]
    for connection in connections:
        feeds = feeds_of(fleet.connectors[connection.connector], connection.streams)
        streams += [(connection.name, feed) for feed in (*feeds, *ALWAYS_ON)]
    merged = _merged(fleet)
    return [
        f"{name}/{feed}"
        for name, feed in streams
        if (name, feed) not in merged
        and not any(takes(writer.connectors, writer.feeds, name, feed) for writer in fleet.writers.values())
    ]


def left_behind(fleet: FleetConfig, connections: Sequence[Planned]) -> list[str]:
    """Data of a connector's connections that no writer takes, though it goes to one, or to an arbiter, from a sibling.

    A connector that grew beside a writer or an arbiter that names only one of its processes.
    """
    all_left, left = set(untaken(fleet, connections)), dict[str, list[str]]()
    taken = set[str]()
    for connection in connections:
        for feed in feeds_of(fleet.connectors[connection.connector], connection.streams):
            if (stream := f"{connection.name}/{feed}") in all_left:
                left.setdefault(feed, []).append(stream)
            else:
                taken.add(feed)
    return [stream for feed, streams in left.items() if feed in taken for stream in streams]


def undrained(rings: Path, fleet: FleetConfig, processes: Sequence[str]) -> dict[str, int]:
    """Rows in rings of these processes (NAME/feed) that no writer has looked at, and no arbiter merges."""
    found, merged = dict[str, int](), _merged(fleet)
    seen = set(unread(rings, list(fleet.writers)))
    for writer in fleet.writers:
        with suppress(RingError):
            seen.update(read_stats(rings / "_writers" / writer / "stats")["streams"])
    for name, feed in itertools.product(processes, FEEDS):
        path = rings / name / f"{feed}.meta"
        if (name, feed) in merged or f"{name}/{feed}" in seen or str(path) in seen or not path.exists():
            continue
        try:
            with RingReader(rings / name, feed) as ring:
                if ring.published:
                    found[f"{name}/{feed}"] = ring.published
        except RingError as error:
            log.warning("rows that no writer takes are not counted: %s", error)
    return found


def _merged(fleet: FleetConfig) -> set[tuple[str, str]]:
    """Streams of legs whose rows are in those of an arbiter, which merges also what is always on."""
    return {
        (leg, feed)
        for arbiter in fleet.arbiters.values()
        for leg in arbiter.legs
        for feed in (*arbiter.feeds, *ALWAYS_ON)
    }


def status(rings: Path) -> dict[str, Any]:
    """Everything that stats pages, ring headers and plans say: each kind of process, and what cannot be read."""
    found: dict[str, Any] = {"connectors": {}, "arbiters": {}, "writers": {}, "supervisor": None, "problems": []}
    found["homeless"] = {}  # connector -> instruments without a connection
    for path in sorted((rings / PLANS).glob("*.json")):
        try:
            found["homeless"][path.stem] = read_plan(path).homeless
        except (OSError, ValueError) as error:
            found["problems"].append(f"{path}: cannot be read: {error}")
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
