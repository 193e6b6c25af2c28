"""Transport: one WebSocket connection (picows) and the HTTP requests of a connector (aiohttp).

Driven by `connector.py`. A `Leg` takes the receive time before anything is parsed, hands every text message to the
venue and sorts out what is no message: control frames, fragments, compressed or binary frames. The `Fetcher` works
off wanted URLs within the venue's weight budget and turns what goes wrong into waiting, never into silence.
"""

import asyncio
import math
import random
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec
import picows
import tenacity
from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport

from mdcollector.budget import BLOCK_MOST_S, WAIT_MOST_S, Budget
from mdcollector.emit import Emit
from mdcollector.errors import ConfigError, Disconnected, FrameError, RateLimited
from mdcollector.exchanges import Fetch, Reconnect, Venue

FRAME_BYTES_MAX = 64 << 20  # the largest frame seen has 5 MB (a Coinbase snapshot)
RECEIVE_BUFFER_BYTES = (
    1 << 20
)  # 10 MB/s at 100 ms; bounds the read buffer, which grows to what one read brings and never shrinks
USER_AGENT = "mdcollector-connector"
HANDSHAKE_S = 10.0
HTTP_TIMEOUT_S = 20.0
HTTP_BODY_BYTES_MAX = 64 << 20
HTTP_TRIES = 5  # of a request that fails without an answer; then it is wanted again by whoever needs it
FETCHES_WAITING_MAX = 20_000
BUDGET_WAIT_MOST_S = 5.0  # of who can do without the answer
RESERVE = 0.5  # of the weight that may go at once: kept from requests that can wait
RETRY_AFTER_DEFAULT_S = 60.0  # a 429 or 418 without Retry-After
LIMIT_OVER_MOST_S = 600.0  # a time further ahead, at which a limit is to be over, is that of another clock than ours

Decode = Callable[[bytes], None]


class Leg(WSListener):
    """One connection. `decode` is the venue's, or a filter in front of it while two connections overlap."""

    # The base class has no dict, and CPython 3.11 does not speed up looks into one that is added: 30 ns each.
    __slots__ = (
        "_clock", "_emit", "_fragments", "_fresh", "_on_packet", "_time_ns", "cause", "closed", "crash", "decode",
        "opened_ns", "outbox", "packets", "tails_checked", "transport", "wanted",
    )  # fmt: skip

    def __init__(self, emit: Emit, decode: Decode, on_packet: Callable[["Leg"], None]) -> None:
        super().__init__()
        self.decode = decode
        self.packets = 0
        self.tails_checked = False
        self.opened_ns = time.time_ns()
        self.transport: WSTransport | None = None
        self.closed = asyncio.Event()
        self.cause = "closed"
        self.crash: BaseException | None = None
        self.outbox: deque[str] = deque()
        self.wanted: Reconnect | None = None  # another connection in its place
        self._emit, self._on_packet = emit, on_packet
        self._fresh = True
        self._fragments = bytearray()
        self._clock, self._time_ns = emit.clock, time.time_ns

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        try:
            if self._fresh:
                self._fresh = False
                self._emit.packet(self._time_ns(), self._clock())
            payload, decode = frame.get_payload_as_bytes(), self.decode  # a call of self.decode costs 30 ns more
            try:
                if not payload.isascii():  # decoders skip over text that they do not need, valid or not
                    payload.decode()
                decode(payload)
            except (FrameError, msgspec.DecodeError, UnicodeDecodeError) as error:
                self._odd(frame, payload, error)
            if frame.last_in_buffer:
                self._fresh = True
                self.packets += 1
                self._emit.end_packet()
                self._on_packet(self)
        except BaseException as error:  # noqa: BLE001 (a bug: kept for the main loop, which dies of it)
            self.crash = error
            transport.disconnect()

    def _odd(self, frame: WSFrame, payload: bytes, error: Exception) -> None:
        """What failed to decode: maybe it was no message of its own. The type is looked at only here: it costs 70 ns."""
        kind = frame.msg_type
        if kind in (WSMsgType.PING, WSMsgType.PONG):  # picows answers pings
            return
        if kind == WSMsgType.CLOSE:
            self.cause = (
                f"close {frame.get_close_code()} {(frame.get_close_message() or b'').decode(errors='replace')[:100]}"
            )
            self.close()  # the venue waits for our close, and ends the connection only then
        elif kind == WSMsgType.CONTINUATION or not frame.fin:
            self._fragment(frame, payload)
        elif frame.rsv1:
            self._emit.refused("compressed", payload)
        elif kind == WSMsgType.BINARY:
            self._emit.refused("binary", payload)
        else:
            self._emit.refused_error(error, payload)

    def _fragment(self, frame: WSFrame, payload: bytes) -> None:
        if frame.msg_type != WSMsgType.CONTINUATION:
            self._fragments = bytearray()
        self._fragments += payload
        if len(self._fragments) > FRAME_BYTES_MAX:
            self._fragments = bytearray()
            raise Disconnected(f"a message in fragments is longer than {FRAME_BYTES_MAX} bytes")
        if frame.fin:
            message, self._fragments = bytes(self._fragments), bytearray()
            try:
                if not message.isascii():
                    message.decode()
                self.decode(message)
            except (FrameError, msgspec.DecodeError, UnicodeDecodeError) as error:
                self._emit.refused_error(error, message)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.closed.set()

    def send(self, text: str) -> None:
        """Send now; a connection that is gone is noticed by its own event."""
        if self.transport is not None and not self.closed.is_set():
            self.transport.send(WSMsgType.TEXT, text.encode())

    def close(self) -> None:
        """Say goodbye and go."""
        if self.transport is not None and not self.closed.is_set():
            self.transport.send_close(WSCloseCode.OK)
            self.transport.disconnect()


async def open_leg(
    url: str, make: Callable[[], Leg], tls: ssl.SSLContext | None, rate_limited: Mapping[int, float] | None = None
) -> Leg:
    """Connect. Disconnected when it fails, RateLimited when the venue says that it is too much (as in `get`)."""

    def make_socket(parsed: picows.WSParsedURL) -> socket.socket:
        family = socket.AF_INET6 if ":" in parsed.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        sock.setblocking(False)
        return sock

    try:
        _, leg = await picows.ws_connect(
            make,
            url,
            ssl_context=tls,
            websocket_handshake_timeout=HANDSHAKE_S,
            enable_auto_pong=True,
            max_frame_size=FRAME_BYTES_MAX,
            socket_factory=make_socket,
            extra_headers={"User-Agent": USER_AGENT},
        )
    except picows.WSInvalidStatusError as error:
        status = int(error.response.status) if error.response is not None else 0
        waits_s = _waits_s(rate_limited)
        if error.response is not None and status in waits_s:
            wait_s = _retry_after(error.response.headers.get("Retry-After"), waits_s[status])
            raise RateLimited(wait_s, f"{url}: HTTP {status}") from error
        raise Disconnected(f"{url}: HTTP {status}") from error
    except (OSError, picows.WSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise Disconnected(f"{url}: {type(error).__name__}: {error}") from error
    if not isinstance(leg, Leg):  # what picows gives back when the other side goes away during the handshake
        raise Disconnected(f"{url}: closed during the handshake")
    return leg


def _waits_s(rate_limited: Mapping[int, float] | None) -> dict[int, float]:
    """Statuses that mean "slow down", and how long to wait after one that does not say it itself."""
    return {429: RETRY_AFTER_DEFAULT_S, 418: RETRY_AFTER_DEFAULT_S, **(rate_limited or {})}


def _retry_after(value: str | None, default_s: float) -> float:
    """Seconds that a Retry-After header asks for, by number or by date; `default_s` where it says nothing of sense."""
    try:
        seconds = float(value) if value is not None else default_s
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(value)).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = default_s
    return min(max(1.0, seconds), BLOCK_MOST_S) if math.isfinite(seconds) else default_s


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Verification is always on; `ca_file` adds a certificate authority."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=str(ca_file))
        except OSError as error:  # ssl.SSLError is one
            why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError(f"ca_file = {str(ca_file)!r}: expected PEM certificates: {why}") from error
    return context


class Answer(NamedTuple):
    """What a URL answered."""

    status: int
    body: bytes
    limit_over_s: float  # until a limit that the body may speak of is over; 0 = the venue does not say


def _limit_over_s(value: str | None) -> float:
    """Seconds until a time in ms since the epoch; 0 where that tells nothing of sense."""
    try:
        seconds = int(value or "") / 1000 - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return seconds if 0 < seconds <= LIMIT_OVER_MOST_S else 0.0


async def get(
    session: aiohttp.ClientSession,
    url: str,
    rate_limited: Mapping[int, float] | None = None,
    tries: int = HTTP_TRIES,
    limit_over_header: str = "",
) -> Answer:
    """GET with retries of what is no answer (connection errors, timeouts, also those of the backend (408), 5xx).

    RateLimited for 429, 418 and the statuses of `rate_limited`, with the wait that belongs to each (`RATE_LIMITED` of
    a venue), or a longer one that the header names (`LIMIT_OVER_HEADER`).
    """
    waits_s = _waits_s(rate_limited)
    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((aiohttp.ClientError, TimeoutError, Disconnected)),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
        stop=tenacity.stop_after_attempt(tries),
        reraise=True,
    ):
        with attempt:
            async with session.get(url) as response:
                over_s = _limit_over_s(response.headers.get(limit_over_header)) if limit_over_header else 0.0
                if response.status in waits_s:
                    default_s = max(waits_s[response.status], over_s)
                    wait_s = _retry_after(response.headers.get("Retry-After"), default_s)
                    raise RateLimited(wait_s, f"{url}: HTTP {response.status}")
                body = await response.content.read(HTTP_BODY_BYTES_MAX)
                while not response.content.at_eof() and len(body) < HTTP_BODY_BYTES_MAX:
                    body += await response.content.read(HTTP_BODY_BYTES_MAX - len(body))
                if response.status >= 500 or response.status == HTTPStatus.REQUEST_TIMEOUT:
                    raise Disconnected(f"{url}: HTTP {response.status}")
                return Answer(response.status, body, over_s)
    raise AssertionError("tenacity returns or raises")


async def get_within(
    session: aiohttp.ClientSession, url: str, budget: Budget, weight: int, rate_limited: Mapping[int, float]
) -> tuple[int, bytes]:
    """`get` once the budget has `weight`. RateLimited, without asking, where that lasts long; a ban binds all who share it."""
    while wait_s := budget.take(weight):
        if wait_s > BUDGET_WAIT_MOST_S:
            raise RateLimited(wait_s, f"{url}: not asked: blocked for another {wait_s:.0f} s")
        await asyncio.sleep(wait_s)
    try:
        return (await get(session, url, rate_limited))[:2]
    except RateLimited as error:
        budget.block(error.retry_after_s)
        raise


def open_session(tls: ssl.SSLContext | None, headers: Mapping[str, str] | None = None) -> aiohttp.ClientSession:
    """One connection, kept alive: some venues count connections, HTTP included."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=1, ssl=tls if tls is not None else True),
        timeout=aiohttp.ClientTimeout(total=HTTP_TIMEOUT_S),
        headers={"User-Agent": USER_AGENT, **(headers or {})},
    )


class Fetcher:
    """Fetches what a venue wants, one at a time, in order, within the weight that this machine's IP address has.

    `tries` of a request on one host, then the next host is asked. After a round in which no host answered it waits, up
    to `wait_most_s` and longer each time, with full jitter.
    """

    def __init__(
        self,
        emit: Emit,
        venue: Venue,
        rest_urls: Sequence[str],
        budget: Budget,
        tls: ssl.SSLContext | None,
        *,
        tries: int = HTTP_TRIES,
        wait_most_s: float = 30.0,
    ) -> None:
        self._tries, self._wait_most_s = tries, wait_most_s
        self._emit, self._venue, self._budget, self._tls = emit, venue, budget, tls
        self._bases = deque(url.rstrip("/") for url in rest_urls)
        self._waiting: dict[str, Fetch] = {}
        self._broken: Counter[str] = Counter()  # answers in a row that could not be read
        self._news = asyncio.Event()
        self.blocked_until_ns = 0
        self.round_trip_ns = 0  # of the request whose answer is being delivered, tries that failed included
        self.failures = 0  # requests in a row without an answer
        self.last_failure = ""

    @property
    def is_down(self) -> bool:
        """No host has answered, twice in turn."""
        return self.failures >= 2 * len(self._bases)

    @property
    def waiting(self) -> int:
        """Requests not yet answered."""
        return len(self._waiting)

    def next_host(self) -> None:
        """Ask another host from now on, where the venue has one."""
        if len(self._bases) > 1:
            self._bases.rotate(-1)
            self._emit.counters["http_host_changed"] += 1
            self._venue.notes["REST host"] = self._bases[0]

    def want(self, fetch: Fetch) -> None:
        """Ask for a URL; one that is already waiting under this key is not asked for twice."""
        if len(self._waiting) >= FETCHES_WAITING_MAX:
            self._emit.counters["fetch_overflow"] += 1
            return
        self._waiting.setdefault(fetch.key, fetch)
        self._news.set()

    async def run(self, on_answer: Callable[[], None], before_answer: Callable[[], None]) -> None:
        """Work off what is wanted, for ever. `before_answer` is called before the venue takes one, `on_answer` after."""
        async with open_session(self._tls, self._venue.HTTP_HEADERS) as session:
            while True:
                fetch = await self._due()
                key = fetch.key
                answered = await self._one(session, fetch)
                del self._waiting[key]
                if answered is not None:
                    before_answer()
                if answered is None or not answered():
                    self.want(fetch)  # again, behind the others
                on_answer()
                rounds = min(self.failures // len(self._bases), 30)
                if answered is None and rounds:
                    await asyncio.sleep(random.uniform(0, min(self._wait_most_s, 0.5 * 2.0**rounds)))  # noqa: S311 (jitter)

    async def _due(self) -> Fetch:
        """The next request, once its weight was taken: the first one, of those that can wait only when there is no other."""
        while True:
            self._news.clear()
            fetch = next(iter(self._waiting.values()), None)
            if fetch is not None and fetch.can_wait:
                fetch = next((other for other in self._waiting.values() if not other.can_wait), fetch)
            if fetch is None:
                await self._news.wait()
            elif not fetch.can_wait:
                await self._budget.spend(fetch.weight)
                return fetch
            elif wait_s := self._budget.take(fetch.weight, self._budget.capacity * RESERVE):
                with suppress(TimeoutError):  # one that cannot wait may be wanted meanwhile
                    await asyncio.wait_for(self._news.wait(), min(wait_s, WAIT_MOST_S))
            else:
                return fetch

    def _hold(self, seconds: float) -> None:
        """No connector of this machine asks before the time that the venue gave."""
        self._emit.counters["http_rate_limited"] += 1
        self.blocked_until_ns = time.time_ns() + int(seconds * 1e9)
        self._budget.block(seconds)

    async def _one(self, session: aiohttp.ClientSession, fetch: Fetch) -> Callable[[], bool] | None:
        """What to do with the answer, once the request no longer counts as waiting: False = ask again; None = no answer."""
        emit, url = self._emit, self._bases[0] + fetch.path
        emit.counters["http_requests"] += 1
        began_ns = emit.clock()
        try:
            status, body, limit_over_s = await get(
                session, url, self._venue.RATE_LIMITED, self._tries, self._venue.LIMIT_OVER_HEADER
            )
        except RateLimited as error:
            self._hold(error.retry_after_s)
            return None
        except (
            aiohttp.ClientError,
            TimeoutError,
            UnicodeError,
            Disconnected,
        ) as error:  # led on to a name that is none
            emit.counters["http_failed"] += 1
            self.failures += 1
            self.last_failure = emit.samples["http_failed"] = f"{url}: {type(error).__name__}: {error}"
            self.next_host()
            return None
        self.failures = 0

        failed = fetch.failed or partial(self._venue.http_failed, fetch)

        def deliver() -> bool:
            emit.packet(time.time_ns(), emit.clock())
            self.round_trip_ns = emit.t0_ns - began_ns
            if status >= 400:
                emit.counters["http_refused"] += 1
                failed(status, body)
                return True
            try:
                with emit.fetching() if self._venue.WS_URL else nullcontext():
                    if fetch.answer is not None:
                        fetch.answer(body)
                    else:
                        self._venue.http(url, body)
            except RateLimited as error:  # some venues say so in the body of an answer
                self._hold(max(limit_over_s, error.retry_after_s))
                return False
            except (FrameError, msgspec.DecodeError, UnicodeDecodeError) as error:
                emit.refused_error(error, body)
                self._broken[fetch.key] += 1
                self.next_host()
                if self._broken[fetch.key] < HTTP_TRIES:
                    return False
                failed(status, body)
            self._broken.pop(fetch.key, None)
            emit.end_packet()
            return True

        return deliver
