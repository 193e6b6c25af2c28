"""systemd units: made from the fleet file, checked by systemd itself where it is installed; and the watchdog is fed."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mdcollector.config import FleetConfig, WriterConfig
from mdcollector.units import units
from tests.fleet import Fleet, mdcollector

EXPOSURE_MOST = 2.5  # systemd-analyze security: 0 is locked up, 10 is open


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Units of a fleet with two connectors, an arbiter and a writer."""
    with Fleet(tmp_path, "binance_spot") as fleet:
        section = f'exchange = "binance_spot"\ntickers = ["BTCUSDT"]\nrest_url = "{fleet.sim.rest_url}"\n'
        fleet.config.write_text(
            f'rings = "rings"\n[connectors.a]\ncpu = 0\n{section}[connectors.b]\n{section}'
            '[arbiters.both]\nlegs = ["a", "b"]\n[writers.parquet]\nout = "data"\nconnectors = ["both"]\n'
            '[monitor]\ncsv = "numbers/metrics.csv"\n'
        )
        done = mdcollector("units", "-c", fleet.config, "--out", tmp_path / "units")
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.splitlines()) == sorted(
            str(p) for p in (tmp_path / "units").rglob("*") if p.is_file()
        )
    return tmp_path / "units"


def test_every_process_of_the_fleet_is_wanted_with_its_cpu(written: Path) -> None:
    target = (written / "mdcollector.target").read_text()
    wants = next(line for line in target.splitlines() if line.startswith("Wants=")).removeprefix("Wants=").split()
    assert wants == [
        "mdcollector-monitor.service", "mdcollector-writer@parquet.service", "mdcollector-arbiter@both.service",
        "mdcollector-connector@a.service", "mdcollector-connector@b.service",
    ]  # fmt: skip
    order = "[Unit]\nAfter=mdcollector-writer@parquet.service"
    assert {path.parent.name: path.read_text() for path in written.glob("*.d/fleet.conf")} == {
        "mdcollector-arbiter@both.service.d": f"{order}\n",
        "mdcollector-connector@a.service.d": f"{order} mdcollector-arbiter@both.service\n[Service]\nCPUAffinity=0\n",
        "mdcollector-connector@b.service.d": f"{order} mdcollector-arbiter@both.service\n",
    }, "who fills is stopped before who drains"
    writer = (written / "mdcollector-writer@.service").read_text()
    assert f"ReadWritePaths={written.parent}/rings {written.parent}/data\n" in writer
    assert "RestartPreventExitStatus=78" in writer
    monitor = (written / "mdcollector-monitor.service").read_text()
    assert f"ReadWritePaths={written.parent}/rings {written.parent}/numbers\n" in monitor


def test_what_an_earlier_fleet_file_said_is_taken_away(written: Path) -> None:
    """A drop-in that stays would go on to pin a process; what an administrator put beside it is his."""
    config, his = written.parent / "fleet.toml", written / "mdcollector-connector@a.service.d" / "his.conf"
    his.write_text("[Service]\nNice=-5\n")
    lines = [line for line in config.read_text().splitlines() if line not in ("cpu = 0", 'connectors = ["both"]')]
    text = "\n".join(lines)
    before, _, rest = text.partition("[arbiters.both]")
    config.write_text(before + rest[rest.index("[writers") :] + "\n")
    done = mdcollector("units", "-c", config, "--out", written)
    assert done.returncode == 0, done.stderr
    gone = written / "mdcollector-arbiter@both.service.d"
    assert f"{gone}/fleet.conf: removed" in done.stderr
    assert sorted(path.parent.name for path in written.glob("*.d/fleet.conf")) == [
        "mdcollector-connector@a.service.d", "mdcollector-connector@b.service.d"
    ]  # fmt: skip
    assert not [path for path in written.glob("*.d/fleet.conf") if "CPUAffinity" in path.read_text()]
    assert his.exists()


def test_a_path_may_have_blanks_quotes_and_percent_signs(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    place = tmp_path / 'my "own" 100%i fleet'
    fleet = FleetConfig(rings=str(place / "rings"), writers={"w": WriterConfig(out=str(place / "out"))})
    for name, text in units(place / "fleet.toml", fleet, {}).items():
        path = tmp_path / "units" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if name.endswith(".service"):
            command = ["systemd-analyze", "verify", "--recursive-errors=no", str(path).replace("@", "@x")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
    escaped = str(place).replace('"', '\\"').replace("%", "%%")
    text = (tmp_path / "units" / "mdcollector-writer@.service").read_text()
    assert f'write %i -c "{escaped}/fleet.toml"\n' in text
    assert f'ReadWritePaths="{escaped}/rings" "{escaped}/out"\n' in text


LOCKED = """
import mmap, resource, sys
resource.getrlimit = lambda which: {limit}
from mdcollector.connector import lock_memory
lock_memory()
ring = mmap.mmap(-1, {size})
ring[:: mmap.PAGESIZE] = bytes(len(ring) // mmap.PAGESIZE)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmLck:")))
"""


def test_who_fills_rings_keeps_them_in_memory_where_the_limit_was_lifted() -> None:
    """As units and compose file lift it. What is mapped and touched later is locked as well."""
    if os.geteuid() != 0:
        pytest.skip("only root is let to lock memory here, whatever the limit says")
    size, kib = 32 << 20, {}
    for limit in ((-1, -1), (8 << 20, 8 << 20)):
        code = LOCKED.format(limit=limit, size=size)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        kib[limit[0]] = int(done.stdout)
    assert kib[-1] >= size >> 10
    assert kib[8 << 20] == 0


def test_systemd_finds_nothing_wrong_with_them(written: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    instances = [written / f"mdcollector{name}" for name in ("-monitor.service", "-directories.service", ".target")]
    instances += [written / f"mdcollector-{role}@x.service" for role in ("connector", "arbiter", "writer")]
    verify = ["systemd-analyze", "verify", "--recursive-errors=no", *map(str, instances)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    broken = written / "mdcollector-monitor.service"
    broken.write_text(broken.read_text().replace("WatchdogSec=", "WatchdogSecs="))
    assert subprocess.run(verify, capture_output=True, text=True, timeout=60).stderr, "it would say so"


def test_nothing_is_more_exposed_than_it_must_be(written: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in written.glob("*.service"):
        command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MOST * 10:.0f}", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{unit.name}: {done.stdout[-300:]}"


def test_connector_and_writer_tell_systemd_that_they_work(tmp_path: Path) -> None:
    """The socket is the one that systemd would give them; what arrives is of the loop that does the work."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        address = str(tmp_path / "notify")
        listener.bind(address)
        listener.settimeout(30)
        with Fleet(tmp_path / "fleet", "binance_spot", env={"NOTIFY_SOCKET": address}) as fleet:
            fleet.writer = fleet.write()
            assert listener.recv(100) == b"READY=1\nWATCHDOG=1"
            fleet.stop(fleet.writer)
            _drain(listener)
            fleet.connector = fleet.connect()
            for _ in range(3):
                assert listener.recv(100) == b"READY=1\nWATCHDOG=1"
            os.kill(fleet.connector.pid, 19)  # SIGSTOP: it hangs, so nothing may come any more
            _drain(listener)
            listener.settimeout(2)
            with pytest.raises(TimeoutError):
                listener.recv(100)
            os.kill(fleet.connector.pid, 18)


def _drain(listener: socket.socket) -> None:
    listener.setblocking(False)
    try:
        while True:
            listener.recv(100)
    except BlockingIOError:
        listener.setblocking(True)
        listener.settimeout(30)
