"""The commands as a stranger uses them: wrong input is named, nothing that went wrong looks like success."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import posix_ipc
import pyarrow.dataset as ds
import pytest

from mdcollector import cli
from mdcollector import ring as ring_module
from mdcollector.budget import Budget
from mdcollector.records import TRADES
from mdcollector.ring import RingReader, RingWriter
from readers import tail
from tools import compare, demo, replay
from tools.sim import cli as sim_cli

DEADLINE_S = 60.0
NOWHERE = ("--ws-url", "ws://127.0.0.1:1", "--rest-url", "http://127.0.0.1:1")


def command(module: str, *words: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, words)]


def run(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(module, *words), capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def mdcollector(*words: object) -> subprocess.CompletedProcess[str]:
    return run("mdcollector", *words)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


@pytest.fixture
def sims() -> Iterator[Callable[..., tuple[str, ...]]]:
    """Starts simulated exchanges; gives the options that point a command at one."""
    processes: list[subprocess.Popen[str]] = []

    def start(exchange: str, *words: object) -> tuple[str, ...]:
        process = subprocess.Popen(command("tools.sim", exchange, *words), stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        return ("--ws-url", ready["ws_url"], "--rest-url", ready["rest_url"])

    yield start
    for process in processes:
        process.terminate()
        process.communicate(timeout=DEADLINE_S)


def test_wrong_use_of_run_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "data"
    for words, named in (
        (("nope", "BTCUSDT"), "known are binance_futures, binance_spot"),
        (("binance_spot", ""), "tickers"),
        (("binance_spot", "BTCUSDT", "--feeds", "foo"), "allowed are trades"),
        (("binance_spot", "BTCUSDT", "--ws-url", "ws://"), "a host"),
        (("binance_spot", "BTCUSDT", "--ws-url", "ws://x:99999999"), "a host"),
        (("binance_spot", "BTCUSDT", "--rest-url", "ftp://x"), "http://"),
        (("binance_spot", "BTCUSDT", "--cpu", "9999"), "allowed are"),
        (("binance_spot", "BTCUSDT", "--seconds", "-1"), "--seconds"),
        (("binance_spot", "BTCUSDT", "--roll-s", "0"), "--roll-s"),
        (("binance_spot", "BTCUSDT", "--intervals", "7m", "--feeds", "candles"), "1s, 1m, 3m"),
        (("binance_spot", "BTCUSDT", "--intervals", "1m"), "add candles to --feeds"),
    ):
        done = mdcollector("run", *words, "--target", target)
        assert done.returncode == 2, (words, done.stderr)
        assert named in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert not target.exists()


def test_a_target_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = mdcollector("run", "binance_spot", "BTCUSDT", "--target", tmp_path / "file" / "x", *NOWHERE)
    assert done.returncode == 78
    assert done.stderr.splitlines()[-1].endswith("Not a directory")
    (tmp_path / "fleet.toml").write_text(
        'rings = "file/x"\n[connectors.a]\nexchange = "binance_spot"\ntickers = ["BTCUSDT"]\n'
        f'ws_url = "{NOWHERE[1]}"\nrest_url = "{NOWHERE[3]}"\n'
    )
    done = mdcollector("up", "-c", tmp_path / "fleet.toml", "--seconds", 1)
    assert done.returncode == 78
    assert done.stderr.splitlines()[-1].endswith("Not a directory")


def test_a_bad_ca_file_and_a_feed_named_twice_are_told_with_file_and_key(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    text = '[connectors.a]\nexchange = "binance_spot"\ntickers = ["*"]\nrest_url = "https://127.0.0.1:1"\n'
    fleet.write_text(text + 'ca_file = "nope.pem"\n')
    done = mdcollector("check", "-c", fleet)
    assert (done.returncode, "connectors.a.ca_file" in done.stderr, "nope.pem" in done.stderr) == (78, True, True)
    fleet.write_text(text + 'ca_file = "fleet.toml"\n')
    assert "connectors.a.ca_file" in mdcollector("check", "-c", fleet).stderr
    fleet.write_text(text + 'feeds = ["bbo", "bbo"]\n')
    done = mdcollector("check", "-c", fleet)
    assert (done.returncode, "'bbo': named more than once" in done.stderr) == (78, True)


def test_log_options_are_taken_behind_the_command_too(tmp_path: Path) -> None:
    words = ("binance_spot", "BTCUSDT", "--target", tmp_path, "--seconds", 0.5, *NOWHERE)
    for before, behind in ((("--log-format", "json"), ()), ((), ("--log-format", "json", "--log-level", "warning"))):
        done = mdcollector(*before, "run", *words, *behind)
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        assert any(line["level"] == "warning" for line in lines), done.stderr


def test_a_run_that_brought_nothing_is_no_success(tmp_path: Path) -> None:
    done = mdcollector("run", "binance_spot", "BTCUSDT", "--target", tmp_path, "--seconds", 3, *NOWHERE)
    assert done.returncode == 1
    assert "binance_spot: brought no row" in done.stdout
    assert "every row" not in done.stdout


def test_status_of_empty_rings_is_not_well(tmp_path: Path) -> None:
    done = mdcollector("status", "--rings", tmp_path)
    assert (done.returncode, "no process has ever written here" in done.stdout) == (1, True)


def test_a_recording_of_another_exchange_is_a_finding(tmp_path: Path) -> None:
    recording = tmp_path / "r.jsonl"
    frame = {"t": 10**18, "conn": "a", "dir": "in", "raw": '{"jsonrpc":"2.0","method":"heartbeat","params":{}}'}
    recording.write_text(json.dumps(frame) + "\n")
    done = mdcollector("normalize", "binance_spot", recording, "--out", tmp_path / "out")
    assert (done.returncode, "is it a recording of this exchange?" in done.stdout) == (1, True), done.stdout
    done = mdcollector("normalize", "binance_spot", tmp_path / "none.jsonl", "--out", tmp_path / "out")
    assert (done.returncode, "does not exist" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "words",
    [("--tickers", "0"), ("--tickers", "A:x"), ("--port", "99999"), ("--depth", "0"), ("--seconds", "-1"),
     ("--tls-cert", __file__, "--tls-key", __file__)],
)  # fmt: skip
def test_wrong_use_of_mdsim_is_named(words: tuple[str, ...]) -> None:
    done = run("tools.sim", "binance_spot", *words)
    assert (done.returncode, words[0] in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_two_venues_into_one_target_at_once_and_the_same_one_again(
    tmp_path: Path, sims: Callable[..., tuple[str, ...]]
) -> None:
    """The README's two commands: each ends with its own table; the second `run` of a venue is refused by name.

    The one after that goes on in the same rings: all rows have times of today, also the holes that it found at once.
    """
    data = tmp_path / "data"
    binance = ("run", "binance_spot", "BTCUSDT", "--target", data, "--json", *sims("binance_spot", "--rate", 50))
    deribit = ("run", "deribit", "BTC-PERPETUAL", "--target", data, "--json", *sims("deribit", "--rate", 50))

    def brings_rows(connector: str) -> bool:
        if not (data / "_rings" / connector / "bbo.meta").exists():
            return False
        with RingReader(data / "_rings" / connector, "bbo") as ring:
            return ring.published > 0

    both = [subprocess.Popen(command("mdcollector", *words), stdout=subprocess.PIPE) for words in (binance, deribit)]
    until(lambda: brings_rows("binance_spot") and brings_rows("deribit"), "rows of both")
    again = mdcollector(*binance)
    assert again.returncode == 78
    assert "another mdcollector runs 'binance_spot-parquet' there" in again.stderr
    for process, name in zip(both, ("binance_spot", "deribit"), strict=True):
        process.send_signal(signal.SIGINT)
        report = json.loads(process.communicate(timeout=DEADLINE_S)[0])
        assert process.returncode == 0
        assert {ring["connector"] for ring in report["rings"]} == {name}
    assert mdcollector(*binance, "--seconds", 4).returncode == 0
    table = ds.dataset(data / "gaps", partitioning="hive").to_table()
    assert "restart" in table["cause"].to_pylist()
    assert all(day.year >= 2024 for column in ("timestamp", "rcv_timestamp") for day in table[column].to_pylist())
    assert mdcollector("verify", data).returncode == 0


def test_a_budget_gives_no_more_than_its_allowance_in_any_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("mdcollector.budget.time.clock_gettime", lambda _: now)
    budget, spent = Budget(tmp_path / "b", 4800, 60), []
    while now < 1300:
        wait_s = budget.take(50)
        if wait_s:
            now += wait_s + 1e-6
        else:
            spent.append(now)
    most = max(sum(50 for at in spent if begin <= at < begin + 60) for begin in spent)
    assert 4000 < most <= 4850
    assert len(spent) * 50 > 4 * 3600


def test_a_closed_ring_leaves_no_semaphore_and_a_sleeping_reader_finds_the_next_writer(tmp_path: Path) -> None:
    def writer() -> RingWriter:
        return RingWriter(tmp_path, TRADES, exchange="DERIBIT", connector="c", capacity=512)

    def left() -> int:
        found = 0
        for name in ring_module._semaphore_names(tmp_path / "trades.data"):
            try:
                posix_ipc.Semaphore(name).close()
            except posix_ipc.ExistentialError:
                continue
            found += 1
        return found

    row = (1, 1, 1, 0, 0, 0, 3, 1, 1, 1.0, 1.0, 1, b"")
    first = writer()
    with RingReader(tmp_path, "trades") as reader:
        assert not reader.wait(0.001, "semaphore")
        assert left() == 2
        first.close()
        assert left() == 0
        assert not reader.wait(0.001, "semaphore"), "a closed ring is waited for without them"
        with writer() as second:
            second.code("X")
            second.append(row)
            second.wake()
            assert reader.wait(DEADLINE_S, "semaphore")
            assert len(reader.read()) == 1
            assert not reader.wait(0.001, "semaphore")
    assert left() == 0


def commands_of(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands_of(below, f"{name} {word}")


NUMBERS = [
    (name, command, option)
    for program in (cli.main, tail.main, compare.main, replay.main, sim_cli.main, demo.main)
    for name, command in commands_of(program, program.callback.__module__)  # type: ignore[union-attr]
    for option in command.params
    if isinstance(option.type, click.types.FloatParamType)
]


@pytest.mark.parametrize(("name", "command", "option"), NUMBERS, ids=[f"{n} {o.opts[0]}" for n, _, o in NUMBERS])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_no_command_takes_a_number_that_is_none(
    name: str, command: click.Command, option: click.Parameter, value: str
) -> None:
    with pytest.raises(click.BadParameter, match=r"finite|not in the range"):
        option.type_cast_value(click.Context(command), value)
    default = option.get_default(click.Context(command))
    if isinstance(default, float):
        assert option.type_cast_value(click.Context(command), default) == default


@pytest.mark.parametrize("module", ["numpy", "click", "pyarrow"])
def test_an_interrupt_while_a_command_is_still_loading_is_answered_with_nothing(tmp_path: Path, module: str) -> None:
    """pyarrow is loaded by the command itself, the others before there is one. A stand-in makes each take for ever."""
    text = "import signal, sys\nprint('loading', file=sys.stderr, flush=True)\nsignal.pause()\n"
    (tmp_path / f"{module}.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        command("mdcollector", "verify", tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "loading\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "")
