"""Every fault of the simulated exchanges, seen on the wire by a client and written down in the ledger."""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from pathlib import Path
from socket import create_server
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from tools.sim.faults import COMMON, KINDS, FaultError, Faults, help_text, parse
from tools.sim.process import SimError, SimProcess

Row = dict[str, Any]
WITHIN_S = 25.0
FAST = ("--rate", "150", "--tickers", "BTCUSDT:1")
TRADES = "/ws/btcusdt@trade"
DEPTH = "/ws/btcusdt@depth@100ms"


def within(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WITHIN_S))


@asynccontextmanager
async def socket(sim: SimProcess, path: str, agent: str = "test") -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with (
        aiohttp.ClientSession(headers={"User-Agent": agent}) as session,
        session.ws_connect(sim.ws_url + path, autoping=False, max_msg_size=0) as ws,
    ):
        yield ws


async def texts(ws: aiohttp.ClientWebSocketResponse, number: int) -> list[str]:
    got: list[str] = []
    while len(got) < number:
        message = await ws.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, message
        got.append(message.data)
    return got


async def rows(ws: aiohttp.ClientWebSocketResponse, number: int) -> list[Row]:
    return [json.loads(text) for text in await texts(ws, number)]


def fault_lines(sim: SimProcess, name: str) -> list[Row]:
    return [line for line in sim.ledger().faults if line["name"] == name]


# The grammar.


def test_a_fault_is_read_from_text_and_from_json_alike() -> None:
    text = parse("gap:n=3,stream=depth,every=2.5,conn=1")
    assert text == parse({"name": "gap", "n": 3, "stream": "depth", "every": 2.5, "conn": 1})
    assert text.keys == {"n": 3.0, "stream": "depth", "every": 2.5, "conn": 1.0}


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("nonsense", "known: drop"),
        ("drop:color=red", "allowed: at"),
        ("drop:every=often", "must be a number"),
        ("drop:every=0", "greater than 0"),
        ("drop:at=-1", "not negative"),
        ("drop:at=nan", "not negative"),
        ("split:mode=paper", "fragments, tcp"),
        ("garbage:kind=x", "bytes, utf8"),
        ("disconnect:rate=0.5", "rate= is for"),
        ("listing", "ticker= is needed"),
    ],
)
def test_a_wrong_fault_is_refused_with_what_is_allowed(spec: str, text: str) -> None:
    with pytest.raises(FaultError, match=text):
        parse(spec)


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(
    st.sampled_from(sorted(KINDS)),
    st.dictionaries(st.sampled_from([*COMMON, "n"]), st.text(max_size=4) | st.floats(), max_size=3),
)
def test_no_request_for_a_fault_breaks_the_reader(name: str, keys: dict[str, Any]) -> None:
    try:
        fault = parse({"name": name, **keys})
    except FaultError:
        return
    assert fault.name == name


@pytest.mark.parametrize(
    ("wanted", "hit", "spared"),
    [
        ("trades.", {"trades.A.raw", "chart.trades.A.1"}, {"book.A.raw"}),
        ("trades.*", {"trades.A.raw"}, {"chart.trades.A.1", "book.A.raw"}),
        ("", {"trades.A.raw", "chart.trades.A.1", "book.A.raw"}, set()),
    ],
)
def test_which_streams_a_fault_may_hit(wanted: str, hit: set[str], spared: set[str]) -> None:
    fault = parse(f"drop:stream={wanted}")
    assert all(fault.wants(stream, "A") for stream in hit)
    assert not any(fault.wants(stream, "A") for stream in spared)


def test_the_help_names_every_fault() -> None:
    assert all(name in help_text() for name in KINDS)


def test_when_faults_fire() -> None:
    faults = Faults(1)
    for spec in ("drop:at=2", "drop:every=3", "drop:every=1,at=5,count=2", "disconnect:every=4", "drop:rate=1,count=3"):
        faults.add(parse(spec))
    at, every, both, session, rate = faults.all
    fired: dict[float, list[object]] = {}
    for now in range(13):
        due = faults.tick(float(now))
        for fault in due:
            faults.fire(fault)
        fired[now] = [*faults.for_message("s", "A", [(1, "")]), *due]
    assert [now for now, hits in fired.items() if at in hits] == [2]
    assert [now for now, hits in fired.items() if every in hits] == [3, 6, 9, 12]
    assert [now for now, hits in fired.items() if both in hits] == [5, 6]
    assert [now for now, hits in fired.items() if session in hits] == [4, 8, 12]
    assert [now for now, hits in fired.items() if rate in hits] == [0, 1, 2]


def test_a_wrong_fault_at_run_time_is_answered_with_what_is_allowed() -> None:
    with SimProcess("binance_spot") as sim:
        with pytest.raises(SimError, match="unknown fault"):
            sim.fault("nonsense")
        with pytest.raises(SimError, match="must be a number"):
            sim.fault("drop", every="x")
        assert sim.state()["faults"] == []


# Faults of single messages. A stream of trades shows them best: its ids have no holes of their own.


def test_drop_duplicate_reorder_and_gap(tmp_path: Path) -> None:
    ids: list[int] = []

    async def listen(sim: SimProcess) -> None:
        async with socket(sim, TRADES) as ws:
            for name, keys in (("drop", {}), ("duplicate", {}), ("reorder", {}), ("gap", {"n": 4})):
                ids.extend(row["t"] for row in await rows(ws, 3))
                sim.fault(name, stream="trade", **keys)
                ids.extend(row["t"] for row in await rows(ws, 8))

    with SimProcess("binance_spot", *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    hit = {name: [line["first"] for line in fault_lines(sim, name)] for name in ("drop", "duplicate", "reorder", "gap")}
    assert {name: len(lines) for name, lines in hit.items()} == {"drop": 1, "duplicate": 1, "reorder": 1, "gap": 4}
    swapped = hit["reorder"][0]
    expected: list[int] = []
    for number in range(ids[0], ids[-1] + 1):
        if number in hit["drop"] or number in hit["gap"]:
            continue
        expected += [number, number] if number in hit["duplicate"] else [number]
    at = expected.index(swapped)
    expected[at], expected[at + 1] = expected[at + 1], expected[at]
    assert ids == expected
    lost = [str(number) for number in (*hit["drop"], *hit["gap"])]
    assert all(number in sim.ledger().trades("BTCUSDT") for number in lost), "the ledger knows what was lost"


def test_a_gap_in_a_book_is_a_hole_in_its_update_ids(tmp_path: Path) -> None:
    events: list[Row] = []

    async def listen(sim: SimProcess) -> None:
        async with socket(sim, DEPTH) as ws:
            events.extend(await rows(ws, 3))
            sim.fault("gap", stream="depth@100ms", n=2)
            events.extend(await rows(ws, 5))

    with SimProcess("binance_spot", *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    holes = [(a["u"] + 1, b["U"] - 1) for a, b in itertools.pairwise(events) if b["U"] != a["u"] + 1]
    lines = fault_lines(sim, "gap")
    assert holes == [(lines[0]["first"], lines[1]["last"])]


def test_truncated_text() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, TRADES) as ws:
            sim.fault("truncate")
            broken = 0
            for text in await texts(ws, 8):
                try:
                    json.loads(text)
                except ValueError:
                    assert text.startswith('{"e":"trade"')
                    broken += 1
            assert broken == 1

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))


def test_a_truncated_frame_ends_the_connection() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, TRADES) as ws:
            sim.fault("truncate", mode="wire")
            while (message := await ws.receive()).type is aiohttp.WSMsgType.TEXT:
                json.loads(message.data)
            assert ws.close_code in (1006, None) or message.type is not aiohttp.WSMsgType.TEXT

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))
        assert sim.state()["connections"] == []


class Frames(WSListener):  # type: ignore[misc]
    """Keeps every frame as it is on the wire, and says when a condition on them holds."""

    def __init__(self) -> None:
        self.frames: list[tuple[WSMsgType, bool, bytes]] = []
        self.wanted: Callable[[], bool] = lambda: False
        self.reached = asyncio.Event()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        self.frames.append((frame.msg_type, bool(frame.fin), frame.get_payload_as_bytes()))
        if self.wanted():
            self.reached.set()

    async def until(self, wanted: Callable[[], bool]) -> None:
        self.wanted = wanted
        self.reached.clear()
        await self.reached.wait()


@pytest.mark.parametrize("kind", ["bytes", "utf8", "types", "nan", "absurd", "unknown_symbol", "unknown_event"])
def test_garbage_comes_beside_the_true_messages(kind: str, tmp_path: Path) -> None:
    frames: list[tuple[WSMsgType, bool, bytes]] = []

    def bad(payload: bytes) -> bool:
        try:
            row = json.loads(payload.decode())
        except ValueError:
            return True
        return (
            row.get("s") != "BTCUSDT" or row.get("e") != "trade" or not isinstance(row["t"], int) or "NaN" in str(row)
        )

    async def listen(sim: SimProcess) -> None:
        transport, listener = await ws_connect(Frames, sim.ws_url + TRADES)
        await listener.until(lambda: len(listener.frames) > 2)
        sim.fault("garbage", kind=kind, count=3)
        await listener.until(lambda: sum(bad(f[2]) for f in listener.frames) == 3 and len(listener.frames) > 12)
        frames.extend(listener.frames)
        transport.disconnect()

    with SimProcess("binance_spot", *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    nonsense = [payload for _, _, payload in frames if bad(payload)]
    marks = {
        "utf8": b"\xff\xc3",
        "types": b'{"not":',
        "nan": b"NaN",
        "absurd": b"1e999",
        "unknown_symbol": b"NOBTCUSDT",
    }
    assert all(marks.get(kind, b"") in payload for payload in nonsense)
    assert any(opcode is WSMsgType.BINARY for opcode, _, _ in frames) == (kind == "bytes")
    ids = [json.loads(payload)["t"] for _, _, payload in frames if not bad(payload)]
    assert ids == list(range(ids[0], ids[0] + len(ids))), "no true message is missing"
    assert len(fault_lines(sim, "garbage")) == 3


def test_split_into_fragments() -> None:
    async def listen(sim: SimProcess) -> None:
        transport, listener = await ws_connect(Frames, sim.ws_url + TRADES)
        sim.fault("split", mode="fragments", parts=4)
        await listener.until(lambda: listener.frames[-1][1] and any(not fin for _, fin, _ in listener.frames))
        at = next(index for index, (_, fin, _) in enumerate(listener.frames) if not fin)
        pieces = listener.frames[at : at + 4]
        assert [(opcode, fin) for opcode, fin, _ in pieces] == [
            (WSMsgType.TEXT, False),
            (WSMsgType.CONTINUATION, False),
            (WSMsgType.CONTINUATION, False),
            (WSMsgType.CONTINUATION, True),
        ]
        assert json.loads(b"".join(payload for _, _, payload in pieces))["e"] == "trade"
        transport.disconnect()

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))


def test_split_into_pieces_of_tcp() -> None:
    """Read below any WebSocket library: the frame really comes in several reads, and what follows is whole."""

    async def listen(sim: SimProcess) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(
            f"GET {TRADES} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        sim.fault("split", mode="tcp", parts=3, count=3)
        data, partial = b"", 0
        whole = 0
        while whole < 12:
            data += await reader.read(1 << 16)
            while len(data) >= 4:
                size, start = (data[1], 2) if data[1] < 126 else (int.from_bytes(data[2:4], "big"), 4)
                if len(data) < start + size:
                    break
                if data[0] == 0x81:
                    assert json.loads(data[start : start + size])["e"] == "trade"
                    whole += 1
                data = data[start + size :]
            partial += bool(data)
        assert partial >= 3
        writer.close()

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))


def test_a_fault_hits_only_what_it_names(tmp_path: Path) -> None:
    async def listen(sim: SimProcess) -> None:
        both = "/stream?streams=btcusdt@trade/ethusdt@trade"
        async with socket(sim, both, "first") as one, socket(sim, both, "second") as two:
            missing: dict[str, Counter[str]] = {"one": Counter(), "two": Counter()}
            last: dict[tuple[str, str], int] = {}

            async def read(number: int) -> None:
                for name, ws in (("one", one), ("two", two)):
                    for row in await rows(ws, number):
                        data = row["data"]
                        expected = last.get((name, data["s"]), data["t"] - 1) + 1
                        missing[name][data["s"]] += data["t"] - expected
                        last[name, data["s"]] = data["t"]

            await read(20)
            sim.fault("drop", stream="trade", ticker="ETHUSDT", agent="second", count=3)
            await read(60)
            assert missing == {"one": {"BTCUSDT": 0, "ETHUSDT": 0}, "two": {"BTCUSDT": 0, "ETHUSDT": 3}}

    with SimProcess("binance_spot", "--rate", "150", "--tickers", "BTCUSDT:1,ETHUSDT:1", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    assert [line["conns"] for line in fault_lines(sim, "drop")] == [[2], [2], [2]]


def test_faults_from_the_command_line_with_a_rate(tmp_path: Path) -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, TRADES) as ws:
            ids = [row["t"] for row in await rows(ws, 60)]
            assert ids[-1] - ids[0] + 1 > 65

    with SimProcess("binance_spot", *FAST, "--fault", "drop:rate=0.3", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    assert len(fault_lines(sim, "drop")) > 5
    assert sim.summary["faults"]["drop"] == len(fault_lines(sim, "drop"))


# Faults of connections.


def test_disconnect_is_a_reset(tmp_path: Path) -> None:
    async def listen(sim: SimProcess) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(
            f"GET {TRADES} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.to_thread(sim.wait_state, lambda state: bool(state["connections"]))
        sim.fault("disconnect")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()

    with SimProcess("binance_spot", *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.wait_state(lambda state: not state["connections"])
        sim.stop()
    assert [line["event"] for line in sim.ledger().connections] == ["open", "close"]
    assert sim.ledger().connections[1]["reason"] == "fault disconnect"
    assert fault_lines(sim, "disconnect")[0]["conns"] == [1]


def test_close_and_shutdown_come_in_order() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, TRADES) as ws:
            await texts(ws, 3)
            sim.fault("close", code=1012)
            async for message in ws:
                assert message.type is aiohttp.WSMsgType.TEXT
            assert ws.close_code == 1012
        async with socket(sim, "/stream?streams=btcusdt@trade&timeUnit=MICROSECOND") as ws:
            await texts(ws, 3)
            sim.fault("shutdown", after_s=0.5)
            got = [json.loads(message.data) async for message in ws]
            notices = [row for row in got if row["stream"] == "!serverShutdown"]
            assert [row["data"]["e"] for row in notices] == ["serverShutdown"]
            assert notices[0]["data"]["E"] > 10**15
            assert got.index(notices[0]) < len(got) - 5, "data goes on until the close"
            assert ws.close_code == 1001

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))


def test_shutdown_of_the_other_venue_is_told_by_its_platform_state() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, "/ws/api/v2") as ws:
            sim.fault("shutdown", after_s=0.1)
            got = [json.loads(message.data) async for message in ws]
            assert [row["params"]["channel"] for row in got] == ["platform_state"]
            assert got[0]["params"]["data"]["maintenance"] is True

    with SimProcess("deribit") as sim:
        within(listen(sim))


def test_lifetime() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, TRADES) as ws:
            sim.fault("lifetime")
            async for message in ws:
                assert message.type is aiohttp.WSMsgType.TEXT
            assert ws.close_code == 1001

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))


def test_freeze_keeps_the_connection_open_and_sends_nothing() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, TRADES) as ws:
            before = (await rows(ws, 3))[-1]["t"]
            sim.fault("freeze", seconds=1)
            await ws.send_str('{"method":"LIST_SUBSCRIPTIONS","id":1}')
            got = await rows(ws, 40)
            assert all("t" in row for row in got), "even the answer is lost"
            ids = [before, *(row["t"] for row in got)]
            holes = [after - earlier for earlier, after in itertools.pairwise(ids) if after != earlier + 1]
            assert len(holes) == 1
            assert holes[0] > 10
            assert len(sim.state()["connections"]) == 1

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))


def test_no_heartbeat_answer() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, "/ws") as ws:
            await ws.ping(b"1")
            while (message := await ws.receive()).type is not aiohttp.WSMsgType.PONG:
                pass
            sim.fault("no_heartbeat_answer", seconds=1.5)
            await ws.ping(b"2")
            await ws.send_str('{"method":"LIST_SUBSCRIPTIONS","id":1}')
            message = await ws.receive()
            assert message.type is aiohttp.WSMsgType.TEXT, "neither a pong nor a ping comes, but the answer does"
            while (message := await ws.receive()).type is not aiohttp.WSMsgType.PING:
                assert message.type is not aiohttp.WSMsgType.PONG

    with SimProcess("binance_spot", "--limit", "ping_every_s=0.2", "--limit", "messages_per_s=100") as sim:
        within(listen(sim))


def test_no_heartbeat_answer_of_the_other_venue() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, "/ws/api/v2") as ws:
            sim.fault("no_heartbeat_answer")
            await ws.send_str('{"jsonrpc":"2.0","id":1,"method":"public/test"}')
            await ws.send_str('{"jsonrpc":"2.0","id":2,"method":"public/get_time"}')
            assert (await rows(ws, 1))[0]["id"] == 2

    with SimProcess("deribit") as sim:
        within(listen(sim))


def test_an_expired_token_ends_raw_channels() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, "/ws/api/v2") as ws:

            async def call(number: int, method: str, **params: Any) -> Row:
                await ws.send_str(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}))
                while True:
                    (row,) = await rows(ws, 1)
                    if row.get("id") == number:
                        return row

            credentials = {"grant_type": "client_credentials", "client_id": "a", "client_secret": "b"}
            assert "result" in await call(1, "public/auth", **credentials)
            channels = ["trades.BTC-PERPETUAL.raw", "trades.BTC-PERPETUAL.100ms"]
            assert (await call(2, "private/subscribe", channels=channels))["result"] == channels
            sim.fault("auth_expire")
            assert sim.state()["connections"][0]["subscriptions"] == channels[1:]
            assert (await call(3, "private/subscribe", channels=channels))["error"]["code"] == 13009
            assert "result" in await call(4, "public/auth", **credentials)
            assert (await call(5, "private/subscribe", channels=channels))["result"] == channels

    with SimProcess("deribit", "--credential", "a:b") as sim:
        within(listen(sim))


# Faults that last.


def test_silence_is_acknowledged_and_carries_nothing() -> None:
    async def listen(sim: SimProcess) -> None:
        sim.fault("silence", stream="@trade", seconds=2)
        async with socket(sim, "/stream") as ws:
            await ws.send_str('{"method":"SUBSCRIBE","params":["btcusdt@trade","btcusdt@bookTicker"],"id":1}')
            assert (await rows(ws, 1)) == [{"result": None, "id": 1}]
            first = await rows(ws, 20)
            assert {row["stream"] for row in first} == {"btcusdt@bookTicker"}
            while (await rows(ws, 1))[0]["stream"] != "btcusdt@trade":
                pass  # the window ends, and the stream speaks again

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))


def test_clock_skew_is_in_messages_and_answers() -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, TRADES) as ws:
            assert abs((await rows(ws, 1))[0]["T"] / 1000 - time.time()) < 2
            sim.fault("clock_skew", ms=-100_000)
            row = (await rows(ws, 30))[-1]
            assert -101 < row["T"] / 1000 - time.time() < -98
            async with aiohttp.ClientSession() as session, session.get(sim.rest_url + "/api/v3/time") as answer:
                assert -101 < (await answer.json())["serverTime"] / 1000 - time.time() < -98

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))


async def status_of(sim: SimProcess, path: str) -> tuple[int, str | None, str]:
    async with aiohttp.ClientSession() as session, session.get(sim.rest_url + path) as answer:
        return answer.status, answer.headers.get("Retry-After"), await answer.text()


@pytest.mark.parametrize("status", [429, 418])
def test_a_ban_lasts_as_long_as_it_says(status: int, tmp_path: Path) -> None:
    async def talk(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["seconds"] > 1.2)  # market time runs, so the window can end
        sim.fault("ban", status=status, seconds=2)
        got, retry_after, body = await status_of(sim, "/api/v3/ping")
        assert (got, json.loads(body)["code"]) == (status, -1003)
        assert retry_after in ("1", "2")
        assert (await status_of(sim, "/api/v3/ping"))[0] == status
        sim.wait_state(lambda state: state["seconds"] > 4.5)
        assert (await status_of(sim, "/api/v3/ping"))[0] == 200
        state = sim.state()
        assert state["requests_before_retry_after"] == 1
        assert state[f"http_{status}"] == 2

    with SimProcess("binance_spot", *FAST, ledger=tmp_path / "l") as sim:
        within(talk(sim))
        sim.stop()
    assert len(fault_lines(sim, "ban")) == 1


def test_slow_and_failing_rest() -> None:
    async def talk(sim: SimProcess) -> None:
        sim.fault("slow_rest", ms=1500, stream="depth")
        started = time.monotonic()
        assert (await status_of(sim, "/api/v3/ping"))[0] == 200
        slow = asyncio.create_task(status_of(sim, "/api/v3/depth?symbol=BTCUSDT"))
        await asyncio.to_thread(sim.wait_state, lambda state: state["faults"][0]["fired"] == 1)
        assert (await slow)[0] == 200
        assert time.monotonic() - started >= 1.5
        sim.fault("rest_error", status=502, count=2)
        assert [(await status_of(sim, "/api/v3/ping"))[0] for _ in range(3)] == [502, 502, 200]

    with SimProcess("binance_spot", *FAST) as sim:
        within(talk(sim))


def test_a_refused_subscription() -> None:
    async def talk(sim: SimProcess) -> None:
        async with socket(sim, "/ws") as ws:
            sim.fault("refuse", stream="trade")
            await ws.send_str('{"method":"SUBSCRIBE","params":["btcusdt@trade"],"id":1}')
            assert (await rows(ws, 1))[0]["error"]["code"] == 2
            await ws.send_str('{"method":"SUBSCRIBE","params":["btcusdt@trade"],"id":2}')
            assert (await rows(ws, 1))[0] == {"result": None, "id": 2}

    with SimProcess("binance_spot", *FAST) as sim:
        within(talk(sim))


def test_a_refused_subscription_of_the_other_venue() -> None:
    """With a code the call fails, without one the channel is left out of the reply, as one that does not exist."""

    async def talk(sim: SimProcess) -> None:
        async def asked(number: int) -> Any:
            params = {"channels": ["quote.BTC-PERPETUAL"]}
            call = {"jsonrpc": "2.0", "id": number, "method": "public/subscribe", "params": params}
            await ws.send_str(json.dumps(call))
            row = (await rows(ws, 1))[0]
            assert row["id"] == number
            return row

        async with socket(sim, "/ws/api/v2") as ws:
            sim.fault("refuse", ticker="BTC-PERPETUAL", code=11050)
            assert (await asked(1))["error"]["code"] == 11050
            sim.fault("refuse", ticker="BTC-PERPETUAL")
            assert (await asked(2))["result"] == []
            assert (await asked(3))["result"] == ["quote.BTC-PERPETUAL"]

    with SimProcess("deribit", "--rate", "0.001") as sim:
        within(talk(sim))


# Faults of snapshots and of the book.


def test_a_stale_snapshot_is_older_than_the_first_buffered_event() -> None:
    async def listen(sim: SimProcess) -> None:
        sim.wait_state(lambda state: state["seconds"] > 2.5)
        async with socket(sim, DEPTH) as ws:
            (first,) = await rows(ws, 1)
            sim.fault("stale_snapshot")
            stale = json.loads((await status_of(sim, "/api/v3/depth?symbol=BTCUSDT&limit=5000"))[2])
            assert stale["lastUpdateId"] < first["U"]
            good = json.loads((await status_of(sim, "/api/v3/depth?symbol=BTCUSDT&limit=5000"))[2])
            assert good["lastUpdateId"] >= first["u"]

    with SimProcess("binance_spot", *FAST) as sim:
        within(listen(sim))


def test_a_future_snapshot_is_newer_than_everything_sent(tmp_path: Path) -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, DEPTH) as ws:
            events = await rows(ws, 3)
            sim.fault("future_snapshot", ms=1500)
            answer = json.loads((await status_of(sim, "/api/v3/depth?symbol=BTCUSDT&limit=5000"))[2])
            while events[-1]["u"] <= answer["lastUpdateId"]:
                events += await rows(ws, 1)
            newer = [event for event in events if event["U"] > events[2]["u"] and event["u"] <= answer["lastUpdateId"]]
            assert len(newer) >= 4, "several events that the client had not seen are already in the snapshot"
            assert all(b["U"] == a["u"] + 1 for a, b in itertools.pairwise(events)), "nothing is lost"

    with SimProcess("binance_spot", *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))
        sim.stop()
    assert len(fault_lines(sim, "future_snapshot")) == 1


def crossed(bids: dict[str, str], asks: dict[str, str]) -> bool:
    return max(map(float, bids)) >= min(map(float, asks))


@pytest.mark.parametrize(("venue", "ticker"), [("binance_spot", "BTCUSDT"), ("deribit", "BTC-PERPETUAL")])
def test_a_crossed_book_is_published_and_heals(venue: str, ticker: str, tmp_path: Path) -> None:
    clockless = ("--rate", "max", "--epoch", "1795000000000000", "--seconds", "4", "--tickers", ticker)
    with SimProcess(venue, *clockless, "--fault", f"cross:at=1,ms=500,ticker={ticker}", ledger=tmp_path / "l") as sim:
        sim.wait()
    ledger = sim.ledger()
    states = [
        crossed(*sides) for _, sides in ledger.books(ticker, "depth@100ms" if venue == "binance_spot" else "100ms")
    ]
    assert any(states)
    assert not states[0]
    assert not states[-1]
    assert ledger.faults_fired() == {"cross": 1}


def test_a_crossed_event_reaches_the_client(tmp_path: Path) -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, DEPTH) as ws:
            book: tuple[dict[str, str], dict[str, str]] | None = None
            snapshot = json.loads((await status_of(sim, "/api/v3/depth?symbol=BTCUSDT&limit=5000"))[2])
            book = (dict(snapshot["bids"]), dict(snapshot["asks"]))
            sim.fault("cross", ticker="BTCUSDT", ms=500)
            seen: list[bool] = []
            while True not in seen or seen[-1]:
                (event,) = await rows(ws, 1)
                if event["u"] <= snapshot["lastUpdateId"]:
                    continue
                for side, levels in zip(book, (event["b"], event["a"]), strict=True):
                    for price, qty in levels:
                        side[price] = qty
                        if not float(qty):
                            del side[price]
                seen.append(crossed(*book))

    with SimProcess("binance_spot", *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))


# Beginning and end.


def test_a_new_symbol_is_listed_while_running() -> None:
    async def talk(sim: SimProcess) -> None:
        sim.fault("listing", ticker="NEWUSDT")
        info = json.loads((await status_of(sim, "/api/v3/exchangeInfo"))[2])
        assert [s["symbol"] for s in info["symbols"]] == ["BTCUSDT", "NEWUSDT"]
        async with socket(sim, "/ws/newusdt@trade") as ws:
            assert {row["s"] for row in await rows(ws, 5)} == {"NEWUSDT"}

    with SimProcess("binance_spot", *FAST) as sim:
        within(talk(sim))


def test_a_paused_market_publishes_what_was_waiting_and_goes_on(tmp_path: Path) -> None:
    async def listen(sim: SimProcess) -> None:
        async with socket(sim, DEPTH) as ws:
            events = await rows(ws, 3)
            sim.pause()
            last = sim.state()["update_ids"]["BTCUSDT"]
            while events[-1]["u"] < last:
                events += await rows(ws, 1)
            assert events[-1]["u"] == last == sim.state()["update_ids"]["BTCUSDT"]
            sim.resume()
            events += await rows(ws, 3)
            assert all(b["U"] == a["u"] + 1 for a, b in itertools.pairwise(events))

    with SimProcess("binance_spot", *FAST, ledger=tmp_path / "l") as sim:
        within(listen(sim))


@pytest.mark.parametrize("venue", ["binance_spot", "deribit"])
def test_a_signal_ends_it_in_order(venue: str, tmp_path: Path) -> None:
    path = TRADES if venue == "binance_spot" else "/ws/api/v2"

    async def listen(sim: SimProcess) -> None:
        async with socket(sim, path) as ws:
            await asyncio.to_thread(sim.wait_state, lambda state: state["connections"] and "trade" in state["ledger"])
            sim.process.terminate()
            async for _ in ws:
                pass
            assert ws.close_code == 1001

    with SimProcess(venue, "--rate", "100", ledger=tmp_path / "l") as sim:
        within(listen(sim))
        summary = sim.wait()
    assert sim.process.returncode == 0
    ledger = sim.ledger()
    assert ledger.end is not None
    assert ledger.end["totals"]["trade"] == summary["totals"]["trade"]
    assert [(line["event"], line.get("reason")) for line in ledger.connections] == [
        ("open", None),
        ("close", "the exchange ends"),
    ]


def test_a_client_that_does_not_read_hurts_nobody() -> None:
    """At a paced rate the exchange waits for no client: one stops reading, the other one still gets everything."""

    async def listen(sim: SimProcess) -> None:
        async with socket(sim, TRADES) as good:
            _, writer = await asyncio.open_connection("127.0.0.1", sim.port, limit=1024)
            streams = "/".join(f"btcusdt@{name}" for name in ("trade", "bookTicker", "depth20@100ms"))
            writer.write(
                f"GET /stream?streams={streams} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            ids = [row["t"] for row in await rows(good, 3000)]
            assert ids == list(range(ids[0], ids[0] + 3000))
            writer.transport.abort()

    with SimProcess("binance_spot", "--rate", "3000", "--tickers", "BTCUSDT") as sim:
        within(listen(sim))


# The command


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (["nyse"], "'nyse' is unknown; known: binance_futures", 2),
        (["binance_spot", "--port", "{taken}"], "cannot listen on 127.0.0.1:{taken}: ", 2),
        (["binance_spot", "--rate", "nan"], "neither a number above 0", 2),
        (["binance_spot", "--rate", "1e99"], "at most 1,000,000, nor the word max", 2),
        (["binance_spot", "--tickers", "99999999"], "more than the 10,000", 2),
        (["binance_spot", "--limit", "weight_max=nan"], "'weight_max=nan': the value must be a number that is", 2),
        (["binance_spot", "--limit", "weight_max=-1"], "that is not negative", 2),
        (["binance_spot", "--limit", "nonsense=1"], "no limit of this venue; known: ", 2),
        (["binance_spot", "--tls-cert", "{tmp}"], "no PEM pair: Is a directory", 2),
        (["binance_spot", "--ledger", "{tmp}/file/ledger"], "{tmp}/file/ledger: the ledger cannot be written: ", 1),
        (["binance_spot", "--ledger", "/dev/full"], "/dev/full: the ledger cannot be written: No space left", 1),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path: Path, arguments: list[str], told: str, code: int) -> None:
    (tmp_path / "file").write_text("no directory")
    with closing(create_server(("127.0.0.1", 0))) as taken:
        words = {"taken": str(taken.getsockname()[1]), "tmp": str(tmp_path)}
        command = [sys.executable, "-m", "tools.sim", *(argument.format(**words) for argument in arguments)]
        done = subprocess.run([*command, "--seconds", "0.5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert told.format(**words) in done.stderr
    assert "Traceback" not in done.stderr
