"""Deribit as a simulated exchange: JSON-RPC over WebSocket, the same methods over HTTP, channels, credits, heartbeats.

Written from https://docs.deribit.com (articles on rate limits, connection management, authentication and
notifications, and the pages of the methods and channels, 2026) and from recorded frames; deliberately not from our own
decoder, so that each can prove the other wrong.
"""

import hashlib
import hmac
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

from tools.sim.faults import shown
from tools.sim.ledger import Dialect
from tools.sim.market import ASK, BID, Action, Book, Candle, Instrument, Trade, plain
from tools.sim.server import Credits, Exchange, Level, Reply, Request, Session, Venue

MINUTE_US = 60_000_000
RAW, FAST, SLOW = "raw", "100ms", "agg2"
INTERVALS = (RAW, FAST, SLOW)
FAR_FUTURE_MS = 32_503_708_800_000
# Inverse contracts of a coin: price and tick in 10**-price_scale, price_scale, lot in 10**-qty_scale, qty_scale, size in lots.
KNOWN: dict[str, tuple[int, int, int, int, int, int]] = {
    "BTC": (850_000, 5, 1, 10, 0, 400),
    "ETH": (28_000, 1, 1, 1, 0, 900),
}
EXPIRY = re.compile(
    r"^(?P<base>[A-Z]+)(?:_(?P<quote>[A-Z]+))?-(?P<day>\d{1,2}[A-Z]{3}\d{2})(?:-(?P<strike>\d+)-(?P<type>[CP]))?$"
)
PERPETUAL = re.compile(r"^(?P<base>[A-Z0-9]+)(?:_(?P<quote>[A-Z]+))?-PERPETUAL$")
BOOK = re.compile(r"^book\.(?P<name>[^.]+)\.(?P<interval>raw|100ms|agg2)$")
GROUPED = re.compile(r"^book\.(?P<name>[^.]+)\.(?P<group>none|\d+)\.(?P<depth>1|10|20)\.(?P<interval>100ms|agg2)$")
PLAIN = re.compile(r"^(?P<what>quote|incremental_ticker)\.(?P<name>[^.]+)$")
TIMED = re.compile(r"^(?P<what>trades|ticker)\.(?P<name>[^.]+)\.(?P<interval>raw|100ms|agg2)$")
BY_KIND = re.compile(
    r"^trades\.(?P<kind>future|option|spot|any)\.(?P<currency>[A-Za-z]+)\.(?P<interval>raw|100ms|agg2)$"
)
CHART = re.compile(r"^chart\.trades\.(?P<name>[^.]+)\.(?P<resolution>[0-9D]+)$")
STATE = re.compile(r"^instrument\.state\.(?P<kind>future|option|spot|any)\.(?P<currency>[A-Za-z]+)$")
RESOLUTIONS = {
    "1": 1, "3": 3, "5": 5, "10": 10, "15": 15, "30": 30, "60": 60, "120": 120, "180": 180, "360": 360, "720": 720, "1D": 1440,
}  # fmt: skip


class _Rpc(Exception):
    """An error that a method answers with."""

    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data


class _Connection:
    """What the venue knows about one WebSocket."""

    def __init__(self) -> None:
        self.client_id = ""
        self.token_until_s = -math.inf
        self.heartbeat_s = 0.0
        self.next_heartbeat_s = math.inf
        self.test_sent_s: float | None = None
        self.tick = False  # whether the next heartbeat is a test_request


class _Waiting:
    """Levels that wait for the next book notification of one interval, with their quantity when last published."""

    def __init__(self, change_id: int) -> None:
        self.levels: dict[tuple[int, int], int] = {}
        self.change_id = change_id  # of the last notification


class _Name:
    """One instrument: its texts, and what waits for the timers."""

    def __init__(self, book: Book) -> None:
        self.book, self.instrument = book, book.instrument
        self.name = book.instrument.ticker
        self.waiting = {interval: _Waiting(book.engine_id) for interval in INTERVALS}
        self.trades: dict[str, list[str]] = {FAST: [], SLOW: []}
        self.ticker_dirty = {FAST: False, SLOW: False}
        self.ticker_told: dict[str, str] = {}  # interval -> the newest that was published, while it still holds
        self.grouped_dirty = {FAST: False, SLOW: False}
        self.chart_dirty = False
        self.last_price = book.instrument.start
        self.tick_direction = 0
        self.incremental: dict[str, Any] = {}  # the last ticker that the incremental channel has told
        self._numbers: dict[tuple[int, int], str] = {}

    def price(self, ticks: int) -> str:
        return self._number(ticks * self.instrument.tick, self.instrument.price_scale)

    def amount(self, lots: int) -> str:
        return self._number(lots * self.instrument.lot, self.instrument.qty_scale)

    def _number(self, value: int, scale: int) -> str:
        text = self._numbers.get((value, scale))
        if text is None:
            if len(self._numbers) > 40_000:
                self._numbers.clear()
            text = self._numbers[value, scale] = number(value, scale)
        return text

    def pairs(self, levels: list[Level]) -> str:
        return "[" + ",".join(f"[{self.price(price)},{self.amount(lots)}]" for price, lots in levels) + "]"

    def texts(self, levels: list[Level]) -> str:
        return "[" + ",".join(f'["{self.price(price)}","{self.amount(lots)}"]' for price, lots in levels) + "]"

    def mark(self) -> str:
        """The mark price: the middle of the book, two decimals finer than the tick."""
        scale = self.instrument.price_scale + 1
        return number(self.book.mid2() * self.instrument.tick * 5, scale)

    def index(self) -> str:
        """The index: a little below the mark, so that the two differ as they do in life."""
        scale = self.instrument.price_scale + 2
        return number(self.book.mid2() * self.instrument.tick * 50 * 9997 // 10_000, scale)

    def best(self) -> tuple[str, str, str, str]:
        (bid, bid_lots), (ask, ask_lots) = self.book.best(BID), self.book.best(ASK)
        return self.price(bid), self.amount(bid_lots), self.price(ask), self.amount(ask_lots)


def number(value: int, scale: int) -> str:
    """A JSON number as the venue writes it: the shorter of 8500.0 and 8.5e3, always with a point."""
    sign, digits = ("-", str(-value)) if value < 0 else ("", str(value))
    if value == 0:
        return "0.0"
    whole, _, part = plain(abs(value), scale).partition(".")
    decimal = f"{whole}.{part.rstrip('0') or '0'}"
    exponent = len(digits) - 1 - scale
    mantissa = digits.rstrip("0")
    scientific = f"{mantissa[0]}.{mantissa[1:] or '0'}e{exponent}"
    return sign + (scientific if len(scientific) < len(decimal) else decimal)


class Deribit(Venue):
    name: ClassVar[str] = "deribit"
    shown_faults: ClassVar[tuple[str, ...]] = shown("book", "trades.*")
    tickers: ClassVar[tuple[str, ...]] = ("BTC-PERPETUAL", "ETH-PERPETUAL", "BTC_USDC-PERPETUAL", "BTC-25DEC26-90000-C")
    dialect: ClassVar[Dialect] = Dialect(
        1000,
        "100ms",
        {
            "last": "last_price",
            "high_24h": "stats.high",
            "low_24h": "stats.low",
            "volume_24h": "stats.volume",
            "quote_volume_24h": "stats.volume_usd",
            "bid_price": "best_bid_price",
            "ask_price": "best_ask_price",
            "mark_price": "mark_price",
            "index_price": "index_price",
            "funding_rate": "current_funding",
            "open_interest": "open_interest",
        },
        bbo_has_id=False,
        bbo_has_time=True,
        candle_has_time=False,
        candle_counts_trades=False,
        intervals={"1m": "1", "3m": "3", "5m": "5", "1h": "60", "1d": "1D"},
    )
    limits: ClassVar[dict[str, float]] = {
        "connections_max": 32,
        "sessions_per_key": 16,
        "heartbeat_min_s": 10,
        "heartbeat_scale": 1,
        "test_within_s": 10,
        "channels_per_call": 500,
        "token_s": 31_536_000,
        "refill_per_s": 10_000,
        "call_cost": 500,
        "call_pool": 50_000,
        "subscribe_cost": 3_000,
        "subscribe_pool": 30_000,
        "instruments_cost": 10_000,
        "instruments_pool": 50_000,
    }
    intervals: ClassVar[dict[str, int]] = {name: minutes * MINUTE_US for name, minutes in RESOLUTIONS.items()}
    notes: ClassVar[str] = (
        "/ws/api/v2 and GET /api/v2/<method>; raw channels need public/auth with an accepted --credential;"
        " book (raw, 100ms, agg2, grouped), trades, ticker, incremental_ticker, quote, chart.trades, instrument.state,"
        " platform_state. Ledger streams: raw, 100ms, agg2."
    )

    def __init__(self, exchange: Exchange, limits: Mapping[str, float], credentials: Mapping[str, str]) -> None:
        super().__init__(exchange, limits, credentials)
        self.names = {ticker: _Name(book) for ticker, book in exchange.market.books.items()}
        self.credits: dict[tuple[str, str], Credits] = {}  # account or address, and kind of call
        self.tokens: dict[str, tuple[str, float]] = {}  # access token -> client id, end
        self.refresh: dict[str, str] = {}  # refresh token -> client id
        self.http_open: Counter[str] = Counter()  # ip -> requests that are being answered
        self.handed_out = 0
        self.session_methods: dict[str, Callable[[Session, dict[str, Any], bool], object]] = {
            "auth": self._on_auth,
            "set_heartbeat": self._on_set_heartbeat,
            "disable_heartbeat": self._on_disable_heartbeat,
            "test": self._on_test,
            "subscribe": self._on_subscribe,
            "unsubscribe": self._on_unsubscribe,
            "unsubscribe_all": self._on_unsubscribe_all,
        }
        self.methods: dict[str, Callable[[dict[str, Any]], object]] = {
            "public/auth": lambda params: self._token(params)[1],
            "public/test": self._test,
            "public/get_time": lambda _params: self.exchange.clock_us() // 1000,
            "public/status": lambda _params: {"locked": "false", "locked_indices": []},
            "public/get_instruments": self._instruments,
            "public/get_order_book": self._order_book_now,
            "public/get_last_trades_by_instrument": self._last_trades_by_seq,
            "public/get_last_trades_by_instrument_and_time": self._last_trades_by_time,
            "public/get_tradingview_chart_data": self._chart_data,
        }

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        """The instrument that a name describes: perpetual, dated future or option, inverse or linear."""
        dated, perpetual = EXPIRY.match(ticker), PERPETUAL.match(ticker)
        found = dated or perpetual
        base = found["base"] if found else ticker.partition("-")[0]
        quote = (found["quote"] if found else None) or "USD"
        linear = quote != "USD"
        facts: dict[str, object] = {"linear": linear, "expiry": dated["day"] if dated else ""}
        if dated and dated["strike"]:
            facts |= {"strike": int(dated["strike"]), "option_type": "call" if dated["type"] == "C" else "put"}
            return Instrument(ticker, base, quote if linear else base, 5, 4, 1, 1, 90, 120, busy, "option", facts)
        price, tick, price_scale, lot, qty_scale, size = KNOWN.get(base, (12_345, 1, 2, 1, 0, 500))
        if linear:
            price, tick, price_scale, lot, qty_scale, size = price * 10 ** (2 - price_scale), 10, 2, 1, 4, 5_000
        return Instrument(
            ticker, base, quote, tick, price_scale, lot, qty_scale, price // tick, size, busy, "future", facts
        )

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}_USDC-PERPETUAL"

    def first_book(self, book: Book) -> dict[str, object]:
        name = self.names[book.instrument.ticker]
        bids, asks = ([[name.price(p), name.amount(q)] for p, q in book.levels(side)] for side in (BID, ASK))
        return {"last": book.engine_id, "bids": bids, "asks": asks}

    def listed(self, book: Book, t: int) -> None:
        self.names[book.instrument.ticker] = _Name(book)
        self._tell_state(book.instrument, "created", t)

    def delisted(self, book: Book, t: int) -> None:
        self.finish(t)
        del self.names[book.instrument.ticker]
        self._tell_state(book.instrument, "terminated", t)

    def _tell_state(self, instrument: Instrument, state: str, t: int) -> None:
        data = {"timestamp": t // 1000, "state": state, "instrument_name": instrument.ticker}
        for channel in {
            f"instrument.state.{k}.{c}" for k in (instrument.kind, "any") for c in (instrument.base, "any")
        }:
            self._notify(channel, instrument.ticker, _json(data))

    # The market put into words.

    def _notify(self, channel: str, ticker: str, data: str, first: int = 0, last: int = 0) -> None:
        self.exchange.publish(channel, ticker, lambda _form: _notification(channel, data), first, last)

    def on_action(self, book: Book, action: Action) -> None:
        name = self.names[book.instrument.ticker]
        if action.trades:
            self._on_trades(name, action)
        for waiting in name.waiting.values():
            for side, price, before, _ in action.changes:
                waiting.levels.setdefault((side, price), before)
        name.grouped_dirty[FAST] = name.grouped_dirty[SLOW] = True
        self._book(name, RAW, action.t)
        if action.best_changed:
            self._quote(name, action)
        if action.best_changed or action.trades:
            name.ticker_dirty[FAST] = name.ticker_dirty[SLOW] = True
            name.ticker_told.clear()
            if f"ticker.{name.name}.raw" in self.exchange.streams:
                text = name.ticker_told[RAW] = _numbers(self._ticker_data(name, action.t))
                self._ticker_line("ticker", name.name, RAW, action.t, text)
                self._notify(f"ticker.{name.name}.raw", name.name, text)

    def _on_trades(self, name: _Name, action: Action) -> None:
        ledger, ticker = self.exchange.ledger, name.name
        mark, index = name.mark(), name.index()
        texts: list[str] = []
        for trade in action.trades:
            price, amount = name.price(trade.price), name.amount(trade.lots)
            side = "BUY" if trade.side > 0 else "SELL"
            ledger.line(
                "trade",
                ticker,
                f'{{"kind":"trade","ticker":"{ticker}","id":"{trade.engine_id}","seq":{trade.id},"price":"{price}",'
                f'"qty":"{amount}","side":"{side}","t":{action.t}}}',
            )
            texts.append(self._trade_text(name, trade, mark, index))
        name.chart_dirty = True
        first, last = action.trades[0].id, action.trades[-1].id
        self._notify_trades(name, RAW, texts, first, last)
        for waiting in name.trades.values():
            waiting.extend(texts)

    def _notify_trades(self, name: _Name, interval: str, texts: list[str], first: int, last: int) -> None:
        data = "[" + ",".join(texts) + "]"
        self._notify(f"trades.{name.name}.{interval}", name.name, data, first, last)
        for kind in (name.instrument.kind, "any"):
            for currency in (name.instrument.base, "any"):
                self._notify(f"trades.{kind}.{currency}.{interval}", name.name, data, first, last)

    @staticmethod
    def _trade_text(name: _Name, trade: Trade, mark: str, index: str) -> str:
        """One trade; `contracts` stands where the venue has contracts, `iv` where there is a volatility."""
        rose = (trade.price > name.last_price) - (trade.price < name.last_price)
        if rose:
            name.tick_direction = 0 if rose > 0 else 2
        elif name.tick_direction in (0, 2):
            name.tick_direction += 1
        name.last_price = trade.price
        extra = '"iv":55.5,' if name.instrument.kind == "option" else f'"contracts":{number(trade.lots, 0)},'
        return (
            f'{{"timestamp":{trade.t // 1000},"price":{name.price(trade.price)},"amount":{name.amount(trade.lots)},'
            f'"direction":"{"buy" if trade.side > 0 else "sell"}","index_price":{index},"instrument_name":"{name.name}",'
            f'"trade_seq":{trade.id},"mark_price":{mark},"tick_direction":{name.tick_direction},{extra}'
            f'"trade_id":"{trade.engine_id}"}}'
        )

    def _quote(self, name: _Name, action: Action) -> None:
        bid, bid_amount, ask, ask_amount = name.best()
        self.exchange.ledger.line(
            "bbo",
            name.name,
            f'{{"kind":"bbo","ticker":"{name.name}","id":{action.engine_id},"bid":"{bid}","bid_qty":"{bid_amount}",'
            f'"ask":"{ask}","ask_qty":"{ask_amount}","t":{action.t}}}',
        )
        self._notify(
            f"quote.{name.name}",
            name.name,
            f'{{"timestamp":{action.t // 1000},"instrument_name":"{name.name}","best_ask_price":{ask},'
            f'"best_bid_price":{bid},"best_ask_amount":{ask_amount},"best_bid_amount":{bid_amount}}}',
            action.engine_id,
            action.engine_id,
        )

    def _book(self, name: _Name, interval: str, t: int) -> None:
        """One book notification of an interval, if anything is different from the one before."""
        waiting, book = name.waiting[interval], name.book
        changed: tuple[list[tuple[str, int, int]], list[tuple[str, int, int]]] = ([], [])
        for (side, price), before in waiting.levels.items():
            after = book.level(side, price)
            if after != before:
                changed[side].append(("delete" if not after else "change" if before else "new", price, after))
        waiting.levels.clear()
        if not changed[BID] and not changed[ASK]:
            return
        changed[BID].sort(key=lambda level: -level[1])
        changed[ASK].sort(key=lambda level: level[1])
        previous, waiting.change_id = waiting.change_id, book.engine_id
        change_id = waiting.change_id
        if self.exchange.ledger.writing:
            bids, asks = (name.texts([(price, lots) for _, price, lots in levels]) for levels in changed)
        else:
            bids = asks = ""
        self.exchange.ledger.line(
            "book",
            name.name,
            f'{{"kind":"book","ticker":"{name.name}","stream":"{interval}","first":{change_id},"last":{change_id},'
            f'"prev":{previous},"bids":{bids},"asks":{asks},"t":{t}}}',
        )
        channel = f"book.{name.name}.{interval}"

        def make(_form: object) -> str:
            words = [",".join(f'["{a}",{name.price(p)},{name.amount(q)}]' for a, p, q in levels) for levels in changed]
            return _notification(
                channel,
                f'{{"timestamp":{t // 1000},"type":"change","change_id":{change_id},"instrument_name":"{name.name}",'
                f'"bids":[{words[BID]}],"asks":[{words[ASK]}],"prev_change_id":{previous}}}',
            )

        self.exchange.publish(channel, name.name, make, change_id, change_id)

    def _snapshot(self, name: _Name, interval: str) -> str:
        """The book as it was at the last notification of this interval, so that the next change follows it."""
        waiting = name.waiting[interval]
        sides: list[str] = []
        for side in (BID, ASK):
            levels = dict(name.book.levels(side))
            for (changed_side, price), before in waiting.levels.items():
                if changed_side == side:
                    levels[price] = before
            ordered = sorted(((p, q) for p, q in levels.items() if q), reverse=side == BID)
            sides.append(",".join(f'["new",{name.price(p)},{name.amount(q)}]' for p, q in ordered))
        return _notification(
            f"book.{name.name}.{interval}",
            f'{{"timestamp":{self.exchange.t // 1000},"type":"snapshot","change_id":{waiting.change_id},'
            f'"instrument_name":"{name.name}","bids":[{sides[BID]}],"asks":[{sides[ASK]}]}}',
        )

    def _grouped(self, name: _Name, channel: str, group: str, depth: int, t: int) -> str:
        """The best levels of a side, prices put together in steps of `group` ticks."""
        sides = []
        for side in (BID, ASK):
            levels = name.book.levels(side)
            if group != "none":
                step, together = int(group), Counter[int]()
                for price, lots in levels:
                    together[price // step * step if side == BID else -(-price // step) * step] += lots
                levels = sorted(together.items(), reverse=side == BID)
            sides.append(name.pairs(levels[:depth]))
        return _notification(
            channel,
            f'{{"timestamp":{t // 1000},"change_id":{name.book.engine_id},"instrument_name":"{name.name}",'
            f'"bids":{sides[BID]},"asks":{sides[ASK]}}}',
        )

    def _ticker_data(self, name: _Name, t: int) -> dict[str, Any]:
        """A ticker; numbers stand in it as the text that is sent (see `_numbers`)."""
        day = self.exchange.market.day[name.name]
        bid, bid_amount, ask, ask_amount = name.best()
        mark, index = name.mark(), name.index()
        change = number(round(1e4 * (day.close - day.open) / day.open), 4)
        stats = {"high": name.price(day.high), "low": name.price(day.low), "price_change": change}
        volumes = _volumes(name, day)
        data: dict[str, Any] = {
            "timestamp": t // 1000,
            "state": '"open"',
            "stats": stats | {"volume": volumes[0], "volume_usd": volumes[1], "volume_notional": volumes[1]},
            "index_price": index,
            "instrument_name": f'"{name.name}"',
            "last_price": name.price(name.last_price) if day.trades else "null",
            "settlement_price": name.price(name.instrument.start),
            "min_price": name.price(name.book.mid2() * 49 // 100),
            "max_price": name.price(name.book.mid2() * 51 // 100),
            "open_interest": number(797_578_130 + day.lots, 0),
            "mark_price": mark,
        }
        if name.instrument.kind == "option":
            greeks = {"vega": "12.34", "theta": "-5.6", "rho": "3.21", "gamma": "1.0e-5", "delta": "0.51"}
            data |= {"mark_iv": "55.5", "bid_iv": "54.9", "ask_iv": "56.1", "underlying_price": "85012.5"}
            data |= {"underlying_index": '"SYN.BTC"', "interest_rate": "0.0", "greeks": greeks}
        elif not name.instrument.facts["expiry"]:
            data |= {"interest_value": "-4.467407940520975e-5", "current_funding": "1.423e-4", "funding_8h": "5.149e-5"}
        data["estimated_delivery_price"] = index
        best = {
            "best_ask_price": ask,
            "best_bid_price": bid,
            "best_ask_amount": ask_amount,
            "best_bid_amount": bid_amount,
        }
        return data | best

    def _ticker(self, name: _Name, interval: str, t: int) -> None:
        data = self._ticker_data(name, t)
        text = name.ticker_told[interval] = _numbers(data)
        self._ticker_line("ticker", name.name, interval, t, text)
        self._notify(f"ticker.{name.name}.{interval}", name.name, text)
        if interval == FAST:
            changed = {key: value for key, value in data.items() if name.incremental.get(key) != value}
            name.incremental = data
            head = {"type": '"change"', "timestamp": data["timestamp"], "instrument_name": data["instrument_name"]}
            self._notify(f"incremental_ticker.{name.name}", name.name, _numbers(head | changed))

    def _ticker_line(self, kind: str, name: str, interval: str, t: int, text: str) -> None:
        self.exchange.ledger.line(
            kind, name, f'{{"kind":"{kind}","ticker":"{name}","stream":"{interval}","t":{t},"data":{text}}}'
        )

    def timers(self) -> list[tuple[int, Callable[[int], None]]]:
        return [(100_000, lambda t: self._interval(FAST, t)), (1_000_000, self._second)]

    def _second(self, t: int) -> None:
        self._interval(SLOW, t)
        self._charts(t)

    def finish(self, t: int) -> None:
        self._interval(FAST, t)
        self._interval(SLOW, t)

    def _interval(self, interval: str, t: int) -> None:
        grouped: dict[str, list[tuple[str, str, int]]] = {}
        for channel in self.exchange.streams:
            if channel.count(".") == 4 and (found := GROUPED.match(channel)) and found["interval"] == interval:
                grouped.setdefault(found["name"], []).append((channel, found["group"], int(found["depth"])))
        for name in self.names.values():
            self._book(name, interval, t)
            if texts := name.trades[interval]:
                name.trades[interval] = []
                last = name.book.trade_id
                self._notify_trades(name, interval, texts, last - len(texts) + 1, last)
            if name.ticker_dirty[interval]:
                name.ticker_dirty[interval] = False
                self._ticker(name, interval, t)
            if name.grouped_dirty[interval]:
                name.grouped_dirty[interval] = False
                self._notify_grouped(name, grouped.get(name.name, []), t)

    def _notify_grouped(self, name: _Name, channels: list[tuple[str, str, int]], t: int) -> None:
        for channel, group, depth in channels:
            self.exchange.publish(
                channel,
                name.name,
                lambda _form, c=channel, g=group, d=depth: self._grouped(name, c, g, d, t),  # type: ignore[misc]
                name.book.engine_id,
                name.book.engine_id,
            )

    def _charts(self, t: int) -> None:
        """Once a second the open candles of what has traded; a candle is over when a later one comes."""
        for name in self.names.values():
            candles = self.exchange.market.candles[name.name]
            for resolution, candle in candles.roll(t):
                self._candle(name, resolution, candle, t, True)
            if not name.chart_dirty:
                continue
            name.chart_dirty = False
            for resolution, candle in candles.open.items():
                if f"chart.trades.{name.name}.{resolution}" in self.exchange.streams:
                    self._candle(name, resolution, candle, t, False)

    def _candle(self, name: _Name, resolution: str, candle: Candle, t: int, closed: bool) -> None:
        words = _candle_words(name, candle)
        self.exchange.ledger.record(
            "candle",
            ticker=name.name,
            interval=resolution,
            open_time=candle.start,
            **{key: words[key] for key in ("open", "high", "low", "close", "volume")},
            trades=candle.trades,
            closed=closed,
            t=t,
        )
        self._notify(f"chart.trades.{name.name}.{resolution}", name.name, _numbers(words))

    # WebSocket.

    def refuse_ws(self, request: Request) -> Reply | None:
        if request.path != "/ws/api/v2":
            return Reply("", 404)
        return self._too_many(request.ip)

    def _too_many(self, ip: str) -> Reply | None:
        """The limit of connections of one address counts short HTTP calls too."""
        open_now = sum(s.request.ip == ip for s in self.exchange.sessions.values()) + self.http_open[ip]
        if open_now < self.limit["connections_max"]:
            return None
        self.exchange.violation("connections")
        return self.ban_reply(429, 1)

    def opened(self, session: Session) -> None:
        session.own = _Connection()

    def keep(self, session: Session, now_s: float) -> None:
        """Heartbeats as asked for; an unanswered test_request ends the connection."""
        own: _Connection = session.own
        if own.test_sent_s is not None and now_s - own.test_sent_s >= self.limit["test_within_s"]:
            self.exchange.violation("test_request_unanswered", session)
            self.exchange.hang_up(session, "test_request unanswered", 4000)
        elif now_s >= own.next_heartbeat_s:
            own.next_heartbeat_s = now_s + own.heartbeat_s / 2
            if self.exchange.heartbeats_off(session):
                return
            own.tick = not own.tick
            kind = "heartbeat" if own.tick else "test_request"
            if not own.tick and own.test_sent_s is None:
                own.test_sent_s = now_s
            self.exchange.send(session, f'{{"params":{{"type":"{kind}"}},"method":"heartbeat","jsonrpc":"2.0"}}')
        if own.client_id and now_s >= own.token_until_s:
            self.expire(session)

    def expire(self, session: Session) -> None:
        """Without a valid token the connection is anonymous again, and raw channels end."""
        own: _Connection = session.own
        own.client_id = ""
        for channel in [c for c in session.subs if c.endswith("." + RAW)]:
            self.exchange.unsubscribe(session, channel)

    def notice(self, session: Session, t: int) -> str:
        return _notification("platform_state", f'{{"maintenance":true,"timestamp":{t // 1000}}}')

    def unknown_event(self, session: Session, t: int) -> str:
        return _notification("something_new.BTC-PERPETUAL", f'{{"timestamp":{t // 1000},"z":[1,"2",null]}}')

    def on_text(self, session: Session, text: str) -> None:
        started = self.exchange.clock_us()
        try:
            message = json.loads(text)
        except ValueError:
            self._answer(session, None, started, error=_Rpc(11050, "bad_request", "invalid json"))
            return
        if not isinstance(message, dict) or not isinstance(message.get("method"), str):
            self._answer(session, None, started, error=_Rpc(11050, "bad_request", "method is missing"))
            return
        params = message.get("params") or {}
        if not isinstance(params, dict):
            self._answer(session, message, started, error=_Rpc(-32602, "Invalid params"))
            return
        own: _Connection = session.own
        method = message["method"]
        if not self._pay(own.client_id or session.request.ip, method):
            self.exchange.violation("credits", session)
            self._answer(session, message, started, error=_Rpc(10028, "too_many_requests"))
            self.exchange.hang_up(session, "too_many_requests")
            return
        if method == "public/test" and self.exchange.heartbeats_off(session):
            own.test_sent_s = None
            return
        channels = params.get("channels") if method.endswith("/subscribe") else None
        wanted = [str(channel) for channel in channels] if isinstance(channels, list) else []
        if self.exchange.ignored(session, {channel: _ticker_of(channel) for channel in wanted}):
            return
        try:
            self._answer(session, message, started, self._call(session, method, params))
        except _Rpc as error:
            self._answer(session, message, started, error=error)
            return
        if method.endswith("/subscribe"):
            self._first_messages(session, params["channels"])

    def _answer(
        self,
        session: Session,
        message: dict[str, Any] | None,
        started: int,
        result: object = None,
        error: _Rpc | None = None,
    ) -> None:
        number_of_call = message.get("id") if message else None
        self.exchange.send(
            session, _envelope(number_of_call, message is not None, started, self.exchange.clock_us(), result, error)
        )

    def _pay(self, who: str, method: str) -> bool:
        """Take the credits of a call; subscriptions and the list of instruments have pools of their own."""
        kind = (
            "subscribe"
            if method.endswith("/subscribe")
            else "instruments"
            if method.endswith("get_instruments")
            else "call"
        )
        now_s = self.exchange.now_s
        pool = self.credits.get((who, kind))
        if pool is None:
            pool = self.credits[who, kind] = Credits(self.limit[f"{kind}_pool"], self.limit["refill_per_s"], now_s)
        return pool.take(self.limit[f"{kind}_cost"], now_s)

    def _call(self, session: Session | None, method: str, params: dict[str, Any]) -> object:
        """One JSON-RPC method; without a session it came over HTTP."""
        handler = self.session_methods.get(method.removeprefix("public/").removeprefix("private/"))
        if session is not None and handler is not None:
            return handler(session, params, method.startswith("private/"))
        if method.startswith("private/"):
            raise _Rpc(13009, "unauthorized", {"reason": "invalid_token"})
        answer = self.methods.get(method)
        if answer is None:
            raise _Rpc(-32601, "Method not found")
        return answer(params)

    def _token(self, params: dict[str, Any]) -> tuple[str, dict[str, object]]:
        grant = params.get("grant_type")
        if grant == "client_credentials":
            client_id = str(params.get("client_id", ""))
            if not client_id or self.credentials.get(client_id) != params.get("client_secret"):
                raise _Rpc(13004, "invalid_credentials")
        elif grant == "client_signature":
            client_id = self._signed(params)
        elif grant == "refresh_token":
            client_id = self.refresh.get(str(params.get("refresh_token", "")), "")
            if not client_id:
                raise _Rpc(13009, "unauthorized", {"reason": "invalid_refresh_token"})
        else:
            raise _Rpc(-32602, "Invalid params", {"reason": "unsupported grant type", "param": "grant_type"})
        self.handed_out += 1
        access, refresh = f"sim-access-{self.handed_out}", f"sim-refresh-{self.handed_out}"
        self.tokens[access] = (client_id, self.exchange.now_s + self.limit["token_s"])
        self.refresh[refresh] = client_id
        return client_id, {
            "enabled_features": [],
            "access_token": access,
            "expires_in": int(self.limit["token_s"]),
            "refresh_token": refresh,
            "scope": str(params.get("scope") or "connection mainaccount trade:read"),
            "token_type": "bearer",
        }

    def _signed(self, params: dict[str, Any]) -> str:
        """The client id of a request that proves its secret by a signature instead of showing it."""
        client_id = str(params.get("client_id", ""))
        text = "\n".join(str(params.get(key, "")) for key in ("timestamp", "nonce", "data"))
        secret = self.credentials.get(client_id, "").encode()
        if not secret or hmac.new(secret, text.encode(), hashlib.sha256).hexdigest() != params.get("signature"):
            raise _Rpc(13004, "invalid_credentials")
        return client_id

    def _on_auth(self, session: Session, params: dict[str, Any], _private: bool) -> object:
        if fault := self.exchange.refused(session, "login", ""):
            raise _Rpc(int(fault.number("code")) or 13004, "login refused")
        client_id, result = self._token(params)
        others = sum(1 for s in self.exchange.sessions.values() if s is not session and s.own.client_id == client_id)
        if others >= self.limit["sessions_per_key"]:
            self.exchange.violation("sessions_per_key", session)
            raise _Rpc(10028, "too_many_requests", {"reason": "too many sessions"})
        own: _Connection = session.own
        own.client_id = client_id
        own.token_until_s = self.exchange.now_s + self.limit["token_s"]
        return result

    def _on_set_heartbeat(self, session: Session, params: dict[str, Any], _private: bool) -> object:
        own: _Connection = session.own
        interval, least = params.get("interval"), self.limit["heartbeat_min_s"]
        if not isinstance(interval, int | float) or isinstance(interval, bool) or interval < least:
            raise _Rpc(-32602, "Invalid params", {"reason": f"value must be >= {least:g}", "param": "interval"})
        own.heartbeat_s = float(interval) * self.limit["heartbeat_scale"]
        own.next_heartbeat_s = self.exchange.now_s + own.heartbeat_s
        return "ok"

    def _on_disable_heartbeat(self, session: Session, _params: dict[str, Any], _private: bool) -> object:
        own: _Connection = session.own
        own.next_heartbeat_s, own.test_sent_s = math.inf, None
        return "ok"

    def _on_test(self, session: Session, params: dict[str, Any], _private: bool) -> object:
        own: _Connection = session.own
        own.test_sent_s = None
        return self._test(params)

    def _on_subscribe(self, session: Session, params: dict[str, Any], private: bool) -> object:
        own: _Connection = session.own
        if private and not own.client_id:
            raise _Rpc(13009, "unauthorized", {"reason": "invalid_token"})
        channels = self._channels(params)
        if len(channels) > self.limit["channels_per_call"]:
            self.exchange.violation("channels_per_call", session)
            raise _Rpc(-32602, "Invalid params", {"reason": "too many channels", "param": "channels"})
        known = [channel for channel in channels if self._known(channel)]
        if not own.client_id and any(channel.endswith("." + RAW) for channel in known):
            raise _Rpc(13778, "raw_subscriptions_not_available_for_unauthorized")
        for channel in list(known):
            if fault := self.exchange.refused(session, channel, _ticker_of(channel)):
                if code := int(fault.number("code")):
                    raise _Rpc(code, "subscription refused")
                known.remove(channel)  # left out of the reply, as a channel that does not exist
        params["channels"] = [channel for channel in known if channel not in session.subs]
        return known

    def _first_messages(self, session: Session, channels: list[str]) -> None:
        """Subscribe to what is new to this connection; a book starts with its snapshot, behind the answer."""
        for channel in channels:
            self.exchange.subscribe(session, channel, None)
            silent = self.exchange.faults.silenced(channel, _ticker_of(channel))
            if any(fault.wants_conn(session.id, session.agent) for fault in silent):
                continue
            if found := BOOK.match(channel):
                self.exchange.send(session, self._snapshot(self.names[found["name"]], found["interval"]))
            elif (found := TIMED.match(channel)) and found["what"] == "ticker":
                name, interval = self.names[found["name"]], found["interval"]
                data = name.ticker_told.get(interval, "")
                if not data:
                    data = _numbers(self._ticker_data(name, self.exchange.t))
                    self._ticker_line("first_ticker", name.name, interval, self.exchange.t, data)
                self.exchange.send(session, _notification(channel, data))
            elif (found := PLAIN.match(channel)) and found["what"] == "incremental_ticker":
                data = _numbers({"type": '"snapshot"'} | self._ticker_data(self.names[found["name"]], self.exchange.t))
                self.exchange.send(session, _notification(channel, data))

    @staticmethod
    def _channels(params: dict[str, Any]) -> list[str]:
        channels = params.get("channels")
        if not isinstance(channels, list) or not channels or not all(isinstance(c, str) for c in channels):
            raise _Rpc(-32602, "Invalid params", {"reason": "must be a non-empty list of text", "param": "channels"})
        return list(dict.fromkeys(channels))

    def _known(self, channel: str) -> bool:
        for pattern in (BOOK, GROUPED, PLAIN, TIMED, CHART):
            if found := pattern.match(channel):
                if "resolution" in found.groupdict() and found["resolution"] not in RESOLUTIONS:
                    return False
                return found["name"] in self.names
        return channel == "platform_state" or bool(BY_KIND.match(channel) or STATE.match(channel))

    def _on_unsubscribe(self, session: Session, params: dict[str, Any], _private: bool) -> object:
        gone = [channel for channel in self._channels(params) if channel in session.subs]
        for channel in gone:
            self.exchange.unsubscribe(session, channel)
        return gone

    def _on_unsubscribe_all(self, session: Session, _params: dict[str, Any], _private: bool) -> object:
        for channel in list(session.subs):
            self.exchange.unsubscribe(session, channel)
        return "ok"

    # Methods that both ways of asking have.

    def ban_reply(self, status: int, retry_after_s: int) -> Reply:
        now = self.exchange.clock_us()
        body = _envelope(None, False, now, now, None, _Rpc(10028, "too_many_requests"))
        return Reply(body, status, {"Retry-After": str(retry_after_s)})

    async def http(self, request: Request) -> Reply:
        started = self.exchange.clock_us()
        if not request.path.startswith("/api/v2/"):
            return Reply("", 404)
        method = request.path.removeprefix("/api/v2/")
        if refusal := self._too_many(request.ip):
            return refusal
        if not self._pay(request.ip, method):
            self.exchange.violation("credits")
            return self.ban_reply(429, 1)
        self.http_open[request.ip] += 1
        try:
            params: dict[str, Any] = dict(request.query)
            result = (
                await self._order_book(request, params)
                if method.endswith("/get_order_book")
                else self._call(None, method, params)
            )
        except _Rpc as error:
            status = 401 if error.code in (13009, 13004) else 400
            return Reply(_envelope(None, False, started, self.exchange.clock_us(), None, error), status)
        finally:
            self.http_open[request.ip] -= 1
        return Reply(_envelope(None, False, started, self.exchange.clock_us(), result, None))

    def _test(self, _params: dict[str, Any]) -> object:
        return {"version": "1.2.26"}

    def _instruments(self, params: dict[str, Any]) -> object:
        currency, kind = str(params.get("currency", "any")), str(params.get("kind", "any"))
        rows = []
        halted = self.exchange.halted
        for instrument in (*(name.instrument for name in self.names.values()), *halted.values()):
            settled_in = instrument.quote if instrument.facts["linear"] else instrument.base
            if currency in ("any", settled_in) and kind in ("any", instrument.kind):
                words = _instrument_words(instrument, self.exchange.finer[instrument.ticker])
                if instrument.ticker in halted:
                    words |= {"is_active": "false", "state": '"halted"'}
                rows.append(_Text(_numbers(words)))
        return rows

    def _name(self, params: dict[str, Any]) -> _Name:
        wanted = str(params.get("instrument_name") or "")
        if not wanted:
            raise _Rpc(-32602, "Invalid params", {"reason": "is required", "param": "instrument_name"})
        if wanted not in self.names:
            raise _Rpc(13020, "instrument_not_found")
        return self.names[wanted]

    async def _order_book(self, request: Request, params: dict[str, Any]) -> object:
        name = self._name(params)
        _, change_id, bids, asks = await self.exchange.snapshot(name.book, request.agent)
        return self._book_words(name, _whole(params, "depth", 5, 10_000), change_id, bids, asks)

    def _order_book_now(self, params: dict[str, Any]) -> object:
        name = self._name(params)
        depth = _whole(params, "depth", 5, 10_000)
        return self._book_words(name, depth, name.book.engine_id, name.book.levels(BID), name.book.levels(ASK))

    def _book_words(self, name: _Name, depth: int, change_id: int, bids: list[Level], asks: list[Level]) -> object:
        data = self._ticker_data(name, self.exchange.clock_us())
        book = {"change_id": change_id, "bids": name.pairs(bids[:depth]), "asks": name.pairs(asks[:depth])}
        return _Text(_numbers(data | book))

    def _last_trades_by_seq(self, params: dict[str, Any]) -> object:
        return self._last_trades(params, lambda trade: trade.id, ("start_seq", "end_seq"))

    def _last_trades_by_time(self, params: dict[str, Any]) -> object:
        return self._last_trades(params, lambda trade: trade.t // 1000, ("start_timestamp", "end_timestamp"))

    def _last_trades(self, params: dict[str, Any], key: Callable[[Trade], int], bounds: tuple[str, str]) -> object:
        """Trades between two bounds, both included; without a start the newest ones."""
        name = self._name(params)
        first, last = (_whole(params, bound, -1, 2**62) for bound in bounds)
        count = max(1, _whole(params, "count", 10, 1000))
        chosen = [t for t in name.book.trades if key(t) >= first and (last < 0 or key(t) <= last)]
        sorting = params.get("sorting", "default")
        from_start = first >= 0 and sorting in ("asc", "default")
        kept = chosen[:count] if from_start else chosen[-count:]
        if sorting == "desc" or (sorting == "default" and first < 0):
            kept = kept[::-1]
        mark, index, direction, last_price = name.mark(), name.index(), name.tick_direction, name.last_price
        texts = [self._trade_text(name, trade, mark, index) for trade in kept]
        name.tick_direction, name.last_price = direction, last_price
        return {"has_more": len(chosen) > len(kept), "trades": [_Text(text) for text in texts]}

    def _chart_data(self, params: dict[str, Any]) -> object:
        name = self._name(params)
        resolution = str(params.get("resolution", ""))
        if resolution not in RESOLUTIONS:
            raise _Rpc(-32602, "Invalid params", {"reason": "unknown resolution", "param": "resolution"})
        start, end = (_whole(params, bound, -1, 2**62) for bound in ("start_timestamp", "end_timestamp"))
        candles = self.exchange.market.candles[name.name]
        rows = [*candles.closed[resolution], candles.open[resolution]]
        chosen = [_candle_words(name, c) for c in rows if start <= c.start // 1000 <= (end if end >= 0 else 2**62)]
        columns = {
            "ticks": "tick",
            "open": "open",
            "high": "high",
            "low": "low",
            "close": "close",
            "volume": "volume",
            "cost": "cost",
        }
        data = {column: "[" + ",".join(str(row[key]) for row in chosen) + "]" for column, key in columns.items()}
        return _Text(_numbers({"status": '"ok"' if chosen else '"no_data"', **data}))


class _Text:
    """JSON that is ready."""

    def __init__(self, text: str) -> None:
        self.text = text


def _json(value: object) -> str:
    """JSON of plain values, with ready texts put in where they stand."""
    if isinstance(value, _Text):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_json(item) for item in value) + "]"
    return json.dumps(value)


def _numbers(data: Mapping[str, Any]) -> str:
    """JSON of a flat object whose text values are already JSON, so that numbers stay as they are written."""
    return "{" + ",".join(f'"{key}":{_numbers(v) if isinstance(v, dict) else v}' for key, v in data.items()) + "}"


def _notification(channel: str, data: str) -> str:
    return f'{{"jsonrpc":"2.0","method":"subscription","params":{{"channel":"{channel}","data":{data}}}}}'


def _envelope(
    number_of_call: object, numbered: bool, started: int, ended: int, result: object, error: _Rpc | None
) -> str:
    body: dict[str, object] = {"jsonrpc": "2.0"}
    if numbered and number_of_call is not None:
        body["id"] = number_of_call
    if error is None:
        body["result"] = result
    else:
        data = {} if error.data is None else {"data": error.data}
        body["error"] = {"code": error.code, **data, "message": error.message}
    return _json(body | {"usIn": started, "usOut": ended, "usDiff": ended - started, "testnet": False})


def _ticker_of(channel: str) -> str:
    """The instrument that a channel names; empty for channels of many."""
    for pattern in (BOOK, GROUPED, PLAIN, TIMED, CHART):
        if found := pattern.match(channel):
            return found["name"]
    return ""


def _whole(params: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = params.get(name)
    if value is None:
        return default
    try:
        return min(int(value), most)
    except (TypeError, ValueError):
        raise _Rpc(-32602, "Invalid params", {"reason": "must be an integer", "param": name}) from None


def _volumes(name: _Name, candle: Candle) -> tuple[str, str]:
    """Volume in base coins and in the quote currency; inverse contracts are counted in the quote currency."""
    instrument = name.instrument
    step, price = instrument.lot / 10**instrument.qty_scale, instrument.tick / 10**instrument.price_scale
    if instrument.kind == "future" and not instrument.facts["linear"]:
        return number(round(candle.coins * step / price * 1e8), 8), number(
            candle.lots * instrument.lot, instrument.qty_scale
        )
    return number(candle.lots * instrument.lot, instrument.qty_scale), number(
        round(candle.value * step * price * 1e4), 4
    )


def _candle_words(name: _Name, candle: Candle) -> dict[str, Any]:
    volume, cost = _volumes(name, candle)
    prices = {key: name.price(getattr(candle, key)) for key in ("open", "high", "low", "close")}
    return {"tick": candle.start // 1000, **prices, "volume": volume, "cost": cost}


def _instrument_words(instrument: Instrument, finer: int) -> dict[str, Any]:
    facts, linear = instrument.facts, bool(instrument.facts["linear"])
    option = instrument.kind == "option"
    lot = number(instrument.lot, instrument.qty_scale)
    settled_in = instrument.quote if linear else instrument.base
    words: dict[str, Any] = {
        "price_index": f'"{instrument.base.lower()}_{"usdc" if linear else "usd"}"',
        "kind": f'"{instrument.kind}"',
        "instrument_name": f'"{instrument.ticker}"',
        "maker_commission": "0.0",
        "taker_commission": "5.0e-4",
        "instrument_type": '"linear"' if linear else '"reversed"',
        "expiration_timestamp": _expiry_ms(str(facts["expiry"])) if facts["expiry"] else FAR_FUTURE_MS,
        "creation_timestamp": 1_534_167_754_000,
        "is_active": "true",
        "state": '"open"',
        "tick_size": number(instrument.tick, instrument.price_scale + finer),
        "tick_size_steps": "[]",
        "contract_size": "1.0" if option else lot,
        "instrument_id": 100_000 + sum(instrument.ticker.encode()),
        "min_trade_amount": lot,
        "settlement_currency": f'"{settled_in}"',
        "settlement_period": '"perpetual"' if not facts["expiry"] else '"month"',
        "base_currency": f'"{instrument.base}"',
        "counter_currency": f'"{"USD" if option and not linear else instrument.quote}"',
        "quote_currency": f'"{instrument.quote}"',
    }
    if option:
        return words | {"strike": number(int(str(facts["strike"])), 0), "option_type": f'"{facts["option_type"]}"'}
    return words | {"future_type": words["instrument_type"], "max_leverage": 50}


def _expiry_ms(day: str) -> int:
    """08:00 UTC of a day written like 25DEC26."""
    return int(datetime.strptime(day, "%d%b%y").replace(hour=8, tzinfo=UTC).timestamp() * 1000)
