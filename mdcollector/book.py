"""Books for users: rebuilds order books from `orderbook_l2` rows, live from a ring or from stored tables.

Imported by strategies, readers and tests; knows the rows and their flags, never a ring, a file or a venue.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import nlargest, nsmallest
from itertools import pairwise
from typing import Any

import numpy as np

from mdcollector.records import ASK, BID, Action, Flag

_SNAPSHOT, _LAST, _INVALID = int(Flag.SNAPSHOT), int(Flag.LAST), int(Flag.BOOK_INVALID)
_DELETE = int(Action.DELETE)
_FIELDS = ("side", "action", "price", "qty", "flags", "update_id", "timestamp")
_ACTIONS: dict[object, int] = {key: int(a) for a in Action for key in (int(a), a.name)}  # tables hold the name

Rows = np.ndarray[tuple[int], np.dtype[np.void]]
Level = tuple[float, float]  # price, qty


class OrderBook:
    """One instrument's book, rebuilt from its `orderbook_l2` rows in the order of their `seq_id`.

    >>> book = OrderBook()
    >>> book.apply(rows[ring.names(rows) == "BTCUSDT"])
    >>> if book.is_valid and book.is_complete:
    ...     print(book.best_bid, book.best_ask, book.top(5))

    Read the book only while `is_complete`: in between it holds half of an exchange message.

    A snapshot that is cut off at so many levels says nothing of what lies beyond its worst ones. Below `known_low` and
    above `known_high` the book holds only what has changed since, so a level that is not there may exist all the same.
    The rows do not tell whether a snapshot was the whole book (Binance cuts off, Deribit does not): where it was,
    nothing is unknown outside either, and these say less than is true.
    """

    def __init__(self) -> None:
        self.bids: dict[float, float] = {}  # price -> qty
        self.asks: dict[float, float] = {}
        self.update_id = -1  # the exchange's id of the newest message that was applied
        self.timestamp = 0  # its event time, us UTC
        self.is_complete = False  # the newest row was the last one of its exchange message
        self.known_low: float | None = None  # lowest bid of the newest snapshot; None before one, or if it had none
        self.known_high: float | None = None  # its highest ask
        self._has_snapshot = False
        self._in_snapshot = False
        self._flagged_invalid = False
        self._best: dict[int, float | None] = {BID: None, ASK: None}  # None: look again

    @property
    def is_valid(self) -> bool:
        """A snapshot was seen, no row was reported lost since, and the newest row does not say BOOK_INVALID."""
        return self._has_snapshot and not self._flagged_invalid

    @property
    def best_bid(self) -> Level | None:
        """(price, qty) of the highest bid; None on an empty side."""
        if not self.bids:
            return None
        best = self._best[BID]
        if best is None:
            best = self._best[BID] = max(self.bids)
        return best, self.bids[best]

    @property
    def best_ask(self) -> Level | None:
        """(price, qty) of the lowest ask; None on an empty side."""
        if not self.asks:
            return None
        best = self._best[ASK]
        if best is None:
            best = self._best[ASK] = min(self.asks)
        return best, self.asks[best]

    def top(self, n: int) -> tuple[list[Level], list[Level]]:
        """The best `n` bids (highest first) and asks (lowest first), each (price, qty)."""
        return nlargest(n, self.bids.items()), nsmallest(n, self.asks.items())

    def invalidate(self) -> None:
        """Rows were lost on the way (a reader was lapped): not valid until the next snapshot has begun.

        What comes up to the first LAST behind them may be the end of a message: leave it out, as `OrderBooks` does.
        """
        self._has_snapshot = self._in_snapshot = False

    def apply(self, rows: Rows | Iterable[Mapping[str, Any]]) -> None:
        """Apply rows of this instrument: a structured array of the feed, or mappings with its columns.

        In mappings `action` may be the number (ring) or the name (tables). ValueError for a row that is neither
        NEW, UPDATE nor DELETE; the rows before it are applied.
        """
        values: Iterable[tuple[Any, ...]]
        if isinstance(rows, np.ndarray):
            values = zip(*(rows[field].tolist() for field in _FIELDS), strict=True)
        else:
            values = (tuple(row[field] for field in _FIELDS) for row in rows)
        for side, action, price, qty, flags, update_id, timestamp in values:
            code = _ACTIONS.get(action)
            if code is None:
                raise ValueError(f"update {update_id}: action {action!r}, allowed are {', '.join(Action.__members__)}")
            self._apply_row(side, code, price, qty, flags)
            self.update_id = update_id
            self.timestamp = timestamp

    def _apply_row(self, side: int, action: int, price: float, qty: float, flags: int) -> None:
        if flags & _SNAPSHOT and not self._in_snapshot:
            self.bids.clear()
            self.asks.clear()
            self._best[BID] = self._best[ASK] = None
            self.known_low = self.known_high = None
            self._has_snapshot = True
        self.is_complete = bool(flags & _LAST)
        # LAST ends a run: a snapshot that follows another one at once is a new one and clears again.
        self._in_snapshot = bool(flags & _SNAPSHOT) and not self.is_complete
        self._flagged_invalid = bool(flags & _INVALID)
        if side == BID:
            levels = self.bids
        elif side == ASK:
            levels = self.asks
        else:
            return  # UNKNOWN: a row without a level, there for its flags (an empty snapshot)
        best = self._best[side]
        if action == _DELETE:
            levels.pop(price, None)
            if price == best:
                self._best[side] = None
        else:
            levels[price] = qty
            if flags & _SNAPSHOT:
                self._widen(side, price)
            if best is not None and (price - best) * side > 0:
                self._best[side] = price

    def _widen(self, side: int, price: float) -> None:
        """A level of a snapshot."""
        if side == BID:
            self.known_low = price if self.known_low is None else min(self.known_low, price)
        else:
            self.known_high = price if self.known_high is None else max(self.known_high, price)


class OrderBooks(Mapping[str, OrderBook]):
    """The books of all instruments of one `orderbook_l2` ring, by ticker.

    >>> books = OrderBooks()
    >>> for rows in ring.batches():
    ...     for ticker in books.apply(rows, ring.tickers):
    ...         print(ticker, books[ticker].best_bid, books[ticker].best_ask)

    Give it every row of the ring: it sees by `seq_id` when rows were lost, and then no book is valid until its next
    snapshot, because nobody knows whose rows they were. `rows_lost` counts them. What comes behind a hole up to the first
    LAST may be the end of a message, so it is left out; begin a ring at its newest row, or at row 0, for the same reason.
    """

    def __init__(self) -> None:
        self.rows_lost = 0
        self._next_seq: int | None = None
        self._is_cut = False  # the next row may be of a message whose begin is lost
        self._books: dict[str, OrderBook] = {}

    def __getitem__(self, ticker: str) -> OrderBook:
        return self._books[ticker]

    def __iter__(self) -> Iterator[str]:
        return iter(self._books)

    def __len__(self) -> int:
        return len(self._books)

    def apply(self, rows: Rows, tickers: Sequence[str]) -> list[str]:
        """Apply rows of the ring; `tickers` is the ring's instrument table. Says which tickers' books were touched."""
        if not len(rows):
            return []
        sequence = rows["seq_id"]
        expected = int(sequence[0]) if self._next_seq is None else self._next_seq
        # Rows before a hole belong to the books as they were, rows behind it come after all books were given up.
        steps = np.diff(sequence, prepend=expected - 1)
        starts = [0, *(int(i) for i in np.flatnonzero(steps != 1) if i > 0), len(rows)]
        touched: dict[str, None] = {}
        for start, stop in pairwise(starts):
            if steps[start] != 1:
                self.rows_lost += max(0, int(steps[start]) - 1)
                for book in self._books.values():
                    book.invalidate()
                self._is_cut = True
            self._apply_run(self._whole(rows[start:stop]), tickers, touched)
        self._next_seq = int(sequence[-1]) + 1
        return list(touched)

    def _whole(self, rows: Rows) -> Rows:
        """These rows without the end of a message whose begin is lost: that of a snapshot would look like a whole one."""
        if self._is_cut:
            ends = np.flatnonzero(rows["flags"] & _LAST)
            self._is_cut = not len(ends)
            return rows[ends[0] + 1 :] if len(ends) else rows[:0]
        return rows

    def _apply_run(self, rows: Rows, tickers: Sequence[str], touched: dict[str, None]) -> None:
        codes = rows["ticker"]
        for code in np.unique(codes).tolist():
            ticker = tickers[code]
            book = self._books.get(ticker)
            if book is None:
                book = self._books[ticker] = OrderBook()
            book.apply(rows[codes == code])
            touched[ticker] = None
