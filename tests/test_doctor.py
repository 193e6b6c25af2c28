"""`mdcollector doctor`: what it says of a machine, each thing made wrong once."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.fleet import Fleet, mdcollector, until
from tools.sim.process import SimProcess


def doctor(config: Path, *arguments: str, **limits: tuple[int, int]) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code and verdicts by what was looked at; `limits` are set for the process alone."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), value)

    command = [sys.executable, "-m", "mdcollector", "doctor", "-c", str(config), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert done.stdout, done.stderr
    return done.returncode, {verdict["what"]: verdict for verdict in json.loads(done.stdout)}


def fleet_file(directory: Path, **connector: Any) -> Path:
    path = directory / "fleet.toml"
    file = {
        "rings": "rings",
        "connectors": {"deribit": {"exchange": "deribit", "tickers": ["BTC-PERPETUAL"], **connector}},
        "writers": {"parquet": {"out": "data"}},
    }
    path.write_text(tomli_w.dumps(file))
    return path


def test_what_is_good_and_what_is_not_is_told_apart(tmp_path: Path) -> None:
    path = fleet_file(tmp_path)
    (tmp_path / "data").mkdir(mode=0o750)
    _, good = doctor(path, "--offline")
    assert good["machine"]["verdict"] == good["packages"]["verdict"] == good["open files"]["verdict"] == "good"
    assert good["tables"]["verdict"] == "good"
    assert good["credentials of deribit"]["found"] == "none: public data only"
    (tmp_path / "data").chmod(0o777)
    code, bad = doctor(path, "--offline", RLIMIT_NOFILE=(256, 256))
    assert code == 1
    assert (bad["open files"]["verdict"], bad["open files"]["found"]) == ("bad", "256")
    assert "LimitNOFILE=" in bad["open files"]["advice"]
    assert bad["tables"]["verdict"] == "bad"
    assert "open to everybody" in bad["tables"]["found"]


def test_rings_that_do_not_fit_are_seen_before_they_are_made(tmp_path: Path) -> None:
    path = fleet_file(tmp_path, feeds=["orderbook_l2"], capacity={"orderbook_l2": 1 << 26})
    _, found = doctor(path, "--offline")
    free = int(found["room for the rings"]["found"].split(": ")[1].split(" MiB")[0].replace(",", ""))
    needed = (1 << 26) * 128 // 2**20
    assert f"{needed:,}"[:3] in found["room for the rings"]["found"].split("free, ")[1]
    assert found["room for the rings"]["verdict"] == ("bad" if free < needed else "good")


def test_credentials_that_others_can_read_are_named_and_never_shown(tmp_path: Path) -> None:
    secrets = tmp_path / "deribit.toml"
    secrets.write_text('client_id = "an-id"\nclient_secret = "a-word-to-look-for"\n')
    secrets.chmod(0o644)
    path = fleet_file(tmp_path, credentials_file="deribit.toml")
    code, found = doctor(path, "--offline")
    assert code == 1
    assert "mode 644" in found["credentials of deribit"]["found"]
    assert "a-word-to-look-for" not in json.dumps(found)
    secrets.chmod(0o600)
    assert doctor(path, "--offline")[1]["credentials of deribit"]["found"] == "given"


def test_venues_are_asked(tmp_path: Path) -> None:
    with Fleet(tmp_path, "deribit") as fleet:
        _, found = doctor(fleet.config)
        assert found["network to deribit"]["verdict"] == "good"
        assert found["network to deribit"]["found"].endswith(" instruments")
    code, found = doctor(fleet_file(tmp_path, rest_url="http://127.0.0.1:1", ws_url="ws://127.0.0.1:1"))
    assert code == 1
    assert found["network to deribit"]["verdict"] == "bad"


def test_nobody_asks_during_a_ban(tmp_path: Path) -> None:
    """A connector was told to wait: no command that looks beside it breaks that, and each says why it does not know."""
    with Fleet(tmp_path, "binance_spot") as fleet:
        fleet.sim.fault("ban", seconds=600, status=418)
        fleet.connect()
        until(lambda: fleet.sim.state()["counts"].get("http_418"), lambda: f"the ban; {fleet.brief()}")
        until(lambda: fleet.stats().get("state") == "connected", lambda: f"begun without a list; {fleet.tail()}")
        pattern = tmp_path / "pattern.toml"
        pattern.write_text(fleet.config.read_text().replace('"BTCUSDT"', '"BTC*"'))
        not_asked = "exchangeInfo: not asked: blocked for another "
        for config, code in ((fleet.config, 0), (pattern, 1)):
            for command in (("check",), ("units", "--out", str(tmp_path / "units"))):
                done = mdcollector(*command, "-c", config)
                assert done.returncode == code, done.stderr
                assert not_asked in done.stderr
        code, found = doctor(fleet.config)
        assert code == 1
        assert not_asked in found["network to binance_spot"]["found"]
        state = fleet.sim.state()
        assert (state["counts"]["http_418"], state["requests_before_retry_after"]) == (1, 0)


@pytest.mark.parametrize("command", ["check", "doctor"])
def test_who_is_told_to_wait_on_a_fresh_machine_asks_once_and_leaves_nothing_behind(
    tmp_path: Path, command: str
) -> None:
    with SimProcess("binance_spot", "--tickers", "BTCUSDT:1") as sim:
        sim.fault("ban", seconds=600, status=429)
        urls = {"ws_url": sim.ws_url, "rest_url": sim.rest_url}
        hosts = {"rest_fallbacks": [sim.rest_url + "/"]}  # another name of it
        connector = {"exchange": "binance_spot", "tickers": ["BTCUSDT"], **urls, **hosts}
        path = tmp_path / "fleet.toml"
        path.write_text(tomli_w.dumps({"rings": "rings", "connectors": {"one": connector, "two": connector}}))
        done = mdcollector(command, "-c", path)
        assert done.returncode == (0 if command == "check" else 1)
        assert "not asked: blocked for another" in done.stderr + done.stdout
        state = sim.state()
        assert (state["counts"]["http_429"], state["requests_before_retry_after"]) == (1, 0)
    assert list(tmp_path.iterdir()) == [path]


def test_text_goes_to_people(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mdcollector", "doctor", "--offline"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "good machine: " in done.stdout
    assert "\x1b" not in done.stdout, "colours only on a terminal"
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.stdout)
