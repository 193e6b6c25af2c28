"""The simulated Binance USD-M: its two paths against its ledger, what REST says, and what the wrong path does not."""

import asyncio
import itertools
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from test_sim_binance import ask, drained, get, socket, until, within

from tools.sim.process import SimProcess
from tools.venues import load_venue

Row = dict[str, Any]
VENUE = "binance_futures"
FAST = ("--rate", "200", "--tickers", "BTCUSDT:1,ETHUSDT:0.5")
PUBLIC = ("trade", "bookTicker", "depth@100ms", "depth", "depth@500ms")
MARKET = ("aggTrade", "markPrice@1s", "ticker", "kline_1m", "forceOrder")


def ms(t: int) -> int:
    return t // 1000


def test_every_stream_of_both_paths_equals_the_ledger(tmp_path: Path) -> None:
    rows: list[Row] = []

    async def listen(sim: SimProcess) -> None:
        async def one(path: str, names: tuple[str, ...], hears: asyncio.Event) -> None:
            streams = "/".join(f"btcusdt@{name}" for name in names)
            async with socket(sim, f"/{path}/stream?streams={streams}") as ws:
                hears.set()
                rows.extend(await drained(ws))

        ready = [asyncio.Event(), asyncio.Event()]
        both = asyncio.gather(one("public", PUBLIC, ready[0]), one("market", MARKET, ready[1]))
        for hears in ready:
            await hears.wait()
        sim.resume()
        await both

    with SimProcess(
        VENUE, *FAST, "--seconds", "4", "--hold", "--limit", "off_book_every=5", ledger=tmp_path / "l"
    ) as sim:
        within(listen(sim))
        sim.wait()
    truth = sim.ledger()
    by_stream: dict[str, list[Any]] = {}
    for row in rows:
        by_stream.setdefault(row["stream"].partition("@")[2], []).append(row["data"])
    assert set(by_stream) == {*PUBLIC, *MARKET}

    trades = [
        (str(d["t"]), d["p"], d["q"], "SELL" if d["m"] else "BUY", d["T"])
        for d in by_stream["trade"]
        if d["X"] == "MARKET"
    ]
    assert trades == [(t["id"], t["price"], t["qty"], t["side"], ms(t["t"])) for t in truth.trades("BTCUSDT").values()]
    assert len(trades) > 50
    others = [(d["t"], d["X"], d["T"]) for d in by_stream["trade"] if d["X"] != "MARKET"]
    assert others == [(t["seq"], t["type"], ms(t["t"])) for t in truth.rows("off_book", "BTCUSDT")]
    assert {kind for _, kind, _ in others} == {"INSURANCE_FUND", "ADL", "NA"}
    ids = [d["t"] for d in by_stream["trade"]]
    assert ids == list(range(ids[0], ids[0] + len(ids))), "one counter for all of them"
    aggs = [(str(d["a"]), d["p"], d["q"], d["nq"], d["f"], d["l"]) for d in by_stream["aggTrade"]]
    wanted = truth.aggtrades("BTCUSDT").values()
    assert aggs == [(t["id"], t["price"], t["qty"], t["qty"], t["first"], t["last"]) for t in wanted]
    best = [(d["u"], d["b"], d["B"], d["a"], d["A"], d["T"]) for d in by_stream["bookTicker"]]
    bbo = truth.bbo("BTCUSDT").values()
    assert best == [(t["id"], t["bid"], t["bid_qty"], t["ask"], t["ask_qty"], ms(t["t"])) for t in bbo]
    assert all(d["E"] > d["T"] for d in by_stream["bookTicker"])
    for speed in ("depth@100ms", "depth", "depth@500ms"):
        sent = [(d["U"], d["u"], d["pu"], d["b"], d["a"], d["T"]) for d in by_stream[speed]]
        events = truth.book_events("BTCUSDT", speed)
        assert sent == [(e["first"], e["last"], e["prev"], e["bids"], e["asks"], ms(e["t"])) for e in events]
        assert all(after[2] == before[1] for before, after in itertools.pairwise(sent)), "pu chains"
        assert all(before[1] < after[0] for before, after in itertools.pairwise(sent))
    skips = [after["U"] - before["u"] for before, after in itertools.pairwise(by_stream["depth@100ms"])]
    assert max(skips) > 1, "ids are of the whole market, so U does not chain"
    marks = [t["data"]["mark"] for t in truth.rows("ticker", "BTCUSDT") if "mark" in t["data"]]
    assert [(d["p"], d["i"], d["r"], d["T"] * 1000) for d in by_stream["markPrice@1s"]] == [
        (m["p"], m["i"], m["r"], m["next_us"]) for m in marks
    ]
    days = [t["data"]["c"] for t in truth.rows("ticker", "BTCUSDT") if "mark" not in t["data"]]
    assert [d["c"] for d in by_stream["ticker"]] == days
    assert not {"b", "B", "a", "A", "x"} & by_stream["ticker"][0].keys()
    forced = [(o["S"], o["p"], o["q"], o["T"]) for o in (d["o"] for d in by_stream["forceOrder"])]
    assert forced == [(t["side"], t["price"], t["qty"], ms(t["t"])) for t in truth.rows("liquidation", "BTCUSDT")]


def test_a_stream_on_the_wrong_path_is_acknowledged_and_never_comes() -> None:
    """F1, as measured in 2026: without a route, or on the other one, the answer is the same as on the right path."""

    async def talk(sim: SimProcess) -> None:
        for path, wrong, right in (
            ("/stream", "btcusdt@markPrice@1s", "btcusdt@bookTicker"),
            ("/public/stream", "btcusdt@aggTrade", "btcusdt@depth@100ms"),
            ("/market/stream", "btcusdt@trade", "btcusdt@aggTrade"),
        ):
            async with socket(sim, path) as ws:
                assert await ask(ws, method="SUBSCRIBE", params=[wrong, right], id=1) == {"result": None, "id": 1}
                assert set((await ask(ws, method="LIST_SUBSCRIPTIONS", id=2))["result"]) == {wrong, right}
                rows = await until(ws, lambda rows: len(rows) >= 40)
                assert {row["stream"] for row in rows if "stream" in row} == {right}
                await ask(ws, method="UNSUBSCRIBE", params=[wrong], id=4)
                assert (await ask(ws, method="LIST_SUBSCRIPTIONS", id=5))["result"] == [right]

    with SimProcess(VENUE, "--rate", "400", "--tickers", "BTCUSDT:1") as sim:
        within(talk(sim))


def test_a_rest_snapshot_and_the_diffs_rebuild_the_ledgers_book(tmp_path: Path) -> None:
    """The venue's own procedure with plain dictionaries, on a connection that comes in the middle."""
    kept: list[Row] = []
    answers: list[Row] = []

    async def listen(sim: SimProcess) -> None:
        async with socket(sim, "/public/ws/btcusdt@depth@100ms") as ws:
            kept.extend(await until(ws, lambda rows: len(rows) == 3))
            answers.append((await get(sim, "/fapi/v1/depth?symbol=BTCUSDT&limit=1000"))[1])
            kept.extend(await until(ws, lambda rows: len(rows) == 20))

    with SimProcess(VENUE, *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    truth = sim.ledger()
    (snapshot,) = answers
    last, first = snapshot["lastUpdateId"], True
    book = {"b": dict(snapshot["bids"]), "a": dict(snapshot["asks"])}
    applied = 0
    for event in kept:
        if event["u"] < last or event["u"] == last:
            continue
        assert event["pu"] == last or (first and event["U"] <= last <= event["u"])
        for side, levels in book.items():
            for price, qty in event[side]:
                if Decimal(qty):
                    levels[price] = qty
                else:
                    levels.pop(price, None)
        last, first = event["u"], False
        applied += 1
        assert (book["b"], book["a"]) == truth.book("BTCUSDT", last)
    assert applied > 10


def test_rest_answers(tmp_path: Path) -> None:
    async def talk(sim: SimProcess) -> None:
        async with socket(sim, "/public/stream?streams=btcusdt@trade") as ws:
            await until(ws, lambda rows: sum(row["data"]["X"] != "MARKET" for row in rows) >= 5)
        status, trades, headers = await get(sim, "/fapi/v1/trades?symbol=BTCUSDT&limit=1000")
        assert (status, headers["X-MBX-USED-WEIGHT-1M"]) == (200, "5")
        ids = [t["id"] for t in trades]
        left_out = set(range(ids[0], ids[-1] + 1)) - set(ids)
        assert left_out, "what is no execution is not in the list"
        found.update({t["id"]: (t["price"], t["qty"], t["isBuyerMaker"], t["time"]) for t in trades})
        gone.update(left_out)
        path = f"/fapi/v1/historicalTrades?symbol=BTCUSDT&fromId={ids[3]}&limit=2"
        assert (await get(sim, path))[:2] == (
            401,
            {"code": -2015, "msg": "Invalid API-key, IP, or permissions for action."},
        )
        assert (await get(sim, path, **{"X-MBX-APIKEY": "good"}))[1] == trades[3:5]
        told["interest"] = (await get(sim, "/fapi/v1/openInterest?symbol=BTCUSDT"))[1]
        premium = (await get(sim, "/fapi/v1/premiumIndex?symbol=BTCUSDT"))[1]
        assert {"markPrice", "indexPrice", "lastFundingRate", "nextFundingTime", "time"} <= premium.keys()
        for limit in (5, 10, 20, 50, 100, 500, 1000):
            assert (await get(sim, f"/fapi/v1/depth?symbol=BTCUSDT&limit={limit}"))[0] == 200
        status, body, _ = await get(sim, "/fapi/v1/depth?symbol=BTCUSDT&limit=200")
        assert (status, body["code"]) == (400, -4021)
        (info,) = (await get(sim, "/fapi/v1/exchangeInfo"))[1]["symbols"]
        assert (info["contractType"], info["status"]) == ("PERPETUAL", "TRADING")
        for path in ("/api/v3/depth?symbol=BTCUSDT", "/fapi/v1/nothing"):
            async with aiohttp.ClientSession() as session, session.get(sim.rest_url + path) as answer:
                assert answer.status == 404

    found: dict[int, Any] = {}
    gone: set[int] = set()
    told: Row = {}
    market = ("--rate", "400", "--tickers", "BTCUSDT:1", "--limit", "off_book_every=5", "--credential", "good:-")
    with SimProcess(VENUE, *market, ledger=tmp_path / "l") as sim:
        within(talk(sim))
        sim.stop()
    truth = sim.ledger()
    assert gone <= {row["seq"] for row in truth.rows("off_book", "BTCUSDT")}
    trades = truth.trades("BTCUSDT")
    assert found == {
        seq: (row["price"], row["qty"], row["side"] == "SELL", ms(row["t"]))
        for seq in found for row in (trades[str(seq)],)
    }  # fmt: skip
    (polled,) = truth.rows("first_ticker", "BTCUSDT")
    assert told["interest"] == {
        "openInterest": polled["data"]["openInterest"], "symbol": "BTCUSDT", "time": ms(polled["t"]),
    }  # fmt: skip


def test_unknown_paths_are_not_found() -> None:
    async def talk(sim: SimProcess) -> None:
        for path in ("/private/ws", "/public", "/market/other", "/other/stream"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with socket(sim, path):
                    pass
            assert refused.value.status == 404, path

    with SimProcess(VENUE, "--rate", "0.01") as sim:
        within(talk(sim))


def test_the_dialogue_is_that_of_spot() -> None:
    async def talk(sim: SimProcess) -> None:
        async with socket(sim, "/market/ws/btcusdt@ticker") as ws:
            assert (await ask(ws, method="GET_PROPERTY", params=["combined"], id=1))["result"] is False
            assert (await ask(ws, method="SET_PROPERTY", params=["combined", True], id=2))["result"] is None
            (row,) = await until(ws, lambda rows: len(rows) == 1)
            assert row["stream"] == "btcusdt@ticker"
            assert (await ask(ws, method="SUBSCRIBE", params=7, id=3))["error"]["code"] == 2

    with SimProcess(VENUE, *FAST) as sim:
        within(talk(sim))
        assert json.dumps(sim.state()["violations"]) == "{}"


def test_a_recorder_of_all_feeds_hears_both_paths(tmp_path: Path) -> None:
    """mdreplay record, whose own reading of the protocol also sends each stream to the path that delivers it."""
    venue, feeds = load_venue(VENUE), ("trades", "orderbook_l2", "bbo", "tickers", "candles", "liquidations")
    many = venue.streams_for([f"T{n}USDT" for n in range(100)], feeds)
    assert [len(some) for some in venue.connections(many)] == [200, 100, 200, 100]
    with SimProcess(VENUE, "--rate", "200", "--tickers", "BTCUSDT:1") as sim:
        command = [
            sys.executable, "-m", "tools.replay", "record", VENUE, "BTCUSDT", "--feeds", ",".join(feeds), "--seconds", "4",
            "--out", str(tmp_path / "r.jsonl"), "--ws-url", sim.ws_url, "--rest-url", sim.rest_url,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert sim.state()["violations"] == {}
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    heard = {json.loads(line["raw"])["stream"].partition("@")[2] for line in lines if line["dir"] == "in"}
    assert heard >= {"trade", "depth@100ms", "bookTicker", "ticker", "kline_1m", "forceOrder"}
    assert {line["url"].partition("?")[0].removeprefix(sim.ws_url) for line in lines if line["dir"] == "open"} == {
        "/public/stream", "/market/stream",
    }  # fmt: skip
