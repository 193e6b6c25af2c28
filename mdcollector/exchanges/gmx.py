"""GMX: oracle prices and candles, polled over REST; there is no WebSocket, no book and no volume.

Documentation: docs.gmx.io, REST V2 (oracle information: `/ping`, `/tokens`, `/prices/tickers`, `/prices/candles`), read
in 2026; limits are not published. A candle answer begins with the newest row, which is still open; the venue never says
that a candle is closed, the row above it does. Answers say how old they are, so a host that is behind is noticed.

* candles: every version that differs from the one published before is a row; `closed` once a newer candle is there. A
  closed one that the venue changes afterwards is one more closed row (counted `candle_revised`), looked for among the
  last `LOOKBACK` candles. Volume is null: there is none. `timestamp` is ours (TIME_LOCAL): the venue gives none.
* tickers: `minPrice` is what a position is sold at and `maxPrice` what it is bought at, hence `bid_price` and
  `ask_price`; `medianPrice`, where given, is `index_price`. One row per token and `updatedAt`. `/prices/24h` is not
  asked: its numbers have no time of their own, and candles of 1h and 1d say the same.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec

from mdcollector.continuity import BookSync
from mdcollector.emit import PRICE_MAX, CandleArgs, Emit, Instrument
from mdcollector.errors import ConfigError, FrameError
from mdcollector.exchanges import (
    NOTES_MAX,
    Fetch,
    InstrumentInfo,
    Limits,
    Options,
    Reconnect,
    Stream,
    Venue,
    decode_body,
)
from mdcollector.records import Exchange

CANDLES_EVERY_S = 15.0  # per token and interval; 10 to 15 s are gentle, nothing is published
TICKERS_EVERY_S = 2.0  # one request for all tokens
STAGGER_NS = 200_000_000  # between the first requests of two candle streams, and so between all later ones
LIMIT_MAX = 10_000  # candles of one answer; deeper history is not served
LOOKBACK = 10  # closed candles that every answer brings again, to notice those that were revised
KNOWN_MAX = 200  # candles whose published version is kept; older ones count as published
AHEAD_MAX_S = 60  # what is from later than this is broken, and believed it would hide all that comes until then
HOST_PATIENCE_NS = 10_000_000_000  # without any answer that is up to date, then another host is asked
TOLERANCE = 0.05  # between a token's price and the close of its latest 1m candle, to tell the decimal rule
CHECKED_MAX = 5  # tokens by which that is told

_INTERVALS = {"1m": 60, "5m": 300, "15m": 900, "1h": 3600, "4h": 14_400, "1d": 86_400}  # seconds
_CANDLES, _TICKERS, _TOKENS = "/prices/candles", "/prices/tickers", "/tokens"
_IGNORED = ("/ping", "/prices/24h", "/markets", "/markets/info", "/signed_prices/latest")
_RULES = (
    "10^(30 - decimals)",
    "10^30",
    "10^(30 - decimals - oracleDecimals)",
)  # by which USD = value / ...; likeliest first
_NAN = float("nan")

Digits = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,60}$")]
Decimals = Annotated[int, msgspec.Meta(ge=0, le=60)]
Moment = Annotated[int, msgspec.Meta(ge=0, le=4_102_444_800_000)]  # s or ms: below 1e11 it is seconds
Ohlc = tuple[float, float, float, float]


class Candles(msgspec.Struct, gc=False):
    """{"period":"1m","candles":[[1790951400,86077.03,86159.83,85692.88,85925.17],...]}, the newest first"""

    period: str
    candles: list[list[float]]


class Price(msgspec.Struct, gc=False, rename="camel"):
    """{"tokenAddress":"0x82..","tokenSymbol":"ETH","minPrice":"1739495434083952","maxPrice":"..","updatedAt":1783345314888,...}"""

    token_address: str
    token_symbol: str
    min_price: Digits
    max_price: Digits
    median_price: Digits | None = None
    oracle_decimals: Decimals | None = None
    updated_at: Moment | None = None
    timestamp: Moment | None = None


class _Named(msgspec.Struct, gc=False, rename="camel"):
    """Of a price what tells whether it is wanted."""

    token_symbol: str


class Token(msgspec.Struct, gc=False):
    """{"symbol":"SOL","address":"0x2b..","decimals":9,"synthetic":true}"""

    symbol: str
    address: str
    decimals: Decimals
    synthetic: bool = False


class _Tokens(msgspec.Struct):
    tokens: list[Token]


_decode_candles = msgspec.json.Decoder(Candles).decode
_decode_prices = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_named, _decode_price = msgspec.json.Decoder(_Named).decode, msgspec.json.Decoder(Price).decode
_decode_tokens = msgspec.json.Decoder(_Tokens | list[Token]).decode  # a bare array in some copies of the documentation


def _tokens(body: bytes) -> list[Token]:
    answer = decode_body(_decode_tokens, body)
    return answer.tokens if isinstance(answer, _Tokens) else answer


def _usd(digits: str, exponent: int) -> float:
    """The decimal value / 10^exponent, rounded once."""
    return float(f"{digits}e{-exponent}")


def _exponents(decimals: int, oracle_decimals: int | None) -> tuple[int | None, ...]:
    """The exponent by each of `_RULES`; None where it does not apply."""
    return 30 - decimals, 30, None if oracle_decimals is None else 30 - decimals - oracle_decimals


def _moment_us(price: Price) -> int:
    """When the price was made; 0 where the venue does not say."""
    moment = price.updated_at if price.updated_at is not None else price.timestamp or 0
    return moment * (1_000_000 if moment < 100_000_000_000 else 1000)


class _Series:
    """The candles of one token and interval: what of them is published."""

    def __init__(self, name: str, instrument: Instrument, interval: str, due_ns: int) -> None:
        self.name, self.instrument, self.interval = name, instrument, interval.encode()
        self.length_s, self.due_ns = _INTERVALS[interval], due_ns
        self.known: dict[int, tuple[Ohlc, bool]] = {}  # open time (s) -> the version that was published last, closed
        self.newest = 0  # the latest open time published
        self.horizon = -1  # candles up to here count as published
        self.answered = False

    def limit(self, now_s: int, backfill: int) -> int:
        """How many candles to ask for: what may be new, some that may be revised, at the start what is wanted."""
        missing = 1 + (now_s - self.newest) // self.length_s if self.newest else 0
        return max(2, min(LIMIT_MAX, max(missing + LOOKBACK, 0 if self.answered else backfill + 1)))

    def forget_old(self) -> None:
        """Keep what answers to come may bring again."""
        if len(self.known) > 2 * KNOWN_MAX:
            times = sorted(self.known)
            self.horizon = times[-KNOWN_MAX - 1]
            self.known = {t: self.known[t] for t in times[-KNOWN_MAX:]}


class Gmx(Venue):
    """The oracle of one chain (Arbitrum; `rest_url` names another one)."""

    NAME = "gmx"
    EXCHANGE = Exchange.GMX
    FEEDS = ("candles", "tickers")
    INTERVALS = tuple(_INTERVALS)
    WS_URL = ""
    REST_URL = "https://arbitrum-api.gmxinfra.io"
    REST_FALLBACKS = ("https://arbitrum-api.gmxinfra2.io",)
    LIMITS = Limits(
        streams_per_connection=60,  # ours: each candle stream is a request every 15 s, the first of them in 12 s
        messages_per_s=1,  # there are none
        connects=(60, 60.0),  # there are none
        weight=(600, 60.0),  # ours: no limit is published, 2026
        lifetime_s=0,
    )
    KNOWN_FIELDS = frozenset(
        (*Candles.__struct_fields__, *Price.__struct_encode_fields__, *Token.__struct_fields__, "tokens")
    )

    def __init__(self, emit: Emit, options: Options, streams: Sequence[Stream], *, open_world: bool = False) -> None:
        super().__init__(emit, options, streams, open_world=open_world)
        self._left = _candles_left(emit)
        self._series: dict[str, _Series] = {}
        self._polled: set[str] = set()  # names of those that are asked for
        self._prices: dict[str, str] = {}  # ticker -> stream, of the prices that are wanted
        self._moments = _tickers_left(emit)  # ticker -> `updatedAt` of the last row, us
        self._decimals: dict[str, int] = {}  # token address -> decimals
        self._tokens_due = False  # an address is not among them
        self._closes: dict[str, float] = {}  # ticker -> close of its latest 1m candle
        self._rule = -1  # index into _RULES; -1 = not told yet
        self._prices_due_ns = 0
        self._looked: set[str] = set()  # endpoints whose fields have been looked at on this connection
        self._fresh_ns = 0  # when an answer that is up to date came last

    # Planning

    @classmethod
    def streams_of(cls, ticker: str, feeds: Sequence[str], options: Options) -> list[Stream]:
        streams = [Stream(f"{_TICKERS} {ticker}", "tickers", ticker)] if "tickers" in feeds else []
        if "candles" in feeds:
            streams += [Stream(_candles_path(ticker, i), "candles", ticker) for i in options.intervals]
        return streams

    @classmethod
    def polled_weight(cls, streams: Sequence[Stream], options: Options) -> float:
        candles = sum(stream.feed == "candles" for stream in streams)
        prices = any(stream.feed == "tickers" for stream in streams)  # one request for all
        return candles / (options.poll_s or CANDLES_EVERY_S) + prices / (options.poll_s or TICKERS_EVERY_S)

    @classmethod
    def instruments_paths(cls) -> tuple[str, ...]:
        return (_TOKENS,)

    @classmethod
    def instruments(cls, body: bytes) -> list[InstrumentInfo]:
        return [
            InstrumentInfo(
                t.symbol, True, "index", t.symbol, "USD", "synthetic" if t.synthetic else "token", contract_size=1.0
            )
            for t in _tokens(body)
        ]

    # Polling

    def opened(self) -> None:
        self._looked.clear()
        self._fresh_ns = time.time_ns()
        self._prices_due_ns = 0
        self._polled, self._prices = set(), {}
        self.subscribe([stream.name for stream in self.streams])

    def subscribe(self, names: Sequence[str]) -> None:
        wanted, now_ns = set(names), time.time_ns()
        streams = [stream for stream in self.streams if stream.name in wanted]
        for number, stream in enumerate(s for s in streams if s.feed == "candles"):
            series = self._series_of(stream.ticker, stream.name.rpartition("=")[2])
            series.due_ns = now_ns + number * STAGGER_NS
            self._polled.add(series.name)
        self._prices |= {s.ticker: s.name for s in streams if s.feed == "tickers"}

    def unsubscribe(self, names: Sequence[str]) -> None:
        self._polled -= set(names)  # what was published stays known
        self._prices = {ticker: name for ticker, name in self._prices.items() if name not in set(names)}

    def tick(self, now_ns: int) -> None:
        every_ns = int((self.options.poll_s or CANDLES_EVERY_S) * 1e9)
        for series in self._series.values():
            if now_ns >= series.due_ns and series.name in self._polled:
                series.due_ns = now_ns + every_ns
                limit = series.limit(now_ns // 1_000_000_000, self.options.backfill)
                self.wants.append(Fetch(series.name, f"{series.name}&limit={limit}", 1))
        if self._prices and now_ns >= self._prices_due_ns:
            self._prices_due_ns = now_ns + int((self.options.poll_s or TICKERS_EVERY_S) * 1e9)
            self._want_prices()

    def _want_prices(self) -> None:
        """The prices, and before the first ones what tells how they are written."""
        if self._tokens_due or not self._decimals:
            self._tokens_due = False
            self.wants.append(Fetch(_TOKENS, _TOKENS, 1))
        checked = list(self._prices)[:CHECKED_MAX]
        if self._rule < 0:
            for ticker in checked:
                path = _candles_path(ticker, "1m")
                if path not in self._polled:
                    self.wants.append(Fetch(path, f"{path}&limit=1", 1))
        if self._rule >= 0 or (self._decimals and any(ticker in self._closes for ticker in checked)):
            self.wants.append(Fetch(_TICKERS, _TICKERS, 1))

    def disconnected(self, cause: str) -> None:
        super().disconnected(cause)
        if self._rule < 0:
            self._closes.clear()  # they are to be of the same moment as the prices

    def unrouted(self, frame: bytes) -> None:
        raise FrameError("unhandled_event", "this venue has no WebSocket")

    # Answers

    def http(self, url: str, body: bytes) -> None:
        parts = urlsplit(url)
        if parts.path.endswith(_CANDLES):
            query = parse_qs(parts.query)
            ticker, interval = query.get("tokenSymbol", [""])[0], query.get("period", [""])[0]
            self.watched(_candles_path(ticker, interval), partial(self._on_candles, ticker, interval))(body)
        elif parts.path.endswith(_TICKERS):
            self._on_prices(body)
        elif parts.path.endswith(_TOKENS):
            self.take_instruments(url, body)
        elif parts.path.endswith(_IGNORED):
            return
        else:
            raise FrameError("unhandled_url", url)
        if parts.path not in self._looked:
            self._looked.add(parts.path)
            self._look_for_new_fields(body)

    def take_instruments(self, url: str, body: bytes) -> list[InstrumentInfo]:
        """The list says too how the prices of each token are written: those of a new one can be read at once."""
        self._decimals = {token.address: token.decimals for token in _tokens(body)}
        return super().take_instruments(url, body)

    def http_failed(self, fetch: Fetch, status: int, body: bytes) -> None:
        reason = f"HTTP {status} {body[:100].decode(errors='replace')}"
        names = list(self._prices.values()) if fetch.key == _TICKERS else [fetch.key]
        self.refuse([name for name in names if name in self.proof], reason)
        self._not_fresh(names, reason)

    def _fresh(self, names: Iterable[str]) -> None:
        """These streams were answered with what is up to date. It proves them anew: an unchanged price brings no row."""
        self._fresh_ns = time.time_ns()
        for name in names:
            self.acknowledge([name], self._fresh_ns)
            self.notes.pop(f"refused {name}", None)
            self.notes.pop(f"not up to date {name}", None)

    def _not_fresh(self, names: Iterable[str], why: str) -> None:
        """The host is behind, empty or unwell in these streams; when it is so in all, another host is asked.

        A stream's first answer confirms it even so (it was asked for rightly); no later one of this kind does.
        """
        now_ns = time.time_ns()
        for name in names:
            if len(self.notes) < NOTES_MAX:
                self.notes[f"not up to date {name}"] = why
            state = self.proof.get(name)
            if state is not None and not state.refused and state.acknowledged_ns <= state.requested_ns:
                self.acknowledge([name], now_ns)
        if now_ns - self._fresh_ns > HOST_PATIENCE_NS and not self.open_world:
            self._fresh_ns = now_ns
            self.wants.append(Reconnect(f"nothing is up to date: {why}", overlap=True))

    def _is_late(self, at_s: float) -> bool:
        """Whether a candle that ended then without a successor, or a price of then, says that the host is behind."""
        late_s = 0 if self.open_world else self.options.late_s  # a recording says what was so when it was made
        return bool(late_s) and at_s + late_s < self.emit.rcv_us / 1_000_000

    # Candles

    def _series_of(self, ticker: str, interval: str) -> _Series:
        """The candles of a token and interval; made, with what an earlier life published, when first asked for."""
        name = _candles_path(ticker, interval)
        found = self._series.get(name)
        if found is None:
            found = self._series[name] = _Series(name, self.emit.instrument(ticker), interval, 0)
            found.known, found.horizon = self._left.pop((ticker, found.interval), ({}, -1))
            found.newest = max(found.known, default=0)
        return found

    def _on_candles(self, ticker: str, interval: str, body: bytes) -> None:
        if interval not in _INTERVALS:
            raise FrameError("unknown_interval", interval)
        answer = decode_body(_decode_candles, body)
        if answer.period != interval:
            raise FrameError("wrong_period", f"{answer.period!r} instead of {interval!r}")
        rows = self._checked(answer.candles)
        name = _candles_path(ticker, interval)
        if not rows:
            self.emit.counters["candles_empty"] += 1
            self._not_fresh([name], "no candle")
            return
        if interval == "1m" and not self._is_late(rows[0][0] + _INTERVALS[interval]):
            self._closes[ticker] = rows[0][1][3]
        if name in self._series or self.open_world:
            self._publish(self._series_of(ticker, interval), rows, int(answer.candles[0][0]))

    def _checked(self, candles: list[list[float]]) -> list[tuple[int, Ohlc]]:
        """Open time and prices of each candle that can be, newest first; FrameError unless all times can be."""
        latest, rows, before = self.emit.rcv_us // 1_000_000 + AHEAD_MAX_S, list[tuple[int, Ohlc]](), float("inf")
        if len(candles) > LIMIT_MAX:
            raise FrameError("too_many_candles", f"{len(candles)} in one answer")
        for candle in candles:
            if len(candle) != 5:
                raise FrameError("wrong_candle", f"{len(candle)} numbers instead of 5")
            at, *prices = candle
            if not (0 < at <= latest and at.is_integer()):
                raise FrameError("absurd_number", f"candle {candle}")
            if at >= before:
                raise FrameError("wrong_order", f"candle {int(at)} stands behind {int(before)}, the newest comes first")
            before = at
            if all(0 < price < PRICE_MAX for price in prices):
                rows.append((int(at), (prices[0], prices[1], prices[2], prices[3])))
            else:
                self.emit.refused("absurd_number", str(candle).encode(), "candle")
        return rows

    def _publish(self, series: _Series, rows: list[tuple[int, Ohlc]], latest: int) -> None:
        """Rows for what differs from the version published before: that of `latest` is open, those behind it are closed."""
        emit = self.emit
        late = self._is_late(latest + series.length_s)
        if late or latest < series.newest:
            emit.counters["stale_answer"] += 1
            self._not_fresh([series.name], f"its newest candle begins at {latest}")
            if latest < series.newest:
                return  # what it calls open was closed long ago
        unwanted = rows[self.options.backfill + 1 :]
        if unwanted and not series.answered and not self.open_world:  # but what was missed since an earlier life is
            series.horizon = max(series.horizon, min(unwanted[0][0], series.newest or unwanted[0][0]))
        series.answered = True
        batch: list[CandleArgs] = []
        for at, ohlc in reversed(rows):
            closed, before = at < latest, series.known.get(at)
            if late and not closed:
                continue  # a late host calls open what has ended since
            if before is None:
                if at <= series.horizon:
                    continue
                self._look_for_hole(series, at)
            elif before == (ohlc, closed) or (before[1] and not closed):
                continue
            elif before[1] and before[0] != ohlc:
                emit.counters["candle_revised"] += 1
            series.known[at] = ohlc, closed
            series.newest = max(series.newest, at)
            batch.append((series.interval, at * 1_000_000, ohlc, _NAN, -1, closed))
        emit.candles(series.instrument, 0, batch)
        series.forget_old()
        if not late:
            self._fresh([series.name])

    def _look_for_hole(self, series: _Series, at: int) -> None:
        """Candles follow each other: what lies between two of them was not served. Times are those of the candles."""
        if series.newest and at > series.newest + series.length_s:
            first_us, ticker = (series.newest + series.length_s) * 1_000_000, series.instrument.ticker
            self.emit.gap("candles", ticker, from_time=first_us, to_time=at * 1_000_000 - 1, cause="not_served")

    # Prices

    def _on_prices(self, body: bytes) -> None:
        wanted, seen = list[Price](), set[str]()
        for raw in decode_body(_decode_prices, body):
            try:
                ticker = _decode_named(raw).token_symbol
                if self.open_world or ticker in self._prices:
                    seen.add(ticker)
                    wanted.append(_decode_price(raw))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:  # each token is a message of its own
                self.emit.refused_error(error, bytes(raw))
        if not wanted:
            self.emit.counters["tickers_empty"] += 1
            self._not_fresh(self._prices.values(), "no wanted token in the list of prices")
            return
        if self._rule < 0:
            self._rule = self._told_rule(wanted)
            if self._rule < 0:
                self._not_fresh(self._prices.values(), "no token has a price and a candle that are up to date")
                return
            self.notes["decimal rule"] = f"USD = value / {_RULES[self._rule]}"
        for price in wanted:
            self._on_price(price, body)
        if missing := [name for ticker, name in self._prices.items() if ticker not in seen]:
            self.emit.counters["ticker_missing"] += len(missing)
            new = [name for name in missing if name in self.proof and not self.proof[name].refused]
            self.refuse(new, "not in the list of prices")

    def _on_price(self, price: Price, body: bytes) -> None:
        """One token: each is a message of its own, one that cannot be is refused and harms no other."""
        ticker, at_us, counters = price.token_symbol, _moment_us(price), self.emit.counters
        name = self._prices.get(ticker, "")
        exponent = self._exponent(price)
        if exponent is None:
            self._tokens_due = True  # a new token, maybe
            self.emit.refused("unknown_decimals", body, ticker)
            return
        given = {"bid_price": price.min_price, "ask_price": price.max_price, "index_price": price.median_price}
        values: dict[str, Any] = {
            column: _usd(digits, exponent) for column, digits in given.items() if digits is not None
        }
        is_possible = all(0 < value < PRICE_MAX for value in values.values())
        if not is_possible or at_us > self.emit.rcv_us + AHEAD_MAX_S * 1_000_000:
            self.emit.refused("absurd_number", body, f"ticker {price}")
            return
        if at_us and self._is_late(at_us / 1_000_000):
            counters["stale_answer"] += 1
            self._not_fresh([name], f"its price is of {at_us} us")
        else:
            self._fresh([name])
        before_us = self._moments.get(ticker, -1)
        if at_us and at_us <= before_us:
            counters["ticker_unchanged" if at_us == before_us else "ticker_older"] += 1
            return
        self._moments[ticker] = at_us
        self.emit.ticker(self.emit.instrument(ticker), at_us, **values)

    def _exponent(self, price: Price) -> int | None:
        decimals = self._decimals.get(price.token_address)
        return None if decimals is None else _exponents(decimals, price.oracle_decimals)[self._rule]

    def _told_rule(self, prices: Sequence[Price]) -> int:
        """The rule by which most prices equal the candles of the same tokens, or -1: documentation and clients name three.

        ConfigError when no token fits any: rows that are wrong by powers of ten would be worse than none.
        """
        fits, misfits = Counter[int](), list[str]()
        for price in prices:
            close, decimals = self._closes.get(price.token_symbol), self._decimals.get(price.token_address)
            digits = price.median_price or price.min_price
            if close is None or decimals is None or not int(digits) or self._is_late(_moment_us(price) / 1_000_000):
                continue
            found = [None if e is None else _usd(digits, e) for e in _exponents(decimals, price.oracle_decimals)]
            rules = [i for i, usd in enumerate(found) if usd is not None and abs(usd / close - 1) <= TOLERANCE]
            fits.update(rules)
            if not rules:
                tried = ", ".join(
                    f"{usd:g} by {rule}" for rule, usd in zip(_RULES, found, strict=True) if usd is not None
                )
                misfits.append(f"the price of {price.token_symbol} is {tried}, its 1m candle closed at {close:g}")
        if misfits and not fits:
            text = f"{self.NAME}: {'; '.join(misfits)}: no decimal rule fits within {TOLERANCE:.0%}"
            raise FrameError("no_decimal_rule", text) if self.open_world else ConfigError(text)
        if not fits:
            return 0 if self.open_world else -1
        return max(range(len(_RULES)), key=fits.__getitem__)  # the likeliest of those that fit as many

    # What this venue has not

    def want_snapshot(self, book: BookSync) -> None:
        raise NotImplementedError("no books")

    def want_repair(self, ticker: str, first: int, last: int) -> None:
        raise NotImplementedError("no trades")


def _candles_path(ticker: str, interval: str) -> str:
    return f"{_CANDLES}?{urlencode({'tokenSymbol': ticker, 'period': interval})}"


Left = dict[tuple[str, bytes], tuple[dict[int, tuple[Ohlc, bool]], int]]


def _candles_left(emit: Emit) -> Left:
    """Versions of candles that an earlier life of this connector published, and the horizon of each series.

    Where the ring has gone round, candles older than the oldest one left were published as well.
    """
    ring, left = emit.rings.get("candles"), Left()
    if ring is None or not ring.next:
        return left
    names = ("ticker", "interval", "open_time", "closed", "open", "high", "low", "close")
    columns = [column.tolist() for column in ring.recent_columns(*names)]
    for code, interval, open_us, closed, *ohlc in zip(*columns, strict=True):
        known, _ = left.setdefault((ring.tickers[code], interval), ({}, -1))
        known[open_us // 1_000_000] = (ohlc[0], ohlc[1], ohlc[2], ohlc[3]), bool(closed)
    if ring.next > ring.capacity:
        return {key: (known, min(known) - 1) for key, (known, _) in left.items()}
    return left


def _tickers_left(emit: Emit) -> dict[str, int]:
    """Time of the last price that an earlier life published, per token."""
    ring = emit.rings.get("tickers")
    if ring is None or not ring.next:
        return {}
    codes, times = ring.recent_columns("ticker", "timestamp")
    return {ring.tickers[code]: at for code, at in zip(codes.tolist(), times.tolist(), strict=True)}


VENUES = (Gmx,)
