"""The soak, short: a fleet under load with kills, a disconnect and a full disk, proven against the ledgers."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.soak import small_disk

EXCHANGES = ("binance_spot", "deribit", "okx", "bybit_linear")


def soak(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.soak", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=380)


@pytest.mark.crash
@pytest.mark.timeout(400)
def test_a_short_soak_loses_nothing_and_sees_every_fault(tmp_path: Path) -> None:
    """Slow enough for a busy machine: what is asked of the faults is asked of them at any rate."""
    with small_disk(tmp_path / "disk", 1 << 20) as may_mount:
        faults = ["kill -9", "disconnect", *(["disk full"] if may_mount else [])]
    done = soak(tmp_path / "soak", "--seconds", "45", "--rate", "60", "--copies", "1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for exchange in EXCHANGES:
        assert f"{exchange}-1: ledger = rings = Parquet proven" in done.stdout
    for fault in faults:
        assert fault in done.stdout
    assert "nothing lost, nothing doubled, everything seen" in done.stdout


def test_a_directory_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    done = soak(tmp_path, "--seconds", "20")
    assert done.returncode == 1
    assert "is not of an earlier soak: not touched" in done.stderr
    assert (tmp_path / "mine").read_text() == "kept"
