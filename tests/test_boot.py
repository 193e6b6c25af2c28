"""The systemd units in a machine that systemd really boots: a container of systemd-nspawn with the files of `units`.

Root only, and skipped with the reason where no container boots. Its /usr is this machine's, read-only, so nothing is
downloaded; the simulated exchange runs outside and is reached over loopback, so it goes on while the machine is down.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest

from mdcollector.errors import EXIT_CONFIG
from mdcollector.supervisor import balance
from mdcollector.units import WATCHDOG_S
from tests.fleet import Fleet, until
from tools.proof import Proof

pytestmark = [pytest.mark.stress, pytest.mark.timeout(240)]

CONNECTOR, WRITER = "mdcollector-connector@conn.service", "mdcollector-writer@parquet.service"
MONITOR, TARGET = "mdcollector-monitor.service", "mdcollector.target"
STATE, CONFIG = "/var/lib/mdcollector", "/etc/mdcollector/fleet.toml"
UNITS = "/etc/systemd/system"
HANG_S = 5  # the writer's watchdog in place of the units' own: a test does not wait that long
BOOT_S = 60.0


class Machine:
    """A container with systemd as its first process, on this machine's /usr and network; `root` outlives its boots."""

    def __init__(self, directory: Path, repository: Path) -> None:
        self.root, self.console = directory / "root", directory / "console.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init = 0
        for name in ("usr", "etc/systemd/system.conf.d", "etc/sysusers.d", "etc/mdcollector", "opt", "var/log/journal"):
            (self.root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        shutil.copy("/etc/ld.so.cache", self.root / "etc")
        self.write("/etc/os-release", Path("/usr/lib/os-release").read_text())
        self.write("/etc/machine-id", uuid.uuid4().hex)  # without one it would be a first boot, with presets
        self.write("/etc/sysusers.d/mdcollector.conf", 'u mdcollector - "market data"\n')
        self._binds = ["--bind-ro=/usr"]
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(repository)]
        self.python = f"{self._inside(sys.base_prefix)}/bin/python{sysconfig.get_python_version()}"
        self.env = {
            "PYTHONPATH": ":".join(dict.fromkeys(self._inside(path) for path in reversed(paths))),
            "LD_LIBRARY_PATH": f"{self._inside(sys.base_prefix)}/lib",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        settings = " ".join(f"{name}={value}" for name, value in self.env.items())
        self.write("/etc/systemd/system.conf.d/python.conf", f"[Manager]\nDefaultEnvironment={settings}\n")

    def _inside(self, path: str) -> str:
        """Where this machine's directory is seen inside: home directories would be hidden from the units."""
        if Path(path).is_relative_to("/usr"):
            return path
        inside = f"/opt{path}"
        if (bind := f"--bind-ro={path}:{inside}") not in self._binds:
            self._binds.append(bind)
        return inside

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def boot(self) -> None:
        command = ["systemd-nspawn", "-q", "-D", str(self.root), "-b", "--register=no", "--keep-unit", "--console=pipe"]
        with open(self.console, "ab") as out:
            self._nspawn = subprocess.Popen([*command, *self._binds], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._init = until(self._find_init, self.tail, BOOT_S)
        until(lambda: self.run("systemctl", "is-system-running").stdout.strip() == "running", self.tail, BOOT_S)

    def _find_init(self) -> int:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, self.tail()
        with suppress(psutil.NoSuchProcess):  # the first children only prepare, and go
            for child in psutil.Process(self._nspawn.pid).children():
                if child.name() == "systemd":
                    return child.pid
        return 0

    def power_off(self) -> None:
        """As an administrator does it: every service is stopped in order."""
        assert self._nspawn is not None
        self.run("systemctl", "poweroff")
        self._nspawn.wait(BOOT_S)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside, as root."""
        enter = ["nsenter", "-t", str(self._init), "-m", "-u", "-i", "-n", "-p", "-C", *command]
        return subprocess.run(
            enter, capture_output=True, text=True, timeout=150, env={"PATH": "/usr/sbin:/usr/bin", **self.env}
        )

    def done(self, *command: str) -> str:
        """A command inside that must succeed; what it printed."""
        result = self.run(*command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}\n{self.tail()}"
        return result.stdout

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.done("systemctl", "show", "--value", "-p", name, unit).strip()

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout

    def tail(self) -> str:
        console = self.console.read_text(errors="replace")[-2000:] if self.console.exists() else ""
        return console + self.run("journalctl", "--no-pager", "-n", "60", "-o", "short-monotonic").stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            sys.stderr.write(self.tail() + "\n")
        if self._nspawn is not None and self._nspawn.poll() is None:
            os.kill(self._nspawn.pid, signal.SIGKILL)  # what is inside dies with it
            self._nspawn.wait(BOOT_S)


@pytest.fixture(scope="module")
def _boots(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> None:
    """Skips where no container boots or it cannot run this interpreter."""
    if os.geteuid() != 0:
        pytest.skip("only root can boot a container")
    if missing := [name for name in ("systemd-nspawn", "nsenter") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed (Debian: systemd-container)")
    with Machine(tmp_path_factory.mktemp("trial"), repository) as machine:
        try:
            machine.boot()
        except AssertionError as error:
            pytest.skip(f"no container boots here: {error}")
        result = machine.run(machine.python, "-m", "mdcollector", "--version")
        if result.returncode:
            pytest.skip(f"this interpreter does not run in a container: {result.stderr}")
        machine.power_off()


class BootedFleet(Fleet):
    """A fleet whose processes are units of a machine; rings and data lie below its /var/lib, the exchange outside."""

    def __init__(self, directory: Path, machine: Machine) -> None:
        self.machine = machine
        super().__init__(directory, "binance_spot", cpu=0)
        state = machine.root / STATE.lstrip("/")
        self.rings, self.data = state / "rings", state / "data"
        text = self.config.read_text().replace(str(directory), STATE)
        machine.write(CONFIG, f'{text}\n[monitor]\nlisten = "127.0.0.1:0"\ncsv = "{STATE}/numbers/metrics.csv"\n')

    def install(self) -> None:
        """What the manual says."""
        program = [self.machine.python, "-m", "mdcollector"]
        self.machine.done(*program, "units", "-c", CONFIG, "--out", UNITS)
        self.machine.write(f"{UNITS}/mdcollector-writer@.service.d/test.conf", f"[Service]\nWatchdogSec={HANG_S}\n")
        self.machine.done("systemctl", "daemon-reload")
        self.machine.done("systemctl", "enable", "--now", TARGET)

    def pids(self) -> set[int]:
        return {int(self.machine.show(CONNECTOR, "MainPID"))}

    def wait_writing(self) -> None:
        """Until the writer of now has made more rows durable."""
        before = self.durable()
        until(
            lambda: (
                self.writer_page().get("pid") == int(self.machine.show(WRITER, "MainPID")) and self.durable() > before
            ),
            self.brief,
        )

    def writer_page(self) -> dict[str, object]:
        return self.stats("_writers/parquet")

    def durable(self) -> int:
        return sum(row.durable for row in balance(self.rings, ["parquet"])) if self.writer_page() else 0

    def brief(self) -> str:
        return f"{super().brief()}\n{self.machine.tail()}"

    def end(self) -> Proof:
        """The exchange ends, the target is stopped, and everything that was received is in the tables."""
        until(lambda: self.stats()["trades_unproven"] == 0, self.brief)
        self.settle()
        ended = self.counter("disconnected")
        self.sim.stop()
        until(lambda: self.counter("disconnected") > ended, "the end of the exchange was noticed")
        self.machine.done("systemctl", "stop", TARGET)
        for unit in (CONNECTOR, WRITER, MONITOR):
            state = [self.machine.show(unit, name) for name in ("ActiveState", "Result", "ExecMainStatus")]
            assert state == ["inactive", "success", "0"], f"{unit}\n{self.machine.tail()}"
        assert not [row for row in balance(self.rings, ["parquet"]) if row.missing or row.lapped or row.damaged]
        proof = self.prove(to_the_end=True)
        assert proof.ok, str(proof)
        return proof


@pytest.fixture
def fleet(_boots: None, tmp_path: Path, repository: Path) -> Iterator[BootedFleet]:
    """Installed, started and recording."""
    with Machine(tmp_path, repository) as machine, BootedFleet(tmp_path / "fleet", machine) as fleet:
        machine.boot()
        fleet.install()
        fleet.wait_live()
        fleet.wait_writing()
        yield fleet


def restarts(machine: Machine, unit: str) -> int:
    return int(machine.show(unit, "NRestarts"))


def test_what_dies_or_hangs_is_started_again_and_a_stop_loses_nothing(fleet: BootedFleet) -> None:
    machine = fleet.machine
    for unit in (CONNECTOR, WRITER, MONITOR):
        until(lambda unit=unit: machine.show(unit, "ActiveState") == "active", machine.tail)  # type: ignore[misc]
        assert machine.show(unit, "User") == "mdcollector"
        assert machine.show(unit, "WatchdogUSec") == f"{HANG_S if unit == WRITER else WATCHDOG_S}s"

    # Pinned as the fleet file says, and locked in memory where this machine lets systemd lift the limit.
    (pid,) = fleet.pids()
    status, limits = (machine.done("cat", f"/proc/{pid}/{name}") for name in ("status", "limits"))
    assert re.findall(r"Cpus_allowed_list:\s+(\S+)", status) == ["0"]
    lifted = re.search(r"Max locked memory +unlimited", limits) is not None
    assert (int(re.findall(r"VmLck:\s+(\d+)", status)[0]) > 0) == lifted
    assert machine.show(CONNECTOR, "LimitMEMLOCK") == "infinity"

    # The monitor, hardened as it is, sees the others' processes.
    port = until(lambda: re.search(r"serving on 127\.0\.0\.1:(\d+)", machine.journal(MONITOR)), machine.tail)[1]
    messages = [json.loads(line) for line in machine.journal(MONITOR).splitlines() if line.startswith("{")]
    assert {"level", "message", "process"} <= set(messages[0])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    for name in ("conn", "parquet"):
        assert re.search(rf'mdcollector_process_resident_bytes\{{process="{name}"\}} [1-9]', metrics), metrics

    before = restarts(machine, CONNECTOR)
    machine.done("systemctl", "kill", "-s", "KILL", CONNECTOR)
    until(lambda: restarts(machine, CONNECTOR) > before, machine.tail)
    fleet.wait_live()

    # It hangs: nothing tells systemd any more that rows move.
    before = restarts(machine, WRITER)
    machine.done("systemctl", "kill", "-s", "STOP", WRITER)
    until(lambda: restarts(machine, WRITER) > before, machine.tail)
    assert "Watchdog timeout" in machine.journal(WRITER)
    fleet.wait_writing()

    # A wrong configuration does not get better by starting again.
    good = (machine.root / CONFIG.lstrip("/")).read_text()
    machine.write(CONFIG, good.replace("binance_spot", "nowhere"))
    before = restarts(machine, CONNECTOR)
    machine.done("systemctl", "kill", "-s", "KILL", CONNECTOR)
    until(lambda: machine.show(CONNECTOR, "SubState") == "failed", machine.tail)
    assert machine.show(CONNECTOR, "ExecMainStatus") == str(EXIT_CONFIG)
    assert restarts(machine, CONNECTOR) == before + 1, "after the kill, and not again"
    machine.write(CONFIG, good)
    machine.done("systemctl", "start", TARGET)
    fleet.wait_live()

    fleet.end()
    ended, began = (
        machine.show(CONNECTOR, "InactiveEnterTimestampMonotonic"),
        machine.show(WRITER, "ActiveExitTimestampMonotonic"),
    )
    assert int(ended) <= int(began), "the writer is told to stop when nothing fills its rings any more"


def test_an_upgrade_and_a_reboot_continue_where_it_stood(fleet: BootedFleet) -> None:
    machine = fleet.machine
    for unit in (WRITER, CONNECTOR, TARGET):  # one by one as a careful upgrade, then all at once
        machine.done("systemctl", "restart", unit)
        fleet.wait_live()
        fleet.wait_writing()
    rows = {feed: fleet.published(feed) for feed in fleet.feeds}
    machine.power_off()
    stood = {feed: fleet.published(feed) for feed in fleet.feeds}
    assert all(stood[feed] >= rows[feed] for feed in rows)
    assert not [row for row in balance(fleet.rings, ["parquet"]) if row.missing], "all was written before it went down"
    machine.boot()
    fleet.wait_live()
    fleet.wait_writing()
    assert all(fleet.published(feed) > stood[feed] for feed in rows if feed != "candles")
    fleet.end()
