"""The Advanced Trade decoder by hand-made frames: numbers, refusals and what they cost, candles, tokens, repairs."""

import base64
import importlib
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from recorded import DATA, needs_data
from test_decode_hostile import Probe, mutated

from mdcollector.emit import Emit
from mdcollector.errors import ConfigError, FrameError
from mdcollector.exchanges import Fetch, Options, Reconnect, Send
from mdcollector.exchanges.coinbase import Coinbase, time_us

NOW_NS = 1_796_083_200_000_000_000
SECOND = 1_000_000
START = NOW_NS // 1000 - 100 * SECOND
TICKERS = ("AA-USD", "BB-USD")
FEEDS = Coinbase.FEEDS


def stamp(us: int) -> str:
    return f"{np.datetime64(us, 'us')}Z"


class Line:
    """One connection to a venue in small rings: every frame gets the next number."""

    def __init__(
        self, folder: Path, tickers: tuple[str, ...] = TICKERS, credentials: dict[str, str] | None = None
    ) -> None:
        sizes = dict.fromkeys((*FEEDS, "gaps"), 4096)
        self.emit = Emit(folder, "t", Coinbase.EXCHANGE, FEEDS, capacities=sizes, semaphore=False)
        options = Options(credentials=credentials or {})
        streams = [s for ticker in tickers for s in Coinbase.streams_of(ticker, FEEDS, options)]
        self.venue = Coinbase(self.emit, options, streams)
        self.number, self.now_ns = 0, NOW_NS
        self.venue.opened()

    def sent(self) -> list[dict[str, Any]]:
        """What it wanted sent since the last time."""
        found = [json.loads(want.text) for want in self.venue.wants if isinstance(want, Send)]
        self.venue.wants.clear()
        return found

    def answered(self) -> list[dict[str, Any]]:
        """The same, and the venue answers all of it."""
        messages = self.sent()
        for _ in messages:
            names = {key: list(TICKERS) for key in ("level2", "market_trades", "ticker", "candles")}
            self.take("subscriptions", {"subscriptions": {**names, "heartbeats": ["heartbeats"]}})
        return messages

    def raw(self, frame: bytes) -> str:
        """Decode; the reason of a refusal, "" when it was taken."""
        self.now_ns += 1_000_000
        self.emit.packet(self.now_ns, self.emit.clock())
        try:
            self.venue.decode(frame)
        except (FrameError, msgspec.DecodeError) as error:
            self.emit.refused_error(error, frame)
            return error.reason if isinstance(error, FrameError) else type(error).__name__
        return ""

    def frame(self, channel: str, *events: Any, number: int | None = None) -> bytes:
        if number is None:
            number, self.number = self.number, self.number + 1
        message = {"channel": channel, "timestamp": stamp(START), "sequence_num": number, "events": list(events)}
        return json.dumps(message, separators=(",", ":")).encode()

    def take(self, channel: str, *events: Any, number: int | None = None) -> str:
        return self.raw(self.frame(channel, *events, number=number))

    def book(self, kind: str, us: int, *levels: tuple[str, str, str], ticker: str = "AA-USD") -> str:
        return self.take("l2_data", book_event(kind, us, *levels, ticker=ticker))

    def live(self) -> None:
        """A snapshot of every book."""
        for ticker in TICKERS:
            assert self.book("snapshot", START, ("bid", "10", "1"), ("offer", "11", "2"), ticker=ticker) == ""

    def rows(self, feed: str) -> np.ndarray[Any, Any]:
        return self.emit.rings[feed].recent_rows(0)

    def gaps(self) -> list[tuple[str, str, str]]:
        ring = self.emit.rings["gaps"]
        rows = ring.recent_rows(0)
        return [(r["feed"].decode(), ring.tickers[r["ticker"]], r["cause"].decode()) for r in rows if not r["repaired"]]

    def states(self) -> dict[str, str]:
        return {ticker: book.state for ticker, book in self.venue.books.items()}


def book_event(kind: str, us: int, *levels: tuple[str, str, str], ticker: str = "AA-USD") -> dict[str, Any]:
    updates = [{"side": s, "event_time": stamp(us), "price_level": p, "new_quantity": q} for s, p, q in levels]
    return {"type": kind, "product_id": ticker, "updates": updates}


def trade(number: int, ticker: str = "AA-USD", **changed: Any) -> dict[str, Any]:
    words = {"product_id": ticker, "trade_id": str(number), "price": "10.5", "size": "2", "time": stamp(START + number),
             "side": "SELL"}  # fmt: skip
    return {**words, **changed}


def trades(kind: str, *numbers: int, ticker: str = "AA-USD", **changed: Any) -> dict[str, Any]:
    return {"type": kind, "trades": [trade(n, ticker, **changed) for n in sorted(numbers, reverse=True)]}


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path)
    yield made
    made.emit.close()


# Subscriptions


def test_one_channel_a_message_and_heartbeats_first(line: Line) -> None:
    assert line.sent() == [
        {"type": "subscribe", "channel": "heartbeats"},
        {"type": "subscribe", "channel": "market_trades", "product_ids": list(TICKERS)},
        {"type": "subscribe", "channel": "level2", "product_ids": list(TICKERS)},
        {"type": "subscribe", "channel": "ticker", "product_ids": list(TICKERS)},
        {"type": "subscribe", "channel": "candles", "product_ids": list(TICKERS)},
    ]


def test_many_products_are_asked_for_in_parts(tmp_path: Path) -> None:
    line = Line(tmp_path, tuple(f"T{n}-USD" for n in range(250)))
    sizes = [len(m.get("product_ids", [])) for m in line.sent() if m["channel"] == "level2"]
    assert sizes == [100, 100, 50]
    line.emit.close()


def test_a_stream_is_acknowledged_by_the_reply_that_lists_it(line: Line) -> None:
    line.sent()
    line.take("subscriptions", {"subscriptions": {"heartbeats": ["heartbeats"]}})
    assert not any(state.acknowledged_ns for state in line.venue.proof.values())
    line.take("subscriptions", {"subscriptions": {"market_trades": ["AA-USD"], "heartbeats": ["heartbeats"]}})
    proof = line.venue.proof
    assert proof["market_trades:AA-USD"].acknowledged_ns
    assert proof["market_trades:BB-USD"].refused == "left out of the reply to subscribe"
    assert not proof["level2:AA-USD"].refused, "its reply is still to come"


def test_a_refused_message_is_halved_until_only_the_refused_product_is_left(line: Line) -> None:
    line.sent()
    for _ in range(2):  # heartbeats, market_trades
        line.take("subscriptions", {"subscriptions": {"heartbeats": ["heartbeats"], "market_trades": list(TICKERS)}})
    error = json.dumps({"type": "error", "message": "BB-USD is not a valid product"}).encode()
    assert line.raw(error) == ""
    assert [m["product_ids"] for m in line.sent()] == [["AA-USD"], ["BB-USD"]]
    for _ in range(2):  # ticker and candles come before the halves
        line.take("subscriptions", {"subscriptions": {"ticker": list(TICKERS), "candles": list(TICKERS)}})
    line.take("subscriptions", {"subscriptions": {"level2": ["AA-USD"]}})
    assert line.raw(error) == ""
    refused = {name: state.refused for name, state in line.venue.proof.items() if state.refused}
    assert refused == {"level2:BB-USD": "BB-USD is not a valid product"}
    assert line.raw(error) == "venue_error", "nothing is waiting for an answer any more"


def test_a_rate_limit_ends_the_connection_for_a_slower_one(line: Line) -> None:
    line.venue.wants.clear()
    line.raw(json.dumps({"type": "error", "message": "Rate limit exceeded"}).encode())
    (want,) = line.venue.wants
    assert isinstance(want, Reconnect)
    assert (want.cause, want.wait_s > 0) == ("rate_limited", True)


# Numbers


def test_a_missing_number_costs_every_book_and_a_repeated_one_nothing(line: Line) -> None:
    line.answered()
    line.live()
    assert line.take("heartbeats", {"current_time": "x", "heartbeat_counter": 7}) == ""
    assert line.take("heartbeats", {"current_time": "x", "heartbeat_counter": 99}, number=line.number - 1) == ""
    assert line.emit.counters["sequence_duplicate"] == 1
    assert line.states() == dict.fromkeys(TICKERS, "live")
    line.number += 1
    assert line.take("ticker", {"type": "update", "tickers": [{"product_id": "AA-USD", "price": "10"}]}) == ""
    assert line.states() == dict.fromkeys(TICKERS, "broken")
    assert line.gaps() == [
        ("orderbook_l2", "AA-USD", "sequence"), ("orderbook_l2", "BB-USD", "sequence"), ("bbo", "*", "sequence"),
        ("tickers", "*", "sequence"), ("candles", "*", "sequence"),
    ]  # fmt: skip
    line.venue.tick(line.now_ns)
    kinds = [(m["type"], m["channel"], m["product_ids"]) for m in line.answered()]
    assert sorted(kinds) == sorted(
        (kind, channel, list(TICKERS)) for kind in ("subscribe", "unsubscribe")
        for channel in ("market_trades", "level2", "candles")
    )  # fmt: skip
    line.venue.tick(line.now_ns + 2_000_000_000)
    assert line.sent() == [], "once; a snapshot that does not come is asked for again later"
    line.book("snapshot", START + 5, ("bid", "10", "1"), ticker="AA-USD")
    line.venue.tick(line.now_ns + 20_000_000_000)
    assert [(m["type"], m["product_ids"]) for m in line.sent()] == [
        ("unsubscribe", ["BB-USD"]),
        ("subscribe", ["BB-USD"]),
    ]


def test_the_first_number_of_a_connection_is_0(line: Line) -> None:
    line.number = 3
    line.live()
    assert line.emit.counters["lost_sequence"] == 1


def test_a_refused_frame_under_a_number_that_comes_again_costs_nothing(line: Line) -> None:
    """It was not the venue's: the true one follows."""
    line.live()
    number = line.number
    assert line.take("l2_data", book_event("update", START + 1, ("bid", "9", "1"), ticker="NO-USD")) == "unknown_symbol"
    assert line.take("l2_data", book_event("update", START + 1, ("bid", "9", "1")), number=number) == ""
    assert line.states() == dict.fromkeys(TICKERS, "live")
    assert line.venue.books["AA-USD"].book()[0] == {10.0: 1.0, 9.0: 1.0}
    assert not [name for name in line.emit.counters if name.startswith(("lost_", "sequence_"))]


@pytest.mark.parametrize("wrong", [
    {"updates": [{"side": "ask", "event_time": stamp(START), "price_level": "9", "new_quantity": "1"}]},
    {"updates": [{"side": "bid", "event_time": "yesterday", "price_level": "9", "new_quantity": "1"}]},
    {"updates": [{"side": "bid", "event_time": stamp(START), "price_level": "nan", "new_quantity": "1"}]},
    {"updates": [{"side": "bid", "event_time": stamp(START), "price_level": "9", "new_quantity": "-1"}]},
    {"updates": [{"side": "bid", "event_time": stamp(START), "price_level": "9", "new_quantity": "1e18"}]},
    {"updates": [{"side": "bid", "event_time": stamp(START), "price_level": {}, "new_quantity": "1"}]},
    {"type": "merge"},
])  # fmt: skip
def test_a_refused_book_message_costs_its_own_book_and_is_not_applied_by_half(
    wrong: dict[str, Any], line: Line
) -> None:
    line.live()
    good = book_event("update", START + 1, ("bid", "9", "1"), ticker="BB-USD")
    bad = {**book_event("update", START + 1, ("bid", "9", "1")), **wrong}
    line.answered()
    assert line.take("l2_data", bad, good)
    assert line.take("heartbeats", {"heartbeat_counter": 1}) == "", (
        "the message behind it shows that it was the venue's"
    )
    assert line.states() == {"AA-USD": "broken", "BB-USD": "live"}
    assert line.venue.books["BB-USD"].book()[0] == {10.0: 1.0}, "an event of a refused message"
    assert line.take("l2_data", book_event("update", START + 2, ("offer", "12", "1"), ticker="BB-USD")) == ""
    assert line.states()["BB-USD"] == "live"
    line.venue.tick(line.now_ns)
    assert {(m["channel"], *m["product_ids"]) for m in line.sent()} == {("level2", "AA-USD")}


def test_deep_nesting_is_refused(line: Line) -> None:
    line.live()
    deep = b'{"channel":"l2_data","timestamp":"","sequence_num":2,"events":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert line.raw(deep) in ("too_deep", "ValidationError")


@pytest.mark.parametrize("number", [b'"7"', b"null", b"1.5", b"{}", b"1e999"])
def test_a_number_that_is_none_is_refused(number: bytes, line: Line) -> None:
    frame = line.frame("heartbeats", {"heartbeat_counter": 1}, number=0)
    assert (
        line.raw(frame.replace(b'"sequence_num":0', b'"sequence_num":' + number)) == "ValidationError"
        or number == b"1e999"
    )
    assert line.take("heartbeats", {"heartbeat_counter": 1}) == ""
    assert not line.emit.counters["lost_sequence"]


def test_a_book_whose_snapshot_was_refused_is_asked_for(line: Line) -> None:
    line.answered()
    assert line.book("snapshot", START, ("bid", "10", "-1"))
    line.take("heartbeats", {"heartbeat_counter": 1})
    line.venue.tick(line.now_ns)
    assert [(m["type"], m["channel"], m["product_ids"]) for m in line.sent()] == [
        ("unsubscribe", "level2", ["AA-USD"]), ("subscribe", "level2", ["AA-USD"])
    ]  # fmt: skip


def test_a_message_in_fragments_costs_nothing(line: Line) -> None:
    """The transport tries each fragment: the first one of a message names its number, and so does the whole."""
    line.live()
    whole = line.frame("l2_data", book_event("update", START + 1, ("bid", "9", "1")))
    for cut in (20, 60, 150, 200, len(whole) - 3):
        assert line.raw(whole[:cut])
        assert line.raw(whole[cut:])
        assert line.raw(whole) == ""
        whole = line.frame("l2_data", book_event("update", START + cut, ("bid", "9", str(cut))))
    assert line.states() == dict.fromkeys(TICKERS, "live")
    assert not [name for name in line.emit.counters if name.startswith(("lost_", "sequence_"))]


def test_a_book_of_an_earlier_connection_is_not_continued(line: Line) -> None:
    """The first snapshot of the new connection is missing (the stream was silent): its changes say nothing."""
    line.live()
    line.venue.disconnected("reconnect")
    line.number = 0
    line.venue.opened()
    line.answered()
    line.book("update", START + 9, ("bid", "9", "1"))
    assert line.states() == {"AA-USD": "broken", "BB-USD": "live"}
    assert ("orderbook_l2", "AA-USD", "reconnect") in line.gaps()
    line.venue.tick(line.now_ns)
    assert {(m["channel"], *m["product_ids"]) for m in line.sent()} == {("level2", "AA-USD")}


# Best prices


def test_best_prices_follow_the_book(line: Line) -> None:
    line.book("snapshot", START, ("bid", "10", "1"), ("offer", "12", "2"))
    line.book("update", START + 1, ("bid", "9", "5"))  # behind the best
    line.book("update", START + 2, ("bid", "11", "3"))
    line.book("update", START + 3, ("offer", "12", "0"))
    line.book("update", START + 4, ("bid", "8", "1"))
    line.book("update", START + 5, ("offer", "10.5", "4"))  # crossed
    rows = line.rows("bbo")
    seen = [tuple("none" if v != v else v for v in row) for row in
            rows[["bid_price", "bid_qty", "ask_price", "ask_qty", "update_id", "flags"]].tolist()]  # fmt: skip
    assert seen == [
        (10.0, 1.0, 12.0, 2.0, START, 1), (11.0, 3.0, 12.0, 2.0, START + 2, 1), (11.0, 3.0, "none", 0.0, START + 3, 1),
        (11.0, 3.0, 10.5, 4.0, START + 5, 9),
    ]  # fmt: skip


def test_best_prices_that_a_book_crossed_for_too_long_did_not_tell_are_a_hole(line: Line) -> None:
    line.live()
    line.book("update", START + 1, ("bid", "12", "1"))
    line.now_ns += 6 * 10**9
    heard = line.emit.rcv_us
    line.book("update", START + 2, ("bid", "13", "1"))
    assert line.states() == {"AA-USD": "broken", "BB-USD": "live"}
    line.book("update", START + 3, ("bid", "14", "1"))
    line.book("snapshot", START + 4, ("bid", "10", "1"), ("offer", "11", "2"))
    assert line.gaps() == [("orderbook_l2", "AA-USD", "crossed")] * 2 + [("bbo", "AA-USD", "resync")]
    assert line.rows("gaps")["from_time"][-1] <= heard, "behind the last message that was told"


# Trades


def test_only_new_trades_of_a_greeting_are_published(line: Line) -> None:
    """F18. The first greeting says where the counter stands; a later one fills the hole, and the rest is fetched."""
    line.take("market_trades", trades("snapshot", *range(1, 101)))
    assert len(line.rows("trades")) == 0
    line.take("market_trades", trades("update", 101, 102))
    line.venue.disconnected("reconnect")
    line.number = 0
    line.venue.opened()
    line.venue.wants.clear()
    line.take("market_trades", trades("snapshot", *range(100, 200)))
    line.take("market_trades", trades("update", 200))
    rows = line.rows("trades")
    assert rows["trade_seq"].tolist() == [*range(101, 201)]
    assert [seq for seq, flags in rows[["trade_seq", "flags"]].tolist() if flags & 16] == [*range(103, 200)]
    gaps = line.rows("gaps")[["first_id", "last_id", "cause", "repaired"]].tolist()
    assert gaps == [(103, 199, b"reconnect", 0), (103, 199, b"filled", 1)]
    assert not line.venue.wants


def test_what_a_greeting_does_not_reach_back_to_is_fetched_page_by_page(line: Line) -> None:
    line.take("market_trades", trades("snapshot", *range(1, 101)))
    line.take("market_trades", trades("update", 101))
    line.venue.disconnected("reconnect")
    line.number = 0
    line.venue.opened()
    line.venue.wants.clear()
    line.take("market_trades", trades("snapshot", *range(4000, 4100)))
    asked = []
    second_of = {n: (START + n) // SECOND + (n - 101) // 300 for n in range(102, 4000)}  # 300 trades a second
    while line.venue.wants:
        want = line.venue.wants.popleft()
        assert isinstance(want, Fetch)
        assert want.answer is not None
        query = {key: int(values[0]) for key, values in parse_qs(urlsplit(want.path).query).items()}
        asked.append(query)
        of_range = [n for n in second_of if query["start"] <= second_of[n] <= query["end"]]
        newest = of_range[-query["limit"] :]
        at = {n: stamp(second_of[n] * SECOND + n) for n in newest}
        want.answer(json.dumps({"trades": [trade(n, time=at[n]) for n in reversed(newest)]}).encode())
    assert sorted(line.rows("trades")["trade_seq"].tolist()) == [101, *range(102, 4100)]
    assert len(asked) > 3
    assert all(later["end"] < earlier["end"] for earlier, later in itertools.pairwise(asked))
    gaps = line.rows("gaps")[["first_id", "last_id", "repaired"]].tolist()
    assert gaps == [(102, 4099, 0), (102, 4099, 1)]


def test_a_second_with_more_trades_than_an_answer_ends_the_search(line: Line) -> None:
    line.take("market_trades", trades("update", 1))
    line.take("market_trades", trades("update", 5000))
    (want,) = [want for want in line.venue.wants if isinstance(want, Fetch)]
    line.venue.wants.clear()
    assert want.answer is not None
    body = json.dumps({"trades": [trade(n, time=stamp(START)) for n in range(4999, 3999, -1)]}).encode()
    want.answer(body)
    (again,) = line.venue.wants
    line.venue.wants.clear()
    assert isinstance(again, Fetch)
    assert again.answer is not None
    again.answer(body)
    assert not line.venue.wants
    assert line.emit.counters["trade_repair_incomplete"] == 1
    assert len(line.rows("trades")) == 2 + 1000


def test_an_unknown_side_is_told_and_the_trade_kept(line: Line) -> None:
    line.take("market_trades", trades("update", 1, side="UNKNOWN_ORDER_SIDE"))
    line.take("market_trades", trades("update", 2, side="BUY"))
    line.take("market_trades", trades("update", 3, side="SELL"))
    assert line.rows("trades")["side"].tolist() == [0, -1, 1]
    assert line.emit.counters["protocol_drift"] == 1


def test_a_new_field_is_told_and_harms_nothing(line: Line) -> None:
    line.take("market_trades", {**trades("update", 1), "novelty": 1})
    assert line.rows("trades")["trade_seq"].tolist() == [1]
    assert "new field novelty" in line.venue.notes


# Candles


def candle(start_s: int, close: str, ticker: str = "AA-USD") -> dict[str, Any]:
    return {
        "start": str(start_s),
        "high": "9",
        "low": "1",
        "open": "2",
        "close": close,
        "volume": "5",
        "product_id": ticker,
    }


def test_a_candle_is_closed_by_the_next_one_unless_a_version_may_have_been_missed(line: Line) -> None:
    first = START // SECOND // 300 * 300
    second, third, fourth = (first + 300 * n for n in (1, 2, 3))

    def take(kind: str, *candles: Any) -> list[tuple[int, float, bool]]:
        before = len(line.rows("candles"))
        assert line.take("candles", {"type": kind, "candles": list(candles)}) == ""
        rows = line.rows("candles")[before:]
        return [((int(r["open_time"]) // SECOND - first) // 300, float(r["close"]), bool(r["closed"])) for r in rows]

    assert take("snapshot", candle(first - 300, "3"), candle(first, "4")) == [(0, 4.0, False)]
    assert take("update", candle(first, "5")) == [(0, 5.0, False)]
    assert take("update", candle(second, "6")) == [(0, 5.0, True), (1, 6.0, False)]
    line.number += 1  # a message is missed
    assert take("update", candle(third, "7")) == [(2, 7.0, False)], "how the one before it closed is not known"
    line.venue.disconnected("reconnect")
    line.number = 0
    line.venue.opened()
    again = take("snapshot", candle(second, "6.5"), candle(third, "7.5"), candle(fourth, "8"))
    assert again == [(2, 7.5, True), (3, 8.0, False)], "the greeting says how it closed"
    assert take("snapshot", candle(third, "7.5"), candle(fourth, "8")) == [], "nothing new"
    assert set(line.rows("candles")["interval"].tolist()) == {b"5m"}


def test_a_candle_is_not_closed_as_it_was_before_a_version_that_could_not_be_read(line: Line) -> None:
    line.answered()
    first = START // SECOND // 300 * 300
    for ticker in TICKERS:
        assert line.take("candles", {"type": "snapshot", "candles": [candle(first, "7", ticker)]}) == ""
    assert line.take("candles", {"type": "update", "candles": [candle(first, "high")]})
    for ticker in TICKERS:  # nobody knows of which products the message was: it may have had several
        assert line.take("candles", {"type": "update", "candles": [candle(first + 300, "8", ticker)]}) == ""
    assert not line.rows("candles")["closed"].any()
    line.venue.tick(line.now_ns)
    kinds = [(m["type"], m["channel"], m["product_ids"]) for m in line.answered()]
    assert kinds == [(kind, "candles", list(TICKERS)) for kind in ("unsubscribe", "subscribe")]
    for ticker in TICKERS:
        again = [candle(first, "7.5", ticker), candle(first + 300, "8", ticker)]
        assert line.take("candles", {"type": "snapshot", "candles": again}) == ""
    assert line.gaps() == [("candles", ticker, "resync") for ticker in TICKERS]


def test_a_ticker_message_that_could_not_be_read_is_a_hole(line: Line) -> None:
    """Its products are not known by its head alone; it is lost when the next number comes and not its own once more."""
    line.live()
    ticker = {"product_id": "AA-USD", "price": "10"}
    assert line.take("ticker", {"tickers": [ticker]}) == ""
    heard_us = line.now_ns // 1000
    assert line.take("ticker", {"tickers": [ticker | {"price": {}}]})
    assert line.gaps() == []
    assert line.take("ticker", {"tickers": [ticker]}) == ""
    assert line.gaps() == [("tickers", "*", "refused")]
    (row,) = line.rows("gaps")
    assert (row["from_time"], row["to_time"]) == (heard_us, line.now_ns // 1000)


def test_a_message_whose_channel_cannot_be_read_may_be_of_any(line: Line) -> None:
    line.live()
    assert line.raw(b'{"chan":"l2_data","sequence_num":%d,"events":{}}' % line.number)
    line.number += 1
    assert line.take("heartbeats", {"heartbeat_counter": 1}) == ""
    assert line.states() == dict.fromkeys(TICKERS, "broken")
    assert ("tickers", "*", "refused") in line.gaps()


# Times


@pytest.mark.parametrize(("text", "us"), [
    ("2026-08-09T21:05:48.228568804Z", 1786309548228568),
    ("2026-08-09T21:05:48.2Z", 1786309548200000),
    ("2026-08-09T21:05:48Z", 1786309548000000),
    ("2026-08-09T21:05:48.000000999Z", 1786309548000000),
    ("1970-01-01T00:00:00Z", 0),
    ("0001-01-01T00:00:00Z", 0),
])  # fmt: skip
def test_times(text: str, us: int) -> None:
    assert time_us(text) == us


@pytest.mark.parametrize("text", [
    "", "now", "2026-08-09T21:05:48", "2026-08-09 21:05:48.1Z", "2026-08-09T21:05:48.Z", "2026-13-09T21:05:48Z",
    "2026-08-09T21:05:48.1_0Z", "2026-08-09T21:05:48.1234567890Z", "2026-08-09T21:05:48+01:00", "2999-01-01T00:00:00Z",
])  # fmt: skip
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(FrameError):
        time_us(text)


# Tokens


def private_key(key: Any, form: PrivateFormat = PrivateFormat.PKCS8) -> str:
    text: bytes = key.private_bytes(Encoding.PEM, form, NoEncryption())
    return text.decode()


def part(text: str) -> Any:
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def test_each_message_carries_a_token_of_its_own(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    line = Line(tmp_path, credentials={"key_name": "the name", "private_key": private_key(key)})
    tokens = [message["jwt"] for message in line.sent()]
    assert len(set(tokens)) == len(tokens) == 5
    for token in tokens:
        head, claims, signature = token.split(".")
        assert {**part(head), "nonce": ""} == {"alg": "ES256", "typ": "JWT", "kid": "the name", "nonce": ""}
        assert part(claims)["exp"] - part(claims)["nbf"] == 120
        assert {key: part(claims)[key] for key in ("iss", "sub")} == {"iss": "cdp", "sub": "the name"}
        raw = base64.urlsafe_b64decode(signature + "==")
        assert len(raw) == 64
        der = utils.encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
        key.public_key().verify(der, f"{head}.{claims}".encode(), ec.ECDSA(SHA256()))
    line.emit.close()


@pytest.mark.parametrize("secret", [
    "c2VjcmV0",
    private_key(ed25519.Ed25519PrivateKey.generate()),
    private_key(ec.generate_private_key(ec.SECP384R1())),
])  # fmt: skip
def test_a_key_that_cannot_sign_is_a_configuration_error_that_does_not_show_it(secret: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Line(tmp_path, credentials={"key_name": "n", "private_key": secret})
    assert "private_key is no" in str(error.value)
    assert secret.splitlines()[-2 if "\n" in secret else 0] not in str(error.value)


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.invalidate_caches()
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(ConfigError, match=r"mdcollector\[coinbase\]"):
        Line(tmp_path, credentials={"key_name": "n", "private_key": "k"})


# Mutations of real frames


@needs_data
@pytest.mark.parametrize("seed", range(3))
def test_mutated_frames(seed: int, tmp_path: Path) -> None:
    """Whatever comes is taken or refused for a reason, no impossible number is stored, and what follows is not lost."""
    rng = random.Random(seed)
    folder = DATA / "coinbase"
    frames = [path.read_text() for path in sorted((folder / "samples").glob("*.json")) if path.stat().st_size < 20_000]
    frames = [json.dumps(json.loads(frame), separators=(",", ":")) for frame in frames]
    one = Probe("coinbase", tmp_path)
    kinds = set()
    for number in range(1500):
        frame = rng.choice(frames)
        numbered = re.sub(r'"sequence_num":\d+', f'"sequence_num":{number}', frame)  # else each one would be a jump
        one.feed(mutated(numbered, rng))
        one.venue.wants.clear()
    kinds = {name for name in one.emit.counters if name.startswith("refused_")}
    assert len(kinds) >= 5, kinds
    assert one.refused > 400, "the mutations do not bite"
    calm, at = "CALM-USD", one.now_ns // 1000
    frames_of_calm = [
        ("l2_data", book_event("snapshot", at, ("bid", "1", "1"), ("offer", "2", "1"), ticker=calm)),
        ("market_trades", trades("update", 7, ticker=calm)),
        ("l2_data", book_event("update", at + 1, ("bid", "1.5", "3"), ticker=calm)),
        ("market_trades", trades("update", 8, 9, ticker=calm)),
    ]
    for number, (channel, event) in enumerate(frames_of_calm, 2000):
        message = {"channel": channel, "timestamp": stamp(at), "sequence_num": number, "events": [event]}
        assert one.feed(message), one.emit.samples
    assert one.trades(calm) == [7, 8, 9]
    assert one.venue.books[calm].book() == ({1.0: 1.0, 1.5: 3.0}, {2.0: 1.0})
    for _ in one.venue.finish():
        pass
    one.sane()
    one.emit.close()
