"""`mdcollector check`: what a plan costs, worked out here from the venues' published limits, and what cannot fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fleet import mdcollector

from mdcollector import planning
from mdcollector.config import ConnectorConfig
from mdcollector.errors import ConfigError
from mdcollector.exchanges import Options, venue_class, venue_names
from mdcollector.exchanges.binance import BinanceSpot
from mdcollector.planning import Planned, plan_fleet
from tools.sim.process import SimProcess

MIB = 1 << 20
RING_META = 16384 * 64  # the instrument table of a ring; the rest of its description is small


def check(folder: Path, connectors: dict[str, dict[str, Any]], *arguments: str) -> Any:
    path = folder / "fleet.toml"
    path.write_text(tomli_w.dumps({"rings": str(folder / "rings"), "connectors": connectors}))
    return mdcollector("check", "-c", path, *arguments)


def plan(folder: Path, connectors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    done = check(folder, connectors, "--offline", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def names(count: int) -> list[str]:
    return [f"T{number:03d}USDT" for number in range(count)]


def test_what_a_plan_costs(tmp_path: Path) -> None:
    """250 books of Binance, with three feeds each, at 1000 levels: 400 streams a connection, 200 names a message."""
    binance = {"exchange": "binance_spot", "tickers": names(250), "instruments_s": 0.0}
    found = plan(tmp_path, {"a": binance, "b": {**binance, "tickers": ["BTCUSDT"], "book_depth": 5000}})
    first, second = found["connectors"]
    # 133 instruments (399 streams) and 117 (351): two messages each.
    assert {key: first[key] for key in ("connections", "tickers", "streams", "messages", "weight")} == {
        "connections": 2, "tickers": 250, "streams": 750, "messages": 4, "weight": 250 * 50,
    }  # fmt: skip
    assert (second["connections"], second["messages"], second["weight"]) == (1, 1, 250)
    rows = {"trades": 1 << 19, "orderbook_l2": 1 << 20, "bbo": 1 << 19}
    data = sum(count * 128 for count in rows.values()) + (1 << 14) * (192 + 128)
    assert data + 5 * RING_META < second["ring_bytes"] < data + 5 * RING_META + 8 * MIB
    assert first["ring_bytes"] == 2 * second["ring_bytes"]
    (family,) = found["families"]
    assert (family["family"], family["connections"], family["messages"]) == ("binance_spot", 3, 5)
    assert family["weight"] == 250 * 50 + 250
    # Four fifths of 6000 a minute are ours; a quarter of that may go at once, the rest comes evenly within the minute.
    ours = 6000 * 0.8
    assert family["weight_s"] == pytest.approx((12750 - ours / 4) / (ours * 3 / 4) * 60)
    assert family["connects_s"] == 0
    assert family["sync_s"] == pytest.approx(family["weight_s"] + family["messages_s"])


@pytest.mark.parametrize("exchange", venue_names())
@pytest.mark.parametrize("name", ["BTCUSDT", "X-Y-Z-1-2-3", "-", "a b", "ü"])
def test_a_name_of_another_venue_is_planned_as_any_other(exchange: str, name: str) -> None:
    """Where the list of instruments cannot be had, it is the venue that refuses it."""
    kind = venue_class(exchange)
    (streams,) = kind.plan([name], ["tickers"], Options())
    assert {stream.ticker for stream in streams} == {name}


def test_the_list_of_instruments_is_part_of_the_weight(tmp_path: Path) -> None:
    found = plan(tmp_path, {"a": {"exchange": "binance_spot", "tickers": ["BTCUSDT"], "feeds": ["trades"]}})
    assert found["connectors"][0]["weight"] == 20


def test_a_book_that_begins_with_its_stream_costs_no_request(tmp_path: Path) -> None:
    deribit = {"exchange": "deribit", "tickers": ["BTC-PERPETUAL"], "instruments_s": 0.0}
    found = plan(tmp_path, {"a": deribit})
    assert (found["connectors"][0]["weight"], found["families"][0]["weight_s"]) == (0, 0)


def test_what_polling_costs_is_planned(tmp_path: Path) -> None:
    """Two candles of 50 tokens each 20 s, and the prices of all each 2 s."""
    gmx = {"exchange": "gmx", "tickers": [f"T{n}" for n in range(50)], "feeds": ["candles"], "intervals": ["1m", "1h"]}
    found = plan(tmp_path, {"a": {**gmx, "poll_s": 20.0}, "b": {**gmx, "tickers": ["T1"], "feeds": ["tickers"]}})
    assert [c["polled_per_s"] for c in found["connectors"]] == [pytest.approx(100 / 20), pytest.approx(1 / 2)]
    assert (
        plan(tmp_path, {"a": {"exchange": "deribit", "tickers": ["BTC-PERPETUAL"]}})["connectors"][0]["polled_per_s"]
        == 0
    )


def test_what_is_polled_beside_streams_is_planned_and_can_wait(tmp_path: Path) -> None:
    """Open interest of Binance: each instrument every 15 s, at most five a second and connection; 40 a second are allowed."""

    def planned(count: int) -> dict[str, Any]:
        futures = {"exchange": "binance_futures", "tickers": names(count), "feeds": ["tickers"], "instruments_s": 0.0}
        (found,) = plan(tmp_path, {"a": futures})["connectors"]
        return dict(found)

    assert planned(30)["polled_per_s"] == pytest.approx(30 / 15)
    many = planned(1000)
    assert many["connections"] == 10
    assert many["polled_per_s"] == pytest.approx(10 * 5), "more than is allowed, so some come later"
    without = plan(tmp_path, {"a": {"exchange": "binance_futures", "tickers": names(3), "feeds": ["trades"]}})
    assert without["connectors"][0]["polled_per_s"] == 0


def test_the_numbers_are_the_ones_that_the_exchange_sees(tmp_path: Path) -> None:
    """The plan of a fleet of 30 instruments against what the simulated exchange counts until all books are live."""
    from fleet import Fleet, until

    with Fleet(
        tmp_path, "binance_spot", tickers=["T*USDT"], sim_tickers=",".join(f"{t}:1" for t in names(30)), book_depth=100,
        feeds=("trades", "orderbook_l2", "bbo"),
    ) as fleet:  # fmt: skip
        done = mdcollector("check", "-c", fleet.config, "--json")
        (planned,) = json.loads(done.stdout)["connectors"]
        before = fleet.sim.state()["counts"]["requests"]
        fleet.connector = fleet.connect()
        until(lambda: (page := fleet.stats()).get("books") == 30 and not page["books_invalid_count"], fleet.brief)
        state = fleet.sim.state()
        requests = state["counts"]["requests"] - before
        assert planned["streams"] == sum(len(conn["subscriptions"]) for conn in state["connections"]) == 90
        assert planned["messages"] == sum(conn["received"].get("text", 0) for conn in state["connections"])
        assert planned["weight"] == 30 * 5 + 20
        assert requests == 30 + 2, "one snapshot a book, and the list once to resolve and once to follow"


@pytest.mark.parametrize(
    ("connector", "told"),
    [
        ({"exchange": "deribit", "book_depth": 100}, "book_depth: 100 not offered by deribit"),
        (
            {"exchange": "deribit", "tickers": [f"T{n}_USDC-PERPETUAL" for n in range(17_000)], "feeds": ["trades"]},
            "68 connections to deribit at the same time (34 WebSocket, 34 HTTP); it allows 32",
        ),
        ({"exchange": "deribit", "feeds": ["liquidations"]}, "liquidations not offered"),
        (  # four fifths of 600 a minute are 8 a second; 150 candles each 15 s are 10, prices each 2 s on three connections
            {"exchange": "gmx", "tickers": [f"T{n}" for n in range(150)], "feeds": ["candles", "tickers"]},
            "requests a second to gmx, which is polled; 8 are allowed",
        ),
    ],
)
def test_what_cannot_fit_is_refused(tmp_path: Path, connector: dict[str, Any], told: str) -> None:
    done = check(tmp_path, {"conn": {"tickers": ["BTC-PERPETUAL"], **connector}}, "--offline")
    assert done.returncode == 78, done.stdout
    assert told in done.stderr
    assert "conn" in done.stderr


def deribit(count: int, **more: Any) -> dict[str, dict[str, Any]]:
    one = {"exchange": "deribit", "tickers": ["BTC-PERPETUAL"], "feeds": ["trades"], **more}
    return {f"d{number}": one for number in range(count)}


def test_connections_that_are_open_at_the_same_time_are_added_up_over_connectors(tmp_path: Path) -> None:
    """32, those of requests included, and each connector keeps one of each open."""
    (family,) = plan(tmp_path, deribit(16))["families"]
    assert family["connections"] == 16
    done = check(tmp_path, deribit(17), "--offline")
    assert done.returncode == 78, done.stdout
    assert "d0, d1, " in done.stderr
    assert "d16: 34 connections to deribit at the same time (17 WebSocket, 17 HTTP); it allows 32 to one" in done.stderr
    assert plan(tmp_path, {**deribit(16), "other": {"exchange": "okx", "tickers": ["BTC-USDT"], "feeds": ["trades"]}})


def test_a_key_has_its_own_limit(tmp_path: Path) -> None:
    """To spread such connectors over machines, as is the advice for an address, would not help."""
    for key in "ab":
        (tmp_path / key).write_text(f'client_id = "id-{key}"\nclient_secret = "secret"\n')
        (tmp_path / key).chmod(0o600)
    done = check(tmp_path, deribit(17, credentials_file="a"), "--offline")
    assert done.returncode == 78, done.stdout
    assert "17 connections to deribit with the same credentials; it allows 16" in done.stderr
    assert "id-a" not in done.stderr
    with_two = {**deribit(17, credentials_file="a"), "d16": deribit(1, credentials_file="b")["d0"]}
    assert "34 connections to deribit at the same time" in check(tmp_path, with_two, "--offline").stderr


def test_a_limit_of_open_connections_may_be_of_each_venue(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 of each category of Bybit, requests not counted."""
    monkeypatch.setattr(planning, "_messages", lambda *_: 1)

    def fleet(**connections: int) -> dict[str, tuple[ConnectorConfig, list[Planned]]]:
        return {
            name: (ConnectorConfig(exchange=name, tickers=["X"]), [Planned(name, name, [], [])] * count)
            for name, count in connections.items()
        }

    assert plan_fleet("file", fleet(bybit_spot=1000, bybit_linear=1000)).families[0].connections == 2000
    with pytest.raises(
        ConfigError, match="bybit_spot: 1001 connections to bybit_spot at the same time; it allows 1000"
    ):
        plan_fleet("file", fleet(bybit_spot=1001, bybit_linear=1))


def test_how_fast_connections_may_be_opened_costs_time_only(tmp_path: Path) -> None:
    """OKX takes three a second."""
    okx = {"exchange": "okx", "tickers": ["BTC-USDT"], "feeds": ["trades"]}
    (family,) = plan(tmp_path, {f"o{number}": okx for number in range(5)})["families"]
    assert family["connections"] == 5
    assert family["connects_s"] == pytest.approx((5 - 3 / 4) / (3 * 3 / 4))


def test_an_instrument_that_no_connection_carries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(intervals=BinanceSpot.INTERVALS)
    streams = len(BinanceSpot.streams_of("A", ["candles"], options))
    narrow = type("Narrow", (BinanceSpot,), {"fits": classmethod(lambda _, a, b: len(a) + len(b) < streams)})
    with pytest.raises(ConfigError, match=f"A: {streams} streams are more than a connection carries"):
        narrow.plan(["A"], ["candles"], options)
    assert len(narrow.plan(["A", "B"], ["trades"], options)) == 1


def test_the_plan_is_shown_and_nothing_is_connected_to(tmp_path: Path) -> None:
    with SimProcess("binance_spot", "--tickers", "3", "--rate", "1") as sim:
        connector = {"exchange": "binance_spot", "tickers": ["*"], "ws_url": sim.ws_url, "rest_url": sim.rest_url}
        done = check(tmp_path, {"conn": connector})
        assert done.returncode == 0, done.stderr
        assert sim.state()["counts"].get("connects", 0) == 0
    assert "conn: 9 streams of 3 tickers" in done.stdout
    assert "all live within" in done.stdout
    assert "good, 1 connections" in done.stdout
    assert not (tmp_path / "rings").exists()
