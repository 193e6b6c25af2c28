"""The soak: simulated exchanges at full rate, the whole fleet, and random kills, disconnects and a full disk meanwhile.

Run by `make soak SECONDS=900`. Each fault must be seen by the monitor (metrics, health and a delivered alert) within
seconds and be over later; at the end ledgers, rings and tables must agree row for row, and memory must not have grown.
Exit code 0 only then.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import msgspec
import psutil
import tomli_w
from aiohttp import web
from rich.console import Console
from rich.table import Table

from mdcollector.config import ALLOW_ROOT
from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS, RingError
from mdcollector.exchanges import venue_class
from mdcollector.options import Finite
from mdcollector.stats import read_stats
from tools.proof import Proof, prove
from tools.sim.ledger import Ledger
from tools.sim.process import SimError, SimProcess

SEEN_S = 5.0  # a fault must be visible within it
NEAR = 0.7  # share of orders at the best price, so that most of what the market does is told
START_S, STOP_S = 60.0, 180.0
SETTLE_S = 60.0  # at the end: everything that is being repaired is repaired within it
MEMORY_GROWTH_MOST = 0.15  # of a process, from the second third of its life to the last one
MEMORY_EVERY_S = 5.0
MEMORY_GROWTH_BYTES = 16 << 20  # and at least so much: small processes breathe
DISK_BYTES = 512 << 20, 2560 << 20  # tmpfs of the tables, which is filled by a fault: at least, and at most
ACTION_BYTES = 100  # that the tables take at most for one action of a market
BALLAST_SPARE = 16 << 20  # what is filled by writing: the writers write meanwhile
DISK_FULL_S = 4.0
SKIPPED_PAUSE_S = 1.0  # after a fault that was left alone
QUIET_S = 8.0  # before the end no more faults, so that all can be over
HTTP_S = 5.0


class Seen(msgspec.Struct):
    """One fault and when it was noticed; seconds after it happened, None = never."""

    fault: str
    at: float
    metrics_s: float | None = None
    health_s: float | None = None
    alert_s: float | None = None

    @property
    def in_time(self) -> bool:
        return all(s is not None and s <= SEEN_S for s in (self.metrics_s, self.health_s, self.alert_s))


class Alerted:
    """The receiver of the webhook, in a thread's event loop: what was told, and when."""

    def __init__(self) -> None:
        self.told: list[tuple[float, dict[str, Any]]] = []
        self.port = 0

    async def _take(self, request: web.Request) -> web.Response:
        self.told.append((time.monotonic(), json.loads(await request.text())))
        return web.Response(text="{}")

    async def serve(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/", self._take)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = int(runner.addresses[0][1])
        return runner

    def when(self, kind: str, process: str, after: float) -> float | None:
        """When an alert of this kind and process was delivered."""
        for at, notice in self.told:
            began = [*notice["began"], *notice["lasting"]]
            if at >= after and any(f["kind"] == kind and f["process"].startswith(process) for f in began):
                return at
        return None


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[bool]:
    """A tmpfs for the tables where this user may mount one; else a plain directory, and no full disk."""
    path.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "mdcollector-soak", str(path)]
    own = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0  # noqa: S603
    try:
        yield own
    finally:
        if own:
            subprocess.run(["umount", "-l", str(path)], check=False)  # noqa: S603, S607


class Soak:
    """One run."""

    def __init__(
        self, out: Path, exchanges: list[str], copies: int, seconds: float, rate: float, seed: int, console: Console
    ) -> None:
        self.out, self.seconds, self.console = out, seconds, console
        self.random = random.Random(seed)
        self.sims: dict[str, SimProcess] = {}
        self.alerted = Alerted()
        self.seen: list[Seen] = []
        self.problems: list[str] = []
        self.memory: dict[str, list[tuple[float, int]]] = {}
        self._exchanges, self._rate, self._seed = exchanges, rate, seed
        self.connectors = {f"{exchange}-{n}": exchange for exchange in exchanges for n in range(1, copies + 1)}
        self._monitor_url = ""
        self._disk_is_small = False

    def start_exchanges(self) -> None:
        (self.out / "ledgers").mkdir(parents=True)
        for i, exchange in enumerate(self._exchanges):
            arguments = ["--rate", f"{self._rate:g}", "--near", f"{NEAR:g}", "--seed", str(self._seed + i)]
            arguments += ["--tickers", "4"]
            self.sims[exchange] = SimProcess(exchange, *arguments, ledger=self.out / "ledgers" / f"{exchange}.jsonl")

    def write_fleet(self) -> Path:
        cpus = sorted(os.sched_getaffinity(0))
        fleet: dict[str, Any] = {
            "rings": "rings",
            "connectors": {},
            "writers": {},
            "monitor": {
                "listen": "127.0.0.1:0", "csv": "metrics.csv", "group_s": 0.0, "cooldown_s": 1.0,
                "webhook_url": f"http://127.0.0.1:{self.alerted.port}/",
            },
        }  # fmt: skip
        for i, (name, exchange) in enumerate(self.connectors.items()):
            sim = self.sims[exchange]
            fleet["connectors"][name] = {
                "exchange": exchange, "tickers": sim.tickers, "ws_url": sim.ws_url, "rest_url": sim.rest_url,
                "feeds": [f for f in venue_class(exchange).FEEDS if f not in ("candles", "liquidations")],
                "cpu": cpus[i % len(cpus)], "reconnect_most_s": 1.0,
                "capacity": {"trades": 1 << 18, "orderbook_l2": 1 << 20, "bbo": 1 << 18},
            }  # fmt: skip
        halves = [list(self.connectors)[::2], list(self.connectors)[1::2]]
        for i, half in enumerate(half for half in halves if half):
            names = [pattern for name in half for pattern in (name, f"{name}.*")]
            cpu = cpus[i % len(cpus)]
            fleet["writers"][f"parquet-{i + 1}"] = {"out": "data", "roll_s": 2.0, "connectors": names, "cpu": cpu}
        path = self.out / "fleet.toml"
        path.write_text(tomli_w.dumps(fleet), encoding="utf-8")
        return path

    # Looking

    def page(self, name: str) -> dict[str, Any]:
        try:
            return read_stats(self.out / "rings" / name / "stats")
        except RingError:
            return {}

    def processes(self) -> dict[str, dict[str, Any]]:
        """What the supervisor says of its children."""
        found: dict[str, dict[str, Any]] = self.page("_supervisor").get("processes", {})
        return found

    def get(self, path: str) -> str:
        request = urllib.request.Request(self._monitor_url + path)  # noqa: S310 (our own monitor)
        try:
            with urllib.request.urlopen(request, timeout=HTTP_S) as answer:  # noqa: S310
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return str(error.read().decode())

    def find_monitor(self, log: Path) -> None:
        text = until(lambda: "serving on" in log.read_text() and log.read_text(), START_S, "the monitor serves")
        self._monitor_url = "http://" + text.split("serving on ")[1].split()[0]

    def all_connected(self) -> bool:
        connectors = [name for name, process in self.processes().items() if process["role"] == "connector"]
        pages = [self.page(name) for name in connectors]
        return bool(pages) and all(
            p.get("state") in ("connected", "polling") and p["data_ns"] and not p["books_invalid_count"] for p in pages
        )

    def watch_memory(self) -> None:
        for name, process in self.processes().items():
            with contextlib.suppress(psutil.Error):
                if process["child_pid"]:
                    # Rings are mapped files: they come into memory as they fill, and are as large as configured.
                    maps = psutil.Process(process["child_pid"]).memory_maps()
                    size = sum(part.rss for part in maps if not part.path.endswith((".data", ".meta")))
                    self.memory.setdefault(f"{name}/{process['child_pid']}", []).append((time.monotonic(), size))

    # Faults

    def reasons(self, kind: str, process: str) -> bool:
        """Whether the health page of that process, or of one of that exchange, gives this kind as a reason."""
        pages = [json.loads(self.get(f"/health/{name}")) for name in self.processes() if name.startswith(process)]
        return any(reason["kind"] == kind for page in pages for reason in page.get("reasons", ()))

    def hit(self, fault: str, kind: str, process: str, do: Callable[[], None]) -> bool:
        """Let something happen, then wait until the monitor has said so three times over.

        False = left alone: the same is still told of an earlier fault, so that this one could not be seen.
        """
        wanted = f'mdcollector_finding{{kind="{kind}",process="{process}'
        if wanted in self.get("/metrics"):
            return False
        began = time.monotonic()
        do()  # it may take a moment: what counts is from when it has happened
        at = time.monotonic()
        seen = Seen(f"{fault} {process}", at)
        self.seen.append(seen)
        while time.monotonic() - at < 3 * SEEN_S and None in (seen.metrics_s, seen.health_s, seen.alert_s):
            now = time.monotonic() - at
            if seen.metrics_s is None and wanted in self.get("/metrics"):
                seen.metrics_s = now
            if seen.health_s is None and self.reasons(kind, process):
                seen.health_s = now
            if seen.alert_s is None and (told := self.alerted.when(kind, process, began)) is not None:
                seen.alert_s = max(0.0, told - at)
            time.sleep(0.1)
        return True

    def kill(self, role: str) -> bool:
        names = [n for n, p in self.processes().items() if p["role"] == role and p["child_pid"]]
        name = self.random.choice(names)
        return self.hit(
            "kill -9", "restarted", name, lambda: os.kill(self.processes()[name]["child_pid"], signal.SIGKILL)
        )

    def disconnect(self) -> bool:
        exchange = self.random.choice([e for e in self.sims if venue_class(e).WS_URL])
        return self.hit("disconnect", "reconnected", exchange, lambda: self.sims[exchange].fault("disconnect"))

    def fill_disk(self) -> bool:
        ballast = self.out / "data" / "ballast"

        def fill() -> None:
            with contextlib.suppress(OSError), open(ballast, "wb") as file:  # ENOSPC is what is wanted
                free = shutil.disk_usage(ballast.parent).free - BALLAST_SPARE
                if free > 0:
                    with contextlib.suppress(OSError):  # the writers were faster: all of it is filled by writing
                        os.posix_fallocate(file.fileno(), 0, free)
                file.seek(0, os.SEEK_END)
                while True:
                    file.write(bytes(1 << 20))

        if not self.hit("disk full", "writer_error", "parquet", fill):
            return False
        time.sleep(DISK_FULL_S)
        ballast.unlink()
        return True

    def run_faults(self, ends: float) -> None:
        faults: list[Callable[[], bool]] = [
            lambda: self.kill("connector"),
            lambda: self.kill("writer"),
            self.disconnect,
        ]
        if self._disk_is_small:
            faults.append(self.fill_disk)
        order = [*faults]
        pause = max(3.0, self.seconds / 40)
        while time.monotonic() < ends - QUIET_S:
            until(self.all_connected, SETTLE_S, "all connected before the next fault")
            happened = order.pop(0)()
            order = order or self.random.sample(faults, len(faults))
            next_at = min(time.monotonic() + (pause if happened else SKIPPED_PAUSE_S), ends - QUIET_S)
            while (left := next_at - time.monotonic()) > 0:
                self.watch_memory()
                time.sleep(min(MEMORY_EVERY_S, left))
            if happened:
                self.console.print(
                    f"  {ends - time.monotonic():5.0f} s left; {self.seen[-1].fault}: seen {_shown(self.seen[-1])}"
                )

    # The run

    def run(self) -> bool:
        self.start_exchanges()
        actions = self.seconds * self._rate * sum(len(self.sims[e].tickers) for e in self.connectors.values())
        size = min(max(DISK_BYTES[0], int(actions * ACTION_BYTES)), DISK_BYTES[1])
        with small_disk(self.out / "data", size) as self._disk_is_small:
            return asyncio.run(self._run())

    async def _run(self) -> bool:
        receiver = await self.alerted.serve()
        try:
            return await asyncio.to_thread(self._drive)
        finally:
            await receiver.cleanup()

    def _drive(self) -> bool:
        fleet_path = self.write_fleet()
        base = [sys.executable, "-m", "mdcollector", "--log-level", "info"]
        logs = {name: self.out / f"{name}.log" for name in ("fleet", "monitor")}
        with open(logs["fleet"], "w") as fleet_log, open(logs["monitor"], "w") as monitor_log:
            fleet = subprocess.Popen(  # noqa: S603 (our own program)
                [*base, "up", "-c", str(fleet_path)],
                stdout=fleet_log,
                stderr=fleet_log,
                start_new_session=True,
                env={**os.environ, ALLOW_ROOT: "1"},  # what it takes in is made here, by itself
            )
            monitor = subprocess.Popen(  # noqa: S603 (our own program)
                [*base, "monitor", "-c", str(fleet_path)], stdout=monitor_log, stderr=monitor_log
            )
        try:
            self.find_monitor(logs["monitor"])
            until(self.all_connected, START_S, "all connected")
            began = time.monotonic()
            sent_before = self.messages_sent()
            self.run_faults(began + self.seconds)
            until(self.all_connected, SETTLE_S, "everything repaired at the end")
            rate = (self.messages_sent() - sent_before) / (time.monotonic() - began)
            self.watch_memory()
            self._look_at_recovery()
        finally:
            for sim in self.sims.values():
                with contextlib.suppress(SimError):
                    sim.stop()
            time.sleep(1.0)  # what the connectors still have to read of closed sockets
            fleet.send_signal(signal.SIGTERM)
            fleet_code = fleet.wait(STOP_S)
            monitor.terminate()
            monitor.wait(STOP_S)
        if fleet_code != EXIT_DONE:
            self.problems.append(f"mdcollector up ended with {fleet_code}, see {logs['fleet']}")
        return self._verdict(rate)

    def messages_sent(self) -> int:
        return sum(int(sim.state()["counts"].get("frames_sent", 0)) for sim in self.sims.values())

    def _look_at_recovery(self) -> None:
        """What was found is over; what is counted over the last minute may still be told."""
        try:
            until(lambda: json.loads(self.get("/ready"))["ready"], SETTLE_S, "ready again")
        except AssertionError as error:
            self.problems.append(f"{error}: {self.get('/ready')}")

    def _verdict(self, rate: float) -> bool:
        table = Table(
            "fault",
            "seen in metrics",
            "health",
            "alert",
            title="faults, seconds until they were seen",
            title_justify="left",
        )
        for seen in self.seen:
            table.add_row(seen.fault, *(_s(s) for s in (seen.metrics_s, seen.health_s, seen.alert_s)))
            if not seen.in_time:
                self.problems.append(f"{seen.fault}: not seen everywhere within {SEEN_S:g} s: {_shown(seen)}")
        self.console.print(table)
        for connector, proof in self._proofs():
            counts = ", ".join(f"{feed} {count:,}" for feed, count in proof.compared.items())
            verdict = "[green]proven[/green]" if proof.ok else "[red]NOT proven[/red]"
            self.console.print(f"{connector}: ledger = rings = Parquet {verdict}: {counts}")
            self.problems += [f"{connector}: {difference}" for difference in proof.differences[:5]]
        for name, sizes in self.memory.items():
            self._look_at_memory(name, sizes)
        self.console.print(
            f"{rate:,.0f} messages/s sent by {len(self.sims)} exchanges to {len(self.connectors)} connectors for"
            f" {self.seconds:g} s"
        )
        for problem in self.problems:
            self.console.print(problem, style="red", markup=False)
        return not self.problems

    def _proofs(self) -> Iterator[tuple[str, Proof]]:
        """Each venue's, by a process of its own: as many at a time as there are cores, and its memory goes with it."""
        workers, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
        of = {exchange: [c for c, e in self.connectors.items() if e == exchange] for exchange in self.sims}
        with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
            for found in pool.map(_prove, [self.out] * len(of), of, of.values()):
                yield from found.items()

    def _look_at_memory(self, name: str, sizes: list[tuple[float, int]]) -> None:
        """The least that a process had in the second third of its life against the last one: a writer that waits for a
        disk holds more for a moment and gives it back, what leaks is never given back."""
        third = len(sizes) // 3
        if not third:
            return
        early, late = (min(size for _, size in part) for part in (sizes[third : 2 * third], sizes[2 * third :]))
        if late - early > max(MEMORY_GROWTH_BYTES, MEMORY_GROWTH_MOST * early):
            self.problems.append(f"{name}: memory grew from {early >> 20} to {late >> 20} MiB")


def _prove(out: Path, exchange: str, connectors: list[str]) -> dict[str, Proof]:
    feeds = [f for f in venue_class(exchange).FEEDS if f not in ("candles", "liquidations")]
    ledger = Ledger(out / "ledgers" / f"{exchange}.jsonl")
    return {c: prove(ledger, out / "data", out / "rings", exchange, connector=c, feeds=feeds) for c in connectors}


def until(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """Poll until a condition holds; its value."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {within_s:g} s: {what}")
        time.sleep(0.05)
    return value


def _s(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f}"


def _shown(seen: Seen) -> str:
    return f"metrics {_s(seen.metrics_s)} s, health {_s(seen.health_s)} s, alert {_s(seen.alert_s)} s"


@click.command()
@click.option("--seconds", type=Finite(20, 86_400), default=900.0, show_default=True)
@click.option(
    "--rate",
    type=Finite(0, min_open=True),
    default=1700.0,
    show_default=True,
    help="Market actions per second of the busiest of four tickers; 1700 make some 20,000 messages/s.",
)
@click.option("--exchanges", default="binance_spot,deribit,okx,bybit_linear", show_default=True)
@click.option(
    "--copies",
    type=click.IntRange(1, 16),
    default=4,
    show_default=True,
    help="Connectors of each exchange. Each records all of it and is proven by itself: simulated messages are dear, so"
    " that two cores could not make as many as a fleet takes.",
)
@click.option("--seed", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("soak-out"), show_default=True)
def main(seconds: float, rate: float, exchanges: str, copies: int, seed: int, out: Path) -> None:
    """Run the fleet under load and faults, and prove that nothing was lost or doubled."""
    if out.exists():
        if not (out / "fleet.toml").exists():
            raise click.ClickException(f"{out} exists and is not of an earlier soak: not touched")
        shutil.rmtree(out)
    console = Console()
    ok = Soak(out.absolute(), exchanges.split(","), copies, seconds, rate, seed, console).run()
    console.print(
        "[bold green]nothing lost, nothing doubled, everything seen[/bold green]"
        if ok
        else "[bold red]not good[/bold red]"
    )
    sys.exit(EXIT_DONE if ok else EXIT_FINDINGS)


if __name__ == "__main__":
    main()
