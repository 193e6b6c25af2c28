"""The simulated OKX: its messages against its ledger, its dialogue, and each of its limits."""

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tools.sim.process import SimProcess

Row = dict[str, Any]
Sides = tuple[dict[str, str], dict[str, str]]
VENUE = "okx"
WITHIN_S = 40.0
SPOT, SWAP, INVERSE, OPTION = "BTC-USDT", "BTC-USDT-SWAP", "ETH-USD-SWAP", "BTC-USD-261225-90000-C"
FAST = ("--rate", "150", "--tickers", f"{SPOT}:1,{SWAP}:0.5,{INVERSE}:0.3,{OPTION}:0.2")
KEY, SECRET, PHRASE = "someone", "secret", "sesame"
ACCEPTED = ("--credential", f"{KEY}:{SECRET}/{PHRASE}")


def within(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WITHIN_S))


class Client:
    """One connection; pushes that come before an answer are kept."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.pushes: list[Row] = []
        self.calls = 0

    async def next(self) -> Row | str:
        message = await self.ws.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, (message, self.ws.close_code)
        if message.data == "pong":
            return "pong"
        row: Row = json.loads(message.data)
        if "data" in row:
            self.pushes.append(row)
        return row

    async def ask(self, op: str, *args: Row) -> list[Row]:
        """The answers to one request, one for each arg."""
        self.calls += 1
        await self.ws.send_str(json.dumps({"id": str(self.calls), "op": op, "args": args}))
        answers: list[Row] = []
        while len(answers) < len(args):
            row = await self.next()
            if isinstance(row, dict) and "event" in row:
                answers.append(row)
        return answers

    async def subscribe(self, *names: str) -> None:
        args = [arg_of(name) for name in names]
        answers = await self.ask("subscribe", *args)
        assert [(a["event"], a.get("arg"), a["id"]) for a in answers] == [
            ("subscribe", arg, str(self.calls)) for arg in args
        ]

    async def login(self, secret: str = SECRET, key: str = KEY, phrase: str = PHRASE, at: float = 0.0) -> str:
        now = str(int(at or time.time()))
        sign = hmac.new(secret.encode(), f"{now}GET/users/self/verify".encode(), hashlib.sha256).digest()
        arg = {"apiKey": key, "passphrase": phrase, "timestamp": now, "sign": base64.b64encode(sign).decode()}
        (answer,) = await self.ask("login", arg)
        return str(answer["code"])

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            await self.next()

    async def drain(self) -> None:
        async for message in self.ws:
            if message.type is aiohttp.WSMsgType.TEXT and "data" in (row := json.loads(message.data)):
                self.pushes.append(row)

    def of(self, name: str) -> list[Row]:
        return [row for row in self.pushes if row["arg"] == arg_of(name)]

    def data(self, name: str) -> list[Any]:
        return [data for row in self.of(name) for data in row["data"]]


def arg_of(name: str) -> Row:
    channel, _, of = name.partition(":")
    return {"channel": channel, "instType" if of.isalpha() and of.isupper() else "instId": of}


@asynccontextmanager
async def connect(sim: SimProcess, path: str = "public") -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{sim.ws_url}/ws/v5/{path}") as ws:
        yield Client(ws)


async def get(sim: SimProcess, endpoint: str, **params: Any) -> tuple[int, Row]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{sim.rest_url}/api/v5/{endpoint}", params=params) as answer,
    ):
        return answer.status, json.loads(await answer.text())


def apply(book: Sides, push: Row) -> None:
    """What the venue's documentation says about a book message, with plain dictionaries."""
    (data,) = push["data"]
    for side, levels in zip(book, (data["bids"], data["asks"]), strict=True):
        if push["action"] == "snapshot":
            side.clear()
        for price, size, dead, orders in levels:
            assert dead == "0"
            assert (size == "0") == (orders == "0")
            if size == "0":
                side.pop(price, None)
            else:
                side[price] = size


# Streams


def test_every_public_channel_equals_the_ledger(tmp_path: Path) -> None:
    client: list[Client] = []
    books = {"books": [SPOT, SWAP], "books-l2-tbt": [INVERSE]}
    names = [f"{channel}:{ticker}" for channel, tickers in books.items() for ticker in tickers]
    names += [f"{channel}:{t}" for channel in ("trades", "bbo-tbt", "tickers") for t in (SPOT, SWAP)]
    names += [f"mark-price:{SWAP}", f"open-interest:{OPTION}", "index-tickers:BTC-USDT", f"funding-rate:{SWAP}"]
    names += ["liquidation-orders:SWAP"]

    async def listen(sim: SimProcess) -> None:
        async with connect(sim) as c:
            client.append(c)
            assert await c.login() == "0"
            await c.subscribe(*names)
            sim.resume()
            await c.drain()
            assert c.ws.close_code == 1001

    with SimProcess(VENUE, *FAST, *ACCEPTED, "--seconds", "4", "--hold", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.wait()
    truth, got = sim.ledger(), client[0]
    for channel, tickers in books.items():
        for ticker in tickers:
            first, *updates = got.of(f"{channel}:{ticker}")
            assert (first["action"], first["data"][0]["prevSeqId"], first["data"][0]["checksum"]) == ("snapshot", -1, 0)
            book: Sides = ({}, {})
            apply(book, first)
            last = first["data"][0]["seqId"]
            assert book == truth.book(ticker, last, channel)
            replay = {u: (dict(b), dict(a)) for u, (b, a) in truth.books(ticker, channel)}
            for update in updates:
                assert (update["action"], update["data"][0]["prevSeqId"]) == ("update", last)
                last = update["data"][0]["seqId"]
                apply(book, update)
                assert book == replay[last]
                assert max(map(Decimal, book[0])) < min(map(Decimal, book[1]))
            assert last == truth.book_events(ticker, channel)[-1]["last"]
            assert len(updates) > 5
    for ticker in (SPOT, SWAP):
        trades = got.data(f"trades:{ticker}")
        assert [(t["tradeId"], t["px"], t["sz"], t["side"].upper()) for t in trades] == [
            (row["id"], row["price"], row["qty"], row["side"]) for row in truth.aggtrades(ticker).values()
        ]
        for before, behind in itertools.pairwise(trades):
            assert int(behind["tradeId"]) - int(behind["count"]) == int(before["tradeId"])
        assert any(t["count"] != "1" for t in trades)
        best = [(b["seqId"], *b["bids"][0][:2], *b["asks"][0][:2], b["ts"]) for b in got.data(f"bbo-tbt:{ticker}")]
        assert best == [
            (row["id"], row["bid"], row["bid_qty"], row["ask"], row["ask_qty"], str(row["t"] // 1000))
            for row in truth.bbo(ticker).values()
        ]
        told = [row["data"] for row in truth.rows("ticker", ticker) if "askPx" in row["data"]]
        assert [(t["bidPx"], t["last"], t["ts"]) for t in got.data(f"tickers:{ticker}")[1:]] == [
            (row["bidPx"], row.get("last", ""), row["ts"]) for row in told
        ]
    for name, ticker, word in (
        (f"mark-price:{SWAP}", SWAP, "markPx"), (f"open-interest:{OPTION}", OPTION, "oi"),
        ("index-tickers:BTC-USDT", SWAP, "idxPx"), (f"funding-rate:{SWAP}", SWAP, "fundingRate"),
    ):  # fmt: skip
        told = [row["data"][word] for row in truth.rows("ticker", ticker) if word in row["data"]]
        assert [data[word] for data in got.data(name)[1:]] == told != []
    forced = [(o["instId"], d["sz"], d["side"]) for o in got.data("liquidation-orders:SWAP") for d in o["details"]]
    wanted = [(r["ticker"], r["qty"], r["side"].lower()) for t in (SWAP, INVERSE) for r in truth.rows("liquidation", t)]
    assert sorted(forced) == sorted(wanted) != []


def test_the_business_path_has_every_fill_and_the_candles(tmp_path: Path) -> None:
    client: list[Client] = []

    async def listen(sim: SimProcess) -> None:
        async with connect(sim, "business") as c:
            client.append(c)
            await c.subscribe(f"trades-all:{SWAP}", f"candle1s:{SWAP}", f"candle1s:{INVERSE}")
            sim.resume()
            await c.drain()

    with SimProcess(VENUE, *FAST, "--seconds", "4", "--hold", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.wait()
    truth, got = sim.ledger(), client[0]
    fills = got.data(f"trades-all:{SWAP}")
    assert [(t["tradeId"], t["px"], t["sz"]) for t in fills] == [
        (row["id"], row["price"], row["qty"]) for row in truth.trades(SWAP).values()
    ]
    assert [int(b["tradeId"]) - int(a["tradeId"]) for a, b in itertools.pairwise(fills)] == [1] * (len(fills) - 1)
    for ticker, value in ((SWAP, Decimal("0.01")), (INVERSE, Decimal(10))):
        closed = [row for row in got.data(f"candle1s:{ticker}") if row[8] == "1"]
        assert len(closed) >= 3
        for row in closed:
            start = int(row[0])
            mine = [t for t in truth.trades(ticker).values() if start <= t["t"] // 1000 < start + 1000]
            assert Decimal(row[5]) == sum(Decimal(t["qty"]) for t in mine), "contracts"
            coins = sum(Decimal(t["qty"]) * value / (Decimal(t["price"]) if ticker == INVERSE else 1) for t in mine)
            assert abs(Decimal(row[6]) - coins) < Decimal("1e-7"), "base units"
            if mine:
                assert (row[1], row[4]) == (mine[0]["price"], mine[-1]["price"])


def test_a_book_joined_in_the_middle_and_taken_again(tmp_path: Path) -> None:
    """A snapshot only for a channel that was not subscribed; the next update names it as its predecessor."""

    async def talk(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("book", {}).get(SPOT, 0) > 30)
        name = f"books:{SPOT}"
        async with connect(sim) as c:
            for snapshots in (1, 1, 2):
                await c.subscribe(name)
                seen = len(c.of(name))
                await c.until(lambda seen=seen: len(c.of(name)) > seen + 3)
                pushes = c.of(name)
                assert [push["action"] for push in pushes].count("snapshot") == snapshots
                if snapshots == 1 and len(pushes) > seen:
                    at = [push["action"] for push in pushes].index("snapshot")
                    assert pushes[at + 1]["data"][0]["prevSeqId"] == pushes[at]["data"][0]["seqId"]
                if c.calls == 2:
                    (answer,) = await c.ask("unsubscribe", arg_of(name))
                    assert answer["event"] == "unsubscribe"

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(talk(sim))


def test_a_keep_alive_names_itself_and_a_reset_has_a_smaller_number() -> None:
    """F6."""

    async def talk(sim: SimProcess) -> None:
        name = f"books:{SPOT}"
        async with connect(sim) as c:
            await c.subscribe(name)
            await c.until(lambda: len(c.of(name)) > 3)
            sim.pause()
            await c.until(lambda: sum(d["seqId"] == d["prevSeqId"] for d in c.data(name)) >= 2)
            sim.resume()
            sim.fault("renumber", ticker=SPOT)
            await c.until(lambda: c.data(name)[-1]["seqId"] < c.data(name)[-1]["prevSeqId"])
            seen = len(c.of(name))
            await c.until(lambda: len(c.of(name)) > seen + 3)
            _, *updates = c.data(name)
            for before, behind in itertools.pairwise(updates):
                assert behind["prevSeqId"] == before["seqId"]
            quiet = [d for d in updates if d["seqId"] == d["prevSeqId"]]
            assert all(d["bids"] == d["asks"] == [] for d in quiet)
            assert sum(d["seqId"] < d["prevSeqId"] for d in updates) == 1

    with SimProcess(VENUE, *FAST, "--limit", "keep_alive_s=0.3") as sim:
        within(talk(sim))


# Dialogue


def test_what_is_wrong_is_answered_as_the_venue_answers() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            wrong = [
                arg_of(f"candle1m:{SPOT}"), arg_of("trades:NO-SUCH"), arg_of(f"funding-rate:{SPOT}"), arg_of("index-tickers:X-Y"),
                arg_of(f"trades-all:{SPOT}"), {"channel": "trades"}, arg_of(f"mark-price:{SPOT}"),
            ]  # fmt: skip
            for arg, answer in zip(wrong, await c.ask("subscribe", *wrong), strict=True):
                assert (answer["event"], answer["code"], "arg" in answer) == ("error", "60018", False)
                assert f"channel:{arg['channel']}," in answer["msg"]
            mixed = await c.ask("subscribe", arg_of("trades:NO-SUCH"), arg_of(f"trades:{SPOT}"))
            assert [answer["event"] for answer in mixed] == ["error", "subscribe"], "each arg by itself"
            (tbt,) = await c.ask("subscribe", arg_of(f"books-l2-tbt:{SPOT}"))
            assert tbt["code"] == "60011"
            assert await c.login(key="nobody") == "60032"
            assert await c.login(secret="x") == "60007"
            assert await c.login(phrase="x") == "60024"
            assert await c.login(at=1_700_000_000) == "60006"
            assert await c.login() == "0"
            (tier,) = await c.ask("subscribe", arg_of(f"books-l2-tbt:{SPOT}"))
            assert tier["code"] == "64003"
            for text in ("{", "[]", '{"op":"dance","args":[{}]}', '{"op":"subscribe","args":[]}', '{"op":"subscribe"}'):
                await c.ws.send_str(text)
                row = await c.next()
                while isinstance(row, str) or "event" not in row:
                    row = await c.next()
                assert (row["event"], row["code"]) == ("error", "60012")
        async with connect(sim, "business") as c:
            (answer,) = await c.ask("subscribe", arg_of(f"trades:{SPOT}"))
            assert answer["code"] == "60018"
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with connect(sim, "nothing"):
                pass
        assert refused.value.status == 404

    with SimProcess(VENUE, *FAST, *ACCEPTED, "--limit", "tier_ok=0") as sim:
        within(talk(sim))


def test_both_books_of_one_instrument_cannot_be_had() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            assert await c.login() == "0"
            await c.subscribe(f"books-l2-tbt:{SPOT}")
            (answer,) = await c.ask("subscribe", arg_of(f"books:{SPOT}"))
            assert answer["event"] == "error"
            sim.fault("auth_expire")
            await asyncio.to_thread(sim.wait_state, lambda state: state["connections"][0]["subscriptions"] == [])
            (again,) = await c.ask("subscribe", arg_of(f"books-l2-tbt:{SPOT}"))
            assert again["code"] == "60011"

    with SimProcess(VENUE, *FAST, *ACCEPTED) as sim:
        within(talk(sim))


def test_pings_and_silence() -> None:
    """The text ping keeps a connection on which nothing else comes; without it the venue hangs up."""

    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            for _ in range(8):
                await asyncio.sleep(0.3)  # it is the client's own pace that is tested
                await c.ws.send_str("ping")
                assert await c.next() == "pong"
            assert (await c.ws.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING)
            assert c.ws.close_code == 4004
        assert sim.state()["violations"] == {"silent": 1}

    with SimProcess(VENUE, "--limit", "silent_s=1.5") as sim:
        within(talk(sim))


def test_a_notice_and_a_new_instrument() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            await c.subscribe("instruments:SWAP")
            sim.fault("listing", ticker="SOL-USDT-SWAP")
            await c.until(lambda: bool(c.data("instruments:SWAP")))
            (row,) = c.data("instruments:SWAP")
            assert (row["instId"], row["state"], row["ctVal"], row["ctValCcy"]) == ("SOL-USDT-SWAP", "live", "1", "SOL")
            await c.subscribe("books:SOL-USDT-SWAP")
            await c.until(lambda: len(c.of("books:SOL-USDT-SWAP")) > 2)
            sim.fault("shutdown", after_s=0.5)
            row = await c.next()
            while isinstance(row, str) or row.get("event") != "notice":
                row = await c.next()
            assert row["code"] == "64008"
            await c.drain()
            assert c.ws.close_code == 1001

    with SimProcess(VENUE, *FAST) as sim:
        within(talk(sim))


# Limits


def test_requests_of_an_hour_and_their_length() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim) as c:
            long = [arg_of(f"tickers:{SPOT}")] * 30
            assert len(json.dumps(long)) > 1000
            await c.ws.send_str(json.dumps({"op": "subscribe", "args": long}))
            row = await c.next()
            assert isinstance(row, dict)
            assert row["code"] == "60012"
            for _ in range(3):
                (answer,) = await c.ask("subscribe", arg_of(f"tickers:{SPOT}"))
                assert answer["event"] == "subscribe"
            (answer,) = await c.ask("unsubscribe", arg_of(f"tickers:{SPOT}"))
            assert answer["code"] == "60014"
            assert sim.state()["connections"][0]["subscriptions"] == [f"tickers:{SPOT}"]
        async with connect(sim) as c:
            await c.subscribe(f"tickers:{SPOT}")  # the count is that of a connection
        assert sim.state()["violations"] == {"request_bytes": 1, "requests_per_hour": 1}

    with SimProcess(VENUE, "--limit", "requests_per_hour=3", "--limit", "request_bytes=1000") as sim:
        within(talk(sim))


def test_connections_and_requests_beyond_the_limits_are_refused() -> None:
    async def talk(sim: SimProcess) -> None:
        async with connect(sim), connect(sim):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with connect(sim):
                    pass
            assert refused.value.status == 429
        for _ in range(2):
            assert (await get(sim, "market/history-trades", instId=SPOT))[0] == 200
        status, body = await get(sim, "market/history-trades", instId=SPOT)
        assert (status, body["code"]) == (429, "50011")
        assert (await get(sim, "public/time"))[0] == 200
        assert sim.state()["violations"] == {"connects": 1, "rest": 1}

    limits = ("connects_max=2", "connects_window_s=60", "history_max=2", "rest_window_s=60")
    with SimProcess(VENUE, *itertools.chain.from_iterable(("--limit", limit) for limit in limits)) as sim:
        within(talk(sim))


# HTTP


def test_the_lists_of_instruments() -> None:
    async def talk(sim: SimProcess) -> None:
        found: dict[str, Row] = {}
        for query in ({"instType": "SPOT"}, {"instType": "SWAP"}, {"instType": "OPTION", "instFamily": "BTC-USD"}):
            status, body = await get(sim, "public/instruments", **query)
            assert (status, body["code"]) == (200, "0")
            found |= {row["instId"]: row for row in body["data"]}
        assert set(found) == {SPOT, SWAP, INVERSE, OPTION}
        assert [found[t]["ctType"] for t in (SPOT, SWAP, INVERSE)] == ["", "linear", "inverse"]
        assert [(found[t]["ctVal"], found[t]["ctMult"], found[t]["ctValCcy"]) for t in (SPOT, SWAP, INVERSE, OPTION)] == [
            ("", "", ""), ("0.01", "1", "BTC"), ("10", "1", "USD"), ("1", "0.01", "BTC"),
        ]  # fmt: skip
        assert (found[SPOT]["baseCcy"], found[SPOT]["quoteCcy"], found[SWAP]["uly"]) == ("BTC", "USDT", "BTC-USDT")
        assert found[OPTION]["expTime"] == "1798185600000"
        assert (await get(sim, "public/instruments", instType="OPTION"))[1]["code"] == "50015"
        assert (await get(sim, "public/instruments"))[1]["code"] == "51000"
        status, body = await get(sim, "market/books", instId="NO-SUCH")
        assert (status, body["code"]) == (200, "51001"), "an error with status 200"

    with SimProcess(VENUE) as sim:
        within(talk(sim))


def test_rest_answers_agree_with_the_ledger(tmp_path: Path) -> None:
    kept: list[Any] = []

    async def talk(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("trade", {}).get(SPOT, 0) > 60)
        sim.pause()
        _, body = await get(sim, "market/trades", instId=SPOT, limit=500)
        trades = body["data"]
        kept.append(trades)
        ids = [int(t["tradeId"]) for t in trades]
        assert ids == sorted(ids, reverse=True)
        after = ids[20]
        _, body = await get(sim, "market/history-trades", instId=SPOT, type=1, after=after, limit=7)
        assert body["data"] == trades[21:28], "those before an id, the newest first"
        _, body = await get(sim, "market/history-trades", instId=SPOT, type=1, after=ids[0] + 50, limit=3)
        assert body["data"] == trades[:3]
        _, body = await get(sim, "market/books", instId=SPOT, sz=400)
        kept.append(body["data"][0])
        _, body = await get(sim, "market/candles", instId=SPOT, bar="1Dutc", limit=1)
        assert body["data"][0][4] == trades[0]["px"]
        _, body = await get(sim, "market/ticker", instId=SPOT)
        assert body["data"][0]["last"] == trades[0]["px"]
        _, body = await get(sim, "public/mark-price", instType="SWAP", instId=SWAP)
        assert Decimal(body["data"][0]["markPx"]) > 0
        _, body = await get(sim, "public/open-interest", instType="SWAP", instFamily=SPOT, instId=SWAP)
        assert Decimal(body["data"][0]["oi"]) > 0
        _, body = await get(sim, "public/funding-rate", instId=SWAP)
        assert Decimal(body["data"][0]["fundingRate"]) > 0
        _, body = await get(sim, "market/index-tickers", instId=SPOT)
        assert Decimal(body["data"][0]["idxPx"]) > 0
        assert (await get(sim, "public/funding-rate", instId=SPOT))[1]["data"] == []
        assert (await get(sim, "public/open-interest", instType="OPTION", instId=SWAP))[1]["code"] == "50015"
        assert (await get(sim, "market/index-tickers", instId="NO-USD"))[1]["code"] == "51001"

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(talk(sim))
        sim.stop()
    truth = sim.ledger()
    assert [(t["tradeId"], t["px"], t["sz"], t["side"].upper()) for t in kept[0][::-1]] == [
        (t["id"], t["price"], t["qty"], t["side"]) for t in truth.trades(SPOT).values()
    ]
    last, final = truth.final_book(SPOT)
    book = kept[1]
    assert (book["seqId"], *({p: q for p, q, *_ in book[s]} for s in ("bids", "asks"))) == (last, *final)
