"""The simulated Deribit: its messages against its ledger, JSON-RPC over both ways, and each of its limits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mdcollector.exchanges.deribit import Deribit
from tools.sim.deribit import Deribit as Simulated
from tools.sim.process import SimProcess

Row = dict[str, Any]
VENUE = "deribit"
WITHIN_S = 25.0
NAME = "BTC-PERPETUAL"
FAST = (
    "--rate",
    "200",
    "--tickers",
    "BTC-PERPETUAL:1,ETH-PERPETUAL:0.5,BTC_USDC-PERPETUAL:0.3,BTC-25DEC26-90000-C:0.2",
)
KEY = ("--credential", "someone:secret")


def within(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WITHIN_S))


class Client:
    """One JSON-RPC connection; data that comes before an answer is kept."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.rows: list[Row] = []
        self.calls = 0

    async def next(self) -> Row:
        message = await self.ws.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, (message, self.ws.close_code)
        row: Row = json.loads(message.data, parse_float=Text, parse_int=int)
        if "params" in row:
            self.rows.append(row)
        return row

    async def call(self, method: str, **params: Any) -> Row:
        self.calls += 1
        request = {"jsonrpc": "2.0", "id": self.calls, "method": method, "params": params}
        await self.ws.send_str(json.dumps(request))
        while (row := await self.next()).get("id") != self.calls:
            pass
        assert row["usDiff"] == row["usOut"] - row["usIn"] >= 0
        return row

    async def auth(self) -> Row:
        credentials = {"client_id": "someone", "client_secret": "secret"}
        row = await self.call("public/auth", grant_type="client_credentials", **credentials)
        result: Row = row["result"]
        return result

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            await self.next()

    async def drain(self) -> None:
        async for message in self.ws:
            if message.type is aiohttp.WSMsgType.TEXT:
                self.rows.append(json.loads(message.data, parse_float=Text))

    def data(self, channel: str) -> list[Any]:
        return [r["params"]["data"] for r in self.rows if r["params"].get("channel") == channel]


class Text(str):
    """A JSON number as it was written."""

    __slots__ = ()


@asynccontextmanager
async def connect(sim: SimProcess) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session, session.ws_connect(sim.ws_url + "/ws/api/v2") as ws:
        yield Client(ws)


async def get(sim: SimProcess, method: str, **params: Any) -> tuple[int, Row]:
    url = f"{sim.rest_url}/api/v2/{method}"
    async with aiohttp.ClientSession() as session, session.get(url, params=params) as answer:
        return answer.status, json.loads(await answer.text(), parse_float=Text)


def apply(book: tuple[dict[str, str], dict[str, str]], data: Row) -> None:
    """What the venue's documentation says about a book notification, with plain dictionaries."""
    for side, levels in zip(book, (data["bids"], data["asks"]), strict=True):
        for action, price, amount in levels:
            if action == "delete":
                assert price in side, "only a level that was there is deleted"
                assert amount == "0.0"
                del side[price]
            else:
                assert (price in side) == (action == "change")
                side[price] = amount


def test_every_channel_equals_the_ledger(tmp_path: Path) -> None:
    client: list[Client] = []
    names = [f"book.{NAME}.{i}" for i in ("raw", "100ms", "agg2")] + [
        f"trades.{NAME}.{i}" for i in ("raw", "100ms", "agg2")
    ]
    names += [f"quote.{NAME}", f"ticker.{NAME}.100ms", f"incremental_ticker.{NAME}", "trades.future.BTC.100ms"]

    async def listen(sim: SimProcess) -> None:
        async with connect(sim) as c:
            client.append(c)
            await c.auth()
            assert (await c.call("private/subscribe", channels=names))["result"] == names
            sim.resume()
            await c.drain()
            assert c.ws.close_code == 1001

    with SimProcess(VENUE, *FAST, *KEY, "--seconds", "4", "--hold", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.wait()
    truth, got = sim.ledger(), client[0]
    wanted = [(t["id"], t["seq"], t["price"], t["qty"], t["side"].lower()) for t in truth.trades(NAME).values()]
    assert len(wanted) > 50
    for interval in ("raw", "100ms", "agg2"):
        trades = [t for part in got.data(f"trades.{NAME}.{interval}") for t in part]
        assert [(t["trade_id"], t["trade_seq"], t["price"], t["amount"], t["direction"]) for t in trades] == wanted
        first, *changes = got.data(f"book.{NAME}.{interval}")
        assert (first["type"], "prev_change_id" in first) == ("snapshot", False)
        book: tuple[dict[str, str], dict[str, str]] = ({}, {})
        apply(book, first)
        last = first["change_id"]
        assert book == truth.book(NAME, last, interval)
        replay = {u: (dict(b), dict(a)) for u, (b, a) in truth.books(NAME, interval)}
        for change in changes:
            assert (change["type"], change["prev_change_id"]) == ("change", last)
            assert change["change_id"] > last
            last = change["change_id"]
            apply(book, change)
            assert book == replay[last]
            assert max(map(Decimal, book[0])) < min(map(Decimal, book[1]))
        assert last == truth.book_events(NAME, interval)[-1]["last"]
    quotes = [(q["best_bid_price"], q["best_bid_amount"], q["best_ask_price"]) for q in got.data(f"quote.{NAME}")]
    assert quotes == [(b["bid"], b["bid_qty"], b["ask"]) for b in truth.bbo(NAME).values()]
    both = {t["instrument_name"] for part in got.data("trades.future.BTC.100ms") for t in part}
    assert both == {NAME, "BTC_USDC-PERPETUAL"}
    tickers = got.data(f"ticker.{NAME}.100ms")
    merged: Row = {}
    for part in got.data(f"incremental_ticker.{NAME}"):
        merged |= part
    assert {key: merged[key] for key in tickers[-1]} == tickers[-1]
    assert len(tickers) - 1 == len([t for t in truth.rows("ticker", NAME) if t["stream"] == "100ms"])


def test_a_book_joined_in_the_middle_starts_with_a_snapshot_that_the_next_change_follows(tmp_path: Path) -> None:
    client: list[Client] = []

    async def listen(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("book", {}).get(NAME, 0) > 50)
        async with connect(sim) as c:
            client.append(c)
            channel = f"book.{NAME}.100ms"
            await c.call("public/subscribe", channels=[channel])
            await c.until(lambda: len(c.data(channel)) > 10)

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    truth = sim.ledger()
    first, *changes = client[0].data(f"book.{NAME}.100ms")
    book: tuple[dict[str, str], dict[str, str]] = ({}, {})
    apply(book, first)
    assert book == truth.book(NAME, first["change_id"], "100ms")
    assert changes[0]["prev_change_id"] == first["change_id"]


def test_subscribing_again_brings_no_new_snapshot_and_unsubscribing_does() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            channel = f"book.{NAME}.100ms"

            def snapshots() -> int:
                return sum(data["type"] == "snapshot" for data in c.data(channel))

            for _ in range(2):
                assert (await c.call("public/subscribe", channels=[channel]))["result"] == [channel]
            seen = len(c.data(channel))
            await c.until(lambda: len(c.data(channel)) > seen + 5)
            assert snapshots() == 1
            assert (await c.call("public/unsubscribe", channels=[channel]))["result"] == [channel]
            await c.call("public/subscribe", channels=[channel])
            await c.until(lambda: snapshots() == 2)
            assert (await c.call("public/unsubscribe_all"))["result"] == "ok"
            assert sim.state()["connections"][0]["subscriptions"] == []

    with SimProcess(VENUE, *FAST) as sim:
        within(talk(sim))


def test_what_is_wrong_is_answered_as_the_venue_answers() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            unknown = await c.call(
                "public/subscribe", channels=["no.such.channel", "book.NO-SUCH.100ms", f"quote.{NAME}"]
            )
            assert unknown["result"] == [f"quote.{NAME}"]
            raw = await c.call("public/subscribe", channels=[f"book.{NAME}.raw"])
            assert raw["error"] == {"code": 13778, "message": "raw_subscriptions_not_available_for_unauthorized"}
            private = await c.call("private/subscribe", channels=[f"book.{NAME}.100ms"])
            assert private["error"]["code"] == 13009
            wrong = await c.call("public/auth", grant_type="client_credentials", client_id="x", client_secret="y")
            assert wrong["error"] == {"code": 13004, "message": "invalid_credentials"}
            assert (await c.call("public/auth", grant_type="password"))["error"]["code"] == -32602
            beat = await c.call("public/set_heartbeat", interval=9)
            assert beat["error"]["data"] == {"reason": "value must be >= 10", "param": "interval"}
            assert beat["error"]["code"] == -32602
            assert (await c.call("public/nothing"))["error"] == {"code": -32601, "message": "Method not found"}
            for method in ("public/trades", "public/text", "private/get_time"):  # names of nothing that can be called
                assert "error" in await c.call(method)
            assert (await c.call("public/get_order_book", instrument_name=["x"]))["error"]["code"] == 13020
            await c.ws.send_str("{")
            row = await c.next()
            while "error" not in row:
                row = await c.next()
            assert (row["error"]["code"], row["error"]["data"]) == (11050, "invalid json")

    with SimProcess(VENUE, *KEY) as sim:
        within(talk(sim))


def test_a_token_can_be_refreshed_and_ends() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            token = await c.auth()
            assert token["expires_in"] == 2
            await c.call("public/subscribe", channels=[f"book.{NAME}.raw"])
            renewed = await c.call("public/auth", grant_type="refresh_token", refresh_token=token["refresh_token"])
            assert renewed["result"]["access_token"] != token["access_token"]
            wrong = await c.call("public/auth", grant_type="refresh_token", refresh_token="made up")
            assert wrong["error"]["code"] == 13009
            await asyncio.to_thread(sim.wait_state, lambda state: state["connections"][0]["subscriptions"] == [])
            again = await c.call("public/subscribe", channels=[f"book.{NAME}.raw"])
            assert again["error"]["code"] == 13778

    with SimProcess(VENUE, *FAST, *KEY, "--limit", "token_s=2") as sim:
        within(talk(sim))


def test_heartbeats_ask_for_a_test_and_an_unanswered_one_closes() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            assert (await c.call("public/set_heartbeat", interval=0.4))["result"] == "ok"
            kinds: list[str] = []
            while kinds.count("test_request") < 3:
                row = await c.next()
                if row.get("method") == "heartbeat":
                    kinds.append(row["params"]["type"])
                    if kinds[-1] == "test_request":
                        assert (await c.call("public/test"))["result"] == {"version": "1.2.26"}
            assert "heartbeat" in kinds
            async for _ in c.ws:
                pass
            assert c.ws.close_code == 4000
        assert sim.state()["violations"] == {"test_request_unanswered": 1}

    with SimProcess(VENUE, "--limit", "heartbeat_min_s=0.1", "--limit", "test_within_s=0.5") as sim:
        within(talk(sim))


def test_an_overrun_of_credits_ends_the_session() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            for _ in range(10):
                assert "result" in await c.call("public/subscribe", channels=[f"quote.{NAME}"])
            assert (await c.call("public/subscribe", channels=[f"quote.{NAME}"]))["error"]["code"] == 10028
            async for _ in c.ws:
                pass
            assert c.ws.close_code == 1008
        assert sim.state()["violations"] == {"credits": 1}

    with SimProcess(VENUE, "--limit", "refill_per_s=1") as sim:
        within(talk(sim))


def test_too_many_connections_of_one_address_are_refused() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim), connect(sim):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with connect(sim):
                    pass
            assert refused.value.status == 429
            status, body = await get(sim, "public/test")
            assert (status, body["error"]["code"]) == (429, 10028)
        await asyncio.to_thread(sim.wait_state, lambda state: not state["connections"])
        assert (await get(sim, "public/test"))[0] == 200

    with SimProcess(VENUE, "--limit", "connections_max=2") as sim:
        within(talk(sim))


def test_too_many_sessions_of_one_key_and_too_many_channels_are_refused() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as first, connect(sim) as second:
            await first.auth()
            credentials = {"client_id": "someone", "client_secret": "secret"}
            answer = await second.call("public/auth", grant_type="client_credentials", **credentials)
            assert answer["error"]["code"] == 10028
            channels = [f"quote.X{number}" for number in range(4)]
            assert (await second.call("public/subscribe", channels=channels))["error"]["code"] == -32602
            assert (await second.call("public/subscribe", channels=channels[:3]))["result"] == []
        assert sim.state()["violations"] == {"sessions_per_key": 1, "channels_per_call": 1}

    limits = ("--limit", "sessions_per_key=1", "--limit", "channels_per_call=3")
    with SimProcess(VENUE, *KEY, *limits) as sim:
        within(talk(sim))


def test_the_list_of_instruments() -> None:
    async def talk(sim: SimProcess) -> None:
        status, body = await get(sim, "public/get_instruments", currency="any", kind="any", expired="false")
        assert status == 200
        by_name = {row["instrument_name"]: row for row in body["result"]}
        assert list(by_name) == sim.tickers
        assert by_name[NAME]["instrument_type"] == "reversed"
        assert (by_name[NAME]["tick_size"], by_name[NAME]["contract_size"]) == ("0.5", "10.0")
        option = by_name["BTC-25DEC26-90000-C"]
        assert (option["kind"], option["option_type"], option["strike"]) == ("option", "call", "9.0e4")
        assert option["expiration_timestamp"] == 1_798_185_600_000
        _, body = await get(sim, "public/get_instruments", currency="USDC")
        assert [row["instrument_name"] for row in body["result"]] == ["BTC_USDC-PERPETUAL"]
        _, body = await get(sim, "public/get_instruments", currency="BTC", kind="option")
        assert [row["instrument_name"] for row in body["result"]] == ["BTC-25DEC26-90000-C"]

    with SimProcess(VENUE) as sim:
        within(talk(sim))


def test_rest_answers_agree_with_the_ledger(tmp_path: Path) -> None:
    books: list[Row] = []
    kept: list[list[Row]] = []

    async def talk(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("trade", {}).get(NAME, 0) > 60)
        sim.pause()
        _, body = await get(
            sim, "public/get_last_trades_by_instrument", instrument_name=NAME, count=1000, sorting="asc"
        )
        trades = body["result"]["trades"]
        assert body["result"]["has_more"] is False
        kept.append(trades)
        start = trades[10]["trade_seq"]
        bounds = {"instrument_name": NAME, "start_seq": start, "end_seq": start + 20, "sorting": "asc"}
        _, body = await get(sim, "public/get_last_trades_by_instrument", **bounds, count=7)
        assert (body["result"]["trades"], body["result"]["has_more"]) == (trades[10:17], True)
        _, body = await get(sim, "public/get_last_trades_by_instrument", **bounds, count=1000)
        assert (body["result"]["trades"], body["result"]["has_more"]) == (trades[10:31], False)
        _, body = await get(sim, "public/get_last_trades_by_instrument", instrument_name=NAME, count=3)
        assert [t["trade_seq"] for t in body["result"]["trades"]] == [t["trade_seq"] for t in trades[:-4:-1]]
        at = trades[5]["timestamp"]
        by_time = {"instrument_name": NAME, "start_timestamp": at, "end_timestamp": at, "sorting": "asc"}
        _, body = await get(sim, "public/get_last_trades_by_instrument_and_time", **by_time)
        assert {t["timestamp"] for t in body["result"]["trades"]} == {at}
        _, body = await get(sim, "public/get_order_book", instrument_name=NAME, depth=1000)
        books.append(body["result"])
        _, body = await get(sim, "public/get_order_book", instrument_name=NAME, depth=3)
        assert body["result"]["bids"] == books[0]["bids"][:3]
        chart = {"start_timestamp": 0, "end_timestamp": 2**45, "resolution": "1D", "instrument_name": NAME}
        _, body = await get(sim, "public/get_tradingview_chart_data", **chart)
        assert body["result"]["status"] == "ok"
        assert body["result"]["close"] == [trades[-1]["price"]]
        assert (await get(sim, "public/get_order_book", instrument_name="NO"))[0] == 400

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(talk(sim))
        sim.stop()
    truth = sim.ledger()
    assert [(t["trade_id"], t["trade_seq"], t["price"], t["amount"]) for t in kept[0]] == [
        (t["id"], t["seq"], t["price"], t["qty"]) for t in truth.trades(NAME).values()
    ]
    last, final = truth.final_book(NAME)
    assert (books[0]["change_id"], dict(books[0]["bids"]), dict(books[0]["asks"])) == (last, *final)


def test_grouped_books_charts_and_new_instruments() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            channels = [f"book.{NAME}.none.10.100ms", f"book.{NAME}.5.1.100ms", f"chart.trades.{NAME}.1"]
            channels += ["instrument.state.any.any", "platform_state"]
            assert (await c.call("public/subscribe", channels=channels))["result"] == channels
            await c.until(lambda: all(len(c.data(channel)) > 1 for channel in channels[:3]))
            plain, grouped = c.data(channels[0])[-1], c.data(channels[1])[-1]
            assert (len(plain["bids"]), len(plain["asks"]), len(grouped["bids"])) == (10, 10, 1)
            assert Decimal(grouped["bids"][0][0]) % Decimal("2.5") == 0
            chart = c.data(channels[2])[-1]
            assert set(chart) == {"tick", "open", "high", "low", "close", "volume", "cost"}
            assert chart["tick"] % 60_000 == 0
            sim.fault("listing", ticker="SOL_USDC-PERPETUAL")
            await c.until(lambda: bool(c.data("instrument.state.any.any")))
            state = c.data("instrument.state.any.any")[0]
            assert (state["instrument_name"], state["state"]) == ("SOL_USDC-PERPETUAL", "created")
            await c.call("public/subscribe", channels=["book.SOL_USDC-PERPETUAL.100ms"])
            await c.until(lambda: len(c.data("book.SOL_USDC-PERPETUAL.100ms")) > 3)

    with SimProcess(VENUE, *FAST) as sim:
        within(talk(sim))


def test_the_connectors_of_one_machine_stay_within_the_pool_of_credits() -> None:
    """Whatever the sharing of the budget between them: in any seconds no more subscribes than pool and refill pay for."""
    (subscribes, seconds), limits = Deribit.LIMITS.messages_per_ip, Simulated.limits
    paid_for = limits["subscribe_pool"] + seconds * limits["refill_per_s"]
    assert 0 < subscribes * limits["subscribe_cost"] <= paid_for
    assert subscribes / seconds <= limits["refill_per_s"] / limits["subscribe_cost"], "also for ever"
