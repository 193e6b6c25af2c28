"""The simulated Advanced Trade feed: its messages against its ledger, the dialogue, REST, and each of its limits."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tools.sim.process import SimProcess

Row = dict[str, Any]
VENUE = "coinbase"
WITHIN_S = 40.0
NAME = "BTC-USD"
FAST = ("--rate", "200", "--tickers", "BTC-USD:1,ETH-USD:0.5,SOL-USD:0.3")
CHANNELS = ("market_trades", "candles", "ticker", "level2")


def within(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WITHIN_S))


class Client:
    """One connection; every message is kept, in order."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.rows: list[Row] = []

    async def next(self) -> Row:
        message = await self.ws.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, (message, self.ws.close_code)
        self.rows.append(json.loads(message.data))
        return self.rows[-1]

    async def ask(self, kind: str, channel: str, products: list[str] | None = None, **more: Any) -> Row:
        """Send, and wait for the reply or error."""
        message = {"type": kind, "channel": channel, **({"product_ids": products} if products else {}), **more}
        await self.ws.send_str(json.dumps(message))
        while (row := await self.next()).get("channel", "error") not in ("subscriptions", "error"):
            pass
        return row

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            await self.next()

    async def drain(self) -> None:
        async for message in self.ws:
            if message.type is aiohttp.WSMsgType.TEXT:
                self.rows.append(json.loads(message.data))

    def events(self, channel: str, product: str = "") -> list[Row]:
        found = [event for row in self.rows if row.get("channel") == channel for event in row["events"]]
        return [e for e in found if product in ("", _product(e))]


def _product(event: Row) -> str:
    inner = event.get("trades") or event.get("tickers") or event.get("candles") or [event]
    return str(inner[0].get("product_id", ""))


@asynccontextmanager
async def connect(sim: SimProcess) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session, session.ws_connect(sim.ws_url + "/", max_msg_size=0) as ws:
        yield Client(ws)


async def get(sim: SimProcess, path: str, **params: Any) -> tuple[int, Row]:
    url = f"{sim.rest_url}/api/v3/brokerage/market{path}"
    async with aiohttp.ClientSession() as session, session.get(url, params=params) as answer:
        return answer.status, json.loads(await answer.text())


def us(text: str) -> int:
    day, _, part = text.removesuffix("Z").partition(".")
    at = datetime.strptime(day, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    return round(at.timestamp()) * 1_000_000 + int(part.ljust(9, "0")) // 1000


def apply(book: dict[str, dict[str, str]], event: Row) -> None:
    if event["type"] == "snapshot":
        book["bid"], book["offer"] = {}, {}
    for level in event["updates"]:
        side = book[level["side"]]
        if Decimal(level["new_quantity"]):
            side[level["price_level"]] = level["new_quantity"]
        else:
            del side[level["price_level"]]  # only a level that was there is removed


def test_every_channel_equals_the_ledger(tmp_path: Path) -> None:
    client: list[Client] = []
    products = ["BTC-USD", "ETH-USD"]

    async def listen(sim: SimProcess) -> None:
        async with connect(sim) as c:
            client.append(c)
            await c.ask("subscribe", "heartbeats")
            for channel in CHANNELS:
                reply = await c.ask("subscribe", channel, products)
                assert reply["events"][0]["subscriptions"][channel] == products
            sim.resume()
            await c.until(lambda: len(c.events("heartbeats")) > 3 and len(c.events("l2_data", NAME)) > 60)
            sim.pause()
            await asyncio.to_thread(sim.stop)
            await c.drain()

    with SimProcess(VENUE, *FAST, "--hold", ledger=tmp_path / "l") as sim:
        within(listen(sim))
    truth, c = sim.ledger(), client[0]
    assert [row["sequence_num"] for row in c.rows] == list(range(len(c.rows))), "one number for all messages"
    beats = [event["heartbeat_counter"] for event in c.events("heartbeats")]
    assert beats == list(range(beats[0], beats[0] + len(beats)))
    for product in products:
        first, *updates = c.events("l2_data", product)
        book: dict[str, dict[str, str]] = {}
        apply(book, first)
        replay = truth.books(product)
        _, sides = next(replay)
        assert (first["type"], book["bid"], book["offer"]) == ("snapshot", *sides)
        for update in updates:
            assert len({level["event_time"] for level in update["updates"]}) == 1
            apply(book, update)
            update_id, sides = next(replay)
            assert (update["type"], us(update["updates"][0]["event_time"])) == ("update", update_id)
            assert (book["bid"], book["offer"]) == sides
        assert next(replay, None) is None
        messages = [event for event in c.events("market_trades", product) if event["type"] == "update"]
        trades = [t for event in messages for t in reversed(event["trades"])]
        assert [(t["trade_id"], t["price"], t["size"], t["side"], us(t["time"])) for t in trades] == [
            (t["id"], t["price"], t["qty"], {"BUY": "SELL", "SELL": "BUY"}[t["side"]], t["t"])
            for t in truth.rows("trade", product)
        ], "the side is the maker's"
        tickers = [event["tickers"][0] for event in c.events("ticker", product)]
        kinds = truth.rows("first_ticker", product) + truth.rows("ticker", product)
        assert tickers == [row["data"] for row in kinds]
        candles = [event["candles"][-1] for event in c.events("candles", product)]
        rows = [(row["open_time"], row["open"], row["close"], row["volume"]) for row in truth.rows("candle", product)]
        assert [(int(k["start"]) * 1_000_000, k["open"], k["close"], k["volume"]) for k in candles] == rows


def test_who_comes_later_is_greeted_before_the_reply(tmp_path: Path) -> None:
    client: list[Client] = []

    async def listen(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("trade", {}).get(NAME, 0) > 150)
        async with connect(sim) as c:
            client.append(c)
            for channel in CHANNELS:
                await c.ask("subscribe", channel, [NAME])
                kinds = [row["events"][0].get("type") for row in c.rows]
                assert kinds.count("snapshot") == CHANNELS.index(channel) + 1
            await c.until(lambda: len(c.events("l2_data")) > 20 and len(c.events("market_trades")) > 5)
            again = len(c.events("l2_data"))
            await c.ask("subscribe", "level2", [NAME])
            assert "snapshot" not in [e["type"] for e in c.events("l2_data")[again:]], "subscribed already"
            await c.ask("unsubscribe", "level2", [NAME])
            await asyncio.sleep(1)  # messages of the limit's window
            await c.ask("subscribe", "level2", [NAME])
            assert (
                c.events("l2_data")[-1]["type"] == "snapshot"
                or [e["type"] for e in c.events("l2_data")].count("snapshot") == 2
            )

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    truth, c = sim.ledger(), client[0]
    assert [row["sequence_num"] for row in c.rows] == list(range(len(c.rows)))
    greeting, *updates = c.events("market_trades")
    ids = [int(t["trade_id"]) for t in greeting["trades"]]
    assert ids == list(range(ids[0], ids[0] - 100, -1)), "the newest hundred, the newest first"
    behind = [int(t["trade_id"]) for event in updates for t in reversed(event["trades"])]
    assert behind == list(range(ids[0] + 1, ids[0] + 1 + len(behind)))
    book: dict[str, dict[str, str]] = {}
    for event in c.events("l2_data"):
        apply(book, event)
        at = us(event["updates"][0]["event_time"])
        assert (book["bid"], book["offer"]) == truth.book(NAME, at)


def test_what_is_wrong_is_an_error_without_a_number() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            assert await c.ask("subscribe", "no_such_channel", [NAME]) == {
                "type": "error", "message": "authentication failure",
            }  # fmt: skip
            wrong = await c.ask("subscribe", "level2", [NAME, "NO-SUCH"])
            assert wrong == {"type": "error", "message": "NO-SUCH is not a valid product"}
            assert (await c.ask("subscribe", "level2", [NAME], jwt="a.b.c"))["type"] == "error"
            await c.ws.send_str("{")
            assert (await c.next())["message"] == "failed to parse message"
            reply = await c.ask("subscribe", "ticker", ["BTC-USDC"])
            assert reply["events"] == [{"subscriptions": {"ticker": [NAME]}}], "the data of -USD, under its name"
            assert c.events("ticker")[0]["tickers"][0]["product_id"] == NAME

    with SimProcess(VENUE, *FAST) as sim:
        within(talk(sim))


@pytest.mark.parametrize(
    ("limit", "violation"),
    [("messages_max=3", "messages"), ("subscribe_within_s=0.3", "subscribe_within")],
)
def test_who_sends_too_much_or_nothing_is_hung_up_on(limit: str, violation: str) -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            if violation == "messages":
                for _ in range(4):
                    await c.ws.send_str("{}")
            await c.drain()
        state = await asyncio.to_thread(sim.wait_state, lambda state: not state["connections"])
        assert violation in state["violations"]

    with SimProcess(VENUE, *FAST, "--limit", limit) as sim:
        within(talk(sim))


def test_too_many_connections_and_requests_are_429() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim), connect(sim):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with connect(sim):
                    pass
            assert refused.value.status == 429
        statuses = [(await get(sim, "/products"))[0] for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert sim.state()["violations"] == {"connects": 1, "requests": 1}

    limits = ("connects_max=2", "requests_max=2", "window_s=30")
    with SimProcess(VENUE, *(part for limit in limits for part in ("--limit", limit))) as sim:
        within(talk(sim))


def token(key: ec.EllipticCurvePrivateKey, name: str = "k", **changed: Any) -> str:
    now = int(time.time())
    head = {"alg": "ES256", "kid": name, "nonce": changed.pop("nonce", str(time.time_ns())), "typ": "JWT"}
    claims = {"iss": "cdp", "sub": name, "nbf": now, "exp": now + 120, **changed}
    text = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (head, claims))
    r, s = utils.decode_dss_signature(key.sign(text, ec.ECDSA(SHA256())))
    return (text + b"." + base64.urlsafe_b64encode(r.to_bytes(32, "big") + s.to_bytes(32, "big")).rstrip(b"=")).decode()


def test_tokens_are_checked() -> None:
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    async def talk(sim: SimProcess) -> None:
        good = token(key)
        now = int(time.time())
        async with connect(sim) as c:
            assert (await c.ask("subscribe", "ticker", [NAME], jwt=good))["channel"] == "subscriptions"
            for bad in (
                good,  # used before
                token(other),
                token(key, "unknown"),
                token(key, exp=now - 1),
                token(key, exp=now + 500),
                token(key, iss="me"),
            ):
                assert (await c.ask("subscribe", "ticker", [NAME], jwt=bad))["message"] == "authentication failure"

    with SimProcess(VENUE, *FAST, "--credential", f"k:{public}", "--limit", "messages_max=100") as sim:
        within(talk(sim))


def test_rest_answers_agree_with_the_ledger(tmp_path: Path) -> None:
    kept: list[Row] = []

    async def talk(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("trade", {}).get(NAME, 0) > 150)
        sim.pause()
        paused_s = sim.state()["seconds"]
        sim.wait_state(lambda state: state["seconds"] > paused_s + 0.5)  # what waited for its timer is due
        sim.state()  # and, as a request later, published
        _, newest = await get(sim, f"/products/{NAME}/ticker", limit=1000)
        trades = newest["trades"]
        seconds = sorted({us(t["time"]) // 1_000_000 for t in trades})
        _, ranged = await get(sim, f"/products/{NAME}/ticker", limit=1000, start=seconds[0], end=seconds[0])
        assert ranged["trades"] == [t for t in trades if us(t["time"]) // 1_000_000 == seconds[0]]
        _, few = await get(sim, f"/products/{NAME}/ticker", limit=7)
        assert few["trades"] == trades[:7]
        kept.extend(trades)
        _, book = await get(sim, "/product_book", product_id=NAME)
        kept.append(book["pricebook"])
        _, candles = await get(sim, f"/products/{NAME}/candles", granularity="FIVE_MINUTE", start=0, end=1 << 40)
        assert candles["candles"][0]["close"] == trades[0]["price"]
        assert (await get(sim, f"/products/{NAME}/ticker"))[0] == 400
        assert (await get(sim, "/products/NO-SUCH/ticker", limit=1))[0] == 404

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(talk(sim))
        sim.stop()
    truth = sim.ledger()
    book = kept.pop()
    assert [t["trade_id"] for t in reversed(kept)] == list(truth.trades(NAME))
    at, final = truth.final_book(NAME)
    sides = tuple({level["price"]: level["size"] for level in book[side]} for side in ("bids", "asks"))
    assert (us(book["time"]), sides) == (at, final)


def test_the_list_of_products_comes_in_pages() -> None:
    async def talk(sim: SimProcess) -> None:
        _, body = await get(sim, "/products")
        rows = {row["product_id"]: row for row in body["products"]}
        assert set(rows) == {f"{base}-{quote}" for base in ("BTC", "ETH", "SOL") for quote in ("USD", "USDC")}
        assert (rows["BTC-USDC"]["alias"], rows["BTC-USD"]["alias"]) == ("BTC-USD", "")
        assert rows["BTC-USD"]["alias_to"] == ["BTC-USDC"]
        pages, cursor = [], "0"
        while cursor:
            _, page = await get(sim, "/products", limit=4, cursor=cursor)
            pages += page["products"]
            cursor = page["pagination"]["next_cursor"]
        assert pages == body["products"]

    with SimProcess(VENUE, *FAST) as sim:
        within(talk(sim))


def test_a_lost_message_leaves_its_number_out_and_a_silent_stream_does_not() -> None:
    async def listen(sim: SimProcess) -> None:
        async with connect(sim) as c:
            await c.ask("subscribe", "ticker", [NAME])
            await c.ask("subscribe", "level2", [NAME])
            sim.fault("silence", stream="level2", seconds=1)
            await c.until(lambda: len(c.events("ticker")) > 5)
            numbers = [row["sequence_num"] for row in c.rows]
            assert numbers == list(range(len(numbers)))
            seen = len(c.rows)
            sim.fault("drop", stream="ticker")
            await c.until(lambda: len(c.rows) > seen + 10 and bool(sim.state()["faults"][1]["fired"]))
            await c.until(lambda: c.rows[-1]["sequence_num"] != len(c.rows) - 1)
            assert [row["sequence_num"] for row in c.rows][-1] == len(c.rows), "one number is missing"

    with SimProcess(VENUE, *FAST) as sim:
        within(listen(sim))
