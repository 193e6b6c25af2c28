"""The records: every feed defined once; dtype, packer, table columns, DDL types and documentation are derived from it.

Read by everybody, imports nothing of the project. A record is one fixed-width little-endian row whose size is a
multiple of 64 bytes and whose last word is its sequence number. Sizes are pinned by `tests/test_records.py`:
changing one is a new layout version of the ring (`LAYOUT_VERSION`).

Every record starts with the same 40 bytes, so a reader can look at any feed without knowing which one it is:

    timestamp i8 | rcv_timestamp i8 | packet_id i8 | parse_ns u4 | publish_ns u4 | ticker u4 | exchange u1 | flags u1 | 2 x u1
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property

import numpy as np

LAYOUT_VERSION = 1
RECORD_ALIGN = 64
UINT32_MAX = 0xFFFF_FFFF
TICKER_BYTES_MAX = 60  # UTF-8 bytes of an instrument name (Binance lists non-ASCII symbols)


class Exchange(IntEnum):
    """Venues. A number, once given, never changes."""

    BINANCE_SPOT = 1
    BINANCE_FUTURES = 2
    DERIBIT = 3
    OKX = 4
    BYBIT_SPOT = 5
    BYBIT_LINEAR = 6
    BYBIT_INVERSE = 7
    BYBIT_OPTION = 8
    COINBASE = 9
    COINBASE_EXCHANGE = 10
    GMX = 11


class Action(IntEnum):
    """What happened to one level of a book."""

    NEW = 1
    UPDATE = 2
    DELETE = 3


class Flag(IntFlag):
    """Bits of the `flags` column."""

    NONE = 0
    LAST = 1  # last row of an exchange message
    SNAPSHOT = 2  # row of a full book
    RESYNCED = 4  # first rows after a resync
    BOOK_INVALID = 8  # the book behind this row is crossed, or it is not proven (then UNPROVEN is set too)
    REPAIRED = 16  # fetched over REST after it was missed
    REPLAYED = 32  # came from a recording
    TIME_LOCAL = 64  # the exchange gave no time: timestamp is rcv_timestamp
    UNPROVEN = 128  # row of a book message that could not be joined to a book: one before it is missing


BUY, SELL = 1, -1
BID, ASK = 1, -1
UNKNOWN = 0


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `ring` is its numpy type in the ring ("" = table only), `table` its logical type in stored tables.

    Logical types: timestamp (us, UTC), int64, int8, uint8, uint32, float64, bool, text, category (text of few
    distinct values). `null` is the value in the ring that stands for "not given" and becomes null in tables.
    """

    name: str
    ring: str
    table: str
    doc: str
    null: float | None = None


_HEAD = (
    Column("timestamp", "i8", "timestamp", "event time given by the exchange, us UTC (the matching engine's where it gives both)"),
    Column("rcv_timestamp", "i8", "timestamp", "when the packet was read, us UTC, taken before any parsing"),
    Column("packet_id", "i8", "int64", "local, the same for all rows that one network read delivered"),
    Column("parse_ns", "u4", "uint32", "ns from packet read until decoded, saturating; of a trade or bbo alone in its message the same reading as publish_ns"),
    Column("publish_ns", "u4", "uint32", "ns from packet read until the row was visible in the ring, saturating"),
    Column("ticker", "u4", "category", "symbol exactly as the exchange reports it (in the ring: index into the instrument table)"),
    Column("exchange", "u1", "category", "venue, see Exchange"),
    Column("flags", "u1", "uint8", "bits, see Flag"),
)  # fmt: skip
# Native, on a machine that is little-endian with 8 bytes in a long: struct packs a large `q`, and each `d` of another byte
# order than "@", by a general way that takes 80 ns a record longer.
_WORD_CODES = {"i8": "l", "f8": "d"}
_SEQ = Column("seq_id", "i8", "int64", "local, +1 per row of a ring, over restarts too")
_TABLE_FIRST = ("timestamp", "rcv_timestamp", "exchange", "ticker", "seq_id", "packet_id")
_TABLE_LAST = ("flags", "parse_ns", "publish_ns")


@dataclass(frozen=True)
class Feed:
    """A kind of record, and so a table, a ring and a directory of that name."""

    name: str
    doc: str
    bytes2: tuple[Column, ...]  # up to two one-byte columns behind the common head
    words: tuple[Column, ...]  # columns of 8 bytes or text of a multiple of 8 bytes

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """All columns in ring order."""
        return (*_HEAD, *self.bytes2, *self.words, _SEQ)

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """numpy dtype of one record, itemsize a multiple of 64, `seq_id` in the last 8 bytes."""
        offset, offsets = 0, []
        for column in (*_HEAD, *self.bytes2):
            offsets.append(offset)
            offset += np.dtype(column.ring).itemsize
        offset = 40
        for column in self.words:
            offsets.append(offset)
            offset += np.dtype(column.ring).itemsize
        size = -(-(offset + 8) // RECORD_ALIGN) * RECORD_ALIGN
        offsets.append(size - 8)
        return np.dtype(
            {
                "names": [c.name for c in self.columns],
                "formats": ["<" + c.ring if c.ring[0] != "S" else c.ring for c in self.columns],
                "offsets": offsets,
                "itemsize": size,
            }
        )

    @cached_property
    def packer(self) -> struct.Struct:
        """struct of one record: values in ring order. `pack_into` zeroes its target first, so padding is zero."""
        codes = {**_WORD_CODES, "u4": "I", "u1": "B", "i1": "b"}
        parts, end = ["@"], 0
        for column in self.columns:
            field_offset = self.dtype.fields[column.name][1]  # type: ignore[index]
            parts.append(f"{field_offset - end}x" if field_offset > end else "")
            parts.append(codes[column.ring] if column.ring in codes else f"{column.ring[1:]}s")
            end = field_offset + np.dtype(column.ring).itemsize
        packer = struct.Struct("".join(parts))
        assert packer.size == self.dtype.itemsize, (self.name, packer.size)
        return packer

    @cached_property
    def word_packer(self) -> struct.Struct:
        """`packer` of the hottest rows: `ticker` and all columns of one byte as one `row_word`."""
        codes = (_WORD_CODES.get(c.ring, f"{c.ring[1:]}s") for c in self.words)
        text = "@lllIIl" + "".join(codes)
        packer = struct.Struct(f"{text}{self.dtype.itemsize - 8 - struct.calcsize(text)}xl")
        assert packer.size == self.dtype.itemsize, (self.name, packer.size)
        return packer

    @cached_property
    def table_columns(self) -> tuple[Column, ...]:
        """Columns of the stored table, in its order: the common ones, the feed's own, flags and stage times."""
        by_name = {c.name: c for c in self.columns}
        own = [c for c in (*self.bytes2, *self.words) if c.table]
        return (*(by_name[n] for n in _TABLE_FIRST), *own, *(by_name[n] for n in _TABLE_LAST))


def row_word(ticker: int, exchange: int, flags: int, first: int = 0, second: int = 0) -> int:
    """The 8 bytes of a row from `ticker` to the feed's own columns of one byte, as the word that `word_packer` takes."""
    return int.from_bytes(struct.pack("<IBBbB", ticker, exchange, flags, first, second), "little", signed=True)


FLAGS_SHIFT = 40  # where the flags are in a `row_word`


TRADES = Feed(
    "trades",
    "executions; side is always the taker's",
    (Column("side", "i1", "int8", "taker's side: BUY=1, SELL=-1, UNKNOWN=0"),),
    (
        Column("price", "f8", "float64", "price as the exchange quotes it"),
        Column("qty", "f8", "float64", "quantity as the exchange reports it"),
        Column("trade_seq", "i8", "int64", "the exchange's counter that grows by 1 per trade of the instrument; null where it has none", -1),
        Column("trade_id", "S56", "text", "the exchange's trade id, exact (in the ring empty where it is trade_seq in decimal)"),
    ),
)  # fmt: skip
ORDERBOOK_L2 = Feed(
    "orderbook_l2",
    "one row per changed level; a snapshot is a run of NEW rows flagged SNAPSHOT, the last row of a message is flagged LAST",
    (
        Column("side", "i1", "int8", "BID=1, ASK=-1, UNKNOWN=0"),
        Column(
            "action",
            "u1",
            "category",
            "NEW: the level was not in the book; UPDATE: it was, or UNPROVEN: unknown; DELETE: quantity 0",
        ),
    ),
    (
        Column("price", "f8", "float64", "price of the level"),
        Column("qty", "f8", "float64", "absolute quantity, 0 on DELETE"),
        Column("update_id", "i8", "int64", "the exchange's id of the message that brought the row"),
    ),
)
BBO = Feed(
    "bbo",
    "best bid and offer",
    (),
    (
        Column("bid_price", "f8", "float64", "best bid, NaN where the side is empty"),
        Column("bid_qty", "f8", "float64", "quantity at the best bid"),
        Column("ask_price", "f8", "float64", "best ask, NaN where the side is empty"),
        Column("ask_qty", "f8", "float64", "quantity at the best ask"),
        Column("update_id", "i8", "int64", "the exchange's book id; null where it has none", -1),
    ),
)
TICKERS = Feed(
    "tickers",
    "statistics of the last 24 hours and, for derivatives, the marks; NaN = not given, never 0",
    (),
    (
        Column("last", "f8", "float64", "last price"),
        Column("open_24h", "f8", "float64", "price 24 h ago"),
        Column("high_24h", "f8", "float64", "highest price of 24 h"),
        Column("low_24h", "f8", "float64", "lowest price of 24 h"),
        Column("volume_24h", "f8", "float64", "volume of 24 h in base units"),
        Column("quote_volume_24h", "f8", "float64", "volume of 24 h in quote units"),
        Column("bid_price", "f8", "float64", "best bid"),
        Column("ask_price", "f8", "float64", "best ask"),
        Column("mark_price", "f8", "float64", "mark price"),
        Column("index_price", "f8", "float64", "index price"),
        Column("funding_rate", "f8", "float64", "current funding rate, as a fraction"),
        Column("next_funding_time", "i8", "timestamp", "when funding is next exchanged; null where not given", -1),
        Column("open_interest", "f8", "float64", "open interest as the exchange reports it"),
    ),
)
CANDLES = Feed(
    "candles",
    "candles; an open one comes again until it is closed",
    (Column("closed", "u1", "bool", "no later version of this candle is to be expected"),),
    (
        Column("interval", "S8", "category", "1m, 5m, 1h, 1d, ..."),
        Column("open_time", "i8", "timestamp", "start of the candle"),
        Column("open", "f8", "float64", "first price"),
        Column("high", "f8", "float64", "highest price"),
        Column("low", "f8", "float64", "lowest price"),
        Column("close", "f8", "float64", "last price"),
        Column("volume", "f8", "float64", "volume in base units; null where the venue has none", float("nan")),
        Column("trades", "i8", "int64", "number of trades; null where not given", -1),
    ),
)
LIQUIDATIONS = Feed(
    "liquidations",
    "forced orders; most venues sample them, so they are a lower bound",
    (
        Column(
            "side", "i1", "int8", "side of the forced order: BUY=1 (a short was closed), SELL=-1 (a long was closed)"
        ),
    ),
    (
        Column("price", "f8", "float64", "price of the forced order"),
        Column("qty", "f8", "float64", "quantity of the forced order"),
    ),
)
GAPS = Feed(
    "gaps",
    "the ledger of what was missed; a later row with the same feed, ticker and ids replaces an earlier one",
    (
        Column(
            "repaired",
            "u1",
            "bool",
            "the missing rows were fetched and are in the table, flagged REPAIRED, or came late",
        ),
    ),
    (
        Column("feed", "S16", "category", "feed that has the hole"),
        Column("first_id", "i8", "int64", "first missing id; null where the feed has no ids", -1),
        Column("last_id", "i8", "int64", "last missing id", -1),
        Column("from_time", "i8", "timestamp", "time of the last row before the hole; null where unknown", -1),
        Column("to_time", "i8", "timestamp", "time of the first row behind the hole"),
        Column("cause", "S32", "category", "sequence, reconnect, restart, lapped, buffer_full, ..."),
    ),
)
INSTRUMENTS = Feed(
    "instruments",
    "what the venue says of an instrument, one row when it is first seen and one whenever something of it changes",
    (Column("active", "u1", "bool", "it trades, so its streams bring data; false too when it is no longer listed"),),
    (
        Column("kind", "S16", "category", "spot, perpetual, future, option, ..."),
        Column("base", "S24", "category", "what is traded, as the exchange calls it"),
        Column("quote", "S16", "category", "what it is priced in, as the exchange calls it"),
        Column("status", "S32", "category", "the exchange's own word"),
        Column("tick_size", "f8", "float64", "smallest step of the price; null where not given", float("nan")),
        Column("qty_step", "f8", "float64", "smallest step of the quantity; null where not given", float("nan")),
        Column("contract_size", "f8", "float64", "what one unit of `qty` is, in base or quote units as the exchange names it; null where not given", float("nan")),
        Column("listed_time", "i8", "timestamp", "when trading begins or began; null where not given", -1),
        Column("expiry_time", "i8", "timestamp", "when it expires; null where not given or never", -1),
    ),
)  # fmt: skip
CLOCKS = Feed(
    "clocks",
    "how far the venue's clock is from this machine's, some times a minute, and every step of this machine's clock; ticker is *",
    (),
    (
        Column("source", "S8", "category", "request: the venue was asked for its time; events: from times of events, which are past when they come, so the venue is ahead by at least that; step: this machine's clock was set"),
        Column("offset_us", "f8", "float64", "venue's clock minus this machine's, us; null where not known", float("nan")),
        Column("uncertainty_us", "f8", "float64", "the true offset is at most so far from offset_us; null where only a bound on one side is known", float("nan")),
        Column("step_us", "i8", "int64", "how far this machine's clock was set forward just before this row, 0 but for steps"),
    ),
)  # fmt: skip

FEEDS: dict[str, Feed] = {
    f.name: f for f in (TRADES, ORDERBOOK_L2, BBO, TICKERS, CANDLES, LIQUIDATIONS, INSTRUMENTS, GAPS, CLOCKS)
}
ALWAYS_ON = (
    INSTRUMENTS.name,
    GAPS.name,
    CLOCKS.name,
)  # every connector has them; they tell nothing of whether data flows
DATA_FEEDS = tuple(name for name in FEEDS if name not in ALWAYS_ON)
