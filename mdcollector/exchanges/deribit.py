"""Deribit.

Documentation: docs.deribit.com (articles rate-limits, connection-management-best-practices, market-data-collection-
best-practices, authentication; `public/subscribe`, `public/set_heartbeat`), read in 2026. JSON-RPC 2.0 over WebSocket.
The book starts with a snapshot on the same channel; trades carry `trade_seq`, which has no holes. `raw` channels need
an authenticated connection; without credentials the 100 ms channels are taken and the status says so.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec

from mdcollector.continuity import HOLE, LIVE, NEXT, OLD, BookSync, TradeRow
from mdcollector.emit import Emit
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
from mdcollector.records import BUY, SELL, Exchange, Flag

CHANNELS_PER_SUBSCRIBE = 200  # 500 allowed [not confirmed]; a subscribe costs 3,000 credits whatever its length
HEARTBEAT_S = 30  # public/set_heartbeat, minimum 10
RESUBSCRIBE_EVERY_NS = 500_000_000  # books that need a snapshot are resubscribed together: 2 calls a second at most
RESUBSCRIBE_RETRY_NS = 15_000_000_000  # a snapshot that did not come is asked for again
REFILL_S = 10.0  # after error 10028: the subscribe pool of 30,000 credits refills at about 10,000 in 3 s
TRADES_PER_REQUEST = 1000
PROBE_TRADES = 20  # so many are asked for, as block trades may be among them
CANDLE_AHEAD_MAX_US = 3_600_000_000  # a candle that starts later than this from now is a broken frame
NEVER_MS = 4_102_444_800_000  # an expiry from the year 2100 on is none
REFRESH_SHARE = 0.8  # of a token's life, then it is refreshed
_NOTHING = msgspec.Raw(b"")
_NAN = math.nan
_TOO_MANY_REQUESTS, _RAW_UNAUTHORIZED = 10028, 13778
# retry, settlement_in_progress, queue full, too_many_concurrent_requests, system_maintenance, temporarily_unavailable,
# timed_out: codes that other clients were seen to retry on
_NOT_NOW = (10040, 10041, 10047, 10066, 11051, 13028, 13888)
AGAIN_NS = 10_000_000_000  # after one of those, what a connection begins with is sent once more
_LOGIN, _REFRESH = "client_credentials", "refresh_token"  # grant types of public/auth
_HEARTBEAT = "public/set_heartbeat"
_LAST = int(Flag.LAST)
_SIDES = {"buy": BUY, "sell": SELL}  # `direction` is the taker's

_INTERVALS = {
    "1": "1m", "3": "3m", "5": "5m", "10": "10m", "15": "15m", "30": "30m", "60": "1h", "120": "2h", "180": "3h",
    "360": "6h", "720": "12h", "1D": "1d",
}  # fmt: skip
_RESOLUTIONS = {text: resolution for resolution, text in _INTERVALS.items()}

TimeMs = Annotated[int, msgspec.Meta(ge=0, le=4_102_444_800_000)]
Levels = list[tuple[str, float, Quantity]]
Optional = float | None


class Book(msgspec.Struct, gc=False):
    """{"timestamp":..,"type":"change","instrument_name":"BTC-PERPETUAL","change_id":..,"prev_change_id":..,"bids":[["new",1,2]],...}"""

    timestamp: TimeMs
    change_id: Id
    bids: Levels
    asks: Levels
    type: str = ""
    prev_change_id: Id | None = None


class Trade(msgspec.Struct, gc=False):
    """{"trade_seq":30289442,"trade_id":"48079269","timestamp":1590484512188,"price":8950.0,"amount":10.0,"direction":"sell",...}"""

    trade_seq: Id
    trade_id: str
    timestamp: TimeMs
    price: float
    amount: Quantity
    direction: str
    instrument_name: str


class Quote(msgspec.Struct, gc=False):
    """{"timestamp":..,"instrument_name":..,"best_bid_price":..,"best_bid_amount":..,"best_ask_price":..,"best_ask_amount":..}"""

    timestamp: TimeMs
    best_bid_price: Optional = None
    best_bid_amount: Optional = None
    best_ask_price: Optional = None
    best_ask_amount: Optional = None


class _Stats(msgspec.Struct, gc=False):
    high: Optional = None
    low: Optional = None
    volume: Optional = None
    volume_usd: Optional = None


class Ticker(msgspec.Struct, gc=False):
    """{"timestamp":..,"stats":{"volume":..,"high":..,"low":..},"last_price":..,"mark_price":..,"index_price":..,...}"""

    timestamp: TimeMs
    stats: _Stats = msgspec.field(default_factory=_Stats)
    last_price: Optional = None
    best_bid_price: Optional = None
    best_bid_amount: Optional = None
    best_ask_price: Optional = None
    best_ask_amount: Optional = None
    mark_price: Optional = None
    index_price: Optional = None
    current_funding: Optional = None
    open_interest: Optional = None


class Chart(msgspec.Struct, gc=False):
    """{"tick":1573645080000,"open":8869.79,"high":8870.31,"low":8869.79,"close":8870.31,"volume":0.05,"cost":460.0}"""

    tick: TimeMs
    open: float
    high: float
    low: float
    close: float
    volume: float


class _Error(msgspec.Struct):
    code: int = 0
    message: str = ""
    data: msgspec.Raw = _NOTHING


class _Params(msgspec.Struct):
    channel: str = ""
    type: str = ""


class _Envelope(msgspec.Struct):
    """Any message: a notification, a heartbeat, a reply; only what tells them apart."""

    method: str = ""
    params: _Params = msgspec.field(default_factory=_Params)
    id: int | str | None = None
    result: msgspec.Raw = _NOTHING
    error: _Error | None = None


class _Token(msgspec.Struct):
    access_token: str
    refresh_token: str
    expires_in: int


class _TimeReply(msgspec.Struct):
    """{"jsonrpc":"2.0","result":1733338800000,"usIn":1733338800000123,"usOut":1733338800000130,"usDiff":7,...}"""

    result: TimeMs
    usOut: Time = 0  # noqa: N815 (the venue's name); when the answer went out


class _Instrument(msgspec.Struct):
    """public/get_instruments, 2026-07; times in ms, an instrument without expiry has one in the year 3000."""

    instrument_name: str
    is_active: bool = True
    kind: str = ""
    base_currency: str = ""
    quote_currency: str = ""
    settlement_period: str = ""
    state: str = ""
    tick_size: float = math.nan
    min_trade_amount: float = math.nan
    creation_timestamp: int = -1
    expiration_timestamp: int = -1


class _Instruments(msgspec.Struct):
    result: list[_Instrument]


class _TradesResult(msgspec.Struct):
    trades: list[Trade]


class _TradesReply(msgspec.Struct):
    result: _TradesResult


class _Newest(msgspec.Struct):
    """public/get_last_trades_by_instrument, what a probe needs of a trade."""

    timestamp: TimeMs
    block_trade_id: str | None = None


class _NewestResult(msgspec.Struct):
    trades: list[_Newest]


class _NewestReply(msgspec.Struct):
    result: _NewestResult


class _BookResult(msgspec.Struct):
    """public/get_order_book, what a probe needs of it."""

    timestamp: TimeMs
    change_id: Id


class _BookReply(msgspec.Struct):
    result: _BookResult


def _frames(kind: Any, name: str) -> Callable[[bytes], Any]:
    """Decoder of a notification that carries `kind` in `params.data`."""
    params = msgspec.defstruct(f"{name}Params", [("data", kind)], gc=False)
    frame = msgspec.defstruct(f"{name}Frame", [("params", params)], gc=False)
    return msgspec.json.Decoder(frame).decode


_decode_book, _decode_trades = _frames(Book, "Book"), _frames(list[Trade], "Trades")
_decode_quote, _decode_ticker, _decode_chart = (
    _frames(Quote, "Quote"),
    _frames(Ticker, "Ticker"),
    _frames(Chart, "Chart"),
)
_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_instruments = msgspec.json.Decoder(_Instruments).decode
_decode_trades_reply = msgspec.json.Decoder(_TradesReply).decode
_decode_time = msgspec.json.Decoder(_TimeReply).decode
_decode_newest = msgspec.json.Decoder(_NewestReply).decode
_decode_book_reply = msgspec.json.Decoder(_BookReply).decode
_decode_token = msgspec.json.Decoder(_Token).decode
_decode_names = msgspec.json.Decoder(list[str]).decode


def follows(last_id: int, _first: int, last: int, prev: int) -> int:
    """A change must name the last one as its predecessor; `change_id` itself jumps, other instruments share it."""
    if prev == last_id:
        return NEXT
    return OLD if last <= last_id else HOLE


def _pairs(levels: Levels) -> list[tuple[float, float]]:
    return [(price, 0.0 if action == "delete" else amount) for action, price, amount in levels]


def _given(value: float | None) -> float:
    return _NAN if value is None else value


class Deribit(Venue):
    """One JSON-RPC connection of Deribit."""

    NAME = "deribit"
    EXCHANGE = Exchange.DERIBIT
    FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles")
    INTERVALS = tuple(_RESOLUTIONS)
    BOOK_DEPTH_MAX = 0
    BOOK_INTERVALS = ("raw", "100ms", "agg2")
    WS_URL = "wss://www.deribit.com"
    REST_URL = "https://www.deribit.com"
    TIME_PATH = "/api/v2/public/get_time"
    PREFIX = b'{"jsonrpc":"2.0","method":"subscription","params":{"channel":"'
    LIMITS = Limits(
        streams_per_connection=500,
        messages_per_s=3,  # public/subscribe: about 3.3 a second sustained, 2026
        connects=(32, 60.0),  # own choice, the documents name no rate
        open_per_ip=32,  # short HTTP calls included, 2026; the 33rd gets a 429
        http_is_open=True,
        sessions_per_key=16,
        weight=(20, 1.0),  # non-matching requests: 20 a second sustained
        instruments_weight=20,  # get_instruments costs 10,000 credits, of which 10,000 come back in a second
        lifetime_s=0,
        messages_per_ip=(33, 10.0),  # subscribes: 3,000 credits of a pool of 30,000, of which 10,000 come back a second
    )
    CREDENTIALS = ("client_id", "client_secret")
    KNOWN_FIELDS = frozenset({
        "jsonrpc", "method", "params", "channel", "data", "type", "timestamp", "instrument_name", "state",
        "change_id", "prev_change_id", "bids", "asks", "trade_id", "trade_seq", "price", "amount", "contracts",
        "direction", "index_price", "mark_price", "tick_direction", "iv", "liquidation", "legs", "combo_id",
        "combo_trade_id", "combo_state", "block_trade_id", "block_trade_leg_count", "block_rfq_id",
        "starbase_match_id", "starbase_timestamp", "best_bid_price", "best_bid_amount", "best_ask_price",
        "best_ask_amount", "stats", "high", "low", "volume", "volume_usd", "volume_notional", "price_change",
        "last_price", "open_interest", "current_funding", "funding_8h", "min_price", "max_price", "settlement_price",
        "delivery_price", "estimated_delivery_price", "interest_rate", "interest_value", "underlying_price",
        "underlying_index", "bid_iv", "ask_iv", "mark_iv", "implied_bid", "implied_ask", "greeks", "delta", "gamma",
        "vega", "theta", "rho", "tick", "open", "close", "cost",
    })  # fmt: skip

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        super().__init__(emit, options, streams, open_world=open_world)
        self._requests: dict[int, tuple[str, list[str]]] = {}
        self._request_id = 0
        self._refresh_token = ""
        self._refresh_at_ns = 0
        self._had_raw = self._login_lost = False  # on this connection
        self._begin_again: dict[str, int] = {}  # what the venue had no time for -> when it is asked again
        self._login_waits = False  # the login of this connection is not answered yet
        self._fell_back = False  # the streams are the 100 ms ones in place of raw
        self._resubscribe: dict[str, int] = {}  # ticker -> when it was asked for (0 = not yet)
        self._resubscribed_ns = 0
        self._candles: dict[tuple[str, str], Chart] = {}
        if not options.credentials:
            self.notes["credentials"] = "none given: 100 ms channels instead of raw"

    def _streams_changed(self, left: Collection[str], gone: Collection[str]) -> None:
        self._candles = {key: candle for key, candle in self._candles.items() if key[0] not in gone}

    # Planning

    @classmethod
    def streams_of(cls, ticker: str, feeds: Sequence[str], options: Options) -> list[Stream]:
        interval = options.book_interval or ("raw" if options.credentials else "100ms")
        if interval == "raw" and not options.credentials:
            interval = "100ms"
        names = {
            "trades": f"trades.{ticker}.{interval}",
            "orderbook_l2": f"book.{ticker}.{interval}",
            "bbo": f"quote.{ticker}",
            "tickers": f"ticker.{ticker}.{interval}",
        }
        streams = [Stream(names[feed], feed, ticker) for feed in feeds if feed in names]
        if "candles" in feeds:
            streams += [
                Stream(f"chart.trades.{ticker}.{_RESOLUTIONS[i]}", "candles", ticker) for i in options.intervals
            ]
        return streams

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        return ("/api/v2/public/get_instruments?currency=any&expired=false",)

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        return [_info(i) for i in decode_body(_decode_instruments, body).result]

    @classmethod
    def server_time(cls, body: bytes) -> tuple[int, int]:
        reply = decode_body(_decode_time, body)
        return (reply.usOut, 1) if reply.usOut else (reply.result * 1000, 1000)

    # Connection

    def ws_path(self) -> str:
        return "/ws/api/v2"

    def opened(self) -> None:
        self._requests.clear()
        self._refresh_token, self._refresh_at_ns = "", 0
        self._had_raw = self._login_lost = False
        self._begin_again.clear()
        self._login_waits = bool(self.options.credentials)
        self._begin(_HEARTBEAT)
        if self._login_waits:
            self._begin(_LOGIN)  # subscribing waits for the reply: the token belongs to the connection
        else:
            self.subscribe([stream.name for stream in self.streams])

    def _begin(self, what: str) -> None:
        if what == _LOGIN:
            self._call("public/auth", {"grant_type": _LOGIN, **self.options.credentials})
        else:
            self._call(_HEARTBEAT, {"interval": HEARTBEAT_S})

    def closing(self) -> list[str]:
        self._request_id += 1
        return [_rpc(self._request_id, "public/unsubscribe_all", {})]

    def subscribe(self, names: Sequence[str]) -> None:
        if self._login_waits:
            return  # raw channels would be refused now; the login brings all of them
        self._call_for("public/subscribe", names)

    def unsubscribe(self, names: Sequence[str]) -> None:
        self._call_for("public/unsubscribe", names)

    def _call_for(self, method: str, names: Sequence[str]) -> None:
        for i in range(0, len(names), CHANNELS_PER_SUBSCRIBE):
            self._call(method, {"channels": list(names[i : i + CHANNELS_PER_SUBSCRIBE])})

    def _call(self, method: str, params: dict[str, Any], urgent: bool = False) -> None:
        self._request_id += 1
        self._requests[self._request_id] = (params.get("grant_type", method), params.get("channels", []))
        self.wants.append(Send(_rpc(self._request_id, method, params), urgent))

    def tick(self, now_ns: int) -> None:
        if self._refresh_at_ns and now_ns > self._refresh_at_ns:
            self._refresh_at_ns = 0
            self._call("public/auth", {"grant_type": _REFRESH, "refresh_token": self._refresh_token})
        for what in [what for what, due_ns in self._begin_again.items() if now_ns > due_ns]:
            del self._begin_again[what]
            self._begin(what)
        for ticker in [t for t in self._resubscribe if (book := self.books.get(t)) is None or book.state is LIVE]:
            del self._resubscribe[ticker]  # a late message healed it meanwhile
        due = [t for t, asked in self._resubscribe.items() if now_ns - asked > RESUBSCRIBE_RETRY_NS]
        if due and now_ns - self._resubscribed_ns > RESUBSCRIBE_EVERY_NS:
            self._resubscribed_ns = now_ns
            for ticker in due:
                self._resubscribe[ticker] = now_ns
            channels = [s.name for s in self.streams if s.feed == "orderbook_l2" and s.ticker in self._resubscribe]
            channels = [name for name in channels if self._tickers[name] in due]
            # Subscribing to a channel that is subscribed gives no snapshot: leave it first.
            self.unsubscribe(channels)
            self.subscribe(channels)

    def disconnected(self, cause: str) -> None:
        super().disconnected(cause)
        self._refresh_at_ns = 0
        self._begin_again.clear()
        self._candles.clear()  # what was the open candle may have changed before it closed
        self._resubscribe.clear()  # the new connection begins every book with a snapshot

    def unrouted(self, frame: bytes) -> None:
        envelope = _decode_envelope(frame)
        if envelope.method == "subscription":
            name = envelope.params.channel
            self.take_route(frame, self.watched(name, self._handler(name)))
        elif envelope.method == "heartbeat":
            if envelope.params.type == "test_request":
                self._call("public/test", {}, urgent=True)
        elif len(envelope.result) or envelope.error is not None:
            self._reply(envelope)
        else:
            raise FrameError("unhandled_event", envelope.method)

    def _reply(self, envelope: _Envelope) -> None:
        method, channels = self._requests.pop(envelope.id, ("", [])) if isinstance(envelope.id, int) else ("", [])
        if envelope.error is not None:
            self._failed(method, channels, envelope.error)
        elif method in (_LOGIN, _REFRESH):
            token = _decode_token(envelope.result)
            self._refresh_token = token.refresh_token
            self._refresh_at_ns = time.time_ns() + int(token.expires_in * REFRESH_SHARE * 1e9)
            if method == _LOGIN:
                self._login_waits = False
                self._logged_in()
        elif method == "public/subscribe":
            confirmed = _decode_names(envelope.result)
            self.acknowledge(confirmed, time.time_ns())
            self._had_raw |= any(_is_raw(name) for name in confirmed)
            if missing := sorted(set(channels) - set(confirmed)):
                self.refuse(missing, "left out of the reply to subscribe: the venue knows no such channel")
        elif not method and not self.open_world:
            raise FrameError("unknown_reply", str(envelope.id))

    def _failed(self, method: str, channels: list[str], error: _Error) -> None:
        text = f"{error.code} {error.message}"
        if error.code == _TOO_MANY_REQUESTS:
            self.emit.counters["venue_rate_limited"] += 1
            self.wants.append(Reconnect("too_many_requests", wait_s=REFILL_S))
        elif method == _REFRESH:
            self.emit.counters["token_refused"] += 1
            self.wants.append(Reconnect("token_refused", overlap=True))  # a new connection begins with a login
        elif error.code == _RAW_UNAUTHORIZED and (self._had_raw or (self.overlapping and not method)):
            self._lost_login(text)
        elif error.code in _NOT_NOW:
            self.emit.counters["venue_busy"] += 1  # a subscription stays unconfirmed, so it is asked for again
            if method in (_LOGIN, _HEARTBEAT):
                self._begin_again[method] = time.time_ns() + AGAIN_NS
        elif error.code == _RAW_UNAUTHORIZED or method == _LOGIN:  # whatever it has against it: record what is public
            self._login_waits = False
            self._fall_back(text)
        elif channels and method == "public/subscribe":
            self.refuse_batch(channels, text)
        else:
            raise FrameError("venue_error", f"{method}: {text}")

    def _lost_login(self, reason: str) -> None:
        """Raw channels were open on this connection and are not any more: all of them are dead, a new login brings them.

        Both connections would deliver the rest meanwhile, so what the dead ones missed is told per stream.
        """
        if self._login_lost or self.overlapping:  # once; and a replacement that is under way logs in anyway
            return
        self._login_lost = True
        self.emit.counters["login_lost"] += 1
        now = time.time_ns()
        for stream in self.streams:
            state = self.proof.get(stream.name)
            if state is None or not _is_raw(stream.name):
                continue
            if not state.hole_us:
                state.hole_us = self.emit.last_rcv_us(stream.feed, stream.ticker) or state.requested_ns // 1000
                state.hole_cause = "silent"
            state.hole_told, state.requested_ns = False, now
            if stream.feed == "orderbook_l2" and stream.ticker in self.books:
                self.books[stream.ticker].disconnected("silent")
            if stream.feed == "trades" and stream.ticker in self.trade_syncs:
                self.trade_syncs[stream.ticker].disconnected("silent")
        self.wants.append(Reconnect(f"login lost: {reason}", overlap=True))

    def _fall_back(self, reason: str) -> None:
        """Without a valid login the raw channels are closed to us: take the 100 ms ones and say so."""
        self.emit.counters["raw_refused"] += 1
        self.notes["credentials"] = f"{reason}: 100 ms channels instead of raw"
        self._fell_back |= any(_is_raw(stream.name) for stream in self.streams)
        self._rename(_slower)
        self.subscribe([stream.name for stream in self.streams])

    def _logged_in(self) -> None:
        """Take all channels; the raw ones again, if an earlier login failed.

        Not those beside a connection that still brings the 100 ms ones: the changes of both cannot be joined to one book.
        """
        if not self.overlapping:
            self.notes.pop("credentials", None)
            if self._fell_back:
                self._fell_back = False
                self._rename(_raw)
        self.subscribe([stream.name for stream in self.streams])

    def _rename(self, renamed: Callable[[str], str]) -> None:
        self.streams = [Stream(renamed(s.name), s.feed, s.ticker) for s in self.streams]
        self.proof = {renamed(name): state for name, state in self.proof.items()}
        self._tickers = {stream.name: stream.ticker for stream in self.streams}

    def _handler(self, channel: str) -> Callable[[bytes], None]:
        """What decodes the notifications of a channel; FrameError when its instrument or kind is not wanted."""
        kind, _, rest = channel.partition(".")
        if kind == "quote":
            return self._on_quote(rest)
        if kind == "chart":
            ticker, _, resolution = rest.removeprefix("trades.").rpartition(".")
            if resolution not in _INTERVALS:
                raise FrameError("unhandled_channel", channel)
            return self._on_chart(ticker, _INTERVALS[resolution])
        ticker, _, _interval = rest.rpartition(".")
        makers = {"trades": self._on_trades, "book": self._on_book, "ticker": self._on_ticker}
        if kind not in makers or not ticker or (kind == "book" and "." in ticker):
            raise FrameError("unhandled_channel", channel)  # grouped books among them: they carry no predecessor
        return makers[kind](ticker)

    def _on_trades(self, ticker: str) -> Callable[[bytes], None]:
        if "." not in ticker:  # else all instruments of a kind and currency share one channel
            self.admit(ticker)
        emit_trade, sync_of, side_of = self.emit.trade, self.trade_syncs.get, _SIDES.get

        def on_trades(frame: bytes) -> None:
            trades = _decode_trades(frame).params.data
            if len(trades) == 1:
                t = trades[0]
                sync, side, seq = sync_of(t.instrument_name), side_of(t.direction), t.trade_seq
                if sync is not None and side and seq == sync.last + 1:  # the common case
                    timestamp = t.timestamp * 1000
                    emit_trade(sync.instrument, timestamp, side, t.price, t.amount, seq, _LAST, t.trade_id.encode())
                    sync.last, sync.last_time = seq, timestamp
                    return
            by_instrument: dict[str, list[TradeRow]] = {}
            for t in trades:
                by_instrument.setdefault(t.instrument_name, []).append(self._row(t))
            for name, rows in by_instrument.items():
                self.admit(name)
                self.trade_sync(name).publish(rows)

        return on_trades

    def _row(self, t: Trade) -> TradeRow:
        side = _SIDES.get(t.direction) or self.side_of_trade(_SIDES, t.direction)
        return t.trade_seq, t.timestamp * 1000, side, t.price, t.amount, t.trade_id.encode()

    def _on_book(self, ticker: str) -> Callable[[bytes], None]:
        self.admit(ticker)
        book = self.book(ticker, follows)

        def on_book(frame: bytes) -> None:
            event = _decode_book(frame).params.data
            timestamp = event.timestamp * 1000
            bids, asks = _pairs(event.bids), _pairs(event.asks)
            if event.type == "change":
                previous = -1 if event.prev_change_id is None else event.prev_change_id
                book.delta(event.change_id, event.change_id, previous, timestamp, bids, asks)
            elif event.type != "snapshot":
                raise FrameError("unknown_book_type", event.type)
            elif self.overlapping and book.state is LIVE:
                self.pass_over(book, event.change_id)
            else:
                book.snapshot(event.change_id, timestamp, bids, asks, in_band=True)
                self._resubscribe.pop(ticker, None)

        return on_book

    def _on_quote(self, ticker: str) -> Callable[[bytes], None]:
        self.admit(ticker)
        instrument, emit_bbo = self.emit.instrument(ticker), self.emit.bbo

        def on_quote(frame: bytes) -> None:
            q = _decode_quote(frame).params.data
            bid_qty, ask_qty = q.best_bid_amount or 0.0, q.best_ask_amount or 0.0
            bid = _given(q.best_bid_price) if bid_qty else _NAN  # a side without orders has the price 0
            ask = _given(q.best_ask_price) if ask_qty else _NAN
            emit_bbo(instrument, q.timestamp * 1000, bid, bid_qty, ask, ask_qty)

        return on_quote

    def _on_ticker(self, ticker: str) -> Callable[[bytes], None]:
        self.admit(ticker)
        instrument = self.emit.instrument(ticker)

        def on_ticker(frame: bytes) -> None:
            t = _decode_ticker(frame).params.data
            values = {
                "last": t.last_price, "high_24h": t.stats.high, "low_24h": t.stats.low, "volume_24h": t.stats.volume,
                "quote_volume_24h": t.stats.volume_usd,
                "bid_price": t.best_bid_price if t.best_bid_amount != 0 else None,
                "ask_price": t.best_ask_price if t.best_ask_amount != 0 else None,
                "mark_price": t.mark_price, "index_price": t.index_price, "funding_rate": t.current_funding,
                "open_interest": t.open_interest,
            }  # fmt: skip
            given = {name: value for name, value in values.items() if value is not None}
            self.emit.ticker(instrument, t.timestamp * 1000, **given)

        return on_ticker

    def _on_chart(self, ticker: str, interval: str) -> Callable[[bytes], None]:
        self.admit(ticker)
        instrument, key = self.emit.instrument(ticker), (ticker, interval)

        def on_chart(frame: bytes) -> None:
            # The venue never says that a candle is closed: the first one of the next interval does.
            new = _decode_chart(frame).params.data
            if new.tick * 1000 > self.emit.rcv_us + CANDLE_AHEAD_MAX_US:
                raise FrameError("absurd_number", f"candle tick={new.tick}")
            old = self._candles.get(key)
            if old is not None and new.tick > old.tick:
                self._emit_candle(instrument, interval, self._candles.pop(key), closed=True)
            if old is None or new.tick >= old.tick:
                self._emit_candle(instrument, interval, new, closed=False)
                self._candles[key] = new

        return on_chart

    def _emit_candle(self, instrument: Any, interval: str, c: Chart, *, closed: bool) -> None:
        ohlc = (c.open, c.high, c.low, c.close)
        self.emit.candle(instrument, 0, interval.encode(), c.tick * 1000, ohlc, c.volume, -1, closed)

    # Whether an acknowledged stream delivers

    def probe(self, stream: Stream) -> Fetch:
        """The book for the book; trades for all others, which they change, too."""
        query = {"instrument_name": stream.ticker}
        if stream.feed == "orderbook_l2":
            return Fetch(stream.name, f"/api/v2/public/get_order_book?{urlencode(query)}&depth=1", 1)
        path = f"/api/v2/public/get_last_trades_by_instrument?{urlencode(query)}&count={PROBE_TRADES}"
        return Fetch(stream.name, path, 1)

    def newest_us(self, stream: Stream, body: bytes) -> int:
        if stream.feed == "orderbook_l2":
            now, book = decode_body(_decode_book_reply, body).result, self.books.get(stream.ticker)
            return 0 if book is not None and now.change_id <= book.last_id else now.timestamp * 1000
        trades = decode_body(_decode_newest, body).result.trades
        if stream.feed != "trades":  # block trades pass by the book, the best prices and the candles
            trades = [trade for trade in trades if trade.block_trade_id is None]
        return max((trade.timestamp * 1000 for trade in trades), default=0)

    # What is missing

    def want_snapshot(self, book: BookSync) -> None:
        """A change came that no snapshot precedes: one comes only after leaving and taking the channel again."""
        self._resubscribe.setdefault(book.instrument.ticker, 0)

    def want_repair(self, ticker: str, first: int, last: int) -> None:
        last = min(last, first + TRADES_PER_REQUEST - 1)
        query = {"instrument_name": ticker, "start_seq": first, "end_seq": last, "count": TRADES_PER_REQUEST}
        path = f"/api/v2/public/get_last_trades_by_instrument?{urlencode(query)}&sorting=asc"
        self.wants.append(Fetch(f"trades {ticker} {first}", path, 1))

    def http(self, url: str, body: bytes) -> None:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        method = parts.path.rpartition("/")[2]
        if method == "get_last_trades_by_instrument":
            ticker = query.get("instrument_name", [""])[0]
            self.admit(ticker)
            rows = [self._row(t) for t in decode_body(_decode_trades_reply, body).result.trades]
            self.trade_sync(ticker).repaired(int(query.get("start_seq", ["-1"])[0]), rows)
        elif method == "get_instruments":
            self.take_instruments(url, body)
        elif method not in ("get_time", "test"):
            raise FrameError("unhandled_url", url)

    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        self.emit.counters["trade_repair_refused"] += 1
        self.notes[f"{fetch.key.split(' ')[1]} repair refused"] = f"HTTP {status} {body[:200].decode(errors='replace')}"


def _info(i: _Instrument) -> InstrumentInfo:
    kind = "perpetual" if i.settlement_period == "perpetual" else i.kind
    expiry = -1 if i.expiration_timestamp >= NEVER_MS else i.expiration_timestamp * 1000
    return InstrumentInfo(
        i.instrument_name, i.is_active, kind, i.base_currency, i.quote_currency, i.state, tick_size=i.tick_size,
        qty_step=i.min_trade_amount,
        contract_size=1.0,  # amounts are in USD (inverse futures) or base currency, not in contracts
        listed_time=max(-1, i.creation_timestamp * 1000), expiry_time=max(-1, expiry),
    )  # fmt: skip


def _is_raw(channel: str) -> bool:
    return channel.endswith(".raw")


def _slower(channel: str) -> str:
    return channel.removesuffix(".raw") + ".100ms" if _is_raw(channel) else channel


def _raw(channel: str) -> str:
    return channel.removesuffix(".100ms") + ".raw" if channel.endswith(".100ms") else channel


def _rpc(request_id: int, method: str, params: dict[str, Any]) -> str:
    return msgspec.json.encode({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}).decode()


VENUES = (Deribit,)
