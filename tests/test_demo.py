"""The demonstration proves what it shows, and does not touch what is not its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from tools.proof import prove

WAIT_S = 110.0


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env={**os.environ, **environment})


def test_everything_agrees_and_a_changed_row_would_be_seen(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = demo("--seconds", "12", "--exchanges", "binance_spot,deribit", "--rate", "50", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all agree" in done.stdout
    assert "NOT proven" not in done.stdout
    tables, _, query = done.stdout.partition("a query to try:\n")
    assert max(len(line) for line in tables.splitlines() if str(out) not in line) <= 80
    assert "…" not in tables, "a column is cut"
    answer = subprocess.run(query.partition("\n\n")[0], shell=True, capture_output=True, text=True, timeout=WAIT_S)
    assert "BTCUSDT" in answer.stdout, f"the query does not work as printed: {answer.stderr}"
    numbers = json.loads((out / "summary.json").read_text())
    assert numbers["deribit"]["faults"]
    assert numbers["deribit"]["comparator"]["verdict"] == "identical"
    ledger = out / "ledgers" / "binance_spot.jsonl"
    assert prove(ledger, out / "data", out / "rings", "binance_spot").ok
    # One price of one trade is changed behind everybody's back.
    victim = max((out / "data" / "trades" / "BINANCE_SPOT").rglob("*.parquet"), key=lambda p: p.stat().st_size)
    table = pq.read_table(victim, partitioning=None)
    prices = table["price"].to_pylist()
    prices[len(prices) // 2] += 0.01
    at = table.schema.get_field_index("price")
    changed = table.set_column(at, table.schema.field(at), [prices])
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), victim)
    proof = prove(ledger, out / "data", out / "rings", "binance_spot")
    assert not proof.ok
    assert any(difference.startswith("trades") for difference in proof.differences)


def test_a_fleet_that_cannot_start_is_told_at_once(tmp_path: Path) -> None:
    out, hook = tmp_path / "demo", tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\nif sys.argv[:1] == ['-m'] and 'mdcollector' in sys.orig_argv: sys.exit('broken')\n"
    )
    done = demo("--seconds", "1", "--exchanges", "gmx", "--out", str(out), PYTHONPATH=str(hook))
    assert done.returncode == 1
    assert f"and the fleet ended with 1; see {out / 'fleet.log'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    done = demo("--seconds", "1", "--out", str(tmp_path))
    assert done.returncode != 0
    assert "not touched" in done.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"
