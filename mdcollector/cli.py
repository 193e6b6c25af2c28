"""The commands of `mdcollector`. Words in, words out: what they do is done by the modules they call.

Imports of heavy modules stand inside the commands, so that a connector does not carry a table writer in memory.
"""

import ctypes
import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdcollector import logs
from mdcollector.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_FINDINGS,
    ConfigError,
    Disconnected,
    RateLimited,
    RingError,
    StorageError,
)
from mdcollector.options import Finite

if TYPE_CHECKING:
    from rich.console import Console

    from mdcollector.planning import FleetPlan

log = logging.getLogger(__name__)

CONFIG = click.option(
    "-c", "--config", "config_path", type=click.Path(path_type=Path, dir_okay=False), required=True,
    help="Fleet file (TOML).",
)  # fmt: skip
OTHERS_NOTHING = 0o027
LOG_LEVELS, LOG_FORMATS = ("debug", "info", "warning", "error"), ("text", "json")
SECONDS = click.option("--seconds", type=Finite(0, min_open=True), help="Stop by itself after so long.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def _set_log(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """A log option behind the command's name overrules the one before it."""
    if value is not None:
        ctx.obj[ctx.obj.index(f"--{str(param.name).replace('_', '-')}") + 1] = value
        logs.set_up(ctx.obj[1], ctx.obj[3])


def _complain(ctx: click.Context, error: Exception) -> None:
    """Say what ends the command: a sentence for people, a line like all others where logs are for machines."""
    if ctx.obj is not None and "json" in ctx.obj:
        log.error("%s", error)
    else:
        click.echo(f"mdcollector: {error}", err=True)


class Commands(click.Group):
    """A group whose commands all take the log options, and whose errors of ours become one line and an exit code."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        for option, choices in (("--log-level", LOG_LEVELS), ("--log-format", LOG_FORMATS)):
            cmd.params.append(
                click.Option([option], type=click.Choice(choices), expose_value=False, callback=_set_log,
                             help="As before the command.")
            )  # fmt: skip
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigError, RingError) as error:
            _complain(ctx, error)
            ctx.exit(EXIT_CONFIG)
        except (StorageError, Disconnected, RateLimited) as error:
            _complain(ctx, error)
            ctx.exit(EXIT_FINDINGS)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
                raise
            click.echo(f"mdcollector: standard output cannot be written: {error.strerror}", err=True)
            ctx.exit(EXIT_FINDINGS)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True)
@click.option("--log-format", type=click.Choice(LOG_FORMATS), default="text", show_default=True)
@click.option("--parent", type=int, hidden=True, help="End as on SIGTERM when this parent process is gone.")
@click.version_option(package_name="mdcollector")
@click.pass_context
def main(ctx: click.Context, log_level: str, log_format: str, parent: int | None) -> None:
    """Record crypto market data without losing any, and prove it.

    \b
    Try it without a network:      make demo
    Collect with one command:      mdcollector run binance_spot BTCUSDT --target data
    Run a fleet from a file:       mdcollector check -c fleet.toml && mdcollector up -c fleet.toml
    Prove what was written:        mdcollector verify data

    Exit codes: 0 done and proven, 1 finished with findings, 2 wrong use, 78 wrong configuration.
    """
    os.umask(os.umask(OTHERS_NOTHING) | OTHERS_NOTHING)  # files 0640, directories 0750, whoever makes them
    logs.set_up(log_level, log_format)
    if parent is not None:
        end_with(parent)
    ctx.obj = ["--log-level", log_level, "--log-format", log_format]


def _console() -> "Console":
    """Where tables are printed; a pipe gets wide lines instead of cut ones."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Get SIGTERM when the supervisor dies, however it dies: an orphan would hold the rings against the next fleet."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it was gone before the line above
        sys.exit(EXIT_DONE)


def stop_signal() -> threading.Event:
    """An event that SIGTERM and Ctrl-C set."""
    event = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: event.set())
    return event


def _known_exchange(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    from mdcollector.exchanges import venue_class

    try:
        venue_class(value)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error
    return value


def _listed(_ctx: click.Context, _param: click.Parameter, value: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


EXCHANGE = click.argument("exchange", callback=_known_exchange)
FEEDS_DEFAULT = ("trades", "orderbook_l2", "bbo")


@main.command()
@EXCHANGE
@click.argument("tickers", nargs=-1, required=True)
@click.option(
    "--feeds", default="", callback=_listed, help="Comma-separated [trades,orderbook_l2,bbo; all where there are none]."
)
@click.option("--intervals", default="", callback=_listed, help="Of candles [1m, or the shortest of the venue].")
@click.option(
    "--kinds", default="", callback=_listed, help="Only these kinds of instruments: spot,perpetual,option,..."
)
@click.option("--bases", default="", callback=_listed, help="Only instruments that trade these: BTC,ETH.")
@click.option("--quotes", default="", callback=_listed, help="Only instruments that are priced in these: USDT,USD.")
@click.option(
    "--target", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory of the tables."
)
@click.option(
    "--rings", type=click.Path(path_type=Path, file_okay=False), help="Directory of the rings [TARGET/_rings]."
)
@click.option("--ws-url", default="", help="WebSocket base instead of the venue's; its paths are kept below it.")
@click.option("--rest-url", default="", help="REST base instead of the venue's.")
@click.option(
    "--roll-s",
    type=Finite(0.1, 86_400),
    default=60.0,
    show_default=True,
    help="Seconds that rows wait at most to be made durable.",
)
@SECONDS
@click.option("--cpu", type=int, help="Pin the connector to this CPU.")
@JSON
@click.pass_context
def run(
    ctx: click.Context, exchange: str, tickers: Sequence[str], feeds: list[str], intervals: list[str],
    kinds: list[str], bases: list[str], quotes: list[str], target: Path, rings: Path | None, ws_url: str, rest_url: str, roll_s: float,
    seconds: float | None, cpu: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Collect TICKERS (symbols or patterns) of EXCHANGE and write tables until stopped.

    \b
    mdcollector run binance_spot BTCUSDT 'ETH*' --target data
    mdcollector run binance_spot '*' '!*UP' --quotes USDT,USDC --target data
    mdcollector run deribit BTC-PERPETUAL --feeds trades,tickers --target data --seconds 60
    """
    import msgspec
    import tomli_w

    from mdcollector import config
    from mdcollector.connector import venue_options
    from mdcollector.exchanges import venue_class

    kind = venue_class(exchange)
    feeds = feeds or [feed for feed in FEEDS_DEFAULT if feed in kind.FEEDS] or list(kind.FEEDS)
    if intervals and "candles" not in feeds:
        raise click.UsageError(f"--intervals {','.join(intervals)}: they are of candles; add candles to --feeds")
    intervals = intervals or [interval for interval in ("1m", *kind.INTERVALS) if interval in kind.INTERVALS][:1]
    rings = (rings or target / "_rings").absolute()
    connector = config.ConnectorConfig(
        exchange=exchange,
        tickers=list(tickers),
        feeds=feeds,
        intervals=intervals,
        kinds=kinds,
        bases=bases,
        quotes=quotes,
        ws_url=ws_url,
        rest_url=rest_url,
        cpu=cpu,
    )
    try:
        config.check_connector("", connector)
        venue_options(connector, kind)
    except ConfigError as error:
        raise click.UsageError(str(error).removeprefix(".")) from error
    fleet = {
        "rings": str(rings),
        "connectors": {exchange: {k: v for k, v in msgspec.to_builtins(connector).items() if v is not None}},
        "writers": {
            f"{exchange}-parquet": {
                "out": str(target.absolute()), "connectors": [exchange, f"{exchange}.*"], "roll_s": roll_s
            }
        },
    }  # fmt: skip
    path = rings / f"run-{exchange}.toml"
    try:
        rings.mkdir(parents=True, exist_ok=True, mode=0o750)
        path.write_text(tomli_w.dumps(fleet), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    ctx.exit(_supervise(path, ctx.obj, seconds, as_json))


@main.command()
@CONFIG
@SECONDS
@JSON
@click.pass_context
def up(ctx: click.Context, config_path: Path, seconds: float | None, as_json: bool) -> None:
    """Run the whole fleet; restart what dies; on Ctrl-C stop in order and print rows received = rows in rings = rows written."""
    ctx.exit(_supervise(config_path, ctx.obj, seconds, as_json))


PROGRESS_EVERY_S = 10.0


def _supervise(config_path: Path, log_args: Sequence[str], seconds: float | None, as_json: bool) -> int:
    import time

    from mdcollector import config
    from mdcollector import supervisor as processes
    from mdcollector.records import DATA_FEEDS
    from mdcollector.supervisor import Supervisor, balance, undrained, unread

    fleet = config.load(config_path)
    if fleet.writers:
        config.check_user()
    logs.identify("supervisor")
    supervisor = Supervisor(config_path, fleet, log_args)
    stop = stop_signal()
    next_line = time.monotonic() + PROGRESS_EVERY_S

    def show_progress() -> None:
        nonlocal next_line
        if time.monotonic() < next_line:
            return
        next_line = time.monotonic() + PROGRESS_EVERY_S
        for name, c in processes.status(supervisor.rings)["connectors"].items():
            rings = c["rings"]
            rows = ", ".join(f"{feed} {ring['published']:,}" for feed, ring in rings.items())
            click.echo(f"{name}: {c['state']}; rows {rows}", err=True)

    deadline = time.monotonic() + seconds if seconds is not None else float("inf")
    names = [child.name for child in reversed(supervisor.children)]
    click.echo(f"{', '.join(names)}: running, rings in {supervisor.rings}; Ctrl-C stops in order", err=True)
    supervisor.run(lambda: stop.is_set() or time.monotonic() > deadline, show_progress)
    supervisor.close()
    rows, idle = balance(supervisor.rings, list(fleet.writers)), supervisor.idle()
    passed_over = unread(supervisor.rings, list(fleet.writers))
    filled = [child.name for child in (*supervisor.connectors, *supervisor.arbiters)]
    left = undrained(supervisor.rings, fleet, filled)
    lost = sum(row.missing + row.lapped + row.damaged for row in rows)
    refused = [*supervisor.refused, *(c.name for c in supervisor.children if c.last_exit == EXIT_CONFIG)]
    if as_json:
        import msgspec

        found = {"lost": lost, "idle": idle, "refused": refused, "unread": passed_over, "undrained": left}
        click.echo(json.dumps({"rings": msgspec.to_builtins(rows), **found}))
    else:
        from rich.table import Table

        table = Table(
            "connector", "feed", "received", "in the ring", "written", "lapped", "damaged",
            title="rows received = rows in rings = rows written",
        )  # fmt: skip
        for row in rows:
            numbers = (row.published, row.durable, row.lapped, row.damaged)
            received = "unknown" if row.received is None else f"{row.received:,}"
            table.add_row(row.connector, row.feed, received, *(f"{number:,}" for number in numbers))
        for stream, published in left.items():
            name, _, feed = stream.rpartition("/")
            table.add_row(name, feed, "", f"{published:,}", "no writer", "", "")
        _console().print(table)
        for name, why in idle.items():
            click.echo(f"{name}: brought no row: {why}")
        if lost:
            kept = sum(row.missing for row in rows)
            click.echo(f"{lost:,} rows were not written" + (f"; {kept:,} of them wait in the rings" if kept else ""))
        for ring, why in passed_over.items():
            click.echo(f"{ring}: not written, its rows are not counted: {why}")
        if left:
            by = ", ".join(left if fleet.writers else dict.fromkeys(stream.rpartition("/")[0] for stream in left))
            why = "no writer takes them" if fleet.writers else "no writer is configured"
            click.echo(f"{sum(left.values()):,} rows are in the rings only, those of {by}: {why}")
        elif not (lost or passed_over) and any(child.name not in idle for child in supervisor.connectors):
            click.echo("every row that went in was written")
    if refused:
        return EXIT_CONFIG
    # A writer that leaves out the ledger, the instruments or the clocks was told to.
    data_left = bool(fleet.writers) and any(stream.rpartition("/")[2] in DATA_FEEDS for stream in left)
    return EXIT_FINDINGS if lost or idle or passed_over or data_left else EXIT_DONE


@main.command()
@click.argument("name")
@CONFIG
@click.option(
    "--resolved", hidden=True, type=click.Path(path_type=Path), help="Tickers that a supervisor has resolved already."
)
def connect(name: str, config_path: Path, resolved: Path | None) -> None:
    """Run the connector NAME of a fleet file (what a systemd unit runs)."""
    from mdcollector import config, supervisor
    from mdcollector.connector import run_connector

    fleet = config.load(config_path)
    logs.identify(name)
    planned, settings = supervisor.find_planned(str(config_path), name, fleet, resolved)
    run_connector(
        name, settings, Path(fleet.rings), planned.streams, connector=planned.connector, number=planned.number
    )


@main.command()
@click.argument("name")
@CONFIG
@JSON
@click.pass_context
def write(ctx: click.Context, name: str, config_path: Path, as_json: bool) -> None:
    """Run the writer NAME of a fleet file: drain rings until stopped, then everything that is published."""
    stop = stop_signal()  # before the libraries are loaded, which takes a while
    from mdcollector import config
    from mdcollector.connector import pin
    from mdcollector.writer import Writer

    fleet = config.load(config_path)
    if name not in fleet.writers:
        raise ConfigError(f"{config_path}: no writer {name!r}; there are {', '.join(fleet.writers) or 'none'}")
    config.check_user()
    settings = fleet.writers[name]
    logs.identify(name)
    pin(settings.cpu)
    report = Writer(
        Path(fleet.rings), Path(settings.out), name=name, connectors=settings.connectors, feeds=settings.feeds,
        roll_rows=settings.roll_rows, roll_s=settings.roll_s, sink=settings.sink,
    ).run(stop.is_set)  # fmt: skip
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps(asdict(report)))
    ctx.exit(EXIT_DONE if report.complete else EXIT_FINDINGS)


@main.command()
@click.argument("name")
@CONFIG
def arbitrate(name: str, config_path: Path) -> None:
    """Run the arbiter NAME of a fleet file: merge the rings of its legs into one, each row once, until stopped."""
    from mdcollector import config
    from mdcollector.arbiter import Arbiter
    from mdcollector.connector import lock_memory, pin
    from mdcollector.supervisor import merged_exchange

    fleet = config.load(config_path)
    if name not in fleet.arbiters:
        raise ConfigError(f"{config_path}: no arbiter {name!r}; there are {', '.join(fleet.arbiters) or 'none'}")
    settings = fleet.arbiters[name]
    exchange = merged_exchange(f"{config_path}: arbiters.{name}", settings, fleet.connectors)
    logs.identify(name)
    pin(settings.cpu)
    lock_memory()
    stop = stop_signal()
    Arbiter(
        Path(fleet.rings), name, exchange=(exchange.name, int(exchange)), legs=settings.legs, feeds=settings.feeds,
        capacity=settings.capacity, wait_s=settings.wait_ms / 1000,
    ).run(stop.is_set)  # fmt: skip


@main.command()
@CONFIG
@click.option("--listen", default="", help="HOST:PORT instead of the fleet file's [127.0.0.1:9464]; port 0 = any.")
@click.option("--rules", is_flag=True, help="Print the alerts as rules for Prometheus, and end.")
def monitor(config_path: Path, listen: str, rules: bool) -> None:
    """Watch a fleet: serve /metrics and /health, write metrics.csv, send alerts (section [monitor] of the fleet file).

    \b
    mdcollector monitor -c fleet.toml
    curl -s 127.0.0.1:9464/health
    mdcollector monitor -c fleet.toml --rules > mdcollector.rules.yml
    """
    import asyncio
    import signal as signals

    from mdcollector import config
    from mdcollector import monitor as watching
    from mdcollector.alerts import Messenger

    fleet = config.load(config_path)
    if rules:
        click.echo(watching.rules(), nl=False)
        return
    logs.identify("monitor")
    settings = fleet.monitor
    if listen:
        settings.listen = listen
        config.check_monitor("--listen", settings)
    messenger = Messenger(
        webhook_url=settings.webhook_url, telegram_chat=settings.telegram_chat, telegram_url=settings.telegram_url,
        telegram_token=config.telegram_token(settings),
    )  # fmt: skip
    disks = [Path(writer.out) for writer in fleet.writers.values() if "://" not in writer.out]

    async def run() -> None:
        it = watching.Monitor(Path(fleet.rings), settings, [disk for disk in disks if disk.exists()], messenger)
        for number in (signals.SIGTERM, signals.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, it.stop.set)
        await it.run()

    asyncio.run(run())


@main.command()
@CONFIG
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="/etc/systemd/system, or anywhere."
)
@click.option("--program", default="", help="How the units start it [this interpreter -m mdcollector].")
def units(config_path: Path, out: Path, program: str) -> None:
    """Write systemd units for every process of a fleet file, with its CPUs and directories.

    \b
    mdcollector units -c fleet.toml --out /etc/systemd/system
    systemctl daemon-reload && systemctl enable --now mdcollector.target
    """
    import shlex

    from mdcollector import config, supervisor
    from mdcollector.units import DROP_INS
    from mdcollector.units import units as make

    fleet = config.load(config_path)
    connections = {}
    for name, settings in fleet.connectors.items():
        where = f"{config_path}: connectors.{name}"
        tickers = supervisor.resolve(where, settings, Path(fleet.rings), visitor=True)
        planned = supervisor.plan(where, name, settings, tickers, Path(fleet.rings), remember=False)
        connections[name] = [connection.name for connection in planned]
    files = {out / name: text for name, text in make(config_path, fleet, connections, shlex.split(program)).items()}
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            click.echo(str(path))
        for path in set(out.glob(DROP_INS)) - set(files):  # it would go on to pin a process that is no longer pinned
            path.unlink()
            click.echo(f"{path}: removed, it is of an earlier fleet file", err=True)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written: {error.strerror}") from error


@main.command()
@CONFIG
@click.option("--offline", is_flag=True, help="Do not ask the venues for their instruments; patterns stay as they are.")
@JSON
def check(config_path: Path, offline: bool, as_json: bool) -> None:
    """Validate a fleet file and show what it plans; every error names file, key and allowed values.

    Nothing is connected to. Shown are connections, subscriptions, request weight, memory, and the time until all books
    are live within what the venues allow one IP address. What cannot fit that is refused.
    """
    import msgspec

    from mdcollector import config, supervisor
    from mdcollector.planning import plan_fleet

    fleet = config.load(config_path)
    if not fleet.connectors:
        raise ConfigError(f"{config_path}: no [connectors.NAME]: nothing to collect")
    connectors = {}
    for name, settings in fleet.connectors.items():
        where = f"{config_path}: connectors.{name}"
        tickers = settings.tickers
        if not offline:
            tickers = supervisor.resolve(where, settings, Path(fleet.rings), visitor=True)
        connectors[name] = settings, supervisor.plan(where, name, settings, tickers, Path(fleet.rings), remember=False)
    for name, arbiter in fleet.arbiters.items():
        supervisor.merged_exchange(f"{config_path}: arbiters.{name}", arbiter, fleet.connectors)
    plan = plan_fleet(str(config_path), connectors)
    untaken = supervisor.untaken(fleet, plan.connections)
    if as_json:
        families = [{**msgspec.to_builtins(family), "sync_s": family.sync_s} for family in plan.families]
        click.echo(json.dumps({**msgspec.to_builtins(plan), "families": families, "untaken": untaken}))
        return
    _print_plan(plan)
    for connection in plan.connections:
        shown = ", ".join(connection.tickers[:5]) + (", ..." if len(connection.tickers) > 5 else "")
        click.echo(
            f"{connection.name}: {len(connection.streams)} streams of {len(connection.tickers)} tickers ({shown})"
        )
    for name, arbiter in fleet.arbiters.items():
        click.echo(f"{name}: merges {', '.join(arbiter.legs)}: {', '.join(arbiter.feeds)}")
    for name, writer in fleet.writers.items():
        click.echo(f"{name}: {writer.sink} to {writer.out}")
    if not fleet.writers:
        click.echo("no writer: rows stay in the rings, for readers, until they are overwritten")
    elif untaken:
        click.echo(
            f"warning: no writer takes {', '.join(untaken)}: these rows stay in the rings until they are overwritten"
        )
    click.echo(f"{config_path}: good, {len(plan.connections)} connections, {len(fleet.writers)} writers")


def _print_plan(plan: "FleetPlan") -> None:
    from rich.table import Table

    console = _console()
    table = Table(
        "connector", "exchange", "connections", "tickers", "streams", "messages", "weight", "polled", "rings",
        title="connectors",
    )  # fmt: skip
    for c in plan.connectors:
        numbers = (c.connections, c.tickers, c.streams, c.messages, c.weight)
        rest = f"{c.polled_per_s:g}/s" if c.polled_per_s else "", f"{c.ring_bytes / 2**20:,.0f} MiB"
        table.add_row(c.name, c.exchange, *(f"{number:,}" for number in numbers), *rest)
    console.print(table)
    table = Table(
        "limits of", "connections", "messages", "weight", "connect", "subscribe", "snapshots", "all live within",
        title="time that the limits of one IP address cost",
    )  # fmt: skip
    for f in plan.families:
        times = (f.connects_s, f.messages_s, f.weight_s, f.sync_s)
        counts = (f.connections, f.messages, f.weight)
        table.add_row(f.family, *(f"{n:,}" for n in counts), *(f"{seconds:,.1f} s" for seconds in times))
    console.print(table)


MAYBE_CONFIG = click.option(
    "-c", "--config", "config_path", type=click.Path(path_type=Path, dir_okay=False), help="Fleet file (TOML)."
)
RINGS = click.option("--rings", type=click.Path(path_type=Path, file_okay=False), help="Directory of the rings.")


@main.command()
@MAYBE_CONFIG
@RINGS
@JSON
@click.option("--quiet", is_flag=True, help="Print problems only (for health checks).")
@click.pass_context
def status(ctx: click.Context, config_path: Path | None, rings: Path | None, as_json: bool, quiet: bool) -> None:
    """Show what every process of a fleet says of itself. Exit code 1 when something is not well."""
    from mdcollector import health, supervisor

    rings = _rings(config_path, rings)
    found = supervisor.status(rings)
    problems = [str(finding) for finding in health.judge(found)]
    if not (found["connectors"] or found["arbiters"] or found["writers"]):
        problems.append(f"{rings}: no process has ever written here")
    if as_json:
        click.echo(json.dumps({**found, "problems": problems}))
    elif quiet:
        for problem in problems:
            click.echo(problem)
    else:
        _print_status(found, problems)
    ctx.exit(EXIT_FINDINGS if problems else EXIT_DONE)


@main.command()
@MAYBE_CONFIG
@click.option("--offline", is_flag=True, help="Do not ask the venues.")
@JSON
@click.pass_context
def doctor(ctx: click.Context, config_path: Path | None, offline: bool, as_json: bool) -> None:
    """Look whether this machine is fit for a fleet; each finding says what to do. Exit code 1 when something is bad."""
    import msgspec

    from mdcollector import config
    from mdcollector.doctor import BAD, GOOD, HINT, Verdict, examine, worst

    fleet = config.load(config_path) if config_path is not None else None
    colours = {GOOD: "green", HINT: "yellow", BAD: "bold red"}
    console, verdicts = _console(), list[Verdict]()
    for verdict in examine(fleet, offline=offline):
        verdicts.append(verdict)
        if not as_json:
            console.print(f"[{colours[verdict.verdict]}]{verdict.verdict:4}[/] ", end="")
            console.print(f"{verdict.what}: {verdict.found}", markup=False, highlight=False)
            if verdict.advice:
                console.print(f"       {verdict.advice}", markup=False, highlight=False, style="dim")
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(verdicts)))
    ctx.exit(EXIT_FINDINGS if worst(verdicts) == BAD else EXIT_DONE)


@main.command()
@MAYBE_CONFIG
@RINGS
def top(config_path: Path | None, rings: Path | None) -> None:
    """Watch a fleet in the terminal: rates, latencies, gaps, books, lag, CPU and memory of every process.

    Keys: s sorts by the next column, r turns the order, Enter shows all about a process, Escape closes it, q ends.
    """
    try:
        from mdcollector.top import Top
    except ModuleNotFoundError as error:
        raise click.UsageError(f"needs Textual ({error}): pip install 'mdcollector[top]'") from error
    from mdcollector import config

    fleet = config.load(config_path) if config_path is not None else config.FleetConfig()
    disks = [Path(writer.out) for writer in fleet.writers.values() if "://" not in writer.out]
    Top(_rings(config_path, rings), [disk for disk in disks if disk.exists()]).run()


def _rings(config_path: Path | None, rings: Path | None) -> Path:
    """The directory of rings that is meant: named, of the fleet file, of the environment, or the default one."""
    from mdcollector import config

    if rings is None:
        named = os.environ.get("MDCOLLECTOR_RINGS")
        rings = Path(config.load(config_path).rings) if config_path else Path(named) if named else config.DEFAULT_RINGS
    if not rings.is_dir():
        raise ConfigError(f"{rings}: no such directory of rings; name one with --rings or -c")
    return rings


def _print_streams(connectors: dict[str, dict[str, Any]]) -> None:
    """A table of the streams that are not well, if there are any."""
    from datetime import UTC, datetime

    from rich.markup import escape
    from rich.table import Table

    from mdcollector.health import streams_unwell

    def clock(ns: int) -> str:
        return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%H:%M:%S") if ns else ""

    columns = ("requested_ns", "acknowledged_ns", "first_data_ns", "data_ns")
    table = Table(
        "connector", "stream", "state", "requested", "acknowledged", "first data", "last data", title="streams, UTC"
    )
    for name, connector in connectors.items():
        for stream, (_, state) in streams_unwell(connector).items():
            times = (clock(connector["streams"][stream][column]) for column in columns)
            table.add_row(name, escape(stream), escape(state), *times)
    if table.row_count:
        _console().print(table)


def _streams_text(streams: dict[str, dict[str, Any]], unwell: int) -> str:
    """How many are well, and how many of them all have brought nothing: forced orders are rare, and nothing else tells."""
    quiet = sum(not stream["data_ns"] for stream in streams.values())
    return f"{len(streams) - unwell} of {len(streams)} well" + (f", {quiet} without data yet" if quiet else "")


def _print_status(found: dict[str, Any], problems: Sequence[str]) -> None:
    from rich.table import Table

    from mdcollector.health import streams_unwell
    from mdcollector.records import ALWAYS_ON
    from mdcollector.stats import clock_text

    console = _console()
    table = Table(
        "connector", "state", "connections", "streams", "rows", "gaps", "refused", "visible p50/p99", "venue's clock", "books",
        title="connectors",
    )  # fmt: skip
    for name, c in found["connectors"].items():
        rows = sum(ring["published"] for feed, ring in c["rings"].items() if feed not in ALWAYS_ON)
        refused = sum(n for k, n in c["counters"].items() if k.startswith("refused_"))
        latency = f"{c['publish_ns']['p50'] / 1000:.1f} / {c['publish_ns']['p99'] / 1000:.1f} us"
        books = f"{c['books'] - c['books_invalid_count']} of {c['books']} live"
        connections = str(c["counters"].get("connections", 0))
        table.add_row(
            name,
            c["state"],
            connections,
            _streams_text(c["streams"], len(streams_unwell(c))),
            f"{rows:,}",
            f"{c['rings']['gaps']['published']:,}",
            str(refused),
            latency,
            clock_text(c.get("clock", {})),
            books,
        )
    console.print(table)
    _print_streams(found["connectors"])
    if found["arbiters"]:
        table = Table("arbiter", "feed", "leg", "read", "first", "copies", "lapped", "waiting", title="arbiters")
        for name, arbiter in found["arbiters"].items():
            for leg, numbers in arbiter["legs"].items():
                for feed, n in numbers["feeds"].items():
                    counts = (n["read"], n["wins"], n["duplicates"], n["lapped"], n["lag_rows"])
                    table.add_row(name, feed, leg, *(f"{count:,}" for count in counts))
        console.print(table)
    table = Table("writer", "stream", "durable", "lag", "lapped", "damaged", title="writers")
    for name, writer in found["writers"].items():
        for stream, n in writer["streams"].items():
            numbers = (n["durable"], n["lag_rows"], n["lapped"], n["damaged"])
            table.add_row(name, stream, *(f"{number:,}" for number in numbers))
    console.print(table)
    for name, c in found["connectors"].items():
        for what, note in c["notes"].items():
            console.print(f"{name}: {what}: {note}", style="yellow", markup=False)
    for problem in problems:
        console.print(problem, style="bold red", markup=False)
    if not problems:
        console.print("all well", style="green")


@main.command()
@EXCHANGE
@click.argument("recordings", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory of the tables.")
@click.option("--connector", default="", help="Name that the rows' files carry [EXCHANGE].")
@JSON
@click.pass_context
def normalize(
    ctx: click.Context, exchange: str, recordings: Sequence[Path], out: Path, connector: str, as_json: bool
) -> None:
    """Turn RECORDINGS of EXCHANGE into tables, through the very same decode, book, ring and writer path.

    Recordings are taken in the order given; books and counters go on from one to the next. The same input gives
    byte-identical rows. Exit code 1 when the recordings have holes or broken frames.
    """
    import msgspec
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from mdcollector.config import NAME
    from mdcollector.normalize import normalize as work

    if connector and not NAME.fullmatch(connector):
        raise click.BadParameter(f"{connector!r}: letters, digits, '_', '.', '-' only", param_hint="--connector")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} files"),
               TextColumn("{task.fields[entries]:,} entries"), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("normalize", total=len(recordings), entries=0)

        def show(recording: Path, entries: int) -> None:
            at = recordings.index(recording)
            progress.update(task, description=recording.name, completed=at, entries=entries)

        report = work(exchange, recordings, out, connector=connector, on_progress=show)
        progress.update(task, completed=len(recordings), entries=report.entries)
    findings = report.findings
    if as_json:
        click.echo(json.dumps({**msgspec.to_builtins(report), "findings": findings}))
    else:
        click.echo(f"{report.entries:,} entries, {report.rows_written:,} rows in {report.files} files below {out}")
        for feed, rows in report.rows.items():
            if rows:
                click.echo(f"  {feed:<14}{rows:>12,}")
        for name, count in sorted(report.counters.items()):
            sample = f"   e.g. {report.samples[name][:160]}" if name in report.samples else ""
            if count:
                click.echo(f"  {name:<30}{count:>8,}{sample}")
        for finding in findings:
            click.echo(f"finding: {finding}")
    ctx.exit(EXIT_FINDINGS if findings else EXIT_DONE)


def _with_progress(title: str, work: Callable[[], Any]) -> Any:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        return work()
    with console.status(title):
        return work()


@main.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@JSON
@click.pass_context
def verify(ctx: click.Context, directory: Path, as_json: bool) -> None:
    """Prove from the ids that the tables in DIRECTORY are complete, per ticker and hour.

    Exit code 1 when a file is damaged, or anything is missing that is not in the table `gaps`.
    """
    from mdcollector.verify import verify as work

    report = _with_progress(f"verifying {directory}", lambda: work(directory))
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        _print_proof(report)
    ctx.exit(report.exit_code)


HOURS_SHOWN_MAX = 200


def _print_proof(report: Any) -> None:
    from rich.table import Table

    console = _console()
    table = Table(
        "feed", "exchange", "ticker", "hour", "rows", "first id", "last id", "missing", "in gaps", title="completeness"
    )
    for h in report.hours[:HOURS_SHOWN_MAX]:
        ids = ("" if i is None else str(i) for i in (h.first_id, h.last_id))
        style = "red" if h.missing else None
        table.add_row(
            h.feed, h.exchange, h.ticker, h.hour, f"{h.rows:,}", *ids, f"{h.missing:,}", f"{h.explained:,}", style=style
        )
    console.print(table)
    if len(report.hours) > HOURS_SHOWN_MAX:
        console.print(f"... and {len(report.hours) - HOURS_SHOWN_MAX} more lines (--json has all of them)")
    for finding in report.findings:
        console.print(finding, style="red", markup=False)
    console.print(f"{report.files:,} files, {report.rows:,} rows, {report.bytes:,} bytes: "
                  f"{report.missing:,} missing, {report.explained:,} explained by gaps, {report.findings_count:,} findings")  # fmt: skip


@main.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--rows-max", type=click.IntRange(1), default=8_000_000, show_default=True, help="Rows of a merged file at most."
)
@click.option(
    "--age-min-s",
    type=Finite(0),
    default=300.0,
    show_default=True,
    help="Leave files alone that are younger.",
)
@JSON
@click.pass_context
def compact(ctx: click.Context, directory: Path, rows_max: int, age_min_s: float, as_json: bool) -> None:
    """Merge small files in DIRECTORY. Can be stopped at any moment and run again."""
    from dataclasses import asdict

    from mdcollector.compact import compact as work

    report = _with_progress(f"compacting {directory}", lambda: work(directory, rows_max=rows_max, age_min_s=age_min_s))
    if as_json:
        click.echo(json.dumps(asdict(report), default=str))
    else:
        for key, value in asdict(report).items():
            click.echo(f"{key:<20} {value}")
    ctx.exit(report.exit_code)


@main.command()
@click.option("--clickhouse", is_flag=True, help="Print CREATE TABLE statements instead.")
def schema(clickhouse: bool) -> None:
    """Print the schema of all tables as Markdown, derived from the one definition in the code."""
    from mdcollector.records import FEEDS
    from mdcollector.tables import clickhouse_ddl, schema_markdown

    click.echo("\n\n".join(clickhouse_ddl(feed) for feed in FEEDS.values()) if clickhouse else schema_markdown())


if __name__ == "__main__":
    sys.exit(main())
