"""Logs: one JSON object a line that says who it is of; repeats are left out and counted."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdcollector import logs
from mdcollector.errors import EXIT_CONFIG
from mdcollector.ring import RingReader
from tests.fleet import Fleet, mdcollector, until


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged as JSON."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", stream)
    logs.set_up("info", "json")
    yield stream
    root.handlers[:], root.level = handlers, level
    logs.identify("")


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().split("\n")[:-1]]


def test_a_line_says_who_and_which_life(out: io.StringIO) -> None:
    logs.identify("okx.1", 17)
    logging.getLogger("x").warning("lost %s\nand more", "a\u2028b")
    (line,) = lines(out)
    assert {k: line[k] for k in ("level", "logger", "process", "epoch", "message")} == {
        "level": "warning", "logger": "x", "process": "okx.1", "epoch": 17, "message": "lost a\u2028b\nand more"
    }  # fmt: skip


def test_repeats_are_left_out_and_counted(out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    for i in range(50):
        logging.getLogger("x").error("failed: %d", i)
        logging.getLogger("x").info("another event")
    assert [line["message"] for line in lines(out)].count("another event") == logs.REPEATS_SHOWN
    assert [line["message"] for line in lines(out) if line["level"] == "error"] == [
        f"failed: {i}" for i in range(logs.REPEATS_SHOWN)
    ]
    now += logs.REPEATS_WITHIN_S
    logging.getLogger("x").error("failed: %d", 50)
    assert lines(out)[-1]["message"] == f"failed: 50 ({50 - logs.REPEATS_SHOWN} more like this were not shown)"


def test_many_different_events_are_bounded_in_memory(out: io.StringIO) -> None:
    for i in range(3 * logs.EVENTS_REMEMBERED):
        logging.getLogger("x").info(f"event {i}")
    (repeats,) = (f for f in logging.getLogger().handlers[0].filters if isinstance(f, logs.Repeats))
    assert len(repeats._seen) <= logs.EVENTS_REMEMBERED + 1
    assert len(lines(out)) == 3 * logs.EVENTS_REMEMBERED


def test_a_connector_logs_under_its_name_and_the_epoch_of_its_rings(tmp_path: Path) -> None:
    with Fleet(tmp_path, "binance_spot") as fleet:
        fleet.writer = fleet.write()
        fleet.connector = fleet.spawn("--log-format", "json", "connect", fleet.NAME, "-c", fleet.config)
        fleet.wait_live()
        fleet.sim.fault("disconnect")
        log = fleet.logs[-1]
        until(lambda: "Disconnected" in log.read_text(), "the disconnect is logged")
        with RingReader(fleet.rings / fleet.NAME, "trades") as ring:
            epoch = ring.epoch
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        (entry,) = [entry for entry in entries if "Disconnected" in entry["message"]]
        assert (entry["process"], entry["epoch"], entry["pid"]) == (fleet.NAME, epoch, fleet.connector.pid)


@pytest.mark.parametrize("command", ["connect", "write", "arbitrate", "monitor"])
def test_what_ends_a_process_is_a_line_of_json_too(tmp_path: Path, command: str) -> None:
    """The one line that says why a unit gave up is what its journal is searched for."""
    name = [] if command == "monitor" else ["x"]
    done = mdcollector("--log-format", "json", command, *name, "-c", tmp_path / "none.toml")
    assert done.returncode == EXIT_CONFIG
    (line,) = [json.loads(text) for text in done.stderr.splitlines()]
    assert line["level"] == "error"
    assert str(tmp_path / "none.toml") in line["message"]
