"""Coinbase Exchange (the feed of the exchange itself, formerly Coinbase Pro; Advanced Trade is another venue).

Documentation: docs.cdp.coinbase.com/exchange (websocket-feed overview, channels, authentication, rate-limits; REST pages
get-product-trades, get-product-book, get-products, pagination), read in 2026. What proves what:

    trades  `trade_id` grows by 1 per product. A hole shows with the next trade, and with the heartbeat of each second,
            which names the newest trade; it is fetched over REST. `side` is the maker's and is turned round.
    books   An `l2update` has no number, so nothing in it can tell that the one before is missing; the vendor promises
            delivery. What can be shown is shown: a frame that goes back in time, or that could not be read, gives its
            book up, as does a book that stays crossed; and each book in turn is audited: compared with the book of
            the REST interface, level by level, but for what changes meanwhile. What an audit finds wrong goes into the
            ledger from the last audit (or snapshot) on that found it right. Not shown: a loss that later changes of
            the same levels hide before the next audit. There is one audit at a time, of a second or two, and two
            seconds lie between them: each of n books has its turn about every 4 n seconds.

`update_id` of a book row is the event time in us, made strictly rising: where two messages have one time, or a snapshot
has none, it is one more than the last. Batches of 50 ms are cut differently on two connections, but levels are absolute
and an update holds all changes up to its time: whichever of two overlapping connections is ahead goes on with the book.
Best prices (`bbo`) are those that come with a ticker, so as of each match and not of each change; old tickers have no
quantities and make none.
"""

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections import deque
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import msgspec

from mdcollector.continuity import LIVE, NEXT, OLD, BookSync, TradeRow, TradeSync
from mdcollector.emit import PRICE_MAX, QTY_MAX, TIME_MAX_US, Emit, Instrument
from mdcollector.errors import FrameError
from mdcollector.exchanges import Decode, Fetch, Id, InstrumentInfo, Limits, Options, Send, Stream, Venue, decode_body
from mdcollector.records import BUY, SELL, Exchange

STREAMS_PER_REQUEST = 100  # chosen: a refused request is halved until it is known what the venue refuses
TRADES_PER_REQUEST = 1000  # pagination, 2026: at most and by default
RESUBSCRIBE_EVERY_NS = 500_000_000  # books that need a snapshot are resubscribed together
RESUBSCRIBE_RETRY_NS = 15_000_000_000  # a snapshot that did not come is asked for again
OVERLAP_TAIL_US = 35_000_000  # so long after an overlap the connection that stayed may still be behind the other one
AUDIT_EVERY_NS = 2_000_000_000  # between two audits: half a request a second of the ten that an IP address has
AUDIT_LEAD_NS = 1_000_000_000  # changes are noted so long before the request: the answer may come from a cache
BEAT_AHEAD_US = 1_000_000  # a heartbeat may be so far ahead of the updates of its time (recorded: less than a batch)
AUDIT_MOST_NS = 60_000_000_000  # then an audit is given up
AUDIT_COST = 100  # an audit is followed by so many times its own cost: the largest books have megabytes
TOUCHED_MAX = 100_000  # changed levels noted for an audit; then it is given up
_SIGNED = "GET/users/self/verify"
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)

Maker = Literal["buy", "sell"]
Price = Annotated[float, msgspec.Meta(ge=0, lt=PRICE_MAX)]
Size = Annotated[float, msgspec.Meta(ge=0, lt=QTY_MAX)]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]
Pairs = list[tuple[Price, Size]]


class Match(msgspec.Struct, gc=False):
    """{"type":"match","trade_id":10,"side":"sell","size":"5.23512","price":"400.23","product_id":"BTC-USD","time":"2014-11-07T08:19:27.028459Z",...}"""

    trade_id: Id
    side: Maker
    size: Size
    price: Price
    product_id: str
    time: Moment


class L2Update(msgspec.Struct, gc=False):
    """{"type":"l2update","product_id":"BTC-USD","changes":[["buy","10101.80","0.162567"]],"time":"2019-08-14T20:42:27.966Z"}"""

    product_id: str
    changes: list[tuple[Maker, Price, Size]]
    time: Moment


class Snapshot(msgspec.Struct, gc=False):
    """{"type":"snapshot","product_id":"BTC-USD","asks":[["10102.55","0.57"]],"bids":[["10101.10","0.45"]],"time":...}"""

    product_id: str
    bids: Pairs
    asks: Pairs
    time: Moment | None = None  # since 2022 or later


class Ticker(msgspec.Struct, gc=False):
    """{"type":"ticker","sequence":37475248783,"product_id":"ETH-USD","price":"1285.22","open_24h":..,"best_bid":"1285.04","best_bid_size":..,...}"""

    product_id: str
    sequence: Id
    time: Moment
    price: Price | None = None
    open_24h: Price | None = None
    high_24h: Price | None = None
    low_24h: Price | None = None
    volume_24h: Size | None = None
    best_bid: Price | None = None
    best_bid_size: Size | None = None
    best_ask: Price | None = None
    best_ask_size: Size | None = None


class Heartbeat(msgspec.Struct, gc=False):
    """{"type":"heartbeat","sequence":90,"last_trade_id":20,"product_id":"BTC-USD","time":"2014-11-07T08:19:28.464459Z"}"""

    product_id: str
    last_trade_id: Id
    time: Moment


class _Channel(msgspec.Struct):
    name: str
    product_ids: list[str] = []


class _Envelope(msgspec.Struct):
    """Any message; only what tells them apart, and what replies hold."""

    type: str = ""
    channels: list[_Channel] = []
    message: str = ""
    reason: str = ""


class _RestTrade(msgspec.Struct):
    """{"trade_id":74,"side":"sell","size":"0.01000000","price":"10.00000000","time":"2014-11-07T22:19:28.578544Z"}"""

    trade_id: Id
    side: Maker
    size: Size
    price: Price
    time: Moment


class _RestBook(msgspec.Struct):
    """{"sequence":13051505638,"bids":[["6247.58","6.3578146",2]],"asks":[...],"auction_mode":false,"time":...}"""

    bids: list[tuple[Price, Size, Any]]
    asks: list[tuple[Price, Size, Any]]
    auction_mode: bool | None = False
    time: Moment | None = None


class _Time(msgspec.Struct):
    """{"iso":"2015-01-07T23:47:25.201Z","epoch":1420674445.201}"""

    iso: Moment


class _Product(msgspec.Struct):
    id: str
    status: str
    base_currency: str = ""
    quote_currency: str = ""
    quote_increment: float = float("nan")
    base_increment: float = float("nan")
    trading_disabled: bool = False


_decode_match = msgspec.json.Decoder(Match, strict=False).decode
_decode_update = msgspec.json.Decoder(L2Update, strict=False).decode
_decode_snapshot = msgspec.json.Decoder(Snapshot, strict=False).decode
_decode_ticker = msgspec.json.Decoder(Ticker, strict=False).decode
_decode_heartbeat = msgspec.json.Decoder(Heartbeat, strict=False).decode
_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_trades = msgspec.json.Decoder(list[_RestTrade], strict=False).decode
_decode_book = msgspec.json.Decoder(_RestBook, strict=False).decode
_decode_time = msgspec.json.Decoder(_Time).decode
_decode_products = msgspec.json.Decoder(list[_Product], strict=False).decode

# Channel that stands for a feed in the name of its stream -> all channels that the feed needs: heartbeats prove trades,
# and tell a book that stands still from one that is late.
_BOOK, _RAW_BOOK, _BEAT = "level2_batch", "level2", "heartbeat"
_CHANNELS = {channel: (channel, _BEAT) for channel in ("matches", _BOOK, _RAW_BOOK)}
_SAME_CHANNEL = {"level2_50": _BOOK}  # what a reply calls the batches of 50 ms (recorded 2026-09-30)
_OF_ONE_CONNECTION = (b'{"type":"subscriptions"', b'{"type":"error"', b'{"type":"snapshot"')
_OF_BOOKS = (b"l2update", b"snapshot")
_TYPE = re.compile(rb'"type"\s*:\s*"([^"]*)')  # its begin, where the frame is cut off in it
_PRODUCT = re.compile(rb'"product_id"\s*:\s*"([^"]{1,60})"')


def _us(moment: datetime) -> int:
    """us since the epoch; 0 when the venue gave no time (it writes the year 1)."""
    us = (moment - _EPOCH) // _MICROSECOND
    if us >= TIME_MAX_US:
        raise FrameError("absurd_number", f"time={moment}")
    return max(us, 0)


def follows(last_id: int, _first: int, last: int, _prev: int) -> int:
    """Ids are times made rising, so whatever is newer comes next: a hole is not to be seen in them."""
    return NEXT if last > last_id else OLD


class _Request(NamedTuple):
    """A message that was not answered yet."""

    what: str
    names: list[str]
    signed: bool


class _Depth:
    """What is known of a book beside its levels."""

    __slots__ = ("awaiting", "beat", "clock", "frame", "horizon", "loads", "newest", "sync", "touched")

    def __init__(self, sync: BookSync) -> None:
        self.sync = sync
        self.newest = sync.last_id  # id of the last message, also of one that was not applied
        self.clock = 0  # time of the last update on this connection
        self.frame = b""  # that update
        self.beat = 0  # time of the last heartbeat on this connection
        self.awaiting = False  # a new connection begins with a snapshot; what came before it belongs nowhere
        self.horizon = (0.0, PRICE_MAX)  # worst prices of the snapshot: beyond them levels may exist that nobody told
        self.loads = 0  # snapshots taken, or caught up with
        self.touched: set[tuple[bool, float]] | None = None  # (is a bid, price) of what changes while an audit runs


class _Audit:
    """One comparison of a live book with the REST interface."""

    def __init__(self, depth: _Depth, now_ns: int) -> None:
        self.depth, self.began_ns = depth, now_ns
        self.loads, self.began_at = depth.loads, (depth.newest, depth.clock or depth.sync.last_time)
        self.is_asked = False
        self.is_answered = False
        self.time_us = 0
        self.cost_ns = 0
        self.answer: tuple[dict[float, float], dict[float, float]] = {}, {}


class CoinbaseExchange(Venue):
    """One connection of the Coinbase Exchange feed."""

    NAME = "coinbase_exchange"
    EXCHANGE = Exchange.COINBASE_EXCHANGE
    FEEDS = ("trades", "orderbook_l2", "bbo", "tickers")
    BOOK_INTERVALS = ("raw", "50ms")
    WS_URL = "wss://ws-feed.exchange.coinbase.com"
    REST_URL = "https://api.exchange.coinbase.com"
    TIME_PATH = "/time"
    PREFIX = b'{"type":"'
    LIMITS = Limits(  # websocket-feed/rate-limits and rest-api/rate-limits, 2026
        streams_per_connection=400,  # none documented; chosen to keep one core's bursts short
        messages_per_s=20,  # of 100 a second that an IP address may send
        connects=(8, 1.0),  # requests per IP, bursts up to 20
        weight=(10, 1.0),  # public endpoints per IP, bursts up to 15
        lifetime_s=0,
        messages_per_ip=(100, 1.0),
    )
    CREDENTIALS = ("key", "secret", "passphrase")
    KNOWN_FIELDS = frozenset({
        "type", "product_id", "time", "sequence", "changes", "bids", "asks", "trade_id", "maker_order_id",
        "taker_order_id", "side", "size", "price", "last_trade_id", "open_24h", "high_24h", "low_24h", "volume_24h",
        "volume_30d", "best_bid", "best_bid_size", "best_ask", "best_ask_size", "last_size",
    })  # fmt: skip

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        super().__init__(emit, options, streams, open_world=open_world)
        self._credentials = dict(options.credentials)
        self._requests: deque[_Request] = deque()  # unanswered, in the order in which answers come
        self._depths: dict[str, _Depth] = {}
        self._told: dict[str, int] = {}  # ticker -> last trade named by the last heartbeat
        self._priced: dict[str, tuple[Instrument, list[int]]] = {}  # ticker -> newest sequence and time of its tickers
        self._resubscribe: dict[str, int] = {}  # ticker -> when it was asked for (0 = not yet)
        self._resubscribed_ns = 0
        self._overlapped_us = -OVERLAP_TAIL_US
        self._audit: _Audit | None = None
        self._audit_at_ns = 0
        self._to_audit: deque[str] = deque()
        self._handlers: dict[str, Decode] = {
            "match": self._on_match(), "last_match": self._on_match(), "l2update": self._on_update(),
            "snapshot": self._on_snapshot, "ticker": self._on_ticker(), "heartbeat": self._on_heartbeat,
        }  # fmt: skip
        emit.on_refused = self._lost
        if options.book_interval == "raw" and not options.credentials:
            self.notes["credentials"] = "none given: level2_batch instead of level2"
        try:
            self._secret = base64.b64decode(self._credentials.get("secret", ""), validate=True)
        except binascii.Error:
            self._without_credentials("the secret is not base64")

    def _streams_changed(self, left: Collection[str], gone: Collection[str]) -> None:
        if self._audit is not None and self._audit.depth.sync.instrument.ticker in gone:
            self._end_audit(0)
        for ticker in gone:
            for of_ticker in (self._depths, self._told, self._priced, self._resubscribe):
                of_ticker.pop(ticker, None)
        self._to_audit = deque(ticker for ticker in self._to_audit if ticker not in gone)

    # Planning

    @classmethod
    def streams_of(cls, ticker: str, feeds: Sequence[str], options: Options) -> list[Stream]:
        book = _RAW_BOOK if options.credentials and options.book_interval in ("", "raw") else _BOOK
        channels = {"trades": "matches", "orderbook_l2": book}
        streams = [Stream(f"{channels[feed]}:{ticker}", feed, ticker) for feed in feeds if feed in channels]
        if brought := [feed for feed in feeds if feed in ("tickers", "bbo")]:
            streams.append(Stream(f"ticker:{ticker}", brought[0], ticker, also=tuple(brought[1:])))
        return streams

    @classmethod
    def not_mergeable(cls, options: Options) -> dict[str, str]:
        return {
            "orderbook_l2": "messages of books have no number, so one that a leg lacks does not show when it is needed: take"
            " the books of one leg"
        }

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        return ("/products",)

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        return [
            InstrumentInfo(
                p.id, p.status == "online" and not p.trading_disabled, base=p.base_currency, quote=p.quote_currency,
                status=p.status, tick_size=p.quote_increment, qty_step=p.base_increment, contract_size=1.0,
            )
            for p in decode_body(_decode_products, body)
        ]  # fmt: skip

    @classmethod
    def server_time(cls, body: bytes) -> tuple[int, int]:
        us = _us(decode_body(_decode_time, body).iso)
        return us, 1 if us % 1000 else 1000  # it is written in ms or finer; a whole ms may be cut off

    # Connection

    def opened(self) -> None:
        self._requests.clear()
        self.subscribe([stream.name for stream in self.streams])

    def closing(self) -> list[str]:
        names = [stream.name for stream in self.streams]
        return [self._text("unsubscribe", part) for part in _parts(names)]

    def subscribe(self, names: Sequence[str]) -> None:
        self._request("subscribe", names)

    def unsubscribe(self, names: Sequence[str]) -> None:
        self._request("unsubscribe", names)

    def _request(self, what: str, names: Sequence[str]) -> None:
        for part in _parts(names):
            self._requests.append(_Request(what, part, bool(self._credentials)))
            self.wants.append(Send(self._text(what, part)))

    def _text(self, what: str, names: Sequence[str]) -> str:
        channels: dict[str, dict[str, None]] = {}
        for name in names:
            for channel, ticker in _subscriptions(name):
                channels.setdefault(channel, {})[ticker] = None
        if what == "unsubscribe" and _BEAT in channels:  # others of the same product may still need it
            left = {s.ticker for s in self.streams if s.name not in names and len(_subscriptions(s.name)) > 1}
            channels[_BEAT] = {ticker: None for ticker in channels[_BEAT] if ticker not in left}
        named = [{"name": channel, "product_ids": list(tickers)} for channel, tickers in channels.items() if tickers]
        return msgspec.json.encode({"type": what, "channels": named, **self._signature()}).decode()

    def _signature(self) -> dict[str, str]:
        """The fields that sign a request (websocket-feed/authentication); {} without credentials."""
        if not self._credentials:
            return {}
        now = f"{time.time():.3f}"
        digest = hmac.new(self._secret, f"{now}{_SIGNED}".encode(), hashlib.sha256).digest()
        signed = {name: self._credentials[name] for name in ("key", "passphrase")}
        return {**signed, "timestamp": now, "signature": base64.b64encode(digest).decode()}

    def _without_credentials(self, reason: str) -> None:
        """The public channels are open to everybody: go on with them and say so."""
        self._credentials = {}
        self.emit.counters["credentials_refused"] += 1
        self.notes["credentials"] = f"{reason}: public channels only"
        self.streams = [msgspec.structs.replace(s, name=_public(s.name)) for s in self.streams]
        self.proof = {_public(name): state for name, state in self.proof.items()}
        self._tickers = {stream.name: stream.ticker for stream in self.streams}

    def tick(self, now_ns: int) -> None:
        self._resubscribe_due(now_ns)
        self._audit_due(now_ns)

    def _resubscribe_due(self, now_ns: int) -> None:
        due = [ticker for ticker, asked in self._resubscribe.items() if now_ns - asked > RESUBSCRIBE_RETRY_NS]
        if due and now_ns - self._resubscribed_ns > RESUBSCRIBE_EVERY_NS:
            self._resubscribed_ns = now_ns
            self._resubscribe.update(dict.fromkeys(due, now_ns))
            names = [s.name for s in self.streams if s.feed == "orderbook_l2" and s.ticker in due]
            self.unsubscribe(names)
            self.subscribe(names)

    def disconnected(self, cause: str) -> None:
        super().disconnected(cause)
        self._requests.clear()
        self._resubscribe.clear()  # the new connection begins every book with a snapshot
        self._told.clear()
        for depth in self._depths.values():
            depth.awaiting, depth.clock, depth.beat, depth.frame = True, 0, 0, b""
        self._end_audit(0)

    def identity(self, frame: bytes) -> bytes | None:
        return None if frame.startswith(_OF_ONE_CONNECTION) else super().identity(frame)

    def unrouted(self, frame: bytes) -> None:
        envelope = _decode_envelope(frame)
        if (handle := self._handlers.get(envelope.type)) is not None:
            self.take_route(frame, handle)
        elif envelope.type == "subscriptions":
            self._replied(envelope.channels)
        elif envelope.type == "error":
            self._failed(envelope)
        else:
            raise FrameError("unhandled_event", envelope.type)

    def _replied(self, channels: Sequence[_Channel]) -> None:
        """A reply lists all that is subscribed on the connection now."""
        if not self._requests:
            if not self.open_world:
                self.emit.counters["reply_without_request"] += 1
            return
        listed = {(_SAME_CHANNEL.get(c.name, c.name), ticker) for c in channels for ticker in c.product_ids}
        request = self._requests.popleft()
        names = request.names
        if request.what == "unsubscribe":
            return
        later = next((i for i, other in enumerate(self._requests) if _is_met(other, listed)), -1)
        if later >= 0 and not _is_met(request, listed):  # then it answers that one, and those before had no answer
            self.emit.counters["request_unanswered"] += later + 1
            for _ in range(later + 1):
                names = self._requests.popleft().names
        missing = [name for name in names if not listed.issuperset(_subscriptions(name))]
        self.acknowledge([name for name in names if name not in missing], time.time_ns())
        self.refuse(missing, "left out of the reply to subscribe")

    def _failed(self, envelope: _Envelope) -> None:
        """An error does not say which request it answers, and the whole request failed: find out what was wrong in it."""
        text = f"{envelope.message}: {envelope.reason}" if envelope.reason else envelope.message
        what, names, signed = self._requests.popleft() if self._requests else ("", [], False)
        if what != "subscribe":
            raise FrameError("venue_error", text)
        if signed and "auth" in text.lower():
            if self._credentials:
                self._without_credentials(text)
            self.subscribe([_public(name) for name in names])
            return
        words = envelope.reason.split()
        blamed = [name for name in names if name.partition(":")[2] in words] or (names if len(names) == 1 else [])
        self.refuse(blamed, text)
        rest = [name for name in names if name not in blamed]
        for part in [rest] if blamed else [rest[: len(rest) // 2], rest[len(rest) // 2 :]]:
            if part:
                self.subscribe(part)

    # Trades

    def _on_match(self) -> Decode:
        decode, emit_trade, get = _decode_match, self.emit.trade, self.trade_syncs.get

        def on_match(frame: bytes) -> None:
            match = decode(frame)
            sync = get(match.product_id) or self._trades_of(match.product_id)
            seq, timestamp = match.trade_id, (match.time - _EPOCH) // _MICROSECOND
            side = SELL if match.side == "buy" else BUY
            if seq == sync.last + 1:
                emit_trade(sync.instrument, timestamp, side, match.price, match.size, seq)
                sync.last, sync.last_time = seq, timestamp
            else:
                sync.publish([(seq, timestamp, side, match.price, match.size, b"")])

        return on_match

    def _trades_of(self, ticker: str) -> TradeSync:
        self.admit(ticker)
        return self.trade_sync(ticker)

    def _on_heartbeat(self, frame: bytes) -> None:
        """A trade that two heartbeats name was missed: one alone may overtake it, or be nonsense."""
        heartbeat = _decode_heartbeat(frame)
        timestamp, sync = _us(heartbeat.time), self._trades_of(heartbeat.product_id)
        if (depth := self._depths.get(heartbeat.product_id)) is not None:
            depth.beat = timestamp
        before = self._told.get(heartbeat.product_id, -1)
        self._told[heartbeat.product_id] = heartbeat.last_trade_id
        sync.newest(min(before, heartbeat.last_trade_id), timestamp)

    # Books

    def _depth(self, ticker: str) -> _Depth:
        self.admit(ticker)
        depth = self._depths[ticker] = _Depth(self.book(ticker, follows))
        return depth

    def _on_update(self) -> Decode:
        decode, get = _decode_update, self._depths.get

        def on_update(frame: bytes) -> None:
            update = decode(frame)
            depth = get(update.product_id) or self._depth(update.product_id)
            timestamp = _us(update.time)
            if timestamp > depth.clock:
                depth.clock = timestamp
            elif not self._is_next(depth, timestamp, frame):
                return
            depth.frame = frame
            if depth.awaiting:
                self.emit.counters["book_superseded"] += 1
                return
            id_ = depth.newest = timestamp if timestamp > depth.newest else depth.newest + 1
            bids: list[tuple[float, float]] = []
            asks: list[tuple[float, float]] = []
            for side, price, size in update.changes:
                if side == "buy":
                    bids.append((price, size))
                else:
                    asks.append((price, size))
            depth.sync.delta(id_, id_, -1, timestamp, bids, asks)
            if depth.touched is not None:
                depth.touched.update((side == "buy", price) for side, price, _ in update.changes)

        return on_update

    def _is_next(self, depth: _Depth, timestamp: int, frame: bytes) -> bool:
        """Whether a message that is not newer than the one before it is to be applied."""
        now_us = self.emit.rcv_us
        if self.overlapping:
            self._overlapped_us = now_us
        if frame == depth.frame:
            self.emit.counters["book_duplicate"] += 1
            return False
        if not timestamp or timestamp == depth.clock:
            return True
        if now_us - self._overlapped_us < OVERLAP_TAIL_US:  # the other connection was ahead
            self.emit.counters["book_duplicate"] += 1
            return False
        depth.sync.distrust("order", (timestamp - 1, timestamp - 1))
        return False

    def _on_snapshot(self, frame: bytes) -> None:
        snapshot = _decode_snapshot(frame)
        ticker = snapshot.product_id
        depth = self._depths.get(ticker) or self._depth(ticker)
        timestamp = 0 if snapshot.time is None else _us(snapshot.time)
        if self.overlapping:
            self._overlapped_us = self.emit.rcv_us
            if depth.sync.state is LIVE:
                self._catch_up(depth, timestamp, snapshot)
                return
        id_ = max(timestamp, depth.newest + 1)
        depth.sync.snapshot(id_, timestamp, snapshot.bids, snapshot.asks, in_band=True)
        depth.newest, depth.frame, depth.awaiting = id_, b"", False
        # What follows in the stream is applied whatever its time says, but for what an older connection brings.
        depth.clock = timestamp if self.overlapping else 0
        depth.horizon = _worst(snapshot.bids, snapshot.asks)
        depth.loads += 1
        depth.sync.proven = (id_, timestamp or self.emit.rcv_us)
        self._resubscribe.pop(ticker, None)

    def _catch_up(self, depth: _Depth, timestamp: int, snapshot: Snapshot) -> None:
        """A new connection begins beside the old one: where it is ahead, go to its state by the levels that differ."""
        if timestamp <= depth.newest:
            return
        worst_bid, worst_ask = _worst(snapshot.bids, snapshot.asks)
        changes: list[list[tuple[float, float]]] = []
        for mine, theirs in zip(depth.sync.book(), (dict(snapshot.bids), dict(snapshot.asks)), strict=True):
            gone = [(price, 0.0) for price in mine if worst_bid <= price <= worst_ask and price not in theirs]
            changes.append([*gone, *((price, size) for price, size in theirs.items() if mine.get(price, 0.0) != size)])
        depth.newest = depth.clock = timestamp
        depth.loads += 1  # an audit ends: changes of until now that the old connection still brings are not noted
        if any(changes):
            depth.sync.delta(timestamp, timestamp, -1, timestamp, changes[0], changes[1])

    def _lost(self, frame: bytes) -> None:
        """A frame was refused: if it may be of a book, what it changed is not known, and no number will tell.

        One that is cut off before the end of its product's name may be of any book.
        """
        kind, product = _TYPE.search(frame), _PRODUCT.search(frame)
        if kind is None or not any(name.startswith(kind[1]) for name in _OF_BOOKS):
            return
        named = product[1].decode(errors="replace") if product else ""
        for ticker, depth in self._depths.items():
            if named in ("", ticker):
                depth.sync.distrust("refused", (depth.sync.last_id, depth.sync.last_time))

    def want_snapshot(self, book: BookSync) -> None:
        """One comes only after leaving and taking the channel again."""
        self._resubscribe.setdefault(book.instrument.ticker, 0)

    # Audits of books

    def _audit_due(self, now_ns: int) -> None:
        """Bring the audit that runs a step forward, or begin the next one."""
        audit = self._audit
        if audit is None:
            if now_ns >= self._audit_at_ns and (depth := self._next_to_audit()) is not None:
                depth.touched = set()
                self._audit = _Audit(depth, now_ns)
            return
        depth, ticker = audit.depth, audit.depth.sync.instrument.ticker
        touched = depth.touched or ()
        if depth.sync.state is not LIVE or depth.loads != audit.loads or len(touched) > TOUCHED_MAX:
            self._end_audit(now_ns)  # the book begins anew, or changes too fast
        elif not audit.is_asked and now_ns - audit.began_ns > AUDIT_LEAD_NS:
            audit.is_asked = True
            path = f"/products/{quote(ticker)}/book?level=2"
            self.wants.append(Fetch(f"audit {ticker}", path, 1, lambda body: self._take_audit(audit, body)))
        elif audit.is_answered and max(depth.clock, depth.beat - BEAT_AHEAD_US) >= audit.time_us:
            self._compare(audit)
            self._end_audit(now_ns)
        elif now_ns - audit.began_ns > AUDIT_MOST_NS:
            self.emit.counters["book_audit_given_up"] += 1
            self._end_audit(now_ns)

    def _next_to_audit(self) -> _Depth | None:
        """The live book whose turn it is."""
        self._to_audit += [ticker for ticker in self._depths if ticker not in self._to_audit]
        for _ in range(len(self._to_audit)):
            self._to_audit.rotate(-1)
            depth = self._depths[self._to_audit[-1]]
            if depth.sync.state is LIVE and not depth.awaiting:
                return depth
        return None

    def _end_audit(self, now_ns: int) -> None:
        if self._audit is not None:
            self._audit.depth.touched = None
            self._audit_at_ns = now_ns + max(AUDIT_EVERY_NS, AUDIT_COST * self._audit.cost_ns)
            self._audit = None

    def _take_audit(self, audit: _Audit, body: bytes) -> None:
        if audit is not self._audit:
            return
        began = time.perf_counter_ns()
        book = decode_body(_decode_book, body)
        if book.time is None or book.auction_mode:  # of an unknown moment; indicative prices
            self.emit.counters["book_audit_unusable"] += 1
            self._end_audit(self.emit.rcv_us * 1000)
            return
        audit.answer = {price: size for price, size, _ in book.bids}, {price: size for price, size, _ in book.asks}
        audit.time_us, audit.is_answered = _us(book.time), True
        audit.cost_ns = time.perf_counter_ns() - began

    def _compare(self, audit: _Audit) -> None:
        """Levels that nothing changed since the audit began are the same here and there."""
        began, depth, counters = time.perf_counter_ns(), audit.depth, self.emit.counters
        touched, (worst_bid, worst_ask) = depth.touched or set(), depth.horizon
        if audit.time_us < audit.began_at[1]:
            counters["book_audit_outdated"] += 1
            return
        bids, asks = audit.answer
        floor = max(worst_bid, min(bids, default=0.0))
        ceiling = min(worst_ask, max(asks, default=PRICE_MAX))
        wrong: list[str] = []
        for is_bid, mine, theirs in zip((True, False), depth.sync.book(), audit.answer, strict=True):
            for price in mine.keys() | theirs.keys():
                differs = mine.get(price) != theirs.get(price)
                if differs and floor <= price <= ceiling and (is_bid, price) not in touched:
                    wrong.append(f"{'bid' if is_bid else 'ask'} {price}: {mine.get(price)}, not {theirs.get(price)}")
        audit.cost_ns += time.perf_counter_ns() - began
        if wrong:
            counters["book_audit_failed"] += 1
            self.emit.samples["book_audit_failed"] = f"{depth.sync.instrument.ticker} {len(wrong)} levels, {wrong[0]}"
            depth.sync.distrust("audit")
        else:
            counters["book_audited"] += 1
            depth.sync.proven = audit.began_at

    # Tickers

    def _on_ticker(self) -> Decode:
        known, emit = self._priced, self.emit

        def on_ticker(frame: bytes) -> None:
            t = _decode_ticker(frame)
            found = known.get(t.product_id)
            if found is None:
                self.admit(t.product_id)
                found = known[t.product_id] = emit.instrument(t.product_id), [-1, -1]
            instrument, newest = found
            timestamp = _us(t.time)
            if t.sequence <= newest[0] and timestamp <= newest[1]:  # a subscription begins with the last one
                emit.counters["ticker_duplicate"] += 1
                return
            values = {
                "last": t.price, "open_24h": t.open_24h, "high_24h": t.high_24h, "low_24h": t.low_24h,
                "volume_24h": t.volume_24h, "bid_price": t.best_bid, "ask_price": t.best_ask,
            }  # fmt: skip
            given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
            emit.ticker(instrument, timestamp, **given)
            newest[:] = t.sequence, timestamp
            if t.best_bid_size is not None and t.best_ask_size is not None:
                bid, bid_size = _side(t.best_bid, t.best_bid_size)
                ask, ask_size = _side(t.best_ask, t.best_ask_size)
                emit.bbo(instrument, timestamp, bid, bid_size, ask, ask_size, t.sequence)

        return on_ticker

    # HTTP

    def want_repair(self, ticker: str, first: int, last: int) -> None:
        """Pages go back from `after`, which is not in them."""
        count = min(last - first + 1, TRADES_PER_REQUEST)
        path = f"/products/{quote(ticker)}/trades?after={first + count}&limit={count}"
        self.wants.append(Fetch(f"trades {ticker} {first}", path, 1))

    def probe(self, stream: Stream) -> Fetch | None:
        """A trade is a match, makes a ticker and changes the book: the newest one should show on every channel."""
        return Fetch(f"probe {stream.name}", f"/products/{quote(stream.ticker)}/trades?limit=1", 1)

    def newest_us(self, stream: Stream, body: bytes) -> int:
        return max((_us(t.time) for t in decode_body(_decode_trades, body)), default=0)

    def http(self, url: str, body: bytes) -> None:
        parts = urlsplit(url)
        path, query = parts.path.split("/"), parse_qs(parts.query)
        if path[-1] == "trades" and len(path) == 4 and {"after", "limit"} <= query.keys():
            ticker = unquote(path[2])
            self.admit(ticker)
            trades = [_trade_row(t) for t in decode_body(_decode_trades, body)]
            after, limit = (_whole(query[name][0]) for name in ("after", "limit"))
            self.trade_sync(ticker).repaired(after - limit, trades)
        elif path[-1] == "products":
            self.take_instruments(url, body)
        elif path[-1] != "time":
            raise FrameError("unhandled_url", url)

    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        what, ticker = fetch.key.split(" ")[:2]
        reason = f"HTTP {status} {body[:200].decode(errors='replace')}"
        if what == "audit":
            self.emit.counters["book_audit_refused"] += 1
            self.notes[f"audit of {ticker} refused"] = reason
            self._end_audit(self.emit.rcv_us * 1000)
        else:
            self.emit.counters["trade_repair_refused"] += 1
            self.notes[f"repair of {ticker} refused"] = reason


def _subscriptions(name: str) -> list[tuple[str, str]]:
    """Channel and product of everything that a stream subscribes to."""
    channel, _, ticker = name.partition(":")
    return [(each, ticker) for each in _CHANNELS.get(channel, (channel,))]


def _is_met(request: _Request, listed: set[tuple[str, str]]) -> bool:
    """Whether a reply that lists this may be the answer to a request to subscribe."""
    return request.what == "subscribe" and all(listed.issuperset(_subscriptions(name)) for name in request.names)


def _public(name: str) -> str:
    """The stream that everybody may have instead of one that needs a login."""
    channel, _, ticker = name.partition(":")
    return f"{_BOOK}:{ticker}" if channel == _RAW_BOOK else name


def _parts(names: Sequence[str]) -> list[list[str]]:
    return [list(names[i : i + STREAMS_PER_REQUEST]) for i in range(0, len(names), STREAMS_PER_REQUEST)]


def _trade_row(t: _RestTrade) -> TradeRow:
    return t.trade_id, _us(t.time), SELL if t.side == "buy" else BUY, t.price, t.size, b""


def _side(price: float | None, size: float) -> tuple[float, float]:
    """Best price and quantity of a side; NaN and 0 where it has no orders."""
    return (float("nan"), 0.0) if price is None or not size else (price, size)


def _worst(bids: Pairs, asks: Pairs) -> tuple[float, float]:
    return min((price for price, _ in bids), default=0.0), max((price for price, _ in asks), default=PRICE_MAX)


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise FrameError("unhandled_url", text)
    return int(text)


VENUES = (CoinbaseExchange,)
