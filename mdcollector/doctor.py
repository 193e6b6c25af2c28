"""`mdcollector doctor`: is this machine fit for the fleet? Each look gives a verdict and, unless it is good, what to do."""

import asyncio
import ctypes
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import aiohttp
import msgspec

from mdcollector import config
from mdcollector.config import FleetConfig
from mdcollector.connector import rest_hosts, venue_options, weight_budget
from mdcollector.emit import CAPACITIES
from mdcollector.errors import ConfigError, Disconnected, RateLimited
from mdcollector.exchanges import venue_class
from mdcollector.records import ALWAYS_ON, FEEDS
from mdcollector.ring import CAPACITY_MAX
from mdcollector.transport import get_within, open_session, tls_context

GOOD, HINT, BAD = "good", "hint", "bad"  # a hint costs latency or comfort, what is bad costs rows
PACKAGES = ("picows", "msgspec", "numpy", "pyarrow", "posix_ipc", "psutil", "prometheus-client", "click")
FILES_LEAST = 4096  # open files of one process: rings, files, connections
DISK_FREE_LEAST = 10 << 30  # of a writer's target; a busy fleet writes some GB a day
NETWORK_S = 10.0
_STA_UNSYNC, _TIME_ERROR = 0x0040, 5  # linux/timex.h


class Verdict(msgspec.Struct):
    """One thing that was looked at."""

    what: str
    verdict: str
    found: str
    advice: str = ""


def examine(fleet: FleetConfig | None, *, offline: bool) -> Iterator[Verdict]:
    """Everything, one after the other; the looks at venues take a moment."""
    rings = Path(fleet.rings) if fleet is not None else config.DEFAULT_RINGS
    yield from _versions()
    yield _clock()
    yield from _limits()
    yield from _cpus(fleet)
    yield _ring_room(rings, fleet)
    if fleet is None:
        return
    yield from _places(rings, fleet)
    yield from _credentials(fleet)
    if not offline:
        yield from asyncio.run(_venues(fleet))


def _versions() -> Iterator[Verdict]:
    machine = platform.machine()
    if machine in ("x86_64", "AMD64"):
        yield Verdict("machine", GOOD, machine)
    else:
        yield Verdict("machine", BAD, machine, "the rings were shown safe on x86-64 only: connectors refuse to start")
    python = platform.python_version()
    yield Verdict(
        "python",
        GOOD if sys.version_info >= (3, 11) else BAD,
        python,
        "" if sys.version_info >= (3, 11) else "3.11 or newer",
    )
    missing, versions = [], []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Verdict("packages", BAD, "missing: " + ", ".join(missing), "pip install mdcollector")
    else:
        yield Verdict("packages", GOOD, ", ".join(versions))


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), as far as it is looked at; the rest is room."""

    _fields_ = (
        ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long), ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long), ("status", ctypes.c_int), ("room", ctypes.c_char * 256),
    )  # fmt: skip


def _clock() -> Verdict:
    timex = _Timex()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    if state == -1:
        return Verdict(
            "clock", HINT, f"cannot be asked: {os.strerror(ctypes.get_errno())}", "run it outside the sandbox"
        )
    found = f"error at most {timex.maxerror / 1000:.1f} ms, estimated {timex.esterror / 1000:.1f} ms"
    if timex.status & _STA_UNSYNC or state == _TIME_ERROR:
        return Verdict(
            "clock",
            BAD,
            "not synchronised; " + found,
            "start chrony (better) or systemd-timesyncd: receive times are wrong",
        )
    return Verdict("clock", GOOD, "synchronised, " + found)


def _limits() -> Iterator[Verdict]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = files == resource.RLIM_INFINITY or files >= FILES_LEAST
    yield Verdict(
        "open files",
        GOOD if good else BAD,
        str(files),
        "" if good else f"ulimit -n {FILES_LEAST}, or LimitNOFILE= in the unit",
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY:
        yield Verdict("memory lock", GOOD, "unlimited")
    else:
        yield Verdict(
            "memory lock", HINT, f"{locked >> 10} KiB", "LimitMEMLOCK=infinity, so that rings are never paged out"
        )


def _cpus(fleet: FleetConfig | None) -> Iterator[Verdict]:
    used = sorted({c.cpu for c in fleet.connectors.values() if c.cpu is not None}) if fleet is not None else []
    governors = {
        path.read_text().strip() for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    }
    if governors - {"performance"}:
        yield Verdict(
            "CPU governor",
            HINT,
            ", ".join(sorted(governors)),
            "cpupower frequency-set -g performance: waking a slow core costs tens of us",
        )
    else:
        yield Verdict("CPU governor", GOOD, "performance" if governors else "the machine has none")
    isolated = Path("/sys/devices/system/cpu/isolated")
    text = isolated.read_text().strip() if isolated.exists() else ""
    if text or not used:
        yield Verdict("isolated CPUs", GOOD, text or "none, and no connector is pinned")
    else:
        yield Verdict(
            "isolated CPUs",
            HINT,
            f"none; connectors are pinned to {', '.join(map(str, used))}",
            f"boot with isolcpus={','.join(map(str, used))} for the last microseconds",
        )


def _ring_bytes(fleet: FleetConfig) -> int:
    """Memory or disk that the rings of all connectors take, if each needs one connection."""
    total = 0
    for connector in fleet.connectors.values():
        for feed in (*connector.feeds, *ALWAYS_ON):
            rows = min(connector.capacity.get(feed, CAPACITIES[feed]), CAPACITY_MAX)
            total += rows * FEEDS[feed].dtype.itemsize
    return total


def _existing(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _ring_room(rings: Path, fleet: FleetConfig | None) -> Verdict:
    place = _existing(rings.absolute())
    free, needed = shutil.disk_usage(place).free, _ring_bytes(fleet) if fleet is not None else 0
    found = f"{rings}: {free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB needed by one connection per connector"
    if free < needed and not any(rings.glob("*/*.data")):
        return Verdict("room for the rings", BAD, found, "smaller `capacity`, or `rings` on a larger disk or tmpfs")
    return Verdict("room for the rings", GOOD, found)


def _places(rings: Path, fleet: FleetConfig) -> Iterator[Verdict]:
    outs = [Path(writer.out) for writer in fleet.writers.values() if "://" not in writer.out]
    for what, path in [("rings", rings), *(("tables", out) for out in outs)]:
        place = _existing(path.absolute())
        if not os.access(place, os.W_OK | os.X_OK):
            yield Verdict(
                what, BAD, f"{place} cannot be written by user {os.geteuid()}", "chown it, or run as its owner"
            )
            continue
        mode = place.stat().st_mode & 0o777
        if path.exists() and mode & 0o002:
            yield Verdict(
                what,
                BAD,
                f"{place} is open to everybody (mode {mode:o})",
                f"chmod o-w {place}: rings of others are not to be trusted",
            )
        else:
            yield Verdict(what, GOOD, f"{path} (mode {mode:o})")
    for out in outs:
        free = shutil.disk_usage(_existing(out.absolute())).free
        good = free >= DISK_FREE_LEAST
        yield Verdict(
            "room for tables",
            GOOD if good else HINT,
            f"{out}: {free / 2**30:,.1f} GiB free",
            "" if good else "a busy fleet writes some GB a day",
        )


def _credentials(fleet: FleetConfig) -> Iterator[Verdict]:
    for name, connector in fleet.connectors.items():
        kind = venue_class(connector.exchange)
        try:
            given = venue_options(connector, kind).credentials
        except ConfigError as error:
            yield Verdict(f"credentials of {name}", BAD, str(error), "mdcollector check says what is allowed")
            continue
        if kind.CREDENTIALS:
            text = "given" if given else "none: public data only"
            yield Verdict(f"credentials of {name}", GOOD, text)


async def _venues(fleet: FleetConfig) -> list[Verdict]:
    """Ask every venue for its list of instruments: name service, TLS, the venue's answer. During a ban nobody is asked."""
    asked = set[tuple[str, str]]()
    verdicts = []
    for connector in fleet.connectors.values():
        kind = venue_class(connector.exchange)
        budget = weight_budget(Path(fleet.rings), kind, visitor=True)
        for host in rest_hosts(connector, kind):
            if (connector.exchange, host) in asked:
                continue
            asked.add((connector.exchange, host))
            what = f"network to {connector.exchange}"
            try:
                tls = (
                    tls_context(Path(connector.ca_file) if connector.ca_file else None)
                    if host.startswith("https")
                    else None
                )
                async with asyncio.timeout(NETWORK_S), open_session(tls, kind.HTTP_HEADERS) as session:
                    url = host.rstrip("/") + kind.instruments_paths()[0]
                    weight = kind.LIMITS.instruments_weight
                    status, body = await get_within(session, url, budget, weight, kind.RATE_LIMITED)
                if status >= 400:
                    raise Disconnected(f"HTTP {status}")
                verdicts.append(Verdict(what, GOOD, f"{host}: {len(kind.instruments(body)):,} instruments"))
            except RateLimited as error:
                advice = f"the venue wants no request of this address for {error.retry_after_s:.0f} s: look again then"
                verdicts.append(Verdict(what, BAD, str(error), advice))
            except (
                Disconnected,
                aiohttp.ClientError,
                TimeoutError,
                OSError,
                msgspec.DecodeError,
                ConfigError,
            ) as error:
                text = str(error) or type(error).__name__
                verdicts.append(
                    Verdict(
                        what,
                        BAD,
                        f"{host}: {text}",
                        "name service, firewall, proxy, ca_file; or the venue refuses this country",
                    )
                )
    return verdicts


def worst(verdicts: Sequence[Verdict]) -> str:
    """The worst of them."""
    found = {verdict.verdict for verdict in verdicts}
    return BAD if BAD in found else HINT if HINT in found else GOOD
