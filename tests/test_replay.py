"""mdreplay against recorded traffic: an independent aiohttp client must get every recorded frame, byte for byte."""

import asyncio
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import zstandard

DEADLINE_S = 60.0
DATA = Path(os.environ.get("MD_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="recorded traffic is not here (MD_DATA)")
BINANCE = DATA / "binance_spot" / "recorded"
DERIBIT = DATA / "deribit" / "recorded"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """An async test runs in an event loop of its own."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        asyncio.run(test(**arguments))

    return run


class Server:
    """One `mdreplay serve` process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"no ready line, exit code {process.wait(DEADLINE_S)}: {process.stderr and process.stderr.read()}"
        self.ready = json.loads(line)
        assert self.ready["ready"] is True
        self.ws, self.rest = self.ready["ws_url"], self.ready["rest_url"]

    def summary(self, stop: bool = True) -> dict[str, Any]:
        """End the process (by SIGTERM unless it ends by itself) and take its last line."""
        if stop:
            self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == 0, err
        return json.loads(out)


def mdreplay(*args: object) -> list[str]:
    return [sys.executable, "-m", "tools.replay", *map(str, args)]


@contextmanager
def serving(*args: object) -> Iterator[Server]:
    command = mdreplay("serve", *args)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process)
        finally:
            if process.poll() is None:
                process.kill()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with aiohttp.ClientSession() as http, http.ws_connect(url, max_msg_size=0) as socket:
        yield socket


async def everything(socket: aiohttp.ClientWebSocketResponse) -> list[str]:
    """All text frames until the server closes."""
    async with asyncio.timeout(DEADLINE_S):
        return [message.data async for message in socket]


async def some(socket: aiohttp.ClientWebSocketResponse, count: int) -> list[str]:
    return [await socket.receive_str(timeout=DEADLINE_S) for _ in range(count)]


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        return response.status, await response.text()


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Entries of a recording, read without the product's reader."""
    raw = path.read_bytes()
    if path.suffix == ".zst":
        raw = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read()
    return [json.loads(line) for line in raw.splitlines()]


def frames_of(path: Path) -> list[str]:
    return [line["raw"] for line in lines_of(path) if line["dir"] == "in"]


def resident_kb(pid: int) -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def is_data(raw: str) -> bool:
    frame = json.loads(raw)
    return "stream" in frame or frame.get("method") == "subscription"


def write_recording(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def trade(n: int, symbol: str = "BTCUSDT", form: str = "combined") -> str:
    data = f'{{"e":"trade","E":{n},"s":"{symbol}","t":{n},"p":"1.50","q":"2","T":{n},"m":true,"M":true}}'
    return data if form == "raw" else f'{{"stream":"{symbol.lower()}@trade","data":{data}}}'


def depth(first: int, last: int, symbol: str = "BTCUSDT") -> str:
    data = f'{{"e":"depthUpdate","E":1,"s":"{symbol}","U":{first},"u":{last},"b":[["1.0","2.0"]],"a":[]}}'
    return f'{{"stream":"{symbol.lower()}@depth@100ms","data":{data}}}'


def received(raws: list[str], step_ns: int = 1_000_000) -> list[dict[str, Any]]:
    return [{"t": 10**18 + n * step_ns, "conn": "ws1", "dir": "in", "raw": raw} for n, raw in enumerate(raws)]


def rpc(method: str, params: Any, request_id: Any = 77) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params})


def deribit_recording(path: Path) -> Path:
    def frame(channel: str, n: int) -> str:
        data = {"timestamp": n, "instrument_name": "BTC-PERPETUAL", "best_bid_price": 1.0, "best_bid_amount": float(n)}
        content = {"jsonrpc": "2.0", "method": "subscription", "params": {"channel": channel, "data": data}}
        return json.dumps(content, separators=(",", ":"))

    return write_recording(path, received([frame("quote.BTC-PERPETUAL", n) for n in range(5)], 10**8))


# recorded traffic, whole


@needs_data
@pytest.mark.parametrize(
    "name",
    ["btcusdt_20240808", "multi_20210405", "multi_20210417", "multi_20211012"],
)
@in_loop
async def test_binance_recording_arrives_whole(name: str) -> None:
    path = BINANCE / f"{name}.jsonl.zst"
    wanted = frames_of(path)
    streams = dict.fromkeys(json.loads(raw)["stream"] for raw in wanted)
    with serving(path, "--speed", "max", "--exit") as server:
        assert server.ready["exchange"] == "binance_spot"
        async with connected(f"{server.ws}/stream?streams={'/'.join(streams)}") as socket:
            got = await everything(socket)
        summary = server.summary(stop=False)
    assert got == wanted
    assert summary["played"] == len(wanted) == sum(summary["streams"].values())
    assert summary["finished"] is True
    assert summary["clients"] == 1


@needs_data
@pytest.mark.parametrize(
    "name",
    [
        "options_20210405",
        "options_20210722",
        "tickers_20260930",
        "book_btc_perpetual_20261004",
        "book_btc_usdc_perpetual_20261004",
        "book_btcperp_testnet_20260913",
    ],
)
@in_loop
async def test_deribit_recording_arrives_whole(name: str) -> None:
    path = DERIBIT / f"{name}.jsonl.zst"
    wanted = [raw for raw in frames_of(path) if is_data(raw)]
    channels = list(dict.fromkeys(json.loads(raw)["params"]["channel"] for raw in wanted))
    with serving(path, "--speed", "max", "--exit") as server:
        assert server.ready["exchange"] == "deribit"
        async with connected(f"{server.ws}/ws/api/v2") as socket:
            await socket.send_str(rpc("public/subscribe", {"channels": [*channels, "book.NO-SUCH.100ms"]}))
            reply, *got = await everything(socket)
        server.summary(stop=False)
    assert json.loads(reply)["id"] == 77
    assert json.loads(reply)["result"] == channels  # the unknown one is left out, as the venue does
    assert got == wanted


@needs_data
@in_loop
async def test_a_recorded_acknowledgement_is_used_where_it_fits() -> None:
    path = DERIBIT / "options_20210722.jsonl.zst"
    request = next(line["raw"] for line in lines_of(path) if line["dir"] == "out")
    recorded_ack = next(raw for raw in frames_of(path) if not is_data(raw))
    with serving(path, "--speed", "max") as server:
        async with connected(f"{server.ws}/ws/api/v2") as socket:
            await socket.send_str(request)
            assert (await some(socket, 1))[0] == recorded_ack
        async with connected(f"{server.ws}/ws/api/v2") as socket:
            await socket.send_str(json.dumps({**json.loads(request), "id": "mine"}))
            made = json.loads((await some(socket, 1))[0])
        server.summary()
    assert made["id"] == "mine"
    assert set(made["result"]) == set(json.loads(recorded_ack)["result"])


@needs_data
@in_loop
async def test_recordings_are_merged_by_receive_time() -> None:
    paths = [BINANCE / "btcusdt_20240808.jsonl.zst", BINANCE / "ethusdt_20240808.jsonl.zst"]
    inward = [line for path in paths for line in lines_of(path) if line["dir"] == "in" and "@trade" in line["raw"][:40]]
    wanted = [line["raw"] for line in sorted(inward, key=lambda line: line["t"])]
    with serving(*paths, "--speed", "max", "--exit") as server:
        async with connected(f"{server.ws}/stream?streams=btcusdt@trade/ethusdt@trade") as socket:
            got = await everything(socket)
        summary = server.summary(stop=False)
    assert got == wanted
    assert summary["unclaimed"] == summary["recorded"] - len(wanted)


# subscriptions


@in_loop
async def test_a_client_gets_its_streams_only(tmp_path: Path) -> None:
    raws = [trade(n, symbol) for n in range(20) for symbol in ("BTCUSDT", "ETHUSDT")]
    path = write_recording(tmp_path / "r.jsonl", received(raws))
    with serving(path, "--speed", "max", "--exit", "--wait-clients", 2) as server:
        async with connected(f"{server.ws}/stream?streams=ethusdt@trade") as eth, connected(f"{server.ws}/ws") as btc:
            await btc.send_str('{"method":"SUBSCRIBE","params":["btcusdt@trade"],"id":"b7"}')
            (eth_frames, (ack, *btc_frames)) = await asyncio.gather(everything(eth), everything(btc))
        summary = server.summary(stop=False)
    assert json.loads(ack) == {"result": None, "id": "b7"}
    assert eth_frames == [trade(n, "ETHUSDT") for n in range(20)]
    assert btc_frames == [trade(n, form="raw") for n in range(20)]  # /ws gives the payload alone, its text unchanged
    assert summary["streams"] == {"btcusdt@trade": 20, "ethusdt@trade": 20}


@in_loop
async def test_streams_are_told_from_bare_payloads(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received([trade(n, form="raw") for n in range(5)]))
    with serving(path, "--speed", "max", "--exit") as server:
        assert server.ready["exchange"] == "binance_spot"
        async with connected(f"{server.ws}/stream?streams=btcusdt@trade") as socket:
            assert await everything(socket) == [trade(n) for n in range(5)]


@in_loop
async def test_binance_dialogue(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received([trade(1)]))
    with serving(path, "--wait-clients", 2) as server:
        async with connected(f"{server.ws}/ws/btcusdt@trade") as socket:
            for text in (
                '{"method":"SUBSCRIBE","params":["a@trade","b@trade"],"id":1}',
                '{"method":"UNSUBSCRIBE","params":["a@trade"],"id":2}',
                '{"method":"LIST_SUBSCRIPTIONS","id":3}',
                '{"method":"SET_PROPERTY","params":["combined",true],"id":4}',
                '{"method":"GET_PROPERTY","params":["combined"],"id":5}',
                '{"method":"NONSENSE","id":6}',
                "{not json",
            ):
                await socket.send_str(text)
            replies = [json.loads(text) for text in await some(socket, 7)]
    assert replies[:5] == [
        {"result": None, "id": 1},
        {"result": None, "id": 2},
        {"result": ["btcusdt@trade", "b@trade"], "id": 3},
        {"result": None, "id": 4},
        {"result": True, "id": 5},
    ]
    assert replies[5]["code"] == 2
    assert replies[5]["id"] == 6
    assert replies[6]["code"] == 3


@in_loop
async def test_deribit_dialogue(tmp_path: Path) -> None:
    path = deribit_recording(tmp_path / "r.jsonl")
    with serving(path, "--wait-clients", 2) as server:
        async with connected(f"{server.ws}/ws/api/v2") as socket:
            calls: list[tuple[str, Any]] = [
                ("public/auth", {"grant_type": "client_credentials", "client_id": "x", "client_secret": "y"}),
                ("public/get_time", {}),
                ("public/test", {}),
                ("public/set_heartbeat", {"interval": 5}),
                ("public/set_heartbeat", {"interval": 30}),
                ("public/get_instruments", {"currency": "BTC", "kind": "future"}),
                ("public/subscribe", {"channels": ["quote.BTC-PERPETUAL", "trades.BTC-PERPETUAL.raw"]}),
                ("public/unsubscribe", {"channels": ["trades.BTC-PERPETUAL.raw"]}),
                ("public/subscribe", {"channels": 7}),
                ("public/no_such_method", {}),
            ]
            for n, (method, params) in enumerate(calls):
                await socket.send_str(rpc(method, params, n))
            await socket.send_str("{not json")
            replies = [json.loads(text) for text in await some(socket, len(calls) + 1)]
    assert [reply.get("id") for reply in replies] == [*range(len(calls)), None]
    assert replies[0]["result"]["token_type"] == "bearer"
    assert abs(replies[1]["result"] / 1000 - time.time()) < DEADLINE_S
    assert "version" in replies[2]["result"]
    assert replies[3]["error"]["code"] == -32602
    assert replies[4]["result"] == "ok"
    assert [i["instrument_name"] for i in replies[5]["result"]] == ["BTC-PERPETUAL"]
    assert replies[6]["result"] == ["quote.BTC-PERPETUAL", "trades.BTC-PERPETUAL.raw"]
    assert replies[7]["result"] == ["trades.BTC-PERPETUAL.raw"]
    assert replies[8]["error"]["code"] == -32602
    assert replies[9]["error"]["code"] == -32601
    assert replies[10]["error"]["code"] == 11050


@in_loop
async def test_unanswered_test_request_ends_the_connection(tmp_path: Path) -> None:
    path = deribit_recording(tmp_path / "r.jsonl")
    with serving(path, "--speed", 50, "--wait-clients", 2) as server:
        async with connected(f"{server.ws}/ws/api/v2") as socket:
            await socket.send_str(rpc("public/set_heartbeat", {"interval": 10}))
            await some(socket, 1)
            for kind in ("test_request", "heartbeat", "test_request"):
                assert json.loads((await some(socket, 1))[0])["params"] == {"type": kind}
                if kind == "test_request":
                    await socket.send_str(rpc("public/test", {}))
                    await some(socket, 1)
            rest = [json.loads(raw)["params"]["type"] for raw in await everything(socket)]
            assert rest == ["heartbeat", "test_request"]
            assert socket.close_code == 4000


@in_loop
async def test_an_unknown_path_is_refused(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received([trade(1)]))
    with serving(path) as server:
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(f"{server.ws}/no/such/path")
        assert refused.value.status == 404
        assert server.summary()["unanswered"] == {"WebSocket /no/such/path": 1}


# pace, size, backpressure, end


@in_loop
async def test_the_pace_is_the_recorded_one_and_loop_starts_again(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received([trade(n) for n in range(4)], 100_000_000))
    with serving(path, "--speed", 1, "--loop") as server:
        started = time.monotonic()
        async with connected(f"{server.ws}/stream?streams=btcusdt@trade") as socket:
            first = await some(socket, 4)
            elapsed_s = time.monotonic() - started
            second = await some(socket, 4)
        summary = server.summary()
    assert first == second == [trade(n) for n in range(4)]
    # Frames are never early (0.5 s until playback starts, 0.3 s of recording); how late is the machine's affair.
    assert elapsed_s > 0.79
    assert summary["rounds"] >= 1


@in_loop
async def test_a_very_large_frame_passes(tmp_path: Path) -> None:
    levels = ",".join(f'["{n}.5","1.25"]' for n in range(400_000))
    big = f'{{"stream":"btcusdt@depth@100ms","data":{{"e":"depthUpdate","s":"BTCUSDT","U":1,"u":2,"b":[{levels}],"a":[]}}}}'
    assert len(big) > 6_000_000
    path = write_recording(tmp_path / "r.jsonl", received([trade(1), big, trade(2)]))
    with serving(path, "--speed", "max", "--exit") as server:
        async with connected(f"{server.ws}/stream?streams=btcusdt@trade/btcusdt@depth@100ms") as socket:
            assert await everything(socket) == [trade(1), big, trade(2)]


@in_loop
async def test_a_slow_client_holds_the_playback_up_and_loses_nothing(tmp_path: Path) -> None:
    padding = "x" * 20_000
    raws = [trade(n).replace('"q":"2"', f'"q":"2","pad":"{padding}"') for n in range(2_000)]  # 40 MB
    path = write_recording(tmp_path / "r.jsonl", received(raws))
    with serving(path, "--speed", "max", "--exit") as server:
        before = resident_kb(server.process.pid)
        async with connected(f"{server.ws}/stream?streams=btcusdt@trade") as socket:
            got = await some(socket, 1)
            # While this client reads nothing the server must stop: its memory stays far below what is left to send.
            deadline = time.monotonic() + 2
            largest = 0
            while time.monotonic() < deadline:
                largest = max(largest, resident_kb(server.process.pid))
                await asyncio.sleep(0.1)
            assert largest - before < 20_000
            got += await everything(socket)
        summary = server.summary(stop=False)
    assert got == raws
    assert summary["stalled_clients"] == 0


@in_loop
async def test_a_client_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    raws = [trade(n).replace('"q":"2"', f'"q":"2","pad":"{"x" * 50_000}"') for n in range(500)]
    path = write_recording(tmp_path / "r.jsonl", received(raws))
    with serving(path, "--speed", "max", "--exit", "--stall", 0.5, "--wait-clients", 2) as server:
        async with connected(f"{server.ws}/stream?streams=btcusdt@trade") as good:
            host, port = "127.0.0.1", server.ready["port"]
            reader, writer = await asyncio.open_connection(host, port, limit=1024)
            writer.write(
                b"GET /stream?streams=btcusdt@trade HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            await reader.readuntil(b"\r\n\r\n")
            assert await everything(good) == raws
            writer.close()
        assert server.summary(stop=False)["stalled_clients"] == 1


@in_loop
async def test_playback_waits_while_nobody_is_subscribed(tmp_path: Path) -> None:
    raws = [trade(n) for n in range(200)]
    path = write_recording(tmp_path / "r.jsonl", received(raws, 5_000_000))
    with serving(path, "--speed", 1, "--exit") as server:
        url = f"{server.ws}/stream?streams=btcusdt@trade"
        async with connected(url) as socket:
            first = await some(socket, 3)
        async with connected(url) as socket:
            second = await everything(socket)
    assert first == raws[:3]
    assert second == raws[-len(second) :]
    assert len(second) > 100  # far more than half a second of playback is left for the second client


@in_loop
async def test_at_end_close_and_hold(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received([trade(1)]))
    with serving(path, "--speed", "max", "--at-end", "close") as server:
        async with connected(f"{server.ws}/ws/btcusdt@trade") as socket:
            assert await everything(socket) == [trade(1, form="raw")]
            assert socket.close_code == 1000
        assert (await get(f"{server.rest}/api/v3/ping"))[0] == 200
        assert server.summary()["finished"] is True
    with serving(path, "--speed", "max") as server:
        async with connected(f"{server.ws}/ws/btcusdt@trade") as socket:
            await some(socket, 1)
            await socket.send_str('{"method":"LIST_SUBSCRIPTIONS","id":3}')
            assert json.loads((await some(socket, 1))[0])["id"] == 3
            server.process.send_signal(signal.SIGTERM)
            assert await everything(socket) == []
            assert socket.close_code == 1001
        assert server.summary(stop=False)["finished"] is True


# REST


@needs_data
@in_loop
async def test_binance_rest_gives_recorded_bodies() -> None:
    path = BINANCE / "multi_20210417.jsonl.zst"
    bodies = {
        line["url"].split("symbol=")[-1].split("&")[0]: line["raw"] for line in lines_of(path) if line["dir"] == "http"
    }
    info = json.loads(bodies.pop("https://api.binance.com/api/v3/exchangeInfo"))
    assert len(bodies) == 10
    with serving(path) as server:
        for symbol, raw in bodies.items():  # recorded as v1 with limit=1000
            assert await get(f"{server.rest}/api/v3/depth?limit=5000&symbol={symbol}") == (200, raw)
            assert await get(f"{server.rest}/api/v1/depth?symbol={symbol}") == (200, raw)
        status, text = await get(f"{server.rest}/api/v3/exchangeInfo")
        assert (status, json.loads(text)) == (200, info)
        status, text = await get(f'{server.rest}/api/v3/exchangeInfo?symbols=["VETETH","ADARUB"]')
        assert [s["symbol"] for s in json.loads(text)["symbols"]] == ["VETETH", "ADARUB"]
        for resource in ("depth", "exchangeInfo"):
            status, text = await get(f"{server.rest}/api/v3/{resource}?symbol=NOSUCH")
            assert (status, json.loads(text)["code"]) == (400, -1121)
        status, text = await get(f"{server.rest}/api/v3/historicalTrades?symbol=VETETH&fromId=1")
        assert (status, json.loads(text)["code"]) == (404, -1000)  # the symbol is not to blame
        status, text = await get(f"{server.rest}/api/v3/noSuchThing")
        assert status == 404
        assert "code" in json.loads(text)
        assert (
            abs(json.loads((await get(f"{server.rest}/api/v3/time"))[1])["serverTime"] / 1000 - time.time())
            < DEADLINE_S
        )
        summary = server.summary()
    assert summary["rest_unanswered"] == 4


@in_loop
async def test_the_snapshot_is_the_first_one_not_yet_passed(tmp_path: Path) -> None:
    def snapshot(last: int) -> str:
        return f'{{"lastUpdateId":{last},"bids":[],"asks":[]}}'

    entries = received([depth(n, n) for n in range(1, 31)], 1_000_000)
    url = "https://api.binance.com/api/v3/depth?symbol=BTCUSDT&limit=1000"
    for last in (25, 15, 5):  # each lies behind the update of its id
        body = {"t": entries[last - 1]["t"], "conn": "rest", "dir": "http", "url": url, "raw": snapshot(last)}
        entries.insert(last, body)
    path = write_recording(tmp_path / "r.jsonl", entries)
    with serving(path, "--speed", "max") as server:
        request = f"{server.rest}/api/v3/depth?symbol=BTCUSDT"
        assert await get(request) == (200, snapshot(5))  # at once, before playback has begun
        async with connected(f"{server.ws}/stream?streams=btcusdt@depth@100ms") as socket:
            assert len(await some(socket, 30)) == 30
            assert await get(request) == (200, snapshot(25))  # all are passed: the latest needs the shortest buffer


@in_loop
async def test_symbols_are_made_from_frames_where_no_list_was_recorded(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "b.jsonl", received([trade(1), trade(1, "ETHBTC")]))
    with serving(path) as server:
        info = json.loads((await get(f"{server.rest}/api/v3/exchangeInfo"))[1])
    assert [(s["symbol"], s["baseAsset"], s["quoteAsset"], s["status"]) for s in info["symbols"]] == [
        ("BTCUSDT", "BTC", "USDT", "TRADING"),
        ("ETHBTC", "ETH", "BTC", "TRADING"),
    ]
    with serving(deribit_recording(tmp_path / "d.jsonl")) as server:
        found = json.loads((await get(f"{server.rest}/api/v2/public/get_instruments?currency=any"))[1])["result"]
        status, text = await get(f"{server.rest}/api/v2/public/get_order_book?instrument_name=X")
    assert [(i["instrument_name"], i["kind"], i["settlement_period"]) for i in found] == [
        ("BTC-PERPETUAL", "future", "perpetual")
    ]
    assert (status, json.loads(text)["error"]["code"]) == (400, -32602)


@needs_data
@in_loop
async def test_deribit_rest_gives_recorded_bodies() -> None:
    path = DERIBIT / "options_20210722.jsonl.zst"
    bodies = [line for line in lines_of(path) if line["dir"] == "http"]
    with serving(path) as server:
        for line in bodies:
            assert await get(line["url"].replace("https://www.deribit.com", server.rest)) == (200, line["raw"])
        status, text = await get(f"{server.rest}/api/v2/public/get_instruments?currency=any&kind=option")
    names = {
        i["instrument_name"] for line in bodies for i in json.loads(line["raw"])["result"] if i["kind"] == "option"
    }
    assert status == 200
    assert {i["instrument_name"] for i in json.loads(text)["result"]} == names


# record


@needs_data
@pytest.mark.parametrize(
    ("path", "exchange"),
    [(BINANCE / "multi_20211012.jsonl.zst", "binance_spot"), (DERIBIT / "options_20210405.jsonl.zst", "deribit")],
    ids=["binance_spot", "deribit"],
)
def test_recording_of_a_replay_holds_the_same_frames(tmp_path: Path, path: Path, exchange: str) -> None:
    raws = [raw for raw in frames_of(path) if is_data(raw)]
    key = (lambda frame: frame["stream"]) if exchange == "binance_spot" else (lambda frame: frame["params"]["channel"])
    streams = dict.fromkeys(key(json.loads(raw)) for raw in raws)
    options = [part for stream in streams for part in ("--stream", stream)]
    copies = [tmp_path / "first.jsonl.zst", tmp_path / "second.jsonl"]
    for source, copy in zip([path, copies[0]], copies, strict=True):
        # Fast for the dialogue-only venue; slow enough that the recorder's snapshot requests come in between otherwise.
        with serving(source, "--speed", 10 if exchange == "binance_spot" else "max", "--at-end", "close") as server:
            urls = ("--ws-url", server.ws, "--rest-url", server.rest)
            command = mdreplay("record", exchange, "--out", copy, *urls, *options, "--json")
            done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
            assert done.returncode == 0, done.stderr
            assert server.summary()["rest_unanswered"] == 0
        assert [raw for raw in frames_of(copy) if is_data(raw)] == raws
        assert json.loads(done.stdout)["ended_by"] == "venue"
    assert frames_of(copies[0]) == frames_of(copies[1])  # acknowledgements too: the recorder's ids fit
    lines = lines_of(copies[1])
    assert lines[0]["dir"] == "http"  # the list of instruments, asked for before anything else
    assert [line["dir"] for line in lines].count("open") == 1
    assert all(b["t"] >= a["t"] for a, b in itertools.pairwise(lines) if a["conn"] == b["conn"])
    if exchange == "binance_spot":
        asked = {line["url"].split("symbol=")[1].split("&")[0] for line in lines if "/depth?" in line.get("url", "")}
        assert asked
        assert asked <= {"NKNUSDT", "BLZETH", "LRCBTC", "RUNEEUR"}
    else:
        assert [line["dir"] for line in lines].count("out") == 2  # set_heartbeat, subscribe


def test_recording_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received([trade(n) for n in range(500)], 2_000_000))
    out = tmp_path / "copy.jsonl.zst"
    with serving(path, "--loop") as server:
        command = mdreplay("record", "binance_spot", "BTCUSDT", "--feeds", "trades", "--out", out, "--json")
        command += ["--ws-url", server.ws, "--rest-url", server.rest]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as recorder:
            part = tmp_path / "copy.jsonl.zst.part"
            deadline = time.monotonic() + DEADLINE_S
            while not (part.exists() and server_has_client(server)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            recorder.send_signal(signal.SIGTERM)
            summary, errors = recorder.communicate(timeout=DEADLINE_S)
            assert recorder.returncode == 0, errors
    assert json.loads(summary)["ended_by"] == "us"
    assert json.loads(summary)["frames"] == len(frames_of(out))
    assert set(frames_of(out)) <= {trade(n) for n in range(500)}


def server_has_client(server: Server) -> bool:
    """Whether a connection to the server's port is established."""
    port = f"{server.ready['port']:04X}"
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(row.split()[1].endswith(f":{port}") and row.split()[3] == "01" for row in rows)


def test_recording_for_some_seconds(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received([trade(n) for n in range(100)], 10_000_000))
    out = tmp_path / "copy.jsonl"
    with serving(path, "--loop") as server:
        command = mdreplay(
            "record", "binance_spot", "BTCUSDT", "--feeds", "trades", "--out", out, "--seconds", 1.5, "--json"
        )
        command += ["--ws-url", server.ws, "--rest-url", server.rest]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    got = frames_of(out)
    assert got
    assert got == [trade(n % 100) for n in range(len(got))]


def test_recording_says_when_nobody_is_there(tmp_path: Path) -> None:
    out = tmp_path / "copy.jsonl"
    nowhere = ("--ws-url", "ws://127.0.0.1:1", "--rest-url", "http://127.0.0.1:1")
    command = mdreplay("record", "binance_spot", "BTCUSDT", "--out", out, *nowhere)
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert "cannot connect" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_ends_a_recording_with_its_name(tmp_path: Path) -> None:
    """What was written so far keeps its temporary name."""
    path = write_recording(tmp_path / "r.jsonl", received([trade(n) for n in range(2000)], 1_000_000))
    out = tmp_path / "copy.jsonl"
    with serving(path) as server:
        options = ("--feeds", "trades", "--ws-url", server.ws, "--rest-url", server.rest)
        command = mdreplay("record", "binance_spot", "BTCUSDT", "--out", out, *options)
        limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash", *command]
        done = subprocess.run(limited, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"mdreplay: {out}: cannot be written: File too large"
    assert not out.exists()


# wrong use and damage


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["serve"], "Missing argument"),
        (["serve", "no-such-file.jsonl"], "does not exist"),
        (["serve", "{file}", "--speed", "fast"], "neither a number nor max"),
        (["serve", "{file}", "--speed", "0"], "greater than 0"),
        (["serve", "{file}", "--exchange", "nyse"], "nyse"),
        (["record", "binance_spot", "--out", "{new}"], "nothing to record"),
        (["record", "nyse", "BTCUSDT", "--out", "{new}"], "nyse"),
        (["record", "binance_spot", "BTCUSDT", "--feeds", "gossip", "--out", "{new}"], "gossip"),
        (["record", "binance_spot", "BTCUSDT", "--feeds", "liquidations", "--out", "{new}"], "liquidations"),
        (["record", "binance_spot", "BTCUSDT", "--out", "{file}"], "will not be overwritten"),
        (["record", "binance_spot", "BTCUSDT", "--out", "{file}/new.jsonl"], "cannot be written"),
    ],
)
def test_wrong_use_is_told(tmp_path: Path, args: list[str], told: str) -> None:
    file = write_recording(tmp_path / "r.jsonl", received([trade(1)]))
    filled = [arg.format(file=file, new=tmp_path / "new.jsonl") for arg in args]
    done = subprocess.run(mdreplay(*filled), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new.jsonl").exists()


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received([trade(1)]))
    with serving(path) as server:
        command = mdreplay("serve", path, "--port", server.ready["port"])
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert "cannot listen" in done.stderr


def test_an_unknown_venue_is_told(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received(['{"topic":"orderbook.50.BTCUSDT"}']))
    done = subprocess.run(mdreplay("serve", path), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert "--exchange" in done.stderr


@pytest.mark.parametrize("damage", ["garbage line", "cut short", "flipped bytes", "empty"])
def test_a_damaged_recording_is_refused(tmp_path: Path, damage: str) -> None:
    text = "".join(json.dumps(entry) + "\n" for entry in received([trade(n) for n in range(3000)]))
    if damage == "garbage line":
        text = text.replace("\n", "\n{nonsense\n", 1)
    packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(text.encode()))
    if damage == "cut short":
        del packed[len(packed) // 2 :]
    if damage == "flipped bytes":
        packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(b"" if damage == "empty" else bytes(packed))
    done = subprocess.run(
        mdreplay("serve", path, "--exchange", "binance_spot"), capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@in_loop
async def test_bad_lines_are_passed_over_on_demand(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.jsonl", received([trade(1), trade(2)]))
    path.write_text(path.read_text().replace("\n", "\n{nonsense\n", 1))
    with serving(path, "--speed", "max", "--exit", "--skip-bad-lines") as server:
        async with connected(f"{server.ws}/ws/btcusdt@trade") as socket:
            assert len(await everything(socket)) == 2
        assert server.summary(stop=False)["bad_lines"] >= 1


@in_loop
async def test_a_damaged_frame_goes_to_every_client(tmp_path: Path) -> None:
    broken = trade(2)[:-9]
    path = write_recording(tmp_path / "r.jsonl", received([trade(1), "not json at all", broken, trade(3)]))
    with serving(path, "--speed", "max", "--exit") as server:
        async with connected(f"{server.ws}/stream?streams=btcusdt@trade") as socket:
            assert await everything(socket) == [trade(1), "not json at all", broken, trade(3)]
