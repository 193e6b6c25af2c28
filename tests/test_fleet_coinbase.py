"""What only Advanced Trade has: one number for all messages of a connection, greetings, tokens. Real processes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from fleet import Fleet, mdcollector, until

Start = Callable[..., Fleet]
TICKERS = ("BTC-USD", "ETH-USD", "SOL-USD")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a fleet on Coinbase that collects; it is ended with the test."""
    with ExitStack() as stack:

        def make(**options: Any) -> Fleet:
            return stack.enter_context(Fleet(tmp_path / "coinbase", "coinbase", **options)).start()

        yield make


def causes(fleet: Fleet) -> Counter[tuple[str, str, str]]:
    return Counter((gap["feed"], gap["ticker"], gap["cause"]) for gap in fleet.holes() if not gap["repaired"])


def subscriptions(fleet: Fleet) -> list[str]:
    return [name for conn in fleet.sim.state()["connections"] for name in conn["subscriptions"]]


# One number for all messages


def test_a_jump_on_a_heartbeat_breaks_every_book_and_all_come_back(start: Start) -> None:
    """F8. Nothing else is sent when it happens: the market stands still, a heartbeat is lost, the next one shows it."""
    fleet = start()
    fleet.sim.pause()
    fleet.sim.fault("drop", stream="heartbeats")
    fleet.wait_counter("lost_sequence")
    fleet.settle()
    until(
        lambda: fleet.counter("gap_candles_resync") == 3, lambda: f"every channel is subscribed anew; {fleet.brief()}"
    )
    fleet.sim.resume()
    fleet.wait_more("trades", 40)
    assert fleet.counter("connections") == 1
    proof = fleet.finish()
    assert proof.ok, str(proof)
    every = dict.fromkeys((("orderbook_l2", ticker, "sequence") for ticker in TICKERS), 1)
    every |= dict.fromkeys((("bbo", ticker, "resync") for ticker in TICKERS), 1)
    every |= dict.fromkeys((("candles", ticker, "resync") for ticker in TICKERS), 1)
    every |= {(feed, "*", "sequence"): 1 for feed in ("bbo", "tickers", "candles")}
    assert causes(fleet) == every
    snapshots = Counter(row["ticker"] for row in fleet.rows("orderbook_l2") if row["flags"] & 3 == 3)
    assert snapshots == dict.fromkeys(TICKERS, 2)


def test_a_heartbeat_counter_that_skips_is_a_loss_too(start: Start) -> None:
    """The server left heartbeats out before it numbered them."""
    fleet = start()
    fleet.sim.wait_state(lambda state: state["connections"][0]["seconds"] > 3, 30)  # some heartbeats are there
    fleet.wait_more("trades")
    fleet.sim.fault("no_heartbeat_answer", seconds=2.5)
    fleet.wait_counter("lost_heartbeat")
    assert fleet.counter("lost_sequence") == 0
    fleet.settle()
    fleet.wait_more("trades", 40)
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert {(feed, cause) for feed, cause in proof.gaps} >= {("orderbook_l2", "heartbeat"), ("tickers", "heartbeat")}


@pytest.mark.parametrize("stream", ["level2:", "market_trades:", "ticker:", "candles:"])
def test_a_lost_message_of_any_channel(start: Start, stream: str) -> None:
    """Trades come back from the greeting of the next subscription, in full; everything else is in the ledger."""
    fleet = start()
    fleet.sim.fault("drop", stream=stream)
    fleet.wait_counter("lost_sequence")
    fleet.settle()
    fleet.wait_more("trades", 40)
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert proof.feeds["trades"].explained == 0
    assert fleet.counter("connections") == 1
    assert {ticker for feed, ticker, _ in causes(fleet) if feed == "orderbook_l2"} == set(TICKERS)


def test_doubled_and_reordered_messages(start: Start) -> None:
    """F11. A repeated number is dropped; two that changed places are a loss and a late one. No row is there twice."""
    fleet = start()
    fleet.sim.fault("duplicate", rate=0.2, count=60)
    fleet.wait_counter("sequence_duplicate", 60)
    assert not fleet.counters("lost_")
    for stream in ("level2:", "market_trades:"):
        before = fleet.counter("lost_sequence")
        fleet.sim.fault("reorder", stream=stream)
        fleet.wait_counter("lost_sequence", before + 1)
        fleet.settle()
    fleet.wait_more("trades", 60)
    agrees = fleet.finish()
    assert agrees.ok, str(agrees)
    assert agrees.feeds["trades"].explained == 0


def test_200_books_at_once(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """F3. One lost message costs all books of the connection: a few messages bring them all back, none too many."""
    tickers = ",".join(f"T{n:03d}-USD:1" for n in range(200))
    with Fleet(
        tmp_path, "coinbase", tickers=["T*-USD"], sim_tickers=tickers, rate=3, feeds=("trades", "orderbook_l2")
    ) as fleet:
        fleet.start()
        until(lambda: fleet.stats().get("books") == 200, "200 books", 60)
        fleet.settle(60)
        began, asked = monotonic(), fleet.sim.state()["counts"]["client_messages"]
        fleet.sim.fault("drop", stream="level2:")
        fleet.wait_counter("gap_orderbook_l2_sequence", 200)
        fleet.settle(60)
        record_property("resync_of_200_books_s", monotonic() - began)
        state = fleet.sim.state()
        assert state["counts"]["client_messages"] - asked <= 16
        assert state["counts"].get("http_429", 0) == 0
        assert not state["violations"]
        proof = fleet.finish(to_the_end=False)
        assert proof.ok, str(proof)


# Greetings


def test_a_hole_longer_than_the_greeting_is_fetched(start: Start) -> None:
    """F18. The greeting has five trades here; the rest of the hole is asked for by time, page by page."""
    fleet = start(sim=("--limit", "greeting_trades=5"), rate=200)
    fleet.sim.fault("freeze", seconds=3)
    fleet.wait_counter("lost_sequence")
    fleet.settle()
    fleet.wait_counter("gap_trades_filled_repaired", 3)
    fleet.wait_more("trades", 60)
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert proof.feeds["trades"].explained == 0
    assert proof.feeds["trades"].repaired > 3 * 5
    paths = fleet.sim.state()["paths"] if fleet.sim.process.poll() is None else {}
    assert not paths or any(path.endswith("/ticker") for path in paths)
    assert fleet.counter("trade_repair_incomplete") == 0


def test_trades_of_the_greeting_are_not_stored_again(start: Start) -> None:
    """F18. Each of these connections greets with trades that are in the table already."""
    fleet = start()
    for connections in (2, 3, 4):
        fleet.sim.fault("close")
        fleet.wait_counter("connections", connections)
        fleet.wait_live()
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert proof.feeds["trades"].explained == 0
    assert not [cause for feed, cause in proof.gaps if feed == "trades"]
    ids = [(row["ticker"], row["trade_seq"]) for row in fleet.rows("trades")]
    assert len(ids) == len(set(ids))


def test_a_stream_that_is_acknowledged_and_silent_is_taken_anew(start: Start) -> None:
    """F1. Trades and the book of one product: REST shows a newer trade. The others and the connection go on."""
    fleet, hit = start(silent_s=1.0), TICKERS[0]
    for channel in ("market_trades", "level2"):
        fleet.sim.fault("silence", stream=f"{channel}:", ticker=hit, until="left")
    fleet.wait_counter("stream_recovered", 2)
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert fleet.counter("connections") == 1, "the connection stays"
    silent = {(gap["feed"], gap["ticker"]) for gap in fleet.rows("gaps") if gap["cause"] == "silent"}
    assert {ticker for _, ticker in silent} == {hit}
    assert proof.feeds["trades"].repaired > 0, "trades are fetched, the others are lost"
    assert [proof.feeds[feed].explained > 0 for feed in ("trades", "orderbook_l2", "bbo")] == [False, True, True]


def test_a_planned_replacement_ends_one_connection_before_the_next(start: Start) -> None:
    """F5. Numbers of two connections have nothing to do with each other: no overlap, and no trade is missing."""
    fleet = start(lifetime_s=3.0)
    fleet.wait_counter("connections", 3)
    fleet.wait_live()
    opened = [conn for conn in fleet.sim.ledger().connections if conn["event"] in ("open", "close")]
    assert [conn["event"] for conn in opened[:4]] == ["open", "close", "open", "close"]
    assert fleet.counter("rollovers") == 0
    # A replacement that meets the exchange's end has no next connection to tell its hole: let nothing happen in it.
    fleet.sim.pause()
    paused_s = fleet.sim.state()["seconds"]
    fleet.sim.wait_state(lambda state: state["seconds"] > paused_s + 1)  # what waited for its timer is published
    fleet.wait_counter("gap_bbo_reconnect", fleet.counter("gap_bbo_reconnect") + 1)
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert proof.feeds["trades"].explained == 0


# Subscriptions


def test_one_refused_product_does_not_take_its_batch_with_it(start: Start) -> None:
    """F13. The venue refuses the whole message and names nothing: it is halved until only the refused one is left."""
    fleet = start()
    fleet.sim.fault("refuse", stream="level2:ETH-USD", count=3)
    fleet.sim.fault("disconnect")
    fleet.wait_counter("stream_refused")
    assert [name for name, proof in fleet.stats()["streams"].items() if proof["refused"]] == ["level2:ETH-USD"]
    assert fleet.stats()["notes"]["refused level2:ETH-USD"] == "subscription refused"
    until(lambda: {f"level2:{t}" for t in ("BTC-USD", "SOL-USD")} <= set(subscriptions(fleet)), "the others are there")
    assert "level2:ETH-USD" not in subscriptions(fleet)
    assert fleet.counter("subscribe_bisected") == 2
    fleet.wait_more("orderbook_l2", 30)
    assert fleet.connector.poll() is None


def test_best_prices_alone(start: Start) -> None:
    """They need the book, which is kept and not stored; nobody takes it for a silent one."""
    fleet = start(feeds=("bbo",), stale_s=1.0)
    assert set(subscriptions(fleet)) == {"heartbeats:heartbeats", *(f"level2:{ticker}" for ticker in TICKERS)}
    fleet.wait_more("bbo", 200)
    assert fleet.counter("stale") == 0
    fleet.sim.fault("drop", stream="level2:")
    fleet.wait_counter("gap_bbo_resync", 3)
    fleet.wait_more("bbo", 50)
    proof = fleet.finish(to_the_end=False)
    assert proof.ok, str(proof)


def test_an_alias_is_named_in_the_refusal(tmp_path: Path) -> None:
    with Fleet(tmp_path, "coinbase", tickers=["BTC-USD", "BTC-USDC"], sim_tickers="BTC-USD") as fleet:
        assert fleet.connect().wait(30) == 78
        assert "BTC-USDC is alias of BTC-USD" in fleet.logs[0].read_text()


def test_a_snapshot_of_40000_levels(start: Start) -> None:
    """F16. Several MB in one message, on the wire and into the ring."""
    fleet = start(
        tickers=["BTC-USD"], sim_tickers="BTC-USD:1", sim=("--depth", "21000"), feeds=("trades", "orderbook_l2")
    )
    fleet.wait_more("orderbook_l2", 60)
    proof = fleet.finish(to_the_end=False)
    assert proof.ok, str(proof)
    assert sum(1 for row in fleet.rows("orderbook_l2") if row["flags"] & 2) >= 40_000


# Tokens

KEY_NAME = "organizations/test/apiKeys/test"


def key_pair() -> tuple[str, str]:
    """A private key in PEM, and its public key as the simulator takes it."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()).decode()
    return private, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def env(private: str) -> dict[str, str]:
    return {"MDCOLLECTOR_COINBASE_KEY_NAME": KEY_NAME, "MDCOLLECTOR_COINBASE_PRIVATE_KEY": private}


@pytest.mark.parametrize("form", ["lines", "escaped"])
def test_every_message_is_signed_anew(start: Start, form: str) -> None:
    """The simulator takes no token twice, none that is unsigned or valid for longer than two minutes."""
    private, public = key_pair()
    form_of = {"lines": private, "escaped": private.replace("\n", "\\n")}
    fleet = start(env=env(form_of[form]), sim=("--credential", f"{KEY_NAME}:{public}"))
    fleet.sim.fault("disconnect")
    fleet.wait_counter("connections", 2)
    fleet.wait_live()
    assert fleet.counter("credentials_refused") == 0
    assert fleet.stats()["notes"] == {}
    assert private.splitlines()[1] not in fleet.tail()


def test_wrong_credentials_are_said_and_the_data_recorded_without_them(start: Start) -> None:
    private, _ = key_pair()
    _, public = key_pair()
    fleet = start(env=env(private), sim=("--credential", f"{KEY_NAME}:{public}"))
    assert "subscribed without them" in fleet.stats()["notes"]["credentials"]
    assert fleet.counter("credentials_refused") >= 1
    fleet.wait_more("trades", 20)
    proof = fleet.finish()
    assert proof.ok, str(proof)
    assert private.splitlines()[1] not in fleet.tail() + str(fleet.stats())


def test_a_key_of_another_kind_is_a_configuration_error(tmp_path: Path) -> None:
    with Fleet(tmp_path, "coinbase", env=env("c2VjcmV0LW9mLXRoZS10ZXN0cw==")) as fleet:
        assert fleet.connect().wait(30) == 78
        told = fleet.logs[0].read_text()
        assert "private_key is no private key in PEM" in told
        assert "c2VjcmV0" not in told
        done = mdcollector("check", "-c", str(fleet.config))
        assert "c2VjcmV0" not in done.stdout + done.stderr
