"""Every recorded answer of GMX through the decoder, against plain json and decimals; and the rules on made-up sequences.

There is no recording, only single answers; what comes one after the other is cut out of the recorded candles.
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from recorded import DATA, LAST, REPLAYED, TIME_LOCAL, needs_data, plain, same_decimal, table

from mdcollector.emit import Emit
from mdcollector.errors import ConfigError, FrameError
from mdcollector.exchanges import Fetch, Options, Reconnect, Selection
from mdcollector.exchanges.gmx import HOST_PATIENCE_NS, KNOWN_MAX, LOOKBACK, Gmx
from mdcollector.normalize import normalize
from mdcollector.recording import Entry, RecordingWriter

REST = DATA / "gmx" / "rest"
BASE = "https://arbitrum-api.gmxinfra.io"
FEEDS = ("candles", "tickers")
NOW_NS = 1_790_952_000_000_000_000  # within the newest recorded 15m candle of BTC
UNUSABLE = (FrameError, msgspec.DecodeError, UnicodeDecodeError)

Candle = Sequence[float]


def candles_url(ticker: str, period: str, limit: int = 200) -> str:
    return f"{BASE}/prices/candles?tokenSymbol={ticker}&period={period}&limit={limit}"


URLS = {
    "candles_btc_15m.json": candles_url("BTC", "15m"),
    "candles_sol_15m.json": candles_url("SOL", "15m"),
    "prices_tickers_arbitrum.json": f"{BASE}/prices/tickers",
    "tokens_arbitrum.json": f"{BASE}/tokens",
    "markets_arbitrum.json": f"{BASE}/markets",
    "cap2026_v1_markets_tickers_excerpt.json": "https://arbitrum.gmxapi.io/v1/markets/tickers",
}


class Polled:
    """A venue as the connector runs it, over rings in a directory; answers are handed in."""

    def __init__(self, folder: Path, tickers: Sequence[str] = ("BTC",), **options: Any) -> None:
        self.options = Options(**{"intervals": ("15m",), "late_s": 0.0, **options})
        streams = [s for ticker in tickers for s in Gmx.streams_of(ticker, FEEDS, self.options)]
        self.emit = Emit(folder, "t", Gmx.EXCHANGE, FEEDS, semaphore=False)
        self.venue = Gmx(self.emit, self.options, streams)
        self.venue.opened()

    def answer(self, path: str, body: object, *, now_ns: int = NOW_NS) -> None:
        self.emit.packet(now_ns, self.emit.clock())
        raw = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
        self.venue.http(BASE + path, raw)

    def candles(self, rows: Sequence[Candle], period: str = "15m", ticker: str = "BTC", **options: Any) -> None:
        """An answer with these candles, the newest first."""
        path = candles_url(ticker, period).removeprefix(BASE)
        self.answer(path, {"period": period, "candles": list(rows)}, **options)

    def rows(self, feed: str = "candles") -> list[dict[str, Any]]:
        ring = self.emit.rings[feed]
        rows = ring.recent_rows(0)
        return [
            {
                **dict(zip(rows.dtype.names, values, strict=True)),
                "ticker": ring.tickers[values[rows.dtype.names.index("ticker")]],
            }
            for values in rows.tolist()
        ]

    def seen(self) -> list[tuple[int, bool, float]]:
        """Open time (s), closed, close of each candle row."""
        return [(row["open_time"] // 1_000_000, bool(row["closed"]), row["close"]) for row in self.rows()]


@pytest.fixture
def polled(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as stack:

        def make(*tickers: str, folder: str = "rings", **options: Any) -> Polled:
            made = Polled(tmp_path / folder, tickers or ("BTC",), **options)
            stack.callback(made.emit.close)
            return made

        yield make


def history(count: int = 40, step: int = 900) -> list[list[float]]:
    """Made-up candles, the newest first; the newest one begins within `NOW_NS`'s bucket."""
    newest = NOW_NS // 1_000_000_000 // step * step
    return [[newest - n * step, 100.0 + n, 101.0 + n, 99.0 + n, 100.5 + n] for n in range(count)]


# Recorded answers


@needs_data
def test_every_recorded_answer_is_known_here() -> None:
    assert {path.name for path in REST.iterdir()} == URLS.keys()


@needs_data
def test_recorded_answers_become_the_rows_that_plain_json_gives(tmp_path: Path) -> None:
    """Through normalize: every candle and every price, exact to the last digit; what belongs to no feed is left."""
    with_writer = RecordingWriter(tmp_path / "r.jsonl.zst")
    order = ["tokens_arbitrum.json", *(name for name in URLS if name != "tokens_arbitrum.json")]
    for number, name in enumerate(order):
        with_writer.write(Entry(NOW_NS + number * 1000, "rest", "http", url=URLS[name], raw=(REST / name).read_text()))
    with_writer.close()
    report = normalize("gmx", [tmp_path / "r.jsonl.zst"], tmp_path / "out")
    assert report.counters == {"refused_unhandled_url": 1}, "markets/tickers is an answer of another interface"
    assert report.gaps == 0
    assert report.findings == []

    stored = table(tmp_path / "out", "candles")
    expected = []
    for name, ticker in (("candles_btc_15m.json", "BTC"), ("candles_sol_15m.json", "SOL")):
        rcv_us = NOW_NS // 1000 + order.index(name)
        newest_first = plain((REST / name).read_text())["candles"]
        expected += [(ticker, rcv_us, row, index > 0) for index, row in reversed(list(enumerate(newest_first)))]
    assert len(stored["seq_id"]) == len(expected) == 400
    for n, (ticker, rcv_us, (start, *prices), closed) in enumerate(expected):
        assert (stored["ticker"][n], stored["interval"][n], stored["open_time"][n]) == (
            ticker,
            "15m",
            start * 1_000_000,
        )
        assert (stored["closed"][n], stored["volume"][n], stored["trades"][n]) == (closed, None, None)
        assert stored["timestamp"][n] == stored["rcv_timestamp"][n] == rcv_us
        assert stored["flags"][n] == LAST | TIME_LOCAL | REPLAYED
        for column, text in zip(("open", "high", "low", "close"), prices, strict=True):
            assert same_decimal(stored[column][n], str(text))

    stored = table(tmp_path / "out", "instruments")
    assert stored["ticker"] == [token["symbol"] for token in plain((REST / order[0]).read_text())["tokens"]]
    assert set(stored["quote"]) == {"USD"}

    stored = table(tmp_path / "out", "tickers")
    decimals = {token["address"]: token["decimals"] for token in plain((REST / order[0]).read_text())["tokens"]}
    prices = plain((REST / "prices_tickers_arbitrum.json").read_text())
    assert stored["ticker"] == [price["tokenSymbol"] for price in prices]
    for n, price in enumerate(prices):
        scale = Decimal(10) ** (30 - decimals[price["tokenAddress"]])
        assert stored["bid_price"][n] == float(Decimal(price["minPrice"]) / scale)
        assert stored["ask_price"][n] == float(Decimal(price["maxPrice"]) / scale)
        assert stored["timestamp"][n] == price["updatedAt"] * 1000
    unknown = ("last", "open_24h", "volume_24h", "mark_price", "index_price", "funding_rate")
    assert {stored[column][n] for column in unknown for n in range(len(prices))} == {"nan"}


@needs_data
def test_the_recorded_list_of_tokens() -> None:
    body = (REST / "tokens_arbitrum.json").read_bytes()
    tokens = json.loads(body)["tokens"]
    listed = Gmx.instruments(body)
    assert [info.ticker for info in listed] == [token["symbol"] for token in tokens]
    assert [info.status for info in listed] == ["synthetic" if token.get("synthetic") else "token" for token in tokens]
    assert Gmx.instruments(json.dumps(tokens).encode()) == listed, "some copies of the documentation show a bare list"
    assert Selection(("BTC", "W*", "!WLD")).chosen(listed) == sorted(
        t["symbol"]
        for t in tokens
        if t["symbol"] == "BTC" or (t["symbol"].upper().startswith("W") and t["symbol"] != "WLD")
    )


@needs_data
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["candles_sol_15m.json", "prices_tickers_arbitrum.json", "tokens_arbitrum.json"])
def test_mutated_answers(polled: Any, name: str, seed: int) -> None:
    """Bytes changed at random: nothing but the errors that mean unusable, no impossible row, and the true answer after it."""
    raw, rng, one = (REST / name).read_bytes()[:6000], random.Random(f"{seed}{name}"), polled("SOL", "BTC")
    one.answer("/tokens", (REST / "tokens_arbitrum.json").read_bytes())
    path, refused = URLS[name].removeprefix(BASE), 0
    whole = (REST / name).read_bytes()
    for _ in range(150):
        broken = bytearray(whole if rng.random() < 0.5 else raw)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(broken))
            broken[at : at + rng.randint(0, 3)] = rng.choice(
                [b"", b"9" * 30, b"-", b"null", b"\xff", b"[[", b"1e999", b"0", b'"']
            )
        try:
            one.answer(path, bytes(broken))
        except UNUSABLE:
            refused += 1
    assert refused + sum(n for name, n in one.emit.counters.items() if name.startswith("refused")) > 50
    assert all(0 < row[key] < 1e15 for row in one.rows() for key in ("open", "high", "low", "close"))
    assert all(0 < row["bid_price"] < 1e15 for row in one.rows("tickers"))
    before = len(one.rows("gaps"))
    one.venue._rule = 0
    one.answer(path, whole)
    assert len(one.rows("gaps")) - before <= 1


# Candles, one answer after the other


def test_the_first_candle_is_open_until_a_newer_one_is_there(polled: Any) -> None:
    one, (c, b, a, *_) = polled(backfill=0), history(3)
    one.candles([a])
    one.candles([a])
    a2 = [a[0], a[1], a[2] + 5, a[3], a[4] + 1]
    one.candles([a2])
    one.candles([b, a2])
    one.candles([c, b, a2])
    assert one.seen() == [
        (a[0], False, a[4]), (a[0], False, a2[4]), (a[0], True, a2[4]), (b[0], False, b[4]), (b[0], True, b[4]), (c[0], False, c[4]),
    ]  # fmt: skip
    assert not one.rows("gaps")


@pytest.mark.parametrize(("backfill", "closed"), [(0, 0), (1, 1), (7, 7), (1000, 39)])
def test_as_many_closed_candles_as_wanted_are_published_at_the_start(polled: Any, backfill: int, closed: int) -> None:
    one, rows = polled(backfill=backfill), history(40)
    one.candles(rows)
    assert one.seen() == [(row[0], row is not rows[0], row[4]) for row in reversed(rows[: closed + 1])]
    one.candles(rows)
    assert len(one.seen()) == closed + 1, "the same answer again brings nothing"


def test_a_revised_candle_is_a_new_version(polled: Any) -> None:
    """F20. Only what changed is published again, as closed as it was."""
    one, rows = polled(), history(20)
    one.candles(rows)
    count = len(one.seen())
    changed = [list(row) for row in rows]
    changed[3][4] += 0.25
    one.candles(changed)
    assert one.seen()[count:] == [(changed[3][0], True, changed[3][4])]
    assert one.emit.counters["candle_revised"] == 1
    one.candles(changed)
    assert len(one.seen()) == count + 1


def test_a_host_that_is_behind_takes_nothing_back(polled: Any) -> None:
    """What it calls open ended long ago, also where no other host had it: neither reopened nor published as open."""
    one, rows = polled(), history(10)
    one.candles([rows[0], *rows[2:]])
    before = one.seen()
    one.candles([[*rows[1][:4], 77.0], *rows[2:]])
    assert one.seen() == before
    assert one.emit.counters["stale_answer"] == 1


def test_a_candle_that_was_not_served_is_a_hole(polled: Any) -> None:
    one, rows = polled(), history(10)
    one.candles(rows[4:])
    one.candles([rows[0], *rows[3:]])
    (gap,) = one.rows("gaps")
    assert (gap["feed"], gap["ticker"], gap["cause"]) == (b"candles", "BTC", b"not_served")
    assert (
        gap["from_time"] <= rows[2][0] * 1_000_000 < rows[1][0] * 1_000_000 <= gap["to_time"] < rows[0][0] * 1_000_000
    )
    assert one.seen()[-3:] == [
        (rows[4][0], True, rows[4][4]),
        (rows[3][0], True, rows[3][4]),
        (rows[0][0], False, rows[0][4]),
    ]


def test_another_life_goes_on_where_the_last_one_ended(polled: Any) -> None:
    """The ring tells: nothing twice, the open candle closed, a revision noticed, what was missed fetched."""
    rows = history(30)
    one = polled(backfill=20)
    one.candles(rows[3:])
    before = one.seen()
    one.emit.close()
    two = polled(backfill=20)
    two.venue.tick(NOW_NS + 10**18)
    limits = [
        want.path.rpartition("=")[2] for want in two.venue.wants if isinstance(want, Fetch) and "candles" in want.key
    ]
    assert int(limits[0]) > 20
    changed = [list(row) for row in rows]
    changed[5][4] += 1
    two.candles(changed)
    assert two.seen()[len(before) :] == [(changed[n][0], n > 0, changed[n][4]) for n in (5, 3, 2, 1, 0)], (
        "older ones than the first life took are not wanted either"
    )
    assert two.emit.counters["candle_revised"] == 1


def test_what_is_remembered_is_bounded(polled: Any) -> None:
    one, rows = polled(intervals=("1m",), backfill=10_000), history(2000, 60)
    for end in range(1900, 0, -100):
        one.candles(rows[end:], "1m")
    (series,) = one.venue._series.values()
    assert len(series.known) <= 2 * KNOWN_MAX
    seen = one.seen()
    closed = [start for start, is_closed, _ in seen if is_closed]
    assert len(closed) == len(set(closed)) == 2000 - 101
    assert not one.rows("gaps")


def test_after_a_pause_as_many_candles_are_asked_for_as_are_missing(polled: Any) -> None:
    one, rows = polled(backfill=5), history(10)
    one.candles(rows)

    def limit(later_s: int) -> int:
        one.venue.wants.clear()
        for series in one.venue._series.values():
            series.due_ns = 0
        one.venue.tick(NOW_NS + later_s * 1_000_000_000)
        (path,) = (
            w.path
            for w in one.venue.wants
            if isinstance(w, Fetch) and w.key.startswith("/prices/candles?tokenSymbol=BTC&period=15m")
        )
        return int(path.rpartition("=")[2])

    assert limit(0) == LOOKBACK + 1
    assert limit(50 * 900) == LOOKBACK + 51
    assert limit(10**9) == 10_000, "what the venue allows"


BAD_CANDLES = {
    "no list": {"period": "15m"},
    "another period": {"period": "1h", "candles": [[NOW_NS // 10**9, 1, 1, 1, 1]]},
    "text": {"period": "15m", "candles": [["1", 1, 1, 1, 1]]},
    "four numbers": {"period": "15m", "candles": [[NOW_NS // 10**9, 1, 1, 1]]},
    "half a second": {"period": "15m", "candles": [*history(3), [900.5, 1, 1, 1, 1]]},
    "the future": {"period": "15m", "candles": [[NOW_NS // 10**9 + 7200, 1, 1, 1, 1], *history(3)]},
    "oldest first": {"period": "15m", "candles": history(3)[::-1]},
    "one twice": {"period": "15m", "candles": [*history(3), history(3)[-1]]},
    "too many": {"period": "15m", "candles": history(10_001, 1)},
    "an error": {"error": "unwell"},
    "nesting": b'{"period":"15m","candles":[],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nothing": b"",
}


@pytest.mark.parametrize("what", BAD_CANDLES)
def test_half_of_a_refused_answer_is_not_applied(polled: Any, what: str) -> None:
    one = polled()
    with pytest.raises(UNUSABLE):
        one.answer(candles_url("BTC", "15m").removeprefix(BASE), BAD_CANDLES[what])
    assert one.seen() == []
    one.candles(history(3))
    assert len(one.seen()) == 3


@pytest.mark.parametrize("number", [0, -1, 1e15])
@pytest.mark.parametrize("at", range(3))
def test_one_impossible_candle_harms_no_other(polled: Any, number: float, at: int) -> None:
    """Nor does what is behind it count as the open one; the right version is published once it comes."""
    one, rows = polled(), history(3)
    one.candles([[*row[:3], number, row[4]] if n == at else row for n, row in enumerate(rows)])
    assert one.seen() == [(row[0], n > 0, row[4]) for n, row in reversed([*enumerate(rows)]) if n != at]
    assert one.emit.counters["refused_absurd_number"] == 1
    one.candles(rows)
    assert one.seen()[2:] == [(rows[at][0], at > 0, rows[at][4])]


def test_an_empty_array_is_counted_and_confirms_the_stream_once(polled: Any) -> None:
    """F20. It is an answer, so the stream was asked for rightly; but it is no sign of life."""
    one = polled()
    (name,) = (s.name for s in one.venue.streams if s.feed == "candles")
    one.candles([])
    state = one.venue.proof[name]
    first = state.acknowledged_ns
    one.candles([])
    assert (first > 0, state.acknowledged_ns) == (True, first)
    assert one.emit.counters["candles_empty"] == 2
    one.candles(history(3))
    assert state.acknowledged_ns > first


def test_a_refusal_is_told_and_taken_back(polled: Any) -> None:
    one = polled()
    (name,) = (s.name for s in one.venue.streams if s.feed == "candles")
    one.venue.http_failed(Fetch(name, name, 1), 400, b'{"error":"no such token"}')
    assert one.venue.proof[name].refused.startswith("HTTP 400")
    one.candles(history(3))
    assert one.venue.proof[name].refused == ""
    assert not [note for note in one.venue.notes if "refused" in note or "up to date" in note]


def test_another_host_is_wanted_when_nothing_is_up_to_date(polled: Any) -> None:
    one = polled(late_s=120.0)
    old = history(10)[3:]
    one.candles(old)
    assert not one.venue.wants, "it may be this token only"
    assert one.seen()[-1] == (old[1][0], True, old[1][4]), "its open candle has ended meanwhile"
    one.venue._fresh_ns -= HOST_PATIENCE_NS + 1
    one.candles(old)
    assert [type(want) for want in one.venue.wants] == [Reconnect]
    assert one.venue.wants[0].overlap
    one.candles(old)
    assert len(one.venue.wants) == 1, "the next host gets its time"


# Prices

TOKENS = [{"symbol": "BTC", "address": "0xB", "decimals": 8}, {"symbol": "ETH", "address": "0xE", "decimals": 18}]


def price(
    ticker: str = "BTC", usd: str = "61536.387", exponent: int = 22, at: int = NOW_NS // 10**6, **more: Any
) -> dict[str, Any]:
    digits = str(int(Decimal(usd) * Decimal(10) ** exponent))
    return {
        "tokenAddress": f"0x{ticker[0]}",
        "tokenSymbol": ticker,
        "minPrice": digits,
        "maxPrice": digits,
        "updatedAt": at,
        **more,
    }


def ready(one: Polled, close: float = 61500.0) -> Polled:
    one.answer("/tokens", {"tokens": TOKENS})
    one.candles([[NOW_NS // 10**9 // 60 * 60, close, close, close, close]], "1m")
    return one


@pytest.mark.parametrize(("exponent", "oracle"), [(22, None), (30, None), (20, 2), (22, 2), (30, 2)])
def test_the_decimal_rule_is_told_by_the_candles(polled: Any, exponent: int, oracle: int | None) -> None:
    one = ready(polled())
    more = {} if oracle is None else {"oracleDecimals": oracle}
    one.answer("/prices/tickers", [price(exponent=exponent, **more)])
    (row,) = one.rows("tickers")
    assert (row["bid_price"], row["ask_price"]) == (61536.387, 61536.387)


@pytest.mark.parametrize(("exponent", "close"), [(22, 65_000.0), (22, 58_500.0), (25, 61_500.0), (20, 61_500.0)])
def test_without_a_rule_nothing_is_collected(polled: Any, exponent: int, close: float) -> None:
    """Beyond 5 % of the candle, or another power of ten; 10^20 is a rule only where oracleDecimals are given."""
    one = ready(polled(), close)
    with pytest.raises(ConfigError, match=r"the price of BTC is .* no decimal rule fits within 5%"):
        one.answer("/prices/tickers", [price(exponent=exponent)])
    assert one.rows("tickers") == []


def test_the_decimal_rule_is_that_of_most_tokens(polled: Any) -> None:
    """Those that fit none, or another one, end nothing; where as many fit two rules it is the likelier one."""
    minute = NOW_NS // 10**9 // 60 * 60
    for number, (bitcoin, doge, rule) in enumerate(
        [
            (price(usd="0"), price("DOGE", "1739.5", 12), 0),
            (price(usd="65300"), price("DOGE", "1739.5", 12), 0),
            (price(exponent=22), price("DOGE", "1739.5", 30), 0),
            (price(exponent=30), price("DOGE", "1739.5", 30), 1),
        ]
    ):
        one = ready(polled("BTC", "ETH", "DOGE", folder=str(number)))
        one.answer("/tokens", {"tokens": [*TOKENS, {"symbol": "DOGE", "address": "0xD", "decimals": 18}]})
        for ticker in ("ETH", "DOGE"):
            one.candles([[minute, 1739.0, 1739.0, 1739.0, 1739.0]], "1m", ticker)
        one.answer("/prices/tickers", [bitcoin, price("ETH", "1739.5", 12), doge])
        assert one.venue._rule == rule


def test_two_tokens_that_fit_no_rule_are_both_named(polled: Any) -> None:
    one = ready(polled("BTC", "ETH"), 58_000.0)
    one.candles([[NOW_NS // 10**9 // 60 * 60, 1500.0, 1500.0, 1500.0, 1500.0]], "1m", "ETH")
    with pytest.raises(ConfigError, match=r"price of BTC is .* price of ETH is .* no decimal rule fits within 5%"):
        one.answer("/prices/tickers", [price(), price("ETH", "1739.5", 12)])


def test_prices_of_zero_tell_no_rule(polled: Any) -> None:
    one = ready(polled())
    one.answer("/prices/tickers", [price(usd="0")])
    assert one.rows("tickers") == []
    one.answer("/prices/tickers", [price()])
    assert [row["bid_price"] for row in one.rows("tickers")] == [61536.387]


def test_prices_wait_for_decimals_and_a_candle(polled: Any) -> None:
    one = polled()

    def asked() -> list[str]:
        one.venue.wants.clear()
        one.venue._prices_due_ns = 0
        one.venue.tick(time.time_ns())
        return [want.key for want in one.venue.wants if isinstance(want, Fetch) and "15m" not in want.key]

    minute = "/prices/candles?tokenSymbol=BTC&period=1m"
    assert asked() == ["/tokens", minute]
    one.answer("/tokens", {"tokens": TOKENS})
    assert asked() == [minute]
    ready(one)
    assert asked() == [minute, "/prices/tickers"]
    one.answer("/prices/tickers", [price()])
    assert asked() == ["/prices/tickers"]


def test_times_in_seconds_and_milliseconds(polled: Any) -> None:
    one, seconds = ready(polled()), NOW_NS // 10**9
    for at in (seconds * 1000, (seconds + 1), (seconds + 2) * 1000 + 7):
        one.answer("/prices/tickers", [price(at=at)])
    one.answer(
        "/prices/tickers", [{key: value for key, value in price(timestamp=seconds + 9).items() if key != "updatedAt"}]
    )
    assert [row["timestamp"] for row in one.rows("tickers")] == [
        seconds * 1_000_000, (seconds + 1) * 1_000_000, (seconds + 2) * 1_000_000 + 7000, (seconds + 9) * 1_000_000,
    ]  # fmt: skip


def test_each_price_is_one_row_also_over_a_restart(polled: Any) -> None:
    one, at = ready(polled()), NOW_NS // 10**6
    for moment in (at, at, at + 1, at):
        one.answer("/prices/tickers", [price(at=moment)])
    assert [row["timestamp"] for row in one.rows("tickers")] == [at * 1000, (at + 1) * 1000]
    assert (one.emit.counters["ticker_unchanged"], one.emit.counters["ticker_older"]) == (1, 1)
    one.emit.close()
    two = ready(polled())
    for moment in (at + 1, at + 2):
        two.answer("/prices/tickers", [price(at=moment)])
    assert [row["timestamp"] for row in two.rows("tickers")][2:] == [(at + 2) * 1000]


def test_what_is_of_the_future_does_not_hide_what_follows(polled: Any) -> None:
    one, at, rows = ready(polled()), NOW_NS // 10**6, history(3)
    one.answer("/prices/tickers", [price(at=at + 3_600_000)])
    one.answer("/prices/tickers", [price(at=at)])
    assert [row["timestamp"] for row in one.rows("tickers")] == [at * 1000]
    assert one.emit.counters["refused_absurd_number"] == 1
    with pytest.raises(FrameError, match="candle"):
        one.candles([[rows[0][0] + 1800, *rows[0][1:]], *rows])
    one.candles(rows)
    assert one.seen()[-1] == (rows[0][0], False, rows[0][4])


def test_one_impossible_price_harms_no_other(polled: Any) -> None:
    one = ready(polled("BTC", "ETH", "DOGE"))
    one.answer("/prices/tickers", [price(), price("ETH", "1739.5", 12)])
    bad = price("ETH", "0", 12, at=NOW_NS // 10**6 + 5)
    unknown = {**price("DOGE", "0.07", 22), "tokenAddress": "0xnew"}
    one.answer("/prices/tickers", [bad, unknown, price(at=NOW_NS // 10**6 + 5)])
    assert [row["ticker"] for row in one.rows("tickers")] == ["BTC", "ETH", "BTC"]
    assert (one.emit.counters["refused_absurd_number"], one.emit.counters["refused_unknown_decimals"]) == (1, 1)
    one.venue._prices_due_ns = 0
    one.venue.tick(time.time_ns())
    assert "/tokens" in {want.key for want in one.venue.wants if isinstance(want, Fetch)}, "a new token, maybe"


MALFORMED = [1, {"tokenSymbol": 5}, {"tokenSymbol": "BTC"}, *(
    price(**{"minPrice": "1", **odd}) for odd in (
        {"updatedAt": -1}, {"minPrice": ""}, {"minPrice": "1e3"}, {"minPrice": "9" * 61}, {"minPrice": "-5"}, {"minPrice": 5}
    )
)]  # fmt: skip


@pytest.mark.parametrize("malformed", MALFORMED)
def test_one_malformed_price_harms_no_other(polled: Any, malformed: Any) -> None:
    one = ready(polled("BTC", "ETH"))
    one.candles([[NOW_NS // 10**9 // 60 * 60, 1739.0, 1739.0, 1739.0, 1739.0]], "1m", "ETH")
    one.answer("/prices/tickers", [malformed, price("ETH", "1739.5", 12)])
    assert [(row["ticker"], row["bid_price"]) for row in one.rows("tickers")] == [("ETH", 1739.5)]
    assert one.emit.counters["refused_wrong_type"] == 1
    assert json.dumps(malformed, separators=(",", ":")) in one.emit.samples["refused_wrong_type"]


def test_a_name_that_is_no_text_harms_no_other(polled: Any) -> None:
    one = ready(polled())
    one.answer("/prices/tickers", [price()])
    later = json.dumps([price(at=NOW_NS // 10**6 + 1)]).encode()
    one.answer("/prices/tickers", b'[{"tokenSymbol":"\xff"},' + later[1:])
    assert [row["ticker"] for row in one.rows("tickers")] == ["BTC", "BTC"]
    assert one.emit.counters["refused_malformed"] == 1


def test_a_malformed_price_of_an_unwanted_token_is_no_matter(polled: Any) -> None:
    one = ready(polled())
    one.answer("/prices/tickers", [{"tokenSymbol": "OLD", "minPrice": ""}, price()])
    assert [row["ticker"] for row in one.rows("tickers")] == ["BTC"]
    assert not [name for name in one.emit.counters if name.startswith("refused")]


@pytest.mark.parametrize("body", [b"", b"{}", b"[1", {"tokenSymbol": "BTC"}])
def test_a_list_of_prices_that_cannot_be(polled: Any, body: Any) -> None:
    one = ready(polled())
    with pytest.raises(UNUSABLE):
        one.answer("/prices/tickers", body)
    assert one.rows("tickers") == []


def test_a_token_that_is_not_in_the_list_is_refused_and_comes_back(polled: Any) -> None:
    one = ready(polled("BTC", "ETH"))
    one.answer("/prices/tickers", [price()])
    name = "/prices/tickers ETH"
    assert one.venue.proof[name].refused == "not in the list of prices"
    one.answer("/prices/tickers", [])
    assert one.emit.counters["tickers_empty"] == 1
    one.answer("/prices/tickers", [price(at=NOW_NS // 10**6 + 1), price("ETH", "1739.5", 12)])
    assert one.venue.proof[name].refused == ""
    assert one.venue.proof[name].acknowledged_ns > one.venue.proof[name].requested_ns


def test_new_fields_are_told_once(polled: Any) -> None:
    one = ready(polled())
    for n in range(3):
        one.answer("/prices/tickers", [price(at=NOW_NS // 10**6 + n, confidence="0.1")])
    assert one.emit.counters["protocol_drift"] == 1
    assert "new field confidence" in one.venue.notes


def test_resources_of_no_feed_are_passed_over_and_unknown_ones_refused(polled: Any) -> None:
    one = polled()
    for path in ("/ping", "/markets", "/markets/info", "/prices/24h", "/signed_prices/latest"):
        one.answer(path, {"ok": True})
    with pytest.raises(FrameError, match="nothing"):
        one.answer("/nothing", {})
    with pytest.raises(FrameError):
        one.venue.decode(b"{}")
