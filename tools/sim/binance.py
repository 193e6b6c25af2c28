"""Binance Spot as a simulated exchange: its streams, control messages, REST endpoints, weights and limits.

Written from https://github.com/binance/binance-spot-api-docs (web-socket-streams.md, rest-api.md and errors.md of
2026-07) and from recorded frames; deliberately not from our own decoder, so that each can prove the other wrong.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, ClassVar

from tools.sim.ledger import Dialect
from tools.sim.market import ASK, BID, Action, Book, Candle, Instrument, Trade, plain
from tools.sim.server import Exchange, Level, Reply, Request, Session, Venue, Window

MINUTE_US = 60_000_000
EVENT_DELAY_US = 50  # a trade is told this much after it happened: E is never before T
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
DEPTH_WEIGHTS = ((100, 5), (500, 25), (1000, 50), (5000, 250))
SYMBOL_LEGAL = re.compile(r"^[\w-]{1,20}$")
CONTROL = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")
MISSING = "Mandatory parameter '{}' was not sent, was empty/null, or malformed."

Form = tuple[bool, bool]  # times in microseconds; wrapped as a combined stream


class _Connection:
    """What the venue knows about one WebSocket."""

    def __init__(self, micro: bool, combined: bool, messages_per_s: float) -> None:
        self.micro, self.combined = micro, combined
        self.messages = Window(messages_per_s, 1.0)
        self.next_ping_s = 0.0


class _Symbol:
    """One symbol: its stream names and the levels that wait for the next depth event of each speed."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.name = book.instrument.ticker
        lower = self.name.lower()
        self.trade, self.agg, self.best = f"{lower}@trade", f"{lower}@aggTrade", f"{lower}@bookTicker"
        self.day, self.mini, self.kline = f"{lower}@ticker", f"{lower}@miniTicker", f"{lower}@kline_"
        self.partial = {
            speed: [(levels, f"{lower}@depth{levels}{speed}") for levels in (5, 10, 20)] for speed in ("@100ms", "")
        }
        self.depth = {"@100ms": f"{lower}@depth@100ms", "": f"{lower}@depth"}
        self.waiting: dict[str, dict[tuple[int, int], None]] = {"@100ms": {}, "": {}}
        self.sent = {"@100ms": book.update_id, "": book.update_id}  # last update id published at each speed
        self.traded = False  # since the last statistics message
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


class BinanceSpot(Venue):
    name: ClassVar[str] = "binance_spot"
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

    def __init__(self, exchange: Exchange, limits: Mapping[str, float], credentials: Mapping[str, str]) -> None:
        super().__init__(exchange, limits, credentials)
        self.symbols = {ticker: _Symbol(book) for ticker, book in exchange.market.books.items()}
        self.connects: dict[str, Window] = {}
        self.used: dict[str, tuple[int, float]] = {}  # ip -> number of the window, weight used in it
        self.early: Counter[str] = Counter()  # ip -> requests before Retry-After had passed
        self.bans: Counter[str] = Counter()
        self.banned_until_s: dict[str, float] = {}
        self.seconds = 0

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        quote = next((q for q in QUOTES if ticker.endswith(q) and ticker != q), "USDT")
        price, tick, lot, size = KNOWN.get(ticker, (1_234_560_000, 10_000, 1_000_000, 5_000))
        return Instrument(ticker, ticker.removesuffix(quote), quote, tick, 8, lot, 8, price // tick, size, busy)

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}USDT"

    def first_book(self, book: Book) -> dict[str, object]:
        symbol = self.symbols[book.instrument.ticker]
        bids, asks = ([[symbol.price(p), symbol.qty(q)] for p, q in book.levels(side)] for side in (BID, ASK))
        return {"last": book.update_id, "bids": bids, "asks": asks}

    def listed(self, book: Book, t: int) -> None:
        self.symbols[book.instrument.ticker] = _Symbol(book)

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
        for waiting in symbol.waiting.values():
            for side, price, _, _ in action.changes:
                waiting[side, price] = None
        if action.best_changed:
            (bid, bid_lots), (ask, ask_lots) = book.best(BID), book.best(ASK)
            u, b, bq, a, aq = (
                action.last_id,
                symbol.price(bid),
                symbol.qty(bid_lots),
                symbol.price(ask),
                symbol.qty(ask_lots),
            )
            ledger.line(
                "bbo",
                symbol.name,
                f'{{"kind":"bbo","ticker":"{symbol.name}","id":{u},"bid":"{b}","bid_qty":"{bq}","ask":"{a}","ask_qty":"{aq}","t":{t}}}',
            )
            self._publish(
                symbol.best,
                symbol.name,
                lambda _micro: f'{{"u":{u},"s":"{symbol.name}","b":"{b}","B":"{bq}","a":"{a}","A":"{aq}"}}',
                u,
                u,
            )

    def _on_trades(self, symbol: _Symbol, action: Action) -> None:
        t, ledger, name = action.t, self.exchange.ledger, symbol.name
        symbol.traded = True
        for trade in action.trades:
            p, q = symbol.price(trade.price), symbol.qty(trade.lots)
            side, maker = ("BUY", "false") if trade.side > 0 else ("SELL", "true")
            ledger.line(
                "trade",
                name,
                f'{{"kind":"trade","ticker":"{name}","id":"{trade.id}","seq":{trade.id},"price":"{p}","qty":"{q}","side":"{side}","t":{t}}}',
            )
            self._publish(
                symbol.trade,
                name,
                lambda micro, i=trade.id, p=p, q=q, m=maker: (  # type: ignore[misc]
                    f'{{"e":"trade","E":{_time(t + EVENT_DELAY_US, micro)},"s":"{name}","t":{i},"p":"{p}","q":"{q}",'
                    f'"T":{_time(t, micro)},"m":{m},"M":true}}'
                ),
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
            side, maker = ("BUY", "false") if trades[0].side > 0 else ("SELL", "true")
            ledger.line(
                "aggtrade",
                name,
                f'{{"kind":"aggtrade","ticker":"{name}","id":"{agg_id}","first":{first},"last":{last},"price":"{p}","qty":"{q}","side":"{side}","t":{t}}}',
            )
            self._publish(
                symbol.agg,
                name,
                lambda micro, i=agg_id, p=p, q=q, f=first, z=last, m=maker: (  # type: ignore[misc]
                    f'{{"e":"aggTrade","E":{_time(t + EVENT_DELAY_US, micro)},"s":"{name}","a":{i},"p":"{p}","q":"{q}","f":{f},"l":{z},'
                    f'"T":{_time(t, micro)},"m":{m},"M":true}}'
                ),
                agg_id,
                agg_id,
            )

    def timers(self) -> list[tuple[int, Callable[[int], None]]]:
        return [
            (100_000, lambda t: self._depth("@100ms", t)),
            (1_000_000, lambda t: self._depth("", t)),
            (1_000_000, self._second),
        ]

    def finish(self, t: int) -> None:
        self._depth("@100ms", t)
        self._depth("", t)

    def _depth(self, speed: str, t: int) -> None:
        """One depth event of a speed for every symbol that has changed."""
        for symbol in self.symbols.values():
            waiting = symbol.waiting[speed]
            if not waiting:
                continue
            book, previous = symbol.book, symbol.sent[speed]
            changed = [(side, price, book.level(side, price)) for side, price in waiting]
            waiting.clear()
            symbol.sent[speed] = book.update_id
            self._depth_event(symbol, speed, t, previous, book.update_id, changed)

    def _depth_event(
        self, symbol: _Symbol, speed: str, t: int, previous: int, last: int, changed: list[tuple[int, int, int]]
    ) -> None:
        name, first = symbol.name, previous + 1
        bids = symbol.levels(sorted(((p, q) for side, p, q in changed if side == BID), reverse=True))
        asks = symbol.levels(sorted((p, q) for side, p, q in changed if side == ASK))
        self.exchange.ledger.line(
            "book",
            name,
            f'{{"kind":"book","ticker":"{name}","stream":"depth{speed}","first":{first},"last":{last},"prev":{previous},'
            f'"bids":{bids},"asks":{asks},"t":{t}}}',
        )
        self._publish(
            symbol.depth[speed],
            name,
            lambda micro: (
                f'{{"e":"depthUpdate","E":{_time(t, micro)},"s":"{name}","U":{first},"u":{last},"b":{bids},"a":{asks}}}'
            ),
            first,
            last,
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
        if minis:
            self._publish("!miniTicker@arr", "", lambda micro: "[" + ",".join(make(micro) for make in minis) + "]")

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
        if request.path not in ("/stream", "/ws") and not request.path.startswith(("/ws/", "/stream/")):
            return Reply("", 404)
        if len(self._asked(request)) > self.limit["streams_max"]:
            exchange.violation("streams")
            return _error(400, 2, "Invalid request: too many streams")
        return None

    @staticmethod
    def _asked(request: Request) -> list[str]:
        names = request.query.get("streams", "") if request.path.startswith("/stream") else request.path[len("/ws/") :]
        return list(dict.fromkeys(name for name in names.split("/") if name))

    def opened(self, session: Session) -> None:
        request = session.request
        micro = request.query.get("timeUnit", "") in ("MICROSECOND", "microsecond")
        own = _Connection(micro, request.path.startswith("/stream"), self.limit["messages_per_s"])
        own.next_ping_s = self.exchange.now_s + self.limit["ping_every_s"]
        session.own = own
        for stream in self._asked(request):
            if not self.exchange.refused(session, stream, stream.split("@")[0].upper()):
                self.exchange.subscribe(session, stream, (own.micro, own.combined))

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
        if len(set(session.subs) | set(names)) > self.limit["streams_max"]:
            self.exchange.violation("streams", session)
            self._refuse(session, number, 2, "Invalid request: too many streams")
            return
        if any(self.exchange.refused(session, name, name.split("@")[0].upper()) for name in names):
            self._refuse(session, number, 2, "Invalid request: invalid stream")
            return
        own: _Connection = session.own
        self._reply(session, number, None)
        for name in names:
            self.exchange.subscribe(session, name, (own.micro, own.combined))

    def _on_unsubscribe(self, session: Session, number: object, params: object) -> None:
        names = self._streams(session, number, params)
        if names is None:
            return
        for name in names:
            self.exchange.unsubscribe(session, name)
        self._reply(session, number, None)

    def _on_list_subscriptions(self, session: Session, number: object, params: object) -> None:
        self._reply(session, number, list(session.subs))

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
        handlers: dict[str, tuple[Callable[[Request], float], Callable[[Request], Any]]] = {
            "ping": (lambda _: 1, lambda _: {}),
            "time": (lambda _: 1, lambda r: {"serverTime": _time(self.exchange.clock_us(), _micro(r))}),
            "exchangeInfo": (lambda _: 20, self._exchange_info),
            "depth": (_depth_weight, self._depth_snapshot),
            "trades": (lambda _: 25, self._trades),
            "historicalTrades": (lambda _: 25, self._trades),
            "aggTrades": (lambda _: 4, self._agg_trades),
            "klines": (lambda _: 2, self._klines),
            "ticker/24hr": (lambda r: 2 if "symbol" in r.query else 80, self._ticker_day),
            "ticker/bookTicker": (lambda r: 2 if "symbol" in r.query else 4, self._ticker_book),
        }
        name = request.path.removeprefix("/api/v3/")
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
            return _error(400, bad.code, bad.text, headers)
        return Reply(answer if isinstance(answer, str) else _json(answer), 200, headers)

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
            "symbols": [self._symbol_info(name) for name in names],
        }

    def _symbol_info(self, name: str) -> dict[str, object]:
        halted = self.exchange.halted.get(name)
        instrument = halted or self.symbols[name].book.instrument
        tick, lot = plain(instrument.tick // 10 ** self.exchange.finer[name], 8), plain(instrument.lot, 8)
        return {
            "symbol": instrument.ticker,
            "status": "BREAK" if halted else "TRADING",
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
        limit = _whole(request, "limit", 100, 5000)
        last, _, bids, asks = await self.exchange.snapshot(symbol.book, request.agent)
        return f'{{"lastUpdateId":{last},"bids":{symbol.levels(bids[:limit])},"asks":{symbol.levels(asks[:limit])}}}'

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
                "isBestMatch": True,
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


class _Bad(Exception):
    """A request that the venue refuses with its code and text."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _error(status: int, code: int, text: str, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(_json({"code": code, "msg": text}), status, headers or {})


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


def _depth_weight(request: Request) -> float:
    limit = request.query.get("limit", "100")
    number = int(limit) if limit.isdigit() else 100
    return next((weight for most, weight in DEPTH_WEIGHTS if number <= most), DEPTH_WEIGHTS[-1][1])


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
