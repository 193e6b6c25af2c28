"""One peer: another stack that receives the frames of `bench.sender` and counts them. Needs nothing of this project.

    python peer.py STACK PORT COUNT        (cryptofeed: SSL_CERT_FILE and REQUESTS_CA_BUNDLE name the authority)

Prints a line when the first frame is there, and one when COUNT frames are: seconds and CPU seconds between the two.
Each stack does the least that a user of it would do: parse the frame, and build a typed object where it has one.
"""

import asyncio
import gc
import json
import os
import resource
import sys
import time

SUBSCRIBE = '{"method":"SUBSCRIBE","params":["btcusdt@trade"],"id":1}'


class Counter:
    """Counts messages; reports and ends the process after the last one."""

    def __init__(self, count):
        self.left = count
        self.began = self.cpu = 0.0

    def one(self):
        self.left -= 1
        if not self.began:
            self.began, self.cpu = time.perf_counter(), cpu_s()
            print(json.dumps({"first": True}), flush=True)
            gc.collect()
            gc.freeze()
        if not self.left:
            seconds, cpu = time.perf_counter() - self.began, cpu_s() - self.cpu
            print(json.dumps({"seconds": seconds, "cpu_s": cpu}), flush=True)
            os._exit(0)  # no goodbye: some libraries wait for an answer to it, or connect again


def cpu_s():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def with_aiohttp(port, counter, make):
    import aiohttp
    import ujson

    async with aiohttp.ClientSession() as session, session.ws_connect(f"http://127.0.0.1:{port}/stream") as ws:
        await ws.send_str(SUBSCRIBE)
        async for message in ws:
            frame = ujson.loads(message.data)
            if "data" in frame:
                make(frame["data"])
                counter.one()


def pydantic_trade():
    from pydantic import BaseModel

    class Trade(BaseModel):
        e: str
        E: int
        s: str
        t: int
        p: float
        q: float
        T: int
        m: bool

    return Trade.model_validate


async def with_websockets(port, counter):
    import websockets

    async with websockets.connect(f"ws://127.0.0.1:{port}/stream", max_size=None) as ws:
        await ws.send(SUBSCRIBE)
        async for text in ws:
            frame = json.loads(text)
            if "data" in frame:
                counter.one()


async def with_bare_picows(port, counter):
    """What the targets were set with: routed, decoded, one row packed, nothing checked. The least this shape can cost."""
    import mmap
    import struct

    import msgspec
    import picows

    trade = msgspec.defstruct("Trade", [("t", int), ("p", float), ("q", float), ("T", int), ("m", bool)], gc=False)
    envelope = msgspec.defstruct("Envelope", [("data", trade)], gc=False)
    decode, clock = msgspec.json.Decoder(envelope, strict=False).decode, time.perf_counter_ns
    size, rows = 128, 1 << 19
    last, counter.left = counter.left - 1, 2  # only the first and the last one are counted
    ring = memoryview(mmap.mmap(-1, rows * size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    pack_into, published = struct.Struct("@lllIIldd64xl").pack_into, memoryview(bytearray(8)).cast("Q")

    class Bare(picows.WSListener):
        def __init__(self):
            super().__init__()
            self.fresh, self.next, self.received_ns, self.began_ns = True, 0, 0, 0
            self.routes = {b"btcusdt@trade": self.on_trade}

        def on_ws_connected(self, transport):
            transport.send(picows.WSMsgType.TEXT, SUBSCRIBE.encode())

        def on_ws_frame(self, transport, frame):
            if self.fresh:
                self.fresh, self.received_ns, self.began_ns = False, time.time_ns(), clock()
            payload = frame.get_payload_as_bytes()
            handle = self.routes.get(payload[11 : payload.find(b'"', 11)])
            if handle is not None:
                handle(payload)
            if frame.last_in_buffer:
                self.fresh = True

        def on_trade(self, payload):
            trade = decode(payload).data
            passed, n = clock() - self.began_ns, self.next
            side = -1 if trade.m else 1
            pack_into(ring, n % rows * size, trade.T, self.received_ns, n, passed, passed, side, trade.p, trade.q, n)
            published[0] = self.next = n + 1
            if not n or n == last:
                counter.one()

    await picows.ws_connect(Bare, f"ws://127.0.0.1:{port}/stream")
    await asyncio.sleep(3600)


def with_cryptofeed(port, counter):
    import ssl

    from cryptofeed import FeedHandler
    from cryptofeed.connection import RestEndpoint, WebsocketEndpoint
    from cryptofeed.defines import TRADES
    from cryptofeed.exchanges import Binance

    async def on_trade(_trade, _received):
        counter.one()

    options = {"ssl": ssl.create_default_context()}
    Binance.websocket_endpoints = [WebsocketEndpoint(f"wss://127.0.0.1:{port}", options=options)]
    Binance.rest_endpoints = [RestEndpoint(f"https://127.0.0.1:{port}", routes=Binance.rest_endpoints[0].routes)]
    config = {"log": {"disabled": True}, "uvloop": False}
    handler = FeedHandler(config=config)
    handler.add_feed(Binance(config=config, symbols=["BTC-USDT"], channels=[TRADES], callbacks={TRADES: on_trade}))
    handler.run(install_signal_handlers=False)


def main():
    stack, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    counter = Counter(count)
    if stack == "cryptofeed":
        with_cryptofeed(port, counter)
        return
    runs = {
        "aiohttp+ujson": lambda: with_aiohttp(port, counter, lambda data: data),
        "aiohttp+ujson+pydantic": lambda: with_aiohttp(port, counter, pydantic_trade()),
        "websockets+json": lambda: with_websockets(port, counter),
        "bare picows+msgspec": lambda: with_bare_picows(port, counter),
    }
    asyncio.run(runs[stack]())


main()
