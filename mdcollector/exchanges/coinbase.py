"""Coinbase Advanced Trade.

Documentation: docs.cdp.coinbase.com, Advanced Trade (websocket-overview, websocket-channels, websocket-rate-limits,
websocket-authentication, the AsyncAPI file), read in 2026; what it leaves open is decided by recorded traffic of
2026-08 and stands where it is used.

Each message of a connection has the next `sequence_num`, over all channels, replies and heartbeats included, from 0. So
one missing number means that any channel may have lost something: every book is given up and everything is subscribed
anew, whose snapshots close the holes. Numbers of two connections have nothing to do with each other, so a connection is
ended before the next one begins. Book messages have no id that outlives a connection: `update_id` is their `event_time`
in us, which rises within a product. Best prices are taken from the book, each change of them; the ticker channel speaks
at trades only (in the recording it never told 47 of 120). `-USDC` products bring the data of the `-USD` product under
its name (field `alias` of the product list), so they are listed as not active and not stored twice.
"""

import base64
import functools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from mdcollector.continuity import BROKEN, LEVELS_MAX, LIVE, NEXT, OLD, BookSync, TradeRow
from mdcollector.emit import PRICE_MAX, QTY_MAX, TIME_MAX_US, TRADES_MAX, Emit
from mdcollector.errors import ConfigError, FrameError
from mdcollector.exchanges import (
    Decode,
    Fetch,
    Id,
    InstrumentInfo,
    Limits,
    Options,
    Reconnect,
    Send,
    Stream,
    Venue,
    decode_body,
)
from mdcollector.records import BUY, SELL, Exchange, Flag

PRODUCTS_PER_MESSAGE = 100  # no limit is documented; bounds what one refusal takes with it
RESUBSCRIBE_EVERY_NS = 1_000_000_000  # what is to be subscribed anew goes together: 6 messages a second at most
RESUBSCRIBE_RETRY_NS = 15_000_000_000  # a snapshot that did not come is asked for again
TRADES_PER_REQUEST = 1000
TRADE_PAGES_MAX = 60  # of one hole: more than TradeSync asks for at once
DAY_S = 86_400  # so far back for trades of before a hole whose begin is not known
CLOCK_AHEAD_S = 60  # the venue's clock may be so far ahead of ours when a time range is asked for
CANDLE_AHEAD_MAX_US = 3_600_000_000  # a candle that starts later than this from now is a broken frame
JWT_VALID_S = 120
RATE_LIMITED_S = 1.0
HEAD_BYTES = 200  # of a frame: channel, time and number stand in front of the events
PRODUCT_BYTES = 400  # of a frame: its first event names its product here
_SEQUENCE = re.compile(rb'"sequence_num"\s*:\s*(\d{1,18})\s*[,}]')
_NOTHING = msgspec.Raw(b"")
_CHANNEL = re.compile(rb'"channel"\s*:\s*"(\w+)"')
_PRODUCT = re.compile(rb'"product_id"\s*:\s*"([^"\\]{1,60})"')
_REST = "/api/v3/brokerage/market/products"
_INTERVAL = "5m"  # the only one of the channel
_LAST, _INVALID, _REPAIRED = int(Flag.LAST), int(Flag.BOOK_INVALID), int(Flag.REPAIRED)

# `side` is the maker's, as on the older Exchange feed: in the recording of 2026-08 each of 39 SELL trades was at the ask
# and each of 19 BUY trades at the bid of the book before it (tests/test_recorded_coinbase.py counts them).
_TAKER = {"BUY": SELL, "SELL": BUY}

_CHANNELS = {"trades": "market_trades", "orderbook_l2": "level2", "tickers": "ticker", "candles": "candles"}

Price = Annotated[float, msgspec.Meta(gt=-PRICE_MAX, lt=PRICE_MAX)]
Qty = Annotated[float, msgspec.Meta(ge=0, lt=QTY_MAX)]
Absent = Literal[""]  # how the venue writes a number that it does not have


class Level(msgspec.Struct, gc=False):
    """{"side":"bid","event_time":"2026-08-09T21:05:48.210883Z","price_level":"65062.5","new_quantity":"0.00583"}"""

    side: str
    price_level: Price
    new_quantity: Qty
    event_time: str = ""


class BookEvent(msgspec.Struct, gc=False):
    """{"type":"update","product_id":"BTC-USD","updates":[...]}"""

    type: str
    product_id: str
    updates: Annotated[list[Level], msgspec.Meta(max_length=LEVELS_MAX)]


class Trade(msgspec.Struct, gc=False):
    """{"product_id":"BTC-USD","trade_id":"1068572090","price":"65083.67","size":"0.002186","time":"...Z","side":"SELL"}"""

    product_id: str
    trade_id: Id
    price: Price
    size: Qty
    time: str
    side: str


Trades = Annotated[list[Trade], msgspec.Meta(max_length=TRADES_MAX)]


class TradesEvent(msgspec.Struct, gc=False):
    """{"type":"update","trades":[...]}; the newest trade first."""

    type: str
    trades: Trades


class Ticker(msgspec.Struct, gc=False):
    """{"type":"ticker","product_id":"BTC-USD","price":"65086.18","volume_24_h":"2867.5","best_bid":"65083.66",...}"""

    product_id: str
    price: Price | Absent = ""
    volume_24_h: Qty | Absent = ""
    low_24_h: Price | Absent = ""
    high_24_h: Price | Absent = ""
    best_bid: Price | Absent = ""
    best_ask: Price | Absent = ""


class TickersEvent(msgspec.Struct, gc=False):
    """{"type":"update","tickers":[...]}"""

    tickers: list[Ticker]


class Candle(msgspec.Struct, gc=False):
    """{"start":"1786279500","high":"1916.6","low":"1915.91","open":"1916.11","close":"1916.02","volume":"13.9","product_id":..}"""

    start: Annotated[int, msgspec.Meta(gt=0, lt=TIME_MAX_US // 1_000_000)]  # s
    high: Price
    low: Price
    open: Price
    close: Price
    volume: Qty
    product_id: str


class CandlesEvent(msgspec.Struct, gc=False):
    """{"type":"snapshot","candles":[...]}; a snapshot has the last 100 of one product, oldest first."""

    type: str
    candles: list[Candle]


class Heartbeat(msgspec.Struct, gc=False):
    """{"current_time":"2026-08-09 21:05:48.85 +0000 UTC m=+41691.26","heartbeat_counter":41691}"""

    heartbeat_counter: Id  # documents of before 2025 write it as text


class _Subscriptions(msgspec.Struct):
    """{"subscriptions":{"level2":["BTC-USD"],"heartbeats":["heartbeats"]}}: all that the connection has now."""

    subscriptions: dict[str, list[str]]


class _Head(msgspec.Struct):
    """Any message, only what tells them apart; an error has neither channel nor number."""

    channel: str = ""
    type: str = ""
    message: str = ""
    sequence_num: Id = -1
    events: msgspec.Raw = _NOTHING


class _FutureDetails(msgspec.Struct):
    contract_expiry: str = ""
    contract_size: str = ""
    contract_expiry_type: str = ""


class _Product(msgspec.Struct):
    """{"product_id":"BTC-USDC","status":"online","alias":"BTC-USD","price_increment":"0.01","base_increment":..,...}"""

    product_id: str
    status: str = ""
    product_type: str = "SPOT"
    base_currency_id: str = ""
    quote_currency_id: str = ""
    price_increment: Qty | Absent = ""
    quote_increment: Qty | Absent = ""
    base_increment: Qty | Absent = ""
    alias: str = ""
    is_disabled: bool = False
    trading_disabled: bool = False
    new_at: str | None = None
    future_product_details: _FutureDetails | None = None


class _Pagination(msgspec.Struct):
    next_cursor: str = ""
    has_next: bool = False


class _Products(msgspec.Struct):
    products: list[_Product]
    pagination: _Pagination | None = None


class _RestTrades(msgspec.Struct):
    trades: Trades


_Event = TypeVar("_Event")


def _frames(event: type[_Event]) -> Callable[[bytes], Any]:
    """Decoder of a message with such events; numbers in text become floats in the C core."""
    fields: list[Any] = [("events", list[event]), ("timestamp", str, ""), ("sequence_num", Id, -1)]  # type: ignore[valid-type]
    frame = msgspec.defstruct(f"{event.__name__}Frame", fields, gc=False)
    return msgspec.json.Decoder(frame, strict=False).decode


_decode_book, _decode_trades, _decode_tickers = _frames(BookEvent), _frames(TradesEvent), _frames(TickersEvent)
_decode_candles, _decode_heartbeat = _frames(CandlesEvent), _frames(Heartbeat)
_decode_subscriptions = msgspec.json.Decoder(list[_Subscriptions]).decode
_decode_head = msgspec.json.Decoder(_Head).decode
_decode_products = msgspec.json.Decoder(_Products, strict=False).decode
_decode_rest_trades = msgspec.json.Decoder(_RestTrades, strict=False).decode


@functools.lru_cache(maxsize=4096)
def _second_us(text: str) -> int:
    """us since the epoch of the begin of a time, 2026-08-09T21:05:48 and one more; the same second comes many times."""
    try:
        us = int(datetime.fromisoformat(f"{text[:19]}+00:00").timestamp()) * 1_000_000
    except ValueError as error:
        raise FrameError("unknown_time", text) from error
    if text[10:11] != "T" or text[19:] not in (".", "Z"):
        raise FrameError("unknown_time", text)
    if us >= TIME_MAX_US:
        raise FrameError("absurd_number", f"time={text}")
    return us


def time_us(text: str) -> int:
    """us since the epoch of an RFC 3339 time in UTC; what is below a microsecond is cut off.

    0 where the text stands for no time (1970 and before, as Go writes its zero). FrameError when it is no such time.
    """
    digits = text[20:-1]
    if len(text) == 27 and text[26] == "Z" and digits.isdigit() and text.isascii():
        us = _second_us(text[:20]) + int(digits)  # microseconds, as nearly all are
    elif text[-1:] != "Z" or len(text) == 21 or len(text) > 30 or not (text.isascii() and f"0{digits}".isdigit()):
        raise FrameError("unknown_time", text[:40])
    else:
        us = _second_us(text[:20]) + int(f"{digits:0<6}"[:6])
    return us if us > 0 else 0


def follows(last_id: int, _first: int, _last: int, prev: int) -> int:
    """The number of the connection proves that nothing is missing; messages from before a snapshot are in it."""
    return NEXT if prev == last_id else OLD


class _Request(NamedTuple):
    """A message that was not answered yet; answers carry no id and come in order."""

    type: str
    channel: str
    products: list[str]
    signed: bool
    asked_ns: int


class _OpenCandle(NamedTuple):
    candle: Candle
    proven: bool  # no version of it can have been missed since


class _Update(NamedTuple):
    """One book message, checked, so that nothing of a refused frame is applied."""

    take: Callable[["_Update"], None]
    is_snapshot: bool
    update_id: int
    timestamp: int
    bids: list[tuple[float, float]]
    asks: list[tuple[float, float]]


class Coinbase(Venue):
    """One connection to the market data feed of Advanced Trade."""

    NAME = "coinbase"
    EXCHANGE = Exchange.COINBASE
    FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles")
    INTERVALS = (_INTERVAL,)
    WS_URL = "wss://advanced-trade-ws.coinbase.com"
    REST_URL = "https://api.coinbase.com"
    PREFIX = b'{"channel":"'
    OVERLAPS = False
    LIMITS = Limits(
        streams_per_connection=400,  # not documented; 100 products, whose first snapshots are 1 MB each in the mean
        messages_per_s=8,
        messages_per_ip=(8, 1.0),  # unauthenticated, websocket-rate-limits 2026
        connects=(8, 1.0),  # the same page; older ones have 750 a second
        weight=(10, 1.0),  # public REST requests, rest-api-rate-limits 2026; each counts as one
        lifetime_s=0,
    )
    CREDENTIALS = ("key_name", "private_key")
    KNOWN_FIELDS = frozenset({
        "channel", "client_id", "timestamp", "sequence_num", "events", "type", "product_id", "updates", "side",
        "event_time", "price_level", "new_quantity", "trades", "trade_id", "price", "size", "time", "tickers",
        "volume_24_h", "low_24_h", "high_24_h", "low_52_w", "high_52_w", "price_percent_chg_24_h", "best_bid",
        "best_ask", "best_bid_quantity", "best_ask_quantity", "candles", "start", "high", "low", "open", "close",
        "volume", "current_time", "heartbeat_counter",
    })  # fmt: skip

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        super().__init__(emit, options, streams, open_world=open_world)
        self._handlers: dict[str, Decode] = {
            "l2_data": self._counted(_decode_book, self._on_book),
            "market_trades": self._counted(_decode_trades, self._trades_taker()),
            "ticker": self._counted(_decode_tickers, self._on_tickers),
            "candles": self._counted(_decode_candles, self._on_candles),
            "heartbeats": self._counted(_decode_heartbeat, self._on_heartbeat),
        }
        self._on_other = self._counted(_decode_head, self._take_other)
        self._sign = _signer(options.credentials) if options.credentials else None
        self._requests: deque[_Request] = deque()
        self._next = -1  # number that the next message must have; -1 = any
        self._refused = (-1, b"")  # number of the last message, if it was refused, and its begin
        self._heartbeat = -1
        self._heard_us = -1  # receive time of the last message in sequence
        self._book_takers: dict[str, Callable[[_Update], None]] = {}
        self._candles: dict[str, _OpenCandle] = {}
        self._holes: dict[tuple[str, str], int] = {}  # feed without ids and product -> since when rows may be missing
        self._connection = 0
        self._again: dict[str, int] = {}  # stream that is to be subscribed anew -> when that was done (0 = not yet)
        self._again_ns = 0

    def _streams_changed(self, left: Collection[str], gone: Collection[str]) -> None:
        for name in left:
            self._again.pop(name, None)
        for ticker in gone:
            self._book_takers.pop(ticker, None)
            self._candles.pop(ticker, None)
            for feed in ("bbo", "candles"):
                self._end_hole(feed, ticker)

    # Planning

    @classmethod
    def streams_of(cls, ticker: str, feeds: Sequence[str], options: Options) -> list[Stream]:
        streams = [Stream(f"{_CHANNELS[feed]}:{ticker}", feed, ticker) for feed in feeds if feed in _CHANNELS]
        if "bbo" in feeds:
            book = f"level2:{ticker}"
            if "orderbook_l2" not in feeds:
                return [*streams, Stream(book, "bbo", ticker)]
            return [Stream(s.name, s.feed, ticker, also=("bbo",)) if s.name == book else s for s in streams]
        return streams

    @classmethod
    def not_mergeable(cls, options: Options) -> dict[str, str]:
        return {
            "orderbook_l2": "messages of books are numbered by connection, so those of two cannot be put in one line: take"
            " the books of one leg"
        }

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        return (_REST,)

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        return [_info(product) for product in decode_body(_decode_products, body).products]

    @classmethod
    def pages_behind(cls, path: str, body: bytes) -> list[str]:
        page = decode_body(_decode_products, body).pagination
        return [f"{_REST}?cursor={quote(page.next_cursor)}"] if page and page.has_next and page.next_cursor else []

    # Connection

    def ws_path(self) -> str:
        return "/"

    def opened(self) -> None:
        self._next = 0
        self._ask("subscribe", "heartbeats", [])  # keeps quiet channels open, and shows a loss within a second
        self.subscribe([stream.name for stream in self.streams])

    def subscribe(self, names: Sequence[str]) -> None:
        self._ask_for("subscribe", names)

    def unsubscribe(self, names: Sequence[str]) -> None:
        self._leave(names)
        self._ask_for("unsubscribe", names)

    def closing(self) -> list[str]:
        return [self._message("unsubscribe", "heartbeats", [])]  # one: the limit of messages holds here, too

    def _ask_for(self, kind: str, names: Sequence[str]) -> None:
        for channel, products in _by_channel(names):
            self._ask(kind, channel, products)

    def _message(self, kind: str, channel: str, products: list[str]) -> str:
        message: dict[str, Any] = {"type": kind, "channel": channel}
        if products:
            message["product_ids"] = products
        if self._sign is not None:
            message["jwt"] = self._sign()
        return msgspec.json.encode(message).decode()

    def _ask(self, kind: str, channel: str, products: list[str]) -> None:
        self._requests.append(_Request(kind, channel, products, self._sign is not None, time.time_ns()))
        self.wants.append(Send(self._message(kind, channel, products)))

    def disconnected(self, cause: str) -> None:
        super().disconnected(cause)
        self._next = self._heartbeat = -1
        self._refused = (-1, b"")
        self._connection += 1
        self._requests.clear()
        self._again.clear()  # the new connection begins every channel with a snapshot
        self._doubt_candles()

    def finish(self) -> Iterator[None]:
        yield from super().finish()
        for feed, ticker in list(self._holes):
            self._end_hole(feed, ticker)

    def tick(self, now_ns: int) -> None:
        while self._requests and now_ns - self._requests[0].asked_ns > RESUBSCRIBE_RETRY_NS:
            self._requests.popleft()  # its answer was lost
        for name in self._again.keys() - self.proof.keys():
            del self._again[name]  # no longer wanted
        due = [name for name, asked_ns in self._again.items() if now_ns - asked_ns > RESUBSCRIBE_RETRY_NS]
        if due and not self._requests and now_ns - self._again_ns > RESUBSCRIBE_EVERY_NS:
            self._again_ns = now_ns
            self.unsubscribe(due)  # a channel that is subscribed already may bring no snapshot
            self.subscribe(due)
            for name in due:
                if name.startswith("level2:"):
                    self._again[name] = now_ns  # until the snapshot is there
                else:
                    del self._again[name]

    def _leave(self, names: Sequence[str]) -> None:
        """From here until the next greeting these streams miss what is sent."""
        for channel, _, ticker in (name.partition(":") for name in names):
            if channel == "level2" and (book := self.books.get(ticker)) is not None:
                book.lost(self.emit.rcv_us, "resync")
            elif channel == "market_trades" and (sync := self.trade_syncs.get(ticker)) is not None:
                sync.disconnected("resync")
            elif channel == "candles" and ticker in self._candles:
                self._holes.setdefault(("candles", ticker), self._heard_us)

    # Every message

    def _counted(self, decode: Callable[[bytes], Any], take: Callable[[Any], None]) -> Decode:
        """Decoder of a channel's messages, with the count of the connection's messages in front of what takes them."""
        emit = self.emit

        def counted(frame: bytes) -> None:
            try:
                message = decode(frame)
            except (msgspec.DecodeError, RecursionError):
                found = _SEQUENCE.search(frame, 0, HEAD_BYTES)
                number = int(found[1]) if found else -1
                if self._is_to_be_read(number):
                    self._refuse(number, frame)
                    raise
                return
            number = message.sequence_num
            if number == self._next:
                self._next = number + 1
            elif not self._is_to_be_read(number):
                return
            try:
                take(message)
            except (FrameError, msgspec.DecodeError):
                self._refuse(number, frame)
                raise
            self._heard_us = emit.rcv_us

        return counted

    def _refuse(self, number: int, frame: bytes) -> None:
        if number >= 0:
            self._refused, self._next = (number, frame[:PRODUCT_BYTES]), -2

    def _is_to_be_read(self, number: int) -> bool:
        """Whether to read a message, which may have another number than the next; a jump makes everything doubtful.

        A refused message may be the first fragment of one, or none of the venue's: then its number comes once more.
        Otherwise it is lost; which book or candles that costs is known.
        """
        if number < 0:
            return True
        expected, self._next = self._next, number + 1
        refused, head = self._refused
        if refused >= 0:
            self._refused = (-1, b"")
            if number == refused:
                return True
            self._lose_part(head)
            expected = refused + 1
        if number == expected - 1:
            self.emit.counters["sequence_duplicate"] += 1
            return False
        if expected >= 0 and number != expected:
            self._lose("sequence")
        return True

    def _lose(self, cause: str) -> None:
        """Any channel may have lost something before this message: doubt everything, ask for all snapshots again.

        Ids of books are times, so what a book lost ends at the time of this message, by our clock.
        """
        emit = self.emit
        emit.counters[f"lost_{cause}"] += 1
        self._heartbeat = -1
        for book in self.books.values():
            book.lost(emit.rcv_us, cause)
        for sync in self.trade_syncs.values():
            sync.disconnected(cause)
        for feed in ("bbo", "tickers", "candles"):  # these have no ids; a greeting says once more where the hole ends
            if feed in emit.rings:
                emit.gap(feed, "*", from_time=self._heard_us, cause=cause)
        self._lose_candles()
        self._again.update({stream.name: 0 for stream in self.streams if stream.feed != "tickers"})

    def _lose_candles(self) -> None:
        for ticker in self._candles:
            self._holes.setdefault(("candles", ticker), self._heard_us)
        self._doubt_candles()

    def _lose_part(self, head: bytes) -> None:
        """A message is lost whose begin is known: if it was of a book, that one is doubtful, if of candles or tickers, all
        of them. What trades it had the next one tells.
        """
        found = _CHANNEL.search(head, 0, HEAD_BYTES)
        channel = found[1] if found else b""
        if not channel:
            self._lose("refused")
        elif channel == b"l2_data":
            self._lose_book_of(head)
        elif channel == b"candles":
            self._lose_candles()
            self._again.update({stream.name: 0 for stream in self.streams if stream.feed == "candles"})
        elif channel == b"ticker" and "tickers" in self.emit.rings:
            self.emit.gap("tickers", "*", from_time=self._heard_us, cause="refused")

    def _lose_book_of(self, head: bytes) -> None:
        named = _PRODUCT.search(head)
        product = named[1].decode(errors="replace") if named else ""
        for ticker, book in self.books.items():
            if product in ("", ticker):
                book.lost(self.emit.rcv_us, "refused")
        if f"level2:{product}" in self.proof:
            self._again.setdefault(f"level2:{product}", 0)  # its first snapshot may be the one that was refused

    def _end_hole(self, feed: str, ticker: str) -> None:
        from_us = self._holes.pop((feed, ticker), None)
        if from_us is not None and feed in self.emit.rings:
            self.emit.gap(feed, ticker, from_time=from_us, cause="resync")

    def unrouted(self, frame: bytes) -> None:
        try:
            handle = self._handlers.get(_decode_head(frame).channel)
        except (msgspec.DecodeError, RecursionError):
            handle = None  # it is refused below, and its number counted
        if handle is not None:
            self.take_route(frame, handle)
        else:
            self._on_other(frame)

    def _take_other(self, head: _Head) -> None:
        if head.channel == "subscriptions":
            self._answered(_decode_subscriptions(head.events))
        elif head.type == "error":
            self._failed(head.message)
        else:
            raise FrameError("unhandled_channel", head.channel or head.type)

    def _on_heartbeat(self, message: Any) -> None:
        for event in message.events:
            if self._heartbeat >= 0 and event.heartbeat_counter != self._heartbeat + 1:
                self._lose("heartbeat")
            self._heartbeat = event.heartbeat_counter

    # Answers

    def _answered(self, events: list[_Subscriptions]) -> None:
        listed = {f"{channel}:{p}" for e in events for channel, products in e.subscriptions.items() for p in products}
        self.acknowledge(sorted(listed), time.time_ns())
        if not self._requests:
            return
        request = self._requests.popleft()
        names = [f"{request.channel}:{product}" for product in request.products]
        if request.type == "subscribe" and (missing := [name for name in names if name not in listed]):
            self.refuse(missing, "left out of the reply to subscribe")

    def _failed(self, message: str) -> None:
        """An error names no request: it is the answer to the oldest one that has none."""
        if not self._requests:
            raise FrameError("venue_error", message)
        request = self._requests.popleft()
        half = len(request.products) // 2
        if "rate limit" in message.lower():
            self.emit.counters["venue_rate_limited"] += 1
            self.wants.append(Reconnect("rate_limited", wait_s=RATE_LIMITED_S))
        elif request.signed:
            # Market data is open to everybody: no reason to record nothing.
            self.emit.counters["credentials_refused"] += 1
            self.notes["credentials"] = f"refused, subscribed without them: {message[:200]}"
            self._sign = None
            self._ask(request.type, request.channel, request.products)
        elif request.type != "subscribe":
            raise FrameError("venue_error", message)
        elif half:
            self.emit.counters["subscribe_bisected"] += 1
            self._ask("subscribe", request.channel, request.products[:half])
            self._ask("subscribe", request.channel, request.products[half:])
        else:
            self.refuse([f"{request.channel}:{product}" for product in request.products or ["heartbeats"]], message)

    # Data

    def _on_book(self, message: Any) -> None:
        for update in [self._update(event, message.timestamp) for event in message.events]:
            update.take(update)

    def _update(self, event: BookEvent, sent: str) -> _Update:
        levels = event.updates
        bids: list[tuple[float, float]] = []
        asks: list[tuple[float, float]] = []
        for level in levels:
            if level.side == "bid":
                bids.append((level.price_level, level.new_quantity))
            elif level.side == "offer":
                asks.append((level.price_level, level.new_quantity))
            else:
                raise FrameError("unknown_side", level.side)
        timestamp = 0
        if levels:
            first, last = levels[0].event_time, levels[-1].event_time
            timestamp = time_us(first) if first == last else max(time_us(first), time_us(last))
        if event.type not in ("update", "snapshot"):
            raise FrameError("unknown_book_type", event.type)
        take = self._book_takers.get(event.product_id) or self._book_taker(event.product_id)
        return _Update(take, event.type == "snapshot", timestamp or time_us(sent), timestamp, bids, asks)

    def _book_taker(self, ticker: str) -> Callable[[_Update], None]:
        """What applies the book messages of a product and tells its best prices."""
        self.admit(ticker)
        book, emit = self.book(ticker, follows), self.emit
        instrument, emit_bbo, wants_bbo = book.instrument, emit.bbo, "bbo" in emit.rings
        name, told, told_id, greeted_on = f"level2:{ticker}", (), -1, -1  # type: tuple[str, tuple[float, ...], int, int]

        def take(update: _Update) -> None:
            nonlocal told, told_id, greeted_on
            _, is_snapshot, update_id, timestamp, bids, asks = update
            if is_snapshot:
                greeted_on = self._connection
                book.snapshot(update_id, timestamp, bids, asks, in_band=True)
                self._end_hole("bbo", ticker)
                self._again.pop(name, None)
                told = told if told_id == update_id else ()
            else:
                if greeted_on != self._connection and book.state is LIVE:
                    book.lost(emit.rcv_us, "reconnect")  # it is of another connection
                book.delta(update_id, update_id, book.last_id, timestamp, bids, asks)
            if wants_bbo and book.state is LIVE:
                best = book.best()
                if best != told:
                    told, told_id = best, update_id
                    emit_bbo(instrument, timestamp, *best, update_id, _LAST | _INVALID if best[0] >= best[2] else _LAST)

        self._book_takers[ticker] = take
        return take

    def want_snapshot(self, book: BookSync) -> None:
        ticker = book.instrument.ticker
        if book.state is BROKEN:  # until it stands in a snapshot again it tells no best prices
            self._holes.setdefault(("bbo", ticker), self._heard_us)
        self._again.setdefault(f"level2:{ticker}", 0)

    def _trades_taker(self) -> Callable[[Any], None]:
        emit_trade, sync_of, side_of = self.emit.trade, self.trade_syncs.get, _TAKER.get

        def take(message: Any) -> None:
            events: list[TradesEvent] = message.events
            if len(events) == 1 and len(events[0].trades) == 1 and events[0].type == "update":
                t = events[0].trades[0]
                sync, side, seq = sync_of(t.product_id), side_of(t.side), t.trade_id
                if (
                    sync is not None and side and seq == sync.last + 1 and (timestamp := time_us(t.time))
                ):  # the common case
                    emit_trade(sync.instrument, timestamp, side, t.price, t.size, seq)
                    sync.last, sync.last_time = seq, timestamp
                    return
            for event, rows in [(event, self._rows_of(event)) for event in events]:
                for ticker, trades in rows.items():
                    if event.type == "snapshot":
                        self.trade_sync(ticker).greeted(trades)
                    else:
                        self.trade_sync(ticker).publish(trades)

        return take

    def _rows_of(self, event: TradesEvent) -> dict[str, list[TradeRow]]:
        """Rows by product in the order of the counter; a message has the newest trade first."""
        if event.type not in ("update", "snapshot"):
            raise FrameError("unknown_trades_type", event.type)
        rows: dict[str, list[TradeRow]] = {}
        for trade in reversed(event.trades):
            rows.setdefault(trade.product_id, []).append(self._row(trade))
        for ticker, trades in rows.items():
            self.admit(ticker)
            if len(trades) > 1:
                trades.sort(key=lambda row: row[0])
        return rows

    def _row(self, trade: Trade) -> TradeRow:
        side = self.side_of_trade(_TAKER, trade.side)
        timestamp = time_us(trade.time)
        if not timestamp:
            raise FrameError("absurd_number", f"trade time={trade.time}")
        return trade.trade_id, timestamp, side, trade.price, trade.size, b""

    def _on_tickers(self, message: Any) -> None:
        timestamp = time_us(message.timestamp)
        tickers: list[Ticker] = [ticker for event in message.events for ticker in event.tickers]
        for t in tickers:
            self.admit(t.product_id)
        for t in tickers:
            values = {
                "last": t.price, "high_24h": t.high_24_h, "low_24h": t.low_24_h, "volume_24h": t.volume_24_h,
                "bid_price": t.best_bid, "ask_price": t.best_ask,
            }  # fmt: skip
            given = {name: value for name, value in values.items() if value != ""}
            self.emit.ticker(self.emit.instrument(t.product_id), timestamp, **given)  # type: ignore[arg-type]

    def _on_candles(self, message: Any) -> None:
        """The venue never says that a candle is closed: the first one of the next five minutes does.

        The snapshot of a new subscription closes what ended meanwhile; at the first one only the open candle is new.
        """
        timestamp, by_event = time_us(message.timestamp), []
        for event in message.events:
            by_product: dict[str, list[Candle]] = {}
            for candle in event.candles:
                by_product.setdefault(candle.product_id, []).append(candle)
                if candle.start * 1_000_000 > self.emit.rcv_us + CANDLE_AHEAD_MAX_US:
                    raise FrameError("absurd_number", f"candle start={candle.start}")
            for ticker in by_product:
                self.admit(ticker)
            by_event.append((event.type == "snapshot", by_product))
        for is_snapshot, by_product in by_event:
            for ticker, candles in by_product.items():
                if is_snapshot:
                    self._end_hole("candles", ticker)
                candles.sort(key=lambda candle: candle.start)
                self._take_candles(ticker, candles, is_snapshot, timestamp)

    def _take_candles(self, ticker: str, candles: list[Candle], is_snapshot: bool, timestamp: int) -> None:
        for candle in candles[-1:] if is_snapshot and ticker not in self._candles else candles:
            old = self._candles.get(ticker)
            if old is not None and candle.start < old.candle.start:
                if not is_snapshot:
                    self.emit.counters["candle_late"] += 1
                continue
            if old is not None and candle.start > old.candle.start and old.proven:
                self._emit_candle(ticker, old.candle, timestamp, closed=True)
            self._candles[ticker] = _OpenCandle(candle, proven=True)
            is_news = candle is candles[-1] and (old is None or candle != old.candle)
            if is_news or not is_snapshot:
                self._emit_candle(ticker, candle, timestamp, closed=False)

    def _emit_candle(self, ticker: str, c: Candle, timestamp: int, *, closed: bool) -> None:
        ohlc, opened_us = (c.open, c.high, c.low, c.close), c.start * 1_000_000
        instrument = self.emit.instrument(ticker)
        self.emit.candle(instrument, timestamp, _INTERVAL.encode(), opened_us, ohlc, c.volume, -1, closed)

    def _doubt_candles(self) -> None:
        """Versions of the open candles may have been missed: what is known of them is not how they closed."""
        self._candles = {ticker: _OpenCandle(known.candle, False) for ticker, known in self._candles.items()}

    # What is missing

    def probe(self, stream: Stream) -> Fetch | None:
        """The newest trade: it also changed the book, the ticker and the candle."""
        return Fetch(f"probe {stream.name}", _trades_path(stream.ticker, limit=1), 1)

    def newest_us(self, stream: Stream, body: bytes) -> int:
        return max((time_us(trade.time) for trade in decode_body(_decode_rest_trades, body).trades), default=0)

    def want_repair(self, ticker: str, first: int, last: int) -> None:
        sync = self.trade_syncs.get(ticker)
        from_us = sync.since(first) if sync is not None else -1
        query = {}
        if from_us > 0:
            until_s = max(from_us, self.emit.rcv_us) // 1_000_000 + CLOCK_AHEAD_S
            query = {"start": from_us // 1_000_000, "end": until_s}
        self._fetch_trades(ticker, first, last, query, 1)

    def _fetch_trades(self, ticker: str, first: int, last: int, query: dict[str, int], page: int) -> None:
        """Ask for trades by time, in whole seconds; answers have the newest ones and are walked back from there."""

        def answer(body: bytes) -> None:
            rows = sorted(self._row(trade) for trade in decode_body(_decode_rest_trades, body).trades)
            sync, wanted = self.trade_sync(ticker), [row for row in rows if first <= row[0] <= last]
            before_s = -(-rows[0][1] // 1_000_000) if rows else 0
            if rows and rows[0][0] > first and before_s < query.get("end", before_s + 1) and page < TRADE_PAGES_MAX:
                sync.publish(wanted, _REPAIRED)
                start_s = min(query.get("start", before_s - DAY_S), before_s)
                self._fetch_trades(ticker, first, last, {"start": start_s, "end": before_s}, page + 1)
            else:
                sync.repaired(first, wanted)

        path = _trades_path(ticker, limit=TRADES_PER_REQUEST, **query)
        self.wants.append(Fetch(f"trades {ticker} {first}", path, 1, answer))

    def http(self, url: str, body: bytes) -> None:
        if not urlsplit(url).path.endswith(_REST):
            raise FrameError("unhandled_url", url)
        self.take_instruments(url, body)

    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        self.emit.counters["trade_repair_refused"] += 1
        self.notes[f"{fetch.key.split(' ')[1]} repair refused"] = f"HTTP {status} {body[:200].decode(errors='replace')}"


def _by_channel(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Products by channel, as many as one message may name."""
    products: dict[str, list[str]] = {}
    for name in names:
        channel, _, product = name.partition(":")
        products.setdefault(channel, []).append(product)
    size = PRODUCTS_PER_MESSAGE
    return [(channel, some[i : i + size]) for channel, some in products.items() for i in range(0, len(some), size)]


def _trades_path(ticker: str, **query: int) -> str:
    return f"{_REST}/{quote(ticker)}/ticker?{urlencode(query)}"


def _number(text: float | str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _info(p: _Product) -> InstrumentInfo:
    future = p.future_product_details if p.product_type == "FUTURE" else None
    kind = "spot" if p.product_type == "SPOT" else "option" if p.product_type == "OPTION" else "future"
    if future is not None and future.contract_expiry_type == "PERPETUAL":
        kind = "perpetual"
    trades = not (p.alias or p.is_disabled or p.trading_disabled or p.status in ("offline", "delisted"))
    return InstrumentInfo(
        ticker=p.product_id,
        active=trades,
        kind=kind,
        base=p.base_currency_id,
        quote=p.quote_currency_id,
        status=f"alias of {p.alias}" if p.alias else p.status,
        tick_size=_number(p.price_increment or p.quote_increment),
        qty_step=_number(p.base_increment),
        contract_size=_number(future.contract_size) if future is not None else 1.0,
        listed_time=_listed_us(p.new_at),
        expiry_time=_listed_us(future.contract_expiry) if future is not None else -1,
    )


def _listed_us(text: str | None) -> int:
    """A time in the list of products, -1 where it is none: a list is not refused for one."""
    try:
        return (time_us(text) if text else 0) or -1
    except FrameError:
        return -1


def _signer(credentials: Any) -> Callable[[], str]:
    """What makes a token for one message (websocket-authentication, 2026: ES256, valid for two minutes).

    ConfigError, never with a value in it, when the library is missing or the key is none for ES256.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec, utils
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise ConfigError(
            "coinbase: credentials need the library cryptography: pip install 'mdcollector[coinbase]'"
        ) from error
    name, pem = credentials["key_name"], credentials["private_key"].replace("\\n", "\n")
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError("coinbase: private_key is no private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("coinbase: private_key is no key for ES256 (an EC key on P-256)")

    def sign() -> str:
        now_s = int(time.time())
        head = {"alg": "ES256", "typ": "JWT", "kid": name, "nonce": os.urandom(16).hex()}
        claims = {"iss": "cdp", "sub": name, "nbf": now_s, "exp": now_s + JWT_VALID_S}
        signed = ".".join(_base64url(msgspec.json.encode(part)) for part in (head, claims))
        r, s = utils.decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(SHA256())))
        return f"{signed}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    return sign


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


VENUES = (Coinbase,)
