"""The benchmarks run: every part once, small, in a process of its own. Their figures are looked at for sense, not speed."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench import frames
from bench.processes import CRYPTOFEED, INSTALL_S, NotInstalled, environment

RUN_S = 110


def bench(repository: Path, out: Path, *parts: str) -> dict[str, Any]:
    """The results of some parts of a quick run."""
    command = [sys.executable, "-m", "bench", *parts, "--quick", "--out", str(out)]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=RUN_S)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == (out / "results.md").read_text()
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert found["quick"] is True
    assert found["machine"]["cores"] >= 1
    return found


def test_what_runs_in_one_process(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("orjson", reason="the bench extra is not installed")
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    found = bench(repository, tmp_path, "calibration", "ring", "decode", "hot_path", "venues")
    assert all(ns > 0 for ns in found["ring"].values())
    assert {row["frame"] for row in found["decode"]} >= {"binance trade", "binance depth 2x20", "deribit book 2x20"}
    assert all(row[p] > 0 for row in found["decode"] for p in ("msgspec typed", "msgspec untyped", "orjson", "json"))
    assert {row["frame"].split()[0] for row in found["venues"]} == set(frames.VENUES)
    assert all(row["rows"] >= (40 if "book" in row["frame"] else 1) for row in found["venues"])
    assert all(row["total"] > 0 < row["orjson"] for row in found["venues"])
    rows = {row["frame"]: row for row in found["hot_path"]}
    assert rows["binance trade"]["rows"] == 1
    assert rows["binance depth 2x20"]["rows"] == rows["deribit book 2x20"]["rows"] == 40
    assert all(row["total"] > 0 < row["decode"] for row in rows.values())


def test_what_runs_in_processes(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("orjson", reason="the bench extra is not installed")
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    found = bench(repository, tmp_path, "end_to_end", "ring_to_reader", "drain", "sustained", "streams")
    assert found["streams"]["streams"] == 400
    assert found["streams"]["core_share"] > 0
    runs = {(run["kind"], run["mode"]): run for run in found["end_to_end"]}
    assert runs["trade", "burst"]["messages"] == 2999
    assert runs["depth", "burst"]["messages"] == 199
    for run in runs.values():
        assert 0 < run["visible_ns"]["p50"] <= run["visible_ns"]["p99"] <= run["visible_ns"]["p99.9"]
        assert run["cpu_ns"] > 0 < run["rss_beside_rings_mb"]
    assert {row["reader"] for row in found["ring_to_reader"]} >= {"spinning", "semaphore"}
    assert all(row["rows"] == 400 for row in found["ring_to_reader"])
    assert [row["rows"] for row in found["drain"]][::2] == [4000, 4000]
    assert found["sustained"]["nothing_lost"] is True
    assert found["sustained"]["sent"] == found["sustained"]["stored"] == 10_000


@pytest.mark.timeout(INSTALL_S + 180)
def test_other_stacks_on_the_same_frames(repository: Path, tmp_path: Path) -> None:
    for package in ("orjson", "matplotlib", "ujson", "pydantic", "websockets"):
        pytest.importorskip(package, reason="the bench extra is not installed")
    from bench.peers import BARE, STACKS

    with suppress(NotInstalled):  # then it is left out
        environment(CRYPTOFEED)
    found = bench(repository, tmp_path, "peers")
    rows = {(row["stack"], row["tls"]): row for row in found["peers"]}
    assert rows.keys() >= {("mdcollector", False), ("mdcollector", True), *((name, False) for name in (BARE, *STACKS))}
    assert rows[BARE, False]["messages"] == rows["mdcollector", False]["messages"]
    assert all(row["cpu_ns"] > 0 < row["messages_per_s"] for row in rows.values())
