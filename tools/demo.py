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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pyarrow.dataset as ds
import tomli_w
from rich.console import Console
from rich.table import Table

from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS
from mdcollector.exchanges import venue_class
from mdcollector.options import Finite
from mdcollector.records import FEEDS
from mdcollector.stats import read_stats
from mdcollector.supervisor import status
from mdcollector.verify import verify
from tools.proof import Proof, prove

START_S = 20.0  # a simulator or the first rows that take longer do not come at all
STOP_S = 60.0
COMPARE_EDGE_S = 2.0
# Faults hit the connectors only (agent=), so that the comparators' own connections are a fair second opinion.
FAULTS = {
    "binance_spot": (
        "gap:at=5,stream=depth", "gap:at=7,stream=trade,n=3", "duplicate:every=2", "reorder:every=3,stream=depth",
        "garbage:every=2.5", "truncate:at=8", "disconnect:at=10", "ban:at=10,seconds=2,status=429",
    ),
    "deribit": (
        "gap:at=5,stream=book", "gap:at=6,stream=trades.*,n=2", "duplicate:every=3", "garbage:every=3", "close:at=9",
    ),
}  # fmt: skip


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
def simulators(out: Path, rate: float) -> Iterator[list[Simulator]]:
    """All simulated exchanges, stopped in the end."""
    running: list[Simulator] = []
    try:
        for seed, (exchange, faults) in enumerate(FAULTS.items(), 7):
            ledger = out / "ledgers" / f"{exchange}.jsonl"
            command = [sys.executable, "-m", "tools.sim", exchange, "--seed", str(seed), "--rate", str(rate)]
            command += ["--ledger", str(ledger)]
            for fault in faults:
                command += ["--fault", f"{fault},agent=mdcollector-connector"]
            log = open(out / f"mdsim-{exchange}.log", "w")  # noqa: SIM115 (the process keeps it)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603 (our own)
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline() or "{}")
            if not ready.get("ready"):
                raise click.ClickException(f"mdsim {exchange} did not start, see {log.name}")
            running.append(Simulator(exchange, process, ready["tickers"], ready["ws_url"], ready["rest_url"], ledger))
        yield running
    finally:
        for simulator in running:
            simulator.process.terminate()
        for simulator in running:
            simulator.process.wait(STOP_S)


def write_fleet(out: Path, running: Sequence[Simulator]) -> Path:
    """The fleet file of the demonstration: a connector for each exchange, one writer."""
    cpus = sorted(os.sched_getaffinity(0))
    fleet: dict[str, Any] = {"rings": "rings", "connectors": {}, "writers": {"parquet": {"out": "data", "roll_s": 2.0}}}
    for i, simulator in enumerate(running):
        fleet["connectors"][simulator.exchange] = {
            "exchange": simulator.exchange,
            "tickers": simulator.tickers,
            "feeds": list(venue_class(simulator.exchange).FEEDS),
            "cpu": cpus[i % len(cpus)],
            "capacity": {"trades": 1 << 16, "orderbook_l2": 1 << 17, "bbo": 1 << 16},
            "ws_url": simulator.ws_url,
            "rest_url": simulator.rest_url,
            "reconnect_most_s": 1.0,
        }
    path = out / "fleet.toml"
    path.write_text(tomli_w.dumps(fleet), encoding="utf-8")
    return path


def wait_for_rows(rings: Path, running: Sequence[Simulator]) -> None:
    """Until every connector has rows in its rings."""
    deadline = time.monotonic() + START_S
    waiting = {simulator.exchange for simulator in running}
    while waiting and time.monotonic() < deadline:
        waiting -= {name for name, page in status(rings)["connectors"].items() if page["data_ns"]}
        time.sleep(0.1)
    if waiting:
        raise click.ClickException(f"no rows from {', '.join(sorted(waiting))} within {START_S:g} s")


def start_comparators(out: Path, running: Sequence[Simulator], seconds: float) -> dict[str, subprocess.Popen[str]]:
    """A comparator for each exchange, with a connection of its own."""
    found = {}
    for s in running:
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


def show(
    console: Console, out: Path, proofs: dict[str, Proof], verdicts: dict[str, int], stats: dict[str, Any]
) -> None:
    """The summary."""
    table = Table("table", *proofs, title="rows in the Parquet tables", title_justify="left")
    for feed in FEEDS:
        table.add_row(feed, *(f"{_rows(out, feed, exchange):,}" for exchange in proofs))
    console.print(table)
    table = Table("", *proofs, title="latency and healing", title_justify="left")
    table.add_row("packet read -> decoded, p50 / p99", *(_percentiles(s["parse_ns"]) for s in stats.values()))
    table.add_row("packet read -> visible, p50 / p99", *(_percentiles(s["publish_ns"]) for s in stats.values()))
    table.add_row("connections made", *(str(s["counters"].get("connections", 0)) for s in stats.values()))
    names = sorted({name for s in stats.values() for name in s["counters"] if s["counters"][name]} - {"connections"})
    for name in names:
        table.add_row(name.replace("_", " "), *(str(s["counters"].get(name, 0)) for s in stats.values()))
    console.print(table)
    table = Table("fault injected", *proofs, title="faults", title_justify="left")
    for name in sorted({name for proof in proofs.values() for name in proof.faults}):
        table.add_row(name, *(str(proof.faults.get(name, 0)) for proof in proofs.values()))
    console.print(table)
    for exchange, proof in proofs.items():
        mark = "[green]proven[/green]" if proof.ok else "[red]NOT proven[/red]"
        counts = ", ".join(f"{feed} {count:,}" for feed, count in proof.compared.items())
        console.print(f"{exchange}: ledger = rings = Parquet {mark}: {counts}")
        for difference in proof.differences[:10]:
            console.print(f"  {difference}", style="red", markup=False)
        compared = "no difference" if verdicts[exchange] == 0 else f"differences (exit code {verdicts[exchange]})"
        console.print(f"{exchange}: comparator with its own connection: {compared}")
    console.print(
        f"\ntables {out / 'data'}   rings {out / 'rings'}   ledgers {out / 'ledgers'}   comparison {out / 'compare'}"
    )
    query = f"SELECT ticker, count(*) AS trades, sum(qty) AS volume FROM '{out}/data/trades/*/*/*.parquet' GROUP BY ALL"  # noqa: S608 (shown, not run)
    console.print("a query to try:")
    console.print(
        f'  {sys.executable} -c "import duckdb; print(duckdb.sql(\\"{query}\\"))"', soft_wrap=True, markup=False
    )


def _percentiles(histogram: dict[str, Any]) -> str:
    return f"{histogram['p50'] / 1000:.1f} / {histogram['p99'] / 1000:.1f} us"


def _rows(out: Path, feed: str, exchange: str) -> int:
    directory = out / "data" / feed / venue_class(exchange).EXCHANGE.name
    return int(ds.dataset(directory, partitioning="hive").count_rows()) if directory.exists() else 0


@click.command()
@click.option(
    "--seconds", type=Finite(0, min_open=True), default=20.0, show_default=True, help="How long the fleet collects."
)
@click.option(
    "--rate",
    type=Finite(0, min_open=True),
    default=50.0,
    show_default=True,
    help="Market actions per second and ticker.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"), show_default=True)
def main(seconds: float, rate: float, out: Path) -> None:
    """Simulated exchanges with faults, the whole fleet, and proof that every row arrived."""
    console = Console()
    if out.exists():
        if not (out / "fleet.toml").exists():
            raise click.ClickException(f"{out} exists and is not of an earlier demonstration: not touched")
        shutil.rmtree(out)
    (out / "ledgers").mkdir(parents=True)
    with simulators(out, rate) as running:
        fleet_path = write_fleet(out, running)
        console.print(f"simulating {', '.join(s.exchange for s in running)} for {seconds:g} s ...")
        command = [sys.executable, "-m", "mdcollector", "--log-level", "warning", "up", "-c", str(fleet_path)]
        with open(out / "fleet.log", "w") as log:
            fleet = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603 (our own)
        try:
            began = time.monotonic()
            wait_for_rows(out / "rings", running)
            comparators = start_comparators(out, running, max(4.0, seconds - 4.0))
            while time.monotonic() - began < seconds and fleet.poll() is None:
                time.sleep(0.1)
            verdicts = {exchange: _finish(process) for exchange, process in comparators.items()}
        finally:
            fleet.send_signal(signal.SIGINT)
            fleet_code = fleet.wait(STOP_S)
    stats = {s.exchange: read_stats(out / "rings" / s.exchange / "stats") for s in running}
    proofs = {s.exchange: prove(s.ledger, out / "data", out / "rings", s.exchange) for s in running}
    completeness = verify(out / "data")
    show(console, out, proofs, verdicts, stats)
    console.print(f"mdcollector up: {(out / 'fleet.log').read_text(encoding='utf-8').strip().splitlines()[-1]}")
    good = all(p.ok for p in proofs.values()) and not any(verdicts.values()) and fleet_code == EXIT_DONE
    good = good and completeness.exit_code == EXIT_DONE
    console.print("[bold green]all agree[/bold green]" if good else "[bold red]they do not agree[/bold red]")
    sys.exit(EXIT_DONE if good else EXIT_FINDINGS)


def _finish(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=STOP_S)
    return process.returncode


if __name__ == "__main__":
    main()
