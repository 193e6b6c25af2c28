"""Coinbase Exchange as a fleet: real processes, simulated venue, faults; whatever happens, ledger, rings and tables agree.

Books of this venue carry no numbers, so these tests do not share those of the venues that have them: a loss is found by
an audit, by a frame that came in the wrong order, or by the frame that could not be read.
"""

import base64
import hashlib
import hmac
import json
import os
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from fleet import Fleet, until

from mdcollector.continuity import BookSync
from mdcollector.emit import Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import Fetch, Options, Send, Stream
from mdcollector.exchanges.coinbase_exchange import CoinbaseExchange
from mdcollector.ring import RingReader

VENUE = "coinbase_exchange"
TICKERS = ("BTC-USD", "ETH-USD", "SOL-USD")
FEEDS = ("trades", "orderbook_l2", "bbo", "tickers")
SECRET = base64.b64encode(b"a secret of the tests, no longer than this").decode()
KEY = {"key": "reader-1", "secret": SECRET, "passphrase": "pass-of-the-tests"}
ENV = {f"MDCOLLECTOR_COINBASE_EXCHANGE_{name.upper()}": value for name, value in KEY.items()}
ACCEPTED = ("--credential", f"reader-1:{SECRET}")

Start = Callable[..., Fleet]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a fleet that collects; it is ended with the test."""
    with ExitStack() as stack:

        def make(*tickers: str, **options: Any) -> Fleet:
            names = list(tickers or TICKERS)
            given = {"tickers": names, "feeds": FEEDS, "sim_tickers": ",".join(f"{t}:1" for t in names), **options}
            return stack.enter_context(Fleet(tmp_path / VENUE, VENUE, **given)).start()

        yield make


def agrees(fleet: Fleet, **options: Any) -> None:
    proof = fleet.finish(**options)
    assert proof.ok, str(proof)


def book_gaps(fleet: Fleet) -> list[tuple[str, str]]:
    return [(gap["ticker"], gap["cause"]) for gap in fleet.holes() if gap["feed"] == "orderbook_l2"]


def snapshots(fleet: Fleet) -> Counter[str]:
    rows = fleet.rows("orderbook_l2")
    return Counter(row["ticker"] for row in rows if row["flags"] & 3 == 3)  # the last row of a snapshot


def test_every_subscription_is_confirmed_and_every_book_audited(start: Start) -> None:
    fleet = start()
    page = fleet.stats()
    assert set(page["streams"]) == {f"{c}:{t}" for c in ("matches", "level2_batch", "ticker") for t in TICKERS}
    assert all(proof["acknowledged_ns"] and not proof["refused"] for proof in page["streams"].values())
    assert page["notes"] == {}
    fleet.wait_counter("book_audited", len(TICKERS))
    assert not fleet.counters("book_audit_")
    state = fleet.sim.state()
    assert state["violations"] == {}
    assert {f"heartbeat:{t}" for t in TICKERS} <= set(state["connections"][0]["subscriptions"])
    agrees(fleet)
    assert not fleet.prove().gaps
    assert fleet.prove().feeds["trades"].different == 0


# Losses


def test_lost_book_updates_are_found_by_an_audit_and_only_that_book_resyncs(start: Start) -> None:
    """F2. Nothing in the stream tells: the audit does, and the ledger doubts all since the last one that was right."""
    fleet = start()
    hit, *others = TICKERS
    fleet.wait_counter("book_audited", len(TICKERS))
    fleet.sim.fault("gap", stream="level2_batch:", ticker=hit, n=15)
    fleet.wait_counter("gap_orderbook_l2_audit")
    fleet.settle()
    fleet.wait_more("orderbook_l2", 50)
    agrees(fleet)
    assert book_gaps(fleet) == [(hit, "audit")]
    (gap,) = [gap for gap in fleet.holes() if gap["feed"] == "orderbook_l2"]
    lost = [fault["last"] for fault in fleet.sim.ledger().faults]
    assert len(lost) == 15
    assert all(gap["first_id"] <= id_ <= gap["last_id"] for id_ in lost)
    assert gap["from_time"] == gap["first_id"] - 1
    assert snapshots(fleet) == {hit: 2, **dict.fromkeys(others, 1)}


def test_missing_trades_are_fetched_and_stand_in_the_table_once(start: Start) -> None:
    fleet = start()
    for ticker in TICKERS:
        fleet.sim.fault("gap", stream="matches:", ticker=ticker, n=4)
    for filled in (3, 4, 5):
        fleet.wait_counter("gap_trades_filled_repaired", filled)
        fleet.sim.fault("drop", stream="matches:")
    fleet.wait_counter("gap_trades_filled_repaired", 6)
    agrees(fleet)
    proof = fleet.prove()
    assert proof.feeds["trades"].repaired >= 3 * 4 + 3
    assert proof.feeds["trades"].explained == 0
    assert not [cause for feed, cause in proof.gaps if feed == "trades"], "every hole in the trades is repaired"


def test_trades_behind_which_none_comes_are_found_by_the_heartbeat(start: Start) -> None:
    """The channel of matches falls silent for good; heartbeats go on naming the newest trade."""
    fleet = start()
    fleet.sim.fault("silence", stream="matches:")
    fleet.wait_counter("gap_trades_filled_repaired", 2 * len(TICKERS))
    fleet.sim.pause()

    def made(ticker: str) -> int:
        """The newest trade of the exchange, as far as the ledger is written by now."""
        return max(row["seq"] for row in fleet.sim.ledger().rows("trade", ticker))

    until(lambda: all(_newest_trade(fleet, t) == made(t) for t in TICKERS), fleet.brief)
    agrees(fleet)
    proof = fleet.prove()
    assert proof.feeds["trades"].explained == 0
    assert proof.feeds["trades"].repaired > 0


def _newest_trade(fleet: Fleet, ticker: str) -> int:
    with RingReader(fleet.rings / fleet.NAME, "trades") as ring:
        ring.seek("oldest")
        rows = ring.read()
        mine = rows["trade_seq"][ring.names(rows) == ticker]
        return int(mine.max()) if len(mine) else -1


def test_duplicated_frames(start: Start) -> None:
    fleet = start()
    for stream in ("matches:", "level2_batch:", "ticker:"):
        fleet.sim.fault("duplicate", stream=stream, every=0.3)
    fleet.sim.wait_state(lambda state: all(fault["fired"] >= 5 for fault in state["faults"]), 30)
    agrees(fleet)
    assert not fleet.prove().gaps


def test_reordered_frames(start: Start) -> None:
    """F11. Trades are put in order by their ids; a book whose updates come in the wrong order is taken anew."""
    fleet = start()
    for stream in ("matches:", "level2_batch:"):
        fleet.sim.fault("reorder", stream=stream, every=0.5, count=6)
    fleet.sim.wait_state(lambda state: all(fault["fired"] >= 6 for fault in state["faults"]), 30)
    fleet.wait_counter("gap_orderbook_l2_order")
    agrees(fleet)
    proof = fleet.prove()
    assert not [cause for feed, cause in proof.gaps if feed == "trades"], str(proof)
    assert {cause for _, cause in book_gaps(fleet)} == {"order"}


def test_200_books_lost_at_once(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """F3. Half a frame for each of 200 books: all are taken anew with a few messages, and no limit is touched."""
    tickers = ",".join(f"T{n:03d}-USD:1" for n in range(200))
    with Fleet(
        tmp_path, VENUE, tickers=["T*-USD"], sim_tickers=tickers, rate=4, feeds=("trades", "orderbook_l2")
    ) as fleet:
        fleet.start()
        until(lambda: fleet.stats().get("books") == 200, "200 books", 60)
        fleet.settle(60)
        began = time.monotonic()
        for n in range(200):
            fleet.sim.fault("truncate", stream="level2_batch:", ticker=f"T{n:03d}-USD")
        fleet.wait_counter("gap_orderbook_l2_refused", 200)
        fleet.settle(60)
        record_property("resync_of_200_books_s", time.monotonic() - began)
        state = fleet.sim.state()
        assert state["counts"].get("http_429", 0) == 0
        assert state["violations"] == {}
        agrees(fleet, to_the_end=False)
        assert Counter(cause for _, cause in book_gaps(fleet)) == {"refused": 200}


# Limits


def test_429_with_retry_after(start: Start) -> None:
    """F4. Trades wait to be repaired until the venue allows it; what comes over the socket is collected meanwhile."""
    fleet = start()
    fleet.sim.fault("ban", seconds=2, status=429)
    fleet.sim.fault("gap", stream="matches:", ticker=TICKERS[0], n=3)
    until(lambda: fleet.sim.state()["http_429"] >= 1, "one answer 429")
    fleet.wait_more("orderbook_l2", 20)
    fleet.wait_counter("gap_trades_filled_repaired")
    state = fleet.sim.state()
    assert state["requests_before_retry_after"] == 0
    assert state["http_429"] == 1
    agrees(fleet)
    assert fleet.prove().feeds["trades"].explained == 0


def test_a_refused_product_is_found_among_the_others(start: Start) -> None:
    """One wrong product fails a whole request; the others are asked for again."""
    fleet = start()
    fleet.sim.fault("refuse", ticker=TICKERS[1], count=1)
    fleet.sim.fault("disconnect")
    fleet.wait_counter("stream_refused")
    page = until(lambda: (p := fleet.stats())["notes"] and p, "notes")
    assert set(page["notes"]) == {f"refused {c}:{TICKERS[1]}" for c in ("matches", "level2_batch", "ticker")}
    fleet.wait_more("trades", 20)
    subscribed = {name for conn in fleet.sim.state()["connections"] for name in conn["subscriptions"]}
    assert {f"matches:{TICKERS[0]}", f"matches:{TICKERS[2]}"} <= subscribed
    assert fleet.connector.poll() is None


# The life of a connection


def test_rollover_loses_and_doubles_no_row_in_any_feed(start: Start) -> None:
    """F5. Batches of the two connections are not compared by number: whichever is ahead goes on with the book."""
    fleet = start(lifetime_s=3.0, rate=150)
    fleet.wait_counter("rollovers", 2)
    until(lambda: fleet.stats().get("state") == "connected", "the second rollover is done")
    fleet.wait_more("trades", 40)
    agrees(fleet)
    proof = fleet.prove()
    assert not proof.gaps, str(proof)
    assert all(counts.explained == 0 for counts in proof.feeds.values()), str(proof)
    assert fleet.counter("overlap_duplicate") > 0


@pytest.mark.parametrize("how", ["disconnect", "close", "truncate"])
def test_a_lost_connection_is_a_recorded_hole(start: Start, how: str) -> None:
    """F18 too: the new connection greets with the last match and ticker; nothing stands in the tables twice."""
    fleet = start()
    fleet.sim.fault(how, **({"mode": "wire"} if how == "truncate" else {}))
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    fleet.wait_more("trades", 20)
    agrees(fleet)
    proof = fleet.prove()
    assert ("bbo", "reconnect") in proof.gaps
    assert not [cause for feed, cause in proof.gaps if feed == "trades"], str(proof)
    # The rest of a frame that was cut can be read as the beginning of one: then a book is broken by that already.
    causes = {"reconnect", "refused"} if how == "truncate" else {"reconnect"}
    assert {ticker for ticker, cause in book_gaps(fleet) if cause in causes} == set(TICKERS)


def test_a_killed_connector_goes_on_where_it_was(start: Start) -> None:
    fleet = start()
    os.kill(fleet.connector.pid, signal.SIGKILL)
    fleet.connector.wait(30)
    fleet.sim.wait_state(lambda state: not state["connections"], 30)
    fleet.connector = fleet.connect()
    fleet.wait_live()
    fleet.wait_more("trades", 20)
    agrees(fleet)
    proof = fleet.prove()
    assert not [cause for feed, cause in proof.gaps if feed == "trades"], str(proof)
    assert {(ticker, "restart") for ticker in TICKERS} == set(book_gaps(fleet))


def test_heartbeats_do_not_count_as_data(start: Start) -> None:
    """The market stands still and only heartbeats come: the connection is given up all the same."""
    fleet = start(stale_s=2.0)
    fleet.sim.pause()
    fleet.wait_counter("stale")
    assert fleet.counter("disconnected") == 0
    fleet.sim.resume()
    fleet.wait_live()
    fleet.wait_more("trades", 20)
    agrees(fleet)


def listed_by(fleet: Fleet) -> dict[str, tuple[bool, float]]:
    """The exchange's own list: whether a product trades, and its tick size."""
    with urllib.request.urlopen(fleet.sim.rest_url + "/products", timeout=30) as response:
        rows = json.load(response)
    return {p["id"]: (p["status"] == "online", float(p["quote_increment"])) for p in rows}


def test_the_list_of_products_is_followed_while_running(tmp_path: Path) -> None:
    """F14, F15. New is subscribed, gone is left and taken up again where it ended; every change is a row, once."""
    stays, leaves, new = "BTC-USD", "ETH-USD", "NEW-USD"

    def is_recorded(ticker: str) -> bool:
        streams = [s for s in fleet.stats().get("streams", {}).values() if s["ticker"] == ticker]
        return bool(streams) and all(s["acknowledged_ns"] and s["data_ns"] > s["requested_ns"] for s in streams)

    def is_left(ticker: str) -> bool:
        names = [name for conn in fleet.sim.state()["connections"] for name in conn["subscriptions"]]
        return not [name for name in names if name.endswith(f":{ticker}")]

    fleet = Fleet(
        tmp_path, VENUE, tickers=["*-USD"], feeds=FEEDS, sim_tickers=f"{stays}:1,{leaves}:1", instruments_s=0.5
    )
    with fleet:
        fleet.start()
        first = listed_by(fleet)
        fleet.sim.fault("listing", ticker="NEW-EUR")
        fleet.sim.fault("listing", ticker=new)
        until(lambda: is_recorded(new), fleet.brief)
        fleet.sim.fault("tick_size", ticker=stays)
        until(lambda: fleet.published("instruments") == 4, fleet.brief)
        fleet.sim.fault("delist", ticker=leaves)
        until(lambda: is_left(leaves), fleet.brief)
        fleet.sim.fault("listing", ticker=leaves)
        until(lambda: is_recorded(leaves), fleet.brief)
        fleet.sim.fault("delist", ticker=new, mode="halted")
        until(lambda: is_left(new), fleet.brief)
        last = listed_by(fleet)
        agrees(fleet)
    told: dict[str, list[tuple[bool, float]]] = {}
    for row in fleet.rows("instruments"):
        told.setdefault(row["ticker"], []).append((row["active"], row["tick_size"]))
    assert told == {
        stays: [first[stays], last[stays]],
        leaves: [first[leaves], (False, first[leaves][1]), first[leaves]],
        new: [(True, last[new][1]), last[new]],
    }
    assert (last[stays][1], last[new][0]) == (first[stays][1] / 10, False)


# Frames that are no good


@pytest.mark.parametrize("mode", ["fragments", "tcp"])
def test_split_frames_are_put_together(start: Start, mode: str) -> None:
    """F16."""
    fleet = start()
    fleet.sim.fault("split", mode=mode, parts=4, rate=0.3)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] >= 100, 30)
    agrees(fleet)
    assert not fleet.prove().gaps
    assert not fleet.counters("refused_")


def test_garbage_is_counted_by_reason_and_the_connection_stays(start: Start) -> None:
    """F16. Nothing was lost by it, but a frame of a book that cannot be read might have been a loss: the book is retaken."""
    fleet = start(rate=100)
    count = 10 * 7  # each kind in turn
    fleet.sim.fault("garbage", every=0.05, count=count)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] == count, 30)
    refused = until(
        lambda: sum((r := fleet.counters("refused_")).values()) >= count and r, lambda: f"counted; {fleet.brief()}"
    )
    assert len(refused) >= 4, refused
    assert sum(refused.values()) == count, refused
    assert set(refused) <= set(fleet.stats()["samples"])
    assert fleet.counter("connections") == 1
    agrees(fleet)
    assert {cause for _, cause in book_gaps(fleet)} <= {"refused"}


def test_truncated_json_is_a_counted_loss(start: Start) -> None:
    """F16. Half a message: trades are found missing and repaired, books are taken anew."""
    fleet = start(feeds=("trades", "orderbook_l2"))
    fleet.sim.fault("truncate", every=0.3, count=8)
    fleet.sim.wait_state(lambda state: state["faults"][0]["fired"] == 8)
    until(lambda: sum(fleet.counters("refused_").values()) >= 8, lambda: f"eight refused frames; {fleet.brief()}")
    assert fleet.counter("connections") == 1
    fleet.wait_more("trades", 40)
    agrees(fleet)
    assert fleet.prove().feeds["trades"].explained == 0


# Markets that look odd


def test_a_crossed_book_is_flagged_while_it_is_crossed(start: Start) -> None:
    """F19."""
    fleet = start()
    fleet.sim.fault("cross", ticker=TICKERS[0], ms=1200)
    fleet.wait_counter("book_crossed")
    fleet.wait_more("orderbook_l2", 200)
    agrees(fleet)
    flagged = {row["ticker"] for row in fleet.rows("orderbook_l2") if row["flags"] & 8}
    assert flagged == {TICKERS[0]}
    assert not fleet.prove().gaps


def test_the_exchange_clock_is_wrong(start: Start) -> None:
    """F17. Event times step; trades and tickers are stored as the venue gave them, and trade ids do not depend on them."""
    fleet = start(feeds=("trades", "bbo", "tickers"))
    fleet.sim.fault("clock_skew", ms=2000, seconds=2)
    fleet.wait_more("trades", 60)
    agrees(fleet)
    assert any(row["timestamp"] - row["rcv_timestamp"] > 900_000 for row in fleet.rows("trades")), "the skew shows"


# Credentials


def channels(fleet: Fleet) -> set[str]:
    names = [name for conn in fleet.sim.state()["connections"] for name in conn["subscriptions"]]
    return {name.partition(":")[0] for name in names}


def test_with_a_key_every_single_change_is_recorded(start: Start) -> None:
    fleet = start(env=ENV, sim=ACCEPTED)
    assert channels(fleet) == {"level2", "matches", "heartbeat", "ticker"}
    assert fleet.stats()["notes"] == {}
    fleet.sim.fault("disconnect")
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    agrees(fleet, book_stream="level2")
    said = fleet.tail() + str(fleet.stats())
    assert not [name for name in ("secret", "passphrase") if KEY[name] in said]


def test_wrong_credentials_are_said_and_the_public_channels_recorded(start: Start) -> None:
    other = base64.b64encode(b"another secret").decode()
    fleet = start(env={**ENV, "MDCOLLECTOR_COINBASE_EXCHANGE_SECRET": other}, sim=ACCEPTED)
    assert channels(fleet) == {"level2_batch", "matches", "heartbeat", "ticker"}
    assert "public channels only" in fleet.stats()["notes"]["credentials"]
    assert fleet.counter("credentials_refused") == 1
    agrees(fleet)
    assert other not in fleet.tail()


def test_a_secret_that_is_none_is_said(start: Start) -> None:
    fleet = start(env={**ENV, "MDCOLLECTOR_COINBASE_EXCHANGE_SECRET": "no base64!"}, sim=ACCEPTED)
    assert channels(fleet) == {"level2_batch", "matches", "heartbeat", "ticker"}
    assert "not base64" in fleet.stats()["notes"]["credentials"]
    agrees(fleet)


# The venue's file alone


class Alone:
    """The venue without a connection; what it wants is taken from `wants` by hand."""

    def __init__(self, folder: Path, *tickers: str, **options: Any) -> None:
        self.emit = Emit(folder, "t", CoinbaseExchange.EXCHANGE, FEEDS, semaphore=False, capacities=dict.fromkeys(
            (*FEEDS, "gaps"), 4096))  # fmt: skip
        given = Options(**options)
        streams = [s for ticker in tickers for s in CoinbaseExchange.streams_of(ticker, FEEDS, given)]
        self.venue = CoinbaseExchange(self.emit, given, streams)
        self.now_s = 1_796_083_200.0
        self.pass_s(0)

    def pass_s(self, seconds: float) -> None:
        """Time goes by, and the housekeeping of a connection runs."""
        self.now_s += seconds
        self.emit.packet(int(self.now_s * 1e9), self.emit.clock())
        self.venue.tick(int(self.now_s * 1e9))

    def hear(self, kind: str, **words: Any) -> None:
        moment = datetime.fromtimestamp(words.pop("at", self.now_s), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.raw(json.dumps({"type": kind, "time": moment, **words}, separators=(",", ":")).encode())

    def raw(self, frame: bytes) -> None:
        try:
            self.venue.decode(frame)
        except (FrameError, msgspec.DecodeError) as error:
            self.emit.refused_error(error, frame)
            raise

    def snapshot(self, bids: dict[str, str], asks: dict[str, str], **words: Any) -> None:
        sides = {"bids": list(bids.items()), "asks": list(asks.items())}
        self.hear("snapshot", product_id=TICKERS[0], **sides, **words)

    def update(self, *changes: tuple[str, str, str], **words: Any) -> None:
        self.hear("l2update", product_id=TICKERS[0], changes=changes, **words)

    def sent(self) -> list[Any]:
        """The messages that are to be sent now."""
        texts = [json.loads(want.text) for want in self.venue.wants if isinstance(want, Send)]
        self.venue.wants.clear()
        return texts

    def fetches(self) -> list[Fetch]:
        found = [want for want in self.venue.wants if isinstance(want, Fetch)]
        self.venue.wants.clear()
        return found

    def reply(self, message: Any) -> None:
        """The reply that confirms a request, in the words recorded on 2026-09-30."""
        names = {"level2_batch": "level2_50"}
        channels = [{**c, "name": names.get(c["name"], c["name"]), "account_ids": None} for c in message["channels"]]
        self.hear("subscriptions", channels=channels)

    def gaps(self) -> list[tuple[str, int, int]]:
        rows = self.emit.rings["gaps"].recent_rows(0)
        return [(row["cause"].decode(), int(row["first_id"]), int(row["last_id"])) for row in rows]

    def ids(self) -> list[int]:
        return list(dict.fromkeys(self.emit.rings["orderbook_l2"].recent_rows(0)["update_id"].tolist()))

    @property
    def book(self) -> BookSync:
        return self.venue.books[TICKERS[0]]

    @property
    def counters(self) -> Counter[str]:
        return self.emit.counters


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Callable[..., Alone]]:
    made: list[Alone] = []

    def make(*tickers: str, **options: Any) -> Alone:
        made.append(Alone(tmp_path / str(len(made)), *(tickers or TICKERS), **options))
        return made[-1]

    yield make
    for one in made:
        one.emit.close()


def test_a_stream_is_confirmed_when_all_its_channels_are(alone: Callable[..., Alone]) -> None:
    one = alone(TICKERS[0])
    one.venue.opened()
    (message,) = one.sent()
    one.venue.unsubscribe([f"level2_batch:{TICKERS[0]}"])
    assert [c["name"] for c in one.sent()[0]["channels"]] == ["level2_batch"], "matches still need the heartbeats"
    assert {c["name"]: c["product_ids"] for c in message["channels"]} == {
        "matches": [TICKERS[0]], "heartbeat": [TICKERS[0]], "level2_batch": [TICKERS[0]], "ticker": [TICKERS[0]]
    }  # fmt: skip
    names = ("matches", "level2_50", "ticker", "heartbeat")  # level2_batch is called so in replies (recorded)
    channels = [{"name": name, "product_ids": [TICKERS[0]]} for name in names]
    one.hear("subscriptions", channels=channels[:-1])
    proof = one.venue.proof
    assert [name for name, state in proof.items() if state.acknowledged_ns] == [f"ticker:{TICKERS[0]}"]
    assert "left out of the reply" in proof[f"matches:{TICKERS[0]}"].refused, "without heartbeats"
    one.venue.opened()
    one.hear("subscriptions", channels=channels)
    assert all(state.acknowledged_ns and not state.refused for state in proof.values())


def test_a_request_without_an_answer_is_not_taken_for_the_next_one(alone: Callable[..., Alone]) -> None:
    """The reply to the second request lists what that one asked for: nothing of the first is refused for it."""
    one = alone(*TICKERS)
    one.venue.subscribe([f"ticker:{TICKERS[0]}"])
    one.venue.subscribe([f"ticker:{TICKERS[1]}"])
    one.reply(one.sent()[1])
    proof = one.venue.proof
    assert proof[f"ticker:{TICKERS[1]}"].acknowledged_ns
    assert not proof[f"ticker:{TICKERS[0]}"].acknowledged_ns
    assert not proof[f"ticker:{TICKERS[0]}"].refused
    assert one.counters["request_unanswered"] == 1


@pytest.mark.parametrize("is_named", [True, False])
def test_what_a_request_is_refused_for_is_found(is_named: bool, alone: Callable[..., Alone]) -> None:
    """The venue refuses each request that holds one certain subscription; an error does not say which request it is of."""
    names = [f"T{n}-USD" for n in range(7)]
    one = alone(*names)
    one.venue.opened()
    requests = one.sent()
    while requests:
        for message in requests:
            wanted = {c["name"]: c["product_ids"] for c in message["channels"]}
            if "T5-USD" in wanted.get("ticker", []):
                words = {"reason": "T5-USD is not a valid product"} if is_named else {}
                one.hear("error", message="Failed to subscribe", **words)
            else:
                one.reply(message)
        requests = one.sent()
    refused = {name for name, state in one.venue.proof.items() if state.refused}
    own = {f"{channel}:T5-USD" for channel in ("matches", "level2_batch", "ticker")}
    assert refused == (own if is_named else {"ticker:T5-USD"})
    assert all(state.acknowledged_ns for name, state in one.venue.proof.items() if name not in refused)


def test_an_error_of_nothing_that_was_asked_is_refused(alone: Callable[..., Alone]) -> None:
    with pytest.raises(FrameError) as refused:
        alone().hear("error", message="Server is going away")
    assert refused.value.reason == "venue_error"


def test_requests_are_signed_and_show_no_secret(alone: Callable[..., Alone]) -> None:
    one = alone(TICKERS[0], credentials=KEY)
    one.venue.opened()
    (message,) = one.sent()
    text = f"{message['timestamp']}GET/users/self/verify".encode()
    digest = hmac.new(base64.b64decode(SECRET), text, hashlib.sha256).digest()
    assert base64.b64decode(message["signature"]) == digest
    assert (message["key"], message["passphrase"]) == (KEY["key"], KEY["passphrase"])
    assert SECRET not in json.dumps(message)
    assert "level2" in {c["name"] for c in message["channels"]}


def test_credentials_that_are_refused_are_refused_to_every_request_under_way(alone: Callable[..., Alone]) -> None:
    """Each was signed, so each is answered so, and each is made once more without them."""
    tickers = [f"T{i}-USD" for i in range(70)]
    one = alone(*tickers, credentials=KEY)
    one.venue.opened()
    requests = one.sent()
    assert len(requests) > 1
    for _ in requests:
        one.hear("error", message="Authentication Failed", reason="invalid signature")
    again = one.sent()
    assert len(again) == len(requests)
    assert not [message for message in again if "signature" in message]
    asked = {(c["name"], ticker) for message in again for c in message["channels"] for ticker in c["product_ids"]}
    assert asked == {(name, t) for name in ("matches", "heartbeat", "level2_batch", "ticker") for t in tickers}
    assert one.emit.counters["credentials_refused"] == 1
    assert not [state for state in one.venue.proof.values() if state.refused]


def test_feeds_of_one_channel_share_a_stream() -> None:
    streams = CoinbaseExchange.streams_of("A-B", ["bbo", "tickers"], Options())
    assert streams == [Stream("ticker:A-B", "bbo", "A-B", also=("tickers",))]


def test_a_long_hole_is_fetched_in_pages_that_end_where_the_next_begins(alone: Callable[..., Alone]) -> None:
    one = alone()
    venue, time_of = one.venue, "2026-11-24T02:00:00.000000Z"
    for seq in (1000, 3600):
        one.hear("match", trade_id=seq, product_id=TICKERS[0], side="buy", size="1", price="2")
    seen: list[tuple[int, int]] = []
    while fetches := one.fetches():
        (fetch,) = fetches
        query = parse_qs(urlsplit(fetch.path).query)
        after, limit = int(query["after"][0]), int(query["limit"][0])
        seen.append((after - limit, after - 1))
        rows = [{"trade_id": i, "side": "buy", "size": "1", "price": "2", "time": time_of}
                for i in range(after - 1, after - limit - 1, -1)]  # fmt: skip
        venue.http("https://api.exchange.coinbase.com" + fetch.path, json.dumps(rows).encode())
    assert seen == [(1001, 2000), (2001, 3000), (3001, 3599)]
    assert sorted(one.emit.rings["trades"].recent_rows(0)["trade_seq"].tolist()) == list(range(1000, 3601))
    assert one.gaps()[-1] == ("filled", 1001, 3599)


def test_half_of_a_refused_update_is_not_applied(alone: Callable[..., Alone]) -> None:
    one = alone()
    one.snapshot({"10": "1"}, {"20": "1"})
    for bad in ("1e300", "-1", "nan", "x", ""):
        one.pass_s(1)
        with pytest.raises((FrameError, msgspec.DecodeError)):
            one.update(("buy", "11", "5"), ("sell", "19", bad))
        assert one.book.book() == ({10.0: 1.0}, {20.0: 1.0})
    assert [cause for cause, _, _ in one.gaps()] == ["refused"], "given up once"


@pytest.mark.parametrize(("frame", "broken"), [
    (b'{"type":"l2update","product_id":"BTC-U', TICKERS),
    (b'{"type":"snapshot","prod', TICKERS),
    (b'{"type":"l2up', TICKERS),
    (b'{"type":"', TICKERS),
    (b'{"type":"l2update","product_id":"BTC-USD","chan', TICKERS[:1]),
    (b'{"type":"l2update","product_id":"NO-USD","chan', ()),  # of an instrument that was left
    (b'{"type":"match","trade_id":10,"prod', ()),
    (b'{"type":"hear', ()),
    (b'{"bids":[["10","1",2],["9', ()),  # the answer to an audit
])  # fmt: skip
def test_a_frame_that_was_cut_off_costs_every_book_that_it_may_be_of(
    frame: bytes, broken: tuple[str, ...], alone: Callable[..., Alone]
) -> None:
    one = alone()
    for ticker in TICKERS:
        one.hear("snapshot", product_id=ticker, bids=[["10", "1"]], asks=[["20", "1"]])
    with pytest.raises((FrameError, msgspec.DecodeError)):
        one.raw(frame)
    assert {t: book.state for t, book in one.venue.books.items()} == {
        t: "broken" if t in broken else "live" for t in TICKERS
    }
    assert [cause for cause, _, _ in one.gaps()] == ["refused"] * len(broken)
    one.pass_s(1)
    asked = [(m["type"], c["product_ids"]) for m in one.sent() for c in m["channels"] if c["name"] == "level2_batch"]
    assert asked == [(kind, list(broken)) for kind in ("unsubscribe", "subscribe") if broken]


def test_levels_without_a_time_of_the_venue_are_applied_in_their_order(alone: Callable[..., Alone]) -> None:
    """A frame of the year 1 is recorded (sample exch_l2update_04)."""
    one = alone()
    one.snapshot({"10": "1"}, {"20": "1"})
    one.update(("buy", "11", "5"), time="0001-01-01T00:00:00.000000Z")
    one.update(("buy", "11", "6"), time="0001-01-01T00:00:00.000000Z")
    start = int(one.now_s * 1e6)
    assert one.ids() == [start, start + 1, start + 2]
    assert one.book.book()[0] == {10.0: 1.0, 11.0: 6.0}
    assert one.gaps() == []


# A second connection beside the first one


def test_a_new_connection_that_is_ahead_brings_the_book_forward_without_a_hole(alone: Callable[..., Alone]) -> None:
    one = alone()
    one.snapshot({"10": "1", "9": "1"}, {"20": "1", "21": "1"})
    one.venue.overlapping = True
    one.pass_s(1)
    one.snapshot({"10": "3", "8.5": "1"}, {"20": "1", "19": "2"})  # 9 is gone; 21 lies beyond what it shows
    assert one.book.book() == ({10.0: 3.0, 8.5: 1.0}, {20.0: 1.0, 19.0: 2.0, 21.0: 1.0})
    one.update(("buy", "10", "2"), at=one.now_s - 0.5)  # the old connection is behind: already contained
    assert one.book.book()[0][10.0] == 3.0
    one.venue.overlapping = False
    one.update(("buy", "10", "2"), at=one.now_s - 0.2)  # what was on its way when it ended
    one.pass_s(1)
    one.update(("buy", "10", "4"))
    assert one.book.book()[0][10.0] == 4.0
    assert one.gaps() == []
    assert one.counters["book_duplicate"] == 2


def test_a_new_connection_that_is_behind_changes_nothing(alone: Callable[..., Alone]) -> None:
    one = alone()
    one.snapshot({"10": "1"}, {"20": "1"})
    one.pass_s(1)
    one.update(("buy", "10", "2"))
    one.venue.overlapping = True
    one.snapshot({"10": "1"}, {"20": "1"}, at=one.now_s - 0.5)
    assert one.book.book()[0] == {10.0: 2.0}
    assert one.gaps() == []


# Instruments that are left


def test_a_ticker_of_an_instrument_that_was_left_is_refused(alone: Callable[..., Alone]) -> None:
    one = alone()
    words = {"product_id": TICKERS[0], "price": "10", "best_bid": "9", "best_bid_size": "1", "best_ask": "11",
             "best_ask_size": "1"}  # fmt: skip
    one.hear("ticker", sequence=1, **words)
    one.venue.remove([TICKERS[0]], connected=True)
    one.pass_s(1)
    with pytest.raises(FrameError, match=TICKERS[0]):
        one.hear("ticker", sequence=2, **words)
    assert [len(one.emit.rings[feed].recent_rows(0)) for feed in ("tickers", "bbo")] == [1, 1]
    one.venue.add(CoinbaseExchange.streams_of(TICKERS[0], FEEDS, Options()), connected=True)
    one.hear("ticker", sequence=3, **words)
    assert [len(one.emit.rings[feed].recent_rows(0)) for feed in ("tickers", "bbo")] == [2, 2]


# Audits


def audit_of(one: Alone, bids: dict[str, str], asks: dict[str, str], at: float | None = None, **words: Any) -> None:
    """Let the audit come to its request, answer it, and let the stream pass the answer."""
    one.pass_s(3)
    one.pass_s(1.5)
    (fetch,) = one.fetches()
    assert fetch.path == f"/products/{TICKERS[0]}/book?level=2"
    moment = datetime.fromtimestamp(at or one.now_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    sides = {name: [[p, q, 1] for p, q in levels.items()] for name, levels in (("bids", bids), ("asks", asks))}
    assert fetch.answer is not None
    fetch.answer(json.dumps({"sequence": 1, **sides, "auction_mode": False, "time": moment, **words}).encode())


@pytest.fixture
def audited(alone: Callable[..., Alone]) -> Alone:
    one = alone()
    one.snapshot({"10": "1", "9": "1"}, {"20": "1", "21": "1"})
    return one


RIGHT = {"10": "1.000", "9": "1"}, {"20": "1", "21": "1"}


def beat(one: Alone) -> None:
    """A heartbeat that shows that the stream has passed the answer."""
    one.pass_s(3)
    one.hear("heartbeat", product_id=TICKERS[0], last_trade_id=1, sequence=1)
    one.pass_s(0.1)


def test_an_audit_that_agrees_proves_the_book_up_to_its_begin(audited: Alone) -> None:
    audit_of(audited, *RIGHT)
    beat(audited)  # no update comes: the heartbeat shows that none is late
    assert audited.counters["book_audited"] == 1
    audited.pass_s(3)
    audited.update(("buy", "10", "2"))
    audit_of(audited, {"10": "2", "9": "1"}, {"20": "1", "21": "5"})
    beat(audited)
    begun = int((1_796_083_200.0) * 1e6)
    assert audited.gaps() == [("audit", begun + 1, audited.book.last_id + 1)], "from the snapshot that the first proved"
    assert audited.counters["book_audit_failed"] == 1
    assert "ask 21.0: 1.0, not 5.0" in audited.emit.samples["book_audit_failed"]


def test_an_audit_waits_for_the_stream(audited: Alone) -> None:
    audited.pass_s(3)
    audited.update(("buy", "10", "7"), at=audited.now_s)  # between the begin of the audit and its request
    at = audited.now_s + 2
    audit_of(audited, {"9": "1", "10.5": "4"}, RIGHT[1], at=at)
    audited.pass_s(1)
    assert not audited.counters["book_audited"] + audited.counters["book_audit_failed"], "the stream is not there yet"
    audited.update(("buy", "10", "0"), ("buy", "10.5", "4"), at=at + 0.1)
    audited.pass_s(0.1)
    assert audited.counters["book_audited"] == 1
    assert audited.gaps() == []


def test_an_audit_forgives_what_changed_behind_the_answer(audited: Alone) -> None:
    audit_of(audited, *RIGHT)
    audited.update(("buy", "10", "5"), ("sell", "19", "1"), at=audited.now_s + 0.05)
    audited.pass_s(0.1)
    assert audited.counters["book_audited"] == 1
    assert audited.gaps() == []


def test_an_audit_looks_no_further_than_the_snapshot_did(audited: Alone) -> None:
    """The recorded snapshot of 2026 has 150 levels a side; updates tell of others, of some nobody ever told."""
    audit_of(audited, {**RIGHT[0], "8": "3"}, {**RIGHT[1], "30": "2"})
    beat(audited)
    assert audited.counters["book_audited"] == 1


@pytest.mark.parametrize(("words", "counter"), [
    ({"auction_mode": True}, "book_audit_unusable"),
    ({"time": None}, "book_audit_unusable"),
    ({"time": "2020-01-01T00:00:00Z"}, "book_audit_outdated"),
])  # fmt: skip
def test_an_answer_of_no_use_proves_nothing_and_blames_nobody(words: Any, counter: str, audited: Alone) -> None:
    audit_of(audited, {"10": "9"}, {"20": "9"}, **words)
    beat(audited)
    assert audited.counters[counter] == 1
    assert not audited.counters["book_audited"] + audited.counters["book_audit_failed"]
    assert audited.gaps() == []


def test_a_book_that_begins_anew_ends_its_audit(audited: Alone) -> None:
    audited.pass_s(3)
    audited.pass_s(1)
    audited.snapshot({"10": "3"}, {"20": "3"})
    audited.pass_s(1)
    audited.fetches()
    audit_of(audited, {"10": "3"}, {"20": "3"})
    beat(audited)
    assert audited.counters["book_audited"] == 1


@pytest.mark.parametrize(("answered", "found"), [("1", "2"), ("2", "1")])
def test_a_new_connection_that_brings_a_book_forward_ends_its_audit(answered: str, found: str, audited: Alone) -> None:
    """What the older connection still brings of the time between is not looked at: also a change that was taken back."""
    audit_of(audited, {**RIGHT[0], "10": answered}, RIGHT[1])
    audited.venue.overlapping = True
    audited.now_s += 0.5
    audited.snapshot({**RIGHT[0], "10": found}, RIGHT[1])
    audited.update(("buy", "10", "2"), at=audited.now_s - 0.6)
    audited.pass_s(0.1)
    audited.venue.overlapping = False
    assert audited.gaps() == []
    audit_of(audited, {**RIGHT[0], "10": found}, RIGHT[1])
    beat(audited)
    assert (audited.counters["book_audited"], audited.counters["book_audit_failed"]) == (1, 0)


def test_a_refused_audit_is_counted_and_the_next_one_comes(audited: Alone) -> None:
    audited.pass_s(3)
    audited.pass_s(1.5)
    (fetch,) = audited.fetches()
    audited.venue.http_failed(fetch, 404, b'{"message":"NotFound"}')
    assert audited.counters["book_audit_refused"] == 1
    assert f"audit of {TICKERS[0]} refused" in audited.venue.notes
    audit_of(audited, *RIGHT)
    beat(audited)
    assert audited.counters["book_audited"] == 1


def test_an_audit_does_not_blame_a_stream_that_is_late(audited: Alone) -> None:
    """The answer shows what the stream has not brought yet, and no heartbeat says that it should have."""
    audit_of(audited, {"10": "2", "9": "1"}, {"20": "1", "21": "1"})
    for _ in range(40):
        audited.hear("heartbeat", product_id=TICKERS[0], last_trade_id=1, sequence=1, at=1_796_083_203.0)
        audited.pass_s(1.6)
    assert audited.counters["book_audit_given_up"] == 1
    assert audited.gaps() == []


def test_a_silent_stream_is_probed_by_its_newest_trade(alone: Callable[..., Alone]) -> None:
    one = alone()
    for stream in one.venue.streams:
        fetch = one.venue.probe(stream)
        assert fetch is not None
        assert fetch.path == f"/products/{stream.ticker}/trades?limit=1"
        row = {"trade_id": 7, "side": "buy", "size": "1", "price": "2", "time": "2026-09-30T02:03:12.751234Z"}
        assert one.venue.newest_us(stream, json.dumps([row]).encode()) == 1_790_733_792_751_234
        assert one.venue.newest_us(stream, b"[]") == 0
