"""An own connection to a venue's feed for the tools: raw text and receive time to a callback, nothing else.

Used by `mdreplay record` and `mdcompare`. What is venue-specific comes from `tools.venues`; nothing of the connector's
transport is used, so that the tools see the feed independently of what they are to judge.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import click
from picows import WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from mdcollector.errors import Disconnected
from tools.venues import Venue

FRAME_BYTES_MAX = 64 << 20  # the largest frame ever recorded has 5 MB
CONNECT_S_MAX = 15.0
REQUEST_S_MAX = 15.0
CLOSE_S_MAX = 5.0
USER_AGENT = "mdcollector-tools"  # a simulated venue can aim its faults at the connector and spare the tools

log = logging.getLogger(__name__)


class _Listener(WSListener):
    """Puts fragments together and hands over whole text messages with the time at which they were read."""

    def __init__(self, on_text: Callable[[int, str], None]) -> None:
        self._on_text = on_text
        self._fragments: list[bytes] = []
        self.unreadable = 0

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        now_ns = time.time_ns()
        if frame.msg_type in (WSMsgType.PING, WSMsgType.PONG, WSMsgType.CLOSE):
            return
        if frame.msg_type is WSMsgType.BINARY:
            self.unreadable += 1
            return
        payload = frame.get_payload_as_bytes()
        if not frame.fin or self._fragments:
            self._fragments.append(payload)
            if not frame.fin:
                return
            payload = b"".join(self._fragments)
            self._fragments.clear()
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            self.unreadable += 1
            text = payload.decode(errors="replace")
        self._on_text(now_ns, text)


class LiveFeed:
    """One WebSocket connection with its subscriptions and its heartbeat duty.

    Callbacks: `on_frame(conn, t_ns, raw)` for every frame of the venue, `on_sent(conn, t_ns, raw)` for every message
    that was sent, `on_open(conn, t_ns, url)`.
    """

    def __init__(
        self,
        venue: Venue,
        conn: str,
        streams: list[str],
        ws_url: str,
        on_frame: Callable[[str, int, str], None],
        on_sent: Callable[[str, int, str], None] | None = None,
        on_open: Callable[[str, int, str], None] | None = None,
    ) -> None:
        self._venue, self._conn, self._streams = venue, conn, streams
        self._ws_url = ws_url.rstrip("/")
        self._on_frame, self._on_sent, self._on_open = on_frame, on_sent, on_open
        self._transport: WSTransport | None = None
        self._listener = _Listener(self._take)
        self.complaints: list[str] = []

    @property
    def unreadable(self) -> int:
        return self._listener.unreadable

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None] | None = None) -> bool:
        """Receive until `stop` is set (True) or the venue closes the connection (False)."""
        path, messages = self._venue.opening(self._streams)
        url = self._ws_url + path
        opened_ns = time.time_ns()
        try:
            self._transport, _ = await ws_connect(
                lambda: self._listener,
                url,
                websocket_handshake_timeout=CONNECT_S_MAX,
                max_frame_size=FRAME_BYTES_MAX,
                extra_headers={"User-Agent": USER_AGENT},
            )
        except (OSError, WSError, TimeoutError) as error:
            raise Disconnected(f"{url[:200]}: cannot connect: {error or type(error).__name__}") from error
        transport = self._transport
        if self._on_open is not None:
            self._on_open(self._conn, opened_ns, url)
        stopped = asyncio.ensure_future(stop.wait())
        gone = asyncio.ensure_future(transport.wait_disconnected())
        try:
            for number, message in enumerate(messages):
                if number:
                    await asyncio.wait(
                        (stopped, gone), timeout=self._venue.message_gap_s, return_when="FIRST_COMPLETED"
                    )
                if stopped.done() or gone.done():
                    break
                self._send(message)
            if on_ready is not None and not gone.done():
                on_ready()
            await asyncio.wait((stopped, gone), return_when="FIRST_COMPLETED")
            if not gone.done():
                transport.send_close()
                await asyncio.wait((gone,), timeout=CLOSE_S_MAX)
        finally:
            transport.disconnect()
            stopped.cancel()
            await asyncio.wait((gone,), timeout=CLOSE_S_MAX)
        failure = gone.exception() if gone.done() else None
        if failure is not None and not isinstance(failure, OSError | WSError):
            raise failure  # of who took the frames: it is not the venue that ended the connection
        return stop.is_set()

    def _take(self, now_ns: int, text: str) -> None:
        self._on_frame(self._conn, now_ns, text)
        if self._venue.stream_of(text) is not None:
            return
        reply = self._venue.answer(text)
        if reply is not None:
            self._send(reply)
        complaint = self._venue.complaint(text)
        if complaint is not None:
            self.complaints.append(complaint)
            log.warning("%s: the venue says: %s", self._conn, complaint)

    def _send(self, message: str) -> None:
        assert self._transport is not None
        if self._transport.is_disconnected:
            return
        self._transport.send(WSMsgType.TEXT, message.encode())
        if self._on_sent is not None:
            self._on_sent(self._conn, time.time_ns(), message)


async def fetch(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    """Body of a GET with its receive time; Disconnected tells why there is none."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=REQUEST_S_MAX)) as response:
            text = await response.text(encoding="utf-8")
            now_ns = time.time_ns()
            if response.status != 200:
                raise Disconnected(f"{url}: HTTP {response.status}: {text[:200]}")
            return now_ns, text
    except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError) as error:
        raise Disconnected(f"{url}: {error or type(error).__name__}") from error


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The two options that every command takes."""
    levels, forms = click.Choice(["debug", "info", "warning", "error"]), click.Choice(["text", "json"])
    command = click.option("--log-format", type=forms, default="text", show_default=True, help="Form of log lines.")(
        command
    )
    return click.option("--log-level", type=levels, default="info", show_default=True, help="Least level to log.")(
        command
    )
