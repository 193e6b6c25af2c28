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
from rich.console import Console
from rich.table import Table

from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS
from mdcollector.exchanges import venue_class
from mdcollector.options import Finite
from mdcollector.records import FEEDS
from mdcollector.stats import read_stats
from mdcollector.supervisor import status
from mdcollector.transport import USER_AGENT
from mdcollector.verify import verify
from tools.proof import Proof, prove

POSITIVE = Finite(0, min_open=True)
START_S = 90.0  # a simulator or the first rows that take longer do not come at all
STOP_S = 60.0
COMPARE_EDGE_S = 2.0
# Streams of books and of trades, by which a fault finds them. Their ids tell what is lost or doubled; where trades have
# no counter (Bybit) none is lost, because nothing could tell.
STREAMS: dict[str, tuple[str, str]] = {
    "binance_spot": ("depth", "@trade"),
    "binance_futures": ("depth", "@trade"),
    "deribit": ("book", "trades.*"),
    "okx": ("books:", "trades:"),
    "bybit_spot": ("orderbook.50", ""),
    "bybit_linear": ("orderbook.50", ""),
    "bybit_inverse": ("orderbook.50", ""),
    "bybit_option": ("orderbook", ""),
    "coinbase": ("level2:", "market_trades:"),
    "coinbase_exchange": ("", "matches:"),
    "gmx": ("", ""),
}
POLLED_FAULTS = ("rest_error:every=5,status=503", "bad_body:every=4", "ban:at=11,seconds=2,status=429")


def faults(exchange: str) -> list[str]:
    """What is done to the connector of an exchange, and to it alone: the comparator's own connection is left in peace."""
    books, trades = STREAMS[exchange]
    found = ["garbage:every=3.5", "disconnect:at=11"] if books or trades else list(POLLED_FAULTS)
    if books:
        found += [f"gap:at=5,stream={books}", f"duplicate:every=3,stream={books}"]
    if trades:
        found += [f"gap:at=7,stream={trades},n=2", f"duplicate:every=4,stream={trades}"]
    if exchange.startswith("binance"):  # whose books are healed over HTTP
        found += [f"reorder:every=3,stream={books}", f"truncate:at=8,stream={books}", "ban:at=11,seconds=2,status=429"]
    return [f"{fault},agent={USER_AGENT}" for fault in found]


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


def wait_for_rows(rings: Path, running: Sequence[Simulator]) -> None:
    """Until every connector has rows in its rings."""
    deadline = time.monotonic() + START_S
    waiting = {simulator.exchange for simulator in running}
    while waiting and time.monotonic() < deadline:
        pages = status(rings)["connectors"]
        for exchange in list(waiting):
            own = [page for name, page in pages.items() if name.partition(".")[0] == exchange]
            if own and all(page["data_ns"] for page in own):
                waiting.discard(exchange)
        time.sleep(0.1)
    if waiting:
        raise click.ClickException(f"no rows from {', '.join(sorted(waiting))} within {START_S:g} s")


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


def show(
    console: Console,
    out: Path,
    proofs: dict[str, Proof],
    verdicts: dict[str, int],
    stats: dict[str, list[dict[str, Any]]],
) -> None:
    """The summary; `stats` has the pages of each exchange's connections."""
    table = Table("exchange", *FEEDS, title="rows in the Parquet tables", title_justify="left")
    for exchange in proofs:
        table.add_row(exchange, *(f"{_rows(out, feed, exchange):,}" for feed in FEEDS))
    console.print(table)
    columns = (
        "connections",
        "read -> decoded p50/p99 us",
        "read -> visible",
        "holes told",
        "repaired",
        "refused frames",
    )
    table = Table("exchange", *columns, title="latency and healing", title_justify="left")
    for exchange, pages in stats.items():
        counters = sum((Counter(page["counters"]) for page in pages), Counter[str]())
        holes = {name: n for name, n in counters.items() if name.startswith("gap_")}
        repaired = sum(n for name, n in holes.items() if name.endswith("_repaired"))
        table.add_row(
            exchange, str(counters["connections"]), _percentiles(pages, "parse_ns"), _percentiles(pages, "publish_ns"),
            str(sum(holes.values()) - repaired), str(repaired),
            str(sum(n for name, n in counters.items() if name.startswith("refused_"))),
        )  # fmt: skip
    console.print(table)
    table = Table("exchange", "faults injected", "what became of them", title="faults", title_justify="left")
    for exchange, proof in proofs.items():
        faults = ", ".join(f"{name} {count}" for name, count in sorted(proof.faults.items()) if count)
        counters = sum((Counter(page["counters"]) for page in stats[exchange]), Counter[str]())
        told = [f"{name.replace('_', ' ')} {count}" for name, count in sorted(counters.items()) if count]
        table.add_row(exchange, faults, ", ".join(told))
    console.print(table)
    for exchange, proof in proofs.items():
        mark = "[green]proven[/green]" if proof.ok else "[red]NOT proven[/red]"
        counts = ", ".join(f"{feed} {count:,}" for feed, count in proof.compared.items() if count)
        console.print(f"{exchange}: ledger = rings = Parquet {mark}: {counts}")
        for difference in proof.differences[:10]:
            console.print(f"  {difference}", style="red", markup=False)
        if exchange in verdicts:
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


def _percentiles(pages: Sequence[dict[str, Any]], stage: str) -> str:
    """Of the slowest connection."""
    slowest = max((page[stage] for page in pages), key=lambda histogram: float(histogram["p99"]))
    return f"{slowest['p50'] / 1000:.1f} / {slowest['p99'] / 1000:.1f}"


def _rows(out: Path, feed: str, exchange: str) -> int:
    directory = out / "data" / feed / venue_class(exchange).EXCHANGE.name
    return int(ds.dataset(directory, partitioning="hive").count_rows()) if directory.exists() else 0


def _chosen(_ctx: click.Context, _param: click.Parameter, value: str) -> list[str]:
    names = list(STREAMS) if value == "all" else value.split(",")
    if unknown := [name for name in names if name not in STREAMS]:
        raise click.BadParameter(f"{unknown[0]!r}: there are all, {', '.join(STREAMS)}")
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
        with open(out / "fleet.log", "w") as log:
            fleet = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603 (our own)
        try:
            wait_for_rows(out / "rings", running)
            console.print(f"all of them deliver; collecting with faults for {seconds:g} s ...")
            began = time.monotonic()
            comparators = start_comparators(out, running, max(4.0, seconds - 4.0))
            while time.monotonic() - began < seconds and fleet.poll() is None:
                time.sleep(0.1)
            verdicts = {exchange: _finish(process) for exchange, process in comparators.items()}
        finally:
            fleet.send_signal(signal.SIGINT)
            fleet_code = fleet.wait(STOP_S)
    console.print("proving every row ...")
    rings = out / "rings"
    stats = {s.exchange: [read_stats(path / "stats") for path in connections(rings, s.exchange)] for s in running}
    proofs = {s.exchange: _prove(s, out) for s in running}
    completeness = verify(out / "data")
    show(console, out, proofs, verdicts, stats)
    console.print(f"mdcollector up: {(out / 'fleet.log').read_text(encoding='utf-8').strip().splitlines()[-1]}")
    good = all(p.ok for p in proofs.values()) and not any(verdicts.values()) and fleet_code == EXIT_DONE
    good = good and completeness.exit_code == EXIT_DONE
    console.print("[bold green]all agree[/bold green]" if good else "[bold red]they do not agree[/bold red]")
    sys.exit(EXIT_DONE if good else EXIT_FINDINGS)


def _prove(simulator: Simulator, out: Path) -> Proof:
    exchange = simulator.exchange
    return prove(
        simulator.ledger, out / "data", out / "rings", exchange, feeds=venue_class(exchange).FEEDS,
        intervals=_intervals(exchange),
    )  # fmt: skip


def _finish(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=STOP_S)
    return process.returncode


if __name__ == "__main__":
    main()
