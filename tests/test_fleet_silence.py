"""F1: streams that are acknowledged and bring nothing, or are never acknowledged. Real processes, both venues.

What was silent is told apart from what is merely quiet by what the exchange's REST interface shows.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fleet import BOOK_STREAMS, TRADE_STREAMS, Fleet, mdcollector, until

from mdcollector.emit import Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import Fetch, Options, Reconnect, Send, Stream
from mdcollector.exchanges.binance import BinanceSpot
from mdcollector.exchanges.bybit import BybitOption
from mdcollector.exchanges.deribit import Deribit
from mdcollector.exchanges.okx import Okx
from mdcollector.records import Exchange
from mdcollector.subscriptions import Subscriptions
from tools.sim.process import SimProcess

FEEDS = ("trades", "orderbook_l2", "bbo")
QUOTE_STREAMS = {"binance_spot": "@bookTicker", "deribit": "quote."}
STREAMS = {"trades": TRADE_STREAMS, "orderbook_l2": BOOK_STREAMS, "bbo": QUOTE_STREAMS}
TICKERS = {"binance_spot": ("BTCUSDT", "ETHUSDT"), "deribit": ("BTC-PERPETUAL", "ETH-PERPETUAL")}
EVERY_VENUE = pytest.mark.parametrize("exchange", TICKERS)
Start = Callable[..., Fleet]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A fleet that is quick to look for silence; it is ended with the test."""
    with ExitStack() as stack:

        def make(exchange: str, **options: Any) -> Fleet:
            options = {"silent_s": 1.0, "tickers": TICKERS.get(exchange, ()), "feeds": FEEDS, **options}
            options.setdefault("sim_tickers", ",".join(f"{ticker}:1" for ticker in options["tickers"]))
            return stack.enter_context(Fleet(tmp_path / exchange, exchange, **options))

        yield make


def stream_of(fleet: Fleet, feed: str, ticker: str) -> dict[str, Any]:
    found: dict[str, Any] = next(
        s for s in fleet.stats()["streams"].values() if s["feed"] == feed and s["ticker"] == ticker
    )
    return found


@EVERY_VENUE
def test_silent_streams_are_taken_anew_and_nothing_else_is_touched(exchange: str, start: Start) -> None:
    """All streams of one instrument; the other one and the connection go on."""
    fleet, silent = start(exchange).start(), TICKERS[exchange][0]
    until(lambda: all(stream_of(fleet, feed, silent)["data_ns"] for feed in FEEDS), fleet.brief)
    for feed in FEEDS:
        fleet.sim.fault("silence", stream=STREAMS[feed][exchange], ticker=silent, until="left")
    fleet.wait_counter("stream_recovered", len(FEEDS))
    for feed in FEEDS:
        state = stream_of(fleet, feed, silent)
        assert state["requested_ns"] < state["acknowledged_ns"]
        assert state["requested_ns"] < state["first_data_ns"] <= state["data_ns"]
        assert not state["silent_ns"]
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert fleet.counter("connections") == 1, "the connection stays"
    assert fleet.counter("stream_silent") == fleet.counter("stream_recovered") == len(FEEDS)
    gaps = [(gap["feed"], gap["ticker"]) for gap in fleet.rows("gaps") if gap["cause"] == "silent"]
    assert set(gaps) == {(feed, silent) for feed in FEEDS}
    assert proof.feeds["trades"].repaired > 0, "trades are fetched, the others are lost"
    assert [proof.feeds[feed].explained > 0 for feed in FEEDS] == [False, True, True]


@EVERY_VENUE
def test_a_stream_that_stays_silent_costs_the_connection(exchange: str, start: Start) -> None:
    """Leaving and taking it anew does not help; on the next connection it delivers, and both overlap."""
    fleet = start(exchange).start()
    fleet.sim.fault("silence", stream=QUOTE_STREAMS[exchange], ticker=TICKERS[exchange][1], conn=1)
    fleet.wait_counter("rollovers")
    fleet.wait_counter("stream_recovered")
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert fleet.counter("connections") == 2
    assert [proof.feeds[feed].explained for feed in ("trades", "orderbook_l2")] == [0, 0]


@EVERY_VENUE
def test_a_quiet_instrument_is_left_alone(exchange: str, start: Start) -> None:
    busy, quiet = TICKERS[exchange]
    fleet = start(exchange, sim_tickers=f"{busy}:1,{quiet}:0.00001")
    fleet.connector = fleet.connect()
    until(lambda: fleet.counter("probes") >= 5, lambda: f"silent streams are checked; {fleet.brief()}")
    assert fleet.stats()["streams"]
    assert fleet.counter("stream_silent") == fleet.counter("stream_unacknowledged") == 0
    assert fleet.counter("connections") == 1
    assert not [s for s in fleet.stats()["streams"].values() if s["silent_ns"] or s["refused"]]


@EVERY_VENUE
def test_a_request_that_nobody_answers_is_made_again(exchange: str, start: Start) -> None:
    fleet = start(exchange, sim=("--fault", "ignore:count=1")).start()
    assert fleet.counter("stream_unacknowledged") == len(TICKERS[exchange]) * len(FEEDS)
    assert fleet.counter("connections") == 1
    proof = fleet.finish()
    assert proof.ok, str(proof)


def test_requests_that_are_never_answered_cost_the_connection(start: Start) -> None:
    fleet = start("binance_spot", silent_s=0.7, sim=("--fault", "ignore:rate=1,conn=1")).start()
    assert fleet.counter("stream_unacknowledged") >= 3 * len(TICKERS["binance_spot"]) * len(FEEDS)
    assert fleet.counter("connections") == 2
    proof = fleet.finish()
    assert proof.ok, str(proof)


def test_status_shows_what_is_not_well(start: Start) -> None:
    fleet = start("binance_spot").start()
    fleet.sim.fault("silence", stream="@bookTicker", ticker="ETHUSDT")
    fleet.wait_counter("stream_silent")
    until(lambda: stream_of(fleet, "bbo", "ETHUSDT")["silent_ns"], fleet.brief)
    found = mdcollector("status", "--rings", fleet.rings, "--json")
    report = json.loads(found.stdout)
    assert found.returncode == 1
    assert [p for p in report["problems"] if "ethusdt@bookTicker: silent for" in p]
    assert report["connectors"]["conn"]["streams"]["ethusdt@bookTicker"]["silent_ns"]
    text = mdcollector("status", "--rings", fleet.rings).stdout
    assert [line for line in text.splitlines() if "ethusdt@bookTicker" in line and "silent for" in line], text
    assert "5 of 6 well" in text


# Several streams bring rows of one feed and instrument: those that deliver do not hide the one that is silent

SILENT_S = 3.0  # the streams below bring something each second
SIBLINGS = [
    ("binance_futures", "tickers", "BTCUSDT", "btcusdt@markPrice@1s", "btcusdt@ticker"),
    ("binance_spot", "candles", "BTCUSDT", "btcusdt@kline_5m", "btcusdt@kline_1m"),
    ("okx", "candles", "BTC-USDT-SWAP", "candle5m:BTC-USDT-SWAP", "candle1m:BTC-USDT-SWAP"),
    ("okx", "tickers", "BTC-USDT-SWAP", "mark-price:BTC-USDT-SWAP", "tickers:BTC-USDT-SWAP"),
    ("okx", "tickers", "BTC-USDT-SWAP", "open-interest:BTC-USDT-SWAP", "tickers:BTC-USDT-SWAP"),
    ("okx", "tickers", "BTC-USDT-SWAP", "index-tickers:BTC-USDT", "mark-price:BTC-USDT-SWAP"),
]


def of_one_feed(start: Start, exchange: str, feed: str, ticker: str, silence: str) -> Fleet:
    """A fleet on an exchange that has a fault from the begin on."""
    options = {"feeds": (feed,), "tickers": (ticker,), "intervals": ["1m", "5m"], "silent_s": SILENT_S}
    return start(exchange, sim=("--fault", f"silence:at=0,{silence}"), **options).start()


@pytest.mark.parametrize(("exchange", "feed", "ticker", "silent", "sibling"), SIBLINGS)
def test_a_silent_stream_is_found_beside_others_of_its_feed(
    exchange: str, feed: str, ticker: str, silent: str, sibling: str, start: Start
) -> None:
    fleet = of_one_feed(start, exchange, feed, ticker, f"stream={silent},until=left")
    fleet.wait_counter("stream_recovered")
    until(lambda: not fleet.stats()["streams"][silent]["silent_ns"], fleet.brief)
    streams = fleet.stats()["streams"]
    assert streams[silent]["first_data_ns"] > streams[silent]["requested_ns"] > streams[sibling]["requested_ns"]
    assert streams[sibling]["first_data_ns"] < streams[silent]["requested_ns"], "only the silent one was taken anew"
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert fleet.counter("stream_silent") == fleet.counter("connections") == 1
    gaps = {(gap["feed"], gap["ticker"]) for gap in fleet.rows("gaps") if gap["cause"] == "silent"}
    assert gaps == {(feed, ticker)}


def test_status_tells_streams_of_one_feed_apart(start: Start) -> None:
    """One that stays silent on this connection has never brought anything; the other one has, a moment ago."""
    silent, sibling = "btcusdt@markPrice@1s", "btcusdt@ticker"
    fleet = of_one_feed(start, "binance_futures", "tickers", "BTCUSDT", f"stream={silent}")
    fleet.wait_counter("stream_silent")
    until(lambda: fleet.stats()["streams"][silent]["silent_ns"], fleet.brief)
    report = json.loads(mdcollector("status", "--rings", fleet.rings, "--json").stdout)
    streams = report["connectors"]["conn"]["streams"]
    assert (streams[silent]["first_data_ns"], streams[silent]["data_ns"]) == (0, 0)
    assert streams[sibling]["data_ns"] > streams[sibling]["first_data_ns"] > 0
    assert not streams[sibling]["silent_ns"]
    assert [p for p in report["problems"] if f"{silent}: silent for" in p]
    assert not [p for p in report["problems"] if sibling in p]
    assert "1 of 2 well, 1 without data yet" in mdcollector("status", "--rings", fleet.rings).stdout


# Without a process: what REST says is judged


class Watched:
    """One stream that was acknowledged and is silent, and a clock that the test sets."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.emit = Emit(folder, "c", Exchange.BINANCE_SPOT, ["trades", "bbo"], semaphore=False)
        self.stream = Stream("ab@bookTicker", "bbo", "AB")
        self.venue = BinanceSpot(self.emit, Options(), [self.stream])
        self.now_s = 1_796_083_200.0
        monkeypatch.setattr("mdcollector.subscriptions.time", self)
        self.state = self.venue.proof[self.stream.name]
        self.state.requested_ns, self.state.acknowledged_ns = self.time_ns(), self.time_ns() + 1
        self.may_ask = True
        self.watch = Subscriptions(self.venue, 60.0, lambda: self.may_ask)

    def time_ns(self) -> int:
        return int(self.now_s * 1e9)

    def pass_s(self, seconds: float) -> list[Any]:
        """What is wanted after so long."""
        self.now_s += seconds
        self.watch.tick()
        wants = list(self.venue.wants)
        self.venue.wants.clear()
        return wants

    def answer(self, fetch: Fetch, *ages_s: float) -> None:
        """The probe shows trades that are so old."""
        trades = [
            {"a": 1, "p": "1", "q": "1", "f": 1, "l": 1, "T": int((self.now_s - age) * 1e6), "m": True, "M": True}
            for age in ages_s
        ]
        assert fetch.answer is not None
        fetch.answer(json.dumps(trades).encode())


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    made = Watched(tmp_path, monkeypatch)
    yield made
    made.emit.close()


def test_only_after_the_silence_one_request_at_a_time(one: Watched) -> None:
    assert one.pass_s(59) == []
    (fetch,) = one.pass_s(2)
    assert fetch.path.startswith("/api/v3/aggTrades?symbol=AB")
    assert one.pass_s(1) == one.pass_s(100) == [], "one is under way"
    assert one.pass_s(61), "one without an answer is forgotten"


@pytest.mark.parametrize("ages_s", [(), (61.0,), (59.5,), (10_000.0,)])
def test_nothing_newer_is_no_silence_and_asked_ever_more_rarely(one: Watched, ages_s: tuple[float, ...]) -> None:
    waits, waited = [], 0.0
    for _ in range(400):
        waited += 10
        if wants := one.pass_s(10):
            waits.append(waited)
            waited = 0.0
            one.answer(wants[0], *(age + one.now_s - 1_796_083_261 for age in ages_s))
    assert one.emit.counters["stream_silent"] == 0
    assert waits[:3] == sorted(waits[:3])
    assert max(waits) > 2 * waits[0]
    assert max(waits) < 20 * 60, "but never given up"


def test_what_is_very_young_may_still_come(one: Watched) -> None:
    (fetch,) = one.pass_s(61)
    one.answer(fetch, 0.1)
    one.pass_s(1)
    assert one.emit.counters["stream_silent"] == 0
    one.emit.packet(one.time_ns(), 0)
    one.emit.bbo(one.emit.instrument("AB"), 0, 1.0, 1.0, 2.0, 1.0)
    one.emit.activity["bbo"] = one.emit.activity["bbo"].copy()
    one.emit.tick()
    one.emit.activity["bbo"][:] = one.time_ns()
    one.pass_s(5)
    assert one.emit.counters["stream_silent"] == 0
    assert not one.state.silent_ns


def test_what_was_sent_late_is_not_asked_for_again_before_its_answer_can_come(one: Watched) -> None:
    one.state.acknowledged_ns, one.may_ask = 0, False
    assert [want for _ in range(20) for want in one.pass_s(1)] == [], "it still waits to be sent"
    one.may_ask = True
    assert one.pass_s(1) == [], "it was sent a moment ago"
    (want,) = one.pass_s(15)
    assert json.loads(want.text)["method"] == "SUBSCRIBE"


def test_silent_is_left_and_taken_anew_then_the_connection_goes(one: Watched) -> None:
    (fetch,) = one.pass_s(61)
    one.answer(fetch, 5.0)
    texts = [json.loads(want.text)["method"] for want in one.pass_s(4)]
    assert texts == ["UNSUBSCRIBE", "SUBSCRIBE"]
    assert one.emit.counters["stream_silent"] == 1
    one.state.acknowledged_ns = one.time_ns() + 1
    one.pass_s(1)
    (fetch,) = one.pass_s(61)
    one.answer(fetch, 5.0)
    (want,) = one.pass_s(4)
    assert isinstance(want, Reconnect)
    assert want.overlap
    one.pass_s(1)
    gaps = one.emit.rings["gaps"].recent_rows(0)
    assert [(row["feed"], row["cause"]) for row in gaps] == [(b"bbo", b"silent")] * 2
    assert int(gaps["to_time"][0]) < int(gaps["to_time"][1]), "told at once, and again while it lasts"


def test_a_clock_that_is_ahead_makes_nothing_newer(one: Watched) -> None:
    """The exchange's clock is 100 s ahead, as the trades show: what REST calls new is older than the last data."""
    now_us = int(one.now_s * 1e6)
    one.emit.packet(one.time_ns(), 0)
    one.emit.trade(one.emit.instrument("AB"), now_us + 100_000_000, 1, 1.0, 1.0, 1)
    (fetch,) = one.pass_s(61)
    one.answer(fetch, 61 - 100 + 1)
    one.pass_s(4)
    assert one.emit.counters["stream_silent"] == 0


def test_a_topic_of_several_instruments_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One topic brings the trades of all options of a coin: five of them ask once, and what is silent misses trades of all."""
    tickers = [f"BTC-25DEC26-{strike}-C" for strike in range(5)]
    streams = [s for ticker in tickers for s in BybitOption.streams_of(ticker, ["trades"], Options())]
    emit = Emit(tmp_path, "c", Exchange.BYBIT_OPTION, ["trades"], semaphore=False)
    venue, now_ns = BybitOption(emit, Options(), streams), time.time_ns()
    monkeypatch.setattr("mdcollector.subscriptions.time.time_ns", lambda: now_ns)
    state = venue.proof["publicTrade.BTC"]
    state.requested_ns = now_ns
    watch = Subscriptions(venue, 60.0, lambda: True)
    for times in range(1, 4):
        now_ns += 16_000_000_000
        watch.tick()
        (want,) = venue.wants
        venue.wants.clear()
        assert isinstance(want, Send)
        assert json.loads(want.text)["args"] == ["publicTrade.BTC"]
        assert emit.counters["stream_unacknowledged"] == state.asked == times

    state.acknowledged_ns = now_ns + 1
    for ticker in tickers:
        venue.trades_by_id(ticker).publish([(-1, now_ns // 1000, 1, 1.0, 1.0, ticker.encode())])
    state.suspected_at_ns, state.suspect_ns = now_ns, now_ns + 1
    now_ns += 61_000_000_000
    watch.tick()
    assert emit.counters["stream_silent"] == 1
    assert all(venue.trades_by_id(ticker).unproven for ticker in tickers)
    emit.close()


def test_an_answer_that_makes_no_sense_is_refused_and_one_that_is_refused_is_counted(one: Watched) -> None:
    (fetch,) = one.pass_s(61)
    assert fetch.answer is not None
    with pytest.raises((FrameError, ValueError)):
        fetch.answer(b'[{"a":1}]')
    assert fetch.failed is not None
    fetch.failed(400, b"unknown symbol")
    assert one.emit.counters["probe_refused"] == 1
    assert "unknown symbol" in one.emit.samples["probe_refused"]
    assert one.emit.counters["stream_silent"] == 0


def test_a_block_trade_on_deribit_proves_no_silence_of_the_best_prices(tmp_path: Path) -> None:
    emit = Emit(tmp_path, "c", Exchange.DERIBIT, ["trades"], semaphore=False)
    streams = {feed: Stream(feed, feed, "AB") for feed in ("trades", "bbo", "orderbook_l2", "candles")}
    venue = Deribit(emit, Options(), list(streams.values()))
    trades = [{"timestamp": 5000, "block_trade_id": "B-1", "price": 1.0}, {"timestamp": 3000}, {"timestamp": 2000}]
    body = json.dumps({"result": {"trades": trades, "has_more": True}}).encode()
    assert [venue.newest_us(streams[feed], body) for feed in ("trades", "bbo", "candles")] == [
        5_000_000, 3_000_000, 3_000_000,
    ]  # fmt: skip
    assert venue.newest_us(streams["bbo"], b'{"result":{"trades":[]}}') == 0
    body = b'{"result":{"timestamp":7,"change_id":9,"bids":[]}}'
    assert venue.newest_us(streams["orderbook_l2"], body) == 7000
    book = venue.book("AB", lambda *_: "next")
    assert venue.newest_us(streams["orderbook_l2"], body) == 7000, "the book knows nothing"
    book.last_id = 9
    assert venue.newest_us(streams["orderbook_l2"], body) == 0, "the book has that change"
    assert "get_order_book?instrument_name=AB" in venue.probe(streams["orderbook_l2"]).path
    emit.close()


@pytest.mark.parametrize(
    ("channel", "field", "late_s"),
    [("open-interest", "oi", 0), ("mark-price", "markPx", 0), ("index-tickers", "idxPx", 0), ("funding-rate", "fundingRate", 90)],
)  # fmt: skip
def test_a_mark_of_okx_that_did_not_change_is_nothing_new(
    channel: str, field: str, late_s: int, tmp_path: Path
) -> None:
    """The time in REST's answer is that of the answer, so that only another number is something that did not come."""
    emit, now_ms = Emit(tmp_path, "c", Exchange.OKX, ["tickers"], semaphore=False), 1_796_083_200_000
    streams = {stream.name: stream for stream in Okx.streams_of("BTC-USD-SWAP", ["tickers"], Options())}
    of = "BTC-USD" if channel == "index-tickers" else "BTC-USD-SWAP"
    venue, stream = Okx(emit, Options(), list(streams.values())), streams[f"{channel}:{of}"]

    def newest_us(number: str) -> int:
        said = {"instId": of, field: number, "ts": str(now_ms)}
        return venue.newest_us(stream, json.dumps({"code": "0", "msg": "", "data": [said]}).encode())

    new_us = (now_ms - late_s * 1000) * 1000
    assert newest_us("5.0") == new_us, "nothing came at all"
    emit.packet(now_ms * 1_000_000, 0)
    data = f'[{{"instId":"{of}","{field}":"5.0","ts":"{now_ms}"}}]'
    venue.decode(f'{{"arg":{{"channel":"{channel}","instId":"{of}"}},"data":{data}}}'.encode())
    assert venue.last_data_ns(stream) == now_ms * 1_000_000
    assert [s.name for s in venue.streams if venue.last_data_ns(s)] == [stream.name], "and no other one brought it"
    assert newest_us("5.00") == 0
    assert newest_us("5.1") == new_us
    emit.close()


# Budgets that the connectors of one family share

DELIVERY_S = 1.0  # a message may come so much later than it was sent; without sharing it would be 18 in the rest

CLIENT = """
import sys
from pathlib import Path
import msgspec
from mdcollector import connector
from mdcollector.config import ConnectorConfig
from mdcollector.exchanges import Options, binance
binance.SUBSCRIBE_CHUNK = 1
venue = binance.BinanceSpot
venue.FAMILY = "shared"
venue.LIMITS = msgspec.structs.replace(venue.LIMITS, messages_per_s=100, messages_per_ip=({allowed}, {per_s}))
name, rings, ws_url, rest_url, *tickers = sys.argv[1:]
settings = ConnectorConfig(
    exchange="binance_spot", tickers=tickers, feeds=["trades"], ws_url=ws_url, rest_url=rest_url, instruments_s=0
)
streams = [s for t in tickers for s in venue.streams_of(t, ["trades"], Options())]
connector.run_connector(name, settings, Path(rings), streams, connector=name, number=0)
"""


def test_connectors_of_a_family_share_the_messages_of_one_address(tmp_path: Path) -> None:
    """Two processes with 12 subscriptions each, one in a message; 12 messages in 3 s are allowed to both together."""
    allowed, per_s, tickers = 12, 3.0, 12
    limits = ("--limit", "messages_per_s=1000", "--limit", "ping_every_s=600")
    with SimProcess("binance_spot", "--rate", "1", "--tickers", str(2 * tickers), *limits) as sim:
        script, processes = tmp_path / "client.py", []
        script.write_text(CLIENT.format(allowed=allowed, per_s=per_s))
        try:
            for number in range(2):
                mine = sim.tickers[number * tickers : (number + 1) * tickers]
                command = [sys.executable, script, f"c{number}", tmp_path / "rings", sim.ws_url, sim.rest_url, *mine]
                processes.append(subprocess.Popen(command))
            looks: list[tuple[float, int, float]] = []  # before, messages, after

            def is_done() -> bool:
                before = time.monotonic()
                state = sim.state()
                looks.append((before, state["counts"].get("client_messages", 0), time.monotonic()))
                return sum(len(conn["subscriptions"]) for conn in state["connections"]) == 2 * tickers

            until(is_done, lambda: f"everything subscribed: {looks[-1]}", 120)
            assert [process.poll() for process in processes] == [None, None]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for i, (begin, count, _) in enumerate(looks):
        within = [later for _, later, end in looks[i:] if end - begin <= per_s - DELIVERY_S]
        assert max(within, default=count) - count <= allowed
    assert looks[-1][1] == 2 * tickers
