"""The records stay as they are: sizes, offsets and enum numbers are part of the ring's layout version."""

import itertools
import struct

import numpy as np
import pytest

from mdcollector.records import FEEDS, LAYOUT_VERSION, RECORD_ALIGN, Action, Exchange, Feed, Flag

EVERY_FEED = pytest.mark.parametrize("feed", FEEDS.values(), ids=lambda feed: feed.name)

HEAD = {
    "timestamp": ("<i8", 0), "rcv_timestamp": ("<i8", 8), "packet_id": ("<i8", 16), "parse_ns": ("<u4", 24),
    "publish_ns": ("<u4", 28), "ticker": ("<u4", 32), "exchange": ("|u1", 36), "flags": ("|u1", 37),
}  # fmt: skip


def test_sizes_and_offsets_are_pinned_for_this_layout_version() -> None:
    assert LAYOUT_VERSION == 1
    assert {name: feed.dtype.itemsize for name, feed in FEEDS.items()} == {
        "trades": 128, "orderbook_l2": 128, "bbo": 128, "tickers": 192, "candles": 128, "liquidations": 64,
        "instruments": 192, "gaps": 128, "clocks": 128,
    }  # fmt: skip
    own = {
        name: {column.name: feed.dtype.fields[column.name][1] for column in (*feed.bytes2, *feed.words)}
        for name, feed in FEEDS.items()
    }
    assert own == {
        "trades": {"side": 38, "price": 40, "qty": 48, "trade_seq": 56, "trade_id": 64},
        "orderbook_l2": {"side": 38, "action": 39, "price": 40, "qty": 48, "update_id": 56},
        "bbo": {"bid_price": 40, "bid_qty": 48, "ask_price": 56, "ask_qty": 64, "update_id": 72},
        "tickers": {
            "last": 40, "open_24h": 48, "high_24h": 56, "low_24h": 64, "volume_24h": 72, "quote_volume_24h": 80,
            "bid_price": 88, "ask_price": 96, "mark_price": 104, "index_price": 112, "funding_rate": 120,
            "next_funding_time": 128, "open_interest": 136,
        },
        "candles": {
            "closed": 38, "interval": 40, "open_time": 48, "open": 56, "high": 64, "low": 72, "close": 80,
            "volume": 88, "trades": 96,
        },
        "liquidations": {"side": 38, "price": 40, "qty": 48},
        "instruments": {
            "active": 38, "kind": 40, "base": 56, "quote": 80, "status": 96, "tick_size": 128, "qty_step": 136,
            "contract_size": 144, "listed_time": 152, "expiry_time": 160,
        },
        "gaps": {
            "repaired": 38, "feed": 40, "first_id": 56, "last_id": 64, "from_time": 72, "to_time": 80, "cause": 88,
        },
        "clocks": {"source": 40, "offset_us": 48, "uncertainty_us": 56, "step_us": 64},
    }  # fmt: skip


def test_enum_numbers_are_pinned() -> None:
    assert {e.name: e.value for e in Exchange} == {
        "BINANCE_SPOT": 1, "BINANCE_FUTURES": 2, "DERIBIT": 3, "OKX": 4, "BYBIT_SPOT": 5, "BYBIT_LINEAR": 6,
        "BYBIT_INVERSE": 7, "BYBIT_OPTION": 8, "COINBASE": 9, "COINBASE_EXCHANGE": 10, "GMX": 11,
    }  # fmt: skip
    assert {a.name: a.value for a in Action} == {"NEW": 1, "UPDATE": 2, "DELETE": 3}
    assert {f.name: f.value for f in Flag} == {
        "LAST": 1, "SNAPSHOT": 2, "RESYNCED": 4, "BOOK_INVALID": 8, "REPAIRED": 16, "REPLAYED": 32, "TIME_LOCAL": 64,
        "UNPROVEN": 128,
    }  # fmt: skip


@EVERY_FEED
def test_every_record_starts_with_the_same_head_and_ends_with_its_number(feed: Feed) -> None:
    fields = feed.dtype.fields
    assert fields is not None
    assert {name: (fields[name][0].str, fields[name][1]) for name in HEAD} == HEAD
    assert feed.dtype.itemsize % RECORD_ALIGN == 0
    assert fields["seq_id"] == (np.dtype("<i8"), feed.dtype.itemsize - 8)
    assert feed.columns[-1].name == "seq_id"
    assert len(feed.bytes2) <= 2
    ends = sorted((at, at + dtype.itemsize) for dtype, at, *_ in fields.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends)), "columns overlap"


@EVERY_FEED
def test_what_the_packer_writes_the_dtype_reads(feed: Feed) -> None:
    values: list[object] = []
    for number, column in enumerate(feed.columns, start=1):
        if column.ring[0] == "S":
            values.append(f"text{number}".encode())
        else:
            values.append(number * 1.5 if column.ring == "f8" else number)
    target = bytearray(b"\xff" * feed.dtype.itemsize)
    feed.packer.pack_into(target, 0, *values)
    row = np.frombuffer(target, feed.dtype)[0]
    assert [row[column.name].item() for column in feed.columns] == values
    fields = feed.dtype.fields
    assert fields is not None
    padding = bytearray(target)
    for dtype, at, *_ in fields.values():
        padding[at : at + dtype.itemsize] = bytes(dtype.itemsize)
    assert not any(padding), "padding must be zero, or equal rows would differ in their checksum"


@EVERY_FEED
def test_the_packer_keeps_the_extremes_of_every_column(feed: Feed) -> None:
    for pick in ("min", "max"):
        values: list[object] = []
        for column in feed.columns:
            if column.ring[0] == "S":
                values.append(b"" if pick == "min" else b"x" * int(column.ring[1:]))
            elif column.ring == "f8":
                values.append(float(getattr(np.finfo("f8"), pick)))
            else:
                values.append(int(getattr(np.iinfo(column.ring), pick)))
        row = np.frombuffer(feed.packer.pack(*values), feed.dtype)[0]
        assert [row[column.name].item() for column in feed.columns] == values


@EVERY_FEED
def test_a_table_has_every_column_once_the_common_ones_first(feed: Feed) -> None:
    names = [column.name for column in feed.table_columns]
    assert names[:6] == ["timestamp", "rcv_timestamp", "exchange", "ticker", "seq_id", "packet_id"]
    assert names[-3:] == ["flags", "parse_ns", "publish_ns"]
    assert sorted(names) == sorted(column.name for column in feed.columns)
    assert all(column.doc and column.table for column in feed.table_columns)
    with pytest.raises(struct.error):
        feed.packer.pack(*range(len(feed.columns) + 1))
