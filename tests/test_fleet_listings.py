"""Instruments over time: what is listed, halted, delisted or changed while connectors run. Real processes.

What the list really said is asked from the simulated exchange by plain HTTP and JSON, never from the code under test.
"""

import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, mdcollector, until

from mdcollector.assignment import Assignment
from mdcollector.emit import Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import InstrumentInfo, Options, Selection, Stream, venue_class
from mdcollector.exchanges.binance import BinanceSpot
from mdcollector.listing import Followed, Listing
from mdcollector.records import Exchange

LIST = {
    "binance_spot": "/api/v3/exchangeInfo",
    "binance_futures": "/fapi/v1/exchangeInfo",
    "bybit_inverse": "/v5/market/instruments-info?category=inverse",
    "bybit_linear": "/v5/market/instruments-info?category=linear",
    "bybit_option": "/v5/market/instruments-info?category=option&baseCoin=BTC",
    "bybit_spot": "/v5/market/instruments-info?category=spot",
    "coinbase": "/api/v3/brokerage/market/products?product_type=SPOT",
    "deribit": "/api/v2/public/get_instruments?currency=any&expired=false",
    "okx": "/api/v5/public/instruments?instType=SPOT",
}
FEEDS = ("trades", "orderbook_l2", "bbo")
# venue: pattern, listed from the start (the first one stays), listed later, not meant
NAMES = {
    "binance_spot": ("*USDT", ("BTCUSDT", "ETHUSDT"), "NEWUSDT", "NEWBTC"),
    "binance_futures": ("*USDT", ("BTCUSDT", "ETHUSDT"), "NEWUSDT", "NEWBTC"),
    "bybit_inverse": ("*USD", ("BTCUSD", "ETHUSD"), "NEWUSD", "NEWUSDZ26"),
    "bybit_linear": ("*USDT", ("BTCUSDT", "ETHUSDT"), "NEWUSDT", "NEWPERP"),
    "bybit_option": (  # all on one coin: one topic brings the trades of all of them
        "BTC-*-C-USDT",
        ("BTC-25DEC26-90000-C-USDT", "BTC-25DEC26-95000-C-USDT"),
        "BTC-25DEC26-99000-C-USDT",
        "BTC-25DEC26-90000-P-USDT",
    ),
    "bybit_spot": ("*USDT", ("BTCUSDT", "ETHUSDT"), "NEWUSDT", "NEWUSDC"),
    "coinbase": ("*-USD", ("BTC-USD", "ETH-USD"), "NEW-USD", "NEW-EUR"),
    "deribit": ("*-PERPETUAL", ("BTC-PERPETUAL", "ETH-PERPETUAL"), "NEW_USDC-PERPETUAL", "BTC-25DEC26"),
    "okx": ("*-USDT", ("BTC-USDT", "ETH-USDT"), "NEW-USDT", "NEW-BTC"),
}
EVERY_VENUE = pytest.mark.parametrize("exchange", NAMES)
Start = Callable[..., Fleet]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A fleet that follows the list; it is ended with the test."""
    with ExitStack() as stack:

        def make(exchange: str, **options: Any) -> Fleet:
            pattern, listed, _, _ = NAMES[exchange]
            sim_tickers = ",".join(f"{ticker}:1" for ticker in listed)
            every_s = {"deribit": 4.0, "okx": 3.0}.get(exchange, 0.5)  # the list costs more there
            feeds = [feed for feed in FEEDS if feed in venue_class(exchange).FEEDS]
            options = {
                "tickers": [pattern], "instruments_s": every_s, "feeds": feeds, "sim_tickers": sim_tickers, **options,
            }  # fmt: skip
            return stack.enter_context(Fleet(tmp_path / exchange, exchange, **options))

        yield make


def listed_by(fleet: Fleet) -> dict[str, dict[str, Any]]:
    """Active instruments in the exchange's own list: tick size, and whether it trades."""
    with urllib.request.urlopen(fleet.sim.rest_url + LIST[fleet.exchange], timeout=30) as response:
        body = json.load(response)
    if fleet.exchange == "deribit":
        rows = ((i["instrument_name"], i["is_active"], float(i["tick_size"])) for i in body["result"])
    elif fleet.exchange == "coinbase":
        rows = ((p["product_id"], p["status"] == "online", float(p["price_increment"])) for p in body["products"])
    elif fleet.exchange == "okx":
        rows = ((i["instId"], i["state"] == "live", float(i["tickSz"])) for i in body["data"])
    elif fleet.exchange.startswith("bybit_"):
        rows = (
            (i["symbol"], i["status"] == "Trading", float(i["priceFilter"]["tickSize"])) for i in body["result"]["list"]
        )
    else:
        rows = ((s["symbol"], s["status"] == "TRADING", float(s["filters"][0]["tickSize"])) for s in body["symbols"])
    return {ticker: {"active": active, "tick_size": tick_size} for ticker, active, tick_size in rows}


def tickers_of(fleet: Fleet, name: str = Fleet.NAME) -> set[str]:
    return {stream["ticker"] for stream in fleet.stats(name).get("streams", {}).values()}


def subscribed(fleet: Fleet) -> list[str]:
    """Streams that the exchange sends, of all connections."""
    return [name.upper() for conn in fleet.sim.state()["connections"] for name in conn["subscriptions"]]


def has_data(fleet: Fleet, ticker: str, name: str = Fleet.NAME) -> bool:
    """Every stream of an instrument was acknowledged and brought rows since it was asked for."""
    streams = [s for s in fleet.stats(name).get("streams", {}).values() if s["ticker"] == ticker]
    return bool(streams) and all(s["acknowledged_ns"] and s["data_ns"] > s["requested_ns"] for s in streams)


def follow(fleet: Fleet, fault: str, ticker: str, *, present: bool, **keys: Any) -> None:
    """Let something happen to an instrument and wait until the connector has followed."""
    fleet.sim.fault(fault, ticker=ticker, **keys)
    if present:
        until(lambda: has_data(fleet, ticker), lambda: f"{ticker} is recorded; {fleet.brief()}")
    else:
        until(lambda: ticker not in tickers_of(fleet), lambda: f"{ticker} is left; {fleet.brief()}")
        until(lambda: not [s for s in subscribed(fleet) if ticker in s], lambda: f"{subscribed(fleet)}")


@EVERY_VENUE
def test_the_list_is_followed_while_running(exchange: str, start: Start) -> None:
    """F14, F15. New is subscribed, gone is left and taken up again where it ended; every change is a row, once."""
    _, (stays, leaves), new, other = NAMES[exchange]
    fleet = start(exchange).start()
    first = listed_by(fleet)
    fleet.sim.fault("listing", ticker=other)
    follow(fleet, "listing", new, present=True)
    both = listed_by(fleet)
    until(lambda: fleet.published("instruments") == 3, lambda: f"one row an instrument; {fleet.brief()}")
    fleet.sim.fault("tick_size", ticker=stays)
    until(lambda: fleet.published("instruments") == 4, lambda: f"a row of the new tick size; {fleet.brief()}")
    follow(fleet, "delist", leaves, present=False)
    assert leaves not in listed_by(fleet)
    follow(fleet, "listing", leaves, present=True)
    follow(fleet, "delist", new, present=False, mode="halted")
    assert not listed_by(fleet)[new]["active"]
    follow(fleet, "listing", new, present=True)
    assert not [name for name in subscribed(fleet) if other in name], "it is listed, but not meant"
    finer = listed_by(fleet)[stays]
    proof = fleet.finish()
    assert proof.ok, str(proof)
    told: dict[str, list[dict[str, Any]]] = {}
    for row in fleet.rows("instruments"):
        told.setdefault(row["ticker"], []).append({"active": row["active"], "tick_size": row["tick_size"]})
    gone = {"active": False}
    assert told == {
        stays: [first[stays], finer],
        leaves: [first[leaves], first[leaves] | gone, first[leaves]],
        new: [both[new], both[new] | gone, both[new]],
    }
    assert first[stays]["tick_size"] > finer["tick_size"]


def test_options_of_every_coin_are_found(start: Start) -> None:
    """Bybit lists options one coin at a time; which coins those are is asked first, also while running."""
    btc, xrp, hype = "BTC-25DEC26-90000-C-USDT", "XRP-25DEC26-3-C-USDT", "HYPE-25DEC26-40-C-USDT"
    fleet = start("bybit_option", tickers=["*-C-USDT"], sim_tickers=f"{btc}:1,{xrp}:1").start()
    until(lambda: has_data(fleet, btc) and has_data(fleet, xrp), lambda: f"both coins; {fleet.brief()}")
    follow(fleet, "listing", hype, present=True)
    assert tickers_of(fleet) == {btc, xrp, hype}
    proof = fleet.finish()
    assert proof.ok, str(proof)


def test_the_coins_that_have_options() -> None:
    """Pages come of those that have any now; an answer is read by what is in it."""
    kind = venue_class("bybit_option")
    rows = [
        {"baseCoin": coin, "hasSymbol": has, "underlyingType": 0}
        for coin, has in (("BTC", 1), ("SOON", 0), ("NVDA", 1), ("BTC", 1))
    ]
    body = json.dumps({"retCode": 0, "retMsg": "success", "result": {"list": rows}}).encode()
    (first,) = kind.instruments_paths()
    assert kind.instruments(body) == []
    of_coin = "/v5/market/instruments-info?category=option&limit=1000&baseCoin="
    assert kind.pages_behind(first, body) == [f"{of_coin}BTC", f"{of_coin}NVDA"]
    listed = {"symbol": "NVDA-25DEC26-200-C-USDT", "status": "Trading", "baseCoin": "NVDA", "quoteCoin": "USDT"}
    result = {"category": "option", "list": [listed], "nextPageCursor": "a%2Cb"}
    body = json.dumps({"retCode": 0, "retMsg": "OK", "result": result}).encode()
    assert [info.ticker for info in kind.instruments(body)] == [listed["symbol"]]
    assert kind.pages_behind(f"{of_coin}NVDA", body) == [f"{of_coin}NVDA&cursor=a%2Cb"]
    with pytest.raises(FrameError, match="10001"):
        kind.pages_behind(first, b'{"retCode":10001,"retMsg":"no","result":{}}')


@EVERY_VENUE
def test_what_is_known_is_not_told_again_after_a_restart(exchange: str, start: Start) -> None:
    fleet = start(exchange).start()
    until(lambda: fleet.published("instruments") == 2, lambda: f"a row an instrument; {fleet.brief()}")
    fleet.stop(fleet.connector)
    fleet.sim.fault("tick_size", ticker=NAMES[exchange][1][1])
    fleet.connector = fleet.connect()
    fleet.wait_live()
    until(lambda: fleet.published("instruments") == 3, lambda: f"the new tick size; {fleet.brief()}")
    asked = fleet.sim.state()["paths"][LIST[exchange].partition("?")[0]]
    until(lambda: fleet.sim.state()["paths"][LIST[exchange].partition("?")[0]] > asked + 2, "two more lists")
    assert fleet.published("instruments") == 3
    proof = fleet.finish()
    assert proof.ok, str(proof)


def test_a_new_instrument_goes_to_one_of_several_connections_and_stays_there(start: Start) -> None:
    """Two connections of one plan: the last one takes what is new, also when it begins anew with the same plan."""
    fleet = start("binance_spot", feeds=("trades", "bbo"), sim_tickers="201", rate=0.5)
    tickers = sorted(fleet.sim.tickers)
    plan = fleet.directory / "plan.json"
    plan.write_text(json.dumps(tickers))

    def run(name: str) -> Any:
        return fleet.spawn("connect", name, "-c", fleet.config, "--resolved", plan)

    processes = [run("conn.1"), run("conn.2")]
    until(lambda: tickers_of(fleet, "conn.1") == set(tickers[:200]), fleet.tail)
    until(lambda: tickers_of(fleet, "conn.2") == {tickers[200]}, fleet.tail)
    fleet.sim.fault("listing", ticker="NEWUSDT")
    until(lambda: tickers_of(fleet, "conn.2") == {tickers[200], "NEWUSDT"}, fleet.tail)
    until(lambda: fleet.stats("conn.2")["streams"]["newusdt@trade"]["acknowledged_ns"], fleet.tail)
    fleet.stop(processes[1])
    processes[1] = run("conn.2")
    until(lambda: fleet.stats("conn.2")["pid"] == processes[1].pid, fleet.tail)
    until(lambda: tickers_of(fleet, "conn.2") == {tickers[200], "NEWUSDT"}, fleet.tail)
    assert tickers_of(fleet, "conn.1") == set(tickers[:200])
    until(lambda: len(subscribed(fleet)) == 2 * 202, lambda: f"{len(subscribed(fleet))} streams")
    assert len(set(subscribed(fleet))) == 2 * 202, "no stream is sent twice"
    assert fleet.published("instruments", "conn.1") == 200
    assert fleet.published("instruments", "conn.2") == 2


# The list without a process: pages, what is no list, no room


class Paged(BinanceSpot):
    """A venue whose list has pages: the path names the page, the body says which one comes next."""

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        return ("/a", "/b")

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        return [InstrumentInfo(**info) for info in json.loads(body)["listed"]]

    @classmethod
    def pages_behind(cls, path: str, body: bytes) -> list[str]:
        return [found] if (found := json.loads(body)["next"]) else []


def body_of(*tickers: str, then: str | None = None, active: bool = True) -> bytes:
    return json.dumps({"listed": [{"ticker": t, "active": active} for t in tickers], "next": then}).encode()


def trades_of(ticker: str) -> Stream:
    """As the venue plans it: what is new goes only to a connection of the same path."""
    (stream,) = Paged.streams_of(ticker, ["trades"], Options())
    return stream


class Connection:
    """A connection with the streams of A and B, that follows `*` on a list which the test answers.

    `siblings`: the instruments of a second connection, by the file in which both stand.
    """

    def __init__(self, folder: Path, streams: list[Stream], siblings: tuple[str, ...] = ()) -> None:
        self.emit = Emit(folder, "c", Exchange.BINANCE_SPOT, ["trades"], semaphore=False)
        self.venue = Paged(self.emit, Options(), streams)
        self.assignment = assignment = Assignment(folder, "c", Paged, ["trades"], Options())
        assignment.plan([stream.ticker for stream in streams])
        if siblings:
            file = json.loads(assignment.path.read_text())
            file["connections"] += [{**file["connections"][0], "tickers": siblings}]
            assignment.path.write_text(json.dumps(file))
        followed = Followed(Selection(("*",)), assignment, 0)
        self.listing = Listing(self.venue, 1e-9, followed, lambda: False)
        self.emit.packet(1_796_083_200_000_000_000, 0)

    def begin(self) -> dict[str, Any]:
        """Requests of a new list by path."""
        self.listing.tick()
        return self.wanted()

    def wanted(self) -> dict[str, Any]:
        found = {want.path: want for want in self.venue.wants}
        self.venue.wants.clear()
        return found

    def answer(self, **bodies: bytes) -> dict[str, Any]:
        wants = self.begin()
        for page, body in bodies.items():
            wants.pop(f"/{page}").answer(body)
            wants |= self.wanted()
        return wants

    @property
    def tickers(self) -> list[str]:
        return [stream.ticker for stream in self.venue.streams]

    def rows(self) -> list[tuple[str, bool]]:
        ring = self.emit.rings["instruments"]
        return [(ring.tickers[row["ticker"]], bool(row["active"])) for row in ring.recent_rows(0)]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Connection]:
    made = Connection(tmp_path, [trades_of("A"), trades_of("B")], ("SIBLING",))
    yield made
    made.emit.close()


def test_all_pages_make_one_list(two: Connection) -> None:
    assert not two.answer(a=body_of("A", then="/a2"), b=body_of("NEW"), a2=body_of("B", "SIBLING"))
    assert two.tickers == ["A", "B", "NEW"]
    assert two.rows() == [("A", True), ("B", True), ("NEW", True)]
    assert two.emit.counters == {"instruments_taken": 1}


def test_half_a_list_closes_nothing(two: Connection) -> None:
    two.answer(a=body_of("A", then="/a2"), b=body_of("NEW"))
    wants = two.begin()
    assert not wants, "the list that is under way goes on"
    assert two.tickers == ["A", "B"]


def test_a_page_that_is_refused_ends_the_list_and_is_counted(two: Connection) -> None:
    wants = two.answer(a=body_of("A", then="/a2"))
    wants["/b"].failed(403, b"not you")
    wants["/a2"].answer(body_of("NEW"))
    assert two.tickers == ["A", "B"]
    assert two.emit.counters["instruments_refused"] == 1
    assert "not you" in two.venue.notes["list of instruments"]
    assert not two.answer(a=body_of("A", "B"), b=body_of("NEW"))
    assert two.tickers == ["A", "B", "NEW"]
    assert not two.venue.notes


def test_an_empty_list_closes_nothing(two: Connection) -> None:
    two.answer(a=body_of(), b=body_of())
    assert two.tickers == ["A", "B"]
    assert two.emit.counters["instruments_refused"] == 1


def test_a_list_without_end_is_given_up(two: Connection) -> None:
    wants = two.begin()
    page = wants.pop("/a")
    wants.pop("/b").answer(body_of("A", "B"))
    asked = 1
    while page is not None:
        page.answer(body_of(f"X{asked}", then=f"/a{asked}"))
        page, asked = next(iter(two.wanted().values()), None), asked + 1
        assert asked < 1000
    assert asked == 100  # and the other list
    assert two.emit.counters["instruments_refused"] == 1
    assert two.tickers == ["A", "B"]


def test_what_a_sibling_has_is_not_taken(two: Connection) -> None:
    two.answer(a=body_of("A", "B"), b=body_of("SIBLING"))
    assert two.tickers == ["A", "B"]


def test_a_stream_that_serves_several_instruments_stays_for_the_others(tmp_path: Path) -> None:
    shared = Connection(tmp_path, [Stream("all@trade", "trades", ticker) for ticker in ("A", "B")])
    venue = shared.venue
    venue.remove({"A"}, connected=True)
    assert not venue.wants, "nothing is left: the stream brings B too"
    venue.admit("B")
    with pytest.raises(FrameError):
        venue.admit("A")
    venue.add([Stream("all@trade", "trades", "A")], connected=True)
    assert not venue.wants, "nothing is asked for twice"
    venue.admit("A")
    venue.remove({"A", "B"}, connected=True)
    (want,) = venue.wants
    assert json.loads(want.text) == {"method": "UNSUBSCRIBE", "params": ["all@trade"], "id": 1}
    shared.emit.close()


def test_without_room_it_is_counted_once_and_told(tmp_path: Path) -> None:
    most = BinanceSpot.LIMITS.streams_per_connection
    full = Connection(tmp_path, [trades_of(f"T{i}") for i in range(most)])
    body = body_of("NEW", *(f"T{i}" for i in range(most)))
    for _ in range(2):
        full.answer(a=body, b=body_of("NEW"))
    assert len(full.tickers) == most
    assert full.emit.counters["listing_no_room"] == 1
    assert full.assignment.remembered().homeless == ["NEW"]
    full.answer(a=body_of("NEW", *(f"T{i}" for i in range(1, most))), b=body_of("NEW"))
    assert "T0" not in full.tickers
    assert "NEW" in full.tickers, "a place is free"
    assert full.assignment.remembered().homeless == []
    full.emit.close()


# What the configuration means


LISTED = [
    InstrumentInfo("BTC-PERPETUAL", True, "perpetual", "BTC", "USD"),
    InstrumentInfo("ETH-PERPETUAL", True, "perpetual", "ETH", "USD"),
    InstrumentInfo("ETH_USDC-PERPETUAL", True, "perpetual", "ETH", "USDC"),
    InstrumentInfo("ETH-25DEC26-4000-C", True, "option", "ETH", "ETH"),
    InstrumentInfo("OLD-PERPETUAL", False, "perpetual", "OLD", "USD", "closed"),
]


@pytest.mark.parametrize(
    ("selection", "tickers"),
    [
        (Selection(("*",)), ["BTC-PERPETUAL", "ETH-25DEC26-4000-C", "ETH-PERPETUAL", "ETH_USDC-PERPETUAL"]),
        (Selection(("eth*", "!*-C")), ["ETH-PERPETUAL", "ETH_USDC-PERPETUAL"]),
        (Selection(("*",), kinds=("option",)), ["ETH-25DEC26-4000-C"]),
        (Selection(("*",), bases=("eth",), quotes=("USD", "USDC")), ["ETH-PERPETUAL", "ETH_USDC-PERPETUAL"]),
        (Selection(("BTC-PERPETUAL", "*C"), kinds=("perpetual", "option")), ["BTC-PERPETUAL", "ETH-25DEC26-4000-C"]),
    ],
)
def test_patterns_and_filters_choose(selection: Selection, tickers: list[str]) -> None:
    selection.check(LISTED)
    assert selection.chosen(LISTED) == tickers


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["*", "--kinds", "perp"], "kinds: no active instrument has kind 'perp'; there are spot"),
        (["*", "--bases", "XYZ"], "bases: no active instrument has base 'XYZ'; there are BTC, ETH"),
        (["ETH*", "--bases", "BTC"], "'ETH*' names no active instrument of the venue (2 listed, 1 pass the filters)"),
        (["*", "!*USDT"], "what is excluded leaves nothing"),
        (["!ETH*"], "all exclude"),
    ],
)
def test_a_filter_that_fits_nothing_is_refused(arguments: list[str], told: str, start: Start, tmp_path: Path) -> None:
    sim = start("binance_spot").sim
    done = mdcollector(
        "run",
        "binance_spot",
        *arguments,
        "--target",
        tmp_path / "data",
        "--ws-url",
        sim.ws_url,
        "--rest-url",
        sim.rest_url,
    )
    assert done.returncode in (2, 78), done.stderr
    assert told in done.stderr


@pytest.mark.parametrize("exchange", ["binance_spot", "binance_futures"])
def test_another_request_weight_than_the_documents_have_is_told(exchange: str, start: Start) -> None:
    fleet = start(exchange, sim=("--limit", "weight_max=3000"))
    fleet.connect()
    told = "new request weight 3000 per 1 MINUTE, not "
    until(lambda: any(note.startswith(told) for note in fleet.stats().get("notes", ())), fleet.brief, 60)
    assert fleet.counter("protocol_drift") == 1
    assert told in mdcollector("status", "-c", fleet.config).stdout.replace("\n", " ")
