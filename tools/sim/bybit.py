"""Bybit v5 as a simulated exchange: one category of it, its WebSocket topics and its REST endpoints.

Written from github.com/bybit-exchange/docs (`docs/v5`, 2026-07: connect, websocket/public, market, rate-limit) and from
recorded frames; deliberately not from our own decoder, so that each can prove the other wrong.
"""

import json
import math
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

from tools.sim.faults import shown
from tools.sim.ledger import Dialect
from tools.sim.market import ASK, BID, Action, Book, Candle, Instrument, Trade, plain
from tools.sim.server import Exchange, Level, Reply, Request, Session, Venue, Window

MINUTE_US = 60_000_000
MS_US = 1000
NOT_NOW = {10006: "Too many visits!", 10016: "Server error", 10429: "System level frequency protection"}  # retCode
REPEAT_US = 3_000_000  # best prices that do not change are told again after so long
FORCED_EVERY = 5  # one taker order in so many is called a liquidation
FUNDING_US = 8 * 3600 * 1_000_000
MINUTES = {
    "1": 1, "3": 3, "5": 5, "15": 15, "30": 30, "60": 60, "120": 120, "240": 240, "360": 360, "720": 720, "D": 1440,
    "W": 10_080,
}  # fmt: skip
# Of a coin in USD: tick in 10**-price_scale, price_scale, lot in 10**-qty_scale, qty_scale, first price in ticks, size in lots.
KNOWN: dict[str, tuple[int, int, int, int, int, int]] = {
    "BTC": (10, 2, 1, 3, 850_000, 400),
    "ETH": (1, 2, 1, 2, 280_000, 900),
    "SOL": (10, 3, 1, 1, 15_000, 700),
}
BASE_WORDS = {
    "last": "lastPrice", "open_24h": "prevPrice24h", "high_24h": "highPrice24h", "low_24h": "lowPrice24h",
    "volume_24h": "volume24h", "quote_volume_24h": "turnover24h",
}  # fmt: skip
MARKS = {"mark_price": "markPrice", "index_price": "indexPrice", "open_interest": "openInterest"}
BEST = {"bid_price": "bid1Price", "ask_price": "ask1Price"}


def _dialect(words: Mapping[str, str], depth: int) -> Dialect:
    return Dialect(
        1000,
        f"orderbook.{depth}",
        words,
        bbo_has_id=True,
        bbo_has_time=True,
        candle_has_time=True,
        candle_counts_trades=False,
        intervals={"1m": "1", "3m": "3", "5m": "5", "1h": "60", "1d": "D"},
        candle_says_closed=True,
        trades_have_counter=False,
    )


class _Connection:
    """What the venue knows about one WebSocket."""

    def __init__(self, now_s: float) -> None:
        self.heard_s = now_s
        self.late: deque[tuple[float, str]] = deque()  # replies that are held back, and until when


class _Depth:
    """The best levels as they were last pushed on a topic, and the number of that push."""

    def __init__(self, book: Book, u: int) -> None:
        self.sides: tuple[dict[int, int], dict[int, int]] = (dict(book.levels(BID)), dict(book.levels(ASK)))
        self.u = u


class _Name:
    """One instrument: its texts, and what waits for the timers."""

    def __init__(self, book: Book, depths: tuple[int, ...]) -> None:
        self.book, self.instrument, self.name = book, book.instrument, book.instrument.ticker
        self.first_u = book.update_id % 10_000_000 + 100
        self.depths = {depth: _Depth(book, self.first_u) for depth in depths}
        self.dirty: set[int] = set()  # depths with changes that are not pushed
        self.changed_us = 0  # when the matching engine last changed the book
        self.best_u = self.first_u
        self.best: tuple[tuple[int, int], tuple[int, int]] | None = None
        self.best_seq = self.best_us = self.pushed_us = 0
        self.last_price = 0
        self.direction = "ZeroPlusTick"
        self.ticker: dict[str, str] = {}
        self.ticker_cs = 0
        self.ticker_dirty = self.kline_dirty = True
        self.forced: list[str] = []

    def price(self, ticks: int) -> str:
        return plain(ticks * self.instrument.tick, self.instrument.price_scale)

    def qty(self, lots: int) -> str:
        return plain(lots * self.instrument.lot, self.instrument.qty_scale)

    def pairs(self, levels: list[Level]) -> str:
        return "[" + ",".join(f'["{self.price(price)}","{self.qty(lots)}"]' for price, lots in levels) + "]"


class _Category(Venue):
    """What all categories have in common."""

    shown_faults: ClassVar[tuple[str, ...]] = shown("orderbook.50")
    category: ClassVar[str]
    depths: ClassVar[tuple[int, ...]] = (50, 200, 1000)
    depth_periods_ms: ClassVar[dict[int, int]] = {25: 20, 50: 20, 100: 100, 200: 100, 1000: 200}
    default_depth: ClassVar[int] = 200
    args_max: ClassVar[float] = math.inf  # in one request
    subs_max: ClassVar[float] = math.inf  # on one connection
    recent_max: ClassVar[int] = 1000
    ticker_ms: ClassVar[int] = 100
    has_best: ClassVar[bool] = True
    has_candles: ClassVar[bool] = True
    merges_tickers: ClassVar[bool] = True
    has_liquidations: ClassVar[bool] = True
    halted_status: ClassVar[str] = "Delivering"
    inverse: ClassVar[bool] = False
    intervals: ClassVar[dict[str, int]] = {name: minutes * MINUTE_US for name, minutes in MINUTES.items()}
    limits: ClassVar[dict[str, float]] = {
        "args_chars_max": 21_000,
        "ping_within_s": 600,
        "reply_ms": 0,
        "connects_max": 500,
        "connects_window_s": 300,
        "requests_max": 600,
        "requests_window_s": 5,
        "ban_s": 600,
        "visits_max": math.inf,
        "visits_window_s": 1,
        "page_max": 1000,
    }

    def __init__(self, exchange: Exchange, limits: Mapping[str, float], credentials: Mapping[str, str]) -> None:
        super().__init__(exchange, limits, credentials)
        self.names = {ticker: _Name(book, self.depths) for ticker, book in exchange.market.books.items()}
        self.left: dict[str, _Name] = {}  # as they were when they were delisted
        self.pushed = {self.default_depth}  # depths that somebody has ever wanted
        self.connects: dict[str, Window] = {}
        self.requests: dict[str, Window] = {}
        self.visits: dict[str, Window] = {}
        self.banned_until_s: dict[str, float] = {}
        self.messages = 0

    @staticmethod
    def _coin(ticker: str) -> str:
        return next((coin for coin in KNOWN if ticker.startswith(coin)), "")

    def first_book(self, book: Book) -> dict[str, object]:
        name = self.names[book.instrument.ticker]
        bids, asks = ([[name.price(p), name.qty(q)] for p, q in book.levels(side)] for side in (BID, ASK))
        return {"last": name.depths[self.default_depth].u, "bids": bids, "asks": asks}

    def listed(self, book: Book, t: int) -> None:
        ticker = book.instrument.ticker
        self.names[ticker] = self.left.pop(ticker) if ticker in self.left else _Name(book, self.depths)

    def delisted(self, book: Book, t: int) -> None:
        self.finish(t)
        self.left[book.instrument.ticker] = self.names.pop(book.instrument.ticker)

    # The market put into words.

    def _head(self, topic: str, kind: str, ts_ms: int) -> str:
        """How a message begins; the order of the names differs between the categories."""
        if self.category == "spot":
            return f'{{"topic":"{topic}","ts":{ts_ms},"type":"{kind}"'
        if self.category == "option":
            self.messages += 1
            return f'{{"id":"{topic}-{self.messages}-{ts_ms}","topic":"{topic}","ts":{ts_ms},"type":"{kind}"'
        return f'{{"topic":"{topic}","type":"{kind}","ts":{ts_ms}'

    def _publish(self, topic: str, name: _Name, kind: str, t: int, rest: str, first: int = 0, last: int = 0) -> None:
        """`form` is what a connection's gateway stamps later than another one's, in ms."""
        self.exchange.publish(
            topic, name.name, lambda form: f"{self._head(topic, kind, t // MS_US + form)},{rest}}}", first, last
        )

    def on_action(self, book: Book, action: Action) -> None:
        name = self.names[book.instrument.ticker]
        name.changed_us = action.t
        name.dirty.update(self.depths)
        name.ticker_dirty = True
        if action.trades:
            self._on_trades(name, action)

    def _trade_id(self, trade: Trade) -> str:
        if self.category == "spot":
            return f"229{trade.engine_id:016d}"
        return str(uuid.UUID(int=trade.engine_id * 0x9E3779B97F4A7C15F39CC0605CEDC835 & (1 << 128) - 1))

    def _on_trades(self, name: _Name, action: Action) -> None:
        ledger, ticker, texts = self.exchange.ledger, name.name, []
        for trade in action.trades:
            price, qty, trade_id = name.price(trade.price), name.qty(trade.lots), self._trade_id(trade)
            side = "BUY" if trade.side > 0 else "SELL"
            ledger.line(
                "trade",
                ticker,
                f'{{"kind":"trade","ticker":"{ticker}","id":"{trade_id}","seq":{trade.id},"price":"{price}",'
                f'"qty":"{qty}","side":"{side}","t":{action.t}}}',
            )
            texts.append(self._trade_text(name, trade, action.engine_id))
        name.kline_dirty = True
        first, last = action.trades[0].id, action.trades[-1].id
        self._publish(self._trade_topic(name), name, "snapshot", action.t, f'"data":[{",".join(texts)}]', first, last)
        if self.has_liquidations and first % FORCED_EVERY == 0:
            self._on_forced(name, action.trades[0])

    def _trade_topic(self, name: _Name) -> str:
        return f"publicTrade.{name.name}"

    def _trade_text(self, name: _Name, trade: Trade, seq: int) -> str:
        rose = (trade.price > name.last_price) - (trade.price < name.last_price)
        name.direction = {1: "PlusTick", -1: "MinusTick"}.get(rose, f"Zero{name.direction.removeprefix('Zero')}")
        name.last_price = trade.price
        tick = f'"L":"{name.direction}",' if self.category in ("linear", "inverse") else ""
        marks = '"mP":"1","iP":"2","mIv":"0.5","iv":"0.5",' if self.category == "option" else ""
        return (
            f'{{"T":{trade.t // MS_US},"s":"{name.name}","S":"{"Buy" if trade.side > 0 else "Sell"}",'
            f'"v":"{name.qty(trade.lots)}","p":"{name.price(trade.price)}",{tick}{marks}"i":"{self._trade_id(trade)}",'
            f'"BT":false,"RPI":false,"seq":{seq}}}'
        )

    def _on_forced(self, name: _Name, trade: Trade) -> None:
        """The taker's order closed a position of the other side: one who is long is sold out."""
        order, position = ("BUY", "Sell") if trade.side > 0 else ("SELL", "Buy")
        price, qty = name.price(trade.price), name.qty(trade.lots)
        self.exchange.ledger.line(
            "liquidation",
            name.name,
            f'{{"kind":"liquidation","ticker":"{name.name}","side":"{order}","price":"{price}","qty":"{qty}","t":{trade.t}}}',
        )
        name.forced.append(f'{{"T":{trade.t // MS_US},"s":"{name.name}","S":"{position}","v":"{qty}","p":"{price}"}}')

    def timers(self) -> list[tuple[int, Callable[[int], None]]]:
        pushes = [
            (ms * MS_US, lambda t, d=depth: self._depth(d, t))
            for depth, ms in self.depth_periods_ms.items()
            if depth in self.depths
        ]
        others = [(self.ticker_ms * MS_US, self._tickers), (500 * MS_US, self._liquidations), (1_000_000, self._klines)]
        return [(10 * MS_US, self._bests), *pushes, *others]

    def finish(self, t: int) -> None:
        self._bests(t)
        for depth in self.depths:
            self._depth(depth, t)
        self._tickers(t)
        self._liquidations(t)

    def _depth(self, depth: int, t: int) -> None:
        if depth not in self.pushed:
            return
        for name in self.names.values():
            if depth in name.dirty:
                name.dirty.discard(depth)
                self._push_depth(name, depth, t)

    def _push_depth(self, name: _Name, depth: int, t: int) -> None:
        """What is different in the best levels since the last push, those that came into sight or left it included."""
        window, changed = name.depths[depth], []
        for side in (BID, ASK):
            now, before = dict(name.book.levels(side)[:depth]), window.sides[side]
            changed.append(
                [(p, q) for p, q in now.items() if before.get(p) != q] + [(p, 0) for p in before if p not in now]
            )
        if not changed[BID] and not changed[ASK]:
            return
        for side in (BID, ASK):
            window.sides[side].clear()
            window.sides[side].update(name.book.levels(side)[:depth])
        window.u += 1
        u, bids, asks = window.u, name.pairs(changed[BID]), name.pairs(changed[ASK])
        self.exchange.ledger.line(
            "book",
            name.name,
            f'{{"kind":"book","ticker":"{name.name}","stream":"orderbook.{depth}","first":{u},"last":{u},"prev":{u - 1},'
            f'"bids":{bids},"asks":{asks},"t":{name.changed_us}}}',
        )
        self._publish(f"orderbook.{depth}.{name.name}", name, "delta", t, self._book_data(name, u, bids, asks), u, u)

    def _book_data(self, name: _Name, u: int, bids: str, asks: str) -> str:
        data = f'{{"s":"{name.name}","b":{bids},"a":{asks},"u":{u},"seq":{name.book.engine_id}}}'
        return f'"data":{data},"cts":{(name.changed_us or self.exchange.t) // MS_US}'

    def _snapshot(self, name: _Name, depth: int, form: int) -> str:
        """The levels as they were at the last push, so that the next delta follows."""
        window = name.depths[depth]
        bids = name.pairs(sorted(window.sides[BID].items(), reverse=True))
        asks = name.pairs(sorted(window.sides[ASK].items()))
        head = self._head(f"orderbook.{depth}.{name.name}", "snapshot", self.exchange.t // MS_US + form)
        return f"{head},{self._book_data(name, window.u, bids, asks)}}}"

    def resnapshot(self, book: Book, anew: bool) -> None:
        """Snapshots that nobody asked for, on every topic of the book; `anew`: their numbers begin at 1 again."""
        name = self.names[book.instrument.ticker]
        for depth in self.pushed:
            self._push_depth(name, depth, self.exchange.t)
            window = name.depths[depth]
            window.u = 1 if anew else window.u
            topic = f"orderbook.{depth}.{name.name}"
            self.exchange.publish(
                topic, name.name, lambda form, d=depth: self._snapshot(name, d, form), window.u, window.u  # type: ignore[misc]
            )  # fmt: skip

    def _bests(self, t: int) -> None:
        if not self.has_best:
            return
        for name in self.names.values():
            now = name.book.best(BID), name.book.best(ASK)
            if now != name.best:
                name.best, name.best_us, name.pushed_us = now, name.changed_us or t, t
                name.best_u, name.best_seq = name.best_u + 1, name.book.engine_id
                (bid, bid_lots), (ask, ask_lots) = now
                self.exchange.ledger.line(
                    "bbo",
                    name.name,
                    f'{{"kind":"bbo","ticker":"{name.name}","id":{name.best_u},"bid":"{name.price(bid)}",'
                    f'"bid_qty":"{name.qty(bid_lots)}","ask":"{name.price(ask)}","ask_qty":"{name.qty(ask_lots)}",'
                    f'"t":{name.best_us}}}',
                )
            elif t - name.pushed_us >= REPEAT_US:
                name.pushed_us = t
            else:
                continue
            topic = f"orderbook.1.{name.name}"
            self._publish(topic, name, "snapshot", t, self._best_data(name), name.best_u, name.best_u)

    def _best_data(self, name: _Name) -> str:
        assert name.best is not None
        bids, asks = (name.pairs([level]) for level in name.best)
        data = f'{{"s":"{name.name}","b":{bids},"a":{asks},"u":{name.best_u},"seq":{name.best_seq}}}'
        return f'"data":{data},"cts":{name.best_us // MS_US}'

    def _ticker_data(self, name: _Name, t: int) -> dict[str, str]:
        """All fields of a ticker; empty where there is nothing to say yet."""
        day, instrument = self.exchange.market.day[name.name], name.instrument
        volume, turnover = _volumes(name, day, self.inverse)
        data = {
            "symbol": name.name, "lastPrice": name.price(day.close) if day.trades else "",
            "highPrice24h": name.price(day.high), "lowPrice24h": name.price(day.low),
        }  # fmt: skip
        change = {"price24hPcnt": f"{day.close / day.open - 1:.6f}", "prevPrice24h": name.price(day.open)}
        sums = {"volume24h": volume, "turnover24h": turnover}
        if self.category == "spot":
            return data | change | sums | {"usdIndexPrice": name.price(day.close)}
        mark = plain(name.book.mid2() * instrument.tick * 5, instrument.price_scale + 1)
        marks = {"markPrice": mark, "indexPrice": name.price(name.book.mid2() // 2 - 3)}
        bests = [x for side in (BID, ASK) for p, q in [name.book.best(side)] for x in (name.price(p), name.qty(q))]
        interest = {"openInterest": plain(57_118_511 + day.lots, instrument.qty_scale)}
        if self.category == "option":
            keys = ("bidPrice", "bidSize", "askPrice", "askSize")
            greeks = {"delta": "0.51", "gamma": "0.00001", "vega": "12.3", "theta": "-5.6", "markPriceIv": "0.55"}
            sums |= {"totalVolume": "20", "totalTurnover": "421", "predictedDeliveryPrice": "0", "change24h": "0.1"}
            return data | dict(zip(keys, bests, strict=True)) | marks | interest | sums | greeks
        data |= {"tickDirection": name.direction} | change | {"prevPrice1h": name.price(day.open)} | marks | interest
        data |= {"openInterestValue": "4742247240.22", **sums}
        keys = ("bid1Price", "bid1Size", "ask1Price", "ask1Size")
        if instrument.facts["expiry"]:
            data |= {"nextFundingTime": "", "fundingRate": "", "basisRate": "0.0106", "deliveryFeeRate": "0.0005"}
        else:
            due = (t // FUNDING_US + 1) * FUNDING_US // MS_US
            rate = f"{(name.book.engine_id % 2001 - 1000) / 1e7:.8f}"
            data |= {
                "nextFundingTime": str(due),
                "fundingRate": rate,
                "fundingIntervalHour": "8",
                "fundingCap": "0.005",
            }
        return data | dict(zip(keys, bests, strict=True))

    def _tickers(self, t: int) -> None:
        for name in self.names.values():
            if name.ticker_dirty:
                name.ticker_dirty = False
                self._push_ticker(name, t)

    def _push_ticker(self, name: _Name, t: int) -> None:
        data = self._ticker_data(name, t)
        changed = {key: value for key, value in data.items() if name.ticker.get(key) != value}
        if not changed:
            return
        is_delta = self.merges_tickers and bool(name.ticker)
        name.ticker, name.ticker_cs = data, name.book.engine_id
        self._ticker_line("ticker", name, t)
        text = json.dumps({"symbol": name.name, **changed} if is_delta else data, separators=(",", ":"))
        kind = "delta" if is_delta else "snapshot"
        topic, rest = f"tickers.{name.name}", self._ticker_rest(name, text)
        self.exchange.publish(topic, name.name, lambda _form: f"{self._head(topic, kind, t // MS_US)},{rest}}}")

    @staticmethod
    def _ticker_rest(name: _Name, text: str) -> str:
        return f'"data":{text},"cs":{name.ticker_cs}'

    def _ticker_line(self, kind: str, name: _Name, t: int) -> None:
        given = {key: value for key, value in name.ticker.items() if value}
        self.exchange.ledger.record(kind, ticker=name.name, t=t, data=given)

    def _greet_ticker(self, session: Session, name: _Name) -> None:
        """A new subscriber is told everything, as it was at the last push."""
        t = self.exchange.t
        if not name.ticker:
            self._push_ticker(name, t)
            return
        self._ticker_line("first_ticker", name, t)
        text = json.dumps(name.ticker, separators=(",", ":"))
        head = self._head(f"tickers.{name.name}", "snapshot", t // MS_US)
        self.exchange.send(session, f"{head},{self._ticker_rest(name, text)}}}")

    def _liquidations(self, t: int) -> None:
        for name in self.names.values():
            if name.forced:
                texts, name.forced = name.forced, []
                self._publish(f"allLiquidation.{name.name}", name, "snapshot", t, f'"data":[{",".join(texts)}]')

    def _klines(self, t: int) -> None:
        if not self.has_candles:
            return
        for name in self.names.values():
            candles = self.exchange.market.candles[name.name]
            for interval, candle in candles.roll(t):
                self._candle(name, interval, candle, t, True)
            if name.kline_dirty:
                name.kline_dirty = False
                for interval, candle in candles.open.items():
                    if f"kline.{interval}.{name.name}" in self.exchange.streams:
                        self._candle(name, interval, candle, t, False)

    def _candle(self, name: _Name, interval: str, candle: Candle, t: int, closed: bool) -> None:
        """The ledger's volume is in base units, whatever the venue calls it."""
        volume, turnover = _volumes(name, candle, self.inverse)
        prices = {key: name.price(getattr(candle, key)) for key in ("open", "close", "high", "low")}
        self.exchange.ledger.record(
            "candle", ticker=name.name, interval=interval, open_time=candle.start, **prices,
            volume=turnover if self.inverse else volume, trades=candle.trades, closed=closed, t=t,
        )  # fmt: skip
        bar = {
            "start": candle.start // MS_US, "end": candle.end // MS_US - 1, "interval": interval, **prices,
            "volume": volume, "turnover": turnover, "confirm": closed, "timestamp": t // MS_US,
        }  # fmt: skip
        text = json.dumps([bar], separators=(",", ":"))
        self._publish(f"kline.{interval}.{name.name}", name, "snapshot", t, f'"data":{text}')

    # WebSocket.

    def refuse_ws(self, request: Request) -> Reply | None:
        if request.path != f"/v5/public/{self.category}":
            return Reply("", 404)
        window = self.connects.setdefault(
            request.ip, Window(self.limit["connects_max"], self.limit["connects_window_s"])
        )
        if window.allow(self.exchange.now_s):
            return None
        self.exchange.violation("connects")
        return self.ban_reply(403, 0)

    def opened(self, session: Session) -> None:
        session.own = _Connection(self.exchange.now_s)

    def keep(self, session: Session, now_s: float) -> None:
        own: _Connection = session.own
        while own.late and own.late[0][0] <= now_s:
            self.exchange.send(session, own.late.popleft()[1])
        if now_s - own.heard_s >= self.limit["ping_within_s"]:
            self.exchange.violation("no_ping", session)
            self.exchange.hang_up(session, "no ping")

    def notice(self, session: Session, t: int) -> str:
        return f'{{"topic":"system.status","ts":{t // MS_US},"data":[{{"title":"going","state":"ongoing"}}]}}'

    def unknown_event(self, session: Session, t: int) -> str:
        return f'{{"topic":"something.new.BTCUSDT","ts":{t // MS_US},"type":"snapshot","data":{{"z":[1,"2",null]}}}}'

    def on_text(self, session: Session, text: str) -> None:
        own: _Connection = session.own
        own.heard_s = self.exchange.now_s
        try:
            message = json.loads(text)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self._reply(session, {}, False, "error:invalid json")
            return
        op, args = message.get("op"), message.get("args")
        if op == "ping":
            if not self.exchange.heartbeats_off(session):
                self._pong(session, message)
        elif op not in ("subscribe", "unsubscribe"):
            self._reply(session, message, False, f"error:unknown op {op}")
        elif not isinstance(args, list) or not args or not all(isinstance(a, str) for a in args):
            self._reply(session, message, False, "error:args must be a list of topics")
        elif op == "unsubscribe":
            for topic in args:
                self.exchange.unsubscribe(session, topic)
            self._reply(session, message, True, "", args)
        else:
            self._subscribe(session, message, args)

    def _pong(self, session: Session, message: dict[str, Any]) -> None:
        self.exchange.send(
            session, json.dumps({**self._envelope(session, message), "ret_msg": "pong", "success": True})
        )

    def _envelope(self, session: Session, message: dict[str, Any]) -> dict[str, Any]:
        return {"conn_id": f"sim-{session.id}", "req_id": message.get("req_id", ""), "op": message.get("op", "")}

    def _reply(
        self, session: Session, message: dict[str, Any], success: bool, text: str, topics: list[str] | None = None
    ) -> None:
        words = {"success": success, "ret_msg": text if text or self.category != "spot" else str(message.get("op"))}
        reply = json.dumps({**words, **self._envelope(session, message)}, separators=(",", ":"))
        self._send_reply(session, reply)

    def _send_reply(self, session: Session, reply: str) -> None:
        own: _Connection = session.own
        if self.limit["reply_ms"]:
            own.late.append((self.exchange.now_s + self.limit["reply_ms"] / 1000, reply))
        else:
            self.exchange.send(session, reply)

    def _why_not(self, session: Session, topics: list[str]) -> str:
        """What is wrong with a request as a whole."""
        chars = len(json.dumps([*session.subs, *topics], separators=(",", ":")))
        if len(topics) > self.args_max:
            self.exchange.violation("args", session)
            return "error:args size >10"
        if chars > self.limit["args_chars_max"] or len(session.subs) + len(topics) > self.subs_max:
            self.exchange.violation("args_chars", session)
            return "error:args too long"
        return ""

    def _bad(self, session: Session, topic: str) -> str:
        """What is wrong with one topic."""
        if self._known(topic) is None:
            return f"error:handler not found,topic:{topic}"
        if topic in session.subs:
            return f"error:already subscribed,topic:{topic}"
        if self.exchange.refused(session, topic, topic.rpartition(".")[2]):
            return f"error:handler not found,topic:{topic}"
        return ""

    def _subscribe(self, session: Session, message: dict[str, Any], topics: list[str]) -> None:
        """One bad topic fails the whole request. Derivatives send the first data before the reply, spot behind it."""
        why = self._why_not(session, topics) or next((w for t in topics if (w := self._bad(session, t))), "")
        if why:
            self._reply(session, message, False, why)
            return
        if self.category == "spot":
            self._reply(session, message, True, "")
        self._begin(session, topics)
        if self.category != "spot":
            self._reply(session, message, True, "")

    def _known(self, topic: str) -> _Name | None:
        """The instrument of a topic that exists."""
        kind, _, rest = topic.partition(".")
        what, _, ticker = rest.partition(".")
        if kind == "orderbook" and what.isdecimal():
            there = int(what) in self.depths or (what == "1" and self.has_best)
        elif kind == "kline":
            there = self.has_candles and what in MINUTES
        else:
            ticker = rest
            there = kind in ("publicTrade", "tickers") or (kind == "allLiquidation" and self.has_liquidations)
        return self.names.get(ticker) if there else None

    def _begin(self, session: Session, topics: list[str]) -> None:
        """Subscribe, and send what a topic begins with."""
        form = session.id % 2  # the gateway of every other connection is 1 ms behind
        for topic in topics:
            name, depth = self._known(topic), topic.split(".")[1]
            assert name is not None
            if topic.startswith("orderbook.") and int(depth) in self.depths and int(depth) not in self.pushed:
                self.pushed.add(int(depth))  # the first who wants it: let it catch up with the book
                self._push_depth(name, int(depth), self.exchange.t)
            self.exchange.subscribe(session, topic, form)
            silent = self.exchange.faults.silenced(topic, name.name)
            if any(fault.wants_conn(session.id, session.agent) for fault in silent):
                continue
            kind = topic.partition(".")[0]
            if kind == "orderbook" and depth == "1":
                if name.best is not None:
                    head = self._head(topic, "snapshot", self.exchange.t // MS_US + form)
                    self.exchange.send(session, f"{head},{self._best_data(name)}}}")
            elif kind == "orderbook":
                self.exchange.send(session, self._snapshot(name, int(depth), form))
            elif kind == "tickers":
                self._greet_ticker(session, name)

    # HTTP.

    def ban_reply(self, status: int, retry_after_s: int) -> Reply:
        """A status of HTTP, or the venue's own code under 200, where nothing says how long to wait."""
        if status in NOT_NOW:
            return self._answer(status, NOT_NOW[status], {})
        headers = {} if status == 403 else {"Retry-After": str(retry_after_s)}
        return Reply('"access too frequent"', status, headers)

    def _limited(self, ip: str) -> Reply | None:
        now_s = self.exchange.now_s
        if now_s < self.banned_until_s.get(ip, 0.0):
            self.exchange.violation("requests_while_banned")
            return self.ban_reply(403, 0)
        limits = self.limit
        window = self.requests.setdefault(ip, Window(limits["requests_max"], limits["requests_window_s"]))
        if not window.allow(now_s):
            self.exchange.violation("requests")
            self.banned_until_s[ip] = now_s + limits["ban_s"]
            return self.ban_reply(403, 0)
        visits = self.visits.setdefault(ip, Window(limits["visits_max"], limits["visits_window_s"]))
        if not visits.allow(now_s):
            self.exchange.counts["visits_refused"] += 1
            return self.ban_reply(10006, 0)
        return None

    def _answer(self, code: int, text: str, result: object) -> Reply:
        now_ms = self.exchange.clock_us() // MS_US
        return Reply(json.dumps({"retCode": code, "retMsg": text, "result": result, "retExtInfo": {}, "time": now_ms}))

    async def http(self, request: Request) -> Reply:
        if refusal := self._limited(request.ip):
            return refusal
        endpoint = request.path.removeprefix("/v5/market/")
        if request.path == endpoint:
            return Reply("", 404)
        if endpoint == "time":
            second = self.exchange.clock_us() // 1_000_000
            return self._answer(0, "OK", {"timeSecond": str(second), "timeNano": str(self.exchange.clock_us() * 1000)})
        if endpoint == "option-base-coins" and self.category == "option":
            return self._option_coins()
        if request.query.get("category") != self.category:
            return self._answer(10001, "params error: Category is invalid", {})
        if endpoint == "instruments-info":
            return self._instruments(request.query)
        name = self.names.get(request.query.get("symbol", ""))
        if name is None:
            return self._answer(10001, "params error: Symbol Is Invalid", {})
        if endpoint == "recent-trade":
            return self._recent(name, request.query)
        if endpoint == "orderbook":
            return await self._orderbook(name, request)
        if endpoint == "kline":
            return self._kline_list(name, request.query)
        return Reply("", 404)

    def _option_coins(self) -> Reply:
        """Coins with options, and one whose options are only announced."""
        listed = [*(name.instrument for name in self.names.values()), *self.exchange.halted.values()]
        coins = dict.fromkeys(instrument.base for instrument in listed)
        rows = [
            {"baseCoin": coin, "quoteCoin": "USDT", "settleCoin": "USDT", "optionShowName": f"{coin}-Options",
             "optionOnlineTime": 1739952000000 if coin != "SOON" else 0, "hasSymbol": int(coin != "SOON"), "underlyingType": 0}
            for coin in (*coins, "SOON")
        ]  # fmt: skip
        return self._answer(0, "success", {"list": rows})

    def _instruments(self, query: Mapping[str, str]) -> Reply:
        """Pages by cursor; spot has one page only, and options come one base coin at a time."""
        rows = [self._instrument_words(name.instrument) for name in self.names.values()]
        rows += [self._instrument_words(i) | {"status": self.halted_status} for i in self.exchange.halted.values()]
        if self.category == "option":
            rows = [row for row in rows if row["baseCoin"] == query.get("baseCoin", "BTC")]
        first, size = 0, len(rows)
        if self.category != "spot":
            first = int(query.get("cursor", "0").rpartition(",")[2])
            size = min(int(query.get("limit", "500")), int(self.limit["page_max"]))
        page, end = rows[first : first + size], first + size
        cursor = f"{first}%2C{end}" if end < len(rows) else ""
        return self._answer(0, "OK", {"category": self.category, "nextPageCursor": cursor, "list": page})

    def _instrument_words(self, instrument: Instrument) -> dict[str, Any]:
        facts, category, step = instrument.facts, self.category, plain(instrument.lot, instrument.qty_scale)
        tick = plain(instrument.tick, instrument.price_scale + self.exchange.finer[instrument.ticker])
        words: dict[str, Any] = {
            "symbol": instrument.ticker, "status": "Trading", "baseCoin": instrument.base, "quoteCoin": instrument.quote,
            "priceFilter": {"minPrice": tick, "maxPrice": "1999999.80", "tickSize": tick},
        }  # fmt: skip
        if category == "spot":
            lot = {"basePrecision": step, "quotePrecision": "0.0000001", "minOrderQty": step, "maxOrderQty": "71.7"}
            return words | {"marginTrading": "utaOnly", "innovation": "0", "lotSizeFilter": lot}
        words |= {
            "settleCoin": instrument.quote if category != "inverse" else instrument.base,
            "launchTime": "1584230400000",
        }
        words |= {
            "deliveryTime": str(_expiry_ms(str(facts["expiry"]))) if facts["expiry"] else "0",
            "deliveryFeeRate": "",
        }
        words |= {"lotSizeFilter": {"maxOrderQty": "1190.000", "minOrderQty": step, "qtyStep": step}}
        if category == "option":
            return words | {"optionsType": "Call" if "-C" in instrument.ticker else "Put"}
        kind = "Futures" if facts["expiry"] else "Perpetual"
        return words | {"contractType": f"{category.capitalize()}{kind}", "fundingInterval": 480, "isPreListing": False,
                        "preListingInfo": None, "priceScale": str(instrument.price_scale)}  # fmt: skip

    def _recent(self, name: _Name, query: Mapping[str, str]) -> Reply:
        most = min(int(query.get("limit", "60" if self.category == "spot" else "500")), self.recent_max)
        rows = [
            {
                "execId": self._trade_id(trade), "symbol": name.name, "price": name.price(trade.price),
                "size": name.qty(trade.lots), "side": "Buy" if trade.side > 0 else "Sell", "time": str(trade.t // MS_US),
                "isBlockTrade": False, "isRPITrade": False, "seq": str(trade.engine_id),
            }
            for trade in list(name.book.trades)[-most:][::-1]
        ]  # fmt: skip
        return self._answer(0, "OK", {"category": self.category, "list": rows})

    async def _orderbook(self, name: _Name, request: Request) -> Reply:
        _, engine_id, bids, asks = await self.exchange.snapshot(name.book, request.agent)
        limit = int(request.query.get("limit", "25"))
        sides = {key: [[name.price(p), name.qty(q)] for p, q in s[:limit]] for key, s in (("b", bids), ("a", asks))}
        times = {"ts": self.exchange.clock_us() // MS_US, "cts": name.changed_us // MS_US}
        u = name.depths[max(self.depths)].u
        return self._answer(0, "OK", {"s": name.name, **sides, **times, "u": u, "seq": engine_id})

    def _kline_list(self, name: _Name, query: Mapping[str, str]) -> Reply:
        interval = query.get("interval", "")
        if interval not in MINUTES or not self.has_candles:
            return self._answer(10001, "params error: Invalid period", {})
        candles = self.exchange.market.candles[name.name]
        chosen = [*candles.closed[interval], candles.open[interval]][-int(query.get("limit", "200")) :][::-1]
        rows = [
            [str(c.start // MS_US), *(name.price(x) for x in (c.open, c.high, c.low, c.close)), *_volumes(name, c, self.inverse)]
            for c in chosen
        ]  # fmt: skip
        return self._answer(0, "OK", {"category": self.category, "symbol": name.name, "list": rows})


def _volumes(name: _Name, candle: Candle, inverse: bool) -> tuple[str, str]:
    """Volume and turnover as the venue words them: of inverse contracts the volume is in USD, the turnover in coins."""
    instrument = name.instrument
    volume = plain(candle.lots * instrument.lot, instrument.qty_scale)
    if inverse:
        price = instrument.tick / 10**instrument.price_scale
        return volume, f"{candle.coins * instrument.lot / 10**instrument.qty_scale / price:.8f}"
    value = candle.value * instrument.tick * instrument.lot
    return volume, plain(value, instrument.price_scale + instrument.qty_scale)


def _expiry_ms(day: str) -> int:
    """08:00 UTC of a day written like 25DEC26."""
    return int(datetime.strptime(day, "%d%b%y").replace(hour=8, tzinfo=UTC).timestamp() * 1000)


class BybitSpot(_Category):
    name: ClassVar[str] = "bybit_spot"
    category = "spot"
    tickers: ClassVar[tuple[str, ...]] = ("BTCUSDT", "ETHUSDT", "SOLUSDC", "XRPUSDT")
    args_max = 10
    recent_max = 60
    ticker_ms = 50
    merges_tickers = False
    has_liquidations = False
    halted_status = "Closed"
    dialect: ClassVar[Dialect] = _dialect(BASE_WORDS, 200)
    notes: ClassVar[str] = (
        "/v5/public/spot, GET /v5/market/{time,instruments-info,recent-trade,orderbook,kline}?category=spot; orderbook"
        " (1, 50, 200, 1000), publicTrade, tickers, kline. Ledger streams: orderbook.50, .200, .1000; only orderbook.200"
        " until somebody subscribes to another."
    )

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        quote = ticker[-4:]
        tick, scale, lot, qty_scale, start, size = KNOWN.get(_Category._coin(ticker), (1, 4, 1, 1, 12_345, 500))
        return Instrument(ticker, ticker[:-4], quote, tick, scale, lot, qty_scale, start, size, busy)

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}USDT"


class BybitLinear(_Category):
    name: ClassVar[str] = "bybit_linear"
    category = "linear"
    tickers: ClassVar[tuple[str, ...]] = ("BTCUSDT", "ETHPERP", "SOLUSDT", "BTC-25DEC26")
    dialect: ClassVar[Dialect] = _dialect(BASE_WORDS | MARKS | BEST | {"funding_rate": "fundingRate"}, 200)
    notes: ClassVar[str] = BybitSpot.notes.replace("spot", "linear") + " Also allLiquidation."

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        """USDT perpetuals, USDC perpetuals (PERP) and dated USDC futures."""
        dated = ticker.partition("-")[2]
        base = ticker.partition("-")[0] if dated else ticker.removesuffix("PERP").removesuffix("USDT")
        quote = "USDT" if ticker.endswith("USDT") else "USDC"
        tick, scale, lot, qty_scale, start, size = KNOWN.get(_Category._coin(ticker), (1, 4, 1, 1, 12_345, 500))
        kind = "future" if dated else "perpetual"
        facts: dict[str, object] = {"expiry": dated}
        return Instrument(ticker, base, quote, tick, scale, lot, qty_scale, start, size, busy, kind, facts)

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}USDT"


class BybitInverse(_Category):
    name: ClassVar[str] = "bybit_inverse"
    category = "inverse"
    inverse = True
    tickers: ClassVar[tuple[str, ...]] = ("BTCUSD", "ETHUSD", "SOLUSD")
    dialect: ClassVar[Dialect] = _dialect(
        BASE_WORDS | MARKS | BEST
        | {"funding_rate": "fundingRate", "volume_24h": "turnover24h", "quote_volume_24h": "volume24h"},
        200,
    )  # fmt: skip
    notes: ClassVar[str] = BybitLinear.notes.replace("linear", "inverse")

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        """Contracts of one USD."""
        tick, scale, _, _, start, _ = KNOWN.get(_Category._coin(ticker), (1, 4, 1, 1, 12_345, 500))
        facts: dict[str, object] = {"expiry": ""}
        return Instrument(
            ticker, ticker.removesuffix("USD"), "USD", tick, scale, 1, 0, start, 900, busy, "perpetual", facts
        )

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}USD"


class BybitOption(_Category):
    name: ClassVar[str] = "bybit_option"
    shown_faults: ClassVar[tuple[str, ...]] = shown("orderbook")
    category = "option"
    depths = (25, 100)
    default_depth = 100
    subs_max = 2000
    has_best = has_candles = has_liquidations = merges_tickers = False
    tickers: ClassVar[tuple[str, ...]] = (
        "BTC-25DEC26-90000-C-USDT", "BTC-25DEC26-90000-P-USDT", "ETH-25DEC26-3000-C-USDT", "SOL-25DEC26-200-P-USDT",
    )  # fmt: skip
    dialect: ClassVar[Dialect] = _dialect(
        {k: v for k, v in BASE_WORDS.items() if k != "open_24h"} | MARKS | {"bid_price": "bidPrice", "ask_price": "askPrice"},
        100,
    )  # fmt: skip
    notes: ClassVar[str] = (
        "/v5/public/option, GET /v5/market/{time,option-base-coins}, /v5/market/{instruments-info,recent-trade,orderbook}?category=option; orderbook"
        " (25, 100), publicTrade by base coin, tickers. Ledger streams: orderbook.25, .100."
    )

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        base, expiry = ticker.split("-")[:2]
        facts: dict[str, object] = {"expiry": expiry}
        return Instrument(ticker, base, "USDT", 5, 0, 1, 2, 300, 120, busy, "option", facts)

    def _trade_topic(self, name: _Name) -> str:
        return f"publicTrade.{name.instrument.base}"

    def _known(self, topic: str) -> _Name | None:
        kind, _, rest = topic.partition(".")
        if kind == "publicTrade":
            return next((name for name in self.names.values() if name.instrument.base == rest), None)
        return super()._known(topic)

    def _pong(self, session: Session, message: dict[str, Any]) -> None:
        now_ms = str(self.exchange.clock_us() // MS_US)
        pong = {"req_id": message.get("req_id", ""), "op": "pong", "args": [now_ms], "conn_id": f"sim-{session.id}"}
        self.exchange.send(session, json.dumps(pong))

    def _reply(
        self, session: Session, message: dict[str, Any], success: bool, text: str, topics: list[str] | None = None
    ) -> None:
        self._reply_topics(session, topics or [], [] if success else list(message.get("args") or []))

    def _reply_topics(self, session: Session, good: list[str], bad: list[str]) -> None:
        data = {"failTopics": bad, "successTopics": good}
        reply = {"success": not bad, "conn_id": f"sim-{session.id}", "data": data, "type": "COMMAND_RESP"}
        self._send_reply(session, json.dumps(reply, separators=(",", ":")))

    def _subscribe(self, session: Session, message: dict[str, Any], topics: list[str]) -> None:
        """This category answers topic by topic, without naming the request."""
        if self._why_not(session, topics):
            self._reply_topics(session, [], topics)
            return
        bad = [topic for topic in topics if self._bad(session, topic)]
        good = [topic for topic in topics if topic not in bad]
        self._begin(session, good)
        self._reply_topics(session, good, bad)
