"""OKX as a simulated exchange: public and business channels, login, text pings, requests per hour, and its REST answers.

Written from okx.com/docs-v5/en (2026) and from recorded frames; deliberately not from our own decoder, so that each
can prove the other wrong. Contracts are counted in contracts; what they are worth stands in the list of instruments.
"""

import base64
import hashlib
import hmac
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, ClassVar

from tools.sim.faults import shown
from tools.sim.ledger import Dialect
from tools.sim.market import ASK, BID, Action, Book, Candle, Instrument, Trade, plain
from tools.sim.server import Exchange, Level, Reply, Request, Session, Venue, Window

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
PUBLIC, BUSINESS = "/ws/v5/public", "/ws/v5/business"
SLOW, FAST = "books", "books-l2-tbt"
BOOK_EVERY_US = {FAST: 10_000, SLOW: 100_000}
LEVELS_MAX = 400
LIQUIDATION_EVERY = 20  # one of so many trades of a contract is told as a liquidation
CONTRACT_CHANNELS = ("mark-price", "open-interest")
BY_TICKER = ("trades", SLOW, FAST, "bbo-tbt", "tickers")
BARS = {
    "1s": SECOND_US, "1m": MINUTE_US, "3m": 3 * MINUTE_US, "5m": 5 * MINUTE_US, "15m": 15 * MINUTE_US,
    "30m": 30 * MINUTE_US, "1H": 60 * MINUTE_US, "2H": 120 * MINUTE_US, "4H": 240 * MINUTE_US,
    "6Hutc": 360 * MINUTE_US, "12Hutc": 720 * MINUTE_US, "1Dutc": 1440 * MINUTE_US,
}  # fmt: skip
# Coins: price and tick in 10**-price_scale, price_scale, lot of the spot market in 10**-4, usual size in lots.
KNOWN: dict[str, tuple[int, int, int, int, int]] = {
    "BTC": (830_000, 1, 1, 1, 2_000),
    "ETH": (281_234, 1, 2, 1, 20_000),
    "SOL": (14_123, 1, 2, 10, 5_000),
}
# Linear and inverse contract values of a coin.
CONTRACTS = {"BTC": ("0.01", "100"), "ETH": ("0.1", "10"), "SOL": ("1", "10")}
_NO_LOGIN, _TIER, _WRONG_CHANNEL, _BAD_REQUEST, _TOO_FREQUENT = "60011", "64003", "60018", "60012", "60014"
_Refusal = tuple[str, str]  # code, text


class _Connection:
    """What the venue knows about one WebSocket."""

    def __init__(self, requests: Window, now_s: float) -> None:
        self.requests = requests
        self.logged_in = False
        self.active_s = now_s  # when something last came or went
        self.sent = 0


class _Waiting:
    """Levels that wait for the next message of one book channel, with their quantity when last published."""

    def __init__(self, seq_id: int) -> None:
        self.levels: dict[tuple[int, int], int] = {}
        self.seq_id = seq_id  # of the last message
        self.published_us = 0


class _Name:
    """One instrument: its texts, and what waits for the timers."""

    def __init__(self, book: Book) -> None:
        self.book, self.instrument, self.name = book, book.instrument, book.instrument.ticker
        self.facts = book.instrument.facts
        self.type = str(self.facts["type"])
        self.base = 0  # what is taken off the market's own ids since messages were numbered anew
        self.waiting = {channel: _Waiting(book.engine_id) for channel in BOOK_EVERY_US}
        self.ticker_dirty = self.chart_dirty = False
        self.marked: dict[str, str] = {}  # channel -> what it told last
        self.ticker_us = 0  # when its statistics were told last
        self.last_price = book.instrument.start
        self.fills = 0

    @property
    def seq_id(self) -> int:
        return self.book.engine_id - self.base

    def price(self, ticks: int) -> str:
        """As the venue writes prices: without zeros at the end."""
        text = plain(ticks * self.instrument.tick, self.instrument.price_scale)
        return text.rstrip("0").rstrip(".") if "." in text else text

    def size(self, lots: int) -> str:
        text = plain(lots * self.instrument.lot, self.instrument.qty_scale)
        return text.rstrip("0").rstrip(".") if "." in text else text

    def level(self, level: Level) -> str:
        price, lots = level
        return f'["{self.price(price)}","{self.size(lots)}","0","{1 if lots else 0}"]'

    def levels(self, levels: Iterable[Level]) -> str:
        return "[" + ",".join(map(self.level, levels)) + "]"

    def texts(self, levels: Iterable[Level]) -> str:
        return "[" + ",".join(f'["{self.price(price)}","{self.size(lots)}"]' for price, lots in levels) + "]"

    def mark(self) -> str:
        """The mark price: the middle of the book, a decimal finer than the tick."""
        return plain(self.book.mid2() * self.instrument.tick * 5, self.instrument.price_scale + 1)

    def index(self) -> str:
        """The index: a little below the mark, so that the two differ as they do in life."""
        scale = self.instrument.price_scale + 2
        return plain(self.book.mid2() * self.instrument.tick * 50 * 9997 // 10_000, scale)

    def volumes(self, candle: Candle) -> tuple[str, str, str]:
        """Volume as the venue counts sizes, in base units, and in quote units."""
        unit, price = (
            self.instrument.lot / 10**self.instrument.qty_scale,
            self.instrument.tick / 10**self.instrument.price_scale,
        )
        size, worth = self.size(candle.lots), float(str(self.facts["worth"]))
        if self.type == "SPOT":
            return size, size, f"{candle.value * unit * price:.6f}"
        if self.facts["linear"]:
            return size, f"{candle.lots * unit * worth:.8f}", f"{candle.value * unit * price * worth:.6f}"
        return size, f"{candle.coins * unit / price * worth:.8f}", f"{candle.lots * unit * worth:.6f}"


class Okx(Venue):
    name: ClassVar[str] = "okx"
    shown_faults: ClassVar[tuple[str, ...]] = shown("books:", "trades:")
    tickers: ClassVar[tuple[str, ...]] = ("BTC-USDT", "BTC-USDT-SWAP", "ETH-USD-SWAP", "BTC-USD-261225-90000-C")
    dialect: ClassVar[Dialect] = Dialect(
        1000,
        SLOW,
        {
            "last": "last",
            "open_24h": "open24h",
            "high_24h": "high24h",
            "low_24h": "low24h",
            "volume_24h": "volume_base",
            "quote_volume_24h": "volume_quote",
            "bid_price": "bidPx",
            "ask_price": "askPx",
            "mark_price": "markPx",
            "index_price": "idxPx",
            "funding_rate": "fundingRate",
            "open_interest": "oi",
        },
        bbo_has_id=True,
        bbo_has_time=True,
        candle_has_time=False,
        candle_counts_trades=False,
        intervals={"1h": "1H", "2h": "2H", "4h": "4H", "6h": "6Hutc", "12h": "12Hutc", "1d": "1Dutc"},
        candle_says_closed=True,
    )
    limits: ClassVar[dict[str, float]] = {
        "connects_max": 3,
        "connects_window_s": 1,
        "requests_per_hour": 480,
        "request_bytes": 65_536,
        "silent_s": 30,
        "keep_alive_s": 60,
        "tier_ok": 1,
        "rest_window_s": 2,
        "history_max": 20,
        "instruments_max": 20,
        "rest_max": 40,
    }
    intervals: ClassVar[dict[str, int]] = BARS
    notes: ClassVar[str] = (
        "/ws/v5/public and /ws/v5/business (candles, trades-all), GET /api/v5/...; books-l2-tbt needs a login with an"
        " accepted --credential KEY:SECRET/PASSPHRASE and tier_ok=1; merged trades, books of 100 and 10 ms, bbo-tbt,"
        " tickers, marks, candles, liquidation-orders, instruments. Ledger streams: books, books-l2-tbt."
    )

    def __init__(self, exchange: Exchange, limits: Mapping[str, float], credentials: Mapping[str, str]) -> None:
        super().__init__(exchange, limits, credentials)
        self.names = {ticker: _Name(book) for ticker, book in exchange.market.books.items()}
        self.connects: dict[str, Window] = {}
        self.rest: dict[tuple[str, str], Window] = {}
        self.indices: dict[str, str] = {}  # what each one was told to be last

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        """The instrument that a name describes: spot, perpetual, dated future or option; linear or inverse."""
        base, quote, *rest = ticker.split("-")
        price, tick, price_scale, lot, size = KNOWN.get(base, (12_345, 1, 2, 100, 20_000))
        linear_value, inverse_value = CONTRACTS.get(base, ("10", "10"))
        facts: dict[str, object] = {
            "type": "SPOT",
            "linear": True,
            "worth": "1",
            "value": "",
            "multiple": "",
            "unit": "",
        }
        if not rest:
            return Instrument(ticker, base, quote, tick, price_scale, lot, 4, price // tick, size, busy, "spot", facts)
        linear = quote != "USD" or ticker.startswith(f"{base}-USD_")
        facts |= {"linear": linear, "value": linear_value if linear else inverse_value, "multiple": "1"}
        facts |= {"type": "SWAP" if rest == ["SWAP"] else "FUTURES", "unit": base if linear else "USD"}
        facts |= {"worth": facts["value"], "expiry": rest[0]}
        if len(rest) == 3:
            facts |= {"type": "OPTION", "linear": True, "value": "1", "multiple": "0.01", "unit": base, "worth": "0.01"}
            facts |= {"strike": rest[1], "option": rest[2]}
            return Instrument(ticker, base, "USD", 1, 4, 1, 0, 250, 120, busy, "option", facts)
        lots = (1, 2) if linear else (1, 0)
        return Instrument(
            ticker, base, quote, tick, price_scale, *lots, price // tick, 300, busy, str(facts["type"]).lower(), facts
        )

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}-USDT"

    def first_book(self, book: Book) -> dict[str, object]:
        name = self.names[book.instrument.ticker]
        bids, asks = ([[name.price(p), name.size(q)] for p, q in book.levels(side)] for side in (BID, ASK))
        return {"last": name.seq_id, "bids": bids, "asks": asks}

    def listed(self, book: Book, t: int) -> None:
        self.names[book.instrument.ticker] = _Name(book)
        self._tell_state(book.instrument, "live")

    def delisted(self, book: Book, t: int) -> None:
        self.finish(t)
        del self.names[book.instrument.ticker]
        self._tell_state(book.instrument, "suspend")

    def _tell_state(self, instrument: Instrument, state: str) -> None:
        words = self._instrument_words(instrument) | {"state": state}
        kind = words["instType"]
        arg = f'{{"channel":"instruments","instType":"{kind}"}}'
        self._push(f"instruments:{kind}", instrument.ticker, arg, _json(words))

    def renumber(self, book: Book) -> None:
        """The next message of each book channel names its predecessor and has a smaller number than that."""
        name = self.names[book.instrument.ticker]
        name.base += name.seq_id - 1000

    # The market put into words.

    def _push(
        self, stream: str, ticker: str, arg: str, data: str, first: int = 0, last: int = 0, action: str = ""
    ) -> None:
        self.exchange.publish(stream, ticker, lambda _form: _frame(arg, data, action), first, last)

    def _tell(self, channel: str, name: _Name, data: str, first: int = 0, last: int = 0, action: str = "") -> None:
        """A push of a channel that has an instrument."""
        self._push(f"{channel}:{name.name}", name.name, _arg(channel, name.name), data, first, last, action)

    def on_action(self, book: Book, action: Action) -> None:
        name = self.names[book.instrument.ticker]
        if action.trades:
            self._on_trades(name, action)
        for waiting in name.waiting.values():
            for side, price, before, _ in action.changes:
                waiting.levels.setdefault((side, price), before)
        if action.best_changed:
            self._best(name, action)
        name.ticker_dirty |= action.best_changed or bool(action.trades)

    def _on_trades(self, name: _Name, action: Action) -> None:
        """Every fill on `trades-all`; on `trades` the fills of one order at one price as one, under the last id."""
        ledger, ticker = self.exchange.ledger, name.name
        name.chart_dirty, name.last_price = True, action.trades[-1].price
        for trade in action.trades:
            words = self._fill_words(name, trade)
            ledger.line(
                "trade",
                ticker,
                f'{{"kind":"trade","ticker":"{ticker}","id":"{trade.id}","seq":{trade.id},"price":"{words["px"]}",'
                f'"qty":"{words["sz"]}","side":"{words["side"].upper()}","t":{trade.t}}}',
            )
            self._tell("trades-all", name, _json({**words, "source": "0"}), trade.id, trade.id)
            self._liquidate(name, trade)
        for _, group in groupby(action.trades, lambda trade: trade.agg_id):
            fills = list(group)
            words = self._fill_words(name, fills[-1]) | {"sz": name.size(sum(fill.lots for fill in fills))}
            first, last = fills[0].id, fills[-1].id
            ledger.line(
                "aggtrade",
                ticker,
                f'{{"kind":"aggtrade","ticker":"{ticker}","id":"{last}","first":{first},"last":{last},'
                f'"price":"{words["px"]}","qty":"{words["sz"]}","side":"{words["side"].upper()}","t":{action.t}}}',
            )
            more = {"count": str(len(fills)), "source": "0", "seqId": name.seq_id}
            self._tell("trades", name, _json(words | more), first, last)

    @staticmethod
    def _fill_words(name: _Name, trade: Trade) -> dict[str, Any]:
        side = "buy" if trade.side > 0 else "sell"
        words = {"instId": name.name, "tradeId": str(trade.id), "px": name.price(trade.price)}
        return words | {"sz": name.size(trade.lots), "side": side, "ts": str(trade.t // 1000)}

    def _liquidate(self, name: _Name, trade: Trade) -> None:
        """Now and then a trade was forced; all instruments of a type are told on one channel."""
        name.fills += 1
        if name.type == "SPOT" or name.fills % LIQUIDATION_EVERY:
            return
        side, price, size = ("buy" if trade.side > 0 else "sell"), name.price(trade.price), name.size(trade.lots)
        self.exchange.ledger.record(
            "liquidation", ticker=name.name, price=price, qty=size, side=side.upper(), t=trade.t
        )
        detail = {"bkLoss": "0", "bkPx": price, "ccy": "", "posSide": "short" if side == "buy" else "long"}
        detail |= {"side": side, "sz": size, "ts": str(trade.t // 1000)}
        uly = _underlying(name.instrument)
        row = {
            "details": [detail],
            "instFamily": _family(name.instrument),
            "instId": name.name,
            "instType": name.type,
            "uly": uly,
        }
        arg = f'{{"channel":"liquidation-orders","instType":"{name.type}"}}'
        self._push(f"liquidation-orders:{name.type}", name.name, arg, _json(row))

    def _best(self, name: _Name, action: Action) -> None:
        bid, ask = name.book.best(BID), name.book.best(ASK)
        seq_id = name.seq_id
        prices = [name.price(bid[0]), name.size(bid[1]), name.price(ask[0]), name.size(ask[1])]
        self.exchange.ledger.line(
            "bbo",
            name.name,
            f'{{"kind":"bbo","ticker":"{name.name}","id":{seq_id},"bid":"{prices[0]}","bid_qty":"{prices[1]}",'
            f'"ask":"{prices[2]}","ask_qty":"{prices[3]}","t":{action.t}}}',
        )
        data = f'{{"asks":[{name.level(ask)}],"bids":[{name.level(bid)}],"ts":"{action.t // 1000}","seqId":{seq_id}}}'
        self._tell("bbo-tbt", name, data, seq_id, seq_id)

    def _book(self, name: _Name, channel: str, t: int) -> None:
        """One message of a book channel, if anything is different from the one before; else, rarely, a sign of life."""
        waiting, book = name.waiting[channel], name.book
        changed: tuple[list[Level], list[Level]] = ([], [])
        for (side, price), before in waiting.levels.items():
            if (after := book.level(side, price)) != before:
                changed[side].append((price, after))
        waiting.levels.clear()
        previous = waiting.seq_id
        if not changed[BID] and not changed[ASK]:
            if t - waiting.published_us >= self.limit["keep_alive_s"] * SECOND_US and waiting.published_us:
                waiting.published_us = t
                self._tell(channel, name, _book_data("[]", "[]", t, previous, previous), previous, previous, "update")
            return
        changed[BID].sort(reverse=True)
        changed[ASK].sort()
        seq_id = waiting.seq_id = name.seq_id
        waiting.published_us = t
        if self.exchange.ledger.writing:
            bids, asks = (name.texts(levels) for levels in changed)
        else:
            bids = asks = ""
        self.exchange.ledger.line(
            "book",
            name.name,
            f'{{"kind":"book","ticker":"{name.name}","stream":"{channel}","first":{seq_id},"last":{seq_id},'
            f'"prev":{previous},"bids":{bids},"asks":{asks},"t":{t}}}',
        )
        stream = f"{channel}:{name.name}"
        if stream in self.exchange.streams:
            data = _book_data(name.levels(changed[BID]), name.levels(changed[ASK]), t, previous, seq_id)
            self._push(stream, name.name, _arg(channel, name.name), data, seq_id, seq_id, "update")

    def _snapshot(self, name: _Name, channel: str) -> str:
        """The book as it was at the last message of this channel, so that the next update follows it."""
        waiting = name.waiting[channel]
        sides: list[str] = []
        for side in (BID, ASK):
            levels = dict(name.book.levels(side))
            for (changed_side, price), before in waiting.levels.items():
                if changed_side == side:
                    levels[price] = before
            ordered = sorted(((p, q) for p, q in levels.items() if q), reverse=side == BID)
            sides.append(name.levels(ordered[:LEVELS_MAX]))
        data = _book_data(sides[BID], sides[ASK], self.exchange.t, -1, waiting.seq_id)
        return _frame(_arg(channel, name.name), data, "snapshot")

    # Statistics and marks.

    def _ticker_words(self, name: _Name, t: int) -> dict[str, str]:
        day, book = self.exchange.market.day[name.name], name.book
        (bid, bid_lots), (ask, ask_lots) = book.best(BID), book.best(ASK)
        size, base, quote = name.volumes(day)
        words = {
            "instType": name.type, "instId": name.name, "last": name.price(name.last_price) if day.trades else "",
            "lastSz": "", "askPx": name.price(ask), "askSz": name.size(ask_lots), "bidPx": name.price(bid),
            "bidSz": name.size(bid_lots), "open24h": name.price(day.open), "high24h": name.price(day.high),
            "low24h": name.price(day.low), "sodUtc0": name.price(day.open), "sodUtc8": name.price(day.open),
        }  # fmt: skip
        return words | {"volCcy24h": quote if name.type == "SPOT" else base, "vol24h": size, "ts": str(t // 1000)}

    def _ticker_truth(self, name: _Name, words: Mapping[str, str]) -> dict[str, str]:
        """What the message says, with its volumes by what they are; nothing stands where it says nothing."""
        _, base, quote = name.volumes(self.exchange.market.day[name.name])
        more = {"volume_base": base, "volume_quote": quote if name.type == "SPOT" else ""}
        return {key: value for key, value in {**words, **more}.items() if value}

    def _marks(self, name: _Name, t: int) -> dict[str, dict[str, str]]:
        """What the channels of marks say of a contract now, without the time."""
        who = {"instId": name.name, "instType": name.type}
        day = self.exchange.market.day[name.name]
        marks = {
            "mark-price": {**who, "markPx": name.mark()},
            "open-interest": {**who, "oi": name.size(1_000_000 + day.lots), "oiCcy": name.volumes(day)[1]},
            "index-tickers": {
                "instId": _underlying(name.instrument),
                "idxPx": self._index_of(_underlying(name.instrument)),
            },
        }
        if name.type == "SWAP":
            marks["funding-rate"] = who | {
                "formulaType": "withRate", "fundingRate": f"0.0000{len(name.book.prices[BID]):03d}21",
                "fundingTime": str((t // (480 * MINUTE_US) + 1) * 480 * 60_000), "method": "current_period",
                "nextFundingRate": "", "nextFundingTime": str((t // (480 * MINUTE_US) + 2) * 480 * 60_000),
            }  # fmt: skip
        return marks

    def _index_of(self, uly: str) -> str:
        return next(name.index() for name in self.names.values() if _underlying(name.instrument) == uly)

    def _mark_line(self, kind: str, name: _Name, t: int, words: Mapping[str, str]) -> None:
        self.exchange.ledger.record(kind, ticker=name.name, t=t, data=words)

    def _tick(self, t: int) -> None:
        """Each 100 ms: statistics of what has changed."""
        for name in self.names.values():
            if name.ticker_dirty:
                name.ticker_dirty = False
                words, name.ticker_us = self._ticker_words(name, t), t
                self._mark_line("ticker", name, t, self._ticker_truth(name, words))
                self._tell("tickers", name, _json(words))

    def _tick_marks(self, t: int) -> None:
        """Each 200 ms: marks that have changed. An index is told once, to all instruments that have it."""
        indices: dict[str, list[_Name]] = defaultdict(list)
        for name in self.names.values():
            if name.type == "SPOT":
                continue
            indices[_underlying(name.instrument)].append(name)
            for channel, words in self._marks(name, t).items():
                if channel != "index-tickers" and name.marked.get(channel) != (told := _json(words)):
                    name.marked[channel] = told
                    self._mark_line("ticker", name, t, words)
                    self._tell(channel, name, _json(words | {"ts": str(t // 1000)}))
        for uly, names in indices.items():
            if self.indices.get(uly) == (price := self._index_of(uly)):
                continue
            self.indices[uly] = price
            words = {"instId": uly, "idxPx": price}
            for name in names:
                self._mark_line("ticker", name, t, words)
            arg = _arg("index-tickers", uly)
            self._push(f"index-tickers:{uly}", uly, arg, _json(words | {"ts": str(t // 1000)}))

    def timers(self) -> list[tuple[int, Callable[[int], None]]]:
        return [
            (BOOK_EVERY_US[FAST], lambda t: self._books(FAST, t)),
            (BOOK_EVERY_US[SLOW], lambda t: self._books(SLOW, t)),
            (100_000, self._tick),
            (200_000, self._tick_marks),
            (SECOND_US, self._charts),
        ]

    def _books(self, channel: str, t: int) -> None:
        for name in self.names.values():
            if name.waiting[channel].levels or channel == SLOW:
                self._book(name, channel, t)

    def finish(self, t: int) -> None:
        self._books(FAST, t)
        self._books(SLOW, t)
        self._tick(t)

    def _charts(self, t: int) -> None:
        """Once a second: candles that are over, said to be so, and the open ones of what has traded."""
        for name in self.names.values():
            candles = self.exchange.market.candles[name.name]
            for bar, candle in candles.roll(t):
                self._candle(name, bar, candle, t, True)
            if not name.chart_dirty:
                continue
            name.chart_dirty = False
            for bar, candle in candles.open.items():
                if f"candle{bar}:{name.name}" in self.exchange.streams:
                    self._candle(name, bar, candle, t, False)

    def _candle(self, name: _Name, bar: str, candle: Candle, t: int, closed: bool) -> None:
        row = _candle_row(name, candle, closed)
        keys = dict(zip(("open", "high", "low", "close"), row[1:5], strict=True))
        self.exchange.ledger.record(
            "candle",
            ticker=name.name,
            interval=bar,
            open_time=candle.start,
            **keys,
            volume=name.volumes(candle)[1],
            trades=candle.trades,
            closed=closed,
            t=t,
        )
        self._tell(f"candle{bar}", name, _json(row))

    # WebSocket.

    def refuse_ws(self, request: Request) -> Reply | None:
        if request.path not in (PUBLIC, BUSINESS):
            return Reply("", 404)
        window = self.connects.setdefault(
            request.ip, Window(self.limit["connects_max"], self.limit["connects_window_s"])
        )
        if window.allow(self.exchange.now_s):
            return None
        self.exchange.violation("connects")
        return self.ban_reply(429, 1)

    def opened(self, session: Session) -> None:
        session.own = _Connection(Window(self.limit["requests_per_hour"], 3600), self.exchange.now_s)

    def keep(self, session: Session, now_s: float) -> None:
        """A connection on which nothing came or went for half a minute is ended."""
        own: _Connection = session.own
        if session.sent != own.sent:
            own.sent, own.active_s = session.sent, now_s
        if now_s - own.active_s >= self.limit["silent_s"]:
            self.exchange.violation("silent", session)
            self.exchange.hang_up(session, "No data received in 30s", 4004)

    def expire(self, session: Session) -> None:
        """Without a login the fast books end."""
        own: _Connection = session.own
        own.logged_in = False
        for stream in [s for s in session.subs if s.startswith(f"{FAST}:")]:
            self.exchange.unsubscribe(session, stream)

    def notice(self, session: Session, t: int) -> str:
        text = "The connection will soon be closed for a service upgrade. Please reconnect."
        return _json({"event": "notice", "msg": text, "code": "64008", "connId": _conn(session)})

    def unknown_event(self, session: Session, t: int) -> str:
        return _frame(_arg("something-new", "BTC-USDT"), f'{{"ts":"{t // 1000}","z":[1,"2",null]}}')

    def on_text(self, session: Session, text: str) -> None:
        own: _Connection = session.own
        own.active_s = self.exchange.now_s
        if text == "ping":
            if not self.exchange.heartbeats_off(session):
                self.exchange.send(session, "pong")
            return
        try:
            message = json.loads(text)
        except ValueError:
            message = None
        args = message.get("args") if isinstance(message, dict) else None
        if not isinstance(args, list) or not args or not all(isinstance(arg, dict) for arg in args):
            self._error(session, message, (_BAD_REQUEST, f"Invalid request: {text[:200]}"))
        elif len(text.encode()) > self.limit["request_bytes"]:
            self.exchange.violation("request_bytes", session)
            self._error(session, message, (_BAD_REQUEST, "Invalid request: too long"))
        elif not own.requests.allow(self.exchange.now_s):
            self.exchange.violation("requests_per_hour", session)
            self._error(session, message, (_TOO_FREQUENT, "Requests too frequent"))
        elif message.get("op") == "login":
            self._login(session, message, args[0])
        elif message.get("op") == "subscribe":
            if self.exchange.ignored(session, {_stream_of(arg): str(arg.get("instId", "")) for arg in args}):
                return
            for arg in args:
                self._subscribe(session, message, arg)
        elif message.get("op") == "unsubscribe":
            for arg in args:
                self.exchange.unsubscribe(session, _stream_of(arg))
                self._reply(session, message, "unsubscribe", arg)
        else:
            self._error(session, message, (_BAD_REQUEST, f"Invalid request: {text[:200]}"))

    def _reply(self, session: Session, message: Mapping[str, Any], event: str, arg: Mapping[str, Any]) -> None:
        head = {"id": message["id"]} if "id" in message else {}
        self.exchange.send(session, _json({**head, "event": event, "arg": arg, "connId": _conn(session)}))

    def _error(self, session: Session, message: Any, refusal: _Refusal) -> None:
        head = {"id": message["id"]} if isinstance(message, dict) and "id" in message else {}
        code, text = refusal
        self.exchange.send(
            session, _json({**head, "event": "error", "msg": text, "code": code, "connId": _conn(session)})
        )

    def _login(self, session: Session, message: Mapping[str, Any], arg: Mapping[str, Any]) -> None:
        """A signature over the time and the path, made with the secret; and the passphrase of the key."""
        now, own = str(arg.get("timestamp", "")), session.own
        secret, _, passphrase = self.credentials.get(str(arg.get("apiKey", "")), "").partition("/")
        sign = hmac.new(secret.encode(), f"{now}GET/users/self/verify".encode(), hashlib.sha256).digest()
        if fault := self.exchange.refused(session, "login", ""):
            self._error(session, message, (f"{fault.number('code') or 60007:.0f}", "Login refused"))
        elif not secret:
            self._error(session, message, ("60032", "API key doesn't exist"))
        elif not now.isdigit() or abs(int(now) - self.exchange.clock_us() / SECOND_US) > 30:
            self._error(session, message, ("60006", "Timestamp request expired"))
        elif base64.b64encode(sign).decode() != arg.get("sign"):
            self._error(session, message, ("60007", "Invalid sign"))
        elif passphrase != arg.get("passphrase"):
            self._error(session, message, ("60024", "Wrong passphrase"))
        else:
            own.logged_in = True
            self.exchange.send(session, _json({"event": "login", "code": "0", "msg": "", "connId": _conn(session)}))

    def _subscribe(self, session: Session, message: Mapping[str, Any], arg: Mapping[str, Any]) -> None:
        stream = _stream_of(arg)
        if refusal := self._refusal(session, arg, stream):
            self._error(session, message, refusal)
            return
        self._reply(session, message, "subscribe", arg)
        if stream in session.subs:
            return
        self.exchange.subscribe(session, stream, None)
        ticker = str(arg.get("instId", ""))
        silent = self.exchange.faults.silenced(stream, ticker)
        if not any(fault.wants_conn(session.id, session.agent) for fault in silent):
            self._greet(session, str(arg["channel"]), ticker)

    def _greet(self, session: Session, channel: str, ticker: str) -> None:
        """Behind the answer: a book, or what a channel of statistics tells now."""
        now = self.exchange.clock_us()
        t = now - now % 100_000 + 37_000  # a time that no timer has, so that it is told apart from what follows
        if channel in BOOK_EVERY_US:
            self.exchange.send(session, self._snapshot(self.names[ticker], channel))
        elif channel == "tickers":
            words = self._ticker_words(self.names[ticker], t)
            self._mark_line("first_ticker", self.names[ticker], t, self._ticker_truth(self.names[ticker], words))
            self.exchange.send(session, _frame(_arg(channel, ticker), _json(words)))
        elif channel in (*CONTRACT_CHANNELS, "funding-rate", "index-tickers"):
            served = [
                n for n in self.names.values() if n.type != "SPOT" and ticker in (n.name, _underlying(n.instrument))
            ]
            served = [n for n in served if channel == "index-tickers" or n.name == ticker]
            words = self._marks(served[0], t)[channel]
            for name in served:
                self._mark_line("first_ticker", name, t, words)
            self.exchange.send(session, _frame(_arg(channel, ticker), _json(words | {"ts": str(t // 1000)})))

    def _refusal(self, session: Session, arg: Mapping[str, Any], stream: str) -> _Refusal | None:
        """Why a subscription is refused, if it is."""
        channel, ticker = str(arg.get("channel", "")), str(arg.get("instId", ""))
        own: _Connection = session.own
        key = "instType" if "instType" in arg else "instId"
        wrong = (
            f"Wrong URL or channel:{channel},{key}:{arg.get(key, '')} doesn't exist. Please use the correct URL, channel"
            " and parameters referring to API document."
        )
        if not self._exists(session.request.path, channel, ticker, str(arg.get("instType", ""))):
            return _WRONG_CHANNEL, wrong
        if channel == FAST and not own.logged_in:
            return _NO_LOGIN, "Please log in"
        if channel == FAST and not self.limit["tier_ok"]:
            return _TIER, "Your current VIP level doesn't support this channel"
        other = {SLOW: FAST, FAST: SLOW}.get(channel)
        if other and f"{other}:{ticker}" in session.subs:
            return _WRONG_CHANNEL, wrong
        return (_WRONG_CHANNEL, wrong) if self.exchange.refused(session, stream, ticker) else None

    def _exists(self, path: str, channel: str, ticker: str, kind: str) -> bool:
        name = self.names.get(ticker)
        if path == BUSINESS:
            return name is not None and (channel == "trades-all" or channel.removeprefix("candle") in BARS)
        if channel in ("liquidation-orders", "instruments"):
            return kind in ("SPOT", "SWAP", "FUTURES", "OPTION")
        if channel == "index-tickers":
            return any(_underlying(n.instrument) == ticker for n in self.names.values() if n.type != "SPOT")
        if name is None:
            return False
        if channel == "funding-rate":
            return name.type == "SWAP"
        return channel in BY_TICKER or (channel in CONTRACT_CHANNELS and name.type != "SPOT")

    # HTTP.

    def ban_reply(self, status: int, retry_after_s: int) -> Reply:
        """As the venue has it: with its own code, under 429 as under 200, where nothing says how long to wait."""
        headers = {"Retry-After": str(retry_after_s)} if status != 200 else {}
        return Reply(_answer("50011", "Too Many Requests"), status, headers)

    async def http(self, request: Request) -> Reply:
        endpoint = request.path.removeprefix("/api/v5/")
        kind = {"market/history-trades": "history", "public/instruments": "instruments"}.get(endpoint, "rest")
        window = self.rest.setdefault(
            (request.ip, endpoint), Window(self.limit[f"{kind}_max"], self.limit["rest_window_s"])
        )
        if not window.allow(self.exchange.now_s):
            self.exchange.violation("rest")
            return self.ban_reply(429, 1)
        if endpoint == "public/time":
            return Reply(_answer("0", "", [{"ts": str(self.exchange.clock_us() // 1000)}]))
        if endpoint == "public/instruments":
            return self._instruments(request.query)
        handlers: dict[str, Callable[[_Name, Mapping[str, str]], list[Any]]] = {
            "market/trades": self._trades,
            "market/history-trades": self._trades,
            "market/candles": self._candles,
            "market/ticker": lambda name, _query: [self._ticker_words(name, name.ticker_us)],
            "public/mark-price": self._told("mark-price"),
            "public/open-interest": self._told("open-interest"),
            "public/funding-rate": self._told("funding-rate"),
        }
        if endpoint == "market/index-tickers":
            return self._index_tickers(request.query.get("instId", ""))
        of_options = endpoint == "public/open-interest" and request.query.get("instType") == "OPTION"
        if of_options and not request.query.get("instFamily"):
            return Reply(_answer("50015", "Either parameter uly or instFamily is required"), 400)
        if endpoint not in handlers and endpoint != "market/books":
            return Reply(_answer("404", "Not Found"), 404)
        name = self.names.get(request.query.get("instId", ""))
        if name is None:
            return Reply(_answer("51001", "Instrument ID, Instrument ID code, or Spread ID doesn't exist."))
        if endpoint == "market/books":
            return await self._books_now(name, request)
        return Reply(_answer("0", "", handlers[endpoint](name, request.query)))

    async def _books_now(self, name: _Name, request: Request) -> Reply:
        _, engine_id, bids, asks = await self.exchange.snapshot(name.book, request.agent)
        depth = max(1, min(int(request.query.get("sz", "1")), LEVELS_MAX))
        sides = {key: json.loads(name.levels(levels[:depth])) for key, levels in (("asks", asks), ("bids", bids))}
        ts = str(name.waiting[SLOW].published_us // 1000)
        return Reply(_answer("0", "", [{**sides, "ts": ts, "seqId": engine_id - name.base}]))

    def _told(self, channel: str) -> Callable[[_Name, Mapping[str, str]], list[Any]]:
        """What a channel of marks says of a contract; its time is that of the answer."""

        def told(name: _Name, query: Mapping[str, str]) -> list[Any]:
            marks = {} if name.type == "SPOT" else self._marks(name, self.exchange.t)
            if channel not in marks or query.get("instType", name.type) != name.type:
                return []
            return [marks[channel] | {"ts": str(self.exchange.clock_us() // 1000)}]

        return told

    def _index_tickers(self, uly: str) -> Reply:
        if not self._exists(PUBLIC, "index-tickers", uly, ""):
            return Reply(_answer("51001", "Instrument ID, Instrument ID code, or Spread ID doesn't exist."))
        words = {"instId": uly, "idxPx": self._index_of(uly), "ts": str(self.exchange.clock_us() // 1000)}
        return Reply(_answer("0", "", [words]))

    def _instruments(self, query: Mapping[str, str]) -> Reply:
        kind, family = query.get("instType", ""), query.get("instFamily", query.get("uly", ""))
        if kind not in ("SPOT", "SWAP", "FUTURES", "OPTION"):
            return Reply(_answer("51000", "Parameter instType error"), 400)
        if kind == "OPTION" and not family:
            return Reply(_answer("50015", "Either parameter uly or instFamily is required"), 400)
        halted = self.exchange.halted
        every = (*(name.instrument for name in self.names.values()), *halted.values())
        rows = [
            self._instrument_words(i) | {"state": "suspend" if i.ticker in halted else "live"}
            for i in every
            if i.facts["type"] == kind and family in ("", _family(i), _underlying(i))
        ]
        return Reply(_answer("0", "", rows))

    def _instrument_words(self, instrument: Instrument) -> dict[str, str]:
        facts, kind = instrument.facts, str(instrument.facts["type"])
        spot, expiry = kind == "SPOT", str(facts.get("expiry", ""))
        words = defaultdict(str, {key: str(value) for key, value in facts.items()})
        finer = self.exchange.finer[instrument.ticker]
        return {
            "alias": "", "baseCcy": instrument.base if spot else "", "category": "1", "ctMult": words["multiple"],
            "ctType": "" if spot or kind == "OPTION" else "linear" if facts["linear"] else "inverse",
            "ctVal": words["value"], "ctValCcy": words["unit"],
            "expTime": str(_expiry_ms(expiry)) if expiry.isdigit() else "", "instFamily": _family(instrument),
            "instId": instrument.ticker, "instType": kind, "lever": "10", "listTime": "1606468572000",
            "lotSz": plain(instrument.lot, instrument.qty_scale), "minSz": plain(instrument.lot, instrument.qty_scale),
            "optType": words["option"], "quoteCcy": instrument.quote if spot else "",
            "settleCcy": "" if spot else instrument.quote if facts["linear"] else instrument.base, "state": "live",
            "stk": words["strike"], "tickSz": plain(instrument.tick, instrument.price_scale + finer),
            "uly": _underlying(instrument),
        }  # fmt: skip

    def _trades(self, name: _Name, query: Mapping[str, str]) -> list[Any]:
        """Single fills, the newest first; `after` an id means those before it."""
        after, before = (int(query.get(key) or most) for key, most in (("after", 1 << 62), ("before", -1)))
        limit = max(1, min(int(query.get("limit", "100")), 500))
        chosen = [trade for trade in name.book.trades if before < trade.id < after]
        return [self._fill_words(name, trade) for trade in chosen[::-1][:limit]]

    def _candles(self, name: _Name, query: Mapping[str, str]) -> list[Any]:
        bar, limit = query.get("bar", "1m"), max(1, min(int(query.get("limit", "100")), 300))
        if bar not in BARS:
            return []
        candles = self.exchange.market.candles[name.name]
        rows = [_candle_row(name, c, True) for c in candles.closed[bar]] + [_candle_row(name, candles.open[bar], False)]
        return rows[::-1][:limit]


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _arg(channel: str, ticker: str) -> str:
    return f'{{"channel":"{channel}","instId":"{ticker}"}}'


def _frame(arg: str, data: str, action: str = "") -> str:
    says = f'"action":"{action}",' if action else ""
    return f'{{"arg":{arg},{says}"data":[{data}]}}'


def _book_data(bids: str, asks: str, t: int, previous: int, seq_id: int) -> str:
    return f'{{"asks":{asks},"bids":{bids},"ts":"{t // 1000}","checksum":0,"seqId":{seq_id},"prevSeqId":{previous}}}'


def _answer(code: str, text: str, data: list[Any] | None = None) -> str:
    return _json({"code": code, "msg": text, "data": data or []})


def _stream_of(arg: Mapping[str, Any]) -> str:
    return f"{arg.get('channel', '')}:{arg.get('instId') or arg.get('instType') or ''}"


def _conn(session: Session) -> str:
    return f"{session.id:08x}"


def _family(instrument: Instrument) -> str:
    return "-".join(instrument.ticker.split("-")[:2]) if instrument.facts["type"] != "SPOT" else ""


def _underlying(instrument: Instrument) -> str:
    return _family(instrument).partition("_")[0]


def _candle_row(name: _Name, candle: Candle, closed: bool) -> list[str]:
    prices = [name.price(getattr(candle, key)) for key in ("open", "high", "low", "close")]
    size, base, quote = name.volumes(candle)
    volumes = [size, quote, quote] if name.type == "SPOT" else [size, base, quote]
    return [str(candle.start // 1000), *prices, *volumes, "1" if closed else "0"]


def _expiry_ms(day: str) -> int:
    """08:00 UTC of a day written like 261225."""
    return int(datetime.strptime(day, "%y%m%d").replace(hour=8, tzinfo=UTC).timestamp() * math.pow(10, 3))
