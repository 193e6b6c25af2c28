"""The monitor against a real fleet: its numbers are those of the rings, and it sees what is killed, also when it comes back."""

import csv
import json
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mdcollector import monitor
from mdcollector.emit import Emit
from mdcollector.health import DEGRADED, DOWN, KINDS, OK, Finding, concerning, judge, state_of
from mdcollector.records import Exchange
from tests.fleet import Fleet, until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


class Watched:
    """A fleet with a monitor."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.process = fleet.spawn("monitor", "-c", fleet.config, "--listen", "127.0.0.1:0")
        log = fleet.logs[-1]
        found = until(lambda: re.search(r"serving on 127\.0\.0\.1:(\d+)", log.read_text()), fleet.tail)
        self.url = f"http://127.0.0.1:{found[1]}"

    def json(self, path: str) -> tuple[int, Any]:
        status, text = get(self.url + path)
        return status, json.loads(text)

    def samples(self) -> Samples:
        families = text_string_to_metric_families(get(self.url + "/metrics")[1])
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def value(self, name: str, **labels: str) -> float:
        return self.samples()[name, frozenset(labels.items())]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with Fleet(tmp_path, "binance_spot") as fleet:
        with fleet.config.open("a") as file:
            file.write('[monitor]\ncsv = "metrics.csv"\ngroup_s = 1\n')
        fleet.start()
        yield Watched(fleet)


def test_numbers_are_those_of_the_rings_and_a_kill_is_seen_and_healed(watched: Watched) -> None:
    fleet = watched.fleet
    until(lambda: watched.json("/ready")[0] == 200, lambda: f"ready; {watched.json('/ready')}")
    assert watched.json("/health/conn") == (200, {**watched.json("/health/conn")[1], "state": "ok", "reasons": []})
    assert watched.value("mdcollector_connected", connector="conn", exchange="binance_spot") == 1

    fleet.connector.kill()
    fleet.connector.wait(30)
    status = until(lambda: (a := watched.json("/health/conn"))[0] == 503 and a, "the dead connector is seen")
    assert [reason["kind"] for reason in status[1]["reasons"]] == ["dead"]
    code, ready = watched.json("/ready")
    assert (code, ready["ready"]) == (503, False)
    assert watched.value("mdcollector_up", process="conn", role="connector") == 0
    assert watched.value("mdcollector_finding", kind="dead", process="conn") == 1
    until(lambda: "DOWN conn" in fleet.logs[2].read_text(), "the alert is in the log")

    fleet.connector = fleet.connect()
    until(lambda: watched.json("/ready")[0] == 200, lambda: f"ready again; {watched.json('/ready')}")
    until(lambda: "recovered conn" in fleet.logs[2].read_text(), "and that it is over")

    fleet.wait_live()
    fleet.sim.pause()
    shown: dict[str, float] = {}

    def agrees() -> bool:
        shown.update({f: watched.value("mdcollector_ring_rows_total", connector="conn", feed=f) for f in fleet.feeds})
        return shown == {feed: fleet.published(feed) for feed in fleet.feeds}

    until(agrees, lambda: f"the same rows as in the rings: {shown}")
    assert shown["trades"] > 0
    samples = watched.samples()
    stages = ("mdcollector_receive_to_parse_seconds", "mdcollector_receive_to_visible_seconds")
    for stage in stages:
        count = samples[f"{stage}_count", frozenset({("connector", "conn")})]
        assert samples[f"{stage}_bucket", frozenset({("connector", "conn"), ("le", "+Inf")})] == count > 0
        buckets = sorted(
            (float(dict(labels)["le"]), value) for (name, labels), value in samples.items() if name == f"{stage}_bucket"
        )
        assert [v for _, v in buckets] == sorted(v for _, v in buckets)
        assert 10 <= len(buckets) <= 16

    fleet.stop(watched.process)
    assert watched.process.returncode == 0, fleet.tail()
    with open(fleet.directory / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == monitor.CSV_COLUMNS
    lines = [row for row in rows if row["connector"] == "conn"]
    assert sum(int(row["trade_count"]) for row in lines) > 0
    assert max(int(row["rss_bytes"]) for row in lines) > 10_000_000
    fleet.sim.resume()


def test_unknown_names_and_paths_are_refused(watched: Watched) -> None:
    until(lambda: watched.json("/health")[0] == 200, "the first look")
    status, body = watched.json("/health/nobody")
    assert (status, body["error"]) == (404, "no process 'nobody'")
    assert body["processes"] == ["conn", "parquet"]
    assert get(watched.url + "/nothing")[0] == 404


def test_an_address_in_use_is_a_clear_error(watched: Watched) -> None:
    port = watched.url.rpartition(":")[2]
    second = watched.fleet.spawn("monitor", "-c", watched.fleet.config, "--listen", f"127.0.0.1:{port}")
    assert second.wait(30) == 78
    assert f"monitor.listen = '127.0.0.1:{port}'" in watched.fleet.logs[-1].read_text()


# Judging


def page(**changes: Any) -> dict[str, Any]:
    """A connector's page as `status` gives it."""
    return {
        "pid": 1, "age_s": 0.1, "state": "connected", "last_error": "", "fetch_blocked_until_ns": 0, "data_ns": 0,
        "books_invalid_count": 0, "streams": {}, "counters": {}, **changes,
    }  # fmt: skip


def fleet_of(
    connector: dict[str, Any] | None = None, writer: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "connectors": {"c": connector} if connector else {}, "arbiters": {}, "writers": {"w": writer} if writer else {},
        "supervisor": None, "problems": [], "homeless": {}, **more,
    }  # fmt: skip


def drain(**changes: Any) -> dict[str, Any]:
    return {"pid": 2, "age_s": 0.1, "state": "running", "errors": {}, "refused": {},
            "streams": {"c/trades": {"behind": False, "lapped": 0, "damaged": 0, **changes}}}  # fmt: skip


def merged(**changes: Any) -> dict[str, Any]:
    return {"pid": 3, "age_s": 0.1, "state": "running", "legs": {}, "books_unproven": 0, **changes}


def tables(**used: int) -> dict[str, Any]:
    return {feed: {"instruments": [count, 16_384]} for feed, count in used.items()}


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        (fleet_of(page()), []),
        (fleet_of(page(state="replacing (lifetime)")), []),
        (fleet_of(page(age_s=9.0, state="waiting to reconnect")), ["dead"]),
        (fleet_of(page(age_s=9.0, state="stopped")), []),
        (fleet_of(page(state="waiting to reconnect")), ["disconnected"]),
        (fleet_of(page(fetch_blocked_until_ns=1 << 62)), ["banned"]),
        (fleet_of(page(data_ns=1)), ["stale"]),
        (fleet_of(page(books_invalid_count=2)), ["book_invalid"]),
        (fleet_of(page(streams={"s": {"refused": "no such symbol"}})), ["stream_refused"]),
        (fleet_of(writer=drain(behind=True)), ["writer_behind"]),
        (fleet_of(writer=drain(lapped=5)), ["rows_lost"]),
        (fleet_of(writer=drain(damaged=5)), ["rows_lost"]),
        (fleet_of(problems=["x: not a stats page"]), ["file_refused"]),
        (fleet_of(page(rings=tables(trades=14_745, instruments=14_745))), []),
        (fleet_of(page(rings=tables(trades=100, instruments=14_746))), ["table_full"]),
        (fleet_of(arbiters={"a": merged(rings=tables(trades=16_384))}), ["table_full"]),
        (fleet_of(page(), homeless={"c": ["X"], "other": ["Y"]}), ["no_connection"]),
        (fleet_of(page(state="stopped"), homeless={"c": ["X"]}), []),
        (fleet_of(page(), homeless={"c": []}), []),
        (fleet_of(supervisor={"age_s": 0.1, "left_behind": {"c": ["c.2/trades"], "d": []}}), ["left_behind"]),
    ],
)
def test_what_is_found(found: dict[str, Any], kinds: list[str]) -> None:
    assert [finding.kind for finding in judge(found)] == kinds


@pytest.mark.parametrize(
    ("supervisor", "told"),
    [
        (None, "; run mdcollector units again and start the new unit"),
        (
            {"age_s": 60.0, "unopened": {"c": "of an earlier life"}},
            "; run mdcollector units again and start the new unit",
        ),
        ({"age_s": 0.1, "unopened": {"d": "not this one"}}, "; a further one is opened"),
        ({"age_s": 0.1, "unopened": {"c": "one is allowed"}}, ", and no further one is opened: one is allowed"),
    ],
)
def test_who_has_no_connection_is_told_with_what_to_do(supervisor: dict[str, Any] | None, told: str) -> None:
    (finding,) = judge(fleet_of(page(), supervisor=supervisor, homeless={"c": ["X", "Y"]}))
    assert finding == Finding("no_connection", "c", f"X, Y: no connection has room{told}")
    assert "mdcollector units" in KINDS["no_connection"].advice


def test_a_table_of_instruments_is_found_before_it_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has expired stays in it, over all lives of the ring."""
    monkeypatch.setattr("mdcollector.ring.INSTRUMENTS_MAX", 10)
    emit = Emit(tmp_path, "c", Exchange.DERIBIT, ("trades",), semaphore=False)
    for number in range(9):
        emit.instrument(f"BTC-{number}")
    assert judge(fleet_of(page(**emit.snapshot()))) == []
    emit.close()
    emit = Emit(tmp_path, "c", Exchange.DERIBIT, ("trades",), semaphore=False)
    emit.instrument("BTC-9")
    (finding,) = judge(fleet_of(page(**emit.snapshot())))
    emit.close()
    assert finding == Finding("table_full", "c", "trades: the ring's table holds 10 of 10 instruments")


def test_what_is_counted_is_found_when_it_grows() -> None:
    before, after = fleet_of(writer=drain(lapped=5)), fleet_of(writer=drain(lapped=8))
    assert judge(before, before) == []
    assert [f.text for f in judge(after, before)] == ["c/trades: 3 rows were overwritten before they were read"]
    other_life = fleet_of(writer={**drain(lapped=8), "pid": 3})
    assert [f.text for f in judge(other_life, before)] == ["c/trades: 8 rows were overwritten before they were read"]
    fresh = fleet_of(page(counters={"disconnected": 1}))
    assert [f.kind for f in judge(fresh, fleet_of())] == ["reconnected"], "also of a process that was not there before"
    holes = [fleet_of(page(counters={"gap_trades_sequence": n})) for n in (10, 500)]
    assert [f.kind for f in judge(holes[1], holes[0])] == ["holes"]


def test_a_process_that_died_before_anybody_had_looked_at_its_supervisor_is_found() -> None:
    """A monitor that came up first: its oldest view, which all are compared with for a minute, knows no process."""

    def supervised(starts: int) -> dict[str, Any]:
        process = {"starts": starts, "last_exit": -9, "gave_up": False}
        return fleet_of(supervisor={"processes": {"c": process}})

    assert judge(supervised(1), fleet_of()) == []
    assert [f.text for f in judge(supervised(2), fleet_of())] == ["started again 1 times lately, last after exit -9"]
    assert [f.kind for f in judge(supervised(5), supervised(4))] == ["restarted"]
    assert judge(supervised(5), supervised(5)) == []
    assert judge(supervised(5)) == [], "long ago, for all that is known"


def test_a_connector_is_not_well_when_who_drains_it_is_behind_or_a_disk_is_full() -> None:
    behind, other = judge(fleet_of(writer=drain(behind=True)))[0], Finding("dead", "d", "")
    disk = Finding("disk_low", "/data", "")
    assert concerning([behind, other, disk], "c") == [behind, disk]
    assert concerning([behind, other, disk], "w") == [behind, disk]
    assert concerning([behind, other], "e") == []


@pytest.mark.parametrize(
    ("clock", "kinds"),
    [
        ({"steps": 0, "last_step_us": 0}, []),
        ({"offset_us": 600_000.0, "uncertainty_us": 5_000.0}, ["clock_offset"]),
        ({"offset_us": -600_000.0, "uncertainty_us": 5_000.0}, ["clock_offset"]),
        ({"offset_us": 600_000.0, "uncertainty_us": 200_000.0}, []),
        ({"offset_us": 600_000.0, "uncertainty_us": None}, ["clock_offset"]),
        ({"offset_us": -600_000.0, "uncertainty_us": None}, []),
    ],
)
def test_an_offset_is_found_when_it_is_beyond_doubt(clock: dict[str, Any], kinds: list[str]) -> None:
    assert [f.kind for f in judge(fleet_of(page(clock=clock)))] == kinds


def test_steps_bans_and_storms_are_found_when_they_happened_lately() -> None:
    before = fleet_of(page())
    for counters, kinds in (
        ({"clock_steps": 1}, ["clock_stepped"]),
        ({"http_rate_limited": 1}, ["banned"]),
        ({"rate_limited": 1}, ["banned"]),
        ({"gap_orderbook_l2_sequence": 51}, ["resync_storm"]),
        ({"gap_trades_sequence": 51}, ["holes"]),
        ({"gap_trades_sequence": 30, "gap_orderbook_l2_sequence": 30, "gap_trades_sequence_repaired": 90}, []),
        ({"gap_orderbook_l2_sequence": 30, "gap_orderbook_l2_sequence_continued": 30}, []),
    ):
        after = fleet_of(page(counters=counters, clock={"steps": 1, "last_step_us": -5}))
        assert [f.kind for f in judge(after, before)] == kinds, counters
        assert judge(after, after) == []


def test_the_worst_finding_is_the_state() -> None:
    assert state_of([]) == OK
    invalid, dead = Finding("book_invalid", "c", ""), Finding("dead", "c", "")
    assert state_of([invalid]) == DEGRADED
    assert state_of([invalid, dead]) == DOWN


def test_every_kind_of_finding_is_a_rule_for_prometheus(tmp_path: Path) -> None:
    """With `promtool` from Debian the rules are checked by Prometheus itself, and fire for what they are made for."""
    rules = tmp_path / "rules.yml"
    rules.write_text(monitor.rules())
    for kind in KINDS:
        assert f'kind="{kind}"' in rules.read_text()
    try:
        check = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("promtool (Debian: prometheus) is not installed")
    assert check.returncode == 0, check.stdout + check.stderr
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "10s",
        "tests": [
            {
                "interval": "10s",
                "input_series": [
                    {"series": f'mdcollector_finding{{kind="{kind}",process="okx"}}', "values": "1x40"}
                    for kind in ("dead", "book_invalid")
                ] + [{"series": 'mdcollector_build_info{version="1"}', "values": "1x40"}],
                "alert_rule_test": [
                    {"eval_time": "10s", "alertname": "MdcollectorBookInvalid", "exp_alerts": []},
                    {"eval_time": "5m", "alertname": "MdcollectorMonitorDown", "exp_alerts": []},
                    *(
                        {
                            "eval_time": "5m",
                            "alertname": name,
                            "exp_alerts": [
                                {
                                    "exp_labels": {"severity": severity, "process": "okx"},
                                    "exp_annotations": {
                                        "summary": f"okx: {KINDS[kind].meaning}", "description": KINDS[kind].advice,
                                    },
                                }
                            ],
                        }
                        for name, kind, severity in (
                            ("MdcollectorDead", "dead", "critical"), ("MdcollectorBookInvalid", "book_invalid", "warning"),
                        )
                    ),
                ],
            }
        ],
    }  # fmt: skip
    (tmp_path / "test.yml").write_text(json.dumps(test))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stopped_monitor_leaves_a_whole_csv_and_ends_at_once(watched: Watched) -> None:
    until((watched.fleet.directory / "metrics.csv").exists, "metrics.csv")
    watched.process.send_signal(signal.SIGINT)
    assert watched.process.wait(30) == 0
    text = (watched.fleet.directory / "metrics.csv").read_text()
    assert text.endswith("\n")
    assert all(line.count(",") == len(monitor.CSV_COLUMNS) - 1 for line in text.splitlines())
