"""A process that plays the exchange for a benchmark: one port for WebSocket and REST, frames encoded beforehand.

    python -m bench.sender KIND COUNT [--rate PER_S] [--cpu INDEX] [--tls-cert FILE --tls-key FILE]

Prints its port; sends the first frame when a client has subscribed (or named its streams in the URL), the others after
a line on stdin, as fast as the client takes them or at `--rate`; then prints what it did. Ends with its stdin.
"""

import argparse
import asyncio
import json
import ssl
import sys
import time
from collections.abc import Sequence

from picows import (
    WSFrame,
    WSListener,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
    ws_create_server,
)

from bench import frames, machine

CHUNK_BYTES = 1 << 16
SPIN_RATE_MAX = 50_000  # up to here each frame is sent at its own time, by spinning; beyond it in groups
EXCHANGE_INFO = {
    "symbols": [
        {
            "symbol": symbol, "status": "TRADING", "baseAsset": symbol.removesuffix("USDT"), "quoteAsset": "USDT",
            "filters": [{"filterType": "PRICE_FILTER", "tickSize": "0.01000000"}],
        }
        for symbol in ("BTCUSDT", *frames.STREAM_TICKERS)
    ]
}  # fmt: skip


def wire(payload: bytes) -> bytes:
    """One unmasked text frame, as a server sends it."""
    size = len(payload)
    head = bytes((0x81, size)) if size < 126 else b"\x81\x7e" + size.to_bytes(2, "big")
    if size >= 1 << 16:
        raise ValueError(f"a frame of {size} bytes is not needed here")
    return head + payload


class Client(WSListener):  # type: ignore[misc]
    """The client that is measured."""

    def __init__(self, sender: "Sender", subscribed: bool) -> None:
        super().__init__()
        self._sender, self._subscribed = sender, subscribed

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._sender.transport = transport
        if self._subscribed:
            self._sender.send_first()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        text = frame.get_payload_as_bytes()
        if b"SUBSCRIBE" in text:
            transport.underlying_transport.write(wire(b'{"result":null,"id":%d}' % json.loads(text)["id"]))
            if not self._subscribed:
                self._subscribed = True
                self._sender.send_first()

    def pause_writing(self) -> None:
        self._sender.writable.clear()

    def resume_writing(self) -> None:
        self._sender.writable.set()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._sender.gone.set()
        self._sender.writable.set()


class Sender:
    """Frames, and how they are sent."""

    def __init__(self, payloads: Sequence[bytes], rate: float) -> None:
        self.frames, self.rate = [wire(payload) for payload in payloads], rate
        self.transport: WSTransport | None = None
        self.writable, self.gone = asyncio.Event(), asyncio.Event()
        self.writable.set()

    def accept(self, request: WSUpgradeRequest) -> WSListener | WSUpgradeResponseWithListener:
        """A WebSocket, or an answer to one of the REST requests of a Binance client."""
        path = request.path.decode()
        bodies = {
            "/api/v3/exchangeInfo": json.dumps(EXCHANGE_INFO).encode(),
            "/api/v3/depth": frames.binance_snapshot(),
        }
        body = bodies.get(path.partition("?")[0])
        if body is None:
            return Client(self, "streams=" in path)
        response = WSUpgradeResponse.create_ok_response(body, {"Content-Type": "application/json"})
        return WSUpgradeResponseWithListener(response, None)

    def _write(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.underlying_transport.write(data)

    def send_first(self) -> None:
        self._write(self.frames[0])

    async def burst(self) -> None:
        """As fast as the client takes them."""
        chunk: list[bytes] = []
        size = 0
        for frame in self.frames[1:]:
            chunk.append(frame)
            size += len(frame)
            if size >= CHUNK_BYTES:
                self._write(b"".join(chunk))
                chunk, size = [], 0
                await self.writable.wait()
                await asyncio.sleep(0)
                if self.gone.is_set():
                    return
        self._write(b"".join(chunk))

    async def paced(self) -> None:
        """Each frame at its time."""
        began, sent, clock = time.perf_counter(), 1, time.perf_counter
        alone = self.rate <= SPIN_RATE_MAX
        while sent < len(self.frames) and not self.gone.is_set():
            due = min(1 + int((clock() - began) * self.rate), len(self.frames))
            if due > sent:
                self._write(b"".join(self.frames[sent:due]))
                sent = due
            await asyncio.sleep(0 if alone else 0.0005)

    async def run(self, tls: ssl.SSLContext | None) -> None:
        server = await ws_create_server(self.accept, "127.0.0.1", 0, ssl=tls)
        said: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin, lambda: said.put_nowait(sys.stdin.readline()))
        print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
        while line := await said.get():
            if line.strip() == "go" and self.transport is not None:
                began = time.perf_counter()
                await (self.paced() if self.rate else self.burst())
                print(json.dumps({"sent": len(self.frames), "seconds": time.perf_counter() - began}), flush=True)
        loop.remove_reader(sys.stdin)
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Send benchmark frames.")
    parser.add_argument("kind", choices=sorted(frames.KINDS))
    parser.add_argument("count", type=int)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--cpu", type=int, default=1)
    parser.add_argument("--tls-cert")
    parser.add_argument("--tls-key")
    given = parser.parse_args()
    machine.pin(given.cpu)
    tls = None
    if given.tls_cert:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(given.tls_cert, given.tls_key)
    asyncio.run(Sender(list(frames.KINDS[given.kind](given.count)), given.rate).run(tls))


if __name__ == "__main__":
    main()
