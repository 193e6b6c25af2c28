"""`make up`, `make down` and their like as somebody uses them who types them twice, or after a crash. Real processes.

They run in a directory of the test with the Makefile of the project, so that nothing of the project can be removed.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.fleet import Fleet, until

Make = Callable[..., subprocess.CompletedProcess[str]]
MAKE_S = 100.0


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A fleet file with a simulated exchange; what make has started ends with it."""
    with Fleet(tmp_path, "binance_spot") as fleet:
        fleet.config.write_text(fleet.config.read_text() + '\n[monitor]\nlisten = "127.0.0.1:0"\n')
        yield fleet
        for name in ("fleet", "monitor"):
            with suppress(FileNotFoundError, psutil.NoSuchProcess):
                process = psutil.Process(pid(tmp_path, name))
                if "mdcollector" in " ".join(process.cmdline()):
                    process.kill()


@pytest.fixture
def make(repository: Path, tmp_path: Path) -> Make:
    """make with the environment of this interpreter."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-f", repository / "Makefile", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/ready", *words]
        return subprocess.run(
            list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=MAKE_S
        )  # fmt: skip

    return run


def pid(directory: Path, name: str) -> int:
    return int((directory / "logs" / f"{name}.pid").read_text())


@pytest.mark.timeout(240)
def test_up_twice_is_one_fleet_and_down_tells_that_all_was_written(fleet: Fleet, make: Make) -> None:
    here = fleet.directory
    up = make("up")
    assert up.returncode == 0, up.stderr
    assert "fleet: started" in up.stdout
    assert "monitor: started" in up.stdout
    pids = [pid(here, name) for name in ("fleet", "monitor")]
    again = make("up")
    assert (again.returncode, pids) == (0, [pid(here, name) for name in ("fleet", "monitor")]), again.stderr
    assert again.stdout.count("runs already") == 2

    refused = make("clean")
    assert refused.returncode != 0, "it would take the environment away from under a running fleet"
    assert "make down first" in refused.stderr
    assert (here / "logs" / "fleet.pid").exists()

    until(lambda: fleet.published("trades") > 20, fleet.brief)
    status = make("status")
    assert "connected" in status.stdout, status.stderr
    psutil.Process(pids[1]).kill()  # only the monitor is missing, so only the monitor is started
    until(lambda: not psutil.pid_exists(pids[1]), "the monitor is gone")
    third = make("up")
    assert "fleet: runs already" in third.stdout, third.stderr
    assert "monitor: started" in third.stdout, third.stderr
    assert pid(here, "fleet") == pids[0]

    down = make("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert "every row that went in was written" in down.stdout
    assert not psutil.pid_exists(pids[0])
    assert not list((here / "logs").glob("*.pid"))
    nothing = make("down")
    assert nothing.returncode == 0
    assert nothing.stdout.count("does not run") == 2
    fleet.sim.stop()
    proof = fleet.prove()
    assert proof.ok, str(proof)
    assert make("clean").returncode == 0
    assert not (here / "logs").exists()


@pytest.mark.timeout(240)
def test_a_pid_file_that_a_crash_left_behind_harms_nobody(fleet: Fleet, make: Make) -> None:
    """The number in it is another process's by now: it is not stopped, and does not keep the fleet from starting."""
    here = fleet.directory
    (here / "logs").mkdir()
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        for name in ("fleet", "monitor"):
            (here / "logs" / f"{name}.pid").write_text(f"{bystander.pid}\n")
        down = make("down")
        assert down.returncode == 0, down.stderr
        assert down.stdout.count("does not run") == 2
        (here / "logs" / "fleet.pid").write_text(f"{bystander.pid}\n")
        up = make("up")
        assert up.returncode == 0, up.stderr
        assert "fleet: started" in up.stdout
        assert bystander.poll() is None
        bystander.kill()

    psutil.Process(pid(here, "fleet")).send_signal(signal.SIGKILL)
    children = until(lambda: fleet.stats("_supervisor").get("processes"), "a page of the supervisor").values()
    until(lambda: not any(psutil.pid_exists(child["child_pid"] or 0) for child in children), "all ended with it")
    anew = make("up")
    assert "fleet: started" in anew.stdout, anew.stderr
    fleet.wait_more("trades", 20)
    down = make("down")
    assert down.returncode == 0, down.stdout + down.stderr


@pytest.mark.parametrize(("content", "words"), [
    (None, "fleet.toml: cannot be read"), ("rings = 5\n", "rings"),
], ids=["no file", "wrong"])  # fmt: skip
def test_without_a_fleet_file_that_can_be_run_up_says_so_and_leaves_nothing(
    make: Make, tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "fleet.toml").write_text(content)
    up = make("up")
    assert up.returncode != 0
    assert words in up.stderr, up.stderr
    assert re.search(r"fleet\] Error 78|Makefile:\d+: up\] Error 78", up.stderr), up.stderr
    assert not list(tmp_path.glob("logs/*.pid"))
    assert "does not run" in make("down").stdout


def test_logs_before_anything_was_started(make: Make) -> None:
    done = make("logs")
    assert done.returncode != 0
    assert "has written no logs" in done.stderr


def test_help_names_every_target(make: Make, repository: Path) -> None:
    listed = re.findall(r"^  make (\w+) +\S", make("help").stdout, re.MULTILINE)
    phony = re.findall(r"^\.PHONY: (.*)$", (repository / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert sorted(listed) == sorted(phony)
