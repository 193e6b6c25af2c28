"""The market behind the simulated exchanges: repeatable, never crossed, and with trades that agree with its book."""

from decimal import Decimal
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.sim.binance import BinanceSpot
from tools.sim.deribit import Deribit, number
from tools.sim.market import ASK, BID, LEVELS_MIN, Action, Book, Market, plain

INTERVALS = {"1s": 1_000_000, "1m": 60_000_000}
EPOCH = 1_795_000_000_000_000


def market(seed: int, *tickers: str, rate: float = 100.0, intervals: dict[str, int] = INTERVALS) -> Market:
    instruments = [BinanceSpot.instrument(ticker, 1.0) for ticker in tickers]
    return Market(seed, instruments, rate, 20, intervals, EPOCH)


def run(made: Market, actions: int) -> list[tuple[str, Action]]:
    done: list[tuple[str, Action]] = []
    for _ in range(actions):
        book, action = made.step(EPOCH + made.next_due)
        done.append((book.instrument.ticker, action))
    return done


def test_the_same_seed_gives_the_same_market() -> None:
    first, second = (run(market(7, "BTCUSDT", "ETHUSDT"), 3000) for _ in range(2))
    assert first == second
    assert sum(len(action.trades) for _, action in first) > 300


def test_another_seed_gives_another_market() -> None:
    assert run(market(7, "BTCUSDT"), 200) != run(market(8, "BTCUSDT"), 200)


def test_a_ticker_does_not_depend_on_its_neighbours() -> None:
    alone = [(a.t, a.first_id, a.changes) for _, a in run(market(7, "BTCUSDT"), 500)]
    together = [(a.t, a.first_id, a.changes) for t, a in run(market(7, "ETHUSDT", "BTCUSDT"), 1500) if t == "BTCUSDT"]
    shared = min(len(alone), len(together))
    assert shared > 400
    assert alone[:shared] == together[:shared]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_books_are_never_crossed_and_trades_take_what_stands_in_them(seed: int) -> None:
    made = market(seed, "BTCUSDT")
    book = made.books["BTCUSDT"]
    trade_id, update_id = book.trade_id, book.update_id
    traded = 0
    for _ in range(6000):
        before = dict(book.qty[BID]), dict(book.qty[ASK])
        best = book.best(BID)[0], book.best(ASK)[0]
        _, action = made.step(made.next_due)
        assert action.first_id == update_id + 1
        assert action.last_id == update_id + len(action.changes)
        update_id = action.last_id
        expected = [dict(side) for side in before]
        for trade in action.trades:
            assert trade.id == trade_id + 1
            trade_id = trade.id
            side = ASK if trade.side > 0 else BID
            resting = expected[side]
            assert trade.price == (min(resting) if side == ASK else max(resting)), "a trade happens at the best price"
            assert trade.price >= best[ASK] if side == ASK else trade.price <= best[BID]
            resting[trade.price] -= trade.lots
            assert resting[trade.price] >= 0
            if not resting[trade.price]:
                del resting[trade.price]
            traded += 1
        if action.trades:
            assert expected == [book.qty[BID], book.qty[ASK]], "a market order changes nothing but what it takes"
        for side, price, old, new in action.changes:
            assert before[side].get(price, 0) == old
            assert book.qty[side].get(price, 0) == new
            assert old != new
        _check(book)
    assert traded > 1000


def _check(book: Book) -> None:
    for side in (BID, ASK):
        assert book.prices[side] == sorted(book.qty[side])
        assert len(book.prices[side]) >= LEVELS_MIN
        assert all(lots > 0 for lots in book.qty[side].values())
    assert book.best(BID)[0] < book.best(ASK)[0]


def test_a_cross_is_published_and_taken_back() -> None:
    made = market(1, "BTCUSDT")
    book = made.books["BTCUSDT"]
    action = made.cross("BTCUSDT", EPOCH)
    assert action.first_id == action.last_id
    ((side, price, old, new),) = action.changes
    assert side == BID
    assert price > book.best(ASK)[0]
    assert (old, new) == (0, book.level(BID, price))
    assert book.levels(BID)[0][0] == price
    undo = made.uncross("BTCUSDT", EPOCH)
    assert undo.changes == [(BID, price, new, 0)]
    assert book.levels(BID)[0] == book.best(BID)


def test_a_real_order_takes_the_place_of_a_crossing_level() -> None:
    made = market(1, "BTCUSDT")
    book = made.books["BTCUSDT"]
    ((_, price, _, shown),) = made.cross("BTCUSDT", EPOCH).changes
    seen: list[tuple[int, int, int, int]] = []
    for _ in range(200_000):
        _, action = made.step(made.next_due)
        seen = [change for change in action.changes if change[:2] == (BID, price)]
        if seen:
            break
    assert seen, "the market never came to that price; choose another seed"
    assert seen[0][2] == shown
    assert made.uncross("BTCUSDT", EPOCH).changes == []
    assert book.level(BID, price) == book.qty[BID].get(price, 0)


def test_candles_hold_exactly_their_trades() -> None:
    """The longer one is made of twenty parts, each joined to it as it ends; with this seed prices move within it."""
    part = 50_000
    made = market(4, "BTCUSDT", rate=500.0, intervals={"part": part, "1s": 20 * part})
    trades, closed = [], []
    part_ends = EPOCH + part
    for _ in range(5000):
        t = EPOCH + made.next_due
        while t >= part_ends:
            closed += made.candles["BTCUSDT"].roll(part_ends)
            part_ends += part
        trades += made.step(t)[1].trades
    assert sum(name == "1s" for name, _ in closed) >= 5
    for _, candle in closed:
        inside = [t for t in trades if candle.start <= t.t < candle.end]
        bought = [t for t in inside if t.side > 0]
        assert candle.trades == len(inside)
        assert candle.lots == sum(t.lots for t in inside)
        assert candle.value == sum(t.price * t.lots for t in inside)
        assert candle.coins == pytest.approx(sum(t.lots / t.price for t in inside))
        assert candle.buy_lots == sum(t.lots for t in bought)
        assert candle.buy_value == sum(t.price * t.lots for t in bought)
        if inside:
            assert (candle.open, candle.close) == (inside[0].price, inside[-1].price)
            assert (candle.high, candle.low) == (max(t.price for t in inside), min(t.price for t in inside))
            assert (candle.first_id, candle.last_id) == (inside[0].id, inside[-1].id)


def test_a_delay_shifts_what_has_not_happened() -> None:
    made = market(1, "BTCUSDT")
    due = made.next_due
    made.delay(5_000_000)
    assert made.next_due == due + 5_000_000


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        # As sent by the venue in recorded frames.
        (852_175, 1, "85217.5"),
        (2_000, 0, "2.0e3"),
        (174_870, 0, "174870.0"),
        (12_700, 0, "1.27e4"),
        (10, 0, "10.0"),
        (910, 0, "910.0"),
        (1_000_200, 0, "1.0002e6"),
        (999_990, 0, "999990.0"),
        (2, 4, "0.0002"),
        (1_423, 7, "1.423e-4"),
        (0, 4, "0.0"),
        (769_140, 1, "76914.0"),
        (360, 1, "36.0"),
        (855, 4, "0.0855"),
    ],
)
def test_numbers_are_written_as_deribit_writes_them(value: int, scale: int, text: str) -> None:
    assert number(value, scale) == text


@given(st.integers(-(10**14), 10**14), st.integers(0, 9))
def test_a_written_number_is_exact(value: int, scale: int) -> None:
    assert Decimal(number(value, scale)) == Decimal(value).scaleb(-scale)


@given(st.integers(0, 10**16), st.integers(0, 8))
def test_plain_text_is_exact_and_has_all_decimals(value: int, scale: int) -> None:
    text = plain(value, scale)
    assert Decimal(text) == Decimal(value).scaleb(-scale)
    assert len(text.partition(".")[2]) == scale


@pytest.mark.parametrize(
    ("ticker", "kind", "linear", "quote"),
    [
        ("BTC-PERPETUAL", "future", False, "USD"),
        ("BTC_USDC-PERPETUAL", "future", True, "USDC"),
        ("ETH-25DEC26", "future", False, "USD"),
        ("BTC-25DEC26-90000-C", "option", False, "BTC"),
    ],
)
def test_a_deribit_name_says_what_the_instrument_is(ticker: str, kind: str, linear: bool, quote: str) -> None:
    instrument = Deribit.instrument(ticker, 1.0)
    assert (instrument.kind, instrument.facts["linear"], instrument.quote) == (kind, linear, quote)
    assert instrument.start > 0
    made = Market(1, [instrument], 10.0, 20, {}, EPOCH)
    numbers = count()
    for _ in range(500):
        made.books[ticker].act(EPOCH, numbers.__next__)
        _check(made.books[ticker])
