"""Bybit v5: spot, linear (USDT and USDC), inverse and options, one connection for each category.

Documentation: github.com/bybit-exchange/docs, `docs/v5` (ws/connect, websocket/public, market, rate-limit, error), read at
2026-07-24. A book begins with a snapshot on its own topic and its `u` grows by one with every change; a new snapshot may
come at any time. Trades have ids but no counter: what a lost connection cost is recorded by time and asked for over
REST. Tickers of derivatives carry only what changed.
"""

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import msgspec

from mdcollector.continuity import HOLE, LIVE, NEXT, OLD, BookSync, TradeIds, TradeRow
from mdcollector.emit import QTY_MAX, Emit
from mdcollector.errors import ConfigError, FrameError, RateLimited
from mdcollector.exchanges import (
    ROUTES_MAX,
    Fetch,
    Id,
    InstrumentInfo,
    Limits,
    Options,
    Quantity,
    Send,
    Stream,
    Venue,
    decode_body,
)
from mdcollector.records import BUY, SELL, Exchange

ARGS_CHARS_MAX = 21_000  # the `args` of all subscriptions of a public connection, as text; 2026-07
PING_EVERY_NS = 20_000_000_000  # the venue asks for one each 20 s; without any it closes after 10 minutes; 2026-07
REPLY_WITHIN_NS = 60_000_000_000  # a request that nobody answered is forgotten
RESUBSCRIBE_EVERY_NS = 500_000_000  # topics that need a snapshot are resubscribed together
RESUBSCRIBE_RETRY_NS = 15_000_000_000  # a snapshot that did not come is asked for again
BANNED_S = 600.0  # HTTP 403 "access too frequent": stop, and wait for at least 10 minutes; rate-limit page, 2026-07
# Values of retCode under HTTP 200 that mean "not now", and how long nobody asks: too many visits (limits count per second;
# the header with the reset time is that of an account); server error; system protection. error page, 2026-07
_NOT_NOW_S = {10006: 5.0, 10016: 10.0, 10429: 10.0}
INSTRUMENTS_PER_PAGE = 1000
OPTION_COINS_PATH = "/v5/market/option-base-coins"  # options are listed one base coin at a time; 2026-09
OLD_RUN_MAX = 100  # so many old messages in a row: then it is the own sequence that is wrong, and the next one is taken
_SIDES = {"Buy": BUY, "Sell": SELL}
_ALREADY = "already subscribed"
_NOTHING = msgspec.Raw(b"")
_NAN = math.nan

TimeMs = Annotated[int, msgspec.Meta(ge=0, lt=4_102_444_800_000)]
Pairs = list[tuple[float, Quantity]]

_INTERVALS = {
    "1": "1m", "3": "3m", "5": "5m", "15": "15m", "30": "30m", "60": "1h", "120": "2h", "240": "4h", "360": "6h",
    "720": "12h", "D": "1d", "W": "1w", "M": "1M",
}  # fmt: skip
_RESOLUTIONS = {text: resolution for resolution, text in _INTERVALS.items()}

# Field of a ticker -> column. Options have names of their own for the best prices.
_TICKER_COLUMNS = {
    "lastPrice": "last", "prevPrice24h": "open_24h", "highPrice24h": "high_24h", "lowPrice24h": "low_24h",
    "volume24h": "volume_24h", "turnover24h": "quote_volume_24h", "bid1Price": "bid_price", "ask1Price": "ask_price",
    "bidPrice": "bid_price", "askPrice": "ask_price", "markPrice": "mark_price", "indexPrice": "index_price",
    "fundingRate": "funding_rate", "openInterest": "open_interest",
}  # fmt: skip


class _Levels(msgspec.Struct, gc=False):
    s: str
    b: Pairs
    a: Pairs
    u: Id
    seq: Id = 0


class Book(msgspec.Struct, gc=False):
    """{"topic":"orderbook.50.BTCUSDT","type":"delta","ts":..,"data":{"s":..,"b":[["1.5","2"]],"a":[],"u":..,"seq":..},"cts":..}"""

    type: str
    ts: TimeMs
    data: _Levels
    cts: TimeMs = 0  # the matching engine's time; frames before 2024 have none


class Trade(msgspec.Struct, gc=False):
    """{"T":1672304486865,"s":"BTCUSDT","S":"Buy","v":"0.001","p":"16578.50","L":"PlusTick","i":"20f4...","BT":false,"seq":1}"""

    T: TimeMs
    s: str
    S: str
    v: Quantity
    p: float
    i: str
    BT: bool = False


class Trades(msgspec.Struct, gc=False):
    """{"topic":"publicTrade.BTCUSDT","type":"snapshot","ts":1672304486868,"data":[...]}; up to 1024 trades"""

    data: list[Trade]


_Text = str | int | float | bool | None


class Ticker(msgspec.Struct, gc=False):
    """{"topic":"tickers.BTCUSDT","type":"delta","data":{"symbol":"BTCUSDT","bid1Price":"1.5"},"cs":24987956059,"ts":..}"""

    type: str
    ts: TimeMs
    data: dict[str, _Text]
    cs: Id = 0


class _Bar(msgspec.Struct, gc=False):
    start: TimeMs
    open: float
    high: float
    low: float
    close: float
    volume: Quantity
    turnover: Quantity
    confirm: bool
    timestamp: TimeMs


class Kline(msgspec.Struct, gc=False):
    """{"topic":"kline.5.BTCUSDT","data":[{"start":..,"end":..,"interval":"5","open":"1",..,"confirm":false,..}],"ts":..}"""

    data: list[_Bar]


class _Forced(msgspec.Struct, gc=False):
    T: TimeMs
    s: str
    S: str
    v: Quantity
    p: float


class Liquidations(msgspec.Struct, gc=False):
    """{"topic":"allLiquidation.ROSEUSDT","ts":..,"data":[{"T":..,"s":"ROSEUSDT","S":"Sell","v":"20000","p":"0.04499"}]}"""

    data: list[_Forced]


class _Topics(msgspec.Struct):
    failTopics: list[str] = []  # noqa: N815 (the venue's name)
    successTopics: list[str] = []  # noqa: N815 (the venue's name)


class _Envelope(msgspec.Struct):
    """Any message; only what tells them apart."""

    topic: str = ""
    op: str = ""
    success: bool | None = None
    ret_msg: str = ""
    req_id: str | int = ""
    type: str = ""
    data: msgspec.Raw = _NOTHING


class _Status(msgspec.Struct):
    retCode: int  # noqa: N815 (the venue's name)
    retMsg: str = ""  # noqa: N815 (the venue's name)


class _RestTrade(msgspec.Struct):
    """{"execId":"2100","symbol":"BTCUSDT","price":"16618.49","size":"0.00012","side":"Buy","time":"1672052955758",...}"""

    execId: str  # noqa: N815 (the venue's name)
    symbol: str
    price: float
    size: Quantity
    side: str
    time: TimeMs


class _RestTradeList(msgspec.Struct):
    list: list[_RestTrade]


class _RestTrades(msgspec.Struct):
    result: _RestTradeList


class _PriceFilter(msgspec.Struct):
    tickSize: float = _NAN  # noqa: N815 (the venue's name)


class _LotSize(msgspec.Struct):
    qtyStep: float = _NAN  # noqa: N815 (the venue's name)
    basePrecision: float = _NAN  # noqa: N815 (spot's name for it)


class _Phase(msgspec.Struct):
    curAuctionPhase: str = ""  # noqa: N815 (the venue's name)


class _TimeResult(msgspec.Struct):
    """{"timeSecond":"1688639403","timeNano":"1688639403423213947"}"""

    timeNano: Annotated[int, msgspec.Meta(gt=0, lt=4_102_444_800_000_000_000)]  # noqa: N815 (the venue's name)


class _Time(msgspec.Struct):
    result: _TimeResult


class _Instrument(msgspec.Struct):
    symbol: str
    status: str = ""
    baseCoin: str = ""  # noqa: N815 (the venue's name)
    quoteCoin: str = ""  # noqa: N815 (the venue's name)
    contractType: str = ""  # noqa: N815 (the venue's name)
    launchTime: int = 0  # noqa: N815 (the venue's name)
    deliveryTime: int = 0  # noqa: N815 (the venue's name)
    priceFilter: _PriceFilter = msgspec.field(default_factory=_PriceFilter)  # noqa: N815 (the venue's name)
    lotSizeFilter: _LotSize = msgspec.field(default_factory=_LotSize)  # noqa: N815 (the venue's name)
    preListingInfo: _Phase | None = None  # noqa: N815 (the venue's name)


class _OptionCoin(msgspec.Struct):
    """{"baseCoin":"BTC","quoteCoin":"USDT","settleCoin":"USDT","optionOnlineTime":1739952000000,"hasSymbol":1,...}"""

    baseCoin: str  # noqa: N815 (the venue's name)
    hasSymbol: int = 1  # noqa: N815 (the venue's name)
    symbol: str = ""  # of an instrument, whose list begins alike


class _OptionCoinList(msgspec.Struct):
    list: list[_OptionCoin]


class _OptionCoins(msgspec.Struct):
    result: _OptionCoinList


class _InstrumentList(msgspec.Struct):
    list: list[_Instrument]
    category: str = ""
    nextPageCursor: str | None = None  # noqa: N815 (the venue's name)


class _Instruments(msgspec.Struct):
    result: _InstrumentList


def _decoder(kind: type[Any]) -> Callable[[bytes], Any]:
    """Numbers in text become floats and integers in the C core."""
    return msgspec.json.Decoder(kind, strict=False).decode


_decode_book, _decode_trades, _decode_ticker = _decoder(Book), _decoder(Trades), msgspec.json.Decoder(Ticker).decode
_decode_kline, _decode_liquidations = _decoder(Kline), _decoder(Liquidations)
_decode_envelope, _decode_topics = msgspec.json.Decoder(_Envelope).decode, msgspec.json.Decoder(_Topics).decode
_decode_status, _decode_time, _decode_rest_trades = _decoder(_Status), _decoder(_Time), _decoder(_RestTrades)
_decode_instruments, _decode_option_coins = _decoder(_Instruments), _decoder(_OptionCoins)

# What two connections word differently in a message that says the same: when the gateway sent it, and its own number.
_VOLATILE = re.compile(rb'"ts":\d+,?|"id":"[^"]*",?')


def follows(last_id: int, _first: int, last: int, _prev: int) -> int:
    """`u` grows by one with every message of a topic."""
    if last <= last_id:
        return OLD
    return NEXT if last == last_id + 1 else HOLE


def _side(word: str) -> int:
    """BUY or SELL of a trade; FrameError for any other word."""
    side = _SIDES.get(word)
    if side is None:
        raise FrameError("unknown_side", word)
    return side


def _row(timestamp_ms: int, side: str, price: float, qty: float, trade_id: str) -> TradeRow:
    if not trade_id:
        raise FrameError("absurd_trade_id", "empty")
    return -1, timestamp_ms * 1000, _side(side), price, qty, trade_id.encode()


def _checked_body(body: bytes) -> bytes:
    """The body of an answer that went well; RateLimited or FrameError when the venue says otherwise."""
    status = decode_body(_decode_status, body)
    if status.retCode in _NOT_NOW_S:
        raise RateLimited(_NOT_NOW_S[status.retCode], f"retCode {status.retCode} {status.retMsg}")
    if status.retCode:
        raise FrameError("venue_error", f"retCode {status.retCode} {status.retMsg}")
    return body


class _TickerState:
    """The merged ticker of one instrument of a category that sends only what changed."""

    __slots__ = ("cs", "hole", "last_time", "old_run", "values", "waiting")

    def __init__(self) -> None:
        self.values: dict[str, float] | None = None  # column -> value; None = unknown until the next snapshot
        self.cs = self.old_run = 0
        self.last_time = -1  # of its last row
        self.hole = ""  # cause of one that the next snapshot ends
        self.waiting: tuple[int, dict[str, float]] | None = (
            None  # snapshot of a connection that is still the second one
        )


class Bybit(Venue):
    """One public connection of one category."""

    FAMILY = "bybit"
    CATEGORY: ClassVar[str]
    BOOK_DEPTHS: ClassVar[tuple[int, ...]] = (50, 200, 1000)  # pushed each 20, 100, 200 ms; 1 is the feed bbo; 2026-07
    BOOK_DEPTH_DEFAULT: ClassVar[int] = 200
    ARGS_PER_REQUEST: ClassVar[int] = 100  # own choice: a refused request is halved until the bad topic is alone
    RECENT_TRADES: ClassVar[int] = 1000  # most that GET /v5/market/recent-trade gives; 2026-07
    TICKERS_MERGE: ClassVar[bool] = True
    QUOTED_IN_BASE: ClassVar[bool] = True  # quantities and volumes are in base units, turnovers in quote units
    WS_URL = "wss://stream.bybit.com"
    REST_URL = "https://api.bybit.com"
    TIME_PATH = "/v5/market/time"
    PREFIX = b'{"topic":"'
    RATE_LIMITED: ClassVar[Mapping[int, float]] = {403: BANNED_S}
    LIMIT_OVER_HEADER = "X-Bapi-Limit-Reset-Timestamp"  # rate-limit page, 2026-07; the time of now where none was hit
    LIMITS = Limits(
        streams_per_connection=400,  # the venue counts characters (`fits`); 400 keep one core's bursts short
        messages_per_s=10,  # own choice, the documents name none
        connects=(500, 300.0),  # per host and 5 minutes, 2026-07
        open_per_ip=1000,  # per category, 2026-07
        weight=(600, 5.0),  # requests, per IP, 2026-07
        lifetime_s=0,
    )
    KNOWN_FIELDS = frozenset(
        (
            "topic", "type", "ts", "cts", "data", "s", "b", "a", "u", "seq", "id", "T", "S", "v", "p", "L", "i", "BT",
            "RPI", "mP", "iP", "mIv", "iv", "cs", "symbol", "tickDirection", "price24hPcnt", "lastPrice",
            "prevPrice24h", "highPrice24h", "lowPrice24h", "prevPrice1h", "markPrice", "indexPrice", "openInterest",
            "openInterestValue", "singleOpenInterest", "singleOpenInterestValue", "turnover24h", "volume24h",
            "nextFundingTime", "fundingRate", "fundingIntervalHour", "fundingCap", "bid1Price", "bid1Size",
            "ask1Price", "ask1Size", "deliveryTime", "basisRate", "basis", "basisRateYear", "deliveryFeeRate",
            "predictedDeliveryPrice", "preOpenPrice", "preQty", "curPreListingPhase", "usdIndexPrice", "bidPrice",
            "bidSize", "bidIv", "askPrice", "askSize", "askIv", "markPriceIv", "underlyingPrice", "totalVolume",
            "totalTurnover", "delta", "gamma", "vega", "theta", "change24h", "start", "end", "interval", "open",
            "close", "high", "low", "volume", "turnover", "confirm", "timestamp",
        )
    )  # fmt: skip

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        super().__init__(emit, options, streams, open_world=open_world)
        self._requests: dict[str, tuple[str, list[str], int]] = {}  # req_id -> op, topics, when it was wanted
        self._request_id = 0
        self._pinged_ns = 0
        self._pong_due = False
        self._resubscribe: dict[str, int] = {}  # topic that needs a snapshot -> when it was asked for (0 = not yet)
        self._resubscribed_ns = 0
        self._handlers: dict[str, Callable[[bytes], None]] = {}
        self._depths: dict[str, str] = {}  # ticker -> depth of the topic that its book comes from
        self._best = _best_left(emit)  # ticker -> u and seq of the last row of bbo, older messages since
        self._ticker_states: dict[str, _TickerState] = {}

    def _streams_changed(self, left: Collection[str], gone: Collection[str]) -> None:
        for topic in left:
            self._handlers.pop(topic, None)
        for ticker in gone:
            self._depths.pop(ticker, None)
            self._ticker_states.pop(ticker, None)

    # Planning

    @classmethod
    def streams_of(cls, ticker: str, feeds: Sequence[str], options: Options) -> list[Stream]:
        depth = options.book_depth or cls.BOOK_DEPTH_DEFAULT
        if depth not in cls.BOOK_DEPTHS:
            raise ConfigError(
                f"book_depth: {depth} not offered by {cls.NAME}; it has {', '.join(map(str, cls.BOOK_DEPTHS))}"
            )
        names = {
            "trades": f"publicTrade.{cls.trades_of(ticker)}",
            "orderbook_l2": f"orderbook.{depth}.{ticker}",
            "bbo": f"orderbook.1.{ticker}",
            "tickers": f"tickers.{ticker}",
            "liquidations": f"allLiquidation.{ticker}",
        }
        streams = [Stream(names[feed], feed, ticker, cls._path()) for feed in feeds if feed in names]
        if "candles" in feeds:
            streams += [
                Stream(f"kline.{_RESOLUTIONS[i]}.{ticker}", "candles", ticker, cls._path()) for i in options.intervals
            ]
        return streams

    @classmethod
    def trades_of(cls, ticker: str) -> str:
        """What the trade topic of an instrument is called after."""
        return ticker

    @classmethod
    def _path(cls) -> str:
        return f"/v5/public/{cls.CATEGORY}"

    @classmethod
    def fits(cls, taken: Sequence[Stream], more: Sequence[Stream]) -> bool:
        names = {stream.name for stream in (*taken, *more)}
        chars = sum(len(name) + len('"",') for name in names) + len("[]")
        return len(names) <= cls.LIMITS.streams_per_connection and chars <= ARGS_CHARS_MAX

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        return (f"/v5/market/instruments-info?category={cls.CATEGORY}&limit={INSTRUMENTS_PER_PAGE}",)

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        found = decode_body(_decode_instruments, _checked_body(body)).result
        return [_info(i, cls.CATEGORY) for i in found.list]

    @classmethod
    def server_time(cls, body: bytes) -> tuple[int, int]:
        return decode_body(_decode_time, _checked_body(body)).result.timeNano // 1000, 1

    @classmethod
    def pages_behind(cls, path: str, body: bytes) -> list[str]:
        cursor = decode_body(_decode_instruments, body).result.nextPageCursor
        if not cursor:
            return []
        first = path.partition("&cursor=")[0]
        return [f"{first}&cursor={quote(cursor, safe='%')}"]  # cursors come ready for a URL

    # Connection

    def ws_path(self) -> str:
        return self._path()

    def opened(self) -> None:
        self._requests.clear()
        self._pinged_ns, self._pong_due = 0, False
        self.subscribe([stream.name for stream in self.streams])

    def subscribe(self, names: Sequence[str]) -> None:
        wanted = set(names)
        if not self.overlapping:  # else the other connection still delivers
            for stream in self.streams:
                if stream.feed == "trades" and stream.name in wanted and (trades := self.trade_ids.get(stream.ticker)):
                    trades.doubt("resubscribed")
                ticker = self._ticker_states.get(stream.ticker) if stream.feed == "tickers" else None
                if ticker is not None and ticker.values is not None and stream.name in wanted:
                    # What changed meanwhile is in no delta: the snapshot that comes now says it, or nothing does.
                    ticker.values, ticker.waiting, ticker.hole = None, None, "resubscribed"
        self._ask("subscribe", names)

    def unsubscribe(self, names: Sequence[str]) -> None:
        self._ask("unsubscribe", names)

    def _ask(self, op: str, names: Iterable[str]) -> None:
        topics = list(dict.fromkeys(names))
        for i in range(0, len(topics), self.ARGS_PER_REQUEST):
            self._request(op, topics[i : i + self.ARGS_PER_REQUEST])

    def _request(self, op: str, topics: list[str]) -> None:
        self._request_id += 1
        req_id = str(self._request_id)
        self._requests[req_id] = op, topics, time.time_ns()
        self.wants.append(Send(msgspec.json.encode({"req_id": req_id, "op": op, "args": topics}).decode()))

    def tick(self, now_ns: int) -> None:
        if now_ns - self._pinged_ns >= PING_EVERY_NS:
            if self._pong_due:
                self.emit.counters["pong_missing"] += 1
            self._pinged_ns, self._pong_due = now_ns, True
            self.wants.append(Send('{"req_id":"ping","op":"ping"}', urgent=True))
        for req_id, (_, _, asked_ns) in list(self._requests.items()):
            if now_ns - asked_ns > REPLY_WITHIN_NS:
                del self._requests[req_id]
                self.emit.counters["reply_missing"] += 1  # a stream that is not confirmed is asked for again by others
        for topic in [s.name for s in self.streams if s.feed == "orderbook_l2" and s.name in self._resubscribe]:
            book = self.books.get(self._tickers[topic])
            if book is None or book.state is LIVE:
                del self._resubscribe[topic]  # a late message healed it meanwhile
        due = [t for t, asked in self._resubscribe.items() if now_ns - asked > RESUBSCRIBE_RETRY_NS]
        if due and now_ns - self._resubscribed_ns > RESUBSCRIBE_EVERY_NS:
            self._resubscribed_ns = now_ns
            self._resubscribe.update(dict.fromkeys(due, now_ns))
            # A topic that is subscribed cannot be subscribed again: leave it first.
            self._ask("unsubscribe", due)
            self._ask("subscribe", due)

    def add(self, streams: Sequence[Stream], *, connected: bool) -> None:
        self._handlers.clear()
        super().add(streams, connected=connected)

    def remove(self, tickers: Collection[str], *, connected: bool) -> None:
        super().remove(tickers, connected=connected)
        self._handlers.clear()
        for ticker in tickers:
            self._ticker_states.pop(ticker, None)
            self._depths.pop(ticker, None)
        wanted = {stream.name for stream in self.streams}
        self._resubscribe = {topic: asked for topic, asked in self._resubscribe.items() if topic in wanted}

    def disconnected(self, cause: str) -> None:
        super().disconnected(cause)
        self._handlers.clear()
        for state in self._ticker_states.values():  # what changes meanwhile comes with the next snapshot only
            state.values, state.waiting, state.hole = None, None, ""
        self._depths.clear()
        self._resubscribe.clear()  # the new connection begins every book with a snapshot

    def unrouted(self, frame: bytes) -> None:
        envelope = _decode_envelope(frame)
        if envelope.topic:
            handle = self._handlers.get(envelope.topic)
            if handle is None:
                handle = self.watched(envelope.topic, self._handler(envelope.topic))
                if len(self._handlers) < ROUTES_MAX:
                    self._handlers[envelope.topic] = handle
                self.take_route(frame, handle)
            else:  # the names in these frames come in another order
                handle(frame)
        elif envelope.op == "pong" or (envelope.op == "ping" and envelope.success):
            self._pong_due = False
        elif envelope.op in ("subscribe", "unsubscribe") or envelope.type == "COMMAND_RESP":
            self._reply(envelope)
        else:
            raise FrameError("unhandled_event", envelope.op or envelope.type)

    def identity(self, frame: bytes) -> bytes | None:
        return _VOLATILE.sub(b"", frame) if b'"topic":"' in frame[:200] else None

    # Replies

    def _reply(self, envelope: _Envelope) -> None:
        """A reply names its request, or (options) each topic; it may come long behind the first data."""
        if envelope.type == "COMMAND_RESP":
            self._reply_by_topic(envelope)
            return
        op, topics, _ = self._requests.pop(str(envelope.req_id), ("", [], 0))
        if not op:
            if not self.open_world:
                raise FrameError("unknown_reply", f"{envelope.req_id} {envelope.ret_msg}")
        elif op != "subscribe":
            if not envelope.success:
                raise FrameError("venue_error", f"{op}: {envelope.ret_msg}")
        elif envelope.success or (len(topics) == 1 and _ALREADY in envelope.ret_msg):
            self.acknowledge(topics, time.time_ns())
        else:  # one bad topic fails all of them
            self.refuse_batch(topics, envelope.ret_msg)

    def _reply_by_topic(self, envelope: _Envelope) -> None:
        topics = _decode_topics(envelope.data) if len(envelope.data) else _Topics()
        named = {*topics.successTopics, *topics.failTopics}
        req_id, op = next(
            ((r, op) for r, (op, asked, _) in self._requests.items() if named and named <= set(asked)), ("", "")
        )
        if not op and not self.open_world:
            raise FrameError("unknown_reply", ", ".join(sorted(named)))
        self._requests.pop(req_id, None)
        if op == "subscribe":
            self.acknowledge(topics.successTopics, time.time_ns())
            self.refuse(topics.failTopics, envelope.ret_msg or "named in failTopics")

    # Data

    def _handler(self, topic: str) -> Callable[[bytes], None]:
        """What decodes the frames of a topic; FrameError when its instrument or kind is not wanted."""
        kind, _, rest = topic.partition(".")
        what, _, ticker = rest.partition(".")
        if kind in ("publicTrade", "tickers", "allLiquidation"):
            what, ticker = "", rest
        feed = {"publicTrade": "trades", "tickers": "tickers", "allLiquidation": "liquidations", "kline": "candles",
                "orderbook": "bbo" if what == "1" else "orderbook_l2"}.get(kind, "")  # fmt: skip
        if feed not in self.FEEDS or not ticker or "." in ticker:
            raise FrameError("unhandled_topic", topic)
        if feed == "trades":
            return self._on_trades(ticker)
        if feed == "candles" and what in _INTERVALS:
            return self._on_kline(ticker, _INTERVALS[what].encode())
        if feed == "orderbook_l2" and what.isdecimal():
            return self._on_book(ticker, what)
        makers = {"bbo": self._on_best, "tickers": self._on_ticker, "liquidations": self._on_liquidations}
        if feed not in makers:
            raise FrameError("unhandled_topic", topic)  # orderbook.full and orderbook.rpi among them: other levels
        return makers[feed](ticker)

    def _on_trades(self, ticker: str) -> Callable[[bytes], None]:
        self.admit(ticker)
        trades, side_of = self.trades_by_id(ticker), _SIDES.get
        publish_new = trades.publish_new

        def on_trades(frame: bytes) -> None:
            try:
                data = _decode_trades(frame).data
                if len(data) == 1:
                    t = data[0]
                    side, trade_id = side_of(t.S), t.i.encode()
                    if side and trade_id and t.s == ticker and publish_new(t.T * 1000, side, t.p, t.v, trade_id):
                        return
                rows = []
                for t in data:
                    if t.s != ticker:
                        raise FrameError("unknown_symbol", f"{t.s} among the trades of {ticker}")
                    rows.append(_row(t.T, t.S, t.p, t.v, t.i))
                trades.publish(rows)
            except (FrameError, msgspec.DecodeError, RecursionError):
                self._lost_trades([trades])
                raise

        return on_trades

    def _lost_trades(self, hit: Iterable[TradeIds]) -> None:
        """A frame of theirs cannot be read, and no counter will tell what was in it."""
        for trades in hit:
            trades.doubt("refused")
            if trades.unproven:
                trades.want_tail()

    def _on_book(self, ticker: str, depth: str) -> Callable[[bytes], None]:
        self.admit(ticker)
        if self._depths.setdefault(ticker, depth) != depth:
            raise FrameError("second_book_topic", f"orderbook.{depth}.{ticker}: it comes from {self._depths[ticker]}")
        book, topic = self.book(ticker, follows), f"orderbook.{depth}.{ticker}"

        def on_book(frame: bytes) -> None:
            event = _decode_book(frame)
            data, timestamp = event.data, (event.cts or event.ts) * 1000
            u = data.u
            if data.s != ticker:
                raise FrameError("unknown_symbol", f"{data.s} in the book of {ticker}")
            if event.type == "delta" and u != 1:
                book.delta(u, u, -1, timestamp, data.b, data.a)
            elif event.type not in ("delta", "snapshot"):
                raise FrameError("unknown_book_type", event.type)
            elif u != 1 and self.overlapping and book.state is LIVE:
                self.pass_over(book, u)
            else:
                book.snapshot(u, timestamp, data.b, data.a, in_band=True)
                self._resubscribe.pop(topic, None)

        return on_book

    def _on_best(self, ticker: str) -> Callable[[bytes], None]:
        self.admit(ticker)
        instrument, emit_bbo, best = self.emit.instrument(ticker), self.emit.bbo, self._best
        counters = self.emit.counters

        def on_best(frame: bytes) -> None:
            event = _decode_book(frame)
            data = event.data
            if event.type != "snapshot":
                raise FrameError("unknown_book_type", f"{event.type} of orderbook.1")
            if data.s != ticker:
                raise FrameError("unknown_symbol", f"{data.s} in the best prices of {ticker}")
            u, seq, old_run = best.get(ticker, (-1, 0, 0))
            if data.u == u:
                counters["bbo_repeated"] += 1  # each 3 s in which nothing changes
                return
            if data.u < u and data.seq < seq and old_run < OLD_RUN_MAX:
                best[ticker] = u, seq, old_run + 1
                counters["bbo_superseded"] += 1  # a second connection that is behind
                return
            bid, bid_qty = data.b[0] if data.b else (_NAN, 0.0)
            ask, ask_qty = data.a[0] if data.a else (_NAN, 0.0)
            emit_bbo(instrument, (event.cts or event.ts) * 1000, bid, bid_qty, ask, ask_qty, data.u)
            best[ticker] = data.u, data.seq, 0

        return on_best

    def _on_ticker(self, ticker: str) -> Callable[[bytes], None]:
        self.admit(ticker)
        instrument = self.emit.instrument(ticker)

        state = self._ticker_states.setdefault(ticker, _TickerState())

        def on_ticker(frame: bytes) -> None:
            try:
                event = _decode_ticker(frame)
                if event.data.get("symbol") != ticker:
                    raise FrameError("unknown_symbol", f"{event.data.get('symbol')} in the ticker of {ticker}")
                values = self._ticker_values(event.data)
                if event.type != "snapshot" and not (event.type == "delta" and self.TICKERS_MERGE):
                    raise FrameError("unknown_ticker_type", event.type)
                if self.TICKERS_MERGE:
                    merged = self._merged(ticker, state, event, values)
                    if merged is None:
                        return
                    values = merged
                given = {column: value for column, value in values.items() if value == value}
                funding = int(given.pop("next_funding_time", -1))
                if state.hole:
                    self.emit.gap(
                        "tickers", ticker, from_time=state.last_time, to_time=event.ts * 1000, cause=state.hole
                    )
                self.emit.ticker(instrument, event.ts * 1000, next_funding_time=funding, **given)
            except (FrameError, msgspec.DecodeError, RecursionError):
                if self.TICKERS_MERGE:
                    self._lost_ticker(ticker, state, "refused")
                raise
            if event.type == "snapshot":
                self._resubscribe.pop(f"tickers.{ticker}", None)
            state.values, state.cs, state.last_time, state.hole = values, event.cs, event.ts * 1000, ""

        return on_ticker

    def _lost_ticker(self, ticker: str, state: _TickerState, cause: str) -> None:
        """What changed is not known, and would be wrong until it changes again: take the topic anew, with a snapshot."""
        state.values, state.waiting, state.hole = None, None, state.hole or cause
        for stream in self.streams:
            if stream.feed == "tickers" and stream.ticker == ticker:
                self._resubscribe.setdefault(stream.name, 0)

    def _ticker_values(self, data: Mapping[str, _Text]) -> dict[str, float]:
        """Column -> value of what a message names; NaN where it says that there is none."""
        values: dict[str, float] = {}
        for name in _TICKER_COLUMNS.keys() & data.keys():
            values[_TICKER_COLUMNS[name]] = _number(name, data[name])
        for price in ("bidPrice", "askPrice"):  # options: 0 where nobody quotes
            if values.get(_TICKER_COLUMNS[price]) == 0 and price in data:
                values[_TICKER_COLUMNS[price]] = _NAN
        if "nextFundingTime" in data:
            due = _number("nextFundingTime", data["nextFundingTime"])
            values["next_funding_time"] = due * 1000 if due else _NAN
        if not self.QUOTED_IN_BASE:
            swapped = {"volume_24h": "quote_volume_24h", "quote_volume_24h": "volume_24h"}
            values = {swapped.get(column, column): value for column, value in values.items()}
        return values

    def _merged(
        self, ticker: str, state: _TickerState, event: Ticker, values: dict[str, float]
    ) -> dict[str, float] | None:
        """All values as they are after this message; None when it makes no row."""
        if event.type == "snapshot":
            if self.overlapping and state.values is not None:  # the older connection continues, until it ends
                state.waiting = event.cs, values
                return None
            state.waiting = None
            return values
        if state.values is None:
            self.emit.counters["ticker_before_snapshot"] += 1
            if state.hole:  # it is known, and a snapshot is on its way
                return None
            raise FrameError("delta_before_snapshot", ticker)
        if event.cs < state.cs and state.old_run < OLD_RUN_MAX:
            state.old_run += 1
            self.emit.counters["ticker_superseded"] += 1  # a second connection that is behind
            return None
        state.old_run = 0
        before = state.values
        if state.waiting is not None and event.cs > state.waiting[0]:
            (cs, snapshot), state.waiting = state.waiting, None
            if cs > state.cs:  # the older connection ended before it had brought all of this
                before = snapshot
        return before | values

    def _on_kline(self, ticker: str, interval: bytes) -> Callable[[bytes], None]:
        self.admit(ticker)
        instrument, emit = self.emit.instrument(ticker), self.emit

        def on_kline(frame: bytes) -> None:
            rows = []
            for c in _decode_kline(frame).data:
                volume = c.volume if self.QUOTED_IN_BASE else c.turnover
                rows.append((c.timestamp * 1000, c.start * 1000, (c.open, c.high, c.low, c.close), volume, c.confirm))
                emit.check_candle(c.timestamp * 1000, interval, c.start * 1000, rows[-1][2], volume, -1)
            for timestamp, start, ohlc, volume, closed in rows:
                emit.candle(instrument, timestamp, interval, start, ohlc, volume, -1, closed)

        return on_kline

    def _on_liquidations(self, ticker: str) -> Callable[[bytes], None]:
        self.admit(ticker)
        instrument, emit = self.emit.instrument(ticker), self.emit

        def on_liquidations(frame: bytes) -> None:
            rows = []
            for forced in _decode_liquidations(frame).data:
                if forced.s != ticker:
                    raise FrameError("unknown_symbol", f"{forced.s} among the liquidations of {ticker}")
                emit.check_liquidation(forced.T * 1000, forced.p, forced.v)
                # `S` is the side of the position that was closed: a long one is sold.
                rows.append((forced.T * 1000, SELL if _side(forced.S) == BUY else BUY, forced.p, forced.v))
            for timestamp, side, price, qty in rows:
                emit.liquidation(instrument, timestamp, side, price, qty)

        return on_liquidations

    # What is missing

    def want_snapshot(self, book: BookSync) -> None:
        """A change came that no snapshot precedes: one comes only after leaving and taking the topic again."""
        ticker = book.instrument.ticker
        for stream in self.streams:
            if stream.feed == "orderbook_l2" and stream.ticker == ticker:
                self._resubscribe.setdefault(stream.name, 0)

    def want_repair(self, ticker: str, first: int, last: int) -> None:
        raise AssertionError(f"{ticker} {first} to {last}: trades of this venue have no counter")

    def want_recent(self, trades: TradeIds) -> None:
        ticker, doubts = trades.instrument.ticker, trades.doubts
        streams = [stream for stream in self.streams if stream.feed == "trades" and stream.ticker == ticker]
        proofs = [proof for stream in streams if (proof := self.proof.get(stream.name)) is not None]
        if not trades.heard and not all(proof.is_acknowledged for proof in proofs):
            return  # asked for when the stream delivers, so that the answer and the stream meet

        def answer(body: bytes) -> None:
            trades.recent(_rest_rows(ticker, body), doubts)

        def failed(status: int, body: bytes) -> None:
            self.emit.counters["trade_repair_refused"] += 1
            self.notes[f"repair of {ticker} refused"] = f"HTTP {status} {body[:200].decode(errors='replace')}"
            trades.unanswered()

        path = self._recent_path(ticker, self.RECENT_TRADES)
        self.wants.append(Fetch(f"trades {ticker} {doubts}", path, 1, answer, failed))

    def _recent_path(self, ticker: str, limit: int) -> str:
        query = {"category": self.CATEGORY, "symbol": ticker, "limit": limit}
        return f"/v5/market/recent-trade?{urlencode(query)}"

    def probe(self, stream: Stream) -> Fetch | None:
        """A trade changes the book, the best prices, the ticker and the candles: whoever is silent since is not well."""
        if stream.feed == "liquidations":
            return None
        return Fetch(f"probe {stream.name} {stream.ticker}", self._recent_path(stream.ticker, 1), 1)

    def newest_us(self, stream: Stream, body: bytes) -> int:
        return max((row[1] for row in _rest_rows(stream.ticker, body)), default=0)

    def http(self, url: str, body: bytes) -> None:
        parts = urlsplit(url)
        endpoint, query = parts.path.rpartition("/")[2], parse_qs(parts.query)
        if endpoint == "recent-trade":
            ticker = query.get("symbol", [""])[0]
            self.admit(ticker)
            rows, trades = _rest_rows(ticker, body), self.trades_by_id(ticker)
            trades.recent(rows, trades.doubts)
        elif endpoint == "instruments-info":
            self.take_instruments(url, body)
        elif endpoint not in ("time", OPTION_COINS_PATH.rpartition("/")[2]):
            raise FrameError("unhandled_url", url)

    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        self.notes[f"{fetch.key} refused"] = f"HTTP {status} {body[:200].decode(errors='replace')}"


class BybitSpot(Bybit):
    """Spot."""

    NAME = "bybit_spot"
    CATEGORY = "spot"
    EXCHANGE = Exchange.BYBIT_SPOT
    FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles")
    INTERVALS = tuple(_RESOLUTIONS)
    ARGS_PER_REQUEST = 10  # 2026-07
    RECENT_TRADES = 60
    TICKERS_MERGE = False


class BybitLinear(Bybit):
    """Perpetuals and futures that are settled in USDT or USDC."""

    NAME = "bybit_linear"
    CATEGORY = "linear"
    EXCHANGE = Exchange.BYBIT_LINEAR
    FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles", "liquidations")
    INTERVALS = tuple(_RESOLUTIONS)


class BybitInverse(Bybit):
    """Perpetuals and futures that are settled in their base coin; quantities are in USD."""

    NAME = "bybit_inverse"
    CATEGORY = "inverse"
    EXCHANGE = Exchange.BYBIT_INVERSE
    FEEDS = BybitLinear.FEEDS
    INTERVALS = tuple(_RESOLUTIONS)
    QUOTED_IN_BASE = False


class BybitOption(Bybit):
    """Options; one trade topic for all that share a base coin, no best-price and no candle topic."""

    NAME = "bybit_option"
    CATEGORY = "option"
    EXCHANGE = Exchange.BYBIT_OPTION
    FEEDS = ("trades", "orderbook_l2", "tickers")
    BOOK_DEPTHS = (25, 100)  # pushed each 20 and 100 ms; 2026-07
    BOOK_DEPTH_DEFAULT = 100
    TICKERS_MERGE = False
    LIMITS = msgspec.structs.replace(Bybit.LIMITS, streams_per_connection=2000)  # 2026-07; quiet, most of them

    @classmethod
    def trades_of(cls, ticker: str) -> str:
        return ticker.partition("-")[0]

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        return (OPTION_COINS_PATH,)

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        return super().instruments(body) if _coins_in(body) is None else []

    @classmethod
    def pages_behind(cls, path: str, body: bytes) -> list[str]:
        coins = _coins_in(body)
        if coins is None:
            return super().pages_behind(path, body)
        return [f"{first}&baseCoin={quote(coin)}" for first in super().instruments_paths() for coin in coins]

    def _on_trades(self, ticker: str) -> Callable[[bytes], None]:
        """The topic carries every option on the base coin `ticker`."""

        def on_trades(frame: bytes) -> None:
            by_ticker: dict[str, list[TradeRow]] = {}
            try:
                for t in _decode_trades(frame).data:
                    by_ticker.setdefault(t.s, []).append(_row(t.T, t.S, t.p, t.v, t.i))
                self.emit.check_trades(
                    [(self.emit.instrument(s), r[1], *r[2:5], r[0], r[5]) for s in by_ticker if self._wants_trades_of(s)
                     for r in by_ticker[s]]
                )  # fmt: skip
            except (FrameError, msgspec.DecodeError, RecursionError):
                self._lost_trades([t for name, t in self.trade_ids.items() if self.trades_of(name) == ticker])
                raise
            for name, rows in by_ticker.items():
                if self._wants_trades_of(name):
                    self.trades_by_id(name).publish(rows)
                else:
                    self.emit.counters["trade_of_others"] += len(rows)

        return on_trades

    def _wants_trades_of(self, ticker: str) -> bool:
        return (
            self.open_world
            or ticker in self.trade_ids
            or any(stream.feed == "trades" and stream.ticker == ticker for stream in self.streams)
        )


def _coins_in(body: bytes) -> list[str] | None:
    """Coins that have options now, by the answer that names them; None where it is a list of instruments."""
    coins = decode_body(_decode_option_coins, _checked_body(body)).result.list
    if any(coin.symbol for coin in coins):
        return None
    return list(dict.fromkeys(coin.baseCoin for coin in coins if coin.hasSymbol))


def _rest_rows(ticker: str, body: bytes) -> list[TradeRow]:
    """Trades of GET /v5/market/recent-trade, which gives the newest first, oldest first: those of one millisecond keep their
    order. FrameError when they are of another instrument.
    """
    found = decode_body(_decode_rest_trades, _checked_body(body)).result.list
    for trade in found:
        if trade.symbol != ticker:
            raise FrameError("unknown_symbol", f"{trade.symbol} among the recent trades of {ticker}")
    return [_row(t.time, t.side, t.price, t.size, t.execId) for t in reversed(found)]


def _number(name: str, text: _Text) -> float:
    """A value of a ticker, smaller than QTY_MAX; NaN where the venue leaves it empty."""
    if text is None or text == "":
        return _NAN
    try:
        value = float(text) if not isinstance(text, bool) else _NAN
    except (ValueError, OverflowError):
        value = _NAN
    if not -QTY_MAX < value < QTY_MAX:
        raise FrameError("absurd_number", f"ticker {name}={str(text)[:50]}")
    return value


def _info(i: _Instrument, category: str) -> InstrumentInfo:
    kinds = {"LinearPerpetual": "perpetual", "InversePerpetual": "perpetual", "LinearFutures": "future",
             "InverseFutures": "future"}  # fmt: skip
    phase = i.preListingInfo.curAuctionPhase if i.preListingInfo is not None else ""
    step = i.lotSizeFilter.qtyStep
    return InstrumentInfo(
        i.symbol,
        i.status == "Trading" or (i.status == "PreLaunch" and phase == "ContinuousTrading"),
        kind=kinds.get(i.contractType, category),
        base=i.baseCoin,
        quote=i.quoteCoin,
        status=i.status,
        tick_size=i.priceFilter.tickSize,
        qty_step=step if step == step else i.lotSizeFilter.basePrecision,
        contract_size=1.0,  # quantities are in base coins; in USD where the category is inverse
        listed_time=i.launchTime * 1000 if i.launchTime > 0 else -1,
        expiry_time=i.deliveryTime * 1000 if i.deliveryTime > 0 else -1,
    )


def _best_left(emit: Emit) -> dict[str, tuple[int, int, int]]:
    """Update id of the last row of bbo that an earlier life of this connector published, per instrument."""
    ring, left = emit.rings.get("bbo"), dict[str, tuple[int, int, int]]()
    if ring is None or not ring.next:
        return left
    codes, ids = ring.recent_columns("ticker", "update_id")
    for code in set(codes.tolist()):
        left[ring.tickers[code]] = int(ids[codes == code][-1]), 0, 0
    return left


VENUES = (BybitSpot, BybitLinear, BybitInverse, BybitOption)
