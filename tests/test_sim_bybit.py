"""The simulated Bybit: its messages against its ledger, the dialogue of each category, and each of its limits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tools.proof import standing_gaps
from tools.sim.ledger import Ledger
from tools.sim.process import SimProcess

Row = dict[str, Any]
WITHIN_S = 60.0
CATEGORIES = ("spot", "linear", "inverse", "option")
TICKERS = {
    "spot": ("BTCUSDT", "SOLUSDC"), "linear": ("BTCUSDT", "BTC-25DEC26"), "inverse": ("BTCUSD", "ETHUSD"),
    "option": ("BTC-25DEC26-90000-C-USDT", "BTC-25DEC26-90000-P-USDT"),
}  # fmt: skip
DEPTHS = {"option": (25, 100)}


def within(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WITHIN_S))


def started(category: str, *arguments: str, ledger: Path | None = None) -> SimProcess:
    market = ("--rate", "200", "--tickers", ",".join(f"{t}:1" for t in TICKERS[category]))
    return SimProcess(f"bybit_{category}", *market, *arguments, ledger=ledger)


class Client:
    """One connection; everything that came is kept, data by topic."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.rows: list[Row] = []
        self.calls = 0

    async def next(self) -> Row:
        message = await self.ws.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, (message, self.ws.close_code)
        self.rows.append(json.loads(message.data))
        return self.rows[-1]

    async def ask(self, op: str, *args: str) -> str:
        self.calls += 1
        await self.ws.send_str(json.dumps({"req_id": str(self.calls), "op": op, "args": list(args)}))
        return str(self.calls)

    async def call(self, op: str, *args: str) -> Row:
        """A request and its reply: by its own id, or (options) the next reply."""
        req_id = await self.ask(op, *args)
        while True:
            row = await self.next()
            if row.get("req_id") == req_id or row.get("type") == "COMMAND_RESP":
                return row

    async def until(self, done: Callable[[], Any]) -> None:
        while not done():
            await self.next()

    async def drain(self) -> None:
        async for message in self.ws:
            if message.type is aiohttp.WSMsgType.TEXT:
                self.rows.append(json.loads(message.data))

    def frames(self, topic: str) -> list[Row]:
        return [row for row in self.rows if row.get("topic") == topic]


@asynccontextmanager
async def connect(sim: SimProcess, category: str) -> AsyncIterator[Client]:
    url = f"{sim.ws_url}/v5/public/{category}"
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as ws:
        yield Client(ws)


async def get(sim: SimProcess, path: str, **query: Any) -> tuple[int, Any]:
    url = f"{sim.rest_url}/v5/market/{path}"
    async with aiohttp.ClientSession() as session, session.get(url, params=query) as answer:
        return answer.status, json.loads(await answer.text())


Sides = tuple[dict[str, str], dict[str, str]]


def rebuilt(frames: list[Row]) -> list[tuple[int, Sides]]:
    """What the venue's documentation says about a book, with plain dictionaries: the book after each message."""
    book: Sides = ({}, {})
    books, last = [], 0
    for frame in frames:
        data = frame["data"]
        if frame["type"] == "snapshot":
            book = ({}, {})
        else:
            assert data["u"] == last + 1
        last = data["u"]
        for side, levels in zip(book, (data["b"], data["a"]), strict=True):
            for price, qty in levels:
                if Decimal(qty):
                    side[price] = qty
                else:
                    assert price in side, "only a level that was there is deleted"
                    del side[price]
        books.append((last, (dict(book[0]), dict(book[1]))))
    return books


def check_trades(frames: list[Row], truth: Ledger, ticker: str) -> None:
    told = [(t["i"], t["p"], t["v"], t["S"].upper(), t["T"]) for f in frames for t in f["data"] if t["s"] == ticker]
    assert told == [(t["id"], t["price"], t["qty"], t["side"], t["t"] // 1000) for t in truth.trades(ticker).values()]
    assert len(told) > 30


def check_tickers(category: str, frames: list[Row], truth: Ledger, ticker: str) -> None:
    """Deltas are merged; what is empty is left out of the ledger."""
    merged: Row = {}
    told = []
    for frame in frames:
        merged = {**(merged if frame["type"] == "delta" else {}), **frame["data"]}
        told.append({key: value for key, value in merged.items() if value})
    lines = [line["data"] for line in truth.rows("ticker", ticker)]
    assert told[-len(lines) :] == lines
    kinds = {frame["type"] for frame in frames[1:]}
    assert kinds == ({"delta"} if category in ("linear", "inverse") else {"snapshot"})


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_topic_equals_the_ledger(category: str, tmp_path: Path) -> None:
    client: list[Client] = []
    ticker, other = TICKERS[category]
    depths = DEPTHS.get(category, (50, 200, 1000))
    trades = f"publicTrade.{ticker.split('-')[0] if category == 'option' else ticker}"
    topics = [trades, f"tickers.{ticker}", *(f"orderbook.{d}.{ticker}" for d in depths)]
    topics += [f"orderbook.1.{ticker}", f"kline.1.{ticker}"] if category != "option" else []
    topics += [f"allLiquidation.{ticker}"] if category in ("linear", "inverse") else []

    async def listen(sim: SimProcess) -> None:
        async with connect(sim, category) as c:
            client.append(c)
            reply = await c.call("subscribe", *topics)
            assert reply["success"] is True
            sim.resume()
            await c.drain()
            assert c.ws.close_code == 1001

    with started(category, "--seconds", "4", "--hold", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.wait()
    truth, got = sim.ledger(), client[0]
    check_trades(got.frames(trades), truth, ticker)
    if category == "option":  # one topic for all that share a base coin
        check_trades(got.frames(trades), truth, other)
    check_tickers(category, got.frames(f"tickers.{ticker}"), truth, ticker)
    for depth in depths:
        frames = got.frames(f"orderbook.{depth}.{ticker}")
        assert [f["type"] for f in frames[:2]] == ["snapshot", "delta"]
        replay = {u: (dict(b), dict(a)) for u, (b, a) in truth.books(ticker, f"orderbook.{depth}")}
        for u, book in rebuilt(frames):
            assert book == replay[u]
            assert all(len(side) <= max(depth, 50) for side in book)
            assert max(map(Decimal, book[0])) < min(map(Decimal, book[1]))
        assert frames[-1]["data"]["u"] == truth.book_events(ticker, f"orderbook.{depth}")[-1]["last"]
        assert all(f["cts"] <= f["ts"] + 1 for f in frames)
    if category == "option":
        return
    best = [f["data"] for f in got.frames(f"orderbook.1.{ticker}")]
    told = {d["u"]: (*d["b"][0], *d["a"][0]) for d in best}
    assert told == {u: (b["bid"], b["bid_qty"], b["ask"], b["ask_qty"]) for u, b in truth.bbo(ticker).items()}
    bars = [(b["start"] * 1000, b["close"], b["confirm"]) for f in got.frames(f"kline.1.{ticker}") for b in f["data"]]
    assert bars == [
        (c["open_time"], c["close"], c["closed"]) for c in truth.rows("candle", ticker) if c["interval"] == "1"
    ]
    if category != "spot":
        forced = [(x["T"], {"Buy": "SELL", "Sell": "BUY"}[x["S"]], x["p"], x["v"])
                  for f in got.frames(f"allLiquidation.{ticker}") for x in f["data"]]  # fmt: skip
        assert (
            forced
            == [(x["t"] // 1000, x["side"], x["price"], x["qty"]) for x in truth.rows("liquidation", ticker)]
            != []
        )


def test_a_book_joined_in_the_middle_starts_with_a_snapshot_that_the_next_delta_follows(tmp_path: Path) -> None:
    client: list[Client] = []
    topics = [f"orderbook.{depth}.BTCUSDT" for depth in (50, 200)]

    async def listen(sim: SimProcess) -> None:
        await asyncio.to_thread(sim.wait_state, lambda state: state["ledger"].get("book", {}).get("BTCUSDT", 0) > 20)
        async with connect(sim, "linear") as c:
            client.append(c)
            await c.ask("subscribe", *topics)
            await c.until(lambda: all(len(c.frames(topic)) > 10 for topic in topics))

    with started("linear", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    truth = sim.ledger()
    for topic in topics:
        frames = client[0].frames(topic)
        replay = {u: (dict(b), dict(a)) for u, (b, a) in truth.books("BTCUSDT", topic.removesuffix(".BTCUSDT"))}
        assert rebuilt(frames) == [(f["data"]["u"], replay[f["data"]["u"]]) for f in frames]


def test_the_best_prices_are_told_again_after_3_s(tmp_path: Path) -> None:
    """F7. With the same `u`."""

    async def listen(sim: SimProcess) -> None:
        async with connect(sim, "spot") as c:
            await c.call("subscribe", "orderbook.1.BTCUSDT")
            await c.until(lambda: len(c.frames("orderbook.1.BTCUSDT")) > 2)
            await asyncio.to_thread(sim.pause)
            seen = len(c.frames("orderbook.1.BTCUSDT"))
            await c.until(lambda: len(c.frames("orderbook.1.BTCUSDT")) > seen + 1)
            data = [f["data"] for f in c.frames("orderbook.1.BTCUSDT")]
            assert data[-1] == data[-2]

    with started("spot", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    ids = [line["id"] for line in sim.ledger().rows("bbo", "BTCUSDT")]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("anew", [0, 1])
def test_a_snapshot_that_nobody_asked_for(anew: int) -> None:
    """F7. The book is replaced, and deltas go on from its number."""

    async def listen(sim: SimProcess) -> None:
        async with connect(sim, "linear") as c:
            topic = "orderbook.200.BTCUSDT"
            await c.call("subscribe", topic)
            await c.until(lambda: len(c.frames(topic)) > 3)
            await asyncio.to_thread(sim.fault, "snapshot", ticker="BTCUSDT", anew=anew)
            await c.until(lambda: [f["type"] for f in c.frames(topic)].count("snapshot") == 2)
            seen = len(c.frames(topic))
            assert (c.frames(topic)[-1]["data"]["u"] == 1) == bool(anew)
            await c.until(lambda: len(c.frames(topic)) > seen + 3)
            rebuilt(c.frames(topic))

    with started("linear") as sim:
        within(listen(sim))


def test_one_bad_topic_fails_the_whole_request() -> None:
    """F13. And options answer topic by topic."""

    async def listen(sim: SimProcess) -> None:
        async with connect(sim, "linear") as c:
            for bad in (
                "orderbook.500.BTCUSDT",
                "publicTrade.NOPE",
                "kline.7.BTCUSDT",
                "orderbook.x.BTCUSDT",
                "nonsense",
            ):
                reply = await c.call("subscribe", "tickers.BTCUSDT", bad)
                assert (reply["success"], reply["ret_msg"]) == (False, f"error:handler not found,topic:{bad}")
            assert sim.state()["connections"][0]["subscriptions"] == []
            assert (await c.call("subscribe", "tickers.BTCUSDT"))["success"] is True
            again = await c.call("subscribe", "tickers.BTCUSDT")
            assert (again["success"], "already subscribed" in again["ret_msg"]) == (False, True)
            assert (await c.call("unsubscribe", "tickers.BTCUSDT"))["success"] is True
            assert (await c.call("subscribe", "tickers.BTCUSDT"))["success"] is True

    async def listen_to_options(sim: SimProcess) -> None:
        async with connect(sim, "option") as c:
            good, bad = f"tickers.{TICKERS['option'][0]}", "tickers.NO-1JAN27-1-C-USDT"
            reply = await c.call("subscribe", bad, good)
            assert reply["data"] == {"failTopics": [bad], "successTopics": [good]}

    with started("linear") as sim:
        within(listen(sim))
    with started("option") as sim:
        within(listen_to_options(sim))


def test_spot_takes_ten_topics_at_once_and_a_connection_21000_characters() -> None:
    async def listen(sim: SimProcess) -> None:
        async with connect(sim, "spot") as c:
            topics = [f"{kind}.T{n:03d}USDT" for kind in ("publicTrade", "tickers", "orderbook.1") for n in range(30)]
            assert (await c.call("subscribe", *topics[:11]))["success"] is False
            assert (await c.call("subscribe", *topics[:10]))["success"] is True
            assert (await c.call("subscribe", *topics[10:20]))["success"] is True
            assert (await c.call("subscribe", *topics[20:30]))["ret_msg"] == "error:args too long"
        assert sim.state()["violations"] == {"args": 1, "args_chars": 1}

    with SimProcess("bybit_spot", "--rate", "5", "--tickers", "30", "--limit", "args_chars_max=600") as sim:
        within(listen(sim))


@pytest.mark.parametrize("category", CATEGORIES)
def test_pings_and_what_follows_without_them(category: str) -> None:
    async def listen(sim: SimProcess) -> None:
        async with connect(sim, category) as c:
            await c.ws.send_str('{"req_id":"p","op":"ping"}')
            pong = await c.next()
            if category == "option":
                assert (pong["op"], pong["req_id"], len(pong["args"])) == ("pong", "p", 1)
            else:
                assert (pong["op"], pong["ret_msg"], pong["success"], pong["req_id"]) == ("ping", "pong", True, "p")
            await c.drain()
            assert c.ws.close_code == 1008
        assert sim.state()["violations"] == {"no_ping": 1}

    with started(category, "--limit", "ping_within_s=1") as sim:
        within(listen(sim))


def test_a_reply_that_comes_long_behind_the_data() -> None:
    async def listen(sim: SimProcess) -> None:
        async with connect(sim, "linear") as c:
            req_id = await c.ask("subscribe", "orderbook.50.BTCUSDT", "publicTrade.BTCUSDT")
            await c.until(lambda: c.rows and c.rows[-1].get("req_id") == req_id)
            assert len(c.rows) > 10

    with started("linear", "--limit", "reply_ms=1500") as sim:
        within(listen(sim))


def test_rest_recent_trades_and_lists(tmp_path: Path) -> None:
    async def ask(sim: SimProcess) -> None:
        await asyncio.to_thread(sim.wait_state, lambda state: state["ledger"].get("trade", {}).get("BTCUSDT", 0) > 80)
        sim.pause()
        for limit, count in ((1, 1), (60, 60), (1000, 60)):
            _, body = await get(sim, "recent-trade", category="spot", symbol="BTCUSDT", limit=limit)
            assert len(body["result"]["list"]) == count
            lists.append(body["result"]["list"])
        _, body = await get(sim, "instruments-info", category="spot")
        assert [i["symbol"] for i in body["result"]["list"]] == list(TICKERS["spot"])
        assert (await get(sim, "recent-trade", category="spot", symbol="NOPE"))[1]["retCode"] == 10001
        assert (await get(sim, "recent-trade", category="linear", symbol="BTCUSDT"))[1]["retCode"] == 10001
        assert (await get(sim, "time"))[1]["retCode"] == 0

    lists: list[list[Row]] = []
    with started("spot", ledger=tmp_path / "l") as sim:
        within(ask(sim))
        sim.stop()
    newest = list(sim.ledger().trades("BTCUSDT").values())[::-1]
    for rows in lists:
        assert [(r["execId"], r["price"], r["size"], r["side"].upper(), int(r["time"])) for r in rows] == [
            (t["id"], t["price"], t["qty"], t["side"], t["t"] // 1000) for t in newest[: len(rows)]
        ]


def test_instruments_come_in_pages_and_options_by_coin() -> None:
    async def ask(sim: SimProcess) -> None:
        seen, cursor = [], ""
        while True:
            query = {
                "category": "linear",
                "limit": "1000",
                **({"cursor": cursor.replace("%2C", ",")} if cursor else {}),
            }
            _, body = await get(sim, "instruments-info", **query)
            seen += [row["symbol"] for row in body["result"]["list"]]
            if not (cursor := body["result"]["nextPageCursor"]):
                break
        assert seen == sim.tickers
        assert len(seen) == 25

    async def ask_options(sim: SimProcess) -> None:
        _, body = await get(sim, "option-base-coins")
        assert {row["baseCoin"] for row in body["result"]["list"] if row["hasSymbol"]} == {"BTC", "ETH", "SOL"}
        for coin, query in (("BTC", {}), ("ETH", {"baseCoin": "ETH"}), ("SOL", {"baseCoin": "SOL"})):
            _, body = await get(sim, "instruments-info", category="option", **query)
            assert {row["baseCoin"] for row in body["result"]["list"]} == {coin}

    with SimProcess("bybit_linear", "--rate", "1", "--tickers", "25", "--limit", "page_max=10") as sim:
        within(ask(sim))
    with SimProcess("bybit_option", "--rate", "1") as sim:
        within(ask_options(sim))


def test_too_many_requests_end_in_403_and_a_ban() -> None:
    """Without a Retry-After: the documents say how long to wait. `10006` comes in the body of an answer."""

    async def ask(sim: SimProcess) -> None:
        answers = [await get(sim, "time") for _ in range(5)]
        assert [status for status, _ in answers] == [200, 200, 200, 403, 403]
        assert [body["retCode"] for status, body in answers[:3] if status == 200] == [0, 0, 10006]
        assert sim.state()["violations"] == {"requests": 1, "requests_while_banned": 1}

    limits = ("requests_max=3", "visits_max=2", "visits_window_s=60")
    with SimProcess("bybit_linear", "--rate", "1", *(x for limit in limits for x in ("--limit", limit))) as sim:
        within(ask(sim))


def test_connections_per_five_minutes_and_paths() -> None:
    async def ask(sim: SimProcess) -> None:
        async with connect(sim, "inverse"), connect(sim, "inverse"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with connect(sim, "inverse"):
                    pass
            assert refused.value.status == 403
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with connect(sim, "linear"):
                pass
        assert refused.value.status == 404

    with SimProcess("bybit_inverse", "--rate", "1", "--limit", "connects_max=2") as sim:
        within(ask(sim))


def test_gateways_stamp_their_own_time() -> None:
    """Two connections get the same message with another `ts`, as gateways word it."""

    async def listen(sim: SimProcess) -> None:
        async with connect(sim, "spot") as a, connect(sim, "spot") as b:
            topic = "orderbook.200.BTCUSDT"
            for c in (a, b):
                await c.call("subscribe", topic)
            await b.until(lambda: len(b.frames(topic)) > 5)
            last = b.frames(topic)[-1]
            await a.until(lambda: a.frames(topic) and a.frames(topic)[-1]["data"]["u"] == last["data"]["u"])
            first = a.frames(topic)[-1]
            assert first["data"] == last["data"]
            assert abs(first["ts"] - last["ts"]) == 1

    with started("spot") as sim:
        within(listen(sim))


def test_holes_without_ids_are_replaced_by_their_end() -> None:
    """What the proof takes from the ledger of gaps where a feed has no ids."""
    hole = {
        "feed": "trades",
        "ticker": "A",
        "first_id": None,
        "last_id": None,
        "from_time": 1,
        "to_time": 5,
        "repaired": False,
    }
    other = {**hole, "to_time": 9}
    assert standing_gaps([hole, other, {**hole, "repaired": True}]) == [other]
