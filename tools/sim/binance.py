"""Binance Spot and USD-M futures as simulated exchanges: streams, control messages, REST endpoints, weights and limits.

Written from https://github.com/binance/binance-spot-api-docs (web-socket-streams.md, rest-api.md and errors.md of
2026-07), the futures pages of developers.binance.com (2026) and from recorded frames; deliberately not from our own
decoder, so that each can prove the other wrong.
"""

import json
import math
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

from tools.sim.faults import shown
from tools.sim.ledger import Dialect
from tools.sim.market import ASK, BID, Action, Book, Candle, Instrument, Trade, plain
from tools.sim.server import Exchange, Level, Reply, Request, Session, Venue, Window

MINUTE_US = 60_000_000
EVENT_DELAY_US = 50  # a trade is told this much after it happened: E is never before T
FUTURES_DELAY_US = 2_000  # so too whatever futures say
QUOTES = ("USDT", "USDC", "FDUSD", "BTC", "ETH", "BNB", "EUR", "TRY")
# name: price, tick and lot in units of 10**-8, usual size in lots
KNOWN: dict[str, tuple[int, int, int, int]] = {
    "BTCUSDT": (6_400_000_000_000, 1_000_000, 1_000, 8_000),
    "ETHUSDT": (270_000_000_000, 1_000_000, 10_000, 9_000),
    "SOLUSDT": (16_500_000_000, 1_000_000, 100_000, 6_000),
    "BNBUSDT": (58_000_000_000, 1_000_000, 100_000, 1_500),
    "DOGEUSDT": (12_345_000, 1_000, 100_000_000, 900),
    "ETHBTC": (4_218_000, 1_000, 10_000, 20_000),
}
OPEN_INTEREST_SIZES = 5_000  # open interest of a future, in usual order sizes
FUNDING_US = 8 * 60 * MINUTE_US  # between two fundings
LIQUIDATION_EVERY = 12  # one trade in so many closes somebody's position
OFF_BOOK = ("INSURANCE_FUND", "ADL", "NA")  # `X` of what has a trade id and is no trade
SYMBOL_LEGAL = re.compile(r"^[\w-]{1,20}$")
CONTROL = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")
MISSING = "Mandatory parameter '{}' was not sent, was empty/null, or malformed."

Form = tuple[bool, bool]  # times in microseconds; wrapped as a combined stream
Handler = tuple[Callable[[Request], float], Callable[[Request], Any]]  # weight and answer of a request


class _Connection:
    """What the venue knows about one WebSocket."""

    def __init__(self, micro: bool, combined: bool, messages_per_s: float) -> None:
        self.micro, self.combined = micro, combined
        self.silent: dict[str, None] = {}  # streams that were acknowledged and never come on this path
        self.messages = Window(messages_per_s, 1.0)
        self.next_ping_s = 0.0


class _Symbol:
    """One symbol: its stream names and the levels that wait for the next depth event of each speed."""

    def __init__(self, book: Book, speeds: Iterable[str], last_id: int) -> None:
        self.book = book
        self.name = book.instrument.ticker
        lower = self.name.lower()
        self.trade, self.agg, self.best = f"{lower}@trade", f"{lower}@aggTrade", f"{lower}@bookTicker"
        self.day, self.mini, self.kline = f"{lower}@ticker", f"{lower}@miniTicker", f"{lower}@kline_"
        self.mark, self.forced = f"{lower}@markPrice@1s", f"{lower}@forceOrder"
        self.partial = {
            speed: [(levels, f"{lower}@depth{levels}{speed}") for levels in (5, 10, 20)] for speed in speeds
        }
        self.depth = {speed: f"{lower}@depth{speed}" for speed in speeds}
        self.waiting: dict[str, dict[tuple[int, int], None]] = {speed: {} for speed in speeds}
        self.first = dict.fromkeys(speeds, last_id)  # first update id that waits
        self.sent = dict.fromkeys(speeds, last_id)  # last update id published at each speed
        self.changed_us = 0  # when the book changed last
        self.traded = False  # since the last statistics message
        self.liquidated_s = 0  # the last second in which a liquidation was told
        self._prices: dict[int, str] = {}

    def price(self, ticks: int) -> str:
        text = self._prices.get(ticks)
        if text is None:
            if len(self._prices) > 20_000:
                self._prices.clear()
            text = self._prices[ticks] = plain(ticks * self.book.instrument.tick, 8)
        return text

    def qty(self, lots: int) -> str:
        whole, part = divmod(lots * self.book.instrument.lot, 100_000_000)
        return f"{whole}.{part:08d}"

    def value(self, ticks_times_lots: int) -> str:
        return plain(ticks_times_lots * self.book.instrument.tick * self.book.instrument.lot // 100_000_000, 8)

    def levels(self, levels: list[Level]) -> str:
        return "[" + ",".join(f'["{self.price(price)}","{self.qty(lots)}"]' for price, lots in levels) + "]"


class Binance(Venue):
    """What both markets have in common. The class attributes are what differs, and the methods named after words."""

    shown_faults: ClassVar[tuple[str, ...]] = (  # books are healed over HTTP, so that is spoilt too
        *shown("depth", "@trade"),
        "reorder:every=3,stream=depth", "truncate:at=8,stream=depth", "ban:at=11,seconds=2,status=429",
    )  # fmt: skip
    api: ClassVar[str]  # path of REST
    speeds: ClassVar[dict[str, int]]  # name of a depth stream's speed -> microseconds, the finest first
    known: ClassVar[dict[str, tuple[int, int, int, int]]]  # as KNOWN
    kind: ClassVar[str] = "spot"
    halted_status: ClassVar[str] = "BREAK"
    rest_trade_words: ClassVar[dict[str, object]] = {"isBestMatch": True}  # beside those of both
    depth_weights: ClassVar[tuple[tuple[int, int], ...]]
    depth_default: ClassVar[int] = 100  # levels of a snapshot that names no limit

    def __init__(self, exchange: Exchange, limits: Mapping[str, float], credentials: Mapping[str, str]) -> None:
        super().__init__(exchange, limits, credentials)
        self.symbols = {ticker: self._made(book) for ticker, book in exchange.market.books.items()}
        self.connects: dict[str, Window] = {}
        self.used: dict[str, tuple[int, float]] = {}  # ip -> number of the window, weight used in it
        self.early: Counter[str] = Counter()  # ip -> requests before Retry-After had passed
        self.bans: Counter[str] = Counter()
        self.banned_until_s: dict[str, float] = {}
        self.seconds = 0

    def _made(self, book: Book) -> _Symbol:
        return _Symbol(book, self.speeds, self.book_id(book))

    @classmethod
    def instrument(cls, ticker: str, busy: float) -> Instrument:
        quote = next((q for q in QUOTES if ticker.endswith(q) and ticker != q), "USDT")
        price, tick, lot, size = cls.known.get(ticker, (1_234_560_000, 10_000, 1_000_000, 5_000))
        base = ticker.removesuffix(quote)
        return Instrument(ticker, base, quote, tick, 8, lot, 8, price // tick, size, busy, cls.kind)

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}USDT"

    def first_book(self, book: Book) -> dict[str, object]:
        symbol = self.symbols[book.instrument.ticker]
        bids, asks = ([[symbol.price(p), symbol.qty(q)] for p, q in book.levels(side)] for side in (BID, ASK))
        return {"last": self.book_id(book), "bids": bids, "asks": asks}

    def listed(self, book: Book, t: int) -> None:
        self.symbols[book.instrument.ticker] = self._made(book)

    # What a market calls things.

    @staticmethod
    @abstractmethod
    def book_id(book: Book) -> int:
        """Id of the last change of a book."""

    @staticmethod
    @abstractmethod
    def ids(action: Action) -> tuple[int, int]:
        """First and last update id of an action."""

    @abstractmethod
    def best_words(self, symbol: _Symbol, t: int, u: int, sides: str) -> str:
        """A bookTicker payload; `sides` holds the four numbers."""

    @abstractmethod
    def trade_words(self, symbol: _Symbol, trade: Trade, micro: bool) -> str:
        """A trade payload."""

    @abstractmethod
    def agg_words(self, symbol: _Symbol, trades: list[Trade], micro: bool) -> str:
        """An aggTrade payload."""

    @abstractmethod
    def depth_words(self, symbol: _Symbol, t: int, ids: tuple[int, int, int], sides: str, micro: bool) -> str:
        """A depthUpdate payload; `ids` are first, last and previous last one."""

    @abstractmethod
    def event_us(self, symbol: _Symbol, t: int) -> int:
        """The time by which a depth event of now is known."""

    def delisted(self, book: Book, t: int) -> None:
        self.finish(t)
        del self.symbols[book.instrument.ticker]

    # The market put into words.

    def _publish(self, stream: str, symbol: str, body: Callable[[bool], str], first: int = 0, last: int = 0) -> None:
        def make(form: Form) -> str:
            return f'{{"stream":"{stream}","data":{body(form[0])}}}' if form[1] else body(form[0])

        self.exchange.publish(stream, symbol, make, first, last)

    def on_action(self, book: Book, action: Action) -> None:
        symbol, t, ledger = self.symbols[book.instrument.ticker], action.t, self.exchange.ledger
        if action.trades:
            self._on_trades(symbol, action)
        first, last = self.ids(action)
        for speed, waiting in symbol.waiting.items():
            if action.changes and not waiting:
                symbol.first[speed] = first
            for side, price, _, _ in action.changes:
                waiting[side, price] = None
        if action.changes:
            symbol.changed_us = t
        if action.best_changed:
            (bid, bid_lots), (ask, ask_lots) = book.best(BID), book.best(ASK)
            u, b, bq, a, aq = (
                last,
                symbol.price(bid),
                symbol.qty(bid_lots),
                symbol.price(ask),
                symbol.qty(ask_lots),
            )
            told = t if self.dialect.bbo_has_time else self.exchange.told_us(t)
            ledger.line(
                "bbo",
                symbol.name,
                f'{{"kind":"bbo","ticker":"{symbol.name}","id":{u},"bid":"{b}","bid_qty":"{bq}","ask":"{a}","ask_qty":"{aq}","t":{told}}}',
            )
            self._publish(
                symbol.best,
                symbol.name,
                lambda _micro: self.best_words(symbol, t, u, f'"b":"{b}","B":"{bq}","a":"{a}","A":"{aq}"'),
                u,
                u,
            )

    def _on_trades(self, symbol: _Symbol, action: Action) -> None:
        t, ledger, name = action.t, self.exchange.ledger, symbol.name
        symbol.traded = True
        for trade in action.trades:
            p, q = symbol.price(trade.price), symbol.qty(trade.lots)
            side = "BUY" if trade.side > 0 else "SELL"
            ledger.line(
                "trade",
                name,
                f'{{"kind":"trade","ticker":"{name}","id":"{trade.id}","seq":{trade.id},"price":"{p}","qty":"{q}","side":"{side}","t":{t}}}',
            )
            self._publish(
                symbol.trade,
                name,
                lambda micro, trade=trade: self.trade_words(symbol, trade, micro),  # type: ignore[misc]
                trade.id,
                trade.id,
            )
        for agg_id, group in groupby(action.trades, key=lambda trade: trade.agg_id):
            trades = list(group)
            p, q, first, last = (
                symbol.price(trades[0].price),
                symbol.qty(sum(x.lots for x in trades)),
                trades[0].id,
                trades[-1].id,
            )
            side = "BUY" if trades[0].side > 0 else "SELL"
            ledger.line(
                "aggtrade",
                name,
                f'{{"kind":"aggtrade","ticker":"{name}","id":"{agg_id}","first":{first},"last":{last},"price":"{p}","qty":"{q}","side":"{side}","t":{t}}}',
            )
            self._publish(
                symbol.agg,
                name,
                lambda micro, trades=trades: self.agg_words(symbol, trades, micro),  # type: ignore[misc]
                agg_id,
                agg_id,
            )

    def timers(self) -> list[tuple[int, Callable[[int], None]]]:
        depths = [(us, partial(self._depth, speed)) for speed, us in self.speeds.items()]
        return [*depths, (1_000_000, self._second)]

    def finish(self, t: int) -> None:
        for speed in self.speeds:
            self._depth(speed, t)

    def _depth(self, speed: str, t: int) -> None:
        """One depth event of a speed for every symbol that has changed."""
        for symbol in self.symbols.values():
            waiting = symbol.waiting[speed]
            if not waiting:
                continue
            book, previous = symbol.book, symbol.sent[speed]
            changed = [(side, price, book.level(side, price)) for side, price in waiting]
            waiting.clear()
            symbol.sent[speed] = self.book_id(book)
            self._depth_event(symbol, speed, t, (symbol.first[speed], symbol.sent[speed], previous), changed)

    def _depth_event(
        self, symbol: _Symbol, speed: str, t: int, ids: tuple[int, int, int], changed: list[tuple[int, int, int]]
    ) -> None:
        name, (first, last, previous), event_us = symbol.name, ids, self.event_us(symbol, t)
        bids = symbol.levels(sorted(((p, q) for side, p, q in changed if side == BID), reverse=True))
        asks = symbol.levels(sorted((p, q) for side, p, q in changed if side == ASK))
        self.exchange.ledger.line(
            "book",
            name,
            f'{{"kind":"book","ticker":"{name}","stream":"depth{speed}","first":{first},"last":{last},"prev":{previous},'
            f'"bids":{bids},"asks":{asks},"t":{event_us}}}',
        )
        sides = f'"b":{bids},"a":{asks}'
        self._publish(
            symbol.depth[speed], name, lambda micro: self.depth_words(symbol, t, ids, sides, micro), first, last
        )
        for count, stream in symbol.partial[speed]:
            self._publish(stream, name, lambda _micro, n=count: self._top(symbol, n, last), last, last)  # type: ignore[misc]

    @staticmethod
    def _top(symbol: _Symbol, count: int, last: int) -> str:
        bids, asks = (symbol.levels(symbol.book.levels(side)[:count]) for side in (BID, ASK))
        return f'{{"lastUpdateId":{last},"bids":{bids},"asks":{asks}}}'

    def _second(self, t: int) -> None:
        """Once a second: statistics and candles of every symbol."""
        self.seconds += 1
        minis: list[Callable[[bool], str]] = []
        for symbol in self.symbols.values():
            for interval, candle in self.exchange.market.candles[symbol.name].roll(t):
                self._candle(symbol, interval, candle, t, True)
            for interval, candle in self.exchange.market.candles[symbol.name].open.items():
                if self.exchange.streams.get(symbol.kline + interval) and (self.seconds % 2 or interval == "1s"):
                    self._candle(symbol, interval, candle, t, False)
            stats = self._stats(symbol, t)
            self.exchange.ledger.record("ticker", ticker=symbol.name, t=t, data=stats)
            self._publish(symbol.day, symbol.name, lambda micro, s=symbol: _json(self._day(s, t, micro)))  # type: ignore[misc]

            def mini(micro: bool, s: _Symbol = symbol) -> str:
                return _json(self._mini(s, t, micro))

            self._publish(symbol.mini, symbol.name, mini)
            if symbol.traded:
                minis.append(mini)
                symbol.traded = False
            self.more(symbol, t)
        if minis:
            self._publish("!miniTicker@arr", "", lambda micro: "[" + ",".join(make(micro) for make in minis) + "]")

    def more(self, symbol: _Symbol, t: int) -> None:
        """What only one of the markets says once a second."""
        return

    def _stats(self, symbol: _Symbol, t: int) -> dict[str, Any]:
        """The 24 hour statistics in the stream's words, without times; the day began when the simulation did."""
        day, book = self.exchange.market.day[symbol.name], symbol.book
        (bid, bid_lots), (ask, ask_lots) = book.best(BID), book.best(ASK)
        change = day.close - day.open
        average = day.value // day.lots if day.lots else day.close
        return {
            "s": symbol.name,
            "p": ("-" if change < 0 else "") + symbol.price(abs(change)),
            "P": f"{100 * change / day.open:.3f}",
            "w": symbol.price(average),
            "x": symbol.price(day.open),
            "c": symbol.price(day.close),
            "Q": symbol.qty(book.trades[-1].lots if book.trades else 0),
            "b": symbol.price(bid),
            "B": symbol.qty(bid_lots),
            "a": symbol.price(ask),
            "A": symbol.qty(ask_lots),
            "o": symbol.price(day.open),
            "h": symbol.price(day.high),
            "l": symbol.price(day.low),
            "v": symbol.qty(day.lots),
            "q": symbol.value(day.value),
            "F": day.first_id,
            "L": day.last_id,
            "n": day.trades,
        }

    def _day(self, symbol: _Symbol, t: int, micro: bool) -> dict[str, Any]:
        times = {"O": _time(t - 86_400_000_000, micro), "C": _time(t, micro)}
        stats = self._stats(symbol, t)
        last = {key: stats.pop(key) for key in ("F", "L", "n")}
        return {"e": "24hrTicker", "E": _time(t, micro), **stats, **times, **last}

    def _mini(self, symbol: _Symbol, t: int, micro: bool) -> dict[str, Any]:
        stats = self._stats(symbol, t)
        return {
            "e": "24hrMiniTicker",
            "E": _time(t, micro),
            **{key: stats[key] for key in ("s", "c", "o", "h", "l", "v", "q")},
        }

    def _candle(self, symbol: _Symbol, interval: str, candle: Candle, t: int, closed: bool) -> None:
        words = _candle_words(symbol, candle)
        self.exchange.ledger.record(
            "candle",
            ticker=symbol.name,
            interval=interval,
            open_time=candle.start,
            open=words["o"],
            high=words["h"],
            low=words["l"],
            close=words["c"],
            volume=words["v"],
            trades=candle.trades,
            closed=closed,
            t=t,
        )

        def make(micro: bool) -> str:
            head = {"t": _time(candle.start, micro), "T": _close_time(candle, micro), "s": symbol.name, "i": interval}
            body = {**head, **words, "x": closed}
            order = "tTsifLochlvnxqVQ"
            kline = {key: body[key] for key in order} | {"B": "0"}
            return _json({"e": "kline", "E": _time(t, micro), "s": symbol.name, "k": kline})

        self._publish(symbol.kline + interval, symbol.name, make)

    # WebSocket.

    def refuse_ws(self, request: Request) -> Reply | None:
        exchange = self.exchange
        connects = self.connects.setdefault(
            request.ip, Window(self.limit["connects_max"], self.limit["connects_window_s"])
        )
        if not connects.allow(exchange.now_s):
            exchange.violation("connects")
            return self.ban_reply(429, int(self.limit["connects_window_s"]))
        path = self._below_route(request)
        if path not in ("/stream", "/ws") and not path.startswith(("/ws/", "/stream/")):
            return Reply("", 404)
        if len(self._asked(request)) > self.limit["streams_max"]:
            exchange.violation("streams")
            return _error(400, 2, "Invalid request: too many streams")
        return None

    def _below_route(self, request: Request) -> str:
        """The path of a WebSocket without the route that some have in front."""
        return request.path

    def carries(self, session: Session, stream: str) -> bool:
        """Whether the path of this connection delivers a stream."""
        return True

    def _asked(self, request: Request) -> list[str]:
        path = self._below_route(request)
        names = request.query.get("streams", "") if path.startswith("/stream") else path[len("/ws/") :]
        return list(dict.fromkeys(name for name in names.split("/") if name))

    def _take(self, session: Session, stream: str) -> None:
        own: _Connection = session.own
        if self.carries(session, stream):
            self.exchange.subscribe(session, stream, (own.micro, own.combined))
        else:
            own.silent[stream] = None

    def opened(self, session: Session) -> None:
        request = session.request
        combined = self._below_route(request).startswith("/stream")
        own = _Connection(self.wants_micro(request), combined, self.limit["messages_per_s"])
        own.next_ping_s = self.exchange.now_s + self.limit["ping_every_s"]
        session.own = own
        for stream in self._asked(request):
            if not self.exchange.refused(session, stream, stream.split("@")[0].upper()):
                self._take(session, stream)

    @staticmethod
    def wants_micro(request: Request) -> bool:
        """Whether a connection gets its times in microseconds."""
        return request.query.get("timeUnit", "") in ("MICROSECOND", "microsecond")

    def allows(self, session: Session) -> bool:
        own: _Connection = session.own
        return own.messages.allow(self.exchange.now_s)

    def keep(self, session: Session, now_s: float) -> None:
        own: _Connection = session.own
        if now_s - session.opened_s >= self.limit["lifetime_s"]:
            self.exchange.hang_up(session, "lifetime", 1001)
        elif session.pings and now_s - min(session.pings.values()) >= self.limit["pong_within_s"]:
            self.exchange.violation("pong_missing", session)
            self.exchange.hang_up(session, "no pong")
        elif now_s >= own.next_ping_s:
            own.next_ping_s = now_s + self.limit["ping_every_s"]
            if not self.exchange.heartbeats_off(session):
                self.exchange.ping(session, str(self.exchange.clock_us() // 1000).encode())

    def notice(self, session: Session, t: int) -> str:
        own: _Connection = session.own
        body = f'{{"e":"serverShutdown","E":{_time(t, own.micro)}}}'
        return f'{{"stream":"!serverShutdown","data":{body}}}' if own.combined else body

    def unknown_event(self, session: Session, t: int) -> str:
        own: _Connection = session.own
        body = f'{{"e":"somethingNew","E":{_time(t, own.micro)},"s":"BTCUSDT","z":[1,"2",null]}}'
        return f'{{"stream":"btcusdt@somethingNew","data":{body}}}' if own.combined else body

    def on_text(self, session: Session, text: str) -> None:
        try:
            message = json.loads(text)
        except ValueError:
            self._refuse(session, None, 3, "Invalid JSON: expected value at line 1 column 1")
            return
        if not isinstance(message, dict) or "method" not in message:
            self._refuse(session, None, 2, f"Invalid request: missing field `method` at line 1 column {len(text)}")
            return
        method, params, number = message["method"], message.get("params"), message.get("id")
        valid = number is None or (
            isinstance(number, int) and not isinstance(number, bool) and -(2**63) <= number < 2**63
        )
        if not valid and not (isinstance(number, str) and number.isalnum() and len(number) <= 36):
            self._refuse(session, None, 2, "Invalid request: request ID must be an unsigned integer")
            return
        if method not in CONTROL:
            known = ", ".join(f"`{name}`" for name in CONTROL)
            self._refuse(
                session,
                number,
                2,
                f"Invalid request: unknown variant {method}, expected one of {known} at line 1 column 28",
            )
            return
        if set(message) - {"method", "params", "id"}:
            self._refuse(session, number, 2, "Invalid request: too many parameters")
            return
        getattr(self, "_on_" + method.lower())(session, number, params)

    def _reply(self, session: Session, number: object, result: object) -> None:
        self.exchange.send(session, _json({"result": result, "id": number}))

    def _refuse(self, session: Session, number: object, code: int, text: str) -> None:
        self.exchange.send(session, _json({"error": {"code": code, "msg": text}, "id": number}))

    def _streams(self, session: Session, number: object, params: object) -> list[str] | None:
        if isinstance(params, list) and all(isinstance(name, str) for name in params):
            return params
        self._refuse(session, number, 2, "Invalid request: streams must be an array")
        return None

    def _on_subscribe(self, session: Session, number: object, params: object) -> None:
        """A name that does not exist is acknowledged and stays silent, as on the venue itself."""
        names = self._streams(session, number, params)
        if names is None or self.exchange.ignored(session, {name: name.split("@")[0].upper() for name in names}):
            return
        if len({*session.subs, *session.own.silent, *names}) > self.limit["streams_max"]:
            self.exchange.violation("streams", session)
            self._refuse(session, number, 2, "Invalid request: too many streams")
            return
        if any(self.exchange.refused(session, name, name.split("@")[0].upper()) for name in names):
            self._refuse(session, number, 2, "Invalid request: invalid stream")
            return
        self._reply(session, number, None)
        for name in names:
            self._take(session, name)

    def _on_unsubscribe(self, session: Session, number: object, params: object) -> None:
        names = self._streams(session, number, params)
        if names is None:
            return
        for name in names:
            self.exchange.unsubscribe(session, name)
            session.own.silent.pop(name, None)
        self._reply(session, number, None)

    def _on_list_subscriptions(self, session: Session, number: object, params: object) -> None:
        self._reply(session, number, [*session.subs, *session.own.silent])

    def _on_set_property(self, session: Session, number: object, params: object) -> None:
        own: _Connection = session.own
        if not isinstance(params, list) or not params or not isinstance(params[0], str):
            self._refuse(session, number, 2, "Invalid request: property name must be a string")
        elif params[0] != "combined":
            self._refuse(session, number, 0, "Unknown property")
        elif len(params) < 2 or not isinstance(params[1], bool):
            self._refuse(session, number, 1, "Invalid value type: expected Boolean")
        else:
            own.combined = params[1]
            for name in list(session.subs):
                self.exchange.subscribe(session, name, (own.micro, own.combined))
            self._reply(session, number, None)

    def _on_get_property(self, session: Session, number: object, params: object) -> None:
        own: _Connection = session.own
        if not isinstance(params, list) or not params or not isinstance(params[0], str):
            self._refuse(session, number, 2, "Invalid request: property name must be a string")
        elif params[0] != "combined":
            self._refuse(session, number, 0, "Unknown property")
        else:
            self._reply(session, number, own.combined)

    # REST.

    def ban_reply(self, status: int, retry_after_s: int) -> Reply:
        if status == 418:
            until = self.exchange.clock_us() // 1000 + retry_after_s * 1000
            text = (
                f"Way too much request weight used; IP banned until {until}. Please use WebSocket Streams for live"
                " updates to avoid bans."
            )
        else:
            text = (
                f"Too much request weight used; current limit is {self.limit['weight_max']:.0f} request weight per"
                " 1 MINUTE. Please use WebSocket Streams for live updates to avoid polling the API."
            )
        return _error(status, -1003, text, {"Retry-After": str(retry_after_s)})

    async def http(self, request: Request) -> Reply:
        handlers = self.handlers()
        name = request.path.removeprefix(f"{self.api}/")
        if name not in handlers or name == request.path:
            return Reply("", 404)
        if request.method != "GET":
            return _error(405, -1000, "Method not allowed.")
        weight, handle = handlers[name]
        refusal, used = self._weigh(request, weight(request))
        if refusal:
            return refusal
        headers = {"X-MBX-USED-WEIGHT": f"{used:.0f}", "X-MBX-USED-WEIGHT-1M": f"{used:.0f}"}
        try:
            answer = handle(request)
            if name == "depth":
                answer = await answer
        except _Bad as bad:
            return _error(bad.status, bad.code, bad.text, headers)
        return Reply(answer if isinstance(answer, str) else _json(answer), 200, headers)

    def handlers(self) -> dict[str, Handler]:
        """REST endpoint -> weight and answer."""
        return {
            "ping": (lambda _: 1, lambda _: {}),
            "time": (lambda _: 1, lambda r: {"serverTime": _time(self.exchange.clock_us(), _micro(r))}),
            "depth": (self._depth_weight, self._depth_snapshot),
            "trades": (lambda _: 25, self._trades),
            "historicalTrades": (lambda _: 25, self._trades),
            "aggTrades": (lambda _: 4, self._agg_trades),
            "exchangeInfo": (lambda _: 20, self._exchange_info),
            "klines": (lambda _: 2, self._klines),
            "ticker/24hr": (lambda r: 2 if "symbol" in r.query else 80, self._ticker_day),
            "ticker/bookTicker": (lambda r: 2 if "symbol" in r.query else 4, self._ticker_book),
        }

    def _depth_weight(self, request: Request) -> float:
        limit = request.query.get("limit", str(self.depth_default))
        number = int(limit) if limit.isdigit() else self.depth_default
        return next((weight for most, weight in self.depth_weights if number <= most), self.depth_weights[-1][1])

    def _weigh(self, request: Request, weight: float) -> tuple[Reply | None, float]:
        """Count the weight of a request: 429 beyond the budget, 418 for who goes on asking."""
        now_s, ip, length_s = self.exchange.now_s, request.ip, self.limit["weight_window_s"]
        if now_s < self.banned_until_s.get(ip, 0.0):
            return self.ban_reply(418, math.ceil(self.banned_until_s[ip] - now_s)), 0
        left_s = self.exchange.retry_until_s.get(ip, 0.0) - now_s
        if left_s > 0:
            self.early[ip] += 1
            if self.early[ip] >= self.limit["early_until_ban"]:
                ban_s = self.limit["ban_s"] * 2 ** min(self.bans[ip], 10)
                self.bans[ip] += 1
                self.early[ip] = 0
                self.banned_until_s[ip] = now_s + ban_s
                return self.ban_reply(418, math.ceil(ban_s)), 0
            return self.ban_reply(429, math.ceil(left_s)), 0
        number = int(now_s // length_s)
        window, used = self.used.get(ip, (number, 0.0))
        used = weight if window != number else used + weight
        self.used[ip] = (number, used)
        if used > self.limit["weight_max"]:
            self.exchange.violation("weight")
            return self.ban_reply(429, math.ceil((number + 1) * length_s - now_s)), used
        return None, used

    def _symbol(self, request: Request) -> _Symbol:
        name = request.query.get("symbol", "")
        if not name:
            raise _Bad(-1102, MISSING.format("symbol"))
        if not SYMBOL_LEGAL.match(name):
            raise _Bad(
                -1100,
                "Illegal characters found in parameter 'symbol'; legal range is '^[\\\\w\\\\-._&&[^a-z]]{1,50}$'.",
            )
        if name not in self.symbols:
            raise _Bad(-1121, "Invalid symbol.")
        return self.symbols[name]

    def _exchange_info(self, request: Request) -> object:
        names = [*self.symbols, *self.exchange.halted]
        if "symbol" in request.query:
            names = [self._symbol(request).name]
        elif "symbols" in request.query:
            try:
                names = [str(name) for name in json.loads(request.query["symbols"])]
            except (ValueError, TypeError) as error:
                raise _Bad(-1100, "Illegal characters found in parameter 'symbols'.") from error
            if not set(names) <= set(self.symbols):
                raise _Bad(-1121, "Invalid symbol.")
        minute = {"interval": "MINUTE", "intervalNum": 1}
        return {
            "timezone": "UTC",
            "serverTime": _time(self.exchange.clock_us(), _micro(request)),
            "rateLimits": [
                {"rateLimitType": "REQUEST_WEIGHT", **minute, "limit": int(self.limit["weight_max"])},
                {"rateLimitType": "RAW_REQUESTS", "interval": "MINUTE", "intervalNum": 5, "limit": 300_000},
            ],
            "exchangeFilters": [],
            "symbols": [self.symbol_info(name) for name in names],
        }

    def symbol_info(self, name: str) -> dict[str, object]:
        """One symbol in the list of instruments."""
        halted = self.exchange.halted.get(name)
        instrument = halted or self.symbols[name].book.instrument
        tick, lot = plain(instrument.tick // 10 ** self.exchange.finer[name], 8), plain(instrument.lot, 8)
        return {
            "symbol": instrument.ticker,
            "status": self.halted_status if halted else "TRADING",
            "baseAsset": instrument.base,
            "baseAssetPrecision": 8,
            "quoteAsset": instrument.quote,
            "quotePrecision": 8,
            "quoteAssetPrecision": 8,
            "orderTypes": ["LIMIT", "LIMIT_MAKER", "MARKET"],
            "isSpotTradingAllowed": True,
            "isMarginTradingAllowed": False,
            "filters": [
                {"filterType": "PRICE_FILTER", "minPrice": tick, "maxPrice": "1000000.00000000", "tickSize": tick},
                {"filterType": "LOT_SIZE", "minQty": lot, "maxQty": "9000000.00000000", "stepSize": lot},
            ],
            "permissions": [],
            "permissionSets": [["SPOT"]],
            "defaultSelfTradePreventionMode": "EXPIRE_MAKER",
            "allowedSelfTradePreventionModes": ["EXPIRE_MAKER"],
        }

    async def _depth_snapshot(self, request: Request) -> str:
        symbol = self._symbol(request)
        limit = self.depth_limit(request)
        update_id, engine_id, bids, asks = await self.exchange.snapshot(symbol.book, request.agent)
        sides = f'"bids":{symbol.levels(bids[:limit])},"asks":{symbol.levels(asks[:limit])}'
        return self.snapshot_words(symbol, update_id, engine_id, sides)

    def depth_limit(self, request: Request) -> int:
        return _whole(request, "limit", self.depth_default, self.depth_weights[-1][0])

    def snapshot_words(self, symbol: _Symbol, update_id: int, engine_id: int, sides: str) -> str:
        """The answer to a request for a book."""
        return f'{{"lastUpdateId":{update_id},{sides}}}'

    def _trades(self, request: Request) -> object:
        symbol, limit, micro = self._symbol(request), _whole(request, "limit", 500, 1000), _micro(request)
        trades = list(symbol.book.trades)
        if "fromId" in request.query and request.path.endswith("historicalTrades"):
            first = _whole(request, "fromId", 0, 2**63)
            chosen = [trade for trade in trades if trade.id >= first][:limit]
        else:
            chosen = trades[-limit:]
        return [
            {
                "id": trade.id,
                "price": symbol.price(trade.price),
                "qty": symbol.qty(trade.lots),
                "quoteQty": symbol.value(trade.price * trade.lots),
                "time": _time(trade.t, micro),
                "isBuyerMaker": trade.side < 0,
                **self.rest_trade_words,
            }
            for trade in chosen
        ]

    def _agg_trades(self, request: Request) -> object:
        symbol, limit, micro = self._symbol(request), _whole(request, "limit", 500, 1000), _micro(request)
        groups = [list(group) for _, group in groupby(symbol.book.trades, key=lambda trade: trade.agg_id)]
        if "fromId" in request.query:
            first = _whole(request, "fromId", 0, 2**63)
            chosen = [group for group in groups if group[0].agg_id >= first][:limit]
        elif "startTime" in request.query or "endTime" in request.query:
            start, end = _between(request)
            chosen = [group for group in groups if start <= group[0].t <= end][:limit]
        else:
            chosen = groups[-limit:]
        return [_agg_words(symbol, group, micro) for group in chosen]

    def _klines(self, request: Request) -> object:
        symbol, limit, micro = self._symbol(request), _whole(request, "limit", 500, 1000), _micro(request)
        interval = request.query.get("interval", "")
        if not interval:
            raise _Bad(-1102, MISSING.format("interval"))
        if interval not in self.intervals:
            raise _Bad(-1120, "Invalid interval.")
        candles = self.exchange.market.candles[symbol.name]
        start, end = _between(request)
        chosen = [c for c in (*candles.closed[interval], candles.open[interval]) if start <= c.start <= end]
        chosen = chosen[:limit] if "startTime" in request.query else chosen[-limit:]
        rows = []
        for candle in chosen:
            w = _candle_words(symbol, candle)
            head = [_time(candle.start, micro), w["o"], w["h"], w["l"], w["c"], w["v"], _close_time(candle, micro)]
            rows.append([*head, w["q"], candle.trades, w["V"], w["Q"], "0"])
        return rows

    def _ticker_day(self, request: Request) -> object:
        words = {
            "s": "symbol", "p": "priceChange", "P": "priceChangePercent", "w": "weightedAvgPrice", "x": "prevClosePrice",
            "c": "lastPrice", "Q": "lastQty", "b": "bidPrice", "B": "bidQty", "a": "askPrice", "A": "askQty",
            "o": "openPrice", "h": "highPrice", "l": "lowPrice", "v": "volume", "q": "quoteVolume", "O": "openTime",
            "C": "closeTime", "F": "firstId", "L": "lastId", "n": "count",
        }  # fmt: skip
        symbols = [self._symbol(request)] if "symbol" in request.query else list(self.symbols.values())
        t, micro = self.exchange.clock_us(), _micro(request)
        rows = [{words[key]: value for key, value in self._day(s, t, micro).items() if key in words} for s in symbols]
        return rows[0] if "symbol" in request.query else rows

    def _ticker_book(self, request: Request) -> object:
        symbols = [self._symbol(request)] if "symbol" in request.query else list(self.symbols.values())
        rows = []
        for symbol in symbols:
            (bid, bid_lots), (ask, ask_lots) = symbol.book.best(BID), symbol.book.best(ASK)
            best = {"bidPrice": symbol.price(bid), "bidQty": symbol.qty(bid_lots)}
            rows.append({"symbol": symbol.name, **best, "askPrice": symbol.price(ask), "askQty": symbol.qty(ask_lots)})
        return rows[0] if "symbol" in request.query else rows


class BinanceSpot(Binance):
    """The spot market: ids count the changes of one symbol, times come in ms or us."""

    name: ClassVar[str] = "binance_spot"
    api: ClassVar[str] = "/api/v3"
    speeds: ClassVar[dict[str, int]] = {"@100ms": 100_000, "": 1_000_000}
    known: ClassVar[dict[str, tuple[int, int, int, int]]] = KNOWN
    depth_weights: ClassVar[tuple[tuple[int, int], ...]] = ((100, 5), (500, 25), (1000, 50), (5000, 250))
    tickers: ClassVar[tuple[str, ...]] = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "DOGEUSDT")
    dialect: ClassVar[Dialect] = Dialect(
        1,
        "depth@100ms",
        {
            "last": "c",
            "open_24h": "o",
            "high_24h": "h",
            "low_24h": "l",
            "volume_24h": "v",
            "quote_volume_24h": "q",
            "bid_price": "b",
            "ask_price": "a",
        },
        bbo_has_id=True,
        bbo_has_time=False,
        candle_has_time=True,
        candle_counts_trades=True,
        intervals={},
    )
    limits: ClassVar[dict[str, float]] = {
        "ping_every_s": 20,
        "pong_within_s": 60,
        "lifetime_s": 86_400,
        "streams_max": 1024,
        "messages_per_s": 5,
        "connects_max": 300,
        "connects_window_s": 300,
        "weight_max": 6000,
        "weight_window_s": 60,
        "early_until_ban": 5,
        "ban_s": 120,
    }
    intervals: ClassVar[dict[str, int]] = {
        "1s": 1_000_000,
        "1m": MINUTE_US,
        "3m": 3 * MINUTE_US,
        "5m": 5 * MINUTE_US,
        "15m": 15 * MINUTE_US,
        "30m": 30 * MINUTE_US,
        "1h": 60 * MINUTE_US,
        "2h": 120 * MINUTE_US,
        "4h": 240 * MINUTE_US,
        "6h": 360 * MINUTE_US,
        "8h": 480 * MINUTE_US,
        "12h": 720 * MINUTE_US,
        "1d": 1440 * MINUTE_US,
    }
    notes: ClassVar[str] = (
        "/stream?streams=..., /ws/<stream>, timeUnit=MICROSECOND; trade, aggTrade, depth[@100ms], depth5|10|20,"
        " bookTicker, ticker, miniTicker, kline_<i>; /api/v3/ping time exchangeInfo depth trades historicalTrades"
        " aggTrades klines ticker/24hr ticker/bookTicker. Ledger streams: depth@100ms, depth."
    )

    @staticmethod
    def book_id(book: Book) -> int:
        return book.update_id

    @staticmethod
    def ids(action: Action) -> tuple[int, int]:
        return action.first_id, action.last_id

    def best_words(self, symbol: _Symbol, t: int, u: int, sides: str) -> str:
        return f'{{"u":{u},"s":"{symbol.name}",{sides}}}'

    def trade_words(self, symbol: _Symbol, trade: Trade, micro: bool) -> str:
        return (
            f'{{"e":"trade","E":{_time(trade.t + EVENT_DELAY_US, micro)},"s":"{symbol.name}","t":{trade.id},'
            f'"p":"{symbol.price(trade.price)}","q":"{symbol.qty(trade.lots)}","T":{_time(trade.t, micro)},'
            f'"m":{_maker(trade)},"M":true}}'
        )

    def agg_words(self, symbol: _Symbol, trades: list[Trade], micro: bool) -> str:
        first, lots = trades[0], sum(trade.lots for trade in trades)
        return (
            f'{{"e":"aggTrade","E":{_time(first.t + EVENT_DELAY_US, micro)},"s":"{symbol.name}","a":{first.agg_id},'
            f'"p":"{symbol.price(first.price)}","q":"{symbol.qty(lots)}","f":{first.id},"l":{trades[-1].id},'
            f'"T":{_time(first.t, micro)},"m":{_maker(first)},"M":true}}'
        )

    def depth_words(self, symbol: _Symbol, t: int, ids: tuple[int, int, int], sides: str, micro: bool) -> str:
        return f'{{"e":"depthUpdate","E":{_time(t, micro)},"s":"{symbol.name}","U":{ids[0]},"u":{ids[1]},{sides}}}'

    def event_us(self, symbol: _Symbol, t: int) -> int:
        return t


class BinanceFutures(Binance):
    """USD-M futures: ids count the changes of all symbols, streams come on two paths, and there is more to say.

    A connection on the wrong path, or on none, is told that it is subscribed, and nothing ever comes. The venue gives no
    notice of a shutdown that is documented; the fault speaks as spot does.
    """

    name: ClassVar[str] = "binance_futures"
    tickers: ClassVar[tuple[str, ...]] = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "DOGEUSDT")
    api: ClassVar[str] = "/fapi/v1"
    speeds: ClassVar[dict[str, int]] = {"@100ms": 100_000, "": 250_000, "@500ms": 500_000}
    kind: ClassVar[str] = "perpetual"
    halted_status: ClassVar[str] = "SETTLING"
    rest_trade_words: ClassVar[dict[str, object]] = {"isRPITrade": False}
    depth_weights: ClassVar[tuple[tuple[int, int], ...]] = (
        (5, 2), (10, 2), (20, 2), (50, 2), (100, 5), (500, 10), (1000, 20),
    )  # fmt: skip
    depth_default: ClassVar[int] = 500
    known: ClassVar[dict[str, tuple[int, int, int, int]]] = {
        "BTCUSDT": (6_400_000_000_000, 10_000_000, 100_000, 90),
        "ETHUSDT": (270_000_000_000, 1_000_000, 100_000, 2_000),
        "SOLUSDT": (16_500_000_000, 1_000_000, 1_000_000, 9_000),
        "DOGEUSDT": (12_345_000, 1_000, 100_000_000, 900),
    }
    dialect: ClassVar[Dialect] = Dialect(
        1000,
        "depth@100ms",
        {
            "last": "c", "open_24h": "o", "high_24h": "h", "low_24h": "l", "volume_24h": "v", "quote_volume_24h": "q",
            "bid_price": "none", "ask_price": "none", "mark_price": "mark.p", "index_price": "mark.i",
            "funding_rate": "mark.r", "next_funding_time": "mark.next_us", "open_interest": "openInterest",
        },
        bbo_has_id=True,
        bbo_has_time=True,
        candle_has_time=True,
        candle_counts_trades=True,
        intervals={},
    )  # fmt: skip
    limits: ClassVar[dict[str, float]] = {
        **BinanceSpot.limits,
        "ping_every_s": 180,
        "pong_within_s": 600,
        "streams_max": 200,
        "messages_per_s": 10,
        "weight_max": 2400,
        "off_book_every": 0,
    }
    intervals: ClassVar[dict[str, int]] = {name: us for name, us in BinanceSpot.intervals.items() if name != "1s"}
    notes: ClassVar[str] = (
        "/public/stream, /market/stream?streams=..., /public/ws/<stream>; public: trade, depth[@100ms|@500ms], depth5|10|20,"
        " bookTicker; market: aggTrade, markPrice@1s, ticker, miniTicker, kline_<i>, forceOrder. Without a route as /public;"
        " a stream of the other path is acknowledged and never comes. /fapi/v1/ping time exchangeInfo depth trades"
        " historicalTrades (with --credential KEY:-) aggTrades klines premiumIndex openInterest ticker/24hr"
        " ticker/bookTicker. off_book_every=N: after each Nth trade one of the insurance fund, which has a trade id. Ledger"
        " streams: depth@100ms, depth, depth@500ms."
    )

    @staticmethod
    def book_id(book: Book) -> int:
        return book.engine_id

    @staticmethod
    def ids(action: Action) -> tuple[int, int]:
        return action.engine_id - len(action.changes) + 1, action.engine_id

    def event_us(self, symbol: _Symbol, t: int) -> int:
        return symbol.changed_us

    def best_words(self, symbol: _Symbol, t: int, u: int, sides: str) -> str:
        times = f'"T":{t // 1000},"E":{(t + FUTURES_DELAY_US) // 1000}'
        name = symbol.name
        return f'{{"e":"bookTicker","u":{u},"s":"{name}","ps":"{name}",{sides},{times},"st":1}}'

    def trade_words(self, symbol: _Symbol, trade: Trade, micro: bool) -> str:
        price, qty = symbol.price(trade.price), symbol.qty(trade.lots)
        return self._trade_of(symbol, trade.t, trade.id, price, qty, "MARKET", _maker(trade))

    @staticmethod
    def _trade_of(symbol: _Symbol, t: int, number: int, price: str, qty: str, kind: str, maker: str) -> str:
        return (
            f'{{"e":"trade","E":{(t + FUTURES_DELAY_US) // 1000},"T":{t // 1000},"s":"{symbol.name}","t":{number},'
            f'"p":"{price}","q":"{qty}","X":"{kind}","m":{maker}}}'
        )

    def agg_words(self, symbol: _Symbol, trades: list[Trade], micro: bool) -> str:
        first, lots = trades[0], symbol.qty(sum(trade.lots for trade in trades))
        return (
            f'{{"e":"aggTrade","E":{(first.t + FUTURES_DELAY_US) // 1000},"a":{first.agg_id},"s":"{symbol.name}",'
            f'"p":"{symbol.price(first.price)}","q":"{lots}","nq":"{lots}","f":{first.id},"l":{trades[-1].id},'
            f'"T":{first.t // 1000},"m":{_maker(first)},"st":1}}'
        )

    def depth_words(self, symbol: _Symbol, t: int, ids: tuple[int, int, int], sides: str, micro: bool) -> str:
        name, (first, last, previous) = symbol.name, ids
        return (
            f'{{"e":"depthUpdate","E":{(t + FUTURES_DELAY_US) // 1000},"T":{symbol.changed_us // 1000},"s":"{name}",'
            f'"ps":"{name}","U":{first},"u":{last},"pu":{previous},{sides},"st":1}}'
        )

    def on_action(self, book: Book, action: Action) -> None:
        super().on_action(book, action)
        symbol = self.symbols[book.instrument.ticker]
        for trade in action.trades:
            second = action.t // 1_000_000
            if trade.id % LIQUIDATION_EVERY == 0 and second > symbol.liquidated_s:  # at most one a second is told
                symbol.liquidated_s = second
                self._liquidation(symbol, trade)
        every = int(self.limit["off_book_every"])
        if every and action.trades and action.trades[-1].agg_id % every == 0:
            self._off_book(symbol, book, action.t)

    def _liquidation(self, symbol: _Symbol, trade: Trade) -> None:
        """The order that closes a position; its price is where the holder is bankrupt, not what the trade had."""
        t, side = trade.t, "BUY" if trade.side > 0 else "SELL"
        price, average = symbol.price(trade.price + 9 * trade.side), symbol.price(trade.price)
        qty = symbol.qty(trade.lots)
        self.exchange.ledger.record("liquidation", ticker=symbol.name, price=price, qty=qty, side=side, t=t)
        order = {
            "s": symbol.name, "S": side, "o": "LIMIT", "f": "IOC", "q": qty, "p": price, "ap": average, "X": "FILLED",
            "l": qty, "z": qty, "T": t // 1000, "ps": symbol.name, "st": 1,
        }  # fmt: skip
        body = _json({"e": "forceOrder", "E": (t + FUTURES_DELAY_US) // 1000, "o": order})
        self._publish(symbol.forced, symbol.name, lambda _micro: body)

    def _off_book(self, symbol: _Symbol, book: Book, t: int) -> None:
        """The insurance fund takes a position over at a price that no order had; it uses a trade id."""
        book.trade_id += 1
        number, kind = book.trade_id, OFF_BOOK[book.trade_id % len(OFF_BOOK)]
        self.exchange.ledger.record("off_book", ticker=symbol.name, seq=number, type=kind, t=t)
        price = symbol.price(2 * book.best(BID)[0])
        body = self._trade_of(symbol, t, number, price, symbol.qty(1), kind, "true")
        self._publish(symbol.trade, symbol.name, lambda _micro: body, number, number)

    def more(self, symbol: _Symbol, t: int) -> None:
        """Mark and index price, once a second."""
        mark = self._marks(symbol, t)
        told = {"p": mark["p"], "i": mark["i"], "r": mark["r"], "next_us": mark["T"] * 1000}
        self.exchange.ledger.record("ticker", ticker=symbol.name, t=t, data={"mark": told})
        body = _json({"e": "markPriceUpdate", "E": t // 1000, "s": symbol.name, **mark, "ap": mark["p"], "st": 1})
        self._publish(symbol.mark, symbol.name, lambda _micro: body)

    @staticmethod
    def _marks(symbol: _Symbol, t: int) -> dict[str, Any]:
        middle, tick = symbol.book.mid2(), symbol.book.instrument.tick
        rate = middle % 2000 - 1000  # of the middle price, so that it moves and is not always positive
        return {
            "p": plain(middle * tick // 2, 8),
            "i": plain((middle + 3) * tick // 2, 8),
            "P": symbol.price(middle // 2),
            "r": f"{'-' if rate < 0 else ''}0.{abs(rate):08d}",
            "T": (t // FUNDING_US + 1) * FUNDING_US // 1000,
        }

    def _stats(self, symbol: _Symbol, t: int) -> dict[str, Any]:
        stats = super()._stats(symbol, t)
        return {key: value for key, value in stats.items() if key not in ("x", "b", "B", "a", "A")}

    # Paths

    def _below_route(self, request: Request) -> str:
        return request.path.removeprefix("/public").removeprefix("/market")

    def carries(self, session: Session, stream: str) -> bool:
        kind = stream.partition("@")[2]
        is_public = kind.startswith(("depth", "bookTicker", "trade"))
        return is_public != session.request.path.startswith("/market")

    @staticmethod
    def wants_micro(request: Request) -> bool:
        return False

    # REST

    def handlers(self) -> dict[str, Handler]:
        return {
            **super().handlers(),
            "exchangeInfo": (lambda _: 1, self._exchange_info),
            "trades": (lambda _: 5, self._trades),
            "historicalTrades": (lambda _: 20, self._with_key),
            "aggTrades": (lambda _: 20, self._agg_trades),
            "ticker/24hr": (lambda r: 1 if "symbol" in r.query else 40, self._ticker_day),
            "ticker/bookTicker": (lambda r: 2 if "symbol" in r.query else 5, self._ticker_book),
            "premiumIndex": (lambda r: 1 if "symbol" in r.query else 10, self._premium),
            "openInterest": (lambda _: 1, self._open_interest),
        }

    def depth_limit(self, request: Request) -> int:
        limit = _whole(request, "limit", self.depth_default, 2**31)
        if limit not in dict(self.depth_weights):
            raise _Bad(-4021, f"{limit} is not valid depth limit (5, 10, 20, 50, 100, 500, 1000).")
        return limit

    def snapshot_words(self, symbol: _Symbol, update_id: int, engine_id: int, sides: str) -> str:
        times = f'"E":{self.exchange.clock_us() // 1000},"T":{symbol.changed_us // 1000}'
        return f'{{"lastUpdateId":{engine_id},{times},{sides}}}'

    def _with_key(self, request: Request) -> object:
        if request.headers.get("X-MBX-APIKEY", "") not in self.credentials:
            raise _Bad(-2015, "Invalid API-key, IP, or permissions for action.", 401)
        return self._trades(request)

    def _premium(self, request: Request) -> object:
        symbol, t = self._symbol(request), self.exchange.clock_us()
        mark = self._marks(symbol, t)
        return {
            "symbol": symbol.name, "markPrice": mark["p"], "indexPrice": mark["i"], "estimatedSettlePrice": mark["P"],
            "lastFundingRate": mark["r"], "interestRate": "0.00010000", "nextFundingTime": mark["T"], "time": t // 1000,
        }  # fmt: skip

    def _open_interest(self, request: Request) -> object:
        symbol, t = self._symbol(request), self.exchange.clock_us()
        day, size = self.exchange.market.day[symbol.name], symbol.book.instrument.size
        said = symbol.qty(OPEN_INTEREST_SIZES * size + day.buy_lots)
        # Told to one client only, as the greeting of other venues.
        self.exchange.ledger.record("first_ticker", ticker=symbol.name, t=t, data={"openInterest": said})
        return {"openInterest": said, "symbol": symbol.name, "time": t // 1000}

    def symbol_info(self, name: str) -> dict[str, object]:
        info = super().symbol_info(name)
        names = ("symbol", "status", "baseAsset", "quoteAsset", "filters")
        return {
            **{key: info[key] for key in names}, "pair": name, "contractType": "PERPETUAL",
            "marginAsset": info["quoteAsset"], "onboardDate": 1_569_398_400_000, "deliveryDate": 4_133_404_800_000,
            "underlyingType": "COIN",
        }  # fmt: skip


class _Bad(Exception):
    """A request that the venue refuses with its code and text."""

    def __init__(self, code: int, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.code, self.text, self.status = code, text, status


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _error(status: int, code: int, text: str, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(_json({"code": code, "msg": text}), status, headers or {})


def _maker(trade: Trade) -> str:
    """Whether the buyer was the maker, as JSON."""
    return "true" if trade.side < 0 else "false"


def _time(t: int, micro: bool) -> int:
    return t if micro else t // 1000


def _micro(request: Request) -> bool:
    return request.headers.get("X-MBX-TIME-UNIT", "").upper() == "MICROSECOND"


def _close_time(candle: Candle, micro: bool) -> int:
    return candle.end - 1 if micro else candle.end // 1000 - 1


def _whole(request: Request, name: str, default: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isdigit():
        raise _Bad(-1100, f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'.")
    if not int(text) and name == "limit":
        raise _Bad(-1130, "Data sent for parameter 'limit' is not valid.")
    return min(int(text), most)


def _between(request: Request) -> tuple[float, float]:
    """startTime and endTime in microseconds; a request may give either unit."""
    bounds: list[float] = []
    for name, default in (("startTime", -math.inf), ("endTime", math.inf)):
        value = _whole(request, name, -1, 2**63)
        bounds.append(default if value < 0 else value if value > 10**14 else value * 1000)
    return bounds[0], bounds[1]


def _agg_words(symbol: _Symbol, trades: list[Trade], micro: bool) -> dict[str, object]:
    first = trades[0]
    ids = {"f": first.id, "l": trades[-1].id, "T": _time(first.t, micro), "m": first.side < 0, "M": True}
    return {"a": first.agg_id, "p": symbol.price(first.price), "q": symbol.qty(sum(x.lots for x in trades)), **ids}


def _candle_words(symbol: _Symbol, candle: Candle) -> dict[str, Any]:
    return {
        "f": candle.first_id,
        "L": candle.last_id,
        "o": symbol.price(candle.open),
        "c": symbol.price(candle.close),
        "h": symbol.price(candle.high),
        "l": symbol.price(candle.low),
        "v": symbol.qty(candle.lots),
        "n": candle.trades,
        "q": symbol.value(candle.value),
        "V": symbol.qty(candle.buy_lots),
        "Q": symbol.value(candle.buy_value),
    }
