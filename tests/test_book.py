"""OrderBook and OrderBooks: rows of the feed become the book that a plain dict says."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdcollector import ASK, BID, OrderBook, OrderBooks
from mdcollector.records import ORDERBOOK_L2, Action, Flag

NEW, UPDATE, DELETE = Action.NEW, Action.UPDATE, Action.DELETE
SNAPSHOT, LAST, INVALID = Flag.SNAPSHOT, Flag.LAST, Flag.BOOK_INVALID


def rows_of(
    *levels: tuple[int, int, float, float, int], ticker: int = 0, first_seq: int = 0, update_id: int = 7
) -> Any:
    """Rows of (side, action, price, qty, flags)."""
    rows = np.zeros(len(levels), ORDERBOOK_L2.dtype)
    for i, (side, action, price, qty, flags) in enumerate(levels):
        rows[i]["side"], rows[i]["action"], rows[i]["price"], rows[i]["qty"], rows[i]["flags"] = (
            side, action, price, qty, flags,
        )  # fmt: skip
        rows[i]["update_id"], rows[i]["timestamp"], rows[i]["seq_id"] = update_id, 1000 + i, first_seq + i
        rows[i]["ticker"] = ticker
    return rows


def snapshot(*, first_seq: int = 0, ticker: int = 0) -> Any:
    return rows_of(
        (BID, NEW, 99.0, 1.0, SNAPSHOT), (BID, NEW, 98.0, 2.0, SNAPSHOT), (ASK, NEW, 101.0, 3.0, SNAPSHOT),
        (ASK, NEW, 102.0, 4.0, SNAPSHOT | LAST), first_seq=first_seq, ticker=ticker,
    )  # fmt: skip


def test_a_new_book_is_empty_and_not_valid() -> None:
    book = OrderBook()
    assert not book.is_valid
    assert not book.is_complete
    assert (book.best_bid, book.best_ask, book.top(3)) == (None, None, ([], []))
    assert (book.known_low, book.known_high) == (None, None)


def test_a_snapshot_fills_the_book() -> None:
    book = OrderBook()
    book.apply(snapshot())
    assert book.is_valid
    assert book.is_complete
    assert book.bids == {99.0: 1.0, 98.0: 2.0}
    assert book.asks == {101.0: 3.0, 102.0: 4.0}
    assert (book.best_bid, book.best_ask) == ((99.0, 1.0), (101.0, 3.0))
    assert book.top(1) == ([(99.0, 1.0)], [(101.0, 3.0)])
    assert book.top(9) == ([(99.0, 1.0), (98.0, 2.0)], [(101.0, 3.0), (102.0, 4.0)])
    assert (book.update_id, book.timestamp) == (7, 1003)


def test_what_a_snapshot_reached_is_known_until_the_next_one() -> None:
    book = OrderBook()
    book.apply(rows_of((BID, NEW, 50.0, 1.0, LAST)))  # not of a snapshot
    assert (book.known_low, book.known_high) == (None, None)
    book.apply(snapshot())
    assert (book.known_low, book.known_high) == (98.0, 102.0)
    book.apply(rows_of((BID, NEW, 5.0, 1.0, 0), (ASK, NEW, 500.0, 1.0, 0), (BID, DELETE, 98.0, 0.0, LAST)))
    assert (book.known_low, book.known_high) == (98.0, 102.0)
    book.apply(rows_of((ASK, NEW, 101.5, 1.0, SNAPSHOT | LAST)))
    assert (book.known_low, book.known_high) == (None, 101.5)


def test_the_best_level_follows_deletes_and_better_prices() -> None:
    book = OrderBook()
    book.apply(snapshot())
    assert book.best_bid == (99.0, 1.0)
    book.apply(rows_of((BID, DELETE, 99.0, 0.0, 0), (ASK, NEW, 100.5, 5.0, LAST)))
    assert (book.best_bid, book.best_ask) == ((98.0, 2.0), (100.5, 5.0))
    book.apply(rows_of((BID, UPDATE, 98.0, 9.0, 0), (BID, DELETE, 1.0, 0.0, LAST)))  # the second was never there
    assert book.best_bid == (98.0, 9.0)
    assert set(book.bids) == {98.0}


def test_a_snapshot_clears_at_its_first_row_and_two_in_a_row_are_two() -> None:
    book = OrderBook()
    book.apply(snapshot())
    book.apply(rows_of((BID, NEW, 50.0, 1.0, SNAPSHOT)))
    assert (book.bids, book.asks) == ({50.0: 1.0}, {})
    assert not book.is_complete
    book.apply(rows_of((ASK, NEW, 51.0, 1.0, SNAPSHOT | LAST)))
    assert (book.bids, book.asks) == ({50.0: 1.0}, {51.0: 1.0})
    book.apply(rows_of((ASK, NEW, 52.0, 1.0, SNAPSHOT | LAST)))  # the run before ended with LAST
    assert (book.bids, book.asks) == ({}, {52.0: 1.0})
    book.apply(rows_of((0, DELETE, 0.0, 0.0, SNAPSHOT | LAST)))  # a snapshot without levels
    assert (book.bids, book.asks, book.is_valid) == ({}, {}, True)


def test_valid_only_behind_a_snapshot_and_while_no_row_says_otherwise() -> None:
    book = OrderBook()
    book.apply(rows_of((BID, NEW, 1.0, 1.0, LAST)))
    assert not book.is_valid
    book.apply(snapshot())
    book.apply(rows_of((BID, NEW, 1.0, 1.0, LAST | INVALID)))
    assert not book.is_valid
    book.apply(rows_of((BID, NEW, 1.5, 1.0, LAST)))
    assert book.is_valid
    book.invalidate()
    book.apply(rows_of((BID, NEW, 1.7, 1.0, LAST)))
    assert not book.is_valid
    book.apply(snapshot())
    assert book.is_valid
    assert set(book.bids) == {99.0, 98.0}


def test_a_lost_half_of_a_snapshot_does_not_join_the_next_one() -> None:
    book = OrderBook()
    book.apply(snapshot()[:2])
    book.invalidate()
    book.apply(snapshot()[2:])
    assert book.bids == {}
    assert set(book.asks) == {101.0, 102.0}


def test_rows_of_tables_carry_the_name_of_the_action() -> None:
    book = OrderBook()
    row = {"side": BID, "action": "NEW", "price": 5.0, "qty": 1.0, "flags": 3, "update_id": 1, "timestamp": 2}
    book.apply([row, {**row, "action": "UPDATE", "qty": 2.0, "flags": 1}])
    assert book.best_bid == (5.0, 2.0)
    with pytest.raises(ValueError, match="'MODIFY', allowed are NEW, UPDATE, DELETE"):
        book.apply([{**row, "action": "MODIFY"}])


_PRICES = st.integers(1, 8).map(float)
_ROW = st.tuples(
    st.sampled_from((BID, ASK)), st.sampled_from((NEW, UPDATE, DELETE)), _PRICES, st.integers(1, 9).map(float),
    st.sampled_from((0, 0, LAST, LAST, SNAPSHOT, SNAPSHOT | LAST, INVALID, LAST | INVALID)),
)  # fmt: skip


@given(st.lists(_ROW, max_size=60), st.lists(st.integers(0, 60), max_size=4))
def test_any_rows_in_any_batches_give_the_book_of_a_plain_model(rows: list[Any], cuts: list[int]) -> None:
    sides: dict[int, dict[float, float]] = {BID: {}, ASK: {}}
    run, valid = False, False
    reached: dict[int, list[float]] = {BID: [], ASK: []}  # prices that the newest snapshot named
    book = OrderBook()
    array = rows_of(*rows)
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    for start, stop in itertools.pairwise(edges):
        book.apply(array[start:stop])
        for side, action, price, qty, flags in rows[start:stop]:
            if flags & SNAPSHOT and not run:
                sides, valid, reached = {BID: {}, ASK: {}}, True, {BID: [], ASK: []}
            if flags & SNAPSHOT and action != DELETE:
                reached[side].append(price)
            run = bool(flags & SNAPSHOT) and not flags & LAST
            if action == DELETE:
                sides[side].pop(price, None)
            else:
                sides[side][price] = qty
        assert (book.bids, book.asks) == (sides[BID], sides[ASK])
        assert book.best_bid == max(sides[BID].items(), default=None)
        assert book.best_ask == min(sides[ASK].items(), default=None)
        assert book.known_low == min(reached[BID], default=None)
        assert book.known_high == max(reached[ASK], default=None)
        if stop:
            last_flags = rows[stop - 1][4]
            assert book.is_complete == bool(last_flags & LAST)
            assert book.is_valid == (valid and not last_flags & INVALID)


def test_books_of_a_ring_are_kept_apart_by_ticker() -> None:
    books = OrderBooks()
    rows = np.concatenate([snapshot(), snapshot(ticker=1)])
    rows["seq_id"] = range(10, 18)
    rows["price"][4:] += 1000
    assert sorted(books.apply(rows, ["BTC", "ETH"])) == ["BTC", "ETH"]
    assert books["BTC"].best_bid == (99.0, 1.0)
    assert books["ETH"].best_bid == (1099.0, 1.0)
    assert list(books) == ["BTC", "ETH"]
    assert len(books) == 2
    assert "XRP" not in books
    assert books.apply(rows[:0], ["BTC", "ETH"]) == []
    assert books.rows_lost == 0


@pytest.mark.parametrize("same_batch", [True, False], ids=["inside a batch", "between batches"])
def test_lost_rows_make_every_book_invalid_until_its_next_snapshot(same_batch: bool) -> None:
    books, tickers = OrderBooks(), ["BTC", "ETH"]
    first = np.concatenate([snapshot(first_seq=0), snapshot(first_seq=4, ticker=1)])
    second = np.concatenate([rows_of((BID, UPDATE, 99.0, 7.0, LAST), first_seq=11), snapshot(first_seq=12, ticker=1)])
    if same_batch:
        books.apply(np.concatenate([first, second]), tickers)
    else:
        books.apply(first, tickers)
        assert books["BTC"].is_valid
        books.apply(second, tickers)
    assert books.rows_lost == 3
    assert not books["BTC"].is_valid
    assert books["ETH"].is_valid


@pytest.mark.parametrize("seen", [0, 2], ids=["its begin is lost", "its middle is lost"])
@pytest.mark.parametrize("same_batch", [True, False], ids=["inside a batch", "between batches"])
def test_what_is_left_of_a_snapshot_behind_a_hole_is_no_snapshot(seen: int, same_batch: bool) -> None:
    """A reader that was lapped inside a large one finds its end: half a book, of which nobody may believe it is whole."""
    books, tickers = OrderBooks(), ["BTC", "ETH"]
    lost, other = snapshot(first_seq=4), snapshot(first_seq=8, ticker=1)
    parts = [snapshot(), lost[:seen], lost[3 - (seen == 0) :], other]
    for rows in [np.concatenate(parts)] if same_batch else [*parts[:2], parts[2][:1], parts[2][1:], other]:
        books.apply(rows, tickers)
    assert books.rows_lost == 2 - (seen == 2)
    assert not books["BTC"].is_valid
    assert books["ETH"].is_valid
    books.apply(snapshot(first_seq=12), tickers)
    assert books["BTC"].is_valid
