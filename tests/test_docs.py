"""Every command that the README shows is run here, against simulated exchanges; a new one without a test fails."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WAIT_S = 60.0

PROGRAMS = {
    "mdcollector": "mdcollector", "mdtail": "readers.tail", "mdcompare": "tools.compare", "mdreplay": "tools.replay",
    "mdsim": "tools.sim",
}  # fmt: skip
# What is added to a command so that it ends by itself and needs no network; {binance} and {deribit} are replaced.
URLS = {name: ["--ws-url", f"ws://{{{name}}}", "--rest-url", f"http://{{{name}}}"] for name in ("binance", "deribit")}
ENDS = ["--seconds", "6"]
# In the order of the README; how each command is run: what is added, or "until output, then Ctrl-C".
PLAN: dict[str, list[str] | str] = {
    "mdcollector run binance_spot BTCUSDT 'ETH*' --target data": [*URLS["binance"], *ENDS, "--roll-s", "1"],
    "mdcollector run deribit BTC-PERPETUAL --feeds trades,orderbook_l2,tickers --target data --seconds 60":
        [*URLS["deribit"], *ENDS],
    "mdcollector check -c fleet.toml": [],
    "mdcollector up -c fleet.toml": "background",
    "mdcollector status -c fleet.toml": [],
    "mdcollector doctor -c fleet.toml": "judged",
    "mdcollector monitor -c fleet.toml": "until it serves",
    "mdcollector top -c fleet.toml": "in a terminal",
    "mdcollector units -c fleet.toml --out units": [],
    "mdtail --rings rings": ["--seconds", "2"],
    "mdtail --rings rings --feed trades --filter 'BTC*' --format tradeprint": ["--seconds", "2"],
    "mdtail --rings rings --rates": ["--seconds", "2"],
    "mdtail --rings rings --feed orderbook_l2 --from oldest --no-follow --csv dump.csv": [],
    "mdcollector verify data": "when written",
    "mdcollector compact data": [],
    "mdcompare binance_spot BTCUSDT --rings rings --out compare --seconds 60":
        [*URLS["binance"], *ENDS, "--edge", "1", "--connector", "binance"],
    "mdreplay record binance_spot BTCUSDT --out btc.jsonl.zst --seconds 60": [*URLS["binance"], *ENDS],
    "mdreplay serve btc.jsonl.zst --port 9000 --speed 10": "until ready",
    "mdcollector normalize binance_spot btc.jsonl.zst --out tables": [],
    "mdsim deribit --port 9100 --seed 7 --ledger truth.jsonl --fault gap:every=5": "until ready",
    "mdcollector run binance_spot BTCUSDT --target data --ws-url ws://127.0.0.1:9000 --rest-url http://127.0.0.1:9000":
        "urls replaced",
}  # fmt: skip
BY_MAKE = ("make demo SECONDS=30", "make test")


def shown() -> list[str]:
    """Commands in the sh blocks of the README, comments removed."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def test_every_command_of_the_readme_has_its_run() -> None:
    assert [c for c in shown() if c not in PLAN and c not in BY_MAKE] == []
    assert [c for c in (*PLAN, *BY_MAKE) if c not in shown()] == []


def test_make_targets_are_what_the_readme_says(repository: Path) -> None:
    for command in BY_MAKE:
        done = subprocess.run(
            [*shlex.split(command), "--dry-run", "-C", str(repository)], capture_output=True, text=True, timeout=WAIT_S
        )
        assert done.returncode == 0, done.stderr
        assert {"make demo SECONDS=30": "tools.demo --seconds 30", "make test": "pytest"}[command] in done.stdout


def start(command: str, added: list[str], cwd: Path) -> subprocess.Popen[str]:
    program, *arguments = shlex.split(command)
    return subprocess.Popen(
        [sys.executable, "-m", PROGRAMS[program], *arguments, *added],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=WAIT_S)


@pytest.fixture
def venues(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Host and port of a simulated exchange each."""
    running: list[subprocess.Popen[str]] = []
    found = {}
    try:
        for name, exchange, tickers in (
            ("binance", "binance_spot", "BTCUSDT,ETHUSDT,ETHBULLUSDT"),
            ("deribit", "deribit", "BTC-PERPETUAL,ETH-PERPETUAL,BTC-25DEC26"),
        ):
            sim = start(f"mdsim {exchange} --port 0 --rate 100 --tickers {tickers}", [], tmp_path)
            running.append(sim)
            assert sim.stdout is not None
            found[name] = f"127.0.0.1:{json.loads(sim.stdout.readline())['port']}"
        yield found
    finally:
        for sim in running:
            interrupt(sim)


def fleet_of_the_readme(venues: dict[str, str]) -> dict[str, object]:
    """The fleet file as shown, with addresses of simulated exchanges and small rings."""
    found = re.search(r"```toml\n(.*?)```", README, re.DOTALL)
    assert found is not None
    fleet = tomllib.loads(found[1])
    for name, connector in fleet["connectors"].items():
        connector |= {"ws_url": f"ws://{venues[name]}", "rest_url": f"http://{venues[name]}"}
        connector["capacity"] = dict.fromkeys(("trades", "orderbook_l2", "bbo"), 1 << 16)
        connector.pop("cpu", None)
    fleet["writers"]["parquet"]["roll_s"] = 1.0
    return fleet


def test_the_commands_of_the_readme_work(tmp_path: Path, venues: dict[str, str]) -> None:
    (tmp_path / "fleet.toml").write_text(tomli_w.dumps(fleet_of_the_readme(venues)))
    fleet: subprocess.Popen[str] | None = None
    for command, how in PLAN.items():
        if how == "background":
            for exchange in ("BINANCE_SPOT", "DERIBIT"):
                assert (tmp_path / "data" / "trades" / exchange).exists()
            # The fleet has rings of its own, so the time between those runs and it is a hole that verify must find.
            (tmp_path / "data").rename(tmp_path / "data-of-the-runs")
            fleet = start(command, [], tmp_path)
            wait_for_connectors(tmp_path, fleet)
        elif how == "until ready":
            server = start(command.replace("9000", "0").replace("9100", "0"), [], tmp_path)
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            assert ready["ready"], command
            if command.startswith("mdreplay"):
                run = shown()[-1].replace("127.0.0.1:9000", f"127.0.0.1:{ready['port']}")
                assert_done(run, start(run, ENDS, tmp_path))
            interrupt(server)
            assert server.returncode == 0, command
        elif how == "judged":  # what it says depends on the machine; that it says something of the venues does not
            out, err = start(command, [], tmp_path).communicate(timeout=WAIT_S)
            assert "good network to deribit" in out, out + err
        elif how == "until it serves":
            monitor = start(command, ["--listen", "127.0.0.1:0"], tmp_path)
            assert monitor.stderr is not None
            assert "serving on 127.0.0.1:" in monitor.stderr.readline()
            interrupt(monitor)
            assert monitor.returncode == 0
        elif how == "in a terminal":
            assert_runs_in_a_terminal(command, tmp_path)
        elif how == "when written":
            tables = [tmp_path / "data" / "trades" / exchange for exchange in ("BINANCE_SPOT", "DERIBIT")]
            deadline = time.monotonic() + WAIT_S
            while not all(table.exists() for table in tables) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert_done(command, start(command, [], tmp_path))
        elif isinstance(how, list):
            assert_done(command, start(command, [part.format(**venues) for part in how], tmp_path))
    assert fleet is not None
    out, err = interrupt(fleet)
    assert fleet.returncode == 0, err
    assert "every row that went in was written" in out
    for made in ("data/trades/BINANCE_SPOT", "data/trades/DERIBIT", "dump.csv", "compare/summary.csv", "tables/trades"):
        assert (tmp_path / made).exists(), made


def assert_runs_in_a_terminal(command: str, cwd: Path) -> None:
    """With a terminal of its own: it draws until q is pressed."""
    pytest.importorskip("textual", reason="the extra `top` is not installed")
    program, *arguments = shlex.split(command)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", PROGRAMS[program], *arguments],
        cwd=cwd, stdin=follower, stdout=follower, stderr=follower, env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(follower)
    drawn, deadline = b"", time.monotonic() + WAIT_S
    try:
        while b"connected" not in drawn and time.monotonic() < deadline:
            if select.select([leader], [], [], 1.0)[0]:
                drawn += os.read(leader, 65536)
        assert b"connected" in drawn, drawn[-2000:]
        os.write(leader, b"q")
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # it has closed its side
                    os.read(leader, 65536)
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait(WAIT_S)
        os.close(leader)


def wait_for_connectors(directory: Path, fleet: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and fleet.poll() is None:
        done = subprocess.run(
            [sys.executable, "-m", "mdcollector", "status", "-c", "fleet.toml", "--json"],
            cwd=directory, capture_output=True, text=True, timeout=WAIT_S,
        )  # fmt: skip
        if done.returncode == 0:
            connectors = json.loads(done.stdout)["connectors"].values()
            if len(connectors) == 2 and all(c["data_ns"] for c in connectors):
                return
    raise AssertionError(f"the fleet never was well: {fleet.poll()}")


def assert_done(command: str, process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, f"{command}: {process.returncode}\n{out}\n{err}"


def test_python_of_the_readme_works(tmp_path: Path, venues: dict[str, str]) -> None:
    run = f"mdcollector run binance_spot BTCUSDT --target data --feeds trades,orderbook_l2 --rings rings --roll-s 1 --ws-url ws://{venues['binance']} --rest-url http://{venues['binance']}"
    assert_done(run, start(run, ENDS, tmp_path))
    (tmp_path / "rings" / "binance").symlink_to("binance_spot")
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", README, re.DOTALL)):
        # The live loop of the README never ends: it is left after its first batch.
        script = tmp_path / f"shown{i}.py"
        script.write_text(code + ("        break\n" if "ring.batches" in code else "print(trades.num_rows)\n"))
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() not in ("", "0")


def test_sql_of_the_readme_works(tmp_path: Path, venues: dict[str, str]) -> None:
    import duckdb

    run = f"mdcollector run binance_spot BTCUSDT --target data --feeds trades --ws-url ws://{venues['binance']} --rest-url http://{venues['binance']}"
    assert_done(run, start(run, ENDS, tmp_path))
    minutes, sizes = (
        duckdb.sql(query.replace("'data/", f"'{tmp_path}/data/")).fetchall()
        for query in re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
    )
    assert minutes
    assert all(ticker == "BTCUSDT" and price > 0 for ticker, _, price in minutes)
    assert sizes
    assert all(qty == size for *_, qty, size in sizes), "a unit is a coin on the spot market"
