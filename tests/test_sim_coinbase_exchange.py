"""The simulated Coinbase Exchange: its messages against its ledger, its dialogue, its REST interface, each of its limits.

cryptofeed has no client of this feed any more: its class Coinbase speaks Advanced Trade, so each of its messages is
wrong here (`channel` for `channels`, other hosts, products and names of channels). Another unmodified library, ccxt,
speaks it, with a signature, and judges the simulator at the end.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from test_sim_cryptofeed import check_trades, interpreter_of

from bench.processes import INSTALL_S
from tools.sim.process import SimProcess

Row = dict[str, Any]
VENUE = "coinbase_exchange"
WITHIN_S = 40.0
NAME = "BTC-USD"
FAST = ("--rate", "200", "--tickers", "BTC-USD:1,ETH-USD:0.5")
SECRET = base64.b64encode(b"a secret of the tests").decode()
KEY = ("--credential", f"someone:{SECRET}")
OPPOSITE = {"buy": "SELL", "sell": "BUY"}


def within(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WITHIN_S))


def us(text: str) -> int:
    moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


class Client:
    """One connection; everything that came is kept."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.rows: list[Row] = []

    async def next(self) -> Row:
        message = await self.ws.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, (message, self.ws.close_code)
        self.rows.append(json.loads(message.data))
        return self.rows[-1]

    async def ask(self, **words: Any) -> Row:
        """Send a request; the reply to it."""
        await self.ws.send_str(json.dumps(words))
        while (row := await self.next())["type"] not in ("subscriptions", "error"):
            pass
        return row

    async def subscribe(self, *channels: str, tickers: tuple[str, ...] = (NAME,), **words: Any) -> Row:
        return await self.ask(type="subscribe", product_ids=list(tickers), channels=list(channels), **words)

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            await self.next()

    async def drain(self) -> None:
        async for message in self.ws:
            if message.type is aiohttp.WSMsgType.TEXT:
                self.rows.append(json.loads(message.data))

    def of(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row["type"] in kinds and row.get("product_id") == NAME]


@asynccontextmanager
async def connect(sim: SimProcess) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session, session.ws_connect(sim.ws_url, max_msg_size=0) as ws:
        yield Client(ws)


async def get(sim: SimProcess, path: str, **query: Any) -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession() as session, session.get(sim.rest_url + path, params=query) as answer:
        return answer.status, json.loads(await answer.text()), answer.headers


def signed(secret: str = SECRET) -> Row:
    text = b"1700000000.5GET/users/self/verify"
    signature = base64.b64encode(hmac.new(base64.b64decode(secret), text, hashlib.sha256).digest()).decode()
    return {"key": "someone", "passphrase": "p", "timestamp": "1700000000.5", "signature": signature}


def apply(book: tuple[dict[str, str], dict[str, str]], row: Row) -> None:
    """What the documentation says about a snapshot and about an update."""
    if row["type"] == "snapshot":
        for side, key in zip(book, ("bids", "asks"), strict=True):
            side.clear()
            side.update(dict(row[key]))
        return
    for side, price, size in row["changes"]:
        levels = book[("buy", "sell").index(side)]
        if Decimal(size):
            levels[price] = size
        else:
            levels.pop(price, None)


@pytest.mark.parametrize("channel", ["level2_batch", "level2"])
def test_every_channel_equals_the_ledger(channel: str, tmp_path: Path) -> None:
    client: list[Client] = []

    async def listen(sim: SimProcess) -> None:
        async with connect(sim) as c:
            client.append(c)
            await c.subscribe(channel, "matches", "ticker", "heartbeat", **signed())
            sim.resume()
            await c.drain()
            assert c.ws.close_code == 1001

    with SimProcess(VENUE, *FAST, *KEY, "--seconds", "4", "--hold", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.wait()
    truth, got = sim.ledger(), client[0]
    wanted = [(t["id"], t["price"], t["qty"], t["side"], t["t"]) for t in truth.trades(NAME).values()]
    assert len(wanted) > 50
    told = [(str(m["trade_id"]), m["price"], m["size"], OPPOSITE[m["side"]], us(m["time"])) for m in got.of("match")]
    assert told == wanted
    snapshot, *updates = got.of("snapshot", "l2update")
    assert (snapshot["type"], {u["type"] for u in updates}) == ("snapshot", {"l2update"})
    book: tuple[dict[str, str], dict[str, str]] = ({}, {})
    replay = {at: (dict(b), dict(a)) for at, (b, a) in truth.books(NAME, channel)}
    apply(book, snapshot)
    assert book == replay[us(snapshot["time"])]
    for update in updates:
        apply(book, update)
        assert book == replay[us(update["time"])]
    assert [us(u["time"]) for u in updates] == [event["last"] for event in truth.book_events(NAME, channel)]
    assert [row["data"] for row in truth.rows("ticker", NAME)] == got.of("ticker")
    best = [(b["id"], b["bid"], b["bid_qty"], b["ask"], b["ask_qty"]) for b in truth.rows("bbo", NAME)]
    keys = ("sequence", "best_bid", "best_bid_size", "best_ask", "best_ask_size")
    assert [tuple(t[key] for key in keys) for t in got.of("ticker")] == best
    beats = got.of("heartbeat")
    ids = {m["trade_id"] for m in got.of("match")}
    assert len(beats) >= 3
    assert all(beat["last_trade_id"] in ids for beat in beats[1:])
    numbers = [row["sequence"] for row in got.of("match", "heartbeat", "ticker")]
    assert numbers == sorted(numbers)


def test_a_connection_in_the_middle_is_greeted_and_its_book_goes_on(tmp_path: Path) -> None:
    client: list[Client] = []

    async def listen(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("ticker", {}).get(NAME, 0) > 5)
        async with connect(sim) as c:
            client.append(c)
            await c.subscribe("level2_batch", "matches", "ticker")
            await c.until(lambda: len(c.of("l2update")) > 10 and bool(c.of("match")))

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    truth, got = sim.ledger(), client[0]
    (snapshot,) = got.of("snapshot")
    book: tuple[dict[str, str], dict[str, str]] = ({}, {})
    apply(book, snapshot)
    at = us(snapshot["time"])
    assert book == truth.book(NAME, at, "level2_batch")
    events = [event["last"] for event in truth.book_events(NAME, "level2_batch")]
    assert us(got.of("l2update")[0]["time"]) == events[events.index(at) + 1]
    (last,) = got.of("last_match")
    ids = list(truth.trades(NAME))
    assert got.of("match")[0]["trade_id"] == int(ids[ids.index(str(last["trade_id"])) + 1])
    assert got.of("ticker")[0] in [row["data"] for row in truth.rows("ticker", NAME)]


def test_subscribing_again_brings_nothing_and_unsubscribing_first_a_snapshot() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            for _ in range(2):
                reply = await c.subscribe("level2_batch", tickers=("BTC-USD", "ETH-USD"))
                assert reply["channels"] == [
                    {"name": "level2_50", "product_ids": ["BTC-USD", "ETH-USD"], "account_ids": None}
                ]
            await c.until(lambda: len(c.of("l2update")) > 5)
            assert len(c.of("snapshot")) == 1
            left = await c.ask(type="unsubscribe", channels=[{"name": "level2_batch", "product_ids": [NAME]}])
            assert left["channels"] == [{"name": "level2_50", "product_ids": ["ETH-USD"], "account_ids": None}]
            await c.subscribe("level2_batch")
            await c.until(lambda: len(c.of("snapshot")) == 2)

    with SimProcess(VENUE, *FAST) as sim:
        within(talk(sim))


def test_what_is_wrong_is_answered_as_the_venue_answers() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            failed = {"type": "error", "message": "Failed to subscribe"}
            both = await c.subscribe("matches", tickers=(NAME, "GIBBERISH-USD"))
            assert both == {**failed, "reason": "GIBBERISH-USD is not a valid product"}
            assert sim.state()["connections"][0]["subscriptions"] == [], "one wrong product fails the whole request"
            assert (await c.subscribe("nothing"))["reason"] == "nothing is not a valid channel"
            assert (await c.subscribe("level2"))["reason"] == "level2 channel requires authentication"
            assert (await c.ask(type="subscribe"))["reason"] == "channels is required"
            assert (await c.ask(type="subscribe", channels=["matches"]))["reason"] == "product_ids is required"
            assert (await c.ask(type="hello"))["reason"] == "hello is not a valid type"
            assert (await c.ask())["type"] == "error"
            await c.ws.send_str("{")
            assert (await c.next())["message"] == "Malformed JSON"
            wrong = base64.b64encode(b"another").decode()
            for words in (signed(wrong), {**signed(), "passphrase": ""}, {**signed(), "timestamp": "1"}):
                assert (await c.subscribe("level2", **words))["message"] == "Authentication Failed"
            assert (await c.subscribe("level2", **signed()))["type"] == "subscriptions"

    with SimProcess(VENUE, *KEY) as sim:
        within(talk(sim))


def test_a_connection_that_subscribes_to_nothing_is_closed() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as idle, connect(sim) as busy:
            await busy.subscribe("heartbeat")
            await idle.drain()
            assert idle.ws.close_code == 1008
            await busy.until(lambda: len(busy.of("heartbeat")) > 1)
        assert sim.state()["violations"] == {"no_subscription": 1}

    with SimProcess(VENUE, "--limit", "subscribe_within_s=0.5") as sim:
        within(talk(sim))


def test_too_many_connections_messages_and_subscriptions() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as a, connect(sim) as b, connect(sim) as c:
            await a.subscribe("matches")
            await b.subscribe("matches")
            assert "too many subscriptions" in (await c.subscribe("matches"))["reason"]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with connect(sim):
                    pass
            assert refused.value.status == 429
            for _ in range(30):
                await a.ws.send_str('{"type":"subscribe","product_ids":["BTC-USD"],"channels":["matches"]}')
            await a.drain()
            assert a.ws.close_code == 1008
        assert set(sim.state()["violations"]) == {"subscriptions", "connects", "client_messages"}

    limits = ("connects_burst=3", "connects_per_s=0.001", "messages_per_s=20", "subscriptions_max=2")
    with SimProcess(VENUE, *(part for limit in limits for part in ("--limit", limit))) as sim:
        within(talk(sim))


def test_too_many_requests_are_refused() -> None:
    async def talk(sim: SimProcess) -> None:
        statuses = [(await get(sim, "/time"))[0] for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        assert (await get(sim, "/time"))[1] == {"message": "Public rate limit exceeded"}

    with SimProcess(VENUE, "--limit", "requests_burst=3", "--limit", "requests_per_s=0.001") as sim:
        within(talk(sim))


def test_trades_are_paged_from_the_newest_to_older_ones(tmp_path: Path) -> None:
    async def talk(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("trade", {}).get(NAME, 0) > 40)
        sim.pause()
        sim.wait_state(lambda state: len(sim.ledger().trades(NAME)) == state["ledger"]["trade"][NAME])  # all written
        ids = [int(id_) for id_ in sim.ledger().trades(NAME)]
        _, newest, headers = await get(sim, f"/products/{NAME}/trades", limit=10)
        assert [t["trade_id"] for t in newest] == ids[:-11:-1]
        assert (headers["cb-before"], headers["cb-after"]) == (str(ids[-1]), str(ids[-10]))
        _, older, _ = await get(sim, f"/products/{NAME}/trades", after=headers["cb-after"], limit=5)
        assert [t["trade_id"] for t in older] == ids[-11:-16:-1]
        _, newer, _ = await get(sim, f"/products/{NAME}/trades", before=older[0]["trade_id"], limit=3)
        assert [t["trade_id"] for t in newer] == ids[-8:-11:-1]
        truth = sim.ledger().trades(NAME)
        for t in newest:
            row = truth[str(t["trade_id"])]
            wanted = (row["price"], row["qty"], row["side"], row["t"])
            assert (t["price"], t["size"], OPPOSITE[t["side"]], us(t["time"])) == wanted
        assert (await get(sim, f"/products/{NAME}/trades", after="x"))[0] == 400
        assert (await get(sim, f"/products/{NAME}/trades", after=ids[0]))[1] == []

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(talk(sim))


def test_the_book_of_the_rest_interface_is_the_ledgers(tmp_path: Path) -> None:
    async def talk(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("book", {}).get(NAME, 0) > 40)
        sim.pause()
        _, whole, _ = await get(sim, f"/products/{NAME}/book", level=2)
        _, best, _ = await get(sim, f"/products/{NAME}/book")
        assert (await get(sim, f"/products/{NAME}/book", level=3))[0] == 400
        assert (await get(sim, "/products/NO-SUCH/book"))[0] == 404
        assert best["bids"] == whole["bids"][:1]
        sim.stop()
        bids, asks = sim.ledger().final_book(NAME)[1]
        assert {p: q for p, q, _ in whole["bids"]} == bids
        assert {p: q for p, q, _ in whole["asks"]} == asks
        assert abs(us(whole["time"]) - sim.ledger().end["t"]) < 30_000_000

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(talk(sim))


def test_products() -> None:
    async def talk(sim: SimProcess) -> None:
        _, listed, _ = await get(sim, "/products")
        assert [p["id"] for p in listed] == sim.tickers
        assert (listed[0]["quote_increment"], listed[0]["base_increment"]) == ("0.01", "0.00001000")
        assert (await get(sim, f"/products/{NAME}"))[1] == listed[0]
        assert (await get(sim, f"/products/{NAME}/nothing"))[0] == 404

    with SimProcess(VENUE) as sim:
        within(talk(sim))


# A third-party client

CCXT = "ccxt==4.5.90"
SCRIPT = Path(__file__).with_name("thirdparty_ccxt.py")


@pytest.mark.thirdparty
@pytest.mark.timeout(INSTALL_S + 120)
def test_ccxt_gets_the_trades_and_books_of_the_ledger(tmp_path: Path) -> None:
    """It keeps no time that is finer than ms, so books are found by their time in ms, and by both sides."""
    python = interpreter_of(CCXT)
    with SimProcess(VENUE, *FAST, *KEY, ledger=tmp_path / "l") as sim:
        command = [python, SCRIPT, "coinbaseexchange", sim.ws_url, sim.rest_url, "5", "BTC/USD", "ETH/USD"]
        keys = {"CCXT_KEY": "someone", "CCXT_SECRET": SECRET, "CCXT_PASSWORD": "p", "PATH": os.environ["PATH"]}
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=100, env=keys, cwd=tmp_path
        )
        sim.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    truth = sim.ledger()
    for symbol, ticker in (("BTC/USD", "BTC-USD"), ("ETH/USD", "ETH-USD")):
        mine = [row for row in rows if row["symbol"] == symbol]
        check_trades([row for row in mine if row["kind"] == "trade"], truth.trades(ticker))
        books: dict[int, list[Any]] = {}
        for at, sides in truth.books(ticker, "level2"):
            books.setdefault(at // 1000, []).append(_decimals(*sides))
        told = [row for row in mine if row["kind"] == "book" and row["ms"] is not None]
        assert len(told) > 100
        assert [row["ms"] for row in told if _decimals(row["bids"], row["asks"]) not in books[row["ms"]]] == []


def _decimals(*sides: dict[str, str]) -> list[dict[Decimal, Decimal]]:
    return [{Decimal(price): Decimal(size) for price, size in side.items()} for side in sides]
