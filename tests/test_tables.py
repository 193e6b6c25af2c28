"""Tables: every feed's rows become the values that plain Python reads out of them."""

import math
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdcollector.records import FEEDS, TRADES, Action, Column, Feed
from mdcollector.tables import ColumnBuffer, arrow_schema, clickhouse_ddl, rows_to_table, schema_markdown

TICKERS = ["BTCUSDT", "币安人生USDT", "ETH-30JUL21-2800-C", "never used"]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def random_values(feed: Feed, count: int, seed: int) -> list[list[object]]:
    """Rows as lists of plain values, in ring order."""
    rng = np.random.default_rng(seed)

    def value(column: Column, n: int) -> object:
        if column.null is not None and rng.random() < 0.2:
            return column.null
        if column.name == "seq_id":
            return 1_000_000 + n
        if column.name == "ticker":
            return int(rng.integers(0, 3))
        if column.name == "action":
            return int(rng.integers(1, 4))
        if column.table == "bool":
            return int(rng.integers(0, 2))
        if column.name == "trade_id":
            return [b"", b"ETH-123456", b"00000000-0000-1000-0000-" + b"0" * 32][int(rng.integers(0, 3))]
        if column.ring.startswith("S"):
            return [b"1m", b"trades", "ü".encode(), b""][int(rng.integers(0, 4))]
        if column.ring == "f8":
            return [float(rng.normal()), math.nan, 0.0, 1e-12][int(rng.integers(0, 4))]
        if column.ring == "i1":
            return int(rng.integers(-1, 2))
        if column.ring == "u1":
            return int(rng.integers(0, 256))
        if column.ring == "u4":
            return int(rng.integers(0, 2**32))
        return int(rng.integers(0, 2**52))

    return [[value(column, n) for column in feed.columns] for n in range(count)]


def as_rows(feed: Feed, values: list[list[object]]) -> np.ndarray:
    rows = np.zeros(len(values), dtype=feed.dtype)
    for i, column in enumerate(feed.columns):
        rows[column.name] = [row[i] for row in values]
    return rows


def expected(feed: Feed, row: list[object]) -> dict[str, object]:
    """What one row must read as, by the words of records.py alone."""
    given_values = dict(zip((c.name for c in feed.columns), row, strict=True))
    result: dict[str, object] = {}
    for column in feed.table_columns:
        value = given_values[column.name]
        missing = column.null is not None and (value == column.null or (math.isnan(column.null) and math.isnan(value)))
        if column.name == "exchange":
            result["exchange"] = "DERIBIT"
        elif column.name == "ticker":
            result["ticker"] = TICKERS[value]
        elif column.name == "action":
            result["action"] = Action(value).name
        elif column.name == "trade_id":
            counter = given_values["trade_seq"]
            result["trade_id"] = value.decode() or ("" if counter == -1 else str(counter))
        elif missing:
            result[column.name] = None
        elif column.table == "timestamp":
            result[column.name] = EPOCH + timedelta(microseconds=value)
        elif column.table == "bool":
            result[column.name] = bool(value)
        else:
            result[column.name] = value.decode() if isinstance(value, bytes) else value
    return result


def same(a: object, b: object) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("feed", FEEDS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_every_value_of_every_feed_reads_as_it_was_written(feed: Feed, count: int) -> None:
    values = random_values(feed, count, seed=count)
    table = rows_to_table(feed, as_rows(feed, values), TICKERS, "DERIBIT")
    table.validate(full=True)
    assert table.schema == arrow_schema(feed)
    assert table.column_names == [c.name for c in feed.table_columns]
    for found, row in zip(table.to_pylist(), values, strict=True):
        wanted = expected(feed, row)
        assert all(same(found[name], wanted[name]) for name in wanted), (found, wanted)


@pytest.mark.parametrize("feed", FEEDS.values(), ids=lambda f: f.name)
def test_rows_appended_in_portions_are_the_rows_appended_at_once(feed: Feed) -> None:
    rows = as_rows(feed, random_values(feed, 40, seed=1) * 300)
    buffer = ColumnBuffer(feed, len(rows))
    edges = [0, 1, 7, 4096, 4097, 9000, len(rows)]
    for low, high in pairwise(edges):
        buffer.append(rows[low:high])
    assert buffer.room == 0
    one, two = buffer.table(TICKERS, "OKX"), rows_to_table(feed, rows, TICKERS, "OKX")
    for name in one.column_names:
        if pa.types.is_floating(one.schema.field(name).type):
            assert one[name].combine_chunks().view(pa.int64()).equals(two[name].combine_chunks().view(pa.int64()))
        else:
            assert one[name].to_pylist() == two[name].to_pylist()
    assert one["price" if "price" in one.column_names else "seq_id"].to_numpy()[:40].tobytes() == (
        rows["price" if "price" in one.column_names else "seq_id"][:40].tobytes()
    )


def test_rows_that_lost_their_padding_read_the_same() -> None:
    rows = as_rows(TRADES, random_values(TRADES, 20, seed=5))
    packed = np.concatenate([rows[:9], rows[9:]])
    assert packed.dtype.itemsize != TRADES.dtype.itemsize
    assert rows_to_table(TRADES, packed, TICKERS, "X")["trade_id"].to_pylist() == (
        rows_to_table(TRADES, rows, TICKERS, "X")["trade_id"].to_pylist()
    )


def test_rows_seen_through_a_slice_or_a_mask_read_the_same() -> None:
    rows = as_rows(TRADES, random_values(TRADES, 20, seed=6))
    for some in (rows[::3], rows[rows["side"] > 0]):
        assert rows_to_table(TRADES, some, TICKERS, "X")["seq_id"].to_pylist() == some["seq_id"].tolist()


@given(st.lists(st.integers(-1, 2**63 - 1), max_size=40))
def test_a_trade_id_left_empty_is_the_counter_in_decimal(counters: list[int]) -> None:
    rows = np.zeros(len(counters), dtype=TRADES.dtype)
    rows["trade_seq"] = counters
    ids = rows_to_table(TRADES, rows, TICKERS, "X")["trade_id"].to_pylist()
    assert ids == ["" if n == -1 else str(n) for n in counters]


def test_bytes_that_are_no_text_do_not_hold_up_a_table() -> None:
    rows = np.zeros(2, dtype=TRADES.dtype)
    rows["trade_id"] = [b"ab\xff\xfe", b"fine"]
    assert rows_to_table(TRADES, rows, TICKERS, "X")["trade_id"].to_pylist() == ["ab��", "fine"]


def test_an_action_without_a_name_is_unknown_and_never_null() -> None:
    rows = np.zeros(4, dtype=FEEDS["orderbook_l2"].dtype)
    rows["action"] = [1, 0, 3, 200]
    actions = rows_to_table(FEEDS["orderbook_l2"], rows, TICKERS, "X")["action"].to_pylist()
    assert actions == ["NEW", "UNKNOWN", "DELETE", "UNKNOWN"]


def test_a_dictionary_holds_only_the_instruments_that_occur() -> None:
    rows = np.zeros(3, dtype=TRADES.dtype)
    rows["ticker"] = [2, 0, 2]
    column = rows_to_table(TRADES, rows, TICKERS, "X")["ticker"].combine_chunks()
    assert column.to_pylist() == [TICKERS[2], TICKERS[0], TICKERS[2]]
    assert column.dictionary.to_pylist() == [TICKERS[0], TICKERS[2]]


@pytest.mark.parametrize("feed", FEEDS.values(), ids=lambda f: f.name)
def test_only_columns_that_name_a_null_can_be_null(feed: Feed) -> None:
    for column, found in zip(feed.table_columns, arrow_schema(feed), strict=True):
        assert found.nullable == (column.null is not None), column.name


@pytest.mark.parametrize("feed", FEEDS.values(), ids=lambda f: f.name)
def test_the_clickhouse_table_has_every_column_and_replaces_what_is_delivered_twice(feed: Feed) -> None:
    ddl = clickhouse_ddl(feed)
    lines = [line.strip() for line in ddl.splitlines()]
    for column in feed.table_columns:
        (line,) = [line for line in lines if line.startswith(f"`{column.name}` ")]
        assert ("Nullable(" in line) == (column.null is not None)
        assert line.split("COMMENT ")[1].rstrip(",") == "'" + column.doc.replace("'", "''") + "'"
    assert f"CREATE TABLE IF NOT EXISTS {feed.name}\n" in ddl
    assert (
        "ENGINE = ReplacingMergeTree\nPARTITION BY date\nORDER BY (ticker, timestamp, seq_id, connector, epoch)" in ddl
    )
    assert "`timestamp` DateTime64(6, 'UTC')" in ddl
    assert "`exchange` Enum8('BINANCE_SPOT' = 1, 'BINANCE_FUTURES' = 2, 'DERIBIT' = 3," in ddl


def test_the_schema_page_names_every_column_of_every_feed() -> None:
    page = schema_markdown()
    for feed in FEEDS.values():
        section = page.split(f"### `{feed.name}`")[1].split("###")[0]
        for column in feed.table_columns:
            assert f"| `{column.name}` |" in section
            assert column.doc in section
    assert "LAST=1, SNAPSHOT=2, RESYNCED=4" in page
    assert "<" not in page
