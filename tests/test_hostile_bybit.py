"""Bybit's decoder against frames that no venue should send; the tools are those of test_decode_hostile."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded import DATA, entries, needs_data
from test_decode_hostile import DEEP, MS, SHAPES, UNUSABLE, Probe, mutated

from mdcollector import continuity, exchanges
from mdcollector.exchanges import Fetch, Send

FOLDER = DATA / "bybit"
Make = Callable[..., Probe]
OWN_SHAPES: dict[str, bytes] = {
    "nested on the routed way": b'{"topic":"publicTrade.AB","data":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "nested in a name that is skipped": b'{"topic":"publicTrade.AB","x":'
    + b'{"x":' * DEEP
    + b"1"
    + b"}" * DEEP
    + b',"data":[]}',
    "invalid utf-8 topic": b'{"topic":"tickers.\xff","data":{}}',
    "a topic of nothing": b'{"topic":"orderbook..","data":{}}',
    "a number for a topic": b'{"topic":5,"data":{}}',
    "a depth of 4300 digits": b'{"topic":"orderbook.' + b"9" * 4300 + b'.AB","type":"delta","ts":1,"data":{}}',
    "a depth in other digits": '{"topic":"orderbook.\u00b2.AB","type":"delta","ts":1,"data":{}}'.encode(),
    "a reply nobody waits for": b'{"success":true,"req_id":"77","op":"subscribe"}',
    "half": b'{"topic":"orderbook.200.AB","type":"delta","ts":1,"data":{"s":"AB","b":[["1",',
}


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Make]:
    made: list[Probe] = []

    def make(venue: str, *tickers: str) -> Probe:
        made.append(Probe(venue, tmp_path / str(len(made)), tickers))
        return made[-1]

    yield make
    for one in made:
        one.emit.close()


def trade(*ids: str, ticker: str = "AB", **changed: Any) -> dict[str, Any]:
    rows = [{"T": MS, "s": ticker, "S": "Buy", "v": "2", "p": "10.5", "i": i, "BT": False, **changed} for i in ids]
    return {"topic": f"publicTrade.{ticker}", "type": "snapshot", "ts": MS, "data": rows}


def book(u: int, kind: str, bids: Any = (), asks: Any = (), *, ticker: str = "AB", depth: int = 200) -> dict[str, Any]:
    data = {"s": ticker, "b": bids, "a": asks, "u": u, "seq": u}
    return {"topic": f"orderbook.{depth}.{ticker}", "type": kind, "ts": MS, "data": data, "cts": MS}


def ticker(kind: str, cs: int, **data: Any) -> dict[str, Any]:
    return {"topic": "tickers.AB", "type": kind, "data": {"symbol": "AB", **data}, "cs": cs, "ts": MS}


def ids(one: Probe, name: str = "AB") -> list[str]:
    rows = one.rows("trades")
    return [r.decode() for r in rows["trade_id"][rows["ticker"] == one.emit.instrument(name).trades].tolist()]


@needs_data
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("category", ["spot", "linear", "option"])
def test_mutated_frames(category: str, seed: int, probe: Make) -> None:
    frames = [
        json.dumps(json.loads(p.read_bytes()), separators=(",", ":")) for p in sorted((FOLDER / "samples").iterdir())
    ]
    recorded = [
        line["raw"] for line in entries(FOLDER / "recorded" / "linear_20260809.jsonl.zst") if line["dir"] == "in"
    ]
    frames = [f for f in frames if len(f) < 3000] + [f for f in recorded if len(f) < 3000][:150]
    rng, one = random.Random(seed), probe(f"bybit_{category}")
    calm, truth = "CALM-1-2-C", {}
    assert one.feed(book(1, "snapshot", ticker=calm))
    for i in range(1, 3001):
        one.feed(mutated(rng.choice(frames), rng))
        if i % 10:
            continue
        # An instrument whose own frames are whole: it must not feel what happens to the others.
        n, price, qty = i // 10, rng.randrange(1, 9), rng.randrange(0, 4)
        truth[float(price)] = float(qty)
        assert one.feed(trade(f"id{n}", ticker=calm))
        assert one.feed(book(n + 1, "delta", [[str(price), str(qty)]], ticker=calm))
        one.venue.wants.clear()
    for _ in one.venue.finish():
        pass
    assert one.refused > 800, "the mutations do not bite"
    assert sum(ring.next for ring in one.emit.rings.values()) > 900, "nothing at all gets through"
    assert ids(one, calm) == [f"id{n}" for n in range(1, 301)]
    assert one.venue.books[calm].book() == ({price: qty for price, qty in truth.items() if qty}, {})
    one.sane()


@needs_data
@pytest.mark.parametrize("seed", range(3))
def test_mutated_bodies(seed: int, probe: Make) -> None:
    body = json.dumps(json.loads((FOLDER / "rest" / "doc_recent_trade.json").read_bytes()), separators=(",", ":"))
    rng, one = random.Random(seed), probe("bybit_spot")
    for n in range(1500):
        assert one.feed(trade(f"id{n}", ticker="BTCUSDT"))
        one.venue.disconnected("reconnect")
        raw = mutated(body, rng)
        try:
            one.venue.http("https://x/v5/market/recent-trade?category=spot&symbol=BTCUSDT", raw)
        except UNUSABLE as error:
            one.emit.refused_error(error, raw)
            one.refused += 1
    assert one.refused > 300
    one.sane()


@pytest.mark.parametrize("shape", {**SHAPES, **OWN_SHAPES})
def test_awkward_shapes_are_refused(shape: str, probe: Make) -> None:
    one = probe("bybit_linear", "AB")
    assert one.feed(trade("a"))
    assert not one.feed({**SHAPES, **OWN_SHAPES}[shape])
    assert one.feed(trade("b"))
    assert ids(one) == ["a", "b"]
    one.sane()


@pytest.mark.parametrize("changed", [{"p": "1e15"}, {"p": "-1e15"}, {"p": "inf"}, {"p": "nan"}, {"v": "-0.1"}, {"v": "nan"},
                                     {"v": "1e18"}, {"T": 0}, {"T": 4_102_444_800_000}, {"S": "buy"}, {"S": None},
                                     {"i": ""}, {"i": "x" * 57}, {"i": 5}, {"s": "CD"}, {"p": None}])  # fmt: skip
def test_one_impossible_trade_refuses_its_message_and_asks_for_it(changed: dict[str, Any], probe: Make) -> None:
    """Half of a refused frame is not applied, and what was in it is a hole that is asked about."""
    one = probe("bybit_linear", "AB")
    for proof in one.venue.proof.values():
        proof.acknowledged_ns = 1
    assert one.feed(trade("a"))
    message = trade("b", "c", "d")
    message["data"][1].update(changed)
    assert not one.feed(message)
    assert one.feed(trade("e"))
    assert ids(one) == ["a", "e"]
    assert [(feed, cause, repaired) for feed, _, _, cause, repaired in one.gaps()] == [("trades", "refused", False)]
    wanted = {(w.key, w.path.partition("?")[2]) for w in one.venue.wants if isinstance(w, Fetch)}
    query = "category=linear&symbol=AB&limit=1000"  # at once, and again when the next trade has come
    assert wanted == {("trades AB 1", query), ("trades AB 2", query)}
    one.sane()


@pytest.mark.parametrize("level", [["1e15", "1"], ["nan", "1"], ["inf", "1"], ["1", "inf"], ["1", "1e18"], ["-1e16", "1"], ["1", "-1"],
                                   ["1"], ["1", "1", "1"], [[], "1"], ["", "1"]])  # fmt: skip
def test_an_impossible_level_refuses_its_message_and_the_book_heals(level: list[Any], probe: Make) -> None:
    one = probe("bybit_linear", "AB")
    assert one.feed(book(10, "snapshot", [["1", "1"]], [["3", "1"]]))
    assert not one.feed(book(11, "delta", [["2", "2"], level]))
    assert one.venue.books["AB"].book() == ({1.0: 1.0}, {3.0: 1.0})
    assert one.feed(book(12, "delta", [["1.5", "2"]]))
    assert one.venue.books["AB"].state == continuity.BROKEN
    assert one.gaps() == [("orderbook_l2", 11, 11, "sequence", False)]
    assert one.feed(book(12, "snapshot", [["1", "1"], ["1.5", "2"]], [["3", "1"]]))
    assert one.feed(book(13, "delta", [["1.5", "0"]]))
    assert one.venue.books["AB"].book() == ({1.0: 1.0}, {3.0: 1.0})
    one.sane()


@pytest.mark.parametrize("bad", [{"lastPrice": "nan"}, {"lastPrice": "1e999"}, {"volume24h": "x"}, {"markPrice": True},
                                 {"nextFundingTime": "-5"}, {"nextFundingTime": "9e99"}, {"symbol": "CD"},
                                 {"nextFundingTime": "inf"}, {"nextFundingTime": "1e999"}, {"nextFundingTime": "1e306"},
                                 {"openInterest": "1e300"}])  # fmt: skip
def test_an_impossible_ticker_is_a_hole_until_the_next_snapshot(bad: dict[str, Any], probe: Make) -> None:
    """What a refused delta changed is not known: nothing is merged with it, and the topic is taken anew."""
    one = probe("bybit_linear", "AB")
    assert one.feed(ticker("snapshot", 5, lastPrice="7", markPrice="8"))
    assert not one.feed(ticker("delta", 6, **{"indexPrice": "9", **bad}))
    assert one.feed(ticker("delta", 7, fundingRate="0.1"))
    assert one.emit.counters["ticker_before_snapshot"] == 1
    one.venue.tick(one.now_ns)
    asked = [json.loads(w.text) for w in one.venue.wants if isinstance(w, Send)]
    assert [(r["op"], r["args"]) for r in asked if r["op"] != "ping"] == [
        ("unsubscribe", ["tickers.AB"]), ("subscribe", ["tickers.AB"])]  # fmt: skip
    assert one.feed(ticker("snapshot", 8, lastPrice="7.5", markPrice="8"))
    assert one.feed(ticker("delta", 9, fundingRate="0.2"))
    rows = one.rows("tickers")
    assert [(r["last"], r["mark_price"]) for r in rows] == [(7.0, 8.0), (7.5, 8.0), (7.5, 8.0)]
    assert [(feed, cause, repaired) for feed, _, _, cause, repaired in one.gaps()] == [("tickers", "refused", False)]
    one.venue.wants.clear()
    one.venue.tick(one.now_ns + 60_000_000_000)
    assert [json.loads(w.text)["op"] for w in one.venue.wants if isinstance(w, Send)] == ["ping"]
    one.sane()


def test_an_absurd_sequence_does_not_silence_a_ticker(probe: Make) -> None:
    """A broken `cs` or `u` far ahead is believed; what is true then looks old, and after a while it is taken again."""
    one = probe("bybit_linear", "AB")
    assert one.feed(ticker("snapshot", 5, lastPrice="7"))
    assert one.feed(ticker("delta", 1 << 61, lastPrice="8"))
    best = {"topic": "orderbook.1.AB", "type": "snapshot", "ts": MS, "cts": MS}
    for u, seq in ((5, 5), (1 << 61, 1 << 61), *((n, n) for n in range(6, 200))):
        assert one.feed({**best, "data": {"s": "AB", "b": [["1", "1"]], "a": [["2", "1"]], "u": u, "seq": seq}})
        assert one.feed(ticker("delta", 5 + seq % 1000, lastPrice="9"))
    assert one.rows("bbo")["update_id"].tolist()[-1] == 199
    assert one.rows("tickers")["last"].tolist()[-1] == 9.0
    assert one.emit.counters["bbo_superseded"] == one.emit.counters["ticker_superseded"] == 100
    one.sane()


def test_a_message_with_a_bad_row_makes_none(probe: Make) -> None:
    one = probe("bybit_linear", "AB")
    forced = {"T": MS, "s": "AB", "S": "Buy", "v": "1", "p": "2"}
    for rows in ([forced, {**forced, "p": "inf"}], [forced, {**forced, "s": "CD"}], [forced, {**forced, "S": "Long"}]):
        assert not one.feed({"topic": "allLiquidation.AB", "type": "snapshot", "ts": MS, "data": rows})
    bar = {"start": MS, "end": MS, "interval": "1", "open": "1", "close": "1", "high": "1", "low": "1", "volume": "1",
           "turnover": "1", "confirm": False, "timestamp": MS}  # fmt: skip
    assert not one.feed({"topic": "kline.1.AB", "type": "snapshot", "ts": MS, "data": [bar, {**bar, "high": "inf"}]})
    assert not len(one.rows("liquidations"))
    assert not len(one.rows("candles"))
    one.sane()


def test_trade_ids_of_what_was_left_are_remembered_for_the_newest_ones_only(
    probe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options expire every day, and a connector runs for months."""
    monkeypatch.setattr(exchanges, "TRADE_IDS_LEFT_MAX", 2)
    one = probe("bybit_option", "A-1-1-C", "B-1-1-C", "C-1-1-C")
    for name in ("A", "B", "C"):
        streams = [stream for stream in one.venue.streams if stream.ticker == f"{name}-1-1-C"]
        message = {**trade("t", ticker=f"{name}-1-1-C"), "topic": f"publicTrade.{name}"}
        assert one.feed(message)
        one.venue.remove([f"{name}-1-1-C"], connected=False)
        one.venue.add(streams, connected=False)  # listed anew: nothing is doubled
        assert one.feed(message)
        assert ids(one, f"{name}-1-1-C") == ["t"]
        one.venue.remove([f"{name}-1-1-C"], connected=False)
    assert list(one.venue._trade_ids_left) == ["B-1-1-C", "C-1-1-C"]
    one.sane()


def test_fetched_trades_of_one_millisecond_keep_their_order(probe: Make) -> None:
    """The venue gives the newest first (recorded answers of recent-trade)."""
    one = probe("bybit_linear", "AB")
    assert one.feed(trade("a"))
    one.venue.disconnected("reconnect")
    made = [
        {"execId": i, "symbol": "AB", "price": "1", "size": "1", "side": "Buy", "time": str(MS + 1)} for i in "edcb"
    ]
    answer = {"retCode": 0, "result": {"category": "linear", "list": made}}
    one.venue.http("https://x/v5/market/recent-trade?category=linear&symbol=AB&limit=60", json.dumps(answer).encode())
    assert ids(one) == ["a", "b", "c", "d", "e"]
