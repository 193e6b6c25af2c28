"""Binance Spot.

Documentation: github.com/binance/binance-spot-api-docs, `web-socket-streams.md` and `rest-api.md`, read at 2026-07-21.
Streams are combined (`/stream`), times in microseconds (`timeUnit=MICROSECOND`; recordings in ms are told apart by
size). The book starts over HTTP; trades have a counter without holes, so a missed one is proven and fetched.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, urlsplit

import msgspec

from mdcollector.continuity import HOLE, LIVE, NEXT, OLD, BookSync
from mdcollector.emit import TIME_MAX_US, Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import (
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

SNAPSHOT_LEVELS_DEFAULT = 1000  # of at most 5000 a side: a fifth of the weight, so 120 books a minute can start
SNAPSHOT_WEIGHTS = ((100, 5), (500, 25), (1000, 50), (5000, 250))  # limit up to, weight; 2026-07
TRADES_PER_REQUEST = 1000  # GET /api/v3/historicalTrades; 2026-07
TRADES_WEIGHT = 25
PROBE_WEIGHT = 4  # GET /api/v3/aggTrades; 2026-07
SUBSCRIBE_CHUNK = 200  # stream names in one SUBSCRIBE
_MS_MAX = 100_000_000_000_000  # a larger time is in microseconds already
_NOTHING = msgspec.Raw(b"")

Pairs = list[tuple[Quantity, Quantity]]


class Trade(msgspec.Struct, gc=False):
    """{"e":"trade","E":1672515782136,"s":"BNBBTC","t":12345,"p":"0.001","q":"100","T":1672515782136,"m":true,"M":true}"""

    t: Id
    p: Quantity
    q: Quantity
    T: Time
    m: bool


class AggTrade(msgspec.Struct, gc=False):
    """{"e":"aggTrade","E":1672515782136,"s":"BNBBTC","a":12345,"p":"0.001","q":"100","f":100,"l":105,"T":...,"m":true}"""

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


class BookTicker(msgspec.Struct, gc=False):
    """{"u":400900217,"s":"BNBUSDT","b":"25.35190000","B":"31.21000000","a":"25.36520000","A":"40.66000000"}"""

    u: Id
    b: Quantity
    B: Quantity
    a: Quantity
    A: Quantity


class Ticker24h(msgspec.Struct, gc=False):
    """{"e":"24hrTicker","E":...,"s":"BNBBTC","c":"0.0025","b":"0.0024","a":"0.0026","o":..,"h":..,"l":..,"v":..,"q":..}"""

    E: Time
    c: Quantity
    b: Quantity
    a: Quantity
    o: Quantity
    h: Quantity
    l: Quantity  # noqa: E741 (the venue's name)
    v: Quantity
    q: Quantity


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


class _RestTrade(msgspec.Struct):
    """{"id":28457,"price":"4.00000100","qty":"12.00000000","time":1499865549590,"isBuyerMaker":true,...}"""

    id: Id
    price: Quantity
    qty: Quantity
    time: Time
    isBuyerMaker: bool  # noqa: N815 (the venue's name)


class _Filter(msgspec.Struct):
    """{"filterType":"PRICE_FILTER","minPrice":"0.01",...,"tickSize":"0.01"}, {"filterType":"LOT_SIZE",...,"stepSize":"0.00001"}"""

    filterType: str = ""  # noqa: N815 (the venue's name)
    tickSize: Quantity = 0.0  # noqa: N815 (the venue's name)
    stepSize: Quantity = 0.0  # noqa: N815 (the venue's name)


class _Symbol(msgspec.Struct):
    symbol: str
    status: str
    baseAsset: str = ""  # noqa: N815 (the venue's name)
    quoteAsset: str = ""  # noqa: N815 (the venue's name)
    filters: list[_Filter] = []


class _ExchangeInfo(msgspec.Struct):
    symbols: list[_Symbol]


class _Envelope(msgspec.Struct):
    """Any message: combined, raw, a reply to a request, or an error; only what tells them apart."""

    stream: str = ""
    data: msgspec.Raw = _NOTHING
    e: str = ""
    s: str = ""
    u: msgspec.Raw = _NOTHING
    id: int | str | None = None
    result: msgspec.Raw = _NOTHING
    code: int | None = None
    msg: str = ""
    error: msgspec.Raw = _NOTHING


_NO_FILTER = _Filter()


def _frames(kind: type[msgspec.Struct]) -> Callable[[bytes], Any]:
    """Decoder of a combined frame that carries `kind` in `data`; numbers in text become floats in the C core."""
    frame = msgspec.defstruct(f"{kind.__name__}Frame", [("data", kind)], gc=False)
    return msgspec.json.Decoder(frame, strict=False).decode


_decode_trade, _decode_agg_trade, _decode_depth = _frames(Trade), _frames(AggTrade), _frames(DepthUpdate)
_decode_book_ticker, _decode_ticker, _decode_kline = _frames(BookTicker), _frames(Ticker24h), _frames(Kline)
_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_snapshot = msgspec.json.Decoder(_Snapshot, strict=False).decode
_decode_rest_trades = msgspec.json.Decoder(list[_RestTrade], strict=False).decode
_decode_newest = msgspec.json.Decoder(list[AggTrade], strict=False).decode
_decode_exchange_info = msgspec.json.Decoder(_ExchangeInfo, strict=False).decode

# Event name of a raw payload -> how its stream is called behind the @.
_STREAM_OF_EVENT = {
    "trade": "trade", "aggTrade": "aggTrade", "depthUpdate": "depth@100ms", "bookTicker": "bookTicker",
    "24hrTicker": "ticker", "kline": "kline",
}  # fmt: skip
_STREAMS_OF_FEED = {"trades": "trade", "orderbook_l2": "depth@100ms", "bbo": "bookTicker", "tickers": "ticker"}


def _us(time: int) -> int:
    us = time if time > _MS_MAX else time * 1000
    if us >= TIME_MAX_US:
        raise FrameError("absurd_number", f"time={time}")
    return us


def follows(last_id: int, first: int, last: int, _prev: int) -> int:
    """Local book, steps 4 and 6: an event must contain the id after the last one; older events are ignored."""
    if last <= last_id:
        return OLD
    return NEXT if first <= last_id + 1 else HOLE


class BinanceSpot(Venue):
    """One combined connection of Binance Spot."""

    NAME = "binance_spot"
    EXCHANGE = Exchange.BINANCE_SPOT
    FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles")
    WS_URL = "wss://stream.binance.com:9443"
    REST_URL = "https://api.binance.com"
    INTERVALS = ("1s", "1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h", "1d", "3d", "1w", "1M")
    HTTP_HEADERS: ClassVar[Mapping[str, str]] = {"X-MBX-TIME-UNIT": "MICROSECOND"}
    PREFIX = b'{"stream":"'
    LIMITS = Limits(
        streams_per_connection=400,  # 1024 allowed (web-socket-streams.md, 2026-07); 400 keep one core's bursts short
        messages_per_s=4,  # 5 a second, pongs included
        connects=(300, 300.0),
        weight=(6000, 60.0),  # REQUEST_WEIGHT, rest-api.md and exchangeInfo, 2026-07
        instruments_weight=20,  # GET /api/v3/exchangeInfo, 2026-07
        lifetime_s=24 * 3600.0,
    )

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        super().__init__(emit, options, streams, open_world=open_world)
        self._trade_kinds: dict[str, str] = {}
        self._requests: dict[int, tuple[str, list[str]]] = {}
        self._request_id = 0

    # Planning

    @classmethod
    def streams_of(cls, ticker: str, feeds: Sequence[str], options: Options) -> list[Stream]:
        symbol = ticker.lower()
        streams = [Stream(f"{symbol}@{_STREAMS_OF_FEED[f]}", f, ticker) for f in feeds if f in _STREAMS_OF_FEED]
        if "candles" in feeds:
            streams += [Stream(f"{symbol}@kline_{i}", "candles", ticker) for i in options.intervals]
        return streams

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        return ("/api/v3/exchangeInfo",)

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        return [_info(s) for s in decode_body(_decode_exchange_info, body).symbols]

    @classmethod
    def snapshot_weight(cls, options: Options) -> int:
        limit = options.book_depth or SNAPSHOT_LEVELS_DEFAULT
        return next(weight for most, weight in SNAPSHOT_WEIGHTS if limit <= most)

    # Connection

    def ws_path(self) -> str:
        return "/stream?timeUnit=MICROSECOND"

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

    def unrouted(self, frame: bytes) -> None:
        envelope = _decode_envelope(frame)
        if envelope.stream:
            if envelope.stream == "!serverShutdown":
                self.wants.append(Reconnect("server_shutdown", overlap=True))
                return
            self.take_route(frame, self._handler(envelope.stream))
        elif envelope.e == "serverShutdown":
            self.wants.append(Reconnect("server_shutdown", overlap=True))
        elif envelope.s and (envelope.e or len(envelope.u)):
            kind = _STREAM_OF_EVENT.get(envelope.e or "bookTicker")
            if kind is None:
                raise FrameError("unhandled_event", envelope.e)
            self._handler(f"{envelope.s.lower()}@{kind}")(b'{"data":' + frame + b"}")
        elif len(envelope.result) or envelope.code is not None or len(envelope.error):
            self._reply(envelope)
        else:
            raise FrameError("unhandled_event", envelope.e)

    def _reply(self, envelope: _Envelope) -> None:
        method, names = self._requests.pop(envelope.id, ("", [])) if isinstance(envelope.id, int) else ("", [])
        if envelope.code is not None or len(envelope.error):
            reason = envelope.msg or bytes(envelope.error).decode(errors="replace")
            if method != "SUBSCRIBE":
                raise FrameError("venue_error", f"{method}: {envelope.code} {reason}")
            self.refuse(names, reason)
        elif method == "SUBSCRIBE":
            self.acknowledge(names, time.time_ns())
        elif not method and not self.open_world:
            raise FrameError("unknown_reply")

    def _handler(self, name: str) -> Callable[[bytes], None]:
        """What decodes the frames of a stream; FrameError when its instrument or kind is not wanted."""
        symbol, _, kind = name.partition("@")
        ticker = self._tickers.get(name, symbol.upper())
        self.admit(ticker)
        if kind in ("trade", "aggTrade"):
            if self._trade_kinds.setdefault(ticker, kind) != kind:
                raise FrameError(
                    "second_trade_stream", f"{name}: trades of {ticker} come from {self._trade_kinds[ticker]}"
                )
            return self._on_trades(ticker, kind)
        if kind in ("depth", "depth@100ms"):
            return self._on_depth(ticker)
        makers = {"bookTicker": self._on_book_ticker, "ticker": self._on_ticker}
        if kind == "kline" or kind.startswith("kline_"):
            return self._on_kline(ticker)
        if kind not in makers:
            raise FrameError("unhandled_stream", name)
        return makers[kind](ticker)

    def _on_trades(self, ticker: str, kind: str) -> Callable[[bytes], None]:
        sync, instrument, emit_trade = self.trade_sync(ticker), self.emit.instrument(ticker), self.emit.trade

        def on_trade(frame: bytes) -> None:
            trade = _decode_trade(frame).data
            seq, timestamp = trade.t, trade.T
            if timestamp < _MS_MAX:
                timestamp *= 1000
            side = SELL if trade.m else BUY
            if seq == sync.last + 1:
                emit_trade(instrument, timestamp, side, trade.p, trade.q, seq)
                sync.last, sync.last_time = seq, timestamp
            else:
                sync.publish([(seq, timestamp, side, trade.p, trade.q, b"")])

        def on_agg_trade(frame: bytes) -> None:
            trade = _decode_agg_trade(frame).data
            sync.publish([(trade.a, _us(trade.T), SELL if trade.m else BUY, trade.p, trade.q, b"")])

        return on_trade if kind == "trade" else on_agg_trade

    def _on_depth(self, ticker: str) -> Callable[[bytes], None]:
        delta = self.book(ticker, follows).delta

        def on_depth(frame: bytes) -> None:
            update = _decode_depth(frame).data
            if update.u < update.U:
                raise FrameError("absurd_update_id", f"U={update.U} u={update.u}")
            delta(update.U, update.u, -1, _us(update.E), update.b, update.a)

        return on_depth

    def _on_book_ticker(self, ticker: str) -> Callable[[bytes], None]:
        instrument, emit_bbo = self.emit.instrument(ticker), self.emit.bbo

        def on_book_ticker(frame: bytes) -> None:
            best = _decode_book_ticker(frame).data
            emit_bbo(instrument, 0, best.b, best.B, best.a, best.A, best.u)

        return on_book_ticker

    def _on_ticker(self, ticker: str) -> Callable[[bytes], None]:
        instrument = self.emit.instrument(ticker)

        def on_ticker(frame: bytes) -> None:
            t = _decode_ticker(frame).data
            self.emit.ticker(
                instrument, _us(t.E), last=t.c, open_24h=t.o, high_24h=t.h, low_24h=t.l,
                volume_24h=t.v, quote_volume_24h=t.q, bid_price=t.b, ask_price=t.a,
            )  # fmt: skip

        return on_ticker

    def _on_kline(self, ticker: str) -> Callable[[bytes], None]:
        instrument = self.emit.instrument(ticker)

        def on_kline(frame: bytes) -> None:
            event = _decode_kline(frame).data
            k = event.k
            ohlc = (k.o, k.h, k.l, k.c)
            self.emit.candle(instrument, _us(event.E), k.i.encode(), _us(k.t), ohlc, k.v, k.n, k.x)

        return on_kline

    # Whether an acknowledged stream delivers

    def probe(self, stream: Stream) -> Fetch:
        """A trade changes the book, the best prices, the statistics and the candle: the newest one tells for all."""
        return Fetch(stream.name, f"/api/v3/aggTrades?symbol={quote(stream.ticker)}&limit=1", PROBE_WEIGHT)

    def newest_us(self, stream: Stream, body: bytes) -> int:
        return max((_us(trade.T) for trade in decode_body(_decode_newest, body)), default=0)

    # HTTP

    def want_snapshot(self, book: BookSync) -> None:
        """Local book, step 2."""
        limit = self.options.book_depth or SNAPSHOT_LEVELS_DEFAULT
        weight, ticker = self.snapshot_weight(self.options), book.instrument.ticker
        self.wants.append(Fetch(f"depth {ticker}", f"/api/v3/depth?symbol={quote(ticker)}&limit={limit}", weight))

    def want_repair(self, ticker: str, first: int, last: int) -> None:
        count = min(last - first + 1, TRADES_PER_REQUEST)
        path = f"/api/v3/historicalTrades?symbol={quote(ticker)}&fromId={first}&limit={count}"
        self.wants.append(Fetch(f"trades {ticker} {first}", path, TRADES_WEIGHT))

    def http(self, url: str, body: bytes) -> None:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        endpoint, symbol = parts.path.rpartition("/")[2], query.get("symbol", [""])[0]
        if endpoint == "depth":
            self.admit(symbol)
            book = self.book(symbol, follows)
            if book.state is LIVE:  # a late message healed it meanwhile
                self.emit.counters["book_snapshot_unneeded"] += 1
                return
            taken = False
            try:
                snapshot = decode_body(_decode_snapshot, body)
                taken = book.snapshot(snapshot.lastUpdateId, 0, snapshot.bids, snapshot.asks)
            finally:
                if not taken:  # step 3: older than the buffer, fetch again; so too when it is unusable
                    self.want_snapshot(book)
        elif endpoint == "historicalTrades":
            self.admit(symbol)
            sync = self.trade_sync(symbol)
            trades = [
                (t.id, _us(t.time), SELL if t.isBuyerMaker else BUY, t.price, t.qty, b"")
                for t in decode_body(_decode_rest_trades, body)
            ]
            sync.repaired(int(query.get("fromId", ["-1"])[0]), trades)
        elif endpoint == "exchangeInfo":
            self.take_instruments(url, body)
        elif endpoint not in ("time", "ping"):
            raise FrameError("unhandled_url", url)

    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        what, ticker = fetch.key.split(" ")[:2]
        reason = f"HTTP {status} {body[:200].decode(errors='replace')}"
        if what == "depth":
            self.refuse([s.name for s in self.streams if s.ticker == ticker and s.feed == "orderbook_l2"], reason)
        else:
            self.emit.counters["trade_repair_refused"] += 1
            self.notes[f"repair of {ticker} refused"] = reason


def _info(s: _Symbol) -> InstrumentInfo:
    filters = {f.filterType: f for f in s.filters}
    prices, lots = filters.get("PRICE_FILTER", _NO_FILTER), filters.get("LOT_SIZE", _NO_FILTER)
    return InstrumentInfo(
        s.symbol, s.status == "TRADING", "spot", s.baseAsset, s.quoteAsset, s.status, contract_size=1.0,
        tick_size=prices.tickSize or math.nan, qty_step=lots.stepSize or math.nan,
    )  # fmt: skip


def _control(method: str, names: Sequence[str], request_id: int) -> str:
    return msgspec.json.encode({"method": method, "params": names, "id": request_id}).decode()


VENUES = (BinanceSpot,)
