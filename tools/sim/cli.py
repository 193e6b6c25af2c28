"""The command `mdsim`: a simulated exchange from a seed, with faults on demand and a ledger of the truth.

Reads the options, finds the venue by name and hands over to `server.py`. Prints one line of JSON when it is ready to
accept connections and one when it has ended; everything else goes to stderr.
"""

import asyncio
import json
import math
import ssl
import sys
from pathlib import Path
from typing import Any

import click

from mdcollector import logs
from mdcollector.errors import EXIT_FINDINGS, StorageError
from mdcollector.options import Finite
from tools.live import log_options
from tools.sim.faults import FaultError, help_text
from tools.sim.server import CannotListen, Exchange, Options, Venue, venues

RATE_MOST = 1_000_000  # actions a second that are asked for; a market that cannot keep up runs on behind its time
TICKERS_MOST = 10_000

EPILOG = """\b
Examples:
  mdsim EXCHANGE --port 9100 --seed 7 --ledger truth.jsonl
  mdsim EXCHANGE --port 0 --rate 200 --seconds 20 --tickers A,B:0.1
  mdsim EXCHANGE --tickers 200 --fault drop:stream=depth,every=5 --fault disconnect:at=10
  curl -X POST -d '{"name":"ban","seconds":3}' http://127.0.0.1:9100/_sim/fault
  curl http://127.0.0.1:9100/_sim/state
"""


class Help(click.Command):
    """Help that lists the venues, their limits and the faults from where they are defined."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        formatter.write("\n" + help_text() + "\n")
        for name, venue in venues().items():
            formatter.write(f"\nEXCHANGE {name}: {venue.notes}\n  --limit names and values: ")
            formatter.write(", ".join(f"{key}={value:g}" for key, value in venue.limits.items()) + "\n")


def _rate(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    if value == "max":
        return math.inf
    try:
        rate = float(value)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= RATE_MOST:
        raise click.BadParameter(f"{value!r} is neither a number above 0, at most {RATE_MOST:,}, nor the word max")
    return rate


def _limits(venue: type[Venue], pairs: tuple[str, ...]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in venue.limits:
            known = ", ".join(venue.limits)
            raise click.BadParameter(f"{name!r} is no limit of this venue; known: {known}", param_hint="--limit")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not limits[name] >= 0:
            raise click.BadParameter(f"{pair!r}: the value must be a number that is not negative", param_hint="--limit")
    return limits


def _credentials(pairs: tuple[str, ...]) -> dict[str, str]:
    if not all(":" in pair for pair in pairs):
        raise click.BadParameter("must be ID:SECRET", param_hint="--credential")
    return dict(pair.split(":", 1) for pair in pairs)


def _tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise click.BadParameter(f"{cert} and {key}: no PEM pair: {why}", param_hint="--tls-cert") from error
    return context


def _tickers(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if len(names) == 1 and names[0].isdecimal() and int(names[0]) == 0:
        raise click.BadParameter("0 is no number of tickers to invent")
    if len(names) == 1 and names[0].isdecimal() and int(names[0]) > TICKERS_MOST:
        raise click.BadParameter(f"{names[0]} tickers are more than the {TICKERS_MOST:,} that can be invented")
    for name, colon, share in (part.rpartition(":") for part in names):
        try:
            good = not colon or (bool(name) and 0 < float(share) < math.inf)
        except ValueError:
            good = False
        if not good:
            raise click.BadParameter(f"{name}{colon}{share!r}: expected NAME or NAME:SHARE with a share above 0")
    return names


def _print(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")
    sys.stdout.flush()


@click.command(cls=Help, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("exchange", metavar="EXCHANGE")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Port on 127.0.0.1; 0 takes a free one and says which.",
)
@click.option("--seed", default=1, show_default=True, help="The same seed gives the same market, whoever listens.")
@click.option(
    "--tickers",
    default="",
    callback=_tickers,
    help="Names, each with :SHARE of the rate if wanted, or how many to invent.",
)
@click.option(
    "--rate",
    default="20",
    show_default=True,
    callback=_rate,
    help="Market actions (orders, cancels, trades) a second for a ticker with share 1, or max.",
)
@click.option("--seconds", type=Finite(0), help="End after so many seconds.")
@click.option("--events", type=click.IntRange(0), help="End after so many market actions.")
@click.option("--ledger", type=click.Path(path_type=Path, dir_okay=False), help="File for the truth, as JSON lines.")
@click.option(
    "--depth",
    type=click.IntRange(1, 50_000),
    default=50,
    show_default=True,
    help="Price levels a side that a book starts with.",
)
@click.option(
    "--near",
    type=Finite(0, 1),
    default=0.0,
    show_default=True,
    help="Share of orders at the best price, beside those that are there anyway: more messages for as many actions.",
)
@click.option("--epoch", type=int, help="Exchange time at the start in us; default: now. Fixed, runs are repeatable.")
@click.option("--hold", is_flag=True, help="The market stands still until POST /_sim/resume.")
@click.option("--fault", "faults", multiple=True, metavar="NAME[:KEY=VALUE,...]", help="See the list below.")
@click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE", help="Change one of the venue's limits.")
@click.option("--credential", "credentials", multiple=True, metavar="ID:SECRET", help="Credentials that are accepted.")
@click.option("--tls-cert", type=click.Path(path_type=Path, exists=True), help="PEM certificate: serve TLS.")
@click.option("--tls-key", type=click.Path(path_type=Path, exists=True), help="PEM key of the certificate.")
@log_options
def main(
    exchange: str,
    port: int,
    seed: int,
    tickers: tuple[str, ...],
    rate: float,
    seconds: float | None,
    events: int | None,
    ledger: Path | None,
    depth: int,
    near: float,
    epoch: int | None,
    hold: bool,
    faults: tuple[str, ...],
    limits: tuple[str, ...],
    credentials: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    log_level: str,
    log_format: str,
) -> None:
    """Simulate EXCHANGE on one local port: its WebSocket streams, its REST endpoints, its limits.

    When it accepts connections it prints one line of JSON with ws_url and rest_url; the venue's own paths lie below
    them. SIGTERM, Ctrl-C, --seconds and --events end it in order: what was due is sent, connections are closed, the
    ledger gets its end, a summary is printed, exit code 0.
    """
    logs.set_up(log_level, log_format)
    known = venues()
    if exchange not in known:
        raise click.BadParameter(f"{exchange!r} is unknown; known: {', '.join(sorted(known))}", param_hint="EXCHANGE")
    options = Options(
        port=port,
        seed=seed,
        tickers=tickers,
        rate=rate,
        seconds=math.inf if seconds is None else seconds,
        events=math.inf if events is None else events,
        ledger=ledger,
        depth=depth,
        near=near,
        epoch_us=epoch,
        hold=hold,
        faults=faults,
        limits=_limits(known[exchange], limits),
        credentials=_credentials(credentials),
        tls=_tls(tls_cert, tls_key),
    )
    try:
        summary = asyncio.run(_run(known[exchange], options))
    except (FaultError, CannotListen) as error:
        raise click.UsageError(str(error)) from error
    except StorageError as error:
        click.echo(f"mdsim: {error}", err=True)
        sys.exit(EXIT_FINDINGS)
    _print(summary)


async def _run(venue: type[Venue], options: Options) -> dict[str, Any]:
    return await Exchange(venue, options).run(_print)
