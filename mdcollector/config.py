"""Configuration: one TOML file for the fleet; every error names file, key, value and what is allowed.

Read by the processes and commands; knows the shape of the file, not the venues (their part is checked by
`supervisor.check`). Credentials come from the environment or from a file that only its owner can read.
"""

import fnmatch
import itertools
import os
import pkgutil
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from mdcollector.errors import ConfigError
from mdcollector.records import DATA_FEEDS, FEEDS
from mdcollector.ring import CAPACITY_MAX, CAPACITY_MIN

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
SECRET_BYTES_MAX = 4096
DEFAULT_RINGS = Path("rings")
ALLOW_ROOT = "MDCOLLECTOR_ALLOW_ROOT"
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")  # docker, podman, systemd-nspawn
CONTAINER_VARIABLES = ("container", "KUBERNETES_SERVICE_HOST")


def connector_of(process: str) -> str:
    """NAME of a connection NAME.1, NAME.2, ...; of any other process its own name."""
    name, _, number = process.rpartition(".")
    return name if name and number.isdecimal() else process


class ConnectorConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`[connectors.NAME]`: one exchange connection, or as many as its instruments need."""

    exchange: str
    tickers: list[str]  # symbols or patterns (`*USDT`), `!pattern` leaves out
    kinds: list[str] = msgspec.field(default_factory=list)  # of instruments: spot, perpetual, option, ...; none = all
    bases: list[str] = msgspec.field(default_factory=list)
    quotes: list[str] = msgspec.field(default_factory=list)
    feeds: list[str] = msgspec.field(default_factory=lambda: ["trades", "orderbook_l2", "bbo"])
    cpu: int | None = None  # the process is pinned to it
    capacity: dict[str, int] = msgspec.field(default_factory=dict)  # rows of a ring, a power of two
    ws_url: str = ""  # instead of the venue's
    rest_url: str = ""
    ca_file: str = ""  # a certificate authority to trust besides the system's
    credentials_file: str = ""
    book_depth: int = 0  # levels of a snapshot, 0 = the venue's default
    book_interval: str = ""  # "" = the venue's default
    intervals: list[str] = msgspec.field(default_factory=lambda: ["1m"])  # of candles
    trade_channel: str = ""  # where a venue has several; "" = its default
    backfill: int = 1000  # closed candles of each interval fetched at the start, where the venue is polled
    poll_s: float = 0.0  # between two requests for the same thing, where the venue is polled; 0 = the venue's default
    late_s: float = 120.0  # an answer of a polled venue that is older is not believed to be the newest; 0 = any age
    rest_fallbacks: list[str] = msgspec.field(default_factory=list)  # asked in turn when one does not answer
    silent_s: float = 0.0  # a stream without data for so long is checked over REST; 0 = the venue's default
    stale_s: float = 0.0  # a connection without data for so long is given up; 0 = the venue's default
    lifetime_s: float = 0.0  # a connection is replaced after so long; 0 = before the venue ends it
    reconnect_most_s: float = 60.0  # cap of the back-off
    instruments_s: float = 600.0  # the list of instruments is read so often; 0 = never
    clock_s: float = 30.0  # the venue is asked for its time so often


class ArbiterConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`[arbiters.NAME]`: one process that merges the rings of several legs into rings of its own.

    Writers of an arbitrated feed should drain the arbiter's rings, not those of its legs: `connectors = ["NAME"]`.
    """

    legs: list[str]  # processes that collect the same streams: connectors, or their connections NAME.1, NAME.2, ...
    feeds: list[str] = msgspec.field(default_factory=list)  # none = those that all legs have
    cpu: int | None = None
    capacity: dict[str, int] = msgspec.field(default_factory=dict)
    wait_ms: float = 50.0  # a trade ahead of a missing one waits so long for another leg


class WriterConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`[writers.NAME]`: one process that drains rings into one sink."""

    out: str
    sink: str = "parquet"
    connectors: list[str] = msgspec.field(default_factory=lambda: ["*"])
    feeds: list[str] = msgspec.field(default_factory=lambda: ["*"])
    cpu: int | None = None
    roll_rows: int = 1_000_000
    roll_s: float = 60.0


class MonitorConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`[monitor]`: what `mdcollector monitor` serves, writes and tells. Secrets come from a file or the environment."""

    listen: str = "127.0.0.1:9464"  # HOST:PORT of /metrics and /health; port 0 = any
    csv: str = ""  # metrics.csv, a line per connector and second; "" = none
    group_s: float = 10.0  # what happens within it is told at once
    cooldown_s: float = 3600.0  # the same is not told again before
    webhook_url: str = ""  # gets each notice as JSON
    telegram_chat: str = ""  # chat id; the bot's token is in telegram_token_file or MDCOLLECTOR_TELEGRAM_TOKEN
    telegram_token_file: str = ""
    telegram_url: str = "https://api.telegram.org"


class FleetConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    rings: str = str(DEFAULT_RINGS)
    connectors: dict[str, ConnectorConfig] = msgspec.field(default_factory=dict)
    arbiters: dict[str, ArbiterConfig] = msgspec.field(default_factory=dict)
    writers: dict[str, WriterConfig] = msgspec.field(default_factory=dict)
    monitor: MonitorConfig = msgspec.field(default_factory=MonitorConfig)


Section = TypeVar("Section", ConnectorConfig, ArbiterConfig, WriterConfig, MonitorConfig)


def sink_kinds() -> list[str]:
    """Names of the sinks that are installed: the modules of `mdcollector/sinks`, which need not be loaded for it."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).with_name("sinks"))]))


def load(path: Path) -> FleetConfig:
    """Read and check a fleet file; relative paths in it are relative to the file. ConfigError says what is wrong."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for key in raw:
        if key not in FleetConfig.__struct_fields__:
            raise ConfigError(f"{path}: unknown key {key!r}; allowed are {', '.join(FleetConfig.__struct_fields__)}")
    rings = raw.get("rings", str(DEFAULT_RINGS))
    if not isinstance(rings, str) or not rings:
        raise ConfigError(f"{path}: rings = {rings!r}: expected the path of a directory")
    fleet = FleetConfig(rings=str(path.parent / rings))
    fleet.connectors = _sections(path, raw, "connectors", ConnectorConfig)
    fleet.arbiters = _sections(path, raw, "arbiters", ArbiterConfig)
    fleet.writers = _sections(path, raw, "writers", WriterConfig)
    for name, connector in fleet.connectors.items():
        check_connector(f"{path}: connectors.{name}", connector)
        connector.credentials_file = _below(path, connector.credentials_file)
        connector.ca_file = _below(path, connector.ca_file)
    _check_names(path, fleet)
    for name, arbiter in fleet.arbiters.items():
        _check_arbiter(f"{path}: arbiters.{name}", name, arbiter, fleet.connectors)
    for name, writer in fleet.writers.items():
        where = f"{path}: writers.{name}"
        _check_feeds(f"{where}.feeds", [feed for feed in writer.feeds if "*" not in feed], list(FEEDS))
        _check_cpu(f"{where}.cpu", writer.cpu)
        _check_range(f"{where}.roll_rows", writer.roll_rows, 1, 100_000_000)
        _check_range(f"{where}.roll_s", writer.roll_s, 0.1, 86_400)
        if not writer.out:
            raise ConfigError(f"{where}.out is empty: expected where the tables go")
        if "://" not in writer.out:
            writer.out = str(path.parent / writer.out)
        if writer.sink not in sink_kinds():
            raise ConfigError(f"{where}.sink = {writer.sink!r}: not known; there are {', '.join(sink_kinds())}")
    _check_drains(path, fleet)
    fleet.monitor = _section(f"{path}: monitor", raw.get("monitor", {}), MonitorConfig)
    check_monitor(f"{path}: monitor", fleet.monitor)
    fleet.monitor.csv = _below(path, fleet.monitor.csv)
    fleet.monitor.telegram_token_file = _below(path, fleet.monitor.telegram_token_file)
    return fleet


def check_monitor(where: str, monitor: MonitorConfig) -> None:
    host, _, port = monitor.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"{where}.listen = {monitor.listen!r}: expected HOST:PORT")
    for key, value in (("webhook_url", monitor.webhook_url), ("telegram_url", monitor.telegram_url)):
        if value and not (value.startswith(("http://", "https://")) and _host(value)):
            raise ConfigError(f"{where}.{key} = {value!r}: expected http:// or https:// and a host")
    _check_range(f"{where}.group_s", monitor.group_s, 0, 3600)
    _check_range(f"{where}.cooldown_s", monitor.cooldown_s, 0, 7 * 86_400)


def telegram_token(monitor: MonitorConfig) -> str:
    """The token of the bot; "" when no chat is configured. ConfigError, never with the token in it, when it lacks."""
    if not monitor.telegram_chat:
        return ""
    if not monitor.telegram_token_file:
        token = os.environ.get("MDCOLLECTOR_TELEGRAM_TOKEN", "")
    else:
        token = _secret(Path(monitor.telegram_token_file))
    if not token.strip():
        raise ConfigError("monitor.telegram_chat: needs telegram_token_file or MDCOLLECTOR_TELEGRAM_TOKEN")
    return token.strip()


def _secret(path: Path) -> str:
    """The text of a file that only its owner can read. ConfigError, never with a part of it."""
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")[:SECRET_BYTES_MAX]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: credentials cannot be read: {type(error).__name__}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path}: credentials are open to others (mode {mode & 0o777:o}); allowed is 600")
    return text


def _below(path: Path, name: str) -> str:
    return str(path.parent / name) if name else ""


def _sections(path: Path, raw: Mapping[str, Any], kind: str, shape: type[Section]) -> dict[str, Section]:
    tables = raw.get(kind, {})
    if not isinstance(tables, dict):
        raise ConfigError(f"{path}: {kind} = {tables!r}: expected tables [{kind}.NAME]")
    sections: dict[str, Section] = {}
    for name, table in tables.items():
        where = f"{path}: {kind}.{name}"
        if not NAME.fullmatch(name):
            raise ConfigError(f"{where}: a name has letters, digits, '_', '.', '-' and begins with a letter or digit")
        sections[name] = _section(where, table, shape)
    return sections


def _section(where: str, table: Any, shape: type[Section]) -> Section:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} = {table!r}: expected a table [{where.rpartition(': ')[2]}]")
    for key in table:
        if key not in shape.__struct_fields__:
            allowed = ", ".join(shape.__struct_fields__)
            raise ConfigError(f"{where}.{key} = {table[key]!r}: unknown key; allowed are {allowed}")
    try:
        return msgspec.convert(table, shape)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(where, table, error)) from error


def _explain(where: str, table: Mapping[str, Any], error: msgspec.ValidationError) -> str:
    """The library's "Expected `int`, got `str` - at `$.cpu`" with the key spelled out and the value beside it."""
    text, _, at = str(error).partition(" - at `$")
    keys = re.findall(r"[^.\[\]`]+", at)
    value: Any = table
    for key in keys:
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            return f"{where}{at.rstrip('`')}: {text}"
    return f"{where}.{'.'.join(keys)} = {value!r}: {text}" if keys else f"{where}: {text}"


def check_connector(where: str, connector: ConnectorConfig) -> None:
    """Values that stand for themselves; `where` begins the text of a ConfigError."""
    if not connector.tickers or not all(connector.tickers):
        raise ConfigError(f"{where}.tickers = {connector.tickers!r}: expected at least one symbol or pattern")
    if all(ticker.startswith("!") for ticker in connector.tickers):
        raise ConfigError(f"{where}.tickers = {connector.tickers!r}: all exclude; begin with what is meant, as '*'")
    for key in ("kinds", "bases", "quotes"):
        if not all(getattr(connector, key)):
            raise ConfigError(f"{where}.{key} = {getattr(connector, key)!r}: expected names; an empty one fits nothing")
    _check_feeds(f"{where}.feeds", connector.feeds, list(DATA_FEEDS))
    if not connector.feeds:
        raise ConfigError(f"{where}.feeds is empty; allowed are {', '.join(DATA_FEEDS)}")
    _check_cpu(f"{where}.cpu", connector.cpu)
    _check_capacity(where, connector.capacity)
    for key, value, schemes in (
        ("ws_url", connector.ws_url, ("ws://", "wss://")),
        ("rest_url", connector.rest_url, ("http://", "https://")),
        *(("rest_fallbacks", url, ("http://", "https://")) for url in connector.rest_fallbacks),
    ):
        if value and not (value.startswith(schemes) and _host(value)):
            raise ConfigError(f"{where}.{key} = {value!r}: expected {' or '.join(schemes)} and a host")
    _check_range(f"{where}.book_depth", connector.book_depth, 0, 5000)
    _check_range(f"{where}.backfill", connector.backfill, 0, 10_000)
    _check_range(f"{where}.poll_s", connector.poll_s, 0, 3600)
    _check_range(f"{where}.late_s", connector.late_s, 0, 86_400)
    _check_range(f"{where}.silent_s", connector.silent_s, 0, 86_400)
    _check_range(f"{where}.stale_s", connector.stale_s, 0, 86_400)
    _check_range(f"{where}.lifetime_s", connector.lifetime_s, 0, 7 * 86_400)
    _check_range(f"{where}.instruments_s", connector.instruments_s, 0, 86_400)
    _check_range(f"{where}.clock_s", connector.clock_s, 0.1, 86_400)
    _check_range(f"{where}.reconnect_most_s", connector.reconnect_most_s, 0.1, 3600)


def _check_arbiter(where: str, name: str, arbiter: ArbiterConfig, connectors: Mapping[str, ConnectorConfig]) -> None:
    """Legs that exist, that say the same, and feeds that all of them have; fills in `feeds`."""
    known = ", ".join(connectors) or "none"
    if len(arbiter.legs) < 2 or len(set(arbiter.legs)) < len(arbiter.legs):
        raise ConfigError(f"{where}.legs = {arbiter.legs!r}: expected two or more different connectors of {known}")
    legs = []
    for leg in arbiter.legs:
        found = connectors.get(connector_of(leg))
        if found is None:
            raise ConfigError(f"{where}.legs = {leg!r}: no such connector; there are {known}")
        legs.append(found)
    exchanges = sorted({leg.exchange for leg in legs})
    if len(exchanges) > 1:
        raise ConfigError(f"{where}.legs: of different exchanges ({', '.join(exchanges)}); expected one")
    for key in ("trade_channel", "book_depth"):  # they say which stream it is, so which ids its rows have
        if len(values := sorted({str(getattr(leg, key)) for leg in legs})) > 1:
            raise ConfigError(f"{where}.legs: their {key} differs ({', '.join(map(repr, values))}); expected one")
    common = [feed for feed in legs[0].feeds if all(feed in leg.feeds for leg in legs)]
    arbiter.feeds = arbiter.feeds or common
    if not arbiter.feeds:
        raise ConfigError(f"{where}.legs: have no feed in common")
    _check_feeds(f"{where}.feeds", arbiter.feeds, common)
    _check_cpu(f"{where}.cpu", arbiter.cpu)
    _check_capacity(where, arbiter.capacity)
    _check_range(f"{where}.wait_ms", arbiter.wait_ms, 0, 10_000)


def _check_names(path: Path, fleet: FleetConfig) -> None:
    """Each process has a name of its own, and what is called NAME.1, NAME.2, ... is a connection of a connector."""
    seen: dict[str, str] = {}
    for kind in ("connectors", "arbiters", "writers"):
        for name in getattr(fleet, kind):
            if name in seen:
                raise ConfigError(f"{path}: {kind}.{name}: {seen[name]} has this name too; choose another one")
            seen[name] = f"{kind}.{name}"
            if connector_of(name) != name:  # also without a connector NAME: stored rows are told apart by this alone
                raise ConfigError(
                    f"{path}: {kind}.{name}: a connector {connector_of(name)} calls its connections so; choose another name"
                )


def _check_drains(path: Path, fleet: FleetConfig) -> None:
    """A writer has something to drain, and a stream one writer for each place it goes to."""
    names = [*fleet.connectors, *fleet.arbiters]
    owners: dict[tuple[str, str, str], list[tuple[str, str]]] = {}  # sink, out, feed -> connector or process, writer
    for writer, settings in fleet.writers.items():
        drained: list[str] = []
        for pattern in settings.connectors if names else ():
            # NAME means all connections of a connector, as NAME.* does; NAME.1 one of them.
            found = [pattern] if pattern.rpartition(".")[0] in names else fnmatch.filter(names, pattern)
            if not found:
                raise ConfigError(
                    f"{path}: writers.{writer}.connectors = {pattern!r}: fits none; there are {', '.join(names)}"
                )
            drained += found
        feeds = {feed for pattern in settings.feeds for feed in fnmatch.filter(FEEDS, pattern)}
        for name, feed in itertools.product(drained, feeds):
            place, whole = (settings.sink, os.path.normpath(settings.out), feed), name.removesuffix(".*")
            for taken, other in owners.setdefault(place, []):
                if other != writer and (taken == whole or connector_of(taken) == whole or connector_of(whole) == taken):
                    raise ConfigError(
                        f"{path}: writers.{writer}: {other} puts {feed} of {name} into {settings.out} too; "
                        "a stream has one writer in a place"
                    )
            owners[place].append((whole, writer))


def takes(connectors: Sequence[str], feeds: Sequence[str], process: str, feed: str) -> bool:
    """Whether a writer with these patterns drains this feed of this process; who means a connector means all of it."""
    names = process, connector_of(process)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in connectors) and any(
        fnmatch.fnmatchcase(feed, pattern) for pattern in feeds
    )


def _check_capacity(where: str, capacity: Mapping[str, int]) -> None:
    for feed, rows in capacity.items():
        _check_feeds(f"{where}.capacity", [feed], list(FEEDS))
        if rows & (rows - 1) or not CAPACITY_MIN <= rows <= CAPACITY_MAX:
            raise ConfigError(
                f"{where}.capacity.{feed} = {rows}: allowed are powers of two from {CAPACITY_MIN} to {CAPACITY_MAX}"
            )


def _host(url: str) -> str:
    """The host of a URL; "" when there is none, or its port is no port."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        return ""
    return (parts.hostname or "") if port != 0 else ""


def _check_feeds(where: str, feeds: Sequence[str], allowed: Sequence[str]) -> None:
    for feed in feeds:
        if feeds.count(feed) > 1:
            raise ConfigError(f"{where} = {feed!r}: named more than once")
        if feed not in allowed:
            raise ConfigError(f"{where} = {feed!r}: no such feed; allowed are {', '.join(allowed)}")


def _check_cpu(where: str, cpu: int | None) -> None:
    available = sorted(os.sched_getaffinity(0))
    if cpu is not None and cpu not in available:
        raise ConfigError(f"{where} = {cpu}: not a CPU of this machine; allowed are {', '.join(map(str, available))}")


def _check_range(where: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{where} = {value!r}: allowed is {low} to {high}")


def check_user() -> None:
    """ConfigError for root, unless in a container or told so: what takes data from outside needs no rights over a machine."""
    contained = any(os.environ.get(name) for name in CONTAINER_VARIABLES) or any(map(os.path.exists, CONTAINER_MARKS))
    if os.geteuid() == 0 and not contained and os.environ.get(ALLOW_ROOT) != "1":
        raise ConfigError(
            f"writers do not run as root: start it as a user of its own (as the systemd units do), or set {ALLOW_ROOT}=1"
        )


def credentials(exchange: str, names: Sequence[str], file: str) -> dict[str, str]:
    """Credentials of a venue: from `file` (TOML), else from MDCOLLECTOR_<EXCHANGE>_<NAME>; {} when there are none.

    ConfigError, never with a value in it, when they are incomplete or others can read the file.
    """
    if not names:
        return {}
    if file:
        path = Path(file)
        text = _secret(path)
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            lines = ", ".join(f'{name} = "..."' for name in names)
            raise ConfigError(f"{path}: credentials are not TOML; expected are lines {lines}") from None
        source = str(path)
    else:
        variables = {name: f"MDCOLLECTOR_{exchange.upper()}_{name.upper()}" for name in names}
        found = {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}
        if not found:
            return {}
        source = "environment " + ", ".join(variables.values())
    missing = [name for name in names if not isinstance(found.get(name), str) or not found[name]]
    if missing:
        raise ConfigError(f"{source}: credentials of {exchange} lack {', '.join(missing)}")
    return {name: found[name] for name in names}
