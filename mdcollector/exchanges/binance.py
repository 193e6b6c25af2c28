"""Binance: the spot market and the USD-M futures, which speak one language with a few words of their own.

Documentation: github.com/binance/binance-spot-api-docs (`web-socket-streams.md`, `rest-api.md`), read at 2026-07-21;
developers.binance.com, derivatives, USDS-M futures, read at 2026-09, with the notice of 2026-03-06 on routed paths.
Streams are combined (`.../stream`); spot gives times in microseconds (`timeUnit=MICROSECOND`), futures in ms, and
recordings are told apart by size. Books start over HTTP; trades have a counter without holes, so a missed one is proven
and fetched.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qs, quote, urlsplit

import msgspec

from mdcollector.continuity import HOLE, LIVE, NEXT, OLD, STALE_SNAPSHOTS_MAX, BookSync, FollowRule, TradeRow, TradeSync
from mdcollector.emit import TIME_MAX_US, Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import (
    Decode,
    Fetch,
    Id,
    InstrumentInfo,
    Limits,
    Options,
    Quantity,
    Reconnect,
    Send,
    Stream,
    Time,
    Venue,
    decode_body,
)
from mdcollector.records import BUY, SELL, Exchange

SNAPSHOT_LEVELS_DEFAULT = 1000  # of at most 5000 a side on spot: a fifth of the weight; the most that futures give
TRADES_PER_REQUEST = 1000  # the most that trades, historicalTrades and aggTrades give; 2026-07
SUBSCRIBE_CHUNK = 200  # stream names in one SUBSCRIBE
# Before a snapshot that was too old is asked for again, doubled each time: answers come from a cache that may lag by
# seconds. The fifth in a row, at which what is held is no longer believed, then comes 7.5 s behind the first.
STALE_WAIT_NS = 500_000_000
OPEN_INTEREST_EVERY_S = 15.0  # of one instrument, with few of them
OPEN_INTEREST_PER_S = 5.0  # requests of weight 1 in all: an eighth of what an IP address has
PERPETUAL_DELIVERY_MS = 4_133_404_800_000  # 2100-12-25: `deliveryDate` of what has none
_MS_MAX = 100_000_000_000_000  # a larger time is in microseconds already
_NOTHING = msgspec.Raw(b"")

Pairs = list[tuple[Quantity, Quantity]]

# `X` of a futures trade. Undocumented; the others have a price that nobody could trade at, and a counter all the same
# (live measurement of 2026-08, exchange-protocols 4.3).
MARKET = "MARKET"
NO_EXECUTIONS = ("INSURANCE_FUND", "ADL", "NA")  # types of trades of futures


class Trade(msgspec.Struct, gc=False):
    """Spot: {"e":"trade","E":1672515782136,"s":"BNBBTC","t":12345,"p":"0.001","q":"100","T":...,"m":true,"M":true}
    Futures: {"e":"trade","E":...,"T":...,"s":"BTCUSDT","t":5266583935,"p":"61800.30","q":"0.006","X":"MARKET","m":false}
    """

    t: Id
    p: Quantity
    q: Quantity
    T: Time
    m: bool
    X: str = MARKET


class AggTrade(msgspec.Struct, gc=False):
    """{"e":"aggTrade","E":1672515782136,"s":"BNBBTC","a":12345,"p":"0.001","q":"100","f":100,"l":105,"T":...,"m":true}

    Futures add `nq`, the quantity without retail price improvement, and leave insurance fund and ADL trades out.
    """

    a: Id
    p: Quantity
    q: Quantity
    T: Time
    m: bool


class DepthUpdate(msgspec.Struct, gc=False):
    """{"e":"depthUpdate","E":1672515782136,"s":"BNBBTC","U":157,"u":160,"b":[["0.0024","10"]],"a":[["0.0026","100"]]}"""

    E: Time
    U: Id
    u: Id
    b: Pairs
    a: Pairs


class FuturesDepthUpdate(msgspec.Struct, gc=False):
    """{"e":"depthUpdate","E":..,"T":..,"s":"BTCUSDT","ps":"BTCUSDT","U":157,"u":160,"pu":149,"b":[],"a":[],"st":1}"""

    T: Time
    U: Id
    u: Id
    pu: Id
    b: Pairs
    a: Pairs


class BookTicker(msgspec.Struct, gc=False):
    """{"u":400900217,"s":"BNBUSDT","b":"25.35190000","B":"31.21000000","a":"25.36520000","A":"40.66000000"}

    Futures add `e`, `E`, `T`, `ps` and `st`; spot gives no time.
    """

    u: Id
    b: Quantity
    B: Quantity
    a: Quantity
    A: Quantity
    T: Time = 0


class Ticker24h(msgspec.Struct, gc=False):
    """{"e":"24hrTicker","E":...,"s":"BNBBTC","c":"0.0025","b":"0.0024","a":"0.0026","o":..,"h":..,"l":..,"v":..,"q":..}

    Futures have no best prices in it.
    """

    E: Time
    c: Quantity
    o: Quantity
    h: Quantity
    l: Quantity  # noqa: E741 (the venue's name)
    v: Quantity
    q: Quantity
    b: Quantity | None = None
    a: Quantity | None = None


class MarkPrice(msgspec.Struct, gc=False):
    """{"e":"markPriceUpdate","E":..,"s":"BTCUSDT","p":"83003.1","ap":"83003.1","P":"83198.8","i":"83045.6","r":"-0.00001012",
    "T":1790784000000,"st":1}; of a future with delivery `T` is 0, and `r` is "", or a number that says nothing."""

    E: Time
    p: Quantity
    i: Quantity
    r: float | Literal[""] | None = None
    T: Time = 0


class _Order(msgspec.Struct, gc=False):
    s: str
    S: str
    q: Quantity
    p: Quantity
    T: Time


class ForceOrder(msgspec.Struct, gc=False):
    """{"e":"forceOrder","E":..,"o":{"s":"STGUSDT","S":"SELL","o":"LIMIT","f":"IOC","q":"5","p":"0.1336","ap":"0.1355",
    "X":"FILLED","l":"5","z":"5","T":1786172556607,"ps":"STGUSDT","st":1}}; in the documents `ps` and `st` stand outside."""

    o: _Order


class _Bar(msgspec.Struct, gc=False):
    t: Time
    i: str
    o: Quantity
    c: Quantity
    h: Quantity
    l: Quantity  # noqa: E741 (the venue's name)
    v: Quantity
    n: int
    x: bool


class Kline(msgspec.Struct, gc=False):
    """{"e":"kline","E":1672515782136,"s":"BNBBTC","k":{"t":..,"T":..,"s":"BNBBTC","i":"1m","o":"0.0010",...,"x":false}}"""

    E: Time
    k: _Bar


class _Snapshot(msgspec.Struct, gc=False):
    lastUpdateId: Id  # noqa: N815 (the venue's name)
    bids: Pairs
    asks: Pairs
    T: Time = 0  # of the last change; spot gives none


class _RestTrade(msgspec.Struct):
    """{"id":28457,"price":"4.00000100","qty":"12.00000000","time":1499865549590,"isBuyerMaker":true,...}"""

    id: Id
    price: Quantity
    qty: Quantity
    time: Time
    isBuyerMaker: bool  # noqa: N815 (the venue's name)


class _ServerTime(msgspec.Struct):
    """{"serverTime":1499827319559}"""

    serverTime: Time  # noqa: N815 (the venue's name)


class _OpenInterest(msgspec.Struct):
    """{"openInterest":"10659.509","symbol":"BTCUSDT","time":1589437530011}; in base units."""

    openInterest: Quantity  # noqa: N815 (the venue's name)
    time: Time


class _Newest(msgspec.Struct):
    """Only the time of a trade, an aggregated trade, or a mark, whatever it is called."""

    T: Time | None = None
    time: Time | None = None

    def us(self) -> int:
        time = self.time if self.T is None else self.T
        if time is None:
            raise FrameError("no_time", "neither T nor time")
        return _us(time)


class _Filter(msgspec.Struct):
    filterType: str = ""  # noqa: N815 (the venue's name)
    tickSize: float = math.nan  # noqa: N815 (the venue's name)
    stepSize: float = math.nan  # noqa: N815 (the venue's name)


class _Symbol(msgspec.Struct):
    symbol: str
    status: str
    baseAsset: str = ""  # noqa: N815 (the venue's name)
    quoteAsset: str = ""  # noqa: N815 (the venue's name)
    filters: list[_Filter] = []
    contractType: str | None = None  # noqa: N815 (the venue's name); only of futures, as what follows
    onboardDate: Time = 0  # noqa: N815 (the venue's name)
    deliveryDate: Time = PERPETUAL_DELIVERY_MS  # noqa: N815 (the venue's name)

    def step(self, kind: str, name: str) -> float:
        """A number out of the filter of that kind; NaN when there is none."""
        return next((getattr(f, name) for f in self.filters if f.filterType == kind), 0.0) or math.nan


class _ExchangeInfo(msgspec.Struct):
    symbols: list[_Symbol]


class _RateLimit(msgspec.Struct):
    """{"rateLimitType":"REQUEST_WEIGHT","interval":"MINUTE","intervalNum":1,"limit":6000}"""

    rateLimitType: str  # noqa: N815 (the venue's name)
    interval: str
    intervalNum: int  # noqa: N815 (the venue's name)
    limit: int


class _RateLimits(msgspec.Struct):
    """What else exchangeInfo says; beside the symbols, so that what is wrong with one does not cost the other."""

    rateLimits: list[_RateLimit] = []  # noqa: N815 (the venue's name)


class _Envelope(msgspec.Struct):
    """Any message: combined, raw, a reply to a request, or an error; only what tells them apart."""

    stream: str = ""
    data: msgspec.Raw = _NOTHING
    e: str = ""
    s: str = ""
    u: msgspec.Raw = _NOTHING
    o: msgspec.Raw = _NOTHING
    id: int | str | None = None
    result: msgspec.Raw = _NOTHING
    code: int | None = None
    msg: str = ""
    error: msgspec.Raw = _NOTHING


def _frames(kind: type[msgspec.Struct]) -> Callable[[bytes], Any]:
    """Decoder of a combined frame that carries `kind` in `data`; numbers in text become floats in the C core."""
    frame = msgspec.defstruct(f"{kind.__name__}Frame", [("data", kind)], gc=False)
    return msgspec.json.Decoder(frame, strict=False).decode


_decode_trade, _decode_agg_trade, _decode_depth = _frames(Trade), _frames(AggTrade), _frames(DepthUpdate)
_decode_book_ticker, _decode_ticker, _decode_kline = _frames(BookTicker), _frames(Ticker24h), _frames(Kline)
_decode_futures_depth, _decode_mark_price = _frames(FuturesDepthUpdate), _frames(MarkPrice)
_decode_force_order = _frames(ForceOrder)
_decode_order = msgspec.json.Decoder(_Order, strict=False).decode
_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_snapshot = msgspec.json.Decoder(_Snapshot, strict=False).decode
_decode_rest_trades = msgspec.json.Decoder(list[_RestTrade], strict=False).decode
_decode_rest_agg_trades = msgspec.json.Decoder(list[AggTrade], strict=False).decode
_decode_open_interest = msgspec.json.Decoder(_OpenInterest, strict=False).decode
_decode_newest = msgspec.json.Decoder(_Newest | list[_Newest]).decode
_decode_server_time = msgspec.json.Decoder(_ServerTime).decode
_decode_exchange_info = msgspec.json.Decoder(_ExchangeInfo, strict=False).decode
_decode_rate_limits = msgspec.json.Decoder(_RateLimits).decode

# Event name of a raw payload -> the kind of its stream.
_KIND_OF_EVENT = {
    "trade": "trade", "aggTrade": "aggTrade", "depthUpdate": "depth", "bookTicker": "bookTicker", "24hrTicker": "ticker",
    "kline": "kline", "markPriceUpdate": "markPrice", "forceOrder": "forceOrder",
}  # fmt: skip
_SECONDS = {"SECOND": 1.0, "MINUTE": 60.0, "HOUR": 3600.0, "DAY": 86_400.0}
_BARE_DEPTHS = ("depth", "depth@0ms", "depth@100ms", "depth@500ms")  # depth5, depth10, depth20 are no changes


def _us(time: int) -> int:
    us = time if time > _MS_MAX else time * 1000
    if us >= TIME_MAX_US:
        raise FrameError("absurd_number", f"time={time}")
    return us


def kind_of(stream: str) -> str:
    """What comes on a stream, without instrument, speed and interval: btcusdt@kline_1m -> kline.

    Statistics over other times than 24 hours (ticker_1h) are another kind.
    """
    kind = stream.partition("@")[2].partition("@")[0]
    return "kline" if kind.startswith("kline_") else kind


class Binance(Venue):
    """One combined connection; what both markets have in common."""

    API: ClassVar[str]  # of REST, as a path
    PATHS: ClassVar[Mapping[str, str]]  # kind of stream -> path of the connection that delivers it
    STREAMS: ClassVar[Mapping[str, tuple[str, ...]]]  # feed -> its streams, beside trades and candles
    SNAPSHOT_WEIGHTS: ClassVar[tuple[tuple[int, int], ...]]  # levels up to, weight
    TRADES_WEIGHTS: ClassVar[Mapping[str, int]]  # endpoint -> weight
    NOT_EXECUTED: ClassVar[tuple[str, ...]] = ()  # types of trades that are no executions
    TRADE_CHANNELS = ("trade", "aggTrade")
    RATE_LIMITED: ClassVar[Mapping[int, float]] = {
        403: 300.0
    }  # the web application firewall's limit; how long is not told
    PREFIX = b'{"stream":"'
    SHUTDOWN = PREFIX + b'!serverShutdown"'

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        super().__init__(emit, options, streams, open_world=open_world)
        self._trade_kinds: dict[str, str] = {}
        self._requests: dict[int, tuple[str, list[str]]] = {}
        self._request_id = 0
        self._again_at_ns: dict[str, int] = {}  # ticker -> when its snapshot, too old the last time, is asked for again
        self._weights_known = {self.LIMITS.weight}

    # Planning

    @classmethod
    def streams_of(cls, ticker: str, feeds: Sequence[str], options: Options) -> list[Stream]:
        names = [(name, feed) for feed in feeds for name in cls._streams_of_feed(feed, options)]
        return [Stream(f"{ticker.lower()}@{n}", f, ticker, cls.PATHS[kind_of(f"@{n}")]) for n, f in names]

    @classmethod
    def _streams_of_feed(cls, feed: str, options: Options) -> Sequence[str]:
        if feed == "trades":
            return (options.trade_channel or cls.TRADE_CHANNELS[0],)
        return [f"kline_{i}" for i in options.intervals] if feed == "candles" else cls.STREAMS[feed]

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        return (f"{cls.API}/exchangeInfo",)

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        return [cls._info(symbol) for symbol in decode_body(_decode_exchange_info, body).symbols]

    @classmethod
    def server_time(cls, body: bytes) -> tuple[int, int]:
        return _us(decode_body(_decode_server_time, body).serverTime), 1000

    @classmethod
    def _info(cls, symbol: _Symbol) -> InstrumentInfo:
        kind = "spot"
        if symbol.contractType is not None:  # "" of one that does not trade; a new kind of perpetual has a new prefix
            kind = "future" if symbol.contractType and not symbol.contractType.endswith("PERPETUAL") else "perpetual"
        expires = symbol.deliveryDate < PERPETUAL_DELIVERY_MS  # a perpetual too, once its end is announced
        return InstrumentInfo(
            symbol.symbol,
            symbol.status == "TRADING",
            kind,
            symbol.baseAsset,
            symbol.quoteAsset,
            symbol.status,
            symbol.step("PRICE_FILTER", "tickSize"),
            symbol.step("LOT_SIZE", "stepSize"),
            contract_size=1.0,  # quantities are in base units in both markets
            listed_time=_us(symbol.onboardDate) if symbol.onboardDate else -1,
            expiry_time=_us(symbol.deliveryDate) if expires else -1,
        )

    @classmethod
    def snapshot_weight(cls, options: Options) -> int:
        levels = cls._snapshot_levels(options)
        return next(weight for most, weight in cls.SNAPSHOT_WEIGHTS if levels <= most)

    @classmethod
    def _snapshot_levels(cls, options: Options) -> int:
        return options.book_depth or SNAPSHOT_LEVELS_DEFAULT

    # Connection

    def opened(self) -> None:
        self._requests.clear()
        self.subscribe([stream.name for stream in self.streams])

    def subscribe(self, names: Sequence[str]) -> None:
        self._request("SUBSCRIBE", names)

    def unsubscribe(self, names: Sequence[str]) -> None:
        self._request("UNSUBSCRIBE", names)

    def closing(self) -> list[str]:
        names = [stream.name for stream in self.streams]
        return [
            _control("UNSUBSCRIBE", names[i : i + SUBSCRIBE_CHUNK], 0) for i in range(0, len(names), SUBSCRIBE_CHUNK)
        ]

    def _request(self, method: str, names: Sequence[str]) -> None:
        for i in range(0, len(names), SUBSCRIBE_CHUNK):
            self._request_id += 1
            self._requests[self._request_id] = method, list(names[i : i + SUBSCRIBE_CHUNK])
            self.wants.append(Send(_control(method, names[i : i + SUBSCRIBE_CHUNK], self._request_id)))

    def identity(self, frame: bytes) -> bytes | None:
        """The notice that a connection ends concerns that one alone, and is no market data."""
        return None if frame.startswith(self.SHUTDOWN) else super().identity(frame)

    def unrouted(self, frame: bytes) -> None:
        envelope = _decode_envelope(frame)
        if envelope.stream:
            if envelope.stream == "!serverShutdown":
                self.wants.append(Reconnect("server_shutdown", overlap=True))
                return
            self.take_route(frame, self.watched(envelope.stream, self._handler(envelope.stream)))
        elif envelope.e == "serverShutdown":
            self.wants.append(Reconnect("server_shutdown", overlap=True))
        elif len(envelope.result) or envelope.code is not None or len(envelope.error):
            self._reply(envelope)
        elif envelope.e == "forceOrder":
            self._raw(_decode_order(envelope.o).s, envelope.e, frame)
        elif envelope.s and (envelope.e or len(envelope.u)):
            self._raw(envelope.s, envelope.e or "bookTicker", frame)
        else:
            raise FrameError("unhandled_event", envelope.e)

    def _raw(self, symbol: str, event: str, frame: bytes) -> None:
        """A payload without the name of its stream, as an uncombined connection brings it."""
        kind = _KIND_OF_EVENT.get(event)
        if kind is None:
            raise FrameError("unhandled_event", event)
        self._handler(f"{symbol.lower()}@{kind}")(b'{"data":' + frame + b"}")

    def _reply(self, envelope: _Envelope) -> None:
        method, names = self._requests.pop(envelope.id, ("", [])) if isinstance(envelope.id, int) else ("", [])
        if envelope.code is not None or len(envelope.error):
            reason = envelope.msg or bytes(envelope.error).decode(errors="replace")
            if method != "SUBSCRIBE":
                raise FrameError("venue_error", f"{method}: {envelope.code} {reason}")
            self.refuse_batch(names, reason)
        elif method == "SUBSCRIBE":
            self.acknowledge(names, time.time_ns())
        elif not method and not self.open_world:
            raise FrameError("unknown_reply")

    def _handler(self, name: str) -> Decode:
        """What decodes the frames of a stream; FrameError when its instrument or kind is not wanted."""
        symbol, _, rest = name.partition("@")
        ticker, kind = self._tickers.get(name, symbol.upper()), kind_of(name)
        self.admit(ticker)
        if kind not in self.PATHS or (kind == "depth" and rest not in _BARE_DEPTHS):
            raise FrameError("unhandled_stream", name)
        if kind in self.TRADE_CHANNELS and self._trade_kinds.setdefault(ticker, kind) != kind:
            raise FrameError("second_trade_stream", f"{name}: trades of {ticker} come from {self._trade_kinds[ticker]}")
        makers: dict[str, Callable[[str], Decode]] = {
            "trade": self._on_trade,
            "aggTrade": self._on_agg_trade,
            "depth": self._on_depth,
            "bookTicker": self._on_book_ticker,
            "ticker": self._on_ticker,
            "kline": self._on_kline,
            "markPrice": self._on_mark_price,
            "forceOrder": self._on_force_order,
        }
        return makers[kind](ticker)

    def _on_trade(self, ticker: str) -> Decode:
        sync, instrument, emit_trade = self.trade_sync(ticker), self.emit.instrument(ticker), self.emit.trade

        def on_trade(frame: bytes) -> None:
            trade = _decode_trade(frame).data
            seq, timestamp = trade.t, trade.T
            if timestamp < _MS_MAX:
                timestamp *= 1000
            if trade.X != MARKET:
                if trade.X in self.NOT_EXECUTED:
                    sync.skip(seq, timestamp)
                    return
                self.drift("trade type", trade.X, frame)
            side = SELL if trade.m else BUY
            if seq == sync.last + 1:
                emit_trade(instrument, timestamp, side, trade.p, trade.q, seq)
                sync.last, sync.last_time = seq, timestamp
            else:
                sync.publish([(seq, timestamp, side, trade.p, trade.q, b"")])

        return on_trade

    def _on_agg_trade(self, ticker: str) -> Decode:
        sync = self.trade_sync(ticker)

        def on_agg_trade(frame: bytes) -> None:
            sync.publish([_agg_row(_decode_agg_trade(frame).data)])

        return on_agg_trade

    @abstractmethod
    def _on_depth(self, ticker: str) -> Decode:
        """What applies the changes of a book."""

    def _on_book_ticker(self, ticker: str) -> Decode:
        instrument, emit_bbo = self.emit.instrument(ticker), self.emit.bbo

        def on_book_ticker(frame: bytes) -> None:
            best = _decode_book_ticker(frame).data
            timestamp = best.T
            if timestamp < _MS_MAX:
                timestamp *= 1000
            emit_bbo(instrument, timestamp, best.b, best.B, best.a, best.A, best.u)

        return on_book_ticker

    def _on_ticker(self, ticker: str) -> Decode:
        instrument = self.emit.instrument(ticker)

        def on_ticker(frame: bytes) -> None:
            t = _decode_ticker(frame).data
            best = {name: price for name, price in (("bid_price", t.b), ("ask_price", t.a)) if price is not None}
            self.emit.ticker(
                instrument, _us(t.E), last=t.c, open_24h=t.o, high_24h=t.h, low_24h=t.l,
                volume_24h=t.v, quote_volume_24h=t.q, **best,
            )  # fmt: skip

        return on_ticker

    def _on_kline(self, ticker: str) -> Decode:
        instrument = self.emit.instrument(ticker)

        def on_kline(frame: bytes) -> None:
            event = _decode_kline(frame).data
            k = event.k
            ohlc = (k.o, k.h, k.l, k.c)
            self.emit.candle(instrument, _us(event.E), k.i.encode(), _us(k.t), ohlc, k.v, k.n, k.x)

        return on_kline

    def _on_mark_price(self, ticker: str) -> Decode:
        instrument = self.emit.instrument(ticker)

        def on_mark_price(frame: bytes) -> None:
            m = _decode_mark_price(frame).data
            funding = {"funding_rate": m.r} if m.T and isinstance(m.r, float) else {}
            self.emit.ticker(
                instrument, _us(m.E), mark_price=m.p, index_price=m.i, next_funding_time=_us(m.T) if m.T else -1,
                **funding,
            )  # fmt: skip

        return on_mark_price

    def _on_force_order(self, ticker: str) -> Decode:
        instrument = self.emit.instrument(ticker)

        def on_force_order(frame: bytes) -> None:
            order = _decode_force_order(frame).data.o
            side = {"BUY": BUY, "SELL": SELL}.get(order.S)
            if side is None:
                raise FrameError("unknown_side", order.S)
            self.emit.liquidation(instrument, _us(order.T), side, order.p, order.q)

        return on_force_order

    @abstractmethod
    def _follows(self, ticker: str) -> FollowRule:
        """The rule by which the book messages of an instrument follow each other."""

    # Whether an acknowledged stream delivers

    def probe(self, stream: Stream) -> Fetch | None:
        """A trade changes the book, the best prices, the statistics and the candle: the newest one tells for all."""
        weight, endpoint = min((self.TRADES_WEIGHTS[endpoint], endpoint) for endpoint in ("trades", "aggTrades"))
        return Fetch(stream.name, f"{self.API}/{endpoint}?symbol={quote(stream.ticker)}&limit=1", weight)

    def newest_us(self, stream: Stream, body: bytes) -> int:
        said = decode_body(_decode_newest, body)
        return max((one.us() for one in (said if isinstance(said, list) else [said])), default=0)

    # HTTP

    def want_snapshot(self, book: BookSync) -> None:
        """Local book, step 2 (spot) and 1 (futures)."""
        ticker, levels = book.instrument.ticker, self._snapshot_levels(self.options)
        path = f"{self.API}/depth?symbol={quote(ticker)}&limit={levels}"
        self.wants.append(Fetch(f"depth {ticker}", path, self.snapshot_weight(self.options)))

    def acknowledge(self, names: Sequence[str], now_ns: int) -> None:
        """A book whose snapshot was refused asks for it no more by itself: it is asked for on each new connection."""
        super().acknowledge(names, now_ns)
        for name in names:
            book = self.books.get(self._tickers.get(name, ""))
            if book is not None and book.state is not LIVE and kind_of(name) == "depth":
                self.want_snapshot(book)

    def want_repair(self, ticker: str, first: int, last: int) -> None:
        channel = self._trade_kinds.get(ticker) or self.options.trade_channel or self.TRADE_CHANNELS[0]
        if channel == "aggTrade":
            self._fetch_trades("aggTrades", ticker, first, last)
        else:
            self._want_trades(ticker, first, last)

    def _want_trades(self, ticker: str, first: int, last: int) -> None:
        """Trades first..last of the stream `trade` were missed."""
        self._fetch_trades("historicalTrades", ticker, first, last)

    def _fetch_trades(self, endpoint: str, ticker: str, first: int, last: int) -> None:
        count = min(last - first + 1, TRADES_PER_REQUEST)
        path = f"{self.API}/{endpoint}?symbol={quote(ticker)}&fromId={first}&limit={count}"
        self.wants.append(Fetch(f"trades {ticker} {first}", path, self.TRADES_WEIGHTS[endpoint]))

    def http(self, url: str, body: bytes) -> None:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        endpoint, symbol = parts.path.rpartition("/")[2], query.get("symbol", [""])[0]
        from_id = int(query.get("fromId", ["-1"])[0])
        if endpoint == "exchangeInfo":
            self.take_instruments(url, body)
        if endpoint in ("exchangeInfo", "time", "ping"):
            return
        self.admit(symbol)
        if endpoint == "depth":
            self._take_snapshot(symbol, body)
        elif endpoint == "aggTrades":
            rows = [_agg_row(trade) for trade in decode_body(_decode_rest_agg_trades, body)]
            self.trade_sync(symbol).repaired(from_id, rows)
        elif endpoint == "historicalTrades":
            self._take_history(self.trade_sync(symbol), from_id, _rest_rows(body))
        else:
            self._take_answer(endpoint, symbol, url, body)

    def take_instruments(self, url: str, body: bytes) -> list[InstrumentInfo]:
        listed = super().take_instruments(url, body)
        if not self.open_world:  # what was allowed when something was recorded does not matter
            self._compare_weight(body)
        return listed

    def _compare_weight(self, body: bytes) -> None:
        """Tell when the venue allows another request weight than the one that the budget is made of."""
        try:
            said = decode_body(_decode_rate_limits, body).rateLimits
        except (FrameError, msgspec.DecodeError) as error:
            self.emit.refused_error(error, body)
            return
        for one in said:
            weight = one.limit, one.intervalNum * _SECONDS.get(one.interval, 0.0)
            if one.rateLimitType == "REQUEST_WEIGHT" and weight not in self._weights_known:
                self._weights_known.add(weight)
                allowed, per_s = self.LIMITS.weight
                told = f"{one.limit} per {one.intervalNum} {one.interval}, not {allowed} per {per_s:g} s"
                self.drift("request weight", told)

    def _take_history(self, sync: TradeSync, from_id: int, rows: list[TradeRow]) -> None:
        sync.repaired(from_id, rows)

    def _take_answer(self, endpoint: str, symbol: str, url: str, body: bytes) -> None:
        """An answer that only one of the markets is asked for."""
        raise FrameError("unhandled_url", url)

    def _take_snapshot(self, symbol: str, body: bytes) -> None:
        book = self.book(symbol, self._follows(symbol))
        if book.state is LIVE:  # a late message healed it meanwhile
            self.emit.counters["book_snapshot_unneeded"] += 1
            return
        taken: bool | None = None
        try:
            taken = self._load(book, decode_body(_decode_snapshot, body))
        finally:
            if taken is None:  # unusable
                self.want_snapshot(book)
        if not taken:  # spot, step 3: older than the buffer, fetch again
            self._again_at_ns[symbol] = self.emit.rcv_us * 1000 + (STALE_WAIT_NS << book.stale >> 1)

    def tick(self, now_ns: int) -> None:
        """Ask again for the snapshots that were too old, each in its time; at once where the clock was set back."""
        for ticker, due_ns in list(self._again_at_ns.items()):
            if not 0 < due_ns - now_ns <= STALE_WAIT_NS << STALE_SNAPSHOTS_MAX:
                del self._again_at_ns[ticker]
                book = self.books.get(ticker)
                if book is not None and book.state is not LIVE:  # a late message may have healed it
                    self.want_snapshot(book)

    def _load(self, book: BookSync, snapshot: _Snapshot) -> bool:
        return book.snapshot(snapshot.lastUpdateId, _us(snapshot.T), snapshot.bids, snapshot.asks)

    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        what, ticker = fetch.key.split(" ")[:2]
        reason = f"HTTP {status} {body[:200].decode(errors='replace')}"
        if what == "depth":
            self.refuse([s.name for s in self.streams if s.ticker == ticker and s.feed == "orderbook_l2"], reason)
        elif what == "trades":
            self.emit.counters["trade_repair_refused"] += 1
            self.notes[f"repair of {ticker} refused"] = reason
        else:
            self.emit.counters["poll_refused"] += 1
            self.notes[f"{what} of {ticker} refused"] = reason


def _control(method: str, names: Sequence[str], request_id: int) -> str:
    return msgspec.json.encode({"method": method, "params": names, "id": request_id}).decode()


def _agg_row(trade: AggTrade) -> TradeRow:
    return trade.a, _us(trade.T), SELL if trade.m else BUY, trade.p, trade.q, b""


def _rest_rows(body: bytes) -> list[TradeRow]:
    return [
        (t.id, _us(t.time), SELL if t.isBuyerMaker else BUY, t.price, t.qty, b"")
        for t in decode_body(_decode_rest_trades, body)
    ]


def follows(last_id: int, first: int, last: int, _prev: int) -> int:
    """Spot, local book, steps 4 and 6: an event must contain the id after the last one; older events are ignored."""
    if last <= last_id:
        return OLD
    return NEXT if first <= last_id + 1 else HOLE


class BinanceSpot(Binance):
    """One combined connection of Binance Spot."""

    NAME = "binance_spot"
    EXCHANGE = Exchange.BINANCE_SPOT
    FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles")
    WS_URL = "wss://stream.binance.com:9443"
    REST_URL = "https://api.binance.com"
    API = "/api/v3"
    TIME_PATH = "/api/v3/time"
    INTERVALS = ("1s", "1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h", "1d", "3d", "1w", "1M")
    HTTP_HEADERS: ClassVar[Mapping[str, str]] = {"X-MBX-TIME-UNIT": "MICROSECOND"}
    PATHS: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("trade", "aggTrade", "depth", "bookTicker", "ticker", "kline"), "/stream?timeUnit=MICROSECOND"
    )
    STREAMS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "orderbook_l2": ("depth@100ms",), "bbo": ("bookTicker",), "tickers": ("ticker",),
    }  # fmt: skip
    SNAPSHOT_WEIGHTS = ((100, 5), (500, 25), (1000, 50), (5000, 250))  # rest-api.md, 2026-07
    TRADES_WEIGHTS: ClassVar[Mapping[str, int]] = {"trades": 25, "historicalTrades": 25, "aggTrades": 4}  # 2026-07
    LIMITS = Limits(
        streams_per_connection=400,  # 1024 allowed (web-socket-streams.md, 2026-07); 400 keep one core's bursts short
        messages_per_s=2,  # 5 within a second, pongs included: two at once, two that flow in, a pong
        connects=(300, 300.0),
        weight=(6000, 60.0),  # REQUEST_WEIGHT, rest-api.md and exchangeInfo, 2026-07
        lifetime_s=24 * 3600.0,
        instruments_weight=20,
    )
    KNOWN_FIELDS = frozenset("abcefhiklmnopqstuvwxABCEFLMOPQTUV") | {"stream", "data"}  # web-socket-streams.md, 2026-07

    def _follows(self, ticker: str) -> FollowRule:
        return follows

    def _on_depth(self, ticker: str) -> Decode:
        delta = self.book(ticker, self._follows(ticker)).delta

        def on_depth(frame: bytes) -> None:
            update = _decode_depth(frame).data
            if update.u < update.U:
                raise FrameError("absurd_update_id", f"U={update.U} u={update.u}")
            delta(update.U, update.u, -1, _us(update.E), update.b, update.a)

        return on_depth


class BinanceFutures(Binance):
    """One combined connection of Binance USD-M futures, on the routed path that delivers its streams.

    With an API key (no secret; it signs nothing) a hole in the trades is repaired however old it is, without one as long
    as it lies within the last 1000 trades.
    """

    NAME = "binance_futures"
    EXCHANGE = Exchange.BINANCE_FUTURES
    FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles", "liquidations")
    WS_URL = "wss://fstream.binance.com"
    REST_URL = "https://fapi.binance.com"
    API = "/fapi/v1"
    TIME_PATH = "/fapi/v1/time"
    INTERVALS = ("1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h", "1d", "3d", "1w", "1M")
    CREDENTIALS = ("api_key",)
    # Since 2026-04-23. The wrong one, and the old path without a route, acknowledge and stay silent. That `trade` comes on
    # /public was measured (2026-08, 2026-09); the documents do not say it.
    PATHS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("trade", "depth", "bookTicker"), "/public/stream"),
        **dict.fromkeys(("aggTrade", "markPrice", "ticker", "kline", "forceOrder"), "/market/stream"),
    }
    STREAMS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "orderbook_l2": ("depth@100ms",), "bbo": ("bookTicker",), "tickers": ("ticker", "markPrice@1s"),
        "liquidations": ("forceOrder",),
    }  # fmt: skip
    NOT_EXECUTED = NO_EXECUTIONS
    SNAPSHOT_WEIGHTS = ((5, 2), (10, 2), (20, 2), (50, 2), (100, 5), (500, 10), (1000, 20))  # no other limits are valid
    TRADES_WEIGHTS: ClassVar[Mapping[str, int]] = {"trades": 5, "historicalTrades": 20, "aggTrades": 20}
    LIMITS = Limits(
        streams_per_connection=200,  # 1024 in the newest copy of the documents, 200 in older ones
        messages_per_s=4,  # 10 within a second, pongs included
        connects=(300, 300.0),  # the rule of spot; not documented here
        weight=(2400, 60.0),  # REQUEST_WEIGHT, also in exchangeInfo
        lifetime_s=24 * 3600.0,
    )
    KNOWN_FIELDS = frozenset("abcefhiklmnopqrstuvwxzABCEFLOPQSTUVX") | {
        "stream", "data", "ap", "nq", "ps", "pu", "st",
    }  # fmt: skip  # documents and recordings up to 2026-10

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        super().__init__(emit, options, streams, open_world=open_world)
        self._snapshot_ids: dict[str, int] = {}  # ticker -> id of the newest snapshot
        self._told: dict[str, int] = {}  # ticker -> last trade of the newest list of trades
        self._polls = self._poll_at_ns = 0
        self._has_key = "api_key" in options.credentials
        if self._has_key:
            self.HTTP_HEADERS = {"X-MBX-APIKEY": options.credentials["api_key"]}  # type: ignore[misc]

    @classmethod
    def _snapshot_levels(cls, options: Options) -> int:
        asked = super()._snapshot_levels(options)
        return next((levels for levels, _ in cls.SNAPSHOT_WEIGHTS if asked <= levels), cls.SNAPSHOT_WEIGHTS[-1][0])

    @classmethod
    def polled_weight(cls, streams: Sequence[Stream], options: Options) -> float:
        """Of open interest, each request of weight 1."""
        tickers = sum(kind_of(stream.name) == "ticker" for stream in streams)
        return min(tickers / OPEN_INTEREST_EVERY_S, OPEN_INTEREST_PER_S)

    # Books

    def _follows(self, ticker: str) -> FollowRule:
        snapshot_ids = self._snapshot_ids

        def follows(last_id: int, _first: int, last: int, prev: int) -> int:
            """Local book, steps 2 to 4; an event brings every change behind `pu` up to `u`."""
            if prev == last_id:  # step 4, and how live streams may continue a snapshot
                return NEXT
            if last <= last_id:  # step 2; one that ends with the snapshot's id brings nothing new
                return OLD
            # Step 3: the first event behind a snapshot holds its id. Anywhere else only `pu` proves that none is missing.
            return NEXT if prev < last_id == snapshot_ids.get(ticker) else HOLE

        return follows

    def _load(self, book: BookSync, snapshot: _Snapshot) -> bool:
        self._snapshot_ids[book.instrument.ticker] = snapshot.lastUpdateId
        return super()._load(book, snapshot)

    def _on_depth(self, ticker: str) -> Decode:
        delta = self.book(ticker, self._follows(ticker)).delta

        def on_depth(frame: bytes) -> None:
            update = _decode_futures_depth(frame).data
            if not update.pu <= update.u >= update.U:
                raise FrameError("absurd_update_id", f"pu={update.pu} U={update.U} u={update.u}")
            delta(update.U, update.u, update.pu, _us(update.T), update.b, update.a)

        return on_depth

    # Trades

    def _want_trades(self, ticker: str, first: int, last: int) -> None:
        if self._has_key:
            super()._want_trades(ticker, first, last)
            return
        # One list serves all holes of the instrument.
        path = f"{self.API}/trades?symbol={quote(ticker)}&limit={TRADES_PER_REQUEST}"
        self.wants.append(Fetch(f"trades {ticker}", path, self.TRADES_WEIGHTS["trades"]))

    def _take_trades(self, ticker: str, body: bytes) -> None:
        """The newest trades; the documents say that only those of insurance fund and ADL are left out."""
        rows = sorted(_rest_rows(body))
        if not rows:
            raise FrameError("empty_answer", f"trades of {ticker}")
        first, last = rows[0][0], rows[-1][0]
        if last - first >= 2 * len(rows):
            raise FrameError("absurd_trade_id", f"{len(rows)} trades of {ticker} from {first} to {last}")
        moved, self._told[ticker] = last != self._told.get(ticker), last
        left = self.trade_sync(ticker).told(first, last, rows)
        if moved and any(hole[1] > last for hole in left):  # the list is behind the stream, or the hole is a new one
            self._want_trades(ticker, *left[-1])
        elif left:
            self.emit.counters["trade_repair_incomplete"] += 1  # what lies before the list is out of reach

    def _take_history(self, sync: TradeSync, from_id: int, rows: list[TradeRow]) -> None:
        sync.told(from_id, max((row[0] for row in rows), default=from_id - 1), rows)
        super()._take_history(sync, from_id, rows)  # asks on, where more than one answer is missing

    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        super().http_failed(fetch, status, body)
        if "/historicalTrades?" in fetch.path and self._has_key:
            self._has_key = False  # the newest trades can be had without one
            self.notes["credentials"] = f"the API key was refused: HTTP {status}"
            _, ticker, first = fetch.key.split(" ")
            self._want_trades(ticker, int(first), int(first))

    def _take_answer(self, endpoint: str, symbol: str, url: str, body: bytes) -> None:
        if endpoint == "trades":
            self._take_trades(symbol, body)
        elif endpoint == "openInterest":
            said = decode_body(_decode_open_interest, body)
            self.emit.ticker(self.emit.instrument(symbol), _us(said.time), open_interest=said.openInterest)
        else:
            super()._take_answer(endpoint, symbol, url, body)

    # Whether an acknowledged stream delivers

    def probe(self, stream: Stream) -> Fetch | None:
        kind = kind_of(stream.name)
        if kind == "forceOrder":
            return None
        if kind != "markPrice":
            return super().probe(stream)
        return Fetch(stream.name, f"{self.API}/premiumIndex?symbol={quote(stream.ticker)}", 1)

    # What no stream brings

    def tick(self, now_ns: int) -> None:
        """Ask for the open interest of one instrument after the other."""
        super().tick(now_ns)
        if now_ns < self._poll_at_ns:
            return
        tickers = [stream.ticker for stream in self.streams if kind_of(stream.name) == "ticker"]
        if not tickers:
            return
        self._poll_at_ns = now_ns + int(1e9 / self.polled_weight(self.streams, self.options))
        ticker = tickers[self._polls % len(tickers)]
        self._polls += 1
        path = f"{self.API}/openInterest?symbol={quote(ticker)}"
        # All connections together may ask for more than the weight that flows in, which then is not there for books.
        self.wants.append(Fetch(f"open_interest {ticker}", path, 1, can_wait=True))


VENUES = (BinanceSpot, BinanceFutures)
