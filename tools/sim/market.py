"""The seeded market behind every simulated exchange: order books, trades, candles and 24 hour statistics.

Used by `server.py` (which drives it) and read by the venue files (which put it into words). It counts in whole ticks
and lots, knows no venue, no socket and no clock: the same seed gives the same sequence whoever listens.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from random import Random

BID, ASK = 0, 1  # index of a side
LEVELS_MIN = 12  # a side with fewer levels gets limit orders only, so that no side ever runs empty
HISTORY_S = 20  # full books are kept once a second for this long, for snapshots that are too old
BASE_RATE = 1000.0  # actions a second of market time when the market runs as fast as the machine goes
TRADES_KEPT = 50_000  # trades per ticker that a venue can still be asked for
Change = tuple[int, int, int, int]  # side, price, quantity before, quantity after
NEVER_US = 1 << 62
CANDLES_KEPT = 1500  # closed candles per ticker and interval that a venue can still be asked for


@dataclass(frozen=True, slots=True)
class Instrument:
    """What is traded. Prices are counted in ticks and quantities in lots; `*_scale` are decimals of the unit."""

    ticker: str
    base: str
    quote: str
    tick: int  # one tick in units of 10 ** -price_scale
    price_scale: int
    lot: int  # one lot in units of 10 ** -qty_scale
    qty_scale: int
    start: int  # first price, in ticks
    size: int  # usual order size, in lots
    busy: float = 1.0  # share of the common rate
    kind: str = "spot"
    facts: dict[str, object] = field(default_factory=dict)  # what only the venue's own file understands


@dataclass(frozen=True, slots=True)
class Trade:
    """One execution of a taker against one resting order."""

    id: int  # +1 per trade of the ticker
    engine_id: int  # +1 per trade of the whole market
    agg_id: int  # same for the fills of one taker order at one price
    price: int
    lots: int
    side: int  # +1 the taker bought, -1 the taker sold
    t: int


@dataclass(slots=True)
class Action:
    """What one order did: the changed levels, the trades, and the ids it consumed."""

    t: int
    first_id: int  # update ids of this action, +1 per changed level of the ticker
    last_id: int
    engine_id: int  # +1 per changed level of the whole market, so it jumps within one ticker
    changes: list[Change]
    trades: list[Trade]
    best_changed: bool


class Book:
    """The limit order book of one ticker: orders in time priority per price."""

    def __init__(
        self, instrument: Instrument, rng: Random, depth: int, near: float, first_update_id: int, first_trade_id: int
    ) -> None:
        self.instrument = instrument
        self.rng = rng
        self.depth = depth
        self.near = near
        self.update_id = first_update_id
        self.engine_id = 0  # engine id of the last change, set by Market
        self.trade_id = first_trade_id
        self.agg_id = first_trade_id // 2
        self.prices: tuple[list[int], list[int]] = ([], [])  # ascending
        self.qty: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.phantoms: dict[tuple[int, int], int] = {}  # levels that are published but belong to no order
        self._orders: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
        self.trades: deque[Trade] = deque(maxlen=TRADES_KEPT)
        self.history: deque[tuple[int, int, dict[int, int], dict[int, int]]] = deque(maxlen=HISTORY_S)
        gap = 1
        for _ in range(depth):
            for side, sign in ((BID, -1), (ASK, 1)):
                self._add(side, instrument.start + sign * gap, self._size())
            gap += rng.randint(1, 3)
        self.first_id = first_update_id  # the book that a ledger starts from

    def best(self, side: int) -> tuple[int, int]:
        """Best price of a side and its quantity."""
        price = self.prices[BID][-1] if side == BID else self.prices[ASK][0]
        return price, self.qty[side][price]

    def level(self, side: int, price: int) -> int:
        """Published quantity at a price."""
        return self.qty[side].get(price) or self.phantoms.get((side, price), 0)

    def levels(self, side: int) -> list[tuple[int, int]]:
        """All published levels of a side, best first."""
        known = dict(self.qty[side])
        for (phantom_side, price), lots in self.phantoms.items():
            if phantom_side == side:
                known.setdefault(price, lots)
        return sorted(known.items(), reverse=side == BID)

    def mid2(self) -> int:
        """Twice the middle price, in ticks."""
        return self.prices[BID][-1] + self.prices[ASK][0]

    def remember(self) -> None:
        """Keep a copy of the book for whoever must be given one that is too old."""
        self.history.append((self.update_id, self.engine_id, dict(self.levels(BID)), dict(self.levels(ASK))))

    def _size(self) -> int:
        return 1 + int(self.rng.expovariate(1.0 / self.instrument.size))

    def _add(self, side: int, price: int, lots: int) -> Change:
        before = self.qty[side].get(price, 0)
        if not before:
            insort(self.prices[side], price)
            self._orders[side][price] = []
        self._orders[side][price].append(lots)
        self.qty[side][price] = before + lots
        return side, price, before, before + lots

    def _drop_level(self, side: int, price: int) -> None:
        del self.qty[side][price], self._orders[side][price]
        prices = self.prices[side]
        del prices[bisect_left(prices, price)]

    def _at_best(self) -> bool:
        """Whether this participant looks at the best price only; draws nothing where none does."""
        return self.near > 0 and self.rng.random() < self.near

    def _cancel(self) -> Change:
        """Cancel one order; more often near the best price, and the farthest when a side has grown too long."""
        side = self.rng.randrange(2)
        prices = self.prices[side]
        if len(prices) > 2 * self.depth:
            index = len(prices) - 1
        elif self._at_best():
            index = 0
        else:
            index = min(int(self.rng.expovariate(0.12)), len(prices) - 1)
        price = prices[-1 - index] if side == BID else prices[index]
        orders, before = self._orders[side][price], self.qty[side][price]
        gone = orders.pop(self.rng.randrange(len(orders)))
        if orders:
            self.qty[side][price] = before - gone
        else:
            self._drop_level(side, price)
        return side, price, before, before - gone

    def _limit(self, side: int) -> Change:
        """Add one passive order: inside the spread, at the best price, or some ticks behind it."""
        rng, (bid, _), (ask, _) = self.rng, self.best(BID), self.best(ASK)
        draw = rng.random() / 2 if self._at_best() else rng.random()
        if draw < 0.25 and ask - bid > 1:
            behind = -rng.randint(1, ask - bid - 1)
        elif draw < 0.5:
            behind = 0
        else:
            behind = 1 + int(rng.expovariate(0.12))
        price = max(1, bid - behind) if side == BID else ask + behind
        return self._add(side, price, self._size())

    def _take(self, taker: int, t: int, trade_number: Callable[[], int]) -> tuple[list[Change], list[Trade]]:
        """A market order: consumes the resting orders of the other side in price and time priority."""
        side = ASK if taker > 0 else BID
        changes: list[Change] = []
        trades: list[Trade] = []
        wanted = self._size() * (4 if self.rng.random() < 0.15 else 1)
        while wanted and len(self.prices[side]) > LEVELS_MIN and len(changes) < 4:
            price, before = self.best(side)
            orders = self._orders[side][price]
            self.agg_id += 1
            while wanted and orders:
                lots = min(wanted, orders[0])
                wanted -= lots
                orders[0] -= lots
                if not orders[0]:
                    del orders[0]
                self.trade_id += 1
                trades.append(Trade(self.trade_id, trade_number(), self.agg_id, price, lots, taker, t))
            after = sum(orders)
            if after:
                self.qty[side][price] = after
            else:
                self._drop_level(side, price)
            changes.append((side, price, before, after))
        return changes, trades

    def act(self, t: int, trade_number: Callable[[], int]) -> tuple[list[Change], list[Trade]]:
        """Let one participant do something; the choice comes from this ticker's own generator only."""
        for side in (BID, ASK):
            if len(self.prices[side]) <= LEVELS_MIN:
                return [self._limit(side)], []
        draw = self.rng.random()
        if draw < 0.2:
            changes, trades = self._take(1 if self.rng.random() < 0.5 else -1, t, trade_number)
            self.trades.extend(trades)
            return changes, trades
        if draw < 0.63:
            return [self._limit(self.rng.randrange(2))], []
        return [self._cancel()], []


@dataclass(slots=True)
class Candle:
    """One candle; volumes in lots, values in ticks times lots."""

    start: int  # us
    end: int  # us, exclusive
    open: int
    high: int
    low: int
    close: int
    first_id: int = -1
    last_id: int = -1
    trades: int = 0
    lots: int = 0
    value: int = 0
    buy_lots: int = 0
    buy_value: int = 0
    coins: float = 0.0  # sum of quantity / price, for contracts that are counted in the quote currency

    def add(self, trade: Trade) -> None:
        if not self.trades:
            self.first_id = trade.id
            self.open = self.high = self.low = trade.price
        self.last_id = trade.id
        self.trades += 1
        self.high, self.low, self.close = max(self.high, trade.price), min(self.low, trade.price), trade.price
        self.lots += trade.lots
        self.value += trade.price * trade.lots
        self.coins += trade.lots / trade.price
        if trade.side > 0:
            self.buy_lots += trade.lots
            self.buy_value += trade.price * trade.lots

    def join(self, later: "Candle") -> None:
        """Add all trades of another candle, which came after those of this one."""
        if not self.trades:
            self.first_id, self.open, self.high, self.low = later.first_id, later.open, later.high, later.low
        self.high, self.low, self.close = max(self.high, later.high), min(self.low, later.low), later.close
        self.last_id = later.last_id
        self.trades += later.trades
        self.lots += later.lots
        self.value += later.value
        self.coins += later.coins
        self.buy_lots += later.buy_lots
        self.buy_value += later.buy_value


class Candles:
    """The candles of one ticker in every interval that the venue has; an interval is a length in microseconds."""

    def __init__(self, intervals: dict[str, int], t: int, price: int) -> None:
        self.intervals = intervals
        self._open = {name: self._new(length, t, price) for name, length in intervals.items()}
        self._newest = Candle(t, t, price, price, price, price)  # trades that are not in the open candles yet
        self.closed: dict[str, deque[Candle]] = {name: deque(maxlen=CANDLES_KEPT) for name in intervals}

    @staticmethod
    def _new(length: int, t: int, price: int) -> Candle:
        start = t - t % length
        return Candle(start, start + length, price, price, price, price)

    def add(self, trade: Trade) -> None:
        self._newest.add(trade)

    @property
    def open(self) -> dict[str, Candle]:
        """The candle of each interval that trades go into now."""
        newest = self._newest
        if newest.trades:
            for candle in self._open.values():
                candle.join(newest)
            self._newest = Candle(newest.start, newest.end, *(newest.close,) * 4)
        return self._open

    def roll(self, t: int) -> Iterator[tuple[str, Candle]]:
        """Close every candle that ends at or before `t`; an interval without trades repeats the last price."""
        open_ = self.open
        for name, length in self.intervals.items():
            while (candle := open_[name]).end <= t:
                self.closed[name].append(candle)
                open_[name] = self._new(length, candle.end, candle.close)
                yield name, candle


class Market:
    """All books of one exchange and the order in which things happen to them.

    `due` in `step` is market time in microseconds since the start; `stamp` turns it into the exchange's clock.
    """

    def __init__(
        self, seed: int, instruments: list[Instrument], rate: float, depth: int, intervals: dict[str, int], t: int,
        near: float = 0.0,
    ) -> None:  # fmt: skip
        self.seed, self.rate, self.depth, self.intervals, self.near = seed, rate, depth, intervals, near
        self.books: dict[str, Book] = {}
        self.candles: dict[str, Candles] = {}
        self.day: dict[
            str, Candle
        ] = {}  # statistics since the start; a run is shorter than the 24 hours they stand for
        self._closed: dict[str, tuple[Book, Candles, Candle]] = {}
        self.actions = 0
        self._heap: list[tuple[int, int, str]] = []
        self._order = count()
        self._trades = Random(f"{seed}:trades").randrange(100_000_000, 400_000_000)
        self._engine_id = Random(f"{seed}:engine").randrange(10**11, 2 * 10**11)
        for instrument in instruments:
            self.open(instrument, 0, t)

    def open(self, instrument: Instrument, due: int, t: int) -> None:
        """Start trading an instrument."""
        rng = Random(f"{self.seed}:{instrument.ticker}")
        first_update, first_trade = rng.randrange(10**10, 9 * 10**10), rng.randrange(10**6, 9 * 10**8)
        book = Book(instrument, rng, self.depth, self.near, first_update, first_trade)
        self._engine_id += 1
        book.engine_id = self._engine_id
        book.remember()
        self.books[instrument.ticker] = book
        self.candles[instrument.ticker] = Candles(self.intervals, t, instrument.start)
        self.day[instrument.ticker] = Candle(
            t, t, instrument.start, instrument.start, instrument.start, instrument.start
        )
        heappush(self._heap, (due + self._wait(book), next(self._order), instrument.ticker))

    def close(self, ticker: str) -> None:
        """End the trading of an instrument; `reopen` takes it up where it ended."""
        self._closed[ticker] = self.books.pop(ticker), self.candles.pop(ticker), self.day.pop(ticker)
        self._heap = [entry for entry in self._heap if entry[2] != ticker]
        heapify(self._heap)

    def reopen(self, ticker: str, due: int) -> bool:
        """Trade an instrument again; False when it was never closed."""
        if ticker not in self._closed:
            return False
        self.books[ticker], self.candles[ticker], self.day[ticker] = self._closed.pop(ticker)
        heappush(self._heap, (due + self._wait(self.books[ticker]), next(self._order), ticker))
        return True

    def _wait(self, book: Book) -> int:
        """Time to the next action: bursts and pauses with the mean that the rate asks for."""
        mean = 1e6 / (self.rate * book.instrument.busy)
        return int(book.rng.expovariate(1.0 / (0.1 * mean if book.rng.random() < 0.4 else 1.6 * mean)))

    @property
    def next_due(self) -> int:
        return self._heap[0][0] if self._heap else NEVER_US

    def delay(self, us: int) -> None:
        """Shift everything that has not happened yet."""
        self._heap = [(due + us, order, ticker) for due, order, ticker in self._heap]
        heapify(self._heap)

    def _trade_number(self) -> int:
        self._trades += 1
        return self._trades

    def step(self, t: int) -> tuple[Book, Action]:
        """Let the next action happen, stamped with time `t` of the exchange's clock."""
        due, _, ticker = heappop(self._heap)
        book = self.books[ticker]
        before = book.best(BID), book.best(ASK)
        changes, trades = book.act(t, self._trade_number)
        heappush(self._heap, (due + self._wait(book), next(self._order), ticker))
        self.actions += 1
        if book.phantoms:  # a real order at the price of a phantom takes its place
            changes = [
                (side, price, old or book.phantoms.pop((side, price), 0), new) for side, price, old, new in changes
            ]
        if trades:
            candles, day = self.candles[ticker], self.day[ticker]
            for trade in trades:
                candles.add(trade)
                day.add(trade)
        return book, self._numbered(book, t, changes, trades, (book.best(BID), book.best(ASK)) != before)

    def _numbered(self, book: Book, t: int, changes: list[Change], trades: list[Trade], best: bool) -> Action:
        first = book.update_id + 1
        book.update_id += len(changes)
        self._engine_id += len(changes)
        book.engine_id = self._engine_id
        return Action(t, first, book.update_id, book.engine_id, changes, trades, best)

    def cross(self, ticker: str, t: int) -> Action:
        """Publish a bid above the best ask that belongs to no order; `uncross` takes it back."""
        book = self.books[ticker]
        price = book.best(ASK)[0] + 1
        before = book.level(BID, price)
        book.phantoms[BID, price] = book.instrument.size
        return self._numbered(book, t, [(BID, price, before, book.level(BID, price))], [], False)

    def uncross(self, ticker: str, t: int) -> Action:
        """Withdraw the levels that `cross` published."""
        book = self.books[ticker]
        shown = [(side, price, book.level(side, price)) for side, price in book.phantoms]
        book.phantoms.clear()
        changes = [(side, price, before, book.level(side, price)) for side, price, before in shown]
        return self._numbered(book, t, changes, [], False)


def plain(value: int, scale: int) -> str:
    """A whole number of 10 ** -scale as text with exactly `scale` decimals."""
    if not scale:
        return str(value)
    whole, part = divmod(value, 10**scale)
    return f"{whole}.{part:0{scale}d}"
