"""The demonstration: simulated exchanges with faults, the whole fleet, comparators, and proof of every row.

Run by `make demo`. Exit code 0 only if the simulators' ledgers, the rings and the Parquet files agree row for row.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pyarrow.dataset as ds
import tomli_w
from rich import box
from rich.console import Console
from rich.table import Table

from mdcollector.config import ALLOW_ROOT
from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS
from mdcollector.exchanges import venue_class
from mdcollector.health import counts_holes
from mdcollector.options import Finite
from mdcollector.records import DATA_FEEDS, FEEDS
from mdcollector.stats import read_stats
from mdcollector.supervisor import status
from mdcollector.transport import USER_AGENT
from mdcollector.verify import verify
from tools.proof import Proof, prove
from tools.sim.server import venues

POSITIVE = Finite(0, min_open=True)
START_S = 180.0  # a simulator or the first rows that take longer do not come at all
COMPARED_S = 60.0  # how long a comparator may take behind its time
STOP_S = 150.0  # longer than the supervisor gives its processes before it kills them
COMPARE_EDGE_S = 2.0
# Streams of books and of trades, by which a fault finds them. Their ids tell what is lost or doubled; where trades have
# no counter (Bybit) none is lost, because nothing could tell.
SHORT = {"orderbook_l2": "books", "liquidations": "liq."}  # 80 columns have no room for more
DIFFERENCES_SHOWN = 10
DETAILS = "summary.json"
NO_FINDINGS = {"exit_code": EXIT_DONE}


def faults(exchange: str) -> list[str]:
    """What is done to the connector of an exchange, and to it alone: the comparator's own connection is left in peace."""
    return [f"{fault},agent={USER_AGENT}" for fault in venues()[exchange].shown_faults]


@dataclass
class Simulator:
    """One simulated exchange that runs."""

    exchange: str
    process: subprocess.Popen[str]
    tickers: list[str]
    ws_url: str
    rest_url: str
    ledger: Path


@contextmanager
def simulators(out: Path, exchanges: Sequence[str], rate: float) -> Iterator[list[Simulator]]:
    """Simulated exchanges, stopped in the end."""
    running: list[Simulator] = []
    started = []
    try:
        for seed, exchange in enumerate(exchanges, 7):
            ledger = out / "ledgers" / f"{exchange}.jsonl"
            command = [sys.executable, "-m", "tools.sim", exchange, "--seed", str(seed), "--rate", str(rate)]
            command += ["--ledger", str(ledger)]
            for fault in faults(exchange):
                command += ["--fault", fault]
            log = open(out / f"mdsim-{exchange}.log", "w")  # noqa: SIM115 (the process keeps it)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603 (our own)
            started.append((exchange, process, ledger, log.name))
        for exchange, process, ledger, log_name in started:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline() or "{}")
            if not ready.get("ready"):
                raise click.ClickException(f"mdsim {exchange} did not start, see {log_name}")
            running.append(Simulator(exchange, process, ready["tickers"], ready["ws_url"], ready["rest_url"], ledger))
        yield running
    finally:
        for _, process, *_ in started:
            process.terminate()
        for _, process, *_ in started:
            process.wait(STOP_S)


def _intervals(exchange: str) -> list[str]:
    """The candles that are collected: of a minute, or the shortest ones."""
    offered = venue_class(exchange).INTERVALS
    return ["1m"] if "1m" in offered else list(offered[:1])


def write_fleet(out: Path, running: Sequence[Simulator]) -> Path:
    """The fleet file of the demonstration: a connector for each exchange, two writers that share them."""
    cpus = sorted(os.sched_getaffinity(0))
    fleet: dict[str, Any] = {"rings": "rings", "connectors": {}, "writers": {}}
    for i, simulator in enumerate(running):
        kind = venue_class(simulator.exchange)
        fleet["connectors"][simulator.exchange] = {
            "exchange": simulator.exchange,
            "tickers": simulator.tickers,
            "feeds": list(kind.FEEDS),
            "intervals": _intervals(simulator.exchange),
            "cpu": cpus[i % len(cpus)],
            "capacity": {"trades": 1 << 15, "orderbook_l2": 1 << 17, "bbo": 1 << 15},
            "ws_url": simulator.ws_url,
            "rest_url": simulator.rest_url,
            "reconnect_most_s": 1.0,
        }
    for i in range(2):
        names = [pattern for s in running[i::2] for pattern in (s.exchange, f"{s.exchange}.*")]
        if names:
            writer = {"out": "data", "roll_s": 2.0, "cpu": cpus[i % len(cpus)], "connectors": names}
            fleet["writers"][f"parquet-{i + 1}"] = writer
    path = out / "fleet.toml"
    path.write_text(tomli_w.dumps(fleet), encoding="utf-8")
    return path


def connections(rings: Path, exchange: str) -> list[Path]:
    """Directories of an exchange's connectors: one, or NAME.1, NAME.2, ... where it needs several connections."""
    return [path for path in sorted(rings.glob(f"{exchange}*")) if path.name.partition(".")[0] == exchange]


def wait_for_rows(out: Path, running: Sequence[Simulator], fleet: subprocess.Popen[bytes]) -> None:
    """Until every connector has rows in its rings."""
    deadline = time.monotonic() + START_S
    waiting = {simulator.exchange for simulator in running}
    while waiting and time.monotonic() < deadline and fleet.poll() is None:
        pages = status(out / "rings")["connectors"]
        for exchange in list(waiting):
            own = [page for name, page in pages.items() if name.partition(".")[0] == exchange]
            if own and all(page["data_ns"] for page in own):
                waiting.discard(exchange)
        time.sleep(0.1)
    if waiting:
        why = f"within {START_S:g} s" if fleet.poll() is None else f"and the fleet ended with {fleet.returncode}"
        raise click.ClickException(f"no rows from {', '.join(sorted(waiting))} {why}; see {out / 'fleet.log'}")


def start_comparators(out: Path, running: Sequence[Simulator], seconds: float) -> dict[str, subprocess.Popen[str]]:
    """A comparator for each exchange, with a connection of its own.

    Of a polled one only closed candles can be compared, and in less than a minute there may be none.
    """
    found = {}
    for s in (s for s in running if venue_class(s.exchange).WS_URL):
        command = [
            sys.executable,
            "-m",
            "tools.compare",
            s.exchange,
            "--rings",
            str(out / "rings"),
            "--ws-url",
            s.ws_url,
        ]
        command += ["--rest-url", s.rest_url, "--out", str(out / "compare" / s.exchange), "--json"]
        command += ["--seconds", f"{seconds:g}", "--edge", f"{COMPARE_EDGE_S:g}"]
        log = open(out / f"mdcompare-{s.exchange}.log", "w")  # noqa: SIM115 (the process keeps it)
        found[s.exchange] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603
    return found


def _table(title: str, *columns: str) -> Table:
    """A table that fits 80 columns: the exchange, then numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("exchange", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def show(console: Console, out: Path, details: dict[str, dict[str, Any]]) -> None:
    """The summary for people; `details` are what `details_of` found of each exchange."""
    shown = (*DATA_FEEDS, "gaps")
    table = _table("rows in the Parquet tables", *(SHORT.get(feed, feed) for feed in shown), "other")
    counted = {exchange: Counter[str](found["rows"]) for exchange, found in details.items()}
    total = sum(counted.values(), Counter[str]())
    for number, (exchange, rows) in enumerate((*counted.items(), ("all", total))):
        if number == len(counted):
            table.add_section()
        numbers = (*(rows[feed] for feed in shown), rows.total() - sum(rows[feed] for feed in shown))
        table.add_row(exchange, *(f"{n:,}" if n else "-" for n in numbers))
    console.print(table)
    table = _table("faults injected and healed", "faults", "refused\nframes", "new con-\nnections", "holes\ntold", "filled\nby REST",
                   "books\nlive")  # fmt: skip
    for exchange, found in details.items():
        healing = (found["refused"], found["reconnects"], found["holes"], found["repaired"])
        books = f"{found['books_live']} of {found['books']}" if found["books"] else "-"
        table.add_row(exchange, f"{sum(found['faults'].values()):,}", *(f"{n:,}" for n in healing), books)
    console.print(table)
    table = _table("latency and proof", "read to ring\np50 us", "\np99 us", "comparator with its\nown connection",
                   "ledger = rings\n= Parquet")  # fmt: skip
    for exchange, found in details.items():
        latency = (f"{found['latency_us']['visible'][key]:,.0f}" for key in ("p50", "p99"))
        proven = f"[green]{found['proven_rows']:,} rows[/green]" if found["proven"] else "[red]NOT proven[/red]"
        table.add_row(exchange, *latency, _verdict(found["comparator"]), proven)
    console.print(table)
    for exchange, found in details.items():
        for difference in found["differences"][:DIFFERENCES_SHOWN]:
            console.print(f"{exchange}: {difference}", style="red", markup=False, soft_wrap=True)
    for name, text in (
        ("tables", "data"), ("rings", "rings"), ("ledgers", "ledgers"), ("comparison", "compare"),
        ("all numbers", DETAILS),
    ):  # fmt: skip
        console.print(f"{name:<12} {out / text}", soft_wrap=True, markup=False, highlight=False)
    console.print("\na query to try:")
    console.print(query(out), soft_wrap=True, markup=False, highlight=False)


def query(out: Path) -> str:
    """A shell command that asks the tables something."""
    program = Path(sys.executable)
    here = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return f"""  {here} -c "import duckdb; duckdb.sql('''
    SELECT ticker, count(*) AS trades, sum(price * qty) / sum(qty) AS vwap
    FROM '{out}/data/trades/*/*/*.parquet' GROUP BY ticker ORDER BY trades DESC''').show()\""""  # noqa: S608 (shown)


def _verdict(comparator: dict[str, Any] | None) -> str:
    if comparator is None:
        return "-"  # polled: nothing to compare within seconds
    if comparator.get("verdict") == "identical" and not comparator["exit_code"]:
        return f"[green]{comparator['compared']:,} identical[/green]"
    return (
        f"[red]{comparator.get('findings', 'no')} differences[/red]"
        if "findings" in comparator
        else "[red]no result[/red]"
    )


def details_of(
    out: Path, proof: Proof, pages: Sequence[dict[str, Any]], comparator: dict[str, Any] | None
) -> dict[str, Any]:
    """All numbers of one exchange; `pages` are the stats of its connections."""
    counters = sum((Counter(page["counters"]) for page in pages), Counter[str]())
    return {
        "rows": {feed: _rows(out, feed, proof.exchange) for feed in FEEDS},
        "faults": {name: n for name, n in sorted(proof.faults.items()) if n},
        "refused": sum(n for name, n in counters.items() if name.startswith("refused_")),
        "reconnects": max(0, counters["connections"] - len(pages)),
        "holes": sum(n for name, n in counters.items() if counts_holes(name)),
        "repaired": sum(n for name, n in counters.items() if name.startswith("gap_") and name.endswith("_repaired")),
        "books": sum(page["books"] for page in pages),
        "books_live": sum(page["books"] - page["books_invalid_count"] for page in pages),
        "latency_us": {
            "decoded": _slowest(pages, "parse_ns"),
            "visible": _slowest(pages, "publish_ns"),
        },
        "comparator": comparator,
        "proven": proof.ok,
        "proven_rows": sum(proof.compared.values()),
        "compared": proof.compared,
        "differences": proof.differences,
        "counters": {name: n for name, n in sorted(counters.items()) if n},
    }  # fmt: skip


def _slowest(pages: Sequence[dict[str, Any]], stage: str) -> dict[str, float]:
    """Percentiles of the slowest connection, from the read of the packet on, in microseconds."""
    slowest = max((page[stage] for page in pages), key=lambda histogram: float(histogram["p99"]))
    return {key: slowest[key] / 1000 for key in ("p50", "p99")}


def _rows(out: Path, feed: str, exchange: str) -> int:
    directory = out / "data" / feed / venue_class(exchange).EXCHANGE.name
    return int(ds.dataset(directory, partitioning="hive").count_rows()) if directory.exists() else 0


def _chosen(_ctx: click.Context, _param: click.Parameter, value: str) -> list[str]:
    known = sorted(venues(), key=lambda name: venue_class(name).EXCHANGE)
    names = known if value == "all" else value.split(",")
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r}: there are all, {', '.join(known)}")
    return list(dict.fromkeys(names))


@click.command()
@click.option("--seconds", type=POSITIVE, default=20.0, show_default=True, help="How long, once all venues deliver.")
@click.option("--rate", type=POSITIVE, default=15.0, show_default=True, help="Market actions per second and ticker.")
@click.option("--exchanges", default="all", show_default=True, callback=_chosen, help="Comma-separated venues.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"), show_default=True)
def main(seconds: float, rate: float, exchanges: list[str], out: Path) -> None:
    """Simulated exchanges with faults, the whole fleet, and proof that every row arrived."""
    console = Console()
    if out.exists():
        if not (out / "fleet.toml").exists():
            raise click.ClickException(f"{out} exists and is not of an earlier demonstration: not touched")
        shutil.rmtree(out)
    (out / "ledgers").mkdir(parents=True)
    console.print(f"starting {len(exchanges)} simulated exchanges and the fleet that collects them ...")
    with simulators(out, exchanges, rate) as running:
        fleet_path = write_fleet(out, running)
        command = [sys.executable, "-m", "mdcollector", "--log-level", "warning", "up", "-c", str(fleet_path)]
        env = {**os.environ, ALLOW_ROOT: "1"}  # what it takes in is made here, by itself
        with open(out / "fleet.log", "w") as log:
            fleet = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)  # noqa: S603
        comparators: dict[str, subprocess.Popen[str]] = {}
        try:
            wait_for_rows(out, running, fleet)
            console.print(f"all of them deliver; collecting with faults for {seconds:g} s ...")
            began = time.monotonic()
            comparators = start_comparators(out, running, max(4.0, seconds - 4.0))
            while time.monotonic() - began < seconds and fleet.poll() is None:
                time.sleep(0.1)
            deadline = time.monotonic() + COMPARED_S
            compared = {exchange: _finish(process, deadline) for exchange, process in comparators.items()}
        finally:
            for process in comparators.values():
                process.kill()  # those that are not done when something else failed
            fleet.send_signal(signal.SIGINT)
            fleet_code = fleet.wait(STOP_S)
    console.print("proving every row ...")
    rings = out / "rings"
    stats = {s.exchange: [read_stats(path / "stats") for path in connections(rings, s.exchange)] for s in running}
    details = {
        s.exchange: details_of(out, _prove(s, out), stats[s.exchange], compared.get(s.exchange)) for s in running
    }
    (out / DETAILS).write_text(json.dumps(details, indent=1), encoding="utf-8")
    completeness = verify(out / "data")
    show(console, out, details)
    said = (out / "fleet.log").read_text(encoding="utf-8").strip().splitlines()[-1]
    good = all(found["proven"] and not (found["comparator"] or NO_FINDINGS)["exit_code"] for found in details.values())
    good = good and fleet_code == EXIT_DONE and completeness.exit_code == EXIT_DONE
    console.print(f"\nmdcollector up: {said}", soft_wrap=True, markup=False)
    console.print(f"mdcollector verify: {completeness.rows:,} rows, {completeness.missing:,} missing, "
                  f"{completeness.explained:,} explained by gaps", soft_wrap=True)  # fmt: skip
    console.print("[bold green]all agree[/bold green]" if good else "[bold red]they do not agree[/bold red]")
    sys.exit(EXIT_DONE if good else EXIT_FINDINGS)


def _prove(simulator: Simulator, out: Path) -> Proof:
    exchange = simulator.exchange
    return prove(
        simulator.ledger, out / "data", out / "rings", exchange, feeds=venue_class(exchange).FEEDS,
        intervals=_intervals(exchange),
    )  # fmt: skip


def _finish(process: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
    """What a comparator found; only its exit code where it ended badly, or had to be ended."""
    try:
        printed, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
    summary: dict[str, Any] = json.loads(printed or "{}")
    return {**summary, "exit_code": process.returncode}


if __name__ == "__main__":
    main()
