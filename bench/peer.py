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
    }
    asyncio.run(runs[stack]())


main()
