"""GMX as a simulated exchange: oracle prices and candles over REST, nothing else.

Written from docs.gmx.io (REST V2, oracle information, 2026) and recorded answers; deliberately not from our own decoder,
so that each can prove the other wrong. The middle of a simulated order book is the oracle's price. Candles reach back
behind the start of the market by an invented history, the same for every process of the same seed.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from random import Random
from typing import Any, ClassVar

from tools.sim.ledger import Dialect
from tools.sim.market import ASK, BID, Action, Book, Candle, Instrument, plain
from tools.sim.server import Exchange, PolledVenue, Reply, Request, Window

SECOND_US = 1_000_000
INTERVALS = {"1m": 60, "5m": 300, "15m": 900, "1h": 3600, "4h": 14_400, "1d": 86_400}
LIMIT_MAX, LIMIT_DEFAULT = 10_000, 1000
# Token: decimals, first price in 10**-price_scale, price_scale, ticks of 10**-price_scale.
KNOWN: dict[str, tuple[int, int, int, int]] = {
    "BTC": (8, 6_153_638, 2, 1),
    "ETH": (18, 173_949, 2, 1),
    "SOL": (9, 79_991, 3, 1),
    "DOGE": (8, 74_786, 6, 1),
    "PEPE": (18, 26_233, 10, 1),
}
Version = tuple[str, str, str, str]  # open, high, low, close as JSON numbers


class Gmx(PolledVenue):
    name: ClassVar[str] = "gmx"
    tickers: ClassVar[tuple[str, ...]] = ("ETH", "BTC", "SOL", "PEPE")
    dialect: ClassVar[Dialect] = Dialect(
        1000,
        "",
        {"bid_price": "min", "ask_price": "max", "index_price": "median"},
        bbo_has_id=False,
        bbo_has_time=False,
        candle_has_time=False,
        candle_counts_trades=False,
        intervals={},
        polled=True,
    )
    limits: ClassVar[dict[str, float]] = {
        "requests_max": 600,
        "requests_window_s": 60,
        "history": 1200,
        "rule": 0,
        "median": 1,
        "bare_tokens": 0,
    }
    intervals: ClassVar[dict[str, int]] = {name: seconds * SECOND_US for name, seconds in INTERVALS.items()}
    notes: ClassVar[str] = (
        "no WebSocket; GET /ping, /tokens, /prices/tickers, /prices/candles, /prices/24h. history: closed candles before"
        " the start; rule: how prices are scaled (0, 1, 2: 30 - decimals, 30, 30 - decimals - oracleDecimals; 3: none that is known); median:"
        " whether medianPrice is given; bare_tokens: the list of tokens is no object."
    )

    def __init__(self, exchange: Exchange, limits: Mapping[str, float], credentials: Mapping[str, str]) -> None:
        super().__init__(exchange, limits, credentials)
        self.closed: dict[tuple[str, str], deque[tuple[int, Version]]] = {}  # the newest first
        self.prices: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {}  # ticker -> time, value and scale by word
        self.windows: dict[str, Window] = {}  # ip -> requests
        self.remembered: dict[str, Reply] = {}  # resource -> its last true answer
        self.written: dict[tuple[str, str], Version] = {}  # the open version that the ledger has
        for book in exchange.market.books.values():
            self._begin_token(book, exchange.t)

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        decimals, price, scale, tick = KNOWN.get(ticker, (18, 12_345, 3, 1))
        facts: dict[str, object] = {"decimals": decimals, "address": f"0x{ticker.encode().hex():0>40}"}
        return Instrument(ticker, ticker, "USD", tick, scale, 1, 0, price // tick, 50, busy, "index", facts)

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}"

    def first_book(self, book: Book) -> dict[str, object]:
        return {"last": 0, "bids": [], "asks": []}  # none is published

    def listed(self, book: Book, t: int) -> None:
        if (book.instrument.ticker, next(iter(INTERVALS))) in self.closed:
            self._price(book, t)  # listed again: its candles go on
        else:
            self._begin_token(book, t)

    def delisted(self, book: Book, t: int) -> None:
        """The list knows no states: what is halted is not in it either."""
        del self.prices[book.instrument.ticker]

    # The market put into words.

    def timers(self) -> list[tuple[int, Callable[[int], None]]]:
        return [(SECOND_US, self._second)]

    def _second(self, t: int) -> None:
        """Prices are made anew each second, and candles end."""
        for ticker, book in self.exchange.market.books.items():
            for interval, candle in self.exchange.market.candles[ticker].roll(t):
                version = self._version(book.instrument, candle)
                self.closed[ticker, interval].appendleft((candle.start, version))
                self._candle_line(ticker, interval, candle.start, version, t, True)
                del self.written[ticker, interval]
                self._open_line(ticker, interval, t)
            self._price(book, t)

    def on_action(self, book: Book, action: Action) -> None:
        if action.trades:
            for interval in INTERVALS:
                self._open_line(book.instrument.ticker, interval, action.t)

    def revise(self, book: Book, t: int) -> None:
        ticker = book.instrument.ticker
        for interval in INTERVALS:
            candles = self.closed[ticker, interval]
            start, (opened, high, low, _close) = candles[0]
            candles[0] = start, (opened, high, low, low)
            self._candle_line(ticker, interval, start, candles[0][1], t, True)

    def _begin_token(self, book: Book, t: int) -> None:
        instrument = book.instrument
        for interval in INTERVALS:
            self.closed[instrument.ticker, interval] = self._history(instrument, interval)
            for start, version in self.closed[instrument.ticker, interval]:
                self._candle_line(instrument.ticker, interval, start, version, t, True)
            self._open_line(instrument.ticker, interval, t)
        self._price(book, t)

    def _history(self, instrument: Instrument, interval: str) -> deque[tuple[int, Version]]:
        """Candles before the market began, walking backwards from its first price."""
        rng = Random(f"{self.exchange.market.seed}:{instrument.ticker}:{interval}")
        start, step = (
            self.exchange.market.candles[instrument.ticker].open[interval].start,
            INTERVALS[interval] * SECOND_US,
        )
        wide = max(1, instrument.start // 2000)
        price, found = instrument.start, deque[tuple[int, Version]]()
        for _ in range(int(self.limit["history"])):
            start -= step
            close = price + (rng.randint(-2, 2) if rng.random() < 0.1 else 0)  # not always the next one's open
            price = min(max(instrument.start // 2, close + rng.randint(-wide, wide)), 2 * instrument.start)
            high, low = max(price, close) + rng.randint(0, wide), min(price, close) - rng.randint(0, wide)
            found.append((start, self._texts(instrument, price, high, low, close)))
        return found

    def _price(self, book: Book, t: int) -> None:
        instrument = book.instrument
        scale = instrument.price_scale
        values = {
            "min": (book.best(BID)[0] * instrument.tick, scale),
            "max": (book.best(ASK)[0] * instrument.tick, scale),
        }
        if self.limit["median"]:
            values["median"] = book.mid2() * instrument.tick * 5, scale + 1
        self.prices[instrument.ticker] = t, values
        data = {word: plain(*value) for word, value in values.items()}
        self.exchange.ledger.record("ticker", ticker=instrument.ticker, t=t, data=data)

    def _open_line(self, ticker: str, interval: str, t: int) -> None:
        candle = self.exchange.market.candles[ticker].open[interval]
        version = self._version(self.exchange.market.books[ticker].instrument, candle)
        if self.written.get((ticker, interval)) != version:
            self.written[ticker, interval] = version
            self._candle_line(ticker, interval, candle.start, version, t, False)

    def _candle_line(self, ticker: str, interval: str, start: int, version: Version, t: int, closed: bool) -> None:
        opened, high, low, close = version
        self.exchange.ledger.line(
            "candle",
            ticker,
            f'{{"kind":"candle","ticker":"{ticker}","interval":"{interval}","open_time":{start},"open":"{opened}",'
            f'"high":"{high}","low":"{low}","close":"{close}","volume":null,"trades":null,'
            f'"closed":{"true" if closed else "false"},"t":{t}}}',
        )

    def _version(self, instrument: Instrument, candle: Candle) -> Version:
        return self._texts(instrument, candle.open, candle.high, candle.low, candle.close)

    @staticmethod
    def _texts(instrument: Instrument, *ticks: int) -> Version:
        opened, high, low, close = (number(value * instrument.tick, instrument.price_scale) for value in ticks)
        return opened, high, low, close

    # REST.

    def ban_reply(self, status: int, retry_after_s: int) -> Reply:
        return Reply('{"error":"Too Many Requests"}', status, {"Retry-After": str(retry_after_s)})

    async def http(self, request: Request) -> Reply:
        window = self.windows.setdefault(
            request.ip, Window(self.limit["requests_max"], self.limit["requests_window_s"])
        )
        if not window.allow(self.exchange.now_s):
            self.exchange.violation("requests")
            return self.ban_reply(429, int(self.limit["requests_window_s"]))
        resource = f"{request.path} {request.query.get('tokenSymbol')} {request.query.get('period')}"
        if self.exchange.faults.window("stale_rest", agent=request.agent) and resource in self.remembered:
            return self.remembered[resource]
        reply = self._answer(request)
        if reply.status == 200:
            self.remembered[resource] = reply
        return reply

    def _answer(self, request: Request) -> Reply:
        answers: dict[str, Callable[[Mapping[str, str]], Reply]] = {
            "/ping": lambda _: Reply('{"ok":true}'),
            "/tokens": lambda _: self._tokens(),
            "/prices/tickers": lambda _: self._tickers(),
            "/prices/24h": lambda _: self._day(),
            "/prices/candles": self._candles,
        }
        if request.path not in answers or request.method != "GET":
            return Reply('{"error":"not found"}', 404)
        return answers[request.path](request.query)

    def _instruments(self) -> list[Instrument]:
        return [self.exchange.market.books[ticker].instrument for ticker in self.prices]

    def _tokens(self) -> Reply:
        tokens = [
            {"symbol": i.ticker, "address": i.facts["address"], "decimals": i.facts["decimals"], "synthetic": True}
            for i in self._instruments()
        ]
        return Reply(_json(tokens if self.limit["bare_tokens"] else {"tokens": tokens}))

    def _tickers(self) -> Reply:
        found: list[dict[str, Any]] = []
        for instrument in self._instruments():
            t, values = self.prices[instrument.ticker]
            decimals, oracle_decimals = int(str(instrument.facts["decimals"])), 2
            exponent = (30 - decimals, 30, 30 - decimals - oracle_decimals, 33 - decimals)[int(self.limit["rule"])]
            digits = {f"{word}Price": str(value * 10 ** (exponent - scale)) for word, (value, scale) in values.items()}
            row = {"tokenAddress": instrument.facts["address"], "tokenSymbol": instrument.ticker, **digits}
            if self.limit["rule"] == 2:
                row["oracleDecimals"] = oracle_decimals
            found.append({**row, "updatedAt": t // 1000, "timestamp": t // SECOND_US})
        return Reply(_json(found))

    def _candles(self, query: Mapping[str, str]) -> Reply:
        ticker, interval, limit = query.get("tokenSymbol", ""), query.get("period", ""), query.get("limit", "")
        if ticker not in self.prices or interval not in INTERVALS:
            return Reply(_json({"error": f"no candles of {ticker!r} {interval!r}"}), 400)
        count = int(limit) if limit.isdecimal() else LIMIT_DEFAULT
        if not 1 <= count <= LIMIT_MAX:
            return Reply(_json({"error": "limit must be from 1 to 10000"}), 400)
        candle = self.exchange.market.candles[ticker].open[interval]
        newest = candle.start, self._version(self.exchange.market.books[ticker].instrument, candle)
        rows = [newest, *islice(self.closed[ticker, interval], count - 1)]
        texts = (f"[{start // SECOND_US},{','.join(version)}]" for start, version in rows)
        return Reply(f'{{"period":"{interval}","candles":[{",".join(texts)}]}}')

    def _day(self) -> Reply:
        found = []
        for instrument in self._instruments():
            opened, high, low, close = self._version(instrument, self.exchange.market.day[instrument.ticker])
            numbers = {"open": float(opened), "high": float(high), "low": float(low), "close": float(close)}
            found.append({"tokenSymbol": instrument.ticker, **numbers})
        return Reply(_json(found))


def number(value: int, scale: int) -> str:
    """A JSON number as JavaScript writes it: without needless zeros."""
    whole, _, part = plain(value, scale).partition(".")
    part = part.rstrip("0")
    return f"{whole}.{part}" if part else whole


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
