"""OKX (v5).

Documentation: okx.com/docs-v5/en, read as of 2026-09; the notice of 2026-05-21 on the checksum. Public channels and the
business ones (candles, `trades-all`) have connections of their own. A book starts with a snapshot on its channel and
goes on by `prevSeqId`; frames of 2021-2022, which have none, are proven by their CRC32, and where the venue sends 0
(since 2026-06-23) there is nothing to check. `tradeId` has no holes: on `trades-all` each trade is a row with it as
`trade_seq`, on `trades` one row stands for `count` of them, so it is checked here and no row has a `trade_seq`.
Sizes of derivatives are contracts; the list of instruments says what one is.
"""

import base64
import hashlib
import hmac
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from heapq import nlargest, nsmallest
from itertools import chain, zip_longest
from typing import Annotated, Any
from urllib.parse import parse_qs, quote, urlsplit
from zlib import crc32

import msgspec

from mdcollector.continuity import HOLE, LIVE, NEXT, OLD, BookSync, TradeRow, TradeSync
from mdcollector.emit import Emit, Instrument
from mdcollector.errors import FrameError, RateLimited
from mdcollector.exchanges import (
    Fetch,
    Id,
    InstrumentInfo,
    Limits,
    Options,
    Past,
    Quantity,
    Reconnect,
    Send,
    Stream,
    Venue,
    decode_body,
    trade_holes_left,
)
from mdcollector.records import BUY, SELL, Exchange, Flag

PUBLIC, BUSINESS = "/ws/v5/public", "/ws/v5/business"
REQUESTS_PER_HOUR = 480  # subscribe, unsubscribe and login requests of one connection; many args count once; 2026
ARGS_PER_REQUEST = 200  # a request has 64 KB at most; the longest arg is some 100 bytes
BOOKS_PER_CONNECTION = 29  # "less than 30" books of 400 levels are recommended
PING_EVERY_NS = 20_000_000_000  # the server hangs up after 30 s without anything
PONG_WITHIN_NS = 10_000_000_000
REPLY_WITHIN_NS = 15_000_000_000  # then a login is given up
RESUBSCRIBE_EVERY_NS = 500_000_000  # books that need a snapshot are resubscribed together, twice a second at most
RESUBSCRIBE_STEP = 60  # so many requests of the hour are gone: half as often
RESUBSCRIBE_RETRY_NS = 15_000_000_000  # a snapshot that did not come is asked for again
TRADES_PER_REQUEST = 100  # GET /api/v5/market/history-trades
CHECKSUM_LEVELS = 25
OPTION_FAMILIES = ("BTC-USD", "ETH-USD")  # options are listed by family only; these are all since 2020
INDEX_TICKERS_MAX = 1000  # instruments that one price of an index is written for
_HOUR_NS = 3_600_000_000_000
# Answers over HTTP, whatever their status, that mean "not now", and how long nobody asks: too many requests (limits are
# within 2 s); busy; service unavailable, system error. error codes of docs-v5, 2026
_NOT_NOW_S = {"50011": 2.0, "50013": 2.0, "50001": 10.0, "50026": 10.0}
LOGIN_AGAIN_NS = 10_000_000_000  # after one that came too soon
_NOT_YET, _TOO_FREQUENT, _UPGRADE = "60011", "60014", "64008"
_TBT, _BOOKS = "books-l2-tbt", "books"
_MARKS = ("tickers", "mark-price", "open-interest", "index-tickers", "funding-rate")
_FUNDING_WITHIN_US = 90_000_000  # a funding rate is pushed each 30 to 90 s, whether it changed or not; 2026
_TBT_REFUSED = (_NOT_YET, "60029", "64003")  # login needed, tier too low
_ARG_IN_TEXT = re.compile(r"channel:\s*([\w-]+)\s*,\s*inst(?:Id|Type|Family):\s*([\w-]+)")
_PUSH_TIME = re.compile(rb'"ts":"\d+"')
_NOTHING = msgspec.Raw(b"")
_IMPOSSIBLE = -2  # a time that no instrument has

# Intervals of candles; those of six hours and more begin at UTC midnight with `utc`, else at that of Hong Kong.
_BARS = {
    "1s": "1s", "1m": "1m", "3m": "3m", "5m": "5m", "15m": "15m", "30m": "30m", "1h": "1H", "2h": "2H", "4h": "4H",
    "6h": "6Hutc", "12h": "12Hutc", "1d": "1Dutc", "2d": "2Dutc", "3d": "3Dutc", "5d": "5Dutc", "1w": "1Wutc",
    "1M": "1Mutc", "3M": "3Mutc",
}  # fmt: skip
_INTERVALS = {bar: interval for interval, bar in _BARS.items()} | {
    bar: bar for bar in ("6H", "12H", "1D", "2D", "3D", "5D", "1W", "1M", "3M")
}
_KINDS = {"SPOT": "spot", "SWAP": "perpetual", "FUTURES": "future", "OPTION": "option"}
_LAST = int(Flag.LAST)
_SIDES = {"buy": BUY, "sell": SELL}

# Names of the fields that frames were seen to have, or that the documents name.
_FIELDS = """
    action arg askPx askSz asks baseCcy bidPx bidSz bids bkLoss bkPx ccy channel checksum code connId count data
    details event formulaType fundingRate fundingTime generated high24h id idxPx impactValue instFamily instId
    instType interestRate last lastSz low24h markPx maxFundingRate method minFundingRate msg nextFundingRate
    nextFundingTime oi oiCcy oiUsd open24h posSide prevFundingTime prevSeqId premium px seqId settFundingRate
    settState side sodUtc0 sodUtc8 source sz tradeId ts uly vol24h volCcy24h
"""

TimeMs = Annotated[int, msgspec.Meta(ge=0, le=4_102_444_800_000)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Previous = Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]  # -1 = there is none


class Level(msgspec.Struct, array_like=True, gc=False):
    """["8476.98","415","0","13"]: price, size, a dead field, number of orders"""

    px: float
    sz: Quantity


class Book(msgspec.Struct, gc=False):
    """{"asks":[["8476.98","415","0","13"]],"bids":[],"ts":"1597026383085","checksum":0,"prevSeqId":-1,"seqId":123456}"""

    asks: list[Level]
    bids: list[Level]
    ts: TimeMs
    checksum: int = 0
    seqId: Id | None = None  # noqa: N815 (the venue's name)
    prevSeqId: Previous = -1  # noqa: N815 (the venue's name)


class Trade(msgspec.Struct, gc=False):
    """{"instId":"BTC-USDT","tradeId":"130639474","px":"42219.9","sz":"0.12","side":"buy","ts":"1630048897897","count":"3"}"""

    tradeId: Id  # noqa: N815 (the venue's name)
    px: float
    sz: Quantity
    side: str
    ts: TimeMs
    count: Count | None = None  # only where trades are merged


class Best(msgspec.Struct, gc=False):
    """{"asks":[["8476.98","415","0","13"]],"bids":[["8476.97","256","0","12"]],"ts":"1597026383085","seqId":123456}"""

    asks: list[Level]
    bids: list[Level]
    ts: TimeMs
    seqId: Id | None = None  # noqa: N815 (the venue's name)


class Marks(msgspec.Struct, gc=False):
    """What `tickers`, `mark-price`, `index-tickers`, `open-interest` and `funding-rate` say; a number may be "" """

    ts: TimeMs = 0
    last: str = ""
    askPx: str = ""  # noqa: N815 (the venue's names)
    bidPx: str = ""  # noqa: N815
    open24h: str = ""
    high24h: str = ""
    low24h: str = ""
    vol24h: str = ""
    volCcy24h: str = ""  # noqa: N815
    markPx: str = ""  # noqa: N815
    idxPx: str = ""  # noqa: N815
    oi: str = ""
    fundingRate: str = ""  # noqa: N815
    fundingTime: str = ""  # noqa: N815


class _Detail(msgspec.Struct):
    side: str
    bkPx: float  # noqa: N815 (the venue's name)
    sz: Quantity
    ts: TimeMs


class Liquidation(msgspec.Struct):
    """{"details":[{"bkPx":"0.4162","posSide":"short","side":"buy","sz":"2137","ts":"1789669898955"}],"instId":...}"""

    instId: str  # noqa: N815 (the venue's name)
    details: msgspec.Raw  # of all instruments of a type: those of a wanted one are decoded


class _RestTrade(msgspec.Struct):
    tradeId: Id  # noqa: N815 (the venue's name)
    px: float
    sz: Quantity
    side: str
    ts: TimeMs


class _Time(msgspec.Struct):
    """{"ts":"1597026383085"}"""

    ts: Annotated[str, msgspec.Meta(min_length=1)]


class _Instrument(msgspec.Struct):
    instId: str  # noqa: N815 (the venue's names)
    instType: str  # noqa: N815
    state: str = ""
    uly: str = ""
    baseCcy: str = ""  # noqa: N815
    quoteCcy: str = ""  # noqa: N815
    settleCcy: str = ""  # noqa: N815
    ctVal: str = ""  # noqa: N815
    ctMult: str = ""  # noqa: N815
    tickSz: str = ""  # noqa: N815
    lotSz: str = ""  # noqa: N815
    listTime: str = ""  # noqa: N815
    expTime: str = ""  # noqa: N815


class _Arg(msgspec.Struct):
    channel: str = ""
    instId: str = ""  # noqa: N815 (the venue's names)
    instType: str = ""  # noqa: N815


class _Envelope(msgspec.Struct):
    """Any message: data, a reply, an error, a notice; only what tells them apart."""

    arg: _Arg | None = None
    data: msgspec.Raw = _NOTHING
    event: str = ""
    id: str = ""
    code: str = ""
    msg: str = ""
    channel: str = ""
    connCount: str = ""  # noqa: N815 (the venue's name)


class _Answer(msgspec.Struct):
    """Any answer over HTTP; `code` is "0" unless it is an error, whatever the HTTP status says."""

    code: str
    msg: str = ""
    data: msgspec.Raw = _NOTHING


class _BookTexts(msgspec.Struct, array_like=True, gc=False):
    px: str
    sz: str


class _TextBook(msgspec.Struct, gc=False):
    asks: list[_BookTexts]
    bids: list[_BookTexts]


def _frames(kind: Any, name: str) -> Callable[[bytes], Any]:
    """Decoder of a push; numbers in text become floats in the C core. Without `data` it is no push."""
    frame = msgspec.defstruct(f"{name}Frame", [("data", list[kind], ()), ("action", str, "")], gc=False)
    return msgspec.json.Decoder(frame, strict=False).decode


_decode_book, _decode_texts = _frames(Book, "Book"), _frames(_TextBook, "TextBook")
_decode_trades, _decode_best, _decode_marks = _frames(Trade, "Trade"), _frames(Best, "Best"), _frames(Marks, "Marks")
_decode_candles, _decode_liquidations = _frames(list[str], "Candle"), _frames(Liquidation, "Liquidation")
_decode_details = msgspec.json.Decoder(list[_Detail], strict=False).decode
_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_rest_trades = msgspec.json.Decoder(list[_RestTrade], strict=False).decode
_decode_instruments = msgspec.json.Decoder(list[_Instrument]).decode
_decode_times = msgspec.json.Decoder(list[_Time]).decode
_decode_rest_marks = msgspec.json.Decoder(list[Marks], strict=False).decode


def follows(last_id: int, _first: int, last: int, prev: int) -> int:
    """Local book: an update must name the last one as its predecessor.

    Three of them are legal (docs-v5, order book channel): seqId > prevSeqId, the usual one; equal and without levels,
    sent when nothing changed for a minute; smaller, when the venue numbers anew after maintenance.
    """
    if prev == last_id:
        return NEXT
    return OLD if last <= last_id else HOLE


def is_spot(ticker: str) -> bool:
    """BTC-USDT is spot; BTC-USDT-SWAP, BTC-USD-261030 and BTC-USD-261030-90000-C are contracts."""
    return ticker.count("-") == 1


def underlying(ticker: str) -> str:
    """The index of an instrument: BTC-USD of BTC-USD_UM-261030; of a name that is none of the venue's, itself."""
    base, dash, rest = ticker.partition("-")
    return base + dash + rest.partition("-")[0].partition("_")[0]


def _kind_of(ticker: str) -> str:
    """Instrument type by name, as the venue spells it."""
    parts = ticker.split("-")
    if len(parts) == 2:
        return "SPOT"
    return "SWAP" if parts[-1] == "SWAP" else "OPTION" if len(parts) == 5 else "FUTURES"


def _number(text: str) -> float:
    """A number in text, NaN where there is none; ValidationError when it is something else."""
    return msgspec.convert(text, float, strict=False) if text else float("nan")


def _time_us(text: str) -> int:
    """A time in ms as text, in us; -1 where there is none."""
    return msgspec.convert(text, TimeMs, strict=False) * 1000 if text else -1


def _pairs(levels: list[Level]) -> list[tuple[float, float]]:
    return [(level.px, level.sz) for level in levels]


def _said(m: Marks, ticker: str, channel: str) -> dict[str, float]:
    """Column -> number, of those that a channel of marks has said."""
    spot = is_spot(ticker)
    texts = {"index_price": m.idxPx} if channel == "index-tickers" else {
        "last": m.last, "open_24h": m.open24h, "high_24h": m.high24h, "low_24h": m.low24h,
        "volume_24h": m.vol24h if spot else m.volCcy24h, "quote_volume_24h": m.volCcy24h if spot else "",
        "bid_price": m.bidPx, "ask_price": m.askPx, "mark_price": m.markPx, "open_interest": m.oi,
        "funding_rate": m.fundingRate,
    }  # fmt: skip
    return {column: _number(text) for column, text in texts.items() if text}


def _name_of(arg: _Arg) -> str:
    return f"{arg.channel}:{arg.instId or arg.instType}"


def _arg_of(name: str) -> dict[str, str]:
    channel, _, of = name.partition(":")
    return {"channel": channel, "instType" if channel == "liquidation-orders" else "instId": of}


def _without_login(name: str) -> str:
    channel, _, of = name.partition(":")
    return f"{_BOOKS}:{of}" if channel == _TBT else name


class TextBook:
    """A book as text, exactly as it was received: what the venue's CRC32 is made of.

    The 25 best levels of both sides, price:size of bid and ask in turn, a missing one left out; signed 32 bit.
    """

    __slots__ = ("_asks", "_bids", "last_id")

    def __init__(self, last_id: int, texts: _TextBook, old: "TextBook | None" = None) -> None:
        """The book after `texts`: a whole one, or changes of the `old` one, which stays as it is."""
        self.last_id = last_id
        self._bids: dict[float, str] = dict(old._bids) if old is not None else {}
        self._asks: dict[float, str] = dict(old._asks) if old is not None else {}
        for side, levels in ((self._bids, texts.bids), (self._asks, texts.asks)):
            for level in levels:
                if _number(level.sz):
                    side[_number(level.px)] = f"{level.px}:{level.sz}"
                else:
                    side.pop(_number(level.px), None)

    def checksum(self) -> int:
        bids = (self._bids[price] for price in nlargest(CHECKSUM_LEVELS, self._bids))
        asks = (self._asks[price] for price in nsmallest(CHECKSUM_LEVELS, self._asks))
        text = ":".join(level for level in chain.from_iterable(zip_longest(bids, asks)) if level is not None)
        value = crc32(text.encode())
        return value - (1 << 32) if value >= 1 << 31 else value


class Okx(Venue):
    """One connection of OKX."""

    NAME = "okx"
    EXCHANGE = Exchange.OKX
    FEEDS = ("trades", "orderbook_l2", "bbo", "tickers", "candles", "liquidations")
    INTERVALS = tuple(_BARS)
    TRADE_CHANNELS = ("trades", "trades-all")
    BOOK_INTERVALS = ("10ms", "100ms")
    WS_URL = "wss://ws.okx.com:8443"
    REST_URL = "https://www.okx.com"
    TIME_PATH = "/api/v5/public/time"
    PREFIX = b'{"arg":{'
    DELIMITER = b"}"
    LIMITS = Limits(
        streams_per_connection=400,  # the venue names no number; 400 keep one core's bursts short
        messages_per_s=3,  # 480 an hour are enforced here; no number a second is documented
        connects=(3, 1.0),  # per IP; 2026
        weight=(20, 2.0),  # history-trades and instruments: 20 requests in 2 s, the least of those that are used; 2026
        lifetime_s=0,  # a notice comes some 60 s before a connection ends
    )
    CREDENTIALS = ("api_key", "secret", "passphrase")
    KNOWN_FIELDS = frozenset(_FIELDS.split())

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        super().__init__(emit, options, streams, open_world=open_world)
        self._pending: dict[str, list[str]] = {}  # request id -> streams that are neither confirmed nor refused yet
        self._request_id = 0
        self._requests_ns: deque[int] = deque(maxlen=REQUESTS_PER_HOUR)  # of this connection, the newest ones
        self._is_used_up = False  # the venue said that they are too many
        self._login_ns = 0  # when a login was sent that is not answered yet
        self._login_again_ns = 0  # when another one is to be sent
        self._login_waits = False  # one came too soon, and none was answered otherwise yet
        self._pinged_ns = self._ponged_ns = 0
        self._resubscribe: dict[str, int] = {}  # ticker -> when it was asked for (0 = not yet)
        self._resubscribed_ns = 0
        self._texts: dict[str, TextBook] = {}
        self._newest: dict[str, int] = {}  # ticker -> time of the newest book message without seqId
        self._last_said: dict[str, dict[str, float]] = {}  # stream of marks -> its last numbers
        if not options.credentials and any(stream.name.startswith(f"{_BOOKS}:") for stream in streams):
            self.notes["credentials"] = "none given: books each 100 ms instead of each change"

    def _look_back(self, past: Past) -> None:
        """Rows of merged trades have no counter, yet their ids are one."""
        super()._look_back(past)
        known = {ticker: ids for ticker, (ids, _) in self._trade_ids_left.items()}
        holes = trade_holes_left(past, known)
        for ticker, (ids, _) in self._trade_ids_left.items():
            left = max((int(text) for text in ids if text.isdigit()), default=-1)
            if left > self._trades_left.get(ticker, (-1, []))[0]:
                self._trades_left[ticker] = left, holes.get(ticker, [])
        self._trade_ids_left.clear()

    def _streams_changed(self, left: Collection[str], gone: Collection[str]) -> None:
        self._routes.clear()  # they may write rows of what is gone, from a stream that others share
        for name in left:
            self._last_said.pop(name, None)
        for ticker in gone:
            self._texts.pop(ticker, None)
            self._newest.pop(ticker, None)
            self._resubscribe.pop(ticker, None)

    def _served(self, name: str) -> list[str]:
        """The instruments that share a stream: an index, or all forced orders of a type."""
        return [stream.ticker for stream in self.streams if stream.name == name]

    # Planning

    @classmethod
    def streams_of(cls, ticker: str, feeds: Sequence[str], options: Options) -> list[Stream]:
        trades = options.trade_channel or cls.TRADE_CHANNELS[0]
        book = _TBT if options.credentials and options.book_interval != "100ms" else _BOOKS
        kind = _kind_of(ticker)
        streams: list[Stream] = []

        def add(feed: str, channel: str, of: str = ticker, path: str = PUBLIC) -> None:
            if feed in feeds:
                streams.append(Stream(f"{channel}:{of}", feed, ticker, path))

        add("trades", trades, path=BUSINESS if trades == "trades-all" else PUBLIC)
        add("orderbook_l2", book)
        add("bbo", "bbo-tbt")
        add("tickers", "tickers")
        if kind != "SPOT":
            add("tickers", "mark-price")
            add("tickers", "open-interest")
            add("tickers", "index-tickers", underlying(ticker))
            add("liquidations", "liquidation-orders", kind)
        if kind == "SWAP":
            add("tickers", "funding-rate")
        for interval in options.intervals:
            add("candles", f"candle{_BARS[interval]}", path=BUSINESS)
        return streams

    @classmethod
    def fits(cls, taken: Sequence[Stream], more: Sequence[Stream]) -> bool:
        books = sum(stream.feed == "orderbook_l2" for stream in (*taken, *more))
        return books <= BOOKS_PER_CONNECTION and super().fits(taken, more)

    @classmethod
    def not_mergeable(cls, options: Options) -> dict[str, str]:
        if options.trade_channel == "trades-all":
            return {}
        return {
            "trades": "on the channel trades a row may stand for several trades, which another leg may have fetched one by"
            ' one: take trade_channel = "trades-all"'
        }

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        lists = [f"instType={kind}" for kind in ("SPOT", "SWAP", "FUTURES")]
        lists += [f"instType=OPTION&instFamily={family}" for family in OPTION_FAMILIES]
        return tuple(f"/api/v5/public/instruments?{query}" for query in lists)

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        return [_info(i) for i in _decode_instruments(_data_of(body)) if i.instType in _KINDS]

    @classmethod
    def server_time(cls, body: bytes) -> tuple[int, int]:
        times = decode_body(_decode_times, _data_of(body))
        if not times:
            raise FrameError("no_time", "an answer without data")
        return _time_us(times[0].ts), 1000

    # Connection

    def opened(self) -> None:
        self._pending.clear()
        self._requests_ns.clear()
        self._is_used_up = False
        self._pinged_ns = self._ponged_ns = time.time_ns()
        self._login_ns = self._login_again_ns = 0
        self._login_waits = False
        if any(stream.name.startswith(f"{_TBT}:") for stream in self.streams):
            self._log_in()  # subscribing waits for the reply: without a login these books are refused
        else:
            self._subscribe_all()

    def _subscribe_all(self) -> None:
        self.subscribe([stream.name for stream in self.streams])

    def _log_in(self) -> None:
        self._login_ns, self._login_again_ns = time.time_ns(), 0
        self._count_request()
        self.wants.append(Send(self._login()))

    def _login(self) -> str:
        """GET /users/self/verify signed with the secret (docs-v5, WebSocket login)."""
        given, now = self.options.credentials, str(time.time_ns() // 1_000_000_000)
        digest = hmac.new(given["secret"].encode(), f"{now}GET/users/self/verify".encode(), hashlib.sha256).digest()
        sign = base64.b64encode(digest).decode()
        arg = {"apiKey": given["api_key"], "passphrase": given["passphrase"], "timestamp": now, "sign": sign}
        return _json({"op": "login", "args": [arg]})

    def subscribe(self, names: Sequence[str]) -> None:
        if not self._login_waits:  # else they would be refused now; the login brings all of them
            self._request("subscribe", names)

    def unsubscribe(self, names: Sequence[str]) -> None:
        self._request("unsubscribe", names)

    def closing(self) -> list[str]:
        names = list(dict.fromkeys(stream.name for stream in self.streams))
        return [_control("unsubscribe", part, "bye") for part in _chunks(names)]

    def _request(self, op: str, names: Sequence[str]) -> None:
        for part in _chunks(list(dict.fromkeys(names))):
            self._request_id += 1
            if op == "subscribe":
                self._pending[str(self._request_id)] = part
            self._count_request()
            self.wants.append(Send(_control(op, part, str(self._request_id))))

    def _count_request(self) -> None:
        self._requests_ns.append(time.time_ns())

    def _requests_in_hour(self, now_ns: int) -> int:
        while self._requests_ns and now_ns - self._requests_ns[0] > _HOUR_NS:
            self._requests_ns.popleft()
        return len(self._requests_ns)

    def tick(self, now_ns: int) -> None:
        self._keep_alive(now_ns)
        if self._login_again_ns and now_ns > self._login_again_ns:
            self._log_in()
        elif self._login_ns and now_ns - self._login_ns > REPLY_WITHIN_NS:
            self._fall_back("login unanswered")
        self._take_books_anew(now_ns)

    def _keep_alive(self, now_ns: int) -> None:
        """A ping each 20 s, whatever comes in: the venue hangs up when 30 s pass without anything."""
        unanswered = self._ponged_ns < self._pinged_ns < now_ns - PONG_WITHIN_NS
        if unanswered and self.emit.rcv_us * 1000 < self._pinged_ns:
            self._ponged_ns = now_ns
            self.wants.append(Reconnect("ping_unanswered"))
        elif now_ns - self._pinged_ns > PING_EVERY_NS:
            self._pinged_ns = now_ns
            self.wants.append(Send("ping", urgent=True))

    def _take_books_anew(self, now_ns: int) -> None:
        """Leave and take the channels of broken books: the venue sends no other snapshot.

        The more of the hour's requests are used up, the longer books wait for each other; when all are, a new
        connection has the next ones.
        """
        for ticker in [t for t in self._resubscribe if (book := self.books.get(t)) is None or book.state is LIVE]:
            del self._resubscribe[ticker]  # a late message healed it meanwhile
        due = {t for t, asked in self._resubscribe.items() if now_ns - asked > RESUBSCRIBE_RETRY_NS}
        used = self._requests_in_hour(now_ns)
        if not due or now_ns - self._resubscribed_ns < RESUBSCRIBE_EVERY_NS << used // RESUBSCRIBE_STEP:
            return
        books = [s for s in self.streams if s.feed == "orderbook_l2" and s.ticker in due]
        names = [s.name for s in books if not self.proof[s.name].refused]
        self._resubscribed_ns = now_ns
        for ticker in due:
            self._resubscribe[ticker] = now_ns
        if not names:
            return
        if used + 2 * len(_chunks(names)) > REQUESTS_PER_HOUR:
            self.emit.counters["subscribe_budget_used_up"] += 1
            self.wants.append(Reconnect("subscribe_budget", overlap=True))
            return
        self.unsubscribe(names)
        self.subscribe(names)

    def disconnected(self, cause: str) -> None:
        super().disconnected(cause)
        self._pending.clear()
        self._login_ns = self._login_again_ns = 0
        self._resubscribe.clear()  # the new connection begins every book with a snapshot

    # Messages that are no data

    def unrouted(self, frame: bytes) -> None:
        if frame == b"pong":
            self._ponged_ns = time.time_ns()
            return
        envelope = _decode_envelope(frame)
        if envelope.event:
            self._event(envelope)
        elif envelope.arg is not None and len(envelope.data):
            self.take_route(frame, self.watched(_name_of(envelope.arg), self._handler(envelope.arg)))
        else:
            raise FrameError("unhandled_event")

    def _no_data(self, frame: bytes) -> None:
        """A frame that begins like data and is none."""
        envelope = _decode_envelope(frame)
        if not envelope.event:
            raise FrameError("empty_data")
        self._event(envelope)

    def _event(self, envelope: _Envelope) -> None:
        event, arg = envelope.event, envelope.arg
        if event == "subscribe" and arg is not None:
            name = _name_of(arg)
            self.acknowledge([name], time.time_ns())
            self._answered(name)
        elif event == "login":
            self._login_ns, self._login_waits = 0, False
            self._subscribe_all()
        elif event == "error":
            self._error(envelope)
        elif event == "notice" and envelope.code == _UPGRADE:
            self.wants.append(Reconnect("service_upgrade", overlap=True))
        elif event == "notice":
            self.drift("notice", f"{envelope.code} {envelope.msg}")
        elif event == "channel-conn-count-error":
            raise FrameError("venue_error", f"too many connections on {envelope.channel}: {envelope.connCount}")
        elif event not in ("unsubscribe", "channel-conn-count"):
            raise FrameError("unhandled_event", event)

    def _answered(self, name: str) -> None:
        for request_id, names in list(self._pending.items()):
            if name in names:
                names.remove(name)
                if not names:
                    del self._pending[request_id]

    def _error(self, envelope: _Envelope) -> None:
        text = f"{envelope.code} {envelope.msg}"
        request = self._pending.get(envelope.id)
        found = _ARG_IN_TEXT.search(envelope.msg)
        name = f"{found[1]}:{found[2]}" if found else ""
        if envelope.code == _TOO_FREQUENT:
            self.emit.counters["venue_rate_limited"] += 1
            if self._login_ns:
                self._login_ns, self._login_again_ns = 0, time.time_ns() + LOGIN_AGAIN_NS
                self._login_waits = True
            elif not self._is_used_up:  # once: by the venue's count this connection has no more requests, a new one has
                self._is_used_up = True
                self.wants.append(Reconnect("too_many_requests", overlap=True))
        elif self._login_ns or (
            envelope.code in _TBT_REFUSED and any(s.name.startswith(f"{_TBT}:") for s in self.streams)
        ):
            self._fall_back(text)
        elif name in self.proof:
            self.refuse([name], text)
            self._answered(name)
        elif request is not None:  # all of it that has no answer yet
            del self._pending[envelope.id]
            self.refuse_batch(request, text)
        else:
            raise FrameError("venue_error", text)

    def _fall_back(self, reason: str) -> None:
        """Without a valid login, or with too low a tier, `books-l2-tbt` is closed to us: take `books` and say so."""
        self.emit.counters["tbt_refused"] += 1
        self.notes["credentials"] = f"{reason}: books each 100 ms instead of each change"
        waiting_for_login, self._login_ns = bool(self._login_ns), 0
        self._login_waits = False
        changed = [_without_login(s.name) for s in self.streams if s.name.startswith(f"{_TBT}:")]
        self.streams = [Stream(_without_login(s.name), s.feed, s.ticker, s.path, s.also) for s in self.streams]
        self.proof = {_without_login(name): state for name, state in self.proof.items()}
        self._tickers = {stream.name: stream.ticker for stream in self.streams}
        for name in [name for names in self._pending.values() for name in names if name.startswith(f"{_TBT}:")]:
            self._answered(name)
        if waiting_for_login:
            self._subscribe_all()
        else:
            self.subscribe(changed)

    # Data

    def identity(self, frame: bytes) -> bytes | None:
        """A best price carries the time when it was pushed, which differs between connections; its `seqId` does not."""
        if frame.startswith(b'{"arg":{"channel":"bbo-tbt"') and b'"seqId"' in frame:
            return _PUSH_TIME.sub(b"", frame)
        return super().identity(frame)

    def _handler(self, arg: _Arg) -> Callable[[bytes], None]:
        """What decodes the pushes of a channel; FrameError when its instrument or kind is not wanted."""
        channel, name = arg.channel, _name_of(arg)
        if channel == "liquidation-orders":
            return self._on_liquidations(name)
        if channel in _MARKS:
            return self._on_marks(name, self._served(name) or [arg.instId], channel)
        makers = {
            "trades": self._on_trades, "trades-all": self._on_trades, _BOOKS: self._on_book, _TBT: self._on_book,
            "bbo-tbt": self._on_best,
        }  # fmt: skip
        if channel in makers:
            self.admit(arg.instId)
            return makers[channel](arg.instId)
        interval = _INTERVALS.get(channel.removeprefix("candle")) if channel.startswith("candle") else None
        if interval is None:
            raise FrameError("unhandled_channel", channel)
        self.admit(arg.instId)
        return self._on_candles(arg.instId, interval)

    def _on_trades(self, ticker: str) -> Callable[[bytes], None]:
        sync, instrument, emit_trade, side_of = (
            self.trade_sync(ticker), self.emit.instrument(ticker), self.emit.trade, _SIDES.get,
        )  # fmt: skip

        def on_trades(frame: bytes) -> None:
            trades = _decode_trades(frame).data
            if len(trades) == 1:
                t = trades[0]
                side, seq, count, merged = side_of(t.side), t.tradeId, t.count, sync.merged
                if side and seq - (count or 1) == sync.last and (merged or count is None):  # the common case
                    timestamp = t.ts * 1000
                    if merged:
                        emit_trade(instrument, timestamp, side, t.px, t.sz, -1, _LAST, b"%d" % seq)
                    else:
                        emit_trade(instrument, timestamp, side, t.px, t.sz, seq)
                    sync.last, sync.last_time = seq, timestamp
                    return
            elif not trades:
                self._no_data(frame)
                return
            rows: list[TradeRow] = [
                (t.tradeId, t.ts * 1000, self.side_of_trade(_SIDES, t.side), t.px, t.sz, b"%d" % t.tradeId)
                for t in trades
            ]
            merged = any(t.count is not None for t in trades)
            sync.merged = sync.merged or merged
            if sync.merged:
                sync.publish(rows, counts=[t.count or 1 for t in trades])
            else:
                sync.publish([(*row[:5], b"") for row in rows])

        return on_trades

    def _on_book(self, ticker: str) -> Callable[[bytes], None]:
        book, counters, pairs = self.book(ticker, follows), self.emit.counters, _pairs

        def on_book(frame: bytes) -> None:
            decoded = _decode_book(frame)
            if len(decoded.data) != 1:
                if decoded.data:
                    raise FrameError("several_books", f"{len(decoded.data)} in one message")
                self._no_data(frame)
                return
            event, action = decoded.data[0], decoded.action
            timestamp, seq, prev = event.ts * 1000, event.seqId, event.prevSeqId
            if seq is None:
                seq, prev = self._by_time(book, event, action)
            if action == "update":
                if prev != book.last_id and seq <= book.last_id and timestamp > book.last_time > 0:
                    book.distrust("ids_reset")  # the message that began to count anew was missed
                elif seq <= prev == book.last_id:
                    counters["book_keep_alive" if seq == prev else "book_sequence_reset"] += 1
                if event.checksum:
                    self._prove(book, frame, seq, prev, event.checksum)
                book.delta(seq, seq, prev, timestamp, pairs(event.bids), pairs(event.asks))
                if event.checksum:
                    self._note_checked(book, event)
            elif action == "snapshot":
                self._on_snapshot(book, frame, event, seq)
            else:
                raise FrameError("unknown_book_action", action)

        return on_book

    def _by_time(self, book: BookSync, event: Book, action: str) -> tuple[int, int]:
        """Id and predecessor of a message of 2021-2022: its time tells the order, its checksum what is missing."""
        ticker = book.instrument.ticker
        if not event.checksum or (book.state is LIVE and action == "update" and ticker not in self._texts):
            raise FrameError("no_sequence", f"{ticker}: neither seqId nor a checksum that can be tested")
        newest = self._newest.get(ticker, -1)
        return event.ts, newest if event.ts > newest else -1

    def _note_checked(self, book: BookSync, event: Book) -> None:
        """An update with a checksum was taken or held."""
        ticker = book.instrument.ticker
        if event.seqId is None:
            self._newest[ticker] = max(self._newest.get(ticker, -1), event.ts)
        if (texts := self._texts.get(ticker)) is not None and texts.last_id != book.last_id:
            del self._texts[ticker]  # messages were joined without their text: nothing to test until a snapshot

    def _on_snapshot(self, book: BookSync, frame: bytes, event: Book, seq: int) -> None:
        """Take a whole book, unless the live one has it already: from another connection, which began earlier."""
        ticker, timestamp = book.instrument.ticker, event.ts * 1000
        if book.state is LIVE and (self.overlapping or (seq <= book.last_id and timestamp <= book.last_time)):
            self.emit.counters["book_snapshot_unneeded"] += 1
            if self.overlapping:
                self.pass_over(book, seq)
            return
        texts = None
        if event.checksum:
            texts = TextBook(seq, _decode_texts(frame).data[0])
            if texts.checksum() != event.checksum:
                self.want_snapshot(book)
                raise FrameError("checksum", f"snapshot {seq} of {ticker}")
            self.emit.counters["checksum_verified"] += 1
        book.snapshot(seq, timestamp, _pairs(event.bids), _pairs(event.asks), in_band=True)
        self._resubscribe.pop(ticker, None)
        self._texts.pop(ticker, None)
        if texts is not None:
            self._texts[ticker] = texts
        if event.seqId is None:
            self._newest[ticker] = seq

    def _prove(self, book: BookSync, frame: bytes, seq: int, prev: int, checksum: int) -> None:
        """Before an update is applied: the book that it makes must have the venue's checksum, else it is taken anew."""
        old = self._texts.get(book.instrument.ticker)
        if book.state is not LIVE or follows(book.last_id, seq, seq, prev) != NEXT:
            return
        if old is None or old.last_id != book.last_id:
            self.emit.counters["checksum_unverified"] += 1
            return
        new = TextBook(seq, _decode_texts(frame).data[0], old)
        if new.checksum() == checksum:
            self.emit.counters["checksum_verified"] += 1
            self._texts[book.instrument.ticker] = new
        else:
            self.emit.counters["checksum_mismatch"] += 1
            book.distrust("checksum")

    def _on_best(self, ticker: str) -> Callable[[bytes], None]:
        instrument, emit_bbo, nan = self.emit.instrument(ticker), self.emit.bbo, float("nan")

        def on_best(frame: bytes) -> None:
            data = _decode_best(frame).data
            if not data:
                self._no_data(frame)
            for best in data:
                bid, bid_qty = (best.bids[0].px, best.bids[0].sz) if best.bids else (nan, 0.0)
                ask, ask_qty = (best.asks[0].px, best.asks[0].sz) if best.asks else (nan, 0.0)
                seq = -1 if best.seqId is None else best.seqId
                emit_bbo(instrument, best.ts * 1000, bid, bid_qty, ask, ask_qty, seq)

        return on_best

    def _on_marks(self, name: str, tickers: Sequence[str], channel: str) -> Callable[[bytes], None]:
        """One row for each push, with what it says; nothing is carried over from other channels."""
        for ticker in tickers:
            self.admit(ticker)
        instruments = [self.emit.instrument(ticker) for ticker in tickers[:INDEX_TICKERS_MAX]]

        def on_marks(frame: bytes) -> None:
            data = _decode_marks(frame).data
            if not data:
                self._no_data(frame)
            for m in data:
                given = _said(m, tickers[0], channel)
                if not given:
                    raise FrameError("nothing_given", channel)
                self._last_said[name] = given
                funding_time = _time_us(m.fundingTime)
                for instrument in instruments:
                    self.emit.ticker(instrument, m.ts * 1000, next_funding_time=funding_time, **given)

        return on_marks

    def _on_candles(self, ticker: str, interval: str) -> Callable[[bytes], None]:
        instrument, name, spot = self.emit.instrument(ticker), interval.encode(), is_spot(ticker)

        def on_candles(frame: bytes) -> None:
            data = _decode_candles(frame).data
            if not data:
                self._no_data(frame)
            for row in data:
                if len(row) < 7:
                    raise FrameError("short_candle", str(len(row)))
                o, h, l, c = (_number(text) for text in row[1:5])  # noqa: E741 (the venue's names)
                volume = _number(row[5] if spot else row[6])  # vol is in contracts where there are any
                closed = len(row) > 8 and row[8] == "1"
                self.emit.candle(instrument, 0, name, _time_us(row[0]), (o, h, l, c), volume, -1, closed)

        return on_candles

    def _on_liquidations(self, name: str) -> Callable[[bytes], None]:
        """The channel brings all instruments of a type; only those that were asked for are written."""
        wanted = {t: self.emit.instrument(t) for t in self._served(name)}
        if not wanted and not self.open_world:
            raise FrameError("unknown_symbol", name)

        def instrument_of(ticker: str) -> Instrument | None:
            return self.emit.instrument(ticker) if self.open_world else wanted.get(ticker)

        def on_liquidations(frame: bytes) -> None:
            data = _decode_liquidations(frame).data
            if not data:
                self._no_data(frame)
            rows = []
            for order in data:
                instrument = instrument_of(order.instId)
                if instrument is None:
                    self.emit.counters["liquidations_of_others"] += 1
                    continue
                for d in _decode_details(order.details):
                    self.emit.check_liquidation(d.ts * 1000, d.bkPx, d.sz)  # before any of them is written
                    rows.append((instrument, d.ts * 1000, self.side_of_trade(_SIDES, d.side), d.bkPx, d.sz))
            for row in rows:
                self.emit.liquidation(*row)

        return on_liquidations

    # What is missing

    def want_snapshot(self, book: BookSync) -> None:
        """A snapshot comes only after leaving and taking the channel again; see `tick`."""
        self._resubscribe.setdefault(book.instrument.ticker, 0)

    def trade_sync(self, ticker: str) -> TradeSync:
        sync = super().trade_sync(ticker)
        if not self.open_world and self.options.trade_channel in ("", "trades"):
            sync.merged = True  # from the first row on; a recording shows it by itself
        return sync

    def want_repair(self, ticker: str, first: int, last: int) -> None:
        """The venue gives the hundred trades before an id: from the first missing one on, as far as that goes."""
        query = f"instId={quote(ticker)}&type=1&after={first + TRADES_PER_REQUEST}&limit={TRADES_PER_REQUEST}"
        self.wants.append(Fetch(f"trades {ticker} {first}", f"/api/v5/market/history-trades?{query}", 1))

    def http(self, url: str, body: bytes) -> None:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        endpoint = parts.path.rpartition("/")[2]
        if endpoint == "history-trades":
            ticker, after = query.get("instId", [""])[0], query.get("after", [""])[0]
            self.admit(ticker)
            first = int(after) - TRADES_PER_REQUEST if after.isdecimal() else -1
            sync = self.trade_sync(ticker)
            rows = [
                (
                    t.tradeId,
                    t.ts * 1000,
                    self.side_of_trade(_SIDES, t.side),
                    t.px,
                    t.sz,
                    b"%d" % t.tradeId if sync.merged else b"",
                )
                for t in sorted(decode_body(_decode_rest_trades, _data_of(body)), key=lambda t: t.tradeId)
                if t.tradeId >= first
            ]
            sync.repaired(first, rows)
        elif endpoint == "instruments":
            self.take_instruments(url, body)
        elif endpoint != "time":
            raise FrameError("unhandled_url", url)

    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        self.emit.counters["trade_repair_refused"] += 1
        self.notes[f"{fetch.key.split(' ')[1]} repair refused"] = f"HTTP {status} {body[:200].decode(errors='replace')}"

    def probe(self, stream: Stream) -> Fetch | None:
        """A trade changes the candles, too. Of forced orders REST does not tell which of them the channel brings."""
        channel, _, of = stream.name.partition(":")
        kind, family = _kind_of(stream.ticker), "-".join(stream.ticker.split("-")[:2])
        trades = "market/trades?limit=1"
        path = {
            "trades": trades, "trades-all": trades, _BOOKS: "market/books?sz=1", _TBT: "market/books?sz=1",
            "bbo-tbt": "market/books?sz=1", "tickers": "market/ticker?", "index-tickers": "market/index-tickers?",
            "mark-price": f"public/mark-price?instType={kind}", "funding-rate": "public/funding-rate?",
            "open-interest": f"public/open-interest?instType={kind}&instFamily={family}",
        }.get("trades" if channel.startswith("candle") else channel)  # fmt: skip
        return Fetch(f"probe {stream.name}", f"/api/v5/{path}&instId={quote(of)}", 1) if path else None

    def newest_us(self, stream: Stream, body: bytes) -> int:
        channel, rows = stream.name.partition(":")[0], decode_body(_decode_rest_marks, _data_of(body))
        if channel in _MARKS:  # the time of most of them is that of the answer: only another number is something new
            before = self._last_said.get(stream.name)
            rows = [row for row in rows if _said(row, stream.ticker, channel) != before]
        newest = max((row.ts * 1000 for row in rows), default=0)
        return max(0, newest - _FUNDING_WITHIN_US) if channel == "funding-rate" else newest


def _info(i: _Instrument) -> InstrumentInfo:
    base, _, quote_ = i.uly.partition("-")
    info = InstrumentInfo(
        i.instId, i.state == "live", _KINDS[i.instType], i.baseCcy or base, i.quoteCcy or quote_, i.state
    )
    try:
        size = _number(i.ctVal) * (_number(i.ctMult) if i.ctMult else 1.0) if i.ctVal else 1.0
        return msgspec.structs.replace(
            info, tick_size=_number(i.tickSz), qty_step=_number(i.lotSz), contract_size=size,
            listed_time=_time_us(i.listTime), expiry_time=_time_us(i.expTime),
        )  # fmt: skip
    except msgspec.ValidationError:
        return msgspec.structs.replace(
            info, listed_time=_IMPOSSIBLE
        )  # `tell` refuses this one, the others of the list are good


def _data_of(body: bytes) -> msgspec.Raw:
    """The `data` of an answer over HTTP; RateLimited or FrameError when it is an error."""
    answer = decode_body(_decode_answer, body)
    if answer.code in _NOT_NOW_S:
        raise RateLimited(_NOT_NOW_S[answer.code], f"{answer.code} {answer.msg}")
    if answer.code != "0" or not len(answer.data):
        raise FrameError("venue_error", f"{answer.code} {answer.msg}")
    return answer.data


def _chunks(names: list[str]) -> list[list[str]]:
    return [names[i : i + ARGS_PER_REQUEST] for i in range(0, len(names), ARGS_PER_REQUEST)]


def _control(op: str, names: Sequence[str], request_id: str) -> str:
    return _json({"id": request_id, "op": op, "args": [_arg_of(name) for name in names]})


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


VENUES = (Okx,)
