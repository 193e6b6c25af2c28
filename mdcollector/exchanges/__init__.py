"""The exchange contract: what a venue's file gives, and how it is found (by the names in its file's `VENUES`).

A venue is pure translation. `decode` turns a frame into calls of the emitter, synchronously and without I/O; what it
needs from outside (a message to send, a URL to fetch) it appends to `wants`, and the connector carries it out. So a
venue runs the same on a live connection and on a recording. Adding one touches no other file.
"""

import importlib
import math
import pkgutil
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, ClassVar, TypeVar

import msgspec
import numpy as np

from mdcollector.continuity import (
    HOLES_MAX,
    LIVE,
    REPAIR_IDS_MAX,
    TRADE_IDS_KEPT,
    BookSync,
    FollowRule,
    TradeIds,
    TradeSync,
)
from mdcollector.emit import Columns, Emit
from mdcollector.errors import ConfigError, FrameError
from mdcollector.records import GAPS, INSTRUMENTS, UNKNOWN, Exchange

# Types for wire structs: what is outside is refused while decoding, in the C core.
Id = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Time = Annotated[int, msgspec.Meta(ge=0, le=4_102_444_800_000_000)]  # up to the year 2100, in ms or us
Quantity = Annotated[float, msgspec.Meta(ge=0)]

ROUTE_LEAD = 10  # bytes in front of a stream's name that are part of its route: a reply may name it at the same place
ROUTES_MAX = 4096  # streams whose decoder is remembered by name; the frames of more are looked at twice
REASON_CHARS_MAX = 200  # kept of a reason that a venue gives
NOTES_MAX = 500  # kept for status
TRADE_IDS_LEFT_MAX = 100  # instruments that were left and whose trade ids are remembered; options expire each day
PAGES_MAX = 100  # of the list of instruments; the longest known has 10
NAMES_SHOWN_MAX = 20  # in the text of an error
FIELDS_MAX, ITEMS_LOOKED_AT = 1000, 3  # of the first frame of a stream, when it is searched for new fields
_Body = TypeVar("_Body")


class Limits(msgspec.Struct, frozen=True):
    """What a venue allows. Every number stands in the venue's file with its source and date."""

    streams_per_connection: int
    messages_per_s: float  # client messages on one connection; as many may go at once before that
    connects: tuple[int, float]  # new connections per so many seconds, per IP
    weight: tuple[int, float]  # request weight per so many seconds, per IP
    lifetime_s: float  # the venue ends a connection after this long; 0 = never
    stale_s: float = 60.0  # a connection without data for this long is given up
    silent_s: float = 60.0  # a stream without data for this long is checked over REST
    messages_per_ip: tuple[int, float] = (0, 0.0)  # client messages per so many seconds, per IP; (0, 0) = no such limit
    instruments_weight: int = 1  # of one request for a page of the list of instruments
    open_per_ip: int = 0  # connections open at the same time, of this venue; 0 = no such limit is known
    http_is_open: bool = False  # those of requests are among them
    sessions_per_key: int = 0  # connections that are logged in with the same credentials; 0 = no such limit is known


class Stream(msgspec.Struct, frozen=True):
    """One subscription."""

    name: str  # as the venue spells it
    feed: str
    ticker: str
    path: str = ""  # of the connection that carries it, below the WebSocket base; "" = the venue has only one
    also: tuple[str, ...] = ()  # other wanted feeds whose rows this one stream brings


class Carried(msgspec.Struct):
    """What one connection carries, to be remembered over restarts."""

    path: str = ""  # as of its streams
    tickers: list[str] = msgspec.field(default_factory=list)


class Send(msgspec.Struct, frozen=True):
    """Wanted: this text sent on the connection, within its message rate; an urgent one at once."""

    text: str
    urgent: bool = False


class Fetch(msgspec.Struct, frozen=True):
    """Wanted: this path (with query) below the REST base fetched. Of equal keys one is under way at a time."""

    key: str
    path: str
    weight: int
    answer: Callable[[bytes], None] | None = None  # who takes the body; None = the venue's `http`
    failed: Callable[[int, bytes], None] | None = None  # who takes a refusal; None = the venue's `http_failed`
    can_wait: bool = False  # behind all others, and only while a reserve of request weight is left for them


class Reconnect(msgspec.Struct, frozen=True):
    """Wanted: a new connection; `overlap` = open it before the old one is closed (the venue gave notice).

    Where the venue is polled: another host; `overlap` = nothing is known to be missed.
    """

    cause: str
    overlap: bool = False
    wait_s: float = 0.0


class InstrumentInfo(msgspec.Struct, frozen=True):
    """One instrument that the venue lists. NaN and -1 = the venue does not say."""

    ticker: str
    active: bool  # it trades now, so its streams bring data
    kind: str = "spot"  # spot, perpetual, future, option, ...
    base: str = ""
    quote: str = ""
    status: str = ""  # the venue's own word
    tick_size: float = math.nan
    qty_step: float = math.nan
    contract_size: float = (
        math.nan
    )  # what one unit of `qty` is, in the unit that the venue names; 1 where qty is in base units
    listed_time: int = -1  # us since the epoch
    expiry_time: int = -1


Want = Send | Fetch | Reconnect
Decode = Callable[[bytes], None]
Past = Callable[..., Iterable[Columns]]  # feed, names of columns: `Emit.past`, or what of siblings is like it


class Options(msgspec.Struct, kw_only=True):
    """What the configuration says to a venue. Credentials come from the environment or a file, never from here."""

    ws_url: str = ""
    rest_url: str = ""
    book_depth: int = 0  # levels of a snapshot; 0 = the venue's default
    intervals: tuple[str, ...] = ("1m",)
    backfill: int = 1000  # closed candles of each interval that are fetched at the start, where the venue is polled
    poll_s: float = 0.0  # between two requests for the same thing, where the venue is polled; 0 = the venue's default
    late_s: float = 120.0  # an answer of a polled venue that is older is not believed to be the newest; 0 = any age
    book_interval: str = ""  # one of BOOK_INTERVALS; "" = the venue's default
    trade_channel: str = ""  # one of TRADE_CHANNELS; "" = the first
    credentials: Mapping[str, str] = msgspec.field(default_factory=dict)


class StreamState(msgspec.Struct):
    """Proof of one subscription; times in ns since the epoch, 0 = not yet."""

    requested_ns: int = 0
    acknowledged_ns: int = 0
    refused: str = ""
    data_ns: int = 0  # its last rows, where the rings do not show them: see `Venue.watched`
    first_data_ns: int = 0  # since it was requested
    silent_ns: int = 0  # last data before a silence that is proven to be none of the market's; 0 = it delivers
    asked: int = 0  # requests without an acknowledgement
    probe_ns: int = 0  # it is not checked over REST before
    quiet: int = 0  # checks in a row that changed nothing
    suspected_at_ns: int = 0  # REST showed more than it brought
    suspect_ns: int = 0  # it is silent if it has not brought more by then; 0 = not suspected
    hole_us: int = 0  # last data before a hole that is not told to its end; 0 = none
    hole_cause: str = ""
    hole_told: bool = False

    @property
    def is_acknowledged(self) -> bool:
        """The newest request was confirmed."""
        return self.acknowledged_ns > self.requested_ns


class Venue(ABC):
    """One venue as seen by one connector process; lives as long as the process, over all its connections."""

    NAME: ClassVar[str]
    FAMILY: ClassVar[str] = ""  # venues that share the limits of one IP address share this name; "" = NAME
    EXCHANGE: ClassVar[Exchange]
    FEEDS: ClassVar[tuple[str, ...]]
    WS_URL: ClassVar[str]  # "" = everything is polled over REST, in `tick`
    REST_URL: ClassVar[str]
    REST_FALLBACKS: ClassVar[tuple[str, ...]] = ()  # hosts that are asked in turn when one does not answer
    LIMITS: ClassVar[Limits]
    INTERVALS: ClassVar[tuple[str, ...]] = ()  # of candles
    BOOK_DEPTH_MAX: ClassVar[int] = 5000  # levels of a snapshot that may be asked for; 0 = a book always comes whole
    BOOK_INTERVALS: ClassVar[tuple[str, ...]] = ()  # of book messages, where the configuration may choose
    TRADE_CHANNELS: ClassVar[tuple[str, ...]] = ()  # where the configuration may choose, the default first
    HTTP_HEADERS: ClassVar[Mapping[str, str]] = {}  # sent with every request
    PREFIX: ClassVar[bytes] = b""  # how a frame of a stream begins, up to what tells the stream
    DELIMITER: ClassVar[bytes] = b'"'  # what ends that
    # Names in data frames, at any depth: a new one is told; none = all.
    KNOWN_FIELDS: ClassVar[frozenset[str]] = frozenset()
    # HTTP statuses that mean "slow down", beside 429 and 418: wait in s.
    RATE_LIMITED: ClassVar[Mapping[int, float]] = {}
    # Header of an answer that tells, in ms since the epoch, when a limit that was hit is over; "" = the venue has none.
    LIMIT_OVER_HEADER: ClassVar[str] = ""
    TIME_PATH: ClassVar[str] = ""  # REST path that tells the venue's time; "" = it has none
    OVERLAPS: ClassVar[bool] = True  # two connections can deliver at once; else one ends before the next begins
    CREDENTIALS: ClassVar[tuple[str, ...]] = ()  # names of what a credentials file or the environment may give

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        """`open_world`: take every instrument that appears (recordings), else refuse what was not subscribed."""
        self.emit, self.options, self.open_world = emit, options, open_world
        self.streams = list(streams)
        self.path = streams[0].path if streams else ""
        self.proof = {stream.name: StreamState() for stream in streams}
        self._tickers = {stream.name: stream.ticker for stream in streams}
        self._wanted = {stream.ticker for stream in self.streams}
        self._sharing = _sharing(self.streams)
        self._routes: dict[bytes, Decode] = {}
        self.decode = self._router()
        self.wants: deque[Want] = deque()
        self.books: dict[str, BookSync] = {}
        self.trade_syncs: dict[str, TradeSync] = {}
        self.trade_ids: dict[str, TradeIds] = {}  # of a venue whose trades have no counter
        self.overlapping = False  # two connections deliver at the moment
        self._passed_over: dict[str, int] = {}  # ticker -> id of the snapshot with which the newer of them began
        self.notes: dict[str, str] = {}  # what status must show: fallbacks, refused streams
        self._trades_left: dict[str, tuple[int, list[tuple[int, int]]]] = {}
        self._trade_ids_left: dict[str, tuple[list[bytes], int]] = {}
        self._books_left: dict[str, int] = {}
        self._look_back(emit.past)
        self._look_back(partial(emit.taken_over, self._wanted))

    # Planning, before any connection

    @classmethod
    @abstractmethod
    def streams_of(cls, ticker: str, feeds: Sequence[str], options: Options) -> list[Stream]:
        """Subscriptions that bring these feeds of one instrument."""

    @classmethod
    @abstractmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        """REST paths (with query) that list the instruments; each may have further pages (`pages_behind`)."""

    @classmethod
    @abstractmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        """The instruments in an answer to one of `instruments_paths`, or to a page behind it; some name none."""

    @classmethod
    def pages_behind(cls, path: str, body: bytes) -> list[str]:
        """REST paths that this answer to `path` leads to: its next page, or the lists that it names; [] = there are none."""
        return []

    @classmethod
    def snapshot_weight(cls, options: Options) -> int:
        """Request weight that the first snapshot of one book costs; 0 where the stream begins with it."""
        return 0

    @classmethod
    def plan(
        cls,
        tickers: Sequence[str],
        feeds: Sequence[str],
        options: Options,
        before: Sequence[Carried] = (),
        opens: Callable[[int, str], bool] = lambda _number, _path: True,
    ) -> list[list[Stream]]:
        """Streams of each connection: as few as the limits allow, the streams of one instrument and path together.

        What a connection carried `before` stays there while it fits; what is new goes where there is room, or opens a
        connection. `opens` says whether it may open the connection of that number and path; what may not is left out.
        """
        wanted: dict[tuple[str, str], list[Stream]] = {}  # of each path and instrument
        for ticker in tickers:
            for stream in cls.streams_of(ticker, feeds, options):
                wanted.setdefault((stream.path, ticker), []).append(stream)
        for (_, ticker), streams in wanted.items():
            if not cls.fits([], streams):
                names = ", ".join(stream.name for stream in streams[:NAMES_SHOWN_MAX])
                raise ConfigError(f"{ticker}: {len(streams)} streams are more than a connection carries: {names}")
        connections: list[list[Stream]] = [[] for _ in before]
        for streams, carried in zip(connections, before, strict=True):
            for key in ((carried.path, ticker) for ticker in carried.tickers):
                if key in wanted and cls.fits(streams, wanted[key]):
                    streams.extend(wanted.pop(key))
        filling: dict[str, deque[list[Stream]]] = {}  # path -> the connections that may take more
        for (path, _), streams in wanted.items():
            if path not in filling:
                filling[path] = deque(c for c in connections if c and c[0].path == path)
            while filling[path] and not cls.fits(filling[path][0], streams):
                filling[path].popleft()
            if not filling[path]:
                free = (n for n, connection in enumerate(connections) if not connection and opens(n, path))
                number = next(free, len(connections))
                if number == len(connections):
                    if not opens(number, path):
                        continue
                    connections.append([])
                filling[path].append(connections[number])
            filling[path][0].extend(streams)
        return connections

    @classmethod
    def fits(cls, taken: Sequence[Stream], more: Sequence[Stream]) -> bool:
        """Whether a connection with the streams `taken` may carry `more`."""
        return len(taken) + len(more) <= cls.LIMITS.streams_per_connection

    @classmethod
    def server_time(cls, body: bytes) -> tuple[int, int]:
        """The venue's time, in us, in an answer to TIME_PATH, and how coarse it is: 1000 = it is cut off to a ms."""
        raise NotImplementedError(f"{cls.NAME} tells no time")

    @classmethod
    def polled_weight(cls, streams: Sequence[Stream], options: Options) -> float:
        """Request weight a second that the streams of a connection cost for as long as they run; 0 = nothing is polled."""
        return 0.0

    @classmethod
    def not_mergeable(cls, options: Options) -> dict[str, str]:
        """Feeds of which an arbiter cannot make one out of two connections -> why. It refuses them."""
        return {}

    # One connection

    def ws_path(self) -> str:
        """Path (with query) below the WebSocket base."""
        return self.path

    @abstractmethod
    def opened(self) -> None:
        """A connection is open (or polling begins): want what must be sent first."""

    @abstractmethod
    def subscribe(self, names: Sequence[str]) -> None:
        """Want these streams subscribed, on the open connection."""

    @abstractmethod
    def unsubscribe(self, names: Sequence[str]) -> None:
        """Want these streams left."""

    def add(self, streams: Sequence[Stream], *, connected: bool) -> None:
        """Take these streams, too; asked for at once on an open connection, else with all others."""
        now_ns, known = time.time_ns(), self.proof.keys()
        fresh = list({stream.name: stream for stream in streams if stream.name not in known}.values())
        self.streams += streams
        for stream in fresh:  # others were subscribed for another instrument that they serve as well
            before_us = self.emit.last_rcv_us(stream.feed, stream.ticker)  # of an earlier listing, or an earlier life
            self.proof[stream.name] = StreamState(requested_ns=now_ns, hole_us=before_us, hole_cause="listing")
        self._tickers |= {stream.name: stream.ticker for stream in streams}
        self._look_back(partial(self.emit.taken_over, {stream.ticker for stream in streams} - self._wanted))
        self._wanted = {stream.ticker for stream in self.streams}
        self._sharing = _sharing(self.streams)
        self._routes.clear()  # they may lead to the book of an earlier listing
        self._streams_changed((), ())
        if connected and fresh:
            self.subscribe([stream.name for stream in fresh])
        self.resume()
        for ticker in {stream.ticker for stream in streams} & self.trade_syncs.keys():
            if connected and self.trade_syncs[ticker].unproven:
                self.trade_syncs[ticker].want_tail()

    def _look_back(self, past: Past) -> None:
        """Where trades and books stood in the rows that `past` gives."""
        self._trades_left |= _trades_left(past)
        self._trade_ids_left |= _trade_ids_left(past)
        self._books_left |= _books_left(past)

    def remove(self, tickers: Collection[str], *, connected: bool) -> None:
        """Leave all streams of these instruments, drop their books and counters; where they stood is remembered."""
        kept = [stream for stream in self.streams if stream.ticker not in tickers]
        shared = {stream.name for stream in kept}
        names = list(dict.fromkeys(s.name for s in self.streams if s.ticker in tickers and s.name not in shared))
        self.streams = kept
        for name in names:
            self._tickers.pop(name, None)
            self.proof.pop(name, None)
            self.notes.pop(f"refused {name}", None)
        self._wanted = {stream.ticker for stream in self.streams}
        self._sharing = _sharing(self.streams)
        for ticker in tickers:
            if (book := self.books.pop(ticker, None)) is not None:
                for _ in book.flush():
                    continue
                self._books_left[ticker] = book.last_id
            if (sync := self.trade_syncs.pop(ticker, None)) is not None:
                self._trades_left[ticker] = sync.last, []
            if (trade_ids := self.trade_ids.pop(ticker, None)) is not None:
                self._trade_ids_left[ticker] = trade_ids.known, trade_ids.last_time
                if len(self._trade_ids_left) > TRADE_IDS_LEFT_MAX:
                    del self._trade_ids_left[next(iter(self._trade_ids_left))]
        self._streams_changed(names, tickers)
        if connected and names:
            self.unsubscribe(names)

    def _streams_changed(self, left: Collection[str], gone: Collection[str]) -> None:  # noqa: B027 (few need it)
        """`streams` has changed: drop what the venue itself keeps of streams that were left, of instruments gone."""

    def _router(self) -> Decode:
        """`decode`: translate one text message. FrameError or msgspec.DecodeError when it is unusable.

        Hot, hence a closure: the frame's own bytes lead to the decoder of its stream, and all else to `unrouted`.
        """
        routes, at, delimiter, unrouted = self._routes, len(self.PREFIX), self.DELIMITER, self.unrouted
        start = max(0, at - ROUTE_LEAD)

        def decode(frame: bytes) -> None:
            try:
                handle = routes[frame[start : frame.index(delimiter, at)]]
            except (KeyError, ValueError):
                handle = unrouted
            try:
                handle(frame)
            except RecursionError as error:
                raise FrameError("too_deep") from error

        return decode

    @abstractmethod
    def unrouted(self, frame: bytes) -> None:
        """Decode the first frame of a stream, a frame of another form, a reply, a notice, or something unknown."""

    def take_route(self, frame: bytes, handle: Decode) -> None:
        """Decode the first frame of a stream, and from now on every frame that begins as this one does."""
        end = frame.find(self.DELIMITER, len(self.PREFIX))
        if end >= 0 and frame.startswith(self.PREFIX) and len(self._routes) < ROUTES_MAX:
            self._routes[frame[max(0, len(self.PREFIX) - ROUTE_LEAD) : end]] = handle
        handle(frame)
        if self.KNOWN_FIELDS:
            self._look_for_new_fields(frame)

    def watched(self, name: str, handle: Decode) -> Decode:
        """`handle`, the decoder of a stream, as it is; or so that it notes when the stream brings rows.

        It does so where several streams bring rows of one feed and instrument (statistics and marks, intervals of
        candles), since the rings do not tell them apart. Trades, books and best prices have one stream and cost nothing.
        """
        feed = self._sharing.get(name)
        if feed is None:
            return handle
        emit, ring, state = self.emit, self.emit.rings[feed], self.proof[name]

        def noting(frame: bytes) -> None:
            before = ring.next
            handle(frame)
            if ring.next != before:
                state.data_ns = emit.rcv_us * 1000

        return noting

    def last_data_ns(self, stream: Stream) -> int:
        """When this stream brought rows last; 0 = it has not yet."""
        if stream.name in self._sharing:
            return self.proof[stream.name].data_ns
        return self.emit.last_row_ns(stream.feed, stream.ticker)

    def _look_for_new_fields(self, frame: bytes) -> None:
        """Venues add fields without notice: once per stream and connection, names that are not known are told."""
        names, left = set[str](), [msgspec.json.decode(frame)]
        while left and len(names) < FIELDS_MAX:
            value = left.pop()
            if isinstance(value, dict):
                names |= value.keys()
                left += value.values()
            elif isinstance(value, list):
                left += value[:ITEMS_LOOKED_AT]
        for name in sorted(names - self.KNOWN_FIELDS):
            self.drift("field", name, frame)

    def drift(self, what: str, found: str, frame: bytes = b"") -> None:
        """Count something that the venue's documents did not have (a new field, event, or value of an enumeration)."""
        self.emit.counters["protocol_drift"] += 1
        if len(self.notes) < NOTES_MAX:
            self.notes[f"new {what} {found[:REASON_CHARS_MAX]}"] = frame[:REASON_CHARS_MAX].decode(errors="replace")

    def side_of_trade(self, sides: Mapping[str, int], word: str) -> int:
        """The taker's side; a word that is new is told, and the trade is kept without a side."""
        side = sides.get(word, UNKNOWN)
        if not side:
            self.drift("side of a trade", word)
        return side

    def identity(self, frame: bytes) -> bytes | None:
        """What is the same in this frame of market data on two connections that deliver it both; None = no such frame."""
        return frame if frame.startswith(self.PREFIX) else None

    def closing(self) -> list[str]:
        """Texts to send before a connection is closed on purpose."""
        return []

    def disconnected(self, cause: str) -> None:
        """The connection ended."""
        self._routes.clear()  # the next one may speak otherwise: first frames are looked at again
        for book in self.books.values():
            book.disconnected(cause)
        for trades in self.trade_watches:
            trades.disconnected(cause)

    def not_overlapped(self) -> None:
        """The old connection ended before the one that replaces it delivered: what has no ids may have been missed."""
        for trade_ids in self.trade_ids.values():
            trade_ids.doubt("reconnect")

    def overlap_begins(self) -> None:
        """A second connection is opened beside the one that delivers."""
        self.overlapping = True
        self._passed_over.clear()

    def pass_over(self, book: BookSync, snapshot_id: int) -> None:
        """Not take the snapshot of the newer connection, as the older one still continues the book."""
        self._passed_over[book.instrument.ticker] = snapshot_id

    def older_left(self) -> None:
        """The older of two connections is left: what it did not bring up to the newer one's snapshot, nobody does."""
        for ticker, snapshot_id in self._passed_over.items():
            book = self.books.get(ticker)
            if book is not None and book.state is LIVE and book.last_id < snapshot_id:
                book.lost(snapshot_id, "reconnect")

    # Whether an acknowledged stream delivers

    def probe(self, stream: Stream) -> Fetch | None:
        """The REST request that shows whether this silent stream should have delivered; None = the venue has none."""
        return None

    def newest_us(self, stream: Stream, body: bytes) -> int:
        """Time of the newest thing in the answer to `probe` that the stream should have brought; 0 = there is none.

        FrameError or msgspec.DecodeError when the answer is unusable.
        """
        return 0

    # HTTP

    @abstractmethod
    def http(self, url: str, body: bytes) -> None:
        """The body that `url` answered, wanted or recorded."""

    @abstractmethod
    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        """A wanted URL was refused for good (4xx that is no rate limit)."""

    def tick(self, now_ns: int) -> None:  # noqa: B027 (most venues have no duty of their own)
        """Called some times a second while connected."""

    def finish(self) -> Iterator[None]:
        """The end of the input: publish what is still held, a step at a time so that a reader can keep up."""
        for book in self.books.values():
            yield from book.flush()

    # For the venues

    def admit(self, ticker: str) -> None:
        """FrameError unless rows of this instrument are wanted."""
        if not self.open_world and ticker not in self._wanted:
            raise FrameError("unknown_symbol", ticker)

    def book(self, ticker: str, follows: FollowRule) -> BookSync:
        """The live book of an instrument; made when it is first asked for."""
        found = self.books.get(ticker)
        if found is None:
            instrument = self.emit.instrument(ticker)
            found = self.books[ticker] = BookSync(
                self.emit, instrument, follows, self.want_snapshot, self._books_left.get(ticker, -1)
            )
        return found

    def trade_sync(self, ticker: str) -> TradeSync:
        """The trade counter of an instrument; made when it is first asked for."""
        found = self.trade_syncs.get(ticker)
        if found is None:
            instrument = self.emit.instrument(ticker)
            last, holes = self._trades_left.get(ticker, (-1, []))
            found = self.trade_syncs[ticker] = TradeSync(self.emit, instrument, self.want_repair, last, holes)
        return found

    @property
    def trade_watches(self) -> list[TradeSync | TradeIds]:
        """What watches the trades of each instrument, of either kind."""
        return [*self.trade_syncs.values(), *self.trade_ids.values()]

    def trades_by_id(self, ticker: str) -> TradeIds:
        """The trades of an instrument where they have ids but no counter; made when it is first asked for."""
        found = self.trade_ids.get(ticker)
        if found is None:
            known, last_time = self._trade_ids_left.pop(ticker, ((), -1))
            instrument = self.emit.instrument(ticker)
            found = self.trade_ids[ticker] = TradeIds(self.emit, instrument, self.want_recent, known, last_time)
        return found

    def want_recent(self, trades: TradeIds) -> None:
        """The most recent trades of an instrument are wanted, which has no counter to ask for."""
        raise NotImplementedError(f"{self.NAME} has trades without a counter and does not say how to ask for them")

    def take_instruments(self, url: str, body: bytes) -> list[InstrumentInfo]:
        """What one page of the list of instruments says; what is new of the wanted ones becomes rows.

        The venue's `http` hands recorded pages to it, the connector those that it asked for itself.
        """
        listed = self.instruments(body)
        wanted = [info for info in listed if self.open_world or info.ticker in self._wanted]
        most = self.emit.rings[INSTRUMENTS.name].capacity // 2  # rows that no reader can be too slow for
        if len(wanted) > most:
            self.emit.counters["instruments_overflow"] += len(wanted) - most
        for info in wanted[:most]:
            self.tell(info)
        return listed

    def tell(self, info: InstrumentInfo) -> None:
        """A row where this says something new of an instrument; an impossible one is counted, the others are good."""
        try:
            self.emit.instrument_info(
                info.ticker, info.active, info.kind, info.base, info.quote, info.status, tick_size=info.tick_size,
                qty_step=info.qty_step, contract_size=info.contract_size, listed_time=info.listed_time,
                expiry_time=info.expiry_time,
            )  # fmt: skip
        except FrameError as error:
            self.emit.refused_error(error, str(info).encode())

    @abstractmethod
    def want_snapshot(self, book: BookSync) -> None:
        """The book of an instrument needs a snapshot."""

    @abstractmethod
    def want_repair(self, ticker: str, first: int, last: int) -> None:
        """Trades first..last of an instrument were missed."""

    def resume(self) -> None:
        """Take up the trade counters, and the holes in them, that an earlier life left."""
        for ticker in dict.fromkeys(stream.ticker for stream in self.streams if stream.feed == "trades"):
            if ticker in self._trades_left:
                self.trade_sync(ticker)
            if ticker in self._trade_ids_left:
                self.trades_by_id(ticker)

    def check_tails(self) -> None:
        """Ask for the trades that an ended connection, or an earlier life, may have missed and that no later one tells.

        Called once per connection, a while after it opened: by then a busy instrument has shown its hole by itself.
        """
        for sync in self.trade_watches:
            if sync.unproven:
                sync.want_tail()

    def acknowledge(self, names: Sequence[str], now_ns: int) -> None:
        """The venue confirmed these subscriptions."""
        for name in names:
            if (state := self.proof.get(name)) is not None:
                state.acknowledged_ns = now_ns
                if state.refused:
                    state.refused = ""
                    self.notes.pop(f"refused {name}", None)

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """The venue refused these subscriptions; the other ones stay."""
        reason = reason[:REASON_CHARS_MAX]
        for name in names:
            self.emit.counters["stream_refused"] += 1
            self.notes[f"refused {name}"] = reason
            if (state := self.proof.get(name)) is not None:
                state.refused = reason

    def refuse_batch(self, names: Sequence[str], reason: str) -> None:
        """The venue refused these subscriptions as a whole: ask for each half, until the one that it means is alone."""
        half = len(names) // 2
        if half:
            self.emit.counters["subscribe_bisected"] += 1
            self.subscribe(names[:half])
            self.subscribe(names[half:])
        else:
            self.refuse(names, reason)


def _sharing(streams: Iterable[Stream]) -> dict[str, str]:
    """Streams that are not the only one to bring rows of their feed and instrument -> that feed."""
    names: dict[tuple[str, str], set[str]] = {}
    for stream in streams:
        names.setdefault((stream.feed, stream.ticker), set()).add(stream.name)
    return {name: feed for (feed, _), together in names.items() if len(together) > 1 for name in together}


def decode_body(decode: Callable[[bytes], _Body], body: bytes) -> _Body:
    """The body of an answer; one that is nested without end is a FrameError as any other that is unusable."""
    try:
        return decode(body)
    except RecursionError as error:
        raise FrameError("too_deep") from error


def _trades_left(past: Past) -> dict[str, tuple[int, list[tuple[int, int]]]]:
    """Last trade counter, and the holes still open, that an earlier life left, per instrument."""
    left = dict[str, tuple[int, list[tuple[int, int]]]]()
    for tickers, (codes, counters) in past("trades", "trade_seq"):
        for code in np.unique(codes):
            seen = np.unique(counters[(codes == code) & (counters >= 0)])
            if not len(seen):
                continue
            before = np.flatnonzero(np.diff(seen) > 1)
            holes = [(int(seen[i]) + 1, int(seen[i + 1]) - 1) for i in before[-HOLES_MAX:]]
            left[tickers[code]] = int(seen[-1]), [(a, b) for a, b in holes if b - a < REPAIR_IDS_MAX]
    return left


def trade_holes_left(past: Past, known: Mapping[str, Collection[bytes]]) -> dict[str, list[tuple[int, int]]]:
    """Holes of trades that the ledger of an earlier life tells and never called repaired, per instrument.

    For rows without a counter, which cannot show them; `known` ids were fetched before that life ended.
    """
    standing: dict[tuple[str, int, int], bool] = {}
    for tickers, (codes, *columns) in past(GAPS.name, "first_id", "last_id", "feed", "repaired"):
        for code, first, last, feed, repaired in zip(codes.tolist(), *(c.tolist() for c in columns), strict=True):
            if feed == b"trades" and 0 <= first <= last < first + REPAIR_IDS_MAX:
                standing[tickers[code], first, last] = not repaired
    holes: dict[str, list[tuple[int, int]]] = {}
    for (ticker, first, last), open_ in standing.items():
        here = set(known.get(ticker, ()))
        if open_ and not any(b"%d" % seq in here for seq in range(first, last + 1)):
            holes.setdefault(ticker, []).append((first, last))
    return {ticker: sorted(found)[-HOLES_MAX:] for ticker, found in holes.items()}


def _trade_ids_left(past: Past) -> dict[str, tuple[list[bytes], int]]:
    """Newest ids and newest time of the trades without counter that an earlier life left, per instrument."""
    left = dict[str, tuple[list[bytes], int]]()
    for tickers, (codes, counters, ids, times) in past("trades", "trade_seq", "trade_id", "timestamp"):
        for code in np.unique(codes[counters < 0]):
            mine = (codes == code) & (counters < 0)
            left[tickers[code]] = ids[mine][-TRADE_IDS_KEPT:].tolist(), int(times[mine].max())
    return left


def _books_left(past: Past) -> dict[str, int]:
    """Last book id that an earlier life published, per instrument."""
    return {
        tickers[code]: int(ids[codes == code][-1])
        for tickers, (codes, ids) in past("orderbook_l2", "update_id")
        for code in np.unique(codes)
    }


class Selection(msgspec.Struct, frozen=True):
    """Which instruments are meant: patterns of their names (`!pattern` excludes), and filters (none = all)."""

    patterns: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    quotes: tuple[str, ...] = ()

    @property
    def needs_list(self) -> bool:
        """Whether only the venue's list of instruments tells what is meant."""
        return bool(self.kinds or self.bases or self.quotes) or any(set("*?[!") & set(p) for p in self.patterns)

    def chosen(self, listed: Iterable[InstrumentInfo]) -> list[str]:
        """Active instruments that are meant, sorted."""
        tickers = {info.ticker for info in listed if info.active and self._passes(info)}
        wanted = {t for p in self.patterns if not p.startswith("!") for t in tickers if _fits(t, p)}
        return sorted(t for t in wanted if not any(_fits(t, p[1:]) for p in self.patterns if p.startswith("!")))

    def _passes(self, info: InstrumentInfo) -> bool:
        filters = ((self.kinds, info.kind), (self.bases, info.base), (self.quotes, info.quote))
        return all(not names or value.upper() in {n.upper() for n in names} for names, value in filters)

    def check(self, listed: Sequence[InstrumentInfo]) -> None:
        """ConfigError names a filter or pattern that fits no active instrument, or says that nothing is left."""
        active = [info for info in listed if info.active]
        for key, names in (("kinds", self.kinds), ("bases", self.bases), ("quotes", self.quotes)):
            known = sorted({getattr(info, key[:-1]) for info in active})
            for name in names:
                if name.upper() not in {value.upper() for value in known}:
                    shown = ", ".join(known[:NAMES_SHOWN_MAX]) + (", ..." if len(known) > NAMES_SHOWN_MAX else "")
                    raise ConfigError(f"{key}: no active instrument has {key[:-1]} {name!r}; there are {shown}")
        passing = [info.ticker for info in active if self._passes(info)]
        for pattern in self.patterns:
            if not pattern.startswith("!") and not any(_fits(ticker, pattern) for ticker in passing):
                let = f", {len(passing)} pass the filters" if len(passing) < len(active) else ""
                others = [
                    f"; {i.ticker} is {i.status}" for i in listed if i.ticker.upper() == pattern.upper() and i.status
                ]
                raise ConfigError(
                    f"tickers: {pattern!r} names no active instrument of the venue ({len(active)} listed{let})"
                    + "".join(others)
                )
        if not self.chosen(active):
            raise ConfigError(f"tickers: {', '.join(self.patterns)}: what is excluded leaves nothing")


def _fits(ticker: str, pattern: str) -> bool:
    return fnmatchcase(ticker.upper(), pattern.upper())


def _venues_in(module: str) -> dict[str, type[Venue]]:
    venues: tuple[type[Venue], ...] = importlib.import_module(f"{__name__}.{module}").VENUES
    return {venue.NAME: venue for venue in venues}


def venue_names() -> list[str]:
    """Names of all venues, which stand in the files of this folder."""
    return sorted(name for module in pkgutil.iter_modules(__path__) for name in _venues_in(module.name))


def venue_class(name: str) -> type[Venue]:
    """The venue of that name; ConfigError lists the known ones. Its file is called as it is, or as its name begins."""
    for module in pkgutil.iter_modules(__path__):
        may_hold_it = name == module.name or name.startswith(f"{module.name}_")
        if may_hold_it and (found := _venues_in(module.name).get(name)):
            return found
    raise ConfigError(f"exchange {name!r} is not known; known are {', '.join(venue_names())}")
