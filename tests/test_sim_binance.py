"""The simulated Binance Spot: its messages against its ledger, its REST endpoints, and each of its limits."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tools.sim.process import SimProcess

Row = dict[str, Any]
VENUE = "binance_spot"
WITHIN_S = 20.0
FAST = ("--rate", "200", "--tickers", "BTCUSDT:1,ETHUSDT:0.5")


@pytest.fixture(scope="module")
def quiet() -> Iterator[SimProcess]:
    """One exchange for all tests that only ask wrong things."""
    with SimProcess(VENUE, "--rate", "0.01") as sim:
        yield sim


def within(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WITHIN_S))


@asynccontextmanager
async def socket(sim: SimProcess, path: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with aiohttp.ClientSession() as session, session.ws_connect(sim.ws_url + path, autoping=False) as ws:
        yield ws


async def get(sim: SimProcess, path: str, **headers: str) -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession() as session, session.get(sim.rest_url + path, headers=headers) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if text else None, answer.headers


async def until(ws: aiohttp.ClientWebSocketResponse, done: Callable[[list[Row]], bool]) -> list[Row]:
    """Messages up to the one with which `done` holds."""
    rows: list[Row] = []
    while not done(rows):
        rows.append(json.loads((await ws.receive()).data))
    return rows


async def ask(ws: aiohttp.ClientWebSocketResponse, **message: Any) -> Row:
    """Send a control message and wait for its answer, passing over data."""
    await ws.send_str(json.dumps(message))
    rows = await until(ws, lambda rows: bool(rows) and ("result" in rows[-1] or "error" in rows[-1]))
    return rows[-1]


async def drained(ws: aiohttp.ClientWebSocketResponse) -> list[Row]:
    """Everything up to the orderly close."""
    return [json.loads(message.data) async for message in ws if message.type is aiohttp.WSMsgType.TEXT]


def test_every_stream_equals_the_ledger(tmp_path: Path) -> None:
    names = ("trade", "aggTrade", "bookTicker", "depth@100ms", "depth", "kline_1s", "ticker", "miniTicker")
    streams = "/".join(f"btcusdt@{name}" for name in names)
    rows: list[Row] = []

    async def listen(sim: SimProcess) -> None:
        async with socket(sim, f"/stream?streams={streams}/!miniTicker@arr&timeUnit=MICROSECOND") as ws:
            sim.resume()
            rows.extend(await drained(ws))

    with SimProcess(VENUE, *FAST, "--seconds", "4", "--hold", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.wait()
    truth = sim.ledger()
    by_stream: dict[str, list[Any]] = {}
    for row in rows:
        by_stream.setdefault(row["stream"], []).append(row["data"])

    trades = [(str(d["t"]), d["p"], d["q"], "SELL" if d["m"] else "BUY", d["T"]) for d in by_stream["btcusdt@trade"]]
    assert trades == [(t["id"], t["price"], t["qty"], t["side"], t["t"]) for t in truth.trades("BTCUSDT").values()]
    assert len(trades) > 50
    aggs = [(str(d["a"]), d["p"], d["q"], d["f"], d["l"]) for d in by_stream["btcusdt@aggTrade"]]
    wanted = truth.aggtrades("BTCUSDT").values()
    assert aggs == [(t["id"], t["price"], t["qty"], t["first"], t["last"]) for t in wanted]
    best = [(d["u"], d["b"], d["B"], d["a"], d["A"]) for d in by_stream["btcusdt@bookTicker"]]
    bbo = truth.bbo("BTCUSDT").values()
    assert best == [(t["id"], t["bid"], t["bid_qty"], t["ask"], t["ask_qty"]) for t in bbo]
    for speed in ("depth@100ms", "depth"):
        sent = [(d["U"], d["u"], d["b"], d["a"], d["E"]) for d in by_stream[f"btcusdt@{speed}"]]
        events = truth.book_events("BTCUSDT", speed)
        assert sent == [(e["first"], e["last"], e["bids"], e["asks"], e["t"]) for e in events]
        assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(sent))
    closed = {d["k"]["t"]: d["k"] for d in by_stream["btcusdt@kline_1s"] if d["k"]["x"]}
    candles = truth.candles("BTCUSDT", "1s")
    assert closed.keys() == candles.keys()
    assert all(closed[t]["c"] == candles[t]["close"] and closed[t]["n"] == candles[t]["trades"] for t in closed)
    tickers = truth.rows("ticker", "BTCUSDT")
    assert [d["c"] for d in by_stream["btcusdt@ticker"]] == [t["data"]["c"] for t in tickers]
    assert [d["v"] for d in by_stream["btcusdt@miniTicker"]] == [t["data"]["v"] for t in tickers]
    assert {d["s"] for part in by_stream["!miniTicker@arr"] for d in part} == {"BTCUSDT", "ETHUSDT"}


def test_a_rest_snapshot_and_the_diffs_rebuild_the_ledgers_book(tmp_path: Path) -> None:
    """The venue's own procedure with plain dictionaries, on a connection that comes in the middle."""
    kept: list[Row] = []
    answers: list[Row] = []

    async def listen(sim: SimProcess) -> None:
        async with socket(sim, "/ws/btcusdt@depth@100ms") as ws:
            kept.extend(await until(ws, lambda rows: len(rows) == 3))
            answers.append((await get(sim, "/api/v3/depth?symbol=BTCUSDT&limit=5000"))[1])
            kept.extend(await until(ws, lambda rows: len(rows) == 20))

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    truth = sim.ledger()
    (snapshot,) = answers
    last = snapshot["lastUpdateId"]
    assert last >= kept[0]["U"]
    book = {"b": dict(snapshot["bids"]), "a": dict(snapshot["asks"])}
    applied = 0
    for event in kept:
        if event["u"] <= last:
            continue
        assert event["U"] <= last + 1
        for side, levels in book.items():
            for price, qty in event[side]:
                if Decimal(qty):
                    levels[price] = qty
                else:
                    levels.pop(price, None)
        last = event["u"]
        applied += 1
        assert (book["b"], book["a"]) == truth.book("BTCUSDT", last)
        assert max(map(Decimal, book["b"])) < min(map(Decimal, book["a"]))
        best = truth.bbo("BTCUSDT").get(last)
        if best:
            assert Decimal(best["bid"]) == max(map(Decimal, book["b"]))
    assert applied > 10


def test_control_messages() -> None:
    async def talk(sim: SimProcess) -> None:
        async with socket(sim, "/ws/btcusdt@trade") as ws:
            (first,) = await until(ws, lambda rows: len(rows) == 1)
            assert first["e"] == "trade"
            assert first["T"] < 10**14, "milliseconds unless asked otherwise"
            done = {"result": None, "id": 1}
            assert await ask(ws, method="SUBSCRIBE", params=["ethusdt@trade", "nosuch@trade"], id=1) == done
            listed = await ask(ws, method="LIST_SUBSCRIPTIONS", id="abc")
            assert listed == {"result": ["btcusdt@trade", "ethusdt@trade", "nosuch@trade"], "id": "abc"}
            assert await ask(ws, method="UNSUBSCRIBE", params=["btcusdt@trade"], id=1) == done
            rows = await until(ws, lambda rows: len(rows) == 5)
            assert {row["s"] for row in rows} == {"ETHUSDT"}
            assert await ask(ws, method="SET_PROPERTY", params=["combined", True], id=1) == done
            assert await ask(ws, method="GET_PROPERTY", params=["combined"], id=2) == {"result": True, "id": 2}
            (wrapped,) = await until(ws, lambda rows: len(rows) == 1)
            assert wrapped["stream"] == "ethusdt@trade"

    with SimProcess(VENUE, *FAST, "--limit", "messages_per_s=100") as sim:
        within(talk(sim))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", 3),
        ("[]", 2),
        ('{"id":1}', 2),
        ('{"method":"DANCE","id":1}', 2),
        ('{"method":"SUBSCRIBE","params":"btcusdt@trade","id":1}', 2),
        ('{"method":"SUBSCRIBE","params":["a@trade"],"id":1.5}', 2),
        ('{"method":"SUBSCRIBE","params":["a@trade"],"id":1,"more":1}', 2),
        ('{"method":"SET_PROPERTY","params":["combined",1],"id":1}', 1),
        ('{"method":"GET_PROPERTY","params":["other"],"id":1}', 0),
    ],
)
def test_wrong_control_messages_are_answered_with_the_venues_errors(text: str, code: int, quiet: SimProcess) -> None:
    async def talk() -> None:
        async with socket(quiet, "/ws") as ws:
            await ws.send_str(text)
            assert json.loads((await ws.receive()).data)["error"]["code"] == code

    within(talk())


def test_rest_answers_agree_with_the_ledger(tmp_path: Path) -> None:
    async def talk(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("trade", {}).get("BTCUSDT", 0) > 60)
        sim.pause()
        sim.wait_state(lambda state: state["paused"])
        truth = sim.wait_state(lambda state: state["paused"])["ledger"]["trade"]["BTCUSDT"]
        assert (await get(sim, "/api/v3/ping"))[:2] == (200, {})
        assert (await get(sim, "/api/v3/time"))[1]["serverTime"] < 10**14
        micro = await get(sim, "/api/v3/time", **{"X-MBX-TIME-UNIT": "MICROSECOND"})
        assert micro[1]["serverTime"] > 10**15
        info = (await get(sim, "/api/v3/exchangeInfo"))[1]
        assert [s["symbol"] for s in info["symbols"]] == ["BTCUSDT", "ETHUSDT"]
        assert info["rateLimits"][0]["limit"] == 6000
        newest = (await get(sim, "/api/v3/trades?symbol=BTCUSDT&limit=1000"))[1]
        assert len(newest) == truth
        first = newest[10]["id"]
        old = (await get(sim, f"/api/v3/historicalTrades?symbol=BTCUSDT&fromId={first}&limit=7"))[1]
        assert old == newest[10:17]
        depth = (await get(sim, "/api/v3/depth?symbol=BTCUSDT&limit=5000"))[1]
        sim.stop()
        last, final = sim.ledger().final_book("BTCUSDT")
        assert (depth["lastUpdateId"], dict(depth["bids"]), dict(depth["asks"])) == (last, *final)
        rows = sim.ledger().trades("BTCUSDT")
        assert [(str(t["id"]), t["price"], t["qty"], t["isBuyerMaker"]) for t in newest] == [
            (t["id"], t["price"], t["qty"], t["side"] == "SELL") for t in rows.values()
        ]

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(talk(sim))


def test_more_rest_answers() -> None:
    async def talk(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["ledger"].get("trade", {}).get("BTCUSDT", 0) > 60)
        sim.pause()
        aggs = (await get(sim, "/api/v3/aggTrades?symbol=BTCUSDT&limit=1000"))[1]
        assert all(after["f"] == before["l"] + 1 for before, after in itertools.pairwise(aggs))
        some = (await get(sim, f"/api/v3/aggTrades?symbol=BTCUSDT&fromId={aggs[5]['a']}&limit=3"))[1]
        assert some == aggs[5:8]
        timed = (await get(sim, f"/api/v3/aggTrades?symbol=BTCUSDT&startTime={aggs[3]['T'] + 1}"))[1]
        assert timed[0]["T"] > aggs[3]["T"]
        klines = (await get(sim, "/api/v3/klines?symbol=BTCUSDT&interval=1d"))[1]
        assert len(klines[0]) == 12
        day = (await get(sim, "/api/v3/ticker/24hr?symbol=BTCUSDT"))[1]
        assert day["count"] == klines[0][8]
        assert len((await get(sim, "/api/v3/ticker/bookTicker"))[1]) == 2
        short = (await get(sim, "/api/v3/depth?symbol=BTCUSDT&limit=5"))[1]
        full = (await get(sim, "/api/v3/depth?symbol=BTCUSDT&limit=5000"))[1]
        assert short["bids"] == full["bids"][:5]
        assert len(full["asks"]) > 12

    with SimProcess(VENUE, *FAST) as sim:
        within(talk(sim))


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("depth?symbol=NOSUCH", -1121),
        ("depth", -1102),
        ("depth?symbol=BTC$USDT", -1100),
        ("depth?symbol=BTCUSDT&limit=x", -1100),
        ("trades?symbol=BTCUSDT&limit=0", -1130),
        ("klines?symbol=BTCUSDT&interval=7m", -1120),
        ("klines?symbol=BTCUSDT", -1102),
        ("exchangeInfo?symbol=NOSUCH", -1121),
    ],
)
def test_wrong_requests_are_refused_with_the_venues_codes(path: str, code: int, quiet: SimProcess) -> None:
    async def talk() -> None:
        status, body, headers = await get(quiet, "/api/v3/" + path)
        assert (status, body["code"]) == (400, code)
        assert int(headers["X-MBX-USED-WEIGHT-1M"]) > 0

    within(talk())


def test_weights_are_counted_then_429_then_418() -> None:
    async def talk(sim: SimProcess) -> None:
        used = []
        for limit in (100, 500, 1000, 5000):
            status, _, headers = await get(sim, f"/api/v3/depth?symbol=BTCUSDT&limit={limit}")
            assert status == 200
            used.append(int(headers["X-MBX-USED-WEIGHT-1M"]))
        assert used == [5, 30, 80, 330]
        status, body, headers = await get(sim, "/api/v3/exchangeInfo")
        assert (status, body["code"]) == (429, -1003)
        assert 0 < int(headers["Retry-After"]) <= 60
        for _ in range(2):
            assert (await get(sim, "/api/v3/ping"))[0] == 429
        status, body, headers = await get(sim, "/api/v3/ping")
        assert (status, body["code"], headers["Retry-After"]) == (418, -1003, "120")
        state = sim.state()
        assert state["requests_before_retry_after"] == 3
        assert (state["http_429"], state["http_418"]) == (3, 1)

    with SimProcess(VENUE, "--limit", "weight_max=340", "--limit", "early_until_ban=3") as sim:
        within(talk(sim))


def test_the_weight_is_given_back_when_its_window_ends() -> None:
    async def talk(sim: SimProcess) -> None:
        statuses: list[int] = []
        while 429 not in statuses or statuses[-1] != 200:
            status, _, headers = await get(sim, "/api/v3/exchangeInfo")
            if statuses and statuses[-1] == 429:
                assert (status, headers["X-MBX-USED-WEIGHT-1M"]) == (200, "20")
            statuses.append(status)
            if status == 429:
                await asyncio.sleep(float(headers["Retry-After"]))  # what the venue asks for, not a guess
        assert sim.state()["requests_before_retry_after"] == 0

    with SimProcess(VENUE, "--limit", "weight_max=50", "--limit", "weight_window_s=1") as sim:
        within(talk(sim))


def test_too_many_client_messages_end_the_connection() -> None:
    async def talk(sim: SimProcess) -> None:
        async with socket(sim, "/ws") as ws:
            for number in range(6):
                await ws.send_str(json.dumps({"method": "LIST_SUBSCRIPTIONS", "id": number}))
            rows = await drained(ws)
            assert len(rows) == 5
            assert ws.close_code == 1008
        assert sim.state()["violations"] == {"client_messages": 1}

    with SimProcess(VENUE) as sim:
        within(talk(sim))


def test_pings_and_pongs_count_as_messages() -> None:
    async def talk(sim: SimProcess) -> None:
        async with socket(sim, "/ws") as ws:
            for number in range(3):
                await ws.ping(str(number).encode())
                await ws.pong(b"")
            pongs = [message async for message in ws if message.type is aiohttp.WSMsgType.PONG]
            assert [bytes(pong.data) for pong in pongs] == [b"0", b"1", b"2"]
            assert ws.close_code == 1008

    with SimProcess(VENUE) as sim:
        within(talk(sim))


def test_too_many_streams_are_refused() -> None:
    async def talk(sim: SimProcess) -> None:
        async with socket(sim, "/ws") as ws:
            names = [f"s{number}@trade" for number in range(11)]
            assert "error" in await ask(ws, method="SUBSCRIBE", params=names, id=1)
            assert await ask(ws, method="SUBSCRIBE", params=names[:10], id=2) == {"result": None, "id": 2}
            assert "error" in await ask(ws, method="SUBSCRIBE", params=names[10:], id=3)
            assert await ask(ws, method="SUBSCRIBE", params=names[:3], id=4) == {"result": None, "id": 4}
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with socket(sim, "/stream?streams=" + "/".join(names)):
                pass
        assert refused.value.status == 400

    with SimProcess(VENUE, "--limit", "streams_max=10") as sim:
        within(talk(sim))


def test_too_many_connects_are_refused() -> None:
    async def talk(sim: SimProcess) -> None:
        for _ in range(3):
            async with socket(sim, "/ws"):
                pass
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with socket(sim, "/ws"):
                pass
        assert refused.value.status == 429
        assert sim.state()["violations"] == {"connects": 1}

    with SimProcess(VENUE, "--limit", "connects_max=3") as sim:
        within(talk(sim))


def test_a_ping_must_be_answered_with_its_payload() -> None:
    """The first client echoes each ping and stays; the second sends pongs of its own and is disconnected."""

    async def echo(ws: aiohttp.ClientWebSocketResponse) -> int:
        pings = 0
        while pings < 6:
            message = await ws.receive()
            assert message.type is aiohttp.WSMsgType.PING
            await ws.pong(bytes(message.data))
            pings += 1
        return pings

    async def talk(sim: SimProcess) -> None:
        async with socket(sim, "/ws") as good, socket(sim, "/ws") as bad:
            echoed = asyncio.create_task(echo(good))
            async for message in bad:
                if message.type is aiohttp.WSMsgType.PING:
                    await bad.pong(b"")
            assert bad.close_code == 1008
            assert await echoed == 6
        assert sim.state()["violations"] == {"pong_missing": 1}

    limits = ("--limit", "ping_every_s=0.3", "--limit", "pong_within_s=1", "--limit", "messages_per_s=100")
    with SimProcess(VENUE, *limits) as sim:
        within(talk(sim))


def test_a_connection_ends_with_its_lifetime(tmp_path: Path) -> None:
    async def talk(sim: SimProcess) -> None:
        async with socket(sim, "/ws/btcusdt@trade") as ws:
            await drained(ws)
            assert ws.close_code == 1001

    with SimProcess(VENUE, "--limit", "lifetime_s=0.5", ledger=tmp_path / "l") as sim:
        within(talk(sim))
        sim.stop()
    closed = [line for line in sim.ledger().connections if line["event"] == "close"]
    assert [line["reason"] for line in closed] == ["lifetime"]


def test_unknown_paths_are_not_found() -> None:
    async def talk(sim: SimProcess) -> None:
        assert (await get(sim, "/api/v3/nothing"))[0] == 404
        assert (await get(sim, "/nothing"))[0] == 404
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with socket(sim, "/nothing"):
                pass
        assert refused.value.status == 404

    with SimProcess(VENUE) as sim:
        within(talk(sim))


def test_hundreds_of_invented_symbols() -> None:
    async def talk(sim: SimProcess) -> None:
        names = [ticker.lower() for ticker in sim.tickers]
        async with socket(sim, "/stream") as ws:
            params = [f"{name}@depth@100ms" for name in names]
            assert await ask(ws, method="SUBSCRIBE", params=params, id=1) == {"result": None, "id": 1}
            seen: set[str] = set()
            while len(seen) < len(names):
                seen.add(json.loads((await ws.receive()).data)["stream"])

    with SimProcess(VENUE, "--tickers", "200", "--rate", "40", "--depth", "15") as sim:
        assert len(sim.tickers) == 200
        within(talk(sim))
