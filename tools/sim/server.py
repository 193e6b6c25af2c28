"""The shared server below every simulated exchange: HTTP and WebSocket on one port, pacing, faults, limits, ledger.

`cli.py` starts it with a venue found by name. It drives the market, sends what the venue puts into words, breaks it
where a fault asks for that, and writes the ledger. It names no venue and interprets no message.
"""

import asyncio
import contextlib
import importlib
import json
import math
import pkgutil
import signal
import socket
import ssl
import struct
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from aiohttp import WSMsgType, web

import tools.sim
from tools.sim.faults import BAD_BODIES, GARBAGE, KINDS, Fault, FaultError, Faults, parse
from tools.sim.ledger import FLUSH_S, Dialect, LedgerWriter
from tools.sim.market import ASK, BASE_RATE, BID, Action, Book, Instrument, Market

POLL_S = 0.001  # time between two looks at a client that is too slow for full speed
KEEP_S = 0.02  # time between two rounds of housekeeping: faults that are due, heartbeats, lifetimes
STEPS_MAX = 256  # market actions between two looks at the sockets
BUFFER_MAX = 64 << 20  # bytes that may wait for one client; a slower one is disconnected, as venues do
BUFFER_FAST = 1 << 20  # at full speed the market waits for the slowest client beyond this many bytes
HELD_MAX = 100_000  # messages that a lagging stream may hold back per client
MESSAGE_MAX = 1 << 20  # bytes of one client message
CLOSE_S = 2.0  # how long an orderly close waits for the client's answer
SECOND_US = 1_000_000

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
Level = tuple[int, int]


def frame_of(payload: bytes, opcode: int = TEXT, fin: bool = True) -> bytes:
    """One WebSocket frame as a server sends it; unmasked, so that all clients can share it."""
    head, size = (0x80 if fin else 0) | opcode, len(payload)
    if size < 126:
        return bytes((head, size)) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", head, 126, size) + payload
    return struct.pack("!BBQ", head, 127, size) + payload


class CannotListen(Exception):
    """The port is not to be had; the text says why."""


class Window:
    """At most `limit` events in any `length_s` seconds."""

    def __init__(self, limit: float, length_s: float) -> None:
        self.limit, self.length_s = limit, length_s
        self._times: deque[float] = deque()

    def allow(self, now_s: float) -> bool:
        while self._times and self._times[0] <= now_s - self.length_s:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return False
        self._times.append(now_s)
        return True


class Credits:
    """A pool of credits that refills at a steady rate."""

    def __init__(self, pool: float, refill_per_s: float, now_s: float) -> None:
        self.pool, self.refill_per_s = pool, refill_per_s
        self.left, self._then_s = pool, now_s

    def take(self, cost: float, now_s: float) -> bool:
        self.left = min(self.pool, self.left + (now_s - self._then_s) * self.refill_per_s)
        self._then_s = now_s
        if self.left < cost:
            return False
        self.left -= cost
        return True


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, or the request that asks for a WebSocket."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    ip: str
    agent: str


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer; the body is JSON text."""

    body: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Session:
    """One WebSocket connection of a client."""

    def __init__(
        self, number: int, ws: web.WebSocketResponse, transport: asyncio.Transport, request: Request, now_s: float
    ) -> None:
        self.id, self.ws, self.transport, self.request, self.opened_s = number, ws, transport, request, now_s
        self.own: Any = None  # state that only the venue's file understands
        self.subs: dict[str, Hashable] = {}  # stream -> form in which this client wants it
        self.out: list[bytes | list[bytes]] = []  # a list is one frame that is sent piece by piece
        self.frozen_until_s = -math.inf
        self.blocked = False  # a message is being sent in pieces; later ones wait behind it
        self.swapped: dict[str, bytes] = {}  # stream -> message that waits for the next one of its stream
        self.held: list[tuple[str, bytes]] = []  # ticker and message that a lagging stream holds back
        self.received: Counter[str] = Counter()
        self.sent = 0
        self.pings: dict[bytes, float] = {}  # unanswered pings: payload -> when they were sent
        self.closed_reason = ""

    @property
    def agent(self) -> str:
        return self.request.agent


@dataclass
class Options:
    """What `mdsim` was asked for."""

    port: int = 0
    seed: int = 1
    tickers: tuple[str, ...] = ()
    rate: float = 20.0  # actions a second for a ticker of busy 1; infinite: as fast as the machine goes
    seconds: float = math.inf
    events: float = math.inf
    ledger: Path | None = None
    depth: int = 50
    near: float = 0.0  # share of orders placed or withdrawn at the best price, beside those that are there anyway
    epoch_us: int | None = None
    hold: bool = False
    faults: tuple[str, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    credentials: dict[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None


class Venue(ABC):
    """What one file in this folder says about its venue. It talks to the shared code through `self.exchange`."""

    name: ClassVar[str]
    tickers: ClassVar[tuple[str, ...]]  # what is traded when nothing is asked for
    limits: ClassVar[dict[str, float]]  # every number that `--limit` can change, with the venue's own value
    intervals: ClassVar[dict[str, int]]  # candle intervals -> microseconds
    notes: ClassVar[str]  # what a user should know, for `--help`
    dialect: ClassVar[Dialect]
    shown_faults: ClassVar[tuple[str, ...]]  # what a demonstration does to a connector

    def __init__(self, exchange: "Exchange", limits: Mapping[str, float], credentials: Mapping[str, str]) -> None:
        self.exchange, self.limit, self.credentials = exchange, limits, credentials

    @staticmethod
    @abstractmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        """The instrument of this name."""

    @staticmethod
    def invented(number: int) -> str:
        """Name of the n-th invented ticker, for tests with hundreds of them."""
        raise FaultError(f"this venue invents no tickers (asked for number {number})")

    @abstractmethod
    def first_book(self, book: Book) -> dict[str, object]:
        """The book that the ledger starts from: last, bids, asks in the venue's numbers and words."""

    @abstractmethod
    def on_action(self, book: Book, action: Action) -> None:
        """Publish and write down what one market action did."""

    @abstractmethod
    def timers(self) -> list[tuple[int, Callable[[int], None]]]:
        """Periods in microseconds of market time, and what to do then, given the exchange's time."""

    @abstractmethod
    def finish(self, t: int) -> None:
        """Publish whatever is still waiting for its timer."""

    @abstractmethod
    def refuse_ws(self, request: Request) -> Reply | None:
        """Why a WebSocket is not opened, or None to open it."""

    @abstractmethod
    def opened(self, session: Session) -> None:
        """A WebSocket has been opened."""

    @abstractmethod
    def on_text(self, session: Session, text: str) -> None:
        """A client's text message."""

    def allows(self, session: Session) -> bool:
        """Whether the client may send one more frame of any kind now."""
        return True

    @abstractmethod
    def keep(self, session: Session, now_s: float) -> None:
        """Heartbeats and limits of a session that depend on time."""

    @abstractmethod
    async def http(self, request: Request) -> Reply:
        """Answer an HTTP request."""

    @abstractmethod
    def ban_reply(self, status: int, retry_after_s: int) -> Reply:
        """The answer of a venue that is not to be asked for a while."""

    @abstractmethod
    def notice(self, session: Session, t: int) -> str:
        """The venue's own notice of a shutdown, in the form that this session expects."""

    @abstractmethod
    def unknown_event(self, session: Session, t: int) -> str:
        """A well-formed message of a kind that no client knows."""

    def expire(self, session: Session) -> None:
        """The session's credentials are no longer valid; a venue without credentials has nothing to forget."""
        return

    def renumber(self, book: Book) -> None:
        """Number the messages of a book anew; a venue that never does leaves everything as it is."""
        return

    def resnapshot(self, book: Book, anew: bool) -> None:
        """Send a snapshot of a book that nobody asked for; a venue without such snapshots does nothing."""
        return

    @abstractmethod
    def listed(self, book: Book, t: int) -> None:
        """A ticker was listed while running, or trades again."""

    def delisted(self, book: Book, t: int) -> None:
        """A ticker trades no more: publish what waits, forget it. The list shows it while it is in `exchange.halted`."""
        raise FaultError("this venue delists nothing")

    def revise(self, book: Book, t: int) -> None:
        """Change the newest closed candles of a ticker; at a venue whose candles are final nothing happens."""
        return


class PolledVenue(Venue):
    """A venue without WebSocket: no session is ever opened."""

    shown_faults: ClassVar[tuple[str, ...]] = (
        "rest_error:every=5,status=503", "bad_body:every=4", "ban:at=11,seconds=2,status=429",
    )  # fmt: skip

    def finish(self, t: int) -> None:
        return

    def refuse_ws(self, request: Request) -> Reply:
        return Reply('{"error":"not found"}', 404)

    def opened(self, session: Session) -> None:
        raise AssertionError("a WebSocket was opened")

    def on_text(self, session: Session, text: str) -> None:
        raise AssertionError("a WebSocket was opened")

    def keep(self, session: Session, now_s: float) -> None:
        raise AssertionError("a WebSocket was opened")

    def notice(self, session: Session, t: int) -> str:
        raise AssertionError("a WebSocket was opened")

    def unknown_event(self, session: Session, t: int) -> str:
        raise AssertionError("a WebSocket was opened")


def venues() -> dict[str, type[Venue]]:
    """Every venue in the files of this folder, by name."""
    found: dict[str, type[Venue]] = {}
    for info in pkgutil.iter_modules(tools.sim.__path__):
        module = importlib.import_module(f"tools.sim.{info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Venue)
                and value.__module__ == module.__name__
                and "name" in vars(value)  # else several venues share it
            ):
                found[value.name] = value
    return found


class Exchange:
    """One running simulated exchange."""

    def __init__(self, venue: type[Venue], options: Options) -> None:
        self.options = options
        self.fast = math.isinf(options.rate)
        self.ledger = LedgerWriter(options.ledger)
        self.faults = Faults(options.seed)
        for spec in options.faults:
            self.faults.add(parse(spec))
        self.sessions: dict[int, Session] = {}
        self.streams: dict[str, dict[Hashable, dict[Session, None]]] = {}
        self.counts: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()
        self.retry_until_s: dict[str, float] = {}  # ip -> end of the longest Retry-After that it was given
        self.reconnect_until_s: dict[str, float] = {}  # the same for connections
        self.skew_us = 0
        self.halted: dict[str, Instrument] = {}  # listed, but not trading
        self.finer: Counter[str] = Counter()  # ticker -> how many times its tick size became ten times finer
        self.virtual = self.fast and options.epoch_us is not None
        # Market time begins on a whole second of the exchange's clock, so that batches fall alike in every run.
        self.t = options.epoch_us or (time.time_ns() // 1_000_000_000 + 1) * SECOND_US
        self._epoch_us = self.t
        self._virtual_us = 0
        self._made_s = time.monotonic()
        self._origin_s: float | None = None  # steady clock when market time began
        self._paused_us: int | None = None
        self._ending = False
        self._dirty: dict[Session, None] = {}
        self._numbers = 0
        self._lag_until_s: dict[str, float] = {}
        self._order = count()
        self._timers: list[tuple[int, int, int, Callable[[int], None]]] = []
        self._stop = asyncio.Event()
        self._garbage = self._bad_bodies = 0
        self._later: set[asyncio.Task[None]] = set()
        limits = {**venue.limits, **options.limits}
        instruments = [self._instrument(venue, name, index) for index, name in enumerate(self._names(venue))]
        rate = BASE_RATE if self.fast else options.rate
        self.market = Market(options.seed, instruments, rate, options.depth, venue.intervals, self.t, options.near)
        self.venue = venue(self, limits, options.credentials)

    def _names(self, venue: type[Venue]) -> list[str]:
        asked = self.options.tickers or venue.tickers
        if len(asked) == 1 and asked[0].isdigit():
            return [venue.invented(number) for number in range(int(asked[0]))]
        return list(asked)

    @staticmethod
    def _instrument(venue: type[Venue], name: str, index: int) -> Instrument:
        """`NAME` or `NAME:BUSY`; without a number the first ticker is busy and the fourth nearly silent."""
        ticker, _, busy = name.partition(":")
        return venue.instrument(ticker, float(busy) if busy else (1.0, 0.5, 0.2, 0.05)[index % 4])

    # What the venue files use.

    @property
    def now_s(self) -> float:
        """Seconds of the machine's steady clock since this exchange was made, for limits and heartbeats."""
        return time.monotonic() - self._made_s

    def clock_us(self) -> int:
        """The exchange's clock now, for answers to requests."""
        if self.virtual:
            return self.t
        if self._origin_s is None or self.options.epoch_us is None:
            return time.time_ns() // 1000 + self.skew_us
        return self._stamp(self._due_us())

    def told_us(self, t: int) -> int:
        """When clients hear what is due at `t`: later where the machine is slow; `t` itself in a run that is repeatable."""
        return t if self.options.epoch_us is not None else max(t, self.clock_us())

    def send(self, session: Session, text: str) -> None:
        """Send one message to one client, in order with everything published before."""
        self._put(session, frame_of(text.encode()))

    def ping(self, session: Session, payload: bytes) -> None:
        """Send a ping frame and remember that its answer is due."""
        session.pings[payload] = self.now_s
        self._put(session, frame_of(payload, PING))

    def subscribe(self, session: Session, stream: str, form: Hashable) -> None:
        self.unsubscribe(session, stream)
        session.subs[stream] = form
        self.streams.setdefault(stream, {}).setdefault(form, {})[session] = None

    def unsubscribe(self, session: Session, stream: str) -> None:
        if stream not in session.subs:
            return
        form = session.subs.pop(stream)
        self.faults.left(stream)
        forms = self.streams[stream]
        del forms[form][session]
        if not forms[form]:
            del forms[form]
        if not forms:
            del self.streams[stream]
        session.swapped.pop(stream, None)

    def publish(self, stream: str, ticker: str, make: Callable[[Any], str], first: int = 0, last: int = 0) -> None:
        """Send a message of a stream to all who want it; `make(form)` is called once per form that is wanted.

        `first` and `last` are the ids that the message carries; they say in the ledger what a fault has hit.
        """
        forms = self.streams.get(stream)
        if not forms:
            return
        for form, sessions in forms.items():
            text = make(form)
            frame = frame_of(text.encode())
            if self.faults.frame or self.faults.silent or self._lag_until_s:
                self._publish_faulty(stream, ticker, text, frame, list(sessions), first, last)
                continue
            for session in sessions:
                if session.swapped:
                    self._put_swapped(session, stream, frame)
                else:
                    self._put(session, frame)

    async def snapshot(self, book: Book, agent: str) -> tuple[int, int, list[Level], list[Level]]:
        """The whole book for a request: update id, engine id, bids, asks; or one that a fault has made unfit."""
        ticker = book.instrument.ticker
        if (fault := self.faults.for_request("stale_snapshot", ticker=ticker, agent=agent)) and book.history:
            update_id, engine_id, bids, asks = book.history[0]
            self._fault_line(fault, ticker=ticker, last=update_id)
            return update_id, engine_id, list(bids.items()), list(asks.items())
        if fault := self.faults.for_request("future_snapshot", ticker=ticker, agent=agent):
            half_s = fault.number("ms") / 2000
            self._lag_until_s[ticker] = max(self._lag_until_s.get(ticker, 0.0), self.now_s + 2 * half_s)
            await asyncio.sleep(half_s)
            self._fault_line(fault, ticker=ticker, last=book.update_id)
        return book.update_id, book.engine_id, book.levels(BID), book.levels(ASK)

    def refused(self, session: Session, stream: str, ticker: str) -> Fault | None:
        """The fault that refuses this subscription, if one does."""
        fault = self.faults.for_request("refuse", stream, ticker, session.id, session.agent)
        if fault:
            self._fault_line(fault, stream=stream, ticker=ticker, conns=[session.id])
        return fault

    def ignored(self, session: Session, streams: Mapping[str, str]) -> bool:
        """Whether a fault leaves a request for any of these streams (with their tickers) without an answer."""
        for stream, ticker in streams.items():
            if fault := self.faults.for_request("ignore", stream, ticker, session.id, session.agent):
                self._fault_line(fault, stream=stream, ticker=ticker, conns=[session.id])
                return True
        return False

    def heartbeats_off(self, session: Session) -> bool:
        """Whether a fault keeps the server from sending and answering heartbeats."""
        return self.faults.window("no_heartbeat_answer", session.id, session.agent) is not None

    def violation(self, name: str, session: Session | None = None) -> None:
        """Count a limit that a client went beyond."""
        self.violations[name] += 1
        self.ledger.record("violation", name=name, t=self.clock_us(), conn=session.id if session else 0)

    def hang_up(self, session: Session, reason: str, code: int = 1008) -> None:
        """Close a connection in an orderly way, after everything that is still to be sent."""
        if not session.closed_reason:
            session.closed_reason = reason
            self._flush_session(session)
            self._run_later(self._close(session, code, reason))

    def reset(self, session: Session, reason: str) -> None:
        """Reset the TCP connection without a word."""
        session.closed_reason = session.closed_reason or reason
        sock = session.transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):  # the client may be quicker and already gone
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        session.transport.abort()

    # Sending, and breaking what is sent.

    def _put(self, session: Session, frame: bytes | list[bytes]) -> None:
        if session.closed_reason or self.now_s < session.frozen_until_s:
            return
        session.out.append(frame)
        self._dirty[session] = None

    def _put_swapped(self, session: Session, stream: str, frame: bytes) -> None:
        self._put(session, frame)
        earlier = session.swapped.pop(stream, None)
        if earlier is not None:
            self._put(session, earlier)

    def _publish_faulty(
        self, stream: str, ticker: str, text: str, frame: bytes, sessions: list[Session], first: int, last: int
    ) -> None:
        """The slow way of `publish`: every fault that wants this message is applied to the sessions that it names."""
        silent = self.faults.silenced(stream, ticker)
        hearing = [s for s in sessions if not any(f.wants_conn(s.id, s.agent) for f in silent)]
        if not hearing:
            return
        hits = self.faults.for_message(stream, ticker, [(s.id, s.agent) for s in hearing])
        for fault in hits:
            conns = [s.id for s in hearing if fault.wants_conn(s.id, s.agent)]
            self._fault_line(fault, stream=stream, ticker=ticker, first=first, last=last, conns=conns)
        for session in hearing:
            mine = [f for f in hits if f.wants_conn(session.id, session.agent)]
            if ticker in self._lag_until_s and len(session.held) < HELD_MAX:
                if not any(f.name in ("drop", "gap") for f in mine):
                    session.held.append((ticker, frame))
                continue
            self._deliver(session, stream, ticker, text, frame, mine)

    def _deliver(self, session: Session, stream: str, ticker: str, text: str, frame: bytes, hits: list[Fault]) -> None:
        names = {fault.name: fault for fault in hits}
        if "drop" in names or "gap" in names:
            return
        if fault := names.get("garbage"):
            for bad in self._nonsense(fault.text("kind"), session, ticker, text):
                self._put(session, bad)
        if fault := names.get("truncate"):
            if fault.text("mode") == "wire":
                self._put(session, frame[: len(frame) // 2])
                self._flush_session(session)
                self._run_later(self._reset_later(session, "fault truncate"))
                return
            frame = frame_of(text.encode()[: len(text) // 2])
        if fault := names.get("split"):
            self._split(session, text.encode(), frame, fault)
            return
        if "reorder" in names and stream not in session.swapped:
            session.swapped[stream] = frame
            return
        self._put_swapped(session, stream, frame)
        if "duplicate" in names:
            self._put(session, frame)

    def _split(self, session: Session, payload: bytes, frame: bytes, fault: Fault) -> None:
        parts = max(2, min(int(fault.number("parts")), len(payload)))
        if fault.text("mode") == "fragments":
            step = -(-len(payload) // parts)
            pieces = [payload[at : at + step] for at in range(0, len(payload), step)]
            for index, piece in enumerate(pieces):
                self._put(session, frame_of(piece, TEXT if index == 0 else 0, index == len(pieces) - 1))
            return
        step = -(-len(frame) // parts)
        self._put(session, [frame[at : at + step] for at in range(0, len(frame), step)])

    async def _send_pieces(self, session: Session, pieces: list[bytes]) -> None:
        for piece in pieces:
            if session.transport.is_closing():
                break
            session.transport.write(piece)
            await asyncio.sleep(0.005)  # long enough for the kernel to send each piece as a packet of its own
        session.sent += 1
        session.blocked = False
        self._dirty[session] = None

    async def _reset_later(self, session: Session, reason: str) -> None:
        await asyncio.sleep(0.02)  # a reset overtakes bytes that have not left yet
        self.reset(session, reason)

    def _nonsense(self, kind: str, session: Session, ticker: str, text: str) -> Iterator[bytes]:
        """Frames that no client should believe, made from a true one."""
        rng: Random = self.faults.rng
        if kind == "any":
            kind = GARBAGE[self._garbage % len(GARBAGE)]
            self._garbage += 1
        if kind == "bytes":
            yield frame_of(rng.randbytes(rng.randint(1, 200)), BINARY)
        elif kind == "utf8":
            data = text.encode()
            at = rng.randrange(1, len(data))
            yield frame_of(data[:at] + b"\xff\xc3\x28" + data[at:])
        elif kind == "unknown_symbol":
            yield frame_of(text.replace(ticker, "NO" + ticker).replace(ticker.lower(), "no" + ticker.lower()).encode())
        elif kind == "unknown_event":
            yield frame_of(self.venue.unknown_event(session, self.clock_us()).encode())
        else:
            yield frame_of(
                json.dumps(_mangled(json.loads(text), kind), separators=(",", ":")).replace('"1e999"', "1e999").encode()
            )

    def _fault_line(self, fault: Fault, **what: Any) -> None:
        self.ledger.record("fault", name=fault.name, t=self.clock_us(), keys=fault.keys, **what)

    def _flush_session(self, session: Session) -> None:
        if session.blocked or not session.out:
            return
        if self.now_s < session.frozen_until_s or session.transport.is_closing():
            session.out.clear()
            return
        out, session.out = session.out, []
        pieces = next((index for index, frame in enumerate(out) if isinstance(frame, list)), None)
        if pieces is not None:
            session.blocked = True
            session.out = out[pieces + 1 :]
            self._run_later(self._send_pieces(session, [part for part in out[pieces] if isinstance(part, bytes)]))
            out = out[:pieces]
        session.sent += len(out)
        self.counts["frames_sent"] += len(out)
        session.transport.write(b"".join(frame for frame in out if isinstance(frame, bytes)))
        if session.transport.get_write_buffer_size() > BUFFER_MAX:
            self.violation("client_too_slow", session)
            self.reset(session, "the client does not read")

    def flush(self) -> None:
        """Hand everything that was put to the sockets."""
        dirty, self._dirty = self._dirty, {}
        for session in dirty:
            self._flush_session(session)

    # Faults that are due, heartbeats, lags.

    def _tick_faults(self, _t: int = 0) -> None:
        """Fire what is due by market time, so that a run that follows no clock has its faults at the same places too."""
        for fault in self.faults.tick(self._due_us() / SECOND_US):
            if fault.group == "session":
                self._hit_sessions(fault)
            elif fault.group == "window":
                self.faults.fire(fault)
                self._fault_line(fault)
            else:
                self._hit_market(fault)
        skew = self.faults.window("clock_skew")
        self.skew_us = int(skew.number("ms") * 1000) if skew else 0

    def _keep(self) -> None:
        """Look after lagging streams and after the heartbeats and limits of every session."""
        now_s = self.now_s
        for ticker, until_s in list(self._lag_until_s.items()):
            if now_s >= until_s:
                self._end_lag(ticker)
        for session in list(self.sessions.values()):
            if not session.closed_reason:
                self.venue.keep(session, now_s)

    def _end_lag(self, ticker: str) -> None:
        del self._lag_until_s[ticker]
        for session in self.sessions.values():
            for _, frame in (held for held in session.held if held[0] == ticker):
                self._put(session, frame)
            session.held = [held for held in session.held if held[0] != ticker]

    def _hit_sessions(self, fault: Fault) -> None:
        hit = [s for s in self.sessions.values() if not s.closed_reason and fault.wants_conn(s.id, s.agent)]
        hit = [s for s in hit if any(fault.text("stream") in stream for stream in s.subs) or not fault.text("stream")]
        if not hit:
            return  # the hit stays due until there is somebody to hit
        self.faults.fire(fault)
        self._fault_line(fault, conns=[s.id for s in hit])
        for session in hit:
            if fault.name == "disconnect":
                self.reset(session, "fault disconnect")
            elif fault.name == "close":
                self.hang_up(session, "fault close", int(fault.number("code")))
            elif fault.name == "lifetime":
                self.hang_up(session, "fault lifetime", 1001)
            elif fault.name == "shutdown":
                self.send(session, self.venue.notice(session, self.clock_us()))
                self._run_later(self._shut_down(session, fault.number("after_s")))
            elif fault.name == "freeze":
                self._flush_session(session)
                session.frozen_until_s = self.now_s + fault.number("seconds", math.inf)
            else:
                self.venue.expire(session)

    async def _shut_down(self, session: Session, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.hang_up(session, "fault shutdown", 1001)

    def _hit_market(self, fault: Fault) -> None:
        self.faults.fire(fault)
        ticker = fault.text("ticker") or next(iter(self.market.books))
        t = self._stamp(self._due_us())
        if fault.name == "listing":
            self.halted.pop(ticker, None)
            if self.market.reopen(ticker, self._due_us()):
                self.venue.listed(self.market.books[ticker], t)
            elif ticker not in self.market.books:
                self.market.open(self._instrument(type(self.venue), ticker, 0), self._due_us(), t)
                book = self.market.books[ticker]
                self.venue.listed(book, t)
                self.ledger.record("listing", ticker=ticker, t=t, instrument=self._described(book))
        elif ticker in self.market.books and fault.name == "renumber":
            self.venue.renumber(self.market.books[ticker])
        elif ticker in self.market.books and fault.name == "snapshot":
            self.venue.resnapshot(self.market.books[ticker], bool(fault.number("anew")))
        elif ticker in self.market.books and fault.name == "revise":
            self.venue.revise(self.market.books[ticker], t)
        elif fault.name == "tick_size":
            self.finer[ticker] += 1
        elif fault.name == "delist" and ticker in self.market.books:
            book = self.market.books[ticker]
            self.venue.delisted(book, t)
            self.market.close(ticker)
            if fault.text("mode") == "halted":
                self.halted[ticker] = book.instrument
        elif ticker in self.market.books:
            book = self.market.books[ticker]
            self.venue.on_action(book, self.market.cross(ticker, t))
            due = self._due_us() + int(fault.number("ms") * 1000)
            heappush(self._timers, (due, next(self._order), 0, lambda t: self._uncross(book, t)))
        self._fault_line(fault, ticker=ticker)

    def _uncross(self, book: Book, t: int) -> None:
        if book.instrument.ticker not in self.market.books:
            return  # it was delisted meanwhile
        action = self.market.uncross(book.instrument.ticker, t)
        if action.changes:
            self.venue.on_action(book, action)

    # Time. The market has a time of its own, in microseconds since its start. Paced, it follows the machine's clock. At
    # full speed actions happen as fast as they can while timers follow the machine's clock; with a fixed epoch as well
    # nothing follows any clock, and the whole run depends on the seed alone.

    def _due_us(self) -> int:
        """Market time that has been reached."""
        if self._origin_s is None:
            return 0
        return self._virtual_us if self.virtual else int((time.monotonic() - self._origin_s) * SECOND_US)

    def _stamp(self, due_us: int) -> int:
        """The exchange's time of something that is due at a market time."""
        return self._epoch_us + due_us + self.skew_us

    def _timer_is_next(self) -> bool:
        if self._paused_us is not None:
            return True
        return self._timers[0][0] <= (self._due_us() if self.fast and not self.virtual else self.market.next_due)

    def _step(self, horizon_us: float) -> bool:
        """Let the next thing happen, a timer or an action of the market, if it is due at or before the horizon."""
        if self._timer_is_next():
            due, order, period, call = self._timers[0]
            if due > horizon_us:
                return False
            heappop(self._timers)
            if period:
                heappush(self._timers, (due + period, order, period, call))
            self._virtual_us, self.t = due, self._stamp(due)
            call(self.t)
            return True
        due = self.market.next_due
        if self.market.actions >= self.options.events or (due > horizon_us and (self.virtual or not self.fast)):
            return False
        self._virtual_us = due
        self.t = self._stamp(self._due_us() if self.fast and not self.virtual else due)
        self.venue.on_action(*self.market.step(self.t))
        return True

    def _remember(self, _t: int) -> None:
        for book in self.market.books.values():
            book.remember()

    def _horizon_us(self) -> float:
        if not self.virtual:
            return min(self._due_us(), self.options.seconds * SECOND_US)
        return -1.0 if self._paused_us is not None else self.options.seconds * SECOND_US

    async def _drive(self) -> None:
        """Until the end: let everything happen that is due, send it, and look after the sessions."""
        keep_s = flush_s = -math.inf
        over = False
        while not (over or self._stop.is_set() or self.market.actions >= self.options.events):
            horizon_us = self._horizon_us()
            idle = False
            for _ in range(STEPS_MAX):
                if not self._step(horizon_us):
                    idle = True
                    break
            self.flush()
            now_s = self.now_s
            if now_s - keep_s >= KEEP_S:
                keep_s = now_s
                self._keep()
                self.flush()
            if now_s - flush_s >= FLUSH_S / 2:
                flush_s = now_s
                self.ledger.flush()
            over = (idle or (self.fast and not self.virtual)) and horizon_us >= self.options.seconds * SECOND_US
            if not over:
                await self._wait(idle)
        if over:
            self.t = self._stamp(int(self.options.seconds * SECOND_US))

    async def _wait(self, idle: bool) -> None:
        """Let the sockets have their turn until something is due; at full speed also wait for the slowest client."""
        due_us = self._timers[0][0] if self._timer_is_next() else self.market.next_due
        wait_s = KEEP_S if self.virtual else (due_us - self._due_us()) / SECOND_US
        await asyncio.sleep(min(max(wait_s, 0.0), KEEP_S) if idle else 0)
        while self.fast and any(s.transport.get_write_buffer_size() > BUFFER_FAST for s in self.sessions.values()):
            await asyncio.sleep(POLL_S)
            if self._stop.is_set():
                return

    def pause(self) -> None:
        """Let nothing more happen in the market; what is waiting for its timer is still published."""
        if self._paused_us is None:
            self._paused_us = self._due_us()

    def resume(self) -> None:
        if self._paused_us is not None:
            self.market.delay(0 if self.virtual else self._due_us() - self._paused_us)
            self._paused_us = None

    # Connections.

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        agent = http.headers.get("User-Agent", "")
        request = Request(http.method, http.path, http.query, http.headers, http.remote or "", agent)
        if http.path.startswith("/_sim/"):
            return await self._control(http)
        if http.headers.get("Upgrade", "").lower() == "websocket":
            return await self._websocket(http, request)
        self.paths[request.path] += 1
        self.counts["requests"] += 1
        reply = await self._answer(request)
        self.counts[f"http_{reply.status}"] += 1
        if "Retry-After" in reply.headers:
            until_s = self.now_s + float(reply.headers["Retry-After"])
            self.retry_until_s[request.ip] = max(self.retry_until_s.get(request.ip, 0.0), until_s)
        return web.Response(
            text=reply.body, status=reply.status, headers=reply.headers, content_type="application/json"
        )

    async def _answer(self, request: Request) -> Reply:
        if self.now_s < self.retry_until_s.get(request.ip, 0.0):
            self.counts["requests_before_retry_after"] += 1
        if fault := self.faults.window("ban", agent=request.agent):
            left_s = max(1, math.ceil(min(fault.until_s - self.faults.now_s, 86_400)))
            return self.venue.ban_reply(int(fault.number("status")), left_s)
        if fault := self.faults.for_request("slow_rest", stream=request.path, agent=request.agent):
            self._fault_line(fault, stream=request.path)
            await asyncio.sleep(fault.number("ms") / 1000)
        if fault := self.faults.for_request("rest_error", stream=request.path, agent=request.agent):
            self._fault_line(fault, stream=request.path)
            return Reply('"simulated failure"', int(fault.number("status")))
        reply = await self.venue.http(request)
        wanted = f"{request.path}?{'&'.join(f'{key}={value}' for key, value in request.query.items())}"
        if reply.status == 200 and (fault := self.faults.for_request("bad_body", stream=wanted, agent=request.agent)):
            self._fault_line(fault, stream=wanted)
            return Reply(self._spoilt(reply.body, fault.text("kind")))
        return reply

    def _spoilt(self, body: str, kind: str) -> str:
        """An answer that no client should believe, made from a true one."""
        if kind == "any":
            kind = BAD_BODIES[self._bad_bodies % len(BAD_BODIES)]
            self._bad_bodies += 1
        if kind == "half":
            return body[: len(body) // 2]
        if kind == "text":
            return "<html><body>upstream is unwell</body></html>"
        value = json.loads(body)
        value = _emptied(value) if kind == "empty" else _mangled(value, kind)
        return json.dumps(value, separators=(",", ":")).replace('"1e999"', "1e999")

    async def _websocket(self, http: web.Request, request: Request) -> web.StreamResponse:
        self.counts["connects"] += 1
        if self._ending:
            return web.Response(status=503)
        if self.now_s < self.reconnect_until_s.get(request.ip, 0.0):
            self.counts["connects_before_retry_after"] += 1
        if refusal := self.venue.refuse_ws(request):
            self.counts["connects_refused"] += 1
            if "Retry-After" in refusal.headers:
                self.reconnect_until_s[request.ip] = self.now_s + float(refusal.headers["Retry-After"])
            return web.Response(
                text=refusal.body, status=refusal.status, headers=refusal.headers, content_type="application/json"
            )
        ws = web.WebSocketResponse(
            timeout=CLOSE_S, autoping=False, autoclose=False, compress=False, max_msg_size=MESSAGE_MAX, decode_text=True
        )
        await ws.prepare(http)
        transport = http.transport
        if not isinstance(transport, asyncio.Transport):
            return ws  # the client was gone before the handshake ended
        self._numbers += 1
        session = Session(self._numbers, ws, transport, request, self.now_s)
        self.sessions[session.id] = session
        self.ledger.record(
            "conn", event="open", conn=session.id, t=self.clock_us(), path=http.path_qs, agent=request.agent
        )
        try:
            self.venue.opened(session)
            self.flush()
            await self._read(session)
        finally:
            self._forget(session)
        return ws

    async def _read(self, session: Session) -> None:
        while True:
            message = await session.ws.receive()
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                break
            session.received[message.type.name.lower()] += 1
            self.counts["client_messages"] += 1
            if session.closed_reason:
                continue
            if not self.venue.allows(session):
                self.violation("client_messages", session)
                self.hang_up(session, "too many messages")
            elif message.type is WSMsgType.PING:
                if not self.heartbeats_off(session):
                    self._put(session, frame_of(bytes(message.data), PONG))
            elif message.type is WSMsgType.PONG:
                session.pings.pop(bytes(message.data), None)
            else:
                text = message.data if isinstance(message.data, str) else bytes(message.data).decode("utf-8", "replace")
                self.venue.on_text(session, text)
            self.flush()
        if not session.closed_reason:
            session.closed_reason = f"the client closed ({session.ws.close_code})"
            session.out.clear()
            await session.ws.close(code=1000)

    def _forget(self, session: Session) -> None:
        for stream in list(session.subs):
            self.unsubscribe(session, stream)
        self.sessions.pop(session.id, None)
        self._dirty.pop(session, None)
        self.ledger.record(
            "conn",
            event="close",
            conn=session.id,
            t=self.clock_us(),
            reason=session.closed_reason,
            code=session.ws.close_code,
            sent=session.sent,
            received=dict(session.received),
        )

    async def _close(self, session: Session, code: int, reason: str) -> None:
        await session.ws.close(code=code, message=reason.encode()[:100])

    def _run_later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    # Steering by HTTP.

    async def _control(self, http: web.Request) -> web.Response:
        path = http.path.removeprefix("/_sim/")
        if path == "state":
            return web.json_response(self.state())
        if http.method != "POST" or path not in ("fault", "pause", "resume"):
            return web.json_response({"error": "GET /_sim/state, POST /_sim/fault|pause|resume"}, status=404)
        if path == "fault":
            try:
                body = await http.json()
                self.faults.add(parse(body))
                self._tick_faults()
            except (ValueError, AttributeError) as error:
                return web.json_response({"error": str(error)}, status=400)
            self.flush()
        elif path == "pause":
            self.pause()
        else:
            self.resume()
        return web.json_response({"ok": True})

    def state(self) -> dict[str, Any]:
        """Everything that is counted, for tests and for the curious."""
        return {
            "exchange": self.venue.name,
            "seed": self.options.seed,
            "seconds": round(self.now_s, 3),
            "paused": self._paused_us is not None,
            "actions": self.market.actions,
            "counts": dict(self.counts),
            "paths": dict(self.paths),
            "violations": dict(self.violations),
            "requests_before_retry_after": self.counts["requests_before_retry_after"],
            "http_429": self.counts["http_429"],
            "http_418": self.counts["http_418"],
            "faults": [{"name": f.name, **f.keys, "fired": f.fired} for f in self.faults.all],
            "ledger": self.ledger.totals(),
            "update_ids": {ticker: book.update_id for ticker, book in self.market.books.items()},
            "connections": [
                {
                    "conn": s.id,
                    "path": s.request.path,
                    "agent": s.agent,
                    "subscriptions": sorted(s.subs),
                    "received": dict(s.received),
                    "sent": s.sent,
                    "seconds": round(self.now_s - s.opened_s, 3),
                }
                for s in self.sessions.values()
            ],
        }

    # Life.

    def _described(self, book: Book) -> dict[str, object]:
        instrument = book.instrument
        return {
            "base": instrument.base,
            "quote": instrument.quote,
            "kind": instrument.kind,
            "busy": instrument.busy,
            "book": self.venue.first_book(book),
        }

    async def run(self, ready: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Serve until a signal, `--seconds` or `--events` ends it; returns the summary."""
        app = web.Application(client_max_size=MESSAGE_MAX)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=CLOSE_S)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.options.port, ssl_context=self.options.tls, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise CannotListen(f"cannot listen on 127.0.0.1:{self.options.port}: {error.strerror}") from error
        try:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            self._start()
            ready(self._ready_line(runner.addresses[0][1]))
            await self._first_second()
            await self._drive()
            self.venue.finish(self.t)
            return await self._end()
        finally:
            await runner.cleanup()
            self.ledger.close()

    def _ready_line(self, port: int) -> dict[str, Any]:
        s = "s" if self.options.tls else ""
        return {
            "ready": True,
            "exchange": self.venue.name,
            "port": port,
            "ws_url": f"ws{s}://127.0.0.1:{port}",
            "rest_url": f"http{s}://127.0.0.1:{port}",
            "tickers": list(self.market.books),
        }

    def _start(self) -> None:
        timers = [(int(KEEP_S * SECOND_US), self._tick_faults), *self.venue.timers(), (SECOND_US, self._remember)]
        self._timers = [(period, next(self._order), period, call) for period, call in timers]
        heapify(self._timers)
        self.ledger.record(
            "start",
            exchange=self.venue.name,
            seed=self.options.seed,
            t=self.t,
            rate="max" if self.fast else self.options.rate,
            faults=list(self.options.faults),
            tickers={ticker: self._described(book) for ticker, book in self.market.books.items()},
        )
        self.ledger.flush()
        if self.options.hold:
            self._paused_us = 0

    async def _first_second(self) -> None:
        wait_s = 0.0 if self.options.epoch_us is not None else (self._epoch_us - time.time_ns() // 1000) / SECOND_US
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait_s)
        self._origin_s = time.monotonic() + min(wait_s, 0.0)

    async def _end(self) -> dict[str, Any]:
        self._ending = True
        for ticker in list(self._lag_until_s):
            self._end_lag(ticker)
        for session in self.sessions.values():
            for frame in session.swapped.values():  # there will be no next message to change places with
                self._put(session, frame)
            session.swapped.clear()
        self.flush()
        while any(session.blocked for session in self.sessions.values()) and self._later:
            await asyncio.wait(set(self._later), timeout=CLOSE_S, return_when=asyncio.FIRST_COMPLETED)
            self.flush()
        for session in list(self.sessions.values()):
            self.hang_up(session, "the exchange ends", 1001)
        if self._later:
            await asyncio.wait(set(self._later), timeout=2 * CLOSE_S)
        summary = {
            "done": True,
            "exchange": self.venue.name,
            "seed": self.options.seed,
            "seconds": round(self.now_s, 3),
            "actions": self.market.actions,
            "counts": dict(self.counts),
            "violations": dict(self.violations),
            "faults": dict(Counter({f.name: 0 for f in self.faults.all}) + Counter(self._fired())),
            "totals": self.ledger.totals(),
        }
        books = {ticker: self.venue.first_book(book) for ticker, book in self.market.books.items()}
        self.ledger.record("end", t=self.t, seconds=summary["seconds"], totals=summary["totals"], books=books)
        self.ledger.close()
        return summary

    def _fired(self) -> dict[str, int]:
        fired: Counter[str] = Counter()
        for fault in self.faults.all:
            fired[fault.name] += fault.fired
        return dict(fired)


def _emptied(value: Any) -> Any:
    """A copy of an answer in which every list is empty."""
    if isinstance(value, dict):
        return {key: _emptied(item) for key, item in value.items()}
    return [] if isinstance(value, list) else value


def _mangled(value: Any, kind: str) -> Any:
    """A copy of a message with every price, quantity or id spoilt in the named way."""
    if isinstance(value, dict):
        return {key: _mangled(item, kind) for key, item in value.items()}
    if isinstance(value, list):
        return [_mangled(item, kind) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    number = isinstance(value, int | float)
    if not number:
        with contextlib.suppress(ValueError):
            float(value)
            number = True
    if not number:
        return value
    if kind == "nan":
        return math.nan if isinstance(value, int | float) else "NaN"
    if kind == "absurd":
        return "1e999"
    return {"not": "a number"}


__all__ = [
    "KINDS",
    "Credits",
    "Exchange",
    "Options",
    "PolledVenue",
    "Reply",
    "Request",
    "Session",
    "Venue",
    "Window",
    "venues",
]
